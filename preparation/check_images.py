"""Read and check data sets of images.

data.py and imaging/ decide how a file is read; this file counts what they return.
"""

import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from imaging import image_files, layouts
from imaging.layouts import Entry
from preparation.check_classes import (
    DataSet,
    Splits,
    check_classes,
    check_foreground,
    count_maps_with_class,
    describe_shares,
    describe_splits,
)
from preparation.check_findings import TURNED, Findings, width_by_height
from preparation.check_leaks import digest_of, split_images, thumbnail_details
from preparation.check_prompts import check_prompt_types, check_tokens, compare_with_prompts

MASK_THRESHOLD = (
    "binary masks: pixels above this grey level, 0 to 255, are foreground (default: chosen from "
    "the grey levels of the masks)"
)
SPLIT_ORDER = ("train", "val", "valid", "test")

# How many grey levels 99 % of a file's pixels have. Measured on colonoscopy, skin, ultrasound and
# CT: masks, JPEG masks as well, have 1 to 5, images 87 to 245.
LEVELS_OF_MASKS = 24
LEVELS_OF_IMAGES = 40
SWAPPED_SAMPLE = 20  # masks of a split that are read to see if they are images


@dataclass
class ImageFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    digest: bytes  # of the decoded pixels, the same for copies in other formats
    levels: int  # see `main_levels`
    thumbnail: np.ndarray  # see `thumbnail_details`
    has_non_finite: bool = False  # NaN or infinite pixels


@dataclass
class MaskFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    counts: np.ndarray  # (3,256), see data.count_values
    is_turned: bool = False  # like its image, although it may have been upright already

    @property
    def largest(self):
        return int(np.flatnonzero(self.counts[0]).max())


# --- single image files ---------------------------------------------------------------------------


def main_levels(grey: Image.Image) -> int:
    """Return how many grey levels 99 % of an image's pixels have, the most frequent ones first."""
    counts = np.sort(grey.histogram())[::-1]
    return int(np.searchsorted(counts.cumsum(), 0.99 * counts.sum())) + 1


def image_facts(path: Path) -> ImageFacts | Exception:
    """Return the ImageFacts of a file, or the error that says why it cannot be read."""
    try:
        pixels, has_non_finite = image_files.load_image(path)
        mode = image_files.open_image(path, decode=False).mode
        grey = Image.fromarray(pixels).convert("L")
        return ImageFacts(
            size=pixels.shape[:2],
            mode=mode,
            digest=digest_of(pixels),
            levels=main_levels(grey),
            thumbnail=thumbnail_details(grey),
            has_non_finite=has_non_finite,
        )
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{path}: does not fit into memory")


def mask_facts(entry: Entry, image: ImageFacts | None) -> MaskFacts | Exception:
    """Return the MaskFacts of an entry's mask, or the error that says why it cannot be read.

    image: the ImageFacts of the entry's image, None if it cannot be read.
    """
    try:
        upright_as = entry.image if isinstance(image, ImageFacts) else None
        mask, is_turned = data.entry_mask(entry, upright_as)
        data.refuse_colours(entry)
        counts = data.count_values(entry, mask)
        mode = image_files.open_image(entry.mask, decode=False).mode
        return MaskFacts(mask.shape, mode, counts, is_turned)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{entry.mask}: does not fit into memory")


# --- reading a data set of images -----------------------------------------------------------------


def split_order(split: str) -> tuple[int, str]:
    """Return a sort key: train, val and test come first, other splits follow by name."""
    position = SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER)
    return position, split


def read_splits(root: Path, group_regex: str | None, findings: Findings) -> Splits:
    """Return {split: its entries} of a data set; splits that cannot be used are findings."""
    paths = layouts.find_splits(root)
    splits = {}
    for split in sorted(paths, key=split_order):
        try:
            with redirect_stdout(io.StringIO()) as printed:
                splits[split] = layouts.read_entries(root, split, group_regex)
        except (ValueError, OSError) as error:
            unusable = findings["splits that cannot be used"]
            if str(error) not in unusable:  # a bad classes.json gives one error for all splits
                unusable.append(str(error))
            continue

        for line in printed.getvalue().splitlines():
            is_repeated = "repeated entries" in line
            kind = "entries listed twice" if is_repeated else "files that are no images"
            findings[kind].append(line)
        if not splits[split]:
            kind = "splits without entries"
            if split == "train":
                kind = "training split without entries"
            findings[kind].append(f"{paths[split]}: has no entries")
    return splits


