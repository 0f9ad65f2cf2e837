"""Images and masks -> samples, decoded once into one file, and batches of them.

How files are read
- Images: grey becomes three equal channels, alpha is dropped, 16-bit, 32-bit and float images are
  stretched from their own minimum..maximum to 0..255 (16-bit colours by that of all channels).
  Non-finite pixels become 0, which is printed. The EXIF orientation is applied; where EXIF data is
  damaged the image stays as stored, which is printed.
- TIFFs of kinds that Pillow refuses (three channels without the mark of colour, 32 bits a channel,
  64-bit floats) or misreads (planes of 16 bits) are read with tifffile, by the same rules.
- Files of several pages or frames are refused. Previews, which TIFF marks as such, and the further
  pictures of a phone's JPEG (MPO) do not count.
- Masks: colours (and palettes, by the colours they show) become one channel by their maximum. Where
  the colours are constant, alpha is the mask. Binary masks of 16 bits are scaled from their full
  range (0 to 65535), float masks from 0..1, to 0..255; other values above 255 are refused.
- How the values of masks are read is decided once for each data set (`mask_rule`), over all of its
  splits that are opened together. Binary masks: foreground is > 127 where masks reach above 1, else
  > 0, so that 0/1, 0/255, 1-bit, palette, JPEG and soft-edged masks all work. Masks of several
  values are refused, unless `--mask-threshold` says what foreground is. With `label` or
  classes.json the file's own numbers count; where classes.json names one class alone, masks that
  reach 255 and hold no 1 are binary all the same.
- A mask without an orientation tag, of the size of the image as stored, is turned as its image is.
  Where the image has this size upright as well, nothing tells whether the mask is stored or
  upright: --mask-orientation decides; without it the mask is turned, and that is printed.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of class numbers (0 and 1 of binary
masks; 255: does not count), `prompt` str, `name` (the mask's stem), `file` (the image's path),
`size` (H,W), `classes` (of binary masks one, else with the background), `group` (a patient, or
None), `dataset`.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import struct
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from imaging import layouts
from imaging.atomic_files import checksums, is_intact, remove_leftovers, whole_file

# Libraries warn without the file's name. What matters in their warnings is said here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# --- files ---------------------------------------------------------------------------------------


ORIENTATION = ExifTags.Base.Orientation
ORIENTATIONS = ["stored", "upright"]  # of masks without a tag of their own
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Raw modes that Pillow takes for the file's byte order, though libtiff gives the machine's.
NATIVE = {
    "I;16S": "I;16NS",
    "I;16BS": "I;16NS",
    "I;32S": "I;32NS",
    "I;32BS": "I;32NS",
    "F;32F": "F;32NF",
    "F;32BF": "F;32NF",
}


@contextmanager
def _one_line_errors(path: Path):
    """Turn what a library raises about an unreadable file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{layouts.missing_file(path)}: no such file") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(
            f"{path}: has more than {most / 1e6:.0f} megapixels, the most that is read; cut the "
            "image into tiles, or make it smaller"
        ) from None
    except MemoryError:
        raise ValueError(f"{path}: does not fit into memory; make the image smaller") from None
    except Exception as error:  # of all kinds, for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(f"{path}: {os.strerror(error.errno)}") from None
        raise ValueError(_unreadable_line(path, error)) from None


def _unreadable_line(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that no library reads as an image, and the way out."""
    foreign = layouts.foreign_format(path)
    if foreign is not None:
        return foreign
    if layouts.is_volume(path):
        return f"{path}: NIfTI holds a volume, not an image; save its slices as PNG"
    if path.name.startswith("._"):
        return f"{path}: no image, but what macOS leaves beside one; delete it"
    if path.stat().st_size == 0:
        return f"{path}: not readable as an image (it is empty, 0 bytes); replace the file"

    reason = textwrap.shorten(str(error), 200) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "of no kind that Pillow reads"
    hint = "if it opens elsewhere, save it again as PNG, else replace the file"
    return f"{path}: not readable as an image ({reason}); {hint}"


def refuse_special(path: Path) -> None:
    """Raise ValueError, one line, for a folder, a pipe, a socket or a device.

    Opening a pipe would wait for whoever writes to it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file, but a folder, a pipe or a device")


def open_image(path: Path, decode: bool = True, rawmode: str | None = None) -> Image.Image:
    """Return an image file, decoded or only its head.

    rawmode: how Pillow unpacks the stored channels, instead of its own choice.
    Raises FileNotFoundError, OSError or ValueError, one line: not readable, or several pages.
    """
    path = Path(path)
    image = _open_head(path)
    if rawmode is not None:
        image.tile = [_replace_rawmode(tile, {_rawmode(tile): rawmode}) for tile in image.tile]
    if decode:
        with _one_line_errors(path), _libtiff_errors(path, image):
            image.load()
    return image


def _open_head(path: Path) -> Image.Image:
    """Return the head of an image file or, of a TIFF that Pillow does not read, all of it."""
    refuse_special(path)
    with _one_line_errors(path):
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            if not _is_tiff(path) or layouts.foreign_format(path):
                raise
            image = None
        pages = 1 if image is None else count_pages(image)
        if image is not None and image.format == "TIFF" and _has_wide_planes(image):
            image = None
    _refuse_pages(path, pages)
    if image is None:
        return tiff_image(path)

    if image.format == "TIFF":
        image.filename = ""  # else Pillow maps the file, with the sides of a turned image exchanged
        image.tile = [_replace_rawmode(tile, NATIVE) for tile in image.tile]
    return image


def _is_tiff(path: Path) -> bool:
    """Return True if a file begins as a TIFF or a BigTIFF does."""
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _refuse_pages(path: Path, pages: int) -> None:
    """Raise ValueError, one line, if a file holds several images."""
    if pages > 1:
        raise ValueError(
            f"{path}: holds {pages} pages or frames, and a file must hold one image; save each as "
            "an image of its own, or the slices of a volume as NIfTI (.nii.gz)"
        )


@functools.cache
def say_once(line: str) -> None:
    """Print a line about a file, once however often the file is read."""
    print(line, flush=True)


LIBTIFF = threading.Lock()  # one thread at a time redirects stderr
LIBTIFF_LINE = re.compile(r"[\w.]+: [^\r\n|]*\n")  # "ZIPDecode: Decoding error.", no progress bar


@contextmanager
def _libtiff_errors(path: Path, image: Image.Image):
    """Keep what libtiff writes to stderr while an image is decoded.

    It is part of the error that Pillow raises. Where Pillow raises none, it is printed. What other
    threads write meanwhile, such as a progress bar, follows when the image is decoded.
    """
    codecs = [tile[0] for tile in getattr(image, "tile", [])]
    if "libtiff" not in codecs:
        yield
        return

    with LIBTIFF, tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        written = file.read().decode(errors="replace")
        os.write(2, LIBTIFF_LINE.sub("", written).encode())

    lines = LIBTIFF_LINE.findall(written)
    reason = lines[0].strip().removeprefix("tempfile.tif: ") if lines else ""
    if failure is not None:
        raise OSError(reason or str(failure)) from None
    if reason:
        say_once(f"{path}: damaged, but read as far as possible ({reason})")


def count_pages(image: Image.Image) -> int:
    """Return how many pictures a file holds: pages of a TIFF, frames of an animation.

    Further pictures of an MPO (a phone's JPEG with depth or gain maps) and layers of a PSD do not
    count, nor do pages that a TIFF marks as a preview or a transparency mask of another page.
    """
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format in ("MPO", "PSD"):
        return 1
    if image.format != "TIFF":
        return frames

    pages = [0]  # the first one is read, whatever it is
    for number in range(1, frames):
        image.seek(number)
        kind = image.tag_v2.get(254, 0)  # NewSubfileType: 1 is a preview, 4 a transparency mask
        is_old_preview = image.tag_v2.get(255) == 2  # SubfileType, which it replaced
        if not kind & 5 and not is_old_preview:
            pages.append(number)
    image.seek(0)
    return len(pages)


def _rawmode(tile) -> str | None:
    """Return how Pillow unpacks a tile, None where the codec decides."""
    arguments = tile[3]
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else None


def _replace_rawmode(tile, replacements: dict[str, str]):
    """Return a tile of Pillow's with another raw mode, if `replacements` names its own.

    The codec libtiff alone yields the machine's byte order, so only its tiles use NATIVE.
    """
    codec, _, _, arguments = tile
    rawmode = _rawmode(tile)
    if rawmode not in replacements or (replacements is NATIVE and codec != "libtiff"):
        return tile
    if isinstance(arguments, tuple):
        return tile._replace(args=(replacements[rawmode], *arguments[1:]))
    return tile._replace(args=replacements[rawmode])


def _has_wide_planes(image: Image.Image) -> bool:
    """Return True for a TIFF whose wide channels lie one after another: Pillow misreads it."""
    has_planes = image.tag_v2.get(284) == 2  # PlanarConfiguration
    return has_planes and max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample


def tiff_image(path: Path) -> Image.Image:
    """Return a TIFF as stored, decoded by tifffile; its EXIF data holds its orientation.

    Channels of more than 8 bits are in the attribute `wide`, (H,W,C); the image then shows them in
    8 bits. Raises ValueError, one line: not readable, several pages, or tifffile is missing.
    """
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"{path}: not readable as an image by Pillow; tifffile reads more kinds of TIFF: pip "
            "install tifffile, or save it as PNG"
        ) from None

    with _one_line_errors(path), tifffile.TiffFile(path) as file:
        pages = 0
        for number, page in enumerate(file.pages):
            kind = page.tags.valueof(254, default=0)  # NewSubfileType: 1 is a preview, 4 a mask
            pages += number == 0 or not kind & 5
        pixels = tiff_pixels(file.pages[0], file.filehandle.size)
        orientation = file.pages[0].tags.valueof(ORIENTATION)
        image = _as_pillow(pixels, path)
    _refuse_pages(path, pages)
    if orientation is not None:
        image.getexif()[ORIENTATION] = orientation
    return image


