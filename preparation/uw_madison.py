"""Class maps from Kaggle's UW-Madison GI Tract data: MR slices with three organs.

kaggle.com/competitions/uw-madison-gi-tract-image-segmentation: abdominal MR of 85 patients
("cases"), on one or several days each, with 80 or 144 slices a day. train.csv has the outlines of
stomach, small and large bowel.
"""

import csv
import json
import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.ranges import SEED
from imaging import atomic_files, image_files, pictures
from preparation import archives, volume_sets
from preparation.check_findings import count_and_names, width_by_height

# Class indices as in the LearnOpenCV tutorial on this data; 0 is the background.
CLASS_INDICES = {"stomach": 1, "small_bowel": 2, "large_bowel": 3}
FAULTY = ("case7_day0", "case81_day30")  # wrong outlines, which the winner of the contest left out
ENDS = {  # --split -> where each split ends in a shuffled list, as a share of its length
    "case": volume_sets.CASES,  # 13 val, 13 test and 59 train of 85 patients
    "slice": {"val": 0.20, "train": 1},
}


@dataclass
class Slice:
    """One slice of a scan, with the outlines of its organs."""

    name: str  # case1_day2_slice_0003
    path: Path
    runs: dict[int, list[str]]  # class index -> start, length, start, length, ...; [] if absent
    case: str  # case1
    scan: str  # case1_day2
    split: str | None = None  # None: left out


def find_slices(root: Path) -> list[Slice]:
    """Return the slices that train.csv lists, sorted by name, without those of FAULTY scans.

    Raise FileNotFoundError or ValueError, one line, for missing files or a table of another form.
    """
    runs = read_outlines(root / "train.csv")
    files = {}
    for path in root.glob("train/case*/case*_day*/scans/slice_*_*_*_*_*.png"):
        scan = path.parts[-3]
        number = "_".join(path.name.split("_")[:2])  # slice_0003
        files[f"{scan}_{number}"] = path

    names = sorted(name for name in runs if name.split("_slice")[0] not in FAULTY)
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{root / 'train'}: no file of {count_and_names(missing)}, which train.csv lists; "
            "unpack the download again"
        )

    slices = []
    for name in names:
        case, scan = files[name].parts[-4:-2]
        slices.append(Slice(name, files[name], runs[name], case, scan))
    return slices


def read_outlines(table: Path) -> dict[str, dict[int, list[str]]]:
    """Return train.csv as slice name -> class index -> run lengths, see `Slice.runs`."""
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file; DOWNLOAD is the unpacked folder from Kaggle, with train.csv "
            "and train/ in it"
        )

    runs = defaultdict(dict)
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                index = CLASS_INDICES[row["class"]]
                runs[row["id"]][index] = row["segmentation"].split()
        except (KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{table}, line {rows.line_num}: {error!r}; expected columns id, class "
                f"({', '.join(CLASS_INDICES)}), segmentation"
            ) from None
    return runs


def choose_splits(slices: list[Slice], by: str, keep_empty: bool, seed: int) -> None:
    """Set the split of the slices that are used; those without organs only with `keep_empty`.

    by: "case" or "slice", see ENDS. Raise ValueError if a split would be empty.
    """
    used = [s for s in slices if keep_empty or any(s.runs.values())]

    # By case, all patients take part, so that `keep_empty` moves none to another split.
    pools = defaultdict(list)
    if by == "case":
        pools["cases"] = sorted({s.case for s in slices})
    else:
        for s in used:
            pools[s.case].append(s.name)

    rng = np.random.default_rng(seed)
    split_of = {}  # case or slice name -> split
    for pool in pools.values():
        split_of |= volume_sets.split_at_random(pool, ENDS[by], rng)
    for s in used:
        s.split = split_of[s.case if by == "case" else s.name]

    for split in ENDS[by].keys() - {s.split for s in used}:
        raise ValueError(f"--split {by}: {len(used)} slices are too few, {split} would be empty")


