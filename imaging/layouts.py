"""Folders of images and masks -> lists of entries. What a folder is, is told by what it holds.

Prompted layout (that of medvlsm, github.com/naamiinepal/medvlsm): `images/`, `masks/`,
`anns/SPLIT.json`, each a list of entries

    {"img_name": "a.jpg", "mask_name": "a.png", "prompts": {"p1": "polyp", "p7": ["…", "…"]}}

with an optional `"label": k` where the mask is a class map and `mask == k` is meant, and an
optional `"group"`, the patient, a text or a number. Any further annotation file, say
`anns/testA.json`, is a split of that name.

Class maps: `classes.json` is {"0": "background", "1": "stomach", …}, masks hold these numbers, and
255 where a pixel does not count. Images and masks of one stem are a pair, in
`{train,val,test}/{images,masks}/`; or `images/` and `masks/` with `anns/` as above; or without:
then a tenth of the images (of the patients, with --group-regex) is the test split, another one the
validation split, always the same ones. Without classes.json such masks are binary.

Volumes (NIfTI): `dataset.json` as the Medical Segmentation Decathlon has it, with lists of
`training`, perhaps `validation`, and `test`, of which those with a label count; or as nnU-Net has
it, without lists: files CASE_0000.nii.gz, CASE_0001.nii.gz … of a case's channels in imagesTr/ and
CASE.nii.gz in labelsTr/ (imagesTs/, labelsTs/: the test split). Its `labels` are read in either
direction. `img/` and `label/` without it are BTCV's own folders, all for training.

Regions: as in nnU-Net, classes overlap if one of them is a list of more than one number. A list of
one number is that number. Unlike in nnU-Net, the background has no say in this: numbers listed with
it become 0. `"overlapping": true` makes regions of classes that are single numbers.

File names in these JSON files are relative and stay below their folder (`check_name`). Symbolic
links on the disk are followed. Names that differ only in their Unicode form (macOS writes ä as two
characters) are the same.
"""

import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from imaging.files import describe_foreign, read_json


def image_endings() -> frozenset[str]:
    """Return the endings of image files, in small letters: of all formats that Pillow reads.

    Without formats that hold films, layers or icons of several sizes, and those that need another
    program.
    """
    others = {"BUFR", "CUR", "EPS", "FLI", "GRIB", "HDF5", "ICNS", "ICO", "MPEG", "PSD", "WMF"}
    endings = Image.registered_extensions()
    formats = {*Image.OPEN, "MPO"} - others  # MPO is opened as JPEG is
    return frozenset(ending for ending, name in endings.items() if name in formats)


ENDINGS = image_endings()
COMMON_ENDINGS = ".png, .jpg, .tif, .bmp, .pgm and others that Pillow reads"  # for messages
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # that Windows puts into folders
NIFTI = (".nii.gz", ".nii")
FOLDERS = ("images", "imagesgreyscale"), ("masks", "masks14")
BTCV_CLASSES = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
    "right adrenal gland", "left adrenal gland",
)  # fmt: skip
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Folders of masks and label maps -> the folder beside it that holds their images.
LABEL_FOLDERS = {
    "masks": "images",
    "masks14": "imagesgreyscale",
    "labelsTr": "imagesTr",
    "labelsTs": "imagesTs",
    "label": "img",
}


