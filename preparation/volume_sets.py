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

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from imaging import atomic_files, layouts, nifti
from imaging.files import read_json

CASES = {"test": 0.15, "val": 0.30, "train": 1}  # where each split ends in a shuffled list
LISTS = {"train": "training", "val": "validation", "test": "test"}  # their names in dataset.json


def deal(names, ends, rng):
    """{name: split} at random, the splits in the order and of the shares of `ends`."""
    dealt = enumerate(rng.permutation(names).tolist())
    return {n: next(s for s, end in ends.items() if k / len(names) < end) for k, n in dealt}


def read_grids(part, image, label):
    """The volumes.Grid of an image of the data set in `part`, on which its label lies as well.

    Both are read to their end, so that damage is found. ValueError, one line, if a file is damaged
    or no NIfTI volume, or the two are on different grids.
    """
    try:
        grid = nifti.read_grid(part / image)
        nifti.check_whole(part / image)
        if label:
            nifti.check_grid(nifti.read_grid(part / label), grid)
            nifti.check_whole(part / label)
    except ValueError as error:  # of a split that the download does not know
        raise ValueError(re.sub(r"[^\s'\"]*/(image|label)sT[rs]/", r"\1 ", str(error))) from None
    return grid


def describe_volumes(splits, about, grids):
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
    ranges = [f"{min(n)} to {max(n)}" for n in zip(*(grid.size for grid in grids), strict=True)]
    yield f"voxels: {', '.join(ranges)} (to the right, front, head)"
    ranges = [
        f"{min(mm):.2f} to {max(mm):.2f}"
        for mm in zip(*(grid.spacing for grid in grids), strict=True)
    ]
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
    with atomic_files.whole_folder(out) as part, nifti.notices.together(part, out):
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
        said = "\n".join([*title, *describe_volumes(splits, about, grids)])
        (part / "README.txt").write_text(said + "\n")
    print(f"{out}: {said}")
    return 0


DECATHLON_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
LINKED = "volumes are second names of the download's files (hard links): never edit them in place"


def link(source, target):
    """A second name for a file; a copy where the disk has no such thing, or is another one."""
    try:
        os.link(source.resolve(), target)  # of the file, should the source be a symbolic link
    except OSError:
        shutil.copyfile(source, target)


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
