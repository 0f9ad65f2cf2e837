"""The demo set: synthetic endoscopy in which only the text tells what is asked for."""

import argparse
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from engine.ranges import SEED, Number
from imaging import atomic_files

# Every image holds two to four blobs of different colours, all drawn from one distribution; one of
# them, drawn uniformly, is the target. Nothing but the text tells which one it is.

COLOURS = {  # what a person calls these on pink mucosa, sRGB
    "white": (240, 238, 228),
    "yellow": (232, 200, 52),
    "pink": (255, 160, 208),
    "red": (190, 14, 30),
    "brown": (104, 58, 22),
    "purple": (126, 54, 158),
}
SIZES = {  # mean radius as a share of the image's side; the gaps keep the words apart
    "small": (0.055, 0.070),  # 1.0 to 1.5 % of the area
    "medium": (0.095, 0.115),  # 2.8 to 4.2 %
    "large": (0.140, 0.165),  # 6.2 to 8.6 %
}
SHAPES = {"round": (1.0, 1.1), "oval": (1.6, 1.9)}  # long axis : short axis
PLACES = (  # medvlsm's words for the cells of a 3x3 grid, row by row
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
GAP = 0.03  # least distance between two blobs, and half of it to the border, in image sides


@dataclass
class Blob:
    """One blob: its words, and its outline as a field over the image."""

    colour: str
    size: str
    shape: str
    place: str
    centre: tuple[float, float]  # x, y in image sides
    radius: float  # mean radius in image sides
    window: tuple[slice, slice]  # rows and columns that the blob and its shadow may touch
    field: np.ndarray  # (H, W) float32: 0 at the centre, 1 on the outline, growing outwards

    @property
    def mask(self):
        """(H, W) uint8, 0 or 255."""
        return np.where(self.field < 1, 255, 0).astype(np.uint8)

    @property
    def prompts(self):
        """p0 to p6 in the words of medvlsm's polyp sets, each more precise than the one before."""
        p2 = f"{self.shape} polyp"
        p3 = f"{self.colour} {p2}"
        p4 = f"{self.size} {p3}"
        p6 = f"one {p4}, located in {self.place} of the image"
        return dict(p0="", p1="polyp", p2=p2, p3=p3, p4=p4, p5=f"one {p4}", p6=p6)


def unit_grid(size):
    """x and y of the pixel centres in image sides, each (size, size) float32."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis)


def draw_blob(rng, grid, colour, cell):
    """A blob of random size, shape and outline, its centre well inside `cell` of the 3x3 grid."""
    size, shape = list(SIZES)[rng.integers(3)], list(SHAPES)[rng.integers(2)]
    radius, ratio = rng.uniform(*SIZES[size]), rng.uniform(*SHAPES[shape])
    a, b = radius * ratio**0.5, radius / ratio**0.5  # the area stays that of the radius
    angle = rng.uniform(0, math.pi)
    c, s = math.cos(angle), math.sin(angle)
    extents = math.hypot(a * c, b * s), math.hypot(a * s, b * c)  # of the ellipse along x and y
    centre, window, side = [], [], len(grid[0])
    for third, extent in zip((cell % 3, cell // 3), extents, strict=True):
        reach = 1.1 * extent + GAP / 2  # 1.1 for the waves of the outline
        low, high = third / 3 + 0.04, (third + 1) / 3 - 0.04  # no centre between two words
        at = rng.uniform(max(low, reach), min(high, 1 - reach))
        ends = (at - reach - 0.05) * side, (at + reach + 0.05) * side
        centre.append(at)
        window.insert(0, slice(max(0, int(ends[0])), int(ends[1]) + 1))  # rows come first
    window = tuple(window)
    x, y = grid[0][window] - centre[0], grid[1][window] - centre[1]
    u, v = (x * c + y * s) / a, (y * c - x * s) / b
    theta = np.arctan2(v, u)
    near = np.hypot(u, v)
    for k in 2, 3, 4:
        near *= 1 + rng.normal(0, 0.06 / k) * np.cos(k * theta + rng.uniform(0, 2 * math.pi))
    field = np.full_like(grid[0], np.inf)
    field[window] = near
    return Blob(colour, size, shape, PLACES[cell], tuple(centre), radius, window, field)


def draw_blobs(rng, grid, count):
    """`count` blobs in different colours and cells that keep apart; drawn again until they do."""
    while True:
        blobs, taken = [], np.zeros(grid[0].shape, bool)
        for colour, cell in zip(
            rng.permutation(list(COLOURS))[:count], rng.permutation(9), strict=False
        ):
            blob = draw_blob(rng, grid, str(colour), int(cell))
            if (taken & ((blob.field - 1) * blob.radius < GAP)).any():
                break
            taken |= blob.field < 1
            blobs.append(blob)
        if len(blobs) == count:
            return blobs


def smooth_noise(rng, size, cells):
    """(size, size) float32 around 0, about -1 to 1, with features of 1/cells of the image."""
    coarse = rng.normal(0, 0.5, (cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def draw_vessels(rng, size):
    """(size, size) float32 in 0 to 1: thin winding lines, drawn twice as large and halved."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(4, 9)):
        steps = rng.integers(8, 24)
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.35, steps))
        stride = np.stack([np.cos(heading), np.sin(heading)], 1) * 0.03  # (steps, 2)
        path = (rng.uniform(0, 1, 2) + np.cumsum(stride, 0)) * 2 * size
        width = max(1, round(rng.uniform(0.006, 0.014) * 2 * size))
        pen.line(path.ravel().tolist(), fill=int(rng.integers(90, 256)), width=width)
    soft = canvas.reduce(2).filter(ImageFilter.GaussianBlur(0.004 * size))
    return np.asarray(soft, np.float32) / 255


