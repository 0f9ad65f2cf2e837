"""Scores of segmentations: per image and class, then means with confidence intervals. 2-D and 3-D.

Definitions follow Metrics Reloaded (Maier-Hein, Reinke et al., Nature Methods 2024); for masks that
are not empty all equal monai.metrics.

    dice          2 TP / (2 TP + FP + FN)        iou         TP / (TP + FP + FN)
    sensitivity   TP / (TP + FN)                 precision   TP / (TP + FP)
    specificity   TN / (TN + FP)
    hd95          the larger of the two directed 95th percentiles of boundary distances (medpy
                  takes one percentile of both directions pooled: a smaller number); a percentile
                  between two distances is interpolated linearly, as np.percentile does
    assd          mean of the distances of both directions, pooled
    nsd           share of both boundaries that lies within `tolerance` of the other one

nsd counts boundary pixels, as the code of Metrics Reloaded does. The surface Dice of Nikolov et al.
(arXiv 1809.04430) weights surface elements by their size instead (monai: use_subvoxels=True). Ours
is the lower one, on average by 0.05 to 0.09 on the shapes that we compared: do not mix the two.

A boundary pixel belongs to the mask and has a direct neighbour (4 in 2-D, 6 in 3-D) that does not;
outside the image counts as background. A distance goes from the centre of a boundary pixel to that
of the other mask's nearest one; it is in pixels, or in mm where `spacing` says how large they are.

Empty masks. Both empty: Dice, IoU and NSD are 1, distances 0. One empty (a miss or a false alarm):
Dice, IoU and NSD are 0, distances the image's diagonal. Leaving such images out would reward a
model for finding less: they count, and are counted as `misses`. 0/0 elsewhere is nan, left out.

Of images whose ground truth is empty altogether, say of healthy patients, `false_alarms` counts
those in which anything is predicted, and `image_specificity` is the share of the others; the
specificity above is of pixels.

Means run over the components of a class in an image where these are scored one by one, over images,
over patients where images name one, and last over classes. In class maps an image counts for a
class if its truth or its prediction has it; if no image has any class, all count. `dice_pooled`
and its like add up TP, FP, FN and TN of all images first, which large objects dominate: never
compare it with `dice`, nor with
`macro_f1_pooled`, which counts the background as a class, too.
"""

import functools

import numpy as np
from scipy.ndimage import binary_erosion, find_objects, label
from scipy.sparse import csr_array
from scipy.spatial import KDTree
from scipy.special import betaincinv, ndtr, stdtrit

OVERLAPS = ("dice", "iou", "sensitivity", "specificity", "precision")
METRICS = (*OVERLAPS, "hd95", "assd", "nsd", "ap", "betti0_error", "betti1_error")

# Relative slack of the NSD's tolerance. A spacing that comes from a float32 affine or header is off
# by up to 1e-7, so that five steps of 0.4 mm are 2.00000003 mm.
SLACK = 1e-6
FEW_FAILURES = 5  # fewer cases of Dice 0 than this say little of how often a case fails


# --- one image ------------------------------------------------------------------------------------


def _check(pred, truth):
    if pred.dtype != bool or truth.dtype != bool or pred.shape != truth.shape:
        raise ValueError(
            f"masks must be bool arrays of one shape, got {pred.dtype} {pred.shape} as prediction "
            f"and {truth.dtype} {truth.shape} as truth"
        )


def _shares(tp, fp, fn, tn, empty):
    """Each of OVERLAPS of counted pixels; Dice and IoU of two empty masks are `empty`."""

    def share(part, rest, undefined=np.nan):
        return part / (part + rest) if part + rest else undefined

    return {
        "dice": share(2 * tp, fp + fn, empty),
        "iou": share(tp, fp + fn, empty),
        "sensitivity": share(tp, fn),
        "specificity": share(tn, fp),
        "precision": share(tp, fp),
    }


def overlap(pred, truth, valid=None):
    """Scores that count pixels, of one class in one image.

    pred, truth: bool arrays of one shape, any number of dimensions. valid: bool array, the pixels
    that count. Returns tp, fp, fn, tn in pixels; each of OVERLAPS in 0-1.
    """
    _check(pred, truth)
    if valid is not None:
        pred, truth = pred[valid], truth[valid]
    tp = int(np.count_nonzero(pred & truth))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    counts = {"tp": tp, "fp": fp, "fn": fn, "tn": pred.size - tp - fp - fn}
    return _shares(**counts, empty=1.0) | counts


def _boundary(mask):
    """Index of every boundary pixel of a bool mask, (n, dims)."""
    return np.argwhere(mask & ~binary_erosion(mask))


