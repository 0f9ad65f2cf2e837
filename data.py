"""Images and masks -> samples, decoded once into one file, and batches of them.

How the values of masks are read is decided once for each data set (`mask_rule`), over all of its
splits that are opened together. Binary masks: foreground is > 127 where masks reach above 1, else
> 0, so that 0/1, 0/255, 1-bit, palette, JPEG and soft-edged masks all work. Masks of several values
are refused, unless `--mask-threshold` says what foreground is. With `label` or classes.json the
file's own numbers count; where classes.json names one class alone, masks that reach 255 and hold no
1 are binary all the same. imaging/image_files.py has the rules by which files are read.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of class numbers (0 and 1 of binary
masks; 255: does not count), `prompt` str, `name` (the mask's stem), `file` (the image's path),
`size` (H,W), `classes` (of binary masks one, else with the background), `group` (a patient, or
None), `dataset`.
"""

import functools
import hashlib
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from imaging import layouts, pictures
from imaging.atomic_files import checksums, is_intact, remove_leftovers, whole_file
from imaging.image_files import (
    has_damaged_exif,
    load_image,
    load_mask,
    one_line_errors,
    open_image,
    pseudocolor,
    refuse_special,
)

# --- how the values of masks are read ------------------------------------------------------------

GREY = slice(8, 248)  # values that JPEG noise of black and white rarely reaches

# The grey pixels of a binary mask are soft edges and JPEG noise, where values change from pixel to
# pixel. Those of a map of several values are objects, where most neighbours have the same value.
# Measured: the share of a file's grey pixels whose 3x3 neighbourhood holds one value, the largest
# over real masks. 0 % with JPEG noise (quality 50 to 95) and soft edges (resized by 0.25 to 8,
# blurred by sigma 1 to 4 pixels), 0.02 % at sigma 8, 0.44 % at sigma 16, 0.66 % blurred by boxes of
# 21 pixels. Maps of several values: 36 to 71 %.
FLAT_SHARE = 0.01
FLAT_PIXELS = 9  # the least that count: a share of few pixels says nothing

# Class numbers 1 to 7 look like JPEG noise of black. Of the pixels with the rarer dark values at
# most 19 % were flat in the same measurement, and then grey ones were in the majority.
DARK_SHARE = 0.25

LOSSY = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip
COLOUR_NOISE = 48  # levels by which JPEG may change the colour of a flat pixel

BY_NUMBER = "by number"
BY_FILE = "by file"  # some masks hold 0 and 1, others 0 to 255
GIVEN = "--mask-threshold "  # followed by the threshold
SHOWN_VALUES = 6  # how many values of a mask an error lists


@dataclass
class MaskRule:
    """How the masks of a data set are read, and what was noticed about them.

    `rule` is what config.json keeps: "> 127", "> 0", "by number", "by file" (each file > 0 or
    > 127, by its own range) or "--mask-threshold 40". `errors` and `notes` are pairs of a heading
    for reports and a line. Masks with errors cannot be used.
    """

    rule: str
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def refuse_colours(entry) -> None:
    """Raise ValueError, one line, if class numbers are expected and the mask file holds colours."""
    if entry.label is None and len(entry.classes) == 1:
        return
    bands = open_image(entry.mask, decode=False).getbands()
    if len(bands) < 3:
        return

    image = open_image(entry.mask)
    with one_line_errors(entry.mask):
        is_grey = _is_grey(image.convert("RGB"))
    if not is_grey:
        hint = "save the numbers 0, 1, 2, … as a grey or a palette image"
        raise ValueError(f"{entry.mask}: holds colours, which are no class numbers; {hint}")


def _has_alpha(image: Image.Image) -> bool:
    """Return True if transparency varies over an image, so that alpha may be the mask."""
    if not image.has_transparency_data:
        return False
    low, high = image.convert("RGBA").getchannel("A").getextrema()
    return low < high


def _is_grey(image: Image.Image) -> bool:
    """Return True if red, green and blue of an RGB image are equal everywhere."""
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue


def count_values(entry, mask: np.ndarray) -> np.ndarray:
    """Count the values of an entry's mask as `read_mask` gives it, uint8 (H,W) -> int32 (3,256).

    Row 0: pixels of each value. Row 1: those of them that are flat, see `flat_pixels`; no grey ones
    of masks that hold probabilities. Row 2: those of the flat ones that have another colour than
    most, where colours were read as one foreground.
    """
    counts = np.zeros((3, 256), dtype=np.int32)
    counts[0] = np.bincount(mask.ravel(), minlength=256)
    flat = flat_pixels(mask)
    counts[1] = np.bincount(mask[flat & (mask != 0) & (mask != 255)], minlength=256)
    counts[1, 255] = np.count_nonzero(flat & (mask == 255))  # most pixels: faster than bincount
    counts[1, 0] = np.count_nonzero(flat) - counts[1].sum()
    if holds_probabilities(entry.mask):
        counts[1, GREY] = 0  # areas of one probability are no objects
    if entry.label is None and not (entry.numbers and len(entry.classes) > 1):
        counts[2] = _count_other_colours(entry)
    return counts


