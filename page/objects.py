"""Segment the objects that a user has clicked on with SAM, and make the files that the page offers.

The mask is the one that predict.py writes for the saved clicks; a numbered mask, in which every
object has its own value, and a row of measurements for each object are added.
"""

import math
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import tables
from engine.evaluate import to_masks
from engine.measurement_table import MEASUREMENTS
from imaging import image_files, measurements, pictures
from page import downloads, drawing
from page.clicks import Clicks, draw_clicks, prompt_files
from page.session import MODELS, Session
from page.settings import class_names
from prediction.images import mask_picture
from prediction.models import LoadedModel
from recipes.sam import prompt_tensors


@dataclass(frozen=True)
class Objects:
    """The clicks into an image, and SAM's output for the objects that they name."""

    clicks: Clicks
    loaded: LoadedModel
    item: dict  # of the image, with its features and the prompts
    output: tuple | None  # masks (Q,1,1,s,s), logits, and their estimated IoU; None without objects
    encoding_seconds: float  # 0 if the image's features were in memory
    prompt_seconds: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the model's classes, background first if there are several."""
        return self.item["classes"]

    def class_of(self, k: int) -> str:
        """Return the name of the class of object k, from 0."""
        return self.classes[self.clicks.complete[k].label if len(self.classes) > 1 else 0]

    def probabilities(self, k: int) -> np.ndarray:
        """Return the probabilities of object k at the image's size, float32 (H,W)."""
        masks, iou = self.output
        output = (masks[k : k + 1], iou[k : k + 1])
        with torch.no_grad():
            result = self.loaded.recipe.predict_each(self.loaded.model, self.item, output)
        return result[0].float().cpu().numpy()

    def masks(self, threshold: float) -> np.ndarray:
        """Return the masks of Q objects, bool (Q,H,W)."""
        masks = np.zeros((len(self.clicks.complete), *self.clicks.size), bool)
        for k, mask in enumerate(masks):
            mask[:] = self.probabilities(k) > threshold
        return masks

    def numbered(self, threshold: float) -> np.ndarray:
        """Return the number of the most probable object of each pixel, from 1: uint8 (H,W)."""
        numbers = np.zeros(self.clicks.size, np.uint8)
        highest = np.full(self.clicks.size, threshold, np.float32)
        for k in range(len(self.clicks.complete)):
            probabilities = self.probabilities(k)
            is_higher = probabilities > highest
            numbers[is_higher] = k + 1
            highest[is_higher] = probabilities[is_higher]
        return numbers

    def class_probabilities(self, threshold: float) -> np.ndarray:
        """Return the probabilities of the classes as the recipe combines objects, (K,H,W).

        Each class has the maximum of its objects; of several classes, the background has the
        threshold.
        """
        K = len(self.classes)
        classes = np.zeros((max(2, K), *self.clicks.size), np.float32)
        classes[0] = threshold
        for k, clicked in enumerate(self.clicks.complete):
            np.maximum(classes[clicked.label], self.probabilities(k), out=classes[clicked.label])
        return classes if K > 1 else classes[1:]


def segment(session: Session, loaded: LoadedModel, clicks: Clicks) -> Objects:
    """Segment the complete objects of clicks. The image is encoded once for each model."""
    with MODELS, torch.no_grad():
        start = time.perf_counter()
        item = session.item(loaded) | {"classes": class_names(loaded)}
        encoded = time.perf_counter()
        item |= prompt_tensors(clicks.prompts(), clicks.size, loaded.config)
        _, output = loaded.recipe.predict(loaded.model, item)
        end = time.perf_counter()
    return Objects(clicks, loaded, item, output, encoded - start, end - encoded)


def areas(objects: Objects, masks: np.ndarray, pixel_size) -> list[dict]:
    """Return number, class and area of each object, for the page.

    masks: bool (Q,H,W). pixel_size: width and height of a pixel in mm, None if unknown.
    """
    rows = []
    for k, mask in enumerate(masks):
        names = {"object": k + 1, "class": objects.class_of(k)}
        rows.append(names | drawing.area_cells(mask, pixel_size))
    return rows


