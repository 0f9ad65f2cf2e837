"""BEiT for segmentation: a plain vision transformer, four of its blocks seen by a UPer head.

Paper: Bao, Dong, Piao & Wei, ICLR 2022, arXiv 2106.08254. Code: github.com/microsoft/unilm at
2312c6f, beit/semantic_segmentation/backbone/beit.py (MIT); its port to transformers 5.23,
modeling_beit.py. Weights on the hub: microsoft/beit-base-finetuned-ade-640-640 and -large-, whose
cards say Apache 2.0; the authors' are beit_base_patch16_640_pt22k_ft22ktoade20k.pth and _large_.
An encoder alone, such as microsoft/beit-base-patch16-224-pt22k-ft22k, loads with num_classes=.

    image (B,3,640,640)
      patches of 16 pixels and a class token: (B,1+40*40,768)
      blocks 0..9 of 12, each with a bias of its own for every offset between two patches;
      kept of them 1, 3, 5, 9: without the class token (B,768,40,40) each
        |            |            |            |
      fpn1: x 4    fpn2: x 2    as it is     max pool: / 2
      160x160      80x80        40x40        20x20
        '------------'-----+------'------------'
                      decode_head: pools of the last one, a feature pyramid over all, one map
    logits (B,150,160,160): a quarter of the image's sides

Any sides in 16s will do, from 32 on: the table of biases is interpolated to the grid. Blocks behind
the last tap do not run: they load, are written back, and are frozen.
Left out: the auxiliary head, which is there for a second loss only, and what the released files
have not: absolute positions, one bias for all blocks (the encoders without fine-tuning, pt22k).

    model = BEiT.from_pretrained("microsoft/beit-base-finetuned-ade-640-640")
    probabilities, mask = model.segment("photo.jpg")  # or a PIL image
    # numpy, at the photo's own size: float32 (K,H,W); uint8 (H,W), the class of each pixel
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
    # Blocks that the head sees, from 0. quirk: transformers takes `hidden_states[i - 1]` of its
    # out_indices (3, 5, 7, 11), and [0] is what enters block 0: two blocks before the authors'
    # (3, 5, 7, 11) of base and (7, 11, 15, 23) of large, for which the weights were trained. The
    # default is transformers', for equal numbers. To fine-tune the authors' are right: the head
    # meets what it knows, and the last two blocks, dead under the others, take part.
    taps: tuple[int, ...] = (1, 3, 5, 9)
    dim: int = 768  # heads are 64 wide
    layers: int = 12
    window: int = 40  # patches a side of the grid that the tables of biases belong to
    drop_path: float = 0.1  # of the last block, in training, less before; the authors' large: 0.2
    num_classes: int = 150
    image_size: int = 640  # side of the square that `preprocess` makes
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # RGB in 0..1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"  # PIL's name, or "cv2 nearest"
    threshold: float = 0.5  # of a model with one class


VARIANTS = {
    "base": Config(),  # 161,599,446 parameters, 14,327,136 of them do not run
    "large": Config(taps=(5, 9, 13, 21), dim=1024, layers=24),  # 438,872,726, 25,394,304
    "mini": Config(  # 3,393,414, 397,008; for tests and demos; the authors' taps: (2, 3, 4, 5)
        taps=(0, 1, 2, 3), dim=128, layers=6, window=4, image_size=64
    ),
}


class Embeddings(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        patches = nn.Conv2d(3, dim, 16, stride=16)
        self.patch_embeddings = nn.ModuleDict({"projection": patches})

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> tokens (B,1+H/16*W/16,C), the class token first; no positions."""
        x = self.patch_embeddings["projection"](image).flatten(2).transpose(1, 2)  # (B,HW/256,C)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (B,N,C)