def tiff_pixels(page, size: int) -> np.ndarray:
    """Return the pixels of a tifffile page, (H,W) or (H,W,C), as stored. size: bytes of the file.

    Raises ValueError for kinds of pixels that have no rule here, and for files that are cut off.
    """
    if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if page.photometric not in (1, 2):
        raise ValueError(f"PhotometricInterpretation {page.photometric:d}")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a TIFF with the axes {page.axes}")
    ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts)]
    if not ends or max(ends) > size:
        raise ValueError("the file is cut off")

    pixels = page.asarray(maxworkers=1)
    return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels


def _as_pillow(pixels: np.ndarray, path: Path) -> Image.Image:
    """Return pixels (H,W) or (H,W,C) as Pillow would open them; see `tiff_image`."""
    if pixels.ndim == 2:
        return _grey_as_pillow(pixels)
    channels = pixels.shape[2]
    if channels not in (2, 3, 4):
        raise ValueError(f"{channels} channels")
    if pixels.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(pixels))

    wide = pixels[..., [0, 0, 0, 1]] if channels == 2 else pixels
    image = Image.fromarray(stretch(wide, path)[0])
    image.wide = wide
    return image


def _grey_as_pillow(pixels: np.ndarray) -> Image.Image:
    """Return pixels (H,W) as an image of mode L, 1, I;16, I or F. Raises ValueError: none fits."""
    kind = pixels.dtype.kind
    if pixels.dtype in (np.bool_, np.uint8, np.uint16):
        return Image.fromarray(pixels)
    if kind == "f":
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is said
            return Image.fromarray(pixels.astype(np.float32))
    if pixels.dtype == np.uint32:
        image = Image.fromarray(pixels.astype(np.uint32).view(np.int32))
        image.is_unsigned = True
        return image
    limits = np.iinfo(np.int32)
    if kind not in "iu" or pixels.min() < limits.min or pixels.max() > limits.max:
        raise ValueError(f"numbers of type {pixels.dtype} that are too large")
    return Image.fromarray(pixels.astype(np.int32))


def turn_pixels(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels (H,W,C) turned by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def sixteen_bit_colours(path: Path, orientation: int | None = None) -> np.ndarray | None:
    """Return the colours of a file with more than 8 bits a channel, upright, (H,W,3 or 4).

    They are uint16 but for TIFFs that tifffile reads. Returns None for all other files. Pillow
    keeps the high bytes of such channels; decoding the file again with swapped bytes gives the low
    ones. orientation: as for `upright`. Raises as `open_image` does, and for channels out of reach.
    """
    head = open_image(path, decode=False)
    if hasattr(head, "wide"):
        return turn_pixels(head.wide, orientation or exif_orientation(head))
    if head.mode[0] in "IF" or not getattr(head, "tile", []):
        return None
    match = re.fullmatch(r"(\w+);16([LBN])", _rawmode(head.tile[0]) or "")
    is_wide_ppm = head.mode == "RGB" and pnm_maximum(head) > 255
    if match is None and not is_wide_ppm:
        return None

    channels, order = match.groups() if match else ("PPM", None)
    if (channels, order) == ("LA", "B"):
        stored = upright(open_image(path, rawmode="RGBA"), orientation)  # four bytes, as stored
        grey_and_alpha = np.asarray(stored).view(">u2").astype(np.uint16)  # (H,W,2)
        return grey_and_alpha[..., [0, 0, 0, 1]]
    if channels not in ("RGB", "RGBX", "RGBA"):
        raise ValueError(
            f"{path}: 16 bits a channel of this kind ({channels}) are not supported; save it as "
            "RGB or grey, as PNG or TIFF"
        )

    native = "L" if sys.byteorder == "little" else "B"
    swapped = {"L": "B", "B": "L"}[native if order == "N" else order]
    high = upright(open_image(path), orientation)
    low = upright(open_image(path, rawmode=f"{channels};16{swapped}"), orientation)
    return np.asarray(high).astype(np.uint16) * 256 + np.asarray(low)  # (H,W,C)


def pnm_maximum(head: Image.Image) -> int:
    """Return the value that a PGM or PPM file calls white, 255 for all other files."""
    if head.format != "PPM" or not head.tile:
        return 255
    arguments = head.tile[0][3]  # a raw mode, or (raw mode, maximum)
    is_pair = isinstance(arguments, tuple) and len(arguments) == 2
    return arguments[1] if is_pair else 255


def read_exif(image: Image.Image) -> Image.Exif | None:
    """Return the EXIF data of an opened image, None if it is damaged."""
    try:
        exif = image.getexif()
        has_orientation = exif.get(ORIENTATION) is not None
        is_cut = not has_orientation and _is_cut(image.info.get("exif"))
    except Exception:  # of all kinds, as for damaged images
        return None
    return None if is_cut else exif


def _is_cut(exif: bytes | None) -> bool:
    """Return True if EXIF data ends within its list of tags, or does not begin as such data does.

    Pillow then takes the tags that it reads, without an error. Raises struct.error: too short.
    """
    if not exif:
        return False
    content = exif.removeprefix(b"Exif\0\0")
    if content[:2] not in (b"II", b"MM"):
        return True
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (tags,) = struct.unpack_from(f"{order}H", content, start)
    return start + 2 + 12 * tags > len(content)


def has_damaged_exif(path: Path) -> bool:
    """Return True if a file's EXIF data is damaged, so that it is read as stored."""
    return read_exif(open_image(path, decode=False)) is None


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 without, or if it is damaged."""
    exif = read_exif(image)
    number = None if exif is None else exif.get(ORIENTATION)
    return int(number) if number in range(2, 9) else 1


def upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Return a decoded image turned by its EXIF orientation, or by the given one (2..8)."""
    method = TRANSPOSITIONS.get(orientation or exif_orientation(image))
    turned = image if method is None else image.transpose(method)
    turned.is_unsigned = getattr(image, "is_unsigned", False)
    if image.format == "TIFF" and image.mode == "I":
        is_wide = image.tag_v2.get(258) == (32,)  # BitsPerSample
        turned.is_unsigned = is_wide and image.tag_v2.get(339, (1,)) == (1,)  # SampleFormat
    return turned


def grey_values(image: Image.Image) -> np.ndarray:
    """Return the values of a decoded image of one channel, upright or not, (H,W).

    Pillow reads unsigned integers of 32 bits as signed ones; these are unsigned again.
    """
    values = np.asarray(image)
    if getattr(image, "is_unsigned", False):
        return values.view(np.uint32)
    return values


def stretch(x: np.ndarray, path: Path) -> tuple[np.ndarray, bool]:
    """Stretch the finite values from their minimum..maximum to 0..255; all others become 0.

    Returns uint8 of the same shape, and True if there were others.
    Raises ValueError if no value is finite, or if they are too far apart.
    """
    x = x.astype(np.float64)
    finite = np.isfinite(x)
    if not finite.any():
        raise ValueError(f"{path}: no pixel is a finite number; replace the file")

    low = float(x[finite].min())
    high = float(x[finite].max())
    if high - low == float("inf"):
        raise ValueError(f"{path}: its values go from {low:g} to {high:g}; save it with fewer bits")
    stretched = np.where(finite, x - low, 0) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8), not finite.all()


