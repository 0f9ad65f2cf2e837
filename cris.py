"""CRIS, CLIP-driven referring image segmentation: an image and a phrase in, a mask out.

Paper: Wang et al., CVPR 2022, arXiv 2111.15174. Official code (MIT), whose tensor names are kept:
github.com/DerrickWang005/CRIS.pytorch at e596332; comments such as "# model/clip.py, class CLIP"
name the counterpart. No CRIS weights were released; the checkpoint in common use was trained on
RefCOCO by a user (issue 3, no licence stated). Training starts from OpenAI's CLIP, RN50.pt or
RN101.pt; on the hub timm/resnet50_clip.openai and timm/resnet101_clip.openai (MIT).

    image (B,3,416,416)              tokens (B,T) = 49406 ... 49407 0 0
      ResNet + attention pool          text transformer
    v3 (B,512,52,52)                 words (B,T,512)
    v4 (B,1024,26,26)                state (B,1024): the word at 49407, projected
    v5 (B,1024,13,13)
    x = neck(v3, v4, v5, state)      (B,512,26,26)   v5 * state, then a feature pyramid
    x = decoder(x, words)            (B,512,26,26)   pixels attend to pixels, then to words
    logits = proj(x, state)          (B,1,104,104)   4x upsampling, 3x3 kernel from state

Shapes are those of RN50 at 416 px: B batch, C channels, N pixels of a map, T tokens, h heads.
`state` is the sentence vector (official name). "quirk" marks behaviour kept only for parity with
the official code; code between "# shared: NAME" and "# end shared" is the same in other model
files. To copy: `segment` needs `tokenizer.py`, `clip_merges.txt.xz` and the package `tokenizers`;
`forward` takes the ids of any CLIP tokenizer. Left out: the paper's loss and data set.

    model = CRIS.from_pretrained("cris_best.pth")
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
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
    layers: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks in each of the four ResNet stages
    width: int = 64  # channels after the ResNet stem; the stages have 4, 8, 16 and 32 times as many
    state_dim: int = 1024  # channels of the sentence vector and of v5
    dim: int = 512  # channels of the text transformer, the neck and the decoder
    heads: int = 8  # attention heads of the text transformer and the decoder
    text_layers: int = 12
    decoder_layers: int = 3
    ffn_dim: int = 2048  # hidden channels of the decoder's MLP
    image_size: int = 416  # side of the square that `preprocess` makes, pixels
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0..1, from CLIP
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    # How images become squares: "letterbox" (official), "stretch", or "medvlsm", which stretches
    # too, but resizes the output as the MedVLSM study does (github.com/naamiinepal/medvlsm).
    pixels: str = "letterbox"
    text_length: int = 17  # tokens per phrase, at most 77; 17 is what CRIS uses for RefCOCO
    pad_token: int = 0  # 0 is masked in the decoder; 49407 (medvlsm) is not
    threshold: float = 0.35  # from the official evaluation
    dropout: float = 0.1  # in the decoder, in training mode only
    freeze_text_norm: bool = False  # see CRIS.train


VARIANTS = {
    "rn50": Config(),  # 146,849,122 parameters
    "rn101": Config(layers=(3, 4, 23, 3), state_dim=512),  # 161,251,682
    "mini": Config(  # 4,254,622, most of them token embeddings; for tests and demos
        layers=(1, 1, 1, 1), width=8, state_dim=128, dim=64, heads=4, text_layers=2,
        decoder_layers=2, ffn_dim=128, image_size=128, text_length=77, dropout=0.0,
    ),
}  # fmt: skip


# model/clip.py, class Bottleneck
class Bottleneck(nn.Module):
    """Residual block in which average pooling replaces strided convolutions."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut

        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """x (B,inputs,H,W) -> (B,4*planes,H/stride,W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        y += self.downsample(self.pool(x))
        return F.relu(y, inplace=True)


# model/clip.py, class AttentionPool2d
class AttentionPool(nn.Module):
    """CLIP's attention pool, but all positions are queries and all outputs are kept."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.heads = dim // 64  # CLIP's heads have 64 channels each
        # CLIP was trained at 224 px: one row for the mean token (unused here), then 7x7 positions.
        self.positional_embedding = nn.Parameter(torch.randn(1 + 7 * 7, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, out_dim)
        # Residual branch added by CRIS; absent from CLIP checkpoints.
        self.connect = nn.Sequential(
            nn.Conv2d(dim, out_dim, 1, bias=False),
            nn.BatchNorm2d(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,out_dim,H,W)."""
        H, W = x.shape[2:]
        table = self.positional_embedding[1:].T.unflatten(1, (7, 7))[None]  # (1,C,7,7)
        y = x + F.interpolate(table, (H, W), mode="bicubic", align_corners=False)
        y = y.flatten(2).transpose(1, 2)  # (B,N,C)

        q = self.q_proj(y).unflatten(2, (self.heads, 64)).transpose(1, 2)  # (B,h,N,64)
        k = self.k_proj(y).unflatten(2, (self.heads, 64)).transpose(1, 2)  # (B,h,N,64)
        v = self.v_proj(y).unflatten(2, (self.heads, 64)).transpose(1, 2)  # (B,h,N,64)
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,64)
        y = y.transpose(1, 2).flatten(2)  # (B,N,C)

        y = self.c_proj(y).transpose(1, 2).unflatten(2, (H, W))  # (B,out_dim,H,W)
        return F.relu(y + self.connect(x))


def resnet_stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage of bottlenecks, inputs -> 4*planes channels; only the first has a stride."""
    stage = nn.Sequential(Bottleneck(inputs, planes, stride))
    for _ in range(blocks - 1):
        stage.append(Bottleneck(4 * planes, planes, stride=1))
    return stage


# model/clip.py, class ModifiedResNet
class ResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, four stages and an attention pool."""

    def __init__(self, layers: tuple[int, ...], width: int, state_dim: int):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

        self.layer1 = resnet_stage(width, width, layers[0], stride=1)
        self.layer2 = resnet_stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = resnet_stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = resnet_stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool(32 * width, state_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the feature maps v3, v4 and v5 at strides 8, 16 and 32. image (B,3,H,W)"""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (B,32,208,208)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)  # (B,64,208,208)
        x = F.avg_pool2d(x, 2)  # (B,64,104,104)

        x = self.layer1(x)  # (B,256,104,104)
        v3 = self.layer2(x)  # (B,512,52,52)
        v4 = self.layer3(v3)  # (B,1024,26,26)
        x = self.layer4(v4)  # (B,2048,13,13)
        return v3, v4, self.attnpool(x)  # v5 (B,1024,13,13)


# model/clip.py, class ResidualAttentionBlock
# shared: clip_text
class TextBlock(nn.Module):
    """A layer of CLIP's text transformer: causal self-attention, then an MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(dim, 4 * dim),
                "c_proj": nn.Linear(4 * dim, dim),
            }
        )
        self.ln_2 = nn.LayerNorm(dim)
        # Slots for adapters after attention and MLP; an adapter adds its own residual connection.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,C) -> (B,T,C)."""
        T = x.shape[1]
        causal_mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # True: masked

        y = self.ln_1(x)
        y = self.attn(y, y, y, attn_mask=causal_mask, need_weights=False)[0]  # (B,T,C)
        x = x + self.adapters[0](y)

        y = self.mlp["c_fc"](self.ln_2(x))  # (B,T,4C)
        y = y * torch.sigmoid(1.702 * y)  # quirk: CLIP's QuickGELU
        y = self.mlp["c_proj"](y)  # (B,T,C)
        return x + self.adapters[1](y)


# end shared


# model/clip.py, class CLIP
class CLIP(nn.Module):
    """CLIP's image and text encoders."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(77, dim))
        self.text_projection = nn.Parameter(torch.randn(dim, config.state_dim) / dim**0.5)
        # CLIP's temperature: unused here, kept so that official checkpoints load with all keys.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)
        self.visual = ResNet(config.layers, config.width, config.state_dim)

        blocks = nn.Sequential()
        for _ in range(config.text_layers):
            blocks.append(TextBlock(dim, config.heads))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(49408, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = nn.LayerNorm(dim)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return word vectors (B,T,dim) and sentence vectors (B,state_dim) of tokens (B,T)."""
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:T]  # (B,T,dim)
        words = self.ln_final(self.transformer["resblocks"](x))  # (B,T,dim)

        # The end token has the largest id, so argmax finds its first occurrence.
        end = tokens.argmax(1)  # (B,)
        batch = torch.arange(words.shape[0], device=words.device)  # (B,)
        state = words[batch, end] @ self.text_projection  # (B,state_dim)
        return words, state