def holds_probabilities(path: Path) -> bool:
    """Return True if a mask file holds floats from 0 to 1, which are cut at a half."""
    if open_image(path, decode=False).mode != "F":
        return False
    return np.asarray(open_image(path)).max() <= 1 + 1e-6


def flat_pixels(mask: np.ndarray) -> np.ndarray:
    """Return bool (H,W): where all nine pixels of the 3x3 neighbourhood have one value.

    Pixels at the image's border are never flat.
    """
    flat = np.zeros(mask.shape, dtype=bool)
    if min(mask.shape) < 3:
        return flat
    inner = mask[:, 1:-1]
    flat_row = (inner == mask[:, :-2]) & (inner == mask[:, 2:])  # (H,W-2)
    flat[1:-1, 1:-1] = flat_row[:-2] & flat_row[1:-1] & flat_row[2:]
    flat[1:-1, 1:-1] &= (inner[1:-1] == inner[:-2]) & (inner[1:-1] == inner[2:])
    return flat


def _count_other_colours(entry) -> np.ndarray:
    """Return int (256,): flat pixels of another colour than most foreground, by largest channel."""
    none = np.zeros(256, dtype=np.int32)
    stored = open_image(entry.mask, decode=False)
    palette = stored.mode == "P" and not entry.numbers  # else its indices are read
    if not palette and len(stored.getbands()) < 3:
        return none

    image = open_image(entry.mask)
    if _has_alpha(image):  # `mask_channel` has refused colours that vary
        return none
    colours = image.convert("RGB")
    if _is_grey(colours):
        return none
    pixels = np.asarray(colours)  # (H,W,3)
    largest = pixels.max(axis=2)
    chosen = flat_pixels(largest) & (largest >= GREY.start)
    if not chosen.any():
        return none

    colours, counts = np.unique(pixels[chosen], axis=0, return_counts=True)  # (n,3), (n,)
    main = colours[counts.argmax()].astype(int)
    other = (np.abs(colours - main) > COLOUR_NOISE).any(axis=1)
    return np.bincount(colours[other].max(axis=1), counts[other], minlength=256).astype(np.int32)


def mask_rule(
    entries: list, counts: np.ndarray, threshold: int | None = None, known: str | None = None
) -> MaskRule:
    """Decide how the masks of one data set are read. Every program takes the rule from here.

    entries: of one root, all splits together. counts (n,3,256): `count_values` of their masks.
    threshold: of --mask-threshold, for binary masks. known: the rule that a run read this data set
    by; it settles what the values leave open.
    """
    numbers_of_files = {e.mask: i for i, e in enumerate(entries) if e.label is None}
    if not numbers_of_files:
        return MaskRule(BY_NUMBER)
    indices = sorted(numbers_of_files.values())
    entries = [entries[i] for i in indices]
    counts = counts[indices]

    if entries[0].numbers and len(entries[0].classes) > 1:
        return MaskRule(BY_NUMBER, _unknown_numbers(entries, counts[:, 0]))
    if threshold is None and known and known.startswith(GIVEN):
        threshold = int(known.removeprefix(GIVEN))
    if threshold is not None:
        return MaskRule(f"{GIVEN}{threshold}")

    rule = _rule_of_values(entries, counts)
    return _settled(rule, known, entries, counts)


def _unknown_numbers(entries: list, values: np.ndarray) -> list[tuple[str, str]]:
    """Return an error for each mask with a class number that classes.json does not name."""
    errors = []
    n = len(entries[0].classes)
    for entry, row in zip(entries, values, strict=True):
        unknown = n + np.flatnonzero(row[n:255])
        if len(unknown):
            shown = ", ".join(map(str, unknown[:SHOWN_VALUES]))
            if len(unknown) > SHOWN_VALUES:
                shown += ", …"
            number = "number" if len(unknown) == 1 else "numbers"
            where = f"{entry.root / 'classes.json'} ends at {n - 1}"
            line = f"{entry.mask}: holds class {number} {shown}, but {where}"
            errors.append(("unknown class numbers", line))
    return errors