def load_image(path: Path) -> tuple[np.ndarray, bool]:
    """Return an image file as uint8 (H,W,3), upright, and True if it had non-finite pixels.

    Raises as `open_image` and `stretch` do.
    """
    colours = sixteen_bit_colours(path)
    if colours is not None:
        return stretch(colours[..., :3], path)

    image = upright(open_image(path))
    if image.mode == "F" or image.mode.startswith("I"):  # floats, 16- and 32-bit integers
        grey, non_finite = stretch(grey_values(image), path)  # (H,W)
        return np.repeat(grey[..., None], 3, axis=2), non_finite
    with _one_line_errors(path):  # modes without a way to RGB, damaged palettes
        if image.mode == "P":  # a palette may hold transparency, which only RGBA can take
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB")), False


def read_image(path: Path) -> np.ndarray:
    """Return an image file as uint8 (H,W,3), upright. Raises as `load_image` does."""
    return load_image(path)[0]


def mask_turn(path: Path, image: Path, orientation: str | None) -> tuple[int | None, bool]:
    """Return the EXIF orientation by which a mask is turned, and True if that is a guess.

    None stands for no turn. A tag of the mask's own counts. Else its size tells whether it is
    stored like its image or upright. Where both have the same size, `orientation` (stored, upright)
    decides; without it the mask is turned, which is a guess.
    """
    stored = open_image(image, decode=False)
    number = exif_orientation(stored)
    if number == 1:
        return None, False
    mask = open_image(path, decode=False)
    mask_exif = read_exif(mask)
    if mask_exif is not None and ORIENTATION in mask_exif:
        return None, False

    stored_size = stored.size
    if stored.format == "TIFF":  # Pillow gives its upright size
        stored_size = stored.tag_v2[256], stored.tag_v2[257]
    upright_size = stored_size[::-1] if number >= 5 else stored_size
    if mask.size != stored_size:
        return None, False
    if stored_size != upright_size or orientation == "stored":
        return number, False
    if orientation == "upright":
        return None, False
    return number, True


def load_mask(
    path: Path,
    image: Path | None = None,
    numbers: bool = False,
    binary: bool | None = None,
    orientation: str | None = None,
) -> tuple[np.ndarray, bool]:
    """Return a mask file as uint8 (H,W), upright, and True if turning it was a guess.

    image: the file whose mask this is, for its orientation. numbers: the values are class numbers,
    so that a palette image gives its indices instead of its colours. binary: the mask shows one
    class, so that floats and 16-bit values are scaled; without it, if the values are no numbers.
    orientation: as for `mask_turn`. Raises as `open_image`, `mask_channel` and `mask_bytes` do.
    """
    if binary is None:
        binary = not numbers
    turn = None
    is_guess = False
    if image is not None:
        turn, is_guess = mask_turn(path, image, orientation)

    colours = sixteen_bit_colours(path, turn)
    if colours is None:
        stored = open_image(path)
        values = mask_values(upright(stored, turn), path, numbers)
        maximum = pnm_maximum(open_image(path, decode=False)) if stored.format == "PPM" else 255
        if numbers and maximum != 255:  # Pillow has scaled the numbers by it
            full = 255 if maximum < 256 else 65535
            values = np.round(values.astype(np.float64) * maximum / full).astype(np.int32)
    else:
        values = mask_channel(colours, path, numbers)
    return mask_bytes(values, path, binary), is_guess


def read_mask(path: Path, image: Path | None = None, numbers: bool = False) -> np.ndarray:
    """Return a mask file as uint8 (H,W), upright. Arguments and errors as of `load_mask`."""
    return load_mask(path, image, numbers)[0]


def mask_values(mask: Image.Image, path: Path, numbers: bool) -> np.ndarray:
    """Return what a decoded mask holds, (H,W) of any number type. Raises as `mask_channel` does."""
    if numbers and mask.mode == "P":
        return np.asarray(mask)
    if numbers and mask.mode == "PA":
        return np.asarray(mask)[..., 0]
    if mask.mode == "L" or mask.mode[0] in "IF":
        return grey_values(mask)

    has_alpha = mask.mode.upper() in ("LA", "PA", "RGBA")  # also La and RGBa, premultiplied
    has_alpha = has_alpha or (mask.mode == "P" and "transparency" in mask.info)
    with _one_line_errors(path):  # modes without a way to RGB, damaged palettes
        colours = np.asarray(mask.convert("RGBA" if has_alpha else "RGB"))
    if has_alpha:
        return mask_channel(colours, path, numbers)
    return colours.max(axis=2)  # 1-bit, palette and other colours


