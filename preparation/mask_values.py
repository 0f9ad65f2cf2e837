"""Decide how the pixels of a user's masks are read: as binary masks, class numbers or colours.

Binary masks follow data.mask_rule. Class numbers need names, from --classes or from a file such as
classes.txt. Colours that fill areas are classes. Other pixels, such as JPEG noise and soft edges,
become the nearest of these colours.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from imaging import image_files, layouts
from imaging.files import read_text
from preparation.check_findings import width_by_height
from preparation.readings import IGNORED, Object

CLASS_FILES = {
    "classes.txt", "class_names.txt", "labels.txt", "label_names.txt", "label_colors.txt",
    "labelmap.txt", "class_dict.csv", "classes.csv", "_classes.csv", "classes.json",
}  # fmt: skip
BACKGROUND = {"background", "_background_", "bg", "unlabeled", "unlabelled"}
NO_CLASS = {"__ignore__", "_ignore_", "ignore"}  # labelme lists it before the background

BLACK = 0x000000
GREY = 0x010101  # times a grey level
VOID = 0xE0E0C0  # the border of objects in VOC's masks, ignored in training
COLOUR_NAMES = {
    0xFF0000: "red", 0x00FF00: "green", 0x0000FF: "blue", 0xFFFF00: "yellow", 0x00FFFF: "cyan",
    0xFF00FF: "magenta", 0xFFFFFF: "white", 0xFFA500: "orange",
}  # fmt: skip
NAME_DISTANCE = 16  # levels per channel by which a colour may differ from one of these

# The same colour may differ by so many levels in each channel, through JPEG noise. A PNG made from
# a JPEG has traces of it.
NOISE = {True: data.COLOUR_NOISE, False: 8}  # key: some mask is a JPEG
FLAT_SHARE = 0.001  # smallest class that fills areas, as a share of all coloured flat pixels
THIN_SHARE = 0.02  # smallest class of thin lines, as a share of all coloured pixels
MOST_FAR = 1 / 3  # share of a mask's pixels, such as edges, that may differ by more than noise
MOST_SCANNED = 256  # colours of a file that are counted, the most frequent ones
CHUNK = 64  # masks between two steps of the progress bar
SHOWN = 8  # colours or numbers that a message lists


@dataclass(frozen=True)
class MaskFile:
    """A mask with the class that its folder or its name states, "" for none."""

    path: Path
    class_name: str = ""


@dataclass(frozen=True)
class Pair:
    """An image and its masks."""

    name: str  # as in Case
    image: Path
    masks: tuple[MaskFile, ...]
    split: str


Read = Callable[[MaskFile, Path, tuple[int, int]], list[Object]]


@dataclass(frozen=True)
class Values:
    """How all masks of a folder are read."""

    read: Read  # return the objects of a mask, given its image and the image's size (H, W)
    classes: tuple[str, ...]
    lines: list[str]  # for the summary
    tables: dict[str, object] = field(default_factory=dict)
    is_map: bool = False  # masks hold several classes

    def reader_of(self, pair: Pair) -> Callable[[tuple[int, int]], list[Object]]:
        """Return the function that reads the objects of an image of size (H, W)."""
        return partial(self.read_pair, pair)

    def read_pair(self, pair: Pair, size: tuple[int, int]) -> list[Object]:
        """Return the objects of an image of size (H, W). Raises ValueError for another size."""
        objects = []
        for mask in pair.masks:
            objects += self.read(mask, pair.image, size)
        return [item for item in objects if item.mask.any()]


def check_size(pixels: np.ndarray, mask: MaskFile, image: Path, size: tuple[int, int]) -> None:
    """Raise ValueError, one line, if a mask (H,W) has another size than its image."""
    if pixels.shape != size:
        raise ValueError(
            f"{mask.path}: {width_by_height(pixels.shape)}, but its image {image} is "
            f"{width_by_height(size)}; draw or resize the mask at that size"
        )


# --- names of classes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """The names that a user gives to class numbers or to colours."""

    source: str  # "--classes" or the file
    by_number: dict[int, str] = field(default_factory=dict)
    by_colour: dict[int, str] = field(default_factory=dict)  # 0xRRGGBB -> name
    are_exact: bool = False  # the numbers are those in the masks, not only an order

    @property
    def foreground(self) -> tuple[str, ...]:
        """Return the names of the numbers from 1, in their order."""
        names = []
        for number, name in sorted(self.by_number.items()):
            if number > 0:
                names.append(name)
        return tuple(names)


NO_NAMES = Names("")


def is_background(name: str) -> bool:
    return name.lower() in BACKGROUND


def numbered(names: list[str]) -> dict[int, str]:
    """Return {number: name}, from 0 if the first name is the background, else from 1."""
    names = [name for name in names if name.lower() not in NO_CLASS]
    start = 0 if names and is_background(names[0]) else 1
    return dict(enumerate(names, start))


def option_names(text: str) -> Names:
    """Return the names in --classes: "liver,kidney", "1=liver,4=kidney" or "liver=#ff0000,…".

    Raises ValueError, one line, for other texts and for a repeated name or number.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items) or len({*items}) < len(items):
        raise ValueError(f"--classes {text}: expected different names, separated by commas")

    by_colour = {}
    by_number = {}
    for item in items:
        start, _, end = map(str.strip, item.partition("="))
        if re.fullmatch("#[0-9a-fA-F]{6}", end):
            by_colour[int(end[1:], 16)] = start
        elif re.fullmatch("[0-9]+", start) and end:
            by_number[int(start)] = end

    if by_colour and len(by_colour) < len(items):
        raise ValueError(f"--classes {text}: write NAME=#rrggbb, once for each colour, or names")
    if by_colour:
        return Names("--classes", by_colour=by_colour)
    if not by_number:
        return Names("--classes", numbered(items))

    is_complete = len(by_number) == len({*by_number.values()}) == len(items)
    if not is_complete or min(by_number) < 1 or max(by_number) > 255:
        raise ValueError(
            f"--classes {text}: write NUMBER=NAME, once for each number from 1 to 255, or names"
        )
    return Names("--classes", dict(sorted(by_number.items())), are_exact=True)


