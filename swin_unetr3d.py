"""Swin UNETR: a volume in, the class of every voxel out. Windows of attention, then a U-Net.
And the CLIP-Driven Universal Model on it, whose classes are texts: `UniversalSwinUNETR`.

Papers: Hatamizadeh et al., BrainLes 2021, arXiv 2201.01266; Tang et al., CVPR 2022, arXiv
2111.14791 (self-supervised); He et al., MICCAI 2023 (v2). Code: github.com/Project-MONAI/MONAI
1.6.1, monai/networks/nets/swin_unetr.py and blocks/{dynunet,unetr}_block.py (Apache 2.0); its
training, Project-MONAI/research-contributions at 21ed8e5, SwinUNETR. Weights: on the hub
darragh/swinunetr-btcv-{tiny,small,base} (Apache 2.0), MONAI/swin_unetr_btcv_segmentation (licence
not checked); of MONAI-extra-test-data's release 0.8.1 (not checked) swin_unetr.*_pretrained.pt
(BTCV), BraTS21's folds, and the encoder alone, model_swinvit.pt.

    volume (B,1,96,96,96), base
      swinViT.patch_embed, a convolution of 2x2x2 with stride 2: (B,48,48,48,48), x0
      swinViT.layers, four stages: two blocks of attention within windows of 7x7x7, shifted by 3 in
      the second, and a merger of 2x2x2 neighbours into twice the channels
    x1 (B,96,24,24,24), x2 (B,192,12,12,12), x3 (B,384,6,6,6), x4 (B,768,3,3,3), normalised
      encoder10 of x4; decoder5 doubles the sides and adds x3; decoder4, 3, 2 add encoder4, 3, 2
      of x2, x1, x0; decoder1 adds encoder1 of the volume
    (B,48,96,96,96)
      out, a 1x1x1 convolution
    logits (B,14,96,96,96)

Sides are multiples of 32, one at least 64. quirk: MONAI 1.5.0 changed the order in which neighbours
merge, under the same name, in the same shapes. All released files are older and need
`merging="legacy"`; files of later versions need "merging". No tensor tells: RELEASED does.
Same numbers as MONAI's with less work: `WindowedAttention`, `Normalised`, `add_upsampled_conv`, and
channels last in memory. Left out: two dimensions, dropout (0 in all files), self-supervised heads.

A whole CT is turned to RAS, resampled to `config.spacing`, preprocessed, cut into windows of
`config.image_size` and brought back to its own grid. Copy the folder `imaging/` too; of it
`volumes.py` is needed, with numpy, nibabel and tqdm:
    from imaging import volumes
    probabilities, labels, affine = volumes.segment(SwinUNETR.from_pretrained(…), "ct.nii.gz")
In MONAI: Orientation("RAS"), Spacing, `preprocess`, sliding_window_inference(mode="gaussian").
"""

import json
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    feature_size: int = 48  # channels of x0, a multiple of 12
    in_channels: int = 1
    num_classes: int = 14
    v2: bool = False  # a residual block of convolutions before each stage
    merging: str = "legacy"  # order of merged neighbours, a key of OCTANTS
    image_size: tuple[int, ...] = (96, 96, 96)  # of the windows that a volume is cut into
    spacing: tuple[float, ...] = (1.5, 1.5, 2.0)  # mm
    intensity: tuple[float, ...] | None = (-175.0, 250.0)  # HU that become 0..1; None: z-scores
    overlapping: bool = False  # a voxel may be of several classes: a sigmoid each, no softmax
    threshold: float = 0.5  # of a model with one class or overlapping ones
    classes: tuple[str, ...] = ()  # their names, of several the background's first; (): not known


BTCV = dict(classes=(
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
    "right adrenal gland", "left adrenal gland",
))  # fmt: skip

BRATS21 = dict(image_size=(128,) * 3, spacing=(1.0,) * 3, intensity=None, overlapping=True)

BRATS21 |= dict(classes=("background", "tumor core", "whole tumor", "enhancing tumor"))

VARIANTS = {  # parameters
    "base": Config(),  # 62,187,296
    "small": Config(24),  # 15,703,304
    "tiny": Config(12),  # 4,078,220
    "tiny-v2": Config(12, v2=True),  # 4,739,180
    "small-v2": Config(24, v2=True),  # 18,347,144
    "base-v2": Config(v2=True),  # 72,762,656
    "brats21": Config(in_channels=4, num_classes=3, **BRATS21),  # 62,191,941; FLAIR, T1ce, T1, T2
    "mini": Config(12, num_classes=3, image_size=(64, 64, 64)),  # 4,078,077; for tests and demos
}

WINDOW, SHIFT = 7, 3  # tokens along a side


def pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(7,7), of two places along an axis -> of D (7,1,1,7,1,1), of H and of W, to be broadcast."""
    d = x[:, None, None, :, None, None]  # (7,1,1,7,1,1)
    return d, d.movedim((0, 3), (1, 4)), d.movedim((0, 3), (2, 5))


def position_index() -> Tensor:
    """Row of the bias table for each pair of tokens (query, key) of a window, (343,343)."""
    i = torch.arange(WINDOW)
    d, h, w = pairs(i[:, None] - i + WINDOW - 1)  # how far apart, from 0
    side = 2 * WINDOW - 1
    return ((d * side + h) * side + w).reshape(WINDOW**3, WINDOW**3)


def shift_masks() -> Tensor:
    """What is added to the scores of a window that is the last along no, one, ... all three axes.

    There the volume's two ends meet, and tokens of one must not see those of the other.
    -> (2,2,2,7,7,7,7,7,7): is it the last along D, H, W, the query's place in it, the key's.
    """
    other_end = torch.arange(WINDOW) >= WINDOW - SHIFT
    apart = torch.zeros(2, 2, 2, *(WINDOW,) * 6, dtype=torch.bool)
    for axis, pair in enumerate(pairs(other_end[:, None] != other_end)):
        apart.select(axis, 1).logical_or_(pair)
    return apart * -100.0  # quirk: not -inf


def windows(x: Tensor, window: tuple[int, ...], parts: int, heads: int) -> Tensor:
    """x (B,D,H,W,parts*h*d) -> a view of it, (parts,B,D/7,H/7,W/7,h,7,7,7,d) for windows of 7."""
    sizes = (n for side, w in zip(x.shape[1:4], window, strict=True) for n in (side // w, w))
    x = x.view(len(x), *sizes, parts, heads, -1)  # (B,D/7,7,H/7,7,W/7,7,parts,h,d)
    return x.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)


def slabs(window: tuple[int, ...], shifts: tuple[int, ...]) -> Iterator[tuple]:
    """The windows that share a mask, at most 8 groups: an index into `windows(...)`, and which.

    Where an axis is shifted, its last windows are apart from the others.
    """
    for last in product(*((0, 1) if shift else (0,) for shift in shifts)):
        ends = zip(last, shifts, strict=True)
        part = (slice(-1, None) if i else slice(-1 if shift else None) for i, shift in ends)
        yield (slice(None), slice(None), *part), (*last, *(slice(w) for w in window * 2))


# Attention scores that exist at a time while gradients are made: 17 MB, and 268 MB on a GPU, which
# waits for small pieces longer than it computes them.
CHUNK = 2**22

CHUNK_ON_GPU = 2**26


def gradients(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, bias: Tensor, dbias: Tensor) -> None:
    """q, k, v (n,h,N,d) become their gradients, given dy of the result; dbias (h,N,N) grows."""
    scale = q.shape[3] ** -0.5
    p = torch.add(bias, q @ k.mT, alpha=scale).softmax(3)  # (n,h,N,N)
    dp = (dy @ v.mT).to(p.dtype)  # (n,h,N,N), half precision has a float32 bias
    ds = torch._softmax_backward_data(dp, p, 3, p.dtype)  # of the scores
    dbias += ds.sum(0)
    ds, p = ds.to(q.dtype), p.to(q.dtype)
    dq, dk = scale * (ds @ k), scale * (ds.mT @ q)
    q.copy_(dq), k.copy_(dk), v.copy_(p.mT @ dy)


class WindowedAttention(torch.autograd.Function):
    """softmax(q k / sqrt(d) + bias + mask) v of the tokens of each window, slab by slab.

    MONAI adds bias and mask to the scores of all windows, and keeps these for the gradients: 484 MB
    in a block of base at 96x96x96. Here a slab adds one sum of both, as large as the scores of a
    window, inside the fused kernel; gradients make the scores again, a few windows at a time.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, masks: Tensor, window: tuple, shifts: tuple):
        """qkv (B,D,H,W,3C), bias (h,N,N), `shift_masks`, sides of a window, shifts -> (B,D,H,W,C).

        Sides are multiples of the window's, of whose N tokens the channels are heads*d.
        """
        h, N = bias.shape[:2]
        y = qkv.new_empty(*qkv.shape[:4], qkv.shape[4] // 3)
        inputs, outputs = windows(qkv, window, 3, h), windows(y, window, 1, h)
        for part, mask in slabs(window, shifts):
            q, k, v = inputs[part].reshape(3, -1, h, N, inputs.shape[-1])  # (n,h,N,d) each
            added = (bias + masks[mask].reshape(N, N)).to(q.dtype)  # (h,N,N)
            some = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None])  # (n,h,N,d)
            outputs[part] = some.view(outputs[part].shape)
        ctx.save_for_backward(qkv, bias, masks)
        ctx.window, ctx.shifts = window, shifts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        qkv, bias, masks = ctx.saved_tensors
        h, N = bias.shape[:2]
        dqkv, dbias = torch.empty_like(qkv), torch.zeros_like(bias)
        given = (qkv, 3), (dy.contiguous(), 1), (dqkv, 3)
        *inputs, outputs = (windows(x, ctx.window, n, h) for x, n in given)
        most = CHUNK if dy.device.type == "cpu" else CHUNK_ON_GPU
        for part, mask in slabs(ctx.window, ctx.shifts):
            added = bias + masks[mask].reshape(N, N)  # (h,N,N)
            some = torch.cat([x[part].flatten(1, 4) for x in inputs])  # (4,n,h,7,7,7,d)
            some = some.flatten(3, 5)  # (4,n,h,N,d)
            for chunk in some.split(max(1, most // bias.numel()), 1):
                gradients(*chunk, added, dbias)
            outputs[part] = some[:3].view(outputs[part].shape)
        return dqkv, dbias, None, None, None


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, shifted: bool, index: Tensor, masks: Tensor) -> Tensor:
        """x (B,D,H,W,C), `position_index` and `shift_masks` -> (B,D,H,W,C)."""
        D, H, W = sides = x.shape[1:4]
        # A short axis is one window, which nothing shifts.
        window = tuple(min(side, WINDOW) for side in sides)
        shifts = tuple(SHIFT if shifted and side > WINDOW else 0 for side in sides)
        d, h, w = (-side % n for side, n in zip(sides, window, strict=True))
        # quirk: padding is no zero once it has the bias of qkv, and is attended to
        x = F.pad(x, (0, 0, 0, w, 0, h, 0, d)).roll([-n for n in shifts], (1, 2, 3))
        N = window[0] * window[1] * window[2]
        # quirk: a smaller window has the offsets of the first N tokens of a full one, not its own
        bias = F.embedding(index[:N, :N], self.relative_position_bias_table)  # (N,N,h)
        bias = bias.permute(2, 0, 1).contiguous()  # (h,N,N)
        y = WindowedAttention.apply(self.qkv(x), bias, masks, window, shifts)
        return self.proj(y.roll(shifts, (1, 2, 3))[:, :D, :H, :W])  # (B,D,H,W,C)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__()
        self.shifted = shifted
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.shifted, index, masks)  # (B,D,H,W,C)
        return x + self.mlp(self.norm2(x))


