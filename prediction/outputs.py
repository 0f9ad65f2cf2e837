"""Check, write and count the files of one call of predict.py."""

import errno
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine import command_line, tables
from engine.measurement_table import MEASUREMENTS, MeasurementTable
from imaging import files, image_files, layouts, pictures

LONGEST_NAME = 245  # bytes of an output's name: temporary names have 10 more, and 255 is the limit


def check_outputs(paths: list[Path], out: Path, may_exist: bool = False) -> None:
    """Raise ValueError, one line, unless all files are new, different and inside the folder `out`.

    Links are followed, as writing would do. may_exist: files may exist already (--skip-existing).
    Called before anything is written.
    """
    folder = out.resolve()
    targets = {}  # the file behind all links -> path
    for path in paths:
        target = path.resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"{path}: lies outside --out {out} (at {target}); nothing was written")
        if os.path.lexists(path) and not (may_exist and path.is_file()):
            advice = "" if may_exist else ", or continue an earlier call with --skip-existing"
            raise ValueError(
                f"{path} exists already and is not overwritten; choose another --out{advice}"
            )
        if target in targets:
            raise ValueError(
                f"{path} would be written twice: two inputs have the same name, or one is named "
                "like a file that is added (legend.png, NAME_overlay.png); rename it"
            )
        targets[target] = path
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise ValueError(f"{path}: the name is too long for a file; rename the input")

    check_parents(targets)


def check_parents(targets: dict[Path, Path]) -> None:
    """Raise ValueError, one line, if a file is in the way of the folder of another file.

    targets: file behind all links -> path.
    """
    for folder in {path.parent for path in targets.values()}:
        ancestors = (folder, *folder.parents)
        nearest = next(path for path in ancestors if os.path.lexists(path))
        if not nearest.is_dir():
            raise ValueError(f"{nearest}: is no folder, so nothing can be written below it")

    for target, path in targets.items():
        for parent in target.parents:
            if parent in targets:
                raise ValueError(f"{path}: {targets[parent]} would be a file and a folder")


def save_shared(path: Path, content: dict | Image.Image) -> None:
    """Write a file that belongs to all cases of a call: the names of classes, or the legend."""
    if isinstance(content, dict):
        tables.write_json(path, content)
    else:
        pictures.save_picture(path, content)


def has_content(path: Path, content: dict | Image.Image) -> bool:
    """Return True if a file holds what `save_shared` would write."""
    try:
        if isinstance(content, dict):
            return files.read_json(path) == {str(key): value for key, value in content.items()}
        return np.array_equal(image_files.read_image(path), np.asarray(content.convert("RGB")))
    except ValueError:
        return False


def one_line(error: Exception, name: str) -> str:
    """Return an error about a case as one line that contains the case's name."""
    line = " ".join(str(error).split())
    return line if Path(name).name in line else f"{name}: {line}"


