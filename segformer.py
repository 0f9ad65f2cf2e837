"""SegFormer: an image in, the class of every pixel out. Transformer encoder, MLP decoder.

Paper: Xie et al., NeurIPS 2021, arXiv 2105.15203.
Code: github.com/NVlabs/SegFormer at 65fa8cf, mmseg/models/backbones/mix_transformer.py and
  mmseg/models/decode_heads/segformer_head.py; transformers 5.23 has a port, modeling_segformer.py.
Weights (NVIDIA Source Code License, research and evaluation only), on the hub:
  nvidia/segformer-b0-finetuned-ade-512-512 to b4, b5-finetuned-ade-640-640, -cityscapes-*;
  nvidia/mit-b0 to b5 are the encoder alone. NVlabs' .pth files load, too.

    image (B,3,512,512), shapes of b0
      encoder: four stages, each an overlapping strided convolution, then transformer blocks
    maps (B,32,128,128), (B,64,64,64), (B,160,32,32), (B,256,16,16)
      decode_head: project each map to 256 channels, upsample all to 128x128, mix
    features (B,256,128,128)
      batch norm, ReLU, dropout, 1x1 convolution
    logits (B,150,128,128)

There is no position embedding, so images may have any sides from 29 pixels. B batch, C channels,
D decoder width, H W sides of a map, N = H*W tokens, h heads, d head width, K classes.
"quirk" marks behaviour that looks wrong but that released weights or equal outputs need. Code
between "# shared: NAME" and "# end shared" is identical in other model files.
quirk: all LayerNorms have eps 1e-5, as in transformers, which never reads its setting of 1e-6.
NVlabs uses 1e-6, except after strided convolutions.

    model = SegFormer.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512")
    probabilities, mask = model.segment("photo.jpg")  # or a PIL image
    # numpy arrays of the photo's size: float32 (K,H,W); uint8 (H,W), the class of each pixel
"""

import hashlib
import json
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
    widths: tuple[int, ...] = (64, 128, 320, 512)  # channels of the four stages
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per stage
    heads: tuple[int, ...] = (1, 2, 5, 8)  # attention heads per stage
    reductions: tuple[int, ...] = (8, 4, 2, 1)  # r: attention reduces keys and values r x r
    decoder_dim: int = 768  # channels of the decoder (D)
    drop_path: float = 0.1  # stochastic depth rate of the last block; rises linearly from 0
    dropout: float = 0.1  # dropout rate before the classifier
    num_classes: int = 150
    image_size: int = 512  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in 0..1, from ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: str = "bilinear"  # a filter of PIL.Image.Resampling, or "cv2 nearest" (OpenCV's)
    threshold: float = 0.5  # for a single class: a pixel above this probability is foreground


VARIANTS = {  # right: number of parameters with 150 classes; mini is for tests and demos
    "b0": Config(widths=(32, 64, 160, 256), depths=(2, 2, 2, 2), decoder_dim=256),  # 3,752,694
    "b1": Config(depths=(2, 2, 2, 2), decoder_dim=256),  # 13,715,798
    "b2": Config(),  # 27,461,974
    "b3": Config(depths=(3, 4, 18, 3)),  # 47,337,814
    "b4": Config(depths=(3, 8, 27, 3)),  # 64,108,374
    "b5": Config(depths=(3, 6, 40, 3), image_size=640),  # 84,708,694
    "mini": Config(  # 557,894
        widths=(16, 32, 80, 128), depths=(1, 2, 1, 1), decoder_dim=64, image_size=128
    ),
}


# mix_transformer.py, class OverlapPatchEmbed
class PatchEmbedding(nn.Module):
    """Strided convolution with overlapping patches, then LayerNorm."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> tokens (B,H/stride,W/stride,dim), sides rounded up."""
        x = self.proj(x).permute(0, 2, 3, 1)  # (B,H/stride,W/stride,dim)
        return self.layer_norm(x)


