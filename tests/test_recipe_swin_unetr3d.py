"""Volumes in training: crops and losses, a run, its scores and files, what is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, contents, rows
from monai.losses import DiceCELoss
from scipy import ndimage

import losses
import predict
import prepare
import swin_unetr3d
import train
from engine import runs
from imaging import pictures
from recipes import FAMILIES
from recipes import swin_unetr3d as swin_unetr3d_recipes

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)
SIZE = 64, 32, 32  # the smallest window but one of the model
ORGANS = {"0": "background", "1": "left kidney", "2": "liver"}
FAST = ["--variant", "mini", "--weights", "none", "--size", *SIZE, "--spacing", 4, 4, 4]
FAST += ["--crops-per-volume", 1, "--workers", 0, "--overlap", 0, "--overlays", 1]


def write(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def phantom(shift=0):
    """HU int16 and labels uint8 (40,28,24) of two blocks in a body in air."""
    image, labels = np.full((40, 28, 24), -1000, np.int16), np.zeros((40, 28, 24), np.uint8)
    image[4:36, 4:24, 2:22] = 0
    labels[8 + shift : 14 + shift, 8:16, 6:16] = 1
    labels[20:32, 10:22, 6 + shift : 18] = 2
    image[labels == 1], image[labels == 2] = 80, 160
    return image + RNG.integers(-20, 20, image.shape, np.int16), labels


AFFINE = np.diag([4.0, 4.2, 5.0, 1])  # RAS
AFFINE[:3, 3] = -80, -50, 30


def data_set(root, labels=ORGANS, modality="CT", channels=1, stored="RAS", n=3):
    """Three volumes of which one each trains, validates and tests."""
    names, wanted = [f"case{k}" for k in range(n)], nibabel.orientations.axcodes2ornt(stored)
    for k, name in enumerate(names):
        for kind, array in zip(("imagesTr", "labelsTr"), phantom(k), strict=True):
            array = np.stack([array] * channels, 3) if channels > 1 and kind[0] == "i" else array
            volume = nibabel.Nifti1Image(array, AFFINE).as_reoriented(wanted)
            (root / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(volume, root / kind / f"{name}.nii.gz")
    pairs = [{"image": f"./imagesTr/{x}.nii.gz", "label": f"./labelsTr/{x}.nii.gz"} for x in names]
    lists = dict(zip(("training", "validation", "test"), ([pair] for pair in pairs), strict=False))
    settings = {"labels": labels, "modality": {"0": modality}} | lists
    (root / "dataset.json").write_text(json.dumps(settings))
    return root


def trained(root, out, *more):
    arguments = ["--model", "swin_unetr3d", *FAST, "--data", root, "--out", out, *more]
    return arguments + ["--cache", out.parent / "cache"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs, validated after the second and the last."""
    root = data_set(tmp_path_factory.mktemp("volumes") / "set")
    out = root.parent / "run"
    options = {"model": "swin_unetr3d", "variant": "mini", "weights": "none", "data": [str(root)]}
    options |= {"size": list(SIZE), "spacing": [4.0, 4.0, 4.0], "crops_per_volume": 2}
    options |= {"workers": 0, "overlap": 0.0, "overlays": 1, "out": str(out), "epochs": 3}
    options |= {"eval_every": 2, "lr": 1e-3, "cache": str(root.parent / "cache")}
    summary = train.run(train.Options(**options))
    return SimpleNamespace(root=root, out=out, summary=summary)


# --- losses and inputs ---------------------------------------------------------------------------


def test_origin_has_the_loss_of_monai():
    """DiceCELoss as SwinUNETR/BTCV/main.py has it, smooth terms 1e-5, the background included."""
    logits = torch.randn(2, 4, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 6, 5, 7))  # class 3 is absent
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)
    expected = theirs(logits, target)
    ours = swin_unetr3d_recipes.SWIN["origin"].loss(logits, {"mask": target.byte()})[0]
    # Our logits are float32 from here on: 6e-8 each, and sums of 1,680 of them.
    assert abs((ours - expected).item()) < 1e-5
    grads = [torch.autograd.grad(x, logits)[0] for x in (ours, expected)]
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def sample(regions=None):
    mask = torch.from_numpy(RNG.integers(0, 4, (40, 36, 34)).astype(np.uint8))
    mask[0, 0, :20] = 255
    flat = np.flatnonzero((mask.numpy() > 0) & (mask.numpy() < 255))
    flat = flat[mask.numpy().ravel()[flat].argsort(kind="stable")]
    ends = np.searchsorted(mask.numpy().ravel()[flat], np.arange(1, 5))
    image = mask[None].float() + 1
    return {
        "image": image,
        "mask": mask,
        "voxels": (torch.from_numpy(flat), ends),
        "regions": regions,
    }


