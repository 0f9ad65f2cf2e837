"""Swin UNETR: segment a volume with a Swin Transformer as the encoder of a U-Net.

Papers: Hatamizadeh et al., BrainLes 2021, arXiv 2201.01266; Tang et al., CVPR 2022, arXiv
    2111.14791 (self-supervised pre-training); He et al., MICCAI 2023 (V2).
Code: github.com/Project-MONAI/MONAI 1.6.1, monai/networks/nets/swin_unetr.py and
    monai/networks/blocks/{dynunet,unetr}_block.py (Apache 2.0).
Weights: on the hub darragh/swinunetr-btcv-{tiny,small,base} (Apache 2.0) and
    MONAI/swin_unetr_btcv_segmentation (licence not checked); in release 0.8.1 of
    MONAI-extra-test-data (licence not checked) swin_unetr.*_pretrained.pt (BTCV), the folds of
    BraTS21, and model_swinvit.pt (the encoder alone).

    volume: sides are multiples of 32, one is 64 or more          (B,1,96,96,96), variant base
    swinViT, the encoder: 2x2x2 convolution with stride 2,     -> x0 (B,48,48,48,48)
      then four stages: attention within windows of 7x7x7      -> x1 (B,96,24,24,24)
      tokens, attention within windows shifted by 3, and       -> x2 (B,192,12,12,12)
      merging of 2x2x2 tokens into one                         -> x3 (B,384,6,6,6)
                                                               -> x4 (B,768,3,3,3)
    layer norm without weights on x0 … x4 (each next stage gets them without it)
    encoder10: residual block on x4                            -> (B,768,3,3,3)
    decoder5: upsample, concatenate x3, residual block         -> (B,384,6,6,6)
    decoder4: the same with encoder4(x2), a residual block     -> (B,192,12,12,12)
    decoder3: the same with encoder3(x1)                       -> (B,96,24,24,24)
    decoder2: the same with encoder2(x0)                       -> (B,48,48,48,48)
    decoder1: the same with encoder1(volume)                   -> (B,48,96,96,96)
    out: 1x1x1 convolution                                     -> logits (B,14,96,96,96)

`quirk` marks behaviour of MONAI that looks wrong but that released weights depend on. Left out: 2-D
images, dropout (0 in all released files), heads of self-supervised training. To segment files, copy
the folder `imaging/` too (needs numpy, nibabel, tqdm): imaging.volumes.segment(model, "ct.nii.gz").
"""

import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The architecture, the input and the classes of a model."""

    feature_size: int = 48  # channels of x0, a multiple of 12
    in_channels: int = 1  # channels of the volume
    num_classes: int = 14  # output channels: includes the background, except if classes overlap
    v2: bool = False  # Swin UNETR V2: a residual block before each stage
    merging: str = "legacy"  # order of the tokens that merge, a key of OCTANTS
    image_size: tuple[int, ...] = (96, 96, 96)  # size of a patch in sliding-window inference
    spacing: tuple[float, ...] = (1.5, 1.5, 2.0)  # mm
    intensity: tuple[float, ...] | None = (-175.0, 250.0)  # HU that become 0 and 1; None: z-scores
    overlapping: bool = False  # a voxel may have several classes: sigmoids instead of a softmax
    threshold: float = 0.5  # least probability of a mask, for a single class or overlapping classes
    classes: tuple[str, ...] = ()  # names, always with the background, which is first; (): unknown


BTCV = {
    "classes": (
        "background",
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "inferior vena cava",
        "portal and splenic veins",
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
    ),
}
BRATS21 = {  # channels: FLAIR, T1 with contrast, T1, T2
    "image_size": (128, 128, 128),
    "spacing": (1.0, 1.0, 1.0),
    "intensity": None,
    "overlapping": True,
    "classes": ("background", "tumor core", "whole tumor", "enhancing tumor"),
}
VARIANTS = {  # right: number of parameters
    "base": Config(),  # 62,187,296
    "small": Config(feature_size=24),  # 15,703,304
    "tiny": Config(feature_size=12),  # 4,078,220
    "tiny-v2": Config(feature_size=12, v2=True),  # 4,739,180
    "small-v2": Config(feature_size=24, v2=True),  # 18,347,144
    "base-v2": Config(v2=True),  # 72,762,656
    "brats21": Config(in_channels=4, num_classes=3, **BRATS21),  # 62,191,941
    # for tests and demos
    "mini": Config(feature_size=12, num_classes=3, image_size=(64, 64, 64)),  # 4,078,077
}

# --- attention within windows ---------------------------------------------------------------------

# MONAI keeps the attention scores of all windows for the backward pass: 484 MB in one block of base
# at 96x96x96. Here, windows that share a mask go through the fused kernel together, and the
# backward pass computes the scores again, a few windows at a time.
#
# Shapes: n windows, h heads, N tokens of a window, d channels of a head.

WINDOW = 7  # tokens along a side
SHIFT = 3  # tokens
# Number of attention scores that the backward pass computes at a time: 17 MB of float32; 268 MB on
# a GPU, where starting a small kernel takes longer than running it.
CHUNK = 2**22
CHUNK_ON_GPU = 2**26


# Pairs of a query and a key of a window have six axes: the query's position along D, H and W, then
# the key's. Flattened in threes they are the axes of a score matrix (343,343).
def along_axes(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast a table (7,7), indexed by query and key position on one axis, along D, H and W.

    Return three views, one for each axis, that broadcast to (7,7,7,7,7,7).
    """
    along_d = table[:, None, None, :, None, None]  # (7,1,1,7,1,1)
    along_h = table[None, :, None, None, :, None]  # (1,7,1,1,7,1)
    along_w = table[None, None, :, None, None, :]  # (1,1,7,1,1,7)
    return along_d, along_h, along_w


# swin_unetr.py, class WindowAttention
def position_index() -> Tensor:
    """Return the row of the bias table for each query and key of a window: int64 (343,343)."""
    positions = torch.arange(WINDOW)
    offsets = positions[:, None] - positions + WINDOW - 1  # (7,7), 0..12
    offset_d, offset_h, offset_w = along_axes(offsets)
    side = 2 * WINDOW - 1
    rows = (offset_d * side + offset_h) * side + offset_w  # (7,7,7,7,7,7)
    return rows.reshape(WINDOW**3, WINDOW**3)  # (343,343)


# swin_unetr.py, compute_mask
def shift_masks() -> Tensor:
    """Return the additive masks of shifted windows: (2,2,2,7,7,7,7,7,7).

    The first three indices are 1 where a window is the last one along D, H and W; the others are
    the positions of query and key. After the cyclic shift, the last window along an axis holds
    tokens from both the end and the beginning of the volume, which must not attend to each other.
    """
    wrapped = torch.arange(WINDOW) >= WINDOW - SHIFT  # (7,), tokens from the beginning
    forbidden = wrapped[:, None] != wrapped  # (7,7)

    masked = torch.zeros(2, 2, 2, *[WINDOW] * 6, dtype=torch.bool)
    for axis, table in enumerate(along_axes(forbidden)):
        masked.select(axis, 1).logical_or_(table)
    return masked * -100.0  # quirk: MONAI uses -100 rather than -inf


# swin_unetr.py, window_partition
def view_windows(x: Tensor, window: tuple[int, ...], num_projections: int, heads: int) -> Tensor:
    """Return a view of x by windows and heads.

    x (B,D,H,W,p*h*d), with p = num_projections: 3 if x holds queries, keys and values side by side,
    else 1. window: its three sides, which divide D, H and W.
    With windows of 7 tokens a side: -> (p,B,D/7,H/7,W/7,h,7,7,7,d)
    """
    B, D, H, W, _ = x.shape
    window_d, window_h, window_w = window
    sides = (D // window_d, window_d, H // window_h, window_h, W // window_w, window_w)
    x = x.view(B, *sides, num_projections, heads, -1)  # (B,D/7,7,H/7,7,W/7,7,p,h,d)
    return x.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)  # (p,B,D/7,H/7,W/7,h,7,7,7,d)


