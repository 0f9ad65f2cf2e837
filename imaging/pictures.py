"""Pictures for people: overlays of masks, legends, sheets of several pictures, training curves."""

import colorsys
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from imaging.atomic_files import atomic_write

# Green and magenta are easy to tell apart on tissue, also for colour-blind people.
GROUND_TRUTH = (0, 230, 90)
PREDICTION = (255, 0, 200)


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the rim of a mask's foreground, inside of it and `width` pixels wide: bool (H,W)."""
    return mask & ~ndimage.binary_erosion(mask, iterations=width)


def class_colours(n: int) -> list[tuple[int, int, int]]:
    """Return n RGB colours, 0..255. Each hue is a golden angle away from the one before."""
    colours = []
    for k in range(n):
        hue = (0.33 + 0.618034 * k) % 1
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, 1)  # 0..1
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def mask_colours(n: int) -> list[tuple[int, int, int]]:
    """Return the colours of n predicted masks."""
    return [PREDICTION] if n == 1 else class_colours(n)


def mask_opacity(n: int) -> float:
    """Return the opacity of the fill of n predicted masks; a single one has an outline too."""
    return 0.15 if n == 1 else 0.45


def outline_width(image: np.ndarray) -> int:
    """Return the width in pixels of outlines in an image (H,W,3)."""
    return max(1, min(image.shape[:2]) // 150)


def draw_masks(
    image: np.ndarray, masks: np.ndarray, colours: list, opacity: float, has_outline: bool
) -> Image.Image:
    """Draw masks over an image.

    image: uint8 (H,W,3). masks: bool (n,H,W), with n colours; later masks lie on top. opacity: of
    the fill, 0..1.
    """
    width = outline_width(image)
    canvas = image.astype(np.float32)
    for mask, colour in zip(masks, colours, strict=True):
        canvas[mask] = (1 - opacity) * canvas[mask] + opacity * np.array(colour)
        if has_outline:
            canvas[outline(mask, width)] = colour
    return Image.fromarray(canvas.astype(np.uint8))


def overlay(
    image: np.ndarray, ground_truth: np.ndarray | None, prediction: np.ndarray
) -> Image.Image:
    """Draw masks over an image: the prediction filled, the ground truth as an outline.

    image: uint8 (H,W,3). Masks: bool (K,H,W), one per class. A single class is magenta in the
    prediction, with an outline too, and green in the ground truth. Several classes have the colours
    of `class_colours` in both.
    """
    K = len(prediction)
    colours = mask_colours(K)
    drawn = draw_masks(image, prediction, colours, mask_opacity(K), has_outline=K == 1)
    if ground_truth is None:
        return drawn

    width = outline_width(image)
    truth_colours = [GROUND_TRUTH] if K == 1 else colours
    canvas = np.array(drawn)
    for mask, colour in zip(ground_truth, truth_colours, strict=False):
        canvas[outline(mask, width)] = colour
    return Image.fromarray(canvas)


# --- volumes --------------------------------------------------------------------------------------

PLANES = ("sagittal", "coronal", "axial")  # name of the plane across axis X, Y, Z
PLANE_AXES = ((1, 2), (0, 2), (0, 1))  # its horizontal and its vertical axis
SLICES = 5  # of the main plane in an overlay of a volume
COARSER = 1.2  # slices this many times thicker than their pixels decide the main plane
SLICE_SIDE = 360  # pixels, the longer side of a slice there
COLUMNS = 4  # planes side by side
GAP = 4  # pixels between planes
PAGE_WIDTH = 960  # pixels, at least
LONGEST_SIDE = 1600  # pixels of any plane
CAPTION_WIDTH = 240  # pixels, wide enough for "sagittal 512 of 512, 300.0 mm"
CAPTION_HEIGHT = 20


def plane(x: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Return a plane of a volume as radiologists see it: (…,X,Y,Z) -> (…,H,W), a view.

    The plane is the one across `axis` at an index. Axes lead to the right, front and top. Axial
    planes are seen from the feet, coronal ones from the front, sagittal ones with the nose to the
    left.
    """
    position = [slice(None)] * 3
    position[axis] = index
    flat = x[(..., *position)]  # (…,horizontal,vertical)
    return flat.swapaxes(-1, -2)[..., ::-1, ::-1]


def resize_nearest(x: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize planes by nearest neighbour: (…,H,W) -> (…,height,width)."""
    H, W = x.shape[-2:]
    rows = np.arange(height) * H // height
    columns = np.arange(width) * W // width
    return x.take(columns, -1).take(rows, -2)


def three_planes(x: np.ndarray, voxel: tuple[int, ...], spacing) -> np.ndarray:
    """Put the axial, coronal and sagittal plane through a voxel side by side.

    x (…,X,Y,Z), axes to the right, front and top -> (…,H,W). Nearest neighbour brings the planes to
    true proportions; spacing is that of the voxels, in mm.
    """
    finest = min(spacing)
    planes = []
    for axis in (2, 1, 0):
        horizontal, vertical = PLANE_AXES[axis]
        flat = plane(x, axis, voxel[axis])  # (…,vertical,horizontal)
        width = round(flat.shape[-1] * spacing[horizontal] / finest)
        height = round(flat.shape[-2] * spacing[vertical] / finest)
        planes.append(resize_nearest(flat, width, height))  # (…,height,width)

    # Pad the planes at the bottom to the height of the tallest.
    tallest = max(flat.shape[-2] for flat in planes)
    padded = []
    for flat in planes:
        padding = [(0, 0)] * flat.ndim
        padding[-2] = (0, tallest - flat.shape[-2])
        padded.append(np.pad(flat, padding))
    return np.concatenate(padded, -1)  # (…,tallest,sum of widths)


def class_shares(masks: Iterable[np.ndarray], size) -> list[np.ndarray]:
    """Return how much of masks, bool (X,Y,Z), each plane across X, Y and Z shows.

    size: of the volume. These are three arrays (X,), (Y,) and (Z,), the sums of the classes'
    shares: all classes count the same, whatever their size. Only the box around a class is counted,
    which is quick.
    """
    shares = [np.zeros(side) for side in size]
    for mask in masks:
        (box,) = ndimage.find_objects(mask.view(np.uint8), max_label=1)
        if box is None:
            continue
        inside = mask[box]
        count = np.count_nonzero(inside)
        for axis in range(3):
            other_axes = tuple(other for other in range(3) if other != axis)
            shares[axis][box[axis]] += np.count_nonzero(inside, other_axes) / count
    return shares


def fullest_plane(shares: np.ndarray) -> int:
    """Return the index of the largest share (n,), the middle one if all are 0."""
    return int(shares.argmax()) if shares.any() else len(shares) // 2


def central_voxel(masks: Iterable[np.ndarray], size) -> tuple[int, ...]:
    """Return the voxel whose three planes show most of masks, bool (X,Y,Z).

    All masks count the same. If all are empty, it is the middle of the volume's `size`.
    """
    return tuple(map(fullest_plane, class_shares(masks, size)))


def shown_masks(ground_truth: np.ndarray | None, prediction: np.ndarray) -> np.ndarray:
    """Return the masks that decide which planes are drawn: the ground truth, if it has any."""
    has_truth = ground_truth is not None and ground_truth.any()
    return ground_truth if has_truth else prediction


def volume_thumbnail(
    image: np.ndarray, ground_truth: np.ndarray | None, prediction: np.ndarray, spacing
) -> Image.Image:
    """Draw `overlay` on `three_planes` of a volume, a picture for sheets of many volumes.

    image: uint8 (X,Y,Z); masks: bool (K,X,Y,Z); spacing in mm. The planes are those through the
    `central_voxel` of the ground truth, or of the prediction if there is none.
    """
    voxel = central_voxel(shown_masks(ground_truth, prediction), image.shape)
    grey = three_planes(image, voxel, spacing)  # (H,W)
    rgb = np.repeat(grey[..., None], 3, 2)  # (H,W,3)
    if ground_truth is not None:
        ground_truth = three_planes(ground_truth, voxel, spacing)  # (K,H,W)
    return overlay(rgb, ground_truth, three_planes(prediction, voxel, spacing))


def main_axis(spacing) -> int:
    """Return the axis across which slices were taken: the one of the thickest slices, else Z."""
    coarsest = int(np.argmax(spacing))
    others = [side for axis, side in enumerate(spacing) if axis != coarsest]
    return coarsest if spacing[coarsest] > COARSER * max(others) else 2


def spread_slices(shares: np.ndarray) -> list[int]:
    """Return up to SLICES indices of slices, evenly through the slices that have a share (n,).

    The slice with the largest share is among them. Without any share they are spread over the
    whole volume.
    """
    n = len(shares)
    shown = np.flatnonzero(shares)
    first = int(shown[0]) if shown.size else 0
    last = int(shown[-1]) if shown.size else n - 1

    # As many slices as are drawn, even around an object that is thinner.
    count = min(SLICES, n)
    length = max(count, last - first + 1)
    first -= (length - (last - first + 1)) // 2
    first = min(max(0, first), n - length)

    indices = []
    for k in range(count):
        indices.append(first + length * (2 * k + 1) // (2 * count))
    if shown.size:
        peak = int(shares.argmax())
        nearest = int(np.abs(np.array(indices) - peak).argmin())
        indices[nearest] = peak
    return indices


def volume_overlay(
    image: np.ndarray, ground_truth: np.ndarray | None, prediction: np.ndarray, spacing
) -> Image.Image:
    """Draw `overlay` on slices of a volume, large enough to judge the masks.

    image: uint8 (X,Y,Z); masks: bool (K,X,Y,Z); spacing in mm. Up to SLICES slices go through the
    object, axial ones unless the voxels are longest along another axis. The other two planes follow
    where they show most of it. The object is the ground truth, or the prediction if there
    is none. The caption of a plane has its number, counted from 1 at the left, back or bottom, and
    its distance from the first in mm. All planes have true proportions.
    """
    shares = class_shares(shown_masks(ground_truth, prediction), image.shape)
    axis = main_axis(spacing)
    planes = [(axis, index) for index in spread_slices(shares[axis])]
    for other in (1, 0, 2):
        if other != axis:
            planes.append((other, fullest_plane(shares[other])))

    lengths = [side * size for side, size in zip(image.shape, spacing, strict=True)]  # mm
    scale = SLICE_SIDE / max(lengths[side] for side in PLANE_AXES[axis])  # pixels per mm

    cells = []
    for where in planes:
        plane_axis, index = where
        size = drawn_size(lengths, plane_axis, scale)
        drawn = draw_plane(image, ground_truth, prediction, where, size)
        number = f"{index + 1} of {image.shape[plane_axis]}"
        distance = f"{index * spacing[plane_axis]:.1f} mm"
        cells.append(labelled(drawn, f"{PLANES[plane_axis]} {number}, {distance}"))
    return in_rows(cells)


def drawn_size(lengths: list[float], axis: int, scale: float) -> tuple[int, int]:
    """Return width and height in pixels of the plane across an axis, in true proportions.

    lengths: of the volume in mm. scale: pixels per mm; a side longer than LONGEST_SIDE lowers it.
    """
    horizontal, vertical = PLANE_AXES[axis]
    longest = max(lengths[horizontal], lengths[vertical])
    scale = min(scale, LONGEST_SIDE / longest)
    width = max(1, round(lengths[horizontal] * scale))
    height = max(1, round(lengths[vertical] * scale))
    return width, height


def draw_plane(image, ground_truth, prediction, where: tuple[int, int], size) -> Image.Image:
    """Draw `overlay` on one plane of a volume, at (width, height) pixels.

    where: the axis and the index of the plane. Grey levels are interpolated, masks are not.
    """
    axis, index = where
    grey = Image.fromarray(np.ascontiguousarray(plane(image, axis, index)))
    grey = np.asarray(grey.resize(size, Image.Resampling.BILINEAR))  # (H,W)
    rgb = np.repeat(grey[..., None], 3, 2)  # (H,W,3)

    resized = []
    for masks in (ground_truth, prediction):
        if masks is not None:
            masks = resize_nearest(plane(masks, axis, index), *size)  # (K,H,W)
        resized.append(masks)
    return overlay(rgb, *resized)


def labelled(picture: Image.Image, caption: str) -> Image.Image:
    """Write a line below a picture of a plane, white on black."""
    size = (max(picture.width, CAPTION_WIDTH), picture.height + CAPTION_HEIGHT)
    cell = Image.new("RGB", size)
    cell.paste(picture)
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(cell).text((4, picture.height), caption, "white", font)
    return cell


def in_rows(cells: list[Image.Image]) -> Image.Image:
    """Put pictures of any size on black, COLUMNS in a row; at least PAGE_WIDTH pixels wide."""
    positions = []
    page_width = PAGE_WIDTH
    top = 0
    for start in range(0, len(cells), COLUMNS):
        row = cells[start : start + COLUMNS]
        left = 0
        for cell in row:
            positions.append((left, top))
            left += cell.width + GAP
        page_width = max(page_width, left - GAP)
        top += max(cell.height for cell in row) + GAP

    page = Image.new("RGB", (page_width, top - GAP))
    for cell, position in zip(cells, positions, strict=True):
        page.paste(cell, position)
    return page


# --- prompts and classes --------------------------------------------------------------------------


def draw_prompts(picture: Image.Image, prompts: list[tuple]) -> None:
    """Draw SAM's prompts into a picture: boxes and inner points yellow, outer points cyan.

    A prompt is a box (x0, y0, x1, y1) or None, points (P,2), and their labels (P,): 1 inside the
    object, 0 outside, -1 no point. Coordinates are in pixels of the picture.
    """
    draw = ImageDraw.Draw(picture)
    radius = max(2, min(picture.size) // 80)
    for box, points, labels in prompts:
        if box is not None:
            corners = [float(x) for x in box]
            draw.rectangle(corners, outline="yellow", width=max(1, radius // 3))
        for (x, y), label in zip(points, labels, strict=True):
            if label >= 0:
                circle = (x - radius, y - radius, x + radius, y + radius)
                draw.ellipse(circle, "yellow" if label else "cyan", "black")


def legend(names: tuple[str, ...], width: int = 320) -> Image.Image:
    """Draw the names of the classes, without the background, beside their colours."""
    page = Image.new("RGB", (width, 20 * len(names) + 4), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=13)
    for k, (name, colour) in enumerate(zip(names, class_colours(len(names)), strict=True)):
        top = 20 * k + 4
        draw.rectangle((4, top, 20, top + 16), colour, "black")
        draw.text((28, top), name, "black", font)
    return page


def class_map(indices: np.ndarray, num_classes: int) -> Image.Image:
    """Return class indices, uint8 (H,W), as a palette image in the colours of the classes.

    The palette has all 256 entries, grey beyond the classes: with a short one Pillow stores few
    bits per pixel, and 255 (ignored) would become 15.
    """
    background = (0, 0, 0)
    unused = (128, 128, 128)
    palette = [background, *class_colours(num_classes - 1)] + [unused] * (256 - num_classes)

    picture = Image.fromarray(indices)
    picture.putpalette(np.array(palette).ravel().tolist())
    return picture


def captioned(picture: Image.Image, caption: str, width: int = 320) -> Image.Image:
    """Resize a picture to a width and write a caption below it, in as many lines as it needs.

    A picture more than three times as tall as wide keeps its shape and becomes narrower.
    """
    scale = min(width / picture.width, 3 * width / picture.height)
    size = [max(1, round(scale * side)) for side in picture.size]  # a single row of pixels stays
    picture = picture.resize(size)

    font = ImageFont.load_default(size=13)
    lines = wrapped(caption, font, width - 8)
    card = Image.new("RGB", (width, picture.height + 17 * len(lines) + 8), "white")
    card.paste(picture)
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(lines):
        draw.text((4, picture.height + 3 + 17 * i), line, "black", font)
    return card


def wrapped(text: str, font, width: int) -> list[str]:
    """Return a text as lines of at most `width` pixels; words that are longer are cut."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") < width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) >= width:
                lines.append("")
            lines[-1] += letter
    return lines


def sheet(cards: list[Image.Image], columns: int = 3, gap: int = 6) -> Image.Image:
    """Put pictures on a white page, row by row, in columns as wide as the widest picture."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = []
    for row in rows:
        heights.append(max(card.height for card in row) + gap)
    column = max(card.width for card in cards) + gap
    width = min(columns, len(cards)) * column - gap

    page = Image.new("RGB", (width, sum(heights) - gap), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for k, card in enumerate(row):
            page.paste(card, (k * column, top))
        top += height
    return page


def sheet_with_legend(
    cards: list[Image.Image], columns: int, names: tuple[str, ...]
) -> Image.Image:
    """Return a `sheet` of pictures with the legend of several classes below it.

    names: of the classes without the background; a single one needs no legend.
    """
    page = sheet(cards, columns)
    return sheet([page, legend(names)], 1) if len(names) > 1 else page


def png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of an image, uint8 (H,W) or (H,W,3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=4)  # 6: 3 % smaller, twice the time
    return file.getvalue()


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whatever the suffix; the file appears complete or not at all."""
    with atomic_write(path) as part:
        picture.save(part, format="PNG")


def curves(path: Path, history: list[dict]) -> None:
    """Plot losses and validation scores over the epochs into a PNG file.

    history: the rows of metrics.csv. Epochs without validation lack some columns.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    plot_columns(left, history, ("train_loss", "val_loss"))
    left.set_ylim(bottom=0)
    plot_columns(right, history, ("val_dice", "val_iou"))
    right.set_ylim(0, 1)

    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def plot_columns(axes, history: list[dict], names: tuple[str, ...]) -> None:
    """Plot columns of the history that have values, with a legend, into axes of matplotlib."""
    for name in names:
        rows = [row for row in history if name in row]
        if rows:
            epochs = [row["epoch"] for row in rows]
            values = [row[name] for row in rows]
            axes.plot(epochs, values, ".-", label=name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
