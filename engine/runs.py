"""Devices, the files of run folders, and the data sets that a run opens."""

import io
import math
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import numpy as np
import torch

import data
from imaging import boxes_and_points, files, image_files, layouts, nifti, volumes


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


# The keys of a run's config.json. Older runs may lack all but the first; those lists that are empty
# say nothing.
RUN_KEYS = {
    "format": int, "model": str, "class": str, "config": dict, "classes": list[str],
    "labels": list[int] | None, "recipe": str, "options": dict, "data": dict,
    "masks": dict[str, str], "versions": dict, "decoder": str | None,
}  # fmt: skip
# The options that tests and predictions take from a run; train.py checks all of them.
RUN_OPTIONS = {
    "data": list[str], "prompt": str | None, "pseudocolor": str | None, "sam_prompts": str | None,
    "min_area": int | None, "jitter": int | None, "overlap": float | None, "fold": str | None,
    "nsd_tolerance": float | None, "mask_orientation": str | None, "seed": int,
    "group_regex": str | None,
}  # fmt: skip
EDITED = "restore the file as train.py wrote it, or use the weights of another run"


def read_run(weights: str | Path | None) -> dict:
    """Return the config.json of the training run that weights come from, {} if none is known.

    weights: a run folder, or a file in one (RUN/best.safetensors): both are the same run. All
    programs ask here. A config.json without "format" is not ours (the hub's). Raises ValueError,
    one line, if the file is damaged, was edited to make no sense, or is of a newer version.
    """
    if weights is None:
        return {}
    place = Path(weights)
    path = (place.parent if place.is_file() else place) / "config.json"
    if not path.is_file():
        return {}
    config = files.read_json(path)
    if not isinstance(config, dict) or "format" not in config:
        return {}
    check_run(path, config)
    return config


def check_run(path: Path, run: dict) -> None:
    """Raise ValueError, one line, if the content of a run's config.json is not what we write."""
    if isinstance(run["format"], int) and run["format"] > 1:
        raise newer(path, f"it has format {run['format']}")
    if run["format"] != 1:
        raise ValueError(f"{path}: format is {run['format']!r:.50}, expected 1; {EDITED}")
    check_keys(path, run, RUN_KEYS)
    options = run.get("options", {})
    known = {key: options[key] for key in RUN_OPTIONS if key in options}
    check_keys(path, known, RUN_OPTIONS)
    check_option_values(path, known)

    classes = run.get("classes", [])
    numbers = run.get("labels") or []
    count = run.get("config", {}).get("num_classes")
    background = bool(run.get("config", {}).get("overlapping"))
    if not background and len(numbers) not in (0, max(2, len(classes))):  # a single class and 0
        raise ValueError(f"{path}: labels do not number the {len(classes)} classes; {EDITED}")
    if any(not 0 <= number < 2**16 for number in numbers):
        raise wrong_value(path, "labels", numbers, "numbers from 0 to 65535")
    if classes and isinstance(count, int) and len(classes) != count + background:
        raise ValueError(
            f"{path}: {len(classes)} classes for a model of {count + background}; {EDITED}"
        )


def check_option_values(path: Path, options: dict) -> None:
    """Raise ValueError, one line, if options of RUN_OPTIONS have values that are refused."""
    choices = {
        "sam_prompts": boxes_and_points.SOURCES,
        "mask_orientation": image_files.ORIENTATIONS,
    }
    for key, allowed in choices.items():
        if options.get(key) not in (None, *allowed):
            raise wrong_value(path, key, options[key], f"one of {', '.join(allowed)}")
    if not 0 <= (options.get("overlap") or 0) < 1:
        raise wrong_value(path, "overlap", options["overlap"], "a share below 1")
    for key in ("min_area", "jitter", "seed", "nsd_tolerance"):
        if (options.get(key) or 0) < 0:
            raise wrong_value(path, key, options[key], "0 or more")
    try:
        re.compile(options.get("group_regex") or "")
    except re.error as error:
        raise wrong_value(path, "group_regex", options["group_regex"], str(error)) from None


