"""prepare.py import: what all formats of images share, tested with a format made here."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import command, rows
from PIL import Image

import prepare
from imaging import layouts
from preparation import import_folder
from preparation.readings import Case, Format, ImageReading, Object

SIZE = (24, 32)  # H, W


def box(x0, y0, x1, y1):
    """bool (H,W), True in a box with both corners inside."""
    mask = np.zeros(SIZE, bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def photos(folder, n=12):
    """A folder of n different pictures of 32x24 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 255, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photo{k:02d}.png")
    return folder


def reading_of(folder, objects, classes=(), **fields):
    """A reading in which every picture of a folder has the same objects."""
    cases = []
    for path in sorted(folder.glob("*.png")):
        cases.append(Case(path.stem, path, lambda size: objects, **fields))
    return ImageReading("made", [f"{len(cases)} pictures"], cases, classes)


@pytest.fixture
def make(monkeypatch, capsys, tmp_path):
    """Run `prepare.py import` on readings made here. Return the status, the output, the errors."""

    def run(readings, *options):
        made = Format("made", "made by a test", lambda folder, args: readings)
        monkeypatch.setattr(import_folder, "FORMATS", (made,))
        arguments = ["import", tmp_path / "photos", "--out", tmp_path / "mine", *options]
        return command(monkeypatch, capsys, prepare, *arguments)

    photos(tmp_path / "photos")
    return run


def entries_of(root):
    """{split: items of its annotation file}"""
    return {path.stem: json.loads(path.read_text()) for path in (root / "anns").iterdir()}


def mask_of(root, entry):
    return np.asarray(Image.open(root / "masks" / entry["mask_name"]))


def test_objects_without_classes_become_one_mask(make, tmp_path):
    objects = [Object("", box(0, 0, 3, 3)), Object("", box(8, 8, 9, 9))]
    status, text, error = make([reading_of(tmp_path / "photos", objects)], "--prompt", "a polyp")
    assert status == 0, error
    splits = entries_of(tmp_path / "mine")
    assert {split: len(items) for split, items in splits.items()} == {
        "train": 8,
        "val": 2,
        "test": 2,
    }
    entry = splits["train"][0]
    assert entry["prompts"] == {"p0": "", "p1": "a polyp"}
    mask = mask_of(tmp_path / "mine", entry)
    assert mask.dtype == np.uint8 and mask.shape == SIZE
    assert (mask == 255).sum() == 16 + 4 and (mask > 0).sum() == 20
    source = tmp_path / "photos" / entry["img_name"]
    assert (tmp_path / "mine/images" / entry["img_name"]).read_bytes() == source.read_bytes()
    assert (tmp_path / "mine/overview.png").is_file()
    assert layouts.read_entries(tmp_path / "mine", "val")


def test_a_later_object_covers_earlier_ones_of_other_classes(make, tmp_path):
    objects = [Object("liver", box(0, 0, 9, 9)), Object("tumour", box(5, 5, 12, 9))]
    reading = reading_of(tmp_path / "photos", objects, ("tumour", "liver"))
    status, text, error = make([reading])
    assert status == 0, error
    assert "overlap in 12 images" in text
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "tumour", "2": "liver"}
    mask = mask_of(tmp_path / "mine", entries_of(tmp_path / "mine")["test"][0])
    assert (mask == 1).sum() == 8 * 5 and (mask == 2).sum() == 100 - 25


def test_each_class_and_each_object_become_entries(make, tmp_path):
    objects = [
        Object("liver", box(0, 0, 9, 9)),
        Object("tumour", box(5, 5, 12, 9)),
        Object("liver", box(20, 20, 21, 21)),
    ]
    reading = reading_of(tmp_path / "photos", objects, ("tumour", "liver"))
    assert make([reading], "--each", "class")[0] == 0
    by_name = {e["mask_name"]: e for e in sum(entries_of(tmp_path / "mine").values(), [])}
    assert len(by_name) == 24 and not (tmp_path / "mine/classes.json").exists()
    entry = by_name["photo03_liver.png"]
    assert entry["img_name"] == "photo03.png" and entry["prompts"] == {"p0": "", "p1": "liver"}
    assert (mask_of(tmp_path / "mine", entry) == 255).sum() == 104

    assert make([reading], "--out", tmp_path / "objects", "--each")[0] == 0
    by_name = {e["mask_name"]: e for e in sum(entries_of(tmp_path / "objects").values(), [])}
    assert len(by_name) == 36
    assert (mask_of(tmp_path / "objects", by_name["photo03_3.png"]) == 255).sum() == 4


