"""CRIS, CLIP-driven referring image segmentation: an image and a phrase in, the mask of it out.

Paper: Wang et al., CVPR 2022, arXiv 2111.15174. Official code: github.com/DerrickWang005/CRIS.pytorch
at e596332, model/{clip,layers,segmenter}.py (MIT). Parameters keep their official names.
Weights: CLIP to start from is OpenAI's RN50.pt or RN101.pt, on the hub timm/resnet50_clip.openai and
timm/resnet101_clip.openai (MIT). The authors of CRIS released none of theirs; the checkpoint in use
was trained on RefCOCO by a user (issue 3 of the official repository; no licence given).

    image (B,3,416,416)                  tokens (B,T): 49406 ... 49407 and padding
      ResNet, attention pool               text transformer
    v3 (B,512,52,52)                     words (B,T,512)   state (B,1024), from 49407
    v4 (B,1024,26,26)                      |                 |
    v5 (B,1024,13,13)                      |                 |
    neck: v5 * state, all at stride 16  <--|-----------------|
      (B,512,26,26)                        |                 |
    decoder: pixels attend to words  <-----'                 |
      (B,512,26,26)                                          |
    projector: up to stride 4, 3x3 kernel from the state  <--'
    logits (B,1,104,104)

Tokens: copy `tokenizer.py` too, or use any CLIP tokenizer. Left out: the loss (BCE of the logits with
the mask at stride 4), the data pipeline.
"""

import json
import math
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
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

    def __post_init__(self):
        if self.pixels not in ("letterbox", "stretch", "medvlsm"):
            raise ValueError(f"pixels={self.pixels!r}: choose letterbox, stretch or medvlsm")


VARIANTS = {
    "rn50": Config(),  # 146,849,122 parameters
    "rn101": Config(layers=(3, 4, 23, 3), state_dim=512),  # 161,251,682
    "mini": Config(  # 5,393,946, most of them token embeddings; for tests and demos
        layers=(1, 1, 1, 1), width=16, state_dim=128, dim=64, heads=4, text_layers=2,
        decoder_layers=2, ffn_dim=128, image_size=128, text_length=77,
    ),
}  # fmt: skip


class Bottleneck(nn.Module):
    """CLIP's: every convolution has stride 1, an average pool strides, in the shortcut too."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # untrained, a block is its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if inputs != 4 * planes:
            conv = nn.Conv2d(inputs, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

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
        for proj in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(proj.weight, std=dim**-0.5)
        # The way past the attention is CRIS's own: no CLIP file has it.
        conv = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.connect = nn.Sequential(conv, nn.BatchNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        table = self.positional_embedding[1:].T.unflatten(1, (7, 7))[None]  # (1,C,7,7)
        y = x + F.interpolate(table, (H, W), mode="bicubic", align_corners=False)
        y = y.flatten(2).transpose(1, 2)  # (B,N,C)
        q, k, v = (
            proj(y).unflatten(2, (-1, 64)).transpose(1, 2)  # (B,h,N,64)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,C)
        y = self.c_proj(y).transpose(1, 2).unflatten(2, (H, W))  # (B,out_dim,H,W)
        return F.relu(y + self.connect(x))


class ResNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], width: int, state_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

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
    """A layer of CLIP's text transformer: attention to earlier tokens, then an MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(dim)
        mlp = {"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)}
        self.mlp = nn.ModuleDict(mlp)
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)  # (T,T)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=later, need_weights=False)[0]  # (B,T,C)
        y = self.mlp["c_fc"](self.ln_2(x))  # (B,T,4C)
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))  # quirk: CLIP's QuickGELU
# end shared


class CLIP(nn.Module):
    """Both towers; untrained, they start as CLIP did (model/clip.py, initialize_parameters)."""

    def __init__(self, config: Config):
        super().__init__()
        dim, layers = config.dim, config.text_layers
        self.positional_embedding = nn.Parameter(torch.empty(77, dim).normal_(std=0.01))
        self.text_projection = nn.Parameter(torch.empty(dim, config.state_dim).normal_(std=dim**-0.5))
        # CLIP's temperature: unused, kept so that a file can be written back whole.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)
        self.visual = ResNet(config.layers, config.width, config.state_dim)
        blocks = nn.Sequential(*(TextBlock(dim, config.heads) for _ in range(layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(49408, dim)
        self.ln_final = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * dim) ** -0.5)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=(2 * layers * dim) ** -0.5)

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


