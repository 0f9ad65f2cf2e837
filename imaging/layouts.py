"""Recognise the layout of a data set from the contents of its folder, and list its entries.

Prompted layout (that of medvlsm, github.com/naamiinepal/medvlsm): `images/`, `masks/` and
`anns/SPLIT.json`, each a list of entries

    {"img_name": "a.jpg", "mask_name": "a.png", "prompts": {"p1": "polyp", "p7": ["…", "…"]}}

An entry may have a `"label": k` if its mask is a class map and only `mask == k` is the target, and
a `"group"`, the patient, as text or number. Every annotation file is a split of its name: a further
file `anns/testA.json` is the split testA.

Class maps: `classes.json` is {"0": "background", "1": "stomach", …}. The pixels of the masks are
these class indices, and 255 is ignored. An image and its mask have the same stem. They are stored
in `{train,val,test}/{images,masks}/`, or in `images/` and `masks/` with `anns/` as above, or in
`images/` and `masks/` alone. The last form is split at random, always in the same way: a tenth of
the images (of the patients, with --group-regex) is the test split and another tenth the validation
split. Without classes.json the masks are binary.

Volumes (NIfTI): `dataset.json` in the form of the Medical Segmentation Decathlon lists `training`,
`test` and optionally `validation` cases; cases without a label are skipped. In nnU-Net's form it
has no lists: imagesTr/ holds the channels of a case as CASE_0000.nii.gz, CASE_0001.nii.gz, …, and
labelsTr/ its label map CASE.nii.gz (imagesTs/ and labelsTs/ are the test split). Its `labels` may
map names to numbers or numbers to names. Folders `img/` and `label/` without dataset.json are BTCV
as it is downloaded; all of its cases are for training.

Regions: as in nnU-Net, classes overlap if one of them lists more than one number. A list of one
number counts as that number. Unlike in nnU-Net, the background does not decide this: numbers listed
with it are read as 0. `"overlapping": true` makes every class a region.

File names in these JSON files are relative and stay below their folder (`check_name`). Symbolic
links on the disk are followed. Names that differ only in their Unicode form are the same file
(macOS stores ä as two characters).
"""

import json
import os
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from imaging.files import describe_foreign, read_json


def image_endings() -> frozenset[str]:
    """Return the lower-case endings of all image files that Pillow reads.

    Formats of films, layers or icons of several sizes are left out, and so are those that need
    another program.
    """
    excluded = {"BUFR", "CUR", "EPS", "FLI", "GRIB", "HDF5", "ICNS", "ICO", "MPEG", "PSD", "WMF"}
    endings = Image.registered_extensions()
    formats = {*Image.OPEN, "MPO"} - excluded  # Pillow opens MPO as JPEG
    return frozenset(ending for ending, name in endings.items() if name in formats)


ENDINGS = image_endings()
COMMON_ENDINGS = ".png, .jpg, .tif, .bmp, .pgm and others that Pillow reads"  # for messages
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # Windows puts them into folders
NIFTI = (".nii.gz", ".nii")
MOST_CLASSES = 254  # besides the background: a mask has 8 bits, and 255 is ignored
IMAGE_FOLDERS = ("images", "imagesgreyscale")
MASK_FOLDERS = ("masks", "masks14")
BTCV_CLASSES = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
    "right adrenal gland", "left adrenal gland",
)  # fmt: skip
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Folder of masks or label maps -> folder next to it that holds their images.
LABEL_FOLDERS = {
    "masks": "images",
    "masks14": "imagesgreyscale",
    "labelsTr": "imagesTr",
    "labelsTs": "imagesTs",
    "label": "img",
}

# --- classes and prompt types ---------------------------------------------------------------------