def _rule_of_values(entries: list, counts: np.ndarray) -> MaskRule:
    """Decide by the values alone; see `mask_rule`."""
    root = entries[0].root
    values = counts[:, 0]  # (n,256)
    present = values.any(axis=0)  # (256,)
    if entries[0].numbers and present[1] and not present[2:255].any():
        return MaskRule(BY_NUMBER)

    largest = int(np.flatnonzero(present).max(initial=0))
    if largest <= 1:
        return MaskRule("> 0")
    if largest <= 127:
        not_binary = values[:, 2:].any(axis=1)
        line = _not_binary_line(entries, values, not_binary, "holds no value above 127")
        return MaskRule("> 127", [("masks of several values", line)])

    several = _hold_several_values(entries, counts)
    if several.any():
        what = "holds several values instead of one foreground"
        line = _not_binary_line(entries, values, several, what)
        return MaskRule("> 127", [("masks of several values", line)])

    coloured = _hold_several_colours(counts)
    if coloured.any():
        what = "holds several colours instead of one foreground, by their largest channel"
        line = _not_binary_line(entries, values, coloured, what)
        return MaskRule("> 127", [("masks of several colours", line)])

    zero_one = _are_zero_one(counts, _are_lossy(entries))
    if not zero_one.any():
        return MaskRule("> 127")
    example = entries[int(zero_one.argmax())].mask
    hold = "masks hold" if zero_one.sum() > 1 else "mask holds"
    line = (
        f"{root}: {zero_one.sum()} {hold} 0 and 1 ({example.name}), others go up to {largest}; "
        "each file is read by its own range"
    )
    return MaskRule(BY_FILE, notes=[("masks of two ranges", line)])


def _ways_out(root: Path) -> str:
    """Return what a user can do about masks that are not binary."""
    numbers = f"class numbers need a classes.json in {root} that names 0, 1, 2, … (255 is void)"
    return f"{numbers}; for one foreground set --mask-threshold 0..255 (values above it count)"


def _are_lossy(entries: list) -> np.ndarray:
    """Return bool (n,): which masks are files whose compression changes values."""
    return np.array([entry.mask.suffix.lower() in LOSSY for entry in entries], dtype=bool)


