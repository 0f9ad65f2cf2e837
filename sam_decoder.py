"""SAM, Segment Anything: an image and boxes, points or masks in, the masks meant by them out.

Paper: Kirillov et al., ICCV 2023, arXiv 2304.02643. Code: github.com/facebookresearch/
segment-anything at dca509f, segment_anything/modeling (Apache 2.0); its port to transformers 5.23,
modeling_sam.py, whose names are kept. Weights, all Apache 2.0: facebook/sam-vit-base, -large, -huge
on the hub; the authors' sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth. MedSAM,
Ma et al., Nature Communications 2024, arXiv 2304.12306: wanglab/medsam-vit-base, medsam_vit_b.pth.

    image (B,3,1024,1024)                        Q prompts an image, in pixels of its 1024
      vision_encoder: patches of 16 px,            boxes (B,Q,4), points (B,Q,P,2) and labels
      blocks that attend within windows              prompt_encoder: Fourier features
      of 14x14, four of them everywhere            sparse (B,Q,n,256), 2 a box, 1 a point
      neck: two convolutions                       masks (B,Q,1,256,256), logits
    features (B,256,64,64)                           prompt_encoder: three convolutions
          |                                        dense (B,Q,256,64,64), or a vector for none
          '-- + dense: keys (B,Q,4096,256)           |
    mask_decoder <-----------------------------------'
      5 tokens of its own and the sparse ones (B,Q,5+n,256) look at the keys, these at them, twice
      upscaled keys (B,Q,32,256,256), weighted by an MLP of each mask's token
    masks (B,Q,M,256,256), logits, and their estimated IoU (B,Q,M); M is 1, with multimask 3

quirk: four norms in each decoder layer have eps 1e-5 for the authors, 1e-6 in transformers: `eps`,
as the naming of the file tells. MedSAM's pixels are made in another way than SAM's: `MEDSAM`.
Left out: masks of everything by a grid of points, ONNX's sizes, transformers' label -10.

    model = SAM.from_pretrained("facebook/sam-vit-base")
    probabilities, masks = model.segment("photo.jpg", boxes=[[10, 20, 110, 90]])  # x1, y1, x2, y2
    probabilities, masks = model.segment("photo.jpg", points=[[60, 50]])  # of one object: (P,2)
    # numpy, at the photo's own size, one for each prompt: float32 (Q,H,W); uint8 (Q,H,W)
"""

import json
import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    dim: int = 768  # of the image encoder
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)  # counted from 0; the others see windows
    out_dim: int = 256  # of features, prompts and decoder
    eps: float = 1e-6  # of the norms in the decoder's two layers; the authors' files: 1e-5
    image_size: int = 1024  # side of the square, in 16s; smaller ones resize the position tables
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # RGB in 0..1, ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: str = "bilinear"  # PIL's name
    letterbox: bool = True  # keep the image's shape and fill the square, or stretch to it
    min_max: bool = False  # spread what values an image has over 0..1
    threshold: float = 0.5


VARIANTS = {
    "vit-base": Config(),  # 93,735,472 parameters, 4,058,340 of them in the mask decoder
    "vit-large": Config(1024, 24, 16, 4096, (5, 11, 17, 23)),  # 312,342,832
    "vit-huge": Config(1280, 32, 16, 5120, (7, 15, 23, 31)),  # 641,090,608
    "mini": Config(64, 4, 2, 256, (1, 3), out_dim=64, image_size=256),  # 573,320; tests, demos
}
# MedSAM's fields of Config, for files whose name does not tell: from_pretrained(file, **MEDSAM)
MEDSAM = dict(mean=(0.0,) * 3, std=(1.0,) * 3, resample="bicubic", letterbox=False, min_max=True)
WINDOW = 14  # tokens along a side
# Numbers of `bias_attention`'s buffer at most: 32 MB, and 1 GB on a GPU, in float32.
BIAS_SIZE = 2**23
BIAS_SIZE_ON_GPU = 2**28


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


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, activation):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.activation(self.lin1(x)))


def bias_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention with the bias by_row[query, key's row] + by_column[query, key's column].

    q, k, v (B,h,S*S,d), by_row and by_column (B,h,S,S,S) -> (B,h,S*S,d). The whole bias would be
    as large as the scores, 805 MB in a global block of ViT-B. Here a few rows of queries at a time
    get theirs, in one small buffer: faster on a CPU than all at once. Without gradients of a bias.
    """
    B, h, S = by_row.shape[:3]
    most = BIAS_SIZE if q.device.type == "cpu" else BIAS_SIZE_ON_GPU
    rows = min(S, max(1, most // (B * h * S**3)))
    buffer, outputs = by_row.new_empty(B, h, rows, S, S, S), []
    for start in range(0, S, rows):
        part = slice(start, start + rows)
        some = by_row[:, :, part, :, :, None], by_column[:, :, part, :, None, :]
        bias = torch.add(*some, out=buffer[:, :, : some[0].shape[2]])  # (B,h,rows,S,S,S)
        bias = bias.flatten(4).flatten(2, 3)  # (B,h,rows*S,S*S)
        queries = q[:, :, start * S : (start + rows) * S]  # (B,h,rows*S,d)
        outputs.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=bias))
    return torch.cat(outputs, 2)


def widened_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The same as attention without a bias, whose kernels hold no scores: for training, and for
    global attention in half precision on a GPU, which has its fastest kernels for that.

    A query appended by its biases and a key appended by the one-hot codes of its row and column
    have the product q k + bias. Zeros make v as wide, for kernels that want one width.
    """
    S, d = by_row.shape[2], q.shape[3]
    eye = torch.eye(S, dtype=k.dtype, device=k.device)
    place = torch.cat([eye.repeat_interleave(S, 0), eye.repeat(S, 1)], 1)  # (S*S,2S)
    by_place = torch.cat([by_row, by_column], 4).flatten(2, 3)  # (B,h,S*S,2S)
    q = torch.cat([q, by_place * d**0.5], 3)  # (B,h,S*S,d+2S)
    k = torch.cat([k, place.expand(*k.shape[:2], -1, -1)], 3)  # (B,h,S*S,d+2S)
    v = F.pad(v, (0, 2 * S))
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]  # (B,h,S*S,d)