def test_crops_of_image_and_mask_are_of_one_place():
    config = SimpleNamespace(image_size=(32, 16, 16))
    settings = replace(swin_unetr3d_recipes.SWIN["default"], augment={"flip": (0.5, 0.5, 0.5)})
    item = swin_unetr3d_recipes.volume_inputs(
        sample(), True, np.random.default_rng(1), config, settings
    )
    assert item["image"].shape == (4, 1, 32, 16, 16) and item["mask"].shape == (4, 1, 32, 16, 16)
    assert torch.equal(item["image"], item["mask"] + 1.0)
    batch = swin_unetr3d_recipes.collate_crops([item, item])
    assert batch["image"].shape == (8, 1, 32, 16, 16)


def test_regions_become_a_mask_each():
    config = SimpleNamespace(image_size=(40, 36, 34))  # the whole
    settings = replace(swin_unetr3d_recipes.SWIN["default"], augment={}, crops_per_volume=1)
    one, regions = sample(((1, 3), (1, 2, 3), (3,))), [[1, 3], [1, 2, 3], [3]]
    mask = swin_unetr3d_recipes.volume_inputs(
        one, True, np.random.default_rng(1), config, settings
    )["mask"][0]
    assert mask.shape == (3, 40, 36, 34)
    valid = one["mask"] != 255
    for found, numbers in zip(mask, regions, strict=True):
        expected = torch.from_numpy(np.isin(one["mask"].numpy(), numbers))
        assert torch.equal(found[valid], expected[valid].byte()) and (found[~valid] == 255).all()
    logits = torch.randn(1, 3, 40, 36, 34)
    loss = swin_unetr3d_recipes.volume_loss(logits, {"mask": mask[None]})[0]
    assert torch.equal(loss, losses.dice_bce(logits, mask[None])[0])


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_validates_when_asked_and_writes_what_it_did(run):
    found = rows(run.out / "metrics.csv")
    assert [row["val_dice"] != "" for row in found] == [False, True, True]
    config = json.loads((run.out / "config.json").read_text())
    assert config["options"]["eval_every"] == 2 and config["options"]["crops_per_volume"] == 2
    assert config["class"] == "SwinUNETR" and config["config"]["spacing"] == [4.0, 4.0, 4.0]
    assert config["classes"] == ["background", "left kidney", "liver"]
    model = swin_unetr3d.SwinUNETR.from_pretrained(run.out)
    assert model.config.image_size == SIZE and model.config.num_classes == 3
    assert (run.out / "test/overlays/sheet.png").is_file() and (run.out / "curves.png").is_file()


def test_the_written_label_map_has_the_printed_dice(run, tmp_path, monkeypatch, capsys):
    """Of the file, read with nibabel beside the truth's: one grid, one affine, one Dice."""
    arguments = ["--weights", run.out, "--out", tmp_path / "p", "--overlap", 0, "--overlays"]
    code, _, error = command(monkeypatch, capsys, predict, *arguments, run.root)
    assert code == 0, error
    found = nibabel.load(tmp_path / "p" / "case2.nii.gz")
    truth = nibabel.load(run.root / "labelsTr" / "case2.nii.gz")
    assert found.shape == truth.shape and np.array_equal(found.affine, truth.affine)
    p, t = (np.asarray(x.dataobj) for x in (found, truth))
    assert {*np.unique(p)} <= {0, 1, 2}
    for row in rows(run.out / "test/per_image.csv"):
        k = ["background", "left kidney", "liver"].index(row["class"])
        if k:
            both, sum_ = ((p == k) & (t == k)).sum(), (p == k).sum() + (t == k).sum()
            assert abs(float(row["dice"]) - (2 * both / sum_ if sum_ else 1)) < 1e-12
            assert int(row["tp"]) == both
    names = json.loads((tmp_path / "p" / "classes.json").read_text())
    assert names == ORGANS and (tmp_path / "p" / "case2_overlay.png").is_file()


@pytest.mark.parametrize("stored", ["LAS", "LPS", "SAR"])
def test_however_a_volume_is_stored_the_prediction_is_the_same(
    run, tmp_path, stored, monkeypatch, capsys
):
    wanted = nibabel.orientations.axcodes2ornt(stored)
    original = nibabel.load(run.root / "imagesTr" / "case0.nii.gz")
    nibabel.save(original, tmp_path / "ras.nii.gz")
    nibabel.save(
        original.as_reoriented(
            nibabel.orientations.ornt_transform(nibabel.io_orientation(original.affine), wanted)
        ),
        tmp_path / "other.nii.gz",
    )
    arguments = ["--weights", run.out, "--out", tmp_path / "p", "--overlap", 0]
    files = tmp_path / "ras.nii.gz", tmp_path / "other.nii.gz"
    code, _, error = command(monkeypatch, capsys, predict, *arguments, *files)
    assert code == 0, error
    ras, other = (nibabel.load(tmp_path / "p" / file.name) for file in files)
    assert nibabel.aff2axcodes(other.affine) == tuple(stored)
    assert np.array_equal(other.affine, nibabel.load(files[1]).affine)
    back = nibabel.as_closest_canonical(other)
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(ras.dataobj))
    assert len(np.unique(ras.dataobj)) > 1  # not all background


