"""Pair the volumes of a user's folder with their label maps, by the names of files and folders.

Words such as images, ct, labels or seg state the role of a file. The rest of its path is the key of
the case: images/a.nii.gz and labels/a.nii.gz both have the key a. So do a/ct.nii and
a/segmentation.nii, and a.nrrd and a_seg.nrrd.
"""

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from imaging import layouts
from preparation.readings import split_of_folder

ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
IMAGE_WORDS = {
    "image", "images", "img", "imgs", "imaging", "volume", "volumes", "vol", "scan", "scans",
    "ct", "mr", "mri", "dicom", "dcm", "orig",
}  # fmt: skip
LABEL_WORDS = {
    "label", "labels", "labelmap", "labelmaps", "mask", "masks", "seg", "segs", "segmentation",
    "segmentations", "gt", "groundtruth", "annotation", "annotations", "roi", "rois",
}  # fmt: skip
# Folders of the Decathlon and nnU-Net: the role of their files, and their replacement in keys.
DECATHLON = {
    "imagestr": ("image", "Tr"),
    "imagests": ("image", "Ts"),
    "labelstr": ("label", "Tr"),
    "labelsts": ("label", "Ts"),
}
# Words for the channels of brain MR, in the order in which the BraTS21 weights take them.
CHANNELS = {
    "flair": "FLAIR", "t2f": "FLAIR", "t1ce": "T1ce", "t1c": "T1ce", "t1gd": "T1ce",
    "t1": "T1", "t1n": "T1", "t1w": "T1", "t2": "T2", "t2w": "T2",
}  # fmt: skip
CHANNEL_ORDER = ("FLAIR", "T1ce", "T1", "T2")
ADVICE = "name the right ones with --images 'GLOB' --masks 'GLOB'"


@dataclass(frozen=True)
class Named:
    """A file with the role, case and channel that its path states."""

    path: Path
    is_label: bool
    key: str
    channel: str = ""  # "T1" or "0000"; "" for the only channel


@dataclass(frozen=True)
class Pair:
    """The files of a case."""

    name: str
    images: tuple[Path, ...]  # one, or one for each channel
    label: Path | None
    split: str = ""
    channels: tuple[str, ...] = ()  # names of the channels, if there are several


# --- names ----------------------------------------------------------------------------------------


