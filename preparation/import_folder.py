"""Bring a user's own images and masks into our layout: `prepare.py import`.

The formats that are recognised are in pairs.py (masks as image files), coco.py, labelme.py,
cvat.py, label_studio.py and kaggle_rle.py (files of annotation tools) and import_volumes.py
(volumes and DICOM). What all 2-D formats share is here: the choice of a format, the random split,
the files that are written and the sheet of overlays.
"""

import os
import re
import shlex
import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine import tables
from engine.command_line import flag
from engine.ranges import GREY_LEVEL
from imaging import atomic_files, image_files, layouts, pictures
from imaging.files import json_text, read_csv
from imaging.layouts import MOST_CLASSES
from imaging.measurements import SPACINGS
from preparation import (
    coco,
    cvat,
    dicom_images,
    dicom_series,
    import_volumes,
    kaggle_rle,
    label_studio,
    labelme,
    pairs,
    total_segmentator,
)
from preparation.check_findings import width_by_height
from preparation.check_images import MASK_THRESHOLD
from preparation.readings import (
    IGNORED,
    Case,
    Format,
    ImageReading,
    Object,
    Reading,
    VolumeCase,
    VolumeReading,
    count,
)
from preparation.volume_pairs import ENDINGS

FORMATS: tuple[Format, ...] = (
    *pairs.FORMATS,
    coco.FORMAT,
    labelme.FORMAT,
    cvat.FORMAT,
    label_studio.FORMAT,
    kaggle_rle.FORMAT,
    *import_volumes.FORMATS,
    *total_segmentator.FORMATS,
    *dicom_series.FORMATS,
    *dicom_images.FORMATS,
)
GLOBS = "globs"  # the format of images that --images and --masks name
SPLITS = ("train", "val", "test")
MOST_OVERLAYS = 12
LONGEST_NAME = 255  # bytes
ENOUGH_FOR_SPLITS = 3  # images or patients; fewer are all for training


# --- recognising ----------------------------------------------------------------------------------


def formats_to_try(args: Namespace) -> list[Format]:
    """Return the formats that the options allow: all, that of --format, or those of patterns."""
    if args.format:
        return [format for format in FORMATS if format.name == args.format]
    if not args.images:
        return list(FORMATS)
    if args.images.lower().endswith(ENDINGS):
        return [format for format in import_volumes.FORMATS if format in FORMATS]
    return [format for format in FORMATS if format.name == GLOBS]


def recognise(folder: Path, args: Namespace) -> tuple[list[Reading], list[Exception]]:
    """Return the ways to read a folder, and the errors of formats that know it but cannot."""
    readings = []
    errors = []
    for format in formats_to_try(args):
        try:
            readings += format.recognise(folder, args)
        except (ValueError, FileNotFoundError) as error:
            errors.append(error)
    return readings, errors


def choose_reading(folder: Path, args: Namespace) -> Reading:
    """Return the only way to read a folder.

    Raises ValueError, one line, if no format or several formats fit.
    """
    readings, errors = recognise(folder, args)
    choices = "; ".join(f"--format {r.format}: {r.summary[0]}" for r in readings)
    if errors and readings:
        raise ValueError(f"{errors[0]}; or choose {choices}")
    if errors:
        raise errors[0]
    if not readings:
        kind = f"the format {args.format}" if args.format else "images with masks or annotations"
        raise ValueError(
            f"{folder}: not recognised as {kind}; it contains {describe_content(folder)}; put "
            "images and masks into this folder, or name the files in it with --images 'GLOB' "
            "--masks 'GLOB'"
        )
    if len(readings) > 1:
        raise ValueError(f"{folder}: can be read in {len(readings)} ways; choose one: {choices}")
    return readings[0]


def describe_content(folder: Path) -> str:
    """Return the kinds of files below a folder, most frequent first, "12 .png, 3 .txt"."""
    return layouts.count_kinds(layouts.files_below(folder, with_masks=True)) or "no files"


def advice(folder: Path) -> str | None:
    """Return a line that says how a folder could be imported, None if no format fits.

    Raises nothing, so that it can be added to any message.
    """
    command = f"python prepare.py import {shlex.quote(str(folder))} --out data/NAME"
    try:
        readings, errors = recognise(folder, default_options(folder))
    except OSError as error:
        return f"{command} reads such folders, but: {error}"
    if errors:
        return f"{command} reads such folders, but: {errors[0]}"
    if not readings:
        return None
    ways = " or ".join(f"{reading.format}: {reading.summary[0]}" for reading in readings)
    return f"{command} reads it as {ways}"


