"""Losses, each written out.

All want float32 (or float64) logits and probabilities, and the Dice losses refuse others with a
ValueError. In float16 a sum over more than 65,504 pixels is infinite: Dice would be 1 whatever the
prediction, and cross entropy NaN. In bfloat16 sums keep three digits. Under autocast, convert first
(`logits.float()`), as the training loop does.

Soft Dice has many spellings; ours, per image and class, with p the probability and t the target, is

    dice_loss = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)

with sums over the pixels of one image (V-Net, Milletari et al., arXiv 1606.04797, but with plain
instead of squared sums in the denominator). With smooth = 1 the loss of an empty mask falls to 0 as
sum(p) does.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import generate_binary_structure, minimum_filter
from torch import Tensor


def check_precision(x: Tensor) -> None:
    """Raise ValueError if x is in half precision, in which sums over pixels overflow or round."""
    if x.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"losses need float32 or float64, got {x.dtype}; convert with .float()")


def dice_loss(p: Tensor, t: Tensor, smooth: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Probabilities and targets in 0..1, (B,C,*S) -> loss per image and class (B,C).

    `keep`, of a shape that broadcasts to theirs, is 0 where a pixel does not count. Raises
    ValueError if p is in half precision.
    """
    check_precision(p)
    if keep is not None:
        p, t = p * keep, t * keep
    p, t = p.flatten(2), t.flatten(2)  # (B,C,N)
    return 1 - (2 * (p * t).sum(2) + smooth) / (p.sum(2) + t.sum(2) + smooth)