def stem_of(path: Path) -> str:
    """Return the name of a file without its ending."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]

    is_uid = path.suffix[1:].isdigit()  # 1.2.840 has no ending
    return path.name if is_uid else path.stem


def is_segmentation(path: Path) -> bool:
    """Return True for a segmentation of 3D Slicer, a .seg.nrrd file."""
    return path.name.lower().endswith(".seg.nrrd")


def words_of(stem: str) -> list[str]:
    """Split a name into words: "img0001_seg" becomes img, 0001 and seg."""
    words = []
    for word in re.split(r"[_\-. ]+", stem):
        match = re.fullmatch(r"([A-Za-z]+)(\d+)", word)
        if match and match[1].lower() in IMAGE_WORDS | LABEL_WORDS:
            words += match.groups()
        elif word:
            words.append(word)
    return words


def folder_parts(relative: Path) -> tuple[list[str], bool]:
    """Return the parts of a relative folder for a key, and True for a folder of label maps.

    The part of a folder such as images is empty.
    """
    is_label = False
    parts = []
    for part in relative.parts:
        word = part.lower().replace("_", "").replace("-", "")
        if word in LABEL_WORDS:
            is_label = True
            parts.append("")
        elif word in IMAGE_WORDS:
            parts.append("")
        else:
            kind, rest = DECATHLON.get(word, ("", part))
            is_label |= kind == "label"
            parts.append(rest)
    return parts, is_label


def named(path: Path, folder: Path, drop_channels: bool = False) -> Named:
    """Return the role, the key and the channel of a file, by its path within a folder.

    drop_channels: leave words for channels, and the _0000 of an image, out of the key.
    """
    parts, is_label = folder_parts(path.relative_to(folder).parent)
    is_label |= is_segmentation(path)

    words = []
    for word in words_of(stem_of(path)):
        if word.lower() in LABEL_WORDS:
            is_label = True
        elif word.lower() not in IMAGE_WORDS:
            words.append(word)

    channel = ""
    if drop_channels:
        words, channel = without_channel(words, is_label)
    parts.append("_".join(words))
    return Named(path, is_label, join_key(parts), channel)


def without_channel(words: list[str], is_label: bool) -> tuple[list[str], str]:
    """Return the words that do not name a channel, and the channel, "" for none."""
    if not is_label and words and re.fullmatch(r"\d{4}", words[-1]):
        return words[:-1], words[-1]

    rest = []
    channel = ""
    for word in words:
        if word.lower() in CHANNELS:
            channel = CHANNELS[word.lower()]
        else:
            rest.append(word)
    return rest, channel


def join_key(parts: list[str]) -> str:
    """Join the parts of a key. Empty and repeated parts are left out: a/a becomes a."""
    joined = []
    for part in map(layouts.composed, parts):
        if part and part not in joined[-1:]:
            joined.append(part)
    return "/".join(joined)


def glob_key(pattern: str, path: Path) -> str | None:
    """Return the text that the wildcards of a pattern match in a relative path, as a key.

    One star matches text without a slash, `**/` any folders or none, two stars match any text.
    Return None if the path does not match.
    """
    wildcards = {"**/": "((?:[^/]+/)*)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    expression = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        expression += wildcards.get(piece, re.escape(piece))

    match = re.fullmatch(expression, path.as_posix())
    if not match:
        return None
    return join_key([text.strip("/") for text in match.groups()])


# --- pairs ----------------------------------------------------------------------------------------


def volume_files(folder: Path) -> list[Path]:
    """Return the files below a folder with an ending of ENDINGS, sorted."""
    files = layouts.files_below(folder, with_masks=True)
    return [path for path in files if path.name.lower().endswith(ENDINGS)]


def find_pairs(files: list[Path], folder: Path, args: Namespace) -> list[Pair]:
    """Return the cases of some files, [] if no image has a label map.

    Images of imagesTs/ may lack label maps. Raises ValueError, one line, for any other unpaired
    file, unless --skip-unpaired is set, and for several files of the same role in a case.
    """
    if args.images:
        attempts = [named_by_globs(files, folder, args)]
    else:
        attempts = []
        for drop_channels in (False, True):
            attempts.append([named(path, folder, drop_channels) for path in files])
    best = min(attempts, key=count_unpaired)

    images = {}  # key -> [Named]
    labels = {}  # key -> [Named]
    for file in best:
        group = labels if file.is_label else images
        group.setdefault(file.key, []).append(file)
    if not images.keys() & labels.keys():
        return []

    refuse_several(labels, images, folder)
    test_images = without_test_labels(images, labels)
    refuse_unpaired(images, labels, test_images, args)
    return pairs_of(images, labels, test_images, folder)


def named_by_globs(files: list[Path], folder: Path, args: Namespace) -> list[Named]:
    """Return the files that --images and --masks name."""
    files_named = []
    for path in files:
        relative = path.relative_to(folder)
        image_key = glob_key(args.images, relative)
        label_key = glob_key(args.masks, relative)
        if label_key is not None:  # the pattern of masks is often the narrower one
            files_named.append(Named(path, True, label_key))
        elif image_key is not None:
            files_named.append(Named(path, False, image_key))
    return files_named


def count_unpaired(files: list[Named]) -> int:
    """Return how many keys have only images or only label maps."""
    images = set()
    labels = set()
    for file in files:
        keys = labels if file.is_label else images
        keys.add(file.key)
    return len(images ^ labels)


def refuse_several(labels: dict, images: dict, folder: Path) -> None:
    """Raise ValueError if a case has several label maps, or several images of one channel."""
    for files in labels.values():
        if len(files) > 1:
            raise ValueError(several_files(files, "label maps", folder))

    for files in images.values():
        channels = {file.channel for file in files}
        are_channels = len(channels) == len(files) and "" not in channels
        if len(files) > 1 and not are_channels:
            raise ValueError(several_files(files, "images", folder))

    refuse_different_channels(images, labels, folder)


def several_files(files: list[Named], kind: str, folder: Path) -> str:
    """Return the message about several files of one case."""
    names = ", ".join(str(file.path.relative_to(folder)) for file in files[:3])
    return f"{folder}: {len(files)} {kind} for {files[0].key}: {names}; {ADVICE}"


def refuse_different_channels(images: dict, labels: dict, folder: Path) -> None:
    """Raise ValueError if not all cases with several images have the same channels."""
    case_of = {}  # channels -> the first case that has them
    for key in sorted(images.keys() & labels.keys()):
        channels = sorted(file.channel for file in images[key])
        if len(channels) > 1:
            case_of.setdefault(", ".join(channels), key)

    if len(case_of) > 1:
        first, second = sorted(case_of)[:2]
        raise ValueError(
            f"{folder}: the cases have different channels: {case_of[first]} has {first} and "
            f"{case_of[second]} has {second}; {ADVICE}"
        )


def without_test_labels(images: dict, labels: dict) -> set[str]:
    """Return the keys of imagesTs/ if there is no labelsTs/."""
    if keys_of_test(labels):
        return set()
    return keys_of_test(images)


def keys_of_test(by_key: dict) -> set[str]:
    """Return the keys that belong to imagesTs/ or labelsTs/."""
    return {key for key in by_key if key.startswith("Ts/")}


def refuse_unpaired(images: dict, labels: dict, test_images: set[str], args: Namespace) -> None:
    """Raise ValueError for an image or a label map alone, unless --skip-unpaired is set."""
    unpaired = sorted((images.keys() ^ labels.keys()) - test_images)
    if not unpaired or args.skip_unpaired:
        return
    key = unpaired[0]
    kind = "label map" if key in images else "image"
    path = (images.get(key) or labels[key])[0].path
    raise ValueError(
        f"{path}: has no {kind}, and {len(unpaired) - 1} more files lack theirs; add it, or leave "
        "such files out with --skip-unpaired"
    )


def pairs_of(images: dict, labels: dict, test_images: set[str], folder: Path) -> list[Pair]:
    """Return the cases of the keys that have an image and a label map, and of test_images."""
    keys = sorted((images.keys() & labels.keys()) | test_images)
    has_test_labels = bool(keys_of_test(labels))
    have_own_stems = are_distinct([stem_of(images[key][0].path) for key in keys])
    have_own_ends = are_distinct([key.split("/")[-1] for key in keys])

    pairs = []
    for key in keys:
        files = sorted(images[key], key=channel_position)
        paths = tuple(file.path for file in files)
        channels = ()
        if len(files) > 1:
            channels = tuple(file.channel for file in files)

        name = key
        if have_own_stems and not files[-1].channel:
            name = stem_of(paths[0])
        elif have_own_ends:
            name = key.split("/")[-1]

        split = split_of_folder(paths[0].relative_to(folder))
        if has_test_labels:
            split = "test" if key.startswith("Ts/") else "train"

        label = labels[key][0].path if key in labels else None
        pairs.append(Pair(name, paths, label, split, channels))
    return pairs


def are_distinct(names: list[str]) -> bool:
    """Return True if all names differ, not only in upper and lower case."""
    return len({name.lower() for name in names}) == len(names)


def channel_position(file: Named) -> tuple[int, str]:
    """Return a sort key of an image: its position in CHANNEL_ORDER, other channels last by name."""
    position = len(CHANNEL_ORDER)
    if file.channel in CHANNEL_ORDER:
        position = CHANNEL_ORDER.index(file.channel)
    return position, file.channel
