"""Few-shot organs: a study's attention between texts and volume, on the models of swin_unetr3d.

Code: github.com/CMPT983-Winter2023/Few-Shot-3D-Medical-Segmentation at 0973c44, and there for
`AttentionUniversal` CLIP-Driven-Universal-Model/model/{Universal_model,CrossAttention}.py (CC
BY-NC-SA 4.0), for `TextSwinUNETR` BTCV/models/model.py (no licence of its own; what it changes,
Project-MONAI/research-contributions, has Apache 2.0). No weights were released.

    AttentionUniversal: code of each class (B,K,256), the volume's GAP (B,256) beside each
      CrossModalTransformer: each of the two through a residual block of attention to itself, then
      the text of attention to the image, then the image of attention to the new text
      controller of both -> (B,K,153), and on as in the Universal Model

    TextSwinUNETR: a text (B,512), of all organs that are wanted; the bottom (B,16f,3,3,3)
      contrast: text_fc_contrast -> (B,16f*27), whose cosine to the bottom is to grow
      attention: text_fc_attention -> (B,16f,27); CrossModalTransformer of it and the bottom, whose
      tokens are the channels; its image becomes the bottom
      concat: behind the bottom comes the text of the attention, or text_fc_concat -> (B,16f,1,1,1)
      decoder5 of it, and on as in Swin UNETR

What the study's code did by mistake is a setting here where it gave numbers: `attend`, `shared`,
`repeat`. Where it crashed, on windows that were not four to a text, it is mended.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swin_unetr3d
from swin_unetr3d import SLOPE, Backbone, Config
from universal import CODE, TEXT, UniversalConfig, UniversalSwinUNETR


@dataclass(frozen=True)
class AttentionConfig(UniversalConfig):
    attend: str = "token"  # of ATTEND


ATTEND = {
    # The study put the classes where its layers have the batch. Over a single token attention has
    # nothing to choose: it is a linear layer, and all of it an MLP of one class and the image.
    "token": "each class by itself, with the image",
    # quirk: the study's code on several volumes. The i-th, from 0, starts from what came out of the
    # one before, whose image of class i is its image: of itself it sees nothing.
    "chain": "as token, and each volume goes on from the one before",
    # What was meant: the K classes are the tokens, next to the image, which is one token, as K
    # equal ones would be. The classes attend to each other and the image to them; that a class
    # attends to the image still leaves it no choice. No parameter is another.
    "classes": "each class to all, whichever are asked for; a further class changes the others",
}


@dataclass(frozen=True)
class TextConfig(Config):
    attention: bool = False
    concat: bool = False
    contrast: bool = False
    # quirk: beside contrast, attention takes text_fc_contrast's text, and text_fc_attention is idle
    shared: bool = True


VARIANTS = {  # parameters
    "universal-attention": AttentionConfig(),  # 65,754,355
    "mini": AttentionConfig(12, codes="random", image_size=(64, 64, 64)),  # for tests and demos
}

TEXT_VARIANTS = {
    "btcv": TextConfig(**swin_unetr3d.BTCV),  # 62,187,296, to which the options add
    "mini": TextConfig(12, num_classes=3, image_size=(96, 64, 64)),
}

# Names of the study's layers: attention, norm, MLP, norm.
STEPS = {
    "text": "text_self_attention text_norm1 text_feedforward text_norm2",
    "image": "img_self_attention img_norm1 img_feedforward img_norm2",
    "text of image": "cross_modal_attention_text cross_modal_norm1_text"
    " cross_modal_feedforward_text cross_modal_norm2_text",
    "image of text": "cross_modal_attention_image cross_modal_norm1_image"
    " cross_modal_feedforward_image cross_modal_norm2_image",
}


class CrossModalTransformer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        for attention, norm1, mlp, norm2 in map(str.split, STEPS.values()):
            self.add_module(attention, nn.MultiheadAttention(dim, heads, batch_first=True))
            self.add_module(norm1, nn.LayerNorm(dim))
            layers = nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
            self.add_module(mlp, nn.Sequential(*layers))
            self.add_module(norm2, nn.LayerNorm(dim))

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x (B,N,C) attends to y (B,M,C) -> (B,N,C)."""
        attention, norm1, mlp, norm2 = map(self.get_submodule, STEPS[name].split())
        x = norm1(x + attention(x, y, y, need_weights=False)[0])
        return norm2(x + mlp(x))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text (B,N,C), image (B,M,C) -> the same shapes."""
        text, image = self.step("text", text, text), self.step("image", image, image)
        text = self.step("text of image", text, image)
        return text, self.step("image of text", image, text)


class AttentionUniversal(UniversalSwinUNETR):
    """The Universal Model whose controller sees code and image after a CrossModalTransformer."""

    CONFIG = AttentionConfig

    def __init__(self, config: AttentionConfig, embedding: Tensor | None = None):
        """embedding (K,512): the codes of "text", which nothing but CLIP can give."""
        super().__init__(config, embedding)
        if config.attend not in ATTEND:
            raise ValueError(f"attend {config.attend!r} is none of {', '.join(ATTEND)}")
        self.cross_attention = CrossModalTransformer(CODE, 4)

    def head_numbers(self, bottom: Tensor, classes: list[int] | None = None) -> Tensor:
        """bottom (B,16f,d,h,w) -> weights and biases of each class's network (B,k,153)."""
        if self.config.attend == "token" or classes is None:
            return super().head_numbers(bottom, classes)
        return super().head_numbers(bottom)[:, classes]  # of which all have a part in each

    def control(self, image: Tensor, codes: Tensor) -> Tensor:
        """(B,k,256) each -> (B,k,153)."""
        if self.config.attend == "classes":
            text, image = self.cross_attention(codes, image[:, :1])  # (B,k,256), (B,1,256)
            return super().control(image.expand_as(text), text)
        if self.config.attend == "token":
            return super().control(*self.alone(image, codes))
        B, k, _ = codes.shape
        if B > k:
            raise ValueError(f"attend 'chain' takes {k} volumes at a time, a class each, not {B}")
        image, text = image[:1], codes[:1]  # (1,k,256)
        numbers = []
        for i in range(B):
            image = image if i == 0 else image[:, i : i + 1].expand_as(text)
            image, text = self.alone(image, text)
            numbers.append(super().control(image, text))
        return torch.cat(numbers)

    def alone(self, image: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(B,k,256) each, every pair of tokens by itself -> the same shapes."""
        pairs = (x.reshape(-1, 1, CODE) for x in (codes, image))  # (B*k,1,256)
        text, image = self.cross_attention(*pairs)
        return image.view(codes.shape), text.view(codes.shape)


class TextSwinUNETR(Backbone):
    """Swin UNETR that is told which organs there are, by one text on them all."""

    def __init__(self, config: TextConfig):
        super().__init__(config)
        c, f = config, config.feature_size
        n = math.prod(side // 32 for side in c.image_size)  # voxels at the bottom, 27
        if c.attention and n % 3:
            raise ValueError(
                f"image_size {c.image_size}: {n} voxels at the bottom, not a multiple of 3"
            )
        if c.contrast:
            self.text_fc_contrast = nn.Linear(TEXT, 16 * f * n)
        if c.attention:
            self.text_fc_attention = nn.Linear(TEXT, 16 * f * n)
            self.text_fc_attention.requires_grad_(not (c.contrast and c.shared))
            self.cross_attention = CrossModalTransformer(n, 3)
        if c.concat:
            self.text_fc_concat = nn.Linear(TEXT, 16 * f)
            self.text_fc_concat.requires_grad_(not c.attention)  # quirk: idle beside attention
            self.decoder5 = swin_unetr3d.UpBlock(32 * f, 8 * f)
        self.out = nn.Conv3d(f, c.num_classes, 1)

    def forward(self, volume: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """volume (B,C,D,H,W) as `preprocess` makes it; text (B,512), or (512,) for all of them.

        -> logits (B,K,D,H,W), and with contrast its loss, of which the study adds a tenth. With
        attention or contrast the sides are those of the config's image_size.
        """
        if text.shape not in ((TEXT,), (1, TEXT), (len(volume), TEXT)):
            expected = f"({TEXT},) or ({len(volume)},{TEXT})"
            raise ValueError(f"text is {tuple(text.shape)}, of this volume {expected}")
        contrast = None

        def fuse(bottom: Tensor) -> Tensor:
            nonlocal contrast
            bottom, contrast = self.fuse(bottom, text.expand(len(volume), TEXT))
            return bottom

        _, x = self.features(volume, fuse)  # (B,f,D,H,W)
        return swin_unetr3d.pointwise(x, self.out.weight, self.out.bias).contiguous(), contrast

    def fuse(self, bottom: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """bottom (B,16f,d,h,w), text (B,512) -> what decoder5 takes, (B,16f or 32f,d,h,w); loss."""
        c, shape, sides = self.config, bottom.shape, tuple(32 * side for side in bottom.shape[2:])
        if (c.attention or c.contrast) and sides != tuple(c.image_size):
            raise ValueError(f"volume's sides are {sides}, the text options take {c.image_size}")
        image, contrast = bottom.flatten(2), None  # (B,16f,n)
        if c.contrast:
            about = F.leaky_relu(self.text_fc_contrast(text), SLOPE)  # (B,16f*n)
            same = text.new_ones(len(text))
            contrast = F.cosine_embedding_loss(about, image.flatten(1), same)
        if c.attention:
            if not (c.contrast and c.shared):
                about = F.leaky_relu(self.text_fc_attention(text), SLOPE)
            about, image = self.cross_attention(about.view(image.shape), image)  # (B,16f,n) each
        elif c.concat:
            about = F.leaky_relu(self.text_fc_concat(text), SLOPE)[..., None].expand_as(image)
        bottom = torch.cat((image, about), 1) if c.concat else image
        return bottom.view(len(bottom), -1, *shape[2:]), contrast

    @classmethod
    def from_pretrained(
        cls, source: str | Path, num_classes: int | None = None, repeat=False, **overrides
    ) -> "TextSwinUNETR":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of TextConfig.

        A file of Swin UNETR, or of its encoder alone, gets the options from them; what is new is
        printed. decoder5's weights for the text are then 0, so that concat alone begins as the
        plain model; repeat: those for the image once more, as in the study. Evaluation mode.
        """
        weights, settings = swin_unetr3d.read_checkpoint(source, swin_unetr3d.FILES)
        weights = swin_unetr3d.convert(weights)
        if "format" in settings:  # a run folder of ours
            values = swin_unetr3d.run_config(settings, "TextSwinUNETR", source, TextConfig)
            config = TextConfig(**values)
        else:
            told = swin_unetr3d.told_by_name(source, settings, "merging" in overrides)
            told |= {option: f"{part}.weight" in weights for part, option in PARTS.items()}
            config = TextConfig(**swin_unetr3d.sizes(weights) | told)
        weights, config, fresh = swin_unetr3d.new_classes(weights, num_classes, config, source)
        model = cls(replace(config, **overrides))
        name = "decoder5.transp_conv.weight"
        if model.config.concat and not config.concat and name in weights:
            image = weights[name]  # (16f,8f,2,2,2)
            weights[name] = torch.cat((image, image if repeat else torch.zeros_like(image)))
            told = "those for the image" if repeat else "0"
            print(f"{source}: decoder5's weights for the text: {told}")
        new = [part for part, option in PARTS.items() if not getattr(config, option)]
        fresh = "|".join(filter(None, (fresh, *(rf"{part}\..*" for part in new))))
        return swin_unetr3d.load(model, weights, fresh, source)


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model.
# --------------------------------------------------------------------------------------------------


PARTS = {  # of the model -> the option that has them
    "cross_attention": "attention",
    "text_fc_attention": "attention",
    "text_fc_concat": "concat",
    "text_fc_contrast": "contrast",
}
