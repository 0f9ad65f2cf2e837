"""Decide how the pixels of a user's masks are read: as binary masks, class numbers or colours.

Binary masks follow data.mask_rule. Class numbers need names: --classes, or a file such as
classes.txt. Colours are classes if areas of them are filled; JPEG noise and soft edges become the
nearest of these colours.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
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
VOID = 0xE0E0C0  # the border of objects in VOC's masks, which does not count
COLOUR_NAMES = {
    0xFF0000: "red", 0x00FF00: "green", 0x0000FF: "blue", 0xFFFF00: "yellow", 0x00FFFF: "cyan",
    0xFF00FF: "magenta", 0xFFFFFF: "white", 0xFFA500: "orange",
}  # fmt: skip
NAME_DISTANCE = 16  # levels per channel by which a colour may differ from one of these

# Colours that belong together differ by at most so many levels in each channel: JPEG noise, or
# the traces that it leaves in a file that was saved again as PNG.
NOISE = {True: data.COLOUR_NOISE, False: 8}  # by: some mask is a JPEG
FLAT_SHARE = 0.001  # share of all coloured flat pixels that a class has at least
THIN_SHARE = 0.02  # share of all coloured pixels that makes a class of thin lines without areas
MOST_FAR = 1 / 3  # share of the pixels of a mask that may be further away than noise: edges
MOST_SCANNED = 256  # colours of a file, the most frequent ones
MOST_CLASSES = 254
SHOWN = 8  # colours or numbers that a message lists


@dataclass(frozen=True)
class MaskFile:
    """A mask, and the class that its folder or its name states, "" for none."""

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

    @property
    def foreground(self) -> tuple[str, ...]:
        """Return the names of the numbers from 1."""
        return tuple(name for number, name in sorted(self.by_number.items()) if number > 0)


NO_NAMES = Names("")


def is_background(name: str) -> bool:
    return name.lower() in BACKGROUND


def numbered(names: list[str]) -> dict[int, str]:
    """Return {number: name}, from 0 if the first name is the background, else from 1."""
    names = [name for name in names if name.lower() not in NO_CLASS]
    start = 0 if names and is_background(names[0]) else 1
    return dict(enumerate(names, start))


def option_names(text: str) -> Names:
    """Return the names in --classes: "liver,kidney", or "liver=#ff0000,kidney=#00ff00"."""
    items = [item.strip() for item in text.split(",")]
    if not all(items) or len({*items}) < len(items):
        raise ValueError(f"--classes {text}: expected different names, separated by commas")

    by_colour = {}
    for item in items:
        name, _, colour = item.partition("=")
        if re.fullmatch("#[0-9a-fA-F]{6}", colour.strip()):
            by_colour[int(colour.strip()[1:], 16)] = name.strip()
    if by_colour and len(by_colour) < len(items):
        raise ValueError(f"--classes {text}: write NAME=#rrggbb, once for each colour, or names")
    if by_colour:
        return Names("--classes", by_colour=by_colour)
    return Names("--classes", numbered(items))


COLOUR_LINES = (  # "liver,255,0,0", "liver:255,0,0::" (CVAT), "255 0 0 liver" (CamVid)
    re.compile(r"(?P<name>.*?)[\s,;:]+(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)\s*(?::.*)?"),
    re.compile(r"(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)[\s,;]+(?P<name>.*)"),
)
NUMBER_LINE = re.compile(r"(\d+)\s*[\s,;:=]\s*(\D.*)")


def parse_names(text: str, source: str) -> Names:
    """Return the names in a file: colours, numbers or plain names, one a line.

    A first line of another kind is a header. Raises ValueError for names that occur twice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    for pattern in COLOUR_LINES:
        fits = [pattern.fullmatch(line) for line in lines]
        if any(fits) and all(fits[1:]):
            by_colour = {}
            for match in filter(None, fits):
                colour = int(match["r"]) << 16 | int(match["g"]) << 8 | int(match["b"])
                by_colour[colour] = match["name"].strip().strip("\"'")
            return Names(source, by_colour=by_colour)

    fits = [NUMBER_LINE.fullmatch(line) for line in lines]
    if any(fits) and all(fits[1:]):
        by_number = {int(match[1]): match[2].strip() for match in filter(None, fits)}
    elif source.lower().endswith(".csv"):
        return NO_NAMES  # some other table
    else:
        by_number = numbered(lines)
    if len({*by_number.values()}) < len(by_number):
        raise ValueError(f"{source}: names a class twice")
    return Names(source, by_number)


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
        paths = " and ".join(str(path) for path in texts.values())
        raise ValueError(f"{paths}: both name classes; remove one, or use --classes")
    for text, path in texts.items():
        source = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".json":
            names = layouts.read_classes(path)
            return Names(source, dict(enumerate(names, int(len(names) == 1))))
        return parse_names(text, source)
    return NO_NAMES


