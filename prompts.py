"""Prompts for SAM: masks and class maps -> components, boxes and points; boxes from files.

Coordinates are pixels of the image that the mask belongs to, x then y, from 0 at the centre of the
first pixel: SAM's prompt encoder adds its half pixel itself, and a box whose corners are (3, 5) and
(3, 5) holds one pixel. They are float32; bringing them to SAM's 1024 frame is the model's business.

Prompts are made after an augmentation, from the mask that it left. Each has a target of its own,
the mask of its one component: what else the class has in the image is background to it.
"""

import csv
import json
import math
import posixpath
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, label

KINDS = ("boxes", "points", "both", "image")


class Component(NamedTuple):
    """One connected piece of one class."""

    label: int  # its class number
    mask: np.ndarray  # uint8 (H,W): 1 inside, 0 outside, 255 where the pixel does not count
    box: np.ndarray  # float32 (4,): x0 y0 x1 y1, the first and last columns and rows that it has


class Prompt(NamedTuple):
    """What SAM is told of one component, and what it should answer."""

    label: int  # its class number
    mask: np.ndarray  # uint8 (H,W), the target: 1 inside, 0 outside, 255 does not count
    box: np.ndarray | None  # float32 (4,): x0 y0 x1 y1; None: prompted by points alone
    points: np.ndarray  # float32 (P,2): x y; P is the same for all prompts of one call
    labels: np.ndarray  # int64 (P,): 1 inside, 0 outside, -1 no point (SAM's padding)


# --- masks to prompts -----------------------------------------------------------------------------


def components(mask: np.ndarray, classes, min_area: int = 20) -> list[Component]:
    """The connected pieces of each class, diagonal neighbours together, class by class.

    mask int (H,W) of class numbers; 255 (does not count) and -1 (not annotated) are no class.
    classes: the numbers to look for, as range(1, K). Pieces of fewer than `min_area` pixels are
    left out (the OCT study keeps all: 1): specks of an annotation are no objects to be asked for,
    and scores over prompts do not see them.
    """
    mask = np.asarray(mask)
    ignored = (mask == 255) | (mask < 0)
    found = []
    for number in classes:
        pieces, _ = label(mask == number, np.ones((3, 3)))
        areas = np.bincount(pieces.ravel())
        for k, (rows, columns) in enumerate(find_objects(pieces), 1):
            if areas[k] >= min_area:
                box = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
                target = np.where(ignored, 255, pieces == k).astype(np.uint8)
                found.append(Component(int(number), target, np.float32(box)))
    return found


def image_box(size: tuple[int, int]) -> np.ndarray:
    """The box around a whole image of size (H,W), float32 (4,)."""
    return np.float32([0, 0, size[1] - 1, size[0] - 1])


def box_prompt(
    component: Component, jitter: int = 0, rng: np.random.Generator | None = None
) -> np.ndarray:
    """The component's box, float32 (4,), each side moved by -jitter to jitter whole pixels.

    No side passes the box's middle or the image's border, so that no box is inverted and none is
    without its middle. (The OCT study's moves invert 47 % of the boxes that are one pixel wide.)
    """
    if not jitter:
        return component.box.copy()
    H, W = component.mask.shape
    x0, y0, x1, y1 = component.box
    x, y = (x0 + x1) // 2, (y0 + y1) // 2
    moved = component.box + rng.integers(-jitter, jitter + 1, 4)
    return np.clip(moved, [0, 0, x, y], [x, y, W - 1, H - 1]).astype(np.float32)


