"""The six polyp sets of the medvlsm study: Kvasir-SEG, ClinicDB, BKAI, CVC-300, ColonDB, ETIS.

What was compared with real files: all 1000 images and masks of Kvasir-SEG and their annotations. No
archive itself could be downloaded here, and no file of the other five sets: their folders and file
names are those that their sites and other programs describe.

Running numbers: for the annotations of 2023 the study renamed the files of four sets to 0.jpg,
1.jpg, … in the order of their names, as text. Comparing its two generations of files confirms this
for all 1000 names of Kvasir-SEG and all 612 of ClinicDB. The names of CVC-300 exist only in this
form; here the boxes of the annotations confirm them while the masks are written.
"""

import csv
import io
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from preparation import medvlsm, volume_sets
from preparation.archives import Archive
from preparation.medvlsm import Conversion, DataSet, Files, Splits, files_by_stem, stem_of

STUDY_SPLIT = "a random split by the medvlsm study (github.com/naamiinepal/medvlsm)"
TEST_ONLY = (
    "a test set: PraNet and the medvlsm study train on other data; the study's train file holds 20 "
    "images of it"
)
SEQUENCES = "metadata.csv"  # of ClinicDB: columns png_image_path, sequence_id and others
SHARES = {"test": 0.1, "val": 0.2, "train": 1}  # --split sequence: where each split ends


@dataclass(frozen=True)
class PolypSet:
    """A data set and where its files are."""

    facts: DataSet
    image_folders: tuple[str, ...]  # ends of paths in the archive; the first that fits counts
    mask_folders: tuple[str, ...]
    has_running_numbers: bool = False  # the annotations of 2023 renamed the files


KVASIR = PolypSet(
    DataSet(
        name="kvasir_polyp",
        title="Kvasir-SEG, polyps in colonoscopy",
        archive="kvasir-seg.zip",
        counts={"train": 800, "val": 100, "test": 100},
        split_source=STUDY_SPLIT,
        older_name="kvasir_polyp_80_10_10",
    ),
    image_folders=("Kvasir-SEG/images", "images"),
    mask_folders=("Kvasir-SEG/masks", "masks"),
    has_running_numbers=True,
)
CLINICDB = PolypSet(
    DataSet(
        name="clinicdb_polyp",
        title="CVC-ClinicDB, polyps in colonoscopy",
        archive="archive.zip of Kaggle, or CVC-ClinicDB with the original TIFF files",
        counts={"train": 490, "val": 61, "test": 61},
        split_source=STUDY_SPLIT,
        older_name="clinicdb_polyp_80_10_10",
    ),
    image_folders=("PNG/Original", "TIF/Original", "Original"),
    mask_folders=("PNG/Ground Truth", "TIF/Ground Truth", "Ground Truth"),
    has_running_numbers=True,
)
BKAI = PolypSet(
    DataSet(
        name="bkai_polyp",
        title="BKAI-IGH NeoPolyp, polyps in colonoscopy",
        archive="archive.zip of Kaggle",
        counts={"train": 800, "val": 100, "test": 100},
        split_source=STUDY_SPLIT,
        older_name="bkai_polyp_80_10_10",
    ),
    image_folders=("train/train", "train"),
    mask_folders=("train_gt/train_gt", "train_gt"),
    has_running_numbers=True,
)
CVC300 = PolypSet(
    DataSet(
        name="cvc300_polyp",
        title="CVC-300, polyps in colonoscopy",
        archive="TestDataset.zip of PraNet",
        counts={"test": 60},
        split_source="a test set: PraNet and the medvlsm study train on other data",
        older_name="cvc300_polyp_0_0_100",
        is_older=True,
    ),
    image_folders=("CVC-300/images", "images"),
    mask_folders=("CVC-300/masks", "masks"),
    has_running_numbers=True,
)
COLONDB = PolypSet(
    DataSet(
        name="colondb_polyp",
        title="CVC-ColonDB, polyps in colonoscopy",
        archive="TestDataset.zip of PraNet",
        counts={"train": 20, "val": 0, "test": 360},
        split_source=TEST_ONLY,
        older_name="cvccolondb_polyp_51_0_949",
    ),
    image_folders=("CVC-ColonDB/images", "images"),
    mask_folders=("CVC-ColonDB/masks", "masks"),
)
ETIS = PolypSet(
    DataSet(
        name="etis_polyp",
        title="ETIS-LaribPolypDB, polyps in colonoscopy",
        archive="TestDataset.zip of PraNet",
        counts={"train": 20, "val": 0, "test": 176},
        split_source=TEST_ONLY,
        older_name="etis_polyp_10_0_90",
    ),
    image_folders=("ETIS-LaribPolypDB/images", "images"),
    mask_folders=("ETIS-LaribPolypDB/masks", "masks"),
)
POLYP_SETS = (KVASIR, CLINICDB, BKAI, CVC300, COLONDB, ETIS)


# --- running numbers -----------------------------------------------------------------------------


def with_original_names(splits: Splits, images: Files, where: str) -> Splits:
    """Return annotations of running numbers with the names of the archive.

    The number k stands for the k-th image in the order of the names as text. Raises ValueError, one
    line, for names that are no such numbers.
    """
    image_names = sorted(PurePosixPath(file.member).name for file in images.values())
    names = {}
    for number, image in enumerate(image_names):
        names[number] = (image, f"{stem_of(image)}.png")
    available = f"{where}: has {len(names)} images"
    return medvlsm.with_names_of_archive(splits, names, available)


# --- faults of the annotations --------------------------------------------------------------------


