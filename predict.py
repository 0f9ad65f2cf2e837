"""Predict masks for new images or volumes, with a fine-tuned run or with official weights.

    python predict.py --weights runs/cris-kvasir_polyp --prompt "one pink polyp" --out masks a.jpg
    python predict.py --weights runs/cris-kvasir_polyp --out masks --split test data/kvasir_polyp
    python predict.py --weights runs/segformer-uw_madison --out masks folder/
    python predict.py --weights MONAI/swin_unetr_btcv_segmentation --out organs ct.nii.gz
    python predict.py --weights runs/universal-msd --classes liver spleen --out organs ct.nii.gz

Images become PNG masks at their own size: 0 and 255, or class indices in a palette with legend.png
and classes.json. Volumes become NIfTI label maps on their own grid with classes.json; overlapping
classes get one file each. measurements.csv holds the area or volume, the diameter and more of every
mask. Existing files are never overwritten. Inputs that cannot be read are listed at the end (exit
status 1; 2 if none could be predicted). docs/training.md has the details.
Defaults are in brackets: [run] is the setting of the run in --weights, [weights] what the weights
were published or trained with, [recipe] the setting of the model's recipe.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from engine import command_line, tables
from engine.evaluate import each_is, to_masks
from engine.measurement_table import MEASUREMENTS, MeasurementTable
from engine.ranges import GREY_LEVEL, LENGTH, POSITIVE, Number
from engine.runs import check_threshold, num_classes, patients_of, pick_device, read_run
from imaging import (
    atomic_files,
    files,
    image_files,
    layouts,
    measurements,
    nifti,
    organ_rules,
    pictures,
    volumes,
)
from recipes import FAMILIES, second_file
from recipes.base import BOX_OPTIONS, IMAGE_OPTIONS, TEXT_OPTIONS, VOLUME_OPTIONS
from recipes.images import describe_cuts

# --- the program ---------------------------------------------------------------------------------

USAGE = "python predict.py --weights SOURCE --out DIR [options] INPUT [INPUT ...]"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = command_line.Parser(__doc__, usage=USAGE, add_help=False)
    add_common_options(parser.add_argument_group("common options").add_argument)
    add_model_options(parser.add_argument_group("model options").add_argument)
    add_file_options(parser.add_argument_group("file options").add_argument)
    add_volume_options(parser.add_argument_group("volume options").add_argument)

    args = parser.parse_args()
    if args.prompt is not None:
        args.prompt = layouts.prompt_option(args.prompt)
    return args


def add_common_options(add: Callable) -> None:
    """Add the options that most people need."""
    add("inputs", metavar="INPUT", nargs="+", help="image, volume, folder of them, or data set")
    add(
        "--weights",
        metavar="SOURCE",
        required=True,
        help="trained model: run folder, file, or hub id",
    )
    add("--out", metavar="DIR", required=True, help="folder that the masks are written to")
    add(
        "--prompt",
        metavar="TEXT",
        help="text that describes the target; for data sets also p0 to p9 [run]",
    )
    add(
        "--threshold",
        metavar="X",
        type=Number(above=0, below=1),
        help="pixels or voxels above this probability are foreground [weights]",
    )
    add(
        "--split",
        metavar="NAME",
        help="split of a data set to predict [test, or all images without splits]",
    )
    add(
        "--overlays",
        action="store_true",
        help="also save images with the masks drawn on: NAME_overlay.png",
    )
    add(
        "--skip-existing",
        action="store_true",
        help="continue a stopped call: skip inputs with masks in --out",
    )
    add("-h", "--help", action="help", help="show this help and exit")


def add_model_options(add: Callable) -> None:
    """Add the options of the model and its prompts."""
    add(
        "--model",
        metavar="NAME",
        choices=sorted(FAMILIES),
        help=f"model of --weights: {', '.join(sorted(FAMILIES))} [run]",
    )
    add("--boxes", metavar="FILE", help="SAM: CSV or JSON file of boxes [one box, the whole image]")
    add("--points", metavar="FILE", help="SAM: CSV or JSON file of points, alone or with --boxes")
    add("--clip", metavar="FILE", help="CLIP ViT-B/16 for CLIPSeg's --weights rd64-uni-refined.pth")
    add(
        "--decoder",
        metavar="SOURCE",
        help="biomedclipseg: CLIPSeg with the decoder, if --weights have none",
    )
    add(
        "--device",
        metavar="NAME",
        default="auto",
        help="device to run on: auto, cpu, cuda, cuda:1, mps [auto]",
    )


def add_file_options(add: Callable) -> None:
    """Add the options of the files that are written."""
    add(
        "--probabilities",
        action="store_true",
        help="also save probabilities: NAME_probability, 16-bit PNG (value / 65535) or float32 "
        "NIfTI; with several classes the highest, background excluded",
    )
    add(
        "--pixel-size",
        metavar=("X", "Y"),
        nargs=2,
        type=LENGTH,
        help="width and height of an image's pixel in mm, for measurements.csv (default: those of "
        "spacing.csv, if the data have this file)",
    )
    add(
        "--mask-threshold",
        metavar="N",
        type=GREY_LEVEL,
        help="grey level above which a data set's own masks are foreground, for --overlays [run]",
    )


def add_volume_options(add: Callable) -> None:
    """Add the options that only models of volumes take."""
    add(
        "--largest-component",
        action="store_true",
        help="keep only the largest connected component of each class",
    )
    add(
        "--organ-rules",
        action="store_true",
        help="overlapping classes: keep what anatomy allows, such as one piece per organ and "
        "tumours only within organs",
    )
    add("--classes", metavar="NAME", nargs="+", help="Universal Model: predict only these classes")
    add(
        "--overlap",
        metavar="X",
        type=Number(at_least=0, below=1),
        help="overlap of neighbouring sliding windows, as a share [run]",
    )
    add(
        "--window-batch",
        metavar="N",
        type=POSITIVE,
        help="sliding windows predicted at once; fewer need less memory [recipe]",
    )


def main() -> int:
    """Run the command line. Return the exit status."""
    args = parse()
    advice = f"the files in {args.out} are whole; the same command with --skip-existing continues"
    with atomic_files.claim_folder(Path(args.out)), command_line.recovery_advice(lambda: advice):
        return predict_inputs(args)


# Errors about options that are for other models; the groups are those of recipes/base.py.
REFUSED_HERE = {
    TEXT_OPTIONS: "--prompt: this model reads no text",
    BOX_OPTIONS: "--boxes, --points: this model takes no boxes or points, only SAM does",
    IMAGE_OPTIONS: "{flag}: is for images; this model takes volumes",
    VOLUME_OPTIONS: "{flag}: is for volumes; this model takes images",
}


def predict_inputs(args) -> int:
    """Predict all inputs into --out, which no other process writes to. Return the exit status."""
    run = read_run(args.weights)
    name = args.model or run.get("model") or model_for_volumes(args)
    if name not in FAMILIES:
        raise ValueError(f"{args.weights}: is a run of {name}, no model that this version has")
    family = FAMILIES[name]
    second = second_file(name, args.clip, args.decoder)
    check_split(args)
    family.refuse_foreign(vars(args), "this model", REFUSED_HERE)

    predict = predict_volumes if family.takes == "volumes" else predict_images
    with nifti.notices.grouped():
        return predict(family, run, second, args)


def model_for_volumes(args) -> str:
    """Return the first model for volumes, if all inputs are NIfTI files.

    Raises ValueError, one line, for other inputs: they do not decide the model.
    """
    paths = [Path(path) for path in args.inputs]
    for path in paths:
        foreign = nifti.other_volume_format(path)
        if foreign and path.suffix.lower() not in layouts.ENDINGS:
            raise ValueError(foreign)
    if not all(layouts.is_volume(path) for path in paths):
        raise ValueError(f"--model is missing: {args.weights} is not a run folder that names it")
    return next(name for name, family in FAMILIES.items() if family.takes == "volumes")


def check_split(args) -> None:
    """Raise ValueError, one line, if --split is used and no input is a data set."""
    if args.split is None:
        return
    if not any(layouts.find_splits(Path(path)) for path in args.inputs):
        raise ValueError("--split: none of the inputs is a data set; remove it")


# --- inputs --------------------------------------------------------------------------------------


def list_cases(args, run: dict, reads_text: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of all images, and print how many each folder has.

    Raises FileNotFoundError or ValueError, one line, for inputs that do not exist or options that
    do not fit.
    """
    cases = []
    for path in map(Path, args.inputs):
        if layouts.find_splits(path):
            cases += cases_of_data_set(path, args, run, reads_text)
            continue
        if reads_text and (args.prompt is None or layouts.is_prompt_type(args.prompt)):
            check_exists(path, "image")
            raise ValueError(
                f'{path}: images need --prompt "a text"; prompt types belong to data sets'
            )
        for file, folder in input_files(path, "image", args):
            name = file.relative_to(folder).with_suffix("")
            cases.append((name.as_posix(), file, args.prompt or ""))
    return cases


