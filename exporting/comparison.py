"""Compare an exported network with PyTorch: the largest difference, and both speeds."""

import io
import math
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from timeit import timeit

import torch
from torch import Tensor

from exporting.parts import Part
from imaging import image_files, layouts, nifti, volumes
from prediction.images import image_sample
from prediction.inputs import entries_of
from prediction.models import LoadedModel

LIMIT = 1e-4  # largest difference, as a share of the largest absolute value of the output
HALF_LIMIT = 1e-2  # the same for weights stored in 16 bits
ROUNDS = 5  # timed passes of each; their median is printed
PROMPT = "the target"  # where neither the run nor a data set has a text


# --- the case to compare on ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Inputs for a comparison, made from an image or volume."""

    description: str
    tensors: dict[str, Tensor]  # name of an input of a network -> values, with a batch of one


def find_case(loaded: LoadedModel, parts: list[Part], file: str | None) -> Case:
    """Return the case of --image, else the first one of the run's data, else one without tensors.

    Raises OSError or ValueError, one line, if the file cannot be read.
    """
    options = loaded.weights.options
    prompt = options.get("prompt") or PROMPT
    if file is not None:
        text = PROMPT if layouts.is_prompt_type(prompt) else prompt
        return read_case(loaded, parts, [Path(file)], text)

    for data in options.get("data", ()):
        path = Path(layouts.path_and_split(data)[0])
        splits = layouts.find_splits(path)
        if splits:
            split = "test" if "test" in splits else next(iter(splits))
            entry = first_entry(path, split, loaded.weights.run)
            files = [entry.image, *entry.more_channels]
            return read_case(loaded, parts, files, entry.text(prompt))
    return Case("random numbers; --image FILE compares on an image or a volume", {})


def first_entry(path: Path, split: str, run: dict) -> layouts.Entry:
    """Return the first entry of a data set's split, as a prediction with the run takes it."""
    args = Namespace(inputs=[str(path)], split=split)
    with redirect_stdout(io.StringIO()):  # the number of cases does not matter here
        return entries_of(path, args, run)[0]


def read_case(loaded: LoadedModel, parts: list[Part], files: list[Path], prompt: str) -> Case:
    """Return the case of an image, or of a volume with the files of its channels.

    prompt: a text, ignored by models that read none.
    """
    weights = loaded.weights
    if weights.family.takes == "volumes":
        window = read_window(loaded, files, parts[0].inputs["image"].shape[2:])
        return Case(f"{files[0]}, a window in its middle", {"image": window})

    image, _ = image_files.load_image(files[0])  # (H,W,3)
    classes = tuple(weights.run.get("classes", ()))
    colours = weights.options.get("pseudocolor")
    sample = image_sample(image, files[0], classes, prompt, colours)
    item = loaded.recipe.inputs(sample, train=False, rng=None)

    tensors = {}
    for name, value in item.items():
        if isinstance(value, Tensor):
            tensors[name] = value[None]
    description = str(files[0])
    if weights.family.reads_text():
        description += f" with the prompt “{prompt}”"
    return Case(description, tensors)


def read_window(loaded: LoadedModel, files: list[Path], size: tuple[int, int, int]) -> Tensor:
    """Return the middle of a volume, preprocessed and padded to `size`: (1,C,*size)."""
    config = loaded.config
    preprocess = loaded.model.preprocess
    fill = volumes.fill_value(preprocess, config.in_channels)
    image, grid = nifti.read_volume(files, fill)  # (C,X,Y,Z)
    nifti.check_channels(files[0], len(image), config.in_channels)
    prepared, _ = volumes.prepare_image(image, grid, config.spacing, preprocess)

    window = torch.as_tensor(prepared)[None]
    for axis, side in enumerate(size, start=2):
        start = max(0, (window.shape[axis] - side) // 2)
        window = window.narrow(axis, start, min(side, window.shape[axis]))

    D, H, W = window.shape[2:]
    padded = window.new_zeros(*window.shape[:2], *size)
    padded[:, :, :D, :H, :W] = window
    return padded


# --- the comparison ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    difference: float  # the largest, as a share of the largest absolute value of the output
    batches: list[int]  # sizes of the batches that were compared
    torch_seconds: float  # median for the smallest batch
    file_seconds: float
    outputs: dict[str, Tensor]  # PyTorch's for the smallest batch

    def check(self, path: Path, limit: float) -> None:
        """Raise ValueError, one line, if the difference is above a limit."""
        if self.difference > limit:
            raise ValueError(
                f"{path}: was not written: the exported network differs from PyTorch by "
                f"{self.difference:.1e} of the largest output, more than {limit:.0e}; "
                "please report this with the versions of torch, onnx and onnxruntime"
            )

    def describe(self, runtime: str) -> str:
        """Return the difference and both speeds in one line. runtime: what runs the file."""
        sizes = " and ".join(map(str, self.batches))
        ratio = self.torch_seconds / self.file_seconds
        return (
            f"largest difference to PyTorch {self.difference:.1e} of the largest output (batches "
            f"of {sizes}); PyTorch {self.torch_seconds:.3g} s, "
            f"{runtime} {self.file_seconds:.3g} s, {ratio:.2f} times as fast"
        )


def compare(part: Part, run: Callable, tensors: dict[str, Tensor]) -> Comparison:
    """Compare an exported part with its module, on a case alone and in a batch with the examples.

    run: inputs by name -> outputs by name, of the exported file. tensors: of a Case, and outputs
    of earlier parts.
    """
    batches = make_batches(part, tensors)
    expected = [part.run(inputs) for inputs in batches]
    differences = []
    for inputs, outputs in zip(batches, expected, strict=True):
        actual = run(inputs)
        for name in part.outputs:
            differences.append(relative_difference(actual[name], outputs[name]))

    first = batches[0]
    torch_seconds, file_seconds = time_in_turns(lambda: part.run(first), lambda: run(first))
    return Comparison(
        difference=max(differences),
        batches=[len(next(iter(inputs.values()))) for inputs in batches],
        torch_seconds=torch_seconds,
        file_seconds=file_seconds,
        outputs=expected[0],
    )


def make_batches(part: Part, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return inputs of a part: the real case alone, then three together with the examples.

    Inputs without a tensor of their name and shape stay examples. A part with a fixed batch gets
    one batch.
    """
    single = {}
    several = {}
    for name, example in part.inputs.items():
        has_batch = 0 in part.dynamic.get(name, {})
        first = example[:1] if has_batch else example
        real = tensors.get(name)
        if real is not None and real.shape == first.shape:
            first = real
        single[name] = first
        several[name] = torch.cat([first, example]) if has_batch else first
    has_several = any(0 in axes for axes in part.dynamic.values())
    return [single, several] if has_several else [single]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest absolute expected value.

    Infinity if the shapes differ or if a difference is not a number.
    """
    if actual.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=1e-30)
    difference = ((actual - expected).abs().max() / scale).item()
    return float("inf") if math.isnan(difference) else difference


def time_in_turns(first: Callable, second: Callable) -> tuple[float, float]:
    """Return the median seconds of two functions that run in turns, so that load slows both."""
    first_seconds = []
    second_seconds = []
    for _ in range(ROUNDS):
        first_seconds.append(timeit(first, number=1))
        second_seconds.append(timeit(second, number=1))
    return median(first_seconds), median(second_seconds)
