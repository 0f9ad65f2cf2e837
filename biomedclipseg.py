"""BiomedCLIPSeg: CLIPSeg's decoder on BiomedCLIP's towers; an image and a phrase in, its mask out.

Papers: Poudel et al., MIDL 2024, arXiv 2308.07706; Zhang et al. 2023, 2303.00915 (BiomedCLIP);
Lüddecke & Ecker, CVPR 2022, 2112.10003 (CLIPSeg). Official code (MIT), whose names are kept:
github.com/naamiinepal/medvlsm at dc36a3a, src/models/biomedclipseg.py, on open_clip, timm and
transformers. Weights on the hub: microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 (MIT) for
the towers; the decoder starts untrained or, as BiomedCLIPSeg-D, from CIDAS/clipseg-rd64-refined
(Apache 2.0 by its card). Both must be trained before they segment anything; none were released.

    image (B,3,224,224)                tokens (B,T): [CLS] ... [SEP] and padding
      ViT-B/16                           PubMedBERT, at [CLS] (B,768)
    blocks 4, 7, 10: (B,3,197,768)       MLP
      |                                condition (B,512)
    decoder, from the deepest:           |
      768 -> 64, plus the one before     |
      times and plus the condition  <----'
      attention, MLP
      (B,197,64) -> (B,64,14,14)
    3x3, 4x up, 4x up
    logits (B,1,224,224)

Texts need `tokenizer.py` beside this file (copy it), the package `tokenizers`, and the vocab.txt of
the weights: the one beside them, else of the hub id in `Config.vocabulary`. Or use any BERT
tokenizer with it. Left out: the data and loss of the study.

    model = BiomedCLIPSeg.from_pretrained("runs/biomedclipseg-polyps")  # a folder of your own
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
"""

import json
import math
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    dim: int = 768  # of both towers, in heads of 64
    layers: int = 12  # of the image tower
    text_layers: int = 12
    vocab_size: int = 30522
    embed_dim: int = 512  # of the space that texts and images share
    # Blocks that the decoder sees, counted from 0. quirk: the study meant CLIPSeg's (3, 6, 9), but
    # its list of them began without the embeddings (src/models/biomedclipseg.py).
    taps: tuple[int, ...] = (4, 7, 10)
    reduce_dim: int = 64  # channels of the decoder
    ffn_dim: int = 2048  # in the decoder's MLPs
    image_size: int = 224  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1, CLIP's
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    vocabulary: str = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"  # has a vocab.txt
    text_length: int = 256  # tokens that a phrase is cut or padded to, 512 at most
    pad_token: int = 0  # masked, hence trimmed at no loss
    adapter_dim: int = 0  # width of adapters in both towers, to train alone; VLSM-Adapter: 64
    threshold: float = 0.5
    dropout: float = 0.0  # in the text tower, while training; the study left BERT's 0.1 on


VARIANTS = {
    "biomedclipseg": Config(),  # 197,029,730 parameters
    "mini": Config(  # 1,492,658; for tests and demos, with tokenizer.CHARACTERS as vocabulary
        dim=128, layers=4, text_layers=2, vocab_size=109, embed_dim=64, taps=(0, 1, 2),
        reduce_dim=32, ffn_dim=128, image_size=128, vocabulary="", text_length=128,
    ),
}  # fmt: skip