def mask_channel(colours: np.ndarray, path: Path, numbers: bool) -> np.ndarray:
    """Return the channel of a coloured mask that holds it: (H,W,3 or 4) -> (H,W).

    Colours become their maximum. Where all visible pixels have one colour, alpha is the mask.
    Class numbers are colours; with alpha, they must be 0 where the mask is transparent.
    Raises ValueError if colours and alpha vary and either could be the mask.
    """
    values = colours[..., :3].max(axis=2)  # (H,W)
    if colours.shape[2] == 3:
        return values
    if colours.dtype.kind == "f":
        raise ValueError(f"{path}: holds floats with transparency; save the mask as grey")
    alpha = colours[..., 3]
    if alpha.min() == alpha.max():
        drawn_nothing = alpha.max() == 0 and values.min() == values.max()
        return np.zeros_like(values) if drawn_nothing else values

    full = np.iinfo(colours.dtype).max
    hidden = values[alpha == 0]
    if numbers and values.min() != values.max():
        if not hidden.any():
            return values
    else:
        # Faint pixels have rounded colours, hidden ones any.
        visible = colours[alpha > alpha.max() // 2][:, :3]  # (N,3)
        spread = np.ptp(visible, axis=0).max()
        contradicts = visible.max() <= full // 2 < hidden.max(initial=0)  # dark on hidden white
        if spread <= full // 127 and not contradicts:
            return alpha
    raise ValueError(
        f"{path}: colours and transparency both vary, and either could be the mask; save the mask "
        "as a grey image without an alpha channel"
    )


FULL_RANGES = (1023, 4095, 16383, 32767, 65535)  # of 10, 12, 14, 15 and 16 bits


def mask_bytes(values: np.ndarray, path: Path, binary: bool) -> np.ndarray:
    """Return the values of a mask, (H,W), as uint8.

    Values from 0 to 255 stay as they are. Of binary masks, floats from 0 to 1 and integers over
    the full range of 10 to 16 bits are scaled to 0..255.
    Raises ValueError for everything else: negative, too large, not finite, fractions.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: holds NaN or infinite pixels, which no mask may")
        if binary and values.min() >= -1e-6 and values.max() <= 1 + 1e-6:
            # A half belongs to the foreground, which is > 127.
            return np.floor(255 * values.astype(np.float64).clip(0, 1) + 0.5).astype(np.uint8)
        fractions = values[values != values.round()]
        if not binary and fractions.size:
            raise ValueError(f"{path}: holds {fractions[0]:g}, but class numbers are whole")
        values = values.round()

    low = int(values.min())
    top = int(values.max())
    if low >= 0 and top <= 255:
        return values.astype(np.uint8)
    if not binary:
        raise ValueError(
            f"{path}: holds class number {low if low < 0 else top}; class numbers go from 0 to "
            "254, and 255 does not count. Renumber the classes"
        )
    if low < 0 or top not in FULL_RANGES or has_levels(values):
        raise ValueError(
            f"{path}: holds values from {low} to {top}; a binary mask holds 0 and 1, 0 and 255 or, "
            "in 16 bits, 0 and 65535. Class numbers need a classes.json and go up to 254; replace "
            "numbers of instances by 255"
        )
    return (values.astype(np.float64) * (255 / top)).round().astype(np.uint8)


def has_levels(values: np.ndarray) -> bool:
    """Return True if a mask (H,W) has areas of one value between 0 and its maximum.

    Soft edges have none: there, hardly a pixel equals all of its eight neighbours.
    """
    top = values.max()
    between = (values > 0) & (values < top - top // 256)  # rounding may leave some near the maximum
    inner = values[1:-1, 1:-1]
    is_flat = between[1:-1, 1:-1].copy()
    for row in range(3):
        for column in range(3):
            height, width = inner.shape
            is_flat &= values[row : row + height, column : column + width] == inner
    return is_flat.sum() > 0.005 * between.sum()


@functools.cache
def colour_table(name: str) -> np.ndarray:
    """What colour, RGB, a map gives each grey level, uint8 (256,3).

    name: one of matplotlib's, or OpenCV's name (COLORMAP_BONE is bone; its rainbow and ocean are
    other colours). ValueError: unknown.
    """
    import matplotlib

    known = {known.lower(): known for known in matplotlib.colormaps}
    found = known.get(name.lower().removeprefix("colormap_"))
    if found is None:
        hint = "bone, viridis, turbo, … of matplotlib.colormaps"
        raise ValueError(f"--pseudocolor {name}: unknown; take one of {hint}")
    return matplotlib.colormaps[found](np.arange(256) / 255, bytes=True)[:, :3]


def pseudocolor(image: np.ndarray, name: str | None) -> np.ndarray:
    """Image uint8 (H,W,3) -> its grey levels in the colours of a map, or as it is without one."""
    if name is None:
        return image
    return colour_table(name)[np.asarray(Image.fromarray(image).convert("L"))]


# --- how the values of masks are read ------------------------------------------------------------

GREY = slice(8, 248)  # values that JPEG noise of black and white rarely reaches

# The grey pixels of a binary mask are soft edges and JPEG noise, where values change from pixel to
# pixel. Those of a map of several values are objects, where most neighbours have the same value.
# Measured: the share of a file's grey pixels whose 3x3 neighbourhood holds one value, the largest
# over real masks. 0 % with JPEG noise (quality 50 to 95) and soft edges (resized by 0.25 to 8,
# blurred by sigma 1 to 4 pixels), 0.02 % at sigma 8, 0.44 % at sigma 16, 0.66 % blurred by boxes of
# 21 pixels. Maps of several values: 36 to 71 %.
FLAT_SHARE = 0.01
FLAT_PIXELS = 9  # the least that count: a share of few pixels says nothing

# Class numbers 1 to 7 look like JPEG noise of black. Of the pixels with the rarer dark values at
# most 19 % were flat in the same measurement, and then grey ones were in the majority.
DARK_SHARE = 0.25

LOSSY = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip
COLOUR_NOISE = 48  # levels by which JPEG may change the colour of a flat pixel

BY_NUMBER = "by number"
BY_FILE = "by file"  # some masks hold 0 and 1, others 0 to 255
GIVEN = "--mask-threshold "  # followed by the threshold
SHOWN_VALUES = 6  # how many values of a mask an error lists


@dataclass
class MaskRule:
    """How the masks of a data set are read, and what was noticed about them.

    `rule` is what config.json keeps: "> 127", "> 0", "by number", "by file" (each file > 0 or
    > 127, by its own range) or "--mask-threshold 40". `errors` and `notes` are pairs of a heading
    for reports and a line. Masks with errors cannot be used.
    """

    rule: str
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def refuse_colours(entry) -> None:
    """Raise ValueError, one line, if class numbers are expected and the mask file holds colours."""
    if entry.label is None and len(entry.classes) == 1:
        return
    bands = open_image(entry.mask, decode=False).getbands()
    if len(bands) < 3:
        return

    image = open_image(entry.mask)
    with _one_line_errors(entry.mask):
        is_grey = _is_grey(image.convert("RGB"))
    if not is_grey:
        hint = "save the numbers 0, 1, 2, … as a grey or a palette image"
        raise ValueError(f"{entry.mask}: holds colours, which are no class numbers; {hint}")


def _has_alpha(image: Image.Image) -> bool:
    """Return True if transparency varies over an image, so that alpha may be the mask."""
    if not image.has_transparency_data:
        return False
    low, high = image.convert("RGBA").getchannel("A").getextrema()
    return low < high


def _is_grey(image: Image.Image) -> bool:
    """Return True if red, green and blue of an RGB image are equal everywhere."""
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue


def count_values(entry, mask: np.ndarray) -> np.ndarray:
    """Count the values of an entry's mask as `read_mask` gives it, uint8 (H,W) -> int32 (3,256).

    Row 0: pixels of each value. Row 1: those of them that are flat, see `flat_pixels`; no grey ones
    of masks that hold probabilities. Row 2: those of the flat ones that have another colour than
    most, where colours were read as one foreground.
    """
    counts = np.zeros((3, 256), dtype=np.int32)
    counts[0] = np.bincount(mask.ravel(), minlength=256)
    flat = flat_pixels(mask)
    counts[1] = np.bincount(mask[flat & (mask != 0) & (mask != 255)], minlength=256)
    counts[1, 255] = np.count_nonzero(flat & (mask == 255))  # most pixels: faster than bincount
    counts[1, 0] = np.count_nonzero(flat) - counts[1].sum()
    if holds_probabilities(entry.mask):
        counts[1, GREY] = 0  # areas of one probability are no objects
    if entry.label is None and not (entry.numbers and len(entry.classes) > 1):
        counts[2] = _count_other_colours(entry)
    return counts


def holds_probabilities(path: Path) -> bool:
    """Return True if a mask file holds floats from 0 to 1, which are cut at a half."""
    if open_image(path, decode=False).mode != "F":
        return False
    return np.asarray(open_image(path)).max() <= 1 + 1e-6


def flat_pixels(mask: np.ndarray) -> np.ndarray:
    """Return bool (H,W): where all nine pixels of the 3x3 neighbourhood have one value.

    Pixels at the image's border are never flat.
    """
    flat = np.zeros(mask.shape, dtype=bool)
    if min(mask.shape) < 3:
        return flat
    inner = mask[:, 1:-1]
    flat_row = (inner == mask[:, :-2]) & (inner == mask[:, 2:])  # (H,W-2)
    flat[1:-1, 1:-1] = flat_row[:-2] & flat_row[1:-1] & flat_row[2:]
    flat[1:-1, 1:-1] &= (inner[1:-1] == inner[:-2]) & (inner[1:-1] == inner[2:])
    return flat


def _count_other_colours(entry) -> np.ndarray:
    """Return int (256,): flat pixels of another colour than most foreground, by largest channel."""
    none = np.zeros(256, dtype=np.int32)
    stored = open_image(entry.mask, decode=False)
    palette = stored.mode == "P" and not entry.numbers  # else its indices are read
    if not palette and len(stored.getbands()) < 3:
        return none

    image = open_image(entry.mask)
    if _has_alpha(image):  # `mask_channel` has refused colours that vary
        return none
    colours = image.convert("RGB")
    if _is_grey(colours):
        return none
    pixels = np.asarray(colours)  # (H,W,3)
    largest = pixels.max(axis=2)
    chosen = flat_pixels(largest) & (largest >= GREY.start)
    if not chosen.any():
        return none

    colours, counts = np.unique(pixels[chosen], axis=0, return_counts=True)  # (n,3), (n,)
    main = colours[counts.argmax()].astype(int)
    other = (np.abs(colours - main) > COLOUR_NOISE).any(axis=1)
    return np.bincount(colours[other].max(axis=1), counts[other], minlength=256).astype(np.int32)


def mask_rule(
    entries: list, counts: np.ndarray, threshold: int | None = None, known: str | None = None
) -> MaskRule:
    """Decide how the masks of one data set are read. Every program takes the rule from here.

    entries: of one root, all splits together. counts (n,3,256): `count_values` of their masks.
    threshold: of --mask-threshold, for binary masks. known: the rule that a run read this data set
    by; it settles what the values leave open.
    """
    numbers_of_files = {e.mask: i for i, e in enumerate(entries) if e.label is None}
    if not numbers_of_files:
        return MaskRule(BY_NUMBER)
    indices = sorted(numbers_of_files.values())
    entries = [entries[i] for i in indices]
    counts = counts[indices]

    if entries[0].numbers and len(entries[0].classes) > 1:
        return MaskRule(BY_NUMBER, _unknown_numbers(entries, counts[:, 0]))
    if threshold is None and known and known.startswith(GIVEN):
        threshold = int(known.removeprefix(GIVEN))
    if threshold is not None:
        return MaskRule(f"{GIVEN}{threshold}")

    rule = _rule_of_values(entries, counts)
    return _settled(rule, known, entries, counts)


def _unknown_numbers(entries: list, values: np.ndarray) -> list[tuple[str, str]]:
    """Return an error for each mask with a class number that classes.json does not name."""
    errors = []
    n = len(entries[0].classes)
    for entry, row in zip(entries, values):
        unknown = n + np.flatnonzero(row[n:255])
        if len(unknown):
            shown = ", ".join(map(str, unknown[:SHOWN_VALUES]))
            if len(unknown) > SHOWN_VALUES:
                shown += ", …"
            number = "number" if len(unknown) == 1 else "numbers"
            where = f"{entry.root / 'classes.json'} ends at {n - 1}"
            line = f"{entry.mask}: holds class {number} {shown}, but {where}"
            errors.append(("unknown class numbers", line))
    return errors


def _rule_of_values(entries: list, counts: np.ndarray) -> MaskRule:
    """Decide by the values alone; see `mask_rule`."""
    root = entries[0].root
    values = counts[:, 0]  # (n,256)
    present = values.any(axis=0)  # (256,)
    if entries[0].numbers and present[1] and not present[2:255].any():
        return MaskRule(BY_NUMBER)

    largest = int(np.flatnonzero(present).max(initial=0))
    if largest <= 1:
        return MaskRule("> 0")
    if largest <= 127:
        not_binary = values[:, 2:].any(axis=1)
        line = _not_binary_line(entries, values, not_binary, "holds no value above 127")
        return MaskRule("> 127", [("masks of several values", line)])

    several = _hold_several_values(entries, counts)
    if several.any():
        what = "holds several values instead of one foreground"
        line = _not_binary_line(entries, values, several, what)
        return MaskRule("> 127", [("masks of several values", line)])

    coloured = _hold_several_colours(counts)
    if coloured.any():
        what = "holds several colours instead of one foreground, by their largest channel"
        line = _not_binary_line(entries, values, coloured, what)
        return MaskRule("> 127", [("masks of several colours", line)])

    zero_one = _are_zero_one(counts, _are_lossy(entries))
    if not zero_one.any():
        return MaskRule("> 127")
    example = entries[int(zero_one.argmax())].mask
    hold = "masks hold" if zero_one.sum() > 1 else "mask holds"
    line = (
        f"{root}: {zero_one.sum()} {hold} 0 and 1 ({example.name}), others go up to {largest}; "
        "each file is read by its own range"
    )
    return MaskRule(BY_FILE, notes=[("masks of two ranges", line)])


def _ways_out(root: Path) -> str:
    """Return what a user can do about masks that are not binary."""
    numbers = f"class numbers need a classes.json in {root} that names 0, 1, 2, … (255 is void)"
    return f"{numbers}; for one foreground set --mask-threshold 0..255 (values above it count)"


def _are_lossy(entries: list) -> np.ndarray:
    """Return bool (n,): which masks are files whose compression changes values."""
    return np.array([entry.mask.suffix.lower() in LOSSY for entry in entries], dtype=bool)


def _hold_several_values(entries: list, counts: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks are maps of several values.

    counts (n,3,256): `count_values` of their masks.
    """
    lossy = _are_lossy(entries)
    webp = np.array([entry.mask.suffix.lower() == ".webp" for entry in entries], dtype=bool)
    values = counts[:, 0]
    flat = counts[:, 1]

    # Objects of grey values, in a file or, where each has only few pixels, in all files together.
    grey = values[:, GREY].sum(axis=1)  # (n,)
    flat_grey = flat[:, GREY].sum(axis=1)
    several = (flat_grey >= FLAT_PIXELS) & (flat_grey >= FLAT_SHARE * grey)
    total = flat_grey.sum()
    if total >= FLAT_PIXELS and total >= FLAT_SHARE * grey.sum():
        several |= flat_grey > 0
    if values[:, 1:].any(axis=0).sum() == 1:
        several[:] = False  # one foreground value, whatever it is

    # Objects of class numbers below grey, 2 to 7, or 1 beside white. WebP shifts all of black.
    dark = values[:, : GREY.start]  # (n,8)
    flat_dark = flat[:, : GREY.start]
    rarer = np.arange(GREY.start) != flat_dark.argmax(axis=1)[:, None]
    rarer_dark = (dark * rarer).sum(axis=1)
    rarer_flat_dark = (flat_dark * rarer).sum(axis=1)
    white = values[:, GREY.stop :].sum(axis=1)
    numbers = (rarer_flat_dark >= FLAT_PIXELS) & (rarer_flat_dark >= DARK_SHARE * rarer_dark)
    numbers &= ~webp & (rarer_dark > grey) & ((white >= FLAT_PIXELS) | values[:, 2:].any(axis=1))

    # 1 and 255 and nothing else but 0: 255 may be void or foreground. JPEG noise has other values.
    enough = np.where(lossy, FLAT_PIXELS, 1)
    one_and_white = (values[:, 1] >= enough) & (values[:, 255] >= enough)
    one_and_white &= ~values[:, 2:255].any(axis=1)
    return several | numbers | one_and_white


def _hold_several_colours(counts: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks have objects of several colours, or a coloured background."""
    flat = counts[:, 1, GREY.start :].sum(axis=1)
    other = counts[:, 2].sum(axis=1)
    return (other >= FLAT_PIXELS) & (other >= FLAT_SHARE * flat)


def _not_binary_line(entries: list, values: np.ndarray, chosen: np.ndarray, what: str) -> str:
    """Return the error for the chosen masks (n,): the first file, its counts, the ways out."""
    first = int(chosen.argmax())
    row = values[first]
    present = np.flatnonzero(row)
    most = present[np.argsort(-row[present], kind="stable")][:SHOWN_VALUES]
    shown = ", ".join(f"{value} ({row[value]} pixels)" for value in sorted(most.tolist()))
    if len(present) > len(most):
        shown += f" and {len(present) - len(most)} more"

    entry = entries[first]
    others = int(chosen.sum()) - 1
    like_it = f" ({others} more masks are like it)" if others else ""
    return f"{entry.mask}: {what}: {shown}{like_it}; {_ways_out(entry.root)}"


def _are_zero_one(counts: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """Return bool (n,): which masks hold 0 and 1, and nothing else.

    A black JPEG can be 1 all over, also if it was saved anew as PNG. In a JPEG both must be in
    objects, since noise holds a few 1.
    """
    values = counts[:, 0]
    flat = counts[:, 1]
    in_objects = (flat[:, 0] >= FLAT_PIXELS) & (flat[:, 1] >= 1)
    both = (values[:, 0] > 0) & (values[:, 1] > 0)
    return both & (in_objects | ~lossy) & ~values[:, 2:].any(axis=1)


def _settled(fresh: MaskRule, known: str | None, entries: list, counts: np.ndarray) -> MaskRule:
    """Return the rule of a run where the values allow it, else that of the values, with a note.

    A split may hold too little to tell: only empty masks, or only void pixels.
    """
    if known is None or known == fresh.rule or fresh.errors:
        return fresh

    present = counts[:, 0].any(axis=0)  # (256,)
    no_foreground = not present[1:].any()
    zero_one = _are_zero_one(counts, _are_lossy(entries))
    dark_split = known == "> 127" and fresh.rule == "> 0" and not zero_one.any()
    void_split = known == BY_NUMBER and entries[0].numbers and not present[1:255].any()
    if known == BY_FILE or no_foreground or dark_split or void_split:
        return replace(fresh, rule=known)

    root = entries[0].root
    line = f"{root}: masks are read {fresh.rule}; the run read {root.name} {known}"
    fresh.notes.append(("masks read differently from the run", line))
    return fresh


def mask_thresholds(entries: list, values: np.ndarray, rule: str) -> np.ndarray:
    """Return int (n,): what the foreground of each mask exceeds, -1 where numbers count.

    entries: of one root. values (n,256): pixels of each value. rule: see `MaskRule`.
    """
    if rule == BY_NUMBER:
        thresholds = np.full(len(entries), -1)
    elif rule == BY_FILE:
        thresholds = np.where(values[:, 2:].any(axis=1), 127, 0)
    else:
        number = rule.removeprefix(GIVEN).removeprefix("> ")
        thresholds = np.full(len(entries), int(number))

    labelled = np.array([entry.label is not None for entry in entries], dtype=bool)
    return np.where(labelled, -1, thresholds)


def foreground_pixels(entry, values: np.ndarray, threshold: int) -> int:
    """Count the foreground pixels of a mask. values (256,): pixels of each value."""
    if entry.label is not None:
        return int(values[entry.label])
    if threshold < 0:
        return int(values[1:255].sum())
    return int(values[threshold + 1 :].sum())


def read_foreground(entry, mask: np.ndarray, threshold: int) -> np.ndarray:
    """Return a mask as training sees it: 0 and 1, or class numbers; uint8 (H,W).

    mask: as `read_mask` gives it. threshold: from `mask_thresholds`.
    """
    if entry.label is not None:
        mask = mask == entry.label
    elif threshold >= 0:
        mask = mask > threshold
    return np.asarray(mask, np.uint8)


def named(rules: dict[Path, str]) -> dict[str, str]:
    """Rules by the folder names of the data sets, without names that two different rules share."""
    names = {}
    for root, rule in rules.items():
        names.setdefault(root.name, set()).add(rule)
    return {name: rule for name, (rule, *others) in names.items() if not others}


# --- the cache: every image and mask decoded once ------------------------------------------------


NON_FINITE = 1  # flag of an entry: its image holds NaN or infinite pixels, which became 0
TURNED = 2  # its mask was turned like its image, though nothing tells whether it had to be
DAMAGED_EXIF = 4  # its image's EXIF data is damaged, so that it was read as stored


def entry_mask(entry, image: Path | None) -> tuple[np.ndarray, bool]:
    """Return `load_mask` of an entry's mask; `image` is its image, None if that is unreadable."""
    numbers = entry.label is not None or entry.numbers
    binary = entry.label is None and len(entry.classes) == 1
    return load_mask(entry.mask, image, numbers, binary, entry.mask_orientation)


def _read_pair(entry) -> tuple[np.ndarray, np.ndarray, int]:
    """Return image uint8 (H,W,3), raw mask uint8 (H,W) and the flags of one entry.

    Raises ValueError if their sizes differ, and as `open_image` does.
    """
    image, non_finite = load_image(entry.image)
    refuse_colours(entry)
    mask, turned = entry_mask(entry, entry.image)

    if image.shape[:2] != mask.shape:
        (h, w), (H, W) = mask.shape, image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")
    flags = NON_FINITE * non_finite + TURNED * turned
    return image, mask, flags + DAMAGED_EXIF * has_damaged_exif(entry.image)


def non_finite_line(images: list[Path]) -> str:
    """Return what to print about images with NaN or infinite pixels."""
    return f"{count_files(images, 'image')} with NaN or infinite pixels, read as 0"


def damaged_exif_line(images: list[Path]) -> str:
    """Return what to print about images whose orientation is unknown, as EXIF data is damaged."""
    return f"{count_files(images, 'image')} with damaged EXIF data, read as stored, not turned"


def turned_line(masks: list[Path]) -> str:
    """Return what to print about masks that were turned though nothing tells that they must be."""
    reason = "turned like the image's EXIF orientation, but it may be upright already"
    if len(masks) > 1:
        reason = "turned like their images' EXIF orientation, but they may be upright already"
    return f"{count_files(masks, 'mask')} {reason}: set --mask-orientation stored or upright"


def count_files(paths: list[Path], noun: str) -> str:
    """Return "2 masks (a.png, b.png)", with at most three names."""
    names = ", ".join(path.name for path in paths[:3])
    if len(paths) > 3:
        names += ", …"
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"


def remarks(entries: list, flags: np.ndarray) -> list[str]:
    """Return a line about each kind of file in a data set that was read by a rule worth knowing."""
    lines = []
    for root in dict.fromkeys(entry.root for entry in entries):
        images = {}
        masks = {}
        unturned = {}
        for entry, flag in zip(entries, flags):
            if entry.root == root and flag & NON_FINITE:
                images[entry.image] = True
            if entry.root == root and flag & DAMAGED_EXIF:
                unturned[entry.image] = True
            if entry.root == root and flag & TURNED:
                masks[entry.mask] = True

        if images:
            lines.append(f"{root}: {non_finite_line([*images])}")
        if unturned:
            lines.append(f"{root}: {damaged_exif_line([*unturned])}")
        if masks:
            lines.append(f"{root}: {turned_line([*masks])}")
    return lines


def with_mask_orientation(entries: list, orientation: str | None) -> list:
    """Return the entries with the value of --mask-orientation: stored, upright or None."""
    return [replace(entry, mask_orientation=orientation) for entry in entries]


def read_truth(entry, threshold: int) -> np.ndarray:
    """Read the mask of one entry as training sees it: 0 and 1, or class numbers; uint8 (H,W).

    threshold: from `mask_thresholds`. Raises ValueError if image and mask differ in size.
    """
    _, mask, _ = _read_pair(entry)
    return read_foreground(entry, mask, threshold)


def _digest(path: Path) -> bytes:
    """Return a hash of a file. Raises ValueError if it is no regular file."""
    refuse_special(path)
    return hashlib.sha256(path.read_bytes()).digest()


def _content_key(entries: list, masks_only: bool = False) -> str:
    """A hash of what the entries' files hold and of how they are read."""
    key = hashlib.sha256(b"rules 5")  # raise the number when what is stored changes
    files = [entry.mask for entry in entries]
    if not masks_only:
        files += [entry.image for entry in entries]
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_digest, files):
            key.update(digest)
    how = []
    for entry in entries:
        orientation = entry.mask_orientation
        how.append((entry.label, entry.classes, entry.numbers, str(entry.root), orientation))
    key.update(repr(how).encode())
    return key.hexdigest()[:24]


def _decode(entries: list, file) -> tuple[np.ndarray, np.ndarray]:
    """Writes the pixels of all entries to an open file; returns places and counts of `_cache`."""
    places, image_at, end = [], {}, 0
    flags = []  # of an entry: NON_FINITE, …
    counts = np.zeros((len(entries), 3, 256), np.int32)
    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask, flag) in zip(chunk, pool.map(_read_pair, chunk)):
                flags.append([flag])
                if entry.image not in image_at:
                    image_at[entry.image], end = end, end + file.write(image.tobytes())
                counts[len(places)] = count_values(entry, mask)
                places.append([image_at[entry.image], end, *mask.shape])
                end += file.write(mask.tobytes())
                bar.update()
    places = np.hstack([np.array(places, dtype=np.int64), flags])
    return places, counts


