"""Fine-tunes, tests and resumes every model of this project on folders of images and masks.

    python train.py --model cris --data data/kvasir_polyp                  # fine-tune, then test
    python train.py --resume --out runs/cris-kvasir_polyp                  # go on where it stopped
    python train.py --weights runs/cris-kvasir_polyp --eval --test data/cvc300_polyp
    python train.py --weights cris_best.pth --data data/busi --epochs 0 --prompt p1     # zero-shot

What is not given comes from the recipe (recipes.py). The run folder, runs/NAME, holds config.json,
metrics.csv (a row an epoch), curves.png, log.txt, last.pt (all that a resumed run needs),
best.safetensors (`Model.from_pretrained("runs/NAME")` reads it) and test/ with summary.json,
per_image.csv and overlays. On the CPU a resumed run gives the same numbers, bit for bit, as one
that never stopped.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import evaluate
import layouts
import report
from adapters import merge_lora, merged_state_dict
from recipes import FAMILIES, Settings, choose_trained, keep_features, lr_factor

# --- options -------------------------------------------------------------------------------------


def option(default, help: str, **argparse_too):
    """A field of Options, with what argparse needs to know of it."""
    metadata = {"help": help} | argparse_too
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata | {"nargs": "+"})
    return field(default=default, metadata=metadata)


def probability(text: str) -> float | str:
    return text if text == "auto" else float(text)


SCHEDULES = ["cosine", "poly", "constant", "multistep", "plateau"]
DTYPES = ["float32", "bfloat16", "float16"]
TRAINED = ["all", "decoder", "adapters", "lora"]
SIZES = ["image", "network"]


@dataclass
class Options:
    """The command line. None: the recipe's value or, where a recipe has no such setting, off."""

    model: str = option("cris", "which model", choices=sorted(FAMILIES))
    variant: str | None = option(None, "which size of it, a key of the model's VARIANTS")
    weights: str | None = option(None, "hub id (id@revision), file, run folder; none: from scratch")
    recipe: str | None = option(None, "default, or a published protocol: see recipes.py")
    data: list[str] = option([], "data sets to train and validate on; several are pooled")
    test: list[str] = option([], "data sets to test on, PATH[:split]; else --data's test splits")
    prompt: str | None = option(None, 'prompt types (p6; p6,p3; random), or a literal "text"')
    train: str | None = option(None, "all, or some parts only: see recipes.py", choices=TRAINED)
    lora_rank: int | None = option(None, "of the updates that --train lora puts on linear layers")
    adapter_dim: int | None = option(None, "width of the adapters of --train adapters")
    keep_features: bool | None = option(None, "of frozen towers, on files; turns augmentation off")
    negatives: float | None = option(None, "share of samples that ask for another image's target")
    prompt_study: bool = option(False, "test every prompt type, in one table")
    out: str | None = option(None, "run folder; else runs/MODEL-DATA[-RECIPE]")
    resume: bool = option(False, "go on where the run in --out stopped")
    eval: bool = option(False, "no training: test --weights")
    epochs: int | None = option(None, "0 is the same as --eval")
    max_steps: int | None = option(None, "stop after so many optimiser steps")
    batch_size: int | None = option(None, "images a step")
    grad_accum_steps: int = option(1, "batches whose gradients make one step")
    lr: float | None = option(None, "learning rate of the new parts")
    backbone_lr: float | None = option(None, "of the pretrained ones; with --weights none: --lr")
    weight_decay: float | None = option(None, "of the optimiser")
    schedule: str | None = option(None, "learning rate over time", choices=SCHEDULES)
    warmup: float | None = option(None, "share of all steps in which the rate rises from 0")
    clip_grad: float | None = option(None, "largest gradient norm; 0: not clipped")
    ema: float | None = option(None, "decay of an average of the weights, to be tested and kept")
    patience: int | None = option(None, "epochs without a better validation Dice before it stops")
    size: int | None = option(None, "side of the model's input in pixels")
    threshold: float | str | None = option(
        None, "a foreground pixel's probability; auto: the best in validation", type=probability
    )
    dtype: str | None = option(None, "of training on a GPU; all else is float32", choices=DTYPES)
    compile: bool = option(False, "torch.compile")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option(2, "data-loading processes")
    seed: int = option(0, "of the order, the augmentation, and new weights")
    deterministic: bool = option(False, "only deterministic operations, slower on a GPU")
    cache: str = option(".cache", "folder of the decoded images")
    fold: str | None = option(None, "k/n: validate on fold k (from 0) of n of train and val")
    group_regex: str | None = option(None, "what in an image's name names the patient")
    score_size: str = option("image", "score at its own or the network's size", choices=SIZES)
    val_distances: bool = option(False, "HD95, ASSD and NSD also in validation, not only in tests")
    overlays: int = option(3, "how many of the worst, median and best cases to draw")
    save_every: float = option(10.0, "minutes between saved states within an epoch")


