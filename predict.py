"""Masks for new images from a fine-tuned run or from official weights.

    python predict.py --weights runs/cris-kvasir_polyp --prompt "one pink polyp" --out masks a.jpg
    python predict.py --weights runs/cris-kvasir_polyp --out masks --split test data/kvasir_polyp
    python predict.py --weights runs/segformer-uw_madison --out masks folder/
    python predict.py --weights MONAI/swin_unetr_btcv_segmentation --out organs ct.nii.gz
    python predict.py ct.nii.gz --weights runs/universal-msd --classes liver spleen --out organs

Images, folders of images and data sets become PNG masks (0 and 255, or class numbers in a palette
with legend.png and classes.json) at each image's own size, named like the image (of a data set:
like the mask). Existing files are never overwritten. SAM is asked by the boxes of a CSV or JSON
file (image,class,x0,y0,x1,y1; see prompts.py), whose images are file names or, where these repeat,
paths relative to the folder of images; without boxes by the box around each image.
Volumes (NIfTI; a case's channels one 4-D file or CASE_0000, CASE_0001, …) become label maps on
their own grid, the numbers' names in classes.json; where classes overlap a file for each. A
Universal Model can be asked for some of its --classes alone, which takes less memory. Of such
organs --organ-rules keep what anatomy allows: one piece, tumours within their organs (organs.py).
"""

if __name__ == "__main__":
    import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
import io
import os
import re
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import layouts
import organs
import report
import volumes
from evaluate import (
    check_threshold, each_is, num_classes, patients_of, pick_device, read_image_boxes, run_config,
    to_masks,
)  # fmt: skip
from protocol import describe_cuts
from recipes import FAMILIES, second_file


def parse() -> argparse.Namespace:
    parser = report.Parser(__doc__)
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
    parser.add_argument("--boxes", help="what SAM is asked by; without: the whole image")
    parser.add_argument("--split", default="test", help="which part of a data set")
    parser.add_argument("--out", required=True, help="folder for the masks")
    parser.add_argument(
        "--threshold", type=float, help="probability above which a pixel is foreground"
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
        help="also NAME_overlay.png; of a data set with the outline of the ground truth",
    )
    parser.add_argument(
        "--mask-threshold",
        type=report.grey_level,
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
    """Those that only models of volumes take, OF_VOLUMES."""
    help = "of a volume: keep of each class only its largest connected component"
    add("--largest-component", action="store_true", help=help)
    help = "keep of organs their largest piece, of tumours what is in the organ; see organs.py"
    add("--organ-rules", action="store_true", help=help)
    add("--classes", nargs="+", metavar="NAME", help="of a Universal Model: these alone")
    add("--overlap", type=float, help="of windows of a volume, 0 to below 1")
    add("--window-batch", type=int, help="windows of a volume at a time")


OF_VOLUMES = ("largest_component", "organ_rules", "classes", "overlap", "window_batch")


def list_cases(args, run: dict, reads: bool) -> list[tuple[str, Path, str]]:
    """(name, image file, text) of everything that is to be predicted."""
    cases, trained_prompt = [], run.get("options", {}).get("prompt")
    if not reads:
        if args.prompt:
            raise ValueError("--prompt: this model reads no text")
        trained_prompt = ""
    for place in map(Path, args.inputs):
        if layouts.splits(place):
            kind = trained_prompt if args.prompt is None else args.prompt
            if kind is None:
                raise ValueError(f"{place}: --prompt is missing: a prompt type (p0…p9) or a text")
            for entry in layouts.annotations(place, args.split, patients_of(run, args.inputs)):
                cases.append((entry.name, entry.image, entry.text(kind)))
            continue
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such image or folder")
        files = (
            sorted(f for f in place.iterdir() if f.suffix.lower() in layouts.ENDINGS)
            if place.is_dir()
            else [place]
        )
        if not files:
            endings = ", ".join(sorted(layouts.ENDINGS))
            raise ValueError(f"{place}: no images in this folder ({endings})")
        if reads and (args.prompt is None or layouts.is_prompt_type(args.prompt)):
            raise ValueError(
                f'{place}: images need --prompt "a text"; prompt types belong to data sets'
            )
        cases += [(file.stem, file, args.prompt or "") for file in files]
    return cases


def outputs(name: str, args) -> dict[str, Path]:
    """The files that one case becomes."""
    kinds = {"mask": "", "probability": "_probability", "overlay": "_overlay"}
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


def check_outputs(files: list[Path], out: Path) -> None:
    """Raise ValueError unless all files are new, different and inside the folder `out`.

    Links are followed, as writing would do. Called before anything is written.
    """
    folder = out.resolve()
    targets = {}  # where a file really goes -> the file
    for path in files:
        target = path.resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"{path}: lies outside --out {out} (at {target}); nothing was written")
        if os.path.lexists(path):
            raise ValueError(f"{path} exists already and is not overwritten; choose another --out")
        if target in targets:
            raise ValueError(
                f"{path} would be written twice: two inputs have the same name, or one is named "
                "like a file that is added (legend.png, NAME_overlay.png); rename it"
            )
        targets[target] = path

    for target, path in targets.items():
        blocking = next((parent for parent in target.parents if parent in targets), None)
        if blocking is not None:
            raise ValueError(f"{path}: {targets[blocking]} would be a file and a folder")


