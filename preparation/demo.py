"""The demo set: synthetic endoscopy in which only the text says which blob is the target.

Every image has two to four blobs of different colours, all drawn from one distribution. One of
them, drawn uniformly, is the target; nothing but the text says which.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from engine.ranges import SEED, Number
from imaging import atomic_files, pictures

COLOURS = {  # as people name them on pink mucosa; sRGB
    "white": (240, 238, 228),
    "yellow": (232, 200, 52),
    "pink": (255, 160, 208),
    "red": (190, 14, 30),
    "brown": (104, 58, 22),
    "purple": (126, 54, 158),
}
SIZES = {  # mean radius as a share of the image's side; gaps keep the words unambiguous
    "small": (0.055, 0.070),  # 1.0 to 1.5 % of the area
    "medium": (0.095, 0.115),  # 2.8 to 4.2 %
    "large": (0.140, 0.165),  # 6.2 to 8.6 %
}
SHAPES = {"round": (1.0, 1.1), "oval": (1.6, 1.9)}  # ratio of the axes
POSITIONS = (  # medvlsm's words for the cells of a 3x3 grid, row by row
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
GAP = 0.03  # smallest distance between two blobs, half of it to the border, in image sides


# --- blobs ----------------------------------------------------------------------------------------


@dataclass
class Blob:
    """One blob: the words that describe it, and its outline as a field over the image."""

    colour: str
    size: str
    shape: str
    position: str
    centre: tuple[float, float]  # x, y in image sides
    radius: float  # mean radius in image sides
    window: tuple[slice, slice]  # rows and columns that the blob and its shadow may touch
    field: np.ndarray  # (H,W) float32: 0 at the centre, 1 on the outline, growing outwards

    @property
    def mask(self) -> np.ndarray:
        """The mask, uint8 (H,W), 0 or 255."""
        return np.where(self.field < 1, 255, 0).astype(np.uint8)

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts p0 to p6 as in medvlsm's polyp sets, each more precise than the one before."""
        p2 = f"{self.shape} polyp"
        p3 = f"{self.colour} {p2}"
        p4 = f"{self.size} {p3}"
        p5 = f"one {p4}"
        p6 = f"{p5}, located in {self.position} of the image"
        return dict(p0="", p1="polyp", p2=p2, p3=p3, p4=p4, p5=p5, p6=p6)


