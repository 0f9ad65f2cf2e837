"""Prompts for SAM: boxes and points, made from masks or read from files.

Masks and class maps -> components -> prompts: `components`, `make_prompts`.
Files of boxes have the columns image,class,x0,y0,x1,y1 (`read_boxes`), files of points
image,class,x,y,label (`read_points`); `read_prompts` pairs the two.

Coordinates are float32 pixels of the image, x then y, from 0 at the centre of the first pixel
(SAM's prompt encoder adds the half pixel). A box includes both corners: one with the corners (3, 5)
and (3, 5) holds one pixel. The model brings them to its own input size.

Prompts are made after the augmentation, from the augmented mask. The target of each is the mask of
its one component; the rest of the class is background to it.
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
from scipy import ndimage

from imaging import files

SOURCES = ("boxes", "points", "both", "image")
NO_POINTS = np.zeros((0, 2), np.float32)
NO_LABELS = np.zeros(0, np.int64)


class Component(NamedTuple):
    """One connected component of one class."""

    label: int  # class index
    mask: np.ndarray  # uint8 (H,W): 1 inside, 0 outside, 255 ignored
    box: np.ndarray  # float32 (4,): x0 y0 x1 y1, its first and last columns and rows


class Prompt(NamedTuple):
    """A prompt for one object, and its target."""

    label: int  # class index
    mask: np.ndarray | None  # uint8 (H,W): 1 inside, 0 outside, 255 ignored; None: from a file
    box: np.ndarray | None  # float32 (4,): x0 y0 x1 y1; None: points alone
    points: np.ndarray = NO_POINTS  # float32 (P,2): x y; P is the same for all prompts of a mask
    labels: np.ndarray = NO_LABELS  # int64 (P,): 1 inside, 0 outside, -1 no point (padding)


def mirrored(prompt: Prompt, size: tuple[int, int], axis: str) -> Prompt:
    """Return a prompt from a file, which has no mask, for the mirrored image of size (H,W).

    axis: "horizontal" exchanges left and right, "vertical" top and bottom. Coordinates count pixels
    from 0, so x becomes W - 1 - x. Those beyond the middle of the last pixel become 0.
    """
    H, W = size
    column = 0 if axis == "horizontal" else 1  # of x or y in points, of x0 or y0 in boxes
    last = (W if axis == "horizontal" else H) - 1

    points = prompt.points.copy()
    points[:, column] = np.maximum(last - points[:, column], 0)
    box = prompt.box
    if box is not None:
        box = box.copy()
        box[column] = max(last - prompt.box[column + 2], 0)
        box[column + 2] = max(last - prompt.box[column], 0)
    return prompt._replace(box=box, points=points)


# --- masks to prompts -----------------------------------------------------------------------------


def is_ignored(mask: np.ndarray) -> np.ndarray:
    """Return bool (H,W), True for pixels of 255 (ignored) and -1 (not annotated)."""
    return (mask == 255) | (mask < 0)


def components(mask: np.ndarray, classes, min_area: int = 20) -> list[Component]:
    """Return the connected components of each class, class by class; diagonal neighbours connect.

    mask: int (H,W) of class indices. classes: those to look for, such as range(1, K). Components of
    fewer than `min_area` pixels are skipped: specks of an annotation are no objects that a user
    would point at. (The OCT study keeps them all: 1.)
    """
    mask = np.asarray(mask)
    ignored = is_ignored(mask)

    pieces = []
    for label in classes:
        numbered, _ = ndimage.label(mask == label, np.ones((3, 3)))  # 1, 2, … for each component
        areas = np.bincount(numbered.ravel())
        for k, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
            if areas[k] < min_area:
                continue
            box = np.float32([columns.start, rows.start, columns.stop - 1, rows.stop - 1])
            target = np.where(ignored, 255, numbered == k).astype(np.uint8)
            pieces.append(Component(int(label), target, box))
    return pieces


def image_box(size: tuple[int, int]) -> np.ndarray:
    """Return the box around a whole image of size (H,W), float32 (4,)."""
    H, W = size
    return np.float32([0, 0, W - 1, H - 1])


def box_prompt(
    component: Component, jitter: int = 0, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return the component's box, float32 (4,), each side moved by -jitter to jitter whole pixels.

    No side passes the middle of the box or the border of the image, so no box is inverted. (The
    moves of the OCT study invert 47 % of the boxes that are one pixel wide.)
    """
    if not jitter:
        return component.box.copy()

    H, W = component.mask.shape
    x0, y0, x1, y1 = component.box
    middle_x = (x0 + x1) // 2
    middle_y = (y0 + y1) // 2
    moved = component.box + rng.integers(-jitter, jitter + 1, 4)
    lowest = [0, 0, middle_x, middle_y]
    highest = [middle_x, middle_y, W - 1, H - 1]
    return np.clip(moved, lowest, highest).astype(np.float32)


