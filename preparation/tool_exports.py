"""What the formats of annotation tools share, for `prepare.py import`.

coco.py, labelme.py, cvat.py, label_studio.py and kaggle_rle.py each read the files of one tool into
an `Export`. This module finds its images in the folder and turns its shapes into objects.

- An image is named by its path. If FOLDER has no such path, the file name alone decides, as
  annotators' machines have other folders; the summary counts such images. If the folders of some
  images fit, those of all must, except for absolute paths. Only files below FOLDER are ever opened.
- An image that the export lists but FOLDER lacks is an error. An image of FOLDER that the export
  does not list is one, too, unless --skip-unpaired leaves it out.
- A photo may be stored turned (EXIF). The size in the export says whether its coordinates are those
  of the stored or of the upright image. Where both have this size (a square, a half turn), each
  tool has its rule: COCO means the stored image, all others the upright one.
- The split is that of the tool (CVAT's subsets) or of the export's name (instances_val2017.json),
  else that of a folder around the export (train/_annotations.coco.json) or around the image.
"""

import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from engine.command_line import flag
from imaging import image_files, layouts
from imaging.files import UTF16_MARKS, read_json
from preparation.readings import SPLIT_NAMES, Case, ImageReading, Object
from preparation.shapes import errors_at

BEGINNING = 4096  # bytes of a file by which its format is recognised
BACKGROUND = "background"


@dataclass(frozen=True)
class Shape:
    """An outline, a box or a run-length code: the pixels of one object."""

    class_name: str
    draw: Callable[[tuple[int, int]], np.ndarray]  # size (H, W) -> bool (H,W)
    location: str  # for messages: "a.json, annotation 3"


@dataclass(frozen=True)
class ListedImage:
    """An image as an export lists it."""

    name: str  # its path or file name, of the annotator's machine
    file: Path  # the file of the export
    location: str  # for messages: "a.json, image 3"
    size: tuple[int, int] | None  # (H, W) that the coordinates are for; None: not stated
    shapes: list[Shape]  # in the order in which they are drawn
    subset: str = ""  # the tool's split, or a name that may contain one
    read_pixels: Callable[[], np.ndarray] | None = None  # of an image that the export contains


@dataclass(frozen=True)
class Export:
    """The files of an annotation tool."""

    format: str  # "coco"
    title: str  # "COCO JSON"
    file: Path  # the first one
    images: list[ListedImage]
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)  # lines of the summary
    has_splits: bool = True  # names of files and folders say which split an image is for
    means_stored: bool = False  # coordinates of turned photos are those of the stored image


# --- files ----------------------------------------------------------------------------------------


def files_ending(folder: Path, ending: str, args: Namespace) -> list[Path]:
    """Return the files below a folder with an ending; [] if --images names the files."""
    if args.images:
        return []
    paths = layouts.files_below(folder, with_masks=True)
    return [path for path in paths if path.suffix.lower() == ending and path.is_file()]


def text_around(path: Path) -> str:
    """Return the first and the last characters of a file: enough to recognise its format."""
    with open(path, "rb") as file:
        start = file.read(BEGINNING)
        file.seek(max(path.stat().st_size - BEGINNING, 0))
        end = file.read()
    encoding = "utf-16" if start.startswith(UTF16_MARKS) else "utf-8-sig"
    end_encoding = "utf-16-le" if start.startswith(UTF16_MARKS) else "utf-8"
    return start.decode(encoding, "ignore") + "\n" + end.decode(end_encoding, "ignore")


def json_files(
    folder: Path, args: Namespace, opening: str, keys: tuple[str, ...]
) -> Iterator[tuple[Path, object]]:
    """Yield the JSON files below a folder that begin with a bracket and hold one of the keys.

    opening: the bracket, "{" or "[". Yields paths and contents, of objects or lists.
    """
    for path in files_ending(folder, ".json", args):
        text = text_around(path)
        if text.lstrip().startswith(opening) and any(key in text for key in keys):
            yield path, read_json(path)