def bias_index(H: int, W: int, device=None) -> Tensor:
    """-> (N,N) int64: which entry of a bias table is between two tokens of a grid of H x W patches.

    Entries are the (2H-1)(2W-1) offsets, then class to patch, patch to class, class to class.
    """
    ys, xs = torch.arange(H, device=device), torch.arange(W, device=device)
    y, x = ys.repeat_interleave(W), xs.repeat(H)  # (HW,) each
    offsets = (2 * H - 1) * (2 * W - 1)
    index = torch.empty(1 + H * W, 1 + H * W, dtype=torch.long, device=device)  # (N,N)
    row, column = y[:, None] - y + H - 1, x[:, None] - x + W - 1  # (HW,HW), from 0
    index[1:, 1:] = row * (2 * W - 1) + column
    index[0], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class RelativePositionBias(nn.Module):
    def __init__(self, window: int, heads: int):
        super().__init__()
        self.side = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self.side**2 + 3, heads))

    def forward(self, H: int, W: int, index: Tensor) -> Tensor:
        """index (N,N) from `bias_index(H, W)` -> (1,h,N,N), to be added to scores.

        Another grid than the table's own stretches the table, as in MiDaS 3.1 and transformers.
        (The authors' geometric interpolation is for checkpoints of another size, once.)
        """
        offsets, others = self.relative_position_bias_table.T.split((self.side**2, 3), 1)
        offsets = offsets.unflatten(1, (self.side, self.side))[None]  # (1,h,side,side)
        size = (2 * H - 1, 2 * W - 1)
        offsets = F.interpolate(offsets, size, mode="bilinear", align_corners=False)
        entries = torch.cat([offsets[0].flatten(1), others], 1)  # (h,entries)
        # Along rows in memory: several times faster than table[index], which then is transposed.
        return entries.index_select(1, index.flatten()).unflatten(1, index.shape)[None]  # (1,h,N,N)


class Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # A bias of k would add the same to all scores of a query, which softmax takes out again.
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B,N,C), bias (1,h,N,N) -> (B,N,C)."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(x).unflatten(2, (-1, 64)).transpose(1, 2) for f in projections)  # (B,h,N,64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B,h,N,64)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim: int, window: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        # quirk: eps 1e-12, transformers' default (configuration_beit.py); the authors had 1e-6
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.relative_position_bias = RelativePositionBias(window, dim // 64)
        self.attention = Attention(dim)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.lambda_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.lambda_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor, H: int, W: int, index: Tensor) -> Tensor:
        """x (B,N,C) of H x W patches, index (N,N) -> (B,N,C)."""
        # At 640 pixels 123 MB in base, so it is not kept; it costs little beside the rest.
        bias = self.relative_position_bias(H, W, index)  # (1,h,N,N)
        y = self.attention(self.layernorm_before(x), bias)
        x = x + self.scale(self.lambda_1, len(x)) * y
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layernorm_after(x))))  # (B,N,C)
        return x + self.scale(self.lambda_2, len(x)) * y

    def scale(self, lambda_: Tensor, B: int) -> Tensor:
        """-> (B,1,C); in training, of an image now and then all zeros (stochastic depth)."""
        return lambda_ * F.dropout(lambda_.new_ones(B, 1, 1), self.drop_path, self.training)


