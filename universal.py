"""The CLIP-Driven Universal Model: a mask for each wanted class, by a head on Swin UNETR.

Paper: Liu et al., ICCV 2023, arXiv 2301.00785.
Code: github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239, model/Universal_model.py
    (CC BY-NC-ND 4.0).
Weights: on the hub ljwztc/CLIP-Driven-Universal-Model (licence not checked).

    volume (B,1,96,96,96)                  names of k classes, encoded by CLIP: codes (k,512)
    Swin UNETR without `out`                 text_to_vision, ReLU        -> (k,256)
    -> bottleneck (B,768,3,3,3)
       GAP: group norm, ReLU, mean, 1x1x1 convolution                    -> (B,256)
       concatenation with the codes (B,k,512), controller                -> (B,k,153)
    -> decoder's output (B,48,96,96,96)
       precls_conv: group norm, ReLU, 1x1x1 convolution                  -> (B,8,96,96,96)
       dynamic_head: three 1x1x1 convolutions 8 -> 8 -> 8 -> 1 for
       each class, with the controller's 153 weights and biases          -> logits (B,k,96,96,96)

The code of a class is a text, a parameter (256,) or a row of the unit matrix: see `CODES`. Left
out: the other backbones. To use it in another project copy this file, swin_unetr3d.py, and what
that file names.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_unetr3d
from swin_unetr3d import Config, EncoderDecoder

ORGANS = (  # classes of the released weights, in their order
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "portal vein and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "hepatic vessel",
    "right lung",
    "left lung",
    "colon",
    "intestine",
    "rectum",
    "bladder",
    "prostate",
    "left head of femur",
    "right head of femur",
    "celiac trunk",
    "kidney tumor",
    "liver tumor",
    "pancreas tumor",
    "hepatic vessel tumor",
    "lung tumor",
    "colon tumor",
    "kidney cyst",
)


@dataclass(frozen=True)
class UniversalConfig(Config):
    """A Config with another spacing, overlapping classes, and the kind of their codes."""

    num_classes: int = 32  # output channels; the background has no code and no channel
    spacing: tuple[float, ...] = (1.5, 1.5, 1.5)
    overlapping: bool = True
    classes: tuple[str, ...] = ORGANS
    codes: str = "text"  # kind of code, one of CODES


UNIVERSAL_VARIANTS = {  # right: number of parameters
    "universal": UniversalConfig(),  # 62,595,315
    # for tests and demos
    "mini": UniversalConfig(feature_size=12, codes="random", image_size=(64, 64, 64)),
}
# text: CLIP's embedding of a text (512,); random: a parameter (256,); one-hot: a row of the unit
# matrix (K,K), which the model treats like a text
CODES = ("text", "random", "one-hot")
CODE = 256  # width of a code in the model
TEXT = 512  # width of CLIP's embedding of a text


def check_codes(codes: str, embedding: Tensor | None, *shape: int) -> None:
    """Raise ValueError, one line, unless codes are one of CODES and the embedding fits them.

    Texts need an embedding of the given shape, the other kinds have none.
    """
    if codes not in CODES:
        raise ValueError(f"codes is {codes!r}, must be one of {', '.join(CODES)}")
    if codes != "text":
        if embedding is not None:
            raise ValueError(f"codes {codes!r} take no embedding; remove it or use codes 'text'")
        return
    if embedding is None:
        raise ValueError(f"codes 'text' need an embedding {shape}")
    if embedding.shape != shape:
        raise ValueError(f"embedding is {tuple(embedding.shape)}, these classes need {shape}")


LAYERS = (64, 64, 8, 8, 8, 1)  # split of the 153 numbers: weights of three layers, then biases
# Voxels computed at a time: few enough for the cache of a CPU, or enough to keep a GPU busy.
CHUNK = 4096
CHUNK_ON_GPU = 2**17


# Universal_model.py, heads_forward and parse_dynamic_params
def dynamic_head(x: Tensor, numbers: Tensor) -> Tensor:
    """Run the small network of each class: three 1x1x1 convolutions with ReLUs between them.

    Equivalent, for each volume and class, to

        y = F.conv3d(x, w1, b1).relu()
        y = F.conv3d(y, w2, b2).relu()
        return F.conv3d(y, w3, b3)

    The official code repeats x for each class and uses grouped convolutions. Here the first layers
    of all classes are one matrix product.

    x (B,8,D,H,W), numbers (B,k,153) -> logits (B,k,D,H,W)
    """
    B, k, _ = numbers.shape
    w1, w2, w3, b1, b2, b3 = numbers.split(LAYERS, 2)
    w1 = w1.reshape(B, 8 * k, 8)
    b1 = b1.reshape(B, 8 * k, 1)
    w2 = w2.reshape(B * k, 8, 8)
    b2 = b2.reshape(B * k, 8, 1)
    w3 = w3.reshape(B * k, 1, 8)
    b3 = b3.reshape(B * k, 1, 1)

    # Tracing unrolls the loop over the chunks: larger ones keep the graph small.
    is_traced = torch.compiler.is_compiling()
    voxels = CHUNK if x.device.type == "cpu" and not is_traced else CHUNK_ON_GPU
    logits = []
    for chunk in x.flatten(2).split(voxels, 2):  # (B,8,n)
        y = torch.baddbmm(b1, w1, chunk).relu_()  # (B,8k,n)
        y = y.view(B * k, 8, -1)  # (B*k,8,n)
        y = torch.baddbmm(b2, w2, y).relu_()  # (B*k,8,n)
        y = torch.baddbmm(b3, w3, y)  # (B*k,1,n)
        logits.append(y.view(B, k, -1))  # (B,k,n)
    return torch.cat(logits, 2).view(B, k, *x.shape[2:])  # (B,k,D,H,W)


# Universal_model.py, class Universal_model
class UniversalSwinUNETR(EncoderDecoder):
    """Swin UNETR with a head that makes a small network for each class from its code."""

    CONFIG = UniversalConfig

    def __init__(self, config: UniversalConfig, embedding: Tensor | None = None):
        """embedding: the codes (K,512) of the classes if they are texts; None for other kinds."""
        super().__init__(config)
        f = config.feature_size
        K = config.num_classes
        check_codes(config.codes, embedding, K, TEXT)

        if config.codes == "random":
            self.organ_embedding = nn.Embedding(K, CODE)
        else:
            embedding = torch.eye(K) if embedding is None else embedding.float()
            self.register_buffer("organ_embedding", embedding)
            self.text_to_vision = nn.Linear(embedding.shape[1], CODE)

        self.precls_conv = nn.Sequential(
            nn.GroupNorm(math.gcd(16, f), f),
            nn.ReLU(),
            nn.Conv3d(f, 8, 1),
        )
        self.GAP = nn.Sequential(
            nn.GroupNorm(16, 16 * f),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(16 * f, CODE, 1),
        )
        self.controller = nn.Conv3d(2 * CODE, sum(LAYERS), 1)

    def forward(self, volume: Tensor, classes: list[int] | None = None) -> Tensor:
        """Return logits (B,k,D,H,W) of some classes, or of all K.

        volume: preprocessed, (B,C,D,H,W); classes: their indices, counted from 0 without the
        background.
        """
        bottleneck, decoded = self.features(volume)  # (B,16f,D/32,H/32,W/32), (B,f,D,H,W)
        numbers = self.head_numbers(bottleneck, classes)  # (B,k,153)
        # On a CPU, group norms are a hundred times less exact with channels last in memory.
        x = self.precls_conv(decoded.contiguous())  # (B,8,D,H,W)
        return dynamic_head(x, numbers)

    def head_numbers(self, bottleneck: Tensor, classes: list[int] | None = None) -> Tensor:
        """Return the weights and biases of each class's network: (B,k,153).

        bottleneck (B,16f,D/32,H/32,W/32)
        """
        codes = self.codes()  # (K,256)
        if classes is not None:
            codes = codes[classes]  # (k,256)
        image = self.GAP(bottleneck).flatten(1)  # (B,256)
        image, codes = torch.broadcast_tensors(image[:, None], codes)  # (B,k,256) each
        return self.control(image, codes)

    def codes(self) -> Tensor:
        """Return the codes of all classes (K,256)."""
        if self.config.codes == "random":
            return self.organ_embedding.weight
        return self.text_to_vision(self.organ_embedding).relu()

    def control(self, image: Tensor, codes: Tensor) -> Tensor:
        """Apply the controller: image and codes (B,k,256) -> (B,k,153)."""
        x = torch.cat((image, codes), 2)  # (B,k,512)
        return F.linear(x, self.controller.weight.flatten(1), self.controller.bias)

    @torch.no_grad()
    def add_class(self, name: str, embedding: Tensor | None = None) -> None:
        """Add a class after the others; their logits stay the same.

        embedding: the code (512,) of the class if codes are texts, else None. An existing optimiser
        does not train the new parameters. Raises ValueError, one line, if the class exists or the
        code does not fit.
        """
        config = self.config
        codes = self.organ_embedding
        if name in config.classes:
            raise ValueError(f"class {name!r} exists already")
        check_codes(config.codes, embedding, TEXT)

        if config.codes == "random":
            rows = torch.cat((codes.weight, torch.randn_like(codes.weight[:1])))
            self.organ_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        elif config.codes == "text":
            self.organ_embedding = torch.cat((codes, embedding.to(codes)[None]))
        else:  # one-hot: a new row, and a new column in which the other classes have 0
            self.organ_embedding = torch.block_diag(codes, codes.new_ones(1, 1))
            old = self.text_to_vision
            new = nn.Linear(codes.shape[1] + 1, CODE).to(codes.device)
            new.weight[:, :-1] = old.weight
            new.bias[:] = old.bias
            self.text_to_vision = new

        classes = (*config.classes, name)
        self.config = replace(config, num_classes=config.num_classes + 1, classes=classes)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, classes: list[str] | None = None, embedding=None, **overrides
    ) -> "UniversalSwinUNETR":
        """Load a model in evaluation mode.

        source: a file, a folder, the output folder of a training run, or a hub id. A file of Swin
        UNETR, or of its encoder, gets a new head: it needs the names of the `classes` and, if codes
        are texts, their `embedding` (K,512). The names of newly initialised parts are printed.
        overrides: fields of the Config. Raises ValueError or FileNotFoundError, one line, for a
        file that does not fit.
        """
        weights, settings = swin_unetr3d.read_checkpoint(source, UNIVERSAL_FILES)
        weights = swin_unetr3d.convert(weights)
        has_codes = any(name.startswith("organ_embedding") for name in weights)
        config = cls.config_of(weights, settings, source, quiet="merging" in overrides)

        if has_codes:
            config, embedding = with_codes(config, weights, classes, overrides.get("codes"), source)
            fresh = ""
        else:
            codes = overrides.get("codes", "text")
            if not classes or (embedding is None and codes == "text"):
                raise ValueError(
                    f"{source}: has no codes of classes; give classes and, for texts, embedding"
                )
            weights, _, fresh = swin_unetr3d.new_classes(weights, 0, config, source)
            fresh = f"{HEAD}|{fresh}" if fresh else HEAD
            names = ("background", *classes)
            config = replace(config, num_classes=len(classes), classes=names)

        model = cls(replace(config, **overrides), embedding)
        return swin_unetr3d.load(model, weights, fresh, source, official=to_official)

    @classmethod
    def config_of(cls, weights: dict[str, Tensor], settings: dict, source, quiet: bool):
        """Return the config of a file of this model or of Swin UNETR, without its classes."""
        if "format" in settings:  # a run folder of ours
            has_codes = any(name.startswith("organ_embedding") for name in weights)
            kind = cls.__name__ if has_codes else "SwinUNETR"
            values = swin_unetr3d.run_config(settings, kind, source, cls.CONFIG)
            values["overlapping"] = True
            return cls.CONFIG(**values)

        # Only the merging follows from the name: classes and spacing are those of another model.
        released = swin_unetr3d.RELEASED | UNIVERSAL_RELEASED
        by_name = swin_unetr3d.config_from_name(source, settings, quiet, released)
        by_shape = swin_unetr3d.config_from_shapes(weights)
        return cls.CONFIG(**by_shape, merging=by_name["merging"])


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

UNIVERSAL_FILES = (
    "best.safetensors",
    "clip_driven_universal_swin_unetr.pth",
    *swin_unetr3d.FILES,
)
UNIVERSAL_RELEASED = {  # like RELEASED of swin_unetr3d.py
    "CLIP-Driven-Universal-Model": {},
    "clip_driven_universal_swin_unetr.pth": {},
}
# Parameters that a file of Swin UNETR does not have.
HEAD = r"(organ_embedding|text_to_vision|cross_attention|precls_conv|GAP|controller).*"


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the official class's names; the released file has other names."""
    weights = {}
    for name, tensor in swin_unetr3d.to_official(state_dict).items():
        is_backbone = name.startswith(("swinViT", "encoder", "decoder"))
        weights[f"backbone.{name}" if is_backbone else name] = tensor
    return weights


def with_codes(
    config: UniversalConfig,
    weights: dict[str, Tensor],
    classes: list[str] | None,
    codes: str | None,
    source,
) -> tuple[UniversalConfig, Tensor | None]:
    """Return the config with the classes and codes of a file, and the embedding of its texts.

    codes: the expected kind, None for any. Names are those of the config if their number fits, else
    `classes`. The embedding (K,512) is None for other kinds. Raises ValueError, one line, if the
    file has another kind than expected.
    """
    name = next(name for name in weights if name.startswith("organ_embedding"))
    embedding = weights[name]  # (K,512), (K,256) or (K,K)
    kind = {TEXT: "text", CODE: "random"}.get(embedding.shape[1], "one-hot")
    if codes not in (None, kind):
        raise ValueError(f"{source}: its codes are {kind}, not {codes}")

    names = config.classes[1:]
    if len(names) != len(embedding):
        names = classes or [f"class {k + 1}" for k in range(len(embedding))]
    names = ("background", *names)
    config = replace(config, codes=kind, num_classes=len(names) - 1, classes=names)
    return config, embedding if kind == "text" else None
