"""Fine-tunes, tests and resumes every model of this project on folders of images and masks.

    python train.py --model cris --data data/kvasir_polyp                  # fine-tune, then test
    python train.py --resume --out runs/cris-kvasir_polyp                  # go on where it stopped
    python train.py --resume --out runs/cris-kvasir_polyp --epochs 100     # train for more epochs
    python train.py --weights runs/cris-kvasir_polyp --eval --test data/cvc300_polyp
    python train.py --weights cris_best.pth --data data/busi --epochs 0 --prompt p1     # zero-shot

What is not given comes from the recipe (recipes/). The run folder, runs/NAME, holds config.json,
metrics.csv (a row an epoch), curves.png, log.txt, last.pt (all that a resumed run needs),
best.safetensors (`Model.from_pretrained("runs/NAME")` reads it), where only a part was trained
that part in adapter.safetensors (engine/lora.py), and test/ with summary.json, per_image.csv and
overlays. On the CPU a resumed run gives the same numbers, bit for bit, as one that never stopped.
A run that fails before anything is saved leaves no run folder, and one that was killed before that
is started again by the same command. More --epochs change the learning rate of schedules that end
with the run: a line says from what to what. --patience may change as well.
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
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
from recipes.kept_features import keep_features

# --- the loop ------------------------------------------------------------------------------------


class Run:
    """One training: the model, what trains it, where it stands, and its folder."""

    PARTS = ("model", "optimizer", "scheduler", "scaler", "ema")
    PLACE = ("epoch", "batch", "step", "sums", "history", "best", "best_epoch")

    def __init__(self, settings: Settings, model, recipe, train_set, val_set):
        self.settings = settings
        self.recipe = recipe
        self.model = model
        self.train_set = train_set
        self.val_set = val_set
        self.out = Path(settings.out)
        self.device = next(model.parameters()).device
        self.net = torch.compile(model) if settings.compile else model  # the same parameters
        self.batches = data.batches_per_epoch(len(train_set), settings.batch_size)
        steps = math.ceil(self.batches / settings.grad_accum_steps)
        self.total_steps = min(settings.epochs * steps, settings.max_steps or math.inf)

        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        fused = self.device.type in ("cpu", "cuda")  # one pass over all parameters
        groups = recipe.groups(model, settings)
        self.optimizer = optimizer(groups, amsgrad=settings.amsgrad, fused=fused)
        if settings.schedule == "plateau":
            self.scheduler = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=5)
        else:
            factor = partial(lr_factor, total=self.total_steps, settings=settings)
            self.scheduler = LambdaLR(self.optimizer, factor)
        self.dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, settings.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        average = get_ema_multi_avg_fn(settings.ema) if settings.ema else None
        self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if average else None

        self.epoch, self.batch, self.step = 0, 0, 0  # `batch` counts within the epoch
        self.sums, self.history = {}, []  # losses of this epoch so far; the rows of metrics.csv
        self.best, self.best_epoch = -1.0, 0  # highest validation Dice, and the epoch that had it
        # The epoch whose weights are kept, and its scores: one as good as the best may be later.
        self.chosen = dict(NO_CHOICE)
        self.saved = ""  # where last.pt stands, in words

    def save(self) -> None:
        """Everything that going on needs, to last.pt. Data and augmentation need only seeds."""
        state = {name: getattr(self, name) for name in self.PLACE}
        state["chosen"] = self.chosen
        state |= {k: getattr(self, k).state_dict() for k in self.PARTS if getattr(self, k)}
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state |= {"random": torch.get_rng_state(), "random_cuda": cuda}
        with atomic_files.whole_file(self.out / "last.pt") as part:
            torch.save(state, part)
        self.saved = self.place()

    def place(self) -> str:
        """Return where the run stands, in words."""
        return f"epoch {self.epoch + 1}" if self.batch else f"the end of epoch {self.epoch}"

    def what_is_safe(self) -> str:
        """Return what a run that is interrupted now has saved, and how to go on."""
        if not self.saved:
            return "nothing was saved yet; the same command starts again"
        again = f"python train.py --resume --out {self.out}"
        return f"{self.out / 'last.pt'} is safe ({self.saved}); go on with {again}"

    def load(self) -> None:
        """Restore what `save` wrote.

        Raises ValueError, one line, if last.pt is damaged or does not belong to this run, or if its
        best weights are lost.
        """
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # cut off, or a pickle that calls something
            raise unusable(path, "cannot be read", error) from None
        self.check_state(path, state)
        for name in self.PLACE:
            setattr(self, name, state[name])
        self.chosen = state["chosen"] if "chosen" in state else self.first_best()
        self.use_threshold()
        try:
            for name in self.PARTS:
                if getattr(self, name):
                    getattr(self, name).load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            if state["random_cuda"] and self.device.type == "cuda":
                torch.cuda.set_rng_state_all(state["random_cuda"])
        except Exception as error:  # optimisers and schedulers raise errors of many kinds
            raise unusable(path, "does not fit this run", error) from None
        self.saved = self.place()
        if self.chosen["epoch"]:  # else no weights were kept yet
            for _ in kept_weights(self.out / "best.safetensors", merged_state_dict(self.model)):
                pass  # it is read again after the training, which may take days

    def check_state(self, path: Path, state) -> None:
        """Raise ValueError, one line, if the content of last.pt is not a state of this run."""
        parts = [name for name in self.PARTS if getattr(self, name)]
        kinds = STATE | dict.fromkeys([*parts, "random", "random_cuda"])
        if not isinstance(state, dict):
            raise unusable(path, f"holds a {type(state).__name__}, not the state of a run")
        missing = [name for name in kinds if name not in state]
        if missing:
            raise unusable(path, f"has no {missing[0]}")
        unknown = [name for name in state if name not in {*kinds, *self.PARTS, "chosen"}]
        if unknown:
            raise runs.newer(path, f"it has {unknown[0]!r}")
        for name, kind in STATE.items():
            value = state[name]
            if not runs.fits(value, kind) or kind is int and value < 0:
                raise unusable(path, f"{name} is {value!r:.50}")
        if not is_choice(state.get("chosen", NO_CHOICE)):
            raise unusable(path, f"chosen is {state['chosen']!r:.50}")
        if state["batch"] > self.batches or state["batch"] and "loss" not in state["sums"]:
            raise unusable(path, f"batch {state['batch']} is none of this run")
        self.check_place(path, state)
        check_tensors(path, state["model"], self.model.state_dict())

    def check_place(self, path: Path, state: dict) -> None:
        """Raise ValueError, one line, if fewer batches follow than the run has steps left.

        So it is if the data set has grown, or --max-steps, which ended the run, was edited.
        """
        per_step = self.settings.grad_accum_steps
        steps_per_epoch = math.ceil(self.batches / per_step)
        epochs_left = self.settings.epochs - state["epoch"]
        steps_that_follow = epochs_left * steps_per_epoch - math.ceil(state["batch"] / per_step)
        if self.total_steps - state["step"] > max(0, steps_that_follow):
            raise unusable(
                path,
                f"stands at step {state['step']} in epoch {state['epoch'] + 1}, which does not fit "
                f"{self.total_steps} steps in all (the data set or config.json has changed since)",
            )

    def follow_schedule(self) -> str:
        """Set the learning rates that the schedule has for this step; return what changed, "" if
        nothing did.

        They change if the run is longer or shorter than when it was saved. All schedules but
        plateau know the rate of a step from its number.
        """
        if self.settings.schedule == "plateau":
            return ""
        before = max(group["lr"] for group in self.optimizer.param_groups)
        factor = lr_factor(self.step, self.total_steps, self.settings)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * factor
        after = max(group["lr"] for group in self.optimizer.param_groups)
        if after == before:
            return ""
        name = self.settings.schedule
        return (
            f"the {name} schedule now ends at step {self.total_steps}: the learning rate at step "
            f"{self.step} changes from {before:.3g} to {after:.3g}"
        )

    def first_best(self) -> dict:
        """Return `chosen` as it was before last.pt held it: the first epoch with the best Dice."""
        dice = self.best if self.best_epoch else math.nan
        chosen = {"epoch": self.best_epoch, "dice": dice, "loss": None, "threshold": None}
        for row in self.history:
            if row["epoch"] == self.best_epoch:
                chosen["loss"] = row.get("val_loss")
        return chosen

    def use_threshold(self) -> None:
        """Give the model the threshold that --threshold auto chose with the kept weights."""
        if self.chosen["threshold"] is not None:
            self.model.config = replace(self.model.config, threshold=self.chosen["threshold"])

    def train_mode(self) -> None:
        """Training mode, but not for modules that are frozen whole: norms keep their statistics."""
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def optimizer_step(self, batches) -> None:
        """One step along the mean gradient of one or several batches."""
        count = min(self.settings.grad_accum_steps, self.batches - self.batch)
        for _ in range(count):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                output = self.recipe.forward(self.net, batch)
            loss, parts = self.recipe.loss(output, batch)
            self.scaler.scale(loss / count).backward()
            for name, value in ({"loss": loss} | parts).items():
                self.sums[name] = self.sums.get(name, 0) + value.detach()
        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)
        if self.settings.schedule != "plateau":
            self.scheduler.step()
        self.batch, self.step = self.batch + count, self.step + 1

    def mean_loss(self) -> float:
        """Of the epoch so far. ValueError if it is no number any more."""
        loss = float(self.sums["loss"]) / self.batch
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} before step {self.step}; {self.out / 'last.pt'} is from "
                "before. Start anew with a lower --lr, --clip-grad 1 or --dtype float32"
            )
        return loss

    def train_epoch(self, batches) -> None:
        """From where it stands to the epoch's end."""
        self.train_mode()
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        said = saved = time.time()
        bar = tqdm(None, title, self.batches, False, initial=self.batch, unit="batch", disable=None)
        while self.batch < self.batches and self.step < self.total_steps:
            before = self.batch
            self.optimizer_step(batches)
            bar.update(self.batch - before)
            if self.step % 20 == 0 or self.device.type == "cpu":  # asking a GPU makes it wait
                bar.set_postfix(loss=f"{self.mean_loss():.4f}")
            if bar.disable and time.time() - said > 30:  # not a terminal
                print(f"{title}  batch {self.batch}/{self.batches}  loss {self.mean_loss():.4f}")
                said = time.time()
            if time.time() - saved > 60 * self.settings.save_every:
                self.mean_loss()
                self.save()
                saved = time.time()
        bar.close()

    def end_epoch(self) -> None:
        """Validates; writes the row of metrics.csv, the best weights, the state to go on from."""
        self.mean_loss()
        model = self.ema.module if self.ema else self.model
        o = self.settings
        due = (self.epoch + 1) % self.settings.eval_every == 0
        validates, scores = due or self.step >= self.total_steps, {}
        if validates:
            scores = evaluate.validate(model, self.recipe, self.val_set, o)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": rate}
        row |= {f"train_{name}": float(value) / self.batch for name, value in self.sums.items()}
        row |= scores
        if self.settings.schedule == "plateau" and validates:
            self.scheduler.step(row["val_loss"])
        shown = {k: v for k, v in row.items() if k == "train_loss" or k.startswith("val_")}
        words = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        print(f"epoch {self.epoch + 1}/{o.epochs}  step {self.step}  {words}")
        self.history.append(row)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        if validates and self.is_chosen(row):
            self.keep_weights(model, row)
        tables.write_csv(self.out / "metrics.csv", self.history)
        pictures.curves(self.out / "curves.png", self.history)
        self.save()  # last: a kill before it means that the epoch's end is done again

    def is_chosen(self, row: dict) -> bool:
        """Return True if the weights of the epoch of `row` replace the kept ones.

        A validation Dice more than min_delta above the best replaces them, becomes the best, and
        patience counts from there. Exactly the best Dice is a tie: `wins_tie` decides, and patience
        goes on counting. A rise of min_delta or less, where a recipe has one, is neither: it does
        not replace the weights, as it is no improvement, and it does not raise what the next epoch
        is compared with. A NaN replaces only a NaN.
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
        """Write the weights of the epoch of `row`, and what they are chosen by, to the run folder.

        model: the one that was validated, with --ema the average.
        """
        if self.settings.train != "all":  # the small copy
            with atomic_files.whole_file(self.out / "adapter.safetensors") as part:
                save_adapter(model, part)
        with atomic_files.whole_file(self.out / "best.safetensors") as part:
            save_file({k: v.contiguous() for k, v in merged_state_dict(model).items()}, part)

        threshold = row.get("val_threshold")
        self.chosen = {"epoch": row["epoch"], "dice": row["val_dice"]}
        self.chosen |= {"loss": row.get("val_loss"), "threshold": threshold}
        if threshold is not None:
            self.use_threshold()
            write_config(self.settings, self.recipe, self.model, self.train_set, self.val_set)

    def patience_lost(self) -> bool:
        waited, least = self.epoch - self.best_epoch, self.settings.min_epochs
        patience = self.settings.patience
        if not patience or waited < patience or self.epoch < least:
            return False
        return "val_dice" in self.history[-1]  # else the next validation tells

    def fit(self) -> None:
        """From where it stands to the end."""
        o = self.settings
        inputs = self.recipe.inputs
        items = data.Items(self.train_set, o.prompt, inputs, True, o.seed, o.negatives)
        start = self.epoch * self.batches + self.batch
        order = data.train_batches(len(self.train_set), o.batch_size, o.epochs, o.seed, start)
        collate = self.recipe.collate
        batches = iter(data.loader(items, order, o.workers, self.device, collate))
        while self.epoch < o.epochs and self.step < self.total_steps and not self.patience_lost():
            self.train_epoch(batches)
            self.end_epoch()
        if self.patience_lost():
            since = f"validation Dice has not become better since epoch {self.best_epoch}"
            print(f"stopped: {since} (--resume with more --patience goes on)")


NO_CHOICE = {"epoch": 0, "dice": math.nan, "loss": None, "threshold": None}
STATE = {  # of last.pt: where the run stands
    "epoch": int, "batch": int, "step": int, "sums": dict, "history": list[dict], "best": float,
    "best_epoch": int, "model": dict,
}  # fmt: skip


def is_choice(chosen) -> bool:
    """Return True if `chosen` of last.pt has the form of `Run.chosen`."""
    if not isinstance(chosen, dict) or chosen.keys() != NO_CHOICE.keys():
        return False
    numbers = [chosen["dice"], *(chosen[key] or 0.0 for key in ("loss", "threshold"))]
    return isinstance(chosen["epoch"], int) and all(isinstance(x, int | float) for x in numbers)


def unusable(path: Path, what: str, error: Exception | None = None) -> ValueError:
    """Return the error of a file of a run that cannot be resumed."""
    reason = ""
    if error is not None:
        reason = f" ({(str(error).strip() or repr(error)).splitlines()[0]:.150})"
    return ValueError(
        f"{path}: {what}, so the run cannot be resumed{reason}; start again with another --out"
    )


def check_tensors(path: Path, state: dict, expected: dict) -> None:
    """Raise ValueError, one line, unless a file's tensors are those of this model."""
    for name in [*expected, *state]:
        fault = tensor_fault(state.get(name), expected.get(name))
        if fault:
            raise unusable(path, f"{name} {fault}")


