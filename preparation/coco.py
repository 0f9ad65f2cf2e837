"""Read COCO JSON, for `prepare.py import`: instances as polygons or run-length codes.

    {"images": [{"id", "file_name", "width", "height"}, …], "categories": [{"id", "name"}, …],
     "annotations": [{"image_id", "category_id", "segmentation", "iscrowd"}, …]}

This is what Roboflow (train/_annotations.coco.json beside the images), CVAT (annotations/
instances_default.json and images/), Label Studio (result.json and images/) and COCO itself
(annotations/instances_train2017.json and train2017/) write. One file or one for each split.

- The classes are in the order of the category ids. A category without annotations that is only the
  supercategory of others, as Roboflow writes, and an unused background are left out.
- Several outlines of one annotation are a union, as in pycocotools; an outline of fewer than three
  points covers nothing. Run-length codes may be plain or compressed. A crowd region is an object.
- An annotation with a box alone is refused: a box is no outline.
- Coordinates of turned photos: see tool_exports.py.
"""

from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from preparation import shapes, tool_exports
from preparation.readings import Format, Reading
from preparation.shapes import errors_at, list_of, text_of, value_of, whole_number
from preparation.tool_exports import Export, ImageIndex, ListedImage, Shape

TITLE = "COCO JSON"
KEYS = ('"images"', '"annotations"', '"categories"', '"info"', '"licenses"')


