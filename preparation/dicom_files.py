"""Find DICOM files, read their headers and decode their pixels, with pydicom.

Many DICOM files have no ending: the letters DICM at byte 128 tell. Names, birth dates and numbers
of patients are never written to a data set; patients become "patient 1", "patient 2", … in the
order of their PatientID.
"""

import functools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imaging import layouts

ENDINGS = (".dcm", ".dicom", ".ima")
SLICES = ("CT", "MR", "PT")  # modalities of volumes
LABELS = ("SEG", "RTSTRUCT")  # segmentations and contours
NO_IMAGES = (*LABELS, "SR", "PR", "KO", "RTPLAN", "RTDOSE", "REG", "DOC")
CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
TAGS = [
    "SOPClassUID", "Modality", "ImageType", "PatientID", "StudyInstanceUID", "SeriesInstanceUID",
    "SeriesNumber", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "ImagerPixelSpacing", "RescaleSlope", "RescaleIntercept", "SequenceOfUltrasoundRegions",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A DICOM file and what its header says, a pydicom.Dataset of TAGS."""

    path: Path
    data: object

    @property
    def modality(self) -> str:
        """Return CT, MR, DX, US, …, "" if it is not stated."""
        return str(self.data.get("Modality") or "")

    @property
    def is_slice(self) -> bool:
        """Return True for an image of a volume: it has a position in the patient."""
        has_position = (
            "ImagePositionPatient" in self.data and "ImageOrientationPatient" in self.data
        )
        has_frames = "PerFrameFunctionalGroupsSequence" in self.data
        return self.modality in SLICES and "Rows" in self.data and (has_position or has_frames)

    @property
    def is_label(self) -> bool:
        """Return True for segmentations and contours."""
        return self.modality in LABELS

    @property
    def patient(self) -> str:
        """Return the PatientID, or the study if there is none."""
        return str(self.data.get("PatientID") or self.data.get("StudyInstanceUID") or "").strip()


def import_pydicom(path: Path):
    """Return the module pydicom. Raises ValueError, one line, if it is not installed."""
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ValueError(f"{path}: DICOM files need pydicom: pip install pydicom") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


# --- finding and reading headers ------------------------------------------------------------------


def is_dicom(path: Path) -> bool:
    """Return True for a file with an ending of DICOM, or without an ending and with DICM in it."""
    suffix = path.suffix.lower()
    if suffix in ENDINGS:
        return True
    if suffix and not suffix[1:].isdigit():  # a UID as a name ends in digits
        return False
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def dicom_paths(folder: Path) -> list[Path]:
    """Return the DICOM files below a folder, sorted."""
    return [path for path in layouts.files_below(folder, with_masks=True) if is_dicom(path)]


def read_headers(paths: list[Path]) -> list[Header]:
    """Return the headers of files. Raises ValueError, one line, for a damaged file."""
    headers = []
    for path in tqdm(paths, desc="DICOM headers", unit="file", disable=None, leave=False):
        status = path.stat()
        headers.append(read_header(path, status.st_size, status.st_mtime_ns))
    return headers


@functools.lru_cache(maxsize=20_000)
def read_header(path: Path, size: int, changed: int) -> Header:
    """Return the header of a file; size and time of change tell if it is another file by now."""
    pydicom = import_pydicom(path)
    try:
        data = pydicom.dcmread(
            path, stop_before_pixels=True, force=True, specific_tags=TAGS, defer_size=2**16
        )
        is_header = "SOPClassUID" in data or "Rows" in data
    except Exception as error:  # pydicom raises many kinds
        raise unreadable(path, error) from None
    if not is_header:
        raise unreadable(path, ValueError("it has no such header"))
    return Header(path, data)


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error about a damaged file, one line."""
    lines = str(error).splitlines()
    reason = lines[0] if lines else type(error).__name__
    return ValueError(f"{path}: not readable as DICOM ({reason}); replace the file")


@contextmanager
def complete_header(path: Path):
    """Turn the errors about missing parts of a header into a ValueError of one line."""
    try:
        yield
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path}: its header is not complete ({error}); export the file again"
        ) from None


def frame_item(frame, shared, sequence: str, default=None):
    """Return the item of a sequence in the header of a frame, else in that of all frames."""
    items = frame.get(sequence) or shared.get(sequence)
    return items[0] if items else default


def count_modalities(headers: list[Header]) -> str:
    """Return the number of files of each modality: "120 CT, 3 SR"."""
    counts = Counter(header.modality or "without modality" for header in headers)
    return ", ".join(f"{n} {modality}" for modality, n in counts.most_common())


def number_patients(headers: list[Header]) -> dict[str, str]:
    """Return {PatientID: "patient 1"}, numbered in the order of the sorted IDs."""
    patients = sorted({header.patient for header in headers})
    return {patient: f"patient {k}" for k, patient in enumerate(patients, 1)}


# --- pixels ---------------------------------------------------------------------------------------


def read_pixels(path: Path, raw: bool = True) -> tuple[np.ndarray, object]:
    """Return the pixels of a file and its pydicom.Dataset.

    raw: values as stored, (H,W), (frames,H,W) or (H,W,3); else colours are RGB. Raises ValueError,
    one line, for a damaged file, or a compression that needs another package.
    """
    pydicom = import_pydicom(path)
    try:
        data = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in data.file_meta:
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        syntax = data.file_meta.TransferSyntaxUID
    except Exception as error:  # pydicom raises many kinds
        raise unreadable(path, error) from None

    try:
        return pydicom.pixels.pixel_array(data, raw=raw), data
    except Exception as error:
        if syntax.is_compressed and "Unable to dec" in str(error):
            raise ValueError(
                f"{path}: its compression, {syntax.name}, needs more packages: {CODECS} (or the "
                "file is damaged)"
            ) from None
        raise unreadable(path, error) from None