class ViT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c, last = config, max(config.layers - 1, 1)
        self.taps = c.taps
        self.embeddings = Embeddings(c.dim)
        self.layers = nn.ModuleList(
            Layer(c.dim, c.window, c.drop_path * i / last) for i in range(c.layers)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B,3,H,W) -> what the blocks in `taps` give, (B,C,H/16,W/16) each."""
        if any(side % 16 or side < 32 for side in image.shape[2:]):
            size = tuple(image.shape[2:])
            raise ValueError(f"image sides must be multiples of 16, at least 32, not {size}")
        H, W = (side // 16 for side in image.shape[2:])
        # One for all blocks. Made anew, at most a hundredth of the work: a cache would hold on to
        # devices, and to tensors of inference mode, which training cannot save.
        index = bias_index(H, W, image.device)  # (N,N)
        x, states = self.embeddings(image), []
        for layer in self.layers[: max(self.taps) + 1]:
            x = layer(x, H, W, index)
            states.append(x)
        return [states[i][:, 1:].transpose(1, 2).unflatten(2, (H, W)) for i in self.taps]


# shared: uper_head
def upsampled_conv3x3(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """3x3 convolution, padding 1, of the bilinearly enlarged x, whose channels mix while small.

    Channels and positions can be mixed in either order: each of the nine taps mixes the channels
    before upsampling; upsampling, shifting and adding are then one small matrix along each side.
    (B,C,h,w), (K,C,3,3), size (H,W) -> (B,K,H,W)
    """

    def taps(n: int, N: int) -> Tensor:
        """(N,3,n): how much of position i each tap sees when it makes position j."""
        eye = torch.eye(n, device=x.device, dtype=x.dtype)[None]
        up = F.interpolate(eye, N, mode="linear", align_corners=False)[0]  # (n,N)
        return F.pad(up, (1, 1)).unfold(1, N, 1).permute(2, 1, 0)

    B, _, h, w = x.shape
    H, W = size
    K = len(weight)
    mix = weight.permute(2, 1, 3, 0).flatten(2)  # (3,C,3*K): row tap, channel, column tap
    y = x.flatten(2).transpose(1, 2)[:, None] @ mix  # (B,3,h*w,3*K)
    y = taps(h, H).flatten(1) @ y.view(B, 3 * h, w * 3 * K)  # (B,H,w*3*K)
    y = taps(w, W).transpose(1, 2).flatten(1) @ y.view(B, H, w * 3, K)  # (B,H,W,K)
    return y.permute(0, 3, 1, 2)


class ConvModule(nn.Module):
    """Convolution, batch norm, ReLU, of the concatenation of all maps enlarged to the first."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=False)
        self.batch_norm = nn.BatchNorm2d(outputs)

    def forward(self, first: Tensor, *smaller: Tensor) -> Tensor:
        """maps (B,C,h,w), each of its own size and channels -> (B,outputs,H,W) of the first."""
        weight, *weights = self.conv.weight.split([x.shape[1] for x in (first, *smaller)], 1)
        y = F.conv2d(first, weight, padding=self.conv.padding)
        for x, weight in zip(smaller, weights, strict=True):
            y += upsampled_conv3x3(x, weight, y.shape[2:])
        return F.relu(self.batch_norm(y), inplace=True)


