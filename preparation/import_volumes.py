"""Import a user's volumes into our layout: read NIfTI, NRRD and MetaImage, write the data set.

volume_pairs.py finds the image and the label map of a case. itk_files.py converts formats that only
SimpleITK reads. total_segmentator.py reads folders of one mask for each class, dicom_series.py
reads DICOM.
"""

import gzip
import json
import re
import shutil
import tempfile
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from imaging import layouts, nifti, pictures
from imaging.files import read_json
from preparation import itk_files, volume_pairs, volume_sets
from preparation.readings import Format, VolumeCase, VolumeReading, count
from preparation.volume_pairs import Pair

MOST_PICTURES = 12  # volumes in overview.png
CARD = 640  # pixels, width of a picture there
SIDE = 160  # voxels; overview.png skips voxels of longer sides
AIR = -500  # HU; only CT has voxels below this
SOFT_TISSUE = (-160, 240)  # HU, black and white of CT in overview.png
MODALITY_WORDS = {"CT": {"ct"}, "MR": {"mr", "mri", *volume_pairs.CHANNELS}}
MOST_LEGEND = 30  # classes

# --- class names ----------------------------------------------------------------------------------


def parse_classes(text: str) -> dict[str, str]:
    """Return {"0": "background", number: name} from --classes.

    text: "liver,tumour" or "1=liver,4=tumour". Raises ValueError, one line, for other texts and
    for a repeated name or number.
    """
    labels = {"0": "background"}
    for position, item in enumerate(text.split(","), 1):
        number, _, name = item.rpartition("=")
        number = number.strip() or str(position)
        name = name.strip()

        is_number = re.fullmatch(r"[1-9]\d{0,4}", number) and number != "255"
        if not name or not is_number:
            raise ValueError(f"--classes {text!r}: expected liver,tumour or 1=liver,4=tumour")
        if number in labels or name in labels.values():
            raise ValueError(f"--classes {text!r}: {name} or {number} is repeated")
        labels[number] = name
    return labels


def chosen_names(all_names: list[str], args: Namespace, where: Path) -> list[str]:
    """Return the names that --classes chooses from all_names, or all of them without --classes.

    Raises ValueError, one line, for names that do not occur, and for more than 254.
    """
    names = all_names
    if args.classes:
        names = [name.strip() for name in args.classes.split(",")]

    for name in names:
        if name not in all_names:
            known = layouts.shorten(", ".join(all_names), 300)
            raise ValueError(f"--classes: {where} has no {name!r}, only {known}")
    if len(names) > layouts.MOST_CLASSES:
        raise ValueError(
            f"{where}: has {len(names)} classes, at most {layouts.MOST_CLASSES}; choose with "
            "--classes"
        )
    return names


def numbered(names: list[str]) -> dict[str, str]:
    """Return {"0": "background", "1": first name, …}."""
    labels = {"0": "background"}
    for number, name in enumerate(names, 1):
        labels[str(number)] = name
    return labels


def read_class_names(folder: Path, args: Namespace, labels: list[Path]) -> dict:
    """Return the labels for dataset.json from --classes, or from a file in the folder.

    Raises ValueError, one line, with the numbers in the label maps, if nothing names the classes.
    """
    if args.classes:
        return parse_classes(args.classes)

    if (folder / "dataset.json").is_file():
        content = read_json(folder / "dataset.json")
        if isinstance(content, dict) and isinstance(content.get("labels"), dict):
            check_labels(content["labels"], folder / "dataset.json")
            return content["labels"]

    if (folder / "classes.json").is_file():
        names = layouts.read_classes(folder / "classes.json")
        return numbered(list(layouts.foreground(names)))

    numbers = set()
    for path in tqdm(labels, desc="numbers of classes", unit="file", disable=None, leave=False):
        with tempfile.TemporaryDirectory() as temporary:
            numbers |= numbers_in(as_nifti(path, Path(temporary)), path)
    numbers = sorted(numbers - {0, 255})
    if not numbers:
        raise ValueError(f"{folder}: its {len(labels)} label maps hold no class, only 0 or 255")

    example = ",".join(f"{number}=NAME" for number in numbers[:4])
    raise ValueError(
        f"{folder}: its {len(labels)} label maps hold the numbers {', '.join(map(str, numbers))}; "
        f"name them with --classes {example}{',…' if len(numbers) > 4 else ''}"
    )