def windows_by_mask(
    window: tuple[int, ...], shifts: tuple[int, ...]
) -> Iterator[tuple[tuple, tuple]]:
    """Yield the groups of windows that share a mask, at most eight.

    Along a shifted axis only the last window needs a mask, so the axis is split into all windows
    but the last, and the last. Each item is a pair: an index into the result of `view_windows`, and
    an index into the result of `shift_masks`.
    """
    choices = []  # for each axis: pairs of a slice of the windows and an index of the mask
    for shift in shifts:
        if shift:
            choices.append([(slice(-1), 0), (slice(-1, None), 1)])
        else:
            choices.append([(slice(None), 0)])
    # Masks are cropped along each axis, unlike the biases in `WindowAttention`.
    tokens = [slice(side) for side in window]

    for (group_d, mask_d), (group_h, mask_h), (group_w, mask_w) in product(*choices):
        group = (slice(None), slice(None), group_d, group_h, group_w)
        yield group, (mask_d, mask_h, mask_w, *tokens, *tokens)


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_y: Tensor, score_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v (n,h,N,d each) and score_bias (h,N,N).

    grad_y (n,h,N,d) is the gradient of y = softmax(q @ k.mT / sqrt(d) + score_bias) @ v.
    """
    scale = q.shape[3] ** -0.5
    # score_bias is float32 and promotes the scores, even if q and k are in half precision.
    scores = torch.add(score_bias, q @ k.mT, alpha=scale)  # (n,h,N,N)
    p = scores.softmax(3)  # (n,h,N,N)

    grad_p = (grad_y @ v.mT).to(p.dtype)  # (n,h,N,N)
    grad_scores = torch._softmax_backward_data(grad_p, p, 3, p.dtype)  # (n,h,N,N)
    grad_bias = grad_scores.sum(0)  # (h,N,N)

    grad_scores = grad_scores.to(q.dtype)
    p = p.to(q.dtype)
    grad_q = scale * (grad_scores @ k)  # (n,h,N,d)
    grad_k = scale * (grad_scores.mT @ q)  # (n,h,N,d)
    grad_v = p.mT @ grad_y  # (n,h,N,d)
    return grad_q, grad_k, grad_v, grad_bias


class WindowAttentionFunction(torch.autograd.Function):
    """Attention within each window, with a bias and a mask, in a fraction of the memory.

    Equivalent, for q, k and v (n,h,N,d) of n windows, to

        scores = q @ k.mT / sqrt(d) + bias + mask
        return scores.softmax(3) @ v
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, masks: Tensor, window: tuple, shifts: tuple):
        """qkv (B,D,H,W,3C), bias (h,N,N), masks: result of `shift_masks` -> (B,D,H,W,C).

        window: its three sides, which divide D, H and W and hold N tokens in all; shifts: 0 or
        SHIFT for each axis.
        """
        heads, N = bias.shape[:2]
        B, D, H, W, channels = qkv.shape
        head_dim = channels // (3 * heads)
        y = qkv.new_empty(B, D, H, W, channels // 3)
        qkv_windows = view_windows(qkv, window, 3, heads)
        y_windows = view_windows(y, window, 1, heads)

        for group, mask_index in windows_by_mask(window, shifts):
            q, k, v = qkv_windows[group].reshape(3, -1, heads, N, head_dim)  # (n,h,N,d) each
            mask = masks[mask_index].reshape(N, N)
            score_bias = (bias + mask).to(q.dtype)  # (h,N,N)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=score_bias[None])
            y_windows[group] = attended.view(y_windows[group].shape)  # writes (n,h,N,d) into y

        ctx.save_for_backward(qkv, bias, masks)
        ctx.window = window
        ctx.shifts = shifts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        """grad_y (B,D,H,W,C) -> the gradients of qkv (B,D,H,W,3C) and bias (h,N,N)."""
        qkv, bias, masks = ctx.saved_tensors
        heads, N = bias.shape[:2]
        head_dim = qkv.shape[4] // (3 * heads)
        grad_qkv = torch.empty_like(qkv)
        grad_bias = torch.zeros_like(bias)
        qkv_windows = view_windows(qkv, ctx.window, 3, heads)
        grad_y_windows = view_windows(grad_y.contiguous(), ctx.window, 1, heads)
        grad_qkv_windows = view_windows(grad_qkv, ctx.window, 3, heads)

        scores_at_a_time = CHUNK if grad_y.device.type == "cpu" else CHUNK_ON_GPU
        windows_at_a_time = max(1, scores_at_a_time // bias.numel())

        for group, mask_index in windows_by_mask(ctx.window, ctx.shifts):
            score_bias = bias + masks[mask_index].reshape(N, N)  # (h,N,N)
            qkv_group = qkv_windows[group].reshape(3, -1, heads, N, head_dim)  # (3,n,h,N,d)
            grad_group = grad_y_windows[group].reshape(1, -1, heads, N, head_dim)  # (1,n,h,N,d)
            stacked = torch.cat((qkv_group, grad_group))  # (4,n,h,N,d), a copy
            for chunk in stacked.split(windows_at_a_time, 1):
                q, k, v, grad_attended = chunk  # (n,h,N,d) each
                grad_q, grad_k, grad_v, grad_bias_of_chunk = attention_gradients(
                    q, k, v, grad_attended, score_bias
                )
                grad_bias += grad_bias_of_chunk
                # Overwrite q, k and v with their gradients.
                q.copy_(grad_q)
                k.copy_(grad_k)
                v.copy_(grad_v)
            grad_qkv_windows[group] = stacked[:3].view(grad_qkv_windows[group].shape)
        return grad_qkv, grad_bias, None, None, None


# swin_unetr.py, class WindowAttention; padding and shift: SwinTransformerBlock.forward_part1
class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each relative position."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, is_shifted: bool, index: Tensor, masks: Tensor) -> Tensor:
        """x (B,D,H,W,C) -> (B,D,H,W,C).

        index, masks: results of `position_index` and `shift_masks`.
        """
        D, H, W = x.shape[1:4]
        # An axis of at most 7 tokens is a single window, which is not shifted.
        window = tuple(min(side, WINDOW) for side in (D, H, W))
        shifts = tuple(SHIFT if is_shifted and side > WINDOW else 0 for side in (D, H, W))

        # Pad to whole windows.
        # quirk: padding tokens are not masked out: their keys and values are the biases of qkv
        pad_d, pad_h, pad_w = (-side % n for side, n in zip((D, H, W), window, strict=True))
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_d))
        x = x.roll([-shift for shift in shifts], (1, 2, 3))

        # quirk: for a smaller window MONAI slices the flattened index, so the biases are those of a
        # full window's first N tokens, not those of the true offsets
        N = math.prod(window)
        # Equivalent to table[index], which on several threads of a CPU adds up the gradient of the
        # table in another order each time.
        bias = F.embedding(index[:N, :N], self.relative_position_bias_table)  # (N,N,h)
        bias = bias.permute(2, 0, 1).contiguous()  # (h,N,N)

        y = WindowAttentionFunction.apply(self.qkv(x), bias, masks, window, shifts)
        y = y.roll(shifts, (1, 2, 3))[:, :D, :H, :W]  # (B,D,H,W,C)
        return self.proj(y)


