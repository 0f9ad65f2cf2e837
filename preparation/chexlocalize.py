"""CheXlocalize: findings outlined in chest X-rays, for the medvlsm study.

The download of Stanford AIMI holds images, `CheXpert/{val,test}/patient1/study1/view1_frontal.jpg`,
and outlines, `CheXlocalize/gt_annotations_{val,test}.json`:

    {"patient1_study1_view1_frontal": {"img_size": [h, w], "Cardiomegaly": [[[x, y], ...], ...]}}

Each finding of an image becomes one mask. Outlines are filled as the authors of CheXlocalize fill
them (annotation_to_segmentation.py of github.com/rajpurkarlab/cheXlocalize). Images keep their
size; the study made their shorter side 512 pixels long.

What was compared with real files: the two images that the authors' repository shows, with their
outlines; the masks are those of the authors' gt_segmentations, pixel by pixel, and fit the boxes of
the study. The whole download, by registration, was not available.
"""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

from imaging import image_files
from imaging.files import decode_text, parse_json
from preparation import medvlsm
from preparation.archives import Archive, contents
from preparation.check_findings import count_and_names, width_by_height
from preparation.medvlsm import Conversion, DataSet, File, Files, Splits, stem_of

CHEXLOCALIZE = DataSet(
    name="chexlocalize",
    title="CheXlocalize, ten findings in chest X-rays",
    archive="the folder chexlocalize with CheXpert/ and CheXlocalize/ in it",
    counts={"train": 1279, "val": 446, "test": 452},
    split_source="CheXpert's val and test patients in a random split by medvlsm's authors",
    older_name="chexlocalize",
)
OUTLINES = ("gt_annotations_val.json", "gt_annotations_test.json")
STUDY_SIDE = 512  # shorter side of the study's images, to which its boxes belong


def find_images(opened: list[Archive]) -> Files:
    """Return {name as in the outlines, such as patient1_study1_view1_frontal: File}.

    Raises ValueError, one line, for two images of the same name.
    """
    images = {}
    for archive in opened:
        for member in archive.names:
            path = PurePosixPath(member)
            if path.suffix.lower() != ".jpg":
                continue
            name = "_".join([*path.parts[-3:-1], path.stem])
            if name in images:
                other = images[name]
                raise ValueError(f"{archive.path}: {member} and {other.member} are both {name}")
            images[name] = File(archive, member)
    return images


def read_outlines(opened: list[Archive]) -> dict[str, tuple[tuple[int, int], list]]:
    """Return {name of a mask without ending: ((H, W), polygons)} of all outlines.

    Raises FileNotFoundError without a file of outlines, ValueError for one of another form.
    """
    outlines = {}
    for archive in opened:
        for member in archive.names:
            if PurePosixPath(member).name in OUTLINES:
                place = f"{archive.path}: {member}"
                content = parse_json(decode_text(archive.read(member), place), place)
                outlines |= parse_outlines(content, place)
    if not outlines:
        raise FileNotFoundError(f"no {' or '.join(OUTLINES)}: {contents(opened)}")
    return outlines


def parse_outlines(content: dict, place: str) -> dict[str, tuple[tuple[int, int], list]]:
    """Return the outlines of one file, see `read_outlines`. Raises ValueError, one line."""
    outlines = {}
    try:
        for image, findings in content.items():
            height, width = findings["img_size"]
            for finding, polygons in findings.items():
                if finding == "img_size":
                    continue
                points = [[(float(x), float(y)) for x, y in polygon] for polygon in polygons]
                name = f"{image}_{finding.lower().replace(' ', '_')}"
                outlines[name] = ((int(height), int(width)), points)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f'{place}: expected {{"patient1_study1_view1_frontal": {{"img_size": [h, w], '
            '"Cardiomegaly": [[[x, y], ...]]}}'
        ) from None
    return outlines


def fill(polygons: list, size: tuple[int, int]) -> np.ndarray:
    """Return the inside of polygons with their outlines, bool (H,W)."""
    canvas = Image.new("1", size[::-1])
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon(polygon, outline=1, fill=1)
    return np.asarray(canvas)


def draw_mask(
    polygons: list, size: tuple[int, int], sources: list[Path], target: Path
) -> tuple[int, int]:
    """Write the mask of polygons on an image of size (H,W); see medvlsm.Convert.

    sources: the image, to compare its size. Raises ValueError, one line, if it is another one.
    """
    width, height = image_files.open_image(sources[0], decode=False).size
    if (height, width) != size:
        raise ValueError(
            f"{sources[0]}: {width}x{height}, but its outlines are drawn on "
            f"{width_by_height(size)}; CheXpert-small has other sizes, take CheXlocalize's images"
        )
    mask = fill(polygons, size)
    medvlsm.save_mask(mask, target)
    x, y = medvlsm.corner_of(mask)
    scale = STUDY_SIDE / min(size)
    return round(scale * x), round(scale * y)


def plan(opened: list[Archive], splits: Splits, is_older: bool, args: Namespace) -> Conversion:
    """Return the conversion of CheXlocalize; see medvlsm.Plan."""
    images = find_images(opened)
    outlines = read_outlines(opened)
    annotations = medvlsm.all_annotations(splits)
    place = ", ".join(str(archive.path) for archive in opened)
    medvlsm.refuse_missing([stem_of(a.image) for a in annotations], images, f"{place}, images")
    named = [stem_of(annotation.mask) for annotation in annotations]
    medvlsm.refuse_missing(named, outlines, f"{place}, outlines")

    notes = medvlsm.unused_note(outlines, named, "outlines")
    empty = sorted(name for name in {*named} if not any(outlines[name][1]))
    if empty:
        notes.append(f"findings without an outline, with an empty mask: {count_and_names(empty)}")
    grouped = {}
    for split, items in splits.items():
        grouped[split] = [replace(item, group=item.image.split("_")[0]) for item in items]

    rule = "the inside of the outlines, one mask for each finding of an image"
    conversion = Conversion(grouped, notes, rule, CHEXLOCALIZE.split_source)
    for annotation in medvlsm.all_annotations(grouped):
        image = images[stem_of(annotation.image)]
        conversion.add_image(annotation, image)
        size, polygons = outlines[stem_of(annotation.mask)]
        convert = partial(draw_mask, polygons, size)
        conversion.add(f"masks/{annotation.mask}", [image], convert)
    return conversion


def options(command) -> None:
    """Add the command `prepare.py chexlocalize`."""
    details = "Each finding of an image becomes one mask: its outlines, filled."
    medvlsm.add_command(command, CHEXLOCALIZE, plan, details)
