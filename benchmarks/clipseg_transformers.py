"""CLIPSeg against transformers: same weights, same input, equal outputs, then time and memory.

    python benchmarks/clipseg_transformers.py                               # forward, training step
    python benchmarks/clipseg_transformers.py --data data/kvasir_polyp      # also whole epochs

Forward: evaluation mode, no gradients; transformers pads a prompt to 77 tokens and repeats the
image for every prompt, as its processor and its interface ask for. Training step: the decoder
alone, from kept features (engine/feature_cache.py) against transformers' whole model, whose towers
run without gradients too. Epoch: a later one over --images images, with loading and all, the
features being on file.
"""

import argparse
import sys
import tempfile
from types import SimpleNamespace

import torch
from common import HEADER, ROOT, in_turns, machine, memory_rows, peak_memory, row

sys.path.insert(0, str(ROOT))

import clipseg  # noqa: E402
import data  # noqa: E402
import recipes  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE, Number  # noqa: E402
from imaging import layouts  # noqa: E402
from losses import dice_bce  # noqa: E402
from recipes import cached_features  # noqa: E402
from tokenizer import CLIPTokenizer  # noqa: E402

PROMPTS = [
    "one small pink round polyp", "a polyp", "two large red oval polyps", "a brown lesion",
    "polyp which is a projecting growth of tissue", "a white tube", "an instrument",
    "normal mucosa",
    "one medium purple polyp, located in the top left", "a dark spot",
]  # fmt: skip


def our_model() -> clipseg.CLIPSeg:
    torch.manual_seed(0)
    return clipseg.CLIPSeg(clipseg.VARIANTS["rd64-refined"]).eval()


def official_model(ours: clipseg.CLIPSeg):
    """transformers' class with our weights."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    vision = {"patch_size": 16}  # the hub's; the class alone would take 32
    config = CLIPSegConfig(vision_config=vision, use_complex_transposed_convolution=True)
    model = CLIPSegForImageSegmentation(config)
    model.load_state_dict(clipseg.to_official(ours.state_dict()))
    return model.eval()


def official_logits(model, image, tokens):
    """(B,1,H,W); tokens are padded with 49407, which is attended to by nothing that counts."""
    end = tokens.argmax(1, keepdim=True)
    mask = torch.arange(tokens.shape[1])[None] <= end
    logits = model(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits
    return logits.view(len(image), 1, *image.shape[2:])


def training_step(model, logits, batch: dict):
    decoder = model.decoder.parameters()
    optimizer = torch.optim.AdamW(decoder, lr=1e-4, fused=True)

    def step(batch=batch):
        loss, _ = dice_bce(logits(batch), batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def without_gradients(function):
    def step():
        with torch.no_grad():
            return function()

    return step


def steps(models: dict, batch: dict) -> dict[str, dict]:
    """What is compared -> whose -> function."""
    ours, official = models.get("ours"), models.get("official")
    tokens = CLIPTokenizer(77, 49407)(PROMPTS)  # (10,77)
    image, one = batch["image"][:1], tokens[:1]
    kinds = {"forward, an image, a prompt": {}, "forward, an image, ten prompts": {}, "step": {}}
    first, ten, step = kinds.values()
    if ours is not None:
        first["ours"] = without_gradients(lambda: ours(image, one))
        ten["ours"] = without_gradients(lambda: ours(image, tokens))
        with torch.no_grad():
            kept = {"features": ours.encode_image(batch["image"]).half()}
            kept |= {"condition": ours.encode_text(batch["tokens"]).half(), "mask": batch["mask"]}

        def decode(b):
            return ours.decode(b["features"].float(), condition=b["condition"].float())

        step["ours"] = training_step(ours, decode, kept)
    if official is not None:
        repeated = image.expand(10, -1, -1, -1)
        first["official"] = without_gradients(lambda: official_logits(official, image, one))
        ten["official"] = without_gradients(lambda: official_logits(official, repeated, tokens))

        def whole(b):
            return official_logits(official, b["image"], b["tokens"])

        step["official"] = training_step(official, whole, batch)
    return kinds


def epochs(models: dict, kinds: dict, args) -> dict:
    """Whose -> a pass over the data set, with loading."""
    options = SimpleNamespace(
        prompt="p6",
        train="decoder",
        cache=tempfile.mkdtemp(),
        workers=args.workers,
        views=["original"],
        feature_dtype="float16",  # fmt: skip
    )
    entries = layouts.read_entries(args.data, "train")[: args.images]
    dataset = data.open_dataset(entries, options.cache)
    settings = recipes.CLIPSEG["origin"]
    plain = recipes.clipseg_recipe(models["ours"], settings)
    towers = recipes.clipseg_towers
    kept = cached_features.cache_features(plain, models["ours"], towers, [dataset], options)
    functions = {}
    for name, recipe in (("official", plain), ("ours", kept)):
        step = kinds["step"][name]
        items = data.Items(dataset, "p6", recipe.inputs, train=True, seed=0)
        order = data.train_batches(len(dataset), args.batch_size, 1000, 0, 0)
        batches = iter(data.make_loader(items, order, args.workers, torch.device("cpu")))

        def epoch(batches=batches, step=step):
            for _ in range(data.batches_per_epoch(len(dataset), args.batch_size)):
                step(next(batches))

        functions[name] = epoch
    return functions


def example(args) -> dict:
    B = args.batch_size
    torch.manual_seed(1)
    tokens = CLIPTokenizer(77, 49407)([PROMPTS[i % len(PROMPTS)] for i in range(B)])  # (B,77)
    mask = (torch.rand(B, 1, 352, 352) > 0.5).float()
    return {"image": torch.randn(B, 3, 352, 352), "tokens": tokens, "mask": mask}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=POSITIVE, default=8)
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument("--data", help="a prompted data set, for whole epochs")
    parser.add_argument("--images", type=POSITIVE, default=64, help="of it")
    parser.add_argument("--workers", type=Number(True, 0), default=2)
    parser.add_argument(
        "--memory", nargs=2, help=argparse.SUPPRESS
    )  # whose, of what: a child of ours
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {"ours": our_model()}
    models["official"] = official_model(models["ours"])
    if args.memory:
        whose, kind = args.memory
        print(peak_memory(steps({whose: models[whose]}, example(args))[kind][whose]))
        return 0
    kinds = steps(models, example(args))
    print(
        f"{machine()}\nrd64-refined, images of 352 px, float32; steps with {args.batch_size} images"
    )
    for kind in list(kinds)[:2]:
        a, b = (kinds[kind][name]() for name in ("official", "ours"))
        difference = (a - b).abs().max()
        print(
            f"largest difference of two logits, {kind}: {difference:.1e} (deviation {a.std():.1e})"
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    print(f"\n{HEADER}")
    for kind, step in kinds.items():
        times = in_turns(step, args.rounds)
        print(row(kind, times["official"], times["ours"], "s"), flush=True)
    if args.data:
        times = in_turns(epochs(models, kinds, args), 1)
        print(
            row(f"epoch of {args.images} images", times["official"], times["ours"], "s"), flush=True
        )
    memory_rows(kinds)
    return 0


if __name__ == "__main__":
    command_line.command(main)
