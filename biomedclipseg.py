"""BiomedCLIPSeg: CLIPSeg's decoder on BiomedCLIP's towers; segment an image by a phrase.

Papers: Poudel et al., MIDL 2024, arXiv 2308.07706; Zhang et al. 2023, 2303.00915 (BiomedCLIP);
Lüddecke & Ecker, CVPR 2022, 2112.10003 (CLIPSeg). Code: github.com/naamiinepal/medvlsm at dc36a3a,
src/models/biomedclipseg.py (MIT), on open_clip, timm and transformers; we keep its parameter names.
Weights of the towers: microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 on the hub (MIT).
The decoder starts untrained or, as BiomedCLIPSeg-D, from CIDAS/clipseg-rd64-refined (licence
unclear, see clipseg.py). Both must be trained before they segment anything; none were released.

    image (B,3,224,224)                tokens (B,T): [CLS] ... [SEP] and padding
      ViT-B/16                           PubMedBERT, hidden state at [CLS] (B,768)
      outputs of blocks 4, 7, 10         MLP
    features (B,3,1+14,14,768)         condition (B,512)
      |                                  |
    decoder, 64 channels:                |
      Linear(block 10), FiLM <-----------'     Linear: 768 -> 64 channels. FiLM: scale and shift
      transformer layer                        each channel by linear functions of the condition.
      + Linear(block 7), transformer layer
      + Linear(block 4), transformer layer     Features: 197 tokens stored as 15x14; the class
      (B,64,14,14), transposed convolutions    token ends an otherwise zero first row.
    logits (B,1,224,224)

Texts need `tokenizer.py` next to this file (copy it), the package `tokenizers` and the vocab.txt of
the weights: the one in their folder, else of the hub id in `Config.vocabulary`. Any BERT tokenizer
with this vocabulary works. Not implemented: the data and loss of the study.

    model = BiomedCLIPSeg.from_pretrained("runs/biomedclipseg-polyps")  # a run folder
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
"""

import hashlib
import json
import math
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
    dim: int = 768  # width of both towers
    layers: int = 12  # of the vision tower
    text_layers: int = 12
    vocab_size: int = 30522
    embed_dim: int = 512  # width of the space that texts and images share
    # Indices of the vision blocks that feed the decoder. quirk: the study meant CLIPSeg's
    # (3, 6, 9), but adds 1 to index a list that lacks the embeddings (biomedclipseg.py:149).
    taps: tuple[int, ...] = (4, 7, 10)
    reduce_dim: int = 64  # channels in the decoder
    ffn_dim: int = 2048  # hidden width of the decoder's MLPs
    image_size: int = 224  # side of the square that `preprocess` returns
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's; RGB in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    vocabulary: str = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"  # has a vocab.txt
    text_length: int = 256  # tokens to which a text is cut or padded, 512 at most
    pad_token: int = 0  # masked, so that padding has no effect
    adapter_dim: int = 0  # width of the adapters in both towers, 64 in VLSM-Adapter; 0: none
    threshold: float = 0.5  # probability above which a pixel is foreground
    dropout: float = 0.0  # in the text tower while training; the study left BERT's 0.1 active


VARIANTS = {
    "biomedclipseg": Config(),  # 197,029,730 parameters
    "mini": Config(  # 1,492,658; for tests and demos, with tokenizer.CHARACTERS as vocabulary
        dim=128, layers=4, text_layers=2, vocab_size=109, embed_dim=64, taps=(0, 1, 2),
        reduce_dim=32, ffn_dim=128, image_size=128, vocabulary="", text_length=128,
    ),
}  # fmt: skip

HEAD_WIDTH = 64  # channels of an attention head in both towers


# timm, timm/models/vision_transformer.py, class Block
class ImageBlock(nn.Module):
    """A layer of timm's ViT: pre-norm self-attention, then a pre-norm MLP."""

    def __init__(self, dim: int):
        super().__init__()
        # ModuleDicts, here and below, only to match the checkpoint's parameter names.
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        # After the attention and after the MLP; `add_adapters` replaces them.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,C) -> (B,N,C)."""
        qkv = self.attn["qkv"](self.norm1(x))  # (B,N,3C)
        qkv = qkv.unflatten(2, (3, -1, HEAD_WIDTH))  # (B,N,3,h,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,h,N,d) each
        y = F.scaled_dot_product_attention(q, k, v)  # (B,h,N,d)
        y = y.transpose(1, 2).flatten(2)  # (B,N,C)
        x = x + self.adapters[0](self.attn["proj"](y))

        y = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B,N,4C)
        y = self.mlp["fc2"](y)  # (B,N,C)
        return x + self.adapters[1](y)