# --- choosing -------------------------------------------------------------------------------------


def read_values(pairs: list[Pair], folder: Path, args: Namespace) -> Values:
    """Return how the masks of all pairs are read.

    Raises ValueError, one line, for masks that cannot be read, and for class numbers without names.
    """
    names = names_of(folder, args)
    masks = []
    for pair in pairs:
        for mask in pair.masks:
            path = mask.path
            masks.append(layouts.Entry(pair.name, pair.image, path, {}, folder.resolve()))
    stated = sorted({mask.class_name for pair in pairs for mask in pair.masks} - {""})
    if stated:
        return class_files(pairs, masks, stated, args)

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
        if len(names.foreground) > 1:
            holds_ones = counts[:, 0, 1].any() and not counts[:, 0, 2:].any()
            is_numbered |= args.classes is not None or holds_ones
    if is_numbered:
        return numbered_values(masks, counts, names)
    return binary_values(masks, counts, rule, names)


def turned_lines(masks: list) -> list[str]:
    """Return a line about masks of rotated photos that may be upright already."""
    turned = 0
    for entry in masks:
        turned += image_files.mask_turn(entry.mask, entry.image, None)[1]
    if not turned:
        return []
    return [f"turned like their photos, although they may be upright already: {turned} masks"]


def count_values(masks: list, numbers: bool = False) -> np.ndarray:
    """Return data.count_values of all masks, (n,3,256), with a progress bar.

    numbers: the masks hold class numbers.
    """
    if numbers:
        classes = ("background", "one", "other")  # any three: the masks are class maps
        masks = [as_class_map(entry, classes) for entry in masks]
    counts = []
    bar = tqdm(total=len(masks), desc="masks", unit="mask", disable=None, leave=False)
    for start in range(0, len(masks), 64):
        chunk = masks[start : start + 64]
        counts.append(data.count_masks(chunk))
        bar.update(len(chunk))
    bar.close()
    return np.concatenate(counts)


