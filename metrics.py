"""Scores of segmentations: per image and class, then means with confidence intervals. 2-D and 3-D.

Definitions follow Metrics Reloaded (Maier-Hein, Reinke et al., Nature Methods 2024). For masks that
are not empty, all scores equal those of monai.metrics.

    dice          2 TP / (2 TP + FP + FN)        iou         TP / (TP + FP + FN)
    sensitivity   TP / (TP + FN)                 precision   TP / (TP + FP)
    specificity   TN / (TN + FP)
    hd95          the larger of the two directed 95th percentiles of boundary distances (medpy
                  takes one percentile of both directions pooled, a smaller number); between two
                  distances a percentile is interpolated linearly, as by np.percentile
    assd          mean of the distances of both directions, pooled
    nsd           share of both boundaries that lies within `tolerance` of the other one

nsd counts boundary pixels, as the code of Metrics Reloaded does. The surface Dice of Nikolov et al.
(arXiv 1809.04430) weights surface elements by their size instead (monai: use_subvoxels=True). Ours
is lower, on average by 0.05 to 0.09 on the shapes that we compared: do not mix the two.

A boundary pixel belongs to the mask and has a direct neighbour (4 in 2-D, 6 in 3-D) that does not;
outside the image counts as background. Distances go from the centre of a boundary pixel to that of
the nearest one of the other mask. They are in pixels, or in mm if `spacing` gives the pixel size.

Empty masks. If both are empty, Dice, IoU and NSD are 1 and distances 0. If one is empty (a miss or
a false alarm), Dice, IoU and NSD are 0 and distances the diagonal of the image. Leaving such images
out would reward a model for finding less: they count, and their number is `misses`. Other scores of
0/0 are nan and left out of means.

Among images whose ground truth is empty in all classes, for example healthy patients,
`false_alarms` is the number of those with any prediction, and `image_specificity` the share of the
others. The specificity above is one of pixels.

Means are taken over the components of a class in an image (where these are scored one by one), then
over images, then over patients (where images name one), and last over classes. In class maps an
image counts for a class if its ground truth or its prediction contains it; if no image contains any
class, all images count. `dice_pooled` and the other pooled scores add up TP, FP, FN and TN of all
images first, so large objects dominate. Never compare them with `dice`, nor with `macro_f1_pooled`,
which also counts the background as a class.
"""

import functools

import numpy as np
from scipy.ndimage import binary_erosion, find_objects, label
from scipy.sparse import csr_array
from scipy.spatial import KDTree
from scipy.special import betaincinv, ndtr, stdtrit

OVERLAPS = ("dice", "iou", "sensitivity", "specificity", "precision")
METRICS = (*OVERLAPS, "hd95", "assd", "nsd", "ap", "betti0_error", "betti1_error")

# Relative slack of the NSD's tolerance. A spacing from a float32 affine or header is off by up to
# 1e-7, so that five steps of 0.4 mm are 2.00000003 mm.
SLACK = 1e-6
FEW_FAILURES = 5  # with fewer cases of Dice 0, little is known of how often a case fails


# --- one image ------------------------------------------------------------------------------------


def check_masks(pred, truth):
    """Raise ValueError unless both masks are bool arrays of the same shape."""
    if pred.dtype != bool or truth.dtype != bool or pred.shape != truth.shape:
        raise ValueError(
            f"masks must be bool arrays of one shape, got {pred.dtype} {pred.shape} as prediction "
            f"and {truth.dtype} {truth.shape} as truth"
        )


def ratio(part, rest, undefined=np.nan):
    """Return part / (part + rest), `undefined` for 0/0."""
    whole = part + rest
    return part / whole if whole else undefined


def overlap_scores(tp, fp, fn, tn, empty):
    """Return each of OVERLAPS from pixel counts; Dice and IoU of two empty masks are `empty`."""
    return {
        "dice": ratio(2 * tp, fp + fn, empty),
        "iou": ratio(tp, fp + fn, empty),
        "sensitivity": ratio(tp, fn),
        "specificity": ratio(tn, fp),
        "precision": ratio(tp, fp),
    }