def split_of_words(text: str) -> str:
    """Return the split that a name has as a word, "instances_train2017" -> "train", else ""."""
    words = re.findall("[a-z]+", text.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else ""


def split_of_folders(path: Path) -> str:
    """Return the split that the innermost of the folders on a relative path names, else ""."""
    for name in reversed(path.parts[:-1]):
        split = split_of_words(name)
        if split:
            return split
    return ""


def split_of_export(listed: ListedImage, folder: Path) -> str:
    """Return the split that the tool, its file or a folder around the file names, else ""."""
    split = split_of_words(listed.subset)
    return split or split_of_folders(listed.file.relative_to(folder))


# --- images ---------------------------------------------------------------------------------------


class ImageIndex:
    """Finds the image that an export names among the image files of a folder.

    key: turns file names into those of the tool, which may replace blanks, for example.
    """

    def __init__(self, folder: Path, key: Callable[[str], str] = layouts.composed):
        self.folder = folder
        self.key = key
        self.files = []
        self.by_name = {}  # file name -> files
        self.by_stem = {}  # file name without its ending -> files
        for path in layouts.files_below(folder, with_masks=True):
            if layouts.is_image(path) and path.is_file():
                self.files.append(path)
                self.by_name.setdefault(key(path.name), []).append(path)
                self.by_stem.setdefault(key(path.stem), []).append(path)

    def has(self, name: str) -> bool:
        """Return True if a file has this name."""
        return self.key(name) in self.by_name

    def find(self, listed: ListedImage) -> tuple[Path | None, bool]:
        """Return the file of an image, None if it is missing, and True if its path fits as well.

        Of several files of the same name, that with the longest path in common is taken, then that
        in a folder named like the subset or split. Raises ValueError if several remain.
        """
        name = posix_path(listed.name)
        key = self.key(name.name)
        candidates = self.by_name.get(key) or self.by_stem.get(key, [])
        beside = Path(os.path.normpath(listed.file.parent / name))
        if beside in candidates:
            return beside, True

        longest = max([common_parts(path, name) for path in candidates], default=0)
        fitting = [path for path in candidates if common_parts(path, name) == longest]
        if len(fitting) > 1:
            fitting = [path for path in fitting if self.lies_in_subset(path, listed)] or fitting
        if len(fitting) > 1:
            names = " and ".join(str(path) for path in fitting[:2])
            raise ValueError(f"{listed.location}: {listed.name} may be {names}; keep one of them")
        if not fitting:
            return None, False
        return fitting[0], longest >= len(name.parts)

    def lies_in_subset(self, path: Path, listed: ListedImage) -> bool:
        """Return True if a folder on the path is named like the subset or the split of an image."""
        split = split_of_export(listed, self.folder)
        for name in path.relative_to(self.folder).parts[:-1]:
            if name.lower() == listed.subset.lower() or (split and split_of_words(name) == split):
                return True
        return False


def posix_path(name: str) -> PurePosixPath:
    """Return the path in an export, which may be in Windows' notation."""
    return PurePosixPath(name.replace("\\", "/"))


def is_of_another_machine(name: str) -> bool:
    """Return True for a path that is absolute or leaves its folder."""
    windows = PureWindowsPath(name)  # understands / and \
    return bool(windows.drive or windows.root) or ".." in windows.parts


def common_parts(path: Path, name: PurePosixPath) -> int:
    """Return how many parts at the end of a path are those of a name, at least 1."""
    count = 1
    for part, other in zip(path.parts[-2::-1], name.parts[-2::-1], strict=False):
        if layouts.composed(part) != layouts.composed(other):
            break
        count += 1
    return count


def find_images(export: Export, index: ImageIndex) -> tuple[dict[Path, ListedImage], list[str]]:
    """Return {file: image} of all images of an export, and the names that fit by file name alone.

    The file of an image without one, whose pixels the export contains, is the export's own file.
    Raises FileNotFoundError or ValueError, one line, for missing and ambiguous images.
    """
    images = {}
    loose = []  # images that fit by file name alone
    missing = []
    has_folders = False  # True if the folders of some image fit
    for listed in export.images:
        path, is_exact = index.find(listed)
        if path is None and listed.read_pixels:
            images[listed.file] = listed
            continue
        if path is None:
            missing.append(listed)
            continue

        if path in images:
            other = images[path].location
            raise ValueError(
                f"{path}: annotated twice, by {other} and by {listed.location}; keep one of them"
            )
        images[path] = replace(listed, read_pixels=None)
        has_folders |= is_exact and len(posix_path(listed.name).parts) > 1
        if not is_exact:
            loose.append(listed)

    if has_folders:
        missing += [listed for listed in loose if not is_of_another_machine(listed.name)]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(
            f"{missing[0].location}: no image {missing[0].name} below {index.folder}{more}; copy "
            "the annotated images into the folder"
        )
    return images, [listed.name for listed in loose]


def choose_frame(listed: ListedImage, image: Path, upright: tuple, means_stored: bool) -> tuple:
    """Return the size (H, W) that coordinates are for, and the EXIF orientation to turn masks by.

    upright: (H, W) of the image as it is seen. Raises ValueError if the export has another size.
    """
    orientation = 1
    if not listed.read_pixels:
        header = image_files.open_image(image, decode=False)
        orientation = image_files.exif_orientation(header)
    stored = upright[::-1] if orientation >= 5 else upright

    size = listed.size or (stored if means_stored else upright)
    if size not in (stored, upright):
        raise ValueError(
            f"{image}: has {upright[1]}x{upright[0]} pixels, but {listed.location} says "
            f"{size[1]}x{size[0]}; give the images that were annotated"
        )
    is_ambiguous = stored == upright and orientation != 1
    if is_ambiguous and means_stored:
        image_files.say_once(
            f"{image}: is stored turned (EXIF), and its size does not tell whether the shapes are "
            "turned as well; they are taken to be"
        )
    is_stored = means_stored if is_ambiguous else size == stored
    return size, orientation if is_stored else 1


def read_objects(
    listed: ListedImage, image: Path, means_stored: bool, upright: tuple[int, int]
) -> list[Object]:
    """Draw the shapes of an image of size (H, W); those without any pixel are left out."""
    size, orientation = choose_frame(listed, image, upright, means_stored)
    objects = []
    for shape in listed.shapes:
        with errors_at(shape.location):
            mask = shape.draw(size)
        if mask.any():
            mask = image_files.turn_pixels(mask[..., None], orientation)[..., 0]
            objects.append(Object(shape.class_name, mask))
    return objects


# --- readings -------------------------------------------------------------------------------------


def refuse_options(export: Export, args: Namespace) -> None:
    """Raise ValueError, one line, for options that have no effect on an export."""
    for name in ("classes", "mask_threshold"):
        if getattr(args, name) is not None:
            raise ValueError(f"{flag(name)}: has no effect on {export.title}; remove it")


def named_classes(export: Export, counts: Counter) -> tuple[str, ...]:
    """Return the classes of an export without an unused background.

    counts: objects of each class. Raises ValueError, one line, for a background with objects, no
    object at all, or too many classes.
    """
    classes = []
    for name in export.classes:
        if name.lower().strip("_ ") != BACKGROUND:
            classes.append(name)
        elif counts[name]:
            raise ValueError(
                f"{export.file}: has {counts[name]} objects of the class {name}; the "
                "background is where no object is: remove these, or rename the class"
            )

    if not export.images:
        raise ValueError(f"{export.file}: lists no images; {'; '.join(export.notes)}")
    if not counts:
        raise ValueError(
            f"{export.file}: lists {len(export.images)} images, but no areas; "
            + "; ".join(export.notes or ["export polygons or masks"])
        )
    if len(classes) > layouts.MOST_CLASSES:
        raise ValueError(
            f"{export.file}: has {len(classes)} classes; a mask holds {layouts.MOST_CLASSES}"
        )
    return tuple(classes)


def plain_names(paths: list[Path]) -> list[str]:
    """Return names for the files to be written: the paths without the folders that all share."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).with_suffix("").as_posix() for path in paths]


def reading(export: Export, index: ImageIndex, args: Namespace) -> ImageReading:
    """Return the images of an export in a folder, with their objects.

    Raises FileNotFoundError or ValueError, one line.
    """
    refuse_options(export, args)
    counts = Counter()
    for listed in export.images:
        counts.update(shape.class_name for shape in listed.shapes)
    classes = named_classes(export, counts)
    images, loose = find_images(export, index)
    unlisted = [path for path in index.files if path not in images]
    if unlisted and not args.skip_unpaired:
        more = f" and {len(unlisted) - 1} more images" if len(unlisted) > 1 else ""
        raise ValueError(
            f"{unlisted[0]}{more}: not annotated in the {export.title}; annotate or move such "
            "images, or add --skip-unpaired to leave them out"
        )

    paths = sorted(images)
    cases = []
    for name, path in zip(plain_names(paths), paths, strict=True):
        listed = images[path]
        split = ""
        if export.has_splits:
            split = split_of_export(listed, index.folder)
            split = split or split_of_folders(path.relative_to(index.folder))
        draw = partial(read_objects, listed, path, export.means_stored)
        cases.append(Case(name, path, draw, split, read_pixels=listed.read_pixels))

    summary = describe(export, counts, classes)
    if loose:
        summary.append(f"found by the file name alone: {len(loose)} images, such as {loose[0]}")
    if unlisted:
        summary.append(f"images that are not listed, left out: {len(unlisted)}")
    return ImageReading(export.format, summary, cases, classes)


def labels_of(images: list[ListedImage]) -> tuple[str, ...]:
    """Return the class names that the shapes of images have, sorted."""
    labels = set()
    for image in images:
        labels |= {shape.class_name for shape in image.shapes}
    return tuple(sorted(labels))


def describe(export: Export, counts: Counter, classes: tuple[str, ...]) -> list[str]:
    """Return the first lines of a summary: images, objects and what was left out."""
    kinds = f"{len(classes)} classes" if len(classes) > 1 else "one class"
    number = f"{len(export.images)} images, {counts.total()} objects"
    lines = [f"{export.title}: {number} of {kinds}"]
    if classes:
        lines.append("objects: " + ", ".join(f"{name} {counts[name]}" for name in classes))
    without = sum(not listed.shapes for listed in export.images)
    if without:
        lines.append(f"images without annotations: {without}")
    return lines + export.notes


def counted(about: str, kinds: Counter) -> list[str]:
    """Return the line about shapes that were skipped, such as "…: 3 point, 1 line", or none."""
    if not kinds:
        return []
    return [f"{about}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))]
