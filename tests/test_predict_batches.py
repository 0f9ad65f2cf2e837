"""predict.py on folders: bad inputs, existing files, subfolders, runs without best weights."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import assert_same_scores, contents, write_run
from PIL import Image
from small_runs import called

import predict
import sam_decoder
import segformer
import swin_unetr3d
import train
from imaging import image_files, layouts, pictures
from prediction.inputs import group_channels
from prediction.outputs import Batch, check_outputs
from prediction.volumes import class_endings
from recipes import FAMILIES, loading

AFFINE = np.diag([4.0, 4.2, 5.0, 1])


def class_run(folder, names=("background", "one", "two"), seed=0):
    """A run of a SegFormer with these classes."""
    torch.manual_seed(seed)
    config = replace(segformer.VARIANTS["mini"], num_classes=len(names), image_size=64)
    model = segformer.SegFormer(config)
    return write_run(folder, segformer.SegFormer, model.state_dict(), config, classes=list(names))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return class_run(tmp_path_factory.mktemp("images") / "run")


def photo(path, seed=0, size=(40, 50)):
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for k, name in enumerate(("a.png", "b.jpg", "g/a.png", "g/h/c.bmp")):
        photo(folder / name, seed=k)
    return folder


# --- bad inputs -----------------------------------------------------------------------------------


def test_broken_photos_are_listed_and_the_rest_is_done(run, photos, tmp_path, monkeypatch, capsys):
    given = ["--weights", run, photos]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "expected")
    expected = contents(tmp_path / "expected")

    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[:500])
    page = Image.new("L", (40, 50))
    page.save(photos / "stack.tif", save_all=True, append_images=[page])
    os.symlink(tmp_path / "nowhere.png", photos / "lost.png")
    out = tmp_path / "out"
    said, error = called(monkeypatch, capsys, *given, "--out", out, status=1)
    assert "3 masks in" in said
    first, *lines = error.splitlines()
    assert first.startswith("error: 3 of 6 images could not be predicted; ")
    assert "--skip-existing" in first
    for line, name in zip(lines, ("a.png", "lost.png", "stack.tif"), strict=True):
        assert line.startswith(f"  {photos / name}")
    assert "not readable as an image" in lines[0] and "2 pages" in lines[2]
    without = [line for line in expected["measurements.csv"].splitlines() if line[:2] != b"a,"]
    table = b"\r\n".join([*without, b""])
    assert contents(out) == {
        name: file for name, file in (expected | {"measurements.csv": table}).items()
        if name != "a.png"
    }  # fmt: skip

    # The same call goes on with --skip-existing alone.
    (photos / "stack.tif").unlink()
    (photos / "lost.png").unlink()
    (photos / "a.png").write_bytes(whole)
    _, error = called(monkeypatch, capsys, *given, "--out", out, status=2)
    assert "exists already" in error and "--skip-existing" in error
    said, _ = called(monkeypatch, capsys, *given, "--out", out, "--skip-existing")
    assert "3 of 4 images are predicted already" in said and "1 masks in" in said
    assert contents(out) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_without_any_good_input_nothing_is_written(count, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for k in range(count):
        (tmp_path / f"in/{k}.png").write_bytes(b"no image")
    given = ["--weights", run, tmp_path / "in", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "0.png: not readable as an image" in error
    assert ("none of 3 images could be predicted" in error) == (count == 3)
    assert not (tmp_path / "out").exists()


def test_many_bad_inputs_are_counted(run, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "in/good.png")
    for k in range(25):
        (tmp_path / f"in/{k}.png").write_bytes(b"no image")
    given = ["--weights", run, tmp_path / "in", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=1)
    lines = error.splitlines()
    assert "25 of 26 images" in lines[0] and lines[-1] == "  and 5 more" and len(lines) == 22


def test_an_input_too_large_for_the_memory_is_a_bad_one(run, photos, tmp_path, monkeypatch, capsys):
    load_image = image_files.load_image

    def load(path):
        if path.name == "b.jpg":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
        return load_image(path)

    monkeypatch.setattr(image_files, "load_image", load)
    given = ["--weights", run, photos, "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=1)
    assert error.splitlines()[1:] == ["  b: does not fit into memory"]


@pytest.mark.parametrize("how", ["full", "gone"])
def test_an_output_folder_that_fails_ends_the_call(how, run, photos, tmp_path, monkeypatch, capsys):
    given = ["--weights", run, photos]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    save = pictures.save_picture

    def fail(path, picture):
        if path.name == "b.png" and how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, picture)
        if path.name == "a.png" and how == "gone":
            shutil.rmtree(out)

    monkeypatch.setattr(pictures, "save_picture", fail)
    _, error = called(monkeypatch, capsys, *given, "--out", out, status=2)
    reason = {
        "full": "b.png could not be written (No space left on device): free some space; ",
        "gone": f": cannot be written (the folder {out} is gone); ",
    }[how]
    assert reason in error and "--skip-existing" in error
    assert out.exists() == (how == "full")

    monkeypatch.setattr(pictures, "save_picture", save)
    called(monkeypatch, capsys, *given, "--out", out, "--skip-existing")
    assert contents(out) == contents(tmp_path / "expected")


def test_a_broken_ground_truth_is_of_its_image_alone(run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    for k in range(3):
        photo(root / f"test/images/{k}.png", seed=k)
        (root / "test/masks").mkdir(exist_ok=True)
        mask = np.full((40, 50), k, np.uint8)
        Image.fromarray(mask).save(root / f"test/masks/{k}.png")
    names = {"0": "background", "1": "one", "2": "two"}
    (root / "classes.json").write_text(json.dumps(names))
    (root / "test/masks/1.png").write_bytes(b"no image")
    given = ["--weights", run, root, "--out", tmp_path / "out", "--overlays"]
    _, error = called(monkeypatch, capsys, *given, status=1)
    assert "1 of 3 images" in error and "masks/1.png: not readable" in error
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"classes.json", "legend.png", "0.png", "0_overlay.png", "2.png",
                       "2_overlay.png", "measurements.csv"}  # fmt: skip


def test_a_broken_image_does_not_keep_sam_from_the_others(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = replace(sam_decoder.VARIANTS["mini"], image_size=64)
    state = sam_decoder.SAM(config).state_dict()
    weights = write_run(tmp_path / "run", sam_decoder.SAM, state, config)
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/g/a.png", seed=1)
    (tmp_path / "in/b.png").write_bytes(b"no image")
    sheet = "image,x0,y0,x1,y1\n./a.png,2,2,20,20\nb.png,1,1,9,9\ng/a.png,3,3,9,9\n"
    (tmp_path / "boxes.csv").write_text(sheet)
    given = ["--weights", weights, tmp_path / "in", "--boxes", tmp_path / "boxes.csv"]
    _, error = called(monkeypatch, capsys, *given, "--out", tmp_path / "out", status=1)
    assert "1 of 3 images" in error and "b.png: not readable" in error
    assert {*contents(tmp_path / "out")} == {"a.png", "g/a.png", "measurements.csv"}


# --- what exists already --------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", [-1, 10])
def test_a_call_continues_wherever_it_was_killed(
    save_every, run, photos, tmp_path, monkeypatch, capsys
):
    """With save_every -1 the measurements are written after each case, else at the end."""
    monkeypatch.setattr(Batch, "SAVE_EVERY", save_every)
    given = ["--weights", run, photos, "--overlays", "--probabilities"]
    whole = tmp_path / "expected"
    order = []  # of the files, and their content
    rename = os.replace

    def record(source, target):
        order.append((target, source.read_bytes()))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", record)
        called(monkeypatch, capsys, *given, "--out", whole)
    expected = contents(whole)
    tables = 4 if save_every < 0 else 1
    assert len(expected) == 15 and len(order) == 14 + tables

    for count in range(len(order) + 1):
        out = tmp_path / str(count)
        for path, content in order[:count]:
            copy = out / path.relative_to(whole)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        out.mkdir(exist_ok=True)
        (out / ".lock").touch()
        if count < len(order):  # what a kill leaves of the file that was being written
            path = out / order[count][0].relative_to(whole)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0123abcd").write_bytes(b"half")
        said, _ = called(monkeypatch, capsys, *given, "--out", out, "--skip-existing")
        assert contents(out) == expected
        done = sum(path.name == "measurements.csv" for path, _ in order[:count])
        done = 4 if tables == done else done
        assert f"{4 - done} masks in" in said  # the measurements are the last thing of a case


def test_nothing_of_another_model_is_continued(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    called(monkeypatch, capsys, "--weights", run, photos / "a.png", "--out", out)
    other = class_run(tmp_path / "other", ("background", "two", "one"))
    given = ["--weights", other, photos, "--out", out, "--skip-existing"]
    before = contents(out)
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "of other classes; choose another --out" in error
    assert contents(out) == before
    (out / "classes.json").unlink()
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "legend.png: is of other classes" in error


def test_existing_files_stay_as_they_are(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    called(monkeypatch, capsys, "--weights", run, photos / "a.png", "--out", out)
    before = contents(out)
    given = ["--weights", run, photos / "a.png", "--out", out, "--skip-existing", "--overlays"]
    said, _ = called(monkeypatch, capsys, *given)
    assert "1 masks in" in said
    added = {"a_overlay.png": (out / "a_overlay.png").read_bytes()}
    assert contents(out) == before | added
    (out / "a.png").unlink()
    (out / "a.png").mkdir()
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "a.png exists already and is not overwritten" in error


def test_outputs_that_cannot_be_are_known_before(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "g").write_text("a file")
    with pytest.raises(ValueError, match="g: is no folder"):
        check_outputs([out / "a.png", out / "g/h/a.png"], out)
    with pytest.raises(ValueError, match="too long for a file"):
        check_outputs([out / f"{'ä' * 121}.png"], out)
    check_outputs([out / f"{'ä' * 120}.png"], out)


def started(arguments) -> int:
    """Run predict.py in a process of its own, without the seconds that imports take; its number."""
    number = os.fork()
    if number:
        return number
    status = 9
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["predict.py", *map(str, arguments)]
        status = predict.main()
    finally:
        os._exit(status)


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_nothing_behind(run, tmp_path):
    for k in range(12):
        photo(tmp_path / f"photos/{k % 3}/{k}.png", seed=k, size=(300, 300))
    given = ["--weights", run, tmp_path / "photos", "--overlays", "--probabilities"]
    given += ["--device", "cpu", "--skip-existing", "--out"]
    begin = time.time()
    assert os.waitpid(started([*given, tmp_path / "expected"]), 0)[1] == 0
    seconds = time.time() - begin
    expected = contents(tmp_path / "expected")
    assert len(expected) == 39
    moments = random.Random(0)
    for k in range(20):
        number = started([*given, tmp_path / f"{k}"])
        time.sleep(moments.random() * seconds)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        assert os.waitpid(started([*given, tmp_path / f"{k}"]), 0)[1] == 0
        assert contents(tmp_path / f"{k}") == expected


# --- what is listed -------------------------------------------------------------------------------


def test_sub_folders_are_mirrored_and_the_rest_is_counted(
    run, photos, tmp_path, monkeypatch, capsys
):
    for name in ("._a.png", ".DS_Store", "g/._c.bmp", ".thumbs/t.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"\0")
    for name in ("notes.txt", "g/scan.dcm", "g/README"):
        (photos / name).write_bytes(b"\0")
    os.symlink("..", photos / "g/up")  # a loop
    photo(tmp_path / "elsewhere/z.png")
    os.symlink(tmp_path / "elsewhere", photos / "link")
    out = photos / "out"
    given = ["--weights", run, photos, "--out", out]
    said, _ = called(monkeypatch, capsys, *given)
    assert "skipped files that are not images: 1 without an ending, 1 .dcm, 1 .txt" in said
    names = {"a.png", "b.png", "g/a.png", "g/h/c.png", "link/z.png"}
    assert {*contents(out)} == names | {"classes.json", "legend.png", "measurements.csv"}
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")  # masks are no input
    assert "5 of 5 images are predicted already" in said
    _, error = called(monkeypatch, capsys, "--weights", run, photos, "--out", photos, status=2)
    assert "is an input and --out" in error


def test_files_below_a_folder(tmp_path, capsys):
    for name in (
        "b/x.png",
        "b/c/y.png",
        "a.png",
        "set/images/i.png",
        "set/masks/i.png",
        "masks/m.png",
    ):
        photo(tmp_path / name)
    os.symlink(tmp_path, tmp_path / "b/c/top")
    os.symlink(tmp_path / "b", tmp_path / "copy")
    found = [path.relative_to(tmp_path).as_posix() for path in layouts.files_below(tmp_path)]
    assert found == ["a.png", "b/c/y.png", "b/x.png", "copy/c/y.png", "copy/x.png", "masks/m.png",
                     "set/images/i.png"]  # fmt: skip
    assert "set/masks: skipped, it holds the masks of images/" in capsys.readouterr().out
    os.mkfifo(tmp_path / "b/pipe.png")
    files = layouts.list_files(tmp_path / "b", "image", without=tmp_path / "b/c")
    assert files == [tmp_path / "b/x.png"]
    assert "skipped files that are not images: 1 pipe or device" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="no volumes in this folder, only 1 .png; volumes end in .nii"
    ):
        layouts.list_files(tmp_path / "masks", "volume")


def test_a_pipe_is_no_input(run, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    given = ["--weights", run, tmp_path / "pipe.png", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "pipe.png: is neither a file nor a folder" in error


def test_images_and_masks_alone_are_predicted_whole(run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "flat"
    for k in range(12):
        photo(root / f"images/{k}.png", seed=k, size=(8, 9))
        photo(root / f"masks/{k}.png", size=(8, 9))
    photo(root / "images/g/new.jpg")  # which has no mask
    (root / "images/._1.png").write_bytes(b"\0")
    given = ["--weights", run, root]
    said, _ = called(monkeypatch, capsys, *given, "--out", tmp_path / "all")
    assert f"{root}: all 13 images; --split test" in said and "13 masks in" in said
    assert (tmp_path / "all/g/new.png").is_file()
    shutil.rmtree(root / "images/g")
    said, _ = called(monkeypatch, capsys, *given, "--out", tmp_path / "test", "--split", "test")
    assert f"{root}: 2 cases of its split test" in said and "2 masks in" in said

    for split in ("train", "test"):
        shutil.copytree(root, tmp_path / "divided" / split)
    (tmp_path / "divided/test/images/0.png").unlink()
    (tmp_path / "divided/test/masks/0.png").unlink()
    given = ["--weights", run, tmp_path / "divided", "--out", tmp_path / "d"]
    said, _ = called(monkeypatch, capsys, *given)
    assert "11 cases of its split test" in said and "11 masks in" in said
    given = ["--weights", run, root / "images", "--split", "test", "--out", tmp_path / "no"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "--split: none of the inputs is a data set; remove it" in error


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_split_without_masks_is_predicted(with_folder, run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    for split in ("train", "test"):
        photo(root / split / "images/1.png", size=(8, 9))
    photo(root / "train/masks/1.png", size=(8, 9))
    if with_folder:
        (root / "test/masks").mkdir()
    given = ["--weights", run, root, "--out", tmp_path / "out", "--overlays"]
    said, _ = called(monkeypatch, capsys, *given)
    assert f"{root}: 1 cases of its split test" in said and "1 masks in" in said
    assert (tmp_path / "out/1_overlay.png").is_file()


def test_a_hidden_file_is_no_split(tmp_path):
    (tmp_path / "anns").mkdir()
    for name in ("test.json", "._test.json", ".json"):
        (tmp_path / "anns" / name).write_text("[]")
    assert {*layouts.find_splits(tmp_path)} == {"test"}


def test_an_empty_split_is_said(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "set/anns").mkdir(parents=True)
    (tmp_path / "set/anns/test.json").write_text("[]")
    given = ["--weights", run, tmp_path / "set", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "hold no images" in error


# --- volumes --------------------------------------------------------------------------------------


def volume_run(folder, channels=1, names=("background", "one", "two"), **more):
    torch.manual_seed(0)
    overlapping = more.get("overlapping", False)
    config = replace(
        swin_unetr3d.VARIANTS["mini"], image_size=(64, 32, 32), spacing=(4.0, 4.0, 4.0),
        in_channels=channels, num_classes=len(names) - overlapping, classes=tuple(names), **more,
    )  # fmt: skip
    state = swin_unetr3d.SwinUNETR(config).state_dict()
    run = {"classes": list(names), "options": {"overlap": 0.0}}
    return write_run(folder, swin_unetr3d.SwinUNETR, state, config, **run)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return volume_run(tmp_path_factory.mktemp("volumes") / "run")


def volume(path, seed=0, shape=(20, 14, 12)):
    """Write a volume of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(-1000, 300, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), path)


