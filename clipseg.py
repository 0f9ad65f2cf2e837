"""CLIPSeg: an image and a prompt in, the mask of it out. A prompt is a phrase or another image.

Paper: Lueddecke & Ecker, CVPR 2022, arXiv 2112.10003. Code: github.com/timojl/clipseg at 77c4e2d,
models/clipseg.py (MIT); its port to transformers 5.23, modeling_clipseg.py, whose names are kept.
Weights on the hub: CIDAS/clipseg-rd64-refined, clipseg-rd64, clipseg-rd16. Their cards say Apache
2.0, the original README says that its MIT licence does not cover them. The original release is
rd64-uni-refined.pth, rd64-uni.pth, rd16-uni.pth, without CLIP: add OpenAI's ViT-B-16.pt (MIT).

    image (B,3,352,352)                 tokens (B,T)       or an image with its mask,
      CLIP's ViT-B/16                     CLIP's text        made one by `visual_prompt`
      tokens (B,1+22*22,768)              transformer        (B,3,352,352)
      blocks 0..9, and kept of them         |                the same ViT-B/16, 12 blocks
      3, 6, 9: features                   condition (B,512), <---'
      (B,3,1+22,22,768)                     |
    decoder: 9 in 64 channels, scaled and shifted by the condition, a transformer layer,
      + 6, a layer, + 3, a layer: (B,64,22,22)
      transposed convolutions
    logits (B,1,352,352)

Any sides in 16s will do. Frozen is only what text prompts do not pass: the last vision blocks.
Left out: masks within CLIP's attention and ViT-B/32, for which no weights were released.

Texts need `tokenizer.py` and `clip_merges.txt.xz` beside this file (copy both), and the package
`tokenizers`. Tokens of any CLIP tokenizer do as well, padded with anything behind 49407.

    model = CLIPSeg.from_pretrained("CIDAS/clipseg-rd64-refined")
    probabilities, mask = model.segment("photo.jpg", "a polyp")  # or a PIL image
    # numpy, at the photo's own size: float32 (1,H,W); uint8 (H,W), 1 above config.threshold
"""

import json
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
    taps: tuple[int, ...] = (3, 6, 9)  # vision blocks that the decoder sees, counted from 0
    reduce_dim: int = 64  # channels of the decoder
    refined: bool = True  # its head: three convolutions, or one that paints squares of 16 pixels
    heads: int = 4  # of the decoder; the heads of CLIP are 64 wide
    ffn_dim: int = 2048  # of the decoder
    vision_dim: int = 768
    vision_layers: int = 12  # those behind the last tap serve prompt images only
    text_dim: int = 512
    text_layers: int = 12
    embed_dim: int = 512  # in which phrases and prompt images meet
    image_size: int = 352  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # RGB in 0..1, ImageNet's, not CLIP's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    text_length: int = 77  # tokens that a phrase is cut or padded to
    pad_token: int = 49407  # transformers'; changes nothing, the end is the first 49407
    adapter_dim: int = 0  # width of adapters in both towers, to train alone; VLSM-Adapter: 64
    threshold: float = 0.5  # zero-shot, the authors took 0.3 and 0.5, for Pascal 0.24 to 0.28


