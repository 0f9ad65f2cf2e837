"""Boxes for SAM out of masks."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

import data
from engine import tables
from engine.ranges import GREY_LEVEL, POSITIVE
from imaging import atomic_files, boxes_and_points, image_files, layouts
from preparation.check import MASK_THRESHOLD, wide


def images_of(place):
    """Return what --like holds: {name of a mask: image file}, {image file: path}, entries.

    place: a data set, PATH[:split], or a folder of images, which has no entries. The paths are
    those within the folder of images.
    """
    path, split = layouts.path_and_split(place)
    if layouts.splits(path):
        entries = layouts.annotations(path, split)
        paths = {e.image: layouts.name_in_images(e.image, e.root) for e in entries}
        return {entry.name: entry.image for entry in entries}, paths, entries

    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"--like {place}: no such folder of images or data set")
    images = {}
    paths = {}
    for file in filter(layouts.is_image, layouts.files_below(folder)):
        relative = file.relative_to(folder)
        if images.setdefault(relative.with_suffix("").as_posix(), file) != file:
            raise ValueError(f"{file}: a second image of this name, with another ending")
        paths[file] = relative.as_posix()
    return images, paths, []


def find_masks(folder, images, place):
    """Return {mask file: image file} of a folder, without the other pictures of predict.py."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of masks")
    found = {}
    for path in filter(layouts.is_image, layouts.files_below(folder)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in images:  # asked first: an image may be called x_overlay
            found[path] = images[name]
        elif name != "legend" and not name.endswith(("_overlay", "_probability")):
            raise ValueError(f"{path}: no image of this name in {place}; choose another --like")
    if not found:
        raise ValueError(f"{folder}: no masks in this folder; they are images such as .png")

    names = Counter(path.with_suffix("") for path in found)
    repeated = [path for path in found if names[path.with_suffix("")] > 1]
    if repeated:
        raise ValueError(f"{repeated[1]}: a second mask of this name, with another ending")
    return found


def mask_entries(folder, images, entries, args):
    """Return the entries of the masks in a folder: the data set's own ones, or predicted ones.

    Predicted masks are upright, as predict.py writes them, and a classes.json beside them names
    their numbers. Raises FileNotFoundError or ValueError.
    """
    own = [entry for entry in entries if entry.mask.resolve().is_relative_to(folder.resolve())]
    if own:
        return own
    found = find_masks(folder, images, args.like)
    path = folder / "classes.json"
    how = {"mask_orientation": "upright"}
    if args.instances:
        if path.is_file():
            raise ValueError(f"--instances: {path} names class numbers; remove one of the two")
    elif path.is_file():
        how |= {"classes": layouts.read_classes(path), "numbers": True}
    else:
        refuse_palettes(found)
    root = folder.resolve()
    return [layouts.Entry(p.stem, image, p, {}, root, **how) for p, image in found.items()]


def refuse_palettes(paths):
    """Raise ValueError, one line, for a palette of more than two colours, as class maps have."""
    for path in paths:
        image = image_files.open_image(path, decode=False)
        if image.mode != "P":
            continue
        colours = np.unique(np.reshape(image.getpalette(), (-1, 3)), axis=0)  # (n,3)
        if len(colours) > 2:
            hint = "put the classes.json beside it that predict.py wrote"
            raise ValueError(f"{path}: a palette of classes that nothing names; {hint}")


def mask_boxes(entries, args):
    """Yield (entry, class, box float32 (4,)) of each object in masks. Raises ValueError."""
    bar = partial(tqdm, desc="boxes", unit="mask", disable=None, leave=False)
    if args.instances:
        for entry in bar(entries):
            for box in instance_boxes(entry, args.min_area):
                yield entry, "", box
        return

    counts = data.count_masks(entries)
    reading = data.MaskReading(args.mask_threshold, {})
    (rule,) = data.decide_rules(entries, counts, reading).values()
    thresholds = data.mask_thresholds(entries, counts[:, 0], rule).tolist()
    for entry, threshold in bar([*zip(entries, thresholds, strict=True)]):
        names = layouts.foreground(entry.classes)
        numbers = range(1, len(names) + 1)
        mask = data.read_truth(entry, threshold)
        for component in boxes_and_points.components(mask, numbers, args.min_area):
            name = names[component.label - 1] if entry.numbers else ""
            yield entry, name, component.box


def instance_boxes(entry, min_area):
    """Return the boxes, float32 (4,), of a mask whose numbers are one object each, 0 background.

    Raises ValueError, one line, for numbers below 0 or that are not whole, and for another size
    than the image's.
    """
    turn, _ = image_files.mask_turn(entry.mask, entry.image, entry.mask_orientation)
    mask = image_files.upright(image_files.open_image(entry.mask), turn)
    values = image_files.mask_values(mask, entry.mask, numbers=True)  # (H,W)
    size = image_files.read_image(entry.image).shape[:2]
    if values.shape != size:
        differ = f"{wide(values.shape)}, but its image {entry.image} is {wide(size)}"
        raise ValueError(f"{entry.mask}: {differ}")
    if values.min() < 0 or (values != values.round()).any():
        raise ValueError(f"{entry.mask}: numbers of objects are whole and 0 or more")

    objects = []
    inside = values > 0
    numbers, order = np.unique(values[inside], return_inverse=True)
    pieces = np.zeros(values.shape, np.int32)
    pieces[inside] = order + 1
    areas = np.bincount(pieces.ravel(), minlength=len(numbers) + 1)
    for k, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
        if areas[k] >= min_area:
            corners = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            objects.append(np.float32(corners))
    return objects


def listed_boxes(path, paths):
    """Return [(image, class, box)] of a JSON file that lists boxes, such as an annotation file."""
    sizes = {image: image_files.read_image(image).shape[:2] for image in paths}
    given = boxes_and_points.read_boxes(path, sizes, names=paths)
    return [(image, row.name or "", row.xy) for image, rows in given.items() for row in rows]


def box_row(name, class_name, box):
    """Return a row of boxes.csv; whole numbers have no decimals."""
    numbers = [round(float(x), 3) for x in box]
    numbers = [int(x) if x.is_integer() else x for x in numbers]
    return {"image": name, "class": class_name} | dict(
        zip(("x0", "y0", "x1", "y1"), numbers, strict=True)
    )


def boxes(args):
    """Makes a box for each component of masks: prompts for SAM that another model gives.

    MASKS are folders: those that predict.py wrote, of binary masks or of class maps with
    classes.json, masks of other programs with the names of their images, or the masks of the data
    set itself. With --instances each number in a mask is one object. Of a JSON file instead, an
    annotation file with bbox or one of COCO, the boxes are taken as they stand. The file written
    has the columns image, class (empty for binary masks), x0, y0, x1, y1, in pixels from 0 on, both
    corners inside the box. An image without components has no row.
    """
    atomic_files.refuse_existing(args.out)
    if args.instances and args.mask_threshold is not None:
        raise ValueError("--mask-threshold: --instances takes numbers; remove one of the two")
    images, paths, entries = images_of(args.like)
    names = boxes_and_points.ImageNames(paths)
    made = []
    count = 0
    for place in args.masks:
        if place.suffix.lower() == ".json" and not place.is_dir():
            made += listed_boxes(place, paths)
            continue
        masks = mask_entries(place, images, entries, args)
        count += len(masks)
        made += [(entry.image, name, box) for entry, name, box in mask_boxes(masks, args)]
    if not made:
        raise ValueError(f"{count} masks have no component of {args.min_area} pixels: no boxes")
    tables.write_csv(args.out, [box_row(names.shortest(i), name, box) for i, name, box in made])
    having = len({image for image, _, _ in made})
    origin = f", of {count} masks" if count else ""
    print(f"{args.out}: {len(made)} boxes in {having} images{origin}")
    return 0


def options(command):
    """Describe `prepare.py boxes`."""
    add = command(boxes, "make boxes for SAM out of masks")
    help = "folder that predict.py wrote, another folder of masks, or a JSON file that lists boxes"
    add("masks", type=Path, nargs="+", metavar="MASKS", help=help)
    add("--out", type=Path, default="boxes.csv", metavar="FILE", help="to write (%(default)s)")
    help = "whose images they are of: a data set (its test split), DATA:SPLIT, a folder of images"
    add("--like", required=True, metavar="DATA", help=help)
    add("--instances", action="store_true", help="each number in a mask is one object")
    help = "pixels below which a component gets no box (%(default)s)"
    add("--min-area", type=POSITIVE, default=20, metavar="N", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
