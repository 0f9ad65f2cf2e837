"""Images and masks -> samples, decoded once into one memory-mapped file, and batches of them.

How files are read
- Images: grey becomes three equal channels, alpha is dropped, 16-bit, 32-bit and float images are
  stretched from their own minimum..maximum to 0..255 (16-bit colours by that of all channels).
  Non-finite pixels become 0, which is printed. The EXIF orientation is applied.
- Files of several pages or frames are refused. Previews, which TIFF marks as such, and the further
  pictures of a phone's JPEG (MPO) do not count.
- Masks: colours (and palettes, by the colours they show) become one channel by their maximum. Where
  the colours are constant, alpha is the mask. Binary masks of 16 bits are scaled from their full
  range (0 to 65535), float masks from 0..1, to 0..255; other values above 255 are refused.
  Foreground is > 127 where the largest value of the split's masks exceeds 1, else > 0, so that 0/1,
  0/255, 1-bit, palette and JPEG masks all work. With `label` or classes.json the file's own numbers
  count, but where it names one class alone, masks of any other values than 0, 1 and 255, or without
  a 1, are binary all the same.
- A mask without an orientation tag, of the size of the image as stored, is turned as its image is.
  Where the image has this size upright as well, nothing tells whether the mask is stored or
  upright: --mask-orientation decides; without it the mask is turned, and that is printed.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of class numbers (0 and 1 of binary
masks; 255: does not count), `prompt` str, `name` (the mask's stem), `file` (the image's path),
`size` (H,W), `classes` (of binary masks one, else with the background), `group` (a patient, or
None), `dataset`.
"""

import functools
import hashlib
import os
import re
import secrets
import shutil
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

# --- files ---------------------------------------------------------------------------------------


ORIENTATION = ExifTags.Base.Orientation
ORIENTATIONS = ["stored", "upright"]  # of masks without a tag of their own

# Raw modes that Pillow takes for the file's byte order, though libtiff gives the machine's.
NATIVE = {
    "I;16S": "I;16NS",
    "I;16BS": "I;16NS",
    "I;32S": "I;32NS",
    "I;32BS": "I;32NS",
    "F;32F": "F;32NF",
    "F;32BF": "F;32NF",
}


