"""Train a small CRIS on the demo set and show whether it learned to read.

    python prepare.py demo --out data/demo
    python benchmarks/demo.py --data data/demo --out runs/demo
    python benchmarks/demo.py --seeds 0 1 2 3 4     # a training a seed, in runs/demo-seed0, ...

Every image of the demo set holds several blobs and the prompt names one of them, so that only a
model which reads the text can find it. The table scores the same weights with the full prompt, with
a shorter one, with the prompt of another blob, without a text, and with that of another image.

The exit status is 0 however much was learned. `margins` says what the demo should reach;
tests/test_demo.py checks it. A stopped demo resumes where it was; a finished one only asks again.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import machine  # noqa: E402

from engine import command_line  # noqa: E402
from engine.ranges import SEED  # noqa: E402
from train import Options, run  # noqa: E402

# name -> (heading of its column, row of its own, --prompt, split)
QUESTIONS = {
    "full": ("full prompt", "the full prompt (p6)", "p6", "test"),
    "short": ("class, shape, colour", "class, shape and colour (p3)", "p3", "test"),
    "other blob": ("another blob", "another blob of the same image", "p6", "other_blob"),
    "no text": ("no text", "no text at all (p0)", "p0", "test"),
    "other image": ("another image's", "the prompt of another image", "p6", "other_prompts"),
}


def training(data: str, out: str, seed: int) -> Options:
    """Return the options of one training: about three minutes on two CPU cores."""
    return Options(
        model="cris",
        variant="mini",
        weights="none",
        data=[data],
        out=out,
        prompt="p6,p3",  # on p6 alone it learns whichever words are enough
        views=["original", "hflip", "vflip"],  # flips suffice here and cost least
        epochs=18,
        eval_every=9,
        batch_size=16,
        lr=2e-3,
        warmup=0.15,
        clip_grad=0.3,  # it learns to read earlier, whatever the seed
        workers=0,  # two cores are busy enough
        seed=seed,
        resume=(Path(out) / "last.pt").is_file(),
    )


def ask(data: str, run_folder: str, prompt: str, split: str) -> dict:
    """Return the Dice of the trained weights, asked with one type of prompt: mean, low, high, n."""
    out = f"{run_folder}/asked/{prompt}-{split}"
    asked = Options(
        weights=run_folder,
        eval=True,
        prompt=prompt,
        test=[f"{data}:{split}"],
        out=out,
        workers=0,
        resume=Path(out).exists(),  # to write over an earlier answer
    )
    (summary,) = run(asked)["tests"].values()
    return summary["dice"]


def learn(data: str, out: str, seed: int) -> dict[str, dict]:
    """Train with one seed, then ask every question. Return the Dice of each by its name.

    The test at the end of the training is the one with the full prompt: of "p6,p3" tests take p6.
    """
    (summary,) = run(training(data, out, seed))["tests"].values()

    dice = {"full": summary["dice"]}
    for name, (_, _, prompt, split) in QUESTIONS.items():
        if name not in dice:
            dice[name] = ask(data, out, prompt, split)
    return dice


def margins(dice: dict[str, float]) -> dict[str, float]:
    """Return by how much each mean Dice is on the right side of what the demo should reach.

    The full prompt at least 0.85, the short one 0.80, another blob 0.82; no text and the prompt of
    another image at least 0.40 below the full prompt.
    """
    highest = dice["full"] - 0.40
    return {
        "full": dice["full"] - 0.85,
        "short": dice["short"] - 0.80,
        "other blob": dice["other blob"] - 0.82,
        "no text": highest - dice["no text"],
        "other image": highest - dice["other image"],
    }


def table(dice: dict[str, dict]) -> str:
    """Return the scores of one training, a row a question."""
    lines = ["| asked for | test Dice [95 %] |", "| --- | --- |"]
    for name, (_, title, _, _) in QUESTIONS.items():
        score = dice[name]
        interval = f"[{score['low']:.3f}, {score['high']:.3f}]"
        lines.append(f"| {title} | {score['mean']:.3f} {interval} |")
    return "\n".join(lines)


def table_of_seeds(results: dict[int, dict[str, float]], minutes: dict[int, float]) -> str:
    """Return the mean Dice of several trainings, a row a seed, and the least margin of all."""
    headings = [heading for heading, *_ in QUESTIONS.values()]
    lines = [f"| seed | {' | '.join(headings)} | least margin | minutes |"]
    lines.append("| --- " * (len(headings) + 3) + "|")

    all_margins = []
    for seed, dice in results.items():
        scores = " | ".join(f"{dice[name]:.3f}" for name in QUESTIONS)
        of_seed = margins(dice)
        all_margins += [(margin, name, seed) for name, margin in of_seed.items()]
        lines.append(f"| {seed} | {scores} | {min(of_seed.values()):.3f} | {minutes[seed]:.1f} |")

    margin, name, seed = min(all_margins)
    heading = QUESTIONS[name][0]
    lines.append(f"\nleast margin {margin:.3f}: {heading}, seed {seed}")
    return "\n".join(lines)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", default="data/demo", help="the demo set (%(default)s)")
    parser.add_argument("--out", default="runs/demo", help="run folder (%(default)s)")
    help = "train once with each seed, in OUT-seedN, and print one row a seed"
    parser.add_argument("--seeds", type=SEED, nargs="+", metavar="N", help=help)
    args = parser.parse_args()

    results = {}
    minutes = {}
    for seed in args.seeds or [0]:
        out = f"{args.out}-seed{seed}" if args.seeds else args.out
        start = time.time()
        dice = learn(args.data, out, seed)
        minutes[seed] = (time.time() - start) / 60
        results[seed] = {name: score["mean"] for name, score in dice.items()}

    print(f"\n{sum(minutes.values()):.1f} minutes of training and testing on {machine()}\n")
    if args.seeds:
        print(table_of_seeds(results, minutes))
    else:
        print(table(dice))
        print(f"\nlook at {args.out}/test/overlays/sheet.png and {args.out}/curves.png;")
        print(f"the other questions are in {args.out}/asked")
    return 0


if __name__ == "__main__":
    command_line.command(main)
