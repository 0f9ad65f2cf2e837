"""predict.py --window-size: large images in overlapping windows, also with --tta and ensembles."""

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image, ImageOps
from small_runs import called, photo, probability, refused, run_of, scan

import clipseg
import cris
import segformer
from prediction.combine import predict_in_windows

pytestmark = pytest.mark.numeric

# --- properties ----------------------------------------------------------------------------------


def sample_of(H: int, W: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, H, W), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "size": (H, W), "prompt": "a"}


def per_pixel(sample: dict) -> torch.Tensor:
    """A model that sees one pixel at a time: (2,H,W)."""
    assert sample["image"].shape[1:] == sample["size"] and sample["prompt"] == "a"
    red, green, _ = sample["image"].float() / 255
    return torch.stack([red, 1 - red * green])


SIZES = [(100, 131), (40, 200), (33, 32), (32, 33), (300, 35), (7, 90), (64, 64)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_pixels_gives_the_same_in_windows(size, overlap):
    sample = sample_of(*size)
    result = predict_in_windows(per_pixel, sample, 32, overlap)
    torch.testing.assert_close(result, per_pixel(sample), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_the_windows_sum_to_one(size):
    def certain(sample):
        return torch.ones(1, *sample["size"])

    result = predict_in_windows(certain, sample_of(*size), 32)
    torch.testing.assert_close(result, torch.ones(1, *size), rtol=0, atol=1e-6)


def test_a_marked_object_stays_where_it_is():
    """A model that marks only what it sees in the middle of its window: no pixel moves."""
    for row, column in [(0, 0), (99, 130), (31, 64), (50, 23), (77, 96)]:
        sample = sample_of(100, 131)
        sample["image"] = torch.zeros(3, 100, 131, dtype=torch.uint8)
        sample["image"][:, row, column] = 255
        result = predict_in_windows(per_pixel, sample, 32)
        assert (result[0] > 0.5).nonzero().tolist() == [[row, column]]


def test_windows_are_of_the_side_and_cover_all():
    seen = []
    covered = torch.zeros(100, 131)

    def record(sample):
        crop = sample["image"]
        seen.append(sample["size"])
        columns = crop[0, 0].tolist()
        rows = crop[1, :, 0].tolist()
        covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += 1
        assert rows == [*range(rows[0], rows[0] + 32)]
        return torch.zeros(1, *sample["size"])

    sample = sample_of(100, 131)
    sample["image"][0] = torch.arange(131)
    sample["image"][1] = torch.arange(100)[:, None]
    predict_in_windows(record, sample, 32, 0.25)
    # Steps of 24 pixels: starts 0, 24, 48, 68 of the rows, 0, 24, 48, 72, 96, 99 of the columns.
    assert seen == [(32, 32)] * 24 and covered.min() == 1 and covered.max() > 1


def test_a_smaller_image_is_predicted_at_once():
    sample = sample_of(20, 30)
    given = []

    def record(sample):
        given.append(sample)
        return per_pixel(sample)

    for side in (None, 30, 31):
        predict_in_windows(record, sample, side)
    assert len(given) == 3 and all(part is sample for part in given)


# --- the program ---------------------------------------------------------------------------------


def bell(n: int) -> np.ndarray:
    """Return the weights of n pixels along a side of a window."""
    return np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2))


def blended(segment, image: Image.Image, rows: list[int], columns: list[int], side: int):
    """Return the blend of segment(crop), (K,side,side), over windows that start there."""
    weights = np.maximum(np.outer(bell(side), bell(side)), 1e-3)
    total = 0
    sums = np.zeros((image.height, image.width))
    for top in rows:
        for left in columns:
            crop = segment(image.crop((left, top, left + side, top + side)))
            if isinstance(total, int):
                total = np.zeros((len(crop), image.height, image.width))
            box = (slice(top, top + side), slice(left, left + side))
            total[(slice(None), *box)] += crop * weights
            sums[box] += weights
    return total / sums