COLOUR_LINES = (  # "liver,255,0,0", "liver:255,0,0::" (CVAT), "255 0 0 liver" (CamVid)
    re.compile(r"(?P<name>.*?)[\s,;:]+(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)\s*(?::.*)?"),
    re.compile(r"(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)[\s,;]+(?P<name>.*)"),
)
NUMBER_LINE = re.compile(r"(\d+)\s*[\s,;:=]\s*(\D.*)")


def parse_names(text: str, source: str) -> Names:
    """Return the names in the text of a file: one line for each colour, number or plain name.

    Raises ValueError for names that occur twice.
    """
    lines = []
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            lines.append(line)

    for pattern in COLOUR_LINES:
        by_colour = {}
        for match in match_lines(pattern, lines):
            colour = int(match["r"]) << 16 | int(match["g"]) << 8 | int(match["b"])
            by_colour[colour] = match["name"].strip().strip("\"'")
        if by_colour:
            return Names(source, by_colour=by_colour)

    by_number = {}
    for match in match_lines(NUMBER_LINE, lines):
        by_number[int(match[1])] = match[2].strip()
    if not by_number:
        if source.lower().endswith(".csv"):
            return NO_NAMES  # some other table
        by_number = numbered(lines)

    if len({*by_number.values()}) < len(by_number):
        raise ValueError(f"{source}: names a class twice")
    return Names(source, by_number)


def match_lines(pattern: re.Pattern, lines: list[str]) -> list[re.Match]:
    """Return the matches of all lines, [] if some line does not match.

    The first line need not match: it may be a header.
    """
    matches = [pattern.fullmatch(line) for line in lines]
    if matches and matches[0] is None:
        matches = matches[1:]
    return matches if all(matches) else []


def names_of(folder: Path, args: Namespace) -> Names:
    """Return the names of --classes or of a file in the folder, NO_NAMES without either.

    Raises ValueError, one line, for several files that differ.
    """
    if args.classes:
        return option_names(args.classes)

    texts = {}  # text -> the first file with it
    for path in layouts.files_below(folder, with_masks=True):
        if path.name.lower() in CLASS_FILES:
            texts.setdefault(read_text(path), path)
    if len(texts) > 1:
        paths = " and ".join(map(str, texts.values()))
        raise ValueError(f"{paths}: both name classes; remove one, or use --classes")

    if not texts:
        return NO_NAMES

    ((text, path),) = texts.items()
    source = path.relative_to(folder).as_posix()
    if path.suffix.lower() == ".json":
        names = layouts.read_classes(path)
        start = 1 if len(names) == 1 else 0  # a single name is no background
        return Names(source, dict(enumerate(names, start)))
    return parse_names(text, source)


