"""Draw thumbnails of all predicted cases on pages (--contact-sheet).

The pages are drawn at the end, from the inputs and the masks in --out. So they also show the cases
that --skip-existing skipped, and only one page is in memory at a time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.evaluate import each_is
from imaging import image_files, layouts, nifti, pictures, volumes
from prediction import dicom
from prediction.images import load_image
from prediction.outputs import Batch, one_line

ROWS = 10
COLUMNS = {"image": 6, "volume": 3}  # a page has 60 images or 30 volumes
CARD = {"image": 240, "volume": 480}  # pixels, width of a thumbnail


def page_paths(args, unit: str, count: int) -> list[Path]:
    """Return the files of the pages for a number of cases; [] without --contact-sheet.

    unit: "image" or "volume".
    """
    if not args.contact_sheet:
        return []
    pages = -(-count // (ROWS * COLUMNS[unit]))  # rounded up
    paths = []
    for number in range(1, pages + 1):
        ending = "" if number == 1 else f"_{number}"
        paths.append(Path(args.out) / f"contact_sheet{ending}.png")
    return paths


def write_pages(batch: Batch, paths: list[Path], predictor, draw: Callable) -> None:
    """Write the pages with all cases whose files exist, in the order of the cases.

    paths: from `page_paths`; [] writes nothing. draw: (name of a case, its files by kind) ->
    picture. A case that cannot be drawn, for example because its image was replaced, is left out
    with a message.
    """
    if not paths:
        return
    finished = []
    for name, files in batch.cases.items():
        if all(path.exists() for path in files.values()):
            finished.append(name)

    cards = []
    unwritten = [*paths]
    full = ROWS * COLUMNS[batch.unit]
    for name in tqdm(finished, desc="contact sheet", unit=batch.unit, disable=None):
        try:
            picture = draw(name, batch.cases[name])
        except (ValueError, OSError) as error:
            print(f"not on the contact sheet: {one_line(error, name)}")
            continue
        cards.append(pictures.captioned(picture, predictor.caption(name), CARD[batch.unit]))
        if len(cards) == full:
            write_page(batch, unwritten.pop(0), cards, predictor.classes)
            cards = []
    if cards:
        write_page(batch, unwritten.pop(0), cards, predictor.classes)


def write_page(batch: Batch, path: Path, cards: list[Image.Image], classes) -> None:
    """Write a page of thumbnails, with a legend if there are several classes."""
    names = layouts.foreground(tuple(classes))
    page = pictures.sheet_with_legend(cards, COLUMNS[batch.unit], names)
    batch.save(path, partial(pictures.save_picture, picture=page))


def draw_image(name: str, files: dict[str, Path], predictor) -> Image.Image:
    """Return the overlay of an image: that of --overlays, else one of the image and its mask."""
    if "overlay" in files:
        return Image.fromarray(image_files.read_image(files["overlay"]))

    file, _ = predictor.cases[name]
    image, _ = load_image(file)  # (H,W,3)
    with Image.open(files["mask"]) as mask:
        values = np.asarray(mask)  # (H,W), class indices, or 0 and 255
    K = len(predictor.classes)
    indices = range(1, K) if K > 1 else [255]
    return pictures.overlay(image, None, each_is(values, indices))


def draw_volume(name: str, files: dict[str, Path], predictor, cases: dict) -> Image.Image:
    """Return three planes of a volume with its masks. cases: of `list_volumes`."""
    with dicom.nifti_files(cases[name]) as paths:
        image, grid = nifti.read_volume(paths)  # (C,X,Y,Z)
    grey = volumes.grey(image, predictor.members[0].model.preprocess)  # (X,Y,Z)
    del image

    if predictor.config.overlapping:
        masks = []
        for k in range(len(predictor.classes) - 1):
            masks.append(nifti.read_labels(files[f"mask{k}"], grid, 2) > 0)
        masks = np.stack(masks)  # (K,X,Y,Z)
    else:
        numbers = predictor.labels
        indices = nifti.read_labels(files["mask0"], grid, numbers)  # (X,Y,Z)
        masks = each_is(indices, range(1, len(numbers)))
    return pictures.volume_thumbnail(grey, None, masks, grid.spacing)
