"""metrics.py against monai, scipy and numbers computed by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, rows
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from scipy.stats import beta, bootstrap, norm, t

import metrics
import options as command_line
import predict
import train
from engine import evaluate, tables
from imaging import volumes

pytestmark = pytest.mark.numeric


def random_mask(rng, shape):
    """Noise, a smooth blob, a box that touches the border, a single pixel or everything."""
    mask, kind = np.zeros(shape, bool), rng.integers(5)
    if kind == 0:
        mask = rng.random(shape) < rng.uniform(0.02, 0.9)
    if kind == 1:
        smooth = gaussian_filter(rng.standard_normal(shape), 2)
        mask = smooth > np.quantile(smooth, rng.uniform(0.3, 0.95))
    if kind == 2:
        mask[tuple(slice(0, rng.integers(1, n + 1)) for n in shape)] = True
    if kind == 4:
        mask[:] = rng.random() < 0.2
    mask[tuple(rng.integers(shape))] = True  # never empty
    return mask


def random_pairs(dims, count=200):
    rng = np.random.default_rng(dims)
    for i in range(count):
        shape = rng.integers(4, 40 if dims == 2 else 16, dims)
        pred, truth = random_mask(rng, shape), random_mask(rng, shape)
        spacing = None if i % 3 == 0 else tuple(rng.uniform(0.3, 5, dims))
        yield pred if i % 10 else truth.copy(), truth, spacing, rng.uniform(0.3, 4)


def square(corner, size=10, shape=(40, 40)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


EMPTY, SQUARE = square((0, 0), 0), square((5, 5))


# --- one image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_monai(dims):
    """monai gives distances in float32: hence 1e-6. Shares of counts agree to 1e-7 (float32)."""
    for pred, truth, spacing, tolerance in random_pairs(dims):
        ours = metrics.overlap(pred, truth) | metrics.distances(pred, truth, spacing, tolerance)
        p, t = torch.tensor(pred)[None, None], torch.tensor(truth)[None, None]  # (1,1,*S)
        where = {"include_background": True, "spacing": spacing}
        theirs = {
            "dice": compute_dice(p, t, ignore_empty=False),
            "iou": compute_iou(p, t, ignore_empty=False),
            "hd95": compute_hausdorff_distance(p, t, percentile=95, **where),
            "assd": compute_average_surface_distance(p, t, symmetric=True, **where),
            "nsd": compute_surface_dice(p, t, class_thresholds=[tolerance], **where),
        }
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value.item(), rel=1e-6, abs=1e-7), name
        assert not ours["miss"]


def test_counts_by_hand():
    truth = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    pred = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool)
    assert metrics.overlap(pred, truth) == {
        "tp": 2,
        "fp": 2,
        "fn": 1,
        "tn": 3,
        "dice": 4 / 7,
        "iou": 2 / 5,
        "sensitivity": 2 / 3,
        "specificity": 3 / 5,
        "precision": 2 / 4,
    }


@pytest.mark.parametrize(
    "radius, dice", [(2, 0.615), (4, 0.816), (8, 0.914), (16, 0.959), (32, 0.980), (64, 0.990)]
)
def test_disc_shifted_by_one_pixel(radius, dice):
    y, x = np.ogrid[-70:71, -70:71]
    disc = y**2 + x**2 <= radius**2
    assert metrics.overlap(disc, np.roll(disc, 1, axis=0))["dice"] == pytest.approx(dice, abs=5e-4)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_squares_k_apart(k):
    """The far edge, 10 of 36 boundary pixels, is k away: more than a twentieth."""
    scores = metrics.distances(SQUARE, square((5 + k, 5)))
    assert scores["hd95"] == k
    assert metrics.distances(SQUARE, SQUARE) == {"hd95": 0, "assd": 0, "nsd": 1, "miss": False}


def test_hd95_takes_each_direction_for_itself():
    """Two specks among 38 boundary pixels: above the 95th percentile of their direction alone."""
    pred = SQUARE.copy()
    pred[5, 30] = pred[5, 35] = True  # 16 and 21 columns from the square
    scores = metrics.distances(pred, SQUARE)
    # rank 0.95 * 37 = 35.15 between the 36th (0) and the 37th (16) of the ordered distances
    assert scores["hd95"] == pytest.approx(0.15 * 16)
    assert scores["assd"] == pytest.approx((16 + 21) / (38 + 36))
    assert scores["nsd"] == pytest.approx((36 + 36) / (38 + 36))
    assert metrics.distances(SQUARE, pred) == scores


def test_single_pixels_with_and_without_spacing():
    a, b = square((0, 0), 1), square((3, 4), 1)
    assert metrics.distances(a, b)["hd95"] == 5
    assert metrics.distances(a, b, spacing=(2, 1))["assd"] == pytest.approx((36 + 16) ** 0.5)
    assert metrics.distances(a, b, tolerance=4.99)["nsd"] == 0
    assert metrics.distances(a, b, tolerance=5)["nsd"] == 1


@pytest.mark.parametrize("step", [0.1, 0.7, 0.8, 1.1, 2.3])
def test_tolerance_of_one_pixel_holds_in_mm(step):
    """Coordinates times spacing would make some steps of 0.7 mm longer than 0.7."""
    shifted = np.roll(SQUARE, 1, axis=1)
    assert metrics.distances(SQUARE, shifted, (step, step), tolerance=step)["nsd"] == 1


def test_nsd_of_oblique_grids_from_float32_affines():
    """Cubes one step of 1 mm apart, along each axis: all of both boundaries is within 1 mm."""
    cube = np.zeros((14, 14, 14), bool)
    cube[2:10, 2:10, 2:10] = True
    scores = []
    for seed in range(200):
        rotation = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
        affine = rotation.astype(np.float32)  # as a NIfTI header stores it
        spacing = np.linalg.norm(affine.astype(np.float64), axis=0)
        assert spacing == pytest.approx([1, 1, 1], rel=2e-7)
        shifted = np.roll(cube, 1, axis=seed % 3)
        scores.append(metrics.distances(cube, shifted, spacing, tolerance=1.0)["nsd"])
    assert scores == [1.0] * 200


@pytest.mark.parametrize("mm, steps", [(0.4, 5), (0.7, 3), (1.1, 10), (0.1, 7), (0.3, 1)])
def test_nsd_of_whole_steps_of_a_float32_spacing(mm, steps):
    """5 steps of 0.4 mm are 2 mm, although float32 0.4 is 0.4000000059604645."""
    spacing = [float(np.float32(mm))] * 2
    shifted = np.roll(SQUARE, steps, axis=0)
    tolerance = round(mm * steps, 6)
    assert metrics.distances(SQUARE, shifted, spacing, tolerance)["nsd"] == 1
    # The slack is far below what a scanner or an observer resolves.
    assert metrics.distances(SQUARE, shifted, spacing, tolerance * 0.9999)["nsd"] < 1


@pytest.mark.parametrize(
    "spacing",
    [(1,), (1, 1, 1), 2.0, (1, 0), (1, -0.5), (np.nan, 1), (1, np.inf), ((1, 1),), ()],
)
def test_refuses_spacings_that_are_none(spacing):
    for pred in (SQUARE, EMPTY):  # whatever the masks hold
        with pytest.raises(ValueError, match="spacing must hold 2 finite numbers above 0"):
            metrics.distances(pred, SQUARE, spacing)
    with pytest.raises(ValueError, match="spacing must hold 2"):
        metrics.score_image(SQUARE[None], SQUARE[None], spacing=spacing)


@pytest.mark.parametrize("tolerance", [-1, np.nan])
def test_refuses_tolerances_that_are_none(tolerance):
    with pytest.raises(ValueError, match="tolerance must be 0 or more"):
        metrics.distances(SQUARE, SQUARE, tolerance=tolerance)


@pytest.mark.parametrize(
    "pred, truth, overlaps, worst",
    [
        (EMPTY, EMPTY, {"dice": 1, "iou": 1, "sensitivity": None, "precision": None}, 0),
        (EMPTY, SQUARE, {"dice": 0, "iou": 0, "sensitivity": 0, "precision": None}, 1),
        (SQUARE, EMPTY, {"dice": 0, "iou": 0, "sensitivity": None, "precision": 0}, 1),
    ],
)
def test_empty_masks(pred, truth, overlaps, worst):
    scores = metrics.overlap(pred, truth)
    for name, value in overlaps.items():
        assert np.isnan(scores[name]) if value is None else scores[name] == value
    diagonal = worst * 40 * (2**2 + 3**2) ** 0.5
    assert metrics.distances(pred, truth, spacing=(2, 3)) == {
        "hd95": pytest.approx(diagonal),
        "assd": pytest.approx(diagonal),
        "nsd": 1 - worst,
        "miss": bool(worst),
    }


def test_full_mask_has_no_specificity():
    assert np.isnan(metrics.overlap(~EMPTY, ~EMPTY)["specificity"])


def test_invariants():
    for pred, truth, spacing, tolerance in random_pairs(3, 40):
        scores, swapped = metrics.overlap(pred, truth), metrics.overlap(truth, pred)
        assert scores["dice"] == pytest.approx(2 * scores["iou"] / (1 + scores["iou"]))
        assert scores["sensitivity"] == swapped["precision"]
        assert metrics.overlap(~pred, ~truth)["sensitivity"] == pytest.approx(
            scores["specificity"], nan_ok=True
        )
        spacing = spacing or (1, 1, 1)
        near = metrics.distances(pred, truth, spacing, tolerance)
        assert metrics.distances(truth, pred, spacing, tolerance) == pytest.approx(near)
        # axes in another order; everything twice as large; more background around
        turned = metrics.distances(
            pred.transpose(2, 0, 1),
            truth.transpose(2, 0, 1),
            np.array(spacing)[[2, 0, 1]],
            tolerance,
        )
        assert turned == pytest.approx(near)
        large = metrics.distances(pred, truth, 2 * np.array(spacing), 2 * tolerance)
        assert large["hd95"] == pytest.approx(2 * near["hd95"]) and large["nsd"] == near["nsd"]
        wide = metrics.distances(np.pad(pred, 3), np.pad(truth, 3), spacing, tolerance)
        assert wide == pytest.approx(near)


def test_score_image_scores_each_class_and_leaves_out_what_is_not_valid():
    rng = np.random.default_rng(0)
    pred, truth = rng.random((2, 3, 20, 30)) < 0.4
    pred[2] = False
    rows = metrics.score_image(pred, truth, spacing=(2, 1), tolerance=2)
    for row, p, mask in zip(rows, pred, truth, strict=True):
        expected = metrics.overlap(p, mask) | metrics.distances(p, mask, (2, 1), 2)
        assert row == expected | {"in_truth": True, "in_pred": bool(p.any())}
    # Ignoring all but a window is the same as scoring the window.
    valid = np.zeros((20, 30), bool)
    valid[4:15, 6:20] = True
    rows = metrics.score_image(pred, truth, valid)[:2]
    assert rows == metrics.score_image(pred[:2, 4:15, 6:20], truth[:2, 4:15, 6:20])
    truth[0, 4:15, 6:20] = False
    row = metrics.score_image(pred, truth, valid, with_distances=False)[0]
    assert not row["in_truth"] and row["in_pred"] and "hd95" not in row


@pytest.mark.parametrize("score", [metrics.overlap, metrics.distances])
def test_refuses_probabilities_and_other_shapes(score):
    for wrong in (SQUARE.astype(np.uint8), SQUARE * 0.3, SQUARE[:-1], SQUARE[None]):
        with pytest.raises(ValueError, match="bool arrays of one shape"):
            score(wrong, SQUARE)


# --- many images ----------------------------------------------------------------------------------


def expanded_tail(n):
    """Hesterberg, arXiv 1411.5279: Phi(-sqrt(n / (n - 1)) t(0.975, n - 1))."""
    return norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1))


def test_interval_equals_scipy():
    values = np.random.default_rng(1).beta(8, 2, 80)
    ours = metrics.mean_ci(values, resamples=20000)
    level = 1 - 2 * expanded_tail(80)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", confidence_level=level, rng=0
    )
    low, high = theirs.confidence_interval
    assert ours["mean"] == pytest.approx(values.mean()) and ours["n"] == 80
    assert [ours["low"], ours["high"]] == pytest.approx([low, high], abs=0.03 * (high - low))


def test_intervals_are_expanded():
    for n in (2, 3, 5, 20, 100, 10000):
        low, high = metrics.interval_percentiles(n)
        assert low == pytest.approx(100 * expanded_tail(n), rel=1e-9)
        assert high == pytest.approx(100 - low)
    # By hand, n = 20: t = 2.0930, 2.0930 * sqrt(20 / 19) = 2.1474, Phi(-2.1474) = 1.588 %.
    assert metrics.interval_percentiles(20)[0] == pytest.approx(1.588, abs=1e-3)
    # Of many cases it is the plain percentile interval.
    assert metrics.interval_percentiles(10**6)[0] == pytest.approx(2.5, abs=1e-4)

    # Two cases: nothing but the extremes is as wide as t with one degree of freedom asks for.
    two = metrics.mean_ci([0.4, 0.8])
    assert two == pytest.approx({"mean": 0.6, "low": 0.4, "high": 0.8, "n": 2})


@pytest.mark.parametrize("groups", [None, ["anna"] * 3])
def test_one_case_has_no_interval(groups):
    one = metrics.mean_ci([0.5, 0.7, 0.9] if groups else [0.7], groups)
    assert one["mean"] == pytest.approx(0.7) and one["n"] == 1
    assert np.isnan([one["low"], one["high"]]).all()
    assert np.isnan(metrics.mean_ci([[0.5, 0.9]])["low"])  # one case, two classes


def test_bound_of_the_failure_rate():
    """The exact bound: with this rate so few failures or fewer happen in 5 % of all test sets."""
    assert metrics.failure_rate_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert metrics.failure_rate_bound(3, 50) == pytest.approx(beta.ppf(0.95, 4, 47))
    assert metrics.failure_rate_bound(1, 1) == 1


def test_interval_is_seeded_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(2)
    values = rng.random(60)
    first = metrics.mean_ci(values)
    metrics.bootstrap_weights.cache_clear()
    assert first == metrics.mean_ci(values) == metrics.mean_ci(rng.permutation(values))
    assert first["low"] != metrics.mean_ci(values, seed=1)["low"]
    constant = metrics.mean_ci(np.full(60, 0.7))
    assert constant == pytest.approx({"mean": 0.7, "low": 0.7, "high": 0.7, "n": 60}, abs=1e-12)


def test_unknown_values_are_left_out():
    values = [0.2, np.nan, 0.8, np.nan, 0.5]
    assert metrics.mean_ci(values) == metrics.mean_ci([0.2, 0.8, 0.5])
    nothing = metrics.mean_ci([np.nan, np.nan])
    assert nothing.pop("n") == 0 and np.isnan(list(nothing.values())).all()
    assert metrics.mean_ci([])["n"] == 0


def test_a_patient_counts_once():
    values, patients = [np.nan, 1, 1, 1, np.nan, 0.4, 0], ["c", "a", "a", "a", 7, "a", 7]
    by_patient = metrics.mean_ci(values, patients)
    assert by_patient["mean"] == pytest.approx((0.85 + 0) / 2) and by_patient["n"] == 2
    assert by_patient == pytest.approx(metrics.mean_ci([0.85, 0]))


def test_several_columns_are_averaged_last():
    values = np.array([[1, np.nan], [0.5, np.nan], [np.nan, 0.2], [np.nan, np.nan]])
    both = metrics.mean_ci(values)
    assert both["mean"] == pytest.approx((0.75 + 0.2) / 2) and both["n"] == 3
    column = np.random.default_rng(3).random((50, 1))
    one, two = metrics.mean_ci(column), metrics.mean_ci(np.hstack([column, column]))
    assert two == pytest.approx(one) == metrics.mean_ci(column[:, 0])


def hits(draw, rng, repeats=1000):
    """How often the interval of what `draw` gives, values and groups, holds the true mean."""
    intervals = [metrics.mean_ci(*draw(rng)) for _ in range(repeats)]
    return np.mean([i["low"] <= 0.72 <= i["high"] for i in intervals])


@pytest.mark.slow
def test_interval_covers_the_true_mean():
    """Dice-like: a tenth of total misses, else Beta(8, 2), mean 0.8; together 0.72."""

    def draw(rng):
        return (rng.beta(8, 2, 100) * (rng.random(100) > 0.1),)

    assert 0.92 <= hits(draw, np.random.default_rng(0)) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, misses, plain, expanded",
    [(50, 0.02, 0.81, 0.82), (100, 0.02, 0.89, 0.89), (20, 0.0, 0.92, 0.94)],
)
def test_coverage_where_misses_are_rare(n, misses, plain, expanded):
    """How often 95 % intervals hold the true mean: Beta(18, 2), mean 0.9, some of it missed.

    Expanding mends what small samples lack: 20 cases without misses go from 0.92 to 0.94. It does
    not mend rare misses. A third of all samples of 50 cases, and an eighth of those of 100, hold
    none of the 2 % that are missed, and no bootstrap resamples what a sample does not contain:
    that is why a summary warns of fewer than 5 failures and gives the bound of their rate.
    """
    rng = np.random.default_rng(0)
    true_mean = 0.9 * (1 - misses)
    repeats = 3000
    covered = {"plain": 0, "expanded": 0}
    for _ in range(repeats):
        values = rng.beta(18, 2, n) * (rng.random(n) >= misses)
        ours = metrics.mean_ci(values)
        covered["expanded"] += ours["low"] <= true_mean <= ours["high"]
        means = metrics.bootstrap_weights(n, 2000, 0) @ np.sort(values) / n
        low, high = np.percentile(means, [2.5, 97.5])
        covered["plain"] += low <= true_mean <= high
    shares = {name: count / repeats for name, count in covered.items()}
    print(f"n = {n}, {100 * misses:.0f} % missed: {shares}")

    # Two decimals of a simulation of 3000: its standard error is at most 0.007.
    assert shares["plain"] == pytest.approx(plain, abs=0.02)
    assert shares["expanded"] == pytest.approx(expanded, abs=0.02)
    assert shares["expanded"] >= shares["plain"]


@pytest.mark.slow
def test_interval_by_patient_covers_where_that_by_image_does_not():
    """60 patients, each with 8 images that share their score's deviation."""

    def draw(rng, grouped=True):
        patients = np.repeat(np.arange(60), 8)
        values = 0.72 + 0.1 * rng.standard_normal(60)[patients] + 0.05 * rng.standard_normal(480)
        return values, patients if grouped else None

    assert 0.92 <= hits(draw, np.random.default_rng(0)) <= 0.97
    assert hits(lambda rng: draw(rng, grouped=False), np.random.default_rng(0)) < 0.7


