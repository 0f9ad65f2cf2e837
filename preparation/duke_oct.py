"""Class maps from Duke's OCT scans: macular edema (DME) and drusen (AMD).

Two data sets of retinal OCT from Sina Farsiu's group at Duke. Each volume, of one subject, is a
MATLAB file.

- Chiu 2015 (people.duke.edu/~sf59/Chiu_BOE_2014_dataset.htm, also on Kaggle as
  paultimothymooney/chiu-2015): ten volumes with diabetic macular edema, eleven annotated slices in
  each.
- Farsiu 2014 (people.duke.edu/~sf59/RPEDC_Ophth_2013_dataset.htm, also on Kaggle as
  paultimothymooney/farsiu-2014): 269 volumes with drusen of age-related macular degeneration and
  115 without.

Both give the boundaries between layers as one row for each column. MATLAB counts rows from 1, and
a whole number is the centre of a pixel. A pixel belongs to the layer under the last boundary at or
above its centre: with a boundary at row 5.0 the layer starts at row 5, with one at 5.2 at row 6.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.ranges import POSITIVE, SEED
from imaging import atomic_files, pictures
from preparation import archives, volume_sets
from preparation.uw_madison import ENDS, make_splits, write_notes

DME_CLASSES = ("background", "NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE-OS", "RPE", "fluid")
DME_AXES = {"images": "H W N", "manualLayers{}": "8 W N", "manualFluid{}": "H W N"}  # {}: annotator
DME_SPLITS = {
    "subject01": "train",
    "subject02": "train",
    "subject03": "train",
    "subject04": "train",
    "subject05": "val",
    "subject06": "test",
    "subject07": "test",
    "subject08": "test",
    "subject09": "test",
    "subject10": "test",
}
AMD_CLASSES = ("background", "ILM to RPEDC", "RPEDC", "below BM")
AMD_AXES = {"images": "H W N", "layerMaps": "N W 3"}  # here the slice comes first


# --- reading --------------------------------------------------------------------------------------


def find_volumes(root: Path, pattern: str) -> dict[str, Path]:
    """Return the volumes in and below a folder, sorted by file name: patient -> file.

    pattern: of the file name; its groups together, in lower case, are the name of the patient.
    Raise ValueError if a patient has two files.
    """
    volumes = {}
    for path in sorted(root.rglob("[!.]*.mat"), key=lambda path: path.name):
        match = re.fullmatch(pattern, path.name)
        if match is None:
            continue
        patient = "".join(match.groups()).lower()
        if patient in volumes:
            raise ValueError(f"{path}: there is {volumes[patient]} as well; keep one of the two")
        volumes[patient] = path
    return volumes


def read_mat(path: Path, axes: dict[str, str]) -> list[np.ndarray]:
    """Return the arrays that `axes` names from a MATLAB file, "images" with grey values of 0..255.

    axes: name of an array -> its axes, such as "8 W N": a number is the size of an axis, a letter
    stands for a size that is the same in all arrays. Raise ValueError, one line, for an unreadable
    file, a missing array, another shape, or values that are no grey values.
    """
    arrays = load_arrays(path, list(axes))
    sizes = {}
    for key, names in axes.items():
        check_shape(path, key, arrays[key].shape, names, sizes)
        if arrays[key].dtype.kind not in "uif":
            raise ValueError(f"{path}: {key} holds no numbers; download it again")

    images = arrays["images"]
    low = images.min()
    high = images.max()
    if not (low >= 0 and 1 < high <= 255):  # true for NaN, too
        raise ValueError(
            f"{path}: images holds {low:g} to {high:g}, expected grey values of 0 to 255"
        )
    return [arrays[key] for key in axes]


def load_arrays(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """Return named arrays of a MATLAB file. Raise ValueError, one line, if that fails."""
    from scipy.io import loadmat  # slow to import, and only these two commands need it

    try:
        arrays = loadmat(path, variable_names=keys)
    except NotImplementedError:
        raise ValueError(
            f"{path}: a MATLAB 7.3 (HDF5) file; the original is of version 5: download it again, "
            "or save it with -v7 in MATLAB"
        ) from None
    except Exception as error:  # damaged files: OSError, IndexError, TypeError, zlib.error, ...
        raise ValueError(
            f"{path}: not readable as a MATLAB file ({error}); download it again"
        ) from None

    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}; download it again")
    return arrays


def check_shape(path: Path, key: str, shape: tuple, axes: str, sizes: dict[str, int]) -> None:
    """Raise ValueError, one line, if an array has another shape than its axes say.

    sizes: letter of an axis -> size in the arrays before; letters that are new are added.
    """
    expected = []
    for axis, size in zip(axes.split(), shape, strict=False):
        expected.append(int(axis) if axis.isdigit() else sizes.setdefault(axis, size))

    if len(shape) != len(axes.split()) or list(shape) != expected:
        known = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"{path}: {key} is {' '.join(map(str, shape))}, expected {axes} with {known}; "
            "download it again"
        )


# --- boundaries to class maps ---------------------------------------------------------------------

MISPLACED = 0.01  # largest share of a volume's annotated columns with boundaries out of place


def without_misplaced(path: Path, key: str, boundaries: np.ndarray, height: int) -> np.ndarray:
    """Return boundaries (N,L,W) where columns with boundaries out of place are NaN.

    From top to bottom each boundary must lie less than one row above the one before it, the last
    not above the first, and all within the image, to within one row. Raise ValueError, one line,
    if more than MISPLACED of the volume's complete columns are out of place: then the file is not
    what it should be.
    """
    complete = np.isfinite(boundaries).all(1)  # (N,W)
    rows = np.where(complete[:, None], boundaries, 1.0)  # (N,L,W), without NaN
    disordered = (np.diff(rows, axis=1) <= -1).any(1)  # (N,W)
    disordered |= rows[:, -1] < rows[:, 0]
    outside = ((rows < 0) | (rows > height + 1)).any(1)  # (N,W)
    misplaced = disordered | outside

    if misplaced.sum() > MISPLACED * complete.sum():
        slice_number, column = np.argwhere(misplaced)[0].tolist()
        row_numbers = ", ".join(f"{row:g}" for row in rows[slice_number, :, column])
        reason = f"outside the image's rows 1 to {height}"
        if disordered[slice_number, column]:
            reason = "not in order from top to bottom"
        raise ValueError(
            f"{path}: {key} has {misplaced.sum():,} of {complete.sum():,} columns with boundaries "
            f"out of place, first in slice {slice_number}, column {column}: rows {row_numbers} are "
            f"{reason}; download it again"
        )
    return np.where(misplaced[:, None], np.nan, boundaries)


def layer_map(boundaries: np.ndarray, height: int) -> np.ndarray:
    """Return a class map, uint8 (H,W), from the rows of boundaries, float (L,W).

    A pixel gets the number of boundaries at or above its centre. Columns that lack a boundary are
    255 (ignored): calling them background would be wrong.
    """
    rows = np.arange(1, height + 1)[:, None]  # (H,1)
    is_below = boundaries[:, None] <= rows  # (L,H,W)
    mask = is_below.sum(0).astype(np.uint8)  # (H,W)
    mask[:, ~np.isfinite(boundaries).all(0)] = 255
    return mask


Slices = Iterator[tuple[int, np.ndarray, np.ndarray]]  # number from 0, image and mask uint8 (H,W)


def annotated_slices(images: np.ndarray, boundaries: np.ndarray, every: int = 1) -> Slices:
    """Yield the slices that have columns with all boundaries, with their layer maps.

    images (H,W,N), boundaries (N,L,W). every: take the first of each `every` such slices.
    """
    is_annotated = np.isfinite(boundaries).all(1).any(1)  # (N,)
    for n in np.flatnonzero(is_annotated)[::every].tolist():
        image = images[..., n].astype(np.uint8)  # (H,W)
        yield n, image, layer_map(boundaries[n], len(image))


def dme_slices(path: Path, annotator: str) -> Slices:
    """Yield the annotated slices of a volume of Chiu 2015; fluid lies over the layers."""
    axes = {key.format(annotator): names for key, names in DME_AXES.items()}
    images, layers, fluid = read_mat(path, axes)
    layers = np.moveaxis(layers, 2, 0)  # (N,8,W)
    layers = without_misplaced(path, f"manualLayers{annotator}", layers, len(images))

    for n, image, mask in annotated_slices(images, layers):
        mask[mask == 8] = 0  # below the last boundary is background, as above the first
        is_fluid = fluid[..., n] > 0  # (H,W); values number the regions, NaN is no fluid
        mask[is_fluid & (mask != 255)] = 8
        yield n, image, mask


def amd_slices(path: Path, every: int) -> Slices:
    """Yield the annotated slices of a volume of Farsiu 2014."""
    images, layers = read_mat(path, AMD_AXES)
    layers = layers.swapaxes(1, 2)  # (N,3,W)
    layers = without_misplaced(path, "layerMaps", layers, len(images))
    yield from annotated_slices(images, layers, every)


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeSet:
    """The volumes of a data set, and how they become slices with class maps."""

    title: tuple[str, ...]  # first lines of README.txt
    files: dict[str, Path]  # patient -> volume
    splits: dict[str, str]  # patient -> split
    read_slices: Callable[[Path], Slices]
    classes: tuple[str, ...]


def write_volume(volumes: VolumeSet, part: Path, patient: str) -> Counter:
    """Write the slices of a patient into the split's folders; return what was written.

    The counter has slices, columns, ignored columns ("gaps") and, for each class, the slices that
    show it. Slices are cut to the columns from the first to the last annotated one: outside of
    these nothing is known, and some margins are plain white. Raise ValueError if there is no slice.
    """
    path = volumes.files[patient]
    folder = part / volumes.splits[patient]
    counts = Counter()
    for n, image, mask in volumes.read_slices(path):
        is_annotated = mask[0] != 255  # (W,); a column is 255 from top to bottom
        first, last = np.flatnonzero(is_annotated)[[0, -1]]
        columns = slice(first, last + 1)
        image = np.ascontiguousarray(image[:, columns])
        mask = np.ascontiguousarray(mask[:, columns])

        name = f"{patient}_slice{n:02}.png"
        (folder / "images" / name).write_bytes(pictures.png(image))
        pictures.class_map(mask, len(volumes.classes)).save(folder / "masks" / name)

        counts["slices"] += 1
        counts["columns"] += mask.shape[1]
        counts["gaps"] += int((~is_annotated[columns]).sum())
        counts.update(volumes.classes[k] for k in np.unique(mask) if k != 255)

    if not counts:
        raise ValueError(f"{path}: no slice has a column with all boundaries; download it again")
    return counts


def describe(volumes: VolumeSet, counts: dict[str, Counter]) -> Iterator[str]:
    """Yield the lines of README.txt. counts: patient -> what `write_volume` returned."""
    yield from volumes.title
    for split in ("train", "val", "test"):
        patients = [name for name in counts if volumes.splits[name] == split]
        total = sum((counts[name] for name in patients), Counter())
        shown = ", ".join(f"{name} in {total[name]:,}" for name in volumes.classes[1:])
        yield f"{split}: {total['slices']:,} slices of {len(patients)} patients; {shown}"

    total = sum(counts.values(), Counter())
    gaps = f"{total['gaps']:,} of {total['columns']:,} columns lack a boundary and are 255"
    yield f"slices are cut to their annotated columns; within these {gaps}: they do not count"
    yield "a boundary out of order or outside the image counts as lacking"
    yield "a boundary's rows count from 1; the pixel whose centre it meets lies below it"
    yield "masks are palette images: read their indices, not their colours"
    yield "slices are numbered from 0; scores by patient: --group-regex '[a-z]+[0-9]+'"


def write_volumes(volumes: VolumeSet, out: Path) -> int:
    """Write a data set, complete or not at all, and print what it holds; return 0."""
    patients = list(volumes.splits)
    counts = {}
    with atomic_files.atomic_folder(out) as part:
        make_splits(part, ("train", "val", "test"))
        bar = tqdm(total=len(patients), desc=out.name, unit="volume", disable=None, leave=False)
        with ThreadPoolExecutor(4) as pool, bar:  # each thread holds up to 400 MB
            written = pool.map(partial(write_volume, volumes, part), patients)
            for patient, count in zip(patients, written, strict=True):
                counts[patient] = count
                bar.update()
        description = write_notes(part, volumes.classes, describe(volumes, counts))
    print(f"{out}: {description}")
    return 0


# --- commands -------------------------------------------------------------------------------------


@archives.takes_archives
def duke_dme(args) -> int:
    """Make class maps of seven retinal layers and fluid from Duke's OCT with macular edema.

    Subjects 1 to 4 train, 5 validates and 6 to 10 test: the usual split into 1 to 5 and 6 to 10,
    with one training subject held out for validation. Only slices in which the annotator outlined
    layers are used.
    """
    files = find_volumes(args.download, r"(Subject)_(\d\d)\.mat")
    missing = [name.replace("subject", "Subject_") for name in DME_SPLITS if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{args.download}: no {', '.join(missing)} (.mat); DOWNLOAD is the unpacked folder, "
            "with all ten in it or below"
        )

    title = (
        f"Duke OCT with macular edema (Chiu 2015), annotator {args.annotator}",
        "pixels: about 3.87 um deep, 11.3 um across",
        f"fluid: manualFluid{args.annotator} above 0; where it is NaN, none",
    )
    read_slices = partial(dme_slices, annotator=args.annotator)
    volumes = VolumeSet(title, files, DME_SPLITS, read_slices, DME_CLASSES)
    return write_volumes(volumes, args.out)


@archives.takes_archives
def duke_amd(args) -> int:
    """Make class maps of retina and drusen complex from Duke's OCT of macular degeneration (AMD).

    The RPE-drusen complex (RPEDC) reaches from the inner border of the pigment epithelium and its
    drusen to Bruch's membrane (BM). Patients are split at random, 70 % train, 15 % val, 15 % test,
    with the same shares for AMD patients and controls. Neighbouring slices are 0.067 mm apart and
    look alike, so only one in ten is used by default: about 3,000 of 30,000 slices.
    """
    pattern = r"Farsiu_Ophthalmology_2013_(AMD|Control)_Subject_(\d+)\.mat"
    files = find_volumes(args.download, pattern)
    amd = [name for name in files if name.startswith("amd")]
    controls = [name for name in files if name.startswith("control")]

    rng = np.random.default_rng(args.seed)
    splits = volume_sets.split_at_random(amd, ENDS["case"], rng)
    splits |= volume_sets.split_at_random(controls, ENDS["case"], rng)
    empty = ENDS["case"].keys() - splits.values()
    if empty:
        raise FileNotFoundError(
            f"{args.download}: {len(amd)} files amd, {len(controls)} files control, {min(empty)} "
            "would be empty; expected Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat and so on"
        )

    title = (
        f"Duke OCT with and without AMD (Farsiu 2014): {len(amd)} amd, {len(controls)} control; "
        f"seed {args.seed}",
        f"slices: the first of every {args.every} annotated ones",
        "pixels: 4.5 um deep, 6.7 um across",
    )
    read_slices = partial(amd_slices, every=args.every)
    volumes = VolumeSet(title, files, splits, read_slices, AMD_CLASSES)
    return write_volumes(volumes, args.out)


def options(command) -> None:
    """Add the options of `prepare.py duke-dme` and `prepare.py duke-amd`."""
    add = command(duke_dme, "make class maps from the Duke OCT scans with macular edema")
    help = "archive, or its unpacked folder, with Subject_01.mat to Subject_10.mat"
    archives.add_download(add, help)
    add(
        "--out",
        type=Path,
        default="data/duke_dme",
        metavar="DIR",
        help="folder of the new data set (default: %(default)s)",
    )
    add(
        "--annotator",
        choices=("1", "2"),
        default="1",
        help="annotator whose layers and fluid become the masks (default: %(default)s)",
    )

    add = command(duke_amd, "make class maps from the Duke OCT scans with drusen")
    help = "archive or folder with the files Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat, ..."
    archives.add_download(add, help)
    add(
        "--out",
        type=Path,
        default="data/duke_amd",
        metavar="DIR",
        help="folder of the new data set (default: %(default)s)",
    )
    add(
        "--every",
        type=POSITIVE,
        default=10,
        metavar="N",
        help="take one of every N annotated slices, 1 for all (default: %(default)s)",
    )
    add(
        "--seed",
        type=SEED,
        default=0,
        metavar="N",
        help="random seed of the split (default: %(default)s)",
    )
