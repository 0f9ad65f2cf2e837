"""DPT, dense prediction transformer: an image in, the class of every pixel out.

Paper: Ranftl, Bochkovskiy & Koltun, ICCV 2021, arXiv 2103.13413. Official code (MIT):
github.com/isl-org/DPT at f43ef9e, dpt/{models,vit,blocks}.py; comments such as "# dpt/vit.py, class
ProjectReadout" name the counterpart. It is ported to transformers 5.23, modeling_dpt.py. Weights on
the hub, Apache 2.0: Intel/dpt-large-ade (150 classes of ADE20K) and Intel/dpt-large, which predicts
depth: a segmentation model takes all of it but the head. The original release (MIT) is
dpt_large-ade20k-b12dca68.pt and dpt_large-midas-2f21e586.pt.

    image (B,3,480,480)
    tokens = vit(image)              4 x (B,1+30*30,1024), after blocks 5, 11, 17 and 23 of 24
    maps = reassemble[i](tokens[i])  (B,256,120,120), (B,256,60,60), (B,256,30,30), (B,256,15,15)
    x = fusion[0](maps[3])           (B,256,30,30)     each fusion adds a map to x, refines the
    x = fusion[1](maps[2], x)        (B,256,60,60)     sum and upsamples it by 2
    x = fusion[2](maps[1], x)        (B,256,120,120)
    x = fusion[3](maps[0], x)        (B,256,240,240)
    logits = head(x)                 (B,K,480,480)     3x3 convolution, classifier, upsampling by 2

Shapes: B batch, C channels, N tokens, h heads, d head width, K classes. Code between "# shared:
NAME" and "# end shared" is the same in other model files. Image sides must be multiples of 16 and
need not be equal. Multiples of 32 give logits of the image's size; an odd number of patches is
rounded up to the next even one, as in transformers, so 240 px gives 256. Left out: the auxiliary
head, which only a training loss uses; DPT-Hybrid.

    model = DPT.from_pretrained("Intel/dpt-large-ade")
    probabilities, mask = model.segment("photo.jpg")  # or a PIL image
    # numpy, at the photo's own size: float32 (K,H,W); uint8 (H,W), the class of each pixel
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
    dim: int = 1024  # channels of the vision transformer
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096  # hidden channels of the transformer's MLPs
    grid: int = 24  # the position table has grid x grid patches (trained at 384 px)
    eps: float = 1e-12  # of the layer norms, as in transformers; the original has 1e-6
    taps: tuple[int, ...] = (5, 11, 17, 23)  # indices of the blocks that feed `reassemble`
    neck_dims: tuple[int, ...] = (256, 512, 1024, 1024)  # channels of the four maps, finest first
    fusion_dim: int = 256  # channels of the fusions and the head
    fusion_norm: bool = True  # batch norm in the fusions; without it their convolutions have biases
    num_classes: int = 150
    image_size: int = 480  # side of the square that `preprocess` makes, pixels
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of RGB in 0..1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"  # a filter of PIL, or "cv2 nearest"
    threshold: float = 0.5  # for a model with one class


VARIANTS = {
    "large-ade": Config(),  # 342,148,758 parameters
    "large": Config(fusion_norm=False, image_size=384),  # 342,145,174, its head never released
    "mini": Config(  # 1,515,540; for tests and demos
        dim=128, layers=8, heads=2, mlp_dim=256, grid=6, taps=(1, 3, 5, 7),
        neck_dims=(16, 24, 32, 48), fusion_dim=32, num_classes=4, image_size=96,
    ),
}  # fmt: skip


# timm, vision_transformer.py, class Block
class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,C) -> (B,N,C)."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B,N,3,h,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,h,N,d) each
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # (B,N,C)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


# dpt/vit.py, forward_flex and _resize_pos_embed
class VisionTransformer(nn.Module):
    """Vision transformer for images of any size: its position table is interpolated."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        self.grid = config.grid
        self.taps = config.taps
        # transformers starts from zeros, but the gradient of the layer norm of a zero vector is
        # 1 / sqrt(eps), a million here.
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + config.grid**2, dim))
        self.patch_embed = nn.Conv2d(3, dim, 16, stride=16)
        self.blocks = nn.ModuleList()
        for _ in range(config.layers):
            self.blocks.append(Block(dim, config.heads, config.mlp_dim, config.eps))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the outputs of the blocks in `taps`, (B,N,C) each, N = 1 + H/16 * W/16.

        image: (B,3,H,W). The class token comes first.
        """
        if any(side % 16 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 16, not {tuple(image.shape[2:])}")

        # Patches and the class token, each with its position.
        x = self.patch_embed(image)  # (B,C,H/16,W/16)
        class_position, table = self.pos_embed.split((1, self.grid**2), 1)  # (1,1,C), (1,grid**2,C)
        table = table.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (1,C,grid,grid)
        x = x + F.interpolate(table, x.shape[2:], mode="bilinear", align_corners=False)
        class_token = (class_position + self.cls_token).expand(x.shape[0], -1, -1)  # (B,1,C)
        x = torch.cat([class_token, x.flatten(2).transpose(1, 2)], 1)  # (B,N,C)

        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                outputs.append(x)
        return outputs


def project_readout(tokens: Tensor, linear: nn.Linear) -> Tensor:
    """Mix the class token into every patch token by a linear layer. (B,1+H*W,C) -> (B,H*W,C)

    Equals

        class_token = tokens[:, :1]
        patches = tokens[:, 1:]
        return linear(torch.cat([patches, class_token.expand_as(patches)], 2))

    but the class token's term, which is the same for all patches, is computed once per image.
    """
    class_token = tokens[:, :1]  # (B,1,C)
    patches = tokens[:, 1:]  # (B,H*W,C)
    patch_weight, class_weight = linear.weight.chunk(2, 1)  # (C,C) each
    return F.linear(patches, patch_weight) + F.linear(class_token, class_weight, linear.bias)


# dpt/vit.py, class ProjectReadout and act_postprocess1 to 4 in _make_vit_b16_backbone
class Reassemble(nn.Module):
    """Turns tokens into a map at 4, 2, 1 or 1/2 times the resolution of the patches.

    level: 0, 1, 2 or 3, in this order.
    """

    def __init__(self, dim: int, neck_dim: int, fusion_dim: int, level: int):
        super().__init__()
        self.readout = nn.Linear(2 * dim, dim)
        self.projection = nn.Conv2d(dim, neck_dim, 1)
        if level == 0:
            self.resize = nn.ConvTranspose2d(neck_dim, neck_dim, 4, stride=4)
        elif level == 1:
            self.resize = nn.ConvTranspose2d(neck_dim, neck_dim, 2, stride=2)
        elif level == 2:
            self.resize = nn.Identity()
        else:
            self.resize = nn.Conv2d(neck_dim, neck_dim, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(neck_dim, fusion_dim, 3, padding=1, bias=False)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """tokens (B,1+H*W,C), size (H,W) in patches -> (B,fusion_dim,sH,sW), s = 4, 2, 1 or 1/2."""
        x = F.gelu(project_readout(tokens, self.readout))  # (B,H*W,C)
        x = x.transpose(1, 2).unflatten(2, size)  # (B,C,H,W)
        x = self.resize(self.projection(x))  # (B,neck_dim,sH,sW)
        return self.conv(x)  # (B,fusion_dim,sH,sW)


# dpt/blocks.py, class ResidualConvUnit_custom
class ResidualUnit(nn.Module):
    """Residual block of two 3x3 convolutions, each after a ReLU."""

    def __init__(self, dim: int, norm: bool):
        super().__init__()
        self.convolution1 = nn.Conv2d(dim, dim, 3, padding=1, bias=not norm)
        self.convolution2 = nn.Conv2d(dim, dim, 3, padding=1, bias=not norm)
        self.batch_norm1 = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.batch_norm2 = nn.BatchNorm2d(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        y = self.batch_norm1(self.convolution1(F.relu(x)))
        return x + self.batch_norm2(self.convolution2(F.relu(y)))


def upsampled_conv1x1(x: Tensor, conv1x1: nn.Conv2d) -> Tensor:
    """Upsample x by 2 and apply a 1x1 convolution. (B,C,H,W) -> (B,C,2H,2W)

    Equals

        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return conv1x1(x)

    but the convolution has a quarter of the pixels. The two commute: the convolution does not mix
    pixels and the interpolation does not mix channels. The bias stays the same, because the
    weights of an interpolation sum to 1.
    """
    return F.interpolate(conv1x1(x), scale_factor=2, mode="bilinear", align_corners=True)


# dpt/blocks.py, class FeatureFusionBlock_custom
class Fusion(nn.Module):
    """Adds a map to the result of the coarser levels, refines the sum and doubles its size."""

    def __init__(self, dim: int, norm: bool, is_coarsest: bool):
        super().__init__()
        self.residual_layer1 = None if is_coarsest else ResidualUnit(dim, norm)
        self.residual_layer2 = ResidualUnit(dim, norm)
        self.projection = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, coarser: Tensor | None) -> Tensor:
        """x (B,C,H,W), coarser (B,C,H,W) or None for the coarsest level -> (B,C,2H,2W).

        `coarser` is larger than x if the number of patches is odd; x is then resized to it.
        """
        if coarser is not None:
            if x.shape != coarser.shape:
                x = F.interpolate(x, coarser.shape[2:], mode="bilinear", align_corners=False)
            x = coarser + self.residual_layer1(x)
        return upsampled_conv1x1(self.residual_layer2(x), self.projection)


# dpt/models.py, class DPTSegmentationModel
class DPT(nn.Module):
    """A vision transformer, the neck (`reassemble` and `fusion`) and a segmentation head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(config)

        dim = config.fusion_dim
        self.reassemble = nn.ModuleList()  # the finest level first
        for level, neck_dim in enumerate(config.neck_dims):
            self.reassemble.append(Reassemble(config.dim, neck_dim, dim, level))
        self.fusion = nn.ModuleList()  # the coarsest level first
        for i in range(len(config.neck_dims)):
            self.fusion.append(Fusion(dim, config.fusion_norm, is_coarsest=i == 0))

        self.head = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(dim, config.num_classes, 1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B,K,H,W), a little larger if H/16 or W/16 is odd (see the top).

        image: (B,3,H,W) as `preprocess` returns it; H and W are multiples of 16, else ValueError.
        """
        size = (image.shape[2] // 16, image.shape[3] // 16)  # in patches
        outputs = self.vit(image)  # (B,N,C) each

        maps = []
        for reassemble, tokens in zip(self.reassemble, outputs, strict=True):
            maps.append(reassemble(tokens, size))  # at strides 4, 8, 16, 32

        x = None
        for fusion, feature_map in zip(self.fusion, reversed(maps), strict=True):
            x = fusion(feature_map, x)  # at strides 16, 8, 4, 2
        return self.head(x)  # (B,K,H,W)

    def preprocess(self, image) -> Tensor:
        """Return a PIL image as a normalised square (3,S,S) float32."""
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities (K,*size) from logits (K,S,S); size is the image's (H,W)."""
        return postprocess(logits, size, self.config)

    def segment(self, image) -> tuple:
        """Return probabilities (K,H,W) and mask (H,W), numpy, of a PIL image or an image file."""
        return segment(self, image)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "DPT":
        """Load a file, a folder, a run folder or a hub id; return the model in evaluation mode.

        num_classes: None for as many as the file has; another number initialises a new classifier.
        It is required for a file that predicts depth or holds the transformer alone. Randomly
        initialised parts are printed. overrides: fields of Config. Raise FileNotFoundError or
        ValueError, one line, for a file that does not fit.
        """
        weights, fields = read_weights_and_fields(source, overrides)
        if num_classes is None:
            require_classifier(weights, source)
        else:
            fields["num_classes"] = num_classes
            weights = drop_other_classifier(weights, num_classes)

        model = cls(replace(Config(), **fields | overrides))
        load_weights(model, weights, source)
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
IGNORED = {  # tensors that are left out, and why
    r"dpt\.(layernorm|pooler)\..*": "comes after the last tap; transformers never uses its output",
    r"pretrained\.model\.(norm|head)\..*": "the same norm, and the ImageNet classifier",
    r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*": "never used, since the coarsest level "
    "has no coarser one; in transformers' class, but not in the file of Intel/dpt-large",
    r"(auxiliary_head|auxlayer)\..*": "for a second loss in training; its logits are never used",
}

