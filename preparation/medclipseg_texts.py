"""MedCLIPSeg's texts for the annotation files of a data set: `prepare.py medclipseg-texts`.

The repository HealthX-Lab/MedCLIPSeg (Apache-2.0, read at commit 8d7ef36) has a folder
`data/SET/Prompts_Folder` for each of its data sets:

    Train_text.xlsx  Val_text.xlsx         a text for each image             -> m_original
    Test_text_original.xlsx                the same for the test images      -> m_original
    Test_text_contradictory.xlsx, …        four other texts for each of them -> m_contradictory, …
    Train_text_10.xlsx, Val_text_10.xlsx   a tenth of the images; also _25 and _50 -> a split

The columns are Image, Description and Ground Truth. Texts end in a newline, which is removed, and
nothing else is changed. The names of images end in .png, those of our data sets often in .jpg, so
that they are compared without their ending.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imaging import atomic_files, layouts
from imaging.files import json_text, read_json
from preparation.spreadsheets import read_sheet

SPLITS = ("train", "val", "test")
TEST_TYPES = (
    "original", "contradictory", "missing_location", "overdescriptive", "underdescriptive",
)  # fmt: skip
SHARES = ("10", "25", "50")  # percent of the images
ORIGINAL = "m_original"


# --- spreadsheets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """The texts of one spreadsheet."""

    path: Path
    texts: dict[str, list[str]]  # name of an image without its ending: its text, rarely several
    rows: dict[str, int]  # the same name: the first row that has it

    def where(self, name: str) -> str:
        """Return the place of an image in the spreadsheet, for messages."""
        return f"{self.path}, row {self.rows[name]}"


def find_folder(folder: Path) -> Path:
    """Return the folder of the spreadsheets: FOLDER or FOLDER/Prompts_Folder.

    Raises FileNotFoundError if neither has one of them.
    """
    for candidate in (folder, folder / "Prompts_Folder"):
        for split in SPLITS:
            if any((candidate / name).is_file() for name in sheet_names(split).values()):
                return candidate
    raise FileNotFoundError(
        f"{folder}: no Train_text.xlsx, Val_text.xlsx or Test_text_original.xlsx; --texts takes "
        "the folder data/SET/Prompts_Folder of the repository HealthX-Lab/MedCLIPSeg"
    )


def sheet_names(split: str) -> dict[str, str]:
    """Return {prompt type: name of its spreadsheet} of a split."""
    if split == "test":
        return {f"m_{name}": f"Test_text_{name}.xlsx" for name in TEST_TYPES}
    return {ORIGINAL: f"{split.title()}_text.xlsx"}


def read_texts(path: Path) -> Sheet:
    """Return the texts of a spreadsheet.

    An image with two different texts gets both, which is printed. Raises ValueError, one line, for
    other columns and for rows without an image or a text.
    """
    rows = read_sheet(path)
    header = rows.pop(min(rows)) if rows else {}
    columns = {text.strip(): column for column, text in header.items()}
    if rows and not {"Image", "Description"} <= columns.keys():
        raise ValueError(
            f"{path}: has the columns {', '.join(columns)}; expected Image, Description"
        )

    sheet = Sheet(path, {}, {})
    for number, row in rows.items():
        file = row.get(columns["Image"], "").strip()
        text = row.get(columns["Description"], "").strip()
        if not file or not text:
            missing = "Image" if not file else "Description"
            raise ValueError(f"{path}, row {number}: has no {missing}")

        name = name_of(file)
        sheet.rows.setdefault(name, number)
        texts = sheet.texts.setdefault(name, [])
        if text not in texts:
            texts.append(text)

    for name, texts in sheet.texts.items():
        if len(texts) > 1:
            print(f"{path}: {name} has {len(texts)} different texts, and gets all of them")
    return sheet


def name_of(file: str) -> str:
    """Return the name of an image file without folders and ending, in composed Unicode form."""
    return layouts.composed(PurePosixPath(file).stem)


# --- annotation files -----------------------------------------------------------------------------


@dataclass
class Annotations:
    """The annotation files of a data set: what they hold, and what they will hold."""

    root: Path
    old: dict[str, list[dict]]  # split: entries
    new: dict[str, list[dict]]

    def path(self, split: str) -> Path:
        """Return the annotation file of a split."""
        return self.root / "anns" / f"{split}.json"


def read_all(root: Path) -> Annotations:
    """Return the annotation files of a data set.

    Raises FileNotFoundError if it has none for train, val and test, ValueError if one is damaged.
    """
    splits = layouts.find_splits(root)
    if not {*SPLITS} & splits.keys():
        raise FileNotFoundError(
            f"{root}: no anns/train.json, anns/val.json or anns/test.json to add texts to"
        )

    old = {}
    for split, path in splits.items():
        with redirect_stdout(io.StringIO()):  # "skipped 1 repeated entries": they stay in the file
            layouts.read_annotations(root, split)
        old[split] = read_json(path)
    return Annotations(root, old, {})


def entries_by_name(annotations: Annotations, split: str) -> dict[str, list[dict]]:
    """Return {name of an image without its ending: its entries} of a split."""
    by_name = {}
    for entry in annotations.old[split]:
        by_name.setdefault(name_of(entry["img_name"]), []).append(entry)
    return by_name


def check_names(sheet: Sheet, annotations: Annotations, split: str) -> None:
    """Raise ValueError, one line, if a spreadsheet does not fit the images of a split."""
    by_name = entries_by_name(annotations, split)
    for name in sheet.texts:
        if name not in by_name:
            others = [s for s in SPLITS if s != split and s in annotations.old]
            others = [s for s in others if name in entries_by_name(annotations, s)]
            place = f"but it is in {others[0]}" if others else "nor in another split"
            raise ValueError(
                f"{sheet.where(name)}: {name} is not in {annotations.path(split)}, {place}; the "
                "data set must have MedCLIPSeg's images and splits"
            )

        targets = {(e["img_name"], e["mask_name"], e.get("label")) for e in by_name[name]}
        if len(targets) > 1:
            raise ValueError(
                f"{annotations.path(split)}: {len(targets)} different entries for {name}, but "
                f"{sheet.path.name} has one text for an image"
            )


def with_texts(entries: list[dict], sheets: dict[str, Sheet]) -> list[dict]:
    """Return entries with the texts of spreadsheets. sheets: {prompt type: spreadsheet}.

    Texts of these types that the entries had are removed.
    """
    changed = []
    for entry in entries:
        prompts = {kind: text for kind, text in entry["prompts"].items() if kind not in sheets}
        for kind, sheet in sheets.items():
            texts = sheet.texts.get(name_of(entry["img_name"]))
            if texts:
                prompts[kind] = texts[0] if len(texts) == 1 else texts
        changed.append(entry | {"prompts": prompts})
    return changed


def part_of(entries: list[dict], sheet: Sheet) -> list[dict]:
    """Return the entries whose images are in a spreadsheet."""
    return [entry for entry in entries if name_of(entry["img_name"]) in sheet.texts]


def check_part(part: Sheet, whole: Sheet) -> None:
    """Raise ValueError, one line, if a list for a share of a split has other images or texts."""
    for name, texts in part.texts.items():
        if not {*texts} <= {*whole.texts.get(name, ())}:
            raise ValueError(f"{part.where(name)}: {whole.path.name} has no such text for {name}")


# --- the splits -----------------------------------------------------------------------------------


def add_texts(folder: Path, annotations: Annotations, split: str) -> dict[str, Sheet]:
    """Add the texts of a split to `annotations.new`; return {prompt type: spreadsheet}.

    Empty spreadsheets, such as that of ColonDB's validation split, and those of a split that the
    data set does not have are left out, which is printed.
    """
    sheets = {}
    for kind, name in sheet_names(split).items():
        if not (folder / name).is_file():
            continue
        if split not in annotations.old:
            print(f"{folder / name}: left out, {annotations.root} has no split {split}")
            continue
        sheet = read_texts(folder / name)
        if not sheet.texts:
            print(f"{folder / name}: left out, it has no rows")
            continue
        check_names(sheet, annotations, split)
        sheets[kind] = sheet

    if sheets:
        annotations.new[split] = with_texts(annotations.old[split], sheets)
    return sheets


def add_parts(
    folder: Path, annotations: Annotations, split: str, sheets: dict[str, Sheet]
) -> Iterator[str]:
    """Add the listed parts of a split to `annotations.new`, such as train_10; yield their names."""
    for share in SHARES:
        path = folder / f"{split.title()}_text_{share}.xlsx"
        if path.is_file() and sheets:
            part = read_texts(path)
            check_part(part, sheets[ORIGINAL])
            annotations.new[f"{split}_{share}"] = part_of(annotations.new[split], part)
            yield f"{split}_{share}"


def refuse_other_texts(annotations: Annotations, split: str, kinds: dict[str, Sheet]) -> None:
    """Raise ValueError, one line, if entries have other texts of these types than the new ones."""
    pairs = zip(annotations.old[split], annotations.new[split], strict=True)
    for old, new in pairs:
        for kind in kinds:
            if old["prompts"].get(kind, new["prompts"].get(kind)) != new["prompts"].get(kind):
                raise ValueError(
                    f"{annotations.path(split)}: {old['img_name']} has another {kind} already; "
                    "--overwrite replaces it"
                )


def refuse_other_part(annotations: Annotations, split: str) -> None:
    """Raise ValueError, one line, if the annotation file of a part has other entries."""
    if annotations.old.get(split, annotations.new[split]) != annotations.new[split]:
        raise ValueError(
            f"{annotations.path(split)}: exists with other entries; --overwrite replaces it"
        )


# --- the command ----------------------------------------------------------------------------------


def summary(annotations: Annotations, split: str, sheets: dict[str, Sheet]) -> str:
    """Return a line about the texts of a split."""
    entries = annotations.new[split]
    counts = []
    for kind in sheets:
        count = sum(kind in entry["prompts"] for entry in entries)
        counts.append(f"{kind} {count}")
    return f"{annotations.path(split)}: {len(entries)} entries, with {', '.join(counts)}"


def write_changed(annotations: Annotations) -> int:
    """Write the annotation files that changed; return their number."""
    changed = 0
    for split, entries in annotations.new.items():
        if annotations.old.get(split) == entries:
            continue
        with atomic_files.atomic_write(annotations.path(split)) as part:
            part.write_text(json_text(entries), encoding="utf-8")
        changed += 1
    return changed


def medclipseg_texts(args):
    """Add the texts of the MedCLIPSeg repository to the annotation files of a data set.

    Entries of train, val and test get the prompt type m_original; those of test also
    m_contradictory, m_missing_location, m_overdescriptive and m_underdescriptive. The lists of 10,
    25 and 50 % of the images become the splits train_10, val_10, …, for example for train.py
    --data DATA:train_10.

    Nothing is written if a spreadsheet does not fit the data set.
    """
    if not (args.data / "anns").is_dir():
        raise FileNotFoundError(f"{args.data}: no data set with anns/, whose entries get the texts")
    folder = find_folder(args.texts)

    with atomic_files.claim_folder(args.data / "anns"):
        annotations = read_all(args.data)
        lines = []
        for split in SPLITS:
            sheets = add_texts(folder, annotations, split)
            parts = [*add_parts(folder, annotations, split, sheets)]
            if sheets:
                lines.append(summary(annotations, split, sheets))
            if sheets and not args.overwrite:
                refuse_other_texts(annotations, split, sheets)
            for part in parts:
                lines.append(summary(annotations, part, sheets))
                if not args.overwrite:
                    refuse_other_part(annotations, part)
        changed = write_changed(annotations)

    print("\n".join(lines))
    print(f"{changed} annotation files written" if changed else "nothing changed")
    return 0


def options(command):
    """Describe `prepare.py medclipseg-texts`."""
    add = command(medclipseg_texts, "add MedCLIPSeg's texts to a data set as prompt types")
    help = "folder data/SET/Prompts_Folder of the repository HealthX-Lab/MedCLIPSeg"
    add("--texts", type=Path, required=True, metavar="FOLDER", help=help)
    help = "data set with anns/train.json, anns/val.json or anns/test.json; these files are changed"
    add("--data", type=Path, required=True, metavar="DATA", help=help)
    help = "replace other texts of these types, and other files anns/train_10.json, …"
    add("--overwrite", action="store_true", help=help)