# mix_transformer.py, class Attention
class Attention(nn.Module):
    """Multi-head self-attention with spatial reduction.

    Queries come from all tokens. Keys and values come from a coarser grid: a convolution with
    kernel and stride `reduction` (r) merges r x r tokens into one.
    """

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        reduced = x
        if self.reduction > 1:
            # H/r and W/r are rounded down, so up to r - 1 last rows and columns are left out.
            reduced = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B,H/r,W/r,C)
            reduced = self.layer_norm(reduced)

        q = self.split_heads(self.query(x))  # (B,h,N,d)
        k = self.split_heads(self.key(reduced))  # (B,h,N/(r*r),d)
        v = self.split_heads(self.value(reduced))  # (B,h,N/(r*r),d)
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        y = y.transpose(1, 2).reshape(x.shape)  # (B,H,W,C)
        return self.output(y)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split the channels into heads: (B,H,W,C) -> (B,h,N,d) with N = H*W."""
        x = x.flatten(1, 2)  # (B,N,C)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B,h,N,d)


# mix_transformer.py, classes Mlp and DWConv
class MLP(nn.Module):
    """MLP with a depthwise 3x3 convolution; its zero padding provides positional information."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense1 = nn.Linear(dim, 4 * dim)
        self.dense2 = nn.Linear(4 * dim, dim)
        self.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        x = self.dense1(x).permute(0, 3, 1, 2)  # (B,4C,H,W)
        x = F.gelu(self.dwconv(x)).permute(0, 2, 3, 1)  # (B,H,W,4C)
        return self.dense2(x)