# model/layers.py, conv_layer
def conv_layer(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution that keeps the size, a batch norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


# model/layers.py, CoordConv.add_coord
def add_coordinates(x: Tensor) -> Tensor:
    """Append each pixel's column and row, in -1..1, as channels. (B,C,H,W) -> (B,C+2,H,W)"""
    B, _, H, W = x.shape
    rows = torch.linspace(-1, 1, H, device=x.device).to(x.dtype)
    columns = torch.linspace(-1, 1, W, device=x.device).to(x.dtype)
    coordinates = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2,H,W)
    return torch.cat([x, coordinates.expand(B, -1, -1, -1)], 1)  # (B,C+2,H,W)


# model/layers.py, class FPN
class Neck(nn.Module):
    """Multiplies v5 by the sentence vector, then fuses a feature pyramid at stride 16."""

    def __init__(self, c3: int, c4: int, c5: int, dim: int):
        super().__init__()
        self.txt_proj = nn.Sequential(
            nn.Linear(c5, 2 * dim, bias=False),
            nn.BatchNorm1d(2 * dim),
            nn.ReLU(inplace=True),
        )
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.f1_v_proj = conv_layer(c5, 2 * dim, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(2 * dim), nn.ReLU(inplace=True))
        self.f2_v_proj = conv_layer(c4, dim, 3)
        self.f2_cat = conv_layer(3 * dim, dim, 1)
        self.f3_v_proj = conv_layer(c3, dim // 2, 3)
        self.f3_cat = conv_layer(dim // 2 + dim, dim, 1)
        self.f4_proj5 = conv_layer(2 * dim, dim, 3)
        self.f4_proj4 = conv_layer(dim, dim, 3)
        self.f4_proj3 = conv_layer(dim, dim, 3)
        self.aggr = conv_layer(3 * dim, dim, 1)
        # The first convolution is nested like the official CoordConv, to keep its tensor names.
        coord_conv = nn.ModuleDict({"conv1": conv_layer(dim + 2, dim, 3)})
        self.coordconv = nn.Sequential(coord_conv, conv_layer(dim, dim, 3))

    def forward(self, v3: Tensor, v4: Tensor, v5: Tensor, state: Tensor) -> Tensor:
        """v3, v4, v5 at strides 8, 16, 32, state (B,state_dim) -> (B,dim,26,26), stride 16."""
        # Fuse the sentence into the coarsest map.
        text = self.txt_proj(state)[:, :, None, None]  # (B,1024,1,1)
        f5 = self.norm_layer(self.f1_v_proj(v5) * text)  # (B,1024,13,13)

        # Top-down path; f3 is pooled to stride 16.
        f4 = torch.cat([self.f2_v_proj(v4), self.up(f5)], 1)  # (B,1536,26,26)
        f4 = self.f2_cat(f4)  # (B,512,26,26)
        f3 = F.avg_pool2d(self.f3_v_proj(v3), 2)  # (B,256,26,26)
        f3 = self.f3_cat(torch.cat([f3, f4], 1))  # (B,512,26,26)

        # Fuse the three maps, all at stride 16, and append coordinates.
        f5 = self.up(self.f4_proj5(f5))  # (B,512,26,26)
        f = torch.cat([self.f4_proj3(f3), self.f4_proj4(f4), f5], 1)  # (B,1536,26,26)
        f = add_coordinates(self.aggr(f))  # (B,514,26,26)
        f = self.coordconv[0]["conv1"](f)  # (B,512,26,26)
        return self.coordconv[1](f)


# model/layers.py, TransformerDecoder.pos1d
def sine_table(length: int, dim: int) -> Tensor:
    """Return sines and cosines of the positions 0, 1, ..., interleaved: (length,dim) float32."""
    frequencies = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))  # (dim/2,)
    angles = torch.arange(length)[:, None] * frequencies  # (length,dim/2)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)  # (length,dim)


