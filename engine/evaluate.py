"""Model, recipe and data set -> scores of every image, and the test folder of a run."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import metrics
from engine.runs import num_classes
from engine.tables import ABSENT, INTERVALS, score_table, study_table, write_csv, write_json
from imaging import layouts, pictures


def predictions(model, recipe, dataset, settings, title: str):
    """Yields for every entry its item, its probabilities (K,*size), and its loss (or None); not for
    those of which `nothing_asked` is true.

    One image at a time, nothing is kept: memory does not grow with the data set.
    """
    device = next(model.parameters()).device
    items = data.Items(dataset, settings.prompt, recipe.inputs, train=False, seed=settings.seed)
    workers = 0 if dataset.is_mapped else settings.workers
    loader = data.loader(items, [[(0, i)] for i in range(len(dataset))], workers, device)
    model.eval()
    for item in tqdm(loader, title, len(dataset), unit="image", disable=None, leave=False):
        if nothing_asked(item):
            continue
        if settings.score_size == "network":
            item |= {"size": item["mask"].shape[-2:], "truth": item["mask"].round()}
        with torch.no_grad():
            probabilities, output = recipe.predict(model, item)
            loss = None
            if output is not None:
                loss = float(recipe.loss(output, {"mask": item["mask"][None].to(device)})[0])
        found = probabilities.cpu().numpy()
        del probabilities, output  # of volumes gigabytes
        yield item, found, loss
        del item, found


def each_is(numbers: np.ndarray, classes) -> np.ndarray:
    """Class numbers (*size) -> bool (n,*size): where they are each of n."""
    return np.equal.outer(np.asarray(classes), numbers)


def to_masks(probabilities: np.ndarray, config) -> np.ndarray:
    """(K,*size) -> bool (K,*size): above the threshold if K is 1, else where a class is the
    largest. Of classes that overlap those above the threshold, and first where none is: (1+K,*size)
    """
    if len(probabilities) == 1:
        return probabilities > config.threshold
    if getattr(config, "overlapping", False):
        masks = probabilities > config.threshold
        return np.concatenate([~masks.any(0, keepdims=True), masks])
    return each_is(probabilities.argmax(0), range(len(probabilities)))


def truth_masks(item: dict, n: int) -> np.ndarray:
    """bool (n,*size): where an entry's truth is 1, ..., n, or is in each region."""
    truth = item["truth"].numpy()[0]
    if item.get("regions"):
        return np.stack([np.isin(truth, numbers) for numbers in item["regions"]])
    return each_is(truth, range(1, n + 1))


THRESHOLDS = [k / 20 for k in range(1, 20)]  # 0.05, 0.10, …, 0.95


def takes_threshold(model, dataset) -> bool:
    """Return True if one threshold decides what is foreground, so that --threshold auto works."""
    is_single = num_classes(model) == 1 and len(dataset.classes) == 1
    return is_single and not getattr(model.config, "overlapping", False)


def search_threshold(model, recipe, dataset, settings, title: str) -> tuple[dict, dict]:
    """Score a validation set at every one of THRESHOLDS, in one pass.

    Returns the scores of `validate` at the threshold with the highest mean Dice (the lowest such
    one, 0.5 if no case has foreground) with that threshold as val_threshold, and the mean Dice of
    each threshold. Memory grows by three numbers an image and threshold. Raises ValueError as
    `check_asked`.
    """
    cases = []  # a row an image, all but what depends on the threshold
    scores = []  # of each image and threshold: Dice, IoU, whether anything is predicted
    losses = []
    for item, probabilities, loss in predictions(model, recipe, dataset, settings, title):
        rows = []
        for threshold in THRESHOLDS:
            rows += score(item, probabilities > threshold, dataset.classes)  # one: a single class
        cases.append(rows[0])
        scores.append([(row["dice"], row["iou"], row["in_pred"]) for row in rows])
        if loss is not None:
            losses.append(loss)
    check_asked(cases, dataset, settings)

    # Means as in `metrics.summarise`: of patients where they are known, else of images.
    dice, iou, is_predicted = np.array(scores, float).transpose(2, 1, 0)  # (thresholds,n) each
    groups = []
    for row in cases:
        groups.append((row["dataset"], row["name"] if row["group"] is None else row["group"]))
    means = [metrics.mean_ci(values, groups)["mean"] for values in dice]

    has_foreground = any(row["in_truth"] for row in cases)
    best = int(np.argmax(means))
    if not has_foreground:  # the Dice of empty cases asks for the highest threshold, and no mask
        best = THRESHOLDS.index(0.5)
        print(f"{title}: no case has foreground to choose a threshold by; it stays 0.5")
    threshold = THRESHOLDS[best]
    result = {"val_loss": float(np.mean(losses))} if losses else {}
    result["val_dice"] = means[best]
    result["val_iou"] = metrics.mean_ci(iou[best], groups)["mean"]
    result["val_threshold"] = threshold
    if not is_predicted[best].any() and has_foreground:
        where = f"the best threshold, {threshold:g}"
        if not is_predicted.any():
            where = f"every threshold from {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}"
        print(f"{title}: all predictions are empty at {where}")
    return result, dict(zip(THRESHOLDS, means, strict=True))


