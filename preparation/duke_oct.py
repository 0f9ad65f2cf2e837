"""Class maps from Duke's OCT scans: macular edema (DME) and drusen (AMD)."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.ranges import POSITIVE, SEED
from imaging import atomic_files, pictures
from preparation import volume_sets
from preparation.demo import png
from preparation.uw_madison import ENDS, make_splits, write_notes

# Two sets of retinal OCT of Sina Farsiu's group at Duke, each volume ("subject") a MATLAB file:
# Chiu 2015 (people.duke.edu/~sf59/Chiu_BOE_2014_dataset.htm, also kaggle.com/datasets/
# paultimothymooney/chiu-2015): ten volumes with diabetic macular edema, eleven annotated slices in
# each; Farsiu 2014 (.../~sf59/RPEDC_Ophth_2013_dataset.htm, also .../farsiu-2014): 269 volumes with
# drusen of age-related macular degeneration and 115 without.
#
# Both hold the boundaries between layers as a row for each column, which MATLAB counts from 1; a
# number is the centre of a pixel. A pixel belongs to the layer under the last boundary at or above
# its centre: a boundary at row 5.0 has that row below it, one at 5.2 begins with row 6.

DME_CLASSES = "background", "NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE-OS", "RPE", "fluid"
DME_AXES = {"images": "H W N", "manualLayers{}": "8 W N", "manualFluid{}": "H W N"}
DME_SPLITS = {k: "train" if k < 5 else "val" if k == 5 else "test" for k in range(1, 11)}
AMD_CLASSES = "background", "ILM to RPEDC", "RPEDC", "below BM"
AMD_AXES = {"images": "H W N", "layerMaps": "N W 3"}  # here the slice comes first


def find_volumes(root, pattern):
    """{patient: file} below `root`, a patient being what the pattern's groups match, in order."""
    found = {}
    for path in sorted(root.rglob("[!.]*.mat"), key=lambda path: path.name):  # in whatever folders
        if match := re.fullmatch(pattern, path.name):
            same = found.setdefault("".join(match.groups()).lower(), path)
            if same != path:
                raise ValueError(f"{path}: there is {same} as well; keep one of the two")
    return found


def read_mat(path, axes):
    """The arrays of a MATLAB file. ValueError, one line, if they are not what `axes` say.

    axes: {"images": "H W N", ...}, where a letter is a size that is the same wherever it stands.
    """
    from scipy.io import loadmat  # slow to import, and only these two need it

    hint = "download it again"
    try:
        found = loadmat(path, variable_names=list(axes))
    except NotImplementedError:
        hint = "the original is of version 5: download it again, or save it with -v7 in MATLAB"
        raise ValueError(f"{path}: a MATLAB 7.3 (HDF5) file; {hint}") from None
    except Exception as error:  # of damaged files OSError, IndexError, TypeError, zlib.error, ...
        raise ValueError(f"{path}: not readable as a MATLAB file ({error}); {hint}") from None
    if lost := [key for key in axes if key not in found]:
        raise ValueError(f"{path}: has no {', '.join(lost)}; {hint}")
    sizes = {}
    for key, names in axes.items():
        shape, pairs = found[key].shape, list(zip(names.split(), found[key].shape, strict=False))
        wanted = [int(n) if n.isdigit() else sizes.setdefault(n, size) for n, size in pairs]
        if len(shape) != len(names.split()) or list(shape) != wanted:
            said = f"{key} is {' '.join(map(str, shape))}, expected {names}"
            known = ", ".join(f"{n} {size}" for n, size in sizes.items())
            raise ValueError(f"{path}: {said} with {known}; {hint}")
        if found[key].dtype.kind not in "uif":
            raise ValueError(f"{path}: {key} holds no numbers; {hint}")
    images = found["images"]
    if not (images.min() >= 0 and 1 < images.max() <= 255):  # NaN too
        said = f"{images.min():g} to {images.max():g}, expected grey values of 0 to 255"
        raise ValueError(f"{path}: images holds {said}")
    return [found[key] for key in axes]


MISPLACED = 0.01  # largest share of a volume's annotated columns with boundaries out of place


