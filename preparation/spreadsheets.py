"""Read the first sheet of an Excel file (.xlsx) as texts.

An .xlsx file is a ZIP archive of XML files. `xl/workbook.xml` lists the sheets, and
`xl/_rels/workbook.xml.rels` their files. A cell holds its text itself (an inline string), or the
index of a text in `xl/sharedStrings.xml`, or a number. Formulas are not computed: the file holds
their last results.
"""

import io
import lzma
import posixpath
import re
import struct
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

from imaging.files import describe_foreign

LARGEST = 200_000_000  # bytes that a part of the archive may have when it is unpacked
UNREADABLE = (
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    ElementTree.ParseError,
    EOFError,
    LookupError,  # a shared string, a part of the archive or an encoding that does not exist
    OSError,  # a damaged stream of bzip2; the file itself is in memory
    lzma.LZMAError,
    RuntimeError,  # encrypted, or an unknown compression
    ValueError,
)


def read_sheet(path: Path) -> dict[int, dict[int, str]]:
    """Return {row: {column: text}} of the first sheet, numbers from 1, without empty cells.

    Raises OSError if the file cannot be read, ValueError if it is not an .xlsx file, is damaged, or
    declares a DOCTYPE.
    """
    content = Path(path).read_bytes()  # with all of it in memory, damage raises no OSError
    foreign = describe_foreign(path, content[:132])
    if foreign:
        raise ValueError(foreign)

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            shared = read_shared_strings(archive)
            sheet = read_xml(archive, first_sheet(archive))
            return read_rows(sheet, shared)
    except UNREADABLE as error:
        reason = str(error) or "it ends too early"
        raise ValueError(
            f"{path}: not a readable .xlsx file ({reason}); download or save it again"
        ) from None


class WithoutDoctype(ElementTree.TreeBuilder):
    """Builds XML trees, but refuses a DOCTYPE: it could define entities without an end."""

    def doctype(self, name, public_id, system):
        """Raise ValueError."""
        raise ValueError("it declares a DOCTYPE, which spreadsheets do not have")


def read_xml(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    """Return the XML tree of a file in an archive. Raises one of UNREADABLE."""
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{name} would unpack to {size / 1e6:.0f} MB")
    parser = ElementTree.XMLParser(target=WithoutDoctype())
    return ElementTree.fromstring(archive.read(name), parser)


def first_sheet(archive: zipfile.ZipFile) -> str:
    """Return the name of the file of the first sheet. Raises one of UNREADABLE."""
    sheet = read_xml(archive, "xl/workbook.xml").find("{*}sheets/{*}sheet")
    if sheet is None:
        raise ValueError("it has no sheet")
    identifiers = [value for key, value in sheet.items() if key.endswith("}id")]

    for relation in read_xml(archive, "xl/_rels/workbook.xml.rels"):
        if relation.get("Id") in identifiers:
            return posixpath.join("/xl", relation.get("Target", ""))[1:]
    raise ValueError("the file of its first sheet is unknown")


def read_shared_strings(archive: zipfile.ZipFile) -> list[str]:
    """Return the texts that cells refer to by number; [] if the archive has none."""
    name = "xl/sharedStrings.xml"
    if name not in archive.namelist():
        return []
    return [joined_text(item) for item in read_xml(archive, name)]


def joined_text(item: ElementTree.Element | None) -> str:
    """Return the text of a string, which may be in pieces of several fonts, without phonetics."""
    if item is None:
        return ""
    pieces = [*item.findall("{*}t"), *item.findall("{*}r/{*}t")]
    return "".join(piece.text or "" for piece in pieces)


def read_rows(sheet: ElementTree.Element, shared: list[str]) -> dict[int, dict[int, str]]:
    """Return {row: {column: text}} of a sheet; rows and cells without a number follow the last."""
    rows = {}
    number = 0
    for row in sheet.findall("{*}sheetData/{*}row"):
        number = int(row.get("r", number + 1))
        cells = {}
        column = 0
        for cell in row.findall("{*}c"):
            column = column_of(cell.get("r"), column + 1)
            text = cell_text(cell, shared)
            if text:
                cells[column] = text
        if cells:
            rows[number] = cells
    return rows


def column_of(reference: str | None, default: int) -> int:
    """Return the column of a cell such as "AB7", from 1. default: of a cell without reference."""
    if reference is None:
        return default
    letters = re.match(r"[A-Z]{1,3}", reference)
    if letters is None:
        raise ValueError(f"a cell is called {reference!r}")
    column = 0
    for letter in letters[0]:
        column = 26 * column + ord(letter) - ord("A") + 1
    return column


def cell_text(cell: ElementTree.Element, shared: list[str]) -> str:
    """Return the text of a cell, "" if it is empty. Raises ValueError for an error such as #N/A."""
    kind = cell.get("t", "n")
    value = cell.findtext("{*}v", "")
    if kind == "inlineStr":
        return joined_text(cell.find("{*}is"))
    if kind == "s":
        if int(value) < 0:
            raise ValueError(f"a cell refers to the text {value}")
        return shared[int(value)]
    if kind == "e":
        raise ValueError(f"its cell {cell.get('r', '')} holds the error {value}")
    return value