def model_of(args) -> str:
    """The model that NIfTI files alone tell, the first of volumes. ValueError: others tell none."""
    if not all(layouts.is_volume(Path(place)) for place in args.inputs):
        raise ValueError(f"--model is missing: {args.weights} is not a run folder that says it")
    return next(name for name, family in FAMILIES.items() if family.volumes)


def main() -> int:
    args = parse()
    safe = f"the files in {args.out} are whole; the same command with --skip-existing goes on"
    with report.claim(Path(args.out)), report.way_on(lambda: safe):
        return predict_inputs(args)


def predict_inputs(args) -> int:
    """Predict all inputs into --out, which no other process writes to."""
    run = run_config(args.weights)
    name = args.model or run.get("model") or model_of(args)
    if name not in FAMILIES:
        raise ValueError(f"{args.weights}: is a run of {name}, no model that this version has")
    family = FAMILIES[name]
    second = second_file(name, args.clip, args.decoder)
    if family.volumes:
        if args.mask_threshold is not None:
            raise ValueError("--mask-threshold: of images; this model takes volumes")
        with volumes.notices.together():
            return predict_volumes(family, run, args)
    for key in OF_VOLUMES:
        if getattr(args, key):
            raise ValueError(f"--{key.replace('_', '-')}: of volumes; this model takes images")
    cases = list_cases(args, run, family.reads)
    check_outputs(case_outputs(cases, args), Path(args.out))
    for _, file, _ in cases:
        data.open_image(file, decode=False)  # refuses several pages before a mask is written
    if args.boxes and not family.asked:
        raise ValueError("--boxes: this model is not asked by boxes")
    predict(cases, family, run, second, args, ground_truths(args, run))
    print(f"{len(cases)} masks in {args.out}")
    return 0


def image_names(images: list[Path], inputs: list[str]) -> list[str]:
    """Return the images' paths within their input folder or their data set's images folder.

    With several data sets the folder of the data set comes first where a path occurs twice.
    """
    roots = [Path(place).resolve() for place in inputs if layouts.splits(Path(place))]
    names = []
    longer_names = []
    for image in images:
        root = next((root for root in roots if image.is_relative_to(root)), None)
        name = image.name if root is None else layouts.name_in_images(image, root)
        names.append(name)
        longer_names.append(name if root is None else f"{root.name}/{name}")

    counts = Counter(names)
    return [long if counts[name] > 1 else name for name, long in zip(names, longer_names)]


def ground_truths(args, run: dict) -> dict[str, tuple]:
    """Return {name of a case: (entry, threshold of its mask)} for overlays of data sets.

    Only of masks that exist. They are read as in the run. Raises ValueError, one line, if they
    cannot be, or if --mask-threshold has no effect.
    """
    truths = {}
    reading = data.MaskReading(args.mask_threshold, run.get("masks", {}))
    orientation = run.get("options", {}).get("mask_orientation")
    for place in map(Path, args.inputs):
        if not args.overlays or not layouts.splits(place):
            continue
        with redirect_stdout(io.StringIO()):  # what it prints was printed by list_cases
            entries = layouts.annotations(place, args.split, patients_of(run, args.inputs))
        entries = [entry for entry in entries if entry.mask.is_file()]
        entries = data.with_mask_orientation(entries, orientation)
        if entries:
            counts = data.count_masks(entries)
            (rule,) = data.decide_rules(entries, counts, reading).values()
            thresholds = data.mask_thresholds(entries, counts[:, 0], rule)
            pairs = zip(entries, thresholds.tolist())
            truths |= {entry.name: (entry, threshold) for entry, threshold in pairs}

    if args.mask_threshold is not None and not truths:
        need = "--overlays and a data set with masks"
        raise ValueError(f"--mask-threshold has no effect without {need}; remove it")
    return truths


