"""predict.py --contact-sheet: thumbnails of all cases, on pages."""

import nibabel
import numpy as np
import pytest
import torch
from conftest import contents, write_run
from PIL import Image, ImageFont
from small_runs import called
from test_import_dicom import scan, write_series
from test_predict_batches import class_run, photo, volume, volume_run

import cris
from imaging import nifti, pictures, volumes
from prediction import contact_sheet

SHEET = "contact_sheet.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return class_run(tmp_path_factory.mktemp("images") / "run")


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """A run of CRIS, of a single class; it reads texts."""
    torch.manual_seed(0)
    model = cris.CRIS(cris.VARIANTS["mini"])
    folder = tmp_path_factory.mktemp("binary") / "run"
    return write_run(folder, cris.CRIS, model.state_dict(), model.config, classes=["polyp"])


@pytest.fixture
def photos(tmp_path):
    for k, name in enumerate(("a.png", "b.jpg", "g/a.png")):
        photo(tmp_path / "photos" / name, seed=k, size=(40 + 10 * k, 50))
    return tmp_path / "photos"


@pytest.fixture
def captions(monkeypatch):
    """The captions of all thumbnails that are drawn from here on."""
    seen = []
    captioned = pictures.captioned

    def record(picture, caption, width):
        seen.append(caption)
        return captioned(picture, caption, width)

    monkeypatch.setattr(pictures, "captioned", record)
    return seen


def cards_of(sheet, n, width):
    """The first row of a page, as arrays."""
    pixels = np.asarray(Image.open(sheet))
    return [pixels[:, k * (width + 6) :][:, :width] for k in range(n)]


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_a_thumbnail_is_the_overlay_of_its_image(
    kind, run, binary, photos, tmp_path, monkeypatch, capsys, captions
):
    prompt = ["--prompt", "a polyp"] if kind == "binary" else []
    given = ["--weights", binary if kind == "binary" else run, photos, *prompt, "--contact-sheet"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "out")
    assert captions == ["a", "b", "g/a"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "with", "--overlays")
    assert (tmp_path / "out" / SHEET).read_bytes() == (tmp_path / "with" / SHEET).read_bytes()

    cards = cards_of(tmp_path / "out" / SHEET, 3, 240)
    for name, card in zip(("a", "b", "g/a"), cards, strict=True):
        overlay = Image.open(tmp_path / f"with/{name}_overlay.png")
        height = round(overlay.height * 240 / overlay.width)
        assert (card[:height] == np.asarray(overlay.resize((240, height)))).all()
        assert (card[height : height + 20] < 128).any()  # the name


def test_many_cases_have_several_pages(run, tmp_path, monkeypatch, capsys, captions):
    monkeypatch.setattr(contact_sheet, "ROWS", 1)
    names = [f"{k:02}" for k in range(13)]
    for name in names:
        photo(tmp_path / f"in/{name}.png", size=(20, 20))
    out = tmp_path / "out"
    given = ["--weights", run, tmp_path / "in", "--out", out, "--contact-sheet"]
    called(monkeypatch, capsys, *given)
    pages = sorted(name for name in contents(out) if name.startswith("contact"))
    assert pages == [SHEET, "contact_sheet_2.png", "contact_sheet_3.png"]
    assert captions == names
    widths = [Image.open(out / page).width for page in pages]
    assert widths == [6 * 246 - 6, 6 * 246 - 6, 320]  # the last holds one card, and the legend


def test_a_page_has_no_more_than_60_images(tmp_path):
    class Args:
        contact_sheet = True
        out = tmp_path

    assert len(contact_sheet.page_paths(Args, "image", 60)) == 1
    assert len(contact_sheet.page_paths(Args, "image", 61)) == 2
    assert len(contact_sheet.page_paths(Args, "volume", 31)) == 2
    Args.contact_sheet = False
    assert contact_sheet.page_paths(Args, "image", 60) == []


