"""Choose a device, read the config.json of run folders, and open the data sets of a run."""

import io
import math
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import numpy as np
import torch

import data
from imaging import boxes_and_points, files, image_files, layouts, nifti, volumes
from segformer import fetch, hub_errors  # each model file has them


def pick_device(name: str) -> torch.device:
    """Return a device; "auto" is the GPU if there is one.

    Raises ValueError, one line, if the device is unknown or not on this machine.
    """
    counts = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:1 or mps") from None
    if (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"--device {name}: not on this machine; use --device auto")
    return device


# --- config.json of a run ------------------------------------------------------------------------

# The keys of a run's config.json and their types. Older runs may lack all but the first; an empty
# list means that nothing is known.
RUN_KEYS = {
    "format": int, "model": str, "class": str, "config": dict, "classes": list[str],
    "labels": list[int] | None, "recipe": str, "options": dict, "data": dict,
    "masks": dict[str, str], "versions": dict, "decoder": str | None,
}  # fmt: skip
# The options that tests and predictions take over from a run; train.py checks all options.
RUN_OPTIONS = {
    "data": list[str], "prompt": str | None, "pseudocolor": str | None, "sam_prompts": str | None,
    "min_area": int | None, "jitter": int | None, "overlap": float | None, "fold": str | None,
    "nsd_tolerance": float | None, "mask_orientation": str | None, "seed": int,
    "group_regex": str | None,
}  # fmt: skip
WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EDITED = "restore the file as train.py wrote it, or use the weights of another run"


def read_run(weights: str | Path | None) -> dict:
    """Return the config.json of the run that weights come from, {} if they come from none.

    weights: a run folder, a file in it (RUN/best.safetensors), or the hub id of a run that
    export.py uploaded. A config.json without "format" is not of a run: the hub's models have such
    files. Raises ValueError, one line, if the file is damaged, was edited wrongly, or was written
    by a newer version, and OSError if the hub cannot be reached.
    """
    if weights is None:
        return {}
    refuse_exports(weights)
    path = config_file(weights)
    if path is None:
        return {}

    config = files.read_json(path)
    if not isinstance(config, dict) or "format" not in config:
        return {}
    check_run(path, config)
    return config


def is_onnx(source: str | Path) -> bool:
    """Return True if --weights name an ONNX file."""
    return Path(source).suffix.lower() == ".onnx"


def refuse_exports(source: str | Path) -> None:
    """Raise ValueError, one line, if --weights name a file of export.py that cannot be loaded.

    ONNX files hold no weights under the names of a model. Loading a .pt2 file may run code in it.
    """
    if is_onnx(source):
        raise ValueError(f"{source}: ONNX files are for predict.py and app.py; use the run folder")
    if Path(source).suffix.lower() == ".pt2":
        raise ValueError(
            f"{source}: .pt2 files are for export only, as loading one may run code; use the run "
            "folder, or an .onnx file with predict.py"
        )


def config_file(weights: str | Path) -> Path | None:
    """Return the config.json beside weights, on this machine or on the hub; None if there is none.

    Raises OSError, one line, if the hub cannot be reached.
    """
    source = Path(weights)
    folder = source.parent if source.is_file() else source
    path = folder / "config.json"
    if path.is_file():
        return path

    if not is_hub_id(str(weights)):
        return None
    repository, _, revision = str(weights).partition("@")
    with hub_errors(str(weights)):
        return hub_config_file(repository, revision)


def is_hub_id(weights: str) -> bool:
    """Return True if weights are named like a repository of the hub: owner/name or owner/name@v1.

    Paths are not hub ids, even if nothing is there: anything in a folder that exists or in runs/,
    where train.py writes its runs, and any name that ends like a file of weights.
    """
    source = Path(weights)
    if source.parent.exists() or source.parts[:1] == ("runs",) or source.suffix in WEIGHT_ENDINGS:
        return False
    return HUB_ID.fullmatch(weights.partition("@")[0]) is not None