# timm, timm/models/vision_transformer.py, class VisionTransformer
class ViT(nn.Module):
    """timm's ViT-B/16."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        # BiomedCLIP was trained at 224 px: the class token's position, then 14x14 patches.
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + 14 * 14, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, stride=16)})
        self.blocks = nn.ModuleList([ImageBlock(dim) for _ in range(layers)])
        # Applied in `BiomedCLIPSeg.encode_image_prompt`.
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Return the outputs of the blocks with indices `taps`, (B,N,C) each.

        image (B,3,H,W). The class token comes first. Blocks after the last tap do not run.
        """
        x = self.embed(image)  # (B,N,C)
        outputs = []
        for i, block in enumerate(self.blocks[: max(taps) + 1]):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs

    def embed(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> (B,N,C) with positions added, the class token first."""
        class_position = self.pos_embed[:, :1]  # (1,1,C)
        grid_positions = self.pos_embed[:, 1:]  # (1,14*14,C)

        # Positions of other image sizes are interpolated with antialiasing, as timm does it. The
        # study had 224 px only.
        grid_positions = grid_positions.transpose(1, 2).unflatten(2, (14, 14))  # (1,C,14,14)
        patches = self.patch_embed["proj"](image)  # (B,C,Hp,Wp)
        patches = patches + F.interpolate(
            grid_positions, patches.shape[2:], mode="bicubic", antialias=True
        )
        patches = patches.flatten(2).transpose(1, 2)  # (B,Hp*Wp,C)

        class_token = self.cls_token + class_position  # (1,1,C)
        class_token = class_token.expand(image.shape[0], -1, -1)  # (B,1,C)
        return torch.cat([class_token, patches], 1)  # (B,N,C)


def split_heads(x: Tensor) -> Tensor:
    """x (B,T,C) -> (B,h,T,d)."""
    return x.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)  # (B,h,T,d)


# transformers, models/bert/modeling_bert.py, class BertLayer
class TextBlock(nn.Module):
    """A layer of BERT: a post-norm transformer encoder layer."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        projections = nn.ModuleDict(
            {
                "query": nn.Linear(dim, dim),
                "key": nn.Linear(dim, dim),
                "value": nn.Linear(dim, dim),
            }
        )
        output = nn.ModuleDict(
            {"dense": nn.Linear(dim, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)}
        )
        self.attention = nn.ModuleDict({"self": projections, "output": output})

        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, 4 * dim)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(4 * dim, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)}
        )
        # After the attention and after the MLP; `add_adapters` replaces them.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.dropout = dropout

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        """x (B,T,C), is_text (B,1,1,T) False at padding, which is not attended to -> (B,T,C)."""
        dropout = self.dropout if self.training else 0.0
        projections = self.attention["self"]
        q = split_heads(projections["query"](x))  # (B,h,T,d)
        k = split_heads(projections["key"](x))  # (B,h,T,d)
        v = split_heads(projections["value"](x))  # (B,h,T,d)
        y = F.scaled_dot_product_attention(q, k, v, is_text, dropout)  # (B,h,T,d)
        y = y.transpose(1, 2).flatten(2)  # (B,T,C)
        y = self.adapters[0](self.attention["output"]["dense"](y))
        x = self.attention["output"]["LayerNorm"](x + F.dropout(y, dropout))

        y = F.gelu(self.intermediate["dense"](x))  # (B,T,4C)
        y = self.adapters[1](self.output["dense"](y))  # (B,T,C)
        return self.output["LayerNorm"](x + F.dropout(y, dropout))


