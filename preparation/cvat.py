"""Read "CVAT for images 1.1", for `prepare.py import`: annotations.xml and the images.

    <annotations><meta>…<label><name>polyp</name></label>…</meta>
      <image name="a.png" width="640" height="480" subset="Train">
        <polygon label="polyp" points="1.0,2.0;3.0,4.0;…" z_order="0"/> <box/> <ellipse/> <mask/>

- Areas are polygon, box, ellipse and mask. All others, such as points, polyline and tag, cover no
  pixels: they are skipped and counted.
- Shapes are drawn by z_order, and those of the same z_order in the order of the file.
- The classes are in the order of the project's labels. Subsets become splits.
- Coordinates are those of the upright photo, which CVAT shows.
- A file with a DOCTYPE is refused: CVAT writes none, and entities can fill the memory.
"""

import re
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from imaging.files import read_text
from preparation import shapes, tool_exports
from preparation.readings import Format, Reading
from preparation.shapes import errors_at, number, whole_number
from preparation.tool_exports import Export, ImageIndex, ListedImage, Shape

TITLE = "CVAT XML"
# Types of labels that never have an area.
NO_AREAS = ("points", "polyline", "skeleton", "tag", "cuboid")


def recognise(folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder with CVAT's XML files, [] for other folders."""
    images = []
    classes = []
    skipped = Counter()  # kinds of shapes that are no areas
    for path in tool_exports.files_ending(folder, ".xml", args):
        if not re.search(r"<annotations[\s>]", tool_exports.text_around(path)):
            continue
        root = parse(path)
        if root.tag != "annotations":
            continue
        if root.find("track") is not None:
            raise ValueError(
                f'{path}: is "CVAT for video" with tracks; export the task again as "CVAT for '
                'images 1.1"'
            )
        names = label_names(root)
        classes += [name for name in names if name not in classes]
        images += read_images(path, root, names, skipped)
    if not images:
        return []

    notes = tool_exports.counted("shapes that are no areas, skipped", skipped)
    export = Export("cvat", TITLE, images[0].file, images, tuple(classes), notes)
    return [tool_exports.reading(export, ImageIndex(folder), args)]


def parse(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. Raises ValueError if it is damaged or has a DOCTYPE."""
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: has a DOCTYPE, which CVAT does not write; export it again")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: is not valid XML ({error}); export it again") from None


def label_names(root: ElementTree.Element) -> list[str]:
    """Return the labels of a task or project in their order, or those in use, sorted.

    Labels of points, skeletons and other kinds without an area, and parts of skeletons, are left
    out unless a shape with an area has them.
    """
    used = set()
    for image in root.iter("image"):
        used |= {shape.get("label", "").strip() for shape in image if shape.tag in DRAWINGS}

    names = []
    for label in root.iterfind("meta//label"):
        name = (label.findtext("name") or "").strip()
        has_area = label.findtext("type") not in NO_AREAS and label.find("parent") is None
        if name and name not in names and (has_area or name in used):
            names.append(name)
    return names or sorted(used)


def read_images(path: Path, root, names: list[str], skipped: Counter) -> list[ListedImage]:
    """Return the images of a file; shapes that are no areas are counted in `skipped`."""
    images = []
    for count, image in enumerate(root.iter("image")):
        location = f"{path}, image {count}"
        with errors_at(location):
            name = attribute(image, "name")
            size = (
                whole_number(attribute(image, "height")),
                whole_number(attribute(image, "width")),
            )
            layers = []  # (z_order, shape)
            for shape in image:
                if shape.tag in DRAWINGS:
                    drawn = read_shape(shape, f"{path}, {name}", names)
                    layers.append((int(number(shape.get("z_order", "0"))), drawn))
                else:
                    skipped[shape.tag] += 1

        layers.sort(key=lambda layer: layer[0])  # a stable sort
        drawn = [layer[1] for layer in layers]
        subset = image.get("subset", "").strip()
        images.append(ListedImage(name, path, location, size, drawn, subset))
    return images


def attribute(element: ElementTree.Element, name: str) -> str:
    """Return an attribute of an element. Raises ValueError if it is missing or empty."""
    value = element.get(name, "").strip()
    if not value:
        raise ValueError(f"<{element.tag}> has no {name}")
    return value


def read_shape(element: ElementTree.Element, location: str, names: list[str]) -> Shape:
    """Return a shape with an area. Raises ValueError if it is damaged or has an unknown label."""
    label = attribute(element, "label")
    if label not in names:
        raise ValueError(f"the label {label} is not among {', '.join(names)}")
    draw = DRAWINGS[element.tag](element)
    return Shape(label, draw, f"{location}, {element.tag} {label}")


def polygon(element: ElementTree.Element):
    """Return the function that draws a polygon."""
    corners = []
    for point in attribute(element, "points").split(";"):
        corners.append(point.split(","))
    outline = shapes.points(corners)
    if len(outline) < 3:
        raise ValueError(f"a polygon has {len(outline)} points")
    return partial(shapes.polygons, [outline])


def box(element: ElementTree.Element):
    """Return the function that draws a box, which may be turned around its centre."""
    sides = [number(attribute(element, name)) for name in ("xtl", "ytl", "xbr", "ybr")]
    centre = ((sides[0] + sides[2]) / 2, (sides[1] + sides[3]) / 2)
    angle = number(element.get("rotation", "0"))
    return partial(shapes.polygons, [shapes.box_outline(sides, angle, centre)])


def ellipse(element: ElementTree.Element):
    """Return the function that draws an ellipse, which may be turned around its centre."""
    values = [number(attribute(element, name)) for name in ("cx", "cy", "rx", "ry")]
    angle = number(element.get("rotation", "0"))
    return partial(shapes.ellipse, (*values, angle))


def mask(element: ElementTree.Element):
    """Return the function that draws a mask: run lengths, row by row, within a box."""
    place = [whole_number(attribute(element, name)) for name in ("left", "top", "width", "height")]
    counts = [whole_number(text) for text in attribute(element, "rle").split(",")]
    return partial(draw_mask, place, counts)


def draw_mask(place: list[int], counts: list[int], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of run lengths within the box left, top, width, height."""
    left, top, width, height = place
    if left + width > size[1] or top + height > size[0]:
        raise ValueError(f"the box {left}, {top}, {width}x{height} leaves its image")
    whole = np.zeros(size, bool)
    whole[top : top + height, left : left + width] = shapes.from_counts(
        counts, (height, width), "C"
    )
    return whole


DRAWINGS = {"polygon": polygon, "box": box, "ellipse": ellipse, "mask": mask}

FORMAT = Format("cvat", "CVAT for images 1.1, an XML file", recognise)
