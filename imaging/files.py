"""Read text, JSON and CSV of users and other programs, and name formats that are not supported.

All such files of the house are read with these functions. They may have a byte order mark or be in
UTF-16.
"""

import codecs
import csv
import io
import json
import re
from pathlib import Path

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Line ends stay as they are. Raises OSError if the file cannot be read, ValueError if it is not
    such text.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(content: bytes, name) -> str:
    """Decode bytes as `read_text` does. Raises ValueError, which starts with `name`."""
    encoding = "utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: is not text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None


def read_json(path: Path):
    """Return the content of a JSON file.

    Raises OSError if the file cannot be read, ValueError if it is not JSON, is nested too deeply,
    repeats a key in an object, or holds a lone surrogate (half a character, which could not be
    printed or written).
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, name):
    """Return the content of a JSON text. Raises ValueError as `read_json` does, with `name`."""
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply for a file of this kind") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}: holds half a character (a lone \\ud8…); write it again"
        ) from None
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{name}: is not valid JSON ({error})") from None

    return content


def json_text(content) -> str:
    """Return the text of a JSON file that people read: indented, and no letter is escaped."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these keys and values. Raises ValueError if a key is repeated."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is repeated in one object")
    return content


def read_csv(path: Path) -> list[dict]:
    """Return the rows of a CSV file as {column: text}; a missing cell is None.

    Raises OSError if the file cannot be read, ValueError if it is not valid CSV.
    """
    lines = io.StringIO(read_text(path), newline="")
    try:
        return list(csv.DictReader(lines, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: is not valid CSV ({error})") from None


# --- formats that are known, but not supported ----------------------------------------------------

SIMPLEITK = 'SimpleITK.WriteImage(SimpleITK.ReadImage("IN"), "OUT.nii.gz")'
WITH_SIMPLEITK = f"convert it to .nii.gz ({SIMPLEITK}), or a single image to PNG"
IMPORT = "convert its folder with python prepare.py import FOLDER --out DATA"
WITH_NIBABEL = "save a volume as .nii.gz, for example with nibabel, and a single image as PNG"
TO_PNG = "save it as PNG"
FORMATS = [  # name, endings, first bytes, what to do; the first row that matches a file counts
    (
        "DICOM",
        (".dcm", ".dicom", ".ima"),
        (),  # it begins with 128 arbitrary bytes
        f"{IMPORT} (it needs pydicom)",
    ),
    ("NRRD", (".nrrd", ".nhdr"), (b"NRRD",), f"{IMPORT} (it needs SimpleITK)"),
    (
        "MetaImage",
        (".mha", ".mhd"),
        (b"ObjectType", b"NDims"),
        f"{IMPORT} (it needs SimpleITK)",
    ),
    (
        "MGH",
        (".mgh", ".mgz"),
        (b"\0\0\0\1\0\0",),
        "convert it to .nii.gz (mri_convert IN OUT.nii.gz of FreeSurfer)",
    ),
    ("MINC", (".mnc",), (b"CDF\1",), "convert it to .nii.gz (mnc2nii IN OUT.nii)"),
    ("Analyze", (".img",), (), WITH_SIMPLEITK),
    ("HDF5", (".h5", ".hdf5", ".hdf"), (b"\x89HDF",), WITH_NIBABEL),
    ("NumPy", (".npy", ".npz"), (b"\x93NUMPY",), WITH_NIBABEL),
    ("MATLAB", (".mat",), (b"MATLAB 5.0",), WITH_NIBABEL),
    ("HEIC", (".heic", ".heif"), (), "save it as PNG or JPEG"),
    ("a camera's raw format", (".dng", ".nef", ".cr2", ".arw"), (), TO_PNG),
    ("PDF", (".pdf",), (b"%PDF",), "save its pages as PNG"),
    ("PostScript or SVG", (".ps", ".eps", ".svg"), (b"%!PS",), TO_PNG),
    ("Photoshop or GIMP", (".psd", ".xcf"), (b"gimp xcf",), TO_PNG),
    (
        "video",
        (".mp4", ".avi", ".mov", ".mkv", ".mpg", ".mpeg", ".wmv", ".webm"),
        (),
        "save its frames as PNG, for example with ffmpeg",
    ),
    (
        "whole-slide",
        (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif"),
        (),
        "cut it into tiles, for example with QuPath, and save them as PNG",
    ),
    ("a microscope's raw format", (".czi", ".lif", ".nd2", ".oib"), (), TO_PNG),
    (
        "Git LFS (only a pointer to the file)",
        (),
        (b"version https://git-lfs",),
        "run git lfs pull in its folder",
    ),
]


def describe_foreign(path: Path, start: bytes) -> str | None:
    """Return a message about a file of one of FORMATS, None for all other files.

    start: at least the first 132 bytes of the file, or all of a shorter one. The message names the
    file, the format and what to do.
    """
    for name, endings, first_bytes, hint in FORMATS:
        has_ending = path.name.lower().endswith(endings)
        is_dicom = name == "DICOM" and start[128:132] == b"DICM"
        if has_ending or is_dicom or start.startswith(first_bytes):
            return f"{path}: {name} is not read; {hint}"
    return None
