"""Read and write NIfTI files: voxels, label maps and the grid they lie on.

- Arrays are (X,Y,Z), in RAS: axes are flipped and permuted, never resampled, so that they grow to
  the right, front and top. Output files lie on the voxels of the image's file again.
- Voxels that are NaN or infinite are left out of statistics. They become 0 if the model treats 0 as
  background (z-scores), else the smallest value of their channel.
- The content of a file decides if it is compressed, whatever its name ends in.
- Compressed files are read to their end, so that their checksums are verified.
- Headers whose sform, qform, pixdim or unit contradict each other are corrected by fixed rules
  (`_reconcile`, `_to_millimetres`) or refused. Output files have the corrected header.
- Label maps hold whole numbers that the data set names; 255 is ignored.
- Facts that a user must know about files that are read all the same are printed, one line for all
  files together (`notices`).
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

from imaging.atomic_files import atomic_write
from imaging.files import WITH_SIMPLEITK, describe_foreign

# --- notices about files --------------------------------------------------------------------------


def name_files(files: dict[Path, str]) -> str:
    """Return the first three of {file: detail} as text, and the number of the rest."""
    names = []
    for file, detail in list(files.items())[:3]:
        names.append(f"{file} ({detail})" if detail else str(file))
    text = ", ".join(names)

    remaining = len(files) - len(names)
    if remaining:
        text += f" and {remaining} more"
    return text


class Notices:
    """Facts that a user must know about files that are read all the same.

    A fact is printed at once, or at the end of `grouped` in one line for all of its files. A
    process prints a fact about a file once, however often it reads the file.
    """

    def __init__(self):
        self.waiting = {}  # sentence -> {file: detail}
        self.known = set()  # (sentence, file)
        self.depth = 0  # of nested `grouped` blocks

    def add(self, sentence: str, file: Path, detail: str = "") -> None:
        """Add a fact about a file, with a detail that is shown in parentheses."""
        if (sentence, file) in self.known:
            return
        self.known.add((sentence, file))
        self.waiting.setdefault(sentence, {})[file] = detail
        if not self.depth:
            self.print()

    def print(self) -> None:
        """Print the waiting facts."""
        waiting = self.waiting
        self.waiting = {}
        for sentence, files in waiting.items():
            print(f"{name_files(files)}: {sentence}", flush=True)

    @contextmanager
    def grouped(self, folder: Path | None = None, becomes: Path | None = None):
        """Hold facts back until the end of the block, even if it ends with an error.

        folder: a temporary folder that will be renamed to `becomes`; its files are printed with
        their later names.
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
        """Move the files of a folder to another folder in the waiting facts."""
        for sentence, files in self.waiting.items():
            renamed = {}
            for file, detail in files.items():
                if file.is_relative_to(folder):
                    file = becomes / file.relative_to(folder)
                renamed[file] = detail
            self.waiting[sentence] = renamed


notices = Notices()

# --- compressed files ----------------------------------------------------------------------------

GZIP = b"\x1f\x8b"  # every member of a gzip file begins with it


