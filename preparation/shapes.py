"""Turn the shapes of annotation tools into masks: polygons, ellipses and run-length codes.

Coordinates are x, y in pixels from the left upper corner of the image, so that the centre of the
first pixel is at (0.5, 0.5). A pixel belongs to a shape if its centre lies inside. What lies
outside of the image is cut off. Masks are bool (H,W) and sizes (H, W). All errors are ValueErrors,
one line, without the place: the caller adds it (`errors_at`).
"""

import math
from contextlib import contextmanager

import numpy as np

from imaging import layouts

FARTHEST = 1e6  # pixels; coordinates beyond it are errors, not shapes that leave the image


# --- values ---------------------------------------------------------------------------------------


@contextmanager
def errors_at(location: str):
    """Put a place, such as "a.json, annotation 3", in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        message = f"{location}: {error}"
        raise ValueError(" ".join(message.splitlines())) from None  # values may have line breaks


def value_of(item: dict, key: str, kinds, about: str):
    """Return the value of a key of a JSON object.

    kinds: the types that it may have, as for isinstance. about: the same in words, "a text". Raises
    ValueError if the item is no object, lacks the key or has a value of another type.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, not {layouts.json_type(item)}")
    if key not in item:
        raise ValueError(f"has no {key}")
    value = item[key]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{key} is {layouts.json_type(value)}, expected {about}")
    return value


def list_of(item: dict, key: str) -> list:
    """Return the list under a key of a JSON object. Raises ValueError as `value_of` does."""
    return value_of(item, key, list, "a list")


def text_of(item: dict, key: str) -> str:
    """Return the text under a key, without blanks around it. Raises ValueError if it is empty."""
    text = value_of(item, key, str, "a text").strip()
    if not text:
        raise ValueError(f"{key} is empty")
    return text


def number(value, largest: float = FARTHEST) -> float:
    """Return a JSON number, or the text of one, from -largest to largest."""
    try:
        if isinstance(value, bool):
            raise ValueError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not a number") from None
    if not abs(result) <= largest:  # NaN, too
        raise ValueError(f"{result:g} is far outside of any image")
    return result


def whole_number(value) -> int:
    """Return a JSON number, or the text of one, that is a count: whole and not negative."""
    result = number(value, largest=2**53)
    if result < 0 or result != int(result):
        raise ValueError(f"{value} is not a whole number from 0")
    return int(result)


def points(values: list) -> np.ndarray:
    """Return points as float64 (n,2). values: [[x, y], …] or [x0, y0, x1, y1, …]."""
    flat = []
    for value in values:
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError(f"a point has {len(value)} coordinates, not two")
            flat += [number(part) for part in value]
        else:
            flat.append(number(value))

    if len(flat) % 2:
        raise ValueError(f"an outline has {len(flat)} coordinates, an odd number")
    return np.array(flat, np.float64).reshape(-1, 2)


# --- outlines -------------------------------------------------------------------------------------


