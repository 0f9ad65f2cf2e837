"""Read LabelMe's files, for `prepare.py import`: one JSON file for each image, version 4 and later.

    {"version", "shapes": [{"label", "points", "shape_type", "group_id", "mask"}, …],
     "imagePath", "imageData", "imageHeight", "imageWidth"}

- Areas are polygon, rectangle, oriented_rectangle, circle and mask. Points, lines and linestrips
  cover no pixels: they are skipped and counted. Any other type is an error.
- Shapes of one label and one group_id are the parts of one object. Groups are not patients.
- The classes are the labels in alphabetical order.
- The image is the file that imagePath names, beside the JSON file or elsewhere in FOLDER; without
  it, the pixels are those in imageData.
- Coordinates are those of the upright photo, which LabelMe shows.
"""

import base64
import binascii
import io
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from imaging import image_files
from imaging.files import read_json
from preparation import shapes, tool_exports
from preparation.readings import Format, Reading
from preparation.shapes import errors_at, list_of, text_of, value_of, whole_number
from preparation.tool_exports import Export, ImageIndex, ListedImage, Shape

TITLE = "LabelMe JSON"
KEYS = ('"shapes"', '"imagePath"')
NO_AREAS = ("point", "points", "line", "linestrip")


def recognise(folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder with LabelMe's JSON files, [] for other folders."""
    images = []
    skipped = Counter()  # types of shapes that are no areas
    for path, content in tool_exports.json_files(folder, args, "{", KEYS):
        if "shapes" in content and "imagePath" in content:
            images.append(read_file(path, content, skipped))
    if not images:
        return []

    classes = tool_exports.labels_of(images)
    notes = tool_exports.counted("shapes that are no areas, skipped", skipped)
    export = Export("labelme", TITLE, images[0].file, images, classes, notes)
    return [tool_exports.reading(export, ImageIndex(folder), args)]


def read_file(path: Path, content: dict, skipped: Counter) -> ListedImage:
    """Return the image of a LabelMe file; shapes that are no areas are counted in `skipped`."""
    with errors_at(str(path)):
        name = text_of(content, "imagePath")
        items = list_of(content, "shapes")
        size = None
        if content.get("imageHeight") is not None:
            height = whole_number(content["imageHeight"])
            size = (height, whole_number(content.get("imageWidth")))

    parts = {}  # label and group, or the number of a shape without one -> drawing functions
    locations = {}
    for number, item in enumerate(items):
        location = f"{path}, shape {number}"
        with errors_at(location):
            label = text_of(item, "label")
            kind = text_of(item, "shape_type") if "shape_type" in item else "polygon"
            if kind in NO_AREAS:
                skipped[kind] += 1
                continue
            key = (label, number, "alone")
            if item.get("group_id") is not None:
                key = (label, value_of(item, "group_id", int | str, "a number"), "group")
            parts.setdefault(key, []).append(drawing(item, kind))
            locations.setdefault(key, location)

    objects = []
    for key, functions in parts.items():
        objects.append(Shape(key[0], partial(draw_union, functions), locations[key]))
    read_pixels = partial(read_embedded, path) if content.get("imageData") else None
    return ListedImage(name, path, str(path), size, objects, read_pixels=read_pixels)


def drawing(item: dict, kind: str):
    """Return the function that draws a shape. Raises ValueError if it is damaged or unknown."""
    corners = shapes.points(list_of(item, "points"))
    if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(corners) == 4):
        if len(corners) < 3:
            raise ValueError(f"is a {kind} of {len(corners)} points")
        return partial(shapes.polygons, [corners])
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"has the unknown type {kind}; known areas are polygon, rectangle, circle")
    if len(corners) != 2:
        raise ValueError(f"is a {kind} of {len(corners)} points, expected 2")

    start, end = corners
    if kind == "circle":
        radius = float(np.hypot(*(end - start)))
        return partial(shapes.ellipse, (*start, radius, radius, 0))
    if kind == "rectangle":
        box = (*start, *end)
        return partial(shapes.polygons, [shapes.box_outline(box, 0, (0, 0))])
    text = value_of(item, "mask", str, "a text, the PNG file in base64")
    return partial(draw_mask, text, start.astype(int), end.astype(int))


def draw_union(functions: list, size: tuple[int, int]) -> np.ndarray:
    """Return the union of the parts of an object."""
    mask = np.zeros(size, bool)
    for draw in functions:
        mask |= draw(size)
    return mask


def draw_mask(text: str, start, end, size: tuple[int, int]) -> np.ndarray:
    """Return a mask that is a small PNG file in base64, from one pixel to another, both inside."""
    left, top = start
    right, bottom = end
    if left < 0 or top < 0 or right >= size[1] or bottom >= size[0]:
        raise ValueError(f"the mask at {left}, {top} to {right}, {bottom} leaves its image")
    values = np.asarray(open_base64(text, "mask"))
    shape = (bottom - top + 1, right - left + 1)
    if values.shape[:2] != shape or values.ndim != 2:
        raise ValueError(
            f"the mask has {values.shape[1]}x{values.shape[0]} pixels, its corners say "
            f"{shape[1]}x{shape[0]}"
        )
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = values > 0
    return mask


def open_base64(text: str, key: str) -> Image.Image:
    """Return the image file in a text in base64, decoded. Raises ValueError if it is damaged."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{key} is not an image file in base64") from None
    return image


def read_embedded(path: Path) -> np.ndarray:
    """Return the pixels in the imageData of a LabelMe file, uint8 (H,W,3), upright."""
    content = read_json(path)
    with errors_at(str(path)):
        image = open_base64(value_of(content, "imageData", str, "a text"), "imageData")
    return image_files.as_rgb(image_files.turn_upright(image), path)[0]


FORMAT = Format("labelme", "LabelMe, a JSON file for each image", recognise)