def point_prompts(
    component: Component, n: int, rng: np.random.Generator, background: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw n random points inside and `background` outside: xy float32 (P,2), labels int64 (P,).

    P is always n + background: pixels are drawn with replacement, and where nothing lies outside
    the component the label is -1, SAM's padding. Ignored pixels are never drawn.
    """
    points = np.zeros((n + background, 2), np.float32)
    labels = np.full(n + background, -1)
    W = component.mask.shape[1]

    for value, rows in ((1, slice(n)), (0, slice(n, None))):
        pixels = np.flatnonzero(component.mask == value)
        count = len(points[rows])
        if len(pixels) and count:
            y, x = np.divmod(rng.choice(pixels, count), W)
            points[rows] = np.stack([x, y], 1)
            labels[rows] = value
    return points, labels


def deepest_point(component: Component) -> np.ndarray:
    """Return the pixel of a component that is farthest from its border, float32 (2,).

    The image's border counts as well. Of equally deep pixels it is the first in reading order, so
    that evaluations are repeatable.
    """
    inside = np.pad(component.mask == 1, 1)
    depth = ndimage.distance_transform_edt(inside)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return np.float32([x - 1, y - 1])  # without the padding


def make_prompts(
    mask: np.ndarray,
    classes,
    kind: str,
    rng: np.random.Generator | None = None,
    *,
    jitter: int = 0,
    points: int = 1,
    background: int = 0,
    min_area: int = 20,
    limit: int | None = None,
) -> list[Prompt]:
    """Return one prompt for each component of a mask, [] if there is none.

    mask, classes, min_area: as for `components`. kind: one of SOURCES: "boxes", "points", "both",
    or "image", one prompt for all objects of a single class, with a box around the whole image.

    With rng, for training: at most `limit` components, drawn at random; boxes with `jitter`;
    `points` and `background` random points; "both" draws for each component a box, points, or box
    and points. Without rng, for evaluation: all components; tight boxes; the one deepest point;
    "both" is box and point. Raises ValueError for an unknown kind, and for "image" with several
    classes, which such a prompt cannot tell apart.
    """
    if kind not in SOURCES:
        raise ValueError(f"--sam-prompts {kind}: unknown; SAM takes one of {', '.join(SOURCES)}")
    if kind == "image":
        return [image_prompt(np.asarray(mask), list(classes))]

    pieces = components(mask, classes, min_area)
    if rng is None:
        return [exact_prompt(component, kind) for component in pieces]

    if limit is not None and len(pieces) > limit:
        chosen = rng.choice(len(pieces), limit, replace=False)
        pieces = [pieces[i] for i in sorted(chosen)]

    prompts = []
    for component in pieces:
        form = SOURCES[rng.integers(3)] if kind == "both" else kind
        xy = NO_POINTS
        labels = NO_LABELS
        if kind != "boxes":
            xy, labels = point_prompts(component, points, rng, background)
        if kind != "boxes" and form == "boxes":
            labels[:] = -1  # padding, as all prompts of a mask need the same number of points
        box = None if form == "points" else box_prompt(component, jitter, rng)
        prompts.append(Prompt(component.label, component.mask, box, xy, labels))
    return prompts


def exact_prompt(component: Component, kind: str) -> Prompt:
    """Return a component's prompt without randomness: its box, its deepest point, or both."""
    box = None if kind == "points" else component.box
    if kind == "boxes":
        return Prompt(component.label, component.mask, box)
    xy = deepest_point(component)[None]  # (1,2)
    return Prompt(component.label, component.mask, box, xy, np.ones(1, np.int64))


def image_prompt(mask: np.ndarray, classes: list[int]) -> Prompt:
    """Return the prompt "image": a box around everything, and all pixels of one class as target."""
    if len(classes) != 1:
        raise ValueError(
            f"--sam-prompts image: does not say which of {len(classes)} classes is meant; "
            "use boxes or points"
        )
    (label,) = classes
    target = np.where(is_ignored(mask), 255, mask == label).astype(np.uint8)
    return Prompt(int(label), target, image_box(mask.shape))


# --- boxes and points from files ------------------------------------------------------------------

# Accepted names of columns, in any letter case, with or without `_`.
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
EXAMPLES = {
    "boxes": "image,class,x0,y0,x1,y1",
    "points": "image,class,x,y,label",
    "prompts": "image,prompt",  # of --prompts-csv
}
# What each row must have besides the image.
VALUE_COLUMNS = {"boxes": ("x0", "y0", "x1", "y1"), "points": ("x", "y"), "prompts": ("prompt",)}


class FilePrompt(NamedTuple):
    """One box or one point of a file."""

    name: str | None  # its class
    object: str | None  # which object of this class and image it belongs to
    xy: np.ndarray  # float32: x0 y0 x1 y1 of a box, x y of a point
    label: int = 1  # of a point: 1 inside, 0 outside


def plain_path(name: str) -> str:
    """Return a path with / between folders and without `.` and inner `..` parts."""
    return posixpath.normpath(name.replace("\\", "/"))


class ImageNames:
    """Finds the image that a name in a file of boxes means.

    paths: {image: its path within the input folder or the data set's images folder}. A name with
    folders (`g/a.png`, `g\\a.png`, `./a.png`) is such a path. A bare file name (`a.png`) means the
    image of that name in any folder. Both may lack the file name extension.
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
        index = self.by_file_name if is_bare else self.by_path
        images = index.get(path, [])

        # With a.png and a.png.jpg in one folder, a.png means the first.
        exact = [image for image in images if self.has_extension_of(path, image)]
        images = exact or images
        if len(images) > 1:
            part = "folder" if exact else "folder or ending"
            names = ", ".join(self.shortest(image) for image in images[:3])
            raise ValueError(f"{name} fits {len(images)} images; add its {part}, as in {names}")
        return images[0] if images else None

    def has_extension_of(self, path: str, image) -> bool:
        """Return True if a path that fits an image has the image's extension."""
        return posixpath.basename(self.paths[image]) == posixpath.basename(path)

    def shortest(self, image) -> str:
        """Return the bare file name if only this image has it, else the path with its folder."""
        path = self.paths[image]
        file_name = posixpath.basename(path)
        candidates = self.by_file_name[file_name]
        same_name = [i for i in candidates if self.has_extension_of(path, i)]
        if len(same_name) == 1:
            return file_name
        return path if "/" in path else f"./{path}"


def read_prompts(boxes, points, sizes: dict, classes=None, names: dict | None = None):
    """Return the prompts of a file of boxes, of a file of points, or of both together.

    boxes, points: paths as `read_boxes` and `read_points` take them, or None. sizes: (H,W) of each
    image. names: as for `read_boxes`. classes: those of the data; if there are several, the first
    is the background, and each box must name one of the others; if there is one, the names in the
    file do not matter. None: the classes that the files name.

    Returns {image: [Prompt, ...]} without targets, and the classes. Points of one image and class
    are one object, or one for each value of the column `object`. Where an image has boxes and
    points of a class, each box gets the points of its `object` if both files number all objects (an
    object may then have only a box, or only points); otherwise there must be as many boxes as
    objects of points, in the same order. Where it has only boxes or only points of a class, these
    are its prompts. Raises as `read_boxes` does, and ValueError, one line, if boxes and points do
    not pair.
    """
    known = classes[1:] if classes is not None and len(classes) > 1 else None
    all_boxes = {} if boxes is None else read_boxes(boxes, sizes, known, names)
    all_points = {} if points is None else read_points(points, sizes, known, names)
    if classes is None:
        classes = named_classes([*all_boxes.values(), *all_points.values()])

    prompts = {}
    for image in all_boxes | all_points:
        name = image if names is None else names[image]
        image_boxes = all_boxes.get(image, [])
        image_points = all_points.get(image, [])
        class_boxes = group_by_class(image_boxes, classes, f"{boxes}: a box of {name}")
        class_points = group_by_class(image_points, classes, f"{points}: a point of {name}")

        prompts[image] = []
        for label in class_boxes | class_points:
            try:
                pairs = pair(class_boxes.get(label, []), class_points.get(label, []))
            except ValueError as error:
                raise ValueError(f"{points}: {name}: {error}") from None
            for box, box_points in pairs:
                prompts[image].append(to_prompt(label, box, box_points))
    return prompts, classes


def named_classes(rows_of_images: list[list[FilePrompt]]) -> list[str]:
    """Return the classes that files name; if there are several, "background" comes first."""
    names = set()
    for rows in rows_of_images:
        names.update(row.name for row in rows)
    names = sorted(names - {None})
    if len(names) > 1:
        return ["background", *names]
    return names or ["target"]


def group_by_class(
    rows: list[FilePrompt], classes: list[str], subject: str
) -> dict[int, list[FilePrompt]]:
    """Return the boxes or points of an image by class index; all are of class 1 if there is one.

    subject: which file and image, for the error. Raises ValueError if one of several classes is
    needed and a row has none.
    """
    groups = {}
    for row in rows:
        label = 1
        if len(classes) > 1:
            if row.name is None:
                raise ValueError(f"{subject} has no class; there are {', '.join(classes[1:])}")
            label = classes.index(row.name)
        groups.setdefault(label, []).append(row)
    return groups


def pair(boxes: list[FilePrompt], points: list[FilePrompt]) -> list[tuple]:
    """Return (box or None, its points) for each object of one class in one image.

    Raises ValueError, without file and image, if boxes and points do not pair, and for points alone
    that are all outside.
    """
    objects = {}
    for point in points:
        objects.setdefault(point.object, []).append(point)

    if not boxes:
        for object_points in objects.values():
            if not any(point.label for point in object_points):
                raise ValueError(
                    "all points of an object are outside; it needs one inside, or a box"
                )
        return [(None, object_points) for object_points in objects.values()]

    if not objects:
        return [(box, []) for box in boxes]
    if all(row.object is not None for row in [*boxes, *points]):
        return pair_by_object(boxes, objects)
    if len(boxes) == len(objects):
        return list(zip(boxes, objects.values(), strict=True))
    raise ValueError(
        f"{len(boxes)} boxes and points of {len(objects)} objects do not pair; number the objects "
        "in a column object of both"
    )


def pair_by_object(boxes: list[FilePrompt], objects: dict[str, list[FilePrompt]]) -> list[tuple]:
    """Return (box or None, its points) for each object, by the column `object`.

    Objects of points without a box come last. Raises ValueError for a second box of an object, and
    for an object without a box that has no point inside.
    """
    names = [box.object for box in boxes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"object {name} has {names.count(name)} boxes, not one")

    pairs = [(box, objects.get(box.object, [])) for box in boxes]
    for name, object_points in objects.items():
        if name in names:
            continue
        if not any(point.label for point in object_points):
            known = ", ".join(names)
            raise ValueError(
                f"object {name} has neither a box nor a point inside; objects of boxes: {known}"
            )
        pairs.append((None, object_points))
    return pairs


def to_prompt(label: int, box: FilePrompt | None, points: list[FilePrompt]) -> Prompt:
    """Return the prompt of one object of class `label`, without a target."""
    xy = np.float32([point.xy for point in points]).reshape(-1, 2)
    labels = np.int64([point.label for point in points])
    return Prompt(label, None, None if box is None else box.xy, xy, labels)


def read_boxes(path, sizes: dict, classes=None, names: dict | None = None) -> dict:
    """Return the boxes of a file by image, {image: [FilePrompt, ...]}, in the file's order.

    path: a .csv file, separated by commas, semicolons or tabs, with the header
    image,class,x0,y0,x1,y1; or a .json file with a list of objects of the same keys. The class may
    be missing, and there may be a column `object`. Columns may have other names, such as those in
    CORNER_COLUMNS. JSON may also be an annotation file of a data set (its `bbox` is x0, y0, x1, y1;
    that of an empty mask ends in 0, 0 and is skipped), or a COCO file (x, y, width, height). Prints
    which columns are ignored, and how many boxes are ignored because they are for other images.

    sizes: (H,W) of each image; boxes lie in 0..W and 0..H. classes: accepted names of classes,
    None: any. names: the images' paths as `ImageNames` takes them; None: the keys of `sizes`.
    Raises FileNotFoundError or ValueError, one line with file and row; also if no box is for any of
    the images.
    """
    return read_rows(path, "boxes", sizes, classes, names)


def read_points(path, sizes: dict, classes=None, names: dict | None = None) -> dict:
    """Return the points of a file by image, {image: [FilePrompt, ...]}, in the file's order.

    path: a .csv or .json file as for `read_boxes`, with the columns image,class,x,y,label. The
    label is 1 for a point inside of the object (the default) and 0 for one outside. A column
    `object` separates objects of one class. Other arguments and errors as for `read_boxes`.
    """
    return read_rows(path, "points", sizes, classes, names)


def read_rows(path, kind: str, sizes: dict, classes, names: dict | None) -> dict:
    """Read a file for `read_boxes` or `read_points`; kind is "boxes" or "points"."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of {kind}")
    names = ImageNames({image: image for image in sizes} if names is None else names)

    rows = {}
    unknown_images = []  # one name for each row
    ignored_columns = set()
    for location, row in file_rows(path, kind):
        try:
            columns = find_columns(row, kind)
            ignored_columns |= row.keys() - columns.values() - {""}
            name = cell_text(row, columns["image"])
            image = names.find(name) if name else None
            if name and image is None:
                unknown_images.append(" ".join(name.split()))  # a name may contain line breaks
                continue
            values = {field: cell_text(row, column) for field, column in columns.items()}
            parsed = parse_row(values, kind, sizes.get(image), classes)
            rows.setdefault(image, []).append(parsed)
        except ValueError as error:
            message = " ".join(str(error).split())
            raise ValueError(f"{path}, {location}: {message}") from None

    check_not_empty(path, kind, rows, unknown_images, names)
    check_pixels(path, kind, rows)
    if ignored_columns:
        columns = " ".join(", ".join(sorted(ignored_columns)).split())
        print(f"{path}: ignored columns: {columns}")
    print_ignored_rows(path, unknown_images)
    return rows


def print_ignored_rows(path: Path, unknown_images: list[str]) -> None:
    """Print how many rows are for other images. unknown_images: one name for each row."""
    if not unknown_images:
        return
    count = len(unknown_images)
    rows_text = "1 row for another image is"
    if count > 1:
        rows_text = f"{count} rows for other images are"
    print(f"{path}: {rows_text} ignored ({first_three(dict.fromkeys(unknown_images))})")


def first_three(names) -> str:
    """Return "a, b, c, …"."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def check_not_empty(
    path: Path, kind: str, rows: dict, unknown_images: list[str], names: ImageNames
) -> None:
    """Raise ValueError, one line, if a file has no rows for any image.

    kind: "boxes", "points" or "prompts". rows: {image: its rows}.
    """
    if not rows and unknown_images:
        example = next(iter(names.paths.values()), "none")
        raise ValueError(
            f"{path}: none of the {len(unknown_images)} {kind} is for any of the images; the file "
            f"names {unknown_images[0]}, the images are named like {example}"
        )
    if not rows:
        raise ValueError(f"{path}: holds no {kind}")


