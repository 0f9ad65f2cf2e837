"""BEiT for segmentation: an image in, the class of every pixel out.

Paper: Bao, Dong, Piao & Wei, ICLR 2022, arXiv 2106.08254.
Code: github.com/microsoft/unilm at 2312c6f, beit/semantic_segmentation/backbone/beit.py (MIT);
  transformers 5.23 has a port, modeling_beit.py, whose outputs this file reproduces.
Weights on the hub: microsoft/beit-{base,large}-finetuned-ade-640-640 (ADE20K; the cards say Apache
  2.0); the encoder alone, such as microsoft/beit-base-patch16-224-pt22k-ft22k, loads with
  num_classes=. The authors' .pth files load, too.

    image (B,3,640,640), shapes of base
      beit: 16x16 convolution with stride 16, class token; transformer blocks 0 to 9 of 12, each
      with its own relative position bias
    outputs of blocks 1, 3, 5 and 9, without the class token: four times (B,768,40,40)
      fpn1 upsamples the first by 4, fpn2 the second by 2; the fourth is max-pooled by 2
    maps (B,768,160,160), (B,768,80,80), (B,768,40,40), (B,768,20,20)
      decode_head: UPerNet's, pyramid pooling of the last map, then a feature pyramid of all four
    logits (B,150,160,160)

B batch, C channels, H W sides of image or map, Hp = H/16 and Wp = W/16 patches, N = 1 + Hp*Wp
tokens, h heads, K classes. Image sides are multiples of 16, from 32 pixels; position biases are
interpolated. "quirk" marks surprising behaviour that released weights or equal outputs need. Code
between "# shared: NAME" and "# end shared" is identical in other model files. Left out: the
auxiliary head, which serves a training loss; absolute positions and a position bias shared by all
blocks, which the released segmentation files do not have.

    model = BEiT.from_pretrained("microsoft/beit-base-finetuned-ade-640-640")
    probabilities, mask = model.segment("photo.jpg")  # numpy (K,H,W) and (H,W), at its own size
"""

import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    # Taps: the four blocks whose outputs feed the head, counted from 0.
    # quirk: the authors tap blocks 3, 5, 7, 11 of base and 7, 11, 15, 23 of large. transformers has
    # these numbers as `out_indices`, but reads hidden_states[i - 1], and hidden_states[0] is the
    # input of block 0. It thus taps two blocks earlier, and so does the default here, for equal
    # outputs. For fine-tuning, pass the authors' taps: the head was trained with them, and the last
    # two blocks, which do not run otherwise, are trained, too.
    taps: tuple[int, ...] = (1, 3, 5, 9)
    dim: int = 768  # channels of the transformer and the head
    layers: int = 12  # transformer blocks
    window: int = 40  # patches per side of the grid that the position bias tables were trained for
    drop_path: float = 0.1  # stochastic depth rate of the last block; the authors' large has 0.2
    num_classes: int = 150
    image_size: int = 640  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of RGB in 0..1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"  # a filter of PIL.Image.Resampling, or "cv2 nearest" (OpenCV's)
    threshold: float = 0.5  # for a single class: a pixel above this probability is foreground


VARIANTS = {  # right: parameters with 150 classes; those after the last tap, which do not run
    "base": Config(),  # 161,599,446; 14,327,136
    "large": Config(taps=(5, 9, 13, 21), dim=1024, layers=24),  # 438,872,726; 25,394,304
    "mini": Config(  # 3,393,414; 397,008; for tests and demos
        taps=(0, 1, 2, 3), dim=128, layers=6, window=4, image_size=64
    ),
}

# --- vision transformer ---------------------------------------------------------------------------

PATCH = 16  # pixels per side
HEAD_WIDTH = 64  # channels per attention head


