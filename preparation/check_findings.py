"""Findings of `prepare.py check`: the kinds of them, and how serious each kind is.

A finding is a line that begins with the file or folder that it is about.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ERROR = "errors"  # training would fail, or its scores would not be honest
WARNING = "warnings"  # worth a look; training works
LEVELS = (ERROR, WARNING)


@dataclass(frozen=True)
class Kind:
    level: str
    advice: str  # what to do, as an instruction


NEAR = "nearly the same image in several splits: a copy, or the next frame of a video or scan"
TURNED = "masks turned like their images, though they may be upright (see --mask-orientation)"
SHARED_IMAGES = "images in several splits"
SHARED_NAMES = "images named alike in several splits"
SHARED_PATIENTS = "patients in several splits"
PUBLISHED_IMAGES = "images that a published split has in several splits"
PUBLISHED_PATIENTS = "patients that a published split has in several splits"
FIXABLE = (SHARED_IMAGES, SHARED_NAMES, SHARED_PATIENTS, PUBLISHED_IMAGES, PUBLISHED_PATIENTS)
REMOVE_SHARED = "remove them from train (and val): --fix-splits does it, or names the files"

# All kinds of findings, in the order in which they are printed.
KINDS = {
    "splits that cannot be used": Kind(ERROR, "correct the file or folder that the line names"),
    "training split without entries": Kind(ERROR, "list images in it, or remove its file"),
    "missing files": Kind(ERROR, "copy the files there, or remove their entries"),
    "files that cannot be used": Kind(ERROR, "replace or convert the files, or remove them"),
    "swapped folders": Kind(ERROR, "exchange the names of images/ and masks/"),
    "masks and images of different sizes": Kind(ERROR, "draw or resize the masks at that size"),
    "masks of several values": Kind(ERROR, "add classes.json, or set --mask-threshold"),
    "masks of several colours": Kind(ERROR, "add classes.json, or set --mask-threshold"),
    "unknown class numbers": Kind(ERROR, "name all numbers in classes.json, or correct the masks"),
    "training split without foreground": Kind(ERROR, "correct the masks, or their numbers"),
    "volumes with other channels": Kind(ERROR, "give all volumes the same channels"),
    "label maps of 0 and 255 alone": Kind(ERROR, "write the class's number in place of 255"),
    SHARED_IMAGES: Kind(ERROR, REMOVE_SHARED),
    SHARED_NAMES: Kind(ERROR, REMOVE_SHARED),
    SHARED_PATIENTS: Kind(ERROR, REMOVE_SHARED),
    "images shared by data sets": Kind(ERROR, "remove them from the set that is trained on"),
    PUBLISHED_IMAGES: Kind(WARNING, "--fix-splits removes them from train and val"),
    PUBLISHED_PATIENTS: Kind(WARNING, "--fix-splits removes them from train and val"),
    NEAR: Kind(WARNING, "if they are copies or of one patient, move them to one split"),
    "no training split": Kind(WARNING, "name it with --test, and a training set with --data"),
    "training split of one image or patient": Kind(WARNING, "add data, or try --overfit 1"),
    "splits without entries": Kind(WARNING, "list images in it, or remove its file"),
    "entries listed twice": Kind(WARNING, "nothing; they are read once"),
    "files that are no images": Kind(WARNING, "nothing, if they are no data; they are skipped"),
    "images with NaN or infinite pixels": Kind(WARNING, "correct the images, or accept 0"),
    "images with damaged EXIF data": Kind(WARNING, "see if the images are upright"),
    TURNED: Kind(WARNING, "look at some of them, then set --mask-orientation"),
    "masks of two ranges": Kind(WARNING, "nothing, if 0/1 and 0/255 mean the same"),
    "classes that no mask holds": Kind(WARNING, "correct the class names, or expect no result"),
    "foreground above 60%": Kind(WARNING, "look at the masks, for example with --report"),
    "empty masks whose prompts ask for something": Kind(WARNING, "correct the mask or the text"),
    "prompts that deny what the mask shows": Kind(WARNING, "correct the mask or the text"),
    "prompt types that entries lack": Kind(WARNING, "train with another --prompt, or add texts"),
    "unknown prompt types": Kind(WARNING, "rename them to p0, p1, …"),
    "prompts that the model cuts": Kind(WARNING, "shorten the texts, or take another --prompt"),
    "label maps of ignored voxels alone": Kind(WARNING, "nothing, if nothing is labelled there"),
    "remarks about volumes that can be used": Kind(WARNING, "see if the line names a mistake"),
}
MOST_LINES = 10  # printed per kind of finding; the rest are counted
MOST_NEAR = 3  # printed of near-duplicates


class Findings(dict):
    """Kind of finding -> its lines. Raises KeyError for a kind that is not in KINDS."""

    def __missing__(self, kind: str) -> list[str]:
        KINDS[kind]  # raises KeyError
        self[kind] = []
        return self[kind]

    def of_level(self, level: str) -> dict[str, list[str]]:
        """Return {kind: lines} of the findings of a level, in the order of KINDS."""
        chosen = {}
        for kind in KINDS:
            if KINDS[kind].level == level and self.get(kind):
                chosen[kind] = self[kind]
        return chosen

    def count(self, level: str) -> int:
        """Return the number of lines of a level."""
        return sum(map(len, self.of_level(level).values()))

    def add_unusable(self, error: Exception) -> None:
        """Add a finding for a file that is missing or cannot be read."""
        is_missing = isinstance(error, FileNotFoundError)
        kind = "missing files" if is_missing else "files that cannot be used"
        self[kind].append(str(error))


def describe_findings(findings: Findings, are_all: bool = False) -> Iterator[str]:
    """Yield the lines about all findings, errors first: of each kind the first ones, or all."""
    for level in LEVELS:
        yield f"{level}: {findings.count(level) or 'none'}"
        for kind, lines in findings.of_level(level).items():
            most = MOST_NEAR if kind == NEAR else MOST_LINES
            if are_all:
                most = len(lines)
            yield f"  {kind}: {len(lines)}"
            for line in lines[:most]:
                yield f"    {line}"
            if len(lines) > most:
                yield f"    and {len(lines) - most} more"
            yield f"    -> {KINDS[kind].advice}"


# --- words ----------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return a text with characters that cannot be printed, as in damaged file names, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def width_by_height(size: tuple[int, int]) -> str:
    """Return a size (H, W) as "WxH"."""
    return f"{size[1]}x{size[0]}"


def percent(share: float) -> str:
    """Return a share as "12.3%", or with two digits if it is small: "0.034%"."""
    digits = f"{100 * share:.2g}" if 0 < share < 0.001 else f"{100 * share:.1f}"
    return f"{digits}%"


def count_and_names(names: list[str]) -> str:
    """Return how many names there are and the first five of them, "7 (a, b, c, d, e, ...)"."""
    ending = ", ..." if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(names[:5])}{ending})"