def test_overfit_says_so_and_needs_one_case(run, tmp_path, monkeypatch, capsys):
    arguments = trained(run.root, tmp_path / "o", "--overfit", 1, "--epochs", 1)
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    assert (
        "train, val and test are the same: 1 volume" in text and "nothing about new cases" in text
    )
    val = float(rows(tmp_path / "o/metrics.csv")[-1]["val_dice"])
    summary = json.loads((tmp_path / "o/test/summary.json").read_text())
    assert summary["tests"]["overfit"]["dice"]["mean"] == pytest.approx(val, abs=1e-12)


def test_numbers_with_gaps_are_written_as_they_were(tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "set", {"0": "background", "4": "liver", "1": "left kidney"})
    for file in (root / "labelsTr").iterdir():
        labels = nibabel.load(file)
        array = np.asarray(labels.dataobj)
        nibabel.save(nibabel.Nifti1Image(np.where(array == 2, 4, array), labels.affine), file)
    arguments = trained(root, tmp_path / "run", "--epochs", 1)
    code, _, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    arguments = ["--weights", tmp_path / "run", "--out", tmp_path / "p", "--overlap", 0, root]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    p, t = (np.asarray(nibabel.load(folder / "case2.nii.gz").dataobj)
            for folder in (tmp_path / "p", root / "labelsTr"))  # fmt: skip
    names = json.loads((tmp_path / "p/classes.json").read_text())
    assert names == {"0": "background", "1": "left kidney", "4": "liver"}
    assert {*np.unique(p)} <= {0, 1, 4}
    scores = {row["class"]: row for row in rows(tmp_path / "run/test/per_image.csv")}
    for k in (1, 4):
        assert int(scores[names[str(k)]]["tp"]) == ((p == k) & (t == k)).sum()
        assert int(scores[names[str(k)]]["fp"]) == ((p == k) & (t != k)).sum()

    # The file of weights is the run: names and numbers are its own.
    file = tmp_path / "run/best.safetensors"
    arguments = ["--weights", file, "--out", tmp_path / "f", "--overlap", 0, root]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    assert contents(tmp_path / "f") == contents(tmp_path / "p")


def test_a_background_of_several_numbers_leaves_one_label_map(tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "set", {"background": [0, 1], "left kidney": 5, "liver": 2})
    arguments = trained(root, tmp_path / "run", "--epochs", 1, "--max-steps", 1)
    code, _, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["classes"] == ["background", "liver", "left kidney"]
    assert config["labels"] == [0, 2, 5] and not config["config"]["overlapping"]
    assert config["config"]["num_classes"] == 3
    truth = np.asarray(nibabel.load(root / "labelsTr/case2.nii.gz").dataobj)
    for row in rows(tmp_path / "run/test/per_image.csv"):
        if row["class"] == "liver":
            assert int(row["tp"]) + int(row["fn"]) == (truth == 2).sum()
        if row["class"] == "background":  # the kidney's voxels, numbered 1, are among it
            assert int(row["tp"]) + int(row["fn"]) == (truth != 2).sum()

    arguments = ["--weights", tmp_path / "run", "--out", tmp_path / "p", "--overlap", 0, root]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    names = {"case2.nii.gz", "classes.json", "measurements.csv"}
    assert {*contents(tmp_path / "p")} == names
    names = json.loads((tmp_path / "p/classes.json").read_text())
    assert names == {"0": "background", "2": "liver", "5": "left kidney"}
    found = np.asarray(nibabel.load(tmp_path / "p/case2.nii.gz").dataobj)
    assert {*np.unique(found)} <= {0, 2, 5}


def test_a_run_begun_when_such_a_background_made_regions_is_tested(tmp_path, monkeypatch, capsys):
    labels = {"background": [0, 1], "spleen": 5, "liver": 2}
    root = data_set(tmp_path / "set", labels)
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(about | {"overlapping": True}))  # as it was read
    arguments = trained(root, tmp_path / "run", "--epochs", 1, "--max-steps", 1)
    code, _, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    (root / "dataset.json").write_text(json.dumps(about))
    scores = rows(tmp_path / "run/test/per_image.csv")

    arguments = ["--weights", tmp_path / "run", "--eval", "--test", root, "--out", tmp_path / "e"]
    arguments += ["--workers", 0, "--overlays", 0, "--cache", tmp_path / "cache"]
    code, _, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    assert rows(tmp_path / "e/test/per_image.csv") == scores

    code, _, error = command(monkeypatch, capsys, train, "--resume", "--out", tmp_path / "run")
    assert code == 0, error
    assert rows(tmp_path / "run/test/per_image.csv") == scores


