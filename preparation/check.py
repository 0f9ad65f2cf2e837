"""Read whole data sets and report what is wrong with them: `prepare.py check`."""

from collections import defaultdict
from pathlib import Path

from engine.ranges import GREY_LEVEL
from imaging import image_files, layouts
from preparation.check_findings import show_findings
from preparation.check_images import check_images
from preparation.check_leaks import check_near, check_overlap
from preparation.check_prompts import tokenizers_of
from preparation.check_volumes import check_volumes

MASK_THRESHOLD = (
    "binary masks: pixels above this grey level, 0 to 255, are foreground (default: chosen from "
    "the grey levels of the masks)"
)


def refuse_misuse(args):
    """Raise FileNotFoundError or ValueError, one line, before any data set is read."""
    for root in args.data:
        if not layouts.has_volumes(root) and not layouts.find_splits(root):
            need = "images/ and masks/, with anns/*.json or within train/, val/, test/"
            raise FileNotFoundError(f"{root}: no data set here; expected {need}")
    if all(layouts.has_volumes(root) for root in args.data):
        for name in ("model", "mask_orientation", "mask_threshold"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: has no effect on volumes; remove it")


def check(args):
    """Read whole data sets of images or volumes and report what is wrong with them.

    Nothing is written. The exit status is 1 if problems were found.
    """
    refuse_misuse(args)
    findings = defaultdict(list)
    seen = []
    tokenizers = tokenizers_of(args.model)
    for root in args.data:
        if layouts.has_volumes(root):
            seen += check_volumes(root, args, findings)
        else:
            seen += check_images(root, args, tokenizers, findings)
    reported = check_overlap(seen, findings)
    check_near(seen, reported, findings)

    show_findings(findings)
    return 1 if any(findings.values()) else 0


def options(command):
    """Describe `prepare.py check`."""
    add = command(check, "read data sets and report problems")
    help = "folder of a data set, with images/ and masks/ or with dataset.json"
    add("data", type=Path, nargs="+", metavar="DATA", help=help)
    help = (
        "how masks of EXIF-rotated images lie, where their size does not show it: stored (not yet "
        "rotated, like the image file) or upright (default: stored, and such masks are listed)"
    )
    add("--mask-orientation", choices=image_files.ORIENTATIONS, help=help)
    help = (
        "also count the prompts that are too long for this model and are cut: cris, clipseg, "
        "biomedclipseg (default: do not count them)"
    )
    add("--model", metavar="NAME", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = (
        "regular expression that finds the patient in an image's name: its first group, or the "
        "whole match; reports patients that are in two splits (default: the field `group` of "
        "annotation files)"
    )
    add("--group-regex", metavar="REGEX", help=help)