def _cache(entries: list, folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Decode all pixels into `folder/KEY.bin`, unless that is there already, undamaged.

    Returns the file; int64 (n,5): where the image begins, where the mask begins, height, width, the
    entry's flags (NON_FINITE, …); and `count_values` of each mask, (n,3,256).
    """
    pixels, index = (folder / f"{_content_key(entries)}{end}" for end in (".bin", ".npz"))
    listed = index.with_suffix(".crc")  # checksums, written last
    if index.is_file() and pixels.is_file():
        if is_intact([pixels, index], listed):
            with np.load(index) as stored:
                return pixels, stored["places"], stored["counts"]
        print(f"{pixels}: damaged or of an older version; decoding the images again", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = {entry.image for entry in entries}
    areas = {path: np.prod(open_image(path, decode=False).size) for path in images}
    need = 3 * sum(areas.values()) + sum(areas[entry.image] for entry in entries)
    free = shutil.disk_usage(folder).free
    print(f"decoding {len(areas)} images once into {pixels} ({need / 1e6:,.0f} MB)", flush=True)
    if need > free:
        short = f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(f"{folder}: {short}; choose another folder with --cache")
    with whole_file(pixels) as part, open(part, "wb") as file:
        places, counts = _decode(entries, file)
    with whole_file(index) as part, open(part, "wb") as file:
        np.savez_compressed(file, places=places, counts=counts)
    with whole_file(listed) as part:
        part.write_bytes(checksums([pixels, index]))
    return pixels, places, counts


def mask_counts(entries: list, folder: Path) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256), from `folder/KEY-masks.npz` if there.

    For masks that only decide how a data set is read. Raises as `read_mask` does.
    """
    if not entries:
        return np.zeros((0, 3, 256), dtype=np.int32)
    path = folder / f"{_content_key(entries, masks_only=True)}-masks.npz"
    listed = path.with_suffix(".crc")  # its checksum, written last
    if path.is_file() and is_intact([path], listed):
        with np.load(path) as stored:
            return stored["counts"]

    counts = count_masks(entries)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, counts=counts)
    with whole_file(listed) as part:
        part.write_bytes(checksums([path]))
    return counts