# What may differ between a run and its resumption without changing its numbers.
FREE = {"resume", "out", "workers", "device", "cache", "save_every", "overlays"}


def parse(arguments: list[str] | None = None) -> dict:
    """The options that were given, by name."""
    parser = report.Parser(__doc__)
    for spec in fields(Options):
        kind, *_ = get_args(spec.type) or [spec.type]  # of `int | None`, `list[str]` the first
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        flag = "--" + spec.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, **how | spec.metadata)
    return vars(parser.parse_args(arguments))


def resolve(options: Options) -> tuple[Options, Settings]:
    """Fills what is open from the tested run folder and from the recipe; checks the rest."""
    if options.eval or options.epochs == 0:
        options = replace(options, eval=True, epochs=0)
        tested = evaluate.run_config(options.weights)
        if tested:
            prompt = options.prompt or tested["options"]["prompt"]
            options = replace(options, model=tested["model"], prompt=prompt)
    family, name = FAMILIES[options.model], options.recipe or "default"
    if name not in family.settings:
        raise ValueError(f"--recipe {name}: {options.model} has {', '.join(family.settings)}")
    if options.variant is not None and options.variant not in family.variants:
        have = ", ".join(family.variants)
        raise ValueError(f"--variant {options.variant}: {options.model} has {have}")
    if options.variant is not None and options.weights not in (None, "none"):
        raise ValueError("--variant: leave it out, --weights say themselves what they are")
    if not family.reads and (options.prompt or options.negatives):
        raise ValueError(f"--prompt, --negatives: {options.model} reads no text")
    if not options.data and (not options.test or not options.eval or options.threshold == "auto"):
        raise ValueError("--data is missing: which data set?")
    settings = family.settings[name]
    shared = {spec.name for spec in fields(Settings)} & {spec.name for spec in fields(Options)}
    shared -= {"weights"}
    given = {key: getattr(options, key) for key in shared if getattr(options, key) is not None}
    if options.weights == "none" and options.backbone_lr is None:  # nothing is pretrained
        given["backbone_lr"] = given.get("lr", settings.lr)
    settings = replace(settings, **given)
    options = replace(options, **{key: getattr(settings, key) for key in shared})
    for key in ("batch_size", "grad_accum_steps"):
        if getattr(options, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if options.out is None:
        places = options.data or options.test
        sets = [Path(place.rpartition(":")[0] or place).name for place in places]
        words = [options.model, "+".join(sets), options.recipe, "eval" if options.eval else None]
        options = replace(options, out=str(Path("runs") / "-".join(filter(None, words))))
    return options, settings


# --- the loop ------------------------------------------------------------------------------------


class Run:
    """One training: the model, what trains it, where it stands, and its folder."""

    PARTS = ("model", "optimizer", "scheduler", "scaler", "ema")
    PLACE = ("epoch", "batch", "step", "sums", "history", "best", "best_epoch")

    def __init__(self, options: Options, settings: Settings, model, recipe, train_set, val_set):
        self.options, self.settings, self.recipe, self.model = options, settings, recipe, model
        self.train_set, self.val_set, self.out = train_set, val_set, Path(options.out)
        self.device = next(model.parameters()).device
        self.net = torch.compile(model) if options.compile else model  # the same parameters
        self.batches = data.batches_per_epoch(len(train_set), options.batch_size)
        steps = math.ceil(self.batches / options.grad_accum_steps)
        self.total_steps = min(options.epochs * steps, options.max_steps or math.inf)

        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        fused = self.device.type in ("cpu", "cuda")  # one pass over all parameters
        groups = recipe.groups(model, settings)
        self.optimizer = optimizer(groups, amsgrad=settings.amsgrad, fused=fused)
        if settings.schedule == "plateau":
            self.scheduler = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=5)
        else:
            factor = partial(lr_factor, total=self.total_steps, settings=settings)
            self.scheduler = LambdaLR(self.optimizer, factor)
        self.dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, options.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        average = get_ema_multi_avg_fn(options.ema) if options.ema else None
        self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if average else None

        self.epoch, self.batch, self.step = 0, 0, 0  # `batch` counts within the epoch
        self.sums, self.history = {}, []  # losses of this epoch so far; the rows of metrics.csv
        self.best, self.best_epoch = -1.0, 0

    def save(self) -> None:
        """Everything that going on needs, to last.pt. Data and augmentation need only seeds."""
        state = {name: getattr(self, name) for name in self.PLACE}
        state |= {k: getattr(self, k).state_dict() for k in self.PARTS if getattr(self, k)}
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state |= {"random": torch.get_rng_state(), "random_cuda": cuda}
        with report.whole_file(self.out / "last.pt") as part:
            torch.save(state, part)

    def load(self) -> None:
        state = torch.load(self.out / "last.pt", map_location="cpu", weights_only=True)
        for name in self.PLACE:
            setattr(self, name, state[name])
        for name in self.PARTS:
            if getattr(self, name):
                getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def train_mode(self) -> None:
        """Training mode, but not for modules that are frozen whole: norms keep their statistics."""
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def optimizer_step(self, batches) -> None:
        """One step along the mean gradient of one or several batches."""
        count = min(self.options.grad_accum_steps, self.batches - self.batch)
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
        title, said = f"epoch {self.epoch + 1}/{self.options.epochs}", (saved := time.time())
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
            if time.time() - saved > 60 * self.options.save_every:
                self.mean_loss()
                self.save()
                saved = time.time()
        bar.close()

    def end_epoch(self) -> None:
        """Validates; writes the row of metrics.csv, the best weights, the state to go on from."""
        self.mean_loss()
        model, o = self.ema.module if self.ema else self.model, self.options
        scores = evaluate.validate(model, self.recipe, self.val_set, o)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": rate}
        row |= {f"train_{name}": float(value) / self.batch for name, value in self.sums.items()}
        row |= scores
        if self.settings.schedule == "plateau":
            self.scheduler.step(row["val_loss"])
        shown = {k: v for k, v in row.items() if k == "train_loss" or k.startswith("val_")}
        words = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        print(f"epoch {self.epoch + 1}/{o.epochs}  step {self.step}  {words}")
        self.history.append(row)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        if row["val_dice"] > self.best + self.settings.min_delta:
            self.best, self.best_epoch = row["val_dice"], self.epoch
            with report.whole_file(self.out / "best.safetensors") as part:
                save_file({k: v.contiguous() for k, v in merged_state_dict(model).items()}, part)
        report.write_csv(self.out / "metrics.csv", self.history)
        report.curves(self.out / "curves.png", self.history)
        self.save()  # last: a kill before it means that the epoch's end is done again

    def patience_lost(self) -> bool:
        waited, least = self.epoch - self.best_epoch, self.settings.min_epochs
        patience = self.options.patience
        return bool(patience) and waited >= patience and self.epoch >= least

    def fit(self) -> None:
        """From where it stands to the end."""
        o = self.options
        inputs = self.recipe.inputs
        items = data.Items(self.train_set, o.prompt, inputs, True, o.seed, o.negatives)
        start = self.epoch * self.batches + self.batch
        order = data.train_batches(len(self.train_set), o.batch_size, o.epochs, o.seed, start)
        batches = iter(data.loader(items, order, o.workers, self.device))
        while self.step < self.total_steps and not self.patience_lost():
            self.train_epoch(batches)
            self.end_epoch()
        if self.patience_lost():
            print(f"stopped: validation Dice has not become better since epoch {self.best_epoch}")


