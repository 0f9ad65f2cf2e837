"""prepare.py medclipseg-texts: from spreadsheets to prompt types and splits."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import openpyxl
import pytest
from conftest import command, contents

import prepare
from imaging import atomic_files, layouts
from preparation import medclipseg_texts, spreadsheets

HEADER = ("Image", "Description", "Ground Truth")
TEST_SHEETS = ("contradictory", "missing_location", "overdescriptive", "underdescriptive")

# --- spreadsheets ---------------------------------------------------------------------------------


def save_sheet(path, rows):
    """A spreadsheet as openpyxl writes it: with inline strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def expected_of(path):
    """{row: {column: text}} of the first sheet by openpyxl."""
    sheet = openpyxl.load_workbook(path, read_only=True).worksheets[0]
    rows = {}
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        cells = {column: str(value) for column, value in enumerate(row, 1) if value is not None}
        if cells:
            rows[number] = cells
    return rows


def test_texts_numbers_and_gaps(tmp_path):
    path = tmp_path / "a.xlsx"
    rows = [HEADER, (), ("ä.png", "one <b> & two\n", None), (None, None, None, 7, "x"), (18, 2.5)]
    save_sheet(path, [*rows, [None] * 27 + ["AB"]])
    texts = spreadsheets.read_sheet(path)
    assert texts == expected_of(path)
    assert texts[3] == {1: "ä.png", 2: "one <b> & two\n"}
    assert texts[5] == {1: "18", 2: "2.5"} and texts[6] == {28: "AB"}