def count_masks(entries: list) -> np.ndarray:
    """Return `count_values` of each entry's mask, (n,3,256); n is 1 or more."""
    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(_count_entry, entries)])


def _count_entry(entry) -> np.ndarray:
    """Return `count_values` of an entry's mask as stored: turning it would not change them."""
    refuse_colours(entry)
    mask, _ = entry_mask(entry, None)
    return count_values(entry, mask)


# --- data sets -----------------------------------------------------------------------------------


class Dataset:
    """Entries of one or several data sets; their pixels lie in one file that all workers read.

    It is not mapped: a mapped file that becomes shorter kills the process that reads it.
    """

    def __init__(self, entries: list, rows: np.ndarray, path: Path, colours: str | None = None):
        self.entries, self.rows, self.path, self.colours = entries, rows, path, colours
        self.classes = entries[0].classes
        self.tokenizer = None  # see `compare_prompts_by`
        self.rules = {}  # root -> `MaskRule.rule`, of all data sets that were opened together

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """The same pixels, fewer entries."""
        entries = [self.entries[i] for i in indices]
        part = Dataset(entries, self.rows[indices], self.path, self.colours)
        part.tokenizer = self.tokenizer
        part.rules = self.rules
        return part

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H,W,3) and mask uint8 (H,W) of entry i.

        Raises OSError, one line, if the file became shorter since it was opened.
        """
        image_at, mask_at, h, w, threshold, *_ = self.rows[i]
        image = self._read(image_at, h * w * 3).reshape(h, w, 3)
        mask = self._read(mask_at, h * w).reshape(h, w)
        return image, read_foreground(self.entries[i], mask, threshold)

    def _read(self, place: int, size: int) -> np.ndarray:
        """Return bytes of the file of pixels, uint8 (size,)."""
        values = np.fromfile(self.path, np.uint8, count=size, offset=place)
        if len(values) < size:
            raise OSError(f"{self.path}: became shorter while this run read it; run again")
        return values

    def sample(self, i: int, kind: str, rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; kind and rng as for `Entry.text`."""
        entry, (image, mask) = self.entries[i], self.pixels(i)
        image = pseudocolor(image, self.colours)
        sample = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}  # (3,H,W)
        sample |= {"mask": torch.from_numpy(mask.astype(np.int64)), "size": mask.shape}  # (H,W)
        sample |= {"prompt": entry.text(kind, rng), "classes": self.classes}
        sample |= {"name": entry.name, "file": entry.image}
        return sample | {"group": entry.group, "dataset": entry.root.name}

    def compare_prompts_by(self, tokenizer) -> None:
        """Compare prompts by the token ids that a model's tokenizer, text -> (1,T), gives them."""
        self.tokenizer = tokenizer
        for cached in ("_keys", "_prompts"):
            self.__dict__.pop(cached, None)

    def prompt_key(self, text: str) -> tuple:
        """Return what a model sees of a prompt: texts with equal keys are the same prompt.

        These are the token ids of `tokenizer`. Without one, texts that differ only in case and
        blanks are the same, as they are to CLIP's and BERT's tokenizers.
        """
        if self.tokenizer is None:
            return tuple(text.lower().split())
        if text not in self._keys:
            self._keys[text] = tuple(self.tokenizer(text)[0].tolist())
        return self._keys[text]

    @functools.cached_property
    def _keys(self) -> dict[str, tuple]:
        """Text -> its token ids."""
        return {}

    @functools.cached_property
    def _prompts(self) -> dict[Path, set[tuple]]:
        """Image -> the keys of the prompts of all its entries."""
        keys = {}
        for entry in self.entries:
            for texts in entry.prompts.values():
                keys.setdefault(entry.image, set()).update(map(self.prompt_key, texts))
        return keys

    def check_negatives(self, kind: str) -> None:
        """Raise ValueError if an image has no `absent_prompt`."""
        asked = {}  # data set -> the keys of its prompts of this kind
        for entry in self.entries:
            asked.setdefault(entry.root, set()).update(map(self.prompt_key, entry.texts(kind)))

        for entry in self.entries:
            if asked[entry.root] <= self._prompts.get(entry.image, set()):
                raise self._no_absent_prompt(entry, kind)

    def _no_absent_prompt(self, entry, kind: str) -> ValueError:
        root = entry.root.name
        image = entry.image.name
        return ValueError(
            f"{root}: --negatives needs prompts that differ to the model; all {kind} prompts of "
            f"other images are also prompts of {image}"
        )

    def absent_prompt(self, i: int, kind: str, rng: np.random.Generator) -> str:
        """Return a prompt of another image of the same data set that no entry of image i has.

        To the model, see `prompt_key`. This is all that tells that its target is not in image i.
        Raises ValueError if all prompts are alike.
        """
        mine = self.entries[i]
        present = self._prompts.get(mine.image, set())
        others = []
        for j in rng.permutation(len(self)):
            other = self.entries[j]
            if other.root == mine.root and other.image != mine.image:
                prompt = other.text(kind, rng)
                if self.prompt_key(prompt) not in present:
                    return prompt
                others.append(other)

        # The draw from several texts of an entry may have missed the one that is absent.
        for other in others:
            for prompt in other.texts(kind):
                if self.prompt_key(prompt) not in present:
                    return prompt
        raise self._no_absent_prompt(mine, kind)

    def empty_data_sets(self) -> dict[Path, list]:
        """Return {data set: its entries} where no mask has any foreground."""
        by_root = {}
        for i, entry in enumerate(self.entries):
            by_root.setdefault(entry.root, []).append(i)

        empty = {}
        for root, indices in by_root.items():
            if not self.rows[indices, 5].any():
                empty[root] = [self.entries[i] for i in indices]
        return empty

    def check_foreground(self) -> None:
        """Raise ValueError, one line, if all masks of a data set are empty."""
        for root, entries in self.empty_data_sets().items():
            read = f"read {self.rules[root]}"
            example = entries[0].mask
            count = len(entries)
            raise ValueError(f"{root}: all {count} masks are empty ({read}), {example} for one")

    def describe(self) -> str:
        """What was found, in a line."""
        thresholds = sorted({*self.rows[:, 4].tolist()})
        read = " and ".join(BY_NUMBER if t < 0 else f"> {t}" for t in thresholds)
        order = (self.rows[:, 2] * self.rows[:, 3]).argsort()
        (h, w), (H, W) = self.rows[order[0], 2:4], self.rows[order[-1], 2:4]
        images, empty = len({entry.image for entry in self.entries}), (self.rows[:, 5] == 0).sum()
        sizes = f"{images} images from {w}x{h} to {W}x{H}"
        return f"{len(self)} entries, {sizes}, masks read {read}, {empty} of them empty"


