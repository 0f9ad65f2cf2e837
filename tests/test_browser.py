"""app.py, driven in chromium: what a user sees and saves, and what nobody else can reach.

Run by `make test-browser`. Models are mini with stand-in weights, so that masks mean nothing, but
differ with phrases, boxes and points. Saved files are compared with those of predict.py.
"""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, command, randomised, write_run
from PIL import Image

import app
import clipseg
import cris
import predict
import sam_decoder
import segformer
import swin_unetr3d
from imaging.pictures import PREDICTION, class_colours

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sync_playwright is None, reason="playwright is missing; see make app"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to drive the page with"),
]

WAIT = 60  # seconds in which the page must answer; a busy machine is slow
SIZE = (320, 240)  # of the uploaded images, width and height
DISC = "the white disc"
TUMOUR = "the tumour"
PASSWORD = "correct horse"


# --- images and models ---------------------------------------------------------------------------


def draw_discs(width=SIZE[0], height=SIZE[1], blue=128) -> np.ndarray:
    """Return three discs on a gradient, uint8 (H,W,3)."""
    y, x = np.mgrid[:height, :width]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = x * 255 // width
    image[..., 1] = y * 255 // height
    image[..., 2] = blue
    discs = ((0.3, 0.4, 0.2, 240), (0.7, 0.6, 0.17, 40), (0.2, 0.8, 0.12, 255))
    for centre_x, centre_y, radius, grey in discs:
        distance = np.hypot(x - centre_x * width, y - centre_y * height)
        image[distance < radius * height] = grey
    return image


