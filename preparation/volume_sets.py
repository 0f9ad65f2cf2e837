"""Data sets of volumes, as the Medical Segmentation Decathlon lays them out; run by `prepare.py`.

    imagesTr/NAME.nii.gz  labelsTr/NAME.nii.gz      of the training and the validation split
    imagesTs/NAME.nii.gz [labelsTs/NAME.nii.gz]     of the test split; without a label, to predict
    dataset.json    {"labels": {"0": "background", "1": "spleen", ...}, "modality": {"0": "CT"},
                     "training": [{"image": "./imagesTr/NAME.nii.gz", "label": ...}, ...],
                     "validation": [the same], "test": [the same, or of those without label
                     "./imagesTs/NAME.nii.gz"], ...}

The Decathlon has no list of validation (MONAI's users do) and no labels of the test: here every
split is written down. Volumes of a download stay as they are, bit by bit.
"""

import gzip
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from engine.ranges import SEED, Number
from imaging import atomic_files, layouts, volumes
from imaging.files import decode_text, parse_json, read_json

CASES = {"test": 0.15, "val": 0.30, "train": 1}  # where each split ends in a shuffled list
LISTS = {"train": "training", "val": "validation", "test": "test"}  # their names in dataset.json


def deal(names, ends, rng):
    """{name: split} at random, the splits in the order and of the shares of `ends`."""
    dealt = enumerate(rng.permutation(names).tolist())
    return {n: next(s for s, end in ends.items() if k / len(names) < end) for k, n in dealt}


# --- a data set of volumes -----------------------------------------------------------------------


def read_grids(part, image, label):
    """The volumes.Grid of an image of the data set in `part`, on which its label lies as well.

    Both are read to their end, so that damage is found. ValueError, one line, if a file is damaged
    or no NIfTI volume, or the two are on different grids.
    """
    try:
        grid = volumes.read_grid(part / image)
        volumes.check_whole(part / image)
        if label:
            volumes.check_grid(volumes.read_grid(part / label), grid)
            volumes.check_whole(part / label)
    except ValueError as error:  # of a split that the download does not know
        raise ValueError(re.sub(r"[^\s'\"]*/(image|label)sT[rs]/", r"\1 ", str(error))) from None
    return grid


def describe(splits, about, grids):
    """What a data set holds, line by line."""
    import nibabel

    for split in LISTS:
        labelled = sum(label is not None for _, label in splits[split])
        bare = len(splits[split]) - labelled
        folder = "imagesTs" if split == "test" else "imagesTr"
        more = f", and {bare} without labels, for predict.py {folder}" if bare else ""
        yield f"{split}: {labelled} volumes{more}"
    labels = about["labels"].items()  # {"1": "liver"}, or {"liver": [1, 2]}
    names = [f"{key} {value}" for key, value in labels if key not in ("0", "background")]
    yield f"classes: {', '.join(names)}"
    ranges = [f"{min(n)} to {max(n)}" for n in zip(*(grid.size for grid in grids))]
    yield f"voxels: {', '.join(ranges)} (to the right, front, head)"
    ranges = [f"{min(mm):.2f} to {max(mm):.2f}" for mm in zip(*(grid.spacing for grid in grids))]
    yield f"their size in mm: {', '.join(ranges)}"
    yield f"channels: {' or '.join(map(str, sorted({grid.channels for grid in grids})))}"
    axes = ["".join(nibabel.aff2axcodes(grid.affine)) for grid in grids]
    stored = Counter(axes).most_common()
    yield f"stored axes point to: {', '.join(f'{code} in {n}' for code, n in stored)}"


