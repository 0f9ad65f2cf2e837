"""Fine-tunes, tests and resumes every model of this project on folders of images and masks.

    python train.py --model cris --data data/kvasir_polyp                  # fine-tune, then test
    python train.py --resume --out runs/cris-kvasir_polyp                  # go on where it stopped
    python train.py --weights runs/cris-kvasir_polyp --eval --test data/cvc300_polyp
    python train.py --weights cris_best.pth --data data/busi --epochs 0 --prompt p1     # zero-shot

What is not given comes from the recipe (recipes.py). The run folder, runs/NAME, holds config.json,
metrics.csv (a row an epoch), curves.png, log.txt, last.pt (all that a resumed run needs),
best.safetensors (`Model.from_pretrained("runs/NAME")` reads it), where only a part was trained
that part in adapter.safetensors (adapters.py), and test/ with summary.json, per_image.csv and
overlays. On the CPU a resumed run gives the same numbers, bit for bit, as one that never stopped.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import evaluate
import layouts
import recipes
import report
import volumes
from adapters import merge_lora, merged_state_dict, save_adapter
from options import Options, check_same, parse, resolve
from protocol import (
    Settings, allow_single_values, choose_trained, describe_cuts, keep_features, lr_factor,
)  # fmt: skip
from recipes import FAMILIES, second_file

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
        self.best, self.best_epoch = -1.0, 0  # highest validation Dice, and the epoch that had it
        # The epoch whose weights are kept, and its scores: one as good as the best may be later.
        self.chosen = {"epoch": 0, "dice": math.nan, "loss": None, "threshold": None}

    def save(self) -> None:
        """Everything that going on needs, to last.pt. Data and augmentation need only seeds."""
        state = {name: getattr(self, name) for name in self.PLACE}
        state["chosen"] = self.chosen
        state |= {k: getattr(self, k).state_dict() for k in self.PARTS if getattr(self, k)}
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state |= {"random": torch.get_rng_state(), "random_cuda": cuda}
        with report.whole_file(self.out / "last.pt") as part:
            torch.save(state, part)

    def load(self) -> None:
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # cut off, or a pickle that calls something
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(
                f"{path}: cannot be read, so the run cannot be resumed ({reason:.150}); "
                "start again with another --out"
            ) from None
        for name in self.PLACE:
            setattr(self, name, state[name])
        self.chosen = state["chosen"] if "chosen" in state else self.first_best()
        self.use_threshold()
        for name in self.PARTS:
            if getattr(self, name):
                getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random_cuda"])

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
        report.write_csv(self.out / "metrics.csv", self.history)
        report.curves(self.out / "curves.png", self.history)
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
        if self.options.train != "all":  # the small copy
            with report.whole_file(self.out / "adapter.safetensors") as part:
                save_adapter(model, part)
        with report.whole_file(self.out / "best.safetensors") as part:
            save_file({k: v.contiguous() for k, v in merged_state_dict(model).items()}, part)

        threshold = row.get("val_threshold")
        self.chosen = {"epoch": row["epoch"], "dice": row["val_dice"]}
        self.chosen |= {"loss": row.get("val_loss"), "threshold": threshold}
        if threshold is not None:
            self.use_threshold()
            write_config(self.options, self.model, self.train_set, self.val_set)

    def patience_lost(self) -> bool:
        waited, least = self.epoch - self.best_epoch, self.settings.min_epochs
        patience = self.options.patience
        if not patience or waited < patience or self.epoch < least:
            return False
        return "val_dice" in self.history[-1]  # else the next validation tells

    def fit(self) -> None:
        """From where it stands to the end."""
        o = self.options
        inputs = self.recipe.inputs
        items = data.Items(self.train_set, o.prompt, inputs, True, o.seed, o.negatives)
        start = self.epoch * self.batches + self.batch
        order = data.train_batches(len(self.train_set), o.batch_size, o.epochs, o.seed, start)
        collate = self.recipe.collate
        batches = iter(data.loader(items, order, o.workers, self.device, collate))
        while self.step < self.total_steps and not self.patience_lost():
            self.train_epoch(batches)
            self.end_epoch()
        if self.patience_lost():
            print(f"stopped: validation Dice has not become better since epoch {self.best_epoch}")


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
    check_same(out, {key: theirs.get(key) for key in mine}, mine)  # older runs may have had others
    return True


def write_config(options: Options, model, train_set, val_set) -> None:
    """config.json of a run folder; `from_pretrained` reads `class` and `config` of it."""
    content = {
        "format": 1,
        "model": options.model,
        "class": type(model).__name__,
        "config": asdict(model.config),
        "classes": list(getattr(model.config, "classes", ()) or train_set.classes),
        "labels": train_set.entries[0].labels,  # their numbers in volumes
        "recipe": options.recipe or "default",
        "options": asdict(options),
        "data": {"train": train_set.describe(), "val": val_set.describe()},
        "masks": data.named(getattr(train_set, "rules", {})),  # how they are read, {data set: rule}
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    if hasattr(model, "decoder_source"):  # BiomedCLIPSeg's; None: it started untrained
        content["decoder"] = model.decoder_source
    report.write_json(Path(options.out) / "config.json", content)


def load_model(options: Options, settings: Settings, train_set, device: torch.device):
    # Weights that are only tested keep what they came with, unless a recipe is named.
    overrides = dict(settings.config) if options.recipe or not options.eval else {}
    if options.size:
        sizes = tuple(options.size if len(options.size) == 3 else options.size * 3)
        overrides["image_size"] = sizes if FAMILIES[options.model].volumes else options.size[0]
    overrides |= {"spacing": tuple(options.spacing)} if options.spacing else {}
    overrides |= {"intensity": options.window} if options.intensity else {}
    overrides |= {} if options.threshold in (None, "auto") else {"threshold": options.threshold}
    overrides |= second_file(options.model, options.clip, options.decoder)
    start = options.weights, options.variant, settings, overrides, train_set
    return recipes.load_model(FAMILIES[options.model], *start).to(device)


def fit(options: Options, settings: Settings, model, recipe, sets, resume: bool) -> dict:
    """Train what is to be trained, then load the best weights into `model`.

    Returns which epoch they are of: `Run.chosen`.
    """
    family = FAMILIES[options.model]
    choose_trained(model, family, settings)
    allow_single_values(model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    device = next(model.parameters()).device
    print(f"training {trained:,} of {total:,} parameters on {device}")
    if options.checkpointing:  # of a model of volumes
        model.checkpointing = True
    if settings.augment is None:
        print(f"augmentation: {', '.join(settings.views)} of each image, nothing else")
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
    return run.chosen


def describe_choice(chosen: dict, tests: dict) -> str:
    """Return a line that says which epoch's weights were kept."""
    words = "testing the weights" if tests else "best.safetensors holds the weights"
    score = f"validation Dice {chosen['dice']:.4f}"
    if chosen["threshold"] is not None:
        score += f" at threshold {chosen['threshold']:g}"
    return f"{words} of epoch {chosen['epoch']} ({score})"


