"""Read single DICOM images (X-ray, mammography, ultrasound) with masks as image files.

Grey levels are those that a viewer shows: the rescaling and the first window of the header, else
the smallest to the largest value. MONOCHROME1 is inverted. Slices of CT and MR are images as well
if there are masks of the same name.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

from imaging import image_files, layouts
from preparation import dicom_files, import_volumes, volume_pairs
from preparation.dicom_files import Header
from preparation.readings import Case, Format, ImageReading, Object, split_of_folder

CENTIMETRES = 3  # PhysicalUnitsXDirection of ultrasound

# --- grey levels and colours ----------------------------------------------------------------------


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels of a single image as a viewer shows them: uint8 (H,W) or (H,W,3)."""
    pixels, data = dicom_files.read_pixels(path, raw=False)
    with dicom_files.complete_header(path):
        return displayed(pixels, data)


def displayed(pixels: np.ndarray, data) -> np.ndarray:
    """Return decoded pixels as a viewer shows them: uint8 (H,W) or (H,W,3)."""
    if data.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, data)[..., :3]
    if pixels.ndim == 2:
        return grey_levels(pixels, data)
    if pixels.dtype.itemsize == 2:
        bits = 16 if pixels.max() > 2 ** int(data.BitsStored) else int(data.BitsStored)
        pixels = pixels >> max(0, bits - 8)
    return pixels.astype(np.uint8)


