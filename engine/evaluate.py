"""Score a model on data sets: validation, tests, and the test folder of a run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import metrics
from engine.runs import num_classes
from engine.tables import ABSENT, INTERVALS, score_table, study_table, write_csv, write_json
from imaging import layouts, pictures
from imaging.measurements import measure_classes

# --- predictions ---------------------------------------------------------------------------------


def predictions(model, recipe, dataset, settings, title: str):
    """Yield the item, the probabilities (K,*size) and the loss (or None) of every entry.

    Entries with `has_no_prompts` are left out. One image is predicted at a time, and nothing is
    kept, so that memory does not grow with the data set.
    """
    device = next(model.parameters()).device
    items = data.Items(dataset, settings.prompt, recipe.inputs, train=False, seed=settings.seed)
    workers = 0 if dataset.is_mapped else settings.workers
    order = [[(0, i)] for i in range(len(dataset))]
    loader = data.make_loader(items, order, workers, device)
    model.eval()

    items = tqdm(loader, title, len(dataset), unit="image", disable=None, leave=False)
    for i, item in enumerate(items):
        if has_no_prompts(item):
            continue
        item["index"] = i
        if settings.score_size == "network":
            item |= {"size": item["mask"].shape[-2:], "truth": item["mask"].round()}

        loss = None
        with torch.no_grad():
            output_probabilities, output = recipe.predict(model, item)
            if output is not None:
                target = {"mask": item["mask"][None].to(device)}
                loss = float(recipe.loss(output, target)[0])
        probabilities = output_probabilities.cpu().numpy()
        del output_probabilities, output  # gigabytes for volumes
        yield item, probabilities, loss
        del item, probabilities


def has_no_prompts(item: dict) -> bool:
    """Return True if the ground truth contains no object to prompt for.

    Such an image is not scored: prompts made from the ground truth cannot find what is not there.
    """
    is_from_a_file = item["prompt"].startswith("given")
    return not is_from_a_file and "boxes" in item and not len(item["boxes"])


def each_is(indices: np.ndarray, classes) -> np.ndarray:
    """Return where class indices (*size) equal each of n classes: bool (n,*size)."""
    return np.equal.outer(np.asarray(classes), indices)  # (n,*size)


def to_masks(probabilities: np.ndarray, config) -> np.ndarray:
    """Return the masks of probabilities (K,*size).

    One class: bool (1,*size), above the threshold. Several: bool (K,*size), where each is the most
    probable. Overlapping classes: bool (1+K,*size), above the threshold, preceded by the background
    where none is.
    """
    if len(probabilities) == 1:
        return probabilities > config.threshold
    if getattr(config, "overlapping", False):
        masks = probabilities > config.threshold
        background = ~masks.any(0, keepdims=True)
        return np.concatenate([background, masks])  # (1+K,*size)
    return each_is(probabilities.argmax(0), range(len(probabilities)))  # (K,*size)


def truth_masks(item: dict, n: int) -> np.ndarray:
    """Return the ground truth of classes 1 to n, or of the regions of an entry: bool (n,*size)."""
    truth = item["truth"].numpy()[0]  # (*size)
    if item.get("regions"):
        return np.stack([np.isin(truth, indices) for indices in item["regions"]])  # (n,*size)
    return each_is(truth, range(1, n + 1))  # (n,*size)


# --- scores of one entry -------------------------------------------------------------------------


def case_columns(item: dict) -> dict:
    """Return the columns that identify a row of scores."""
    return {key: item[key] for key in ("dataset", "name", "group", "prompt")}


def score(item: dict, masks: np.ndarray, classes, probabilities=None, tolerance=1.0) -> list[dict]:
    """Return the scores of one entry, a row for each class.

    With several classes, a last row holds the pixel counts of the background. masks: bool
    (K,*size). probabilities: (K,*size); with them also HD95, ASSD and NSD at `tolerance`, and for
    images average precision and Betti errors.
    """
    classes = item.get("classes", classes)  # a volume names the classes that are annotated in it
    names = layouts.foreground(classes)
    n = len(names)
    truth = item["truth"].numpy()[0]  # (*size)
    valid = valid_pixels(truth)
    foreground = None if probabilities is None else probabilities[-n:]  # without the background
    scores = score_masks(
        masks[-n:], truth_masks(item, n), valid, foreground, item.get("spacing"), tolerance
    )

    rows = []
    for name, class_scores in zip(names, scores, strict=True):
        rows.append(case_columns(item) | {"class": name} | class_scores)
    if n > 1:
        counts = metrics.overlap(masks[0], truth == 0, valid)
        row = case_columns(item) | {"class": classes[0]}
        rows.append(row | {key: counts[key] for key in ("tp", "fp", "fn")})
    return rows


def valid_pixels(truth: np.ndarray) -> np.ndarray | None:
    """Return where a ground truth (*size) is not 255, None if that is everywhere."""
    valid = truth != 255
    return None if valid.all() else valid


def score_masks(
    masks: np.ndarray,
    truths: np.ndarray,
    valid: np.ndarray | None,
    probabilities=None,
    spacing=None,
    tolerance=1.0,
) -> list[dict]:
    """Return `metrics.score_image` of n masks; with their probabilities (n,*size) all other scores.

    For volumes, which have a spacing in mm, the other scores are the distances alone. tolerance: of
    the NSD, in mm if there is a spacing, else in pixels.
    """
    has_distances = probabilities is not None
    rows = metrics.score_image(masks, truths, valid, spacing, tolerance, has_distances)
    if probabilities is None or spacing is not None:
        return rows

    inside = True if valid is None else valid
    masks = masks & inside
    truths = truths & inside
    for k, row in enumerate(rows):
        row["ap"] = metrics.average_precision(probabilities[k], truths[k], valid)
        row |= metrics.betti_error(masks[k], truths[k])
    return rows


def score_parts(
    item: dict, probabilities: np.ndarray, iou, threshold: float, tolerance: float = 1.0
) -> list[dict]:
    """Return the scores of the mask of each prompt against the component it was made from.

    probabilities: (Q,H,W). iou: the model's estimate for each mask, Q values.
    """
    classes = item["classes"]
    components = item["parts"].numpy()  # (Q,H,W)
    valid = valid_pixels(components[0])
    scores = score_masks(
        probabilities > threshold, components == 1, valid, probabilities, tolerance=tolerance
    )
    estimates = iou.flatten()  # (Q,)

    rows = []
    for k, class_index in enumerate(item["numbers"].tolist()):
        name = classes[class_index] if len(classes) > 1 else classes[0]
        row = case_columns(item) | {"class": name, "component": k} | scores[k]
        row["iou_estimate"] = float(estimates[k])
        rows.append(row)
    return rows


# --- scores of a data set ------------------------------------------------------------------------


def evaluate(
    model, recipe, dataset, settings, all_scores: bool, title: str, measured=None
) -> list[dict]:
    """Return the scores of every entry and class, a row each.

    all_scores: also the slow ones, see `score`. measured: `Measurements` that get the masks.
    """
    rows = []
    for item, probabilities, loss in predictions(model, recipe, dataset, settings, title):
        masks = to_masks(probabilities, model.config)
        scored_probabilities = probabilities if all_scores else None
        scores = score(item, masks, dataset.classes, scored_probabilities, settings.tolerance)
        for row in scores:
            rows.append(row | {"loss": loss})
        if measured is not None:
            measured.add(item, masks, probabilities)
        # Free the memory before the next volume is predicted.
        del item, probabilities, masks, scored_probabilities
    return check_not_empty(rows, dataset, settings)


def check_not_empty(rows: list[dict], dataset, settings) -> list[dict]:
    """Return the rows. Raise ValueError, one line, if `has_no_prompts` left out all images."""
    if not rows:
        raise ValueError(
            f"{dataset.entries[0].root}: no image has a component of {settings.min_area} pixels or "
            "more to prompt for; lower --min-area"
        )
    return rows


def summarise_rows(rows: list[dict], dataset, settings) -> dict:
    """Return `metrics.summarise` of a data set's rows, with the unit of distances if it has any.

    The unit is mm for volumes and px for images: pixels of the masks that were compared.
    """
    summary = metrics.summarise(rows, layouts.foreground(dataset.classes))
    if "nsd" in summary:
        summary["nsd_tolerance"] = settings.tolerance
        summary["distance_unit"] = dataset.unit
    return summary


def say_if_empty(rows: list[dict], model, dataset, settings, title: str) -> None:
    """Print a line if all predictions are empty although the ground truth is not."""
    scored = [row for row in rows if "in_pred" in row]
    if any(row["in_pred"] for row in scored) or not any(row["in_truth"] for row in scored):
        return

    message = f"{title}: all predictions are empty"
    if takes_threshold(model, dataset):
        message += f", nothing is above the threshold {model.config.threshold:g}"
        if settings.threshold != "auto":
            message += "; --threshold auto chooses the threshold and the epoch in validation"
    print(message)


# --- measurements ---------------------------------------------------------------------------------


@dataclass
class Measurements:
    """The rows of measurements.csv of a test set."""

    dataset: data.Dataset
    settings: object
    preprocess: Callable  # of the model
    rows: list[dict] = field(default_factory=list)

    def add(self, item: dict, masks: np.ndarray, probabilities: np.ndarray) -> None:
        """Measure the masks (K,*size) of an entry, and the ground truth.

        Nothing is measured at the network's size, as its pixels are not those of the image.
        """
        if self.settings.score_size == "network":
            return
        classes = layouts.foreground(item.get("classes", self.dataset.classes))
        n = len(classes)
        measure = self.dataset.measuring(item["index"], self.preprocess, self.settings.pixel_size)

        case = case_columns(item)
        truths = truth_masks(item, n)  # (n,*size)
        predicted = measure_classes(classes, masks[-n:], probabilities[-n:], measure)
        true = measure_classes(classes, truths, None, measure)
        for pair in zip(predicted, true, strict=True):
            self.rows += [case | row for row in pair]


# --- validation ----------------------------------------------------------------------------------


def validate(model, recipe, dataset, settings) -> dict[str, float]:
    """Return val_loss, val_dice, val_iou and with --val-distances HD95, ASSD and NSD.

    The means are those of a test. With --threshold auto, these are the scores at the best
    threshold, val_threshold; distances then take a second pass, at that threshold.
    """
    scores = {}
    config = model.config
    if settings.threshold == "auto":
        scores, _ = search_threshold(model, recipe, dataset, settings, "validate")
        if not settings.val_distances:
            return scores
        model.config = replace(config, threshold=scores["val_threshold"])

    rows = evaluate(model, recipe, dataset, settings, settings.val_distances, "validate")
    model.config = config
    if settings.threshold != "auto":  # else search_threshold has printed it
        say_if_empty(rows, model, dataset, settings, "validate")

    losses = [row["loss"] for row in rows if row["loss"] is not None]  # volumes have none
    if losses:
        scores["val_loss"] = float(np.mean(losses))
    summary = metrics.summarise(rows, layouts.foreground(dataset.classes))
    names = ["dice", "iou"]
    if settings.val_distances:
        names += ["hd95", "assd", "nsd"]
    for name in names:
        scores[f"val_{name}"] = summary[name]["mean"]
    return scores


THRESHOLDS = [k / 20 for k in range(1, 20)]  # 0.05, 0.10, …, 0.95


def takes_threshold(model, dataset) -> bool:
    """Return True if one threshold decides what is foreground, so that --threshold auto works."""
    has_one_class = num_classes(model) == 1 and len(dataset.classes) == 1
    return has_one_class and not getattr(model.config, "overlapping", False)


def search_threshold(model, recipe, dataset, settings, title: str) -> tuple[dict, dict]:
    """Score a validation set at each of THRESHOLDS, in one pass.

    Returns the scores of `validate` at the threshold with the highest mean Dice, and the mean Dice
    of each threshold. Of equal thresholds the lowest is taken; 0.5 if no case has foreground.
    Memory grows by three numbers per image and threshold. Raises ValueError as `check_not_empty`.
    """
    cases = []  # one row per image: the columns that do not depend on the threshold
    scores = []  # for each image and threshold: Dice, IoU, is anything predicted
    losses = []
    for item, probabilities, loss in predictions(model, recipe, dataset, settings, title):
        rows = []
        for threshold in THRESHOLDS:
            rows += score(item, probabilities > threshold, dataset.classes)  # one row: one class
        cases.append(rows[0])
        scores.append([(row["dice"], row["iou"], row["in_pred"]) for row in rows])
        if loss is not None:
            losses.append(loss)
    check_not_empty(cases, dataset, settings)

    # Mean over patients where they are known, else over images, as in metrics.summarise.
    dice, iou, is_predicted = np.array(scores, float).transpose(2, 1, 0)  # (thresholds,n) each
    groups = []
    for row in cases:
        groups.append((row["dataset"], row["name"] if row["group"] is None else row["group"]))
    means = [metrics.mean_ci(values, groups)["mean"] for values in dice]

    best = int(np.argmax(means))
    has_foreground = any(row["in_truth"] for row in cases)
    if not has_foreground:  # the best Dice of empty masks would need the highest threshold
        best = THRESHOLDS.index(0.5)
        print(f"{title}: no case has foreground to choose a threshold by; it stays 0.5")
    elif not is_predicted.any():
        low, high = THRESHOLDS[0], THRESHOLDS[-1]
        print(f"{title}: all predictions are empty at every threshold from {low:g} to {high:g}")
    elif not is_predicted[best].any():
        print(f"{title}: all predictions are empty at the best threshold, {THRESHOLDS[best]:g}")

    result = {"val_loss": float(np.mean(losses))} if losses else {}
    result["val_dice"] = means[best]
    result["val_iou"] = metrics.mean_ci(iou[best], groups)["mean"]
    result["val_threshold"] = THRESHOLDS[best]
    return result, dict(zip(THRESHOLDS, means, strict=True))


def best_threshold(model, recipe, dataset, settings) -> float:
    """Return the threshold with the highest mean Dice, and print it."""
    scores, dice = search_threshold(model, recipe, dataset, settings, "threshold")
    best = scores["val_threshold"]
    print(f"threshold {best}: validation Dice {dice[best]:.4f}, {dice[0.5]:.4f} at 0.5")
    return best


# --- tests ---------------------------------------------------------------------------------------


def test(model, recipe, tests: dict, settings) -> dict:
    """Score every test set; print the scores and write the folder test/. Return the summary.

    Pictures come last, so that one that cannot be drawn loses no score.
    """
    folder = Path(settings.out) / "test"
    summaries = {}  # test set -> summary
    tables = {"per_image": []}  # name of a table -> rows
    scored = {}  # test set -> rows
    for name, dataset in tests.items():
        rows, summaries[name], further_tables = recipe.test(model, recipe, dataset, settings, name)
        for table, table_rows in ({"per_image": rows} | further_tables).items():
            columns = tables.setdefault(table, [])
            columns.extend({"test": name} | row for row in table_rows)
        write_tables(folder, tables)  # the next test may fail
        scored[name] = rows
    summary = write_summary(folder, model, settings, summaries, tables)

    for name, dataset in tests.items():
        pictures_folder = folder / "overlays"
        if len(tests) > 1:
            pictures_folder /= name.replace(":", "-")
        draw(model, recipe, dataset, scored[name], settings, pictures_folder)
        if settings.overlays:
            colours = "green: truth, magenta: prediction"
            if len(dataset.classes) > 1:
                colours = "truth outlined, prediction filled"
            print(f"overlays ({colours}): {pictures_folder / 'sheet.png'}")
    return summary


def plain_test(model, recipe, dataset, settings, name: str) -> tuple[list, dict, dict]:
    """Test models without prompts, or with one text per image: print a table of scores.

    Returns the rows, the summary, and a further table: "measurements".
    """
    title = f"test {name}"
    measured = Measurements(dataset, settings, model.preprocess)
    rows = evaluate(model, recipe, dataset, settings, True, title, measured)
    summary = summarise_rows(rows, dataset, settings)
    prompt = f", prompt {settings.prompt}" if settings.prompt else ""
    print(f"{title}{prompt}:\n{score_table(summary)}")
    say_if_empty(rows, model, dataset, settings, title)
    return rows, summary, {"measurements": measured.rows}


def prompted_test(model, recipe, dataset, settings, name: str) -> tuple[list, dict, dict]:
    """Test SAM: print the scores of images and components, and compare the kinds of prompts.

    Returns the rows and the summary for the run's own --sam-prompts, and further tables:
    "per_component", a row per component, "per_prompt", a row per kind of prompt and image, and
    "measurements".
    """
    main = settings.sam_prompts
    measured = Measurements(dataset, settings, model.preprocess)
    by_source, components = study(model, recipe, dataset, settings, f"test {name}", main, measured)
    rows = check_not_empty(by_source[main], dataset, settings)
    summary = summarise_rows(rows, dataset, settings)
    print(f"test {name}, prompted by {main}:\n{score_table(summary)}")
    say_if_empty(rows, model, dataset, settings, f"test {name}")

    if components:
        summary["components"] = summarise_rows(components, dataset, settings)
        print(f"  each component:\n{score_table(summary['components'])}")
    unscored = len(dataset) - len({row["name"] for row in rows})
    if unscored:
        print(f"  {unscored} images contain no object to prompt for and are not scored")

    summary["prompts"] = {}
    every_row = []
    for source, source_rows in by_source.items():
        every_row += source_rows
        if source_rows:
            summary["prompts"][source] = summarise_rows(source_rows, dataset, settings)
    print(f"  by kind of prompt, all classes of an image:\n{study_table(summary['prompts'])}")
    further_tables = {"per_component": components, "per_prompt": every_row}
    return rows, summary, further_tables | {"measurements": measured.rows}


def prompt_study(model, recipe, tests: dict, settings) -> dict:
    """Score every test set with every type of text prompt, and print a table. Return the summary.

    Raises ValueError, one line, if there is no prompt type that all entries of a set have.
    """
    summaries = {}
    table = []
    for name, dataset in tests.items():
        if not recipe.sources(dataset, settings):
            raise ValueError(f"--prompt-study: {name} has no type of prompt that all entries have")
        by_type, _ = study(model, recipe, dataset, settings, f"study {name}")

        summaries[name] = {}
        examples = {}
        every_row = []
        for kind, rows in by_type.items():
            summaries[name][kind] = metrics.summarise(rows, dataset.classes)
            examples[kind] = rows[0]["prompt"]
            every_row += rows
            table += [{"test": name, "type": kind} | row for row in rows]

        print(f"test {name}, every type of prompt:")
        print(study_table(summaries[name], examples))
        say_if_empty(every_row, model, dataset, settings, f"test {name}")
    folder = Path(settings.out) / "test"
    return write_summary(folder, model, settings, summaries, {"per_image": table})


def write_tables(folder: Path, tables: dict) -> None:
    """Write NAME.csv for each table that has rows."""
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", rows)


def write_summary(folder: Path, model, settings, summaries: dict, tables: dict) -> dict:
    """Write summary.json and the tables. Return the summary."""
    names = ("model", "weights", "recipe", "prompt", "sam_prompts", "score_size")
    summary = {name: getattr(settings, name) for name in names}
    summary |= {"threshold": model.config.threshold, "tests": summaries}
    summary |= {"intervals": INTERVALS}
    print(f"{INTERVALS}; {ABSENT}")
    write_tables(folder, tables)
    write_json(folder / "summary.json", summary)  # the last file: it marks a finished test
    return summary


# --- one image, many prompts ---------------------------------------------------------------------


@dataclass
class EveryPrompt(torch.utils.data.Dataset):
    """The entries of a data set, each as one item for every kind of prompt."""

    dataset: data.Dataset
    recipe: object
    sources: list[str]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, dict]:
        return self.recipe.items_by_source(self.recipe, self.dataset, i, self.sources)


def study(
    model, recipe, dataset, settings, title: str, main=None, measured=None
) -> tuple[dict, list]:
    """Return the rows of scores for each kind of prompt, and for `main` those of its components.

    `main` gets all scores, the other kinds only those that count pixels. `Recipe.encode` runs once
    per image, for all prompts. measured: `Measurements` that get the masks of `main`.
    """
    sources = recipe.sources(dataset, settings)
    every = EveryPrompt(dataset, recipe, sources)
    loader = torch.utils.data.DataLoader(every, None, num_workers=settings.workers)
    rows = {source: [] for source in sources}
    components = []
    model.eval()

    for i, items in enumerate(tqdm(loader, title, unit="image", disable=None, leave=False)):
        with torch.no_grad():
            encoded = recipe.encode(model, items[sources[0]])
            for source, item in items.items():
                if has_no_prompts(item):
                    continue
                output_probabilities, output = recipe.predict(model, item | encoded)
                probabilities = output_probabilities.cpu().numpy()  # (K,*size)
                masks = to_masks(probabilities, model.config)
                is_main = source == main
                if is_main and measured is not None:
                    measured.add(item | {"index": i}, masks, probabilities)
                rows[source] += score(
                    item,
                    masks,
                    dataset.classes,
                    probabilities if is_main else None,
                    settings.tolerance,
                )
                if is_main and output is not None:
                    per_prompt = recipe.predict_each(model, item, output).cpu().numpy()  # (Q,H,W)
                    components += score_parts(
                        item, per_prompt, output[1], model.config.threshold, settings.tolerance
                    )
    return rows, components


# --- pictures ------------------------------------------------------------------------------------

IMAGE_CARD = 320  # pixels, width of an overlay in the sheet
VOLUME_CARD = 960  # of several slices


def dice_by_entry(rows: list[dict], dataset) -> np.ndarray:
    """Return the mean Dice (n,) of each entry over its classes.

    A class counts if the ground truth or the prediction has it; an entry without any has Dice 1.
    Entries without scores are NaN.
    """
    has_one_class = len(dataset.classes) == 1
    dice = {entry.name: [] for entry in dataset.entries}
    scored = set()
    for row in rows:
        scored.add(row["name"])
        if "dice" in row and (has_one_class or row["in_truth"] or row["in_pred"]):
            dice[row["name"]].append(row["dice"])

    means = []
    for name, values in dice.items():
        if values:
            means.append(np.mean(values))
        else:
            means.append(1.0 if name in scored else np.nan)
    return np.array(means)


def expand_to(masks: np.ndarray, names, all_names) -> np.ndarray:
    """Put n masks (n,*size) at their positions among all m classes: (m,*size), the rest empty."""
    expanded = np.zeros((len(all_names), *masks.shape[1:]), bool)
    expanded[[all_names.index(name) for name in names]] = masks
    return expanded


def extreme_cases(dice: np.ndarray, count: int) -> dict[str, int]:
    """Return {"worst1": index of the entry, …}: `count` worst, median and best entries by Dice."""
    order = np.argsort(dice, kind="stable")[: np.isfinite(dice).sum()]  # NaN comes last
    n = min(count, len(order))
    middle = (len(order) - n) // 2
    chosen = {"worst": order[:n], "median": order[middle : middle + n], "best": order[::-1][:n]}

    cases = {}
    for kind, indices in chosen.items():
        for k, i in enumerate(indices, 1):
            cases[f"{kind}{k}"] = i
    return cases


def draw(model, recipe, dataset, rows: list[dict], settings, folder: Path) -> None:
    """Write overlays of the worst, median and best cases by Dice, and a sheet of them all."""
    dice = dice_by_entry(rows, dataset)
    cases = extreme_cases(dice, settings.overlays)
    if not cases:
        return
    all_names = layouts.foreground(dataset.classes)
    subset = dataset.subset([*cases.values()])
    drawn = predictions(model, recipe, subset, settings, "draw")

    cards = []
    for k, (case, (item, probabilities, _)) in enumerate(zip(cases, drawn, strict=True)):
        names = layouts.foreground(item.get("classes", dataset.classes))
        n = len(names)
        truth = expand_to(truth_masks(item, n), names, all_names)
        masks = expand_to(to_masks(probabilities, model.config)[-n:], names, all_names)
        picture = subset.overlay(k, truth, masks, model.preprocess)
        pictures.draw_prompts(picture, item.get("shown", []))
        pictures.save_picture(folder / f"{case}_{Path(item['name']).name}.png", picture)

        caption = f"{case}: Dice {dice[cases[case]]:.3f}  {recipe.caption(item)}"
        width = VOLUME_CARD if masks.ndim == 4 else IMAGE_CARD
        cards.append(pictures.captioned(picture, caption, width))

    page = pictures.sheet_with_legend(cards, len(cases) // 3, all_names)
    pictures.save_picture(folder / "sheet.png", page)