# --- choosing -------------------------------------------------------------------------------------


def read_values(pairs: list[Pair], folder: Path, args: Namespace) -> Values:
    """Return how the masks of all pairs are read.

    Raises ValueError, one line, for masks that cannot be read, and for class numbers without names.
    """
    names = names_of(folder, args)
    root = folder.resolve()
    masks = []
    stated = set()
    for pair in pairs:
        for mask in pair.masks:
            masks.append(layouts.Entry(pair.name, pair.image, mask.path, {}, root))
            stated.add(mask.class_name)
    stated.discard("")
    if stated:
        return class_files(pairs, masks, sorted(stated), args)

    is_numbered = False
    if args.mask_threshold is None:
        colours = scan_colours(masks)
        if names.by_colour or colours.are_several():
            is_numbered = bool(names.by_number) and colours.has_one_palette
            if not is_numbered:
                return coloured_values(masks, colours, names)

    counts = count_values(masks)
    rule = data.mask_rule(masks, counts, args.mask_threshold)
    if args.mask_threshold is None:
        is_numbered |= bool(rule.errors)
        is_numbered |= names.are_exact
        if len(names.foreground) > 1:
            holds_ones = counts[:, 0, 1].any() and not counts[:, 0, 2:].any()
            is_numbered |= args.classes is not None or holds_ones
    if is_numbered:
        return numbered_values(masks, counts, names)
    return binary_values(masks, counts, rule, names)


def turned_lines(masks: list) -> list[str]:
    """Return a line about masks that are turned like their photos, [] if there are none."""
    turned = 0
    for entry in masks:
        _, is_turned = image_files.mask_turn(entry.mask, entry.image, None)
        turned += is_turned
    if not turned:
        return []
    return [f"turned like their photos, although they may be upright already: {turned} masks"]


def count_values(masks: list, numbers: bool = False) -> np.ndarray:
    """Return data.count_values of all masks, (n,3,256), with a progress bar.

    numbers: the masks hold class numbers.
    """
    if numbers:
        classes = ("background", "one", "other")  # any three: the masks are class maps
        masks = [replace(entry, classes=classes, has_class_indices=True) for entry in masks]

    counts = []
    bar = tqdm(total=len(masks), desc="masks", unit="mask", disable=None, leave=False)
    for start in range(0, len(masks), CHUNK):
        chunk = masks[start : start + CHUNK]
        counts.append(data.count_masks(chunk))
        bar.update(len(chunk))
    bar.close()
    return np.concatenate(counts)


# --- binary masks ---------------------------------------------------------------------------------


def binary_values(masks: list, counts: np.ndarray, rule: data.MaskRule, names: Names) -> Values:
    """Return how binary masks are read. counts: (n,3,256). names: one class, or none."""
    for _, line in rule.notes:
        print(line)

    classes = ()
    foreground = names.foreground
    lines = [f"binary masks, foreground {rule.rule}", *turned_lines(masks)]
    if len(foreground) == 1:
        classes = foreground
    elif foreground:
        lines.append(f"{names.source} is not used: it names {len(foreground)} classes")

    thresholds = data.mask_thresholds(masks, counts[:, 0], rule.rule).tolist()
    threshold_of = {}
    for entry, threshold in zip(masks, thresholds, strict=True):
        threshold_of[entry.mask] = threshold
    return Values(partial(read_binary, threshold_of, classes), classes, lines)


def read_binary(
    threshold_of: dict[Path, int],
    classes: tuple[str, ...],
    mask: MaskFile,
    image: Path,
    size: tuple[int, int],
) -> list[Object]:
    """Return the foreground of a binary mask as one object."""
    values, _ = image_files.load_mask(mask.path, image)  # (H,W)
    check_size(values, mask, image, size)
    name = mask.class_name or (classes[0] if classes else "")
    return [Object(name, values > threshold_of[mask.path])]