# blocks/mlp.py, class MLPBlock
class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (...,C) -> (...,C)."""
        return self.linear2(F.gelu(self.linear1(x)))


# swin_unetr.py, class SwinTransformerBlock
class SwinBlock(nn.Module):
    """A transformer block with pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, is_shifted: bool):
        super().__init__()
        self.is_shifted = is_shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor) -> Tensor:
        """x (B,D,H,W,C) -> (B,D,H,W,C); index, masks: see `WindowAttention.forward`."""
        x = x + self.attn(self.norm1(x), self.is_shifted, index, masks)  # (B,D,H,W,C)
        return x + self.mlp(self.norm2(x))


# --- merging of neighbours ------------------------------------------------------------------------

# Tokens of a cell of 2x2x2, by their positions along D, H and W, in the order in which they are
# concatenated. MONAI 1.5.0 changed the order under the same option name and with the same shapes.
# All released files are older and need "legacy"; files trained with later versions need "merging".
OCTANTS = {
    # quirk: 010 and 001 appear twice, 110 and 011 never (swin_unetr.py of MONAI 0.9.0 to 1.4.0)
    "legacy": "000 100 010 001 101 010 001 111",
    "merging": "000 100 010 001 110 101 011 111",  # since 1.5.0
    "mergingv2": "000 001 010 011 100 101 110 111",  # since 1.0.0
}


# swin_unetr.py, classes PatchMerging and PatchMergingV2
class PatchMerging(nn.Module):
    """Merge each cell of 2x2x2 tokens into one token of twice the channels."""

    def __init__(self, dim: int, octants: str):
        super().__init__()
        self.octants = [tuple(map(int, octant)) for octant in octants.split()]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,D,H,W,C), even sides -> (B,D/2,H/2,W/2,2C)."""
        neighbours = []
        for start_d, start_h, start_w in self.octants:
            neighbours.append(x[:, start_d::2, start_h::2, start_w::2])  # (B,D/2,H/2,W/2,C)
        x = torch.cat(neighbours, 4)  # (B,D/2,H/2,W/2,8C)
        return self.reduction(self.norm(x))  # (B,D/2,H/2,W/2,2C)


# --- residual blocks of convolutions --------------------------------------------------------------

EPS = 1e-5  # epsilon of instance norms
SLOPE = 0.01  # negative slope of leaky ReLUs


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a 1x1x1 convolution, as a matrix product. Equivalent to F.conv3d(x, weight, bias).

    x (B,C,D,H,W), weight (O,C,1,1,1), bias (O,) -> (B,O,D,H,W), channels last in memory.
    """
    y = F.linear(x.movedim(1, 4), weight.flatten(1), bias)  # (B,D,H,W,O)
    return y.movedim(4, 1)  # (B,O,D,H,W)


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each channel of each volume: (B,C,1,1,1) each.

    x (B,C,D,H,W). Equivalent, in float32 or better, to

        var, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)

    On a CPU it is several times faster, and without the rounding errors of long sums.
    """
    if x.device.type != "cpu":
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean((2, 3, 4), True)
        return mean, x.var((2, 3, 4), correction=0, keepdim=True)

    # With channels last in memory, batch norm's statistics kernel is the fastest, but it
    # accumulates each channel sequentially, so rounding errors grow over millions of voxels. To
    # keep the sums short, treat each position along W as a separate channel and split the D*H rows
    # into up to 16 parts.
    B, C, D, H, W = x.shape
    splits = math.gcd(D * H, 16)
    rows = x.movedim(1, 4).reshape(B * splits, -1, W * C)  # (B*splits,D*H/splits,W*C)
    means = []
    variances = []
    for split in rows:
        mean, var = torch.batch_norm_update_stats(split, None, None, 0.0)  # (W*C,) each
        means.append(mean)
        variances.append(var)
    means = torch.stack(means).double().view(B, splits * W, C, 1, 1, 1)  # (B,splits*W,C,1,1,1)
    variances = torch.stack(variances).double().view(B, splits * W, C, 1, 1, 1)  # the same shape

    # The total variance is the mean of the variances plus the variance of the means.
    var = variances.mean(1) + means.var(1, correction=0)  # (B,C,1,1,1)
    return means.mean(1), var


class NormAddReLU(torch.autograd.Function):
    """Instance norm, addition of a residual and leaky ReLU, in place.

    Equivalent to

        y = F.instance_norm(x, eps=EPS)
        return F.leaky_relu(y if residual is None else y + residual, slope)

    The backward pass recovers the normalised map from the output by undoing the leaky ReLU and the
    addition, so neither x nor the input of the leaky ReLU is stored: two feature maps fewer. The
    output and the residual, which it needs, are stored for neighbouring layers anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, slope: float) -> Tensor:
        """x (B,C,D,H,W), overwritten; residual of the same shape; slope of the leaky ReLU -> x."""
        mean, var = mean_and_variance(x)  # (B,C,1,1,1) each
        scale = (var + EPS).rsqrt()
        shift = -scale * mean
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = scale.to(dtype)
        shift = shift.to(dtype)

        torch.addcmul(shift, x, scale, out=x)
        if residual is not None:
            x += residual
        F.leaky_relu_(x, slope)

        ctx.mark_dirty(x)
        ctx.save_for_backward(x, residual, scale)
        ctx.slope = slope
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        """grad_y (B,C,D,H,W) -> the gradients of x and residual, (B,C,D,H,W) each."""
        y, residual, scale = ctx.saved_tensors
        # The gradient of normalised + residual. True: y is the output of the leaky ReLU.
        grad_sum = torch.ops.aten.leaky_relu_backward(grad_y, y, ctx.slope, True)  # (B,C,D,H,W)

        # Undo the leaky ReLU and the addition.
        normalised = F.leaky_relu(y, 1 / ctx.slope)  # (B,C,D,H,W)
        if residual is not None:
            normalised -= residual

        # grad_x = scale * (grad_sum - mean(grad_sum) - normalised * mean(grad_sum * normalised))
        mean_product = (grad_sum * normalised).mean((2, 3, 4), True, dtype=scale.dtype)
        mean_grad = grad_sum.mean((2, 3, 4), True, dtype=scale.dtype)  # (B,C,1,1,1), both means
        grad_x = normalised  # overwritten
        torch.addcmul(-scale * mean_grad, normalised, -scale * mean_product, out=grad_x)
        grad_x.addcmul_(grad_sum, scale)

        grad_residual = None if residual is None else grad_sum
        return grad_x, grad_residual, None