def _hold_several_values(entries: list, counts: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks are maps of several values.

    counts (n,3,256): `count_values` of their masks.
    """
    lossy = _are_lossy(entries)
    webp = np.array([entry.mask.suffix.lower() == ".webp" for entry in entries], dtype=bool)
    values = counts[:, 0]
    flat = counts[:, 1]

    # Objects of grey values, in a file or, where each has only few pixels, in all files together.
    grey = values[:, GREY].sum(axis=1)  # (n,)
    flat_grey = flat[:, GREY].sum(axis=1)
    several = (flat_grey >= FLAT_PIXELS) & (flat_grey >= FLAT_SHARE * grey)
    total = flat_grey.sum()
    if total >= FLAT_PIXELS and total >= FLAT_SHARE * grey.sum():
        several |= flat_grey > 0
    if values[:, 1:].any(axis=0).sum() == 1:
        several[:] = False  # one foreground value, whatever it is

    # Objects of class numbers below grey, 2 to 7, or 1 beside white. WebP shifts all of black.
    dark = values[:, : GREY.start]  # (n,8)
    flat_dark = flat[:, : GREY.start]
    rarer = np.arange(GREY.start) != flat_dark.argmax(axis=1)[:, None]
    rarer_dark = (dark * rarer).sum(axis=1)
    rarer_flat_dark = (flat_dark * rarer).sum(axis=1)
    white = values[:, GREY.stop :].sum(axis=1)
    numbers = (rarer_flat_dark >= FLAT_PIXELS) & (rarer_flat_dark >= DARK_SHARE * rarer_dark)
    numbers &= ~webp & (rarer_dark > grey) & ((white >= FLAT_PIXELS) | values[:, 2:].any(axis=1))

    # 1 and 255 and nothing else but 0: 255 may be void or foreground. JPEG noise has other values.
    enough = np.where(lossy, FLAT_PIXELS, 1)
    one_and_white = (values[:, 1] >= enough) & (values[:, 255] >= enough)
    one_and_white &= ~values[:, 2:255].any(axis=1)
    return several | numbers | one_and_white


def _hold_several_colours(counts: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks have objects of several colours, or a coloured background."""
    flat = counts[:, 1, GREY.start :].sum(axis=1)
    other = counts[:, 2].sum(axis=1)
    return (other >= FLAT_PIXELS) & (other >= FLAT_SHARE * flat)


def _not_binary_line(entries: list, values: np.ndarray, chosen: np.ndarray, what: str) -> str:
    """Return the error for the chosen masks (n,): the first file, its counts, the ways out."""
    first = int(chosen.argmax())
    row = values[first]
    present = np.flatnonzero(row)
    most = present[np.argsort(-row[present], kind="stable")][:SHOWN_VALUES]
    shown = ", ".join(f"{value} ({row[value]} pixels)" for value in sorted(most.tolist()))
    if len(present) > len(most):
        shown += f" and {len(present) - len(most)} more"

    entry = entries[first]
    others = int(chosen.sum()) - 1
    like_it = f" ({others} more masks are like it)" if others else ""
    return f"{entry.mask}: {what}: {shown}{like_it}; {_ways_out(entry.root)}"


def _are_zero_one(counts: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks hold 0 and 1, and nothing else.

    A black JPEG can be 1 all over, also if it was saved anew as PNG. In a JPEG both must be in
    objects, since noise holds a few 1.
    """
    values = counts[:, 0]
    flat = counts[:, 1]
    in_objects = (flat[:, 0] >= FLAT_PIXELS) & (flat[:, 1] >= 1)
    both = (values[:, 0] > 0) & (values[:, 1] > 0)
    return both & (in_objects | ~lossy) & ~values[:, 2:].any(axis=1)


def _settled(fresh: MaskRule, known: str | None, entries: list, counts: np.ndarray) -> MaskRule:
    """Return the rule of a run where the values allow it, else that of the values, with a note.

    A split may hold too little to tell: only empty masks, or only void pixels.
    """
    if known is None or known == fresh.rule or fresh.errors:
        return fresh

    present = counts[:, 0].any(axis=0)  # (256,)
    no_foreground = not present[1:].any()
    zero_one = _are_zero_one(counts, _are_lossy(entries))
    dark_split = known == "> 127" and fresh.rule == "> 0" and not zero_one.any()
    void_split = known == BY_NUMBER and entries[0].numbers and not present[1:255].any()
    if known == BY_FILE or no_foreground or dark_split or void_split:
        return replace(fresh, rule=known)

    root = entries[0].root
    line = f"{root}: masks are read {fresh.rule}; the run read {root.name} {known}"
    fresh.notes.append(("masks read differently from the run", line))
    return fresh


def mask_thresholds(entries: list, values: np.ndarray, rule: str) -> np.ndarray:
    """Return int (n,): what the foreground of each mask exceeds, -1 where numbers count.

    entries: of one root. values (n,256): pixels of each value. rule: see `MaskRule`.
    """
    if rule == BY_NUMBER:
        thresholds = np.full(len(entries), -1)
    elif rule == BY_FILE:
        thresholds = np.where(values[:, 2:].any(axis=1), 127, 0)
    else:
        number = rule.removeprefix(GIVEN).removeprefix("> ")
        thresholds = np.full(len(entries), int(number))

    labelled = np.array([entry.label is not None for entry in entries], dtype=bool)
    return np.where(labelled, -1, thresholds)


def foreground_pixels(entry, values: np.ndarray, threshold: int) -> int:
    """Count the foreground pixels of a mask. values (256,): pixels of each value."""
    if entry.label is not None:
        return int(values[entry.label])
    if threshold < 0:
        return int(values[1:255].sum())
    return int(values[threshold + 1 :].sum())


def read_foreground(entry, mask: np.ndarray, threshold: int) -> np.ndarray:
    """Return a mask as training sees it: 0 and 1, or class numbers; uint8 (H,W).

    mask: as `read_mask` gives it. threshold: from `mask_thresholds`.
    """
    if entry.label is not None:
        mask = mask == entry.label
    elif threshold >= 0:
        mask = mask > threshold
    return np.asarray(mask, np.uint8)


def named(rules: dict[Path, str]) -> dict[str, str]:
    """Rules by the folder names of the data sets, without names that two different rules share."""
    names = {}
    for root, rule in rules.items():
        names.setdefault(root.name, set()).add(rule)
    return {name: rule for name, (rule, *others) in names.items() if not others}


# --- the cache: every image and mask decoded once ------------------------------------------------


NON_FINITE = 1  # flag of an entry: its image holds NaN or infinite pixels, which became 0
TURNED = 2  # its mask was turned like its image, though nothing tells whether it had to be
DAMAGED_EXIF = 4  # its image's EXIF data is damaged, so that it was read as stored


def entry_mask(entry, image: Path | None) -> tuple[np.ndarray, bool]:
    """Return `load_mask` of an entry's mask; `image` is its image, None if that is unreadable."""
    numbers = entry.label is not None or entry.numbers
    binary = entry.label is None and len(entry.classes) == 1
    return load_mask(entry.mask, image, numbers, binary, entry.mask_orientation)


def _read_pair(entry) -> tuple[np.ndarray, np.ndarray, int]:
    """Return image uint8 (H,W,3), raw mask uint8 (H,W) and the flags of one entry.

    Raises ValueError if their sizes differ, and as `open_image` does.
    """
    image, non_finite = load_image(entry.image)
    refuse_colours(entry)
    mask, turned = entry_mask(entry, entry.image)

    if image.shape[:2] != mask.shape:
        (h, w), (H, W) = mask.shape, image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")
    flags = NON_FINITE * non_finite + TURNED * turned
    return image, mask, flags + DAMAGED_EXIF * has_damaged_exif(entry.image)


def non_finite_line(images: list[Path]) -> str:
    """Return what to print about images with NaN or infinite pixels."""
    return f"{count_files(images, 'image')} with NaN or infinite pixels, read as 0"


def damaged_exif_line(images: list[Path]) -> str:
    """Return what to print about images whose orientation is unknown, as EXIF data is damaged."""
    return f"{count_files(images, 'image')} with damaged EXIF data, read as stored, not turned"


def turned_line(masks: list[Path]) -> str:
    """Return what to print about masks that were turned though nothing tells that they must be."""
    reason = "turned like the image's EXIF orientation, but it may be upright already"
    if len(masks) > 1:
        reason = "turned like their images' EXIF orientation, but they may be upright already"
    return f"{count_files(masks, 'mask')} {reason}: set --mask-orientation stored or upright"


def count_files(paths: list[Path], noun: str) -> str:
    """Return "2 masks (a.png, b.png)", with at most three names."""
    names = ", ".join(path.name for path in paths[:3])
    if len(paths) > 3:
        names += ", …"
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"


def remarks(entries: list, flags: np.ndarray) -> list[str]:
    """Return a line about each kind of file in a data set that was read by a rule worth knowing."""
    lines = []
    for root in dict.fromkeys(entry.root for entry in entries):
        images = {}
        masks = {}
        unturned = {}
        for entry, flag in zip(entries, flags, strict=True):
            if entry.root == root and flag & NON_FINITE:
                images[entry.image] = True
            if entry.root == root and flag & DAMAGED_EXIF:
                unturned[entry.image] = True
            if entry.root == root and flag & TURNED:
                masks[entry.mask] = True

        if images:
            lines.append(f"{root}: {non_finite_line([*images])}")
        if unturned:
            lines.append(f"{root}: {damaged_exif_line([*unturned])}")
        if masks:
            lines.append(f"{root}: {turned_line([*masks])}")
    return lines


def with_mask_orientation(entries: list, orientation: str | None) -> list:
    """Return the entries with the value of --mask-orientation: stored, upright or None."""
    return [replace(entry, mask_orientation=orientation) for entry in entries]


def read_truth(entry, threshold: int) -> np.ndarray:
    """Read the mask of one entry as training sees it: 0 and 1, or class numbers; uint8 (H,W).

    threshold: from `mask_thresholds`. Raises ValueError if image and mask differ in size.
    """
    _, mask, _ = _read_pair(entry)
    return read_foreground(entry, mask, threshold)


def _digest(path: Path) -> bytes:
    """Return a hash of a file. Raises ValueError if it is no regular file."""
    refuse_special(path)
    return hashlib.sha256(path.read_bytes()).digest()


def _content_key(entries: list, masks_only: bool = False) -> str:
    """A hash of what the entries' files hold and of how they are read."""
    key = hashlib.sha256(b"rules 5")  # raise the number when what is stored changes
    files = [entry.mask for entry in entries]
    if not masks_only:
        files += [entry.image for entry in entries]
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_digest, files):
            key.update(digest)
    how = []
    for entry in entries:
        orientation = entry.mask_orientation
        how.append((entry.label, entry.classes, entry.numbers, str(entry.root), orientation))
    key.update(repr(how).encode())
    return key.hexdigest()[:24]


def _decode(entries: list, file) -> tuple[np.ndarray, np.ndarray]:
    """Writes the pixels of all entries to an open file; returns places and counts of `_cache`."""
    places, image_at, end = [], {}, 0
    flags = []  # of an entry: NON_FINITE, …
    counts = np.zeros((len(entries), 3, 256), np.int32)
    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask, flag) in zip(chunk, pool.map(_read_pair, chunk), strict=True):
                flags.append([flag])
                if entry.image not in image_at:
                    image_at[entry.image], end = end, end + file.write(image.tobytes())
                counts[len(places)] = count_values(entry, mask)
                places.append([image_at[entry.image], end, *mask.shape])
                end += file.write(mask.tobytes())
                bar.update()
    places = np.hstack([np.array(places, dtype=np.int64), flags])
    return places, counts


