"""Measure what the training loop costs in addition to the bare model.

    python benchmarks/loop.py --data data/kvasir_polyp --batch-size 4 --steps 5 --rounds 5

Bare: forward, loss, backward, clipping and optimiser, always with the same batch in memory. Loop:
the same steps as in train.py, with decoding, augmentation, transfer and logging. Both alternate in
one process; medians are compared. Then the validation of 100 images is compared with bare forward
passes of inputs in memory.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace

import torch
from common import ROOT, in_turns, machine, now

sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from engine import command_line  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402
from engine.runs import pick_device  # noqa: E402
from imaging import layouts  # noqa: E402
from recipes import FAMILIES  # noqa: E402
from train import Options, Run, resolve  # noqa: E402


def parse() -> argparse.Namespace:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    help = "model to train, as for train.py (default: %(default)s)"
    add("--model", default="cris", metavar="NAME", help=help)
    help = "folder of a data set of images with prompts"
    add("--data", required=True, metavar="DIR", help=help)
    help = "height and width of the network's input (default: that of the model)"
    add("--size", type=POSITIVE, metavar="PX", help=help)
    help = "images in a training batch (default: %(default)s)"
    add("--batch-size", type=POSITIVE, default=4, metavar="N", help=help)
    help = "training steps in a round (default: %(default)s)"
    add("--steps", type=POSITIVE, default=5, metavar="N", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "images to validate (default: %(default)s)"
    add("--images", type=POSITIVE, default=100, metavar="N", help=help)
    return parser.parse_args()


def start_run(args) -> Run:
    """Return a run of train.py with an untrained model, ready for its first step."""
    options = Options(
        model=args.model,
        data=[args.data],
        weights="none",
        size=args.size,
        batch_size=args.batch_size,
    )
    settings = resolve(replace(options, out=tempfile.mkdtemp(), workers=2))
    train_entries, val_entries = layouts.train_and_val([args.data], seed=0)
    datasets = data.open_datasets({"train": train_entries, "val": val_entries})

    config = dict(settings.config)
    if args.size:
        config["image_size"] = args.size
    family = FAMILIES[args.model]
    model = family.load("none", None, settings, config, datasets["train"])
    model = model.to(pick_device("auto"))
    recipe = family.recipe(model, settings)
    return Run(settings, model, recipe, datasets["train"], datasets["val"])


def time_training(run: Run, args) -> None:
    """Print the time of a training step, bare and in the loop."""
    settings = run.settings
    train_set = run.train_set
    items = data.Items(train_set, settings.prompt, run.recipe.inputs, train=True, seed=0)
    order = data.train_batches(len(train_set), settings.batch_size, 1000, 0, 0)
    batches = iter(data.make_loader(items, order, settings.workers, run.device))
    batch = {key: value.to(run.device) for key, value in next(batches).items()}
    run.train_mode()

    def bare():
        run.batch = 0
        run.sums = {}
        for _ in range(args.steps):
            run.optimizer_step(iter([batch]))

    def loop():
        run.batch = 0
        run.sums = {}
        for _ in range(args.steps):
            run.optimizer_step(batches)
            run.mean_loss()

    seconds = in_turns({"bare": bare, "loop": loop}, args.rounds)
    bare_step = statistics.median(seconds["bare"]) / args.steps
    loop_step = statistics.median(seconds["loop"]) / args.steps
    print(f"{machine()}, batch {settings.batch_size} at {run.model.config.image_size} px")
    print("\n| | bare | in the loop | ratio |\n| --- | --- | --- | --- |")
    speed = settings.batch_size / loop_step
    cells = f"{bare_step:.3f} s | {loop_step:.3f} s ({speed:.2f} images/s)"
    print(f"| training step | {cells} | {loop_step / bare_step:.3f} |")


def time_validation(run: Run, args) -> None:
    """Print the time of one image in bare forward passes and in a validation."""
    count = min(args.images, len(run.val_set))
    part = run.val_set.subset(list(range(count)))
    items = data.Items(part, run.settings.prompt, run.recipe.inputs, train=False, seed=0)
    inputs = [items[0, i] for i in range(count)]
    run.model.eval()

    start = now()
    with torch.no_grad():
        for item in inputs:
            batch = {key: item[key][None].to(run.device) for key in ("image", "tokens")}
            run.recipe.forward(run.model, batch)
    middle = now()
    evaluate(run.model, run.recipe, part, run.settings, False, "validate")
    end = now()

    bare_image = (middle - start) / count
    loop_image = (end - middle) / count
    ratio = loop_image / bare_image
    print(f"| validation, one image | {bare_image:.3f} s | {loop_image:.3f} s | {ratio:.3f} |")


def main() -> int:
    args = parse()
    run = start_run(args)
    time_training(run, args)
    time_validation(run, args)
    return 0


if __name__ == "__main__":
    command_line.command(main)