# modeling_beit.py, class BeitEmbeddings
class Embeddings(nn.Module):
    """Split an image into patches of 16x16 pixels, embed them and add a class token."""

    def __init__(self, dim: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        projection = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})  # official tensor names

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> tokens (B,N,C), the class token first."""
        x = self.patch_embeddings["projection"](image)  # (B,C,Hp,Wp)
        x = x.flatten(2).transpose(1, 2)  # (B,Hp*Wp,C)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # (B,1,C)
        return torch.cat([cls_token, x], 1)  # (B,N,C)


def relative_position_index(Hp: int, Wp: int, device=None) -> Tensor:
    """Return the table row of the position bias for each pair of tokens: int64 (N,N), query by key.

    Rows of a table: one per offset (dy,dx) between two patches of a Hp x Wp grid, which makes
    (2Hp-1)*(2Wp-1) in row-major order, then one each for class token to patch, patch to class token
    and class token to itself.
    """
    y = torch.arange(Hp, device=device).repeat_interleave(Wp)  # (Hp*Wp,)
    x = torch.arange(Wp, device=device).repeat(Hp)  # (Hp*Wp,)
    dy = y[:, None] - y + Hp - 1  # (Hp*Wp,Hp*Wp), query - key, shifted to 0..2Hp-2
    dx = x[:, None] - x + Wp - 1  # (Hp*Wp,Hp*Wp), query - key, shifted to 0..2Wp-2

    offsets = (2 * Hp - 1) * (2 * Wp - 1)
    index = torch.empty(1 + Hp * Wp, 1 + Hp * Wp, dtype=torch.long, device=device)  # (N,N)
    index[1:, 1:] = dy * (2 * Wp - 1) + dx
    index[0] = offsets
    index[1:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


# modeling_beit.py, class BeitRelativePositionBias
class RelativePositionBias(nn.Module):
    """A learned bias of the attention scores, per head and offset of query and key."""

    def __init__(self, window: int, heads: int):
        super().__init__()
        self.side = 2 * window - 1  # number of offsets along an axis of the trained grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self.side**2 + 3, heads))

    def forward(self, Hp: int, Wp: int, index: Tensor) -> Tensor:
        """Return the bias for a grid of Hp x Wp patches: (1,h,N,N), to be added to the scores.

        index (N,N): the result of `relative_position_index(Hp, Wp)`. In the grid that the table was
        trained for, this method equals

            bias = self.relative_position_bias_table[index]  # (N,N,h)
            return bias.permute(2, 0, 1)[None]

        For another grid, the rows for offsets between patches, which form a (side,side) map per
        head, are resized first, as in MiDaS 3.1 and transformers. (The authors resize them once,
        when loading a checkpoint of another size, and interpolate geometrically.)
        """
        table = self.relative_position_bias_table.T  # (h,side*side+3)
        patches, cls_token = table.split((self.side**2, 3), 1)  # (h,side*side), (h,3)
        patches = patches.unflatten(1, (self.side, self.side))  # (h,side,side)
        size = (2 * Hp - 1, 2 * Wp - 1)
        patches = F.interpolate(patches[None], size, mode="bilinear", align_corners=False)[0]
        table = torch.cat([patches.flatten(1), cls_token], 1)  # (h,(2Hp-1)*(2Wp-1)+3)

        # Several times faster than `table[index]`, since each head's values are contiguous.
        bias = table.index_select(1, index.flatten())  # (h,N*N)
        return bias.unflatten(1, index.shape)[None]  # (1,h,N,N)


def split_heads(x: Tensor) -> Tensor:
    """Split the channels into heads: (B,N,C) -> (B,h,N,64)."""
    return x.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)


# modeling_beit.py, class BeitAttention
class Attention(nn.Module):
    """Multi-head self-attention with a position bias on the scores."""

    def __init__(self, dim: int):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        # No bias: it would add the same number to all scores of a query, which softmax cancels.
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B,N,C), bias (1,h,N,N) -> (B,N,C)."""
        q = split_heads(self.q_proj(x))  # (B,h,N,64)
        k = split_heads(self.k_proj(x))  # (B,h,N,64)
        v = split_heads(self.v_proj(x))  # (B,h,N,64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B,h,N,64)
        y = y.transpose(1, 2).flatten(2)  # (B,N,C)
        return self.o_proj(y)


