"""Few-shot organs: a study's attention between texts and a volume, on two models.

Code: github.com/CMPT983-Winter2023/Few-Shot-3D-Medical-Segmentation at 0973c44;
    `AttentionUniversal`: CLIP-Driven-Universal-Model/model/{Universal_model,CrossAttention}.py
    (CC BY-NC-SA 4.0); `TextSwinUNETR`: BTCV/models/model.py (no licence of its own; it changes
    Project-MONAI/research-contributions, Apache 2.0).
Weights: none were released.

    AttentionUniversal: codes of the classes (B,K,256) and the image feature, GAP's output (B,256)
      CrossModalTransformer: both attend to themselves, the text to the image, the image to the text
      controller, on both -> (B,K,153); the rest as in the Universal Model

    TextSwinUNETR: one text (B,512) that lists organs, and the bottleneck (B,16f,3,3,3)
      contrast: text_fc_contrast -> (B,16f*27); a loss raises its cosine similarity to the
        bottleneck
      attention: text_fc_attention -> (B,16f,27); CrossModalTransformer, on it and the bottleneck,
        with the channels as tokens; its image stream replaces the bottleneck
      concat: the text stream of the attention, or text_fc_concat -> (B,16f,3,3,3), is concatenated
        to the bottleneck
      decoder5, on the result; the rest as in Swin UNETR

The study's mistakes are options where its code ran: `attend`, `shared`, `repeat`. Where it crashed,
on other numbers of windows than four to a text, this file works. To use it in another project copy
this file, universal.py, swin_unetr3d.py, and what the last one names.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_unetr3d
from swin_unetr3d import SLOPE, Config, EncoderDecoder
from universal import CODE, TEXT, UniversalConfig, UniversalSwinUNETR


@dataclass(frozen=True)
class AttentionConfig(UniversalConfig):
    """A UniversalConfig with a kind of attention."""

    attend: str = "token"  # kind of attention, a key of ATTEND


ATTEND = {
    # The study put the classes on the batch axis, so each sequence is a single token. Attention to
    # one token is a linear layer, and the whole transformer an MLP of one class and the image.
    "token": "each class by itself, with the image",
    # quirk: the study's code on several volumes. Volume i, counted from 0, starts from the results
    # of the volume before it, and uses that one's image feature of class i instead of its own.
    "chain": "as token, but each volume continues from the one before",
    # The study's intention: the K classes are the tokens of the text, the image is one token. The
    # classes attend to each other, and the image to all of them; attention to the image remains a
    # linear layer. The parameters are the same.
    "classes": "all classes attend to each other; a new class changes the others",
}


@dataclass(frozen=True)
class TextConfig(Config):
    """A Config with the text options of the study."""

    attention: bool = False  # cross-attention between the text and the bottleneck
    concat: bool = False  # concatenate the text to the bottleneck
    contrast: bool = False  # a loss that makes the text and the bottleneck similar
    # quirk: with contrast, attention uses the text of text_fc_contrast, not of text_fc_attention
    shared: bool = True


VARIANTS = {  # right: number of parameters
    "universal-attention": AttentionConfig(),  # 65,754,355
    # for tests and demos
    "mini": AttentionConfig(feature_size=12, codes="random", image_size=(64, 64, 64)),
}
BTCV = swin_unetr3d.BTCV
MINI = TextConfig(feature_size=12, num_classes=3, image_size=(96, 64, 64))
TEXT_VARIANTS = {  # without a text option these are Swin UNETR: 62,187,296 and 4,078,077
    "attention": TextConfig(attention=True, **BTCV),  # 72,861,260
    "concat": TextConfig(concat=True, **BTCV),  # 64,940,576
    "contrast": TextConfig(contrast=True, **BTCV),  # 72,824,864
    "all": TextConfig(attention=True, concat=True, contrast=True, **BTCV),  # 86,252,108
    "mini": replace(MINI, attention=True),  # 5,267,565; minis are for tests and demos
    "mini-concat": replace(MINI, concat=True),  # 4,324,029
    "mini-contrast": replace(MINI, contrast=True),  # 5,260,029
    "mini-all": replace(MINI, attention=True, concat=True, contrast=True),  # 6,695,469
}

# The layers of each step, by the study's names: attention, norm, MLP, norm.
STEPS = {
    "text": ("text_self_attention", "text_norm1", "text_feedforward", "text_norm2"),
    "image": ("img_self_attention", "img_norm1", "img_feedforward", "img_norm2"),
    "text to image": (
        "cross_modal_attention_text",
        "cross_modal_norm1_text",
        "cross_modal_feedforward_text",
        "cross_modal_norm2_text",
    ),
    "image to text": (
        "cross_modal_attention_image",
        "cross_modal_norm1_image",
        "cross_modal_feedforward_image",
        "cross_modal_norm2_image",
    ),
}


# model/CrossAttention.py, class CrossModalTransformer
class CrossModalTransformer(nn.Module):
    """A text and an image stream; each attends to itself, then to the other."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        for attention, norm1, mlp, norm2 in STEPS.values():
            self.add_module(attention, nn.MultiheadAttention(dim, heads, batch_first=True))
            self.add_module(norm1, nn.LayerNorm(dim))
            layers = [nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)]
            self.add_module(mlp, nn.Sequential(*layers))
            self.add_module(norm2, nn.LayerNorm(dim))

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return x (B,N,C) after attention to y (B,M,C) and an MLP, both post-norm: (B,N,C)."""
        attention, norm1, mlp, norm2 = map(self.get_submodule, STEPS[name])
        attended, _ = attention(x, y, y, need_weights=False)  # (B,N,C)
        x = norm1(x + attended)
        return norm2(x + mlp(x))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text (B,N,C), image (B,M,C) -> the same shapes."""
        text = self.step("text", text, text)
        image = self.step("image", image, image)
        text = self.step("text to image", text, image)
        image = self.step("image to text", image, text)
        return text, image