class ImageBlock(nn.Module):
    """A layer of timm's ViT: norms before the attention and before the MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])  # empty places

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, 64))  # (B,N,3,h,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,h,N,d) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,C)
        x = x + self.adapters[0](self.attn["proj"](y))
        return x + self.adapters[1](self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ViT(nn.Module):
    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        # BiomedCLIP saw 224 px: a row for the class token, then 14x14 patches.
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + 14 * 14, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, stride=16)})
        self.blocks = nn.ModuleList(ImageBlock(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """image (B,3,H,W) -> what the blocks in `taps` give, (B,1+H/16*W/16,C) each.

        No block after the last of them runs.
        """
        x = self.patch_embed["proj"](image)  # (B,C,H/16,W/16)
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (14, 14))  # (1,C,14,14)
        # Other sizes than 224 are timm's way, with antialiasing; the study had none.
        table = F.interpolate(table, x.shape[2:], mode="bicubic", antialias=True)
        x = (x + table).flatten(2).transpose(1, 2)  # (B,N-1,C)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (B,1,C)
        x, outputs = torch.cat([first, x], 1), []  # (B,N,C)
        for i, block in enumerate(self.blocks[: max(taps) + 1]):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs


class TextBlock(nn.Module):
    """A layer of BERT: norms after the attention and after the MLP, over what they are added to."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        qkv = {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
        norm1, norm2 = (nn.LayerNorm(dim, eps=1e-12) for _ in range(2))
        out = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": norm1})
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(qkv), "output": out})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, 4 * dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * dim, dim), "LayerNorm": norm2})
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])  # empty places
        self.dropout = dropout

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B,T,C), seen (B,1,1,T) True where attended to -> (B,T,C)."""
        p, out = self.dropout if self.training else 0.0, self.attention["output"]
        qkv = (f(x).unflatten(2, (-1, 64)) for f in self.attention["self"].values())  # (B,T,h,d)
        q, k, v = (y.transpose(1, 2) for y in qkv)  # (B,h,T,d)
        y = F.scaled_dot_product_attention(q, k, v, seen, p).transpose(1, 2).flatten(2)  # (B,T,C)
        x = out["LayerNorm"](x + F.dropout(self.adapters[0](out["dense"](y)), p))
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + F.dropout(self.adapters[1](y), p))


class BERT(nn.Module):
    def __init__(self, dim: int, layers: int, vocab_size: int, dropout: float):
        super().__init__()
        sizes = {"word": vocab_size, "position": 512, "token_type": 2}
        tables = {f"{name}_embeddings": nn.Embedding(n, dim) for name, n in sizes.items()}
        for table in tables.values():
            nn.init.normal_(table.weight, std=0.02)
        self.embeddings = nn.ModuleDict(tables | {"LayerNorm": nn.LayerNorm(dim, eps=1e-12)})
        blocks = nn.ModuleList(TextBlock(dim, dropout) for _ in range(layers))
        self.encoder, self.dropout = nn.ModuleDict({"layer": blocks}), dropout

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """tokens (B,T), seen (B,1,1,T) True where no padding is -> (B,T,C)."""
        words, positions, kinds, norm = self.embeddings.values()
        x = words(tokens) + positions.weight[: tokens.shape[1]] + kinds.weight[0]  # (B,T,C)
        x = F.dropout(norm(x), self.dropout, self.training)
        for block in self.encoder["layer"]:
            x = block(x, seen)
        return x


class BiomedCLIP(nn.Module):
    """Both towers, under open_clip's names."""

    def __init__(self, c: Config):
        super().__init__()
        # CLIP's temperature: unused, kept so that a file can be written back whole.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)
        head = nn.ModuleDict({"proj": nn.Linear(c.dim, c.embed_dim, bias=False)})
        self.visual = nn.ModuleDict({"trunk": ViT(c.dim, c.layers), "head": head})
        hidden, linear = (c.dim + c.embed_dim) // 2, partial(nn.Linear, bias=False)
        proj = nn.Sequential(linear(c.dim, hidden), nn.GELU(), linear(hidden, c.embed_dim))
        bert = BERT(c.dim, c.text_layers, c.vocab_size, c.dropout)
        self.text = nn.ModuleDict({"transformer": bert, "proj": proj})


