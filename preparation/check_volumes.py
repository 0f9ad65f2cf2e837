"""Read and check data sets of volumes."""

import io
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imaging import layouts, nifti, volumes
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
from preparation.check_findings import Findings
from preparation.check_leaks import digest_of, split_images


@dataclass
class VolumeFacts:
    grid: nifti.Grid
    channels: int
    digest: bytes  # of the voxels
    counts: np.ndarray  # (256,): voxels per class index; 255 are those to be ignored
    thumbnail: None = None  # only images are compared by thumbnails


def volume_facts(entry: Entry, findings: Findings) -> VolumeFacts | None:
    """Return the VolumeFacts of an entry, or None if one of its files cannot be used: a finding."""
    image = None
    try:
        image, grid = nifti.read_volume((entry.image, *entry.more_channels))
        if "CT" in (entry.modality or "").upper():
            volumes.notice_if_not_hu(entry.image, volumes.hu_facts(image))
    except (ValueError, OSError) as error:
        findings.add_unusable(error)

    try:
        if image is None:  # the label map cannot be compared with it, but it may be damaged too
            nifti.check_whole(entry.mask)
            return None
        labels = nifti.read_labels(entry.mask, grid, entry.labels, entry.background_numbers)
    except (ValueError, OSError) as error:
        findings.add_unusable(error)
        return None

    counts = np.bincount(labels.ravel(), minlength=256)
    return VolumeFacts(grid, len(image), digest_of(image), counts)


def read_cases(splits: Splits, findings: Findings) -> dict[Path, VolumeFacts]:
    """Return {image: VolumeFacts} of the cases whose files can be used; the others are findings.

    What is printed about files that can be used is a finding as well.
    """
    by_files = {}
    for entry in chain(*splits.values()):
        by_files[entry.image, entry.mask] = entry

    facts_by_image = {}
    for entry in tqdm(by_files.values(), desc="volumes", disable=None, leave=False):
        try:
            with redirect_stdout(io.StringIO()) as printed:
                facts = volume_facts(entry, findings)
        except MemoryError:
            findings.add_unusable(ValueError(f"{entry.image}: does not fit into memory"))
            continue
        if facts:
            facts_by_image[entry.image] = facts
        for line in printed.getvalue().splitlines():
            findings["remarks about volumes that can be used"].append(line)
    return facts_by_image


def check_labels(data_set: DataSet, facts: dict, findings: Findings) -> str:
    """Check what label maps hold; put the shares of foreground into the data set.

    facts: {image: VolumeFacts}. Return `count_maps_with_class`, "" without a label map.
    """
    first = next(chain(*data_set.splits.values()))
    names = layouts.foreground(first.classes)
    regions = first.regions or [(k,) for k in range(1, len(first.labels))]  # labels of each class
    presence = defaultdict(list)  # split -> for each of its label maps, which classes it holds
    void = []  # lines about label maps without a class that hold 255
    has_void_beside_class = False
    for split, entry in data_set.entries():
        if entry.image not in facts:
            continue
        counts = facts[entry.image].counts
        foreground = counts[1:255].sum()
        data_set.shares[split, entry.name] = foreground / counts.sum()
        presence[split].append([counts[list(labels)].any() for labels in regions])
        if counts[255] and foreground:
            has_void_beside_class = True
        elif counts[255]:
            line = f"{entry.mask}: holds 0 and 255 alone, and 255 does not count ({split})"
            void.append(line)

    # Where other maps hold 255 beside a class, it marks voxels that do not count; else training
    # takes it for the number of a class and stops.
    if void and has_void_beside_class:
        findings["label maps of ignored voxels alone"] += void
    elif void:
        findings["label maps of 0 and 255 alone"] += void
    if not presence:
        return ""
    check_classes(data_set.root, names, presence, findings)
    check_foreground(data_set.root, data_set.shares, findings)
    return count_maps_with_class(names, presence, "label maps")


def describe_cases(data_set: DataSet, facts: dict, classes: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) about volumes. facts: {image: VolumeFacts}; classes: a text."""
    by_image = {}
    for _, entry in data_set.entries():
        if entry.image in facts:
            by_image[entry.image] = entry
    if not by_image:
        return

    grids = [facts[image].grid for image in by_image]
    yield "volumes", volumes.VolumeSet(list(by_image.values()), grids).describe()
    yield "grids", describe_grids(grids)
    channels = sorted({fact.channels for fact in facts.values()})
    yield "channels", " or ".join(map(str, channels))
    yield "label values", describe_values(by_image, facts)
    yield "classes", classes
    yield from describe_shares(data_set.splits, data_set.shares, "a volume")


def describe_grids(grids: list[nifti.Grid]) -> str:
    """Return the number of different grids and how the files store the axes: "1; LAS 2, RAS 1"."""
    import nibabel

    different = set()
    orientations = Counter()
    for grid in grids:
        spacing = tuple(round(side, 3) for side in grid.spacing)
        different.add((grid.size, spacing))
        orientations["".join(nibabel.aff2axcodes(grid.affine))] += 1

    listed = ", ".join(f"{codes} {n}" for codes, n in orientations.most_common())
    return f"{len(different)} of size and spacing; stored {listed}"


def describe_values(by_image: dict[Path, Entry], facts: dict) -> str:
    """Return the numbers in the label maps that are classes, and 255: "0, 1, 2".

    by_image: {image: entry}. Numbers that are read as background count as 0.
    """
    values = set()
    for image, entry in by_image.items():
        counts = facts[image].counts
        for k, number in enumerate(entry.labels):
            if counts[k]:
                values.add(number)
        if counts[255]:
            values.add(255)
    return ", ".join(map(str, sorted(values)))


def check_channels(facts: dict[Path, VolumeFacts], findings: Findings) -> None:
    """Add a finding for each volume with another number of channels than most. {path: facts}."""
    channels = Counter(fact.channels for fact in facts.values())
    for path, fact in facts.items():
        usual = channels.most_common(1)[0][0]
        if fact.channels != usual:
            line = f"{path}: {fact.channels} channels, most volumes have {usual}"
            findings["volumes with other channels"].append(line)


def check_volumes(root: Path, args, findings: Findings) -> DataSet:
    """Check a data set of volumes and return it."""
    try:
        splits = layouts.read_volumes(root, args.group_regex)
    except (ValueError, OSError) as error:
        findings["splits that cannot be used"].append(str(error))
        return DataSet(root, has_volumes=True)

    facts = read_cases(splits, findings)
    images = split_images(splits, facts)
    data_set = DataSet(root, splits=splits, images=images, has_volumes=True)
    classes = check_labels(data_set, facts, findings)
    check_channels(facts, findings)
    data_set.rows += describe_splits(splits, "volumes")
    data_set.rows += describe_cases(data_set, facts, classes)
    return data_set
