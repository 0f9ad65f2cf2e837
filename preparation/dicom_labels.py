"""Read label maps that are DICOM files themselves: segmentations (SEG) and contours (RTSTRUCT).

Both name their classes and the series that they belong to. Contours are filled by the rule that a
voxel belongs to a structure if its centre lies inside; contours within contours of one structure
are holes.
"""

from functools import partial
from pathlib import Path

import numpy as np

from imaging import nifti
from preparation import dicom_files, itk_files

AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
SAME = 0.01  # of a voxel; larger deviations are no rounding
BETWEEN_SLICES = 0.25  # of the distance of slices, by which contours may be off their slice
COVERED = "classes overlap; the one with the higher number covers the others"


def referenced_series(path: Path) -> tuple[str, str]:
    """Return the SeriesInstanceUID and StudyInstanceUID that a file refers to, "" if unknown."""
    data = read_all(path)
    study = str(data.get("StudyInstanceUID") or "")
    references = data.get("ReferencedSeriesSequence")
    try:
        if data.Modality == "RTSTRUCT":
            frame = data.ReferencedFrameOfReferenceSequence[0]
            references = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
        return str(references[0].SeriesInstanceUID), study
    except (AttributeError, IndexError, TypeError):
        return "", study


def read_all(path: Path):
    """Return the pydicom.Dataset of a file without its pixels. Raises ValueError, one line."""
    pydicom = dicom_files.import_pydicom(path)
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # pydicom raises many kinds
        raise dicom_files.unreadable(path, error) from None


def class_names(path: Path) -> list[str]:
    """Return the names of the classes of a file. Raises ValueError, one line, for a repetition."""
    data = read_all(path)
    with dicom_files.complete_header(path):
        if data.Modality == "SEG":
            names = [str(item.SegmentLabel).strip() for item in data.SegmentSequence]
        else:
            names = [str(item.ROIName).strip() for item in data.StructureSetROISequence]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"{path}: its {len(names)} classes have {len(set(names))} names: {names}")
    return names


def write_labels(source: Path, numbers: dict[str, int], target: Path, image: Path) -> None:
    """Write a file as a label map on the grid of an image, which is written already.

    numbers: name of a class -> its number; other classes are left out. A higher number covers lower
    ones; how many voxels that concerns is printed. Raises ValueError, one line, if the file does
    not lie on the voxels of the image.
    """
    grid = nifti.read_grid(image)
    data = read_all(source)
    read = segment_masks if data.Modality == "SEG" else contour_masks
    labels = np.zeros(grid.shape, np.uint8)
    covered = 0
    with dicom_files.complete_header(source):
        masks = read(source, data, grid)
        for name, number in numbers.items():
            if name in masks:
                mask = masks[name]()
                covered += np.count_nonzero(labels[mask])
                labels[mask] = number
    if covered:
        nifti.notices.add(COVERED, source, f"{covered:,} voxels")
    itk_files.save_nifti(target, labels, grid.affine)


# --- segmentations --------------------------------------------------------------------------------


def segment_masks(source: Path, data, grid: nifti.Grid) -> dict:
    """Return {name: function that returns the mask (X,Y,Z)} of the segments of a SEG file."""
    if data.get("SegmentationType") != "BINARY":
        kind = str(data.get("SegmentationType") or "without type").lower()
        raise ValueError(
            f"{source}: is a segmentation of the type {kind}; only binary ones are read, save it "
            "as NIfTI, for example with 3D Slicer"
        )
    pixels, _ = dicom_files.read_pixels(source)
    frames = pixels.reshape(-1, *pixels.shape[-2:])  # (frames,H,W)
    shared = data.SharedFunctionalGroupsSequence[0]

    planes = {}  # number of a segment -> [(slice, pixels)]
    for frame, content in zip(data.PerFrameFunctionalGroupsSequence, frames, strict=True):
        segment = dicom_files.frame_item(frame, shared, "SegmentIdentificationSequence")
        z = slice_of_frame(source, frame, shared, grid, content.shape)
        planes.setdefault(int(segment.ReferencedSegmentNumber), []).append((z, content))

    masks = {}
    for item in data.SegmentSequence:
        of_segment = planes.get(int(item.SegmentNumber), [])
        masks[str(item.SegmentLabel).strip()] = partial(stack, of_segment, grid)
    return masks