def recognise(folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder with COCO JSON, [] for other folders."""
    contents = {}
    for path, content in tool_exports.json_files(folder, args, "{", KEYS):
        if is_coco(content):
            contents[path] = content
    if not contents:
        return []

    export = read_export(contents)
    return [tool_exports.reading(export, ImageIndex(folder), args)]


def is_coco(content) -> bool:
    """Return True for an object with images and annotations, one of which at least is a list."""
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return False
    return isinstance(content["images"], list) or isinstance(content["annotations"], list)


def read_export(contents: dict[Path, dict]) -> Export:
    """Return the images and shapes of one or several COCO files, {file: content}."""
    files = [CocoFile(path, content) for path, content in contents.items()]
    names = merge_categories(files)
    used = {id for file in files for id in file.used}
    parents = {parent for file in files for parent in file.parents}

    classes = []
    for id, name in sorted(names.items()):
        if id in used or name not in parents:
            classes.append(name)
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise ValueError(f"{files[0].path}: has two categories {repeated[0]}; rename one")

    images = []
    notes = []
    if len(files) > 1:
        notes.append(f"files: {len(files)}")
    for file in files:
        images += file.images()
    crowds = sum(file.crowds for file in files)
    thin = sum(file.thin for file in files)
    if crowds:
        notes.append(f"crowd regions, which count as objects: {crowds}")
    if thin:
        notes.append(f"outlines of fewer than three points, which cover nothing: {thin}")
    return Export("coco", TITLE, files[0].path, images, tuple(classes), notes, means_stored=True)


def merge_categories(files: list["CocoFile"]) -> dict[int, str]:
    """Return {id: name} of the categories of all files. Raises ValueError if they contradict."""
    names = {}
    first = {}  # id -> the first file that has it
    for file in files:
        for id, name in file.categories.items():
            if names.setdefault(id, name) != name:
                raise ValueError(
                    f"{file.path}: category {id} is {name}, but {names[id]} in {first[id]}"
                )
            first.setdefault(id, file.path)
    return names


class CocoFile:
    """One COCO file: its images, categories and the shapes of its annotations."""

    def __init__(self, path: Path, content: dict):
        self.path = path
        self.listed = {}  # id of an image -> its entry
        self.categories = {}  # id -> name
        self.parents = set()  # names of supercategories of other categories
        self.used = set()  # ids of categories with annotations
        self.shapes = {}  # id of an image -> shapes
        self.crowds = 0
        self.thin = 0  # outlines of fewer than three points

        with errors_at(str(path)):
            images = list_of(content, "images")
            categories = list_of(content, "categories")
            annotations = list_of(content, "annotations")
        for number, item in enumerate(images):
            with errors_at(f"{path}, image {number}"):
                self.add_image(item)
        for number, item in enumerate(categories):
            with errors_at(f"{path}, category {number}"):
                self.add_category(item)
        for number, item in enumerate(annotations):
            location = f"{path}, annotation {number}"
            with errors_at(location):
                self.add_annotation(item, location)

    def add_image(self, item: dict) -> None:
        """Add the entry of an image."""
        id = value_of(item, "id", int | str, "a number")
        if id in self.listed:
            raise ValueError(f"id {id} belongs to two images")
        text_of(item, "file_name")
        self.listed[id] = item

    def add_category(self, item: dict) -> None:
        """Add a category and the name of its supercategory."""
        id = value_of(item, "id", int, "a number")
        if id in self.categories:
            raise ValueError(f"id {id} belongs to two categories")
        name = text_of(item, "name")
        self.categories[id] = name
        parent = item.get("supercategory")
        if isinstance(parent, str):
            self.parents.add(parent.strip())

    def add_annotation(self, item: dict, location: str) -> None:
        """Add the shape of an annotation to its image."""
        image = value_of(item, "image_id", int | str, "the id of an image")
        category = value_of(item, "category_id", int, "the id of a category")
        if image not in self.listed:
            raise ValueError(f"image_id {image} is not the id of an image")
        if category not in self.categories:
            raise ValueError(f"category_id {category} is not the id of a category")

        segmentation = item.get("segmentation")
        if isinstance(segmentation, dict):
            draw = self.run_lengths(segmentation)
        elif isinstance(segmentation, list) and segmentation:
            draw = self.outlines(segmentation)
        else:
            raise ValueError("has no segmentation, only a box; export polygons or masks, not boxes")

        self.used.add(category)
        self.crowds += item.get("iscrowd") == 1
        if draw:
            shape = Shape(self.categories[category], draw, location)
            self.shapes.setdefault(image, []).append(shape)

    def outlines(self, segmentation: list):
        """Return the function that draws polygons, None if none of them has three points."""
        outlines = []
        for values in segmentation:
            if not isinstance(values, list):
                raise ValueError("segmentation is not a list of lists of coordinates")
            outline = shapes.points(values)
            if len(outline) >= 3:
                outlines.append(outline)
            else:
                self.thin += 1
        return partial(shapes.polygons, outlines) if outlines else None

    def run_lengths(self, code: dict):
        """Return the function that draws a run-length code, plain or compressed."""
        sides = list_of(code, "size")
        counts = value_of(code, "counts", list | str, "a list or a text")
        if len(sides) != 2:
            raise ValueError("size is not height and width")
        size = (whole_number(sides[0]), whole_number(sides[1]))
        if isinstance(counts, str):
            counts = shapes.decompress_counts(counts)
        return partial(draw_counts, counts, size)

    def images(self) -> list[ListedImage]:
        """Return the images with their shapes."""
        images = []
        for number, (id, item) in enumerate(self.listed.items()):
            location = f"{self.path}, image {number}"
            size = None
            if item.get("width") is not None or item.get("height") is not None:
                with errors_at(location):
                    size = (whole_number(item.get("height")), whole_number(item.get("width")))
            name = item["file_name"].strip()
            drawn = self.shapes.get(id, [])
            images.append(
                ListedImage(name, self.path, location, size, drawn, subset=self.path.stem)
            )
        return images


def draw_counts(counts: list[int], stated: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of run lengths, column by column, for an image of its stated size only."""
    if stated != size:
        raise ValueError(
            f"the run-length code is for {stated[1]}x{stated[0]} pixels, but the image has "
            f"{size[1]}x{size[0]}"
        )
    return shapes.from_counts(counts, size, "F")


FORMAT = Format("coco", "COCO JSON with polygons or run-length codes", recognise)
