"""Measure masks: area or volume, components, bounding box, largest diameter, means inside.

A mask is measured on the pixels of the upright image, or on the voxels of its file as stored. A
pixel covers an area and a voxel a volume; distances go from corner to corner of them. docs/data.md
explains every column.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, distance

from imaging.files import read_csv
from imaging.nifti import Grid

IMAGE_COLUMNS = (
    "area_px",
    "area_mm2",
    "share_of_image",
    "components",
    "x0",
    "y0",
    "x1",
    "y1",
    "max_diameter_px",
    "max_diameter_mm",
    "mean_probability",
    "mean_grey",
    "pixel_width_mm",
    "pixel_height_mm",
)
VOLUME_COLUMNS = (
    "volume_voxels",
    "volume_ml",
    "share_of_volume",
    "components",
    "x0",
    "y0",
    "z0",
    "x1",
    "y1",
    "z1",
    "max_diameter_mm",
    "mean_probability",
    "mean_intensity",
)
DIGITS = 6  # significant digits of numbers that are not whole


def rounded(number: float) -> float:
    """Return a number with DIGITS significant digits."""
    return float(f"{number:.{DIGITS}g}")


# --- shape of a mask ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size and extent of a mask that is not empty. The axes are those of the array."""

    count: int  # pixels or voxels
    box: tuple[slice, ...]  # around the mask
    components: int  # connected by sides, edges or corners
    hull: np.ndarray  # float64 (N,n), corners of the largest component's convex hull, in pixels


def shape_of(mask: np.ndarray) -> Shape | None:
    """Return the shape of a mask, bool (H,W) or (X,Y,Z); None if it is empty."""
    (box,) = ndimage.find_objects(mask.view(np.uint8), max_label=1)
    if box is None:
        return None

    numbers, components = ndimage.label(mask[box], np.ones([3] * mask.ndim))
    sizes = component_sizes(numbers, components)
    largest = numbers == 1 + sizes.argmax()
    return Shape(int(sizes.sum()), box, components, convex_hull(largest))


def component_sizes(numbers: np.ndarray, components: int) -> np.ndarray:
    """Return the pixels of component 1, 2, …, int64 (components,); numbers int32, 0 is none.

    Counting needs 8 bytes per pixel, so a volume is counted in parts.
    """
    flat = numbers.ravel()
    sizes = np.zeros(1 + components, np.int64)
    for start in range(0, len(flat), 2**24):
        sizes += np.bincount(flat[start : start + 2**24], minlength=len(sizes))
    return sizes[1:]


