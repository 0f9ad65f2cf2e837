"""Kept features: what a frozen network makes of images or texts, computed once, in a file.

    path = Path(cache) / f"{fingerprint(weights, settings, content)}.npy"
    rows = keep(path, n, compute, "features of 800 images")  # float16 (n, ...), memory-mapped

The name of the file says what is in it: a changed weight, setting or image is another file. A run
that was killed left whole rows, and the next one goes on behind them.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm


def fingerprint(tensors: dict[str, Tensor], *settings) -> str:
    """A hash of named tensors, bit for bit, and of the `repr` of everything else."""
    key = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tensors.items()):
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


def whole_rows(part: Path) -> int:
    """How many rows a killed run left; a row that was cut, or a cut header, is taken away."""
    try:
        with open(part, "rb+") as file:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            header, size = file.tell(), int(np.prod(shape[1:])) * dtype.itemsize
            done = (part.stat().st_size - header) // size
            file.truncate(header + done * size if done else 0)
            return done
    except FileNotFoundError:
        return 0
    except ValueError:
        part.unlink()
        return 0


def keep(
    path: Path, n: int, compute: Callable[[int], Iterator[Tensor]], what: str, dtype="float16"
) -> np.ndarray:
    """Rows 0 to n-1 as `dtype` (n, ...), mapped read-only from `path`, computed if it is not there.

    dtype: float16 or float32. `compute(start)` yields the rows from number `start` on, tensors of
    one shape. The size is told before anything is written. Raises OSError, one line, if the disk
    has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another run may be at the same file: wait for it
        if not path.is_file():
            _compute(path, n, compute, what, np.dtype(dtype).newbyteorder("<"))
    return np.load(path, mmap_mode="r")


def _compute(path: Path, n: int, compute: Callable, what: str, kind: np.dtype) -> None:
    """Writes the file of `keep`."""
    part = path.with_suffix(".part")
    start = whole_rows(part)
    with open(part, "ab") as file, tqdm(None, what, n, False, initial=start, disable=None) as bar:
        for number, tensor in enumerate(compute(start) if start < n else (), start):
            row = tensor.to("cpu").numpy().astype(kind)
            if number == start:
                need, free = (n - start) * row.nbytes, shutil.disk_usage(path.parent).free
                print(f"keeping {what} in {path} ({need / 1e6:,.1f} MB)", flush=True)
                if need > free:
                    short = f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
                    raise OSError(f"{path.parent}: {short}; choose another folder with --cache")
            if number == 0:
                head = {"descr": kind.str, "fortran_order": False, "shape": (n, *row.shape)}
                npy.write_array_header_1_0(file, head)
            file.write(row.tobytes())
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Rows:
    """The rows of a file that `keep` made, as tensors; mapped on first use, in each process."""

    def __init__(self, path: Path):
        self.path, self._rows = path, None

    def __getstate__(self):
        return {"path": self.path, "_rows": None}  # pickling a memory map would copy it

    def __getitem__(self, i: int) -> Tensor:
        """Row i, of the dtype that it was kept in."""
        if self._rows is None:
            self._rows = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(self._rows[i].copy())