def kept_weights(path: Path, expected: dict):
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


def wins_tie(loss: float | None, kept_loss: float | None) -> bool:
    """Return True if, of two epochs with one validation Dice, the later one is to be kept.

    The lower validation loss wins. Of equal losses, or without any (volumes have none), the later
    epoch wins. A loss that is NaN or infinite never does.
    """
    if loss is None:
        return kept_loss is None
    if not math.isfinite(loss):
        return False
    return kept_loss is None or not math.isfinite(kept_loss) or loss <= kept_loss


# --- the program ---------------------------------------------------------------------------------


LENGTH_OPTIONS = ("epochs", "patience")  # options that a resumed run may change: how long it trains
SAVED_FILES = ("last.pt", "best.safetensors", "adapter.safetensors", "metrics.csv", "test")
# What a run writes before its first last.pt.
FIRST_FILES = (
    "config.json", "log.txt", "vocab.txt", "best.safetensors", "adapter.safetensors",
    "metrics.csv", "curves.png",
)  # fmt: skip


def can_resume(settings: Settings) -> bool:
    """Return True if --out holds a state to resume from.

    Raises ValueError, one line, if it holds what must not be overwritten, or a run that was started
    with other options.
    """
    out = Path(settings.out)
    if not settings.resume:
        refuse_run(out)
        return False
    if not (out / "last.pt").is_file():
        print(f"{out} holds nothing to go on from; starting at the beginning")
        return False

    theirs = saved_options(out)
    if theirs is None:
        raise unusable(out / "last.pt", "has no config.json of its run beside it")
    theirs = asdict(Options()) | theirs
    mine = json.loads(json.dumps(as_options(settings)))
    same = {key: value for key, value in mine.items() if key not in LENGTH_OPTIONS}
    check_same(out, {key: theirs[key] for key in same}, same)
    for key in LENGTH_OPTIONS:
        if theirs[key] != mine[key]:
            print(f"{flag(key)} {theirs[key]} -> {mine[key]}")
    return True