def write_data_set(out, about, splits, put, title):
    """Writes a data set, whole or not at all, and prints what it holds.

    about: what dataset.json says beside the lists. splits: {split: [(image, label or None), ...]},
    files within the data set. put(part, image, label) writes these two into the folder `part`.
    """
    cases, grids = [case for split in LISTS for case in splits[split]], []
    with atomic_files.whole_folder(out) as part, volumes.notices.together(part, out):
        for name in {Path(name).parent for case in cases for name in case if name}:
            (part / name).mkdir(parents=True, exist_ok=True)
        for image, label in tqdm(cases, desc=out.name, unit="volume", disable=None, leave=False):
            put(part, image, label)
            grids.append(read_grids(part, image, label))
        lists = {"num" + LISTS[split].title(): len(splits[split]) for split in LISTS}
        for split, name in LISTS.items():
            lists[name] = [
                {"image": f"./{image}", "label": f"./{label}"} if label else f"./{image}"
                for image, label in splits[split]
            ]
        (part / "dataset.json").write_text(json.dumps(about | lists, indent=1) + "\n")
        said = "\n".join([*title, *describe(splits, about, grids)])
        (part / "README.txt").write_text(said + "\n")
    print(f"{out}: {said}")
    return 0


# --- msd -----------------------------------------------------------------------------------------
#
# medicaldecathlon.com: ten tasks, each a .tar of the layout above, a list of labelled volumes and
# one of volumes whose labels are kept back for the challenge.

FILE = re.compile(r"(images|labels)T[rs]/[^/]+\.(?i:nii(\.gz)?)")
FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
LINKED = "volumes are second names of the download's files (hard links): never edit them in place"


def link(source, target):
    """A second name for a file; a copy where the disk has no such thing, or is another one."""
    try:
        os.link(source.resolve(), target)  # of the file, should the source be a symbolic link
    except OSError:
        shutil.copyfile(source, target)


class Folder:
    """The files of an unpacked task, whose folders may be links to others."""

    def __init__(self, root):
        self.root = root
        self.names = {path.name for path in root.iterdir()}
        for folder in FOLDERS:
            if (root / folder).is_dir():
                self.names |= {f"{folder}/{path.name}" for path in (root / folder).iterdir()}
        self.names = {layouts.composed(name) for name in self.names}

    def read(self, name):
        return (self.root / name).read_bytes()

    def put(self, name, target):
        link(layouts.find_file(self.root, name), target)


class Archive:
    """The files of a task in its open .tar, whose one folder is passed over."""

    def __init__(self, tar):
        self.tar = tar
        files = [item for item in tar if item.isfile()]
        found = {layouts.composed(item.name).removeprefix("./"): item for item in files}
        tops = [name[:-12] for name in found if re.fullmatch(r"([^/]+/)?dataset\.json", name)]
        top = tops[0] if len(tops) == 1 else ""
        self.items = {n.removeprefix(top): item for n, item in found.items() if n.startswith(top)}
        self.names = set(self.items)

    def read(self, name):
        return self.tar.extractfile(self.items[name]).read()

    def put(self, name, target):
        with open(target, "wb") as file:
            shutil.copyfileobj(self.tar.extractfile(self.items[name]), file)


@contextmanager
def opened(raw):
    """Yields the Folder or the Archive. FileNotFoundError, ValueError: one line."""
    if raw.is_dir():
        yield Folder(raw)
    elif not raw.exists():
        raise FileNotFoundError(f"{raw}: no such folder or .tar")
    else:
        try:
            with tarfile.open(raw, "r:") as tar:  # not a .tar.gz: each file would be searched for
                yield Archive(tar)
        except tarfile.TarError as error:
            hint = "download it again, or give the unpacked folder"
            raise ValueError(f"{raw}: not a whole .tar file ({error}); {hint}") from None


def inside(name):
    """Return "imagesTr/a.nii.gz" for "./imagesTr/a.nii.gz", in the form of `layouts.composed`.

    Raises ValueError for any other name.
    """
    plain = layouts.composed(PurePosixPath(name).as_posix()) if isinstance(name, str) else ""
    if not FILE.fullmatch(plain):
        raise ValueError(f"{name!r} is no volume in imagesTr, labelsTr or imagesTs")
    return plain


def unlabelled(case):
    """Return the image of a test case, {"image": name} or the name itself, as `inside` does.

    Raises ValueError if it has a label: then the task has splits already.
    """
    if not isinstance(case, dict):
        return inside(case)
    if case.get("label"):
        raise ValueError("the test has labels; train on the task as it is")
    return inside(case["image"])