# The octants of a cell of 2x2x2 in the order in which they are merged.
OCTANTS = {
    # quirk: reads two octants twice and two never (swin_unetr.py of MONAI 0.9.0 to 1.4.0)
    "legacy": "000 100 010 001 101 010 001 111",
    "merging": "000 100 010 001 110 101 011 111",  # since 1.5.0
    "mergingv2": "000 001 010 011 100 101 110 111",  # since 1.0.0
}


class Merging(nn.Module):
    """A cell of 2x2x2 tokens becomes one token, of twice the channels."""

    def __init__(self, dim: int, octants: str):
        super().__init__()
        self.octants = [tuple(map(int, octant)) for octant in octants.split()]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,D,H,W,C), even sides -> (B,D/2,H/2,W/2,2C)."""
        cells = [x[:, d::2, h::2, w::2] for d, h, w in self.octants]
        return self.reduction(self.norm(torch.cat(cells, 4)))  # (B,D/2,H/2,W/2,2C)


EPS, SLOPE = 1e-5, 0.01  # of the instance norms and the leaky ReLUs


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of each volume: (B,C,D,H,W) -> (B,C,1,1,1) each."""
    if x.device.type != "cpu":
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.mean((2, 3, 4), True), x.var((2, 3, 4), correction=0, keepdim=True)
    # `var` is slow. With channels last a batch norm is fast, but adds up numbers one by one, and
    # where grey levels are few all round the same way; so that of 16 parts of each W, then of all.
    rows = x.movedim(1, 4).flatten(3).flatten(1, 2)  # (B,D*H,W*C)
    rows = rows.reshape(len(x) * math.gcd(rows.shape[1], 16), -1, rows.shape[2])
    found = zip(*(torch.batch_norm_update_stats(one, None, None, 0.0) for one in rows), strict=True)
    mean, var = (torch.stack(t).double().view(len(x), -1, x.shape[1], 1, 1, 1) for t in found)
    return mean.mean(1), var.mean(1) + mean.var(1, correction=0)  # from (B,16*W,C,1,1,1)