def slice_of_frame(source: Path, frame, shared, grid: nifti.Grid, size: tuple[int, int]) -> int:
    """Return the slice of the image on which a frame lies. Raises ValueError, one line."""
    part = partial(dicom_files.frame_item, frame, shared)
    row_axis, column_axis = np.reshape(
        np.array(part("PlaneOrientationSequence").ImageOrientationPatient, np.float64), (2, 3)
    )
    between_rows, between_columns = map(float, part("PixelMeasuresSequence").PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = row_axis * between_columns
    affine[:3, 1] = column_axis * between_rows
    affine[:3, 2] = np.cross(row_axis, column_axis)
    affine[:3, 3] = np.array(part("PlanePositionSequence").ImagePositionPatient, np.float64)

    relative = np.linalg.solve(grid.affine, itk_files.LPS_TO_RAS @ affine)
    z = round(relative[2, 3])
    exact = np.eye(4)[:, [0, 1, 3]]
    exact[2, 2] = z
    deviation = np.abs(relative[:3, [0, 1, 3]] - exact[:3]) @ (*size[::-1], 1)
    if size[::-1] != grid.shape[:2] or deviation.max() > SAME or not 0 <= z < grid.shape[2]:
        raise ValueError(
            f"{source}: a frame does not lie on a slice of its series; save it as NIfTI on the "
            "grid of the series, for example with 3D Slicer"
        )
    return z


def stack(planes: list[tuple[int, np.ndarray]], grid: nifti.Grid) -> np.ndarray:
    """Return a mask, bool (X,Y,Z), of (slice, pixels (H,W))."""
    mask = np.zeros(grid.shape, bool)
    for z, pixels in planes:
        mask[:, :, z] |= pixels.T > 0
    return mask


# --- contours -------------------------------------------------------------------------------------


def contour_masks(source: Path, data, grid: nifti.Grid) -> dict:
    """Return {name: function that returns the mask (X,Y,Z)} of the structures of an RTSTRUCT."""
    contours = {}  # number of a structure -> its contours
    for item in data.get("ROIContourSequence") or ():
        contours[int(item.ReferencedROINumber)] = item.get("ContourSequence") or ()

    masks = {}
    for item in data.StructureSetROISequence:
        of_structure = contours.get(int(item.ROINumber), ())
        name = str(item.ROIName).strip()
        masks[name] = partial(fill_contours, source, name, of_structure, grid)
    return masks


def fill_contours(source: Path, name: str, contours, grid: nifti.Grid) -> np.ndarray:
    """Return the voxels inside the contours of a structure, bool (X,Y,Z).

    Contours that are no areas, such as points, are left out. Raises ValueError, one line, for a
    contour between slices or across them.
    """
    mask = np.zeros(grid.shape, bool)
    for contour in contours:
        if contour.get("ContourGeometricType") not in AREAS:
            continue
        points = np.array(contour.ContourData, np.float64).reshape(-1, 3)  # mm in LPS
        points = points * (-1, -1, 1) - grid.affine[:3, 3]
        points = np.linalg.solve(grid.affine[:3, :3], points.T).T  # (N,3), in voxels

        z = round(points[:, 2].mean())
        if np.abs(points[:, 2] - z).max() > BETWEEN_SLICES or not 0 <= z < grid.shape[2]:
            raise ValueError(
                f"{source}: a contour of {name} does not lie on a slice of its series (slice "
                f"{points[:, 2].mean():.2f} of {grid.shape[2]}); save it as NIfTI, for example "
                "with 3D Slicer"
            )
        mask[:, :, z] ^= fill_polygon(points[:, :2], grid.shape[:2])
    return mask


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the voxels with their centre inside a polygon, bool (X,Y).

    points: the corners (N,2), in voxels.
    """
    from matplotlib.path import Path as Polygon

    mask = np.zeros(size, bool)
    low = np.maximum(np.ceil(points.min(0)), 0).astype(int)
    high = np.minimum(np.floor(points.max(0)) + 1, size).astype(int)
    if (low >= high).any():
        return mask
    x, y = np.mgrid[low[0] : high[0], low[1] : high[1]]
    centres = np.column_stack([x.ravel(), y.ravel()])
    inside = Polygon(points).contains_points(centres)
    mask[low[0] : high[0], low[1] : high[1]] = inside.reshape(x.shape)
    return mask