# transformers, models/bert/modeling_bert.py, class BertModel
class BERT(nn.Module):
    """BERT without its pooler."""

    def __init__(self, dim: int, layers: int, vocab_size: int, dropout: float):
        super().__init__()
        tables = {
            "word_embeddings": nn.Embedding(vocab_size, dim),
            "position_embeddings": nn.Embedding(512, dim),
            "token_type_embeddings": nn.Embedding(2, dim),
        }
        for table in tables.values():
            nn.init.normal_(table.weight, std=0.02)

        norm = nn.LayerNorm(dim, eps=1e-12)
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": norm})
        blocks = [TextBlock(dim, dropout) for _ in range(layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.dropout = dropout

    def forward(self, tokens: Tensor, is_text: Tensor) -> Tensor:
        """tokens (B,T), is_text (B,1,1,T) False at padding -> last hidden states (B,T,C)."""
        T = tokens.shape[1]
        positions = self.embeddings["position_embeddings"].weight[:T]  # (T,C)
        first_type = self.embeddings["token_type_embeddings"].weight[0]  # (C,)
        x = self.embeddings["word_embeddings"](tokens) + positions + first_type  # (B,T,C)
        x = self.embeddings["LayerNorm"](x)
        x = F.dropout(x, self.dropout, self.training)

        for block in self.encoder["layer"]:
            x = block(x, is_text)  # (B,T,C)
        return x


# open_clip, src/open_clip/model.py, class CustomTextCLIP
class BiomedCLIP(nn.Module):
    """BiomedCLIP's two towers and their projections into the shared space, with open_clip's names.

    Seeded weights depend on the order in which the modules are created.
    """

    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        embed_dim = config.embed_dim
        # CLIP's log temperature; unused, kept so checkpoints round-trip.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)

        head = nn.ModuleDict({"proj": nn.Linear(dim, embed_dim, bias=False)})
        trunk = ViT(dim, config.layers)
        self.visual = nn.ModuleDict({"trunk": trunk, "head": head})

        hidden = (dim + embed_dim) // 2
        proj = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, embed_dim, bias=False),
        )
        bert = BERT(dim, config.text_layers, config.vocab_size, config.dropout)
        self.text = nn.ModuleDict({"transformer": bert, "proj": proj})


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


