"""Volumes in NIfTI files -> samples, prepared once into files that all workers map; crops of them
to train on, sliding windows, and the way back to the voxels of the file.

How files are read
- Axes are turned and permuted, never resampled, so that they grow to the right, front and top
  (RAS); what is written lies on the voxels of the image's file again. Arrays are (X,Y,Z).
- What is not a finite number becomes the smallest value of its channel, and that is printed.
- Label maps hold whole numbers that the data set names; 255: the voxel does not count.

A sample is a dict. On the prepared grid, cut to the box of what is not 0, `image` float32
(C,x,y,z), `mask` uint8 (x,y,z), and `voxels`, where each class is (for `random_crops`). On the
file's grid in RAS `truth` uint8 (X,Y,Z), `size`, `spacing` in mm, `affine`. And `place`, the way
from one to the other (for `restore`), `grid` (for `write`), `prompt` "", `name`, `file`, `classes`,
`regions`, `group`, `dataset`.
"""

import hashlib
import itertools
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie."""

    file: Path
    affine: np.ndarray  # (4,4), stored indices -> mm
    shape: tuple[int, ...]  # as stored
    channels: int
    header: bytes  # of NIfTI: both transforms and their codes, units

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
        """(X,Y,Z) -> stored (X',Y',Z'), a view."""
        return np.flip(x.transpose(self.axes[:, 0]), np.flatnonzero(self.axes[:, 1] < 0))


@contextmanager
def _readable(path: Path):
    """Turns what nibabel raises of a damaged file into a ValueError of one line."""
    import nibabel

    damage = nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError
    try:
        yield
    except (*damage, OSError, EOFError, ValueError, zlib.error) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not readable as NIfTI ({why}); replace the file") from None


def _open(path: Path):
    """A file -> nibabel's image, voxels not yet read, and its Grid; errors as of `read_grid`."""
    import nibabel

    path = Path(path)
    if path.name.startswith("._"):
        raise ValueError(f"{path}: no volume, but what macOS leaves beside one; delete it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with _readable(path):
        file = nibabel.load(path)
    kind, shape, affine, hint = type(file).__name__, file.shape, file.affine, "set_sform of nibabel"
    if not kind.startswith("Nifti"):
        raise ValueError(f"{path}: holds {kind}, not NIfTI; convert it to .nii.gz")
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"{path}: has {len(shape)} axes, {shape}; it needs X,Y,Z or X,Y,Z,channels"
        )
    if file.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path}: holds {file.get_data_dtype()}; save it as integers or floats")
    if not file.header["sform_code"] and not file.header["qform_code"]:
        codes = "sform_code and qform_code are 0"
        raise ValueError(f"{path}: has no affine ({codes}); write the right one with {hint}")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        singular = f"its affine is singular, {affine[:3].tolist()}"
        raise ValueError(f"{path}: {singular}; write the right one with {hint}")
    channels = shape[3] if len(shape) == 4 else 1
    return file, Grid(path, affine, tuple(shape[:3]), channels, file.header.binaryblock)


def read_grid(path: Path) -> Grid:
    """The grid of a file, of which only the header is read.

    FileNotFoundError, ValueError, one line: not NIfTI, damaged, not 3-D or 4-D, without an affine.
    """
    return _open(path)[1]


def check_grid(grid: Grid, other: Grid) -> None:
    """ValueError, one line, if the voxels of two files do not lie at the same places."""
    if grid.size != other.size:
        raise ValueError(f"{grid.file}: {grid.size} voxels, but {other.file} has {other.size}")
    if (away := np.abs(grid.ras_affine - other.ras_affine).max()) > 1e-3:
        hint = "resample it to that grid, or copy that affine if it is the right one"
        raise ValueError(f"{grid.file}: its affine is {away:.3g} off {other.file}'s; {hint}")


