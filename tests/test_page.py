"""The parts of the page that need no browser: sessions, uploads, drawings, files, access."""

import ast
import csv
import io
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, rows, write_run
from PIL import Image

import app
import clipseg
import cris
import predict
import sam_decoder
import segformer
import swin_unetr3d
from imaging import pictures
from page import access, downloads, drawing, session, settings, uploads
from prediction.models import find_weights, load_model

PHRASE = "one small pink polyp"


def weights_of(folder, kind, variants, **fields):
    """Write a run folder of a mini model with random weights."""
    config = replace(variants["mini"], **fields)
    torch.manual_seed(0)
    return write_run(folder, kind, kind(config).state_dict(), config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{name: run folder} of models for images."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "clipseg": weights_of(root / "a", clipseg.CLIPSeg, clipseg.VARIANTS),
        "cris": weights_of(root / "b", cris.CRIS, cris.VARIANTS),
        "classes": weights_of(root / "c", segformer.SegFormer, segformer.VARIANTS, num_classes=4),
        "one class": weights_of(root / "d", segformer.SegFormer, segformer.VARIANTS, num_classes=1),
    }


@pytest.fixture(scope="module")
def loaded(sources):
    return {name: load_model(find_weights(str(path)), "cpu") for name, path in sources.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A turned JPEG, a 16-bit PNG and an image with a spacing.csv."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    smooth = np.kron(
        rng.integers(0, 255, (5, 7, 3), dtype=np.uint8), np.ones((12, 12, 1), np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(smooth).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 4000, (50, 40), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(smooth[:41, :61]).save(folder / "spaced.png")
    (folder / "spacing.csv").write_text("image,x_mm,y_mm\nspaced.png,0.3,0.5\n")
    return folder


def opened(path, is_listed=True):
    return uploads.open_image(path, is_listed)[0]


# --- the same files as predict.py -----------------------------------------------------------------


def page_files(image, model, threshold, pixel_size, folder):
    """Write the files that the page offers for an image and a phrase."""
    page_session = opened(image)
    pixel_size = pixel_size or page_session.pixel_size
    prompt = {}
    if model.recipe.tokenize:
        prompt = model.recipe.tokenize(PHRASE)
    probabilities = page_session.predict(model, PHRASE, prompt).probabilities
    classes = settings.class_names(model)
    if model.recipe.tokenize:
        result = downloads.phrase_result(
            {PHRASE: probabilities}, classes[-1], threshold, pixel_size
        )
    else:
        result = downloads.class_result(probabilities, classes, model.config, threshold, pixel_size)

    n = len(result.names)
    colours = pictures.mask_colours(n)
    overlay = pictures.draw_masks(
        page_session.image, result.masks, colours, pictures.mask_opacity(n), n == 1
    )
    return (
        downloads.write_masks(page_session, result, folder),
        downloads.write_overlay(page_session, overlay, folder),
        downloads.write_measurements(page_session, result, folder),
    )


@pytest.mark.numeric
@pytest.mark.parametrize("image", ["turned.jpg", "deep.png", "spaced.png"])
@pytest.mark.parametrize("name", ["clipseg", "cris", "classes", "one class"])
def test_files_are_those_of_predict(
    name, image, sources, loaded, images, tmp_path, monkeypatch, capsys
):
    threshold = 0.47
    pixel_size = (0.25, 0.25) if image == "deep.png" else None
    arguments = ["--weights", sources[name], "--out", tmp_path / "out", "--overlays"]
    if name in ("clipseg", "cris"):
        arguments += ["--prompt", PHRASE]
    if name != "classes":
        arguments += ["--threshold", threshold]
    if pixel_size:
        arguments += ["--pixel-size", *pixel_size]
    code, _, err = command(
        monkeypatch, capsys, predict, *arguments, "--device", "cpu", images / image
    )
    assert code == 0, err

    (tmp_path / "page").mkdir()
    files = page_files(images / image, loaded[name], threshold, pixel_size, tmp_path / "page")
    for file in files:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name

    (row, *_) = rows(tmp_path / "out" / "measurements.csv")
    assert row["pixel_width_mm"] == {"deep.png": "0.25", "spaced.png": "0.3"}.get(image, "")


def test_masks_above_and_below_the_threshold():
    probabilities = np.array([[[0.2, 0.5, 0.7]]], np.float32)
    result = downloads.phrase_result({"a": probabilities}, "target", 0.5, None)
    assert result.masks.tolist() == [[[False, False, True]]]
    assert result.names == ("a",)
    assert result.classes == ("target",)
    assert result.areas == [{"area_px": 1, "share_of_image": 1 / 3, "area_mm2": None}]


def test_several_phrases_give_a_mask_and_a_row_each(tmp_path):
    page_session = session.Session(np.zeros((2, 2, 3), np.uint8), "x")
    answers = {
        "a polyp": np.array([[[1, 0], [0, 0]]], np.float32),
        "../etc": np.array([[[1, 1], [1, 0]]], np.float32),
    }
    result = downloads.phrase_result(answers, "target", 0.5, (2, 2))
    archive = zipfile.ZipFile(downloads.write_masks(page_session, result, tmp_path))
    assert archive.namelist() == ["x_a_polyp.png", "x_.._etc.png"]
    mask = Image.open(io.BytesIO(archive.read("x_.._etc.png")))
    assert np.asarray(mask).tolist() == [[255, 255], [255, 0]]

    with open(downloads.write_measurements(page_session, result, tmp_path)) as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == ["a polyp", "../etc"]
    assert [row["area_mm2"] for row in table] == ["4.0", "12.0"]


# --- sessions -------------------------------------------------------------------------------------


def test_an_image_is_encoded_once(loaded, images):
    model = loaded["clipseg"]
    calls = []

    def encode(network, item):
        calls.append(item["image"].shape)
        return model.recipe.encode(network, item)

    counting = replace(model, recipe=replace(model.recipe, encode=encode))
    page_session = opened(images / "deep.png")
    first = page_session.predict(counting, "a", model.recipe.tokenize("a"))
    second = page_session.predict(counting, "b", model.recipe.tokenize("b"))
    assert len(calls) == 1
    assert not np.array_equal(first.probabilities, second.probabilities)

    again = page_session.predict(counting, "a", {})  # an answer from memory needs no prompt
    assert again.probabilities is first.probabilities
    assert (again.encoding_seconds, again.prompt_seconds) == (0, 0)


def test_two_models_do_not_share_answers(loaded, images):
    page_session = opened(images / "deep.png")
    answers = []
    for name in ("clipseg", "cris"):
        recipe = loaded[name].recipe
        answers.append(page_session.predict(loaded[name], "a", recipe.tokenize("a")))
    assert not np.array_equal(answers[0].probabilities, answers[1].probabilities)


def test_answers_that_were_used_longest_ago_are_dropped(loaded, images, monkeypatch):
    model = loaded["clipseg"]
    page_session = opened(images / "deep.png")
    monkeypatch.setattr(session, "MOST_BYTES", 2 * 4 * 50 * 40)  # two answers
    for phrase in ("a", "b", "a", "c"):
        page_session.predict(model, phrase, model.recipe.tokenize(phrase))
    assert page_session.known_answer(model, "a") is not None
    assert page_session.known_answer(model, "b") is None

    monkeypatch.setattr(session, "MOST_BYTES", 1)  # the latest stays
    page_session.predict(model, "d", model.recipe.tokenize("d"))
    assert page_session.known_answer(model, "d") is not None
    assert page_session.known_answer(model, "c") is None


def test_an_answer_that_would_fill_the_memory_is_refused(loaded, images, monkeypatch):
    monkeypatch.setattr(session, "LARGEST_ANSWER", 4 * 4 * 50 * 40 - 1)
    with pytest.raises(ValueError, match="40 x 50 pixels is too large for a model with 4 classes"):
        opened(images / "deep.png").predict(loaded["classes"], "", {})


@dataclass
class Sized:
    """A session of some bytes."""

    nbytes: int


def test_browsers_do_not_see_each_other(tmp_path):
    sessions = session.Sessions(tmp_path)
    sessions.put("alice", "text", Sized(1))
    sessions.put("bob", "text", Sized(2))
    sessions.put("bob", "classes", Sized(3))
    assert sessions.get("alice", "text") == Sized(1)
    assert sessions.get("alice", "classes") is None

    sessions.drop("bob", "classes")
    assert sessions.get("bob", "classes") is None
    assert sessions.get("bob", "text") == Sized(2)


def test_the_sessions_used_longest_ago_are_removed(tmp_path):
    sessions = session.Sessions(tmp_path, limit=2)
    sessions.put("a", "text", Sized(1))
    sessions.put("b", "text", Sized(2))
    assert sessions.get("a", "text") == Sized(1)
    sessions.put("c", "text", Sized(3))
    assert sessions.get("b", "text") is None
    assert sessions.get("a", "text") == Sized(1)


def test_sessions_that_fill_the_memory_are_removed(tmp_path):
    sessions = session.Sessions(tmp_path, most_memory=100)
    growing = Sized(40)
    sessions.put("a", "text", Sized(30))
    sessions.put("b", "text", Sized(30))
    sessions.put("c", "text", growing)  # 100 fit
    assert sessions.get("a", "text") is not None

    growing.nbytes = 41
    assert sessions.get("c", "text") is growing
    assert sessions.get("b", "text") is None  # it was used longest ago
    growing.nbytes = 1000  # the latest one stays
    assert sessions.get("c", "text") is growing
    assert sessions.get("a", "text") is None
    sessions.put("d", "text", Sized(1))
    assert sessions.get("c", "text") is None


def test_a_session_counts_the_image_its_features_and_its_results(loaded, images):
    model = loaded["clipseg"]
    page_session = opened(images / "deep.png")
    pixels = 50 * 40
    assert page_session.nbytes == 3 * pixels
    page_session.predict(model, "a", model.recipe.tokenize("a"))
    with_features = page_session.nbytes - (3 + 4) * pixels
    assert with_features >= page_session.item(model)["image"].nbytes
    page_session.predict(model, "b", model.recipe.tokenize("b"))
    assert page_session.nbytes == with_features + (3 + 4 + 4) * pixels

    answer = page_session.known_answer(model, "a").probabilities
    result = downloads.phrase_result({"a": answer}, "polyp", 0.5, None)
    page_session.latest = (("a", 0.5), [result])
    assert page_session.nbytes == with_features + (3 + 4 + 4 + 4 + 1) * pixels


def test_a_closed_page_leaves_nothing(tmp_path):
    sessions = session.Sessions(tmp_path)
    sessions.put("a", "text", Sized(1))
    sessions.put("b", "text", Sized(2))
    kept = sessions.files_of("b")
    for browser in ("a", "../x"):  # a name chosen by the browser never becomes a path
        (sessions.files_of(browser) / "mask.png").write_text("x")
        sessions.forget(browser)
    assert sessions.get("a", "text") is None
    assert sessions.get("b", "text") == Sized(2)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert kept.is_dir()
    assert kept.stat().st_mode & 0o077 == 0


# --- uploads --------------------------------------------------------------------------------------


def refused(path) -> str:
    """Return the sentence with which a file is refused."""
    with pytest.raises(ValueError) as error:
        uploads.read_image(path)
    line = str(error.value)
    assert str(path.parent) not in line
    assert "\n" not in line
    return line


def test_files_that_are_no_images(tmp_path, images, capfd):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes((images / "deep.png").read_bytes()[:1500])
    assert refused(text).startswith("text.png cannot be read as an image")
    assert refused(empty) == "empty.png is empty (0 bytes); choose another file."
    assert refused(cut).startswith("cut.png: not readable as an image")
    assert capfd.readouterr() == ("", "")  # names of uploads are not printed


def test_a_format_that_starts_other_programs_is_refused(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(subprocess, "check_call", None)
    file = tmp_path / "image.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    assert Image.open(file).format == "EPS"
    assert refused(file).startswith("image.png cannot be read as an image")


def test_large_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("was decoded")

    monkeypatch.setattr("imaging.image_files.load_image", fail)
    for name in ("large.png", "large.tif"):
        Image.new("1", (10_000, 5_001)).save(tmp_path / name)
        assert refused(tmp_path / name).startswith(f"{name} has 10000 x 5001 pixels")

    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    (tmp_path / "many.png").write_bytes(bytes(11))
    assert refused(tmp_path / "many.png").startswith("many.png has 0 MB; the page takes")


def test_a_huge_image_is_refused_in_one_sentence(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert refused(tmp_path / "huge.png").startswith("huge.png has")


def test_large_volumes_are_refused(tmp_path, monkeypatch):
    import nibabel

    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), path)
    uploads.check_volume(path)
    monkeypatch.setattr(uploads, "MOST_VOXELS", 119)
    with pytest.raises(ValueError, match=r"^scan.nii.gz has 0 million voxels"):
        uploads.check_volume(path)
    (tmp_path / "text.nii").write_text("no volume")
    with pytest.raises(ValueError, match=r"^text.nii"):
        uploads.check_volume(tmp_path / "text.nii")


def test_how_an_image_was_read_is_a_note(tmp_path):
    pixels = np.ones((20, 20), np.float32)
    pixels[3, 3] = np.nan
    pixels[5, 5] = 7
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    _, notes = uploads.open_image(tmp_path / "a.tif", is_listed=False)
    assert notes == ("Pixels without a finite value were set to black.",)


def test_a_spacing_file_counts_only_beside_listed_images(images):
    assert opened(images / "spaced.png").pixel_size == (0.3, 0.5)
    assert opened(images / "spaced.png", is_listed=False).pixel_size is None
    assert opened(images / "deep.png").pixel_size is None


def test_one_image_is_read_at_a_time(images, monkeypatch, capsys):
    """Standard output is redirected meanwhile, which two threads cannot do at once."""
    active = []
    most = []

    def load_image(path):
        active.append(path)
        most.append(len(active))
        time.sleep(0.02)
        active.pop()
        return np.zeros((2, 2, 3), np.uint8), False

    monkeypatch.setattr("imaging.image_files.load_image", load_image)
    threads = []
    for _ in range(5):
        threads.append(threading.Thread(target=uploads.read_image, args=[images / "deep.png"]))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    print("visible")
    assert capsys.readouterr().out == "visible\n"


# --- files to choose from -------------------------------------------------------------------------


def test_links_that_leave_the_folder_are_not_listed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (folder / "a.png", folder / "inner" / "b.nii.gz", outside / "secret.png"):
        path.write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "broken.png").symlink_to(tmp_path / "nothing.png")
    (folder / "inside.png").symlink_to(folder / "a.png")

    images, volumes = settings.list_folder(folder)
    assert images.names == ("a.png", "inside.png")
    assert volumes.names == ("inner/b.nii.gz",)
    assert images.path(0).name == "a.png"
    for index in (-1, 2, None, "a.png", "../outside/secret.png", 0.0):
        with pytest.raises(ValueError, match="not in the list"):
            images.path(index)

    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(outside / "secret.png")
    with pytest.raises(ValueError, match="no longer in the folder"):
        images.path(0)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="contains no images or volumes"):
        settings.list_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        settings.list_folder(tmp_path / "missing")


