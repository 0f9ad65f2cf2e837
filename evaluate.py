"""Model, recipe and data set -> scores of every image, and the test folder of a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import layouts
import metrics
import report


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. A device that is named and missing: ValueError."""
    have = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return torch.device(next(kind for kind, count in have.items() if count))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; take auto, cpu, cuda, cuda:1 or mps") from None
    if (device.index or 0) >= have.get(device.type, 0):
        raise ValueError(f"--device {name}: not on this machine; take --device auto")
    return device


def run_config(weights: str | None) -> dict:
    """config.json of a run folder; {} for all other weights (a hub folder's is of another kind)."""
    path = Path(str(weights)) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config if "format" in config else {}


def predictions(model, recipe, dataset, options, title: str):
    """Yields for every entry its item, its probabilities (K,H,W), and its loss (or None).

    One image at a time, nothing is kept: memory does not grow with the data set.
    """
    device = next(model.parameters()).device
    items = data.Items(dataset, options.prompt, recipe.inputs, train=False, seed=options.seed)
    loader = data.loader(items, [[(0, i)] for i in range(len(dataset))], options.workers, device)
    model.eval()
    for item in tqdm(loader, title, len(dataset), unit="image", disable=None, leave=False):
        if options.score_size == "network":
            item |= {"size": item["mask"].shape[-2:], "truth": item["mask"].round()}
        with torch.no_grad():
            probabilities, output = recipe.predict(model, item)
            loss = None
            if output is not None:
                loss = float(recipe.loss(output, {"mask": item["mask"][None].to(device)})[0])
        yield item, probabilities.cpu().numpy(), loss


