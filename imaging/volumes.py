"""Volumes in NIfTI files -> samples, prepared once into files that all workers map; crops of them
to train on, sliding windows, and the way back to the voxels of the file.

How files are read
- Axes are turned and permuted, never resampled, so that they grow to the right, front and top
  (RAS); what is written lies on the voxels of the image's file again. Arrays are (X,Y,Z).
- Voxels that are NaN or infinite are left out of statistics: they become 0 where the model treats 0
  as background (z-scores), else the smallest value of their channel.
- Whether a file is compressed is decided by its content, whatever its name ends in.
- Compressed files are read to their end and their checksums are verified.
- Headers whose sform, qform, pixdim or unit contradict each other are corrected by a written rule
  (`_reconcile`, `_to_millimetres`) or refused. What is written has the corrected header.
- Label maps hold whole numbers that the data set names; 255: the voxel does not count.
- What a user must know of files that are read all the same is printed, one line for all of them
  (`notices`).

A sample is a dict. On the prepared grid, cut to the box of what is not 0, `image` float32
(C,x,y,z), `mask` uint8 (x,y,z), and `voxels`, where each class is (for `random_crops`). On the
file's grid in RAS `truth` uint8 (X,Y,Z), `size`, `spacing` in mm, `affine`. And `place`, the way
from one to the other (for `restore`), `grid` (for `write`), `prompt` "", `name`, `file`, `classes`,
`regions`, `group`, `dataset`.
"""

import hashlib
import io
import itertools
import math
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from imaging.atomic_files import checksums, is_intact, remove_leftovers, whole_file
from imaging.files import WITH_SIMPLEITK, describe_foreign

# --- what is said of files -----------------------------------------------------------------------


def name_files(files: dict[Path, str]) -> str:
    """Return the first three files with their details, and the number of the others."""
    names = []
    for file, detail in list(files.items())[:3]:
        names.append(f"{file} ({detail})" if detail else str(file))
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


class Notices:
    """Print what a user must know of files that are read: each fact once, files together.

    A notice is printed at once, or at the end of `together`, a line for all files that it is true
    of. A process says the same of a file only once, however often it is read.
    """

    def __init__(self):
        self.waiting = {}  # sentence -> {file: detail}
        self.said = set()  # (sentence, file)
        self.depth = 0  # of `together`

    def add(self, sentence: str, file: Path, detail: str = "") -> None:
        if (sentence, file) in self.said:
            return
        self.said.add((sentence, file))
        self.waiting.setdefault(sentence, {})[file] = detail
        if not self.depth:
            self.print()

    def print(self) -> None:
        """Print what waits."""
        waiting = self.waiting
        self.waiting = {}
        for sentence, files in waiting.items():
            print(f"{name_files(files)}: {sentence}", flush=True)

    @contextmanager
    def together(self, folder: Path | None = None, becomes: Path | None = None):
        """Hold notices back until the end of the block, also where it ends with an error.

        Files of `folder`, which will be renamed, are named by what it `becomes`.
        """
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if folder:
                self._rename(folder, becomes)
            if not self.depth:
                self.print()


    def _rename(self, folder: Path, becomes: Path) -> None:
        for sentence, files in self.waiting.items():
            named = {}
            for file, detail in files.items():
                is_inside = file.is_relative_to(folder)
                named[becomes / file.relative_to(folder) if is_inside else file] = detail
            self.waiting[sentence] = named


notices = Notices()

# --- compressed files ----------------------------------------------------------------------------

GZIP = b"\x1f\x8b"  # what every member of a gzip file begins with