# shared: adapter
class Adapter(nn.Module):
    """A small MLP behind a frozen layer: the dense ones of VLSM-Adapter, arXiv 2405.06196."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.fc2(F.relu(self.fc1(x))))


def without_fresh(expected: dict[str, Tensor], found: dict[str, Tensor], source) -> dict:
    """What must be in a file: adapters only if one is there; that they stay untrained is said."""
    base = {name: t for name, t in expected.items() if "adapter" not in name}
    if len(base) == len(expected) or any("adapter" in name for name in found):
        return expected
    print(f"{source}: without adapters; they are untrained")
    return base


# end shared


# shared: clipseg_decoder
class DecoderLayer(nn.Module):
    """All tokens of an image attend to each other, then an MLP; each is normalised behind it."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.heads = heads
        projections = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in projections})
        self.layer_norm1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, ffn_dim), "fc2": nn.Linear(ffn_dim, dim)})
        self.layer_norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,N,D) -> (B,N,D)."""
        attn = self.self_attn
        projections = attn["q_proj"], attn["k_proj"], attn["v_proj"]
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in projections)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,D)
        x = self.layer_norm1(x + attn["out_proj"](y))
        # quirk: ReLU; transformers' config says quick_gelu, its decoder does not read that
        return self.layer_norm2(x + self.mlp["fc2"](F.relu(self.mlp["fc1"](x))))


class Decoder(nn.Module):
    """From the deepest tap to the shallowest, the prompt scaling and shifting what the first saw.

    dim: channels of the taps; condition_dim: of the prompt's embedding; reduce_dim (D): inside.
    refined: a head of three convolutions; else one, which paints squares of 16 pixels.
    """

    def __init__(
        self, dim: int, condition_dim: int, reduce_dim: int, heads: int, ffn_dim: int,
        taps: int, refined: bool,
    ):  # fmt: skip
        super().__init__()
        D, up = reduce_dim, nn.ConvTranspose2d
        self.film_mul, self.film_add = nn.Linear(condition_dim, D), nn.Linear(condition_dim, D)
        self.reduces = nn.ModuleList(nn.Linear(dim, D) for _ in range(taps))
        self.layers = nn.ModuleList(DecoderLayer(D, heads, ffn_dim) for _ in range(taps))
        if refined:
            mix, up4, up16 = nn.Conv2d(D, D, 3, padding=1), up(D, D // 2, 4, 4), up(D // 2, 1, 4, 4)
            self.transposed_convolution = nn.Sequential(mix, nn.ReLU(), up4, nn.ReLU(), up16)
        else:
            self.transposed_convolution = up(D, 1, 16, 16)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """features (B,taps,1+H,W,C) as from `with_grid`, condition (B,C') -> logits (B,1,16H,16W).

        One image and B prompts, or B images and one prompt, are welcome too.
        """
        H, W = features.shape[2] - 1, features.shape[3]
        taps = features.flatten(2, 3)[:, :, W - 1 :].unbind(1)[::-1]  # (B,1+HW,C) each
        mul, add = self.film_mul(condition)[:, None], self.film_add(condition)[:, None]  # (B,1,D)
        x = self.layers[0](mul * self.reduces[0](taps[0]) + add)  # (B,1+HW,D)
        for reduce, layer, tap in zip(self.reduces[1:], self.layers[1:], taps[1:], strict=True):
            x = layer(reduce(tap) + x)
        x = x[:, 1:].transpose(1, 2).unflatten(2, (H, W))  # (B,D,H,W), without the class token
        return self.transposed_convolution(x)


def with_grid(tokens: Tensor, H: int, W: int) -> Tensor:
    """tokens (B,taps,1+HW,C) -> (B,taps,1+H,W,C): one tensor whose shape tells the grid.

    The class token ends a row of its own before the grid, zeros fill the rest of that row.
    """
    return F.pad(tokens, (0, 0, W - 1, 0)).unflatten(2, (1 + H, W))


# end shared


class BiomedCLIPSeg(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config
        if not 0 <= min(c.taps) <= max(c.taps) < c.layers or sorted({*c.taps}) != list(c.taps):
            raise ValueError(f"taps={c.taps}: name blocks of 0 to {c.layers - 1}, rising")
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (1,H,W)
        self.biomedclip = BiomedCLIP(c)
        self.decoder_source = None  # the file that the decoder was loaded from
        self.decoder = Decoder(c.dim, c.embed_dim, c.reduce_dim, 4, c.ffn_dim, len(c.taps), True)
        self.init_decoder()
        trunk, head = self.biomedclip.visual.values()
        # Of use to pictures as prompts only. What is left always gets a gradient.
        for module in (*trunk.blocks[max(c.taps) + 1 :], trunk.norm, head):
            module.requires_grad_(False)
        self.adapter = nn.Identity()
        if c.adapter_dim:
            self.adapter = Adapter(c.embed_dim, 4 * c.adapter_dim)  # of the condition
            layers = self.biomedclip.text["transformer"].encoder["layer"]
            for block in (*trunk.blocks[: max(c.taps)], *layers[: max(c.taps)]):
                block.adapters = nn.ModuleList(Adapter(c.dim, c.adapter_dim) for _ in range(2))

    def init_decoder(self) -> None:
        """As transformers 4.35, the study's; from version 5 on it draws far larger numbers."""
        D, layers = self.config.reduce_dim, self.config.layers
        inner = (2 * layers * D) ** -0.5  # quirk: layers of the image tower, not of the decoder
        stds = {"q_proj": inner, "k_proj": inner, "v_proj": inner, "out_proj": D**-0.5}
        stds |= {"fc1": (2 * D) ** -0.5, "fc2": inner}
        for name, module in self.decoder.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if std := stds.get(name.split(".")[-1]):
                    nn.init.normal_(module.weight, std=std)

    def forward(self, image: Tensor, tokens=None, condition=None) -> Tensor:
        """image (B,3,H,W) normalised, H and W in 16s, tokens (B,T) -> logits (B,1,H,W).

        Or, in place of tokens, condition (B,E): from `encode_text` or `encode_visual_prompt`.
        Where B of the image or of the prompt is 1, it serves all of the other.
        """
        return self.decode(self.encode_image(image), tokens, condition)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> features (B,taps,1+H/16,W/16,C), to keep; see `with_grid`."""
        if any(side % 16 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 16, not {tuple(image.shape[2:])}")
        taps = self.biomedclip.visual["trunk"](image, self.config.taps)
        return with_grid(torch.stack(taps, 1), *(side // 16 for side in image.shape[2:]))

    def decode(self, features: Tensor, tokens=None, condition=None) -> Tensor:
        """features from `encode_image`, the rest as for `forward` -> logits (B,1,H,W)."""
        if (tokens is None) == (condition is None):
            raise ValueError("a prompt is either tokens or condition: give one of the two")
        condition = self.encode_text(tokens) if condition is None else condition
        return self.decoder(features, self.adapter(condition))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens (B,T), T at most 512 -> condition (B,E), not normalised."""
        seen = tokens != self.config.pad_token  # (B,T)
        if not torch.compiler.is_compiling():  # which wants shapes that depend on no value
            # Columns of padding at the end change nothing: nobody attends to them.
            T = int(seen.any(0).nonzero().max()) + 1
            tokens, seen = tokens[:, :T], seen[:, :T]
        text = self.biomedclip.text
        states = text["transformer"](tokens, seen[:, None, None])  # (B,T,C)
        return text["proj"](states[:, 0])

    def encode_visual_prompt(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> condition (B,E), not normalised: a picture as the prompt.

        The study had texts only. A decoder must be trained with these, as CLIPSeg's was.
        """
        trunk, head = self.biomedclip.visual.values()
        last = trunk(image, (len(trunk.blocks) - 1,))[0]  # (B,N,C)
        return head["proj"](trunk.norm(last[:, 0]))

    def segment(self, image, prompt: str) -> tuple:
        """Segment an image or its file -> probabilities (1,H,W), mask (H,W); see `segment`."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, decoder=None, default_decoder=None, **overrides
    ) -> "BiomedCLIPSeg":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        source: BiomedCLIP or BiomedCLIPSeg whole. decoder: a CLIPSeg, from the hub or the original
        release, whose decoder replaces that of `source`; default_decoder: one for a `source`
        without. With none of them FRESH is untrained. `decoder_source` of the model says which
        file it came from, None if untrained. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        check_kind(weights, source)
        weights = convert(weights)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "BiomedCLIPSeg", source, Config))
        else:
            config = closest_variant(weights)
            if "taps" not in overrides:
                print(f"{source}: no tensor tells taps; took {config.taps}, the study's")
        path = Path(source)
        beside = (path if path.is_dir() else path.parent) / "vocab.txt"
        if path.exists() and beside.exists():
            config = replace(config, vocabulary=str(beside.resolve()))
        model = cls(replace(config, **overrides))
        expected = without_fresh(model.state_dict(), weights, source)
        (towers, head), (our_towers, our_head) = split(weights), split(expected)
        check_complete(towers, our_towers, source)

        if decoder is None and not head and default_decoder is not None:
            print(f"{source}: BiomedCLIP alone; the decoder comes from {default_decoder}")
            decoder = default_decoder
        if decoder is not None:
            head = read_decoder(decoder)
        if head or decoder is not None:
            model.decoder_source = str(source if decoder is None else decoder)
            check_complete(head, our_head, model.decoder_source)
        else:
            print(f"{source}: BiomedCLIP alone; untrained is {FRESH[:-1]}")
        model.load_state_dict(model.state_dict() | towers | head)
        return model.eval()


