"""Expand patterns such as "cohort/**/*.nii.gz" among the inputs of a prediction.

A shell expands them unless they are quoted; those of Windows never do. The rules are those of
Python's glob: `*` and `?` stay within a folder, `**` is any number of folders, and names that begin
with a dot are matched only by a dot.
"""

import glob
import os
from pathlib import Path

from imaging import layouts


def expand_inputs(args) -> None:
    """Replace the patterns among `args.inputs` by what they match, as if that had been typed.

    Sets `args.roots`: {matched path: folder that the names of its outputs are relative to}. A file
    or folder whose real name looks like a pattern is no pattern. Raises ValueError, one line, for a
    pattern that matches nothing.
    """
    inputs = []
    args.roots = {}
    for text in args.inputs:
        if not has_wildcard(text) or os.path.lexists(text):
            inputs.append(text)
            continue

        root, pattern = split_pattern(text)
        matches = find_matches(text, root, pattern, Path(args.out))
        print(f"{text}: {len(matches)} files or folders match")
        for path in matches:
            if path not in args.roots:  # a second pattern matches it, too
                args.roots[path] = root
                inputs.append(str(path))
    args.inputs = inputs


def has_wildcard(text: str) -> bool:
    """Return True if a text holds one of the characters that patterns are made of."""
    return any(character in text for character in "*?[")


def split_pattern(text: str) -> tuple[Path, str]:
    """Return the fixed leading folder of a pattern, and the rest of it.

    A folder whose real name holds a wildcard, such as photos[1], belongs to the fixed part.
    """
    parts = Path(text).parts
    root = Path()
    fixed = 0
    for part in parts[:-1]:
        if has_wildcard(part) and not (root / part).is_dir():
            break
        root = root / part
        fixed += 1

    only_folders = "/" if text.endswith(("/", os.sep)) else ""
    return root, "/".join(parts[fixed:]) + only_folders


def find_matches(text: str, root: Path, pattern: str, out: Path) -> list[Path]:
    """Return the files and folders that a pattern below a folder matches, sorted.

    Matches inside the folder `out` or inside another match are left out, and so are links to
    another match. Folders of masks next to their folder of images are left out with a message,
    unless the pattern names them. text: the whole pattern, for messages. Raises ValueError, one
    line, if nothing is left.
    """
    whole = os.path.join(glob.escape(str(root)), pattern)
    found = [Path(match) for match in glob.glob(whole, recursive=True)]
    if not found:
        raise ValueError(f"{text}: no file or folder matches this pattern")
    found.sort(key=lambda path: (len(path.parts), path))

    out = out.resolve()
    matches = []
    seen = set()  # the files and folders behind all links
    masks = 0
    for path in found:
        target = path.resolve()
        parents = {*target.parents}
        if target in seen or out in (target, *parents) or layouts.is_hidden(path):
            continue
        if seen & parents:  # below a folder that matches, which is shorter
            continue
        if is_below_masks(path, root, pattern):
            masks += 1
            continue
        seen.add(target)
        matches.append(path)

    if masks:
        print(f"{text}: skipped {masks} matches in folders of masks")
    if not matches:
        raise ValueError(f"{text}: matches nothing but masks, hidden files or what lies in --out")
    return sorted(matches)


def is_below_masks(path: Path, root: Path, pattern: str) -> bool:
    """Return True for a match in a folder of masks that the pattern does not name."""
    named = pattern.split("/")
    folder = root
    for part in path.relative_to(root).parts:
        images = layouts.LABEL_FOLDERS.get(part)
        if images is not None and part not in named and (folder / images).is_dir():
            return True
        folder = folder / part
    return False
