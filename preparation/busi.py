"""BUSI: breast ultrasound images with tumours, and of normal breasts, for the medvlsm study.

Kaggle's archive holds `Dataset_BUSI_with_GT/benign/benign (1).png` with its mask
`benign (1)_mask.png`, and likewise `malignant` and `normal`. A few images have several tumours in
masks of their own, `benign (100)_mask_1.png`, …; they are merged. The masks of normal breasts are
empty. The study names the files 1_benign.png.

What was compared with real files: the names and counts of the study's annotations (437 benign, 210
malignant, 133 normal), and 22 images with their masks (1-bit PNG), whose boxes agree with the
study's. The archive itself could not be downloaded here.
"""

import re
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from preparation import medvlsm
from preparation.archives import Archive
from preparation.check_findings import count_and_names
from preparation.medvlsm import Conversion, DataSet, File, Splits, stem_of

BUSI = DataSet(
    name="busi",
    title="BUSI, breast tumours in ultrasound",
    archive="archive.zip of Kaggle",
    counts={"train": 624, "val": 78, "test": 78},
    split_source="a random split by the medvlsm study (github.com/naamiinepal/medvlsm)",
    older_name="busi_80_10_10",
)
FILE = re.compile(r"(benign|malignant|normal) \((\d+)\)(_mask(?:_\d+)?)?\.png")


@dataclass
class Scan:
    """The members of an archive that belong to one image."""

    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)


def find_scans(archive: Archive) -> dict[str, Scan]:
    """Return {name of the study, such as "1_benign": Scan} of an archive."""
    scans = defaultdict(Scan)
    for member in archive.names:
        match = FILE.fullmatch(PurePosixPath(member).name)
        if match:
            kind, number, is_mask = match.groups()
            scan = scans[f"{number}_{kind}"]
            members = scan.masks if is_mask else scan.images
            members.append(member)
    return dict(scans)


def plan(opened: list[Archive], splits: Splits, is_older: bool, args: Namespace) -> Conversion:
    """Return the conversion of BUSI; see medvlsm.Plan."""
    if len(opened) > 1:
        raise ValueError(f"--raw: BUSI is one archive, not {len(opened)}")
    (archive,) = opened
    scans = find_scans(archive)
    for name, scan in scans.items():
        if len(scan.images) > 1:
            raise ValueError(f"{archive.path}: holds {' and '.join(scan.images)}; remove one")
        if not scan.masks or not scan.images:
            file = (scan.images or scan.masks)[0]
            raise ValueError(f"{archive.path}: {file} ({name}) lacks its image or its mask")

    named = [stem_of(a.image) for a in medvlsm.all_annotations(splits)]
    medvlsm.refuse_missing(named, scans, str(archive.path))
    notes = medvlsm.unused_note(scans, named, "images")
    merged = sorted(name for name in {*named} if len(scans[name].masks) > 1)
    if merged:
        notes.append(f"images with several masks, which were merged: {count_and_names(merged)}")

    rule = "above 127; the union of several masks"
    conversion = Conversion(splits, notes, rule, BUSI.split_source)
    for annotation in medvlsm.all_annotations(splits):
        scan = scans[stem_of(annotation.image)]
        conversion.add_image(annotation, File(archive, scan.images[0]))
        masks = [File(archive, member) for member in sorted(scan.masks)]
        conversion.add_mask(annotation, masks)
    return conversion


def options(command) -> None:
    """Add the command `prepare.py busi`."""
    details = "Several masks of an image are merged. Masks of normal breasts are empty."
    medvlsm.add_command(command, BUSI, plan, details)
