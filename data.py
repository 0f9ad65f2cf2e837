"""Decode images and masks once into a cache file, and load them as samples and batches.

How mask values are read is decided once for each data set (`mask_rule`), over all of its splits
that are opened together. Binary masks: foreground is > 127 if masks reach above 1, else > 0, so
that 0/1, 0/255, 1-bit, palette, JPEG and soft-edged masks all work. Masks of several values are
refused, unless `--mask-threshold` says what foreground is. With a `label` or classes.json the
stored values are class indices; if classes.json names a single class, masks that reach 255 and hold
no 1 are read as binary all the same. imaging/image_files.py has the rules for reading files.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of class indices (0 and 1 for binary
masks; 255 is ignored), `prompt` str, `name` (the mask's stem), `file` (the image's path), `size`
(H,W), `classes` (one for binary masks, else including the background), `group` (a patient, or
None), `dataset` (the name of its folder).
"""

import functools
import hashlib
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from imaging import layouts, measurements, pictures
from imaging.atomic_files import atomic_write, checksums, is_intact, remove_leftovers
from imaging.image_files import (
    grey_levels,
    has_damaged_exif,
    load_image,
    load_mask,
    one_line_errors,
    open_image,
    pseudocolor,
    refuse_special,
)

# --- values of masks ------------------------------------------------------------------------------

GREY = slice(8, 248)  # values that JPEG noise of black and white rarely reaches

# The grey pixels of a binary mask are soft edges and JPEG noise, where values change from pixel to
# pixel. Those of a map of several values are objects, where most neighbours have the same value.
# Measured: the share of a file's grey pixels whose 3x3 neighbourhood holds one value, the largest
# over real masks. 0 % with JPEG noise (quality 50 to 95) and soft edges (resized by 0.25 to 8,
# blurred by sigma 1 to 4 pixels), 0.02 % at sigma 8, 0.44 % at sigma 16, 0.66 % blurred by boxes of
# 21 pixels. Maps of several values: 36 to 71 %.
FLAT_SHARE = 0.01
FLAT_PIXELS = 9  # at least; a share of fewer pixels means nothing

# Class indices 1 to 7 look like JPEG noise of black. Of the pixels with the rarer dark values at
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
SHOWN_VALUES = 6  # values of a mask that an error lists


@dataclass
class MaskRule:
    """How the masks of a data set are read, with errors and notes about them.

    `rule` is stored in config.json: "> 127", "> 0", "by number", "by file" (each file > 0 or > 127,
    by its own range) or "--mask-threshold 40". `errors` and `notes` are pairs of a heading for
    reports and a line. Masks with errors cannot be used.
    """

    rule: str
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def refuse_colours(entry) -> None:
    """Raise ValueError if class indices are expected and the mask file holds colours."""
    if entry.label is None and len(entry.classes) == 1:
        return
    bands = open_image(entry.mask, decode=False).getbands()
    if len(bands) < 3:
        return

    image = open_image(entry.mask)
    with one_line_errors(entry.mask):
        is_grey = _is_grey(image.convert("RGB"))
    if not is_grey:
        raise ValueError(
            f"{entry.mask}: holds colours, which are no class numbers; save the numbers 0, 1, 2, … "
            "as a grey or a palette image"
        )


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
    """Count the values of an entry's mask as `read_mask` returns it, uint8 (H,W) -> int32 (3,256).

    Row 0: pixels of each value. Row 1: the flat ones among them (`flat_pixels`), without grey ones
    if the mask holds probabilities. Row 2: the flat ones that have another colour than most, if
    colours were read as one foreground.
    """
    counts = np.zeros((3, 256), dtype=np.int32)
    counts[0] = np.bincount(mask.ravel(), minlength=256)

    flat = flat_pixels(mask)
    counts[1] = np.bincount(mask[flat & (mask != 0) & (mask != 255)], minlength=256)
    counts[1, 255] = np.count_nonzero(flat & (mask == 255))  # most pixels: faster than bincount
    counts[1, 0] = np.count_nonzero(flat) - counts[1].sum()
    if holds_probabilities(entry.mask):
        counts[1, GREY] = 0  # areas of one probability are not objects

    if entry.label is None and not (entry.has_class_indices and len(entry.classes) > 1):
        counts[2] = _count_other_colours(entry)
    return counts


def holds_probabilities(path: Path) -> bool:
    """Return True if a mask file holds floats from 0 to 1, which are thresholded at 0.5."""
    if open_image(path, decode=False).mode != "F":
        return False
    return np.asarray(open_image(path)).max() <= 1 + 1e-6