def overlap(pred, truth, valid=None):
    """Return the scores that count pixels, for one class in one image.

    pred, truth: bool arrays of one shape, any number of dimensions. valid: bool array, False where
    pixels are ignored. The result has each of OVERLAPS in 0-1, and tp, fp, fn, tn in pixels.
    """
    check_masks(pred, truth)
    if valid is not None:
        pred = pred[valid]
        truth = truth[valid]

    tp = int(np.count_nonzero(pred & truth))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    tn = pred.size - tp - fp - fn
    return overlap_scores(tp, fp, fn, tn, empty=1.0) | {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def boundary_pixels(mask):
    """Return the index of every boundary pixel of a bool mask: (n, dims)."""
    return np.argwhere(mask & ~binary_erosion(mask))


def distances_to_nearest(pixels, others, spacing):
    """Return the distance (n,) of every pixel (n, dims) to the nearest of the others (m, dims)."""
    nearest = KDTree(others * spacing).query(pixels * spacing)[1]  # (n,)
    # From whole pixels: one step of 0.8 mm is then exactly 0.8, and `<= tolerance` holds at 0.8.
    return np.linalg.norm((pixels - others[nearest]) * spacing, axis=1)


def check_spacing(spacing, dims):
    """Return the spacing as float64 (dims,), ones for None. Raise ValueError if it is invalid."""
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
    """Return the scores of boundaries, for one class in one image.

    pred, truth: bool arrays of one shape. spacing: mm per pixel along each axis, in the order of
    the array's axes; None counts in pixels. tolerance: of nsd, in the same unit, with a relative
    slack of SLACK. The result has hd95 and assd in px or mm, nsd in 0-1, and miss, True if exactly
    one mask is empty. Raise ValueError if spacing is not one finite number above 0 for each axis,
    or if tolerance is below 0 or NaN.
    """
    check_masks(pred, truth)
    spacing = check_spacing(spacing, pred.ndim)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")

    if not (pred.any() and truth.any()):
        is_miss = bool(pred.any() or truth.any())
        worst = float(np.linalg.norm(spacing * pred.shape)) if is_miss else 0.0
        return {"hd95": worst, "assd": worst, "nsd": float(not is_miss), "miss": is_miss}

    # All boundaries lie within the bounding box of both masks, so there is less to erode.
    box = find_objects((pred | truth).view(np.uint8))[0]
    boundary_pred = boundary_pixels(pred[box])
    boundary_truth = boundary_pixels(truth[box])
    to_truth = distances_to_nearest(boundary_pred, boundary_truth, spacing)
    to_pred = distances_to_nearest(boundary_truth, boundary_pred, spacing)

    pooled = np.concatenate([to_truth, to_pred])
    is_within = pooled <= tolerance * (1 + SLACK)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "assd": float(pooled.mean()),
        "nsd": float(np.mean(is_within)),
        "miss": False,
    }


def score_image(pred, truth, valid=None, spacing=None, tolerance=1.0, with_distances=True):
    """Return a dict for each class, with `overlap` and, unless switched off, `distances`.

    pred, truth: bool (K, *size). valid: bool (*size), False where pixels are ignored: they are
    background in both masks. Each dict also has in_truth and in_pred, True if the mask contains the
    class at all.
    """
    rows = []
    for class_pred, class_truth in zip(pred, truth, strict=True):
        row = overlap(class_pred, class_truth, valid)
        row["in_truth"] = row["tp"] + row["fn"] > 0
        row["in_pred"] = row["tp"] + row["fp"] > 0
        if with_distances:
            if valid is not None:
                class_pred = class_pred & valid
                class_truth = class_truth & valid
            row |= distances(class_pred, class_truth, spacing, tolerance)
        rows.append(row)
    return rows


# --- many images ----------------------------------------------------------------------------------


def weighted_means(weights, values):
    """Return the means (R, K) of values (n, K) under weights (R, n); nan has no weight."""
    is_known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0/0 is nan if no value of a class is known
        return (weights @ np.where(is_known, values, 0.0)) / (weights @ is_known.astype(float))