class UPerHead(nn.Module):
    """A pyramid of pools on the last map, then a feature pyramid over all; arXiv 1807.10221.

    widths: channels of the four maps; channels (C): inside. Fresh, it is as transformers makes it.
    """

    def __init__(self, widths: list[int], channels: int, num_classes: int):
        super().__init__()
        C, last = channels, widths[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), ConvModule(last, C, 1)) for k in (1, 2, 3, 6)
        )
        self.bottleneck = ConvModule(last + 4 * C, C, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, C, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(C, C, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvModule(len(widths) * C, C, 3)
        self.classifier = nn.Conv2d(C, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps (B,width,h,w), finest first -> logits (B,K,h,w) of the first one's size."""
        *maps, last = maps
        x = self.bottleneck(last, *(pool(last) for pool in self.psp_modules))  # (B,C,h,w) of last
        pyramid, levels = [x], zip(maps, self.lateral_convs, self.fpn_convs, strict=True)
        for y, lateral, conv in reversed(list(levels)):
            y = lateral(y)  # (B,C,h,w), twice the sides of x
            x = y + F.interpolate(x, y.shape[2:], mode="bilinear", align_corners=False)
            pyramid.insert(0, conv(x))
        return self.classifier(self.fpn_bottleneck(*pyramid))  # all at the first one's size


# end shared


class BEiT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config
        if len(c.taps) != 4 or not all(0 <= i < c.layers for i in c.taps):
            raise ValueError(f"taps={c.taps}: must be four blocks of 0 to {c.layers - 1}")
        self.preprocess = partial(preprocess, config=config)  # image -> (3,S,S)
        self.postprocess = partial(postprocess, config=config)  # logits, size -> (K,H,W)
        self.beit = ViT(c)
        # The four maps have one size; the head wants strides of 4, 8, 16 and 32 pixels.
        up = partial(nn.ConvTranspose2d, c.dim, c.dim, 2, 2)
        self.fpn1 = nn.Sequential(up(), nn.BatchNorm2d(c.dim), nn.GELU(), up())
        self.fpn2 = nn.Sequential(up())
        for module in (*self.beit.modules(), *self.fpn1, *self.fpn2):  # as transformers makes them
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.decode_head = UPerHead([c.dim] * 4, c.dim, c.num_classes)
        # These do not run. What may train always gets a gradient.
        self.beit.layers[max(c.taps) + 1 :].requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) normalised, H and W in 16s -> logits (B,K,H/4,W/4).

        In training B is at least 2: one of the pools leaves a single value an image and channel.
        """
        x1, x2, x3, x4 = self.beit(image)  # (B,C,H/16,W/16) each
        return self.decode_head([self.fpn1(x1), self.fpn2(x2), x3, F.max_pool2d(x4, 2)])

    def segment(self, image) -> tuple:
        """Segment an image or its file -> probabilities (K,H,W), mask (H,W); see `segment`."""
        return segment(self, image)

    @classmethod
    def from_pretrained(cls, source: str | Path, num_classes=None, **overrides) -> "BEiT":
        """From a file, a folder, a run folder or a hub id; `overrides` are fields of Config.

        num_classes: what the file has, if None; else, where that differs, a new classifier. A file
        of the encoder alone needs it and gets a new head. In evaluation mode.
        """
        weights, settings = read_checkpoint(source, FILES)
        weights = to_official(weights)
        if "format" in settings:  # a run folder of ours
            config = Config(**run_config(settings, "BEiT", source, Config))
        else:
            config = read_config(weights, settings, source)
        headless = not any(name.startswith("decode_head.") for name in weights)
        if num_classes is None:
            if headless:
                raise ValueError(f"{source}: an encoder alone; say num_classes= for a new head")
            num_classes = config.num_classes
        fresh = FRESH if headless else FRESH[:1] if num_classes != config.num_classes else ()
        model = cls(replace(config, num_classes=num_classes, **overrides))
        expected = to_official(model.state_dict())
        new = [name for name in expected if any(re.match(regex, name) for regex in fresh)]
        weights = {name: t for name, t in weights.items() if name not in new}
        expected = {name: t for name, t in expected.items() if name not in new}
        check_complete(weights, expected, source)  # in the hub's names
        model.load_state_dict(model.state_dict() | convert(weights))
        if new:
            modules = dict.fromkeys(".".join(name.split(".")[:2]) for name in new)
            print(f"{source}: new and untrained: {', '.join(modules)}")
        return model.eval()


FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
FRESH = (  # what may be new, in the hub's names
    r"decode_head\.classifier\.",  # for another number of classes
    r"(fpn1|fpn2|decode_head)\.",  # behind an encoder alone, both
)
IGNORED = {
    r".*\.relative_position_index": "a constant, 20 MB a block in old files; see `bias_index`",
    r"auxiliary_head\..*": "for a second loss; transformers runs it always and drops what it gives",
    r"(beit\.)?pooler\..*|(classifier|fc_norm|head)\.(weight|bias)": "of a classifier of images",
}
# The authors' (and timm's) names and those within transformers 5 -> the hub's, but for layers,
# which become ours; in this order.
RENAMES = (
    (r"^(embeddings|encoder|layers)\.", r"beit.\1."),  # BeitModel
    (r"^(?:backbone\.)?cls_token$", "beit.embeddings.cls_token"),
    (r"^(?:backbone\.)?patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
    (r"^(?:backbone\.)?blocks\.", "beit.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.(relative_position_bias)_table", r".\1.\1_table"),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"^backbone\.fpn", "fpn"),
    (r"^fpn\.fpn1\.conv_transpose1\.", "fpn1.0."),
    (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"^fpn\.fpn1\.conv_transpose2\.", "fpn1.3."),
    (r"^fpn\.fpn2\.", "fpn2.0."),
    (r"\.conv_seg\.", ".classifier."),
    (r"\.psp_bottleneck\.", ".bottleneck."),
    (r"\.psp_modules\.blocks\.(\d+)\.conv\.", r".psp_modules.\1.1."),
    (r"\.convolution\.", ".conv."),
    (r"\.(?:normalization|batch_norm)\.", ".bn."),
)
# The hub's names in a layer -> ours, those within transformers 5; in this order, both ways.
LAYER = (
    ("beit.encoder.layer.", "beit.layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.attention.relative_position_bias.", "relative_position_bias."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> the hub's, for `from_pretrained` of transformers' class; no auxiliary head."""
    weights = {}
    for name, t in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in IGNORED):
            continue
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        parts = {name: t}
        if name.endswith(".attn.qkv.weight"):  # the authors' three in one matrix
            stem = name.removesuffix("attn.qkv.weight") + "attention."
            thirds = zip("qkv", t.chunk(3), strict=False)  # a wrong shape is told later
            parts = {f"{stem}{x}_proj.weight": part.clone() for x, part in thirds}
        for name, t in parts.items():
            if name.startswith("beit.layers."):
                for hub, ours in LAYER:
                    name = name.replace(ours, hub)
            weights[name] = t
    return weights


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any naming -> ours: the hub's, but within layers that of transformers 5, and batch norms."""
    weights = {}
    for name, t in to_official(state_dict).items():
        if name.startswith("beit.encoder.layer."):
            for hub, ours in LAYER:
                name = name.replace(hub, ours)
        weights[name.replace(".bn.", ".batch_norm.")] = t  # the name in the shared head
    return weights


def read_config(weights: dict[str, Tensor], settings: dict, source) -> Config:
    """From the shapes of tensors in the hub's names; taps, which none tells, from config.json."""
    # What is wrong or missing in it is told later.
    config, told = closest_variant(weights, BEiT, to_official), {}
    for name, t in weights.items():
        if name.endswith(".relative_position_bias_table"):
            told["window"] = (math.isqrt(max(len(t) - 3, 1)) + 1) // 2
            told["image_size"] = 16 * told["window"]
    if (classifier := weights.get("decode_head.classifier.bias")) is not None:
        told["num_classes"] = len(classifier)
    if len(indices := settings.get("out_indices") or ()) == 4:
        told["taps"] = tuple(i - 2 for i in indices)  # see Config
    else:
        authors = tuple(i + 2 for i in config.taps)
        told_by = f"took {config.taps}, transformers'; the authors' are {authors}"
        print(f"{source}: no config.json tells taps; {told_by}")
    return replace(config, **told)


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


# shared: classes
def preprocess(image, config: Config) -> Tensor:
    """Resize a PIL image to a square and normalise it: (3,S,S) float32.

    Raise errors as `to_rgb` does.
    """
    import numpy as np
    from PIL import Image

    image = to_rgb(image)
    size = (config.image_size, config.image_size)
    if config.resample != "cv2 nearest":
        image = image.resize(size, Image.Resampling[config.resample.upper()])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3,H,W) uint8
    pixels = F.interpolate(pixels[None], size)[0]  # (3,S,S), nearest neighbour as in OpenCV

    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]
    return (pixels / 255 - mean) / std  # (3,S,S)


