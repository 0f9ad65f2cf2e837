"""The CLIP-Driven Universal Model: a head on Swin UNETR that is asked for classes by their codes.

To use it in another project copy this file and swin_unetr3d.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_unetr3d import (
    FILES,
    Backbone,
    Config,
    convert,
    load,
    new_classes,
    read_checkpoint,
    run_config,
    sizes,
    told_by_name,
)

ORGANS = (  # of the Universal Model, in its order
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver",
    "stomach", "aorta", "postcava", "portal vein and splenic vein", "pancreas",
    "right adrenal gland", "left adrenal gland", "duodenum", "hepatic vessel", "right lung",
    "left lung", "colon", "intestine", "rectum", "bladder", "prostate", "left head of femur",
    "right head of femur", "celiac trunk", "kidney tumor", "liver tumor", "pancreas tumor",
    "hepatic vessel tumor", "lung tumor", "colon tumor", "kidney cyst",
)  # fmt: skip


@dataclass(frozen=True)
class UniversalConfig(Config):
    num_classes: int = 32  # without the background, which has no code
    spacing: tuple[float, ...] = (1.5, 1.5, 1.5)
    overlapping: bool = True
    classes: tuple[str, ...] = ORGANS
    codes: str = "text"  # what stands for a class, of CODES


UNIVERSAL_VARIANTS = {
    "universal": UniversalConfig(),  # 62,595,315
    "mini": UniversalConfig(12, codes="random", image_size=(64,) * 3),  # for tests and demos
}

CODE, TEXT = 256, 512  # numbers of a class's code and of CLIP's text

CODES = ("text", "random", "one-hot")  # of CLIP; a parameter (256,); like a text, but (K,)

LAYERS = (64, 64, 8, 8, 8, 1)  # numbers of a class: weights of three layers, then their biases

# Voxels at a time: their channels stay in the cache of a processor, and keep a GPU busy.
PART = 4096

PART_ON_GPU = 2**17


def check_codes(codes: str, embedding: Tensor | None, *shape: int) -> None:
    """ValueError of one line if codes are of no kind, or are texts and there are none so shaped."""
    have = "no embedding" if embedding is None else f"embedding {tuple(embedding.shape)}"
    if codes not in CODES or (codes == "text") != (embedding is not None):
        raise ValueError(f"codes {codes!r} and {have}: of {', '.join(CODES)} text alone has one")
    if embedding is not None and embedding.shape != shape:
        raise ValueError(f"{have}: what classes there are take {shape}")


def dynamic_head(x: Tensor, numbers: Tensor) -> Tensor:
    """Runs each class's network of three 1x1x1 convolutions: x (B,8,D,H,W), numbers (B,k,153) ->
    logits (B,k,D,H,W).

    The official code repeats x for each class and convolves in groups. Here the first layers of all
    classes are one product of matrices.
    """
    B, k, _ = numbers.shape
    w1, w2, w3, b1, b2, b3 = numbers.split(LAYERS, 2)
    w1, b1 = w1.reshape(B, 8 * k, 8), b1.reshape(B, 8 * k, 1)
    w2, b2 = w2.reshape(B * k, 8, 8), b2.reshape(B * k, 8, 1)
    w3, b3 = w3.reshape(B * k, 1, 8), b3.reshape(B * k, 1, 1)
    voxels = PART if x.device.type == "cpu" else PART_ON_GPU
    parts = []
    for part in x.flatten(2).split(voxels, 2):  # (B,8,n)
        y = torch.baddbmm(b1, w1, part).relu_()  # (B,8k,n)
        y = torch.baddbmm(b2, w2, y.view(B * k, 8, -1)).relu_()  # (B*k,8,n)
        parts.append(torch.baddbmm(b3, w3, y).view(B, k, -1))
    return torch.cat(parts, 2).view(B, k, *x.shape[2:])


class UniversalSwinUNETR(Backbone):
    """Finds the classes that it is asked for, each by a small network made of the class's code.

    Liu et al., ICCV 2023, arXiv 2301.00785; github.com/ljwztc/CLIP-Driven-Universal-Model at
    43c1239, model/Universal_model.py (CC BY-NC-ND 4.0). Weights: on the hub
    ljwztc/CLIP-Driven-Universal-Model (licence not checked). Left out: its other backbones.

        code of each class (k,512), CLIP's text, text_to_vision, ReLU -> (k,256)
        (B,16f,D/32,...) of the backbone, GAP: group norm, ReLU, mean, projection -> (B,256)
        both, controller -> (B,k,153), the weights and biases of 8 -> 8 -> 8 -> 1 channels
        (B,f,D,H,W) of the backbone, precls_conv: group norm, ReLU, projection -> (B,8,D,H,W)
        three 1x1x1 convolutions with the 153 numbers -> logits (B,k,D,H,W)
    """

    CONFIG = UniversalConfig

    def __init__(self, config: UniversalConfig, embedding: Tensor | None = None):
        """embedding (K,512): the codes of "text", which nothing but CLIP can give."""
        super().__init__(config)
        f, K, codes = config.feature_size, config.num_classes, config.codes
        check_codes(codes, embedding, K, TEXT)
        if codes == "random":
            self.organ_embedding = nn.Embedding(K, CODE)
        else:
            embedding = torch.eye(K) if embedding is None else embedding.float()
            self.register_buffer("organ_embedding", embedding)
            self.text_to_vision = nn.Linear(embedding.shape[1], CODE)
        top, bottom = nn.GroupNorm(math.gcd(16, f), f), nn.GroupNorm(16, 16 * f)
        self.precls_conv = nn.Sequential(top, nn.ReLU(), nn.Conv3d(f, 8, 1))
        mean = nn.AdaptiveAvgPool3d(1), nn.Conv3d(16 * f, CODE, 1)
        self.GAP = nn.Sequential(bottom, nn.ReLU(), *mean)
        self.controller = nn.Conv3d(2 * CODE, sum(LAYERS), 1)

    def forward(self, volume: Tensor, classes: list[int] | None = None) -> Tensor:
        """volume (B,C,D,H,W) as `preprocess` makes it, and which classes are asked for, from 0 (the
        background is none of them), or all -> logits (B,k,D,H,W)."""
        bottom, top = self.features(volume)
        numbers = self.head_numbers(bottom, classes)  # (B,k,153)
        # Of channels last in memory, group norms on a CPU are a hundred times less exact.
        return dynamic_head(self.precls_conv(top.contiguous()), numbers)

    def codes(self) -> Tensor:
        """(K,256)."""
        if self.config.codes == "random":
            return self.organ_embedding.weight
        return self.text_to_vision(self.organ_embedding).relu()

    def head_numbers(self, bottom: Tensor, classes: list[int] | None = None) -> Tensor:
        """bottom (B,16f,d,h,w) -> weights and biases of each class's network (B,k,153)."""
        codes = self.codes() if classes is None else self.codes()[classes]  # (k,256)
        image = self.GAP(bottom).flatten(1)  # (B,256)
        image, codes = torch.broadcast_tensors(image[:, None], codes)  # (B,k,256) each
        return self.control(image, codes)

    def control(self, image: Tensor, codes: Tensor) -> Tensor:
        """(B,k,256) each -> (B,k,153)."""
        x = torch.cat((image, codes), 2)  # (B,k,512)
        return F.linear(x, self.controller.weight.flatten(1), self.controller.bias)

    @torch.no_grad()
    def add_class(self, name: str, embedding: Tensor | None = None) -> None:
        """A further class, the last; embedding (512,) is its code if codes are texts.

        What the model says of the others stays as it is. Optimisers do not know what is new.
        """
        c, codes = self.config, self.organ_embedding
        if name in c.classes:
            raise ValueError(f"class {name!r} is there already")
        check_codes(c.codes, embedding, TEXT)
        if c.codes == "random":
            rows = torch.cat((codes.weight, torch.randn_like(codes.weight[:1])))
            self.organ_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        elif c.codes == "text":
            self.organ_embedding = torch.cat((codes, embedding.to(codes)[None]))
        else:  # a row and a column, of which the others have 0
            self.organ_embedding = torch.block_diag(codes, codes.new_ones(1, 1))
            old, new = self.text_to_vision, nn.Linear(codes.shape[1] + 1, CODE).to(codes.device)
            new.weight[:, :-1], new.bias[:] = old.weight, old.bias
            self.text_to_vision = new
        self.config = replace(c, num_classes=c.num_classes + 1, classes=(*c.classes, name))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, classes: list[str] | None = None, embedding=None, **overrides
    ) -> "UniversalSwinUNETR":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of its Config.

        A file of Swin UNETR, or of its encoder alone, needs the names of the `classes` and, if
        codes are texts, their `embedding` (K,512); the rest is new and printed. Evaluation mode.
        """
        weights, settings = read_checkpoint(source, UNIVERSAL_FILES + FILES)
        weights = convert(weights)
        found = [name for name in weights if name.startswith("organ_embedding")]
        if "format" in settings:  # a run folder of ours, of this or the backbone's model
            kind = cls.__name__ if found else "SwinUNETR"
            values = run_config(settings, kind, source, cls.CONFIG)
            config = cls.CONFIG(**values | {"overlapping": True})
        else:
            told = told_by_name(source, settings, "merging" in overrides)
            config = cls.CONFIG(**sizes(weights), merging=told["merging"])
        if found:
            codes, fresh = weights[found[0]], ""
            kind = {TEXT: "text", CODE: "random"}.get(codes.shape[1], "one-hot")
            if overrides.get("codes", kind) != kind:
                raise ValueError(f"{source}: its codes are {kind}, not {overrides['codes']}")
            embedding, names = codes if kind == "text" else None, config.classes[1:]
            if len(names) != len(codes):
                names = classes or [f"class {k + 1}" for k in range(len(codes))]
            config = replace(config, codes=kind)
        elif not classes or (embedding is None and overrides.get("codes", "text") == "text"):
            raise ValueError(f"{source}: no codes; give names of classes and, of texts, embedding")
        else:
            weights, _, fresh = new_classes(weights, 0, config, source)
            names, fresh = classes, "|".join(filter(None, (HEAD, fresh)))
        config = replace(config, num_classes=len(names), classes=("background", *names))
        model = cls(replace(config, **overrides), embedding)
        return load(model, weights, fresh, source)


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model.
# --------------------------------------------------------------------------------------------------


UNIVERSAL_FILES = ("best.safetensors", "clip_driven_universal_swin_unetr.pth")

HEAD = r"(organ_embedding|text_to_vision|cross_attention|precls_conv|GAP|controller).*"