def no_masks(clicks: Clicks) -> np.ndarray:
    """Return no masks for an image without objects, bool (0,H,W)."""
    return np.zeros((0, *clicks.size), bool)


SMALLEST_PREVIEW = 700  # pixels of the longer side; smaller images are hard to click into


def preview_scale(size: tuple[int, int]) -> float:
    """Return the factor from an image (H,W) to its preview: a whole number, or one over it."""
    longest = max(size)
    if longest > drawing.LARGEST_PREVIEW:
        return 1 / math.ceil(longest / drawing.LARGEST_PREVIEW)
    return float(max(1, SMALLEST_PREVIEW // longest))


def preview(image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return previews of an image, uint8 (H,W,3), and its masks, bool (Q,H,W), and their scale."""
    scale = preview_scale(image.shape[:2])
    if scale < 1:
        return drawing.preview(image), drawing.preview_masks(masks, image), scale

    zoom = round(scale)
    large_image = image.repeat(zoom, 0).repeat(zoom, 1)
    large_masks = masks.repeat(zoom, 1).repeat(zoom, 2)
    return large_image, large_masks, scale


def picture(
    image: np.ndarray, masks: np.ndarray, clicks: Clicks, opacity: float, scale: float = 1.0
) -> Image.Image:
    """Return an image, or its preview, with masks and clicks drawn on.

    image: uint8 (h,w,3). masks: bool (Q,h,w). scale: of the preview to the image.
    """
    colours = pictures.class_colours(len(masks))
    drawn = pictures.draw_masks(image, masks, colours, opacity, has_outline=True)
    draw_clicks(drawn, clicks, scale)
    return drawn


# --- files ----------------------------------------------------------------------------------------


def write_mask(session: Session, objects: Objects, threshold: float, folder: Path) -> Path:
    """Write the mask as predict.py does: 0 and 255, or class indices. Return the file."""
    config = replace(objects.loaded.config, threshold=threshold)
    masks = to_masks(objects.class_probabilities(threshold), config)  # (K,H,W)
    path = folder / f"{session.name}.png"
    pictures.save_picture(path, mask_picture(masks))
    return path


def write_numbered(session: Session, objects: Objects, threshold: float, folder: Path) -> Path:
    """Write the numbers of the objects, 0 outside of all, as an image. Return the file."""
    numbers = objects.numbered(threshold)
    path = folder / f"{session.name}_objects.png"
    pictures.save_picture(path, pictures.class_map(numbers, 1 + len(objects.clicks.complete)))
    return path


def write_picture(
    session: Session, objects: Objects, threshold: float, opacity: float, folder: Path
) -> Path:
    """Write the image with masks and clicks drawn on, at its own size. Return the file."""
    drawn = picture(session.image, objects.masks(threshold), objects.clicks, opacity)
    return downloads.write_overlay(session, drawn, folder)


def write_measurements(
    session: Session, objects: Objects, threshold: float, pixel_size, folder: Path
) -> Path:
    """Write measurements.csv, a row for each object. Return the file.

    pixel_size: width and height of a pixel in mm, None if unknown.
    """
    grey = image_files.grey_levels(session.image)
    rows = []
    for k, mask in enumerate(objects.masks(threshold)):
        names = {"name": session.name, "object": k + 1, "class": objects.class_of(k)}
        row = measurements.measure_image(mask, objects.probabilities(k), grey, pixel_size)
        rows.append(names | {"mask": "prediction"} | row)

    path = folder / MEASUREMENTS
    tables.write_csv(path, rows)
    return path


def write_clicks(session: Session, objects: Objects, folder: Path) -> Path:
    """Write the clicks for predict.py: boxes.csv or points.csv, or both in a ZIP file.

    Return the file.
    """
    contents = prompt_files(objects.clicks, session.name, objects.classes)
    if len(contents) == 1:
        ((kind, text),) = contents.items()
        path = folder / f"{session.name}_{kind}.csv"
        path.write_text(text, encoding="utf-8")
        return path

    path = folder / f"{session.name}_clicks.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, text in contents.items():
            archive.writestr(f"{session.name}_{kind}.csv", text)
    return path