class GzipReader(io.BufferedIOBase):
    """Forward reader of a gzip file of one or several members that verifies their checksums.

    zlib compares checksum and length of a member only when its end is read. A reader that stops
    after the last byte it needs would not notice damage, so `finish` reads the rest. Raises
    zlib.error for damaged data, EOFError for data that ends too early.
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
        """Return the next `size` bytes, or fewer at the end; all remaining ones for -1."""
        parts = []
        while size:
            part = self._decompress(size if size > 0 else 2**20)
            if not part:
                break
            parts.append(part)
            if size > 0:
                size -= len(part)
        return b"".join(parts)

    def readinto(self, buffer) -> int:
        """Fill a buffer with the next bytes and return how many there were."""
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
        """Return up to `limit` of the next bytes; none at the end."""
        while not self.finished:
            if self.inflater.eof:
                self._next_member()
                continue

            if not self.compressed:
                self.compressed = self.file.read(self.BLOCK)
            if not self.compressed:
                raise EOFError("the compressed data ends too early")

            part = self.inflater.decompress(self.compressed, limit)
            if self.inflater.eof:
                self.compressed = self.inflater.unused_data
            else:
                self.compressed = self.inflater.unconsumed_tail
            if part:
                self.position += len(part)
                return part
        return b""

    def _next_member(self) -> None:
        """Start the next member; if there is none, count the remaining bytes as trailing."""
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
    """Yield an open file, decompressed if it is gzip, and True if it is."""
    with open(path, "rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        yield (GzipReader(file) if compressed else file), compressed


# --- headers -------------------------------------------------------------------------------------

UNITS = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # of NIfTI's xyzt_units: name, mm
PLAUSIBLE = (0.05, 20.0)  # mm, shortest and longest side of a voxel
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
    """Return a spacing in mm as text: 0.8 x 0.8 x 5 mm."""
    return " x ".join(f"{float(side):.4g}" for side in spacing) + " mm"


def _norms(affine: np.ndarray) -> np.ndarray:
    """Return the spacing (3,) of an affine (4,4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def _is_bare(affine: np.ndarray) -> bool:
    """Return True for the identity up to signs: the default that nobody has set."""
    is_identity = (np.abs(affine[:3, :3]) == np.eye(3)).all()
    return bool(is_identity and not affine[:3, 3].any())


def _is_plausible(spacing: np.ndarray) -> bool:
    """Return True if all sides of a voxel, in mm, are within PLAUSIBLE."""
    low, high = PLAUSIBLE
    is_large_enough = (spacing >= low * (1 - 1e-6)).all()
    is_small_enough = (spacing <= high * (1 + 1e-6)).all()
    return bool(is_large_enough and is_small_enough)


@contextmanager
def _quiet():
    """Hide the warnings of libraries about a file; our own messages cover what matters."""
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
    """Return the NIfTI header of a file as it is stored; None if it has none.

    nibabel's own loading corrects some fields silently, such as a spacing of 0.
    """
    import nibabel

    kinds = [nibabel.Nifti1Header, nibabel.Nifti2Header]
    if PAIR.search(path.name):
        kinds = [nibabel.Nifti1Pair.header_class, nibabel.Nifti2Pair.header_class]

    with _decompressed(path) as (stream, _):
        block = stream.read(540)
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
    """Make spacing positive and qfac 1 or -1, as nifti1.h defines for other values."""
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    if header["pixdim"][0] != -1:
        header["pixdim"][0] = 1


def _set_codes(header) -> None:
    """Replace transform codes that the standard does not define by 2.

    A code names the coordinate system. Here it only matters that it is not 0, unknown.
    """
    import nibabel

    known = nibabel.nifti1.xform_codes.value_set()
    for field in ("sform_code", "qform_code"):
        if int(header[field]) not in known:
            header[field] = 2


LONGEST_QUATERNION = 1.005  # a longer one is no rounding error


def _shorten_quaternion(header) -> None:
    """Scale a quaternion that rounding made longer than 1 to a length of 1, as ITK and FSL do.

    nibabel itself accepts only what the rounding of float32 explains.
    """
    fields = ("quatern_b", "quatern_c", "quatern_d")
    values = np.array([header[field] for field in fields], np.float64)
    length = np.linalg.norm(values)
    if length**2 - 1 < header.quaternion_threshold or not length <= LONGEST_QUATERNION:
        return

    for field, value in zip(fields, values / length, strict=True):
        header[field] = value


def _check_header(path: Path, header) -> None:
    """Raise ValueError if a header does not say where the voxels lie."""
    if not header["sform_code"] and not header["qform_code"]:
        raise ValueError(
            f"{path}: has no affine (sform_code and qform_code are 0); write the right one with "
            "set_sform of nibabel"
        )
    spacing = header["pixdim"][1:4]
    if not np.isfinite(spacing).all() or not spacing.all():
        raise ValueError(
            f"{path}: its pixdim says voxels of {mm_text(spacing)}; write the right one with "
            "header.set_zooms of nibabel"
        )

    affine = header.get_sform() if header["sform_code"] else _qform(header)
    if affine is None:
        raise ValueError(
            f"{path}: its qform is no rotation (the quaternion is longer than 1); write the right "
            "one with set_qform of nibabel"
        )
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(
            f"{path}: its affine is singular, {affine[:3].tolist()}; write the right one with "
            "set_sform of nibabel"
        )


def _qform(header) -> np.ndarray | None:
    """Return the affine (4,4) of quaternion and pixdim, whatever its code; None if invalid."""
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = header.get_qform()
    except (ValueError, HeaderDataError):
        return None
    return affine if np.isfinite(affine).all() else None


def _reconcile(path: Path, header) -> None:
    """Make the sform of a header agree with qform and pixdim if that is safe.

    The sform is used if its spacing is within 1 % of pixdim, unless it is the bare 1 mm identity
    and the qform is not. Otherwise, if exactly one of the two is bare, the other one is used and
    stored as both. Raises ValueError for every other contradiction.
    """
    if not header["sform_code"]:
        return  # the spacing of the qform is pixdim
    sform = header.get_sform()
    qform = _qform(header)
    spacing = np.abs(header["pixdim"][1:4].astype(np.float64))
    sform_is_bare = _is_bare(sform)
    qform_is_bare = qform is not None and _is_bare(qform)

    norms_agree = np.abs(_norms(sform) / spacing - 1).max() <= 0.01
    qform_is_set = bool(header["qform_code"]) and qform is not None
    if norms_agree and not (sform_is_bare and qform_is_set and not qform_is_bare):
        if qform_is_set:
            sform_axes = sform[:3, :3] / _norms(sform)
            qform_axes = qform[:3, :3] / spacing
            if np.abs(sform_axes - qform_axes).max() > 0.01:
                notices.add(OTHER_AXES, path)
        return

    if sform_is_bare == qform_is_bare or qform is None:
        raise ValueError(
            f"{path}: its sform says voxels of {mm_text(_norms(sform))}, its pixdim "
            f"{mm_text(spacing)}; write the right one with set_sform and set_qform of nibabel"
        )
    right = qform if sform_is_bare else sform
    header.set_sform(right, int(header["sform_code"]))
    header.set_qform(right, int(header["qform_code"]))
    notices.add(BY_QFORM if sform_is_bare else BY_SFORM, path, mm_text(_norms(right)))


def _to_millimetres(path: Path, header) -> None:
    """Convert a header in metres or microns to mm. Raises ValueError if that is implausible."""
    spacing = _norms(header.get_best_affine())
    name, factor = UNITS.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    if not name:
        if not _is_plausible(spacing):
            low, high = PLAUSIBLE
            sentence = f"voxels outside of {low:g} to {high:g} mm; is the header's unit right?"
            notices.add(sentence, path, mm_text(spacing))
        return
    if not _is_plausible(spacing * factor):
        raise ValueError(
            f"{path}: its unit is the {name}, which makes voxels of {mm_text(spacing * factor)}; "
            "correct it with header.set_xyzt_units of nibabel"
        )

    header["pixdim"][1:4] *= factor
    for field in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[field] = header[field] * factor
    header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2  # mm
    sentence = f"the header's unit is the {name}; read and written in mm"
    notices.add(sentence, path, mm_text(spacing * factor))


# --- grids ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """The position of a file's voxels in the patient's space."""

    file: Path
    affine: np.ndarray  # (4,4), stored indices -> mm
    shape: tuple[int, ...]  # as stored
    channels: int
    header: bytes  # NIfTI: both transforms and their codes, units; corrected if it was wrong

    @cached_property
    def axes(self) -> np.ndarray:
        """Return the RAS axis and the direction, 1 or -1, of each stored axis: int (3,2)."""
        import nibabel

        return nibabel.io_orientation(self.affine).astype(int)

    @property
    def size(self) -> tuple[int, ...]:
        """Return X, Y and Z in RAS."""
        return tuple(self.shape[i] for i in self.axes[:, 0].argsort())

    @property
    def spacing(self) -> tuple[float, ...]:
        """Return the sides of a voxel in mm along X, Y and Z in RAS."""
        return tuple(np.linalg.norm(self.ras_affine[:3, :3], axis=0).tolist())

    @property
    def ras_affine(self) -> np.ndarray:
        """Return the affine (4,4) of indices in RAS -> mm."""
        import nibabel

        return self.affine @ nibabel.orientations.inv_ornt_aff(self.axes, self.shape)

    def to_ras(self, x: np.ndarray) -> np.ndarray:
        """Turn stored axes to RAS: (X',Y',Z',…) -> (X,Y,Z,…), a view."""
        x = np.flip(x, np.flatnonzero(self.axes[:, 1] < 0))
        return x.transpose(*self.axes[:, 0].argsort(), *range(3, x.ndim))  # (X,Y,Z,…)

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """Turn RAS to the stored axes: (X,Y,Z,…) -> (X',Y',Z',…), a view."""
        x = x.transpose(*self.axes[:, 0], *range(3, x.ndim))  # (X',Y',Z',…)
        return np.flip(x, np.flatnonzero(self.axes[:, 1] < 0))


OFF_GRID = 0.01  # of a voxel; less is rounding, which resampling would not improve
NEAR_GRID = f"less than {OFF_GRID:g} of a voxel off the grid of its image, and taken to lie on it"


def grid_distance(grid: Grid, other: Grid) -> float:
    """Return the distance of two grids of the same size, in voxels of `other`.

    This is the largest distance along an axis between the positions of one voxel. It is reached at
    a corner of the grid.
    """
    X, Y, Z = other.size
    corners = np.array(list(itertools.product((0, X - 1), (0, Y - 1), (0, Z - 1))))  # (8,3)
    corners = np.hstack([corners, np.ones((8, 1))])  # (8,4)
    positions = grid.ras_affine @ corners.T  # mm, (4,8)
    indices = np.linalg.solve(other.ras_affine, positions)  # (4,8)
    return float(np.abs(indices - corners.T).max())


def check_grid(grid: Grid, other: Grid) -> None:
    """Raise ValueError if the voxels of two files do not lie at the same positions.

    Less than OFF_GRID of a voxel is accepted, with a notice if it is more than rounding.
    """
    if grid.size != other.size:
        raise ValueError(f"{grid.file}: {grid.size} voxels, but {other.file} has {other.size}")

    difference = np.abs(grid.ras_affine - other.ras_affine).max()
    distance = grid_distance(grid, other)
    if not distance < OFF_GRID:
        raise ValueError(
            f"{grid.file}: its affine is {difference:.3g} off {other.file}'s, {distance:.2g} "
            "voxels at the corners; resample it to that grid, or copy that affine if it is the "
            "right one"
        )
    if difference > 1e-3:  # mm
        notices.add(NEAR_GRID, grid.file)


# --- opening files --------------------------------------------------------------------------------

PAIR = re.compile(r"\.(hdr|img)(\.gz)?$", re.IGNORECASE)  # a header and a file of voxels
NOT_VOLUMES = [  # first bytes, what the file is and what to do
    ((b"PK\3\4",), "is a ZIP archive, not NIfTI; unpack it"),
    (
        (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM"),
        "is an image, not NIfTI; a model of images takes it",
    ),
]


def other_volume_format(path: Path) -> str | None:
    """Return a message about a file of a known format other than NIfTI, else None.

    It names the file, the format and what to do.
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
    for first_bytes, description in NOT_VOLUMES:
        if block.startswith(first_bytes):
            return f"{path}: {description}"
    sizes = [int.from_bytes(block[:4], order) for order in ("little", "big")]
    if len(block) >= 348 and 348 in sizes:
        return f"{path}: Analyze 7.5 is not read; {WITH_SIMPLEITK}"
    if PAIR.search(path.name):  # the ending says nothing
        return None
    return describe_foreign(path, block)


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a volume: one, or a header .hdr and its voxels .img.

    Raises FileNotFoundError if one of the two is missing.
    """
    ending = PAIR.search(path.name)
    if not ending:
        return (path,)

    stem = path.name[: ending.start()].lower()
    halves = {}  # hdr or img -> file
    for file in path.parent.iterdir():
        match = PAIR.search(file.name)
        if match and file.name[: match.start()].lower() == stem:
            halves.setdefault(match[1].lower(), file)
    halves[ending[1].lower()] = path

    for kind in ("hdr", "img"):
        if kind not in halves:
            raise FileNotFoundError(f"{path}: its other half, .{kind}, is not beside it")
    return halves["hdr"], halves["img"]


@contextmanager
def _readable(path: Path):
    """Turn the errors of nibabel about a damaged file into a ValueError of one line."""
    import nibabel

    wrong_header = nibabel.spatialimages.HeaderDataError
    try:
        with _quiet():
            yield
    except (wrong_header, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        if getattr(error, "errno", None):  # a fault of the disk, not of the file
            raise OSError(f"{path}: {error.strerror}") from None

        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, wrong_header):
            raise ValueError(f"{path}: its header is wrong ({reason}); write it again") from None
        if isinstance(error, zlib.error):
            reason = f"its compressed data is damaged: {reason.rpartition(': ')[2]}"
        raise ValueError(f"{path}: not readable as NIfTI ({reason}); replace the file") from None


def _open(path: Path):
    """Return nibabel's proxy of a file's voxels, not yet read, and its Grid.

    Raises as `read_grid` does. If a header cannot be right, the error is about damage of the file
    if there is any.
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
    """Return the NIfTI header of a file. Raises ValueError if it has none."""
    with _readable(path):
        header = _read_header(path)
    if header is not None:
        return header

    foreign = other_volume_format(path)
    if foreign:
        raise ValueError(foreign)
    reason = "it has no such header" if path.stat().st_size else "it is empty, 0 bytes"
    raise ValueError(f"{path}: not readable as NIfTI ({reason}); replace the file")


def _open_by_header(path: Path):
    """Return the same as `_open`, reading no more than the header."""
    from nibabel.arrayproxy import ArrayProxy

    if path.name.startswith("._"):
        raise ValueError(f"{path}: not a volume, but a file that macOS creates; delete it")
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
    """Return X, Y, Z and the number of channels of a stored shape X,Y,Z; X,Y,Z,C; or X,Y,Z,1,C.

    Raises ValueError for any other shape.
    """
    if len(shape) == 2:
        raise ValueError(
            f"{path}: has 2 axes, {shape}: an image rather than a volume; it needs X,Y,Z or "
            "X,Y,Z,channels"
        )
    channel_axes = [n for n in shape[3:] if n != 1]  # time, channels and so on
    if len(shape) < 3 or len(channel_axes) > 1:
        raise ValueError(
            f"{path}: has {len(shape)} axes, {shape}; it needs X,Y,Z or X,Y,Z,channels"
        )
    if min(shape) < 1:
        raise ValueError(f"{path}: its header says {shape} voxels; replace the file")

    channels = channel_axes[0] if channel_axes else 1
    return (*shape[:3], channels)


def _voxels_end(stored) -> int:
    """Return the end of the voxels in a file, in bytes of its uncompressed content."""
    return stored.offset + math.prod(stored.shape) * stored.dtype.itemsize


def _check_size(path: Path, stored) -> None:
    """Raise ValueError if a file is too small for the voxels of its header."""
    file = Path(stored.file_like)
    size = file.stat().st_size
    need = _voxels_end(stored)
    with _readable(path), _decompressed(file) as (_, compressed):
        if stored.offset < 0:
            raise EOFError("its voxels begin before the file does")
        if compressed and need > 1100 * size:  # gzip compresses to a thousandth at most
            raise EOFError(f"{size:,} bytes cannot hold {need:,}")
        if not compressed and need > size:
            raise EOFError(f"{size:,} bytes of {need:,}")


# --- reading --------------------------------------------------------------------------------------


def _read_voxels(stored, path: Path, dtype=None) -> np.ndarray:
    """Return the voxels of an opened file as stored, scaled by its header.

    A compressed file is read to its end in the same pass, which verifies its checksums. Raises
    ValueError if it is damaged.
    """
    from nibabel.arrayproxy import ArrayProxy

    spec = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
    with _readable(path), _decompressed(Path(stored.file_like)) as (stream, compressed):
        voxels = np.asanyarray(ArrayProxy(stream, spec, mmap=not compressed), dtype)
        if compressed:
            _finish(path, stream)
    return voxels


def _finish(path: Path, stream: GzipReader) -> None:
    """Read the rest of a compressed file to verify it; add a notice about bytes after its end."""
    stream.finish()
    if stream.trailing:
        sentence = "bytes after the end of the compressed data are ignored; its checksum is right"
        notices.add(sentence, path, f"{stream.trailing:,}")


def check_whole(path: Path) -> None:
    """Raise ValueError if a file is damaged or holds fewer voxels than its header says.

    The checksums of a compressed file are verified; it is read a block at a time.
    """
    path = Path(path)
    stored, _ = _open(path)  # checks the size of uncompressed files

    with _readable(path), _decompressed(Path(stored.file_like)) as (stream, compressed):
        if compressed:
            _finish(path, stream)
            if stream.tell() < _voxels_end(stored):
                raise EOFError(f"{stream.tell():,} bytes of {_voxels_end(stored):,}")


def read_grid(path: Path) -> Grid:
    """Return the grid of a file, reading only its header.

    Raises FileNotFoundError, or ValueError for a file that is not NIfTI, damaged, not 3-D or 4-D,
    or without an affine.
    """
    _, grid = _open(path)
    return grid


def read_volume(paths: Path | Sequence[Path], fill: float | None = None) -> tuple[np.ndarray, Grid]:
    """Read one file (X,Y,Z) or (X,Y,Z,C), or several on one grid, as float32 (C,X,Y,Z) in RAS.

    Returns the volume and its grid. fill: the value that replaces NaN and infinite voxels; None for
    the smallest value of their channel. Raises as `read_grid` and `check_grid` do, for a damaged
    file, and for a channel without a finite number.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    opened = [_open(path) for path in paths]
    _, grid = opened[0]
    channels = sum(file_grid.channels for _, file_grid in opened)
    image = np.empty((channels, *grid.size), np.float32)  # (C,X,Y,Z)

    start = 0
    for stored, file_grid in opened:
        voxels = _read_voxels(stored, file_grid.file, np.float32)
        if file_grid is not grid:
            check_grid(file_grid, grid)
        voxels = voxels.reshape(*file_grid.shape, file_grid.channels)  # (X',Y',Z',C')
        end = start + file_grid.channels
        image[start:end] = np.moveaxis(file_grid.to_ras(voxels), 3, 0)  # (C',X,Y,Z)
        _replace_non_finite(image[start:end], file_grid.file, fill)
        start = end
    return image, grid


def _replace_non_finite(image: np.ndarray, file: Path, fill: float | None) -> None:
    """Replace NaN and infinite voxels of the channels (C,X,Y,Z) of a file in place.

    fill: see `read_volume`. Raises ValueError for a channel without a finite number.
    """
    replaced = 0
    for channel in image:
        bad = ~np.isfinite(channel)  # (X,Y,Z)
        if bad.all():
            raise ValueError(f"{file}: a channel has no finite number; leave it out")
        if bad.any():
            channel[bad] = channel[~bad].min() if fill is None else fill
            replaced += int(bad.sum())

    if replaced:
        become = "the smallest value of their channel" if fill is None else f"{fill:g}"
        notices.add(f"NaN or infinite voxels become {become}", file, f"{replaced:,} voxels")


def check_channels(path: Path, count: int, channels: int) -> None:
    """Raise ValueError if an image has another number of channels than the model takes."""
    if count == channels:
        return
    hint = "choose a model or files that fit"
    if count < channels:
        hint = (
            "name the files of a case CASE_0000.nii.gz, CASE_0001.nii.gz, … in the order of the "
            "model's channels (of BraTS: FLAIR, T1ce, T1, T2)"
        )
    raise ValueError(f"{path}: {count} channels, the model takes {channels}; {hint}")


def read_labels(
    path: Path, grid: Grid, numbers: int | Sequence[int], unnamed: Sequence[int] = ()
) -> np.ndarray:
    """Read a label map as class indices, uint8 (X,Y,Z) in RAS; 255, which is ignored, stays 255.

    grid: that of its image. numbers: the numbers of class 0, 1, … in the file, or the number of
    classes. unnamed: further numbers that are read as class 0. Raises ValueError for another grid,
    for numbers that are not among them, and for fractions.
    """
    numbers = list(range(numbers)) if isinstance(numbers, int) else list(numbers)
    are_possible = all(0 <= number < 2**16 for number in (*numbers, *unnamed))
    if len(numbers) > 254 or not are_possible:
        raise ValueError(
            f"{path}: no more than 254 classes, with numbers up to 65535, are possible"
        )

    stored, file_grid = _open(path)
    voxels = _read_voxels(stored, file_grid.file)  # first, as damage may be that of the header
    check_grid(file_grid, grid)
    if file_grid.channels > 1:
        raise ValueError(
            f"{path}: {file_grid.channels} channels; a label map has one, of class numbers"
        )
    voxels = voxels.reshape(file_grid.shape)  # (X',Y',Z')
    if voxels.dtype.kind == "f":
        voxels = _whole_numbers(voxels, path)

    table = np.full(2**16, 254, np.uint8)  # number in the file -> class index; 254: not named
    table[255] = 255
    table[[*numbers, *unnamed]] = [*range(len(numbers)), *[0] * len(unnamed)]
    unknown = [end for end in (voxels.min(), voxels.max()) if not 0 <= end < 2**16]
    if not unknown:
        labels = table[voxels.astype(np.uint16)]
        unknown = voxels[labels == 254]
    if len(unknown):
        raise ValueError(
            f"{path}: holds {int(unknown[0])}, but the classes are {numbers}; name it in "
            "dataset.json or correct the labels"
        )
    return np.ascontiguousarray(file_grid.to_ras(labels))


def _whole_numbers(voxels: np.ndarray, path: Path) -> np.ndarray:
    """Round the floats of a label map. Raises ValueError for fractions, NaN and infinity.

    Scaled by a header, 1 may be read as 0.9999999998.
    """
    rounded = np.rint(voxels)
    with np.errstate(invalid="ignore"):
        fractions = voxels[~(abs(voxels - rounded) < 1e-3)]  # also NaN and infinity
    if len(fractions):
        raise ValueError(
            f"{path}: holds {fractions[0]:g}, which is not a whole number; resample labels by "
            "nearest"
        )
    return rounded


# --- writing --------------------------------------------------------------------------------------


def write(path: Path, volume: np.ndarray, grid: Grid) -> None:
    """Write uint8 labels or a float32 volume, (X,Y,Z) in RAS, on the voxels of the grid's file.

    The folder of `path` is made if it is missing. Raises ValueError if `path` does not end in .nii
    or .nii.gz.
    """
    import nibabel

    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a volume must be named .nii or .nii.gz")

    kind = nibabel.Nifti1Image if len(grid.header) == 348 else nibabel.Nifti2Image
    header = kind.header_class(grid.header, check=False)
    header.set_data_dtype(volume.dtype)
    header["cal_min"] = 0  # without the grey window of the image, in which labels are black
    header["cal_max"] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, keep_ending=True) as part, _quiet():
        kind(grid.to_stored(volume), grid.affine, header).to_filename(part)