def rows_of(cases, names):
    """cases: {image or (image, patient): list of (pred, truth) masks, one a class} -> rows."""
    rows = []
    for case, pairs in cases.items():
        image, patient = case if isinstance(case, tuple) else (case, None)
        pred, truth = np.stack([p for p, _ in pairs]), np.stack([t for _, t in pairs])
        for name, scores in zip(names, metrics.score_image(pred, truth), strict=True):
            rows.append({"name": image, "group": patient, "class": name, **scores})
    return rows


HALF = square((5, 5), 10) & square((5, 0), 10)  # half of SQUARE: Dice 2/3


def test_summary_of_binary_masks():
    cases = {
        "hit": [(SQUARE, SQUARE)],
        "half": [(HALF, SQUARE)],
        "missed": [(EMPTY, SQUARE)],
        "alarm": [(SQUARE, EMPTY)],
        "nothing": [(EMPTY, EMPTY)],
    }
    summary = metrics.summarise(rows_of(cases, ["polyp"]), ["polyp"])
    assert (summary["images"], summary["n"], summary["misses"]) == (5, 5, 2)
    assert summary["dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0 + 0 + 1) / 5)
    assert summary["dice"]["low"] < summary["dice"]["mean"] < summary["dice"]["high"]
    assert summary["sensitivity"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["sensitivity"]["n"] == 3
    assert summary["dice_pooled"] == pytest.approx(300 / (300 + 100 + 150))
    # of 8000 pixels, 300 in truth: 150 found, 150 missed, 100 false
    assert summary["iou_pooled"] == pytest.approx(150 / 400)
    assert summary["sensitivity_pooled"] == pytest.approx(150 / 300)
    assert summary["specificity_pooled"] == pytest.approx(7600 / 7700)
    assert summary["precision_pooled"] == pytest.approx(150 / 250)
    assert summary["hd95"]["mean"] > 2 * 40 * 2**0.5 / 5  # the diagonals of two misses
    assert "50" in summary["warning"] and "5" in summary["warning"]
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(
    "count, misses, warnings",
    [
        (49, 5, ["n = 49: below 50 the 95 % intervals tend to be too narrow"]),
        (50, 5, []),
        (50, 4, ["4 of 50 cases have Dice 0", "may be up to 17 %"]),
        (50, 1, ["1 of 50 cases", "may be up to 9.1 %"]),
        (100, 0, ["0 of 100 cases", "may be up to 3 %"]),
        (20, 0, ["n = 20: below 50", "0 of 20 cases", "may be up to 14 %"]),
        (3, 3, ["3 of 3 cases have Dice 0", "may be up to 100 %"]),
        (1, 0, ["n = 1: one case has no interval", "0 of 1 cases"]),
    ],
)
def test_warnings_of_few_cases_and_of_few_failures(count, misses, warnings):
    cases = {f"{i}": [(EMPTY if i < misses else SQUARE, SQUARE)] for i in range(count)}
    summary = metrics.summarise(rows_of(cases, ["polyp"]), ["polyp"])
    assert ("warning" in summary) == bool(warnings)
    for warning in warnings:
        assert warning in summary["warning"]


def test_a_mask_beside_the_target_is_a_failure_too():
    cases = {f"{i}": [(square((20, 20)) if i < 5 else SQUARE, SQUARE)] for i in range(60)}
    summary = metrics.summarise(rows_of(cases, ["polyp"]), ["polyp"])
    assert summary["misses"] == 0 and "warning" not in summary


def test_few_failures_are_counted_in_patients():
    """Eight missed images of two patients are two failed cases."""
    cases = {(f"{i}", f"{i // 4}"): [(EMPTY if i < 8 else SQUARE, SQUARE)] for i in range(240)}
    summary = metrics.summarise(rows_of(cases, ["polyp"]), ["polyp"])
    assert summary["misses"] == 8 and summary["n"] == 60
    assert "2 of 60 cases" in summary["warning"]


def test_summary_by_patient():
    cases = {
        ("1", "anna"): [(SQUARE, SQUARE)],
        ("2", "anna"): [(SQUARE, SQUARE)],
        ("3", "anna"): [(SQUARE, SQUARE)],
        ("4", "bob"): [(HALF, SQUARE)],
        "5": [(EMPTY, SQUARE)],
        "6": [(EMPTY, SQUARE)],
    }  # without a patient: for themselves
    summary = metrics.summarise(rows_of(cases, ["polyp"]), ["polyp"])
    assert (summary["images"], summary["n"]) == (6, 4)
    assert summary["dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)


def test_summary_of_class_maps():
    names = ["liver", "spleen", "uterus"]
    nothing = (EMPTY, EMPTY)
    cases = {
        "a": [(SQUARE, SQUARE), (HALF, SQUARE), nothing],
        "b": [(SQUARE, SQUARE), nothing, nothing],
        "c": [nothing, (SQUARE, EMPTY), nothing],
        "d": [nothing, nothing, nothing],
    }
    rows = rows_of(cases, names)
    summary = metrics.summarise(rows, names)
    classes = summary["classes"]
    assert [classes[name]["images"] for name in names] == [2, 2, 0]
    assert [classes[name]["misses"] for name in names] == [0, 1, 0]
    assert classes["liver"]["dice"]["mean"] == 1
    assert classes["spleen"]["dice"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(classes["uterus"]["dice"]["mean"]) and classes["uterus"]["dice"]["n"] == 0
    assert summary["dice"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert (summary["images"], summary["n"], summary["misses"]) == (3, 3, 1)
    assert summary["dice_pooled"] == pytest.approx((1 + 100 / (100 + 150)) / 2)
    again = metrics.summarise(rows[::-1], names)
    assert again["dice"] == pytest.approx(summary["dice"])
    without = metrics.summarise([{k: v for k, v in r.items() if k != "hd95"} for r in rows], names)
    assert "hd95" not in without and "hd95" not in without["classes"]["liver"]


def test_pooled_scores_of_class_maps():
    """Specificity is of all images, of those without the class too; 0/0 leaves a class out."""
    names = ["liver", "spleen", "uterus"]
    nothing = (EMPTY, EMPTY)
    cases = {
        "a": [(SQUARE, SQUARE), (HALF, SQUARE), nothing],
        "b": [(HALF, SQUARE), nothing, nothing],
        "c": [nothing, (SQUARE, EMPTY), nothing],
    }
    rows = rows_of(cases, names)
    rows += [{"name": n, "group": None, "class": "", "tp": 6, "fp": 2, "fn": 4} for n in cases]
    summary = metrics.summarise(rows, names)
    by_hand = {  # of 4800 pixels a class; liver: 150 found, 50 missed; spleen: 50, 50, 100 false
        "dice": (300 / 350, 100 / 250, None),
        "iou": (150 / 200, 50 / 200, None),
        "sensitivity": (150 / 200, 50 / 100, None),
        "specificity": (1, 4600 / 4700, 1),
        "precision": (1, 50 / 150, None),
    }
    for score, values in by_hand.items():
        known = [value for value in values if value is not None]
        assert summary[f"{score}_pooled"] == pytest.approx(np.mean(known)), score
        for name, value in zip(names, values, strict=True):
            of_class = summary["classes"][name][f"{score}_pooled"]
            assert np.isnan(of_class) if value is None else of_class == pytest.approx(value)
    f1 = (300 / 350 + 100 / 250 + 36 / 54) / 3
    assert summary["macro_f1_pooled"] == pytest.approx(f1)


def components(name, group, dice, kind="polyp", in_pred=True, **more):
    """Rows of one class in one image, a row a component."""
    own = {"name": name, "group": group, "class": kind, "in_truth": True}
    counts = {"tp": 1, "fp": 0, "fn": 1, "tn": 2}
    keys = ("sensitivity", "iou", "specificity", "precision")
    return [
        own | {"in_pred": in_pred and d > 0, "dice": d} | dict.fromkeys(keys, d) | counts | more
        for d in dice
    ]


def test_an_image_is_worth_the_mean_of_its_components():
    rows = components("1", None, [0.9, 0.0, 0.0, 0.3]) + components("2", None, [0.8])
    summary = metrics.summarise(rows, ["polyp"])
    assert summary["dice"]["mean"] == pytest.approx((0.3 + 0.8) / 2)
    # two of one image's components are missed: one image is
    assert (summary["images"], summary["n"], summary["dice"]["n"]) == (2, 2, 2)
    assert summary["misses"] == 1
    assert summary["dice_pooled"] == pytest.approx(10 / 15)  # of components, by their pixels


def test_components_then_images_then_patients_then_classes():
    rows = components("1", "anna", [1.0, 0.4], "liver") + components("2", "anna", [0.1], "liver")
    rows += components("3", "bob", [0.6], "liver") + components("1", "anna", [0.0, 0.0], "spleen")
    summary = metrics.summarise(rows[::2] + rows[1::2], ["liver", "spleen"])
    # anna's liver: (0.7 + 0.1) / 2, not (1 + 0.4 + 0.1) / 3
    liver = (0.4 + 0.6) / 2
    assert summary["classes"]["liver"]["dice"]["mean"] == pytest.approx(liver)
    assert summary["classes"]["liver"]["images"] == 3 and summary["classes"]["liver"]["n"] == 2
    assert summary["classes"]["liver"]["dice"]["n"] == 2
    assert summary["classes"]["spleen"]["misses"] == summary["misses"] == 1
    assert summary["dice"]["mean"] == pytest.approx((liver + 0.0) / 2)


def test_rows_may_carry_ap_and_betti_errors():
    rows = components("1", None, [0.5], ap=0.25, betti0_error=3, betti1_error=0)
    rows += components("2", None, [0.5], ap=np.nan, betti0_error=0, betti1_error=1)
    rows += components("3", None, [0.5], ap=0.75, betti0_error=1, betti1_error=1)
    summary = metrics.summarise(rows, ["polyp"])
    assert summary["ap"]["mean"] == 0.5 and summary["ap"]["n"] == 2  # of an empty truth: unknown
    assert summary["betti0_error"]["mean"] == pytest.approx(4 / 3)
    assert summary["betti1_error"]["mean"] == pytest.approx(2 / 3)
    assert "ap" not in metrics.summarise(components("1", None, [0.5]), ["polyp"])


# --- the tolerance, the intervals and the warnings of a run ---------------------------------------


def monai_nsd(pred, truth, tolerance, spacing=None):
    """monai's surface Dice of two masks that are not both empty."""
    masks = [torch.tensor(mask)[None, None] for mask in (pred, truth)]
    where = {"class_thresholds": [tolerance], "include_background": True, "spacing": spacing}
    return compute_surface_dice(*masks, **where).nan_to_num(0).item()


def test_the_nsd_tolerance_of_a_run(options, demo, tmp_path, monkeypatch, capsys):
    """It is printed with its unit, stands in summary.json, and later tests of the run keep it."""
    options = replace(options, epochs=1, overlays=0, nsd_tolerance=2.5, val_distances=True)
    options = replace(options, threshold=0.1)  # below what a new model says, so that masks are full
    train.run(options)
    out = capsys.readouterr().out
    assert "nsd (2.5 px)" in out and "hd95 (px)" in out and "assd (px)" in out
    assert out.count("expanded percentile bootstrap") == 1
    assert out.count("failures that the test cases do not contain are in no interval") == 1
    run = Path(options.out)
    summary = json.loads((run / "test" / "summary.json").read_text())
    scores = summary["tests"]["demo"]
    assert scores["nsd_tolerance"] == 2.5 and scores["distance_unit"] == "px"
    assert summary["intervals"] == "95 % intervals: expanded percentile bootstrap"

    # monai scores the masks that predict.py writes.
    masks = tmp_path / "masks"
    arguments = demo, "--weights", run, "--out", masks, "--device", "cpu"
    assert command(monkeypatch, capsys, predict, *arguments)[0] == 0

    def nsd_of_files(tolerance):
        values = []
        for row in rows(run / "test" / "per_image.csv"):
            mask = np.asarray(Image.open(masks / f"{row['name']}.png")) > 0
            truth = np.asarray(Image.open(demo / "masks" / f"{row['name']}.png")) > 0
            values.append(monai_nsd(mask, truth, tolerance))
        return np.mean(values)

    assert scores["nsd"]["mean"] == pytest.approx(nsd_of_files(2.5), abs=1e-6)

    # A test of the run keeps its tolerance, or takes another one.
    for given, tolerance in ((None, 2.5), (1.0, 1.0)):
        again = command_line.Options(
            weights=options.out, eval=True, test=[f"{demo}:test"], out=str(tmp_path / f"{given}"),
            cache=options.cache, workers=0, overlays=0, nsd_tolerance=given,
        )  # fmt: skip
        tested = train.run(again)["tests"]["demo"]
        assert tested["nsd_tolerance"] == tolerance
        assert tested["nsd"]["mean"] == pytest.approx(nsd_of_files(tolerance), abs=1e-6)
        assert f"nsd ({tolerance:g} px)" in capsys.readouterr().out


def test_validation_scores_nsd_at_the_tolerance(monkeypatch):
    """The tolerance reaches validation too, which scores distances with --val-distances."""
    pred, truth = np.stack([SQUARE])[None], torch.tensor(np.roll(SQUARE, 3, 0))[None].long()
    item = {"dataset": "d", "name": "a", "group": None, "prompt": "", "truth": truth}
    monkeypatch.setattr(
        evaluate, "predictions", lambda *_: iter([(dict(item), pred[0].astype(float), None)])
    )
    dataset = SimpleNamespace(classes=("polyp",))
    model = SimpleNamespace(config=SimpleNamespace(threshold=0.5))
    for tolerance in (1.0, 2.0, 3.0):
        options = SimpleNamespace(
            val_distances=True, tolerance=tolerance, threshold=None, min_area=1
        )
        scores = evaluate.validate(model, None, dataset, options)
        expected = monai_nsd(SQUARE, np.roll(SQUARE, 3, 0), tolerance)
        assert scores["val_nsd"] == pytest.approx(expected, abs=1e-6)


def test_the_nsd_tolerance_of_volumes_is_in_mm():
    rng = np.random.default_rng(5)
    pred, truth = random_mask(rng, (12, 10, 8)), random_mask(rng, (12, 10, 8))
    item = {"dataset": "d", "name": "a", "group": None, "prompt": ""}
    item |= {"truth": torch.tensor(truth)[None].long(), "spacing": (0.8, 0.8, 2.5)}
    (row,) = evaluate.score(item, pred[None], ("liver",), pred[None].astype(float), 1.6)
    assert row["nsd"] == pytest.approx(monai_nsd(pred, truth, 1.6, (0.8, 0.8, 2.5)), abs=1e-6)

    dataset = volumes.VolumeSet.__new__(volumes.VolumeSet)
    dataset.classes = ("liver",)
    summary = evaluate.summarise_rows([row], dataset, SimpleNamespace(tolerance=1.6))
    assert summary["nsd_tolerance"] == 1.6 and summary["distance_unit"] == "mm"
    table = tables.score_table(summary)
    assert "nsd (1.6 mm)" in table and "hd95 (mm)" in table


def test_tables_say_that_one_case_has_no_interval(tmp_path):
    summary = metrics.summarise(rows_of({"a": [(HALF, SQUARE)]}, ["polyp"]), ["polyp"])
    for text in (tables.score_table(summary), tables.study_table({"p1": summary})):
        assert "0.6667 [no interval]" in text.replace("  [", " [") and "n=1" in text
    assert "n = 1: one case has no interval" in tables.score_table(summary)
    tables.write_json(tmp_path / "summary.json", summary)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["dice"]["low"] is None and written["dice"]["high"] is None


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan", "inf", "2mm"])
def test_an_nsd_tolerance_that_is_none_is_one_line(tolerance, demo, tmp_path, monkeypatch, capsys):
    arguments = "--data", demo, "--out", tmp_path / "run", "--nsd-tolerance", tolerance
    code, _, err = command(monkeypatch, capsys, train, *arguments)
    assert code == 2 and "--nsd-tolerance" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_nsd_tolerance_where_nothing_is_measured(demo, tmp_path, monkeypatch, capsys):
    arguments = "--data", demo, "--out", tmp_path / "run", "--nsd-tolerance", 2, "--prompt-study"
    code, _, err = command(monkeypatch, capsys, train, *arguments, "--model", "clipseg")
    assert code == 2
    assert err == "error: --nsd-tolerance: has no effect with these options; remove it\n"


def test_specificity_of_images_without_foreground():
    """Four patients, one with a lesion; in one of the three healthy ones something is found."""
    none = np.zeros_like(SQUARE)
    ill = {"ill": [(HALF, SQUARE)]}
    healthy = {"a": [(none, none)], "b": [(HALF, none)], "c": [(none, none)]}
    summary = metrics.summarise(rows_of(ill | healthy, ["polyp"]), ["polyp"])
    assert (summary["empty_images"], summary["false_alarms"]) == (3, 1)
    assert summary["image_specificity"] == pytest.approx(2 / 3)
    assert summary["misses"] == 1
    line = "false alarms: 1 of 3 images without foreground, specificity of images 0.6667"
    assert line in tables.score_table(summary)

    summary = metrics.summarise(rows_of(ill, ["polyp"]), ["polyp"])
    assert "image_specificity" not in summary
    assert "without foreground" not in tables.score_table(summary)


def test_several_classes_without_any_foreground():
    """Nothing predicted is right: 1, not nan; of four masks one is a false alarm: 3/4."""
    none = np.zeros_like(SQUARE)
    names = ["polyp", "tool"]
    clean = {"a": [(none, none), (none, none)], "b": [(none, none), (none, none)]}
    summary = metrics.summarise(rows_of(clean, names), names)
    assert summary["dice"]["mean"] == 1 and summary["image_specificity"] == 1
    alarm = clean | {"b": [(HALF, none), (none, none)]}
    summary = metrics.summarise(rows_of(alarm, names), names)
    assert summary["dice"]["mean"] == 0.75 and summary["image_specificity"] == 0.5
    assert summary["classes"]["polyp"]["dice"]["mean"] == 0.5
    assert tables.score_table(summary)