def hub_config_file(repository: str, revision: str) -> Path | None:
    """Return the config.json of a hub repository, None if the repository does not have one.

    It is downloaded if no file of the repository is cached. revision: "" for the main branch.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    version = revision or None
    cached = hub.try_to_load_from_cache(repository, "config.json", revision=version)
    if isinstance(cached, str):
        return Path(cached)

    try:
        hub.snapshot_download(repository, revision=version, local_files_only=True)
    except LocalEntryNotFoundError:
        return fetch(repository, "config.json", revision)
    # Other files are cached. As `download` fetches config.json before the weights, the repository
    # has none.
    return None


def check_run(path: Path, run: dict) -> None:
    """Raise ValueError, one line, if the content of config.json is not what train.py writes."""
    if isinstance(run["format"], int) and run["format"] > 1:
        raise newer(path, f"it has format {run['format']}")
    if run["format"] != 1:
        raise ValueError(f"{path}: format is {run['format']!r:.50}, expected 1; {EDITED}")
    check_keys(path, run, RUN_KEYS)

    options = run.get("options", {})
    known = {name: options[name] for name in RUN_OPTIONS if name in options}
    check_keys(path, known, RUN_OPTIONS)
    check_option_values(path, known)
    check_run_classes(path, run)


def check_run_classes(path: Path, run: dict) -> None:
    """Raise ValueError, one line, if classes, labels and the model's size do not fit together."""
    classes = run.get("classes", [])
    labels = run.get("labels") or []  # the class indices in label maps
    config = run.get("config", {})
    is_overlapping = bool(config.get("overlapping"))
    expected_labels = max(2, len(classes))  # a single class and the background are two
    if not is_overlapping and len(labels) not in (0, expected_labels):
        raise ValueError(f"{path}: labels do not number the {len(classes)} classes; {EDITED}")
    if any(not 0 <= label < 2**16 for label in labels):
        raise wrong_value(path, "labels", labels, "numbers from 0 to 65535")

    outputs = config.get("num_classes")
    if classes and isinstance(outputs, int):
        expected = outputs + is_overlapping  # overlapping classes have no output for the background
        if len(classes) != expected:
            raise ValueError(f"{path}: {len(classes)} classes for a model of {expected}; {EDITED}")


def check_option_values(path: Path, options: dict) -> None:
    """Raise ValueError, one line, if options of RUN_OPTIONS have values out of range."""
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


def newer(path: Path, reason: str) -> ValueError:
    """Return the error about a file of a run that a newer version wrote."""
    return ValueError(f"{path}: was written by a newer version ({reason}); use that version for it")


def wrong_value(path: Path, key: str, value, expected: str) -> ValueError:
    """Return the error about a wrong value in a file of a run."""
    return ValueError(f"{path}: {key} is {value!r:.50}, expected {expected}; {EDITED}")


def fits(value, kind) -> bool:
    """Return True if a value of a JSON file has a type such as `int | None` or `list[str]`.

    Whole numbers are floats, too, but NaN and infinity are not. Lists and tuples are the same.
    """
    arguments = get_args(kind)
    origin = get_origin(kind) or kind
    if isinstance(kind, UnionType):
        return any(fits(value, member) for member in arguments)
    if origin in (list, tuple):
        is_list = isinstance(value, list | tuple)
        return is_list and all(fits(item, arguments[0]) for item in value)
    if origin is dict and arguments:
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())

    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    if origin is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, origin)


def patients_of(run: dict, paths: list) -> str | None:
    """Return the --group-regex of a run if a data set of its training is among `paths`, else None.

    With it, a data set without listed splits is split as it was for the training. Data sets are
    compared by the names of their folders.
    """
    options = run.get("options", {})
    trained = {Path(layouts.path_and_split(path)[0]).name for path in options.get("data", ())}
    names = {Path(layouts.path_and_split(path)[0]).name for path in paths}
    return options.get("group_regex") if names & trained else None


# --- classes -------------------------------------------------------------------------------------


def num_classes(model) -> int:
    """Return the number of a model's classes; 1 for models with prompts."""
    return getattr(model.config, "num_classes", 1)


def check_threshold(count: int, threshold) -> None:
    """Raise ValueError, one line, if there is a threshold but more than one class."""
    if count > 1 and threshold is not None:
        raise ValueError(
            "--threshold: has no effect with several classes, as the most probable one is taken; "
            "remove it"
        )


