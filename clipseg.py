"""CLIPSeg: segment an image by a phrase, or by another image with its mask.

Paper: Lüddecke & Ecker, CVPR 2022, arXiv 2112.10003. Code: github.com/timojl/clipseg at 77c4e2d,
models/clipseg.py (MIT). Parameter names follow transformers' port (5.23, modeling_clipseg.py),
except inside CLIP's blocks, which keep OpenAI's names and packed q, k, v (see `convert`). Weights
on the hub: CIDAS/clipseg-rd64-refined, clipseg-rd64, clipseg-rd16. Their licence is unclear: the
model cards say Apache 2.0, but the original README excludes them from its MIT licence. The original
release (rd64-uni-refined.pth, rd64-uni.pth, rd16-uni.pth) contains only the decoder; also pass
clip="ViT-B-16.pt" (OpenAI's, MIT).

    image (B,3,352,352)               tokens (B,T)       or an image prompt (B,3,352,352)
      CLIP's ViT-B/16, blocks 0..9      CLIP's text        made by `image_prompt`:
      outputs of blocks 3, 6, 9         transformer        the same ViT, all 12 blocks
    features (B,3,1+22,22,768)        condition (B,512) <--'
      |                                 |
    decoder, 64 channels:               |
      Linear(block 9), FiLM <-----------'    Linear: 768 -> 64 channels. FiLM: scale and shift
      transformer layer                      each channel by linear functions of the condition.
      + Linear(block 6), transformer layer
      + Linear(block 3), transformer layer   Features: 485 tokens stored as 23x22; the class
      (B,64,22,22), transposed convolutions  token ends an otherwise zero first row.
    logits (B,1,352,352)

Image sides: multiples of 16. Not implemented: image prompts by masking CLIP's attention, and the
ViT-B/32 backbone. Texts need `tokenizer.py` and `clip_merges.txt.xz` next to this file (copy both),
and the package `tokenizers`; the tokens of any other CLIP tokenizer work, too.

    model = CLIPSeg.from_pretrained("CIDAS/clipseg-rd64-refined")
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
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

# Shapes: B batch, T text tokens, L taps (vision blocks that feed the decoder), N = 1 + Hp*Wp vision
# tokens, Hp = H/16, Wp = W/16, C width of a tower, D width of the decoder, h heads, d width of a
# head, S side of a preprocessed image.
# "quirk" marks behaviour copied from the original. Code between "# shared: NAME" and "# end shared"
# is identical in other model files. A run folder is what train.py writes.


@dataclass(frozen=True)
class Config:
    taps: tuple[int, ...] = (3, 6, 9)  # indices of the vision blocks that feed the decoder
    reduce_dim: int = 64  # channels in the decoder
    # True: 3x3 conv + two stride-4 transposed convs; False: one 16x16 transposed conv.
    refined: bool = True
    heads: int = 4  # attention heads in the decoder
    ffn_dim: int = 2048  # hidden width of the decoder's MLPs
    vision_dim: int = 768
    vision_layers: int = 12  # blocks after the last tap serve image prompts only
    text_dim: int = 512
    text_layers: int = 12
    embed_dim: int = 512  # width of the space that texts and image prompts share
    image_size: int = 352  # side of the square that `preprocess` returns
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # quirk: ImageNet's, not CLIP's; RGB in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    text_length: int = 77  # tokens to which a text is cut or padded
    # No effect: everything after the first 49407 (end of text) is ignored.
    pad_token: int = 49407
    adapter_dim: int = 0  # width of the adapters in both towers, 64 in VLSM-Adapter; 0: none
    # Probability above which a pixel is foreground. Zero-shot, the authors used 0.3 and 0.5 on
    # PhraseCut, 0.24 to 0.28 on Pascal.
    threshold: float = 0.5


VARIANTS = {
    "rd64-refined": Config(),  # 150,747,746 parameters, of which decoder 1,127,009
    "rd64": Config(refined=False),  # 150,693,890, of which decoder 1,073,153
    "rd16": Config(reduce_dim=16, refined=False),  # 149,884,418, of which decoder 263,681
    "mini": Config(  # 4,269,042, most of them token embeddings; for tests and demos
        taps=(0, 1, 2), reduce_dim=32, ffn_dim=128, vision_dim=128, vision_layers=4,
        text_dim=64, text_layers=2, embed_dim=64, image_size=128,
    ),
}  # fmt: skip

HEAD_WIDTH = 64  # channels of an attention head in CLIP's towers


# shared: clip_text
class TextBlock(nn.Module):
    """A layer of CLIP's text transformer: causal self-attention, then an MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(dim, 4 * dim),
                "c_proj": nn.Linear(4 * dim, dim),
            }
        )
        self.ln_2 = nn.LayerNorm(dim)
        # Slots for adapters after attention and MLP; an adapter adds its own residual connection.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,C) -> (B,T,C)."""
        T = x.shape[1]
        causal_mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # True: masked

        y = self.ln_1(x)
        y = self.attn(y, y, y, attn_mask=causal_mask, need_weights=False)[0]  # (B,T,C)
        x = x + self.adapters[0](y)

        y = self.mlp["c_fc"](self.ln_2(x))  # (B,T,4C)
        y = y * torch.sigmoid(1.702 * y)  # quirk: CLIP's QuickGELU
        y = self.mlp["c_proj"](y)  # (B,T,C)
        return x + self.adapters[1](y)


