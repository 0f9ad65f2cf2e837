"""prepare.py check: levels of findings, the next step, --fix-splits, --report and --html."""

import base64
import html.parser
import io
import json
import os
import re
import shlex
import shutil

import nibabel
import numpy as np
import pytest
from conftest import ROOT, command, contents
from PIL import Image

import options
import prepare
from imaging import atomic_files, layouts, pictures
from preparation import check_findings, check_leaks, check_pictures
from preparation.check_classes import DataSet
from preparation.check_findings import KINDS

SIZE = (48, 64)


def shade(rng):
    """A picture of smooth random shades, uint8 (H,W,3), unlike every other one."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    return (np.asarray(picture) + rng.normal(0, 4, (*SIZE, 3))).clip(0, 255).astype(np.uint8)


def write_pair(root, name, rng, height=10):
    """Write images/NAME.png and masks/NAME.png, whose foreground has `height` rows of 20 pixels."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[5 : 5 + height, 10:30] = 255
    Image.fromarray(shade(rng)).save(root / "images" / f"{name}.png")
    Image.fromarray(mask).save(root / "masks" / f"{name}.png")


def write_set(root, splits, **prompts):
    """Write a data set with anns/. splits: {split: {name: patient}}."""
    rng = np.random.default_rng(0)
    (root / "anns").mkdir(parents=True)
    for split, patients in splits.items():
        items = []
        for k, (name, patient) in enumerate(patients.items()):
            if not (root / "images" / f"{name}.png").exists():
                write_pair(root, name, rng, 5 + k)
            item = {"img_name": f"{name}.png", "mask_name": f"{name}.png", "prompts": prompts}
            items.append(item | {"group": patient, "bbox": [1, 2, 3, 4]})
        (root / "anns" / f"{split}.json").write_text(json.dumps(items))
    return root