def class_files(pairs: list[Pair], masks: list, stated: list[str], args: Namespace) -> Values:
    """Return how masks of one class each are read. stated: the sorted names of the classes.

    --classes may only reorder them. Raises ValueError, one line, for masks that are not binary.
    """
    if args.classes:
        order = option_names(args.classes).foreground
        if sorted(order) != stated:
            raise ValueError(
                f"--classes {args.classes}: the folder names the classes {', '.join(stated)}; "
                "--classes may only bring them into another order"
            )
        stated = [*order]

    masks_of = Counter()  # class -> masks
    for pair in pairs:
        for mask in pair.masks:
            masks_of[mask.class_name] += 1
            if not mask.class_name:
                raise ValueError(
                    f"{mask.path}: names no class, as others do ({', '.join(stated)}); move it "
                    "into a folder of a class, or remove it"
                )

    counts = count_values(masks)
    rule = data.mask_rule(masks, counts, args.mask_threshold)
    if rule.errors:
        _, line = rule.errors[0]
        path = line.partition(": ")[0]
        raise ValueError(
            f"{path}: holds several values, but folders or names state the classes "
            f"{', '.join(stated)}; if these are no classes, choose the masks with --images 'GLOB' "
            "--masks 'GLOB', else set --mask-threshold"
        )

    listed = ", ".join(f"{name} ({masks_of[name]})" for name in stated)
    values = binary_values(masks, counts, rule, NO_NAMES)
    lines = [f"masks of classes: {listed}", *values.lines]
    if len(stated) > 1:
        lines.append("where classes overlap, a later one of this list covers the others")
    return OrderedValues(values.read, tuple(stated), lines, is_map=True)


@dataclass(frozen=True)
class OrderedValues(Values):
    """Masks of one class each. Later classes cover earlier ones."""

    def read_pair(self, pair: Pair, size: tuple[int, int]) -> list[Object]:
        objects = super().read_pair(pair, size)
        return sorted(objects, key=lambda item: self.classes.index(item.class_name))


# --- class numbers --------------------------------------------------------------------------------


def numbered_values(masks: list, counts: np.ndarray, names: Names) -> Values:
    """Return how masks of class numbers are read.

    If some number has no name, but there are as many numbers as names, the names belong to the
    numbers in ascending order, unless the names are exact. Raises ValueError, one line, without
    names.
    """
    if any(image_files.open_image(entry.mask, decode=False).mode[0] == "P" for entry in masks):
        counts = count_values(masks, numbers=True)
    present = np.flatnonzero(counts[:, 0].any(axis=0)).tolist()
    numbers = [number for number in present if number > 0]
    if not names.by_number:
        refuse_unnamed(masks, numbers)

    name_of = dict(names.by_number)
    name_of.pop(0, None)
    lines = [f"masks of class numbers: {list_numbers(present)}, named by {names.source}"]
    unknown = sorted({*numbers} - {*name_of, 255})
    if numbers == [255] and not (names.are_exact and 255 in name_of):  # else all is ignored
        unknown = numbers
    if unknown:
        if names.are_exact or len(numbers) != len(name_of):
            refuse_unknown(masks, counts, unknown[0], names)
        name_of = dict(zip(numbers, name_of.values(), strict=True))
        listed = ", ".join(f"{number} {name}" for number, name in name_of.items())
        lines.append(f"grey levels, in ascending order: {listed}")

    if 255 in numbers and 255 not in name_of:
        lines.append("pixels of 255 are ignored in training")
    lines += turned_lines(masks)
    read = partial(read_numbers, name_of)
    return Values(read, tuple(name_of.values()), lines, is_map=True)


def list_numbers(numbers: list[int]) -> str:
    """Return the first numbers, separated by commas."""
    more = ", …" if len(numbers) > SHOWN else ""
    return ", ".join(map(str, numbers[:SHOWN])) + more


def refuse_unnamed(masks: list, numbers: list[int]) -> None:
    """Raise ValueError: the masks hold numbers that need names."""
    example = ",".join(f"NAME{k}" for k in range(1, min(len(numbers), 3) + 1))
    raise ValueError(
        f"{masks[0].mask.parent}: masks hold the values {list_numbers(numbers)} besides 0; name "
        f"them as classes: --classes {example}, or set --mask-threshold N: values above N are "
        "foreground"
    )


def refuse_unknown(masks: list, counts: np.ndarray, number: int, names: Names) -> None:
    """Raise ValueError: the masks hold a number that has no name."""
    i = int(counts[:, 0, number].argmax())
    raise ValueError(
        f"{masks[i].mask}: holds the class number {number}, but {names.source} names "
        f"{', '.join(names.foreground)}; name all numbers"
    )