def open_sets(options: Options) -> tuple[dict, dict]:
    """Data sets to train on and test: {"train": …, "val": …}, fewer if fewer are used; tests by
    name. With --overfit they all are the same cases."""
    if options.overfit:
        each = (layouts.annotations(root, "train", options.group_regex) for root in options.data)
        name = "--overfit: train, val and test are the same"
        one = evaluate.open_sets({name: sum(each, [])[: options.overfit]}, options)[name]
        print("  scores then tell that the parts fit together, and nothing of new cases")
        return {"train": one, "val": one}, {"overfit": one}
    tests = evaluate.list_tests(options)
    lists = {f"test {name}": entries for name, entries in tests.items()}
    if not options.eval or options.threshold == "auto":
        parts = layouts.train_and_val(options.data, options.seed, options.group_regex, options.fold)
        lists |= dict(zip(("train", "val"), parts, strict=True))
    if options.eval:
        lists.pop("train", None)
    opened = evaluate.open_sets(lists, options)
    sets = {name: opened[name] for name in ("train", "val") if name in opened}
    return sets, {name: opened[f"test {name}"] for name in tests}


def check_prompts(options: Options, tokenizer, sets: dict, tests: dict) -> None:
    """Hand the model's tokenizer to the data sets, which compare prompts by it; say what is cut.

    Raises ValueError if --negatives cannot find a prompt of another image that differs.
    """
    texts = set()
    for dataset in [*sets.values(), *tests.values()]:
        dataset.compare_prompts_by(tokenizer)
        for entry in dataset.entries:
            kinds = entry.prompts if options.prompt_study else [options.prompt]
            for kind in kinds:
                texts.update(entry.texts(kind))

    cuts = describe_cuts(texts, tokenizer)
    if cuts:
        title = "prompts of all types" if options.prompt_study else f"prompt {options.prompt}"
        print(f"{title}: {cuts}")
    if options.negatives and not options.eval:
        sets["train"].check_negatives(options.prompt)


