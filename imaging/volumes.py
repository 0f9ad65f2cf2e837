"""Volumes as the models see them, and predictions on the voxels of the file (NIfTI: nifti.py).

Each volume is prepared once: turned to RAS, resampled, preprocessed, cut to its content, and
written to files that all processes map into memory. Training takes random crops of it; a prediction
slides windows over all of it.

A sample is a dict. On the prepared grid, cut to the box of the voxels that are not 0, it holds
`image` float32 (C,x,y,z), `mask` uint8 (x,y,z) and `voxels`, the positions of each class (for
`random_crops`). On the grid of the file, in RAS, it holds `truth` uint8 (X,Y,Z), `size`, `spacing`
in mm and `affine`. `place` leads from one grid to the other (for `restore`), `grid` back to the
file (for `nifti.write`). The rest: `prompt` "", `name`, `file`, `classes`, `regions`, `group`,
`dataset`.
"""

import hashlib
import itertools
import math
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from imaging.atomic_files import atomic_write, checksums, is_intact, remove_leftovers
from imaging.nifti import (
    Grid,
    check_channels,
    check_grid,
    files_of,
    mm_text,
    name_files,
    notices,
    read_grid,
    read_labels,
    read_volume,
)


def _probe(preprocess: Callable, channels: int) -> tuple[Tensor, Tensor]:
    """Return values of -1e5 to 1e5, finer around 0, and what `preprocess` makes of them.

    Both (channels,16,16,16) float32.
    """
    x = torch.linspace(-5, 5, channels * 16**3, dtype=torch.float64)
    values = x.sign() * (10 ** x.abs() - 1)
    values[::5] = 0
    values = values.float().reshape(channels, 16, 16, 16)
    return values, preprocess(values).float()


def fill_value(preprocess: Callable, channels: int) -> float | None:
    """Return the value that replaces NaN and infinite voxels: the `fill` of `read_volume`.

    0 if `preprocess` maps 0 to 0, as z-scores of the other voxels do: such voxels then count
    neither for the mean nor for the deviation, and are 0 afterwards. Else None.
    """
    values, outputs = _probe(preprocess, channels)
    keeps_zero = (outputs[values == 0] == 0).all()
    return 0.0 if keeps_zero else None


# --- from the grid of the file to the prepared grid, and back -------------------------------------


def resampled_size(size, spacing_in, spacing_out) -> tuple[int, ...]:
    """Return the number of voxels along each axis at another spacing.

    The first voxel keeps its position; the last comes as close to its old position as it can.
    """
    result = []
    for n, s_in, s_out in zip(size, spacing_in, spacing_out, strict=True):
        result.append(round((n - 1) * s_in / s_out + 1))
    return tuple(result)


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Return the given positions of x along an axis."""
    index = index.to(x.device)
    if axis < x.ndim - 1:
        return x.index_select(axis, index)
    return x.gather(axis, index.expand(*x.shape[:-1], -1))  # five times faster on the last axis


def _interpolate(x: Tensor, axis: int, position: Tensor, nearest: bool = False) -> Tensor:
    """Return x at float64 positions along an axis: linear or nearest, clamped at the border."""
    n = x.shape[axis]
    if torch.equal(position, torch.arange(n, dtype=torch.float64)):
        return x

    position = position.clamp(0, n - 1)
    if nearest:
        return _take(x, axis, position.round().long())

    low = position.floor().long()
    weight = (position - low).to(x)
    weight = weight.reshape(-1, *[1] * (x.ndim - axis - 1))  # broadcasts along the later axes
    at_low = _take(x, axis, low)
    at_high = _take(x, axis, (low + 1).clamp(max=n - 1))
    return at_low.lerp_(at_high, weight)


def _interpolate_all(x: Tensor, positions: Sequence[Tensor], nearest: bool = False) -> Tensor:
    """Return x (C,X,Y,Z) at positions along X, Y and Z.

    The axis that shrinks most goes first, so that intermediate results are small.
    """
    growth = []
    for position, n in zip(positions, x.shape[1:], strict=True):
        growth.append(len(position) / n)
    for axis in np.argsort(growth, kind="stable").tolist():
        x = _interpolate(x, axis + 1, positions[axis], nearest)
    return x


def resample(x: Tensor, size, ratio, nearest: bool = False) -> Tensor:
    """Return x (C,X,Y,Z) as (C,*size): index j of an axis is x at j * ratio, clamped at the border.

    Linear, or `nearest` for labels, as MONAI's Spacing does it. Where nearest falls exactly between
    two source voxels, libraries differ by one source voxel.
    """
    positions = []
    for n, step in zip(size, ratio, strict=True):
        positions.append(torch.arange(n, dtype=torch.float64) * step)
    return _interpolate_all(x, positions, nearest)


@dataclass(frozen=True)
class Placement:
    """The position of a prepared image in the volume of its file."""

    size: tuple[int, ...]  # of the file's volume in RAS, (X,Y,Z)
    ratio: tuple[float, ...]  # prepared spacing / the file's spacing
    full: tuple[int, ...]  # size of the whole volume at the prepared spacing
    start: tuple[int, ...]  # of the box that was cut out of it
    stop: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.start, self.stop))


def _bounding_box(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and stop along each axis of the True voxels of a mask (x,y,z).

    They are those of the whole mask if it has no True voxel.
    """
    along_x = mask.any(2).any(1)  # (x,)
    along_y = mask.any(2).any(0)  # (y,)
    along_z = mask.any(1).any(0)  # (z,)

    start = []
    stop = []
    for is_inside in (along_x, along_y, along_z):
        positions = is_inside.nonzero().flatten().tolist() or range(len(is_inside))
        start.append(positions[0])
        stop.append(positions[-1] + 1)
    return tuple(start), tuple(stop)