def point_prompts(
    component: Component, n: int, rng: np.random.Generator, background: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random points: n inside and `background` outside -> xy float32 (P,2), labels int64 (P,).

    P = n + background always: pixels are drawn with replacement, and where nothing lies outside
    the component the label is -1, which SAM takes for no point. Pixels that do not count are
    neither inside nor outside.
    """
    points, labels = np.zeros((n + background, 2), np.float32), np.full(n + background, -1)
    for value, part in ((1, slice(n)), (0, slice(n, None))):
        pixels = np.flatnonzero(component.mask == value)
        if len(pixels) and len(points[part]):
            y, x = np.divmod(rng.choice(pixels, len(points[part])), component.mask.shape[1])
            points[part], labels[part] = np.stack([x, y], 1), value
    return points, labels


def deepest_point(component: Component) -> np.ndarray:
    """The pixel farthest from all that is not the component, the image's border too: float32 (2,).

    Of equally deep ones the first in reading order: the one point that an evaluation takes.
    """
    inside = np.pad(component.mask == 1, 1)
    y, x = np.unravel_index(distance_transform_edt(inside).argmax(), inside.shape)
    return np.float32([x - 1, y - 1])


def make_prompts(
    mask: np.ndarray, classes, kind: str, rng: np.random.Generator | None = None, *,
    jitter: int = 0, points: int = 1, background: int = 0, min_area: int = 20,
    limit: int | None = None,
) -> list[Prompt]:  # fmt: skip
    """All prompts of one sample: one a component, [] if there is none.

    mask, classes, min_area: as for `components`. kind, one of KINDS: "boxes", "points", "both",
    or "image", which asks for a whole class, there or not, with the whole image as box.

    With rng, to train: boxes with `jitter`, `points` and `background` random points, of "both" by
    lot a box, points, or box and points for each component; at most `limit` components, by lot.
    Without, to evaluate: the tight box, the one deepest point, of "both" the two together, all
    components. Raises ValueError for another kind, and for "image" with several classes, between
    which such a prompt cannot tell.
    """
    if kind not in KINDS:
        raise ValueError(f"--sam-prompts {kind}: unknown; SAM takes one of {', '.join(KINDS)}")
    if kind == "image":
        return [_whole_class(np.asarray(mask), list(classes))]
    found = components(mask, classes, min_area)
    if rng is not None and limit is not None and len(found) > limit:
        found = [found[i] for i in sorted(rng.choice(len(found), limit, replace=False))]
    prompts = []
    for component in found:
        form = kind if kind != "both" or rng is None else KINDS[rng.integers(3)]
        box, xy, labels = None, np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
        if kind != "boxes":
            xy, labels = deepest_point(component)[None], np.ones(1, np.int64)
            if rng is not None:
                xy, labels = point_prompts(component, points, rng, background)
                if form == "boxes":
                    labels[:] = -1
        if form != "points":
            box = component.box if rng is None else box_prompt(component, jitter, rng)
        prompts.append(Prompt(component.label, component.mask, box, xy, labels))
    return prompts


def _whole_class(mask: np.ndarray, classes: list[int]) -> Prompt:
    """The prompt "image", whose target is all that the image has of its one class."""
    if len(classes) != 1:
        what = f"does not say which of {len(classes)} classes is meant"
        raise ValueError(f"--sam-prompts image: {what}; take boxes or points")
    target = np.where((mask == 255) | (mask < 0), 255, mask == classes[0]).astype(np.uint8)
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    return Prompt(int(classes[0]), target, image_box(mask.shape), *nothing)


# --- boxes from files -----------------------------------------------------------------------------


def plain_path(name: str) -> str:
    """Return a path with / between folders and without `.` and inner `..` parts."""
    return posixpath.normpath(name.replace("\\", "/"))


class ImageNames:
    """Decides which image a name in a file of boxes means.

    paths: {image: its path within the input folder or the data set's images folder}. A name with
    folders (`g/a.png`, `g\\a.png`, `./a.png`) is such a path. A bare file name (`a.png`) means the
    image of that name in whichever folder.
    """

    def __init__(self, paths: dict):
        self.paths = {image: plain_path(path) for image, path in paths.items()}
        self.by_path = {}
        self.by_file_name = {}
        for image, path in self.paths.items():
            self.by_path.setdefault(path, []).append(image)
            self.by_file_name.setdefault(posixpath.basename(path), []).append(image)

    def find(self, name: str):
        """Return the image of this name. Raises ValueError if none fits, or several do."""
        path = plain_path(name)
        is_bare = path == name and "/" not in path  # not ./a.png
        fitting = (self.by_file_name if is_bare else self.by_path).get(path, [])
        if not fitting:
            example = next(iter(self.paths.values()), "a.png")
            raise ValueError(
                f"unknown image {name}, it is none of those that are asked for; names are "
                f"relative to the folder of images, such as {example}"
            )
        if len(fitting) > 1:
            names = ", ".join(self.shortest(image) for image in fitting[:3])
            raise ValueError(f"{name} fits {len(fitting)} images; add its folder, as in {names}")
        return fitting[0]

    def shortest(self, image) -> str:
        """Return the bare file name if only this image has it, else the path with its folder."""
        path = self.paths[image]
        file_name = posixpath.basename(path)
        if len(self.by_file_name[file_name]) == 1:
            return file_name
        return path if "/" in path else f"./{path}"


def read_boxes(path, sizes: dict, classes=None, names: dict | None = None) -> dict:
    """Boxes from a file, by image: {image: [(class or None, float32 (4,) x0 y0 x1 y1), ...]}.

    path: a .csv file with the header image,x0,y0,x1,y1 and perhaps class, in any order, or a .json
    file with a list of objects of the same keys. sizes: (H,W) of the images that may be named.
    classes: the names that a class may have; None: any. names: the images' paths as `ImageNames`
    takes them; None: the keys of `sizes`. Boxes lie in 0..W and 0..H; the order in the file is
    kept. Raises FileNotFoundError or ValueError, one line with the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    names = ImageNames({image: image for image in sizes} if names is None else names)
    boxes, where = {}, path
    try:
        for place, row in _rows(path):
            where = f"{path}, {place}"
            image, name, box = _row(row, sizes, classes, names)
            boxes.setdefault(image, []).append((name, box))
            where = path  # of what fails between rows
    except (ValueError, csv.Error) as error:  # not UTF-8 and not JSON are ValueErrors
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None  # in one line
    if not boxes:
        raise ValueError(f"{path}: holds no boxes")
    return boxes


def read_class_boxes(path, sizes: dict, classes=None, names: dict | None = None):
    """`read_boxes` for data of these classes, and the classes; None: those that the file names.

    Of several classes the first is the background, and a box must be called one of the others; of
    one class it may be called anything.
    """
    several = classes is not None and len(classes) > 1
    boxes = read_boxes(path, sizes, classes[1:] if several else None, names)
    named = {name: image for image, found in boxes.items() for name, _ in found}
    if classes is None:
        own = sorted(named.keys() - {None})
        classes = ["background", *own] if len(own) > 1 else own or ["target"]
    if len(classes) > 1 and None in named:
        image = named[None] if names is None else names[named[None]]
        told = ", ".join(classes[1:])
        raise ValueError(f"{path}: a box of {image} has no class; there are {told}")
    return boxes, classes


def _rows(path: Path):
    """(place, dict) of each row of a file; ValueError where it is no such list."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError("boxes are read from .csv and .json files")
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a mark at the start
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, skipinitialspace=True, restkey="more", strict=True)
            yield from ((f"line {reader.line_num}", row) for row in reader)
            return
        rows = json.load(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects with image, x0, y0, x1, y1")
    yield from ((f"entry {i}", row) for i, row in enumerate(rows))


def _row(row: dict, sizes: dict, classes, names: ImageNames) -> tuple:
    """Image, class and box of one row; ValueError says what is wrong with it."""
    corners = ("x0", "y0", "x1", "y1")
    if lost := [key for key in ("image", *corners) if row.get(key) in (None, "")]:
        raise ValueError(f"has no {', '.join(lost)}")
    if more := [str(key) for key in row if key not in ("image", "class", *corners)]:
        raise ValueError(f"has more than image, class, x0, y0, x1, y1: {', '.join(more)}")
    image = names.find(str(row["image"]))
    name = None if row.get("class") in (None, "") else str(row["class"])
    if classes is not None and name is not None and name not in classes:
        raise ValueError(f"unknown class {name}; there are {', '.join(classes)}")
    try:
        box = [float(str(row[key])) for key in corners]  # JSON's true and [1] are no numbers
    except ValueError:
        box = [math.nan]
    text = " ".join(str(row[key]) for key in corners)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box {text} is not four numbers")
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        raise ValueError(f"box {text} is inverted; expected x0 <= x1 and y0 <= y1")
    H, W = sizes[image]
    if x0 < 0 or y0 < 0 or x1 > W or y1 > H:
        raise ValueError(f"box {text} lies outside {row['image']}, which is {W}x{H}")
    return image, name, np.float32(box)
