"""Swin UNETR against MONAI's SwinUNETR: same weights, equal outputs, then time and memory.

    python benchmarks/swin_unetr3d_monai.py                 # the table in docs/benchmarks.md
    python benchmarks/swin_unetr3d_monai.py --only step memory --rounds 9
    python benchmarks/swin_unetr3d_monai.py --device cuda   # also in bfloat16

The variant base with one channel and 14 classes. Patches are merged as in MONAI since 1.5.0; its
other options have their defaults. Forward: evaluation mode, no gradients. Step: training mode,
cross entropy and all gradients, no optimiser. In the row "checkpointed" our model has
`checkpointing = True`, MONAI's has not.
"""

import argparse
import sys
from dataclasses import replace

import monai
import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_fresh_process, in_turns, machine, peak_memory, row, set_up_torch

sys.path.insert(0, str(ROOT))

import swin_unetr3d
from engine import command_line
from engine.ranges import POSITIVE

TABLE = {"forward": (96, 64), "step": (64,), "memory": (64,)}  # side of the volume in voxels
# The largest difference that is accepted, as a share of the largest output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def our_model() -> torch.nn.Module:
    """Return an untrained model."""
    torch.manual_seed(0)
    config = replace(swin_unetr3d.VARIANTS["base"], merging="merging")
    return swin_unetr3d.SwinUNETR(config)


def official_model(ours) -> torch.nn.Module:
    """Return MONAI's model with our weights."""
    from monai.networks.nets import SwinUNETR

    c = ours.config
    model = SwinUNETR(c.in_channels, c.num_classes, feature_size=c.feature_size)
    model.load_state_dict(swin_unetr3d.to_official(ours.state_dict()))
    return model


def build_step(model, part: str, side: int, dtype: str, device: str):
    """Return the function to time, which returns the logits."""
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(1, 1, side, side, side, generator=generator).to(device)
    labels = torch.randint(14, (1, side, side, side), generator=generator).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def forward():
        with torch.no_grad(), autocast:
            return model.eval()(volume)

    def step():
        with autocast:
            logits = model.train()(volume)
            loss = F.cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        return logits.detach()

    return forward if part == "forward" else step


def compare(name: str, functions: dict, tolerance: float) -> str:
    """Return how much the outputs differ, in one line. Raise ValueError if it is too much."""
    expected = functions["official"]().float()
    actual = functions["ours"]().float()
    error = ((expected - actual).abs().max() / expected.abs().max()).item()
    message = f"{name}: outputs differ by {error:.1e} of the largest value"
    if not error <= tolerance:  # so that NaN is refused, too
        raise ValueError(message)
    return message


def print_memory(name: str, side: int, dtype: str) -> None:
    """Print the peak memory of a training step, with our model as it is and checkpointed."""
    peaks = {}
    for implementation in ("official", "ours", "checkpointed"):
        peak = in_fresh_process("--memory", implementation, str(side), dtype)
        peaks[implementation] = [peak]
    print(row(f"{name}, step", peaks["official"], peaks["ours"], "MB"))
    checkpointed = row(
        f"{name}, step, checkpointed", peaks["official"], peaks["checkpointed"], "MB"
    )
    print(checkpointed, flush=True)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "parts to measure (default: forward step memory)"
    add("--only", nargs="+", choices=TABLE, default=list(TABLE), help=help)
    help = "device to run on (default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    # For child processes: implementation, side, precision.
    add("--memory", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    set_up_torch(args)
    ours = our_model().to(args.device)
    if args.memory:
        implementation, side, dtype = args.memory
        ours.checkpointing = implementation == "checkpointed"
        model = official_model(ours).to(args.device) if implementation == "official" else ours
        print(peak_memory(build_step(model, "step", int(side), dtype, args.device)))
        return 0

    print(f"{machine()}, monai {monai.__version__}\n\n{HEADER}")
    models = {"official": official_model(ours).to(args.device), "ours": ours}
    dtypes = TOLERANCE if args.device == "cuda" else ["float32"]
    kinds = [(part, side, dtype) for part in args.only for side in TABLE[part] for dtype in dtypes]
    comparisons = []
    for part, side, dtype in kinds:
        name = f"{part} {side}³ {dtype}"
        if part == "memory":
            print_memory(name, side, dtype)
            continue
        functions = {}
        for implementation, model in models.items():
            functions[implementation] = build_step(model, part, side, dtype, args.device)
        comparisons.append(compare(name, functions, TOLERANCE[dtype]))
        times = in_turns(functions, args.rounds)
        print(row(name, times["official"], times["ours"], "s"), flush=True)
    print("", *comparisons, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.command(main)
