"""Boxes for SAM from masks: `prepare.py boxes`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

import data
from engine import tables
from engine.ranges import GREY_LEVEL, POSITIVE
from imaging import atomic_files, boxes_and_points, image_files, layouts
from preparation.check_findings import width_by_height
from preparation.check_images import MASK_THRESHOLD


@dataclass(frozen=True)
class Images:
    """The images of --like, which masks and boxes belong to."""

    by_mask_name: dict[str, Path]  # name of a mask, without extension: image file
    paths: dict[Path, str]  # image file: its path within the folder of images
    entries: list[layouts.Entry]  # of a data set; [] for a folder


def list_images(like: str) -> Images:
    """Return the images of --like: a data set, PATH[:split], or a folder of images.

    Raises FileNotFoundError, or ValueError for two images that differ only in the extension.
    """
    path, split = layouts.path_and_split(like)
    if layouts.find_splits(path):
        entries = layouts.read_entries(path, split)
        by_mask_name = {entry.name: entry.image for entry in entries}
        paths = {e.image: layouts.name_in_images(e.image, e.root) for e in entries}
        return Images(by_mask_name, paths, entries)

    folder = Path(like)
    if not folder.is_dir():
        raise FileNotFoundError(f"--like {like}: no such folder of images or data set")
    by_mask_name = {}
    paths = {}
    for file in filter(layouts.is_image, layouts.files_below(folder)):
        relative = file.relative_to(folder)
        name = relative.with_suffix("").as_posix()
        if name in by_mask_name:
            raise ValueError(f"{file}: a second image of this name, with another ending")
        by_mask_name[name] = file
        paths[file] = relative.as_posix()
    return Images(by_mask_name, paths, [])


def find_masks(folder: Path, images: Images, like: str) -> dict[Path, Path]:
    """Return {mask file: image file} of a folder, without predict.py's legend and overlays.

    Raises FileNotFoundError or ValueError.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of masks")

    masks = {}
    for path in filter(layouts.is_image, layouts.files_below(folder)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        is_extra = name == "legend" or name.endswith(("_overlay", "_probability"))
        if name in images.by_mask_name:  # even one called x_overlay
            masks[path] = images.by_mask_name[name]
        elif not is_extra:
            raise ValueError(f"{path}: no image of this name in {like}; choose another --like")
    if not masks:
        raise ValueError(f"{folder}: no masks in this folder; they are images such as .png")

    counts = Counter(path.with_suffix("") for path in masks)
    repeated = [path for path in masks if counts[path.with_suffix("")] > 1]
    if repeated:
        raise ValueError(f"{repeated[1]}: a second mask of this name, with another ending")
    return masks


def mask_entries(folder: Path, images: Images, args) -> list[layouts.Entry]:
    """Return the entries of the masks in a folder: the data set's own, or predicted ones.

    Predicted masks are upright, as predict.py writes them, and a classes.json in their folder names
    the class indices. Raises FileNotFoundError or ValueError.
    """
    own = []
    for entry in images.entries:
        if entry.mask.resolve().is_relative_to(folder.resolve()):
            own.append(entry)
    if own:
        return own

    masks = find_masks(folder, images, args.like)
    fields = {"mask_orientation": "upright"}
    class_file = folder / "classes.json"
    if class_file.is_file():
        if args.instances:
            raise ValueError(
                f"--instances: {class_file} names class numbers; remove one of the two"
            )
        fields |= {"classes": layouts.read_classes(class_file), "has_class_indices": True}
    elif not args.instances:
        refuse_palettes(masks)

    root = folder.resolve()
    entries = []
    for path, image in masks.items():
        entries.append(layouts.Entry(path.stem, image, path, {}, root, **fields))
    return entries


def refuse_palettes(paths) -> None:
    """Raise ValueError, one line, for a palette of more than two colours, as class maps have."""
    for path in paths:
        image = image_files.open_image(path, decode=False)
        if image.mode != "P":
            continue
        colours = np.unique(np.reshape(image.getpalette(), (-1, 3)), axis=0)  # (n,3)
        if len(colours) > 2:
            raise ValueError(
                f"{path}: a palette of classes without names; put the classes.json that predict.py "
                "wrote into its folder"
            )


def progress(entries: list):
    """Return an iterator over entries that shows a progress bar."""
    return tqdm(entries, desc="boxes", unit="mask", disable=None, leave=False)


def component_boxes(entries, args) -> Iterator[tuple]:
    """Yield (image, class, box float32 (4,)) of each component in masks. Raises ValueError."""
    counts = data.count_masks(entries)
    reading = data.MaskReading(args.mask_threshold)
    _, thresholds = data.decide_thresholds(entries, counts, reading)

    for entry, threshold in progress(list(zip(entries, thresholds, strict=True))):
        names = layouts.foreground(entry.classes)
        mask = data.read_truth(entry, threshold)
        classes = range(1, len(names) + 1)
        for component in boxes_and_points.components(mask, classes, args.min_area):
            name = names[component.label - 1] if entry.has_class_indices else ""
            yield entry.image, name, component.box


def instance_boxes(entries, args) -> Iterator[tuple]:
    """Yield (image, "", box float32 (4,)) of each object; each value of a mask is one object.

    0 is the background. Raises ValueError, one line, for values that are negative or not whole, and
    for masks of another size than their image.
    """
    for entry in progress(entries):
        turn, _ = image_files.mask_turn(entry.mask, entry.image, entry.mask_orientation)
        mask = image_files.turn_upright(image_files.open_image(entry.mask), turn)
        values = image_files.mask_values(mask, entry.mask, numbers=True)  # (H,W)
        size = image_files.read_image(entry.image).shape[:2]
        if values.shape != size:
            raise ValueError(
                f"{entry.mask}: {width_by_height(values.shape)}, but its image {entry.image} is "
                f"{width_by_height(size)}"
            )
        if values.min() < 0 or (values != values.round()).any():
            raise ValueError(f"{entry.mask}: numbers of objects are whole and 0 or more")

        for box in boxes_of_values(values, args.min_area):
            yield entry.image, "", box


def boxes_of_values(values: np.ndarray, min_area: int) -> list[np.ndarray]:
    """Return a box, float32 (4,), for each value above 0 in (H,W) that fills `min_area` pixels."""
    is_object = values > 0
    numbers, order = np.unique(values[is_object], return_inverse=True)
    objects = np.zeros(values.shape, np.int32)  # 1, 2, … without gaps
    objects[is_object] = order + 1
    areas = np.bincount(objects.ravel(), minlength=len(numbers) + 1)

    boxes = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(objects), 1):
        if areas[k] >= min_area:
            corners = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            boxes.append(np.float32(corners))
    return boxes


