"""Read Label Studio's JSON, for `prepare.py import`: polygons, rectangles, ellipses and brushes.

    [{"id", "data": {"image": "/data/upload/1/1a2b3c4d-photo.png"}, "annotations": [{"result":
      [{"type": "polygonlabels", "value": {"points": …, "polygonlabels": ["polyp"]},
        "original_width", "original_height"}, …], "was_cancelled", "ground_truth"}]}, …]

- Coordinates are per cent of the upright photo. A rectangle is turned around its left upper corner,
  an ellipse around its centre. A brush is a packed RGBA image; opacities above 127 are the object.
- A task has one annotation that counts: cancelled ones are left out and counted, and of several
  others the one marked as ground truth is taken. If none or several are marked, that is an error.
  Predictions and drafts are never read.
- An annotation without regions says that the image has no object. A task without an annotation is
  not annotated: an error, or left out with --skip-unpaired.
- Regions without an area, such as key points, are skipped and counted.
- Uploaded images are named with eight characters and a dash in front, and with _ for blanks. An
  image in FOLDER may have this name or its own.
- The classes are the labels in alphabetical order; the export does not hold the project's order.
"""

import itertools
import re
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from imaging import layouts
from preparation import shapes, tool_exports
from preparation.readings import Format, Reading
from preparation.shapes import errors_at, list_of, number, value_of, whole_number
from preparation.tool_exports import Export, ImageIndex, ListedImage, Shape

TITLE = "Label Studio JSON"
KEYS = ('"annotations"', '"completions"', '"data"', '"original_width"', '"annotation_id"')
UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
OPAQUE = 127  # of 0..255


