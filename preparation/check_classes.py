"""What data sets of images and of volumes have in common: splits, classes, shares of foreground."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imaging.layouts import Entry
from preparation.check_findings import Findings, count_and_names, percent
from preparation.check_leaks import SplitImage
from preparation.check_prompts import texts_of_entry
from preparation.readings import count

MOST_FOREGROUND = 0.6  # share of all pixels of a split; above it, masks are probably inverted

Splits = dict[str, list[Entry]]
Shares = dict[tuple[str, str], float]  # (split, name of the entry) -> share of its foreground


@dataclass
class DataSet:
    """A data set as `check` has read it."""

    root: Path
    rows: list[tuple[str, str]] = field(default_factory=list)  # heading, text: what is printed
    splits: Splits = field(default_factory=dict)  # those that can be used
    images: list[SplitImage] = field(default_factory=list)  # those that can be read
    shares: Shares = field(default_factory=dict)
    thresholds: dict[tuple[str, str], int] = field(default_factory=dict)  # data.mask_thresholds
    texts: dict[str, Counter] = field(default_factory=dict)  # prompt type -> its texts
    has_volumes: bool = False
    has_published_split: bool = False  # its source.json says where the split comes from

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes; () if no split can be used."""
        first = next(self.entries(), None)
        return first[1].classes if first else ()

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield (split, entry) of all splits."""
        for split, entries in self.splits.items():
            for entry in entries:
                yield split, entry


def is_too_small(data_set: DataSet) -> bool:
    """Return True if train is one image or patient and there is no val, so that none can be cut."""
    train = data_set.splits.get("train", [])
    units = {entry.group or entry.image for entry in train}
    return len(units) == 1 and not data_set.splits.get("val")


def check_training_splits(data_sets: list[DataSet], findings: Findings) -> None:
    """Add findings if nothing can be trained on, or if a training split is too small to be cut."""
    splits = set()
    for data_set in data_sets:
        splits |= {*data_set.splits}
        if is_too_small(data_set):
            line = f"{data_set.root}: nothing is left to validate on"
            findings["training split of one image or patient"].append(line)

    if "train" not in splits and "splits that cannot be used" not in findings:
        for data_set in data_sets:
            line = f"{data_set.root}: holds only {', '.join(data_set.splits)}"
            findings["no training split"].append(line)


def check_classes(root: Path, names, presence: dict[str, list], findings: Findings) -> None:
    """Add a finding for each class that no mask holds, or none of the training masks.

    names: of the K classes. presence: {split: for each mask, K booleans: does it hold the class?}.
    Training masks without any foreground, which training refuses, are the only finding.
    """
    by_split = {split: np.any(rows, axis=0) for split, rows in presence.items()}  # (K,) each
    in_any = np.any([*by_split.values()], axis=0)
    in_train = by_split.get("train", in_any)
    if "train" in by_split and not in_train.any():
        line = f"{root}: all {len(presence['train'])} masks of train are empty"
        findings["training split without foreground"].append(line)
        return

    for k, name in enumerate(names):
        if not in_any[k]:
            findings["classes that no mask holds"].append(f"{root}: no mask holds {name!r}")
        elif not in_train[k]:
            splits = ", ".join(split for split, row in by_split.items() if row[k])
            line = f"{root}: no mask of train holds {name!r}, only {splits}"
            findings["classes that no mask holds"].append(line)


def check_foreground(root: Path, shares: Shares, findings: Findings) -> None:
    """Add a finding for each split that is mostly foreground."""
    for split, values in shares_by_split(shares).items():
        mean = np.mean(values)
        if mean > MOST_FOREGROUND:
            line = (
                f"{root}: {mean:.0%} of {split} is foreground; are the masks inverted, or is the "
                "background another number than 0?"
            )
            findings[f"foreground above {MOST_FOREGROUND:.0%}"].append(line)


def shares_by_split(shares: Shares) -> dict[str, list[float]]:
    """Return {split: the shares of its entries}."""
    by_split = defaultdict(list)
    for (split, _), share in shares.items():
        by_split[split].append(share)
    return by_split


def count_maps_with_class(names, presence: dict[str, list], noun: str) -> str:
    """Return "liver in 4, spleen in 3, of 4 masks"; names and presence as in `check_classes`."""
    counts = dict.fromkeys(names, 0)
    total = 0
    for rows in presence.values():
        total += len(rows)
        for row in rows:
            for name, has_class in zip(names, row, strict=True):
                counts[name] += int(has_class)
    listed = ", ".join(f"{name} in {n}" for name, n in counts.items())
    return f"{listed}, of {total} {noun}"


def describe_splits(splits: Splits, noun: str = "images") -> Iterator[tuple[str, str]]:
    """Yield (split, text) with the number of its entries, images and, if known, patients."""
    earlier = {}  # split -> its images
    for split, entries in splits.items():
        paths = {entry.image for entry in entries}
        text = f"{len(entries)} entries, {len(paths)} {noun}"
        patients = {entry.group for entry in entries} - {None}
        if patients:
            text += f", {count(len(patients), 'patient')}"
        container = next((name for name in earlier if paths <= earlier[name]), None)
        if container and entries:
            text += f", all of them in {container}"
        yield split, text
        earlier[split] = paths


def describe_shares(
    splits: Splits, shares: Shares, noun: str = "an image"
) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) about the shares of foreground."""
    if not shares:
        return
    values = np.array(list(shares.values()))
    ends = f"{percent(values.min())} to {percent(values.max())}"
    yield "foreground", f"{percent(values.mean())} of {noun} on average, {ends}"

    empty = [name for (_, name), share in shares.items() if share == 0]
    healthy = 0
    has_prompts = False
    for split, entries in splits.items():
        for entry in entries:
            texts = texts_of_entry(entry)
            has_prompts = has_prompts or bool(texts)
            healthy += shares.get((split, entry.name)) == 0 and not texts

    text = count_and_names(empty) if empty else "none"
    if healthy and has_prompts:
        text += f", {healthy} of them without prompts"
    yield "empty masks", text