def best_threshold(model, recipe, dataset, settings) -> float:
    """Return the threshold with the highest mean Dice, and print it."""
    scores, dice = search_threshold(model, recipe, dataset, settings, "threshold")
    best = scores["val_threshold"]
    print(f"threshold {best}: validation Dice {dice[best]:.4f}, {dice[0.5]:.4f} at 0.5")
    return best


def say_if_empty(rows: list[dict], model, dataset, settings, title: str) -> None:
    """Print a line if no prediction has any foreground although the ground truth has some."""
    scored = [row for row in rows if "in_pred" in row]
    if any(row["in_pred"] for row in scored) or not any(row["in_truth"] for row in scored):
        return
    message = f"{title}: all predictions are empty"
    if takes_threshold(model, dataset):
        message += f", nothing is above the threshold {model.config.threshold:g}"
        if settings.threshold != "auto":
            message += "; --threshold auto chooses the threshold and the epoch in validation"
    print(message)


def evaluate(model, recipe, dataset, settings, whole: bool, title: str) -> list[dict]:
    """Scores of every entry and class, a dict each; `whole`: also those that take time, `score`."""
    rows = []
    for item, probabilities, loss in predictions(model, recipe, dataset, settings, title):
        masks = to_masks(probabilities, model.config)
        more = probabilities if whole else None
        scores = score(item, masks, dataset.classes, more, settings.tolerance)
        rows += [row | {"loss": loss} for row in scores]
        del item, probabilities, masks, more  # before those of the next are made
    return check_asked(rows, dataset, settings)


def check_asked(rows: list[dict], dataset, settings) -> list[dict]:
    """The rows; ValueError if there are none, as `nothing_asked` left out all images."""
    if not rows:
        told = f"no image with a component of {settings.min_area} pixels or more"
        raise ValueError(f"{dataset.entries[0].root}: {told}; lower --min-area")
    return rows


def nothing_asked(item: dict) -> bool:
    """Whether the truth, of which an item's prompts are made, left nothing to ask for.

    Such an image is not scored: a prompt made of the truth cannot find what is not there.
    """
    is_given = item["prompt"].startswith("given")
    return not is_given and "boxes" in item and not len(item["boxes"])


def whose(item: dict) -> dict:
    """What tells of which entry scores are."""
    return {key: item[key] for key in ("dataset", "name", "group", "prompt")}


def score_masks(
    found: np.ndarray, there: np.ndarray, valid, probabilities=None, spacing=None, tolerance=1.0
) -> list[dict]:
    """metrics.score_image, and with the probabilities of the masks all other scores, too.

    Of volumes, which have a spacing in mm, these are the distances alone. tolerance: of the NSD, in
    mm where there is a spacing, else in pixels.
    """
    distances = probabilities is not None
    rows = metrics.score_image(found, there, valid, spacing, tolerance, distances)
    if probabilities is None or spacing is not None:
        return rows
    inside = True if valid is None else valid
    for row, mask, truth, p in zip(
        rows, found & inside, there & inside, probabilities, strict=True
    ):
        row["ap"] = metrics.average_precision(p, truth, valid)
        row |= metrics.betti_error(mask, truth)
    return rows


