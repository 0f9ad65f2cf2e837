"""Volumes -> samples, prepared once into files that all workers map; crops of them to train on,
sliding windows, and the way back to the voxels of the file (nifti.py).

A sample is a dict. On the prepared grid, cut to the box of what is not 0, `image` float32
(C,x,y,z), `mask` uint8 (x,y,z), and `voxels`, where each class is (for `random_crops`). On the
file's grid in RAS `truth` uint8 (X,Y,Z), `size`, `spacing` in mm, `affine`. And `place`, the way
from one to the other (for `restore`), `grid` (for `nifti.write`), `prompt` "", `name`, `file`,
`classes`, `regions`, `group`, `dataset`.
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

from imaging.atomic_files import checksums, is_intact, remove_leftovers, whole_file
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


def fill_value(preprocess: Callable, channels: int) -> float | None:
    """Return what voxels that are NaN or infinite become, the `fill` of `read_image`.

    0 if `preprocess` leaves 0 as it is, as z-scores of what is not 0 do: such voxels then count
    neither for the mean nor for the deviation, and are 0 afterwards. Else None.
    """
    probe, done = _probe(preprocess, channels)
    return 0.0 if (done[probe == 0] == 0).all() else None


# --- from the file's grid to the prepared one, and back ------------------------------------------


def resampled_size(size, spacing_in, spacing_out) -> tuple[int, ...]:
    """Voxels at another spacing: the first lies where it was, the last as near as can be."""
    axes = zip(size, spacing_in, spacing_out, strict=True)
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
    grows = [len(position) / n for position, n in zip(positions, x.shape[1:], strict=True)]
    for axis in np.argsort(grows, kind="stable").tolist():
        x = _at(x, axis + 1, positions[axis], nearest)
    return x


def resample(x: Tensor, size, ratio, nearest: bool = False) -> Tensor:
    """x (C,X,Y,Z) -> (C,*size): index j of an axis is x at j * ratio, beyond the border as on it.

    Linear, or `nearest` for labels. As MONAI's Spacing does it. Where nearest falls exactly between
    two source voxels, libraries differ by one source voxel.
    """
    steps = [torch.arange(n, dtype=torch.float64) * r for n, r in zip(size, ratio, strict=True)]
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
    ratio = tuple(b / a for a, b in zip(grid.spacing, spacing, strict=True))
    x = preprocess(resample(torch.from_numpy(image), full, ratio)).float()
    inside = (x != 0).any(0)  # (x,y,z)
    sides = inside.any(2).any(1), inside.any(2).any(0), inside.any(1).any(0)
    found = [side.nonzero().flatten().tolist() or range(len(side)) for side in sides]
    start, stop = zip(*((side[0], side[-1] + 1) for side in found), strict=True)
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

    holds = "volumes"
    is_mapped = True  # samples are views of files: data-loading processes have nothing to do
    unit = "mm"  # of distances

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
        image, grid = read_volume((entry.image, *entry.more), fill)
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
        # What headers tell, before all else.
        for entry, grid in zip(self.entries, self.grids, strict=True):
            have = grid.channels + sum(read_grid(path).channels for path in entry.more)
            check_channels(entry.image, have, channels)
            check_grid(read_grid(entry.mask), grid)
        settings = _settings(spacing, preprocess, channels)
        keys = [(entry.root, entry.image, entry.mask) for entry in self.entries]
        once = {key: i for i, key in enumerate(keys)}  # a volume may be listed several times
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda i: self._stem(i, settings, cache), once.values())
            by_key = dict(zip(once, found, strict=True))
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

    def overlay(self, i: int, truth: np.ndarray, masks: np.ndarray, preprocess: Callable):
        """Return the picture of three planes of volume i with truth and masks, bool (n,X,Y,Z)."""
        from imaging import pictures  # here: copied into another project, this file needs no Pillow

        grey_levels = self.grey(i, preprocess)
        return pictures.volume_overlay(grey_levels, truth, masks, self.grids[i].spacing)

    def grey(self, i: int, preprocess: Callable) -> np.ndarray:
        """`grey` of the image of entry i."""
        entry = self.entries[i]
        fill = fill_value(preprocess, self.channels)
        return grey(read_volume((entry.image, *entry.more), fill)[0], preprocess)


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
        for at, have, want in zip(centre, mask.shape, size, strict=True):
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
def _weights(window: tuple[int, ...]) -> Tensor:
    """Return how much each voxel of a window counts: float32 (*window), 1 in the middle.

    A Gaussian whose standard deviation is an eighth of the window.
    """
    weights = torch.ones(())
    for n in window:
        x = torch.arange(n) - (n - 1) / 2
        bell = torch.exp(x.square() / (-2 * (0.125 * n) ** 2))  # (n,)
        weights = weights[..., None] * bell
    return weights.clamp(min=max(weights.min().item(), 1e-3))


def _starts(n: int, window: int, overlap: float) -> list[int]:
    """Return where windows begin along an axis: at equal steps, the last ends with the axis."""
    step = max(1, int(window * (1 - overlap))) if n > window else window
    return [min(start, n - window) for start in range(0, n - window + step, step)]


def _window_boxes(size: Sequence[int], window: Sequence[int], overlap: float) -> list[tuple]:
    """Return the windows that cover an array of this size, each as a tuple of slices."""
    axes = [_starts(n, w, overlap) for n, w in zip(size, window, strict=True)]
    boxes = []
    for starts in itertools.product(*axes):
        boxes.append(
            tuple(slice(start, start + w) for start, w in zip(starts, window, strict=True))
        )
    return boxes


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
    """Return what the model says of overlapping windows, blended by a Gaussian: (K,*size) float32.

    image (C,*size), 2-D or 3-D; smaller than the window, it gets zeros around it, half on either
    side. model: (B,C,*window) -> (B,K,*window). overlap: share of a window, 0 to less than 1.
    batch: windows at a time. device: where the result is, else with the image. on: where the model
    is, else with the image. progress: show a bar. Raises ValueError for another overlap, and if the
    model returns another size than the window's.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap}: takes 0 to less than 1")
    size = image.shape[1:]
    window = tuple(window)
    device = device or image.device
    on = on or image.device

    missing = [max(w - n, 0) for n, w in zip(size, window, strict=True)]
    if any(missing):
        padding = []
        for n in reversed(missing):  # F.pad counts from the last axis
            padding += [n // 2, n - n // 2]
        image = F.pad(image, padding)
    padded = image.shape[1:]

    weights = _weights(window).to(device)
    total = torch.zeros(padded, device=device)
    result = None
    boxes = _window_boxes(padded, window, overlap)
    hidden = None if progress else True
    for i in tqdm(range(0, len(boxes), batch), "windows", disable=hidden, leave=False):
        some = boxes[i : i + batch]
        crops = torch.stack([image[(..., *box)] for box in some])  # (B,C,*window)
        logits = model(crops.to(on))  # (B,K,*window)
        if logits.shape[2:] != window:
            raise ValueError(f"windows of {window} became {tuple(logits.shape[2:])}; resize them")
        logits = logits.to(device, torch.float32)
        if result is None:
            result = torch.zeros(logits.shape[1], *padded, device=device)
        for box, of_window in zip(some, logits, strict=True):
            result[(..., *box)].addcmul_(of_window, weights)
            total[box].add_(weights)

    result.div_(total)
    inner = [slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True)]
    return result[(..., *inner)]


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
    image, grid = read_volume(files, fill_value(model.preprocess, c.in_channels))  # (C,X,Y,Z)
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


def labelled_components(
    mask: np.ndarray,
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray] | None:
    """Return the components of a bool mask (X,Y,Z), with 26 neighbours; None if it is empty.

    They are the box around the mask, the number of each voxel's component in it (0: none), and the
    numbers of all with their sizes (n,2), the largest first.
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
    """Return the largest components of a bool mask (X,Y,Z), at most so many, as a mask."""
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
    """Labels uint8 (X,Y,Z) -> of each class its largest component alone."""
    from scipy import ndimage

    labels = labels.copy()
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            inside = labels[box] == k
            labels[box][inside & ~largest_components(inside, 1)] = 0
    return labels
