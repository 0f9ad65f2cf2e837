"""SAM (Segment Anything): segments objects given boxes, points or rough masks as prompts.

Paper: Kirillov et al., ICCV 2023, arXiv 2304.02643. The authors' code (Apache 2.0): github.com/
facebookresearch/segment-anything at dca509f. Parameters are named as in transformers 5.23
(modeling_sam.py). Weights (Apache 2.0): facebook/sam-vit-base, -large, -huge on the hub; the
authors' sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth. MedSAM, Ma et al., Nature
Communications 2024, arXiv 2304.12306, is SAM with other weights (`RELEASED`) and another
preprocessing (`MEDSAM`). This file is self-contained. Left out: automatic masks from a grid of
points, sizes for ONNX, transformers' label -10.

Shapes at the default size, for Q prompts per image. Coordinates are pixels of the 1024 square.

    image (B,3,1024,1024)
      vision_encoder: 16x16 patches; 12 blocks, 4 with global attention, 8 in 14x14 windows; a neck
    features (B,256,64,64)
    boxes (B,Q,4); points (B,Q,P,2) with labels (B,Q,P)
      prompt_encoder: Fourier features plus a learned embedding per kind of point
    sparse (B,Q,n,256): 2 tokens per box, 1 per point, 1 for padding if points have no box
    masks (B,Q,1,256,256), logits
      prompt_encoder: three convolutions, or one learned vector if there are no masks
    dense (B,Q,256,64,64) or (256,1,1)
    keys = features + dense (B, Q or 1, 4096, 256); tokens = 5 output tokens, sparse (B,Q,5+n,256)
      mask_decoder: two blocks; in each, tokens attend to keys, then keys to tokens
      each of the 4 mask tokens -> MLP -> 32 weights; masks = weights @ upscaled keys
    masks (B,Q,M,256,256), logits, and predicted IoU (B,Q,M); M is 1, or 3 with multimask=True

    model = SAM.from_pretrained("facebook/sam-vit-base")
    probabilities, masks = model.segment("photo.jpg", boxes=[[10, 20, 110, 90]])  # x1, y1, x2, y2
"""

import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Letters in shapes: B images, C channels, H and W height and width, N tokens, h attention heads,
# d channels of a head, Q prompts per image, P points of a prompt, n sparse tokens of a prompt,
# M masks per prompt, S side of the square input in pixels.
#
# A path above a class is where the authors' code has it, within segment_anything/. "quirk:" marks
# what one would write differently, but the released weights need. Code between "# shared: NAME" and
# "# end shared" is the same in several model files.


@dataclass(frozen=True)
class Config:
    dim: int = 768  # channels of the image encoder
    depth: int = 12  # blocks of the image encoder
    heads: int = 12  # attention heads of the image encoder
    mlp_dim: int = 3072  # hidden channels of the image encoder's MLPs
    # indices of the blocks with global attention; the others use windows
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    out_dim: int = 256  # channels of the features, the prompt tokens and the mask decoder
    eps: float = 1e-6  # of the norms in TwoWayBlock: transformers' value; the authors' is 1e-5
    image_size: int = 1024  # side of the square input in pixels, a multiple of 16
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in 0..1, from ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: str = "bilinear"  # name of a PIL.Image.Resampling filter
    letterbox: bool = True  # keep the aspect ratio, pad at the bottom and right; False: stretch
    min_max: bool = False  # rescale each image's values to 0..1, all channels together
    threshold: float = 0.5  # probability above which a pixel belongs to the object


VARIANTS = {  # numbers of parameters
    "vit-base": Config(),  # 93,735,472, with 4,058,340 in the mask decoder
    "vit-large": Config(  # 312,342,832
        dim=1024, depth=24, heads=16, mlp_dim=4096, global_blocks=(5, 11, 17, 23)
    ),
    "vit-huge": Config(  # 641,090,608
        dim=1280, depth=32, heads=16, mlp_dim=5120, global_blocks=(7, 15, 23, 31)
    ),
    "mini": Config(  # 573,320; for tests and demos
        dim=64, depth=4, heads=2, mlp_dim=256, global_blocks=(1, 3), out_dim=64, image_size=256
    ),
}
# The preprocessing of MedSAM. It is applied automatically to the released MedSAM checkpoints, which
# are recognised by name. Other files of MedSAM need from_pretrained(file, **MEDSAM).
MEDSAM = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "resample": "bicubic",
    "letterbox": False,
    "min_max": True,
}
WINDOW = 14  # side of an attention window in tokens

# --- image encoder --------------------------------------------------------------------------------


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


