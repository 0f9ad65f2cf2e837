"""Tell images from masks by the names of folders and files, and find the image of a mask.

People write `images/ masks/`, `Original/ "Ground Truth"/`, `x_mask.png`, `mask_x.png` and much
else. What is compared here is in lower case and in Unicode form NFC.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path

from imaging import layouts
from preparation.readings import SPLIT_NAMES

# Words of masks and images, in names of folders and files. Long ones are also parts of a word.
MASK_WORD = (
    "groundtruths?|segmentation(?:class|s)?|segments?|annotations?|annotated|annots?|masks?|labels?"
    "|targets?|lesions?|outlines?|contours?|manual"
)
SHORT_MASK_WORD = "gt|seg|segs|ann|anns|anno|rois?|truth|ground|lbl"
IMAGE_WORD = "images?|imgs?|inputs?|originals?|photos?|pictures?|scans?|frames?"
SHORT_IMAGE_WORD = "data|raw|slices?|rgb|jpe?g|png"
NO_WORD = "un-?labell?ed|labell?ed"  # labelled images are images

# Pictures made of images and masks, ISIC's superpixels, and CVAT's and VOC's numbers of objects.
NO_DATA = re.compile("overlay|visuali[sz]ation|preview|thumbnail|superpixels|segmentationobject")
SHORT_NO_DATA = {"viz", "vis"}


# Names of folders or files that tell several masks of the same thing apart.
NO_CLASS = re.compile(
    r"\d|.*(ator|rater|reader|observer|expert|grader|human|machine|refined|coarse|fine|old|new)\d*$"
)


def words_of(text: str) -> list[str]:
    """Return the words of a name in lower case: "Ground Truth_1" has ground, truth and 1."""
    return re.findall(r"[^\W_]+", text.lower())


def is_mask_word(word: str) -> bool:
    """Return True for a word that only says that a file is a mask, such as mask, gt or label2."""
    return re.fullmatch(rf"(?:{MASK_WORD}|{SHORT_MASK_WORD})\d*", word) is not None


def holds_no_data(name: str) -> bool:
    """Return True for a folder or file of overlays, previews, superpixels or object numbers."""
    words = words_of(name)
    return NO_DATA.search("".join(words)) is not None or not SHORT_NO_DATA.isdisjoint(words)


def may_name_class(text: str) -> bool:
    """Return True unless a text tells annotators or versions apart: 1stho, expert2, refined."""
    return bool(text) and NO_CLASS.match(text) is None


# --- folders --------------------------------------------------------------------------------------


@functools.cache
def role_of_folder(name: str) -> str:
    """Return what a folder holds by its name: "mask", "image", or "" for all other names."""
    text = re.sub(NO_WORD, "", name.lower())
    words = words_of(text)
    joined = "".join(words)
    for role, long, short in (
        ("mask", MASK_WORD, SHORT_MASK_WORD),
        ("image", IMAGE_WORD, SHORT_IMAGE_WORD),
    ):
        is_short = any(re.fullmatch(short, word) for word in words)
        if is_short or re.search(long, joined):
            return role
    return ""


@functools.cache
def rest_of_folder(name: str) -> str:
    """Return the name of a folder without words of roles: "left" of leftMask, "a" of a_images."""
    rest = []
    for word in words_of(name):
        word = re.sub(f"{NO_WORD}|{MASK_WORD}|{IMAGE_WORD}", "", word)
        is_short = re.fullmatch(f"{SHORT_MASK_WORD}|{SHORT_IMAGE_WORD}", word)
        if word and not is_short:
            rest.append(SPLIT_NAMES.get(word, word))
    return " ".join(rest)


def split_in_words(name: str) -> str:
    """Return the split that a word of a folder names, "" if none: "train" of train_images."""
    for word in rest_of_folder(name).split():
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return ""


@functools.cache
def split_of_name(name: str) -> str:
    """Return the split that a folder is named after: "train" of Train and "a. Training Set".

    Names with any other word are none: test strips are not the test split.
    """
    words = []
    for word in words_of(name):
        word = re.sub("(data)?sets?$", "", word)
        if len(word) > 1 and word != "data":
            words.append(word)
    return SPLIT_NAMES.get(words[0], "") if len(words) == 1 else ""


@dataclass(frozen=True)
class File:
    """An image file, which may be an image or a mask."""

    path: Path
    folders: tuple[str, ...]  # in which it lies, within the folder of the user
    outer: tuple[str, ...] = ()  # folders around these that all files have in common

    @property
    def root(self) -> Path:
        """Return the folder of the user."""
        return self.path.parents[len(self.outer) + len(self.folders)]

    @property
    def name(self) -> str:
        """Return the path within the folder of the user."""
        return "/".join((*self.outer, *self.folders, self.path.name))

    @property
    def stem(self) -> str:
        return layouts.composed(self.path.stem).lower()

    def role_index(self) -> int | None:
        """Return the position of the innermost folder with a role, None if no folder has one."""
        for i in reversed(range(len(self.folders))):
            if role_of_folder(self.folders[i]):
                return i
        return None

    @property
    def role(self) -> str:
        i = self.role_index()
        return "" if i is None else role_of_folder(self.folders[i])

    @property
    def series(self) -> str:
        """Name the folder that makes this file a mask, without a split: "masks refined"."""
        i = self.role_index()
        words = [] if i is None else words_of(self.folders[i])
        return " ".join(word for word in words if word not in SPLIT_NAMES)

    @property
    def kind(self) -> str:
        """Return what the name of that folder says besides its role and split: "refined"."""
        i = self.role_index()
        words = [] if i is None else rest_of_folder(self.folders[i]).split()
        return " ".join(word for word in words if word not in SPLIT_NAMES)

    @property
    def split(self) -> str:
        for name in (*self.outer, *self.folders):
            if split_of_name(name):
                return split_of_name(name)
        i = self.role_index()
        return "" if i is None else split_in_words(self.folders[i])


def without_outer_folders(files: list[File]) -> list[File]:
    """Return the files without the folders that all of them lie in, as archives often have."""
    shared = commonprefix([file.folders for file in files])
    n = len(shared)
    return [replace(file, folders=file.folders[n:], outer=file.folders[:n]) for file in files]


def exact_place(file: File) -> tuple[str, ...]:
    """Return the folders of a file, the one with a role without the word of the role.

    An image and its mask have the same place: a_images/ and a_masks/, images/train/ and
    masks/train/.
    """
    role_index = file.role_index()
    place = []
    for i, name in enumerate(file.folders):
        part = rest_of_folder(name) if i == role_index else name
        if part:
            place.append(SPLIT_NAMES.get(part.lower(), part))
    return tuple(place)


def loose_place(file: File) -> tuple[str, ...]:
    """Return the folders of a file without all that have a role, but with their splits."""
    place = []
    for name in file.folders:
        part = split_in_words(name) if role_of_folder(name) else name
        if part:
            place.append(SPLIT_NAMES.get(part.lower(), part))
    return tuple(place)


# --- file names -----------------------------------------------------------------------------------


def without_image_words(stem: str) -> str:
    """Return a stem without words of images at its ends: "7" of img_7, "" of image."""
    word = rf"(?:{IMAGE_WORD}|{SHORT_IMAGE_WORD})"
    return re.sub(rf"^{word}(?:[\W_]+|$)|[\W_]+{word}$", "", stem)


def without_first_mask_words(stem: str) -> str:
    """Return a stem without words of masks at its beginning: "x_1" of mask_x_1."""
    word = f"(?:{MASK_WORD}|{SHORT_MASK_WORD})"
    return re.sub(rf"^(?:{word}(?:[\W_]+|$))+", "", stem)


def by_stem(files: list[File]) -> dict[str, File]:
    """Return {stem, and stem without words such as img: file}. The first of two files counts."""
    named = {}
    for file in files:
        named.setdefault(file.stem, file)

    short = {}
    for file in files:
        short.setdefault(without_image_words(file.stem), []).append(file)
    for stem, alike in short.items():
        if len(alike) == 1:
            named.setdefault(stem, alike[0])
    return named


def is_word_end(text: str, end: int) -> bool:
    """Return True if text[:end] ends where a word ends, or where a long word of masks begins."""
    rest = text[end:]
    return not rest or not rest[0].isalnum() or re.match(MASK_WORD, rest) is not None


def find_image(mask: File, images: dict[str, File]) -> tuple[File, str] | None:
    """Return the image of a mask and what the mask's name says beyond it; None without an image.

    images: see `by_stem`. The name of the image is at the beginning of the mask's name (x_mask),
    after a word of masks (mask_x) or at the end (liver_x). Of several images the one with the
    longest name is taken. A mask is never its own image.
    """
    forms = (mask.stem, without_first_mask_words(mask.stem))
    for form in forms:
        for end in reversed(range(len(form) + 1)):
            image = images.get(form[:end])
            if image not in (None, mask) and is_word_end(form, end):
                rest = addition(form[end:])
                if end or not rest:  # an image that is named by a word alone has no name
                    return image, rest

    for form in forms:
        for start in range(1, len(form)):
            image = images.get(form[start:])
            if image not in (None, mask) and not form[start - 1].isalnum():
                return image, addition(form[:start])
    return None


def addition(text: str) -> str:
    """Return the words of a text that are neither words of masks, numbers nor endings of files."""
    added = []
    for word in words_of(text):
        if not is_mask_word(word) and not word.isdigit() and f".{word}" not in layouts.ENDINGS:
            added.append(word)
    return " ".join(added)


def names_a_mask(stem: str) -> bool:
    """Return True if a word of a stem says that the file is a mask, as in x_mask_1 or xmask."""
    return any(
        is_mask_word(word) or re.search(f"(?:{MASK_WORD})$", word) for word in words_of(stem)
    )


def is_named_by_words_alone(stem: str) -> bool:
    """Return True for the name of a mask that names no image, such as mask or label_2."""
    return names_a_mask(stem) and not addition(stem)


def varying_parts(stems: list[str]) -> list[str]:
    """Return what is left of stems without their common beginning and end, which hold no digit."""
    start = re.sub(r"\d+$", "", commonprefix(stems))
    backwards = [stem[len(start) :][::-1] for stem in stems]
    end = re.sub(r"\d+$", "", commonprefix(backwards))
    return [text[len(end) :][::-1] for text in backwards]


def pair_by_pattern(images: list[File], masks: list[File]) -> dict[File, File]:
    """Return {mask: image} if both have names of one pattern each, such as 21_training and 21_gt.

    Returns {} unless every image has exactly one mask.
    """
    if len(images) != len(masks) or len(images) < 2:
        return {}
    image_parts = varying_parts([image.stem for image in images])
    mask_parts = varying_parts([mask.stem for mask in masks])
    by_part = dict(zip(image_parts, images, strict=True))
    if len(by_part) < len(images) or {*mask_parts} != {*by_part}:
        return {}
    return {mask: by_part[part] for mask, part in zip(masks, mask_parts, strict=True)}


Place = Callable[[File], tuple[str, ...]]