def draw_mucosa(rng, grid):
    """The background, (H, W, 3) float32 in 0 to 1: tone, folds round a lumen, vessels."""
    size = len(grid[0])
    pink, orange = np.float32([[214, 130, 118], [208, 116, 86]]) / 255
    tone = (pink + (orange - pink) * rng.uniform()) * rng.uniform(0.92, 1.0)  # (3,)
    light = 1 + 0.07 * smooth_noise(rng, size, 3) + 0.04 * smooth_noise(rng, size, 8)
    light += 0.025 * smooth_noise(rng, size, 32)
    x, y = rng.uniform(-0.1, 1.1, 2).tolist()  # of the lumen
    distance = np.hypot(grid[0] - x, grid[1] - y) + 0.05 * smooth_noise(rng, size, 4)
    phase = 2 * math.pi * (rng.uniform(2.5, 4) * distance + rng.uniform())
    light += 0.06 * np.sin(phase) + 0.03 * np.cos(2 * phase)  # folds: one flank lit, one dark
    light *= 1 - 0.38 * np.exp(-((distance / 0.16) ** 2))
    blush = 0.05 * smooth_noise(rng, size, 5)[..., None]  # patches of redder and paler mucosa
    vessels = 0.4 * draw_vessels(rng, size)[..., None]
    image = tone * light[..., None] * (1 + blush * np.float32([0.3, -1, -1]))  # (H, W, 3)
    return image * (1 - vessels * np.float32([0.35, 0.75, 0.7]))


def paint_blob(rng, image, texture, blob, lamp, grid):
    """Paints one blob over `image` in place: contact shadow, domed body, highlight."""
    field, image = blob.field[blob.window], image[blob.window]  # views
    beyond = np.maximum(field - 1, 0) * blob.radius  # from the outline outwards, in image sides
    image *= 1 - 0.25 * np.exp(-((beyond / 0.018) ** 2))[..., None]
    body = np.float32(COLOURS[blob.colour]) / 255 + rng.normal(0, 0.012, 3).astype(np.float32)
    dome = np.sqrt(np.maximum(1 - field**2, 0))  # height of a half ball
    down, across = np.gradient(dome, 1 / (len(grid[0]) * blob.radius))
    shade = 0.82 + 0.18 * dome - 0.06 * np.clip(across * lamp[0] + down * lamp[1], -2, 2)
    shade += texture[blob.window]
    inside = np.clip(0.5 + (1 - field) * blob.radius / 0.02, 0, 1)[..., None]  # a half on it
    image += inside * (body * shade[..., None] - image)
    x, y = (at + 0.35 * blob.radius * d for at, d in zip(blob.centre, lamp, strict=True))
    squared = (grid[0][blob.window] - x) ** 2 + (grid[1][blob.window] - y) ** 2
    image += 0.45 * np.exp(squared / -((0.18 * blob.radius) ** 2))[..., None] * (1 - image)


def draw_image(rng, grid, blobs):
    """The picture of `blobs`, (H, W, 3) uint8."""
    size, image = len(grid[0]), draw_mucosa(rng, grid)
    angle = rng.uniform(0, 2 * math.pi)
    lamp = math.cos(angle), math.sin(angle)  # where the light comes from, for the whole image
    texture = 0.05 * smooth_noise(rng, size, 16) + 0.04 * smooth_noise(rng, size, 40)
    for blob in blobs:
        paint_blob(rng, image, texture, blob, lamp, grid)
    glare = np.zeros_like(grid[0])
    for _ in range(rng.integers(3, 9)):  # wet spots: far smaller than a small blob
        x, y = rng.uniform(0.05, 0.95, 2).tolist()
        wide, high = rng.uniform(0.006, 0.013, 2).tolist()
        glare += np.exp(-(((grid[0] - x) / wide) ** 2) - ((grid[1] - y) / high) ** 2)
    image += np.minimum(0.7 * glare, 1)[..., None] * (1 - image)
    corner = np.hypot(grid[0] - 0.5, grid[1] - 0.5)  # 0.71 in the corners, which the tube shades
    image *= (1 - 0.9 * np.clip((corner - 0.42) / 0.29, 0, 1) ** 2)[..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def png(pixels):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=4)  # 6: 3 % smaller, twice the time
    return file.getvalue()