class VisionAttention(nn.Module):
    """Within squares of side S, aware of how far apart two tokens are along each axis."""

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side, d = heads, side, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, d))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, d))

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,H,C) -> (B,H,H,C); the last squares may stick out."""
        (B, H, *_), S, h = x.shape, self.side, self.heads
        qkv, n = self.qkv(x), -(-H // S)  # (B,H,H,3C), squares along a side
        if n * S > H:
            # quirk: what sticks out is zero behind the norm and is attended to; only its biases
            # are left of q, k and v, hence no need to multiply there.
            whole = self.qkv.bias.to(qkv.dtype).expand(B, n * S, n * S, -1).clone()
            whole[:, :H, :H] = qkv
            qkv = whole  # (B,n*S,n*S,3C)
        qkv = qkv.view(B, n, S, n, S, 3, h, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3,B,n,n,h,S,S,d)
        q, k, v = qkv.flatten(1, 3).flatten(3, 4)  # (B*n*n,h,S*S,d) each
        step = torch.arange(S, device=x.device)
        step = step[:, None] - step + S - 1  # (S,S), from a key to a query
        grid = q.unflatten(2, (S, S))  # (B*n*n,h,S,S,d)
        # quirk: these are products with q as it is, not with q / sqrt(d)
        by_row = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel_pos_h[step])
        by_column = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel_pos_w[step])
        fused = x.device.type != "cpu" and q.dtype != torch.float32 and S > WINDOW
        plain = not (fused or by_row.requires_grad)
        y = (bias_attention if plain else widened_attention)(q, k, v, by_row, by_column)
        y = y.view(B, n, n, h, S, S, -1).permute(0, 1, 4, 2, 5, 3, 6)  # (B,n,S,n,S,h,d)
        return self.proj(y.reshape(B, n * S, n * S, -1)[:, :H, :H])  # (B,H,H,C)


class VisionBlock(nn.Module):
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


class VisionEncoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c, grid = config, config.image_size // 16
        projection = nn.Conv2d(3, c.dim, 16, stride=16)
        self.patch_embed = nn.ModuleDict({"projection": projection})
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, c.dim))
        sides = (grid if i in c.global_blocks else WINDOW for i in range(c.depth))
        blocks = (VisionBlock(c.dim, c.heads, c.mlp_dim, side) for side in sides)
        self.layers = nn.Sequential(*blocks)
        conv1 = nn.Conv2d(c.dim, c.out_dim, 1, bias=False)
        conv2 = nn.Conv2d(c.out_dim, c.out_dim, 3, padding=1, bias=False)
        norm1, norm2 = LayerNorm2d(c.out_dim), LayerNorm2d(c.out_dim)
        parts = OrderedDict(conv1=conv1, layer_norm1=norm1, conv2=conv2, layer_norm2=norm2)
        self.neck = nn.Sequential(parts)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C',S/16,S/16)."""
        x = self.patch_embed["projection"](image).permute(0, 2, 3, 1)  # (B,H,W,C)
        return self.neck(self.layers(x + self.pos_embed).permute(0, 3, 1, 2))


class FourierFeatures(nn.Module):
    """Sines and cosines of random directions in the plane; as a buffer they are never trained."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, dim // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """xy (...,2) in 0..1 of the image's sides -> (...,C)."""
        x, y = (2 * xy - 1).to(self.positional_embedding.dtype).unsqueeze(-1).unbind(-2)  # (...,1)
        # No matrix product, which autocast would make in 8 bits: the sines are of large numbers.
        along = 2 * math.pi * (x * self.positional_embedding[0] + y * self.positional_embedding[1])
        return torch.cat([along.sin(), along.cos()], -1)  # (...,C)