def write_scans(root, **lists):
    """Write volumes (20,18,16) of two organs, turned to LPS. lists: of dataset.json, numbers."""
    about = {"labels": {"0": "background", "1": "liver", "2": "spleen"}}
    for key, numbers in lists.items():
        about[key] = []
        for k in numbers:
            labels = np.zeros((20, 18, 16), np.uint8)
            labels[4:12, 4:12, 4:12] = 1
            labels[12:15, 4:12, 4:12] = 2
            noise = np.random.default_rng(k).integers(-99, 99, labels.shape, dtype=np.int16)
            for folder, voxels in (("imagesTr", noise + 200 * labels), ("labelsTr", labels)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                image = nibabel.Nifti1Image(voxels, np.diag([-3.0, -3, 4, 1]))
                nibabel.save(image, root / folder / f"c{k}.nii.gz")
            item = {"image": f"imagesTr/c{k}.nii.gz", "label": f"labelsTr/c{k}.nii.gz"}
            about[key].append(item)
    (root / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture
def check(monkeypatch, capsys):
    """Run `prepare.py check`: status, stdout, stderr."""
    return lambda *words: command(monkeypatch, capsys, prepare, "check", *words)


def items_of(root, split):
    return json.loads((root / f"anns/{split}.json").read_text())


def names(root, split):
    return [item["img_name"] for item in items_of(root, split)]


def kinds(text):
    return re.findall(r"(?m)^  (\S.*): \d+$", text[text.index("\nerrors: ") :])


# --- kinds ---------------------------------------------------------------------------------------


def test_every_kind_of_finding_is_in_the_table_and_every_row_is_used():
    sources = {path: path.read_text() for path in (ROOT / "preparation").glob("check*.py")}
    table = next(text for path, text in sources.items() if path.name == "check_findings.py")
    used = table[: table.index("# All kinds")] + table[table.index("class Findings") :]
    used += "".join(text for text in sources.values() if text != table)
    used += (ROOT / "data.py").read_text()
    used = used.replace("above {MOST_FOREGROUND:.0%}", "above 60%")
    unused = [kind for kind in KINDS if f'"{kind}"' not in used]
    assert not unused
    with pytest.raises(KeyError):
        check_findings.Findings()["a kind that nobody named"]
    assert {kind.level for kind in KINDS.values()} == {"errors", "warnings"}


# --- shared images and patients ------------------------------------------------------------------

# Images of train, and what they share: a copy of a test image in another format, the name of a val
# image with another ending, the patient of test, the patient of val, nothing.
SPLITS = {
    "train": {"copy": 1, "named": 2, "tested": 20, "valid": 10, "mate": 11, "alone": 3},
    "val": {"v0": 10, "v1": 11, "v2": 20},
    "test": {"t0": 20, "t1": 21},
}


@pytest.fixture
def leaking(tmp_path):
    root = write_set(tmp_path / "set", SPLITS, p1="polyp")
    Image.open(root / "images/t1.png").convert("RGBA").save(root / "images/copy.png")
    rng = np.random.default_rng(9)
    Image.fromarray(shade(rng)).save(root / "images/V0.bmp")
    train = root / "anns/train.json"
    train.write_text(train.read_text().replace('"named.png", "mask', '"V0.bmp", "mask'))
    return root


def test_fixed_splits_share_nothing_and_a_second_run_changes_nothing(leaking, check):
    """v2 is of a patient of test, so that it leaves val; v0 and v1 stay and count for train."""
    root = leaking
    before = contents(root)
    status, text, _ = check(root)
    assert status == 1 and contents(root) == before
    shared = {"images in several splits", "images named alike in several splits"}
    shared |= {"patients in several splits"}
    last = text.splitlines()[-1]
    assert {*kinds(text)} == shared
    assert last == f"next: python prepare.py check {root} --fix-splits"

    status, text, error = check(*shlex.split(last)[4:])
    assert (status, error) == (0, "")
    assert names(root, "train") == ["alone.png"] and names(root, "val") == ["v0.png", "v1.png"]
    assert "train.json: removed 5 entries; the former file is train.json.before\n" in text
    for line in (
        "copy: a copy of its image is in test",
        "tested: its patient 20 is in test",
        "valid: its patient 10 is in val",
        "v2: its patient 20 is in test",
    ):
        assert f"\n  {line}\n" in text

    after = contents(root)
    for split in ("train", "val"):
        assert after.pop(f"anns/{split}.json.before") == before[f"anns/{split}.json"]
        former = json.loads(before[f"anns/{split}.json"])
        kept = json.loads(after.pop(f"anns/{split}.json"))
        assert all(item in former for item in kept)  # with fields that are not ours
        before.pop(f"anns/{split}.json")
    assert after == before
    assert {*layouts.find_splits(root)} == {"train", "val", "test"}

    after = contents(root)
    status, text, _ = check(root, "--fix-splits")
    assert status == 0 and "nothing to remove" in text and contents(root) == after
    status, text, _ = check(root)
    assert status == 0 and kinds(text) == []


def test_images_named_alike_are_removed(leaking, check):
    train = json.loads((leaking / "anns/train.json").read_text())
    for item in train:
        item["group"] = None
    train = [item for item in train if item["img_name"] in ("V0.bmp", "alone.png")]
    (leaking / "anns/train.json").write_text(json.dumps(train))
    (leaking / "anns/val.json").write_text(
        json.dumps([item | {"group": None} for item in items_of(leaking, "val")])
    )
    status, text, _ = check(leaking)
    assert status == 1 and kinds(text) == ["images named alike in several splits"]
    _, text, _ = check(leaking, "--fix-splits")
    assert names(leaking, "train") == ["alone.png"] and "named: its image is in val" in text


def test_a_stopped_fix_is_finished_by_the_next_one(leaking, check, monkeypatch):
    before = contents(leaking)
    replace = os.replace

    def stop(source, target):
        if str(target).endswith("train.json"):
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    status, _, error = check(leaking, "--fix-splits")
    assert status == 2 and error.count("\n") == 1
    assert contents(leaking)["anns/train.json"] == before["anns/train.json"]
    monkeypatch.setattr(os, "replace", replace)
    assert check(leaking, "--fix-splits")[0] == 0
    assert names(leaking, "train") == ["alone.png"] and names(leaking, "val") == [
        "v0.png",
        "v1.png",
    ]
    assert contents(leaking)["anns/val.json.before"] == before["anns/val.json"]


def test_a_fix_removes_what_killed_ones_left_and_keeps_others_out(leaking, check, monkeypatch):
    for name in (".train.json.before.0123abcd", ".val.json.0123abcd"):
        (leaking / "anns" / name).write_text("x")
    with atomic_files.claim_folder(leaking / "anns"):
        status, _, error = check(leaking, "--fix-splits")
    assert status == 2 and "another process is writing to this folder" in error
    assert check(leaking, "--fix-splits")[0] == 0
    assert not list((leaking / "anns").glob(".*"))


def refused(check, root, *words):
    """Return the line of a command that must write nothing."""
    before = contents(root)
    status, out, error = check(root, *words)
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert contents(root) == before
    return error


def test_a_former_file_is_never_overwritten(leaking, check):
    (leaking / "anns/train.json.before").write_text("[]")
    error = refused(check, leaking, "--fix-splits")
    assert "train.json.before: exists already; move it elsewhere" in error


def test_a_fix_that_leaves_nothing_to_train_on_is_refused(leaking, check):
    train = items_of(leaking, "train")
    (leaking / "anns/train.json").write_text(json.dumps(train[:-1]))
    assert "all 5 entries of train share an image" in refused(check, leaking, "--fix-splits")


def test_a_fix_needs_all_splits(leaking, check):
    (leaking / "anns/test.json").write_text("{")
    assert "anns/test.json: is not valid JSON" in refused(check, leaking, "--fix-splits")


def test_labelled_entries_are_removed_by_their_own_names(tmp_path, check):
    """Two entries of one mask differ in their label; one image of two is shared."""
    root = write_set(tmp_path / "set", {"train": {"a": 1, "b": 2}, "test": {"c": 3}}, p1="one")
    items = []
    for item in items_of(root, "train"):
        items += [item | {"label": 1}, item | {"label": 255 - 1}]
    (root / "anns/train.json").write_text(json.dumps(items))
    shutil.copy(root / "images/c.png", root / "images/a.png")
    check(root, "--fix-splits")
    assert names(root, "train") == ["b.png", "b.png"]


def test_splits_in_folders_are_fixed_by_hand(tmp_path, check):
    root = tmp_path / "set"
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for k in range(3):
            write_pair(root / split, f"{split}{k}", rng)
    assert "nothing to remove" in check(root, "--fix-splits")[1]
    shutil.copy(root / "test/images/test1.png", root / "train/images/train2.png")
    shutil.copy(root / "test/images/test0.png", root / "val/images/val0.png")
    error = refused(check, root, "--fix-splits")
    assert error.endswith(
        "the splits of this data set are in folders; move or remove these images with their "
        "masks: train/images/train2.png (train), val/images/val0.png (val)\n"
    )


def test_splits_that_are_drawn_or_listed_are_fixed_by_hand(tmp_path, check):
    root = tmp_path / "set"
    rng = np.random.default_rng(0)
    for k in range(10):
        write_pair(root, f"i{k}", rng)
    (copied,) = [entry.image for entry in layouts.read_entries(root, "test")]
    shutil.copy(copied, layouts.read_entries(root, "train")[0].image)
    error = refused(check, root, "--fix-splits")
    assert "are drawn at random; move or remove" in error and error.count(".png (train)") == 1

    root = write_scans(tmp_path / "scans", test=(0,), training=(1, 0))
    error = refused(check, root, "--fix-splits")
    assert error.endswith("are in dataset.json; move or remove these images with their masks: "
                          "imagesTr/c0.nii.gz (train)\n")  # fmt: skip


def test_options_without_effect_on_a_fix_are_refused(leaking, check, tmp_path):
    page = tmp_path / "x.html"
    threshold = ["--mask-threshold", "0"]
    for words in (["--strict"], ["--model", "cris"], ["--html", page], threshold):
        error = refused(check, leaking, "--fix-splits", *words)
        assert f"{words[0]}: has no effect with --fix-splits" in error


def test_what_a_published_split_shares_is_a_warning(leaking, check):
    source = leaking / "source.json"
    source.write_text(json.dumps({"published_split": "the authors' repository,\nas of 2024"}))
    status, text, _ = check(leaking)
    published = ["images that a published split has in several splits"]
    published.append("patients that a published split has in several splits")
    assert status == 0 and kinds(text) == published and "\nerrors: none\n" in text
    assert "  split from    the authors' repository, as of 2024\n" in text
    assert text.count("-> --fix-splits removes them") == 2
    assert text.splitlines()[-1].startswith("next: python train.py ")
    assert check(leaking, "--strict")[0] == 1
    check(leaking, "--fix-splits")
    status, text, _ = check(leaking, "--strict")
    assert status == 0 and kinds(text) == []


def test_a_published_split_excuses_its_own_data_set_alone(leaking, tmp_path, check):
    (leaking / "source.json").write_text('{"published_split": "a paper"}')
    other = write_set(tmp_path / "other", {"test": {"x": 1}})
    shutil.copy(leaking / "images/alone.png", other / "images/x.png")
    status, text, _ = check(leaking, other)
    assert status == 1 and "images shared by data sets" in kinds(text)
    other = write_set(tmp_path / "third", {"train": {"y": 1, "z": 3}, "test": {"x": 2}})
    shutil.copy(other / "images/y.png", other / "images/x.png")
    status, text, _ = check(leaking, other)
    assert status == 1 and "  images in several splits: 1\n" in text
    (leaking / "source.json").write_text('{"url": "https://example.org"}')
    assert "images in several splits" in kinds(check(leaking)[1])


@pytest.mark.parametrize("content", ["[]", '{"published_split": 3}', '{"published_split": " "}'])
def test_a_source_of_another_form_is_refused(leaking, check, content):
    (leaking / "source.json").write_text(content)
    assert "source.json: expected an object such as" in refused(check, leaking)


# --- what to do next -----------------------------------------------------------------------------


def next_command(text):
    """The last line, which must be a training that train.py understands."""
    line = text.splitlines()[-1]
    assert line.startswith("next: python train.py ")
    words = shlex.split(line)[3:]
    given = options.parse("", words)
    return options.checked(options.Options(**given)), words


def test_the_next_step_of_a_good_set_is_a_training(tmp_path, check):
    splits = {"train": {"a": 1, "b": 2}, "val": {"c": 3}, "test": {"d": 4}}
    root = write_set(tmp_path / "my set", splits, p1="polyp", p6="one polyp")
    settings, words = next_command(check(root)[1])
    assert settings.model == "clipseg" and settings.data == [str(root)] and len(words) == 4

    root = write_set(tmp_path / "p3", splits, p0="", p1="polyp", p3="red polyp", colour="red")
    settings, _ = next_command(check(root, "--model", "cris")[1])
    assert settings.model == "cris" and settings.prompt == "p3"

    items = items_of(root, "train")
    items[1]["prompts"] = {"p1": "polyp", "p3": ""}  # not all have p3
    (root / "anns/train.json").write_text(json.dumps(items))
    assert next_command(check(root, "--model", "cris")[1])[0].prompt == "p1"

    plain = write_set(tmp_path / "plain", splits)
    words = ("--group-regex", "[a-z]", "--mask-threshold", "7")
    settings, _ = next_command(check(plain, *words)[1])
    assert settings.model == "segformer" and settings.prompt is None
    assert settings.group_regex == "[a-z]" and settings.mask_threshold == 7

    test = write_set(tmp_path / "test", {"test": {"e": 5}})
    (test / "images/e.png").write_bytes((plain / "images/a.png").read_bytes()[::-1])
    Image.fromarray(shade(np.random.default_rng(7))).save(test / "images/e.png")
    settings, _ = next_command(check(plain, test)[1])
    assert settings.data == [str(plain)] and settings.test == [str(test)]
    status, text, _ = check(test)
    assert status == 0 and kinds(text) == ["no training split"]
    assert next_command(text)[0].data == ["TRAINING_SET"]


def test_a_single_training_image_is_a_warning(tmp_path, check):
    root = write_set(tmp_path / "one", {"train": {"a": 1}, "test": {"b": 2}})
    status, text, _ = check(root)
    assert status == 0 and kinds(text) == ["training split of one image or patient"]
    assert next_command(text)[0].overfit == 1


def test_the_next_step_after_an_error_is_its_remedy(tmp_path, check):
    root = write_set(tmp_path / "set", {"train": {"a": 1, "b": 2}, "test": {"c": 3}})
    (root / "masks/a.png").unlink()
    last = check(root)[1].splitlines()[-1]
    assert last == "next: copy the files there, or remove their entries; then run check again"


def test_a_folder_that_is_no_data_set_says_what_it_holds(tmp_path, check):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").touch()
    (folder / "b.txt").touch()
    error = refused(check, folder)
    assert f"{folder}: no data set here (it holds 2 .txt, 1 folder); expected images/" in error
    write_set(folder / "more", {"train": {"a": 1, "b": 2}})
    assert f"but {folder / 'more'} is one; give that folder" in refused(check, folder)
    assert f"{folder / 'a.txt'}: is a file; give the folder" in check(folder / "a.txt")[2]
    assert f"{folder / 'none'}: no such folder" in check(folder / "none")[2]


# --- reports -------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The tags, the pictures and the text of a page; tags that are not closed are an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        assert not any(key.startswith("on") or key == "href" for key in values)
        if tag == "img":
            self.sources.append(values["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.words.append(text.strip())


NASTY = '<script>alert("1") & b'


@pytest.fixture
def many(tmp_path):
    """14 training images, whose targets have 5 to 18 rows, a name of HTML, 12 images missing."""
    train = {f"i{k:02}": k for k in range(14)}
    root = write_set(tmp_path / "many", {"train": train, "test": {NASTY: 50}}, p1="<b>polyp</b>")
    items = items_of(root, "train")
    items[0]["group"] = None
    lost = [items[0] | {"img_name": f"x{k}.png", "mask_name": f"y{k}.png"} for k in range(12)]
    (root / "anns/lost.json").write_text(json.dumps(lost))
    return root


def test_a_report_holds_all_findings_and_pictures(many, check, tmp_path, monkeypatch):
    before = contents(many)
    out = tmp_path / "report"
    status, text, _ = check(many, "--report", out)
    assert status == 1 and contents(many) == before
    assert {*contents(out)} == {"report.txt", "many_overlays.png", "many_sizes.png"}
    assert f"\nwrote {out}\n" in text and "and 14 more" in text
    report = (out / "report.txt").read_text()
    assert all(f"x{k}.png" in report and f"y{k}.png" in report for k in range(12))
    assert "more" not in report and report.splitlines()[-1] == text.splitlines()[-1]

    # 12 cards of 320 pixels in rows of four, with outlines in the colour of the ground truth
    sheet = np.asarray(Image.open(out / "many_overlays.png"))
    assert sheet.shape[1] == 4 * 326 - 6
    for k in range(4):
        card = sheet[:200, 326 * k : 326 * k + 320].astype(int)
        is_outline = np.abs(card - pictures.GROUND_TRUTH).max(2) < 30
        assert is_outline.any()
    size = Image.open(out / "many_sizes.png").size
    assert size == (770, 374)

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        error = check(many, "--report", out)[2]
    assert error == f"error: --report {out}: exists already; choose another name\n"


def test_an_overlay_shows_largest_and_smallest_targets_first():
    shares = {("train", f"i{k}"): k / 100 for k in range(15)}
    cases = check_pictures.choose_cases(DataSet(ROOT, shares=shares))
    assert [name for _, name in cases][:6] == ["i14", "i13", "i12", "i1", "i2", "i3"]
    assert [*cases.values()] == ["largest"] * 3 + ["smallest"] * 3 + ["random"] * 6
    assert cases == check_pictures.choose_cases(DataSet(ROOT, shares=shares))
    few = check_pictures.choose_cases(DataSet(ROOT, shares={("test", "a"): 0.1, ("test", "b"): 0}))
    assert few == {("test", "a"): "largest", ("test", "b"): "random"}


def test_a_page_is_complete_and_names_are_text(many, check, tmp_path):
    page_file = tmp_path / "check.html"
    status, text, _ = check(many, "--html", page_file)
    assert status == 1 and f"\nwrote {page_file}\n" in text
    source = page_file.read_text()
    page = Page(source)
    assert "script" not in page.tags and "link" not in page.tags and "b" not in page.tags
    assert "http" not in source and "url(" not in source

    kinds_of_pictures = []
    for picture in page.sources:
        head, code = picture.split(",")
        decoded = Image.open(io.BytesIO(base64.b64decode(code)))
        decoded.load()
        kinds_of_pictures.append((head, decoded.format))
    assert kinds_of_pictures == [
        ("data:image/png;base64", "PNG"),
        ("data:image/jpeg;base64", "JPEG"),
    ]

    # counts per split, and all findings below their level
    start = page.words.index("train")
    cells = [word for word in page.words[start : start + 20] if word]
    assert cells[:4] == ["train", "14", "14", "14"]
    words = [word for word in page.words if word]
    assert (
        words.index("errors: 24") < words.index("missing files: 24") < words.index("warnings: none")
    )
    assert sum("y11.png" in word for word in words) == 1
    assert any("<b>polyp</b>" in word for word in words)
    last = text.splitlines()[-1].removeprefix("next: ")
    assert last in words


def test_both_reports_need_names_of_their_own(many, check, tmp_path):
    out = tmp_path / "out"
    error = refused(check, many, "--report", out, "--html", out)
    assert f"--html {out}: is also the folder of --report; choose another name" in error
    assert check(many, "--report", out, "--html", out / "page.html")[0] == 1
    assert {"report.txt", "page.html"} < {*contents(out)}


def test_a_nasty_name_is_escaped_in_findings(many, check, tmp_path):
    (many / "anns/lost.json").unlink()
    mask = many / "masks" / f"{NASTY}.png"
    Image.new("L", (3, 3)).save(mask)
    check(many, "--html", tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert "script" not in page.tags
    assert any(f"{NASTY}.png: 3x3, its image 64x48" in word for word in page.words)


def test_two_sets_of_one_name_have_files_of_their_own(tmp_path, check):
    roots = []
    for k in range(2):
        splits = {"train": {f"a{k}": k, f"b{k}": 10 + k}}
        roots.append(write_set(tmp_path / str(k) / "same", splits))
    check(*roots, "--report", tmp_path / "out")
    expected = {
        f"{name}_{kind}.png" for name in ("same", "same_2") for kind in ("overlays", "sizes")
    }
    assert {*contents(tmp_path / "out")} == expected | {"report.txt"}


def test_a_report_of_unreadable_data_is_written(tmp_path, check):
    root = write_set(tmp_path / "set", {"train": {"a": 1, "b": 2}})
    for path in root.glob("*/*.png"):
        path.write_bytes(b"no image")
    status, _, error = check(root, "--report", tmp_path / "out", "--html", tmp_path / "x.html")
    assert (status, error) == (1, "")
    assert {*contents(tmp_path / "out")} == {"report.txt"}
    assert Page((tmp_path / "x.html").read_text()).sources == []


def test_volumes_are_drawn(tmp_path, check):
    root = write_scans(tmp_path / "scans", training=(0, 1))
    status, text, _ = check(root, "--report", tmp_path / "out")
    assert status == 0 and "  grids         1 of size and spacing; stored LPS 2\n" in text
    assert "  label values  0, 1, 2\n" in text
    sheet = np.asarray(Image.open(tmp_path / "out/scans_overlays.png")).astype(int)
    for colour in pictures.class_colours(2):
        assert (np.abs(sheet[:150] - colour).max(2) < 20).sum() > 50  # above the legend


# --- prompts -------------------------------------------------------------------------------------


def test_token_lengths_are_shown(tmp_path, check):
    """Words of one token each; the marks of start and end count."""
    root = write_set(tmp_path / "set", {"train": {"a": 1, "b": 2, "c": 3}}, p0="", p1="red")
    items = items_of(root, "train")
    for item, n in zip(items, (1, 4, 80), strict=True):
        item["prompts"]["p2"] = "red " * n
    (root / "anns/train.json").write_text(json.dumps(items))
    status, text, _ = check(root, "--model", "clipseg")
    assert status == 0 and kinds(text) == ["prompts that the model cuts"]
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["p0", "2 tokens"] in lines and ["p1", "3 tokens"] in lines
    assert ["p2", "3 to 82 tokens, median 6"] in lines
    assert "p2            1 of 3 texts are cut" in text
    text = check(root, "--model", "cris")[1]  # cuts at 77 tokens, or at 17
    assert text.count("1 of 3 texts are cut") == 3 and text.count("3 to 82 tokens") == 1


# --- near-duplicates -----------------------------------------------------------------------------


def dhash(grey):
    """The difference hash of 64 bits: is each pixel of 9x8 brighter than its left neighbour?"""
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def test_images_with_one_outline_are_alike_to_a_difference_hash_but_not_to_us():
    """Bright discs on black, as of the eye's fundus: the reason why thumbnails are compared."""
    rng = np.random.default_rng(4)
    rows, columns = np.indices(SIZE)
    outside = np.hypot(rows - 24, columns - 32) > 22
    details, hashes = [], []
    for _ in range(30):
        picture = 150 + 0.2 * shade(rng).astype(float)
        picture[outside] = 0
        grey = Image.fromarray(picture.astype(np.uint8)).convert("L")
        details.append(check_leaks.thumbnail_details(grey))
        hashes.append(dhash(grey))

    hashes = np.stack(hashes)
    distance = (hashes[:, None] != hashes[None]).sum(2)
    false_alarms = np.triu(distance <= 4, 1).sum()
    assert false_alarms > 30
    later, earlier = np.arange(15), np.arange(15, 30)
    assert [*check_leaks.near_pairs(np.stack(details), later, earlier)] == []


# --- real data -----------------------------------------------------------------------------------

REAL = {
    "busi": [check_findings.NEAR],
    "isic2017_skin": ["no training split"],
    "ct_gi": [check_findings.NEAR],
    "ct_abdomen3d": ["training split of one image or patient", "classes that no mask holds"],
    "ct_thorax3d": ["training split of one image or patient"],
    "brain_tumour3d": [],
    "kvasir_polyp": [check_findings.NEAR],
}
SLOW = ("kvasir_polyp", "ct_abdomen3d")


def real_case(name):
    """The name, marked slow where the check takes more than a few seconds."""
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", [real_case(name) for name in REAL])
def test_real_data_has_no_errors(name, check, real_data):
    status, text, error = check(real_data / name)
    assert (status, error) == (0, "") and "\nerrors: none\n" in text
    assert kinds(text) == REAL[name]
    if name != "isic2017_skin":
        assert next_command(text)[0].data == [str(real_data / name)]


def test_other_annotations_of_real_data(check, real_data, tmp_path):
    """ct_gi with a text for each organ instead of class maps."""
    for folder, target in (("images", "images"), ("masks", "masks"), ("anns", "anns_text")):
        (tmp_path / folder).symlink_to(real_data / "ct_gi" / target)
    status, text, _ = check(tmp_path)
    assert status == 0 and kinds(text) == [check_findings.NEAR]
    assert next_command(text)[0].prompt == "p1"


def test_the_error_about_a_foreign_folder_says_how_to_import_it(tmp_path, monkeypatch, capsys):
    for folder in ("image", "label"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(4):
        pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"mine/image/{k}.jpg")
        mask = np.zeros((24, 32), np.uint8)
        mask[4:9, 5:12] = 255
        Image.fromarray(mask).save(tmp_path / f"mine/label/{k}.png")
    status, _, error = command(monkeypatch, capsys, prepare, "check", tmp_path / "mine")
    assert status == 2 and error.count("\n") == 1
    assert (
        f"prepare.py import {tmp_path}/mine --out data/NAME reads it as folders: 4 images" in error
    )
