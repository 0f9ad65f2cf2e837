"""Write what `prepare.py check` has read: as text, as a folder, as a page in HTML."""

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from imaging import atomic_files, pictures
from preparation.check_classes import DataSet, shares_by_split
from preparation.check_findings import (
    KINDS,
    LEVELS,
    Findings,
    describe_findings,
    percent,
    printable,
)
from preparation.check_pictures import contact_sheet, histogram


def describe_data_set(data_set: DataSet) -> Iterator[str]:
    """Yield the lines about what a data set holds."""
    yield str(data_set.root)
    width = max([13, *(len(heading) for heading, _ in data_set.rows)])
    for heading, text in data_set.rows:
        yield f"  {heading:{width}} {text}"


@dataclass
class Report:
    """All that a report shows of some data sets."""

    data_sets: list[DataSet]
    findings: Findings
    next_step: str
    sheets: list[Image.Image | None]  # of overlays, one for each data set
    histograms: list[bytes | None]  # PNG, one for each data set


def make_report(data_sets: list[DataSet], findings: Findings, next_step: str) -> Report:
    """Draw the pictures of a report."""
    sheets = [contact_sheet(data_set) for data_set in data_sets]
    histograms = [histogram(data_set) for data_set in data_sets]
    return Report(data_sets, findings, next_step, sheets, histograms)


def unique_names(data_sets: list[DataSet]) -> list[str]:
    """Return a name for the files of each data set: that of its folder, with a number if needed."""
    names = []
    for data_set in data_sets:
        folder = data_set.root.resolve().name
        name = folder
        number = 2
        while name in names:
            name = f"{folder}_{number}"
            number += 1
        names.append(name)
    return names


def write_folder(folder: Path, report: Report) -> None:
    """Write report.txt with all findings, and for each data set overlays and a histogram."""
    lines = []
    for data_set in report.data_sets:
        lines += describe_data_set(data_set)
    lines += describe_findings(report.findings, are_all=True)
    lines.append(f"next: {report.next_step}")

    with atomic_files.atomic_folder(folder) as part:
        part.mkdir(parents=True)
        text = printable("\n".join(lines) + "\n")
        (part / "report.txt").write_text(text, encoding="utf-8")
        for k, name in enumerate(unique_names(report.data_sets)):
            if report.sheets[k] is not None:
                pictures.save_picture(part / f"{name}_overlays.png", report.sheets[k])
            if report.histograms[k] is not None:
                (part / f"{name}_sizes.png").write_bytes(report.histograms[k])


# --- a page in HTML -------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0 1.2em; }
td, th { border: 1px solid #ccc; padding: .25em .7em; text-align: left; vertical-align: top; }
th { background: #f2f2f2; }
td.number { text-align: right; }
img { max-width: 100%; display: block; margin: .6em 0; }
h2 { border-bottom: 2px solid #ccc; padding-bottom: .2em; margin-top: 1.8em; }
ul { margin: .2em 0 1em; }
li { font-family: monospace; font-size: 13px; overflow-wrap: anywhere; }
.errors { color: #b00020; }
.warnings { color: #8a5a00; }
.advice { margin: .2em 0; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def escape(value) -> str:
    """Return a value as text of HTML; what cannot be printed is escaped as in the terminal."""
    return html.escape(printable(str(value)))


def table(head: list[str], rows: list[list]) -> str:
    """Return a table in HTML; numbers are aligned on the right."""
    lines = ["<table>", "<tr>"]
    for heading in head:
        lines.append(f"<th>{escape(heading)}</th>")
    lines.append("</tr>")
    for row in rows:
        lines.append("<tr>")
        for value in row:
            attribute = ' class="number"' if isinstance(value, int) else ""
            lines.append(f"<td{attribute}>{escape(value)}</td>")
        lines.append("</tr>")
    lines.append("</table>")
    return "\n".join(lines)


def split_table(data_set: DataSet) -> str:
    """Return a table of the splits: entries, images, patients, sizes of the targets."""
    by_split = shares_by_split(data_set.shares)
    rows = []
    for split, entries in data_set.splits.items():
        images = {entry.image for entry in entries}
        patients = {entry.group for entry in entries} - {None}
        row = [split, len(entries), len(images), len(patients) or "not known"]

        shares = by_split.get(split, [])
        if shares:
            ends = f"{percent(min(shares))} to {percent(max(shares))}"
            row += [percent(np.median(shares)), ends, shares.count(0)]
        else:
            row += ["", "", ""]
        rows.append(row)

    head = ["split", "entries", "images", "patients"]
    return table([*head, "target, median", "target, range", "empty masks"], rows)


def inline_picture(content: bytes, kind: str, description: str) -> str:
    """Return a picture, PNG or JPEG, that is part of the page."""
    code = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{code}" alt="{escape(description)}">'


def inline_sheet(page: Image.Image, description: str) -> str:
    """Return a sheet of overlays that is part of the page; as JPEG it has a tenth of the bytes."""
    file = io.BytesIO()
    page.convert("RGB").save(file, "JPEG", quality=88)
    return inline_picture(file.getvalue(), "jpeg", description)


def data_set_section(report: Report, k: int) -> Iterator[str]:
    """Yield the parts of the page about data set k of a report."""
    data_set = report.data_sets[k]
    yield f"<h2>{escape(data_set.root)}</h2>"
    if data_set.splits:
        yield split_table(data_set)
    rows = []
    for heading, text in data_set.rows:
        if heading not in data_set.splits:  # those are in the table above
            rows.append([heading, text])
    if rows:
        yield table(["", "all splits"], rows)

    if report.histograms[k] is not None:
        yield inline_picture(report.histograms[k], "png", "histogram of the targets' sizes")
    if report.sheets[k] is not None:
        yield "<p>Outlines of masks: largest and smallest targets, then a random choice.</p>"
        yield inline_sheet(report.sheets[k], "images with the outlines of their masks")


def findings_section(findings: Findings) -> Iterator[str]:
    """Yield the parts of the page about all findings, errors first."""
    for level in LEVELS:
        count = findings.count(level)
        attribute = f' class="{level}"' if count else ""
        yield f"<h2{attribute}>{level}: {count or 'none'}</h2>"
        for kind, lines in findings.of_level(level).items():
            yield f"<h3>{escape(kind)}: {len(lines)}</h3>"
            yield f'<p class="advice">What to do: {escape(KINDS[kind].advice)}.</p>'
            yield "<ul>"
            for line in lines:
                yield f"<li>{escape(line)}</li>"
            yield "</ul>"


def write_page(path: Path, report: Report) -> None:
    """Write a page in HTML that needs no other file."""
    parts = [*findings_section(report.findings)]
    parts.append(f"<p>Next: <code>{escape(report.next_step)}</code></p>")
    for k in range(len(report.data_sets)):
        parts += data_set_section(report, k)

    names = ", ".join(unique_names(report.data_sets))
    title = escape(f"Check of {names}")
    text = PAGE.format(title=title, style=STYLE, body="\n".join(parts))
    with atomic_files.atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