def general_texts(splits: Splits) -> list[str]:
    """Return the general descriptions of polyps in p7, such as "which is a growth of tissue"."""
    for annotation in medvlsm.all_annotations(splits):
        texts = annotation.prompts.get("p7", [])
        if annotation.prompts.get("p1") == "polyp" and isinstance(texts, list):
            return [text.removeprefix("polyp ") for text in texts]
    return []


def find_denials(splits: Splits, notes: list[str]) -> set[str]:
    """Return the masks over which prompts say "no polyp" although there is one."""
    masks = set()
    images = []
    for annotation in medvlsm.all_annotations(splits):
        has_polyp = annotation.corner not in (None, (0, 0))
        if has_polyp and annotation.prompts.get("p1") == "no polyp":
            masks.add(annotation.mask)
            images.append(annotation.image)
    if images:
        notes.append(
            'prompts that said "no polyp" over a polyp were replaced by those of `prepare.py '
            f"annotate`: {', '.join(images)}"
        )
    return masks


# --- ClinicDB's sequences -------------------------------------------------------------------------


def read_sequences(opened: list[Archive]) -> dict[str, str]:
    """Return {stem of an image: sequence} from ClinicDB's metadata.csv; {} without this file.

    Raises ValueError, one line, for a table of another form.
    """
    tables = []
    for archive in opened:
        for name in archive.names:
            if PurePosixPath(name).name == SEQUENCES:
                tables.append((archive, name))
    if not tables:
        return {}

    archive, name = tables[0]
    try:
        rows = csv.DictReader(io.StringIO(archive.read(name).decode("utf-8-sig")))
        return {stem_of(row["png_image_path"]): row["sequence_id"] for row in rows}
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error):
        raise ValueError(
            f"{archive.path}: {name} is no table with the columns png_image_path and sequence_id"
        ) from None


def with_sequences(splits: Splits, sequences: dict[str, str]) -> Splits:
    """Return the annotations with their video sequences as groups."""
    grouped = {}
    for split, annotations in splits.items():
        grouped[split] = []
        for annotation in annotations:
            sequence = sequences.get(stem_of(annotation.image), "")
            grouped[split].append(replace(annotation, group=sequence))
    return grouped


def split_by_sequence(splits: Splits, where: str) -> Splits:
    """Return the annotations in random splits that share no sequence, always the same ones.

    Raises ValueError, one line, if the archive does not tell the sequences.
    """
    annotations = medvlsm.all_annotations(splits)
    if not all(annotation.group for annotation in annotations):
        raise ValueError(
            f"--split sequence: {where} has no {SEQUENCES} that tells the sequence of each frame; "
            f"take the archive of {CLINICDB.facts.source.page}"
        )

    sequences = sorted({annotation.group for annotation in annotations})
    split_of = volume_sets.split_at_random(sequences, SHARES, np.random.default_rng(0))
    new_splits = {split: [] for split in medvlsm.SPLITS}
    for annotation in annotations:
        new_splits[split_of[annotation.group]].append(annotation)
    return new_splits


def sequence_note(splits: Splits) -> list[str]:
    """Return a warning if frames of a test sequence are in train; [] if not or unknown."""
    trained = {annotation.group for annotation in splits.get("train", [])} - {""}
    tested = splits.get("test", [])
    leaking = [annotation for annotation in tested if annotation.group in trained]
    if not leaking:
        return []
    return [
        f"LEAK: {len(leaking)} of {len(tested)} test images are frames of sequences that are in "
        "train, so that scores are too high; --split sequence makes a split without shared "
        "sequences"
    ]


# --- commands -------------------------------------------------------------------------------------


def plan(
    polyps: PolypSet, opened: list[Archive], splits: Splits, is_older: bool, args: Namespace
) -> Conversion:
    """Return the conversion of a polyp set; see medvlsm.Plan."""
    images = files_by_stem(opened, polyps.image_folders)
    masks = files_by_stem(opened, polyps.mask_folders)
    if is_older and polyps.has_running_numbers:
        splits = with_original_names(splits, *images)
    conversion = medvlsm.plan_pairs(polyps.facts, splits, images, masks)
    if polyps is CLINICDB:
        add_sequences(conversion, opened, args)

    conversion.wrong_prompts = find_denials(conversion.splits, conversion.notes)
    conversion.target = "polyp"
    conversion.general = general_texts(conversion.splits)
    return conversion


def add_sequences(conversion: Conversion, opened: list[Archive], args: Namespace) -> None:
    """Add ClinicDB's sequences to a conversion, and split by them if --split asks for it."""
    splits = with_sequences(conversion.splits, read_sequences(opened))
    if args.split == "sequence":
        where = ", ".join(str(archive.path) for archive in opened)
        splits = split_by_sequence(splits, where)
        conversion.split_source = "sequences at random, seed 0, by prepare.py"
        conversion.is_published = False
    elif not any(annotation.group for annotation in medvlsm.all_annotations(splits)):
        conversion.notes.append(
            "LEAK: the study's test images are frames of sequences that are in train, so that "
            f"scores are too high; without {SEQUENCES} the sequences are unknown"
        )
    conversion.splits = splits
    conversion.notes += sequence_note(splits)


def options(command) -> None:
    """Add the commands of the six polyp sets."""
    for polyps in POLYP_SETS:
        facts = polyps.facts
        add = medvlsm.add_command(command, facts, partial(plan, polyps))
        if polyps is CLINICDB:
            add(
                "--split",
                choices=("study", "sequence"),
                default="study",
                help="study: the published split, whose test frames come from sequences in train; "
                "sequence: a split by video sequence (default: %(default)s)",
            )
