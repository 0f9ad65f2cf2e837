"""Predict masks for new images or volumes, with a fine-tuned run or with official weights.

    python predict.py --weights runs/cris-kvasir_polyp --prompt "one pink polyp" --out masks a.jpg
    python predict.py --weights runs/cris-kvasir_polyp --out masks --split test data/kvasir_polyp
    python predict.py --weights runs/segformer-uw_madison --out masks folder/
    python predict.py --weights runs/cris-a runs/cris-b --tta --out masks --prompt "a polyp" photos/
    python predict.py --weights MONAI/swin_unetr_btcv_segmentation --out organs ct.nii.gz
    python predict.py --weights runs/universal-msd --classes liver spleen --out organs ct.nii.gz
    python predict.py --weights runs/swin_unetr3d-liver --out organs "cohort/**/*.nii.gz" dicom/

Images become PNG masks at their own size: 0 and 255, or class indices in a palette with legend.png
and classes.json. Volumes become NIfTI label maps on their own grid with classes.json; overlapping
classes get one file each. measurements.csv holds the area or volume, the diameter and more of every
mask. Existing files are never overwritten. Inputs that cannot be read are listed at the end (exit
status 1; 2 if none could be predicted). docs/predicting.md has the details.
Defaults are in brackets: [run] is the setting of the run in --weights, [weights] what the weights
were published or trained with, [recipe] the setting of the model's recipe.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine import command_line
from engine.ranges import GREY_LEVEL, LENGTH, POSITIVE, Number
from engine.runs import is_onnx, read_run
from imaging import atomic_files, layouts, nifti, pictures
from prediction import contact_sheet, dicom, globs
from prediction.combine import ImageMember
from prediction.images import ImagePredictor, ground_truths, image_outputs
from prediction.inputs import list_cases, list_volumes
from prediction.members import check_prompts, find_members, load_members, second_files
from prediction.models import Weights
from prediction.outputs import Batch, check_outputs
from prediction.volumes import VolumePredictor, class_endings, volume_outputs
from preparation.dicom_files import is_dicom
from recipes import FAMILIES
from recipes.base import BOX_OPTIONS, IMAGE_OPTIONS, TEXT_OPTIONS, VOLUME_OPTIONS, Family
from recipes.images import describe_cuts

# --- the program ---------------------------------------------------------------------------------

USAGE = "python predict.py --weights SOURCE [SOURCE ...] --out DIR [options] INPUT [INPUT ...]"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = command_line.Parser(__doc__, usage=USAGE, add_help=False)
    add_common_options(parser.add_argument_group("common options").add_argument)
    add_model_options(parser.add_argument_group("model options").add_argument)
    add_file_options(parser.add_argument_group("file options").add_argument)
    add_volume_options(parser.add_argument_group("volume options").add_argument)

    args = parser.parse_intermixed_args()
    if not args.out:  # Path("") would be the current folder
        parser.error('--out is empty, perhaps from an unset variable; name a folder, or "."')
    if not args.inputs:
        separate_inputs(parser, args)
    if args.prompt is not None:
        args.prompt = layouts.prompt_option(args.prompt)
    return args


def separate_inputs(parser: command_line.Parser, args: argparse.Namespace) -> None:
    """Take the words after the first of --weights as the inputs, if there are no others.

    So `predict.py --out DIR --weights RUN a.jpg b.jpg` has two inputs. Exits with one line if no
    words follow, or if one of them is a run or an ONNX file, as the inputs are missing then.
    """
    first, *others = args.weights
    has_model = any(is_onnx(path) or (Path(path) / "config.json").is_file() for path in others)
    if not others or has_model:
        parser.error(
            "INPUT is missing: give images, volumes, folders or data sets before --weights or "
            "after another option"
        )
    args.weights = [first]
    args.inputs = others


def add_common_options(add: Callable) -> None:
    """Add the options that most people need."""
    add(
        "inputs",
        metavar="INPUT",
        nargs="*",
        help="image, volume, DICOM file, folder of them, data set, or pattern in quotes: "
        '"scans/**/*.nii.gz"',
    )
    add(
        "--weights",
        metavar="SOURCE",
        nargs="+",
        action="extend",
        required=True,
        help="trained model: run folder, file, ONNX file, or hub id; several are averaged",
    )
    add("--out", metavar="DIR", required=True, help="folder that the masks are written to")
    add(
        "--prompt",
        metavar="TEXT",
        help="text that describes the target; for data sets also a prompt type, p0 to p9 [run]",
    )
    add(
        "--prompts-csv",
        metavar="FILE",
        help="CSV file with the columns image and prompt: one or more texts for each image",
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
        help="split of a data set to predict [test; all images if it has no splits]",
    )
    add(
        "--overlays",
        action="store_true",
        help="also save NAME_overlay.png: the input with its mask drawn on it",
    )
    add(
        "--skip-existing",
        action="store_true",
        help="continue a stopped call: skip inputs whose masks are already in --out",
    )
    add("-h", "--help", action="help", help="show this help and exit")


def add_model_options(add: Callable) -> None:
    """Add the options of the model and its prompts."""
    add(
        "--model",
        metavar="NAME",
        choices=sorted(FAMILIES),
        help=f"model of all --weights: {', '.join(sorted(FAMILIES))} [run]",
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
        "--tta",
        action="store_true",
        help="test-time flips: average the probabilities of the input and its flips",
    )
    add(
        "--window-size",
        metavar="N",
        type=Number(whole=True, at_least=32),
        help="predict larger images in overlapping windows of N x N pixels",
    )
    add(
        "--overlap",
        metavar="X",
        type=Number(at_least=0, below=1),
        help="overlap of neighbouring windows, as a share [volumes: run, images: 0.25]",
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
        "--contact-sheet",
        action="store_true",
        help="also save thumbnails of all cases on one page, contact_sheet.png; many cases get "
        "contact_sheet_2.png and more",
    )
    add(
        "--pixel-size",
        metavar=("X", "Y"),
        nargs=2,
        type=LENGTH,
        help="width and height of an image's pixel in mm, for measurements.csv (default: those of "
        "the DICOM header, or of spacing.csv, if the data have this file)",
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
    add(
        "--classes",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="Universal Model: predict only these classes",
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
    TEXT_OPTIONS: "{flag}: this model reads no text",
    BOX_OPTIONS: "--boxes, --points: this model takes no boxes or points, only SAM does",
    IMAGE_OPTIONS: "{flag}: is for images; this model takes volumes",
    VOLUME_OPTIONS: "{flag}: is for volumes; this model takes images",
}


def predict_inputs(args) -> int:
    """Predict all inputs into --out, which no other process writes to. Return the exit status."""
    globs.expand_inputs(args)
    weights = find_members(args.weights, lambda source: args.model or model_for(source, args))
    family = weights[0].family
    second = second_files(weights, args.clip, args.decoder)
    check_split(args)
    if args.prompt is not None and args.prompts_csv is not None:
        raise ValueError("--prompt and --prompts-csv both give texts; remove one")
    if args.prompts_csv is None:
        check_prompts(weights, args.prompt)
    check_windows(family, args)
    options = vars(args)
    if args.window_size is not None:
        options = options | {"overlap": None}  # images have an overlap, too
    family.refuse_foreign(options, "this model", REFUSED_HERE)

    with nifti.notices.grouped():
        if family.takes == "volumes":
            return predict_volumes(weights, args)
        return predict_images(weights, second, args)


def check_windows(family: Family, args) -> None:
    """Raise ValueError, one line, for --window-size with SAM, and --overlap without windows."""
    if args.window_size is not None and BOX_OPTIONS in family.options:
        raise ValueError(
            "--window-size: boxes and points may cross the windows, so SAM predicts whole images; "
            "remove it"
        )
    if args.overlap is not None and args.window_size is None and family.takes == "images":
        raise ValueError("--overlap: images have windows only with --window-size; remove it")


def model_for(source: str, args) -> str | None:
    """Return the default model for volumes if the inputs are NIfTI files and no run names a model.

    source: one of --weights. Raises ValueError, one line, for volumes of other formats.
    """
    if is_onnx(source) or read_run(source):
        return None
    paths = [Path(path) for path in args.inputs]
    for path in paths:
        foreign = None if is_dicom(path) else nifti.other_volume_format(path)
        if foreign and path.suffix.lower() not in layouts.ENDINGS:
            raise ValueError(foreign)
    if not all(layouts.is_volume(path) for path in paths):
        return None
    return next(name for name, family in FAMILIES.items() if family.takes == "volumes")


def check_split(args) -> None:
    """Raise ValueError, one line, if --split is used and no input is a data set."""
    if args.split is None:
        return
    if not any(layouts.find_splits(Path(path)) for path in args.inputs):
        raise ValueError("--split: none of the inputs is a data set; remove it")


# --- images --------------------------------------------------------------------------------------


def predict_images(weights: list[Weights], second: dict, args) -> int:
    """Predict all images. Return the exit status.

    With several classes, their names and colours are written too. Data sets are read as the first
    run read them. second: --clip or --decoder as an argument of from_pretrained.
    """
    run = weights[0].run
    cases = list_cases(args, run, weights[0].family.reads_text())
    outputs = {}
    pages = contact_sheet.page_paths(args, "image", len(cases))
    paths = [*pages]
    for name, _, _ in cases:
        outputs[name] = image_outputs(name, args)
        paths += outputs[name].values()
    check_outputs(paths, Path(args.out), args.skip_existing)  # before the model is loaded
    truths = ground_truths(args, run, cases)
    predictor = ImagePredictor(cases, weights, second, args, truths)

    shared = {}
    if len(predictor.classes) > 1:
        shared[Path(args.out) / "legend.png"] = pictures.legend(predictor.classes[1:])
        shared[Path(args.out) / "classes.json"] = dict(enumerate(predictor.classes))
    batch = Batch(args, predictor, outputs, shared, pages)
    say_cut_prompts(predictor.members, {prompt for _, _, prompt in cases})

    status = batch.run(predictor.predict)
    draw = partial(contact_sheet.draw_image, predictor=predictor)
    contact_sheet.write_pages(batch, pages, predictor, draw)
    predictor.say_how_images_were_read()
    return status


def say_cut_prompts(members: list[ImageMember], prompts: set[str]) -> None:
    """Print which prompts are longer than a model reads."""
    for member in members:
        cut_prompts = describe_cuts(prompts, member.loaded.recipe.tokenizer)
        if cut_prompts:
            name = f" of {member.loaded.weights.source}" if len(members) > 1 else ""
            print(f"prompts{name}: {cut_prompts}")


# --- volumes -------------------------------------------------------------------------------------


def predict_volumes(weights: list[Weights], args) -> int:
    """Predict all volumes. Return the exit status."""
    overrides = {} if args.threshold is None else {"threshold": args.threshold}
    loaded = load_members(weights, args.device, overrides, args.overlap, args.window_batch)
    predictor = VolumePredictor(loaded, args)
    config = predictor.config
    cases = list_volumes(args, weights[0].run, config.in_channels)

    endings = class_endings(predictor.classes[1:]) if config.overlapping else [""]
    shared = {}
    if not config.overlapping:
        names = dict(zip(predictor.labels, predictor.classes, strict=True))
        shared[Path(args.out) / "classes.json"] = names
    if args.overlays:
        legend = pictures.legend(tuple(predictor.classes[1:]))
        shared[Path(args.out) / "legend.png"] = legend
    outputs = {name: volume_outputs(name, endings, args) for name in cases}
    pages = contact_sheet.page_paths(args, "volume", len(cases))
    batch = Batch(args, predictor, outputs, shared, pages)

    def predict_case(name: str):
        with dicom.nifti_files(cases[name]) as paths:
            return predictor.predict(paths)

    status = batch.run(predict_case)
    draw = partial(contact_sheet.draw_volume, predictor=predictor, cases=cases)
    contact_sheet.write_pages(batch, pages, predictor, draw)
    return status


if __name__ == "__main__":
    command_line.command(main)