def check_classes(model, datasets, settings) -> None:
    """Raise ValueError, one line, if a data set has other classes than the model."""
    count = num_classes(model)
    is_overlapping = getattr(model.config, "overlapping", False)
    if is_overlapping and settings.threshold == "auto":
        raise ValueError("--threshold auto: works for one class alone; remove it")

    for dataset in datasets:
        check_class_count(model, dataset)
        if settings.eval:
            check_class_names(model, dataset, settings)
        check_threshold(1 if is_overlapping else count, settings.threshold)


def check_class_count(model, dataset) -> None:
    """Raise ValueError, one line, if a data set and a model differ in kind or number of classes."""
    kind = type(model).__name__
    root = dataset.entries[0].root
    is_overlapping = getattr(model.config, "overlapping", False)
    has_regions = dataset.entries[0].regions is not None
    if is_overlapping and not has_regions:
        raise ValueError(
            f"{kind} has overlapping classes, but {root} has none; regions are lists of numbers in "
            "dataset.json"
        )
    if has_regions and not is_overlapping:
        raise ValueError(
            f"{kind} has exclusive classes, but those of {root} may overlap: they are regions, "
            "lists of numbers in dataset.json"
        )

    count = num_classes(model)
    if len(dataset.classes) != count + is_overlapping:
        classes = ", ".join(dataset.classes)
        raise ValueError(
            f"{kind} has {count} classes, but {root} has {len(dataset.classes)} ({classes}); add "
            "prompts to its entries for a model that reads text, or choose another --model"
        )


def check_class_names(model, dataset, settings) -> None:
    """Raise ValueError, one line, if a test set names its classes differently than the model."""
    root = dataset.entries[0].root
    classes = ", ".join(dataset.classes)
    names = read_run(settings.weights).get("classes")
    if num_classes(model) > 1 and names and list(dataset.classes) != names:
        raise ValueError(f"{root}: has {classes}, but the run was trained on {', '.join(names)}")

    released = () if names else getattr(model.config, "classes", ())
    if layouts.same_name_different_index(dataset.classes, released):
        raise ValueError(
            f"{root}: has {classes}, but the model has {', '.join(released)}; scores would compare "
            "different classes"
        )


# --- data sets -----------------------------------------------------------------------------------


@dataclass
class DataSets:
    """The opened data sets of a run; a test alone has no parts."""

    parts: dict  # {"train": data set, "val": data set}
    tests: dict  # {name: data set}

    @property
    def all(self) -> list:
        """Return every data set."""
        return [*self.parts.values(), *self.tests.values()]


def open_data(settings, family) -> DataSets:
    """Open all data sets of a run, and print a line about each.

    family: the model's in recipes.FAMILIES. Raises FileNotFoundError or ValueError, one line.
    """
    data_sets = _open_overfit(settings, family) if settings.overfit else _open(settings, family)
    for dataset in data_sets.all:
        if dataset.holds != family.takes:
            raise ValueError(
                f"{dataset.entries[0].root} holds {dataset.holds}, but {settings.model} takes "
                f"{family.takes}; choose another --model"
            )
    return data_sets


def _open_overfit(settings, family) -> DataSets:
    """Return the first cases of --data as training, validation and test set."""
    entries = []
    for data_set in settings.data:
        root, split = layouts.training_split(data_set)
        entries += layouts.read_entries(root, split, settings.group_regex)
    name = "--overfit: train, val and test are the same"
    one = open_together({name: entries[: settings.overfit]}, settings, family)[name]
    print("  such scores show that the code works; they say nothing about new cases")
    return DataSets({"train": one, "val": one}, {"overfit": one})


def _open(settings, family) -> DataSets:
    """Return the training, validation and test sets of --data and --test."""
    tests = list_tests(settings)
    lists = {f"test {name}": entries for name, entries in tests.items()}
    if not settings.eval or settings.threshold == "auto":
        train, val = layouts.train_and_val(
            settings.data, settings.seed, settings.group_regex, settings.fold
        )
        lists |= {"val": val} if settings.eval else {"train": train, "val": val}
    warn_of_shared_patients(lists)
    opened = open_together(lists, settings, family)
    parts = {name: opened[name] for name in ("train", "val") if name in opened}
    return DataSets(parts, {name: opened[f"test {name}"] for name in tests})