# mix_transformer.py, class Block
class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm_1 = nn.LayerNorm(dim)
        self.layer_norm_2 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, reduction)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        x = x + self.stochastic_depth(self.attention(self.layer_norm_1(x)))
        return x + self.stochastic_depth(self.mlp(self.layer_norm_2(x)))

    def stochastic_depth(self, residual: Tensor) -> Tensor:
        """Drop the residual (B,H,W,C) of random samples while training (arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0:
            return residual

        keep_probability = 1 - self.drop_path
        shape = (len(residual), 1, 1, 1)
        noise = torch.rand(shape, dtype=residual.dtype, device=residual.device)
        keep = (keep_probability + noise).floor()  # 1 or 0, computed as in timm and transformers
        return residual * (keep / keep_probability)  # (B,H,W,C)


# mix_transformer.py, class MixVisionTransformer
class Encoder(nn.Module):
    """Mix Transformer (MiT): four stages of blocks, each at half the resolution of the last.

    Tokens stay in the layout (B,H,W,C), so that no layer copies its input.
    """

    def __init__(self, config: Config):
        super().__init__()
        widths = config.widths
        kernels = (7, 3, 3, 3)
        strides = (4, 2, 2, 2)

        self.patch_embeddings = nn.ModuleList()
        for i in range(4):
            in_channels = 3 if i == 0 else widths[i - 1]
            embedding = PatchEmbedding(in_channels, widths[i], kernels[i], strides[i])
            self.patch_embeddings.append(embedding)

        # The rate of stochastic depth rises linearly from the first block of the first stage (0)
        # to the last block of the last stage (drop_path).
        last = sum(config.depths) - 1
        index = 0
        self.block = nn.ModuleList()
        for i in range(4):
            blocks = nn.Sequential()
            for _ in range(config.depths[i]):
                rate = config.drop_path * index / last
                blocks.append(Block(widths[i], config.heads[i], config.reductions[i], rate))
                index += 1
            self.block.append(blocks)

        self.layer_norm = nn.ModuleList(nn.LayerNorm(dim) for dim in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """image (B,3,H,W) -> four maps (B,C,H/4,W/4) to (B,C,H/32,W/32), sides rounded up."""
        maps = []
        for i in range(4):
            x = self.patch_embeddings[i](x)  # (B,H,W,C)
            x = self.block[i](x)
            x = self.layer_norm[i](x).permute(0, 3, 1, 2)  # (B,C,H,W)
            maps.append(x)  # the next stage gets the normalised map, too
        return maps


# segformer_head.py, class SegFormerHead
class DecodeHead(nn.Module):
    """All-MLP decoder: project the maps to D channels, upsample them, mix them, classify.

    `forward` equals these plain lines, without 35 to 62 % of the whole model's multiplications:

        projected = []
        for linear, x in zip(self.linear_c, maps):
            x = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B,D,Hi,Wi)
            x = F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
            projected.append(x)  # (B,D,H,W)
        y = self.linear_fuse(torch.cat(projected[::-1], 1))  # (B,4D,H,W) -> (B,D,H,W)
        y = F.relu(self.batch_norm(y))
        return self.classifier(self.dropout(y))  # (B,K,H,W)

    Why: `linear_fuse` is a (D,4D) matrix. Its product with the concatenated maps is the sum of four
    products, one (D,D) part per map. Upsampling averages positions with weights that sum to 1, and
    does not mix channels, so it may come after that product. Each map is thus multiplied at its own
    low resolution, by one matrix that merges its `linear_c` and its part of `linear_fuse`.
    """

    def __init__(self, widths: tuple[int, ...], dim: int, dropout: float, num_classes: int):
        super().__init__()
        self.linear_c = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.linear_fuse = nn.Conv2d(len(widths) * dim, dim, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(dropout)  # drops channels, as NVlabs; transformers: elements
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (B,Ci,Hi,Wi), finest first -> logits (B,K,H,W) of the size of the first."""
        matrices, bias = self.merge_layers()

        # Sum the products of all maps at the size of the finest.
        y = F.linear(maps[0].permute(0, 2, 3, 1), matrices[0], bias)  # (B,H,W,D)
        for x, matrix in zip(maps[1:], matrices[1:], strict=True):
            x = F.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)  # (B,D,Hi,Wi)
            x = F.interpolate(x, y.shape[1:3], mode="bilinear", align_corners=False)  # (B,D,H,W)
            y += x.permute(0, 2, 3, 1)  # (B,H,W,D)

        if self.batch_norm.training:  # else merged into `matrices` and `bias`
            y = self.batch_norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B,H,W,D)
        y = F.relu(y).permute(0, 3, 1, 2)  # (B,D,H,W)
        y = self.dropout(y).permute(0, 2, 3, 1)  # (B,H,W,D)

        # The 1x1 classifier as a linear layer: channels are last in memory.
        y = F.linear(y, self.classifier.weight.flatten(1), self.classifier.bias)  # (B,H,W,K)
        return y.permute(0, 3, 1, 2).contiguous()  # (B,K,H,W)

    def merge_layers(self) -> tuple[list[Tensor], Tensor]:
        """Merge `linear_c`, `linear_fuse` and, in evaluation mode, `batch_norm`.

        Return one matrix (D,Ci) per map, finest first, and one bias (D,) for the sum of products.
        """
        fuse = self.linear_fuse.weight.flatten(1)  # (D,4D)
        # quirk: the columns of linear_fuse start with the coarsest map, the last of linear_c
        # (SegFormerHead.forward, torch.cat([_c4, _c3, _c2, _c1], dim=1)).
        biases = torch.cat([linear.bias for linear in self.linear_c[::-1]])  # (4D,)
        bias = fuse @ biases  # (D,)

        # In evaluation mode, batch norm is a fixed scale and shift of each channel.
        norm = self.batch_norm
        if not norm.training:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (D,)
            fuse = scale[:, None] * fuse  # (D,4D)
            bias = scale * (bias - norm.running_mean) + norm.bias  # (D,)

        matrices = []
        fuse_parts = fuse.chunk(len(self.linear_c), 1)[::-1]  # (D,D) each, finest map first
        for fuse_part, linear in zip(fuse_parts, self.linear_c, strict=True):
            matrices.append(fuse_part @ linear.weight)  # (D,Ci)
        return matrices, bias