def read_numbers(
    name_of: dict[int, str], mask: MaskFile, image: Path, size: tuple[int, int]
) -> list[Object]:
    """Return the objects of a mask of class numbers."""
    values, _ = image_files.load_mask(mask.path, image, numbers=True)  # (H,W)
    check_size(values, mask, image, size)

    objects = []
    for number, name in name_of.items():
        objects.append(Object(name, values == number))
    if 255 not in name_of:
        objects.append(Object(IGNORED, values == 255))
    return objects


# --- colours --------------------------------------------------------------------------------------


@dataclass
class Colours:
    """The colours of all masks."""

    is_lossy: bool  # some mask is a JPEG
    pixels: Counter = field(default_factory=Counter)  # 0xRRGGBB -> pixels, not of rare colours
    flat: Counter = field(default_factory=Counter)  # the same without edges
    palettes: list = field(default_factory=list)  # {index: colour}, of palette images
    is_coloured: bool = False  # some mask is not grey
    has_one_palette: bool = False  # all coloured masks are palette images of one palette

    @property
    def noise(self) -> int:
        """Return the levels per channel by which pixels of the same colour may differ."""
        return NOISE[self.is_lossy]

    def add(
        self, codes: np.ndarray, counts: np.ndarray, flat: np.ndarray, palette: dict | None
    ) -> None:
        """Add the colours, pixels and flat pixels (n,) of a file, and its palette."""
        self.pixels.update(dict(zip(codes.tolist(), counts.tolist(), strict=True)))
        self.flat.update(dict(zip(codes.tolist(), flat.tolist(), strict=True)))
        if palette is not None:
            self.palettes.append(palette)

    def main(self) -> list[int]:
        """Return the colours that fill areas or long lines, most frequent first, without black.

        The colours of soft edges, which lie between two others, are left out.
        """
        coloured = []
        total = 0
        total_flat = 0
        for colour, pixels in self.pixels.items():
            if not is_near(colour, BLACK, self.noise):
                coloured.append(colour)
                total += pixels
                total_flat += self.flat[colour]

        chosen = []
        for colour in sorted(coloured, key=lambda c: (-self.flat[c], -self.pixels[c], c)):
            fills_area = self.flat[colour] >= max(1, FLAT_SHARE * total_flat)
            may_be_line = not self.is_lossy and self.pixels[colour] >= THIN_SHARE * total
            if not fills_area and not may_be_line:
                continue
            if any(is_near(colour, other, self.noise) for other in chosen):
                continue
            if fills_area or not is_blend(colour, [BLACK, *chosen], self.noise):
                chosen.append(colour)
        return chosen

    def in_order(self) -> list[int]:
        """Return the main colours without VOID, by index if they have one palette, else by code."""
        position = {}
        if self.has_one_palette:
            for palette in self.palettes:
                for index, colour in palette.items():
                    position[colour] = min(index, position.get(colour, index))

        colours = [colour for colour in self.main() if colour != VOID]
        return sorted(colours, key=lambda colour: (position.get(colour, 256), colour))

    def are_several(self) -> bool:
        """Return True if the masks have several main colours, not only grey levels."""
        return self.is_coloured and len(self.main()) > 1