def test_windows_are_images_of_their_own(tmp_path, monkeypatch, capsys):
    run, model = run_of("segformer", tmp_path / "run", num_classes=1)
    image = photo(tmp_path / "a.png", size=(120, 70))
    given = ["--weights", run, "--probabilities", tmp_path / "a.png", "--window-size", 64]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "quarter")
    called(monkeypatch, capsys, *given, "--overlap", 0.5, "--out", tmp_path / "half")

    def segment(crop):
        return segformer.segment(model, crop)[0]

    expected = blended(segment, image, [0, 6], [0, 48, 56], 64)
    np.testing.assert_allclose(probability(tmp_path / "quarter", "a"), expected[0], atol=2e-5)
    expected = blended(segment, image, [0, 6], [0, 32, 56], 64)
    np.testing.assert_allclose(probability(tmp_path / "half", "a"), expected[0], atol=2e-5)
    assert np.abs(expected - segment(image)).max() > 0.01


def test_small_images_are_the_same_with_windows(tmp_path, monkeypatch, capsys):
    run, _ = run_of("segformer", tmp_path / "run", num_classes=1)
    photo(tmp_path / "a.png", size=(64, 40))
    given = ["--weights", run, "--probabilities", tmp_path / "a.png", "--out"]
    called(monkeypatch, capsys, *given, tmp_path / "whole")
    called(monkeypatch, capsys, *given, tmp_path / "windows", "--window-size", 64)
    assert contents(tmp_path / "whole") == contents(tmp_path / "windows")


def test_windows_flips_and_two_models_together(tmp_path, monkeypatch, capsys):
    first, model = run_of("cris", tmp_path / "a")
    second, other = run_of("clipseg", tmp_path / "b", image_size=64)
    image = photo(tmp_path / "a.png", size=(90, 50))
    given = ["--weights", first, second, "--prompt", "polyp at the top", "--probabilities"]
    given += ["--tta", "--window-size", 50, "--overlap", 0.5, tmp_path / "a.png"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "out")

    parts = []
    for module, member in ((cris, model), (clipseg, other)):
        for is_mirrored in (False, True):
            for is_flipped in (False, True):
                text = "polyp at the bottom" if is_flipped else "polyp at the top"
                turned = ImageOps.mirror(image) if is_mirrored else image
                turned = ImageOps.flip(turned) if is_flipped else turned

                def segment(crop, module=module, member=member, text=text):
                    return module.segment(member, crop, text)[0]

                part = blended(segment, turned, [0], [0, 25, 40], 50)[0]
                part = part[::-1] if is_flipped else part
                parts.append(part[:, ::-1] if is_mirrored else part)
    assert len(parts) == 8
    written = probability(tmp_path / "out", "a")
    np.testing.assert_allclose(written, np.mean(parts, 0), atol=2e-5)
    assert min(np.abs(written - part).max() for part in parts) > 0.005


# --- what is refused -----------------------------------------------------------------------------


def test_what_has_no_windows_is_refused(tmp_path, monkeypatch, capsys):
    photo(tmp_path / "a.png")
    scan(tmp_path / "ct.nii.gz", np.zeros((4, 4, 4), np.int16))
    sam, _ = run_of("sam", tmp_path / "sam")
    images, _ = run_of("segformer", tmp_path / "images", num_classes=1)
    volumes, _ = run_of("swin", tmp_path / "volumes", image_size=(64, 32, 32))
    cases = [
        (sam, "a.png", "--window-size 64", "boxes and points may cross the windows"),
        (
            images,
            "a.png",
            "--overlap 0.5",
            "--overlap: images have windows only with --window-size",
        ),
        (volumes, "ct.nii.gz", "--window-size 64", "--window-size: is for images; this model"),
        (images, "a.png", "--window-size 8", "--window-size 8: must be a whole number of at least"),
    ]
    for weights, name, option, message in cases:
        given = ["--weights", weights, "--out", tmp_path / "out", *option.split()]
        assert message in refused(monkeypatch, capsys, tmp_path / name, *given)
    assert not (tmp_path / "out").exists()
