"""Fine-tune, test and resume every model of this repository on folders of images or volumes.

    python train.py --model cris --data data/kvasir_polyp                # fine-tune, then test
    python train.py --resume --out runs/cris-kvasir_polyp                # continue after a stop
    python train.py --resume --out runs/cris-kvasir_polyp --epochs 100   # train for more epochs
    python train.py --weights runs/cris-kvasir_polyp --eval --test data/cvc300_polyp

Defaults are in brackets: [recipe] is set by --recipe (see recipes/), [weights] by the weights.
The run folder gets config.json, metrics.csv, curves.png, log.txt, last.pt (for --resume),
best.safetensors (for predict.py and from_pretrained) and test/ with scores and overlays.
docs/training.md explains everything.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
from engine import command_line, evaluate, runs, tables
from engine.lora import merge_lora, merged_state_dict, save_adapter, tensor_fault
from imaging import atomic_files, nifti, pictures
from options import Options, as_options, check_same, checked, flag, parse, resolve
from recipes import FAMILIES, second_file
from recipes.base import Settings, allow_single_values, choose_trained, lr_factor
from recipes.cached_features import cache_features

USAGE = "python train.py --model NAME --data DIR [DIR ...] [options]"

# --- the training loop ---------------------------------------------------------------------------

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
NO_CHOICE = {"epoch": 0, "dice": math.nan, "loss": None, "threshold": None}


class Run:
    """A training run: the model, its optimizer, the progress so far, and the run folder.

    `save` and `load` keep all of it in last.pt, so that a resumed run on the CPU gives the same
    numbers, bit for bit, as one that never stopped.
    """

    PARTS = ("model", "optimizer", "scheduler", "scaler", "ema")
    PROGRESS = ("epoch", "batch", "step", "sums", "history", "best", "best_epoch")

    def __init__(self, settings: Settings, model, recipe, train_set, val_set):
        self.settings = settings
        self.recipe = recipe
        self.model = model
        self.train_set = train_set
        self.val_set = val_set
        self.out = Path(settings.out)
        self.device = next(model.parameters()).device
        self.compiled_model = torch.compile(model) if settings.compile else model

        self.batches_per_epoch = data.batches_per_epoch(len(train_set), settings.batch_size)
        steps_per_epoch = math.ceil(self.batches_per_epoch / settings.grad_accum_steps)
        self.total_steps = min(settings.epochs * steps_per_epoch, settings.max_steps or math.inf)

        self.optimizer = self.make_optimizer()
        self.scheduler = self.make_scheduler()
        self.dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, settings.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = None
        if settings.ema:
            average = get_ema_multi_avg_fn(settings.ema)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

        self.epoch = 0  # finished epochs
        self.batch = 0  # finished batches of the current epoch
        self.step = 0  # optimizer steps since the start
        self.sums = {}  # name -> sum of this loss over the batches of the current epoch
        self.history = []  # the rows of metrics.csv
        self.best = -1.0  # the highest validation Dice
        self.best_epoch = 0  # the epoch that first reached it
        # The epoch in best.safetensors and its scores. With equal Dice it may be a later epoch.
        self.chosen = dict(NO_CHOICE)
        self.saved_at = ""  # the progress in last.pt, in words

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer with the recipe's parameter groups."""
        optimizer = OPTIMIZERS[self.settings.optimizer]
        groups = self.recipe.groups(self.model, self.settings)
        fused = self.device.type in ("cpu", "cuda")  # one kernel for all parameters
        return optimizer(groups, amsgrad=self.settings.amsgrad, fused=fused)

    def make_scheduler(self) -> LambdaLR | ReduceLROnPlateau:
        """Return the schedule of the learning rate."""
        if self.settings.schedule == "plateau":
            return ReduceLROnPlateau(self.optimizer, factor=0.1, patience=5)
        factor = partial(lr_factor, total=self.total_steps, settings=self.settings)
        return LambdaLR(self.optimizer, factor)

    # --- one epoch ---

    def fit(self) -> None:
        """Train from the current progress to the last epoch, or until patience runs out."""
        settings = self.settings
        items = data.Items(
            self.train_set,
            settings.prompt,
            self.recipe.inputs,
            True,
            settings.seed,
            settings.negatives,
        )
        start = self.epoch * self.batches_per_epoch + self.batch
        order = data.train_batches(
            len(self.train_set), settings.batch_size, settings.epochs, settings.seed, start
        )
        loader = data.make_loader(items, order, settings.workers, self.device, self.recipe.collate)
        batches = iter(loader)

        while not self.is_finished() and not self.should_stop_early():
            self.train_epoch(batches)
            self.end_epoch()
        if self.should_stop_early():
            print(
                f"stopped: validation Dice has not improved since epoch {self.best_epoch} "
                "(to continue: --resume with a higher --patience)"
            )

    def is_finished(self) -> bool:
        """Return True if all epochs or all steps are done."""
        return self.epoch >= self.settings.epochs or self.step >= self.total_steps

    def should_stop_early(self) -> bool:
        """Return True if the best Dice is `patience` epochs old and the last epoch validated."""
        patience = self.settings.patience
        if not patience or self.epoch - self.best_epoch < patience:
            return False
        if self.epoch < self.settings.min_epochs:
            return False
        return "val_dice" in self.history[-1]  # else the next validation decides

    def train_epoch(self, batches: Iterator[dict]) -> None:
        """Run the remaining batches of the current epoch."""
        self.train_mode()
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        bar = tqdm(
            desc=title,
            total=self.batches_per_epoch,
            leave=False,
            initial=self.batch,
            unit="batch",
            disable=None,  # no bar where the output is no terminal
        )
        printed_at = time.time()
        saved_at = time.time()

        while self.batch < self.batches_per_epoch and self.step < self.total_steps:
            batch_before = self.batch
            self.optimizer_step(batches)
            bar.update(self.batch - batch_before)

            # Reading the loss makes a GPU wait, so it is not read at every step there.
            if self.step % 20 == 0 or self.device.type == "cpu":
                bar.set_postfix(loss=f"{self.mean_loss():.4f}")
            if bar.disable and time.time() - printed_at > 30:
                loss = self.mean_loss()
                print(f"{title}  batch {self.batch}/{self.batches_per_epoch}  loss {loss:.4f}")
                printed_at = time.time()
            if time.time() - saved_at > 60 * self.settings.save_every:
                self.mean_loss()  # raises if the state is not worth saving
                self.save()
                saved_at = time.time()
        bar.close()

    def train_mode(self) -> None:
        """Set training mode, except in frozen modules: their batch norms keep their statistics."""
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def optimizer_step(self, batches: Iterator[dict]) -> None:
        """Accumulate gradients over `grad_accum_steps` batches, then update the weights once."""
        remaining = self.batches_per_epoch - self.batch
        count = min(self.settings.grad_accum_steps, remaining)

        for _ in range(count):
            batch = to_device(next(batches), self.device)
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                output = self.recipe.forward(self.compiled_model, batch)
            loss, parts = self.recipe.loss(output, batch)
            self.scaler.scale(loss / count).backward()
            self.add_to_sums({"loss": loss} | parts)

        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        if self.ema:
            self.ema.update_parameters(self.model)
        if self.settings.schedule != "plateau":
            self.scheduler.step()
        self.batch += count
        self.step += 1

    def add_to_sums(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of a batch to the sums of the epoch, without waiting for a GPU."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def mean_loss(self) -> float:
        """Return the mean loss of the epoch so far. Raises ValueError if it is not finite."""
        loss = float(self.sums["loss"]) / self.batch
        if math.isfinite(loss):
            return loss

        value = "NaN" if math.isnan(loss) else "infinite"
        saved = "Nothing was saved yet."
        if self.saved_at:
            saved = f"{self.out / 'last.pt'} holds the state of {self.saved_at}."
        raise ValueError(
            f"the loss became {value} by step {self.step} (epoch {self.epoch + 1}). {saved} "
            "Start a new run with a lower --lr, --clip-grad 1 or --dtype float32."
        )

    # --- the end of an epoch ---

    def end_epoch(self) -> None:
        """Validate if it is due, then write metrics.csv, the best weights and last.pt."""
        self.mean_loss()
        model = self.ema.module if self.ema else self.model
        is_due = (self.epoch + 1) % self.settings.eval_every == 0
        validates = is_due or self.step >= self.total_steps
        scores = {}
        if validates:
            scores = evaluate.validate(model, self.recipe, self.val_set, self.settings)

        row = self.epoch_row() | scores
        if self.settings.schedule == "plateau" and validates:
            self.scheduler.step(row["val_loss"])
        self.print_epoch(row)
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.sums = {}

        if validates and self.is_chosen(row):
            self.keep_weights(model, row)
        tables.write_csv(self.out / "metrics.csv", self.history)
        pictures.curves(self.out / "curves.png", self.history)
        self.save()  # comes last: a run that is killed before it repeats the end of the epoch

    def epoch_row(self) -> dict:
        """Return the row of metrics.csv for the current epoch, still without a validation."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": rate}
        for name, value in self.sums.items():
            row[f"train_{name}"] = float(value) / self.batch
        return row

    def print_epoch(self, row: dict) -> None:
        """Print the training loss and the validation scores of an epoch."""
        words = [f"epoch {self.epoch + 1}/{self.settings.epochs}", f"step {self.step}"]
        for name, value in row.items():
            if name == "train_loss" or name.startswith("val_"):
                words.append(f"{name} {value:.4f}")
        print("  ".join(words))

    def is_chosen(self, row: dict) -> bool:
        """Return True if the weights of this epoch replace those in best.safetensors.

        A validation Dice more than min_delta above the best one replaces them, becomes the best
        one, and patience counts from it. A Dice equal to the best one is a tie: `wins_tie` decides,
        and patience keeps counting. A rise of min_delta or less counts as no improvement: it
        neither replaces the weights nor raises the Dice that later epochs are compared with. A NaN
        replaces only a NaN.
        """
        dice = row["val_dice"]
        if dice > self.best + self.settings.min_delta:
            self.best = dice
            self.best_epoch = row["epoch"]
            return True
        if math.isnan(dice):
            return math.isnan(self.chosen["dice"])
        return dice == self.best and wins_tie(row.get("val_loss"), self.chosen["loss"])

    def keep_weights(self, model, row: dict) -> None:
        """Write the weights of an epoch to the run folder, and record its scores in `chosen`.

        model: the one that was validated; with --ema the average.
        """
        if self.settings.train != "all":  # the small file
            with atomic_files.atomic_write(self.out / "adapter.safetensors") as part:
                save_adapter(model, part)
        state = {name: tensor.contiguous() for name, tensor in merged_state_dict(model).items()}
        with atomic_files.atomic_write(self.out / "best.safetensors") as part:
            save_file(state, part)

        threshold = row.get("val_threshold")
        self.chosen = {
            "epoch": row["epoch"],
            "dice": row["val_dice"],
            "loss": row.get("val_loss"),
            "threshold": threshold,
        }
        if threshold is not None:
            self.use_threshold()
            write_config(self.settings, self.recipe, self.model, self.train_set, self.val_set)

    def use_threshold(self) -> None:
        """Give the model the threshold that --threshold auto chose with the best weights."""
        if self.chosen["threshold"] is not None:
            self.model.config = replace(self.model.config, threshold=self.chosen["threshold"])

    # --- saving and resuming ---

    def save(self) -> None:
        """Save everything needed to resume to last.pt.

        The order of the data and the augmentation follow from the seed, so they need no state.
        """
        state = {name: getattr(self, name) for name in self.PROGRESS}
        state["chosen"] = self.chosen
        for name in self.PARTS:
            part = getattr(self, name)
            if part:
                state[name] = part.state_dict()
        state["random"] = torch.get_rng_state()
        is_on_gpu = self.device.type == "cuda"
        state["random_cuda"] = torch.cuda.get_rng_state_all() if is_on_gpu else []

        with atomic_files.atomic_write(self.out / "last.pt") as part:
            torch.save(state, part)
        self.saved_at = self.progress()

    def progress(self) -> str:
        """Return the progress of the run in words."""
        return f"epoch {self.epoch + 1}" if self.batch else f"the end of epoch {self.epoch}"

    def describe_saved(self) -> str:
        """Return what an interrupted run has saved, and how to continue it."""
        if not self.saved_at:
            return "nothing was saved yet; the same command starts again"
        return (
            f"{self.out / 'last.pt'} is safe ({self.saved_at}); continue with "
            f"python train.py --resume --out {self.out}"
        )

    def load(self) -> None:
        """Restore what `save` wrote.

        Raises ValueError, one line, if last.pt is damaged or does not belong to this run, or if
        best.safetensors is missing or damaged.
        """
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated, or a pickle that calls something
            if command_line.is_out_of_memory(error):
                raise
            raise unusable(path, "cannot be read", error) from None
        self.check_state(path, state)

        for name in self.PROGRESS:
            setattr(self, name, state[name])
        self.chosen = state["chosen"] if "chosen" in state else self.first_best()
        self.use_threshold()
        try:
            self.load_parts(state)
        except Exception as error:  # optimizers and schedulers raise errors of many kinds
            if command_line.is_out_of_memory(error):
                raise
            raise unusable(path, "does not fit this run", error) from None
        self.saved_at = self.progress()

        # Read the best weights now: they are needed after a training that may take days.
        if self.chosen["epoch"]:
            for _ in best_weights(self.out / "best.safetensors", merged_state_dict(self.model)):
                pass

    def load_parts(self, state: dict) -> None:
        """Restore the model, what trains it, and the random number generators."""
        for name in self.PARTS:
            part = getattr(self, name)
            if part:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def first_best(self) -> dict:
        """Return `chosen` for a last.pt of an older version: the first epoch with the best Dice."""
        dice = self.best if self.best_epoch else math.nan
        chosen = NO_CHOICE | {"epoch": self.best_epoch, "dice": dice}
        for row in self.history:
            if row["epoch"] == self.best_epoch:
                chosen["loss"] = row.get("val_loss")
        return chosen

    def check_state(self, path: Path, state) -> None:
        """Raise ValueError, one line, if the content of last.pt is not a state of this run."""
        if not isinstance(state, dict):
            raise unusable(path, f"holds a {type(state).__name__}, not the state of a run")
        parts = [name for name in self.PARTS if getattr(self, name)]
        required = [*PROGRESS_TYPES, *parts, "random", "random_cuda"]
        for name in required:
            if name not in state:
                raise unusable(path, f"has no {name}")
        for name in state:
            if name not in {*required, *self.PARTS, "chosen"}:
                raise runs.newer(path, f"it has {name!r}")

        for name, kind in PROGRESS_TYPES.items():
            value = state[name]
            is_negative = kind is int and runs.fits(value, kind) and value < 0
            if not runs.fits(value, kind) or is_negative:
                raise unusable(path, f"{name} is {value!r:.50}")
        if not is_choice(state.get("chosen", NO_CHOICE)):
            raise unusable(path, f"chosen is {state['chosen']!r:.50}")

        has_no_loss = state["batch"] and "loss" not in state["sums"]
        if state["batch"] > self.batches_per_epoch or has_no_loss:
            raise unusable(path, f"batch {state['batch']} is none of this run")
        self.check_progress(path, state)
        check_tensors(path, state["model"], self.model.state_dict())

    def check_progress(self, path: Path, state: dict) -> None:
        """Raise ValueError, one line, if the remaining batches are too few for the remaining steps.

        This happens if the data set has changed, or if --max-steps was edited in config.json.
        """
        accumulated = self.settings.grad_accum_steps
        steps_per_epoch = math.ceil(self.batches_per_epoch / accumulated)
        steps_of_this_epoch = math.ceil(state["batch"] / accumulated)
        epochs_left = self.settings.epochs - state["epoch"]
        possible_steps = max(0, epochs_left * steps_per_epoch - steps_of_this_epoch)
        if self.total_steps - state["step"] > possible_steps:
            raise unusable(
                path,
                f"stands at step {state['step']} in epoch {state['epoch'] + 1}, which does not fit "
                f"{self.total_steps} steps in all (the data set or config.json has changed since)",
            )

    def follow_schedule(self) -> str:
        """Set the learning rates that the schedule has for this step. Return the change in words.

        They change if the run has become longer or shorter since it was saved; "" if they do not.
        All schedules but plateau compute the rate of a step from its number.
        """
        if self.settings.schedule == "plateau":
            return ""
        groups = self.optimizer.param_groups
        rate_before = max(group["lr"] for group in groups)
        factor = lr_factor(self.step, self.total_steps, self.settings)
        for group, base_rate in zip(groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base_rate * factor

        rate = max(group["lr"] for group in groups)
        if rate == rate_before:
            return ""
        return (
            f"the {self.settings.schedule} schedule now ends at step {self.total_steps}: the "
            f"learning rate at step {self.step} changes from {rate_before:.3g} to {rate:.3g}"
        )


PROGRESS_TYPES = {  # the types of these entries of last.pt
    "epoch": int,
    "batch": int,
    "step": int,
    "sums": dict,
    "history": list[dict],
    "best": float,
    "best_epoch": int,
    "model": dict,
}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy the tensors of a batch to a device, at the same time as it computes."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def wins_tie(loss: float | None, kept_loss: float | None) -> bool:
    """Return True if the later of two epochs with the same validation Dice is to be kept.

    The lower validation loss wins. With equal losses, or without any (volumes have none), the later
    epoch wins. A loss that is NaN or infinite never wins.
    """
    if loss is None:
        return kept_loss is None
    if not math.isfinite(loss):
        return False
    return kept_loss is None or not math.isfinite(kept_loss) or loss <= kept_loss


def is_choice(chosen) -> bool:
    """Return True if `chosen` of a last.pt has the form of `Run.chosen`."""
    if not isinstance(chosen, dict) or chosen.keys() != NO_CHOICE.keys():
        return False
    if not isinstance(chosen["epoch"], int):
        return False
    numbers = [chosen["dice"], chosen["loss"] or 0.0, chosen["threshold"] or 0.0]
    return all(isinstance(number, int | float) for number in numbers)


def unusable(path: Path, problem: str, error: Exception | None = None) -> ValueError:
    """Return the error about a file that keeps a run from being resumed."""
    reason = ""
    if error is not None:
        text = str(error).strip() or repr(error)
        reason = f" ({text.splitlines()[0]:.150})"
    return ValueError(
        f"{path}: {problem}, so the run cannot be resumed{reason}; start again with another --out"
    )


def check_tensors(path: Path, state: dict, expected: dict) -> None:
    """Raise ValueError, one line, unless a file's tensors are those of this model."""
    for name in [*expected, *state]:
        fault = tensor_fault(state.get(name), expected.get(name))
        if fault:
            raise unusable(path, f"{name} {fault}")


def best_weights(path: Path, expected: dict) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor of each of the weights in best.safetensors.

    Raises ValueError, one line, if the file is missing, damaged or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            names = {*file.keys()}
            for name in [*expected, *names]:
                tensor = file.get_tensor(name) if name in names else None
                fault = tensor_fault(tensor, expected.get(name))
                if fault:
                    raise unusable(path, f"{name} {fault}")
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise unusable(path, "cannot be read", error) from None


# --- the run folder ------------------------------------------------------------------------------

LENGTH_OPTIONS = ("epochs", "patience")  # what a resumed run may change
# A folder with one of these files contains a run.
SAVED_FILES = ("last.pt", "best.safetensors", "adapter.safetensors", "metrics.csv", "test")
# The files that a run writes before its first last.pt.
FIRST_FILES = (
    "config.json",
    "log.txt",
    "vocab.txt",
    "best.safetensors",
    "adapter.safetensors",
    "metrics.csv",
    "curves.png",
)
TEST_FILES = {
    "per_image.csv",
    "per_component.csv",
    "per_prompt.csv",
    "measurements.csv",
    "overlays",
}


def can_resume(settings: Settings) -> bool:
    """Return True if --resume is set and --out contains a saved state.

    Raises ValueError, one line, if --out contains files that must not be overwritten, or a run that
    was started with different options.
    """
    out = Path(settings.out)
    if not settings.resume:
        refuse_run(out)
        return False
    if not (out / "last.pt").is_file():
        print(f"{out} contains no saved state; the run starts from the beginning")
        return False

    saved = saved_options(out)
    if saved is None:
        raise unusable(out / "last.pt", "has no config.json of its run beside it")
    saved = asdict(Options()) | saved
    new = json.loads(json.dumps(as_options(settings)))
    fixed = {name: value for name, value in new.items() if name not in LENGTH_OPTIONS}
    check_same(out, {name: saved[name] for name in fixed}, fixed)

    for name in LENGTH_OPTIONS:
        if saved[name] != new[name]:
            print(f"{flag(name)} {saved[name]} -> {new[name]}")
    return True


def saved_options(out: Path) -> dict | None:
    """Return the options in the config.json of a run folder; None if there is no such file.

    Raises ValueError, one line, if they are not what train.py writes.
    """
    path = out / "config.json"
    run = runs.read_run(out)
    if not run:
        return None
    if "options" not in run:
        raise ValueError(f"{path}: has no options; {runs.EDITED}")

    runs.check_keys(path, run["options"], {spec.name: spec.type for spec in fields(Options)})
    try:
        checked(Options(**run["options"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {runs.EDITED}") from None
    return run["options"]


def refuse_run(out: Path) -> None:
    """Raise ValueError, one line, if a folder contains a run, or files that a run would overwrite.

    A run that was killed before it saved anything may be overwritten, and so may a test that was
    stopped.
    """
    config = out / "config.json"
    files = [out / name for name in SAVED_FILES if (out / name).exists()]
    if files == [out / "test"] and not config.exists() and is_stopped_test(out / "test"):
        print(f"{out} contains a test that was stopped; it starts again")
        return

    if config.exists() and not runs.read_run(out):
        raise ValueError(f"{config}: is not the file of a run; choose another --out")
    if files:
        raise ValueError(
            f"{out} already contains a run ({files[0].name}); use --resume to continue it, or "
            "choose another --out"
        )
    if config.exists():
        print(f"{out} contains a run that was stopped before it saved anything; it starts again")


def is_stopped_test(folder: Path) -> bool:
    """Return True if a folder has only files that a test writes before its summary."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= TEST_FILES


@contextlib.contextmanager
def removed_if_unsaved(out: Path):
    """Remove what a run wrote to its folder if it fails before it saved a state or a test."""
    log = out / "log.txt"
    existing = {name for name in (*FIRST_FILES, "test") if (out / name).exists()}
    log_size = log.stat().st_size if "log.txt" in existing else 0
    try:
        yield
    except BaseException:
        is_tested = (out / "test").exists() and "test" not in existing
        if not (out / "last.pt").exists() and not is_tested:
            for name in FIRST_FILES:
                if name not in existing:
                    (out / name).unlink(missing_ok=True)
            if "log.txt" in existing:
                os.truncate(log, log_size)
        raise


def write_config(settings: Settings, recipe, model, train_set, val_set) -> None:
    """Write config.json of a run folder; `from_pretrained` reads its `class` and `config`."""
    content = {
        "format": 1,
        "model": settings.model,
        "class": type(model).__name__,
        "config": asdict(model.config),
        "classes": list(getattr(model.config, "classes", ()) or train_set.classes),
        "labels": train_set.entries[0].labels,  # the class indices in label maps of volumes
        "recipe": settings.recipe or "default",
        "options": as_options(settings),
        "data": {"train": train_set.describe(), "val": val_set.describe()},
        "masks": data.rules_by_name(
            getattr(train_set, "rules", {})
        ),  # data set -> how masks are read
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    tables.write_json(Path(settings.out) / "config.json", content | recipe.config_entries)


# --- a run from its start to its test ------------------------------------------------------------


def main() -> int:
    """Run the command line. `--resume --out RUN` takes all other options from the run."""
    typed = parse(__doc__, usage=USAGE)
    if not typed.get("resume") or "out" not in typed:
        run(Options(**typed))
        return 0

    out = Path(typed["out"])
    with atomic_files.claim_folder(out):
        saved = saved_options(out) or {}
        run_in_folder(resolve(Options(**saved | typed)))
    return 0


def run(options: Options) -> dict:
    """Train and test. Return the summary of the test, {} without one."""
    settings = resolve(options)
    with atomic_files.claim_folder(Path(settings.out)):
        return run_in_folder(settings)


def run_in_folder(settings: Settings) -> dict:
    """Train and test in a folder that no other process writes to. Return the test's summary."""
    out = Path(settings.out)
    with command_line.recovery_advice(partial(describe_folder, out)), removed_if_unsaved(out):
        device = runs.pick_device(settings.device)
        resume = can_resume(settings)
        with open(out / "log.txt", "a", 1, encoding="utf-8") as file:
            log = contextlib.redirect_stdout(command_line.Log(sys.stdout, file))
            with log, nifti.notices.grouped():
                return fit_and_test(settings, device, resume)


def describe_folder(out: Path) -> str:
    """Return what a run that is interrupted outside its training has saved."""
    if not (out / "last.pt").exists():
        return "nothing was saved yet; the same command starts again"
    return f"{out / 'last.pt'} is safe; continue with python train.py --resume --out {out}"


def fit_and_test(settings: Settings, device: torch.device, resume: bool) -> dict:
    """Open the data, load the model, train it, and test it. Return the summary of the test."""
    print_settings(settings)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(settings.deterministic)

    family = FAMILIES[settings.model]
    data_sets = runs.open_data(settings, family)
    parts = data_sets.parts
    model = starting_model(settings, parts.get("train"), device)
    recipe = family.recipe(model, settings)
    family.check_classes(model, data_sets.all, settings)
    recipe = family.make_ready(model, recipe, data_sets, settings)

    threshold = None
    if not settings.eval:
        chosen = fit(settings, model, recipe, parts, resume)
        threshold = chosen["threshold"]
        print(describe_choice(chosen, data_sets.tests))

    if settings.threshold == "auto":
        if threshold is None:  # no training, or one whose validations chose no threshold yet
            threshold = evaluate.best_threshold(model, recipe, parts["val"], settings)
        model.config = replace(model.config, threshold=threshold)
        if not settings.eval:
            write_config(settings, recipe, model, parts["train"], parts["val"])

    if not data_sets.tests:
        return {}
    test = evaluate.prompt_study if settings.prompt_study else evaluate.test
    return test(model, recipe, data_sets.tests, settings)


def print_settings(settings: Settings) -> None:
    """Print all options of a run that have a value."""
    words = []
    for name, value in as_options(settings).items():
        if value not in (None, []):
            words.append(f"{name}={value}")
    print("  ".join(words))


def starting_model(settings: Settings, train_set, device: torch.device):
    """Return the model that a run starts from, on its device."""
    family = FAMILIES[settings.model]
    # Weights that are only tested keep their own config, unless a recipe is named.
    overrides = dict(settings.config) if settings.recipe or not settings.eval else {}
    overrides |= family.config_of(settings)
    if settings.threshold not in (None, "auto"):
        overrides["threshold"] = settings.threshold
    overrides |= second_file(settings.model, settings.clip, settings.decoder)
    model = family.load_model(settings.weights, settings.variant, settings, overrides, train_set)
    return model.to(device)


def fit(settings: Settings, model, recipe, parts: dict, resume: bool) -> dict:
    """Train, then load the best checkpoint into `model`. Return its `Run.chosen`.

    parts: {"train": data set, "val": data set}.
    """
    family = FAMILIES[settings.model]
    train_set = parts["train"]
    val_set = parts["val"]
    choose_trained(model, family, settings)
    allow_single_values(model)
    print_trained(model)
    if settings.checkpointing:
        model.checkpointing = True
    if settings.augment is None:
        print(f"augmentation: {', '.join(settings.views)} of each image, nothing else")
    if settings.keep_features:
        recipe = cache_features(recipe, model, family.backbone, (train_set, val_set), settings)

    run = Run(settings, model, recipe, train_set, val_set)
    if resume:
        run.load()
        resume_run(run)
    else:
        write_config(settings, recipe, model, train_set, val_set)
        for name, path in recipe.files.items():
            shutil.copyfile(path, run.out / name)
    with command_line.recovery_advice(run.describe_saved):
        run.fit()

    merge_lora(model)
    model.load_state_dict(dict(best_weights(run.out / "best.safetensors", model.state_dict())))
    return run.chosen


def print_trained(model) -> None:
    """Print how many of the parameters are trained, and where."""
    trained = 0
    total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
    device = next(model.parameters()).device
    print(f"training {trained:,} of {total:,} parameters on {device}")


def resume_run(run: Run) -> None:
    """Print where a loaded run continues, and what more or fewer --epochs change.

    Raises ValueError, one line, if --epochs is less than what the run has trained already.
    """
    saved = saved_options(run.out)
    settings = run.settings
    epochs = settings.epochs
    trained = run.epoch + 1 if run.batch else run.epoch
    if epochs < trained:
        raise ValueError(
            f"--epochs {epochs}: this run has trained for {trained} already; give {trained} or more"
        )
    is_longer = epochs > (saved.get("epochs") or epochs)
    if is_longer and run.total_steps == settings.max_steps == run.step:
        raise ValueError(
            f"--epochs {epochs}: --max-steps {run.step} has ended this run; start a new one"
        )

    print(f"resumed in epoch {run.epoch + 1}, at step {run.step}")
    change = run.follow_schedule()
    if change and run.step < run.total_steps:
        print(change)
    if any(saved.get(name) != getattr(settings, name) for name in LENGTH_OPTIONS):
        write_config(settings, run.recipe, run.model, run.train_set, run.val_set)


def describe_choice(chosen: dict, tests: dict) -> str:
    """Return a line that says which epoch's weights are the best ones."""
    action = "testing the weights" if tests else "best.safetensors holds the weights"
    score = f"validation Dice {chosen['dice']:.4f}"
    if chosen["threshold"] is not None:
        score += f" at threshold {chosen['threshold']:g}"
    return f"{action} of epoch {chosen['epoch']} ({score})"


if __name__ == "__main__":
    command_line.command(main)
