"""Topological losses and SAM's: the study's numbers, gudhi, monai, the cost of tears and holes."""

import json
from itertools import combinations, permutations
from pathlib import Path

import gudhi
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import SoftclDiceLoss
from monai.metrics import compute_average_precision
from scipy.ndimage import gaussian_filter

import losses
import metrics
from losses import cldice_loss, oct_topological_loss, persistence_pairs, sam_loss, topological_loss

pytestmark = pytest.mark.numeric

GOLDEN = np.load(Path(__file__).parent / "golden" / "topo_loss.npz")
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["meta"]))["cases"]}


# --- the study's numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_the_study(name):
    """In close_50 gudhi gives the gradient to a pixel of nearly equal value; so do we, as it is."""
    p = torch.tensor(GOLDEN[f"in/{name}/pred"], requires_grad=True)
    t = torch.tensor(GOLDEN[f"in/{name}/true"])
    dims = {0: (0,), 1: (1,), -1: (0, 1)}[CASES[name]["feat_d"]]
    loss = oct_topological_loss(p, t, CASES[name]["interp"] or None, dims)
    loss.backward()
    expected = torch.tensor(GOLDEN[f"out/{name}/grad"])
    assert loss.item() == pytest.approx(float(GOLDEN[f"out/{name}/loss"]), rel=1e-5)
    torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def diagrams():
    """(map, dim, diagram) of every golden map that the study did not shrink first."""
    for key in GOLDEN.files:
        parts = key.split("/")
        if len(parts) == 6 and CASES[parts[1]]["interp"] == 0:
            _, name, which, b, c, dim = parts
            x = GOLDEN[f"in/{name}/{which.removeprefix('diagram_')}"][int(b), int(c)]
            yield x.astype(np.float32), int(dim[1]), GOLDEN[key]


def test_diagrams_equal_those_of_the_study():
    """Targets have ties everywhere: the values must agree, whatever pixels they are at."""
    cases = list(diagrams())
    for x, dim, expected in cases:
        pairs = persistence_pairs(x, dim)[: -1 if dim == 0 and np.ptp(x) else None]
        ours = x.flat[pairs]
        assert ours.shape == expected.shape
        np.testing.assert_array_equal(ours[np.lexsort(ours.T)], expected[np.lexsort(expected.T)])
    assert len(cases) == 44  # 11 masks, prediction and truth, two dimensions


# --- pairs and matching ---------------------------------------------------------------------------


def by_gudhi(x):
    """Pairs of flat indices by dimension, and the pixel where the endless component begins."""
    complex_ = gudhi.CubicalComplex(dimensions=x.shape[::-1], top_dimensional_cells=x.ravel())
    complex_.persistence()
    pairs, endless = complex_.cofaces_of_persistence_pairs()
    return [
        np.reshape(pairs[d], (-1, 2)) if d < len(pairs) else np.empty((0, 2)) for d in (0, 1)
    ], endless[0][0]


def rows(pairs):
    return sorted(map(tuple, np.asarray(pairs).tolist()))