def foreground(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes that are scored: all but the background, which is first if K > 1."""
    return classes[1:] if len(classes) > 1 else classes


def plain_name(name: str) -> str:
    """Return a class name in the Universal Model's spelling: lower case, spaces for underscores."""
    return name.lower().replace("_", " ")


def same_name_different_index(classes: tuple[str, ...], other_classes: tuple[str, ...]) -> bool:
    """Return True if a class is also among the other classes, but with a different index."""
    indices = {}
    for k, name in enumerate(other_classes):
        indices[plain_name(name)] = k
    return any(indices.get(plain_name(name), k) != k for k, name in enumerate(classes))


# p0, p1, … are the types of the medvlsm study. Names that start with m_ are those of others, such
# as MedCLIPSeg's m_original.
NAMED_TYPE = r"m_[a-z_]+"
PROMPT_TYPE = rf"(?:p\d+|{NAMED_TYPE})"


def is_named_type(text: str) -> bool:
    """Return True for one prompt type with a name instead of a number, such as m_original."""
    return re.fullmatch(NAMED_TYPE, text) is not None


def is_prompt_type(text: str) -> bool:
    """Return True if a prompt option names types instead of being a text.

    Such options are p6, "p6,p3", m_original, "m_original,p6" and random.
    """
    return re.fullmatch(rf"random|{PROMPT_TYPE}(,{PROMPT_TYPE})*", text) is not None


def prompt_option(text: str) -> str:
    """Return a prompt option in canonical form: "P6, p1" becomes "p6,p1"; texts are unchanged.

    Raises ValueError for a text that seems to list prompt types in another way, such as "p6 p1": as
    a prompt it would mean nothing.
    """
    pieces = [piece.strip().lower() for piece in text.split(",")]
    canonical = ",".join(piece for piece in pieces if piece)
    if is_prompt_type(canonical):
        return canonical

    kind = rf"(p\s*\d+|{NAMED_TYPE}|random)"
    gap = r"[\s,;|/+&]+"
    if re.fullmatch(f"{kind}({gap}{kind})*", canonical):
        raise ValueError(f"--prompt {text!r}: write prompt types like p6 or p6,p1, or random alone")
    return text


# --- file names -----------------------------------------------------------------------------------


def describe_unsupported(path: Path) -> str | None:
    """Return a message about a file whose format is known but not supported, else None."""
    if path.is_dir():
        return None
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(132)
    return describe_foreign(path, start)


def is_unicode(name: str) -> bool:
    """Return False for a name with lone surrogates, which no text file can hold."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def composed(name: str) -> str:
    """Return a name in Unicode form NFC, so that names that look the same are equal."""
    return unicodedata.normalize("NFC", name)


def find_file(folder: Path, name: str) -> Path:
    """Return `folder/NAME`, or the one file that differs from it only in its Unicode form."""
    exact = folder / name
    if exact.exists() or name.isascii():
        return exact

    path = folder
    for part in PurePosixPath(name).parts:
        if not (path / part).exists() and path.is_dir():
            alike = [other for other in os.listdir(path) if composed(other) == composed(part)]
            if len(alike) == 1:
                part = alike[0]
        path = path / part
    return path


def missing_file(path: Path) -> str:
    """Return a path that is not a file, with what is known about it: "a.jpg (a.png is there)"."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return f"{path} (a link to {os.readlink(path)}, which does not exist)"
    if path.exists():
        return f"{path} (is not a file, but a folder, a pipe or a device)"
    if not path.parent.is_dir():
        return str(path)

    stem = composed(path.stem).lower()
    for other in sorted(os.listdir(path.parent)):
        other_stem = composed(os.path.splitext(other)[0]).lower()
        if other_stem == stem and not other.startswith("."):
            return f"{path} ({other} is there)"
    return str(path)


INSTEAD_OF_LIST = {  # key of a JSON file -> what to do where it lists several files
    "mask_name": "save the union of several masks (the larger value of each pixel) as one file",
    "image": "save the channels of a volume as one 4-D file",
}


def check_name(name: str, key: str) -> str:
    """Return the file name stored under `key` of a JSON file, after checking it.

    Raises ValueError if the name is absolute or leaves its folder with `..`, in POSIX or in Windows
    notation on every system (data sets travel), if it is empty, or if no file can have it. Raises
    TypeError if it is not a string.
    """
    if isinstance(name, list):
        hint = INSTEAD_OF_LIST.get(key, "name one")
        raise ValueError(f"{key} lists {len(name)} files, but an entry has one; {hint}")
    if not isinstance(name, str):
        raise TypeError(f"{key} {name!r} is not a string")
    is_line = name.splitlines() == [name]
    if not name.strip() or not is_line or "\0" in name or not is_unicode(name):
        raise ValueError(f"{key} {name!r} is not the name of a file")

    windows = PureWindowsPath(name)  # understands / and \
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        raise ValueError(f"{key} {name!r} is an absolute path; write it relative to its folder")

    depth = 0
    for part in windows.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise ValueError(f"{key} {name!r} leaves its folder with ..; keep the file below it")
    return name


def name_in_images(image: Path, root: Path) -> str:
    """Return the path of an image within the images folder of its data set, in POSIX notation."""
    parts = image.parts[-1:]
    if image.is_relative_to(root):
        parts = image.relative_to(root).parts
    for k, part in enumerate(parts[:-1]):
        if part in IMAGE_FOLDERS:
            return "/".join(parts[k + 1 :])
    return "/".join(parts)


# --- entries --------------------------------------------------------------------------------------


def draw(values: list[str], rng: np.random.Generator | None) -> str:
    """Return one of the values at random, or the first one without `rng`."""
    if rng is None:
        return values[0]
    return values[rng.integers(len(values))]


@dataclass(frozen=True)
class Entry:
    """One image (or volume) with its mask and, if the mask is binary, the prompts for it."""

    name: str  # path of the mask in masks/ without its ending (plus -LABEL); unique in a split
    image: Path
    mask: Path
    prompts: dict[str, list[str]]  # prompt type -> texts
    root: Path  # folder of the data set
    label: int | None = None  # set: the mask is a class map and this class index is the target
    group: str | None = None  # patient
    classes: tuple[str, ...] = ("target",)  # one foreground class, or the background and others
    has_class_indices: bool = False  # the mask holds indices of `classes`
    more_channels: tuple[Path, ...] = ()  # volume: files of the further channels
    labels: tuple[int, ...] | None = None  # volume: numbers in the label map, in order, and
    background_numbers: tuple[int, ...] = ()  # further numbers that are read as background
    regions: tuple[tuple[int, ...], ...] | None = None  # class that may overlap -> its `labels`
    modality: str | None = None  # volume: from dataset.json
    mask_orientation: str | None = None  # image: value of --mask-orientation

    def types(self, kind: str) -> list[str]:
        """Return the prompt types of an option: those it lists.

        For `random` these are all but the empty p0 and named types.
        """
        if kind == "random":
            return [name for name in self.prompts if name != "p0" and not is_named_type(name)]
        return kind.split(",")

    def texts(self, kind: str) -> list[str]:
        """Return every text that `text` can return."""
        if not is_prompt_type(kind):
            return [kind]

        texts = []
        for name in self.types(kind):
            texts += self.prompts.get(name, [])
        return texts

    def text(self, kind: str, rng: np.random.Generator | None = None) -> str:
        """Return a text of one of the prompt types `kind`, or `kind` itself if it is a text.

        `rng` draws the type and then the text; without it the first of each is returned. Raises
        ValueError if the entry has no prompt of the type.
        """
        if not is_prompt_type(kind):
            return kind

        types = self.types(kind)
        chosen = draw(types, rng) if types else kind
        texts = self.prompts.get(chosen)
        if not texts:
            available = ", ".join(self.prompts) or "none"
            raise ValueError(
                f"{self.root.name}, {self.name}: no prompt of type {chosen}, only {available}; "
                "choose another --prompt"
            )
        return draw(texts, rng)


# --- files of a folder ----------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    """Return True if a file has the ending of an image."""
    return path.suffix.lower() in ENDINGS


def is_volume(path: Path) -> bool:
    """Return True if a file has the ending of a NIfTI volume, in lower or upper case."""
    return path.name.lower().endswith(NIFTI)


def is_kind(path: Path, noun: str) -> bool:
    """Return True for an image or a volume by its name. noun: "image" or "volume"."""
    return is_image(path) if noun == "image" else is_volume(path)


def is_hidden(path: Path) -> bool:
    """Return True for a hidden file (macOS writes ._a.png) and for the system files of Windows."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted, without hidden ones.

    Raises ValueError if a name is not Unicode, because it could not be printed or written.
    """
    images = []
    for path in sorted(folder.iterdir()):
        if is_image(path) and not is_hidden(path) and not path.is_dir():
            if not is_unicode(path.name):
                name = os.fsencode(path.name)
                raise ValueError(f"{folder}: the file name {name!r} is not Unicode; rename it")
            images.append(path)
    return images


def volumes_in(folder: Path) -> list[Path]:
    """Return the NIfTI files of a folder, sorted, without hidden ones; [] without the folder."""
    if not folder.is_dir():
        return []
    files = sorted(folder.iterdir())
    return [file for file in files if is_volume(file) and not file.name.startswith(".")]


def other_files(folder: Path) -> list[Path]:
    """Return the files and folders in a folder that are not images, sorted, without hidden ones."""
    files = []
    for path in sorted(folder.iterdir()):
        if (not is_image(path) or path.is_dir()) and not is_hidden(path):
            files.append(path)
    return files


def kind_of_file(path: Path) -> str:
    """Return the ending of a file in lower case, or in words why there is none."""
    if path.is_dir():
        return "folder"
    if path.exists() and not path.is_file():
        return "pipe or device"
    if path.name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    return path.suffix.lower() or "without an ending"


def count_kinds(paths: list[Path]) -> str:
    """Return the number of files of each kind, most frequent first: "6 .dcm, 1 .txt, 1 folder"."""
    counts = Counter(map(kind_of_file, paths))
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def nothing_usable(folder: Path, noun: str, files: list[Path]) -> str:
    """Return the message about a folder without any file of a kind: its content and what to do.

    noun: "image" or "volume". files: those that it does hold.
    """
    endings = {"image": COMMON_ENDINGS, "volume": ", ".join(NIFTI)}[noun]
    if not files:
        return f"{folder}: no {noun}s in this folder; they end in {endings}"

    content = count_kinds(files)
    for path in files:
        foreign = describe_unsupported(path)
        if foreign:
            return f"{foreign} ({folder}: only {content})"

    hint = f"{noun}s end in {endings}"
    if noun == "image" and is_volume(files[0]):
        hint = "volumes need a model of volumes, and a data set of them a dataset.json"
    return f"{folder}: no {noun}s in this folder, only {content}; {hint}"


def print_skipped(folder: Path, noun: str, files: list[Path]) -> None:
    """Print how many files of a folder are skipped because they are not images (or volumes)."""
    if files:
        print(f"{folder}: skipped files that are not {noun}s: {count_kinds(files)}")


def files_below(folder: Path, without: Path | None = None, with_masks: bool = False) -> list[Path]:
    """Return the files of a folder and of its sub-folders, sorted.

    Hidden files and folders are skipped, and so is the folder `without`. Folders of masks next to
    those of their images (LABEL_FOLDERS) are skipped with a message, unless `with_masks`. Links to
    folders are followed, but never into a folder that is being listed. Raises OSError if a folder
    cannot be read.
    """

    def fail(error: OSError):
        raise error

    files = []
    excluded = without and without.resolve()
    for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        parent = Path(parent)
        ancestors = [path for path in parent.parents if path.is_relative_to(folder)]
        open_folders = {path.resolve() for path in [parent, *ancestors]}

        entered = []
        for name in subfolders:
            target = (parent / name).resolve()
            if name.startswith(".") or target == excluded or target in open_folders:
                continue
            if LABEL_FOLDERS.get(name) in subfolders and not with_masks:
                print(f"{parent / name}: skipped, it holds the masks of {LABEL_FOLDERS[name]}/")
                continue
            entered.append(name)
        subfolders[:] = entered  # os.walk enters these

        paths = [parent / name for name in names]
        files += [path for path in paths if not is_hidden(path)]
    return sorted(files)


def list_files(folder: Path, noun: str, without: Path | None = None) -> list[Path]:
    """Return the images or volumes of `files_below`; print how many other files are skipped.

    noun: "image" or "volume". Raises ValueError if there is none.
    """
    usable = []
    skipped = []
    for file in files_below(folder, without):
        # A broken link is kept as well: the error of reading it says what is wrong.
        is_special = file.exists() and not file.is_file()
        if is_kind(file, noun) and not is_special:
            usable.append(file)
        else:
            skipped.append(file)

    if not usable:
        raise ValueError(nothing_usable(folder, noun, skipped))
    print_skipped(folder, noun, skipped)
    return usable


# --- annotation files -----------------------------------------------------------------------------


def json_type(value) -> str:
    """Return the type of a JSON value, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def read_annotations(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """Return the entries of `root/anns/SPLIT.json`, even if their files do not exist.

    Entries that are repeated exactly are listed once, with a message. Raises FileNotFoundError if
    the annotation file is missing, ValueError if it is not such a list or if two entries have the
    same name.
    """
    root = Path(root).resolve()
    path = root / "anns" / f"{split}.json"
    if split not in find_splits(root) or not path.is_file():
        available = ", ".join(find_splits(root)) or "none"
        raise FileNotFoundError(f"{path}: no such annotation file; splits here: {available}")
    items = read_json(path)
    if not isinstance(items, list):
        raise ValueError(
            f"{path}: holds {json_type(items)}; expected a list of objects with img_name, "
            "mask_name, prompts"
        )

    entries = {}
    for number, item in enumerate(items):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict):
            raise ValueError(
                f"{where}: is {json_type(item)}; expected an object with img_name, mask_name, "
                "prompts"
            )
        try:
            entry = _parse_entry(root, split, item, group_regex)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

        first = entries.setdefault(entry.name, entry)
        if first != entry:
            raise ValueError(
                f"{where}: a second mask named {entry.name}; rename it, or join the prompts in a "
                "list"
            )

    if len(items) > len(entries):
        print(f"{path}: skipped {len(items) - len(entries)} repeated entries")
    return list(entries.values())


def _parse_entry(root: Path, split: str, item: dict, group_regex: str | None) -> Entry:
    """Return the entry of an object in an annotation file. Raises TypeError or ValueError."""
    for key in ("img_name", "mask_name", "prompts"):
        if key not in item:
            raise ValueError(f"has no {key}; expected an object with img_name, mask_name, prompts")
    image = check_name(item["img_name"], "img_name")
    mask = check_name(item["mask_name"], "mask_name")
    label = item.get("label")
    if label is not None and not (type(label) is int and 0 <= label < 255):
        raise TypeError(f"label {label!r} of {mask} is not a whole number from 0 to 254")

    name = entry_name(mask, label)
    image_file = _find_in_split(root, "images", image, split)
    mask_file = _find_in_split(root, "masks", mask, split)
    prompts = _parse_prompts(item["prompts"])

    group = item.get("group") if group_regex is None else match_group(image, group_regex)
    if group is not None:
        if type(group) not in (str, int):
            raise TypeError(f"group {group!r} of {mask} is neither a text nor a whole number")
        group = str(group)
    return Entry(name, image_file, mask_file, prompts, root, label, group)


def entry_name(mask: str, label: int | None) -> str:
    """Return the name of an entry, from `mask_name` and `label` in its annotation file."""
    name = os.path.splitext(mask)[0]
    return name if label is None else f"{name}-{label}"


def _find_in_split(root: Path, folder: str, name: str, split: str) -> Path:
    """Return `root/FOLDER/NAME` or `root/FOLDER/SPLIT/NAME`; the first one if neither exists.

    CAMUS keeps its validation files in the folder of the training split.
    """
    subfolders = ["", split]
    if split == "val":
        subfolders.append("train")

    paths = [find_file(root / folder / subfolder, name) for subfolder in subfolders]
    for path in paths:
        if path.is_file():
            return path
    return paths[0]


def match_group(image: str, group_regex: str | None) -> str | None:
    """Return the patient that --group-regex finds in the name of an image; None without a regex.

    This is its first group, or the whole match if it has none.
    """
    if not group_regex:
        return None
    try:
        match = re.search(group_regex, image)
    except re.error as error:
        raise ValueError(f"--group-regex {group_regex}: {error}") from None
    group = match and (match[1] if match.re.groups else match[0])
    if not group:
        raise ValueError(f"--group-regex {group_regex} finds nothing in {image}")
    return group


def _parse_prompts(prompts: dict) -> dict[str, list[str]]:
    """Return prompt type -> texts. Raises TypeError if they are not strings or lists of strings."""
    if not isinstance(prompts, dict):
        raise TypeError(f"prompts are {json_type(prompts)} instead of an object with p0, p1, …")

    parsed = {}
    for kind, value in prompts.items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list):
            raise TypeError(f"prompt {kind} is {json_type(value)}, not a text or a list of texts")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"prompt {kind} lists {json_type(text)} instead of texts")
        parsed[kind] = texts
    return parsed


# --- folders of images and masks ------------------------------------------------------------------


class Unpaired(ValueError):
    """Images without a mask, or masks without an image."""


class EmptySplit(ValueError):
    """A split has no entries."""


def read_pairs(root: Path, folder: Path, group_regex: str | None = None) -> list[Entry]:
    """Return the images and masks of the same stem in the two folders of `folder`.

    Files that are not images are skipped, with a message. Raises Unpaired for an image without a
    mask or a mask without an image, ValueError for a folder that holds only other files.
    """
    image_folder = _first_folder(folder, IMAGE_FOLDERS)
    mask_folder = _first_folder(folder, MASK_FOLDERS)
    images = images_by_stem(image_folder)
    masks = images_by_stem(mask_folder)

    unpaired = sorted(images.keys() ^ masks.keys())
    if unpaired:
        stem = unpaired[0]
        path = images.get(stem) or masks[stem]
        raise Unpaired(_unpaired_message(path, len(unpaired), [image_folder, mask_folder]))
    print_skipped(image_folder, "image", other_files(image_folder))
    print_skipped(mask_folder, "image", other_files(mask_folder))

    entries = []
    for stem, image in images.items():
        group = match_group(image.name, group_regex)
        entries.append(Entry(masks[stem].stem, image, masks[stem], {}, root, group=group))
    return entries


def _unpaired_message(path: Path, count: int, folders: list[Path]) -> str:
    """Return the message about `count` unpaired files, of which `path` is the first.

    It mentions a file of the same stem in the two folders that is not read as an image.
    """
    message = f"{path}: no image or mask of the same name ({count} such files)"
    for folder in folders:
        for other in other_files(folder):
            if composed(other.stem) == composed(path.stem):
                return (
                    describe_unsupported(other) or f"{message}; {other.name} is not an image file"
                )
    return message


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return {composed name without ending: image file} of a folder.

    Raises ValueError if two files have the same stem, or if the folder holds only other files.
    """
    by_stem = {}
    for path in images_in(folder):
        first = by_stem.setdefault(composed(path.stem), path)
        if first != path:
            raise ValueError(
                f"{path}: a second file of this name, with another ending than {first.name}; "
                "remove or rename one"
            )

    skipped = other_files(folder)
    if skipped and not by_stem:
        raise ValueError(nothing_usable(folder, "image", skipped))
    return by_stem


def list_all_images(root: Path, folder: Path | None = None) -> list[Entry]:
    """Return an entry for each image below images/, with or without a mask.

    root: the data set. folder: the folder of one of its splits, or None for the data set itself.
    An entry without a mask names a mask file that does not exist. Raises ValueError if there is no
    image.
    """
    root = Path(root).resolve()
    folder = root if folder is None else folder.resolve()
    images = _first_folder(folder, IMAGE_FOLDERS)
    masks = _first_folder(folder, MASK_FOLDERS)

    mask_of = {}
    if masks.is_dir():
        for file in files_below(masks):
            if is_image(file):
                name = file.relative_to(masks).with_suffix("").as_posix()
                mask_of[composed(name)] = file

    entries = []
    for file in list_files(images, "image"):
        name = file.relative_to(images).with_suffix("").as_posix()
        mask = mask_of.get(composed(name), masks / f"{name}.png")
        entries.append(Entry(name, file, mask, {}, root))
    return with_classes(root, entries)


def _first_folder(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of these sub-folders that exists, else the first one."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    return folder / names[0]


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split that holds images/, with or without masks/.

    None if there is none, as in data sets of volumes and those with annotation files.
    """
    root = Path(root)
    if has_volumes(root) or (root / "anns").is_dir():
        return None
    for name, split_name in SPLITS.items():
        if split_name == split and _first_folder(root / name, IMAGE_FOLDERS).is_dir():
            return root / name
    return None


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the class names in classes.json, by index; of a single class its name alone.

    Raises ValueError if the file does not name the indices 0, 1, … without a gap, or too many.
    """
    content = read_json(path)
    expected = '{"0": "background", "1": "stomach", …}, numbers without a gap, names once'
    try:
        by_number = {int(number): name for number, name in content.items()}
        names = [by_number[k] for k in range(max(len(by_number), 2))]  # KeyError: a gap
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{path}: expected {expected}") from None
    if len({*map(str, names)}) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected {expected}")
    if len(names) > 1 + MOST_CLASSES:
        raise ValueError(
            f"{path}: names {len(names)} classes, but masks hold {1 + MOST_CLASSES}, numbers 0 to "
            f"{MOST_CLASSES}"
        )
    return tuple(names) if len(names) > 2 else (names[1],)


def with_classes(root: Path, entries: list[Entry]) -> list[Entry]:
    """Return the entries with the classes of classes.json, if the data set has this file."""
    if not (root / "classes.json").is_file():
        return entries

    classes = read_classes(root / "classes.json")
    named = []
    for entry in entries:
        if entry.label is None:
            entry = replace(entry, classes=classes, has_class_indices=True)
        named.append(entry)
    return named


# --- volumes: dataset.json ------------------------------------------------------------------------


def without_ending(path: Path) -> str:
    """Return the name of a volume: its file name without .nii, .nii.gz, or .hdr and .img."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def channels_of(files: list[Path]) -> dict[str, list[Path]]:
    """Return {case: its files}; nnU-Net ends the files of channels in _0000, _0001, …

    Numbers that do not count up from 0000 without a gap, such as the years 2018 to 2021, are part
    of the name, so that each file is a case of its own. Raises ValueError if two cases have the
    same name.
    """
    numbered = {}  # case -> [(channel, file)]
    for file in files:
        match = re.fullmatch(r"(.*)_([0-9]{4})", without_ending(file))
        if match:
            numbered.setdefault(match[1], []).append((int(match[2]), file))

    case_of = {}  # file of a channel -> case
    for case, channels in numbered.items():
        numbers = sorted(number for number, _ in channels)
        if numbers == list(range(len(numbers))):
            case_of |= {file: case for _, file in channels}

    cases = {}
    for file in files:
        case = case_of.get(file, without_ending(file))
        cases.setdefault(case, []).append(file)
    for case, case_files in cases.items():
        are_channels = all(file in case_of for file in case_files)
        if len(case_files) > 1 and not are_channels:
            raise ValueError(f"{case_files[1]}: a second volume named {case}; rename or move one")
        case_files.sort(key=without_ending)
    return cases


def shorten(text: str, most: int = 40) -> str:
    """Return a text, cut after `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def label_numbers(name: str, value) -> tuple[int, ...]:
    """Return the numbers of a label in dataset.json, an integer or a list of integers.

    Raises ValueError if one is not a whole number from 0 to 65535, such as 1.5, true or "1.5",
    which int() would all convert to 1.
    """
    numbers = []
    for number in value if isinstance(value, list) else [value]:
        is_whole = type(number) is int or (isinstance(number, float) and number.is_integer())
        is_digits = isinstance(number, str) and re.fullmatch(r"-?[0-9]{1,9}", number)
        if not is_whole and not is_digits:
            shown = shorten(json.dumps(number))
            raise ValueError(f"label {name} is {shown}; it must be a whole number")
        if not 0 <= int(number) <= 65535:
            shown = shorten(str(number))
            raise ValueError(f"label {name} is {shown}; numbers go from 0 to 65535")
        numbers.append(int(number))
    return tuple(numbers)


def _check_label_names(labels: dict) -> None:
    """Raise ValueError unless `labels` of dataset.json is an object with one-line names."""
    if not isinstance(labels, dict):
        raise ValueError('labels must be an object, {"0": "background", "1": "liver"}')
    for text in (*labels, *labels.values()):
        if isinstance(text, str) and text.splitlines() != [text]:
            raise ValueError(f"the label {text!r} is not a name")


def _numbers_by_name(labels: dict) -> dict[str, tuple[int, ...]]:
    """Return class name -> its numbers from `labels` of dataset.json, in either direction.

    {"1": "liver"} and {"liver": 1} are the same. Raises ValueError if they are not labels.
    """
    _check_label_names(labels)
    if len({str(value) for value in labels.values()}) < len(labels):
        raise ValueError("two labels have one name, or one number")

    keys_are_numbers = all(
        isinstance(value, str) and re.fullmatch(r"\d+", key) for key, value in labels.items()
    )
    if keys_are_numbers:
        labels = {name: int(number) for number, name in labels.items()}

    numbers = {name: label_numbers(name, value) for name, value in labels.items()}
    if "ignore" in numbers:
        raise ValueError("a label named ignore is not supported; write 255, which is ignored")
    return numbers


def _parse_labels(labels: dict, overlapping: bool = False) -> dict:
    """Return the fields classes, labels, background_numbers and regions of Entry from dataset.json.

    overlapping: every class is a region, even if each has a single number. Raises ValueError if
    these are not labels.
    """
    if not isinstance(overlapping, bool):
        raise ValueError("overlapping must be true or false")
    numbers = _numbers_by_name(labels)

    backgrounds = [name for name, listed in numbers.items() if 0 in listed]
    if len(backgrounds) != 1:
        raise ValueError("labels need one background, of number 0")
    background = backgrounds[0]
    background_numbers = tuple(number for number in numbers.pop(background) if number)
    if not numbers:
        raise ValueError("labels name no class besides the background")

    # The numbers that the background lists do not make the other classes overlap.
    has_regions = overlapping or any(len({*listed}) > 1 for listed in numbers.values())
    names = list(numbers)  # regions stay in the order of the file
    if not has_regions:
        names.sort(key=numbers.get)

    all_numbers = tuple(sorted({0}.union(*numbers.values())))
    in_both = {*background_numbers} & {*all_numbers}
    if in_both:
        raise ValueError(f"label {min(in_both)} belongs to the background and to a class")
    if not all(numbers.values()):
        raise ValueError("a label lists no number")
    if not has_regions and len(all_numbers) - 1 < len(numbers):
        raise ValueError("two labels have one number")

    regions = None
    if has_regions:
        regions = tuple(_indices_of(numbers[name], all_numbers) for name in names)
    classes = (background, *names)
    if len(classes) == 2 and not has_regions:
        classes = classes[1:]
    return {
        "classes": classes,
        "labels": all_numbers,
        "background_numbers": background_numbers,
        "regions": regions,
    }


def _indices_of(numbers: tuple[int, ...], all_numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the positions of some numbers among all numbers."""
    return tuple(all_numbers.index(number) for number in numbers)


def as_regions(entry: Entry) -> Entry:
    """Return the entry of a volume with every class as a region: (background, one, …).

    The names are plain (`plain_name`), so that the classes of several data sets can be compared.
    """
    names = map(plain_name, foreground(entry.classes))
    regions = entry.regions or tuple((k,) for k in range(1, len(entry.labels)))
    return replace(entry, classes=("background", *names), regions=regions)


def as_overlapping(entry: Entry, names: list[str]) -> Entry:
    """Return the entry of a volume with regions instead of classes, for old runs with regions.

    In older versions a list of numbers for the background made every class a region. `names` are
    the classes of such a run, background first. All other entries are returned unchanged.
    """
    if entry.regions is not None or not entry.background_numbers:
        return entry
    numbers = {name: k for k, name in enumerate(foreground(entry.classes), 1)}
    if {*numbers} != {*names[1:]}:
        return entry
    regions = tuple((numbers[name],) for name in names[1:])
    return replace(entry, classes=tuple(names), regions=regions)


def _parse_case(root: Path, item) -> tuple[Path, Path] | None:
    """Return image and label map of a list item in dataset.json; None if it has no label.

    Raises KeyError without an image, TypeError if one of the two is not a name.
    """
    if isinstance(item, str):
        return None
    if not isinstance(item, dict):
        raise TypeError('is neither {"image": …, "label": …} nor the name of an image')
    if item.get("label") in (None, ""):
        return None
    image = check_name(item["image"], "image")
    label = check_name(item["label"], "label")
    return find_file(root, image), find_file(root, label)


def _listed_cases(root: Path, settings: dict, key: str) -> list[tuple[Path, Path]]:
    """Return (image, label map) of the cases in the list `key` of dataset.json.

    Raises ValueError if it is not a list of cases, KeyError if a case lacks its image.
    """
    items = settings.get(key)
    if not isinstance(items, list | None):
        raise ValueError(f"{key} must be a list")

    cases = []
    for number, item in enumerate(items or []):
        try:
            case = _parse_case(root, item)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key} entry {number}: {error}") from None
        if case is not None:
            cases.append(case)
    return cases


def _cases_in_folders(root: Path, ending: str) -> list[tuple[Path, Path]]:
    """Return (image, label map) of the label maps in nnU-Net's labelsTr/ or labelsTs/."""
    images = root / f"images{ending}"
    labels = volumes_in(root / f"labels{ending}")
    return [(find_file(images, label.name), label) for label in labels]


def _read_cases(root: Path, settings: dict) -> dict[str, list[tuple[Path, Path]]]:
    """Return {split: (image, label map) of its cases} from the lists of dataset.json.

    Training and test cases that are not listed come from nnU-Net's folders. Splits without cases
    are left out.
    """
    cases = {
        "train": _listed_cases(root, settings, "training"),
        "val": _listed_cases(root, settings, "validation"),
        "test": _listed_cases(root, settings, "test"),
    }
    if not cases["train"]:
        cases["train"] = _cases_in_folders(root, "Tr")
    if not cases["test"]:
        cases["test"] = _cases_in_folders(root, "Ts")
    return {split: listed for split, listed in cases.items() if listed}


def _read_dataset_json(root: Path) -> tuple[dict, dict[str, list[tuple[Path, Path]]]]:
    """Return from dataset.json fields of Entry, and {split: (image, label map) of its cases}."""
    path = root / "dataset.json"
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: not a data set of volumes (it is not an object); see imaging/layouts.py"
        )

    try:
        fields = _parse_labels(settings["labels"], settings.get("overlapping", False))
        channels = settings.get("channel_names") or settings.get("modality") or {}
        modalities = channels.values() if isinstance(channels, dict) else [channels]
        fields["modality"] = ", ".join(map(str, modalities)) or None
        cases = _read_cases(root, settings)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; see the top of imaging/layouts.py") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a data set of volumes ({error})") from None
    return fields, cases


def _read_btcv(root: Path) -> tuple[dict, dict[str, list[tuple[Path, Path]]]]:
    """Return fields of Entry, and {"train": (image, label map) of its cases}, of BTCV's folders.

    Image and label map of a case have the same number: img0001.nii.gz and label0001.nii.gz.
    """
    images = _volumes_by_number(root / "img")
    labels = _volumes_by_number(root / "label")
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        path = images.get(unpaired[0]) or labels[unpaired[0]]
        raise ValueError(
            f"{path}: no image or label map of the same number ({len(unpaired)} such files)"
        )

    numbers = tuple(range(len(BTCV_CLASSES)))
    fields = {"classes": BTCV_CLASSES, "labels": numbers, "modality": "CT"}
    cases = [(images[number], labels[number]) for number in images]
    return fields, {"train": cases}


def _volumes_by_number(folder: Path) -> dict[str, Path]:
    """Return {digits of its name: volume} of a folder."""
    return {re.sub(r"\D", "", without_ending(file)): file for file in volumes_in(folder)}


def has_volumes(root: Path) -> bool:
    """Return True if a folder is a data set of volumes."""
    if (root / "img").is_dir() and (root / "label").is_dir():
        return True
    return (root / "dataset.json").is_file() and not (root / "images").is_dir()


def read_volumes(root: Path, group_regex: str | None = None) -> dict[str, list[Entry]]:
    """Return {split: its entries} of a data set of volumes. Raises ValueError if it is none."""
    root = Path(root).resolve()
    read = _read_dataset_json if (root / "dataset.json").is_file() else _read_btcv
    fields, cases = read(root)
    all_cases = [case for listed in cases.values() for case in listed]
    if not all_cases:
        raise ValueError(
            f"{root}: no label maps that end in {' or '.join(NIFTI)}; python prepare.py import "
            "converts those of other formats"
        )

    channels = _channel_files(all_cases)
    labels = {label for _, label in all_cases}
    has_repeated_names = len({without_ending(label) for label in labels}) < len(labels)

    entries = {}
    for split, listed in cases.items():
        entries[split] = []
        for image, label in listed:
            name = without_ending(label)
            if has_repeated_names:  # case1/label.nii.gz, case2/label.nii.gz
                name = (label.parent.relative_to(root) / name).as_posix()
            group = match_group(image.name, group_regex)
            first, *more = channels[image]
            entry = Entry(name, first, label, {}, root, group=group, more_channels=tuple(more))
            entries[split].append(replace(entry, has_class_indices=True, **fields))
    return entries


def _channel_files(cases: list[tuple[Path, Path]]) -> dict[Path, list[Path]]:
    """Return {image of a case: its files}: the image itself or, if missing, nnU-Net's channels."""
    images = [image for image, _ in cases]
    by_folder = {}  # folder -> {composed case: files of its channels}
    for image in images:
        if not image.is_file() and image.parent not in by_folder:
            by_case = channels_of(volumes_in(image.parent))
            by_folder[image.parent] = {composed(case): files for case, files in by_case.items()}

    files = {}
    for image in images:
        files[image] = [image]
        if not image.is_file():
            case = composed(without_ending(image))
            files[image] = by_folder[image.parent].get(case) or [image]
    return files


# --- data sets ------------------------------------------------------------------------------------


class MissingFiles(FileNotFoundError):
    """Files that a data set lists do not exist."""


def missing_files(entries: list[Entry]) -> list[Path]:
    """Return the files of the entries that do not exist, without repetition."""
    files = []
    for entry in entries:
        files += [entry.image, *entry.more_channels, entry.mask]
    return [file for file in dict.fromkeys(files) if not file.is_file()]


def check_files_exist(entries: list[Entry]) -> None:
    """Raise MissingFiles with the number of missing files and the names of three of them."""
    missing = missing_files(entries)
    if not missing:
        return

    root = entries[0].root
    names = ", ".join(map(missing_file, missing[:3]))
    if len(missing) > 3:
        names += f" and {len(missing) - 3} more"
    are = "files are" if len(missing) > 1 else "file is"
    raise MissingFiles(f"{root}: {len(missing)} {are} missing: {names}")


def _has_pairs(folder: Path) -> bool:
    """Return True if a folder has a folder of images and a folder of masks."""
    has_images = _first_folder(folder, IMAGE_FOLDERS).is_dir()
    return has_images and _first_folder(folder, MASK_FOLDERS).is_dir()


def find_splits(root: Path) -> dict[str, Path]:
    """Return {split: its annotation file or folder} of a data set; {} if it is none."""
    root = Path(root)
    if has_volumes(root):
        return dict.fromkeys(read_volumes(root), root)
    if (root / "anns").is_dir():
        files = sorted((root / "anns").glob("[!.]*.json"))  # without ._train.json of macOS
        return {file.stem: file for file in files}

    folders = {}
    for name, split in SPLITS.items():
        if _has_pairs(root / name):
            folders[split] = root / name
    if not folders and _has_pairs(root):
        folders = dict.fromkeys(("train", "val", "test"), root)
    return folders


def is_undivided(root: Path) -> bool:
    """Return True for a data set of images/ and masks/ alone, which is split at random."""
    return not has_volumes(root) and {*find_splits(root).values()} == {Path(root)}


def path_and_split(text: str, default: str = "test") -> tuple[str, str]:
    """Return path and split of PATH[:SPLIT] on the command line. default: the split of a PATH."""
    path, _, split = text.rpartition(":")
    if path and not Path(text).is_dir():
        return path, split
    return text, default


def split_role(split: str) -> str:
    """Return what a split is for: train, val or, for all other names, test.

    A part of a split has its role: train_10 is for training.
    """
    start = split.split("_")[0]
    return {"train": "train", "val": "val", "valid": "val"}.get(start, "test")


def training_split(data_set: str) -> tuple[str, str]:
    """Return path and split of --data PATH[:SPLIT]; the split train by default.

    Raises ValueError if the split is not one to train on.
    """
    path, split = path_and_split(str(data_set), "train")
    if split_role(split) != "train":
        raise ValueError(
            f"--data {data_set}: splits to train on are called train or train_NAME; use --test to "
            "test on others"
        )
    return path, split


def validation_split(root: Path, split: str) -> str:
    """Return the validation split for a training split.

    For train_10 it is val_10 if the data set has this split, else val.
    """
    own = split.replace("train", "val", 1)
    return own if own in find_splits(root) else "val"


def read_entries(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """Return the entries of a split of a data set in any layout.

    Raises FileNotFoundError if the folder or the split does not exist, ValueError if the folder is
    not a data set.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if has_volumes(root):
        available = read_volumes(root, group_regex)
        if split in available:
            return available[split]
    else:
        available = find_splits(root)
    if not available:
        raise ValueError(
            f"{root}: not a data set; it needs images/ and masks/, with "
            "anns/{train,val,test}.json, or in {train,val,test}/; volumes a dataset.json; "
            f"python prepare.py import {shlex.quote(str(root))} --out data/NAME reads many others"
        )

    if (root / "anns").is_dir():
        entries = read_annotations(root, split, group_regex)
    elif split not in available:
        raise FileNotFoundError(f"{root}: has no split {split}, only {', '.join(available)}")
    elif available[split] == root:
        entries = _random_split(read_pairs(root, root, group_regex), split)
    else:
        entries = read_pairs(root, available[split], group_regex)
    return with_classes(root, entries)


def _random_split(entries: list[Entry], split: str) -> list[Entry]:
    """Return the entries of a split of a data set without splits: 80 / 10 / 10 %, seed 0."""
    tenths = random_parts(entries, 10)
    chosen = {"test": tenths[0], "val": tenths[1], "train": sum(tenths[2:], [])}[split]
    return [entries[i] for i in sorted(chosen)]


def random_parts(entries: list[Entry], n: int, seed: int = 0) -> list[list[int]]:
    """Return the indices of the entries in n random parts, by patient if known, else by image.

    Raises ValueError if there are fewer than n patients or images.
    """
    groups = {}
    for i, entry in enumerate(entries):
        groups.setdefault(entry.group or str(entry.image), []).append(i)
    if len(groups) < n:
        root = entries[0].root if entries else "the data set"
        raise ValueError(
            f"{root}: {len(groups)} images or patients, too few for {n} parts; make folders or "
            "annotation files of the splits yourself"
        )

    order = np.random.default_rng(seed).permutation(sorted(groups))
    indices = []
    for k in range(n):
        part = []
        for group in order[k::n]:
            part += groups[group]
        indices.append(part)
    return indices


def split_fold(entries: list[Entry], text: str) -> tuple[list[Entry], list[Entry]]:
    """Return the training and validation entries of fold k of n, written "k/n", k from 0.

    The folds are those of nnU-Net's splits_final.json if the data set has it, else `random_parts`.
    Raises ValueError for another text and for a file that does not fit.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    k = int(match[1]) if match else 0
    n = int(match[2]) if match else 0
    if k >= n or n < 2:
        raise ValueError(f"--fold {text}: expected k/n, of 5 folds 0/5 to 4/5")
    path = entries[0].root / "splits_final.json"
    if path.is_file():
        return _fold_of_file(entries, path, k, n)

    held_out = set(random_parts(entries, n)[k])
    train = [entry for i, entry in enumerate(entries) if i not in held_out]
    val = [entries[i] for i in sorted(held_out)]
    return train, val


def _fold_of_file(
    entries: list[Entry], path: Path, k: int, n: int
) -> tuple[list[Entry], list[Entry]]:
    """Return the training and validation entries of fold k of nnU-Net's splits_final.json."""
    folds = read_json(path)
    try:
        chosen = folds[min(k, len(folds) - 1)]
        train_names = set(chosen["train"])
        val_names = set(chosen["val"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f'{path}: expected [{{"train": [names], "val": [names]}}, …]') from None
    if len(folds) != n:
        raise ValueError(f"{path}: has {len(folds)} folds, but --fold is {k}/{n}")

    names = {entry.name for entry in entries}
    unknown = sorted((train_names | val_names) - names)
    if unknown:
        raise ValueError(f"{path}: names {unknown[0]}, which is not in train or val of the set")
    train = [entry for entry in entries if entry.name in train_names]
    val = [entry for entry in entries if entry.name in val_names]
    return train, val


def train_and_val(
    roots, seed: int, group_regex: str | None = None, fold_of: str | None = None
) -> tuple[list[Entry], list[Entry]]:
    """Return the training and validation entries of one or several data sets, PATH[:SPLIT].

    Of PATH:train_10 the split train_10 is for training; this is printed, with the validation split.
    fold_of: "k/n", see `split_fold`, which divides train and val together into new parts. A data
    set without validation entries gives up a random tenth of train (by patient if known, else by
    image), with a message. Raises ValueError if there is too little to train on.
    """
    train = []
    val = []
    for data_set in roots:
        root, split = training_split(data_set)
        val_split = validation_split(root, split)
        train_of_root = read_entries(root, split, group_regex)
        val_of_root = []
        if val_split in find_splits(root):
            val_of_root = read_entries(root, val_split, group_regex)
        if split != "train":
            print(f"{root}: training on the split {split}, validating on {val_split}")

        if fold_of:
            train_of_root, val_of_root = split_fold(train_of_root + val_of_root, fold_of)
        if not train_of_root:
            raise ValueError(f"{root}: its split {split} is empty")
        if not val_of_root:
            train_of_root, val_of_root = _hold_out(root, train_of_root, seed)
        train += train_of_root
        val += val_of_root
    return train, val


def _hold_out(root: Path, entries: list[Entry], seed: int) -> tuple[list[Entry], list[Entry]]:
    """Split training entries at random into nine tenths and a tenth for validation; print that."""
    groups = len({entry.group or entry.image for entry in entries})
    if groups == 1:
        raise ValueError(
            f"{root}: 1 image or patient, too few to train and validate on; --overfit 1 does both "
            "on it"
        )
    held_out = set(random_parts(entries, min(10, groups), seed)[0])
    train = [entry for i, entry in enumerate(entries) if i not in held_out]
    val = [entry for i, entry in enumerate(entries) if i in held_out]
    print(f"{root}: no validation split; validating on {len(val)} entries of train (seed {seed})")
    return train, val