def default_options(folder: Path) -> Namespace:
    """Return the options of an import of a folder for which none is given."""
    parser = ArgumentParser()
    options(lambda run, help, name: parser.add_argument)
    return parser.parse_args(["--out", "data/NAME", "--", str(folder)])


# --- patients and splits --------------------------------------------------------------------------


def names_of(case, folder: Path) -> set[str]:
    """Return the names that a CSV file may use for the image of a case."""
    if not isinstance(case, Case):
        names = {case.name, Path(case.name).name}
        return names | {name + ending for name in names for ending in ENDINGS}
    relative = case.image.relative_to(folder).as_posix()
    return {case.name, case.image.name, case.image.stem, relative}


def read_groups(path: Path, cases: list, folder: Path) -> list:
    """Return the cases with the patients of a CSV file with the columns image and group.

    An image is named by its path within the folder or its file name, with or without the ending. A
    volume is named as it will be written.
    Raises ValueError, one line, for other columns, unknown or ambiguous images, and images that
    the file does not list.
    """
    rows = read_csv(path)
    if not rows or not {"image", "group"} <= set(rows[0]):
        raise ValueError(f"{path}: expected a header line image,group and a line for each image")

    indices = {}  # a name of an image -> indices of the cases with that name
    for i, case in enumerate(cases):
        for name in set(map(layouts.composed, names_of(case, folder))):
            indices.setdefault(name, []).append(i)

    groups = {}
    for number, row in enumerate(rows, 2):
        name = layouts.composed((row["image"] or "").strip())
        group = (row["group"] or "").strip()
        matches = indices.get(name, [])
        if len(matches) != 1:
            problem = f"{len(matches)} images have" if matches else "no image has"
            raise ValueError(f"{path}, line {number}: {problem} the name {name!r}")
        if not group.strip("\0"):
            raise ValueError(f"{path}, line {number}: has no group")
        if groups.setdefault(matches[0], group) != group:
            raise ValueError(f"{path}, line {number}: {name} has another group in a line before")

    missing = [case.name for i, case in enumerate(cases) if i not in groups]
    if missing:
        raise ValueError(f"{path}: has no line for {missing[0]}, and {len(missing) - 1} more")
    return [replace(case, group=groups[i]) for i, case in enumerate(cases)]


def match_groups(regex: str, cases: list, folder: Path) -> list:
    """Return the cases with the patients that --group-regex finds in the paths within a folder.

    Raises ValueError, one line, if it finds nothing in one of them.
    """
    grouped = []
    for case in cases:
        path = case.name
        if isinstance(case, Case):
            path = case.image.relative_to(folder).as_posix()
        grouped.append(replace(case, group=layouts.match_group(path, regex)))
    return grouped


def with_splits(cases: list) -> list:
    """Return the cases with a split each: that of their folder, or a random one by patient.

    Random splits are those of layouts.py for a folder without splits: 80 / 10 / 10 %, seed 0. Of
    fewer than ten patients or images, val and test get one each. Fewer than three are for training.
    Raises ValueError, one line, if only some cases have a split.
    """
    without = [case for case in cases if not case.split]
    if not without:
        return cases
    if len(without) < len(cases):
        file = getattr(without[0], "image", without[0].name)
        raise ValueError(
            f"{file}: lies in no split folder, but {len(cases) - len(without)} other "
            "images do; move it into one of the folders, or remove the folders"
        )

    entries = []
    for case in cases:
        path = Path(case.name)
        entries.append(layouts.Entry(case.name, path, path, {}, path, group=case.group or None))
    units = len({entry.group or entry.name for entry in entries})
    if units < ENOUGH_FOR_SPLITS:
        return [replace(case, split="train") for case in cases]

    split_of_index = dict.fromkeys(range(len(cases)), "train")
    parts = layouts.random_parts(entries, min(units, 10))
    split_of_index |= dict.fromkeys(parts[0], "test")
    split_of_index |= dict.fromkeys(parts[1], "val")
    return [replace(case, split=split_of_index[i]) for i, case in enumerate(cases)]


def with_plain_names(cases: list) -> list:
    """Return the cases with names that are single file names: "a/b" becomes "a_b".

    Raises ValueError, one line, if two cases get the same name.
    """
    named = []
    earlier = {}  # lower-case name -> name in the folder; some disks ignore the case
    for case in cases:
        name = layouts.check_name(case.name.replace("/", "_"), "name")
        if name.lower() in earlier:
            other = earlier[name.lower()]
            raise ValueError(f"{case.name} and {other}: would both be written as {name}")
        earlier[name.lower()] = case.name
        named.append(replace(case, name=name))
    return named