def test_patients_stay_in_one_split(make, tmp_path):
    lines = ["image,group"]
    for k in range(12):
        lines.append(f"photo{k:02d}.png,patient {k // 3}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    assert make([reading], "--groups", tmp_path / "groups.csv")[0] == 0
    splits = entries_of(tmp_path / "mine")
    patients = {split: {e["group"] for e in items} for split, items in splits.items()}
    assert {split: len(names) for split, names in patients.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    assert len(set.union(*patients.values())) == 4


@pytest.mark.parametrize(
    "text, words",
    [
        ("image,patient\nphoto00,a", "expected a header line image,group"),
        ("image,group\nphoto00,a", "has no line for"),
        ("image,group\nphoto99,a", "line 2: no image has the name 'photo99'"),
        ("image,group\nphoto00,", "line 2: has no group"),
        ("image,group\nphoto00,\0", "line 2: has no group"),
        (
            "image,group\nphoto00,a\nphoto00.png,b",
            "line 3: photo00.png has another group in a line",
        ),
        ("image,group\n" + "a" * 140_000 + ",b", "is not valid CSV"),
    ],
)
def test_faulty_lists_of_patients_are_refused(make, tmp_path, text, words):
    (tmp_path / "groups.csv").write_text(text)
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    status, _, error = make([reading], "--groups", tmp_path / "groups.csv")
    assert status == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_a_regex_finds_the_patients_of_the_random_split(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    status, text, _ = make([reading], "--group-regex", r"photo(\d)")  # of photo00 to photo11
    assert status == 0 and "patients: 2" in text
    assert "split: all for training, with fewer than 3 patients" in text

    status, text, _ = make([reading], "--group-regex", "photo[0-9]*[0-3]?", "--out", tmp_path / "b")
    assert status == 0 and "patients: 12" in text and "of a patient in one split" in text
    groups = {e["img_name"]: e["group"] for e in entries_of(tmp_path / "b")["train"]}
    assert len(groups) == 8 and all(name == f"{group}.png" for name, group in groups.items())


def test_patients_in_names_of_folders_stay_in_one_split(make, tmp_path):
    photos(tmp_path / "photos/p1", 4)
    for name in ("p2", "p3"):
        photos(tmp_path / f"photos/{name}", 4)
    cases = []
    for path in sorted((tmp_path / "photos").glob("p*/*.png")):
        name = f"{path.parent.name}/{path.stem}"
        cases.append(Case(name, path, lambda size: [Object("", box(0, 0, 3, 3))]))
    reading = ImageReading("made", ["12 pictures"], cases)
    assert make([reading], "--group-regex", "^[^/]+")[0] == 0
    patients = []
    for items in entries_of(tmp_path / "mine").values():
        patients.append([entry["group"] for entry in items])
    assert sorted(map(len, patients)) == [4, 4, 4]
    assert sorted(names[0] for names in patients if len({*names}) == 1) == ["p1", "p2", "p3"]


@pytest.mark.parametrize(
    "regex, words",
    [
        ("case", "--group-regex case finds nothing in photo00.png"),
        (r"\d?$", r"--group-regex \d?$ finds nothing in photo00.png"),
        ("(", "--group-regex (: "),
    ],
)
def test_a_regex_that_finds_no_patient_is_refused(make, tmp_path, regex, words):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    status, _, error = make([reading], "--group-regex", regex)
    assert status == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_two_sources_of_patients_are_refused(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    options = ("--group-regex", "photo", "--groups", tmp_path / "groups.csv")
    status, _, error = make([reading], *options)
    assert status == 2 and "both name the patients; remove one" in error


def test_a_random_split_by_image_is_announced(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    status, text, _ = make([reading])
    assert status == 0 and "split: random, by image; if patients have several images" in text
    assert (tmp_path / "mine/README.txt").read_text() in text.replace(f"{tmp_path}/mine: ", "", 1)
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines[1:4]] == ["train", "val", "test"]

    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))], split="val")
    status, text, _ = make([reading], "--out", tmp_path / "b")
    assert status == 0 and "split: as in the folder" in text


