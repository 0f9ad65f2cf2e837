"""Make the files that the page offers: masks, overlay and measurements, as predict.py writes them.

A single phrase, and all models of classes, give the files of predict.py: the same pixels, columns
and numbers. Several phrases give one mask each, in a ZIP file, and one row of measurements each,
whose class is the phrase.
"""

import zipfile
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from engine.evaluate import to_masks
from engine.measurement_table import MEASUREMENTS, MeasurementTable
from imaging import image_files, layouts, measurements, pictures
from page import drawing
from page.session import Session
from prediction.images import mask_picture
from prediction.volumes import class_endings


@dataclass(frozen=True)
class Result:
    """What a model found in an image, as the page shows it."""

    names: tuple[str, ...]  # of the n masks: phrases, or classes without the background
    classes: tuple[str, ...]  # of the n rows of measurements
    masks: np.ndarray  # bool (n,H,W)
    probabilities: np.ndarray  # float32 (n,H,W)
    pixel_size: tuple[float, float] | None  # width and height of a pixel in mm
    is_class_map: bool  # the masks exclude each other and are saved as one image

    @cached_property
    def areas(self) -> list[dict]:
        """Return the area_px, share_of_image and area_mm2 of each mask."""
        return [drawing.area_cells(mask, self.pixel_size) for mask in self.masks]


def phrase_result(
    answers: dict[str, np.ndarray], target: str, threshold: float, pixel_size
) -> Result:
    """Return the result for one or several phrases.

    answers: phrase -> probabilities, float32 (1,H,W). target: the model's class, which names the
    row of a single phrase. threshold: pixels above this probability belong to a mask.
    """
    probabilities = np.concatenate([*answers.values()])  # (n,H,W)
    masks = probabilities > threshold
    phrases = (*answers,)
    classes = (target,) if len(phrases) == 1 else phrases
    return Result(phrases, classes, masks, probabilities, pixel_size, is_class_map=False)


def class_result(
    probabilities: np.ndarray, classes: tuple, config, threshold: float, pixel_size
) -> Result:
    """Return the result of a model with classes.

    probabilities: float32 (K,H,W). classes: names, background first if there are several. config:
    of the model. threshold: of a single class, without effect on several.
    """
    names = layouts.foreground(classes)
    n = len(names)
    masks = to_masks(probabilities, replace(config, threshold=threshold))[-n:]  # (n,H,W)
    is_class_map = len(probabilities) > 1
    return Result(names, names, masks, probabilities[-n:], pixel_size, is_class_map)


# --- files ---------------------------------------------------------------------------------------


def write_masks(session: Session, result: Result, folder: Path) -> Path:
    """Write the mask into a folder, or a ZIP file of one mask per phrase. Return the file."""
    n = len(result.masks)
    if n == 1 or result.is_class_map:
        path = folder / f"{session.name}.png"
        mask = class_picture(result.masks) if result.is_class_map else mask_picture(result.masks)
        pictures.save_picture(path, mask)
        return path

    path = folder / f"{session.name}_masks.zip"
    endings = class_endings([*result.names])
    with zipfile.ZipFile(path, "w") as archive:  # PNG files are compressed already
        for ending, mask in zip(endings, result.masks, strict=True):
            archive.writestr(f"{session.name}{ending}.png", pictures.png(mask.view(np.uint8) * 255))
    return path


def class_picture(masks: np.ndarray) -> Image.Image:
    """Return masks that exclude each other, bool (n,H,W), as an image of class indices."""
    indices = np.zeros(masks.shape[1:], np.uint8)
    for index, mask in enumerate(masks, 1):
        indices[mask] = index
    return pictures.class_map(indices, 1 + len(masks))


def write_overlay(session: Session, overlay: Image.Image, folder: Path) -> Path:
    """Write an overlay into a folder. Return the file."""
    path = folder / f"{session.name}_overlay.png"
    pictures.save_picture(path, overlay)
    return path


def write_measurements(session: Session, result: Result, folder: Path) -> Path:
    """Write measurements.csv into a folder. Return the file."""
    measure = partial(
        measurements.measure_image,
        grey=image_files.grey_levels(session.image),
        pixel_size=result.pixel_size,
    )
    rows = measurements.measure_classes(result.classes, result.masks, result.probabilities, measure)
    table = MeasurementTable(folder / MEASUREMENTS, measurements.IMAGE_COLUMNS, result.classes)
    table.add(session.name, rows)
    table.write([session.name])
    return table.path