# --- writing images -------------------------------------------------------------------------------


def write_image(case: Case, folder: Path) -> tuple[Path, np.ndarray]:
    """Write the image of a case into a folder. Return the file and the pixels, uint8 (H,W,3).

    A file without an EXIF rotation is copied, byte for byte; all others become PNG files.
    """
    if case.read_pixels:
        target = folder / check_length(f"{case.name}.png", case.image)
        Image.fromarray(case.read_pixels()).save(target)
        return target, image_files.read_image(target)

    pixels = image_files.read_image(case.image)  # (H,W,3), upright
    header = image_files.open_image(case.image, decode=False)
    if image_files.exif_orientation(header) != 1:
        target = folder / check_length(f"{case.name}.png", case.image)
        Image.fromarray(pixels).save(target)
    else:
        target = folder / check_length(f"{case.name}{case.image.suffix.lower()}", case.image)
        shutil.copyfile(case.image, target)
    return target, pixels


def class_map(objects: list[Object], classes: tuple[str, ...], size: tuple) -> np.ndarray:
    """Return the class indices of an image, uint8 (H,W): 0 is the background.

    A later object covers earlier ones.
    """
    indices = np.zeros(size, np.uint8)
    for item in objects:
        indices[item.mask] = classes.index(item.class_name) + 1
    return indices


def covered_pixels(objects: list[Object], indices: np.ndarray, classes: tuple[str, ...]) -> int:
    """Return how many pixels of objects are covered by an object of another class."""
    is_covered = np.zeros(indices.shape, bool)
    for item in objects:
        is_covered |= item.mask & (indices != classes.index(item.class_name) + 1)
    return int(is_covered.sum())


def union(objects: list[Object], size: tuple) -> np.ndarray:
    """Return the pixels of all objects, bool (H,W)."""
    mask = np.zeros(size, bool)
    for item in objects:
        mask |= item.mask
    return mask


def grouped_objects(objects: list[Object], each: str, size: tuple) -> list[tuple[str, Object]]:
    """Return (ending of the file name, object) of each mask to be written with --each.

    each: "mask" for every object, "class" for every class.
    """
    if each == "mask":
        return [(str(k), item) for k, item in enumerate(objects, 1)]

    by_class = {}
    for item in objects:
        by_class.setdefault(item.class_name, []).append(item)
    grouped = []
    for name, items in by_class.items():
        ending = re.sub(r"[^\w.-]", "_", name) or "object"  # on any disk
        grouped.append((ending, Object(name, union(items, size))))
    return grouped


def check_length(name: str, source: Path) -> str:
    """Return a file name. Raises ValueError, one line, if it is too long for most disks."""
    length = len(os.fsencode(name))
    if length > LONGEST_NAME:
        raise ValueError(
            f"{source}: {name[:40]}…{name[-20:]} would be a name of {length} bytes, but disks take "
            f"{LONGEST_NAME}; use shorter names of files, folders or classes"
        )
    return name