def prepare_image(
    image: np.ndarray, grid: Grid, spacing, preprocess: Callable
) -> tuple[Tensor, Placement]:
    """Resample and preprocess an image, and cut it to the box of the voxels that are not 0.

    image float32 (C,X,Y,Z) in RAS -> float32 (C,x,y,z) at `spacing` in mm, and its placement in
    the file. A voxel outside the box is 0 in all channels; if all voxels are 0, nothing is cut off.
    """
    is_near = np.abs(np.subtract(spacing, grid.spacing)) < 1e-3  # mm; MONAI does not resample these
    spacing = np.where(is_near, grid.spacing, spacing).tolist()
    full = resampled_size(grid.size, grid.spacing, spacing)
    ratio = tuple(b / a for a, b in zip(grid.spacing, spacing, strict=True))
    x = preprocess(resample(torch.from_numpy(image), full, ratio)).float()

    start, stop = _bounding_box((x != 0).any(0))
    placement = Placement(grid.size, ratio, full, start, stop)
    return x[(..., *placement.box)], placement


def _covered_positions(placement: Placement, axis: int, length: int) -> tuple[int, Tensor]:
    """Return the voxels of the file that a prepared image covers along an axis.

    length: of the prepared image. Returns the index of the first one, and the float64 position of
    each in the prepared image, up to half a voxel beyond its ends.
    """
    position = torch.arange(placement.size[axis], dtype=torch.float64) / placement.ratio[axis]
    position = position.clamp(max=placement.full[axis] - 1) - placement.start[axis]
    is_covered = (position >= -0.5) & (position <= length - 0.5)
    covered = is_covered.nonzero().flatten()
    first = covered[0].item() if len(covered) else 0
    return first, position[covered]


def restore(logits: Tensor, placement: Placement, activation: Callable, background=None) -> Tensor:
    """Return the probabilities (K,X,Y,Z) on the grid of the file, in RAS.

    logits (K,x,y,z): of a prepared image. They are interpolated, then `activation` maps (K,n,Y,Z)
    to probabilities, a few rows at a time. Outside the box all probabilities are 0, except that
    class 0, if it is the `background` (default: if there are several classes), is 1.
    """
    K = len(logits)
    if background is None:
        background = K > 1
    result = logits.new_zeros(K, *placement.size)  # (K,X,Y,Z)
    if background:
        result[0] = 1

    firsts = []
    positions = []
    for axis in range(3):
        first, covered = _covered_positions(placement, axis, logits.shape[axis + 1])
        if not len(covered):  # a box so thin that it lies between the file's voxels
            return result
        firsts.append(first)
        positions.append(covered)
    x0, y0, z0 = firsts
    along_x, along_y, along_z = positions
    y = slice(y0, y0 + len(along_y))
    z = slice(z0, z0 + len(along_z))

    rows = max(1, 2**24 // (K * len(along_y) * len(along_z)))  # 64 MB of float32
    for i in range(0, len(along_x), rows):
        part = along_x[i : i + rows]
        low = max(0, math.floor(part[0]))
        high = math.ceil(part[-1]) + 1
        slab = _interpolate_all(logits[:, low:high], (part - low, along_y, along_z))  # (K,n,Y,Z)
        result[:, x0 + i : x0 + i + len(part), y, z] = activation(slab)
    return result


# --- prepared files -------------------------------------------------------------------------------

# A prepared volume is STEM with each of these, and STEM.crc, their checksums, written last.
PREPARED = (".npz", ".image.npy", ".mask.npy", ".truth.npy", ".voxels.npy")


def _hash(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 2**20), b""):
            digest.update(block)
    return digest.digest()


def _digest(image: np.ndarray) -> np.ndarray:
    """Return a hash of an image's size and voxels: uint8 (16,)."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image))
    return np.frombuffer(digest.digest(), np.uint8)


def _settings(spacing, preprocess: Callable, channels: int) -> bytes:
    """Return all that prepared voxels depend on besides the files.

    `preprocess` is represented by its outputs for a probe, so that settings which do not matter to
    it do not count.
    """
    _, outputs = _probe(preprocess, channels)
    rules = "rules 3"  # raise the number when the way of preparing changes
    return repr((rules, [float(mm) for mm in spacing])).encode() + outputs.numpy().tobytes()


def _prepared_files(stem: Path) -> list[Path]:
    """Return the files of a prepared volume, without STEM.crc."""
    return [Path(f"{stem}{end}") for end in PREPARED]


def _is_prepared(stem: Path) -> bool:
    """Return True if all files of a prepared volume are whole; print a line if one is damaged."""
    files = _prepared_files(stem)
    if not all(path.is_file() for path in files):
        return False
    is_whole = is_intact(files, Path(f"{stem}.crc"))
    if not is_whole:
        print(f"{stem}.*: damaged or of an older version; preparing the volume again", flush=True)
    return is_whole


def _write_checksums(stem: Path) -> None:
    """Write STEM.crc, which marks a prepared volume as complete."""
    with atomic_write(Path(f"{stem}.crc")) as part:
        part.write_bytes(checksums(_prepared_files(stem)))


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
    """Turn numpy's errors about a damaged file into one line; it was whole when the run started."""
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path}: was damaged while this run read it ({error}); run again") from None