def truth_of(truth: tuple | None, n: int) -> np.ndarray | None:
    """Return the ground truth, bool (n,H,W), of an item of `ground_truths`.

    None without one, or if it has another number of classes than the n of the prediction.
    """
    if truth is None or len(layouts.foreground(truth[0].classes)) != n:
        return None
    return each_is(data.read_truth(*truth), range(1, n + 1))


def ask_by(recipe, cases, classes: list[str] | None, args):
    """SAM's recipe asking by the boxes of a file or by the whole image; and the classes."""
    if args.boxes:
        images = [file for _, file, _ in cases]
        sizes = [data.read_image(file).shape[:2] for file in images]
        names = image_names(images, args.inputs)
        boxes, classes = read_image_boxes(args.boxes, images, names, sizes, classes)
        return partial(recipe.ask, source="given boxes", boxes=boxes), classes
    if classes and len(classes) > 1:
        told = ", ".join(classes[1:])
        raise ValueError(f"--boxes is missing: a whole image does not say which of {told} is meant")
    print("no --boxes: SAM is asked by the box around each whole image")
    return partial(recipe.ask, source="image"), classes or ["target"]


def pictures(probabilities, config, image: np.ndarray, args, skip: int, truth=None) -> dict:
    """Of probabilities (K,H,W) the pictures that are asked for, by the names in `outputs`.

    skip: classes whose probability is none, as SAM's of the background. truth: an item of
    `ground_truths`, for the overlay.
    """
    masks, k = to_masks(probabilities, config), len(probabilities)  # (K,H,W)
    if k == 1:
        made = {"mask": Image.fromarray(masks[0].astype(np.uint8) * 255)}
    else:
        made = {"mask": report.class_map(masks.argmax(0).astype(np.uint8), k)}
    if args.probabilities:
        highest = probabilities[min(skip, k - 1) :].max(0)
        sixteen_bits = (highest * 65535).round().astype(np.uint16)
        made["probability"] = Image.fromarray(sixteen_bits)
    if args.overlays:
        shown = masks[-max(1, k - 1) :]
        made["overlay"] = report.overlay(image, truth_of(truth, len(shown)), shown)
    return made


def predict(
    cases: list[tuple[str, Path, str]], family, run: dict, second: dict, args, truths: dict
) -> None:
    """Writes the files of all cases; of several classes also their names and colours.

    second: the argument of from_pretrained that --clip or --decoder is. truths: of `ground_truths`.
    """
    settings, ask = family.settings["default"], None
    overrides = second if args.threshold is None else second | {"threshold": args.threshold}
    model = family.load(args.weights, None, settings, overrides, None).eval()
    model.to(pick_device(args.device))
    recipe, classes = family.recipe(model, settings), run.get("classes")
    if recipe.ask:
        ask, classes = ask_by(recipe, cases, classes, args)
    classes = classes or [f"class {number}" for number in range(num_classes(model))]
    check_threshold(1 if ask else len(classes), args.threshold)
    legend = Path(args.out) / "legend.png"
    names = Path(args.out) / "classes.json"
    shared = [legend, names] if len(classes) > 1 else []
    check_outputs([*shared, *case_outputs(cases, args)], Path(args.out))
    cuts = describe_cuts({prompt for _, _, prompt in cases}, recipe.tokenizer)
    if cuts:
        print(f"prompts: {cuts}")
    colours = run.get("options", {}).get("pseudocolor")
    non_finite = []
    n = len(layouts.foreground(tuple(classes)))
    if any(len(layouts.foreground(entry.classes)) != n for entry, _ in truths.values()):
        print("--overlays: a ground truth of other classes than the model's is not drawn")
    for name, file, prompt in tqdm(cases, desc="predict", unit="image", disable=None):
        image, has_non_finite = data.load_image(file)  # (H,W,3)
        if has_non_finite:
            non_finite.append(file)
        pixels = data.pseudocolor(image, colours).transpose(2, 0, 1).copy()
        sample = {"image": torch.from_numpy(pixels), "prompt": prompt, "name": name}
        sample |= {"file": file, "size": image.shape[:2], "classes": tuple(classes)}
        sample |= {"group": None, "dataset": ""}
        item = recipe.inputs(sample, train=False, rng=None) | (ask(sample) if ask else {})
        with torch.no_grad():
            probabilities = recipe.predict(model, item)[0].cpu().numpy()  # (K,H,W)
        made = pictures(probabilities, model.config, image, args, bool(ask), truths.get(name))
        for kind, path in outputs(name, args).items():
            report.save_picture(path, made[kind])
    if non_finite:
        print(data.non_finite_line(list(dict.fromkeys(non_finite))))
    if shared:
        report.save_picture(legend, report.legend(tuple(classes[1:])))
        report.write_json(names, dict(enumerate(classes)))


