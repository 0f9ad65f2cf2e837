"""Make and check data sets.

    python prepare.py demo                      writes data/demo: synthetic endoscopy with prompts
    python prepare.py check data/demo [DATA]    reads whole data sets and reports what is wrong
    python prepare.py uw-madison DOWNLOAD       writes data/uw_madison: MR slices with class maps
    python prepare.py duke-dme DOWNLOAD         writes data/duke_dme: OCT, layers and fluid
    python prepare.py duke-amd DOWNLOAD         writes data/duke_amd: OCT, drusen
    python prepare.py msd RAW --out DATA        divides a task of the Medical Segmentation Decathlon
    python prepare.py btcv RAW                  writes data/btcv: abdominal CT, with a split
    python prepare.py demo-volumes              writes data/demo_volumes: synthetic abdominal CT
    python prepare.py boxes MASKS --like DATA   writes boxes.csv: prompts for SAM out of masks
    python prepare.py text-codes --data DATA    writes text_codes.safetensors: of classes, by CLIP

`demo` and `check` speak the layout of the medvlsm study (arXiv 2308.07706), with text prompts:

    images/  masks/  anns/{train,val,test}.json: [{"img_name", "mask_name", "prompts": {...}}, ...]

and `uw-madison` and `duke-*` that of class maps, whose pixels are class numbers:

    {train,val,test}/{images,masks}/NAME.png  classes.json: {"0": "background", "1": "stomach", ...}

`msd`, `btcv` and `demo-volumes` make volumes, in the Decathlon's layout (preparation/volume_sets.py):

    images{Tr,Ts}/NAME.nii.gz  labels{Tr,Ts}/NAME.nii.gz  dataset.json, which lists the splits

`check` only reads. Exit status: 0 fine, 1 findings, 2 could not run (one line on stderr).
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
import csv
import hashlib
import io
import json
import math
import re
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from tqdm import tqdm

import data
from engine import command_line, tables
from engine.ranges import GREY_LEVEL, POSITIVE, SEED, Number
from imaging import atomic_files, boxes_and_points, layouts, pictures, volumes
from preparation import text_embeddings, volume_sets

# --- demo ----------------------------------------------------------------------------------------
#
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
        for colour, cell in zip(rng.permutation(list(COLOURS))[:count], rng.permutation(9)):
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
    x, y = (at + 0.35 * blob.radius * d for at, d in zip(blob.centre, lamp))
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
    for entry, colour in zip(entries, colours):
        others = [other for other, c in zip(entries, colours) if c != colour]
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


# --- check ---------------------------------------------------------------------------------------
#
# How a file is read is decided in data.py and imaging/volumes.py; here is only counted what came out.
# `findings` maps a kind of finding to its lines, each of which begins with the file it is about.

MOST_LINES = 10  # printed of one kind; the rest are counted
SPLIT_ORDER = ("train", "val", "valid", "test")
MOST_FOREGROUND = 0.6  # of all pixels of a split; more are rather inverted masks

# How many grey levels 99 % of a file's pixels have. Measured on colonoscopy, skin, ultrasound and
# CT: masks, JPEG ones as well, have 1 to 5, images 87 to 245.
LEVELS_OF_MASKS = 24
LEVELS_OF_IMAGES = 40
SWAPPED_SAMPLE = 20  # masks of a split that are looked at, where its images look like masks

# Near-duplicates: two images are compared by the details of small grey thumbnails, as a cosine.
# Measured on 1000 images of colonoscopy, 22 of ultrasound, 9 of skin and 104 CT slices: copies
# that were saved as JPEG of quality 30, resized by 0.5 to 1.5, stretched to a square or brightened
# by 1.1 have 0.98 and more, brightened by 1.3 with white cut off 0.93 and more. Different scenes
# have at most 0.87, the next frame of a video or slice of a scan 0.90 to 0.99.
# Aligned images share their outline: 100 drawn fundus photographs reach 0.99. So the mean of all
# images is taken away before a second comparison: then different eyes have at most 0.89, the slices
# above 0.90 and more. The mean is known where there are enough images.
THUMBNAIL = 16  # pixels a side
NEAR = 0.95
NEAR_WITHOUT_MEAN = 0.90
ENOUGH_FOR_MEAN = 20  # images
NEAR_KIND = "nearly the same image in several splits: a copy, or the next frame of a video or scan"
MOST_NEAR = 3  # printed of them


@dataclass
class ImageFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    digest: bytes  # of the decoded pixels, so that a copy saved in another format is found
    levels: int  # see LEVELS_OF_MASKS
    thumbnail: np.ndarray  # see `thumbnail`
    non_finite: bool = False  # holds NaN or infinite pixels


@dataclass
class MaskFacts:
    size: tuple[int, int]
    mode: str
    counts: np.ndarray  # (3,256), of data.count_values
    turned: bool = False  # like its image, though nothing tells whether it had to be

    @property
    def largest(self):
        return int(np.flatnonzero(self.counts[0]).max())


@dataclass
class VolumeFacts:
    grid: volumes.Grid
    channels: int
    digest: bytes  # of the voxels
    counts: np.ndarray  # (256,): voxels of each class number, 255 of those that do not count


def digest_of(pixels):
    """Return a hash of an array's shape and content."""
    digest = hashlib.blake2b(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def main_levels(grey):
    """Return how many grey levels 99 % of an image's pixels have, the most frequent ones first."""
    counts = np.sort(grey.histogram())[::-1]
    return int(np.searchsorted(counts.cumsum(), 0.99 * counts.sum())) + 1


def thumbnail(grey):
    """Return the details of a grey image, (256,) float32 of length 1; zeros if it has none.

    Details are what differs from the surroundings, so that brightness and contrast do not count.
    """
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small = np.asarray(small, np.float32)
    details = small - ndimage.uniform_filter(small, 5, mode="nearest")
    details = details.ravel() - details.mean()
    if details.std() < 1:  # less than a grey level is noise
        return np.zeros_like(details)
    return details / np.linalg.norm(details)


def image_facts(path):
    """Return what an image file holds, or the error that says why it cannot be read."""
    try:
        pixels, non_finite = data.load_image(path)
        mode = data.open_image(path, decode=False).mode
        grey = Image.fromarray(pixels).convert("L")
        levels = main_levels(grey)
        size = pixels.shape[:2]
        return ImageFacts(size, mode, digest_of(pixels), levels, thumbnail(grey), non_finite)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{path}: does not fit into memory")


def mask_facts(entry, image):
    """Return the same of an entry's mask; `image` is what image_facts found for its image."""
    try:
        upright_as = entry.image if isinstance(image, ImageFacts) else None
        mask, turned = data.entry_mask(entry, upright_as)
        data.refuse_colours(entry)
        counts = data.count_values(entry, mask)
        mode = data.open_image(entry.mask, decode=False).mode
        return MaskFacts(mask.shape, mode, counts, turned)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{entry.mask}: does not fit into memory")


def add_error(error, findings):
    """Add the finding that a file is missing or cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    findings["missing files" if missing else "files that cannot be used"].append(str(error))


def read_splits(root, group_regex, findings):
    """Return {split: its entries} of a data set; a split that cannot be used is a finding."""
    places = layouts.splits(root)
    order = {name: k for k, name in enumerate(SPLIT_ORDER)}
    splits = {}
    for name in sorted(places, key=lambda name: (order.get(name, len(order)), name)):
        try:
            with redirect_stdout(io.StringIO()) as said:  # notes about files are only said
                splits[name] = layouts.annotations(root, name, group_regex)
        except (ValueError, OSError) as error:
            unusable = findings["splits that cannot be used"]
            if str(error) not in unusable:  # one classes.json spoils all splits
                unusable.append(str(error))
            continue

        for line in said.getvalue().splitlines():
            is_repeated = "repeated entries" in line
            kind = "entries listed twice" if is_repeated else "files that are no images"
            findings[kind].append(line)
        if not splits[name]:
            findings["splits without entries"].append(f"{places[name]}: has no entries")
    return splits


def read_images(splits, findings):
    """Return {path: ImageFacts} of the images that can be read; the rest are findings."""
    paths = [*dict.fromkeys(entry.image for entry in chain(*splits.values()))]
    images = {}
    bar = partial(tqdm, total=len(paths), desc="images", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for path, fact in bar(zip(paths, pool.map(image_facts, paths))):
            if isinstance(fact, Exception):
                add_error(fact, findings)
            else:
                images[path] = fact
    return images


def read_masks(splits, images, findings):
    """Return {path: MaskFacts} of the masks that can be read; the rest are findings."""
    by_mask = {entry.mask: entry for entry in chain(*splits.values())}
    facts_of_images = [images.get(entry.image) for entry in by_mask.values()]
    masks = {}
    bar = partial(tqdm, total=len(by_mask), desc="masks", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        facts = pool.map(mask_facts, by_mask.values(), facts_of_images)
        for path, fact in bar(zip(by_mask, facts)):
            if isinstance(fact, Exception):
                add_error(fact, findings)
            else:
                masks[path] = fact
    return masks


def are_exchanged(entries):
    """Return True if most images lie, by their names, in the folder of masks, and masks in theirs.

    Their endings differ, so that the files seem to be missing.
    """
    exchanged = 0
    for entry in entries:
        image = entry.mask.parent / entry.image.name
        mask = entry.image.parent / entry.mask.name
        exchanged += not entry.image.is_file() and image.is_file() and mask.is_file()
    return exchanged > len(entries) / 2


def look_exchanged(entries, images):
    """Return True if images have as few grey levels as masks, and their masks as many as images."""
    levels = [images[entry.image].levels for entry in entries if entry.image in images]
    if not levels or np.median(levels) > LEVELS_OF_MASKS:
        return False
    facts = [image_facts(entry.mask) for entry in entries[:SWAPPED_SAMPLE]]
    of_masks = [fact.levels for fact in facts if isinstance(fact, ImageFacts)]
    return bool(of_masks) and np.median(of_masks) >= LEVELS_OF_IMAGES


def read_pictures(root, splits, findings):
    """Return the splits whose images and masks are not exchanged, and {path: ImageFacts}.

    Of the others that is the one finding, as everything else that could be said of their masks
    follows from it.
    """
    swapped = [split for split, entries in splits.items() if are_exchanged(entries)]
    named_well = {split: entries for split, entries in splits.items() if split not in swapped}
    images = read_images(named_well, findings)
    for split, entries in named_well.items():
        if look_exchanged(entries, images):
            swapped.append(split)
    if swapped:
        line = f"{root}: images/ holds the masks, and masks/ the images ({', '.join(swapped)}); "
        findings["swapped folders"].append(f"{line}exchange the names of the two folders")
    checked = {split: entries for split, entries in splits.items() if split not in swapped}
    return checked, images


def check_sizes(splits, images, masks, findings):
    for split, entries in splits.items():
        for entry in entries:
            image, mask = images.get(entry.image), masks.get(entry.mask)
            if image and mask and image.size != mask.size:
                line = f"{entry.mask}: {wide(mask.size)}, its image {wide(image.size)} ({split})"
                findings["masks and images of different sizes"].append(line)


def check_pixels(images, masks, findings):
    """Add findings for images with non-finite pixels and for masks whose orientation is a guess."""
    for path, fact in images.items():
        if fact.non_finite:
            line = f"{path}: holds NaN or infinite pixels, read as 0"
            findings["images with NaN or infinite pixels"].append(line)
        if data.has_damaged_exif(path):
            line = f"{path}: its EXIF data is damaged, so that it is read as stored, not turned"
            findings["images with damaged EXIF data"].append(line)

    kind = "masks turned like their images, though they may be upright (see --mask-orientation)"
    for path, fact in masks.items():
        if fact.turned:
            line = f"{path}: has no EXIF tag and its image's orientation does not change the size"
            findings[kind].append(line)


def check_masks(root, splits, masks, findings, threshold=None):
    """Return foreground shares {(split, name): share}, {} without a rule, and the rule's words.

    threshold: of --mask-threshold. How masks are read is decided as in training, by
    data.mask_rule, here over all splits.
    """
    entries = []
    where = []
    for split, listed in splits.items():
        readable = [entry for entry in listed if entry.mask in masks]
        entries += readable
        where += [split] * len(readable)
    if not entries:
        return {}, data.BY_NUMBER

    counts = np.stack([masks[entry.mask].counts for entry in entries])  # (n,3,256)
    decision = data.mask_rule(entries, counts, threshold)
    if threshold is not None and decision.rule == data.BY_NUMBER:
        raise ValueError(f"--mask-threshold: the masks of {root} hold class numbers; remove it")
    for heading, line in decision.errors + decision.notes:
        findings[heading].append(line)
    if decision.errors and decision.rule != data.BY_NUMBER:
        return {}, "by no rule"

    shares = {}
    held = {}  # split -> of each of its masks, which classes it holds
    thresholds = data.mask_thresholds(entries, counts[:, 0], decision.rule)
    for split, entry, values, cut in zip(where, entries, counts[:, 0], thresholds.tolist()):
        inside = data.foreground_pixels(entry, values, cut)
        shares[split, entry.name] = inside / values.sum()
        n = len(entry.classes)
        held.setdefault(split, []).append(values[1:n] > 0 if n > 1 else [inside > 0])
        if entry.label is not None or n == 1:
            check_denial(entry, split, inside, masks[entry.mask].largest, cut, findings)
    check_classes(root, layouts.foreground(entries[0].classes), held, findings)
    check_foreground(root, shares, findings)
    return shares, decision.rule


def texts_of(entry):
    """Return all texts of an entry that ask for something; p0 is empty."""
    return [text for texts in entry.prompts.values() for text in texts if text.strip()]


def check_denial(entry, split, inside, largest, cut, findings):
    """Compare the foreground of a binary mask with its prompts: "no polyp" or a polyp.

    An empty mask without prompts is that of a healthy patient.
    """
    wanted = f"> {cut}" if cut >= 0 else "of class 1"
    if entry.label is not None:
        wanted = f"== {entry.label}"
    texts = texts_of(entry)
    denial = next((text for text in texts if text.lower().startswith("no ")), None)
    if not inside and texts and not denial:
        line = f"{entry.mask}: no pixel {wanted}, the largest is {largest} ({split})"
        findings["empty masks whose prompts ask for something"].append(line)
    if inside and denial:
        line = f"{entry.mask}: {inside} pixels, yet {denial!r} ({split})"
        findings["prompts that deny what the mask shows"].append(line)


def check_classes(root, names, held, findings):
    """Add a finding for each class that no mask holds, or none of those that are trained on.

    held: {split: [of a mask, for each of the K names, whether it holds that class]}.
    """
    by_split = {split: np.any(rows, axis=0) for split, rows in held.items()}
    in_any = np.any([*by_split.values()], axis=0)
    in_train = by_split.get("train", in_any)
    for k, name in enumerate(names):
        if not in_any[k]:
            findings["classes that no mask holds"].append(f"{root}: no mask holds {name!r}")
        elif not in_train[k]:
            splits = ", ".join(split for split, row in by_split.items() if row[k])
            line = f"{root}: no mask of train holds {name!r}, only {splits}"
            findings["classes that no mask holds"].append(line)


def check_foreground(root, shares, findings):
    """Add a finding for each split most of which is foreground, {(split, name): share}."""
    by_split = defaultdict(list)
    for (split, _), share in shares.items():
        by_split[split].append(share)
    for split, values in by_split.items():
        mean = np.mean(values)
        if mean > MOST_FOREGROUND:
            line = f"{root}: {mean:.0%} of {split} is foreground; are the masks inverted, or is "
            line += "the background another number than 0?"
            findings[f"foreground above {MOST_FOREGROUND:.0%}"].append(line)


def check_prompts(root, splits, shares, findings):
    """Return {prompt type: how often each of its texts occurs} over all splits, p0 first.

    shares: of foreground, {(split, name): share}. Healthy images need no prompts.
    """
    texts = defaultdict(Counter)
    for entry in chain(*splits.values()):
        for kind, listed in entry.prompts.items():
            texts[kind].update(listed)
    known = sorted(filter(layouts.is_prompt_type, texts), key=lambda kind: (len(kind), kind))
    for split, entries in splits.items():
        asked = [e for e in entries if texts_of(e) or shares.get((split, e.name)) != 0]
        for kind in texts:
            lacking = [entry.name for entry in asked if not entry.prompts.get(kind)]
            having = [entry.name for entry in entries if kind in entry.prompts]
            if kind in known and lacking:
                line = f"{split}.json: {kind} is missing in {some(lacking)}"
                findings["prompt types that entries lack"].append(f"{root}/anns/{line}")
            if kind not in known and having:
                line = f"{split}.json: {kind!r} in {some(having)}; the types are p0, p1, ..."
                findings["unknown prompt types"].append(f"{root}/anns/{line}")
    return {kind: texts[kind] for kind in known}


def show(line):
    """Print a line. Characters that nothing can print, of damaged file names, are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode())