def recognise(folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder with Label Studio's JSON, [] for other folders."""
    contents = {}
    for path, content in tool_exports.json_files(folder, args, "[", KEYS):
        refuse_minimal(path, content)
        if any(is_task(item) for item in content):
            contents[path] = content
    if not contents:
        return []

    reader = Reader(ImageIndex(folder, key=uploaded_name), args.skip_unpaired)
    for path, content in contents.items():
        reader.read(path, content)
    return [tool_exports.reading(reader.export(), reader.index, args)]


def is_task(item) -> bool:
    """Return True for an item with data and a list of annotations (once called completions)."""
    if not isinstance(item, dict) or not isinstance(item.get("data"), dict):
        return False
    return isinstance(annotations_of(item), list)


def annotations_of(task: dict):
    """Return the annotations of a task, None if it has none."""
    return task.get("annotations", task.get("completions"))


def refuse_minimal(path: Path, content: list) -> None:
    """Raise ValueError for JSON-MIN, which lacks what tells cancelled annotations."""
    first = content[0] if content else None
    if isinstance(first, dict) and "annotation_id" in first and "annotations" not in first:
        raise ValueError(f'{path}: is "JSON-MIN" of Label Studio; export the project as "JSON"')


def uploaded_name(name: str) -> str:
    """Return the name that Label Studio gives to an uploaded file, without what it puts in front.

    Django's rule: blanks become _, and only letters, digits, _, - and . remain.
    """
    name = layouts.composed(name).strip().replace(" ", "_")
    return re.sub(r"[^-\w.]", "", name)


def image_path(address: str) -> str:
    """Return the path in an address: of a local file its ?d=, of a URL the path."""
    parts = urlsplit(address.replace("\\", "/"))
    local = parse_qs(parts.query).get("d")
    if local:
        return local[0]
    return unquote(parts.path)


class Reader:
    """Reads tasks and counts what is left out."""

    def __init__(self, index: ImageIndex, skip_unpaired: bool):
        self.index = index
        self.skip_unpaired = skip_unpaired
        self.file = None  # the first one
        self.images = []
        self.skipped = Counter()  # types of regions that are no areas
        self.cancelled = 0
        self.without = 0  # tasks that nobody annotated

    def read(self, path: Path, tasks: list[dict]) -> None:
        """Read the tasks of a file."""
        self.file = self.file or path
        for count, task in enumerate(tasks):
            id = task.get("id", count) if isinstance(task, dict) else count
            location = f"{path}, task {id}"
            with errors_at(location):
                value_of(task, "data", dict, "an object")
                annotation = self.choose_annotation(task)
                if annotation is not None:
                    self.images.append(self.read_task(path, location, task, annotation))

    def choose_annotation(self, task: dict) -> dict | None:
        """Return the annotation that counts, None to leave the task out."""
        remaining = []
        for annotation in list_of({"annotations": annotations_of(task)}, "annotations"):
            value_of({"annotation": annotation}, "annotation", dict, "an object")
            is_cancelled = bool(annotation.get("was_cancelled") or annotation.get("skipped"))
            self.cancelled += is_cancelled
            if not is_cancelled:
                remaining.append(annotation)

        if len(remaining) > 1:
            marked = [annotation for annotation in remaining if annotation.get("ground_truth")]
            if len(marked) != 1:
                raise ValueError(
                    f"has {len(remaining)} annotations, {len(marked)} of them marked as ground "
                    "truth; mark one as ground truth, or delete the others"
                )
            remaining = marked
        if not remaining and not self.skip_unpaired:
            raise ValueError(
                "is not annotated; submit an empty annotation if it shows no object, or leave it "
                "out with --skip-unpaired"
            )
        self.without += not remaining
        return remaining[0] if remaining else None

    def read_task(self, path: Path, location: str, task: dict, annotation: dict) -> ListedImage:
        """Return the image of a task with the regions of an annotation."""
        results = list_of(annotation, "result")
        for result in results:
            value_of({"a region": result}, "a region", dict, "an object")
        sizes = set()
        drawn = []
        for count, result in enumerate(results):
            with errors_at(f"region {result.get('id', count)}"):
                kind = area_kind(result, results)
                if kind is None:
                    self.skipped[str(result.get("type"))] += 1
                    continue
                if kind == "":
                    continue
                size = original_size(result)
                sizes.add(size)
                draw = DRAWINGS[kind](result["value"], size)
                for label in labels_of(result):
                    drawn.append(Shape(label, draw, f"{location}, region {count}"))

        if len(sizes) > 1:
            raise ValueError(f"its regions are for images of {len(sizes)} sizes")
        size = sizes.pop() if sizes else None
        name = self.image_name(task, results)
        return ListedImage(name, path, location, size, drawn)

    def image_name(self, task: dict, results: list) -> str:
        """Return the path of the image of a task, by the name that a file of the folder has."""
        targets = [result.get("to_name") for result in results]
        paths = {}
        for key, value in task["data"].items():
            if isinstance(value, str) and layouts.is_image(Path(image_path(value))):
                paths[key] = PurePosixPath(image_path(value))
        if len(paths) > 1:
            paths = {key: path for key, path in paths.items() if key in targets}
        if len(paths) != 1:
            raise ValueError(f"data names {len(paths)} images, expected one")

        (path,) = paths.values()
        own_name = UPLOAD.sub("", path.name, count=1)
        return str(path if self.index.has(path.name) else path.with_name(own_name))

    def export(self) -> Export:
        """Return what was read."""
        classes = tool_exports.labels_of(self.images)
        notes = tool_exports.counted("regions that are no areas, skipped", self.skipped)
        if self.cancelled:
            notes.append(f"cancelled annotations, left out: {self.cancelled}")
        if self.without:
            notes.append(f"tasks that are not annotated, left out: {self.without}")
        return Export("label-studio", TITLE, self.file, self.images, classes, notes)


# --- regions --------------------------------------------------------------------------------------


def area_kind(result: dict, results: list) -> str | None:
    """Return "polygon", "rectangle", "ellipse" or "brush"; None for regions without an area.

    "" for the outline of a region whose labels are in another result with its id: with the tags
    Polygon and Labels, there are two results for each region, and the other one has all.
    """
    kind = value_of(result, "type", str, "a text")
    if kind.removesuffix("labels") in DRAWINGS and kind.endswith("labels"):
        return kind.removesuffix("labels")
    if kind in DRAWINGS:
        for other in results:
            if other.get("id") == result.get("id") and other.get("type") == "labels":
                return ""
        raise ValueError("has no label")
    if kind != "labels":
        return None

    value = value_of(result, "value", dict, "an object")
    keys = {"points": "polygon", "rle": "brush", "radiusX": "ellipse", "height": "rectangle"}
    for key, name in keys.items():
        if key in value:
            return name
    return None


def labels_of(result: dict) -> list[str]:
    """Return the labels of a region. Raises ValueError if it has none."""
    value = value_of(result, "value", dict, "an object")
    labels = value.get(result["type"], value.get("labels"))
    if not isinstance(labels, list) or not labels:
        raise ValueError("has no label")
    return [value_of({"label": label}, "label", str, "a text").strip() for label in labels]


def original_size(result: dict) -> tuple[int, int]:
    """Return the size (H, W) of the image of a region. Raises ValueError if it was turned."""
    if result.get("image_rotation"):
        raise ValueError("its image was turned in Label Studio; turn it back, or turn the file")
    value_of(result, "value", dict, "an object")
    height = whole_number(result.get("original_height"))
    return height, whole_number(result.get("original_width"))


def in_pixels(value: dict, keys: tuple[str, ...], size: tuple[int, int]) -> list[float]:
    """Return lengths in per cent of an image of size (H, W) as pixels.

    keys: of lengths along x and along y in turn.
    """
    lengths = []
    for key, side in zip(keys, itertools.cycle((size[1], size[0])), strict=False):
        lengths.append(number(value.get(key)) * side / 100)
    return lengths


def polygon(value: dict, size: tuple[int, int]):
    """Return the function that draws a polygon in per cent."""
    outline = shapes.points(list_of(value, "points"))
    if len(outline) < 3:
        raise ValueError(f"is a polygon of {len(outline)} points")
    return partial(shapes.polygons, [outline * [size[1] / 100, size[0] / 100]])


def rectangle(value: dict, size: tuple[int, int]):
    """Return the function that draws a rectangle in per cent, turned around its first corner."""
    x, y, width, height = in_pixels(value, ("x", "y", "width", "height"), size)
    angle = number(value.get("rotation") or 0)
    outline = shapes.box_outline((x, y, x + width, y + height), angle, (x, y))
    return partial(shapes.polygons, [outline])


def ellipse(value: dict, size: tuple[int, int]):
    """Return the function that draws an ellipse in per cent, turned around its centre."""
    lengths = in_pixels(value, ("x", "y", "radiusX", "radiusY"), size)
    angle = number(value.get("rotation") or 0)
    return partial(shapes.ellipse, (*lengths, angle))


def brush(value: dict, size: tuple[int, int]):
    """Return the function that draws a brush."""
    if value.get("format") != "rle":
        raise ValueError(f"its format is {value.get('format')}, expected rle")
    code = list_of(value, "rle")
    for byte in code:
        if isinstance(byte, bool) or not isinstance(byte, int) or not 0 <= byte <= 255:
            raise ValueError(f"rle holds {str(byte)[:40]}, which is not a byte")
    return partial(draw_brush, bytes(code))


def draw_brush(code: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the opaque pixels of a packed RGBA image."""
    values = unpack(code, 4 * size[0] * size[1])
    opacity = values.reshape(*size, 4)[..., 3]
    return opacity > OPAQUE


DRAWINGS = {"polygon": polygon, "rectangle": rectangle, "ellipse": ellipse, "brush": brush}


# --- brushes --------------------------------------------------------------------------------------


class Bits:
    """Reads whole numbers from a series of bits, the highest bit first."""

    def __init__(self, code: bytes):
        self.bits = np.unpackbits(np.frombuffer(code, np.uint8))
        self.position = 0

    def take(self, count: int) -> np.ndarray:
        """Return the next bits. Raises ValueError if there are fewer."""
        end = self.position + count
        if end > len(self.bits):
            raise ValueError("rle ends early")
        taken = self.bits[self.position : end]
        self.position = end
        return taken

    def read(self, count: int) -> int:
        """Return the number in the next bits."""
        value = 0
        for bit in self.take(count).tolist():
            value = 2 * value + bit
        return value


def unpack(code: bytes, count: int) -> np.ndarray:
    """Return the values of @thi.ng/rle-pack's code, uint8 (count,).

    The code begins with the number of values (32 bits), the bits of a value less 1 (5), and the
    bits of four kinds of lengths less 1 (4 each). Blocks follow: 1 bit that says whether one value
    is repeated, 2 bits for the kind of the length, the length less 1, and then the value or values.
    Raises ValueError if it has another number of values, or values that are not bytes.
    """
    bits = Bits(code)
    stated = bits.read(32)
    width = bits.read(5) + 1
    if stated != count or width != 8:
        raise ValueError(
            f"rle holds {stated} values of {width} bits, but the image needs {count} of 8 bits"
        )
    lengths = [bits.read(4) + 1 for _ in range(4)]

    values = np.zeros(count, np.uint8)
    position = 0
    while position < count:
        is_repeated = bits.read(1)
        kind = bits.read(2)
        end = position + bits.read(lengths[kind]) + 1
        if end > count:
            raise ValueError(f"rle holds more than {count} values")
        if is_repeated:
            values[position:end] = bits.read(8)
        else:
            values[position:end] = np.packbits(bits.take(8 * (end - position)))
        position = end
    return values


FORMAT = Format("label-studio", "Label Studio's JSON", recognise)