def read_listing(source, where):
    """A task's dataset.json -> all of it, {image: label} and the images without labels.

    Images without labels that are not there are left out, which is printed.
    FileNotFoundError, ValueError: one line, also if a labelled image or its label is not there.
    """
    if "dataset.json" not in source.names:
        hint = "RAW is one task, Task09_Spleen.tar or what it unpacks to"
        raise FileNotFoundError(f"{where}: no dataset.json in it; {hint}")
    place = f"{where}, dataset.json"
    about = parse_json(decode_text(source.read("dataset.json"), place), place)
    try:
        cases = [(inside(case["image"]), inside(case["label"])) for case in about["training"]]
        pairs = dict(cases)
        bare = [unlabelled(case) for case in about.get("test") or []]
        if {*about["labels"]} != {str(number) for number in range(len(about["labels"]))}:
            raise ValueError("the labels are not 0, 1, 2, … without a gap")
        if not all(isinstance(name, str) for name in about["labels"].values()):
            raise ValueError("a label is no name")
        if len(pairs) + len(set(bare)) < len(cases) + len(bare):
            raise ValueError("an image is listed twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        need = 'expected "labels": {"0": name, …}, "training": [{"image", "label"}, …], "test"'
        why = f"has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: {why}; {need}") from None
    if about.get("validation"):
        raise ValueError(f"{place}: lists a validation split; train on it as it is")
    missing = [name for name in (*pairs, *pairs.values()) if name not in source.names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "which dataset.json lists; unpack or download it again"
        raise FileNotFoundError(f"{where}: no {missing[0]}{more}, {hint}")
    present = [name for name in bare if name in source.names]
    if len(present) < len(bare):
        missing = [name for name in bare if name not in source.names]
        count = f"{len(missing)} of {len(bare)} images without labels"
        names = ", ".join(missing[:3])
        print(f"{where}: {count} are not there and are left out, {names} among them")
    return about, pairs, present


def in_test(name):
    """The test split's name of a file: "imagesTr/a.nii.gz" -> "imagesTs/a.nii.gz"."""
    return name.replace("Tr/", "Ts/", 1)


def split_cases(pairs, dealt, bare):
    """{image: label}, {image: split} and images without labels -> the splits, and where from.

    The former is {split: [(image, label), ...]}, the latter {name: name in the download}. The test
    split moves to imagesTs and labelsTs: whoever reads the Tr folders whole, as nnU-Net does,
    shall not train on it. ValueError if names meet there.
    """
    splits, origin = {split: [] for split in LISTS}, {name: name for name in bare}
    for image in sorted(pairs):
        case = image, pairs[image]
        names = tuple(map(in_test, case)) if dealt[image] == "test" else case
        if taken := origin.keys() & names:
            raise ValueError(f"{min(taken)}: two volumes of this name; rename one")
        splits[dealt[image]].append(names)
        origin |= zip(names, case)
    splits["test"] += [(image, None) for image in sorted(bare)]
    return splits, origin


def deal_cases(pairs, seed, where):
    """{image: split} of the labelled volumes, at random. ValueError if there are less than four."""
    dealt = deal(sorted(pairs), CASES, np.random.default_rng(seed))
    if lost := [split for split in LISTS if split not in dealt.values()]:
        raise ValueError(f"{where}: {len(pairs)} labelled volumes, {lost[0]} would be empty")
    return dealt


def relabelled(about, tables):
    """dataset.json with the labels that a file of tables, {name: {class: number or numbers}}, has
    for its name; without a file as it is.

    ValueError: one line, if no table has that name, or the numbers are not those of the download.
    """
    if tables is None:
        return about
    name, have = about.get("name"), {int(number) for number in about["labels"]}
    try:
        every = read_json(tables)
        labels = every.get(name)
        listed = [layouts.label_numbers(key, value) for key, value in (labels or {}).items()]
        named = {number for numbers in listed for number in numbers}
    except (ValueError, TypeError, AttributeError) as error:
        need = '{"Liver": {"background": 0, "liver": [1, 2], "liver tumor": [2]}, …}'
        raise ValueError(f"{tables}: {error!r}; expected {need}") from None
    if labels is None:
        raise ValueError(
            f"{tables}: has no {name!r}, only {', '.join(every)}; write its labels there"
        )
    if odd := sorted(have ^ named):
        told = f"{odd[0]} is not named" if odd[0] in have else f"there is no {odd[0]}"
        raise ValueError(f"{tables}, {name}: {told}; the numbers are {sorted(have)}")
    return about | {"labels": labels}


def msd(args):
    """Divides a task of the Medical Segmentation Decathlon: 70 % train, 15 % val, 15 % test.

    RAW is one task, Task09_Spleen.tar or what it unpacks to. The labels of its test images are kept
    back, so the test split is dealt at random from the labelled volumes, like the others; the
    images without labels are listed beside, for predict.py OUT/imagesTs. No volume is changed or
    encoded anew: of a folder the files get a second name (a hard link), or a copy where that is
    impossible. With --labels a file such as universal_labels.json says, by the task's name, what
    classes are made of its numbers: those of the Universal Model, whose organs have their tumours
    in them.
    """
    atomic_files.refuse_existing(args.out)
    with opened(args.raw) as source:
        about, pairs, bare = read_listing(source, args.raw)
        about = relabelled(about, args.labels)
        splits, origin = split_cases(pairs, deal_cases(pairs, args.seed, args.raw), bare)

        def put(part, *names):
            for name in filter(None, names):
                source.put(origin[name], part / name)

        title = f"{about.get('name', args.raw.stem)}, Medical Segmentation Decathlon"
        title = [f"{title}, seed {args.seed}", *[LINKED] * args.raw.is_dir()]
        return write_data_set(args.out, about, splits, put, title)


# --- btcv ----------------------------------------------------------------------------------------
#
# synapse.org, syn3193805, "Multi-Atlas Labeling Beyond the Cranial Vault": abdominal CT,
# RawData.zip with Training/ (30 volumes, 0001 to 0010, 0021 to 0040) and Testing/ (20, no labels).

# dataset_0.json of Swin UNETR, and of UNETR: github.com/Project-MONAI/tutorials,
# 3d_segmentation/swin_unetr_btcv_segmentation_3d.ipynb prints it; research-contributions has it as
# SwinMM/Pretrain/jsons/dataset00_BTCV.json.
SWIN_UNETR = {"train": [*range(1, 11), *range(21, 35)], "val": [*range(35, 41)]}
BTCV_ABOUT = {
    "name": "BTCV",
    "description": "abdominal CT, 13 organs: Multi-Atlas Labeling Beyond the Cranial Vault",
    "reference": "synapse.org, syn3193805",
    "licence": "by registration, see there",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {str(k): name for k, name in enumerate(layouts.BTCV)},
}
BTCV_FOLDERS = {"imagesTr": "Training/img", "labelsTr": "Training/label", "imagesTs": "Testing/img"}


def find_btcv(raw):
    """{image: label} and images without labels, by the data set's names: imagesTr/img0001.nii.gz

    FileNotFoundError, one line: no such folder, or an image without its label, or the reverse.
    """
    files = {}
    for folder, place in BTCV_FOLDERS.items():
        paths = (raw / place).glob(f"{place.split('/')[1]}[0-9][0-9][0-9][0-9].nii.gz")
        files[folder] = sorted(f"{folder}/{path.name}" for path in paths)
    if not files["imagesTr"]:
        hint = "RAW is the folder RawData of RawData.zip"
        raise FileNotFoundError(f"{raw}: no Training/img/img0001.nii.gz and so on; {hint}")
    labels = [name.replace("imagesTr/img", "labelsTr/label") for name in files["imagesTr"]]
    if odd := sorted(set(labels) ^ set(files["labelsTr"])):
        number = odd[0][-11:-7]
        hint = "image or label is missing; unpack the download again"
        raise FileNotFoundError(f"{raw}/Training: case {number} is not whole, {hint}")
    return dict(zip(files["imagesTr"], labels)), files["imagesTs"]


def swin_unetr_cases(pairs, where):
    """{image: split} of Swin UNETR's 30 volumes. ValueError if it is not these that are there."""
    dealt = {f"imagesTr/img{k:04}.nii.gz": s for s in SWIN_UNETR for k in SWIN_UNETR[s]}
    if odd := sorted(dealt.keys() ^ pairs):
        said = f"{odd[0].split('/')[1]} is " + ("missing" if odd[0] in dealt else "none of these")
        hint = "unpack RawData.zip again, or choose --split case"
        raise ValueError(f"{where}/Training: Swin UNETR has 30 volumes, {said}; {hint}")
    return dealt


def btcv(args):
    """Lays out BTCV's abdominal CT, 13 organs, as the Decathlon does, with a split.

    RAW is the folder RawData. --split swin-unetr: 24 volumes to train (0001-0010, 0021-0034) and 6
    to validate (0035-0040), as for the released Swin UNETR. The Dice that its authors give is of
    these six, which chose the epoch as well: there is no test split, compare with --test OUT:val.
    --split case deals the volumes at random, 70 % train, 15 % val, 15 % test. The images of
    Testing/ have no labels. Files get a second name (a hard link), or a copy where there is none.
    With --labels universal_labels.json the names are the Universal Model's.
    """
    atomic_files.refuse_existing(args.out)
    about = relabelled(BTCV_ABOUT, args.labels)
    pairs, bare = find_btcv(args.raw)
    if args.split == "case":
        dealt, title = deal_cases(pairs, args.seed, args.raw), [f"BTCV by case, seed {args.seed}"]
    else:
        dealt, title = swin_unetr_cases(pairs, args.raw), ["BTCV, split of Swin UNETR"]
        title += ["its authors' Dice is of val, which chose the epoch as well: no test split"]
    splits, origin = split_cases(pairs, dealt, bare)

    def put(part, *names):
        for name in filter(None, names):
            folder, file = origin[name].split("/")
            link(args.raw / BTCV_FOLDERS[folder] / file, part / name)

    return write_data_set(args.out, about, splits, put, [*title, LINKED])


# --- demo-volumes --------------------------------------------------------------------------------
#
# Abdomens of a child's size. A class is more than its grey values: liver and spleen, both kidneys,
# the aorta and the vein beside it look alike, and stomach, vein and bowel have no number at all.

ORGANS = ("spleen", "right kidney", "left kidney", "liver", "aorta")  # class 1, 2, ...
TISSUES = {  # Hounsfield units: mean, and standard deviation over patients
    "air": (-1000, 0), "lung": (-830, 25), "fat": (-100, 6), "bowel": (35, 10), "muscle": (60, 5),
    "stomach": (25, 10), "liver": (108, 10), "spleen": (118, 10), "kidney": (165, 14),
    "aorta": (160, 14), "disc": (85, 8), "marrow": (190, 25), "bone": (430, 40),
}  # fmt: skip
STORED = ("RAS", "LPS", "LAS")  # where the stored axes point to, in turn
DEMO_ABOUT = {
    "name": "demo_volumes",
    "description": "synthetic abdominal CT with five organs, for trying out",
    "reference": "made by prepare.py demo-volumes",
    "licence": "CC0-1.0",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {str(k): name for k, name in enumerate(("background", *ORGANS))},
}


def smooth_noise(rng, shape, cells):
    """(X,Y,Z) float32, normal with a deviation of 0.5, with features of 1/cells of the volume."""
    noise = rng.normal(0, 0.5, [cells + 1] * 3).astype(np.float32)
    for n in shape:  # an axis is spread out and goes to the end
        apart = np.linspace(0, cells, n, dtype=np.float32)[:, None] - np.arange(cells + 1)
        weights = np.exp(-(apart**2)).astype(np.float32)  # (n, cells + 1)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)  # so that the deviation stays
        noise = np.einsum("abc,xa->bcx", noise, weights)
    return noise


def ball(grid, centre, axes):
    """Where an ellipsoid is; grid, centre and half axes in mm, to the right, front and head."""
    return sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, axes)) < 1  # (X,Y,Z) bool


