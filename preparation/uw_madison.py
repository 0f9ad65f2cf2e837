"""Class maps from Kaggle's UW-Madison GI Tract data: MR slices."""

import csv
import json
import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.ranges import SEED
from imaging import atomic_files, image_files, pictures
from preparation import volume_sets
from preparation.check import some, wide
from preparation.demo import png

# kaggle.com/competitions/uw-madison-gi-tract-image-segmentation: abdominal MR of 85 patients
# ("cases") on one day or several, 80 or 144 slices a day, with the outlines of three organs.

NUMBERS = {"stomach": 1, "small_bowel": 2, "large_bowel": 3}  # the tutorial's numbers; 0: none
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
                runs[row["id"]][NUMBERS[row["class"]]] = row["segmentation"].split()
        except (KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            hint = f"expected columns id, class ({', '.join(NUMBERS)}), segmentation"
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


def organ_map(s, shape):
    """The organs of a slice, (H,W) uint8, and how many pixels lie in several. ValueError: bad runs.

    Of organs that overlap the lower class number has the pixel (the tutorial made it background).
    A fixed order, because "the smaller organ here" could change sides from slice to slice.
    """
    layers = np.zeros((1 + len(NUMBERS), math.prod(shape)), bool)  # (4, H * W), row after row
    for number, words in s.runs.items():
        values = [int(word) if word.isdecimal() else 0 for word in words] + [0] * (len(words) % 2)
        for start, length in zip(values[::2], values[1::2], strict=False):  # counted from 1
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
    images = [np.asarray(image_files.open_image(s.path).convert("I"), np.uint16) for s in scan]
    if window == "scan":
        low, high = np.percentile(np.concatenate([x.ravel() for x in images]), (0.5, 99.5))
    overlaps = 0
    for s, x in zip(scan, images, strict=True):
        if s.split:
            if window == "slice":
                low, high = float(x.min()), float(x.max())
            grey = ((x - low) / ((high - low) or 1) * 255).clip(0, 255).astype(np.uint8)
            (out / s.split / "images" / f"{s.name}.png").write_bytes(png(grey))
            mask, overlap = organ_map(s, x.shape)
            image = pictures.class_map(mask, 1 + len(NUMBERS))
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
        shown = (f"{k} in {sum(bool(s.runs.get(n)) for s in ours):,}" for k, n in NUMBERS.items())
        cases = len({s.case for s in ours})
        yield f"{split}: {len(ours):,} slices of {cases} cases, {', '.join(shown)}"
    if args.split == "slice":
        yield "LEAK: train and val hold neighbouring slices of the same patients, so that scores"
        yield "on val say nothing about new patients; report those of --split case beside them"
    without = sum(not any(s.runs.values()) for s in slices)
    yield f"slices without organs: {without:,}, {'kept' if args.keep_empty else 'left out'}"
    yield f"left out, as their outlines are faulty: {', '.join(FAULTY)}"
    yield f"pixels in several organs: {overlaps:,}, given to the first of {', '.join(NUMBERS)}"
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
        names = ["background", *(organ.replace("_", " ") for organ in NUMBERS)]
        said = write_notes(part, names, describe_slices(slices, overlaps, args))
    print(f"{args.out}: {said}")
    return 0


def options(command):
    """Describe `prepare.py uw-madison`."""
    add = command(uw_madison, "make class maps from Kaggle's UW-Madison GI Tract data")
    add("download", type=Path, metavar="DOWNLOAD", help="unpacked folder: train.csv and train/")
    add("--out", type=Path, default="data/uw_madison", metavar="DIR", help="to make (%(default)s)")
    add("--split", choices=ENDS, default="case", help="what is dealt to the splits (%(default)s)")
    help = "whose grey values span black to white (%(default)s); slice: as the tutorial"
    add("--window", choices=("scan", "slice"), default="scan", help=help)
    add("--keep-empty", action="store_true", help="keep slices without organs as well")
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")