# Tables of names, one for each source. {} is a number; the rest of a name stays.
ENCODER_NAMES = {  # transformers' DPTModel, the encoder alone -> the hub's names
    "embeddings": "dpt.embeddings",
    "encoder": "dpt.encoder",
    "layernorm": "dpt.layernorm",
    "pooler": "dpt.pooler",
}
ORIGINAL_NAMES = {  # isl-org/DPT, which counts levels from 1, and fusions from the finest -> ours
    "pretrained.model.cls_token": "vit.cls_token",
    "pretrained.model.pos_embed": "vit.pos_embed",
    "pretrained.model.patch_embed.proj": "vit.patch_embed",
    "pretrained.model.blocks.{}.norm1": "vit.blocks.{}.norm1",
    "pretrained.model.blocks.{}.attn.qkv": "vit.blocks.{}.qkv",
    "pretrained.model.blocks.{}.attn.proj": "vit.blocks.{}.proj",
    "pretrained.model.blocks.{}.norm2": "vit.blocks.{}.norm2",
    "pretrained.model.blocks.{}.mlp.fc1": "vit.blocks.{}.fc1",
    "pretrained.model.blocks.{}.mlp.fc2": "vit.blocks.{}.fc2",
    "pretrained.act_postprocess1.0.project.0": "reassemble.0.readout",
    "pretrained.act_postprocess1.3": "reassemble.0.projection",
    "pretrained.act_postprocess1.4": "reassemble.0.resize",
    "scratch.layer1_rn": "reassemble.0.conv",
    "pretrained.act_postprocess2.0.project.0": "reassemble.1.readout",
    "pretrained.act_postprocess2.3": "reassemble.1.projection",
    "pretrained.act_postprocess2.4": "reassemble.1.resize",
    "scratch.layer2_rn": "reassemble.1.conv",
    "pretrained.act_postprocess3.0.project.0": "reassemble.2.readout",
    "pretrained.act_postprocess3.3": "reassemble.2.projection",
    "scratch.layer3_rn": "reassemble.2.conv",
    "pretrained.act_postprocess4.0.project.0": "reassemble.3.readout",
    "pretrained.act_postprocess4.3": "reassemble.3.projection",
    "pretrained.act_postprocess4.4": "reassemble.3.resize",
    "scratch.layer4_rn": "reassemble.3.conv",
    "scratch.refinenet4.resConfUnit{}.conv{}": "fusion.0.residual_layer{}.convolution{}",
    "scratch.refinenet4.resConfUnit{}.bn{}": "fusion.0.residual_layer{}.batch_norm{}",
    "scratch.refinenet4.out_conv": "fusion.0.projection",
    "scratch.refinenet3.resConfUnit{}.conv{}": "fusion.1.residual_layer{}.convolution{}",
    "scratch.refinenet3.resConfUnit{}.bn{}": "fusion.1.residual_layer{}.batch_norm{}",
    "scratch.refinenet3.out_conv": "fusion.1.projection",
    "scratch.refinenet2.resConfUnit{}.conv{}": "fusion.2.residual_layer{}.convolution{}",
    "scratch.refinenet2.resConfUnit{}.bn{}": "fusion.2.residual_layer{}.batch_norm{}",
    "scratch.refinenet2.out_conv": "fusion.2.projection",
    "scratch.refinenet1.resConfUnit{}.conv{}": "fusion.3.residual_layer{}.convolution{}",
    "scratch.refinenet1.resConfUnit{}.bn{}": "fusion.3.residual_layer{}.batch_norm{}",
    "scratch.refinenet1.out_conv": "fusion.3.projection",
    "scratch.output_conv.{}": "head.{}",
}
OUR_NAMES = {  # ours -> the hub's, where query, key and value stand for our qkv
    "vit.cls_token": "dpt.embeddings.cls_token",
    "vit.pos_embed": "dpt.embeddings.position_embeddings",
    "vit.patch_embed": "dpt.embeddings.patch_embeddings.projection",
    "vit.blocks.{}.norm1": "dpt.encoder.layer.{}.layernorm_before",
    "vit.blocks.{}.qkv": "dpt.encoder.layer.{}.attention.attention.qkv",
    "vit.blocks.{}.proj": "dpt.encoder.layer.{}.attention.output.dense",
    "vit.blocks.{}.norm2": "dpt.encoder.layer.{}.layernorm_after",
    "vit.blocks.{}.fc1": "dpt.encoder.layer.{}.intermediate.dense",
    "vit.blocks.{}.fc2": "dpt.encoder.layer.{}.output.dense",
    "reassemble.{}.readout": "neck.reassemble_stage.readout_projects.{}.0",
    "reassemble.{}.projection": "neck.reassemble_stage.layers.{}.projection",
    "reassemble.{}.resize": "neck.reassemble_stage.layers.{}.resize",
    "reassemble.{}.conv": "neck.convs.{}",
    "fusion.{}": "neck.fusion_stage.layers.{}",
    "head.{}": "head.head.{}",
}


