"""Predict images: masks, probabilities, overlays and measurements."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import data
from engine.evaluate import each_is, to_masks
from engine.runs import check_threshold, num_classes
from imaging import image_files, layouts, measurements, pictures
from prediction import combine, dicom, flips, members
from prediction.inputs import entries_of
from prediction.models import LoadedModel, Weights
from preparation.dicom_files import is_dicom


def image_outputs(name: str, args) -> dict[str, Path]:
    """Return the files of one image by kind. The mask is written last."""
    endings = {}
    if args.probabilities:
        endings["probability"] = "_probability.png"
    if args.overlays:
        endings["overlay"] = "_overlay.png"
    endings["mask"] = ".png"
    return {kind: Path(args.out) / f"{name}{ending}" for kind, ending in endings.items()}


def ground_truths(args, run: dict, cases: list) -> dict[str, tuple]:
    """Return {name of a case: (entry, threshold of its mask)} for the overlays of data sets.

    cases: of `list_cases`. With --prompts-csv, all cases of an image have the mask of the image.

    Only masks that exist are included. They are read as in the run. A mask that cannot be read does
    not influence how the others are read, and fails when it is drawn. Raises ValueError, one line,
    if the masks do not fit together, or if --mask-threshold has no effect.
    """
    truths = {}
    reading = data.MaskReading(args.mask_threshold, run.get("masks", {}))
    orientation = run.get("options", {}).get("mask_orientation")
    for path in map(Path, args.inputs):
        if not args.overlays or not layouts.find_splits(path):
            continue
        with redirect_stdout(io.StringIO()):  # its notes were printed by list_cases
            entries = entries_of(path, args, run)
        entries = [entry for entry in entries if entry.mask.is_file()]
        entries = data.with_mask_orientation(entries, orientation)
        truths |= with_thresholds(entries, reading)

    if args.mask_threshold is not None and not truths:
        raise ValueError(
            "--mask-threshold has no effect without --overlays and a data set with masks; remove it"
        )
    if args.prompts_csv is None:
        return truths
    of_image = {truth[0].image: truth for truth in truths.values()}
    return {name: of_image[file] for name, file, _ in cases if file in of_image}


def with_thresholds(entries: list, reading: data.MaskReading) -> dict[str, tuple]:
    """Return {name: (entry, threshold of its mask)} of the entries of a data set."""
    truths = {entry.name: (entry, 0) for entry in entries}
    with ThreadPoolExecutor() as pool:
        all_counts = [*pool.map(count_mask, entries)]

    readable = []
    counts = []
    for entry, count in zip(entries, all_counts, strict=True):
        if count is not None:
            readable.append(entry)
            counts.append(count)
    if not readable:
        return truths

    counts = np.concatenate(counts)  # (n,3,256)
    _, thresholds = data.decide_thresholds(readable, counts, reading)
    for entry, threshold in zip(readable, thresholds, strict=True):
        truths[entry.name] = (entry, threshold)
    return truths


def count_mask(entry) -> np.ndarray | None:
    """Return `data.count_masks` of one entry, (1,3,256); None if its mask cannot be read."""
    try:
        return data.count_masks([entry])
    except (ValueError, OSError):
        return None


def truth_of(truth: tuple | None, n: int) -> np.ndarray | None:
    """Return the ground truth, bool (n,H,W), of an item of `ground_truths`.

    None if there is none, or if it has another number of classes than the n of the prediction.
    """
    if truth is None or len(layouts.foreground(truth[0].classes)) != n:
        return None
    return each_is(data.read_truth(*truth), range(1, n + 1))  # (n,H,W)


def load_image(file: Path) -> tuple[np.ndarray, bool]:
    """Return an image or DICOM file as uint8 (H,W,3), and True if it had non-finite pixels."""
    return dicom.load_image(file) if is_dicom(file) else image_files.load_image(file)


def mask_picture(masks: np.ndarray) -> Image.Image:
    """Return masks, bool (K,H,W), as a picture: 0 and 255 for K = 1, else class indices."""
    K = len(masks)
    if K == 1:
        return Image.fromarray(masks[0].astype(np.uint8) * 255)
    return pictures.class_map(masks.argmax(0).astype(np.uint8), K)


def probability_picture(probabilities: np.ndarray) -> Image.Image:
    """Return the highest probability of the foreground (n,H,W) as a picture of 16 bits."""
    highest = probabilities.max(0)  # (H,W)
    return Image.fromarray((highest * 65535).round().astype(np.uint16))


def image_sample(
    image: np.ndarray, file: Path, classes: tuple, prompt: str = "", colours: str | None = None
) -> dict:
    """Return the sample of an image without ground truth, for the `inputs` of a recipe.

    image: uint8 (H,W,3). classes: names of the model's classes. colours: matplotlib colour map that
    the run gave grey images (--pseudocolor).
    """
    pixels = image_files.pseudocolor(image, colours).transpose(2, 0, 1).copy()  # (3,H,W)
    return {
        "image": torch.from_numpy(pixels),
        "prompt": prompt,
        "name": file.stem,
        "file": file,
        "size": image.shape[:2],
        "classes": classes,
        "group": None,
        "dataset": "",
    }


def unnamed_classes(model: nn.Module) -> list[str]:
    """Return names for the classes of a model whose weights name none."""
    count = num_classes(model)
    return [f"class {index}" for index in range(count)] if count > 1 else ["target"]


class ImagePredictor:
    """One or several models with everything needed to predict the images of one call."""

    unit = "image"
    columns = measurements.IMAGE_COLUMNS

    def __init__(self, cases: list, weights: list[Weights], second: dict, args, truths: dict):
        """Load the models, whose probabilities are averaged.

        cases: of `list_cases`. second: of `members.second_files`. truths: of `ground_truths`.
        Raises ValueError, one line, for options and models that do not go together.
        """
        overrides = dict(second)
        if args.threshold is not None:
            overrides["threshold"] = args.threshold
        loaded = members.load_members(weights, args.device, overrides)
        self.args = args
        self.cases = {name: (file, prompt) for name, file, prompt in cases}
        self.truths = truths
        if args.prompts_csv is not None:
            self.columns = ("prompt", *self.columns)
        self.non_finite = []  # files with NaN or infinite pixels
        self.damaged_exif = []  # files

        named = members.check_classes(
            loaded, [model.weights.run.get("classes") for model in loaded]
        )
        self.members = []
        for model in loaded:
            classes = self.add_member(model, cases, named)  # the same for all
        self.classes = tuple(classes or unnamed_classes(loaded[0].model))
        check_threshold(num_classes(loaded[0].model), args.threshold)
        self.config = members.shared_config(loaded)
        self.flips = [()]
        if args.tta:
            self.flips = flips.image_flips(self.classes)
            counts = [flips.count_views(prompt, self.flips) for _, _, prompt in cases]
            flips.say_views(counts, self.unit)

        n = len(layouts.foreground(self.classes))
        if any(len(layouts.foreground(entry.classes)) != n for entry, _ in truths.values()):
            print("--overlays: the ground truth has other classes than the model and is not drawn")

    def add_member(self, loaded: LoadedModel, cases: list, named: list | None) -> list | None:
        """Add a model. Return the names of the classes of its masks, None if nothing names them.

        named: the classes of the runs. What is printed about prompts is printed for the first.
        """
        notes = redirect_stdout(io.StringIO()) if self.members else nullcontext()
        with notes:
            make_prompts, classes = loaded.weights.family.prompts_for_prediction(
                loaded.recipe, cases, named, self.args
            )
        overlap = combine.OVERLAP if self.args.overlap is None else self.args.overlap
        member = combine.ImageMember(loaded, make_prompts, self.args.window_size, overlap)
        self.members.append(member)
        return classes

    def views(self, image: np.ndarray, file: Path, prompt: str) -> Iterator[np.ndarray]:
        """Yield the probabilities (K,H,W) of every model and flip. image: uint8 (H,W,3)."""
        for member in self.members:
            sample = image_sample(image, file, self.classes, prompt, member.colours)
            yield from member.views(sample, self.flips)

    def overlay(self, name: str, image: np.ndarray, masks: np.ndarray) -> Image.Image:
        """Return an image with its ground truth, masks (n,H,W), boxes and points drawn on."""
        file, _ = self.cases[name]
        truth = truth_of(self.truths.get(name), len(masks))
        overlay = pictures.overlay(image, truth, masks)
        prompts = self.members[0].make_prompts(image_sample(image, file, self.classes))
        pictures.draw_prompts(overlay, prompts.get("shown", []))
        return overlay

    def predict(self, name: str) -> tuple[dict[str, Callable], list[dict]]:
        """Return functions that write the files of a case, and the rows of its measurements.

        The functions are by the kinds of `image_outputs`. Raises OSError or ValueError, one line,
        for an input that cannot be read.
        """
        file, prompt = self.cases[name]
        image, has_non_finite = load_image(file)  # (H,W,3)
        probabilities = combine.mean(self.views(image, file, prompt))  # (K,H,W)

        masks = to_masks(probabilities, self.config)  # (K,H,W)
        n = len(layouts.foreground(self.classes))
        foreground = masks[-n:]  # (n,H,W)
        probabilities = probabilities[-n:]  # (n,H,W)

        drawn = {"mask": mask_picture(masks)}
        if self.args.probabilities:
            drawn["probability"] = probability_picture(probabilities)
        if self.args.overlays:
            drawn["overlay"] = self.overlay(name, image, foreground)
        writers = {kind: partial(pictures.save_picture, picture=drawn[kind]) for kind in drawn}
        rows = self.measure(name, image, foreground, probabilities)

        if has_non_finite:
            self.non_finite.append(file)
        if not is_dicom(file) and image_files.has_damaged_exif(file):
            self.damaged_exif.append(file)
        return writers, rows

    def pixel_size_of(self, name: str) -> tuple | list | None:
        """Return width and height of an image's pixels in mm, None if they are unknown.

        They are those of --pixel-size, else of the header of a DICOM file, else of a spacing.csv.
        """
        file, _ = self.cases[name]
        if self.args.pixel_size is None and is_dicom(file):
            return dicom.pixel_size(file)
        return self.args.pixel_size or measurements.pixel_size_of(file)

    def known_cells(self, name: str) -> dict:
        """Return the cells of an image's measurements that are known before it is predicted."""
        return self.prompt_cell(name) | measurements.pixel_cells(self.pixel_size_of(name))

    def caption(self, name: str) -> str:
        """Return the caption of a case on the contact sheet."""
        text = self.prompt_cell(name).get("prompt")
        return f"{name}: “{text}”" if text else name

    def prompt_cell(self, name: str) -> dict:
        """Return the cell with the text of --prompts-csv, {} without this option."""
        return {} if self.args.prompts_csv is None else {"prompt": self.cases[name][1]}

    def measure(
        self, name: str, image: np.ndarray, masks: np.ndarray, probabilities: np.ndarray
    ) -> list[dict]:
        """Return the rows of measurements of an image's masks (n,H,W)."""
        classes = layouts.foreground(self.classes)
        measure = partial(
            measurements.measure_image,
            grey=image_files.grey_levels(image),
            pixel_size=self.pixel_size_of(name),
        )
        rows = []
        for row in measurements.measure_classes(classes, masks, probabilities, measure):
            first = {"class": row["class"], "mask": row["mask"]}
            rows.append(first | self.prompt_cell(name) | row)
        return rows

    def say_how_images_were_read(self) -> None:
        """Print which images hold NaN or infinite pixels, and which have damaged EXIF data."""
        if self.non_finite:
            print(data.non_finite_line(self.non_finite))
        if self.damaged_exif:
            print(data.damaged_exif_line(self.damaged_exif))