class PromptEncoder(nn.Module):
    def __init__(self, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.shared_embedding = FourierFeatures(dim)
        # 0: a point outside of the object, 1: inside, 2: a box's first corner, 3: its second
        self.point_embed = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        conv1, conv2 = nn.Conv2d(1, 4, 2, stride=2), nn.Conv2d(4, 16, 2, stride=2)
        parts = OrderedDict(conv1=conv1, layer_norm1=LayerNorm2d(4), gelu1=nn.GELU())
        parts |= OrderedDict(conv2=conv2, layer_norm2=LayerNorm2d(16), gelu2=nn.GELU())
        self.mask_embed = nn.Sequential(parts | OrderedDict(conv3=nn.Conv2d(16, dim, 1)))
        self.no_mask_embed = nn.Embedding(1, dim)

    def position(self, side: int) -> Tensor:
        """(side*side,C), the features of where the image's tokens are."""
        at = (torch.arange(side, device=self.no_mask_embed.weight.device) + 0.5) / side
        xy = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (side,side,2)
        return self.shared_embedding(xy).flatten(0, 1)

    def forward(self, boxes, points, labels, masks) -> tuple[Tensor | None, Tensor]:
        """As in SAM.decode -> sparse (B,Q,n,C), None of masks alone; dense (B,Q,C,H,W) or (C,1,1).

        n is 2 for a box, P for points beside a box, P + 1 for points alone.
        """
        sparse, embed = [], [e.weight[0] for e in self.point_embed]  # (C,) each
        if points is not None:
            if boxes is None:  # quirk: a point that is none stands in for the box
                points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            x = self.shared_embedding((points + 0.5) / self.image_size)  # (B,Q,P,C)
            label = labels[..., None]  # (B,Q,P,1)
            x = x + torch.where(label == 1, embed[1], embed[0])
            sparse.append(torch.where(label == -1, self.not_a_point_embed.weight[0], x))
        if boxes is not None:
            corners = boxes.unflatten(2, (2, 2))  # (B,Q,2,2)
            x = self.shared_embedding((corners + 0.5) / self.image_size)  # (B,Q,2,C)
            sparse.append(x + torch.stack(embed[2:]))
        sparse = torch.cat(sparse, 2) if sparse else None  # (B,Q,n,C)
        if masks is None:
            return sparse, self.no_mask_embed.weight[0, :, None, None]  # (C,1,1)
        dense = self.mask_embed(masks.flatten(0, 1))  # (B*Q,C,H,W)
        return sparse, dense.unflatten(0, masks.shape[:2])


class Attention(nn.Module):
    """Of eight heads; `inner` of its channels may be fewer than come in."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B,Q,N,C), k and v (B,Q,N',C), where Q of one side may be 1 -> (B,Q,N,C).

        What the prompts of an image have in common is projected once and repeated then.
        """
        Q = max(q.shape[1], k.shape[1])
        parts = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        parts = (x.unflatten(3, (8, -1)).transpose(2, 3) for x in parts)  # (B,Q or 1,h,N,d)
        q, k, v = (x.expand(-1, Q, -1, -1, -1).flatten(0, 1) for x in parts)  # (B*Q,h,N,d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B*Q,N,C')
        return self.out_proj(y).unflatten(0, (-1, Q))


class TwoWayBlock(nn.Module):
    """Tokens look at each other, then at the image, which looks back at them."""

    def __init__(self, dim: int, eps: float, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, dim)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn_token_to_image = Attention(dim, dim // 2)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 8 * dim, F.relu)
        self.layer_norm3 = nn.LayerNorm(dim, eps=eps)
        self.layer_norm4 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn_image_to_token = Attention(dim, dim // 2)

    def forward(self, queries: Tensor, keys: Tensor, tokens: Tensor, position: Tensor):
        """queries and tokens (B,Q,n,C), keys (B,Q or 1,N,C), position (N,C) -> queries, keys.

        `tokens`, the queries of the beginning, say where and what each query is.
        """
        if self.first:  # quirk: nothing is added there, in transformer.py of the authors
            queries = self.self_attn(queries, queries, queries)
        else:
            queries = queries + self.self_attn(queries + tokens, queries + tokens, queries)
        queries, placed = self.layer_norm1(queries), keys + position
        y = self.cross_attn_token_to_image(queries + tokens, placed, keys)  # (B,Q,n,C)
        queries = self.layer_norm2(queries + y)
        queries = self.layer_norm3(queries + self.mlp(queries))
        y = self.cross_attn_image_to_token(placed, queries + tokens, queries)  # (B,Q,N,C)
        return queries, self.layer_norm4(keys + y)


class TwoWayTransformer(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, eps, first) for first in (True, False))
        self.final_attn_token_to_image = Attention(dim, dim // 2)
        self.layer_norm_final_attn = nn.LayerNorm(dim)  # 1e-5, in transformers too

    def forward(self, tokens: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B,Q,n,C), keys (B,Q or 1,N,C), position (N,C) -> (B,Q,n,C), (B,Q,N,C)."""
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, position)
        y = self.final_attn_token_to_image(queries + tokens, keys + position, keys)  # (B,Q,n,C)
        return self.layer_norm_final_attn(queries + y), keys


def head(dim: int, out_dim: int) -> nn.Sequential:
    """An MLP with two hidden layers."""
    parts = OrderedDict(proj_in=nn.Linear(dim, dim), relu1=nn.ReLU())
    parts |= OrderedDict(layers=nn.Sequential(nn.Linear(dim, dim)), relu2=nn.ReLU())
    return nn.Sequential(parts | OrderedDict(proj_out=nn.Linear(dim, out_dim)))


class MaskDecoder(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        # Of the four masks the first is for one answer; the others are three guesses.
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(4, dim)
        self.transformer = TwoWayTransformer(dim, eps)
        self.upscale_conv1 = nn.ConvTranspose2d(dim, dim // 4, 2, stride=2)
        self.upscale_layer_norm = LayerNorm2d(dim // 4)
        self.upscale_conv2 = nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2)
        self.output_hypernetworks_mlps = nn.ModuleList(head(dim, dim // 8) for _ in range(4))
        self.iou_prediction_head = head(dim, 4)

    def forward(self, features, position, sparse, dense, multimask: bool) -> tuple[Tensor, Tensor]:
        """features (B,C,H,W), position (H*W,C), sparse and dense of the prompt encoder

        -> masks (B,Q,M,4H,4W), iou (B,Q,M).
        """
        keys = features[:, None] + dense  # (B,Q,C,H,W), Q = 1 if the prompts have no masks
        size, keys = keys.shape[3:], keys.flatten(3).transpose(2, 3)  # (B,Q,H*W,C)
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (5,C)
        B, Q = sparse.shape[:2] if sparse is not None else keys.shape[:2]
        own = own.expand(B, Q, -1, -1)  # (B,Q,5,C)
        tokens = own if sparse is None else torch.cat([own, sparse], 2)  # (B,Q,5+n,C)
        tokens, keys = self.transformer(tokens, keys, position)
        x = keys.transpose(2, 3).flatten(0, 1).unflatten(2, size)  # (B*Q,C,H,W)
        x = F.gelu(self.upscale_layer_norm(self.upscale_conv1(x)))  # (B*Q,C/4,2H,2W)
        x = F.gelu(self.upscale_conv2(x)).unflatten(0, (B, Q))  # (B,Q,C/8,4H,4W)
        mlps = zip(self.output_hypernetworks_mlps, tokens[:, :, 1:5].unbind(2), strict=True)
        weights = torch.stack([mlp(token) for mlp, token in mlps], 2)  # (B,Q,4,C/8)
        chosen = slice(1, 4) if multimask else slice(0, 1)
        masks = weights[:, :, chosen] @ x.flatten(3)  # (B,Q,M,16*H*W)
        iou = self.iou_prediction_head(tokens[:, :, 0])[..., chosen]  # (B,Q,M)
        return masks.unflatten(3, x.shape[3:]), iou


class SAM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config
        if c.image_size < 16 or c.image_size % 16:
            raise ValueError(f"image_size={c.image_size}: must be a multiple of 16")
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.to_frame = partial(to_frame, config=config)  # boxes or points, size -> the same in SxS
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (M,H,W)
        self.vision_encoder = VisionEncoder(c)
        self.prompt_encoder = PromptEncoder(c.out_dim, c.image_size)
        self.mask_decoder = MaskDecoder(c.out_dim, c.eps)

    def forward(
        self, image: Tensor, boxes: Tensor | None = None, points: Tensor | None = None,
        labels: Tensor | None = None, masks: Tensor | None = None, multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """image (B,3,S,S), as `preprocess` makes it, and Q prompts of each, see `decode`.

        -> masks (B,Q,M,S/4,S/4), logits; iou (B,Q,M), an estimate. M is 1, with `multimask` 3.
        """
        features = self.encode_image(image)
        return self.decode(features, boxes, points, labels, masks, multimask)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,S,S) -> features (B,C,S/16,S/16), C = 256. ValueError for another size."""
        S = self.config.image_size
        if image.shape[1:] != (3, S, S):
            found = tuple(image.shape)
            raise ValueError(f"image is {found}, not (B,3,{S},{S}); image_size= takes another size")
        return self.vision_encoder(image)

    def decode(
        self, features: Tensor, boxes: Tensor | None = None, points: Tensor | None = None,
        labels: Tensor | None = None, masks: Tensor | None = None, multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """features (B,C,S/16,S/16), Q prompts of each image -> masks (B,Q,M,S/4,S/4), iou (B,Q,M).

        boxes (B,Q,4), x1, y1, x2, y2 in pixels of the SxS image, as `to_frame` makes them. points
        (B,Q,P,2), x, y; labels (B,Q,P): 1 inside of the object, 0 outside, -1 no point, where some
        prompts have fewer. masks (B,Q,1,S/4,S/4), logits as from an earlier call. Any of the three
        or several together. One prompt an image, of any image: decode(features[image_of_prompt],
        boxes=boxes[:, None]). ValueError: what is wrong with the prompts.
        """
        check_prompts(features, boxes, points, labels, masks, self.config.image_size)
        sparse, dense = self.prompt_encoder(boxes, points, labels, masks)
        position = self.prompt_encoder.position(features.shape[3])  # (H*W,C)
        return self.mask_decoder(features, position, sparse, dense, multimask)

    def segment(self, image, boxes=None, points=None, labels=None) -> tuple:
        """Segment an image or its file -> probabilities (Q,H,W), masks (Q,H,W); see `segment`."""
        return segment(self, image, boxes, points, labels)

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides) -> "SAM":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        image_size: another one resizes the position tables, linearly, as SAMed does for 512. It
        wants fine-tuning, and features, prompts and masks have its size. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "SAM", source, Config))
        else:
            config = read_config(weights, settings, overrides, source)
        weights, wanted = convert(weights), replace(config, **overrides)
        with torch.device("meta"):  # its numbers come from the file, so none are drawn
            model = cls(wanted)
            expected = cls(replace(wanted, image_size=config.image_size)).state_dict()
        check_complete(weights, expected, source)
        weights = {name: t.float() for name, t in resized(weights, wanted).items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()


def check_inside(what: str, xy: Tensor, width: int, height: int) -> None:
    """ValueError unless points (...,2) or boxes (...,4) are numbers within the image, in order."""
    corners = xy.unflatten(-1, (-1, 2))  # (...,1 or 2,2)
    limits = torch.tensor([width, height], device=xy.device)
    outside = ~((corners >= 0) & (corners <= limits)).flatten(-2).all(-1)  # (...), NaN too
    inverted = (corners[..., -1, :] < corners[..., 0, :]).any(-1)  # (...)
    size = f"not within the image of {width} x {height} pixels"
    for wrong, why in ((outside, size), (inverted, "inverted, it must be x1, y1, x2, y2")):
        if wrong.any():
            raise ValueError(f"{what} {xy[wrong][0].tolist()}: {why}")


def check_prompts(features: Tensor, boxes, points, labels, masks, image_size: int) -> None:
    """ValueError: what is wrong with the prompts of `SAM.decode`."""
    given = {"boxes": boxes, "points": points, "labels": labels, "masks": masks}
    given = {name: x for name, x in given.items() if x is not None}
    if not given:
        raise ValueError("no prompt: give boxes, points with labels, or masks")
    if ("points" in given) != ("labels" in given):
        raise ValueError("points need labels, 1 inside of the object, 0 outside, and labels points")
    (B, _, side, _), (first, *_) = features.shape, given.values()
    Q = first.shape[1] if first.ndim > 1 else "Q"
    P = labels.shape[-1] if "labels" in given else None
    shapes = {"boxes": (4,), "points": (P, 2), "labels": (P,), "masks": (1, 4 * side, 4 * side)}
    for name, x in given.items():
        if tuple(x.shape) != (B, Q, *shapes[name]):
            wanted = ",".join(map(str, (B, Q, *shapes[name])))
            raise ValueError(f"{name} are of shape {tuple(x.shape)}, expected ({wanted})")
    if torch.compiler.is_compiling():  # which can't depend on values
        return
    for name in [name for name in ("boxes", "points") if name in given]:
        check_inside(name, given[name], image_size, image_size)
    if "labels" in given and not torch.isin(labels, torch.tensor([-1, 0, 1]).to(labels)).all():
        raise ValueError("labels must be 1 inside of the object, 0 outside, -1 for no point")
    if "masks" in given and not masks.isfinite().all():
        raise ValueError("masks must be finite logits; some are NaN or infinite")
    if len(given) == 1 and "masks" in given and not (masks > 0).flatten(2).any(2).all():
        raise ValueError("masks: one is empty, it has no logit above 0, and no other prompt helps")


FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
RELEASED = {  # whose pixels they are made for
    "facebook/sam-vit-base": "SAM", "facebook/sam-vit-large": "SAM", "facebook/sam-vit-huge": "SAM",
    "sam_vit_b_01ec64.pth": "SAM", "sam_vit_l_0b3195.pth": "SAM", "sam_vit_h_4b8939.pth": "SAM",
    "wanglab/medsam-vit-base": "MedSAM", "medsam_vit_b.pth": "MedSAM",
}  # fmt: skip
IGNORED = {r"pixel_(mean|std)": "of preprocessing, here in the config"}
FOURIER = "prompt_encoder.shared_embedding.positional_embedding"
TWIN = "shared_image_embedding.positional_embedding"  # the hub's second name for the same tensor
# The authors' names -> the hub's, which are ours but for TWIN, in this order.
RENAMES = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.neck\.0\.", ".neck.conv1."), (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."), (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."), (r"\.mask_downscaling\.", ".mask_embed."),
    (r"\.mask_embed\.0", ".mask_embed.conv1"), (r"\.mask_embed\.1", ".mask_embed.layer_norm1"),
    (r"\.mask_embed\.3", ".mask_embed.conv2"), (r"\.mask_embed\.4", ".mask_embed.layer_norm2"),
    (r"\.mask_embed\.6", ".mask_embed.conv3"),
    (r"(transformer\.layers\.\d)\.norm", r"\1.layer_norm"), (r"\.norm_final", ".layer_norm_final"),
    (r"\.output_upscaling\.0", ".upscale_conv1"), (r"\.output_upscaling\.3", ".upscale_conv2"),
    (r"\.output_upscaling\.1", ".upscale_layer_norm"),
    (r"(_mlps\.\d|_head)\.layers\.0", r"\1.proj_in"),
    (r"(_mlps\.\d|_head)\.layers\.1", r"\1.layers.0"),
    (r"(_mlps\.\d|_head)\.layers\.2", r"\1.proj_out"),
)  # fmt: skip


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> ours, the hub's without TWIN."""
    # "layers.0" is another layer in the hub's names, so these stay as they are.
    renames = RENAMES if any(name.startswith("image_encoder.") for name in state_dict) else ()
    weights = {}
    for name, t in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        name = FOURIER if name == TWIN else name
        if name in weights and not torch.equal(weights[name], t):
            raise ValueError(f"{name} is there twice, under two names and with other numbers")
        weights[name] = t
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> the hub's, for `load_state_dict` of transformers' class."""
    weights = convert(state_dict)
    return weights | {TWIN: weights[FOURIER].clone()}


def read_config(weights: dict[str, Tensor], settings: dict, overrides: dict, source) -> Config:
    """Sizes by the shapes that most tensors of a kind have, so that a wrong one is told later."""
    # No file tells the authors' 1e-5; transformers' config.json may tell another.
    hub = {"layer_norm_eps": 1e-6} | settings.get("mask_decoder_config", {})
    eps = 1e-5 if any(n.startswith("image_encoder.") for n in weights) else hub["layer_norm_eps"]
    shapes = {name: t.shape for name, t in convert(weights).items()}

    def sizes(pattern: str, axis: int) -> list[int]:
        found = (shape for name, shape in shapes.items() if re.fullmatch(pattern, name))
        return [shape[axis] for shape in found if axis < len(shape)]

    layer, tables = r"vision_encoder\.layers\.(\d+)\.", r"attn\.rel_pos_[hw]"
    kinds = ((f"{layer}layer_norm1.bias", 0), (layer + tables, 1), (f"{layer}mlp.lin1.bias", 0))
    kinds = [sizes(*kind) for kind in (*kinds, (r"mask_decoder\..*layer_norm\d\.bias", 0))]
    if not all(kinds):
        kind = recognise(weights)
        hint = f" The file seems to be {kind}." if kind else ""
        told = f"not SAM, whose names start with vision_ or image_encoder.{hint}"
        raise ValueError(f"{source}: {told}")
    dim, d, mlp_dim, out_dim = map(mode, kinds)
    depth = 1 + max(int(match[1]) for name in shapes if (match := re.match(layer, name)))
    rows = {i: sizes(rf"vision_encoder\.layers\.{i}\.{tables}", 0) for i in range(depth)}
    wide = {i: x[-1] for i, x in rows.items() if x and x[-1] != 2 * WINDOW - 1}
    image_size = 8 * (1 + mode(wide.values())) if wide else 16 * WINDOW
    parts = Path(str(source).split("@")[0]).parts[-2:]  # a file may lie in a folder of that name
    kind = next((kind for name, kind in RELEASED.items() if Path(name).name in parts), None)
    if not MEDSAM.keys() & overrides.keys():
        why = "by its name" if kind else "as no name tells; for MedSAM's: **sam_decoder.MEDSAM"
        print(f"{source}: pixels as {kind or 'SAM'} has them, {why}")
    config = Config(dim, depth, dim // d, mlp_dim, tuple(wide), out_dim, eps, image_size)
    return replace(config, **MEDSAM) if kind == "MedSAM" else config


def resized(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Position tables for the `image_size` of `config`; those of windows need no other."""
    grid, weights = config.image_size // 16, dict(weights)
    table = weights["vision_encoder.pos_embed"].permute(0, 3, 1, 2).float()  # (1,C,H,W)
    table = F.interpolate(table, (grid, grid), mode="bilinear", align_corners=False)
    weights["vision_encoder.pos_embed"] = table.permute(0, 2, 3, 1).contiguous()
    for i in config.global_blocks:
        for axis in "hw":
            name = f"vision_encoder.layers.{i}.attn.rel_pos_{axis}"
            table = weights[name].T[None].float()  # (1,d,N)
            table = F.interpolate(table, 2 * grid - 1, mode="linear", align_corners=False)
            weights[name] = table[0].T.contiguous()  # (2*grid-1,d)
    return weights


def frame_size(size: tuple[int, int], config: Config) -> tuple[int, int]:
    """Height and width that an image of `size` has within the square, at its upper left."""
    S = config.image_size
    if not config.letterbox:
        return S, S
    return tuple(max(1, int(side * (S / max(size)) + 0.5)) for side in size)


# shared: to_rgb
def to_rgb(image):
    """Return a PIL image in RGB; transparency is dropped.

    Raise TypeError for anything else, such as an array or a path, and ValueError for 16-bit and
    float images: Pillow would cut their values off at 255, so that they came out white, or black.
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
    if image.mode == "P":  # else Pillow warns of palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


# end shared


def preprocess(image, config: Config) -> Tensor:
    """PIL image -> (3,S,S) float32: SAM's longest side S, normalised, then zeros; MedSAM's MEDSAM.

    Raise errors as `to_rgb` does. SAM's is the official one. MedSAM's authors resize by skimage's
    cubic splines, here it is PIL's bicubic: 1 to 2 of 255 grey levels apart on average on a noisy
    photo, 3 to 7 at its 99 %.
    """
    import numpy as np
    from PIL import Image

    image = to_rgb(image)
    h, w = frame_size((image.height, image.width), config)
    image = image.resize((w, h), Image.Resampling[config.resample.upper()])
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3,h,w)
    if config.min_max:
        x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
    return F.pad((x - mean) / std, (0, config.image_size - w, 0, config.image_size - h))  # (3,S,S)


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """mask (H,W) -> (1,S,S) float32 in the geometry of `preprocess`, to train with.

    Nearest neighbour. Where a position falls exactly between two source pixels, the result may
    differ by one source pixel from that of PIL or OpenCV.
    """
    h, w = frame_size(mask.shape, config)
    mask = F.interpolate(mask[None, None].float(), (h, w), mode="nearest-exact")[0]  # PIL's nearest
    return F.pad(mask, (0, config.image_size - w, 0, config.image_size - h))  # (1,S,S)


def to_frame(xy: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Points (...,2) or boxes (...,4) in pixels of an image of size (H,W) -> of the square.

    ValueError: one is not within the image or inverted.
    """
    (H, W), (h, w) = size, frame_size(size, config)
    check_inside("prompt", xy, W, H)
    # Multiplied first: the image's edge is then exactly the frame's.
    numerator, denominator = (torch.tensor(x, device=xy.device) for x in ((w, h), (W, H)))
    return (xy.unflatten(-1, (-1, 2)) * numerator / denominator).flatten(-2)


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (M,S/4,S/4) -> probabilities (M,H,W) float32, 0..1, at the image's own `size` (H,W).

    Logits beyond the image, where it does not fill the square, are cut off.
    """
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    logits = logits[None].float()
    if not config.letterbox:
        return resize(logits.sigmoid(), size)[0]  # quirk: in this order, MedSAM_Inference.py
    (h, w), S = frame_size(size, config), config.image_size
    return resize(resize(logits, (S, S))[..., :h, :w], size)[0].sigmoid()


# shared: open_upright
def open_upright(image):
    """Return an image file (str or Path) as a PIL image, turned by its EXIF orientation.

    Anything else is returned as it is. Raise OSError for a file that Pillow cannot read, ValueError
    for one of several pages or of 16-bit colours, of which Pillow would keep the high bytes.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, str | Path):
        return image
    # Not by name: Pillow would map grey TIFFs, and garble those that are to be turned.
    with open(image, "rb") as file, Image.open(file) as opened:
        pages = getattr(opened, "n_frames", 1)
        if pages > 1 and opened.format not in ("MPO", "PSD"):  # a phone's gain maps, layers
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

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    Prompts are arrays, lists or tensors in pixels of the image, as it is upright:
    boxes (Q,4), x1, y1, x2, y2, of one object also (4,); points (Q,P,2), x, y, of one object also
    (P,2) or (2,); labels (Q,P) or (P,), 1 inside of the object (the default), 0 outside, -1 no
    point. Boxes and points together are prompts of the same Q objects.
    Probabilities are float32 (Q,H,W). The masks, uint8 (Q,H,W), are 1 where they are above
    `config.threshold`, else 0. Raise errors as `open_upright` and `preprocess` do, and ValueError
    for wrong prompts.
    """
    image = open_upright(image)
    weight = next(model.parameters())
    pixels = model.preprocess(image)[None].to(weight)  # (1,3,S,S)
    size = (image.height, image.width)
    prompts = prompt_tensors(size, model.config, boxes, points, labels)
    prompts = {name: x.to(weight.device) for name, x in prompts.items()}
    count = len(next(iter(prompts.values())))
    probabilities = torch.zeros(count, *size)

    with evaluating(model):
        features = model.encode_image(pixels)  # (1,C,S/16,S/16)
        for i in range(count):  # one by one: 30 MB a prompt
            prompt = {name: x[None, i : i + 1] for name, x in prompts.items()}
            logits, _ = model.decode(features, **prompt)  # (1,1,1,S/4,S/4)
            probabilities[i] = model.postprocess(logits[0, 0], size)[0]

    probabilities = probabilities.numpy()
    return probabilities, (probabilities > model.config.threshold).astype("uint8")


def prompt_tensors(size: tuple[int, int], config: Config, boxes, points, labels) -> dict:
    """Return the prompts of `segment` in pixels of the square, by their names in `SAM.decode`.

    Tensors boxes (Q,4), points (Q,P,2) and labels (Q,P); without those that are not given.
    Raise ValueError, one line, for shapes that do not fit and prompts outside of the image.
    """
    if boxes is None and points is None:
        raise ValueError("no prompt: segment takes boxes, points or both")
    if points is None and labels is not None:
        raise ValueError("labels belong to points, and no points are given")

    prompts = {}
    if boxes is not None:
        boxes = with_axes(torch.as_tensor(boxes, dtype=torch.float32), 2)
        if boxes.numel() == 0:  # a detector that finds nothing
            boxes = boxes.reshape(0, 4)
        if boxes.shape[1:] != (4,):
            raise ValueError(f"boxes are of shape {tuple(boxes.shape)}, expected (Q,4)")
        prompts["boxes"] = to_frame(boxes, size, config)

    if points is not None:
        points = with_axes(torch.as_tensor(points, dtype=torch.float32), 3)
        if points.shape[2:] != (2,):
            raise ValueError(f"points are of shape {tuple(points.shape)}, expected (Q,P,2)")
        if labels is None:
            labels = torch.ones(points.shape[:2])
        labels = with_axes(torch.as_tensor(labels, dtype=torch.int64), 2)
        if labels.shape != points.shape[:2]:
            have = f"labels are of shape {tuple(labels.shape)}"
            raise ValueError(f"{have}, expected {tuple(points.shape[:2])}, one for each point")
        prompts |= {"points": to_frame(points, size, config), "labels": labels}

    if len(prompts) == 3 and len(boxes) != len(points):
        have = f"{len(boxes)} boxes and points of {len(points)} objects"
        raise ValueError(f"{have}: together they must be of the same objects")
    return prompts


def with_axes(x: Tensor, n: int) -> Tensor:
    """Return a tensor with n axes: axes of 1 come first where it has fewer."""
    return x[(None,) * (n - x.ndim)]


# shared: run_folder
def run_config(settings: dict, kind: str, source, config: type) -> dict:
    """Return the fields of `config`, a dataclass, from the config.json of a run folder of ours.

    Raise ValueError, one line, if it is another model's, of a newer version or was damaged.
    """
    found_kind = settings.get("class")
    version = settings["format"]
    if found_kind != kind or version != 1:
        raise ValueError(f"{source}: holds {found_kind} in format {version}, not {kind} in 1")
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
        fixed = isinstance(first, float) and len(items) != len(default)  # colours, axes
        return not fixed and all(is_like(item, first) for item in items)
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e9  # not NaN either
    if isinstance(default, int) and not isinstance(default, bool):
        return type(value) is int and 0 <= value < 1e9
    return type(value) is type(default)


# end shared


# shared: read_checkpoint
def read_checkpoint(source: str | Path, files: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Load weights and settings from a file, a folder or the hub (`owner/name`, or `…@revision`).

    A folder or repository gives the first of `files` that it has. Return the state dict without the
    wrappers and prefixes of training programs, and the config.json beside it ({} if there is none).
    Raise FileNotFoundError or ValueError, one line, for a file that is missing or holds no weights.
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

    No code in a file is run. Raise ValueError, one line, if it is damaged or holds something else.
    """
    try:
        content = parse_file(path)
    except Exception as error:
        message = " ".join(str(error).split())
        reason = " ".join(f"{error!r:.150}".split())
        advice = "get the whole file"
        if "unsupported global" in message.lower():
            reason = "it has code in it"
            advice = "where it was made, torch.save(model.state_dict(), path)"
        elif "is not run" in message:
            reason = f"{message:.150}"
            advice = "where it was made, torch.save(model.state_dict(), path)"
        raise ValueError(f"{path}: cannot be read ({reason}); {advice}") from None
    if isinstance(content, dict):
        return content

    kind = f"a {type(content).__name__}"
    if isinstance(content, Tensor):
        dtype = str(content.dtype).removeprefix("torch.")
        kind = f"a single tensor, {dtype} of shape {tuple(content.shape)}"
    raise ValueError(f"{path}: holds {kind}, not named tensors (a state dict)")


