"""SegFormer: an image in, the class of every pixel out. A pyramid transformer and an all-MLP head.

Paper: Xie et al., NeurIPS 2021, arXiv 2105.15203. Code: github.com/NVlabs/SegFormer at 65fa8cf,
mmseg/models/{backbones/mix_transformer,decode_heads/segformer_head}.py; its port to transformers
5.23, modeling_segformer.py. The names are those of the hub's files. Weights, for research and
evaluation only (NVIDIA Source Code License): nvidia/segformer-b0-finetuned-ade-512-512 ... b4,
b5-finetuned-ade-640-640, -cityscapes-*; nvidia/mit-b0 ... b5, the encoder alone; the authors' .pth.

    image (B,3,512,512), b0
      encoder, four stages: a strided convolution, then blocks of attention from all pixels to a
      coarser grid, and of an MLP with a 3x3 convolution, the only source of position
    maps (B,32,128,128), (B,64,64,64), (B,160,32,32), (B,256,16,16)
      decode_head: each map into 256 channels, up to the first one's size, their sum
    (B,256,128,128), then batch norm, ReLU, dropout, 1x1 convolution
    logits (B,150,128,128)

Any sides from 29 pixels will do. quirk: every LayerNorm has eps 1e-5, as in transformers, which
does not read its setting of 1e-6; the authors have 1e-6 but behind the convolutions with stride.

    model = SegFormer.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512")
    probabilities, mask = model.segment("photo.jpg")  # or a PIL image
    # numpy, at the photo's own size: float32 (K,H,W); uint8 (H,W), the class of each pixel
"""

import json
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
    widths: tuple[int, ...] = (64, 128, 320, 512)  # channels of the four stages
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)  # side of the square that makes one key and value
    decoder_dim: int = 768
    drop_path: float = 0.1  # of the last block, while training; rises linearly from 0
    dropout: float = 0.1  # before the classifier, while training
    num_classes: int = 150
    image_size: int = 512  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # RGB in 0..1, ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: str = "bilinear"  # PIL's name, or "cv2 nearest"
    threshold: float = 0.5  # of a model with one class


VARIANTS = {  # parameters with 150 classes; mini is for tests and demos
    "b0": Config((32, 64, 160, 256), (2, 2, 2, 2), decoder_dim=256),  # 3,752,694
    "b1": Config(depths=(2, 2, 2, 2), decoder_dim=256),  # 13,715,798
    "b2": Config(),  # 27,461,974
    "b3": Config(depths=(3, 4, 18, 3)),  # 47,337,814
    "b4": Config(depths=(3, 8, 27, 3)),  # 64,108,374
    "b5": Config(depths=(3, 6, 40, 3), image_size=640),  # 84,708,694
    "mini": Config((16, 32, 80, 128), (1, 2, 1, 1), decoder_dim=64, image_size=128),  # 557,894
}


class PatchEmbedding(nn.Module):
    """A convolution with stride whose patches overlap."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C',stride*H,stride*W) -> tokens (B,H,W,C); sides are rounded up."""
        return self.layer_norm(self.proj(x).permute(0, 2, 3, 1))  # (B,H,W,C)


class Attention(nn.Module):
    """Every token looks at a grid that is coarser by `reduction`, made by a convolution."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.output = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        y = x
        if self.reduction > 1:  # h = H // reduction: what does not fill a square is not seen
            y = self.layer_norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B,h,w,C)
        q, k, v = (t.flatten(1, 2) for t in (self.query(x), self.key(y), self.value(y)))  # (B,N,C)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        return self.output(y.transpose(1, 2).reshape(x.shape))  # (B,H,W,C)


class MLP(nn.Module):
    """With a 3x3 convolution of each channel inside, by whose padding tokens know their place."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        y = self.dwconv(self.dense1(x).permute(0, 3, 1, 2))  # (B,4C,H,W)
        return self.dense2(F.gelu(y).permute(0, 2, 3, 1))  # (B,H,W,C)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, reduction)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.maybe(self.attention(self.layer_norm_1(x)))  # (B,H,W,C)
        return x + self.maybe(self.mlp(self.layer_norm_2(x)))

    def maybe(self, y: Tensor) -> Tensor:
        """Stochastic depth, arXiv 1603.09382: in training a sample goes without y now and then."""
        if not self.training or self.drop_path == 0:
            return y
        keep = 1 - self.drop_path
        kept = (keep + torch.rand(len(y), 1, 1, 1, dtype=y.dtype, device=y.device)).floor()
        return y * (kept / keep)  # (B,H,W,C)


