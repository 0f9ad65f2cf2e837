"""metrics.py against monai, scipy and numbers computed by hand."""

import json

import numpy as np
import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from scipy.ndimage import gaussian_filter
from scipy.stats import bootstrap

import metrics

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
    for row, p, t in zip(rows, pred, truth, strict=True):
        expected = metrics.overlap(p, t) | metrics.distances(p, t, (2, 1), 2)
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


def test_interval_equals_scipy():
    values = np.random.default_rng(1).beta(8, 2, 80)
    ours = metrics.mean_ci(values, resamples=20000)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=0)
    low, high = theirs.confidence_interval
    assert ours["mean"] == pytest.approx(values.mean()) and ours["n"] == 80
    assert [ours["low"], ours["high"]] == pytest.approx([low, high], abs=0.03 * (high - low))


def test_interval_is_seeded_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(2)
    values = rng.random(60)
    first = metrics.mean_ci(values)
    metrics._draws.cache_clear()
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


def test_no_warning_from_50_cases_on():
    for count, warned in ((49, True), (50, False)):
        rows = rows_of({f"{i}": [(SQUARE, SQUARE)] for i in range(count)}, ["polyp"])
        assert ("warning" in metrics.summarise(rows, ["polyp"])) == warned


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