@functools.lru_cache(maxsize=1)  # all metrics of a summary use the same draws
def bootstrap_weights(n, resamples, seed):
    """Return how often each resample draws each of n cases: float (R, n)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float)


def group_means(labels, values):
    """Return the mean (G, K) of each group of values (n, K), in the order of appearance.

    labels: n hashable values, equal within a group.
    """
    group_of = {}
    for name in labels:
        group_of.setdefault(name, len(group_of))

    n = len(labels)
    rows = [group_of[name] for name in labels]
    weights = csr_array((np.ones(n), (rows, np.arange(n))), shape=(len(group_of), n))  # (G, n)
    return weighted_means(weights, values)


def interval_percentiles(n):
    """Return the two percentiles, 0-100, of a bootstrap distribution that bound a 95 % interval.

    This is Hesterberg's expanded percentile interval (arXiv 1411.5279) of n independent cases: the
    tail is Phi(-sqrt(n / (n - 1)) t) instead of 2.5 %, with t the 97.5 % quantile of Student's
    distribution with n - 1 degrees of freedom. It corrects two reasons why the plain percentile
    interval is too short: the bootstrap divides by n where a variance divides by n - 1, and it
    takes the normal distribution for Student's. Both are nan if n is below 2, since one case has no
    interval.
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
    """Return {"mean", "low", "high", "n"}: the mean, its 95 % interval and the number of cases.

    values: n numbers, or (n, K) for the mean of the K classes' means; nan is left out. groups: n
    labels (patients); a group is then one case with the mean of its values. All results are nan if
    no value is known; low and high are nan if only one case is. The order of the values does not
    matter. The interval is an expanded percentile bootstrap (`interval_percentiles`).

    No bootstrap knows of failures that the cases do not contain: if 2 % of cases are missed and 50
    are scored, a third of all test sets has no miss, and 8 of 10 intervals cover the true mean.
    """
    values = np.asarray(values, float)
    if values.ndim == 1:
        values = values[:, None]  # (n, K)
    if groups is not None:
        values = group_means(groups, values)  # (G, K)
    values = values[~np.isnan(values).all(axis=1)]
    n = len(values)
    if n == 0:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0}

    values = values[np.lexsort(values.T)]  # so that the order of the cases does not matter
    class_means = weighted_means(bootstrap_weights(n, resamples, seed), values)  # (R, K)
    low, high = interval(np.nanmean(class_means, axis=1), n)
    mean = np.nanmean(weighted_means(np.ones((1, n)), values))
    return {"mean": float(mean), "low": low, "high": high, "n": n}


def interval_warning(n, failures):
    """Return why the intervals of n cases, of which `failures` have Dice 0, say little.

    Return None if there are 50 cases or more, and at least FEW_FAILURES of them failed.
    """
    if n == 0:
        return "n = 0: no case counts"

    warnings = []
    if n == 1:
        warnings.append("n = 1: one case has no interval")
    elif n < 50:
        warnings.append(f"n = {n}: below 50 the 95 % intervals tend to be too narrow")
    if failures < FEW_FAILURES:
        bound = 100 * failure_rate_bound(failures, n)
        shown = f"{bound:.0f}" if bound >= 10 else f"{bound:.2g}"
        warnings.append(
            f"{failures} of {n} cases have Dice 0, too few for a good interval: "
            f"their true share may be up to {shown} %"
        )
    return "; ".join(warnings) or None


def image_of(row):
    """Return what identifies a row's image; two data sets may have files of the same name."""
    return row.get("dataset"), row["name"]


def case_of(row):
    """Return what identifies a row's case: its patient if one is known, else its image."""
    patient_or_image = row["name"] if row["group"] is None else row["group"]
    return row.get("dataset"), patient_or_image


def summarise_means(rows, class_names, metrics):
    """Return images, n, misses, the warning if there is one, and `mean_ci` of each metric."""
    images = []
    cases = {}  # image -> case, in the order of appearance
    missed = set()
    failed = set()
    for row in rows:
        image = image_of(row)
        images.append(image)
        cases[image] = case_of(row)
        if row["in_truth"] != row["in_pred"]:
            missed.add((image, row["class"]))
        if row["dice"] == 0:
            failed.add(case_of(row))

    summary = {"images": len(cases), "n": len(set(cases.values())), "misses": len(missed)}
    warning = interval_warning(summary["n"], len(failed))
    if warning:
        summary["warning"] = warning

    columns = [class_names.index(row["class"]) for row in rows]
    for metric in metrics:
        values = np.full((len(rows), len(class_names)), np.nan)  # a row knows only its own class
        values[np.arange(len(rows)), columns] = [row[metric] for row in rows]
        # By image first: one with many components must not weigh more within its patient.
        summary[metric] = mean_ci(group_means(images, values), cases.values())
    return summary


def pooled_scores(rows):
    """Return {NAME_pooled: mean over classes} of OVERLAPS, from the counts of all images together.

    Rows of the background have no tn. A class with a score of 0/0 is left out; nan if all are.
    """
    counts = {}  # class -> tp, fp, fn, tn
    for row in rows:
        class_counts = counts.setdefault(row["class"], np.zeros(4))
        class_counts += [row.get(key, np.nan) for key in ("tp", "fp", "fn", "tn")]

    scores = [overlap_scores(*class_counts, empty=np.nan) for class_counts in counts.values()]
    means = {}
    for name in OVERLAPS:
        known = [score[name] for score in scores if not np.isnan(score[name])]
        means[f"{name}_pooled"] = float(np.mean(known)) if known else np.nan
    return means