def save_image(path: Path, image: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def save_ct(path: Path) -> Path:
    """Write a ball with a core, in Hounsfield units, on a grid with other axes than RAS."""
    x, y, z = np.indices((40, 30, 24))
    distance = np.sqrt((x - 20) ** 2 + (y - 15) ** 2 + (z - 12) ** 2)
    hounsfield = np.full(distance.shape, -1000, np.int16)
    hounsfield[distance < 11] = 40
    hounsfield[distance < 5] = 120
    affine = np.diag([-4.0, -4.0, 5.0, 1.0])
    affine[:3, 3] = (70, 60, -50)
    nibabel.save(nibabel.Nifti1Image(hounsfield, affine), path)
    return path


def png_without_pixels(width: int, height: int) -> bytes:
    """Return a PNG file that ends where its pixels should start: whoever decodes it fails."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header) - 4) + header + checksum
    return start + struct.pack(">I", 1000) + b"IDAT"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders of models: two that read text, one with classes, two SAM, two for volumes."""
    folder = tmp_path_factory.mktemp("runs")
    words = randomised(cris.CRIS(cris.VARIANTS["mini"]))
    with torch.no_grad():  # the bias depends on the phrase alone: masks would be all or nothing
        words.proj.txt.weight[-1] = 0
        words.proj.txt.bias[-1] = 0
    other = randomised(clipseg.CLIPSeg(clipseg.VARIANTS["mini"]))
    classes = randomised(
        segformer.SegFormer(replace(segformer.VARIANTS["mini"], num_classes=3)),
    )
    boxes = randomised(sam_decoder.SAM(sam_decoder.VARIANTS["mini"]))
    points = randomised(sam_decoder.SAM(sam_decoder.VARIANTS["mini"]))
    with torch.no_grad():
        for parameter in points.parameters():
            parameter *= 1.1
    config = replace(
        swin_unetr3d.VARIANTS["mini"], image_size=(64, 32, 32), spacing=(4.0, 4.0, 4.0)
    )
    organs = randomised(swin_unetr3d.SwinUNETR(config))
    liver = randomised(swin_unetr3d.SwinUNETR(replace(config, num_classes=1)))

    models = {"words": words, "other": other, "discs": classes}
    models |= {"boxes": boxes, "points": points, "organs": organs, "liver": liver}
    more = {
        "discs": {"classes": ["background", "disc", "ring"]},
        "organs": {"classes": ["background", "liver", "spleen"], "options": {"overlap": 0.0}},
        "liver": {"classes": ["liver"], "options": {"overlap": 0.0}},
    }
    paths = {}
    for name, model in models.items():
        facts = more.get(name, {})
        paths[name] = write_run(
            folder / name, type(model), model.state_dict(), model.config, **facts
        )
    return paths


def predict_files(monkeypatch, capsys, run: Path, out: Path, *arguments) -> Path:
    """Run predict.py, and return the folder of its files."""
    code, _, err = command(
        monkeypatch, capsys, predict, "--weights", run, "--out", out, "--device", "cpu", *arguments
    )
    assert code == 0, err
    return out


def same_pixels(file: Path, other: Path) -> bool:
    """Return True if two masks have the same pixels, palette and kind."""
    with Image.open(file) as first, Image.open(other) as second:
        same_kind = first.mode == second.mode and first.getpalette() == second.getpalette()
        return same_kind and np.array_equal(first, second)


# --- programs that serve the page ----------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


class Server:
    """app.py as a process of its own, with a folder of its own for temporary files."""

    def __init__(self, folder: Path, *arguments, cwd=ROOT):
        """Start it. It is ready when `wait` returns."""
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}/"
        environment = os.environ | {"TMPDIR": str(self.temporary)}
        program = [sys.executable, ROOT / "app.py", "--device", "cpu", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*program, *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def wait(self) -> None:
        """Read what it prints until the page is ready."""
        too_late = threading.Timer(120, self.process.kill)
        too_late.start()
        for line in self.process.stdout:
            self.output += line
            if "the page is ready" in line:
                break
        too_late.cancel()
        assert f"the page is ready: {self.address} (Ctrl-C ends it)\n" in self.output

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal, and return the exit status and all that was printed."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=WAIT)
        return self.process.returncode, self.output + rest

    def folders(self) -> list[Path]:
        """Return the folders of the pages that are open; other programs use no such names."""
        return list(self.temporary.glob("page-*"))

    def get(self, path: str, method="GET", body=None, **headers) -> tuple[int, bytes]:
        """Send a request as it is: browsers and libraries would resolve `..`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The folder of --images: two images, and links to an image and a folder outside of it."""
    root = tmp_path_factory.mktemp("listed")
    save_image(root / "secret" / "patient.png", draw_discs())
    save_image(root / "images" / "first.png", draw_discs(blue=20))
    save_image(root / "images" / "below" / "second.png", draw_discs(blue=220))
    (root / "images" / "link.png").symlink_to(root / "secret" / "patient.png")
    (root / "images" / "folder").symlink_to(root / "secret")
    return root / "images"


@pytest.fixture(scope="module")
def servers(runs, images, tmp_path_factory):
    """Two programs, started at the same time: one with all models, and the demo with a password."""
    folder = tmp_path_factory.mktemp("open")
    opened = Server(folder, "--images", images, "--weights", *runs.values())

    folder = tmp_path_factory.mktemp("locked")
    shutil.copytree(runs["words"], folder / "runs" / "demo")
    password = folder / "password.txt"
    password.write_text(f"{PASSWORD}\n")
    password.chmod(0o600)
    locked = Server(folder, "--auth", f"reader:{password}", cwd=folder)

    yield {"open": opened, "locked": locked}
    for server in (opened, locked):
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(servers) -> Server:
    """The program with all models."""
    servers["open"].wait()
    return servers["open"]


# --- the browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=1000 * WAIT)
        yield browser
        browser.close()


@contextlib.contextmanager
def watched_context(browser, port: int):
    """Open a context. In the end, nothing was requested elsewhere, and no script has failed."""
    requests = []
    errors = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * WAIT)
    context.on("request", lambda request: requests.append(urlsplit(request.url)))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()

    web = [url for url in requests if url.scheme not in ("data", "blob")]
    assert web
    assert {url.netloc for url in web} == {f"127.0.0.1:{port}"}
    assert not errors


@pytest.fixture(scope="module")
def context(chromium, server):
    """The context of most tests: scripts of the page are loaded once."""
    with watched_context(chromium, server.port) as watched:
        yield watched


@pytest.fixture
def page(context, server):
    page = context.new_page()
    page.goto(server.address)
    expect(page.locator("#text-run")).to_be_visible()
    yield page
    page.close()


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def upload(page, kind: str, file: Path) -> None:
    """Upload a file, and wait until its name stands on the page."""
    page.locator(f"#{kind}-upload input[type=file]").set_input_files(file)
    expect(page.locator(f"#{kind}-note")).to_contain_text(file.name.split(".")[0])