def _cache(entries: list, folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Decode all pixels into `folder/KEY.bin`, unless that is there already, undamaged.

    Returns the file; int64 (n,5): where the image begins, where the mask begins, height, width, the
    entry's flags (NON_FINITE, …); and `count_values` of each mask, (n,3,256).
    """
    pixels, index = (folder / f"{_content_key(entries)}{end}" for end in (".bin", ".npz"))
    listed = index.with_suffix(".crc")  # checksums, written last
    if index.is_file() and pixels.is_file():
        if is_intact([pixels, index], listed):
            with np.load(index) as stored:
                return pixels, stored["places"], stored["counts"]
        print(f"{pixels}: damaged or of an older version; decoding the images again", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = {entry.image for entry in entries}
    areas = {path: np.prod(open_image(path, decode=False).size) for path in images}
    need = 3 * sum(areas.values()) + sum(areas[entry.image] for entry in entries)
    free = shutil.disk_usage(folder).free
    print(f"decoding {len(areas)} images once into {pixels} ({need / 1e6:,.0f} MB)", flush=True)
    if need > free:
        short = f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(f"{folder}: {short}; choose another folder with --cache")
    with whole_file(pixels) as part, open(part, "wb") as file:
        places, counts = _decode(entries, file)
    with whole_file(index) as part, open(part, "wb") as file:
        np.savez_compressed(file, places=places, counts=counts)
    with whole_file(listed) as part:
        part.write_bytes(checksums([pixels, index]))
    return pixels, places, counts


def mask_counts(entries: list, folder: Path) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256), from `folder/KEY-masks.npz` if there.

    For masks that only decide how a data set is read. Raises as `read_mask` does.
    """
    if not entries:
        return np.zeros((0, 3, 256), dtype=np.int32)
    path = folder / f"{_content_key(entries, masks_only=True)}-masks.npz"
    listed = path.with_suffix(".crc")  # its checksum, written last
    if path.is_file() and is_intact([path], listed):
        with np.load(path) as stored:
            return stored["counts"]

    counts = count_masks(entries)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, counts=counts)
    with whole_file(listed) as part:
        part.write_bytes(checksums([path]))
    return counts


