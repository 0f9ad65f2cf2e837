"""Universal Model's head against the official way: equal logits, then time and memory.

    python benchmarks/universal_head.py                  # the table in docs/benchmarks.md
    python benchmarks/universal_head.py --device cuda

The head turns a feature map with 8 channels at 96x96x96, and 153 numbers for each of 32 classes,
into logits. Forward: float32, without gradients. Step: with the gradients of map and numbers.

The official code (github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239) repeats the map for
each class and uses grouped convolutions. It always computes all 32 classes, ours only those that
are needed.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, set_up_torch

sys.path.insert(0, str(ROOT))

import universal
from engine import command_line
from engine.ranges import POSITIVE

CLASSES = 32
# The largest difference that is accepted, as a share of the largest logit or gradient. Compared
# with float64, gradients of grouped convolutions on two threads are off by 4e-5, ours by 2e-7.
TOLERANCE = {"forward": 1e-5, "step": 1e-4}
TABLE = [("forward", CLASSES), ("forward", 3), ("step", CLASSES), ("step", 3)]


def official_head(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return logits (1,K,D,H,W) from a map x (1,8,D,H,W) and numbers (1,K,153)."""
    K = numbers.shape[1]
    parts = numbers[0].split(universal.LAYERS, 1)
    weights = parts[:3]
    biases = parts[3:]

    x = x.repeat(1, K, 1, 1, 1)  # (1,K*8,D,H,W)
    for i in range(3):
        if i > 0:
            x = x.relu()
        weight = weights[i].reshape(-1, 8, 1, 1, 1)  # (K*8,8,1,1,1), in the last layer (K,8,1,1,1)
        x = F.conv3d(x, weight, biases[i].reshape(-1), groups=K)  # (1,K*8,D,H,W), then (1,K,D,H,W)
    return x


def build_step(implementation: str, kind: tuple, side: int, device: str):
    """Return the function to time.

    kind: ("forward", k) for a function that returns [logits] of the first k classes, ("step", k)
    for one that returns the gradients of map and numbers.
    """
    part, k = kind
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, side, side, side, generator=generator).to(device)
    numbers = torch.randn(1, CLASSES, 153, generator=generator).to(device)
    x.requires_grad_(part == "step")
    numbers.requires_grad_(part == "step")

    def run():
        if implementation == "official":
            logits = official_head(x, numbers)[:, :k]
        else:
            logits = universal.dynamic_head(x, numbers[:, :k])
        if part == "forward":
            return [logits]
        return torch.autograd.grad(logits.square().mean(), (x, numbers))

    return run


def compare(kind: tuple, functions: dict) -> str:
    """Return how much the results differ, in one line. Raise ValueError if it is too much."""
    error = 0.0
    for a, b in zip(functions["official"](), functions["ours"](), strict=True):
        difference = (a - b).abs().max() / a.abs().max()
        error = max(error, difference.item())

    part, k = kind
    message = f"{part}, {k} classes: results differ by {error:.1e} of the largest value"
    if not error <= TOLERANCE[part]:  # so that NaN is refused, too
        raise ValueError(message)
    return message


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "device to run on (default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=help)
    help = "depth, height and width of the feature map (default: %(default)s)"
    add("--side", type=POSITIVE, default=96, metavar="N", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    # For child processes: implementation, part, number of classes.
    add("--memory", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    set_up_torch(args)
    if args.memory:
        implementation, part, k = args.memory
        kind = (part, int(k))
        print(peak_memory(build_step(implementation, kind, args.side, args.device)))
        return 0

    print(f"{machine()}\n\n{HEADER}")
    comparisons = []
    for kind in TABLE:
        functions = {}
        for implementation in ("official", "ours"):
            functions[implementation] = build_step(implementation, kind, args.side, args.device)
        comparisons.append(compare(kind, functions))

        part, k = kind
        name = f"{part} {args.side}³, {k} of {CLASSES} classes"
        times = in_turns(functions, args.rounds)
        print(row(name, times["official"], times["ours"], "s"), flush=True)

        official = in_fresh_process("--memory", "official", part, str(k))
        ours = in_fresh_process("--memory", "ours", part, str(k))
        print(row(f"{name}, memory", [official], [ours], "MB"), flush=True)
    print("", *comparisons, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