def find(page, phrases: str, patience=20) -> None:
    """Type phrases, and wait for the result.

    patience: seconds until the button is clicked again, as gradio drops a click during an answer.
    """
    page.locator("#text-phrases textarea").fill(phrases)
    for _ in range(WAIT // patience):
        page.locator("#text-run").click()
        with contextlib.suppress(AssertionError):
            for phrase in phrases.splitlines():
                expect(page.locator("#text-areas")).to_contain_text(phrase, timeout=1000 * patience)
            return
    pytest.fail(f"no result for {phrases}: {page.locator('#text-status').inner_text()}")


def areas(page, element: str) -> list[int]:
    """Return the pixels of each row of a table."""
    cells = page.locator(f"#{element} td:nth-child(2)").all_inner_texts()
    return [int(cell.replace(",", "")) for cell in cells]


def source(page, element: str) -> str:
    """Return the address of a picture. It changes with the picture."""
    return page.locator(f"#{element} img").get_attribute("src")


def expect_other_picture(page, element: str, before: str) -> None:
    expect(page.locator(f"#{element} img")).not_to_have_attribute("src", before)


def pixels(page, element: str) -> np.ndarray:
    """Return a picture of the page, uint8 (H,W,3)."""
    answer = page.request.get(source(page, element))
    assert answer.ok
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(-1).any())


def compare_with(page, kind: str, model: str) -> None:
    """Choose the second model."""
    page.locator(f"#{kind}-model-2 input").click()
    page.get_by_role("option", name=model).click()


def set_number(page, element: str, value: float | str) -> None:
    """Type the value of a slider or a number; "" empties the field."""
    field = page.locator(f"#{element} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def save(page, button: str, folder: Path) -> Path:
    """Click a button that saves a file, and return the file, in folder/saved."""
    with page.expect_download() as download:
        page.locator(f"#{button}").click()
    file = folder / "saved" / download.value.suggested_filename
    download.value.save_as(file)
    return file


# --- text ----------------------------------------------------------------------------------------


def test_a_phrase_gives_the_mask_of_predict(page, runs, tmp_path, monkeypatch, capsys):
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "text", photo)
    find(page, DISC)
    picture = pixels(page, "text-result")
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    assert has_colour(picture, PREDICTION)

    file = save(page, "text-download-mask", tmp_path)
    out = predict_files(
        monkeypatch, capsys, runs["words"], tmp_path / "out", "--prompt", DISC, photo
    )
    assert same_pixels(file, out / "photo.png") and Image.open(file).size == SIZE
    count = np.count_nonzero(Image.open(file))
    assert areas(page, "text-areas") == [count]
    assert 0.1 < count / (SIZE[0] * SIZE[1]) < 0.95

    table = save(page, "text-download-table", tmp_path)
    assert table.read_text() == (out / "measurements.csv").read_text()


def test_phrases_have_colours_and_the_threshold_needs_no_model(page, tmp_path):
    upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
    find(page, DISC)
    before = source(page, "text-result")
    find(page, TUMOUR)
    expect_other_picture(page, "text-result", before)

    before = source(page, "text-result")
    find(page, f"{DISC}\n{TUMOUR}")
    expect_other_picture(page, "text-result", before)
    picture = pixels(page, "text-result")
    for colour in class_colours(2):
        assert has_colour(picture, colour)
    first, second = areas(page, "text-areas")
    with zipfile.ZipFile(save(page, "text-download-mask", tmp_path)) as archive:
        counts = [np.count_nonzero(Image.open(archive.open(name))) for name in archive.namelist()]
    assert counts == [first, second]

    status = page.locator("#text-status").inner_text()
    before = source(page, "text-result")
    set_number(page, "text-threshold", 0.6)
    expect_other_picture(page, "text-result", before)
    expect(page.locator("#text-areas")).not_to_contain_text(f"{first:,}")
    fewer = areas(page, "text-areas")
    assert fewer[0] < first and fewer[1] < second
    assert page.locator("#text-status").inner_text() == status
    page.locator("#text-run").click()
    expect(page.locator("#text-status")).to_contain_text("same answer as before")
    assert areas(page, "text-areas") == fewer