# modeling_beit.py, class BeitMLP
class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,C) -> (B,N,C)."""
        return self.fc2(F.gelu(self.fc1(x)))


# modeling_beit.py, class BeitLayer
class Layer(nn.Module):
    """Pre-norm transformer block with a learned scale per residual channel and stochastic depth."""

    def __init__(self, dim: int, window: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        # quirk: eps is 1e-12, transformers' default (configuration_beit.py); the authors had 1e-6
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.relative_position_bias = RelativePositionBias(window, dim // HEAD_WIDTH)
        self.attention = Attention(dim)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = MLP(dim)
        self.lambda_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.lambda_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor, Hp: int, Wp: int, index: Tensor) -> Tensor:
        """x (B,N,C), grid of Hp x Wp patches, index (N,N) as in RelativePositionBias -> (B,N,C)."""
        # Recomputed in each call, which takes little time: a cache would take 123 MB per block in
        # base at 640 pixels.
        bias = self.relative_position_bias(Hp, Wp, index)  # (1,h,N,N)
        y = self.attention(self.layernorm_before(x), bias)
        x = x + self.residual_scale(self.lambda_1, x.shape[0]) * y

        y = self.mlp(self.layernorm_after(x))
        return x + self.residual_scale(self.lambda_2, x.shape[0]) * y

    def residual_scale(self, lambda_: Tensor, B: int) -> Tensor:
        """Return the scale of a residual for each image and channel: lambda_ (C,) -> (B,1,C).

        In training, it includes stochastic depth (arXiv 1603.09382): the scale of random images is
        0, which drops their residual, and that of the others is divided by 1 - drop_path.
        """
        keep = F.dropout(lambda_.new_ones(B, 1, 1), self.drop_path, self.training)  # (B,1,1)
        return lambda_ * keep


# modeling_beit.py, class BeitModel
class ViT(nn.Module):
    """The encoder: embeddings and transformer blocks, without a final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.taps = config.taps
        self.embeddings = Embeddings(config.dim)
        self.layers = nn.ModuleList()
        last = max(config.layers - 1, 1)
        for i in range(config.layers):
            drop_path = config.drop_path * i / last  # rises linearly from 0 in the first block
            self.layers.append(Layer(config.dim, config.window, drop_path))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B,3,H,W) -> outputs of the blocks in `taps`, (B,C,Hp,Wp) each.

        Raise ValueError if a side is not a multiple of 16 or is shorter than 32 pixels.
        """
        if any(side % PATCH or side < 2 * PATCH for side in image.shape[2:]):
            size = tuple(image.shape[2:])
            raise ValueError(f"image sides must be multiples of 16, at least 32, not {size}")
        Hp = image.shape[2] // PATCH
        Wp = image.shape[3] // PATCH

        # Recomputed in each call, at most a hundredth of the work. A cache would hold memory on
        # each device, and a tensor cached in inference mode could not be used in training.
        index = relative_position_index(Hp, Wp, image.device)  # (N,N)
        x = self.embeddings(image)  # (B,N,C)
        outputs = []
        for layer in self.layers[: max(self.taps) + 1]:
            x = layer(x, Hp, Wp, index)  # (B,N,C)
            outputs.append(x)

        maps = []
        for tap in self.taps:
            patches = outputs[tap][:, 1:]  # (B,Hp*Wp,C), without the class token
            maps.append(patches.transpose(1, 2).unflatten(2, (Hp, Wp)))  # (B,C,Hp,Wp)
        return maps


# --- head: modeling_beit.py, class BeitUperHead ---------------------------------------------------


# shared: upsampled_conv3x3
def upsample_matrix(length: int, size: int, like: Tensor) -> Tensor:
    """Return the weights of linear upsampling from `length` to `size` at three shifts.

    In 1-D, tap t (0, 1, 2) of a convolution with padding 1 reads position o + t - 1 of its input
    for output o. Entry (o,t,i) of the result (size,3,length) is the weight of x[i] in that position
    of the upsampled x; it is 0 if the position lies outside.
    """
    identity = torch.eye(length, device=like.device, dtype=like.dtype)[None]  # one-hot inputs
    upsampled = F.interpolate(identity, size, mode="linear", align_corners=False)[0]
    padded = F.pad(upsampled, (1, 1))  # (length,size+2)
    shifted = padded.unfold(1, size, 1)  # (length,3,size)
    return shifted.permute(2, 1, 0)  # (size,3,length)


def upsampled_conv3x3(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Convolve x, bilinearly upsampled to `size`, with a 3x3 kernel, without upsampling x first.

    This function equals

        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return F.conv2d(x, weight, padding=1)

    A 3x3 convolution is a sum over its nine taps: each mixes the channels, then shifts the map.
    Upsampling does not mix channels, so it may come after the mixing, which is then done on the
    small map. What remains is to upsample, shift and sum, with one small matrix per axis
    (`upsample_matrix`).

    x (B,C,h,w), weight (O,C,3,3), size (H,W) -> (B,O,H,W)
    """
    B, C, h, w = x.shape
    H, W = size
    out_channels = len(weight)  # O

    # Mix the channels, once for each of the nine taps.
    taps = weight.permute(2, 1, 3, 0).flatten(2)  # (3,C,3*O): row tap; column tap and output
    pixels = x.flatten(2).transpose(1, 2)  # (B,h*w,C)
    y = pixels[:, None] @ taps  # (B,3,h*w,3*O): row tap; row, column; column tap, output

    # Upsample, shift and sum along H.
    rows = upsample_matrix(h, H, x).flatten(1)  # (H,3*h)
    y = rows @ y.view(B, 3 * h, w * 3 * out_channels)  # (B,H,w*3*O)

    # Upsample, shift and sum along W.
    columns = upsample_matrix(w, W, x).transpose(1, 2).flatten(1)  # (W,w*3)
    y = columns @ y.view(B, H, w * 3, out_channels)  # (B,H,W,O)
    return y.permute(0, 3, 1, 2)  # (B,O,H,W)