class Normalised(torch.autograd.Function):
    """Leaky ReLU of an instance norm plus what goes round it, in the memory of its input.

    For the gradients the result is enough, as all steps can be undone: two maps fewer a block.
    """

    @staticmethod
    def forward(ctx, x: Tensor, around: Tensor | None, slope: float) -> Tensor:
        """x (B,C,D,H,W) is overwritten, around is of its shape, slope is that below 0."""
        mean, var = moments(x)
        scale, wide = (var + EPS).rsqrt(), torch.promote_types(x.dtype, torch.float32)
        scale, shift = scale.to(wide), (-scale * mean).to(wide)  # (B,C,1,1,1)
        torch.addcmul(shift, x, scale, out=x)
        if around is not None:
            x += around
        F.leaky_relu_(x, slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, around, scale)
        ctx.slope = slope
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        y, around, scale = ctx.saved_tensors
        dy = torch.ops.aten.leaky_relu_backward(dy, y, ctx.slope, True)
        x = F.leaky_relu(y, 1 / ctx.slope)  # (B,C,D,H,W), as it was after the norm
        if around is not None:
            x -= around
        dyx, dys = (t.mean((2, 3, 4), True, dtype=scale.dtype) for t in (dy * x, dy))  # (B,C,1,1,1)
        torch.addcmul(-scale * dys, x, -scale * dyx, out=x).addcmul_(dy, scale)
        return x, None if around is None else dy, None


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1x1 convolution as a product of matrices: x (B,C,D,H,W), weight (O,C,1,1,1)."""
    return F.linear(x.movedim(1, 4), weight.flatten(1), bias).movedim(4, 1)  # (B,O,D,H,W)


class ResBlock(nn.Module):
    """Two 3x3x3 convolutions and a way round them. Norms are of each channel of each volume."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs
        self.conv3 = None if same else nn.Conv3d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,inputs,D,H,W) -> (B,outputs,D,H,W)."""
        around = x if self.conv3 is None else pointwise(x, self.conv3.weight)
        y = self.conv1(x).contiguous(memory_format=torch.channels_last_3d)  # as all that follow
        return self.rest(y, around)

    def rest(self, y: Tensor, around: Tensor) -> Tensor:
        """What conv1 gave, and what goes round it, both (B,outputs,D,H,W) -> the same shape."""
        y = Normalised.apply(y, None, SLOPE)
        if self.conv3 is not None:
            around = Normalised.apply(around, None, 1.0)
        return Normalised.apply(self.conv2(y), around, SLOPE)


class Stage(nn.Module):
    def __init__(self, dim: int, heads: int, v2: bool, octants: str):
        super().__init__()
        self.conv = ResBlock(dim, dim) if v2 else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim, heads, shifted) for shifted in (False, True))
        self.downsample = Merging(dim, octants)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor) -> Tensor:
        """x (B,D,H,W,C) -> (B,D/2,H/2,W/2,2C)."""
        x = self.conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)  # (B,D,H,W,C)
        for block in self.blocks:
            x = block(x, index, masks)
        return self.downsample(x)


HEADS = (3, 6, 12, 24)  # of the four stages


class SwinTransformer(nn.Module):
    """Within, channels come last: no layer then copies its input."""

    def __init__(self, config: Config):
        super().__init__()
        c, f = config, config.feature_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(c.in_channels, f, 2, 2)})
        stages = (Stage(f * 2**i, h, c.v2, OCTANTS[c.merging]) for i, h in enumerate(HEADS))
        self.layers = nn.ModuleList(stages)
        # For all windows of all inputs; smaller windows take their part of them.
        self.register_buffer("index", position_index(), persistent=False)
        self.register_buffer("masks", shift_masks(), persistent=False)

    def forward(self, volume: Tensor, run: Callable) -> list[Tensor]:
        """volume (B,C,D,H,W) -> maps (B,f,D/2,H/2,W/2), (B,2f,D/4,H/4,W/4) ... (B,16f,D/32,...)."""
        maps = [self.patch_embed["proj"](volume).permute(0, 2, 3, 4, 1)]  # (B,D/2,H/2,W/2,f)
        for stage in self.layers:
            maps.append(run(stage, maps[-1], self.index, self.masks))
        # The next stage sees them without this norm, which has no weights.
        maps = [F.layer_norm(x, x.shape[4:]) for x in maps]
        return [x.permute(0, 4, 1, 2, 3) for x in maps]


def upsampled(x: Tensor, weight: Tensor) -> Tensor:
    """Transposed 2x2x2 convolution with stride 2: x (B,C,d,h,w), weight (C,O,2,2,2)."""
    y = F.linear(x.movedim(1, 4), weight.permute(2, 3, 4, 1, 0).flatten(0, 3))  # (B,d,h,w,8*O)
    B, d, h, w, _ = y.shape
    y = y.view(B, d, h, w, 2, 2, 2, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B,d,2,h,2,w,2,O)
    return y.reshape(B, 2 * d, 2 * h, 2 * w, -1).movedim(4, 1)  # (B,O,2d,2h,2w)


def add_upsampled_conv(y: Tensor, x: Tensor, up: Tensor, weight: Tensor) -> None:
    """Adds to y a 3x3x3 convolution, padding 1, of `upsampled(x, up)`, made as one.

    Together they are a transposed convolution of 4x4x4 with stride 2. Each output of even or odd
    place along each axis sees 2x2x2 inputs: eight convolutions at the small size, 64 products of
    numbers where there were 216 and more. x (B,C,d,h,w), up (C,O,2,2,2), weight (O,O,3,3,3),
    y (B,O,2d,2h,2w).
    """
    both = F.conv3d(up, weight, padding=2).flip(2, 3, 4).transpose(0, 1)  # (O,C,4,4,4)
    d, h, w = x.shape[2:]
    for i, j, k in product((0, 1), repeat=3):
        part = F.conv3d(x, both[:, :, i::2, j::2, k::2].contiguous(), padding=1)
        y[:, :, i::2, j::2, k::2] += part[:, :, i : i + d, j : j + h, k : k + w]


class UpBlock(nn.Module):
    """Twice as large, next to what was skipped, through a residual block.

    The first convolutions of the concatenation are sums over its two halves, which is never made.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.transp_conv = nn.ConvTranspose3d(inputs, outputs, 2, stride=2, bias=False)
        self.conv_block = ResBlock(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B,inputs,D/2,H/2,W/2), skip (B,outputs,D,H,W) -> (B,outputs,D,H,W)."""
        C, block, up = skip.shape[1], self.conv_block, self.transp_conv.weight
        # Weights of the halves, (C,C,3,3,3) and (C,C,1,1,1).
        (up1, skip1), (up3, skip3) = (m.weight.split(C, 1) for m in (block.conv1, block.conv3))
        y = F.conv3d(skip, skip1, padding=1)  # (B,C,D,H,W)
        # Composed weights have no use in training, and cost more than they save on small maps.
        if torch.is_grad_enabled() or x[0, 0].numel() < 8 * C:
            x = upsampled(x, up)  # (B,C,D,H,W)
            y += F.conv3d(x, up1, padding=1)
            around = pointwise(x, up3)  # (B,C,D,H,W)
        else:
            add_upsampled_conv(y, x, up, up1)
            around = upsampled(x, torch.einsum("ic...,oc->io...", up, up3.flatten(1)))
        around += pointwise(skip, skip3)
        return block.rest(y, around)


def check_size(volume: Tensor, channels: int) -> None:
    """ValueError of one line if a volume (B,C,D,H,W) is none that the model takes."""
    if volume.ndim != 5 or volume.shape[1] != channels:
        expected = f"(B,{channels},D,H,W)"
        raise ValueError(f"volume is {tuple(volume.shape)}, the model takes {expected}")
    sides = tuple(volume.shape[2:])
    if any(side % 32 for side in sides) or max(sides) < 64:  # one voxel in the end has no variance
        why = "must be multiples of 32, one of them 64 or more"
        raise ValueError(f"volume's sides are {sides}, {why}; pad or cut it")


class Backbone(nn.Module):
    """`checkpointing = True` saves memory in training for time: blocks run again for gradients."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, c, f = config, config, config.feature_size
        if f % 12 or c.merging not in OCTANTS:
            told = f"feature_size {f} and merging {c.merging!r}"
            raise ValueError(f"{told}: must be a multiple of 12 and one of {', '.join(OCTANTS)}")
        self.preprocess = partial(preprocess, config=config)  # volume -> the same shape
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (K,D,H,W)
        self.checkpointing = False
        self.swinViT = SwinTransformer(c)
        self.encoder1 = ResBlock(c.in_channels, f)
        self.encoder2, self.encoder3 = ResBlock(f, f), ResBlock(2 * f, 2 * f)
        self.encoder4, self.encoder10 = ResBlock(4 * f, 4 * f), ResBlock(16 * f, 16 * f)
        self.decoder5, self.decoder4 = UpBlock(16 * f, 8 * f), UpBlock(8 * f, 4 * f)
        self.decoder3, self.decoder2 = UpBlock(4 * f, 2 * f), UpBlock(2 * f, f)
        self.decoder1 = UpBlock(f, f)

    def features(self, volume: Tensor, fuse: Callable = lambda x: x) -> tuple[Tensor, Tensor]:
        """volume (B,C,D,H,W) as `preprocess` makes it -> (B,16f,D/32,H/32,W/32), of which the
        decoder takes what `fuse` makes of it, and (B,f,D,H,W)."""
        check_size(volume, self.config.in_channels)
        keep = not (self.checkpointing and torch.is_grad_enabled())
        run = nn.Module.__call__ if keep else partial(checkpoint, use_reentrant=False)
        x0, x1, x2, x3, x4 = self.swinViT(volume, run)
        bottom = run(self.encoder10, x4)  # (B,16f,D/32,H/32,W/32)
        x = run(self.decoder5, fuse(bottom), x3)
        x = run(self.decoder4, x, run(self.encoder4, x2))
        x = run(self.decoder3, x, run(self.encoder3, x1))
        x = run(self.decoder2, x, run(self.encoder2, x0))
        return bottom, run(self.decoder1, x, run(self.encoder1, volume))


