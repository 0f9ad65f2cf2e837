"""Read run-length codes in a CSV file, as Kaggle's competitions use them, for `prepare.py import`.

    ImageId,ClassId,EncodedPixels
    0002cc93b.jpg,1,29102 12 29346 24 …

- A code is pairs of start and length, counted from 1, column by column; runs are in order. Tables
  that count row by row cannot be told from these: look at overview.png.
- Each row is one object. An empty code or -1 is none. An image without any object is a negative.
- Columns: the image (ImageId, image_id, id, img, image, filename), the code (EncodedPixels, rle,
  rle_mask, pixels, segmentation) and perhaps the class (ClassId, class, label, category). Images
  may be named without their ending. In ImageId_ClassId and Image_Label the class follows the last
  underscore.
- Numbered classes are named by --classes. Without a column of classes there is one without a name.
- The files that Kaggle calls train are those with labels, so that they say nothing about splits:
  the split is at random. sample_submission.csv is skipped.
"""

import csv
import re
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

from imaging.files import read_csv
from preparation import shapes, tool_exports
from preparation.readings import Format, ImageReading, Reading
from preparation.shapes import errors_at, whole_number
from preparation.tool_exports import Export, ImageIndex, ListedImage, Shape

TITLE = "CSV with run-length codes"
IMAGE_COLUMNS = ("imageid", "imgid", "image", "img", "filename", "imagename", "id")
CODE_COLUMNS = ("encodedpixels", "rle", "rlemask", "pixels", "segmentation")
CLASS_COLUMNS = ("classid", "class", "classname", "label", "category")
PAIRED_COLUMNS = ("imageidclassid", "imagelabel")  # image and class, joined by _
NOTHING = ("", "-1", "nan")