class ImageWriter:
    """Writes the cases of a reading into images/, masks/ and anns/ of a folder."""

    def __init__(self, reading: ImageReading, part: Path, args: Namespace):
        self.classes = reading.classes
        self.images = part / "images"
        self.masks = part / "masks"
        self.args = args
        self.is_class_map = len(reading.classes) > 1 and not args.each
        self.has_masks = reading.has_masks
        self.spacings = []  # rows of spacing.csv
        self.entries = {}  # split -> items of its annotation file
        self.covered = 0  # images in which objects of several classes overlap
        self.empty = 0  # images without objects
        self.ignored = 0  # images with ignored pixels that the masks cannot mark
        self.names = set()  # of masks, in lower case
        self.cards = []  # overlays for the sheet

    def write(self, case: Case, has_overlay: bool) -> None:
        """Write a case, and draw it if it is among those of the sheet."""
        image, pixels = write_image(case, self.images)
        size = pixels.shape[:2]
        everything = case.read_objects(size)
        objects = [item for item in everything if item.class_name != IGNORED]
        ignored = [item for item in everything if item.class_name == IGNORED]
        for item in everything:
            if item.mask.shape != size:
                raise ValueError(
                    f"{case.image}: {width_by_height(size)}, but its mask is "
                    f"{width_by_height(item.mask.shape)}; draw or resize the mask at the size of "
                    "the image"
                )
        self.empty += not any(item.mask.any() for item in objects)
        self.ignored += bool(ignored) and not self.is_class_map

        if self.has_masks and self.args.each and not objects:
            image.unlink()  # nothing to prompt for
            return
        if self.has_masks:
            self.write_masks(case, image, objects, ignored, size)

        if case.spacing:
            x, y = case.spacing
            self.spacings.append({"image": image.name, "x_mm": f"{x:g}", "y_mm": f"{y:g}"})
        if has_overlay:
            self.draw(case, pixels, objects)

    def write_masks(
        self, case: Case, image: Path, objects: list[Object], ignored: list[Object], size: tuple
    ) -> None:
        """Write the masks of an image as the options ask: one for all, or one for each."""
        if self.args.each:
            self.write_each(case, image, objects, size)
        elif self.is_class_map:
            indices = class_map(objects, self.classes, size)
            self.covered += covered_pixels(objects, indices, self.classes) > 0
            indices[union(ignored, size)] = 255
            self.add(case, image, case.name, indices, "")
        else:
            mask = union(objects, size)
            name = self.classes[0] if self.classes else ""
            self.add(case, image, case.name, np.uint8(255) * mask, name)

    def write_each(self, case: Case, image: Path, objects: list[Object], size: tuple) -> None:
        """Write one mask and one entry for every object or class of an image."""
        for ending, item in grouped_objects(objects, self.args.each, size):
            name = f"{case.name}_{ending}"
            self.add(case, image, name, np.uint8(255) * item.mask, item.class_name)

    def add(self, case: Case, image: Path, name: str, mask: np.ndarray, class_name: str) -> None:
        """Write a mask, uint8 (H,W), and add its entry to the annotations."""
        target = self.masks / check_length(f"{self.unused_name(name)}.png", case.image)
        Image.fromarray(mask).save(target)

        prompts = {}
        if not self.is_class_map:
            prompts["p0"] = ""
            prompt = self.args.prompt or class_name
            if prompt:
                prompts["p1"] = prompt if mask.any() else f"no {prompt}"
        entry = {"img_name": image.name, "mask_name": target.name, "prompts": prompts}
        if case.group:
            entry["group"] = case.group
        self.entries.setdefault(case.split, []).append(entry)

    def unused_name(self, name: str) -> str:
        """Return a name for a mask, with a number if another mask has it; some disks ignore case.

        Classes such as "a b" and "a_b" give the same name.
        """
        unused = name
        number = 2
        while unused.lower() in self.names:
            unused = f"{name}_{number}"
            number += 1
        self.names.add(unused.lower())
        return unused

    def draw(self, case: Case, pixels: np.ndarray, objects: list[Object]) -> None:
        """Add an overlay of the objects to the sheet."""
        size = pixels.shape[:2]
        names = self.classes or ("",)
        masks = np.zeros((len(names), *size), bool)  # (K,H,W)
        for item in objects:
            masks[names.index(item.class_name)] |= item.mask
        overlay = pictures.overlay(pixels, masks, masks)
        self.cards.append(pictures.captioned(overlay, case.name))

    def sheet(self) -> Image.Image:
        """Return the page of overlays, with the colours of the classes if there are several."""
        cards = list(self.cards)
        if len(self.classes) > 1:
            cards.append(pictures.legend(self.classes))
        return pictures.sheet(cards)


def write_images(reading: ImageReading, args: Namespace) -> list[str]:
    """Write a reading of images to args.out, whole or not at all. Return lines about it."""
    cases = with_plain_names(reading.cases)
    if reading.has_masks:
        cases = with_splits(cases)
    drawn = np.random.default_rng(0).permutation(len(cases))[:MOST_OVERLAYS].tolist()

    with atomic_files.atomic_folder(args.out) as part:
        for name in ("images", "masks", "anns") if reading.has_masks else ("images",):
            (part / name).mkdir(parents=True)
        writer = ImageWriter(reading, part, args)
        for i, case in enumerate(tqdm(cases, desc=args.out.name, unit="image", disable=None)):
            writer.write(case, i in drawn)
        if reading.has_masks and not writer.entries:
            raise ValueError(f"{args.folder}: shows no object, so that --each has nothing to write")

        contents = dict(reading.tables)
        if writer.is_class_map:
            names = ("background", *reading.classes)
            contents["classes.json"] = dict(enumerate(names))
        for split, entries in writer.entries.items():
            contents[f"anns/{split}.json"] = entries
        for name, content in contents.items():
            (part / name).write_text(json_text(content), encoding="utf-8")

        if writer.spacings:
            tables.write_csv(part / SPACINGS, writer.spacings)
        description = describe(reading, cases, writer)
        (part / "README.txt").write_text("\n".join(description) + "\n", encoding="utf-8")
        if writer.cards:
            pictures.save_picture(part / "overview.png", writer.sheet())
    return description