class SwinUNETR(Backbone):
    def __init__(self, config: Config):
        super().__init__(config)
        self.out = nn.Conv3d(config.feature_size, config.num_classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """volume (B,C,D,H,W) as `preprocess` makes it -> logits (B,K,D,H,W)."""
        _, x = self.features(volume)
        return pointwise(x, self.out.weight, self.out.bias).contiguous()

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "SwinUNETR":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        num_classes: None for as many as the file has; another number makes a new `out`. A file of
        the encoder alone needs it, the rest is new. What is new is printed. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = convert(weights)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "SwinUNETR", source, Config))
        else:
            told = told_by_name(source, settings, "merging" in overrides)
            config = Config(**sizes(weights) | told)
        weights, config, fresh = new_classes(weights, num_classes, config, source)
        return load(cls(replace(config, **overrides)), weights, fresh, source)


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model.
# --------------------------------------------------------------------------------------------------


FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")

FILES += ("model.pt", "models/model.pt", "model_swinvit.pt")

RELEASED = {  # fields of Config; merging is legacy in all
    "MONAI/swin_unetr_btcv_segmentation": BTCV, "model_swinvit.pt": {},
    "CLIP-Driven-Universal-Model": {}, "clip_driven_universal_swin_unetr.pth": {},
    "self_supervised_nv_swin_unetr_5050.pt": {}, "ssl_pretrained_weights.pth": {},
    "darragh/swinunetr-btcv-tiny": BTCV, "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt": BTCV,
    "darragh/swinunetr-btcv-small": BTCV, "swin_unetr.small_5000ep_f24_lr2e-4_pretrained.pt": BTCV,
    "darragh/swinunetr-btcv-base": BTCV, "swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt": BTCV,
} | {
    f"fold{k}_f48_ep300_4gpu_dice0_{dice}": BRATS21
    for k, dice in enumerate((8854, 9059, 8981, 8924, 9035))
}  # fmt: skip

IGNORED = {
    r".*\.relative_position_index": "`position_index`",
    r"(swinViT\.)?norm\.(weight|bias)": "of the encoder alone, which nothing uses",
    r"(rotation_head|contrastive_head|convTrans3d|conv)\..*": "heads of the self-supervised task",
}