def foreground(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that are scored: of several all but the first."""
    return classes[1:] if len(classes) > 1 else classes


def to_masks(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """(K,H,W) -> bool (K,H,W): above the threshold if K is 1, else where a class is the largest."""
    k = len(probabilities)
    if k == 1:
        return probabilities > threshold
    return probabilities.argmax(0) == np.arange(k)[:, None, None]


def truth_masks(item: dict, n: int) -> np.ndarray:
    """bool (n,H,W): where an entry's truth is 1, ..., n."""
    return item["truth"].numpy() == np.arange(1, n + 1)[:, None, None]


def num_classes(model) -> int:
    """1 of a model that finds what a prompt asks for."""
    return getattr(model.config, "num_classes", 1)


def check_threshold(k: int, threshold) -> None:
    if k > 1 and threshold is not None:
        raise ValueError("--threshold: the most probable of several classes counts, drop it")


def check_classes(model, datasets, options) -> None:
    """ValueError, one line, if a data set has other classes than the model."""
    k, names = num_classes(model), run_config(options.weights).get("classes")
    for dataset in datasets:
        root, have = dataset.entries[0].root, len(dataset.classes)
        if have != k:
            told = f"{root} has {have} ({', '.join(dataset.classes)})"
            hint = "label its entries for a model that reads, or take another --model"
            raise ValueError(f"{type(model).__name__} tells {k} classes apart, {told}; {hint}")
        if options.eval and k > 1 and names and list(dataset.classes) != names:
            theirs = ", ".join(names)
            raise ValueError(f"{root}: {', '.join(dataset.classes)}, but trained were {theirs}")
        check_threshold(k, options.threshold)


def best_threshold(model, recipe, dataset, options) -> float:
    """The one of 0.05, 0.10, ..., 0.95 with the highest mean Dice."""
    thresholds, dice = np.arange(1, 20) / 20, []
    for item, probabilities, _ in predictions(model, recipe, dataset, options, "threshold"):
        masks = [probabilities > threshold for threshold in thresholds]
        dice.append([score(item, m, dataset.classes, False)[0]["dice"] for m in masks])
    mean = np.mean(dice, axis=0)
    best = float(thresholds[mean.argmax()])
    print(f"threshold {best}: validation Dice {mean.max():.4f}, {mean[9]:.4f} at 0.5")
    return best


def evaluate(model, recipe, dataset, options, distances: bool, title: str) -> list[dict]:
    """Scores of every entry and class, a dict each. `distances`: also HD95, ASSD and NSD."""
    rows = []
    for item, probabilities, loss in predictions(model, recipe, dataset, options, title):
        masks = to_masks(probabilities, model.config.threshold)
        rows += [row | {"loss": loss} for row in score(item, masks, dataset.classes, distances)]
    return rows


def score(item: dict, masks: np.ndarray, classes, distances: bool) -> list[dict]:
    """Scores of one entry, a dict a class, with what tells whose they are; of the background, last,
    only its counts. masks: bool (K,H,W)."""
    where = {key: item[key] for key in ("dataset", "name", "group", "prompt")}
    truth, names = item["truth"].numpy(), foreground(classes)  # (1,H,W)
    valid = None if (truth != 255).all() else truth[0] != 255
    found, there = masks[-len(names) :], truth_masks(item, len(names))  # without the background
    scores = metrics.score_image(found, there, valid, with_distances=distances)
    rows = [where | {"class": k} | row for k, row in zip(names, scores, strict=True)]
    if len(classes) > 1:
        counts = metrics.overlap(masks[0], truth[0] == 0, valid)
        rows.append(where | {"class": classes[0]} | {k: counts[k] for k in ("tp", "fp", "fn")})
    return rows


def validate(model, recipe, dataset, options) -> dict[str, float]:
    """val_loss, val_dice, val_iou, and the distances if asked for: means as those of a test."""
    distances = options.val_distances
    rows = evaluate(model, recipe, dataset, options, distances, "validate")
    summary = metrics.summarise(rows, foreground(dataset.classes))
    names = ["dice", "iou"] + ["hd95", "assd", "nsd"] * distances
    loss = float(np.mean([row["loss"] for row in rows]))
    return {"val_loss": loss} | {f"val_{name}": summary[name]["mean"] for name in names}


def dice_by_entry(rows: list[dict], dataset) -> np.ndarray:
    """(n,): the mean over those classes that count for an entry; 1 if none does."""
    dice = {entry.name: [] for entry in dataset.entries}
    for row in rows:
        if "dice" in row and (len(dataset.classes) == 1 or row["in_truth"] or row["in_pred"]):
            dice[row["name"]].append(row["dice"])
    return np.array([np.mean(scores) if scores else 1.0 for scores in dice.values()])


def draw(model, recipe, dataset, rows: list[dict], options, folder: Path) -> None:
    """Overlays of the worst, median and best cases by Dice, and one sheet of them all."""
    n = min(options.overlays, len(dataset))
    if n == 0:
        return
    dice, names = dice_by_entry(rows, dataset), foreground(dataset.classes)
    order, middle = np.argsort(dice, kind="stable"), (len(dice) - n) // 2
    chosen = {"worst": order[:n], "median": order[middle : middle + n], "best": order[::-1][:n]}
    cases = [
        (f"{kind}{k + 1}", i) for kind, indices in chosen.items() for k, i in enumerate(indices)
    ]
    part, cards = dataset.subset([i for _, i in cases]), []
    for k, (item, probabilities, _) in enumerate(
        predictions(model, recipe, part, options, "draw")
    ):
        case, i = cases[k]
        masks = to_masks(probabilities, model.config.threshold)[-len(names) :]
        h, w = masks.shape[1:]  # not the image's with --score-size network
        image = np.asarray(Image.fromarray(part.pixels(k)[0]).resize((w, h)))
        picture = report.overlay(image, truth_masks(item, len(names)), masks)
        report.save_picture(folder / f"{case}_{Path(item['name']).name}.png", picture)
        words = f"“{item['prompt']}”" if item["prompt"] else "no text"
        words = words if recipe.read else Path(item["name"]).name
        cards.append(report.captioned(picture, f"{case}: Dice {dice[i]:.3f}  {words}"))
    page = report.sheet(cards, n)
    if len(names) > 1:
        page = report.sheet([page, report.legend(names)], 1)
    report.save_picture(folder / "sheet.png", page)


def test(model, recipe, tests: dict, options) -> dict:
    """Scores of every test set, printed and written to `test/` of the run; returns the summary."""
    folder, summaries, every = Path(options.out) / "test", {}, []
    for name, dataset in tests.items():
        rows = evaluate(model, recipe, dataset, options, True, f"test {name}")
        summaries[name] = metrics.summarise(rows, foreground(dataset.classes))
        every += [{"test": name} | row for row in rows]
        prompt = f", prompt {options.prompt}" if recipe.read else ""
        print(f"test {name}{prompt}:\n{report.table(summaries[name])}")
        where = folder / "overlays" / (name.replace(":", "-") if len(tests) > 1 else "")
        draw(model, recipe, dataset, rows, options, where)
        if options.overlays:
            one, several = "green: truth, magenta: prediction", "truth outlined, prediction filled"
            what = one if len(dataset.classes) == 1 else several
            print(f"  overlays ({what}): {where / 'sheet.png'}")
    return write_summary(folder, model, options, summaries, every)


def write_summary(folder: Path, model, options, summaries: dict, rows: list[dict]) -> dict:
    """summary.json and per_image.csv; returns what is in the former."""
    kept = ("model", "weights", "recipe", "prompt", "score_size")
    summary = {key: getattr(options, key) for key in kept}
    summary |= {"threshold": model.config.threshold, "tests": summaries}
    report.write_json(folder / "summary.json", summary)
    report.write_csv(folder / "per_image.csv", rows)
    return summary


@dataclass
class EveryPrompt(torch.utils.data.Dataset):
    """What a worker makes of entry i: its inputs with a prompt of every type."""

    dataset: data.Dataset
    recipe: object
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, dict]:
        item = self.recipe.inputs(self.dataset.sample(i, self.kinds[0]), train=False, rng=None)
        entry = self.dataset.entries[i]
        texts = {kind: entry.text(kind) for kind in self.kinds}
        return {k: item | self.recipe.read(text) | {"prompt": text} for k, text in texts.items()}