class GzipReader(io.BufferedIOBase):
    """Read a gzip file of one or several members forwards, verifying each member at its end.

    zlib compares checksum and length of a member only when its end is read, so that whoever stops
    after the last byte wanted learns nothing of damage. `finish` reads the rest.
    Raises zlib.error for damaged data, EOFError for data that ends too early.
    """

    BLOCK = 2**16  # bytes read at a time

    def __init__(self, file):
        self.file = file
        self.inflater = zlib.decompressobj(wbits=31)  # gzip
        self.compressed = b""  # read from the file and not yet decompressed
        self.position = 0  # in the decompressed data
        self.trailing = 0  # bytes after the last member
        self.finished = False

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Skip to a later position. Raises OSError for an earlier one."""
        if whence != 0 or offset < self.position:
            raise OSError("a gzip stream is read forwards only")
        while self.position < offset:
            if not self._decompress(min(offset - self.position, 2**20)):
                break
        return self.position

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size:
            part = self._decompress(size if size > 0 else 2**20)
            if not part:
                break
            parts.append(part)
            size = size - len(part) if size > 0 else size
        return b"".join(parts)

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            part = self._decompress(min(len(view) - done, 2**20))
            if not part:
                break
            view[done : done + len(part)] = part
            done += len(part)
        return done

    def finish(self) -> None:
        """Read to the end, a block at a time, so that every checksum is verified."""
        while self._decompress(2**20):
            pass

    def _decompress(self, limit: int) -> bytes:
        """Return up to `limit` of the following bytes; none at the end."""
        while not self.finished:
            if self.inflater.eof:
                self._next_member()
                continue
            if not self.compressed:
                self.compressed = self.file.read(self.BLOCK)
            if not self.compressed:
                raise EOFError("the compressed data ends too early")
            part = self.inflater.decompress(self.compressed, limit)
            ended = self.inflater.eof
            self.compressed = self.inflater.unused_data if ended else self.inflater.unconsumed_tail
            if part:
                self.position += len(part)
                return part
        return b""

    def _next_member(self) -> None:
        """Begin with a further member; other bytes are counted as trailing."""
        if len(self.compressed) < len(GZIP):
            self.compressed += self.file.read(self.BLOCK)
        if self.compressed.startswith(GZIP):
            self.inflater = zlib.decompressobj(wbits=31)
            return
        self.finished = True
        while self.compressed:
            self.trailing += len(self.compressed)
            self.compressed = self.file.read(self.BLOCK)


@contextmanager
def _decompressed(path: Path):
    """Yield a file open for reading, decompressed if it is gzip, and whether it is."""
    with open(path, "rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        yield (GzipReader(file) if compressed else file), compressed


# --- headers -------------------------------------------------------------------------------------

UNITS = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # of NIfTI's xyzt_units: name, mm
PLAUSIBLE = 0.05, 20.0  # mm, sides of a voxel
BY_QFORM = (
    "the sform is the bare 1 mm identity, qform and pixdim say otherwise; the qform is used, and "
    "written as sform as well"
)
BY_SFORM = (
    "qform and pixdim are the bare 1 mm identity, the sform says otherwise; the sform is used, and "
    "written as qform as well"
)
OTHER_AXES = "the axes of sform and qform differ; the sform is used"


def mm_text(spacing) -> str:
    """Return spacing in mm as text: 0.8 x 0.8 x 5 mm."""
    return " x ".join(f"{float(side):.4g}" for side in spacing) + " mm"


def _norms(affine: np.ndarray) -> np.ndarray:
    """Return the spacing (3,) of an affine (4,4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def _is_bare(affine: np.ndarray) -> bool:
    """Return True for axes of 1 mm along the patient's, from 0: what nobody has set."""
    return bool((np.abs(affine[:3, :3]) == np.eye(3)).all() and not affine[:3, 3].any())


def _is_plausible(spacing: np.ndarray) -> bool:
    low, high = PLAUSIBLE
    return bool((spacing >= low * (1 - 1e-6)).all() and (spacing <= high * (1 + 1e-6)).all())


@contextmanager
def _quiet():
    """Hide the warnings of libraries about a file: ours say what matters."""
    import nibabel

    logger = nibabel.imageglobals.logger
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _read_header(path: Path):
    """Return the NIfTI header of a file as it is stored; None if it holds none.

    nibabel mends some fields when it loads a file, a spacing of 0 among them.
    """
    import nibabel

    with _decompressed(path) as (stream, _):
        block = stream.read(540)
    kinds = [nibabel.Nifti1Header, nibabel.Nifti2Header]
    if PAIR.search(path.name):
        kinds = [nibabel.Nifti1Pair.header_class, nibabel.Nifti2Pair.header_class]
    for kind in kinds:
        size = kind.template_dtype.itemsize
        if len(block) < size or not kind.may_contain_header(block):
            continue
        header = kind(block[:size], check=False)
        _set_signs(header)
        _set_codes(header)
        _shorten_quaternion(header)
        return header
    return None


def _set_signs(header) -> None:
    """Make spacing positive and qfac 1 or -1, as the standard reads other values (nifti1.h)."""
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    if header["pixdim"][0] != -1:
        header["pixdim"][0] = 1


def _set_codes(header) -> None:
    """Replace transform codes that the standard does not have by 2.

    A code names the space of the positions. Only that there are positions matters here.
    """
    import nibabel

    known = nibabel.nifti1.xform_codes.value_set()
    for field in ("sform_code", "qform_code"):
        if int(header[field]) not in known:
            header[field] = 2


LONGEST_QUATERNION = 1.005  # a longer one is no rounding error


def _shorten_quaternion(header) -> None:
    """Scale a quaternion that rounding made longer than 1 to a length of 1, as ITK and FSL do.

    nibabel accepts what the rounding of float32 explains and refuses all else.
    """
    fields = ("quatern_b", "quatern_c", "quatern_d")
    values = np.array([header[field] for field in fields], np.float64)
    length = np.linalg.norm(values)
    if length**2 - 1 < header.quaternion_threshold or not length <= LONGEST_QUATERNION:
        return
    for field, value in zip(fields, values / length):
        header[field] = value


def _check_header(path: Path, header) -> None:
    """ValueError, one line, if a header does not say where voxels lie."""
    hint = "write the right one with set_sform of nibabel"
    if not header["sform_code"] and not header["qform_code"]:
        codes = "sform_code and qform_code are 0"
        raise ValueError(f"{path}: has no affine ({codes}); {hint}")

    spacing = header["pixdim"][1:4]
    if not np.isfinite(spacing).all() or not spacing.all():
        told = f"its pixdim says voxels of {mm_text(spacing)}"
        raise ValueError(f"{path}: {told}; write the right one with header.set_zooms of nibabel")

    if header["sform_code"]:
        affine = header.get_sform()
    else:
        affine = _qform(header)
        if affine is None:
            told = "its qform is no rotation (the quaternion is longer than 1)"
            raise ValueError(f"{path}: {told}; write the right one with set_qform of nibabel")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        singular = f"its affine is singular, {affine[:3].tolist()}"
        raise ValueError(f"{path}: {singular}; {hint}")


def _qform(header) -> np.ndarray | None:
    """Return the affine (4,4) of quaternion and pixdim, whatever its code; None if it is none."""
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = header.get_qform()
    except (ValueError, HeaderDataError):
        return None
    return affine if np.isfinite(affine).all() else None


def _reconcile(path: Path, header) -> None:
    """Make the sform of a header agree with qform and pixdim where that is safe.

    A spacing of the sform within 1 % of pixdim is taken as it is, unless the sform is the bare 1 mm
    identity and the qform is not. If exactly one of them is bare, the other one is used and written
    as both.
    ValueError, one line, if they contradict each other in another way.
    """
    if not header["sform_code"]:
        return  # the qform has no spacing but pixdim
    sform = header.get_sform()
    qform = _qform(header)
    spacing = np.abs(header["pixdim"][1:4].astype(np.float64))
    sform_is_bare = _is_bare(sform)
    qform_is_bare = qform is not None and _is_bare(qform)
    norms_agree = np.abs(_norms(sform) / spacing - 1).max() <= 0.01
    nobody_set_sform = header["qform_code"] and qform is not None and not qform_is_bare
    if norms_agree and not (sform_is_bare and nobody_set_sform):
        if header["qform_code"] and qform is not None:
            apart = np.abs(sform[:3, :3] / _norms(sform) - qform[:3, :3] / spacing).max()
            if apart > 0.01:
                notices.add(OTHER_AXES, path)
        return

    if sform_is_bare == qform_is_bare or qform is None:
        told = f"its sform says voxels of {mm_text(_norms(sform))}, its pixdim {mm_text(spacing)}"
        hint = "write the right one with set_sform and set_qform of nibabel"
        raise ValueError(f"{path}: {told}; {hint}")
    used = qform if sform_is_bare else sform
    header.set_sform(used, int(header["sform_code"]))
    header.set_qform(used, int(header["qform_code"]))
    notices.add(BY_QFORM if sform_is_bare else BY_SFORM, path, mm_text(_norms(used)))


def _to_millimetres(path: Path, header) -> None:
    """Convert a header in metres or microns to mm; ValueError, one line, if that is absurd."""
    spacing = _norms(header.get_best_affine())
    name, factor = UNITS.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    if not name:
        if not _is_plausible(spacing):
            low, high = PLAUSIBLE
            told = f"voxels outside of {low:g} to {high:g} mm; is the header's unit right?"
            notices.add(told, path, mm_text(spacing))
        return
    if not _is_plausible(spacing * factor):
        told = f"its unit is the {name}, which makes voxels of {mm_text(spacing * factor)}"
        hint = "correct it with header.set_xyzt_units of nibabel"
        raise ValueError(f"{path}: {told}; {hint}")
    header["pixdim"][1:4] *= factor
    for field in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[field] = header[field] * factor
    header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2  # mm
    told = f"the header's unit is the {name}; read and written in mm"
    notices.add(told, path, mm_text(spacing * factor))


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie."""

    file: Path
    affine: np.ndarray  # (4,4), stored indices -> mm
    shape: tuple[int, ...]  # as stored
    channels: int
    header: bytes  # of NIfTI: both transforms and their codes, units; corrected where it was wrong

    @cached_property
    def axes(self) -> np.ndarray:
        """Of each stored axis, that of RAS and the direction, 1 or -1: int (3,2)."""
        import nibabel

        return nibabel.io_orientation(self.affine).astype(int)

    @property
    def size(self) -> tuple[int, ...]:
        """(X,Y,Z) in RAS."""
        return tuple(self.shape[i] for i in self.axes[:, 0].argsort())

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm along X, Y, Z in RAS."""
        return tuple(np.linalg.norm(self.ras_affine[:3, :3], axis=0).tolist())

    @property
    def ras_affine(self) -> np.ndarray:
        """(4,4), indices in RAS -> mm."""
        import nibabel

        return self.affine @ nibabel.orientations.inv_ornt_aff(self.axes, self.shape)

    def to_ras(self, x: np.ndarray) -> np.ndarray:
        """Stored (X',Y',Z',…) -> (X,Y,Z,…), a view."""
        x = np.flip(x, np.flatnonzero(self.axes[:, 1] < 0))
        return x.transpose(*self.axes[:, 0].argsort(), *range(3, x.ndim))

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """(X,Y,Z,…) -> stored (X',Y',Z',…), a view."""
        x = x.transpose(*self.axes[:, 0], *range(3, x.ndim))
        return np.flip(x, np.flatnonzero(self.axes[:, 1] < 0))


PAIR = re.compile(r"\.(hdr|img)(\.gz)?$", re.IGNORECASE)  # a header beside its voxels
NOT_VOLUMES = [  # first bytes, what the file is and the way out
    ((b"PK\3\4",), "is a ZIP archive, not NIfTI; unpack it"),
    (
        (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM"),
        "is an image, not NIfTI; a model of images takes it",
    ),
]


def foreign_format(path: Path) -> str | None:
    """Return a line about a file of a known format other than NIfTI, None for all other files.

    The line names the file, the format and the way out.
    """
    block = b""
    if path.is_file():
        try:
            with _decompressed(path) as (stream, _):
                block = stream.read(540)
        except (OSError, EOFError, zlib.error):
            pass  # its ending says what it should be
    if block[344:348] in (b"n+1\0", b"ni1\0") or block[4:7] in (b"n+2", b"ni2"):
        return None
    for first_bytes, what in NOT_VOLUMES:
        if block.startswith(first_bytes):
            return f"{path}: {what}"
    sizes = [int.from_bytes(block[:4], order) for order in ("little", "big")]
    if len(block) >= 348 and 348 in sizes:
        return f"{path}: Analyze 7.5 is not read; {WITH_SIMPLEITK}"
    if PAIR.search(path.name):  # the ending says nothing
        return None
    return describe_foreign(path, block)


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a volume: one, or a header .hdr and its voxels .img.

    FileNotFoundError, one line, if one of the two is missing.
    """
    ending = PAIR.search(path.name)
    if not ending:
        return (path,)
    stem = path.name[: ending.start()].lower()
    beside = {}
    for file in path.parent.iterdir():
        match = PAIR.search(file.name)
        if match and file.name[: match.start()].lower() == stem:
            beside.setdefault(match[1].lower(), file)
    beside[ending[1].lower()] = path
    missing = [kind for kind in ("hdr", "img") if kind not in beside]
    if missing:
        raise FileNotFoundError(f"{path}: its other half, .{missing[0]}, is not beside it")
    return beside["hdr"], beside["img"]


@contextmanager
def _readable(path: Path):
    """Turn what nibabel raises of a damaged file into a ValueError of one line."""
    import nibabel

    wrong_header = nibabel.spatialimages.HeaderDataError
    try:
        with _quiet():
            yield
    except (wrong_header, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise OSError(f"{path}: {error.strerror}") from None
        why = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, wrong_header):
            raise ValueError(f"{path}: its header is wrong ({why}); write it again") from None
        if isinstance(error, zlib.error):
            why = f"its compressed data is damaged: {why.rpartition(': ')[2]}"
        raise ValueError(f"{path}: not readable as NIfTI ({why}); replace the file") from None


def _open(path: Path):
    """A file -> nibabel's proxy of its voxels, not yet read, and its Grid; errors as `read_grid`.

    A header that cannot be right may be that of a damaged file, which then is what is said.
    """
    path = Path(path)
    try:
        with _quiet():
            return _open_by_header(path)
    except ValueError:
        if path.is_file():
            with _readable(path), _decompressed(path) as (stream, compressed):
                if compressed:
                    stream.finish()
        raise


def _header_of(path: Path):
    """Return the NIfTI header of a file. ValueError, one line, if it has none."""
    with _readable(path):
        header = _read_header(path)
    if header is not None:
        return header
    foreign = foreign_format(path)
    if foreign:
        raise ValueError(foreign)
    why = "it has no such header" if path.stat().st_size else "it is empty, 0 bytes"
    raise ValueError(f"{path}: not readable as NIfTI ({why}); replace the file")


def _open_by_header(path: Path):
    """As `_open`, reading no more than the header."""
    from nibabel.arrayproxy import ArrayProxy

    if path.name.startswith("._"):
        raise ValueError(f"{path}: no volume, but what macOS leaves beside one; delete it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    files = files_of(path)
    header = _header_of(files[0])
    _check_header(path, header)
    with _readable(path):
        header.check_fix()
        if header.is_single and not header["vox_offset"]:
            header["vox_offset"] = header.single_vox_offset
        stored = ArrayProxy(str(files[-1]), header)
    shape = _volume_shape(path, stored.shape)
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"{path}: holds {stored.dtype}; save it as integers or floats")
    _check_size(path, stored)
    _reconcile(path, header)
    _to_millimetres(path, header)
    affine = header.get_best_affine()
    return stored, Grid(path, affine, shape[:3], shape[3], header.binaryblock)


def _volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return X,Y,Z and the number of channels of a stored shape: X,Y,Z; X,Y,Z,C; X,Y,Z,1,C.

    ValueError, one line, for any other one.
    """
    need = "it needs X,Y,Z or X,Y,Z,channels"
    more = [n for n in shape[3:] if n != 1]  # along time, channels and so on
    if len(shape) < 3:
        is_image = "an image rather than a volume; " if len(shape) == 2 else ""
        raise ValueError(f"{path}: has {len(shape)} axes, {shape}: {is_image}{need}")
    if len(more) > 1:
        raise ValueError(f"{path}: has {len(shape)} axes, {shape}; {need}")
    if min(shape) < 1:
        raise ValueError(f"{path}: its header says {shape} voxels; replace the file")
    return (*shape[:3], more[0] if more else 1)


def _voxels_end(stored) -> int:
    """Return where the voxels end in a file, in bytes of its uncompressed content."""
    return stored.offset + math.prod(stored.shape) * stored.dtype.itemsize


def _check_size(path: Path, stored) -> None:
    """Raise ValueError, one line, if a file is too small for the voxels of its header."""
    place = Path(stored.file_like)
    have = place.stat().st_size
    need = _voxels_end(stored)
    with _readable(path), _decompressed(place) as (_, compressed):
        if stored.offset < 0:
            raise EOFError("its voxels begin before the file does")
        if compressed and need > 1100 * have:  # gzip compresses to a thousandth at most
            raise EOFError(f"{have:,} bytes cannot hold {need:,}")
        if not compressed and need > have:
            raise EOFError(f"{have:,} bytes of {need:,}")


def _read_voxels(stored, path: Path, dtype=None) -> np.ndarray:
    """Return the voxels of an opened file as stored, scaled by its header.

    A compressed file is read to its end in the same pass, and its checksums are verified.
    ValueError, one line, if it is damaged.
    """
    from nibabel.arrayproxy import ArrayProxy

    spec = stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter
    with _readable(path), _decompressed(Path(stored.file_like)) as (stream, compressed):
        voxels = np.asanyarray(ArrayProxy(stream, spec, mmap=not compressed), dtype)
        if compressed:
            _finish(path, stream)
    return voxels


def _finish(path: Path, stream: GzipReader) -> None:
    """Verify the rest of a compressed file; bytes after its end are said."""
    stream.finish()
    if stream.trailing:
        told = "bytes after the end of the compressed data are ignored; its checksum is right"
        notices.add(told, path, f"{stream.trailing:,}")


def check_whole(path: Path) -> None:
    """Raise ValueError, one line, if a file is damaged or holds fewer voxels than its header says.

    Of a compressed file the checksums are verified; it is read a block at a time.
    """
    path = Path(path)
    stored, _ = _open(path)  # which checks the size of uncompressed files
    with _readable(path), _decompressed(Path(stored.file_like)) as (stream, compressed):
        if compressed:
            _finish(path, stream)
            if stream.tell() < _voxels_end(stored):
                raise EOFError(f"{stream.tell():,} bytes of {_voxels_end(stored):,}")


def read_grid(path: Path) -> Grid:
    """The grid of a file, of which only the header is read.

    FileNotFoundError, ValueError, one line: not NIfTI, damaged, not 3-D or 4-D, without an affine.
    """
    return _open(path)[1]


OFF_GRID = 0.01  # of a voxel; less is rounding, which resampling would not improve
NEAR_GRID = (
    f"less than {OFF_GRID:g} of a voxel off the grid of its image, and taken to lie on it"
)


def grid_distance(grid: Grid, other: Grid) -> float:
    """Return how far two grids of one size are apart, in voxels of the `other`.

    This is the largest distance along an axis between places of one voxel; they differ most at the
    corners of a grid.
    """
    corners = np.array(list(itertools.product(*((0, n - 1) for n in other.size))))  # (8,3)
    corners = np.hstack([corners, np.ones((8, 1))])
    positions = grid.ras_affine @ corners.T  # mm, (4,8)
    indices = np.linalg.solve(other.ras_affine, positions)
    return float(np.abs(indices - corners.T).max())


def check_grid(grid: Grid, other: Grid) -> None:
    """Raise ValueError, one line, if the voxels of two files do not lie at the same places.

    Less than OFF_GRID of a voxel is accepted, with a notice if it is more than rounding.
    """
    if grid.size != other.size:
        raise ValueError(f"{grid.file}: {grid.size} voxels, but {other.file} has {other.size}")
    away = np.abs(grid.ras_affine - other.ras_affine).max()
    distance = grid_distance(grid, other)
    if not distance < OFF_GRID:
        hint = "resample it to that grid, or copy that affine if it is the right one"
        apart = f"its affine is {away:.3g} off {other.file}'s, {distance:.2g} voxels at the corners"
        raise ValueError(f"{grid.file}: {apart}; {hint}")
    if away > 1e-3:  # mm
        notices.add(NEAR_GRID, grid.file)


def read_image(
    paths: Path | Sequence[Path], fill: float | None = None
) -> tuple[np.ndarray, Grid]:
    """One file (X,Y,Z) or (X,Y,Z,C), or several on one grid -> float32 (C,X,Y,Z) in RAS, its grid.

    fill: the value of voxels that are NaN or infinite; None for the smallest of their channel.
    Errors as of `read_grid` and `check_grid`, a damaged file, or a channel without a finite number.
    """
    opened = [_open(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    grid = opened[0][1]
    image = np.empty((sum(own.channels for _, own in opened), *grid.size), np.float32)
    channels = iter(image)
    for stored, own in opened:
        voxels = _read_voxels(stored, own.file, np.float32)
        if own is not grid:
            check_grid(own, grid)
        voxels = voxels.reshape(*own.shape, own.channels)
        replaced = 0
        for x, channel in zip(np.moveaxis(own.to_ras(voxels), 3, 0), channels):
            channel[:] = x
            bad = ~np.isfinite(channel)
            if bad.all():
                raise ValueError(f"{own.file}: a channel has no finite number; leave it out")
            if bad.any():
                channel[bad] = channel[~bad].min() if fill is None else fill
                replaced += int(bad.sum())
        if replaced:
            become = "the smallest value of their channel" if fill is None else f"{fill:g}"
            told = f"NaN or infinite voxels become {become}"
            notices.add(told, own.file, f"{replaced:,} voxels")
    return image, grid


def fill_value(preprocess: Callable, channels: int) -> float | None:
    """Return what voxels that are NaN or infinite become, the `fill` of `read_image`.

    0 if `preprocess` leaves 0 as it is, as z-scores of what is not 0 do: such voxels then count
    neither for the mean nor for the deviation, and are 0 afterwards. Else None.
    """
    probe, done = _probe(preprocess, channels)
    return 0.0 if (done[probe == 0] == 0).all() else None


def check_channels(path: Path, have: int, channels: int) -> None:
    """ValueError, one line, if an image has not as many channels as the model takes."""
    if have == channels:
        return
    hint = "choose a model or files that fit"
    if have < channels:
        hint = (
            "name the files of a case CASE_0000.nii.gz, CASE_0001.nii.gz, … in the order of the "
            "model's channels (of BraTS: FLAIR, T1ce, T1, T2)"
        )
    raise ValueError(f"{path}: {have} channels, the model takes {channels}; {hint}")


def read_labels(
    path: Path, grid: Grid, numbers: int | Sequence[int], unnamed: Sequence[int] = ()
) -> np.ndarray:
    """A label map -> uint8 (X,Y,Z) in RAS of class numbers; 255 is kept, it does not count.

    grid: its image's. numbers: those of class 0, 1, … in the file, or how many classes there are;
    `unnamed` ones are read as the first.
    ValueError, one line: another grid, a number that is not among them or not whole.
    """
    numbers = list(range(numbers)) if isinstance(numbers, int) else list(numbers)
    are_possible = all(0 <= number < 2**16 for number in (*numbers, *unnamed))
    if len(numbers) > 254 or not are_possible:
        raise ValueError(
            f"{path}: no more than 254 classes, with numbers up to 65535, are possible"
        )
    stored, own = _open(path)
    x = _read_voxels(stored, own.file)  # first, as damage may be that of the header
    check_grid(own, grid)
    if own.channels > 1:
        raise ValueError(f"{path}: {own.channels} channels; a label map has one, of class numbers")
    x = x.reshape(own.shape)
    if x.dtype.kind == "f":  # scaled by a header, 1 may be read as 0.9999999998
        with np.errstate(invalid="ignore"):
            odd = x[~(abs(x - np.rint(x)) < 1e-3)]  # and nan and inf are odd
        if len(odd):
            told = f"holds {odd[0]:g}, no whole number"
            raise ValueError(f"{path}: {told}; resample labels by nearest")
        x = np.rint(x)
    table = np.full(2**16, 254, np.uint8)  # 254: not named
    table[255] = 255
    table[[*numbers, *unnamed]] = [*range(len(numbers)), *[0] * len(unnamed)]
    odd = [end for end in (x.min(), x.max()) if not 0 <= end < 2**16]
    labels = None if odd else table[x.astype(np.uint16)]
    odd = odd or x[labels == 254]
    if len(odd):
        hint = "name it in dataset.json or correct the labels"
        raise ValueError(f"{path}: holds {int(odd[0])}, but the classes are {numbers}; {hint}")
    return np.ascontiguousarray(own.to_ras(labels))


def write(path: Path, volume: np.ndarray, grid: Grid) -> None:
    """uint8 labels or float32 (X,Y,Z) in RAS -> a NIfTI file on the voxels of the image's file.

    path: its folder is made; ValueError if it does not end in .nii or .nii.gz.
    """
    import nibabel

    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a volume must be named .nii or .nii.gz")
    kind = nibabel.Nifti1Image if len(grid.header) == 348 else nibabel.Nifti2Image
    header = kind.header_class(grid.header, check=False)
    header.set_data_dtype(volume.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's grey window, in which labels are black
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, keep_ending=True) as part, _quiet():
        kind(grid.to_stored(volume), grid.affine, header).to_filename(part)


# --- from the file's grid to the prepared one, and back ------------------------------------------


def resampled_size(size, spacing_in, spacing_out) -> tuple[int, ...]:
    """Voxels at another spacing: the first lies where it was, the last as near as can be."""
    axes = zip(size, spacing_in, spacing_out)
    return tuple(round((n - 1) * s_in / s_out + 1) for n, s_in, s_out in axes)


def _at(x: Tensor, axis: int, position: Tensor, nearest: bool = False) -> Tensor:
    """x at float64 positions along an axis, linear or nearest, beyond the border as on it."""
    n = x.shape[axis]
    if torch.equal(position, torch.arange(n, dtype=torch.float64)):
        return x

    def take(index: Tensor) -> Tensor:
        if axis < x.ndim - 1:
            return x.index_select(axis, index.to(x.device))
        return x.gather(axis, index.to(x.device).expand(*x.shape[:-1], -1))  # here 5 times faster

    position = position.clamp(0, n - 1)
    if nearest:
        return take(position.round().long())
    low = position.floor().long()
    weight = (position - low).to(x).reshape(-1, *[1] * (x.ndim - axis - 1))
    return take(low).lerp_(take((low + 1).clamp(max=n - 1)), weight)


def _at_all(x: Tensor, positions: Sequence[Tensor], nearest: bool = False) -> Tensor:
    """`_at` along X, Y and Z of (C,X,Y,Z), what shrinks first, so that what is between is small."""
    grows = [len(position) / n for position, n in zip(positions, x.shape[1:])]
    for axis in np.argsort(grows, kind="stable").tolist():
        x = _at(x, axis + 1, positions[axis], nearest)
    return x


def resample(x: Tensor, size, ratio, nearest: bool = False) -> Tensor:
    """x (C,X,Y,Z) -> (C,*size): index j of an axis is x at j * ratio, beyond the border as on it.

    Linear, or `nearest` for labels. As MONAI's Spacing does it. Where nearest falls exactly between
    two source voxels, libraries differ by one source voxel.
    """
    steps = [torch.arange(n, dtype=torch.float64) * r for n, r in zip(size, ratio)]
    return _at_all(x, steps, nearest)


@dataclass(frozen=True)
class Place:
    """Where a prepared image lies in the volume of its file."""

    size: tuple[int, ...]  # of the file's volume in RAS, (X,Y,Z)
    ratio: tuple[float, ...]  # prepared spacing / the file's
    full: tuple[int, ...]  # of the whole volume at the prepared spacing
    start: tuple[int, ...]  # of the box that is kept of it
    stop: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.start, self.stop))


def prepare_image(
    image: np.ndarray, grid: Grid, spacing, preprocess: Callable
) -> tuple[Tensor, Place]:
    """image float32 (C,X,Y,Z) in RAS -> float32 (C,x,y,z) at `spacing` in mm, and where it lies.

    Resampled, preprocessed, cut to the box of what is then not 0 in all channels, if anything is.
    """
    near = np.abs(np.subtract(spacing, grid.spacing)) < 1e-3  # mm; MONAI leaves these as they are
    spacing = np.where(near, grid.spacing, spacing).tolist()
    full = resampled_size(grid.size, grid.spacing, spacing)
    ratio = tuple(b / a for a, b in zip(grid.spacing, spacing))
    x = preprocess(resample(torch.from_numpy(image), full, ratio)).float()
    inside = (x != 0).any(0)  # (x,y,z)
    sides = inside.any(2).any(1), inside.any(2).any(0), inside.any(1).any(0)
    found = [side.nonzero().flatten().tolist() or range(len(side)) for side in sides]
    start, stop = zip(*((side[0], side[-1] + 1) for side in found))
    place = Place(grid.size, ratio, full, start, stop)
    return x[(..., *place.box)], place


def restore(logits: Tensor, place: Place, activation: Callable, background=None) -> Tensor:
    """logits (K,x,y,z) of a prepared image -> activation(logits) (K,X,Y,Z) of its file, in RAS.

    The logits are interpolated, then activated, (K,n,Y,Z) at a time. Outside the box all is 0, but
    where class 0 is the `background` (default: of several classes) its probability is 1.
    """
    result = logits.new_zeros(len(logits), *place.size)
    if len(logits) > 1 if background is None else background:
        result[0] = 1
    positions, box = [], []
    for axis, n in enumerate(place.size):
        at = torch.arange(n, dtype=torch.float64) / place.ratio[axis]
        at = at.clamp(max=place.full[axis] - 1) - place.start[axis]
        inside = ((at >= -0.5) & (at <= logits.shape[axis + 1] - 0.5)).nonzero().flatten()
        if not len(inside):  # a box so thin that it lies between the file's voxels
            return result
        positions.append(at[inside])
        box.append(slice(inside[0].item(), inside[-1].item() + 1))
    rows = max(1, 2**24 // (len(logits) * len(positions[1]) * len(positions[2])))  # 64 MB
    for i in range(0, len(positions[0]), rows):
        at = positions[0][i : i + rows]
        low = max(0, math.floor(at[0]))
        slab = _at_all(logits[:, low : math.ceil(at[-1]) + 1], (at - low, *positions[1:]))
        x = box[0].start + i
        result[:, x : x + len(at), box[1], box[2]] = activation(slab)
    return result


# --- data sets -----------------------------------------------------------------------------------


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


def _probe(preprocess: Callable, channels: int) -> tuple[Tensor, Tensor]:
    """Return values of -1e5 … 1e5, finer around 0, and their outputs, (channels,16,16,16) each."""
    x = torch.linspace(-5, 5, channels * 16**3, dtype=torch.float64)
    probe = x.sign() * (10 ** x.abs() - 1)
    probe[::5] = 0
    probe = probe.float().reshape(channels, 16, 16, 16)
    return probe, preprocess(probe).float()


def _settings(spacing, preprocess: Callable, channels: int) -> bytes:
    """What prepared voxels depend on besides the files; of `preprocess` what it makes of a probe,
    so that settings which do not matter to it do not count."""
    _, done = _probe(preprocess, channels)
    rules = "rules 3"  # raise the number when the way of preparing changes
    return repr((rules, [float(mm) for mm in spacing])).encode() + done.numpy().tobytes()


# A prepared volume is STEM with each of these, and STEM.crc, their checksums, written last.
PREPARED = (".npz", ".image.npy", ".mask.npy", ".truth.npy", ".voxels.npy")


def _is_prepared(stem: Path) -> bool:
    """Return True if all files of a prepared volume are whole; print a line if one is damaged."""
    files = [Path(f"{stem}{end}") for end in PREPARED]
    if not all(path.is_file() for path in files):
        return False
    whole = is_intact(files, Path(f"{stem}.crc"))
    if not whole:
        print(f"{stem}.*: damaged or of an older version; preparing the volume again", flush=True)
    return whole


# Hounsfield units, measured on the CT of an abdomen and of a thorax, on boxes and windows of them:
# the share of voxels in AIR_AND_FAT is 0.54 and 0.73 for whole volumes, above 0.21 for boxes around
# organs, above 0.036 for boxes of 48 voxels and 0.0001 for volumes whose intercept of -1024 was
# lost. The share in LIFTED is at most 0.005 for whole volumes, 0.095 for boxes of 32 voxels, and
# 0.41 and 0.60 where the intercept was lost.
AIR_AND_FAT = -1100, 0
LIFTED = 824, 1224  # soft tissue and fat, 1024 too high


def hu_facts(image: np.ndarray) -> np.ndarray:
    """Return of an image its smallest and largest value, the shares in AIR_AND_FAT and LIFTED."""
    shares = []
    for low, high in (AIR_AND_FAT, LIFTED):
        inside = (image >= low) & (image < high)
        shares.append(np.count_nonzero(inside) / image.size)
    return np.array([image.min(), image.max(), *shares], np.float64)


def is_hu(facts: np.ndarray) -> bool:
    """Return False if the values of `hu_facts` cannot be Hounsfield units of a body.

    Cut and windowed CT passes, windows that begin at 0 included: they end below 1000 HU. Values of
    0 to 1 or to 255 are taken for grey levels.
    """
    smallest, largest, air_and_fat, lifted = facts
    if lifted >= 0.25:
        return False
    if largest - smallest < 30 and smallest < 0:  # z-scores, -1 to 1: no window is so narrow
        return False
    return air_and_fat >= 0.005 or not (largest > 1000 or largest <= 1 or largest == 255)


def say_if_not_hu(file: Path, facts: np.ndarray) -> None:
    """Say so if the values of a file cannot be Hounsfield units."""
    if not is_hu(facts):
        told = "the model takes CT in Hounsfield units (air -1000, water 0), and these hardly are "
        told += "(was the intercept, often -1024, lost?)"
        notices.add(told, file, f"values {facts[0]:g} to {facts[1]:g}")


def _digest(image: np.ndarray) -> np.ndarray:
    """Return a hash of an image's size and voxels: uint8 (16,)."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image))
    return np.frombuffer(digest.digest(), np.uint8)


def _only_255(files: dict[Path, str], n: int) -> str:
    """Return what is wrong with label maps whose only number beside 0 is 255."""
    hint = "255 marks voxels that do not count, so nothing is labelled there; write the class's "
    hint += "number in its place, or leave these files out if they are void"
    return f"{name_files(files)}: {len(files)} of {n} label maps hold 0 and 255 alone; {hint}"


def check_255(sets: Sequence["VolumeSet"]) -> None:
    """Look over prepared sets for label maps of 0 and 255, which have nothing but void.

    ValueError, one line: no label map of their data set has 255 beside a class, so that it is
    rather a class than a mark. Where others have both, it is said which files hold no class.
    """
    roots = {}
    for some in sets:
        for root in dict.fromkeys(entry.root for entry in some.entries):
            roots.setdefault(root, []).append(some)
    for root, some in roots.items():
        alone = {}
        beside = {}
        masks = set()
        for dataset in some:
            ours = [i for i, entry in enumerate(dataset.entries) if entry.root == root]
            alone |= dataset.with_255(False, ours)
            beside |= dataset.with_255(True, ours)
            masks |= {dataset.entries[i].mask for i in ours}
        if alone and not beside:
            raise ValueError(_only_255(alone, len(masks)))
        for file in alone:
            notices.add("the label map holds 255 (does not count) and no class", file)


def _map(path: Path) -> Tensor:
    """Return an array of a prepared volume, whose voxels are read when they are used.

    It is copied on write: the file stays as it is, whatever becomes of the tensor. Reading the
    whole file instead would take hundreds of megabytes for each crop; the price is that a file
    which becomes shorter while it is used ends the process (SIGBUS). Raises OSError, one line, if
    it is damaged already.
    """
    with _prepared_file(path):
        return torch.from_numpy(np.load(path, mmap_mode="c"))


@contextmanager
def _prepared_file(path: Path):
    """Turn what numpy raises about a damaged file into one line; it was whole at the start."""
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path}: was damaged while this run read it ({error}); run again") from None


class VolumeSet:
    """Volumes of one or several data sets; `prepared` makes their samples."""

    def __init__(
        self, entries: list, grids: list | None = None, stems: list | None = None, partial=False
    ):
        """entries: layouts.Entry. partial: each, as layouts.as_regions makes it, may annotate a
        part of the classes. FileNotFoundError, ValueError: as of `read_grid`, or, if not partial,
        other classes than those of the first entry."""
        if not entries:
            raise ValueError("the data set has no volumes")
        self.entries, self.classes, self.stems = entries, entries[0].classes, stems
        self.partial = partial
        if partial:
            names = dict.fromkeys(name for entry in entries for name in entry.classes[1:])
            self.classes = ("background", *names)
        for entry in () if partial else entries:
            if (entry.classes, not entry.regions) != (self.classes, not entries[0].regions):
                other = f"other classes than {entries[0].root}'s"
                raise ValueError(f"{entry.root}: {other}; pool like with like")
        self.grids = grids or [read_grid(entry.image) for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def channels(self) -> int:
        """Of the first volume."""
        return self.grids[0].channels + len(self.entries[0].more)

    def subset(self, indices) -> "VolumeSet":
        """The same volumes, fewer of them."""
        lists = (self.entries, self.grids, self.stems)
        return VolumeSet(*(some and [some[i] for i in indices] for some in lists), self.partial)

    def describe(self) -> str:
        """What was found, in a line."""
        ends = []
        for name in ("size", "spacing"):
            values = sorted((getattr(grid, name) for grid in self.grids), key=math.prod)
            texts = ("x".join(f"{n:.3g}" for n in value) for value in (values[0], values[-1]))
            ends.append(" to ".join(dict.fromkeys(texts)))
        n = f"{len(self)} volume{'s' * (len(self) > 1)}"
        return f"{n} of {ends[0]} voxels of {ends[1]} mm"

    def _numbers(self, i: int) -> tuple[int, ...]:
        """What the classes are in the label map of entry i."""
        return self.entries[i].labels or tuple(range(max(2, len(self.classes))))

    def _stem(self, i: int, settings: bytes, cache: Path) -> Path:
        """What the names of the prepared files of entry i begin with."""
        entry = self.entries[i]
        paths = (entry.image, *entry.more, entry.mask)
        digests = [_hash(file) for path in paths for file in files_of(path)]
        content = b"".join((*digests, repr((self._numbers(i), entry.unnamed)).encode(), settings))
        return cache / hashlib.sha256(content).hexdigest()[:24]

    def _prepare(self, i: int, stem: Path, spacing, preprocess: Callable, fill) -> None:
        """Writes STEM.image.npy, .mask.npy, .truth.npy, .voxels.npy and, last, .npz."""
        entry, numbers = self.entries[i], self._numbers(i)
        image, grid = read_image((entry.image, *entry.more), fill)
        truth = read_labels(entry.mask, grid, numbers, entry.unnamed)
        facts = {"hu": hu_facts(image), "digest": _digest(image)}
        facts["labelled"] = np.count_nonzero((truth > 0) & (truth < 255))
        facts["ignored"] = np.count_nonzero(truth == 255)
        image, place = prepare_image(image, grid, spacing, preprocess)
        mask = resample(torch.from_numpy(truth[None]), place.full, place.ratio, nearest=True)
        mask = np.ascontiguousarray(mask[0][place.box])
        voxels = np.flatnonzero((mask > 0) & (mask < 255))
        voxels = voxels[mask.ravel()[voxels].argsort(kind="stable")]
        # of class c from offsets[c - 1] to offsets[c]
        offsets = mask.ravel()[voxels].searchsorted(np.arange(1, len(numbers) + 1))
        kind = np.int32 if mask.size < 2**31 else np.int64
        arrays = {"image": image.numpy(), "mask": mask, "truth": truth}
        for name, x in (arrays | {"voxels": voxels.astype(kind)}).items():
            with whole_file(Path(f"{stem}.{name}.npy")) as part, open(part, "wb") as file:
                np.save(file, np.ascontiguousarray(x))
        with whole_file(Path(f"{stem}.npz")) as part, open(part, "wb") as file:
            np.savez(file, offsets=offsets, **vars(place), **facts)

    def prepared(self, spacing, preprocess: Callable, channels: int, cache: Path) -> "VolumeSet":
        """The same volumes at `spacing` in mm and as `preprocess`, (C,x,y,z) -> the same shape,
        makes them; written into the folder `cache` once for their content and these settings.

        ValueError, OSError, one line: as reading raises them, another number of channels, a full
        disk.
        """
        cache = Path(cache)
        remove_leftovers(cache, recursive=False)
        for entry, grid in zip(self.entries, self.grids):  # what headers tell, before all else
            have = grid.channels + sum(read_grid(path).channels for path in entry.more)
            check_channels(entry.image, have, channels)
            check_grid(read_grid(entry.mask), grid)
        settings = _settings(spacing, preprocess, channels)
        keys = [(entry.root, entry.image, entry.mask) for entry in self.entries]
        once = {key: i for i, key in enumerate(keys)}  # a volume may be listed several times
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda i: self._stem(i, settings, cache), once.values())
            by_key = dict(zip(once, found))
        stems = [by_key[key] for key in keys]
        whole = {stem: _is_prepared(stem) for stem in dict.fromkeys(stems)}
        lacks = {stem: i for i, stem in enumerate(stems) if not whole[stem]}
        todo = list(lacks.values())
        if todo:
            self._announce(todo, spacing, channels, cache)
        fill = fill_value(preprocess, channels)
        for i in tqdm(todo, desc="prepare", unit="volume", disable=None, leave=False):
            self._prepare(i, stems[i], spacing, preprocess, fill)
            with whole_file(Path(f"{stems[i]}.crc")) as part:
                part.write_bytes(checksums([Path(f"{stems[i]}{end}") for end in PREPARED]))
        return VolumeSet(self.entries, self.grids, stems, self.partial)

    def _announce(self, todo: list[int], spacing, channels: int, cache: Path) -> None:
        """Says how large what is to be prepared will be. OSError if the disk is too full."""
        need = 0
        for grid in (self.grids[i] for i in todo):
            voxels = math.prod(resampled_size(grid.size, grid.spacing, spacing))
            need += voxels * (4 * channels + 1) + math.prod(grid.size)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        size = f"up to {need / 1e6:,.0f} MB"
        n = f"{len(todo)} volume{'s' * (len(todo) > 1)}"
        print(f"preparing {n} once into {cache} ({size})", flush=True)
        if need > free:
            short = f"{size} needed, {free / 1e6:,.0f} MB free"
            raise OSError(f"{cache}: {short}; choose another folder with --cache")

    def _index(self, i: int) -> dict[str, np.ndarray]:
        path = Path(f"{self.stems[i]}.npz")
        with _prepared_file(path), np.load(path) as file:
            return dict(file)

    def with_255(self, beside: bool, indices: Sequence[int] | None = None) -> dict[Path, str]:
        """Return the label maps that hold 255 (does not count) beside classes, or else without any.

        Of a prepared set: {file: ""}.
        """
        files = {}
        for i in range(len(self)) if indices is None else indices:
            index = self._index(i)
            if index["ignored"] and bool(index["labelled"]) == beside:
                files[self.entries[i].mask] = ""
        return files

    def _by_root(self) -> dict[Path, list[int]]:
        """Return {data set: numbers of its entries}."""
        numbers = {}
        for i, entry in enumerate(self.entries):
            numbers.setdefault(entry.root, []).append(i)
        return numbers

    def empty_data_sets(self) -> dict[Path, list]:
        """Return {data set: its entries} where no label map names a class, of a prepared set."""
        empty = {}
        for root, ours in self._by_root().items():
            if not any(self._index(i)["labelled"] for i in ours):
                empty[root] = [self.entries[i] for i in ours]
        return empty

    def check_foreground(self) -> None:
        """Raise ValueError, one line, if a data set of a prepared set has nothing to train on.

        Its label maps are empty, hold 0 and 255 alone, or are empty at the spacing of the model.
        """
        for root, ours in self._by_root().items():
            if any(self._index(i)["offsets"][-1] for i in ours):
                continue
            alone = self.with_255(beside=False, indices=ours)
            if alone:
                raise ValueError(_only_255(alone, len(ours)))
            one = self.entries[ours[0]].mask
            if root in self.empty_data_sets():
                raise ValueError(f"{root}: all {len(ours)} label maps are empty, {one} for one")
            ratio = self._index(ours[0])["ratio"]
            spacing = mm_text(np.multiply(self.grids[ours[0]].spacing, ratio))
            raise ValueError(
                f"{root}: all foreground of {len(ours)} label maps is lost at a spacing of "
                f"{spacing}, {one} for one; choose a finer --spacing"
            )

    def digest(self, i: int) -> str:
        """Return a hash of the voxels of entry i, of a prepared set."""
        return self._index(i)["digest"].tobytes().hex()

    def check_hu(self) -> None:
        """Say which CT volumes of a prepared set are not in Hounsfield units."""
        for i, entry in enumerate(self.entries):
            if "CT" in (entry.modality or "CT").upper():
                say_if_not_hu(entry.image, self._index(i)["hu"])

    def sample(self, i: int, kind: str = "", rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; its voxels are read when they are used.

        kind and rng, of prompts, are there as `data.Dataset.sample` has them.
        """
        entry, grid, index = self.entries[i], self.grids[i], self._index(i)
        sample = {}
        offsets = index["offsets"]
        for name in ("image", "mask", "truth", "voxels"):
            sample[name] = _map(Path(f"{self.stems[i]}.{name}.npy"))
        sample["voxels"] = sample["voxels"], offsets
        place = {field.name: tuple(index[field.name].tolist()) for field in fields(Place)}
        sample["place"] = Place(**place)
        sample |= {"size": grid.size, "spacing": grid.spacing, "affine": grid.ras_affine}
        sample |= {"grid": grid, "prompt": "", "name": entry.name, "file": entry.image}
        sample |= {"classes": entry.classes, "regions": entry.regions, "group": entry.group}
        return sample | {"dataset": entry.root.name}

    def grey(self, i: int, preprocess: Callable) -> np.ndarray:
        """`grey` of the image of entry i."""
        entry = self.entries[i]
        fill = fill_value(preprocess, self.channels)
        return grey(read_image((entry.image, *entry.more), fill)[0], preprocess)


def grey(image: np.ndarray, preprocess: Callable) -> np.ndarray:
    """float32 (C,X,Y,Z) -> uint8 (X,Y,Z) to look at: the first channel as the model sees it, all
    but one in two hundred of its values from black to white."""
    x = preprocess(torch.from_numpy(image))[0].numpy()
    low, high = np.percentile(x[::2, ::2, ::2], (0.25, 99.75))
    return ((x - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)


# --- crops to train on ---------------------------------------------------------------------------


def _background(image: Tensor, mask: Tensor, rng: np.random.Generator) -> int | None:
    """The flat index of a random voxel of label 0 where the image is not 0; None if none is."""
    values, labels = image.flatten(1), mask.flatten()  # views
    for _ in range(16):  # by trial, as a list of all such voxels would be large
        tried = torch.from_numpy(rng.integers(len(labels), size=256))
        good = (labels[tried] == 0) & (values[:, tried] != 0).any(0)
        if good.any():
            return tried[good][0].item()
    found = ((labels == 0) & (values != 0).any(0)).nonzero()
    return found[rng.integers(len(found))].item() if len(found) else None


def _centre(image: Tensor, mask: Tensor, voxels: tuple, rng, ratios) -> int:
    """The flat index of the voxel that a crop is drawn around; arguments of `random_crops`."""
    indices, offsets = voxels
    ends = offsets if len(ratios) == len(offsets) else offsets[[0, -1]]  # each class, or any
    if len(ratios) != len(ends):
        raise ValueError(f"{len(ratios)} ratios of crops for {len(offsets)} classes; give 2 or all")
    ratios = np.multiply(ratios, [True, *(np.diff(ends) > 0)])  # 0 for what the volume lacks
    part = rng.choice(len(ratios), p=ratios / ratios.sum()) if ratios.any() else 0
    centre = _background(image, mask, rng) if part == 0 else None
    if centre is None and ends[-1]:
        first, last = (ends[part - 1], ends[part]) if part else (0, ends[-1])
        centre = indices[rng.integers(first, last)].item()
    return rng.integers(mask.numel()) if centre is None else centre  # an empty volume


def random_crops(
    image: Tensor, mask: Tensor, voxels: tuple, n: int, size, rng, ratios=(1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """n crops around random voxels -> image (n,C,*size), mask (n,*size), copies.

    image (C,x,y,z), mask (x,y,z), voxels: of one sample. ratios: how often the voxel in the middle
    is of the background, label 0 where the image is not 0, and of any class; or of each class.
    What a volume lacks is not drawn. Crops are shifted into the volume; one smaller than `size`
    has zeros around it, half on either side.
    """
    images, masks = image.new_zeros(n, len(image), *size), mask.new_zeros(n, *size)
    for k in range(n):
        centre = np.unravel_index(_centre(image, mask, voxels, rng, ratios), mask.shape)
        source, target = [], []
        for at, have, want in zip(centre, mask.shape, size):
            before = max(want - have, 0) // 2
            start = min(max(at + before - want // 2, 0), max(have - want, 0)) - before
            first, last = max(start, 0), min(start + want, have)
            source.append(slice(first, last))
            target.append(slice(first - start, last - start))
        images[(k, ..., *target)] = image[(..., *source)]
        masks[(k, *target)] = mask[tuple(source)]
    return images, masks


def _turn(x: Tensor, degrees: float, mode: str) -> Tensor:
    """x (C,X,Y,Z) turned about the third axis, beyond the border as on it."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    _, X, Y, _ = x.shape
    matrix = torch.tensor([[c, -s * X / Y, 0], [s * Y / X, c, 0]])  # of (y, x), each -1 … 1
    planes = x.permute(0, 3, 1, 2).flatten(0, 1)[None].float()  # (1,C*Z,X,Y)
    grid = F.affine_grid(matrix[None], (1, 1, X, Y), align_corners=False)
    planes = F.grid_sample(planes, grid, mode, "border", align_corners=False)
    return planes[0].unflatten(0, (len(x), -1)).permute(0, 2, 3, 1).to(x.dtype)  # (C,X,Y,Z)


def augment(
    image: Tensor, mask: Tensor, rng: np.random.Generator,
    flip=(0.0, 0.0, 0.0), rotate90=0.0, rotate=(0.0, 0.0), scale=(0.0, 0.0), shift=(0.0, 0.0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """image float32 (C,X,Y,Z), mask (X,Y,Z) -> the same, changed at random.

    Probabilities: `flip` along each axis; `rotate90`, quarter turns in the first two (half turns
    where their sides differ). Largest amount and probability: `rotate` by ± degrees about the third
    axis, `scale` of the intensities by 1 ± that, `shift` of them by ± that.
    """
    axes = [axis for axis, p in enumerate(flip) if rng.random() < p]
    image, mask = image.flip([axis + 1 for axis in axes]), mask.flip(axes)
    if rng.random() < rotate90:
        turns = int(rng.integers(1, 4)) if mask.shape[0] == mask.shape[1] else 2
        image, mask = image.rot90(turns, (1, 2)), mask.rot90(turns, (0, 1))
    if rng.random() < rotate[1]:
        degrees = rng.uniform(-rotate[0], rotate[0])
        image = _turn(image, degrees, "bilinear")
        mask = _turn(mask[None], degrees, "nearest")[0]
    if rng.random() < scale[1]:
        image = image * (1 + rng.uniform(-scale[0], scale[0]))
    if rng.random() < shift[1]:
        image = image + rng.uniform(-shift[0], shift[0])
    return image.contiguous(), mask.contiguous()


# --- prediction ----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _weights(window: tuple[int, ...], blend: str) -> Tensor:
    """How much each place in a window counts, float32 (*window)."""
    weights = torch.ones(())
    for n in window:
        x = torch.arange(n) - (n - 1) / 2
        bell = torch.exp(x.square() / (-2 * (0.125 * n) ** 2))
        weights = weights[..., None] * (bell if blend == "gaussian" else torch.ones(n))
    return weights.clamp(min=max(weights.min().item(), 1e-3))


def _starts(n: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: at equal steps, and one that ends where the axis ends."""
    step = max(1, int(window * (1 - overlap))) if n > window else window
    return [min(start, n - window) for start in range(0, n - window + step, step)]


@torch.no_grad()
def sliding_window(
    model: Callable, image: Tensor, window: Sequence[int], overlap: float = 0.5, batch: int = 4,
    blend: str = "gaussian", classes: Sequence[int] | None = None, device=None, on=None,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """image (C,*size), 2-D or 3-D -> (K,*size) float32: what the model says of windows, blended.

    model: (B,C,*window) -> (B,K',*window). overlap: 0 to < 1 of a window. blend: "gaussian" (a
    deviation of an eighth of the window) or "constant". classes: the channels that are kept, else
    all. device: where the result is, else with the image; on: where the model is, else with the
    image. An image smaller than the window has zeros around it, half on either side.
    ValueError: an unknown blend, such an overlap, a model that gives another size than the window.
    """
    if blend not in ("gaussian", "constant") or not 0 <= overlap < 1:
        raise ValueError(f"{blend}, {overlap}: blend gaussian or constant, overlap 0 to < 1")
    size, window = image.shape[1:], tuple(window)
    lack = [max(w - n, 0) for n, w in zip(size, window)]
    if any(lack):
        image = F.pad(image, [p for n in reversed(lack) for p in (n // 2, n - n // 2)])
    whole = image.shape[1:]
    device, on, result = device or image.device, on or image.device, None
    weights, total = _weights(window, blend).to(device), torch.zeros(whole, device=device)
    starts = itertools.product(*map(_starts, whole, window, itertools.repeat(overlap)))
    boxes = [tuple(slice(s, s + w) for s, w in zip(start, window)) for start in starts]
    hidden = None if progress else True
    for i in tqdm(range(0, len(boxes), batch), "windows", disable=hidden, leave=False):
        some = boxes[i : i + batch]
        out = model(torch.stack([image[(..., *box)] for box in some]).to(on))  # (B,K',*window)
        if out.shape[2:] != window:
            raise ValueError(f"windows of {window} became {tuple(out.shape[2:])}; resize them")
        out = (out if classes is None else out[:, classes]).to(device, torch.float32)
        if result is None:
            result = torch.zeros(out.shape[1], *whole, device=device)
        for box, logits in zip(some, out):
            result[(..., *box)].addcmul_(logits, weights)
            total[box].add_(weights)
    result.div_(total)
    return result[(..., *(slice(d // 2, d // 2 + n) for d, n in zip(lack, size)))]


def window_probabilities(
    model: nn.Module, image: Tensor, place: Place, overlap: float = 0.5, batch: int = 4,
    classes: Sequence[int] | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Return probabilities float32 (K,X,Y,Z) on the grid of the image's file, in RAS, on the CPU.

    image (C,x,y,z) and place: of `prepare_image`. overlap, batch: as for `sliding_window`.
    classes: of a Universal Model, the numbers of those that are wanted, counted from 0 without the
    background; None for all. progress: show a bar.
    """
    c = model.config
    device = next(model.parameters()).device
    network = model
    count = c.num_classes
    if classes is not None:
        network = partial(model, classes=classes)
        count = len(classes)

    need = 4 * count * image[0].numel()  # bytes of the logits
    free = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] // 2  # the rest is for the windows
    how = {"overlap": overlap, "batch": batch, "on": device, "progress": progress}
    how["device"] = device if need < free else "cpu"
    logits = sliding_window(network, image, c.image_size, **how).cpu()  # (K,x,y,z)

    def activation(slab: Tensor) -> Tensor:
        return model.postprocess(slab, slab.shape[1:])

    several = c.num_classes > 1 and not c.overlapping
    return restore(logits, place, activation, background=several)


# shared: evaluating
@contextmanager
def evaluating(model: nn.Module):
    """Run a block in evaluation mode and without gradients, then restore each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
# end shared


def segment(
    model: nn.Module, files, classes: Sequence[str] | None = None, overlap: float = 0.5,
    batch: int = 4,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return the probabilities and labels of a NIfTI volume on the file's own voxels, its affine.

    model: a SwinUNETR, UniversalSwinUNETR or AttentionUniversal, whose config has the spacing, the
    intensities and the window. files: one file (str or Path), 3-D or 4-D, or a list with one for
    each channel. classes: names, to find these of a Universal Model alone. overlap, batch: as for
    `sliding_window`.
    Probabilities are float32 (K,X,Y,Z) and may be a view. Labels are uint8 (X,Y,Z) of class
    indices; with one class, 1 where it is above `config.threshold`; where classes overlap
    (K,X,Y,Z), 1 or 0 for each. The affine, float64 (4,4), is the file's, corrected where its header
    contradicts itself: nibabel.Nifti1Image(labels, affine).
    Raise ValueError or FileNotFoundError, one line, for files and classes that do not fit.
    """
    c = model.config
    files = [files] if isinstance(files, str | Path) else files
    files = [Path(file) for file in files]
    numbers = None if classes is None else class_numbers(model, classes)
    image, grid = read_image(files, fill_value(model.preprocess, c.in_channels))  # (C,X,Y,Z)
    check_channels(files[0], len(image), c.in_channels)
    if c.intensity:
        say_if_not_hu(files[0], hu_facts(image))

    with evaluating(model):
        prepared, place = prepare_image(image, grid, c.spacing, model.preprocess)
        probabilities = window_probabilities(model, prepared, place, overlap, batch, numbers)

    if c.overlapping:
        labels = probabilities > c.threshold
    elif c.num_classes == 1:
        labels = probabilities[0] > c.threshold
    else:
        labels = probabilities.argmax(0)
    labels = labels.byte().numpy()
    return _stored(probabilities.numpy(), grid), _stored(labels, grid).copy(), grid.affine


def class_numbers(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Return the numbers of a Universal Model's classes, counted from 0 without the background.

    Raise ValueError, one line, for an unknown name, or a model that finds all classes at once.
    """
    if not hasattr(model, "add_class"):
        raise ValueError("classes: this model finds all of its classes at once; remove it")
    known = model.config.classes[1:]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"classes: the model has no {unknown[0]}, only {', '.join(known)}")
    return [known.index(name) for name in names]


def _stored(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Return (X,Y,Z) or (K,X,Y,Z) in RAS on the voxels of the file, a view."""
    if x.ndim == 3:
        return grid.to_stored(x)
    return np.moveaxis(grid.to_stored(np.moveaxis(x, 0, 3)), 3, 0)


def components(mask: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray] | None:
    """Bool (X,Y,Z) -> the box around it, the number of each voxel's component in it (0: none; 26
    neighbours), and the numbers of all, the largest first, with their sizes (n,2). None if empty.
    """
    from scipy import ndimage

    if not mask.any():
        return None
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    parts, n = ndimage.label(mask[box], np.ones((3, 3, 3)))
    sizes = np.bincount(parts[parts > 0], minlength=n + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    return box, parts, np.stack([order + 1, sizes[order]], 1)


def largest_components(mask: np.ndarray, most: int) -> np.ndarray:
    """Bool (X,Y,Z) -> its largest components, at most so many."""
    if (found := components(mask)) is None or len(found[2]) <= most:
        return mask
    box, parts, sizes = found
    result = np.zeros_like(mask)
    result[box] = np.isin(parts, sizes[:most, 0])
    return result


def largest_component(labels: np.ndarray) -> np.ndarray:
    """Labels uint8 (X,Y,Z) -> of each class its largest component alone."""
    from scipy import ndimage

    labels = labels.copy()
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            inside = labels[box] == k
            labels[box][inside & ~largest_components(inside, 1)] = 0
    return labels
