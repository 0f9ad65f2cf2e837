"""predict.py --tta: the mean over flips, and the flips that are left out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ImageOps
from small_runs import called, photo, probability, refused, run_of, scan, volume_probability

import cris
import segformer
from imaging.boxes_and_points import Prompt, make_prompts, mirrored
from prediction import flips
from prediction.combine import views_of_volume

pytestmark = pytest.mark.numeric

# --- images with a text --------------------------------------------------------------------------


def both(image):
    return ImageOps.flip(ImageOps.mirror(image))


def test_the_mean_of_four_flips_with_their_own_texts(tmp_path, monkeypatch, capsys):
    run, model = run_of("cris", tmp_path / "run")
    image = photo(tmp_path / "a.png")
    text = "polyp, located in the top left of the image"
    given = ["--weights", run, "--prompt", text, "--tta", "--probabilities"]
    said, _ = called(monkeypatch, capsys, *given, "--out", tmp_path / "out", tmp_path / "a.png")
    assert said.count("--tta") == 1 and "--tta: 4 views of each image\n" in said

    parts = [
        cris.segment(model, image, text)[0],
        cris.segment(model, ImageOps.mirror(image), text.replace("left", "right"))[0][..., ::-1],
        cris.segment(model, ImageOps.flip(image), text.replace("top", "bottom"))[0][:, ::-1],
        cris.segment(model, both(image), "polyp, located in the bottom right of the image")[0][
            :, ::-1, ::-1
        ],
    ]
    written = probability(tmp_path / "out", "a")
    np.testing.assert_allclose(written, np.mean(parts, 0)[0], atol=2e-5)
    assert all(np.abs(written - part).max() > 0.01 for part in parts)
    assert np.abs(parts[0] - parts[1]).max() > 0.01


def test_a_text_about_anatomy_is_not_mirrored(tmp_path, monkeypatch, capsys):
    run, model = run_of("cris", tmp_path / "run")
    image = photo(tmp_path / "a.png")
    text = "the left ventricle at the top"
    given = ["--weights", run, "--prompt", text, "--tta", "--probabilities", tmp_path / "a.png"]
    called(monkeypatch, capsys, "--out", tmp_path / "out", *given)
    upside_down = cris.segment(model, ImageOps.flip(image), "the left ventricle at the bottom")[0]
    expected = (cris.segment(model, image, text)[0] + upside_down[:, ::-1]) / 2
    np.testing.assert_allclose(probability(tmp_path / "out", "a"), expected[0], atol=2e-5)


def test_how_many_views_texts_allow(capsys):
    every = list(flips.IMAGE_FLIPS)
    texts = ["polyp at the left", "left lung", "left lung, upper lobe", ""]
    counts = [flips.count_views(text, every) for text in texts]
    assert counts == [4, 2, 1, 4]

    flips.say_views(counts, "image")
    said = capsys.readouterr().out
    assert said.startswith("--tta: 4 views of an image, fewer for 2 of 4 images, as a side in")
    with pytest.raises(ValueError, match="--tta: every flip would make a class or a text wrong"):
        flips.say_views([1, 1], "image")


# --- images with classes -------------------------------------------------------------------------


def test_a_flip_that_makes_a_class_wrong_is_left_out(tmp_path, monkeypatch, capsys):
    names = {"classes": ["background", "left_lung", "heart"]}
    run, model = run_of("segformer", tmp_path / "run", run=names, num_classes=3)
    images = {name: photo(tmp_path / f"in/{name}.png", seed=k) for k, name in enumerate("ab")}
    given = ["--weights", run, "--tta", "--probabilities", tmp_path / "in"]
    said, _ = called(monkeypatch, capsys, "--out", tmp_path / "out", *given)
    assert said.count("no horizontal flips, which would make the class left_lung wrong") == 1
    assert "--tta: 2 views of each image\n" in said
    for name, image in images.items():
        upside_down = segformer.segment(model, ImageOps.flip(image))[0][:, ::-1]
        expected = (segformer.segment(model, image)[0] + upside_down) / 2
        written = probability(tmp_path / "out", name)
        np.testing.assert_allclose(written, expected[1:].max(0), atol=2e-5)


def test_no_flip_at_all_is_refused(tmp_path, monkeypatch, capsys):
    names = {"classes": ["background", "left lung", "upper lobe"]}
    run, _ = run_of("segformer", tmp_path / "run", run=names, num_classes=3)
    photo(tmp_path / "a.png")
    given = ["--weights", run, "--tta", "--out", tmp_path / "out", tmp_path / "a.png"]
    assert "--tta: every flip would make a class or a text wrong" in refused(
        monkeypatch, capsys, *given
    )
    assert not (tmp_path / "out").exists()


# --- boxes and points ----------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "side"), [("horizontal", -1), ("vertical", -2)])
def test_a_mirrored_box_is_that_of_the_mirrored_mask(axis, side):
    mask = np.zeros((20, 30), np.int64)
    mask[3:9, 4:17] = 1
    (prompt,) = make_prompts(mask, [1], "boxes")
    (expected,) = make_prompts(np.flip(mask, side).copy(), [1], "boxes")
    assert np.array_equal(mirrored(prompt, mask.shape, axis).box, expected.box)
    twice = mirrored(mirrored(prompt, mask.shape, axis), mask.shape, axis)
    assert np.array_equal(twice.box, prompt.box)


def test_points_are_mirrored_and_edges_stay_inside():
    xy = np.float32([[0, 19], [29, 5], [30, 20]])
    prompt = Prompt(1, None, np.float32([0, 0, 30, 20]), xy, np.int64([1, 0, 1]))
    turned = mirrored(prompt, (20, 30), "horizontal")
    assert turned.points.tolist() == [[29, 19], [0, 5], [0, 20]]
    assert turned.box.tolist() == [0, 0, 29, 20] and turned.labels.tolist() == [1, 0, 1]
    turned = mirrored(prompt, (20, 30), "vertical")
    assert turned.points.tolist() == [[0, 0], [29, 14], [30, 0]]
    assert prompt.points is xy and xy[0, 0] == 0


def test_boxes_and_points_are_mirrored_with_the_image(tmp_path, monkeypatch, capsys):
    run, model = run_of("sam", tmp_path / "run", image_size=64)
    image = photo(tmp_path / "a.png", size=(64, 40))
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\na.png,5,8,30,33\n")
    (tmp_path / "points.csv").write_text("image,x,y,label\na.png,12,20,1\na.png,50,3,0\n")
    given = ["--weights", run, "--boxes", tmp_path / "boxes.csv", "--points"]
    given += [tmp_path / "points.csv", "--tta", "--probabilities", "--overlays"]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "out", tmp_path / "a.png")

    parts = []
    for columns in (False, True):
        for rows in (False, True):
            turned = ImageOps.mirror(image) if columns else image
            turned = ImageOps.flip(turned) if rows else turned
            x = [63 - x for x in (30, 5, 12, 50)] if columns else [5, 30, 12, 50]
            y = [39 - y for y in (33, 8, 20, 3)] if rows else [8, 33, 20, 3]
            with torch.no_grad():  # at this size, pixels of the image are those of the input
                logits, _ = model(
                    model.preprocess(turned)[None],
                    boxes=torch.tensor([[[x[0], y[0], x[1], y[1]]]]).float(),
                    points=torch.tensor([[[[x[2], y[2]], [x[3], y[3]]]]]).float(),
                    labels=torch.tensor([[[1, 0]]]),
                )
            part = model.postprocess(logits[0, 0], (40, 64))[0].numpy()
            parts.append(
                np.flip(part, [axis for axis, is_on in ((0, rows), (1, columns)) if is_on])
            )
    written = probability(tmp_path / "out", "a")
    np.testing.assert_allclose(written, np.mean(parts, 0), atol=1e-4)
    assert np.abs(written - parts[0]).max() > 0.01


# --- volumes -------------------------------------------------------------------------------------


def test_volumes_are_flipped_along_their_axes(tmp_path, monkeypatch, capsys):
    names = {"classes": ["kidney_right anterior part"], "options": {"overlap": 0.0}}
    sides = {"image_size": (64, 32, 32), "spacing": (3.0, 3.0, 3.0)}
    run, _ = run_of("swin", tmp_path / "run", run=names, num_classes=1, **sides)
    voxels = np.random.default_rng(0).integers(-1000, 300, (20, 14, 12)).astype(np.int16)
    scan(tmp_path / "in/as it is.nii.gz", voxels)
    scan(tmp_path / "in/flipped.nii.gz", voxels[:, :, ::-1].copy())
    given = ["--weights", run, "--probabilities", "--out"]
    called(monkeypatch, capsys, *given, tmp_path / "single", tmp_path / "in")
    source = tmp_path / "in/as it is.nii.gz"
    said, _ = called(monkeypatch, capsys, *given, tmp_path / "out", source, "--tta")
    for axis in ("left-right", "front-back"):
        assert said.count(f"--tta: no {axis} flips, which would make the class kidney_right") == 1
    assert "--tta: 2 views of each volume\n" in said

    part = volume_probability(tmp_path / "single", "as it is")
    other = volume_probability(tmp_path / "single", "flipped")[:, :, ::-1]
    assert np.abs(part - other).max() > 1e-3
    written = volume_probability(tmp_path / "out", "as it is")
    np.testing.assert_allclose(written, (part + other) / 2, atol=1e-6)


def test_all_eight_flips_of_a_volume():
    """The model sees where a voxel is: its probability is that of its position."""
    size = (4, 3, 2)
    position = np.arange(24, dtype=np.float32).reshape(1, *size) / 24

    def predict(model, item):
        return torch.from_numpy(position.copy()) + 100 * item["image"], None

    loaded = SimpleNamespace(
        model=SimpleNamespace(preprocess=lambda x: x),
        recipe=SimpleNamespace(predict=predict),
        config=SimpleNamespace(spacing=(3.0, 3.0, 3.0)),
    )
    grid = SimpleNamespace(size=size, spacing=(3.0, 3.0, 3.0))
    image = np.random.default_rng(0).random((1, *size), np.float32) + 1
    chosen = flips.volume_flips(["liver"])
    parts = [part.copy() for part in views_of_volume(loaded, image, grid, chosen, None)]
    assert len(parts) == 8
    np.testing.assert_array_equal(parts[0], position + 100 * image)
    # Each voxel is mapped to all eight mirrored positions, so the mean of these is the middle.
    np.testing.assert_allclose(np.mean(parts, 0), 100 * image + position.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["background", "liver"], 8),
        (["background", "Left kidney"], 4),
        (["background", "Anterior", "Posterior"], 4),
        (["background", "lung_upper_lobe_left"], 2),
        (["background", "left upper anterior lobe"], 1),
        (["background", "leftover", "cleft"], 8),
    ],
)
def test_the_flips_of_volumes_by_their_classes(classes, expected):
    chosen = flips.volume_flips(classes)
    assert chosen[0] == () and len(set(chosen)) == len(chosen) == expected