def score_every_prompt(model, recipe, dataset, options, title: str) -> dict[str, list[dict]]:
    """Scores of every entry by prompt type, for the types that all entries have.

    Where the model has `encode_image`, an image passes through its encoder once for all prompts.
    """
    kinds = [k for k in dataset.entries[0].prompts if all(k in e.prompts for e in dataset.entries)]
    rows, device = {kind: [] for kind in kinds}, next(model.parameters()).device
    study = EveryPrompt(dataset, recipe, kinds)
    loader = torch.utils.data.DataLoader(study, None, num_workers=options.workers)
    for items in tqdm(loader, title, unit="image", disable=None, leave=False):
        kept = {}
        with torch.no_grad():
            if hasattr(model, "encode_image"):
                image = items[kinds[0]]["image"][None].to(device)
                kept = {"features": model.encode_image(image)[0]}
            for kind, item in items.items():
                probabilities, _ = recipe.predict(model, item | kept)
                masks = to_masks(probabilities.cpu().numpy(), model.config.threshold)
                rows[kind] += score(item, masks, dataset.classes, distances=False)
    return rows


def prompt_study(model, recipe, tests: dict, options) -> dict:
    """Scores of every test set with every prompt type, in one table; returns the summary."""
    summaries, every = {}, []
    if recipe.read is None:
        raise ValueError(f"--prompt-study: {type(model).__name__} reads no prompts")
    model.eval()
    for name, dataset in tests.items():
        rows = score_every_prompt(model, recipe, dataset, options, f"study {name}")
        summaries[name] = {k: metrics.summarise(r, dataset.classes) for k, r in rows.items()}
        every += [{"test": name, "type": kind} | row for kind in rows for row in rows[kind]]
        examples = {kind: cases[0]["prompt"] for kind, cases in rows.items()}
        print(f"test {name}, every type of prompt:")
        print(report.study_table(summaries[name], examples))
    return write_summary(Path(options.out) / "test", model, options, summaries, every)


def open_tests(options) -> dict[str, data.Dataset]:
    """Test sets by name: those of --test, else the test splits of --data. ValueError, one line."""
    tests = {}
    for place in options.test or options.data:
        path, _, split = place.rpartition(":")
        if not path or Path(place).is_dir():
            path, split = place, "test"
        if not options.test and not options.eval and "test" not in layouts.splits(path):
            print(f"{path}: no test split, so it is not tested on; name another with --test")
            continue
        name = Path(path).resolve().name + ("" if split == "test" else f":{split}")
        if name in tests:
            raise ValueError(f"two test sets are called {name}; rename a folder")
        tests[name] = data.open_dataset(
            layouts.annotations(path, split, options.group_regex), options.cache
        )
        print(f"test {name}: {tests[name].describe()}")
    return tests