def test_the_images_of_a_runs_test_split_are_offered(demo, loaded):
    model = loaded["cris"]

    def with_data(data):
        run = model.weights.run | {"options": {"data": data}}
        return replace(model, weights=replace(model.weights, run=run))

    files = settings.files_of_runs([with_data([str(demo)])] * 2, "images")
    anns = (demo / "anns" / "test.json").read_text()
    assert len(files.paths) > 0
    assert all(name in anns and path.is_file() for name, path in zip(*vars_of(files), strict=True))
    assert len(set(files.paths)) == len(files.paths)
    assert settings.files_of_runs([with_data(["/nowhere"])], "images").paths == ()
    assert settings.files_of_runs([with_data([str(demo)])], "volumes").paths == ()


def vars_of(files):
    return files.names, files.paths


def test_each_model_has_its_kind_of_view(loaded, tmp_path):
    sam = weights_of(tmp_path / "sam", sam_decoder.SAM, sam_decoder.VARIANTS)
    scan = weights_of(tmp_path / "scan", swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS)
    kinds = {name: settings.kind_of(model) for name, model in loaded.items()}
    assert kinds == {
        "clipseg": "text",
        "cris": "text",
        "classes": "classes",
        "one class": "classes",
    }
    assert settings.kind_of(load_model(find_weights(str(sam)), "cpu")) == "boxes"
    assert settings.kind_of(load_model(find_weights(str(scan)), "cpu")) == "volumes"


