"""Check and read the files that a browser uploads or chooses from a list.

Every error is one sentence for the page. It names the file as the user knows it, without folders.
"""

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from imaging import image_files, measurements, nifti
from page.session import Session

READING = threading.Lock()  # held while standard output is redirected, which all threads share
MOST_BYTES = 200 * 2**20
MOST_PIXELS = 50_000_000
MOST_VOXELS = 500_000_000
# Formats of uploads. Pillow reads more, some of them with the help of other programs (EPS).
FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


@dataclass(frozen=True)
class ReadImage:
    """An image as predict.py reads it."""

    pixels: np.ndarray  # uint8 (H,W,3), upright
    notes: tuple[str, ...]  # sentences about how it was read


def sentence(error: Exception, path: Path) -> str:
    """Return an error about a file as one sentence that names the file without its folders."""
    line = " ".join(str(error).split())
    return line.replace(str(path), path.name).replace(str(path.parent), "…")


@contextlib.contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Collect what is printed, so that names of uploads are not logged; one thread at a time."""
    printed = io.StringIO()
    with READING, contextlib.redirect_stdout(printed):
        yield printed


def notes_of(printed: io.StringIO, path: Path) -> list[str]:
    """Return the lines of `captured_output` about a file as sentences for the page."""
    return [sentence(ValueError(line), path) for line in printed.getvalue().splitlines()]


def check_bytes(path: Path) -> None:
    """Raise ValueError, one sentence, if a file is empty or too large."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes); choose another file.")
    if size > MOST_BYTES:
        raise ValueError(
            f"{path.name} has {size / 2**20:.0f} MB; the page takes files of up to "
            f"{MOST_BYTES / 2**20:.0f} MB."
        )


def check_image(path: Path) -> None:
    """Raise ValueError, one sentence, unless a file is an image that is small enough to decode.

    Only its header is read.
    """
    check_bytes(path)
    size = tiff_size(path)
    if size is None:
        size = header_size(path)
    width, height = size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{path.name} has {width} x {height} pixels; the page takes images of up to "
            f"{MOST_PIXELS / 1e6:.0f} megapixels. Make it smaller, or use predict.py."
        )


def header_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image from its header. Raises ValueError, one sentence."""
    unreadable = f"{path.name} cannot be read as an image; choose a PNG, JPEG or TIFF file."
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path.name} has too many pixels; the page takes images of up to "
            f"{MOST_PIXELS / 1e6:.0f} megapixels."
        ) from None
    except Exception:  # libraries raise all kinds of errors for damaged files
        raise ValueError(unreadable) from None


def tiff_size(path: Path) -> tuple[int, int] | None:
    """Return width and height of a TIFF's first page; None for other and for damaged files.

    Pillow refuses kinds of TIFF that tifffile reads, so that their tags are read here.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            if header[2:3] == b"\x2b" or header[3:4] == b"\x2b":  # BigTIFF
                header += file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            return int(tags[256]), int(tags[257])
    except Exception:  # not a TIFF
        return None


def read_image(path: Path) -> ReadImage:
    """Read an image exactly as predict.py does. Raises ValueError, one sentence."""
    try:
        check_image(path)
        with captured_output() as printed:
            pixels, has_non_finite = image_files.load_image(path)  # (H,W,3)
            has_damaged_exif = image_files.has_damaged_exif(path)
    except (ValueError, OSError) as error:
        raise ValueError(sentence(error, path)) from None

    notes = notes_of(printed, path)
    if has_non_finite:
        notes.append("Pixels without a finite value were set to black.")
    if has_damaged_exif:
        notes.append("Its EXIF data are damaged, so the image was not turned.")
    return ReadImage(pixels, tuple(notes))


def open_image(path: Path, is_listed: bool) -> tuple[Session, tuple[str, ...]]:
    """Return the session of an image, and notes about how it was read.

    is_listed: the file is on this machine, and a spacing.csv beside it may give its pixel size; it
    is not an upload. Raises ValueError, one sentence.
    """
    image = read_image(path)
    pixel_size = None
    if is_listed:
        try:
            pixel_size = measurements.pixel_size_of(path)
        except (ValueError, OSError) as error:
            raise ValueError(sentence(error, path)) from None
    return Session(image.pixels, path.stem, pixel_size), image.notes


def check_volume(path: Path) -> None:
    """Raise ValueError, one sentence, unless a file is a volume that is small enough to decode."""
    check_bytes(path)
    try:
        grid = nifti.read_grid(path)
    except (ValueError, OSError) as error:
        raise ValueError(sentence(error, path)) from None
    voxels = int(np.prod(grid.shape)) * grid.channels
    if voxels > MOST_VOXELS:
        raise ValueError(
            f"{path.name} has {voxels / 1e6:.0f} million voxels; the page takes volumes of up to "
            f"{MOST_VOXELS / 1e6:.0f} million. Crop it, or use predict.py."
        )
