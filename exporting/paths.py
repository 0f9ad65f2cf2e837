"""Names instead of paths, for files that leave this machine."""

import re

from engine.runs import is_hub_id

# Options of a run that name files and folders of the machine that it was trained on.
PATH_OPTIONS = ("data", "test", "out", "cache", "clip", "boxes", "points", "text_codes")
SOURCE_OPTIONS = ("weights", "decoder")  # files, folders or hub ids


def folderless(path: str) -> str:
    """Return the last part of a path, which is the name of a file or folder."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def without_folders(source: str) -> str:
    """Return a hub id as it is, and the name of any other source of weights."""
    return source if is_hub_id(source) else folderless(source)


def without_paths(options: dict) -> dict:
    """Return the options of a run with names instead of paths."""
    public = dict(options)
    for name in PATH_OPTIONS:
        value = options.get(name)
        if isinstance(value, list):
            public[name] = [folderless(path) for path in value]
        elif value:
            public[name] = folderless(value)
    for name in SOURCE_OPTIONS:
        if options.get(name):
            public[name] = without_folders(options[name])
    return public