def parse_file(path: Path):
    """Return whatever a file holds; its first bytes, suffix and records say how it is read."""
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
    """Return the state dict in what a training program saved. Raise ValueError if there is none."""
    weights = content
    for key in ("state_dict", "model", "net"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]

    for name, value in weights.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise ValueError(f"{path}: no state dict, its key {name!r:.80} is of type {kind}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: no state dict, its {name!r} is not a tensor")

    for prefix in ("module.", "net."):
        renamed = {}
        for name, tensor in weights.items():
            bare = name.removeprefix(prefix)
            renamed[name if bare in weights else bare] = tensor  # never two of one name
        weights = renamed
    return weights


# end shared


# shared: script_unpickler
class ScriptObject:
    """An inert stand-in for an object of the archive: `state` is what was saved of it."""

    def __init__(self, *arguments):
        self.state = arguments

    def __setstate__(self, state):
        self.state = state


class ScriptUnpickler(pickle.Unpickler):
    """Reads data.pkl, in which classes of the archive become inert and foreign ones an error."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive = archive
        self.root = root
        self.storages = {}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return type(name, (ScriptObject,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # Bound methods and built-in types: a pickle cannot change them.
        known = {"torch._utils._rebuild_tensor_v2": self.tensor, "torch.device": str}
        known |= {"collections.OrderedDict": dict, "builtins.complex": complex}
        known["torch._utils._rebuild_parameter"] = self.first
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of their items
            for kind in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
                known[f"{module}.{kind}"] = self.first
            known[f"{module}.restore_type_tag"] = self.first
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is not run")
        return known[f"{module}.{name}"]

    def persistent_load(self, place: tuple) -> Tensor:
        """Return a storage as a tensor of one axis; tensors that share it then share memory."""
        _, dtype, key, _, _ = place
        if key not in self.storages:
            numbers = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            flat = torch.empty(0, dtype=dtype)
            if numbers:  # frombuffer takes no empty ones
                flat = torch.frombuffer(numbers, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]

    def tensor(self, storage: Tensor, offset, size, stride, requires_grad, hooks, *more) -> Tensor:
        if any(more):
            raise pickle.UnpicklingError(f"a tensor has {more}, which is not read")
        return storage.as_strided(size, stride, offset)

    def first(self, value, *_):
        return value


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
# end shared


# shared: torchscript
def is_torchscript(path: Path) -> bool:
    """Return True for an archive of torch.jit.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return `torch.jit.load(path).state_dict()`, but without running any code of the archive."""
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
    """Return the parameters and buffers of a module and of those in it, by their dotted names."""
    tensors = {}
    names_of = {}  # class -> what `tensor_names` returns
    pending = [("", module)]
    for _ in range(MOST_MODULES):
        if not pending:
            return tensors
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
    raise ValueError(f"it holds more than {MOST_MODULES:,} modules")


def tensor_names(module: ScriptObject, archive: zipfile.ZipFile, root: str) -> set[str] | None:
    """Return which attributes of a module are parameters or buffers; None if it is no module.

    The archive's code, read as text, says so. Raise ValueError if a module makes its tensors by
    `__setstate__`, since that would have to be run.
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
            raise ValueError(f"{kind} makes its tensors by code (__setstate__), which is not run")
        return None

    # Like torch.jit: a buffer is declared as Tensor, not as Optional[Tensor].
    declared = re.findall(r'^  (?:__annotations__\["(.*?)"\] =|(\w+) :) Tensor$', fields, re.M)
    declared = {quoted or plain for quoted, plain in declared}
    return {*names["parameters"]} | declared.intersection(names["buffers"])