def score(item: dict, masks: np.ndarray, classes, probabilities=None, tolerance=1.0) -> list[dict]:
    """Scores of one entry, a dict a class, with what tells whose they are; of the background, last,
    only its counts. masks: bool (K,*size); with probabilities (K,*size) also HD95, ASSD, NSD at
    `tolerance`, and of images average precision and Betti errors."""
    classes = item.get("classes", classes)  # a volume knows which are annotated in it
    truth, names = item["truth"].numpy(), layouts.foreground(classes)  # (1,*size)
    valid, n = None if (truth != 255).all() else truth[0] != 255, len(names)
    more = None if probabilities is None else probabilities[-n:]  # without the background
    scores = score_masks(
        masks[-n:], truth_masks(item, n), valid, more, item.get("spacing"), tolerance
    )
    rows = [whose(item) | {"class": k} | row for k, row in zip(names, scores, strict=True)]
    if len(names) > 1:
        counts = metrics.overlap(masks[0], truth[0] == 0, valid)
        counts = {key: counts[key] for key in ("tp", "fp", "fn")}
        rows.append(whose(item) | {"class": classes[0]} | counts)
    return rows


def score_parts(
    item: dict, probabilities: np.ndarray, iou, threshold: float, tolerance: float = 1.0
) -> list[dict]:
    """Scores of the mask of each prompt, (Q,H,W), against that prompt's own truth: a dict each."""
    parts, classes = item["parts"].numpy(), item["classes"]  # (Q,H,W)
    valid = None if (parts[0] != 255).all() else parts[0] != 255
    rows = score_masks(
        probabilities > threshold, parts == 1, valid, probabilities, tolerance=tolerance
    )
    for k, (row, number) in enumerate(zip(rows, item["numbers"].tolist(), strict=True)):
        name = classes[number] if len(classes) > 1 else classes[0]
        rows[k] = whose(item) | {"class": name, "component": k} | row
        rows[k]["iou_estimate"] = float(iou.flatten()[k])
    return rows


def summarise_rows(rows: list[dict], dataset, settings) -> dict:
    """Return metrics.summarise of a data set's rows; beside distances nsd_tolerance, distance_unit.

    The unit is mm for volumes, else px: pixels of the masks that were compared.
    """
    summary = metrics.summarise(rows, layouts.foreground(dataset.classes))
    if "nsd" in summary:
        summary |= {"nsd_tolerance": settings.tolerance, "distance_unit": dataset.unit}
    return summary


def validate(model, recipe, dataset, settings) -> dict[str, float]:
    """Return val_loss, val_dice, val_iou and, if asked for, distances: means as those of a test.

    With --threshold auto these are the scores at the best threshold, val_threshold. Distances then
    take a second pass, at that threshold.
    """
    scores = {}
    config = model.config
    if settings.threshold == "auto":
        scores, _ = search_threshold(model, recipe, dataset, settings, "validate")
        if not settings.val_distances:
            return scores
        model.config = replace(config, threshold=scores["val_threshold"])

    distances = settings.val_distances
    rows = evaluate(model, recipe, dataset, settings, distances, "validate")
    model.config = config
    if settings.threshold != "auto":  # else it has been said
        say_if_empty(rows, model, dataset, settings, "validate")

    summary = metrics.summarise(rows, layouts.foreground(dataset.classes))
    names = ["dice", "iou"] + ["hd95", "assd", "nsd"] * distances
    losses = [row["loss"] for row in rows if row["loss"] is not None]  # volumes have none
    loss = {"val_loss": float(np.mean(losses))} if losses else {}
    return scores | loss | {f"val_{name}": summary[name]["mean"] for name in names}


def dice_by_entry(rows: list[dict], dataset) -> np.ndarray:
    """(n,): the mean over those classes that count for an entry; 1 if none does; nan if it has no
    scores."""
    dice, scored = {entry.name: [] for entry in dataset.entries}, {row["name"] for row in rows}
    for row in rows:
        if "dice" in row and (len(dataset.classes) == 1 or row["in_truth"] or row["in_pred"]):
            dice[row["name"]].append(row["dice"])
    empty = {name: 1.0 if name in scored else np.nan for name in dice}
    return np.array([np.mean(some) if some else empty[name] for name, some in dice.items()])