def _to_nearest(here, there, spacing):
    """Distance of every pixel of `here` (n, dims) to the nearest one of `there` (m, dims): (n,)."""
    nearest = KDTree(there * spacing).query(here * spacing)[1]  # (n,)
    # From whole pixels: one step of 0.8 mm is 0.8 exactly, so `<= tolerance` holds at 0.8.
    return np.linalg.norm((here - there[nearest]) * spacing, axis=1)


def _check_spacing(spacing, dims):
    """Return the spacing as float64 (dims,); None is 1 along each axis. Raises ValueError."""
    if spacing is None:
        return np.ones(dims)
    spacing = np.asarray(spacing, float)
    if spacing.shape != (dims,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(
            f"spacing must hold {dims} finite numbers above 0, one for each axis of the masks, "
            f"got {spacing.tolist()}"
        )
    return spacing


def distances(pred, truth, spacing=None, tolerance=1.0):
    """Scores of the boundaries, of one class in one image.

    pred, truth: bool arrays of one shape. spacing: mm a pixel along each axis, in the array's
    order; None counts in pixels. tolerance: in the same unit, for nsd; a distance counts as within
    it up to a relative error of SLACK. Returns hd95 and assd in px or mm, nsd in 0-1, and miss:
    whether just one of the masks is empty. Raises ValueError if spacing has not one finite number
    above 0 for each axis, or if tolerance is below 0 or NaN.
    """
    _check(pred, truth)
    spacing = _check_spacing(spacing, pred.ndim)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    if not (pred.any() and truth.any()):
        miss = bool(pred.any() or truth.any())
        worst = float(np.linalg.norm(spacing * pred.shape)) if miss else 0.0
        return {"hd95": worst, "assd": worst, "nsd": float(not miss), "miss": miss}
    box = find_objects((pred | truth).view(np.uint8))[0]  # no boundary lies outside: less to erode
    a, b = _boundary(pred[box]), _boundary(truth[box])
    to_truth, to_pred = _to_nearest(a, b, spacing), _to_nearest(b, a, spacing)
    both = np.concatenate([to_truth, to_pred])
    within = both <= tolerance * (1 + SLACK)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "assd": float(both.mean()),
        "nsd": float(np.mean(within)),
        "miss": False,
    }


def score_image(pred, truth, valid=None, spacing=None, tolerance=1.0, with_distances=True):
    """Every score of an image, a dict a class.

    pred, truth: bool (K, *size). valid: bool (*size), the pixels that count; outside it there is
    neither prediction nor truth. Adds in_truth and in_pred: whether a mask has the class at all.
    """
    rows = []
    for p, t in zip(pred, truth, strict=True):
        row = overlap(p, t, valid)
        row["in_truth"] = row["tp"] + row["fn"] > 0
        row["in_pred"] = row["tp"] + row["fp"] > 0
        if with_distances:
            if valid is not None:
                p, t = p & valid, t & valid
            row |= distances(p, t, spacing, tolerance)
        rows.append(row)
    return rows


# --- many images ----------------------------------------------------------------------------------


def _means(weights, values):
    """Weights (R, n), values (n, K) -> weighted means (R, K); nan has no weight."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0/0 is nan: nothing known of this class
        return (weights @ np.where(known, values, 0.0)) / (weights @ known.astype(float))


@functools.lru_cache(maxsize=1)  # all metrics of a summary use the same draws
def _draws(n, resamples, seed):
    """How often each of n cases is drawn in each resample, float (R, n)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float)


def _mean_by(labels, values):
    """n labels of any kind, values (n, K) -> means (G, K), a row a label in order of appearance."""
    n, number = len(labels), {label: i for i, label in enumerate(dict.fromkeys(labels))}
    places = [number[label] for label in labels], np.arange(n)
    return _means(csr_array((np.ones(n), places), shape=(len(number), n)), values)


def interval_percentiles(n):
    """Return the two percentiles, 0-100, of a bootstrap distribution that bound a 95 % interval.

    Hesterberg's expanded percentile interval (arXiv 1411.5279) of n independent cases:
    instead of 2.5 % the tail is Phi(-sqrt(n / (n - 1)) t), with t the 97.5 % quantile of
    Student's distribution with n - 1 degrees of freedom. It makes up for two things that make the
    plain percentile interval too short: the bootstrap divides by n where a variance divides by
    n - 1, and it takes the normal distribution for Student's. Both are nan if n is below 2: one
    case has no interval.
    """
    if n < 2:
        return np.nan, np.nan
    tail = 100 * ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975))
    return float(tail), float(100 - tail)