# modeling_segformer.py, class SegformerPreTrainedModel
def init_weights(module: nn.Module) -> None:
    """Initialise a linear layer or convolution: weights with deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        for parameter in module.parameters(recurse=False):
            # Drawing biases with deviation 0 advances the random generator, unlike zeros_. A seed
            # thus keeps giving the same weights.
            nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.0)


# modeling_segformer.py, class SegformerForSemanticSegmentation
class SegFormer(nn.Module):
    """Encoder and decoder; logits have a quarter of the image's sides."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decode_head = DecodeHead(
            config.widths, config.decoder_dim, config.dropout, config.num_classes
        )
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) from `preprocess` -> logits (B,K,H/4,W/4), sides rounded up.

        Raise ValueError for sides below 29 pixels: the first stage has a token per 4 pixels, and
        its keys and values need 8x8 tokens.
        """
        if min(image.shape[2:]) < 29:
            raise ValueError(f"image sides must be at least 29, not {tuple(image.shape[2:])}")
        return self.decode_head(self.encoder(image))

    def preprocess(self, image) -> Tensor:
        """Resize and normalise a PIL image: (3,S,S); see the function `preprocess` below."""
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities (K,H,W) at `size` (H,W) from the logits (K,H/4,W/4) of one image.

        See the function `postprocess` below.
        """
        return postprocess(logits, size, self.config)

    def segment(self, image) -> tuple:
        """Return probabilities (K,H,W) and mask (H,W) of an image file or PIL image.

        See the function `segment` below.
        """
        return segment(self, image)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "SegFormer":
        """Load a model, in evaluation mode.

        source: a file, a folder, the output folder of a training run, or a hub id.
        num_classes: None keeps the file's classes. Another number gives a newly initialised
        classifier. A file of the encoder alone needs num_classes and gets a new head. The names of
        newly initialised parameters are printed.
        overrides: fields of Config.
        Raise ValueError, FileNotFoundError or OSError, one line, for a source that is missing or
        does not fit.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = to_official(weights)  # until they are checked, so that errors use the hub's names

        if "format" in settings:  # the output folder of a training run
            config = Config(**run_config(settings, "SegFormer", source, Config))
        else:
            config = replace(closest_variant(weights), **hub_config(settings))
            if "image_size" not in overrides:
                size = config.image_size
                print(f"{source}: image_size is not stored in the file, using {size}")

        weights, num_classes, may_be_new = new_classes(weights, num_classes, source)
        # None if the classifier is missing, which check_complete reports.
        num_classes = num_classes or config.num_classes
        model = cls(replace(config, num_classes=num_classes, **overrides))

        expected = to_official(model.state_dict())
        weights, new_names = add_new(weights, expected, may_be_new)
        check_complete(weights, expected, source)
        model.load_state_dict(convert(weights))
        if new_names:
            print(f"{source}: new and untrained: {', '.join(new_names)}")
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
SETTINGS = {  # name in transformers' config.json -> field of Config
    "num_attention_heads": "heads",
    "drop_path_rate": "drop_path",
    "classifier_dropout_prob": "dropout",
}
IGNORED = (  # patterns of tensors that this model does not have
    r"(classifier|head)\.(weight|bias)",  # ImageNet's 1000 classes, in files of the encoder
    r"decode_head\.conv_seg\.(weight|bias)",  # unused layer of the base class of NVlabs' head
)
FRESH = {  # patterns of tensors that may be newly initialised, under the hub's names
    "classifier": r"decode_head\.classifier\..*",  # if the number of classes differs
    "head": r"decode_head\..*",  # if the file holds the encoder alone
}

# Names of modules in each source -> ours. # stands for a number: the stage, then the block. The
# prefixes "segformer." and "backbone." are removed first; files of the encoder alone have none.
# segformer.encoder.block.0.1.attention.self.key.weight -> encoder.block.0.1.attention.key.weight

HUB = {  # files on the hub, as transformers 4 and 5 save them
    "encoder.patch_embeddings.#.proj": "encoder.patch_embeddings.#.proj",
    "encoder.patch_embeddings.#.layer_norm": "encoder.patch_embeddings.#.layer_norm",
    "encoder.block.#.#.layer_norm_1": "encoder.block.#.#.layer_norm_1",
    "encoder.block.#.#.layer_norm_2": "encoder.block.#.#.layer_norm_2",
    "encoder.block.#.#.attention.self.query": "encoder.block.#.#.attention.query",
    "encoder.block.#.#.attention.self.key": "encoder.block.#.#.attention.key",
    "encoder.block.#.#.attention.self.value": "encoder.block.#.#.attention.value",
    "encoder.block.#.#.attention.self.sr": "encoder.block.#.#.attention.sr",
    "encoder.block.#.#.attention.self.layer_norm": "encoder.block.#.#.attention.layer_norm",
    "encoder.block.#.#.attention.output.dense": "encoder.block.#.#.attention.output",
    "encoder.block.#.#.mlp.dense1": "encoder.block.#.#.mlp.dense1",
    "encoder.block.#.#.mlp.dense2": "encoder.block.#.#.mlp.dense2",
    "encoder.block.#.#.mlp.dwconv.dwconv": "encoder.block.#.#.mlp.dwconv",
    "encoder.layer_norm.#": "encoder.layer_norm.#",
    "decode_head.linear_c.#.proj": "decode_head.linear_c.#",
    "decode_head.linear_fuse": "decode_head.linear_fuse",
    "decode_head.batch_norm": "decode_head.batch_norm",
    "decode_head.classifier": "decode_head.classifier",
}
TRANSFORMERS_5 = {  # `state_dict()` of transformers 5; modules not listed have the hub's names
    "stages.#.patch_embeddings.proj": "encoder.patch_embeddings.#.proj",
    "stages.#.patch_embeddings.layer_norm": "encoder.patch_embeddings.#.layer_norm",
    "stages.#.blocks.#.layernorm_before": "encoder.block.#.#.layer_norm_1",
    "stages.#.blocks.#.layernorm_after": "encoder.block.#.#.layer_norm_2",
    "stages.#.blocks.#.attention.q_proj": "encoder.block.#.#.attention.query",
    "stages.#.blocks.#.attention.k_proj": "encoder.block.#.#.attention.key",
    "stages.#.blocks.#.attention.v_proj": "encoder.block.#.#.attention.value",
    "stages.#.blocks.#.attention.sequence_reduction.sequence_reduction":
        "encoder.block.#.#.attention.sr",
    "stages.#.blocks.#.attention.sequence_reduction.layer_norm":
        "encoder.block.#.#.attention.layer_norm",
    "stages.#.blocks.#.attention.o_proj": "encoder.block.#.#.attention.output",
    "stages.#.blocks.#.mlp.fc1": "encoder.block.#.#.mlp.dense1",
    "stages.#.blocks.#.mlp.fc2": "encoder.block.#.#.mlp.dense2",
    "stages.#.blocks.#.mlp.dwconv.dwconv": "encoder.block.#.#.mlp.dwconv",
    "stages.#.layer_norm": "encoder.layer_norm.#",
    "decode_head.linear_projections.#.proj": "decode_head.linear_c.#",
}  # fmt: skip
NVLABS = {  # NVlabs' .pth files, which count stages from 1; see `our_name`
    "patch_embed#.proj": "encoder.patch_embeddings.#.proj",
    "patch_embed#.norm": "encoder.patch_embeddings.#.layer_norm",
    "block#.#.norm1": "encoder.block.#.#.layer_norm_1",
    "block#.#.norm2": "encoder.block.#.#.layer_norm_2",
    "block#.#.attn.q": "encoder.block.#.#.attention.query",
    "block#.#.attn.kv": "encoder.block.#.#.attention.kv",  # split by `convert`
    "block#.#.attn.sr": "encoder.block.#.#.attention.sr",
    "block#.#.attn.norm": "encoder.block.#.#.attention.layer_norm",
    "block#.#.attn.proj": "encoder.block.#.#.attention.output",
    "block#.#.mlp.fc1": "encoder.block.#.#.mlp.dense1",
    "block#.#.mlp.fc2": "encoder.block.#.#.mlp.dense2",
    "block#.#.mlp.dwconv.dwconv": "encoder.block.#.#.mlp.dwconv",
    "norm#": "encoder.layer_norm.#",
    "decode_head.linear_c#.proj": "decode_head.linear_c.#",
    "decode_head.linear_fuse.conv": "decode_head.linear_fuse",
    "decode_head.linear_fuse.bn": "decode_head.batch_norm",
    "decode_head.linear_pred": "decode_head.classifier",
}
OURS_TO_HUB = {ours: official for official, ours in HUB.items()}


def rename(module: str, table: dict[str, str]) -> str | None:
    """Return the new name of a module, or None if it is not in the table."""
    for old, new in table.items():
        match = re.fullmatch(old.replace(".", r"\.").replace("#", r"(\d+)"), module)
        if match:
            for number in match.groups():
                new = new.replace("#", number, 1)
            return new
    return None


def our_name(name: str) -> str:
    """Return our name for a tensor of any source; an unknown name stays as it is."""
    module, _, parameter = name.rpartition(".")
    module = re.sub(r"^(segformer|backbone)\.", "", module)

    ours = rename(module, HUB) or rename(module, TRANSFORMERS_5)
    if ours is None:
        ours = rename(module, NVLABS)
        if ours is None:
            return name
        # The first number is the stage: subtract 1, since NVlabs counts from 1.
        ours = re.sub(r"\d", lambda stage: str(int(stage[0]) - 1), ours, count=1)
    return f"{ours}.{parameter}"


def hub_name(name: str) -> str:
    """Return the name in the hub's files for a tensor under our name."""
    module, _, parameter = name.rpartition(".")
    official = rename(module, OURS_TO_HUB)
    if official is None:
        return name
    prefix = "segformer." if official.startswith("encoder.") else ""
    return f"{prefix}{official}.{parameter}"


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of any source under our names, without those of IGNORED.

    Unknown tensors keep their names. Raise ValueError if two tensors get the same name.
    """
    weights = {}
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue

        ours = our_name(name)
        renamed = {ours: tensor}
        if ".attention.kv." in ours:
            # NVlabs stacks key and value in one layer. A malformed tensor may give one half only;
            # check_complete reports that.
            renamed = {}
            for layer, half in zip(("key", "value"), tensor.chunk(2), strict=False):
                renamed[ours.replace(".kv.", f".{layer}.")] = half.clone()

        for new_name in renamed:
            if new_name in weights:
                raise ValueError(f"{hub_name(new_name)} occurs twice, under two names")
        weights |= renamed
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of any source under the names of the hub's files.

    transformers loads them with `from_pretrained`.
    """
    return {hub_name(name): tensor for name, tensor in convert(state_dict).items()}