def count_masks(entries: list) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256); n is 1 or more."""
    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(_count_entry, entries)])


def _count_entry(entry) -> np.ndarray:
    """Return `count_values` of an entry's mask as stored: turning it would not change them."""
    refuse_colours(entry)
    mask, _ = entry_mask(entry, None)
    return count_values(entry, mask)


# --- data sets -----------------------------------------------------------------------------------


class Dataset:
    """Entries of one or several data sets; their pixels lie in one file that all workers read.

    It is not mapped: a mapped file that becomes shorter kills the process that reads it.
    """

    holds = "images"
    is_mapped = False  # samples take time to make, which data-loading processes save
    unit = "px"  # of distances

    def __init__(self, entries: list, rows: np.ndarray, path: Path, colours: str | None = None):
        self.entries, self.rows, self.path, self.colours = entries, rows, path, colours
        self.classes = entries[0].classes
        self.tokenizer = None  # see `compare_prompts_by`
        self.rules = {}  # root -> `MaskRule.rule`, of all data sets that were opened together

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """The same pixels, fewer entries."""
        entries = [self.entries[i] for i in indices]
        part = Dataset(entries, self.rows[indices], self.path, self.colours)
        part.tokenizer = self.tokenizer
        part.rules = self.rules
        return part

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H,W,3) and mask uint8 (H,W) of entry i.

        Raises OSError, one line, if the file became shorter since it was opened.
        """
        image_at, mask_at, h, w, threshold, *_ = self.rows[i]
        image = self._read(image_at, h * w * 3).reshape(h, w, 3)
        mask = self._read(mask_at, h * w).reshape(h, w)
        return image, read_foreground(self.entries[i], mask, threshold)

    def _read(self, place: int, size: int) -> np.ndarray:
        """Return bytes of the file of pixels, uint8 (size,)."""
        values = np.fromfile(self.path, np.uint8, count=size, offset=place)
        if len(values) < size:
            raise OSError(f"{self.path}: became shorter while this run read it; run again")
        return values

    def sample(self, i: int, kind: str, rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; kind and rng as for `Entry.text`."""
        entry, (image, mask) = self.entries[i], self.pixels(i)
        image = pseudocolor(image, self.colours)
        sample = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}  # (3,H,W)
        sample |= {"mask": torch.from_numpy(mask.astype(np.int64)), "size": mask.shape}  # (H,W)
        sample |= {"prompt": entry.text(kind, rng), "classes": self.classes}
        sample |= {"name": entry.name, "file": entry.image}
        return sample | {"group": entry.group, "dataset": entry.root.name}

    def overlay(self, i: int, truth: np.ndarray, masks: np.ndarray, preprocess=None) -> Image.Image:
        """Return the picture of entry i with truth and masks, bool (n,h,w) each.

        Its size is that of the masks, which need not be the image's. `preprocess` is of volumes.
        """
        h, w = masks.shape[1:]
        image = Image.fromarray(self.pixels(i)[0]).resize((w, h))
        return pictures.overlay(np.asarray(image), truth, masks)

    def compare_prompts_by(self, tokenizer) -> None:
        """Compare prompts by the token ids that a model's tokenizer, text -> (1,T), gives them."""
        self.tokenizer = tokenizer
        for cached in ("_keys", "_prompts"):
            self.__dict__.pop(cached, None)

    def prompt_key(self, text: str) -> tuple:
        """Return what a model sees of a prompt: texts with equal keys are the same prompt.

        These are the token ids of `tokenizer`. Without one, texts that differ only in case and
        blanks are the same, as they are to CLIP's and BERT's tokenizers.
        """
        if self.tokenizer is None:
            return tuple(text.lower().split())
        if text not in self._keys:
            self._keys[text] = tuple(self.tokenizer(text)[0].tolist())
        return self._keys[text]

    @functools.cached_property
    def _keys(self) -> dict[str, tuple]:
        """Text -> its token ids."""
        return {}

    @functools.cached_property
    def _prompts(self) -> dict[Path, set[tuple]]:
        """Image -> the keys of the prompts of all its entries."""
        keys = {}
        for entry in self.entries:
            for texts in entry.prompts.values():
                keys.setdefault(entry.image, set()).update(map(self.prompt_key, texts))
        return keys

    def check_negatives(self, kind: str) -> None:
        """Raise ValueError if an image has no `absent_prompt`."""
        asked = {}  # data set -> the keys of its prompts of this kind
        for entry in self.entries:
            asked.setdefault(entry.root, set()).update(map(self.prompt_key, entry.texts(kind)))

        for entry in self.entries:
            if asked[entry.root] <= self._prompts.get(entry.image, set()):
                raise self._no_absent_prompt(entry, kind)

    def _no_absent_prompt(self, entry, kind: str) -> ValueError:
        root = entry.root.name
        image = entry.image.name
        return ValueError(
            f"{root}: --negatives needs prompts that differ to the model; all {kind} prompts of "
            f"other images are also prompts of {image}"
        )

    def absent_prompt(self, i: int, kind: str, rng: np.random.Generator) -> str:
        """Return a prompt of another image of the same data set that no entry of image i has.

        To the model, see `prompt_key`. This is all that tells that its target is not in image i.
        Raises ValueError if all prompts are alike.
        """
        mine = self.entries[i]
        present = self._prompts.get(mine.image, set())
        others = []
        for j in rng.permutation(len(self)):
            other = self.entries[j]
            if other.root == mine.root and other.image != mine.image:
                prompt = other.text(kind, rng)
                if self.prompt_key(prompt) not in present:
                    return prompt
                others.append(other)

        # The draw from several texts of an entry may have missed the one that is absent.
        for other in others:
            for prompt in other.texts(kind):
                if self.prompt_key(prompt) not in present:
                    return prompt
        raise self._no_absent_prompt(mine, kind)

    def empty_data_sets(self) -> dict[Path, list]:
        """Return {data set: its entries} where no mask has any foreground."""
        by_root = {}
        for i, entry in enumerate(self.entries):
            by_root.setdefault(entry.root, []).append(i)

        empty = {}
        for root, indices in by_root.items():
            if not self.rows[indices, 5].any():
                empty[root] = [self.entries[i] for i in indices]
        return empty

    def check_foreground(self) -> None:
        """Raise ValueError, one line, if all masks of a data set are empty."""
        for root, entries in self.empty_data_sets().items():
            read = f"read {self.rules[root]}"
            example = entries[0].mask
            count = len(entries)
            raise ValueError(f"{root}: all {count} masks are empty ({read}), {example} for one")

    def describe(self) -> str:
        """What was found, in a line."""
        thresholds = sorted({*self.rows[:, 4].tolist()})
        read = " and ".join(BY_NUMBER if t < 0 else f"> {t}" for t in thresholds)
        order = (self.rows[:, 2] * self.rows[:, 3]).argsort()
        (h, w), (H, W) = self.rows[order[0], 2:4], self.rows[order[-1], 2:4]
        images, empty = len({entry.image for entry in self.entries}), (self.rows[:, 5] == 0).sum()
        sizes = f"{images} images from {w}x{h} to {W}x{H}"
        return f"{len(self)} entries, {sizes}, masks read {read}, {empty} of them empty"


