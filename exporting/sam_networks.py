"""The networks of SAM: the image encoder, and the decoder of prompts to masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporting.parts import Part
from prediction.models import LoadedModel
from sam_decoder import SAM, VisionAttention, widened_attention

DYNAMIC_PROMPTS = {0: "batch", 1: "prompts", 2: "tokens"}


def parts(loaded: LoadedModel) -> list[Part]:
    """Return SAM's encoder and decoder.

    encoder: image (B,3,S,S) -> features (B,C,S/16,S/16)
    decoder: features, points (B,Q,n,2), labels (B,Q,n) -> masks (B,Q,1,S/4,S/4), iou (B,Q,1)

    A prompt of the decoder is a list of n points, as `Decoder.forward` describes.
    """
    config = loaded.config
    side = config.image_size // 16
    image = torch.randn(2, 3, config.image_size, config.image_size)
    encoder = Part(
        "encoder", Encoder(loaded.model), {"image": image}, ("features",), {"image": {0: "batch"}}
    )

    # Two images with three prompts each: two points and a box.
    labels = torch.tensor([1, 0, 2, 3]).repeat(2, 3, 1)  # (2,3,4)
    inputs = {
        "features": torch.randn(2, config.out_dim, side, side),
        "points": torch.rand(2, 3, 4, 2) * config.image_size,
        "labels": labels,
    }
    dynamic = {"features": {0: "batch"}, "points": DYNAMIC_PROMPTS, "labels": DYNAMIC_PROMPTS}
    decoder = Part("decoder", Decoder(loaded.model), inputs, ("masks", "iou"), dynamic)
    return [encoder, decoder]


class Encoder(nn.Module):
    """SAM's image encoder, whose attention has no loop over parts of the image while traced."""

    def __init__(self, model: SAM):
        super().__init__()
        self.vision_encoder = model.vision_encoder
        for module in self.modules():
            if isinstance(module, VisionAttention):
                module.attention_for = attention_for(module.attention_for)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C,S/16,S/16)."""
        return self.vision_encoder(image)


def attention_for(choose):
    """Return a function like `VisionAttention.attention_for`, the method `choose`.

    While a model is traced, it always returns `widened_attention`, which equals the others.
    """

    def choose_traced(q: Tensor, by_row: Tensor):
        if torch.compiler.is_compiling():
            return widened_attention
        return choose(q, by_row)

    return choose_traced


class Decoder(nn.Module):
    """SAM's prompt encoder and mask decoder, for prompts that are lists of labelled points."""

    def __init__(self, model: SAM):
        super().__init__()
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder
        self.eval()

    def forward(self, features: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Equal `SAM.decode` for boxes and points. features (B,C,S/16,S/16) of B images.

        points (B,Q,n,2): x, y of Q prompts per image, in pixels of the SxS input
        labels (B,Q,n): 1 inside of the object, 0 outside, 2 and 3 the upper left and the lower
        right corner of a box, -1 no point. As in the authors' ONNX files, a prompt without a box
        needs one more point of label -1.

        -> masks (B,Q,1,S/4,S/4), logits; predicted IoU (B,Q,1)
        """
        encoder = self.prompt_encoder
        kinds = [encoder.not_a_point_embed.weight]
        for embedding in encoder.point_embed:
            kinds.append(embedding.weight)
        kind = F.embedding(labels + 1, torch.cat(kinds))  # (B,Q,n,C)

        centres = points + 0.5  # of the pixels
        position = encoder.shared_embedding(centres / encoder.image_size)  # (B,Q,n,C)
        is_point = (labels >= 0)[..., None]  # (B,Q,n,1)
        sparse = torch.where(is_point, position, 0) + kind  # (B,Q,n,C)

        dense = encoder.no_mask_embed.weight[0, :, None, None]  # (C,1,1)
        grid = encoder.grid_positions(features.shape[3])  # (H*W,C)
        return self.mask_decoder(features, grid, sparse, dense, multimask=False)
