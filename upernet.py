"""UPerNet with a ConvNeXt backbone: an image in, the class of every pixel out.

Papers: Xiao et al., ECCV 2018, arXiv 1807.10221 (UPerNet's head); Liu et al., CVPR 2022,
  arXiv 2201.03545 (ConvNeXt).
Code: github.com/open-mmlab/mmsegmentation at 46fd215 (Apache 2.0), configs/convnext and
  mmseg/models/decode_heads/uper_head.py. Tensor names are those of the port in transformers 5.23,
  modeling_upernet.py and modeling_convnext.py.
Weights on the hub: openmmlab/upernet-convnext-{tiny,small,base,large,xlarge} (ADE20K, MIT), and
  facebook/convnext-*, the encoder alone. mmsegmentation's .pth files load, too.

    image (B,3,512,512), shapes of convnext-small
      backbone: 4x4 convolution with stride 4; four stages of blocks (depthwise 7x7 convolution,
      MLP), the later three of which start with a 2x2 convolution with stride 2
    maps (B,96,128,128), (B,192,64,64), (B,384,32,32), (B,768,16,16)
      pyramid pooling: average the last map in 1x1, 2x2, 3x3 and 6x6 cells; upsample, mix
    (B,512,16,16)
      feature pyramid: upsample step by step, add the next finer map each time; then mix all
    (B,512,128,128)
      1x1 convolution, upsample
    logits (B,150,512,512)

B batch, C or O channels, H W sides (h w of a smaller map), K classes. "quirk" marks surprising
behaviour that released weights need. Code between "# shared: NAME" and "# end shared" is identical
in other model files. Left out: the auxiliary head, which only serves a training loss; stochastic
depth, which the configs of transformers set to 0. Image sides: any from 32 pixels.

    model = UPerNet.from_pretrained("openmmlab/upernet-convnext-small")
    probabilities, mask = model.segment("photo.jpg")  # numpy (K,H,W) and (H,W), at its own size
"""

import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (96, 192, 384, 768)  # channels of the four stages
    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks of the four stages
    channels: int = 512  # channels of the head
    num_classes: int = 150
    image_size: int = 512  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in 0..1, from ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: str = "bilinear"  # a filter of PIL.Image.Resampling, or "cv2 nearest" (OpenCV's)
    threshold: float = 0.5  # for a single class: a pixel above this probability is foreground


VARIANTS = {  # right: number of parameters with 150 classes; mini is for tests and demos
    "convnext-tiny": Config(depths=(3, 3, 9, 3)),  # 59,318,838
    "convnext-small": Config(),  # 80,953,398
    "convnext-base": Config(widths=(128, 256, 512, 1024)),  # 120,884,246
    "convnext-large": Config(widths=(192, 384, 768, 1536)),  # 233,186,262
    "convnext-xlarge": Config(widths=(256, 512, 1024, 2048)),  # 388,742,038
    "mini": Config(  # 250,678
        widths=(16, 32, 48, 64), depths=(1, 1, 2, 1), channels=32, image_size=128
    ),
}

# --- backbone -------------------------------------------------------------------------------------


# quirk: eps is 1e-6 in all layer norms. transformers' config.json has a layer_norm_eps of 1e-12,
# which is only used before ImageNet's classifier, a layer that this model does not have.
# shared: channel_norm
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        x = x.permute(0, 2, 3, 1)  # (B,H,W,C)
        return super().forward(x).permute(0, 3, 1, 2)


# end shared


# modeling_convnext.py, class ConvNextLayer
class Block(nn.Module):
    """Residual block: depthwise 7x7 convolution, then an MLP, scaled per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.layer_scale_parameter = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B,H,W,C)
        y = self.layernorm(y)
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        y = y.permute(0, 3, 1, 2)  # (B,C,H,W)
        return torch.addcmul(x, y, self.layer_scale_parameter[:, None, None])  # x + y * scale


# modeling_convnext.py, class ConvNextStage
class Stage(nn.Module):
    """`depth` blocks, after a convolution that halves the sides (not in the first stage)."""

    def __init__(self, in_channels: int, width: int, depth: int, is_first: bool):
        super().__init__()
        # Created in the first stage, too, where they are not used: this draws random numbers, so
        # that a given seed keeps giving the same initial weights.
        downsampling = (LayerNorm2d(in_channels), nn.Conv2d(in_channels, width, 2, stride=2))
        if is_first:
            downsampling = ()
        self.downsampling_layer = nn.Sequential(*downsampling)
        self.layers = nn.Sequential(*[Block(width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_channels,H,W) -> (B,width,H/2,W/2), in the first stage (B,width,H,W)."""
        x = self.downsampling_layer(x)  # (B,width,H/2,W/2), or x if it is empty
        return self.layers(x)


# modeling_convnext.py, class ConvNextBackbone
class ConvNeXt(nn.Module):
    """The backbone. widths, depths: number of channels and of blocks in each of the four stages."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        patches = nn.Conv2d(3, widths[0], 4, stride=4)
        layers = OrderedDict(patch_embeddings=patches, layernorm=LayerNorm2d(widths[0]))
        self.embeddings = nn.Sequential(layers)

        stages = nn.ModuleList()
        in_channels = widths[0]
        for width, depth in zip(widths, depths, strict=True):
            stages.append(Stage(in_channels, width, depth, is_first=len(stages) == 0))
            in_channels = width
        self.encoder = nn.ModuleDict({"stages": stages})  # nested, to keep official tensor names

        self.hidden_states_norms = nn.ModuleDict()
        for number, width in enumerate(widths, 1):
            self.hidden_states_norms[f"stage{number}"] = LayerNorm2d(width)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B,3,H,W) -> four maps (B,C,H/4,W/4) to (B,C,H/32,W/32), sides rounded down."""
        x = self.embeddings(image)  # (B,C,H/4,W/4)
        norms = self.hidden_states_norms.values()
        maps = []
        for stage, norm in zip(self.encoder["stages"], norms, strict=True):
            x = stage(x)
            maps.append(norm(x))  # (B,C,H,W); the next stage gets x without this norm
        return maps