# --- volumes -------------------------------------------------------------------------------------


def list_volumes(args, run: dict, channels: int) -> dict[str, list[Path]]:
    """Name -> files of its channels, of everything that is to be predicted."""
    cases, files = [], []
    for place in map(Path, sorted(args.inputs)):
        if layouts.splits(place):
            entries = layouts.annotations(place, args.split, patients_of(run, args.inputs))
            cases += [(entry.name, [entry.image, *entry.more]) for entry in entries]
        elif not place.exists():
            raise FileNotFoundError(f"{place}: no such volume or folder")
        elif place.is_dir() and not layouts.volumes_in(place):
            raise ValueError(f"{place}: no volumes in this folder ({', '.join(layouts.NIFTI)})")
        else:
            files += layouts.volumes_in(place) if place.is_dir() else [place]
    whole = [file for file in files if volumes.read_grid(file).channels == channels]
    # patient_0001, patient_0002 are no channels; _0000 of all is nnU-Net's ending
    stems = [layouts.without_ending(file) for file in whole]
    end = "_0000" if all(stem.endswith("_0000") for stem in stems) else ""
    cases += [(stem.removesuffix(end), [file]) for stem, file in zip(stems, whole)]
    cases += layouts.channels_of([file for file in files if file not in whole]).items()
    names = [name for name, _ in cases]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: two inputs have this name; predict them to two folders")
    return dict(cases)


def volume_outputs(name: str, classes: list[str], overlapping: bool, args) -> dict[str, Path]:
    """The files that one volume becomes."""
    parts = [re.sub(r"\W+", "_", f"_{k}") for k in classes[1:]] if overlapping else [""]
    kinds = {f"mask{n}": f"{part}.nii.gz" for n, part in enumerate(parts)}
    kinds |= {"probability": "_probability.nii.gz"} if args.probabilities else {}
    kinds |= {"overlay": "_overlay.png"} if args.overlays else {}
    return {kind: Path(args.out) / f"{name}{end}" for kind, end in kinds.items()}


def volume_model(family, run: dict, args):
    """The model and its recipe, as the run and the command line have them."""
    if args.prompt or args.boxes:
        raise ValueError("--prompt, --boxes: this model takes volumes and nothing else")
    if args.window_batch is not None and args.window_batch < 1:
        raise ValueError("--window-batch must be at least 1")
    if args.overlap is not None and not 0 <= args.overlap < 1:
        raise ValueError(f"--overlap {args.overlap}: a share of a side, 0 to below 1")
    trained = run.get("options", {}).get("overlap")
    given = {"overlap": trained if args.overlap is None else args.overlap}
    given |= {"window_batch": args.window_batch}
    given = {key: value for key, value in given.items() if value is not None}
    settings = replace(family.settings["default"], **given)
    overrides = {} if args.threshold is None else {"threshold": args.threshold}
    model = family.load(args.weights, None, settings, overrides, None).eval()
    model.to(pick_device(args.device))
    return model, family.recipe(model, settings)


def predict_volumes(family, run: dict, args) -> int:
    """Writes the label maps of all volumes, and the names of their numbers."""
    model, recipe = volume_model(family, run, args)
    c = model.config
    classes, numbers = classes_of(c, run)
    asked = numbers_asked(model, classes, args.classes)
    if asked is not None:
        classes = [classes[0], *(classes[k + 1] for k in asked)]
    if args.organ_rules:
        check_rules(c, classes if c.classes or run.get("classes") else [], args)
    check_threshold(1 if c.overlapping else c.num_classes, args.threshold)
    cases, out = list_volumes(args, run, c.in_channels), Path(args.out)
    made = {name: volume_outputs(name, classes, c.overlapping, args) for name in cases}
    files = [path for some in made.values() for path in some.values()]
    shared = [] if c.overlapping else [out / "classes.json"]
    shared += [out / "legend.png"] if args.overlays else []
    check_outputs([*shared, *files], out)
    for files in cases.values():  # before anything takes long
        channels = sum(volumes.read_grid(file).channels for file in files)
        volumes.check_channels(files[0], channels, c.in_channels)
    if not c.overlapping:
        report.write_json(out / "classes.json", dict(zip(numbers, classes)))
    if args.overlays:
        report.save_picture(out / "legend.png", report.legend(tuple(classes[1:])))
    item = {} if asked is None else {"asked": asked}
    for name, files in tqdm(cases.items(), desc="predict", unit="volume", disable=None):
        predict_volume(model, recipe, files, made[name], item, classes, numbers, args)
    print(f"{len(cases)} volumes in {args.out}")
    return 0