def test_classes_that_differ_in_case_or_blanks_are_announced(make, tmp_path):
    classes = ("Polyp", "polyp", "large bowel", "large_bowel", "tool")
    reading = reading_of(tmp_path / "photos", [Object("polyp", box(0, 0, 3, 3))], classes)
    status, text, _ = make([reading])
    assert status == 0
    assert "are the classes Polyp and polyp one?" in text
    assert "are the classes large bowel and large_bowel one?" in text
    assert text.count(" one? ") == 2


def test_the_sheet_names_the_colours_of_classes(make, tmp_path):
    objects = [Object("liver", box(0, 0, 3, 3)), Object("kidney", box(8, 8, 9, 9))]
    heights = []
    for name, classes in (("one", ("organ",)), ("two", ("liver", "kidney"))):
        named = objects if len(classes) > 1 else [Object("organ", box(0, 0, 3, 3))]
        reading = reading_of(tmp_path / "photos", named, classes)
        assert make([reading], "--out", tmp_path / name)[0] == 0
        sheet = np.asarray(Image.open(tmp_path / name / "overview.png"))
        heights.append(len(sheet))
    assert heights[1] == heights[0] + 44 + 6  # a row of 20 pixels for each class, and a gap
    green, red = sheet[-44 + 12, 12], sheet[-44 + 32, 12]  # the boxes of the legend
    assert green[1] == 255 and green[0] < 100 and red[0] == 255 and red[1] < 100


def test_splits_of_the_folder_are_kept(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))], split="val")
    assert make([reading])[0] == 0
    assert {s: len(items) for s, items in entries_of(tmp_path / "mine").items()} == {"val": 12}