# Other names of the encoder -> MONAI's, then MONAI's -> ours.
RENAMES = (
    (r"^backbone\.", ""), (r"^swin_vit\.", "swinViT."),
    (r"^(encoder\.)?(patch_embed\.|layers\d)", r"swinViT.\2"),
    (r"(layers\d\.0)\.0\.", r"\1."), (r"\.fc([12])\.", r".linear\1."),
    (r"\.layers(\d)\.0\.", lambda match: f".layers.{int(match[1]) - 1}."),
    (r"\.layers(\d)c\.0\.layer\.", lambda match: f".layers.{int(match[1]) - 1}.conv."),
    (r"^(encoder\d+)\.layer\.", r"\1."), (r"^out\.conv\.conv\.", "out."),
    (r"(conv\d?)\.conv\.weight$", r"\1.weight"),
)  # fmt: skip

OFFICIAL = (  # ours -> MONAI's
    (r"\.layers\.(\d)\.conv\.", lambda match: f".layers{int(match[1]) + 1}c.0.layer."),
    (r"\.layers\.(\d)\.", lambda match: f".layers{int(match[1]) + 1}.0."),
    (r"^(encoder\d+)\.", r"\1.layer."), (r"(conv\d?)\.weight$", r"\1.conv.weight"),
    (r"^out\.", "out.conv.conv."),
)  # fmt: skip

FRESH = {"classes": r"out\..*", "encoder alone": r"(encoder|decoder|out).*"}  # what may be new


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> ours."""
    weights = {}
    if "encoder.patch_embed.proj.weight" in state_dict:
        # Of the Disruptive Autoencoders, whose decoder is another: MONAI takes the encoder too.
        names = (n for n in state_dict if re.match(r"encoder\.(patch_embed|layers)", n))
        state_dict = {n: state_dict[n] for n in names}
    for name, t in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if name in weights:
            raise ValueError(f"{name} is there twice, under two names")
        weights[name] = t
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> MONAI's or the Universal Model's, for `load_state_dict` of its class."""
    weights, universal = {}, any(n.startswith(("controller", "GAP")) for n in state_dict)
    for name, t in state_dict.items():
        for pattern, new in OFFICIAL:
            name = re.sub(pattern, new, name)
        if universal:  # of its class, not of its files
            name = re.sub(r"^(?=swinViT|encoder|decoder)", "backbone.", name)
        weights[name] = t
        if name.endswith("relative_position_bias_table"):  # MONAI keeps an index with each
            weights[name.replace("bias_table", "index")] = position_index().to(t.device)
    return weights


def load(model: Backbone, weights: dict[str, Tensor], fresh: str, source) -> Backbone:
    """Fills the model; tensors whose names match `fresh` may be missing, and are then printed."""
    expected = model.state_dict()
    new = {n: t for n, t in expected.items() if n not in weights and re.fullmatch(fresh, n)}
    check_complete(to_official(weights | new), to_official(expected), source)
    model.load_state_dict(weights | new)
    if new:
        parts = dict.fromkeys(name.split(".")[0] for name in new)
        print(f"{source}: new and untrained: {', '.join(parts)}")
    return model.eval()


def sizes(weights: dict[str, Tensor]) -> dict:
    """What the shapes tell, fields of Config."""
    told = {"v2": any(".layers.0.conv." in name for name in weights)}
    if (patches := weights.get("swinViT.patch_embed.proj.weight")) is not None:
        told |= {"feature_size": len(patches), "in_channels": patches.shape[1]}
    return told


def told_by_name(source, settings: dict, overridden: bool) -> dict:
    """What no tensor tells, by config.json or the name of file, folder or repository."""
    parts = Path(str(source).split("@")[0]).parts
    known = next((c for name, c in RELEASED.items() if Path(name).name in parts), None)
    told = dict(known or {}, merging=settings.get("merging", "legacy"))
    if not overridden:
        why = "as no name tells; MONAI has merging since 1.5.0" if known is None else "by its name"
        why = "as config.json says" if "merging" in settings else why
        print(f"{source}: merging {told['merging']}, {why}")
    return told


def new_classes(weights: dict[str, Tensor], num_classes: int | None, config: Config, source):
    """What of a file is kept where `num_classes` are asked for, None: as many as it has.

    -> its tensors, without an `out` of another number of classes; the config, with names only if as
    many; which tensors may be new, a pattern. ValueError: an encoder alone, and no number given.
    """
    out, fresh = weights.get("out.weight"), ""
    if not any(re.fullmatch(FRESH["encoder alone"], name) for name in weights):
        if num_classes is None:
            raise ValueError(f"{source}: the encoder alone, without a decoder; give num_classes")
        fresh = FRESH["encoder alone"]
    elif out is not None and num_classes in (None, len(out)):
        num_classes = len(out)
    elif out is not None:
        fresh = FRESH["classes"]
        weights = {n: t for n, t in weights.items() if not re.fullmatch(fresh, n)}
    num_classes = num_classes or config.num_classes
    classes = config.classes if len(config.classes) == num_classes + config.overlapping else ()
    return weights, replace(config, num_classes=num_classes, classes=classes), fresh