def dice_bce(
    logits: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + binary cross entropy for one or several binary masks an image.

    logits (B,C,*S); target (B,C,*S), 0 or 1, 255 where a pixel does not count. Dice is the mean
    over images and masks, cross entropy that over images of the mean over their pixels that count.
    Returns the sum, and its parts by name.
    """
    keep = (target != 255).to(logits.dtype)
    target = target.to(logits.dtype) * keep
    dice = dice_loss(logits.sigmoid(), target, smooth, keep).mean()
    bce = F.binary_cross_entropy_with_logits(logits, target, weight=keep, reduction="none")
    bce = (bce.flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1)).mean()
    return dice + bce, {"dice_loss": dice, "bce": bce}


def to_one_hot(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Class numbers (B,*S) -> (B,K,*S) of 0 and 1, as logits (B,K,*S) are; ignored: as class 0."""
    classes = torch.where(target == ignore_index, 0, target)
    return F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (B,K,*S)


def gi_tract_dice_ce(
    logits: Tensor, target: Tensor, smooth: float = 1e-8
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + cross entropy of the GI-tract study, shapes as for `dice_ce`.

    github.com/JaeL17/Medical-Image-Segmentation. quirk: every class counts in every image, the
    background too, and with smooth 1e-8 one that is absent costs nearly 1 until the network's
    probability of it, summed over the image, falls below 1e-8. The mean over images and classes is
    then no better than the share of absent pairs. With smooth 1e-5 it is MONAI's DiceCELoss. The
    study's masks have no 255: pixels of it count nowhere, as in `dice_ce`.
    """
    one_hot = to_one_hot(target, logits, 255)
    keep = (target != 255)[:, None].to(logits.dtype)
    dice = dice_loss(logits.softmax(1), one_hot, smooth, keep).mean()
    ce = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
    ce = ce / keep.sum().clamp(min=1)
    return dice + ce, {"dice_loss": dice, "ce": ce}


def dice_ce(
    logits: Tensor, target: Tensor, smooth: float = 1.0, ignore_index: int = 255
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + cross entropy for class maps; class 0 is the background and has no Dice term.

    logits (B,K,*S); target (B,*S) int64 of class numbers, `ignore_index` where a pixel does not
    count. Dice is the mean over all foreground classes that the images hold (each class in each
    image is one term); cross entropy is the mean over the pixels that count. Returns the sum, and
    its parts by name.
    """
    one_hot = to_one_hot(target, logits, ignore_index)  # (B,K,*S)
    keep = (target != ignore_index)[:, None].to(logits.dtype)
    present = (one_hot * keep).flatten(2).sum(2)[:, 1:] > 0  # (B,K-1)
    dice = dice_loss(logits.softmax(1), one_hot, smooth, keep)[:, 1:]
    dice = (dice * present).sum() / present.sum().clamp(min=1)
    ce = F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="sum"
    ) / keep.sum().clamp(min=1)
    return dice + ce, {"dice_loss": dice, "ce": ce}


def partial_dice_bce(
    logits: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + binary cross entropy of classes that are not annotated in every image.

    logits (B,C,*S); target (B,C,*S) of integers: 0 or 1, 255 where a voxel does not count, -1 in
    all of a class of an image that is not annotated for it. Such a pair of image and class has no
    part in the loss, nor a gradient; the others count alike (Liu et al., ICCV 2023, arXiv
    2301.00785, equation 3; their Dice has `smooth` in the denominator alone). Returns the sum, and
    its parts by name.
    """
    annotated = target.flatten(2)[..., 0] >= 0  # (B,C)
    if not annotated.any():  # nothing to learn: 0, without a gradient
        nothing = 0 * logits.sum()
        return nothing, {"dice_loss": nothing, "bce": nothing}
    logits, target = logits[annotated][:, None], target[annotated][:, None]  # (n,1,*S)
    return dice_bce(logits, target, smooth)


def sam_loss(
    logits: Tensor, iou: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + binary cross entropy of each prompt's mask, and a lesson for the head that rates it.

    logits (...,H,W), one mask a prompt; iou (...), its IoU as SAM's head predicts it; target
    (...,H,W), 0 or 1, 255 where a pixel does not count. No mask's loss depends on other prompts.
    The head is to tell the IoU of the thresholded mask (Kirillov et al., arXiv 2304.02643,
    appendix A; they have focal loss for our cross entropy); 1 where both masks are empty. A mask of
    255 alone teaches nothing. Returns the sum, and its parts by name.
    """
    logits, target = (x.flatten(0, -3)[:, None] for x in (logits, target))  # (B*Q,1,H,W)
    loss, parts = dice_bce(logits, target, smooth)
    mask, truth, keep = (x.flatten(1) for x in (logits > 0, target == 1, target != 255))
    both, either = ((x & keep).sum(1) for x in (mask & truth, mask | truth))  # (B*Q,)
    actual = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    rated = keep.any(1).to(iou.dtype)  # (B*Q,)
    squares = (iou.flatten() - actual.to(iou.dtype)).square() * rated
    mse = squares.sum() / rated.sum().clamp(min=1)
    return loss + mse, parts | {"iou_mse": mse}


# --- topology -------------------------------------------------------------------------------------


def soft_skeleton(x: Tensor, iterations: int) -> Tensor:
    """Values in 0..1, (B,C,H,W) -> their centre lines, (B,C,H,W); Shit et al., algorithm 1.

    What an opening removes is thin; each erosion makes thicker parts thin. `iterations` must reach
    half the largest thickness in pixels, or the middle of thick parts is missed.
    """
    skeleton = torch.zeros_like(x)
    for _ in range(iterations + 1):
        tall, wide = F.max_pool2d(-x, (3, 1), 1, (1, 0)), F.max_pool2d(-x, (1, 3), 1, (0, 1))
        eroded = -torch.maximum(tall, wide)  # the smallest of a pixel and its 4 neighbours
        thin = F.relu(x - F.max_pool2d(eroded, 3, 1, 1))
        skeleton = skeleton + F.relu(thin - skeleton * thin)
        x = eroded
    return skeleton


def cldice_loss(
    p: Tensor, t: Tensor, iterations: int = 10, smooth: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """1 - clDice (Shit et al., CVPR 2021, arXiv 2003.07311): is each centre line in the other mask?

    Probabilities and targets in 0..1, (B,C,H,W), and `keep` as for `dice_loss` -> loss per image
    and class (B,C). `iterations` as for `soft_skeleton`. Beside `topological_loss` the one that is
    pooling alone and never leaves the GPU (on the CPU it is the dearer one), but it adds up how
    much of the lines is missed or invented, whether or not that tears or joins anything. Raises
    ValueError if p is in half precision.
    """
    check_precision(p)
    if keep is not None:
        p, t = p * keep, t * keep
    lines_p, lines_t = (soft_skeleton(x, iterations).flatten(2) for x in (p, t))  # (B,C,N)
    p, t = p.flatten(2), t.flatten(2)
    precision = ((lines_p * t).sum(2) + smooth) / (lines_p.sum(2) + smooth)
    sensitivity = ((lines_t * p).sum(2) + smooth) / (lines_t.sum(2) + smooth)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def _edges(x: np.ndarray, diagonal: bool) -> np.ndarray:
    """Values of x (H,W) at the two ends of each edge between neighbouring pixels, (2,E)."""
    ends = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1])]
    if diagonal:
        ends += [(x[1:, 1:], x[:-1, :-1]), (x[1:, :-1], x[:-1, 1:])]
    return np.hstack([np.stack([a.ravel(), b.ravel()]) for a, b in ends])