# --- classes that overlap ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    """A run on two regions of two channels, and its data."""
    root = tmp_path_factory.mktemp("brats") / "set"
    data_set(root, {"background": 0, "whole": [1, 2], "core": [2]}, "MR", channels=2)
    options = {"model": "swin_unetr3d", "variant": "mini", "weights": "none", "data": [str(root)]}
    options |= {"size": list(SIZE), "spacing": [4.0, 4.0, 4.0], "intensity": ["zscore"]}
    options |= {"workers": 0, "overlap": 0.0, "out": str(root.parent / "run"), "epochs": 1}
    options |= {"crops_per_volume": 1, "cache": str(root.parent / "cache"), "eval_every": 1}
    summary = train.run(train.Options(**options))
    return SimpleNamespace(root=root, out=root.parent / "run", summary=summary)


def test_regions_are_scored_each_and_predicted_to_a_file_each(brats, tmp_path, monkeypatch, capsys):
    arguments = ["--weights", brats.out, "--out", tmp_path / "p", "--overlap", 0]
    arguments += ["--probabilities", "--overlays", brats.root]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    truth = np.asarray(nibabel.load(brats.root / "labelsTr/case2.nii.gz").dataobj)
    scores = {row["class"]: row for row in rows(brats.out / "test/per_image.csv")}
    for name, numbers in ("whole", [1, 2]), ("core", [2]):
        p = np.asarray(nibabel.load(tmp_path / "p" / f"case2_{name}.nii.gz").dataobj) == 1
        t = np.isin(truth, numbers)
        assert (
            int(scores[name]["tp"]) == (p & t).sum() and int(scores[name]["fp"]) == (p & ~t).sum()
        )
    assert (tmp_path / "p/case2_probability.nii.gz").is_file()
    assert not (tmp_path / "p/case2.nii.gz").exists()
    assert not (tmp_path / "p/classes.json").exists()  # each file holds 0 and 1


def test_one_region_alone_is_binary_in_scores(tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "set", {"background": 0, "whole": [1, 2]})
    arguments = trained(root, tmp_path / "run", "--epochs", 1)
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    (row,) = rows(tmp_path / "run/test/per_image.csv")
    assert row["class"] == "whole"


def test_regions_are_not_pooled_with_classes_that_exclude_each_other(
    brats, tmp_path, monkeypatch, capsys
):
    labels = {"background": 0, "whole": 1, "core": 2}
    root = data_set(tmp_path / "other", labels, "MR", channels=2)
    arguments = trained(brats.root, tmp_path / "run", "--epochs", 1, "--intensity", "zscore")
    arguments.insert(arguments.index("--data") + 1, root)
    assert "pool like with like" in refused(monkeypatch, capsys, train, *arguments)


def test_channels_of_the_command_line_are_sorted(brats, tmp_path, monkeypatch, capsys):
    image = nibabel.load(brats.root / "imagesTr/case0.nii.gz")
    array = np.asarray(image.dataobj) * np.array([1, -2], np.int16)
    for k in range(2):
        nibabel.save(
            nibabel.Nifti1Image(array[..., k], image.affine), tmp_path / f"c_000{k}.nii.gz"
        )
    nibabel.save(nibabel.Nifti1Image(array, image.affine), tmp_path / "whole.nii.gz")
    arguments = ["--weights", brats.out, "--out", tmp_path / "p", "--overlap", 0, "--probabilities"]
    names = "c_0001.nii.gz", "whole.nii.gz", "c_0000.nii.gz"
    code, _, error = command(
        monkeypatch, capsys, predict, *arguments, *(tmp_path / x for x in names)
    )
    assert code == 0, error
    one, other = (np.asarray(nibabel.load(tmp_path / f"p/{x}_probability.nii.gz").dataobj)
                  for x in ("c", "whole"))  # fmt: skip
    assert np.array_equal(one, other)


# --- weights alone, components, options of the run -----------------------------------------------