def hub_config(settings: dict) -> dict:
    """Return the fields of Config that transformers' config.json (`settings`) sets."""
    fields = {}
    for name, field in SETTINGS.items():
        if name in settings:
            value = settings[name]
            fields[field] = tuple(value) if isinstance(value, list) else value
    return fields


def closest_variant(weights: dict[str, Tensor]) -> Config:
    """Return the variant whose first width and depths differ least from a file's.

    weights: under the hub's names.
    """
    norm = weights.get("segformer.encoder.layer_norm.0.weight")
    sizes = [0 if norm is None else norm.numel()]  # width of the first stage, then four depths
    for i in range(4):
        pattern = rf"segformer\.encoder\.block\.{i}\.\d+\.layer_norm_1\.weight"
        blocks = [name for name in weights if re.fullmatch(pattern, name)]
        sizes.append(len(blocks))

    def distance(config: Config) -> int:
        expected = (config.widths[0], *config.depths)  # as `sizes`
        return sum(abs(size - other) for size, other in zip(sizes, expected, strict=True))

    return min(VARIANTS.values(), key=distance)


# shared: new_classes
def new_classes(weights: dict[str, Tensor], num_classes: int | None, source) -> tuple:
    """Drop a file's classifier if it has another number of classes than `num_classes`.

    num_classes: None for as many as the file has.
    Return the remaining tensors, the number of classes (None if nothing tells it) and a regular
    expression for the tensors that may be newly initialised. Raise ValueError if the file holds an
    encoder without a head and num_classes is None.
    """
    has_head = any(name.startswith("decode_head.") for name in weights)
    if not has_head and num_classes is None:
        raise ValueError(f"{source}: the encoder alone, without a head; give num_classes")
    if not has_head:
        return weights, num_classes, FRESH["head"]

    classifier = weights.get("decode_head.classifier.weight")
    if classifier is None:
        return weights, num_classes, ""
    if num_classes in (None, len(classifier)):
        return weights, len(classifier), ""

    fresh = FRESH["classifier"]
    kept = {name: t for name, t in weights.items() if not re.fullmatch(fresh, name)}
    return kept, num_classes, fresh


def add_new(weights: dict[str, Tensor], model: dict[str, Tensor], fresh: str) -> tuple:
    """Take the tensors that a file may lack from a newly initialised model.

    model: state dict of the new model. fresh: a regular expression for the names it may fill in.
    Return all tensors, and the names of those that are newly initialised.
    """
    filled = dict(weights)
    new = []
    for name, tensor in model.items():
        if name in weights:
            continue
        if name.endswith("num_batches_tracked"):  # absent from some files; no output depends on it
            filled[name] = tensor
        elif re.fullmatch(fresh, name):
            filled[name] = tensor
            new.append(name)
    return filled, new


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