def interval(resampled, n):
    """Return low and high of the 95 % interval from the means (R,) of resamples of n cases.

    nan among the means is left out. Low and high are nan if n is below 2.
    """
    percentiles = interval_percentiles(n)
    if n < 2:
        return percentiles
    low, high = np.nanpercentile(resampled, percentiles)
    return float(low), float(high)


def failure_rate_bound(failures, n):
    """Return the largest share of failed cases, 0-1, that `failures` of n leave possible.

    This is the exact one-sided 95 % bound of Clopper and Pearson; without failures it is near 3/n.
    """
    if failures >= n:
        return 1.0
    return float(betaincinv(failures + 1, n - failures, 0.95))


def mean_ci(values, groups=None, resamples=2000, seed=0):
    """Mean with its 95 % interval (expanded percentile bootstrap): {"mean", "low", "high", "n"}.

    values: n numbers, or (n, K) for the mean over K classes of each one's mean; nan is left out.
    groups: n labels (patients). A group is then one case, worth its mean; n counts cases. All are
    nan if no value is known, low and high also if one case is. The order of the values has no
    influence. No bootstrap sees failures that the cases do not contain: where 2 % are missed and 50
    are scored, a third of all test sets has no miss, and the interval covers the true mean in 8 of
    10 test sets only.
    """
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values  # (n, K)
    if groups is not None:
        values = _mean_by(groups, values)  # (G, K)
    values = values[~np.isnan(values).all(axis=1)]
    if len(values) == 0:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    n, values = len(values), values[np.lexsort(values.T)]
    resampled = np.nanmean(_means(_draws(n, resamples, seed), values), axis=1)  # (R,)
    low, high = interval(resampled, n)
    mean = np.nanmean(_means(np.ones((1, n)), values))
    return {"mean": float(mean), "low": low, "high": high, "n": n}


def _warning(n, failures):
    """Return why the intervals of n cases, of which `failures` have Dice 0, say little.

    None if there are 50 cases or more and FEW_FAILURES of them or more have failed.
    """
    if n == 0:
        return "n = 0: no case counts"
    parts = []
    if n == 1:
        parts.append("n = 1: one case has no interval")
    elif n < 50:
        parts.append(f"n = {n}: below 50 the 95 % intervals tend to be too narrow")
    if failures < FEW_FAILURES:
        bound = 100 * failure_rate_bound(failures, n)
        shown = f"{bound:.0f}" if bound >= 10 else f"{bound:.2g}"
        parts.append(
            f"{failures} of {n} cases have Dice 0, too few for a good interval: "
            f"their true share may be up to {shown} %"
        )
    return "; ".join(parts) or None


def _summary(rows, class_names, metrics):
    classes = [class_names.index(row["class"]) for row in rows]
    images = [(row.get("dataset"), row["name"]) for row in rows]  # names may be another set's, too
    cases = {
        image: (row.get("dataset"), row["name"] if row["group"] is None else row["group"])
        for image, row in zip(images, rows, strict=True)
    }
    summary = {"images": len(cases), "n": len(set(cases.values()))}
    missed = {
        (image, row["class"])
        for image, row in zip(images, rows, strict=True)
        if row["in_truth"] != row["in_pred"]
    }
    summary["misses"] = len(missed)
    failed = {cases[image] for image, row in zip(images, rows, strict=True) if row["dice"] == 0}
    warning = _warning(summary["n"], len(failed))
    if warning:
        summary["warning"] = warning
    for metric in metrics:
        values = np.full((len(rows), len(class_names)), np.nan)  # a row knows its own class only
        values[np.arange(len(rows)), classes] = [row[metric] for row in rows]
        # First by image: one with many components must not weigh more within its patient.
        summary[metric] = mean_ci(_mean_by(images, values), cases.values())
    return summary


def _pooled(rows):
    """OVERLAPS of each class from the counts of all images together -> {NAME_pooled: their mean}.

    Rows of the background have no tn. A class whose score is 0/0 is left out; nan if all are.
    """
    counts = {}
    for row in rows:
        four = [row.get(key, np.nan) for key in ("tp", "fp", "fn", "tn")]
        counts.setdefault(row["class"], np.zeros(4))[:] += four
    scores, means = [_shares(*four, empty=np.nan) for four in counts.values()], {}
    for name in OVERLAPS:
        known = [score[name] for score in scores if not np.isnan(score[name])]
        means[f"{name}_pooled"] = float(np.mean(known)) if known else np.nan
    return means


