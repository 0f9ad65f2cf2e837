"""The ways in which `prepare.py import` can read a user's folder.

Each format, such as COCO, recognises its folders and returns readings: lists of cases whose files
are decoded only when they are written. preparation/import_folder.py chooses a reading and writes it
in our layout.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imaging import layouts

SPLIT_NAMES = layouts.SPLITS | {"training": "train", "testing": "test"}
IGNORED = "(ignored)"  # class_name of pixels that do not count in training


@dataclass(frozen=True)
class Object:
    """The pixels of one object, or of all objects of a class, in one image."""

    # "" if there is only one kind of object and the folder does not name it, or IGNORED
    class_name: str
    mask: np.ndarray  # bool (H,W)


@dataclass(frozen=True)
class Case:
    """An image and its objects."""

    name: str  # path within the folder, without an ending: a name for the files to be written
    image: Path  # the image file; with `read_pixels` any file to name in messages
    # Return the objects of the upright image of size (H, W), in the order in which they are drawn:
    # a later object covers earlier ones of other classes. [] for an image without objects.
    read_objects: Callable[[tuple[int, int]], list[Object]]
    split: str = ""  # "train", "val" or "test"; "" if the folder does not say
    group: str = ""  # the patient; "" if the folder does not say
    # Return the pixels, uint8 (H,W) or (H,W,3), of an image file that Pillow does not read.
    read_pixels: Callable[[], np.ndarray] | None = None
    spacing: tuple[float, float] | None = None  # of a pixel, in mm along a row and a column


@dataclass(frozen=True)
class ImageReading:
    """A folder of 2-D images and masks, as one format reads it."""

    format: str  # its name on the command line
    summary: list[str]  # what was recognised, with counts; the first line in about 80 characters
    cases: list[Case]
    classes: tuple[str, ...] = ()  # of the objects, by class index from 1; () for one unnamed class
    tables: dict[str, object] = field(default_factory=dict)  # JSON file to write -> its content
    has_masks: bool = True  # False: images alone, for predict.py


@dataclass(frozen=True)
class VolumeCase:
    """A volume and its labels."""

    name: str  # as in Case
    write_image: Callable[[Path], None]  # write the volume to NAME.nii.gz
    # Write the label map to NAME.nii.gz; second argument: the volume that has been written. None
    # for a volume without labels.
    write_labels: Callable[[Path, Path], None] | None
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class VolumeReading:
    """A folder of 3-D volumes and label maps, as one format reads it."""

    format: str
    summary: list[str]
    cases: list[VolumeCase]
    labels: dict[str, str]  # {"0": "background", "1": "liver", …}, as in dataset.json
    modality: str  # "CT", "MR" or what the files say


Reading = ImageReading | VolumeReading


@dataclass(frozen=True)
class Format:
    """A kind of folder that can be imported.

    `recognise(folder, args)` returns the ways to read a folder, [] if it has another format. It
    raises ValueError or FileNotFoundError, one line, if a folder has this format but is damaged.
    """

    name: str  # of --format, such as "coco"
    about: str  # one line for --help
    recognise: Callable[[Path, Namespace], list[Reading]]


def count(n: int, noun: str) -> str:
    """Return "1 image" or "2 images"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def split_of_folder(path: Path) -> str:
    """Return the split that a folder on a relative path is named after, "" if there is none."""
    for part in path.parts:
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return ""