def names_by_number(labels: dict) -> dict[int, list[str]]:
    """Return {number: its names} from the labels of a dataset.json, also of the background.

    labels: {number: name} or {name: number or list of numbers}. Raises ValueError for other values.
    """
    names = {}
    for key, value in labels.items():
        is_named = isinstance(value, str) and not value.isdigit()
        name, number = (value, key) if is_named else (key, value)
        for n in layouts.label_numbers(name, number):
            names.setdefault(n, []).append(name)
    return names


def check_labels(labels: dict, path: Path) -> None:
    """Raise ValueError, one line, if the labels of a dataset.json have no numbers."""
    try:
        names_by_number(labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def numbers_in(path: Path, name: object) -> set[int]:
    """Return the numbers that occur in a NIfTI label map.

    name: the label map's name in messages. Raises ValueError, one line, for negative numbers,
    fractions and several channels.
    """
    voxels, _ = nifti.read_volume(path)  # (C,X,Y,Z)

    rounded = np.rint(voxels)
    is_label_map = len(voxels) == 1 and rounded.min() >= 0 and rounded.max() < 2**16
    if not is_label_map or np.abs(voxels - rounded).max() > 1e-3:
        raise ValueError(
            f"{name}: holds {len(voxels)} channels of {voxels.min():g} to {voxels.max():g}; a "
            "label map has one, of whole class numbers"
        )

    counts = np.bincount(rounded.astype(np.uint16).ravel())
    return {*np.flatnonzero(counts).tolist()}


# --- formats --------------------------------------------------------------------------------------


def kind_of(files: list[Path]) -> str:
    """Return the format of volume files: mha if there is one, else nrrd, else nifti.

    Return "" if there are no files.
    """
    kind = "nifti" if files else ""
    for path in files:
        name = path.name.lower()
        if name.endswith((".mha", ".mhd")):
            return "mha"
        if name.endswith((".nrrd", ".nhdr")):
            kind = "nrrd"
    return kind


def recognise_pairs(kind: str, folder: Path, args: Namespace) -> list[VolumeReading]:
    """Return the reading of a folder of images and label maps whose `kind_of` is `kind`."""
    files = volume_pairs.volume_files(folder)
    if kind_of(files) != kind or has_mask_folders(files):
        return []
    if not args.images:
        refuse_known_layout(folder)

    pairs = volume_pairs.find_pairs(files, folder, args)
    if not pairs and kind != "nifti":
        pairs = unlabelled_pairs(files, folder, args)
    if not pairs:
        return []
    return [reading_of_pairs(kind, folder, args, pairs)]


def has_mask_folders(files: list[Path]) -> bool:
    """Return True for TotalSegmentator's folders: one volume beside a folder segmentations/."""
    volumes_in = Counter(path.parent for path in files)
    for folder in volumes_in:
        if folder.name == "segmentations" and volumes_in[folder.parent] == 1:
            return True
    return False


def refuse_known_layout(folder: Path) -> None:
    """Raise ValueError, one line, for a folder that train.py reads without an import."""
    if not layouts.has_volumes(folder):
        return
    try:
        splits = layouts.read_volumes(folder)
        layouts.check_files_exist(sum(splits.values(), []))
    except (ValueError, OSError):  # only the labels of its dataset.json are useful
        return

    volumes = count(sum(map(len, splits.values())), "volume")
    raise ValueError(
        f"{folder}: train.py reads this folder as it is ({volumes} with labels); check it with "
        f"python prepare.py check {folder}"
    )


def unlabelled_pairs(files: list[Path], folder: Path, args: Namespace) -> list[Pair]:
    """Return the cases of volumes without label maps, [] if some files are label maps."""
    if args.images:
        return []

    pairs = []
    for path in files:
        if volume_pairs.named(path, folder).is_label:
            return []
        pairs.append(Pair(path_name(path, folder), (path,), None))
    return pairs


def path_name(path: Path, folder: Path) -> str:
    """Return the path of a file in a folder without its ending and folders such as images."""
    parts, _ = volume_pairs.folder_parts(path.relative_to(folder).parent)
    return volume_pairs.join_key([*parts, volume_pairs.stem_of(path)])


def reading_of_pairs(kind: str, folder: Path, args: Namespace, pairs: list[Pair]) -> VolumeReading:
    """Return the reading of pairs. Raises ValueError, one line, if the classes have no names."""
    label_files = [pair.label for pair in pairs if pair.label]
    labels, numbers = name_classes(folder, args, label_files)

    cases = []
    for pair in pairs:
        write_image = partial(write_channels, pair.images)
        write_labels = None
        if pair.label:
            write_labels = partial(write_label_map, pair, numbers)
        cases.append(VolumeCase(pair.name, write_image, write_labels, pair.split))

    modality, reason = modality_of(pairs, args)
    kinds = layouts.count_kinds(label_files or files_of(pairs))
    summary = [f"{count_cases(cases)}, {kinds}", *reason]
    return VolumeReading(kind, summary, cases, labels, modality)


def name_classes(
    folder: Path, args: Namespace, label_files: list[Path]
) -> tuple[dict, dict[str, int]]:
    """Return the labels for dataset.json, and {name of a segment: number} for .seg.nrrd files.

    Raises ValueError, one line, if the classes have no names.
    """
    if not label_files:
        return {"0": "background"}, {}

    segmentations = []
    others = []
    for path in label_files:
        if volume_pairs.is_segmentation(path):
            segmentations.append(path)
        else:
            others.append(path)

    if segmentations and others:
        raise ValueError(f"{min(others)}: no .seg.nrrd, unlike {segmentations[0]}; save all alike")
    if not segmentations:
        return read_class_names(folder, args, label_files), {}
    return number_names([segment_names(path) for path in segmentations], args, folder)


def number_names(
    names_of_files: list[list[str]], args: Namespace, folder: Path
) -> tuple[dict, dict[str, int]]:
    """Number the classes of files that name them: the labels for dataset.json, {name: number}.

    The order is that of --classes, or that in which the names first appear.
    """
    names = {}  # keys in the order of their first appearance
    for names_of_file in names_of_files:
        names |= dict.fromkeys(names_of_file)
    chosen = chosen_names(list(names), args, folder)

    numbers = {}
    for number, name in enumerate(chosen, 1):
        numbers[name] = number
    return numbered(chosen), numbers


def files_of(pairs: list[Pair]) -> list[Path]:
    """Return the image files of all pairs."""
    files = []
    for pair in pairs:
        files += pair.images
    return files


def count_cases(cases: list[VolumeCase]) -> str:
    """Return the number of cases in words: "12 volumes with label maps, 3 without"."""
    labelled = sum(case.write_labels is not None for case in cases)
    unlabelled = len(cases) - labelled
    if not labelled:
        return f"{count(unlabelled, 'volume')} without label maps"

    text = f"{count(labelled, 'volume')} with label maps"
    return f"{text}, {unlabelled} without" if unlabelled else text


def segment_names(path: Path) -> list[str]:
    """Return the names of the segments of a .seg.nrrd file."""
    return [segment.name for segment in itk_files.read_segments(path)]


def modality_of(pairs: list[Pair], args: Namespace) -> tuple[str, list[str]]:
    """Return "CT", "MR", the names of channels or "unknown", and a line with the reason."""
    if args.modality:
        return args.modality, []

    pair = pairs[0]
    if pair.channels:
        channels = ", ".join(pair.channels)
        return channels, [f"channels, in this order: {channels}"]

    image = pair.images[0]
    names = [*image.parts[-2:-1], *volume_pairs.words_of(image.name)]
    words = {name.lower() for name in names}
    for modality, known in MODALITY_WORDS.items():
        if words & known:
            return modality, [f"modality: {modality}, as the name of {image.name} says"]

    with tempfile.TemporaryDirectory() as temporary:
        voxels, _ = nifti.read_volume(as_nifti(image, Path(temporary)))
    smallest = f"{image.name} reaches {voxels.min():g}"
    if voxels.min() < AIR:
        return "CT", [f"modality: CT, as {smallest} (--modality sets another one)"]
    return "unknown", [f"modality: unknown, {smallest}; --modality CT or MR sets it"]


# --- writing a case -------------------------------------------------------------------------------


def as_nifti(path: Path, folder: Path) -> Path:
    """Return a NIfTI file itself, or convert another volume to a new file in `folder`."""
    if layouts.is_volume(path):
        return path

    target = folder / f"{volume_pairs.stem_of(path)}.nii"
    itk_files.to_nifti(path, target)
    return target


def write_channels(sources: tuple[Path, ...], target: Path) -> None:
    """Write a volume to .nii.gz. Several sources are its channels."""
    if len(sources) == 1:
        write_volume(sources[0], target)
        return

    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        files = []
        for k, source in enumerate(sources):
            folder = Path(temporary) / str(k)
            folder.mkdir()
            files.append(as_nifti(source, folder))
        voxels, grid = nifti.read_volume(files)  # (C,X,Y,Z)

    if (voxels == np.rint(voxels)).all() and np.abs(voxels).max() < 2**15:
        voxels = voxels.astype(np.int16)
    nifti.write(target, np.moveaxis(voxels, 0, 3), grid)


def write_volume(source: Path, target: Path) -> None:
    """Write a volume to .nii.gz. A compressed NIfTI file is copied byte for byte."""
    if not layouts.is_volume(source):
        itk_files.to_nifti(source, target)
        return

    nifti.check_whole(source)
    with open(source, "rb") as file:
        if file.read(len(nifti.GZIP)) == nifti.GZIP:
            shutil.copyfile(source, target)
            return

        file.seek(0)
        with open(target, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed:
            shutil.copyfileobj(file, compressed)


def write_label_map(pair: Pair, numbers: dict[str, int], target: Path, image: Path) -> None:
    """Write the label map of a pair on the grid of its image, a file written before.

    numbers: name of a segment -> number, for .seg.nrrd files. Raises ValueError, one line, if the
    grids differ.
    """
    if volume_pairs.is_segmentation(pair.label):
        itk_files.write_segments(pair.label, target, image, numbers)
        return

    source = pair.images[0]
    if layouts.is_volume(pair.label) and layouts.is_volume(source):
        nifti.check_grid(nifti.read_grid(pair.label), nifti.read_grid(source))
    write_volume(pair.label, target)


# --- writing a data set ---------------------------------------------------------------------------


class VolumeWriter:
    """Writes the cases of a reading in the layout of volume_sets.py."""

    def __init__(self, reading: VolumeReading, cases: list[VolumeCase]):
        self.reading = reading
        names = names_by_number(reading.labels)
        self.numbers = sorted({0, *names})
        self.classes = {}  # number -> name, without the background
        for number in self.numbers[1:]:
            self.classes[number] = ", ".join(names[number])
        self.case_of = {}  # image in the data set -> its case
        self.splits = {split: [] for split in volume_sets.LISTS}
        self.volumes = Counter()  # number -> label maps that contain it

        for case in cases:
            folder = "Ts" if case.split == "test" else "Tr"
            image = f"images{folder}/{case.name}.nii.gz"
            label = f"labels{folder}/{case.name}.nii.gz" if case.write_labels else None
            self.case_of[image] = case
            self.splits[case.split].append((image, label))

    def put(self, part: Path, image: str, label: str | None) -> None:
        """Write the files of a case. Raises ValueError for numbers without a name."""
        case = self.case_of[image]
        case.write_image(part / image)
        if label is None:
            return

        case.write_labels(part / label, part / image)
        numbers = numbers_in(part / label, case.name)
        unnamed = sorted(numbers - {*self.numbers, 255})
        if unnamed:
            raise ValueError(
                f"{case.name}: its label map holds {unnamed[0]}, but the classes are "
                f"{json.dumps(self.reading.labels, ensure_ascii=False)}; name it with --classes"
            )
        self.volumes.update(numbers)

    def finish(self, part: Path) -> list[str]:
        """Draw overview.png, and return the last lines of README.txt."""
        images = list(self.case_of)
        order = np.random.default_rng(0).permutation(len(images))[:MOST_PICTURES]
        chosen = [images[i] for i in sorted(order)]

        cards = []
        for image in tqdm(chosen, desc="overview.png", unit="volume", disable=None, leave=False):
            cards.append(self.draw(part, image))

        names = tuple(layouts.shorten(name, 60) for name in self.classes.values())
        if 1 < len(names) <= MOST_LEGEND:
            cards.append(pictures.legend(names, CARD))
        pictures.save_picture(part / "overview.png", pictures.sheet(cards, columns=2))
        return self.describe_classes()

    def describe_classes(self) -> list[str]:
        """Return a line about the classes that no label map contains, [] if there are none."""
        absent = [name for number, name in self.classes.items() if not self.volumes[number]]
        return [f"no label map holds: {', '.join(absent)}"] if absent else []

    def draw(self, part: Path, image: str) -> Image.Image:
        """Draw three planes of a volume through its labels, with its name as the caption."""
        voxels, grid = nifti.read_volume(part / image)  # (C,X,Y,Z)

        slices = []
        spacing = []
        for side, size in zip(grid.size, grid.spacing, strict=True):
            step = -(-side // SIDE)  # rounded up
            slices.append(slice(None, None, step))
            spacing.append(size * step)
        thinned = tuple(slices)
        grey = grey_levels(voxels[0][thinned], self.reading.modality)

        masks = np.zeros((max(1, len(self.classes)), *grey.shape), bool)  # (K,X,Y,Z)
        if self.case_of[image].write_labels:
            label = part / image.replace("images", "labels", 1)
            indices = nifti.read_labels(label, grid, self.numbers)[thinned]  # (X,Y,Z)
            for k in range(len(self.classes)):
                masks[k] = indices == k + 1

        picture = pictures.volume_thumbnail(grey, None, masks, spacing)
        return pictures.captioned(picture, self.case_of[image].name, CARD)


def grey_levels(voxels: np.ndarray, modality: str) -> np.ndarray:
    """Scale voxels to grey levels, uint8: the soft tissue window of CT, else percentiles."""
    low, high = SOFT_TISSUE
    if "CT" not in modality.upper():
        low, high = np.percentile(voxels, (0.25, 99.75))
    scale = 255 / max(high - low, 1e-12)
    return ((voxels - low) * scale).clip(0, 255).astype(np.uint8)


def write_volumes(reading: VolumeReading, cases: list[VolumeCase], args: Namespace) -> None:
    """Write the cases of a reading to args.out atomically, and print a summary.

    cases: those of the reading. Each has a split and a name that is valid as a file name.
    """
    writer = VolumeWriter(reading, cases)
    modality = {}
    for k, name in enumerate(reading.modality.split(", ")):
        modality[str(k)] = name
    about = {
        "name": args.out.name,
        "description": reading.summary[0],
        "tensorImageSize": "3D",
        "modality": modality,
        "labels": reading.labels,
    }

    title = [f"Read as {reading.format}: {reading.summary[0]}", *reading.summary[1:]]
    groups = {case.group for case in cases} - {""}
    if groups:
        title.append(f"patients: {len(groups)}")
    elif not any(case.split for case in reading.cases):
        title.append("split by volume; --groups FILE keeps the volumes of a patient together")
    volume_sets.write_data_set(args.out, about, writer.splits, writer.put, title, writer.finish)


FORMATS = (
    Format(
        "nifti",
        "NIfTI volumes and label maps, in folders side by side or with names such as x_seg.nii.gz",
        partial(recognise_pairs, "nifti"),
    ),
    Format(
        "nrrd",
        "NRRD volumes and label maps, also .seg.nrrd of 3D Slicer",
        partial(recognise_pairs, "nrrd"),
    ),
    Format("mha", "MetaImage volumes and label maps", partial(recognise_pairs, "mha")),
)
