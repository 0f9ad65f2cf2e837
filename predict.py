"""Masks for new images from a fine-tuned run or from official weights.

    python predict.py --weights runs/cris-kvasir_polyp --prompt "one pink polyp" --out masks a.jpg
    python predict.py --weights runs/cris-kvasir_polyp --out masks --split test data/kvasir_polyp
    python predict.py --weights runs/segformer-uw_madison --out masks folder/
    python predict.py --weights MONAI/swin_unetr_btcv_segmentation --out organs ct.nii.gz
    python predict.py ct.nii.gz --weights runs/universal-msd --classes liver spleen --out organs

Images, folders of images and data sets become PNG masks (0 and 255, or class numbers in a palette
with legend.png and classes.json) at each image's own size, named like the image (of a data set:
like the mask). Sub-folders are read too, and have their like in --out; hidden files are passed
over. SAM is asked by the boxes of a CSV or JSON file (image,class,x0,y0,x1,y1), by points
(image,class,x,y,label; 1 inside, 0 outside), or by both (boxes_and_points.py), whose images are
file names or, where these repeat, paths relative to the folder of images; without either by the box
around each image.
Volumes (NIfTI; a case's channels one 4-D file or, in one folder, CASE_0000, CASE_0001, …) become
label maps on their own grid, the numbers' names in classes.json; where classes overlap a file for
each. A Universal Model can be asked for some of its --classes alone, which takes less memory. Of
such organs --organ-rules keep what anatomy allows: one piece, tumours within their organs
(imaging/organ_rules.py).
Existing files are never overwritten. An input that cannot be read does not end the call: the others
are predicted, such inputs are listed at the end, and the exit status is 1 (2 if none was good). The
same call with --skip-existing continues where an earlier one ended.
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
from engine.ranges import GREY_LEVEL, POSITIVE, Number
from engine.runs import check_threshold, num_classes, patients_of, pick_device, read_run
from imaging import atomic_files, files, image_files, layouts, nifti, organ_rules, pictures, volumes
from recipes import FAMILIES, second_file
from recipes.base import BOX_OPTIONS, IMAGE_OPTIONS, TEXT_OPTIONS, VOLUME_OPTIONS
from recipes.images import describe_cuts


def parse() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("inputs", nargs="+", help="images, folders of images, data sets")
    parser.add_argument("--weights", required=True, help="run folder, file, or hub id")
    help = "clipseg: CLIP ViT-B/16 for --weights that are the original release's decoder alone"
    parser.add_argument("--clip", help=help)
    help = "biomedclipseg: a CLIPSeg whose decoder is used, for --weights that are BiomedCLIP alone"
    parser.add_argument("--decoder", help=help)
    parser.add_argument(
        "--model", choices=sorted(FAMILIES), help="which model; a run folder says it itself"
    )
    parser.add_argument(
        "--prompt", help="the text; for a data set also p0…p9, else what the run was trained on"
    )
    help = "CSV or JSON of boxes that SAM is asked by; without boxes or points: the whole image"
    parser.add_argument("--boxes", metavar="FILE", help=help)
    help = "CSV or JSON of points that SAM is asked by, alone or together with --boxes"
    parser.add_argument("--points", metavar="FILE", help=help)
    help = "which split of a data set: test, train, val, …; default: test, or all images of a data "
    help += "set that is images/ and masks/ alone"
    parser.add_argument("--split", help=help)
    parser.add_argument("--out", required=True, help="folder for the masks")
    help = "continue an earlier call with this --out: predict only what it has no files of yet"
    parser.add_argument("--skip-existing", action="store_true", help=help)
    parser.add_argument(
        "--threshold",
        type=Number(above=0, below=1),
        help="probability above which a pixel is foreground",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also NAME_probability.png, 16 bit, / 65535 (of volumes .nii.gz, float32); of several "
        "classes the largest but the background's",
    )
    parser.add_argument(
        "--overlays",
        action="store_true",
        help="also NAME_overlay.png; of a data set with the outline of the ground truth, of SAM "
        "with its boxes and points",
    )
    parser.add_argument(
        "--mask-threshold",
        type=GREY_LEVEL,
        help="in --overlays of a data set: values of its binary masks above it, 0 to 255, are "
        "foreground; else as in the run",
    )
    volume_options(parser.add_argument)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if args.prompt is not None:
        args.prompt = layouts.prompt_option(args.prompt)
    return args


def volume_options(add) -> None:
    """Add those that only models of volumes take."""
    help = "of a volume: keep of each class only its largest connected component"
    add("--largest-component", action="store_true", help=help)
    help = "keep of organs their largest piece, of tumours what is in the organ; see organ_rules.py"
    add("--organ-rules", action="store_true", help=help)
    add("--classes", nargs="+", metavar="NAME", help="of a Universal Model: these alone")
    share = Number(at_least=0, below=1)
    add("--overlap", type=share, help="of windows of a volume, 0 to below 1")
    add("--window-batch", type=POSITIVE, help="windows of a volume at a time")


# --- inputs and outputs --------------------------------------------------------------------------


def list_cases(args, run: dict, reads: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of all images, and print how many each folder has.

    reads: the model takes a text. Raises FileNotFoundError or ValueError, one line, for inputs that
    do not exist or options that do not fit.
    """
    cases = []
    for place in map(Path, args.inputs):
        if layouts.splits(place):
            cases += cases_of_data_set(place, args, run, reads)
            continue
        if reads and (args.prompt is None or layouts.is_prompt_type(args.prompt)):
            check_exists(place, "image")
            raise ValueError(
                f'{place}: images need --prompt "a text"; prompt types belong to data sets'
            )
        for file, folder in input_files(place, "image", args):
            name = file.relative_to(folder).with_suffix("")
            cases.append((name.as_posix(), file, args.prompt or ""))
    return cases