# blocks/dynunet_block.py, class UnetResBlock
class ResBlock(nn.Module):
    """A residual block of two 3x3x3 convolutions with instance norms."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv3 = None  # convolution of the shortcut, if the number of channels changes
        if in_channels != out_channels:
            self.conv3 = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_channels,D,H,W) -> (B,out_channels,D,H,W), channels last in memory."""
        shortcut = x
        if self.conv3 is not None:
            shortcut = pointwise(x, self.conv3.weight)
        y = self.conv1(x).contiguous(memory_format=torch.channels_last_3d)
        return self.finish(y, shortcut)

    def finish(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """Return the output of the block: all shapes are (B,out_channels,D,H,W).

        y: output of conv1, overwritten; shortcut: output of conv3, overwritten, or the input of the
        block if there is no conv3. `UpBlock` computes conv1 and conv3 itself.
        """
        y = NormAddReLU.apply(y, None, SLOPE)
        if self.conv3 is not None:
            shortcut = NormAddReLU.apply(shortcut, None, 1.0)  # slope 1: no activation
        return NormAddReLU.apply(self.conv2(y), shortcut, SLOPE)


# --- the encoder ----------------------------------------------------------------------------------

HEADS = (3, 6, 12, 24)  # attention heads of the four stages


# swin_unetr.py, class BasicLayer
class Stage(nn.Module):
    """Two transformer blocks, the second with shifted windows, then merging.

    Swin UNETR V2 has a residual block before them.
    """

    def __init__(self, dim: int, heads: int, v2: bool, octants: str):
        super().__init__()
        self.conv = ResBlock(dim, dim) if v2 else nn.Identity()
        self.blocks = nn.ModuleList([SwinBlock(dim, heads, False), SwinBlock(dim, heads, True)])
        self.downsample = PatchMerging(dim, octants)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor) -> Tensor:
        """x (B,D,H,W,C) -> (B,D/2,H/2,W/2,2C); index, masks: see `WindowAttention.forward`."""
        x = x.permute(0, 4, 1, 2, 3)  # (B,C,D,H,W)
        x = self.conv(x).permute(0, 2, 3, 4, 1)  # (B,D,H,W,C)
        for block in self.blocks:
            x = block(x, index, masks)
        return self.downsample(x)


# swin_unetr.py, class SwinTransformer
class SwinTransformer(nn.Module):
    """The encoder. Its stages have channels last, so that no layer copies its input."""

    def __init__(self, config: Config):
        super().__init__()
        f = config.feature_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, f, 2, 2)})
        self.layers = nn.ModuleList()
        for i, heads in enumerate(HEADS):
            self.layers.append(Stage(f * 2**i, heads, config.v2, OCTANTS[config.merging]))
        # Shared by all blocks; smaller windows slice them.
        self.register_buffer("index", position_index(), persistent=False)
        self.register_buffer("masks", shift_masks(), persistent=False)

    def forward(self, volume: Tensor, run: Callable) -> list[Tensor]:
        """Return five feature maps: (B,f,D/2,H/2,W/2), (B,2f,D/4,H/4,W/4) … (B,16f,D/32,H/32,W/32).

        volume (B,C,D,H,W); run: a function that calls a stage, `EncoderDecoder.run`.
        """
        x = self.patch_embed["proj"](volume).permute(0, 2, 3, 4, 1)  # (B,D/2,H/2,W/2,f)
        maps = [x]
        for stage in self.layers:
            x = run(stage, x, self.index, self.masks)
            maps.append(x)

        # The decoder gets the maps after a layer norm without learned weights; the next stage gets
        # them as they are.
        normalised = []
        for x in maps:
            x = F.layer_norm(x, x.shape[4:])
            normalised.append(x.permute(0, 4, 1, 2, 3))  # (B,C,D,H,W)
        return normalised


# --- the decoder ----------------------------------------------------------------------------------


def upsampled(x: Tensor, weight: Tensor) -> Tensor:
    """Return a transposed 2x2x2 convolution with stride 2, as a matrix product.

    Equivalent to F.conv_transpose3d(x, weight, stride=2).

    x (B,C,D,H,W), weight (C,O,2,2,2) -> (B,O,2D,2H,2W), channels last in memory.
    """
    B, C, D, H, W = x.shape
    rows = weight.permute(2, 3, 4, 1, 0).flatten(0, 3)  # (2*2*2*O,C)
    y = F.linear(x.movedim(1, 4), rows)  # (B,D,H,W,2*2*2*O)
    y = y.view(B, D, H, W, 2, 2, 2, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B,D,2,H,2,W,2,O)
    return y.reshape(B, 2 * D, 2 * H, 2 * W, -1).movedim(4, 1)  # (B,O,2D,2H,2W)


def add_upsampled_conv(y: Tensor, x: Tensor, up: Tensor, weight: Tensor) -> None:
    """Add to y a 3x3x3 convolution of the upsampled x, without upsampling x.

    Equivalent, in a fraction of the multiplications, to

        y += F.conv3d(F.conv_transpose3d(x, up, stride=2), weight, padding=1)

    The composition is a transposed 4x4x4 convolution with stride 2. Along one axis, with its kernel
    k, output 2m is k[3]*x[m-1] + k[1]*x[m] and output 2m+1 is k[2]*x[m] + k[0]*x[m+1]. Each parity
    is a convolution with two taps at the low resolution, so there are eight of 2x2x2.

    y (B,O,2D,2H,2W), x (B,C,D,H,W), up (C,O,2,2,2), weight (O,O,3,3,3)
    """
    composed = F.conv3d(up, weight, padding=2)  # (C,O,4,4,4)
    composed = composed.flip(2, 3, 4).transpose(0, 1)  # (O,C,4,4,4)
    D, H, W = x.shape[2:]
    for i, j, k in product((0, 1), repeat=3):  # parity of the outputs along D, H and W
        kernel = composed[:, :, i::2, j::2, k::2].contiguous()  # (O,C,2,2,2)
        at_parity = F.conv3d(x, kernel, padding=1)  # (B,O,D+1,H+1,W+1)
        # With this padding, output m of parity i is at m + i.
        y[:, :, i::2, j::2, k::2] += at_parity[:, :, i : i + D, j : j + H, k : k + W]


# blocks/unetr_block.py, class UnetrUpBlock
class UpBlock(nn.Module):
    """Upsampling, concatenation with the skip connection, and a residual block.

    Equivalent, without computing the concatenation, to

        x = self.transp_conv(x)
        return self.conv_block(torch.cat((x, skip), 1))

    A convolution of a concatenation is the sum of two convolutions, each with half of the weights.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.transp_conv = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False)
        self.conv_block = ResBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B,in_channels,D/2,H/2,W/2), skip (B,C,D,H,W) -> (B,C,D,H,W), C = out_channels."""
        C = skip.shape[1]
        up = self.transp_conv.weight
        block = self.conv_block
        conv1_up, conv1_skip = block.conv1.weight.split(C, 1)  # (C,C,3,3,3) each
        conv3_up, conv3_skip = block.conv3.weight.split(C, 1)  # (C,C,1,1,1) each

        y = F.conv3d(skip, conv1_skip, padding=1)  # (B,C,D,H,W)
        # With gradients, or on small maps, composing the weights costs more than it saves.
        if torch.is_grad_enabled() or x[0, 0].numel() < 8 * C:
            x = upsampled(x, up)  # (B,C,D,H,W)
            y += F.conv3d(x, conv1_up, padding=1)
            shortcut = pointwise(x, conv3_up)  # (B,C,D,H,W)
        else:
            add_upsampled_conv(y, x, up, conv1_up)
            conv3_up = conv3_up.flatten(1)  # (C,C)
            composed = torch.einsum("ic...,oc->io...", up, conv3_up)  # (in_channels,C,2,2,2)
            shortcut = upsampled(x, composed)  # (B,C,D,H,W)
        shortcut += pointwise(skip, conv3_skip)
        return block.finish(y, shortcut)


# --- the model ------------------------------------------------------------------------------------


def check_size(volume: Tensor, channels: int) -> None:
    """Raise ValueError, one line, if a volume (B,C,D,H,W) does not fit the model."""
    if volume.ndim != 5 or volume.shape[1] != channels:
        expected = f"(B,{channels},D,H,W)"
        raise ValueError(f"volume is {tuple(volume.shape)}, the model takes {expected}")
    sides = tuple(volume.shape[2:])
    # Instance norm needs more than one voxel at the bottleneck.
    if any(side % 32 for side in sides) or max(sides) < 64:
        raise ValueError(
            f"the volume's sides are {sides}; each must be a multiple of 32 and at least one must "
            "be 64 or more; pad or crop the volume"
        )