def preprocess(volume: Tensor, config: Config) -> Tensor:
    """volume (C,D,H,W) at the config's spacing, axes to right, front, top -> (C,D,H,W) float32.

    HU of a range become 0..1; or in each channel what is not 0 gets mean 0 and deviation 1.
    Voxels that are NaN or infinite count for neither and become 0.
    Raise TypeError for an array or a path, ValueError for another number of axes.
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
        return torch.where(finite, ((x - low) / (high - low)).clamp(0, 1), 0)
    inside = finite & (x != 0)
    n = inside.sum((1, 2, 3), keepdim=True).clamp(min=1)  # (C,1,1,1)
    x = torch.where(inside, x, 0)
    x = x - x.sum((1, 2, 3), keepdim=True) / n
    deviation = ((x * inside).square().sum((1, 2, 3), keepdim=True) / n).sqrt()
    return torch.where(inside, x / torch.where(deviation > 0, deviation, 1), 0)


def postprocess(logits: Tensor, size: tuple[int, int, int], config: Config) -> Tensor:
    """logits (K,d,h,w) -> probabilities (K,D,H,W) float32, 0..1, at the given size.

    They are a softmax over the classes; of one class, or of overlapping ones, a sigmoid each.
    """
    x, same = logits.float(), logits.shape[1:] == tuple(size)
    x = x if same else F.interpolate(x[None], size, mode="trilinear", align_corners=False)[0]
    return x.sigmoid() if config.overlapping or len(x) == 1 else x.softmax(0)


# shared: run_folder
def run_config(settings: dict, kind: str, source, config: type) -> dict:
    """Return the fields of `config`, a dataclass, from the config.json of a run folder of ours.

    Raise ValueError, one line, if it is another model's, of a newer version or was damaged.
    """
    model = settings.get("class"), settings["format"]
    if model != (kind, 1):
        raise ValueError(f"{source}: holds {model[0]} in format {model[1]}, not {kind} in 1")
    values = settings.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{source}: config.json has no `config` of the model; restore the file")

    known = config.__dataclass_fields__
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: config.json is of a newer version (it has {name:.50})")
        may_be_none = value is None and "None" in str(known[name].type)
        if not may_be_none and not is_like(value, known[name].default):
            example = f"a value such as {known[name].default!r:.50}"
            raise ValueError(f"{source}: config.json: {name} is {value!r:.50}, expected {example}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def is_like(value, default) -> bool:
    """Return True if a value of a JSON file can stand for a default of its kind."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list | tuple) else [None]
        first = default[0] if default else ""
        fixed = isinstance(first, float) and len(items) != len(default)  # colours, axes
        return not fixed and all(is_like(item, first) for item in items)
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e9  # not NaN either
    if isinstance(default, int) and not isinstance(default, bool):
        return type(value) is int and 0 <= value < 1e9
    return type(value) is type(default)


# end shared


# shared: read_checkpoint
def read_checkpoint(source: str | Path, files: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Load weights and settings from a file, a folder or the hub (`owner/name`, or `…@revision`).

    A folder or repository gives the first of `files` that it has. Return the state dict without the
    wrappers and prefixes of training programs, and the config.json beside it ({} if there is none).
    Raise FileNotFoundError or ValueError, one line, for a file that is missing or holds no weights.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in files if (path / name).exists()), None)
        if path is None:
            raise FileNotFoundError(f"{source}: has none of {', '.join(files)}; name the file")
    elif not path.exists():
        path = download(str(source), files)

    weights = unwrap(read_file(path), path)
    config = path.parent / "config.json"
    settings = read_file(config) if config.exists() else {}
    return weights, settings


def read_file(path: Path) -> dict:
    """Return the content of a .json or .safetensors file, a TorchScript archive or a pickle.

    No code in a file is run. Raise ValueError, one line, if it is damaged or holds something else.
    """
    try:
        content = parse_file(path)
    except Exception as error:
        said = str(error)
        reason = f"{error!r:.150}"
        hint = "get the whole file"
        if "unsupported global" in said.lower() or "is not run" in said:
            reason = f"{said:.150}" if "is not run" in said else "it has code in it"
            hint = "where it was made, torch.save(model.state_dict(), path)"
        reason = " ".join(reason.split())
        raise ValueError(f"{path}: cannot be read ({reason}); {hint}") from None
    if isinstance(content, dict):
        return content

    kind = f"a {type(content).__name__}"
    if isinstance(content, Tensor):
        dtype = str(content.dtype).removeprefix("torch.")
        kind = f"a single tensor, {dtype} of shape {tuple(content.shape)}"
    raise ValueError(f"{path}: holds {kind}, not named tensors (a state dict)")


def parse_file(path: Path):
    """Return whatever a file holds; its first bytes, suffix and records say how it is read."""
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
    """Return the state dict in what a training program saved. Raise ValueError if there is none."""
    weights = content
    for key in ("state_dict", "model", "net"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]

    for name, value in weights.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise ValueError(f"{path}: no state dict, its key {name!r:.80} is of type {kind}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: no state dict, its {name!r} is not a tensor")

    for prefix in ("module.", "net."):  # a name that would then be there twice keeps its prefix
        bare = {name: name.removeprefix(prefix) for name in weights}
        weights = {n if bare[n] in weights else bare[n]: t for n, t in weights.items()}
    return weights


# end shared