def saved_options(out: Path) -> dict | None:
    """Return the options of the run in a folder, None without a config.json of ours.

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
    """Raise ValueError, one line, if a folder holds a run, or files that a run would overwrite.

    A run that was killed before anything was saved is none, nor is a test that was stopped.
    """
    config = out / "config.json"
    files = [out / name for name in SAVED_FILES if (out / name).exists()]
    if files == [out / "test"] and not config.exists():
        ours = {"per_image.csv", "per_component.csv", "per_prompt.csv", "overlays"}
        if (out / "test").is_dir() and ours >= {path.name for path in (out / "test").iterdir()}:
            print(f"{out} holds a test that was stopped; it starts again")
            return
    if config.exists() and not runs.read_run(out):
        raise ValueError(f"{config}: is not the file of a run; choose another --out")
    if files:
        raise ValueError(
            f"{out} holds a run already ({files[0].name}); --resume goes on, --out is another "
            "folder"
        )
    if config.exists():
        print(f"{out} holds a run that was stopped before anything was saved; it starts again")


@contextlib.contextmanager
def removed_if_unsaved(out: Path):
    """Remove what a run wrote to its folder if it fails before it can be resumed or has a test."""
    log = out / "log.txt"
    before = {name for name in (*FIRST_FILES, "test") if (out / name).exists()}
    size = log.stat().st_size if "log.txt" in before else 0
    try:
        yield
    except BaseException:
        is_tested = (out / "test").exists() and "test" not in before
        if not (out / "last.pt").exists() and not is_tested:
            for name in FIRST_FILES:
                if name not in before:
                    (out / name).unlink(missing_ok=True)
            if "log.txt" in before:
                os.truncate(log, size)
        raise


def write_config(settings: Settings, recipe, model, train_set, val_set) -> None:
    """Write config.json of a run folder; `from_pretrained` reads `class` and `config` of it."""
    content = {
        "format": 1,
        "model": settings.model,
        "class": type(model).__name__,
        "config": asdict(model.config),
        "classes": list(getattr(model.config, "classes", ()) or train_set.classes),
        "labels": train_set.entries[0].labels,  # their numbers in volumes
        "recipe": settings.recipe or "default",
        "options": as_options(settings),
        "data": {"train": train_set.describe(), "val": val_set.describe()},
        "masks": data.named(getattr(train_set, "rules", {})),  # how they are read, {data set: rule}
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    tables.write_json(Path(settings.out) / "config.json", content | recipe.about)


def starting_model(settings: Settings, train_set, device: torch.device):
    """Return the model that a run starts from, on its device."""
    family = FAMILIES[settings.model]
    # Weights that are only tested keep what they came with, unless a recipe is named.
    overrides = dict(settings.config) if settings.recipe or not settings.eval else {}
    overrides |= family.config_of(settings)
    if settings.threshold not in (None, "auto"):
        overrides["threshold"] = settings.threshold
    overrides |= second_file(settings.model, settings.clip, settings.decoder)
    model = family.load_model(settings.weights, settings.variant, settings, overrides, train_set)
    return model.to(device)


def fit(settings: Settings, model, recipe, parts: dict, resume: bool) -> dict:
    """Train what is to be trained, then load the best weights into `model`.

    Returns which epoch they are of: `Run.chosen`.
    """
    family = FAMILIES[settings.model]
    sets = parts["train"], parts["val"]
    choose_trained(model, family, settings)
    allow_single_values(model)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, learns in counts if learns)
    total = sum(count for count, _ in counts)
    device = next(model.parameters()).device
    print(f"training {trained:,} of {total:,} parameters on {device}")
    if settings.checkpointing:
        model.checkpointing = True
    if settings.augment is None:
        print(f"augmentation: {', '.join(settings.views)} of each image, nothing else")
    if settings.keep_features:
        recipe = keep_features(recipe, model, family.backbone, sets, settings)

    run = Run(settings, model, recipe, *sets)
    if resume:
        run.load()
        resume_run(run)
    else:
        write_config(settings, recipe, model, *sets)
        for name, path in recipe.files.items():
            shutil.copyfile(path, run.out / name)
    with command_line.way_on(run.what_is_safe):
        run.fit()
    merge_lora(model)
    model.load_state_dict(dict(kept_weights(run.out / "best.safetensors", model.state_dict())))
    return run.chosen


def resume_run(run: Run) -> None:
    """Say where a loaded run goes on, and what more or fewer --epochs do to it.

    Raises ValueError, one line, if there are fewer --epochs than it has trained already.
    """
    saved = saved_options(run.out)
    settings = run.settings
    epochs = settings.epochs
    trained = run.epoch + (run.batch > 0)  # in the last one it may be on its way
    if epochs < trained:
        raise ValueError(
            f"--epochs {epochs}: this run has trained for {trained} already; give {trained} or more"
        )
    longer = epochs > (saved.get("epochs") or epochs)
    if longer and run.total_steps == settings.max_steps == run.step:
        raise ValueError(
            f"--epochs {epochs}: --max-steps {run.step} has ended this run; start a new one"
        )
    print(f"resumed in epoch {run.epoch + 1}, at step {run.step}")
    change = run.follow_schedule()
    if change and run.step < run.total_steps:
        print(change)
    if any(saved.get(key) != getattr(settings, key) for key in LENGTH_OPTIONS):
        write_config(settings, run.recipe, run.model, run.train_set, run.val_set)


def describe_choice(chosen: dict, tests: dict) -> str:
    """Return a line that says which epoch's weights were kept."""
    words = "testing the weights" if tests else "best.safetensors holds the weights"
    score = f"validation Dice {chosen['dice']:.4f}"
    if chosen["threshold"] is not None:
        score += f" at threshold {chosen['threshold']:g}"
    return f"{words} of epoch {chosen['epoch']} ({score})"