FILES = ("best.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIPSEG_FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
FRESH = "decoder."  # in no file of BiomedCLIP
# A table of 0, 1, 2, ... that transformers saved until 4.30.
IGNORED = ("biomedclip.text.transformer.embeddings.position_ids",)


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the study stay, those of BiomedCLIP alone go below `biomedclip.`."""
    prefix = "" if any(name.startswith("biomedclip.") for name in state_dict) else "biomedclip."
    return {prefix + name: t for name, t in state_dict.items() if prefix + name not in IGNORED}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the study's class; without "biomedclip." and the decoder also for open_clip's."""
    return dict(state_dict)


def check_kind(weights: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, if the weights are known to be those of another model."""
    kind = recognise(weights)
    if "CLIPSeg" in kind:
        told = "take BiomedCLIP as weights and this file as decoder= (--decoder)"
        raise ValueError(f"{source}: is {kind}, not BiomedCLIPSeg; {told}")
    if kind not in ("", "BiomedCLIP"):
        raise ValueError(f"{source}: seems to be {kind}, neither BiomedCLIP nor BiomedCLIPSeg")


def read_decoder(source) -> dict[str, Tensor]:
    """Read the decoder of a CLIPSeg or BiomedCLIPSeg, in the hub's names. Its towers are not used.

    Raise ValueError, one line, if the file is known to be something else.
    """
    weights = hub_decoder(read_checkpoint(source, CLIPSEG_FILES)[0])
    kind = recognise(weights)
    if kind and not any(name.startswith("decoder.film_") for name in weights):
        raise ValueError(f"{source}: seems to be {kind}, which has no decoder of CLIPSeg")
    return split(weights)[1]


# shared: original_decoder
# Names of CLIPSeg's original release (rd64-uni-refined.pth) -> the hub's, in this order.
ORIGINAL_DECODER = (
    (r"^trans_conv\.", "decoder.transposed_convolution."),
    (r"^blocks\.", "decoder.layers."),
    (r"^(film_|reduces\.)", r"decoder.\1"),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
)


def hub_decoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename CLIPSeg's decoder from its original release's names to the hub's.

    Queries, keys and values become separate tensors. All other tensors stay as they are.
    """
    weights = {}
    for name, t in state_dict.items():
        if re.match(r"(blocks|film_mul|film_add|reduces|trans_conv)\.", name):
            for pattern, new in ORIGINAL_DECODER:
                name = re.sub(pattern, new, name)
            weights |= unpack(name, t)
        else:
            weights[name] = t
    return weights


def unpack(name: str, t: Tensor) -> dict[str, Tensor]:
    """Return a tensor by its name; a packed projection as those of queries, keys and values."""
    start, packed, kind = name.partition("in_proj_")
    if not packed or t.ndim == 0:
        return {name: t}

    weights = {}
    for x, part in zip("qkv", t.chunk(3), strict=False):  # `check_complete` tells a wrong shape
        weights[f"{start}{x}_proj.{kind}"] = part.clone()
    return weights


# end shared


def split(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the towers' tensors, the decoder's."""
    head = {name: t for name, t in state_dict.items() if name.startswith(FRESH)}
    return {name: t for name, t in state_dict.items() if name not in head}, head


def closest_variant(weights: dict[str, Tensor]) -> Config:
    """The one that is as wide; `check_complete` tells what else does not fit."""
    width = len(weights.get("biomedclip.visual.trunk.norm.weight", ()))
    return next((config for config in VARIANTS.values() if config.dim == width), Config())


def find_vocabulary(source: str | Path) -> Path:
    """The vocab.txt of a folder or a hub id, for `tokenizer.WordPieceTokenizer`; or such a file."""
    path = Path(source)
    if path.is_dir():
        path = path / "vocab.txt"
    return path if path.exists() else download(str(source), ("vocab.txt",))


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


# shared: stretch
def preprocess(image, config: Config) -> Tensor:
    """PIL image -> (3,S,S) float32, stretched and normalised. Raise errors as `to_rgb` does."""
    import numpy as np
    from PIL import Image

    size = (config.image_size, config.image_size)
    image = to_rgb(image).resize(size, Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std  # (3,S,S)


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """mask (H,W) in 0..1 -> (1,S,S) float32 in the geometry of `preprocess`, to train with.

    Nearest neighbour. Where a position falls exactly between two source pixels, the result may
    differ by one source pixel from that of PIL or OpenCV.
    """
    size = (config.image_size, config.image_size)
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0]  # PIL's nearest


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """logits (1,h,w) -> probabilities (1,H,W) float32, 0..1, at the image's own `size` (H,W).

    The same for any `config`.
    """
    logits = logits[None].float()
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].sigmoid()


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


# shared: segment_prompt
def segment(model: nn.Module, image, prompt: str) -> tuple:
    """Return where the image shows what the prompt names, as numpy arrays of the image's size.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    prompt: one text, cut at `config.text_length` tokens.
    Probabilities are float32 (1,H,W). The mask, uint8 (H,W), is 1 where they are above
    `config.threshold`, else 0. Raise errors as `open_upright` and `preprocess` do, and TypeError
    for several prompts.
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
