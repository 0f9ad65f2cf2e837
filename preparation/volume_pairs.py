"""Pair the volumes of a user's folder with their label maps, by the names of files and folders.

Words such as images, ct, labels or seg say what a file is. What is left of a path without these
words is the key of a case: images/a.nii.gz and labels/a.nii.gz have the key a, and so have a/ct.nii
and a/segmentation.nii, or a.nrrd and a_seg.nrrd.
"""

import re
from argparse import Namespace
from collections import Counter
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
# Folders of the Decathlon and nnU-Net: what they hold, and the part of the key in their place.
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


@dataclass(frozen=True)
class Named:
    """A file and what its name says about it."""

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
    """Return the name of a file without its ending; a UID as a name has none."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name if path.suffix[1:].isdigit() else path.stem


def words_of(stem: str) -> list[str]:
    """Return the words of a name: "img0001_seg" has img, 0001 and seg."""
    words = []
    for word in re.split(r"[_\-. ]+", stem):
        match = re.fullmatch(r"([A-Za-z]+)(\d+)", word)
        is_known = match and match[1].lower() in IMAGE_WORDS | LABEL_WORDS
        words += match.groups() if is_known else [word]
    return [word for word in words if word]


def folder_parts(relative: Path) -> tuple[list[str], bool]:
    """Return the folders of a relative path without words such as images, and True for labels."""
    is_label = False
    parts = []
    for part in relative.parts:
        word = part.lower().replace("_", "").replace("-", "")
        kind, rest = DECATHLON.get(word, ("", part))
        if word in LABEL_WORDS | IMAGE_WORDS:
            kind = "label" if word in LABEL_WORDS else "image"
            rest = ""
        is_label |= kind == "label"
        parts.append(rest)
    return parts, is_label


def named(path: Path, folder: Path, drop_channels: bool = False) -> Named:
    """Return what the path of a file within a folder says.

    drop_channels: leave the words for channels, and numbers such as _0000 of images, out of keys.
    """
    parts, is_label = folder_parts(path.relative_to(folder).parent)
    words = words_of(stem_of(path))
    is_label |= path.name.lower().endswith(".seg.nrrd")
    is_label |= any(word.lower() in LABEL_WORDS for word in words)
    words = [word for word in words if word.lower() not in IMAGE_WORDS | LABEL_WORDS]
    channel = ""
    if drop_channels:
        words, channel = without_channel(words, is_label)
    parts.append("_".join(words))
    return Named(path, is_label, join_key(parts), channel)


def without_channel(words: list[str], is_label: bool) -> tuple[list[str], str]:
    """Return words without those that name a channel, and the channel."""
    if not is_label and words and re.fullmatch(r"\d{4}", words[-1]):
        return words[:-1], words[-1]
    channels = [CHANNELS[word.lower()] for word in words if word.lower() in CHANNELS]
    rest = [word for word in words if word.lower() not in CHANNELS]
    return rest, channels[-1] if channels else ""


def join_key(parts: list[str]) -> str:
    """Join the parts of a key, without empty ones and repetitions: a/a becomes a."""
    joined = []
    for part in map(layouts.composed, parts):
        if part and part not in joined[-1:]:
            joined.append(part)
    return "/".join(joined)


def glob_key(pattern: str, path: Path) -> str | None:
    """Return the text for which the stars of a pattern stand in a path, None if it does not fit.

    path: relative. One star stands for text without a slash, two stars for any text.
    """
    expression = ""
    for piece in re.split(r"(\*\*|\*|\?)", pattern):
        wildcards = {"**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
        expression += wildcards.get(piece, re.escape(piece))
    match = re.fullmatch(expression, path.as_posix())
    if not match:
        return None
    return join_key([text.strip("/") for text in match.groups()])


# --- pairs ----------------------------------------------------------------------------------------


def volume_files(folder: Path) -> list[Path]:
    """Return the files below a folder that end like volumes, sorted."""
    files = layouts.files_below(folder, with_masks=True)
    return [path for path in files if path.name.lower().endswith(ENDINGS)]


def find_pairs(files: list[Path], folder: Path, args: Namespace) -> list[Pair]:
    """Return the cases of some files, [] if no image has a label map.

    Images of imagesTs/ may lack label maps. Raises ValueError, one line, for other files without
    their counterpart, unless --skip-unpaired is set, and for several files of the same kind.
    """
    if args.images:
        attempts = [named_by_globs(files, folder, args)]
    else:
        attempts = []
        for drop_channels in (False, True):
            attempts.append([named(path, folder, drop_channels) for path in files])
    best = min(attempts, key=count_unpaired)

    images = {}  # key -> [Named]
    labels = {}
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
    """Return how many keys have an image or a label map alone."""
    images = {file.key for file in files if not file.is_label}
    labels = {file.key for file in files if file.is_label}
    return len(images ^ labels)


def refuse_several(labels: dict, images: dict, folder: Path) -> None:
    """Raise ValueError if a case has several label maps, or images that are no channels."""
    advice = "name the right ones with --images 'GLOB' --masks 'GLOB'"
    for key, files in labels.items():
        if len(files) > 1:
            names = ", ".join(str(file.path.relative_to(folder)) for file in files[:3])
            raise ValueError(f"{folder}: {len(files)} label maps for {key}: {names}; {advice}")
    for key, files in images.items():
        channels = {file.channel for file in files}
        if len(files) > 1 and (len(channels) < len(files) or "" in channels):
            names = ", ".join(str(file.path.relative_to(folder)) for file in files[:3])
            raise ValueError(f"{folder}: {len(files)} images for {key}: {names}; {advice}")

    sets = {}  # channels -> a case
    for key in images.keys() & labels.keys():
        channels = sorted(file.channel for file in images[key])
        if len(channels) > 1:
            sets.setdefault(", ".join(channels), key)
    if len(sets) > 1:
        cases = " and ".join(f"{key} has {channels}" for channels, key in sorted(sets.items())[:2])
        raise ValueError(f"{folder}: the cases have different channels: {cases}; {advice}")


def without_test_labels(images: dict, labels: dict) -> set[str]:
    """Return the keys of imagesTs/ if there is no labelsTs/."""
    if any(key.startswith("Ts/") for key in labels):
        return set()
    return {key for key in images if key.startswith("Ts/")}


def refuse_unpaired(images: dict, labels: dict, test_images: set[str], args: Namespace) -> None:
    """Raise ValueError for images without a label map and the reverse, unless they are skipped."""
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
    has_test_labels = any(key.startswith("Ts/") for key in labels)
    stems = Counter(stem_of(images[key][0].path).lower() for key in keys)
    last_parts = Counter(key.split("/")[-1].lower() for key in keys)

    pairs = []
    for key in keys:
        files = sorted(images[key], key=channel_position)
        paths = tuple(file.path for file in files)
        name = key
        if not files[-1].channel and max(stems.values()) == 1:
            name = stem_of(paths[0])
        elif max(last_parts.values()) == 1:
            name = key.split("/")[-1]
        split = split_of_folder(paths[0].relative_to(folder))
        if has_test_labels:
            split = "test" if key.startswith("Ts/") else "train"

        label = labels[key][0].path if key in labels else None
        channels = tuple(file.channel for file in files) if len(files) > 1 else ()
        pairs.append(Pair(name, paths, label, split, channels))
    return pairs


def channel_position(file: Named) -> tuple[int, str]:
    """Return the sorting key of a channel: CHANNEL_ORDER, then others by name."""
    known = file.channel in CHANNEL_ORDER
    return CHANNEL_ORDER.index(file.channel) if known else len(CHANNEL_ORDER), file.channel
