"""Kept features: what a frozen network makes of images or texts, computed once, in a file.

    path = Path(cache) / f"{fingerprint(weights, settings, content)}.npy"
    rows = keep(path, n, compute, "features of 800 images")  # float16 (n, ...), memory-mapped

The name of the file says what is in it: a changed weight, setting or image is another file. A run
that was killed left whole rows, and the next one goes on behind them.

The file is a .npy of records, each a row and the CRC-32 of its number and its bytes. `keep` checks
all rows and computes damaged ones again; `Rows` checks each row at its first read in a process.
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
    """A hash of named tensors, bit for bit, and of the `repr` of everything else."""
    key = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tensors.items()):
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


@dataclass(frozen=True)
class Header:
    """What the header of a file says: where the rows begin, how many, and their values."""

    size: int  # bytes before the first record
    count: int
    kind: np.dtype  # of the values
    shape: tuple[int, ...]  # of a row

    @property
    def record(self) -> int:
        """Bytes of a record: the row and its checksum."""
        return record_dtype(self.kind, self.shape).itemsize


def record_dtype(kind: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    """Return the dtype of a record: a row of this shape, then its checksum."""
    return np.dtype([("row", kind, shape), ("checksum", "<u4")])


def checksum(number: int, values) -> int:
    """Return the CRC-32 of a row's number and of its bytes, so that a row has a place, too."""
    return zlib.crc32(values, number)


def is_intact_row(number: int, record: bytes) -> bool:
    """Return True if a record's checksum is that of its number and row."""
    values = memoryview(record)[:-4]
    return checksum(number, values) == int.from_bytes(record[-4:], "little")


def read_header(file: BinaryIO) -> Header | None:
    """Return the header of an open file, which then stands at the first record.

    None if it is damaged, or if it is of an older version, whose rows had no checksum.
    """
    try:
        version = npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
    except Exception:  # numpy raises errors of many kinds for the bytes of a damaged header
        return None
    if version != (1, 0):  # another one would be read by other rules
        return None
    if dtype.names != ("row", "checksum") or len(shape) != 1:
        return None
    values = dtype["row"].base
    row_shape = dtype["row"].shape
    if dtype != record_dtype(values, row_shape):
        return None
    return Header(file.tell(), shape[0], values, row_shape)


def damaged_rows(file: BinaryIO, header: Header) -> Iterator[int]:
    """Yield the numbers of all rows that are missing, cut or changed, reading the whole file."""
    file.seek(header.size)
    numbers = range(header.count)
    for number in tqdm(numbers, "check", unit="row", disable=None, leave=False):
        record = file.read(header.record)
        if len(record) < header.record or not is_intact_row(number, record):
            yield number


def whole_rows(part: Path, n: int, kind: np.dtype) -> int:
    """Return how many whole rows a killed run left; cut away the first damaged one and the rest.

    None are left of a file whose header does not say n rows of `kind`.
    """
    if not part.is_file():
        return 0
    with open(part, "rb+") as file:
        header = read_header(file)
        if header is not None and (header.count, header.kind) == (n, kind):
            done = next(damaged_rows(file, header), header.count)
            file.truncate(header.size + done * header.record if done else 0)
            return done
    part.unlink()
    return 0