@pytest.mark.parametrize("seed", range(100))
def test_pairs_equal_gudhi(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(rng.integers(1, 41, 2))
    x = gaussian_filter(x, rng.uniform(0, 3)) if seed % 2 else x
    (components, loops), endless = by_gudhi(x)
    ours = persistence_pairs(x, 0)
    if x.size > 1:
        assert ours[-1].tolist() == [endless, x.argmax()]
    assert rows(ours[:-1]) == rows(components)
    assert rows(persistence_pairs(x, 1)) == rows(loops)


@pytest.mark.parametrize("seed", range(20))
def test_diagrams_equal_gudhi_where_values_repeat(seed):
    """Pixels of equal value make other pixels critical; births and deaths stay the same."""
    x = np.random.default_rng(seed).integers(0, 2 + seed // 4, (17, 23)) / 4
    expected, _ = by_gudhi(x)
    for dim in (0, 1):
        ours = x.flat[persistence_pairs(x, dim)[: -1 if dim == 0 else None]]
        theirs = x.flat[expected[dim].astype(int)]
        assert rows(ours) == rows(theirs[theirs[:, 0] < theirs[:, 1]])


def test_short_lives_are_left_out():
    x = np.array([[0.0, 0.5, 0.4, 0.9, 0.2]])
    assert x.flat[persistence_pairs(x, 0)].tolist() == [[0.4, 0.5], [0.2, 0.9], [0.0, 0.9]]
    assert x.flat[persistence_pairs(x, 0, 0.2)].tolist() == [[0.2, 0.9], [0.0, 0.9]]


def cheapest(a, b):
    """The cost of the best of all matchings, by trying them."""
    alone = [((d[:, 1] - d[:, 0]) / 2) ** 2 for d in (a, b)]
    best = np.inf
    for k in range(min(len(a), len(b)) + 1):
        for i in combinations(range(len(a)), k):
            for j in permutations(range(len(b)), k):
                cost = sum(np.abs(a[m] - b[n]).max() ** 2 for m, n in zip(i, j, strict=True))
                rest = np.delete(alone[0], i).sum() + np.delete(alone[1], j).sum()
                best = min(best, cost + rest)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_matching_is_the_cheapest(seed):
    rng = np.random.default_rng(seed)
    a, b = (np.sort(rng.random((rng.integers(0, 5), 2)), axis=1) for _ in range(2))
    i, j, rest = losses.match_diagrams(a, b)
    alone = np.delete(((a[:, 1] - a[:, 0]) / 2) ** 2, i).sum()
    matched = (np.abs(a[i] - b[j]).max(1) ** 2).sum() if len(i) else 0
    assert matched + alone + rest == pytest.approx(cheapest(a, b))


# --- what costs what ------------------------------------------------------------------------------


def maps(*shapes):
    return torch.stack([torch.as_tensor(s, dtype=torch.float32) for s in shapes])[:, None]


def ring(n=64, inner=10, outer=18):
    y, x = np.mgrid[:n, :n] - n / 2
    return (np.hypot(y, x) >= inner) & (np.hypot(y, x) <= outer), np.hypot(y, x) <= outer


def band(n=64, top=28, bottom=34, gap=0):
    mask = np.zeros((n, n), bool)
    mask[top:bottom] = True
    mask[:, 30 : 30 + gap] = False
    return mask


def cost(p, t, high=1.0, **how):
    return topological_loss(maps(p) * high, maps(t), **how).item()


def test_costs_by_hand():
    """A tear or a hole of full contrast costs (1/2)^2; a peak of 0.9 instead of 1 costs 0.1^2."""
    whole, torn = band(), band(gap=4)
    (hollow, filled), empty = ring(), np.zeros((64, 64))
    assert cost(whole, whole) == cost(hollow, hollow) == cost(empty, empty) == 0
    assert cost(torn, whole) == cost(whole, torn) == 0.25
    assert cost(filled, hollow) == cost(hollow, filled) == 0.25
    assert cost(empty, whole) == cost(whole, empty) == 0.25
    assert cost(empty, hollow) == 0.5
    assert cost(whole, whole, 0.9) == pytest.approx(0.01)
    assert cost(hollow, hollow, 0.9) == pytest.approx(0.02)
    full = empty + 1  # the ring around it is what makes it an island
    assert cost(empty, full) == 0.25 and cost(full, full, 0.9) == pytest.approx(0.01)
    both = topological_loss(maps(torn, whole), maps(whole, whole))
    assert both.item() == 0.125


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("high", [0.6, 0.8, 1.0])
def test_what_is_torn_or_filled_costs_more_than_what_is_right(seed, high):
    noise = np.random.default_rng(seed).uniform(0, 0.1, (64, 64))
    hollow, filled = ring()
    right, wrong = (cost(np.maximum(m * high, noise), band()) for m in (band(), band(gap=3)))
    assert wrong > right + 0.05
    right, wrong = (cost(np.maximum(m * high, noise), hollow) for m in (hollow, filled))
    assert wrong > right + 0.05


def test_the_study_does_not_see_a_torn_layer():
    """Why the default differs: what touches the border has no loop."""
    study = [oct_topological_loss(maps(m), maps(band())) for m in (band(), band(gap=3), band() * 0)]
    assert study == [0, 0, 0]


@pytest.mark.parametrize("thickness", [3, 6, 10])
def test_a_thin_layer_stays_one_island(thickness):
    """Samples of it are many: 13, 17 and 17 of the study's wavy layer."""
    y, x = np.mgrid[:496, :512]
    layer = maps(np.abs(y - 250 - 60 * np.sin(x / 40)) < thickness / 2)
    assert (
        topological_loss(layer * torch.tensor(np.abs(x - 250) > 12), layer) == 0.25
    )  # at full contrast
    small = F.adaptive_max_pool2d(layer, 64)
    assert len(persistence_pairs(1 - small[0, 0].numpy(), 0)) == 1
    samples = F.interpolate(layer, (50, 50), mode="bilinear", align_corners=True)
    assert len(persistence_pairs(np.pad(samples[0, 0].numpy(), 1), 1)) > 5


def test_diagonal_neighbours_are_one_island():
    line = np.eye(64)
    assert len(persistence_pairs(1 - line, 0)) == 1
    assert cost(np.maximum(line, np.eye(64, k=1)), line) == 0


def test_pixels_that_do_not_count_cost_nothing():
    p, t = maps(band()), maps(band())
    p[..., 50:, 10:20], t[..., 40:, :] = 1, 255
    p.requires_grad_()
    loss = topological_loss(p, t)
    loss.backward()
    assert loss == 0 and not p.grad[..., 40:, :].any()


def test_small_and_oblong_maps_are_not_enlarged():
    p, t = np.zeros((30, 100)), np.zeros((30, 100))
    p[10:12, 5:90], t[10:12, 5:90] = 1, 1
    p[10:12, 50:56] = 0
    assert cost(p, t) == 0.25 and cost(t, t) == 0
    for column in range(1, 49):  # a tear of one pixel would close in larger maps
        p, t = np.zeros((50, 50)), np.zeros((50, 50))
        p[20:23], t[20:23] = 1, 1
        p[20:23, column] = 0
        assert cost(p, t) == 0.25


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [topological_loss, oct_topological_loss])
@pytest.mark.parametrize("shape", ["band", "ring", "empty", "full"])
def test_gradients_are_finite_where_diagrams_agree(loss, shape):
    t = {"band": band(), "ring": ring()[0], "empty": band() & False, "full": band() | True}[shape]
    p = maps(t).requires_grad_()
    value = loss(p, maps(t))
    value.backward()
    assert value == 0 and p.grad.isfinite().all()


def test_gradients_reach_critical_pixels_alone():
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal((64, 64)), 3)
    p = maps((smooth - smooth.min()) / np.ptp(smooth)).requires_grad_()
    topological_loss(p, maps(band())).backward()
    x = np.pad(1 - p.detach()[0, 0].numpy(), 1, constant_values=1)
    critical = np.zeros(x.size, bool)
    for dim in (0, 1):
        critical[persistence_pairs(x, dim, 0.01).ravel()] = True
    critical = critical.reshape(x.shape)[1:-1, 1:-1]
    touched = p.grad[0, 0].numpy() != 0
    assert touched.any() and not (touched & ~critical).any()