VARIANTS = {
    "rd64-refined": Config(),  # 150,747,746 parameters, 1,127,009 of them in the decoder
    "rd64": Config(refined=False),  # 150,693,890, 1,073,153
    "rd16": Config(reduce_dim=16, refined=False),  # 149,884,418, 263,681
    "mini": Config(  # 4,269,042, most of them token embeddings; for tests and demos
        taps=(0, 1, 2), reduce_dim=32, ffn_dim=128, vision_dim=128, vision_layers=4,
        text_dim=64, text_layers=2, embed_dim=64, image_size=128,
    ),
}  # fmt: skip


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
        # Residual adapters may be put here, behind the attention and behind the MLP.
        self.adapters = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,C) -> (B,T,C)."""
        T = x.shape[1]
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T,T), not attended

        y = self.ln_1(x)
        y = self.attn(y, y, y, attn_mask=later, need_weights=False)[0]  # (B,T,C)
        x = x + self.adapters[0](y)

        y = self.mlp["c_fc"](self.ln_2(x))  # (B,T,4C)
        y = y * torch.sigmoid(1.702 * y)  # quirk: CLIP's QuickGELU
        y = self.mlp["c_proj"](y)  # (B,T,C)
        return x + self.adapters[1](y)


# end shared


class VisionEmbeddings(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.patch_embedding = nn.Conv2d(3, dim, 16, stride=16, bias=False)
        self.position_embedding = nn.Embedding(1 + 14 * 14, dim)  # CLIP saw 224 px
        nn.init.normal_(self.position_embedding.weight, std=dim**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> tokens (B,1+H/16*W/16,C), the class token first."""
        x = self.patch_embedding(image)  # (B,C,H/16,W/16)
        first, table = self.position_embedding.weight.split((1, 14 * 14))
        table = table.T.unflatten(1, (14, 14))[None]  # (1,C,14,14)
        x = x + F.interpolate(table, x.shape[2:], mode="bicubic", align_corners=False)
        first = (first + self.class_embedding).expand(len(x), -1, -1)  # (B,1,C)
        return torch.cat([first, x.flatten(2).transpose(1, 2)], 1)  # (B,N,C)


class VisionBlock(TextBlock):
    """The same in the vision transformer, where all tokens attend to each other."""

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        qkv = F.linear(self.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)  # (B,N,3C)
        q, k, v = qkv.unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (B,h,N,64) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,C)
        x = x + self.adapters[0](attn.out_proj(y))
        y = self.mlp["c_fc"](self.ln_2(x))  # (B,N,4C)
        return x + self.adapters[1](self.mlp["c_proj"](y * torch.sigmoid(1.702 * y)))


