"""Prompts for SAM: masks and class maps -> components, boxes and points; those of files.

Files of boxes have the columns image,class,x0,y0,x1,y1 (`read_boxes`), files of points
image,class,x,y,label (`read_points`); `read_given` pairs them.

Coordinates are pixels of the image that the mask belongs to, x then y, from 0 at the centre of the
first pixel: SAM's prompt encoder adds its half pixel itself, and a box whose corners are (3, 5) and
(3, 5) holds one pixel. They are float32; bringing them to SAM's 1024 frame is the model's business.

Prompts are made after an augmentation, from the mask that it left. Each has a target of its own,
the mask of its one component: what else the class has in the image is background to it.
"""

import csv
import io
import math
import posixpath
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, label

from imaging import files

SOURCES = ("boxes", "points", "both", "image")


class Component(NamedTuple):
    """One connected piece of one class."""

    label: int  # its class number
    mask: np.ndarray  # uint8 (H,W): 1 inside, 0 outside, 255 where the pixel does not count
    box: np.ndarray  # float32 (4,): x0 y0 x1 y1, the first and last columns and rows that it has


class Prompt(NamedTuple):
    """What SAM is told of one component, and what it should answer (None: of a file)."""

    label: int  # its class number
    mask: np.ndarray | None  # uint8 (H,W), the target: 1 inside, 0 outside, 255 does not count
    box: np.ndarray | None  # float32 (4,): x0 y0 x1 y1; None: prompted by points alone
    points: np.ndarray  # float32 (P,2): x y; P is the same for all prompts made of one mask
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

    mask, classes, min_area: as for `components`. kind, one of SOURCES: "boxes", "points", "both",
    or "image", which asks for a whole class, there or not, with the whole image as box.

    With rng, to train: boxes with `jitter`, `points` and `background` random points, of "both" by
    lot a box, points, or box and points for each component; at most `limit` components, by lot.
    Without, to evaluate: the tight box, the one deepest point, of "both" the two together, all
    components. Raises ValueError for another kind, and for "image" with several classes, between
    which such a prompt cannot tell.
    """
    if kind not in SOURCES:
        raise ValueError(f"--sam-prompts {kind}: unknown; SAM takes one of {', '.join(SOURCES)}")
    if kind == "image":
        return [_whole_class(np.asarray(mask), list(classes))]
    found = components(mask, classes, min_area)
    if rng is not None and limit is not None and len(found) > limit:
        found = [found[i] for i in sorted(rng.choice(len(found), limit, replace=False))]
    prompts = []
    for component in found:
        form = kind if kind != "both" or rng is None else SOURCES[rng.integers(3)]
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


# --- boxes and points from files ------------------------------------------------------------------

# What the columns of such a file may be called: in any letter case, with or without `_`.
IMAGE_COLUMNS = ("image", "imgname", "imagename", "filename", "file", "imageid")
CLASS_COLUMNS = ("class", "classname", "label", "labelname", "name")
OBJECT_COLUMNS = ("object", "objectid")
CORNER_COLUMNS = (
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
)
SIZE_COLUMNS = {"w", "h", "width", "height"}
EXAMPLES = {"boxes": "image,class,x0,y0,x1,y1", "points": "image,class,x,y,label"}


class Given(NamedTuple):
    """One box, or one point, of a file."""

    name: str | None  # its class
    object: str | None  # which object of this class and image it belongs to
    xy: np.ndarray  # float32: x0 y0 x1 y1 of a box, x y of a point
    label: int = 1  # of a point: 1 inside, 0 outside


def plain_path(name: str) -> str:
    """Return a path with / between folders and without `.` and inner `..` parts."""
    return posixpath.normpath(name.replace("\\", "/"))


class ImageNames:
    """Decides which image a name in a file of boxes means.

    paths: {image: its path within the input folder or the data set's images folder}. A name with
    folders (`g/a.png`, `g\\a.png`, `./a.png`) is such a path. A bare file name (`a.png`) means the
    image of that name in whichever folder. Both may lack the ending.
    """

    def __init__(self, paths: dict):
        self.paths = {}
        self.by_path = {}
        self.by_file_name = {}
        for image, name in paths.items():
            path = plain_path(unicodedata.normalize("NFC", name))
            self.paths[image] = path
            for key in {path, posixpath.splitext(path)[0]}:
                self.by_path.setdefault(key, []).append(image)
                self.by_file_name.setdefault(posixpath.basename(key), []).append(image)

    def find(self, name: str):
        """Return the image of this name, None if none fits. Raises ValueError if several do."""
        name = unicodedata.normalize("NFC", name)
        path = plain_path(name)
        is_bare = path == name and "/" not in path  # not ./a.png
        fitting = (self.by_file_name if is_bare else self.by_path).get(path, [])

        # An image called a.png may lie beside one called a.png.jpg.
        whole = [image for image in fitting if self._is_whole(path, image)]
        fitting = whole or fitting
        if len(fitting) > 1:
            part = "folder" if whole else "folder or ending"
            names = ", ".join(self.shortest(image) for image in fitting[:3])
            raise ValueError(f"{name} fits {len(fitting)} images; add its {part}, as in {names}")
        return fitting[0] if fitting else None

    def _is_whole(self, path: str, image) -> bool:
        """Return True if a path that fits an image has the image's ending."""
        return posixpath.basename(self.paths[image]) == posixpath.basename(path)

    def shortest(self, image) -> str:
        """Return the bare file name if only this image has it, else the path with its folder."""
        path = self.paths[image]
        file_name = posixpath.basename(path)
        others = [i for i in self.by_file_name[file_name] if self._is_whole(path, i)]
        if len(others) == 1:
            return file_name
        return path if "/" in path else f"./{path}"


def read_given(boxes, points, sizes: dict, classes=None, names: dict | None = None):
    """Return the prompts of a file of boxes, of a file of points, or of both together.

    boxes, points: paths as `read_boxes` and `read_points` take them, or None. sizes: (H,W) of the
    images that are asked for. names: as for `read_boxes`. classes: those of the data; of several
    the first is the background, and a box must be called one of the others; of one class it may be
    called anything. None: those that the files name.

    Returns {image: [Prompt, ...]} without targets, and the classes. Points of one image and class
    are one object, or one for each value of the column `object`. With boxes and points for a class
    of an image, each box has the points of its own `object` if both files number all of them; then
    a box may have no points. Else there are as many boxes as objects of points, in the same order.
    Where an image's class has only boxes or only points, these are its prompts. Raises as
    `read_boxes` does, and ValueError, one line, if boxes and points do not belong together.
    """
    several = classes is not None and len(classes) > 1
    known = classes[1:] if several else None
    all_boxes = {} if boxes is None else read_boxes(boxes, sizes, known, names)
    all_points = {} if points is None else read_points(points, sizes, known, names)
    if classes is None:
        classes = _named_classes(all_boxes, all_points)

    prompts = {}
    for image in [*all_boxes, *(image for image in all_points if image not in all_boxes)]:
        where = str(image if names is None else names[image])
        some_boxes = _by_class(all_boxes.get(image, []), classes, f"{boxes}: a box of {where}")
        some_points = _by_class(all_points.get(image, []), classes, f"{points}: a point of {where}")
        prompts[image] = []
        for number in dict.fromkeys([*some_boxes, *some_points]):
            pair = some_boxes.get(number, []), some_points.get(number, [])
            try:
                prompts[image] += _pair(*pair, number)
            except ValueError as error:
                raise ValueError(f"{points}: {where}: {error}") from None
    return prompts, classes


def _named_classes(boxes: dict, points: dict) -> list[str]:
    """Return the classes that files name; of several the first is the background."""
    rows = [*boxes.values(), *points.values()]
    names = {given.name for some in rows for given in some}
    own = sorted(names - {None})
    return ["background", *own] if len(own) > 1 else own or ["target"]


def _by_class(rows: list[Given], classes, where: str) -> dict[int, list[Given]]:
    """Return an image's boxes or points by class number. Raises ValueError if one has no class."""
    numbers = {}
    for given in rows:
        if len(classes) > 1 and given.name is None:
            raise ValueError(f"{where} has no class; there are {', '.join(classes[1:])}")
        number = classes.index(given.name) if len(classes) > 1 else 1
        numbers.setdefault(number, []).append(given)
    return numbers


def _pair(boxes: list[Given], points: list[Given], number: int) -> list[Prompt]:
    """Return the prompts of one class in one image. Raises ValueError, without the place."""
    objects = {}
    for point in points:
        objects.setdefault(point.object, []).append(point)

    if not boxes:
        pairs = [(None, some) for some in objects.values()]
    elif not objects:
        pairs = [(box, []) for box in boxes]
    elif all(given.object is not None for given in [*boxes, *points]):
        pairs = _pair_by_object(boxes, objects)
    elif len(boxes) == len(objects):
        pairs = list(zip(boxes, objects.values(), strict=True))
    else:
        count = f"{len(boxes)} boxes and points of {len(objects)} objects"
        raise ValueError(f"{count} do not pair; number the objects in a column object of both")

    prompts = []
    for box, some in pairs:
        if box is None and not any(point.label for point in some):
            raise ValueError("all points of an object are outside; it needs one inside, or a box")
        xy = np.float32([point.xy for point in some]).reshape(-1, 2)
        labels = np.int64([point.label for point in some])
        prompts.append(Prompt(number, None, None if box is None else box.xy, xy, labels))
    return prompts


def _pair_by_object(boxes: list[Given], objects: dict[str, list[Given]]) -> list[tuple]:
    """Return (box, its points). Raises ValueError for a second box or for points without a box."""
    names = [box.object for box in boxes]
    for name in objects:
        if name not in names:
            known = ", ".join(names)
            raise ValueError(f"object {name} has points but no box; objects of boxes: {known}")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"object {repeated[0]} has {names.count(repeated[0])} boxes, not one")
    return [(box, objects.get(box.object, [])) for box in boxes]