def read_files(read: Callable, jobs: dict[Path, tuple], title: str, findings: Findings) -> dict:
    """Call read(*arguments) for each path of jobs, {path: arguments}, in threads.

    Return {path: facts}; a path for which `read` returns an error is a finding instead. title: of
    the progress bar.
    """
    facts_by_path = {}
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda arguments: read(*arguments), jobs.values())
        pairs = zip(jobs, results, strict=True)
        for path, facts in tqdm(pairs, title, total=len(jobs), disable=None, leave=False):
            if isinstance(facts, Exception):
                findings.add_unusable(facts)
            else:
                facts_by_path[path] = facts
    return facts_by_path


def read_images(splits: Splits, findings: Findings) -> dict[Path, ImageFacts]:
    """Return {path: ImageFacts} of the images that can be read; the others are findings."""
    jobs = {entry.image: (entry.image,) for entry in chain(*splits.values())}
    return read_files(image_facts, jobs, "images", findings)


def read_masks(splits: Splits, images: dict, findings: Findings) -> dict[Path, MaskFacts]:
    """Return {path: MaskFacts} of the masks that can be read; the others are findings."""
    jobs = {}
    for entry in chain(*splits.values()):
        jobs[entry.mask] = (entry, images.get(entry.image))
    return read_files(mask_facts, jobs, "masks", findings)


def are_names_swapped(entries: list[Entry]) -> bool:
    """Return True if most entries have their image among the masks and their mask among the images.

    The endings differ, so the files seem to be missing where they are expected.
    """
    swapped = 0
    for entry in entries:
        image = entry.mask.parent / entry.image.name
        mask = entry.image.parent / entry.mask.name
        if not entry.image.is_file() and image.is_file() and mask.is_file():
            swapped += 1
    return swapped > len(entries) / 2


def are_contents_swapped(entries: list[Entry], images: dict[Path, ImageFacts]) -> bool:
    """Return True if images have as few grey levels as masks, and their masks as many as images."""
    levels = [images[entry.image].levels for entry in entries if entry.image in images]
    if not levels or np.median(levels) > LEVELS_OF_MASKS:
        return False

    levels = []
    for entry in entries[:SWAPPED_SAMPLE]:
        facts = image_facts(entry.mask)
        if isinstance(facts, ImageFacts):
            levels.append(facts.levels)
    return bool(levels) and np.median(levels) >= LEVELS_OF_IMAGES


def read_pictures(root: Path, splits: Splits, findings: Findings) -> tuple[Splits, dict]:
    """Return the splits whose images and masks are not swapped, and {path: ImageFacts}.

    A swap is the only finding about the masks of a split: all others would follow from it.
    """
    swapped = []
    readable = {}
    for split, entries in splits.items():
        if are_names_swapped(entries):
            swapped.append(split)
        else:
            readable[split] = entries

    images = read_images(readable, findings)
    for split, entries in readable.items():
        if are_contents_swapped(entries, images):
            swapped.append(split)

    if swapped:
        line = (
            f"{root}: images/ holds the masks, and masks/ the images ({', '.join(swapped)}); "
            "exchange the names of the two folders"
        )
        findings["swapped folders"].append(line)
    correct = {split: entries for split, entries in splits.items() if split not in swapped}
    return correct, images


# --- images and masks -----------------------------------------------------------------------------


def check_sizes(splits: Splits, images: dict, masks: dict, findings: Findings) -> None:
    """Add a finding for each mask that does not have the size of its image."""
    for split, entries in splits.items():
        for entry in entries:
            image = images.get(entry.image)
            mask = masks.get(entry.mask)
            if image and mask and image.size != mask.size:
                sizes = f"{width_by_height(mask.size)}, its image {width_by_height(image.size)}"
                line = f"{entry.mask}: {sizes} ({split})"
                findings["masks and images of different sizes"].append(line)


def check_pixels(images: dict, masks: dict, findings: Findings) -> None:
    """Add findings for images with NaN or damaged EXIF data, and for masks turned on a guess."""
    for path, facts in images.items():
        if facts.has_non_finite:
            line = f"{path}: holds NaN or infinite pixels, read as 0"
            findings["images with NaN or infinite pixels"].append(line)
        if image_files.has_damaged_exif(path):
            line = f"{path}: its EXIF data is damaged, so that it is read as stored, not turned"
            findings["images with damaged EXIF data"].append(line)

    for path, facts in masks.items():
        if facts.is_turned:
            line = f"{path}: has no EXIF tag and its image's orientation does not change the size"
            findings[TURNED].append(line)


