"""ISIC 2016 (skin lesions) and DFU 2022 (foot ulcers) for the medvlsm study.

ISIC: the four archives of part 1 of the challenge, images `ISIC_0000000.jpg` and masks
`ISIC_0000000_Segmentation.png`, 900 for training and 379 for tests. The study's annotations list
three images for training as test images, too, and one twice for training. Its files of 2023 have
1279 different running numbers, in the order of the names, with other names in these places: so the
four are probably copies of images under other names. Nothing is renamed here; --fix-splits leaves
such images out of train.

DFU: `DFUC2022_train_images/100001.jpg` and `DFUC2022_train_masks/100001.png`. The masks of the
challenge's test images are not public: all three splits are cut from its training images.

What was compared with real files: the names and counts of the annotations, no image. The archives
could not be downloaded here.
"""

from argparse import Namespace
from collections import ChainMap

from preparation import medvlsm
from preparation.archives import Archive
from preparation.medvlsm import Conversion, DataSet, Files, Splits, files_by_stem

ISIC = DataSet(
    name="isic",
    title="ISIC 2016, skin lesions in dermoscopy",
    archive="ISBI2016_ISIC_Part1_{Training,Test}_{Data,GroundTruth}.zip, four of them",
    counts={"train": 810, "val": 90, "test": 379},
    split_source="test: the ISIC 2016 challenge; val: a random tenth of its training images, by "
    "medvlsm's authors",
    older_name="isic_90_10_d",
)
ISIC_PARTS = ("ISBI2016_ISIC_Part1_Training", "ISBI2016_ISIC_Part1_Test")
FIRST_TEST_NUMBER = 900  # of the running numbers of 2023; images for training come before
ENDING = "_Segmentation"

DFU = DataSet(
    name="dfu",
    title="DFU 2022, foot ulcers in photographs",
    archive="DFUC2022_train_release.zip",
    counts={"train": 1600, "val": 200, "test": 200},
    split_source="a random split of the challenge's training images, by the medvlsm study",
    older_name="dfu-2022_80_10_10",
)


# --- ISIC -----------------------------------------------------------------------------------------


def isic_files(opened: list[Archive]) -> tuple[list[Files], list[Files]]:
    """Return the images and the masks, for training and for tests, by the stem of the image.

    Raises FileNotFoundError or ValueError, one line.
    """
    images = []
    masks = []
    for part in ISIC_PARTS:
        images.append(files_by_stem(opened, (f"{part}_Data",))[0])
        named, _ = files_by_stem(opened, (f"{part}_GroundTruth",))
        masks.append({stem.removesuffix(ENDING): file for stem, file in named.items()})
    return images, masks


def with_isic_names(splits: Splits, images: list[Files], place: str) -> Splits:
    """Return annotations of 2023, running numbers, with the names of ISIC.

    images: for training and for tests. place: the archives, for messages. Raises ValueError, one
    line, for other names.
    """
    training = sorted(images[0])
    tests = sorted(images[1])
    stems = dict(enumerate(training)) | dict(enumerate(tests, FIRST_TEST_NUMBER))
    names = {number: (f"{stem}.jpg", f"{stem}{ENDING}.png") for number, stem in stems.items()}
    available = (
        f"{place}: has {len(training)} images for training (from 0) and {len(tests)} for tests "
        f"(from {FIRST_TEST_NUMBER})"
    )
    return medvlsm.with_names_of_archive(splits, names, available)


def plan_isic(opened: list[Archive], splits: Splits, is_older: bool, args: Namespace) -> Conversion:
    """Return the conversion of ISIC; see medvlsm.Plan."""
    image_parts, mask_parts = isic_files(opened)
    place = ", ".join(str(archive.path) for archive in opened)
    if is_older:
        splits = with_isic_names(splits, image_parts, place)
    images = ChainMap(*image_parts), f"{place}, images"
    masks = ChainMap(*mask_parts), f"{place}, masks"
    return medvlsm.plan_pairs(ISIC, splits, images, masks)


# --- DFU ------------------------------------------------------------------------------------------


def plan_dfu(opened: list[Archive], splits: Splits, is_older: bool, args: Namespace) -> Conversion:
    """Return the conversion of DFU; see medvlsm.Plan."""
    images = files_by_stem(opened, ("DFUC2022_train_images",))
    masks = files_by_stem(opened, ("DFUC2022_train_masks",))
    return medvlsm.plan_pairs(DFU, splits, images, masks)


def options(command) -> None:
    """Add the commands `prepare.py isic` and `prepare.py dfu`."""
    medvlsm.add_command(command, ISIC, plan_isic, "--raw takes all four archives.")
    medvlsm.add_command(command, DFU, plan_dfu)