def organ_map(s: Slice, shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Return the class map of a slice, uint8 (H,W), and the number of pixels in several organs.

    Such pixels get the lowest class index; the tutorial made them background. The order is fixed,
    since a rule like "the smaller organ" could change from slice to slice. Raise ValueError, one
    line, for a run that is no start and length within the image.
    """
    num_pixels = math.prod(shape)
    is_organ = np.zeros((1 + len(CLASS_INDICES), num_pixels), bool)  # (K,H*W), row by row
    for index, words in s.runs.items():
        values = [int(word) if word.isdecimal() else 0 for word in words]
        if len(values) % 2:
            values.append(0)
        for start, length in zip(values[::2], values[1::2], strict=True):  # start counts from 1
            if start == 0 or length == 0 or start + length - 1 > num_pixels:
                raise ValueError(
                    f"train.csv, {s.name}, class {index}: run {start} {length} is no start and "
                    f"length within the {width_by_height(shape)} pixels of {s.path}; download both "
                    "again"
                )
            is_organ[index, start - 1 : start - 1 + length] = True

    mask = is_organ.argmax(0).astype(np.uint8)  # (H*W,), the lowest index of an organ, or 0
    num_overlapping = int((is_organ.sum(0) > 1).sum())
    return mask.reshape(shape), num_overlapping


def write_scan(scan: list[Slice], window: str, out: Path) -> int:
    """Write images and masks of the slices of one scan; return the number of overlapping pixels.

    window: with "scan", black and white are the 0.5th and 99.5th percentile of the whole scan, so
    that neighbouring slices look alike and a few bright pixels do not darken the others. With
    "slice" they are the minimum and maximum of each slice, as in the tutorial.
    """
    images = []
    for s in scan:
        image = image_files.open_image(s.path).convert("I")
        images.append(np.asarray(image, np.uint16))  # (H,W)
    if window == "scan":
        grey_levels = np.concatenate([image.ravel() for image in images])
        low, high = np.percentile(grey_levels, (0.5, 99.5))

    overlaps = 0
    for s, image in zip(scan, images, strict=True):
        if s.split is None:
            continue
        if window == "slice":
            low = float(image.min())
            high = float(image.max())
        grey = (image - low) / ((high - low) or 1) * 255
        grey = grey.clip(0, 255).astype(np.uint8)  # (H,W)
        (out / s.split / "images" / f"{s.name}.png").write_bytes(pictures.png(grey))

        mask, num_overlapping = organ_map(s, image.shape)
        picture = pictures.class_map(mask, 1 + len(CLASS_INDICES))
        picture.save(out / s.split / "masks" / f"{s.name}.png")
        overlaps += num_overlapping
    return overlaps


def make_splits(part: Path, splits) -> None:
    """Make the folders SPLIT/images and SPLIT/masks in `part`."""
    for split in splits:
        for kind in ("images", "masks"):
            (part / split / kind).mkdir(parents=True)


def write_notes(part: Path, names, lines) -> str:
    """Write classes.json from the names of the classes and README.txt from lines; return these."""
    (part / "classes.json").write_text(json.dumps(dict(enumerate(names)), indent=1))
    description = "\n".join(lines)
    (part / "README.txt").write_text(description + "\n")
    return description


def describe_slices(slices: list[Slice], overlaps: int, args):
    """Yield the lines of README.txt: what was made and how."""
    yield f"UW-Madison GI Tract, split by {args.split}, seed {args.seed}, window of a {args.window}"
    for split in reversed(ENDS[args.split]):
        yield describe_split(split, [s for s in slices if s.split == split])
    if args.split == "slice":
        yield "LEAK: train and val hold neighbouring slices of the same patients, so that scores"
        yield "on val say nothing about new patients; report those of --split case as well"

    num_empty = sum(not any(s.runs.values()) for s in slices)
    yield f"slices without organs: {num_empty:,}, {'kept' if args.keep_empty else 'left out'}"
    yield f"left out, as their outlines are faulty: {', '.join(FAULTY)}"
    organs = ", ".join(CLASS_INDICES)
    yield f"pixels in several organs: {overlaps:,}, given to the first of {organs}"

    sizes = Counter()
    for s in slices:
        if s.split:
            width, height = s.path.stem.split("_")[-2:]  # slice_0001_266_266_1.50_1.50
            sizes[f"{width} x {height}"] += 1
    counts = [f"{size} in {count:,}" for size, count in sizes.items()]
    yield f"pixels in mm: {', '.join(counts)}"
    yield "masks are palette images: read their indices, not their colours"
    yield "scores by patient: --group-regex 'case[0-9]+'"


def describe_split(split: str, slices: list[Slice]) -> str:
    """Return one line with the number of slices, patients and slices per organ of a split."""
    counts = []
    for organ, index in CLASS_INDICES.items():
        count = sum(bool(s.runs.get(index)) for s in slices)
        counts.append(f"{organ} in {count:,}")
    num_cases = len({s.case for s in slices})
    return f"{split}: {len(slices):,} slices of {num_cases} cases, {', '.join(counts)}"


@archives.takes_archives
def uw_madison(args) -> int:
    """Make class maps of stomach, small and large bowel from Kaggle's UW-Madison GI Tract data.

    --split case puts all slices of a patient into one split: 70 % train, 15 % val, 15 % test.
    --split slice follows the tutorial: 80 % of each patient's slices train, 20 % val. It
    leaks: the model is trained on the neighbours of every val slice, so that scores on val say
    nothing about new patients.

    Slices without organs are left out, as in the tutorial, so that false positives in them are
    neither trained on nor counted; --keep-empty keeps them.
    """
    slices = find_slices(args.download)
    choose_splits(slices, args.split, args.keep_empty, args.seed)

    scans = defaultdict(list)
    for s in slices:
        if s.split or args.window == "scan":  # the window of a scan depends on all of its slices
            scans[s.scan].append(s)

    with atomic_files.atomic_folder(args.out) as part:
        make_splits(part, ENDS[args.split])
        bar = tqdm(total=len(scans), desc="uw-madison", unit="scan", disable=None, leave=False)
        overlaps = 0
        with ThreadPoolExecutor(8) as pool, bar:  # each thread holds about 100 MB
            for count in pool.map(write_scan, scans.values(), repeat(args.window), repeat(part)):
                overlaps += count
                bar.update()
        names = ["background", *(organ.replace("_", " ") for organ in CLASS_INDICES)]
        description = write_notes(part, names, describe_slices(slices, overlaps, args))
    print(f"{args.out}: {description}")
    return 0


def options(command) -> None:
    """Add the options of `prepare.py uw-madison`."""
    add = command(uw_madison, "make class maps from Kaggle's UW-Madison GI Tract data")
    archives.add_download(
        add, "Kaggle's archive, or its unpacked folder, with train.csv and train/"
    )
    add(
        "--out",
        type=Path,
        default="data/uw_madison",
        metavar="DIR",
        help="folder of the new data set (default: %(default)s)",
    )
    add(
        "--split",
        choices=ENDS,
        default="case",
        help="put whole patients (case) or single slices into splits (default: %(default)s)",
    )
    add(
        "--window",
        choices=("scan", "slice"),
        default="scan",
        help="scale grey levels per scan, or per slice as the tutorial does (default: %(default)s)",
    )
    add("--keep-empty", action="store_true", help="keep slices without organs (default: leave out)")
    add(
        "--seed",
        type=SEED,
        default=0,
        metavar="N",
        help="random seed of the split (default: %(default)s)",
    )