def cases_of_data_set(path: Path, args, run: dict, reads_text: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of the images of a data set; arguments of `list_cases`."""
    prompt = args.prompt
    if prompt is None:
        prompt = run.get("options", {}).get("prompt") if reads_text else ""
    if prompt is None:
        raise ValueError(f"{path}: --prompt is missing: a prompt type (p0…p9) or a text")
    entries = entries_of(path, args, run)
    return [(entry.name, entry.image, entry.text(prompt)) for entry in entries]


def entries_of(path: Path, args, run: dict) -> list[layouts.Entry]:
    """Return the entries of a data set that are to be predicted, and print which these are.

    Without --split they are those of the test split, or all images if the data set has no splits.
    Raises as `layouts.read_entries` does.
    """
    if args.split is None and layouts.is_undivided(path):
        entries = layouts.list_all_images(path)
        print(f"{path}: all {len(entries)} images; --split test takes those of its test split")
        return entries

    split = args.split or "test"
    folder = layouts.split_folder(path, split)
    if folder is not None:  # its masks are not needed, and may not exist
        entries = layouts.list_all_images(path, folder)
    else:
        entries = layouts.read_entries(path, split, patients_of(run, args.inputs))
    print(f"{path}: {len(entries)} cases of its split {split}")
    return entries


def check_exists(path: Path, noun: str) -> None:
    """Raise FileNotFoundError or ValueError, one line, unless an input is a file or a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {noun} or folder")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: is neither a file nor a folder")


