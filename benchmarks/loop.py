"""What the training loop costs on top of the bare model: decoding, augmentation, transfer, logging.

    python benchmarks/loop.py --data data/kvasir_polyp --batch-size 4 --steps 5 --rounds 5

Bare: forward, loss, backward, clipping and optimiser on one batch that is already there. Loop: the
same steps as train.py takes them. Both alternate in one process; medians are compared. Then
validation of 100 images against the bare forward passes on their ready inputs.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import in_turns, machine, now  # noqa: E402

import data  # noqa: E402
from engine import command_line  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402
from engine.runs import pick_device  # noqa: E402
from imaging import layouts  # noqa: E402
from recipes import FAMILIES  # noqa: E402
from train import Options, Run, resolve  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cris")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=POSITIVE)
    parser.add_argument("--batch-size", type=POSITIVE, default=4)
    parser.add_argument("--steps", type=POSITIVE, default=5, help="steps a round")
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--images", type=POSITIVE, default=100, help="images validated")
    args = parser.parse_args()
    options = Options(
        model=args.model,
        data=[args.data],
        weights="none",
        size=args.size,
        batch_size=args.batch_size,
    )
    settings = resolve(replace(options, out=tempfile.mkdtemp(), workers=2))
    family, device = FAMILIES[args.model], pick_device("auto")
    lists = dict(zip(("train", "val"), layouts.train_and_val([args.data], seed=0), strict=True))
    train_set, val_set = data.open_datasets(lists).values()
    config = settings.config | ({"image_size": args.size} if args.size else {})
    model = family.load("none", None, settings, config, train_set).to(device)
    recipe = family.recipe(model, settings)
    run = Run(settings, model, recipe, train_set, val_set)
    items = data.Items(train_set, settings.prompt, recipe.inputs, train=True, seed=0)
    order = data.train_batches(len(train_set), settings.batch_size, 1000, 0, 0)
    batches = iter(data.make_loader(items, order, settings.workers, device))
    batch = {key: value.to(device) for key, value in next(batches).items()}
    run.train_mode()

    def bare():
        run.batch, run.sums = 0, {}
        for _ in range(args.steps):
            run.optimizer_step(iter([batch]))

    def loop():
        run.batch, run.sums = 0, {}
        for _ in range(args.steps):
            run.optimizer_step(batches)
            run.mean_loss()

    seconds = in_turns({"bare": bare, "loop": loop}, args.rounds)
    bare_step, loop_step = (
        statistics.median(seconds[name]) / args.steps for name in ("bare", "loop")
    )
    print(f"{machine()}, batch {settings.batch_size} at {model.config.image_size} px")
    print("\n| | bare | in the loop | ratio |\n| --- | --- | --- | --- |")
    images = settings.batch_size / loop_step
    ratio = loop_step / bare_step
    step = f"{bare_step:.3f} s | {loop_step:.3f} s ({images:.2f} images/s)"
    print(f"| training step | {step} | {ratio:.3f} |")

    part = val_set.subset(list(range(min(args.images, len(val_set)))))
    items = data.Items(part, settings.prompt, recipe.inputs, train=False, seed=0)
    ready = [items[0, i] for i in range(len(part))]
    model.eval()
    begun = now()
    with torch.no_grad():
        for item in ready:
            recipe.forward(model, {k: item[k][None].to(device) for k in ("image", "tokens")})
    middle = now()
    evaluate(model, recipe, part, settings, False, "validate")
    ended = now()
    bare_image = (middle - begun) / len(part)
    loop_image = (ended - middle) / len(part)
    ratio = loop_image / bare_image
    print(f"| validation, an image | {bare_image:.3f} s | {loop_image:.3f} s | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    command_line.command(main)