def _merges(x: np.ndarray, diagonal: bool) -> np.ndarray:
    """Minima of x (H,W) and where their basins meet an older one, (n,2) flat indices.

    Union-find over pixels in the order of their values, but only where it can matter: each pixel
    first runs down to a minimum, and only edges between two basins can join components. Equal
    values are ordered by position.
    """
    order = x.argsort(axis=None, kind="stable")  # rank -> pixel
    rank = np.empty(x.shape, np.int64)
    rank.flat[order] = np.arange(x.size)
    reach = generate_binary_structure(2, 2 if diagonal else 1)
    basin = minimum_filter(rank, footprint=reach, mode="nearest").flat[order]  # one step down
    while (basin[basin] != basin).any():
        basin = basin[basin]
    ends = _edges(rank, diagonal)  # all in ranks from here on
    edges = np.stack([*basin[ends], np.maximum(*ends)])  # (3,E): two basins, where they meet
    edges = edges[:, edges[0] != edges[1]]
    edges = edges[:, edges[2].argsort(kind="stable")]
    older, pairs = list(range(x.size)), []
    for a, b, meet in zip(*edges.tolist(), strict=True):
        while older[a] != a:
            older[a] = a = older[older[a]]  # halves the path
        while older[b] != b:
            older[b] = b = older[older[b]]
        if a != b:
            a, b = min(a, b), max(a, b)
            older[b] = a  # the younger component ends here
            pairs.append((b, meet))
    return order[np.array(pairs, np.int64).reshape(-1, 2)]  # (n,2)


def persistence_pairs(x: np.ndarray, dim: int, shortest: float = 0.0) -> np.ndarray:
    """Where components (dim 0) or loops (dim 1) of {x <= c} begin and end as c rises.

    x float (H,W) -> int64 (n,2), flat indices of the pixels whose values are birth and death, of
    all pairs that live longer than `shortest`. Pixels are squares, so the sets are 8-connected
    (cubical complexes by top cells, as gudhi's). In dim 0 the last pair is the component that never
    ends, said to end at the highest pixel. A loop encloses a bounded component of {x > c}, which is
    4-connected: by duality dim 1 is dim 0 of -x, where those that touch the border are not bounded
    and belong to a frame that is older than all.
    """
    if dim == 0:
        ends = [[x.argmin(), x.argmax()]]
        pairs = np.concatenate([_merges(x, diagonal=True), ends])
    else:
        pairs = _merges(np.pad(-x, 1, constant_values=-np.inf), diagonal=False)[:, ::-1]
        row, column = np.divmod(pairs, x.shape[1] + 2)  # none lies in the frame: it is one basin
        pairs = (row - 1) * x.shape[1] + column - 1
    birth, death = x.flat[pairs].T
    return pairs[death - birth > shortest]


