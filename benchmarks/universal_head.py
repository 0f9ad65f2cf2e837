"""The Universal Model's head against the official way: same numbers, equal logits, time and memory.

    python benchmarks/universal_head.py                  # the README's table
    python benchmarks/universal_head.py --device cuda

The last map's 8 channels at 96x96x96 and the 153 numbers of each of 32 classes become logits, in
float32, without gradients and with all of them. The official way, github.com/ljwztc/
CLIP-Driven-Universal-Model at 43c1239, repeats the map for each class and convolves in groups; it
makes all 32 classes, ours those that are asked for.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, settle

sys.path.insert(0, str(ROOT))

import universal
from engine import command_line
from engine.ranges import POSITIVE

CLASSES = 32
# The largest difference over the largest logit or gradient. To float64, the gradients of grouped
# convolutions on two threads are off by 4e-5, ours by 2e-7.
TOLERANCE = {"forward": 1e-5, "step": 1e-4}
TABLE = [(part, k) for part in ("forward", "step") for k in (CLASSES, 3)]


def official(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """x (1,8,D,H,W), numbers (1,K,153) -> (1,K,D,H,W)."""
    K, parts = numbers.shape[1], numbers[0].split(universal.LAYERS, 1)
    x = x.repeat(1, K, 1, 1, 1)  # (1,K*8,D,H,W)
    for i, (weight, bias) in enumerate(zip(parts[:3], parts[3:], strict=True)):
        x = x.relu() if i else x
        x = F.conv3d(x, weight.reshape(-1, 8, 1, 1, 1), bias.reshape(-1), groups=K)
    return x


def work(whose: str, part: str, k: int, side: int, device: str):
    """-> the function that is timed, which returns the logits of the first k classes or, of a step,
    the gradients of map and numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, side, side, side, generator=generator).to(device)
    numbers = torch.randn(1, CLASSES, 153, generator=generator).to(device)
    inputs = x.requires_grad_(part == "step"), numbers.requires_grad_(part == "step")

    def run():
        if whose == "official":
            logits = official(x, numbers)[:, :k]
        else:
            logits = universal.dynamic_head(x, numbers[:, :k])
        if part == "forward":
            return [logits]
        return torch.autograd.grad(logits.square().mean(), inputs)

    return run


def equal(kind: tuple, functions: dict) -> str:
    """One line on how much the results differ; ValueError if it is too much."""
    pairs = zip(*(function() for function in functions.values()), strict=True)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    told = f"{kind[0]}, {kind[1]} classes: results differ by {error:.1e} of the largest"
    if not error <= TOLERANCE[kind[0]]:
        raise ValueError(told)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--side", type=POSITIVE, default=96)
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # whose, part, k: a child
    args = parser.parse_args()
    settle(args)
    if args.memory:
        whose, part, k = args.memory
        print(peak_memory(work(whose, part, int(k), args.side, args.device)))
        return 0
    print(f"{machine()}\n\n{HEADER}")
    told = []
    for kind in TABLE:
        both = ("official", "ours")
        functions = {whose: work(whose, *kind, args.side, args.device) for whose in both}
        told.append(equal(kind, functions))
        times = in_turns(functions, args.rounds)
        part, k = kind
        name = f"{part} {args.side}³, {k} of {CLASSES} classes"
        print(row(name, times["official"], times["ours"], "s"), flush=True)
        peak = {whose: [in_fresh_process("--memory", whose, part, str(k))] for whose in both}
        print(row(f"{name}, memory", peak["official"], peak["ours"], "MB"), flush=True)
    print("", *told, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
