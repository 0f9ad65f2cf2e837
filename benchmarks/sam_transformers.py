"""SAM against transformers: same weights, same input, equal outputs, then time and memory.

    python benchmarks/sam_transformers.py                            # table in docs/benchmarks.md
    python benchmarks/sam_transformers.py --variant mini --rounds 1  # a minute, to try it
    python benchmarks/sam_transformers.py --device cuda --official segment-anything

Encoder, decoder: without gradients; transformers uses its default attention, sdpa.
Step: trains the mask decoder from features with AdamW; `sam_loss` at a quarter of the image's side.
Epoch: one such step with one box per image, in an epoch after the first. transformers encodes the
images again, as is usual; ours takes cached features in half precision. Neither loads files.

On a GPU everything runs in float32 without TF32, and with bfloat16 autocast. --official adds the
image encoder of a checkout of github.com/facebookresearch/segment-anything.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, set_up_torch
from torch import nn

sys.path.insert(0, str(ROOT))

import sam_decoder  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402
from losses import sam_loss  # noqa: E402

PARTS = ("encoder", "decoder", "step", "epoch", "memory")
PROMPTS = {"one box": 1, "14 boxes": 14}  # boxes of each image
MEMORY_KINDS = ("encoder", "step, 14 boxes")  # their peak memory is measured, too
# The largest difference that is accepted, as a share of the largest value; bfloat16 has 8 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def official_model(c: sam_decoder.Config) -> nn.Module:
    """Return transformers' model with the sizes of our Config `c`.

    Its random weights all influence the output. With those of a new model, whose standard deviation
    is 1e-10, all outputs would be alike.
    """
    from transformers import SamConfig, SamModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    vision = {
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "mlp_dim": c.mlp_dim,
        "global_attn_indexes": list(c.global_blocks),
        "image_size": c.image_size,
        "output_channels": c.out_dim,
        "num_pos_feats": c.out_dim // 2,
    }
    prompt_encoder = {"hidden_size": c.out_dim, "image_size": c.image_size}
    mask_decoder = {
        "hidden_size": c.out_dim,
        "mlp_dim": 8 * c.out_dim,
        "iou_head_hidden_dim": c.out_dim,
    }
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config=prompt_encoder,
        mask_decoder_config=mask_decoder,
    )
    model = SamModel(config)

    torch.manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        if p.ndim >= 2:
            is_position = "positional_embedding" in name
            scale = 1 if is_position else max(0.02, p[0].numel() ** -0.5)
            p.data = scale * noise
        elif name.endswith("weight"):  # of a norm
            p.data = 1 + 0.1 * noise
        else:
            p.data = 0.1 * noise
    return model.eval()


def our_model(official: nn.Module) -> sam_decoder.SAM:
    """Return our model, loaded from the files that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        official.save_pretrained(folder)
        model = sam_decoder.SAM.from_pretrained(folder, min_max=False)  # avoids a printed note
        # Numbers of a mapped file are only read when they are used. Without a copy they would count
        # as memory of the first step.
        for p in model.parameters():
            p.data = p.data.clone()
    return model


def authors_encoder(checkout: str, ours: sam_decoder.SAM) -> nn.Module:
    """Return the image encoder of segment_anything with our weights."""
    if not (Path(checkout) / "segment_anything/modeling").exists():
        raise ValueError(
            f"{checkout} has no segment_anything/modeling; name a checkout of segment-anything"
        )
    sys.path.insert(0, checkout)
    from segment_anything.modeling import ImageEncoderViT

    c = ours.config
    model = ImageEncoderViT(
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        img_size=c.image_size,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=c.mlp_dim / c.dim,
        out_chans=c.out_dim,
        use_rel_pos=True,
        window_size=sam_decoder.WINDOW,
        global_attn_indexes=c.global_blocks,
    ).eval()

    # `convert` renames official tensors and keeps their order: it tells our name of each of theirs.
    official_state = {f"image_encoder.{name}": t for name, t in model.state_dict().items()}
    our_names = sam_decoder.convert(official_state)
    our_state = ours.state_dict()
    state = {}
    for name, our_name in zip(model.state_dict(), our_names, strict=True):
        state[name] = our_state[our_name]
    model.load_state_dict(state)
    return model


def encode_image(implementation: str, model: nn.Module, image) -> torch.Tensor:
    """Return the features (B,C,S/16,S/16) of images (B,3,S,S)."""
    if implementation == "official":
        return model.get_image_embeddings(image)
    if implementation == "ours":
        return model.encode_image(image)
    return model(image)