def listed_boxes(path: Path, images: Images) -> Iterator[tuple]:
    """Yield (image, class, box) of a JSON file that lists boxes, such as an annotation file."""
    sizes = {image: image_files.read_image(image).shape[:2] for image in images.paths}
    boxes = boxes_and_points.read_boxes(path, sizes, names=images.paths)
    for image, rows in boxes.items():
        for row in rows:
            yield image, row.name or "", row.xy


def box_row(image: str, class_name: str, box: np.ndarray) -> dict:
    """Return a row of boxes.csv; whole numbers have no decimals."""
    row = {"image": image, "class": class_name}
    for field, value in zip(("x0", "y0", "x1", "y1"), box, strict=True):
        number = round(float(value), 3)
        row[field] = int(number) if number.is_integer() else number
    return row


def boxes(args):
    """Make box prompts for SAM: one box around each connected component of masks.

    MASKS are folders: predictions of predict.py (binary masks, or class maps with classes.json),
    masks of other programs named like their images, or the masks of the data set itself. MASKS may
    also be JSON files that list boxes: annotation files with bbox, or COCO files.

    The output has the columns image, class (empty for binary masks), x0, y0, x1, y1. Coordinates
    are in pixels and start at 0; both corners are inside the box. Images without components have no
    row.
    """
    atomic_files.refuse_existing(args.out)
    if args.instances and args.mask_threshold is not None:
        raise ValueError("--mask-threshold: --instances takes numbers; remove one of the two")

    images = list_images(args.like)
    boxes_of_masks = instance_boxes if args.instances else component_boxes
    image_boxes = []
    mask_count = 0
    for source in args.masks:
        if source.suffix.lower() == ".json" and not source.is_dir():
            image_boxes += listed_boxes(source, images)
            continue
        entries = mask_entries(source, images, args)
        mask_count += len(entries)
        image_boxes += boxes_of_masks(entries, args)
    if not image_boxes:
        raise ValueError(
            f"{mask_count} masks have no component of {args.min_area} pixels: no boxes"
        )

    names = boxes_and_points.ImageNames(images.paths)
    rows = [box_row(names.shortest(image), name, box) for image, name, box in image_boxes]
    tables.write_csv(args.out, rows)

    image_count = len({image for image, _, _ in image_boxes})
    summary = f"{args.out}: {len(rows)} boxes in {image_count} images"
    print(f"{summary}, of {mask_count} masks" if mask_count else summary)
    return 0


def options(command):
    """Describe `prepare.py boxes`."""
    add = command(boxes, "make a file of box prompts for SAM from masks")
    add(
        "masks",
        type=Path,
        nargs="+",
        metavar="MASKS",
        help="folder of masks, such as predict.py writes, or a JSON file that lists boxes",
    )
    help = "CSV file to write (default: %(default)s)"
    add("--out", type=Path, default="boxes.csv", metavar="FILE", help=help)
    add(
        "--like",
        required=True,
        metavar="DATA",
        help="images of the masks: a data set (its test split), DATA:SPLIT, or a folder of images",
    )
    add(
        "--instances",
        action="store_true",
        help="make one box for each value in a mask instead of each component",
    )
    add(
        "--min-area",
        type=POSITIVE,
        default=20,
        metavar="N",
        help="smallest object that gets a box, in pixels (default: %(default)s)",
    )
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