# modeling/common.py, class MLPBlock
class MLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, dim: int, hidden: int, activation: Callable):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (...,C) -> (...,C)."""
        return self.lin2(self.activation(self.lin1(x)))


# The image encoder adds a bias to the attention scores, which depends on the query and on the row
# and the column of the key. The next two functions compute this attention without holding all
# scores; `VisionAttention` chooses between them.

# Maximum elements in the buffer of `bias_attention` (32 MB in float32). It may have 1 GB on a GPU,
# where many small calls are slow.
MAX_BIAS_ELEMENTS = 2**23
MAX_BIAS_ELEMENTS_ON_GPU = 2**28


def bias_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend among side x side tokens, with a bias per query for each row and column of keys.

    Equals the following, without allocating the full bias (805 MB for one image in a global block
    of ViT-B, float32):

        bias = by_row[..., :, None] + by_column[..., None, :]  # (B,h,side,side,side,side)
        bias = bias.view(B, h, side * side, side * side)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    A few rows of queries attend at a time. Their bias is written into a small buffer, which the
    next rows overwrite, so the bias gets no gradient.

    B counts the windows of all images.
    q, k, v (B,h,side*side,d)
    by_row (B,h,side,side,side): query y, query x, key y
    by_column (B,h,side,side,side): query y, query x, key x
    -> (B,h,side*side,d)
    """
    B, h, side = by_row.shape[:3]
    limit = MAX_BIAS_ELEMENTS if q.device.type == "cpu" else MAX_BIAS_ELEMENTS_ON_GPU
    rows = min(side, max(1, limit // (B * h * side**3)))
    buffer = by_row.new_empty(B, h, rows, side, side, side)  # query y, query x, key y, key x

    outputs = []
    for start in range(0, side, rows):
        row_bias = by_row[:, :, start : start + rows, :, :, None]  # (B,h,rows,side,side,1)
        column_bias = by_column[:, :, start : start + rows, :, None, :]  # (B,h,rows,side,1,side)
        count = row_bias.shape[2]  # fewer than `rows` at the end
        bias = torch.add(row_bias, column_bias, out=buffer[:, :, :count])
        bias = bias.flatten(4).flatten(2, 3)  # (B,h,rows*side,side*side)

        queries = q[:, :, start * side : (start + rows) * side]  # (B,h,rows*side,d)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)  # (B,h,rows*side,d)
        outputs.append(out)
    return torch.cat(outputs, 2)  # (B,h,side*side,d)


def widened_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend like `bias_attention`, but differentiably in the bias and without an attention mask.

    Equals the plain lines given there, up to rounding. Shapes are the same, too.

    Each query is extended by its 2*side biases, each key by the one-hot codes of its row and its
    column. After the usual scaling, their dot product is q.k / sqrt(d) + bias, so kernels without
    an attention mask, which never materialise the scores, can be used.
    """
    side = by_row.shape[2]
    d = q.shape[3]

    one_hot = torch.eye(side, dtype=k.dtype, device=k.device)  # (side,side)
    key_row = one_hot.repeat_interleave(side, 0)  # (side*side,side)
    key_column = one_hot.repeat(side, 1)  # (side*side,side)
    key_codes = torch.cat([key_row, key_column], 1)  # (side*side,2*side)
    query_bias = torch.cat([by_row, by_column], 4).flatten(2, 3)  # (B,h,side*side,2*side)

    # The scale divides the bias by sqrt(d), too, so it is multiplied by sqrt(d) before.
    q = torch.cat([q, query_bias * d**0.5], 3)  # (B,h,side*side,d+2*side)
    k = torch.cat([k, key_codes.expand(*k.shape[:2], -1, -1)], 3)  # (B,h,side*side,d+2*side)
    v = F.pad(v, (0, 2 * side))  # (B,h,side*side,d+2*side), as some kernels need one width
    out = F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)  # (B,h,side*side,d+2*side)
    return out[..., :d]  # (B,h,side*side,d)


# modeling/image_encoder.py, class Attention, window_partition and add_decomposed_rel_pos
class VisionAttention(nn.Module):
    """Multi-head attention within windows of side x side tokens, with relative positions.

    Global attention is a single window as large as the feature map.
    """

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.side = side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,H,C) -> (B,H,H,C)."""
        B, H = x.shape[:2]
        side = self.side
        windows = (H + side - 1) // side  # per row and column; the last may reach beyond the map
        size = windows * side

        qkv = self.pad_to(size, self.qkv(x))  # (B,size,size,3C)
        # (B, window row, y, window column, x, 3, head, d)
        qkv = qkv.view(B, windows, side, windows, side, 3, self.heads, -1)
        # (3, B, window row, window column, head, y, x, d)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.flatten(1, 3).flatten(3, 4)  # (B*windows*windows,h,side*side,d) each

        by_row, by_column = self.position_bias(q)  # (B*windows*windows,h,side,side,side) each
        attend = self.attention_for(q, by_row)
        out = attend(q, k, v, by_row, by_column)  # (B*windows*windows,h,side*side,d)

        # (B, window row, window column, head, y, x, d)
        out = out.view(B, windows, windows, self.heads, side, side, -1)
        # (B, window row, y, window column, x, head, d)
        out = out.permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(B, size, size, -1)[:, :H, :H]  # (B,H,H,C)
        return self.proj(out)

    def pad_to(self, size: int, qkv: Tensor) -> Tensor:
        """Pad queries, keys and values at the bottom and right: (B,H,H,3C) -> (B,size,size,3C).

        quirk: the authors pad with zeros between the norm and `qkv`, so the q, k and v of a padded
        token equal the bias of `qkv`, and padded tokens are not masked. Here the padding comes
        after `qkv`, which gives the same values for less work.
        """
        B, H = qkv.shape[:2]
        if size == H:
            return qkv
        padded = self.qkv.bias.to(qkv.dtype).expand(B, size, size, -1).clone()
        padded[:, :H, :H] = qkv
        return padded

    def position_bias(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the biases of each query for the rows and for the columns of the keys.

        q (B,h,side*side,d) -> by_row, by_column (B,h,side,side,side), as in `bias_attention`.
        """
        side = self.side
        position = torch.arange(side, device=q.device)
        offset = position[:, None] - position + side - 1  # (side,side): query - key, from 0 on
        along_h = self.rel_pos_h[offset]  # (side,side,d)
        along_w = self.rel_pos_w[offset]  # (side,side,d)

        # quirk: the bias uses q unscaled, although the scores use q / sqrt(d)
        q = q.unflatten(2, (side, side))  # (B,h,side,side,d)
        by_row = torch.einsum("bhyxd,ykd->bhyxk", q, along_h)  # (B,h,side,side,side)
        by_column = torch.einsum("bhyxd,xkd->bhyxk", q, along_w)  # (B,h,side,side,side)
        return by_row, by_column

    def attention_for(self, q: Tensor, by_row: Tensor) -> Callable:
        """Return `widened_attention` where gradients need it or where it is faster."""
        if by_row.requires_grad:  # `bias_attention` has no gradient for the bias
            return widened_attention
        # In half precision, a GPU has its fastest kernels for attention without a mask.
        is_half_on_gpu = q.device.type != "cpu" and q.dtype != torch.float32
        is_global = self.side > WINDOW
        if is_half_on_gpu and is_global:
            return widened_attention
        return bias_attention


# modeling/image_encoder.py, class Block
class VisionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, side: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VisionAttention(dim, heads, side)
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        x = x + self.attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


# modeling/image_encoder.py, class ImageEncoderViT
class VisionEncoder(nn.Module):
    """A ViT without a class token, and a neck that reduces its channels."""

    def __init__(self, config: Config):
        super().__init__()
        grid = config.image_size // 16  # patches along a side
        projection = nn.Conv2d(3, config.dim, 16, stride=16)
        # nested to match the checkpoint's parameter names
        self.patch_embed = nn.ModuleDict({"projection": projection})
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.dim))

        self.layers = nn.Sequential()
        for i in range(config.depth):
            side = grid if i in config.global_blocks else WINDOW
            self.layers.append(VisionBlock(config.dim, config.heads, config.mlp_dim, side))

        self.neck = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(config.dim, config.out_dim, 1, bias=False),
                layer_norm1=LayerNorm2d(config.out_dim),
                conv2=nn.Conv2d(config.out_dim, config.out_dim, 3, padding=1, bias=False),
                layer_norm2=LayerNorm2d(config.out_dim),
            )
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,out_dim,S/16,S/16)."""
        x = self.patch_embed["projection"](image).permute(0, 2, 3, 1)  # (B,H,W,C)
        x = self.layers(x + self.pos_embed)  # (B,H,W,C)
        return self.neck(x.permute(0, 3, 1, 2))  # (B,out_dim,H,W)


# --- prompt encoder -------------------------------------------------------------------------------


# modeling/prompt_encoder.py, class PositionEmbeddingRandom
class FourierFeatures(nn.Module):
    """Random Fourier features of 2-D positions, with fixed directions."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, dim // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """xy (...,2), 0..1 along the sides of the image -> (...,C)."""
        xy = (2 * xy - 1).to(self.positional_embedding.dtype)
        x, y = xy.unsqueeze(-1).unbind(-2)  # (...,1) each
        # Under autocast, a matrix product would be computed in bfloat16, too imprecise for sines of
        # large phases. Elementwise operations stay in float32.
        phase = x * self.positional_embedding[0] + y * self.positional_embedding[1]  # (...,C/2)
        phase = 2 * math.pi * phase
        return torch.cat([phase.sin(), phase.cos()], -1)  # (...,C)


# modeling/prompt_encoder.py, class PromptEncoder
class PromptEncoder(nn.Module):
    """Encodes points and boxes as tokens, masks as a feature map."""

    def __init__(self, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.shared_embedding = FourierFeatures(dim)
        # 0: point outside of the object, 1: point inside, 2: upper left corner, 3: lower right
        self.point_embed = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_embed = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 4, 2, stride=2),
                layer_norm1=LayerNorm2d(4),
                gelu1=nn.GELU(),
                conv2=nn.Conv2d(4, 16, 2, stride=2),
                layer_norm2=LayerNorm2d(16),
                gelu2=nn.GELU(),
                conv3=nn.Conv2d(16, dim, 1),
            )
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def grid_positions(self, side: int) -> Tensor:
        """Return the Fourier features of the centres of side x side patches: (side*side,C)."""
        centre = torch.arange(side, device=self.no_mask_embed.weight.device) + 0.5
        grid = torch.meshgrid(centre / side, centre / side, indexing="xy")
        xy = torch.stack(grid, -1)  # (side,side,2)
        return self.shared_embedding(xy).flatten(0, 1)  # (side*side,C)

    def forward(self, boxes, points, labels, masks) -> tuple[Tensor | None, Tensor]:
        """Encode prompts as `SAM.decode` takes them, None for a kind that is not used.

        -> sparse (B,Q,n,C), None for masks alone; dense (B,Q,C,H,W), or (C,1,1) without masks.
        n is P+1 for points alone, 2 for a box, P+2 for both.
        """
        tokens = []
        if points is not None:
            if boxes is None:  # quirk: a padding point stands in for the missing box
                points = F.pad(points, (0, 0, 0, 1))  # (B,Q,P+1,2)
                labels = F.pad(labels, (0, 1), value=-1)  # (B,Q,P+1)
            tokens.append(self.embed_points(points, labels))
        if boxes is not None:
            tokens.append(self.embed_boxes(boxes))
        sparse = torch.cat(tokens, 2) if tokens else None  # (B,Q,n,C)

        if masks is None:
            dense = self.no_mask_embed.weight[0, :, None, None]  # (C,1,1)
        else:
            dense = self.mask_embed(masks.flatten(0, 1))  # (B*Q,C,H,W)
            dense = dense.unflatten(0, masks.shape[:2])  # (B,Q,C,H,W)
        return sparse, dense

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """points (B,Q,P,2), labels (B,Q,P) -> (B,Q,P,C)."""
        centres = points + 0.5  # of the pixels
        x = self.shared_embedding(centres / self.image_size)  # (B,Q,P,C)
        labels = labels[..., None]  # (B,Q,P,1)
        outside = self.point_embed[0].weight[0]  # (C,)
        inside = self.point_embed[1].weight[0]  # (C,)
        x = x + torch.where(labels == 1, inside, outside)
        return torch.where(labels == -1, self.not_a_point_embed.weight[0], x)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """boxes (B,Q,4) -> (B,Q,2,C), a token for each of two corners."""
        centres = boxes.unflatten(2, (2, 2)) + 0.5  # (B,Q,2,2), of the pixels at the corners
        x = self.shared_embedding(centres / self.image_size)  # (B,Q,2,C)
        upper_left = self.point_embed[2].weight[0]  # (C,)
        lower_right = self.point_embed[3].weight[0]  # (C,)
        return x + torch.stack([upper_left, lower_right])


# --- mask decoder ---------------------------------------------------------------------------------


# modeling/transformer.py, class Attention
class Attention(nn.Module):
    """8-head attention whose projections have `inner` channels."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B,Q,N,C), k and v (B,Q,N',C) -> (B,Q,N,C).

        The Q axis of q, or of k and v, may be 1 if all prompts share those tokens. They are then
        projected once and expanded.
        """
        Q = max(q.shape[1], k.shape[1])
        q = self.q_proj(q)
        k = self.k_proj(k)
        v = self.v_proj(v)

        q = self.split_heads(q, Q)  # (B*Q,h,N,d)
        k = self.split_heads(k, Q)  # (B*Q,h,N',d)
        v = self.split_heads(v, Q)  # (B*Q,h,N',d)
        out = F.scaled_dot_product_attention(q, k, v)  # (B*Q,h,N,d)
        out = out.transpose(1, 2).flatten(2)  # (B*Q,N,h*d)
        return self.out_proj(out).unflatten(0, (-1, Q))  # (B,Q,N,C)

    def split_heads(self, x: Tensor, Q: int) -> Tensor:
        """x (B, Q or 1, N, h*d) -> (B*Q,h,N,d)."""
        x = x.unflatten(3, (8, -1)).transpose(2, 3)  # (B, Q or 1, h, N, d)
        return x.expand(-1, Q, -1, -1, -1).flatten(0, 1)  # (B*Q,h,N,d)


# modeling/transformer.py, class TwoWayAttentionBlock
class TwoWayBlock(nn.Module):
    """Attention among tokens, from tokens to the image, and from the image to tokens."""

    def __init__(self, dim: int, eps: float, is_first: bool):
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(dim, dim)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn_token_to_image = Attention(dim, dim // 2)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 8 * dim, F.relu)
        self.layer_norm3 = nn.LayerNorm(dim, eps=eps)
        self.layer_norm4 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn_image_to_token = Attention(dim, dim // 2)

    def forward(
        self, queries: Tensor, keys: Tensor, tokens: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries, tokens (B,Q,N,C), keys (B, Q or 1, H*W, C), position (H*W,C) -> queries, keys.

        `tokens`, the initial queries, are added again before each attention as positional encoding.
        """
        # quirk: the first block's self-attention has no residual and no positions
        if self.is_first:
            queries = self.self_attn(queries, queries, queries)
        else:
            queries = queries + self.self_attn(queries + tokens, queries + tokens, queries)
        queries = self.layer_norm1(queries)  # (B,Q,N,C)

        keys_with_position = keys + position  # (B, Q or 1, H*W, C)
        update = self.cross_attn_token_to_image(queries + tokens, keys_with_position, keys)
        queries = self.layer_norm2(queries + update)  # (B,Q,N,C)

        queries = self.layer_norm3(queries + self.mlp(queries))  # (B,Q,N,C)

        update = self.cross_attn_image_to_token(keys_with_position, queries + tokens, queries)
        keys = self.layer_norm4(keys + update)  # (B,Q,H*W,C)
        return queries, keys


# modeling/transformer.py, class TwoWayTransformer
class TwoWayTransformer(nn.Module):
    """Two blocks, then a last attention from the tokens to the image."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        first = TwoWayBlock(dim, eps, is_first=True)
        second = TwoWayBlock(dim, eps, is_first=False)
        self.layers = nn.ModuleList([first, second])
        self.final_attn_token_to_image = Attention(dim, dim // 2)
        self.layer_norm_final_attn = nn.LayerNorm(dim)  # eps 1e-5 in transformers, too

    def forward(self, tokens: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B,Q,N,C), keys (B, Q or 1, H*W, C), position (H*W,C) -> tokens, keys."""
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, position)
        update = self.final_attn_token_to_image(queries + tokens, keys + position, keys)
        return self.layer_norm_final_attn(queries + update), keys  # (B,Q,N,C), (B,Q,H*W,C)


# modeling/mask_decoder.py, class MLP
def three_layer_mlp(dim: int, out_dim: int) -> nn.Sequential:
    """Return an MLP with two hidden layers of `dim` channels: (...,dim) -> (...,out_dim)."""
    return nn.Sequential(
        OrderedDict(
            proj_in=nn.Linear(dim, dim),
            relu1=nn.ReLU(),
            # nested to match the checkpoint's parameter names
            layers=nn.Sequential(nn.Linear(dim, dim)),
            relu2=nn.ReLU(),
            proj_out=nn.Linear(dim, out_dim),
        )
    )


# modeling/mask_decoder.py, class MaskDecoder
class MaskDecoder(nn.Module):
    """Predicts masks and their IoU from image features and encoded prompts."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.iou_token = nn.Embedding(1, dim)
        # Token 0 gives the single mask, tokens 1 to 3 the multimask output.
        self.mask_tokens = nn.Embedding(4, dim)
        self.transformer = TwoWayTransformer(dim, eps)
        self.upscale_conv1 = nn.ConvTranspose2d(dim, dim // 4, 2, stride=2)
        self.upscale_layer_norm = LayerNorm2d(dim // 4)
        self.upscale_conv2 = nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2)
        mlps = [three_layer_mlp(dim, dim // 8) for _ in range(4)]  # one per mask token
        self.output_hypernetworks_mlps = nn.ModuleList(mlps)
        self.iou_prediction_head = three_layer_mlp(dim, 4)

    def forward(self, features, position, sparse, dense, multimask: bool) -> tuple[Tensor, Tensor]:
        """Decode features (B,C,H,W), their positions (H*W,C), and sparse and dense prompts.

        -> masks (B,Q,M,4H,4W), logits; iou (B,Q,M).
        """
        keys = features[:, None] + dense  # (B,Q,C,H,W); Q is 1 here if there are no mask prompts
        size = keys.shape[3:]
        keys = keys.flatten(3).transpose(2, 3)  # (B, Q or 1, H*W, C)

        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (5,C)
        if sparse is None:
            tokens = tokens.expand(*keys.shape[:2], -1, -1)  # (B,Q,5,C)
        else:
            tokens = tokens.expand(*sparse.shape[:2], -1, -1)  # (B,Q,5,C)
            tokens = torch.cat([tokens, sparse], 2)  # (B,Q,5+n,C)
        B, Q = tokens.shape[:2]
        tokens, keys = self.transformer(tokens, keys, position)  # (B,Q,5+n,C), (B,Q,H*W,C)

        x = keys.transpose(2, 3).flatten(0, 1).unflatten(2, size)  # (B*Q,C,H,W)
        x = F.gelu(self.upscale_layer_norm(self.upscale_conv1(x)))  # (B*Q,C/4,2H,2W)
        x = F.gelu(self.upscale_conv2(x))  # (B*Q,C/8,4H,4W)
        x = x.unflatten(0, (B, Q))  # (B,Q,C/8,4H,4W)

        vectors = []
        for i, mlp in enumerate(self.output_hypernetworks_mlps):
            vectors.append(mlp(tokens[:, :, 1 + i]))  # (B,Q,C/8)
        weights = torch.stack(vectors, 2)  # (B,Q,4,C/8)

        selected = slice(1, 4) if multimask else slice(0, 1)
        masks = weights[:, :, selected] @ x.flatten(3)  # (B,Q,M,16*H*W)
        masks = masks.unflatten(3, x.shape[3:])  # (B,Q,M,4H,4W)
        iou = self.iou_prediction_head(tokens[:, :, 0])[..., selected]  # (B,Q,M)
        return masks, iou


# --- the model ------------------------------------------------------------------------------------


# modeling/sam.py, class Sam
class SAM(nn.Module):
    """Image encoder, prompt encoder and mask decoder."""

    def __init__(self, config: Config):
        super().__init__()
        if config.image_size < 16 or config.image_size % 16:
            raise ValueError(f"image_size={config.image_size}: must be a multiple of 16")
        self.config = config
        self.vision_encoder = VisionEncoder(config)
        self.prompt_encoder = PromptEncoder(config.out_dim, config.image_size)
        self.mask_decoder = MaskDecoder(config.out_dim, config.eps)

    def forward(
        self,
        image: Tensor,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Segment an image (B,3,S,S) from `preprocess` by Q prompts per image, see `decode`.

        -> masks (B,Q,M,S/4,S/4), logits; predicted IoU (B,Q,M). M is 1, or 3 with `multimask`.
        """
        features = self.encode_image(image)
        return self.decode(features, boxes, points, labels, masks, multimask)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C,S/16,S/16). Raise ValueError for another size."""
        S = self.config.image_size
        if image.shape[1:] != (3, S, S):
            raise ValueError(
                f"image is {tuple(image.shape)}, not (B,3,{S},{S}); for another size, load with "
                "from_pretrained(..., image_size=...)"
            )
        return self.vision_encoder(image)

    def decode(
        self,
        features: Tensor,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the masks for Q prompts per image, given features (B,C,S/16,S/16).

        boxes (B,Q,4): x1, y1, x2, y2 in pixels of the SxS input, as `to_input_pixels` returns them
        points (B,Q,P,2): x, y, also in pixels of the input
        labels (B,Q,P): 1 inside of the object, 0 outside, -1 to fill up prompts with fewer points
        masks (B,Q,1,S/4,S/4): logits, as an earlier call returned them

        A prompt may combine a box, points and a mask. If images have different numbers of prompts,
        decode all prompts as a batch with one prompt each: decode(features[image_index],
        boxes=boxes[:, None]), where row i of boxes (...,4) belongs to image image_index[i].

        -> masks (B,Q,M,S/4,S/4), logits; predicted IoU (B,Q,M). Raise ValueError for wrong prompts.
        """
        prompts = {"boxes": boxes, "points": points, "labels": labels, "masks": masks}
        prompts = {name: x for name, x in prompts.items() if x is not None}
        self.check_prompts(features, prompts)

        sparse, dense = self.prompt_encoder(boxes, points, labels, masks)
        position = self.prompt_encoder.grid_positions(features.shape[3])  # (H*W,C)
        return self.mask_decoder(features, position, sparse, dense, multimask)

    # The next five methods call the functions of the same name, which are further down.

    def check_prompts(self, features: Tensor, prompts: dict[str, Tensor]) -> None:
        """Raise ValueError for wrong prompts; see the function `check_prompts` below."""
        check_prompts(features, prompts, self.config.image_size)

    def preprocess(self, image) -> Tensor:
        """PIL image -> (3,S,S); see the function `preprocess` below."""
        return preprocess(image, self.config)

    def to_input_pixels(self, xy: Tensor, size: tuple[int, int]) -> Tensor:
        """Map boxes or points of an image of `size` (H,W); see `to_input_pixels` below."""
        return to_input_pixels(xy, size, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """logits (M,S/4,S/4), size (H,W) -> probabilities (M,H,W); see `postprocess` below."""
        return postprocess(logits, size, self.config)

    def segment(self, image, boxes=None, points=None, labels=None) -> tuple:
        """image or its path -> probabilities (Q,H,W), masks (Q,H,W); see `segment` below."""
        return segment(self, image, boxes, points, labels)

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides) -> "SAM":
        """Load the model from a file, a folder or a hub id, in evaluation mode.

        A folder may be a training run's output folder (weights and a config.json of ours).
        overrides: fields of Config. Another `image_size` resizes the position tables linearly, as
        SAMed does for 512 pixels; the model then needs fine-tuning. Raise ValueError, one line, for
        files that are not SAM's or not complete.
        """
        weights, settings = read_checkpoint(source, FILES)
        if "format" in settings:  # written by our training program
            config = Config(**run_config(settings, "SAM", source, Config))
        else:
            config = read_config(weights, settings, overrides, source)
        weights = convert(weights)

        # Check at the file's own image size, then resize.
        final_config = replace(config, **overrides)
        config_at_own_size = replace(final_config, image_size=config.image_size)
        with torch.device("meta"):  # the values come from the file
            model = cls(final_config)
            expected = cls(config_at_own_size).state_dict()
        check_complete(weights, expected, source)
        if final_config.image_size != config.image_size:
            weights = resize_position_tables(weights, final_config)

        weights = {name: t.float() for name, t in weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

# --- checking of prompts --------------------------------------------------------------------------


def check_prompts(features: Tensor, prompts: dict[str, Tensor], image_size: int) -> None:
    """Raise ValueError, one line, if the prompts of `SAM.decode` are not usable.

    prompts: the arguments that are not None, by name.
    """
    if not prompts:
        raise ValueError("no prompt: give boxes, points with labels, or masks")
    if ("points" in prompts) != ("labels" in prompts):
        raise ValueError("points need labels (1 inside, 0 outside), and labels need points")

    # Take Q from the first prompt and P from the labels.
    B = features.shape[0]
    first = next(iter(prompts.values()))
    Q = first.shape[1] if first.ndim > 1 else "Q"  # the letter is for the message
    P = prompts["labels"].shape[-1] if "labels" in prompts else None
    side = 4 * features.shape[2]
    shapes = {"boxes": (4,), "points": (P, 2), "labels": (P,), "masks": (1, side, side)}
    for name, x in prompts.items():
        expected = (B, Q, *shapes[name])
        if tuple(x.shape) != expected:
            text = ",".join(map(str, expected))
            raise ValueError(f"{name} are of shape {tuple(x.shape)}, expected ({text})")

    if not torch.compiler.is_compiling():  # a compiled graph cannot depend on values
        check_values(prompts, image_size)


def check_values(prompts: dict[str, Tensor], image_size: int) -> None:
    """Raise ValueError, one line, for boxes, points, labels or masks with impossible values."""
    for name in ("boxes", "points"):
        if name in prompts:
            check_coordinates(name, prompts[name], image_size, image_size)

    if "labels" in prompts:
        labels = prompts["labels"]
        known = torch.tensor([-1, 0, 1]).to(labels)
        if not torch.isin(labels, known).all():
            raise ValueError("labels must be 1 inside of the object, 0 outside, -1 for no point")

    if "masks" in prompts:
        masks = prompts["masks"]
        if not masks.isfinite().all():
            raise ValueError("masks must be finite logits; some are NaN or infinite")
        is_only_prompt = len(prompts) == 1
        has_object = (masks > 0).flatten(2).any(2)  # (B,Q)
        if is_only_prompt and not has_object.all():
            raise ValueError("masks: one is empty (no logit above 0), and there is no other prompt")


def check_coordinates(name: str, xy: Tensor, width: int, height: int) -> None:
    """Raise ValueError if a point (...,2) or box (...,4) leaves the image, or a box is inverted."""
    corners = xy.unflatten(-1, (-1, 2))  # (...,1 or 2,2)
    limits = torch.tensor([width, height], device=xy.device)
    is_inside = ((corners >= 0) & (corners <= limits)).flatten(-2).all(-1)  # (...); False for NaN
    if not is_inside.all():
        value = xy[~is_inside][0].tolist()
        raise ValueError(f"{name} {value}: not within the image of {width} x {height} pixels")

    is_inverted = (corners[..., -1, :] < corners[..., 0, :]).any(-1)  # (...)
    if is_inverted.any():
        value = xy[is_inverted][0].tolist()
        raise ValueError(f"{name} {value} is inverted: expected x1 <= x2 and y1 <= y2")


# --- pre- and postprocessing ----------------------------------------------------------------------


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


def preprocess(image, config: Config) -> Tensor:
    """Resize, normalise and pad a PIL image -> (3,S,S) float32. Raise errors as `to_rgb` does.

    SAM scales the longest side to S and pads with zeros after normalisation, as the authors do.
    MedSAM's authors resize with skimage's cubic splines. PIL's bicubic, which is used here, differs
    by 1 to 2 of 255 grey levels on average on a noisy photo, by 3 to 7 at the 99th percentile.
    """
    import numpy as np
    from PIL import Image

    image = to_rgb(image)
    h, w = size_in_input((image.height, image.width), config)
    image = image.resize((w, h), Image.Resampling[config.resample.upper()])

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3,h,w)
    if config.min_max:
        x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-8)
    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]  # (3,1,1)
    x = (x - mean) / std
    return F.pad(x, (0, config.image_size - w, 0, config.image_size - h))  # (3,S,S)