def fit_and_test(settings: Settings, device: torch.device, resume: bool) -> dict:
    """Open the data, load the model, train it, and test it. Return the summary of the test."""
    given = {key: value for key, value in as_options(settings).items() if value not in (None, [])}
    print("  ".join(f"{key}={value}" for key, value in given.items()))
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
        if threshold is None:  # nothing was trained, or only before validations chose a threshold
            threshold = evaluate.best_threshold(model, recipe, parts["val"], settings)
        model.config = replace(model.config, threshold=threshold)
        if not settings.eval:
            write_config(settings, recipe, model, parts["train"], parts["val"])

    if not data_sets.tests:
        return {}
    test = evaluate.prompt_study if settings.prompt_study else evaluate.test
    return test(model, recipe, data_sets.tests, settings)


def run(options: Options) -> dict:
    """Do all that the command line asks for. Return the summary of the test, {} without one."""
    settings = resolve(options)
    with atomic_files.claim(Path(settings.out)):
        return run_in_folder(settings)


def run_in_folder(settings: Settings) -> dict:
    """`run` in a folder that no other process writes to."""
    out = Path(settings.out)
    with command_line.way_on(partial(describe_folder, out)), removed_if_unsaved(out):
        device = runs.pick_device(settings.device)
        resume = can_resume(settings)
        with open(out / "log.txt", "a", 1, encoding="utf-8") as file:
            log = contextlib.redirect_stdout(command_line.Log(sys.stdout, file))
            with log, nifti.notices.together():
                return fit_and_test(settings, device, resume)


def describe_folder(out: Path) -> str:
    """Return what a run that is interrupted before or after its training has, and how to go on."""
    if not (out / "last.pt").exists():
        return "nothing was saved yet; the same command starts again"
    return f"{out / 'last.pt'} is safe; go on with python train.py --resume --out {out}"


def main() -> int:
    given = parse(__doc__)
    if not given.get("resume") or "out" not in given:
        run(Options(**given))
        return 0

    with atomic_files.claim(Path(given["out"])):
        saved = saved_options(Path(given["out"])) or {}  # --resume --out RUN is enough
        run_in_folder(resolve(Options(**saved | given)))
    return 0


if __name__ == "__main__":
    command_line.command(main)
