"""CRIS, CLIP-driven referring image segmentation: an image and a phrase in, the mask of it out.

Paper: Wang et al., CVPR 2022, arXiv 2111.15174. Official code (MIT), whose names are kept:
github.com/DerrickWang005/CRIS.pytorch at e596332, model/{clip,layers,segmenter}.py. Weights of CLIP
to start from: OpenAI's RN50.pt, RN101.pt; on the hub timm/resnet50_clip.openai, resnet101 (MIT). Of
CRIS none were released; those in use were trained on RefCOCO by a user (issue 3, no licence).

    image (B,3,416,416)                tokens (B,T): 49406 ... 49407 and padding
      ResNet, attention pool             text transformer
    v3 (B,512,52,52), stride 8         words (B,T,512)   state (B,1024), from 49407
    v4 (B,1024,26,26), 16                |                 |
    v5 (B,1024,13,13), 32                |                 |
    neck: v5 * state, all at 16  <-------|-----------------|
      (B,512,26,26)                      |                 |
    decoder: pixels look at words  <-----'                 |
      (B,512,26,26)                                        |
    projector: up to 4, 3x3 kernel from the state  <-------'
    logits (B,1,104,104)

Texts need `tokenizer.py` and `clip_merges.txt.xz` beside this file (copy both), and the package
`tokenizers`; or use any CLIP tokenizer. Left out: loss and data of the study.

    model = CRIS.from_pretrained("cris_best.pth")
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
"""

import json
import math
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks a stage of the ResNet
    width: int = 64  # channels after its stem; its stages end with 4, 8, 16, 32 times as many
    state_dim: int = 1024  # sentence vector, and channels of v5
    dim: int = 512  # text transformer, neck and decoder
    heads: int = 8  # of the text transformer and the decoder
    text_layers: int = 12
    decoder_layers: int = 3
    ffn_dim: int = 2048  # of the decoder
    image_size: int = 416  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1, CLIP's
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    pixels: str = "letterbox"  # way in and back: letterbox (official), stretch or medvlsm
    text_length: int = 17  # tokens that a phrase is cut or padded to, 77 at most; here RefCOCO's
    pad_token: int = 0  # 0 is masked in the decoder; 49407, medvlsm's, is attended to
    threshold: float = 0.35  # of the official evaluation
    dropout: float = 0.1  # in the decoder, while training
    freeze_text_norm: bool = False  # see CRIS.train


VARIANTS = {
    "rn50": Config(),  # 146,849,122 parameters
    "rn101": Config(layers=(3, 4, 23, 3), state_dim=512),  # 161,251,682
    "mini": Config(  # 4,254,622, most of them token embeddings; for tests and demos
        layers=(1, 1, 1, 1), width=8, state_dim=128, dim=64, heads=4, text_layers=2,
        decoder_layers=2, ffn_dim=128, image_size=128, text_length=77, dropout=0.0,
    ),
}  # fmt: skip


class Bottleneck(nn.Module):
    """CLIP's: every convolution has stride 1, an average pool strides, in the shortcut too."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        self.conv1, self.bn1 = conv(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, padding=1), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # untrained, a block is its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if inputs != 4 * planes:
            shortcut = conv(inputs, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
            self.downsample = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))  # (B,4*planes,H/stride,W/stride)
        y += self.downsample(self.pool(x))
        return F.relu(y, inplace=True)


class AttentionPool(nn.Module):
    """CLIP's, but nothing is pooled: all positions attend to each other, and all are kept."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        # CLIP saw 224 px: a row for the mean of all positions, unused here, then 7x7.
        self.positional_embedding = nn.Parameter(torch.randn(1 + 7 * 7, dim) / dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, out_dim)
        # The way past the attention is CRIS's own: no CLIP file has it.
        connect = nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim)
        self.connect = nn.Sequential(*connect)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        table = self.positional_embedding[1:].T.unflatten(1, (7, 7))[None]  # (1,C,7,7)
        y = x + F.interpolate(table, (H, W), mode="bicubic", align_corners=False)
        y = y.flatten(2).transpose(1, 2)  # (B,N,C)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(y).unflatten(2, (-1, 64)).transpose(1, 2) for f in projections)  # (B,h,N,64)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,C)
        y = self.c_proj(y).transpose(1, 2).unflatten(2, (H, W))  # (B,out_dim,H,W)
        return F.relu(y + self.connect(x))


class ResNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], width: int, state_dim: int):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.conv1, self.bn1 = conv(3, width // 2, stride=2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = conv(width // 2, width // 2), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = conv(width // 2, width), nn.BatchNorm2d(width)

        def stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
            rest = [Bottleneck(4 * planes, planes, 1) for _ in range(blocks - 1)]
            return nn.Sequential(Bottleneck(inputs, planes, stride), *rest)

        self.layer1 = stage(width, width, layers[0], 1)
        self.layer2 = stage(4 * width, 2 * width, layers[1], 2)
        self.layer3 = stage(8 * width, 4 * width, layers[2], 2)
        self.layer4 = stage(16 * width, 8 * width, layers[3], 2)
        self.attnpool = AttentionPool(32 * width, state_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B,32,208,208)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = self.layer1(F.avg_pool2d(x, 2))  # (B,256,104,104)
        v3 = self.layer2(x)  # (B,512,52,52)
        v4 = self.layer3(v3)  # (B,1024,26,26)
        return v3, v4, self.attnpool(self.layer4(v4))  # (B,1024,13,13)


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
        # Residual adapters may be put here, behind the attention and behind the MLP.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,C) -> (B,T,C)."""
        T = x.shape[1]
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T,T), not attended

        y = self.ln_1(x)
        y = self.attn(y, y, y, attn_mask=later, need_weights=False)[0]  # (B,T,C)
        x = x + self.adapters[0](y)

        y = self.mlp["c_fc"](self.ln_2(x))  # (B,T,4C)
        y = y * torch.sigmoid(1.702 * y)  # quirk: CLIP's QuickGELU
        y = self.mlp["c_proj"](y)  # (B,T,C)
        return x + self.adapters[1](y)


# end shared