def test_models_of_one_name_are_told_apart(loaded):
    model = loaded["cris"]
    other = replace(model, weights=replace(model.weights, source="elsewhere/b"))
    assert settings.model_labels([model]) == ["b (CRIS)"]
    labels = settings.model_labels([model, other])
    assert labels[1] == "elsewhere/b (CRIS)"
    assert len({*labels}) == 2


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_the_usual_drawing_is_the_overlay_of_predict(n):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    masks = rng.random((n, 40, 50)) > 0.6
    ours = pictures.draw_masks(
        image, masks, pictures.mask_colours(n), pictures.mask_opacity(n), n == 1
    )
    assert np.array_equal(ours, pictures.overlay(image, None, masks))


def test_opacity_and_outline():
    image = np.full((30, 30, 3), 100, np.uint8)
    mask = np.zeros((1, 30, 30), bool)
    mask[0, 10:20, 10:20] = True
    red = [(255, 0, 0)]
    assert np.array_equal(pictures.draw_masks(image, mask, red, 0.0, False), image)

    filled = np.asarray(pictures.draw_masks(image, mask, red, 1.0, False))
    assert (filled[mask[0]] == (255, 0, 0)).all()
    assert (filled[~mask[0]] == 100).all()

    outlined = np.asarray(pictures.draw_masks(image, mask, red, 0.0, True))
    assert (outlined == (255, 0, 0)).all(-1).sum() == 36  # the rim of 10 x 10 pixels
    assert (outlined[11:19, 11:19] == 100).all()