def warn_of_shared_patients(lists: dict[str, list]) -> None:
    """Print a line for each list of entries whose patients are also in train.

    --group-regex keeps patients together in random splits only; other splits may divide them.
    """
    train = {(entry.root, entry.group) for entry in lists.get("train", []) if entry.group}
    for name, entries in lists.items():
        shared = sorted(train & {(entry.root, entry.group) for entry in entries})
        if name != "train" and shared:
            root, patient = shared[0]
            print(
                f"warning: {name} shares patients with train ({len(shared)}, such as {patient}); "
                f"its scores may be too high; python prepare.py check {shlex.quote(str(root))} "
                "lists them (add --group-regex if you gave it here)"
            )


def list_tests(settings) -> dict[str, list]:
    """Return the entries of the test sets by name: of --test, else of the test splits of --data.

    A test set that is empty or lacks files is an error with --eval. A training leaves it out and
    prints that. Raises FileNotFoundError or ValueError, one line.
    """
    tests = {}
    for data_set in settings.test or settings.data:
        path, split = layouts.path_and_split(data_set)
        if not settings.test and layouts.split_role(split) == "train":  # --data PATH:train_10
            split = "test"
        if not settings.test and not settings.eval and "test" not in layouts.find_splits(path):
            print(f"{path}: no test split, so it is not tested on; name another with --test")
            continue
        name = Path(path).resolve().name + ("" if split == "test" else f":{split}")
        if name in tests:
            raise ValueError(f"two test sets are called {name}; rename a folder")

        try:
            entries = layouts.read_entries(path, split, settings.group_regex)
            if not entries:
                raise layouts.EmptySplit(f"{path}: its split {split} is empty")
            layouts.check_files_exist(entries)
        except (layouts.Unpaired, layouts.MissingFiles, layouts.EmptySplit) as error:
            if settings.eval:
                raise
            print(f"test {name} is left out, training continues without it: {error}")
            continue
        tests[name] = entries
    return tests


def earlier_run(settings) -> dict:
    """Return the config.json of the run that is tested or resumed, {} if there is none."""
    if settings.eval:
        return read_run(settings.weights)
    return read_run(settings.out) if settings.resume else {}


