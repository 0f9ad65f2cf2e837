"""Our models in ONNX Runtime against PyTorch: same weights, equal outputs, then time.

    python benchmarks/onnx_runtime.py                         # the table in docs/benchmarks.md
    python benchmarks/onnx_runtime.py --model clipseg --variant rd64-refined --rounds 9

One image, for CLIPSeg and CRIS with one prompt, forward pass, float32. Weights are random. The ONNX
files are those of export.py; CLIPSeg's three run one after the other. PyTorch cuts a prompt to its
length, the files take it with its padding.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, in_turns, machine, row

sys.path.insert(0, str(ROOT))

from engine import command_line
from engine.ranges import POSITIVE
from exporting import onnx_files, output_files
from exporting.comparison import relative_difference
from exporting.networks import parts_of
from prediction.models import LoadedModel, Weights
from recipes import FAMILIES


@dataclass(frozen=True)
class Case:
    """One row of the table; images have the model's own size."""

    model: str
    variant: str


TABLE = [
    Case("segformer", "b0"),
    Case("segformer", "b2"),
    Case("upernet", "convnext-tiny"),
    Case("clipseg", "rd64-refined"),
    Case("cris", "rn50"),
]
CLASSES = {"segformer": "SegFormer", "upernet": "UPerNet", "clipseg": "CLIPSeg", "cris": "CRIS"}


def random_model(case: Case) -> LoadedModel:
    """Return a model with random weights, as predictions use it."""
    torch.manual_seed(0)
    file = importlib.import_module(case.model)
    model = getattr(file, CLASSES[case.model])(file.VARIANTS[case.variant])
    model = model.eval().requires_grad_(False)
    family = FAMILIES[case.model]
    recipe = family.recipe(model, family.protocols["default"])
    return LoadedModel(Weights("random", case.model, {}), model, recipe)


def build_steps(loaded: LoadedModel, folder: Path) -> dict[str, Callable]:
    """Export a model to a folder. Return {what runs it: function that returns its logits}."""
    side = loaded.config.image_size
    inputs = {"image": torch.randn(1, 3, side, side)}
    if loaded.recipe.tokenizer:
        inputs["tokens"] = loaded.recipe.tokenizer("one small round pink polyp")

    runs = []
    for part in parts_of(loaded):
        path = folder / f"{part.name}.onnx"
        onnx_files.save(part, path, {}, half=False)
        runs.append((part, onnx_files.load(path, part)))

    @torch.no_grad()
    def run_pytorch():
        return loaded.model(*inputs.values())

    def run_files():
        tensors = dict(inputs)
        for part, run in runs:
            tensors |= run({name: tensors[name] for name in part.inputs})
        return tensors["logits"]

    return {"PyTorch": run_pytorch, "ONNX Runtime": run_files}


def parse() -> argparse.Namespace:
    """Return the command line. Raise ValueError if --model lacks --variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "model to measure (default: the whole table in docs/benchmarks.md)"
    add("--model", choices=CLASSES, help=help)
    help = "variant of --model, a key of VARIANTS in its file"
    add("--variant", metavar="NAME", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=7, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)

    args = parser.parse_args()
    if args.model and not args.variant:
        raise ValueError("--model needs --variant")
    return args


def main() -> int:
    args = parse()
    output_files.check_packages("onnx", onnx_files.PACKAGES)
    import onnxruntime

    torch.set_num_threads(args.threads)
    cases = [Case(args.model, args.variant)] if args.model else TABLE

    print(f"{machine()}, ONNX Runtime {onnxruntime.__version__}\nfloat32\n")
    print("| | PyTorch | ONNX Runtime | ratio |\n| --- | --- | --- | --- |")
    comparisons = []
    for case in cases:
        loaded = random_model(case)
        name = f"{CLASSES[case.model]} {case.variant}, {loaded.config.image_size} px"
        with tempfile.TemporaryDirectory() as folder:
            steps = build_steps(loaded, Path(folder))
            difference = relative_difference(steps["ONNX Runtime"](), steps["PyTorch"]())
            comparisons.append(f"{name}: outputs differ by {difference:.1e} of the largest logit")
            times = in_turns(steps, args.rounds)
        print(row(name, times["PyTorch"], times["ONNX Runtime"], "s"), flush=True)
    print("\n" + "\n".join(comparisons))
    return 0


if __name__ == "__main__":
    command_line.command(main)