def draw_torso(rng, grid, a, b, level):
    """What is around the organs, Hounsfield units (X,Y,Z), and the cavity for them, bool (X,Y,Z).

    a, b: half width and half depth of the body in mm; level: Hounsfield units of TISSUES.
    """
    x, y, z = grid
    depth = np.hypot(x / a, y / b) + (z / 150) ** 4  # 0 in the middle, 1 on the skin
    image = np.full(depth.shape, level["air"], np.float32)
    cavity = depth < 0.76
    bowel = smooth_noise(rng, depth.shape, 11) > 0.1
    ribs = (depth < 0.87) & (np.sin(z / 4 + y / 16) > 0.6) & (z > -30 + y / 2)
    for where, tissue in (
        (depth < 1, "fat"), (depth < 0.9, "muscle"), (ribs & (depth > 0.8), "bone"),
        (cavity, "fat"), (cavity & bowel, "bowel"),
        (cavity & (z > 75 - (x / 9) ** 2 / 9 - (y / 9) ** 2 / 6), "lung"),
    ):  # fmt: skip
        image[where] = level[tissue]
    back, phase = -0.62 * b, rng.uniform(0, 6)
    canal = np.hypot(x, y - back + 20)
    body = np.hypot(x / 17, (y - back) / 14)
    disc = np.cos(z / 4 + phase) > 0.8  # every 25 mm
    process = (abs(x) < 3) & (y < back - 26) & (y > back - 40) & (np.cos(z / 4 + phase) < 0)
    for where, tissue in (
        (body < 1, "bone"), (body < 0.85, "marrow"), ((body < 1) & disc, "disc"),
        ((canal < 12) | process, "bone"), (canal < 8, "muscle"),
    ):  # fmt: skip
        image[where] = level[tissue]
    return image, cavity & (body > 1)