def test_two_models_stand_side_by_side(page, runs, tmp_path, monkeypatch, capsys):
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "text", photo)
    compare_with(page, "text", "other (CLIPSeg)")
    find(page, DISC)
    expect(page.locator("#text-areas-2")).to_contain_text(DISC)

    threshold = page.locator("#text-threshold input[type=number]").input_value()
    for run, ending in (("words", ""), ("other", "-2")):  # both at the threshold of the first
        arguments = ["--prompt", DISC, "--threshold", threshold, photo]
        out = predict_files(monkeypatch, capsys, runs[run], tmp_path / run, *arguments)
        count = np.count_nonzero(Image.open(out / "photo.png"))
        assert areas(page, f"text-areas{ending}") == [count]
        assert has_colour(pixels(page, f"text-result{ending}"), PREDICTION)


def test_emptied_fields_have_the_values_of_the_start(page, tmp_path):
    upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
    find(page, DISC)
    (count,) = areas(page, "text-areas")
    set_number(page, "text-threshold", 0.6)
    expect(page.locator("#text-areas")).not_to_contain_text(f"{count:,}")
    page.locator("#text-threshold input[type=number]").fill("")  # the slider fills it on leaving
    expect(page.locator("#text-areas")).to_contain_text(f"{count:,}")

    set_number(page, "text-pixel-size", 2)
    expect(page.locator("#text-areas")).to_contain_text("mm²")
    set_number(page, "text-pixel-size", "")
    expect(page.locator("#text-areas")).not_to_contain_text("mm²")
    page.locator("#text-run").click()
    expect(page.locator("#text-status")).to_contain_text("same answer as before")
    assert "area_mm2" in save(page, "text-download-table", tmp_path).read_text()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


# --- classes -------------------------------------------------------------------------------------


def test_classes_have_a_legend_and_the_map_of_predict(page, runs, tmp_path, monkeypatch, capsys):
    open_tab(page, "Find known classes")
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "classes", photo)
    page.locator("#classes-run").click()
    rows = page.locator("#classes-areas tr")
    expect(rows).to_have_count(3)
    assert "disc" in rows.nth(1).inner_text() and "ring" in rows.nth(2).inner_text()

    file = save(page, "classes-download-mask", tmp_path)
    out = predict_files(monkeypatch, capsys, runs["discs"], tmp_path / "out", photo)
    assert same_pixels(file, out / "photo.png")
    counts = np.bincount(np.asarray(Image.open(file)).ravel(), minlength=3)
    assert areas(page, "classes-areas") == [*counts[1:]] and counts.all()

    before = source(page, "classes-result")
    page.locator("#classes-shown").get_by_label("disc").uncheck()
    expect_other_picture(page, "classes-result", before)
    inside = np.asarray(Image.open(file)) == 1
    assert np.array_equal(pixels(page, "classes-result")[inside], draw_discs()[inside])


# --- boxes and points ----------------------------------------------------------------------------


def click_at(page, x: float, y: float, element="boxes-image") -> None:
    """Click into an image of the boxes: shares of its width and height. Wait for the answer."""
    before = source(page, "boxes-image")
    box = page.locator(f"#{element} img").bounding_box()
    position = {"x": x * box["width"], "y": y * box["height"]}
    page.locator(f"#{element} img").click(position=position)
    expect_other_picture(page, "boxes-image", before)


def test_boxes_and_points_mark_objects(page, runs, tmp_path, monkeypatch, capsys):
    open_tab(page, "Mark with boxes and points")
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "boxes", photo)
    status = page.locator("#boxes-status")
    rows = page.locator("#boxes-areas td:first-child")
    expect(status).to_contain_text("Click into the image")

    click_at(page, 0.15, 0.2)
    expect(status).to_contain_text("opposite corner")
    click_at(page, 0.45, 0.6)
    expect(rows).to_have_count(1)
    (first,) = areas(page, "boxes-areas")
    assert 0 < first < SIZE[0] * SIZE[1]

    page.locator("#boxes-mode").get_by_label("outside").check()
    click_at(page, 0.3, 0.4)
    expect(page.locator("#boxes-areas")).not_to_contain_text(f"{first:,}")
    page.locator("#boxes-undo").click()
    expect(page.locator("#boxes-areas")).to_contain_text(f"{first:,}")
    page.locator("#boxes-clear").click()
    expect(rows).to_have_count(0)

    page.locator("#boxes-mode").get_by_label("Box").check()
    for x, y in ((0.15, 0.2), (0.45, 0.6), (0.55, 0.4), (0.85, 0.8)):
        click_at(page, x, y)
    expect(rows).to_have_count(2)
    numbered = np.asarray(Image.open(save(page, "boxes-download-objects", tmp_path)))
    assert numbered.shape == (SIZE[1], SIZE[0]) and {*np.unique(numbered)} == {0, 1, 2}

    file = save(page, "boxes-download-mask", tmp_path)
    clicks = save(page, "boxes-download-clicks", tmp_path)
    arguments = ["--boxes", clicks, photo]
    out = predict_files(monkeypatch, capsys, runs["boxes"], tmp_path / "out", *arguments)
    assert same_pixels(file, out / "photo.png")
    assert np.array_equal(np.asarray(Image.open(file)) > 0, numbered > 0)