def as_class_map(entry: layouts.Entry, classes: tuple[str, ...]) -> layouts.Entry:
    """Return an entry as one of a class map."""
    fields = {**vars(entry), "classes": classes, "has_class_indices": True}
    return layouts.Entry(**fields)


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
    threshold_of = {entry.mask: t for entry, t in zip(masks, thresholds, strict=True)}
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
    """Return how masks are read that hold one class each. stated: the classes by name.

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
    unnamed = [mask.path for pair in pairs for mask in pair.masks if not mask.class_name]
    if unnamed:
        raise ValueError(
            f"{unnamed[0]}: names no class, as others do ({', '.join(stated)}); move it into a "
            "folder of a class, or remove it"
        )

    counts = count_values(masks)
    rule = data.mask_rule(masks, counts, args.mask_threshold)
    for _, line in rule.errors:
        path = line.partition(": ")[0]
        raise ValueError(
            f"{path}: holds several values, but folders or names state the classes "
            f"{', '.join(stated)}; if these are no classes, choose the masks with --images 'GLOB' "
            "--masks 'GLOB', else set --mask-threshold"
        )

    of_class = Counter(mask.class_name for pair in pairs for mask in pair.masks)
    about = ", ".join(f"{name} ({of_class[name]})" for name in stated)
    values = binary_values(masks, counts, rule, NO_NAMES)
    order = {name: k for k, name in enumerate(stated)}
    lines = [f"masks of classes: {about}", *values.lines]
    if len(stated) > 1:
        lines.append("where classes overlap, a later one of this list covers the others")
    return OrderedValues(values.read, tuple(stated), lines, is_map=True, order=order)


@dataclass(frozen=True)
class OrderedValues(Values):
    """Masks of one class each; those of later classes cover those of earlier ones."""

    order: dict[str, int] = field(default_factory=dict)  # class -> position

    def read_pair(self, pair: Pair, size: tuple[int, int]) -> list[Object]:
        objects = super().read_pair(pair, size)
        return sorted(objects, key=lambda item: self.order[item.class_name])


# --- class numbers --------------------------------------------------------------------------------


def numbered_values(masks: list, counts: np.ndarray, names: Names) -> Values:
    """Return how masks of class numbers are read.

    If there are numbers that no name belongs to, but as many numbers as names, the names belong to
    the numbers in ascending order. Raises ValueError, one line, without names.
    """
    if any(image_files.open_image(entry.mask, decode=False).mode[0] == "P" for entry in masks):
        counts = count_values(masks, numbers=True)
    present = np.flatnonzero(counts[:, 0].any(axis=0)).tolist()
    numbers = [number for number in present if number > 0]
    if not names.by_number:
        refuse_unnamed(masks, numbers)

    name_of = {number: name for number, name in names.by_number.items() if number > 0}
    unknown = [number for number in numbers if number not in name_of and number != 255]
    lines = []
    if unknown or numbers == [255]:
        if len(numbers) != len(name_of):
            refuse_unknown(masks, counts, (unknown or [255])[0], names)
        name_of = dict(zip(numbers, name_of.values(), strict=True))
        listed = ", ".join(f"{number} {name}" for number, name in name_of.items())
        lines.append(f"grey levels, in ascending order: {listed}")

    shown = ", ".join(map(str, present[:SHOWN])) + (", …" if len(present) > SHOWN else "")
    lines.insert(0, f"masks of class numbers: {shown}, named by {names.source}")
    if 255 in numbers and 255 not in name_of:
        lines.append("pixels of 255 are ignored in training")
    read = partial(read_numbers, name_of)
    lines += turned_lines(masks)
    return Values(read, tuple(name_of.values()), lines, is_map=True)


def refuse_unnamed(masks: list, numbers: list[int]) -> None:
    """Raise ValueError: the masks hold numbers that need names."""
    shown = ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
    example = ",".join(f"NAME{k}" for k in range(1, min(len(numbers), 3) + 1))
    raise ValueError(
        f"{masks[0].mask.parent}: masks hold the values {shown} besides 0; name them as classes: "
        f"--classes {example}, or set --mask-threshold N: values above N are foreground"
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
    objects = [Object(name, values == number) for number, name in name_of.items()]
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
        """Return the levels by which colours that belong together may differ."""
        return NOISE[self.is_lossy]

    def main(self) -> list[int]:
        """Return the colours that fill areas or long lines, most frequent first, black excluded.

        The colours of soft edges, which lie between two others, are none of them.
        """
        coloured = {c: n for c, n in self.pixels.items() if not is_near(c, BLACK, self.noise)}
        total = sum(coloured.values())
        total_flat = sum(self.flat[colour] for colour in coloured)

        chosen = []
        for colour in sorted(coloured, key=lambda c: (-self.flat[c], -self.pixels[c], c)):
            fills_area = self.flat[colour] >= max(1, FLAT_SHARE * total_flat)
            may_be_line = not self.is_lossy and coloured[colour] >= THIN_SHARE * total
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
        """Return True if the masks hold several colours, VOID included, not only grey levels."""
        return self.is_coloured and len(self.main()) > 1


def channels(colour: int) -> tuple[int, int, int]:
    """Return red, green and blue of 0xRRGGBB."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def is_near(colour: int, other: int, distance: int) -> bool:
    """Return True if two colours differ by at most `distance` in each channel."""
    pairs = zip(channels(colour), channels(other), strict=True)
    return all(abs(a - b) <= distance for a, b in pairs)


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


def load_colours(path: Path, image: Path | None) -> np.ndarray:
    """Return the colours of a mask, 0xRRGGBB, int32 (H,W), upright; transparent is black."""
    turn = None
    if image is not None:
        turn, _ = image_files.mask_turn(path, image, None)
    stored = image_files.turn_upright(image_files.open_image(path), turn)
    with image_files.one_line_errors(path):
        rgba = np.asarray(stored.convert("RGBA")).astype(np.int32)  # (H,W,4)
    codes = rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2]
    return np.where(rgba[..., 3] > 127, codes, BLACK)


def is_coloured_file(path: Path) -> bool:
    """Return True for a file of colours or of a palette, by its header."""
    image = image_files.open_image(path, decode=False)
    return image.mode in ("P", "PA") or len(image.getbands()) >= 3