# --- Hounsfield units -----------------------------------------------------------------------------

# Measured on the CT of an abdomen and of a thorax, and on boxes and windows of them. The share of
# voxels in AIR_AND_FAT is 0.54 and 0.73 for whole volumes, above 0.21 for boxes around organs,
# above 0.036 for boxes of 48 voxels, and 0.0001 for volumes whose intercept of -1024 was lost. The
# share in LIFTED is at most 0.005 for whole volumes, 0.095 for boxes of 32 voxels, and 0.41 and
# 0.60 where the intercept was lost.
AIR_AND_FAT = (-1100, 0)
LIFTED = (824, 1224)  # soft tissue and fat, 1024 too high


def hu_facts(image: np.ndarray) -> np.ndarray:
    """Return an image's smallest and largest value, and its shares in AIR_AND_FAT and LIFTED."""
    shares = []
    for low, high in (AIR_AND_FAT, LIFTED):
        is_inside = (image >= low) & (image < high)
        shares.append(np.count_nonzero(is_inside) / image.size)
    return np.array([image.min(), image.max(), *shares], np.float64)


def is_hu(facts: np.ndarray) -> bool:
    """Return False if the values of `hu_facts` cannot be Hounsfield units of a body.

    Cut and windowed CT passes, also windows that begin at 0: they end below 1000 HU. Values of 0 to
    1 or to 255 are taken for grey levels.
    """
    smallest, largest, air_and_fat, lifted = facts
    if lifted >= 0.25:
        return False
    if largest - smallest < 30 and smallest < 0:  # z-scores, -1 to 1: no window is so narrow
        return False
    return air_and_fat >= 0.005 or not (largest > 1000 or largest <= 1 or largest == 255)


def notice_if_not_hu(file: Path, facts: np.ndarray) -> None:
    """Print a notice if the values of a file cannot be Hounsfield units."""
    if not is_hu(facts):
        notices.add(
            "the model takes CT in Hounsfield units (air -1000, water 0), and these values hardly "
            "are (was the intercept, often -1024, lost?)",
            file,
            f"values {facts[0]:g} to {facts[1]:g}",
        )


# --- data sets ------------------------------------------------------------------------------------


def _error_of_void_maps(files: dict[Path, str], n: int) -> str:
    """Return the message about label maps that hold 0 and 255 alone: `files` of n maps."""
    return (
        f"{name_files(files)}: {len(files)} of {n} label maps hold 0 and 255 alone; 255 marks "
        "voxels that do not count, so nothing is labelled there; write the class's number in its "
        "place, or leave these files out if they are void"
    )


def check_255(sets: Sequence["VolumeSet"]) -> None:
    """Check prepared sets for label maps that hold 0 and 255 alone.

    In a data set where other maps hold 255 and a class, 255 marks voxels that do not count, and a
    notice names the maps without a class. Raises ValueError, one line, where no map does: there 255
    is rather the number of a class.
    """
    parts_of = {}  # data set -> (prepared set, indices of its entries) for each prepared set
    for volume_set in sets:
        for root, indices in volume_set._by_root().items():
            parts_of.setdefault(root, []).append((volume_set, indices))

    for parts in parts_of.values():
        without_class = {}
        with_class = {}
        masks = set()
        for volume_set, indices in parts:
            without_class |= volume_set.with_255(False, indices)
            with_class |= volume_set.with_255(True, indices)
            masks |= {volume_set.entries[i].mask for i in indices}

        if without_class and not with_class:
            raise ValueError(_error_of_void_maps(without_class, len(masks)))
        for file in without_class:
            notices.add("the label map holds 255 (does not count) and no class", file)


def _range_text(triples: Sequence[tuple]) -> str:
    """Return the smallest and the largest of sizes or spacings: "64x64x30 to 512x512x90"."""
    ordered = sorted(triples, key=math.prod)
    texts = []
    for triple in (ordered[0], ordered[-1]):
        texts.append("x".join(f"{n:.3g}" for n in triple))
    return " to ".join(dict.fromkeys(texts))


def _count_volumes(n: int) -> str:
    """Return "1 volume", "2 volumes" and so on."""
    return f"{n} volume" if n == 1 else f"{n} volumes"