class CLIP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(77, dim))
        self.text_projection = nn.Parameter(torch.randn(dim, config.state_dim) / dim**0.5)
        # CLIP's temperature: unused, kept so that a file can be written back whole.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)
        self.visual = ResNet(config.layers, config.width, config.state_dim)
        blocks = nn.Sequential(*(TextBlock(dim, config.heads) for _ in range(config.text_layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(49408, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = nn.LayerNorm(dim)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B,T) -> words (B,T,dim), state (B,state_dim)."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B,T,C)
        words = self.ln_final(self.transformer["resblocks"](x))
        end = tokens.argmax(1)  # the first 49407, the largest of all tokens
        state = words[torch.arange(len(words), device=words.device), end]  # (B,C)
        return words, state @ self.text_projection


def conv(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Neck(nn.Module):
    """v5 times the sentence vector, then a feature pyramid, brought together at stride 16."""

    def __init__(self, c3: int, c4: int, c5: int, dim: int):
        super().__init__()
        text = nn.Linear(c5, 2 * dim, bias=False)
        self.txt_proj = nn.Sequential(text, nn.BatchNorm1d(2 * dim), nn.ReLU(inplace=True))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.f1_v_proj = conv(c5, 2 * dim, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(2 * dim), nn.ReLU(inplace=True))
        self.f2_v_proj = conv(c4, dim, 3)
        self.f2_cat = conv(3 * dim, dim, 1)
        self.f3_v_proj = conv(c3, dim // 2, 3)
        self.f3_cat = conv(dim // 2 + dim, dim, 1)
        self.f4_proj5 = conv(2 * dim, dim, 3)
        self.f4_proj4 = conv(dim, dim, 3)
        self.f4_proj3 = conv(dim, dim, 3)
        self.aggr = conv(3 * dim, dim, 1)
        first = nn.ModuleDict({"conv1": conv(dim + 2, dim, 3)})  # takes coordinates as well
        self.coordconv = nn.Sequential(first, conv(dim, dim, 3))

    def forward(self, v3: Tensor, v4: Tensor, v5: Tensor, state: Tensor) -> Tensor:
        text = self.txt_proj(state)[:, :, None, None]  # (B,1024,1,1)
        f5 = self.norm_layer(self.f1_v_proj(v5) * text)  # (B,1024,13,13)
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(v4), self.up(f5)], 1))  # (B,512,26,26)
        f3 = F.avg_pool2d(self.f3_v_proj(v3), 2)  # (B,256,26,26)
        f3 = self.f3_cat(torch.cat([f3, f4], 1))  # (B,512,26,26)
        f5 = self.up(self.f4_proj5(f5))  # (B,512,26,26)
        f = torch.cat([self.f4_proj3(f3), self.f4_proj4(f4), f5], 1)  # (B,1536,26,26)
        f = self.aggr(f)  # (B,512,26,26)
        y, x = (torch.linspace(-1, 1, n, device=f.device).to(f.dtype) for n in f.shape[2:])
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy"))  # (2,H,W)
        f = torch.cat([f, xy.expand(len(f), -1, -1, -1)], 1)  # (B,514,H,W)
        return self.coordconv[1](self.coordconv[0]["conv1"](f))  # (B,512,H,W)


def sine_table(length: int, dim: int) -> Tensor:
    """Sines and cosines of the positions 0, 1, ..., interleaved: (length,dim) float32."""
    frequencies = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
    angles = torch.arange(length)[:, None] * frequencies  # (length,dim/2)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        # quirk: besides the usual norms before, one behind each attention and one in the MLP
        self.self_attn_norm, self.cross_attn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        up, down = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        norm = nn.LayerNorm(ffn_dim)
        self.ffn = nn.Sequential(up, nn.ReLU(inplace=True), nn.Dropout(dropout), norm, down)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, words, position, word_position, padding) -> Tensor:
        """x (B,N,C), words (B,T,C), positions (N,C) and (T,C), padding (B,T) -> (B,N,C)."""
        y = self.norm1(x)
        q = y + position  # queries and keys are told where they are, values are not
        y = self.self_attn(q, q, y, need_weights=False)[0]  # (B,N,C)
        x = x + self.dropout(self.self_attn_norm(y))
        q, k = self.norm2(x) + position, words + word_position
        y = self.multihead_attn(q, k, words, padding, need_weights=False)[0]  # (B,N,C)
        x = x + self.dropout(self.cross_attn_norm(y))
        return x + self.dropout(self.ffn(self.norm3(x)))


class Decoder(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        layer = partial(DecoderLayer, dim, heads, ffn_dim, dropout)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, words: Tensor, padding: Tensor) -> Tensor:
        """x (B,C,H,W), words (B,T,C), padding (B,T) True where words are not seen -> (B,C,H,W)."""
        C, H, W = x.shape[1:]
        column, row = sine_table(W, C // 2), sine_table(H, C // 2)  # (W,C/2), (H,C/2)
        position = torch.cat([column.expand(H, W, -1), row[:, None].expand(H, W, -1)], 2)  # (H,W,C)
        position = position.flatten(0, 1).to(x)  # (N,C)
        word_position = sine_table(words.shape[1], C).to(x)  # (T,C)
        x = x.flatten(2).transpose(1, 2)  # (B,N,C)
        for layer in self.layers:
            x = layer(x, words, position, word_position, padding)
        return self.norm(x).transpose(1, 2).unflatten(2, (H, W))  # (B,C,H,W)


def upsampled_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution of the bilinearly doubled x, padding 1, in a quarter of the multiplications.

    Channels and positions can be mixed in either order: each of the nine taps mixes the channels
    before upsampling; upsampling, shifting and adding are then one small matrix along each side.
    (B,C,H,W), (K,C,3,3) -> (B,K,2H,2W)
    """

    def taps(n: int) -> Tensor:
        """(3n,2n): how much of position i each tap sees when it makes position j."""
        eye = torch.eye(n, device=x.device, dtype=x.dtype)[None]
        up = F.interpolate(eye, scale_factor=2, mode="linear", align_corners=False)[0]  # (n,2n)
        return F.pad(up, (1, 1)).unfold(1, 2 * n, 1).transpose(0, 1).flatten(0, 1)

    B, C, H, W = x.shape
    K = len(weight)
    y = weight.permute(0, 3, 2, 1).reshape(-1, C) @ x.flatten(2)  # (B,K*3*3,H*W), column tap first
    y = taps(H).T @ y.view(B, K, 3, 3 * H, W)  # (B,K,3,2H,W)
    return y.transpose(2, 3).flatten(3) @ taps(W)  # (B,K,2H,2W)


class Projector(nn.Module):
    def __init__(self, state_dim: int, dim: int):
        super().__init__()
        # Official numbers: 0 and 2 are the upsamplings, done here within the convolutions.
        mix = nn.Conv2d(dim // 2, dim // 2, 1)
        self.vis = nn.ModuleDict({"1": conv(dim, dim, 3), "3": conv(dim, dim // 2, 3), "4": mix})
        self.txt = nn.Linear(state_dim, 9 * (dim // 2) + 1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """x (B,dim,H,W), state (B,state_dim) -> logits (B,1,4H,4W)."""
        for conv3x3, norm, relu in (self.vis["1"], self.vis["3"]):
            x = relu(norm(upsampled_conv3x3(x, conv3x3.weight)))  # (B,dim/2,4H,4W) at the end
        # The last 1x1 convolution and the kernel of the sentence are one linear map: nine numbers
        # a pixel, shifted and added by F.fold, which shifts against a convolution: hence the flip.
        kernel, bias = self.txt(state).split((9 * x.shape[1], 1), 1)
        kernel = kernel.unflatten(1, (-1, 9)).flip(2).transpose(1, 2)  # (B,9,dim/2)
        mix = self.vis["4"]
        y = kernel @ mix.weight.flatten(1) @ x.flatten(2) + kernel @ mix.bias[:, None]  # (B,9,16HW)
        return F.fold(y, x.shape[2:], 3, padding=1) + bias[:, :, None, None]  # (B,1,4H,4W)


class CRIS(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        if config.pixels not in ("letterbox", "stretch", "medvlsm"):
            raise ValueError(f"pixels={config.pixels!r}: choose letterbox, stretch or medvlsm")
        if len(config.layers) != 4:
            raise ValueError(f"layers={config.layers}: the image encoder has four stages")
        if config.heads < 1 or config.dim % config.heads:
            raise ValueError(f"heads={config.heads}: must divide dim={config.dim}")
        self.config, c = config, config
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (1,H,W)
        self.backbone = CLIP(c)
        self.neck = Neck(8 * c.width, 16 * c.width, c.state_dim, c.dim)
        self.decoder = Decoder(c.decoder_layers, c.dim, c.heads, c.ffn_dim, c.dropout)
        self.proj = Projector(c.state_dim, c.dim)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image (B,3,H,W) normalised, H and W in 32s, tokens (B,T) -> logits (B,1,H/4,W/4)."""
        if any(side % 32 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(image.shape[2:])}")
        if not torch.compiler.is_compiling():  # which wants shapes that depend on no value
            # Columns of zeros at the end change nothing: masked, and no word looks ahead.
            tokens = tokens[:, : int(tokens.any(0).nonzero().max()) + 1]  # (B,T)
        v3, v4, v5 = self.backbone.visual(image)
        words, state = self.backbone.encode_text(tokens)
        x = self.neck(v3, v4, v5, state)  # (B,512,H/16,W/16)
        return self.proj(self.decoder(x, words, tokens == 0), state)

    def train(self, mode: bool = True) -> "CRIS":
        super().train(mode)
        # With one phrase for all images its batches have no variance: the running one decays to
        # nothing, and evaluation divides by it. `freeze_text_norm` keeps it as loaded.
        self.neck.txt_proj[1].train(mode and not self.config.freeze_text_norm)
        return self

    def segment(self, image, prompt: str) -> tuple:
        """Segment an image or its file -> probabilities (1,H,W), mask (H,W); see `segment`."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides) -> "CRIS":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        CRIS whole, or CLIP alone: then what FRESH names stays untrained. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = convert(weights)
        fresh = () if any(name.startswith(FRESH) for name in weights) else FRESH
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "CRIS", source, Config))
        else:
            length, why = (77, "CLIP's") if fresh else (17, "of RefCOCO; medvlsm's are 77, 49407")
            print(f"{source}: no tensor tells text_length, pad_token; took {length}, 0, {why}")
            config = closest_variant(weights, CRIS, dict)  # the number of heads follows from it
            config = replace(config, text_length=length, pad_token=0)
        model = cls(replace(config, **overrides))
        expected = {n: t for n, t in model.state_dict().items() if not n.startswith(fresh)}
        check_complete(weights, expected, source)
        model.load_state_dict(model.state_dict() | weights)
        if fresh:
            print(f"{source}: CLIP alone; untrained are {', '.join(fresh)}")
        return model.eval()


FILES = ("best.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
IGNORED = ("input_resolution", "context_length", "vocab_size")  # OpenAI's; two tables tell them
FRESH = ("backbone.visual.attnpool.connect.", "neck.", "decoder.", "proj.")  # in no file of CLIP


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of CRIS stay, those of CLIP alone go below `backbone.`."""
    prefix = "" if any(name.startswith("backbone.") for name in state_dict) else "backbone."
    return {prefix + name: t for name, t in state_dict.items() if name not in IGNORED}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """For `load_state_dict` of the official class; its programs want "module." before each name."""
    return dict(state_dict)


# shared: closest_variant
def closest_variant(weights: dict[str, Tensor], kind: type[nn.Module], naming) -> Config:
    """Return the variant with the most tensors of the same name and shape as `weights`.

    naming: a function that gives the state dict of a model of class `kind` the file's names.
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


def letterbox(x: Tensor, size: tuple[int, int], mode: str, back: bool = False) -> Tensor:
    """x (C,h,w) into the middle of a square `size`, zeros round it; `back`: out of it. -> (C,*size)

    quirk: scale and offset act on pixel numbers, as if pixels were points (utils/dataset.py).
    """
    image, square = (size, x.shape[1]) if back else (x.shape[1:], size[0])
    scale, axes = min(square / side for side in image), []
    for side, old, new in zip(image, x.shape[1:], size, strict=True):
        index, offset = torch.arange(new, device=x.device), (square - side * scale) / 2
        index = index * scale + offset if back else (index - offset) / scale  # read here
        axes.append((2 * index + 1) / old - 1)
    grid = torch.stack(torch.meshgrid(axes[1], axes[0], indexing="xy"), 2)  # (H,W,2)
    return F.grid_sample(x[None], grid[None], mode, align_corners=False)[0]


# shared: to_rgb
def to_rgb(image):
    """Return a PIL image in RGB; transparency is dropped.

    Raise TypeError for anything else, such as an array or a path, and ValueError for 16-bit and
    float images: Pillow would cut their values off at 255, so that they came out white, or black.
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
    if image.mode == "P":  # else Pillow warns of palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


# end shared


def preprocess(image, config: Config) -> Tensor:
    """PIL image -> (3,S,S) float32, normalised. `config.pixels` says how it becomes a square.

    Raise errors as `to_rgb` does.
    """
    import numpy as np
    from PIL import Image

    size = (config.image_size, config.image_size)
    image = to_rgb(image)
    if config.pixels != "letterbox":
        image = image.resize(size, Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean  # (3,H,W)
    if config.pixels == "letterbox":  # rounded to 8 bits as cv2.warpAffine does
        x = ((letterbox(x, size, "bicubic") + mean) * 255).round().clamp(0, 255) / 255 - mean
    return x / std


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """mask (H,W) in 0..1 -> (1,S,S) float32 in the geometry of `preprocess`, to train with.

    Nearest neighbour (letterbox: bilinear). Where a position falls exactly between two source
    pixels, the result may differ by one source pixel from that of PIL or OpenCV.
    """
    size, mask = (config.image_size, config.image_size), mask[None].float()
    if config.pixels == "letterbox":
        return letterbox(mask, size, "bilinear")
    return F.interpolate(mask[None], size, mode="nearest-exact")[0]  # PIL's nearest


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (1,h,w) -> probabilities (1,H,W) float32, 0..1, at the image's own `size` (H,W)."""
    square, logits = (config.image_size, config.image_size), logits[None].float()
    if config.pixels == "stretch":
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].sigmoid()
    if config.pixels == "medvlsm":
        x = F.interpolate(logits, square, mode="bicubic", align_corners=True).sigmoid()
        return F.interpolate(x, size, mode="nearest-exact")[0]
    # quirk: cubic and of probabilities (engine/engine.py, validate), so that some leave 0..1
    x = F.interpolate(logits.sigmoid(), square, mode="bicubic", align_corners=True)[0]
    return letterbox(x, size, "bicubic", back=True).clamp(0, 1)


# shared: clip_tokens
def tokenize(prompt: str, config: Config) -> Tensor:
    """Return the token ids (1,T) of a text, int64. Needs `tokenizer.py` and what it reads."""
    from tokenizer import CLIPTokenizer

    return CLIPTokenizer(config.text_length, config.pad_token)(prompt)


# end shared


# shared: open_upright
def open_upright(image):
    """Return an image file (str or Path) as a PIL image, turned by its EXIF orientation.

    Anything else is returned as it is. Raise OSError for a file that Pillow cannot read, ValueError
    for one of several pages or of 16-bit colours, of which Pillow would keep the high bytes.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, str | Path):
        return image
    # Not by name: Pillow would map grey TIFFs, and garble those that are to be turned.
    with open(image, "rb") as file, Image.open(file) as opened:
        pages = getattr(opened, "n_frames", 1)
        if pages > 1 and opened.format not in ("MPO", "PSD"):  # a phone's gain maps, layers
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
    """Return where the image shows what the prompt names, as numpy arrays of the image's size.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    prompt: one text, cut at `config.text_length` tokens.
    Probabilities are float32 (1,H,W). The mask, uint8 (H,W), is 1 where they are above
    `config.threshold`, else 0. Raise errors as `open_upright` and `preprocess` do, and TypeError
    for several prompts.
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
    """Return the fields of `config`, a dataclass, from the config.json of a run folder of ours.

    Raise ValueError, one line, if it is another model's, of a newer version or was damaged.
    """
    found_kind = settings.get("class")
    version = settings["format"]
    if found_kind != kind or version != 1:
        raise ValueError(f"{source}: holds {found_kind} in format {version}, not {kind} in 1")
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

    No code in a file is run. Raise ValueError, one line, if it is damaged or holds something else.
    """
    try:
        content = parse_file(path)
    except Exception as error:
        message = " ".join(str(error).split())
        reason = " ".join(f"{error!r:.150}".split())
        advice = "get the whole file"
        if "unsupported global" in message.lower():
            reason = "it has code in it"
            advice = "where it was made, torch.save(model.state_dict(), path)"
        elif "is not run" in message:
            reason = f"{message:.150}"
            advice = "where it was made, torch.save(model.state_dict(), path)"
        raise ValueError(f"{path}: cannot be read ({reason}); {advice}") from None
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

    for prefix in ("module.", "net."):
        renamed = {}
        for name, tensor in weights.items():
            bare = name.removeprefix(prefix)
            renamed[name if bare in weights else bare] = tensor  # never two of one name
        weights = renamed
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
    """Return the first of `files` that a hub repository has; download it unless it is cached.

    source: `owner/name` or `owner/name@revision`. Its config.json is put beside the file.
    Raise FileNotFoundError or OSError, one line, if there is no such file or no connection.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    repository, _, revision = source.partition("@")
    is_file = Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_file or repository.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder; a hub id is owner/name")
    for name in files:
        cached = hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)

    try:
        fetch(repository, "config.json", revision)
        for name in files:
            path = fetch(repository, name, revision)
            if path is not None:
                return path
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"{source}: neither file nor repository on the hub") from None
    except Exception as error:  # its class depends on the version of huggingface_hub
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise OSError(
            f"{source}: could not be downloaded from the hub ({reason}); check the connection, "
            "or get the file elsewhere and give its path"
        ) from None
    raise FileNotFoundError(f"{source}: the repository has none of {', '.join(files)}")


def fetch(repository: str, name: str, revision: str) -> Path | None:
    """Download one file of a hub repository, saying its size; None if the repository lacks it."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    url = hub.hf_hub_url(repository, name, revision=revision or None)
    try:
        size = hub.get_hf_file_metadata(url).size or 0
    except EntryNotFoundError:
        return None

    version = f"{repository}@{revision}" if revision else repository
    print(f"downloading {name}, {size / 1e6:,.1f} MB, of {version} from {hub.constants.ENDPOINT}")
    return Path(hub.hf_hub_download(repository, name, revision=revision or None))


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


# end shared