def describe_split(before: list, cases: list) -> str:
    """Return the line of README.txt about the splits. before: the cases without random splits."""
    if all(case.split for case in before):
        return "split: as in the folder"
    unit = "patients" if any(case.group for case in cases) else "images"
    if {case.split for case in cases} == {"train"}:
        return f"split: all for training, with fewer than {ENOUGH_FOR_SPLITS} {unit}"
    if unit == "patients":
        return "split: random, all images of a patient in one split"
    return (
        "split: random, by image; if patients have several images, import again with --group-regex "
        "or --groups"
    )


def similar_classes(classes: tuple[str, ...]) -> list[str]:
    """Return a line for each pair of classes such as Polyp and polyp, which may be one."""
    lines = []
    earlier = {}  # name in lower case, with blanks -> name
    for name in classes:
        plain = " ".join(re.findall(r"[^\W_]+", name.lower()))
        if plain in earlier:
            lines.append(
                f"are the classes {earlier[plain]} and {name} one? then give them one name in the "
                "annotations and import again"
            )
        earlier.setdefault(plain, name)
    return lines


def describe(reading: ImageReading, cases: list[Case], writer: ImageWriter) -> list[str]:
    """Return the lines of README.txt: what was recognised and what was written."""
    lines = [f"Read as {reading.format}: {reading.summary[0]}", *reading.summary[1:]]
    for split in sorted(writer.entries, key=SPLITS.index):
        entries = writer.entries[split]
        images = len({entry["img_name"] for entry in entries})
        lines.append(f"{split}: {count(images, 'image')}, {count(len(entries), 'mask')}")
    lines.append(describe_split(reading.cases, cases))
    if reading.classes:
        lines.append(f"classes: {', '.join(reading.classes)}")
    lines += similar_classes(reading.classes)
    groups = {case.group for case in cases if case.group}
    if groups:
        lines.append(f"patients: {len(groups)}")
    if writer.spacings:
        lines.append(f"images with a spacing in mm, in {SPACINGS}: {len(writer.spacings)}")
    if not reading.has_masks:
        return [*lines, f"images without masks, for predict.py: {len(cases)}"]
    if writer.empty:
        omitted = ", left out" if writer.args.each else ""
        lines.append(f"images without objects: {writer.empty}{omitted}")
    if writer.ignored:
        lines.append(f"images in which ignored pixels became background: {writer.ignored}")
    if writer.covered:
        lines.append(
            f"objects of several classes overlap in {count(writer.covered, 'image')}; the one that "
            "comes later in the files covers the others"
        )
    return lines


# --- command line ---------------------------------------------------------------------------------


def refuse_misuse(args: Namespace) -> None:
    """Raise ValueError or FileNotFoundError, one line, before the folder is read."""
    if args.folder.is_file():
        raise ValueError(f"{args.folder}: is a file; unpack an archive and give its folder")
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder}: no such folder")
    atomic_files.refuse_existing(args.out)
    if args.out.resolve().is_relative_to(args.folder.resolve()):
        raise ValueError(f"--out {args.out}: lies within {args.folder}; choose another folder")
    if bool(args.images) != bool(args.masks):
        raise ValueError("--images and --masks: give both, the images and their masks")
    readers = (None, GLOBS, *(format.name for format in import_volumes.FORMATS))
    if args.images and args.format not in readers:
        raise ValueError(f"--format {args.format}: --images and --masks name the files; remove it")
    if args.groups and args.group_regex:
        raise ValueError("--groups and --group-regex: both name the patients; remove one")


def refuse_useless(reading: Reading, args: Namespace) -> None:
    """Raise ValueError, one line, for options that have no effect on a reading."""
    if isinstance(reading, VolumeReading):
        for name in ("prompt", "each", "mask_threshold"):
            if getattr(args, name) is not None:
                raise ValueError(f"{flag(name)}: has no effect on volumes; remove it")
    elif len(reading.classes) > MOST_CLASSES:
        raise ValueError(
            f"{args.folder}: has {len(reading.classes)} classes; a mask holds {MOST_CLASSES}"
        )
    elif args.modality:
        raise ValueError("--modality: has no effect on images; remove it")
    elif args.prompt and len(reading.classes) > 1 and not args.each:
        raise ValueError(
            f"--prompt: the masks have several classes ({', '.join(reading.classes)}); add --each "
            "mask, or remove --prompt"
        )