def grey_levels(pixels: np.ndarray, data) -> np.ndarray:
    """Return stored values (H,W) as uint8, in the first window of a header (PS3.3, C.11.2)."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(pixels, data)
    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        shown = apply_voi(values.astype(np.int64), data) / (2.0**bits - 1)
    elif data.get("WindowCenter") not in (None, "") and data.get("WindowWidth"):
        shown = windowed(values.astype(np.float64), data)
    else:
        low = float(values.min())
        shown = (values - low) / max(float(values.max()) - low, 1e-12)

    shown = np.clip(shown, 0, 1)
    if data.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return np.rint(255 * shown).astype(np.uint8)


def windowed(values: np.ndarray, data) -> np.ndarray:
    """Return values (H,W) as 0 to 1 in the first window of a header, not yet clipped."""
    center = first_of(data.WindowCenter)
    width = max(first_of(data.WindowWidth), 1e-6)
    function = str(data.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    return (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5


def first_of(value) -> float:
    """Return the first number of an attribute that holds one or several."""
    return float(np.atleast_1d(value)[0])


def spacing_of(header: Header) -> tuple[float, float] | None:
    """Return the size of a pixel in mm, along a row and along a column, None if it is not stated.

    PixelSpacing comes before ImagerPixelSpacing, which is that of the detector. In ultrasound it is
    that of the regions, if all have the same.
    """
    data = header.data
    spacing = data.get("PixelSpacing") or data.get("ImagerPixelSpacing")
    if spacing:
        return float(spacing[1]), float(spacing[0])

    sizes = set()
    for region in data.get("SequenceOfUltrasoundRegions") or ():
        is_length = region.get("PhysicalUnitsXDirection") == CENTIMETRES
        if is_length and region.get("PhysicalUnitsYDirection") == CENTIMETRES:
            x = abs(float(region.PhysicalDeltaX))
            y = abs(float(region.PhysicalDeltaY))
            sizes.add((10 * x, 10 * y))
    return sizes.pop() if len(sizes) == 1 else None


# --- masks ----------------------------------------------------------------------------------------


def read_objects(
    path: Path, names: tuple[str, ...], threshold: int | None, size: tuple[int, int]
) -> list[Object]:
    """Return the objects of a mask file: one, or one for each class number.

    names: of the numbers 1, 2, …; () for a binary mask, whose foreground is above `threshold`.
    Raises ValueError, one line, for other values.
    """
    mask = image_files.read_mask(path, numbers=bool(names))
    if names:
        numbers = [int(number) for number in np.unique(mask) if number]
        unnamed = [number for number in numbers if number > len(names)]
        if unnamed:
            raise ValueError(f"{path}: holds {unnamed[0]}, --classes names 1 to {len(names)}")
        return [Object(names[number - 1], mask == number) for number in numbers]

    if threshold is None:
        threshold = 127 if mask.max() > 1 else 0
        if mask.max() > 1 and image_files.has_levels(mask.astype(np.int32)):
            values = ", ".join(map(str, np.unique(mask)[:6]))
            raise ValueError(
                f"{path}: holds the values {values}; name class numbers with --classes, or cut "
                "with --mask-threshold"
            )
    return [Object("", mask > threshold)]


# --- the format -----------------------------------------------------------------------------------


def mask_files(folder: Path, keys: set[str]) -> dict[str, Path]:
    """Return {key: mask} of the image files that are masks by their name, or have one of the keys.

    Raises ValueError, one line, if two masks have one key.
    """
    masks = {}
    for path in layouts.files_below(folder, with_masks=True):
        if not layouts.is_image(path):
            continue
        file = volume_pairs.named(path, folder)
        if not file.is_label and file.key not in keys:
            continue
        first = masks.setdefault(file.key, path)
        if first != path:
            raise ValueError(f"{path}: a second mask for {file.key}, besides {first}; keep one")
    return masks


def recognise(folder: Path, args: Namespace) -> list[ImageReading]:
    """Return the reading of a folder of DICOM images, [] without such images."""
    paths = [] if args.images else dicom_files.dicom_paths(folder)
    headers = dicom_files.read_headers(paths)
    by_key = {}
    for header in headers:
        if "Rows" in header.data and header.modality not in dicom_files.NO_IMAGES:
            by_key.setdefault(volume_pairs.named(header.path, folder).key, []).append(header)

    masks = mask_files(folder, set(by_key)) if by_key else {}
    images = {}
    for key, files in by_key.items():
        if key in masks or not files[0].is_slice:
            images[key] = files
    labels = [header for header in headers if header.is_label]
    if labels and not by_key:
        raise ValueError(
            f"{labels[0].path}: is a {labels[0].modality} file, but the images that it was drawn "
            "on are missing; put their series into the folder"
        )
    has_slices = any(header.is_slice for header in headers)
    is_chosen = masks or args.format == "dicom-images"
    if not images or (has_slices and not is_chosen):  # such as a dose report among slices
        return []
    refuse_several(images)
    refuse_unpaired(images, masks, args)
    if masks:
        images = {key: files for key, files in images.items() if key in masks}

    cases = make_cases([files[0] for files in images.values()], masks, args, folder)
    names = class_names(args)
    count = dicom_files.count_modalities([files[0] for files in images.values()])
    masks_text = f"{len(masks)} masks" if masks else "no masks"
    summary = [f"{len(cases)} DICOM images, {masks_text} ({count})"]
    return [ImageReading("dicom-images", summary, cases, names, has_masks=bool(masks))]


def class_names(args: Namespace) -> tuple[str, ...]:
    """Return the names of the numbers 1, 2, … of --classes, () without it."""
    if not args.classes:
        return ()
    labels = import_volumes.parse_classes(args.classes)
    if list(labels) != [str(k) for k in range(len(labels))]:
        raise ValueError(f"--classes {args.classes!r}: masks of images need numbers without a gap")
    return tuple(labels.values())[1:]


def refuse_several(images: dict[str, list[Header]]) -> None:
    """Raise ValueError, one line, for two images of one key, and for films."""
    for key, files in images.items():
        if len(files) > 1:
            raise ValueError(f"{files[1].path}: a second image for {key}, besides {files[0].path}")
        frames = int(files[0].data.get("NumberOfFrames") or 1)
        if frames > 1:
            raise ValueError(
                f"{files[0].path}: is a film of {frames} frames; save the frames that have masks "
                "as single images, or move it away"
            )


def refuse_unpaired(images: dict, masks: dict, args: Namespace) -> None:
    """Raise ValueError, one line, for images without a mask and the reverse, if there are masks."""
    unpaired = sorted(images.keys() ^ masks.keys())
    if masks and unpaired and not args.skip_unpaired:
        key = unpaired[0]
        path = images[key][0].path if key in images else masks[key]
        kind = "mask" if key in images else "DICOM image"
        raise ValueError(
            f"{path}: has no {kind}, and {len(unpaired) - 1} more files lack theirs; add it, or "
            "leave such files out with --skip-unpaired"
        )


def make_cases(
    headers: list[Header], masks: dict[str, Path], args: Namespace, folder: Path
) -> list[Case]:
    """Return the cases of images, in the order of their path."""
    names = class_names(args)
    patients = dicom_files.number_patients(headers)
    cases = []
    for header in sorted(headers, key=lambda item: item.path):
        relative = header.path.relative_to(folder)
        key = volume_pairs.named(header.path, folder).key
        objects = no_objects
        if masks:
            objects = partial(read_objects, masks[key], names, args.mask_threshold)
        with dicom_files.complete_header(header.path):
            spacing = spacing_of(header)
        case = Case(
            import_volumes.path_name(header.path, folder),
            header.path,
            objects,
            split_of_folder(relative),
            patients[header.patient],
            partial(read_pixels, header.path),
            spacing,
        )
        cases.append(case)
    return cases


def no_objects(size: tuple[int, int]) -> list[Object]:
    """Return the objects of an image without a mask."""
    return []


FORMATS = (
    Format(
        "dicom-images",
        "single DICOM images (X-ray, mammography, ultrasound), masks as PNG files of the same name",
        recognise,
    ),
)