def flat_pixels(mask: np.ndarray) -> np.ndarray:
    """Return bool (H,W), True where all nine pixels of the 3x3 neighbourhood have one value.

    Pixels at the image's border are never flat.
    """
    flat = np.zeros(mask.shape, dtype=bool)
    if min(mask.shape) < 3:
        return flat

    inner = mask[:, 1:-1]  # (H,W-2)
    flat_row = (inner == mask[:, :-2]) & (inner == mask[:, 2:])  # (H,W-2)
    flat[1:-1, 1:-1] = flat_row[:-2] & flat_row[1:-1] & flat_row[2:]
    flat[1:-1, 1:-1] &= (inner[1:-1] == inner[:-2]) & (inner[1:-1] == inner[2:])
    return flat


def _count_other_colours(entry) -> np.ndarray:
    """Return int (256,): flat pixels of another colour than most foreground, by largest channel."""
    none = np.zeros(256, dtype=np.int32)
    stored = open_image(entry.mask, decode=False)
    shows_palette = stored.mode == "P" and not entry.has_class_indices  # else its indices are read
    if not shows_palette and len(stored.getbands()) < 3:
        return none

    image = open_image(entry.mask)
    if _has_alpha(image):  # `mask_channel` has refused colours that vary
        return none
    rgb = image.convert("RGB")
    if _is_grey(rgb):
        return none
    pixels = np.asarray(rgb)  # (H,W,3)
    largest = pixels.max(axis=2)  # (H,W)
    chosen = flat_pixels(largest) & (largest >= GREY.start)
    if not chosen.any():
        return none

    colours, counts = np.unique(pixels[chosen], axis=0, return_counts=True)  # (n,3), (n,)
    main = colours[counts.argmax()].astype(int)  # (3,)
    other = (np.abs(colours - main) > COLOUR_NOISE).any(axis=1)  # (n,)
    return np.bincount(colours[other].max(axis=1), counts[other], minlength=256).astype(np.int32)


# --- the rule by which masks are read -------------------------------------------------------------


def mask_rule(
    entries: list, counts: np.ndarray, threshold: int | None = None, known: str | None = None
) -> MaskRule:
    """Decide how the masks of one data set are read. Every program takes the rule from here.

    entries: of one root, all splits together. counts (n,3,256): `count_values` of their masks.
    threshold: --mask-threshold, for binary masks. known: the rule by which a run read this data
    set; it decides what the values leave open.
    """
    index_of_mask = {entry.mask: i for i, entry in enumerate(entries) if entry.label is None}
    if not index_of_mask:
        return MaskRule(BY_NUMBER)
    indices = sorted(index_of_mask.values())
    entries = [entries[i] for i in indices]
    counts = counts[indices]

    if entries[0].has_class_indices and len(entries[0].classes) > 1:
        return MaskRule(BY_NUMBER, _unknown_numbers(entries, counts[:, 0]))
    if threshold is None and known and known.startswith(GIVEN):
        threshold = int(known.removeprefix(GIVEN))
    if threshold is not None:
        return MaskRule(f"{GIVEN}{threshold}")

    rule = _rule_of_values(entries, counts)
    return _keep_known_rule(rule, known, entries, counts)


def _unknown_numbers(entries: list, values: np.ndarray) -> list[tuple[str, str]]:
    """Return an error for each mask with a class index that classes.json does not name."""
    errors = []
    n = len(entries[0].classes)
    for entry, row in zip(entries, values, strict=True):
        unknown = n + np.flatnonzero(row[n:255])
        if len(unknown):
            shown = ", ".join(map(str, unknown[:SHOWN_VALUES]))
            if len(unknown) > SHOWN_VALUES:
                shown += ", …"
            number = "number" if len(unknown) == 1 else "numbers"
            classes = entry.root / "classes.json"
            line = f"{entry.mask}: holds class {number} {shown}, but {classes} ends at {n - 1}"
            errors.append(("unknown class numbers", line))
    return errors


def _rule_of_values(entries: list, counts: np.ndarray) -> MaskRule:
    """Decide by the values alone; see `mask_rule`."""
    root = entries[0].root
    values = counts[:, 0]  # (n,256)
    present = values.any(axis=0)  # (256,)
    if entries[0].has_class_indices and present[1] and not present[2:255].any():
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
        problem = "holds several values instead of one foreground"
        line = _not_binary_line(entries, values, several, problem)
        return MaskRule("> 127", [("masks of several values", line)])

    coloured = _hold_several_colours(counts)
    if coloured.any():
        problem = "holds several colours instead of one foreground, by their largest channel"
        line = _not_binary_line(entries, values, coloured, problem)
        return MaskRule("> 127", [("masks of several colours", line)])

    zero_one = _are_zero_one(counts, _are_lossy(entries))
    if not zero_one.any():
        return MaskRule("> 127")
    example = entries[int(zero_one.argmax())].mask
    masks_hold = "masks hold" if zero_one.sum() > 1 else "mask holds"
    line = (
        f"{root}: {zero_one.sum()} {masks_hold} 0 and 1 ({example.name}), others go up to "
        f"{largest}; each file is read by its own range"
    )
    return MaskRule(BY_FILE, notes=[("masks of two ranges", line)])