@dataclass
class MaskReading:
    """What decides, besides the masks that are opened, how masks are read."""

    threshold: int | None = None  # of --mask-threshold
    known: dict[str, str] = field(default_factory=dict)  # a run's rules by data set name
    others: list = field(default_factory=list)  # entries that are not opened, of the same data sets
    other_counts: np.ndarray = field(default_factory=partial(np.zeros, (0, 3, 256), np.int32))


def open_dataset(entries: list, cache: Path = ".cache", colours: str | None = None) -> Dataset:
    """Open one list of entries; see `open_datasets`."""
    return open_datasets({"data": entries}, cache, colours)["data"]


def open_datasets(
    lists: dict[str, list],
    cache: Path = ".cache",
    colours: str | None = None,
    reading: MaskReading | None = None,
    may_be_empty: Collection[str] = (),
) -> dict[str, Dataset]:
    """Decode lists of entries, each of one or several data sets, and decide how masks are read.

    The decision is one for each data set (root), over all lists; notes about it are printed.
    colours: of `pseudocolor`, in which samples come. may_be_empty: names of lists that are not
    trained on. Raises FileNotFoundError, ValueError or OSError, one line with the file's name, for
    anything missing, truncated or of another size, for masks of several values, for a data set
    whose masks are all empty in another list, and for a full disk.
    """
    reading = reading or MaskReading()
    remove_leftovers(Path(cache), recursive=False)
    decoded = {}
    for name, entries in lists.items():
        if not entries:
            raise ValueError("the annotation file has no entries")
        layouts.check_files_exist(entries)
        decoded[name] = _cache(entries, Path(cache))

    every = [entry for entries in lists.values() for entry in entries] + reading.others
    counts = [counts for _, _, counts in decoded.values()] + [reading.other_counts]
    rules = decide_rules(every, np.concatenate(counts), reading)

    datasets = {}
    for name, entries in lists.items():
        path, places, counts = decoded[name]
        columns = _foreground_columns(entries, counts[:, 0], rules)
        rows = np.hstack([places[:, :4], columns, places[:, 4:]])
        _check_classes(entries)
        datasets[name] = Dataset(entries, rows, path, colours)
        datasets[name].rules = rules
        if name not in may_be_empty:
            datasets[name].check_foreground()
        for line in remarks(entries, rows[:, -1]):
            print(line)
    return datasets