def without_misplaced(path, key, boundaries, height):
    """Return boundaries (N,L,W) where columns with boundaries out of place are NaN.

    From top to bottom each boundary must lie less than one row above the one before it, the last
    not above the first, and all within the image, to within one row. Raises ValueError, one line,
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
        shown = ", ".join(f"{row:g}" for row in rows[slice_number, :, column])
        reason = f"outside the image's rows 1 to {height}"
        if disordered[slice_number, column]:
            reason = "not in order from top to bottom"
        raise ValueError(
            f"{path}: {key} has {misplaced.sum():,} of {complete.sum():,} columns with boundaries "
            f"out of place, first in slice {slice_number}, column {column}: rows {shown} are "
            f"{reason}; download it again"
        )
    return np.where(misplaced[:, None], np.nan, boundaries)


def layer_map(boundaries, height):
    """Rows of boundaries, float (L,W) -> uint8 (H,W): how many lie at or above each pixel's centre.

    Columns without all of them are 255, "does not count": to call them background would be untrue.
    """
    rows = np.arange(1, height + 1)[:, None]  # (H,1)
    mask = (boundaries[:, None] <= rows).sum(0).astype(np.uint8)  # (L,1,W) to (L,H,W) to (H,W)
    mask[:, ~np.isfinite(boundaries).all(0)] = 255
    return mask


def annotated_slices(images, boundaries, every=1):
    """Yields number (from 0), image and layer map, both uint8 (H,W), of slices with whole columns.

    images (H,W,N), boundaries (N,L,W); `every` takes the first of so many such slices.
    """
    whole = np.isfinite(boundaries).all(1).any(1)  # (N,)
    for n in np.flatnonzero(whole)[::every].tolist():
        image = images[..., n].astype(np.uint8)  # (H,W)
        yield n, image, layer_map(boundaries[n], len(image))


def dme_slices(path, annotator):
    """The slices of a volume of Chiu 2015; fluid lies over the layers."""
    axes = {key.format(annotator): names for key, names in DME_AXES.items()}
    images, layers, fluid = read_mat(path, axes)
    layers = np.moveaxis(layers, 2, 0)  # (N,8,W)
    layers = without_misplaced(path, f"manualLayers{annotator}", layers, len(images))
    for n, image, mask in annotated_slices(images, layers):
        mask[mask == 8] = 0  # under the last boundary: background again, as above the first
        mask[(fluid[..., n] > 0) & (mask != 255)] = 8  # the regions are numbered; NaN is none
        yield n, image, mask


def amd_slices(path, every):
    """The slices of a volume of Farsiu 2014."""
    images, layers = read_mat(path, AMD_AXES)
    layers = layers.swapaxes(1, 2)  # (N,3,W)
    layers = without_misplaced(path, "layerMaps", layers, len(images))
    yield from annotated_slices(images, layers, every)


def write_volume(path, slices, name, folder, classes):
    """Writes the slices of a volume; returns how many, and of what: slices that show a class,
    columns that do not count. ValueError if there is no slice."""
    found = Counter()
    for n, image, mask in slices(path):
        whole = mask[0] != 255  # (W,), a column is 255 from top to bottom
        first, last = np.flatnonzero(whole)[[0, -1]]
        keep = slice(first, last + 1)  # beyond nothing is known, and some margins are plain white
        image, mask = np.ascontiguousarray(image[:, keep]), np.ascontiguousarray(mask[:, keep])
        (folder / "images" / f"{name}_slice{n:02}.png").write_bytes(png(image))
        picture = pictures.class_map(mask, len(classes))
        picture.save(folder / "masks" / f"{name}_slice{n:02}.png")
        found.update({"slices": 1, "columns": mask.shape[1], "gaps": int((~whole[keep]).sum())})
        found.update(classes[k] for k in np.unique(mask) if k != 255)
    if not found:
        raise ValueError(f"{path}: no slice has a column with all boundaries; download it again")
    return found


def describe_scans(splits, found, classes):
    """What was made of the volumes, line by line; `found` is what write_volume counted."""
    for split in "train", "val", "test":
        ours = [name for name in splits if splits[name] == split]
        counts = sum((found[name] for name in ours), Counter())
        shown = ", ".join(f"{k} in {counts[k]:,}" for k in classes[1:])
        yield f"{split}: {counts['slices']:,} slices of {len(ours)} patients; {shown}"
    counts = sum(found.values(), Counter())
    gaps = f"{counts['gaps']:,} of {counts['columns']:,} columns lack a boundary and are 255"
    yield f"slices are cut to their annotated columns; within these {gaps}: they do not count"
    yield "a boundary out of order or outside the image counts as lacking"
    yield "a boundary's rows count from 1; the pixel whose centre it meets lies below it"
    yield "masks are palette images: read their indices, not their colours"
    yield "slices are numbered from 0; scores by patient: --group-regex '[a-z]+[0-9]+'"


def write_volumes(args, title, files, splits, slices, classes):
    """Writes a data set of {patient: file} and {patient: split}, whole or not at all."""
    files, found = {name: files[name] for name in splits}, {}
    with atomic_files.whole_folder(args.out) as part:
        make_splits(part, ("train", "val", "test"))
        bar = tqdm(total=len(files), desc=args.out.name, unit="volume", disable=None, leave=False)
        with ThreadPoolExecutor(4) as pool, bar:  # 4: each holds up to 400 MB
            folders = [part / splits[name] for name in files]
            jobs = files.values(), repeat(slices), files, folders, repeat(classes)
            for name, counts in zip(files, pool.map(write_volume, *jobs), strict=True):
                found[name] = counts
                bar.update()
        lines = *title, *describe_scans(splits, found, classes)
        said = write_notes(part, classes, lines)
    print(f"{args.out}: {said}")
    return 0


def duke_dme(args):
    """Makes class maps of seven retinal layers and fluid from Duke's OCT with macular edema.

    The usual division: subjects 1 to 5 to train, 6 to 10 to test; of the former the last, 5, is
    held out to validate on. Only slices whose layers the annotator outlined are taken.
    """
    atomic_files.refuse_existing(args.out)
    files = find_volumes(args.download, r"(Subject)_(\d\d)\.mat")
    splits = {f"subject{k:02}": split for k, split in DME_SPLITS.items()}
    if lost := [name.replace("subject", "Subject_") for name in splits if name not in files]:
        hint = "DOWNLOAD is the unpacked folder, with all ten in it or below"
        raise FileNotFoundError(f"{args.download}: no {', '.join(lost)} (.mat); {hint}")
    title = (
        f"Duke OCT with macular edema (Chiu 2015), annotator {args.annotator}",
        "pixels: about 3.87 um deep, 11.3 um across",
        f"fluid: manualFluid{args.annotator} above 0; where it is NaN, none",
    )
    slices = partial(dme_slices, annotator=args.annotator)
    return write_volumes(args, title, files, splits, slices, DME_CLASSES)


def duke_amd(args):
    """Makes class maps of retina and drusen complex from Duke's OCT of age-related degeneration.

    The drusen complex (RPEDC) reaches from the inner border of the pigment epithelium, drusen
    with it, to Bruch's membrane (BM). Patients are dealt at random, 70 % train, 15 % val, 15 % test
    of those with AMD and of the controls each. Neighbouring slices are 0.067 mm apart and look
    alike, hence --every 10: some 3,000 of 30,000 slices.
    """
    atomic_files.refuse_existing(args.out)
    pattern = r"Farsiu_Ophthalmology_2013_(AMD|Control)_Subject_(\d+)\.mat"
    files = find_volumes(args.download, pattern)
    rng, splits = np.random.default_rng(args.seed), {}
    kinds = {kind: [name for name in files if name.startswith(kind)] for kind in ("amd", "control")}
    for names in kinds.values():
        splits |= volume_sets.deal(names, ENDS["case"], rng)
    if lost := ENDS["case"].keys() - splits.values():
        have = ", ".join(f"{len(names)} files {kind}" for kind, names in kinds.items())
        hint = "expected Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat and so on"
        raise FileNotFoundError(f"{args.download}: {have}, {min(lost)} would be empty; {hint}")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    title = (
        f"Duke OCT with and without AMD (Farsiu 2014): {counts}; seed {args.seed}",
        f"slices: the first of every {args.every} annotated ones",
        "pixels: 4.5 um deep, 6.7 um across",
    )
    slices = partial(amd_slices, every=args.every)
    return write_volumes(args, title, files, splits, slices, AMD_CLASSES)


def options(command):
    """Describe `prepare.py duke-dme` and `prepare.py duke-amd`."""
    add = command(duke_dme, "make class maps from the Duke OCT scans with macular edema")
    add("download", type=Path, metavar="DOWNLOAD", help="folder with Subject_01.mat to _10.mat")
    add("--out", type=Path, default="data/duke_dme", metavar="DIR", help="to make (%(default)s)")
    add("--annotator", choices=("1", "2"), default="1", help="whose layers and fluid (%(default)s)")

    add = command(duke_amd, "make class maps from the Duke OCT scans with drusen")
    help = "folder with Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat and so on"
    add("download", type=Path, metavar="DOWNLOAD", help=help)
    add("--out", type=Path, default="data/duke_amd", metavar="DIR", help="to make (%(default)s)")
    help = "take the first of every N annotated slices; 1: all, ten times the files (%(default)s)"
    add("--every", type=POSITIVE, default=10, metavar="N", help=help)
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")