def _are_lossy(entries: list) -> np.ndarray:
    """Return bool (n,), True for mask files whose compression changes values."""
    return np.array([entry.mask.suffix.lower() in LOSSY for entry in entries], dtype=bool)


def _hold_several_values(entries: list, counts: np.ndarray) -> np.ndarray:
    """Return bool (n,), True for masks that are maps of several values.

    counts (n,3,256): `count_values` of their masks.
    """
    lossy = _are_lossy(entries)
    webp = np.array([entry.mask.suffix.lower() == ".webp" for entry in entries], dtype=bool)
    values = counts[:, 0]  # (n,256)
    flat = counts[:, 1]  # (n,256)

    # Objects of grey values, in a file or, where each has only few pixels, in all files together.
    grey = values[:, GREY].sum(axis=1)  # (n,)
    flat_grey = flat[:, GREY].sum(axis=1)  # (n,)
    several = (flat_grey >= FLAT_PIXELS) & (flat_grey >= FLAT_SHARE * grey)
    total = flat_grey.sum()
    if total >= FLAT_PIXELS and total >= FLAT_SHARE * grey.sum():
        several |= flat_grey > 0
    if values[:, 1:].any(axis=0).sum() == 1:
        several[:] = False  # one foreground value, whatever it is

    # Objects of class indices below grey, 2 to 7, or 1 beside white. WebP shifts all of black.
    dark = values[:, : GREY.start]  # (n,8)
    flat_dark = flat[:, : GREY.start]  # (n,8)
    rarer = np.arange(GREY.start) != flat_dark.argmax(axis=1)[:, None]  # (n,8)
    rarer_dark = (dark * rarer).sum(axis=1)  # (n,)
    rarer_flat_dark = (flat_dark * rarer).sum(axis=1)  # (n,)
    white = values[:, GREY.stop :].sum(axis=1)  # (n,)
    numbers = (rarer_flat_dark >= FLAT_PIXELS) & (rarer_flat_dark >= DARK_SHARE * rarer_dark)
    numbers &= ~webp & (rarer_dark > grey) & ((white >= FLAT_PIXELS) | values[:, 2:].any(axis=1))

    # 1 and 255 and nothing else but 0: 255 may be void or foreground. JPEG noise has other values.
    enough = np.where(lossy, FLAT_PIXELS, 1)
    one_and_white = (values[:, 1] >= enough) & (values[:, 255] >= enough)
    one_and_white &= ~values[:, 2:255].any(axis=1)
    return several | numbers | one_and_white


def _hold_several_colours(counts: np.ndarray) -> np.ndarray:
    """Return bool (n,), True for masks with objects of several colours or a coloured background."""
    flat = counts[:, 1, GREY.start :].sum(axis=1)  # (n,)
    other = counts[:, 2].sum(axis=1)  # (n,)
    return (other >= FLAT_PIXELS) & (other >= FLAT_SHARE * flat)


def _not_binary_line(entries: list, values: np.ndarray, chosen: np.ndarray, problem: str) -> str:
    """Return the error about the chosen masks (n,): the first file, its counts, what to do."""
    first = int(chosen.argmax())
    row = values[first]
    present = np.flatnonzero(row)
    most = present[np.argsort(-row[present], kind="stable")][:SHOWN_VALUES]
    shown = ", ".join(f"{value} ({row[value]} pixels)" for value in sorted(most.tolist()))
    if len(present) > len(most):
        shown += f" and {len(present) - len(most)} more"
    similar = int(chosen.sum()) - 1
    if similar:
        shown += f" ({similar} more masks are like it)"

    entry = entries[first]
    return (
        f"{entry.mask}: {problem}: {shown}; class numbers need a classes.json in {entry.root} that "
        "names 0, 1, 2, … (255 is void); for one foreground set --mask-threshold 0..255 (values "
        "above it count)"
    )