def fit_and_test(options: Options, settings: Settings, device: torch.device, resume: bool) -> dict:
    given = {key: value for key, value in asdict(options).items() if value not in (None, [])}
    print("  ".join(f"{key}={value}" for key, value in given.items()))
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)

    family = FAMILIES[options.model]
    sets, tests = open_sets(options)
    evaluate.check_kind([*sets.values(), *tests.values()], family.volumes, options.model)
    model = load_model(options, settings, sets.get("train"), device)
    recipe = family.recipe(model, settings)
    evaluate.check_classes(model, recipe, [*sets.values(), *tests.values()], options)

    if recipe.tokenizer:
        check_prompts(options, recipe.tokenizer, sets, tests)
    if recipe.prepare:
        sets, tests = (
            {name: recipe.prepare(part, options.cache) for name, part in parts.items()}
            for parts in (sets, tests)
        )
        evaluate.check_prepared(sets, tests, options)
    if options.boxes or options.points:
        recipe = evaluate.with_given(recipe, tests, options.boxes, options.points)

    threshold = None
    if not options.eval:
        chosen = fit(options, settings, model, recipe, list(sets.values()), resume)
        threshold = chosen["threshold"]
        print(describe_choice(chosen, tests))

    if options.threshold == "auto":
        if threshold is None:  # nothing was trained, or only before validations chose a threshold
            threshold = evaluate.best_threshold(model, recipe, sets["val"], options)
        model.config = replace(model.config, threshold=threshold)
        if not options.eval:
            write_config(options, model, *sets.values())

    ask = evaluate.prompt_study if options.prompt_study else evaluate.test
    return ask(model, recipe, tests, options) if tests else {}


def run(options: Options) -> dict:
    """Do all that the command line asks for. Return the summary of the test, {} without one."""
    options, settings = resolve(options)
    with report.claim(Path(options.out)):
        return run_in_folder(options, settings)


def run_in_folder(options: Options, settings: Settings) -> dict:
    """`run` in a folder that no other process writes to."""
    device, resume = evaluate.pick_device(options.device), can_resume(options)
    with open(Path(options.out) / "log.txt", "a", 1, encoding="utf-8") as file:
        log = contextlib.redirect_stdout(report.Log(sys.stdout, file))
        with log, volumes.notices.together():
            return fit_and_test(options, settings, device, resume)


def main() -> int:
    given = parse(__doc__)
    if not given.get("resume") or "out" not in given:
        run(Options(**given))
        return 0

    with report.claim(Path(given["out"])):
        saved = Path(given["out"]) / "config.json"
        if saved.is_file():  # --resume --out RUN is enough
            given = json.loads(saved.read_text())["options"] | given
        run_in_folder(*resolve(Options(**given)))
    return 0


if __name__ == "__main__":
    report.command(main)