def test_two_models_mark_the_same_objects(page, runs, tmp_path, monkeypatch, capsys):
    """A click into either picture counts for both; files are those of the first model."""
    open_tab(page, "Mark with boxes and points")
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "boxes", photo)
    expect(page.locator("#boxes-status")).to_contain_text("Click into the image")
    click_at(page, 0.15, 0.2)
    compare_with(page, "boxes", "points (SAM)")
    expect(page.locator("#boxes-image-2")).to_be_visible()
    click_at(page, 0.45, 0.6, "boxes-image-2")
    expect(page.locator("#boxes-areas-2 td:first-child")).to_have_count(1)

    clicks = save(page, "boxes-download-clicks", tmp_path)
    for run, ending in (("boxes", ""), ("points", "-2")):
        arguments = ["--boxes", clicks, photo]
        out = predict_files(monkeypatch, capsys, runs[run], tmp_path / run, *arguments)
        count = np.count_nonzero(Image.open(out / "photo.png"))
        assert areas(page, f"boxes-areas{ending}") == [count]
    file = save(page, "boxes-download-mask", tmp_path)
    assert same_pixels(file, tmp_path / "boxes" / "photo.png")
    assert not same_pixels(file, tmp_path / "points" / "photo.png")

    compare_with(page, "boxes", "none")
    expect(page.locator("#boxes-image-2")).to_be_hidden()
    expect(page.locator("#boxes-areas td:first-child")).to_have_count(1)


# --- volumes -------------------------------------------------------------------------------------


def millilitres_of(file: Path) -> list[str]:
    """Return the volume of each label of a mask on the grid of `save_ct`, as the page shows it."""
    voxels = np.bincount(np.asarray(nibabel.load(file).dataobj).ravel().astype(int), minlength=2)
    return [f"{count * 4 * 4 * 5 / 1000:,.1f}" for count in voxels[1:]]


def test_a_volume_is_looked_at_and_saved(page, runs, tmp_path, monkeypatch, capsys):
    open_tab(page, "Volumes")
    volume = save_ct(tmp_path / "ct.nii.gz")
    expect(page.locator("#volumes-axial")).to_be_hidden()
    upload(page, "volumes", volume)
    expect(page.locator("#volumes-note")).to_contain_text("40 x 30 x 24")
    before = source(page, "volumes-axial")
    page.locator("#volumes-run").click()
    expect(page.locator("#volumes-status")).to_contain_text("done in")
    expect(page.locator("#volumes-table td:first-child")).to_have_count(2)
    expect_other_picture(page, "volumes-axial", before)

    status = page.locator("#volumes-status").inner_text()
    before = source(page, "volumes-axial")
    page.locator("#volumes-slice-axial input[type=range]").fill("5")
    expect_other_picture(page, "volumes-axial", before)
    before = source(page, "volumes-axial")
    page.locator("#volumes-window").get_by_label("Bone").check()
    expect_other_picture(page, "volumes-axial", before)
    assert page.locator("#volumes-status").inner_text() == status

    saved = nibabel.load(save(page, "volumes-download-mask", tmp_path))
    out = predict_files(monkeypatch, capsys, runs["organs"], tmp_path / "out", volume)
    expected = nibabel.load(out / "ct.nii.gz")
    assert np.array_equal(saved.get_fdata(), expected.get_fdata())
    assert np.array_equal(saved.affine, nibabel.load(volume).affine)
    millilitres = page.locator("#volumes-table td:nth-child(2)").all_inner_texts()
    assert millilitres == millilitres_of(out / "ct.nii.gz") and "0.0" not in millilitres