def role_of(split):
    """Return what a split is for: train, val or, of all others, test."""
    return {"train": "train", "val": "val", "valid": "val"}.get(split, "test")


def check_patients(splits, findings):
    """Add a finding for each patient (`group`) in more than one of train, val and test."""
    first = {}  # patient -> split and image where it comes first
    reported = set()
    for split, entries in splits.items():
        for entry in entries:
            if entry.group is None:
                continue
            key = entry.root, entry.group
            other, image = first.setdefault(key, (split, entry.image))
            if role_of(other) != role_of(split) and (key, split) not in reported:
                reported.add((key, split))
                line = f"{entry.image} ({split}): patient {entry.group} is also in {other}"
                findings["patients in several splits"].append(f"{line}, {image.name}")


def check_overlap(seen, findings):
    """Return the images that are in more than one of training, validation and test: findings.

    seen: (path, split, facts) of each. Test files may share images with each other: they ask the
    same images for other things.
    """
    by_digest = {}
    by_stem = {}
    reported = set()
    for path, split, fact in seen:
        role = role_of(split)
        stem = str(path.with_suffix("")).lower()  # a.png and A.jpg: one picture, saved again?
        same_role, same_split, same = by_digest.setdefault(fact.digest, (role, split, path))
        near_role, near_split, near = by_stem.setdefault(stem, (role, split, path))
        if same_role != role:
            line = f"{path} ({split}): also in {same_split}" + f" as {same}" * (same != path)
            findings["images in several splits"].append(line)
            reported.add(path)
        elif near_role != role:
            line = f"{path} ({split}): named like {near} ({near_split})"
            findings["images named alike in several splits"].append(line)
            reported.add(path)
    return reported