def read_boxes(path, sizes: dict, classes=None, names: dict | None = None) -> dict:
    """Return the boxes of a file by image, {image: [Given, ...]}, in the file's order.

    path: a .csv file, separated by commas, semicolons or tabs, with the header
    image,class,x0,y0,x1,y1; or a .json file with a list of objects of the same keys. The class may
    be missing, and there may be an `object`. Columns may have other names, such as those in
    CORNER_COLUMNS. JSON may also be an annotation file of a data set, whose `bbox` is taken as it
    stands (x0, y0, x1, y1; an empty mask's ends in 0, 0), or a file of COCO (x, y, width, height).
    Prints which other columns are not read, and how many boxes are left out as they are for other
    images.

    sizes: (H,W) of the images that are asked for. classes: the names that a class may have; None:
    any. names: the images' paths as `ImageNames` takes them; None: the keys of `sizes`. Boxes lie
    in 0..W and 0..H. Raises FileNotFoundError or ValueError, one line with the place: also if no
    box is for any of the images.
    """
    return _read(path, "boxes", sizes, classes, names)


def read_points(path, sizes: dict, classes=None, names: dict | None = None) -> dict:
    """Return the points of a file by image, {image: [Given, ...]}, in the file's order.

    path: a .csv or .json file as for `read_boxes`, with the columns image,class,x,y,label. Label is
    1 for a point inside of the object, the default, or 0 outside. An `object` tells apart objects
    of one class. Other arguments and errors as of `read_boxes`.
    """
    return _read(path, "points", sizes, classes, names)