MOST_MODULES = 100_000  # a small file can nest modules in each other so that they never end
# end shared


# shared: download
def download(source: str, files: tuple[str, ...]) -> Path:
    """Return the first of `files` that a hub repository has; download it unless it is cached.

    source: `owner/name` or `owner/name@revision`. Its config.json is put beside the file.
    Raise FileNotFoundError or OSError, one line, if there is no such file or no connection.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    repository, _, revision = source.partition("@")
    is_file = Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_file or repository.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder; a hub id is owner/name")
    for name in files:
        cached = hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)

    try:
        fetch(repository, "config.json", revision)
        for name in files:
            path = fetch(repository, name, revision)
            if path is not None:
                return path
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"{source}: neither file nor repository on the hub") from None
    except Exception as error:  # its class depends on the version of huggingface_hub
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise OSError(
            f"{source}: could not be downloaded from the hub ({reason}); check the connection, "
            "or get the file elsewhere and give its path"
        ) from None
    raise FileNotFoundError(f"{source}: the repository has none of {', '.join(files)}")


def fetch(repository: str, name: str, revision: str) -> Path | None:
    """Download one file of a hub repository, saying its size; None if the repository lacks it."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    url = hub.hf_hub_url(repository, name, revision=revision or None)
    try:
        size = hub.get_hf_file_metadata(url).size or 0
    except EntryNotFoundError:
        return None

    version = f"{repository}@{revision}" if revision else repository
    print(f"downloading {name}, {size / 1e6:,.1f} MB, of {version} from {hub.constants.ENDPOINT}")
    return Path(hub.hf_hub_download(repository, name, revision=revision or None))


