"""Trains a small CRIS on the demo set and asks whether it learned to read.

    python prepare.py demo --out data/demo && python benchmarks/demo.py --data data/demo --out runs/demo

Every image of the demo set holds several blobs and the prompt names one of them, so that only a model
which reads the text can find it. The table scores the same weights with the full prompt, with a
shorter one, without a text, with the text of another image, and asked for another blob.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402
from train import Options, run  # noqa: E402

# (what is asked, --prompt, split, least Dice or greatest share of the full prompt's Dice less 0.40)
QUESTIONS = [
    ("the full prompt (p6)", "p6", "test", 0.88),
    ("class, shape and colour (p3)", "p3", "test", 0.80),
    ("another blob of the same image", "p6", "other_blob", 0.85),
    ("no text at all (p0)", "p0", "test", None),
    ("the prompt of another image", "p6", "other_prompts", None),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--out", default="runs/demo")
    args = parser.parse_args()
    begun = time.time()
    training = Options(
        model="cris",
        variant="mini",
        weights="none",
        data=[args.data],
        out=args.out,
        prompt="p6,p3",  # on p6 alone it learns whichever words are enough
        epochs=13,
        batch_size=16,
        lr=2e-3,
        warmup=0.15,
        workers=0,  # two cores are busy enough
    )
    run(training)
    minutes = (time.time() - begun) / 60
    rows, full = [], None
    for title, prompt, split, least in QUESTIONS:
        name = f"{prompt}-{split}"
        asked = Options(
            weights=args.out,
            eval=True,
            prompt=prompt,
            test=[f"{args.data}:{split}"],
            out=f"{args.out}/asked/{name}",
        )
        (summary,) = run(asked)["tests"].values()
        dice = summary["dice"]
        full = full or dice["mean"]
        limit = f">= {least:.2f}" if least else f"<= {full - 0.40:.2f}"
        good = dice["mean"] >= least if least else dice["mean"] <= full - 0.40
        interval = f"[{dice['low']:.3f}, {dice['high']:.3f}]"
        rows.append(
            f"| {title} | {dice['mean']:.3f} {interval} | {limit} | {'yes' if good else 'NO'} |"
        )
    print(
        f"\n{minutes:.1f} minutes of training and testing on {platform.processor() or platform.machine()}"
    )
    print("\n| asked for | test Dice [95 %] | wanted | met |\n| --- | --- | --- | --- |")
    print("\n".join(rows))
    print(f"\nlook at {args.out}/asked/*/test/overlays/sheet.png and {args.out}/curves.png")
    return int(any(row.endswith("NO |") for row in rows))


if __name__ == "__main__":
    report.command(main)
