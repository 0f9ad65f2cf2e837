"""prepare.py: the properties of the demo set, and what `check` finds in faulty data sets."""

import colorsys
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, contents
from PIL import Image
from scipy import ndimage

import data
import prepare
from engine import command_line
from imaging import atomic_files, layouts
from preparation import demo as demo_set
from preparation.check_findings import KINDS
from preparation.check_findings import NEAR as NEAR_KIND
from preparation.check_images import image_facts
from preparation.check_leaks import NEAR
from preparation.demo import demo_files, draw_blobs

IMAGES, SIZE = 300, 96


def program(arguments) -> int:
    """The exit status of the program."""
    with pytest.raises(SystemExit) as ended:
        command_line.command(lambda: prepare.main(arguments))
    return ended.value.code


def stamps(root):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}


def annotations(root, split):
    return json.loads((root / "anns" / f"{split}.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo set written by the command, and the blobs that were drawn into each of its images."""
    out, drawn, draw = tmp_path_factory.mktemp("prepare") / "demo", [], draw_blobs

    def recorded(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_set, "draw_blobs", recorded)
        args = ["--out", str(out), "--images", str(IMAGES), "--size", str(SIZE)]
        assert prepare.main(["demo", *args]) == 0
    return out, drawn


@pytest.fixture(scope="module")
def entries(demo):
    """Every entry whose prompts are meant to be true, with image (H,W,3) and mask (H,W) bool."""
    root, listed = demo[0], []
    for split in "train", "val", "test", "other_blob":
        for entry in annotations(root, split):
            image = np.asarray(Image.open(root / "images" / entry["img_name"]))
            mask = np.asarray(Image.open(root / "masks" / entry["mask_name"]))
            assert image.shape == (SIZE, SIZE, 3) and mask.shape == (SIZE, SIZE)
            assert set(np.unique(mask)) == {0, 255}
            listed.append((entry, image, mask > 0))
    return listed


# --- demo: files ---------------------------------------------------------------------------------


def test_layout(demo):
    root = demo[0]
    sizes = {s: len(annotations(root, s)) for s in ("train", "val", "test", "other_prompts")}
    assert sizes == {"train": 176, "val": 24, "test": 100, "other_prompts": 100}
    used = {s: {e["img_name"] for e in annotations(root, s)} for s in ("train", "val", "test")}
    assert (
        len(used["train"] | used["val"] | used["test"])
        == IMAGES
        == len(list((root / "images").iterdir()))
    )
    masks = {e["mask_name"] for s in [*used, "other_blob"] for e in annotations(root, s)}
    assert masks == {path.name for path in (root / "masks").iterdir()}


def test_default_test_split_has_120_images():
    def names(split):
        return sum(name.startswith("images") for name in split)

    with pytest.MonkeyPatch.context() as patch:  # the pictures do not matter here
        patch.setattr(
            demo_set, "draw_image", lambda rng, grid, blobs: np.zeros((64, 64, 3), np.uint8)
        )
        files = dict(demo_files(1000, 64, (1, 1), 0))
    assert names(files) == 1000
    assert [len(json.loads(files[f"anns/{s}.json"])) for s in ("train", "val", "test")] == [
        800,
        80,
        120,
    ]


def test_same_seed_same_bytes(tmp_path, capsys):
    for out, seed in ("a", 3), ("b", 3), ("c", 4):
        args = ["--out", str(tmp_path / out), "--images", "30", "--size", "64", "--seed", str(seed)]
        assert prepare.main(["demo", *args]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    a, c = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert not any(a[f"images/{i:05}.png"] == c[f"images/{i:05}.png"] for i in range(30))


def test_one_object(tmp_path):
    out = tmp_path / "one"
    assert prepare.main(f"demo --out {out} --images 30 --size 64 --objects 1".split()) == 0
    assert not (out / "anns" / "other_blob.json").exists()
    assert not list(out.glob("masks/*_other.png"))
    assert prepare.main(["check", str(out)]) == 0


# --- demo: words and pixels ----------------------------------------------------------------------


def test_prompts_read_like_medvlsm(entries):
    for entry, _, _ in entries:
        p = entry["prompts"]
        colour, shape = p["p3"].split()[:2]
        size = p["p4"].split()[0]
        assert list(p) == ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]
        assert p["p0"] == "" and p["p1"] == "polyp" and p["p2"] == f"{shape} polyp"
        assert p["p3"] == f"{colour} {shape} polyp" and p["p4"] == f"{size} {p['p3']}"
        assert p["p5"] == f"one {p['p4']}" and p["p6"].startswith(f"{p['p5']}, located in ")


def call_colour(rgb):
    """The word a person has for a colour, by hue and strength (not by the demo's own table)."""
    h, s, v = colorsys.rgb_to_hsv(*(np.asarray(rgb) / 255))
    h *= 360
    if s < 0.2 and v > 0.5:
        return "white"
    if 40 < h < 70 and v > 0.5:
        return "yellow"
    if 260 < h < 305:
        return "purple"
    if 305 <= h < 350 and v > 0.65 and s < 0.6:
        return "pink"
    if 15 < h < 45 and v < 0.55:
        return "brown"
    if (h >= 340 or h < 12) and s > 0.75:
        return "red"
    return f"no word for h {h:.0f} s {s:.2f} v {v:.2f}"


def test_colour_is_the_one_a_person_names(entries):
    wrong = [
        (entry["mask_name"], entry["prompts"]["p3"], said)
        for entry, image, mask in entries
        if (said := call_colour(np.median(image[mask], 0))) != entry["prompts"]["p3"].split()[0]
    ]
    assert not wrong


def test_masks_follow_the_blobs(entries):
    """Who cuts the picture halfway between the colours of body and surroundings finds the mask."""
    overlap, shifted = [], []
    for entry, image, mask in entries:
        near = ndimage.binary_dilation(mask, iterations=5)
        around = near & ~ndimage.binary_dilation(mask, iterations=2)
        body, outside = np.median(image[mask], 0), np.median(image[around], 0)
        assert np.abs(body - outside).sum() > 70, (entry["mask_name"], entry["prompts"]["p3"])
        axis = body - outside
        cut = near & ((image - outside) @ axis > axis @ axis / 2)
        moved = np.roll(mask, 2, 1)
        overlap.append((cut & mask).sum() / (cut | mask).sum())
        shifted.append((cut & moved).sum() / (cut | moved).sum())
    assert min(overlap) > 0.5 and np.mean(overlap) > 0.85
    assert np.mean(shifted) < np.mean(overlap) - 0.1  # the measure notices two pixels


def test_size_words_follow_the_area(entries):
    for entry, _, mask in entries:
        share = mask.mean()
        word = "small" if share < 0.02 else "medium" if share < 0.05 else "large"
        assert word == entry["prompts"]["p4"].split()[0], (entry["mask_name"], share)
        assert not 0.017 < share < 0.025 and not 0.045 < share < 0.055  # no doubtful ones


def test_shape_words_follow_the_moments(entries):
    for entry, _, mask in entries:
        low, high = np.linalg.eigvalsh(np.cov(np.nonzero(mask)))
        word = "round" if (high / low) ** 0.5 < 1.33 else "oval"
        assert word == entry["prompts"]["p2"].split()[0], (entry["mask_name"], (high / low) ** 0.5)


def test_place_words_follow_the_centre(entries):
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    for entry, _, mask in entries:
        y, x = ndimage.center_of_mass(mask)
        word = f"{rows[int(3 * y / SIZE)]} {columns[int(3 * x / SIZE)]}".strip() or "center"
        assert entry["prompts"]["p6"].endswith(f", located in {word} of the image")


def test_box_holds_the_mask(entries):
    for entry, _, mask in entries:
        x0, y0, x1, y1 = entry["bbox"]
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


# --- demo: only the text tells -------------------------------------------------------------------


def targets(demo):
    """[(the blobs of an image, the index of its target)], the target found by its mask."""
    root, drawn = demo
    listed = [entry for s in ("train", "val", "test") for entry in annotations(root, s)]
    pairs = []
    for entry in listed:
        blobs = drawn[int(Path(entry["img_name"]).stem)]
        mask = np.asarray(Image.open(root / "masks" / entry["mask_name"]))
        (index,) = [k for k, blob in enumerate(blobs) if np.array_equal(blob.mask, mask)]
        assert blobs[index].prompts == entry["prompts"]
        pairs.append((blobs, index))
    return pairs


def test_prompts_identify_one_blob(demo):
    for blobs, index in targets(demo):
        for kind in "p3", "p4", "p5", "p6":
            texts = [blob.prompts[kind] for blob in blobs]
            assert texts.count(texts[index]) == 1
        assert len({blob.colour for blob in blobs}) == len(blobs)
        assert len({blob.prompts["p1"] for blob in blobs}) == 1


def test_two_to_four_blobs_apart(demo):
    counts = np.bincount([len(blobs) for blobs, _ in targets(demo)])
    assert counts[:2].sum() == 0 and len(counts) == 5 and counts[2:].min() > IMAGES / 5
    for blobs, _ in targets(demo):
        thick = [ndimage.binary_dilation(blob.mask > 0) for blob in blobs]
        assert np.sum(thick, 0).max() == 1


@pytest.mark.parametrize("trait", ["colour", "size", "shape", "position"])
def test_target_is_drawn_like_the_others(demo, trait):
    """Given an image's blobs, each is the target with one chance in their number."""
    pairs = targets(demo)
    chi, freedom = 0, 0
    for word in {getattr(blob, trait) for blobs, _ in pairs for blob in blobs}:
        share = np.array(
            [np.mean([getattr(b, trait) == word for b in blobs]) for blobs, _ in pairs]
        )
        seen = sum(getattr(blobs[index], trait) == word for blobs, index in pairs)
        chi += (seen - share.sum()) ** 2 / (share * (1 - share)).sum()
        freedom += 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_target_is_no_matter_of_order(demo):
    for count in 2, 3, 4:
        places = [index for blobs, index in targets(demo) if len(blobs) == count]
        seen = np.bincount(places, minlength=count) / len(places)
        assert np.abs(seen - 1 / count).max() < 4 * (1 / len(places)) ** 0.5 / 2


def test_picture_does_not_depend_on_the_target(monkeypatch):
    """The pictures stay the same to the bit when another blob of the same images is chosen."""

    class Reversed:
        """A generator whose choice of the target comes out the other way round."""

        def __init__(self, seed):
            self.rng = real(seed)

        def __getattr__(self, name):
            return getattr(self.rng, name)

        def permutation(self, x):
            order = self.rng.permutation(x)
            return order[::-1] if isinstance(x, int) and x < 9 else order

    real = np.random.default_rng
    plain = dict(demo_files(30, 64, (2, 4), 0))
    monkeypatch.setattr(np.random, "default_rng", Reversed)
    other = dict(demo_files(30, 64, (2, 4), 0))
    pictures = [f"images/{i:05}.png" for i in range(30)]
    assert all(plain[name] == other[name] for name in pictures)
    assert not any(plain[f"masks/{i:05}.png"] == other[f"masks/{i:05}.png"] for i in range(18))


def test_other_prompts_are_untrue(demo):
    test, other = annotations(demo[0], "test"), annotations(demo[0], "other_prompts")
    texts = [entry["prompts"] for entry in test]
    for entry, swapped in zip(test, other, strict=True):
        assert {**swapped, "prompts": 0} == {**entry, "prompts": 0}
        assert swapped["prompts"] in texts
        assert swapped["prompts"]["p3"].split()[0] != entry["prompts"]["p3"].split()[0]


def test_other_blob_is_another_blob_of_the_image(demo):
    root = demo[0]
    test, other = annotations(root, "test"), annotations(root, "other_blob")
    for entry, swapped in zip(test, other, strict=True):
        masks = [
            np.asarray(Image.open(root / "masks" / e["mask_name"])) > 0 for e in (entry, swapped)
        ]
        assert entry["img_name"] == swapped["img_name"]
        assert masks[1].any() and not (masks[0] & masks[1]).any()
        assert entry["prompts"]["p3"] != swapped["prompts"]["p3"]


# --- demo: never harms a folder ------------------------------------------------------------------

SMALL = ["--images", "30", "--size", "64"]


def test_again_is_fine_and_writes_nothing(tmp_path, capsys):
    args = ["demo", "--out", str(tmp_path / "d"), *SMALL]
    assert prepare.main(args) == 0
    before = stamps(tmp_path)
    assert prepare.main(args) == 0
    assert stamps(tmp_path) == before
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["foreign", "more", "changed", "other options", "a file"])
def test_refuses_what_is_not_its_own(tmp_path, capsys, case):
    out, args = tmp_path / "d", ["--out", str(tmp_path / "d"), *SMALL]
    if case == "a file":
        out.write_text("mine")
    elif case == "foreign":
        (out / "images").mkdir(parents=True)
        (out / "images" / "mine.png").write_bytes(b"mine")
    else:
        assert prepare.main(["demo", *args]) == 0
        if case == "more":
            (out / "notes.txt").write_text("mine")
        elif case == "changed":
            (out / "anns" / "val.json").write_text("[]")
        else:
            args += ["--seed", "1"]
    before = stamps(tmp_path)
    capsys.readouterr()
    assert program(["demo", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error
    assert stamps(tmp_path) == before


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "d").mkdir()
    assert prepare.main(["demo", "--out", str(tmp_path / "d"), *SMALL]) == 0
    assert (tmp_path / "d" / "anns" / "train.json").is_file()


def test_failure_leaves_nothing(tmp_path, monkeypatch, capsys):
    left = iter(range(5))

    def full(rng, grid, blobs):
        if next(left) == 4:
            raise OSError("no space left on device")
        return np.zeros((64, 64, 3), np.uint8)

    monkeypatch.setattr(demo_set, "draw_image", full)
    assert program(["demo", "--out", str(tmp_path / "d"), *SMALL]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch, good):
    """The last thing that happens is one rename of a folder that holds everything."""
    moved = []

    def stop(source, target):
        moved.append((contents(Path(source)), Path(target)))
        assert not (tmp_path / "d").exists()
        raise OSError("stopped at the rename")

    monkeypatch.setattr(os, "replace", stop)
    assert program(["demo", "--out", str(tmp_path / "d"), *SMALL]) == 2
    assert moved == [(contents(good), tmp_path / "d")]
    assert not list(tmp_path.iterdir())


def test_leavings_of_a_killed_run_do_not_get_in(tmp_path, good):
    stale = tmp_path / ".d.part" / "images" / "99999.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    (tmp_path / ".d.lock").touch()
    assert prepare.main(["demo", "--out", str(tmp_path / "d"), *SMALL]) == 0
    assert contents(tmp_path / "d") == contents(good)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_two_at_once_do_not_make_one_folder(tmp_path, capsys):
    out = tmp_path / "d"
    with atomic_files.locked(tmp_path / ".d.lock", out):
        assert program(["demo", "--out", str(out), *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"{out}: another process is writing" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

    out.mkdir()
    (out / "of another process").touch()  # made since the program looked
    with pytest.raises(ValueError, match="exists already"), atomic_files.atomic_folder(out):
        raise AssertionError("not reached")


def test_kill_leaves_nothing_half(tmp_path):
    command = [sys.executable, str(ROOT / "prepare.py"), "demo", "--out", str(tmp_path / "d")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".d.*/images/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "d").exists()


# --- check ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound set of 30 images at 64 pixels: 18 train, 2 val, 10 test."""
    out = tmp_path_factory.mktemp("good") / "good"
    assert prepare.main(["demo", "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "set"))


def check(capsys, *roots, model=None):
    """Exit status and printed text of `check`, which must leave every file as it was.

    The status must be 1 if and only if there are errors.
    """
    folders = [root for root in roots if isinstance(root, Path)]
    before = [stamps(root) for root in folders]
    capsys.readouterr()
    options = ["--model", model] if model else []
    status = prepare.main(["check", *map(str, roots), *options])
    assert [stamps(root) for root in folders] == before
    text = capsys.readouterr().out
    assert status == int(bool(findings_of(text, "errors")))
    return status, text


SECTION = r"(?m)^(errors|warnings): (none|\d+)$\n((?:^ .*\n)*)"


def sections_of(text):
    """{"errors": (number, its lines), "warnings": ...} of what `check` prints."""
    found = {}
    for level, number, lines in re.findall(SECTION, text):
        found[level] = 0 if number == "none" else int(number), lines.splitlines()
    return found


def findings_of(text, *levels):
    """{kind: number} of the printed findings, of some levels or of all."""
    sections = sections_of(text)
    assert list(sections) == ["errors", "warnings"]
    counts = {}
    for level in levels or sections:
        total, lines = sections[level]
        kinds = [line.strip().rpartition(": ") for line in lines if re.match("  [^ ]", line)]
        of_level = {kind: int(n) for kind, _, n in kinds}
        assert sum(of_level.values()) == total
        assert all(KINDS[kind].level == level for kind in of_level)
        counts |= of_level
    return counts


CLEAN = "\nerrors: none\nwarnings: none\nnext: python train.py --model {} --data {}\n"


def edit(root, split, change):
    path = root / "anns" / f"{split}.json"
    listed = json.loads(path.read_text())
    change(listed)
    path.write_text(json.dumps(listed))


def change_masks(root, change, names="*.png"):
    for path in (root / "masks").glob(names):
        change(np.asarray(Image.open(path))).save(path)


def test_good_set(good, capsys):
    status, text = check(capsys, good)
    assert status == 0 and text.endswith(CLEAN.format("clipseg", good))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[1:-3])
    assert lines["train"] == "18 entries, 18 images"
    assert lines["other_blob"] == "10 entries, 10 images, all of them in test"
    assert lines["images"] == "30, RGB; 64x64 to 64x64, median 64x64"
    assert lines["masks"] == "40, L; 0, 255; read > 127"
    assert lines["p1"] == '1 text: "polyp"'
    shares = [np.asarray(Image.open(path)).mean() / 255 for path in (good / "masks").iterdir()]
    assert f"{min(shares):.1%} to {max(shares):.1%}" in lines["foreground"]


def truncated_image(root):
    path = root / "images" / "00003.png"
    path.write_bytes(path.read_bytes()[:2000])
    return "images/00003.png: "


def truncated_mask(root):
    path = root / "masks" / "00003.png"
    path.write_bytes(path.read_bytes()[:60])
    return "masks/00003.png: "


def missing_mask(root):
    (root / "masks" / "00004.png").unlink()
    return "masks/00004.png: "


def missing_image(root):
    (root / "images" / "00005.png").unlink()
    return "images/00005.png: "


def size_mismatch(root):
    path = root / "masks" / "00006.png"
    Image.open(path).resize((32, 48), 0).save(path)
    return "masks/00006.png: 32x48, its image 64x64 (train)"


def empty_mask(root):
    Image.new("L", (64, 64)).save(root / "masks" / "00019.png")
    return "masks/00019.png: no pixel > 127, the largest is 0 (val)"


def denied_mask(root):
    edit(root, "train", lambda e: e[7]["prompts"].update(p1="No polyp"))
    return "masks/00007.png: "


def same_picture(root):
    """Saved anew with an alpha channel: other bytes, same content."""
    Image.open(root / "images" / "00001.png").convert("RGBA").save(root / "images" / "00018.png")
    return f"images/00018.png (val): also in train as {root.resolve()}/images/00001.png"


def same_file(root):
    edit(root, "val", lambda e: e[0].update(img_name="00001.png"))
    return "images/00001.png (val): also in train"


def same_stem(root):
    """The same picture under the same name but for the ending is one finding, not two."""
    Image.open(root / "images" / "00001.png").save(root / "images" / "00001.bmp")
    edit(root, "val", lambda e: e[0].update(img_name="00001.bmp"))
    return "images/00001.bmp (val): also in train as "


def near_name(root):
    """The same picture after JPEG: other pixels, same name."""
    Image.open(root / "images" / "00001.png").save(root / "images" / "00001.JPG")
    edit(root, "val", lambda e: e[0].update(img_name="00001.JPG"))
    return "images/00001.JPG (val): named like"


def missing_type(root):
    edit(root, "train", lambda e: e[2]["prompts"].pop("p3"))
    return "anns/train.json: p3 is missing in 1 (00002)"


def empty_list(root):
    edit(root, "train", lambda e: e[2]["prompts"].update(p3=[]))
    return "anns/train.json: p3 is missing in 1 (00002)"


def unknown_type(root):
    edit(root, "val", lambda e: e[1]["prompts"].update(P1="polyp"))
    return "anns/val.json: 'P1' in 1 (00019)"


def not_json(root):
    (root / "anns" / "val.json").write_text('[{"img_name": ')
    return "anns/val.json"


def no_list(root):
    (root / "anns" / "val.json").write_text('[{"image": "a.png"}]')
    return "anns/val.json"


def name_twice(root):
    edit(root, "val", lambda e: e.append({**e[0], "prompts": {"p0": ""}}))
    return "anns/val.json"


def entry_twice(root):
    edit(root, "val", lambda e: e.append(e[0]))
    return "anns/val.json"


def mixed_rules(root):
    change_masks(root, lambda mask: Image.fromarray(mask // 255), "0001[89].png")
    return "/set: 2 masks hold 0 and 1 (00018.png), others go up to 255; each file is read by"


DEFECTS = {  # -> kind of the only finding
    truncated_image: "files that cannot be used",
    truncated_mask: "files that cannot be used",
    missing_mask: "missing files",
    missing_image: "missing files",
    size_mismatch: "masks and images of different sizes",
    empty_mask: "empty masks whose prompts ask for something",
    denied_mask: "prompts that deny what the mask shows",
    same_picture: "images in several splits",
    same_file: "images in several splits",
    same_stem: "images in several splits",
    near_name: "images named alike in several splits",
    missing_type: "prompt types that entries lack",
    empty_list: "prompt types that entries lack",
    unknown_type: "unknown prompt types",
    not_json: "splits that cannot be used",
    no_list: "splits that cannot be used",
    name_twice: "splits that cannot be used",
    entry_twice: "entries listed twice",
    mixed_rules: "masks of two ranges",
}
WARNINGS = {empty_mask, denied_mask, missing_type, empty_list, unknown_type, entry_twice}
WARNINGS |= {mixed_rules}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_every_defect_is_found(copy, capsys, defect):
    expected = defect(copy)
    status, text = check(capsys, copy)
    kind = DEFECTS[defect]
    level = "warnings" if defect in WARNINGS else "errors"
    assert findings_of(text) == findings_of(text, level) == {kind: 1}
    _, lines = sections_of(text)[level]
    assert lines[0] == f"  {kind}: 1" and expected in lines[1]
    assert lines[2] == f"    -> {KINDS[kind].advice}" and len(lines) == 3
    assert status == (level == "errors")
    assert prepare.main(["check", str(copy), "--strict"]) == 1


def test_a_type_without_any_text(copy, capsys):
    for path in (copy / "anns").iterdir():
        edit(copy, path.stem, lambda e: [entry["prompts"].update(p7=[]) for entry in e])
    status, text = check(capsys, copy)
    assert findings_of(text) == {"prompt types that entries lack": 5}
    assert "anns/train.json: p7 is missing in 18 (00000, 00001, 00002, 00003, 00004, ...)" in text


def test_all_masks_missing_stays_short(copy, capsys):
    shutil.rmtree(copy / "masks")
    status, text = check(capsys, copy)
    assert findings_of(text) == {"missing files": 40} and "and 30 more" in text
    assert text.count("/masks/0") == 10


def test_empty_mask_that_the_prompt_denies_is_fine(copy, capsys):
    Image.new("L", (64, 64)).save(copy / "masks" / "00002.png")
    edit(copy, "train", lambda e: e[2].update(prompts={f"p{k}": "no polyp" for k in range(7)}))
    status, text = check(capsys, copy)
    assert status == 0 and "empty masks   1 (00002)" in text


@pytest.mark.parametrize("kind", ["0/1", "1 bit", "palette", "JPEG"])
def test_mask_formats(copy, good, capsys, kind):
    def palette(mask):
        image = Image.fromarray(mask // 255).convert("P")
        image.putpalette([0, 0, 0, 0, 200, 0])
        return image

    change = {
        "0/1": lambda mask: Image.fromarray(mask // 255),
        "1 bit": lambda mask: Image.fromarray(mask > 0),
        "palette": palette,
    }
    if kind == "JPEG":
        for path in (copy / "masks").iterdir():
            Image.open(path).save(path, "JPEG")  # by content, whatever the name says
    else:
        change_masks(copy, change[kind])
    share = [text for text in check(capsys, good)[1].splitlines() if "foreground" in text]
    status, text = check(capsys, copy)
    assert status == 0 and ("read > 0" if kind == "0/1" else "read > 127") in text
    assert share[0] in text or kind == "JPEG"


def test_class_map_with_labels(copy, capsys):
    """Two blobs of one image as numbers 1 and 2 of one mask, asked for by `label`."""
    test, other = annotations(copy, "test"), annotations(copy, "other_blob")
    for a, b in zip(test, other, strict=True):
        masks = [np.asarray(Image.open(copy / "masks" / e["mask_name"])) // 255 for e in (a, b)]
        Image.fromarray(masks[0] + 2 * masks[1]).save(copy / "masks" / a["mask_name"])
    edit(copy, "test", lambda e: [entry.update(label=1) for entry in e])
    edit(
        copy,
        "other_blob",
        lambda e: [
            x.update(label=2, mask_name=y["mask_name"]) for x, y in zip(e, test, strict=True)
        ],
    )
    edit(copy, "other_prompts", lambda e: [entry.update(label=1) for entry in e])
    assert check(capsys, copy)[0] == 0
    edit(copy, "other_blob", lambda e: e[0].update(label=3))
    status, text = check(capsys, copy)
    assert findings_of(text) == {"empty masks whose prompts ask for something": 1}
    assert f"{test[0]['mask_name']}: no pixel == 3, the largest is 2 (other_blob)" in text


def test_prompts_that_a_model_cuts_are_counted(copy, capsys):
    """Words of one token each, with start and end: CLIPSeg takes 77, CRIS of RefCOCO 17."""
    texts = {"p2": ["red " * 15], "p3": ["red " * 16], "p4": ["red " * 75], "p5": ["red " * 76]}
    for path in (copy / "anns").glob("*.json"):
        edit(copy, path.stem, lambda entries: [e["prompts"].update(texts) for e in entries])
    status, text = check(capsys, copy)
    assert status == 0 and "tokens" not in text

    status, text = check(capsys, copy, model="clipseg")
    assert findings_of(text, "warnings") == {"prompts that the model cuts": 1}
    assert f"{copy}: p5, 1 of 1 texts are cut" in text and text.count("(clipseg)") == 1
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    heading = ["clipseg", "takes 77 tokens of a prompt (--recipe default, origin)"]
    assert status == 0 and lines.count(heading) == 1
    described = lines[: lines.index(["errors:", "none"])]
    cut = [line for line in described if " cut " in line[-1]]
    assert len(cut) == 1 and cut[0][0] == "p5"
    assert cut[0][1].startswith("1 of 1 texts are cut at the model's 77 tokens; “red red red")
    assert cut[0][1].endswith("has 78 and ends after “red red red”")

    _, text = check(capsys, copy, model="cris")
    refcoco = text[text.index("takes 17 tokens of a prompt (--recipe refcoco)") :]
    refcoco = refcoco[: refcoco.index("errors: none\n")]  # of the default recipe's 77 tokens
    kinds = [line.split()[0] for line in refcoco.splitlines() if " cut " in line]
    assert kinds == ["p3", "p4", "p5"]
    assert "takes 77 tokens of a prompt (--recipe default, origin)" in text


def test_prompts_that_are_the_same_to_a_model_are_counted(copy, capsys):
    def spell(entries):
        for i, entry in enumerate(entries):
            entry["prompts"]["p1"] = ("polyp", "Polyp", " POLYP")[i % 3]

    for path in (copy / "anns").glob("*.json"):
        edit(copy, path.stem, spell)
    _, text = check(capsys, copy, model="clipseg")
    assert "p1            3 texts, only 1 to the model" in text
    _, text = check(capsys, copy, model="cris")
    assert text.count("3 texts, only 1 to the model") == 2


def test_a_set_without_long_prompts_has_none_cut(good, capsys):
    _, text = check(capsys, good, model="clipseg")
    assert "takes 77 tokens of a prompt (--recipe default, origin); no text is cut" in text
    with pytest.raises(ValueError, match="segformer: reads no prompts; take one of cris, clipseg"):
        check(capsys, good, model="segformer")


def test_split_without_entries(copy, capsys):
    (copy / "anns" / "val.json").write_text("[]")
    status, text = check(capsys, copy)
    assert status == 0 and "val           0 entries, 0 images" in text
    assert findings_of(text) == {"splits without entries": 1}
    assert "anns/val.json: has no entries" in text
    (copy / "anns" / "train.json").write_text("[]")
    kinds = {"training split without entries": 1, "splits without entries": 1}
    assert findings_of(check(capsys, copy)[1]) == kinds


def test_overlap_across_data_sets(good, tmp_path, capsys):
    """A test set whose pictures another set trains on."""
    other = Path(shutil.copytree(good, tmp_path / "other"))
    for path in (other / "anns").glob("*.json"):
        path.unlink()
    (other / "anns" / "test.json").write_text(json.dumps(annotations(good, "train")[:3]))
    assert findings_of(check(capsys, other)[1]) == {"no training split": 1}
    status, text = check(capsys, good, other)
    assert status == 1 and findings_of(text) == {"images shared by data sets": 3}
    assert f"{other.resolve()}/images/00000.png (test): also in train as {good.resolve()}" in text


# --- command line --------------------------------------------------------------------------------


def rewrite_images(root, change):
    """Replaces the training images by what `change` saves."""
    for entry in annotations(root, "train"):
        path = root / "images" / entry["img_name"]
        image = Image.open(path)
        image.load()
        change(image, path)


def test_masks_whose_orientation_nothing_tells(copy, capsys):
    """The images are stored upside down, or as they are; the masks have no tag."""
    exif = Image.Exif()
    exif[0x0112] = 3
    rewrite_images(copy, lambda image, path: image.save(path, exif=exif))
    shares = []
    for words in [], ["--mask-orientation", "stored"], ["--mask-orientation", "upright"]:
        status, text = check(capsys, copy, *words)
        assert status == 0 and bool(findings_of(text)) == (not words)
        shares.append(re.search("foreground .*", text)[0])
        if not words:
            count = len(annotations(copy, "train"))
            assert "masks turned like their images, though they may be upright (see --mask" in text
            assert f"): {count}\n" in text
    assert len({*shares}) == 1


def test_images_with_pixels_that_are_no_numbers(copy, capsys):
    def spoil(image, path):
        x = np.array(image.convert("F"))
        x[:4] = np.nan
        Image.fromarray(x).save(path, format="TIFF")

    rewrite_images(copy, spoil)
    status, text = check(capsys, copy)
    count = len(annotations(copy, "train"))
    assert status == 0
    assert findings_of(text) == {"images with NaN or infinite pixels": count}


def test_files_of_several_pages(copy, capsys):
    rewrite_images(copy, lambda x, path: x.save(path, format="TIFF", save_all=True,
                                                append_images=[x]))  # fmt: skip
    status, text = check(capsys, copy)
    assert status == 1 and "holds 2 pages or frames" in text
    assert f"files that cannot be used: {len(annotations(copy, 'train'))}\n" in text


@pytest.mark.parametrize(
    "command, said",
    [
        ("check nowhere", "nowhere"),
        ("check . --mask-orientation turned", "--mask-orientation"),
        ("check .", "anns"),
        ("check", "DATA"),
        ("demo --images 5", "--images 5"),
        ("demo --seed -1", "--seed -1"),
        ("demo --objects 4-2", "4-2"),
        ("demo --objects 9", "9"),
        ("demo --colour red", "--colour"),
        ("", "COMMAND"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, command, said):
    monkeypatch.chdir(tmp_path)
    status = program(command.split())
    out, error = capsys.readouterr()
    assert status == 2 and out == "" and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())


def test_exit_status_of_the_program(copy):
    def run(root):
        command = [sys.executable, str(ROOT / "prepare.py"), "check", str(root)]
        return subprocess.run(command, capture_output=True, text=True)

    missing_mask(copy)
    assert run(copy).returncode == 1
    gone = run(copy / "gone")
    assert gone.returncode == 2 and gone.stdout == "" and gone.stderr.count("\n") == 1


# --- real data -----------------------------------------------------------------------------------


def test_busi(capsys, real_data):
    """Two of its images are one: one is trained on, the other one tested on."""
    status, text = check(capsys, real_data / "busi")
    assert status == 0 and findings_of(text) == {NEAR_KIND: 1}
    assert re.search("images/4_malignant.png \\(test\\): nearly .*/images/5_malignant.png", text)
    assert "train         18 entries, 18 images" in text
    assert "22, 1; 0, 255; read > 127" in text  # 1-bit masks


@pytest.mark.slow
def test_kvasir(capsys, real_data):
    """Two frames of one video, two seconds apart: one is trained on, the other one tested on."""
    status, text = check(capsys, real_data / "kvasir_polyp")
    assert status == 0 and findings_of(text) == {NEAR_KIND: 1}
    near = "cju77k828z46w0871r0avuoo9.jpg \\(test\\): nearly .*/cju30bmab08bi0835mvlr6e0r.jpg"
    assert re.search(near, text)
    assert "train         800 entries, 800 images" in text and "332x487 to 1920x1072" in text
    assert 'p7            5 texts: "polyp which is a projecting growth of tissue"' in text


def test_class_maps_are_checked(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "maps" / split / kind).mkdir(parents=True)
        for k in range(2):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "maps" / split / "images" / f"{split}{k}.png")
            mask = np.zeros((20, 30), np.uint8)
            mask[:5] = 1 + k
            Image.fromarray(mask).save(tmp_path / "maps" / split / "masks" / f"{split}{k}.png")
    names = tmp_path / "maps" / "classes.json"
    names.write_text('{"0": "background", "1": "disc", "2": "box"}')
    assert prepare.main(["check", str(tmp_path / "maps")]) == 0
    said = capsys.readouterr().out
    assert "2 entries, 2 images" in said and "25.0% of an image" in said
    mask[:5] = 9
    Image.fromarray(mask).save(tmp_path / "maps/val/masks/val1.png")
    assert prepare.main(["check", str(tmp_path / "maps")]) == 1
    said = capsys.readouterr().out
    assert "val1.png: holds class number 9, but" in said and "classes.json ends at 2" in said


def pairs_of(root, masks, classes=None):
    """Write ROOT/{train,val,test}/{images,masks}, one pair a split. masks: {split: array}."""
    rng = np.random.default_rng(0)
    for split, mask in masks.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        pixels = rng.integers(0, 255, (*mask.shape[:2], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / "images" / f"{split}.png")
        Image.fromarray(mask).save(root / split / "masks" / f"{split}.png")
    if classes:
        (root / "classes.json").write_text(json.dumps(dict(enumerate(classes))))
    return root


def stripes(*values):
    mask = np.zeros((40, 50), np.uint8)
    for k, value in enumerate(values):
        mask[2 + 9 * k : 9 + 9 * k, 5:45] = value
    return mask


def coloured(*values):
    return np.stack([stripes(*values), stripes(*values[::-1]), stripes()], axis=-1)


LESION = ("background", "lesion")
NOT_BINARY = {
    "grey levels": (stripes(128, 255), None, "train.png: holds several values"),
    "one class, other values": (stripes(51, 204), LESION, "train.png: holds several values"),
    "class and void": (stripes(1, 255), None, "train.png: holds several values"),
    "colours": (coloured(255, 0), ("none", "red", "green"), "train.png: holds colours, which are"),
    "unnamed": (stripes(1, 2, 3), (*LESION, "rim"), "train.png: holds class number 3, but"),
}


@pytest.mark.parametrize("kind", NOT_BINARY)
def test_check_and_training_refuse_the_same_masks_with_the_same_words(kind, tmp_path, capsys):
    mask, classes, line = NOT_BINARY[kind]
    root = pairs_of(tmp_path / "set", dict.fromkeys(("train", "val", "test"), mask), classes)
    assert prepare.main(["check", str(root)]) == 1
    said = capsys.readouterr().out
    assert line in said
    lists = {split: layouts.read_entries(root, split) for split in ("train", "val", "test")}
    with pytest.raises(ValueError, match=line) as caught:
        data.open_datasets(lists, tmp_path / "cache")
    assert str(caught.value) in said


def test_check_reads_void_as_training_does(tmp_path, capsys):
    """One class, 255 is void; val has no lesion."""
    masks = {"train": stripes(1, 255), "val": stripes(255), "test": stripes(1)}
    prepare.main(["check", str(pairs_of(tmp_path / "set", masks, LESION))])
    said = capsys.readouterr().out
    assert "read by number" in said and "9.3% of an image on average, 0.0% to 14.0%" in said
    assert "empty masks   1 (val)" in said and not findings_of(said)


def test_check_takes_a_threshold(tmp_path, capsys):
    masks = dict.fromkeys(("train", "val", "test"), stripes(64, 128, 255))
    root = pairs_of(tmp_path / "set", masks)
    for threshold, share in ((0, "42.0%"), (64, "28.0%"), (128, "14.0%")):
        assert prepare.main(["check", str(root), "--mask-threshold", str(threshold)]) == 0
        said = capsys.readouterr().out
        assert f"read > {threshold}" in said and f"{share} of an image" in said
    for wrong in ("256", "-1", "1.5", "half"):
        assert program(["check", str(root), f"--mask-threshold={wrong}"]) == 2
        assert (
            f"--mask-threshold {wrong}: must be a whole number from 0 to 255"
            in capsys.readouterr().err
        )


def test_a_threshold_without_effect_is_refused(tmp_path, capsys):
    masks = dict.fromkeys(("train", "val", "test"), stripes(1, 2))
    root = pairs_of(tmp_path / "set", masks, (*LESION, "rim"))
    assert program(["check", str(root), "--mask-threshold", "0"]) == 2
    error = capsys.readouterr().err
    assert "hold class numbers; remove it" in error and error.count("\n") == 1


# --- what is wrong in other ways -----------------------------------------------------------------


def shade(rng, size=(60, 80)):
    """A picture of smooth random shades, uint8 (H,W,3), unlike every other one."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (*size, 3))
    return (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)


def folders(root, n=4, splits=("train", "val", "test"), image="images", mask="masks"):
    """Write ROOT/SPLIT/{images,masks}/SPLITk.png: pictures, and a disc of 255 in each mask."""
    rng = np.random.default_rng(1)
    for split in splits:
        for folder in (image, mask):
            (root / split / folder).mkdir(parents=True)
        for k in range(n):
            truth = np.zeros((60, 80), np.uint8)
            truth[10 + k : 30, 20:50] = 255
            Image.fromarray(shade(rng)).save(root / split / image / f"{split}{k}.png")
            Image.fromarray(truth).save(root / split / mask / f"{split}{k}.png")
    return root


@pytest.mark.parametrize("classes", [None, ("background", "one", "two")])
@pytest.mark.parametrize("splits", [("train", "val", "test"), ("val",)])
def test_swapped_folders_are_one_finding(tmp_path, capsys, classes, splits):
    root = folders(tmp_path / "set")
    for split in splits:
        place = root / split
        (place / "images").rename(place / "pictures")
        (place / "masks").rename(place / "images")
        (place / "pictures").rename(place / "masks")
    if classes:
        (root / "classes.json").write_text(json.dumps(dict(enumerate(classes))))
        for path in root.rglob("*.png"):
            if len(np.unique(np.asarray(Image.open(path)))) == 2:
                Image.fromarray(np.asarray(Image.open(path)) // 255 * 2).save(path)
    status, text = check(capsys, root)
    found = findings_of(text)
    assert status == 1 and found.pop("swapped folders") == 1
    assert f"images/ holds the masks, and masks/ the images ({', '.join(splits)}); exch" in text
    assert set(found) <= {"images in several splits", "classes that no mask holds"}


def test_swapped_folders_of_other_endings(copy, capsys):
    for path in (copy / "masks").glob("*.png"):
        path.rename(path.with_suffix(".bmp"))
    for path in (copy / "anns").glob("*.json"):
        path.write_text(re.sub(r'("mask_name": "[^"]*)png"', r'\1bmp"', path.read_text()))
    assert check(capsys, copy)[0] == 0
    (copy / "images").rename(copy / "pictures")
    (copy / "masks").rename(copy / "images")
    (copy / "pictures").rename(copy / "masks")
    status, text = check(capsys, copy)
    assert status == 1 and findings_of(text) == {"swapped folders": 1}


def test_images_that_are_drawings_are_not_swapped(tmp_path, capsys):
    """Pages of two colours, whose masks have two values as well."""
    root = folders(tmp_path / "set")
    rng = np.random.default_rng(3)
    for path in root.glob("*/images/*.png"):
        Image.fromarray(rng.integers(0, 2, (60, 80), dtype=np.uint8) * 255).save(path)
    status, text = check(capsys, root)
    assert status == 0, text


NEARLY = {
    "JPEG": lambda picture: picture,
    "half": lambda picture: picture.resize((40, 30), Image.Resampling.BILINEAR),
    "larger": lambda picture: picture.resize((200, 150), Image.Resampling.BICUBIC),
    "brighter": lambda picture: picture.point(lambda value: min(255, round(1.1 * value) + 5)),
}


@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("kind", NEARLY)
def test_copies_that_differ_a_little_are_found(tmp_path, capsys, kind, n):
    """Images of train come again in test, changed; three pairs are named, the others counted."""
    root = folders(tmp_path / "set", n)
    assert check(capsys, root)[0] == 0
    for k in range(4):
        picture = NEARLY[kind](Image.open(root / "train" / "images" / f"train{k}.png"))
        (root / "test" / "images" / f"test{k}.png").unlink()
        picture.save(root / "test" / "images" / f"test{k}.jpg", quality=40)
        mask = Image.new("L", picture.size)
        mask.paste(255, (3, 3, 20, 20))
        mask.save(root / "test" / "masks" / f"test{k}.png")
    status, text = check(capsys, root)
    assert status == 0 and findings_of(text) == {NEAR_KIND: 4}
    assert "/test0.jpg (test): nearly " in text and "/train0.png (train)" in text
    assert text.count(": nearly ") == 3 and "    and 1 more" in text


def test_copies_within_a_split_are_fine(tmp_path, capsys):
    root = folders(tmp_path / "set")
    Image.open(root / "test" / "images" / "test0.png").save(
        root / "test" / "images" / "test1.png", "JPEG"
    )
    assert check(capsys, root)[0] == 0


def test_images_with_one_outline_are_different(tmp_path, capsys):
    """Bright discs on black, as of the eye's fundus, each with faint shades of its own."""
    root = folders(tmp_path / "set", 12)
    rng = np.random.default_rng(4)
    rows, columns = np.indices((60, 80))
    outside = np.hypot(rows - 30, columns - 40) > 28
    for path in sorted(root.glob("*/images/*.png")):
        picture = 150 + 0.2 * shade(rng).astype(float)
        picture[outside] = 0
        Image.fromarray(picture.astype(np.uint8)).save(path)
    thumbnails = [image_facts(path).thumbnail for path in root.glob("*/images/*.png")]
    alike = np.stack(thumbnails) @ np.stack(thumbnails).T
    assert np.median(alike) > NEAR  # so that the outline alone would be an alarm
    assert check(capsys, root)[0] == 0


def test_patients_in_two_splits(copy, capsys):
    def name(entries):
        for entry in entries:
            entry["group"] = int(entry["img_name"][:5]) // 2

    for split in ("train", "val", "test", "other_blob", "other_prompts"):
        edit(copy, split, name)
    assert check(capsys, copy)[0] == 0
    edit(copy, "val", lambda entries: entries[0].update(group="3"))
    status, text = check(capsys, copy)
    assert status == 1 and findings_of(text) == {"patients in several splits": 1}
    assert "images/00018.png (val): patient 3 is also in train, 00006.png" in text
    groups = {entry.name: entry.group for entry in layouts.read_entries(copy, "train")}
    assert groups["00005"] == "2"
    edit(copy, "val", lambda entries: entries[0].update(group=["3"]))
    assert "group ['3'] of 00018.png is neither a text nor" in check(capsys, copy)[1]


def test_patients_by_their_names(tmp_path, capsys):
    root = folders(tmp_path / "set")
    for path in root.rglob("*.png"):
        path.rename(path.with_name(f"p{path.stem[-1]}_{path.name}"))
    assert check(capsys, root)[0] == 0
    assert prepare.main(["check", str(root), "--group-regex", "(p[0-9]+)_"]) == 1
    assert findings_of(capsys.readouterr().out) == {"patients in several splits": 8}


@pytest.mark.parametrize("content", ["{}", '"train"', "5", "null", "[[]]", ""])
def test_a_split_that_is_no_list(copy, capsys, content):
    (copy / "anns" / "val.json").write_text(content)
    status, text = check(capsys, copy)
    assert status == 1 and "anns/val.json" in text[text.index("errors: ") :]
    assert sum(findings_of(text).values()) == 1


def test_healthy_images_without_prompts_are_counted(copy, capsys):
    for name, texts in (("00002", {}), ("00003", dict.fromkeys(("p0", "p1", "p2"), ""))):
        Image.new("L", (64, 64)).save(copy / "masks" / f"{name}.png")

        def change(entries, name=name, texts=texts):
            entries[int(name)].update(prompts=texts)

        edit(copy, "train", change)
    status, text = check(capsys, copy)
    assert status == 0 and "empty masks   2 (00002, 00003), 2 of them without prompts" in text


def test_healthy_images_in_folders_are_counted(tmp_path, capsys):
    root = folders(tmp_path / "set")
    Image.new("L", (80, 60)).save(root / "val" / "masks" / "val1.png")
    status, text = check(capsys, root)
    assert status == 0 and "empty masks   1 (val1)" in text


def test_classes_that_no_mask_holds(tmp_path, capsys):
    names = ("background", "cup", "disc", "rim", "vessel")
    root = pairs_of(
        tmp_path / "set",
        {"train": stripes(1, 2), "val": stripes(1, 3), "test": stripes(2)},
        names,
    )
    status, text = check(capsys, root)
    assert status == 0 and findings_of(text) == {"classes that no mask holds": 2}
    assert "no mask of train holds 'rim', only val\n" in text
    assert "no mask holds 'vessel'\n" in text


def test_no_mask_with_foreground(tmp_path, capsys):
    root = folders(tmp_path / "set")
    for path in root.glob("*/masks/*.png"):
        Image.new("L", (80, 60)).save(path)
    status, text = check(capsys, root)
    assert status == 1 and findings_of(text) == {"training split without foreground": 1}
    assert "all 4 masks of train are empty" in text


def test_inverted_masks(tmp_path, capsys):
    root = folders(tmp_path / "set")
    for path in (root / "val" / "masks").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    status, text = check(capsys, root)
    assert status == 0 and findings_of(text) == {"foreground above 60%": 1}
    assert "of val is foreground; are the masks inverted" in text


def test_a_split_of_files_of_another_kind(tmp_path, capsys):
    root = folders(tmp_path / "set")
    for path in (root / "val").rglob("*.png"):
        path.rename(path.with_suffix(".dcm"))
    status, text = check(capsys, root)
    assert status == 1 and sum(findings_of(text).values()) == 1
    assert f"    {root.resolve()}/val" in text


def test_what_is_no_file_is_named(copy, tmp_path):
    """Reading a pipe would wait for ever, so all runs in a process of its own."""
    make = (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"))
    special = []
    for k in range(6):
        path = copy / ("images" if k < 3 else "masks") / f"0000{k}.png"
        path.unlink()
        make[k % 3](path)
        special.append(path)
    code = """
import pathlib, sys
import data, prepare
from imaging import image_files, layouts
assert prepare.main(["check", sys.argv[1]]) == 1
cache = pathlib.Path(sys.argv[2])
for entry in layouts.read_entries(sys.argv[1], "train")[:6]:
    for read in (
        lambda: data.open_dataset([entry], cache),
        lambda: data.mask_counts([entry], cache),
        lambda: image_files.open_image(entry.image, decode=False),
    ):
        try:
            read()
        except (ValueError, OSError) as error:
            print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy), str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "errors: 6\n" in done.stdout
    for path in special:
        lines = [line for line in done.stdout.splitlines() if str(path) in line]
        assert len([line for line in lines if line.startswith("refused: ")]) >= 2, lines
        assert len([line for line in lines if line.startswith("    ")]) == 1, lines
        assert all("is not a file, but a folder, a pipe or a device" in line for line in lines)


def test_file_names_that_nothing_can_print(tmp_path, capsys):
    """Names of bytes that are no UTF-8, as old archives have them."""
    root = folders(tmp_path / "set")
    for kind in ("images", "masks"):
        place = root / "val" / kind
        os.rename(place / "val1.png", os.fsencode(place) + b"/l\xe4sion.png")
    os.truncate(os.fsencode(root / "val" / "images") + b"/l\xe4sion.png", 300)
    status, text = check(capsys, root)
    assert status == 1 and sum(findings_of(text).values()) == 1 and "sion.png" in text


def test_no_data_set_is_refused_before_anything_is_read(good, tmp_path, capsys):
    assert program(["check", str(good), str(tmp_path / "nowhere")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "nowhere" in error


def test_check_goes_on_without_a_vocabulary(good, capsys, monkeypatch):
    import biomedclipseg

    def fail(name):
        raise OSError(f"{name}: could not be downloaded from the hub")

    monkeypatch.setattr(biomedclipseg, "find_vocabulary", fail)
    status, text = check(capsys, good, model="biomedclipseg")
    assert status == 0 and text.endswith(CLEAN.format("biomedclipseg", good))
    line = "--model biomedclipseg: prompts that are cut are not counted ("
    assert text.startswith(line) and "could not be downloaded" in text.splitlines()[0]


# --- volumes -------------------------------------------------------------------------------------

ORGANS = {"background": 0, "kidney": 1, "liver": 2}
LISTS = {"training": (0, 1), "validation": (2,), "test": (3,)}


def torso(k):
    """A volume in HU and its label map: two blocks in a body in air, (20,18,16)."""
    rng = np.random.default_rng(k)
    image = np.full((20, 18, 16), -1000, np.int16)
    image[2:18, 2:16, 1:15] = 0
    labels = np.zeros(image.shape, np.uint8)
    labels[3:7, 4:8, 4:9] = 1
    labels[9:15, 4 : 9 + k, 4:9] = 2
    image[labels > 0] = 90
    return image + rng.integers(-9, 9, image.shape, dtype=np.int16), labels


def write_nifti(path, voxels, affine=None):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([3.0, 3, 4, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def write_about(root, **more):
    about = {"labels": ORGANS, "modality": {"0": "CT"}}
    for key, cases in LISTS.items():
        about[key] = []
        for k in cases:
            item = {"image": f"imagesTr/case{k}.nii.gz", "label": f"labelsTr/case{k}.nii.gz"}
            about[key].append(item)
    (root / "dataset.json").write_text(json.dumps(about | more))
    return about | more


@pytest.fixture
def scans(tmp_path):
    root = tmp_path / "scans"
    for k in range(4):
        image, labels = torso(k)
        write_nifti(root / "imagesTr" / f"case{k}.nii.gz", image)
        write_nifti(root / "labelsTr" / f"case{k}.nii.gz", labels)
    write_about(root)
    return root.resolve()


def test_good_volumes(scans, capsys):
    status, text = check(capsys, scans)
    assert status == 0 and text.endswith(CLEAN.format("swin_unetr3d", scans))
    assert "  train         2 entries, 2 volumes\n  val           1 entries, 1 volumes\n" in text
    assert "  volumes       4 volumes of 20x18x16 voxels of 3x3x4 mm\n" in text
    assert "  classes       kidney in 4, liver in 4, of 4 label maps\n" in text
    assert "of a volume on average" in text and "  empty masks   none\n" in text


def cut_scan(root):
    path = root / "imagesTr" / "case1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    return "files that cannot be used", "imagesTr/case1.nii.gz: not readable as NIfTI"


def flipped_bit(root):
    path = root / "labelsTr" / "case1.nii.gz"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4  # of the length
    path.write_bytes(content)
    return "files that cannot be used", "labelsTr/case1.nii.gz: not readable as NIfTI"


def lost_label(root):
    (root / "labelsTr" / "case3.nii.gz").unlink()
    return "missing files", "labelsTr/case3.nii.gz: no such file"


def other_grid(root):
    write_nifti(root / "labelsTr" / "case0.nii.gz", torso(0)[1][:-1])
    return "files that cannot be used", "labelsTr/case0.nii.gz: (19, 18, 16) voxels, but"


def shifted(root):
    affine = np.diag([3.0, 3, 4, 1])
    affine[0, 3] = 7
    write_nifti(root / "labelsTr" / "case0.nii.gz", torso(0)[1], affine)
    return "files that cannot be used", "labelsTr/case0.nii.gz: its affine is 7 off"


def unnamed_number(root):
    write_nifti(root / "labelsTr" / "case2.nii.gz", torso(2)[1] * 2)
    return "files that cannot be used", "labelsTr/case2.nii.gz: holds 4, but the classes are"


def lost_intercept(root):
    write_nifti(root / "imagesTr" / "case2.nii.gz", torso(2)[0] + np.int16(1024))
    return "remarks about volumes that can be used", "imagesTr/case2.nii.gz (values"


def void_alone(root):
    write_nifti(root / "labelsTr" / "case1.nii.gz", (torso(1)[1] > 0).astype(np.uint8) * 255)
    return "label maps of 0 and 255 alone", "labelsTr/case1.nii.gz: holds 0 and 255 alone"


def case_in_two_splits(root):
    about = write_about(root)
    write_about(root, validation=about["validation"] + about["training"][:1])
    return "images in several splits", "imagesTr/case0.nii.gz (val): also in train"


def copied_case(root):
    write_nifti(root / "imagesTr" / "case3.nii", torso(0)[0])
    (root / "imagesTr" / "case3.nii.gz").unlink()
    item = {"image": "imagesTr/case3.nii", "label": "labelsTr/case3.nii.gz"}
    write_about(root, test=[item])
    return "images in several splits", "case3.nii (test): also in train as"


def unused_class(root):
    write_about(root, labels=ORGANS | {"spleen": 3})
    return "classes that no mask holds", "no mask holds 'spleen'"


def no_labels(root):
    write_about(root, labels=["kidney"])
    return "splits that cannot be used", "dataset.json: not a data set of volumes"


def more_channels(root):
    image = torso(1)[0]
    write_nifti(root / "imagesTr" / "case1.nii.gz", np.stack([image, image], axis=-1))
    return "volumes with other channels", "case1.nii.gz: 2 channels, most volumes have 1"


VOLUME_DEFECTS = [
    *(cut_scan, flipped_bit, lost_label, other_grid, shifted, unnamed_number, lost_intercept),
    *(void_alone, case_in_two_splits, copied_case, unused_class, no_labels, more_channels),
]


VOLUME_WARNINGS = ("remarks about volumes that can be used", "classes that no mask holds")


@pytest.mark.parametrize("defect", VOLUME_DEFECTS, ids=lambda defect: defect.__name__)
def test_every_defect_of_volumes_is_found(scans, capsys, defect):
    kind, line = defect(scans)
    status, text = check(capsys, scans)
    assert findings_of(text) == {kind: 1}, text
    assert status == (kind not in VOLUME_WARNINGS)
    assert line in text[text.index("errors: ") :]


def test_both_files_of_a_case_are_named(scans, capsys):
    for folder in ("imagesTr", "labelsTr"):
        (scans / folder / "case1.nii.gz").write_bytes(b"no gzip")
    status, text = check(capsys, scans)
    assert status == 1 and findings_of(text) == {"files that cannot be used": 2}


def test_empty_label_maps_are_counted(scans, capsys):
    write_nifti(scans / "labelsTr" / "case2.nii.gz", np.zeros((20, 18, 16), np.uint8))
    status, text = check(capsys, scans)
    assert status == 0 and "  empty masks   1 (case2)\n" in text


def test_regions_of_volumes(scans, capsys):
    write_about(scans, labels={"background": 0, "both": [1, 2], "liver": [2]})
    status, text = check(capsys, scans)
    assert status == 0 and "classes       both in 4, liver in 4, of 4 label maps" in text


def test_options_of_images_have_no_effect_on_volumes(scans, good, capsys):
    assert program(["check", str(scans), "--mask-threshold", "3"]) == 2
    assert "--mask-threshold: has no effect on volumes" in capsys.readouterr().err
    assert program(["check", str(scans), str(good), "--mask-threshold", "3"]) == 0