# swin_unetr.py, class SwinUNETR
class EncoderDecoder(nn.Module):
    """Encoder and decoder of Swin UNETR without the output convolution; subclasses add a head.

    With `checkpointing = True`, training keeps only the inputs of the blocks and recomputes their
    activations in the backward pass: less memory, more time.
    """

    def __init__(self, config: Config):
        super().__init__()
        f = config.feature_size
        if f % 12:
            raise ValueError(f"feature_size is {f}, must be a multiple of 12")
        if config.merging not in OCTANTS:
            names = ", ".join(OCTANTS)
            raise ValueError(f"merging is {config.merging!r}, must be one of {names}")

        self.config = config
        self.checkpointing = False
        self.swinViT = SwinTransformer(config)
        self.encoder1 = ResBlock(config.in_channels, f)
        self.encoder2 = ResBlock(f, f)
        self.encoder3 = ResBlock(2 * f, 2 * f)
        self.encoder4 = ResBlock(4 * f, 4 * f)
        self.encoder10 = ResBlock(16 * f, 16 * f)
        self.decoder5 = UpBlock(16 * f, 8 * f)
        self.decoder4 = UpBlock(8 * f, 4 * f)
        self.decoder3 = UpBlock(4 * f, 2 * f)
        self.decoder2 = UpBlock(2 * f, f)
        self.decoder1 = UpBlock(f, f)

    def run(self, block: nn.Module, *inputs) -> Tensor:
        """Return block(*inputs); with `checkpointing`, its activations are not kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def features(self, volume: Tensor, fuse: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Return the bottleneck (B,16f,D/32,H/32,W/32) and the decoder's output (B,f,D,H,W).

        volume: preprocessed, (B,C,D,H,W). fuse: a function applied to the bottleneck before
        decoding; the returned bottleneck is without it.
        """
        check_size(volume, self.config.in_channels)
        x0, x1, x2, x3, x4 = self.swinViT(volume, self.run)
        bottleneck = self.run(self.encoder10, x4)  # (B,16f,D/32,H/32,W/32)

        x = bottleneck if fuse is None else fuse(bottleneck)
        x = self.run(self.decoder5, x, x3)  # (B,8f,D/16,H/16,W/16)
        skip = self.run(self.encoder4, x2)
        x = self.run(self.decoder4, x, skip)  # (B,4f,D/8,H/8,W/8)
        skip = self.run(self.encoder3, x1)
        x = self.run(self.decoder3, x, skip)  # (B,2f,D/4,H/4,W/4)
        skip = self.run(self.encoder2, x0)
        x = self.run(self.decoder2, x, skip)  # (B,f,D/2,H/2,W/2)
        skip = self.run(self.encoder1, volume)
        x = self.run(self.decoder1, x, skip)  # (B,f,D,H,W)
        return bottleneck, x

    def preprocess(self, volume: Tensor) -> Tensor:
        """Scale the intensities of a volume (C,D,H,W); see `preprocess` below."""
        return preprocess(volume, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Return probabilities (K,*size) of logits (K,D,H,W); see `postprocess` below."""
        return postprocess(logits, size, self.config)


class SwinUNETR(EncoderDecoder):
    """Swin UNETR: logits of each class for each voxel."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.out = nn.Conv3d(config.feature_size, config.num_classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """volume: preprocessed, (B,C,D,H,W) -> logits (B,K,D,H,W)."""
        _, x = self.features(volume)  # (B,f,D,H,W)
        return pointwise(x, self.out.weight, self.out.bias).contiguous()  # (B,K,D,H,W)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "SwinUNETR":
        """Load a model in evaluation mode.

        source: a file, a folder, the output folder of a training run, or a hub id. num_classes:
        None for as many as the file has; another number makes a new `out`. A file with only the
        encoder needs a number, and gets a new decoder. The names of newly initialised parts are
        printed. overrides: fields of Config. Raises ValueError or FileNotFoundError, one line, for
        a file that does not fit.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = convert(weights)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "SwinUNETR", source, Config))
        else:
            values = config_from_shapes(weights)
            values |= config_from_name(source, settings, quiet="merging" in overrides)
            config = Config(**values)
        weights, config, fresh = new_classes(weights, num_classes, config, source)
        model = cls(replace(config, **overrides))
        return load(model, weights, fresh, source)


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = (
    "best.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "model.pt",
    "models/model.pt",
    "model_swinvit.pt",
)
# Released files, by the name of the file, its folder or its repository, and the fields of Config
# that do not follow from their tensors. All of them have the merging "legacy".
RELEASED = {
    "swin_unetr_btcv_segmentation": BTCV,
    "swinunetr-btcv-tiny": BTCV,
    "swinunetr-btcv-small": BTCV,
    "swinunetr-btcv-base": BTCV,
    "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt": BTCV,
    "swin_unetr.small_5000ep_f24_lr2e-4_pretrained.pt": BTCV,
    "swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt": BTCV,
    "fold0_f48_ep300_4gpu_dice0_8854": BRATS21,
    "fold1_f48_ep300_4gpu_dice0_9059": BRATS21,
    "fold2_f48_ep300_4gpu_dice0_8981": BRATS21,
    "fold3_f48_ep300_4gpu_dice0_8924": BRATS21,
    "fold4_f48_ep300_4gpu_dice0_9035": BRATS21,
    "model_swinvit.pt": {},
    "self_supervised_nv_swin_unetr_5050.pt": {},
    "ssl_pretrained_weights.pth": {},
}
IGNORED = (
    r".*\.relative_position_index",  # computed by `position_index`
    r"(swinViT\.)?norm\.(weight|bias)",  # last norm of the bare encoder, which Swin UNETR lacks
    r"(rotation_head|contrastive_head|convTrans3d|conv)\..*",  # heads of self-supervised training
)
OTHERS_TO_MONAI = (
    (r"^backbone\.", ""),  # Universal Model
    (r"^swin_vit\.", "swinViT."),  # older self-supervised training
    (r"^(encoder\.)?(patch_embed\.|layers\d)", r"swinViT.\2"),  # bare encoder; autoencoder
    (r"(layers\d\.0)\.0\.", r"\1."),  # Disruptive Autoencoders
    (r"\.fc([12])\.", r".linear\1."),  # model_swinvit.pt
)
MONAI_TO_OURS = (
    (r"\.layers(\d)\.0\.", lambda match: f".layers.{int(match[1]) - 1}."),
    (r"\.layers(\d)c\.0\.layer\.", lambda match: f".layers.{int(match[1]) - 1}.conv."),
    (r"^(encoder\d+)\.layer\.", r"\1."),
    (r"^out\.conv\.conv\.", "out."),
    (r"(conv\d?)\.conv\.weight$", r"\1.weight"),
)
OURS_TO_MONAI = (
    (r"\.layers\.(\d)\.conv\.", lambda match: f".layers{int(match[1]) + 1}c.0.layer."),
    (r"\.layers\.(\d)\.", lambda match: f".layers{int(match[1]) + 1}.0."),
    (r"^(encoder\d+)\.", r"\1.layer."),
    (r"(conv\d?)\.weight$", r"\1.conv.weight"),
    (r"^out\.", "out.conv.conv."),
)
# Parameters that may be newly initialised.
FRESH = {
    "classes": r"out\..*",  # if the number of classes differs
    "encoder alone": r"(encoder|decoder|out).*",  # everything outside swinViT
}


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under our names, from any naming.

    Raises ValueError if a tensor appears under two names.
    """
    # Disruptive Autoencoders have another decoder. MONAI, too, takes only their encoder.
    if "encoder.patch_embed.proj.weight" in state_dict:
        is_encoder = re.compile(r"encoder\.(patch_embed|layers)").match
        state_dict = {name: t for name, t in state_dict.items() if is_encoder(name)}

    weights = {}
    for official, tensor in state_dict.items():
        if any(re.fullmatch(pattern, official) for pattern in IGNORED):
            continue
        name = official
        for pattern, replacement in (*OTHERS_TO_MONAI, *MONAI_TO_OURS):
            name = re.sub(pattern, replacement, name)
        if name in weights:
            raise ValueError(f"{name} is in the file twice, under two names")
        weights[name] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under MONAI's names, for `load_state_dict` of its class."""
    weights = {}
    for ours, tensor in state_dict.items():
        name = ours
        for pattern, replacement in OURS_TO_MONAI:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
        if name.endswith("relative_position_bias_table"):  # MONAI stores an index with each table
            index_name = name.replace("bias_table", "index")
            weights[index_name] = position_index().to(tensor.device)
    return weights