def _healthy(rows):
    """Return what is predicted in images whose ground truth has no class at all.

    Keys: empty_images, their number; false_alarms, how many of them are not predicted empty;
    image_specificity, the share of the others, 0-1. {} if there are no such images.
    """
    has_truth = {}
    has_prediction = {}
    for row in rows:
        image = (row.get("dataset"), row["name"])
        has_truth[image] = has_truth.get(image, False) or row["in_truth"]
        has_prediction[image] = has_prediction.get(image, False) or row["in_pred"]

    empty = [image for image, truth in has_truth.items() if not truth]
    if not empty:
        return {}
    alarms = sum(bool(has_prediction[image]) for image in empty)
    specificity = 1 - alarms / len(empty)
    counts = {"empty_images": len(empty), "false_alarms": alarms}
    return counts | {"image_specificity": specificity}


def summarise(rows, class_names):
    """The rows of a test set -> its summary.

    rows: dicts of `score_image` with "name" (of the image), "group" (the patient, or None) and
    "class"; several of one name and class are its components, and their mean is the image's score.
    class_names: without the background; a single one means binary or prompted masks.
    Returns images, n (patients where known, else images), misses (an image once a class, however
    many components miss), empty_images, false_alarms and image_specificity if the truth of an image
    is empty, a warning if n < 50 or if fewer than FEW_FAILURES cases have Dice 0,
    `mean_ci` of every metric and dice_pooled, iou_pooled and so on. With several classes these are
    means over the classes, and "classes" holds the same for each class, over the images that have
    it; pooled counts are of all images, since specificity is about where a class is not. Rows of
    another class are the background's, with tp, fp and fn alone: they count in `macro_f1_pooled`,
    what the GI-tract study (and torchmetrics' macro F1) calls Dice, and nowhere else.
    """
    metrics = [metric for metric in METRICS if metric in rows[0]]
    if len(class_names) == 1:
        return _summary(rows, class_names, metrics) | _pooled(rows) | _healthy(rows)
    named = [row for row in rows if row["class"] in class_names]
    found = [row for row in named if row["in_truth"] or row["in_pred"]]
    if not any(row["in_truth"] for row in named):
        found = named
    summary = _summary(found, class_names, metrics) | _pooled(named) | _healthy(named)
    if len({row["class"] for row in rows}) > len(class_names):
        summary["macro_f1_pooled"] = _pooled(rows)["dice_pooled"]
    summary["classes"] = {}
    for name in class_names:
        have, every = ([r for r in some if r["class"] == name] for some in (found, named))
        summary["classes"][name] = _summary(have, [name], metrics) | _pooled(every)
    return summary


# --- topology and ranking -------------------------------------------------------------------------


def betti_numbers(mask):
    """How many islands and how many holes a bool mask (H,W) has: (beta 0, beta 1).

    Foreground is 8-connected, background hence 4-connected: with one rule for both a diagonal line
    would neither join nor separate. Outside the image is background, so that what is shut off from
    it by mask and border together is no hole.
    """
    islands = label(mask, np.ones((3, 3)))[1]
    return islands, label(np.pad(~mask, 1, constant_values=True))[1] - 1  # one is the outside


def betti_error(pred, truth):
    """How far the counts of islands and holes are from the truth's, of one class in one image.

    pred, truth: bool (H,W). Returns betti0_error and betti1_error, absolute differences of
    `betti_numbers`, of the whole image (Hu et al., NeurIPS 2019, average over random patches: a
    smaller number). 0 does not say that the islands are the same ones, nor where the truth's are.
    """
    _check(pred, truth)
    errors = np.abs(np.subtract(betti_numbers(pred), betti_numbers(truth)))
    return dict(zip(("betti0_error", "betti1_error"), errors.tolist(), strict=True))


def average_precision(probability, truth, valid=None):
    """Area under precision over recall of one class in one image, without interpolation: 0-1.

    probability: float array; truth: bool array of its shape; valid: bool array, the pixels that
    count. Every value is a threshold, and AP the sum of (recall gained) x (precision) from high to
    low, as in sklearn; equal values are one threshold. Of an empty truth it is nan.
    """
    if valid is not None:
        probability, truth = probability[valid], truth[valid]
    order = np.argsort(-probability, axis=None, kind="stable")
    p, hits = probability.ravel()[order], np.cumsum(truth.ravel()[order])
    if not truth.any():
        return np.nan
    ends = np.append(np.flatnonzero(np.diff(p)), p.size - 1)  # the last one of each value
    precision, gained = hits[ends] / (ends + 1), np.diff(hits[ends], prepend=0) / hits[-1]
    return float(precision @ gained)