def test_a_cut_volume_does_not_end_the_batch(scans, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    for k, name in enumerate(("a.nii.gz", "b.nii.gz", "g/A.NII.GZ", "g/h/c.nii")):
        volume(folder / name, seed=k)
    volume(folder / "two.nii.gz", shape=(8, 8, 8, 2))
    for name in ("._a.nii.gz", ".x/a.nii.gz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0")
    (folder / "scan.dcm").write_bytes(b"\0")
    whole = (folder / "b.nii.gz").read_bytes()
    (folder / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    out = folder / "out"
    given = ["--weights", scans, folder, "--out", out, "--overlays", "--probabilities"]
    said, error = called(monkeypatch, capsys, *given, status=1)
    assert "skipped files that are not volumes: 1 .dcm" in said and "3 volumes in" in said
    first, cut, two = error.splitlines()
    assert "2 of 5 volumes could not be predicted" in first
    assert "b.nii.gz: " in cut and "replace the file" in cut
    assert "two.nii.gz: 2 channels, the model takes 1; choose a model" in two
    kinds = (".nii.gz", "_probability.nii.gz", "_overlay.png")
    names = {f"{case}{kind}" for case in ("a", "g/A", "g/h/c") for kind in kinds}
    assert {*contents(out)} == names | {"classes.json", "legend.png", "measurements.csv"}
    before = contents(out)

    (folder / "b.nii.gz").write_bytes(whole)
    (folder / "two.nii.gz").unlink()
    (out / "g/.01234567.A.nii.gz").write_bytes(b"half")  # of a kill
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "--skip-existing" in error
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")
    assert "3 of 4 volumes are predicted already" in said and "1 volumes in" in said
    added = {f"b{kind}": (out / f"b{kind}").read_bytes() for kind in kinds}
    table = (out / "measurements.csv").read_bytes()
    assert {*before["measurements.csv"].splitlines()} < {*table.splitlines()}
    assert contents(out) == before | added | {"measurements.csv": table}


def test_without_any_good_volume_nothing_is_written(scans, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / "in" / name).write_bytes(b"\0")
    given = ["--weights", scans, tmp_path / "in", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "none of 2 volumes could be predicted; " in error and "a.nii.gz: " in error
    assert not (tmp_path / "out").exists()


def test_a_test_of_volumes_without_labels_is_predicted(scans, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    for name in ("imagesTr/a_0000", "labelsTr/a", "imagesTs/b_0000"):
        volume(root / f"{name}.nii.gz")
    (root / "dataset.json").write_text('{"labels": {"background": 0, "one": 1}}')
    given = ["--weights", scans, root, "--out", tmp_path / "out"]
    said, _ = called(monkeypatch, capsys, *given)
    assert f"{root / 'imagesTs'}: 1 volume files" in said
    assert {*contents(tmp_path / "out")} == {"classes.json", "b.nii.gz", "measurements.csv"}


def test_channels_belong_together_in_their_folder(tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run", channels=2, intensity=None)
    for k, name in enumerate(("p1/x_0000", "p1/x_0001", "p2/x_0000", "p2/x_0001")):
        volume(tmp_path / f"in/{name}.nii.gz", seed=k)
    for end in ("flair", "t1"):
        volume(tmp_path / f"in/p3/BraTS_{end}.nii.gz")
    given = ["--weights", weights, tmp_path / "in", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=1)
    assert {*contents(tmp_path / "out")} == {
        "classes.json", "p1/x.nii.gz", "p2/x.nii.gz", "measurements.csv"
    }  # fmt: skip
    assert "2 of 4 volumes" in error
    assert "BraTS_flair.nii.gz: 1 channels, the model takes 2; name the files of a case " in error
    assert "CASE_0000.nii.gz" in error and "(of BraTS: FLAIR, T1ce, T1, T2)" in error


def test_the_name_of_a_case_does_not_hang_on_damage_of_another(tmp_path):
    """Whether _0000 is the end of names is decided with files that cannot be read."""
    volume(tmp_path / "a_0000.nii.gz")
    volume(tmp_path / "b.nii.gz")
    files = layouts.files_below(tmp_path)
    names = [name for name, _ in group_channels(files, 1)]
    (tmp_path / "b.nii.gz").write_bytes(b"\0")
    assert names == ["a_0000", "b"] == [name for name, _ in group_channels(files, 1)]


def test_regions_that_differ_by_signs_have_files_of_their_own(tmp_path, monkeypatch, capsys):
    names = ("background", "ER+", "ER-", "right kidney")
    weights = volume_run(tmp_path / "run", names=names, overlapping=True)
    volume(tmp_path / "in/x.nii.gz")
    given = ["--weights", weights, tmp_path / "in", "--out", tmp_path / "out"]
    called(monkeypatch, capsys, *given)
    expected = {"x_ER+.nii.gz", "x_ER-.nii.gz", "x_right_kidney.nii.gz", "measurements.csv"}
    assert {*contents(tmp_path / "out")} == expected


@pytest.mark.parametrize(
    "names, endings",
    [
        (["right kidney", "liver_tumor"], ["_right_kidney", "_liver_tumor"]),
        (["ER+", "ER-", "Her2 (3+)"], ["_ER+", "_ER-", "_Her2_(3+)"]),
        (["a/b", "a\\b", "a:b", "a\tb"], ["_a_b", "_a_b_2", "_a_b_3", "_a_b_4"]),
        (["liver", "Liver", "LIVER_2"], ["_liver", "_Liver_2", "_LIVER_2_3"]),
        (['<x>|"?*\x07'], ["_x_"]),
        (["Läsion"], ["_Läsion"]),
    ],
)
def test_names_of_classes_in_file_names(names, endings, capsys):
    assert class_endings(names) == endings
    changed = sum(1 for ending in endings if ending[-2:] in ("_2", "_3", "_4"))
    assert capsys.readouterr().out.count("another class has its name") >= changed


# --- runs that were stopped before their first validation -----------------------------------------

TRAININGS = {
    "all": {"model": "segformer"},
    "average": {"model": "segformer", "ema": 0.9},
    "lora": {"model": "sam_decoder", "train": "lora"},
    "lora of clipseg": {"model": "clipseg", "train": "lora", "ema": 0.9},
    "adapters": {"model": "clipseg", "train": "adapters"},
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_the_last_weights_of_a_run_without_a_validation(
    kind, options, demo, tmp_path, monkeypatch, capsys
):
    """After one epoch the last weights are the best ones."""
    options = replace(options, epochs=1, max_steps=2, batch_size=2, overlays=0, **TRAININGS[kind])
    train.run(replace(options, test=[f"{demo}:val"]))
    given = [demo, "--split", "val", "--probabilities", "--weights", options.out]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "best")
    os.remove(f"{options.out}/best.safetensors")
    said, _ = called(monkeypatch, capsys, *given, "--out", tmp_path / "last")
    word = "averaged weights" if "ema" in TRAININGS[kind] else "weights"
    assert f"stopped before its first validation; its last {word} are used (step 2)" in said
    assert contents(tmp_path / "last") == contents(tmp_path / "best")

    again = train.Options(
        weights=options.out, eval=True, test=[f"{demo}:val"], out=str(tmp_path / "eval"),
        cache=options.cache, workers=0, overlays=0, device="cpu",
    )  # fmt: skip
    train.run(again)
    ours, theirs = (
        json.loads((tmp_path / name / "test/summary.json").read_text()) for name in ("eval", "run")
    )
    assert_same_scores(ours["tests"], theirs["tests"])


def test_a_run_without_any_weights_says_so(run, photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(run / "config.json", folder / "config.json")
    given = ["--weights", folder, photos, "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{folder}: this run was stopped before it saved any weights" in error
    (folder / "last.pt").write_bytes(b"cut")
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{folder / 'last.pt'}: cannot be read" in error
    torch.save({"model": 3, "step": 1}, folder / "last.pt")
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{folder / 'last.pt'}: cannot be read" in error
    with pytest.raises(ValueError, match="cannot be read"):
        loading.last_weights(folder, FAMILIES["segformer"])