def healthy_scores(rows):
    """Return the scores of images whose ground truth is empty in all classes; {} without any.

    Keys: empty_images, their number; false_alarms, how many of them are not predicted empty;
    image_specificity, the share of the others, 0-1.
    """
    has_truth = {}
    has_prediction = {}
    for row in rows:
        image = image_of(row)
        has_truth[image] = has_truth.get(image, False) or row["in_truth"]
        has_prediction[image] = has_prediction.get(image, False) or row["in_pred"]

    healthy = [image for image, truth in has_truth.items() if not truth]
    if not healthy:
        return {}
    alarms = sum(bool(has_prediction[image]) for image in healthy)
    specificity = 1 - alarms / len(healthy)
    counts = {"empty_images": len(healthy), "false_alarms": alarms}
    return counts | {"image_specificity": specificity}


def rows_of_class(rows, name):
    """Return the rows of one class."""
    return [row for row in rows if row["class"] == name]


def summarise(rows, class_names):
    """Return the summary of the rows of a test set.

    rows: dicts of `score_image` with "name" (of the image), "group" (the patient, or None) and
    "class". Several rows of one name and class are its components; their mean is the image's score.
    class_names: without the background; a single one means binary or prompted masks.

    The summary has
    - images, n (patients where known, else images), misses (counted once for each image and class,
      however many components miss);
    - empty_images, false_alarms and image_specificity if the ground truth of an image is empty;
    - a warning if n < 50 or if fewer than FEW_FAILURES cases have Dice 0;
    - `mean_ci` of every metric, and dice_pooled, iou_pooled and so on.

    With several classes these are means over the classes, and "classes" has the same for each
    class, over the images that contain it. Pooled counts are of all images, since specificity is
    about images without the class. Rows of other classes are the background's, with tp, fp and fn
    alone: they only count in `macro_f1_pooled`, which the GI-tract study (and torchmetrics' macro
    F1) calls Dice.
    """
    metrics = [metric for metric in METRICS if metric in rows[0]]
    if len(class_names) == 1:
        summary = summarise_means(rows, class_names, metrics)
        return summary | pooled_scores(rows) | healthy_scores(rows)

    # An image counts for a class if it contains it; if none contains any class, all count.
    foreground = [row for row in rows if row["class"] in class_names]
    counted = [row for row in foreground if row["in_truth"] or row["in_pred"]]
    if not any(row["in_truth"] for row in foreground):
        counted = foreground

    summary = summarise_means(counted, class_names, metrics)
    summary |= pooled_scores(foreground)
    summary |= healthy_scores(foreground)
    if len({row["class"] for row in rows}) > len(class_names):
        summary["macro_f1_pooled"] = pooled_scores(rows)["dice_pooled"]

    summary["classes"] = {}
    for name in class_names:
        means = summarise_means(rows_of_class(counted, name), [name], metrics)
        summary["classes"][name] = means | pooled_scores(rows_of_class(foreground, name))
    return summary


# --- topology and ranking -------------------------------------------------------------------------


def betti_numbers(mask):
    """Return the number of islands and the number of holes of a bool mask (H,W).

    The foreground is 8-connected and the background 4-connected: with the same rule for both, a
    diagonal line would neither join nor separate. Outside the image is background, so a region that
    is enclosed by the mask and the border together is no hole.
    """
    islands = label(mask, np.ones((3, 3)))[1]
    background = label(np.pad(~mask, 1, constant_values=True))[1]
    return islands, background - 1  # without the outside


def betti_error(pred, truth):
    """Return the errors of the numbers of islands and holes, for one class in one image.

    pred, truth: bool (H,W). betti0_error and betti1_error are absolute differences of
    `betti_numbers` of the whole image (Hu et al., NeurIPS 2019, average over random patches, which
    gives smaller numbers). 0 does not mean that the islands are the same, or in the same position.
    """
    check_masks(pred, truth)
    errors = np.abs(np.subtract(betti_numbers(pred), betti_numbers(truth)))
    return {"betti0_error": int(errors[0]), "betti1_error": int(errors[1])}


def average_precision(probability, truth, valid=None):
    """Return the area under precision over recall, without interpolation: 0-1.

    For one class in one image. probability: float array; truth: bool array of its shape; valid:
    bool array, False where pixels are ignored. Every value is a threshold, and the result is the
    sum of (recall gained) x (precision) from high to low, as in sklearn; equal values are one
    threshold. nan for an empty ground truth.
    """
    if valid is not None:
        probability = probability[valid]
        truth = truth[valid]
    order = np.argsort(-probability, axis=None, kind="stable")
    p = probability.ravel()[order]
    hits = np.cumsum(truth.ravel()[order])
    if not truth.any():
        return np.nan

    last_of_value = np.append(np.flatnonzero(np.diff(p)), p.size - 1)
    precision = hits[last_of_value] / (last_of_value + 1)
    recall_gained = np.diff(hits[last_of_value], prepend=0) / hits[-1]
    return float(precision @ recall_gained)