def test_previews_of_large_images_fit_together():
    image = np.zeros((1401, 2801, 3), np.uint8)
    masks = np.zeros((2, 1401, 2801), bool)
    assert drawing.preview_step(image) == 3
    assert drawing.preview(image).shape == (467, 934, 3)
    assert drawing.preview_masks(masks, image).shape == (2, 467, 934)
    small = np.zeros((5, 1200, 3), np.uint8)
    assert drawing.preview(small).shape == small.shape


def test_the_table_shows_phrases_as_text():
    row = {"area_px": 1234, "share_of_image": 0.25, "area_mm2": None}
    table = drawing.area_table("Phrase", ["<script>x</script>"], [(1, 2, 3)], [row])
    assert "<script>" not in table
    assert "&lt;script&gt;" in table
    assert "1,234" in table
    assert "25.0 %" in table
    assert "mm²" not in table
    assert "mm²" in drawing.area_table("Phrase", ["a"], [(1, 2, 3)], [row | {"area_mm2": 2.5}])
    assert "<b>" not in drawing.status(["<b>x</b>"])


# --- access ---------------------------------------------------------------------------------------


@pytest.fixture
def no_login(monkeypatch):
    monkeypatch.delenv("PAGE_USER", raising=False)
    monkeypatch.delenv("PAGE_PASSWORD", raising=False)