def foreground(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that are scored: of several all but the first."""
    return classes[1:] if len(classes) > 1 else classes


def plain_name(name: str) -> str:
    """A class's name as the Universal Model writes it: small letters, blanks for _."""
    return name.lower().replace("_", " ")


def moved(classes: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether one of the classes is among the others, but has another number there."""
    places = {plain_name(name): k for k, name in enumerate(others)}
    return any(places.get(plain_name(name), k) != k for k, name in enumerate(classes))


def is_prompt_type(text: str) -> bool:
    """Whether a prompt option names types (p6, "p6,p3", random) rather than being a text itself."""
    return re.fullmatch(r"random|p\d+(,p\d+)*", text) is not None


def prompt_option(text: str) -> str:
    """Return a prompt option in canonical form: "P6, p1" becomes "p6,p1", other texts stay.

    Raises ValueError for a text that seems to list prompt types in another way, such as "p6 p1":
    as a literal text it would mean nothing.
    """
    pieces = [piece.strip().lower() for piece in text.split(",")]
    canonical = ",".join(piece for piece in pieces if piece)
    if is_prompt_type(canonical):
        return canonical

    kind = r"(p\s*\d+|random)"
    gap = r"[\s,;|/+&]+"
    if re.fullmatch(f"{kind}({gap}{kind})*", canonical):
        raise ValueError(f"--prompt {text!r}: write prompt types like p6 or p6,p1, or random alone")
    return text


# --- files and their names -----------------------------------------------------------------------


def foreign_format(path: Path) -> str | None:
    """Return a line about a file of a known format that is not read, None for all other files."""
    if path.is_dir():
        return None
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(132)
    return describe_foreign(path, start)


def is_unicode(name: str) -> bool:
    """Return False for a name with half characters, which no text file can hold."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def composed(name: str) -> str:
    """Return a name in one Unicode form, so that names that look the same are equal."""
    return unicodedata.normalize("NFC", name)


def find_file(folder: Path, name: str) -> Path:
    """Return `folder/NAME`, or the one file that differs from it in Unicode form alone."""
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
    """Return a path that does not exist, with what is known about it: "a.jpg (a.png is there)"."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return f"{path} (a link to {os.readlink(path)}, which does not exist)"
    if path.exists():
        return f"{path} (is no file, but a folder, a pipe or a device)"
    if not path.parent.is_dir():
        return str(path)

    stem = composed(path.stem).lower()
    for other in sorted(os.listdir(path.parent)):
        if composed(os.path.splitext(other)[0]).lower() == stem and not other.startswith("."):
            return f"{path} ({other} is there)"
    return str(path)


ONE_FILE = {  # what to do where a key of a JSON file lists several
    "mask_name": "save the union of several masks (the larger value of each pixel) as one file",
    "image": "save the channels of a volume as one 4-D file",
}


def check_name(name: str, key: str) -> str:
    """Return the file name that `key` of a JSON file gives, if it stays below its folder.

    Raises ValueError if it is absolute or climbs out with `..`, in POSIX or in Windows notation,
    whatever the system: data sets travel; or if it is empty or no file can have it. Raises
    TypeError if it is not a string.
    """
    if isinstance(name, list):
        way_out = ONE_FILE.get(key, "name one")
        raise ValueError(f"{key} lists {len(name)} files, but an entry has one; {way_out}")
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
    """Return an image's path within the images folder of its data set, with / between folders."""
    parts = image.relative_to(root).parts if image.is_relative_to(root) else image.parts[-1:]
    for k, part in enumerate(parts[:-1]):
        if part in FOLDERS[0]:
            return "/".join(parts[k + 1 :])
    return "/".join(parts)


@dataclass(frozen=True)
class Entry:
    """One image with one mask and, of a binary mask, the texts that ask for it."""

    name: str  # the mask's path in masks/ without its ending (with a label: -k); unique in a split
    image: Path
    mask: Path
    prompts: dict[str, list[str]]  # prompt type -> its texts
    root: Path  # the data set's folder
    label: int | None = None  # the mask is a class map and this number is meant
    group: str | None = None  # patient
    classes: tuple[str, ...] = ("target",)  # in the mask: one, or the background and several
    numbers: bool = False  # the mask holds the numbers of these classes
    more: tuple[Path, ...] = ()  # files of a volume's further channels
    labels: tuple[int, ...] | None = None  # what a volume's label map may hold, in order,
    unnamed: tuple[int, ...] = ()  # and which further numbers are background there
    regions: tuple[tuple[int, ...], ...] | None = None  # of a class that overlaps: which of these
    modality: str | None = None  # of a volume, as dataset.json says
    mask_orientation: str | None = None  # of an image mask: --mask-orientation

    def types(self, kind: str) -> list[str]:
        """The types that an option draws from: those it lists, or for `random` all but empty p0."""
        return [k for k in self.prompts if k != "p0"] if kind == "random" else kind.split(",")

    def texts(self, kind: str) -> list[str]:
        """Every text that `text` can give."""
        if not is_prompt_type(kind):
            return [kind]
        return [text for k in self.types(kind) for text in self.prompts.get(k, [])]

    def text(self, kind: str, rng: np.random.Generator | None = None) -> str:
        """A text of one of the types of `kind`, or `kind` itself if it is a text.

        Where there are several, `rng` draws type and text; without it the first is taken.
        ValueError if the entry has none of that type.
        """
        if not is_prompt_type(kind):
            return kind
        types = self.types(kind)
        chosen = types[rng.integers(len(types)) if rng is not None else 0] if types else kind
        texts = self.prompts.get(chosen)
        if not texts:
            where, have = f"{self.root.name}, {self.name}", ", ".join(self.prompts) or "none"
            hint = "choose another --prompt"
            raise ValueError(f"{where}: no prompt of type {chosen}, only {have}; {hint}")
        return texts[rng.integers(len(texts)) if rng is not None else 0]


# --- the files of a folder ------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    """Return True if a file's ending is that of an image."""
    return path.suffix.lower() in ENDINGS


def is_hidden(path: Path) -> bool:
    """Return True for a hidden file such as macOS's ._a.png, and for those that Windows leaves."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted, without hidden ones.

    Raises ValueError, one line, if a name is not Unicode: it could not be printed or written.
    """
    images = []
    for path in sorted(folder.iterdir()):
        if is_image(path) and not is_hidden(path) and not path.is_dir():
            if not is_unicode(path.name):
                name = os.fsencode(path.name)
                raise ValueError(f"{folder}: the file name {name!r} is not Unicode; rename it")
            images.append(path)
    return images


def other_files(folder: Path) -> list[Path]:
    """Return the files and folders in a folder that are not images, sorted, without hidden ones."""
    others = []
    for path in sorted(folder.iterdir()):
        if (not is_image(path) or path.is_dir()) and not is_hidden(path):
            others.append(path)
    return others


def kind_of_file(path: Path) -> str:
    """Return the ending of a file's name in small letters, or what is there instead of a file."""
    if path.is_dir():
        return "folder"
    if path.exists() and not path.is_file():
        return "pipe or device"
    if path.name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    return path.suffix.lower() or "without an ending"


def count_kinds(paths: list[Path]) -> str:
    """Return how many files there are of each kind, most first: "6 .dcm, 1 .txt, 1 folder"."""
    counts = Counter(map(kind_of_file, paths))
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def none_usable(folder: Path, noun: str, others: list[Path]) -> str:
    """Return a line about a folder with no file of a kind: what it holds, and the way out.

    noun: "image" or "volume".
    """
    endings = {"image": COMMON_ENDINGS, "volume": ", ".join(NIFTI)}[noun]
    if not others:
        return f"{folder}: no {noun}s in this folder; they end in {endings}"
    content = count_kinds(others)
    foreign = next(filter(None, map(foreign_format, others)), None)
    if foreign is not None:
        return f"{foreign} ({folder}: only {content})"
    hint = f"{noun}s end in {endings}"
    if noun == "image" and is_volume(others[0]):
        hint = "volumes need a model of volumes, and a data set of them a dataset.json"
    return f"{folder}: no {noun}s in this folder, only {content}; {hint}"


def say_passed_over(folder: Path, noun: str, others: list[Path]) -> None:
    """Print how many files of a folder are not read, as they are no images or no volumes."""
    if others:
        print(f"{folder}: not {noun}s, passed over: {count_kinds(others)}")


def files_below(folder: Path, without: Path | None = None) -> list[Path]:
    """Return the files of a folder and of its sub-folders, sorted.

    Hidden files and folders are passed over. Links to folders are followed, but never into a folder
    that is being listed. Not entered are the folder `without` and, which is printed, folders of
    masks beside those of their images (LABEL_FOLDERS).
    Raises OSError if a folder cannot be read.
    """

    def refuse(error: OSError):
        raise error

    files = []
    excluded = without and without.resolve()
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(place)
        listing = {place.resolve()}  # this folder and those on the way to it
        listing |= {above.resolve() for above in place.parents if above.is_relative_to(folder)}
        entered = []
        for name in subfolders:
            target = (place / name).resolve()
            if name.startswith(".") or target == excluded or target in listing:
                continue
            if LABEL_FOLDERS.get(name) in subfolders:
                print(f"{place / name}: holds the masks of {LABEL_FOLDERS[name]}/; passed over")
                continue
            entered.append(name)
        subfolders[:] = entered

        paths = [place / name for name in names]
        files += [path for path in paths if not is_hidden(path)]
    return sorted(files)


def list_files(folder: Path, noun: str, without: Path | None = None) -> list[Path]:
    """Return the images or volumes of `files_below`; print how many other files there are.

    noun: "image" or "volume". Raises ValueError, one line with the way out, if there is none.
    """
    is_kind = {"image": is_image, "volume": is_volume}[noun]
    usable = []
    others = []
    for file in files_below(folder, without):
        is_special = file.exists() and not file.is_file()
        if is_kind(file) and not is_special:  # also a broken link: reading it says what is wrong
            usable.append(file)
        else:
            others.append(file)
    if not usable:
        raise ValueError(none_usable(folder, noun, others))
    say_passed_over(folder, noun, others)
    return usable


# --- two ways to list a split --------------------------------------------------------------------


def _locate(root: Path, kind: str, name: str, split: str) -> Path:
    """`KIND/NAME`, or `KIND/SPLIT/NAME` (CAMUS keeps what it validates on in the folder train)."""
    folders = ["", split, "train"] if split == "val" else ["", split]
    paths = [find_file(root / kind / folder, name) for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def _group(image: str, group_regex: str | None) -> str | None:
    """What the expression, or its first group, matches in an image's name."""
    try:
        match = re.search(group_regex, image) if group_regex else None
    except re.error as error:
        raise ValueError(f"--group-regex {group_regex}: {error}") from None
    if group_regex and not match:
        raise ValueError(f"--group-regex {group_regex} finds nothing in {image}")
    return match[match.re.groups and 1] if match else None


def _entry(root: Path, split: str, item: dict, group_regex: str | None) -> Entry:
    """Return the entry of an object in an annotation file. Raises TypeError or ValueError."""
    for key in ("img_name", "mask_name", "prompts"):
        if key not in item:
            raise ValueError(f"has no {key}; expected an object with img_name, mask_name, prompts")
    image = check_name(item["img_name"], "img_name")
    mask = check_name(item["mask_name"], "mask_name")
    label = item.get("label")
    if label is not None and not (type(label) is int and 0 <= label < 255):
        raise TypeError(f"label {label!r} of {mask} is no whole number from 0 to 254")

    name = os.path.splitext(mask)[0]
    if label is not None:
        name += f"-{label}"
    paths = _locate(root, "images", image, split), _locate(root, "masks", mask, split)
    prompts = _prompts(item["prompts"])
    group = item.get("group") if group_regex is None else _group(image, group_regex)
    if group is not None and type(group) not in (str, int):
        raise TypeError(f"group {group!r} of {mask} is neither a text nor a whole number")
    return Entry(name, *paths, prompts, root, label, None if group is None else str(group))


def _prompts(given: dict) -> dict[str, list[str]]:
    """Return prompt type -> its texts. Raises TypeError if they are no strings or lists of them."""
    if not isinstance(given, dict):
        raise TypeError(f"prompts are {kind_of(given)} instead of an object with p0, p1, …")
    prompts = {}
    for kind, texts in given.items():
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, list):
            raise TypeError(f"prompt {kind} is {kind_of(texts)}, not a text or a list of texts")
        for text in listed:
            if not isinstance(text, str):
                raise TypeError(f"prompt {kind} lists {kind_of(text)} instead of texts")
        prompts[kind] = listed
    return prompts


def kind_of(value) -> str:
    """Return what a value of a JSON file is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def read_annotations(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """Return the entries of `root/anns/SPLIT.json`, whether or not their files exist.

    Entries repeated word for word are listed once, and that is printed. Raises FileNotFoundError or
    ValueError, one line, if the file is missing or no such list, or if two entries share a name.
    """
    root = Path(root).resolve()
    path = root / "anns" / f"{split}.json"
    if split not in splits(root) or not path.is_file():
        have = ", ".join(splits(root)) or "none"
        raise FileNotFoundError(f"{path}: no such annotation file; splits here: {have}")
    items = read_json(path)
    if not isinstance(items, list):
        need = "a list of objects with img_name, mask_name, prompts"
        raise ValueError(f"{path}: holds {kind_of(items)}; expected {need}")

    entries = {}
    for number, item in enumerate(items):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict):
            need = "an object with img_name, mask_name, prompts"
            raise ValueError(f"{where}: is {kind_of(item)}; expected {need}")
        try:
            entry = _entry(root, split, item, group_regex)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if entries.setdefault(entry.name, entry) != entry:
            hint = "rename it, or join the prompts in a list"
            raise ValueError(f"{where}: a second mask named {entry.name}; {hint}")
    if len(items) > len(entries):
        print(f"{path}: {len(items) - len(entries)} repeated entries are left out")
    return list(entries.values())


class Unpaired(ValueError):
    """Images without a mask, or masks without an image."""


class EmptySplit(ValueError):
    """A split has no entries."""


def read_pairs(root: Path, folder: Path, group_regex: str | None = None) -> list[Entry]:
    """Return the images and masks of one stem in two folders of `folder`.

    Files that are no images are passed over, and that is printed. Raises Unpaired, one line, for
    an image without mask or a mask without image, ValueError for a folder of other files alone.
    """
    places = []
    for names in FOLDERS:
        places.append(next(folder / name for name in names if (folder / name).is_dir()))
    images, masks = map(images_by_stem, places)

    lonely = sorted(images.keys() ^ masks.keys())
    if lonely:
        stem = lonely[0]
        path = images.get(stem) or masks[stem]
        line = f"{path}: {len(lonely)} files have no partner, mask or image; this is one"
        others = [other for place in places for other in other_files(place)]
        partner = next((other for other in others if composed(other.stem) == stem), None)
        if partner is not None:
            line = foreign_format(partner) or f"{line} ({partner.name} is no image file)"
        raise Unpaired(line)
    for place in places:
        say_passed_over(place, "image", other_files(place))

    entries = []
    for stem, image in images.items():
        group = _group(image.name, group_regex)
        entries.append(Entry(masks[stem].stem, image, masks[stem], {}, root, group=group))
    return entries


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return {name without ending, composed: image file} of a folder.

    Raises ValueError, one line, if two files have one name, or if there are other files alone.
    """
    by_stem = {}
    for path in image_files(folder):
        first = by_stem.setdefault(composed(path.stem), path)
        if first != path:
            line = f"{path}: a second file of this name, with another ending than {first.name}"
            raise ValueError(f"{line}; remove or rename one")

    others = other_files(folder)
    if others and not by_stem:
        raise ValueError(none_usable(folder, "image", others))
    return by_stem


def every_image(root: Path, folder: Path | None = None) -> list[Entry]:
    """Return an entry for each image of a folder with images/, in sub-folders too.

    root: the data set. folder: that of one of its splits; None for the data set itself. An image
    may lack its mask, as all do without masks/: the entry then names one that does not exist.
    Raises ValueError if there is no image.
    """
    root = Path(root).resolve()
    folder = root if folder is None else folder.resolve()
    images, masks = (_first_folder(folder, names) for names in FOLDERS)
    mask_of = {}
    for file in files_below(masks) if masks.is_dir() else []:
        if is_image(file):
            mask_of[composed(file.relative_to(masks).with_suffix("").as_posix())] = file

    entries = []
    for file in list_files(images, "image"):
        name = file.relative_to(images).with_suffix("").as_posix()
        mask = mask_of.get(composed(name), masks / f"{name}.png")
        entries.append(Entry(name, file, mask, {}, root))
    return with_classes(root, entries)


def _first_folder(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of these folders that exists, or else the first one."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split that holds images/, with or without masks/.

    None if there is none, as in data sets with annotation files and in those of volumes.
    """
    root = Path(root)
    if has_volumes(root) or (root / "anns").is_dir():
        return None
    for name, own in SPLITS.items():
        if own == split and _first_folder(root / name, FOLDERS[0]).is_dir():
            return root / name
    return None


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the names in classes.json by their numbers; of a single class its name alone.

    Raises ValueError, one line, if it is no such file.
    """
    content = read_json(path)
    need = '{"0": "background", "1": "stomach", …}, numbers without a gap, names once'
    try:
        names = {int(number): name for number, name in content.items()}
        names = [names[k] for k in range(max(len(names), 2))]  # KeyError: a gap
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{path}: expected {need}") from None
    if len({*map(str, names)}) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected {need}")
    return tuple(names if len(names) > 2 else names[1:])


# --- volumes -------------------------------------------------------------------------------------


def without_ending(path: Path) -> str:
    """Return a volume's name: that of its file without .nii, .nii.gz, or .hdr and .img."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_volume(path: Path) -> bool:
    """Return True if a file is named as a NIfTI volume, in small letters or capitals."""
    return path.name.lower().endswith(NIFTI)


def volumes_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, without the ._ files that macOS puts beside them; [] if none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if is_volume(file) and not file.name.startswith(".")]


def channels_of(files: list[Path]) -> dict[str, list[Path]]:
    """Return {case: its files}; nnU-Net ends the file of a channel in _0000, _0001, …

    Numbers that do not go from 0000 on without a gap, such as the years 2018 to 2021, are part of
    the name: each file then is a case. ValueError, one line, if two cases have one name.
    """
    numbered = {}
    for file in files:
        match = re.fullmatch(r"(.*)_([0-9]{4})", without_ending(file))
        if match:
            numbered.setdefault(match[1], []).append((int(match[2]), file))

    case_of = {}
    for case, channels in numbered.items():
        numbers = sorted(number for number, _ in channels)
        if numbers == list(range(len(numbers))):
            case_of |= {file: case for _, file in channels}

    cases = {}
    for file in files:
        case = case_of.get(file, without_ending(file))
        cases.setdefault(case, []).append(file)
    for case, some in cases.items():
        are_channels = all(file in case_of for file in some)
        if len(some) > 1 and not are_channels:
            raise ValueError(f"{some[1]}: a second volume named {case}; rename or move one")
        some.sort(key=without_ending)
    return cases


def shorten(text: str, most: int = 40) -> str:
    """Return a text, cut if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def label_numbers(name: str, value) -> tuple[int, ...]:
    """Return the numbers of a label of dataset.json, an integer or a list of them.

    ValueError: one is no whole number, say 1.5, true or "1.5"; int() would make 1 of each.
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
            raise ValueError(f"the label {text!r} is no name")


def _read_labels(found: dict, overlapping: bool = False) -> dict:
    """Read `labels` of dataset.json, in either direction, into fields of Entry.

    overlapping: classes are regions even if each is a single number. Raises ValueError if these
    are no labels.
    """
    if not isinstance(overlapping, bool):
        raise ValueError("overlapping must be true or false")
    _check_label_names(found)
    if len({str(v) for v in found.values()}) < len(found):
        raise ValueError("two labels have one name, or one number")
    if all(isinstance(name, str) and re.fullmatch(r"\d+", key) for key, name in found.items()):
        found = {name: int(key) for key, name in found.items()}
    numbers = {name: label_numbers(name, value) for name, value in found.items()}
    if "ignore" in numbers:
        raise ValueError("a label named ignore is not supported; write 255, which does not count")
    background = [name for name, v in numbers.items() if 0 in v]
    if len(background) != 1:
        raise ValueError("labels need one background, of number 0")
    (background,) = background
    unnamed = tuple(n for n in numbers.pop(background) if n)
    if not numbers:
        raise ValueError("labels name no class beside the background")

    # What the background lists does not make the other classes overlap.
    several = overlapping or any(len({*v}) > 1 for v in numbers.values())
    order = numbers if several else sorted(numbers, key=numbers.get)  # regions: as they are given
    names = [background, *order]
    labels = tuple(sorted({0}.union(*numbers.values())))
    if twice := {*unnamed} & {*labels}:
        raise ValueError(f"label {min(twice)} is background and of a class")
    if not all(numbers.values()):
        raise ValueError("a label lists no number")
    if not several and len(labels) - 1 < len(numbers):
        raise ValueError("two labels have one number")
    regions = tuple(tuple(labels.index(n) for n in numbers[name]) for name in names[1:])
    names = names if len(names) > 2 or several else names[1:]
    regions = regions if several else None
    return {"classes": tuple(names), "labels": labels, "unnamed": unnamed, "regions": regions}


def as_regions(entry: Entry) -> Entry:
    """A volume whose classes, by their plain names, are regions: (background, one, …), and of each
    its numbers. So that what one data set annotates can be told from what another one does."""
    names = map(plain_name, foreground(entry.classes))
    regions = entry.regions or tuple((k,) for k in range(1, len(entry.labels)))
    return replace(entry, classes=("background", *names), regions=regions)


def as_overlapping(entry: Entry, names: list[str]) -> Entry:
    """Return a volume with regions in place of classes, for runs whose model has regions.

    Before the background had no say, a list of numbers there made regions of all classes: `names`
    is what such a run calls them, background first. All other entries are returned as they are.
    """
    if entry.regions is not None or not entry.unnamed:
        return entry
    numbers = {name: k for k, name in enumerate(foreground(entry.classes), 1)}
    if {*numbers} != {*names[1:]}:
        return entry
    regions = tuple((numbers[name],) for name in names[1:])
    return replace(entry, classes=tuple(names), regions=regions)


def _listed(root: Path, item) -> tuple[Path, Path] | None:
    """Return image and label of an item of a list in dataset.json, None without a label.

    Raises KeyError without an image, TypeError if one of the two is no name.
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


def _volume_pairs(root: Path, settings: dict) -> dict[str, list[tuple[Path, Path]]]:
    """Return {split: (image, label map) of its cases} from dataset.json's lists or the folders.

    Raises ValueError if something else stands in place of a list or an entry.
    """
    keys = {"train": "training", "val": "validation", "test": "test"}
    pairs = {}
    for split, key in keys.items():
        pairs[split] = []
        items = settings.get(key)
        if not isinstance(items, list | None):
            raise ValueError(f"{key} must be a list")
        for number, item in enumerate(items or []):
            try:
                pair = _listed(root, item)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{key} entry {number}: {error}") from None
            if pair is not None:
                pairs[split].append(pair)
    for split, end in ("train", "Tr"), ("test", "Ts"):
        if not pairs[split]:  # nnU-Net lists none
            images, labels = root / f"images{end}", root / f"labels{end}"
            pairs[split] = [(find_file(images, file.name), file) for file in volumes_in(labels)]
    return {split: some for split, some in pairs.items() if some}


def _volume_settings(root: Path) -> dict:
    path = root / "dataset.json"
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: no data set of volumes (it is no object); see imaging/layouts.py"
        )
    try:
        fields = _read_labels(settings["labels"], settings.get("overlapping", False))
        channels = settings.get("channel_names") or settings.get("modality") or {}
        kinds = channels.values() if isinstance(channels, dict) else [channels]
        modality = ", ".join(map(str, kinds)) or None
        fields |= {"numbers": True, "modality": modality}
        pairs = _volume_pairs(root, settings)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; see the top of imaging/layouts.py") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no data set of volumes ({error})") from None
    return {"fields": fields, "pairs": pairs}


def _btcv_settings(root: Path) -> dict:
    images, labels = ({re.sub(r"\D", "", without_ending(f)): f for f in volumes_in(root / kind)}
                      for kind in ("img", "label"))  # fmt: skip
    if lonely := sorted(images.keys() ^ labels.keys()):
        path = images.get(lonely[0]) or labels[lonely[0]]
        raise ValueError(
            f"{path}: {len(lonely)} files have no partner, image or label; this is one"
        )
    fields = {
        "classes": BTCV_CLASSES,
        "labels": tuple(range(len(BTCV_CLASSES))),
        "numbers": True,
        "modality": "CT",
    }
    return {"fields": fields, "pairs": {"train": [(images[n], labels[n]) for n in images]}}


def has_volumes(root: Path) -> bool:
    """Whether a folder is a data set of volumes."""
    if (root / "img").is_dir() and (root / "label").is_dir():
        return True
    return (root / "dataset.json").is_file() and not (root / "images").is_dir()


def read_volumes(root: Path, group_regex: str | None = None) -> dict[str, list[Entry]]:
    """Split -> the entries of a data set of volumes. ValueError, one line, if it is none."""
    root = Path(root).resolve()
    settings = (_volume_settings if (root / "dataset.json").is_file() else _btcv_settings)(root)
    every = [pair for pairs in settings["pairs"].values() for pair in pairs]
    if not every:
        others = "convert those of other formats with SimpleITK or dcm2niix"
        raise ValueError(f"{root}: no label maps that end in {' or '.join(NIFTI)}; {others}")
    # Where a file is not there itself, nnU-Net's files of its channels are.
    folders = {image.parent for image, _ in every if not image.is_file()}
    channels = {}  # folder -> {case, composed: files of its channels}
    for folder in folders:
        cases = channels_of(volumes_in(folder))
        channels[folder] = {composed(case): files for case, files in cases.items()}
    labels = {label for _, label in every}
    repeated = len({without_ending(label) for label in labels}) < len(labels)
    entries = {}
    for split, pairs in settings["pairs"].items():
        for image, label in pairs:
            files = [image]
            if not image.is_file():
                case = composed(without_ending(image))
                files = channels[image.parent].get(case) or [image]
            first, *more = files
            name = without_ending(label)
            if repeated:  # case1/label.nii.gz, case2/label.nii.gz
                name = (label.parent.relative_to(root) / name).as_posix()
            place = {"group": _group(image.name, group_regex), "more": tuple(more)}
            entry = Entry(name, first, label, {}, root, **place)
            entries.setdefault(split, []).append(replace(entry, **settings["fields"]))
    return entries


# --- data sets -----------------------------------------------------------------------------------


def missing_files(entries: list[Entry]) -> list[Path]:
    """Return the files of entries that do not exist, each once."""
    files = [file for entry in entries for file in (entry.image, *entry.more, entry.mask)]
    return [file for file in dict.fromkeys(files) if not file.is_file()]


class MissingFiles(FileNotFoundError):
    """Files that a data set lists do not exist."""


def check_files_exist(entries: list[Entry]) -> None:
    """Raise MissingFiles, one line, that counts missing files and names three of them."""
    missing = missing_files(entries)
    if missing:
        names = ", ".join(map(missing_file, missing[:3]))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        are = "files are" if len(missing) > 1 else "file is"
        root = entries[0].root
        raise MissingFiles(f"{root}: {len(missing)} {are} missing: {names}{more}")


def _is_pair(folder: Path) -> bool:
    return all(any((folder / name).is_dir() for name in names) for names in FOLDERS)


def splits(root: Path) -> dict[str, Path]:
    """The splits of a data set, and where each is: an annotation file or a folder; {} if none."""
    root = Path(root)
    if has_volumes(root):
        return dict.fromkeys(read_volumes(root), root)
    if (root / "anns").is_dir():
        lists = sorted((root / "anns").glob("[!.]*.json"))  # without ._train.json of macOS
        return {path.stem: path for path in lists}
    inside = {split: root / name for name, split in SPLITS.items() if _is_pair(root / name)}
    return inside or (dict.fromkeys(("train", "val", "test"), root) if _is_pair(root) else {})


def is_undivided(root: Path) -> bool:
    """Return True for a data set of images/ and masks/ alone, which nothing divides into splits."""
    return not has_volumes(root) and {*splits(root).values()} == {Path(root)}


def path_and_split(place: str) -> tuple[str, str]:
    """PATH[:split] of the command line; without a split it is the test split."""
    path, _, split = place.rpartition(":")
    return (path, split) if path and not Path(place).is_dir() else (place, "test")


def annotations(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """Recognises what a folder is and lists a split. FileNotFoundError, ValueError: one line."""
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if has_volumes(root):
        have = read_volumes(root, group_regex)
        if split in have:
            return have[split]
    else:
        have = splits(root)
    if not have:
        need = "images/ and masks/, with anns/{train,val,test}.json, or in {train,val,test}/; "
        need += "volumes a dataset.json"
        raise ValueError(f"{root}: no data set; it needs {need}")
    if (root / "anns").is_dir():
        entries = read_annotations(root, split, group_regex)
    elif split not in have:
        raise FileNotFoundError(f"{root}: has no split {split}, only {', '.join(have)}")
    else:
        entries = read_pairs(root, have[split], group_regex)
        if have[split] == root:  # one folder for all
            test, val, *rest = parts(entries, 10)
            chosen = {"test": test, "val": val, "train": sum(rest, [])}[split]
            entries = [entries[i] for i in sorted(chosen)]
    return with_classes(root, entries)


def with_classes(root: Path, entries: list[Entry]) -> list[Entry]:
    """Return the entries with the classes of classes.json, if the data set has this file."""
    if (root / "classes.json").is_file():
        classes = read_classes(root / "classes.json")
        new = {"classes": classes, "numbers": True}
        entries = [replace(e, **new) if e.label is None else e for e in entries]
    return entries


def parts(entries: list[Entry], n: int, seed: int = 0) -> list[list[int]]:
    """Numbers of the entries in n parts at random, by patient if known, else by image."""
    groups = {}
    for i, entry in enumerate(entries):
        groups.setdefault(entry.group or str(entry.image), []).append(i)
    if len(groups) < n:
        where = entries[0].root if entries else "the data set"
        hint = "parts; make folders or annotation files of the splits yourself"
        raise ValueError(f"{where}: {len(groups)} images or patients, too few for {n} {hint}")
    order = np.random.default_rng(seed).permutation(sorted(groups))
    return [[i for group in order[k::n] for i in groups[group]] for k in range(n)]


def fold(entries: list[Entry], text: str) -> tuple[list[Entry], list[Entry]]:
    """Fold k of n ("k/n", k from 0) -> entries to train and to validate on.

    As nnU-Net's splits_final.json in the data set's folder says, else by `parts`.
    """
    match, path = re.fullmatch(r"(\d+)/(\d+)", text), entries[0].root / "splits_final.json"
    k, n = map(int, match.groups()) if match else (0, 0)
    if k >= n or n < 2:
        raise ValueError(f"--fold {text}: expected k/n, of 5 folds 0/5 to 4/5")
    if path.is_file():
        folds = read_json(path)
        try:
            train, val = (set(folds[min(k, len(folds) - 1)][part]) for part in ("train", "val"))
        except (ValueError, KeyError, TypeError, IndexError):
            need = '[{"train": [names], "val": [names]}, …]'
            raise ValueError(f"{path}: expected {need}") from None
        if len(folds) != n:
            raise ValueError(f"{path}: has {len(folds)} folds, --fold {text} asks for one of {n}")
        if lost := sorted((train | val) - {entry.name for entry in entries}):
            raise ValueError(f"{path}: names {lost[0]}, which is not in train or val of the set")
        return [e for e in entries if e.name in train], [e for e in entries if e.name in val]
    val = set(parts(entries, n)[k])
    return [e for i, e in enumerate(entries) if i not in val], [entries[i] for i in sorted(val)]


def train_and_val(
    roots, seed: int, group_regex=None, fold_of: str | None = None
) -> tuple[list[Entry], list[Entry]]:
    """Entries to train and to validate on, of one or several data sets.

    fold_of: "k/n", see `fold`, which then divides train and val anew. A missing or empty `val` is
    replaced by a seeded tenth of train, by patient if known, else by image, and that is printed.
    """
    train, val = [], []
    for root in roots:
        ours, theirs = annotations(root, "train", group_regex), []
        if "val" in splits(root):
            theirs = annotations(root, "val", group_regex)
        if fold_of:
            ours, theirs = fold(ours + theirs, fold_of)
        if not ours:
            raise ValueError(f"{root}: its split train is empty")
        if not theirs:
            groups = len({entry.group or entry.image for entry in ours})
            if groups == 1:
                hint = "too few to train and validate on; --overfit 1 does both on it"
                raise ValueError(f"{root}: 1 image or patient, {hint}")
            tenth = set(parts(ours, min(10, groups), seed)[0])
            theirs = [entry for i, entry in enumerate(ours) if i in tenth]
            ours = [entry for i, entry in enumerate(ours) if i not in tenth]
            print(f"{root}: no validation split; {len(theirs)} of train serve (seed {seed})")
        train, val = train + ours, val + theirs
    return train, val