def check_keys(path: Path, content: dict, kinds: dict) -> None:
    """Raise ValueError, one line, if a key is unknown or has a value of another type."""
    for key, value in content.items():
        if key not in kinds:
            raise newer(path, f"it has {key!r:.50}")
        if not fits(value, kinds[key]):
            kind = kinds[key]
            name = kind.__name__ if type(kind) is type else str(kind)
            raise wrong_value(path, key, value, name)


def newer(path: Path, what: str) -> ValueError:
    """Return the error of a file of a run that this version does not know."""
    return ValueError(f"{path}: was written by a newer version ({what}); use that version for it")


def wrong_value(path: Path, key: str, value, expected: str) -> ValueError:
    """Return the error of a value in a file of a run."""
    return ValueError(f"{path}: {key} is {value!r:.50}, expected {expected}; {EDITED}")


def fits(value, kind) -> bool:
    """Return True if a value of a JSON file is of a type, written as annotations write it.

    Whole numbers are floats as well, and no number is infinite or NaN. Lists are tuples as well.
    """
    arguments = get_args(kind)
    origin = get_origin(kind) or kind
    if isinstance(kind, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin in (list, tuple):
        items = isinstance(value, list | tuple)
        return items and all(fits(item, arguments[0]) for item in value)
    if origin is dict and arguments:
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    if origin is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, origin)


def patients_of(run: dict, places: list) -> str | None:
    """--group-regex of a run, if a data set of one of its names is among places: one that lists no
    splits is then divided as it was for the training."""
    asked = run.get("options", {})
    names = {Path(root).name for root in asked.get("data", ())}
    there = {Path(layouts.path_and_split(place)[0]).name for place in places}
    return asked.get("group_regex") if names & there else None


def num_classes(model) -> int:
    """1 of a model that finds what a prompt asks for."""
    return getattr(model.config, "num_classes", 1)


def check_threshold(k: int, threshold) -> None:
    if k > 1 and threshold is not None:
        raise ValueError("--threshold: the most probable of several classes counts, drop it")


def check_classes(model, datasets, settings) -> None:
    """Raise ValueError, one line, if a data set has other classes than a model that has its own."""
    count = num_classes(model)
    overlapping = getattr(model.config, "overlapping", False)
    names = read_run(settings.weights).get("classes")
    released = () if names else getattr(model.config, "classes", ())
    if overlapping and settings.threshold == "auto":
        raise ValueError("--threshold auto: of one class alone; drop it")

    for dataset in datasets:
        root = dataset.entries[0].root
        classes = ", ".join(dataset.classes)
        kind = type(model).__name__
        if overlapping != (dataset.entries[0].regions is not None):
            told = "takes its classes to overlap" if overlapping else "tells classes apart"
            hint = "regions are lists of numbers in dataset.json"
            raise ValueError(f"{kind} {told}, those of {root} are not so; {hint}")
        if len(dataset.classes) != count + overlapping:
            told = f"{root} has {len(dataset.classes)} ({classes})"
            hint = "label its entries for a model that reads, or take another --model"
            raise ValueError(f"{kind} tells {count} classes apart, {told}; {hint}")
        if settings.eval and count > 1 and names and list(dataset.classes) != names:
            raise ValueError(f"{root}: {classes}, but trained were {', '.join(names)}")
        if settings.eval and layouts.moved(dataset.classes, released):
            told = f"{root}: {classes}, the model's: {', '.join(released)}"
            raise ValueError(f"{told}; scores would be of other classes")
        check_threshold(1 if overlapping else count, settings.threshold)


@dataclass
class DataSets:
    """What a run trains on and tests: opened data sets, fewer if fewer are used."""

    parts: dict  # {"train": data set, "val": data set}
    tests: dict  # {name: data set}

    @property
    def all(self) -> list:
        """Return every data set."""
        return [*self.parts.values(), *self.tests.values()]


