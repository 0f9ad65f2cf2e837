"""Read DICOM files as inputs of a prediction: series as volumes, single files as images.

Both are read as `prepare.py import` reads them (preparation/dicom_series.py, dicom_images.py).
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaging import layouts, nifti
from preparation import dicom_files, dicom_images, dicom_series
from preparation.dicom_files import Header, is_dicom
from preparation.dicom_series import Series


@dataclass(frozen=True)
class DamagedFile:
    """A DICOM file whose header cannot be read, with the line that says why."""

    path: Path
    error: str


def files_in(folder: Path, noun: str, out: Path) -> list[Path]:
    """Return the DICOM files below a folder, sorted; [] if it holds files of the usual kind.

    noun: "image" or "volume"; the usual kind is image files or NIfTI. The folder `out` is skipped.
    """
    files = layouts.files_below(folder, out, with_masks=True)
    if any(layouts.is_kind(file, noun) for file in files):
        return []
    return [file for file in files if is_dicom(file)]


def read_headers(files: list[Path]) -> tuple[list[Header], list[DamagedFile]]:
    """Return the headers of DICOM files, and the files that have none.

    Raises ValueError, one line, if pydicom is not installed.
    """
    headers = []
    damaged = []
    if files:
        dicom_files.import_pydicom(files[0])
    for file in files:
        try:
            headers += dicom_files.read_headers([file])
        except (ValueError, OSError) as error:
            damaged.append(DamagedFile(file, str(error)))
    return headers, damaged


# --- volumes --------------------------------------------------------------------------------------


def list_series(files: list[Path], root: Path) -> list[tuple[str, Series | DamagedFile]]:
    """Return (name, case) of the series in DICOM files below the folder `root`.

    Series are named like their folder, with their number if it holds several. A file that cannot be
    read is a case that fails, as nobody knows which series it belongs to. Localizers and files that
    are no slices are left out, and their number is printed. Raises ValueError, one line, if there
    is no series.
    """
    headers, damaged = read_headers(files)
    slices = [header for header in headers if header.is_slice]
    all_series = dicom_series.find_series(slices, root)
    series = [item for item in all_series if not item.is_localizer]
    if files and not series and not damaged:
        raise ValueError(
            f"{root}: its DICOM files ({dicom_files.count_modalities(headers)}) hold no series of "
            f"{dicom_series.FEWEST} or more slices of CT, MR or PET"
        )

    cases = [*zip(name_series(series, root), series, strict=True)]
    for file in damaged:
        cases.append((file.path.relative_to(root).as_posix(), file))

    other_series = len(all_series) - len(series)
    other_files = len(headers) - len(slices)
    if files:
        print(f"{root}: {len(series)} DICOM series")
    if other_series or other_files:
        print(
            f"{root}: left out {other_series} series that are localizers or have fewer than "
            f"{dicom_series.FEWEST} slices, {other_files} other DICOM files"
        )
    return cases


def name_series(series: list[Series], root: Path) -> list[str]:
    """Return unique names of series: the path of their folder below `root`, or the name of `root`.

    Series of one folder also get their number, and _2, _3, … where this is the same.
    """
    folders = Counter(item.folder for item in series)
    names = []
    for item in series:
        folder = item.folder.relative_to(root)
        name = folder.as_posix() if folder.parts else root.resolve().name
        if folders[item.folder] > 1:
            name += f"_{item.headers[0].data.get('SeriesNumber') or 0}"

        unique = name
        count = 1
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return names


@contextmanager
def nifti_files(case: list[Path] | Series | DamagedFile) -> Iterator[list[Path]]:
    """Yield the NIfTI files of a volume's channels.

    A DICOM series is written to a temporary NIfTI file, in Hounsfield units for CT, in a private
    folder that is removed at the end of the block. So everything else treats it like any volume,
    and its masks are written on the same grid. Raises ValueError, one line, for a series that is
    damaged or not a box of voxels.
    """
    if isinstance(case, DamagedFile):
        raise ValueError(case.error)
    if isinstance(case, list):
        yield case
        return

    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        file = Path(folder) / "series.nii"
        dicom_series.write_series(dicom_series.sorted_slices(case), file)
        try:
            with nifti.notices.grouped(file, case.folder):  # messages name the series
                yield [file]
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), str(case.folder))) from None


# --- images ---------------------------------------------------------------------------------------


def list_images(files: list[Path], folder: Path) -> list[Path]:
    """Return the DICOM files that hold an image or cannot be read; print how many do not.

    folder: where the files were listed, for messages. Raises ValueError, one line, if no file is
    left, or if pydicom is not installed.
    """
    headers, damaged = read_headers(files)
    images = [file.path for file in damaged]
    others = []
    for header in headers:
        is_image = "Rows" in header.data and header.modality not in dicom_files.NO_IMAGES
        if is_image:
            images.append(header.path)
        else:
            others.append(header)

    if others:
        kinds = dicom_files.count_modalities(others)
        if not images:
            raise ValueError(f"{folder}: holds DICOM files without an image ({kinds})")
        print(f"{folder}: skipped DICOM files without an image: {kinds}")
    return sorted(images)


def image_name(file: Path, root: Path) -> str:
    """Return the name of an image in a folder: its path without the ending.

    The last number of a UID, a frequent name of DICOM files, is no ending.
    """
    name = file.relative_to(root)
    has_no_ending = is_dicom(file) and file.suffix.lower() not in dicom_files.ENDINGS
    return name.as_posix() if has_no_ending else name.with_suffix("").as_posix()


def load_image(file: Path) -> tuple[np.ndarray, bool]:
    """Return a DICOM image as uint8 (H,W,3), as a viewer shows it, and False.

    The result is that of `image_files.load_image`: no pixel of a DICOM image is NaN. Raises
    ValueError, one line, for a damaged file or a film.
    """
    (header,) = dicom_files.read_headers([file])
    frames = int(header.data.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"{file}: is a film of {frames} frames; save single frames as PNG")

    pixels = dicom_images.read_pixels(file)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels, False


def pixel_size(file: Path) -> tuple[float, float] | None:
    """Return width and height of a DICOM image's pixels in mm, None if they are unknown.

    A file that cannot be read has none: its prediction reports the error.
    """
    headers, _ = read_headers([file])
    if not headers:
        return None
    with dicom_files.complete_header(file):
        return dicom_images.spacing_of(headers[0])