def upsample2x(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Neck(nn.Module):
    """v5 times the sentence vector, then a feature pyramid, brought together at stride 16."""

    def __init__(self, c3: int, c4: int, c5: int, dim: int):
        super().__init__()
        text = nn.Linear(c5, 2 * dim, bias=False)
        self.txt_proj = nn.Sequential(text, nn.BatchNorm1d(2 * dim), nn.ReLU(inplace=True))
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
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(v4), upsample2x(f5)], 1))  # (B,512,26,26)
        f3 = F.avg_pool2d(self.f3_v_proj(v3), 2)  # (B,256,26,26)
        f3 = self.f3_cat(torch.cat([f3, f4], 1))  # (B,512,26,26)
        f5 = upsample2x(self.f4_proj5(f5))  # (B,512,26,26)
        f = torch.cat([self.f4_proj3(f3), self.f4_proj4(f4), f5], 1)  # (B,1536,26,26)
        f = self.aggr(f)  # (B,512,26,26)
        y, x = (torch.linspace(-1, 1, n, device=f.device).to(f.dtype) for n in f.shape[2:])
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(len(f), -1, -1, -1)  # (B,2,H,W)
        return self.coordconv[1](self.coordconv[0]["conv1"](torch.cat([f, xy], 1)))


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
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.LayerNorm(ffn_dim), nn.Linear(ffn_dim, dim),
        )  # fmt: skip
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
        layers = [DecoderLayer(dim, heads, ffn_dim, dropout) for _ in range(layers)]
        self.layers = nn.ModuleList(layers)
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
    """F.conv2d(upsample2x(x), weight, padding=1) with a quarter of its multiplications.

    Channels and positions can be mixed in either order: each of the nine taps mixes the channels
    before upsampling; upsampling, shifting and adding are then one small matrix along each side.
    (B,C,H,W), (O,C,3,3) -> (B,O,2H,2W)
    """

    def taps(n: int) -> Tensor:
        """(n,3,2n): how much of position i each tap sees when it makes position j."""
        eye = torch.eye(n, device=x.device, dtype=x.dtype)[None]
        up = F.interpolate(eye, scale_factor=2, mode="linear", align_corners=False)[0]  # (n,2n)
        return F.pad(up, (1, 1)).unfold(1, 2 * n, 1)

    y = torch.einsum("ockl,bchw->bolkhw", weight, x)
    y = torch.einsum("bolkhw,hku->boluw", y, taps(x.shape[2]))
    return torch.einsum("boluw,wlv->bouv", y, taps(x.shape[3]))


