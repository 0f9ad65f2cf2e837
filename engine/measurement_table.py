"""The measurements.csv of a prediction, which a call with --skip-existing continues."""

import csv
import io
import itertools
from pathlib import Path

from engine import tables
from imaging import files

MEASUREMENTS = "measurements.csv"


def name_cell(name: str) -> str:
    """Return the name of a case as UTF-8; bytes of another encoding are written as \\udcff."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class MeasurementTable:
    """Rows of measurements by case and class, in memory and in a file.

    The file is always whole: it is replaced by `write`, never extended.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], classes: tuple[str, ...]):
        """Read the rows of earlier calls, if the file exists.

        columns: of the measurements. classes: those that this call predicts. Raises ValueError, one
        line, if the file is not such a table.
        """
        self.path = path
        self.columns = ("name", "class", "mask", *columns)
        self.classes = classes
        self.rows = {}  # (name of a case, class) -> row
        self.is_changed = False
        if path.is_file():
            self.read()

    def read(self) -> None:
        """Read the rows of the file; their cells stay texts."""
        lines = io.StringIO(files.read_text(self.path), newline="")
        reader = csv.DictReader(lines, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(
                f"{self.path}, line {reader.line_num}: is damaged ({error}); remove the file to "
                "measure all cases again"
            ) from None

        is_complete = all(None not in row and None not in row.values() for row in rows)
        if tuple(reader.fieldnames or ()) != self.columns or not is_complete:
            raise ValueError(
                f"{self.path}: has other columns than this call writes; choose another --out, or "
                "remove the file to measure all cases again"
            )
        for row in rows:
            self.rows[row["name"], row["class"]] = row

    def has(self, name: str, cells: dict) -> bool:
        """Return True if there is a row with these cells for every class of a case.

        Raises ValueError, one line, if the masks of the case were predicted with another prompt.
        """
        for class_name in self.classes:
            row = self.rows.get((name_cell(name), class_name))
            if row is None:
                return False
            for column, value in cells.items():
                is_equal = str(row[column]) == ("" if value is None else str(value))
                if not is_equal and column == "prompt":
                    raise ValueError(
                        f"{self.path}: {name} was predicted with the prompt “{row[column]}”; "
                        "choose another --out"
                    )
                if not is_equal:
                    return False
        return True

    def add(self, name: str, rows: list[dict]) -> None:
        """Add the rows of a case, or replace those of an earlier call."""
        name = name_cell(name)
        for row in rows:
            self.rows[name, row["class"]] = {"name": name} | row
        self.is_changed = True

    def write(self, names) -> None:
        """Write all rows: those of other cases as they were, then those of `names` in this order.

        So the file does not depend on how often a call was stopped and continued.
        """
        others = dict(self.rows)
        ordered = []
        for key in itertools.product(map(name_cell, names), self.classes):
            if key in others:
                ordered.append(others.pop(key))
        tables.write_csv(self.path, [*others.values(), *ordered])
        self.is_changed = False