def repack(path, changes):
    """Replace parts of an archive: {name: function of its content}; None removes the part."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name, change in changes.items():
        parts[name] = change(parts.get(name, b""))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(name, content)


MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
SHEET = "xl/worksheets/sheet1.xml"
STRINGS = "xl/sharedStrings.xml"
INLINE = f"""<worksheet {MAIN}><sheetData>
<row r="1"><c r="A1" t="inlineStr"><is><t>Image</t></is></c>
<c t="inlineStr"><is><t>B</t></is></c></row>
<row><c t="inlineStr"><is><r><t>one </t></r><r><t xml:space="preserve">two\n</t></r></is></c></row>
<row r="9"><c r="C9" t="str"><f>A1</f><v>formula</v></c><c t="inlineStr"><is/></c></row>
</sheetData></worksheet>"""
SHARED = f"""<worksheet {MAIN}><sheetData>
<row r="1"><c r="A1" t="s"><v>1</v></c><c r="B1" t="s"><v>0</v></c></row>
<row r="2"><c r="A2" t="s"><v>2</v></c><c r="B2" t="b"><v>1</v></c></row>
</sheetData></worksheet>"""
LISTED = f"""<sst {MAIN}><si><t>Description</t></si><si><t>Image</t></si>
<si><r><t xml:space="preserve">pink </t></r><r><t>polyp</t></r>
<rPh sb="0" eb="4"><t>sound</t></rPh></si></sst>"""
# What tells openpyxl that there are shared strings.
TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
OVERRIDE = f'<Override PartName="/{STRINGS}" ContentType="{TYPE}"/></Types>'


def save_shared(path):
    """A spreadsheet with shared strings, as Excel writes it."""
    save_sheet(path, [])
    changes = {SHEET: lambda _: SHARED.encode(), STRINGS: lambda _: LISTED.encode()}
    changes["xl/_rels/workbook.xml.rels"] = lambda x: x.replace(b'"/xl/worksheets', b'"worksheets')
    changes["[Content_Types].xml"] = lambda x: x.replace(b"</Types>", OVERRIDE.encode())
    repack(path, changes)


def test_shared_strings(tmp_path):
    path = tmp_path / "a.xlsx"
    save_shared(path)
    texts = spreadsheets.read_sheet(path)
    assert texts == {1: {1: "Image", 2: "Description"}, 2: {1: "pink polyp", 2: "1"}}
    del texts[2][2]  # openpyxl makes it True
    expected = expected_of(path)
    assert expected[2].pop(2) == "True"
    assert texts == expected


def test_inline_strings_and_missing_numbers(tmp_path):
    path = tmp_path / "a.xlsx"
    save_sheet(path, [HEADER])
    repack(path, {SHEET: lambda _: INLINE.encode()})
    texts = spreadsheets.read_sheet(path)
    assert texts == {1: {1: "Image", 2: "B"}, 2: {1: "one two\n"}, 9: {3: "formula"}}


def test_an_empty_sheet_and_several_sheets(tmp_path):
    path = tmp_path / "a.xlsx"
    save_sheet(path, [])
    assert spreadsheets.read_sheet(path) == {}
    book = openpyxl.Workbook()
    book.active.append(["first"])
    book.create_sheet("second").append(["second"])
    book.active = 1
    book.save(path)
    assert spreadsheets.read_sheet(path) == {1: {1: "first"}}


BOMB = b'<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]>'
DAMAGED = {
    "no archive": (lambda p: p.write_bytes(b"\xd0\xcf\x11\xe0" * 200), "not a readable .xlsx file"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-500]), "not a readable .xlsx file"),
    "another letter": (lambda p: flip(p), "Bad CRC-32"),
    "no workbook": (
        lambda p: repack(p, {"xl/workbook.xml": lambda _: None}),
        "no item named 'xl/workbook.xml'",
    ),
    "no sheet": (
        lambda p: repack(p, {"xl/workbook.xml": lambda _: f"<workbook {MAIN}/>".encode()}),
        "it has no sheet",
    ),
    "no file of the sheet": (lambda p: repack(p, {SHEET: lambda _: None}), "no item named"),
    "doctype": (lambda p: repack(p, {SHEET: lambda x: BOMB + x}), "it declares a DOCTYPE"),
    "doctype in UTF-16": (
        lambda p: repack(p, {SHEET: lambda x: (BOMB + x).decode().encode("utf-16")}),
        "it declares a DOCTYPE",
    ),
    "no XML": (lambda p: repack(p, {SHEET: lambda x: x[:-9]}), "not a readable .xlsx file"),
    "no such text": (
        lambda p: repack(p, {SHEET: lambda _: SHARED.encode()}),
        "list index out of range",
    ),
    "an unknown encoding": (
        lambda p: repack(p, {SHEET: lambda x: b'<?xml version="1.0" encoding="foo"?><a/>'}),
        "unknown encoding: foo",
    ),
    "a negative text": (
        lambda p: repack(
            p,
            {
                SHEET: lambda _: SHARED.replace("<v>1<", "<v>-1<").encode(),
                STRINGS: lambda _: LISTED.encode(),
            },
        ),
        "a cell refers to the text -1",
    ),
    "bzip2": (lambda p: compress_badly(p, zipfile.ZIP_BZIP2), "Invalid data stream"),
    "lzma": (lambda p: compress_badly(p, zipfile.ZIP_LZMA), "orrupt"),
    "an error": (
        lambda p: repack(p, {SHEET: lambda x: x.replace(b'A1" t="inlineStr"', b'A1" t="e"')}),
        "its cell A1 holds the error",
    ),
    "Git LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "run git lfs pull",
    ),
}


def flip(path):
    """Change a letter of a text that is stored without compression."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    path.write_bytes(path.read_bytes().replace(b"polyp", b"palyp"))


def compress_badly(path, compression):
    """Compress the archive in another way, and damage the first file in it."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts = {"xl/workbook.xml": parts.pop("xl/workbook.xml")} | parts
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_spreadsheets_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "a.xlsx"
    save_sheet(path, [HEADER, ("a.png", "polyp", "a.png")])
    spreadsheets.read_sheet(path)
    damage, words = DAMAGED[kind]
    damage(path)
    with pytest.raises(ValueError) as caught:
        spreadsheets.read_sheet(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and "\n" not in message


def test_a_part_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.xlsx"
    save_sheet(path, [HEADER])
    monkeypatch.setattr(spreadsheets, "LARGEST", 100)
    with pytest.raises(ValueError, match="would unpack to"):
        spreadsheets.read_sheet(path)


# --- the command ----------------------------------------------------------------------------------


def names_of(root, split):
    """The names of the images of a split, without ending."""
    entries = json.loads((root / f"anns/{split}.json").read_text())
    return [Path(entry["img_name"]).stem for entry in entries]


def text_rows(names, text, ending=".jpg"):
    """The rows of a spreadsheet; the texts end in a newline, as MedCLIPSeg's do."""
    return [HEADER, *((name + ending, f"{text} {name}\n", name + ending) for name in names)]