def unit_grid(size: int) -> list[np.ndarray]:
    """Return x and y of the pixel centres in image sides, each (size,size) float32."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis)


def draw_blob(rng: np.random.Generator, grid, colour: str, cell: int) -> Blob:
    """Draw a blob of random size, shape and outline with its centre in a cell of the 3x3 grid."""
    size = list(SIZES)[rng.integers(3)]
    shape = list(SHAPES)[rng.integers(2)]
    radius = rng.uniform(*SIZES[size])
    ratio = rng.uniform(*SHAPES[shape])
    angle = rng.uniform(0, math.pi)

    # An ellipse with the area of a circle of that radius; half its width and height.
    long_axis = radius * ratio**0.5
    short_axis = radius / ratio**0.5
    cos = math.cos(angle)
    sin = math.sin(angle)
    half_width = math.hypot(long_axis * cos, short_axis * sin)
    half_height = math.hypot(long_axis * sin, short_axis * cos)

    centre_x, columns = draw_centre(rng, cell % 3, half_width, len(grid[0]))
    centre_y, rows = draw_centre(rng, cell // 3, half_height, len(grid[0]))
    window = (rows, columns)

    # Elliptic distance from the centre, with three waves along the outline.
    x = grid[0][window] - centre_x
    y = grid[1][window] - centre_y
    u = (x * cos + y * sin) / long_axis
    v = (y * cos - x * sin) / short_axis
    theta = np.arctan2(v, u)
    distance = np.hypot(u, v)
    for k in (2, 3, 4):
        amplitude = rng.normal(0, 0.06 / k)
        phase = rng.uniform(0, 2 * math.pi)
        distance *= 1 + amplitude * np.cos(k * theta + phase)

    field = np.full_like(grid[0], np.inf)
    field[window] = distance
    centre = (centre_x, centre_y)
    return Blob(colour, size, shape, POSITIONS[cell], centre, radius, window, field)


def draw_centre(
    rng: np.random.Generator, third: int, extent: float, side: int
) -> tuple[float, slice]:
    """Draw a blob's centre along one axis; return it and the pixels that the blob may touch.

    third: 0, 1 or 2, of the image. extent: half the blob's size along the axis, in image sides.
    """
    reach = 1.1 * extent + GAP / 2  # 1.1 for the waves of the outline
    low = max(third / 3 + 0.04, reach)  # 0.04 keeps the words for positions unambiguous
    high = min((third + 1) / 3 - 0.04, 1 - reach)
    centre = rng.uniform(low, high)

    start = int((centre - reach - 0.05) * side)
    stop = int((centre + reach + 0.05) * side) + 1
    return centre, slice(max(0, start), stop)


def draw_blobs(rng: np.random.Generator, grid, count: int) -> list[Blob]:
    """Draw `count` blobs of different colours in different cells, again until none are too near."""
    while True:
        colours = rng.permutation(list(COLOURS))[:count]
        cells = rng.permutation(9)[:count]
        blobs = []
        occupied = np.zeros(grid[0].shape, bool)
        for colour, cell in zip(colours, cells, strict=True):
            blob = draw_blob(rng, grid, str(colour), int(cell))
            distance = (blob.field - 1) * blob.radius  # from the outline, in image sides
            if (occupied & (distance < GAP)).any():
                break
            occupied |= blob.field < 1
            blobs.append(blob)
        if len(blobs) == count:
            return blobs


# --- painting -------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return noise around 0, about -1 to 1, with features of 1/cells of the image: (size,size)."""
    coarse = rng.normal(0, 0.5, (cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def draw_vessels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return thin winding lines, (size,size) float32 in 0..1, drawn twice as large and halved."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(4, 9)):
        steps = rng.integers(8, 24)
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.35, steps))
        stride = np.stack([np.cos(heading), np.sin(heading)], 1) * 0.03  # (steps,2)
        path = (rng.uniform(0, 1, 2) + np.cumsum(stride, 0)) * 2 * size  # (steps,2)
        width = max(1, round(rng.uniform(0.006, 0.014) * 2 * size))
        pen.line(path.ravel().tolist(), fill=int(rng.integers(90, 256)), width=width)

    soft = canvas.reduce(2).filter(ImageFilter.GaussianBlur(0.004 * size))
    return np.asarray(soft, np.float32) / 255


def draw_mucosa(rng: np.random.Generator, grid) -> np.ndarray:
    """Return the background, (H,W,3) float32 in 0..1: tone, folds around a lumen, vessels."""
    size = len(grid[0])
    pink = np.float32([214, 130, 118]) / 255
    orange = np.float32([208, 116, 86]) / 255
    tone = (pink + (orange - pink) * rng.uniform()) * rng.uniform(0.92, 1.0)  # (3,)
    light = 1 + 0.07 * smooth_noise(rng, size, 3) + 0.04 * smooth_noise(rng, size, 8)
    light += 0.025 * smooth_noise(rng, size, 32)

    # Folds run in rings around the lumen, one flank lit and one dark; the lumen itself is dark.
    x, y = rng.uniform(-0.1, 1.1, 2).tolist()
    distance = np.hypot(grid[0] - x, grid[1] - y) + 0.05 * smooth_noise(rng, size, 4)
    phase = 2 * math.pi * (rng.uniform(2.5, 4) * distance + rng.uniform())
    light += 0.06 * np.sin(phase) + 0.03 * np.cos(2 * phase)
    light *= 1 - 0.38 * np.exp(-((distance / 0.16) ** 2))

    blush = 0.05 * smooth_noise(rng, size, 5)[..., None]  # (H,W,1), redder and paler patches
    vessels = 0.4 * draw_vessels(rng, size)[..., None]  # (H,W,1)
    image = tone * light[..., None] * (1 + blush * np.float32([0.3, -1, -1]))  # (H,W,3)
    return image * (1 - vessels * np.float32([0.35, 0.75, 0.7]))


@dataclass
class Scene:
    """An image that is being painted, and the surroundings that all of its blobs share."""

    image: np.ndarray  # (H,W,3) float32 in 0..1
    grid: list[np.ndarray]  # see `unit_grid`
    lamp: tuple[float, float]  # direction of the light, a unit vector
    texture: np.ndarray  # (H,W), added to the shade of blobs


