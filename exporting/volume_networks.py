"""The networks of Swin UNETR and the models on its backbone, for one window of a volume."""

import math
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from exporting.parts import Part
from fewshot3d import TextSwinUNETR, WithText
from prediction.models import LoadedModel
from swin_unetr3d import EPS, SHIFT, SLOPE, WINDOW, ResBlock, UpBlock, WindowAttention


def parts(loaded: LoadedModel) -> list[Part]:
    """Return the network of a model of volumes: a window (B,C,D,H,W) -> logits (B,K,D,H,W).

    The sides of the window are those of the config, and a Universal Model computes all classes.
    Afterwards, tracing the model uses the plain code below. Raises ValueError, one line, for a
    model whose results depend on the other windows of a batch.
    """
    config = loaded.config
    if getattr(config, "attend", "") == "chain":
        raise ValueError(
            f"{loaded.weights.source}: attend is 'chain', where each window of a batch depends on "
            "the one before, so it cannot be exported"
        )

    model = loaded.model
    for module in model.modules():
        plain = PLAIN_LINES.get(type(module))
        if plain is not None:
            module.forward = partial(forward_of, module.forward, MethodType(plain, module))

    network = WithText(model).eval() if isinstance(model, TextSwinUNETR) else model
    image = torch.randn(2, config.in_channels, *config.image_size, device=loaded.device)
    dynamic = {"image": {0: "batch"}}
    return [Part("network", network, {"image": image}, ("logits",), dynamic)]


# --- plain lines in place of fast paths -----------------------------------------------------------

# The model's fast paths loop over the batch and use operations that ONNX lacks. The functions below
# compute the same in plain PyTorch; they become methods of the same modules.


def forward_of(fast: Callable, plain: Callable, *inputs) -> Tensor:
    """Return plain(*inputs) while a model is traced for an export, else fast(*inputs)."""
    if torch.compiler.is_compiling():
        return plain(*inputs)
    return fast(*inputs)


def window_attention(
    self: WindowAttention, x: Tensor, is_shifted: bool, index: Tensor, masks: Tensor
) -> Tensor:
    """Equal `WindowAttention.forward`: x (B,D,H,W,C) -> (B,D,H,W,C)."""
    D, H, W, C = x.shape[1:]
    window = [min(side, WINDOW) for side in (D, H, W)]
    shifts = [SHIFT if is_shifted and side > WINDOW else 0 for side in (D, H, W)]
    N = math.prod(window)
    heads = self.relative_position_bias_table.shape[1]

    # Pad to whole windows: their number along each axis.
    counts = [-(-side // n) for side, n in zip((D, H, W), window, strict=True)]
    padded = [n * side for n, side in zip(counts, window, strict=True)]
    x = F.pad(x, (0, 0, 0, padded[2] - W, 0, padded[1] - H, 0, padded[0] - D))
    x = x.roll([-shift for shift in shifts], (1, 2, 3))

    sides = (counts[0], window[0], counts[1], window[1], counts[2], window[2])
    qkv = self.qkv(x).view(-1, *sides, 3, heads, C // heads)  # (B,D/7,7,H/7,7,W/7,7,3,h,d)
    qkv = qkv.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)  # (3,B,D/7,H/7,W/7,h,7,7,7,d)
    q, k, v = qkv.reshape(3, -1, math.prod(counts), heads, N, C // heads)  # (B,n,h,N,d) each

    bias = F.embedding(index[:N, :N], self.relative_position_bias_table)  # (N,N,h)
    scores = q @ k.mT * (C // heads) ** -0.5 + bias.permute(2, 0, 1)  # (B,n,h,N,N)
    if any(shifts):
        scores = scores + masks_of_windows(masks, window, counts, shifts)[:, None]
    y = scores.softmax(4) @ v  # (B,n,h,N,d)

    y = y.view(-1, *counts, heads, *window, C // heads)  # (B,D/7,H/7,W/7,h,7,7,7,d)
    y = y.permute(0, 1, 5, 2, 6, 3, 7, 4, 8)  # (B,D/7,7,H/7,7,W/7,7,h,d)
    y = y.reshape(-1, *padded, C)  # (B,D,H,W,C), padded
    y = y.roll(shifts, (1, 2, 3))[:, :D, :H, :W]
    return self.proj(y)


def masks_of_windows(
    masks: Tensor, window: list[int], counts: list[int], shifts: list[int]
) -> Tensor:
    """Return the additive mask of each of n shifted windows: (n,N,N).

    masks: result of `swin_unetr3d.shift_masks`. window: sides of a window with N tokens. counts:
    number of windows along each axis.
    """
    for axis, (count, shift) in enumerate(zip(counts, shifts, strict=True)):
        is_last = torch.zeros(count, dtype=torch.int64, device=masks.device)
        if shift:
            is_last[-1] = 1
        masks = masks.index_select(axis, is_last)
        masks = masks.narrow(axis + 3, 0, window[axis])  # queries
        masks = masks.narrow(axis + 6, 0, window[axis])  # keys
    N = math.prod(window)
    return masks.reshape(-1, N, N)


def instance_norm(x: Tensor) -> Tensor:
    """Equal F.instance_norm(x, eps=EPS): x (B,C,D,H,W) -> the same shape.

    The means are taken over one axis after another. ONNX Runtime's own instance norm adds up all
    voxels of a channel in float32, which loses two digits in a window of 96^3 voxels.
    """
    mean = mean_of_voxels(x)
    centred = x - mean
    variance = mean_of_voxels(centred.square())
    return centred * (variance + EPS).rsqrt()


def mean_of_voxels(x: Tensor) -> Tensor:
    """Return the mean of each channel: x (B,C,D,H,W) -> (B,C,1,1,1)."""
    return x.mean(4, True).mean(3, True).mean(2, True)


def residual_block(self: ResBlock, x: Tensor) -> Tensor:
    """Equal `ResBlock.forward`: x (B,in_channels,D,H,W) -> (B,out_channels,D,H,W)."""
    shortcut = x
    if self.conv3 is not None:
        shortcut = instance_norm(self.conv3(x))
    y = instance_norm(self.conv1(x))
    y = self.conv2(F.leaky_relu(y, SLOPE))
    y = instance_norm(y)
    return F.leaky_relu(y + shortcut, SLOPE)


def up_block(self: UpBlock, x: Tensor, skip: Tensor) -> Tensor:
    """Equal `UpBlock.forward`: x (B,in_channels,D/2,H/2,W/2), skip (B,C,D,H,W) -> (B,C,D,H,W)."""
    x = self.transp_conv(x)
    return self.conv_block(torch.cat((x, skip), 1))


PLAIN_LINES = {WindowAttention: window_attention, ResBlock: residual_block, UpBlock: up_block}