def polygon(outline: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a polygon (n,2); of one that crosses itself, by the even-odd rule.

    `pycocotools.mask.frPyObjects` differs in pixels on the outline only: over 300 random polygons
    of 3 to 40 points in images of 64 to 512 pixels the mean IoU is 0.992, the lowest 0.853 (a
    sliver of 187 pixels), and no centre of a differing pixel is more than 0.4 pixels from the
    outline.
    """
    H, W = size
    is_edge = np.zeros((H, W + 1), bool)  # True where a row enters or leaves the polygon

    for start, end in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = sorted([start, end], key=lambda point: point[1])
        if y0 == y1:
            continue
        first = max(math.ceil(y0 - 0.5), 0)
        stop = min(math.ceil(y1 - 0.5), H)
        rows = np.arange(first, stop)  # those with centres from y0 to y1
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(x - 0.5), 0, W).astype(int)  # the first centre right of the edge
        is_edge[rows, columns] ^= True

    return np.logical_xor.accumulate(is_edge, axis=1)[:, :W]


def polygons(outlines: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the union of polygons. Raises ValueError if all of them are outside of the image."""
    H, W = size
    corners = np.concatenate(outlines)
    left, top = corners.min(axis=0)
    right, bottom = corners.max(axis=0)
    if right < 0 or bottom < 0 or left > W or top > H:
        raise ValueError(
            f"lies outside of its image of {W}x{H} pixels (x {left:g} to {right:g}, y {top:g} to "
            f"{bottom:g})"
        )

    mask = np.zeros(size, bool)
    for outline in outlines:
        mask |= polygon(outline, size)
    return mask


def box_outline(box: tuple[float, float, float, float], angle: float, pivot: tuple) -> np.ndarray:
    """Return the corners (4,2) of a box x0, y0, x1, y1, turned clockwise by degrees around a point.

    Clockwise is as seen on the screen, where y points down.
    """
    x0, y0, x1, y1 = box
    corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    radians = math.radians(angle)
    cos = math.cos(radians)
    sin = math.sin(radians)
    turn = np.array([[cos, sin], [-sin, cos]])
    return (corners - pivot) @ turn + pivot


def ellipse(values: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of an ellipse.

    values: x and y of the centre, the two radii, and the angle in degrees, clockwise, by which the
    ellipse is turned around its centre.
    """
    x, y, radius_x, radius_y, angle = values
    if radius_x <= 0 or radius_y <= 0:
        return np.zeros(size, bool)

    rows, columns = np.ogrid[: size[0], : size[1]]
    dx = columns + 0.5 - x
    dy = rows + 0.5 - y
    radians = math.radians(angle)
    along_x = (dx * math.cos(radians) + dy * math.sin(radians)) / radius_x
    along_y = (dy * math.cos(radians) - dx * math.sin(radians)) / radius_y
    return along_x**2 + along_y**2 <= 1


# --- run-length codes -----------------------------------------------------------------------------


def from_counts(counts: list[int], size: tuple[int, int], order: str) -> np.ndarray:
    """Return the mask of lengths of runs, which are outside, inside, outside, … in turn.

    order: "C" for pixels row by row, "F" for column by column. Raises ValueError if the lengths do
    not add up to the image; memory is reserved only then.
    """
    H, W = size
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= H * W:
            raise ValueError(f"{str(count)[:40]} is not the length of a run in {W}x{H} pixels")
    if sum(counts) != H * W:
        raise ValueError(f"the runs cover {sum(counts)} pixels, but {W}x{H} has {H * W}")

    is_inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_inside, counts).reshape(size, order=order)


def from_starts(numbers: list[int], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of pairs start, length, as Kaggle codes them: from 1, column by column.

    Raises ValueError if runs overlap, are not in order, or leave the image.
    """
    H, W = size
    if len(numbers) % 2:
        raise ValueError(f"holds {len(numbers)} numbers, but a run has two: start and length")

    pixels = np.zeros(H * W, bool)
    position = 1
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        if start < position:
            raise ValueError(
                f"the run {start} {length} starts before pixel {position}; runs must be in order, "
                "and count from the first pixel, 1"
            )
        position = start + length
        if position > H * W + 1:
            raise ValueError(f"the run {start} {length} leaves its image of {W}x{H} pixels")
        pixels[start - 1 : position - 1] = True
    return pixels.reshape(size, order="F")


def decompress_counts(text: str) -> list[int]:
    """Return the lengths of runs in COCO's compressed code, as pycocotools writes it.

    A number is a series of characters with 5 bits each, the lowest first; bit 6 says that another
    one follows. From the fourth number on it is the difference to the last but one.
    """
    counts = []
    value = 0
    shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("counts is not a run-length code of pycocotools")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue

        if bits & 16:
            value -= 1 << shift  # the sign
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0

    if shift:
        raise ValueError("counts ends within a number")
    return counts
