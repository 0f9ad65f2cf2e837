"""prepare.py uw-madison, on downloads in Kaggle's form made here and run lengths made by hand."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command, contents, pictures, stop_at_rename, zipped
from PIL import Image

import prepare
from imaging import image_files, layouts
from preparation import uw_madison

CLASSES = ("large_bowel", "small_bowel", "stomach")  # the order of the rows in train.csv
NAMES = {"0": "background", "1": "stomach", "2": "small bowel", "3": "large bowel"}


def write_slice(root, scan, number, pixels, name="266_266_1.50_1.50"):
    """A slice as Kaggle stores it: grey, 16 bits."""
    folder = root / "train" / scan.split("_")[0] / scan / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint16))
    assert image.mode == "I;16"
    image.save(folder / f"slice_{number:04}_{name}.png")


def write_table(root, outlines):
    """train.csv of {slice: {class: runs}}: a row for each class of a slice, empty if absent."""
    with open(root / "train.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "class", "segmentation"])
        for name, runs in outlines.items():
            table.writerows([name, organ, runs.get(organ, "")] for organ in CLASSES)


def download(root, cases=range(11, 19), days=(0, 20), slices=6, empty=2):
    """Scans of `slices` slices, the first `empty` of them without organs; returns the outlines."""
    rng, outlines = np.random.default_rng(0), {}
    for case in cases:
        for day in days:
            for number in range(1, slices + 1):
                write_slice(root, f"case{case}_day{day}", number, rng.integers(0, 900, (3, 4)))
                runs = {"stomach": "1 2", "large_bowel": "7 3"} if number > empty else {}
                outlines[f"case{case}_day{day}_slice_{number:04}"] = runs
    write_table(root, outlines)
    return outlines


def run(root, out, *options):
    assert prepare.main(["uw-madison", str(root), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("uw") / "download"
    return root, download(root)


# --- pixels --------------------------------------------------------------------------------------

RUNS = {  # of 3 rows and 4 columns
    # row after row, from 1 on: stomach 0 1 4, small bowel 1 2, large bowel 2 11
    "case1_day0_slice_0001": {
        "stomach": "1 2 5 1",
        "small_bowel": "2 2",
        "large_bowel": "3 1 12 1",
    },
    "case1_day0_slice_0002": {"large_bowel": "1 12"},
    "case1_day0_slice_0003": {"small_bowel": "4 2", "large_bowel": "4 2"},
    "case1_day0_slice_0004": {"stomach": "12 1", "small_bowel": "12 1", "large_bowel": "12 1"},
    "case1_day0_slice_0005": {"small_bowel": "1 1 4 1 9 1"},
    "case1_day0_slice_0006": {},
}
MASKS = [
    [[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 3]],
    [[3, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3]],
    [[0, 0, 0, 2], [2, 0, 0, 0], [0, 0, 0, 0]],
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
    [[2, 0, 0, 2], [0, 0, 0, 0], [2, 0, 0, 0]],
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
]


@pytest.fixture
def by_hand(tmp_path):
    root = tmp_path / "download"
    for number in range(1, 7):  # the name lies about the size
        write_slice(root, "case1_day0", number, np.arange(12).reshape(3, 4), "3_4_1.63_1.63")
    write_table(root, RUNS)
    return root


def test_masks_by_hand(by_hand, tmp_path, capsys):
    out = run(by_hand, tmp_path / "out", "--split", "slice", "--keep-empty")
    masks = pictures(out, "masks")
    assert list(masks) == list(RUNS)
    for (_, mask), expected in zip(masks.values(), MASKS, strict=True):
        assert mask.dtype == np.uint8 and mask.tolist() == expected
    # 1 and 2 of the first slice, two pixels of the third, one pixel of the fourth (counted once)
    said = "pixels in several organs: 5, given to the first of stomach, small_bowel, large_bowel"
    assert said in capsys.readouterr().out.splitlines()


def test_masks_show_their_classes_and_read_as_numbers(by_hand, tmp_path):
    out = run(by_hand, tmp_path / "out", "--split", "slice")
    assert json.loads((out / "classes.json").read_text()) == NAMES
    entries = [e for split in ("train", "val") for e in layouts.read_entries(out, split)]
    assert len(entries) == 5 and entries[0].classes == tuple(NAMES.values())
    for entry in entries:
        expected = MASKS[int(entry.name[-1]) - 1]
        assert image_files.read_mask(entry.mask, entry.image, numbers=True).tolist() == expected
        assert Image.open(entry.mask).mode == "P"
    path = next(out.glob("*/masks/*_0001.png"))
    colours = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 4 and not colours[3].any()  # background is black


@pytest.mark.filterwarnings("error")  # a slice of one value has no range to divide by
def test_window_of_a_slice(tmp_path):
    """Minimum to maximum, decimals cut off, as `uint8(255 * (x - min) / (max - min))` does."""
    root = tmp_path / "download"
    write_slice(root, "case1_day0", 1, [[100, 228, 355], [101, 354, 200]])  # a range of 255
    write_slice(root, "case1_day0", 2, [[1000, 1003, 1510], [1001, 1509, 1255]])  # of 510
    write_slice(root, "case1_day0", 3, [[0, 65535, 32896], [40000, 256, 257]])  # of 65535 = 255*257
    write_slice(root, "case1_day0", 4, [[7, 7, 7], [7, 7, 7]])
    write_table(root, {f"case1_day0_slice_{k:04}": {"stomach": "1 1"} for k in range(1, 5)})
    out = run(root, tmp_path / "out", "--split", "slice", "--window", "slice")
    images = [image for _, image in pictures(out, "images").values()]
    assert all(image.dtype == np.uint8 and image.shape == (2, 3) for image in images)
    assert images[0].tolist() == [[0, 128, 255], [1, 254, 100]]
    assert images[1].tolist() == [[0, 1, 255], [0, 254, 127]]
    assert images[2].tolist() == [[0, 255, 128], [155, 0, 1]]
    assert images[3].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_window_of_a_scan(tmp_path):
    """201 pixels of 0, 10, ..., 2000 in three slices: the percentiles are 10 and 1990 exactly."""
    root = tmp_path / "download"
    values = np.random.default_rng(0).permutation(201).reshape(3, 1, 67) * 10
    for number, pixels in enumerate(values, 1):
        write_slice(root, "case1_day0", number, pixels)
        write_slice(root, "case1_day1", number, pixels * 30)  # another day has its own window
    outlines = {f"case1_day{d}_slice_{k:04}": {"stomach": "1 1"} for d in (0, 1) for k in (1, 2)}
    write_table(root, outlines | {f"case1_day{d}_slice_0003": {} for d in (0, 1)})
    images = pictures(run(root, tmp_path / "out", "--split", "slice"), "images")
    assert images.keys() == outlines.keys()  # the third counts, though it is left out
    for name, (_, image) in images.items():
        x = values[int(name[-1]) - 1].astype(int)
        # cut off: 255 * (x - 10) / 1980 in whole numbers
        assert image.tolist() == np.clip((x - 10) * 255 // 1980, 0, 255).tolist()
    everything = pictures(run(root, tmp_path / "all", "--split", "slice", "--keep-empty"), "images")
    assert len(everything) == 6
    assert all((everything[name][1] == image).all() for name, (_, image) in images.items())


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_case_is_on_two_sides(small, tmp_path, seed):
    root, outlines = small
    out = run(root, tmp_path / "out", "--seed", str(seed))
    images, masks = pictures(out, "images"), pictures(out, "masks")
    assert {n: s for n, (s, _) in images.items()} == {n: s for n, (s, _) in masks.items()}
    assert set(images) == {name for name, runs in outlines.items() if runs}
    cases = {
        split: {n.split("_")[0] for n in images if images[n][0] == split}
        for split in layouts.SPLITS
    }
    # 8 cases: 0.15 * 8 = 1.2 and 0.30 * 8 = 2.4, the places 0 and 1/8, then 2/8
    assert {split: len(found) for split, found in cases.items() if found} == {
        "train": 5,
        "val": 1,
        "test": 2,
    }
    assert not cases["train"] & cases["val"] | cases["train"] & cases["test"]
    assert not cases["val"] & cases["test"]
    everything = run(root, tmp_path / "all", "--seed", str(seed), "--keep-empty")
    everything = pictures(everything, "images")
    assert set(everything) == set(outlines)  # and nobody has moved
    assert all(everything[name][0] == split for name, (split, _) in images.items())


def listed(cases, organs=lambda k: True):
    return [
        uw_madison.Slice(
            f"case{c}_day0_slice_{k:04}", None, {1: ["1", "1"] * organs(k)}, f"case{c}", ""
        )
        for c in range(cases)
        for k in range(10)
    ]


def test_85_cases_and_seeds():
    dealt = []
    for seed in 0, 1, 0:
        slices = listed(85)
        uw_madison.choose_splits(slices, "case", False, seed)
        of_case = {s.case: s.split for s in slices}
        assert all(s.split == of_case[s.case] for s in slices)
        counts = [list(of_case.values()).count(split) for split in ("train", "val", "test")]
        assert counts == [59, 13, 13]
        dealt.append(of_case)
    assert dealt[0] == dealt[2] != dealt[1]


def test_a_case_without_organs_moves_no_other():
    dealt = []
    for keep_empty in False, True:
        slices = [s for s in listed(20) if s.case != "case7"] + listed(8, lambda k: False)[70:]
        uw_madison.choose_splits(slices, "case", keep_empty, 0)
        dealt.append({s.case: s.split for s in slices})
    assert dealt[0].pop("case7") is None and dealt[1].pop("case7") is not None
    assert dealt[0] == dealt[1]


def test_split_by_slice_is_80_to_20_within_each_case():
    slices = listed(12, organs=lambda k: k >= 5)
    uw_madison.choose_splits(slices, "slice", False, 0)
    chosen = set()
    for case in {s.case for s in slices}:
        ours = [s for s in slices if s.case == case]
        assert [s.split for s in ours[:5]] == [None] * 5
        assert sorted(s.split for s in ours[5:]) == ["train"] * 4 + ["val"]
        chosen.add([s.split for s in ours].index("val"))
    assert len(chosen) > 1  # at random, not always the same one
    uw_madison.choose_splits(slices, "slice", True, 0)
    assert [s.split for s in slices].count("val") == 24


def test_split_by_slice_says_that_it_leaks(small, tmp_path, capsys):
    out = run(small[0], tmp_path / "out", "--split", "slice")
    assert "LEAK: train and val hold neighbouring slices" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.txt",
        "classes.json",
        "train",
        "val",
    ]
    run(small[0], tmp_path / "honest")
    assert "LEAK" not in capsys.readouterr().out


def test_what_is_said_is_what_is_there(small, tmp_path, capsys):
    out = run(small[0], tmp_path / "out")
    said = capsys.readouterr().out
    assert said == f"{out}: {(out / 'README.txt').read_text()}"
    lines = said.splitlines()
    assert lines[0].endswith("split by case, seed 0, window of a scan")
    # 8 a case: two days of 6 slices, 4 of which show stomach and large bowel
    assert (
        lines[1]
        == "train: 40 slices of 5 cases, stomach in 40, small_bowel in 0, large_bowel in 40"
    )
    assert lines[2].startswith("val: 8 slices of 1 cases") and lines[3].startswith(
        "test: 16 slices"
    )
    assert "slices without organs: 32, left out" in lines
    assert "pixels in mm: 1.50 x 1.50 in 64" in lines


@pytest.mark.parametrize("split", ["case", "slice"])
def test_same_seed_same_bytes_whatever_the_order_of_the_rows(small, tmp_path, split):
    root, outlines = small
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").symlink_to(root / "train")
    write_table(tmp_path / "other", dict(reversed(outlines.items())))
    first = contents(run(root, tmp_path / "a", "--split", split))
    assert first == contents(run(tmp_path / "other", tmp_path / "b", "--split", split))
    assert first != contents(run(root, tmp_path / "c", "--split", split, "--seed", "1"))


def test_faulty_scans_are_left_out(tmp_path, capsys):
    root, cases = tmp_path / "download", (7, 17, 70, 77, 8, 81)
    download(root, cases, days=(0, 30), slices=2, empty=0)
    shutil.rmtree(root / "train" / "case7" / "case7_day0")  # nobody needs their files
    masks = pictures(run(root, tmp_path / "out"), "masks")
    everything = {f"case{case}_day{day}" for case in cases for day in (0, 30)}
    left = {name.split("_slice")[0] for name in masks}
    assert left == everything - {"case7_day0", "case81_day30"}
    assert "faulty: case7_day0, case81_day30" in capsys.readouterr().out


# --- errors --------------------------------------------------------------------------------------


def no_table(root):
    (root / "train.csv").unlink()
    return f"{root / 'train.csv'}: no such file"


def no_slice(root):
    next(root.glob("train/case13/case13_day20/scans/slice_0004*")).unlink()
    return f"{root / 'train'}: no file of 1 (case13_day20_slice_0004)"


def no_images(root):
    (root / "train").rename(root / "test")
    return f"{root / 'train'}: no file of 96 (case11_day0_slice_0001, "


def truncated(root):
    path = next(root.glob("train/case13/case13_day20/scans/slice_0004*"))
    path.write_bytes(path.read_bytes()[:-35])
    return f"{path}: not readable as an image"


def no_csv(root):
    (root / "train.csv").write_bytes(b"PK\3\4\xff\0\n" * 9)
    return f"{root / 'train.csv'}, line "


def no_rows(root):
    write_table(root, {})
    return "0 slices are too few"


def spoil(old, new, said):
    """Replaces the first such text in train.csv."""

    def change(root):
        text = (root / "train.csv").read_text()
        assert old in text
        (root / "train.csv").write_text(text.replace(old, new, 1))
        return said

    return change


RLE = "train.csv, case11_day0_slice_0003, class 1: run "
DEFECTS = {
    "no table": no_table,
    "no slice": no_slice,
    "no images": no_images,
    "truncated": truncated,
    "no csv": no_csv,
    "no rows": no_rows,
    "past the end": spoil("stomach,1 2", "stomach,1 2 12 2", RLE + "12 2 is no start and length"),
    "zero start": spoil("stomach,1 2", "stomach,0 2", RLE + "0 2"),
    "no length": spoil("stomach,1 2", "stomach,1 0", RLE + "1 0"),
    "odd": spoil("stomach,1 2", "stomach,1 2 5", RLE + "5 0"),
    "negative": spoil("stomach,1 2", "stomach,5 -2", RLE + "5 0"),
    "words": spoil("stomach,1 2", "stomach,nan", RLE + "0 0"),
    "huge": spoil("stomach,1 2", "stomach,1 99999999999999999999", RLE + "1 99999"),
    "class": spoil("stomach", "liver", "train.csv, line 4: KeyError('liver'); expected columns"),
    "columns": spoil("segmentation", "runs", "train.csv, line 2: KeyError('segmentation')"),
    "short row": spoil("large_bowel,7 3", "large_bowel", "train.csv, line 8: "),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, defect):
    root, out = tmp_path / "download", tmp_path / "out"
    download(root)
    said = DEFECTS[defect](root)
    code, text, error = command(monkeypatch, capsys, prepare, "uw-madison", root, "--out", out)
    assert code == 2 and text == "" and error.count("\n") == 1 and said in error
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_out_that_exists_is_left_alone(small, tmp_path, monkeypatch, capsys, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "mine").write_text("mine")
    before = contents(tmp_path)
    code, text, error = command(monkeypatch, capsys, prepare, "uw-madison", small[0], "--out", out)
    assert code == 2 and text == "" and error.startswith(f"error: {out}: exists already")
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("cases", [1, 2, 3, 4])
def test_few_cases(tmp_path, monkeypatch, capsys, cases):
    root, out = tmp_path / "download", tmp_path / "out"
    download(root, range(cases), days=(0,), slices=2, empty=0)
    code, _, error = command(monkeypatch, capsys, prepare, "uw-madison", root, "--out", out)
    assert code == (0 if cases == 4 else 2) and ("would be empty" in error) == (cases < 4)
    assert out.exists() == (cases == 4)


@pytest.mark.parametrize("option", ["--split patient", "--window 0-100", "--keep", "--seed -1"])
def test_wrong_options(small, tmp_path, monkeypatch, capsys, option):
    arguments = ["uw-madison", small[0], "--out", tmp_path / "out", *option.split()]
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(small, tmp_path, monkeypatch, capsys):
    whole = contents(run(small[0], tmp_path / "whole"))
    moved = stop_at_rename(monkeypatch, tmp_path / "out")
    arguments = "uw-madison", small[0], "--out", tmp_path / "out"
    assert command(monkeypatch, capsys, prepare, *arguments)[0] == 2
    assert moved == [whole] and [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_program_as_the_docstring_has_it(small, tmp_path):
    arguments = [sys.executable, str(ROOT / "prepare.py"), "uw-madison", str(small[0])]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("data/uw_madison: UW-Madison GI Tract, split by case")
    assert len(pictures(tmp_path / "data" / "uw_madison", "images")) == 64


def test_an_archive_gives_the_same_as_its_folder(small, tmp_path, monkeypatch, capsys):
    root, _ = small
    archive = zipped(root, tmp_path / "uw.zip")
    arguments = ["uw-madison", "--raw", archive, "--out", tmp_path / "a"]
    status, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert status == 0, error
    assert contents(tmp_path / "a") == contents(run(root, tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "uw.zip"]


def test_the_download_is_named_once(small, tmp_path, monkeypatch, capsys):
    root, _ = small
    for arguments, words in ((), "is missing"), ((root, "--raw", root), "is given twice"):
        given = ["uw-madison", *arguments, "--out", tmp_path / "out"]
        status, _, error = command(monkeypatch, capsys, prepare, *given)
        assert status == 2 and f"DOWNLOAD {words}" in error and error.count("\n") == 1


def test_errors_name_the_archive(tmp_path, monkeypatch, capsys):
    root = tmp_path / "download"
    download(root)
    truncated(root)
    archive = zipped(root, tmp_path / "uw.zip")
    given = ["uw-madison", archive, "--out", tmp_path / "out"]
    status, _, error = command(monkeypatch, capsys, prepare, *given)
    assert status == 2 and f"{archive}: download/train/" in error and ".unpacked" not in error
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unpacked").exists()
