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


def overlay(
    image: np.ndarray, ground_truth: np.ndarray | None, prediction: np.ndarray
) -> Image.Image:
    """Draw masks over an image: the prediction filled, the ground truth as an outline.

    image: uint8 (H,W,3). Masks: bool (K,H,W), one per class. A single class is magenta in the
    prediction, with an outline too, and green in the ground truth. Several classes have the colours
    of `class_colours` in both.
    """
    width = max(1, min(image.shape[:2]) // 150)  # of outlines, in pixels
    is_multiclass = len(prediction) > 1
    if is_multiclass:
        prediction_colours = class_colours(len(prediction))
        truth_colours = prediction_colours
        opacity = 0.45
    else:
        prediction_colours = [PREDICTION]
        truth_colours = [GROUND_TRUTH]
        opacity = 0.15

    canvas = image.astype(np.float32)
    for mask, colour in zip(prediction, prediction_colours, strict=True):
        canvas[mask] = (1 - opacity) * canvas[mask] + opacity * np.array(colour)
        if not is_multiclass:
            canvas[outline(mask, width)] = colour
    if ground_truth is not None:
        for mask, colour in zip(ground_truth, truth_colours, strict=False):
            canvas[outline(mask, width)] = colour
    return Image.fromarray(canvas.astype(np.uint8))


def three_planes(x: np.ndarray, voxel: tuple[int, ...], spacing) -> np.ndarray:
    """Put the axial, coronal and sagittal plane through a voxel side by side.

    x (…,X,Y,Z), axes to the right, front and top -> (…,H,W). Planes look as radiologists see them:
    from the feet, from the front, and with the nose to the left. Nearest neighbour brings them to
    true proportions; spacing is that of the voxels, in mm.
    """
    finest = min(spacing)
    planes = []
    for axis, horizontal, vertical in ((2, 0, 1), (1, 0, 2), (0, 1, 2)):
        plane = np.take(x, voxel[axis], axis - 3).swapaxes(-1, -2)  # (…,vertical,horizontal)
        plane = plane[..., ::-1, ::-1]
        width = round(plane.shape[-1] * spacing[horizontal] / finest)
        height = round(plane.shape[-2] * spacing[vertical] / finest)
        plane = resize_axis(plane, -1, width)
        planes.append(resize_axis(plane, -2, height))  # (…,height,width)

    # Pad the planes at the bottom to the height of the tallest.
    tallest = max(plane.shape[-2] for plane in planes)
    padded = []
    for plane in planes:
        padding = [(0, 0)] * plane.ndim
        padding[-2] = (0, tallest - plane.shape[-2])
        padded.append(np.pad(plane, padding))
    return np.concatenate(padded, -1)  # (…,tallest,sum of widths)


def resize_axis(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Bring one axis of an array to a size by nearest neighbour."""
    indices = np.arange(size) * x.shape[axis] // size
    return np.take(x, indices, axis)


def central_voxel(masks: Iterable[np.ndarray], size) -> tuple[int, ...]:
    """Return the voxel whose three planes show most of masks, bool (X,Y,Z).

    All masks count the same, however large they are. If all are empty, it is the middle of `size`.
    """
    shares = [np.zeros(n) for n in size]
    for mask in masks:
        count = max(1, np.count_nonzero(mask))
        for axis in range(3):
            other_axes = tuple(other for other in range(3) if other != axis)
            shares[axis] += np.count_nonzero(mask, other_axes) / count

    voxel = []
    for share, n in zip(shares, size, strict=True):
        voxel.append(int(share.argmax()) if share.any() else n // 2)
    return tuple(voxel)


def volume_overlay(
    image: np.ndarray, ground_truth: np.ndarray | None, prediction: np.ndarray, spacing
) -> Image.Image:
    """Draw `overlay` on `three_planes` of a volume.

    image: uint8 (X,Y,Z); masks: bool (K,X,Y,Z); spacing in mm. The planes are those through the
    `central_voxel` of the ground truth, or of the prediction if there is none.
    """
    masks = prediction
    if ground_truth is not None and ground_truth.any():
        masks = ground_truth

    voxel = central_voxel(masks, image.shape)
    grey = three_planes(image, voxel, spacing)  # (H,W)
    rgb = np.repeat(grey[..., None], 3, 2)  # (H,W,3)
    if ground_truth is not None:
        ground_truth = three_planes(ground_truth, voxel, spacing)  # (K,H,W)
    return overlay(rgb, ground_truth, three_planes(prediction, voxel, spacing))


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
    lines = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") < width - 8:
            lines[-1] += f" {word}"
        else:
            lines.append(word)

    card = Image.new("RGB", (width, picture.height + 17 * len(lines) + 8), "white")
    card.paste(picture)
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(lines):
        draw.text((4, picture.height + 3 + 17 * i), line, "black", font)
    return card


def sheet(cards: list[Image.Image], columns: int = 3, gap: int = 6) -> Image.Image:
    """Put pictures of one width on a white page, row by row."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = []
    for row in rows:
        heights.append(max(card.height for card in row) + gap)
    width = min(columns, len(cards)) * (cards[0].width + gap) - gap

    page = Image.new("RGB", (width, sum(heights) - gap), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for k, card in enumerate(row):
            page.paste(card, (k * (card.width + gap), top))
        top += height
    return page


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
