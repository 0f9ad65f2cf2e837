"""Read series of DICOM slices as volumes, with their label maps.

Slices belong to a series by SeriesInstanceUID. They are sorted by their position along the normal
of ImageOrientationPatient, from which their distance is taken as well. Voxels are in the units of
the header, Hounsfield units of CT. A series with a missing, repeated or tilted slice is refused.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from imaging import layouts
from preparation import dicom_files, dicom_labels, import_volumes, itk_files, volume_pairs
from preparation.dicom_files import Header
from preparation.readings import Format, VolumeCase, VolumeReading, split_of_folder
from preparation.volume_pairs import Pair

FEWEST = 3  # slices; a series of fewer is a localizer
SAME_POSITION = 0.01  # mm; slices that are nearer than this are repeated
UNEVEN = 0.1  # of the distance of slices; less is rounding in the header
TILT = 0.5  # pixels by which the first and last slice may be shifted against each other


@dataclass(frozen=True)
class Slice:
    """A slice of a series: a file, or a frame of a file with several."""

    path: Path
    frame: int
    position: np.ndarray  # (3,), centre of the first pixel, mm in LPS
    axes: np.ndarray  # (2,3), unit vectors along a row and along a column of the image
    spacing: tuple[float, float]  # mm, along a row and along a column
    size: tuple[int, int]  # columns, rows
    slope: float
    intercept: float


@dataclass(frozen=True)
class Series:
    """The slices of a SeriesInstanceUID."""

    name: str
    key: str  # the path of its folder without words such as images
    names: frozenset[str]  # by which a label map may be named, in the form of `plain`
    headers: list[Header]

    @property
    def folder(self) -> Path:
        """Return the folder of the first file."""
        return self.headers[0].path.parent

    @property
    def is_localizer(self) -> bool:
        """Return True for the few slices with which a scan is planned."""
        data = self.headers[0].data
        frames = len(self.headers) * int(data.get("NumberOfFrames") or 1)
        return "LOCALIZER" in (data.get("ImageType") or ()) or frames < FEWEST


# --- slices ---------------------------------------------------------------------------------------


def slices_of(header: Header) -> list[Slice]:
    """Return the slice of a file, or those of an enhanced CT or MR with several frames.

    Raises ValueError, one line, if the header does not say where they are.
    """
    data = header.data
    frames = data.get("PerFrameFunctionalGroupsSequence") or [data]
    shared = data.get("SharedFunctionalGroupsSequence") or [data]
    if int(data.get("NumberOfFrames") or 1) != len(frames):
        raise ValueError(
            f"{header.path}: has {data.NumberOfFrames} frames, but positions of {len(frames)}; "
            "convert it with dcm2niix"
        )

    slices = []
    try:
        for k, frame in enumerate(frames):
            slices.append(make_slice(header, k, frame, shared[0]))
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{header.path}: its header does not say where the slice lies ({error})"
        ) from None
    return slices


def make_slice(header: Header, number: int, frame, shared) -> Slice:
    """Return a slice from the parts of a header: of a frame, and of all frames."""
    # Files of one slice have no sequences: the header itself says where the slice lies.
    part = partial(dicom_files.frame_item, frame, shared, default=header.data)
    orientation = part("PlaneOrientationSequence").ImageOrientationPatient
    between_rows, between_columns = part("PixelMeasuresSequence").PixelSpacing
    values = part("PixelValueTransformationSequence")
    slope = values.get("RescaleSlope")
    return Slice(
        header.path,
        number,
        np.array(part("PlanePositionSequence").ImagePositionPatient, np.float64),
        np.array(orientation, np.float64).reshape(2, 3),
        (float(between_columns), float(between_rows)),
        (int(header.data.Columns), int(header.data.Rows)),
        1.0 if slope is None else float(slope),
        float(values.get("RescaleIntercept") or 0),
    )


def sorted_slices(series: Series) -> list[Slice]:
    """Return the slices of a series in the order of their position.

    Raises ValueError, one line, unless they form a box of voxels.
    """
    slices = []
    for header in series.headers:
        slices += slices_of(header)
    first = slices[0]
    for other in slices:
        is_alike = other.size == first.size and np.allclose(other.spacing, first.spacing, 1e-3)
        if not is_alike or not np.allclose(other.axes, first.axes, atol=1e-3):
            raise ValueError(
                f"{series.folder}: {other.path.name} has another size, pixel spacing or "
                f"orientation than {first.path.name}, in one series; move such slices away"
            )

    normal = np.cross(*first.axes)
    slices.sort(key=lambda item: float(item.position @ normal))
    refuse_gaps(series, slices, np.array([item.position @ normal for item in slices]))
    refuse_tilt(series, slices, normal)
    return slices


def refuse_gaps(series: Series, slices: list[Slice], positions: np.ndarray) -> None:
    """Raise ValueError, one line, if slices are repeated, missing or unevenly spaced.

    positions: of the slices along their normal, in mm, ascending.
    """
    gaps = np.diff(positions)
    repeated = np.flatnonzero(gaps < SAME_POSITION)
    if repeated.size:
        k = repeated[0]
        raise ValueError(
            f"{series.folder}: {slices[k].path.name} and {slices[k + 1].path.name} lie at the same "
            f"position, {positions[k]:.2f} mm, and {repeated.size - 1} more slices are repeated; "
            "keep one copy, or one time point, echo or b-value"
        )

    even = np.linspace(positions[0], positions[-1], len(positions))
    distance = np.median(gaps)
    if np.abs(positions - even).max() <= UNEVEN * distance:
        return
    k = int(gaps.argmax())
    between = f"between {slices[k].path.name} and {slices[k + 1].path.name}"
    if gaps[k] > 1.5 * distance:
        raise ValueError(
            f"{series.folder}: {round(gaps[k] / distance) - 1} slices are missing {between}: they "
            f"are {gaps[k]:.2f} mm apart, the others {distance:.2f} mm; add the missing files"
        )
    raise ValueError(
        f"{series.folder}: its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart, the "
        f"widest gap {between}; resample the series to even slices"
    )


def refuse_tilt(series: Series, slices: list[Slice], normal: np.ndarray) -> None:
    """Raise ValueError, one line, if the stack leans to a side, as with a tilted gantry."""
    path = slices[-1].position - slices[0].position
    along = float(path @ normal)
    drift = float(np.linalg.norm(path - along * normal))
    if drift > TILT * min(slices[0].spacing):
        degrees = np.degrees(np.arctan2(drift, along))
        raise ValueError(
            f"{series.folder}: its slices are tilted by {degrees:.1f} degrees against the stack; "
            "dcm2niix corrects a tilted gantry and writes .nii.gz"
        )


# --- volumes --------------------------------------------------------------------------------------


def affine_of(slices: list[Slice]) -> np.ndarray:
    """Return the affine (4,4) of sorted slices: column, row and slice -> mm in RAS."""
    first = slices[0]
    normal = np.cross(*first.axes)
    distance = float((slices[-1].position - first.position) @ normal) / (len(slices) - 1)

    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing[0]
    affine[:3, 1] = first.axes[1] * first.spacing[1]
    affine[:3, 2] = normal * distance
    affine[:3, 3] = first.position
    return itk_files.LPS_TO_RAS @ affine


def read_voxels(slices: list[Slice]) -> np.ndarray:
    """Return the voxels of sorted slices (X,Y,Z): int16 if they are whole numbers, else float32.

    Raises ValueError, one line, for damaged, compressed or coloured files.
    """
    columns, rows = slices[0].size
    volume = np.empty((columns, rows, len(slices)), np.float32)
    frames = {}  # the last file with several frames
    for k, item in enumerate(slices):
        if item.path not in frames:
            pixels, data = dicom_files.read_pixels(item.path)
            if data.get("SamplesPerPixel", 1) != 1:
                raise ValueError(f"{item.path}: is in colour; a volume holds grey values")
            frames = {item.path: pixels.reshape(-1, *pixels.shape[-2:])}
        pixels = frames[item.path][item.frame]
        volume[:, :, k] = pixels.T * np.float64(item.slope) + item.intercept

    is_whole = (volume == np.rint(volume)).all()
    if is_whole and volume.min() >= -(2**15) and volume.max() < 2**15:
        return volume.astype(np.int16)
    return volume


def write_series(slices: list[Slice], target: Path) -> None:
    """Write sorted slices to a NIfTI file."""
    itk_files.save_nifti(target, read_voxels(slices), affine_of(slices))


# --- series ---------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """Return a name in lower case with its words joined by underscores."""
    return "_".join(volume_pairs.words_of(name)).lower()


def find_series(headers: list[Header], folder: Path) -> list[Series]:
    """Return the series of slices, sorted by their folder and number."""
    by_uid = {}
    for header in headers:
        by_uid.setdefault(str(header.data.get("SeriesInstanceUID") or ""), []).append(header)

    keys = {}  # UID -> key of its folder
    for uid, files in by_uid.items():
        parts, _ = volume_pairs.folder_parts(files[0].path.parent.relative_to(folder))
        keys[uid] = volume_pairs.join_key(parts)
    count = Counter(keys.values())

    series = []
    for uid, files in by_uid.items():
        key = keys[uid]
        name = key or folder.name
        if count[key] > 1:
            name += f"_{files[0].data.get('SeriesNumber') or 0}"
        parts = [*key.split("/"), name, uid, files[0].patient]
        names = frozenset(plain(part) for part in parts if part)
        series.append(Series(name, key, names, files))
    return sorted(series, key=lambda item: item.name)


def find_labels(
    series: list[Series], headers: list[Header], folder: Path, args: Namespace
) -> dict[int, Path]:
    """Return {index of a series: its label map}: other files, else segmentations in DICOM.

    Raises ValueError, one line, if a label map fits no series or several, or a series has two.
    """
    files = [volume_pairs.named(path, folder) for path in volume_pairs.volume_files(folder)]
    if any(file.is_label for file in files):
        files = [file for file in files if file.is_label]
    candidates = {file.path: series_of_name(series, file.key) for file in files}
    if not candidates:
        for header in headers:
            if header.is_label:
                candidates[header.path] = series_of_reference(series, header.path)

    label_of = {}
    for path, indices in candidates.items():
        if not indices and args.skip_unpaired:
            continue
        if len(indices) != 1:
            raise ValueError(
                f"{path}: {len(indices) or 'no'} series of DICOM files fit this label map; name it "
                "like the folder, the PatientID or the SeriesInstanceUID of one"
            )
        if indices[0] in label_of:
            raise ValueError(
                f"{path}: a second label map besides {label_of[indices[0]]}; move one away"
            )
        label_of[indices[0]] = path
    return label_of


def series_of_name(series: list[Series], key: str) -> list[int]:
    """Return the indices of the series that fit the key of a label map."""
    indices = [i for i, item in enumerate(series) if item.key == key]
    if len(indices) == 1:
        return indices
    name = plain(key.split("/")[-1])
    return [i for i, item in enumerate(series) if name in item.names] or indices


def series_of_reference(series: list[Series], path: Path) -> list[int]:
    """Return the indices of the series that a SEG or RTSTRUCT file refers to, else of its study."""
    uid, study = dicom_labels.referenced_series(path)
    of_series = []
    of_study = []
    for i, item in enumerate(series):
        data = item.headers[0].data
        if data.get("SeriesInstanceUID") == uid:
            of_series.append(i)
        if data.get("StudyInstanceUID") == study:
            of_study.append(i)
    return of_series or of_study


def recognise(folder: Path, args: Namespace) -> list[VolumeReading]:
    """Return the reading of a folder of DICOM series, [] without slices of volumes."""
    paths = [] if args.images else dicom_files.dicom_paths(folder)
    headers = dicom_files.read_headers(paths)
    all_series = find_series([header for header in headers if header.is_slice], folder)
    series = [item for item in all_series if not item.is_localizer]
    if not series:
        if all_series and not any(map(layouts.is_image, layouts.files_below(folder))):
            raise ValueError(
                f"{folder}: its DICOM series are localizers or have fewer than {FEWEST} slices; "
                "single slices need masks as PNG files of the same name"
            )
        return []

    label_of = find_labels(series, headers, folder, args)
    refuse_unlabelled(series, label_of, args)
    if label_of:
        series = [series[i] for i in sorted(label_of)]
    label_files = [label_of[i] for i in sorted(label_of)]
    labels, numbers = name_classes(folder, args, label_files)
    cases = make_cases(series, label_files, numbers, folder)
    modality = args.modality or modality_of(series, folder)

    count = dicom_files.count_modalities(headers)
    summary = [f"{import_volumes.count_cases(cases)}, DICOM files: {count}"]
    left_out = len(all_series) - len(cases)
    if left_out:
        summary.append(f"series left out, localizers or without a label map: {left_out}")
    if label_files:
        summary.append(f"label maps: {layouts.count_kinds(label_files)}")
    return [VolumeReading("dicom", summary, cases, labels, modality)]


def refuse_unlabelled(series: list[Series], label_of: dict[int, Path], args: Namespace) -> None:
    """Raise ValueError, one line, if only some series have a label map."""
    unlabelled = [item for i, item in enumerate(series) if i not in label_of]
    if label_of and unlabelled and not args.skip_unpaired:
        raise ValueError(
            f"{unlabelled[0].folder}: the series {unlabelled[0].name} has no label map, and "
            f"{len(unlabelled) - 1} more series lack theirs; add it, or leave such series out with "
            "--skip-unpaired"
        )


def name_classes(
    folder: Path, args: Namespace, label_files: list[Path]
) -> tuple[dict, dict[str, int]]:
    """Return the labels of dataset.json and, of files that name their classes, {name: number}."""
    if not any(map(dicom_files.is_dicom, label_files)):
        return import_volumes.name_classes(folder, args, label_files)
    names = [dicom_labels.class_names(path) for path in label_files]
    return import_volumes.number_names(names, args, folder)


def modality_of(series: list[Series], folder: Path) -> str:
    """Return the modality of all series. Raises ValueError, one line, if there are several."""
    modalities = sorted({item.headers[0].modality for item in series})
    if len(modalities) > 1:
        raise ValueError(
            f"{folder}: holds series of {' and '.join(modalities)}; import each from a folder of "
            "its own"
        )
    return modalities[0]


def make_cases(
    series: list[Series], label_files: list[Path], numbers: dict[str, int], folder: Path
) -> list[VolumeCase]:
    """Return the cases of series. Raises ValueError, one line, for a series with gaps.

    label_files: those of the series, or []. numbers: name of a class in them -> its number.
    """
    patients = dicom_files.number_patients([item.headers[0] for item in series])
    cases = []
    for k, item in enumerate(series):
        slices = sorted_slices(item)
        write_labels = None
        if label_files:
            write_labels = label_writer(item, label_files[k], numbers)
        group = patients[item.headers[0].patient]
        split = split_of_folder(item.folder.relative_to(folder))
        write_image = partial(write_series, slices)
        cases.append(VolumeCase(item.name, write_image, write_labels, split, group))
    return cases


def label_writer(series: Series, label: Path, numbers: dict[str, int]) -> Callable:
    """Return the function that writes the label map of a series."""
    if dicom_files.is_dicom(label):
        return partial(dicom_labels.write_labels, label, numbers)
    pair = Pair(series.name, (series.headers[0].path,), label)
    return partial(import_volumes.write_label_map, pair, numbers)


FORMATS = (
    Format(
        "dicom",
        "series of CT, MR or PET slices, label maps in DICOM (SEG, RTSTRUCT), NIfTI, NRRD or "
        "MetaImage",
        recognise,
    ),
)