def _are_zero_one(counts: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """Return bool (n,), True for masks that hold 0 and 1 and nothing else.

    A black JPEG can be 1 all over, also if it was saved again as PNG. In a JPEG both must form
    objects, since its noise holds a few 1.
    """
    values = counts[:, 0]  # (n,256)
    flat = counts[:, 1]  # (n,256)
    in_objects = (flat[:, 0] >= FLAT_PIXELS) & (flat[:, 1] >= 1)
    both = (values[:, 0] > 0) & (values[:, 1] > 0)
    return both & (in_objects | ~lossy) & ~values[:, 2:].any(axis=1)


def _keep_known_rule(
    fresh: MaskRule, known: str | None, entries: list, counts: np.ndarray
) -> MaskRule:
    """Return the rule of a run if the values allow it, else the fresh rule with a note.

    A split may hold too little to decide: only empty masks, or only void pixels.
    """
    if known is None or known == fresh.rule or fresh.errors:
        return fresh

    present = counts[:, 0].any(axis=0)  # (256,)
    has_no_foreground = not present[1:].any()
    zero_one = _are_zero_one(counts, _are_lossy(entries))
    is_dark = known == "> 127" and fresh.rule == "> 0" and not zero_one.any()
    is_void = known == BY_NUMBER and entries[0].has_class_indices and not present[1:255].any()
    if known == BY_FILE or has_no_foreground or is_dark or is_void:
        return replace(fresh, rule=known)

    root = entries[0].root
    line = f"{root}: masks are read {fresh.rule}; the run read {root.name} {known}"
    fresh.notes.append(("masks read differently from the run", line))
    return fresh


def mask_thresholds(entries: list, values: np.ndarray, rule: str) -> np.ndarray:
    """Return int (n,): the value that the foreground of each mask exceeds, -1 for class indices.

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
    """Return a mask as training uses it: 0 and 1, or class indices; uint8 (H,W).

    mask: as `read_mask` returns it. threshold: from `mask_thresholds`.
    """
    if entry.label is not None:
        mask = mask == entry.label
    elif threshold >= 0:
        mask = mask > threshold
    return np.asarray(mask, np.uint8)


def rules_by_name(rules: dict[Path, str]) -> dict[str, str]:
    """Return the rules by folder name of the data sets, without names that stand for two rules."""
    by_name = {}
    for root, rule in rules.items():
        by_name.setdefault(root.name, set()).add(rule)

    unique = {}
    for name, rules_of_name in by_name.items():
        if len(rules_of_name) == 1:
            unique[name] = rules_of_name.pop()
    return unique


# --- files that were read by a rule worth knowing -------------------------------------------------

NON_FINITE = 1  # flag of an entry: its image holds NaN or infinite pixels, which became 0
TURNED = 2  # its mask was turned like its image, but may have been upright already
DAMAGED_EXIF = 4  # its image's EXIF data is damaged, so that it was read as stored


def count_files(paths: list[Path], noun: str) -> str:
    """Return "2 masks (a.png, b.png)", with at most three names."""
    names = ", ".join(path.name for path in paths[:3])
    if len(paths) > 3:
        names += ", …"
    plural = "s" if len(paths) > 1 else ""
    return f"{len(paths)} {noun}{plural} ({names})"


def non_finite_line(images: list[Path]) -> str:
    """Return the message about images with NaN or infinite pixels."""
    return f"{count_files(images, 'image')} with NaN or infinite pixels, read as 0"


def damaged_exif_line(images: list[Path]) -> str:
    """Return the message about images of unknown orientation, because EXIF data is damaged."""
    return f"{count_files(images, 'image')} with damaged EXIF data, read as stored, not turned"


def turned_line(masks: list[Path]) -> str:
    """Return the message about masks that were turned, but may have been upright already."""
    reason = "turned like the image's EXIF orientation, but it may be upright already"
    if len(masks) > 1:
        reason = "turned like their images' EXIF orientation, but they may be upright already"
    return f"{count_files(masks, 'mask')} {reason}: set --mask-orientation stored or upright"


def remarks(entries: list, flags: np.ndarray) -> list[str]:
    """Return a line for each data set and flag that is set: which of its files are concerned."""
    lines = []
    for root in dict.fromkeys(entry.root for entry in entries):
        non_finite = {}  # used as ordered sets
        damaged = {}
        turned = {}
        for entry, flag in zip(entries, flags, strict=True):
            if entry.root != root:
                continue
            if flag & NON_FINITE:
                non_finite[entry.image] = True
            if flag & DAMAGED_EXIF:
                damaged[entry.image] = True
            if flag & TURNED:
                turned[entry.mask] = True

        if non_finite:
            lines.append(f"{root}: {non_finite_line([*non_finite])}")
        if damaged:
            lines.append(f"{root}: {damaged_exif_line([*damaged])}")
        if turned:
            lines.append(f"{root}: {turned_line([*turned])}")
    return lines


def with_mask_orientation(entries: list, orientation: str | None) -> list:
    """Return the entries with the value of --mask-orientation: stored, upright or None."""
    return [replace(entry, mask_orientation=orientation) for entry in entries]


# --- the cache of decoded images and masks --------------------------------------------------------


def entry_mask(entry, image: Path | None) -> tuple[np.ndarray, bool]:
    """Return `load_mask` of an entry's mask. image: its image, or None if that is unreadable."""
    numbers = entry.label is not None or entry.has_class_indices
    binary = entry.label is None and len(entry.classes) == 1
    return load_mask(entry.mask, image, numbers, binary, entry.mask_orientation)


def _read_pair(entry) -> tuple[np.ndarray, np.ndarray, int]:
    """Return image uint8 (H,W,3), mask as stored uint8 (H,W) and flags of one entry.

    Raises ValueError if their sizes differ, and as `open_image` does.
    """
    image, non_finite = load_image(entry.image)
    refuse_colours(entry)
    mask, turned = entry_mask(entry, entry.image)
    if image.shape[:2] != mask.shape:
        h, w = mask.shape
        H, W = image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")

    flags = NON_FINITE * non_finite + TURNED * turned
    flags += DAMAGED_EXIF * has_damaged_exif(entry.image)
    return image, mask, flags


def read_truth(entry, threshold: int) -> np.ndarray:
    """Return the mask of an entry as training uses it: 0 and 1, or class indices; uint8 (H,W).

    threshold: from `mask_thresholds`. Raises ValueError if image and mask differ in size.
    """
    return read_image_and_truth(entry, threshold)[1]


def read_image_and_truth(entry, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an entry's image, uint8 (H,W,3), and its mask as `read_truth` does."""
    image, mask, _ = _read_pair(entry)
    return image, read_foreground(entry, mask, threshold)


def _digest(path: Path) -> bytes:
    """Return the SHA-256 of a file. Raises ValueError if it is not a regular file."""
    refuse_special(path)
    return hashlib.sha256(path.read_bytes()).digest()


def _content_key(entries: list, masks_only: bool = False) -> str:
    """Return a hash of the content of the entries' files and of how they are read."""
    key = hashlib.sha256(b"rules 5")  # raise the number when the stored data changes
    files = [entry.mask for entry in entries]
    if not masks_only:
        files += [entry.image for entry in entries]
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_digest, files):
            key.update(digest)

    settings = []
    for entry in entries:
        orientation = entry.mask_orientation
        settings.append(
            (entry.label, entry.classes, entry.has_class_indices, str(entry.root), orientation)
        )
    key.update(repr(settings).encode())
    return key.hexdigest()[:24]


def _decode(entries: list, file) -> tuple[np.ndarray, np.ndarray]:
    """Write the pixels of all entries to an open file; return positions and counts of `_cache`.

    An image of several entries is written once.
    """
    positions = []
    counts = np.zeros((len(entries), 3, 256), np.int32)
    image_starts = {}  # image -> where its pixels begin
    end = 0

    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask, flags) in zip(chunk, pool.map(_read_pair, chunk), strict=True):
                if entry.image not in image_starts:
                    image_starts[entry.image] = end
                    end += file.write(image.tobytes())
                counts[len(positions)] = count_values(entry, mask)
                positions.append([image_starts[entry.image], end, *mask.shape, flags])
                end += file.write(mask.tobytes())
                bar.update()
    return np.array(positions, dtype=np.int64), counts


