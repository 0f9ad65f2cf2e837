"""Masks for images of every kind, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

import cris
import predict

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A CRIS as a plain checkpoint, not a run folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "cris.pth"
    torch.save({"state_dict": cris.CRIS(cris.VARIANTS["mini"]).state_dict()}, path)
    return path


@pytest.fixture
def images(tmp_path):
    """A folder with a colour, a grey, a transparent and a 16-bit image, of different sizes."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "colour.jpg")
    Image.fromarray(rng.integers(0, 255, (50, 40), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 255, (33, 61, 4), dtype=np.uint8)).save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 4000, (64, 64), dtype=np.uint16)).save(folder / "deep.tif")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_images_becomes_masks_of_their_sizes(
    images, weights, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "masks"
    code, said, err = command(
        monkeypatch, capsys, predict, images, "--model", "cris", "--weights", weights,
        "--prompt", "a polyp", "--out", out, "--overlays", "--probabilities", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "4 masks" in said
    assert len(list(out.iterdir())) == 12
    model = cris.CRIS.from_pretrained(weights)
    for name, size in {
        "colour": (90, 70),
        "grey": (40, 50),
        "alpha": (61, 33),
        "deep": (64, 64),
    }.items():
        mask = Image.open(out / f"{name}.png")
        assert mask.size == size and mask.mode == "L" and set(np.unique(mask)) <= {0, 255}
        probability = np.asarray(Image.open(out / f"{name}_probability.png")) / 65535
        near = np.abs(probability - model.config.threshold) < 1e-4
        assert ((probability > model.config.threshold) == (np.asarray(mask) > 0))[~near].all()
        assert Image.open(out / f"{name}_overlay.png").size == size


def test_a_prompt_changes_the_mask_s_probabilities(images, weights, tmp_path, monkeypatch, capsys):
    seen = []
    for prompt in ("a polyp", "the tumour on the left"):
        out = tmp_path / prompt[:3]
        common = ["--model", "cris", "--weights", weights, "--prompt", prompt, "--probabilities"]
        code, _, err = command(
            monkeypatch,
            capsys,
            predict,
            images / "colour.jpg",
            *common,
            "--out",
            out,
            "--device",
            "cpu",
        )
        assert code == 0, err
        seen.append(np.asarray(Image.open(out / "colour_probability.png")))
    assert not np.array_equal(*seen)


REFUSED = {
    "no such image": (["nowhere.png", "--prompt", "a"], "nowhere.png: no such image or folder"),
    "a text is missing": (["{images}"], 'images need --prompt "a text"'),
    "a type is no text": (["{images}", "--prompt", "p6"], "prompt types belong to data sets"),
    "one name twice": (
        ["{images}", "{images}/grey.png", "--prompt", "a"],
        "two inputs have the same name",
    ),
    "truncated": (["{broken}", "--prompt", "a"], "broken.jpg: not readable as an image"),
    "no images": (["{empty}", "--prompt", "a"], "no images in this folder"),
    "no such device": (["{images}", "--prompt", "a", "--device", "cuda:9"], "not on this machine"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_user_did_wrong_is_one_line(kind, images, weights, tmp_path, monkeypatch, capsys):
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty"
    broken.write_bytes((images / "colour.jpg").read_bytes()[:-400])
    empty.mkdir()
    words, message = REFUSED[kind]
    words = [word.format(images=images, broken=broken, empty=empty) for word in words]
    common = ["--model", "cris", "--weights", weights, "--out", tmp_path / "masks"]
    code, _, err = command(monkeypatch, capsys, predict, *words, *common)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "masks").exists()


def test_weights_must_say_or_be_told_what_they_are(images, weights, tmp_path, monkeypatch, capsys):
    code, _, err = command(
        monkeypatch,
        capsys,
        predict,
        images,
        "--weights",
        weights,
        "--prompt",
        "a",
        "--out",
        tmp_path / "m",
    )
    assert code == 2 and "--model is missing" in err
    code, _, err = command(
        monkeypatch, capsys, predict, images, "--model", "cris", "--weights", images, "--prompt", "a",
        "--out", tmp_path / "m",
    )  # fmt: skip
    assert code == 2 and "best.safetensors" in err and err.count("\n") == 1


def test_a_data_set_needs_its_prompts(demo, weights, tmp_path, monkeypatch, capsys):
    common = ["--model", "cris", "--weights", weights, "--out", tmp_path / "m", "--device", "cpu"]
    code, _, err = command(monkeypatch, capsys, predict, demo, *common)
    assert code == 2 and "--prompt is missing" in err
    code, _, err = command(
        monkeypatch, capsys, predict, demo, "--prompt", "p6", "--split", "val", *common
    )
    assert code == 0, err
    names = {f"{item['mask_name']}" for item in json.loads((demo / "anns/val.json").read_text())}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