def test_a_bare_file_of_weights_numbers_its_classes(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.safetensors").write_bytes((run.out / "best.safetensors").read_bytes())
    arguments = ["--weights", tmp_path / "weights.safetensors"]  # NIfTI tells the model
    arguments += ["--out", tmp_path / "p", run.root / "imagesTr/case0.nii.gz", "--overlap", 0]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    names = json.loads((tmp_path / "p/classes.json").read_text())
    assert names == {"0": "class 0", "1": "class 1", "2": "class 2"}


def test_only_the_largest_component_of_each_class_is_left(run, tmp_path, monkeypatch, capsys):
    for out, more in ("all", []), ("largest", ["--largest-component"]):
        arguments = ["--weights", run.out, "--out", tmp_path / out, run.root, *more]
        code, _, error = command(monkeypatch, capsys, predict, *arguments)
        assert code == 0, error
    every, largest = (np.asarray(nibabel.load(tmp_path / out / "case2.nii.gz").dataobj)
                      for out in ("all", "largest"))  # fmt: skip
    around = np.ones((3, 3, 3))
    assert max(ndimage.label(every == k, around)[1] for k in (1, 2)) > 1  # it is not idle
    for k in (1, 2):
        parts, n = ndimage.label(every == k, around)
        sizes = np.bincount(parts.ravel())[1:]
        expected = parts == 1 + sizes.argmax() if n else parts == 1
        assert np.array_equal(largest == k, expected)


@pytest.mark.parametrize("idle", ["--crops-per-volume", "--eval-every"])
def test_a_test_does_not_take_what_is_of_training(run, tmp_path, idle, monkeypatch, capsys):
    arguments = ["--weights", run.out, "--eval", "--test", run.root, "--out", tmp_path / "e"]
    error = refused(monkeypatch, capsys, train, *arguments, idle, 2)
    assert "has no effect with these options" in error


def test_a_test_of_a_run_slides_windows_as_the_run_did(run, tmp_path, monkeypatch, capsys):
    arguments = ["--weights", run.out, "--eval", "--test", run.root, "--out", tmp_path / "e"]
    arguments += ["--workers", 0, "--overlays", 0, "--cache", run.root.parent / "cache"]
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0 and "overlap=0.0" in text, error
    found = json.loads((tmp_path / "e/test/summary.json").read_text())["tests"]["set"]["dice"]
    assert found["mean"] == run.summary["tests"]["set"]["dice"]["mean"]


# --- pictures ------------------------------------------------------------------------------------


def test_three_planes_lie_as_radiologists_look():
    """One voxel marked: to the right, in front and on top of the middle of 5 x 4 x 3 voxels."""
    x = np.zeros((5, 4, 3), np.uint8)
    x[3, 2, 1] = 9
    page = pictures.three_planes(x, (3, 2, 1), (1.0, 1.0, 2.0))
    assert page.shape == (6, 5 + 5 + 4)  # axial 4 x 5, coronal and sagittal 3 * 2 high
    axial, coronal, sagittal = page[:, :5], page[:, 5:10], page[:, 10:]
    assert np.argwhere(axial).tolist() == [[1, 1]]  # front is up, the patient's right on the left
    assert np.argwhere(coronal).tolist() == [[2, 1], [3, 1]]  # head is up
    assert np.argwhere(sagittal).tolist() == [[2, 1], [3, 1]]  # front is on the left


def test_the_planes_are_those_with_most_of_the_truth():
    image = np.zeros((6, 6, 6), np.uint8)
    image[2, 3, 4] = 255
    truth = np.zeros((1, 6, 6, 6), bool)
    truth[0, 2, 1:5, 4], truth[0, 1:4, 3, 4], truth[0, 2, 3, 3:6] = True, True, True
    picture = np.asarray(pictures.volume_thumbnail(image, truth, np.zeros_like(truth), (1, 1, 1)))
    assert picture.shape == (6, 18, 3)
    for plane in np.split(picture, 3, 1):  # each holds the bright voxel, now the truth's rim
        assert (plane == pictures.GROUND_TRUTH).all(2).any()


# --- what is refused -----------------------------------------------------------------------------


def refused(monkeypatch, capsys, module, *arguments):
    code, _, error = command(monkeypatch, capsys, module, *arguments)
    assert code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    "how, message",
    [
        ({"modality": "MR"}, "--intensity zscore"),
        ({"labels": {"0": "background", "1": "left kidney"}}, "holds 2"),
    ],
)
def test_data_that_does_not_fit(tmp_path, how, message, monkeypatch, capsys):
    root = data_set(tmp_path / "set", **how)
    arguments = trained(root, tmp_path / "run", "--epochs", 1)
    assert message in refused(monkeypatch, capsys, train, *arguments)


def test_another_number_of_channels(run, tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "two", channels=2)
    arguments = ["--weights", run.out, "--eval", "--test", root, "--out", tmp_path / "e"]
    assert "2 channels, the model takes 1" in refused(monkeypatch, capsys, train, *arguments)
    arguments = ["--weights", run.out, "--out", tmp_path / "p", root / "imagesTr"]
    assert "2 channels, the model takes 1" in refused(monkeypatch, capsys, predict, *arguments)
    assert not (tmp_path / "p").exists()


def test_other_classes_than_trained(run, tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "set", ORGANS | {"2": "spleen"})
    arguments = ["--weights", run.out, "--eval", "--test", root, "--out", tmp_path / "e"]
    assert "trained on background, left kidney" in refused(monkeypatch, capsys, train, *arguments)


def test_classes_in_another_order_than_a_released_file_s(tmp_path, monkeypatch, capsys):
    """As many, but FLARE's liver has the number of BTCV's spleen."""
    file = tmp_path / "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt"
    config = replace(swin_unetr3d.VARIANTS["tiny"], image_size=(64,) * 3)
    torch.manual_seed(0)
    state = swin_unetr3d.to_official(swin_unetr3d.SwinUNETR(config).state_dict())
    torch.save({"state_dict": state}, file)
    names = swin_unetr3d.BTCV["classes"]
    orders = {"same": names, "mine": [f"x{name}" for name in names], "flare": [*names]}
    orders["flare"][1], orders["flare"][6] = names[6], names[1]
    model, settings = FAMILIES["swin_unetr3d"], swin_unetr3d_recipes.SWIN["default"]
    for name, order in orders.items():
        entries = [SimpleNamespace(regions=None, classes=tuple(order), root=name, modality="CT")]
        some = SimpleNamespace(entries=entries, classes=tuple(order))
        loaded = model.load(file, None, settings, {}, None)
        how = SimpleNamespace(weights=file, eval=True, threshold=None)
        check = model.check_classes
        if name == "flare":
            with pytest.raises(
                ValueError, match="flare: has background, liver, .* different classes"
            ):
                check(loaded, [some], how)
        else:
            check(loaded, [some], how)
        capsys.readouterr()
        trained = model.load(file, None, settings, {}, some)
        told = "the head of background, spleen" in capsys.readouterr().out
        assert told == (name == "flare") and trained.config.classes == tuple(order)