def draw_organs(rng, grid, a, b):
    """Yields tissue, class number (0: none) and place, bool (X,Y,Z); a later one lies on top."""
    x, y, z = grid

    def organ(x0, y0, z0, *axes):  # shares of a and b, z in mm
        at = np.array([x0 * a, y0 * b, z0]) + rng.normal(0, 2.5, 3)
        return ball(grid, at, axes * np.array([a, b, 1]) * rng.uniform(0.9, 1.1))

    vessels = np.hypot(x + 9 - 3 * np.sin(z / 40), y + 0.22 * b), np.hypot(x - 13, y + 0.2 * b)
    stomach = organ(-0.4, 0.3, 40, 0.27, 0.32, 32)
    yield "stomach", 0, stomach
    yield "air", 0, stomach & (y > rng.uniform(0.38, 0.5) * b)  # rises, the patient lies
    yield "aorta", 0, vessels[1] < rng.uniform(8, 10)  # the vein
    yield "liver", 4, organ(0.4, 0.08, 30, 0.38, 0.62, 52) | organ(0.02, 0.4, 42, 0.4, 0.26, 24)
    yield "spleen", 1, organ(-0.55, -0.15, 40, 0.17, 0.4, 34)
    for number, side in (2, 1), (3, -1):
        yield "kidney", number, organ(0.38 * side, -0.38, -22, 0.155, 0.26, 38)
        yield "fat", 0, organ(0.27 * side, -0.33, -22, 0.1, 0.12, 15)  # the sinus
    yield "aorta", 5, vessels[0] < rng.uniform(8, 10)


