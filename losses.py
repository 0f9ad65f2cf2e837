"""Losses, each written out.

Soft Dice has many spellings; ours, per image and class, with p the probability and t the target, is

    dice_loss = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)

with sums over the pixels of one image (V-Net, Milletari et al., arXiv 1606.04797, but with plain
instead of squared sums in the denominator). With smooth = 1 the loss of an empty mask falls to 0 as
sum(p) does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(p: Tensor, t: Tensor, smooth: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Probabilities and targets in 0..1, (B,C,*S) -> loss per image and class (B,C).

    `keep`, of a shape that broadcasts to theirs, is 0 where a pixel does not count.
    """
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


def gi_tract_dice_ce(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Dice + cross entropy of the GI-tract study, shapes as for `dice_ce`.

    github.com/JaeL17/Medical-Image-Segmentation. quirk: every class counts in every image, the
    background too, and with smooth 1e-8 one that is absent costs nearly 1 until the network's
    probability of it, summed over the image, falls below 1e-8. The mean over images and classes is
    then no better than the share of absent pairs.
    """
    classes = torch.where(target == 255, 0, target)  # the study's masks have no 255
    one_hot = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (B,K,*S)
    dice = dice_loss(logits.softmax(1), one_hot, smooth=1e-8).mean()
    ce = F.cross_entropy(logits, target, ignore_index=255)
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
    keep = target != ignore_index
    classes = torch.where(keep, target, 0)
    one_hot = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)  # (B,K,*S)
    keep = keep[:, None].to(logits.dtype)
    present = (one_hot * keep).flatten(2).sum(2)[:, 1:] > 0  # (B,K-1)
    dice = dice_loss(logits.softmax(1), one_hot, smooth, keep)[:, 1:]
    dice = (dice * present).sum() / present.sum().clamp(min=1)
    ce = F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="sum"
    ) / keep.sum().clamp(min=1)
    return dice + ce, {"dice_loss": dice, "ce": ce}