def scan_file(path: Path) -> tuple | None:
    """Return colours, their pixels, their flat pixels (n,) and the palette; None for grey files."""
    if not is_coloured_file(path):
        return None
    codes = load_colours(path, None)
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
    stored = image_files.turn_upright(image_files.open_image(path))
    if stored.mode == "P":
        indices, first = np.unique(np.asarray(stored), return_index=True)
        palette = dict(zip(indices.tolist(), codes.ravel()[first].tolist(), strict=True))
    frequent = np.argsort(-counts, kind="stable")[: min(MOST_SCANNED, np.count_nonzero(counts))]
    return colours[frequent], counts[frequent], flat[frequent], palette


def scan_colours(masks: list) -> Colours:
    """Return the colours of all masks that are not grey."""
    paths = [entry.mask for entry in masks]
    result = Colours(any(path.suffix.lower() in data.LOSSY for path in paths))
    coloured = 0
    bar = tqdm(total=len(paths), desc="colours", unit="mask", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 64):
            chunk = paths[start : start + 64]
            for facts in pool.map(scan_file, chunk):
                bar.update()
                if facts is None:
                    continue
                coloured += 1
                colours, counts, flat, palette = facts
                result.pixels.update(dict(zip(colours.tolist(), counts.tolist(), strict=True)))
                result.flat.update(dict(zip(colours.tolist(), flat.tolist(), strict=True)))
                if palette is not None:
                    result.palettes.append(palette)
    bar.close()

    result.is_coloured = any(
        max(channels(c)) - min(channels(c)) > result.noise for c in result.main()
    )
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
    """Return {colour: class} of masks of colours, by the user's names or by the colours' own.

    Raises ValueError, one line, for names of other things, for masks without a background, and for
    too many colours.
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
    if len(main) > MOST_CLASSES:
        raise ValueError(
            f"{folder}: masks hold {len(main)} colours, but there are at most {MOST_CLASSES} "
            "classes; colours of objects instead of classes are not read"
        )
    return named_by_colour(colours.in_order())


def coloured_values(masks: list, colours: Colours, names: Names) -> Values:
    """Return how masks of colours are read. Raises ValueError as `colour_names` does."""
    name_of = {BLACK: "background", **colour_names(masks, colours, names)}
    table = {hexadecimal(colour): name for colour, name in name_of.items()}
    classes = [name for name in dict.fromkeys(name_of.values()) if not is_background(name)]
    listed = [f"{colour} {name}" for colour, name in table.items() if not is_background(name)]

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
    """Return {colour: name}: a word such as red for one colour near it, else "colour #rrggbb"."""
    words = {}
    for colour in colours:
        near = [word for c, word in COLOUR_NAMES.items() if is_near(colour, c, NAME_DISTANCE)]
        words[colour] = near[0] if near else ""
    frequency = Counter(words.values())

    named = {}
    for colour, word in words.items():
        is_clear = word and frequency[word] == 1
        named[colour] = word if is_clear else f"colour {hexadecimal(colour)}"
    return named


def read_colours(
    name_of: dict[int, str], noise: int, mask: MaskFile, image: Path, size: tuple[int, int]
) -> list[Object]:
    """Return the objects of a mask of colours.

    Every pixel gets the nearest colour. Raises ValueError, one line, for an area of another colour
    (nine equal pixels that are further than `noise` from all colours), and for a mask that consists
    mostly of others, such as a photo.
    """
    codes = load_colours(mask.path, image)  # (H,W)
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
    far = is_far[positions]  # (H,W)
    strange = codes[far & data.flat_pixels(codes)]
    if far.mean() > MOST_FAR:
        strange = codes[far]
    if strange.size:
        colour = int(Counter(strange.tolist()).most_common(1)[0][0])
        raise ValueError(
            f"{mask.path}: holds {hexadecimal(colour)}, which is none of the colours "
            f"{', '.join(map(hexadecimal, known[:SHOWN].tolist()))}; repaint it, or name it with "
            "--classes NAME=#rrggbb,…"
        )

    class_of = nearest[positions]  # (H,W)
    masks = {}
    for k in np.unique(class_of).tolist():
        if not is_background(names[k]):
            masks[names[k]] = masks.get(names[k], False) | (class_of == k)
    return [Object(name, pixels) for name, pixels in masks.items()]


def rgb(codes: np.ndarray) -> np.ndarray:
    """Return the channels of colours 0xRRGGBB, int (n,) -> (n,3)."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