class VisionModel(nn.Module):
    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.embeddings = VisionEmbeddings(dim)
        self.pre_layrnorm = nn.LayerNorm(dim)  # the hub's spelling
        blocks = (VisionBlock(dim, dim // 64) for _ in range(layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """image (B,3,H,W) -> what the blocks in `taps` give, (B,N,C) each; no later one runs."""
        if any(side % 16 for side in image.shape[2:]):
            raise ValueError(f"image sides must be multiples of 16, not {tuple(image.shape[2:])}")
        x, outputs = self.pre_layrnorm(self.embeddings(image)), []  # (B,N,C)
        for i, block in enumerate(self.encoder["layers"][: max(taps) + 1]):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs


class TextModel(nn.Module):
    def __init__(self, dim: int, layers: int):
        super().__init__()
        tables = {"token_embedding": nn.Embedding(49408, dim)}
        tables["position_embedding"] = nn.Embedding(77, dim)
        for table in tables.values():
            nn.init.normal_(table.weight, std=0.02)
        self.embeddings = nn.ModuleDict(tables)
        blocks = nn.Sequential(*(TextBlock(dim, dim // 64) for _ in range(layers)))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> (B,C), the state at the end of each phrase."""
        end = tokens.argmax(1)  # the first 49407, the largest of all tokens
        if not torch.compiler.is_compiling():  # which wants shapes that depend on no value
            tokens = tokens[:, : int(end.max()) + 1]  # no token looks at those behind it
        position = self.embeddings["position_embedding"].weight[: tokens.shape[1]]  # (T,C)
        x = self.encoder["layers"](self.embeddings["token_embedding"](tokens) + position)  # (B,T,C)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), end])  # (B,C)


class CLIP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        # CLIP's temperature: unused, kept so that a file can be written back whole.
        self.logit_scale = nn.Parameter(torch.tensor(2.6592), requires_grad=False)
        self.text_model = TextModel(config.text_dim, config.text_layers)
        self.vision_model = VisionModel(config.vision_dim, config.vision_layers)
        self.visual_projection = nn.Linear(config.vision_dim, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_dim, config.embed_dim, bias=False)


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


class CLIPSeg(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        if config.heads < 1 or config.reduce_dim % config.heads:
            raise ValueError(f"heads={config.heads}: must divide reduce_dim={config.reduce_dim}")
        self.config, c = config, config
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.visual_prompt = partial(visual_prompt, config=config)  # image and mask -> (3,S,S)
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (1,H,W)
        self.clip = CLIP(c)
        self.decoder = Decoder(
            c.vision_dim, c.embed_dim, c.reduce_dim, c.heads, c.ffn_dim, len(c.taps), c.refined
        )
        vision, text = self.clip.vision_model, self.clip.text_model
        # Only pictures as prompts pass here. What may train always gets a gradient.
        late = vision.encoder["layers"][max(c.taps) + 1 :]
        for module in (late, vision.post_layernorm, self.clip.visual_projection):
            module.requires_grad_(False)
        self.adapter = nn.Identity()
        if c.adapter_dim:
            self.adapter = Adapter(c.embed_dim, 4 * c.adapter_dim)  # of the condition
            for tower, dim in ((vision, c.vision_dim), (text, c.text_dim)):
                for block in tower.encoder["layers"][: max(c.taps)]:
                    block.adapters = nn.ModuleList(Adapter(dim, c.adapter_dim) for _ in range(2))

    def forward(self, image: Tensor, tokens=None, condition=None) -> Tensor:
        """image (B,3,H,W) normalised, H and W in 16s, tokens (B,T) -> logits (B,1,H,W).

        Or, in place of tokens, condition (B,embed_dim): from `encode_text`, from
        `encode_visual_prompt`, or a mixture w * text + (1 - w) * picture, as in its training.
        Where B of the image or of the prompt is 1, it serves all of the other.
        """
        return self.decode(self.encode_image(image), tokens, condition)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> features (B,taps,1+H/16,W/16,C), to keep; see `with_grid`."""
        H, W = (side // 16 for side in image.shape[2:])
        outputs = self.clip.vision_model(image, self.config.taps)
        return with_grid(torch.stack(outputs, 1), H, W)

    def decode(self, features: Tensor, tokens=None, condition=None) -> Tensor:
        """features from `encode_image`, the rest as for `forward` -> logits (B,1,H,W)."""
        if (tokens is None) == (condition is None):
            raise ValueError("a prompt is either tokens or condition: give one of the two")
        condition = self.encode_text(tokens) if condition is None else condition
        return self.decoder(features, self.adapter(condition))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> condition (B,embed_dim), not normalised."""
        return self.clip.text_projection(self.clip.text_model(tokens))

    def encode_visual_prompt(self, image: Tensor) -> Tensor:
        """image (B,3,H,W), as `visual_prompt` makes it -> condition (B,embed_dim)."""
        (x,) = self.clip.vision_model(image, (self.config.vision_layers - 1,))  # (B,N,C)
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(x[:, 0]))

    def segment(self, image, prompt: str) -> tuple:
        """Segment an image or its file -> probabilities (1,H,W), mask (H,W); see `segment`."""
        return segment(self, image, prompt)

    @classmethod
    def from_pretrained(cls, source: str | Path, clip=None, **overrides) -> "CLIPSeg":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        clip: a second file or hub id, CLIP ViT-B/16 under OpenAI's or transformers' names, where
        `source` is of the original release and holds the decoder alone. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        check_kind(weights, source)
        if clip is not None and recognise(weights) == "CLIPSeg":
            raise ValueError(f"{source}: CLIP is there twice, remove clip= (--clip)")
        if clip is not None:
            weights |= read_clip(clip)
        weights = to_official(weights)
        if not any(name.startswith("clip.") for name in weights):
            told = "no tensor of CLIP; add it: clip='ViT-B-16.pt' (--clip ViT-B-16.pt), OpenAI's"
            raise ValueError(f"{source}: {told}")
        if "format" in settings:  # a run folder of ours
            config, told = Config(), run_config(settings, "CLIPSeg", source, Config)
        else:
            config = closest_variant(weights, cls, to_official)
            told = {ours: settings[hub] for hub, ours in SETTINGS.items() if hub in settings}
            if "taps" not in told:  # quirk: (3, 7, 9) in experiments/*.yaml, all else has (3, 6, 9)
                print(f"{source}: no config.json tells taps; took {config.taps}, of the demo")
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        model = cls(replace(config, **told | overrides))
        expected = without_fresh(to_official(model.state_dict()), weights, source)
        both = source if clip is None else f"{source} with {clip}"
        check_complete(weights, expected, both)  # in the hub's names
        model.load_state_dict(model.state_dict() | convert(weights))
        return model.eval()


FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
SETTINGS = {"extract_layers": "taps", "decoder_num_attention_heads": "heads"}  # in its config.json
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_FILES += ("model.safetensors", "pytorch_model.bin")  # of openai/clip-vit-base-patch16
IGNORED = {
    r"clip\.(text|vision)_model\.embeddings\.position_ids": "0, 1, 2, ... of old transformers",
    r"clip_model\.(input_resolution|context_length|vocab_size)": "OpenAI's; the tables tell them",
    r"model\.(class_|positional_|proj|conv1|ln_p|transformer).*": "the original's visual, again",
    r"reduce\.(weight|bias)": "of the original, which does not use it",
}
# OpenAI's and our names of CLIP -> the hub's, in this order.
RENAMES = (
    (r"^clip_model\.(logit_scale)", r"clip.\1"),
    (r"^clip_model\.visual\.proj$", "clip.visual_projection.weight"),
    (r"^clip_model\.text_projection$", "clip.text_projection.weight"),
    (r"^clip_model\.visual\.", "clip.vision_model."),
    (r"^clip_model\.", "clip.text_model."),
    (r"_model\.(token_embedding|class_embedding)", r"_model.embeddings.\1"),
    (r"_model\.positional_embedding", "_model.embeddings.position_embedding.weight"),
    (r"_model\.conv1", "_model.embeddings.patch_embedding"),
    (r"ln_pre", "pre_layrnorm"),
    (r"ln_post", "post_layernorm"),
    (r"ln_final", "final_layer_norm"),
    (r"transformer\.resblocks", "encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# The hub's names within a layer of CLIP -> ours, those of the shared block and OpenAI.
LAYER = (
    ("self_attn", "attn"), ("q_proj.", "in_proj_"), ("layer_norm", "ln_"), ("fc1", "c_fc"),
    ("fc2", "c_proj"),
)  # fmt: skip


def check_kind(weights: dict[str, Tensor], source) -> None:
    """Raise ValueError, one line, if the weights are known to be those of another model."""
    kind = recognise(weights)
    if kind.startswith("CLIP ("):
        raise ValueError(
            f"{source}: is {kind} without a decoder, not CLIPSeg; take CIDAS/clipseg-rd64-refined, "
            "or rd64-uni-refined.pth as weights and this file as clip= (--clip)"
        )
    if kind and "CLIPSeg" not in kind:
        raise ValueError(f"{source}: seems to be {kind}, not CLIPSeg")


def read_clip(source) -> dict[str, Tensor]:
    """Read CLIP ViT-B/16, named as within a CLIPSeg. Raise ValueError if it is another model."""
    weights = read_checkpoint(source, CLIP_FILES)[0]
    kind = recognise(weights) or "no file that is known"
    patches = {"visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"}
    sizes = [tuple(weights[name].shape[2:]) for name in patches & weights.keys()]
    if kind.startswith("CLIP (") and sizes != [(16, 16)]:
        kind += " with another image encoder"
    if not kind.startswith("CLIP (") or sizes != [(16, 16)]:
        raise ValueError(f"{source}: is {kind}; clip= (--clip) takes OpenAI's CLIP ViT-B/16")

    prefix = "clip_model." if "visual.conv1.weight" in weights else "clip."
    return {prefix + name: t for name, t in weights.items()}


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> the hub's, for `load_state_dict` of transformers' class; q, k and v apart."""
    weights = {}
    bare = {name.removeprefix("clipseg."): t for name, t in state_dict.items()}  # medvlsm's
    for old, t in hub_decoder(bare).items():
        if any(re.fullmatch(pattern, old) for pattern in IGNORED):
            continue
        name = old
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if old in ("clip_model.visual.proj", "clip_model.text_projection"):
            t = t.T.contiguous()  # (in,out) there, (out,in) in a linear layer
        if name in weights:
            raise ValueError(f"{name} is there twice, under two names; of CLIP give one file only")
        weights |= unpack(name, t)
    return weights


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


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> ours: the hub's but for the layers of CLIP, where q, k and v are one matrix."""
    official, weights = to_official(state_dict), {}
    for name, t in official.items():
        is_layer = name.startswith("clip.") and ".encoder.layers." in name
        if is_layer and ".adapters." not in name:  # whose names are ours
            if ".k_proj." in name or ".v_proj." in name:
                continue  # come with q
            if ".q_proj." in name:
                t = torch.cat([official[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            for hub, ours in LAYER:
                name = name.replace(hub, ours)
        weights[name] = t
    return weights


# shared: closest_variant
def closest_variant(weights: dict[str, Tensor], kind: type[nn.Module], naming) -> Config:
    """Return the variant with the most tensors of the same name and shape as `weights`.

    naming: a function that gives the state dict of a model of class `kind` the file's names.
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


def visual_prompt(image: Tensor, mask: Tensor, config: Config) -> Tensor:
    """image (3,H,W) normalised, mask (1,H,W) of 0 and 1 -> (3,S,S) for `encode_visual_prompt`.

    All but the masked is blurred and darkened to a tenth, then cropped a tenth of the mask's size
    around it: the authors' best way (crop_blur_highlight352 in their datasets/utils.py).
    """
    mask = mask[0] > 0.5  # (H,W)
    if not mask.any():
        raise ValueError("the mask of a prompt image is empty: mark there what is to be found")
    x = torch.arange(-7, 8, device=image.device, dtype=image.dtype)
    kernel = torch.softmax(-(x**2) / (2 * 3.0**2), 0)  # (15,), Gaussian of 3 pixels
    blurred = F.pad(image, (7, 7, 7, 7), mode="reflect")[:, None]  # (3,1,H+14,W+14)
    blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, 15, 1)), kernel.view(1, 1, 1, 15))
    image = torch.where(mask, image, 0.1 * blurred[:, 0])  # (3,H,W)
    for axis, side in enumerate(mask.shape, 1):
        inside = mask.any(2 - axis).nonzero()
        first, end = int(inside[0]), int(inside[-1]) + 1
        margin = 0.1 * (end - first)
        first, end = int(max(0, first - margin)), int(min(side, end + margin))
        image = image.narrow(axis, first, end - first)  # (3,h,w) in the end
    h, w = image.shape[1:]
    rows, columns = max(w - h, 0), max(h - w, 0)  # of zeros that make it a square
    sides = columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    size = (config.image_size, config.image_size)
    return F.interpolate(F.pad(image, sides)[None], size)[0]  # (3,S,S), nearest


# shared: clip_tokens
def tokenize(prompt: str, config: Config) -> Tensor:
    """Return the token ids (1,T) of a text, int64. Needs `tokenizer.py` and what it reads."""
    from tokenizer import CLIPTokenizer

    return CLIPTokenizer(config.text_length, config.pad_token)(prompt)


# end shared


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