def open_data(settings, family) -> DataSets:
    """Open all data sets of a run, and print a line about each.

    family: of recipes.FAMILIES. With --overfit the first cases of --data are all of them. Raises
    FileNotFoundError or ValueError, one line.
    """
    data_sets = _open_overfit(settings, family) if settings.overfit else _open(settings, family)
    for dataset in data_sets.all:
        if dataset.holds != family.takes:
            root = dataset.entries[0].root
            told = f"{root} holds {dataset.holds}, {settings.model} takes {family.takes}"
            raise ValueError(f"{told}; take another --model")
    return data_sets


def _open_overfit(settings, family) -> DataSets:
    """Return the first cases of --data as the sets to train, validate and test on."""
    entries = []
    for root in settings.data:
        entries += layouts.annotations(root, "train", settings.group_regex)
    name = "--overfit: train, val and test are the same"
    one = open_together({name: entries[: settings.overfit]}, settings, family)[name]
    print("  scores then tell that the parts fit together, and nothing of new cases")
    return DataSets({"train": one, "val": one}, {"overfit": one})


def _open(settings, family) -> DataSets:
    """Return the training, validation and test sets that the settings name."""
    tests = list_tests(settings)
    lists = {f"test {name}": entries for name, entries in tests.items()}
    if not settings.eval or settings.threshold == "auto":
        train, val = layouts.train_and_val(
            settings.data, settings.seed, settings.group_regex, settings.fold
        )
        lists |= {"val": val} if settings.eval else {"train": train, "val": val}
    opened = open_together(lists, settings, family)
    parts = {name: opened[name] for name in ("train", "val") if name in opened}
    return DataSets(parts, {name: opened[f"test {name}"] for name in tests})


def list_tests(settings) -> dict[str, list]:
    """Return the entries of the test sets by name: of --test, else of the test splits of --data.

    A test set that is empty or lacks files is left out of a training, which is printed; with --eval
    it is an error. Raises FileNotFoundError or ValueError, one line.
    """
    tests = {}
    for place in settings.test or settings.data:
        path, split = layouts.path_and_split(place)
        if not settings.test and not settings.eval and "test" not in layouts.splits(path):
            print(f"{path}: no test split, so it is not tested on; name another with --test")
            continue
        name = Path(path).resolve().name + ("" if split == "test" else f":{split}")
        if name in tests:
            raise ValueError(f"two test sets are called {name}; rename a folder")
        try:
            entries = layouts.annotations(path, split, settings.group_regex)
            if not entries:
                raise layouts.EmptySplit(f"{path}: its split {split} is empty")
            layouts.check_files_exist(entries)
        except (layouts.Unpaired, layouts.MissingFiles, layouts.EmptySplit) as error:
            if settings.eval:
                raise
            print(f"test {name} is left out, training goes on without it: {error}")
            continue
        tests[name] = entries
    return tests


def earlier_run(settings) -> dict:
    """Return the config.json of the run that is tested or resumed, {} if there is none."""
    if settings.eval:
        return read_run(settings.weights)
    return read_run(settings.out) if settings.resume else {}


def open_together(lists: dict[str, list], settings, family) -> dict:
    """Open lists of entries together: of images, or where the files are NIfTI of volumes.

    Prints a line about each. Raises as `data.open_datasets` does.
    """
    sets = {}
    for name, entries in lists.items():
        if entries and is_of_volumes(entries[0]):
            layouts.check_files_exist(entries)
            sets[name] = family.open_volumes(entries, earlier_run(settings))

    images = {}
    for name, entries in lists.items():
        if name not in sets:
            images[name] = data.with_mask_orientation(entries, settings.mask_orientation)
    if images:
        reading = mask_reading(images, settings)
        scored = [name for name in images if is_scored_only(name)]
        sets |= data.open_datasets(images, settings.cache, settings.pseudocolor, reading, scored)
    sets = {name: sets[name] for name in lists}
    for name, dataset in sets.items():
        print(f"{name}: {dataset.describe()}")
        if name in images and is_scored_only(name):
            say_empty(name, dataset)
    return sets


def is_of_volumes(entry) -> bool:
    """Return True if an entry is of a data set of volumes."""
    return layouts.is_volume(entry.image) or layouts.has_volumes(entry.root)