def keep(
    path: Path, n: int, compute: Callable[[int], Iterator[Tensor]], what: str, dtype="float16"
) -> np.ndarray:
    """Rows 0 to n-1 as `dtype` (n, ...), mapped read-only from `path`, computed if it is not there.

    dtype: float16 or float32. `compute(start)` yields the rows from number `start` on, tensors of
    one shape. The size is told before anything is written. Rows of a file that are damaged are
    computed again, as is a whole file of an older version; a printed line says so. Raises OSError,
    one line, if the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(dtype).newbyteorder("<")
    # Another run may be at the same file: wait for it.
    with FileLock(path.with_suffix(".lock")), full_disk_errors(path):
        if path.is_file() and not _repair(path, n, compute, kind):
            print(f"{path}: damaged or of an older version; computing all of it again", flush=True)
            path.unlink()
        if not path.is_file():
            _compute(path, n, compute, what, kind)
    return np.load(path, mmap_mode="r")["row"]


def _repair(path: Path, n: int, compute: Callable, kind: np.dtype) -> bool:
    """Compute the damaged rows of a file again, in place; False if its header is not right.

    Other runs may have mapped the file: it is not replaced and never becomes shorter.
    """
    with open(path, "rb+") as file:
        header = read_header(file)
        if header is None or (header.count, header.kind) != (n, kind):
            return False
        damaged = list(damaged_rows(file, header))
        if not damaged:
            return True
        count = f"{len(damaged)} of {n} rows are damaged, the first is row {damaged[0]}"
        print(f"{path}: {count}; computing them again", flush=True)

        for start, length in _runs(damaged):
            for number, tensor in enumerate(islice(compute(start), length), start):
                if tuple(tensor.shape) != header.shape:
                    return False
                file.seek(header.size + number * header.record)
                file.write(_record(number, tensor, kind))
        file.flush()
        os.fsync(file.fileno())
    return True


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as runs of consecutive ones: (first, length) each."""
    runs = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            first, length = runs.pop()
            runs.append((first, length + 1))
        else:
            runs.append((number, 1))
    return runs


def _record(number: int, tensor: Tensor, kind: np.dtype) -> bytes:
    """Return the bytes of a row and its checksum."""
    values = tensor.to("cpu").numpy().astype(kind).tobytes()
    return values + checksum(number, values).to_bytes(4, "little")


def _compute(path: Path, n: int, compute: Callable, what: str, kind: np.dtype) -> None:
    """Writes the file of `keep`."""
    part = path.with_suffix(".part")
    start = whole_rows(part, n, kind)
    with open(part, "ab") as file, tqdm(None, what, n, False, initial=start, disable=None) as bar:
        for number, tensor in enumerate(compute(start) if start < n else (), start):
            record = _record(number, tensor, kind)
            if number == start:
                need = (n - start) * len(record)
                free = shutil.disk_usage(path.parent).free
                print(f"keeping {what} in {path} ({need / 1e6:,.1f} MB)", flush=True)
                if need > free:
                    short = f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
                    raise OSError(f"{path.parent}: {short}; choose another folder with --cache")
            if number == 0:
                descr = npy.dtype_to_descr(record_dtype(kind, tuple(tensor.shape)))
                head = {"descr": descr, "fortran_order": False, "shape": (n,)}
                npy.write_array_header_1_0(file, head)
            file.write(record)
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Rows:
    """The rows of a file that `keep` made, as tensors.

    They are read, not mapped: a mapped file that becomes shorter kills the process that reads it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._header = None
        self._checked = None

    def __getstate__(self):
        return {"path": self.path, "_header": None, "_checked": None}

    def __getitem__(self, i: int) -> Tensor:
        """Return row i, of the dtype that it was kept in.

        Raises OSError, one line, if the file was damaged since `keep` checked it. Each process
        checks a row when it reads it for the first time.
        """
        if self._header is None:
            with open(self.path, "rb") as file:
                self._header = read_header(file)
            if self._header is None:
                raise self._damaged("the header")
            self._checked = np.zeros(self._header.count, bool)
        header = self._header
        dtype = record_dtype(header.kind, header.shape)
        place = header.size + i * header.record
        records = np.fromfile(self.path, dtype, count=1, offset=place)
        if len(records) < 1:
            raise self._damaged(f"row {i}")
        values = np.ascontiguousarray(records["row"][0])
        if not self._checked[i]:
            if checksum(i, values) != records["checksum"][0]:
                raise self._damaged(f"row {i}")
            self._checked[i] = True
        return torch.from_numpy(values)

    def _damaged(self, what: str) -> OSError:
        hint = "run again with --resume, which computes it again"
        return OSError(f"{self.path}: {what} was damaged while this run read it; {hint}")