def decide_rules(entries: list, counts: np.ndarray, reading: MaskReading) -> dict[Path, str]:
    """Return the rule of each data set (root); print notes. Raises ValueError, one line."""
    rules = {}
    indices = {}
    for i, entry in enumerate(entries):
        indices.setdefault(entry.root, []).append(i)

    for root, chosen in indices.items():
        known = reading.known.get(root.name)
        own = [entries[i] for i in chosen]
        decision = mask_rule(own, counts[chosen], reading.threshold, known)
        for _, line in decision.errors:
            raise ValueError(line)
        for _, line in decision.notes:
            print(line)
        rules[root] = decision.rule

    if reading.threshold is not None and set(rules.values()) <= {BY_NUMBER}:
        raise ValueError("--mask-threshold: these masks hold class numbers; remove it")
    return rules


def _foreground_columns(entries: list, values: np.ndarray, rules: dict[Path, str]) -> np.ndarray:
    """Return the last two columns of `Dataset.rows`, (n,2): threshold, foreground pixels."""
    columns = np.zeros((len(entries), 2), dtype=np.int64)
    for root in {entry.root for entry in entries}:
        indices = [i for i, entry in enumerate(entries) if entry.root == root]
        own = [entries[i] for i in indices]
        columns[indices, 0] = mask_thresholds(own, values[indices], rules[root])
    for i, entry in enumerate(entries):
        columns[i, 1] = foreground_pixels(entry, values[i], int(columns[i, 0]))
    return columns


def _check_classes(entries: list) -> None:
    """Raise ValueError, one line, if pooled data sets have different classes."""
    for entry in entries:
        if entry.classes != entries[0].classes:
            other = f"other classes than {entries[0].root}'s"
            raise ValueError(f"{entry.root}: {other}; pool like with like")


# --- loaders -------------------------------------------------------------------------------------


@dataclass
class Items(torch.utils.data.Dataset):
    """What a worker makes of (epoch, i): a recipe's inputs for entry i, with a seed of its own."""

    dataset: Dataset
    prompt: str
    inputs: callable  # (sample, train, rng) -> dict
    train: bool
    seed: int
    negatives: float = 0.0  # share of training items that ask for what is not there

    def __getitem__(self, where: tuple[int, int]) -> dict:
        epoch, i = where
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.dataset.sample(i, self.prompt, rng if self.train else None)
        if self.train and self.negatives and rng.random() < self.negatives:
            sample["prompt"] = self.dataset.absent_prompt(i, self.prompt, rng)
            sample["mask"] = torch.zeros_like(sample["mask"])
        return self.inputs(sample, self.train, rng)


def batches_per_epoch(n: int, size: int) -> int:
    """Batches of `size` in n items. A last one of a single item is left out, unless all are such:
    batch normalisation has nothing to normalise one vector by. n is 1 or more."""
    return max(1, n // size + (n % size > (1 if size > 1 else 0)))


def train_batches(n: int, size: int, epochs: int, seed: int, start: int):
    """Yields batches of (epoch, i), every epoch in its own seeded order, from number `start` on."""
    per_epoch = batches_per_epoch(n, size)
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * size : (k + 1) * size]]


def loader(items: Items, batches, workers: int, device: torch.device, collate=None):
    """A DataLoader over batches of (epoch, i): in training stacked, or by `collate`; in evaluation
    single items."""
    return torch.utils.data.DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate if items.train else itemgetter(0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: opening a loader must not move torch's random state
    )