def password_file(folder, text="correct horse\n", mode=0o600):
    file = folder / "password.txt"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_login_comes_from_a_file_or_from_the_environment(tmp_path, monkeypatch, no_login):
    file = password_file(tmp_path)
    assert access.credentials(None) is None
    assert access.credentials(f"ann:{file}") == ("ann", "correct horse")
    monkeypatch.setenv("PAGE_PASSWORD", "battery staple")
    with pytest.raises(ValueError, match="PAGE_USER is missing"):
        access.credentials(None)
    monkeypatch.setenv("PAGE_USER", "bob")
    assert access.credentials(None) == ("bob", "battery staple")
    assert access.credentials(f"ann:{file}") == ("ann", "correct horse")


def test_a_password_on_the_command_line_is_refused_and_not_shown(no_login):
    for auth in ("ann:hunter2hunter2", "hunter2hunter2", ":hunter2hunter2", "ann:"):
        with pytest.raises(ValueError, match="--auth: takes USER:FILE") as error:
            access.credentials(auth)
        assert "hunter2" not in str(error.value)


def test_password_files_that_are_shared_or_short(tmp_path, no_login):
    for mode in (0o644, 0o640, 0o602):
        file = password_file(tmp_path, mode=mode)
        with pytest.raises(ValueError, match="chmod 600"):
            access.credentials(f"ann:{file}")
    for text in ("", "short\n", "\ncorrect horse\n"):
        file = password_file(tmp_path, text)
        with pytest.raises(ValueError, match="8 characters or more") as error:
            access.credentials(f"ann:{file}")
        assert "short" not in str(error.value)


