"""The networks of the models for images: class maps, CRIS, CLIPSeg and BiomedCLIPSeg."""

import torch
from torch import Tensor, nn

from exporting.parts import Part
from prediction.models import LoadedModel

# Models that take any size of image. The others are exported for the size that they resize images
# to: DPT, BEiT and the CLIP models interpolate tables of positions, and UPerNet pools its last map
# into 6x6 cells, for which ONNX has no operator unless the map's size is known.
ANY_SIZE = ("segformer",)
PROMPTS = ("a polyp", "two")  # example texts; their token counts differ


class CLIPSegPart(nn.Module):
    """A part of a CLIPSeg or BiomedCLIPSeg, as a network of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()


class VisionTower(CLIPSegPart):
    """The part that encodes an image, once for all of its prompts."""

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,L,1+S/16,S/16,C)."""
        return self.model.encode_image(image)


class TextTower(CLIPSegPart):
    """The part that encodes a prompt, once for all images."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) int64 -> condition (B,embed_dim)."""
        return self.model.encode_text(tokens)


class MaskDecoder(CLIPSegPart):
    """The part that segments an encoded image by an encoded prompt."""

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """features (B,L,1+S/16,S/16,C), condition (B,embed_dim) -> logits (B,1,S,S)."""
        return self.model.decode(features, condition=condition)


def parts(loaded: LoadedModel) -> list[Part]:
    """Return the networks of a model for images, in the order in which they run."""
    name = loaded.weights.name
    if name in ("clipseg", "biomedclipseg"):
        return clipseg_parts(loaded)

    inputs = {"image": example_images(loaded)}  # (2,3,S,S)
    dynamic = {"image": {0: "batch"}}
    if name in ANY_SIZE:
        dynamic["image"] |= {2: "height", 3: "width"}
    if name == "cris":
        inputs["tokens"] = example_tokens(loaded)  # (2,T)
        dynamic["tokens"] = {0: "batch"}
    return [Part("network", loaded.model, inputs, ("logits",), dynamic)]


def clipseg_parts(loaded: LoadedModel) -> list[Part]:
    """Return the vision tower, the text tower and the decoder of a CLIPSeg or BiomedCLIPSeg."""
    images = example_images(loaded)  # (2,3,S,S)
    tokens = example_tokens(loaded)  # (2,T)
    vision = VisionTower(loaded.model)
    text = TextTower(loaded.model)
    with torch.no_grad():
        features = vision(images)  # (2,L,1+S/16,S/16,C)
        condition = text(tokens)  # (2,embed_dim)

    batch = {0: "batch"}
    return [
        Part("vision", vision, {"image": images}, ("features",), {"image": batch}),
        Part("text", text, {"tokens": tokens}, ("condition",), {"tokens": batch}),
        Part(
            "decoder",
            MaskDecoder(loaded.model),
            {"features": features, "condition": condition},
            ("logits",),
            {"features": batch, "condition": batch},
        ),
    ]


def example_images(loaded: LoadedModel) -> Tensor:
    """Return two images of random numbers as a model's `preprocess` would: (2,3,S,S) float32."""
    side = loaded.config.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def example_tokens(loaded: LoadedModel) -> Tensor:
    """Return the tokens of two texts, padded to the model's text length: (2,T) int64."""
    return loaded.recipe.tokenizer(list(PROMPTS))