def test_images_for_a_model_of_volumes_and_the_reverse(run, tmp_path, monkeypatch, capsys):
    arguments = ["--model", "segformer", "--weights", "none", "--data", run.root]
    arguments += ["--out", tmp_path / "r"]
    assert "holds volumes, but segformer takes images" in refused(
        monkeypatch, capsys, train, *arguments
    )


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("segformer", ["--crops-per-volume", 2], "segformer takes images"),
        ("segformer", ["--size", 64, 64, 64], "one number"),
        ("swin_unetr3d", ["--size", 64, 64], "of volumes three"),
        ("swin_unetr3d", ["--views", "original"], "takes volumes"),
        ("swin_unetr3d", ["--score-size", "network"], "own grid"),
        ("swin_unetr3d", ["--schedule", "plateau"], "--schedule plateau"),
        ("swin_unetr3d", ["--intensity", 250, -175], "the lower first"),
        ("swin_unetr3d", ["--overlap", 1], "below 1"),
        ("swin_unetr3d", ["--spacing", 1, 1, 0], "above 0"),
        ("swin_unetr3d", ["--spacing", "nan", 1, 1], "above 0"),
        ("swin_unetr3d", ["--intensity", "nan", 250], "the lower first"),
        ("swin_unetr3d", ["--crop-ratio", 1, 1, 1, 1], "4 ratios"),
        ("swin_unetr3d", ["--crop-ratio", 1], "--crop-ratio"),
        ("swin_unetr3d", ["--crop-ratio", -1, 2], "--crop-ratio"),
        ("swin_unetr3d", ["--crop-ratio", 0, 0], "--crop-ratio"),
        ("swin_unetr3d", ["--size", 50, 64, 64], "multiples of 32"),
        ("swin_unetr3d", ["--size", 32], "multiples of 32"),
        ("swin_unetr3d", ["--size", 0], "--size 0: must be a whole number of at least 1"),
        ("swin_unetr3d", ["--overfit", 1, "--fold", "0/2"], "--overfit"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, model, arguments, message, monkeypatch, capsys):
    given = ["--model", model, "--weights", "none", "--data", run.root, "--out", tmp_path / "r"]
    given += ["--variant", "mini", "--cache", tmp_path / "cache", "--workers", 0, *arguments]
    assert message in refused(monkeypatch, capsys, train, *given)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "liver"], "--prompt"),
        (["--boxes", "none.csv"], "--boxes"),
        (["--window-batch", 0], "at least 1"),
        (["--overlap", 1], "below 1"),
        (["--threshold", 0.4], "the most probable"),
    ],
)
def test_what_a_prediction_does_not_take(run, tmp_path, arguments, message, monkeypatch, capsys):
    given = ["--weights", run.out, "--out", tmp_path / "p", run.root, *arguments]
    assert message in refused(monkeypatch, capsys, predict, *given)
    assert not (tmp_path / "p").exists()


def test_check_reads_the_set_that_was_trained_on(run, monkeypatch, capsys):
    code, text, error = command(monkeypatch, capsys, prepare, "check", run.root)
    assert code == 0 and not error and "errors: none\nwarnings: none\n" in text


def set_lists(root, **lists):
    """Replace lists of dataset.json by cases of these names."""
    settings = json.loads((root / "dataset.json").read_text())
    for key, names in lists.items():
        pairs = [{k: f"./{k}sTr/{x}.nii.gz" for k in ("image", "label")} for x in names]
        settings[key] = pairs
    (root / "dataset.json").write_text(json.dumps(settings))


def lines_of(text, words):
    return [line for line in text.splitlines() if words in line]