def paint_blob(rng: np.random.Generator, scene: Scene, blob: Blob) -> None:
    """Paint a blob into the scene's image: contact shadow, domed body, highlight."""
    field = blob.field[blob.window]  # (h,w)
    image = scene.image[blob.window]  # (h,w,3), a view
    size = len(scene.grid[0])

    beyond = np.maximum(field - 1, 0) * blob.radius  # distance from the outline, in image sides
    image *= 1 - 0.25 * np.exp(-((beyond / 0.018) ** 2))[..., None]

    # The body has the height of half a ball, lit from the side of the lamp.
    body = np.float32(COLOURS[blob.colour]) / 255 + rng.normal(0, 0.012, 3).astype(np.float32)
    dome = np.sqrt(np.maximum(1 - field**2, 0))
    down, across = np.gradient(dome, 1 / (size * blob.radius))
    slope = across * scene.lamp[0] + down * scene.lamp[1]
    shade = 0.82 + 0.18 * dome - 0.06 * np.clip(slope, -2, 2)
    shade += scene.texture[blob.window]
    opacity = np.clip(0.5 + (1 - field) * blob.radius / 0.02, 0, 1)[..., None]  # 0.5 on the outline
    image += opacity * (body * shade[..., None] - image)

    x = blob.centre[0] + 0.35 * blob.radius * scene.lamp[0]
    y = blob.centre[1] + 0.35 * blob.radius * scene.lamp[1]
    squared = (scene.grid[0][blob.window] - x) ** 2 + (scene.grid[1][blob.window] - y) ** 2
    highlight = 0.45 * np.exp(squared / -((0.18 * blob.radius) ** 2))
    image += highlight[..., None] * (1 - image)


def add_glare(rng: np.random.Generator, image: np.ndarray, grid) -> None:
    """Paint wet spots, far smaller than a small blob, into an image (H,W,3)."""
    glare = np.zeros_like(grid[0])
    for _ in range(rng.integers(3, 9)):
        x, y = rng.uniform(0.05, 0.95, 2).tolist()
        width, height = rng.uniform(0.006, 0.013, 2).tolist()
        glare += np.exp(-(((grid[0] - x) / width) ** 2) - ((grid[1] - y) / height) ** 2)
    image += np.minimum(0.7 * glare, 1)[..., None] * (1 - image)


