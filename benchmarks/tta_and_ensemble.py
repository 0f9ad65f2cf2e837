"""Compare single predictions with --tta, ensembles and both, on the test split of a data set.

    python benchmarks/tta_and_ensemble.py --data data/demo --prompt p6 \
        --weights runs/demo-seed0 runs/demo-seed1 runs/demo-seed2

The runs take images, with or without a text. "one run" and "--tta" are means over all runs, so that
no run is picked. The table has the mean Dice per image, its difference to "one run" per image, both
with 95 % bootstrap intervals (by patient, where patients are known), and the time of a prediction
as a ratio. Masks are read and prompts chosen as in the first run.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import machine, now  # noqa: E402

import data  # noqa: E402
import metrics  # noqa: E402
from engine import command_line  # noqa: E402
from engine.evaluate import each_is, to_masks, valid_pixels  # noqa: E402
from engine.runs import patients_of  # noqa: E402
from imaging import image_files, layouts  # noqa: E402
from prediction import combine, flips, members  # noqa: E402
from prediction.images import image_sample, unnamed_classes, with_thresholds  # noqa: E402
from recipes.base import BOX_OPTIONS, nothing  # noqa: E402

WAYS = ("one run", "--tta", "ensemble", "ensemble, --tta")


def parse() -> argparse.Namespace:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--weights", nargs="+", required=True, help="runs on the same classes")
    parser.add_argument("--data", required=True, help="data set with masks")
    parser.add_argument("--split", default="test", help="split to predict (default: %(default)s)")
    parser.add_argument("--prompt", help="prompt type or text (default: that of the first run)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    return parser.parse_args()


class Comparison:
    """The Dice and the seconds of every way to predict, image by image."""

    def __init__(self, args):
        weights = members.find_members(args.weights, lambda source: None)
        family = weights[0].family
        if family.takes != "images" or BOX_OPTIONS in family.options:
            raise ValueError("--weights: this benchmark is for images with a text or classes")

        loaded = members.load_members(weights, args.device, {})
        names = members.check_classes(
            loaded, [model.weights.run.get("classes") for model in loaded]
        )
        self.run = weights[0].run
        self.classes = tuple(names or unnamed_classes(loaded[0].model))
        self.members = [combine.ImageMember(model, nothing) for model in loaded]
        self.config = members.shared_config(loaded)
        self.flips = flips.image_flips(self.classes)
        self.prompt = args.prompt or self.run.get("options", {}).get("prompt")
        if not family.reads_text():
            self.prompt = ""
        self.seconds = {}  # (way, index of a run or None) -> seconds of each image

    def parts(self, models: list, views: list, entry, image: np.ndarray):
        """Yield the probabilities (K,H,W) of an image for each model and view."""
        prompt = entry.text(self.prompt) if self.prompt else ""
        for member in models:
            sample = image_sample(image, entry.image, self.classes, prompt, member.colours)
            yield from member.views(sample, views)

    def timed_dice(self, key: tuple, predict: Callable, config, truth: np.ndarray) -> float:
        """Return the mean Dice of the classes of an image, and remember the time it took."""
        start = now()
        probabilities = combine.mean(predict())  # (K,H,W)
        self.seconds.setdefault(key, []).append(now() - start)

        n = len(layouts.foreground(self.classes))
        masks = to_masks(probabilities, config)[-n:]
        truths = each_is(truth, range(1, n + 1))  # (n,H,W)
        valid = valid_pixels(truth)
        scores = []
        for mask, true_mask in zip(masks, truths, strict=True):
            scores.append(metrics.overlap(mask, true_mask, valid)["dice"])
        return float(np.nanmean(scores))

    def dice(self, entry, threshold: int) -> dict[tuple, float]:
        """Return {(way, index of a run or None): Dice} of an image."""
        image = image_files.read_image(entry.image)
        truth = data.read_truth(entry, threshold)  # (H,W)
        result = {}
        for way, views in (("", [()]), ("--tta", self.flips)):
            for i, member in enumerate(self.members):
                key = (way or "one run", i)
                predict = partial(self.parts, [member], views, entry, image)
                result[key] = self.timed_dice(key, predict, member.loaded.config, truth)
            if len(self.members) > 1:
                key = (f"ensemble, {way}" if way else "ensemble", None)
                predict = partial(self.parts, self.members, views, entry, image)
                result[key] = self.timed_dice(key, predict, self.config, truth)
        return result


def mean_of_runs(columns: dict, way: str) -> np.ndarray:
    """Return the values (n,) of a way to predict; of ways with one run, the mean of all runs."""
    return np.mean([values for key, values in columns.items() if key[0] == way], 0)


def show(score: dict, sign: str = "") -> str:
    """Return a mean with its interval."""
    low = f"{score['low']:{sign}.4f}"
    high = f"{score['high']:{sign}.4f}"
    return f"{score['mean']:{sign}.4f} [{low}, {high}]"


def table(dice: dict, seconds: dict, groups: list | None) -> str:
    """Return the table. dice, seconds: {(way, index of a run or None): values of n images}."""
    lines = ["| | Dice | difference to one run | time |", "| --- | --- | --- | --- |"]
    single = mean_of_runs(dice, "one run")  # (n,)
    single_time = mean_of_runs(seconds, "one run")[1:].sum()  # the first image warms up
    for way in WAYS:
        if way not in {key[0] for key in dice}:
            continue
        values = mean_of_runs(dice, way)
        difference = ""
        if way != "one run":
            difference = show(metrics.mean_ci(values - single, groups), "+")
        ratio = mean_of_runs(seconds, way)[1:].sum() / single_time
        lines.append(
            f"| {way} | {show(metrics.mean_ci(values, groups))} | {difference} | {ratio:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    args = parse()
    comparison = Comparison(args)
    root = Path(args.data)
    run = comparison.run
    entries = layouts.read_entries(root, args.split, patients_of(run, [args.data]))
    reading = data.MaskReading(None, run.get("masks", {}))
    truths = with_thresholds(entries, reading)
    entries = [entry for entry in entries if entry.name in truths]

    dice = {}
    for entry in entries:
        for key, value in comparison.dice(*truths[entry.name]).items():
            dice.setdefault(key, []).append(value)

    groups = [entry.group for entry in entries]
    groups = None if None in groups else groups
    print(f"\n{root}, split {args.split}: {len(entries)} images; {machine()}\n")
    print(table(dice, comparison.seconds, groups))
    milliseconds = 1000 * np.mean(mean_of_runs(comparison.seconds, "one run")[1:])
    print(f"\none prediction of one run takes {milliseconds:.0f} ms")
    for i, source in enumerate(args.weights):
        single = metrics.mean_ci(dice["one run", i], groups)
        flipped = np.subtract(dice["--tta", i], dice["one run", i])
        change = metrics.mean_ci(flipped, groups)
        print(f"{source}: {show(single)}, with --tta {show(change, '+')}")
    return 0


if __name__ == "__main__":
    command_line.command(main)