def _read(path, kind: str, sizes: dict, classes, names: dict | None) -> dict:
    """Return what `read_boxes` or `read_points` does: kind is "boxes" or "points"."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of {kind}")
    names = ImageNames({image: image for image in sizes} if names is None else names)
    given = {}
    others = []  # names of images that are not asked for, one for each row
    unread = {}  # columns
    for place, row in _rows(path, kind):
        try:
            columns = _columns(row, kind)
            unread |= dict.fromkeys(row.keys() - columns.values() - {""})
            name = _text(row, columns["image"])
            image = names.find(name) if name else None
            if image is None and name:
                others.append(" ".join(name.split()))  # names may hold line ends
                continue
            values = {field: _text(row, key) for field, key in columns.items()}
            _check_values(values, kind)
            given.setdefault(image, []).append(_given(values, kind, sizes[image], classes))
        except ValueError as error:
            message = " ".join(str(error).split())
            raise ValueError(f"{path}, {place}: {message}") from None

    _check_found(path, kind, given, others, names)
    if unread:
        print(f"{path}: columns that are not read: {' '.join(', '.join(sorted(unread)).split())}")
    if others:
        count = f"{len(others)} {kind} of images that are not asked for"
        print(f"{path}: {count} are left out ({first_three(dict.fromkeys(others))})")
    return given


def first_three(names) -> str:
    """Return "a, b, c, …"."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _check_found(path: Path, kind: str, given: dict, others: list[str], names: ImageNames) -> None:
    """Raise ValueError, one line, if a file has nothing for any image, or fractions for pixels."""
    if not given and others:
        example = next(iter(names.paths.values()), "none")
        raise ValueError(
            f"{path}: none of the {len(others)} {kind} is for an image that is asked for; the file "
            f"names {others[0]}, the images are named like {example}"
        )
    if not given:
        raise ValueError(f"{path}: holds no {kind}")

    numbers = np.concatenate([row.xy for rows in given.values() for row in rows])
    if numbers.max() <= 1 and (numbers % 1).any():
        hint = "multiply them by the image's width and height"
        raise ValueError(f"{path}: all numbers are from 0 to 1, but {kind} are in pixels; {hint}")