@pytest.fixture
def root(demo, tmp_path):
    """A copy of the demo set without its other splits."""
    root = tmp_path / "set"
    shutil.copytree(demo, root)
    for file in (root / "anns").iterdir():
        if file.stem not in ("train", "val", "test"):
            file.unlink()
    return root


@pytest.fixture
def texts(root, tmp_path):
    """Spreadsheets for the demo set: of the whole splits, and of a part of train and val."""
    folder = tmp_path / "Set/Prompts_Folder"
    train = names_of(root, "train")
    val = names_of(root, "val")
    test = names_of(root, "test")
    save_sheet(folder / "Train_text.xlsx", text_rows(train[::-1], "original"))
    save_sheet(folder / "Train_text_10.xlsx", text_rows(train[4:1:-1], "original"))
    save_sheet(folder / "Train_text_25.xlsx", text_rows(train[3:9], "original"))
    save_sheet(folder / "Val_text.xlsx", text_rows(val, "original"))
    save_sheet(folder / "Val_text_10.xlsx", text_rows(val[1:2], "original"))
    save_sheet(folder / "Test_text_original.xlsx", text_rows(test, "original"))
    for kind in TEST_SHEETS:
        save_sheet(folder / f"Test_text_{kind}.xlsx", text_rows(test, kind))
    return folder


def run(folder, root, *options):
    assert (
        prepare.main(["medclipseg-texts", "--texts", str(folder), "--data", str(root), *options])
        == 0
    )


def test_every_entry_gets_the_texts_of_its_image(root, texts, demo, capsys):
    run(texts, root)
    for split in ("train", "val", "test"):
        before = json.loads((demo / f"anns/{split}.json").read_text())
        after = json.loads((root / f"anns/{split}.json").read_text())
        for old, new in zip(before, after, strict=True):
            name = Path(old["img_name"]).stem
            kinds = ("original", *TEST_SHEETS) if split == "test" else ("original",)
            added = {f"m_{kind}": f"{kind} {name}" for kind in kinds}
            assert new == old | {"prompts": old["prompts"] | added}
            assert list(new["prompts"]) == [*old["prompts"], *added]

    train = names_of(demo, "train")
    assert names_of(root, "train_10") == train[2:5]
    assert names_of(root, "train_25") == train[3:9]
    assert names_of(root, "val_10") == names_of(demo, "val")[1:2]
    (entry, *_) = layouts.read_entries(root, "train_10")
    assert entry.text("m_original") == f"original {train[2]}"
    splits = {"train", "val", "test", "train_10", "train_25", "val_10"}
    assert layouts.find_splits(root).keys() == splits
    printed = capsys.readouterr().out
    assert f"{root}/anns/train_10.json: 3 entries, with m_original 3\n" in printed
    assert printed.endswith("6 annotation files written\n")


def test_again_nothing_changes(root, texts, capsys):
    run(texts, root)
    before = contents(root)
    times = {path: path.stat().st_mtime_ns for path in (root / "anns").iterdir()}
    run(texts.parent, root)  # the folder above is fine as well
    assert capsys.readouterr().out.endswith("nothing changed\n")
    run(texts, root, "--overwrite")
    assert contents(root) == before
    assert times == {path: path.stat().st_mtime_ns for path in (root / "anns").iterdir()}


