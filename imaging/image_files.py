"""Read image and mask files, which come in every form that cameras and tools write.

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
- A mask without an orientation tag, of the size of the image as stored, is turned as its image is.
  Where the image has this size upright as well, nothing tells whether the mask is stored or
  upright: --mask-orientation decides; without it the mask is turned, and that is printed.
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

# Libraries warn without the file's name. What matters in their warnings is said here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

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
def one_line_errors(path: Path):
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
        raise ValueError(f"{path}: is not a file, but a folder, a pipe or a device")


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
        with one_line_errors(path), _libtiff_errors(path, image):
            image.load()
    return image


def _open_head(path: Path) -> Image.Image:
    """Return the head of an image file or, of a TIFF that Pillow does not read, all of it."""
    refuse_special(path)
    with one_line_errors(path):
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

    with one_line_errors(path), tifffile.TiffFile(path) as file:
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
    ends = [
        start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)
    ]
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
    with one_line_errors(path):  # modes without a way to RGB, damaged palettes
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
    with one_line_errors(path):  # modes without a way to RGB, damaged palettes
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
