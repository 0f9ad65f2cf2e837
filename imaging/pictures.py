"""What a run leaves for the eye: overlays, legends, sheets, and curves."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from imaging.atomic_files import whole_file

# green and magenta: apart on tissue, also for the colour-blind
TRUTH, PREDICTION = (0, 230, 90), (255, 0, 200)


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Bool (H,W) -> the rim of its foreground, `width` pixels wide and inside of it."""
    return mask & ~ndimage.binary_erosion(mask, iterations=width)


def colours(n: int) -> list[tuple[int, int, int]]:
    """n colours, RGB, to tell classes apart: hues a golden angle apart."""
    hues = [(0.33 + 0.618034 * k) % 1 for k in range(n)]
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.8, 1)) for hue in hues]


def overlay(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray) -> Image.Image:
    """Image uint8 (H,W,3), masks bool (n,H,W), one a class -> the prediction filled, the rim of the
    truth: in magenta and green, or of several classes both in the colour of the class."""
    width, several = max(1, min(image.shape[:2]) // 150), len(prediction) > 1
    inks = colours(len(prediction)) if several else [PREDICTION]
    fill = 0.45 if several else 0.15
    shown = image.astype(np.float32)
    for mask, ink in zip(prediction, inks, strict=True):
        shown[mask] = (1 - fill) * shown[mask] + fill * np.array(ink)
        if not several:
            shown[outline(mask, width)] = ink
    for mask, ink in zip(
        () if truth is None else truth, inks if several else [TRUTH], strict=False
    ):
        shown[outline(mask, width)] = ink
    return Image.fromarray(shown.astype(np.uint8))


def three_planes(x: np.ndarray, at: tuple[int, ...], spacing) -> np.ndarray:
    """(…,X,Y,Z), axes to right, front and top -> (…,H,W): an axial, a coronal and a sagittal plane
    through voxel `at` side by side, in true proportions.

    As radiologists look: from the feet, from the front, and with the nose to the left.
    """
    planes, finest = [], min(spacing)
    for axis in (2, 1, 0):
        plane = np.take(x, at[axis], axis - 3).swapaxes(-1, -2)[..., ::-1, ::-1]  # (…,h,w)
        for place, other in zip((-1, -2), (a for a in range(3) if a != axis), strict=True):
            n = plane.shape[place]
            size = round(n * spacing[other] / finest)
            plane = np.take(plane, np.arange(size) * n // size, place)
        planes.append(plane)
    tallest = max(plane.shape[-2] for plane in planes)
    none = [(0, 0)] * (x.ndim - 3)
    sides = [[*none, (0, tallest - plane.shape[-2]), (0, 0)] for plane in planes]
    return np.concatenate([np.pad(*pair) for pair in zip(planes, sides, strict=True)], -1)


def volume_overlay(
    image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray, spacing
) -> Image.Image:
    """`overlay` of `three_planes`: uint8 (X,Y,Z), bool (n,X,Y,Z), mm -> a picture.

    The planes are those with most of the truth (without one, of the prediction), small classes
    counting as much as large ones.
    """
    shown = prediction if truth is None or not truth.any() else truth
    at = []
    for axis in range(3):
        areas = shown.sum(tuple(1 + a for a in range(3) if a != axis))  # (n,side)
        at.append(int((areas / np.maximum(1, areas.sum(1, keepdims=True))).sum(0).argmax()))
    masks = [None if x is None else three_planes(x, at, spacing) for x in (truth, prediction)]
    grey = three_planes(image, at, spacing)
    return overlay(np.repeat(grey[..., None], 3, 2), *masks)


def draw_prompts(picture: Image.Image, prompts: list[tuple]) -> None:
    """Draw SAM's prompts into a picture, in its pixels: boxes and points yellow, outside ones cyan.

    Each prompt is a box or None, its points (P,2), and their labels (P,): 1 inside, 0 outside, -1
    no point.
    """
    draw, r = ImageDraw.Draw(picture), max(2, min(picture.size) // 80)
    for box, points, labels in prompts:
        if box is not None:
            draw.rectangle([float(x) for x in box], outline="yellow", width=max(1, r // 3))
        for (x, y), inside in zip(points, labels, strict=True):
            if inside >= 0:
                ink = "yellow" if inside else "cyan"
                draw.ellipse((x - r, y - r, x + r, y + r), ink, "black")


def legend(names: tuple[str, ...], width: int = 320) -> Image.Image:
    """The names of the classes without the background, each beside its colour."""
    page = Image.new("RGB", (width, 20 * len(names) + 4), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for k, (name, ink) in enumerate(zip(names, colours(len(names)), strict=True)):
        draw.rectangle((4, 20 * k + 4, 20, 20 * k + 20), ink, "black")
        draw.text((28, 20 * k + 4), name, "black", font)
    return page


def class_map(numbers: np.ndarray, classes: int) -> Image.Image:
    """Class numbers uint8 (H,W) -> a palette image of the same numbers in the classes' colours.

    All 256 have one, grey beyond the classes: of a short palette Pillow keeps few bits of a pixel,
    and 255, which does not count, would be 15.
    """
    picture, inks = Image.fromarray(numbers), [(0, 0, 0), *colours(classes - 1)]
    picture.putpalette([x for ink in inks + [(128,) * 3] * (256 - classes) for x in ink])
    return picture


def captioned(picture: Image.Image, caption: str, width: int = 320) -> Image.Image:
    """The picture at a common width, with its caption below in as many lines as it needs.

    A picture more than three times as tall as wide keeps its shape and becomes narrower.
    """
    scale = min(width / picture.width, 3 * width / picture.height)
    sides = [max(1, round(scale * side)) for side in picture.size]  # one row of pixels stays one
    picture = picture.resize(sides)
    font, lines = ImageFont.load_default(size=13), []
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
    """Cards of one width, row by row, on white."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) + gap for row in rows]
    width = min(columns, len(cards)) * (cards[0].width + gap) - gap
    page = Image.new("RGB", (width, sum(heights) - gap), "white")
    for i, row in enumerate(rows):
        for k, card in enumerate(row):
            page.paste(card, (k * (card.width + gap), sum(heights[:i])))
    return page


def save_picture(path: Path, picture: Image.Image) -> None:
    with whole_file(path) as part:
        picture.save(part, format="PNG")


def curves(path: Path, history: list[dict]) -> None:
    """Losses, and validation scores, over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, names in (left, ("train_loss", "val_loss")), (right, ("val_dice", "val_iou")):
        for name in names:
            rows = [row for row in history if name in row]  # not every epoch validates
            if rows:
                x, y = ([row[key] for row in rows] for key in ("epoch", name))
                axes.plot(x, y, ".-", label=name.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
