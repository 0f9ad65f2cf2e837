"""Swin UNETR against MONAI's SwinUNETR: same weights, equal outputs, then time and memory.

    python benchmarks/swin_unetr3d_monai.py                 # the README's table
    python benchmarks/swin_unetr3d_monai.py --only step memory --rounds 9
    python benchmarks/swin_unetr3d_monai.py --device cuda   # bfloat16 too

base with one channel and 14 classes, merging as MONAI since 1.5.0 has it, MONAI's other options
left as they are. Forward: evaluation mode, no gradients. Step: training mode, cross entropy and all
gradients, no optimiser. "checkpointed" is our model with `checkpointing = True` against the same
official.
"""

import argparse
import sys
from dataclasses import replace

import monai
import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, settle

sys.path.insert(0, str(ROOT))

import swin_unetr3d
from engine import command_line
from engine.ranges import POSITIVE

TABLE = {"forward": (96, 64), "step": (64,), "memory": (64,)}  # sides of the volume
# The largest difference of two outputs over the largest output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def our_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = replace(swin_unetr3d.VARIANTS["base"], merging="merging")
    return swin_unetr3d.SwinUNETR(config)


def official_model(ours) -> torch.nn.Module:
    from monai.networks.nets import SwinUNETR

    c = ours.config
    model = SwinUNETR(c.in_channels, c.num_classes, feature_size=c.feature_size)
    model.load_state_dict(swin_unetr3d.to_official(ours.state_dict()))
    return model


def work(model, part: str, side: int, dtype: str, device: str):
    """-> the function that is timed, which returns the logits."""
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(1, 1, side, side, side, generator=generator).to(device)
    labels = torch.randint(14, (1, side, side, side), generator=generator).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def forward():
        with torch.no_grad(), autocast:
            return model.eval()(volume)

    if part == "forward":
        return forward

    def step():
        with autocast:
            logits = model.train()(volume)
            loss = F.cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        return logits.detach()

    return step


def equal(kind: tuple, functions: dict) -> str:
    """One line on how much the outputs differ; ValueError if it is too much."""
    expected, found = functions["official"]().float(), functions["ours"]().float()
    error = ((expected - found).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[kind[2]]:
        raise ValueError(f"{kind}: outputs differ by {error:.1e} of the largest")
    return f"{' '.join(map(str, kind))}: outputs differ by {error:.1e} of the largest"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TABLE, default=list(TABLE))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # whose, side, type: a child
    args = parser.parse_args()
    settle(args)
    ours = our_model().to(args.device)
    if args.memory:
        whose, side, dtype = args.memory
        ours.checkpointing = whose == "checkpointed"
        model = official_model(ours).to(args.device) if whose == "official" else ours
        step = work(model, "step", int(side), dtype, args.device)
        print(peak_memory(step))
        return 0
    print(f"{machine()}, monai {monai.__version__}\n\n{HEADER}")
    told, models = [], {"official": official_model(ours).to(args.device), "ours": ours}
    dtypes = TOLERANCE if args.device == "cuda" else ["float32"]
    for part, side, dtype in [(p, s, d) for p in args.only for s in TABLE[p] for d in dtypes]:
        name = f"{part} {side}³ {dtype}"
        if part == "memory":
            whose = "official", "ours", "checkpointed"
            peak = [[in_fresh_process("--memory", w, str(side), dtype)] for w in whose]
            print(row(f"{name}, step", peak[0], peak[1], "MB"))
            print(row(f"{name}, step, checkpointed", peak[0], peak[2], "MB"), flush=True)
            continue
        functions = {w: work(m, part, side, dtype, args.device) for w, m in models.items()}
        told.append(equal((part, side, dtype), functions))
        times = in_turns(functions, args.rounds)
        print(row(name, times["official"], times["ours"], "s"), flush=True)
    print("", *told, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
