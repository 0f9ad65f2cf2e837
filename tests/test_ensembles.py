"""predict.py with several --weights: the mean of their probabilities, and what fits together."""

import weakref

import numpy as np
import pytest
from PIL import Image
from small_runs import called, photo, probability, refused, run_of, scan, volume_probability

import clipseg
import cris
import segformer
import upernet
from prediction.combine import mean

pytestmark = pytest.mark.numeric

THREE = {"classes": ["background", "one", "two"]}


# --- images --------------------------------------------------------------------------------------


def test_different_models_with_their_own_preprocessing_and_thresholds(
    tmp_path, monkeypatch, capsys
):
    first, model = run_of("cris", tmp_path / "cris", threshold=0.4)
    second, other = run_of("clipseg", tmp_path / "clipseg", image_size=96, threshold=0.6)
    image = photo(tmp_path / "a.png")
    given = ["--prompt", "one red polyp", "--probabilities", "--weights", first, second]
    said, _ = called(monkeypatch, capsys, *given, "--out", tmp_path / "out", tmp_path / "a.png")
    assert (
        "ensemble of 2: the mean of their probabilities; threshold 0.5, the mean of 0.4, 0.6\n"
        in said
    )

    parts = [
        cris.segment(model, image, "one red polyp")[0][0],
        clipseg.segment(other, image, "one red polyp")[0][0],
    ]
    expected = np.mean(parts, 0)
    np.testing.assert_allclose(probability(tmp_path / "out", "a"), expected, atol=2e-5)
    mask = np.asarray(Image.open(tmp_path / "out/a.png")) > 0
    clear = np.abs(expected - 0.5) > 1e-4
    assert np.array_equal(mask[clear], expected[clear] > 0.5)
    assert np.abs(parts[0] - parts[1]).max() > 0.01


def test_the_threshold_of_the_command_line_is_that_of_all(tmp_path, monkeypatch, capsys):
    runs = [run_of("cris", tmp_path / f"{k}", seed=k, threshold=0.2 + k / 2) for k in range(2)]
    photo(tmp_path / "a.png")
    given = ["--prompt", "a", "--probabilities", "--threshold", 0.45, tmp_path / "a.png"]
    given += ["--weights", runs[0][0], runs[1][0], "--out", tmp_path / "out"]
    said, _ = called(monkeypatch, capsys, *given)
    assert "ensemble of 2: the mean of their probabilities; threshold 0.45\n" in said
    written = probability(tmp_path / "out", "a")
    mask = np.asarray(Image.open(tmp_path / "out/a.png")) > 0
    clear = np.abs(written - 0.45) > 1e-4
    assert np.array_equal(mask[clear], written[clear] > 0.45)


def test_class_maps_are_the_most_probable_of_the_mean(tmp_path, monkeypatch, capsys):
    first, model = run_of("segformer", tmp_path / "a", run=THREE, num_classes=3)
    second, other = run_of("upernet", tmp_path / "b", run=THREE, num_classes=3)
    image = photo(tmp_path / "a.png")
    given = ["--weights", first, second, "--out", tmp_path / "out", tmp_path / "a.png"]
    said, _ = called(monkeypatch, capsys, *given)
    assert "ensemble of 2: the mean of their probabilities\n" in said
    expected = (segformer.segment(model, image)[0] + upernet.segment(other, image)[0]) / 2
    classes = np.asarray(Image.open(tmp_path / "out/a.png"))
    highest = np.sort(expected, 0)
    clear = highest[-1] - highest[-2] > 1e-5
    assert np.array_equal(classes[clear], expected.argmax(0)[clear]) and clear.mean() > 0.99
    assert len(np.unique(classes)) > 1