# Rows of files


def _rows(path: Path, kind: str):
    """Yield (place, {column: value}) of each row of a file. Raises ValueError, one line."""
    ending = path.suffix.lower()
    if ending == ".csv":
        yield from _csv_rows(path, kind)
        return
    if ending != ".json":
        raise ValueError(f"{path}: {kind} are read from .csv and .json files")

    content = files.read_json(path)
    is_coco = isinstance(content, dict) and {"images", "annotations"} <= content.keys()
    if is_coco and kind == "boxes":
        yield from _coco_rows(path, content)
        return
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        keys = EXAMPLES[kind].replace(",", ", ")
        raise ValueError(f"{path}: expected a list of objects with {keys}")
    for i, row in enumerate(content):
        if kind == "boxes" and "img_name" in row and "bbox" in row:  # an annotation file
            row = _annotation_row(f"{path}, entry {i}", row)
        if row is not None:
            yield f"entry {i}", row


def _csv_rows(path: Path, kind: str):
    """Yield (place, {column: text}) of each row of a CSV file. Raises ValueError, one line."""
    text = files.read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first_line.count)
    how = {"delimiter": separator, "skipinitialspace": True, "strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **how)
    header = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(path, header, kind)
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                count = f"has {len(cells)} values for {len(header)} columns"
                hint = "write decimals with a point, and names with a separator in quotes"
                raise ValueError(f"{path}, line {reader.line_num}: {count}; {hint}")
            row = dict.fromkeys(header, "") | dict(
                zip(header, cells, strict=False)
            )  # a row may be cut
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def _check_header(path: Path, header: list[str], kind: str) -> None:
    """Raise ValueError, one line, if the first line of a CSV file does not name its columns."""
    example = EXAMPLES[kind]
    numbers = [cell for cell in header if re.fullmatch(r"[-+]?\d+([.,]\d+)?", cell)]
    if len(numbers) > 1:
        raise ValueError(f"{path}: has no header; its first line must be like {example}")
    try:
        columns = _columns(dict.fromkeys(header), kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    repeated = [key for key in columns.values() if header.count(key) > 1]
    if repeated:
        raise ValueError(f"{path}: has two columns {repeated[0]}; remove one")


def _annotation_row(where: str, row: dict) -> dict | None:
    """Return an annotation file's entry with the corners of its bbox, None for an empty mask."""
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{where}: bbox {box} is not four numbers")
    if box[2:] == [0, 0] and box[:2] != [0, 0]:
        return None
    fields = {key: row[key] for key in ("img_name", "class", "object") if key in row}
    return fields | dict(zip(("x0", "y0", "x1", "y1"), box, strict=False))


def _coco_rows(path: Path, content: dict):
    """Yield (place, row) of each annotation of a COCO file. Raises ValueError, one line."""
    try:
        images = {image["id"]: image["file_name"] for image in content["images"]}
        classes = {item["id"]: item["name"] for item in content.get("categories", [])}
        annotations = list(content["annotations"])
    except (KeyError, TypeError, AttributeError):
        need = "images with id and file_name, categories with id and name, a list of annotations"
        raise ValueError(f"{path}: expected COCO's {need}") from None
    for i, item in enumerate(annotations):
        try:
            x, y, width, height = item["bbox"]
            corners = {"x0": x, "y0": y, "x1": x + width - 1, "y1": y + height - 1}
            name = classes.get(item.get("category_id"))
            row = {"image": images[item["image_id"]], "class": name} | corners
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            need = "image_id of one of the images, and bbox of four numbers"
            raise ValueError(f"{path}, annotation {i}: expected {need}") from None
        yield f"annotation {i}", row


def _plain_key(key: str) -> str:
    """Return the name of a column in small letters and without `_`, blanks and a first `bbox`."""
    return re.sub(r"[\W_]", "", key.lower()).removeprefix("bbox")


def _columns(row: dict, kind: str) -> dict[str, str]:
    """Return which columns of a row are meant, {field: column}.

    Fields are image, perhaps class and object, of boxes x0, y0, x1, y1, of points x, y and perhaps
    label. Raises ValueError, without the place, if one is missing.
    """
    known = {}
    for key in row:
        known.setdefault(_plain_key(key), key)
    fields = {"image": IMAGE_COLUMNS, "class": CLASS_COLUMNS, "object": OBJECT_COLUMNS}
    corners = ("x", "y")
    if kind == "boxes":
        forms = [form for form in CORNER_COLUMNS if known.keys() >= {*form}]
        form = forms[0] if forms else CORNER_COLUMNS[0]
        corners = CORNER_COLUMNS[0]
        fields |= {corner: (key,) for corner, key in zip(corners, form, strict=False)}
    else:
        fields |= {"x": ("x",), "y": ("y",), "label": ("label",)}
        fields["class"] = [key for key in CLASS_COLUMNS if key != "label"]

    columns = {}
    for field, names in fields.items():
        present = [known[name] for name in names if name in known]
        if present:
            columns[field] = present[0]
    missing = [field for field in ("image", *corners) if field not in columns]
    if missing and kind == "boxes":
        _refuse_other_forms(row, known)
    if missing:
        raise ValueError(f"has no {', '.join(missing)}; write {EXAMPLES[kind]}")
    return columns


def _refuse_other_forms(row: dict, known: dict[str, str]) -> None:
    """Raise ValueError if boxes are given by their width and height, or in an unclear order."""
    corners = "x0 = x, y0 = y, x1 = x + width - 1, y1 = y + height - 1"
    sizes = [key for plain, key in known.items() if plain in SIZE_COLUMNS]
    if len(sizes) == 2:
        given = f"gives boxes by {sizes[0]} and {sizes[1]}"
        raise ValueError(f"{given}; write corners instead: {corners}, from the left upper x, y")
    if "bbox" in row:
        unclear = "bbox may be corners or x, y, width, height"
        raise ValueError(f"{unclear}; write corners as x0, y0, x1, y1 instead ({corners})")


# Values of a row


def _text(row: dict, key: str) -> str:
    """Return a value of a row as text, "" if it is missing."""
    value = row.get(key)
    return "" if value is None else str(value).strip()


def _check_values(values: dict[str, str], kind: str) -> None:
    """Raise ValueError, without the place, if a row lacks a value that it needs."""
    needed = ("image", "x0", "y0", "x1", "y1") if kind == "boxes" else ("image", "x", "y")
    missing = [field for field in needed if not values[field]]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")


def _given(values: dict[str, str], kind: str, size, classes) -> Given:
    """Return the box or point of a row. Raises ValueError, without the place."""
    name = values.get("class") or None
    if classes is not None and name is not None and name not in classes:
        raise ValueError(f"unknown class {name}; there are {', '.join(classes)}")
    if kind == "points":
        what, count, corners = "point", "two", ("x", "y")
    else:
        what, count, corners = "box", "four", ("x0", "y0", "x1", "y1")
    texts = [values[corner] for corner in corners]
    shown = f"{what} {' '.join(texts)}"
    if any(re.fullmatch(r"[-+]?\d+,\d+", text) for text in texts):
        raise ValueError(f"{shown} has decimal commas; write decimals with a point")
    try:
        xy = [float(text) for text in texts]  # JSON's true and [1] are no numbers
    except ValueError:
        xy = [math.nan]
    if not all(map(math.isfinite, xy)):
        raise ValueError(f"{shown} is not {count} numbers")
    if xy[-2] < xy[0] or xy[-1] < xy[1]:
        raise ValueError(f"{shown} is inverted; expected x0 <= x1 and y0 <= y1")
    H, W = size
    if min(xy) < 0 or xy[-2] > W or xy[-1] > H:
        raise ValueError(f"{shown} lies outside {values['image']}, which is {W}x{H}")
    inside = _inside(values.get("label"))
    return Given(name, values.get("object") or None, np.float32(xy), inside)


def _inside(text: str | None) -> int:
    """Return the label of a point, 1 unless it is given. Raises ValueError, without the place."""
    if not text:
        return 1
    numbers = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
    if text.lower() not in numbers:
        hint = "1 is inside, 0 outside; a class stands in the column class"
        raise ValueError(f"unknown label {text} of a point: {hint}")
    return numbers[text.lower()]