def test_two_models_look_at_the_same_slices(page, runs, tmp_path, monkeypatch, capsys):
    open_tab(page, "Volumes")
    volume = save_ct(tmp_path / "ct.nii.gz")
    upload(page, "volumes", volume)
    status = page.locator("#volumes-status")
    page.locator("#volumes-run").click()
    expect(status).to_contain_text("organs (SwinUNETR): done in")
    expect(page.locator("#volumes-axial-2")).to_be_hidden()
    compare_with(page, "volumes", "liver (SwinUNETR)")
    page.locator("#volumes-run").click()
    expect(status).to_contain_text(
        "organs (SwinUNETR): same answer as before, not computed again. liver (SwinUNETR): done in"
    )

    for run, ending in (("organs", ""), ("liver", "-2")):
        out = predict_files(monkeypatch, capsys, runs[run], tmp_path / run, volume)
        shown = page.locator(f"#volumes-table{ending} td:nth-child(2)").all_inner_texts()
        assert shown == millilitres_of(out / "ct.nii.gz")
    saved = nibabel.load(save(page, "volumes-download-mask", tmp_path)).get_fdata()
    assert np.array_equal(saved, nibabel.load(tmp_path / "organs" / "ct.nii.gz").get_fdata())

    before = [source(page, f"volumes-coronal{ending}") for ending in ("", "-2")]
    page.locator("#volumes-axial-2 img").click(position={"x": 100, "y": 60})  # moves both rows
    expect_other_picture(page, "volumes-coronal", before[0])
    expect_other_picture(page, "volumes-coronal-2", before[1])
    first, second = [source(page, f"volumes-axial{ending}") for ending in ("", "-2")]
    set_number(page, "volumes-threshold", 0.6)  # counts for the second alone
    expect_other_picture(page, "volumes-axial-2", second)
    assert source(page, "volumes-axial") == first


# --- robustness ----------------------------------------------------------------------------------


def test_ten_clicks_at_once_give_one_result(page, tmp_path):
    """A script clicks faster than the page notices; all of these are answered."""
    upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
    page.locator("#text-phrases textarea").fill(DISC)
    page.locator("#text-run").evaluate("button => { for (let i = 0; i < 10; i++) button.click() }")
    expect(page.locator("#text-areas")).to_contain_text(DISC)
    assert len(areas(page, "text-areas")) == 1
    find(page, TUMOUR, patience=2)
    assert len(areas(page, "text-areas")) == 1
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_twelve_megapixels(page, tmp_path):
    photo = save_image(tmp_path / "large.jpg", draw_discs(4000, 3000))
    upload(page, "text", photo)
    find(page, DISC)
    assert max(pixels(page, "text-result").shape) < 2000
    mask = Image.open(save(page, "text-download-mask", tmp_path))
    assert mask.size == (4000, 3000)
    assert areas(page, "text-areas") == [np.count_nonzero(mask)]


def test_files_that_are_no_usable_images_are_refused(page, tmp_path):
    """The page says why, drops the earlier result, and goes on."""
    photo = save_image(tmp_path / "photo.png", draw_discs())
    upload(page, "text", photo)
    find(page, DISC)

    text = tmp_path / "text.png"
    text.write_text("not an image")
    upload(page, "text", text)
    expect(page.locator("#text-note")).to_contain_text("cannot be read as an image")
    expect(page.locator("#text-areas td")).to_have_count(0)
    page.locator("#text-run").click()
    expect(page.locator("#text-status")).to_contain_text("Choose an image first")

    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-200])
    upload(page, "text", cut)
    expect(page.locator("#text-note")).to_contain_text("cut.png: not readable as an image")

    huge = tmp_path / "huge.png"
    huge.write_bytes(png_without_pixels(10_000, 6_000))
    upload(page, "text", huge)
    expect(page.locator("#text-note")).to_contain_text("10000 x 6000 pixels; the page takes")
    upload(page, "text", photo)
    find(page, TUMOUR)


