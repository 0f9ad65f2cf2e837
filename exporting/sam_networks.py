"""The networks of SAM: the image encoder, and the decoder of prompts to masks."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporting.parts import Part
from prediction.models import LoadedModel
from sam_decoder import SAM, VisionAttention, widened_attention


def parts(loaded: LoadedModel) -> list[Part]:
    """Return SAM's encoder and decoder, for B images and N prompts.

    encoder: image (B,3,S,S) -> features (B,C,S/16,S/16)
    decoder: features, image_index (N,), points (N,n,2), labels (N,n)
      -> masks (N,1,S/4,S/4), iou (N,1)

    A prompt of the decoder is a list of n points, as `Decoder.forward` describes.
    """
    config = loaded.config
    side = config.image_size // 16
    image = torch.randn(2, 3, config.image_size, config.image_size)
    encoder = Part(
        "encoder", Encoder(loaded.model), {"image": image}, ("features",), {"image": {0: "batch"}}
    )

    # Three prompts, each of two points and a box.
    inputs = {
        "features": torch.randn(2, config.out_dim, side, side),
        "image_index": torch.tensor([0, 1, 1]),
        "points": torch.rand(3, 4, 2) * config.image_size,
        "labels": torch.tensor([1, 0, 2, 3]).repeat(3, 1),  # (3,4)
    }
    dynamic = {
        "features": {0: "batch"},
        "image_index": {0: "prompts"},
        "points": {0: "prompts", 1: "length"},
        "labels": {0: "prompts", 1: "length"},
    }
    decoder = Part("decoder", Decoder(loaded.model), inputs, ("masks", "iou"), dynamic)
    return [encoder, decoder]


class Encoder(nn.Module):
    """SAM's image encoder, whose attention has no loop over parts of the image while traced."""

    def __init__(self, model: SAM):
        super().__init__()
        self.vision_encoder = model.vision_encoder
        for module in self.modules():
            if isinstance(module, VisionAttention):
                module.attention_for = partial(traced_attention, module.attention_for)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C,S/16,S/16)."""
        return self.vision_encoder(image)


def traced_attention(choose: Callable, q: Tensor, by_row: Tensor) -> Callable:
    """Return the attention to use: choose(q, by_row), a method of `VisionAttention`.

    While a model is traced, it is `widened_attention`, which equals the others.
    """
    if torch.compiler.is_compiling():
        return widened_attention
    return choose(q, by_row)


class Decoder(nn.Module):
    """SAM's prompt encoder and mask decoder, for prompts that are lists of labelled points."""

    def __init__(self, model: SAM):
        super().__init__()
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder
        self.eval()

    def forward(
        self, features: Tensor, image_index: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Equal `SAM.decode` for boxes and points. features (B,C,S/16,S/16) of B images.

        image_index (N,): the image of each of N prompts
        points (N,n,2): x, y in pixels of the SxS input
        labels (N,n): 1 inside of the object, 0 outside, 2 and 3 the upper left and the lower right
        corner of a box, -1 no point. As in the authors' ONNX files, a prompt without a box needs
        one more point of label -1.

        -> masks (N,1,S/4,S/4), logits; predicted IoU (N,1)
        """
        encoder = self.prompt_encoder
        kinds = [encoder.not_a_point_embed.weight]
        for embedding in encoder.point_embed:
            kinds.append(embedding.weight)
        kind = F.embedding(labels + 1, torch.cat(kinds))  # (N,n,C)

        centres = points + 0.5  # of the pixels
        position = encoder.shared_embedding(centres / encoder.image_size)  # (N,n,C)
        is_point = (labels >= 0)[..., None]  # (N,n,1)
        sparse = torch.where(is_point, position, 0) + kind  # (N,n,C)

        # Each prompt gets its own image, so that there is one prompt per image.
        features = features[image_index]  # (N,C,S/16,S/16)
        dense = encoder.no_mask_embed.weight[0, :, None, None]  # (C,1,1)
        grid = encoder.grid_positions(features.shape[3])  # (H*W,C)
        masks, iou = self.mask_decoder(features, grid, sparse[:, None], dense, multimask=False)
        return masks[:, 0], iou[:, 0]