# utils/transforms.py, class ResizeLongestSide
def size_in_input(size: tuple[int, int], config: Config) -> tuple[int, int]:
    """Return the height and width that an image of `size` (H,W) has within the SxS input.

    It lies at the upper left; the rest is padding.
    """
    S = config.image_size
    if not config.letterbox:
        return S, S
    H, W = size
    scale = S / max(H, W)
    h = max(1, int(H * scale + 0.5))
    w = max(1, int(W * scale + 0.5))
    return h, w


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """Resize and pad a ground-truth mask (H,W) like its image -> (1,S,S) float32, for training.

    Resampling is nearest neighbour. Where a position falls exactly between two source pixels, PIL
    or OpenCV may choose the other one.
    """
    h, w = size_in_input(mask.shape, config)
    mask = mask[None, None].float()  # (1,1,H,W)
    mask = F.interpolate(mask, (h, w), mode="nearest-exact")[0]  # (1,h,w), like PIL's nearest
    return F.pad(mask, (0, config.image_size - w, 0, config.image_size - h))  # (1,S,S)


# utils/transforms.py, ResizeLongestSide.apply_coords
def to_input_pixels(xy: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Map points (...,2) or boxes (...,4) from pixels of an image to pixels of the SxS input.

    size: the image's (H,W). Raise ValueError, one line, if a point or box leaves the image, or a
    box is inverted.
    """
    H, W = size
    h, w = size_in_input(size, config)
    check_coordinates("prompt", xy, W, H)

    # Multiply before dividing, so that the image's edge maps exactly onto the resized edge.
    resized = torch.tensor((w, h), device=xy.device)
    original = torch.tensor((W, H), device=xy.device)
    corners = xy.unflatten(-1, (-1, 2))  # (...,1 or 2,2)
    return (corners * resized / original).flatten(-2)  # (...,2 or 4)


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (M,S/4,S/4) -> probabilities (M,H,W), float32, at the image's own `size` (H,W)."""
    logits = logits[None].float()  # (1,M,S/4,S/4)
    if not config.letterbox:
        # quirk: MedSAM, which stretches images, applies the sigmoid before resizing
        # (MedSAM_Inference.py). Other models with letterbox=False are treated like it.
        return resize(logits.sigmoid(), size)[0]  # (M,H,W)
    return to_image_size(logits, size, config)[0].sigmoid()  # (M,H,W)


# modeling/sam.py, Sam.postprocess_masks
def to_image_size(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Resize logits (B,M,S/4,S/4) to an image of `size` (H,W), without padding -> (B,M,H,W)."""
    S = config.image_size
    h, w = size_in_input(size, config)
    logits = resize(logits, (S, S))[..., :h, :w]  # (B,M,h,w)
    return resize(logits, size)  # (B,M,H,W)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map bilinearly: (B,M,h,w) -> (B,M,*size)."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


# --- segmentation of an image in one call ---------------------------------------------------------


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


def segment(model: SAM, image, boxes=None, points=None, labels=None) -> tuple:
    """Return a mask for each of Q prompts of one image, as numpy arrays of the image's size.

    image: a file (str or Path), see `open_upright`, or a PIL image (its EXIF data is ignored)

    Prompts are arrays, lists or tensors in pixels of the upright image:
    boxes (Q,4): x1, y1, x2, y2; or (4,) for one object
    points (Q,P,2): x, y; or (P,2) or (2,) for one object
    labels (Q,P) or (P,): 1 inside of the object (the default), 0 outside, -1 no point
    Boxes and points together are prompts of the same Q objects.

    Return probabilities, float32 (Q,H,W), and masks, uint8 (Q,H,W): 1 where the probability is
    above `config.threshold`, else 0. Raise errors as `open_upright` and `preprocess` do, and
    ValueError for wrong prompts.
    """
    image = open_upright(image)
    weight = next(model.parameters())
    pixels = model.preprocess(image)[None].to(weight)  # (1,3,S,S)
    size = (image.height, image.width)
    prompts = prompt_tensors(size, model.config, boxes, points, labels)
    prompts = {name: x.to(weight.device) for name, x in prompts.items()}
    count = len(next(iter(prompts.values())))
    probabilities = torch.zeros(count, *size)  # (Q,H,W)

    with evaluating(model):
        features = model.encode_image(pixels)  # (1,C,S/16,S/16)
        for i in range(count):  # one prompt at a time: decoding needs about 30 MB per prompt
            prompt = {name: x[None, i : i + 1] for name, x in prompts.items()}
            logits, _ = model.decode(features, **prompt)  # (1,1,1,S/4,S/4)
            probabilities[i] = model.postprocess(logits[0, 0], size)[0]

    probabilities = probabilities.numpy()
    masks = (probabilities > model.config.threshold).astype("uint8")
    return probabilities, masks


def prompt_tensors(size: tuple[int, int], config: Config, boxes, points, labels) -> dict:
    """Return the prompts of `segment` in pixels of the SxS input, by their names in `SAM.decode`.

    The tensors are boxes (Q,4), points (Q,P,2) and labels (Q,P), without those that are None.
    Raise ValueError, one line, for shapes that do not fit and prompts outside of the image.
    """
    if boxes is None and points is None:
        raise ValueError("no prompt: segment takes boxes, points or both")
    if points is None and labels is not None:
        raise ValueError("labels belong to points, but there are no points")

    prompts = {}
    if boxes is not None:
        boxes = with_axes(torch.as_tensor(boxes, dtype=torch.float32), 2)  # (Q,4)
        if boxes.numel() == 0:  # an empty list, as from a detector that found no object
            boxes = boxes.reshape(0, 4)
        if boxes.shape[1:] != (4,):
            raise ValueError(f"boxes are of shape {tuple(boxes.shape)}, expected (Q,4)")
        prompts["boxes"] = to_input_pixels(boxes, size, config)

    if points is not None:
        points = with_axes(torch.as_tensor(points, dtype=torch.float32), 3)  # (Q,P,2)
        if points.shape[2:] != (2,):
            raise ValueError(f"points are of shape {tuple(points.shape)}, expected (Q,P,2)")
        Q, P = points.shape[:2]
        if labels is None:
            labels = torch.ones(Q, P)
        labels = with_axes(torch.as_tensor(labels, dtype=torch.int64), 2)  # (Q,P)
        if labels.shape != (Q, P):
            shape = tuple(labels.shape)
            raise ValueError(
                f"labels are of shape {shape}, expected ({Q}, {P}), one for each point"
            )
        prompts["points"] = to_input_pixels(points, size, config)
        prompts["labels"] = labels

    if boxes is not None and points is not None and len(boxes) != len(points):
        raise ValueError(
            f"{len(boxes)} boxes and points of {len(points)} objects: together they must be of the "
            "same objects"
        )
    return prompts


def with_axes(x: Tensor, n: int) -> Tensor:
    """Return a tensor with at least n axes, adding axes of size 1 in front."""
    while x.ndim < n:
        x = x[None]
    return x


# --- names and sizes in released checkpoints ------------------------------------------------------

FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
# file or hub id -> the preprocessing that it needs. The licence of MedSAM's was not checked.
RELEASED = {
    "facebook/sam-vit-base": "SAM",
    "facebook/sam-vit-large": "SAM",
    "facebook/sam-vit-huge": "SAM",
    "sam_vit_b_01ec64.pth": "SAM",
    "sam_vit_l_0b3195.pth": "SAM",
    "sam_vit_h_4b8939.pth": "SAM",
    "wanglab/medsam-vit-base": "MedSAM",
    "medsam_vit_b.pth": "MedSAM",
}
IGNORED = r"pixel_(mean|std)"  # tensors not loaded: constants of the preprocessing, see Config
FOURIER = "prompt_encoder.shared_embedding.positional_embedding"
TWIN = "shared_image_embedding.positional_embedding"  # transformers' second name of that tensor
# Prefixes of the authors' names -> ours. The first match is used; # matches a number.
AUTHORS = {
    "image_encoder.patch_embed.proj.": "vision_encoder.patch_embed.projection.",
    "image_encoder.blocks.#.norm": "vision_encoder.layers.#.layer_norm",
    "image_encoder.blocks.": "vision_encoder.layers.",
    "image_encoder.neck.0.": "vision_encoder.neck.conv1.",
    "image_encoder.neck.1.": "vision_encoder.neck.layer_norm1.",
    "image_encoder.neck.2.": "vision_encoder.neck.conv2.",
    "image_encoder.neck.3.": "vision_encoder.neck.layer_norm2.",
    "image_encoder.": "vision_encoder.",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": FOURIER,
    "prompt_encoder.point_embeddings.": "prompt_encoder.point_embed.",
    "prompt_encoder.mask_downscaling.0.": "prompt_encoder.mask_embed.conv1.",
    "prompt_encoder.mask_downscaling.1.": "prompt_encoder.mask_embed.layer_norm1.",
    "prompt_encoder.mask_downscaling.3.": "prompt_encoder.mask_embed.conv2.",
    "prompt_encoder.mask_downscaling.4.": "prompt_encoder.mask_embed.layer_norm2.",
    "prompt_encoder.mask_downscaling.6.": "prompt_encoder.mask_embed.conv3.",
    "mask_decoder.transformer.layers.#.norm": "mask_decoder.transformer.layers.#.layer_norm",
    "mask_decoder.transformer.norm_final": "mask_decoder.transformer.layer_norm_final",
    "mask_decoder.output_upscaling.0.": "mask_decoder.upscale_conv1.",
    "mask_decoder.output_upscaling.1.": "mask_decoder.upscale_layer_norm.",
    "mask_decoder.output_upscaling.3.": "mask_decoder.upscale_conv2.",
    "mask_decoder.output_hypernetworks_mlps.#.layers.0.": (
        "mask_decoder.output_hypernetworks_mlps.#.proj_in."
    ),
    "mask_decoder.output_hypernetworks_mlps.#.layers.1.": (
        "mask_decoder.output_hypernetworks_mlps.#.layers.0."
    ),
    "mask_decoder.output_hypernetworks_mlps.#.layers.2.": (
        "mask_decoder.output_hypernetworks_mlps.#.proj_out."
    ),
    "mask_decoder.iou_prediction_head.layers.0.": "mask_decoder.iou_prediction_head.proj_in.",
    "mask_decoder.iou_prediction_head.layers.1.": "mask_decoder.iou_prediction_head.layers.0.",
    "mask_decoder.iou_prediction_head.layers.2.": "mask_decoder.iou_prediction_head.proj_out.",
}


def from_authors(name: str) -> str:
    """Return our name for a tensor with one of the authors' names."""
    for prefix, ours in AUTHORS.items():
        match = re.match(re.escape(prefix).replace(r"\#", r"(\d+)"), name)
        if match:
            number = match[1] if "#" in prefix else ""
            return ours.replace("#", number) + name[match.end() :]
    return name


def is_authors(weights: dict[str, Tensor]) -> bool:
    """Return True for weights with the authors' names, False for those with transformers'."""
    return any(name.startswith("image_encoder.") for name in weights)


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names (transformers' names, with TWIN merged into FOURIER).

    Raise ValueError if two tensors of one name differ.
    """
    # Only the authors' files are renamed: in the heads, "layers.0" is their first linear layer, but
    # transformers' second.
    has_authors_names = is_authors(state_dict)
    weights = {}
    for name, tensor in state_dict.items():
        if re.fullmatch(IGNORED, name):
            continue
        if has_authors_names:
            name = from_authors(name)
        if name == TWIN:
            name = FOURIER
        if name in weights and not torch.equal(weights[name], tensor):
            raise ValueError(f"{name} is stored under two names, with different values")
        weights[name] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under transformers' names, for `load_state_dict` of its SamModel."""
    weights = convert(state_dict)
    return weights | {TWIN: weights[FOURIER].clone()}


def read_config(weights: dict[str, Tensor], settings: dict, overrides: dict, source) -> Config:
    """Return the config of a released checkpoint; settings: its config.json, or {}.

    Sizes are read from the shapes of the tensors. Print which preprocessing is assumed, unless
    `overrides` set it. Raise ValueError, one line, if the file is not SAM's.
    """
    shapes = {name: t.shape for name, t in convert(weights).items()}
    layer = r"vision_encoder\.layers\.(\d+)\."
    dim = common_size(shapes, layer + r"layer_norm1\.bias", 0)
    head_dim = common_size(shapes, layer + r"attn\.rel_pos_[hw]", 1)
    mlp_dim = common_size(shapes, layer + r"mlp\.lin1\.bias", 0)
    out_dim = common_size(shapes, r"mask_decoder\..*layer_norm\d\.bias", 0)
    if None in (dim, head_dim, mlp_dim, out_dim):
        kind = recognise(weights)
        hint = f"; the file seems to be {kind}" if kind else ""
        raise ValueError(
            f"{source}: not a SAM checkpoint (no tensors named vision_encoder.* or "
            f"image_encoder.*){hint}"
        )

    depth = 0
    for name in shapes:
        match = re.match(layer, name)
        if match:
            depth = max(depth, 1 + int(match[1]))
    global_blocks, image_size = global_attention(shapes)

    # The authors' checkpoints do not store eps; transformers' config.json does, unless it is the
    # default.
    eps = settings.get("mask_decoder_config", {}).get("layer_norm_eps", 1e-6)
    if is_authors(weights):
        eps = 1e-5

    config = Config(
        dim=dim,
        depth=depth,
        heads=dim // head_dim,
        mlp_dim=mlp_dim,
        global_blocks=global_blocks,
        out_dim=out_dim,
        eps=eps,
        image_size=image_size,
    )
    if choose_preprocessing(source, overrides) == "MedSAM":
        config = replace(config, **MEDSAM)
    return config


def common_size(shapes: dict[str, torch.Size], pattern: str, axis: int) -> int | None:
    """Return the size that most tensors of a kind have along an axis, None if there are none.

    A single tensor of a wrong shape does not change the config: `check_complete` reports it.
    """
    sizes = []
    for name, shape in shapes.items():
        if re.fullmatch(pattern, name) and axis < len(shape):
            sizes.append(shape[axis])
    return mode(sizes) if sizes else None


def global_attention(shapes: dict[str, torch.Size]) -> tuple[tuple[int, ...], int]:
    """Return the indices of the blocks with global attention, and the image size in pixels.

    A table of relative positions has 2 * side - 1 rows. The side is WINDOW in most blocks. In those
    with global attention it is the number of patches along a side of the image, 16 pixels each.
    `pos_embed` holds that number, too, but if the shape of this single tensor were wrong, the error
    would name all the others.
    """
    table_rows = {}  # block -> rows of its tables
    for name, shape in shapes.items():
        match = re.fullmatch(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_[hw]", name)
        if match and shape:
            table_rows[int(match[1])] = shape[0]

    global_rows = {}
    for block in sorted(table_rows):
        if table_rows[block] != 2 * WINDOW - 1:
            global_rows[block] = table_rows[block]
    if not global_rows:  # all tables have window size: the image is a single window
        return (), 16 * WINDOW
    image_size = 8 * (1 + mode(global_rows.values()))  # 16 * side, as rows = 2 * side - 1
    return tuple(global_rows), image_size


def choose_preprocessing(source, overrides: dict) -> str:
    """Return "SAM" or "MedSAM", chosen by the name of the file or hub id.

    Print the choice, unless `overrides` set the preprocessing.
    """
    path = str(source).split("@")[0]
    known = ""
    for name, kind in RELEASED.items():
        if Path(name).name in Path(path).parts[-2:]:  # a folder may have the name, too
            known = kind
            break

    if not MEDSAM.keys() & overrides.keys():
        if known:
            print(f"{source}: preprocessing of {known}, by its name")
        else:
            print(
                f"{source}: preprocessing of SAM, as the name is unknown; "
                "for MedSAM pass **sam_decoder.MEDSAM"
            )
    return known or "SAM"


def resize_position_tables(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Return weights with position tables for `config.image_size`. Tables of windows stay.

    The authors interpolate relative positions the same way (get_rel_pos in image_encoder.py), SAMed
    both kinds of tables.
    """
    grid = config.image_size // 16
    weights = dict(weights)

    table = weights["vision_encoder.pos_embed"].permute(0, 3, 1, 2).float()  # (1,C,H,W)
    table = resize(table, (grid, grid))  # (1,C,grid,grid)
    weights["vision_encoder.pos_embed"] = table.permute(0, 2, 3, 1).contiguous()  # (1,grid,grid,C)

    for i in config.global_blocks:
        for axis in "hw":
            name = f"vision_encoder.layers.{i}.attn.rel_pos_{axis}"
            table = weights[name].T[None].float()  # (1,d,rows)
            table = F.interpolate(table, 2 * grid - 1, mode="linear", align_corners=False)
            weights[name] = table[0].T.contiguous()  # (2*grid-1,d)
    return weights


# --- reading of files -----------------------------------------------------------------------------


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
