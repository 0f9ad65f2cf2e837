"""Load the model of a run from released weights, a run folder, or a run without a validation."""

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import extract_tb

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.command_line import is_out_of_memory
from engine.lora import merge_state_dict
from engine.runs import EDITED, config_file, read_run

# The weights of a run in its folder, and in a repository of the hub that was downloaded by hand.
WEIGHT_FILES = ("best.safetensors", "model.safetensors")


def load_model(family, weights, variant, settings, overrides: dict, train_set):
    """Return the model that `family.load` makes of these arguments.

    A run that was stopped before its first validation has last.pt, but no best.safetensors. Its
    last weights are used then, and that is printed. Raises ValueError, one line, for a run folder
    without either file, or with a config.json that does not describe a model.
    """
    if not weights or not read_run(weights):
        return family.load(weights, variant, settings, overrides, train_set)

    run = Path(weights)
    if not run.is_dir() or any((run / name).exists() for name in WEIGHT_FILES):
        with model_described_by(config_file(weights)):
            return family.load(weights, variant, settings, overrides, train_set)
    if not (run / "last.pt").is_file():
        raise ValueError(
            f"{run}: this run was stopped before it saved any weights; "
            f"train.py --resume --out {run} starts it again"
        )

    # Make a temporary run folder with the last weights in place of the best ones.
    with TemporaryDirectory() as folder:
        for name in ("config.json", "vocab.txt"):
            if (run / name).is_file():
                (Path(folder) / name).symlink_to((run / name).resolve())
        save_file(last_weights(run, family), Path(folder) / "best.safetensors")
        try:
            with model_described_by(run / "config.json"):
                return family.load(folder, variant, settings, overrides, train_set)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(run))) from None


@contextmanager
def model_described_by(config: Path):
    """Raise ValueError, one line that names config.json, if the block fails because of its values.

    That is assumed if a constructor fails, and for any error that is not one of our own one-line
    messages. Missing memory and files that cannot be read keep their errors.
    """
    try:
        yield
    except Exception as error:
        functions = [frame.name for frame in extract_tb(error.__traceback__)]
        is_explained = isinstance(error, ValueError) and "__init__" not in functions
        if is_explained or isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{config}: does not describe a model ({reason:.150}); {EDITED}") from None


def last_weights(run: Path, family) -> dict[str, Tensor]:
    """Return the last saved state dict of a run's model, with --ema that of the average.

    Prints a line about it. Raises ValueError, one line, if last.pt cannot be read.
    """
    path = run / "last.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved["model"]
        kind = "weights"
        if "ema" in saved:
            kind = "averaged weights"
            state = averaged_weights(saved["ema"])
        merged = merge_state_dict(state, family.lora.get("thirds", ()))
        step = saved["step"]
    except Exception as error:  # truncated, or not a file of train.py
        if is_out_of_memory(error):
            raise
        reason = " ".join(repr(error).split())
        raise ValueError(
            f"{path}: cannot be read ({reason:.150}); resume the run or start it again"
        ) from None
    print(f"{run}: stopped before its first validation; its last {kind} are used (step {step})")
    return {name: tensor.contiguous() for name, tensor in merged.items()}


def averaged_weights(ema: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the model in that of an AveragedModel (torch.optim.swa_utils)."""
    prefix = "module."
    state = {}
    for name, tensor in ema.items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = tensor
    return state