def cases_of_data_set(place: Path, args, run: dict, reads: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of the images of a data set; arguments of `list_cases`."""
    kind = args.prompt
    if kind is None:
        kind = run.get("options", {}).get("prompt") if reads else ""
    if kind is None:
        raise ValueError(f"{place}: --prompt is missing: a prompt type (p0…p9) or a text")
    entries = entries_of(place, args, run)
    return [(entry.name, entry.image, entry.text(kind)) for entry in entries]


def entries_of(place: Path, args, run: dict) -> list[layouts.Entry]:
    """Return the entries of a data set that are to be predicted, and print which these are.

    Without --split the test split, or all images where nothing divides them. Raises as
    `layouts.annotations` does.
    """
    if args.split is None and layouts.is_undivided(place):
        entries = layouts.every_image(place)
        print(f"{place}: all {len(entries)} images; --split test takes those of its test split")
        return entries
    split = args.split or "test"
    folder = layouts.split_folder(place, split)
    if folder is not None:  # its masks are not needed, and may not exist
        entries = layouts.every_image(place, folder)
    else:
        entries = layouts.annotations(place, split, patients_of(run, args.inputs))
    print(f"{place}: {len(entries)} cases of its split {split}")
    return entries


def check_exists(place: Path, noun: str) -> None:
    """Raise FileNotFoundError or ValueError, one line, unless an input is a file or a folder."""
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such {noun} or folder")
    if not place.is_file() and not place.is_dir():
        raise ValueError(f"{place}: is neither a file nor a folder")


def input_files(place: Path, noun: str, args) -> list[tuple[Path, Path]]:
    """Return (file, folder that its name is relative to) of an input, a file or a folder.

    noun: "image" or "volume". Of a folder the images or volumes in it and in its sub-folders, but
    --out, and their number is printed. Raises FileNotFoundError or ValueError, one line.
    """
    check_exists(place, noun)
    if place.is_file():
        return [(place, place.parent)]
    out = Path(args.out)
    if out.resolve() == place.resolve():
        raise ValueError(f"{place}: is an input and --out; choose another --out")
    listed = layouts.list_files(place, noun, without=out)
    print(f"{place}: {len(listed)} {noun} files")
    return [(file, place) for file in listed]


def check_split(args) -> None:
    """Raise ValueError, one line, if --split is given and no input is a data set."""
    if args.split is not None and not any(layouts.splits(Path(place)) for place in args.inputs):
        raise ValueError("--split: none of the inputs is a data set; remove it")


def outputs(name: str, args) -> dict[str, Path]:
    """Return the files that one case becomes, by kind. The mask is written last."""
    kinds = {"probability": "_probability", "overlay": "_overlay", "mask": ""}
    wanted = {"mask": True, "probability": args.probabilities, "overlay": args.overlays}
    return {
        kind: Path(args.out) / f"{name}{end}.png" for kind, end in kinds.items() if wanted[kind]
    }


def case_outputs(cases, args) -> list[Path]:
    """Return the files of all cases."""
    files = []
    for name, _, _ in cases:
        files += outputs(name, args).values()
    return files


LONGEST_NAME = 245  # bytes of an output's name: temporary names have 10 more, and 255 is the limit


def check_outputs(paths: list[Path], out: Path, may_exist: bool = False) -> None:
    """Raise ValueError unless all files are new, different and inside the folder `out`.

    Links are followed, as writing would do. may_exist: files may exist already (--skip-existing).
    Called before anything is written.
    """
    folder = out.resolve()
    targets = {}  # where a file really goes -> the file
    for path in paths:
        target = path.resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"{path}: lies outside --out {out} (at {target}); nothing was written")
        if os.path.lexists(path) and not (may_exist and path.is_file()):
            hint = "" if may_exist else ", or continue an earlier call with --skip-existing"
            raise ValueError(
                f"{path} exists already and is not overwritten; choose another --out{hint}"
            )
        if target in targets:
            raise ValueError(
                f"{path} would be written twice: two inputs have the same name, or one is named "
                "like a file that is added (legend.png, NAME_overlay.png); rename it"
            )
        targets[target] = path
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise ValueError(f"{path}: the name is too long for a file; rename the input")

    for parent in {path.parent for path in paths}:
        place = next(place for place in (parent, *parent.parents) if os.path.lexists(place))
        if not place.is_dir():
            raise ValueError(f"{place}: is no folder, so nothing can be written below it")
    for target, path in targets.items():
        blocking = next((parent for parent in target.parents if parent in targets), None)
        if blocking is not None:
            raise ValueError(f"{path}: {targets[blocking]} would be a file and a folder")


def save_shared(path: Path, content: dict | Image.Image) -> None:
    """Write a file that belongs to all cases of a call: names of classes, or the legend."""
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
    """Return an error about a case as a line in which its name occurs."""
    line = " ".join(str(error).split())
    return line if Path(name).name in line else f"{name}: {line}"


class Batch:
    """The files of one call: what exists already, what is written, which inputs are bad.

    A bad input does not end the call. It is noted, and all of them are listed at the end.
    """

    LISTED = 20  # bad inputs that are named at the end

    def __init__(self, args, unit: str, cases: dict[str, dict[str, Path]], shared: dict):
        """unit: "image" or "volume". cases: name -> the case's files by kind, in the order in which
        they are written. shared: file -> content of what belongs to all cases.

        Raises ValueError, one line, if a file cannot be written, before anything is.
        """
        self.out = Path(args.out)
        self.unit = unit
        self.cases = cases
        self.shared = shared
        self.bad = []  # a line for each input that could not be predicted
        self.written = 0

        if not cases:
            raise ValueError(f"the inputs hold no {unit}s, so there is nothing to predict")
        case_files = [path for paths in cases.values() for path in paths.values()]
        check_outputs([*shared, *case_files], self.out, args.skip_existing)
        for path, content in shared.items():
            if path.exists() and not has_content(path, content):
                raise ValueError(f"{path}: is of other classes; choose another --out")
        self.finished = set()  # names of cases that an earlier call has predicted
        for name, paths in cases.items():
            if all(path.exists() for path in paths.values()):
                self.finished.add(name)
        if self.finished:
            count = f"{len(self.finished)} of {len(cases)} {unit}s"
            print(f"{count} are predicted already and were skipped (--skip-existing)")

    def run(self, predict_case: Callable) -> int:
        """Predict all cases that are not finished and write their files. Return the exit status.

        predict_case: name of a case -> {kind: function that writes the file of this name}; what it
        raises about an input is noted. Raises OSError, one line, if a file cannot be written, and
        ValueError, one line, if no input could be predicted.
        """
        todo = [name for name in self.cases if name not in self.finished]
        for name in tqdm(todo, desc="predict", unit=self.unit, disable=None):
            try:
                writers = predict_case(name)
            except (ValueError, OSError) as error:
                self.bad.append(one_line(error, name))
                continue
            except (MemoryError, RuntimeError) as error:
                if not command_line.is_out_of_memory(error):
                    raise
                self.bad.append(f"{name}: does not fit into memory")
                continue
            self.write_shared()
            for kind, path in self.cases[name].items():
                self.write(path, writers[kind])
            del writers  # of volumes gigabytes
            self.written += 1
        return self.conclude()

    def write_shared(self) -> None:
        """Write the files that belong to all cases, if they are missing."""
        for path, content in self.shared.items():
            self.write(path, partial(save_shared, content=content))

    def write(self, path: Path, save: Callable) -> None:
        """Write a file with save(path), unless a call that was killed has written it."""
        if path.exists():
            return
        try:
            if not self.out.is_dir():
                raise FileNotFoundError(f"the folder {self.out} is gone")
            save(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the line about a full disk names the file
                raise OSError(error.errno, error.strerror, str(path)) from None
            reason = error.strerror or error
            hint = "the finished files are whole; mend this, then continue with --skip-existing"
            raise OSError(f"{path}: cannot be written ({reason}); {hint}") from None

    def conclude(self) -> int:
        """Say what was written, list the bad inputs, and return the exit status."""
        if len(self.bad) == len(self.cases):
            first = self.bad[0]
            if len(self.bad) == 1:
                raise ValueError(first)
            raise ValueError(f"none of {len(self.bad)} {self.unit}s could be predicted; {first}")
        self.write_shared()
        masks = {"image": "masks", "volume": "volumes"}[self.unit]
        print(f"{self.written} {masks} in {self.out}", flush=True)
        if not self.bad:
            return 0

        count = f"{len(self.bad)} of {len(self.cases)} {self.unit}s"
        hint = "correct or remove them, then continue with --skip-existing"
        print(f"error: {count} could not be predicted; {hint}", file=sys.stderr)
        for line in self.bad[: self.LISTED]:
            print(f"  {line}", file=sys.stderr)
        if len(self.bad) > self.LISTED:
            print(f"  and {len(self.bad) - self.LISTED} more", file=sys.stderr)
        return 1


# What an error says of options that are for other models; groups as in recipes/base.py.
REFUSED_HERE = {
    TEXT_OPTIONS: "--prompt: this model reads no text",
    BOX_OPTIONS: "--boxes, --points: this model takes no boxes or points, only SAM does",
    IMAGE_OPTIONS: "{flag}: of images; this model takes volumes",
    VOLUME_OPTIONS: "{flag}: of volumes; this model takes images",
}


# --- images --------------------------------------------------------------------------------------


def model_of(args) -> str:
    """The model that NIfTI files alone tell, the first of volumes. ValueError: others tell none."""
    for place in map(Path, args.inputs):
        foreign = nifti.other_volume_format(place)
        if foreign and place.suffix.lower() not in layouts.ENDINGS:
            raise ValueError(foreign)
    if not all(layouts.is_volume(Path(place)) for place in args.inputs):
        raise ValueError(f"--model is missing: {args.weights} is not a run folder that says it")
    return next(name for name, family in FAMILIES.items() if family.takes == "volumes")


def main() -> int:
    args = parse()
    safe = f"the files in {args.out} are whole; the same command with --skip-existing goes on"
    with atomic_files.claim(Path(args.out)), command_line.way_on(lambda: safe):
        return predict_inputs(args)


def predict_inputs(args) -> int:
    """Predict all inputs into --out, which no other process writes to. Return the exit status."""
    run = read_run(args.weights)
    name = args.model or run.get("model") or model_of(args)
    if name not in FAMILIES:
        raise ValueError(f"{args.weights}: is a run of {name}, no model that this version has")
    family = FAMILIES[name]
    second = second_file(name, args.clip, args.decoder)
    check_split(args)
    family.check_given(vars(args), "this model", REFUSED_HERE)
    predict = {"images": predict_images, "volumes": predict_volumes}[family.takes]
    with nifti.notices.together():
        return predict(family, run, second, args)


def predict_images(family, run: dict, second: dict, args) -> int:
    """Write the files of all images; of several classes also their names and colours.

    second: the argument of from_pretrained that --clip or --decoder is.
    """
    reads = family.reads_text()
    cases = list_cases(args, run, reads)
    check_outputs(case_outputs(cases, args), Path(args.out), args.skip_existing)
    truths = ground_truths(args, run)
    predictor = ImagePredictor(cases, family, run, second, args, truths)

    shared = {}
    if len(predictor.classes) > 1:
        legend = pictures.legend(predictor.classes[1:])
        names = dict(enumerate(predictor.classes))
        shared = {Path(args.out) / "legend.png": legend, Path(args.out) / "classes.json": names}
    batch = Batch(args, "image", {name: outputs(name, args) for name, _, _ in cases}, shared)
    cuts = describe_cuts({prompt for _, _, prompt in cases}, predictor.recipe.tokenizer)
    if cuts:
        print(f"prompts: {cuts}")
    status = batch.run(predictor.predict)
    predictor.say_how_images_were_read()
    return status


def ground_truths(args, run: dict) -> dict[str, tuple]:
    """Return {name of a case: (entry, threshold of its mask)} for overlays of data sets.

    Only of masks that exist. They are read as in the run; one that cannot be read has no say in
    how, and fails when it is drawn. Raises ValueError, one line, if the masks do not fit together,
    or if --mask-threshold has no effect.
    """
    truths = {}
    reading = data.MaskReading(args.mask_threshold, run.get("masks", {}))
    orientation = run.get("options", {}).get("mask_orientation")
    for place in map(Path, args.inputs):
        if not args.overlays or not layouts.splits(place):
            continue
        with redirect_stdout(io.StringIO()):  # what it prints was printed by list_cases
            entries = entries_of(place, args, run)
        entries = [entry for entry in entries if entry.mask.is_file()]
        entries = data.with_mask_orientation(entries, orientation)
        truths |= {entry.name: (entry, 0) for entry in entries}
        with ThreadPoolExecutor() as pool:
            counts = [*pool.map(count_mask, entries)]
        entries = [entry for entry, count in zip(entries, counts, strict=True) if count is not None]
        if entries:
            counts = np.concatenate([count for count in counts if count is not None])  # (n,3,256)
            (rule,) = data.decide_rules(entries, counts, reading).values()
            thresholds = data.mask_thresholds(entries, counts[:, 0], rule)
            pairs = zip(entries, thresholds.tolist(), strict=True)
            truths |= {entry.name: (entry, threshold) for entry, threshold in pairs}

    if args.mask_threshold is not None and not truths:
        need = "--overlays and a data set with masks"
        raise ValueError(f"--mask-threshold has no effect without {need}; remove it")
    return truths


def count_mask(entry) -> np.ndarray | None:
    """Return `data.count_masks` of one entry, (1,3,256); None if its mask cannot be read."""
    try:
        return data.count_masks([entry])
    except (ValueError, OSError):
        return None


def truth_of(truth: tuple | None, n: int) -> np.ndarray | None:
    """Return the ground truth, bool (n,H,W), of an item of `ground_truths`.

    None without one, or if it has another number of classes than the n of the prediction.
    """
    if truth is None or len(layouts.foreground(truth[0].classes)) != n:
        return None
    return each_is(data.read_truth(*truth), range(1, n + 1))


def draw_pictures(probabilities, config, image, args, truth=None, prompts=()) -> dict:
    """Return the pictures of an image that are wanted, by the names in `outputs`.

    probabilities: float32 (K,H,W), of several classes the background first. image: uint8 (H,W,3).
    For the overlay: truth, an item of `ground_truths`; prompts, as for `pictures.draw_prompts`.
    """
    masks = to_masks(probabilities, config)  # (K,H,W)
    k = len(probabilities)
    if k == 1:
        made = {"mask": Image.fromarray(masks[0].astype(np.uint8) * 255)}
    else:
        made = {"mask": pictures.class_map(masks.argmax(0).astype(np.uint8), k)}
    if args.probabilities:
        highest = probabilities[1 if k > 1 else 0 :].max(0)  # (H,W)
        sixteen_bits = (highest * 65535).round().astype(np.uint16)
        made["probability"] = Image.fromarray(sixteen_bits)
    if args.overlays:
        shown = masks[-max(1, k - 1) :]
        made["overlay"] = pictures.overlay(image, truth_of(truth, len(shown)), shown)
        pictures.draw_prompts(made["overlay"], prompts)
    return made


class ImagePredictor:
    """A model with all that predicts the images of one call."""

    def __init__(self, cases: list, family, run: dict, second: dict, args, truths: dict):
        """cases: of `list_cases`. second: as for `predict_images`. truths: of `ground_truths`."""
        device = pick_device(args.device)
        protocol = family.protocols["default"]
        overrides = second if args.threshold is None else second | {"threshold": args.threshold}
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
        self.ask, classes = family.ask_in_prediction(self.recipe, cases, run.get("classes"), args)
        self.classes = tuple(classes or [f"class {number}" for number in range(count)])
        check_threshold(count, args.threshold)
        n = len(layouts.foreground(self.classes))
        if any(len(layouts.foreground(entry.classes)) != n for entry, _ in truths.values()):
            print("--overlays: a ground truth of other classes than the model's is not drawn")

    def predict(self, name: str) -> dict[str, Callable]:
        """Return functions that write the files of a case, by the kinds of `outputs`.

        Raises OSError or ValueError, one line, for an input that is not readable.
        """
        file, prompt = self.cases[name]
        image, has_non_finite = image_files.load_image(file)  # (H,W,3)
        pixels = image_files.pseudocolor(image, self.colours).transpose(2, 0, 1).copy()
        sample = {"image": torch.from_numpy(pixels), "prompt": prompt, "name": name}
        sample |= {"file": file, "size": image.shape[:2], "classes": self.classes}
        sample |= {"group": None, "dataset": ""}
        item = self.recipe.inputs(sample, train=False, rng=None)
        item |= self.ask(sample)
        with torch.no_grad():
            probabilities = self.recipe.predict(self.model, item)[0].cpu().numpy()  # (K,H,W)
        drawn = draw_pictures(
            probabilities, self.model.config, image, self.args, self.truths.get(name),
            item.get("shown", ()),
        )  # fmt: skip
        if has_non_finite:
            self.non_finite.append(file)
        if image_files.has_damaged_exif(file):
            self.damaged_exif.append(file)
        return {kind: partial(pictures.save_picture, picture=drawn[kind]) for kind in drawn}

    def say_how_images_were_read(self) -> None:
        """Print which images hold NaN or infinite pixels, and which damaged EXIF data."""
        if self.non_finite:
            print(data.non_finite_line(self.non_finite))
        if self.damaged_exif:
            print(data.damaged_exif_line(self.damaged_exif))


# --- volumes -------------------------------------------------------------------------------------


def list_volumes(args, run: dict, channels: int) -> dict[str, list[Path]]:
    """Return {name: files of its channels} of all cases. A case's files lie in one folder.

    Raises FileNotFoundError or ValueError, one line.
    """
    cases = []
    single = []  # files that are inputs themselves
    for place in map(Path, sorted(args.inputs)):
        place = unlabelled_test(place, args)
        if layouts.splits(place):
            entries = entries_of(place, args, run)
            cases += [(entry.name, [entry.image, *entry.more]) for entry in entries]
        elif place.is_file():
            single.append(place)
        else:
            folders = {}
            for file, _ in input_files(place, "volume", args):
                folders.setdefault(file.parent, []).append(file)
            for folder, paths in folders.items():
                path = folder.relative_to(place)
                for name, channel_files in group_channels(paths, channels):
                    cases.append(((path / name).as_posix(), channel_files))
    cases += group_channels(single, channels)

    names = [name for name, _ in cases]
    if len({*names}) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated}: two inputs have this name; predict them to two folders")
    return dict(cases)


def unlabelled_test(place: Path, args) -> Path:
    """Return imagesTs/ of a data set whose test has no labels; any other input as it is."""
    images = place / "imagesTs"
    splits = layouts.splits(place)
    is_test = args.split in (None, "test")
    return images if is_test and splits and "test" not in splits and images.is_dir() else place


def group_channels(listed: list[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases among the files of a folder.

    channels: the model's. Raises ValueError, one line, if two cases have one name.
    """
    whole = []
    for file in listed:
        count = channels_in(file)
        if count == channels or (count is None and channels == 1):
            whole.append(file)
    # patient_0001, patient_0002 are no channels; _0000 of all is nnU-Net's ending
    stems = [layouts.without_ending(file) for file in whole]
    end = "_0000" if all(stem.endswith("_0000") for stem in stems) else ""
    cases = [(stem.removesuffix(end), [file]) for stem, file in zip(stems, whole, strict=True)]
    parts = sorted({*listed} - {*whole})
    return cases + [*layouts.channels_of(parts).items()]


def channels_in(file: Path) -> int | None:
    """Return how many channels a file has; None if it cannot be read, as predicting it will say."""
    try:
        return nifti.read_grid(file).channels
    except (ValueError, OSError):
        return None


def class_endings(classes: list[str]) -> list[str]:
    """Return what the names of the classes' files end in, "_right_kidney" for "right kidney".

    Signs stay, such as those of ER+ and ER-, but for those that a file system may refuse. Names
    that would be the same, or differ by letter case alone, get the class's number, and that is
    printed.
    """
    endings = []
    for number, name in enumerate(classes, 1):
        refused = r'[\s/\\<>:"|?*_\x00-\x1f\x7f-\x9f]+'
        ending = re.sub(refused, "_", f"_{name}")
        while ending.casefold() in {other.casefold() for other in endings}:
            ending += f"_{number}"
            print(f"class {name}: its files are named NAME{ending}, as another class has its name")
        endings.append(ending)
    return endings


def volume_outputs(name: str, parts: list[str], args) -> dict[str, Path]:
    """Return the files that one volume becomes, by kind. Its masks are written last.

    parts: what the names of the masks end in.
    """
    kinds = {}
    if args.probabilities:
        kinds["probability"] = "_probability.nii.gz"
    if args.overlays:
        kinds["overlay"] = "_overlay.png"
    for n, part in enumerate(parts):
        kinds[f"mask{n}"] = f"{part}.nii.gz"
    return {kind: Path(args.out) / f"{name}{end}" for kind, end in kinds.items()}


def volume_model(family, run: dict, args):
    """The model and its recipe, as the run and the command line have them."""
    trained = run.get("options", {}).get("overlap")
    given = {"overlap": trained if args.overlap is None else args.overlap}
    given |= {"window_batch": args.window_batch}
    given = {key: value for key, value in given.items() if value is not None}
    protocol = replace(family.protocols["default"], **given)
    overrides = {} if args.threshold is None else {"threshold": args.threshold}
    device = pick_device(args.device)
    model = family.load_model(args.weights, None, protocol, overrides).eval().to(device)
    return model, family.recipe(model, protocol)


def predict_volumes(family, run: dict, second: dict, args) -> int:
    """Write the label maps of all volumes, and the names of their numbers. Return the status.

    second: {}, as models of volumes have one file of weights.
    """
    model, recipe = volume_model(family, run, args)
    c = model.config
    classes, numbers = class_names(c, run)
    chosen = family.numbers_asked(model, classes, args.classes)
    if chosen is not None:
        classes = [classes[0], *(classes[k + 1] for k in chosen)]
    if args.organ_rules:
        check_rules(c, classes if c.classes or run.get("classes") else [], args)
    check_threshold(1 if c.overlapping else c.num_classes, args.threshold)

    cases = list_volumes(args, run, c.in_channels)
    parts = class_endings(classes[1:]) if c.overlapping else [""]
    shared = {}
    if not c.overlapping:
        shared[Path(args.out) / "classes.json"] = dict(zip(numbers, classes, strict=True))
    if args.overlays:
        shared[Path(args.out) / "legend.png"] = pictures.legend(tuple(classes[1:]))
    outputs = {name: volume_outputs(name, parts, args) for name in cases}
    batch = Batch(args, "volume", outputs, shared)

    item = {} if chosen is None else {"asked": chosen}

    def predict_case(name: str) -> dict[str, Callable]:
        return predict_volume(model, recipe, cases[name], item, classes, numbers, args)

    return batch.run(predict_case)


def class_names(config, run: dict) -> tuple[list[str], list[int]]:
    """Names of a model's classes, background first, and their numbers in label maps."""
    names = list(config.classes) or [f"class {k}" for k in range(config.num_classes)]
    names = run.get("classes") or names
    names = names if len(names) > 1 else ["background", *names]
    numbers = None if config.overlapping else run.get("labels")
    if numbers and max(numbers) > 255:  # label maps are of bytes
        print(f"numbers of the training data go up to {max(numbers)}; written are 0, 1, 2, …")
        numbers = None
    return names, numbers or list(range(len(names)))


def check_rules(config, classes: list[str], args) -> None:
    """ValueError, one line, if no rule fits; what a rule needs and is not there is printed."""
    if not config.overlapping:
        told = "of classes that are found one by one; this model tells them apart"
        raise ValueError(f"--organ-rules: {told}, take --largest-component")
    if args.largest_component:
        raise ValueError("--organ-rules knows what is one piece; drop --largest-component")
    if not organ_rules.ruled(classes[1:]):
        told = ", ".join(classes[1:]) or "nothing names the model's classes"
        raise ValueError(f"--organ-rules: none for these classes ({told}); drop it")
    for name, needs in organ_rules.unruled(classes).items():
        print(f"--organ-rules: {name} stays as it is without {', '.join(needs)}")


def predict_volume(model, recipe, paths, item: dict, classes, numbers, args) -> dict[str, Callable]:
    """Return functions that write the files of one volume, by the kinds of `volume_outputs`.

    paths: the files of its channels. item: what the recipe takes besides it. Raises OSError or
    ValueError, one line, for an input that cannot be read or has other channels than the model.
    """
    c = model.config
    channels = sum(nifti.read_grid(path).channels for path in paths)
    nifti.check_channels(paths[0], channels, c.in_channels)
    fill = volumes.fill_value(model.preprocess, c.in_channels)
    image, grid = nifti.read_volume(paths, fill)  # (C,X,Y,Z)
    if c.intensity:
        volumes.say_if_not_hu(paths[0], volumes.hu_facts(image))
    prepared, place = volumes.prepare_image(image, grid, c.spacing, model.preprocess)
    with torch.no_grad():
        item = item | {"image": prepared, "place": place}
        probabilities = recipe.predict(model, item)[0]  # (K,X,Y,Z)
    maps = label_maps(probabilities, c, classes, numbers, grid, args)  # (n,X,Y,Z)

    writers = {}
    for n, labels in enumerate(maps):
        writers[f"mask{n}"] = partial(nifti.write, volume=labels, grid=grid)
    if args.probabilities:
        first = 1 if len(probabilities) > 1 and not c.overlapping else 0  # without the background
        highest = probabilities[first:].amax(0).numpy()
        writers["probability"] = partial(nifti.write, volume=highest, grid=grid)
    if args.overlays:
        shown = maps > 0 if c.overlapping else each_is(maps[0], numbers[1:])
        grey = volumes.grey(image, model.preprocess)
        picture = pictures.volume_overlay(grey, None, shown, grid.spacing)
        writers["overlay"] = partial(pictures.save_picture, picture=picture)
    return writers


def label_maps(probabilities, config, classes, numbers, grid, args) -> np.ndarray:
    """Return what is written of probabilities (K,X,Y,Z): uint8 (n,X,Y,Z).

    n is K where classes overlap, whose maps hold 0 and 1; else one map holds the `numbers`.
    """
    if config.overlapping or config.num_classes == 1:
        inside = 1 if config.overlapping else numbers[1]
        maps = np.where((probabilities > config.threshold).numpy(), np.uint8(inside), np.uint8(0))
    else:
        maps = np.array(numbers, np.uint8)[probabilities.argmax(0).numpy()][None]
    if args.largest_component:
        maps = np.stack([volumes.largest_component(labels) for labels in maps])
    if args.organ_rules:
        masks = dict(zip(classes[1:], maps.view(bool), strict=True))
        maps = np.stack([*organ_rules.organ_rules(masks, grid.spacing).values()]).view(np.uint8)
    return maps


if __name__ == "__main__":
    command_line.command(main)