def _cache(entries: list, folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Decode all pixels into `folder/KEY.bin`, unless that file exists and is undamaged.

    Returns the file; int64 (n,5), for each entry the position of its image, the position of its
    mask, height, width and flags (NON_FINITE, …); and `count_values` of each mask, (n,3,256).
    """
    pixels = folder / f"{_content_key(entries)}.bin"
    index = pixels.with_suffix(".npz")
    listed = pixels.with_suffix(".crc")  # checksums, written last
    if index.is_file() and pixels.is_file():
        if is_intact([pixels, index], listed):
            with np.load(index) as stored:
                return pixels, stored["places"], stored["counts"]
        print(f"{pixels}: damaged or of an older version; decoding the images again", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    _announce_decoding(entries, pixels)
    with atomic_write(pixels) as part, open(part, "wb") as file:
        positions, counts = _decode(entries, file)
    with atomic_write(index) as part, open(part, "wb") as file:
        np.savez_compressed(file, places=positions, counts=counts)
    with atomic_write(listed) as part:
        part.write_bytes(checksums([pixels, index]))
    return pixels, positions, counts


def _announce_decoding(entries: list, pixels: Path) -> None:
    """Print the size of a cache file before it is written. Raises OSError if it does not fit."""
    areas = {}  # image -> pixels
    for path in {entry.image for entry in entries}:
        areas[path] = np.prod(open_image(path, decode=False).size)
    mask_bytes = sum(areas[entry.image] for entry in entries)
    need = 3 * sum(areas.values()) + mask_bytes
    free = shutil.disk_usage(pixels.parent).free
    print(f"decoding {len(areas)} images once into {pixels} ({need / 1e6:,.0f} MB)", flush=True)
    if need > free:
        raise OSError(
            f"{pixels.parent}: {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; choose "
            "another folder with --cache"
        )


def mask_counts(entries: list, folder: Path) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256), cached in `folder/KEY-masks.npz`.

    For masks that are not opened, but help to decide how their data set is read. Raises as
    `read_mask` does.
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
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, counts=counts)
    with atomic_write(listed) as part:
        part.write_bytes(checksums([path]))
    return counts


def count_masks(entries: list) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256); n is 1 or more."""
    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(_count_entry, entries)])