def check_near(seen, reported, findings):
    """Add a finding for each image of val or test that is nearly one of train, or of val.

    seen: as of `check_overlap`, which has reported the images in `reported`. All pairs are compared
    by matrix products: 10,000 against 10,000 images take a second.
    """
    seen = [row for row in seen if isinstance(row[2], ImageFacts) and row[2].thumbnail.any()]
    seen = [*{(path, role_of(split)): (path, split, fact) for path, split, fact in seen}.values()]
    if not seen:
        return

    details = np.stack([fact.thumbnail for _, _, fact in seen])  # (n,256)
    mean = details.mean(axis=0) if len(seen) >= ENOUGH_FOR_MEAN else np.zeros_like(details[0])
    unlike = details - mean  # what others do not share
    unlike /= np.maximum(np.linalg.norm(unlike, axis=1, keepdims=True), 1e-6)
    roles = np.array([role_of(split) for _, split, _ in seen])
    reported = set(reported)
    for role, earlier in ("val", ["train"]), ("test", ["train", "val"]):
        others = np.flatnonzero(np.isin(roles, earlier))
        later = [i for i in np.flatnonzero(roles == role) if seen[i][0] not in reported]
        for start in range(0, len(later) if len(others) else 0, 1024):
            chunk = later[start : start + 1024]
            alike = details[chunk] @ details[others].T  # (chunk,others)
            if alike.max() < NEAR:
                continue
            alike[unlike[chunk] @ unlike[others].T < NEAR_WITHOUT_MEAN] = 0
            for row, best in enumerate(alike.argmax(axis=1)):
                if alike[row, best] >= NEAR:
                    path, split, _ = seen[chunk[row]]
                    other, other_split, _ = seen[others[best]]
                    line = f"{path} ({split}): nearly {other} ({other_split})"
                    findings[NEAR_KIND].append(line)


def wide(size):
    """(H, W) -> "WxH"."""
    return f"{size[1]}x{size[0]}"


def some(names):
    """How many names there are and the first of them."""
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def modes(facts):
    """ "RGB" or "RGB 12, L 3"."""
    counts = Counter(fact.mode for fact in facts).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{mode} {n}" for mode, n in counts)


def describe_splits(splits, noun="images"):
    """Yield (split, how many entries and images it has)."""
    paths = {split: {entry.image for entry in entries} for split, entries in splits.items()}
    earlier = {}
    for split, entries in splits.items():
        within = next((name for name in earlier if paths[split] <= earlier[name]), None)
        text = f"{len(entries)} entries, {len(paths[split])} {noun}"
        yield split, text + (f", all of them in {within}" if within and entries else "")
        earlier[split] = paths[split]


def describe_shares(splits, shares, noun="an image"):
    """Yield (heading, text) about the foreground shares {(split, name): share}."""
    if not shares:
        return
    share = np.array(list(shares.values()))
    ends = f"{share.min():.1%} to {share.max():.1%}"
    yield "foreground", f"{share.mean():.1%} of {noun} in the mean, {ends}"

    empty = [name for (_, name), value in shares.items() if value == 0]
    text = some(empty) if empty else "none"
    healthy = 0
    for split, entries in splits.items():
        for entry in entries:
            healthy += shares.get((split, entry.name)) == 0 and not texts_of(entry)
    if healthy and any(map(texts_of, chain(*splits.values()))):
        text += f", {healthy} of them without prompts"
    yield "empty masks", text