def test_turned_and_deep_images_are_read_as_predict_does(page, runs, tmp_path, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = save_image(tmp_path / "in" / "turned.jpg", draw_discs(), exif=exif)
    deep = draw_discs()[..., 0].astype(np.uint16) * 16  # 12 bits
    deep = save_image(tmp_path / "in" / "deep.png", deep)
    out = predict_files(
        monkeypatch, capsys, runs["words"], tmp_path / "out", "--prompt", DISC, turned, deep
    )
    for photo, size in ((turned, SIZE[::-1]), (deep, SIZE)):
        upload(page, "text", photo)
        expect(page.locator("#text-areas td")).to_have_count(0)
        find(page, DISC)
        file = save(page, "text-download-mask", tmp_path)
        assert same_pixels(file, out / f"{photo.stem}.png")
        assert Image.open(file).size == size


def test_browsers_see_only_their_own_images(page, chromium, server, tmp_path):
    """Both upload a file of the same name before either asks."""
    dark = save_image(tmp_path / "dark" / "photo.png", draw_discs(blue=10))
    bright = save_image(tmp_path / "bright" / "photo.png", draw_discs(blue=240))
    with watched_context(chromium, server.port) as other:
        second = other.new_page()
        second.goto(server.address)
        upload(page, "text", dark)
        upload(second, "text", bright)
        page.locator("#text-phrases textarea").fill(DISC)
        second.locator("#text-phrases textarea").fill(DISC)
        page.locator("#text-run").click()
        second.locator("#text-run").click()
        for tab, file in ((page, dark), (second, bright)):
            expect(tab.locator("#text-areas")).to_contain_text(DISC)
            before = source(tab, "text-result")
            set_number(tab, "text-opacity", 0)
            expect_other_picture(tab, "text-result", before)
            before = source(tab, "text-result")
            tab.locator("#text-outline input").uncheck()
            expect_other_picture(tab, "text-result", before)
            expected = np.asarray(Image.open(file))
            assert np.array_equal(pixels(tab, "text-result"), expected)


def test_a_closed_page_is_forgotten(context, server, tmp_path):
    page = context.new_page()
    page.goto(server.address)
    upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
    find(page, DISC)
    (folder,) = server.folders()
    before = {*folder.glob("tmp*/*/*_overlay.png")}
    save(page, "text-download-overlay", tmp_path)
    (written,) = {*folder.glob("tmp*/*/*_overlay.png")} - before
    page.close()
    end = time.monotonic() + WAIT
    while written.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- safety --------------------------------------------------------------------------------------

OUTSIDE = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=app.py",
    "/gradio_api/file=../app.py",
    "/gradio_api/file=%2e%2e/app.py",
    f"/gradio_api/file={ROOT}/app.py",
    "/gradio_api/file/etc/passwd",
    "/file=/etc/passwd",
    "/static/../../../../../../../../etc/passwd",
    "/assets/../../../../../../../../etc/passwd",
    "/../../../../../../../../etc/passwd",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_files_outside_cannot_be_read(path, server):
    status, body = server.get(path)
    assert status in (403, 404)
    assert b"root:" not in body and b"import" not in body


def test_the_files_of_the_list_and_the_runs_cannot_be_read(server, images, runs):
    for path in (images / "first.png", runs["words"] / "config.json", *server.folders()):
        status, _ = server.get(f"/gradio_api/file={path}")
        assert status == 403


def test_an_event_takes_no_path_that_was_not_uploaded(server, images, tmp_path):
    """The page tells the server where an upload lies; a forged place is refused."""
    volume = save_ct(tmp_path / "ct.nii.gz")
    config = json.loads(server.get("/config")[1])
    uploads = {}
    for component in config["components"]:
        if component["props"].get("elem_id", "").endswith("-upload"):
            uploads[component["id"]] = component["props"]["file_count"] == "multiple"
    assert len(uploads) == 4

    kind = {"Content-Type": "application/json"}
    for event in config["dependencies"]:
        if not event["inputs"] or event["inputs"][0] not in uploads:
            continue
        takes_several = uploads[event["inputs"][0]]
        for path in (volume if takes_several else images / "first.png", "/etc/passwd"):
            file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            values = [[file] if takes_several else file, *[0] * (len(event["inputs"]) - 1)]
            session = f"forged-{event['id']}-{Path(path).name}"
            body = json.dumps({"data": values, "fn_index": event["id"], "session_hash": session})
            assert server.get("/gradio_api/queue/join", "POST", body, **kind)[0] == 200
            _, answer = server.get(f"/gradio_api/queue/data?session_hash={session}")
            assert b'"success":false' in answer and b"320 x 240" not in answer
            assert b"voxels" not in answer


def test_requests_that_name_another_host_are_refused(server):
    """A web site whose name is made to lead to this machine cannot use the page."""
    for host, expected in (("evil.example", 400), (f"localhost:{server.port}", 200)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        connection.request("GET", "/config", headers={"Host": host})
        assert connection.getresponse().status == expected
        connection.close()


def test_no_list_for_programs_names_our_functions(server):
    """gradio names its own address for uploads, and nothing of ours."""
    _, body = server.get("/gradio_api/info")
    assert json.loads(body) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    _, body = server.get("/gradio_api/openapi.json")
    assert [*json.loads(body)["paths"]] == ["/gradio_api/upload"]
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert server.get(path)[0] == 404


def test_an_upload_above_the_limit_is_refused_and_removed(server):
    start = (
        b'--limit\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n'
        b"Content-Type: image/png\r\n\r\n"
    )
    end = b"\r\n--limit--\r\n"
    megabytes = 201

    def stream():
        yield start
        for _ in range(megabytes):
            yield bytes(2**20)
        yield end

    length = str(len(start) + megabytes * 2**20 + len(end))
    kind = {"Content-Type": "multipart/form-data; boundary=limit", "Content-Length": length}
    status, _ = server.get("/gradio_api/upload", "POST", stream(), **kind)
    assert status == 413
    sizes = [path.stat().st_size for path in server.temporary.rglob("*") if path.is_file()]
    assert max(sizes, default=0) < 100 * 2**20


def test_links_that_leave_the_folder_are_not_listed(page):
    page.locator("#text-list input").click()
    options = page.get_by_role("option")
    expect(options).to_have_count(2)
    assert sorted(options.all_inner_texts()) == ["below/second.png", "first.png"]
    options.filter(has_text="second").click()
    expect(page.locator("#text-note")).to_contain_text("second.png: 320 x 240 pixels")
    find(page, DISC)


REFUSED = {
    "open to others": (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines can reach this"),
    "a password": (["--auth", "reader:my-secret-word"], "--auth: takes USER:FILE"),
    "no weights": ([], "--weights is missing"),
    "no folder": (["--images", "nowhere"], "--images nowhere: is not a folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mistakes_are_one_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAGE_PASSWORD", raising=False)
    arguments, message = REFUSED[kind]
    code, out, err = command(monkeypatch, capsys, app, *arguments)
    assert code == 2 and out == ""
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert "my-secret-word" not in err


FORGED = "gradio.exceptions.InvalidPathError"  # logged for a forged request


def ended_by(server: Server, number: signal.Signals, reason: str) -> None:
    """End a program whose page has files: one line, and nothing of it is left."""
    (folder,) = server.folders()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(path.is_file() for path in folder.rglob("*"))
    code, output = server.end(number)
    assert code == 128 + number
    assert output.endswith(f"\nstopped {reason}: the page is closed and its files are removed\n")
    errors = re.findall(r"^([\w.]*(?:Error|Exception)\b)", output, re.M)
    assert {*errors} <= {FORGED}, output
    assert server.folders() == []


def test_the_demo_behind_a_password_and_ctrl_c(chromium, servers, tmp_path):
    """Without --weights the demo is shown, in the folder that has one."""
    server = servers["locked"]
    server.wait()
    assert server.output.startswith("no --weights: showing the demo, runs/demo\n")
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
        assert server.get(path)[0] == 401
    assert server.get("/gradio_api/upload", "POST", b"")[0] == 401

    with watched_context(chromium, server.port) as context:
        page = context.new_page()
        page.goto(server.address)
        for password in ("wrong horse", PASSWORD):
            page.get_by_label("username").fill("reader")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password != PASSWORD:
                expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
                assert server.get("/config")[0] == 401
        expect(page.get_by_text("Model: demo (CRIS)")).to_be_visible()
        upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
        find(page, DISC)
        ended_by(server, signal.SIGINT, "by Ctrl-C")


def test_sigterm_removes_everything(page, server, tmp_path):
    """The last test: it ends the program of the others."""
    upload(page, "text", save_image(tmp_path / "photo.png", draw_discs()))
    find(page, DISC)
    ended_by(server, signal.SIGTERM, "by SIGTERM")