@dataclass
class MaskReading:
    """What decides, besides the masks that are opened, how masks are read."""

    threshold: int | None = None  # of --mask-threshold
    known: dict[str, str] = field(default_factory=dict)  # a run's rules by data set name
    others: list = field(default_factory=list)  # entries that are not opened, of the same data sets
    other_counts: np.ndarray = field(default_factory=partial(np.zeros, (0, 3, 256), np.int32))


def open_dataset(entries: list, cache: Path = ".cache", colours: str | None = None) -> Dataset:
    """Open one list of entries; see `open_datasets`."""
    return open_datasets({"data": entries}, cache, colours)["data"]


def open_datasets(
    lists: dict[str, list],
    cache: Path = ".cache",
    colours: str | None = None,
    reading: MaskReading | None = None,
    may_be_empty: Collection[str] = (),
) -> dict[str, Dataset]:
    """Decode lists of entries, each of one or several data sets, and decide how masks are read.

    The decision is one for each data set (root), over all lists; notes about it are printed.
    colours: of `pseudocolor`, in which samples come. may_be_empty: names of lists that are not
    trained on. Raises FileNotFoundError, ValueError or OSError, one line with the file's name, for
    anything missing, truncated or of another size, for masks of several values, for a data set
    whose masks are all empty in another list, and for a full disk.
    """
    reading = reading or MaskReading()
    remove_leftovers(Path(cache), recursive=False)
    decoded = {}
    for name, entries in lists.items():
        if not entries:
            raise ValueError("the annotation file has no entries")
        layouts.check_files_exist(entries)
        decoded[name] = _cache(entries, Path(cache))

    every = [entry for entries in lists.values() for entry in entries] + reading.others
    counts = [counts for _, _, counts in decoded.values()] + [reading.other_counts]
    rules = decide_rules(every, np.concatenate(counts), reading)

    datasets = {}
    for name, entries in lists.items():
        path, places, counts = decoded[name]
        columns = _foreground_columns(entries, counts[:, 0], rules)
        rows = np.hstack([places[:, :4], columns, places[:, 4:]])
        _check_classes(entries)
        datasets[name] = Dataset(entries, rows, path, colours)
        datasets[name].rules = rules
        if name not in may_be_empty:
            datasets[name].check_foreground()
        for line in remarks(entries, rows[:, -1]):
            print(line)
    return datasets