def test_volumes_in_two_splits_are_a_line(tmp_path, monkeypatch, capsys):
    root = data_set(tmp_path / "set", n=4)
    for kind in "imagesTr", "labelsTr":  # the voxels of case0 under another name, another header
        volume = nibabel.load(root / kind / "case0.nii.gz")
        volume.header["descrip"] = b"copy"
        nibabel.save(volume, root / kind / "other.nii.gz")
    lists = {"training": ["case0", "case1", "case3"], "validation": ["case1", "case2"]}
    set_lists(root, **lists, test=["other", "case2"])
    arguments = trained(root, tmp_path / "run", "--epochs", 1)
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error  # training goes on
    (line,) = lines_of(text, "in two splits")
    assert line.startswith(
        "3 volumes are in two splits: case1 (train and val), case0 (train) is other (test), "
        "case2 (val and test); "
    )
    assert line in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "case1 (train and val)"),
        ({"fold": "0/2"}, "case1 (train and val)"),
        ({"eval": True}, None),  # nothing is trained
        ({"overfit": 1}, None),
        ({"val": ["case2"]}, None),
        ({"val": ["case2"], "test": ["ROOT:val"]}, None),
        ({"val": ["case2"], "test": ["ROOT:train"]}, None),
        ({"val": ["case2"], "test": ["COPY:val"]}, "case2 (val) is case9 (test)"),
        ({"val": ["case2"], "data": ["ROOT", "ROOT"], "test": ["ROOT"]}, None),
        ({"val": ["case2"], "fold": "1/3"}, None),
        ({"val": []}, None),  # a part of train validates
    ],
)
def test_what_is_in_two_splits_on_purpose_is_not_said(tmp_path, capsys, options, names):
    root = data_set(tmp_path / "set", n=4)
    options = dict(options)
    val = options.pop("val", ["case1", "case2"])
    set_lists(root, training=["case0", "case1"], validation=val, test=["case3"])
    if options.get("fold") == "0/2":  # which leaves the repeated case in both
        folds = [{"train": ["case0", "case1"], "val": ["case1", "case2"]}] * 2
        (root / "splits_final.json").write_text(json.dumps(folds))
    copied = tmp_path / "copy"  # the same voxels in another data set
    shutil.copytree(root, copied)
    for kind in "imagesTr", "labelsTr":
        (copied / kind / "case2.nii.gz").rename(copied / kind / "case9.nii.gz")
    set_lists(copied, training=["case3"], validation=["case9"], test=["case3"])
    places = {"ROOT": str(root), "COPY": str(copied)}
    for key in "data", "test":
        for name, path in places.items():
            if key in options:
                options[key] = [place.replace(name, path) for place in options[key]]
    options = train.Options(**{"model": "swin_unetr3d", "data": [str(root)], "seed": 0} | options)
    opened = runs.open_data(options, FAMILIES["swin_unetr3d"])
    for some in opened.parts, opened.tests:
        for name, dataset in some.items():
            some[name] = dataset.prepared((4, 4, 4), torch.sigmoid, 1, tmp_path / "cache")
    capsys.readouterr()
    runs.check_prepared(opened, options)
    found = lines_of(capsys.readouterr().out, "in two splits")
    assert len(found) == (names is not None)
    assert names is None or f"volume is in two splits: {names}; scores" in found[0]


def test_label_maps_of_0_and_255(tmp_path, monkeypatch, capsys):
    """An empty prediction would have a Dice of 1 on each."""
    root = data_set(tmp_path / "set", {"0": "background", "1": "lesion"})
    names = sorted((root / "labelsTr").iterdir())
    for file in names:
        labels = nibabel.load(file)
        values = (np.asarray(labels.dataobj) > 0).astype(np.uint8)
        values *= 255 if file == names[2] else 1
        nibabel.save(nibabel.Nifti1Image(values, labels.affine), file)
    arguments = trained(root, tmp_path / "some", "--epochs", 1)
    set_lists(root, test=["case1", "case2"])
    error = refused(monkeypatch, capsys, train, *arguments)
    assert "case2.nii.gz: 1 of 3 label maps hold 0 and 255 alone" in error


def test_years_are_not_channels(brats, tmp_path, monkeypatch, capsys):
    image = nibabel.load(brats.root / "imagesTr/case0.nii.gz")
    (tmp_path / "in").mkdir()
    for year in 2018, 2019:  # as many as the model has channels
        channel = np.asarray(image.dataobj)[..., 0]
        file = tmp_path / f"in/mueller_{year}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(channel, image.affine), file)
    arguments = ["--weights", brats.out, "--out", tmp_path / "p", tmp_path / "in"]
    error = refused(monkeypatch, capsys, predict, *arguments)
    assert "mueller_2018.nii.gz: 1 channels, the model takes 2" in error
    assert not (tmp_path / "p").exists()