def spread(masks: np.ndarray, names, among) -> np.ndarray:
    """bool (n,*size), of n names -> (m,*size) of the m `among` which they are, empty for others."""
    whole = np.zeros((len(among), *masks.shape[1:]), bool)
    whole[[among.index(name) for name in names]] = masks
    return whole


def draw(model, recipe, dataset, rows: list[dict], settings, folder: Path) -> None:
    """Overlays of the worst, median and best cases by Dice, and one sheet of them all."""
    dice, names = dice_by_entry(rows, dataset), layouts.foreground(dataset.classes)
    order = np.argsort(dice, kind="stable")[: np.isfinite(dice).sum()]  # nan comes last
    n = min(settings.overlays, len(order))
    if n == 0:
        return
    middle = (len(order) - n) // 2
    chosen = {"worst": order[:n], "median": order[middle : middle + n], "best": order[::-1][:n]}
    cases = [
        (f"{kind}{k + 1}", i) for kind, indices in chosen.items() for k, i in enumerate(indices)
    ]
    part, cards = dataset.subset([i for _, i in cases]), []
    for k, (item, probabilities, _) in enumerate(
        predictions(model, recipe, part, settings, "draw")
    ):
        case, i = cases[k]
        own = layouts.foreground(item.get("classes", dataset.classes))  # of these
        truth = spread(truth_masks(item, len(own)), own, names)
        masks = spread(to_masks(probabilities, model.config)[-len(own) :], own, names)
        picture = part.overlay(k, truth, masks, model.preprocess)
        pictures.draw_prompts(picture, item.get("shown", []))
        pictures.save_picture(folder / f"{case}_{Path(item['name']).name}.png", picture)
        caption = f"{case}: Dice {dice[i]:.3f}  {recipe.caption(item)}"
        cards.append(pictures.captioned(picture, caption))
    page = pictures.sheet(cards, n)
    if len(names) > 1:
        page = pictures.sheet([page, pictures.legend(names)], 1)
    pictures.save_picture(folder / "sheet.png", page)


def test(model, recipe, tests: dict, settings) -> dict:
    """Scores of every test set, printed and written to `test/` of the run; returns the summary.

    Pictures come last: one that cannot be drawn loses no score.
    """
    folder, summaries, tables = Path(settings.out) / "test", {}, {"image": []}
    scored = {}
    for name, dataset in tests.items():
        rows, summaries[name], more = recipe.test(model, recipe, dataset, settings, name)
        for table, some in ({"image": rows} | more).items():
            tables.setdefault(table, []).extend({"test": name} | row for row in some)
        write_tables(folder, tables)  # the next test may fail
        scored[name] = rows
    summary = write_summary(folder, model, settings, summaries, tables)

    for name, dataset in tests.items():
        where = folder / "overlays" / (name.replace(":", "-") if len(tests) > 1 else "")
        draw(model, recipe, dataset, scored[name], settings, where)
        if settings.overlays:
            one, several = "green: truth, magenta: prediction", "truth outlined, prediction filled"
            what = one if len(dataset.classes) == 1 else several
            print(f"overlays ({what}): {where / 'sheet.png'}")
    return summary


def plain_test(model, recipe, dataset, settings, name: str) -> tuple[list, dict, dict]:
    """Return the rows and the summary of one test set, and {}. Prints a table."""
    title = f"test {name}"
    rows = evaluate(model, recipe, dataset, settings, True, title)
    summary = summarise_rows(rows, dataset, settings)
    prompt = f", prompt {settings.prompt}" if settings.prompt else ""
    print(f"{title}{prompt}:\n{score_table(summary)}")
    say_if_empty(rows, model, dataset, settings, title)
    return rows, summary, {}