@pytest.mark.parametrize("loss", [topological_loss, oct_topological_loss])
def test_gradients_equal_differences(loss):
    p = torch.rand(2, 2, 4, 6, generator=torch.manual_seed(0), dtype=torch.float64)
    t = (torch.rand(2, 2, 4, 6, generator=torch.manual_seed(1)) > 0.6).double()
    assert torch.autograd.gradcheck(lambda p: loss(p, t, 6), p.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_descent_joins_what_is_torn(seed):
    """One island again: where the bridge is, the diagram does not say (seed 2: beside the band)."""
    noise = torch.randn(1, 1, 64, 64, generator=torch.manual_seed(seed))
    logits = (maps(band(gap=2)) * 8 - 4 + 0.01 * noise).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        topological_loss(logits.sigmoid(), maps(band())).backward()
        optimiser.step()
    p = logits.detach().sigmoid()
    assert metrics.betti_numbers((maps(band(gap=2)) > 0.5)[0, 0].numpy()) == (2, 0)
    assert len(persistence_pairs(1 - p[0, 0].numpy(), 0, 0.5)) == 1
    assert topological_loss(p, maps(band())) < 0.01


# --- clDice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_cldice_equals_monai(iterations):
    p = torch.rand(3, 1, 40, 33, dtype=torch.float64)
    t = (torch.rand(3, 1, 40, 33) > 0.4).double()
    monai = SoftclDiceLoss(iter_=iterations, smooth=1e-15, reduction="none")(p, t)
    torch.testing.assert_close(cldice_loss(p, t, iterations)[:, 0], monai, rtol=1e-12, atol=1e-14)


def test_cldice_counts_lines_not_areas():
    whole, torn = maps(band()), maps(band(gap=8))
    thick = maps(band(top=26, bottom=36))
    assert cldice_loss(whole, whole).item() == pytest.approx(0, abs=1e-6)
    assert cldice_loss(torn, whole) > 0.05 and cldice_loss(thick, whole) < 0.02


def test_cldice_leaves_out_what_does_not_count():
    p, t = torch.rand(2, 3, 20, 20), (torch.rand(2, 3, 20, 20) > 0.5).float()
    keep = torch.ones(2, 1, 20, 20)
    keep[..., 12:] = 0
    other = torch.where(keep > 0, p, 1 - p)
    torch.testing.assert_close(cldice_loss(p, t, keep=keep), cldice_loss(other, t, keep=keep))
    assert cldice_loss(p, t, keep=keep).shape == (2, 3)
    p, t = p[:1, :1, :6, :7].double().requires_grad_(), t[:1, :1, :6, :7].double()
    assert torch.autograd.gradcheck(lambda p: cldice_loss(p, t, 2), p)


# --- SAM ------------------------------------------------------------------------------------------


def test_sam_loss_by_hand():
    logits = torch.tensor([[[9.0, 9.0, -9.0, -9.0]], [[-9.0, -9.0, 9.0, -9.0]]])[:, None]
    target = torch.tensor([[[1, 0, 1, 0]], [[0, 0, 255, 0]]])[:, None]
    iou = torch.tensor([[0.5], [0.25]], requires_grad=True)
    loss, parts = sam_loss(logits, iou, target)  # actual IoU: 1/3, and 1 where both are empty
    mse = ((0.5 - 1 / 3) ** 2 + 0.75**2) / 2
    assert parts["iou_mse"].item() == pytest.approx(mse)
    dice, bce = losses.dice_bce(logits, target)[1].values()
    torch.testing.assert_close(loss, dice + bce + parts["iou_mse"])
    loss.backward()
    assert iou.grad.flatten().tolist() == pytest.approx([0.5 - 1 / 3, -0.75])


def test_sam_loss_of_a_mask_does_not_depend_on_other_prompts():
    logits, iou = torch.randn(2, 3, 1, 8, 9).double(), torch.rand(2, 3, 1).double()
    target = (torch.rand(2, 3, 8, 9) > 0.5).long()
    target[0, 1, :3] = 255
    each = [
        sam_loss(logits[b : b + 1, q], iou[b : b + 1, q], target[b : b + 1, q])[0]
        for b in range(2)
        for q in range(3)
    ]
    together = sam_loss(logits, iou, target)[0]
    # float32 sums over pixels, of three masks or of one: another order of adding
    torch.testing.assert_close(together, torch.stack(each).mean(), rtol=1e-5, atol=0)


def test_the_iou_head_learns_only_from_its_own_part():
    logits = torch.randn(4, 1, 8, 8, requires_grad=True)
    _, parts = sam_loss(logits, torch.rand(4, 1, requires_grad=True), torch.ones(4, 1, 8, 8))
    (through,) = torch.autograd.grad(parts["iou_mse"], logits, allow_unused=True)
    assert through is None


# --- metrics --------------------------------------------------------------------------------------


def test_betti_numbers_by_hand():
    (hollow, filled), empty = ring(), np.zeros((64, 64), bool)
    assert metrics.betti_numbers(empty) == (0, 0)
    assert metrics.betti_numbers(~empty) == metrics.betti_numbers(filled) == (1, 0)
    assert metrics.betti_numbers(hollow) == (1, 1)
    assert metrics.betti_numbers(hollow[:32]) == (1, 0)  # half a ring on the border shuts off none
    diamond = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)  # joined and shut by its corners
    assert metrics.betti_numbers(diamond) == (1, 1)
    assert metrics.betti_error(band(gap=4), band()) == {"betti0_error": 1, "betti1_error": 0}
    assert metrics.betti_error(empty, hollow) == {"betti0_error": 1, "betti1_error": 1}
    with pytest.raises(ValueError, match="bool"):
        metrics.betti_error(empty.astype(int), hollow)