class Encoder(nn.Module):
    """MiT, the mix transformer. Within, channels come last: no layer then copies its input."""

    def __init__(self, config: Config):
        super().__init__()
        c, widths, total = config, config.widths, sum(config.depths)
        embeddings = zip((3, *widths), widths, (7, 3, 3, 3), (4, 2, 2, 2), strict=False)
        self.patch_embeddings = nn.ModuleList(PatchEmbedding(*sizes) for sizes in embeddings)
        rates = (c.drop_path * i / (total - 1) for i in range(total))
        stages = zip(widths, c.heads, c.reductions, c.depths, strict=True)
        self.block = nn.ModuleList(
            nn.Sequential(*(Block(dim, heads, reduction, next(rates)) for _ in range(depth)))
            for dim, heads, reduction, depth in stages
        )
        self.layer_norm = nn.ModuleList(nn.LayerNorm(dim) for dim in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """image (B,3,H,W) -> maps (B,C,H/4,W/4), then of H/8, H/16, H/32; sides rounded up."""
        maps, parts = [], (self.patch_embeddings, self.block, self.layer_norm)
        for embed, blocks, norm in zip(*parts, strict=True):
            x = norm(blocks(embed(x))).permute(0, 3, 1, 2)  # (B,C,H,W)
            maps.append(x)
        return maps


class DecodeHead(nn.Module):
    """The sum of all maps in D channels at the finest size, and a classifier.

    Officially each goes into D channels (`linear_c`) and up, and a convolution (`linear_fuse`)
    makes D of all 4D, half of the model's work. But a mixture of channels commutes with upsampling,
    whose weights add up to 1: here a map meets both matrices in one, at its own size. Same numbers.
    """

    def __init__(self, widths: tuple[int, ...], dim: int, dropout: float, num_classes: int):
        super().__init__()
        self.linear_c = nn.ModuleList(nn.Linear(c, dim) for c in widths)
        self.linear_fuse = nn.Conv2d(len(widths) * dim, dim, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(dropout)  # of whole channels; transformers drops single numbers
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps (B,C,H,W), finest first -> logits (B,K,H,W) of the first one's size."""
        fuse, norm = self.linear_fuse.weight.flatten(1), self.batch_norm  # (D,4D)
        bias = fuse @ torch.cat([linear.bias for linear in self.linear_c[::-1]])  # (D,)
        if not norm.training:  # it is a product and a sum then
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (D,)
            fuse, bias = scale[:, None] * fuse, scale * (bias - norm.running_mean) + norm.bias
        # quirk: the coarsest map comes first in the columns of `linear_fuse`
        parts = fuse.chunk(len(maps), 1)[::-1]  # (D,D) each
        weights = [p @ linear.weight for p, linear in zip(parts, self.linear_c, strict=True)]
        y, *coarse = (x.permute(0, 2, 3, 1) for x in maps)  # (B,h,w,C) each
        y = F.linear(y, weights[0], bias)  # (B,H,W,D)
        for x, weight in zip(coarse, weights[1:], strict=True):
            x = F.linear(x, weight).permute(0, 3, 1, 2)  # (B,D,h,w)
            x = F.interpolate(x, y.shape[1:3], mode="bilinear", align_corners=False)  # (B,D,H,W)
            y += x.permute(0, 2, 3, 1)  # (B,H,W,D)
        if norm.training:
            y = norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B,H,W,D)
        y = self.dropout(F.relu(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B,H,W,D)
        y = F.linear(y, self.classifier.weight.flatten(1), self.classifier.bias)  # (B,H,W,K)
        return y.permute(0, 3, 1, 2).contiguous()  # (B,K,H,W)


class SegFormer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (K,H,W)
        self.encoder = Encoder(c)
        self.decode_head = DecodeHead(c.widths, c.decoder_dim, c.dropout, c.num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) normalised, sides from 29 -> logits (B,K,H/4,W/4), rounded up.

        The first stage's keys come from squares of 8x8 tokens, and a token is 4 pixels: 29 make 8.
        """
        if min(image.shape[2:]) < 29:
            raise ValueError(f"image sides must be at least 29, not {tuple(image.shape[2:])}")
        return self.decode_head(self.encoder(image))

    def segment(self, image) -> tuple:
        """Segment an image or its file -> probabilities (K,H,W), mask (H,W); see `segment`."""
        return segment(self, image)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "SegFormer":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        num_classes: None for as many as the file has; another number makes a new classifier. To a
        file of the encoder alone it gives a new head. What is new is printed. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = to_official(weights)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "SegFormer", source, Config))
        else:
            told = {ours: settings[hub] for hub, ours in SETTINGS.items() if hub in settings}
            told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
            config = replace(closest_variant(weights), **told)
            if "image_size" not in overrides:
                print(f"{source}: image_size is not told, took {config.image_size}")
        weights, num_classes, fresh = new_classes(weights, num_classes, source)
        num_classes = num_classes or config.num_classes
        model = cls(replace(config, num_classes=num_classes, **overrides))
        expected = to_official(model.state_dict())
        weights, new = add_new(weights, expected, fresh)
        check_complete(weights, expected, source)  # in the hub's names
        model.load_state_dict(convert(weights))
        if new:
            print(f"{source}: new and untrained: {', '.join(new)}")
        return model.eval()


def init_weights(module: nn.Module) -> None:
    """Of transformers 5.23, where nothing is loaded."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        for p in module.parameters(recurse=False):
            nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.0)  # biases are 0


FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
SETTINGS = {  # of transformers' config.json
    "num_attention_heads": "heads", "drop_path_rate": "drop_path",
    "classifier_dropout_prob": "dropout",
}  # fmt: skip
IGNORED = {
    r"(classifier|head)\.(weight|bias)": "of ImageNet's 1000 classes, in files of the encoder",
    r"decode_head\.conv_seg\.(weight|bias)": "of the authors' base class, which they do not use",
}
FRESH = {  # what may be new
    "classifier": r"decode_head\.classifier\..*",  # where another number of classes is asked for
    "head": r"decode_head\..*",  # where a file holds the encoder alone
}
# The authors' names, who count stages from 1, transformers 5's in memory and ours -> the hub's.
RENAMES = (
    (r"^((?:backbone\.)?(?:patch_embed|block|norm)|decode_head\.linear_c)([1-4])\.",
     lambda match: f"{match[1]}.{int(match[2]) - 1}."),
    (r"^(?:backbone\.)?(patch_embed|block|norm)\.(?=\d)", r"encoder.\1."),
    (r"^(?:segformer\.)?stages\.(\d)\.(patch_embeddings|layer_norm)\.", r"encoder.\2.\1."),
    (r"^(?:segformer\.)?stages\.(\d)\.blocks\.", r"encoder.block.\1."),
    (r"^encoder\.", "segformer.encoder."), (r"\.patch_embed\.", ".patch_embeddings."),
    (r"(encoder|embeddings\.\d|attn)\.norm\.", r"\1.layer_norm."), (r"\.attn\.", ".attention."),
    (r"\.(?:norm1|layernorm_before)\.", ".layer_norm_1."),
    (r"\.(?:norm2|layernorm_after)\.", ".layer_norm_2."),
    (r"attention\.(?:q|q_proj|query)\.", "attention.self.query."),
    (r"attention\.(?:k_proj|key)\.", "attention.self.key."),
    (r"attention\.(?:v_proj|value)\.", "attention.self.value."),
    (r"attention\.(?:sequence_reduction\.sequence_reduction|sr)\.", "attention.self.sr."),
    (r"attention\.(?:sequence_reduction\.)?layer_norm\.", "attention.self.layer_norm."),
    (r"attention\.(?:o_proj|proj|output(?!\.dense))\.", "attention.output.dense."),
    (r"mlp\.fc([12])\.", r"mlp.dense\1."), (r"mlp\.dwconv\.(?!dwconv)", "mlp.dwconv.dwconv."),
    (r"\.linear_(?:c|projections)\.(\d)\.(?:proj\.)?", r".linear_c.\1.proj."),
    (r"\.linear_fuse\.conv\.", ".linear_fuse."), (r"\.linear_fuse\.bn\.", ".batch_norm."),
    (r"\.linear_pred\.", ".classifier."),
)  # fmt: skip
OURS = (  # the hub's names -> ours
    (r"^segformer\.", ""), (r"attention\.self", "attention"), (r"\.output\.dense", ".output"),
    (r"dwconv\.dwconv", "dwconv"), (r"(linear_c\.\d)\.proj", r"\1"),
)  # fmt: skip


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> the hub's, for `from_pretrained` of transformers' class."""
    weights = {}
    for name, t in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        parts = {name: t}
        if "attention.kv." in name:  # the authors' key and value are one matrix
            names = (name.replace(".kv.", f".self.{part}.") for part in ("key", "value"))
            parts = {n: x.clone() for n, x in zip(names, t.chunk(2), strict=False)}
        if twice := parts.keys() & weights:
            raise ValueError(f"{min(twice)} is there twice, under two names")
        weights |= parts
    return weights


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> ours."""
    weights = {}
    for name, t in to_official(state_dict).items():
        for hub, ours in OURS:
            name = re.sub(hub, ours, name)
        weights[name] = t
    return weights


def closest_variant(weights: dict[str, Tensor]) -> Config:
    """The one whose first width and numbers of blocks differ least."""
    blocks = [name for name in weights if name.endswith("layer_norm_1.weight")]
    depths = [sum(f".block.{s}." in name for name in blocks) for s in range(4)]
    sizes = len(weights.get("segformer.encoder.layer_norm.0.weight", ())), *depths
    known = {(c.widths[0], *c.depths): c for c in VARIANTS.values()}
    return known[min(known, key=lambda x: sum(abs(a - b) for a, b in zip(x, sizes, strict=True)))]


# shared: new_classes
def new_classes(weights: dict[str, Tensor], num_classes: int | None, source) -> tuple:
    """Drop a file's classifier if it has another number of classes than `num_classes`.

    num_classes: None for as many as the file has.
    Return the remaining tensors, the number of classes (None if nothing tells it) and a regular
    expression for the tensors that may be newly initialised. Raise ValueError, one line, if the
    file holds an encoder without a head and num_classes is None.
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


# shared: classes
def preprocess(image, config: Config) -> Tensor:
    """Resize a PIL image to a square and normalise it: (3,S,S) float32.

    Raise errors as `to_rgb` does.
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


# shared: segment_classes
def segment(model: nn.Module, image) -> tuple:
    """Return the probabilities and the class map of one image, as numpy arrays of its size.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    Probabilities are float32 (K,H,W). The mask (H,W) holds class indices, uint8 (uint16 with more
    than 256 classes); with one class, 1 where its probability is above `config.threshold`.
    Raise errors as `open_upright` and `preprocess` do.
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