def load(
    model: EncoderDecoder,
    weights: dict[str, Tensor],
    fresh: str,
    source,
    official: Callable = to_official,
) -> EncoderDecoder:
    """Fill a model with weights and return it in evaluation mode.

    fresh: a pattern of the parameters that may be missing; those that are missing stay newly
    initialised, and their modules are printed. official: a function that renames tensors for
    messages. Raises ValueError, one line, if anything else does not fit.
    """
    expected = model.state_dict()
    new = {}
    for name, tensor in expected.items():
        if name not in weights and re.fullmatch(fresh, name):
            new[name] = tensor
    check_complete(official(weights | new), official(expected), source)
    model.load_state_dict(weights | new)
    if new:
        modules = dict.fromkeys(name.split(".")[0] for name in new)
        print(f"{source}: new and untrained: {', '.join(modules)}")
    return model.eval()


def config_from_shapes(weights: dict[str, Tensor]) -> dict:
    """Return the fields of Config that follow from the names and shapes of the tensors."""
    values = {"v2": any(".layers.0.conv." in name for name in weights)}
    kernel = weights.get("swinViT.patch_embed.proj.weight")  # (f,C,2,2,2)
    if kernel is not None:
        values["feature_size"] = kernel.shape[0]
        values["in_channels"] = kernel.shape[1]
    return values


def config_from_name(source, settings: dict, quiet: bool, released: dict = RELEASED) -> dict:
    """Return the fields of Config that do not follow from the tensors.

    The merging comes from `settings`, a config.json, if it is there. All else comes from
    `released`, by the name of the file, its folder or its repository; fields of unknown names keep
    their defaults. Unless `quiet`, a printed line says where the merging comes from.
    """
    path_parts = Path(str(source).split("@")[0]).parts
    known = None
    for name, values in released.items():
        if name in path_parts:
            known = values
            break

    if "merging" in settings:
        reason = "as config.json says"
    elif known is None:
        reason = "the default for unknown names; MONAI has merging since 1.5.0"
    else:
        reason = "by its name"
    merging = settings.get("merging", "legacy")
    if not quiet:
        print(f"{source}: merging {merging}, {reason}")
    return {**(known or {}), "merging": merging}


def new_classes(
    weights: dict[str, Tensor], num_classes: int | None, config: Config, source
) -> tuple[dict[str, Tensor], Config, str]:
    """Fit the weights of a file and their config to a number of classes.

    num_classes: None for as many as the file has. Returns the weights, without an `out` of another
    number of classes; the config, without the names of classes if their number differs; and a
    pattern of the parameters that may be newly initialised. Raises ValueError, one line, if the
    file has only the encoder and no number is given.
    """
    out = weights.get("out.weight")  # (K,f,1,1,1)
    fresh = ""
    is_encoder_alone = not any(re.fullmatch(FRESH["encoder alone"], name) for name in weights)
    if is_encoder_alone:
        if num_classes is None:
            raise ValueError(f"{source}: the encoder alone, without a decoder; give num_classes")
        fresh = FRESH["encoder alone"]
    elif out is not None and num_classes in (None, len(out)):
        num_classes = len(out)
    elif out is not None:
        fresh = FRESH["classes"]
        weights = {name: t for name, t in weights.items() if not re.fullmatch(fresh, name)}

    num_classes = num_classes or config.num_classes
    classes = config.classes
    expected = num_classes + 1 if config.overlapping else num_classes  # with the background
    if len(classes) != expected:
        classes = ()
    return weights, replace(config, num_classes=num_classes, classes=classes), fresh


def preprocess(volume: Tensor, config: Config) -> Tensor:
    """Scale the intensities of a volume: (C,D,H,W) -> (C,D,H,W) float32.

    volume: at the config's spacing, in RAS orientation (axes point right, anterior, superior). The
    Hounsfield units of `config.intensity` become 0..1, clamped; with None, the voxels of each
    channel that are not 0 get mean 0 and standard deviation 1. NaN and infinite voxels are ignored
    and set to 0. Raises TypeError for an array or a path, ValueError for another number of axes.
    """
    if not isinstance(volume, Tensor):
        raise TypeError(
            f"preprocess takes a tensor (C,D,H,W), not {type(volume).__name__}; use "
            "torch.from_numpy(array) or, for a file, volumes.segment(model, path)"
        )
    if volume.ndim != 4:
        shape = tuple(volume.shape)
        raise ValueError(f"preprocess takes a volume (C,D,H,W), not {shape}; volume[None] adds C")

    x = volume.float()
    finite = x.isfinite()
    if config.intensity is not None:
        low, high = config.intensity
        scaled = ((x - low) / (high - low)).clamp(0, 1)
        return torch.where(finite, scaled, 0)

    inside = finite & (x != 0)
    count = inside.sum((1, 2, 3), keepdim=True).clamp(min=1)  # (C,1,1,1)
    x = torch.where(inside, x, 0)
    x = x - x.sum((1, 2, 3), keepdim=True) / count
    variance = (x * inside).square().sum((1, 2, 3), keepdim=True) / count  # (C,1,1,1)
    deviation = variance.sqrt()
    deviation = torch.where(deviation > 0, deviation, 1)
    return torch.where(inside, x / deviation, 0)


def postprocess(logits: Tensor, size: tuple[int, int, int], config: Config) -> Tensor:
    """Return probabilities (K,*size) float32 of logits (K,D,H,W), which are resized to `size`.

    They are a softmax over the classes, or sigmoids of a single class or overlapping classes.
    """
    x = logits.float()
    if logits.shape[1:] != tuple(size):
        x = F.interpolate(x[None], size, mode="trilinear", align_corners=False)[0]
    if config.overlapping or len(x) == 1:
        return x.sigmoid()
    return x.softmax(0)