# What Pillow raises about damaged files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@contextmanager
def _one_line_errors(path: Path):
    """Turn what Pillow raises about an unreadable file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise ValueError(f"{path}: not readable as an image ({error}); replace the file") from None


def open_image(path: Path, decode: bool = True, rawmode: str | None = None) -> Image.Image:
    """Return an image file, decoded or only its head.

    rawmode: how Pillow unpacks the stored channels, instead of its own choice.
    Raises FileNotFoundError or ValueError, one line: not readable, or several pages.
    """
    with _one_line_errors(path):
        image = Image.open(path)
        pages = count_pages(image)
    if pages > 1:
        raise ValueError(
            f"{path}: holds {pages} pages or frames, and a file must hold one image; save each as "
            "an image of its own, or the slices of a volume as NIfTI (.nii.gz)"
        )
    if image.format == "TIFF":
        _check_planes(path, image)
        image.tile = [_replace_rawmode(tile, NATIVE) for tile in image.tile]
    if rawmode is not None:
        image.tile = [_replace_rawmode(tile, {_rawmode(tile): rawmode}) for tile in image.tile]

    if decode:
        with _one_line_errors(path):
            image.load()
    return image


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


def _check_planes(path: Path, image: Image.Image) -> None:
    """Raise ValueError for a TIFF whose wide channels lie one after another: Pillow misreads it."""
    has_planes = image.tag_v2.get(284) == 2  # PlanarConfiguration
    if has_planes and max(image.tag_v2.get(258, (8,))) > 8:  # BitsPerSample
        raise ValueError(
            f"{path}: a TIFF with more than 8 bits in separate colour planes, which is not "
            "supported; save it as PNG, or as TIFF with interleaved channels"
        )


def sixteen_bit_colours(path: Path, orientation: int | None = None) -> np.ndarray | None:
    """Return the colours of a file with 16 bits a channel, upright, uint16 (H,W,3 or 4).

    Returns None for all other files. Pillow keeps the high bytes of such channels; decoding the
    file again with swapped bytes gives the low ones.
    orientation: as for `upright`. Raises as `open_image` does, and for channels out of reach.
    """
    head = open_image(path, decode=False)
    if head.mode[0] in "IF" or not head.tile:
        return None
    match = re.fullmatch(r"(\w+);16([LBN])", _rawmode(head.tile[0]) or "")
    is_wide_ppm = head.format == "PPM" and head.mode == "RGB" and head.tile[0][3][-1] > 255
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


def upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Return an opened image turned by its EXIF orientation, or by the given one (2..8)."""
    with _one_line_errors(image.filename):  # damaged EXIF data
        if orientation is not None:
            image.getexif()[ORIENTATION] = orientation
        turned = ImageOps.exif_transpose(image)
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
    Raises ValueError if no value is finite.
    """
    x = x.astype(np.float64)
    finite = np.isfinite(x)
    if not finite.any():
        raise ValueError(f"{path}: no pixel is a finite number; replace the file")

    low = x[finite].min()
    high = x[finite].max()
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
    with _one_line_errors(image):
        number = stored.getexif().get(ORIENTATION)
    if number not in range(2, 9):
        return None, False
    mask = open_image(path, decode=False)
    with _one_line_errors(path):
        has_own_tag = ORIENTATION in mask.getexif()
    if has_own_tag:
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
    turn, is_guess = None, False
    if image is not None:
        turn, is_guess = mask_turn(path, image, orientation)

    colours = sixteen_bit_colours(path, turn)
    if colours is None:
        values = mask_values(upright(open_image(path), turn), path, numbers)
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
    if has_alpha or (mask.mode == "P" and "transparency" in mask.info):
        return mask_channel(np.asarray(mask.convert("RGBA")), path, numbers)
    return np.asarray(mask.convert("RGB")).max(axis=2)  # 1-bit, palette and other colours


def mask_channel(colours: np.ndarray, path: Path, numbers: bool) -> np.ndarray:
    """Return the channel of a coloured mask that holds it: (H,W,3 or 4) -> (H,W).

    Colours become their maximum. Where all visible pixels have one colour, alpha is the mask.
    Class numbers are colours; with alpha, they must be 0 where the mask is transparent.
    Raises ValueError if colours and alpha vary and either could be the mask.
    """
    values = colours[..., :3].max(axis=2)  # (H,W)
    if colours.shape[2] == 3:
        return values
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


def foreground_above(maximum: int) -> int:
    """What the foreground of binary masks exceeds, where `maximum` is the split's largest value."""
    return 127 if maximum > 1 else 0


# --- the cache: every image and mask decoded once ------------------------------------------------


NON_FINITE = 1  # flag of an entry: its image holds NaN or infinite pixels, which became 0
TURNED = 2  # its mask was turned like its image, though nothing tells whether it had to be


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
    mask, turned = entry_mask(entry, entry.image)

    if image.shape[:2] != mask.shape:
        (h, w), (H, W) = mask.shape, image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")
    return image, mask, NON_FINITE * non_finite + TURNED * turned


def non_finite_line(images: list[Path]) -> str:
    """Return what to print about images with NaN or infinite pixels."""
    return f"{count_files(images, 'image')} with NaN or infinite pixels, read as 0"


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
        images, masks = {}, {}
        for entry, flag in zip(entries, flags):
            if entry.root == root and flag & NON_FINITE:
                images[entry.image] = True
            if entry.root == root and flag & TURNED:
                masks[entry.mask] = True

        if images:
            lines.append(f"{root}: {non_finite_line([*images])}")
        if masks:
            lines.append(f"{root}: {turned_line([*masks])}")
    return lines


def with_mask_orientation(entries: list, orientation: str | None) -> list:
    """Return the entries with the value of --mask-orientation: stored, upright or None."""
    return [replace(entry, mask_orientation=orientation) for entry in entries]


