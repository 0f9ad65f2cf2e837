"""Findings of `prepare.py check`: kind of finding -> lines, and how they are printed.

A line begins with the file or folder that it is about.
"""

MOST_LINES = 10  # printed per kind of finding; the rest are counted
NEAR_KIND = "nearly the same image in several splits: a copy, or the next frame of a video or scan"
MOST_NEAR = 3  # printed per data set of this kind


def add_error(error, findings):
    """Add a finding for a file that is missing or cannot be read."""
    is_missing = isinstance(error, FileNotFoundError)
    kind = "missing files" if is_missing else "files that cannot be used"
    findings[kind].append(str(error))


def show(line):
    """Print a line; characters that cannot be printed, as in damaged file names, are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode())


def width_by_height(size):
    """Return a size (H, W) as "WxH"."""
    return f"{size[1]}x{size[0]}"


def count_and_names(names):
    """Return how many names there are and the first five of them, "7 (a, b, c, d, e, ...)"."""
    ending = ", ..." if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(names[:5])}{ending})"


def show_findings(findings):
    """Print all kinds of findings and the first lines of each."""
    total = sum(map(len, findings.values()))
    show(f"findings: {total or 'none'}")
    for kind, lines in findings.items():
        most = MOST_NEAR if kind == NEAR_KIND else MOST_LINES
        show(f"  {kind}: {len(lines)}")
        for line in lines[:most]:
            show(f"    {line}")
        if len(lines) > most:
            show(f"    and {len(lines) - most} more")