# shared: run_folder
def run_config(settings: dict, kind: str, source, config: type) -> dict:
    """Return the fields of the dataclass `config` from the config.json that train.py wrote.

    Raise ValueError if it belongs to another model, comes from a newer version or is malformed.
    """
    found_kind = settings.get("class")
    version = settings["format"]
    if found_kind != kind or version != 1:
        raise ValueError(
            f"{source}: holds {found_kind} in format {version}, not {kind} in format 1"
        )
    values = settings.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{source}: config.json has no `config` of the model; restore the file")

    known = config.__dataclass_fields__
    fields = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: config.json is of a newer version (it has {name:.50})")
        may_be_none = value is None and "None" in str(known[name].type)
        if not may_be_none and not is_like(value, known[name].default):
            example = f"a value such as {known[name].default!r:.50}"
            raise ValueError(f"{source}: config.json: {name} is {value!r:.50}, expected {example}")
        fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def is_like(value, default) -> bool:
    """Return True if a value of a JSON file has the type and range of a field's default."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list | tuple) else [None]
        first = default[0] if default else ""
        # Tuples of floats, such as mean and std, have a fixed length.
        has_wrong_length = isinstance(first, float) and len(items) != len(default)
        return not has_wrong_length and all(is_like(item, first) for item in items)
    if isinstance(default, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < 1e9  # False for NaN, too
    if isinstance(default, int) and not isinstance(default, bool):
        return type(value) is int and 0 <= value < 1e9
    return type(value) is type(default)


# end shared


# shared: read_checkpoint
# The errors of torch for missing memory on a CPU are plain RuntimeErrors.
FULL_MEMORY = re.compile("allocate memory|not enough memory")


def read_checkpoint(source: str | Path, files: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Load weights and settings from a file, a folder or the hub (`owner/name`, or `…@revision`).

    From a folder or repository, the first of `files` that exists is loaded. Return the state dict,
    without the wrappers and prefixes of training programs, and the config.json beside the file, {}
    if there is none. Raise OSError (FileNotFoundError) or ValueError if there are no weights.
    """
    path = Path(source)
    if path.is_dir():
        present = [name for name in files if (path / name).exists()]
        if not present:
            raise FileNotFoundError(f"{source}: has none of {', '.join(files)}; name the file")
        path = path / present[0]
    elif not path.exists():
        path = download(str(source), files)

    weights = unwrap(read_file(path), path)
    config = path.parent / "config.json"
    settings = read_file(config) if config.exists() else {}
    return weights, settings


def read_file(path: Path) -> dict:
    """Return the content of a .json or .safetensors file, a TorchScript archive or a pickle.

    No code in a file is run. Raise ValueError if it is damaged or holds something else. If memory
    runs out, the MemoryError or RuntimeError is passed on.
    """
    resave = "where it was made, save it with torch.save(model.state_dict(), path)"
    try:
        content = parse_file(path)
    except CodeInFile as error:
        raise ValueError(f"{path}: cannot be read ({error}); {resave}") from None
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | OSError) and FULL_MEMORY.search(str(error)):
            raise
        if "unsupported global" in str(error).lower():  # of torch.load
            message = f"{path}: cannot be read (it contains code); {resave}"
        else:
            reason = " ".join(f"{error!r:.150}".split())
            message = f"{path}: cannot be read ({reason}); get the whole file"
        raise ValueError(message) from None
    if isinstance(content, dict):
        return content

    kind = f"a {type(content).__name__}"
    if isinstance(content, Tensor):
        dtype = str(content.dtype).removeprefix("torch.")
        kind = f"a single tensor, {dtype} of shape {tuple(content.shape)}"
    raise ValueError(f"{path}: holds {kind}, not named tensors (a state dict)")


def parse_file(path: Path):
    """Return the content of a file; its first bytes, suffix and archive entries tell its kind."""
    with open(path, "rb") as file:
        if file.read(64).lstrip().startswith((b"<", b"version https://git-lfs")):
            raise ValueError("a web page or Git LFS pointer")
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# end shared