def import_folder(args):
    """Bring your own images and masks, or volumes, into the layout that train.py reads.

    The format of the folder is recognised from its content. If several formats fit, nothing is
    written and --format chooses one. Files are copied; FOLDER itself is not changed. Look at
    overview.png in the new folder, then run `prepare.py check` on it.
    """
    refuse_misuse(args)
    reading = choose_reading(args.folder, args)
    refuse_useless(reading, args)
    if args.groups:
        cases = read_groups(args.groups, reading.cases, args.folder)
        reading = replace(reading, cases=cases)
    if args.group_regex:
        cases = match_groups(args.group_regex, reading.cases, args.folder)
        reading = replace(reading, cases=cases)

    if isinstance(reading, VolumeReading):
        import_volumes.write_volumes(reading, cases_of_volumes(reading), args)
    else:
        lines = write_images(reading, args)
        print(f"{args.out}: ", end="")
        print("\n".join(lines))
    print(f"overlays to look at: {args.out / 'overview.png'}")
    print(f"next: {next_command(reading, args.out)}")
    return 0


def cases_of_volumes(reading: VolumeReading) -> list[VolumeCase]:
    """Return the cases with the names and splits with which they are written.

    Volumes without labels are listed in the test split, for predict.py.
    """
    cases = with_plain_names(reading.cases)
    labelled = [case for case in cases if case.write_labels]
    unlabelled = [replace(case, split="test") for case in cases if not case.write_labels]
    return with_splits(labelled) + unlabelled


def next_command(reading: Reading, out: Path) -> str:
    """Return the command that should follow the import."""
    images = None
    if isinstance(reading, VolumeReading):
        if not any(case.write_labels for case in reading.cases):
            images = out / "imagesTs"
    elif not reading.has_masks:
        images = out / "images"
    if images:
        return f"python predict.py --weights RUN --out masks {shlex.quote(str(images))}"
    return f"python prepare.py check {shlex.quote(str(out))}"


def options(command):
    """Describe `prepare.py import`."""
    add = command(import_folder, "bring your own images and masks into our layout", name="import")
    add("folder", type=Path, metavar="FOLDER", help="folder with images and masks, or volumes")
    help = "folder to write, such as data/mine"
    add("--out", type=Path, required=True, metavar="DATA", help=help)
    names = ", ".join(format.name for format in FORMATS)
    help = f"how to read FOLDER: {names} (default: the one that fits)"
    add("--format", choices=[format.name for format in FORMATS], metavar="NAME", help=help)
    help = "pattern of the image files within FOLDER, such as 'scans/*.png'; with --masks"
    add("--images", metavar="GLOB", help=help)
    help = (
        "pattern of the mask files within FOLDER, such as 'outlines/*_roi.png'; the stars stand "
        "for the same texts as in --images (* without /, **/ for any folders), {class} for the "
        "name of a class, {object} for any text of one of several masks of an image"
    )
    add("--masks", metavar="GLOB", help=help)
    help = "CSV file with the columns image and group: the patient of each image"
    add("--groups", type=Path, metavar="FILE", help=help)
    help = (
        "regular expression that finds the patient in an image's path within FOLDER: its first "
        "group, or the whole match; such as 'P[0-9]+', or '^[^/]+' for the first folder; the "
        "random split keeps patients together (default: split by image)"
    )
    add("--group-regex", metavar="REGEX", help=help)
    help = "text prompt of all masks (default: the name of their class, if FOLDER has it)"
    add("--prompt", metavar="TEXT", help=help)
    help = (
        "write one mask and one entry for every object (mask) or every class (class) of an image, "
        "for models with text prompts (default: one mask for each image)"
    )
    add("--each", nargs="?", const="mask", choices=("mask", "class"), help=help)
    help = (
        "names of the class numbers 1, 2, … in masks, separated by commas; of some numbers only, "
        "such as 1=liver,4=kidney; or of colours, such as liver=#ff0000,kidney=#00ff00"
    )
    add("--classes", metavar="NAMES", help=help)
    help = "modality of volumes, such as CT or MR (default: from the files)"
    add("--modality", metavar="NAME", help=help)
    help = "leave out images without a mask or annotation (default: refuse them)"
    add("--skip-unpaired", action="store_true", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
