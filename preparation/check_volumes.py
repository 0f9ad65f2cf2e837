"""Read and check data sets of volumes."""

import io
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm

from imaging import layouts, nifti, volumes
from preparation.check_classes import (
    check_classes,
    check_foreground,
    describe_shares,
    describe_splits,
)
from preparation.check_findings import add_error, show
from preparation.check_leaks import check_patients, digest_of, unique_images


@dataclass
class VolumeFacts:
    grid: nifti.Grid
    channels: int
    digest: bytes  # of the voxels
    counts: np.ndarray  # (256,): voxels per class index; 255 are those to be ignored
    thumbnail: None = None  # only images are compared by thumbnails


def volume_facts(entry, findings):
    """Return the VolumeFacts of an entry, or None if one of its files cannot be used: a finding."""
    image = None
    try:
        image, grid = nifti.read_volume((entry.image, *entry.more_channels))
        if "CT" in (entry.modality or "").upper():
            volumes.notice_if_not_hu(entry.image, volumes.hu_facts(image))
    except (ValueError, OSError) as error:
        add_error(error, findings)

    try:
        if image is None:  # the label map cannot be compared with it, but it may be damaged too
            nifti.check_whole(entry.mask)
            return None
        labels = nifti.read_labels(entry.mask, grid, entry.labels, entry.background_numbers)
    except (ValueError, OSError) as error:
        add_error(error, findings)
        return None

    counts = np.bincount(labels.ravel(), minlength=256)
    return VolumeFacts(grid, len(image), digest_of(image), counts)


def read_cases(splits, findings):
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
            add_error(ValueError(f"{entry.image}: does not fit into memory"), findings)
            continue
        if facts:
            facts_by_image[entry.image] = facts
        for line in printed.getvalue().splitlines():
            findings["remarks about volumes that can be used"].append(line)
    return facts_by_image


def check_labels(root, splits, facts, findings):
    """Check what label maps hold.

    facts: {image: VolumeFacts}. Return foreground shares {(split, name): share} and {class: number
    of label maps that hold it}.
    """
    first = next(chain(*splits.values()))
    names = layouts.foreground(first.classes)
    regions = first.regions or [(k,) for k in range(1, len(first.labels))]  # labels of each class
    shares = {}
    presence = defaultdict(list)  # split -> for each of its label maps, which classes it holds
    for split, entries in splits.items():
        for entry in entries:
            if entry.image not in facts:
                continue
            counts = facts[entry.image].counts
            foreground = counts[1:255].sum()
            shares[split, entry.name] = foreground / counts.sum()
            presence[split].append([counts[list(labels)].any() for labels in regions])
            if counts[255] and not foreground:
                line = f"{entry.mask}: holds 0 and 255 alone, and 255 does not count ({split})"
                findings["label maps of 0 and 255 alone"].append(line)

    if presence:
        check_classes(root, names, presence, findings)
        check_foreground(root, shares, findings)

    maps_with_class = dict.fromkeys(names, 0)
    for row in chain(*presence.values()):
        for name, has_class in zip(names, row, strict=True):
            maps_with_class[name] += int(has_class)
    return shares, maps_with_class


def describe_cases(splits, facts, shares, maps_with_class):
    """Yield (heading, text) about a data set of volumes. Arguments are as of `check_labels`."""
    yield from describe_splits(splits, "volumes")
    by_image = {}
    for entry in chain(*splits.values()):
        if entry.image in facts:
            by_image[entry.image] = entry
    if not by_image:
        return

    grids = [facts[image].grid for image in by_image]
    yield "volumes", volumes.VolumeSet(list(by_image.values()), grids).describe()
    channels = sorted({fact.channels for fact in facts.values()})
    yield "channels", " or ".join(map(str, channels))
    listed = ", ".join(f"{name} in {n}" for name, n in maps_with_class.items())
    yield "classes", f"{listed}, of {len(shares)} label maps"
    yield from describe_shares(splits, shares, "a volume")


def check_channels(facts, findings):
    """Add a finding for each volume with another number of channels than most. {path: facts}."""
    channels = Counter(fact.channels for fact in facts.values())
    for path, fact in facts.items():
        usual = channels.most_common(1)[0][0]
        if fact.channels != usual:
            line = f"{path}: {fact.channels} channels, most volumes have {usual}"
            findings["volumes with other channels"].append(line)


def check_volumes(root, args, findings):
    """Check a data set of volumes, print what it holds and return `unique_images` of it."""
    try:
        splits = layouts.read_volumes(root, args.group_regex)
    except (ValueError, OSError) as error:
        findings["splits that cannot be used"].append(str(error))
        show(str(root))
        return []

    facts = read_cases(splits, findings)
    shares, maps_with_class = check_labels(root, splits, facts, findings)
    check_patients(splits, findings)
    check_channels(facts, findings)

    show(str(root))
    for heading, text in describe_cases(splits, facts, shares, maps_with_class):
        show(f"  {heading:13} {text}")
    return unique_images(splits, facts)