def open_together(lists: dict[str, list], settings, family) -> dict:
    """Open lists of entries as data sets of images or, if their files are NIfTI, of volumes.

    Images are opened together, since the values of all their masks decide how these are read.
    Prints a line about each set. Raises as `data.open_datasets` does.
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

    sets = {name: sets[name] for name in lists}  # in the order of the lists
    for name, dataset in sets.items():
        print(f"{name}: {dataset.describe()}")
        if name in images and is_scored_only(name):
            say_empty(name, dataset)
    return sets


def is_of_volumes(entry) -> bool:
    """Return True if an entry belongs to a data set of volumes."""
    return layouts.is_volume(entry.image) or layouts.has_volumes(entry.root)


def is_scored_only(name: str) -> bool:
    """Return True if a list of entries of this name is scored, and not trained on."""
    return name == "val" or name.startswith("test ")


def say_empty(name: str, dataset) -> None:
    """Print a line for each data set whose ground truth has no foreground in this split."""
    for root, entries in dataset.empty_data_sets().items():
        cases = f"all {len(entries)} cases" if len(entries) > 1 else "its only case"
        message = (
            f"{root}: the ground truth of {name} is empty in {cases}, {entries[0].mask} for one; "
            "Dice is 1 where nothing is predicted, else 0"
        )
        if name == "val":
            message += ", so that the best epoch is the one with the fewest false alarms"
        print(message)


def mask_reading(lists: dict[str, list], settings) -> data.MaskReading:
    """Return the facts that decide how masks are read, besides the masks in `lists`.

    A run that is resumed or tested has its rules in config.json. A training counts the mask values
    of the splits train, val and test of its data sets, including those that it does not open.
    """
    known = earlier_run(settings).get("masks", {})
    reading = data.MaskReading(settings.mask_threshold, known)
    opens_all_splits = not settings.test and not settings.overfit
    if settings.eval or opens_all_splits:
        return reading

    opened = set()
    for entries in lists.values():
        opened |= {entry.mask for entry in entries}
    for data_set in settings.data:
        root, _ = layouts.training_split(data_set)
        for split in sorted({"train", "val", "test"} & layouts.find_splits(root).keys()):
            try:
                entries = unopened_entries(root, split, settings.group_regex, opened)
                counts = data.mask_counts(entries, Path(settings.cache))
            except layouts.Unpaired:
                continue
            except (ValueError, OSError) as error:
                print(f"{root}: {split} does not count for how masks are read ({error})")
                continue
            reading.unopened += entries
            reading.unopened_counts = np.concatenate([reading.unopened_counts, counts])
    return reading


def unopened_entries(root: str, split: str, group_regex: str | None, opened: set[Path]) -> list:
    """Return the entries of a split that have all their files, without those of `opened` masks."""
    with redirect_stdout(io.StringIO()):  # its notes were printed when the set was opened
        entries = layouts.read_entries(root, split, group_regex)
    unopened = []
    for entry in entries:
        if entry.mask not in opened and not layouts.missing_files([entry]):
            unopened.append(entry)
    return unopened


def check_prepared(data_sets: DataSets, settings) -> None:
    """Check all prepared volumes of a run, and print the notes about them.

    Raises ValueError, one line, if label maps hold 0 and 255 where 255 seems to be a class rather
    than ignored voxels, or if the training split has no foreground.
    """
    parts = data_sets.parts
    volumes.check_255(data_sets.all)
    if "train" in parts:
        parts["train"].check_foreground()
    if "val" in parts:
        say_empty("val", parts["val"])
    for name, dataset in data_sets.tests.items():
        say_empty(f"test {name}", dataset)
    if not settings.overfit:  # its splits are the same on purpose
        say_shared(parts, data_sets.tests)
    nifti.notices.print()


def say_shared(parts: dict, tests: dict) -> None:
    """Print a line if volumes are in two of the splits train, val and test."""
    shared = shared_volumes(separate_splits(parts, tests))
    if not shared:
        return
    names = ", ".join(shared[:3])
    if len(shared) > 3:
        names += f" and {len(shared) - 3} more"
    count = f"{len(shared)} volumes are" if len(shared) > 1 else "1 volume is"
    print(
        f"{count} in two splits: {names}; scores on them do not show how the model does on new "
        "patients"
    )


def separate_splits(parts: dict, tests: dict) -> list[tuple[str, object]]:
    """Return (split, data set) of all sets that must not share volumes.

    A test on another split of the training's own data sets (--test PATH:val) may share them.
    """
    trained = set()
    for dataset in parts.values():
        trained |= {entry.root for entry in dataset.entries}

    splits = [*parts.items()]
    for name, dataset in tests.items():
        is_on_purpose = ":" in name and all(entry.root in trained for entry in dataset.entries)
        if not is_on_purpose:
            splits.append(("test", dataset))
    return splits


def shared_volumes(splits: list[tuple[str, object]]) -> list[str]:
    """Return a few words on each volume that is in two splits.

    Volumes are compared by name within a data set, and by their voxels regardless of the name.
    """
    first_seen = {}  # (kind of key, key) -> split, name
    shared = {}  # (split, root, name) -> words
    for split, dataset in splits:
        for i, entry in enumerate(dataset.entries):
            keys = {"voxels": dataset.digest(i), "name": (entry.root, entry.name)}
            for kind, key in keys.items():
                first_split, name = first_seen.setdefault((kind, key), (split, entry.name))
                if first_split == split:
                    continue
                words = f"{name} ({first_split}) is {entry.name} ({split})"
                if name == entry.name:
                    suffix = ", by name alone" if kind == "name" else ""
                    words = f"{name} ({first_split} and {split}{suffix})"
                shared.setdefault((split, entry.root, entry.name), words)
    return [*shared.values()]