def describe(splits, images, masks, shares, rule, texts):
    """Yield what a data set of images holds, (heading, text)."""
    yield from describe_splits(splits)
    if images:
        sizes = sorted((fact.size for fact in images.values()), key=math.prod)
        low, middle, high = wide(sizes[0]), wide(sizes[len(sizes) // 2]), wide(sizes[-1])
        yield "images", f"{len(images)}, {modes(images.values())}; {low} to {high}, median {middle}"
    if masks:
        values = np.flatnonzero(sum(fact.counts[0] for fact in masks.values()))
        found = ", ".join(map(str, values))
        if len(values) > 8:
            found = f"{len(values)} values from {values[0]} to {values[-1]}"
        read = rule.replace(data.GIVEN, "> ")
        yield "masks", f"{len(masks)}, {modes(masks.values())}; {found}; read {read}"
    yield from describe_shares(splits, shares)
    for kind, counter in texts.items():
        example = f'"{textwrap.shorten(next(iter(counter), ""), 70)}"'
        yield kind, f"{len(counter)} text{'s' * (len(counter) > 1)}: {example}"


def tokenizers_of(model):
    """Return {recipes: tokenizer} of a model that reads, for each text length; {} without a model.

    Also {} if the model's vocabulary cannot be had, which is printed.
    """
    if model is None:
        return {}
    from recipes import FAMILIES  # here, as importing every model takes a second

    readers = [name for name, family in FAMILIES.items() if family.reads]
    if model not in readers:
        raise ValueError(f"--model {model}: reads no prompts; take one of {', '.join(readers)}")
    try:
        return FAMILIES[model].tokenizers()
    except (ValueError, OSError) as error:
        print(f"--model {model}: prompts that are cut are not counted ({error})")
        return {}


def check_tokens(root, model, tokenizers, texts, findings):
    """Yield what a model sees of the prompts, as (heading, text): equal ones, and those it cuts.

    Those that the default recipe cuts are findings, too.
    """
    if not tokenizers:
        return
    from recipes.images import describe_cuts  # here, for the same reason

    for recipes, tokenizer in tokenizers.items():
        lines = []
        for kind, counter in texts.items():
            different = {tuple(tokenizer(text)[0].tolist()) for text in counter}
            if len(different) < len(counter):
                lines.append((kind, f"{len(counter)} texts, only {len(different)} to the model"))
            cuts = describe_cuts(counter, tokenizer)
            if cuts:
                lines.append((kind, cuts))
            if cuts and "default" in recipes.split(", "):
                findings[f"prompts that {model} cuts"].append(f"{root}: {kind}, {cuts}")
        cut = "" if lines else "; no text is cut"
        yield model, f"takes {tokenizer.length} tokens of a prompt (--recipe {recipes}){cut}"
        yield from lines


def check_images(root, args, tokenizers, findings):
    """Check a data set of images and print what it holds. Return (path, split, facts) of each."""
    splits = read_splits(root, args.group_regex, findings)
    for split, entries in splits.items():
        splits[split] = data.with_mask_orientation(entries, args.mask_orientation)
    checked, images = read_pictures(root, splits, findings)
    masks = read_masks(checked, images, findings)

    check_sizes(checked, images, masks, findings)
    check_pixels(images, masks, findings)
    shares, rule = check_masks(root, checked, masks, findings, args.mask_threshold)
    texts = check_prompts(root, splits, shares, findings)
    check_patients(splits, findings)

    show(str(root))
    for heading, text in describe(splits, images, masks, shares, rule, texts):
        show(f"  {heading:13} {text}")
    for heading, text in check_tokens(root, args.model, tokenizers, texts, findings):
        show(f"  {heading:13} {text}")
    return seen_once(splits, images)


def seen_once(splits, facts):
    """Return (path, split, facts) of each image of each split, for which there are facts."""
    seen = []
    for split, entries in splits.items():
        paths = dict.fromkeys(entry.image for entry in entries if entry.image in facts)
        seen += [(path, split, facts[path]) for path in paths]
    return seen


def volume_facts(entry, findings):
    """Return the VolumeFacts of an entry, None if a file cannot be used, which is a finding."""
    image = None
    try:
        image, grid = volumes.read_image((entry.image, *entry.more))
        if "CT" in (entry.modality or "").upper():
            volumes.say_if_not_hu(entry.image, volumes.hu_facts(image))
    except (ValueError, OSError) as error:
        add_error(error, findings)
    try:
        if image is None:
            volumes.check_whole(entry.mask)
            return None
        labels = volumes.read_labels(entry.mask, grid, entry.labels, entry.unnamed)
    except (ValueError, OSError) as error:
        add_error(error, findings)
        return None
    counts = np.bincount(labels.ravel(), minlength=256)
    return VolumeFacts(grid, len(image), digest_of(image), counts)


def read_volumes(splits, findings):
    """Return {image: VolumeFacts} of the cases whose files can be used; the rest are findings.

    What training says of files that it reads all the same are findings as well.
    """
    by_files = {}
    for entry in chain(*splits.values()):
        by_files[entry.image, entry.mask] = entry
    facts = {}
    for entry in tqdm(by_files.values(), desc="volumes", disable=None, leave=False):
        try:
            with redirect_stdout(io.StringIO()) as said:
                fact = volume_facts(entry, findings)
        except MemoryError:
            add_error(ValueError(f"{entry.image}: does not fit into memory"), findings)
            continue
        if fact:
            facts[entry.image] = fact
        for line in said.getvalue().splitlines():
            findings["remarks about volumes that can be used"].append(line)
    return facts


def check_labels(root, splits, facts, findings):
    """Return foreground shares {(split, name): share}, and {class: label maps that hold it}."""
    shares = {}
    held = {}
    first = next(chain(*splits.values()))
    names = layouts.foreground(first.classes)
    regions = first.regions or [(k,) for k in range(1, len(first.labels))]
    for split, entries in splits.items():
        for entry in entries:
            if entry.image not in facts:
                continue
            counts = facts[entry.image].counts
            inside = counts[1:255].sum()
            shares[split, entry.name] = inside / counts.sum()
            held.setdefault(split, []).append([counts[[*own]].any() for own in regions])
            if counts[255] and not inside:
                line = f"{entry.mask}: holds 0 and 255 alone, and 255 does not count ({split})"
                findings["label maps of 0 and 255 alone"].append(line)

    if held:
        check_classes(root, names, held, findings)
        check_foreground(root, shares, findings)
    rows = [*chain(*held.values())]
    return shares, {name: sum(row[k] for row in rows) for k, name in enumerate(names)}


def describe_cases(splits, facts, shares, held):
    """Yield what a data set of volumes holds, (heading, text)."""
    yield from describe_splits(splits, "volumes")
    by_image = {entry.image: entry for entry in chain(*splits.values()) if entry.image in facts}
    if not by_image:
        return
    entries = [*by_image.values()]
    grids = [facts[entry.image].grid for entry in entries]
    yield "volumes", volumes.VolumeSet(entries, grids).describe()
    yield "channels", " or ".join(map(str, sorted({fact.channels for fact in facts.values()})))
    shown = ", ".join(f"{name} in {n}" for name, n in held.items())
    yield "classes", f"{shown}, of {len(shares)} label maps"
    yield from describe_shares(splits, shares, "a volume")


def check_volumes(root, args, findings):
    """Check a data set of volumes and print what it holds. Return (path, split, facts) of each."""
    try:
        splits = layouts.read_volumes(root, args.group_regex)
    except (ValueError, OSError) as error:
        findings["splits that cannot be used"].append(str(error))
        show(str(root))
        return []

    facts = read_volumes(splits, findings)
    shares, held = check_labels(root, splits, facts, findings)
    check_patients(splits, findings)
    channels = Counter(fact.channels for fact in facts.values())
    for path, fact in facts.items():
        usual = channels.most_common(1)[0][0]
        if fact.channels != usual:
            line = f"{path}: {fact.channels} channels, most volumes have {usual}"
            findings["volumes with other channels"].append(line)

    show(str(root))
    for heading, text in describe_cases(splits, facts, shares, held):
        show(f"  {heading:13} {text}")
    return seen_once(splits, facts)


def refuse_misuse(args):
    """Raise FileNotFoundError or ValueError, one line, before anything is read."""
    for root in args.data:
        if not layouts.has_volumes(root) and not layouts.splits(root):
            need = "images/ and masks/, with anns/*.json or within train/, val/, test/"
            raise FileNotFoundError(f"{root}: no data set here; expected {need}")
    if all(layouts.has_volumes(root) for root in args.data):
        for name in ("model", "mask_orientation", "mask_threshold"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: has no effect on volumes; remove it")


def check(args):
    """Read whole data sets of images or volumes and report what is wrong with them.

    The exit status is 1 if there are findings.
    """
    refuse_misuse(args)
    findings = defaultdict(list)
    seen = []
    tokenizers = tokenizers_of(args.model)
    for root in args.data:
        if layouts.has_volumes(root):
            seen += check_volumes(root, args, findings)
        else:
            seen += check_images(root, args, tokenizers, findings)
    reported = check_overlap(seen, findings)
    check_near(seen, reported, findings)

    total = sum(map(len, findings.values()))
    show(f"findings: {total or 'none'}")
    for kind, lines in findings.items():
        most = MOST_NEAR if kind == NEAR_KIND else MOST_LINES
        show(f"  {kind}: {len(lines)}")
        for line in lines[:most]:
            show(f"    {line}")
        if len(lines) > most:
            show(f"    and {len(lines) - most} more")
    return 1 if total else 0


# --- uw-madison ----------------------------------------------------------------------------------
#
# kaggle.com/competitions/uw-madison-gi-tract-image-segmentation: abdominal MR of 85 patients
# ("cases") on one day or several, 80 or 144 slices a day, with the outlines of three organs.

ORGANS = {"stomach": 1, "small_bowel": 2, "large_bowel": 3}  # the tutorial's numbers; 0: none
FAULTY = ("case7_day0", "case81_day30")  # outlines known to be wrong; Kaggle's winner drops them
ENDS = {  # where each split ends in a shuffled list of its length 1
    "case": volume_sets.CASES,  # 13, 13 and 59 of 85 patients
    "slice": {"val": 0.20, "train": 1},
}


@dataclass
class Slice:
    name: str  # case1_day2_slice_0003
    path: Path
    runs: dict[int, list[str]]  # class number -> start length start length ..., [] if not there
    case: str  # case1
    scan: str  # case1_day2
    split: str | None = None  # None: left out


def find_slices(root):
    """The slices of train.csv, sorted. FileNotFoundError, ValueError: one line."""
    table, runs, files = root / "train.csv", defaultdict(dict), {}
    if not table.is_file():
        hint = "DOWNLOAD is the unpacked folder from Kaggle, with train.csv and train/ in it"
        raise FileNotFoundError(f"{table}: no such file; {hint}")
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                runs[row["id"]][ORGANS[row["class"]]] = row["segmentation"].split()
        except (KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            hint = f"expected columns id, class ({', '.join(ORGANS)}), segmentation"
            raise ValueError(f"{table}, line {rows.line_num}: {error!r}; {hint}") from None
    for path in root.glob("train/case*/case*_day*/scans/slice_*_*_*_*_*.png"):
        files["_".join([path.parts[-3], *path.name.split("_")[:2]])] = path
    names = sorted(name for name in runs if name.split("_slice")[0] not in FAULTY)
    if lost := [name for name in names if name not in files]:
        hint = "which train.csv lists; unpack the download again"
        raise FileNotFoundError(f"{root / 'train'}: no file of {some(lost)}, {hint}")
    return [Slice(name, files[name], runs[name], *files[name].parts[-4:-2]) for name in names]


def choose_splits(slices, by, keep_empty, seed):
    """Sets the split of the slices that are kept. ValueError if one would stay empty."""
    kept = [s for s in slices if keep_empty or any(s.runs.values())]
    rng, pools, dealt = np.random.default_rng(seed), defaultdict(list), {}
    if by == "case":  # all that there are, so that --keep-empty moves none
        pools["cases"] = sorted({s.case for s in slices})
    else:
        for s in kept:
            pools[s.case].append(s.name)
    for pool in pools.values():
        dealt |= volume_sets.deal(pool, ENDS[by], rng)
    for s in kept:
        s.split = dealt[s.case if by == "case" else s.name]
    for split in ENDS[by].keys() - {s.split for s in kept}:
        raise ValueError(f"--split {by}: {len(kept)} slices are too few, {split} would be empty")


def class_map(s, shape):
    """The organs of a slice, (H,W) uint8, and how many pixels lie in several. ValueError: bad runs.

    Of organs that overlap the lower class number has the pixel (the tutorial made it background).
    A fixed order, because "the smaller organ here" could change sides from slice to slice.
    """
    layers = np.zeros((1 + len(ORGANS), math.prod(shape)), bool)  # (4, H * W), row after row
    for number, words in s.runs.items():
        values = [int(word) if word.isdecimal() else 0 for word in words] + [0] * (len(words) % 2)
        for start, length in zip(values[::2], values[1::2]):  # counted from 1
            if not (start and length and start + length - 1 <= layers[0].size):
                wrong = f"train.csv, {s.name}, class {number}: run {start} {length} is no start and"
                hint = f"length within the {wide(shape)} pixels of {s.path}; download both again"
                raise ValueError(f"{wrong} {hint}")
            layers[number, start - 1 : start - 1 + length] = True
    mask = layers.argmax(0).astype(np.uint8)  # (H * W,) the first that is there, 0 if none is
    return mask.reshape(shape), int((layers.sum(0) > 1).sum())  # (H, W)


def write_scan(scan, window, out):
    """Writes the kept slices of one patient and day; returns how many of their pixels overlap.

    Black and white are the 0.5 and 99.5 percentiles of the whole scan: neighbouring slices look
    alike, and a few bright pixels do not darken the rest. With `slice` they are each slice's own
    minimum and maximum, as in the tutorial.
    """
    images = [np.asarray(data.open_image(s.path).convert("I"), np.uint16) for s in scan]
    if window == "scan":
        low, high = np.percentile(np.concatenate([x.ravel() for x in images]), (0.5, 99.5))
    overlaps = 0
    for s, x in zip(scan, images):
        if s.split:
            if window == "slice":
                low, high = float(x.min()), float(x.max())
            grey = ((x - low) / ((high - low) or 1) * 255).clip(0, 255).astype(np.uint8)
            (out / s.split / "images" / f"{s.name}.png").write_bytes(png(grey))
            mask, overlap = class_map(s, x.shape)
            image = pictures.class_map(mask, 1 + len(ORGANS))
            image.save(out / s.split / "masks" / f"{s.name}.png")
            overlaps += overlap
    return overlaps


def make_splits(part, splits):
    for split, kind in product(splits, ("images", "masks")):
        (part / split / kind).mkdir(parents=True)


def write_notes(part, names, lines):
    """Writes the classes' names and a description; returns that."""
    (part / "classes.json").write_text(json.dumps(dict(enumerate(names)), indent=1))
    said = "\n".join(lines)
    (part / "README.txt").write_text(said + "\n")
    return said


def describe_slices(slices, overlaps, args):
    """What was made of the download and how, line by line."""
    yield f"UW-Madison GI Tract, split by {args.split}, seed {args.seed}, window of a {args.window}"
    for split in reversed(ENDS[args.split]):
        ours = [s for s in slices if s.split == split]
        shown = (f"{k} in {sum(bool(s.runs.get(n)) for s in ours):,}" for k, n in ORGANS.items())
        cases = len({s.case for s in ours})
        yield f"{split}: {len(ours):,} slices of {cases} cases, {', '.join(shown)}"
    if args.split == "slice":
        yield "LEAK: train and val hold neighbouring slices of the same patients, so that scores"
        yield "on val say nothing about new patients; report those of --split case beside them"
    without = sum(not any(s.runs.values()) for s in slices)
    yield f"slices without organs: {without:,}, {'kept' if args.keep_empty else 'left out'}"
    yield f"left out, as their outlines are faulty: {', '.join(FAULTY)}"
    yield f"pixels in several organs: {overlaps:,}, given to the first of {', '.join(ORGANS)}"
    sizes = Counter(" x ".join(s.path.stem.split("_")[-2:]) for s in slices if s.split)
    yield f"pixels in mm: {', '.join(f'{size} in {n:,}' for size, n in sizes.items())}"
    yield "masks are palette images: read their indices, not their colours"
    yield "scores by patient: --group-regex 'case[0-9]+'"


def uw_madison(args):
    """Makes class maps of stomach, small and large bowel from Kaggle's UW-Madison GI Tract data.

    --split case puts whole patients on one side: 70 % train, 15 % val, 15 % test. --split slice is
    the tutorial's protocol, 80 % of each patient's slices train, 20 % val. It leaks: the neighbours
    of every val slice are trained on. Slices without organs are left out of both, as in the
    tutorial; what a model falsely finds in them is then neither learnt from nor counted.
    """
    atomic_files.refuse_existing(args.out)
    slices, scans = find_slices(args.download), defaultdict(list)
    choose_splits(slices, args.split, args.keep_empty, args.seed)
    for s in slices:
        if s.split or args.window == "scan":  # whose percentiles are those of all its slices
            scans[s.scan].append(s)
    with atomic_files.whole_folder(args.out) as part:
        make_splits(part, ENDS[args.split])
        bar = tqdm(total=len(scans), desc="uw-madison", unit="scan", disable=None, leave=False)
        with ThreadPoolExecutor(8) as pool, bar:  # 8: each holds some 100 MB
            overlaps = 0
            for found in pool.map(write_scan, scans.values(), repeat(args.window), repeat(part)):
                overlaps += found
                bar.update()
        names = ["background", *(organ.replace("_", " ") for organ in ORGANS)]
        said = write_notes(part, names, describe_slices(slices, overlaps, args))
    print(f"{args.out}: {said}")
    return 0


# --- duke-dme, duke-amd --------------------------------------------------------------------------
#
# Two sets of retinal OCT of Sina Farsiu's group at Duke, each volume ("subject") a MATLAB file:
# Chiu 2015 (people.duke.edu/~sf59/Chiu_BOE_2014_dataset.htm, also kaggle.com/datasets/
# paultimothymooney/chiu-2015): ten volumes with diabetic macular edema, eleven annotated slices in
# each; Farsiu 2014 (.../~sf59/RPEDC_Ophth_2013_dataset.htm, also .../farsiu-2014): 269 volumes with
# drusen of age-related macular degeneration and 115 without.
#
# Both hold the boundaries between layers as a row for each column, which MATLAB counts from 1; a
# number is the centre of a pixel. A pixel belongs to the layer under the last boundary at or above
# its centre: a boundary at row 5.0 has that row below it, one at 5.2 begins with row 6.

DME_CLASSES = "background", "NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE-OS", "RPE", "fluid"
DME_AXES = {"images": "H W N", "manualLayers{}": "8 W N", "manualFluid{}": "H W N"}
DME_SPLITS = {k: "train" if k < 5 else "val" if k == 5 else "test" for k in range(1, 11)}
AMD_CLASSES = "background", "ILM to RPEDC", "RPEDC", "below BM"
AMD_AXES = {"images": "H W N", "layerMaps": "N W 3"}  # here the slice comes first


def find_volumes(root, pattern):
    """{patient: file} below `root`, a patient being what the pattern's groups match, in order."""
    found = {}
    for path in sorted(root.rglob("[!.]*.mat"), key=lambda path: path.name):  # in whatever folders
        if match := re.fullmatch(pattern, path.name):
            same = found.setdefault("".join(match.groups()).lower(), path)
            if same != path:
                raise ValueError(f"{path}: there is {same} as well; keep one of the two")
    return found


def read_mat(path, axes):
    """The arrays of a MATLAB file. ValueError, one line, if they are not what `axes` say.

    axes: {"images": "H W N", ...}, where a letter is a size that is the same wherever it stands.
    """
    from scipy.io import loadmat  # slow to import, and only these two need it

    hint = "download it again"
    try:
        found = loadmat(path, variable_names=list(axes))
    except NotImplementedError:
        hint = "the original is of version 5: download it again, or save it with -v7 in MATLAB"
        raise ValueError(f"{path}: a MATLAB 7.3 (HDF5) file; {hint}") from None
    except Exception as error:  # of damaged files OSError, IndexError, TypeError, zlib.error, ...
        raise ValueError(f"{path}: not readable as a MATLAB file ({error}); {hint}") from None
    if lost := [key for key in axes if key not in found]:
        raise ValueError(f"{path}: has no {', '.join(lost)}; {hint}")
    sizes = {}
    for key, names in axes.items():
        shape, pairs = found[key].shape, list(zip(names.split(), found[key].shape))
        wanted = [int(n) if n.isdigit() else sizes.setdefault(n, size) for n, size in pairs]
        if len(shape) != len(names.split()) or list(shape) != wanted:
            said = f"{key} is {' '.join(map(str, shape))}, expected {names}"
            known = ", ".join(f"{n} {size}" for n, size in sizes.items())
            raise ValueError(f"{path}: {said} with {known}; {hint}")
        if found[key].dtype.kind not in "uif":
            raise ValueError(f"{path}: {key} holds no numbers; {hint}")
    images = found["images"]
    if not (images.min() >= 0 and 1 < images.max() <= 255):  # NaN too
        said = f"{images.min():g} to {images.max():g}, expected grey values of 0 to 255"
        raise ValueError(f"{path}: images holds {said}")
    return [found[key] for key in axes]


MISPLACED = 0.01  # largest share of a volume's annotated columns with boundaries out of place


def without_misplaced(path, key, boundaries, height):
    """Return boundaries (N,L,W) where columns with boundaries out of place are NaN.

    From top to bottom each boundary must lie less than one row above the one before it, the last
    not above the first, and all within the image, to within one row. Raises ValueError, one line,
    if more than MISPLACED of the volume's complete columns are out of place: then the file is not
    what it should be.
    """
    complete = np.isfinite(boundaries).all(1)  # (N,W)
    rows = np.where(complete[:, None], boundaries, 1.0)  # (N,L,W), without NaN
    disordered = (np.diff(rows, axis=1) <= -1).any(1)  # (N,W)
    disordered |= rows[:, -1] < rows[:, 0]
    outside = ((rows < 0) | (rows > height + 1)).any(1)  # (N,W)
    misplaced = disordered | outside

    if misplaced.sum() > MISPLACED * complete.sum():
        slice_number, column = np.argwhere(misplaced)[0].tolist()
        shown = ", ".join(f"{row:g}" for row in rows[slice_number, :, column])
        reason = f"outside the image's rows 1 to {height}"
        if disordered[slice_number, column]:
            reason = "not in order from top to bottom"
        raise ValueError(
            f"{path}: {key} has {misplaced.sum():,} of {complete.sum():,} columns with boundaries "
            f"out of place, first in slice {slice_number}, column {column}: rows {shown} are "
            f"{reason}; download it again"
        )
    return np.where(misplaced[:, None], np.nan, boundaries)


def layer_map(boundaries, height):
    """Rows of boundaries, float (L,W) -> uint8 (H,W): how many lie at or above each pixel's centre.

    Columns without all of them are 255, "does not count": to call them background would be untrue.
    """
    rows = np.arange(1, height + 1)[:, None]  # (H,1)
    mask = (boundaries[:, None] <= rows).sum(0).astype(np.uint8)  # (L,1,W) to (L,H,W) to (H,W)
    mask[:, ~np.isfinite(boundaries).all(0)] = 255
    return mask


def annotated_slices(images, boundaries, every=1):
    """Yields number (from 0), image and layer map, both uint8 (H,W), of slices with whole columns.

    images (H,W,N), boundaries (N,L,W); `every` takes the first of so many such slices.
    """
    whole = np.isfinite(boundaries).all(1).any(1)  # (N,)
    for n in np.flatnonzero(whole)[::every].tolist():
        image = images[..., n].astype(np.uint8)  # (H,W)
        yield n, image, layer_map(boundaries[n], len(image))


def dme_slices(path, annotator):
    """The slices of a volume of Chiu 2015; fluid lies over the layers."""
    axes = {key.format(annotator): names for key, names in DME_AXES.items()}
    images, layers, fluid = read_mat(path, axes)
    layers = np.moveaxis(layers, 2, 0)  # (N,8,W)
    layers = without_misplaced(path, f"manualLayers{annotator}", layers, len(images))
    for n, image, mask in annotated_slices(images, layers):
        mask[mask == 8] = 0  # under the last boundary: background again, as above the first
        mask[(fluid[..., n] > 0) & (mask != 255)] = 8  # the regions are numbered; NaN is none
        yield n, image, mask


def amd_slices(path, every):
    """The slices of a volume of Farsiu 2014."""
    images, layers = read_mat(path, AMD_AXES)
    layers = layers.swapaxes(1, 2)  # (N,3,W)
    layers = without_misplaced(path, "layerMaps", layers, len(images))
    yield from annotated_slices(images, layers, every)


def write_volume(path, slices, name, folder, classes):
    """Writes the slices of a volume; returns how many, and of what: slices that show a class,
    columns that do not count. ValueError if there is no slice."""
    found = Counter()
    for n, image, mask in slices(path):
        whole = mask[0] != 255  # (W,), a column is 255 from top to bottom
        first, last = np.flatnonzero(whole)[[0, -1]]
        keep = slice(first, last + 1)  # beyond nothing is known, and some margins are plain white
        image, mask = np.ascontiguousarray(image[:, keep]), np.ascontiguousarray(mask[:, keep])
        (folder / "images" / f"{name}_slice{n:02}.png").write_bytes(png(image))
        picture = pictures.class_map(mask, len(classes))
        picture.save(folder / "masks" / f"{name}_slice{n:02}.png")
        found.update({"slices": 1, "columns": mask.shape[1], "gaps": int((~whole[keep]).sum())})
        found.update(classes[k] for k in np.unique(mask) if k != 255)
    if not found:
        raise ValueError(f"{path}: no slice has a column with all boundaries; download it again")
    return found


def describe_volumes(splits, found, classes):
    """What was made of the volumes, line by line; `found` is what write_volume counted."""
    for split in "train", "val", "test":
        ours = [name for name in splits if splits[name] == split]
        counts = sum((found[name] for name in ours), Counter())
        shown = ", ".join(f"{k} in {counts[k]:,}" for k in classes[1:])
        yield f"{split}: {counts['slices']:,} slices of {len(ours)} patients; {shown}"
    counts = sum(found.values(), Counter())
    gaps = f"{counts['gaps']:,} of {counts['columns']:,} columns lack a boundary and are 255"
    yield f"slices are cut to their annotated columns; within these {gaps}: they do not count"
    yield "a boundary out of order or outside the image counts as lacking"
    yield "a boundary's rows count from 1; the pixel whose centre it meets lies below it"
    yield "masks are palette images: read their indices, not their colours"
    yield "slices are numbered from 0; scores by patient: --group-regex '[a-z]+[0-9]+'"


def write_volumes(args, title, files, splits, slices, classes):
    """Writes a data set of {patient: file} and {patient: split}, whole or not at all."""
    files, found = {name: files[name] for name in splits}, {}
    with atomic_files.whole_folder(args.out) as part:
        make_splits(part, ("train", "val", "test"))
        bar = tqdm(total=len(files), desc=args.out.name, unit="volume", disable=None, leave=False)
        with ThreadPoolExecutor(4) as pool, bar:  # 4: each holds up to 400 MB
            folders = [part / splits[name] for name in files]
            jobs = files.values(), repeat(slices), files, folders, repeat(classes)
            for name, counts in zip(files, pool.map(write_volume, *jobs)):
                found[name] = counts
                bar.update()
        lines = *title, *describe_volumes(splits, found, classes)
        said = write_notes(part, classes, lines)
    print(f"{args.out}: {said}")
    return 0


def duke_dme(args):
    """Makes class maps of seven retinal layers and fluid from Duke's OCT with macular edema.

    The usual division: subjects 1 to 5 to train, 6 to 10 to test; of the former the last, 5, is
    held out to validate on. Only slices whose layers the annotator outlined are taken.
    """
    atomic_files.refuse_existing(args.out)
    files = find_volumes(args.download, r"(Subject)_(\d\d)\.mat")
    splits = {f"subject{k:02}": split for k, split in DME_SPLITS.items()}
    if lost := [name.replace("subject", "Subject_") for name in splits if name not in files]:
        hint = "DOWNLOAD is the unpacked folder, with all ten in it or below"
        raise FileNotFoundError(f"{args.download}: no {', '.join(lost)} (.mat); {hint}")
    title = (
        f"Duke OCT with macular edema (Chiu 2015), annotator {args.annotator}",
        "pixels: about 3.87 um deep, 11.3 um across",
        f"fluid: manualFluid{args.annotator} above 0; where it is NaN, none",
    )
    slices = partial(dme_slices, annotator=args.annotator)
    return write_volumes(args, title, files, splits, slices, DME_CLASSES)


def duke_amd(args):
    """Makes class maps of retina and drusen complex from Duke's OCT of age-related degeneration.

    The drusen complex (RPEDC) reaches from the inner border of the pigment epithelium, drusen
    with it, to Bruch's membrane (BM). Patients are dealt at random, 70 % train, 15 % val, 15 % test
    of those with AMD and of the controls each. Neighbouring slices are 0.067 mm apart and look
    alike, hence --every 10: some 3,000 of 30,000 slices.
    """
    atomic_files.refuse_existing(args.out)
    pattern = r"Farsiu_Ophthalmology_2013_(AMD|Control)_Subject_(\d+)\.mat"
    files = find_volumes(args.download, pattern)
    rng, splits = np.random.default_rng(args.seed), {}
    kinds = {kind: [name for name in files if name.startswith(kind)] for kind in ("amd", "control")}
    for names in kinds.values():
        splits |= volume_sets.deal(names, ENDS["case"], rng)
    if lost := ENDS["case"].keys() - splits.values():
        have = ", ".join(f"{len(names)} files {kind}" for kind, names in kinds.items())
        hint = "expected Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat and so on"
        raise FileNotFoundError(f"{args.download}: {have}, {min(lost)} would be empty; {hint}")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    title = (
        f"Duke OCT with and without AMD (Farsiu 2014): {counts}; seed {args.seed}",
        f"slices: the first of every {args.every} annotated ones",
        "pixels: 4.5 um deep, 6.7 um across",
    )
    slices = partial(amd_slices, every=args.every)
    return write_volumes(args, title, files, splits, slices, AMD_CLASSES)


# --- boxes ---------------------------------------------------------------------------------------


def images_of(place):
    """Return what --like holds: {name of a mask: image file}, {image file: path}, entries.

    place: a data set, PATH[:split], or a folder of images, which has no entries. The paths are
    those within the folder of images.
    """
    path, split = layouts.path_and_split(place)
    if layouts.splits(path):
        entries = layouts.annotations(path, split)
        paths = {e.image: layouts.name_in_images(e.image, e.root) for e in entries}
        return {entry.name: entry.image for entry in entries}, paths, entries

    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"--like {place}: no such folder of images or data set")
    images = {}
    paths = {}
    for file in filter(layouts.is_image, layouts.files_below(folder)):
        relative = file.relative_to(folder)
        if images.setdefault(relative.with_suffix("").as_posix(), file) != file:
            raise ValueError(f"{file}: a second image of this name, with another ending")
        paths[file] = relative.as_posix()
    return images, paths, []


def find_masks(folder, images, place):
    """Return {mask file: image file} of a folder, without the other pictures of predict.py."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of masks")
    found = {}
    for path in filter(layouts.is_image, layouts.files_below(folder)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in images:  # asked first: an image may be called x_overlay
            found[path] = images[name]
        elif name != "legend" and not name.endswith(("_overlay", "_probability")):
            raise ValueError(f"{path}: no image of this name in {place}; choose another --like")
    if not found:
        raise ValueError(f"{folder}: no masks in this folder; they are images such as .png")

    names = Counter(path.with_suffix("") for path in found)
    repeated = [path for path in found if names[path.with_suffix("")] > 1]
    if repeated:
        raise ValueError(f"{repeated[1]}: a second mask of this name, with another ending")
    return found


def mask_entries(folder, images, entries, args):
    """Return the entries of the masks in a folder: the data set's own ones, or predicted ones.

    Predicted masks are upright, as predict.py writes them, and a classes.json beside them names
    their numbers. Raises FileNotFoundError or ValueError.
    """
    own = [entry for entry in entries if entry.mask.resolve().is_relative_to(folder.resolve())]
    if own:
        return own
    found = find_masks(folder, images, args.like)
    path = folder / "classes.json"
    how = {"mask_orientation": "upright"}
    if args.instances:
        if path.is_file():
            raise ValueError(f"--instances: {path} names class numbers; remove one of the two")
    elif path.is_file():
        how |= {"classes": layouts.read_classes(path), "numbers": True}
    else:
        refuse_palettes(found)
    root = folder.resolve()
    return [layouts.Entry(p.stem, image, p, {}, root, **how) for p, image in found.items()]


def refuse_palettes(paths):
    """Raise ValueError, one line, for a palette of more than two colours, as class maps have."""
    for path in paths:
        image = data.open_image(path, decode=False)
        if image.mode != "P":
            continue
        colours = np.unique(np.reshape(image.getpalette(), (-1, 3)), axis=0)  # (n,3)
        if len(colours) > 2:
            hint = "put the classes.json beside it that predict.py wrote"
            raise ValueError(f"{path}: a palette of classes that nothing names; {hint}")


def mask_boxes(entries, args):
    """Yield (entry, class, box float32 (4,)) of each object in masks. Raises ValueError."""
    bar = partial(tqdm, desc="boxes", unit="mask", disable=None, leave=False)
    if args.instances:
        for entry in bar(entries):
            for box in instance_boxes(entry, args.min_area):
                yield entry, "", box
        return

    counts = data.count_masks(entries)
    reading = data.MaskReading(args.mask_threshold, {})
    (rule,) = data.decide_rules(entries, counts, reading).values()
    thresholds = data.mask_thresholds(entries, counts[:, 0], rule).tolist()
    for entry, threshold in bar([*zip(entries, thresholds)]):
        names = layouts.foreground(entry.classes)
        numbers = range(1, len(names) + 1)
        mask = data.read_truth(entry, threshold)
        for component in boxes_and_points.components(mask, numbers, args.min_area):
            name = names[component.label - 1] if entry.numbers else ""
            yield entry, name, component.box


def instance_boxes(entry, min_area):
    """Return the boxes, float32 (4,), of a mask whose numbers are one object each, 0 background.

    Raises ValueError, one line, for numbers below 0 or that are not whole, and for another size
    than the image's.
    """
    turn, _ = data.mask_turn(entry.mask, entry.image, entry.mask_orientation)
    mask = data.upright(data.open_image(entry.mask), turn)
    values = data.mask_values(mask, entry.mask, numbers=True)  # (H,W)
    size = data.read_image(entry.image).shape[:2]
    if values.shape != size:
        differ = f"{wide(values.shape)}, but its image {entry.image} is {wide(size)}"
        raise ValueError(f"{entry.mask}: {differ}")
    if values.min() < 0 or (values != values.round()).any():
        raise ValueError(f"{entry.mask}: numbers of objects are whole and 0 or more")

    objects = []
    inside = values > 0
    numbers, order = np.unique(values[inside], return_inverse=True)
    pieces = np.zeros(values.shape, np.int32)
    pieces[inside] = order + 1
    areas = np.bincount(pieces.ravel(), minlength=len(numbers) + 1)
    for k, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
        if areas[k] >= min_area:
            corners = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            objects.append(np.float32(corners))
    return objects


def listed_boxes(path, paths):
    """Return [(image, class, box)] of a JSON file that lists boxes, such as an annotation file."""
    sizes = {image: data.read_image(image).shape[:2] for image in paths}
    given = boxes_and_points.read_boxes(path, sizes, names=paths)
    return [(image, row.name or "", row.xy) for image, rows in given.items() for row in rows]


def box_row(name, class_name, box):
    """Return a row of boxes.csv; whole numbers have no decimals."""
    numbers = [round(float(x), 3) for x in box]
    numbers = [int(x) if x.is_integer() else x for x in numbers]
    return {"image": name, "class": class_name} | dict(zip(("x0", "y0", "x1", "y1"), numbers))


def boxes(args):
    """Makes a box for each component of masks: prompts for SAM that another model gives.

    MASKS are folders: those that predict.py wrote, of binary masks or of class maps with
    classes.json, masks of other programs with the names of their images, or the masks of the data
    set itself. With --instances each number in a mask is one object. Of a JSON file instead, an
    annotation file with bbox or one of COCO, the boxes are taken as they stand. The file written
    has the columns image, class (empty for binary masks), x0, y0, x1, y1, in pixels from 0 on, both
    corners inside the box. An image without components has no row.
    """
    atomic_files.refuse_existing(args.out)
    if args.instances and args.mask_threshold is not None:
        raise ValueError("--mask-threshold: --instances takes numbers; remove one of the two")
    images, paths, entries = images_of(args.like)
    names = boxes_and_points.ImageNames(paths)
    made = []
    count = 0
    for place in args.masks:
        if place.suffix.lower() == ".json" and not place.is_dir():
            made += listed_boxes(place, paths)
            continue
        masks = mask_entries(place, images, entries, args)
        count += len(masks)
        made += [(entry.image, name, box) for entry, name, box in mask_boxes(masks, args)]
    if not made:
        raise ValueError(f"{count} masks have no component of {args.min_area} pixels: no boxes")
    tables.write_csv(args.out, [box_row(names.shortest(i), name, box) for i, name, box in made])
    having = len({image for image, _, _ in made})
    origin = f", of {count} masks" if count else ""
    print(f"{args.out}: {len(made)} boxes in {having} images{origin}")
    return 0


# --- command line --------------------------------------------------------------------------------


MASK_THRESHOLD = "values of binary masks above it, 0 to 255, are foreground; else their values tell"


def object_counts(text):
    """ "2-4" -> (2, 4), "1" -> (1, 1)."""
    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 to 4 nor a range such as 2-4")
    return low, high


def download_options(command):
    """The commands that make class maps of a download."""
    add = command(uw_madison, "make class maps from Kaggle's UW-Madison GI Tract data")
    add("download", type=Path, metavar="DOWNLOAD", help="unpacked folder: train.csv and train/")
    add("--out", type=Path, default="data/uw_madison", metavar="DIR", help="to make (%(default)s)")
    add("--split", choices=ENDS, default="case", help="what is dealt to the splits (%(default)s)")
    help = "whose grey values span black to white (%(default)s); slice: as the tutorial"
    add("--window", choices=("scan", "slice"), default="scan", help=help)
    add("--keep-empty", action="store_true", help="keep slices without organs as well")
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")

    add = command(duke_dme, "make class maps from the Duke OCT scans with macular edema")
    add("download", type=Path, metavar="DOWNLOAD", help="folder with Subject_01.mat to _10.mat")
    add("--out", type=Path, default="data/duke_dme", metavar="DIR", help="to make (%(default)s)")
    add("--annotator", choices=("1", "2"), default="1", help="whose layers and fluid (%(default)s)")

    add = command(duke_amd, "make class maps from the Duke OCT scans with drusen")
    help = "folder with Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat and so on"
    add("download", type=Path, metavar="DOWNLOAD", help=help)
    add("--out", type=Path, default="data/duke_amd", metavar="DIR", help="to make (%(default)s)")
    help = "take the first of every N annotated slices; 1: all, ten times the files (%(default)s)"
    add("--every", type=POSITIVE, default=10, metavar="N", help=help)
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")


def parser():
    top = command_line.Parser(__doc__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(run, help):
        p = commands.add_parser(
            run.__name__.replace("_", "-"),
            help=help,
            description=run.__doc__,
        )
        p.set_defaults(run=run)
        return p.add_argument

    add = command(demo, "write a small synthetic data set")
    add("--out", type=Path, default="data/demo", metavar="DIR", help="folder to make (%(default)s)")
    help = "images in all (%(default)s)"
    add("--images", type=Number(True, 30), default=1000, metavar="N", help=help)
    help = "their height and width (%(default)s)"
    add("--size", type=Number(True, 64), default=128, metavar="PX", help=help)
    add("--objects", type=object_counts, default="2-4", metavar="A-B", help="blobs (%(default)s)")
    add("--seed", type=SEED, default=0, metavar="N", help="same seed, same bytes (%(default)s)")

    add = command(check, "read data sets and report what is wrong")
    help = "folder with images/ and masks/, or with dataset.json"
    add("data", type=Path, nargs="+", metavar="DATA", help=help)
    help = "how masks without an EXIF tag lie where the size cannot tell: stored like the image, "
    help += "or upright; without it they are turned and listed"
    add("--mask-orientation", choices=data.ORIENTATIONS, help=help)
    help = "count the prompts that this model cuts at its text length: cris, clipseg, biomedclipseg"
    add("--model", metavar="NAME", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = "the patient in an image's name: the expression, or its first group; one patient in two "
    help += "splits is a finding; else the key `group` of entries counts"
    add("--group-regex", metavar="REGEX", help=help)

    download_options(command)
    volume_sets.options(command)

    add = command(boxes, "make boxes for SAM out of masks")
    help = "folder that predict.py wrote, another folder of masks, or a JSON file that lists boxes"
    add("masks", type=Path, nargs="+", metavar="MASKS", help=help)
    add("--out", type=Path, default="boxes.csv", metavar="FILE", help="to write (%(default)s)")
    help = "whose images they are of: a data set (its test split), DATA:SPLIT, a folder of images"
    add("--like", required=True, metavar="DATA", help=help)
    add("--instances", action="store_true", help="each number in a mask is one object")
    help = "pixels below which a component gets no box (%(default)s)"
    add("--min-area", type=POSITIVE, default=20, metavar="N", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)

    text_embeddings.options(command)
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    command_line.command(main)