def rename(name: str, table: dict[str, str]) -> str:
    """Return a name with its beginning replaced by the first matching row; else the same name."""
    for old, new in table.items():
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)") + r"\b"
        match = re.match(pattern, name)
        if match:
            return new.format(*match.groups()) + name[match.end() :]
    return name


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of any naming under the hub's names, as transformers' class loads them.

    Tensors in IGNORED are left out, and so is a head that predicts depth.
    """
    weights = {}
    for name, tensor in state_dict.items():
        name = rename(name, ORIGINAL_NAMES)
        name = rename(name, OUR_NAMES | ENCODER_NAMES)
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        if ".qkv." not in name:
            weights[name] = tensor
            continue
        # strict=False: a tensor that does not give three parts is reported by `check_complete`.
        for part, t in zip(("query", "key", "value"), tensor.chunk(3), strict=False):
            weights[name.replace("qkv", part)] = t.clone()

    # A head for depth has a convolution at index 2, one for classes a ReLU.
    if "head.head.2.weight" in weights:
        weights = {name: t for name, t in weights.items() if not name.startswith("head.")}
    return weights


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of any naming under our names; query, key and value become one matrix."""
    official = to_official(state_dict)
    table = {hub_name: name for name, hub_name in OUR_NAMES.items()}
    weights = {}
    for name, tensor in official.items():
        if ".attention.key." in name or ".attention.value." in name:
            continue  # merged with the query below
        if ".attention.query." in name:
            key = official[name.replace("query", "key")]
            value = official[name.replace("query", "value")]
            tensor = torch.cat([tensor, key, value])  # (3C,C) or (3C,)
            name = name.replace("query", "qkv")
        weights[rename(name, table)] = tensor
    return weights