# naamiinepal/medvlsm, src/models/biomedclipseg.py, class BiomedCLIPSeg
class BiomedCLIPSeg(nn.Module):
    """BiomedCLIP's towers and the decoder that turns vision tokens and a prompt into a mask."""

    def __init__(self, config: Config):
        super().__init__()
        taps = config.taps
        are_blocks = 0 <= min(taps) <= max(taps) < config.layers
        if not are_blocks or sorted(set(taps)) != list(taps):
            raise ValueError(
                f"taps={taps}: must be blocks of 0 to {config.layers - 1} in ascending order"
            )

        self.config = config
        self.biomedclip = BiomedCLIP(config)
        self.decoder_source = None  # the file that the decoder was loaded from
        self.decoder = Decoder(
            dim=config.dim,
            condition_dim=config.embed_dim,
            reduce_dim=config.reduce_dim,
            heads=4,
            ffn_dim=config.ffn_dim,
            num_taps=len(taps),
            refined=True,
        )
        self.init_decoder()
        self.freeze_image_prompts()

        self.adapter = nn.Identity()
        if config.adapter_dim:
            self.add_adapters(config.adapter_dim)

    def init_decoder(self) -> None:
        """Draw the decoder's weights as transformers 4.35, the study's version, does.

        Version 5 draws far larger ones (`_init_weights` of CLIPSegPreTrainedModel).
        """
        D = self.config.reduce_dim
        # quirk: the number of layers is that of the vision tower, not of the decoder
        narrow = (2 * self.config.layers * D) ** -0.5
        stds = {
            "q_proj": narrow,
            "k_proj": narrow,
            "v_proj": narrow,
            "out_proj": D**-0.5,
            "fc1": (2 * D) ** -0.5,
            "fc2": narrow,
        }

        for path, module in self.decoder.named_modules():
            name = path.split(".")[-1]
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name in stds:
                    nn.init.normal_(module.weight, std=stds[name])

    def freeze_image_prompts(self) -> None:
        """Freeze the modules that only image prompts use.

        With text prompts these get no gradient; freezing them avoids unused parameters (e.g. under
        DDP).
        """
        trunk = self.biomedclip.visual["trunk"]
        trunk.blocks[max(self.config.taps) + 1 :].requires_grad_(False)
        trunk.norm.requires_grad_(False)
        self.biomedclip.visual["head"].requires_grad_(False)

    def add_adapters(self, width: int) -> None:
        """Add an adapter to the condition, and two to the first max(taps) blocks of each tower.

        Source: naamiinepal/vlsm-adapter, src/models/clipseg_adapter.py, class CLIPSegDenseAdapter.
        quirk: block max(taps) has none, although the decoder uses its output. 4 * width: in the
        original the condition's adapter is 256 wide, the others 64.
        """
        self.adapter = Adapter(self.config.embed_dim, 4 * width)
        depth = max(self.config.taps)
        vision_blocks = self.biomedclip.visual["trunk"].blocks[:depth]
        text_blocks = self.biomedclip.text["transformer"].encoder["layer"][:depth]
        for block in (*vision_blocks, *text_blocks):
            adapters = [Adapter(self.config.dim, width) for _ in range(2)]
            block.adapters = nn.ModuleList(adapters)

    def forward(
        self, image: Tensor, tokens: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """image (B,3,H,W) normalised, H and W multiples of 16, and a prompt -> logits (B,1,H,W).

        Pass exactly one of: tokens (B,T), or condition (B,embed_dim) from `encode_text` or
        `encode_image_prompt`. A batch of 1 broadcasts against the other input: one image with B
        prompts, or B images with one prompt.
        """
        return self.decode(self.encode_image(image), tokens, condition)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> features (B,L,1+Hp,Wp,C), see `tokens_to_grid`.

        Raise ValueError if a side is not a multiple of 16.
        """
        H, W = image.shape[2:]
        if H % 16 or W % 16:
            raise ValueError(f"image sides must be multiples of 16, not {tuple(image.shape[2:])}")
        outputs = self.biomedclip.visual["trunk"](image, self.config.taps)  # L of (B,N,C)
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
        """tokens (B,T), T at most 512 -> condition (B,embed_dim), not normalised.

        Columns that hold nothing but padding are dropped. This changes nothing, because padding is
        not attended to.
        """
        is_text = tokens != self.config.pad_token  # (B,T)
        if not torch.compiler.is_compiling():  # compiled shapes must not depend on values
            longest = int(is_text.any(0).nonzero().max()) + 1
            tokens = tokens[:, :longest]  # (B,T)
            is_text = is_text[:, :longest]  # (B,T)

        hidden = self.biomedclip.text["transformer"](tokens, is_text[:, None, None])  # (B,T,C)
        class_token = hidden[:, 0]  # (B,C), at [CLS]
        return self.biomedclip.text["proj"](class_token)

    def encode_image_prompt(self, image: Tensor) -> Tensor:
        """Encode an image as the prompt: (B,3,H,W) -> condition (B,embed_dim), not normalised.

        The study had texts only. A decoder must be trained with image prompts to understand them.
        """
        trunk = self.biomedclip.visual["trunk"]
        last = len(trunk.blocks) - 1
        hidden = trunk(image, (last,))[0]  # (B,N,C)
        class_token = trunk.norm(hidden[:, 0])  # (B,C)
        return self.biomedclip.visual["head"]["proj"](class_token)

    def preprocess(self, image) -> Tensor:
        """PIL image -> (3,S,S); see the function `preprocess` below."""
        return preprocess(image, self.config)

    def postprocess(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """logits (1,h,w) -> probabilities (1,H,W); see the function `postprocess` below."""
        return postprocess(logits, size, self.config)

    def segment(self, image, prompt: str) -> tuple:
        """Segment an image or its file; see the function `segment` below."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, decoder=None, default_decoder=None, **overrides
    ) -> "BiomedCLIPSeg":
        """Load a model in evaluation mode.

        source: a file, a folder, a run folder or a hub id of BiomedCLIP or a whole BiomedCLIPSeg.
        decoder: a CLIPSeg, from the hub or the original release, to take the decoder from.
        default_decoder: the same, but only used if `source` has no decoder.
        overrides: fields of Config that replace those of the file.
        Set `decoder_source` of the model to the file that the decoder comes from. If there is none,
        it is None, the decoder stays untrained, and a note is printed. Raise ValueError or
        FileNotFoundError, one line, if a tensor does not fit.
        """
        weights, settings = read_checkpoint(source, FILES)
        check_kind(weights, source)
        weights = convert(weights)
        model = cls(config_of(weights, settings, source, overrides))
        expected = required_tensors(model.state_dict(), weights, source)
        expected_towers, expected_decoder = split_decoder(expected)
        towers, decoder_weights = split_decoder(weights)
        check_complete(towers, expected_towers, source)

        if decoder is None and not decoder_weights and default_decoder is not None:
            print(f"{source}: BiomedCLIP alone; the decoder comes from {default_decoder}")
            decoder = default_decoder
        if decoder is not None:
            decoder_weights = read_decoder(decoder)
            model.decoder_source = str(decoder)
        elif decoder_weights:
            model.decoder_source = str(source)

        if model.decoder_source is None:
            print(f"{source}: BiomedCLIP alone; the decoder is untrained")
        else:
            check_complete(decoder_weights, expected_decoder, model.decoder_source)
        # Untrained adapters and an untrained decoder keep their initial values.
        model.load_state_dict(model.state_dict() | towers | decoder_weights)
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Nothing under this line is needed to understand the model: loading of weights, pre- and
# postprocessing.
# --------------------------------------------------------------------------------------------------