def decode(model, features, boxes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks (B,Q,H,W) and their predicted IoU (B,Q) for boxes (B,Q,4)."""
    if isinstance(model, sam_decoder.SAM):
        masks, iou = model.decode(features, boxes=boxes)
        return masks[:, :, 0], iou[:, :, 0]
    out = model(image_embeddings=features, input_boxes=boxes, multimask_output=False)
    return out.pred_masks[:, :, 0], out.iou_scores[:, :, 0]


def build_steps(implementation: str, model: nn.Module, batch: tuple, dtype: str) -> dict:
    """Return {kind of step: function to time}. The functions return outputs or the loss.

    batch: images (B,3,S,S), features (B,C,S/16,S/16), boxes (B,Q,4) and masks (B,Q,S/4,S/4), on
    the CPU.
    """
    device = next(model.parameters()).device.type
    image, features, boxes, target = [x.to(device) for x in batch]
    pixels = batch[0]  # as a data loader would return them
    cached = batch[1].half()  # as they would be read from a cache
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def encoder(image=image):
        with torch.no_grad(), autocast:
            return encode_image(implementation, model, image)

    kinds = {f"encoder, {dtype}": encoder}
    if implementation == "authors":
        return kinds
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=1e-5, fused=True)

    def decoder(Q):
        with torch.no_grad(), autocast:
            masks, _ = decode(model, features, boxes[:, :Q])
        return masks

    def step(Q, features=features):
        with autocast:
            masks, iou = decode(model, features, boxes[:, :Q])
        loss, _ = sam_loss(masks.float(), iou.float(), target[:, :Q])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def epoch():
        if implementation == "official":
            step(1, encoder(pixels.to(device)))
        else:
            step(1, cached.to(device).float())

    for name, Q in PROMPTS.items():
        kinds[f"decoder, {name}, {dtype}"] = partial(decoder, Q)
    for name, Q in PROMPTS.items():
        kinds[f"step, {name}, {dtype}"] = partial(step, Q)
    kinds[f"epoch after the first, {dtype}"] = epoch
    return kinds


def random_batch(c: sam_decoder.Config, size: int) -> tuple:
    """Return images, features, boxes and masks of `size` images, as `build_steps` takes them."""
    S = c.image_size
    Q = max(PROMPTS.values())
    torch.manual_seed(1)
    image = torch.randn(size, 3, S, S)
    features = torch.randn(size, c.out_dim, S // 16, S // 16)
    corner, extent = S / 2 * torch.rand(2, size, Q, 2)
    boxes = torch.cat([corner, corner + extent], 2)  # (B,Q,4)
    target = torch.rand(size, Q, S // 4, S // 4).round()
    return image, features, boxes, target


def all_steps(args) -> dict[str, dict]:
    """Return {kind of step: {implementation: function to time}}."""
    c = replace(sam_decoder.VARIANTS[args.variant], image_size=args.size)
    official = official_model(c)
    models = {"official": official, "ours": our_model(official)}
    for model in models.values():
        model.requires_grad_(False)
        model.mask_decoder.requires_grad_(True)
    if args.official:
        models["authors"] = authors_encoder(args.official, models["ours"])

    batch = random_batch(c, args.batch_size)
    dtypes = TOLERANCE if args.device == "cuda" else ["float32"]
    kinds = {}
    for dtype in dtypes:
        for implementation, model in models.items():
            steps = build_steps(implementation, model.to(args.device), batch, dtype)
            for kind, function in steps.items():
                kinds.setdefault(kind, {})[implementation] = function
    return kinds


def print_equal(kind: str, functions: dict) -> None:
    """Print how much the outputs differ. Raise AssertionError if it is too much."""
    outputs = {name: function().float() for name, function in functions.items()}
    expected = outputs.pop("official")
    largest = expected.abs().max().item()
    dtype = kind.split()[-1]
    for name, actual in outputs.items():
        error = (actual - expected).abs().max().item() / largest
        print(
            f"{kind}: {name} differs by {error:.1e} of the largest value {largest:.2g}", flush=True
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * largest)


def print_rows(name: str, values: dict[str, list[float]], unit: str) -> None:
    """Print the row of a kind of step, and one against the authors' code if it was measured."""
    print(row(name, values["official"], values["ours"], unit), flush=True)
    if "authors" in values:
        print(
            row(f"{name}, the authors' code", values["authors"], values["ours"], unit), flush=True
        )


def describe_speed(kind: str, times: dict[str, list[float]], batch_size: int) -> str:
    """Return the images per second of each implementation, in one line."""
    speeds = []
    for name, seconds in times.items():
        speeds.append(f"{name} {batch_size / statistics.median(seconds):.3g}")
    return f"{kind}: {', '.join(speeds)} images per second"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "variant of SAM (default: %(default)s)"
    add("--variant", choices=sam_decoder.VARIANTS, default="vit-base", help=help)
    help = "height and width of the images (default: that of the variant)"
    add("--size", type=POSITIVE, metavar="PX", help=help)
    help = "parts to measure (default: all)"
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help=help)
    help = "device to run on (default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=help)
    help = "images in a batch (default: 1 on the CPU, 8 on a GPU)"
    add("--batch-size", type=POSITIVE, metavar="N", help=help)
    help = "folder of a checkout of segment-anything, to compare its image encoder (default: none)"
    add("--official", metavar="DIR", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    # For child processes: implementation, kind of step.
    add("--memory", nargs=2, help=argparse.SUPPRESS)

    args = parser.parse_args()
    args.size = args.size or sam_decoder.VARIANTS[args.variant].image_size
    args.batch_size = args.batch_size or (8 if args.device == "cuda" else 1)
    return args


def main() -> int:
    args = parse()
    set_up_torch(args)
    kinds = all_steps(args)
    if args.memory:
        implementation, kind = args.memory
        print(peak_memory(kinds[kind][implementation]))
        return 0

    print(f"{machine()}\n{args.variant}, {args.batch_size} x {args.size} px")
    timed = {kind: steps for kind, steps in kinds.items() if kind.startswith(tuple(args.parts))}
    for kind, functions in timed.items():
        if not kind.startswith("epoch"):  # there the two models have different features
            print_equal(kind, functions)

    print(f"\n{HEADER}")
    speeds = []
    for kind, functions in timed.items():
        times = in_turns(functions, args.rounds)
        print_rows(kind, times, "s")
        speeds.append(describe_speed(kind, times, args.batch_size))

    for kind in kinds:
        if "memory" in args.parts and kind.startswith(MEMORY_KINDS):
            peaks = {}
            for implementation in kinds[kind]:
                peaks[implementation] = [in_fresh_process("--memory", implementation, kind)]
            print_rows(f"peak memory, {kind}", peaks, "MB")
    print("", *speeds, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