@pytest.mark.parametrize("seed", range(20))
def test_betti_numbers_obey_euler(seed):
    """Islands - holes = corners - sides + pixels, of pixels as closed squares."""
    mask = np.random.default_rng(seed).random((13, 19)) > seed / 20
    m = np.pad(mask, 1)
    down, right = m[1:] | m[:-1], m[:, 1:] | m[:, :-1]
    corners = down[:, 1:] | down[:, :-1]
    islands, holes = metrics.betti_numbers(mask)
    assert islands - holes == corners.sum() - down.sum() - right.sum() + m.sum()
    x = np.pad(1.0 - mask, 1, constant_values=1.0)  # and as many pairs of full contrast
    assert [len(persistence_pairs(x, dim)) for dim in (0, 1)] == [islands, holes]


def test_average_precision_by_hand():
    p, truth = np.array([[0.9, 0.8], [0.7, 0.1]]), np.array([[True, False], [True, False]])
    assert metrics.average_precision(p, truth) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.average_precision(p * 0, truth) == 0.5  # one threshold: the share of truth
    assert metrics.average_precision(p, truth, p != 0.8) == 1
    assert metrics.average_precision(p, truth | True) == 1
    assert np.isnan(metrics.average_precision(p, truth & False))


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_equals_monai(seed):
    rng = np.random.default_rng(seed)
    p = rng.random((7, 11)).round(1 + seed % 3)  # with and without equal values
    truth = rng.random((7, 11)) < p * 0.7
    y = torch.tensor(truth.ravel()).long()
    monai = compute_average_precision(torch.tensor(p.ravel()), y)
    assert metrics.average_precision(p, truth) == pytest.approx(monai, rel=1e-12)