FILES = (
    "best.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
CLIPSEG_FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
# Tensors that are not used: a table of 0, 1, 2, ... that transformers saved until 4.30.
IGNORED = ("biomedclip.text.transformer.embeddings.position_ids",)


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to ours, which is the study's: BiomedCLIP's names get a prefix."""
    prefix = "biomedclip."
    if any(name.startswith(prefix) for name in state_dict):
        prefix = ""

    weights = {}
    for name, tensor in state_dict.items():
        if prefix + name not in IGNORED:
            weights[prefix + name] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict for the study's class.

    Its tensors below `biomedclip.` also fit open_clip's class.
    """
    return dict(state_dict)


def check_kind(weights: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, if the weights are known to be those of another model."""
    kind = recognise(weights)
    if kind in ("CLIPSeg", "a decoder of CLIPSeg without CLIP"):  # values of KINDS
        raise ValueError(
            f"{source}: is {kind}, not BiomedCLIPSeg; use BiomedCLIP as weights and this file as "
            "decoder= (--decoder)"
        )
    if kind not in ("", "BiomedCLIP"):
        raise ValueError(f"{source}: seems to be {kind}, neither BiomedCLIP nor BiomedCLIPSeg")


def read_decoder(source) -> dict[str, Tensor]:
    """Read the decoder of a CLIPSeg or BiomedCLIPSeg, with the hub's names. Towers are not used.

    Raise ValueError, one line, if the file is known to be something else.
    """
    weights = hub_decoder(read_checkpoint(source, CLIPSEG_FILES)[0])
    kind = recognise(weights)
    if kind and not any(name.startswith("decoder.film_") for name in weights):
        raise ValueError(f"{source}: seems to be {kind}, which has no decoder of CLIPSeg")
    return split_decoder(weights)[1]


def split_decoder(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the towers' tensors and the decoder's."""
    towers = {}
    decoder = {}
    for name, tensor in state_dict.items():
        if name.startswith("decoder."):
            decoder[name] = tensor
        else:
            towers[name] = tensor
    return towers, decoder


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


def config_of(weights: dict[str, Tensor], settings: dict, source, overrides: dict) -> Config:
    """Return the config of weights with these settings in config.json, and with the overrides.

    If neither lists the taps, use the variant's and print a note. A vocab.txt in the folder of the
    weights becomes the vocabulary.
    """
    if "format" in settings:  # a run folder of ours
        config = Config(**run_config(settings, "BiomedCLIPSeg", source, Config))
    else:
        config = variant_of_width(weights)
        if "taps" not in overrides:
            print(f"{source}: no config.json lists the taps; assuming taps {config.taps}")

    path = Path(source)
    folder = path if path.is_dir() else path.parent
    vocabulary = folder / "vocab.txt"
    if path.exists() and vocabulary.exists():
        config = replace(config, vocabulary=str(vocabulary.resolve()))
    return replace(config, **overrides)


def variant_of_width(weights: dict[str, Tensor]) -> Config:
    """Return the variant whose towers are as wide as these, or the full size if there is none."""
    width = len(weights.get("biomedclip.visual.trunk.norm.weight", ()))
    for config in VARIANTS.values():
        if config.dim == width:
            return config
    return Config()


def find_vocabulary(source: str | Path) -> Path:
    """Return the path of a vocab.txt, for `tokenizer.WordPieceTokenizer`.

    source: such a file, a folder that holds one, or a hub id.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "vocab.txt"
    if path.exists():
        return path
    return download(str(source), ("vocab.txt",))


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


def tokenize(prompt: str, config: Config) -> Tensor:
    """Return the token ids (1,T) of a text, int64. Needs `tokenizer.py`.

    The vocabulary is the file that `config.vocabulary` names; "" stands for single characters.
    """
    from tokenizer import CHARACTERS, WordPieceTokenizer

    vocabulary = find_vocabulary(config.vocabulary) if config.vocabulary else CHARACTERS
    return WordPieceTokenizer(vocabulary, config.text_length, config.pad_token)(prompt)


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