def annotation(image, mask, blob):
    """An entry of an annotation file; bbox is [x0, y0, x1, y1], the ends excluded."""
    rows, columns = np.nonzero(blob.mask)
    bbox = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    bbox = [int(edge) for edge in bbox]
    return {"img_name": image, "mask_name": mask, "bbox": bbox, "prompts": blob.prompts}


def wrong_prompts(entries, rng):
    """The entries, each with the prompts of one whose target has another colour: all untrue."""
    colours = [entry["prompts"]["p3"].split()[0] for entry in entries]
    swapped = []
    for entry, colour in zip(entries, colours, strict=True):
        others = [other for other, c in zip(entries, colours, strict=True) if c != colour]
        swapped.append({**entry, "prompts": others[rng.integers(len(others))]["prompts"]})
    return swapped


def demo_files(images, size, objects, seed):
    """Yields (path in the data set, bytes) of every file of a demo set, the annotations last.

    An image depends on size, objects, seed and its number only. images: at least 30; size: at least
    64 pixels.
    """
    test = min(max(100, images * 12 // 100), images // 3)  # 100 make an interval worth reading
    train = images - test - images * 8 // 100
    entries = {"train": [], "val": [], "test": [], "other_blob": []}
    grid = unit_grid(size)
    for i in tqdm(range(images), desc="demo", unit="image", disable=None, leave=False):
        rng = np.random.default_rng((seed, i))
        blobs = draw_blobs(rng, grid, rng.integers(objects[0], objects[1] + 1))
        target, *others = (blobs[k] for k in rng.permutation(len(blobs)))
        split = "train" if i < train else "val" if i < images - test else "test"
        yield f"images/{i:05}.png", png(draw_image(rng, grid, blobs))
        yield f"masks/{i:05}.png", png(target.mask)
        entries[split].append(annotation(f"{i:05}.png", f"{i:05}.png", target))
        if split == "test" and others:  # asked for in `other_blob`
            yield f"masks/{i:05}_other.png", png(others[0].mask)
            entries["other_blob"].append(annotation(f"{i:05}.png", f"{i:05}_other.png", others[0]))
    entries["other_prompts"] = wrong_prompts(entries["test"], np.random.default_rng((seed, images)))
    for name, listed in entries.items():
        if listed:
            yield f"anns/{name}.json", json.dumps(listed, indent=1).encode()


def compare_files(folder, files):
    """Raises ValueError with the first file by which `folder` differs from exactly these files."""
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wrong = None
    for name, content in files:
        if name not in left or (folder / name).read_bytes() != content:
            wrong = f"{name} is missing or differs"
            break
        left.remove(name)
    if wrong or left:
        wrong = wrong or f"it also holds {min(left)}"
        raise ValueError(
            f"{folder}: not empty and not this demo set ({wrong}); nothing was written: "
            "choose another --out, or remove that folder"
        )


def demo(args):
    """Writes a demo set whole or not at all; a folder with other content is left alone."""
    files = demo_files(args.images, args.size, args.objects, args.seed)
    if args.out.exists() and any(args.out.iterdir()):
        compare_files(args.out, files)
        print(f"{args.out}: this demo set is there already")
        return 0
    with atomic_files.whole_folder(args.out) as part:
        for name, content in files:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
    splits = ", ".join(sorted(path.stem for path in (args.out / "anns").iterdir()))
    print(f"{args.out}: {args.images} images of {args.size}x{args.size}, splits {splits}")
    return 0


def object_counts(text):
    """ "2-4" -> (2, 4), "1" -> (1, 1)."""
    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 to 4 nor a range such as 2-4")
    return low, high


def options(command):
    """Describe `prepare.py demo`."""
    add = command(demo, "write a small synthetic data set")
    add("--out", type=Path, default="data/demo", metavar="DIR", help="folder to make (%(default)s)")
    help = "images in all (%(default)s)"
    add("--images", type=Number(True, 30), default=1000, metavar="N", help=help)
    help = "their height and width (%(default)s)"
    add("--size", type=Number(True, 64), default=128, metavar="PX", help=help)
    add("--objects", type=object_counts, default="2-4", metavar="A-B", help="blobs (%(default)s)")
    add("--seed", type=SEED, default=0, metavar="N", help="same seed, same bytes (%(default)s)")