def test_a_header_that_contradicts_itself_changes_no_prediction(run, tmp_path, monkeypatch, capsys):
    """A bare sform, and metres: predicted as the right file, on a grid that nibabel reads alike."""
    original = nibabel.load(run.root / "imagesTr/case0.nii.gz")
    stored = np.asarray(original.dataobj)
    files = [tmp_path / f"{name}.nii.gz" for name in ("right", "bare", "metres")]
    nibabel.save(nibabel.Nifti1Image(stored, AFFINE), files[0])
    bare = nibabel.Nifti1Image(stored, AFFINE)
    bare.set_qform(AFFINE, 1), bare.set_sform(np.eye(4), 2)
    nibabel.save(bare, files[1])
    metres = nibabel.Nifti1Image(stored, np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE)
    metres.header.set_xyzt_units("meter")
    nibabel.save(metres, files[2])
    arguments = ["--weights", run.out, "--out", tmp_path / "p", "--overlap", 0]
    code, text, error = command(monkeypatch, capsys, predict, *arguments, *files)
    assert code == 0, error
    written = [nibabel.load(tmp_path / "p" / file.name) for file in files]
    for volume in written:
        assert np.array_equal(np.asarray(volume.dataobj), np.asarray(written[0].dataobj))
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
        np.testing.assert_allclose(volume.header["pixdim"][1:4], [4, 4.2, 5], rtol=1e-6)
    (line,) = lines_of(text, "the qform is used, and written as sform")
    assert line.startswith(f"{files[1]} (4 x 4.2 x 5 mm): ")
    (line,) = lines_of(text, "the header's unit is the metre; read and written in mm")
    assert line.startswith(f"{files[2]} (4 x 4.2 x 5 mm): ")


def test_ct_that_lost_its_intercept_is_said(run, tmp_path, monkeypatch, capsys):
    original = nibabel.load(run.root / "imagesTr/case0.nii.gz")
    for k in range(4):
        lifted = (np.asarray(original.dataobj) + 1024).clip(0).astype(np.uint16)
        nibabel.save(nibabel.Nifti1Image(lifted, AFFINE), tmp_path / f"{k}.nii.gz")
    nibabel.save(original, tmp_path / "right.nii.gz")
    arguments = ["--weights", run.out, "--out", tmp_path / "p", "--overlap", 0, tmp_path]
    code, text, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    (line,) = lines_of(text, "Hounsfield units")
    assert "0.nii.gz (values " in line and " and 1 more: " in line and "right" not in line


@pytest.mark.parametrize("kind", ["imagesTr", "labelsTr"])
def test_a_damaged_file_trains_and_predicts_nothing(run, tmp_path, kind, monkeypatch, capsys):
    root = data_set(tmp_path / "set")
    file = root / kind / "case0.nii.gz"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # of the checksum or length: no voxel changes
    file.write_bytes(data)
    arguments = trained(root, tmp_path / "run", "--epochs", 1)
    error = refused(monkeypatch, capsys, train, *arguments)
    assert f"{file}: " in error and "replace the file" in error
    arguments = ["--weights", run.out, "--out", tmp_path / "p", "--overlap", 0, file]
    error = refused(monkeypatch, capsys, predict, *arguments)
    assert f"{file}: " in error and "replace the file" in error
    assert not list((tmp_path / "p").glob("*.nii.gz"))


def test_a_hidden_file_of_macos_and_a_cut_one(run, tmp_path, monkeypatch, capsys):
    whole = (run.root / "imagesTr/case0.nii.gz").read_bytes()
    (tmp_path / "._a.nii.gz").write_bytes(b"\0" * 100)
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    arguments = ["--weights", run.out, "--out", tmp_path / "p"]
    error = refused(monkeypatch, capsys, predict, *arguments, tmp_path / "._a.nii.gz")
    assert "macOS" in error
    error = refused(monkeypatch, capsys, predict, *arguments, tmp_path)  # without ._a
    assert "cut.nii.gz" in error and "replace the file" in error


def test_healthy_patients_validate_and_a_test_without_labels_is_left_out(
    tmp_path, monkeypatch, capsys
):
    root = data_set(tmp_path / "set", {"0": "background", "1": "lesion"}, n=4)
    for k in range(4):
        path = root / f"labelsTr/case{k}.nii.gz"
        labels = np.asarray(nibabel.load(path).dataobj)
        write(path, (labels == 1).astype(np.uint8) * (k == 0), AFFINE)
    set_lists(root, test=["case2", "case3"])
    arguments = trained(root, tmp_path / "run", "--epochs", 1, "--threshold", "auto")
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    lines = lines_of(text, "the ground truth of")
    assert "of val is empty in its only case, " in lines[0]
    assert "of test set is empty in all 2 cases, " in lines[1]
    summary = json.loads((tmp_path / "run/test/summary.json").read_text())["tests"]["set"]
    assert summary["empty_images"] == 2
    assert summary["image_specificity"] == 1 - summary["false_alarms"] / 2

    (root / "labelsTr/case3.nii.gz").unlink()
    arguments = trained(root, tmp_path / "again", "--epochs", 1)
    code, text, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    (line,) = lines_of(text, "missing")
    assert line.startswith("test set is left out, training continues without it: ")
    assert "1 file is missing: " in line and text.index(line) < text.index("train: ")
    assert not (tmp_path / "again/test").exists()
    arguments = ["--weights", tmp_path / "again", "--eval", "--test", root, "--out", tmp_path / "e"]
    assert "1 file is missing: " in refused(monkeypatch, capsys, train, *arguments)
    (root / "imagesTr/case0.nii.gz").unlink()
    arguments = trained(root, tmp_path / "none", "--epochs", 1)
    assert "1 file is missing: " in refused(monkeypatch, capsys, train, *arguments)