def _match(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The cheapest matching of diagrams a (n,2), b (m,2) -> rows of a, of b, cost of b's others.

    A match costs the squared L-infinity distance, a point left alone that to the diagonal. Only
    matches cheaper than leaving both points alone are made.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and few need it

    alone_a, alone_b = (((d[:, 1] - d[:, 0]) / 2) ** 2 for d in (a, b))
    gain = np.abs(a[:, None] - b).max(2) ** 2 - alone_a[:, None] - alone_b  # (n,m)
    i, j = linear_sum_assignment(np.minimum(gain, 0))
    i, j = i[gain[i, j] < 0], j[gain[i, j] < 0]
    return i, j, np.delete(alone_b, j).sum()


def _squared_wasserstein(x: Tensor, y: Tensor, dims, shortest: float = 0.0) -> Tensor:
    """Squared 2-Wasserstein distance of the persistence diagrams of maps (B,C,H,W) -> (B,C,dims).

    The matching is made on the CPU, all maps in one transfer; gradients reach x through the values
    of its critical pixels alone, as if the matching were fixed.
    """
    B, C, H, W = x.shape
    maps = torch.stack([x.detach(), y.to(x)]).flatten(1, 2).cpu().double().numpy()  # (2,B*C,H,W)
    found, rest = [], []
    for n, (ours, theirs) in enumerate(zip(*maps, strict=True)):
        for dim in dims:
            pairs = persistence_pairs(ours, dim, shortest)  # (n,2)
            a, b = ours.flat[pairs], theirs.flat[persistence_pairs(theirs, dim, shortest)]
            i, j, cost = _match(a, b)
            goals, matched = np.zeros_like(a), np.zeros(len(a), bool)
            goals[i], matched[i] = b[j], True
            found.append((n * H * W + pairs, goals, matched, np.full(len(a), len(rest))))
            rest.append(cost)
    where, goals, matched, owner = (
        torch.from_numpy(np.concatenate(x)) for x in zip(*found, strict=True)
    )
    points = x.flatten()[where.to(x.device)].cpu()  # (N,2), all diagrams of x in a row
    apart = (points - goals.to(x.dtype)).abs().amax(1)
    cost = torch.where(matched, apart, (points[:, 1] - points[:, 0]) / 2) ** 2
    total = torch.tensor(rest, dtype=x.dtype).index_add(0, owner, cost)
    return total.view(B, C, len(dims)).to(x.device)


def topological_loss(p: Tensor, t: Tensor, size: int = 64, shortest: float = 0.01) -> Tensor:
    """How far islands and holes of the probability are from the target's: a scalar.

    p (B,C,H,W) probabilities; t (B,C,H,W), 0 or 1, 255 where a pixel does not count. The mean over
    masks of the squared 2-Wasserstein distance between persistence diagrams (Hu et al., NeurIPS
    2019), in which a surplus or lacking island or hole of full contrast costs 1/4. Pairs that live
    no longer than `shortest` are noise and cost nothing. How many there are counts, not where: a
    loss of pixels must stand beside it.

    What differs from `oct_topological_loss`, and why:
    - Maps shrink to at most `size` by their maximum. It keeps a connected mask connected, where
      the study's 50x50 samples make 13 islands of a layer 3 pixels thick.
    - The diagrams are those of 1 - p, so that the foreground is 8-connected (as components for
      prompts are) and touching the border makes no difference. The study's loops do not see what
      touches it: a layer across the image, one torn in two and an empty mask are all the same.
    - A ring of background around the map, so that the island which never ends lives from the
      highest p to 0, and an empty prediction lacks it.
    - Islands and holes count, not islands alone.
    - Squares have a gradient everywhere; the study's root has none where diagrams agree.
    """
    keep, size = t != 255, [min(size, n) for n in p.shape[2:]]
    p, t = (F.adaptive_max_pool2d(x.to(p) * keep, size) for x in (p, t))  # (B,C,h,w)
    x, y = (F.pad(1 - m, (1, 1, 1, 1), value=1.0) for m in (p, t))  # (B,C,h+2,w+2)
    return _squared_wasserstein(x, y, (0, 1), shortest).sum(2).mean()


def oct_topological_loss(p: Tensor, t: Tensor, size: int | None = 50, dims=(1,)) -> Tensor:
    """The topological loss of the OCT study, weight 0.1 in it: a scalar.

    github.com/philippendres/DILabHelmholtzOCT, octsam/models/topological_loss.py. p (B,C,H,W)
    probabilities, t (B,C,H,W) 0 or 1. size: of the maps that are compared; None: as they are.
    dims: (1,) is the study's feat_d = 1. Its five faults are listed at `topological_loss`; one is
    mended, since it ends a training: where diagrams agree the gradient is 0, not nan.
    """
    t = t.to(p)
    if size:  # quirk: samples, not means, of the pixels (bilinear without antialiasing)
        p, t = (F.interpolate(x, (size, size), mode="bilinear", align_corners=True) for x in (p, t))
    # quirk: sublevel sets of p itself, whose loops are islands off the border, whose components
    # are the pieces of background.
    squared = _squared_wasserstein(p, t, dims)  # (B,C,dims)
    # quirk: axes of length 1 are squeezed away; roots are averaged over the first axis that is
    # left, the squares added up over all others.
    first = next((n for n in p.shape[:2] if n > 1), len(dims))
    squared = squared.reshape(first, -1).sum(1)
    root = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)  # the root of 0: gradient 0
    return 0.1 * root.mean()