# model/layers.py, TransformerDecoder.pos2d
def sine_table_2d(height: int, width: int, dim: int) -> Tensor:
    """Return sine tables of the column (first half) and the row: (height*width,dim) float32."""
    columns = sine_table(width, dim // 2)  # (W,dim/2)
    rows = sine_table(height, dim // 2)  # (H,dim/2)
    columns = columns.expand(height, width, -1)  # (H,W,dim/2)
    rows = rows[:, None].expand(height, width, -1)  # (H,W,dim/2)
    return torch.cat([columns, rows], 2).flatten(0, 1)  # (H*W,dim)


# model/layers.py, class TransformerDecoderLayer
class DecoderLayer(nn.Module):
    """Pre-norm transformer layer: pixels attend to each other, then to the words, then an MLP."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        # quirk: further norms on the output of both attentions and inside the MLP
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.LayerNorm(ffn_dim),
            nn.Linear(ffn_dim, dim),
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, words: Tensor, position: Tensor, word_position: Tensor, padding: Tensor
    ) -> Tensor:
        """x (B,N,C), words (B,T,C), positions (N,C) and (T,C) -> (B,N,C).

        padding: (B,T), True = masked.
        """
        # Positions are added to queries and keys, not to values.
        y = self.norm1(x)
        q = y + position
        y = self.self_attn(q, q, y, need_weights=False)[0]  # (B,N,C)
        x = x + self.dropout(self.self_attn_norm(y))

        q = self.norm2(x) + position
        k = words + word_position
        y = self.multihead_attn(q, k, words, key_padding_mask=padding, need_weights=False)[0]
        x = x + self.dropout(self.cross_attn_norm(y))  # (B,N,C)

        return x + self.dropout(self.ffn(self.norm3(x)))


# model/layers.py, class TransformerDecoder
class Decoder(nn.Module):
    """Transformer decoder in which the pixels of the neck's map attend to the words."""

    def __init__(self, layers: int, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(DecoderLayer(dim, heads, ffn_dim, dropout))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, words: Tensor, padding: Tensor) -> Tensor:
        """x (B,C,H,W), words (B,T,C), padding (B,T), True = masked -> (B,C,H,W)."""
        C, H, W = x.shape[1:]
        T = words.shape[1]
        position = sine_table_2d(H, W, C).to(x)  # (N,C)
        word_position = sine_table(T, C).to(x)  # (T,C)

        x = x.flatten(2).transpose(1, 2)  # (B,N,C)
        for layer in self.layers:
            x = layer(x, words, position, word_position, padding)
        return self.norm(x).transpose(1, 2).unflatten(2, (H, W))  # (B,C,H,W)


def upsample_matrix(n: int, like: Tensor) -> Tensor:
    """Return the (2n,3n) matrix of a 2x linear upsampling followed by a 3-tap sum, in 1-D.

    It maps the stacked signals of the three taps, [y0; y1; y2] of length n each, to
    out[o] = sum over t of up(y_t)[o + t - 1], with zeros outside, as in conv1d(up(y), padding=1).
    """
    one_hot = torch.eye(n, device=like.device, dtype=like.dtype)[None]  # (1,n,n), n signals
    up = F.interpolate(one_hot, scale_factor=2, mode="linear", align_corners=False)[0]  # (n,2n)
    padded = F.pad(up, (1, 1))  # (n,2n+2)

    shifted = []
    for t in range(3):
        shifted.append(padded[:, t : t + 2 * n])  # (n,2n)
    return torch.cat(shifted).T  # (2n,3n)


def upsampled_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Upsample x by 2 and apply a 3x3 convolution, with the channels mixed before the upsampling.

    Equals, at about a third of the multiplications (RN50 at 416 px),

        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return F.conv2d(x, weight, padding=1)

    Upsampling does not mix channels, so it commutes with the channel mixing of each tap: mix
    first, at low resolution, then upsample, shift and sum. The latter is separable: one small
    matrix per axis (`upsample_matrix`).

    x (B,C,H,W), weight (outputs,C,3,3) -> (B,outputs,2H,2W)
    """
    B, C, H, W = x.shape
    outputs = len(weight)

    # Mix the channels: one C-vector per (output, column tap, row tap), in that order.
    taps = weight.permute(0, 3, 2, 1).reshape(9 * outputs, C)
    y = taps @ x.flatten(2)  # (B,9*outputs,H*W)

    # Upsample, shift and sum along H, then along W.
    y = upsample_matrix(H, x) @ y.view(B, outputs, 3, 3 * H, W)  # (B,outputs,3,2H,W)
    y = y.transpose(2, 3).flatten(3)  # (B,outputs,2H,3*W)
    return y @ upsample_matrix(W, x).T  # (B,outputs,2H,2W)


def conv3x3_per_image(x: Tensor, pointwise: nn.Conv2d, kernel: Tensor, bias: Tensor) -> Tensor:
    """Apply a 1x1 convolution, then a 3x3 convolution with a separate kernel for each image.

    Equals

        B, C, H, W = x.shape
        x = pointwise(x).reshape(1, B * C, H, W)  # one group of C channels for each image
        y = F.conv2d(x, kernel, bias, padding=1, groups=B)  # (1,B,H,W)
        return y.transpose(0, 1)

    but the map of C channels between the two is never materialised: the 1x1 weights are folded
    into the kernel, which leaves one C-vector per tap and image.

    x (B,C,H,W), kernel (B,C,3,3), bias (B,) -> (B,1,H,W)
    """
    # Fold the 1x1 convolution into each tap.
    taps = kernel.flatten(2).flip(2).transpose(1, 2)  # (B,9,C); the flip is explained below
    folded = taps @ pointwise.weight.flatten(1)  # (B,9,C)
    folded_bias = taps @ pointwise.bias[:, None]  # (B,9,1)

    # The bias is added per tap, before the sum over neighbours: the plain form pads the output of
    # the 1x1 convolution with zeros, so nothing from outside the image may carry its bias.
    y = folded @ x.flatten(2) + folded_bias  # (B,9,H*W)

    # F.fold scatters each pixel's nine values to its neighbours and sums them. A convolution
    # gathers instead, so the kernel is flipped.
    y = F.fold(y, x.shape[2:], 3, padding=1)  # (B,1,H,W)
    return y + bias[:, None, None, None]


# model/layers.py, class Projector
class Projector(nn.Module):
    """Upsamples to stride 4 and convolves each image with a kernel predicted from its sentence."""

    def __init__(self, state_dim: int, dim: int):
        super().__init__()
        # Created first, so that a given seed keeps giving the same initial weights.
        pointwise = nn.Conv2d(dim // 2, dim // 2, 1)
        # Keys are indices into the official nn.Sequential; 0 and 2 were nn.Upsample, now part of
        # `upsampled_conv3x3`.
        self.vis = nn.ModuleDict(
            {
                "1": conv_layer(dim, dim, 3),
                "3": conv_layer(dim, dim // 2, 3),
                "4": pointwise,
            }
        )
        self.txt = nn.Linear(state_dim, 9 * (dim // 2) + 1)  # a kernel and a bias

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """x (B,dim,H,W), state (B,state_dim) -> logits (B,1,4H,4W)."""
        for name in ("1", "3"):
            conv3x3, norm, relu = self.vis[name]
            x = upsampled_conv3x3(x, conv3x3.weight)  # 1st (B,dim,2H,2W), 2nd (B,dim/2,4H,4W)
            x = relu(norm(x))

        kernel_and_bias = self.txt(state)  # (B,9*(dim/2)+1)
        kernel = kernel_and_bias[:, :-1].unflatten(1, (-1, 3, 3))  # (B,dim/2,3,3)
        bias = kernel_and_bias[:, -1]  # (B,)
        return conv3x3_per_image(x, self.vis["4"], kernel, bias)  # (B,1,4H,4W)


def trim_padding(tokens: Tensor) -> Tensor:
    """Drop the trailing columns of tokens (B,T) that are padding (0) in every row.

    This changes no output: the decoder masks padding, and the text encoder is causal.
    """
    last = tokens.any(0).nonzero().max()
    return tokens[:, : int(last) + 1]


# model/segmenter.py, class CRIS
class CRIS(nn.Module):
    """CLIP's encoders, the neck, the decoder and the projector."""

    def __init__(self, config: Config):
        super().__init__()
        if config.pixels not in ("letterbox", "stretch", "medvlsm"):
            raise ValueError(f"pixels={config.pixels!r}: choose letterbox, stretch or medvlsm")
        if len(config.layers) != 4:
            raise ValueError(f"layers={config.layers}: the image encoder has four stages")
        if config.heads < 1 or config.dim % config.heads:
            raise ValueError(f"heads={config.heads}: must divide dim={config.dim}")

        self.config = config
        dim = config.dim
        self.backbone = CLIP(config)
        self.neck = Neck(8 * config.width, 16 * config.width, config.state_dim, dim)
        self.decoder = Decoder(
            config.decoder_layers, dim, config.heads, config.ffn_dim, config.dropout
        )
        self.proj = Projector(config.state_dim, dim)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (B,1,H/4,W/4).

        image: (B,3,H,W) as `preprocess` returns it; H and W are multiples of 32, else ValueError.
        tokens: (B,T) int64, T at most 77: 49406, the text, 49407, padding.
        """
        if any(side % 32 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(image.shape[2:])}")
        if not torch.compiler.is_compiling():
            # The trimmed length is data-dependent, which would break a compiled graph.
            tokens = trim_padding(tokens)  # (B,T)
        padding = tokens == 0  # quirk: padding is recognised by id 0, whatever pad_token is

        v3, v4, v5 = self.backbone.visual(image)  # at strides 8, 16, 32
        words, state = self.backbone.encode_text(tokens)  # (B,T,512), (B,1024)
        x = self.neck(v3, v4, v5, state)  # (B,512,H/16,W/16)
        x = self.decoder(x, words, padding)  # (B,512,H/16,W/16)
        return self.proj(x, state)  # (B,1,H/4,W/4)

    def train(self, mode: bool = True) -> "CRIS":
        """Set training or evaluation mode.

        With `freeze_text_norm`, the BatchNorm1d on the sentence vectors (neck.txt_proj[1]) stays
        in evaluation mode. If every prompt is the same, the batch variance is 0, the running
        variance decays to 0, and evaluation divides by almost nothing.
        """
        super().train(mode)
        self.neck.txt_proj[1].train(mode and not self.config.freeze_text_norm)
        return self

    def preprocess(self, image) -> Tensor:
        """Return a PIL image as a normalised square (3,S,S) float32."""
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities (1,*size) from logits (1,S/4,S/4); size is the image's (H,W)."""
        return postprocess(logits, size, self.config)

    def segment(self, image, prompt: str) -> tuple:
        """Return probabilities (1,H,W) and mask (H,W), numpy, of a PIL image or an image file."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides) -> "CRIS":
        """Load a file, a folder, a run folder or a hub id; return the model in evaluation mode.

        A plain CLIP checkpoint fills the encoders; all other parts are then randomly initialised,
        which is printed. overrides: fields of Config. Raise FileNotFoundError or ValueError, one
        line, for a file that does not fit.
        """
        weights, config = read_weights_and_config(source)
        model = cls(replace(config, **overrides))
        load_weights(model, weights, source)
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = (
    "best.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",  # last: in open_clip's repositories it may hold the image tower alone
)
# Scalars in OpenAI's archives; the shapes of the two embedding tables say the same.
IGNORED = ("input_resolution", "context_length", "vocab_size")
# Parts that CRIS adds to CLIP: no CLIP checkpoint has their tensors.
NOT_IN_CLIP = ("backbone.visual.attnpool.connect.", "neck.", "decoder.", "proj.")


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names: CRIS's stay, CLIP's get the prefix "backbone."."""
    is_cris = any(name.startswith("backbone.") for name in state_dict)
    prefix = "" if is_cris else "backbone."
    return {prefix + name: t for name, t in state_dict.items() if name not in IGNORED}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict as the official class loads it; the names are the same.

    Official programs wrap the model in DistributedDataParallel: for those, add "module." to each
    name.
    """
    return dict(state_dict)


def is_plain_clip(weights: dict[str, Tensor]) -> bool:
    """Return True for a CLIP checkpoint, which has none of the parts that CRIS adds."""
    return not any(name.startswith(NOT_IN_CLIP) for name in weights)


def read_weights_and_config(source: str | Path) -> tuple[dict[str, Tensor], Config]:
    """Return what `source` holds: tensors under our names, and the config that they need."""
    weights, settings = read_checkpoint(source, FILES)
    weights = convert(weights)
    if "format" in settings:  # a run folder of ours
        return weights, Config(**run_config(settings, "CRIS", source, Config))
    return weights, guess_config(weights, source)


def guess_config(weights: dict[str, Tensor], source) -> Config:
    """Return the config of a file without settings; print the fields that could not be inferred.

    The variant, and with it the number of heads, follows from names and shapes.
    """
    if is_plain_clip(weights):
        length = 77
        advice = "which suit CLIP"
    else:
        length = 17
        advice = "those of RefCOCO; checkpoints of medvlsm need 77, 49407 and medvlsm"

    print(
        f"{source}: text_length, pad_token and pixels are not stored; unless set, they are "
        f"{length}, 0 and letterbox, {advice}"
    )

    config = closest_variant(weights, CRIS, dict)
    return replace(config, text_length=length, pad_token=0)


def load_weights(model: CRIS, weights: dict[str, Tensor], source) -> None:
    """Fill a model; with a plain CLIP checkpoint the parts in NOT_IN_CLIP keep their values.

    Raise ValueError, one line, if another tensor is missing, unknown or of another shape.
    """
    own_weights = model.state_dict()
    expected = own_weights
    if is_plain_clip(weights):
        expected = {n: t for n, t in own_weights.items() if not n.startswith(NOT_IN_CLIP)}

    check_complete(weights, expected, source)
    model.load_state_dict(own_weights | weights)
    if is_plain_clip(weights):
        parts = ", ".join(part.rstrip(".") for part in NOT_IN_CLIP)
        print(f"{source}: a plain CLIP checkpoint; new and untrained: {parts}")


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


def fit_into_square(size: tuple[int, int], side: int) -> tuple[float, float, float]:
    """Return the scale that fits an image of `size` (H,W) into a square, and its top and left.

    quirk: scale and offset act on pixel indices, without the usual half-pixel shift
    (utils/dataset.py, getTransformMat).
    """
    height, width = size
    scale = min(side / height, side / width)
    return scale, (side - height * scale) / 2, (side - width * scale) / 2


def sample_at(x: Tensor, rows: Tensor, columns: Tensor, mode: str) -> Tensor:
    """Interpolate x (C,h,w) at fractional pixel indices (H,) and (W,), zeros outside: (C,H,W)."""
    height, width = x.shape[1:]
    rows = (
        2 * rows + 1
    ) / height - 1  # grid_sample: -1 and 1 are the outer edges of the border pixels
    columns = (2 * columns + 1) / width - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2)  # (H,W,2)
    return F.grid_sample(x[None], grid[None], mode, align_corners=False)[0]  # (C,H,W)


def letterbox(x: Tensor, side: int, mode: str) -> Tensor:
    """Scale x (C,h,w) into the middle of a square, zeros around it: (C,side,side)."""
    scale, top, left = fit_into_square(x.shape[1:], side)
    index = torch.arange(side, device=x.device)
    return sample_at(x, (index - top) / scale, (index - left) / scale, mode)


def undo_letterbox(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Cut the image out of a square x (C,side,side) and scale it to its own size (H,W): (C,H,W)."""
    height, width = size
    scale, top, left = fit_into_square(size, x.shape[1])
    rows = torch.arange(height, device=x.device) * scale + top
    columns = torch.arange(width, device=x.device) * scale + left
    return sample_at(x, rows, columns, mode)


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


def preprocess(image, config: Config) -> Tensor:
    """Return a PIL image as a normalised square (3,S,S) float32, made as `config.pixels` says.

    Raise errors as `to_rgb` does.
    """
    import numpy as np
    from PIL import Image

    image = to_rgb(image)
    side = config.image_size
    if config.pixels != "letterbox":
        image = image.resize((side, side), Image.Resampling.BILINEAR)

    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]  # (3,1,1)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3,H,W)
    if config.pixels == "letterbox":
        x = letterbox(x - mean, side, "bicubic") + mean  # (3,S,S), zero padding -> mean colour
        x = (x * 255).round().clamp(0, 255) / 255  # rounded to 8 bits, as cv2.warpAffine does
    return (x - mean) / std  # (3,S,S)


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """Return a mask (H,W) in 0..1 as a training target (1,S,S) float32, aligned with `preprocess`.

    Nearest neighbour (letterbox: bilinear). Where a position falls exactly between two source
    pixels, the result may differ by one source pixel from that of PIL or OpenCV.
    """
    side = config.image_size
    mask = mask[None].float()  # (1,H,W)
    if config.pixels == "letterbox":
        return letterbox(mask, side, "bilinear")  # (1,S,S)
    return F.interpolate(mask[None], (side, side), mode="nearest-exact")[0]  # PIL's nearest


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Return probabilities (1,H,W) float32, 0..1, at the image's own `size`; logits (1,h,w)."""
    logits = logits[None].float()  # (1,1,h,w)
    if config.pixels == "stretch":
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits[0].sigmoid()  # (1,H,W)

    square = (config.image_size, config.image_size)
    if config.pixels == "medvlsm":
        logits = F.interpolate(logits, square, mode="bicubic", align_corners=True)
        return F.interpolate(logits.sigmoid(), size, mode="nearest-exact")[0]  # (1,H,W)

    # quirk: bicubic interpolation of probabilities (engine/engine.py, validate) overshoots 0..1
    x = F.interpolate(logits.sigmoid(), square, mode="bicubic", align_corners=True)[0]  # (1,S,S)
    return undo_letterbox(x, size, "bicubic").clamp(0, 1)  # (1,H,W)


# shared: clip_tokens
def tokenize(prompt: str, config: Config) -> Tensor:
    """Return the token ids (1,T) of a text, int64. Needs `tokenizer.py` and what it reads."""
    from tokenizer import CLIPTokenizer

    return CLIPTokenizer(config.text_length, config.pad_token)(prompt)


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


# shared: segment_prompt
def segment(model: nn.Module, image, prompt: str) -> tuple:
    """Segment what the prompt names; return probabilities and mask as numpy arrays.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    prompt: one text, truncated to `config.text_length` tokens.
    Both results have the image's own size: probabilities float32 (1,H,W), and a mask uint8 (H,W),
    which is 1 where they are above `config.threshold`. Raise the errors of `open_upright` and
    `preprocess`, and TypeError for several prompts.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, not {type(prompt).__name__}; call once for each")
    image = open_upright(image)
    weight = next(model.parameters())
    pixels = model.preprocess(image)[None].to(weight)  # (1,3,S,S)
    tokens = tokenize(prompt, model.config).to(weight.device)  # (1,T)
    size = (image.height, image.width)

    with evaluating(model):
        logits = model(pixels, tokens)[0]  # (1,h,w)
        probabilities = model.postprocess(logits, size).cpu().numpy()

    mask = probabilities[0] > model.config.threshold
    return probabilities, mask.astype("uint8")


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
