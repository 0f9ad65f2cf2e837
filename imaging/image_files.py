"""Read image and mask files in every form that cameras and other tools write.

- Images: grey becomes three equal channels, alpha is dropped, and 16-bit, 32-bit and float images
  are stretched from their own minimum and maximum to 0..255 (16-bit colours by those of all
  channels). Non-finite pixels become 0, with a message. The EXIF orientation is applied; an image
  with damaged EXIF data stays as stored, with a message.
- TIFFs that Pillow refuses (three channels that are not marked as colours, 32 bits per channel,
  64-bit floats) or misreads (planes of 16 bits) are read with tifffile, by the same rules.
- Files of several pages or frames are refused. Previews, which TIFF marks as such, and the further
  pictures in a phone's JPEG (MPO) do not count.
- Masks: colours (and palettes, by the colours they show) become one channel by their maximum. If
  the colours are constant, alpha is the mask. Binary masks of 16 bits are scaled from their full
  range (0 to 65535) and float masks from 0..1 to 0..255; other values above 255 are refused.
- A mask without an orientation tag that has the size of the image as stored is turned like the
  image. If the upright image has this size as well, the mask may be stored or upright, and
  --mask-orientation decides; without it the mask is turned, with a message.
"""

import errno
import functools
import logging
import os
import re
import struct
import sys
import tempfile
import textwrap
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from imaging import layouts

# The warnings of libraries lack the file's name. Our own messages cover what matters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

ORIENTATION = ExifTags.Base.Orientation
ORIENTATIONS = ["stored", "upright"]  # of masks without an orientation tag
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Raw modes that Pillow reads in the file's byte order, although libtiff returns the machine's.
NATIVE = {
    "I;16S": "I;16NS",
    "I;16BS": "I;16NS",
    "I;32S": "I;32NS",
    "I;32BS": "I;32NS",
    "F;32F": "F;32NF",
    "F;32BF": "F;32NF",
}

# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def one_line_errors(path: Path):
    """Turn the errors of libraries about an unreadable file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{layouts.missing_file(path)}: no such file") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(
            f"{path}: has more than {limit / 1e6:.0f} megapixels, the most that is read; cut the "
            "image into tiles, or make it smaller"
        ) from None
    except MemoryError:
        raise ValueError(f"{path}: does not fit into memory; make the image smaller") from None
    except Exception as error:  # libraries raise all kinds of errors for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(f"{path}: {os.strerror(error.errno)}") from None
        raise ValueError(_unreadable_line(path, error)) from None


def _unreadable_line(path: Path, error: Exception) -> str:
    """Return the message about a file that no library reads as an image."""
    foreign = layouts.describe_unsupported(path)
    if foreign is not None:
        return foreign
    if layouts.is_volume(path):
        return f"{path}: NIfTI holds a volume, not an image; save its slices as PNG"
    if path.name.startswith("._"):
        return f"{path}: not an image, but a file that macOS creates; delete it"
    if path.stat().st_size == 0:
        return f"{path}: not readable as an image (it is empty, 0 bytes); replace the file"

    reason = textwrap.shorten(str(error), 200) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "of no kind that Pillow reads"
    return (
        f"{path}: not readable as an image ({reason}); if it opens elsewhere, save it again as "
        "PNG, else replace the file"
    )


def refuse_special(path: Path) -> None:
    """Raise ValueError for a folder, a pipe, a socket or a device.

    Opening a pipe would wait for its writer.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a file, but a folder, a pipe or a device")


@functools.cache
def say_once(line: str) -> None:
    """Print a line about a file once, however often the file is read."""
    print(line, flush=True)


LIBTIFF = threading.Lock()  # one thread at a time redirects stderr
LIBTIFF_LINE = re.compile(r"[\w.]+: [^\r\n|]*\n")  # "ZIPDecode: Decoding error.", no progress bar