def test_rotated_photos_become_upright(make, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to the right to see it upright
    pixels = np.zeros((*SIZE[::-1], 3), np.uint8)
    pixels[:, :5] = 200  # the left columns become the upper rows
    path = tmp_path / "photos/turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)

    case = Case("turned", path, lambda size: [Object("", box(0, 0, 3, 3))])
    assert make([ImageReading("made", ["1 picture"], [case])])[0] == 0
    written = np.asarray(Image.open(tmp_path / "mine/images/turned.png"))
    assert written.shape == (*SIZE, 3)
    assert written[:4].min() > 150 and written[7:].max() < 60


def test_a_mask_of_another_size_is_refused_by_name(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", np.ones((5, 5), bool))])
    status, _, error = make([reading])
    assert status == 2 and "photo00.png: 32x24, but its mask is 5x5" in error
    assert not (tmp_path / "mine").exists()


def test_no_format_and_several_formats_are_refused(make, tmp_path):
    status, _, error = make([])
    assert status == 2 and "12 .png" in error and "--images 'GLOB'" in error
    one = reading_of(tmp_path / "photos", [])
    status, _, error = make([one, one])
    assert status == 2 and "can be read in 2 ways" in error and "--format made" in error


def test_the_same_import_gives_the_same_folder_and_never_overwrites(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    assert make([reading])[0] == 0
    assert make([reading], "--out", tmp_path / "again")[0] == 0
    files = sorted(p.relative_to(tmp_path / "mine") for p in (tmp_path / "mine").rglob("*.*"))
    assert len(files) == 12 + 12 + 3 + 2
    for name in files:
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    status, _, error = make([reading])
    assert status == 2 and "exists already" in error


def test_archives_and_missing_folders_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    for name, words in (("a.zip", "is a file; unpack an archive"), ("b", "no such folder\n")):
        arguments = ["import", tmp_path / name, "--out", tmp_path / "mine"]
        status, _, error = command(monkeypatch, capsys, prepare, *arguments)
        assert status == 2 and f"{tmp_path / name}: {words}" in error


def test_a_folder_in_another_layout_is_refused_with_the_command_that_imports_it(tmp_path):
    photos(tmp_path / "my photos", 3)
    with pytest.raises(
        ValueError, match="not a data set; .*; python prepare.py import '/.*photos'"
    ):
        layouts.read_entries(tmp_path / "my photos", "train")


def test_a_folder_within_the_source_is_refused(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [])
    status, _, error = make([reading], "--out", tmp_path / "photos/mine")
    assert status == 2 and "lies within" in error


def test_an_image_without_objects_has_a_prompt_that_says_so(make, tmp_path):
    assert make([reading_of(tmp_path / "photos", [])], "--prompt", "polyp")[0] == 0
    (entry, *_) = entries_of(tmp_path / "mine")["train"]
    assert entry["prompts"] == {"p0": "", "p1": "no polyp"}
    assert not mask_of(tmp_path / "mine", entry).any()


def test_patients_of_images_are_found_in_either_unicode_form(make, tmp_path):
    (tmp_path / "photos/photo00.png").rename(tmp_path / "photos/u\u0308.png")
    lines = ["image,group", "\u00fc,a"]
    for k in range(1, 12):
        lines.append(f"photo{k:02d},b{k}")
    (tmp_path / "groups.csv").write_text("\n".join(lines), encoding="utf-8")
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    assert make([reading], "--groups", tmp_path / "groups.csv")[0] == 0


def test_masks_of_classes_with_like_or_odd_names_get_names_of_their_own(make, tmp_path):
    classes = ("a b", "a_b", "A_B", "x\ny", 'q"\\')
    objects = [Object(name, box(k, 0, k, 3)) for k, name in enumerate(classes)]
    assert make([reading_of(tmp_path / "photos", objects, classes)], "--each", "class")[0] == 0
    names = {}
    for items in entries_of(tmp_path / "mine").values():
        for item in items:
            if item["img_name"] == "photo00.png":
                names[item["prompts"]["p1"]] = item["mask_name"]
    endings = ["a_b", "a_b_2", "A_B_3", "x_y", "q__"]
    expected = [f"photo00_{ending}.png" for ending in endings]
    assert names == dict(zip(classes, expected, strict=True))
    for k, name in enumerate(classes):
        mask = np.asarray(Image.open(tmp_path / "mine/masks" / names[name]))
        assert (mask == np.uint8(255) * box(k, 0, k, 3)).all()
    for split in ("train", "val", "test"):
        layouts.check_files_exist(layouts.read_entries(tmp_path / "mine", split))


def test_names_that_no_disk_takes_are_refused_in_one_line(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("k" * 250, box(0, 0, 3, 3))], ("k" * 250,))
    status, _, error = make([reading], "--each", "class")
    assert status == 2 and "would be a name of 262 bytes, but disks take 255" in error
    assert error.count("\n") == 1 and not (tmp_path / "mine").exists()


def test_more_classes_than_a_mask_holds_are_refused(make, tmp_path):
    classes = tuple(f"c{k}" for k in range(255))
    reading = reading_of(tmp_path / "photos", [Object("c254", box(0, 0, 3, 3))], classes)
    status, _, error = make([reading])
    assert status == 2 and "has 255 classes; a mask holds 254" in error
    assert not (tmp_path / "mine").exists()


def test_each_without_any_object_is_refused(make, tmp_path):
    status, _, error = make([reading_of(tmp_path / "photos", [])], "--each")
    assert status == 2 and "shows no object" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_outputs_that_no_folder_can_be_are_refused(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))])
    (tmp_path / "mine").symlink_to("nowhere")
    assert "mine: exists already" in make([reading])[2]
    (tmp_path / "file").write_text("x")
    status, _, error = make([reading], "--out", tmp_path / "file/a")
    assert status == 2 and "file/a: lies below a file" in error


def test_spacings_of_images_with_commas_in_their_names_are_read_again(make, tmp_path):
    (tmp_path / "photos/photo00.png").rename(tmp_path / 'photos/a, "b".png')
    objects = [Object("", box(0, 0, 3, 3))]
    assert make([reading_of(tmp_path / "photos", objects, spacing=(0.5, 0.25))])[0] == 0
    spacings = rows(tmp_path / "mine/spacing.csv")
    assert {"image": 'a, "b".png', "x_mm": "0.5", "y_mm": "0.25"} in spacings


def test_an_image_outside_the_split_folders_is_named(make, tmp_path):
    reading = reading_of(tmp_path / "photos", [Object("", box(0, 0, 3, 3))], split="train")
    cases = [*reading.cases[:-1], replace(reading.cases[-1], split="")]
    status, _, error = make([replace(reading, cases=cases)])
    assert status == 2 and f"{tmp_path}/photos/photo11.png: lies in no split folder" in error
    assert "11 other images" in error