# end shared


# shared: tensor_fault
def tensor_fault(found: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor of a file, "" if nothing is."""
    if found is not None and found.is_nested:
        return "is a nested tensor, expected a dense one"
    shape = "missing" if found is None else tuple(found.shape)
    expected_shape = "no such tensor" if expected is None else tuple(expected.shape)
    if shape != expected_shape:
        return f"is {shape}, expected {expected_shape}"
    if not expected.is_floating_point():
        return ""

    if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(found.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, expected float16, bfloat16, float32 or float64"
    if found.layout != torch.strided or found.is_meta:
        return "is sparse or has no values, expected a dense tensor"
    if found.numel():
        low, high = torch.aminmax(found.detach())  # NaN if any value is; ten times isfinite's speed
        largest = torch.finfo(expected.dtype).max
        if not -largest <= low.item() <= high.item() <= largest:
            return f"holds NaN, infinity or values beyond {str(expected.dtype)[6:]}"
    return ""


# end shared


# shared: check_complete
def check_complete(found: dict[str, Tensor], expected: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, that names the first tensors that do not fit.

    Names and shapes must be the expected ones. What fills a floating-point tensor must be finite
    floating-point numbers; what fills an index may be of any type.
    """
    faults = []
    for name in expected | found:
        fault = tensor_fault(found.get(name), expected.get(name))
        if fault:
            faults.append(f"{name} {fault}")
    if not faults:
        return

    hint = ""
    if len(faults) > len(expected) / 2 and recognise(found):
        hint = f"; the file seems to be {recognise(found)}"
    raise ValueError(f"{source}: {len(faults)} tensors do not fit: {'; '.join(faults[:5])}{hint}")


# Names that only one kind of file has, the most special kinds first.
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
    """Return which known kind of file has tensors of these names, "" if none."""
    for pattern, kind in KINDS.items():
        if any(re.match(rf"(.*\.)?{pattern}", name) for name in weights):
            return kind
    return ""


# end shared