def read_image(paths: Path | Sequence[Path]) -> tuple[np.ndarray, Grid]:
    """One file (X,Y,Z) or (X,Y,Z,C), or several on one grid -> float32 (C,X,Y,Z) in RAS, its grid.

    Errors as of `read_grid` and `check_grid`, or a channel without a finite number.
    """
    opened = [_open(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    grid = opened[0][1]
    image = np.empty((sum(own.channels for _, own in opened), *grid.size), np.float32)
    channels = iter(image)
    for file, own in opened:
        check_grid(own, grid)
        with _readable(own.file):
            stored = file.get_fdata(dtype=np.float32, caching="unchanged")
        stored = stored.reshape(*own.shape, own.channels)
        for x, channel in zip(np.moveaxis(own.to_ras(stored), 3, 0), channels):
            channel[:] = x
            bad = ~np.isfinite(channel)
            if bad.all():
                raise ValueError(f"{own.file}: a channel has no finite number; replace the file")
            if bad.any():
                channel[bad] = low = channel[~bad].min()
                print(f"{own.file}: {bad.sum()} voxels are not finite; read as {low:g}")
    return image, grid


def check_channels(path: Path, have: int, channels: int) -> None:
    """ValueError, one line, if an image has not as many channels as the model takes."""
    if have != channels:
        told = f"{have} channels, the model takes {channels}"
        raise ValueError(f"{path}: {told}; choose a model or files that fit")


def read_labels(
    path: Path, grid: Grid, numbers: int | Sequence[int], unnamed: Sequence[int] = ()
) -> np.ndarray:
    """A label map -> uint8 (X,Y,Z) in RAS of class numbers; 255 is kept, it does not count.

    grid: its image's. numbers: those of class 0, 1, … in the file, or how many classes there are;
    `unnamed` ones are read as the first.
    ValueError, one line: another grid, a number that is not among them or not whole.
    """
    numbers = list(range(numbers)) if isinstance(numbers, int) else list(numbers)
    if len(numbers) > 254 or not {*numbers, *unnamed} <= {*range(2**16)}:
        raise ValueError(
            f"{path}: no more than 254 classes, with numbers up to 65535, are possible"
        )
    file, own = _open(path)
    check_grid(own, grid)
    if own.channels > 1:
        raise ValueError(f"{path}: {own.channels} channels; a label map has one, of class numbers")
    with _readable(path):
        x = np.asanyarray(file.dataobj).reshape(own.shape)
    if x.dtype.kind == "f":  # scaled by a header, 1 may be read as 0.9999999998
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


@contextmanager
def _whole_file(path: Path):
    """Yields a temporary name beside `path`; what is written there then takes the path's place."""
    part = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # containers share process ids
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, volume: np.ndarray, grid: Grid) -> None:
    """uint8 labels or float32 (X,Y,Z) in RAS -> a NIfTI file on the voxels of the image's file.

    path: its folder is made; ValueError if it does not end in .nii or .nii.gz.
    """
    import nibabel

    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a volume must be named .nii or .nii.gz")
    kind = nibabel.Nifti1Image if len(grid.header) == 348 else nibabel.Nifti2Image
    header = kind.header_class(grid.header)
    header.set_data_dtype(volume.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's grey window, in which labels are black
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole_file(path) as part:
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


def _settings(spacing, preprocess: Callable, channels: int) -> bytes:
    """What prepared voxels depend on besides the files; of `preprocess` what it makes of a probe,
    so that settings which do not matter to it do not count."""
    x = torch.linspace(-5, 5, channels * 16**3, dtype=torch.float64)
    probe = x.sign() * (10 ** x.abs() - 1)  # -1e5 … 1e5, finer around 0
    probe[::5] = 0
    done = preprocess(probe.float().reshape(channels, 16, 16, 16)).float()
    rules = "rules 2"  # raise the number when the way of preparing changes
    return repr((rules, [float(mm) for mm in spacing])).encode() + done.numpy().tobytes()


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
        digests = map(_hash, (entry.image, *entry.more, entry.mask))
        content = b"".join((*digests, repr((self._numbers(i), entry.unnamed)).encode(), settings))
        return cache / hashlib.sha256(content).hexdigest()[:24]

    def _prepare(self, i: int, stem: Path, spacing, preprocess: Callable) -> None:
        """Writes STEM.image.npy, .mask.npy, .truth.npy, .voxels.npy and, last, .npz."""
        entry, numbers = self.entries[i], self._numbers(i)
        image, grid = read_image((entry.image, *entry.more))
        truth = read_labels(entry.mask, grid, numbers, entry.unnamed)
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
            with _whole_file(Path(f"{stem}.{name}.npy")) as part, open(part, "wb") as file:
                np.save(file, np.ascontiguousarray(x))
        with _whole_file(Path(f"{stem}.npz")) as part, open(part, "wb") as file:
            np.savez(file, offsets=offsets, **vars(place))

    def prepared(self, spacing, preprocess: Callable, channels: int, cache: Path) -> "VolumeSet":
        """The same volumes at `spacing` in mm and as `preprocess`, (C,x,y,z) -> the same shape,
        makes them; written into the folder `cache` once for their content and these settings.

        ValueError, OSError, one line: as reading raises them, another number of channels, label
        maps that are all empty, a full disk.
        """
        cache = Path(cache)
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
        for i in tqdm(todo, desc="prepare", unit="volume", disable=None, leave=False):
            self._prepare(i, stems[i], spacing, preprocess)
            with _whole_file(Path(f"{stems[i]}.crc")) as part:
                part.write_bytes(checksums([Path(f"{stems[i]}{end}") for end in PREPARED]))
        done = VolumeSet(self.entries, self.grids, stems, self.partial)
        for root in {entry.root for entry in self.entries}:
            ours = [i for i, entry in enumerate(self.entries) if entry.root == root]
            if not any(done._index(i)["offsets"][-1] for i in ours):
                one = self.entries[ours[0]].mask
                raise ValueError(f"{root}: all {len(ours)} label maps are empty, {one} for one")
        return done

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
        with np.load(f"{self.stems[i]}.npz") as file:
            return dict(file)

    def sample(self, i: int, kind: str = "", rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; its voxels are read when they are used.

        kind and rng, of prompts, are there as `data.Dataset.sample` has them.
        """
        entry, grid, index = self.entries[i], self.grids[i], self._index(i)
        sample, offsets = {}, index.pop("offsets")
        for name in ("image", "mask", "truth", "voxels"):
            # copied on write: the files stay as they are, whatever becomes of the tensors
            array = np.load(f"{self.stems[i]}.{name}.npy", mmap_mode="c")
            sample[name] = torch.from_numpy(array)
        sample["voxels"] = sample["voxels"], offsets
        sample["place"] = Place(**{name: tuple(x.tolist()) for name, x in index.items()})
        sample |= {"size": grid.size, "spacing": grid.spacing, "affine": grid.ras_affine}
        sample |= {"grid": grid, "prompt": "", "name": entry.name, "file": entry.image}
        sample |= {"classes": entry.classes, "regions": entry.regions, "group": entry.group}
        return sample | {"dataset": entry.root.name}

    def grey(self, i: int, preprocess: Callable) -> np.ndarray:
        """`grey` of the image of entry i."""
        entry = self.entries[i]
        return grey(read_image((entry.image, *entry.more))[0], preprocess)


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