# end shared


# openai/CLIP, clip/model.py, class VisionTransformer; transformers: CLIPSegVisionEmbeddings
class VisionEmbeddings(nn.Module):
    """Embeddings of 16x16 patches and of the class token, plus positions."""

    def __init__(self, dim: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.patch_embedding = nn.Conv2d(3, dim, 16, stride=16, bias=False)
        self.position_embedding = nn.Embedding(1 + 14 * 14, dim)  # CLIP was trained at 224 px
        nn.init.normal_(self.position_embedding.weight, std=dim**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> (B,N,C), the class token first."""
        class_position, grid_positions = self.position_embedding.weight.split((1, 14 * 14))

        # Positions of other image sizes are interpolated, without antialiasing.
        grid_positions = grid_positions.T.unflatten(1, (14, 14))[None]  # (1,C,14,14)
        patches = self.patch_embedding(image)  # (B,C,Hp,Wp)
        patches = patches + F.interpolate(
            grid_positions, patches.shape[2:], mode="bicubic", align_corners=False
        )
        patches = patches.flatten(2).transpose(1, 2)  # (B,Hp*Wp,C)

        class_token = class_position + self.class_embedding  # (1,C)
        class_token = class_token.expand(image.shape[0], -1, -1)  # (B,1,C)
        return torch.cat([class_token, patches], 1)  # (B,N,C)


# openai/CLIP, clip/model.py, class ResidualAttentionBlock; transformers: CLIPSegEncoderLayer
class VisionBlock(TextBlock):
    """A layer of CLIP's vision transformer: full self-attention, then an MLP.

    Its modules are those of `TextBlock`, because CLIP has one class for both towers; only `forward`
    differs. The attention is equivalent to

        y = self.attn(y, y, y, need_weights=False)[0]

    but avoids nn.MultiheadAttention's transposes to (N,B,C).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,C) -> (B,N,C)."""
        y = self.ln_1(x)
        qkv = F.linear(y, self.attn.in_proj_weight, self.attn.in_proj_bias)  # (B,N,3C)
        qkv = qkv.unflatten(2, (3, self.attn.num_heads, -1))  # (B,N,3,h,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,h,N,d) each
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        y = y.transpose(1, 2).flatten(2)  # (B,N,C)
        x = x + self.adapters[0](self.attn.out_proj(y))

        y = self.mlp["c_fc"](self.ln_2(x))  # (B,N,4C)
        y = y * torch.sigmoid(1.702 * y)  # quirk: CLIP's QuickGELU
        y = self.mlp["c_proj"](y)  # (B,N,C)
        return x + self.adapters[1](y)


# openai/CLIP, clip/model.py, class VisionTransformer; transformers: CLIPSegVisionModel
class VisionModel(nn.Module):
    """CLIP's ViT-B/16."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.embeddings = VisionEmbeddings(dim)
        self.pre_layrnorm = nn.LayerNorm(dim)  # quirk: spelled so on the hub
        blocks = [VisionBlock(dim, dim // HEAD_WIDTH) for _ in range(layers)]
        # A ModuleDict only to match the checkpoint's parameter names.
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = nn.LayerNorm(dim)  # applied in `CLIPSeg.encode_image_prompt`

    def forward(self, image: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Return the outputs of the blocks with indices `taps`, (B,N,C) each.

        image (B,3,H,W). Blocks after the last tap do not run.
        Raise ValueError if a side is not a multiple of 16.
        """
        if any(side % 16 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 16, not {tuple(image.shape[2:])}")

        x = self.pre_layrnorm(self.embeddings(image))  # (B,N,C)
        outputs = []
        for i, block in enumerate(self.encoder["layers"][: max(taps) + 1]):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs


# openai/CLIP, clip/model.py, CLIP.encode_text; transformers: CLIPSegTextModel
class TextModel(nn.Module):
    """CLIP's text transformer."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        # ModuleDicts only to match the checkpoint's parameter names.
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(49408, dim),
                "position_embedding": nn.Embedding(77, dim),
            }
        )
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, std=0.02)

        blocks = [TextBlock(dim, dim // HEAD_WIDTH) for _ in range(layers)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*blocks)})
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the hidden state at each text's end-of-text token: tokens (B,T) -> (B,C).

        Tokens after the end of the longest text are dropped. This changes nothing, because causal
        attention never reads them.
        """
        end = tokens.argmax(1)  # (B,) end of text: position of the first 49407, the largest id
        if not torch.compiler.is_compiling():  # compiled shapes must not depend on values
            longest = int(end.max()) + 1
            tokens = tokens[:, :longest]  # (B,T)

        positions = self.embeddings["position_embedding"].weight[: tokens.shape[1]]  # (T,C)
        x = self.embeddings["token_embedding"](tokens) + positions  # (B,T,C)
        x = self.encoder["layers"](x)  # (B,T,C)
        rows = torch.arange(x.shape[0], device=x.device)
        return self.final_layer_norm(x[rows, end])  # (B,C)


# openai/CLIP, clip/model.py, class CLIP; transformers: CLIPSegModel
class CLIP(nn.Module):
    """CLIP's two towers and their projections into the shared space."""

    def __init__(self, config: Config):
        super().__init__()
        # ln(1/0.07), rounded as in transformers: CLIP's log temperature; unused, kept so
        # checkpoints round-trip.
        self.logit_scale = nn.Parameter(torch.tensor(2.6592), requires_grad=False)
        self.text_model = TextModel(config.text_dim, config.text_layers)
        self.vision_model = VisionModel(config.vision_dim, config.vision_layers)
        self.visual_projection = nn.Linear(config.vision_dim, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_dim, config.embed_dim, bias=False)


# shared: adapter
# naamiinepal/vlsm-adapter, src/models/clipseg_adapter.py, class Adapter
class Adapter(nn.Module):
    """A residual bottleneck MLP after a frozen layer (VLSM-Adapter, arXiv 2405.06196).

    dim: channels of the layer's output (C). width: hidden channels.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (...,C) -> (...,C)."""
        y = F.relu(self.fc1(x))  # (...,width)
        return x + F.relu(self.fc2(y))


# end shared


# shared: token_grid
def tokens_to_grid(x: Tensor, Hp: int, Wp: int) -> Tensor:
    """Lay vision tokens out as a grid, so that the shape records the image's height and width.

    x (B,L,1+Hp*Wp,C), the class token first -> (B,L,1+Hp,Wp,C). The class token sits at the end of
    an extra first row, otherwise zero.
    """
    padded = F.pad(x, (0, 0, Wp - 1, 0))  # (B,L,Wp+Hp*Wp,C)
    return padded.unflatten(2, (1 + Hp, Wp))  # (B,L,1+Hp,Wp,C)


def grid_to_tokens(grid: Tensor) -> Tensor:
    """Undo `tokens_to_grid`: (B,L,1+Hp,Wp,C) -> (B,L,1+Hp*Wp,C), the class token first."""
    Wp = grid.shape[3]
    padded = grid.flatten(2, 3)  # (B,L,Wp+Hp*Wp,C)
    return padded[:, :, Wp - 1 :]  # (B,L,1+Hp*Wp,C)


# end shared


# shared: decoder_layer
# timojl/clipseg, models/clipseg.py, class CLIPDensePredT (nn.TransformerEncoderLayer);
# transformers: CLIPSegDecoderLayer
class DecoderLayer(nn.Module):
    """A post-norm transformer encoder layer: LayerNorm follows each residual connection."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.heads = heads
        # ModuleDicts only give the parameters their names in the checkpoint.
        self.self_attn = nn.ModuleDict(
            {
                "k_proj": nn.Linear(dim, dim),
                "v_proj": nn.Linear(dim, dim),
                "q_proj": nn.Linear(dim, dim),
                "out_proj": nn.Linear(dim, dim),
            }
        )
        self.layer_norm1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, ffn_dim), "fc2": nn.Linear(ffn_dim, dim)})
        self.layer_norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,D) -> (B,N,D)."""
        q = self.split_heads(self.self_attn["q_proj"](x))  # (B,h,N,d)
        k = self.split_heads(self.self_attn["k_proj"](x))  # (B,h,N,d)
        v = self.split_heads(self.self_attn["v_proj"](x))  # (B,h,N,d)
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        y = y.transpose(1, 2).flatten(2)  # (B,N,D)
        x = self.layer_norm1(x + self.self_attn["out_proj"](y))

        # quirk: ReLU; config.json on the hub says quick_gelu, but transformers ignores it here
        y = F.relu(self.mlp["fc1"](x))  # (B,N,ffn_dim)
        return self.layer_norm2(x + self.mlp["fc2"](y))

    def split_heads(self, x: Tensor) -> Tensor:
        """x (B,N,D) -> (B,h,N,d)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B,h,N,d)


# end shared


# shared: clipseg_decoder
# timojl/clipseg, models/clipseg.py, class CLIPDensePredT; transformers: CLIPSegDecoder
class Decoder(nn.Module):
    """CLIPSeg's decoder: combine the taps from deep to shallow, then upsample to the image's size.

    dim: channels of the taps (C). condition_dim: width of the prompt's embedding. reduce_dim:
    channels in the decoder (D). num_taps: number of vision blocks that feed the decoder (L).
    refined: True: 3x3 convolution and two transposed convolutions with stride 4; False: one 16x16
    transposed convolution.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        reduce_dim: int,
        heads: int,
        ffn_dim: int,
        num_taps: int,
        refined: bool,
    ):
        super().__init__()
        D = reduce_dim
        self.film_mul = nn.Linear(condition_dim, D)
        self.film_add = nn.Linear(condition_dim, D)
        # Index 0 of `reduces` and `layers` belongs to the deepest tap.
        self.reduces = nn.ModuleList([nn.Linear(dim, D) for _ in range(num_taps)])
        self.layers = nn.ModuleList([DecoderLayer(D, heads, ffn_dim) for _ in range(num_taps)])

        if refined:
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(D, D, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(D, D // 2, 4, stride=4),
                nn.ReLU(),
                nn.ConvTranspose2d(D // 2, 1, 4, stride=4),
            )
        else:
            self.transposed_convolution = nn.ConvTranspose2d(D, 1, 16, stride=16)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """features (B,L,1+Hp,Wp,C), condition (B,condition_dim) -> logits (B,1,16*Hp,16*Wp).

        Features are laid out by `tokens_to_grid`, the shallowest tap first. A batch of 1 broadcasts
        against the other input: one image with B prompts, or B images with one prompt.
        """
        Hp = features.shape[2] - 1
        Wp = features.shape[3]
        features_per_tap = grid_to_tokens(features).unbind(1)  # L of (B,N,C)
        deepest, *shallower = features_per_tap[::-1]

        # quirk: FiLM is applied to the deepest tap only, class token included.
        scale = self.film_mul(condition)[:, None]  # (B,1,D)
        shift = self.film_add(condition)[:, None]  # (B,1,D)
        x = scale * self.reduces[0](deepest) + shift  # (B,N,D)
        x = self.layers[0](x)  # (B,N,D)
        for i, tap in enumerate(shallower, start=1):
            x = self.reduces[i](tap) + x  # (B,N,D)
            x = self.layers[i](x)  # (B,N,D)

        patches = x[:, 1:].transpose(1, 2)  # (B,D,Hp*Wp), without the class token
        patches = patches.unflatten(2, (Hp, Wp))  # (B,D,Hp,Wp)
        return self.transposed_convolution(patches)  # (B,1,16*Hp,16*Wp)


# end shared


# timojl/clipseg, models/clipseg.py, class CLIPDensePredT; transformers: CLIPSegForImageSegmentation
class CLIPSeg(nn.Module):
    """CLIP's towers and the decoder that turns vision tokens and a prompt into a mask.

    To segment by an image prompt, pass an image and a mask (H,W) of 0 and 1 that marks an object:

        support = model.preprocess(support_image)  # (3,S,S)
        mask = preprocess_mask(mask, model.config)  # (1,S,S)
        prompt = model.image_prompt(support, mask)  # (3,S,S)
        condition = model.encode_image_prompt(prompt[None])  # (1,embed_dim)
        logits = model(model.preprocess(image)[None], condition=condition)  # (1,1,S,S)
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.heads < 1 or config.reduce_dim % config.heads:
            raise ValueError(f"heads={config.heads}: must divide reduce_dim={config.reduce_dim}")

        self.config = config
        self.clip = CLIP(config)
        self.decoder = Decoder(
            dim=config.vision_dim,
            condition_dim=config.embed_dim,
            reduce_dim=config.reduce_dim,
            heads=config.heads,
            ffn_dim=config.ffn_dim,
            num_taps=len(config.taps),
            refined=config.refined,
        )
        self.freeze_image_prompts()

        self.adapter = nn.Identity()
        if config.adapter_dim:
            self.add_adapters(config.adapter_dim)

    def freeze_image_prompts(self) -> None:
        """Freeze the modules that only image prompts use.

        With text prompts these get no gradient; freezing them avoids unused parameters (e.g. under
        DDP).
        """
        vision = self.clip.vision_model
        vision.encoder["layers"][max(self.config.taps) + 1 :].requires_grad_(False)
        vision.post_layernorm.requires_grad_(False)
        self.clip.visual_projection.requires_grad_(False)

    def add_adapters(self, width: int) -> None:
        """Add an adapter to the condition, and two to the first max(taps) blocks of each tower.

        Source: naamiinepal/vlsm-adapter, src/models/clipseg_adapter.py, class CLIPSegDenseAdapter.
        quirk: block max(taps) has none, although the decoder uses its output. 4 * width: in the
        original the condition's adapter is 256 wide, the others 64.
        """
        self.adapter = Adapter(self.config.embed_dim, 4 * width)
        depth = max(self.config.taps)
        for block in self.clip.vision_model.encoder["layers"][:depth]:
            adapters = [Adapter(self.config.vision_dim, width) for _ in range(2)]
            block.adapters = nn.ModuleList(adapters)
        for block in self.clip.text_model.encoder["layers"][:depth]:
            adapters = [Adapter(self.config.text_dim, width) for _ in range(2)]
            block.adapters = nn.ModuleList(adapters)

    def forward(
        self, image: Tensor, tokens: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """image (B,3,H,W) normalised, H and W multiples of 16, and a prompt -> logits (B,1,H,W).

        Pass exactly one of: tokens (B,T), or condition (B,embed_dim) from `encode_text`, from
        `encode_image_prompt`, or a mix of both, w * text + (1 - w) * image, as in the authors'
        training. A batch of 1 broadcasts against the other input: one image with B prompts, or B
        images with one prompt.
        """
        return self.decode(self.encode_image(image), tokens, condition)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> features (B,L,1+Hp,Wp,C), see `tokens_to_grid`."""
        H, W = image.shape[2:]
        outputs = self.clip.vision_model(image, self.config.taps)  # L of (B,N,C)
        hidden = torch.stack(outputs, 1)  # (B,L,N,C)
        return tokens_to_grid(hidden, H // 16, W // 16)  # (B,L,1+Hp,Wp,C)

    def decode(
        self, features: Tensor, tokens: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """features from `encode_image` and a prompt as for `forward` -> logits (B,1,H,W)."""
        if (tokens is None) == (condition is None):
            raise ValueError("a prompt is either tokens or condition: give one of the two")
        if condition is None:
            condition = self.encode_text(tokens)
        return self.decoder(features, self.adapter(condition))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> condition (B,embed_dim), not normalised."""
        return self.clip.text_projection(self.clip.text_model(tokens))

    def encode_image_prompt(self, image: Tensor) -> Tensor:
        """image (B,3,H,W), made by `image_prompt` -> condition (B,embed_dim), not normalised."""
        last = self.config.vision_layers - 1
        hidden = self.clip.vision_model(image, (last,))[0]  # (B,N,C)
        class_token = self.clip.vision_model.post_layernorm(hidden[:, 0])  # (B,C)
        return self.clip.visual_projection(class_token)

    def preprocess(self, image) -> Tensor:
        """PIL image -> (3,S,S); see the function `preprocess` below."""
        return preprocess(image, self.config)

    def image_prompt(self, image: Tensor, mask: Tensor) -> Tensor:
        """image (3,H,W), mask (1,H,W) -> (3,S,S); see the function `image_prompt` below."""
        return image_prompt(image, mask, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """logits (1,h,w) -> probabilities (1,H,W); see the function `postprocess` below."""
        return postprocess(logits, size, self.config)

    def segment(self, image, prompt: str) -> tuple:
        """Segment an image or its file; see the function `segment` below."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(cls, source: str | Path, clip=None, **overrides) -> "CLIPSeg":
        """Load a model in evaluation mode.

        source: a file, a folder, a run folder or a hub id.
        clip: file or hub id of CLIP ViT-B/16, under OpenAI's or transformers' names, if `source`
        contains only the decoder, as the original release does.
        overrides: fields of Config that replace those of the file.
        Raise ValueError or FileNotFoundError, one line, if a tensor does not fit.
        """
        weights, settings = read_checkpoint(source, FILES)
        check_kind(weights, source)
        weights = to_official(weights)
        has_clip = any(name.startswith("clip.") for name in weights)
        if has_clip and clip is not None:
            raise ValueError(f"{source}: contains CLIP already; remove clip= (--clip)")
        if not has_clip and clip is None:
            raise ValueError(
                f"{source}: contains no CLIP; add OpenAI's with clip='ViT-B-16.pt' "
                "(--clip ViT-B-16.pt)"
            )
        if clip is not None:
            weights |= to_official(read_clip(clip))

        config = config_of(weights, settings, source)
        model = cls(replace(config, **overrides))
        expected = required_tensors(to_official(model.state_dict()), weights, source)
        files = source if clip is None else f"{source} with {clip}"
        check_complete(weights, expected, files)  # under the hub's names
        # Only untrained adapters are not in `weights`: they keep their initial values.
        model.load_state_dict(model.state_dict() | convert(weights))
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",  # of openai/clip-vit-base-patch16
    "pytorch_model.bin",
)
# Keys of the hub's config.json -> fields of Config. Everything else comes from the closest entry of
# VARIANTS.
SETTINGS = {"extract_layers": "taps", "decoder_num_attention_heads": "heads"}
# Name prefixes of CLIP's towers in a file without a decoder: OpenAI's, then transformers'.
CLIP_PREFIXES = (
    "visual.conv1.",
    "visual.layer1.",
    "text_model.embeddings.",
    "vision_model.embeddings.",
)
# Patterns of names that are not loaded.
IGNORED = (
    r"clip\.(text|vision)_model\.embeddings\.position_ids",  # 0, 1, 2, ... of old transformers
    r"clip_model\.(input_resolution|context_length|vocab_size)",  # sizes in OpenAI's archive
    r"model\.(class_|positional_|proj|conv1|ln_p|transformer).*",  # copy of clip_model.visual
    r"reduce\.(weight|bias)",  # unused in the original code
)
# Prefixes of names in OpenAI's CLIP, which is `clip_model` in the original code -> the hub's. With
# `CLIP_LAYER` and packed q, k, v split, for example,
#   clip_model.visual.transformer.resblocks.0.attn.in_proj_weight
#   -> clip.vision_model.encoder.layers.0.self_attn.{q,k,v}_proj.weight
OPENAI_CLIP = {
    "clip_model.logit_scale": "clip.logit_scale",
    "clip_model.text_projection": "clip.text_projection.weight",  # transposed
    "clip_model.token_embedding.": "clip.text_model.embeddings.token_embedding.",
    "clip_model.positional_embedding": "clip.text_model.embeddings.position_embedding.weight",
    "clip_model.transformer.resblocks.": "clip.text_model.encoder.layers.",
    "clip_model.ln_final.": "clip.text_model.final_layer_norm.",
    "clip_model.visual.proj": "clip.visual_projection.weight",  # transposed
    "clip_model.visual.class_embedding": "clip.vision_model.embeddings.class_embedding",
    "clip_model.visual.positional_embedding": (
        "clip.vision_model.embeddings.position_embedding.weight"
    ),
    "clip_model.visual.conv1.": "clip.vision_model.embeddings.patch_embedding.",
    "clip_model.visual.ln_pre.": "clip.vision_model.pre_layrnorm.",
    "clip_model.visual.transformer.resblocks.": "clip.vision_model.encoder.layers.",
    "clip_model.visual.ln_post.": "clip.vision_model.post_layernorm.",
}
TRANSPOSED = ("clip_model.text_projection", "clip_model.visual.proj")  # (in,out) at OpenAI
# Prefixes of names within a layer of CLIP: OpenAI's and ours -> the hub's.
CLIP_LAYER = {
    "attn.": "self_attn.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def check_kind(weights: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, if the weights are known to be those of another model."""
    if any(name.startswith(CLIP_PREFIXES) for name in weights):
        raise ValueError(
            f"{source}: is CLIP without a decoder, not CLIPSeg; use CIDAS/clipseg-rd64-refined, "
            "or rd64-uni-refined.pth as weights and this file as clip= (--clip)"
        )
    kind = recognise(weights)
    if kind not in ("", "CLIPSeg", "a decoder of CLIPSeg without CLIP"):  # values of KINDS
        raise ValueError(f"{source}: seems to be {kind}, not CLIPSeg")


def read_clip(source) -> dict[str, Tensor]:
    """Read CLIP ViT-B/16, named as within a CLIPSeg. Raise ValueError if it is another model."""
    weights = read_checkpoint(source, CLIP_FILES)[0]
    prefix = "clip_model."
    patches = weights.get("visual.conv1.weight")  # OpenAI's name
    if patches is None:
        prefix = "clip."
        patches = weights.get("vision_model.embeddings.patch_embedding.weight")  # transformers'

    if patches is None or patches.shape[2:] != (16, 16):
        kind = recognise(weights) or "an unknown file"
        raise ValueError(
            f"{source}: is {kind}, not CLIP ViT-B/16; clip= (--clip) takes OpenAI's ViT-B-16.pt"
        )
    return {prefix + name: tensor for name, tensor in weights.items()}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from any known naming to the hub's, with separate q, k, v projections.

    It then fits transformers' CLIPSegForImageSegmentation. Names of the hub stay as they are. Raise
    ValueError if two tensors get one name.
    """
    bare = {name.removeprefix("clipseg."): tensor for name, tensor in state_dict.items()}  # medvlsm
    weights = {}
    for name, tensor in hub_decoder(bare).items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        if name in TRANSPOSED:
            tensor = tensor.T.contiguous()  # (out,in)
        name = replace_prefix(name, OPENAI_CLIP)
        layer, inner = split_layer(name)
        name = layer + replace_prefix(inner, CLIP_LAYER)

        for part_name, part in unpack(name, tensor).items():
            if part_name in weights:
                raise ValueError(f"{part_name} occurs under two names; remove one of the two")
            weights[part_name] = part
    return weights


def split_layer(name: str) -> tuple[str, str]:
    """Split the hub's name of a tensor in a layer of CLIP into the layer and the rest.

    Other names are returned as the rest, with "" as the layer.
    """
    match = re.fullmatch(r"(clip\.(?:text|vision)_model\.encoder\.layers\.\d+\.)(.*)", name)
    if match is None:
        return "", name
    return match[1], match[2]


# shared: original_decoder
# The decoder's names in CLIPSeg's original release, such as rd64-uni-refined.pth -> the hub's:
# prefixes of names, then parts of the names in a layer. With packed q, k, v split, for example,
#   blocks.0.self_attn.in_proj_weight -> decoder.layers.0.self_attn.{q,k,v}_proj.weight
ORIGINAL_DECODER = {
    "film_mul.": "decoder.film_mul.",
    "film_add.": "decoder.film_add.",
    "reduces.": "decoder.reduces.",
    "blocks.": "decoder.layers.",
    "trans_conv.": "decoder.transposed_convolution.",
}
ORIGINAL_LAYER = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".linear1.": ".mlp.fc1.",
    ".linear2.": ".mlp.fc2.",
}


def hub_decoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the decoder of CLIPSeg's original release to the hub's names, with separate q, k, v.

    Return all other tensors unchanged.
    """
    weights = {}
    for name, tensor in state_dict.items():
        hub_name = replace_prefix(name, ORIGINAL_DECODER)
        if hub_name == name:
            weights[name] = tensor
            continue
        for original, hub in ORIGINAL_LAYER.items():
            hub_name = hub_name.replace(original, hub)
        weights |= unpack(hub_name, tensor)
    return weights


def replace_prefix(name: str, table: dict[str, str]) -> str:
    """Return a name with its prefix replaced by the first match in `table`, else unchanged."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def unpack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return {name: tensor}, or three tensors if it is a packed projection of q, k and v."""
    start, in_proj, leaf = name.partition("in_proj_")
    if not in_proj or tensor.ndim == 0:
        return {name: tensor}

    weights = {}
    parts = tensor.chunk(3)  # a malformed tensor may give fewer; `check_complete` reports it
    for letter, part in zip("qkv", parts, strict=False):
        weights[f"{start}{letter}_proj.{leaf}"] = part.clone()
    return weights


# end shared


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from any known naming to ours.

    Parameter names follow the hub's, except inside CLIP's blocks, which keep OpenAI's names and
    packed q, k, v.
    """
    ours = {hub: our for our, hub in CLIP_LAYER.items()}
    official = to_official(state_dict)

    weights = {}
    for name, tensor in official.items():
        layer, inner = split_layer(name)
        projection, _, leaf = inner.partition("_proj.")
        if projection in ("self_attn.k", "self_attn.v"):
            continue  # packed with q

        if projection == "self_attn.q":
            parts = [official[f"{layer}self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            weights[f"{layer}attn.in_proj_{leaf}"] = torch.cat(parts)  # (3C,C) or (3C,)
        else:
            weights[layer + replace_prefix(inner, ours)] = tensor
    return weights


def config_of(weights: dict[str, Tensor], settings: dict, source) -> Config:
    """Return the config of weights, under the hub's names, with these settings in config.json.

    If config.json does not list the taps, use the closest variant's and print a note.
    """
    if "format" in settings:  # a run folder of ours
        return Config(**run_config(settings, "CLIPSeg", source, Config))

    config = closest_variant(weights, CLIPSeg, to_official)
    fields = {}
    for key, name in SETTINGS.items():
        if key in settings:
            value = settings[key]
            fields[name] = tuple(value) if isinstance(value, list) else value
    if "taps" not in fields:
        # quirk: experiments/*.yaml have (3, 7, 9); the code's default, the demo, transformers and
        # the hub have (3, 6, 9)
        print(f"{source}: no config.json lists the taps; assuming taps {config.taps}")
    return replace(config, **fields)


# shared: closest_variant
def closest_variant(weights: dict[str, Tensor], kind: type[nn.Module], naming) -> Config:
    """Return the variant with the most tensors of the same name and shape as `weights`.

    naming: a function that renames the state dict of a `kind` to the names of the file.
    """
    closest = None
    most_equal = -1
    for config in VARIANTS.values():
        with torch.device("meta"):
            state_dict = naming(kind(config).state_dict())

        equal = 0
        for name, tensor in state_dict.items():
            equal += name in weights and weights[name].shape == tensor.shape
        if equal > most_equal:
            closest = config
            most_equal = equal
    return closest


# end shared


# shared: adapter_tensors
def required_tensors(expected: dict[str, Tensor], weights: dict[str, Tensor], source) -> dict:
    """Return the expected tensors that a file must contain.

    A file without any adapter may be loaded into a model with adapters; they stay untrained, and a
    note is printed.
    """
    without_adapters = {}
    for name, tensor in expected.items():
        if "adapter" not in name:
            without_adapters[name] = tensor
    if len(without_adapters) == len(expected) or any("adapter" in name for name in weights):
        return expected
    print(f"{source}: contains no adapters; those of the model are untrained")
    return without_adapters


# end shared


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


# shared: stretch
def preprocess(image, config: Config) -> Tensor:
    """Resize a PIL image to a square and normalise it -> (3,S,S) float32.

    The aspect ratio is not kept. Raise errors as `to_rgb` does.
    """
    import numpy as np
    from PIL import Image

    size = (config.image_size, config.image_size)
    resized = to_rgb(image).resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255  # (3,S,S)

    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]  # (3,1,1)
    return (pixels - mean) / std


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """Resize a mask for training like `preprocess` does images: (H,W) in 0..1 -> (1,S,S) float32.

    The nearest pixel is used. At exact ties PIL and OpenCV may pick the other neighbour.
    """
    size = (config.image_size, config.image_size)
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0]  # (1,S,S)


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (1,h,w) -> probabilities (1,H,W) float32 in 0..1; size: (H,W) of the image.

    config is not used; `postprocess` has the same arguments in every model file.
    """
    logits = logits[None].float()  # (1,1,h,w)
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=False)  # (1,1,H,W)
    return resized[0].sigmoid()


# end shared


# timojl/clipseg, datasets/utils.py, mode crop_blur_highlight352, and evaluation_utils.py,
# img_preprocess
def image_prompt(image: Tensor, mask: Tensor, config: Config) -> Tensor:
    """Turn an image and a mask of the object in it into an input for `encode_image_prompt`.

    image (3,H,W) normalised, mask (1,H,W) of 0 and 1 -> (3,S,S). Everything outside the mask is
    blurred and faded, then the image is cropped to the mask's box with a margin, padded to a square
    and resized. This is the authors' best variant. Raise ValueError if the mask is empty.

    quirk: as in the original, the image is already normalised, so the background fades to a tenth
    of its contrast around the mean colour (not to black), and the padding has the mean colour.
    """
    mask = mask[0] > 0.5  # (H,W)
    if not mask.any():
        raise ValueError("the mask of an image prompt is empty: mark the object to find")
    image = torch.where(mask, image, 0.1 * blur(image))  # (3,H,W)

    top, bottom = range_with_margin(mask.any(1))
    left, right = range_with_margin(mask.any(0))
    image = image[:, top:bottom, left:right]  # (3,h,w)

    # Pad the shorter side with zeros.
    h, w = image.shape[1:]
    pad_h = max(w - h, 0)
    pad_w = max(h - w, 0)
    padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
    square = F.pad(image, padding)  # (3,max(h,w),max(h,w))

    size = (config.image_size, config.image_size)
    return F.interpolate(square[None], size, mode="nearest")[0]  # (3,S,S); quirk: nearest


def blur(image: Tensor) -> Tensor:
    """Blur (3,H,W) with a 15-tap Gaussian, sigma 3 -> (3,H,W)."""
    x = torch.arange(-7, 8, device=image.device, dtype=image.dtype)
    kernel = torch.softmax(-(x**2) / (2 * 3.0**2), 0)  # (15,), exp(-x²/2σ²) with a sum of 1

    padded = F.pad(image, (7, 7, 7, 7), mode="reflect")[:, None]  # (3,1,H+14,W+14)
    blurred = F.conv2d(padded, kernel.view(1, 1, 15, 1))  # (3,1,H,W+14)
    blurred = F.conv2d(blurred, kernel.view(1, 1, 1, 15))  # (3,1,H,W)
    return blurred[:, 0]  # (3,H,W)


def range_with_margin(is_inside: Tensor) -> tuple[int, int]:
    """Return start and end of the range of True values, widened by a tenth on both sides."""
    inside = is_inside.nonzero()
    start = int(inside[0])
    end = int(inside[-1]) + 1
    margin = 0.1 * (end - start)
    return int(max(0, start - margin)), int(min(len(is_inside), end + margin))


# shared: clip_tokens
def tokenize(prompt: str, config: Config) -> Tensor:
    """Return the token ids (1,T) of a text, int64. Needs `tokenizer.py` and what it reads."""
    from tokenizer import CLIPTokenizer

    return CLIPTokenizer(config.text_length, config.pad_token)(prompt)


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


# shared: segment_prompt
def segment(model: nn.Module, image, prompt: str) -> tuple:
    """Segment what the prompt names; return probabilities and mask as numpy arrays.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    prompt: one text, truncated to `config.text_length` tokens.
    Both results have the image's own size: probabilities float32 (1,H,W), and a mask uint8 (H,W),
    which is 1 where they are above `config.threshold`. Raise the errors of `open_upright` and
    `preprocess`, and TypeError for several prompts.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, not {type(prompt).__name__}; call once for each")
    image = open_upright(image)
    weight = next(model.parameters())
    pixels = model.preprocess(image)[None].to(weight)  # (1,3,S,S)
    tokens = tokenize(prompt, model.config).to(weight.device)  # (1,T)
    size = (image.height, image.width)

    with evaluating(model):
        logits = model(pixels, tokens)[0]  # (1,h,w)
        probabilities = model.postprocess(logits, size).cpu().numpy()

    mask = probabilities[0] > model.config.threshold
    return probabilities, mask.astype("uint8")


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