def _count_entry(entry) -> np.ndarray:
    """Return `count_values` of an entry's mask as stored; turning it would not change them."""
    refuse_colours(entry)
    mask, _ = entry_mask(entry, None)
    return count_values(entry, mask)


# --- data sets ------------------------------------------------------------------------------------

# Columns of `Dataset.rows`.
IMAGE_START = 0  # position of the image's pixels in the cache file, in bytes
MASK_START = 1
SIZE = slice(2, 4)  # height, width
THRESHOLD = 4  # see `mask_thresholds`
FOREGROUND = 5  # number of foreground pixels
FLAGS = 6  # NON_FINITE, …


class Dataset:
    """Images and masks of one or several data sets, read from one cache file.

    The file is not memory-mapped: if a mapped file becomes shorter, the process that reads it dies.
    """

    holds = "images"
    is_mapped = False  # samples take time to make, so data-loading processes help
    unit = "px"  # of distances

    def __init__(self, entries: list, rows: np.ndarray, path: Path, colours: str | None = None):
        self.entries = entries
        self.rows = rows  # int64 (n,7), see above
        self.path = path
        self.colours = colours  # see `pseudocolor`
        self.classes = entries[0].classes
        self.tokenizer = None  # see `compare_prompts_by`
        self.rules = {}  # root -> `MaskRule.rule`, of all data sets that were opened together
        self._token_ids = {}  # text -> its token ids

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """Return a data set of some of the entries, which shares the cache file."""
        entries = [self.entries[i] for i in indices]
        part = Dataset(entries, self.rows[indices], self.path, self.colours)
        part.tokenizer = self.tokenizer
        part.rules = self.rules
        return part

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image uint8 (H,W,3) and mask uint8 (H,W) of entry i.

        Raises OSError if the cache file became shorter since it was opened.
        """
        row = self.rows[i]
        h, w = row[SIZE]
        image = self._read(row[IMAGE_START], h * w * 3).reshape(h, w, 3)
        mask = self._read(row[MASK_START], h * w).reshape(h, w)
        return image, read_foreground(self.entries[i], mask, row[THRESHOLD])

    def _read(self, start: int, size: int) -> np.ndarray:
        """Return bytes of the cache file, uint8 (size,)."""
        values = np.fromfile(self.path, np.uint8, count=size, offset=start)
        if len(values) < size:
            raise OSError(f"{self.path}: became shorter while this run read it; run again")
        return values

    def sample(self, i: int, kind: str, rng: np.random.Generator | None = None) -> dict:
        """Return the sample of entry i (see the top of this file); kind, rng: see `Entry.text`."""
        entry = self.entries[i]
        image, mask = self.pixels(i)
        image = pseudocolor(image, self.colours)
        return {
            "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),  # (3,H,W)
            "mask": torch.from_numpy(mask.astype(np.int64)),  # (H,W)
            "size": mask.shape,
            "prompt": entry.text(kind, rng),
            "classes": self.classes,
            "name": entry.name,
            "file": entry.image,
            "group": entry.group,
            "dataset": entry.root.name,
        }

    def overlay(self, i: int, truth: np.ndarray, masks: np.ndarray, preprocess=None) -> Image.Image:
        """Return the picture of entry i with ground truth and masks, bool (K,h,w) each.

        The picture has the size of the masks, which may differ from the image's. preprocess: unused
        here, for volumes.
        """
        h, w = masks.shape[1:]
        image, _ = self.pixels(i)
        resized = Image.fromarray(image).resize((w, h))
        return pictures.overlay(np.asarray(resized), truth, masks)

    def measuring(self, i: int, preprocess: Callable, pixel_size=None) -> Callable:
        """Return the function that measures masks of entry i, for `measure_classes`.

        preprocess: unused here, for volumes. pixel_size: of --pixel-size, else that of spacing.csv.
        """
        image, _ = self.pixels(i)
        pixel_size = pixel_size or measurements.pixel_size_of(self.entries[i].image)
        grey = grey_levels(image)  # (H,W)
        return partial(measurements.measure_image, grey=grey, pixel_size=pixel_size)

    # Prompts of targets that are absent from an image (--negatives).

    def compare_prompts_by(self, tokenizer) -> None:
        """Compare prompts by the token ids of a model's tokenizer, text -> (1,T)."""
        self.tokenizer = tokenizer
        self._token_ids = {}
        self.__dict__.pop("_prompts_of_images", None)  # is computed again

    def prompt_key(self, text: str) -> tuple:
        """Return what a model reads of a prompt; texts with the same key are the same prompt.

        These are the token ids of `tokenizer`. Without one, upper case and extra spaces do not
        count, as in the tokenizers of CLIP and BERT.
        """
        if self.tokenizer is None:
            return tuple(text.lower().split())
        if text not in self._token_ids:
            self._token_ids[text] = tuple(self.tokenizer(text)[0].tolist())
        return self._token_ids[text]

    @functools.cached_property
    def _prompts_of_images(self) -> dict[Path, set[tuple]]:
        """Image -> keys of the prompts of all its entries."""
        keys = {}
        for entry in self.entries:
            for texts in entry.prompts.values():
                keys.setdefault(entry.image, set()).update(map(self.prompt_key, texts))
        return keys

    def check_negatives(self, kind: str) -> None:
        """Raise ValueError if an image has no `absent_prompt`."""
        keys_of_root = {}  # data set -> keys of its prompts of this kind
        for entry in self.entries:
            keys = keys_of_root.setdefault(entry.root, set())
            keys.update(map(self.prompt_key, entry.texts(kind)))

        for entry in self.entries:
            present = self._prompts_of_images.get(entry.image, set())
            if keys_of_root[entry.root] <= present:
                raise self._no_absent_prompt(entry, kind)

    def _no_absent_prompt(self, entry, kind: str) -> ValueError:
        """Return the error about an image whose data set has no prompt that is absent from it."""
        return ValueError(
            f"{entry.root.name}: --negatives needs prompts that differ to the model; all {kind} "
            f"prompts of other images are also prompts of {entry.image.name}"
        )

    def absent_prompt(self, i: int, kind: str, rng: np.random.Generator) -> str:
        """Return a random prompt of another image of the data set that no entry of image i has.

        Prompts are compared by `prompt_key`. Nothing else shows that the target of the prompt is
        absent from image i. Raises ValueError if there is no such prompt.
        """
        entry = self.entries[i]
        present = self._prompts_of_images.get(entry.image, set())
        tried = []
        for j in rng.permutation(len(self)):
            other = self.entries[j]
            if other.root == entry.root and other.image != entry.image:
                prompt = other.text(kind, rng)
                if self.prompt_key(prompt) not in present:
                    return prompt
                tried.append(other)

        # An entry with several texts may have the absent one among those that were not drawn.
        for other in tried:
            for prompt in other.texts(kind):
                if self.prompt_key(prompt) not in present:
                    return prompt
        raise self._no_absent_prompt(entry, kind)

    def empty_data_sets(self) -> dict[Path, list]:
        """Return {data set: its entries} of the data sets without any foreground."""
        by_root = {}
        for i, entry in enumerate(self.entries):
            by_root.setdefault(entry.root, []).append(i)

        empty = {}
        for root, indices in by_root.items():
            if not self.rows[indices, FOREGROUND].any():
                empty[root] = [self.entries[i] for i in indices]
        return empty

    def check_foreground(self) -> None:
        """Raise ValueError if all masks of a data set are empty."""
        for root, entries in self.empty_data_sets().items():
            raise ValueError(
                f"{root}: all {len(entries)} masks are empty (read {self.rules[root]}), for "
                f"example {entries[0].mask}"
            )

    def describe(self) -> str:
        """Return one line about the number of entries, the sizes of images and the masks."""
        images = {entry.image for entry in self.entries}
        sizes = self.rows[:, SIZE]  # (n,2)
        order = sizes.prod(axis=1).argsort()
        h, w = sizes[order[0]]
        H, W = sizes[order[-1]]

        thresholds = sorted({*self.rows[:, THRESHOLD].tolist()})
        how = " and ".join(BY_NUMBER if value < 0 else f"> {value}" for value in thresholds)
        empty = (self.rows[:, FOREGROUND] == 0).sum()
        return (
            f"{len(self)} entries, {len(images)} images from {w}x{h} to {W}x{H}, masks read {how}, "
            f"{empty} of them empty"
        )