# end shared


# shared: uper_head
class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,O,H,W)."""
        return F.relu(self.batch_norm(self.conv(x)), inplace=True)


class Fusion(ConvModule):
    """A ConvModule with a 3x3 kernel whose input is several maps, upsampled and concatenated.

    `forward` equals these lines, but never stores the upsampled or the concatenated maps:

        size = maps[0].shape[2:]
        maps = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
        return ConvModule.forward(self, torch.cat(maps, 1))

    A convolution of concatenated maps is the sum of one convolution per map, with the kernel's
    weights for the channels of that map.
    """

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps (B,C,h,w), channels and sizes may differ -> (B,O,H,W), the size of the first."""
        widths = [x.shape[1] for x in maps]
        kernels = self.conv.weight.split(widths, 1)  # (O,C,3,3) each
        y = F.conv2d(maps[0], kernels[0], padding=1)  # (B,O,H,W)
        for x, kernel in zip(maps[1:], kernels[1:], strict=True):
            y += upsampled_conv3x3(x, kernel, y.shape[2:])
        return F.relu(self.batch_norm(y), inplace=True)


class UPerHead(nn.Module):
    """Pyramid pooling of the last map, then a feature pyramid of all maps; arXiv 1807.10221.

    widths: channels of the four maps, the finest first. channels: C, those within the head.
    Training needs batches of two images: batch norm after pooling to 1x1 has one value per image.
    """

    def __init__(self, widths: list[int], channels: int, num_classes: int):
        super().__init__()
        *finer, last = widths
        self.psp_modules = nn.ModuleList()
        for cells in (1, 2, 3, 6):
            pool = nn.AdaptiveAvgPool2d(cells)
            self.psp_modules.append(nn.Sequential(pool, ConvModule(last, channels, 1)))
        self.bottleneck = Fusion(last + 4 * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = Fusion(len(widths) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (B,width,h,w), finest first -> logits (B,K,h,w), the size of the first."""
        # Pyramid pooling: averages of the last map in 1x1, 2x2, 3x3 and 6x6 cells.
        last = maps[-1]
        pooled = [psp_module(last) for psp_module in self.psp_modules]  # (B,C,1,1) to (B,C,6,6)
        x = self.bottleneck([last, *pooled])  # (B,C,h,w), the size of the last map

        # Feature pyramid, from coarse to fine: upsample x and add the next finer map to it.
        pyramid = [x]
        for i in (2, 1, 0):
            lateral = self.lateral_convs[i](maps[i])  # (B,C,h,w), the size of map i
            size = lateral.shape[2:]
            x = lateral + F.interpolate(x, size, mode="bilinear", align_corners=False)
            pyramid.insert(0, self.fpn_convs[i](x))  # finest first

        x = self.fpn_bottleneck(pyramid)  # (B,C,h,w), the size of the first map
        return self.classifier(x)  # (B,K,h,w)


# end shared

# --- the model: modeling_beit.py, class BeitForSemanticSegmentation -------------------------------


class BEiT(nn.Module):
    """BEiT's encoder with UPerNet's head; logits have a quarter of the image's sides."""

    def __init__(self, config: Config):
        super().__init__()
        last = config.layers - 1
        if len(config.taps) != 4 or not all(0 <= tap <= last for tap in config.taps):
            raise ValueError(f"taps={config.taps}: must be four block indices from 0 to {last}")

        self.config = config
        self.beit = ViT(config)
        # All taps have a stride of 16 pixels; the head needs maps with strides 4, 8, 16 and 32.
        dim = config.dim
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, stride=2))
        for module in (*self.beit.modules(), *self.fpn1, *self.fpn2):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.decode_head = UPerHead([dim] * 4, dim, config.num_classes)

        # Blocks after the last tap do not run. They are frozen, so that every trainable parameter
        # gets a gradient.
        self.beit.layers[max(config.taps) + 1 :].requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) from `preprocess` -> logits (B,K,H/4,W/4).

        Raise ValueError if a side is not a multiple of 16 or is shorter than 32 pixels.
        """
        x1, x2, x3, x4 = self.beit(image)  # (B,C,H/16,W/16) each, from the earliest block on
        maps = [
            self.fpn1(x1),  # (B,C,H/4,W/4)
            self.fpn2(x2),  # (B,C,H/8,W/8)
            x3,  # (B,C,H/16,W/16)
            F.max_pool2d(x4, 2),  # (B,C,H/32,W/32)
        ]
        return self.decode_head(maps)

    def preprocess(self, image) -> Tensor:
        """Resize and normalise a PIL image: (3,S,S); see the function `preprocess` below."""
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities (K,H,W) at `size` (H,W) from the logits (K,h,w) of one image.

        See the function `postprocess` below.
        """
        return postprocess(logits, size, self.config)

    def segment(self, image) -> tuple:
        """Return probabilities (K,H,W) and mask (H,W) of an image file or PIL image.

        See the function `segment` below.
        """
        return segment(self, image)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "BEiT":
        """Load a model, in evaluation mode.

        source: a file, a folder, the output folder of a training run, or a hub id.
        num_classes: None keeps the file's classes. Another number gives a newly initialised
        classifier. A file of the encoder alone needs num_classes and gets a new head. The names of
        newly initialised modules are printed.
        overrides: fields of Config.
        Raise ValueError, FileNotFoundError or OSError, one line, for a source that is missing or
        does not fit.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = to_official(weights)  # until they are checked, so that errors use the hub's names

        if "format" in settings:  # the output folder of a training run
            config = Config(**run_config(settings, "BEiT", source, Config))
        else:
            config = config_of_file(weights, settings, source)
        num_classes, new_pattern = new_part(weights, num_classes, config, source)
        model = cls(replace(config, num_classes=num_classes, **overrides))

        # New parameters are neither read nor checked: the model's own values stay.
        expected = to_official(model.state_dict())
        new_names = [name for name in expected if re.fullmatch(new_pattern, name)]
        for name in new_names:
            weights.pop(name, None)
            del expected[name]
        check_complete(weights, expected, source)
        model.load_state_dict(model.state_dict() | convert(weights))
        if new_names:
            # The first two parts of each name, such as decode_head.classifier, without repetitions.
            modules = dict.fromkeys(".".join(name.split(".")[:2]) for name in new_names)
            print(f"{source}: new and untrained: {', '.join(modules)}")
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
IGNORED = (  # patterns of tensors that this model does not have
    r".*\.relative_position_index",  # a constant, 20 MB per block in old files; computed here
    r"auxiliary_head\..*",  # serves a second loss in training, adds nothing to the output
    r"(beit\.)?pooler\..*",  # of an image classifier, as the next
    r"(classifier|fc_norm|head)\.(weight|bias)",
)
FRESH = {  # patterns of tensors that may be newly initialised, under the hub's names
    "classifier": r"decode_head\.classifier\..*",  # if the number of classes differs
    "head": r"(fpn1|fpn2|decode_head)\..*",  # if the file holds the encoder alone
}

# Names in other files -> ours. Ours are those of transformers 5 within a block, and mostly those of
# the hub's files elsewhere. All patterns are applied to a name, one after another:
# backbone.blocks.0.attn.proj.weight (authors) -> beit.layers.0.attention.o_proj.weight

ENCODER_ALONE = {r"^(embeddings|encoder|layers)\.": r"beit.\1."}  # transformers' BeitModel
AUTHORS = {  # without the prefix "backbone.", these are timm's names, too
    r"^(?:backbone\.)?cls_token$": "beit.embeddings.cls_token",
    r"^(?:backbone\.)?patch_embed\.proj\.": "beit.embeddings.patch_embeddings.projection.",
    r"^(?:backbone\.)?blocks\.": "beit.layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.([qv])_bias$": r".attention.\1_proj.bias",  # attn.qkv is split by `convert`
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.(relative_position_bias)_table": r".\1.\1_table",
    r"\.gamma_([12])$": r".lambda_\1",
    r"^backbone\.fpn": "fpn",
    r"\.conv_seg\.": ".classifier.",
}
TRANSFORMERS_5 = {  # `state_dict()` of transformers 5; its files have the hub's names
    r"^fpn\.fpn1\.conv_transpose1\.": "fpn1.0.",
    r"^fpn\.fpn1\.normalization\.": "fpn1.1.",
    r"^fpn\.fpn1\.conv_transpose2\.": "fpn1.3.",
    r"^fpn\.fpn2\.": "fpn2.0.",
    r"\.psp_bottleneck\.": ".bottleneck.",
    r"\.psp_modules\.blocks\.(\d+)\.conv\.": r".psp_modules.\1.1.",
    r"\.convolution\.": ".conv.",
    r"\.normalization\.": ".batch_norm.",
}
HUB = {  # plain text, not patterns: `to_official` replaces ours by the hub's
    "beit.encoder.layer.": "beit.layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.attention.relative_position_bias.": "relative_position_bias.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    ".bn.": ".batch_norm.",
}


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of any source under our names, without those of IGNORED.

    Unknown tensors keep their names.
    """
    weights = {}
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, ours in (ENCODER_ALONE | AUTHORS | TRANSFORMERS_5).items():
            name = re.sub(pattern, ours, name)
        for hub, ours in HUB.items():
            name = name.replace(hub, ours)

        if name.endswith(".attn.qkv.weight"):
            # The authors stack q, k and v in one matrix. A malformed tensor may give fewer than
            # three parts; check_complete reports that.
            layer = name.removesuffix(".attn.qkv.weight")
            for letter, third in zip("qkv", tensor.chunk(3), strict=False):
                weights[f"{layer}.attention.{letter}_proj.weight"] = third.clone()
        else:
            weights[name] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of any source under the names of the hub's files.

    transformers loads them with `from_pretrained`, but initialises its auxiliary head.
    """
    weights = {}
    for name, tensor in convert(state_dict).items():
        for hub, ours in HUB.items():
            name = name.replace(ours, hub)
        weights[name] = tensor
    return weights


def config_of_file(weights: dict[str, Tensor], settings: dict, source) -> Config:
    """Return the config of a file, from its tensors' shapes and the taps in its config.json.

    weights: under the hub's names. settings: the config.json, {} if there is none. Print a line if
    it has no taps. Tensors that are missing or do not fit are reported later, by `check_complete`.
    """
    config = closest_variant(weights, BEiT, to_official)
    values = {}
    for name, tensor in weights.items():
        if name.endswith(".relative_position_bias_table"):  # (side*side+3,heads), side 2*window-1
            side = math.isqrt(max(len(tensor) - 3, 1))
            values["window"] = (side + 1) // 2
            values["image_size"] = PATCH * values["window"]
    classifier = weights.get("decode_head.classifier.bias")
    if classifier is not None:
        values["num_classes"] = len(classifier)

    indices = settings.get("out_indices") or ()
    if len(indices) == 4:
        values["taps"] = tuple(i - 2 for i in indices)  # the quirk in Config
    else:
        authors_taps = tuple(tap + 2 for tap in config.taps)
        print(
            f"{source}: no config.json with out_indices, using transformers' taps {config.taps}; "
            f"the authors' taps are {authors_taps}"
        )
    return replace(config, **values)


def new_part(
    weights: dict[str, Tensor], num_classes: int | None, config: Config, source
) -> tuple[int, str]:
    """Return the number of classes, and a pattern of the tensors to initialise newly ("": none).

    weights: under the hub's names. num_classes: None for as many as the file has.
    Raise ValueError, one line, if the file holds the encoder alone and num_classes is None.
    """
    has_head = any(name.startswith("decode_head.") for name in weights)
    if not has_head and num_classes is None:
        raise ValueError(f"{source}: the encoder alone, without a head; give num_classes")
    if not has_head:
        return num_classes, FRESH["head"]
    if num_classes in (None, config.num_classes):
        return config.num_classes, ""
    return num_classes, FRESH["classifier"]


# shared: closest_variant
def closest_variant(weights: dict[str, Tensor], kind: type[nn.Module], naming) -> Config:
    """Return the variant with the most tensors of the same name and shape as `weights`.

    naming: a function that renames the state dict of a `kind` to the names of the file.
    """
    closest = None
    most_equal = -1
    for config in VARIANTS.values():
        with torch.device("meta"):
            state_dict = naming(kind(config).state_dict())

        equal = 0
        for name, tensor in state_dict.items():
            equal += name in weights and weights[name].shape == tensor.shape
        if equal > most_equal:
            closest = config
            most_equal = equal
    return closest


# end shared


# shared: to_rgb
def to_rgb(image):
    """Return a PIL image in RGB; transparency is dropped.

    Raise TypeError for anything else, such as an array or a path, and ValueError for 16-bit and
    float images: Pillow would clip their values at 255.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(
            f"preprocess takes a PIL image, not {type(image).__name__}; use Image.open(path) or "
            "Image.fromarray(array)"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(
            f"an image of mode {image.mode} (16 bits or floats) has no fixed range: scale its "
            "values to 0..255 and pass Image.fromarray(array.astype('uint8'))"
        )
    if image.mode == "P":  # avoids Pillow's warning about palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


# end shared


# shared: classes
def preprocess(image, config: Config) -> Tensor:
    """Resize a PIL image to a square and normalise it: (3,S,S) float32.

    Raise the errors of `to_rgb`.
    """
    import numpy as np
    from PIL import Image

    image = to_rgb(image)
    size = (config.image_size, config.image_size)
    if config.resample != "cv2 nearest":
        image = image.resize(size, Image.Resampling[config.resample.upper()])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3,H,W) uint8
    pixels = F.interpolate(pixels[None], size)[0]  # (3,S,S), nearest neighbour as in OpenCV

    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]
    return (pixels / 255 - mean) / std  # (3,S,S)


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """Resize a mask (H,W) of class indices as `preprocess` resizes images: (1,S,S) float32.

    Nearest neighbour. Where a position falls exactly between two source pixels, the result may
    differ by one source pixel from that of PIL or OpenCV.
    """
    size = (config.image_size, config.image_size)
    mode = "nearest-exact"  # PIL's
    if config.resample == "cv2 nearest":
        mode = "nearest"
    return F.interpolate(mask[None, None].float(), size, mode=mode)[0]


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Return probabilities (K,H,W) float32 at the image's own `size` (H,W) from logits (K,h,w).

    They are a softmax over the classes; with one class, a sigmoid.
    """
    logits = F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0]
    if len(logits) > 1:
        return logits.softmax(0)
    return logits.sigmoid()


# end shared


# shared: open_upright
def open_upright(image):
    """Open an image file (str or Path) as a PIL image and apply its EXIF orientation.

    Anything else is returned unchanged. Raise OSError for a file that Pillow cannot read and
    ValueError for a file with several pages or with 16-bit colours, which Pillow would truncate.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, str | Path):
        return image
    # Pass an open file: from a path, Pillow memory-maps grey TIFFs, and rotating corrupts those.
    with open(image, "rb") as file, Image.open(file) as opened:
        pages = getattr(opened, "n_frames", 1)
        if pages > 1 and opened.format not in ("MPO", "PSD"):  # gain maps, layers
            raise ValueError(f"{image}: holds {pages} pages; open it and pass one as a PIL image")
        if ";16" in str(opened.tile):
            raise ValueError(f"{image}: has 16 bits a channel; scale its values to 8 bits, 0..255")
        return ImageOps.exif_transpose(opened)


