"""Cache the features that a frozen network computes for images or texts in a file.

    path = Path(cache) / f"{fingerprint(weights, settings, content)}.npy"
    rows = keep(path, n, compute, "features of 800 images")  # float16 (n,…), memory-mapped

The name of the file depends on all that decides its content: with another weight, setting or image
it is another file. A killed run leaves complete rows, and the next run continues after them.

The file is a .npy of records, each a row and the CRC-32 of its index and bytes. `cache_rows` checks
all rows and computes damaged ones again; `CachedRows` checks each row the first time a process
reads it.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from imaging.atomic_files import full_disk_errors


def fingerprint(tensors: dict[str, Tensor], *settings) -> str:
    """Return a hash of named tensors, bit for bit, and of the `repr` of the settings."""
    key = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tensors.items()):
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


# --- the format of the file -----------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The header of a file: where its rows begin, their number and format."""

    size: int  # bytes before the first record
    count: int  # rows
    kind: np.dtype  # of the values
    shape: tuple[int, ...]  # of a row

    @property
    def record(self) -> int:
        """Return the size of a record in bytes: a row and its checksum."""
        return record_dtype(self.kind, self.shape).itemsize


def record_dtype(kind: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    """Return the dtype of a record: a row of this shape, then its checksum."""
    return np.dtype([("row", kind, shape), ("checksum", "<u4")])


def checksum(number: int, values) -> int:
    """Return the CRC-32 of a row's index and bytes, so that exchanged rows are found as well."""
    return zlib.crc32(values, number)


def is_intact_row(number: int, record: bytes) -> bool:
    """Return True if the checksum of a record is that of its index and row."""
    values = memoryview(record)[:-4]
    return checksum(number, values) == int.from_bytes(record[-4:], "little")


def read_header(file: BinaryIO) -> Header | None:
    """Return the header of an open file and move to its first record.

    None if it is damaged, or of an older version whose rows had no checksum.
    """
    try:
        version = npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
    except Exception:  # numpy raises errors of many kinds for a damaged header
        return None
    if version != (1, 0):  # read_array_header_1_0 reads no other
        return None
    if dtype.names != ("row", "checksum") or len(shape) != 1:
        return None

    kind = dtype["row"].base
    row_shape = dtype["row"].shape
    if dtype != record_dtype(kind, row_shape):
        return None
    return Header(file.tell(), shape[0], kind, row_shape)


def _record(number: int, tensor: Tensor, kind: np.dtype) -> bytes:
    """Return the bytes of a row and its checksum."""
    values = tensor.to("cpu").numpy().astype(kind).tobytes()
    return values + checksum(number, values).to_bytes(4, "little")


def damaged_rows(file: BinaryIO, header: Header) -> Iterator[int]:
    """Yield the indices of all rows that are missing, cut or changed, reading the whole file."""
    file.seek(header.size)
    numbers = range(header.count)
    for number in tqdm(numbers, "check", unit="row", disable=None, leave=False):
        record = file.read(header.record)
        if len(record) < header.record or not is_intact_row(number, record):
            yield number


# --- computing the rows ---------------------------------------------------------------------------


def cache_rows(
    path: Path, n: int, compute: Callable[[int], Iterator[Tensor]], what: str, dtype="float16"
) -> np.ndarray:
    """Return rows 0 to n-1 as `dtype` (n,…), mapped read-only from `path`; compute missing ones.

    dtype: float16 or float32. `compute(start)` yields the rows from index `start` on, tensors of
    one shape. what: a description for messages. The size is printed before anything is written.
    Damaged rows are computed again, as is a whole file of an older version, with a message. Raises
    OSError if the disk has no room for the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(dtype).newbyteorder("<")
    # Another run may be writing the same file: wait for it.
    with FileLock(path.with_suffix(".lock")), full_disk_errors(path):
        if path.is_file() and not _repair(path, n, compute, kind):
            print(f"{path}: damaged or of an older version; computing all of it again", flush=True)
            path.unlink()
        if not path.is_file():
            _compute(path, n, compute, what, kind)
    return np.load(path, mmap_mode="r")["row"]


def _repair(path: Path, n: int, compute: Callable, kind: np.dtype) -> bool:
    """Compute the damaged rows of a file again, in place; return False if its header is wrong.

    Other runs may have mapped the file, so it is not replaced and never becomes shorter.
    """
    with open(path, "rb+") as file:
        header = read_header(file)
        if header is None or (header.count, header.kind) != (n, kind):
            return False
        damaged = list(damaged_rows(file, header))
        if not damaged:
            return True
        print(
            f"{path}: {len(damaged)} of {n} rows are damaged, the first is row {damaged[0]}; "
            "computing them again",
            flush=True,
        )

        for start, length in _runs(damaged):
            tensors = islice(compute(start), length)
            for number, tensor in enumerate(tensors, start):
                if tuple(tensor.shape) != header.shape:
                    return False
                file.seek(header.size + number * header.record)
                file.write(_record(number, tensor, kind))
        file.flush()
        os.fsync(file.fileno())
    return True


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as runs of consecutive ones, (first, length) each."""
    runs = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            first, length = runs.pop()
            runs.append((first, length + 1))
        else:
            runs.append((number, 1))
    return runs


def _compute(path: Path, n: int, compute: Callable, what: str, kind: np.dtype) -> None:
    """Write the file of `cache_rows`, continuing the one that a killed run left."""
    part = path.with_suffix(".part")
    start = whole_rows(part, n, kind)
    tensors = compute(start) if start < n else ()
    with open(part, "ab") as file, tqdm(None, what, n, False, initial=start, disable=None) as bar:
        for number, tensor in enumerate(tensors, start):
            record = _record(number, tensor, kind)
            if number == start:
                _announce(path, what, (n - start) * len(record))
            if number == 0:
                _write_header(file, n, record_dtype(kind, tuple(tensor.shape)))
            file.write(record)
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def whole_rows(part: Path, n: int, kind: np.dtype) -> int:
    """Return the number of complete rows that a killed run left; cut off the damaged rest.

    A file whose header does not say n rows of `kind` is removed.
    """
    if not part.is_file():
        return 0
    with open(part, "rb+") as file:
        header = read_header(file)
        if header is not None and (header.count, header.kind) == (n, kind):
            complete = next(damaged_rows(file, header), header.count)
            file.truncate(header.size + complete * header.record if complete else 0)
            return complete
    part.unlink()
    return 0


def _announce(path: Path, what: str, need: int) -> None:
    """Print the size of the rows that are computed, in bytes. Raises OSError if they do not fit."""
    free = shutil.disk_usage(path.parent).free
    print(f"caching {what} in {path} ({need / 1e6:,.1f} MB)", flush=True)
    if need > free:
        raise OSError(
            f"{path.parent}: {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; choose "
            "another folder with --cache"
        )


def _write_header(file: BinaryIO, n: int, dtype: np.dtype) -> None:
    """Write the .npy header of n records."""
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
    npy.write_array_header_1_0(file, header)


# --- reading the rows -----------------------------------------------------------------------------


class CachedRows:
    """The rows of a file that `cache_rows` wrote, as tensors.

    The file is not memory-mapped: if a mapped file becomes shorter, the process that reads it dies.
    """

    def __init__(self, path: Path):
        self.path = path
        self._header = None
        self._checked = None  # bool (n,): rows that this process has checked

    def __getstate__(self):
        return {"path": self.path, "_header": None, "_checked": None}

    def __getitem__(self, i: int) -> Tensor:
        """Return row i in the dtype of the file.

        Each process checks a row when it reads it for the first time. Raises OSError if the file
        was damaged since `cache_rows` checked it.
        """
        if self._header is None:
            self._open()
        header = self._header
        dtype = record_dtype(header.kind, header.shape)
        start = header.size + i * header.record
        records = np.fromfile(self.path, dtype, count=1, offset=start)
        if len(records) < 1:
            raise self._damaged(f"row {i}")

        values = np.ascontiguousarray(records["row"][0])
        if not self._checked[i]:
            if checksum(i, values) != records["checksum"][0]:
                raise self._damaged(f"row {i}")
            self._checked[i] = True
        return torch.from_numpy(values)

    def _open(self) -> None:
        """Read the header. Raises OSError if it is damaged."""
        with open(self.path, "rb") as file:
            self._header = read_header(file)
        if self._header is None:
            raise self._damaged("the header")
        self._checked = np.zeros(self._header.count, bool)

    def _damaged(self, part: str) -> OSError:
        """Return the error about a damaged part of the file."""
        return OSError(
            f"{self.path}: {part} was damaged while this run read it; run again with --resume, "
            "which computes it again"
        )