SETTINGS = {  # field of transformers' config.json -> field of Config
    "backbone_out_indices": "taps",
    "num_attention_heads": "heads",
    "layer_norm_eps": "eps",
    "neck_hidden_sizes": "neck_dims",
    "fusion_hidden_size": "fusion_dim",
    "use_batch_norm_in_fusion_residual": "fusion_norm",
}
SHAPES = {  # field of Config -> a tensor and the axis that has this size
    "dim": ("dpt.embeddings.cls_token", 2),
    "mlp_dim": ("dpt.encoder.layer.0.intermediate.dense.weight", 0),
    "fusion_dim": ("neck.convs.0.weight", 0),
    "num_classes": ("head.head.4.weight", 0),
}


def read_weights_and_fields(source: str | Path, overrides: dict) -> tuple[dict, dict]:
    """Return tensors under the hub's names, and the fields of Config that they need."""
    weights, settings = read_checkpoint(source, FILES)
    weights = to_official(weights)
    if "format" in settings:  # a run folder of ours
        return weights, run_config(settings, "DPT", source, Config)
    return weights, guess_config(weights, settings, overrides, source)


def guess_config(weights: dict[str, Tensor], settings: dict, overrides: dict, source) -> dict:
    """Return the fields of Config of a file that is not ours.

    They come from config.json, names and shapes. For the remaining ones the usual values are
    assumed and printed. Raise ValueError, one line, if the file has no transformer blocks.
    """
    fields = fields_from_json(settings)
    fields |= fields_from_shapes(weights, fields.get("neck_dims", Config.neck_dims))
    layers = fields["layers"]
    if not layers:
        raise ValueError(f"{source}: no tensor dpt.encoder.layer.*, so this is no DPT known here")

    variant = "large-ade" if fields.get("fusion_norm", True) else "large"
    usual = {
        "taps": tuple(i * layers // 4 - 1 for i in (1, 2, 3, 4)),
        "heads": fields.get("dim", Config.dim) // 64,
        "image_size": VARIANTS[variant].image_size,
    }
    assumed = {}
    for name, value in usual.items():
        if name not in fields and name not in overrides:
            assumed[name] = value
    if assumed:
        values = ", ".join(f"{name} {value}" for name, value in assumed.items())
        print(f"{source}: using the usual {values}; neither tensors nor config.json state them")
    return assumed | fields


def fields_from_json(settings: dict) -> dict:
    """Return the fields of Config that a config.json of transformers states."""
    fields = {}
    for hub_name, name in SETTINGS.items():
        if hub_name in settings:
            value = settings[hub_name]
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def fields_from_shapes(weights: dict[str, Tensor], neck_dims: tuple[int, ...]) -> dict:
    """Return the fields of Config that follow from tensors under the hub's names.

    neck_dims: channels of each level, used where the file has no convolution of that level.
    """
    fields = {}
    for field, (name, axis) in SHAPES.items():
        if name in weights:
            fields[field] = weights[name].shape[axis]

    blocks = {name.split(".")[3] for name in weights if name.startswith("dpt.encoder.layer.")}
    fields["layers"] = len(blocks)
    if "dpt.embeddings.position_embeddings" in weights:
        tokens = weights["dpt.embeddings.position_embeddings"].shape[1]
        fields["grid"] = round((tokens - 1) ** 0.5)

    fields["neck_dims"] = ()
    for level, neck_dim in enumerate(neck_dims):
        conv = weights.get(f"neck.convs.{level}.weight")
        fields["neck_dims"] += (neck_dim if conv is None else conv.shape[1],)
    if any(name.startswith("neck.") for name in weights):
        fields["fusion_norm"] = any(".batch_norm" in name for name in weights)
    return fields


# A part that a file may lack -> the parts that are then initialised.
INITIALISED = {
    "neck.": ("neck.", "head."),
    "head.": ("head.",),
    "head.head.4.": ("head.head.4.",),  # the classifier
}


def missing_part(weights: dict[str, Tensor]) -> str:
    """Return the first key of INITIALISED that no name starts with, "" if there is none."""
    for part in INITIALISED:
        if not any(name.startswith(part) for name in weights):
            return part
    return ""


def require_classifier(weights: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, for a file that needs `num_classes`: it lacks a part."""
    missing = missing_part(weights)
    if missing:
        raise ValueError(f"{source}: has no tensor {missing}*; num_classes=N initialises it")


def drop_other_classifier(weights: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Return weights without the classifier if it has another number of classes."""
    if len(weights.get("head.head.4.weight", ())) == num_classes:
        return weights
    return {name: t for name, t in weights.items() if not name.startswith("head.head.4.")}


def load_weights(model: DPT, weights: dict[str, Tensor], source) -> None:
    """Fill a model from weights under the hub's names; initialise the parts that they lack.

    Raise ValueError, one line in the hub's names, if another tensor is missing, unknown or of
    another shape.
    """
    new_parts = INITIALISED.get(missing_part(weights), ())
    expected = to_official(model.state_dict())
    weights = dict(weights)
    new_modules = set()
    for name, tensor in expected.items():
        if name.startswith(new_parts):
            weights[name] = initial_value(name, tensor)
            new_modules.add(name.rpartition(".")[0])
        elif name.endswith("num_batches_tracked"):
            weights.setdefault(name, tensor)  # old files lack these counters; outputs ignore them

    if new_modules:
        print(f"{source}: new and untrained: {', '.join(sorted(new_modules))}")
    check_complete(weights, expected, source)
    model.load_state_dict(convert(weights))


def initial_value(name: str, tensor: Tensor) -> Tensor:
    """Return new values for a tensor, as transformers initialises it; norms keep their values."""
    if tensor.ndim > 1:
        return 0.02 * torch.randn_like(tensor)
    return torch.zeros_like(tensor) if name.endswith("bias") else tensor


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