def check_pixels(path: Path, kind: str, rows: dict) -> None:
    """Raise ValueError, one line, if the coordinates of a file are fractions of the image."""
    coordinates = []
    for image_rows in rows.values():
        coordinates += [row.xy for row in image_rows]
    coordinates = np.concatenate(coordinates)
    if coordinates.max() <= 1 and (coordinates % 1).any():
        raise ValueError(
            f"{path}: all numbers are from 0 to 1, but {kind} are in pixels; multiply them by the "
            "image's width and height"
        )


# --- rows of files --------------------------------------------------------------------------------


def file_rows(path: Path, kind: str):
    """Yield (location, {column: value}) of each row of a file. Raises ValueError, one line."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from csv_rows(path, kind)
    elif suffix == ".json":
        yield from json_rows(path, kind)
    else:
        raise ValueError(f"{path}: {kind} are read from .csv and .json files")


def csv_rows(path: Path, kind: str):
    """Yield (location, {column: text}) of each row of a CSV file. Raises ValueError, one line."""
    text = files.read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first_line.count)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)

    header = None
    try:
        for cells in reader:
            if is_blank(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                check_header(path, header, kind)
                continue
            if not is_blank(cells[len(header) :]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: has {len(cells)} values for {len(header)} "
                    "columns; write decimals with a point, and texts with a separator in quotes"
                )
            row = dict.fromkeys(header, "")
            row.update(zip(header, cells, strict=False))  # a row may have fewer cells
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def is_blank(cells: list[str]) -> bool:
    """Return True if no cell has any text."""
    return not any(cell.strip() for cell in cells)


def check_header(path: Path, header: list[str], kind: str) -> None:
    """Raise ValueError, one line, if the first line of a CSV file does not name its columns."""
    numbers = [cell for cell in header if re.fullmatch(r"[-+]?\d+([.,]\d+)?", cell)]
    if len(numbers) > 1:
        raise ValueError(f"{path}: has no header; its first line must be like {EXAMPLES[kind]}")

    try:
        columns = find_columns(dict.fromkeys(header), kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for column in columns.values():
        if header.count(column) > 1:
            raise ValueError(f"{path}: has two columns {column}; remove one")


def json_rows(path: Path, kind: str):
    """Yield (location, {key: value}) of each entry of a JSON file. Raises ValueError, one line."""
    content = files.read_json(path)
    is_coco = isinstance(content, dict) and {"images", "annotations"} <= content.keys()
    if is_coco and kind == "boxes":
        yield from coco_rows(path, content)
        return

    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        keys = EXAMPLES[kind].replace(",", ", ")
        raise ValueError(f"{path}: expected a list of objects with {keys}")
    for i, row in enumerate(content):
        if kind == "boxes" and "img_name" in row and "bbox" in row:  # a data set's annotation file
            row = annotation_row(f"{path}, entry {i}", row)
        if row is not None:
            yield f"entry {i}", row


def annotation_row(location: str, row: dict) -> dict | None:
    """Return an annotation file's entry with the corners of its bbox, None for an empty mask."""
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{location}: bbox {box} is not four numbers")
    if box[2:] == [0, 0] and box[:2] != [0, 0]:
        return None
    fields = {key: row[key] for key in ("img_name", "class", "object") if key in row}
    return fields | dict(zip(VALUE_COLUMNS["boxes"], box, strict=True))