# shared: script_unpickler
class ScriptObject:
    """An inert stand-in for an object of the archive: `state` is what was saved of it."""

    def __init__(self, *arguments):
        self.state = arguments

    def __setstate__(self, state):
        self.state = state


class ScriptUnpickler(pickle.Unpickler):
    """Reads data.pkl, in which classes of the archive become inert and foreign ones an error."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive = archive
        self.root = root
        self.storages = {}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return type(name, (ScriptObject,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # Bound methods and built-in types: a pickle cannot change them.
        known = {"torch._utils._rebuild_tensor_v2": self.tensor, "torch.device": str}
        known |= {"collections.OrderedDict": dict, "builtins.complex": complex}
        known["torch._utils._rebuild_parameter"] = self.first
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of their items
            for kind in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
                known[f"{module}.{kind}"] = self.first
            known[f"{module}.restore_type_tag"] = self.first
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is not run")
        return known[f"{module}.{name}"]

    def persistent_load(self, place: tuple) -> Tensor:
        """Return a storage as a tensor of one axis; tensors that share it then share memory."""
        _, dtype, key, _, _ = place
        if key not in self.storages:
            numbers = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            flat = torch.empty(0, dtype=dtype)
            if numbers:  # frombuffer takes no empty ones
                flat = torch.frombuffer(numbers, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]

    def tensor(self, storage: Tensor, offset, size, stride, requires_grad, hooks, *more) -> Tensor:
        if any(more):
            raise pickle.UnpicklingError(f"a tensor has {more}, which is not read")
        return storage.as_strided(size, stride, offset)

    def first(self, value, *_):
        return value


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
# end shared


# shared: torchscript
def is_torchscript(path: Path) -> bool:
    """Return True for an archive of torch.jit.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return `torch.jit.load(path).state_dict()`, but without running any code of the archive."""
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
    """Return the parameters and buffers of a module and of those in it, by their dotted names."""
    tensors = {}
    names_of = {}  # class -> what `tensor_names` returns
    pending = [("", module)]
    for _ in range(MOST_MODULES):
        if not pending:
            return tensors
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
    raise ValueError(f"it holds more than {MOST_MODULES:,} modules")


def tensor_names(module: ScriptObject, archive: zipfile.ZipFile, root: str) -> set[str] | None:
    """Return which attributes of a module are parameters or buffers; None if it is no module.

    The archive's code, read as text, says so. Raise ValueError if a module makes its tensors by
    `__setstate__`, since that would have to be run.
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
            raise ValueError(f"{kind} makes its tensors by code (__setstate__), which is not run")
        return None

    # Like torch.jit: a buffer is declared as Tensor, not as Optional[Tensor].
    declared = re.findall(r'^  (?:__annotations__\["(.*?)"\] =|(\w+) :) Tensor$', fields, re.M)
    declared = {quoted or plain for quoted, plain in declared}
    return {*names["parameters"]} | declared.intersection(names["buffers"])


MOST_MODULES = 100_000  # a small file can nest modules in each other so that they never end
# end shared


# shared: download
def download(source: str, files: tuple[str, ...]) -> Path:
    """The first of `files` in a repository of the hub, config.json beside it; cached or fetched."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = dict(zip(("repo_id", "revision"), source.split("@"), strict=False))
    is_file = Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_file or where["repo_id"].count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder; a hub id is owner/name")
    for name in files:
        if isinstance(path := hub.try_to_load_from_cache(filename=name, **where), str):
            return Path(path)
    try:
        there = hub.HfApi().model_info(**where, files_metadata=True).siblings
        sizes = {file.rfilename: file.size or 0 for file in there}
        if name := next((name for name in files if name in sizes), None):
            size = f"{sizes[name] / 1e6:,.1f} MB"
            print(f"downloading {name}, {size}, of {source} from {hub.constants.ENDPOINT}")
            if "config.json" in sizes:
                hub.hf_hub_download(filename="config.json", **where)
            return Path(hub.hf_hub_download(filename=name, **where))
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{source}: the repository has no such revision") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{source}: neither file nor repository on the hub") from None
    except Exception as error:  # whose class depends on the version of the client
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        hint = "check the connection, or fetch the file elsewhere and name it"
        raise OSError(f"{source}: not to be had from the hub ({reason}); {hint}") from None
    raise FileNotFoundError(f"{source}: the repository has none of {', '.join(files)}")


# end shared


# shared: tensor_fault
def tensor_fault(found: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor of a file, "" if nothing is."""
    if found is not None and found.is_nested:
        return "is a nested tensor, expected a dense one"
    shape = "missing" if found is None else tuple(found.shape)
    expected_shape = "no such tensor" if expected is None else tuple(expected.shape)
    if shape != expected_shape:
        return f"is {shape}, expected {expected_shape}"
    if not expected.is_floating_point():
        return ""

    if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(found.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, expected float16, bfloat16, float32 or float64"
    if found.layout != torch.strided or found.is_meta:
        return "is sparse or has no values, expected a dense tensor"
    if found.numel():
        low, high = torch.aminmax(found.detach())  # NaN if any value is; ten times isfinite's speed
        largest = torch.finfo(expected.dtype).max
        if not -largest <= low.item() <= high.item() <= largest:
            return f"holds NaN, infinity or values beyond {str(expected.dtype)[6:]}"
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