class Projector(nn.Module):
    def __init__(self, state_dim: int, dim: int):
        super().__init__()
        # Official numbers: 0 and 2 are the upsamplings, done here within the convolutions.
        vis = {"1": conv(dim, dim, 3), "3": conv(dim, dim // 2, 3), "4": nn.Conv2d(dim // 2, dim // 2, 1)}
        self.vis = nn.ModuleDict(vis)
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
        self.config, c = config, config
        self.backbone = CLIP(c)
        self.neck = Neck(8 * c.width, 16 * c.width, c.state_dim, c.dim)
        self.decoder = Decoder(c.decoder_layers, c.dim, c.heads, c.ffn_dim, c.dropout)
        self.proj = Projector(c.state_dim, c.dim)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image (B,3,H,W) normalised, sides multiples of 32; tokens (B,T) -> logits (B,1,H/4,W/4)."""
        if any(side % 32 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(image.shape[2:])}")
        if not torch.compiler.is_compiling():  # which wants shapes that depend on no value
            # Columns of zeros at the end change nothing: they are masked, and no word looks ahead.
            tokens = tokens[:, : int(tokens.any(0).nonzero().max()) + 1]  # (B,T)
        v3, v4, v5 = self.backbone.visual(image)
        words, state = self.backbone.encode_text(tokens)
        x = self.neck(v3, v4, v5, state)  # (B,512,H/16,W/16)
        return self.proj(self.decoder(x, words, tokens == 0), state)

    def train(self, mode: bool = True) -> "CRIS":
        """With `freeze_text_norm` the batch norm over sentence vectors uses its running statistics.

        If all phrases are the same, batches have no variance; the running one decays to nothing,
        and in evaluation what is left of the differences is amplified three hundred times.
        """
        super().train(mode)
        self.neck.txt_proj[1].train(mode and not self.config.freeze_text_norm)
        return self

    def preprocess(self, image) -> Tensor:
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return postprocess(logits, size, self.config)

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides) -> "CRIS":
        """CRIS in evaluation mode from a file, folder, run folder or hub id; see the top.

        A file with CLIP alone leaves FRESH untrained and says so. `overrides` are fields of Config.
        """
        weights, settings = read_checkpoint(source, FILES)
        clip_only = not any(name.startswith(("neck.", "decoder.", "proj.")) for name in weights)
        weights = convert(weights)
        if "format" in settings:
            config = run_config(settings, source)
        else:
            length = 77 if clip_only else 17
            config = replace(closest_variant(weights), text_length=length, pad_token=0)
            why = "as CLIP was trained" if clip_only else "as on RefCOCO; medvlsm: 77, 49407"
            print(f"{source}: no tensor tells text_length and pad_token, took {length}, 0 ({why})")
        model = cls(replace(config, **overrides))
        ours = model.state_dict()
        expected = {n: t for n, t in ours.items() if not (clip_only and n.startswith(tuple(FRESH)))}
        if clip_only:
            print(f"{source} holds CLIP only; untrained: {', '.join(FRESH)}")
        check_complete(weights, expected, source)
        model.load_state_dict(ours | weights)
        return model.eval()


# --- pixels -----------------------------------------------------------------------------------------


def letterbox(height: int, width: int, size: int) -> tuple[float, tuple[float, float]]:
    """Scale and (y,x) offset that put an image into the middle of a square.

    quirk: they act on pixel numbers, as if pixels were points (utils/dataset.py, getTransformMat).
    """
    scale = min(size / height, size / width)
    return scale, ((size - height * scale) / 2, (size - width * scale) / 2)


def resample(x: Tensor, size, scale: float, offset, mode: str) -> Tensor:
    """x (C,h,w) read at (number of the new pixel * scale + offset), 0 outside -> (C,*size)."""
    y_grid, x_grid = (
        (2 * (torch.arange(n, device=x.device) * scale + shift) + 1) / old - 1
        for n, shift, old in zip(size, offset, x.shape[1:], strict=True)
    )
    grid = torch.stack(torch.meshgrid(x_grid, y_grid, indexing="xy"), 2)[None]  # (1,H,W,2)
    return F.grid_sample(x[None], grid, mode, align_corners=False)[0]


def preprocess(image, config: Config) -> Tensor:
    """PIL image -> (3,S,S) float32, normalised."""
    import numpy as np
    from PIL import Image

    S, image = config.image_size, image.convert("RGB")
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
    if config.pixels != "letterbox":
        image = image.resize((S, S), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3,H,W)
    if config.pixels == "letterbox":  # cubic, the mean as border, 8 bits: what cv2.warpAffine does
        scale, (top, left) = letterbox(*x.shape[1:], S)
        x = resample(x - mean, (S, S), 1 / scale, (-top / scale, -left / scale), "bicubic") + mean
        x = (x * 255).round().clamp(0, 255) / 255
    return (x - mean) / std


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """mask (H,W) in 0..1 -> (1,S,S) float32 in the geometry of `preprocess`, to train with."""
    S, mask = config.image_size, mask[None].float()
    if config.pixels != "letterbox":
        return F.interpolate(mask[None], (S, S))[0]  # nearest
    scale, (top, left) = letterbox(*mask.shape[1:], S)
    return resample(mask, (S, S), 1 / scale, (-top / scale, -left / scale), "bilinear")


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (1,h,w) -> probabilities (1,H,W) at the image's own size."""
    S, logits = config.image_size, logits[None].float()
    if config.pixels == "stretch":
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].sigmoid()
    if config.pixels == "medvlsm":  # quirk: logits here, probabilities in the official evaluation
        logits = F.interpolate(logits, (S, S), mode="bicubic", align_corners=True)
        return F.interpolate(logits.sigmoid(), size, mode="nearest-exact")[0]
    # quirk: cubic interpolation of probabilities, twice, leaves 0..1 (engine/engine.py, validate)
    x = F.interpolate(logits.sigmoid(), (S, S), mode="bicubic", align_corners=True)[0]
    return resample(x, size, *letterbox(*size, S), "bicubic")


# --- weights ----------------------------------------------------------------------------------------

FILES = ("best.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
IGNORED = {  # of OpenAI's archives
    "input_resolution": "224, the position table of the attention pool tells it",
    "context_length": "77, the position table of the text tells it",
    "vocab_size": "49408, the token table tells it",
}
FRESH = {  # what a file with CLIP alone does not hold
    "backbone.visual.attnpool.connect.": "the way past the attention",
    "neck.": "",
    "decoder.": "",
    "proj.": "",
}


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names are ours; what CLIP alone calls `visual` is `backbone.visual` here, and so on."""
    clip_only = not any(name.startswith(("neck.", "decoder.", "proj.")) for name in state_dict)
    prefix = "backbone." if clip_only else ""
    return {prefix + name: t for name, t in state_dict.items() if name not in IGNORED}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the official class; its test.py wants {"state_dict": {"module." + name: tensor}} in a file."""
    return dict(state_dict)


def closest_variant(weights: dict[str, Tensor]) -> Config:
    """The variant with most names and shapes in common: sizes follow, and heads, which no shape tells."""
    shapes = {(name, t.shape) for name, t in weights.items()}

    def agreement(config: Config) -> int:
        with torch.device("meta"):
            return len(shapes & {(name, t.shape) for name, t in CRIS(config).state_dict().items()})

    return max(VARIANTS.values(), key=agreement)


def run_config(settings: dict, source) -> Config:
    """The Config in the config.json of a run folder."""
    if (settings["format"], settings.get("class")) != (1, "CRIS"):
        raise ValueError(f"{source}: holds {settings.get('class')} in format {settings['format']}, not CRIS in format 1")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["config"].items()}
    if unknown := values.keys() - {field.name for field in fields(Config)}:
        raise ValueError(f"{source}: config.json has unknown fields {sorted(unknown)}")
    return Config(**values)


# shared: read_checkpoint
def read_checkpoint(source: str | Path, files: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Weights and settings of a file, a folder or a repository of the hub, `owner/name[@revision]`.

    Of a folder or repository it is the first of `files` that is there. -> the state dict, without the
    wrappers and prefixes of training programs, and the config.json beside it ({} if there is none).
    FileNotFoundError or ValueError say in a line what is missing, damaged or of another kind.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in files if (path / name).exists()), None)
        if path is None:
            raise FileNotFoundError(f"{source}: has none of {', '.join(files)}; name the file itself")
    elif not path.exists():
        path = download(str(source), files)
    config, weights = path.parent / "config.json", read_weights(path)
    try:
        settings = json.loads(config.read_text()) if config.exists() else {}
    except ValueError as error:
        raise ValueError(f"{config}: is not JSON ({error})") from None
    for key in ("state_dict", "model"):
        weights = weights[key] if isinstance(weights.get(key), dict) else weights
    for prefix in ("module.", "net."):  # a name that would then occur twice keeps its prefix
        bare = {name: name.removeprefix(prefix) for name in weights}
        weights = {n if bare[n] in weights else bare[n]: t for n, t in weights.items()}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is of {type(tensor)}; expected a state dict of tensors")
    return weights, settings