def check_masks(
    data_set: DataSet, splits: Splits, masks: dict, threshold: int | None, findings: Findings
) -> tuple[str, list]:
    """Check what masks hold; put shares and thresholds into the data set.

    Return the words of the rule by which masks are read, and the row about classes, if any. The
    rule is that of training, data.mask_rule, over all splits together. splits: those whose folders
    are not swapped. threshold: value of --mask-threshold. Raise ValueError if it has no effect.
    """
    root = data_set.root
    readable = []  # (split, entry)
    for split, entries in splits.items():
        readable += [(split, entry) for entry in entries if entry.mask in masks]
    if not readable:
        return data.BY_NUMBER, []

    entries = [entry for _, entry in readable]
    counts = np.stack([masks[entry.mask].counts for entry in entries])  # (n,3,256)
    decision = data.mask_rule(entries, counts, threshold)
    if threshold is not None and decision.rule == data.BY_NUMBER:
        raise ValueError(f"--mask-threshold: the masks of {root} hold class numbers; remove it")
    for kind, line in decision.errors + decision.notes:
        findings[kind].append(line)
    if decision.errors and decision.rule != data.BY_NUMBER:
        return "by no rule", []

    values = counts[:, 0]  # (n,256)
    limits = data.mask_thresholds(entries, values, decision.rule).tolist()
    presence = defaultdict(list)  # split -> for each of its masks, which classes it holds
    for (split, entry), row, limit in zip(readable, values, limits, strict=True):
        foreground = data.foreground_pixels(entry, row, limit)
        data_set.shares[split, entry.name] = foreground / row.sum()
        data_set.thresholds[split, entry.name] = limit
        classes = len(entry.classes)
        presence[split].append(row[1:classes] > 0 if classes > 1 else [foreground > 0])

        if entry.label is not None or classes == 1:
            largest = masks[entry.mask].largest
            contradiction = compare_with_prompts(entry, foreground, largest, limit)
            if contradiction:
                kind, line = contradiction
                findings[kind].append(f"{line} ({split})")

    names = layouts.foreground(entries[0].classes)
    check_classes(root, names, presence, findings)
    check_foreground(root, data_set.shares, findings)
    rows = []
    if len(names) > 1:
        rows.append(("classes", count_maps_with_class(names, presence, "masks")))
    return decision.rule, rows


# --- all of a data set ----------------------------------------------------------------------------


def modes(facts: Iterable) -> str:
    """Return the modes of images or masks and their counts: "RGB", or "RGB 12, L 3" if several."""
    counts = Counter(fact.mode for fact in facts).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{mode} {n}" for mode, n in counts)


def describe_files(images: dict, masks: dict, rule: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) about images and masks, {path: facts}. rule: see `check_masks`."""
    if images:
        sizes = sorted((facts.size for facts in images.values()), key=math.prod)
        ends = f"{width_by_height(sizes[0])} to {width_by_height(sizes[-1])}"
        median = width_by_height(sizes[len(sizes) // 2])
        yield "images", f"{len(images)}, {modes(images.values())}; {ends}, median {median}"

    if masks:
        counts = sum(facts.counts[0] for facts in masks.values())
        values = np.flatnonzero(counts)
        listed = ", ".join(map(str, values))
        if len(values) > 8:
            listed = f"{len(values)} values from {values[0]} to {values[-1]}"
        words = rule.replace(data.GIVEN, "> ")
        yield "masks", f"{len(masks)}, {modes(masks.values())}; {listed}; read {words}"


def describe_texts(texts: dict[str, Counter]) -> Iterator[tuple[str, str]]:
    """Yield (prompt type, text) with the number of its texts and an example."""
    for prompt_type, counter in texts.items():
        example = textwrap.shorten(next(iter(counter), ""), 70)
        noun = "texts" if len(counter) > 1 else "text"
        yield prompt_type, f'{len(counter)} {noun}: "{example}"'


def check_images(root: Path, args, tokenizers: dict, findings: Findings) -> DataSet:
    """Check a data set of images and return it. tokenizers: see `tokenizers_of`."""
    splits = read_splits(root, args.group_regex, findings)
    for split, entries in splits.items():
        splits[split] = data.with_mask_orientation(entries, args.mask_orientation)
    correct, images = read_pictures(root, splits, findings)
    masks = read_masks(correct, images, findings)
    check_sizes(correct, images, masks, findings)
    check_pixels(images, masks, findings)

    data_set = DataSet(root, splits=splits, images=split_images(splits, images))
    data_set.rows += describe_splits(splits)
    rule, rows_of_classes = check_masks(data_set, correct, masks, args.mask_threshold, findings)
    data_set.rows += describe_files(images, masks, rule)
    data_set.rows += rows_of_classes
    data_set.rows += describe_shares(splits, data_set.shares)

    data_set.texts = check_prompt_types(root, splits, data_set.shares, findings)
    data_set.rows += describe_texts(data_set.texts)
    data_set.rows += check_tokens(root, args.model, tokenizers, data_set.texts, findings)
    return data_set
