"""Convert volumes and label maps that SimpleITK reads (NRRD, MetaImage) to NIfTI.

Voxels keep their values. Positions are those of the file: ITK counts in LPS (to the left, back and
head), NIfTI in RAS. 3D Slicer's .seg.nrrd files name their segments, may overlap in several layers,
and cover only a part of the image's grid.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaging import nifti

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
INTEGERS = (np.uint8, np.int16, np.int32)  # those that every program reads in NIfTI


def simple_itk(path: Path):
    """Return the module SimpleITK. Raises ValueError, one line, if it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise ValueError(
            f"{path}: NRRD and MetaImage files need SimpleITK: pip install SimpleITK"
        ) from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # the errors below say what matters
    return SimpleITK


def read_itk(path: Path):
    """Return a file as an image of SimpleITK with three axes.

    Raises ValueError, one line, if the file is damaged or has other axes.
    """
    itk = simple_itk(path)
    with one_line_errors(path):
        image = itk.ReadImage(str(path))
    if image.GetDimension() != 3 or image.GetDepth() < 2:
        size = " x ".join(map(str, image.GetSize()))
        raise ValueError(f"{path}: holds {size} voxels; it needs three axes of space")
    return image


@contextmanager
def one_line_errors(path: Path):
    """Turn the errors of ITK about a file into a ValueError of one line."""
    try:
        with quiet_stderr():
            yield
    except RuntimeError as error:
        raise ValueError(f"{path}: not readable ({last_line(error)}); replace the file") from None


@contextmanager
def quiet_stderr():
    """Hide what the C++ code of ITK prints about a file; the error that it raises is enough."""
    sys.stderr.flush()
    saved = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def last_line(error: Exception) -> str:
    """Return the part of an error of ITK that says what is wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or lines[-1].startswith("Reason:"):  # an unrelated number of the system
        return "its header or voxels are damaged, missing or not whole"
    return lines[-1].removeprefix("sitk::ERROR: ")


def affine_of(image) -> np.ndarray:
    """Return the affine (4,4) of an image of SimpleITK: indices -> mm in RAS."""
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (3, 3))
    affine[:3, :3] = direction * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


def voxels_of(image) -> np.ndarray:
    """Return the voxels of an image of SimpleITK, (X,Y,Z) or, of several channels, (X,Y,Z,C)."""
    import SimpleITK

    voxels = SimpleITK.GetArrayFromImage(image)  # (Z,Y,X) or (Z,Y,X,C)
    return np.moveaxis(voxels, (0, 1, 2), (2, 1, 0))


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write voxels (X,Y,Z) or (X,Y,Z,C) to a NIfTI file; whole numbers in the smallest type."""
    import nibabel

    if voxels.dtype.kind in "iub":
        voxels = voxels.astype(smallest_type(voxels))
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def smallest_type(voxels: np.ndarray) -> type:
    """Return the first of INTEGERS that holds all values. Raises ValueError if none does."""
    for dtype in INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= voxels.min() and voxels.max() <= limits.max:
            return dtype
    raise ValueError(f"whole numbers up to {voxels.max()} are too large for NIfTI; scale them")


def to_nifti(source: Path, target: Path) -> None:
    """Write a file that SimpleITK reads as NIfTI. Raises ValueError, one line, as `read_itk`."""
    image = read_itk(source)
    try:
        save_nifti(target, voxels_of(image), affine_of(image))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


# --- segmentations of 3D Slicer -------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A segment of a .seg.nrrd file."""

    name: str
    number: int  # in the voxels of its layer
    layer: int


def read_segments(path: Path) -> list[Segment]:
    """Return the segments that the header of a .seg.nrrd file names, in the order of the file.

    Raises ValueError, one line, if the file is damaged or names no segments, or one name twice.
    """
    itk = simple_itk(path)
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    with one_line_errors(path):
        reader.ReadImageInformation()
    fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}

    segments = []
    while f"Segment{len(segments)}_Name" in fields:
        prefix = f"Segment{len(segments)}_"
        name = fields[prefix + "Name"].strip()
        number = int(fields.get(prefix + "LabelValue", 1))
        segments.append(Segment(name, number, int(fields.get(prefix + "Layer", 0))))

    names = {segment.name for segment in segments}
    if not segments or len(names) < len(segments):
        raise ValueError(
            f"{path}: names {len(segments)} segments, {len(names)} different ones; save it with 3D "
            "Slicer, with a name for each segment"
        )
    return segments


COVERED = "segments overlap; the one with the higher number covers the others"


def write_segments(source: Path, target: Path, image: Path, numbers: dict[str, int]) -> None:
    """Write a .seg.nrrd file as a label map on the grid of an image.

    numbers: name of a segment -> its number in the label map; other segments are left out. A higher
    number covers lower ones; how many voxels that concerns is printed. Raises ValueError, one line,
    if the voxels are not among those of the image.
    """
    grid = nifti.read_grid(image)
    stored = read_itk(source)
    layers = voxels_of(stored)
    layers = layers.reshape(*layers.shape[:3], -1)  # (X,Y,Z,layers)

    labels = np.zeros(layers.shape[:3], np.uint8)
    covered = 0
    segments = {segment.name: segment for segment in read_segments(source)}
    for name, number in numbers.items():
        if name in segments:
            mask = layers[..., segments[name].layer] == segments[name].number
            covered += np.count_nonzero(labels[mask])
            labels[mask] = number
    if covered:
        nifti.notices.add(COVERED, source, f"{covered:,} voxels")

    labels, affine = turned_like(grid, labels, affine_of(stored))
    whole = np.zeros(grid.shape, np.uint8)
    whole[position_in(grid, labels.shape, affine, source)] = labels
    save_nifti(target, whole, grid.affine)


def turned_like(grid: nifti.Grid, voxels: np.ndarray, affine: np.ndarray) -> tuple:
    """Return voxels (X,Y,Z) with their axes ordered and directed like a grid's, and the affine."""
    from nibabel import orientations

    axes = orientations.io_orientation(np.linalg.solve(grid.affine, affine))
    turned = orientations.apply_orientation(voxels, axes)
    return turned, affine @ orientations.inv_ornt_aff(axes, voxels.shape)


def position_in(grid: nifti.Grid, shape: tuple, affine: np.ndarray, source: Path) -> tuple:
    """Return the slices of a grid's voxels on which a smaller grid of an affine lies.

    Raises ValueError, one line, if their voxels differ, or if it is not inside.
    """
    relative = np.linalg.solve(grid.affine, affine)  # (4,4), indices -> indices of the image
    start = np.rint(relative[:3, 3]).astype(int)
    end = start + shape

    exact = np.eye(4)
    exact[:3, 3] = start
    deviation = np.abs(relative - exact)
    distance = deviation[:3, :3] @ shape + deviation[:3, 3]  # in voxels, at the far corner
    if distance.max() > nifti.OFF_GRID:
        raise ValueError(
            f"{source}: its voxels are not those of its image; in 3D Slicer choose the image as "
            "source geometry and save the segmentation again"
        )
    if start.min() < 0 or (end > grid.shape).any():
        raise ValueError(
            f"{source}: covers the voxels {start.tolist()} to {(end - 1).tolist()}, but its image "
            f"has {grid.shape}; choose the image as source geometry in 3D Slicer"
        )
    return tuple(slice(a, b) for a, b in zip(start, end, strict=True))