@pytest.mark.parametrize("renames", range(6))
def test_a_killed_run_is_completed_by_the_next(root, texts, tmp_path, monkeypatch, renames):
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    run(texts, whole)

    replace = os.replace
    done = []

    def stop(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run(texts, root)
    for split in layouts.find_splits(root):
        layouts.read_entries(root, split)  # every file is whole
    run(texts, root)
    assert contents(root) == contents(whole)


def test_two_processes_do_not_write_at_once(root, texts, monkeypatch, capsys):
    arguments = ("medclipseg-texts", "--texts", texts, "--data", root)
    with atomic_files.claim_folder(root / "anns"):
        code, _, err = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and "another process is writing to this folder" in err
    code, _, _ = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 0


def test_check_accepts_the_result(root, texts, capsys):
    assert prepare.main(["check", str(root)]) == 0
    run(texts, root)
    capsys.readouterr()
    assert prepare.main(["check", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "errors: none" in printed
    assert "m_contradictory" in printed and "train_10" in printed

    entries = json.loads((root / "anns/test.json").read_text())
    del entries[0]["prompts"]["m_contradictory"]
    (root / "anns/test.json").write_text(json.dumps(entries))
    assert prepare.main(["check", str(root), "--strict"]) == 1
    printed = capsys.readouterr().out
    assert f"{root}/anns/test.json: m_contradictory is missing in 1 (" in printed


def test_what_real_sets_look_like(root, texts, capsys):
    """ColonDB: an empty sheet. CVC-300: no split train. ISIC: two texts. Also a part of test."""
    test = names_of(root, "test")
    for split in ("train", "val"):
        (root / f"anns/{split}.json").unlink()
    save_sheet(texts / "Val_text.xlsx", [])
    save_sheet(
        texts / "Test_text_original.xlsx",
        [*text_rows(test[:3], "a"), *text_rows(test[:1], "b")[1:]],
    )
    for kind in TEST_SHEETS:
        save_sheet(texts / f"Test_text_{kind}.xlsx", text_rows(test[:3], kind))
    run(texts, root)
    printed = capsys.readouterr().out
    assert f"{texts}/Train_text.xlsx: left out, {root} has no split train\n" in printed
    assert f"{test[0]} has 2 different texts, and gets all of them\n" in printed
    assert f"{root}/anns/test.json: {len(test)} entries, with m_original 3, " in printed
    first, *_, last = layouts.read_entries(root, "test")
    assert first.prompts["m_original"] == [f"a {test[0]}", f"b {test[0]}"]
    assert "m_original" not in last.prompts
    assert {*layouts.find_splits(root)} == {"test"}

    (root / "anns/val.json").write_text((root / "anns/test.json").read_text())
    run(texts, root)
    assert f"{texts}/Val_text.xlsx: left out, it has no rows\n" in capsys.readouterr().out


def edited(path, edit):
    """Change an annotation file."""
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(json.dumps(entries))


def rename_all(folder):
    """Put an x before the name of every file."""
    for path in [*folder.iterdir()]:
        path.rename(folder / f"x{path.name}")


REFUSED = {
    "no folder of sheets": (
        lambda root, texts: shutil.rmtree(texts),
        "no Train_text.xlsx, Val_text.xlsx or Test_text_original.xlsx",
    ),
    "no annotation files": (
        lambda root, texts: shutil.rmtree(root / "anns"),
        "no data set with anns/",
    ),
    "only other splits": (
        lambda root, texts: rename_all(root / "anns"),
        "no anns/train.json, anns/val.json or anns/test.json",
    ),
    "damaged annotations": (
        lambda root, texts: (root / "anns/val.json").write_text("[{]"),
        "val.json: is not valid JSON",
    ),
    "other columns": (
        lambda root, texts: save_sheet(texts / "Val_text.xlsx", [("File", "Text"), ("a", "b")]),
        "Val_text.xlsx: has the columns File, Text; expected Image, Description",
    ),
    "a damaged sheet": (
        lambda root, texts: (texts / "Test_text_overdescriptive.xlsx").write_bytes(b"PK"),
        "Test_text_overdescriptive.xlsx: not a readable .xlsx file",
    ),
    "no image": (
        lambda root, texts: save_sheet(texts / "Val_text.xlsx", [HEADER, (), (None, "polyp")]),
        "Val_text.xlsx, row 3: has no Image",
    ),
    "no text": (
        lambda root, texts: save_sheet(texts / "Val_text.xlsx", [HEADER, ("a.png", "\n")]),
        "Val_text.xlsx, row 2: has no Description",
    ),
    "an unknown image": (
        lambda root, texts: save_sheet(texts / "Val_text.xlsx", text_rows(["other"], "a")),
        "Val_text.xlsx, row 2: other is not in",
    ),
    "an image of another split": (
        lambda root, texts: save_sheet(
            texts / "Val_text.xlsx", text_rows(names_of(root, "test")[:1], "a")
        ),
        "val.json, but it is in test; the data set must have MedCLIPSeg's images and splits",
    ),
    "a part that is not of train": (
        lambda root, texts: save_sheet(
            texts / "Train_text_10.xlsx", text_rows(names_of(root, "val")[:1], "original")
        ),
        "Train_text_10.xlsx, row 2: Train_text.xlsx has no such text",
    ),
    "a part with other texts": (
        lambda root, texts: save_sheet(
            texts / "Train_text_10.xlsx", text_rows(names_of(root, "train")[:1], "other")
        ),
        "Train_text_10.xlsx, row 2: Train_text.xlsx has no such text",
    ),
    "two masks of an image": (
        lambda root, texts: edited(
            root / "anns/val.json", lambda x: x.append(x[0] | {"mask_name": "other.png"})
        ),
        "val.json: 2 different entries for",
    ),
    "other texts": (
        lambda root, texts: edited(
            root / "anns/test.json", lambda x: x[1]["prompts"].update(m_contradictory="mine")
        ),
        "has another m_contradictory already; --overwrite replaces it",
    ),
    "another part": (
        lambda root, texts: (root / "anns/train_10.json").write_text("[]"),
        "train_10.json: exists with other entries; --overwrite replaces it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_one_line_and_writes_nothing(root, texts, kind, monkeypatch, capsys):
    spoil, words = REFUSED[kind]
    spoil(root, texts)
    before = contents(root)
    arguments = ("medclipseg-texts", "--texts", texts, "--data", root)
    code, _, err = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert contents(root) == before

    if "--overwrite" in words:
        run(texts, root, "--overwrite")
        run(texts, root)


def test_overwriting_removes_texts_that_are_no_longer_listed(root, texts):
    run(texts, root)
    names = names_of(root, "val")
    save_sheet(texts / "Val_text.xlsx", text_rows(names[:2], "new"))
    (texts / "Val_text_10.xlsx").unlink()
    run(texts, root, "--overwrite")
    first, second, third, *_ = layouts.read_entries(root, "val")
    assert first.prompts["m_original"] == [f"new {names[0]}"]
    assert "m_original" in second.prompts and "m_original" not in third.prompts


# --- real texts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository() -> Path:
    """The folder `data` of a local copy of HealthX-Lab/MedCLIPSeg."""
    folder = Path(os.environ.get("MEDCLIPSEG_TEXTS", "MEDCLIPSEG_TEXTS"))
    if not (folder / "Kvasir/Prompts_Folder").is_dir():
        pytest.skip("MEDCLIPSEG_TEXTS names no folder data/ of HealthX-Lab/MedCLIPSeg")
    return folder


@pytest.mark.slow
def test_real_spreadsheets_are_read_as_openpyxl_reads_them(repository):
    paths = [*repository.glob("*/Prompts_Folder/*.xlsx")]
    assert len(paths) == 140
    for path in paths:
        assert spreadsheets.read_sheet(path) == expected_of(path), path


@pytest.mark.slow
def test_kvasir_s_original_texts_are_the_prompts_p6(repository, real_data, tmp_path):
    root = tmp_path / "kvasir_polyp"
    (root / "anns").mkdir(parents=True)
    for split in ("train", "val", "test"):
        file = f"anns/{split}.json"
        (root / file).write_bytes((real_data / "kvasir_polyp" / file).read_bytes())
    run(repository / "Kvasir", root)

    counts = {"train": 800, "train_10": 80, "train_25": 200, "train_50": 400}
    counts |= {"val": 100, "val_10": 10, "val_25": 25, "val_50": 50, "test": 100}
    for split, count in counts.items():
        entries = layouts.read_annotations(root, split)
        assert len(entries) == count
        for entry in entries:
            assert entry.prompts["m_original"] == entry.prompts["p6"]
    for entry in layouts.read_annotations(root, "test"):
        assert {*medclipseg_texts.sheet_names("test")} < entry.prompts.keys()
