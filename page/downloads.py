"""Make the files that the page offers: masks, overlay and measurements, as predict.py writes them.

A single phrase, and all models of classes, give the files of predict.py: the same pixels, columns
and numbers. Several phrases give one mask each, in a ZIP file, and one row of measurements each,
whose class is the phrase.
"""

import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from engine.evaluate import to_masks
from engine.measurement_table import MEASUREMENTS, MeasurementTable
from imaging import image_files, layouts, measurements, pictures
from page.session import Session
from prediction.volumes import class_endings


@dataclass(frozen=True)
class Result:
    """What a model found in an image, as the page shows it."""

    names: tuple[str, ...]  # of the n masks: phrases, or classes without the background
    masks: np.ndarray  # bool (n,H,W)
    rows: list[dict]  # n rows of measurements
    maps: list[Image.Image]  # the mask files: one with all classes, or one per phrase


def measure(
    session: Session, names: tuple, masks: np.ndarray, probabilities: np.ndarray, pixel_size
) -> list[dict]:
    """Return the rows of measurements of masks, bool (n,H,W); probabilities float32 (n,H,W).

    pixel_size: width and height of a pixel in mm, None if unknown.
    """
    measure_mask = partial(
        measurements.measure_image,
        grey=image_files.grey_levels(session.image),
        pixel_size=pixel_size,
    )
    return measurements.measure_classes(names, masks, probabilities, measure_mask)


def phrase_result(
    session: Session, answers: dict[str, np.ndarray], target: str, threshold: float, pixel_size
) -> Result:
    """Return the result for one or several phrases.

    answers: phrase -> probabilities, float32 (1,H,W). target: the model's class, which names the
    row of a single phrase. threshold: pixels above this probability belong to a mask.
    """
    probabilities = np.concatenate([*answers.values()])  # (n,H,W)
    masks = probabilities > threshold
    phrases = (*answers,)
    classes = (target,) if len(phrases) == 1 else phrases
    rows = measure(session, classes, masks, probabilities, pixel_size)
    maps = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return Result(phrases, masks, rows, maps)


def class_result(
    session: Session, probabilities: np.ndarray, classes: tuple, config, threshold, pixel_size
) -> Result:
    """Return the result of a model with classes.

    probabilities: float32 (K,H,W). classes: names, background first if there are several. config:
    of the model. threshold: of a single class, without effect on several.
    """
    names = layouts.foreground(classes)
    n = len(names)
    masks = to_masks(probabilities, replace(config, threshold=threshold))  # (K,H,W)
    if len(masks) > 1:
        mask_file = pictures.class_map(masks.argmax(0).astype(np.uint8), len(masks))
    else:
        mask_file = Image.fromarray(masks[0].astype(np.uint8) * 255)
    rows = measure(session, names, masks[-n:], probabilities[-n:], pixel_size)
    return Result(names, masks[-n:], rows, [mask_file])


# --- files ---------------------------------------------------------------------------------------


def write_masks(session: Session, result: Result, folder: Path) -> Path:
    """Write the mask into a folder, or a ZIP file of one mask per phrase. Return the file."""
    if len(result.maps) == 1:
        path = folder / f"{session.name}.png"
        pictures.save_picture(path, result.maps[0])
        return path

    path = folder / f"{session.name}_masks.zip"
    endings = class_endings([*result.names])
    with zipfile.ZipFile(path, "w") as archive:  # PNG files are compressed already
        for ending, mask in zip(endings, result.maps, strict=True):
            member = folder / "mask.png"
            pictures.save_picture(member, mask)
            archive.write(member, f"{session.name}{ending}.png")
            member.unlink()
    return path


def write_overlay(session: Session, overlay: Image.Image, folder: Path) -> Path:
    """Write an overlay into a folder. Return the file."""
    path = folder / f"{session.name}_overlay.png"
    pictures.save_picture(path, overlay)
    return path


def write_measurements(session: Session, result: Result, folder: Path) -> Path:
    """Write measurements.csv into a folder. Return the file."""
    classes = tuple(row["class"] for row in result.rows)
    path = folder / MEASUREMENTS
    table = MeasurementTable(path, measurements.IMAGE_COLUMNS, classes)
    table.add(session.name, result.rows)
    table.write([session.name])
    return path
