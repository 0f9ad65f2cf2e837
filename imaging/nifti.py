"""Read and write NIfTI files: voxels, labels and the grid they lie on.

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
"""

import io
import itertools
import math
import re
import warnings
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from imaging.atomic_files import whole_file
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
    for field, value in zip(fields, values / length, strict=True):
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


def other_volume_format(path: Path) -> str | None:
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
    foreign = other_volume_format(path)
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
NEAR_GRID = f"less than {OFF_GRID:g} of a voxel off the grid of its image, and taken to lie on it"


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


def read_volume(paths: Path | Sequence[Path], fill: float | None = None) -> tuple[np.ndarray, Grid]:
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
        for x, channel in zip(np.moveaxis(own.to_ras(voxels), 3, 0), channels, strict=False):
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
