"""Check and describe what images and volumes have in common: splits, classes, foreground."""

from collections import defaultdict

import numpy as np

from preparation.check_findings import count_and_names
from preparation.check_prompts import texts_of_entry

MOST_FOREGROUND = 0.6  # share of all pixels of a split; above it, masks are probably inverted


def check_classes(root, names, presence, findings):
    """Add a finding for each class that no mask holds, or none of the training masks.

    names: of the K classes. presence: {split: for each mask, K booleans: does it hold the class?}.
    """
    by_split = {split: np.any(rows, axis=0) for split, rows in presence.items()}  # (K,) each
    in_any = np.any([*by_split.values()], axis=0)
    in_train = by_split.get("train", in_any)
    for k, name in enumerate(names):
        if not in_any[k]:
            findings["classes that no mask holds"].append(f"{root}: no mask holds {name!r}")
        elif not in_train[k]:
            splits = ", ".join(split for split, row in by_split.items() if row[k])
            line = f"{root}: no mask of train holds {name!r}, only {splits}"
            findings["classes that no mask holds"].append(line)


def check_foreground(root, shares, findings):
    """Add a finding for each split that is mostly foreground. shares: {(split, name): share}."""
    by_split = defaultdict(list)
    for (split, _), share in shares.items():
        by_split[split].append(share)

    for split, values in by_split.items():
        mean = np.mean(values)
        if mean > MOST_FOREGROUND:
            line = (
                f"{root}: {mean:.0%} of {split} is foreground; are the masks inverted, or is the "
                "background another number than 0?"
            )
            findings[f"foreground above {MOST_FOREGROUND:.0%}"].append(line)


def describe_splits(splits, noun="images"):
    """Yield (split, text) with the number of its entries and images."""
    earlier = {}  # split -> its images
    for split, entries in splits.items():
        paths = {entry.image for entry in entries}
        text = f"{len(entries)} entries, {len(paths)} {noun}"
        container = next((name for name in earlier if paths <= earlier[name]), None)
        if container and entries:
            text += f", all of them in {container}"
        yield split, text
        earlier[split] = paths


def describe_shares(splits, shares, noun="an image"):
    """Yield (heading, text) about the foreground shares {(split, name): share}."""
    if not shares:
        return
    values = np.array(list(shares.values()))
    ends = f"{values.min():.1%} to {values.max():.1%}"
    yield "foreground", f"{values.mean():.1%} of {noun} in the mean, {ends}"

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