class VolumeSet:
    """The volumes of one or several data sets; `prepared` makes their samples."""

    holds = "volumes"
    is_mapped = True  # samples are views of files: data-loading processes have nothing to do
    unit = "mm"  # of distances

    def __init__(
        self,
        entries: list,
        grids: list | None = None,
        stems: list | None = None,
        has_partial_labels: bool = False,
    ):
        """entries: of layouts.Entry. has_partial_labels: entries are those of layouts.as_regions,
        and each may annotate a part of the classes.

        Raises FileNotFoundError or ValueError as `read_grid` does, and ValueError for entries of
        different classes, unless labels are partial.
        """
        if not entries:
            raise ValueError("the data set has no volumes")
        self.entries = entries
        self.stems = stems
        self.has_partial_labels = has_partial_labels
        self.classes = entries[0].classes

        if has_partial_labels:
            names = {"background": None}  # a dict, to keep each name once and in order
            for entry in entries:
                names |= dict.fromkeys(entry.classes[1:])
            self.classes = tuple(names)
        else:
            self._check_same_classes()
        self.grids = grids or [read_grid(entry.image) for entry in entries]

    def _check_same_classes(self) -> None:
        """Raise ValueError, one line, unless all entries have the classes of the first one."""
        first = self.entries[0]
        for entry in self.entries:
            has_same_names = entry.classes == first.classes
            has_same_kind = (not entry.regions) == (not first.regions)
            if not has_same_names or not has_same_kind:
                raise ValueError(
                    f"{entry.root}: other classes than {first.root}'s; pool like with like"
                )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def channels(self) -> int:
        """The number of channels of the first volume."""
        return self.grids[0].channels + len(self.entries[0].more_channels)

    def subset(self, indices) -> "VolumeSet":
        """Return a set of these volumes."""
        entries = [self.entries[i] for i in indices]
        grids = [self.grids[i] for i in indices]
        stems = self.stems and [self.stems[i] for i in indices]
        return VolumeSet(entries, grids, stems, self.has_partial_labels)

    def describe(self) -> str:
        """Return the number of volumes, their sizes and their spacings, in one line."""
        sizes = _range_text([grid.size for grid in self.grids])
        spacings = _range_text([grid.spacing for grid in self.grids])
        return f"{_count_volumes(len(self))} of {sizes} voxels of {spacings} mm"

    # --- preparing ---

    def prepared(self, spacing, preprocess: Callable, channels: int, cache: Path) -> "VolumeSet":
        """Return the same volumes with samples, at `spacing` in mm.

        preprocess: maps (C,x,y,z) to the same shape. Prepared volumes are written into the folder
        `cache`, once for each content and these settings. Raises ValueError or OSError, one line:
        for a file that cannot be read, another number of channels, a full disk.
        """
        cache = Path(cache)
        remove_leftovers(cache, recursive=False)
        self._check_headers(channels)

        stems = self._stems(_settings(spacing, preprocess, channels), cache)
        is_done = {stem: _is_prepared(stem) for stem in dict.fromkeys(stems)}
        missing = {stem: i for i, stem in enumerate(stems) if not is_done[stem]}
        if missing:
            self._announce(list(missing.values()), spacing, channels, cache)

        fill = fill_value(preprocess, channels)
        bar = tqdm(missing.items(), desc="prepare", unit="volume", disable=None, leave=False)
        for stem, i in bar:
            self._prepare(i, stem, spacing, preprocess, fill)
            _write_checksums(stem)
        return VolumeSet(self.entries, self.grids, stems, self.has_partial_labels)

    def _check_headers(self, channels: int) -> None:
        """Raise ValueError, one line, if a header already shows that a volume cannot be used."""
        for entry, grid in zip(self.entries, self.grids, strict=True):
            count = grid.channels + sum(read_grid(path).channels for path in entry.more_channels)
            check_channels(entry.image, count, channels)
            check_grid(read_grid(entry.mask), grid)

    def _stems(self, settings: bytes, cache: Path) -> list[Path]:
        """Return the stem of each entry's prepared files; each file is read once."""
        keys = [(entry.root, entry.image, entry.mask) for entry in self.entries]
        index_of = {key: i for i, key in enumerate(keys)}  # a volume may be listed several times
        with ThreadPoolExecutor() as pool:
            stems = pool.map(lambda i: self._stem(i, settings, cache), index_of.values())
            stem_of = dict(zip(index_of, stems, strict=True))
        return [stem_of[key] for key in keys]

    def _stem(self, i: int, settings: bytes, cache: Path) -> Path:
        """Return the path with which the names of the prepared files of entry i begin."""
        entry = self.entries[i]
        content = b""
        for path in (entry.image, *entry.more_channels, entry.mask):
            for file in files_of(path):
                content += _hash(file)
        content += repr((self._numbers(i), entry.background_numbers)).encode() + settings
        return cache / hashlib.sha256(content).hexdigest()[:24]

    def _numbers(self, i: int) -> tuple[int, ...]:
        """Return the number of each class in the label map of entry i."""
        return self.entries[i].labels or tuple(range(max(2, len(self.classes))))

    def _announce(self, indices: list[int], spacing, channels: int, cache: Path) -> None:
        """Print the number of volumes to prepare and their size. Raises OSError for a full disk."""
        needed = 0  # bytes
        for i in indices:
            grid = self.grids[i]
            voxels = math.prod(resampled_size(grid.size, grid.spacing, spacing))
            needed += voxels * (4 * channels + 1) + math.prod(grid.size)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free

        size = f"up to {needed / 1e6:,.0f} MB"
        print(f"preparing {_count_volumes(len(indices))} once into {cache} ({size})", flush=True)
        if needed > free:
            raise OSError(
                f"{cache}: {size} needed, {free / 1e6:,.0f} MB free; choose another folder with "
                "--cache"
            )

    def _prepare(self, i: int, stem: Path, spacing, preprocess: Callable, fill) -> None:
        """Write STEM.image.npy, .mask.npy, .truth.npy, .voxels.npy and, last, .npz."""
        entry = self.entries[i]
        numbers = self._numbers(i)
        image, grid = read_volume((entry.image, *entry.more_channels), fill)  # (C,X,Y,Z)
        truth = read_labels(entry.mask, grid, numbers, entry.background_numbers)  # (X,Y,Z)
        facts = {
            "hu": hu_facts(image),
            "digest": _digest(image),
            "labelled": np.count_nonzero((truth > 0) & (truth < 255)),
            "ignored": np.count_nonzero(truth == 255),
        }

        image, placement = prepare_image(image, grid, spacing, preprocess)  # (C,x,y,z)
        mask = resample(
            torch.from_numpy(truth[None]), placement.full, placement.ratio, nearest=True
        )
        mask = np.ascontiguousarray(mask[0][placement.box])  # (x,y,z)

        # Flat indices of all labelled voxels, sorted by class; class c has those from
        # offsets[c - 1] to offsets[c].
        flat = mask.ravel()
        voxels = np.flatnonzero((mask > 0) & (mask < 255))
        voxels = voxels[flat[voxels].argsort(kind="stable")]
        offsets = flat[voxels].searchsorted(np.arange(1, len(numbers) + 1))
        voxels = voxels.astype(np.int32 if mask.size < 2**31 else np.int64)

        arrays = {"image": image.numpy(), "mask": mask, "truth": truth, "voxels": voxels}
        for name, x in arrays.items():
            with atomic_write(Path(f"{stem}.{name}.npy")) as part, open(part, "wb") as file:
                np.save(file, np.ascontiguousarray(x))
        with atomic_write(Path(f"{stem}.npz")) as part, open(part, "wb") as file:
            np.savez(file, offsets=offsets, **vars(placement), **facts)

    # --- prepared sets ---

    def _index(self, i: int) -> dict[str, np.ndarray]:
        """Return the content of STEM.npz of entry i."""
        path = Path(f"{self.stems[i]}.npz")
        with _prepared_file(path), np.load(path) as file:
            return dict(file)

    def sample(self, i: int, kind: str = "", rng: np.random.Generator | None = None) -> dict:
        """Return the sample of entry i, see the module's docstring; voxels are read when used.

        kind, rng: of prompts, unused; `data.Dataset.sample` has them.
        """
        entry = self.entries[i]
        grid = self.grids[i]
        stem = self.stems[i]
        index = self._index(i)
        placement = {field.name: tuple(index[field.name].tolist()) for field in fields(Placement)}
        return {
            "image": _map(Path(f"{stem}.image.npy")),
            "mask": _map(Path(f"{stem}.mask.npy")),
            "truth": _map(Path(f"{stem}.truth.npy")),
            "voxels": (_map(Path(f"{stem}.voxels.npy")), index["offsets"]),
            "place": Placement(**placement),
            "size": grid.size,
            "spacing": grid.spacing,
            "affine": grid.ras_affine,
            "grid": grid,
            "prompt": "",
            "name": entry.name,
            "file": entry.image,
            "classes": entry.classes,
            "regions": entry.regions,
            "group": entry.group,
            "dataset": entry.root.name,
        }

    def digest(self, i: int) -> str:
        """Return a hash of the voxels of entry i."""
        return self._index(i)["digest"].tobytes().hex()

    def with_255(self, has_class: bool, indices: Sequence[int]) -> dict[Path, str]:
        """Return the label maps that hold 255 and a class, or else 255 and no class: {file: ""}."""
        files = {}
        for i in indices:
            index = self._index(i)
            if index["ignored"] and bool(index["labelled"]) == has_class:
                files[self.entries[i].mask] = ""
        return files

    def _by_root(self) -> dict[Path, list[int]]:
        """Return the indices of each data set's entries."""
        indices = {}
        for i, entry in enumerate(self.entries):
            indices.setdefault(entry.root, []).append(i)
        return indices

    def empty_data_sets(self) -> dict[Path, list]:
        """Return the entries of each data set in which no label map holds a class."""
        empty = {}
        for root, indices in self._by_root().items():
            if not any(self._index(i)["labelled"] for i in indices):
                empty[root] = [self.entries[i] for i in indices]
        return empty

    def check_foreground(self) -> None:
        """Raise ValueError, one line, if a data set has no foreground to train on.

        Its label maps are empty, hold 0 and 255 alone, or are empty at the spacing of the model.
        """
        for root, indices in self._by_root().items():
            if any(self._index(i)["offsets"][-1] for i in indices):
                continue

            void = self.with_255(False, indices)
            if void:
                raise ValueError(_error_of_void_maps(void, len(indices)))
            first = indices[0]
            example = self.entries[first].mask
            if root in self.empty_data_sets():
                raise ValueError(
                    f"{root}: all {len(indices)} label maps are empty, {example} for one"
                )
            spacing = np.multiply(self.grids[first].spacing, self._index(first)["ratio"])
            raise ValueError(
                f"{root}: all foreground of {len(indices)} label maps is lost at a spacing of "
                f"{mm_text(spacing)}, {example} for one; choose a finer --spacing"
            )

    def check_hu(self) -> None:
        """Print a notice about CT volumes that are not in Hounsfield units."""
        for i, entry in enumerate(self.entries):
            if "CT" in (entry.modality or "CT").upper():
                notice_if_not_hu(entry.image, self._index(i)["hu"])

    # --- pictures ---

    def overlay(self, i: int, truth: np.ndarray, masks: np.ndarray, preprocess: Callable):
        """Return the picture of slices of volume i with truth and masks, bool (n,X,Y,Z)."""
        from imaging import pictures  # here: copied into another project, this file needs no Pillow

        grey_levels = self.grey(i, preprocess)
        return pictures.volume_overlay(grey_levels, truth, masks, self.grids[i].spacing)

    def grey(self, i: int, preprocess: Callable) -> np.ndarray:
        """Return `grey` of the image of entry i."""
        entry = self.entries[i]
        fill = fill_value(preprocess, self.channels)
        image, _ = read_volume((entry.image, *entry.more_channels), fill)
        return grey(image, preprocess)

    # --- measurements ---

    def measuring(self, i: int, preprocess: Callable, pixel_size=None) -> Callable:
        """Return the function that measures masks of volume i, for `measure_classes`.

        pixel_size: unused here, of images.
        """
        from imaging import measurements  # here, as above

        fill = fill_value(preprocess, self.channels)
        image, grid = read_volume(self.entries[i].image, fill)  # (C',X,Y,Z)
        return partial(measurements.measure_volume, intensity=image[0], grid=grid)