def decide_rules(entries: list, counts: np.ndarray, reading: MaskReading) -> dict[Path, str]:
    """Return the rule of each data set (root); print notes. Raises ValueError, one line."""
    rules = {}
    indices = {}
    for i, entry in enumerate(entries):
        indices.setdefault(entry.root, []).append(i)

    for root, chosen in indices.items():
        known = reading.known.get(root.name)
        own = [entries[i] for i in chosen]
        decision = mask_rule(own, counts[chosen], reading.threshold, known)
        for _, line in decision.errors:
            raise ValueError(line)
        for _, line in decision.notes:
            print(line)
        rules[root] = decision.rule

    if reading.threshold is not None and set(rules.values()) <= {BY_NUMBER}:
        raise ValueError("--mask-threshold: these masks hold class numbers; remove it")
    return rules


def _foreground_columns(entries: list, values: np.ndarray, rules: dict[Path, str]) -> np.ndarray:
    """Return the last two columns of `Dataset.rows`, (n,2): threshold, foreground pixels."""
    columns = np.zeros((len(entries), 2), dtype=np.int64)
    for root in {entry.root for entry in entries}:
        indices = [i for i, entry in enumerate(entries) if entry.root == root]
        own = [entries[i] for i in indices]
        columns[indices, 0] = mask_thresholds(own, values[indices], rules[root])
    for i, entry in enumerate(entries):
        columns[i, 1] = foreground_pixels(entry, values[i], int(columns[i, 0]))
    return columns


def _check_classes(entries: list) -> None:
    """Raise ValueError, one line, if pooled data sets have different classes."""
    for entry in entries:
        if entry.classes != entries[0].classes:
            other = f"other classes than {entries[0].root}'s"
            raise ValueError(f"{entry.root}: {other}; pool like with like")


# --- loaders -------------------------------------------------------------------------------------


@dataclass
class Items(torch.utils.data.Dataset):
    """What a worker makes of (epoch, i): a recipe's inputs for entry i, with a seed of its own."""

    dataset: Dataset
    prompt: str
    inputs: callable  # (sample, train, rng) -> dict
    train: bool
    seed: int
    negatives: float = 0.0  # share of training items that ask for what is not there

    def __getitem__(self, where: tuple[int, int]) -> dict:
        epoch, i = where
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.dataset.sample(i, self.prompt, rng if self.train else None)
        if self.train and self.negatives and rng.random() < self.negatives:
            sample["prompt"] = self.dataset.absent_prompt(i, self.prompt, rng)
            sample["mask"] = torch.zeros_like(sample["mask"])
        return self.inputs(sample, self.train, rng)


def batches_per_epoch(n: int, size: int) -> int:
    """Batches of `size` in n items. A last one of a single item is left out, unless all are such:
    batch normalisation has nothing to normalise one vector by. n is 1 or more."""
    return max(1, n // size + (n % size > (1 if size > 1 else 0)))


def train_batches(n: int, size: int, epochs: int, seed: int, start: int):
    """Yields batches of (epoch, i), every epoch in its own seeded order, from number `start` on."""
    per_epoch = batches_per_epoch(n, size)
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * size : (k + 1) * size]]


def loader(items: Items, batches, workers: int, device: torch.device, collate=None):
    """A DataLoader over batches of (epoch, i): in training stacked, or by `collate`; in evaluation
    single items."""
    return torch.utils.data.DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate if items.train else itemgetter(0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: opening a loader must not move torch's random state
    )