def draw_image(rng: np.random.Generator, grid, blobs: list[Blob]) -> np.ndarray:
    """Return the picture of blobs, uint8 (H,W,3)."""
    size = len(grid[0])
    image = draw_mucosa(rng, grid)
    angle = rng.uniform(0, 2 * math.pi)
    lamp = (math.cos(angle), math.sin(angle))
    texture = 0.05 * smooth_noise(rng, size, 16) + 0.04 * smooth_noise(rng, size, 40)

    scene = Scene(image, grid, lamp, texture)
    for blob in blobs:
        paint_blob(rng, scene, blob)
    add_glare(rng, image, grid)

    # The tube shades the corners, which are 0.71 from the centre.
    distance = np.hypot(grid[0] - 0.5, grid[1] - 0.5)
    image *= (1 - 0.9 * np.clip((distance - 0.42) / 0.29, 0, 1) ** 2)[..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# --- files ----------------------------------------------------------------------------------------


def annotation(image: str, mask: str, blob: Blob) -> dict:
    """Return an entry of an annotation file; bbox is [x0, y0, x1, y1], the ends excluded."""
    rows, columns = np.nonzero(blob.mask)
    bbox = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    bbox = [int(edge) for edge in bbox]
    return {"img_name": image, "mask_name": mask, "bbox": bbox, "prompts": blob.prompts}


def wrong_prompts(entries: list[dict], rng: np.random.Generator) -> list[dict]:
    """Return the entries, each with the prompts of a target of another colour: all are wrong."""
    colours = [entry["prompts"]["p3"].split()[0] for entry in entries]
    swapped = []
    for entry, colour in zip(entries, colours, strict=True):
        candidates = []
        for other, other_colour in zip(entries, colours, strict=True):
            if other_colour != colour:
                candidates.append(other)
        other = candidates[rng.integers(len(candidates))]
        swapped.append({**entry, "prompts": other["prompts"]})
    return swapped


def demo_files(
    images: int, size: int, objects: tuple[int, int], seed: int
) -> Iterator[tuple[str, bytes]]:
    """Yield path in the data set and content of every file of a demo set, annotations last.

    images: at least 30. size: at least 64 pixels. objects: fewest and most blobs per image. An
    image depends only on size, objects, seed and its number.
    """
    num_test = min(max(100, images * 12 // 100), images // 3)  # 100 give a useful interval
    num_train = images - num_test - images * 8 // 100
    entries = {"train": [], "val": [], "test": [], "other_blob": []}
    grid = unit_grid(size)

    for i in tqdm(range(images), desc="demo", unit="image", disable=None, leave=False):
        rng = np.random.default_rng((seed, i))
        blobs = draw_blobs(rng, grid, rng.integers(objects[0], objects[1] + 1))
        order = rng.permutation(len(blobs))
        target = blobs[order[0]]
        split = "train" if i < num_train else "val" if i < images - num_test else "test"

        name = f"{i:05}.png"
        yield f"images/{name}", pictures.png(draw_image(rng, grid, blobs))
        yield f"masks/{name}", pictures.png(target.mask)
        entries[split].append(annotation(name, name, target))

        # The split `other_blob` prompts for another blob of the test images.
        if split == "test" and len(blobs) > 1:
            other = blobs[order[1]]
            other_name = f"{i:05}_other.png"
            yield f"masks/{other_name}", pictures.png(other.mask)
            entries["other_blob"].append(annotation(name, other_name, other))

    entries["other_prompts"] = wrong_prompts(entries["test"], np.random.default_rng((seed, images)))
    for split, annotations in entries.items():
        if annotations:
            yield f"anns/{split}.json", json.dumps(annotations, indent=1).encode()


def compare_files(folder: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """Raise ValueError, one line, unless a folder holds exactly these files."""
    remaining = set()
    for path in folder.rglob("*"):
        if path.is_file():
            remaining.add(path.relative_to(folder).as_posix())

    difference = None
    for name, content in files:
        if name not in remaining or (folder / name).read_bytes() != content:
            difference = f"{name} is missing or differs"
            break
        remaining.remove(name)
    if difference is None and remaining:
        difference = f"it also holds {min(remaining)}"
    if difference is not None:
        raise ValueError(
            f"{folder}: not empty and not this demo set ({difference}); nothing was written: "
            "choose another --out, or remove that folder"
        )


# --- command --------------------------------------------------------------------------------------


def demo(args) -> int:
    """Write a small synthetic data set of endoscopy images with text prompts.

    Each image shows several blobs, and its prompt describes one of them. A folder that already has
    other content is refused and left as it is.
    """
    files = demo_files(args.images, args.size, args.objects, args.seed)
    if args.out.exists() and any(args.out.iterdir()):
        compare_files(args.out, files)
        print(f"{args.out}: this demo set is there already")
        return 0

    with atomic_files.atomic_folder(args.out) as part:
        for name, content in files:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
    splits = sorted(path.stem for path in (args.out / "anns").iterdir())
    print(
        f"{args.out}: {args.images} images of {args.size}x{args.size}, splits {', '.join(splits)}"
    )
    return 0


def object_counts(text: str) -> tuple[int, int]:
    """Parse a number of blobs or a range: "2-4" -> (2, 4), "1" -> (1, 1)."""
    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", text)
    if match:
        low = int(match[1])
        high = int(match[2] or match[1])
        if low <= high:
            return low, high
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 to 4 nor a range such as 2-4")


def options(command) -> None:
    """Add the options of `prepare.py demo`."""
    add = command(demo, "make a small synthetic data set of images with prompts")
    add(
        "--out",
        type=Path,
        default="data/demo",
        metavar="DIR",
        help="folder of the new data set (default: %(default)s)",
    )
    add(
        "--images",
        type=Number(True, 30),
        default=1000,
        metavar="N",
        help="number of images, all splits together (default: %(default)s)",
    )
    add(
        "--size",
        type=Number(True, 64),
        default=128,
        metavar="PX",
        help="height and width of the images in pixels (default: %(default)s)",
    )
    add(
        "--objects",
        type=object_counts,
        default="2-4",
        metavar="A-B",
        help="number of blobs per image, 1 to 4 or a range (default: %(default)s)",
    )
    add(
        "--seed",
        type=SEED,
        default=0,
        metavar="N",
        help="random seed; the same seed gives identical files (default: %(default)s)",
    )