# model/Universal_model.py, class Universal_model with attention
class AttentionUniversal(UniversalSwinUNETR):
    """The Universal Model with a CrossModalTransformer before its controller."""

    CONFIG = AttentionConfig

    def __init__(self, config: AttentionConfig, embedding: Tensor | None = None):
        """embedding: the codes (K,512) of the classes if they are texts; None for other kinds."""
        super().__init__(config, embedding)
        if config.attend not in ATTEND:
            raise ValueError(f"attend {config.attend!r} is none of {', '.join(ATTEND)}")
        self.cross_attention = CrossModalTransformer(CODE, 4)

    def head_numbers(self, bottleneck: Tensor, classes: list[int] | None = None) -> Tensor:
        """Return the weights and biases of each class's network: (B,k,153).

        bottleneck (B,16f,D/32,H/32,W/32)
        """
        if self.config.attend == "token" or classes is None:
            return super().head_numbers(bottleneck, classes)
        numbers = super().head_numbers(bottleneck)  # (B,K,153): each depends on other classes
        return numbers[:, classes]

    def control(self, image: Tensor, codes: Tensor) -> Tensor:
        """Apply attention and the controller: image and codes (B,k,256) -> (B,k,153)."""
        if self.config.attend == "classes":
            text, image = self.cross_attention(codes, image[:, :1])  # (B,k,256), (B,1,256)
            return super().control(image.expand_as(text), text)
        if self.config.attend == "token":
            image, text = self.class_by_class(image, codes)
            return super().control(image, text)
        return self.control_in_a_chain(image, codes)

    def class_by_class(self, image: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and codes (B,k,256) after attention within each pair of them."""
        shape = codes.shape
        codes = codes.reshape(-1, 1, CODE)  # (B*k,1,256)
        image = image.reshape(-1, 1, CODE)  # (B*k,1,256)
        codes, image = self.cross_attention(codes, image)
        return image.view(shape), codes.view(shape)

    def control_in_a_chain(self, image: Tensor, codes: Tensor) -> Tensor:
        """Apply attention and the controller as the study's code does on several volumes.

        image and codes (B,k,256) -> (B,k,153); see "chain" of ATTEND.
        """
        B, k, _ = codes.shape
        if k < B:
            raise ValueError(f"attend 'chain' takes {k} volumes at a time, a class each, not {B}")

        image = image[:1]  # (1,k,256)
        text = codes[:1]  # (1,k,256)
        numbers = []
        for i in range(B):
            if i > 0:
                image = image[:, i : i + 1].expand_as(text)
            image, text = self.class_by_class(image, text)
            numbers.append(super().control(image, text))  # (1,k,153)
        return torch.cat(numbers)


# BTCV/models/model.py, class SwinUNETR
class TextSwinUNETR(EncoderDecoder):
    """Swin UNETR that reads one text, a list of the wanted organs."""

    def __init__(self, config: TextConfig, text: Tensor | None = None):
        """text (512,): the text of all organs, the default of `forward`."""
        super().__init__(config)
        f = config.feature_size
        n = math.prod(side // 32 for side in config.image_size)  # voxels of the bottleneck
        if config.attention and n % 3:
            raise ValueError(
                f"image_size {config.image_size}: {n} voxels at the bottleneck, not a multiple of 3"
            )

        if config.contrast:
            self.text_fc_contrast = nn.Linear(TEXT, 16 * f * n)
        if config.attention:
            self.text_fc_attention = nn.Linear(TEXT, 16 * f * n)
            self.text_fc_attention.requires_grad_(not (config.contrast and config.shared))
            self.cross_attention = CrossModalTransformer(n, 3)
        if config.concat:
            self.text_fc_concat = nn.Linear(TEXT, 16 * f)
            self.text_fc_concat.requires_grad_(not config.attention)  # quirk: idle with attention
            self.decoder5 = swin_unetr3d.UpBlock(32 * f, 8 * f)
        self.out = nn.Conv3d(f, config.num_classes, 1)
        if text is not None:
            if text.shape != (TEXT,):
                raise ValueError(f"text of all organs is {tuple(text.shape)}, expected ({TEXT},)")
            self.register_buffer("organ_text", text.float())

    def forward(self, volume: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits (B,K,D,H,W) and the contrastive loss, None without contrast.

        volume: preprocessed, (B,C,D,H,W); text (B,512), or (512,) for all volumes, or None for
        that of all organs. The study weights the contrastive loss by 0.1. With attention or
        contrast the sides must be those of the config's image_size. Raises ValueError, one line,
        for other shapes, and without a text.
        """
        B = volume.shape[0]
        if text is None:
            if not hasattr(self, "organ_text"):
                raise ValueError(f"no text: give one, ({TEXT},) or ({B},{TEXT})")
            text = self.organ_text
        if text.shape not in ((TEXT,), (1, TEXT), (B, TEXT)):
            raise ValueError(
                f"text is {tuple(text.shape)}, expected ({TEXT},) or ({B},{TEXT}) for {B} volumes"
            )
        text = text.expand(B, TEXT)
        contrast = None

        def fuse(bottleneck: Tensor) -> Tensor:
            nonlocal contrast  # returned below
            fused, contrast = self.fuse(bottleneck, text)
            return fused

        _, x = self.features(volume, fuse)  # (B,f,D,H,W)
        logits = swin_unetr3d.pointwise(x, self.out.weight, self.out.bias)  # (B,K,D,H,W)
        return logits.contiguous(), contrast

    def fuse(self, bottleneck: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the input of decoder5 and the contrastive loss, None without contrast.

        bottleneck (B,16f,D/32,H/32,W/32), text (B,512) -> (B,16f,D/32,H/32,W/32), with concat
        (B,32f,D/32,H/32,W/32)
        """
        config = self.config
        B, _, *grid = bottleneck.shape
        sides = tuple(32 * side for side in grid)
        if (config.attention or config.contrast) and sides != tuple(config.image_size):
            raise ValueError(
                f"the volume's sides are {sides}, the text options take {config.image_size}"
            )

        image = bottleneck.flatten(2)  # (B,16f,n)
        text_features = None
        contrast = None
        if config.contrast:
            text_features = F.leaky_relu(self.text_fc_contrast(text), SLOPE)  # (B,16f*n)
            same = text.new_ones(B)  # target 1: the pairs should become similar
            contrast = F.cosine_embedding_loss(text_features, image.flatten(1), same)

        if config.attention:
            if not (config.contrast and config.shared):
                text_features = F.leaky_relu(self.text_fc_attention(text), SLOPE)  # (B,16f*n)
            text_features = text_features.view(image.shape)  # (B,16f,n)
            text_features, image = self.cross_attention(text_features, image)  # (B,16f,n) each
        elif config.concat:
            text_features = F.leaky_relu(self.text_fc_concat(text), SLOPE)  # (B,16f)
            text_features = text_features[:, :, None].expand_as(image)  # (B,16f,n)

        if config.concat:
            image = torch.cat((image, text_features), 1)  # (B,32f,n)
        return image.view(B, -1, *grid), contrast

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        num_classes: int | None = None,
        repeat=False,
        text: Tensor | None = None,
        **overrides,
    ) -> "TextSwinUNETR":
        """Load a model in evaluation mode.

        source: a file, a folder, the output folder of a training run, or a hub id. Weights of Swin
        UNETR, or of its encoder, get the layers of the text options that are True in `overrides`,
        fields of TextConfig. The names of newly initialised layers are printed. With concat,
        decoder5's weights for the text start at 0, so that the model starts as Swin UNETR; repeat:
        they are a copy of those for the image, as in the study. text (512,): the text of all
        organs, which replaces that of the weights. Raises ValueError or FileNotFoundError, one
        line, for a file that does not fit.
        """
        weights, settings = swin_unetr3d.read_checkpoint(source, swin_unetr3d.FILES)
        weights = swin_unetr3d.convert(weights)
        if "format" in settings:  # a run folder of ours
            is_plain = settings.get("class") == "SwinUNETR"
            kind = "SwinUNETR" if is_plain else "TextSwinUNETR"
            values = swin_unetr3d.run_config(settings, kind, source, TextConfig)
        else:
            values = swin_unetr3d.config_from_shapes(weights)
            values |= swin_unetr3d.config_from_name(source, settings, quiet="merging" in overrides)
            for layer, option in OPTION_OF.items():
                values[option] = f"{layer}.weight" in weights
        config = TextConfig(**values)
        weights, config, fresh = swin_unetr3d.new_classes(weights, num_classes, config, source)
        if text is not None:
            weights["organ_text"] = text
        model = cls(replace(config, **overrides), weights.get("organ_text"))

        if model.config.concat and not config.concat:
            widen_for_text(weights, repeat, source)
        patterns = [fresh] if fresh else []
        for layer, option in OPTION_OF.items():
            if not getattr(config, option):
                patterns.append(rf"{layer}\..*")
        return swin_unetr3d.load(model, weights, "|".join(patterns), source)


class WithText(nn.Module):
    """A TextSwinUNETR with a fixed text, to be used like a Swin UNETR: volumes in, logits out.

    For example `volumes.segment(WithText(model), "ct.nii.gz")`.
    """

    def __init__(self, model: TextSwinUNETR, text: Tensor | None = None):
        """text (512,); None for the text of all organs."""
        super().__init__()
        self.model = model
        self.text = text
        self.config = model.config
        self.preprocess = model.preprocess
        self.postprocess = model.postprocess

    def forward(self, volume: Tensor) -> Tensor:
        """volume: preprocessed, (B,C,D,H,W) -> logits (B,K,D,H,W)."""
        logits, _ = self.model(volume, self.text)
        return logits


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the models: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

OPTION_OF = {  # layer -> the text option that needs it
    "cross_attention": "attention",
    "text_fc_attention": "attention",
    "text_fc_concat": "concat",
    "text_fc_contrast": "contrast",
}


def widen_for_text(weights: dict[str, Tensor], repeat: bool, source) -> None:
    """Add inputs for the text after those for the image to decoder5, if the weights have it."""
    name = "decoder5.transp_conv.weight"
    if name not in weights:
        return
    image = weights[name]  # (16f,8f,2,2,2)
    text = image if repeat else torch.zeros_like(image)
    weights[name] = torch.cat((image, text))  # (32f,8f,2,2,2)
    kind = "those for the image" if repeat else "0"
    print(f"{source}: decoder5's weights for the text: {kind}")