class Batch:
    """The files of one call: those that exist, those to write, and the inputs that failed.

    An input that fails does not end the call; all of them are listed at the end. The measurements
    of all cases are in one file. It is replaced when a case is finished, but not more often than
    every few seconds, and a case without measurements is not finished: after a kill it is predicted
    again.
    """

    LISTED = 20  # failed inputs that are listed at the end
    SAVE_EVERY = 10.0  # seconds between two writings of the measurements

    def __init__(self, args, predictor, cases: dict[str, dict[str, Path]], shared: dict, pages=()):
        """Check all files before anything is written.

        predictor: an ImagePredictor or a VolumePredictor. cases: name -> the case's files by kind,
        in the order in which they are written. shared: file -> content, for files that belong to
        all cases. pages: further files, of the contact sheet, which are replaced like the table of
        measurements. Raises ValueError, one line, if a file cannot be written.
        """
        self.out = Path(args.out)
        self.unit = predictor.unit
        self.cases = cases
        self.shared = shared
        self.failed = []  # a line for each input that could not be predicted
        self.written = 0

        if not cases:
            raise ValueError(f"the inputs hold no {self.unit}s, so there is nothing to predict")
        table_path = self.out / MEASUREMENTS
        paths = [table_path, *shared, *pages]
        for case_files in cases.values():
            paths += case_files.values()
        check_outputs(paths, self.out, args.skip_existing)
        for path, content in shared.items():
            if path.exists() and not has_content(path, content):
                raise ValueError(f"{path}: is of other classes; choose another --out")

        classes = layouts.foreground(tuple(predictor.classes))
        self.table = MeasurementTable(table_path, predictor.columns, classes)
        self.saved_at = time.monotonic()
        self.finished = set()  # names of the cases that an earlier call has predicted
        for name, case_files in cases.items():
            cells = predictor.known_cells(name)  # here, as a spacing.csv may be damaged
            is_written = all(path.exists() for path in case_files.values())
            if is_written and self.table.has(name, cells):
                self.finished.add(name)
        if self.finished:
            count = f"{len(self.finished)} of {len(cases)} {self.unit}s"
            print(f"{count} are predicted already and were skipped (--skip-existing)")

    def run(self, predict_case: Callable) -> int:
        """Predict all cases that are not finished and write their files. Return the exit status.

        predict_case: name of a case -> {kind: function that writes the file of this kind}, and the
        rows of its measurements; its errors about an input are collected. Raises OSError, one line,
        if a file cannot be written, and ValueError, one line, if no input could be predicted.
        """
        remaining = [name for name in self.cases if name not in self.finished]
        for name in tqdm(remaining, desc="predict", unit=self.unit, disable=None):
            try:
                writers, rows = predict_case(name)
            except (ValueError, OSError) as error:
                self.failed.append(one_line(error, name))
                continue
            except (MemoryError, RuntimeError) as error:
                if not command_line.is_out_of_memory(error):
                    raise
                self.failed.append(f"{name}: does not fit into memory")
                continue

            self.write_shared()
            for kind, path in self.cases[name].items():
                self.write(path, writers[kind])
            del writers  # gigabytes for volumes
            self.written += 1
            self.table.add(name, rows)
            if time.monotonic() - self.saved_at > self.SAVE_EVERY:
                self.write_measurements()
        return self.conclude()

    def write_measurements(self) -> None:
        """Replace the table of measurements."""
        self.save(self.table.path, lambda _: self.table.write(self.cases))
        self.saved_at = time.monotonic()

    def write_shared(self) -> None:
        """Write the files that belong to all cases, if they are missing."""
        for path, content in self.shared.items():
            self.write(path, partial(save_shared, content=content))

    def write(self, path: Path, save: Callable) -> None:
        """Write a file with save(path), unless an earlier call has written it."""
        if not path.exists():
            self.save(path, save)

    def save(self, path: Path, save: Callable) -> None:
        """Write a file with save(path). Raises OSError, one line, if that fails."""
        try:
            if not self.out.is_dir():
                raise FileNotFoundError(f"the folder {self.out} is gone")
            save(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the line about a full disk names the file
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise OSError(
                f"{path}: cannot be written ({error.strerror or error}); the finished files are "
                "whole; correct this, then continue with --skip-existing"
            ) from None

    def conclude(self) -> int:
        """Print what was written, list the failed inputs, and return the exit status."""
        if len(self.failed) == len(self.cases):
            first = self.failed[0]
            if len(self.failed) == 1:
                raise ValueError(first)
            raise ValueError(f"none of {len(self.failed)} {self.unit}s could be predicted; {first}")

        self.write_shared()
        if self.table.is_changed:
            self.write_measurements()
        masks = {"image": "masks", "volume": "volumes"}[self.unit]
        print(f"{self.written} {masks} in {self.out}", flush=True)
        if not self.failed:
            return 0

        print(
            f"error: {len(self.failed)} of {len(self.cases)} {self.unit}s could not be predicted; "
            "correct or remove them, then continue with --skip-existing",
            file=sys.stderr,
        )
        for line in self.failed[: self.LISTED]:
            print(f"  {line}", file=sys.stderr)
        if len(self.failed) > self.LISTED:
            print(f"  and {len(self.failed) - self.LISTED} more", file=sys.stderr)
        return 1