def draw_volume(rng):
    """Hounsfield units int16 (X,Y,Z), class numbers uint8 (X,Y,Z), affine (4,4) in RAS."""
    shape = rng.integers((68, 60, 52), (77, 69, 61))
    spacing = np.round(rng.uniform((2.8, 2.8, 3.7), (3.2, 3.2, 4.3)), 3)  # mm
    first = -(shape - 1) / 2 * spacing + rng.normal(0, (3, 3, 8))  # of the first voxel's centre
    axes = [x0 + mm * np.arange(n) for x0, mm, n in zip(first, spacing, shape)]
    grid = [x.astype(np.float32) for x in np.meshgrid(*axes, indexing="ij")]
    grid = [x + 4 * smooth_noise(rng, shape, 5) for x in grid]  # everything is bent a little
    a, b = rng.uniform((84, 64), (96, 76))
    level = {tissue: rng.normal(*known) for tissue, known in TISSUES.items()}
    image, cavity = draw_torso(rng, grid, a, b, level)
    mask = np.zeros(shape, np.uint8)
    lost = rng.integers(1, 4) if rng.random() < 0.2 else None  # taken out: spleen or a kidney
    for tissue, number, where in draw_organs(rng, grid, a, b):
        where &= cavity
        if number != lost:
            image[where], mask[where] = level[tissue], number
    image += 10 * smooth_noise(rng, shape, 4) + 8 * smooth_noise(rng, shape, 16)
    image += rng.normal(0, 25, shape).astype(np.float32)
    image = ndimage.gaussian_filter(image, 0.5)  # voxels on a border hold a little of both sides
    affine = np.diag([*spacing, 1])
    affine[:3, 3] = first
    return image.clip(-1024, 3071).round().astype(np.int16), mask, affine