def is_scored_only(name: str) -> bool:
    """Return True for the name of a list of entries that nothing is trained on."""
    return name == "val" or name.startswith("test ")


def say_empty(name: str, dataset) -> None:
    """Print a line for each data set of a split that has no foreground at all."""
    for root, entries in dataset.empty_data_sets().items():
        cases = f"all {len(entries)} cases" if len(entries) > 1 else "its only case"
        message = f"{root}: the ground truth of {name} is empty in {cases}, "
        message += f"{entries[0].mask} for one; Dice is 1 where nothing is predicted, else 0"
        if name == "val":
            message += ", so that the best epoch is the one with the fewest false alarms"
        print(message)


def mask_reading(lists: dict[str, list], settings) -> data.MaskReading:
    """Return what else decides how masks are read.

    A run that is resumed or tested knows rules. A training counts the values of train, val and test
    of its data sets, also of those that it does not open.
    """
    known = earlier_run(settings).get("masks", {})
    reading = data.MaskReading(settings.mask_threshold, known)
    if settings.eval or not (settings.test or settings.overfit):  # then all three are opened
        return reading

    opened = {entry.mask for entries in lists.values() for entry in entries}
    for root in settings.data:
        for split in sorted({"train", "val", "test"} & layouts.splits(root).keys()):
            try:
                with redirect_stdout(io.StringIO()):  # entries listed twice were said, or no matter
                    entries = layouts.annotations(root, split, settings.group_regex)
                entries = [entry for entry in entries if entry.mask not in opened]
                entries = [entry for entry in entries if not layouts.missing_files([entry])]
                counts = data.mask_counts(entries, Path(settings.cache))
            except layouts.Unpaired:
                continue
            except (ValueError, OSError) as error:
                print(f"{root}: {split} does not count for how masks are read ({error})")
                continue
            reading.others += entries
            reading.other_counts = np.concatenate([reading.other_counts, counts])
    return reading


def check_prepared(data_sets: DataSets, settings) -> None:
    """Look over all prepared volumes of a run, and print what was noticed so far.

    ValueError, one line: label maps of 0 and 255 where 255 is rather a class than a mark, and
    nothing to train on.
    """
    sets = data_sets.parts
    tests = data_sets.tests
    volumes.check_255(data_sets.all)
    if "train" in sets:
        sets["train"].check_foreground()
    named = {"val": sets["val"]} if "val" in sets else {}
    named |= {f"test {name}": dataset for name, dataset in tests.items()}
    for name, dataset in named.items():
        say_empty(name, dataset)
    if not settings.overfit:  # whose splits are the same on purpose
        say_shared(sets, tests)
    nifti.notices.print()


def say_shared(sets: dict, tests: dict) -> None:
    """Print a line if volumes are in two of train, val and test.

    By name within a data set, or by their voxels, whatever the files are called. A test on another
    split of the training's own data sets (--test PATH:val) is one on purpose.
    """
    trained = {entry.root for dataset in sets.values() for entry in dataset.entries}
    splits = [*sets.items()]
    for name, dataset in tests.items():
        on_purpose = ":" in name and all(entry.root in trained for entry in dataset.entries)
        if not on_purpose:
            splits.append(("test", dataset))

    first = {}  # name or voxels -> split, entry's name
    shared = {}  # (split, entry) -> text
    for split, dataset in splits:
        for i, entry in enumerate(dataset.entries):
            keys = {"voxels": dataset.digest(i), "name": (entry.root, entry.name)}
            for how, key in keys.items():
                other, name = first.setdefault((how, key), (split, entry.name))
                if other != split:
                    by = ", by name alone" if how == "name" else ""
                    same = f"{name} ({other} and {split}{by})"
                    differs = f"{name} ({other}) is {entry.name} ({split})"
                    text = same if name == entry.name else differs
                    shared.setdefault((split, entry.root, entry.name), text)
    if shared:
        names = ", ".join(list(shared.values())[:3])
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        told = "volumes are" if len(shared) > 1 else "volume is"
        end = "scores on them do not show how the model does on new patients"
        print(f"{len(shared)} {told} in two splits: {names}{more}; {end}")