def test_grey_images_get_the_colours_of_each_run(tmp_path, monkeypatch, capsys):
    """A mean of two calls with one run each equals one call with both."""
    kinds = {"a": {"options": {"pseudocolor": "bone"}}, "b": {}}
    for seed, (name, run) in enumerate(kinds.items()):
        run_of("segformer", tmp_path / name, seed=seed, run=run, num_classes=1)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)).save(
        tmp_path / "grey.png"
    )
    written = {}
    for names in ("a", "b", "ab"):
        given = ["--weights", *(tmp_path / name for name in names), "--probabilities"]
        given += ["--out", tmp_path / f"out {names}", tmp_path / "grey.png"]
        called(monkeypatch, capsys, *given)
        written[names] = probability(tmp_path / f"out {names}", "grey")
    np.testing.assert_allclose(written["ab"], (written["a"] + written["b"]) / 2, atol=2e-5)


def test_boxes_prompt_every_member_and_are_mentioned_once(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate("ab"):
        run_of("sam", tmp_path / name, seed=seed, image_size=64)
    photo(tmp_path / "in/x.png", size=(64, 40))
    photo(tmp_path / "in/y.png", size=(64, 40))
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nx.png,5,8,30,33\n")
    given = ["--boxes", tmp_path / "boxes.csv", "--probabilities", tmp_path / "in", "--out"]
    written = {}
    for names in ("a", "b", "ab"):
        runs = [tmp_path / name for name in names]
        said, _ = called(monkeypatch, capsys, *given, tmp_path / f"out {names}", "--weights", *runs)
        assert said.count("1 of 2 images have no box") == 1
        written[names] = probability(tmp_path / f"out {names}", "x")
    np.testing.assert_allclose(written["ab"], (written["a"] + written["b"]) / 2, atol=2e-5)


# --- volumes -------------------------------------------------------------------------------------


def test_volumes_are_averaged_on_their_own_grid(tmp_path, monkeypatch, capsys):
    """The members resample the volume to different spacings."""
    options = {"options": {"overlap": 0.0}}
    for seed, name in enumerate("ab"):
        sides = {"image_size": (64, 32, 32), "spacing": (3.0 + seed,) * 3}
        run_of("swin", tmp_path / name, seed=seed, run=options, num_classes=1, **sides)
    voxels = np.random.default_rng(0).integers(-1000, 300, (12, 9, 8)).astype(np.int16)
    scan(tmp_path / "ct.nii.gz", voxels)
    written = {}
    for names in ("a", "b", "ab"):
        given = ["--weights", *(tmp_path / name for name in names), "--probabilities"]
        out = tmp_path / f"out {names}"
        called(
            monkeypatch,
            capsys,
            *given,
            "--model",
            "swin_unetr3d",
            "--out",
            out,
            tmp_path / "ct.nii.gz",
        )
        written[names] = volume_probability(out, "ct")
    np.testing.assert_allclose(written["ab"], (written["a"] + written["b"]) / 2, atol=1e-6)
    assert np.abs(written["a"] - written["b"]).max() > 1e-3


# --- what does not fit together ------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of several runs."""
    root = tmp_path_factory.mktemp("runs")
    run_of("cris", root / "cris", run={"options": {"prompt": "p6"}})
    run_of("clipseg", root / "clipseg", run={"options": {"prompt": "p3"}})
    run_of("segformer", root / "three", run=THREE, num_classes=3)
    run_of("segformer", root / "unnamed", num_classes=3)
    run_of("upernet", root / "two", num_classes=2)
    turned = {"classes": ["background", "two", "one"]}
    run_of("upernet", root / "turned", run=turned, num_classes=3)
    run_of("sam", root / "sam")
    names = {"classes": ("background", "one", "two"), "image_size": (64, 32, 32)}
    run_of("swin", root / "swin", **names)
    run_of("swin", root / "channels", in_channels=2, **names)
    run_of("swin", root / "overlapping", overlapping=True, **names)
    (root / "link").symlink_to(root / "cris")
    return root


REFUSED = {
    "a text and no text": (
        "cris three --prompt a",
        "{root}/cris (cris) takes images with a text, {root}/three (segformer) takes images; an",
    ),
    "boxes": ("three sam", "three (segformer) takes images, {root}/sam (sam_decoder) takes images"),
    "images and volumes": ("three swin", "takes images, {root}/swin (swin_unetr3d) takes volumes"),
    "counts": ("three two", "{root}/three has 3 classes, {root}/two has 2 classes; an ensemble"),
    "order": (
        "three turned",
        "classes of {root}/three are background, one, two, those of {root}/turned background, two",
    ),
    "a name after one without": ("unnamed three turned", "of {root}/three are background, one"),
    "the same twice": ("cris cris --prompt a", "{root}/cris and {root}/cris are the same weights"),
    "a file of the same": (
        "cris cris/best.safetensors --prompt a",
        "{root}/cris and {root}/cris/best.safetensors are the same weights; give each once",
    ),
    "a link": ("cris link --prompt a", "{root}/cris and {root}/link are the same weights"),
    "--clip": ("cris clipseg --prompt a --clip x", "--clip: completes one file of weights"),
    "--decoder": ("cris clipseg --prompt a --decoder x", "--decoder: completes one file of"),
    "no prompt": ("cris clipseg", "--prompt is missing: {root}/cris was trained with p6, {root}"),
    "channels": ("swin channels", "{root}/swin takes volumes of 1 channels, {root}/channels of 2"),
    "overlap": ("swin overlapping", "has 3 classes, {root}/overlapping has 3 overlapping classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(case, runs, tmp_path, monkeypatch, capsys):
    words, message = REFUSED[case]
    words, _, more = words.partition(" --")
    photo(tmp_path / "a.png")
    given = ["--weights", *(runs / word for word in words.split()), "--out", tmp_path / "out"]
    given += f"--{more}".split() if more else []
    error = refused(monkeypatch, capsys, tmp_path / "a.png", *given)
    assert message.format(root=runs) in error, error
    assert not (tmp_path / "out").exists()


def test_names_count_only_where_both_have_them(runs, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "a.png")
    given = ["--weights", runs / "unnamed", runs / "three", "--out", tmp_path / "out"]
    called(monkeypatch, capsys, tmp_path / "a.png", *given)
    assert '"one"' in (tmp_path / "out/classes.json").read_text()


# --- the command line ----------------------------------------------------------------------------


def test_words_behind_a_single_run_are_inputs(runs, tmp_path, monkeypatch, capsys):
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image in images:
        photo(image)
    said, _ = called(
        monkeypatch, capsys, "--out", tmp_path / "out", "--weights", runs / "three", *images
    )
    assert "ensemble" not in said and "2 masks in" in said


def test_weights_given_one_by_one_are_an_ensemble(runs, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "a.png")
    given = ["--weights", runs / "unnamed", "--weights", runs / "three", "--out", tmp_path / "out"]
    said, _ = called(monkeypatch, capsys, tmp_path / "a.png", *given)
    assert "ensemble of 2" in said


@pytest.mark.parametrize("words", [["three"], ["three", "unnamed"], ["three", "three.onnx"]])
def test_without_an_input_nothing_is_taken_for_one(words, runs, tmp_path, monkeypatch, capsys):
    given = ["--out", tmp_path / "out", "--weights", *(runs / word for word in words)]
    assert "INPUT is missing: give images" in refused(monkeypatch, capsys, *given)


# --- the mean ------------------------------------------------------------------------------------


def test_the_mean_holds_two_arrays_at_a_time():
    alive = []
    most = 0

    def parts():
        nonlocal most
        for k in range(5):
            part = np.full((2, 3), k, np.float32)
            alive.append(weakref.ref(part))
            most = max(most, sum(ref() is not None for ref in alive))
            yield part
            del part

    result = mean(parts())
    assert np.array_equal(result, np.full((2, 3), 2)) and result.dtype == np.float32
    assert most == 2
    single = np.float32([[0.1]])
    assert mean(iter([single])) is single