def _content_key(entries: list) -> str:
    """A hash of what the entries' files hold and of how they are read."""
    key = hashlib.sha256(b"rules 3")  # raise the number when the reading rules above change
    with ThreadPoolExecutor() as pool:
        files = [path for entry in entries for path in (entry.image, entry.mask)]
        for digest in pool.map(lambda path: hashlib.sha256(path.read_bytes()).digest(), files):
            key.update(digest)
    how = []
    for entry in entries:
        orientation = entry.mask_orientation
        how.append((entry.label, entry.classes, entry.numbers, str(entry.root), orientation))
    key.update(repr(how).encode())
    return key.hexdigest()[:24]


def _rules(entries: list, values: np.ndarray) -> np.ndarray:
    """How many pixels of each entry have which value, (n,256) -> the last columns of `_cache`."""
    rules = np.full((len(entries), 2), -1)
    for i, entry in enumerate(entries):
        if entry.label is not None:
            rules[i, 1] = values[i, entry.label]
    for root in {entry.root for entry in entries}:
        ours = [i for i, e in enumerate(entries) if e.root == root and e.label is None]
        if not ours:
            continue
        first, have = entries[ours[0]], values[ours].any(axis=0)  # (256,)
        one = len(first.classes) == 1
        if first.numbers and not (one and (have[2:255].any() or not have[1])):
            rules[ours, 1] = values[ours, 1:255].sum(axis=1)
            for i in ours:
                if not one and values[i, len(first.classes) : 255].any():
                    value = np.flatnonzero(values[i, :255])[-1]
                    where = f"{root / 'classes.json'} ends at {len(first.classes) - 1}"
                    raise ValueError(f"{entries[i].mask}: holds class number {value}, but {where}")
            continue
        top = np.flatnonzero(have)[-1]
        threshold = foreground_above(top)
        rules[ours, 0], rules[ours, 1] = threshold, values[ours, threshold + 1 :].sum(axis=1)
        if 1 < top <= threshold:
            hint = "class numbers need a classes.json or labels"
            raise ValueError(f"{root}: the masks hold 0 to {top}, none above 127; {hint}")
    return rules


def _decode(entries: list, file) -> np.ndarray:
    """Writes the pixels of all entries to an open file; returns the rows of `_cache`."""
    places, image_at, end = [], {}, 0
    flags = []  # an entry's NON_FINITE and TURNED
    values = np.zeros((len(entries), 256), np.int32)
    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask, flag) in zip(chunk, pool.map(_read_pair, chunk)):
                flags.append([flag])
                if entry.image not in image_at:
                    image_at[entry.image], end = end, end + file.write(image.tobytes())
                values[len(places)] = np.bincount(mask.ravel(), minlength=256)
                places.append([image_at[entry.image], end, *mask.shape])
                end += file.write(mask.tobytes())
                bar.update()
    return np.hstack([np.array(places, dtype=np.int64), _rules(entries, values), flags])


# shared: checksums
def checksums(paths) -> bytes:
    """Return a line for each file: its CRC-32 and its name. Reads about a GB a second."""
    lines = []
    for path in paths:
        crc = 0
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                crc = zlib.crc32(block, crc)
        lines.append(f"{crc:08x}  {path.name}\n")
    return "".join(lines).encode()


def is_intact(paths, listed: Path) -> bool:
    """Return True if the files are as the file of their checksums lists them.

    False if one of them is missing, or if they are of an older version, without checksums.
    """
    if not all(path.is_file() for path in (*paths, listed)):
        return False
    return listed.read_bytes() == checksums(paths)
# end shared