def demo_volumes(args):
    """Writes a small synthetic data set of abdominal CT: whole, or not at all.

    Two thirds of the volumes train, a sixth validates, a sixth tests. The same seed gives the same
    bytes.
    """
    import nibabel

    atomic_files.refuse_existing(args.out)
    sixth = max(1, round(args.volumes / 6))
    names = [f"ct_{k:03}.nii.gz" for k in range(1, args.volumes + 1)]
    ends = {"train": args.volumes - 2 * sixth, "val": args.volumes - sixth, "test": args.volumes}
    splits, start = {}, 0
    for split, end in ends.items():
        kind = "Ts" if split == "test" else "Tr"
        splits[split] = [(f"images{kind}/{n}", f"labels{kind}/{n}") for n in names[start:end]]
        start = end

    def put(part, image, label):
        number = names.index(Path(image).name)
        pixels, mask, affine = draw_volume(np.random.default_rng([args.seed, number]))
        wanted = nibabel.orientations.axcodes2ornt(STORED[number % len(STORED)])
        for name, array in (image, pixels), (label, mask):
            volume = nibabel.Nifti1Image(array, affine).as_reoriented(wanted)
            (part / name).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))

    title = f"synthetic abdominal CT, seed {args.seed}"
    return write_data_set(args.out, DEMO_ABOUT, splits, put, [title])


# --- command line --------------------------------------------------------------------------------


def options(command):
    """The commands that make data sets of volumes."""
    add = command(msd, "divide a task of the Medical Segmentation Decathlon")
    add("raw", type=Path, metavar="RAW", help="Task09_Spleen.tar, or the folder it unpacks to")
    add("--out", type=Path, required=True, help="folder to make")
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")
    labels = {"type": Path, "metavar": "FILE", "help": "of classes, say universal_labels.json"}
    add("--labels", **labels)

    add = command(btcv, "lay out BTCV's abdominal CT with a split")
    add("raw", type=Path, metavar="RAW", help="folder RawData, with Training/ and Testing/ in it")
    add("--out", type=Path, default="data/btcv", help="folder to make (%(default)s)")
    add("--split", choices=("swin-unetr", "case"), default="swin-unetr", help="(%(default)s)")
    add("--seed", type=SEED, default=0, metavar="N", help="of --split case (%(default)s)")
    add("--labels", **labels)

    add = command(demo_volumes, "write a small synthetic data set of CT volumes")
    add("--out", type=Path, default="data/demo_volumes", help="folder to make (%(default)s)")
    help = "volumes in all (%(default)s)"
    add("--volumes", type=Number(True, 3), default=24, metavar="N", help=help)
    add("--seed", type=SEED, default=0, metavar="N", help="same seed, same bytes (%(default)s)")