# end shared


# shared: evaluating
@contextmanager
def evaluating(model: nn.Module):
    """Run a block in evaluation mode and without gradients, then restore each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


# end shared


# shared: segment_classes
def segment(model: nn.Module, image) -> tuple:
    """Segment one image; return probabilities and class map as numpy arrays of its size.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    Probabilities are float32 (K,H,W). The mask (H,W) holds class indices, uint8 (uint16 with more
    than 256 classes); with one class, 1 where its probability is above `config.threshold`.
    Raise the errors of `open_upright` and `preprocess`.
    """
    image = open_upright(image)
    pixels = model.preprocess(image)[None].to(next(model.parameters()))  # (1,3,S,S)
    size = (image.height, image.width)

    with evaluating(model):
        logits = model(pixels)[0]  # (K,h,w)
        probabilities = model.postprocess(logits, size).cpu().numpy()

    if len(probabilities) == 1:
        mask = probabilities[0] > model.config.threshold
    else:
        mask = probabilities.argmax(0)
    return probabilities, mask.astype("uint8" if len(probabilities) <= 256 else "uint16")


# end shared


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
    """Raise ValueError that names the first tensors with another name or shape than expected.

    Floating-point tensors must hold finite floating-point numbers; index tensors may have any
    dtype.
    """
    faults = []
    for name in expected | found:
        fault = tensor_fault(found.get(name), expected.get(name))
        if fault:
            faults.append(f"{name} {fault}")
    if not faults:
        return

    hint = ""
    kind = recognise(found)
    if kind and len(faults) > len(expected) / 2:
        hint = f"; the file seems to be {kind}"
    raise ValueError(f"{source}: {len(faults)} tensors do not fit: {'; '.join(faults[:5])}{hint}")


# Patterns of tensor names -> the kind of file that has them, most specific first.
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
    """Return the known kind of file that has tensors of these names, "" if there is none."""
    for pattern, kind in KINDS.items():
        if any(re.match(rf"(.*\.)?{pattern}", name) for name in weights):
            return kind
    return ""


# end shared