def _cache(entries: list, folder: Path) -> tuple[Path, np.ndarray]:
    """Decodes all pixels into `folder/KEY.bin`, unless that is there already, undamaged.

    Returns the file and int64 rows (n,7): where the image begins, where the mask begins, height,
    width, the mask's threshold (-1: its numbers count), its number of foreground pixels, the
    entry's NON_FINITE and TURNED.
    """
    pixels, index = (folder / f"{_content_key(entries)}{end}" for end in (".bin", ".npy"))
    listed = index.with_suffix(".crc")  # checksums, written last
    if index.is_file() and pixels.is_file():
        if is_intact([pixels, index], listed):
            return pixels, np.load(index)
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
    part = pixels.with_suffix(f".{secrets.token_hex(4)}")  # containers share process ids
    try:
        with open(part, "wb") as file:
            rows = _decode(entries, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, pixels)
        with open(part, "wb") as file:
            np.save(file, rows)
        os.replace(part, index)
        part.write_bytes(checksums([pixels, index]))
        os.replace(part, listed)
    finally:
        part.unlink(missing_ok=True)
    return pixels, rows


# --- data sets -----------------------------------------------------------------------------------


class Dataset:
    """Entries of one or several data sets; their pixels lie in one file that all workers map."""

    def __init__(self, entries: list, rows: np.ndarray, path: Path, colours: str | None = None):
        self.entries, self.rows, self.path, self.colours = entries, rows, path, colours
        self.classes = entries[0].classes
        self.tokenizer = None  # see `compare_prompts_by`
        self._bytes = None  # mapped on first use, in each process

    def __getstate__(self):
        return self.__dict__ | {"_bytes": None}  # pickling a memory map would copy all pixels

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """The same pixels, fewer entries."""
        entries = [self.entries[i] for i in indices]
        part = Dataset(entries, self.rows[indices], self.path, self.colours)
        part.tokenizer = self.tokenizer
        return part

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H,W,3), a view of the file, and mask uint8 (H,W) of entry i."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        image_at, mask_at, h, w, threshold, *_ = self.rows[i]
        image = self._bytes[image_at : image_at + h * w * 3].reshape(h, w, 3)
        mask = self._bytes[mask_at : mask_at + h * w].reshape(h, w)
        if self.entries[i].label is not None:
            mask = mask == self.entries[i].label
        elif threshold >= 0:
            mask = mask > threshold
        return image, np.asarray(mask, np.uint8)

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
        root, image = entry.root.name, entry.image.name
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

    def describe(self) -> str:
        """What was found, in a line."""
        rules = {127: "> 127", 0: "> 0", -1: "by number"}
        read = " and ".join(rules[threshold] for threshold in sorted({*self.rows[:, 4].tolist()}))
        order = (self.rows[:, 2] * self.rows[:, 3]).argsort()
        (h, w), (H, W) = self.rows[order[0], 2:4], self.rows[order[-1], 2:4]
        images, empty = len({entry.image for entry in self.entries}), (self.rows[:, 5] == 0).sum()
        sizes = f"{images} images from {w}x{h} to {W}x{H}"
        return f"{len(self)} entries, {sizes}, masks read {read}, {empty} of them empty"


def open_dataset(entries: list, cache: Path = ".cache", colours: str | None = None) -> Dataset:
    """Decodes the entries of one or several data sets; each data set keeps its own rule for masks.

    colours: of `pseudocolor`, in which samples come. Raises FileNotFoundError, ValueError or
    OSError, one line with the file's name, for anything missing, truncated or of another size, for
    a data set whose masks are all empty, and for a full disk.
    """
    if not entries:
        raise ValueError("the annotation file has no entries")
    lost = [path for entry in entries for path in (entry.image, entry.mask) if not path.is_file()]
    if lost:
        names = ", ".join(map(str, lost[:5])) + (" …" if len(lost) > 5 else "")
        raise FileNotFoundError(f"{len(lost)} files are missing: {names}")
    path, rows = _cache(entries, Path(cache))
    for root in {entry.root for entry in entries}:
        ours = [i for i, entry in enumerate(entries) if entry.root == root]
        if len({entries[0].classes, *(entries[i].classes for i in ours)}) > 1:
            raise ValueError(f"{root}: other classes than {entries[0].root}'s; pool like with like")
        if not rows[ours, 5].any():
            one = entries[ours[0]].mask
            raise ValueError(f"{root}: all {len(ours)} masks are empty, {one} for one")
    for line in remarks(entries, rows[:, -1]):
        print(line)
    return Dataset(entries, rows, path, colours)


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