# --- head: modeling_upernet.py, class UperNetHead -------------------------------------------------


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

# --- the model: modeling_upernet.py, class UperNetForSemanticSegmentation -------------------------


class UPerNet(nn.Module):
    """ConvNeXt with UPerNet's head; logits have the image's size."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = ConvNeXt(config.widths, config.depths)
        self.decode_head = UPerHead(config.widths, config.channels, config.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) from `preprocess` -> logits (B,K,H,W).

        Raise ValueError if a side is shorter than 32 pixels.
        """
        size = image.shape[2:]
        if min(size) < 32:
            raise ValueError(f"image sides must be at least 32, not {tuple(size)}")
        maps = self.backbone(image)
        logits = self.decode_head(maps)  # (B,K,H/4,W/4)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)  # (B,K,H,W)

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
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "UPerNet":
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
        weights = convert(weights)
        if "format" in settings:  # the output folder of a training run
            config = Config(**run_config(settings, "UPerNet", source, Config))
        else:
            config = closest_variant(weights)
            if "image_size" not in overrides:
                size = config.image_size
                print(f"{source}: image_size is not stored in the file, using {size}")

        weights, num_classes, may_be_new = new_classes(weights, num_classes, source)
        # None if the classifier is missing, which check_complete reports.
        num_classes = num_classes or config.num_classes
        model = cls(replace(config, num_classes=num_classes, **overrides))

        weights, new_names = add_new(weights, model.state_dict(), may_be_new)
        check_complete(weights, model.state_dict(), source)
        model.load_state_dict(weights)
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
    r"auxiliary_head\..*",  # serves a second loss in training, adds nothing to the output
    r"(convnext\.|backbone\.)?layernorm\.(weight|bias)",  # before ImageNet's classifier
    r"classifier\.(weight|bias)",  # ImageNet's classifier, in files of the encoder
)
FRESH = {  # patterns of tensors that may be newly initialised
    "classifier": r"decode_head\.classifier\..*",  # if the number of classes differs
    "head": r"(decode_head|backbone\.hidden_states_norms)\..*",  # if the file is the encoder alone
}

# Names in other files -> ours, which are those of UPerNet's files on the hub. All patterns are
# applied to a name, one after another:
# backbone.stages.0.1.gamma -> backbone.encoder.stages.0.layers.1.layer_scale_parameter

ENCODER_ALONE = {  # transformers' ConvNextForImageClassification, ConvNextModel, ConvNextBackbone
    r"^convnext\.": "backbone.",
    r"^(embeddings|encoder|hidden_states_norms)\.": r"backbone.\1.",
}
MMSEGMENTATION = {
    r"^backbone\.downsample_layers\.0\.0\.": "backbone.embeddings.patch_embeddings.",
    r"^backbone\.downsample_layers\.0\.1\.": "backbone.embeddings.layernorm.",
    r"^backbone\.downsample_layers\.(\d)\.": r"backbone.encoder.stages.\1.downsampling_layer.",
    r"^backbone\.stages\.(\d)\.": r"backbone.encoder.stages.\1.layers.",
    r"^backbone\.norm0\.": "backbone.hidden_states_norms.stage1.",
    r"^backbone\.norm1\.": "backbone.hidden_states_norms.stage2.",
    r"^backbone\.norm2\.": "backbone.hidden_states_norms.stage3.",
    r"^backbone\.norm3\.": "backbone.hidden_states_norms.stage4.",
    r"\.depthwise_conv\.": ".dwconv.",
    r"(layers\.\d+)\.norm\.": r"\1.layernorm.",
    r"\.pointwise_conv([12])\.": r".pwconv\1.",
    r"\.gamma$": ".layer_scale_parameter",
    r"\.bn\.": ".batch_norm.",
    r"\.conv_seg\.": ".classifier.",
}


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of any source under our names, without those of IGNORED.

    Unknown tensors keep their names. Raise ValueError if two tensors get the same name.
    """
    weights = {}
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, ours in (ENCODER_ALONE | MMSEGMENTATION).items():
            name = re.sub(pattern, ours, name)
        if name in weights:
            raise ValueError(f"{name} occurs twice, under two names")
        weights[name] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the state dict: our names are those of the hub's files.

    It fits transformers' class if that is created with `use_auxiliary_head=False`.
    """
    return dict(state_dict)


def closest_variant(weights: dict[str, Tensor]) -> Config:
    """Return the variant whose blocks differ least from a file's. weights: under our names.

    Blocks are compared by stage, number and width. Blocks that only one of the two has are counted.
    """
    pattern = r"backbone\.encoder\.stages\.(\d)\.layers\.(\d+)\.pwconv2\.bias"
    blocks = set()  # (stage, number, width)
    for name, tensor in weights.items():
        match = re.fullmatch(pattern, name)
        if match:
            blocks.add((int(match[1]), int(match[2]), tensor.numel()))

    closest = None
    fewest = math.inf
    for config in VARIANTS.values():
        expected = set()
        for stage, width in enumerate(config.widths):
            expected |= {(stage, number, width) for number in range(config.depths[stage])}
        difference = len(blocks ^ expected)
        if difference < fewest:
            closest = config
            fewest = difference
    return closest


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