def coco_rows(path: Path, content: dict):
    """Yield (location, row) of each annotation of a COCO file. Raises ValueError, one line."""
    try:
        images = {image["id"]: image["file_name"] for image in content["images"]}
        classes = {item["id"]: item["name"] for item in content.get("categories", [])}
        annotations = list(content["annotations"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: expected COCO's images with id and file_name, categories with id and name, "
            "a list of annotations"
        ) from None

    for i, item in enumerate(annotations):
        try:
            x, y, width, height = item["bbox"]
            row = {"image": images[item["image_id"]], "class": classes.get(item.get("category_id"))}
            row |= {"x0": x, "y0": y, "x1": x + width - 1, "y1": y + height - 1}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError(
                f"{path}, annotation {i}: expected image_id of one of the images, and bbox of four "
                "numbers"
            ) from None
        yield f"annotation {i}", row


# --- columns and values ---------------------------------------------------------------------------


def plain_key(key: str) -> str:
    """Return the name of a column in lower case, without `_`, blanks and a leading `bbox`."""
    return re.sub(r"[\W_]", "", key.lower()).removeprefix("bbox")


def find_columns(row: dict, kind: str) -> dict[str, str]:
    """Return which column of a row holds which field, {field: column}.

    The fields are image, class and object (if present), x0, y0, x1, y1 of boxes, and x, y and label
    (if present) of points; image and prompt of prompts. Raises ValueError, without the location, if
    one is missing.
    """
    columns_by_key = {}
    for column in row:
        columns_by_key.setdefault(plain_key(column), column)

    columns = {}
    for field, keys in accepted_keys(columns_by_key.keys(), kind).items():
        for key in keys:
            if key in columns_by_key:
                columns[field] = columns_by_key[key]
                break

    missing = [field for field in ("image", *VALUE_COLUMNS[kind]) if field not in columns]
    if missing:
        if kind == "boxes":
            refuse_other_boxes(row, columns_by_key)
        raise ValueError(f"has no {', '.join(missing)}; write {EXAMPLES[kind]}")
    return columns


def accepted_keys(keys, kind: str) -> dict[str, tuple[str, ...]]:
    """Return {field: accepted plain names of its column}, given the plain names in the file."""
    if kind == "prompts":
        return {"image": IMAGE_COLUMNS, "prompt": ("prompt",)}
    fields = {"image": IMAGE_COLUMNS, "class": CLASS_COLUMNS, "object": OBJECT_COLUMNS}
    if kind == "points":
        fields["class"] = tuple(key for key in CLASS_COLUMNS if key != "label")
        return fields | {"x": ("x",), "y": ("y",), "label": ("label",)}

    corners = CORNER_COLUMNS[0]
    for form in CORNER_COLUMNS:
        if keys >= {*form}:
            corners = form
            break
    for field, key in zip(VALUE_COLUMNS["boxes"], corners, strict=True):
        fields[field] = (key,)
    return fields


def refuse_other_boxes(row: dict, columns_by_key: dict[str, str]) -> None:
    """Raise ValueError if boxes are stored by width and height, or in an unclear order."""
    corners = "x0 = x, y0 = y, x1 = x + width - 1, y1 = y + height - 1"
    sizes = [column for key, column in columns_by_key.items() if key in SIZE_COLUMNS]
    if len(sizes) == 2:
        raise ValueError(
            f"gives boxes by {sizes[0]} and {sizes[1]}; write corners instead: {corners}, from the "
            "left upper x, y"
        )
    if "bbox" in row:
        raise ValueError(
            "bbox may be corners or x, y, width, height; write corners as x0, y0, x1, y1 instead "
            f"({corners})"
        )


def cell_text(row: dict, column: str) -> str:
    """Return a value of a row as text, "" if it is missing."""
    value = row.get(column)
    return "" if value is None else str(value).strip()


def parse_row(values: dict[str, str], kind: str, size, classes) -> FilePrompt:
    """Return the box or point of a row, {field: text}, in an image of `size` (H,W).

    Raises ValueError, without the location.
    """
    missing = [field for field in ("image", *VALUE_COLUMNS[kind]) if not values[field]]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    name = values.get("class") or None
    if classes is not None and name is not None and name not in classes:
        raise ValueError(f"unknown class {name}; there are {', '.join(classes)}")

    xy = parse_coordinates(values, kind, size)
    label = parse_label(values.get("label"))
    return FilePrompt(name, values.get("object") or None, np.float32(xy), label)


def parse_coordinates(values: dict[str, str], kind: str, size) -> list[float]:
    """Return the numbers of a box or point. Raises ValueError, without the location."""
    texts = [values[field] for field in VALUE_COLUMNS[kind]]
    noun = "box" if kind == "boxes" else "point"
    prompt = f"{noun} {' '.join(texts)}"
    if any(re.fullmatch(r"[-+]?\d+,\d+", text) for text in texts):
        raise ValueError(f"{prompt} has decimal commas; write decimals with a point")

    try:
        xy = [float(text) for text in texts]  # JSON's true and [1] are no numbers
    except ValueError:
        xy = [math.nan]
    if not all(map(math.isfinite, xy)):
        count = "four" if kind == "boxes" else "two"
        raise ValueError(f"{prompt} is not {count} numbers")

    H, W = size
    if xy[-2] < xy[0] or xy[-1] < xy[1]:
        raise ValueError(f"{prompt} is inverted; expected x0 <= x1 and y0 <= y1")
    if min(xy) < 0 or xy[-2] > W or xy[-1] > H:
        raise ValueError(f"{prompt} lies outside {values['image']}, which is {W}x{H}")
    return xy


def parse_label(text: str | None) -> int:
    """Return the label of a point, 1 by default. Raises ValueError, without the location."""
    if not text:
        return 1
    labels = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
    if text.lower() not in labels:
        raise ValueError(
            f"unknown label {text} of a point: 1 is inside, 0 outside; a class belongs into the "
            "column class"
        )
    return labels[text.lower()]