# --- the program ---------------------------------------------------------------------------------


def can_resume(options: Options) -> bool:
    """True if --out holds a state to go on from. Refuses to write over another run."""
    out, mine = Path(options.out), json.loads(json.dumps(asdict(options)))
    if not options.resume and ((out / "config.json").exists() or (out / "test").exists()):
        raise ValueError(f"{out} holds a run already; --resume goes on, --out is another folder")
    if not (out / "last.pt").is_file():
        if options.resume:
            print(f"{out} holds nothing to go on from; starting at the beginning")
        return False
    theirs = asdict(Options()) | json.loads((out / "config.json").read_text())["options"]
    changed = [key for key in mine if key not in FREE and mine[key] != theirs.get(key)]
    if changed:
        words = [f"--{key.replace('_', '-')} {theirs.get(key)} -> {mine[key]}" for key in changed]
        raise ValueError(f"{out} was begun with other options ({', '.join(words)}); keep those")
    return True


def write_config(options: Options, model, train_set, val_set) -> None:
    """config.json of a run folder; `from_pretrained` reads `class` and `config` of it."""
    content = {
        "format": 1,
        "model": options.model,
        "class": type(model).__name__,
        "config": asdict(model.config),
        "classes": list(train_set.classes),
        "recipe": options.recipe or "default",
        "options": asdict(options),
        "data": {"train": train_set.describe(), "val": val_set.describe()},
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    report.write_json(Path(options.out) / "config.json", content)


def load_model(options: Options, settings: Settings, train_set, device: torch.device):
    # Weights that are only tested keep what they came with, unless a recipe is named.
    overrides = dict(settings.config) if options.recipe or not options.eval else {}
    overrides |= {"image_size": options.size} if options.size else {}
    overrides |= {} if options.threshold in (None, "auto") else {"threshold": options.threshold}
    load = FAMILIES[options.model].load
    return load(options.weights, options.variant, settings, overrides, train_set).to(device)


def fit(options: Options, settings: Settings, model, recipe, sets, resume: bool) -> None:
    """Trains what is to be trained; the model then is the best one."""
    family = FAMILIES[options.model]
    choose_trained(model, family, settings)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    device = next(model.parameters()).device
    print(f"training {trained:,} of {total:,} parameters on {device}")
    if settings.keep_features:
        recipe = keep_features(recipe, model, family.backbone, sets, options)
    run = Run(options, settings, model, recipe, *sets)
    if resume:
        run.load()
        print(f"resumed in epoch {run.epoch + 1}, at step {run.step}")
    else:
        write_config(options, model, *sets)
        for name, path in recipe.files.items():
            shutil.copyfile(path, run.out / name)
    run.fit()
    merge_lora(model)
    model.load_state_dict(load_file(run.out / "best.safetensors", device=str(device)))


def fit_and_test(options: Options, settings: Settings, device: torch.device, resume: bool) -> dict:
    given = {key: value for key, value in asdict(options).items() if value not in (None, [])}
    print("  ".join(f"{key}={value}" for key, value in given.items()))
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)
    tests, sets = evaluate.open_tests(options), {}
    if not options.eval or options.threshold == "auto":
        parts = layouts.train_and_val(
            options.data, options.seed, options.group_regex, options.fold
        )
        parts = dict(zip(("train", "val"), parts, strict=True))
        for name in ("val",) if options.eval else parts:
            sets[name] = data.open_dataset(parts[name], options.cache)
            print(f"{name}: {sets[name].describe()}")
    model = load_model(options, settings, sets.get("train"), device)
    evaluate.check_classes(model, [*sets.values(), *tests.values()], options)
    recipe = FAMILIES[options.model].recipe(model, settings)
    if not options.eval:
        fit(options, settings, model, recipe, sets.values(), resume)
    if options.threshold == "auto":
        threshold = evaluate.best_threshold(model, recipe, sets["val"], options)
        model.config = replace(model.config, threshold=threshold)
        if not options.eval:
            write_config(options, model, *sets.values())
    ask = evaluate.prompt_study if options.prompt_study else evaluate.test
    return ask(model, recipe, tests, options) if tests else {}


def run(options: Options) -> dict:
    """All that the command line does. Returns the summary of the test, {} without one."""
    options, settings = resolve(options)
    device, resume = evaluate.pick_device(options.device), can_resume(options)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with open(Path(options.out) / "log.txt", "a", 1, encoding="utf-8") as file:
        with contextlib.redirect_stdout(report.Log(sys.stdout, file)):
            return fit_and_test(options, settings, device, resume)


def main() -> int:
    given = parse()
    saved = Path(given.get("out", "")) / "config.json"
    if given.get("resume") and saved.is_file():  # --resume --out RUN is enough
        given = json.loads(saved.read_text())["options"] | given
    run(Options(**given))
    return 0


if __name__ == "__main__":
    report.command(main)