def line_ends(mask: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last index of the mask in every line along an axis.

    Both are int arrays of the other axes, without meaning for lines that the mask does not meet.
    """
    first = mask.argmax(axis)
    behind = np.flip(mask, axis).argmax(axis)  # pixels after the last
    return first, mask.shape[axis] - 1 - behind


def corner_points(mask: np.ndarray) -> np.ndarray:
    """Return pixel corners of a mask that have the same convex hull as all of it, int (N,n).

    A corner of a pixel is left out if the mask goes on in its direction along any axis: it then
    lies between two other corners on a line, and is no corner of the hull.
    """
    ends = [line_ends(mask, axis) for axis in range(mask.ndim)]
    lines = np.argwhere(mask.any(0))  # (L,n-1), those along the first axis that meet the mask
    pixels = []
    for indices in ends[0]:
        pixels.append(np.column_stack([indices[tuple(lines.T)], lines]))
    pixels = np.concatenate(pixels)  # (2L,n)

    is_end = []  # for each axis: is a pixel the first, and is it the last of its line
    for axis, (first, last) in enumerate(ends):
        line = tuple(np.delete(pixels, axis, 1).T)
        position = pixels[:, axis]
        is_end.append((position == first[line], position == last[line]))

    corners = []
    for offset in itertools.product((0, 1), repeat=mask.ndim):
        is_corner = np.ones(len(pixels), bool)
        for axis, side in enumerate(offset):
            is_corner &= is_end[axis][side]
        corners.append(pixels[is_corner] + offset)
    return np.concatenate(corners)


def convex_hull(mask: np.ndarray) -> np.ndarray:
    """Return the corners of the convex hull of all pixels of a mask, float64 (N,n) in pixels.

    Pixels have an extent, so that even a single one or a line of them has a hull with an area.
    """
    hull = ConvexHull(corner_points(mask))
    return hull.points[hull.vertices]


BLOCK = 256  # points whose distances to all others are computed at once


def largest_distance(points: np.ndarray) -> float:
    """Return the greatest distance between two of N points (N,n)."""
    longest = 0.0
    for start in range(0, len(points), BLOCK):
        distances = distance.cdist(points[start : start + BLOCK], points)
        longest = max(longest, float(distances.max()))
    return longest


def mean_inside(values: np.ndarray | None, mask: np.ndarray, box: tuple) -> float | None:
    """Return the mean of values in a mask, both (H,W) or (X,Y,Z); None without values.

    box: the slices of the mask's bounding box.
    """
    if values is None:
        return None
    inside = values[box][mask[box]]
    return rounded(inside.mean(dtype=np.float64))


# --- size of pixels -------------------------------------------------------------------------------

SPACINGS = "spacing.csv"  # written by `prepare.py import` for DICOM images


def pixel_size_of(image: Path) -> tuple[float, float] | None:
    """Return width and height of an image's pixels in mm, None if they are unknown.

    They are in a table next to the image or next to its folder. Raises ValueError, one line, if the
    table is damaged.
    """
    for folder in (image.parent, image.parent.parent):
        table = folder / SPACINGS
        if table.is_file():
            return read_spacings(table).get(image.name)
    return None


@functools.lru_cache(maxsize=16)
def read_spacings(path: Path) -> dict[str, tuple[float, float]]:
    """Return {name of an image: (width, height) of its pixels in mm} of a spacing.csv."""
    spacings = {}
    for number, row in enumerate(read_csv(path), 2):
        try:
            width = float(row["x_mm"])
            height = float(row["y_mm"])
            name = row["image"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: expected the columns image,x_mm,y_mm"
            ) from None
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise ValueError(
                f"{path}, line {number}: {width:g} x {height:g} mm is no size of a pixel"
            )
        spacings[name] = (width, height)
    return spacings


# --- rows -----------------------------------------------------------------------------------------


def pixel_cells(pixel_size) -> dict:
    """Return the cells of a row that say how large a pixel is in mm; None if that is unknown."""
    width, height = pixel_size or (None, None)
    return {"pixel_width_mm": width, "pixel_height_mm": height}


def measure_image(
    mask: np.ndarray, probability: np.ndarray | None, grey: np.ndarray, pixel_size=None
) -> dict:
    """Return the IMAGE_COLUMNS of a mask, bool (H,W); cells without a value are None.

    probability: float (H,W). grey: uint8 (H,W). pixel_size: width and height of a pixel in mm.
    """
    row = dict.fromkeys(IMAGE_COLUMNS) | pixel_cells(pixel_size)
    row |= {"area_px": 0, "share_of_image": 0.0, "components": 0}
    if pixel_size is not None:
        row["area_mm2"] = 0.0
    shape = shape_of(mask)
    if shape is None:
        return row

    rows, columns = shape.box
    row |= {"x0": columns.start, "y0": rows.start, "x1": columns.stop - 1, "y1": rows.stop - 1}
    row["area_px"] = shape.count
    row["share_of_image"] = rounded(shape.count / mask.size)
    row["components"] = shape.components
    row["max_diameter_px"] = rounded(largest_distance(shape.hull))
    if pixel_size is not None:
        width, height = pixel_size
        row["area_mm2"] = rounded(shape.count * width * height)
        row["max_diameter_mm"] = rounded(largest_distance(shape.hull * (height, width)))
    row["mean_probability"] = mean_inside(probability, mask, shape.box)
    row["mean_grey"] = mean_inside(grey, mask, shape.box)
    return row


def measure_volume(
    mask: np.ndarray, probability: np.ndarray | None, intensity: np.ndarray, grid: Grid
) -> dict:
    """Return the VOLUME_COLUMNS of a mask, bool (X,Y,Z) in RAS; cells without a value are None.

    probability and intensity: float32 (X,Y,Z) in RAS. grid: of the file. Lengths are those of its
    affine, so that a tilted or sheared grid is measured correctly.
    """
    row = dict.fromkeys(VOLUME_COLUMNS)
    row |= {"volume_voxels": 0, "volume_ml": 0.0, "share_of_volume": 0.0, "components": 0}
    stored = grid.to_stored(mask)  # (X',Y',Z')
    shape = shape_of(stored)
    if shape is None:
        return row

    for name, side in zip("xyz", shape.box, strict=True):
        row[f"{name}0"] = side.start
        row[f"{name}1"] = side.stop - 1
    axes = grid.affine[:3, :3]  # mm of a step along each stored axis
    voxel_ml = abs(np.linalg.det(axes)) / 1000
    row["volume_voxels"] = shape.count
    row["volume_ml"] = rounded(shape.count * voxel_ml)
    row["share_of_volume"] = rounded(shape.count / mask.size)
    row["components"] = shape.components
    row["max_diameter_mm"] = rounded(largest_distance(shape.hull @ axes.T))

    if probability is not None:
        probability = grid.to_stored(probability)
    row["mean_probability"] = mean_inside(probability, stored, shape.box)
    row["mean_intensity"] = mean_inside(grid.to_stored(intensity), stored, shape.box)
    return row


def measure_classes(
    classes: Iterable[str], masks: Iterable[np.ndarray], probabilities, measure: Callable
) -> list[dict]:
    """Return a row for the mask of each of n classes.

    probabilities: (n,*size); None for a ground truth. measure: (mask, probability or None) -> the
    measurements of a row.
    """
    kind = "ground truth" if probabilities is None else "prediction"
    rows = []
    for k, (name, mask) in enumerate(zip(classes, masks, strict=True)):
        probability = None if probabilities is None else probabilities[k]
        rows.append({"class": name, "mask": kind} | measure(mask, probability))
    return rows