def preprocess_mask(mask: Tensor, config: Config) -> Tensor:
    """Resize a mask (H,W) of class indices as `preprocess` resizes images: (1,S,S) float32.

    Nearest neighbour. Where a position falls exactly between two source pixels, the result may
    differ by one source pixel from that of PIL or OpenCV.
    """
    size = (config.image_size, config.image_size)
    mode = "nearest-exact"  # PIL's
    if config.resample == "cv2 nearest":
        mode = "nearest"
    return F.interpolate(mask[None, None].float(), size, mode=mode)[0]


def postprocess(logits: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """Return probabilities (K,H,W) float32 at the image's own `size` (H,W) from logits (K,h,w).

    They are a softmax over the classes; with one class, a sigmoid.
    """
    logits = F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0]
    if len(logits) > 1:
        return logits.softmax(0)
    return logits.sigmoid()


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


# shared: segment_classes
def segment(model: nn.Module, image) -> tuple:
    """Return the probabilities and the class map of one image, as numpy arrays of its size.

    image: a file (str or Path), see `open_upright`, or a PIL image, whose EXIF data is ignored.
    Probabilities are float32 (K,H,W). The mask (H,W) holds class indices, uint8 (uint16 with more
    than 256 classes); with one class, 1 where its probability is above `config.threshold`.
    Raise errors as `open_upright` and `preprocess` do.
    """
    image = open_upright(image)
    pixels = model.preprocess(image)[None].to(next(model.parameters()))  # (1,3,S,S)
    size = (image.height, image.width)

    with evaluating(model):
        logits = model(pixels)[0]  # (K,h,w)
        probabilities = model.postprocess(logits, size).cpu().numpy()

    if len(probabilities) == 1:
        mask = probabilities[0] > model.config.threshold
    else:
        mask = probabilities.argmax(0)
    return probabilities, mask.astype("uint8" if len(probabilities) <= 256 else "uint16")


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