def classes_of(config, run: dict) -> tuple[list[str], list[int]]:
    """Names of a model's classes, background first, and their numbers in label maps."""
    names = list(config.classes) or [f"class {k}" for k in range(config.num_classes)]
    names = run.get("classes") or names
    names = names if len(names) > 1 else ["background", *names]
    numbers = None if config.overlapping else run.get("labels")
    if numbers and max(numbers) > 255:  # label maps are of bytes
        print(f"numbers of the training data go up to {max(numbers)}; written are 0, 1, 2, …")
        numbers = None
    return names, numbers or list(range(len(names)))


def numbers_asked(model, classes: list[str], names: list[str] | None) -> list[int] | None:
    """Numbers of classes that --classes names, the first behind the background is 0; None: all.

    ValueError, one line: no class of the model, or a model that finds all classes at once.
    """
    if names is None:
        return None
    if not hasattr(model, "add_class"):
        raise ValueError("--classes: this model finds all of its classes at once; drop it")
    known = {layouts.plain_name(name): k for k, name in enumerate(classes[1:])}
    names = [*map(layouts.plain_name, names)]
    if lost := [name for name in names if name not in known]:
        raise ValueError(f"--classes: the model has no {lost[0]}, only {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def check_rules(config, classes: list[str], args) -> None:
    """ValueError, one line, if no rule fits; what a rule needs and is not there is printed."""
    if not config.overlapping:
        told = "of classes that are found one by one; this model tells them apart"
        raise ValueError(f"--organ-rules: {told}, take --largest-component")
    if args.largest_component:
        raise ValueError("--organ-rules knows what is one piece; drop --largest-component")
    if not organs.ruled(classes[1:]):
        told = ", ".join(classes[1:]) or "nothing names the model's classes"
        raise ValueError(f"--organ-rules: none for these classes ({told}); drop it")
    for name, needs in organs.unruled(classes).items():
        print(f"--organ-rules: {name} stays as it is without {', '.join(needs)}")


def predict_volume(model, recipe, files, outputs, item: dict, classes, numbers, args) -> None:
    """Writes the files of one volume. item: what the recipe takes besides it."""
    c = model.config
    fill = volumes.fill_value(model.preprocess, c.in_channels)
    image, grid = volumes.read_image(files, fill)  # (C,X,Y,Z)
    if c.intensity:
        volumes.say_if_not_hu(files[0], volumes.hu_facts(image))
    prepared, place = volumes.prepare_image(image, grid, c.spacing, model.preprocess)
    with torch.no_grad():
        item = item | {"image": prepared, "place": place}
        found = recipe.predict(model, item)[0]  # (K,X,Y,Z)
    if c.overlapping or c.num_classes == 1:
        inside = 1 if c.overlapping else numbers[1]
        maps = np.where((found > c.threshold).numpy(), np.uint8(inside), np.uint8(0))  # (K,X,Y,Z)
    else:
        maps = np.array(numbers, np.uint8)[found.argmax(0).numpy()][None]
    if args.largest_component:
        maps = np.stack([volumes.largest_component(labels) for labels in maps])
    if args.organ_rules:
        masks = dict(zip(classes[1:], maps.view(bool)))
        maps = np.stack([*organs.organ_rules(masks, grid.spacing).values()]).view(np.uint8)
    for n, labels in enumerate(maps):
        volumes.write(outputs[f"mask{n}"], labels, grid)
    if args.probabilities:
        highest = found[1 if len(found) > 1 and not c.overlapping else 0 :].amax(0)
        volumes.write(outputs["probability"], highest.numpy(), grid)
    if args.overlays:
        shown = maps > 0 if c.overlapping else each_is(maps[0], numbers[1:])
        grey = volumes.grey(image, model.preprocess)
        picture = report.volume_overlay(grey, None, shown, grid.spacing)
        report.save_picture(outputs["overlay"], picture)


if __name__ == "__main__":
    report.command(main)