@contextmanager
def _libtiff_errors(path: Path, image: Image.Image):
    """Capture what libtiff writes to stderr while an image is decoded.

    It becomes part of the error that Pillow raises. If Pillow raises none, it is printed. The
    output of other threads, such as a progress bar, is written after the image is decoded.
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


# --- opening files --------------------------------------------------------------------------------


def open_image(path: Path, decode: bool = True, rawmode: str | None = None) -> Image.Image:
    """Open an image file, decoding all of it or only its header.

    rawmode: how Pillow unpacks the stored channels, instead of its own choice. Raises
    FileNotFoundError, or OSError or ValueError for files that are unreadable or of several pages.
    """
    path = Path(path)
    image = _open_header(path)
    if rawmode is not None:
        image.tile = [_replace_rawmode(tile, {_rawmode(tile): rawmode}) for tile in image.tile]
    if decode:
        with one_line_errors(path), _libtiff_errors(path, image):
            image.load()
    return image


def _open_header(path: Path) -> Image.Image:
    """Open an image file without decoding it; a TIFF that Pillow does not read is decoded."""
    refuse_special(path)
    needs_tifffile = False
    pages = 1
    with one_line_errors(path):
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            if not _is_tiff(path) or layouts.describe_unsupported(path):
                raise
            needs_tifffile = True
        else:
            pages = count_pages(image)
            needs_tifffile = image.format == "TIFF" and _has_wide_planes(image)
    _refuse_pages(path, pages)
    if needs_tifffile:
        return tiff_image(path)

    if image.format == "TIFF":
        image.filename = ""  # else Pillow maps the file, with the sides of a turned image exchanged
        image.tile = [_replace_rawmode(tile, NATIVE) for tile in image.tile]
    return image


def _is_tiff(path: Path) -> bool:
    """Return True if a file begins like a TIFF or a BigTIFF."""
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _refuse_pages(path: Path, pages: int) -> None:
    """Raise ValueError if a file holds several images."""
    if pages > 1:
        raise ValueError(
            f"{path}: holds {pages} pages or frames, and a file must hold one image; save each as "
            "an image of its own, or the slices of a volume as NIfTI (.nii.gz)"
        )


def count_pages(image: Image.Image) -> int:
    """Count the pictures in a file: pages of a TIFF, frames of an animation.

    The further pictures of an MPO (a phone's JPEG with depth or gain maps) and the layers of a PSD
    do not count, nor do pages that a TIFF marks as the preview or transparency mask of another one.
    """
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format in ("MPO", "PSD"):
        return 1
    if image.format != "TIFF":
        return frames

    pages = 1  # the first one is read, whatever it is
    for number in range(1, frames):
        image.seek(number)
        kind = image.tag_v2.get(254, 0)  # NewSubfileType: 1 is a preview, 4 a transparency mask
        is_old_preview = image.tag_v2.get(255) == 2  # SubfileType, which it replaced
        if not kind & 5 and not is_old_preview:
            pages += 1
    image.seek(0)
    return pages


def _rawmode(tile) -> str | None:
    """Return the raw mode by which Pillow unpacks a tile; None if the codec decides."""
    arguments = tile[3]
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else None


def _replace_rawmode(tile, replacements: dict[str, str]):
    """Return a tile of Pillow's with the raw mode that `replacements` maps its own one to.

    Only the codec libtiff returns the machine's byte order, so only its tiles use NATIVE.
    """
    codec, _, _, arguments = tile
    rawmode = _rawmode(tile)
    if rawmode not in replacements or (replacements is NATIVE and codec != "libtiff"):
        return tile
    if isinstance(arguments, tuple):
        return tile._replace(args=(replacements[rawmode], *arguments[1:]))
    return tile._replace(args=replacements[rawmode])


def _has_wide_planes(image: Image.Image) -> bool:
    """Return True for a TIFF with planes of more than 8 bits, which Pillow misreads."""
    has_planes = image.tag_v2.get(284) == 2  # PlanarConfiguration
    return has_planes and max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample


# --- TIFFs that Pillow does not read --------------------------------------------------------------


def tiff_image(path: Path) -> Image.Image:
    """Decode a TIFF with tifffile, as stored; the EXIF data of the result has its orientation.

    Channels of more than 8 bits are in the attribute `wide`, (H,W,C); the image shows them in 8
    bits. Raises ValueError if the file is unreadable or has several pages, or without tifffile.
    """
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"{path}: not readable as an image by Pillow; tifffile reads more kinds of TIFF: pip "
            "install tifffile, or save it as PNG"
        ) from None

    with one_line_errors(path), tifffile.TiffFile(path) as file:
        pages = 0
        for number, page in enumerate(file.pages):
            kind = page.tags.valueof(254, default=0)  # NewSubfileType: 1 is a preview, 4 a mask
            if number == 0 or not kind & 5:
                pages += 1
        pixels = tiff_pixels(file.pages[0], file.filehandle.size)
        orientation = file.pages[0].tags.valueof(ORIENTATION)
        image = _as_pillow(pixels, path)
    _refuse_pages(path, pages)
    if orientation is not None:
        image.getexif()[ORIENTATION] = orientation
    return image


def tiff_pixels(page, size: int) -> np.ndarray:
    """Return the pixels of a tifffile page, (H,W) or (H,W,C), as stored. size: bytes of the file.

    Raises ValueError for kinds of pixels that have no rule here and for truncated files.
    """
    if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if page.photometric not in (1, 2):
        raise ValueError(f"PhotometricInterpretation {page.photometric:d}")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a TIFF with the axes {page.axes}")
    ends = []
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        ends.append(start + count)
    if not ends or max(ends) > size:
        raise ValueError("the file is cut off")

    pixels = page.asarray(maxworkers=1)
    return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels  # (H,W) or (H,W,C)


def _as_pillow(pixels: np.ndarray, path: Path) -> Image.Image:
    """Return pixels (H,W) or (H,W,C) as Pillow would open them; see `tiff_image`."""
    if pixels.ndim == 2:
        return _grey_as_pillow(pixels)
    channels = pixels.shape[2]
    if channels not in (2, 3, 4):
        raise ValueError(f"{channels} channels")
    if pixels.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(pixels))

    wide = pixels[..., [0, 0, 0, 1]] if channels == 2 else pixels  # grey and alpha: (H,W,4)
    image = Image.fromarray(stretch(wide, path)[0])
    image.wide = wide
    return image


def _grey_as_pillow(pixels: np.ndarray) -> Image.Image:
    """Return pixels (H,W) as an image of mode L, 1, I;16, I or F; ValueError if none fits."""
    kind = pixels.dtype.kind
    if pixels.dtype in (np.bool_, np.uint8, np.uint16):
        return Image.fromarray(pixels)
    if kind == "f":
        with np.errstate(over="ignore"):  # too large values become infinite, which is reported
            return Image.fromarray(pixels.astype(np.float32))
    if pixels.dtype == np.uint32:
        image = Image.fromarray(pixels.astype(np.uint32).view(np.int32))
        image.is_unsigned = True
        return image
    limits = np.iinfo(np.int32)
    if kind not in "iu" or pixels.min() < limits.min or pixels.max() > limits.max:
        raise ValueError(f"numbers of type {pixels.dtype} that are too large")
    return Image.fromarray(pixels.astype(np.int32))


# --- orientation ----------------------------------------------------------------------------------


def turn_pixels(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H,W,C) by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)  # (W,H,C)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def read_exif(image: Image.Image) -> Image.Exif | None:
    """Return the EXIF data of an opened image, None if it is damaged."""
    try:
        exif = image.getexif()
        has_orientation = exif.get(ORIENTATION) is not None
        is_cut = not has_orientation and _is_cut(image.info.get("exif"))
    except Exception:  # all kinds of errors, as for damaged images
        return None
    return None if is_cut else exif


def _is_cut(exif: bytes | None) -> bool:
    """Return True if EXIF data ends within its list of tags, or does not begin like EXIF data.

    Pillow then takes the tags that it can read, without an error. Raises struct.error if the data
    is too short.
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
    """Return True if the EXIF data of a file is damaged, so that the file is read as stored."""
    return read_exif(open_image(path, decode=False)) is None


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8; 1 if it is missing or damaged."""
    exif = read_exif(image)
    number = None if exif is None else exif.get(ORIENTATION)
    return int(number) if number in range(2, 9) else 1


def turn_upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Turn a decoded image by its EXIF orientation, or by `orientation` (2 to 8) instead."""
    method = TRANSPOSITIONS.get(orientation or exif_orientation(image))
    turned = image if method is None else image.transpose(method)

    turned.is_unsigned = getattr(image, "is_unsigned", False)
    if image.format == "TIFF" and image.mode == "I":
        is_wide = image.tag_v2.get(258) == (32,)  # BitsPerSample
        turned.is_unsigned = is_wide and image.tag_v2.get(339, (1,)) == (1,)  # SampleFormat
    return turned


def grey_values(image: Image.Image) -> np.ndarray:
    """Return the values of a decoded image of one channel, (H,W).

    Pillow reads unsigned 32-bit integers as signed ones; here they are unsigned again.
    """
    values = np.asarray(image)
    if getattr(image, "is_unsigned", False):
        return values.view(np.uint32)
    return values


# --- images ---------------------------------------------------------------------------------------


def sixteen_bit_colours(path: Path, orientation: int | None = None) -> np.ndarray | None:
    """Return the colours of a file with more than 8 bits per channel, upright, (H,W,3 or 4).

    They are uint16, except in TIFFs that tifffile reads. Returns None for all other files. Pillow
    keeps only the high bytes of such channels; decoding the file again with swapped bytes gives the
    low ones. orientation: as for `turn_upright`. Raises as `open_image` does, and ValueError for
    channels that cannot be read in this way.
    """
    header = open_image(path, decode=False)
    if hasattr(header, "wide"):
        return turn_pixels(header.wide, orientation or exif_orientation(header))
    if header.mode[0] in "IF" or not getattr(header, "tile", []):
        return None
    match = re.fullmatch(r"(\w+);16([LBN])", _rawmode(header.tile[0]) or "")
    is_wide_ppm = header.mode == "RGB" and pnm_maximum(header) > 255
    if match is None and not is_wide_ppm:
        return None

    channels, order = match.groups() if match else ("PPM", None)
    if (channels, order) == ("LA", "B"):
        stored = turn_upright(
            open_image(path, rawmode="RGBA"), orientation
        )  # four bytes, as stored
        grey_and_alpha = np.asarray(stored).view(">u2").astype(np.uint16)  # (H,W,2)
        return grey_and_alpha[..., [0, 0, 0, 1]]
    if channels not in ("RGB", "RGBX", "RGBA"):
        raise ValueError(
            f"{path}: 16 bits a channel of this kind ({channels}) are not supported; save it as "
            "RGB or grey, as PNG or TIFF"
        )

    native = "L" if sys.byteorder == "little" else "B"
    swapped = {"L": "B", "B": "L"}[native if order == "N" else order]
    high = turn_upright(open_image(path), orientation)
    low = turn_upright(open_image(path, rawmode=f"{channels};16{swapped}"), orientation)
    return np.asarray(high).astype(np.uint16) * 256 + np.asarray(low)  # (H,W,C)


def pnm_maximum(header: Image.Image) -> int:
    """Return the value of white in a PGM or PPM file; 255 for all other files."""
    if header.format != "PPM" or not header.tile:
        return 255
    arguments = header.tile[0][3]  # a raw mode, or (raw mode, maximum)
    is_pair = isinstance(arguments, tuple) and len(arguments) == 2
    return arguments[1] if is_pair else 255


def stretch(x: np.ndarray, path: Path) -> tuple[np.ndarray, bool]:
    """Stretch the finite values from their minimum and maximum to 0..255; all others become 0.

    Returns uint8 of the same shape, and True if there are non-finite values. Raises ValueError if
    no value is finite or if the range overflows.
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
    return as_rgb(turn_upright(open_image(path)), path)


def as_rgb(image: Image.Image, path: Path) -> tuple[np.ndarray, bool]:
    """Return a decoded image as `load_image` does; path: its file, for messages."""
    if image.mode == "F" or image.mode.startswith("I"):  # floats, 16- and 32-bit integers
        grey, non_finite = stretch(grey_values(image), path)  # (H,W)
        return np.repeat(grey[..., None], 3, axis=2), non_finite
    with one_line_errors(path):  # modes that cannot become RGB, damaged palettes
        if image.mode == "P":  # a palette may hold transparency, which only RGBA can represent
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB")), False


def read_image(path: Path) -> np.ndarray:
    """Return an image file as uint8 (H,W,3), upright. Raises as `load_image` does."""
    return load_image(path)[0]


# --- masks ----------------------------------------------------------------------------------------


def mask_turn(path: Path, image: Path, orientation: str | None) -> tuple[int | None, bool]:
    """Return the EXIF orientation by which a mask is turned, and True if that is a guess.

    None means that it is not turned, or only by a tag of its own. Otherwise its size shows if it is
    stored like its image or upright. If both have the same size, `orientation` (stored, upright)
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
        stored_size = (stored.tag_v2[256], stored.tag_v2[257])
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

    image: the image file of this mask, for its orientation. numbers: the values are class indices,
    so that the indices of a palette image are read instead of its colours. binary: the mask shows
    one class, so that floats and 16-bit values are scaled; by default the opposite of `numbers`.
    orientation: as for `mask_turn`. Raises as `open_image`, `mask_channel` and `mask_bytes` do.
    """
    if binary is None:
        binary = not numbers
    turn = None
    is_guess = False
    if image is not None:
        turn, is_guess = mask_turn(path, image, orientation)

    colours = sixteen_bit_colours(path, turn)
    if colours is not None:
        values = mask_channel(colours, path, numbers)
        return mask_bytes(values, path, binary), is_guess

    stored = open_image(path)
    values = mask_values(turn_upright(stored, turn), path, numbers)
    if numbers and stored.format == "PPM":
        values = _unscale(values, path)
    return mask_bytes(values, path, binary), is_guess


def _unscale(values: np.ndarray, path: Path) -> np.ndarray:
    """Undo Pillow's scaling of a PGM or PPM file by its maximum, which changes class indices."""
    maximum = pnm_maximum(open_image(path, decode=False))
    if maximum == 255:
        return values
    full = 255 if maximum < 256 else 65535
    return np.round(values.astype(np.float64) * maximum / full).astype(np.int32)


def read_mask(path: Path, image: Path | None = None, numbers: bool = False) -> np.ndarray:
    """Return a mask file as uint8 (H,W), upright. Arguments and errors: see `load_mask`."""
    return load_mask(path, image, numbers)[0]


def mask_values(mask: Image.Image, path: Path, numbers: bool) -> np.ndarray:
    """Return the values of a decoded mask, (H,W) of any dtype. Raises as `mask_channel` does."""
    if numbers and mask.mode == "P":
        return np.asarray(mask)
    if numbers and mask.mode == "PA":
        return np.asarray(mask)[..., 0]
    if mask.mode == "L" or mask.mode[0] in "IF":
        return grey_values(mask)

    has_alpha = mask.mode.upper() in ("LA", "PA", "RGBA")  # also La and RGBa, premultiplied
    has_alpha = has_alpha or (mask.mode == "P" and "transparency" in mask.info)
    with one_line_errors(path):  # modes that cannot become RGB, damaged palettes
        colours = np.asarray(mask.convert("RGBA" if has_alpha else "RGB"))
    if has_alpha:
        return mask_channel(colours, path, numbers)
    return colours.max(axis=2)  # 1-bit, palette and other colours


def mask_channel(colours: np.ndarray, path: Path, numbers: bool) -> np.ndarray:
    """Reduce a coloured mask to one channel: (H,W,3 or 4) -> (H,W).

    Colours become their maximum. If all visible pixels have one colour, alpha is the mask. Class
    indices are colours; with alpha, they must be 0 where the mask is transparent. Raises ValueError
    if colours and alpha vary and either could be the mask.
    """
    values = colours[..., :3].max(axis=2)  # (H,W)
    if colours.shape[2] == 3:
        return values
    if colours.dtype.kind == "f":
        raise ValueError(f"{path}: holds floats with transparency; save the mask as grey")
    alpha = colours[..., 3]  # (H,W)
    if alpha.min() == alpha.max():
        is_empty = alpha.max() == 0 and values.min() == values.max()
        return np.zeros_like(values) if is_empty else values

    full = np.iinfo(colours.dtype).max
    hidden = values[alpha == 0]  # (N,)
    if numbers and values.min() != values.max():
        if not hidden.any():
            return values
    else:
        # Faint pixels have rounded colours, hidden ones arbitrary colours.
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

    Values from 0 to 255 are unchanged. In binary masks, floats from 0 to 1 and integers over the
    full range of 10 to 16 bits are scaled to 0..255. Raises ValueError for everything else:
    negative, too large or non-finite values, and fractions.
    """
    if values.dtype == np.uint8:
        return values

    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: holds NaN or infinite pixels, which no mask may")
        if binary and values.min() >= -1e-6 and values.max() <= 1 + 1e-6:
            # 0.5 belongs to the foreground, which is > 127.
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
        number = low if low < 0 else top
        raise ValueError(
            f"{path}: holds class number {number}; class numbers go from 0 to 254, and 255 is "
            "ignored. Renumber the classes"
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

    Soft edges have none: hardly a pixel of theirs equals all of its eight neighbours.
    """
    top = values.max()
    between = (values > 0) & (values < top - top // 256)  # rounding may leave some near the maximum

    inner = values[1:-1, 1:-1]  # (H-2,W-2)
    height, width = inner.shape
    is_flat = between[1:-1, 1:-1].copy()
    for row in range(3):
        for column in range(3):
            is_flat &= values[row : row + height, column : column + width] == inner
    return is_flat.sum() > 0.005 * between.sum()


# --- pseudocolour ---------------------------------------------------------------------------------


@functools.cache
def colour_table(name: str) -> np.ndarray:
    """Return the RGB colour that a colour map assigns to each grey level, uint8 (256,3).

    name: one of matplotlib's, or OpenCV's name for the same map (COLORMAP_BONE is bone; OpenCV's
    rainbow and ocean are other maps). Raises ValueError for unknown names.
    """
    import matplotlib

    names = {known.lower(): known for known in matplotlib.colormaps}
    matplotlib_name = names.get(name.lower().removeprefix("colormap_"))
    if matplotlib_name is None:
        raise ValueError(
            f"--pseudocolor {name}: unknown; take one of bone, viridis, turbo, … of "
            "matplotlib.colormaps"
        )
    return matplotlib.colormaps[matplotlib_name](np.arange(256) / 255, bytes=True)[:, :3]


def grey_levels(image: np.ndarray) -> np.ndarray:
    """Return the brightness of an image, uint8 (H,W,3) -> uint8 (H,W).

    It is 0.299 red + 0.587 green + 0.114 blue (ITU-R 601).
    """
    return np.asarray(Image.fromarray(image).convert("L"))


def pseudocolor(image: np.ndarray, name: str | None) -> np.ndarray:
    """Show the grey levels of an image, uint8 (H,W,3), in the colours of a map; None: no change."""
    if name is None:
        return image
    return colour_table(name)[grey_levels(image)]  # (H,W,3)