def input_files(path: Path, noun: str, args) -> list[tuple[Path, Path]]:
    """Return (file, folder that its name is relative to) of an input, a file or a folder.

    noun: "image" or "volume". For a folder these are the images or volumes in it and its
    sub-folders, without --out, and their number is printed. Raises FileNotFoundError or ValueError,
    one line.
    """
    check_exists(path, noun)
    if path.is_file():
        return [(path, path.parent)]

    out = Path(args.out)
    if out.resolve() == path.resolve():
        raise ValueError(f"{path}: is an input and --out; choose another --out")
    listed = layouts.list_files(path, noun, without=out)
    print(f"{path}: {len(listed)} {noun} files")
    return [(file, path) for file in listed]


# --- outputs -------------------------------------------------------------------------------------


LONGEST_NAME = 245  # bytes of an output's name: temporary names have 10 more, and 255 is the limit


def check_outputs(paths: list[Path], out: Path, may_exist: bool = False) -> None:
    """Raise ValueError, one line, unless all files are new, different and inside the folder `out`.

    Links are followed, as writing would do. may_exist: files may exist already (--skip-existing).
    Called before anything is written.
    """
    folder = out.resolve()
    targets = {}  # the file behind all links -> path
    for path in paths:
        target = path.resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"{path}: lies outside --out {out} (at {target}); nothing was written")
        if os.path.lexists(path) and not (may_exist and path.is_file()):
            advice = "" if may_exist else ", or continue an earlier call with --skip-existing"
            raise ValueError(
                f"{path} exists already and is not overwritten; choose another --out{advice}"
            )
        if target in targets:
            raise ValueError(
                f"{path} would be written twice: two inputs have the same name, or one is named "
                "like a file that is added (legend.png, NAME_overlay.png); rename it"
            )
        targets[target] = path
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise ValueError(f"{path}: the name is too long for a file; rename the input")

    check_parents(targets)


def check_parents(targets: dict[Path, Path]) -> None:
    """Raise ValueError, one line, if a file is in the way of the folder of another file.

    targets: file behind all links -> path.
    """
    for folder in {path.parent for path in targets.values()}:
        ancestors = (folder, *folder.parents)
        nearest = next(path for path in ancestors if os.path.lexists(path))
        if not nearest.is_dir():
            raise ValueError(f"{nearest}: is no folder, so nothing can be written below it")

    for target, path in targets.items():
        for parent in target.parents:
            if parent in targets:
                raise ValueError(f"{path}: {targets[parent]} would be a file and a folder")


