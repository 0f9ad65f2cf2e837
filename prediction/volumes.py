"""Predict volumes: label maps, probabilities, overlays and measurements."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.evaluate import each_is
from engine.runs import check_threshold
from imaging import measurements, nifti, organ_rules, pictures, volumes
from prediction import combine, flips, members
from prediction.models import LoadedModel


def class_endings(classes: list[str]) -> list[str]:
    """Return the endings of the classes' file names, "_right_kidney" for "right kidney".

    Characters that a file system may refuse become "_"; others, such as those of ER+ and ER-, stay.
    If an ending equals an earlier one, or differs only in case, the index of the class is added,
    and that is printed.
    """
    refused = r'[\s/\\<>:"|?*_\x00-\x1f\x7f-\x9f]+'
    endings = []
    folded = set()
    for index, name in enumerate(classes, 1):
        ending = re.sub(refused, "_", f"_{name}")
        while ending.casefold() in folded:
            ending += f"_{index}"
            print(f"class {name}: its files are named NAME{ending}, as another class has its name")
        endings.append(ending)
        folded.add(ending.casefold())
    return endings


def volume_outputs(name: str, class_endings: list[str], args) -> dict[str, Path]:
    """Return the files of one volume by kind. Its masks are written last."""
    endings = {}
    if args.probabilities:
        endings["probability"] = "_probability.nii.gz"
    if args.overlays:
        endings["overlay"] = "_overlay.png"
    for i, class_ending in enumerate(class_endings):
        endings[f"mask{i}"] = f"{class_ending}.nii.gz"
    return {kind: Path(args.out) / f"{name}{ending}" for kind, ending in endings.items()}


def known_classes(config, run: dict) -> list[str] | None:
    """Return the names of a model's classes, background first; None if nothing names them."""
    names = run.get("classes") or list(config.classes)
    if not names:
        return None
    return names if len(names) > 1 else ["background", *names]


def class_names(config, names: list[str] | None, run: dict) -> tuple[list[str], list[int]]:
    """Return the names of a model's classes, background first, and their values in label maps.

    names: of `known_classes`, None for "class 0", "class 1", …
    """
    if names is None:
        names = [f"class {k}" for k in range(config.num_classes)]
        names = names if len(names) > 1 else ["background", *names]

    labels = None if config.overlapping else run.get("labels")
    if labels and max(labels) > 255:  # label maps are uint8
        print(f"the labels of the training data go up to {max(labels)}; masks have 0, 1, 2, …")
        labels = None
    return names, labels or list(range(len(names)))


def check_channels(loaded: list[LoadedModel]) -> None:
    """Raise ValueError, one line, unless all models take volumes of the same number of channels."""
    first = loaded[0]
    for other in loaded[1:]:
        if first.config.in_channels != other.config.in_channels:
            raise ValueError(
                f"--weights: {first.weights.source} takes volumes of {first.config.in_channels} "
                f"channels, {other.weights.source} of {other.config.in_channels}; an ensemble "
                "needs one kind of input"
            )


def fill_of(member: LoadedModel) -> float | None:
    """Return the value that replaces NaN and infinite voxels for a model (`volumes.fill_value`)."""
    return volumes.fill_value(member.model.preprocess, member.config.in_channels)


def check_rules(config, classes: list[str], args) -> None:
    """Raise ValueError, one line, if --organ-rules has no rule for a model's classes.

    Classes that stay unchanged, since a rule needs an organ that is not predicted, are printed.
    """
    if not config.overlapping:
        raise ValueError(
            "--organ-rules: needs a model with overlapping classes, and those of this model do not "
            "overlap; use --largest-component"
        )
    if args.largest_component:
        raise ValueError("--organ-rules decides what is one piece; remove --largest-component")
    if not organ_rules.classes_with_rules(classes[1:]):
        names = ", ".join(classes[1:]) or "nothing names the model's classes"
        raise ValueError(f"--organ-rules: none for these classes ({names}); remove it")
    for name, needs in organ_rules.classes_missing_for_rules(classes).items():
        print(f"--organ-rules: {name} stays as it is without {', '.join(needs)}")