@pytest.mark.parametrize("overlays", [[], ["--overlays"]])
def test_cases_of_an_earlier_call_are_on_the_sheet(
    overlays, run, photos, tmp_path, monkeypatch, capsys
):
    given = ["--weights", run, "--contact-sheet", *overlays]
    called(monkeypatch, capsys, *given, photos, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    photo(tmp_path / "part/b.jpg", seed=1, size=(50, 50))
    called(monkeypatch, capsys, *given, tmp_path / "part", "--out", out)
    first = (out / SHEET).read_bytes()
    said, _ = called(monkeypatch, capsys, *given, photos, "--out", out, "--skip-existing")
    assert "1 of 3 images are predicted already" in said
    whole = (tmp_path / "whole" / SHEET).read_bytes()
    assert (out / SHEET).read_bytes() == whole != first

    # Nothing is left to predict, and the page is missing.
    (out / SHEET).unlink()
    called(monkeypatch, capsys, *given, photos, "--out", out, "--skip-existing")
    assert (out / SHEET).read_bytes() == whole


def test_what_fails_is_not_on_the_sheet(run, photos, tmp_path, monkeypatch, capsys, captions):
    (photos / "b.jpg").write_bytes(b"no image")
    given = ["--weights", run, photos, "--out", tmp_path / "out", "--contact-sheet"]
    called(monkeypatch, capsys, *given, status=1)
    assert captions == ["a", "g/a"]

    # An image that was predicted and is broken by now.
    captions.clear()
    (photos / "b.jpg").unlink()
    (photos / "a.png").write_bytes(b"no image")
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")
    assert captions == ["g/a"]
    assert f"not on the contact sheet: {photos / 'a.png'}: not readable as an image" in said


def test_the_sheet_overwrites_nothing(run, photos, tmp_path, monkeypatch, capsys):
    given = ["--weights", run, photos, "--out", tmp_path / "out", "--contact-sheet"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SHEET).write_bytes(b"mine")
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{SHEET} exists already" in error
    assert (tmp_path / "out" / SHEET).read_bytes() == b"mine"

    photo(photos / "contact_sheet.png")
    given = ["--weights", run, photos, "--out", tmp_path / "other", "--contact-sheet"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{SHEET} would be written twice" in error


def test_a_caption_tells_the_text(binary, photos, tmp_path, monkeypatch, capsys, captions):
    lines = ["image,prompt", "./a.png,one", "b.jpg,two", "b.jpg,three", "g/a.png,four"]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    given = ["--weights", binary, photos, "--prompts-csv", tmp_path / "p.csv", "--contact-sheet"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "out")
    assert captions == ["a: “one”", "b_1: “two”", "b_2: “three”", "g/a: “four”"]


def test_long_names_are_broken():
    font = ImageFont.load_default(size=13)
    text = "a word and " + "case0001_day02_slice_0003_" * 4
    lines = pictures.wrapped(text, font, 200)
    assert len(lines) > 3 and "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) < 200 for line in lines)


# --- volumes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlapping", [False, True])
def test_thumbnails_of_volumes_show_their_masks(
    overlapping, tmp_path, monkeypatch, capsys, captions
):
    weights = volume_run(tmp_path / "run", overlapping=overlapping)
    for k, name in enumerate(("p1/ct", "p2/ct")):
        volume(tmp_path / f"in/{name}.nii.gz", seed=k)
    out = tmp_path / "out"
    given = ["--weights", weights, tmp_path / "in", "--out", out, "--contact-sheet"]
    called(monkeypatch, capsys, *given)
    assert captions == ["p1/ct", "p2/ct"]

    cards = cards_of(out / SHEET, 2, 480)
    for name, card in zip(captions, cards, strict=True):
        masks = []
        for k, class_name in enumerate(("one", "two"), 1):
            ending = f"_{class_name}" if overlapping else ""
            labels = np.asarray(nibabel.load(out / f"{name}{ending}.nii.gz").dataobj)
            masks.append(labels == (1 if overlapping else k))
        voxels, grid = nifti.read_volume(tmp_path / f"in/{name}.nii.gz")
        window = volumes.grey(np.clip(voxels, -175, 250), lambda x: x)
        drawn = pictures.volume_thumbnail(window, None, np.stack(masks), grid.spacing)
        height = round(drawn.height * 480 / drawn.width)
        expected = np.asarray(drawn.resize((480, height)), int)
        assert np.abs(card[:height] - expected).max() <= 2  # rounding of the grey levels


def test_series_of_an_earlier_call_are_on_the_sheet(tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run")
    write_series(tmp_path / "in/p1", scan()[0])
    write_series(tmp_path / "in/p2", scan(1)[0], patient="B")
    given = ["--weights", weights, "--contact-sheet", tmp_path / "in"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    called(monkeypatch, capsys, *given[:3], tmp_path / "in/p1", "--out", out)
    said, _ = called(monkeypatch, capsys, *given, "--out", out, "--skip-existing")
    assert "1 of 2 volumes are predicted already" in said
    assert (out / SHEET).read_bytes() == (tmp_path / "whole" / SHEET).read_bytes()
