"""SAM against transformers: same weights, same input, equal outputs, then time and memory.

    python benchmarks/sam_transformers.py                              # the README's table
    python benchmarks/sam_transformers.py --variant mini --rounds 1    # a minute, to try it
    python benchmarks/sam_transformers.py --device cuda --official segment-anything

Encoder, decoder: without gradients; transformers attends by its default, sdpa. Step: of the mask
decoder, from features, `sam_loss` at a quarter of the image's side, AdamW. Epoch: such a step of a
later one, a box an image; transformers encodes the images anew, as is usual, we have kept features
in half precision; neither loads files. On a GPU in float32 without TF32, and bfloat16 autocast.
--official, a checkout of github.com/facebookresearch/segment-anything: the authors' encoder too.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, settle
from torch import nn

sys.path.insert(0, str(ROOT))

import sam_decoder  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402
from losses import sam_loss  # noqa: E402

PARTS = ("encoder", "decoder", "step", "epoch", "memory")
PROMPTS = {"a box": 1, "14 boxes": 14}  # of each image
MEASURED = ("encoder", "step, 14 boxes")  # whose peak memory is in the table too
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest number; bfloat16 has 8 bits
ENCODE = {"official": "get_image_embeddings", "ours": "encode_image", "authors": "forward"}


def official_model(c: sam_decoder.Config) -> nn.Module:
    """transformers' class in the sizes of `c`, with random weights that all do something."""
    from transformers import SamConfig, SamModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    size, width = {"image_size": c.image_size}, {"hidden_size": c.out_dim}
    vision = {"hidden_size": c.dim, "num_hidden_layers": c.depth, "num_attention_heads": c.heads}
    vision |= {"mlp_dim": c.mlp_dim, "global_attn_indexes": list(c.global_blocks)} | size
    vision |= {"output_channels": c.out_dim, "num_pos_feats": c.out_dim // 2}
    decoder = width | {"mlp_dim": 8 * c.out_dim, "iou_head_hidden_dim": c.out_dim}
    parts = {"prompt_encoder_config": width | size, "mask_decoder_config": decoder}
    model = SamModel(SamConfig(vision_config=vision, **parts))
    torch.manual_seed(0)
    for name, p in model.named_parameters():  # its own start, 1e-10, would make all outputs alike
        noise, norm = torch.randn(p.shape), name.endswith("weight")
        scale = 1 if "positional_embedding" in name else max(0.02, p[0].numel() ** -0.5)
        p.data = norm + 0.1 * noise if p.ndim < 2 else scale * noise
    return model.eval()


def our_model(official: nn.Module) -> sam_decoder.SAM:
    """Read from what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        official.save_pretrained(folder)
        model = sam_decoder.SAM.from_pretrained(folder, min_max=False)  # given, nothing is printed
        for p in model.parameters():  # else its numbers stay in the file until they are used,
            p.data = p.data.clone()  # and count as memory that the first step takes
    return model


def authors_encoder(checkout: str, ours: sam_decoder.SAM) -> nn.Module:
    """The image encoder of segment_anything with our weights."""
    if not (Path(checkout) / "segment_anything/modeling").exists():
        raise ValueError(f"{checkout} has no segment_anything/modeling; name a checkout of it")
    sys.path.insert(0, checkout)
    from segment_anything.modeling import ImageEncoderViT

    c, state = ours.config, ours.state_dict()
    sizes = {"img_size": c.image_size, "embed_dim": c.dim, "depth": c.depth, "num_heads": c.heads}
    sizes |= {"mlp_ratio": c.mlp_dim / c.dim, "out_chans": c.out_dim, "use_rel_pos": True}
    sizes |= {"window_size": sam_decoder.WINDOW, "global_attn_indexes": c.global_blocks}
    model = ImageEncoderViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes).eval()
    named = {f"image_encoder.{name}": t for name, t in model.state_dict().items()}
    places = zip(model.state_dict(), sam_decoder.convert(named), strict=True)  # in the same order
    model.load_state_dict({name: state[place] for name, place in places})
    return model


def decode(model, features, boxes) -> tuple[torch.Tensor, torch.Tensor]:
    """boxes (B,Q,4) -> masks (B,Q,H,W), iou (B,Q)."""
    if isinstance(model, sam_decoder.SAM):
        masks, iou = model.decode(features, boxes=boxes)
        return masks[:, :, 0], iou[:, :, 0]
    out = model(image_embeddings=features, input_boxes=boxes, multimask_output=False)
    return out.pred_masks[:, :, 0], out.iou_scores[:, :, 0]


def work(whose: str, model: nn.Module, batch: tuple, dtype: str) -> dict:
    """What is timed: kind -> function, which returns what is compared. `batch` is on the CPU."""
    device = next(model.parameters()).device.type
    image, features, boxes, target = (x.to(device) for x in batch)
    pixels, kept = batch[0], batch[1].half()  # as they are loaded
    precision = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def encode(image=image):
        with torch.no_grad(), precision:
            return getattr(model, ENCODE[whose])(image)

    kinds = {f"encoder, {dtype}": encode}
    if whose == "authors":
        return kinds
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=1e-5, fused=True)

    def decoder(Q):
        with torch.no_grad(), precision:
            return decode(model, features, boxes[:, :Q])[0]

    def step(Q, features=features):
        with precision:
            masks, iou = decode(model, features, boxes[:, :Q])
        loss, _ = sam_loss(masks.float(), iou.float(), target[:, :Q])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def epoch():
        anew = whose == "official"
        step(1, encode(pixels.to(device)) if anew else kept.to(device).float())

    for what, function in {"decoder": decoder, "step": step}.items():
        kinds |= {f"{what}, {n}, {dtype}": partial(function, Q) for n, Q in PROMPTS.items()}
    return kinds | {f"epoch, a later one, {dtype}": epoch}


def print_equal(kind: str, functions: dict) -> None:
    """AssertionError unless all outputs are alike."""
    outputs = {whose: function().float() for whose, function in functions.items()}
    expected = outputs.pop("official")
    scale = expected.abs().max().item()
    for whose, x in outputs.items():
        error = (x - expected).abs().max().item() / scale
        print(f"{kind}: {whose} equal to {error:.1e} of the largest, {scale:.2g}", flush=True)
        torch.testing.assert_close(x, expected, rtol=0, atol=TOLERANCE[kind.split()[-1]] * scale)


def print_rows(kind: str, found: dict[str, list[float]], unit: str) -> None:
    print(row(kind, found["official"], found["ours"], unit), flush=True)
    if "authors" in found:
        print(row(f"{kind}, the authors' code", found["authors"], found["ours"], unit), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=sam_decoder.VARIANTS, default="vit-base")
    parser.add_argument("--size", type=POSITIVE, help="side of the images, the variant's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=POSITIVE, help="images, 1 on the CPU, 8 on a GPU")
    parser.add_argument("--official", help="checkout of segment-anything")
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # whose, of what: a child
    args = parser.parse_args()
    args.size = args.size or sam_decoder.VARIANTS[args.variant].image_size
    args.batch_size = args.batch_size or (8 if args.device == "cuda" else 1)
    return args


def all_kinds(args) -> dict[str, dict]:
    """What is compared -> whose -> function."""
    c, kinds = replace(sam_decoder.VARIANTS[args.variant], image_size=args.size), {}
    models = {"official": official_model(c)}
    models["ours"] = our_model(models["official"])
    for model in models.values():
        model.requires_grad_(False).mask_decoder.requires_grad_(True)
    if args.official:
        models["authors"] = authors_encoder(args.official, models["ours"])
    B, S, Q = args.batch_size, c.image_size, max(PROMPTS.values())
    torch.manual_seed(1)
    image, features = torch.randn(B, 3, S, S), torch.randn(B, c.out_dim, S // 16, S // 16)
    corner, extent = S / 2 * torch.rand(2, B, Q, 2)
    boxes = torch.cat([corner, corner + extent], 2)  # (B,Q,4)
    batch = image, features, boxes, torch.rand(B, Q, S // 4, S // 4).round()
    for dtype in TOLERANCE if args.device == "cuda" else ("float32",):
        for whose, model in models.items():
            for kind, function in work(whose, model.to(args.device), batch, dtype).items():
                kinds.setdefault(kind, {})[whose] = function
    return kinds


def main() -> int:
    args = arguments()
    settle(args)
    kinds, speed = all_kinds(args), []
    if args.memory:
        whose, kind = args.memory
        print(peak_memory(kinds[kind][whose]))
        return 0
    print(f"{machine()}\n{args.variant}, {args.batch_size} x {args.size} px")
    timed = {kind: f for kind, f in kinds.items() if kind.startswith(tuple(args.parts))}
    for kind in [kind for kind in timed if not kind.startswith("epoch")]:  # of other features
        print_equal(kind, timed[kind])
    print(f"\n{HEADER}")
    for kind, functions in timed.items():
        times = in_turns(functions, args.rounds)
        print_rows(kind, times, "s")
        rates = (f"{w} {args.batch_size / statistics.median(s):.3g}" for w, s in times.items())
        speed.append(f"{kind}: {', '.join(rates)} images a second")
    for kind in [kind for kind in kinds if "memory" in args.parts and kind.startswith(MEASURED)]:
        peak = {whose: [in_fresh_process("--memory", whose, kind)] for whose in kinds[kind]}
        print_rows(f"peak memory, {kind}", peak, "MB")
    print("", *speed, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