# --- opening data sets ----------------------------------------------------------------------------


@dataclass
class MaskReading:
    """What decides how masks are read, apart from the masks that are opened."""

    threshold: int | None = None  # --mask-threshold
    known: dict[str, str] = field(default_factory=dict)  # rules of a run, by data set name
    unopened: list = field(
        default_factory=list
    )  # entries of the same data sets that are not opened
    unopened_counts: np.ndarray = field(default_factory=partial(np.zeros, (0, 3, 256), np.int32))


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

    There is one decision for each data set (root), over all lists; notes about it are printed.
    colours: colour map of samples, see `pseudocolor`. may_be_empty: names of lists that are not
    trained on. Raises FileNotFoundError, ValueError or OSError with the name of the file for
    missing, truncated or differently sized files, for masks of several values, for a data set whose
    masks are all empty in another list, and for a full disk.
    """
    reading = reading or MaskReading()
    remove_leftovers(Path(cache), recursive=False)
    decoded = {}
    all_entries = []
    all_counts = []
    for name, entries in lists.items():
        if not entries:
            raise ValueError("the annotation file has no entries")
        layouts.check_files_exist(entries)
        decoded[name] = _cache(entries, Path(cache))
        _, _, counts = decoded[name]
        all_entries += entries
        all_counts.append(counts)

    all_entries += reading.unopened
    all_counts.append(reading.unopened_counts)
    rules = decide_rules(all_entries, np.concatenate(all_counts), reading)

    datasets = {}
    for name, entries in lists.items():
        path, positions, counts = decoded[name]
        columns = _foreground_columns(entries, counts[:, 0], rules)
        rows = np.hstack([positions[:, :4], columns, positions[:, 4:]])  # (n,7)
        _check_classes(entries)
        dataset = Dataset(entries, rows, path, colours)
        dataset.rules = rules
        if name not in may_be_empty:
            dataset.check_foreground()
        for line in remarks(entries, rows[:, FLAGS]):
            print(line)
        datasets[name] = dataset
    return datasets


def decide_rules(entries: list, counts: np.ndarray, reading: MaskReading) -> dict[Path, str]:
    """Return the rule of each data set (root) and print notes. Raises ValueError for its errors.

    counts (n,3,256): `count_values` of the masks.
    """
    indices_of_root = {}
    for i, entry in enumerate(entries):
        indices_of_root.setdefault(entry.root, []).append(i)

    rules = {}
    for root, indices in indices_of_root.items():
        known = reading.known.get(root.name)
        entries_of_root = [entries[i] for i in indices]
        decision = mask_rule(entries_of_root, counts[indices], reading.threshold, known)
        for _, line in decision.errors:
            raise ValueError(line)
        for _, line in decision.notes:
            print(line)
        rules[root] = decision.rule

    if reading.threshold is not None and set(rules.values()) <= {BY_NUMBER}:
        raise ValueError("--mask-threshold: these masks hold class numbers; remove it")
    return rules


def decide_thresholds(
    entries: list, counts: np.ndarray, reading: MaskReading
) -> tuple[str, list[int]]:
    """Return the rule of one data set and the threshold of each of its masks.

    counts, notes and errors: see `decide_rules`.
    """
    (rule,) = decide_rules(entries, counts, reading).values()
    return rule, mask_thresholds(entries, counts[:, 0], rule).tolist()


def _foreground_columns(entries: list, values: np.ndarray, rules: dict[Path, str]) -> np.ndarray:
    """Return threshold and number of foreground pixels of each mask, (n,2)."""
    columns = np.zeros((len(entries), 2), dtype=np.int64)
    for root in {entry.root for entry in entries}:
        indices = [i for i, entry in enumerate(entries) if entry.root == root]
        entries_of_root = [entries[i] for i in indices]
        columns[indices, 0] = mask_thresholds(entries_of_root, values[indices], rules[root])
    for i, entry in enumerate(entries):
        columns[i, 1] = foreground_pixels(entry, values[i], int(columns[i, 0]))
    return columns


def _check_classes(entries: list) -> None:
    """Raise ValueError if pooled data sets have different classes."""
    first = entries[0]
    for entry in entries:
        if entry.classes != first.classes:
            raise ValueError(
                f"{entry.root}: other classes than {first.root}'s; pool data sets of the same "
                "classes only"
            )


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Items(torch.utils.data.Dataset):
    """The inputs that a recipe makes of entry i in an epoch, each with a random seed of its own."""

    dataset: Dataset
    prompt: str
    inputs: Callable  # (sample, train, rng) -> dict
    train: bool
    seed: int
    negatives: float = 0.0  # share of training items whose prompt is absent from the image

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        epoch, i = epoch_and_index
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.dataset.sample(i, self.prompt, rng if self.train else None)
        if self.train and self.negatives and rng.random() < self.negatives:
            sample["prompt"] = self.dataset.absent_prompt(i, self.prompt, rng)
            sample["mask"] = torch.zeros_like(sample["mask"])
        return self.inputs(sample, self.train, rng)


def batches_per_epoch(n: int, size: int) -> int:
    """Return the number of batches of `size` items in n items; n is 1 or more.

    A last batch of a single item is dropped unless it is the only one, because batch normalisation
    needs more than one vector.
    """
    batches = n // size
    if n % size > 1:
        batches += 1
    return max(1, batches)


def train_batches(n: int, size: int, epochs: int, seed: int, start: int):
    """Yield batches of (epoch, i), each epoch in its own random order, from batch `start` on."""
    per_epoch = batches_per_epoch(n, size)
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * size : (k + 1) * size]]


def make_loader(items: Items, batches, workers: int, device: torch.device, collate=None):
    """Return a DataLoader over batches of (epoch, i).

    In training items are stacked, or joined by `collate`; in evaluation it yields single items.
    """
    return torch.utils.data.DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate if items.train else itemgetter(0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: opening a loader must not move torch's random state
    )