def read_weights(path: Path) -> dict:
    """What a .safetensors file, a TorchScript archive or a pickle without code holds."""
    with open(path, "rb") as file:
        if file.read(64).lstrip().startswith((b"<", b"version https://git-lfs")):
            raise ValueError(f"{path}: a web page or Git LFS pointer; download the weights themselves")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        archive = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in archive):
            with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated, files stay
                return torch.jit.load(path, map_location="cpu").state_dict()
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        if "Unsupported global" in str(error):
            hint = "where it was made, torch.save(model.state_dict(), 'weights.pt')"
            raise ValueError(f"{path}: holds code, which is not run; {hint}") from None
        raise ValueError(f"{path}: damaged or no weights ({error!r:.150}); get it again") from None


def download(source: str, files: tuple[str, ...]) -> Path:
    """The first of `files` in a repository, with config.json beside it; from the cache if it is there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    if len(repository.split("/")) != 2:
        raise FileNotFoundError(f"{source}: no such file or folder, and no hub id such as owner/name")
    where = {"repo_id": repository, "revision": revision or None}
    for name in files:
        if isinstance(path := try_to_load_from_cache(filename=name, **where), str):
            return Path(path)
    for name in ("config.json", *files):
        try:
            url = hf_hub_url(filename=name, **where)
            print(f"downloading {url} ({get_hf_file_metadata(url).size / 1e6:.1f} MB)", flush=True)
            path = hf_hub_download(filename=name, **where)
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the next name
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise FileNotFoundError(f"{source}: neither here nor to be had from {url} ({why}); check ...") from None
        if name != "config.json":
            return Path(path)
    raise FileNotFoundError(f"{source}: the repository has none of {', '.join(files)}")


def check_complete(found: dict[str, Tensor], expected: dict[str, Tensor], source) -> None:
    """Raise a ValueError that names the first tensors in which two state dicts differ."""

    def kind(t: Tensor) -> str:
        return f"{'float' if t.is_floating_point() else 'integer'} {tuple(t.shape)}"

    missing = [f"{n} missing, expected {kind(t)}" for n, t in expected.items() if n not in found]
    extra = [f"{n} unexpected, {kind(t)}" for n, t in found.items() if n not in expected]
    both = [(n, kind(t), kind(expected[n])) for n, t in found.items() if n in expected]
    wrong = [f"{n} is {a}, expected {b}" for n, a, b in both if a != b]
    if problems := missing[:2] + extra[:2] + wrong[:2]:
        count = len(missing + extra + wrong)
        raise ValueError(f"{source}: {count} tensors do not fit: {'; '.join(problems)}")
# end shared
