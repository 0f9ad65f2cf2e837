"""Pictures of a data set for the report of `prepare.py check`: outlines, sizes of the targets."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from imaging import layouts, nifti, pictures, volumes
from preparation.check_classes import DataSet, shares_by_split
from preparation.check_findings import percent

EXTREMES = 3  # entries with the largest and with the smallest targets
RANDOM = 6  # further entries
BINS = 25


def choose_cases(data_set: DataSet) -> dict[tuple[str, str], str]:
    """Return {(split, name): why} of the entries to draw, the likeliest mistakes first.

    These are the largest targets, the smallest ones that are not empty, and a random choice of all
    others, which is the same in every run.
    """
    shares = data_set.shares
    by_size = sorted(shares, key=shares.get, reverse=True)
    with_target = [key for key in by_size if shares[key] > 0]

    cases = {}
    for key in with_target[:EXTREMES]:
        cases[key] = "largest"
    for key in with_target[::-1][:EXTREMES]:
        cases.setdefault(key, "smallest")

    others = [key for key in shares if key not in cases]
    order = np.random.default_rng(0).permutation(len(others))
    for i in order[:RANDOM].tolist():
        cases[others[i]] = "random"
    return cases


def class_masks(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """Return class indices (…) as bool (K,…) of the K classes without the background."""
    return np.stack([indices == k for k in range(1, num_classes + 1)])


def draw_image(entry: layouts.Entry, threshold: int) -> Image.Image:
    """Return an image with the outlines of its mask. Raises ValueError or OSError."""
    image, mask = data.read_image_and_truth(entry, threshold)
    truth = class_masks(mask, len(layouts.foreground(entry.classes)))
    return pictures.overlay(image, truth, np.zeros_like(truth))


def draw_volume(entry: layouts.Entry) -> Image.Image:
    """Return three planes of a volume with the outlines of its labels."""
    image, grid = nifti.read_volume((entry.image, *entry.more_channels))
    labels = nifti.read_labels(entry.mask, grid, entry.labels, entry.background_numbers)
    regions = entry.regions or [(k,) for k in range(1, len(entry.labels))]
    truth = np.stack([np.isin(labels, region) for region in regions])  # (K,X,Y,Z)
    grey = volumes.grey(image, lambda x: x)
    return pictures.volume_thumbnail(grey, truth, np.zeros_like(truth), grid.spacing)


def draw_cases(data_set: DataSet) -> Iterator[Image.Image]:
    """Yield a picture with a caption for each of `choose_cases`; those that fail are left out."""
    entries = {(split, entry.name): entry for split, entry in data_set.entries()}
    cases = choose_cases(data_set)
    for key, reason in tqdm(cases.items(), desc="overlays", disable=None, leave=False):
        split, name = key
        try:
            if data_set.has_volumes:
                picture = draw_volume(entries[key])
            else:
                picture = draw_image(entries[key], data_set.thresholds[key])
        except (ValueError, OSError):  # a finding says what is wrong with the files
            continue
        caption = f"{reason}: {percent(data_set.shares[key])} {name} ({split})"
        yield pictures.captioned(picture, caption, 640 if data_set.has_volumes else 320)


def contact_sheet(data_set: DataSet) -> Image.Image | None:
    """Return one page of `draw_cases`, with a legend for several classes; None without a case."""
    cards = list(draw_cases(data_set))
    if not cards:
        return None
    columns = 2 if data_set.has_volumes else 4
    return pictures.sheet_with_legend(cards, columns, layouts.foreground(data_set.classes()))


def histogram(data_set: DataSet) -> bytes | None:
    """Return a histogram of the targets' shares of their images, as PNG; None without a share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_split = shares_by_split(data_set.shares)
    if not by_split:
        return None
    values = [100 * np.array(shares) for shares in by_split.values()]  # in %
    labels = [f"{split} ({len(shares)})" for split, shares in by_split.items()]

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.hist(values, bins=BINS, stacked=True, label=labels)
    axes.set_xlabel("% of the volume" if data_set.has_volumes else "% of the image")
    axes.set_ylabel("entries")
    axes.set_title("size of the targets")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()