def channels(colour: int) -> tuple[int, int, int]:
    """Return red, green and blue of 0xRRGGBB."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def is_near(colour: int, other: int, distance: int) -> bool:
    """Return True if two colours differ by at most `distance` in each channel."""
    pairs = zip(channels(colour), channels(other), strict=True)
    return all(abs(a - b) <= distance for a, b in pairs)


def is_grey(colour: int, distance: int) -> bool:
    """Return True if the channels of a colour differ by at most `distance`."""
    levels = channels(colour)
    return max(levels) - min(levels) <= distance


def is_blend(colour: int, others: list[int], distance: int) -> bool:
    """Return True if a colour lies between two others, within a distance in each channel."""
    point = np.array(channels(colour))
    ends = rgb(np.array(others))  # (n,3)
    start = ends[:, None]
    direction = ends[None] - start  # (n,n,3)
    length = np.maximum(1, (direction**2).sum(axis=2))  # (n,n)
    position = ((point - start) * direction).sum(axis=2) / length
    nearest = start + position.clip(0, 1)[..., None] * direction
    return bool((np.abs(nearest - point).max(axis=2) <= distance).any())


def hexadecimal(colour: int) -> str:
    return f"#{colour:06x}"


def colour_codes(stored: Image.Image, path: Path) -> np.ndarray:
    """Return the colours of an opened mask, 0xRRGGBB, int32 (H,W). Transparent pixels become black.

    path: its file.
    """
    with image_files.one_line_errors(path):
        rgba = np.asarray(stored.convert("RGBA")).astype(np.int32)  # (H,W,4)
    codes = rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2]
    return np.where(rgba[..., 3] > 127, codes, BLACK)


def is_coloured_file(path: Path) -> bool:
    """Return True if the header of a file states colours or a palette."""
    image = image_files.open_image(path, decode=False)
    return image.mode in ("P", "PA") or len(image.getbands()) >= 3


def scan_file(path: Path) -> tuple | None:
    """Return colours, their pixels, their flat pixels (n,) and the palette.

    Return None for a grey file. The palette is {index: colour}, or None for other files.
    """
    if not is_coloured_file(path):
        return None

    stored = image_files.turn_upright(image_files.open_image(path))
    codes = colour_codes(stored, path)
    is_flat = data.flat_pixels(codes)
    grey = codes & 255
    if (codes == grey * GREY).all():  # much faster than sorting
        colours = np.arange(256) * GREY
        counts = np.bincount(grey.ravel(), minlength=256)
        flat = np.bincount(grey[is_flat], minlength=256)
    else:
        colours, positions, counts = np.unique(codes, return_inverse=True, return_counts=True)
        flat = np.bincount(positions.reshape(codes.shape)[is_flat], minlength=len(colours))

    palette = None
    if stored.mode == "P":
        indices, first = np.unique(np.asarray(stored), return_index=True)
        palette = dict(zip(indices.tolist(), codes.ravel()[first].tolist(), strict=True))

    number = min(MOST_SCANNED, np.count_nonzero(counts))
    frequent = np.argsort(-counts, kind="stable")[:number]
    return colours[frequent], counts[frequent], flat[frequent], palette


def scan_colours(masks: list) -> Colours:
    """Return the colours of all masks that are not grey."""
    paths = [entry.mask for entry in masks]
    result = Colours(any(path.suffix.lower() in data.LOSSY for path in paths))
    coloured = 0
    with ThreadPoolExecutor() as pool:
        scans = pool.map(scan_file, paths)
        bar = tqdm(scans, "colours", len(paths), unit="mask", disable=None, leave=False)
        for facts in bar:
            if facts is not None:
                coloured += 1
                result.add(*facts)

    result.is_coloured = not all(is_grey(colour, result.noise) for colour in result.main())
    result.has_one_palette = len(result.palettes) == coloured and agree(result.palettes)
    return result


def agree(palettes: list[dict[int, int]]) -> bool:
    """Return True if every index has the same colour in all palettes."""
    joined = {}
    for palette in palettes:
        for index, colour in palette.items():
            if joined.setdefault(index, colour) != colour:
                return False
    return True


def colour_names(masks: list, colours: Colours, names: Names) -> dict[int, str]:
    """Return {colour: class}, with the user's names or names of the colours.

    Raises ValueError, one line, for --classes without colours, for masks without a background, and
    for too many colours.
    """
    if names.by_colour:
        return names.by_colour

    folder = masks[0].mask.parent
    main = colours.main()
    shown = ",".join(f"NAME={hexadecimal(colour)}" for colour in main[:SHOWN])
    if names.source == "--classes":
        raise ValueError(f"{folder}: masks hold colours; write --classes '{shown}'")
    if not any(is_near(colour, BLACK, colours.noise) for colour in colours.pixels):
        raise ValueError(
            f"{folder}: masks of {len(main)} colours without black as the background; name all "
            f"colours, one of them background: --classes '{shown}'"
        )
    if len(main) > layouts.MOST_CLASSES:
        raise ValueError(
            f"{folder}: masks hold {len(main)} colours, but there are at most "
            f"{layouts.MOST_CLASSES} classes; colours of objects instead of classes are not read"
        )
    return named_by_colour(colours.in_order())


def coloured_values(masks: list, colours: Colours, names: Names) -> Values:
    """Return how masks of colours are read. Raises ValueError as `colour_names` does."""
    name_of = {BLACK: "background", **colour_names(masks, colours, names)}
    table = {}  # for colours.json
    classes = []
    listed = []
    for colour, name in name_of.items():
        code = hexadecimal(colour)
        table[code] = name
        if is_background(name):
            continue
        listed.append(f"{code} {name}")
        if name not in classes:  # several colours may have the same name
            classes.append(name)

    lines = [f"masks of colours, named by {names.source}: {', '.join(listed)}"]
    if not names.by_colour:
        lines = unnamed_colours(table, colours)
    if names.source and not names.by_colour:
        lines.append(f"{names.source} is not used: it names no colours")
    if VOID in colours.main() and VOID not in name_of:
        name_of[VOID] = IGNORED
        table[hexadecimal(VOID)] = IGNORED
        lines.append(f"pixels of {hexadecimal(VOID)} are ignored in training")
    lines += turned_lines(masks)
    read = partial(read_colours, name_of, colours.noise)
    return Values(read, tuple(classes), lines, {"colours.json": table}, is_map=True)


def unnamed_colours(table: dict[str, str], colours: Colours) -> list[str]:
    """Return the lines about classes that the user has not named. table: colour -> class."""
    foreground = [colour for colour, name in table.items() if not is_background(name)]
    examples = [f"NAME{k}" for k in range(1, len(foreground[:SHOWN]) + 1)]
    if not colours.has_one_palette:
        examples = [f"{name}={c}" for name, c in zip(examples, foreground, strict=False)]
    more = ",…" if len(foreground) > SHOWN else ""
    return [
        f"masks of colours: {', '.join(foreground)}; nothing names them, so classes are called by "
        "their colours",
        f"to name the classes, import again with --classes '{','.join(examples)}{more}'",
    ]


def named_by_colour(colours: list[int]) -> dict[int, str]:
    """Return {colour: name}: a word such as red, or "colour #rrggbb".

    A word that fits several of the colours is not used.
    """
    words = {colour: word_for(colour) for colour in colours}
    frequency = Counter(words.values())

    named = {}
    for colour, word in words.items():
        is_clear = word and frequency[word] == 1
        named[colour] = word if is_clear else f"colour {hexadecimal(colour)}"
    return named


def word_for(colour: int) -> str:
    """Return the word of COLOUR_NAMES for a colour, "" if none is near."""
    for known, word in COLOUR_NAMES.items():
        if is_near(colour, known, NAME_DISTANCE):
            return word
    return ""


def read_colours(
    name_of: dict[int, str], noise: int, mask: MaskFile, image: Path, size: tuple[int, int]
) -> list[Object]:
    """Return the objects of a mask of colours.

    Every pixel gets the nearest colour. Raises ValueError, one line, for other colours
    (`refuse_strange_colours`).
    """
    turn, _ = image_files.mask_turn(mask.path, image, None)
    stored = image_files.turn_upright(image_files.open_image(mask.path), turn)
    codes = colour_codes(stored, mask.path)  # (H,W)
    check_size(codes, mask, image, size)
    known = np.array([*name_of])
    names = [*name_of.values()]

    present, positions = np.unique(codes, return_inverse=True)  # (n,)
    positions = positions.reshape(codes.shape)
    distances = []
    for colour in rgb(known):
        distances.append(((rgb(present) - colour) ** 2).sum(axis=1))
    nearest = np.argmin(distances, axis=0)  # (n,)

    is_far = np.abs(rgb(present) - rgb(known)[nearest]).max(axis=1) > noise  # (n,)
    refuse_strange_colours(codes, is_far[positions], [*name_of], mask)

    class_of = nearest[positions]  # (H,W)
    masks = {}
    for k in np.unique(class_of).tolist():
        if not is_background(names[k]):
            masks[names[k]] = masks.get(names[k], False) | (class_of == k)
    return [Object(name, pixels) for name, pixels in masks.items()]


def refuse_strange_colours(
    codes: np.ndarray, far: np.ndarray, known: list[int], mask: MaskFile
) -> None:
    """Raise ValueError, one line, for an area of a colour that is none of the known ones.

    codes: colours (H,W). far: bool (H,W), pixels that differ from all known colours. An area has
    nine equal pixels. A mask with many such pixels, such as a photo, needs no area.
    """
    strange = codes[far & data.flat_pixels(codes)]
    if far.mean() > MOST_FAR:
        strange = codes[far]
    if not strange.size:
        return

    colour, _ = Counter(strange.tolist()).most_common(1)[0]
    raise ValueError(
        f"{mask.path}: holds {hexadecimal(colour)}, which is none of the colours "
        f"{', '.join(map(hexadecimal, known[:SHOWN]))}; repaint it, or name it with "
        "--classes NAME=#rrggbb,…"
    )


def rgb(codes: np.ndarray) -> np.ndarray:
    """Return the channels of colours 0xRRGGBB, int (n,) -> (n,3)."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
