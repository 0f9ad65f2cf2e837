"""Losses, each written out.

All of them take float32 (or float64) logits or probabilities; the Dice losses raise ValueError for
half precision. In float16 a sum over more than 65,504 pixels is infinite: Dice would be 1 whatever
the prediction, and cross entropy NaN. In bfloat16 sums keep three digits. Under autocast, convert
first (`logits.float()`), as the training loop does.

Soft Dice has many spellings. Ours, for each image and class, with probability p and target t, is

    dice_loss = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)

summed over the pixels of one image (V-Net, Milletari et al., arXiv 1606.04797, but with plain
instead of squared sums in the denominator). With smooth = 1 the loss of an empty mask falls to 0
as sum(p) does.
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
    """Return the Dice loss (B,C) of each image and class from p and t (B,C,*S) in 0..1.

    keep: 0 where a pixel is ignored, else 1; of a shape that broadcasts to p. Raise ValueError if
    p is in half precision.
    """
    check_precision(p)
    if keep is not None:
        p = p * keep
        t = t * keep
    p = p.flatten(2)  # (B,C,N)
    t = t.flatten(2)  # (B,C,N)
    return 1 - (2 * (p * t).sum(2) + smooth) / (p.sum(2) + t.sum(2) + smooth)


def dice_bce(
    logits: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Dice loss + binary cross entropy of binary masks, and both by name.

    logits (B,C,*S); target (B,C,*S), 0 or 1, 255 where a pixel is ignored. Dice is averaged over
    images and masks. Cross entropy is averaged over the pixels of an image that are not ignored,
    then over images.
    """
    keep = (target != 255).to(logits.dtype)
    target = target.to(logits.dtype) * keep
    dice = dice_loss(logits.sigmoid(), target, smooth, keep).mean()

    bce = F.binary_cross_entropy_with_logits(logits, target, weight=keep, reduction="none")
    bce = bce.flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1)  # (B,)
    bce = bce.mean()
    return dice + bce, {"dice_loss": dice, "bce": bce}


