"""Data sets of volumes in the layout of the Medical Segmentation Decathlon; see `prepare.py`.

    imagesTr/NAME.nii.gz  labelsTr/NAME.nii.gz      training and validation split
    imagesTs/NAME.nii.gz [labelsTs/NAME.nii.gz]     test split; without a label, only to predict
    dataset.json    {"labels": {"0": "background", "1": "spleen", ...}, "modality": {"0": "CT"},
                     "training": [{"image": "./imagesTr/NAME.nii.gz", "label": ...}, ...],
                     "validation": [the same], "test": [the same, or images without a label:
                     "./imagesTs/NAME.nii.gz"], ...}

The Decathlon itself has no validation list (MONAI's users add one) and no labels of test images;
here every split is written down. Volumes of a download stay as they are, byte for byte.
"""

import json
import os
import re
import shutil
from collections import Counter

from tqdm import tqdm

from imaging import atomic_files, layouts, nifti
from imaging.files import read_json

CASES = {"test": 0.15, "val": 0.30, "train": 1}  # where each split ends in a shuffled list
LISTS = {"train": "training", "val": "validation", "test": "test"}  # their names in dataset.json


def split_at_random(names, ends, rng):
    """Return the split of each name, drawn at random.

    ends: split -> the share of the shuffled names at which it ends, in ascending order.
    """
    splits = {}
    for k, name in enumerate(rng.permutation(names).tolist()):
        share = k / len(names)
        splits[name] = next(split for split, end in ends.items() if share < end)
    return splits


# --- writing --------------------------------------------------------------------------------------


def read_grids(part, image, label):
    """Return the nifti.Grid of an image in the folder `part`, on which its label must lie, too.

    Both files are read to their end, so that damage is noticed. Raises ValueError, one line, if a
    file is damaged or no NIfTI volume, or if the grids differ.
    """
    try:
        grid = nifti.read_grid(part / image)
        nifti.check_whole(part / image)
        if label:
            nifti.check_grid(nifti.read_grid(part / label), grid)
            nifti.check_whole(part / label)
    except ValueError as error:
        # The download has no splits: name its files without the folders of the new data set.
        message = re.sub(r"[^\s'\"]*/(image|label)sT[rs]/", r"\1 ", str(error))
        raise ValueError(message) from None
    return grid


def axis_ranges(triples, form):
    """Return "smallest to largest" along each axis of some (X,Y,Z), as in "4 to 4, 5 to 5"."""
    ranges = []
    for values in zip(*triples, strict=True):
        ranges.append(f"{min(values):{form}} to {max(values):{form}}")
    return ", ".join(ranges)


def describe_volumes(splits, about, grids):
    """Yield the lines of README.txt: splits, classes, sizes, spacings, channels, orientations."""
    import nibabel

    for split in LISTS:
        labelled = sum(label is not None for _, label in splits[split])
        unlabelled = len(splits[split]) - labelled
        line = f"{split}: {labelled} volumes"
        if unlabelled:
            folder = "imagesTs" if split == "test" else "imagesTr"
            line += f", and {unlabelled} without labels, for predict.py {folder}"
        yield line

    classes = []
    for key, value in about["labels"].items():  # {"1": "liver"}, or {"liver": [1, 2]}
        if key not in ("0", "background"):
            classes.append(f"{key} {value}")
    if classes:
        yield f"classes: {', '.join(classes)}"

    sizes = axis_ranges([grid.size for grid in grids], "d")
    yield f"voxels: {sizes} (to the right, front, head)"
    yield f"their size in mm: {axis_ranges([grid.spacing for grid in grids], '.2f')}"
    channels = sorted({grid.channels for grid in grids})
    yield f"channels: {' or '.join(map(str, channels))}"

    orientations = Counter("".join(nibabel.aff2axcodes(grid.affine)) for grid in grids)
    counts = [f"{code} in {n}" for code, n in orientations.most_common()]
    yield f"stored axes point to: {', '.join(counts)}"


def split_lists(splits):
    """Return the lists of dataset.json and their lengths, such as "numTraining"."""
    lists = {}
    for split, name in LISTS.items():
        lists["num" + name.title()] = len(splits[split])
    for split, name in LISTS.items():
        lists[name] = []
        for image, label in splits[split]:
            item = {"image": f"./{image}", "label": f"./{label}"} if label else f"./{image}"
            lists[name].append(item)
    return lists


def write_data_set(out, about, splits, put, title, finish=None):
    """Write a data set, whole or not at all, and print its description. Return 0.

    about: the content of dataset.json besides the lists. splits: split -> [(image, label or None)],
    files within the data set. put(part, image, label): writes these two into the folder `part`.
    title: first lines of the description. finish(part), if given, writes further files when all
    volumes are written, and returns the last lines of the description.
    """
    cases = []
    for split in LISTS:
        cases += splits[split]

    grids = []
    with atomic_files.atomic_folder(out) as part, nifti.notices.grouped(part, out):
        for image, label in tqdm(cases, desc=out.name, unit="volume", disable=None, leave=False):
            for name in filter(None, (image, label)):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
            put(part, image, label)
            grids.append(read_grids(part, image, label))
        content = json.dumps(about | split_lists(splits), indent=1)
        (part / "dataset.json").write_text(content + "\n")
        last_lines = finish(part) if finish else []
        description = "\n".join([*title, *describe_volumes(splits, about, grids), *last_lines])
        (part / "README.txt").write_text(description + "\n")
    print(f"{out}: {description}")
    return 0


# --- downloads ------------------------------------------------------------------------------------

DECATHLON_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
LINKED = "volumes are second names of the download's files (hard links): never edit them in place"


def link(source, target):
    """Give a file a second name; copy it if the disk has no hard links or is another one."""
    try:
        os.link(source.resolve(), target)  # of the file itself, if the source is a symbolic link
    except OSError:
        shutil.copyfile(source, target)


def relabelled(about, tables):
    """Return a dataset.json with other labels, those of a file such as universal_labels.json.

    tables: the file, {name of a task: {class: number or numbers}}, or None to change nothing.
    Raises ValueError, one line, if the file does not have the task, or if its numbers are not those
    of the download.
    """
    if tables is None:
        return about

    task = about.get("name")
    numbers = {int(number) for number in about["labels"]}
    named = set()
    try:
        all_labels = read_json(tables)
        labels = all_labels.get(task)
        for key, value in (labels or {}).items():
            named.update(layouts.label_numbers(key, value))
    except (ValueError, TypeError, AttributeError) as error:
        example = '{"Liver": {"background": 0, "liver": [1, 2], "liver tumor": [2]}, …}'
        raise ValueError(f"{tables}: {error!r}; expected {example}") from None

    if labels is None:
        known = ", ".join(all_labels)
        raise ValueError(f"{tables}: has no {task!r}, only {known}; write its labels there")
    different = sorted(numbers ^ named)
    if different:
        number = different[0]
        fault = f"{number} is not named" if number in numbers else f"there is no {number}"
        raise ValueError(f"{tables}, {task}: {fault}; the numbers are {sorted(numbers)}")
    return about | {"labels": labels}