# shared: unwrap
def unwrap(content: dict, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a training checkpoint. Raise ValueError if there is none."""
    weights = content
    for key in ("state_dict", "model", "net"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]

    for name, value in weights.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise ValueError(f"{path}: no state dict: the key {name!r:.80} is of type {kind}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: no state dict: {name!r} is not a tensor")

    for prefix in ("module.", "net."):
        renamed = {}
        for name, tensor in weights.items():
            bare = name.removeprefix(prefix)
            if bare in weights:  # keep the prefix if another tensor has the bare name
                bare = name
            renamed[bare] = tensor
        weights = renamed
    return weights


# end shared


# shared: script_unpickler
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


class CodeInFile(ValueError):
    """A file can only be read by running code that it contains."""


class ScriptObject:
    """An inert stand-in for an object of the archive; `state` is the saved state of the object."""

    def __init__(self, *arguments):
        self.state = arguments

    def __setstate__(self, state):
        self.state = state


class ScriptUnpickler(pickle.Unpickler):
    """Reads data.pkl: the archive's own classes become inert, all other classes are refused."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive = archive
        self.root = root
        self.storages = {}
        # All that a pickle may call: bound methods and built-in types, which it cannot change.
        self.allowed = {
            "torch._utils._rebuild_tensor_v2": self.rebuild_tensor,
            "torch._utils._rebuild_parameter": self.first_argument,
            "torch.device": str,
            "collections.OrderedDict": dict,
            "builtins.complex": complex,
            "torch.jit._pickle.build_intlist": self.first_argument,
            "torch.jit._pickle.build_doublelist": self.first_argument,
            "torch.jit._pickle.build_boollist": self.first_argument,
            "torch.jit._pickle.build_tensorlist": self.first_argument,
            "torch.jit._pickle.restore_type_tag": self.first_argument,
        }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return type(name, (ScriptObject,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if f"{module}.{name}" not in self.allowed:
            raise CodeInFile(f"it calls {module}.{name}, which is not run")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, storage_id: tuple) -> Tensor:
        """Return a storage as a 1-D tensor; tensors of one storage share its memory."""
        _, dtype, key, _, _ = storage_id
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            flat = torch.empty(0, dtype=dtype)
            if content:  # torch.frombuffer rejects an empty buffer
                flat = torch.frombuffer(content, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]

    def rebuild_tensor(self, storage, offset, size, stride, requires_grad, hooks, *more) -> Tensor:
        if any(more):
            raise pickle.UnpicklingError(f"a tensor has {more}, which is not read")
        return storage.as_strided(size, stride, offset)

    def first_argument(self, value, *_):
        return value


# end shared


# shared: torchscript
MAX_MODULES = 100_000  # a small malicious file can nest modules endlessly


def is_torchscript(path: Path) -> bool:
    """Return True if a file was written by torch.jit.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return `torch.jit.load(path).state_dict()` without running any code of the archive."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        if f"{root}/byteorder" in archive.namelist():
            order = archive.read(f"{root}/byteorder").decode()
            if order != sys.byteorder:
                raise ValueError(f"its numbers are {order}-endian, those here {sys.byteorder}")
        with archive.open(f"{root}/data.pkl") as file:
            module = ScriptUnpickler(file, archive, root).load()
        return script_tensors(module, archive, root)


def script_tensors(module: ScriptObject, archive: zipfile.ZipFile, root: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module and its submodules, by their dotted names."""
    tensors = {}
    names_of = {}  # class -> result of `tensor_names`
    pending = [("", module)]
    count = 0
    while pending:
        count += 1
        if count > MAX_MODULES:
            raise ValueError(f"it holds more than {MAX_MODULES:,} modules")
        prefix, module = pending.pop()
        kind = type(module).qualified_name
        if kind not in names_of:
            names_of[kind] = tensor_names(module, archive, root)
        names = names_of[kind]
        if names is None:
            continue
        for attribute, value in module.state.items():
            if isinstance(value, ScriptObject):
                pending.append((f"{prefix}{attribute}.", value))
            elif isinstance(value, Tensor) and attribute in names:
                tensors[prefix + attribute] = value
    return tensors


def tensor_names(module: ScriptObject, archive: zipfile.ZipFile, root: str) -> set[str] | None:
    """Return which attributes of a module are parameters or buffers; None if it is not a module.

    They are parsed from the archive's source code as text. Raise CodeInFile if a module builds its
    tensors in `__setstate__`, which would have to be run.
    """
    *parents, name = type(module).qualified_name.split(".")
    code = archive.read(f"{root}/code/{'/'.join(parents)}.py").decode()
    body = re.search(rf"^class {re.escape(name)}\(Module\):\n((?: .*\n|\n)*)", code, re.M)
    if body is None:
        return None

    fields = re.split(r"^  def ", body[1], maxsplit=1, flags=re.M)[0]
    names = {"parameters": [], "buffers": []}
    for kind, listed in re.findall(r"^  __(parameters|buffers)__ = \[(.*)\]", fields, re.M):
        names[kind] = re.findall(r'"(.*?)"', listed)
    if "  def __setstate__(" in body[1]:
        if any(names.values()) or " __torch__." in fields:
            kind = type(module).qualified_name
            raise CodeInFile(f"{kind} builds tensors in __setstate__, which is not run")
        return None

    # Like torch.jit: a buffer is declared as Tensor, not as Optional[Tensor].
    declared = re.findall(r'^  (?:__annotations__\["(.*?)"\] =|(\w+) :) Tensor$', fields, re.M)
    declared = {quoted or plain for quoted, plain in declared}
    return {*names["parameters"]} | declared.intersection(names["buffers"])


# end shared


# shared: download
def download(source: str, files: tuple[str, ...]) -> Path:
    """Return the first of `files` that a hub repository has; download it unless it is cached.

    source: `owner/name` or `owner/name@revision`. Its config.json is put beside the file. A cached
    file that has changed since its download is removed, and downloaded again.
    Raise FileNotFoundError if there is no such file, and the errors of `hub_errors`.
    """
    import huggingface_hub as hub

    repository, _, revision = source.partition("@")
    is_file = Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_file or repository.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder; a hub id is owner/name")

    with hub_errors(source):
        for name in files:
            cached = hub.try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(cached, str):
                if removed_if_damaged(Path(cached), Path(cached).resolve().name):
                    print(f"{source}: {name} in the cache was damaged; it was removed")
                    break
                return Path(cached)

        fetch(repository, "config.json", revision)
        for name in files:
            path = fetch(repository, name, revision)
            if path is not None:
                return path
    raise FileNotFoundError(f"{source}: the repository has none of {', '.join(files)}")


def fetch(repository: str, name: str, revision: str) -> Path | None:
    """Download one file of a hub repository and print its size; None if there is no such file.

    A file that is in the cache is not downloaded again. Raise OSError if the file arrives damaged.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    url = hub.hf_hub_url(repository, name, revision=revision or None)
    try:
        facts = hub.get_hf_file_metadata(url)
    except EntryNotFoundError:
        return None

    cached = hub.try_to_load_from_cache(repository, name, revision=facts.commit_hash)
    if not isinstance(cached, str):
        size = f"{(facts.size or 0) / 1e6:,.1f} MB"
        version = f"{repository}@{revision}" if revision else repository
        print(f"downloading {name}, {size}, of {version} from {hub.constants.ENDPOINT}")
    path = Path(hub.hf_hub_download(repository, name, revision=revision or None))
    if removed_if_damaged(path, facts.etag):
        raise OSError(f"{name} arrived damaged, its SHA-256 is wrong, and was removed")
    return path


def removed_if_damaged(path: Path, etag: str) -> bool:
    """Remove a file from the hub's cache, and return True, if its SHA-256 is not `etag`.

    The hub has it for large files only; any other `etag` says nothing, and the file stays.
    """
    if not re.fullmatch("[0-9a-f]{64}", etag):
        return False

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() == etag:
        return False
    path.resolve().unlink()
    path.unlink(missing_ok=True)  # the link to it
    return True


# end shared


# shared: hub_errors
@contextmanager
def hub_errors(source: str):
    """Turn the errors of huggingface_hub in a block into errors of one line.

    Raise FileNotFoundError if the repository or its revision does not exist, or may not be seen,
    OSError if it is gated, if the token is wrong, or if there is no connection.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source}: the repository has no such revision") from None
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{source.partition('@')[0]}"
        raise OSError(
            f"{source}: is gated; accept its terms at {page}, and log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{source}: neither a file nor a repository that you can read: on the hub it is gated "
            "or private, or does not exist; correct the name, or log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from None
    except Exception as error:  # its class depends on the version of huggingface_hub
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        advice = "check the connection, or get the file elsewhere and give its path"
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            reason = "it refuses the token"
            advice = "log in again with `hf auth login`, or correct HF_TOKEN"
        message = f"{source}: could not be downloaded from the hub ({reason}); {advice}"
        raise OSError(message) from None


# end shared


# shared: tensor_fault
def tensor_fault(found: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor of a file, "" if nothing is wrong."""
    if found is None:
        return f"is missing, expected {tuple(expected.shape)}"
    if found.is_nested:
        return "is a nested tensor, expected a dense one"
    if expected is None:
        return f"is {tuple(found.shape)}, expected no such tensor"
    if found.shape != expected.shape:
        return f"is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return ""

    if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(found.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, expected float16, bfloat16, float32 or float64"
    if found.layout != torch.strided or found.is_meta:
        return "is sparse or has no values, expected a dense tensor"
    if found.numel():
        low, high = torch.aminmax(found.detach())  # NaN if any is; faster than isfinite
        largest = torch.finfo(expected.dtype).max
        if not -largest <= low.item() <= high.item() <= largest:
            return (
                f"holds NaN, infinity or values beyond {str(expected.dtype).removeprefix('torch.')}"
            )
    return ""


# end shared


# shared: check_complete
def check_complete(found: dict[str, Tensor], expected: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, that names the first tensors that do not fit.

    Names and shapes must be the expected ones. What fills a floating-point tensor must be finite
    floating-point numbers; what fills an index may be of any type.
    """
    faults = []
    for name in expected | found:
        fault = tensor_fault(found.get(name), expected.get(name))
        if fault:
            faults.append(f"{name} {fault}")
    if not faults:
        return

    hint = ""
    if len(faults) > len(expected) / 2 and recognise(found):
        hint = f"; the file seems to be {recognise(found)}"
    raise ValueError(f"{source}: {len(faults)} tensors do not fit: {'; '.join(faults[:5])}{hint}")


# Names that only one kind of file has, the most special kinds first.
KINDS = {
    r"w_[ab]_\d+$": "a LoRA of SAM's image encoder (names of SAMed)",
    r"parametrizations\.\w+\.\d+\.(up|down)$": "an adapter.safetensors of a run",
    r"visual\.trunk\.": "BiomedCLIP",
    r"(neck\.txt_proj|visual\.attnpool\.connect)\.": "CRIS",
    r"(clip\.(text|vision)_model|clip_model)\.": "CLIPSeg",
    r"(film_mul|trans_conv|transposed_convolution)\.": "a decoder of CLIPSeg without CLIP",
    r"visual\.(conv1|layer1)\.": "CLIP (names of OpenAI)",
    r"(text|vision)_model\.embeddings\.": "CLIP (names of transformers)",
    r"(mask_decoder|prompt_encoder)\.": "SAM",
    r"organ_embedding": "the Universal Model",
    r"swinViT\.": "a Swin UNETR",
    r"(segformer\.|encoder\.patch_embeddings\.\d\.proj\.)": "a SegFormer",
    r"beit\.": "a BEiT",
    r"(dpt\.|reassemble\.\d\.)": "a DPT",
    r"backbone\.encoder\.stages\.": "a UPerNet on ConvNeXt",
    r"layer4\.\d\.conv1\.": "a ResNet",
}


def recognise(weights: dict[str, Tensor]) -> str:
    """Return which known kind of file has tensors of these names, "" if none."""
    for pattern, kind in KINDS.items():
        if any(re.match(rf"(.*\.)?{pattern}", name) for name in weights):
            return kind
    return ""