def to_one_hot(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Return class indices (B,*S) as zeros and ones (B,K,*S), of the type of logits (B,K,*S).

    Ignored pixels become class 0.
    """
    classes = torch.where(target == ignore_index, 0, target)
    return F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (B,K,*S)


def gi_tract_dice_ce(
    logits: Tensor, target: Tensor, smooth: float = 1e-8
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Dice loss + cross entropy as in the GI-tract study, and both by name.

    Shapes as for `dice_ce`. Source: github.com/JaeL17/Medical-Image-Segmentation; with smooth 1e-5
    it is MONAI's DiceCELoss.

    quirk: every class counts in every image, including the background. With smooth 1e-8 a class
    that is absent from an image costs nearly 1 until its probability, summed over the image, falls
    below 1e-8. So the mean cannot be lower than the share of absent pairs of image and class.

    The study's masks have no 255; here such pixels are ignored, as in `dice_ce`.
    """
    one_hot = to_one_hot(target, logits, 255)  # (B,K,*S)
    keep = (target != 255)[:, None].to(logits.dtype)  # (B,1,*S)
    dice = dice_loss(logits.softmax(1), one_hot, smooth, keep).mean()

    ce = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
    ce = ce / keep.sum().clamp(min=1)
    return dice + ce, {"dice_loss": dice, "ce": ce}


def dice_ce(
    logits: Tensor, target: Tensor, smooth: float = 1.0, ignore_index: int = 255
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Dice loss + cross entropy for class maps, and both by name.

    logits (B,K,*S); target (B,*S) int64, class indices, `ignore_index` where a pixel is ignored.
    Dice is averaged over the foreground classes that an image contains: each such pair of image
    and class is one term. Class 0 is the background and has no Dice term. Cross entropy is averaged
    over the pixels that are not ignored.
    """
    one_hot = to_one_hot(target, logits, ignore_index)  # (B,K,*S)
    keep = (target != ignore_index)[:, None].to(logits.dtype)  # (B,1,*S)
    is_present = (one_hot * keep).flatten(2).sum(2)[:, 1:] > 0  # (B,K-1)

    dice = dice_loss(logits.softmax(1), one_hot, smooth, keep)[:, 1:]  # (B,K-1)
    dice = (dice * is_present).sum() / is_present.sum().clamp(min=1)

    ce = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    ce = ce / keep.sum().clamp(min=1)
    return dice + ce, {"dice_loss": dice, "ce": ce}


def partial_dice_bce(
    logits: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `dice_bce` over the classes that are annotated in each image, and its parts by name.

    logits (B,C,*S); target (B,C,*S) of integers: 0 or 1, 255 where a voxel is ignored, -1
    everywhere in a class that is not annotated in that image. Such a pair of image and class has
    no part in the loss and gets no gradient; all others have equal weight (Liu et al., ICCV 2023,
    arXiv 2301.00785, equation 3; their Dice has `smooth` in the denominator alone).
    """
    is_annotated = target.flatten(2)[..., 0] >= 0  # (B,C)
    if not is_annotated.any():  # a loss of 0, connected to the logits but without a gradient
        zero = 0 * logits.sum()
        return zero, {"dice_loss": zero, "bce": zero}

    logits = logits[is_annotated][:, None]  # (n,1,*S)
    target = target[is_annotated][:, None]  # (n,1,*S)
    return dice_bce(logits, target, smooth)


def sam_loss(
    logits: Tensor, iou: Tensor, target: Tensor, smooth: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `dice_bce` of each prompt's mask + the squared error of its IoU estimate, and parts.

    logits (...,H,W), one mask for each prompt; iou (...), the IoU that SAM's head predicts; target
    (...,H,W), 0 or 1, 255 where a pixel is ignored. No mask's loss depends on other prompts. The
    head learns the IoU of the thresholded mask, 1 where both masks are empty (Kirillov et al.,
    arXiv 2304.02643, appendix A, with focal loss instead of cross entropy). A mask in which all
    pixels are ignored has no part in the loss.
    """
    logits = logits.flatten(0, -3)[:, None]  # (B*Q,1,H,W)
    target = target.flatten(0, -3)[:, None]  # (B*Q,1,H,W)
    loss, parts = dice_bce(logits, target, smooth)

    prediction = (logits > 0).flatten(1)  # (B*Q,H*W)
    ground_truth = (target == 1).flatten(1)  # (B*Q,H*W)
    keep = (target != 255).flatten(1)  # (B*Q,H*W)
    intersection = (prediction & ground_truth & keep).sum(1)  # (B*Q,)
    union = ((prediction | ground_truth) & keep).sum(1)  # (B*Q,)
    actual = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)

    is_rated = keep.any(1).to(iou.dtype)  # (B*Q,)
    squares = (iou.flatten() - actual.to(iou.dtype)).square() * is_rated
    mse = squares.sum() / is_rated.sum().clamp(min=1)
    return loss + mse, parts | {"iou_mse": mse}


# --- topology -------------------------------------------------------------------------------------


def soft_skeleton(x: Tensor, iterations: int) -> Tensor:
    """Return the centre lines (B,C,H,W) of values in 0..1 (B,C,H,W): Shit et al., algorithm 1.

    Each iteration erodes the map and adds what an opening would remove, which is thin. iterations:
    at least half the largest thickness in pixels, else the middle of thick parts is missed.
    """
    skeleton = torch.zeros_like(x)
    for _ in range(iterations + 1):
        # Erode: the smallest value of a pixel and its four neighbours.
        vertical = F.max_pool2d(-x, (3, 1), 1, (1, 0))
        horizontal = F.max_pool2d(-x, (1, 3), 1, (0, 1))
        eroded = -torch.maximum(vertical, horizontal)

        opened = F.max_pool2d(eroded, 3, 1, 1)
        thin = F.relu(x - opened)
        skeleton = skeleton + F.relu(thin - skeleton * thin)
        x = eroded
    return skeleton


def cldice_loss(
    p: Tensor, t: Tensor, iterations: int = 10, smooth: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Return 1 - clDice (B,C) of each image and class (Shit et al., CVPR 2021, arXiv 2003.07311).

    clDice is the harmonic mean of two shares: how much of each mask's centre lines lies in the
    other mask. p and t (B,C,H,W) in 0..1, and keep, as for `dice_loss`; iterations as for
    `soft_skeleton`. Raise ValueError if p is in half precision.

    Unlike `topological_loss` it consists of pooling alone and never leaves the GPU (on the CPU it
    is the slower one). But it adds up the lengths of missed or invented lines, whether or not that
    splits or joins anything.
    """
    check_precision(p)
    if keep is not None:
        p = p * keep
        t = t * keep
    skeleton_p = soft_skeleton(p, iterations).flatten(2)  # (B,C,N)
    skeleton_t = soft_skeleton(t, iterations).flatten(2)  # (B,C,N)
    p = p.flatten(2)  # (B,C,N)
    t = t.flatten(2)  # (B,C,N)

    precision = ((skeleton_p * t).sum(2) + smooth) / (skeleton_p.sum(2) + smooth)
    sensitivity = ((skeleton_t * p).sum(2) + smooth) / (skeleton_t.sum(2) + smooth)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def neighbour_pairs(x: np.ndarray, diagonal: bool) -> np.ndarray:
    """Return the values of x (H,W) at both ends of each edge between neighbouring pixels: (2,E)."""
    ends = [
        (x[:, 1:], x[:, :-1]),
        (x[1:], x[:-1]),
    ]
    if diagonal:
        ends.append((x[1:, 1:], x[:-1, :-1]))
        ends.append((x[1:, :-1], x[:-1, 1:]))
    return np.hstack([np.stack([a.ravel(), b.ravel()]) for a, b in ends])  # (2,E)


def basins(rank: np.ndarray, order: np.ndarray, diagonal: bool) -> np.ndarray:
    """Return for each rank the rank of the minimum that steepest descent reaches from it: (H*W,).

    rank (H,W): position of each pixel in the sorted order; order (H*W,): rank -> flat index.
    """
    neighbourhood = generate_binary_structure(2, 2 if diagonal else 1)
    lowest = minimum_filter(rank, footprint=neighbourhood, mode="nearest")  # one step down
    basin = lowest.flat[order]  # (H*W,)
    while (basin[basin] != basin).any():  # two steps, four, ...
        basin = basin[basin]
    return basin


def merge_pairs(x: np.ndarray, diagonal: bool) -> np.ndarray:
    """Return the minima of x (H,W) and where their basins meet an older one: (n,2) flat indices.

    This is union-find over pixels in the order of their values (ties: by position), restricted to
    where it matters: each pixel first descends to a minimum, and only edges between two basins can
    join components.
    """
    order = x.argsort(axis=None, kind="stable")  # rank -> flat index
    rank = np.empty(x.shape, np.int64)
    rank.flat[order] = np.arange(x.size)
    basin = basins(rank, order, diagonal)  # (H*W,), all in ranks from here on

    # Edges between two basins, in the order in which they appear.
    ends = neighbour_pairs(rank, diagonal)  # (2,E)
    basin_a, basin_b = basin[ends]  # (E,) each
    appearance = np.maximum(*ends)  # (E,), an edge appears with its higher end
    edges = np.stack([basin_a, basin_b, appearance])  # (3,E)
    edges = edges[:, basin_a != basin_b]
    edges = edges[:, edges[2].argsort(kind="stable")]

    parents = list(range(x.size))
    pairs = []
    for first, second, meeting in zip(*edges.tolist(), strict=True):
        # Find both roots, halving the paths to them. Inline, since calls would take a fifth longer.
        while parents[first] != first:
            grandparent = parents[parents[first]]
            parents[first] = grandparent
            first = grandparent
        while parents[second] != second:
            grandparent = parents[parents[second]]
            parents[second] = grandparent
            second = grandparent

        if first != second:
            older = min(first, second)
            younger = max(first, second)
            parents[younger] = older
            pairs.append((younger, meeting))  # the younger component ends here
    return order[np.array(pairs, np.int64).reshape(-1, 2)]  # (n,2)


def persistence_pairs(x: np.ndarray, dim: int, shortest: float = 0.0) -> np.ndarray:
    """Return where components (dim 0) or loops (dim 1) of {x <= c} begin and end as c rises.

    x float (H,W) -> int64 (n,2), flat indices of the pixels whose values are birth and death, of
    all pairs that live longer than `shortest`.

    Pixels are squares, so the sets are 8-connected (cubical complexes by top cells, as in gudhi).
    In dim 0 the last pair is the component that never ends; its death is set to the highest pixel.
    A loop encloses a bounded component of {x > c}, which is 4-connected. By duality dim 1 is
    therefore dim 0 of -x with a frame around it: what touches the border is not bounded, and merges
    with the frame, which is older than everything else.
    """
    if dim == 0:
        never_ending = [[x.argmin(), x.argmax()]]
        pairs = np.concatenate([merge_pairs(x, diagonal=True), never_ending])  # (n,2)
    else:
        framed = np.pad(-x, 1, constant_values=-np.inf)  # (H+2,W+2)
        pairs = merge_pairs(framed, diagonal=False)[:, ::-1]  # (n,2)
        row, column = np.divmod(pairs, x.shape[1] + 2)
        pairs = (row - 1) * x.shape[1] + column - 1  # never in the frame: it is one basin

    birth, death = x.flat[pairs].T
    return pairs[death - birth > shortest]


def match_diagrams(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the cheapest matching of persistence diagrams a (n,2) and b (m,2).

    A match costs the squared L-infinity distance; an unmatched point costs that to the diagonal.
    Only matches cheaper than leaving both points unmatched are made. Returned are the matched rows
    of a, those of b, and the cost of the unmatched points of b.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and rarely needed

    to_diagonal_a = ((a[:, 1] - a[:, 0]) / 2) ** 2  # (n,)
    to_diagonal_b = ((b[:, 1] - b[:, 0]) / 2) ** 2  # (m,)
    distance = np.abs(a[:, None] - b).max(2) ** 2  # (n,m)
    gain = distance - to_diagonal_a[:, None] - to_diagonal_b  # (n,m), negative if a match pays

    i, j = linear_sum_assignment(np.minimum(gain, 0))
    pays = gain[i, j] < 0
    i = i[pays]
    j = j[pays]
    return i, j, np.delete(to_diagonal_b, j).sum()


def squared_wasserstein(x: Tensor, y: Tensor, dims, shortest: float = 0.0) -> Tensor:
    """Return the squared 2-Wasserstein distance of the persistence diagrams of x and y.

    x and y (B,C,H,W) -> (B,C,len(dims)). The matching is found on the CPU after one transfer of all
    maps. Gradients reach x through the values of its critical pixels, with the matching fixed.
    """
    B, C, H, W = x.shape
    maps = torch.stack([x.detach(), y.to(x)]).flatten(1, 2)  # (2,B*C,H,W)
    maps_x, maps_y = maps.cpu().double().numpy()  # (B*C,H,W) each

    # For each point of each diagram of x: its two critical pixels, the matched point of y, whether
    # there is one, and the number of its diagram. For each diagram: the cost of y's other points.
    pixels = []
    goals = []
    is_matched = []
    diagrams = []
    costs_of_y = []
    for n, (map_x, map_y) in enumerate(zip(maps_x, maps_y, strict=True)):
        for dim in dims:
            pairs = persistence_pairs(map_x, dim, shortest)  # (points,2)
            points_x = map_x.flat[pairs]  # (points,2), birth and death
            points_y = map_y.flat[persistence_pairs(map_y, dim, shortest)]
            i, j, cost_of_y = match_diagrams(points_x, points_y)

            goal = np.zeros_like(points_x)
            goal[i] = points_y[j]
            matched = np.zeros(len(points_x), bool)
            matched[i] = True

            pixels.append(n * H * W + pairs)
            goals.append(goal)
            is_matched.append(matched)
            diagrams.append(np.full(len(points_x), len(costs_of_y)))
            costs_of_y.append(cost_of_y)
    pixels = torch.from_numpy(np.concatenate(pixels))  # (N,2), N points of all diagrams
    goals = torch.from_numpy(np.concatenate(goals))  # (N,2)
    is_matched = torch.from_numpy(np.concatenate(is_matched))  # (N,)
    diagrams = torch.from_numpy(np.concatenate(diagrams))  # (N,)

    # The same costs again, now with gradients.
    points = x.flatten()[pixels.to(x.device)].cpu()  # (N,2)
    to_goal = (points - goals.to(x.dtype)).abs().amax(1)  # (N,)
    to_diagonal = (points[:, 1] - points[:, 0]) / 2  # (N,)
    cost = torch.where(is_matched, to_goal, to_diagonal) ** 2  # (N,)
    total = torch.tensor(costs_of_y, dtype=x.dtype).index_add(0, diagrams, cost)
    return total.view(B, C, len(dims)).to(x.device)


def topological_loss(p: Tensor, t: Tensor, size: int = 64, shortest: float = 0.01) -> Tensor:
    """Return how far the islands and holes of p are from those of the target: a scalar.

    p (B,C,H,W) probabilities; t (B,C,H,W), 0 or 1, 255 where a pixel is ignored. It is the mean
    over masks of the squared 2-Wasserstein distance between persistence diagrams (Hu et al.,
    NeurIPS 2019). A surplus or missing island or hole of full contrast costs 1/4. Pairs that live
    no longer than `shortest` are noise and cost nothing. The number of islands and holes counts,
    not their position: use a pixelwise loss beside this one.

    Differences from `oct_topological_loss`, and why:
    - Maps shrink to at most `size` by their maximum, which keeps a connected mask connected. The
      study's 50x50 samples make 13 islands of a layer 3 pixels thick.
    - The diagrams are those of 1 - p, so that the foreground is 8-connected (like the components
      that prompts are made from) and touching the border makes no difference. The study's loops do
      not see what touches it: a layer across the image, a torn layer and an empty mask are equal.
    - A ring of background surrounds the map, so that the island which never ends lives from the
      highest p to 0, and an empty prediction lacks it.
    - Islands and holes count, not islands alone.
    - Squares have a gradient everywhere; the study's root has none where diagrams agree.
    """
    keep = t != 255
    size = [min(size, side) for side in p.shape[2:]]
    p = F.adaptive_max_pool2d(p * keep, size)  # (B,C,h,w)
    t = F.adaptive_max_pool2d(t.to(p) * keep, size)  # (B,C,h,w)
    x = F.pad(1 - p, (1, 1, 1, 1), value=1.0)  # (B,C,h+2,w+2)
    y = F.pad(1 - t, (1, 1, 1, 1), value=1.0)  # (B,C,h+2,w+2)
    return squared_wasserstein(x, y, (0, 1), shortest).sum(2).mean()


def oct_topological_loss(p: Tensor, t: Tensor, size: int | None = 50, dims=(1,)) -> Tensor:
    """Return the topological loss of the OCT study, with its weight of 0.1: a scalar.

    Source: github.com/philippendres/DILabHelmholtzOCT, octsam/models/topological_loss.py.
    p (B,C,H,W) probabilities, t (B,C,H,W) 0 or 1. size: side of the maps that are compared, None
    for their own. dims: (1,) is the study's feat_d = 1.

    Its five faults are listed at `topological_loss`. One is mended because it ends a training: the
    gradient is 0, not NaN, where diagrams agree.
    """
    t = t.to(p)
    if size:  # quirk: samples of the pixels, not means (bilinear without antialiasing)
        p = F.interpolate(p, (size, size), mode="bilinear", align_corners=True)
        t = F.interpolate(t, (size, size), mode="bilinear", align_corners=True)
    # quirk: sublevel sets of p itself. Their loops are islands away from the border, and their
    # components are the pieces of the background.
    squared = squared_wasserstein(p, t, dims)  # (B,C,dims)

    # quirk: axes of length 1 are squeezed out. Then squares are summed over all axes but the first,
    # and their roots are averaged over the first.
    first_axis = next((length for length in p.shape[:2] if length > 1), len(dims))
    squared = squared.reshape(first_axis, -1).sum(1)
    is_positive = squared > 0
    root = torch.where(is_positive, squared, 1).sqrt() * is_positive  # at 0 the gradient is 0
    return 0.1 * root.mean()