def test_other_machines_need_a_password():
    for host in ("127.0.0.1", "localhost", "::1"):
        access.check_host(host, None)
    access.check_host("0.0.0.0", ("ann", "correct horse"))
    for host in ("0.0.0.0", "::", "192.168.0.7", ""):
        with pytest.raises(ValueError, match="--auth USER:FILE"):
            access.check_host(host, None)


def test_ports(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: is in use"):
            access.free_port("127.0.0.1", port)
        monkeypatch.setattr(access, "PORTS", [port])
        with pytest.raises(ValueError, match="are in use; choose a --port"):
            access.free_port("127.0.0.1", None)
    assert access.free_port("127.0.0.1", port) == port
    with pytest.raises(ValueError, match="192.0.2.77: is not an address of this machine"):
        access.free_port("192.0.2.77", None)


# --- app.py ---------------------------------------------------------------------------------------


def test_without_gradio_one_line_says_what_to_do(sources, monkeypatch, capsys, no_login):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, err = command(monkeypatch, capsys, app, "--weights", sources["cris"])
    assert code == 2
    assert err == (
        "error: the page needs gradio: make app installs it in .venv-app, then run "
        ".venv-app/bin/python app.py\n"
    )


def test_the_demo_is_shown_without_weights(sources, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="make demo"):
        app.sources_of(None)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(sources["cris"])
    assert app.sources_of(None) == [os.path.join("runs", "demo")]
    assert "showing the demo" in capsys.readouterr().out
    assert app.sources_of(["x"]) == ["x"]


def test_weights_that_cannot_be_loaded_end_the_program(
    sources, tmp_path, monkeypatch, capsys, no_login
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "gradio")
    (tmp_path / "damaged.pth").write_text("no weights")
    code, _, err = command(
        monkeypatch, capsys, app, "--weights", tmp_path / "damaged.pth", "--model", "cris"
    )
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_only_the_views_and_the_site_import_gradio():
    with_gradio = set()
    for path in [ROOT / "app.py", *(ROOT / "page").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())]
            module = getattr(node, "module", "") or ""
            if "gradio" in names or module.startswith("gradio"):
                with_gradio.add(path.stem)
    assert {name for name in with_gradio if not name.endswith("_view")} == {"site", "controls"}


def test_a_signal_ends_the_page_and_removes_its_files(
    sources, tmp_path, monkeypatch, capsys, no_login
):
    folders = []

    def serve(args, models, page_settings, login):
        folder = page_settings.sessions.folder
        (folder / "upload.png").write_text("x")
        folders.append((folder.parent, folder.stat().st_mode & 0o777, len(models)))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "gradio")
    monkeypatch.setattr(app, "serve", serve)
    code, _, err = command(
        monkeypatch, capsys, app, "--weights", sources["cris"], "--device", "cpu"
    )
    assert code == 128 + signal.SIGTERM
    assert err == "stopped by SIGTERM: the page is closed and its files are removed\n"
    assert folders == [(tmp_path, 0o700, 1)]
    assert list(tmp_path.iterdir()) == []