def save_shared(path: Path, content: dict | Image.Image) -> None:
    """Write a file that belongs to all cases of a call: the names of classes, or the legend."""
    if isinstance(content, dict):
        tables.write_json(path, content)
    else:
        pictures.save_picture(path, content)


def has_content(path: Path, content: dict | Image.Image) -> bool:
    """Return True if a file holds what `save_shared` would write."""
    try:
        if isinstance(content, dict):
            return files.read_json(path) == {str(key): value for key, value in content.items()}
        return np.array_equal(image_files.read_image(path), np.asarray(content.convert("RGB")))
    except ValueError:
        return False


def one_line(error: Exception, name: str) -> str:
    """Return an error about a case as one line that contains the case's name."""
    line = " ".join(str(error).split())
    return line if Path(name).name in line else f"{name}: {line}"


class Batch:
    """The files of one call: those that exist, those to write, and the inputs that failed.

    An input that fails does not end the call; all of them are listed at the end. The measurements
    of all cases are in one file. It is replaced when a case is finished, but not more often than
    every few seconds, and a case without measurements is not finished: after a kill it is predicted
    again.
    """

    LISTED = 20  # failed inputs that are listed at the end
    SAVE_EVERY = 10.0  # seconds between two writings of the measurements

    def __init__(self, args, predictor, cases: dict[str, dict[str, Path]], shared: dict):
        """Check all files before anything is written.

        predictor: an ImagePredictor or a VolumePredictor. cases: name -> the case's files by kind,
        in the order in which they are written. shared: file -> content, for files that belong to
        all cases. Raises ValueError, one line, if a file cannot be written.
        """
        self.out = Path(args.out)
        self.unit = predictor.unit
        self.cases = cases
        self.shared = shared
        self.failed = []  # a line for each input that could not be predicted
        self.written = 0

        if not cases:
            raise ValueError(f"the inputs hold no {self.unit}s, so there is nothing to predict")
        table_path = self.out / MEASUREMENTS
        paths = [table_path, *shared]
        for case_files in cases.values():
            paths += case_files.values()
        check_outputs(paths, self.out, args.skip_existing)
        for path, content in shared.items():
            if path.exists() and not has_content(path, content):
                raise ValueError(f"{path}: is of other classes; choose another --out")

        classes = layouts.foreground(tuple(predictor.classes))
        self.table = MeasurementTable(table_path, predictor.columns, classes)
        self.saved_at = time.monotonic()
        self.finished = set()  # names of the cases that an earlier call has predicted
        for name, case_files in cases.items():
            cells = predictor.known_cells(name)  # here, as a spacing.csv may be damaged
            is_written = all(path.exists() for path in case_files.values())
            if is_written and self.table.has(name, cells):
                self.finished.add(name)
        if self.finished:
            count = f"{len(self.finished)} of {len(cases)} {self.unit}s"
            print(f"{count} are predicted already and were skipped (--skip-existing)")

    def run(self, predict_case: Callable) -> int:
        """Predict all cases that are not finished and write their files. Return the exit status.

        predict_case: name of a case -> {kind: function that writes the file of this kind}, and the
        rows of its measurements; its errors about an input are collected. Raises OSError, one line,
        if a file cannot be written, and ValueError, one line, if no input could be predicted.
        """
        remaining = [name for name in self.cases if name not in self.finished]
        for name in tqdm(remaining, desc="predict", unit=self.unit, disable=None):
            try:
                writers, rows = predict_case(name)
            except (ValueError, OSError) as error:
                self.failed.append(one_line(error, name))
                continue
            except (MemoryError, RuntimeError) as error:
                if not command_line.is_out_of_memory(error):
                    raise
                self.failed.append(f"{name}: does not fit into memory")
                continue

            self.write_shared()
            for kind, path in self.cases[name].items():
                self.write(path, writers[kind])
            del writers  # gigabytes for volumes
            self.written += 1
            self.table.add(name, rows)
            if time.monotonic() - self.saved_at > self.SAVE_EVERY:
                self.write_measurements()
        return self.conclude()

    def write_measurements(self) -> None:
        """Replace the table of measurements."""
        self.save(self.table.path, lambda _: self.table.write(self.cases))
        self.saved_at = time.monotonic()

    def write_shared(self) -> None:
        """Write the files that belong to all cases, if they are missing."""
        for path, content in self.shared.items():
            self.write(path, partial(save_shared, content=content))

    def write(self, path: Path, save: Callable) -> None:
        """Write a file with save(path), unless an earlier call has written it."""
        if not path.exists():
            self.save(path, save)

    def save(self, path: Path, save: Callable) -> None:
        """Write a file with save(path). Raises OSError, one line, if that fails."""
        try:
            if not self.out.is_dir():
                raise FileNotFoundError(f"the folder {self.out} is gone")
            save(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the line about a full disk names the file
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise OSError(
                f"{path}: cannot be written ({error.strerror or error}); the finished files are "
                "whole; correct this, then continue with --skip-existing"
            ) from None

    def conclude(self) -> int:
        """Print what was written, list the failed inputs, and return the exit status."""
        if len(self.failed) == len(self.cases):
            first = self.failed[0]
            if len(self.failed) == 1:
                raise ValueError(first)
            raise ValueError(f"none of {len(self.failed)} {self.unit}s could be predicted; {first}")

        self.write_shared()
        if self.table.is_changed:
            self.write_measurements()
        masks = {"image": "masks", "volume": "volumes"}[self.unit]
        print(f"{self.written} {masks} in {self.out}", flush=True)
        if not self.failed:
            return 0

        print(
            f"error: {len(self.failed)} of {len(self.cases)} {self.unit}s could not be predicted; "
            "correct or remove them, then continue with --skip-existing",
            file=sys.stderr,
        )
        for line in self.failed[: self.LISTED]:
            print(f"  {line}", file=sys.stderr)
        if len(self.failed) > self.LISTED:
            print(f"  and {len(self.failed) - self.LISTED} more", file=sys.stderr)
        return 1


# --- images --------------------------------------------------------------------------------------


def predict_images(family, run: dict, second: dict, args) -> int:
    """Predict all images. Return the exit status.

    With several classes their names and colours are written, too. second: the argument of
    from_pretrained that --clip or --decoder is.
    """
    cases = list_cases(args, run, family.reads_text())
    outputs = {}
    paths = []
    for name, _, _ in cases:
        outputs[name] = image_outputs(name, args)
        paths += outputs[name].values()
    check_outputs(paths, Path(args.out), args.skip_existing)  # before the model is loaded
    truths = ground_truths(args, run)
    predictor = ImagePredictor(cases, family, run, second, args, truths)

    shared = {}
    if len(predictor.classes) > 1:
        shared[Path(args.out) / "legend.png"] = pictures.legend(predictor.classes[1:])
        shared[Path(args.out) / "classes.json"] = dict(enumerate(predictor.classes))
    batch = Batch(args, predictor, outputs, shared)
    prompts = {prompt for _, _, prompt in cases}
    cut_prompts = describe_cuts(prompts, predictor.recipe.tokenizer)
    if cut_prompts:
        print(f"prompts: {cut_prompts}")

    status = batch.run(predictor.predict)
    predictor.say_how_images_were_read()
    return status


def image_outputs(name: str, args) -> dict[str, Path]:
    """Return the files of one image by kind. The mask is written last."""
    endings = {}
    if args.probabilities:
        endings["probability"] = "_probability.png"
    if args.overlays:
        endings["overlay"] = "_overlay.png"
    endings["mask"] = ".png"
    return {kind: Path(args.out) / f"{name}{ending}" for kind, ending in endings.items()}


def ground_truths(args, run: dict) -> dict[str, tuple]:
    """Return {name of a case: (entry, threshold of its mask)} for the overlays of data sets.

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
    return truths


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


def draw_pictures(probabilities, masks, image, args, truth=None, prompts=()) -> dict:
    """Return the pictures of an image by the kinds of `image_outputs`.

    probabilities: float32 (K,H,W), background first if there are several classes. masks: of
    `to_masks`. image: uint8 (H,W,3). For the overlay: truth, an item of `ground_truths`; prompts,
    as for `pictures.draw_prompts`.
    """
    K = len(probabilities)
    drawn = {}
    if K == 1:
        drawn["mask"] = Image.fromarray(masks[0].astype(np.uint8) * 255)
    else:
        drawn["mask"] = pictures.class_map(masks.argmax(0).astype(np.uint8), K)

    first = 1 if K > 1 else 0  # without the background
    if args.probabilities:
        highest = probabilities[first:].max(0)  # (H,W)
        sixteen_bits = (highest * 65535).round().astype(np.uint16)
        drawn["probability"] = Image.fromarray(sixteen_bits)
    if args.overlays:
        foreground = masks[first:]
        drawn["overlay"] = pictures.overlay(image, truth_of(truth, len(foreground)), foreground)
        pictures.draw_prompts(drawn["overlay"], prompts)
    return drawn


class ImagePredictor:
    """A model with everything needed to predict the images of one call."""

    unit = "image"
    columns = measurements.IMAGE_COLUMNS

    def __init__(self, cases: list, family, run: dict, second: dict, args, truths: dict):
        """Load the model.

        cases: of `list_cases`. second: as for `predict_images`. truths: of `ground_truths`.
        """
        device = pick_device(args.device)
        protocol = family.protocols["default"]
        overrides = dict(second)
        if args.threshold is not None:
            overrides["threshold"] = args.threshold
        model = family.load_model(args.weights, None, protocol, overrides)
        self.model = model.eval().to(device)
        self.recipe = family.recipe(self.model, protocol)
        self.args = args
        self.cases = {name: (file, prompt) for name, file, prompt in cases}
        self.truths = truths
        self.colours = run.get("options", {}).get("pseudocolor")
        self.non_finite = []  # files with NaN or infinite pixels
        self.damaged_exif = []  # files

        count = num_classes(self.model)
        self.make_prompts, classes = family.prompts_for_prediction(
            self.recipe, cases, run.get("classes"), args
        )
        unnamed = [f"class {index}" for index in range(count)] if count > 1 else ["target"]
        self.classes = tuple(classes or unnamed)
        check_threshold(count, args.threshold)
        n = len(layouts.foreground(self.classes))
        if any(len(layouts.foreground(entry.classes)) != n for entry, _ in truths.values()):
            print("--overlays: the ground truth has other classes than the model and is not drawn")

    def predict(self, name: str) -> tuple[dict[str, Callable], list[dict]]:
        """Return functions that write the files of a case, and the rows of its measurements.

        The functions are by the kinds of `image_outputs`. Raises OSError or ValueError, one line,
        for an input that cannot be read.
        """
        file, prompt = self.cases[name]
        image, has_non_finite = image_files.load_image(file)  # (H,W,3)
        pixels = image_files.pseudocolor(image, self.colours).transpose(2, 0, 1).copy()  # (3,H,W)
        sample = {
            "image": torch.from_numpy(pixels),
            "prompt": prompt,
            "name": name,
            "file": file,
            "size": image.shape[:2],
            "classes": self.classes,
            "group": None,
            "dataset": "",
        }
        item = self.recipe.inputs(sample, train=False, rng=None)
        item |= self.make_prompts(sample)
        with torch.no_grad():
            probabilities = self.recipe.predict(self.model, item)[0].cpu().numpy()  # (K,H,W)

        truth = self.truths.get(name)
        prompts = item.get("shown", ())
        masks = to_masks(probabilities, self.model.config)  # (K,H,W)
        drawn = draw_pictures(probabilities, masks, image, self.args, truth, prompts)
        if has_non_finite:
            self.non_finite.append(file)
        if image_files.has_damaged_exif(file):
            self.damaged_exif.append(file)
        writers = {kind: partial(pictures.save_picture, picture=drawn[kind]) for kind in drawn}
        measure = partial(
            measurements.measure_image,
            grey=image_files.grey_levels(image),
            pixel_size=self.pixel_size_of(name),
        )
        return writers, self.measure(masks, probabilities, measure)

    def pixel_size_of(self, name: str) -> tuple | list | None:
        """Return width and height of an image's pixels in mm, None if they are unknown.

        They are those of --pixel-size, else of a spacing.csv.
        """
        file, _ = self.cases[name]
        return self.args.pixel_size or measurements.pixel_size_of(file)

    def known_cells(self, name: str) -> dict:
        """Return the cells of an image's measurements that are known before it is predicted."""
        return measurements.pixel_cells(self.pixel_size_of(name))

    def measure(self, masks: np.ndarray, probabilities: np.ndarray, measure: Callable) -> list:
        """Return the rows of measurements of an image's masks (K,H,W), those of `measure`."""
        classes = layouts.foreground(self.classes)
        n = len(classes)
        return measurements.measure_classes(classes, masks[-n:], probabilities[-n:], measure)

    def say_how_images_were_read(self) -> None:
        """Print which images hold NaN or infinite pixels, and which have damaged EXIF data."""
        if self.non_finite:
            print(data.non_finite_line(self.non_finite))
        if self.damaged_exif:
            print(data.damaged_exif_line(self.damaged_exif))


# --- volumes -------------------------------------------------------------------------------------


def predict_volumes(family, run: dict, second: dict, args) -> int:
    """Predict all volumes. Return the exit status.

    second: {}, as models of volumes have one file of weights.
    """
    predictor = VolumePredictor(family, run, args)
    config = predictor.config
    cases = list_volumes(args, run, config.in_channels)

    endings = class_endings(predictor.classes[1:]) if config.overlapping else [""]
    shared = {}
    if not config.overlapping:
        names = dict(zip(predictor.labels, predictor.classes, strict=True))
        shared[Path(args.out) / "classes.json"] = names
    if args.overlays:
        legend = pictures.legend(tuple(predictor.classes[1:]))
        shared[Path(args.out) / "legend.png"] = legend
    outputs = {name: volume_outputs(name, endings, args) for name in cases}
    batch = Batch(args, predictor, outputs, shared)
    return batch.run(lambda name: predictor.predict(cases[name]))


def list_volumes(args, run: dict, channels: int) -> dict[str, list[Path]]:
    """Return {name: files of its channels} of all cases. A case's files lie in one folder.

    Raises FileNotFoundError or ValueError, one line.
    """
    cases = []
    single_files = []
    for path in map(Path, sorted(args.inputs)):
        path = unlabelled_test(path, args)
        if layouts.find_splits(path):
            for entry in entries_of(path, args, run):
                cases.append((entry.name, [entry.image, *entry.more_channels]))
        elif path.is_file():
            single_files.append(path)
        else:
            cases += volumes_in_folder(path, args, channels)
    cases += group_channels(single_files, channels)

    by_name = {}
    for name, case_files in cases:
        if name in by_name:
            raise ValueError(f"{name}: two inputs have this name; predict them to two folders")
        by_name[name] = case_files
    return by_name


def volumes_in_folder(root: Path, args, channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases in a folder and its sub-folders."""
    files_by_folder = {}
    for file, _ in input_files(root, "volume", args):
        files_by_folder.setdefault(file.parent, []).append(file)

    cases = []
    for folder, folder_files in files_by_folder.items():
        for name, case_files in group_channels(folder_files, channels):
            cases.append(((folder.relative_to(root) / name).as_posix(), case_files))
    return cases


def unlabelled_test(path: Path, args) -> Path:
    """Return imagesTs/ of a data set whose test split has no labels; any other input as it is."""
    images = path / "imagesTs"
    splits = layouts.find_splits(path)
    wants_test = args.split in (None, "test")
    has_unlabelled_test = bool(splits) and "test" not in splits and images.is_dir()
    return images if wants_test and has_unlabelled_test else path


def group_channels(listed: list[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases among the files of a folder.

    channels: the model's. Raises ValueError, one line, if two cases have the same name.
    """
    complete = []  # files with all channels
    for file in listed:
        count = channels_in(file)
        if count == channels or (count is None and channels == 1):
            complete.append(file)

    # patient_0001 and patient_0002 are two cases. _0000 is nnU-Net's ending if all files have it.
    stems = [layouts.without_ending(file) for file in complete]
    ending = "_0000" if all(stem.endswith("_0000") for stem in stems) else ""
    cases = []
    for stem, file in zip(stems, complete, strict=True):
        cases.append((stem.removesuffix(ending), [file]))
    single_channels = sorted({*listed} - {*complete})
    return cases + [*layouts.channels_of(single_channels).items()]


def channels_in(file: Path) -> int | None:
    """Return how many channels a file has; None if it cannot be read, which fails later."""
    try:
        return nifti.read_grid(file).channels
    except (ValueError, OSError):
        return None


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


def class_names(config, run: dict) -> tuple[list[str], list[int]]:
    """Return the names of a model's classes, background first, and their values in label maps."""
    names = list(config.classes) or [f"class {k}" for k in range(config.num_classes)]
    names = run.get("classes") or names
    names = names if len(names) > 1 else ["background", *names]

    labels = None if config.overlapping else run.get("labels")
    if labels and max(labels) > 255:  # label maps are uint8
        print(f"numbers of the training data go up to {max(labels)}; written are 0, 1, 2, …")
        labels = None
    return names, labels or list(range(len(names)))


def check_rules(config, classes: list[str], args) -> None:
    """Raise ValueError, one line, if --organ-rules has no rule for a model's classes.

    Classes that stay unchanged, since a rule needs an organ that is not predicted, are printed.
    """
    if not config.overlapping:
        raise ValueError(
            "--organ-rules: needs a model with overlapping classes, which this one has not; "
            "use --largest-component"
        )
    if args.largest_component:
        raise ValueError("--organ-rules decides what is one piece; remove --largest-component")
    if not organ_rules.classes_with_rules(classes[1:]):
        names = ", ".join(classes[1:]) or "nothing names the model's classes"
        raise ValueError(f"--organ-rules: none for these classes ({names}); remove it")
    for name, needs in organ_rules.classes_missing_for_rules(classes).items():
        print(f"--organ-rules: {name} stays as it is without {', '.join(needs)}")


class VolumePredictor:
    """A model with everything needed to predict the volumes of one call."""

    unit = "volume"
    columns = measurements.VOLUME_COLUMNS

    def __init__(self, family, run: dict, args):
        """Load the model, with the overlap and the classes of the command line or the run.

        Raises ValueError, one line, for options that the model does not take.
        """
        trained_overlap = run.get("options", {}).get("overlap")
        overlap = trained_overlap if args.overlap is None else args.overlap
        protocol = family.protocols["default"]
        if overlap is not None:
            protocol = replace(protocol, overlap=overlap)
        if args.window_batch is not None:
            protocol = replace(protocol, window_batch=args.window_batch)
        overrides = {} if args.threshold is None else {"threshold": args.threshold}
        device = pick_device(args.device)
        model = family.load_model(args.weights, None, protocol, overrides)
        self.model = model.eval().to(device)
        self.recipe = family.recipe(self.model, protocol)
        self.config = self.model.config
        self.args = args

        self.classes, self.labels = class_names(self.config, run)
        self.chosen = family.chosen_classes(self.model, self.classes, args.classes)
        if self.chosen is not None:
            self.classes = [self.classes[0], *(self.classes[k + 1] for k in self.chosen)]
        if args.organ_rules:
            are_named = self.config.classes or run.get("classes")
            check_rules(self.config, self.classes if are_named else [], args)
        outputs = 1 if self.config.overlapping else self.config.num_classes
        check_threshold(outputs, args.threshold)

    def predict(self, paths: list[Path]) -> tuple[dict[str, Callable], list[dict]]:
        """Return functions that write the files of a volume, and the rows of its measurements.

        The functions are by the kinds of `volume_outputs`. paths: the files of its channels. Raises
        OSError or ValueError, one line, for an input that cannot be read or has other channels than
        the model.
        """
        config = self.config
        channels = sum(nifti.read_grid(path).channels for path in paths)
        nifti.check_channels(paths[0], channels, config.in_channels)
        fill = volumes.fill_value(self.model.preprocess, config.in_channels)
        image, grid = nifti.read_volume(paths, fill)  # (C,X,Y,Z)
        if config.intensity:
            volumes.notice_if_not_hu(paths[0], volumes.hu_facts(image))

        prepared, placement = volumes.prepare_image(
            image, grid, config.spacing, self.model.preprocess
        )
        item = {"image": prepared, "place": placement}
        if self.chosen is not None:
            item["asked"] = self.chosen
        with torch.no_grad():
            probabilities = self.recipe.predict(self.model, item)[0]  # (K,X,Y,Z)
        maps = self.label_maps(probabilities, grid)  # (n,X,Y,Z)
        rows = self.measure(maps, probabilities, image[0], grid)
        return self.writers(maps, probabilities, image, grid), rows

    def known_cells(self, name: str) -> dict:
        """Return no cells: a volume's measurements depend on its file and masks alone."""
        return {}

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
            grey = volumes.grey(image, self.model.preprocess)
            picture = pictures.volume_overlay(grey, None, masks, grid.spacing)
            writers["overlay"] = partial(pictures.save_picture, picture=picture)
        return writers

    def label_maps(self, probabilities, grid) -> np.ndarray:
        """Return the label maps of probabilities (K,X,Y,Z): uint8 (n,X,Y,Z).

        Overlapping classes have n = K maps of 0 and 1; else one map holds the values in `labels`.
        """
        config = self.config
        if config.overlapping or config.num_classes == 1:
            label = 1 if config.overlapping else self.labels[1]
            is_inside = (probabilities > config.threshold).numpy()
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


if __name__ == "__main__":
    command_line.command(main)