def recognise(folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder with a CSV file of run-length codes, [] for other folders."""
    tables = []
    samples = 0
    for path in tool_exports.files_ending(folder, ".csv", args):
        columns = find_columns(path)
        if not columns:
            continue
        if path.stem.lower().startswith("sample_submission"):
            samples += 1
            continue
        rows = read_rows(path)
        if holds_codes(rows, columns["code"]):
            refuse_uw_madison(path, rows, columns)
            tables.append(Table(path, rows, columns))
    if not tables:
        return []

    return [read_tables(tables, samples, folder, args)]


def plain(column: str) -> str:
    """Return the name of a column in lower case, with letters and digits only."""
    return re.sub(r"[\W_]", "", column.lower())


def find_columns(path: Path) -> dict[str, str]:
    """Return the columns of a CSV file: image, code, perhaps class or pair; {} for other files."""
    text = tool_exports.text_around(path)
    first_line = (text.splitlines() or [""])[0]
    names = next(csv.reader([first_line]), [])
    by_plain_name = {plain(name): name for name in names}

    columns = {}
    accepted = {"image": IMAGE_COLUMNS, "code": CODE_COLUMNS, "class": CLASS_COLUMNS}
    accepted["pair"] = PAIRED_COLUMNS
    for field, choices in accepted.items():
        for choice in choices:
            if choice in by_plain_name:
                columns.setdefault(field, by_plain_name[choice])
    has_image = "image" in columns or "pair" in columns
    return columns if has_image and "code" in columns else {}


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a CSV file; codes may be long. Raises ValueError, one line."""
    usual = csv.field_size_limit(path.stat().st_size + 1)
    try:
        return read_csv(path)
    finally:
        csv.field_size_limit(usual)


def code_of(row: dict, column: str) -> str:
    """Return the run-length code of a row, "" if it has none."""
    code = (row.get(column) or "").strip()
    return "" if code.lower() in NOTHING else code


def holds_codes(rows: list[dict], column: str) -> bool:
    """Return True if the first code of a column is pairs of numbers."""
    for row in rows:
        code = code_of(row, column)
        if code:
            return re.match(r"\d+ \d+( |$)", code) is not None
    return False


def refuse_uw_madison(path: Path, rows: list[dict], columns: dict[str, str]) -> None:
    """Raise ValueError, one line, for the data set that has a command of its own."""
    first = rows[0].get(columns.get("image", "")) or ""
    if re.fullmatch(r"case\d+_day\d+_slice_\d+", first):
        raise ValueError(
            f"{path}: is the UW-Madison data set; run python prepare.py uw-madison {path.parent}"
        )


class Table:
    """The rows of a CSV file."""

    def __init__(self, path: Path, rows: list[dict], columns: dict[str, str]):
        self.path = path
        self.rows = rows
        self.columns = columns
        self.has_classes = "class" in columns or "pair" in columns

    def image_and_class(self, row: dict) -> tuple[str, str]:
        """Return the image of a row and its class, "" without classes. Raises ValueError."""
        if "pair" in self.columns:
            image, _, name = (row.get(self.columns["pair"]) or "").strip().rpartition("_")
        else:
            image = (row.get(self.columns["image"]) or "").strip()
            name = ""
            if "class" in self.columns:
                name = (row.get(self.columns["class"]) or "").strip()
        if not image:
            raise ValueError("names no image")
        return image, name

    def images(self) -> list[ListedImage]:
        """Return the images of all rows, with the objects of theirs that have a code."""
        lines = {}  # image -> the line that names it first
        drawn = {}  # image -> shapes
        for line, row in enumerate(self.rows, 2):
            location = f"{self.path}, line {line}"
            with errors_at(location):
                image, name = self.image_and_class(row)
                lines.setdefault(image, location)
                objects = drawn.setdefault(image, [])
                code = code_of(row, self.columns["code"])
                if code:
                    if self.has_classes and not name:
                        raise ValueError("has no class")
                    numbers = [whole_number(text) for text in code.split()]
                    objects.append(Shape(name, partial(shapes.from_starts, numbers), location))

        images = []
        for name, objects in drawn.items():
            images.append(ListedImage(name, self.path, lines[name], None, objects))
        return images


def read_tables(tables: list[Table], samples: int, folder: Path, args: Namespace) -> ImageReading:
    """Return the reading of one or several tables."""
    images = []
    for table in tables:
        images += table.images()
    labels = tool_exports.labels_of(images)
    classes = sorted(filter(None, labels), key=by_number)

    notes = ["codes are read column by column, from 1: look at overview.png"]
    if samples:
        notes.append(f"sample_submission files, skipped: {samples}")
    file = tables[0].path
    export = Export("kaggle-rle", TITLE, file, images, tuple(classes), notes, has_splits=False)
    if args.classes and classes:
        export = with_names(export, args.classes)
        args = Namespace(**vars(args) | {"classes": None})
    return tool_exports.reading(export, ImageIndex(folder), args)


def by_number(name: str) -> tuple[float, str]:
    """Return a key to sort classes: numbers by value, then texts."""
    return (float(name), "") if name.isdecimal() else (float("inf"), name)


def with_names(export: Export, text: str) -> Export:
    """Return an export whose classes 1, 2, … are named by --classes. Raises ValueError."""
    names = [name.strip() for name in text.split(",")]
    numbers = [str(k) for k in range(1, len(names) + 1)]
    unknown = [name for name in export.classes if name not in numbers]
    if unknown or not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"--classes {text}: the classes in the table are {', '.join(export.classes)}; name "
            "the numbers 1, 2, … once each"
        )

    name_of_number = dict(zip(numbers, names, strict=True))
    images = []
    for image in export.images:
        objects = []
        for shape in image.shapes:
            objects.append(replace(shape, class_name=name_of_number[shape.class_name]))
        images.append(replace(image, shapes=objects))
    return replace(export, images=images, classes=tuple(names))


FORMAT = Format("kaggle-rle", "Kaggle's CSV files of run-length codes", recognise)
