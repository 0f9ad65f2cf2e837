"""Load a model for a run: released weights, a run folder, or one that never validated."""

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import extract_tb

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.command_line import is_out_of_memory
from engine.lora import merge_state_dict
from engine.runs import EDITED, read_run


def load_model(family, weights, variant, settings, overrides: dict, train_set):
    """Return `family.load` of these arguments; the last weights of a run that never validated.

    Such a run folder has last.pt, but no best.safetensors yet. That they are used is printed.
    Raises ValueError, one line, for a run folder without either, or with a config.json that does
    not describe a model.
    """
    if not weights or not read_run(weights):
        return family.load(weights, variant, settings, overrides, train_set)
    run = Path(weights)
    if not run.is_dir() or (run / "best.safetensors").exists():
        folder = run if run.is_dir() else run.parent
        with model_described_by(folder / "config.json"):
            return family.load(weights, variant, settings, overrides, train_set)
    if not (run / "last.pt").is_file():
        hint = f"train.py --resume --out {run} starts it again"
        raise ValueError(f"{run}: this run was stopped before it saved any weights; {hint}")

    with TemporaryDirectory() as folder:  # a run folder with the last weights as its best
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
    """Raise ValueError, one line that names the config.json of a run, if it describes no model.

    It does not if a constructor fails, or anything in a way that our own lines do not explain. A
    lack of memory and files that cannot be read stay what they are.
    """
    try:
        yield
    except Exception as error:
        steps = [step.name for step in extract_tb(error.__traceback__)]
        is_explained = isinstance(error, ValueError) and "__init__" not in steps
        if is_explained or isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{config}: does not describe a model ({reason:.150}); {EDITED}") from None


def last_weights(run: Path, family) -> dict[str, Tensor]:
    """Return the state dict of a run's model as it was saved last, with --ema the average.

    What it is, is printed. Raises ValueError, one line, if last.pt cannot be read.
    """
    path = run / "last.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved["model"]
        kind = "weights"
        if "ema" in saved:  # of torch.optim.swa_utils.AveragedModel
            kind = "averaged weights"
            names = [name for name in saved["ema"] if name.startswith("module.")]
            state = {name.removeprefix("module."): saved["ema"][name] for name in names}
        merged = merge_state_dict(state, family.lora.get("thirds", ()))
        step = saved["step"]
    except Exception as error:  # cut off, or something else
        reason = " ".join(repr(error).split())
        hint = "resume the run or start it again"
        raise ValueError(f"{path}: cannot be read ({reason:.150}); {hint}") from None
    print(f"{run}: stopped before its first validation; its last {kind} are used (step {step})")
    return {name: tensor.contiguous() for name, tensor in merged.items()}