class VolumePredictor:
    """One or several models with everything needed to predict the volumes of one call."""

    unit = "volume"
    columns = measurements.VOLUME_COLUMNS

    def __init__(self, loaded: list[LoadedModel], args):
        """Choose the classes: those of --classes, else all of the runs or the models.

        loaded: one or several models; their probabilities are averaged. args: the options of
        predict.py. Raises ValueError, one line, for options and models that do not go together.
        """
        self.members = loaded
        all_names = [known_classes(member.config, member.weights.run) for member in loaded]
        check_channels(loaded)
        names = members.check_classes(loaded, all_names)
        self.config = members.shared_config(loaded)
        self.args = args

        self.classes, self.labels = class_names(self.config, names, loaded[0].weights.run)
        for member in loaded:  # the result is the same for all
            self.chosen = member.weights.family.chosen_classes(
                member.model, self.classes, args.classes
            )
        if self.chosen is not None:
            self.classes = [self.classes[0], *(self.classes[k + 1] for k in self.chosen)]
        if args.organ_rules:
            check_rules(self.config, self.classes if names else [], args)
        outputs = 1 if self.config.overlapping else self.config.num_classes
        check_threshold(outputs, args.threshold)

        self.flips = [()]
        if args.tta:
            self.flips = flips.volume_flips(self.classes)
            flips.say_views([len(self.flips)], self.unit)

    def predict(self, paths: list[Path]) -> tuple[dict[str, Callable], list[dict]]:
        """Return functions that write the files of a volume, and the rows of its measurements.

        The functions are by the kinds of `volume_outputs`. paths: the files of its channels. Raises
        OSError or ValueError, one line, for an input that cannot be read or has other channels than
        the model.
        """
        images, grid = self.read(paths)
        probabilities = self.predict_probabilities(images, grid)
        maps = self.label_maps(probabilities, grid, self.config.threshold)  # (n,X,Y,Z)
        image = self.first_image(images)
        rows = self.measure(maps, probabilities, image[0], grid)
        return self.writers(maps, probabilities, image, grid), rows

    def read(self, paths: list[Path]) -> tuple[dict, nifti.Grid]:
        """Return the volume of files and its grid. Raises as `predict` does.

        The volume is {value that a model takes for NaN and infinite voxels: float32 (C,X,Y,Z)}, as
        the models of an ensemble may take different values.
        """
        channels = sum(nifti.read_grid(path).channels for path in paths)
        nifti.check_channels(paths[0], channels, self.config.in_channels)
        images = {}
        for member in self.members:
            fill = fill_of(member)
            if fill not in images:
                images[fill], grid = nifti.read_volume(paths, fill)

        if any(member.config.intensity for member in self.members):
            volumes.notice_if_not_hu(paths[0], volumes.hu_facts(self.first_image(images)))
        return images, grid

    def first_image(self, images: dict) -> np.ndarray:
        """Return the volume (C,X,Y,Z) that the first model reads. images: of `read`."""
        return images[fill_of(self.members[0])]

    def predict_probabilities(self, images: dict, grid: nifti.Grid) -> torch.Tensor:
        """Return the mean probabilities (K,X,Y,Z) of all models and flips. images: of `read`."""
        return torch.from_numpy(combine.mean(self.views(images, grid)))

    def views(self, images: dict, grid: nifti.Grid) -> Iterator[np.ndarray]:
        """Yield the probabilities (K,X,Y,Z) of every model and flip. images: of `read`."""
        for member in self.members:
            image = images[fill_of(member)]
            yield from combine.views_of_volume(member, image, grid, self.flips, self.chosen)

    def known_cells(self, name: str) -> dict:
        """Return no cells: a volume's measurements depend on its file and masks alone."""
        return {}

    def caption(self, name: str) -> str:
        """Return the caption of a case on the contact sheet."""
        return name

    def measure(self, maps: np.ndarray, probabilities, intensity: np.ndarray, grid) -> list:
        """Return the rows of measurements of label maps (n,X,Y,Z). intensity (X,Y,Z)."""
        if self.config.overlapping:
            masks = maps.view(bool)  # (K,X,Y,Z)
        else:
            masks = (maps[0] == label for label in self.labels[1:])  # one at a time
        classes = self.classes[1:]
        foreground = probabilities[-len(classes) :].numpy()
        measure = partial(measurements.measure_volume, intensity=intensity, grid=grid)
        return measurements.measure_classes(classes, masks, foreground, measure)

    def writers(self, maps: np.ndarray, probabilities, image: np.ndarray, grid) -> dict:
        """Return the functions of `predict` for label maps (n,X,Y,Z).

        probabilities (K,X,Y,Z), image (C,X,Y,Z).
        """
        is_overlapping = self.config.overlapping
        writers = {}
        for i, label_map in enumerate(maps):
            writers[f"mask{i}"] = partial(nifti.write, volume=label_map, grid=grid)

        if self.args.probabilities:
            has_background = len(probabilities) > 1 and not is_overlapping
            first = 1 if has_background else 0
            highest = probabilities[first:].amax(0).numpy()  # (X,Y,Z)
            writers["probability"] = partial(nifti.write, volume=highest, grid=grid)
        if self.args.overlays:
            masks = maps > 0 if is_overlapping else each_is(maps[0], self.labels[1:])  # (n,X,Y,Z)
            grey = volumes.grey(image, self.members[0].model.preprocess)
            picture = pictures.volume_overlay(grey, None, masks, grid.spacing)
            writers["overlay"] = partial(pictures.save_picture, picture=picture)
        return writers

    def label_maps(self, probabilities, grid, threshold: float) -> np.ndarray:
        """Return the label maps of probabilities (K,X,Y,Z): uint8 (n,X,Y,Z).

        Overlapping classes have n = K maps of 0 and 1; else one map holds the values in `labels`.
        threshold: of a single class and of overlapping classes.
        """
        config = self.config
        if config.overlapping or config.num_classes == 1:
            label = 1 if config.overlapping else self.labels[1]
            is_inside = (probabilities > threshold).numpy()
            maps = np.where(is_inside, np.uint8(label), np.uint8(0))  # (K,X,Y,Z)
        else:
            indices = probabilities.argmax(0).numpy()  # (X,Y,Z)
            maps = np.array(self.labels, np.uint8)[indices][None]  # (1,X,Y,Z)

        if self.args.largest_component:
            maps = np.stack([volumes.largest_component(label_map) for label_map in maps])
        if self.args.organ_rules:
            masks = dict(zip(self.classes[1:], maps.view(bool), strict=True))
            ruled = organ_rules.organ_rules(masks, grid.spacing)
            maps = np.stack([*ruled.values()]).view(np.uint8)  # (K,X,Y,Z)
        return maps
