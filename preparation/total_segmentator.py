"""Read folders in which each class of a volume is a mask of its own, as TotalSegmentator has them.

    s0001/ct.nii.gz  s0001/segmentations/liver.nii.gz  s0001/segmentations/spleen.nii.gz  …

The masks are merged into one label map. Class names are the file names, in alphabetical order.
"""

import csv
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

from imaging import layouts, nifti
from imaging.files import read_text
from preparation import import_volumes, volume_pairs
from preparation.readings import (
    SPLIT_NAMES,
    Format,
    VolumeCase,
    VolumeReading,
    count,
    split_of_folder,
)

COVERED = "structures overlap; the one with the later name covers the others"


def recognise(folder: Path, args: Namespace) -> list[VolumeReading]:
    """Return the reading of a folder of cases with segmentations/, [] without such cases."""
    files = volume_pairs.volume_files(folder)
    if args.images or not import_volumes.has_mask_folders(files):
        return []

    masks = masks_of_cases(files)
    all_names = set()
    for of_case in masks.values():
        all_names |= of_case.keys()
    names = import_volumes.chosen_names(sorted(all_names), args, folder)

    incomplete = find_incomplete(masks, names)
    if incomplete and not args.skip_unpaired:
        case, name = next(iter(incomplete.items()))
        raise ValueError(
            f"{case}: has no segmentations/{name}.nii.gz, and {len(incomplete) - 1} more cases lack"
            " a structure; choose structures with --classes, or leave such cases out with "
            "--skip-unpaired"
        )

    volumes_in = {}  # folder -> its volumes
    for path in files:
        volumes_in.setdefault(path.parent, []).append(path)

    splits = read_splits(folder)
    cases = []
    modality = ""
    for case, of_case in masks.items():
        if case in incomplete:
            continue
        image = image_of(case, volumes_in.get(case, []))
        modality = args.modality or modality or ("MR" if "mr" in image.name.lower() else "CT")
        relative = case.relative_to(folder)
        split = splits.get(case.name) or split_of_folder(relative)
        write_image = partial(import_volumes.write_volume, image)
        write_labels = partial(write_merged, image, [of_case[name] for name in names])
        name = relative.as_posix() if relative.parts else folder.name
        cases.append(VolumeCase(name, write_image, write_labels, split))

    summary = [
        f"{count(len(cases), 'volume')}, one mask for each of {count(len(names), 'structure')}"
    ]
    if incomplete:
        summary.append(f"cases left out because a structure is missing: {len(incomplete)}")
    labels = import_volumes.numbered(names)
    return [VolumeReading("totalsegmentator", summary, cases, labels, modality)]


def masks_of_cases(files: list[Path]) -> dict[Path, dict[str, Path]]:
    """Return {folder of a case: {structure: its mask}}."""
    masks = {}
    for path in files:
        if path.parent.name == "segmentations" and layouts.is_volume(path):
            name = volume_pairs.stem_of(path)
            masks.setdefault(path.parent.parent, {})[name] = path
    return masks


def find_incomplete(masks: dict[Path, dict[str, Path]], names: list[str]) -> dict[Path, str]:
    """Return {folder of a case: the first structure that it lacks}."""
    incomplete = {}
    for case, of_case in masks.items():
        missing = [name for name in names if name not in of_case]
        if missing:
            incomplete[case] = missing[0]
    return incomplete


def image_of(case: Path, images: list[Path]) -> Path:
    """Return the only one of the volumes in the folder of a case.

    Raises FileNotFoundError, one line, if there are none or several.
    """
    if len(images) != 1:
        raise FileNotFoundError(
            f"{case}: {len(images)} volumes next to segmentations/; one is needed, ct.nii.gz"
        )
    return images[0]


def read_splits(folder: Path) -> dict[str, str]:
    """Return {case: split} of the columns image_id and split of meta.csv, {} without them.

    Raises ValueError, one line, for a file that is not CSV.
    """
    path = folder / "meta.csv"
    if not path.is_file():
        return {}
    lines = read_text(path).splitlines()
    delimiter = ";" if lines and ";" in lines[0] else ","
    try:
        rows = list(csv.DictReader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path}: is not valid CSV ({error}); correct or remove it") from None

    splits = {}
    for row in rows:
        split = SPLIT_NAMES.get((row.get("split") or "").strip().lower())
        if split and row.get("image_id"):
            splits[row["image_id"].strip()] = split
    return splits


def write_merged(image: Path, masks: list[Path], target: Path, written: Path) -> None:
    """Write masks as the classes 1, 2, … of a label map; a later mask covers earlier ones.

    How many voxels are covered is printed. Raises ValueError, one line, for a mask on another grid
    than the image, or that is no mask.
    """
    grid = nifti.read_grid(image)
    labels = np.zeros(grid.size, np.uint8)  # in RAS
    covered = 0
    for number, path in enumerate(masks, 1):
        voxels, mask_grid = nifti.read_volume(path)  # (1,X,Y,Z)
        nifti.check_grid(mask_grid, grid)
        mask = voxels[0] != 0
        values = voxels[0][mask]
        if len(voxels) != 1 or (values.size and values.min() < values.max()):
            channels = count(len(voxels), "channel")
            raise ValueError(
                f"{path}: holds {channels} of {voxels.min():g} to {voxels.max():g}; a mask has "
                "one, with one value besides 0"
            )
        covered += np.count_nonzero(labels[mask])
        labels[mask] = number
    if covered:
        nifti.notices.add(COVERED, image, f"{covered:,} voxels")
    nifti.write(target, labels, grid)


FORMATS = (
    Format(
        "totalsegmentator",
        "a volume and segmentations/ with one NIfTI mask for each class, as of TotalSegmentator",
        recognise,
    ),
)