def prompted_test(model, recipe, dataset, settings, name: str) -> tuple[list, dict, dict]:
    """Scores of what prompts give: those that the run asks by, whole, and of each component; and
    beside them what others give. Printed; returns rows, summary, further tables."""
    main = settings.sam_prompts
    by_source, parts = study(model, recipe, dataset, settings, f"test {name}", main)
    rows = check_asked(by_source[main], dataset, settings)
    summary = summarise_rows(rows, dataset, settings)
    print(f"test {name}, asked by {main}:\n{score_table(summary)}")
    say_if_empty(rows, model, dataset, settings, f"test {name}")
    if parts:
        summary["components"] = summarise_rows(parts, dataset, settings)
        print(f"  each component:\n{score_table(summary['components'])}")
    if without := len(dataset) - len({row["name"] for row in rows}):
        print(f"  {without} images have nothing to ask for and are not scored")
    every = {
        kind: summarise_rows(some, dataset, settings) for kind, some in by_source.items() if some
    }
    summary["prompts"] = every
    print(f"  by what is asked, of an image's classes:\n{study_table(every)}")
    return rows, summary, {"component": parts, "prompt": sum(by_source.values(), [])}


def write_tables(folder: Path, tables: dict) -> None:
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"per_{name}.csv", rows)


def write_summary(folder: Path, model, settings, summaries: dict, tables: dict) -> dict:
    """summary.json and per_image.csv, of SAM also per_component.csv and per_prompt.csv; returns
    what is in the first."""
    kept = ("model", "weights", "recipe", "prompt", "sam_prompts", "score_size")
    summary = {key: getattr(settings, key) for key in kept}
    summary |= {"threshold": model.config.threshold, "tests": summaries}
    summary |= {"intervals": INTERVALS}
    print(f"{INTERVALS}; {ABSENT}")
    write_tables(folder, tables)
    write_json(folder / "summary.json", summary)  # the last: studies take it as a sign
    return summary


@dataclass
class EveryPrompt(torch.utils.data.Dataset):
    """What a worker makes of entry i: its inputs, asked by every source."""

    dataset: data.Dataset
    recipe: object
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, dict]:
        return self.recipe.ask_each(self.recipe, self.dataset, i, self.kinds)


def study(model, recipe, dataset, settings, title: str, main=None) -> tuple[dict, list]:
    """Rows of scores by what is asked; of `main` all scores, and those of its components.

    What `Recipe.encode` gives for an image is made once for all prompts.
    """
    kinds = recipe.sources(dataset, settings)
    rows, parts, threshold = {kind: [] for kind in kinds}, [], model.config.threshold
    every = EveryPrompt(dataset, recipe, kinds)
    loader = torch.utils.data.DataLoader(every, None, num_workers=settings.workers)
    model.eval()
    for items in tqdm(loader, title, unit="image", disable=None, leave=False):
        with torch.no_grad():
            kept = recipe.encode(model, items[kinds[0]])
            for kind, item in items.items():
                if nothing_asked(item):
                    continue
                probabilities, output = recipe.predict(model, item | kept)
                p = probabilities.cpu().numpy()
                whole = p if kind == main else None
                masks = to_masks(p, model.config)
                rows[kind] += score(item, masks, dataset.classes, whole, settings.tolerance)
                if kind == main and output is not None:
                    each = recipe.each(model, item, output).cpu().numpy()  # (Q,H,W)
                    parts += score_parts(item, each, output[1], threshold, settings.tolerance)
    return rows, parts


def prompt_study(model, recipe, tests: dict, settings) -> dict:
    """Scores of every test set with every prompt type, in one table; returns the summary.
    ValueError, one line: there is no type that all entries of a set have."""
    summaries, every = {}, []
    for name, dataset in tests.items():
        if not recipe.sources(dataset, settings):
            raise ValueError(f"--prompt-study: {name} has no type of prompt that all entries have")
        rows, _ = study(model, recipe, dataset, settings, f"study {name}")
        summaries[name] = {k: metrics.summarise(r, dataset.classes) for k, r in rows.items()}
        every += [{"test": name, "type": kind} | row for kind in rows for row in rows[kind]]
        examples = {kind: cases[0]["prompt"] for kind, cases in rows.items()}
        print(f"test {name}, every type of prompt:")
        print(study_table(summaries[name], examples))
        every_row = sum(rows.values(), [])
        say_if_empty(every_row, model, dataset, settings, f"test {name}")
    return write_summary(Path(settings.out) / "test", model, settings, summaries, {"image": every})