def grey(image: np.ndarray, preprocess: Callable) -> np.ndarray:
    """Return grey levels to look at: float32 (C,X,Y,Z) -> uint8 (X,Y,Z).

    They show the first channel as the model sees it. Black and white are its percentiles 0.25 and
    99.75.
    """
    x = preprocess(torch.from_numpy(image))[0].numpy()
    low, high = np.percentile(x[::2, ::2, ::2], (0.25, 99.75))
    return ((x - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)


# --- crops to train on ----------------------------------------------------------------------------


def _background_voxel(image: Tensor, mask: Tensor, rng: np.random.Generator) -> int | None:
    """Return the flat index of a random voxel of label 0 that is not 0 in the image, if any."""
    values = image.flatten(1)  # (C,N), a view
    labels = mask.flatten()  # (N,)

    for _ in range(16):  # try random voxels first: a list of all of them would be large
        candidates = torch.from_numpy(rng.integers(len(labels), size=256))
        is_background = (labels[candidates] == 0) & (values[:, candidates] != 0).any(0)
        if is_background.any():
            return candidates[is_background][0].item()

    background = ((labels == 0) & (values != 0).any(0)).nonzero()
    return background[rng.integers(len(background))].item() if len(background) else None


def _crop_centre(image: Tensor, mask: Tensor, voxels: tuple, rng, ratios) -> int:
    """Return the flat index of the voxel in the middle of a crop; arguments of `random_crops`."""
    indices, offsets = voxels
    ends = offsets if len(ratios) == len(offsets) else offsets[[0, -1]]  # each class, or any class
    if len(ratios) != len(ends):
        raise ValueError(f"{len(ratios)} ratios of crops for {len(offsets)} classes; give 2 or all")

    is_present = [True, *(np.diff(ends) > 0)]
    ratios = np.multiply(ratios, is_present)
    choice = rng.choice(len(ratios), p=ratios / ratios.sum()) if ratios.any() else 0
    if choice > 0:
        return indices[rng.integers(ends[choice - 1], ends[choice])].item()

    centre = _background_voxel(image, mask, rng)
    if centre is not None:
        return centre
    if ends[-1]:  # all is foreground
        return indices[rng.integers(0, ends[-1])].item()
    return rng.integers(mask.numel())  # the volume is empty


def _crop_slices(centre: int, n: int, window: int) -> tuple[slice, slice]:
    """Return the slices of an axis of n voxels and of the window around `centre` that they fill."""
    before = max(window - n, 0) // 2  # zeros before a volume that is smaller than the window
    start = centre + before - window // 2
    start = min(max(start, 0), max(n - window, 0)) - before
    first = max(start, 0)
    last = min(start + window, n)
    return slice(first, last), slice(first - start, last - start)


def random_crops(
    image: Tensor, mask: Tensor, voxels: tuple, n: int, size, rng, ratios=(1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Return copies of n crops around random voxels: image (n,C,*size), mask (n,*size).

    image (C,x,y,z), mask (x,y,z), voxels: of one sample. ratios: how often the middle voxel is
    background (label 0 where the image is not 0) and of any class; or one ratio for each class,
    background first. Classes that a volume lacks are not drawn. Crops are shifted into the volume;
    a volume smaller than `size` gets zeros around it, half on either side.
    """
    images = image.new_zeros(n, len(image), *size)  # (n,C,*size)
    masks = mask.new_zeros(n, *size)
    for k in range(n):
        centre = np.unravel_index(_crop_centre(image, mask, voxels, rng, ratios), mask.shape)
        source = []
        target = []
        for position, length, window in zip(centre, mask.shape, size, strict=True):
            of_volume, of_window = _crop_slices(position, length, window)
            source.append(of_volume)
            target.append(of_window)
        images[(k, ..., *target)] = image[(..., *source)]
        masks[(k, *target)] = mask[tuple(source)]
    return images, masks


def _rotate(x: Tensor, degrees: float, mode: str) -> Tensor:
    """Rotate x (C,X,Y,Z) about the third axis, clamped at the border."""
    C, X, Y, _ = x.shape
    c = math.cos(math.radians(degrees))
    s = math.sin(math.radians(degrees))
    matrix = torch.tensor([[c, -s * X / Y, 0], [s * Y / X, c, 0]])  # of (y, x), each -1 … 1
    grid = F.affine_grid(matrix[None], (1, 1, X, Y), align_corners=False)

    planes = x.permute(0, 3, 1, 2).flatten(0, 1)[None].float()  # (1,C*Z,X,Y)
    planes = F.grid_sample(planes, grid, mode, "border", align_corners=False)
    planes = planes[0].unflatten(0, (C, -1))  # (C,Z,X,Y)
    return planes.permute(0, 2, 3, 1).to(x.dtype)  # (C,X,Y,Z)


def augment(
    image: Tensor, mask: Tensor, rng: np.random.Generator,
    flip=(0.0, 0.0, 0.0), rotate90=0.0, rotate=(0.0, 0.0), scale=(0.0, 0.0), shift=(0.0, 0.0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return image float32 (C,X,Y,Z) and mask (X,Y,Z) changed at random.

    Probabilities: `flip` along each axis; `rotate90`, quarter turns in the first two axes (half
    turns where their sides differ). Largest amount and probability: `rotate` by ± degrees about the
    third axis, `scale` of the intensities by 1 ± the amount, `shift` of them by ± the amount.
    """
    flipped = []
    for axis, probability in enumerate(flip):
        if rng.random() < probability:
            flipped.append(axis)
    image = image.flip([axis + 1 for axis in flipped])
    mask = mask.flip(flipped)

    if rng.random() < rotate90:
        turns = int(rng.integers(1, 4)) if mask.shape[0] == mask.shape[1] else 2
        image = image.rot90(turns, (1, 2))
        mask = mask.rot90(turns, (0, 1))
    if rng.random() < rotate[1]:
        degrees = rng.uniform(-rotate[0], rotate[0])
        image = _rotate(image, degrees, "bilinear")
        mask = _rotate(mask[None], degrees, "nearest")[0]

    if rng.random() < scale[1]:
        image = image * (1 + rng.uniform(-scale[0], scale[0]))
    if rng.random() < shift[1]:
        image = image + rng.uniform(-shift[0], shift[0])
    return image.contiguous(), mask.contiguous()


# --- prediction -----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _weights(window: tuple[int, ...]) -> Tensor:
    """Return the weight of each voxel of a window in the blend: float32 (*window), 1 in the middle.

    It is a Gaussian with a standard deviation of an eighth of the window.
    """
    weights = torch.ones(())
    for n in window:
        x = torch.arange(n) - (n - 1) / 2
        bell = torch.exp(x.square() / (-2 * (0.125 * n) ** 2))  # (n,)
        weights = weights[..., None] * bell
    return weights.clamp(min=max(weights.min().item(), 1e-3))


def _starts(n: int, window: int, overlap: float) -> list[int]:
    """Return the starts of windows along an axis: at equal steps; the last ends with the axis."""
    step = max(1, int(window * (1 - overlap))) if n > window else window
    return [min(start, n - window) for start in range(0, n - window + step, step)]


def _window_boxes(size: Sequence[int], window: Sequence[int], overlap: float) -> list[tuple]:
    """Return the windows that cover an array of this size, each as a tuple of slices."""
    axes = []
    for n, side in zip(size, window, strict=True):
        axes.append([slice(start, start + side) for start in _starts(n, side, overlap)])
    return list(itertools.product(*axes))


@torch.no_grad()
def sliding_window(
    model: Callable,
    image: Tensor,
    window: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    device=None,
    on=None,
    progress: bool = False,
) -> Tensor:
    """Return the model's outputs on overlapping windows, blended by a Gaussian: (K,*size) float32.

    image (C,*size), 2-D or 3-D; one smaller than the window gets zeros around it, half on either
    side. model: (B,C,*window) -> (B,K,*window). overlap: share of a window, 0 to less than 1.
    batch: windows at a time. device: of the result; on: of the model; both default to the image's.
    progress: show a bar. Raises ValueError for another overlap, and if the model returns another
    size than the window's.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap}: takes 0 to less than 1")
    size = image.shape[1:]
    window = tuple(window)
    device = device or image.device
    on = on or image.device

    # Pad an image that is smaller than the window.
    missing = [max(side - n, 0) for n, side in zip(size, window, strict=True)]
    if any(missing):
        padding = []
        for n in reversed(missing):  # F.pad counts from the last axis
            padding += [n // 2, n - n // 2]
        image = F.pad(image, padding)
    padded = image.shape[1:]

    # Add up the weighted outputs and the weights.
    weights = _weights(window).to(device)
    total = torch.zeros(padded, device=device)
    result = None
    boxes = _window_boxes(padded, window, overlap)
    hidden = None if progress else True
    for i in tqdm(range(0, len(boxes), batch), "windows", disable=hidden, leave=False):
        part = boxes[i : i + batch]
        crops = torch.stack([image[(..., *box)] for box in part])  # (B,C,*window)
        logits = model(crops.to(on))  # (B,K,*window)
        if logits.shape[2:] != window:
            raise ValueError(f"windows of {window} became {tuple(logits.shape[2:])}; resize them")
        logits = logits.to(device, torch.float32)
        if result is None:
            result = torch.zeros(logits.shape[1], *padded, device=device)
        for box, window_logits in zip(part, logits, strict=True):
            result[(..., *box)].addcmul_(window_logits, weights)
            total[box].add_(weights)

    # Cut the padding off.
    result.div_(total)
    inner = [slice(pad // 2, pad // 2 + n) for pad, n in zip(missing, size, strict=True)]
    return result[(..., *inner)]


def window_probabilities(
    model: nn.Module, image: Tensor, placement: Placement, overlap: float = 0.5, batch: int = 4,
    classes: Sequence[int] | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Return probabilities float32 (K,X,Y,Z) on the grid of the image's file, in RAS, on the CPU.

    image (C,x,y,z), placement: of `prepare_image`. overlap, batch: as for `sliding_window`.
    classes: of a Universal Model, the indices of the wanted classes, counted from 0 without the
    background; None for all. progress: show a bar.
    """
    c = model.config
    device = next(model.parameters()).device
    network = model
    count = c.num_classes
    if classes is not None:
        network = partial(model, classes=classes)
        count = len(classes)

    # Keep the logits on the GPU if they fit into half of its free memory.
    needed = 4 * count * image[0].numel()  # bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    logits = sliding_window(
        network,
        image,
        c.image_size,
        overlap,
        batch,
        device=device if needed < free // 2 else "cpu",
        on=device,
        progress=progress,
    ).cpu()  # (K,x,y,z)

    def activation(slab: Tensor) -> Tensor:
        return model.postprocess(slab, slab.shape[1:])

    has_background = c.num_classes > 1 and not c.overlapping
    return restore(logits, placement, activation, has_background)


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

    model: a SwinUNETR, UniversalSwinUNETR or AttentionUniversal; its config holds the spacing, the
    intensities and the window. files: one file (str or Path), 3-D or 4-D, or a list with one file
    per channel. classes: names, to compute only these classes of a Universal Model. overlap, batch:
    as for `sliding_window`.

    Probabilities are float32 (K,X,Y,Z) and may be a view. Labels are uint8 (X,Y,Z): class indices;
    with a single class, 1 where its probability is above `config.threshold`. Where classes overlap,
    labels are (K,X,Y,Z), 0 or 1 for each class. The affine is that of the file, float64 (4,4),
    corrected where its header contradicts itself: use nibabel.Nifti1Image(labels, affine).

    Raises ValueError or FileNotFoundError, one line, for files and classes that do not fit.
    """
    c = model.config
    files = [files] if isinstance(files, str | Path) else files
    files = list(map(Path, files))
    wanted = None if classes is None else class_numbers(model, classes)
    image, grid = read_volume(files, fill_value(model.preprocess, c.in_channels))  # (C,X,Y,Z)
    check_channels(files[0], len(image), c.in_channels)
    if c.intensity:
        notice_if_not_hu(files[0], hu_facts(image))

    with evaluating(model):
        prepared, placement = prepare_image(image, grid, c.spacing, model.preprocess)
        probabilities = window_probabilities(model, prepared, placement, overlap, batch, wanted)

    if c.overlapping:
        labels = probabilities > c.threshold
    elif c.num_classes == 1:
        labels = probabilities[0] > c.threshold
    else:
        labels = probabilities.argmax(0)
    labels = labels.byte().numpy()
    return _stored(probabilities.numpy(), grid), _stored(labels, grid).copy(), grid.affine


def class_numbers(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Return the indices of a Universal Model's classes, counted from 0 without the background.

    Raises ValueError, one line, for an unknown name, or a model that finds all classes at once.
    """
    if not hasattr(model, "add_class"):
        raise ValueError("classes: this model finds all of its classes at once; remove it")
    known = model.config.classes[1:]
    indices = []
    for name in names:
        if name not in known:
            raise ValueError(f"classes: the model has no {name}, only {', '.join(known)}")
        indices.append(known.index(name))
    return indices


def _stored(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Return x (X,Y,Z) or (K,X,Y,Z) in RAS with the axes of the file, a view."""
    if x.ndim == 3:
        return grid.to_stored(x)
    return np.moveaxis(grid.to_stored(np.moveaxis(x, 0, 3)), 3, 0)


def labelled_components(
    mask: np.ndarray,
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray] | None:
    """Return the connected components of a bool mask (X,Y,Z), 26 neighbours; None if it is empty.

    Returns the box around the mask, the component's number of each voxel in the box (0: none), and
    the numbers and sizes of all components (n,2), the largest first.
    """
    from scipy import ndimage

    if not mask.any():
        return None
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    numbers, n = ndimage.label(mask[box], np.ones((3, 3, 3)))
    sizes = np.bincount(numbers[numbers > 0], minlength=n + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    return box, numbers, np.stack([order + 1, sizes[order]], 1)


def largest_components(mask: np.ndarray, most: int) -> np.ndarray:
    """Return a mask (X,Y,Z) of the `most` largest components of a bool mask."""
    components = labelled_components(mask)
    if components is None:
        return mask
    box, numbers, sizes = components
    if len(sizes) <= most:
        return mask
    result = np.zeros_like(mask)
    result[box] = np.isin(numbers, sizes[:most, 0])
    return result


def largest_component(labels: np.ndarray) -> np.ndarray:
    """Return labels uint8 (X,Y,Z) with only the largest component of each class."""
    from scipy import ndimage

    labels = labels.copy()
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            inside = labels[box] == k
            labels[box][inside & ~largest_components(inside, 1)] = 0
    return labels
