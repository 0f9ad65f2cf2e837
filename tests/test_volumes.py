"""Volumes against nibabel and MONAI: reading, resampling, and the way back to the file's grid."""

import gzip
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, close, contents, stop_at_rename
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import RandCropByPosNegLabel, RandRotate, Spacing
from scipy import ndimage

import swin_unetr3d
from imaging import layouts, nifti, volumes
from imaging.layouts import Entry
from imaging.volumes import VolumeSet

pytestmark = pytest.mark.numeric

SPACING = (0.9, 1.3, 2.5)  # mm, of the volumes below in RAS
softmax = partial(torch.softmax, dim=0)


def same(x):
    return x


def soft(x):
    """Something whose zeros are at places that resampling decides on."""
    return ((x + 100) / 300).clamp(0, 1)


def ramp(low, high, x):
    return ((x - low) / (high - low)).clamp(0, 1)


def ras_volume(seed=0, size=(19, 14, 9)):
    """A smooth image with a dark frame, labels of three classes, and an oblique affine in RAS."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=size), 1.5)
    image = (image / image.std() * 200).astype(np.int16)
    image[:3], image[:, :2] = -1000, -1000
    labels = np.zeros(size, np.uint8)
    labels[5:12, 4:10, 2:7], labels[12:15, 4:10, 2:7] = 1, 2
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    affine = tilt @ np.diag([*SPACING, 1])
    affine[:3, 3] = -20, 31.5, 7
    return image, labels, affine


def store(path, x, affine, axes, code=1, kind=nibabel.Nifti1Image):
    """Writes an array in RAS with other axes, "LAS" or "SLP", by nibabel alone."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
    )
    stored = nibabel.orientations.apply_orientation(x, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, x.shape[:3])
    file = kind(stored, affine)
    file.set_sform(affine, code)
    file.set_qform(affine, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(file, path)
    return path


def make_set(root, axes=("RAS",), **more) -> list[Entry]:
    """A data set whose volumes are stored with the given axes."""
    entries = []
    for i, code in enumerate(axes):
        image, labels, affine = ras_volume(more.get("seed", 0))
        files = root / "imagesTr" / f"v{i}.nii.gz", root / "labelsTr" / f"v{i}.nii.gz"
        store(files[0], image, affine, code), store(files[1], labels, affine, code)
        names = ("background", "liver", "spleen")
        entries.append(Entry(f"v{i}", *files, {}, root, classes=names, labels=(0, 1, 2)))
    return entries


def write(path, x, affine=None, change=same) -> Path:
    """A NIfTI file whose header `change` has changed."""
    file = nibabel.Nifti1Image(x, np.eye(4) if affine is None else affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(change(file) or file, path)
    return path


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "SLP", "IAR"])
@pytest.mark.parametrize("end", [".nii.gz", ".nii"])
def test_stored_axes_do_not_matter_and_come_back(tmp_path, axes, end):
    image, labels, affine = ras_volume()
    path = store(tmp_path / f"image{end}", image, affine, axes)
    there = store(tmp_path / f"labels{end}", labels, affine, axes)
    assert "".join(nibabel.aff2axcodes(nibabel.load(path).affine)) == axes
    ours, grid = nifti.read_volume(path)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours[0], image)
    np.testing.assert_array_equal(nifti.read_labels(there, grid, 3), labels)
    np.testing.assert_allclose(grid.ras_affine, affine, atol=1e-5)
    np.testing.assert_allclose(grid.spacing, SPACING, atol=1e-6)
    assert grid.size == image.shape and nifti.read_grid(path).size == image.shape

    prepared, place = volumes.prepare_image(ours, grid, (1.5, 1.5, 2.0), soft)
    truth, right = volumes.prepare_image(
        image[None].astype(np.float32), nifti.read_grid(path), (1.5, 1.5, 2.0), soft
    )
    assert torch.equal(prepared, truth) and place == right

    nifti.write(tmp_path / "out" / f"o{end}", labels, grid)
    stored, out = nibabel.load(path), nibabel.load(tmp_path / "out" / f"o{end}")
    assert out.shape == stored.shape and out.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(out.affine, stored.affine)
    np.testing.assert_array_equal(out.get_fdata(), nibabel.load(there).get_fdata())
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"o{end}"]


def test_written_volumes_keep_both_transforms_and_units(tmp_path):
    def change(file):
        other = file.affine.copy()
        other[:3, 3] += 5
        file.set_sform(file.affine, 2), file.set_qform(other, 4)
        file.header.set_xyzt_units("mm", "sec")
        file.header["cal_max"] = 3000

    _, labels, affine = ras_volume()
    path = write(tmp_path / "a.nii.gz", labels.astype(np.int16), affine, change)
    grid = nifti.read_grid(path)
    stored = nibabel.load(path)
    for volume in labels, labels.astype(np.float32) / 7:
        nifti.write(tmp_path / "b.nii.gz", volume, grid)
        out = nibabel.load(tmp_path / "b.nii.gz")
        np.testing.assert_array_equal(out.get_fdata(dtype=np.float32), volume)
        for ours, theirs in zip(
            (*out.get_sform(True), *out.get_qform(True)),
            (*stored.get_sform(True), *stored.get_qform(True)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert out.header.get_xyzt_units() == ("mm", "sec") and out.header["cal_max"] == 0
    with pytest.raises(ValueError, match=r"b\.mha: a volume must be named"):
        nifti.write(tmp_path / "b.mha", labels, grid)


def test_a_kill_leaves_the_last_good_file(tmp_path, monkeypatch):
    _, labels, affine = ras_volume()
    grid = nifti.read_grid(write(tmp_path / "a.nii.gz", labels, affine))
    nifti.write(tmp_path / "out" / "b.nii.gz", labels, grid)
    before = contents(tmp_path / "out")
    moved = stop_at_rename(monkeypatch, tmp_path / "out" / "b.nii.gz")
    with pytest.raises(OSError, match="stopped"):
        nifti.write(tmp_path / "out" / "b.nii.gz", labels * 2, grid)
    assert moved and contents(tmp_path / "out") == before


def test_nifti_2_scales_and_floats(tmp_path):
    image, _, affine = ras_volume()
    file = nibabel.Nifti2Image(image, affine)
    file.header.set_slope_inter(0.5, -3)
    nibabel.save(file, tmp_path / "a.nii.gz")
    truth = nibabel.load(tmp_path / "a.nii.gz")
    assert truth.dataobj.slope == 0.5
    ours, grid = nifti.read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(ours[0], truth.get_fdata(), rtol=1e-6)
    nifti.write(tmp_path / "b.nii.gz", np.ones(image.shape, np.uint8), grid)
    out = nibabel.load(tmp_path / "b.nii.gz")
    assert (out.get_fdata() == 1).all() and np.array_equal(out.affine, truth.affine)


def test_channels_of_one_file_and_of_several(tmp_path):
    image, _, affine = ras_volume()
    several = np.stack([image, image // 2, 7 - image], 3)
    one = store(tmp_path / "c.nii.gz", several, affine, "LPS")
    files = [
        store(tmp_path / f"c_000{k}.nii.gz", several[..., k], affine, code)
        for k, code in enumerate(("RAS", "LAS", "SLP"))
    ]
    for paths in one, files:
        ours, grid = nifti.read_volume(paths)
        np.testing.assert_array_equal(ours, several.transpose(3, 0, 1, 2))
    assert grid.file == files[0] and nifti.read_grid(one).channels == 3
    with pytest.raises(ValueError, match=r"c\.nii\.gz: 3 channels, the model takes 4; name "):
        nifti.check_channels(one, len(ours), 4)


def test_what_is_no_number_becomes_the_smallest_value(tmp_path, capsys):
    x = np.full((4, 5, 6, 2), 50.0, np.float32)
    x[1, 2, 3] = -1000, -7
    x[0, 0, 0, 0], x[0, 0, 1, 0], x[3, 3, 3, 1] = np.nan, np.inf, np.nan
    ours, _ = nifti.read_volume(write(tmp_path / "a.nii.gz", x))
    assert ours[0, 0, 0, :2].tolist() == [-1000, -1000] and ours[1, 3, 3, 3] == -7
    assert (ours == 50).sum() == 240 - 2 - 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "a.nii.gz (3 voxels): NaN or infinite voxels become the smallest value" in line
    x[..., 1] = np.nan
    with pytest.raises(ValueError, match=r"a\.nii\.gz: a channel has no finite number"):
        nifti.read_volume(write(tmp_path / "a.nii.gz", x))


def test_labels_by_their_numbers(tmp_path):
    x = np.zeros((3, 4, 5), np.int16)
    x[0], x[1], x[2, 0] = 500, 2, 255
    path = write(tmp_path / "l.nii.gz", x)
    ours = nifti.read_labels(path, nifti.read_grid(path), (0, 2, 500))
    assert ours[0].max() == ours[0].min() == 2 and (ours[1] == 1).all()
    assert (ours[2, 0] == 255).all() and (ours[2, 1:] == 0).all()
    x[2, 0] = 0  # floats that are whole
    path = write(tmp_path / "l.nii.gz", x.astype(np.float64))
    assert nifti.read_labels(path, nifti.read_grid(path), (0, 2, 500)).max() == 2
    x[0], x[2, 0] = 13, 0  # whole but for the scale of their header
    file = nibabel.Nifti1Image(x.astype(np.float64), np.eye(4))
    file.header.set_data_dtype(np.int16)
    nibabel.save(file, tmp_path / "l.nii.gz")
    stored = nibabel.load(tmp_path / "l.nii.gz").get_fdata()
    assert 12.99 < stored.max() < 13  # what truncation would make 12 of
    assert np.array_equal(nifti.read_labels(tmp_path / "l.nii.gz", nifti.read_grid(path), 14), x)
    x[0], x[2, 0] = 1, 255  # named, it is a class
    path = write(tmp_path / "l.nii.gz", x)
    ours = nifti.read_labels(path, nifti.read_grid(path), (0, 1, 2, 255))
    assert np.unique(ours).tolist() == [0, 1, 2, 3]


def no_codes(file):
    file.set_sform(None, 0), file.set_qform(None, 0)
    file.header["sform_code"] = file.header["qform_code"] = 0


def flat(file):
    file.header["srow_x"] = file.header["srow_y"]


def damaged(tmp_path):
    """name: (file, what its line says)"""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1000, (9, 8, 7)).astype(np.int16)
    write(tmp_path / "cut.nii.gz", noise)
    data = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    write(tmp_path / "short.nii", noise)
    data = (tmp_path / "short.nii").read_bytes()
    (tmp_path / "short.nii").write_bytes(data[:-300])
    (tmp_path / "text.nii.gz").write_text("no volume")
    with gzip.open(tmp_path / "zipped.nii.gz", "wb") as file:
        file.write(b"no volume at all" * 100)
    (tmp_path / "._a.nii.gz").write_bytes(b"\0\5\26\7")
    nibabel.save(nibabel.MGHImage(noise.astype(np.float32), np.eye(4)), tmp_path / "m.mgz")
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    singular = write(tmp_path / "flat.nii", noise)
    raw = bytearray(singular.read_bytes())
    raw[280:296] = raw[296:312]
    singular.write_bytes(raw)
    write(tmp_path / "two.nii.gz", noise[0])
    write(tmp_path / "five.nii.gz", noise.reshape(3, 3, 4, 2, 7))
    write(tmp_path / "none.nii.gz", noise, change=no_codes)
    write(tmp_path / "rgb.nii.gz", rgb)
    return {
        "cut.nii.gz": "not readable as NIfTI .*replace",
        "short.nii": "not readable as NIfTI .*replace",
        "text.nii.gz": "not readable as NIfTI .*replace",
        "zipped.nii.gz": "not readable as NIfTI .*replace",
        "._a.nii.gz": "macOS.*delete",
        "m.mgz": "MGH is not read; convert it to .nii.gz",
        "two.nii.gz": "2 axes.*it needs X,Y,Z",
        "five.nii.gz": "5 axes.*it needs X,Y,Z",
        "none.nii.gz": "no affine .sform_code and qform_code are 0.; write",
        "flat.nii": "singular.*set_sform",
        "rgb.nii.gz": "save it as integers or floats",
    }


def test_bad_files_are_one_line_with_their_name(tmp_path):
    for name, told in damaged(tmp_path).items():
        with pytest.raises(ValueError, match=told) as error:
            nifti.read_volume(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value), name
    with pytest.raises(FileNotFoundError, match=r"lost\.nii: no such file"):
        nifti.read_grid(tmp_path / "lost.nii")


def test_labels_that_do_not_fit_are_one_line(tmp_path):
    image, labels, affine = ras_volume()
    grid = nifti.read_grid(write(tmp_path / "image.nii.gz", image, affine))

    def refused(told, x=labels, affine=affine, numbers=3):
        path = write(tmp_path / "l.nii.gz", x, affine)
        with pytest.raises(ValueError, match=told) as error:
            nifti.read_labels(path, grid, numbers)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)

    moved = affine.copy()
    moved[0, 3] += 2e-2
    refused(r"affine is 0\.02 off .*image\.nii\.gz's, 0\.022 voxels .*; resample", affine=moved)
    moved[0, 3] -= 1.95e-2
    path = write(tmp_path / "l.nii.gz", labels, moved)
    np.testing.assert_array_equal(nifti.read_labels(path, grid, 3), labels)
    refused(r"\(19, 14, 8\) voxels, but .*image\.nii\.gz has \(19, 14, 9\)", labels[..., :8])
    refused(r"holds 2, but the classes are \[0, 1\]; name it in dataset\.json", numbers=2)
    refused(r"holds -1, but the classes", labels.astype(np.int16) - 1)
    refused(r"holds 70000, but the classes", labels.astype(np.int32) + 70000)
    refused(r"holds 0\.5, which is not a whole number; resample labels by nearest", labels / 2)
    refused(r"holds nan, which is not a whole number", np.where(labels, labels, np.nan))
    refused(r"2 channels; a label map has one", np.stack([labels] * 2, 3))


# --- damaged files -------------------------------------------------------------------------------


def noise_volume(path):
    """A file of noise, whose compressed data fills nearly the whole file."""
    noise = np.random.default_rng(1).integers(0, 100, (9, 8, 7)).astype(np.uint8)
    return write(path, noise), noise


def decompressed_or_none(data: bytes) -> bytes | None:
    """What Python's gzip, which reads to the end, makes of a file; None if it is damaged."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    path, noise = noise_volume(tmp_path / "a.nii.gz")
    data = path.read_bytes()
    whole = gzip.decompress(data)
    grid = nifti.read_grid(path)
    damaged = 0
    for place in [*range(10, len(data) - 8, 5), *range(len(data) - 8, len(data))]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        if decompressed_or_none(bytes(flipped)) == whole:
            np.testing.assert_array_equal(nifti.read_volume(path)[0][0], noise)
            continue
        damaged += 1
        readings = nifti.read_volume, partial(nifti.read_labels, grid=grid, numbers=100)
        for reading in *readings, nifti.check_whole:
            with pytest.raises(ValueError, match="a.nii.gz: .*; replace the file") as error:
                reading(path)
            assert "\n" not in str(error.value)
    assert damaged > 100


def test_a_gzip_file_may_have_several_members(tmp_path, capsys):
    path, noise = noise_volume(tmp_path / "a.nii.gz")
    whole = gzip.decompress(path.read_bytes())
    for ends in (100,), (352,), (17, 400, 401, 700), (len(whole),):
        cuts = [0, *ends, len(whole)]
        members = [gzip.compress(whole[a:b]) for a, b in itertools.pairwise(cuts)]
        path.write_bytes(b"".join(members))
        np.testing.assert_array_equal(nifti.read_volume(path)[0][0], noise)
        nifti.check_whole(path)
        path.write_bytes(b"".join(members)[:-1])  # the length of the last one is cut
        with pytest.raises(ValueError, match="replace the file"):
            nifti.read_volume(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("more", [b"\0" * 512, b"garbage", b"\x1f", b"x" * 200_000])
def test_bytes_after_the_end_are_said(tmp_path, capsys, more):
    path, noise = noise_volume(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes() + more)
    for _ in range(2):  # a file that is read again is not said again
        np.testing.assert_array_equal(nifti.read_volume(path)[0][0], noise)
        nifti.check_whole(path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} ({len(more):,}): bytes after the end")


def test_what_follows_the_voxels_is_read_in_blocks(tmp_path):
    """Its end is verified, and memory does not grow with it: 64 MB are checked in below 4 MB."""
    path, noise = noise_volume(tmp_path / "a.nii.gz")
    data = gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**26), 1)
    path.write_bytes(data)
    tracemalloc.start()
    np.testing.assert_array_equal(nifti.read_volume(path)[0][0], noise)
    nifti.check_whole(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    path.write_bytes(data[:-8] + bytes(8))
    with pytest.raises(ValueError, match="incorrect data check.*replace the file"):
        nifti.check_whole(path)


def test_check_whole_finds_what_is_missing(tmp_path):
    path, _ = noise_volume(tmp_path / "a.nii")
    nifti.check_whole(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="855 bytes of 856.*replace the file"):
        nifti.check_whole(path)
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="855 bytes of 856.*replace the file"):
        nifti.check_whole(packed)


def test_only_damaged_files_are_to_be_replaced(tmp_path):
    path, _ = noise_volume(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(path.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "d.nrrd").write_text("NRRD0005")
    for name in ("b.nii.gz", "c.nii"):  # the content decides, whatever the name
        image, _ = nifti.read_volume(tmp_path / name)
        np.testing.assert_array_equal(image, nifti.read_volume(path)[0])
        nifti.check_whole(tmp_path / name)
    with pytest.raises(
        ValueError, match="d.nrrd: NRRD is not read; convert its folder with.*import"
    ):
        nifti.read_volume(tmp_path / "d.nrrd")


# --- headers that contradict themselves ----------------------------------------------------------


def header_file(path, sform=None, qform=None, kind=nibabel.Nifti1Image, unit=None, patch=None):
    """A file with these two transforms, codes 2 and 1, and the bytes of `patch` at their places."""
    x = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    affine = np.diag([-2.0, 2.5, 3, 1])
    affine[:3, 3] = 10, 20, 30
    file = kind(x, affine)
    file.set_sform(affine if sform is None else sform, 2)
    file.set_qform(affine if qform is None else qform, 1)
    if unit:
        file.header.set_xyzt_units(unit, "sec")
    nibabel.save(file, path)
    data = bytearray(gzip.decompress(path.read_bytes()))
    for place, value in (patch or {}).items():
        data[place : place + len(value)] = value
    path.write_bytes(gzip.compress(bytes(data)))
    return path, x, affine


def check_read_and_written(path, x, affine, unit):
    """Read as `affine` says, and a label map on its grid says nothing else, to nibabel."""
    image, grid = nifti.read_volume(path)
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(image[0], x[::-1])  # the first axis points to the left
    out = path.parent / "out.nii.gz"
    nifti.write(out, x[::-1].astype(np.uint8), grid)
    header = nibabel.load(out).header
    np.testing.assert_array_equal(np.asarray(nibabel.load(out).dataobj), x)
    for written in header.get_sform(), header.get_qform():
        np.testing.assert_allclose(written, affine, atol=1e-5)
    np.testing.assert_allclose(header["pixdim"][1:4], [2, 2.5, 3], rtol=1e-6)
    assert header.get_xyzt_units()[0] == unit


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("code", [0, 1])
def test_a_bare_identity_gives_way_to_the_other_transform(tmp_path, capsys, kind, code):
    for bare in np.eye(4), np.diag([-1.0, -1, 1, 1]):
        for which in "sform", "qform":
            path = tmp_path / f"{which}{int(bare[0, 0])}.nii.gz"
            path, x, affine = header_file(path, **{which: bare}, kind=kind)
            if code == 0:  # the qform's values count, whatever its code
                at = 252 if kind is nibabel.Nifti1Image else 344
                data = bytearray(gzip.decompress(path.read_bytes()))
                data[at : at + 4 if at == 344 else at + 2] = bytes(4 if at == 344 else 2)
                path.write_bytes(gzip.compress(bytes(data)))
                assert nibabel.load(path).header["qform_code"] == 0
            check_read_and_written(path, x, affine, "unknown")
            (line,) = capsys.readouterr().out.splitlines()
            other = "qform" if which == "sform" else "sform"
            assert line.startswith(f"{path} (2 x 2.5 x 3 mm): ") and f"the {other} is used" in line


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3)])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_metres_and_microns_become_mm(tmp_path, capsys, unit, factor, kind):
    affine = np.diag([-2.0, 2.5, 3, 1])
    affine[:3, 3] = 10, 20, 30
    scaled = affine * np.array([factor] * 3 + [1])[:, None]
    path, x, _ = header_file(tmp_path / "a.nii.gz", scaled, scaled, kind, unit)
    check_read_and_written(path, x, affine, "mm")
    (line,) = capsys.readouterr().out.splitlines()
    assert f"a.nii.gz (2 x 2.5 x 3 mm): the header's unit is the {unit[:4]}" in line.replace(
        "metre", "mete"
    )


def number(value) -> bytes:
    return np.float32(value).tobytes()


@pytest.mark.parametrize("qfac", [0.0, 2.0, float("nan")])
def test_a_qfac_of_no_sign_is_read_as_1_and_spacing_as_positive(tmp_path, qfac):
    """nifti1.h: pixdim[0] is -1 or 1, and anything else means 1."""
    expected = np.diag([2.0, 2.5, 3, 1])
    expected[:3, 3] = 10, 20, 30
    no_sform = {254: bytes(2)}
    pixdim = np.array([qfac, -2, 2.5, 3], "<f4").tobytes()
    patch = no_sform | {76: pixdim}
    path, x, _ = header_file(tmp_path / "a.nii.gz", qform=expected, patch=patch)
    image, grid = nifti.read_volume(path)
    np.testing.assert_allclose(grid.affine, expected, atol=1e-5)
    np.testing.assert_array_equal(image[0], x)


def test_a_bare_sform_gives_way_to_a_qform_of_the_same_spacing(tmp_path, capsys):
    """Nobody has set such an sform, and the qform mirrors two axes."""
    mirrored = np.diag([-1.0, -1, 1, 1])
    mirrored[:3, 3] = 90, 120, -70
    path, _, _ = header_file(tmp_path / "a.nii.gz", sform=np.eye(4), qform=mirrored)
    _, grid = nifti.read_volume(path)
    np.testing.assert_allclose(grid.affine, mirrored, atol=1e-5)
    assert "the sform is the bare 1 mm identity" in capsys.readouterr().out


CONTRADICTIONS = [
    ({"sform": np.diag([3.0, 3, 3, 1])}, "sform says voxels of 3 x 3 x 3 mm, its pixdim 2 x 2.5 x"),
    ({"sform": np.diag([-2.0, 2.55, 3, 1])}, "sform says voxels of 2 x 2.55 x 3 mm"),
    ({"qform": np.diag([1.0, 1, 2, 1])}, "its pixdim 1 x 1 x 2 mm; write the right one"),
    ({"unit": "meter"}, "its unit is the metre, which makes voxels of 2000 x 2500 x 3000 mm"),
    ({"unit": "micron"}, "its unit is the micron, which makes voxels of 0.002 x 0.0025 x 0.003"),
    ({"patch": {80: number(0)}}, "pixdim says voxels of 0 x 2.5 x 3 mm; write the right"),
    ({"patch": {84: number(np.nan)}}, "pixdim says voxels of 2 x nan x 3 mm"),
    ({"patch": {88: number(np.inf)}}, "pixdim says voxels of 2 x 2.5 x inf mm"),
    ({"patch": {280: number(np.nan)}}, "affine is singular, ..nan"),
    ({"patch": {254: b"\0\0", 256: number(1) * 3}}, "its qform is no rotation .*set_qform"),
]


@pytest.mark.parametrize(("how", "message"), CONTRADICTIONS)
def test_other_contradictions_are_refused(tmp_path, how, message):
    path, _, _ = header_file(tmp_path / "a.nii.gz", **how)
    with pytest.raises(ValueError, match=message) as error:
        nifti.read_grid(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "replace" not in text


def test_axes_that_differ_are_those_of_the_sform(tmp_path, capsys):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    sform = turn @ np.diag([-2.0, 2.5, 3, 1])
    path, _, _ = header_file(tmp_path / "a.nii.gz", sform)
    grid = nifti.read_grid(path)
    np.testing.assert_allclose(grid.affine, sform, atol=1e-6)
    assert capsys.readouterr().out == f"{path}: {nifti.OTHER_AXES}\n"
    sform = np.diag([-2.015, 2.5, 3, 1])  # 0.75 % and another origin: nothing to be said
    assert nifti.read_grid(header_file(tmp_path / "b.nii.gz", sform)[0]).spacing[0] > 2.01
    assert capsys.readouterr().out == ""


def test_a_line_names_three_files_and_counts_the_rest(tmp_path, capsys):
    paths = [header_file(tmp_path / f"{k}.nii.gz", np.eye(4))[0] for k in range(5)]
    with nifti.notices.grouped():
        for path in paths * 2:
            nifti.read_grid(path)
        assert capsys.readouterr().out == ""
    (line,) = capsys.readouterr().out.splitlines()
    assert all(str(path) in line for path in paths[:3]) and "3.nii.gz" not in line
    assert " and 2 more: the sform is the bare" in line
    nifti.read_volume(paths[4])
    assert capsys.readouterr().out == ""
    with pytest.raises(KeyError), nifti.notices.grouped():
        nifti.read_grid(header_file(tmp_path / "6.nii.gz", np.eye(4))[0])
        raise KeyError
    assert "6.nii.gz" in capsys.readouterr().out  # also where an error ends the block


# --- resampling ----------------------------------------------------------------------------------

CASES = list(
    itertools.product([(17, 12, 9), (8, 31, 5)], [(1.5, 1.5, 2.0), (0.7, 2.9, 1.1), (0.9, 1.3, 5)])
)


@pytest.mark.parametrize(("size", "spacing"), CASES)
def test_resample_is_monais_spacing(size, spacing):
    affine = np.diag([*SPACING, 1])
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    new = volumes.resampled_size(size, SPACING, spacing)
    ratio = tuple(b / a for a, b in zip(SPACING, spacing, strict=True))
    image = MetaTensor(x, affine=torch.from_numpy(affine))
    theirs = Spacing(spacing, mode="bilinear")(image).as_tensor()
    assert new == tuple(theirs.shape[1:])
    # float32 has places up to 31 to within 2e-6, and neighbours differ by up to 6.
    close(volumes.resample(x, new, ratio), theirs, 2e-5)

    labels = (x[:1] * 50).round().clamp(0, 255).to(torch.uint8)
    theirs = Spacing(spacing, mode="nearest")(MetaTensor(labels, affine=image.affine)).as_tensor()
    ours = volumes.resample(labels, new, ratio, nearest=True)
    assert ours.dtype == torch.uint8
    clear = torch.ones(new, dtype=torch.bool)  # away from ties, which float32 decides
    for axis, (n, r) in enumerate(zip(new, ratio, strict=True)):
        tie = np.abs(np.arange(n) * r % 1 - 0.5) < 1e-4
        clear &= torch.from_numpy(~tie).reshape(-1, *[1] * (2 - axis))
    assert clear.float().mean() > 0.4
    assert torch.equal(ours[0][clear], theirs[0].to(torch.uint8)[clear])


def test_resample_changes_neither_its_input_nor_what_it_need_not():
    x = torch.rand(1, 5, 6, 7)
    kept = x.clone()
    assert torch.equal(volumes.resample(x, (5, 6, 7), (1, 1, 1)), x)
    volumes.resample(x, (5, 6, 13), (1, 1, 0.5))
    assert torch.equal(x, kept)


# --- there and back ------------------------------------------------------------------------------


def a_grid(size, spacing=SPACING):
    return nifti.Grid(Path("-"), np.diag([*spacing, 1]), tuple(size), 1, b"")


def test_equal_spacing_is_the_identity_both_ways():
    image = np.random.default_rng(0).normal(size=(2, 12, 9, 7)).astype(np.float32)
    image[:, :2], image[:, :, 7:] = 0, 0
    x, place = volumes.prepare_image(image, a_grid(image.shape[1:]), SPACING, same)
    assert x.shape == (2, 10, 7, 7)
    close(volumes.restore(x, place, same, background=False), torch.from_numpy(image), 0)
    # a header's rounding is not a reason to resample (and as MONAI, nothing below 0.001 mm is)
    near = np.add(SPACING, 9e-4)
    x, place = volumes.prepare_image(image, a_grid(image.shape[1:]), near, same)
    close(volumes.restore(x, place, same, background=False), torch.from_numpy(image), 0)


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.4, 1.0, 0.8), (3, 0.7, 2.5)])
def test_a_ramp_comes_back(spacing):
    """Linear there and linear back: a ramp is the same, but for a border that the grid misses."""
    size = (40, 23, 17)
    at = np.meshgrid(*(np.arange(n) * s for n, s in zip(size, SPACING, strict=True)), indexing="ij")
    image = (1 + at[0] * 0.3 - at[1] * 0.2 + at[2] + 5).astype(np.float32)[None]  # none is 0
    x, place = volumes.prepare_image(image, a_grid(size), spacing, same)
    ours = volumes.restore(x, place, same, background=False)
    inside = np.ones(size, bool)
    for axis, (n, m) in enumerate(zip(size, place.full, strict=True)):
        good = np.arange(n) * SPACING[axis] <= (m - 1) * spacing[axis] + 1e-9
        good &= np.arange(n) <= n - 1 - spacing[axis] / SPACING[axis]
        inside &= good.reshape(-1, *[1] * (2 - axis))
    assert inside.mean() > 0.5
    assert np.abs(ours[0].numpy() - image[0])[inside].max() < 1e-4
    assert np.abs(ours[0].numpy() - image[0]).max() < 0.5 * sum(spacing)


def test_restore_is_interpolation_at_the_files_voxels():
    """Against scipy, on a box that does not begin at 0, in slabs or not."""
    size, full, start, stop = (31, 17, 26), (24, 29, 26), (4, 5, 2), (20, 25, 19)
    ratio = (30 / 23, 16 / 28, 1.0)
    place = volumes.Placement(size, ratio, full, start, stop)
    logits = torch.randn(3, 16, 20, 17, generator=torch.Generator().manual_seed(1))
    at = [np.arange(n) / r for n, r in zip(size, ratio, strict=True)]
    at = [np.minimum(a, m - 1) - s for a, m, s in zip(at, full, start, strict=True)]
    box = np.ix_(*[(a >= -0.5) & (a <= n - 0.5) for a, n in zip(at, logits.shape[1:], strict=True)])
    grid = np.meshgrid(*at, indexing="ij")
    truth = [ndimage.map_coordinates(x.double(), grid, order=1, mode="nearest") for x in logits]
    truth = torch.from_numpy(np.stack(truth)).softmax(0).float()
    outside = torch.ones(size, dtype=torch.bool)
    outside[box] = False
    assert 0.3 < outside.float().mean() < 0.9
    truth[:, outside] = torch.tensor([1.0, 0, 0])[:, None]
    ours = volumes.restore(logits, place, softmax)
    close(ours, truth, 1e-5)
    truth[0, outside] = 0
    close(volumes.restore(logits, place, softmax, background=False), truth, 1e-5)
    one = volumes.restore(logits[:1], place, torch.sigmoid)
    assert (one[0, outside] == 0).all() and (one[0][~outside] > 0).all()


def test_restore_makes_one_result_and_small_slabs(monkeypatch):
    seen = []
    place = volumes.Placement((64, 128, 128), (0.8,) * 3, (80, 160, 160), (0,) * 3, (80, 160, 160))

    def activation(slab):
        seen.append(slab.shape[1])
        return slab

    logits = torch.randn(20, 80, 160, 160)
    whole = volumes.restore(logits, place, activation)
    assert len(seen) > 1 and sum(seen) == 64 and max(seen) * 20 * 128 * 128 <= 2**24
    seen.clear()
    one = volumes.restore(logits[3:4], place, activation)
    assert seen == [64]
    close(whole[3:4], one, 1e-5)  # a few float32 products of values to 6, for 20 channels or one


def test_the_box_holds_all_that_is_not_zero():
    image = np.zeros((2, 9, 8, 7), np.float32)
    image[0, 3, 4, 5], image[1, 6, 2, 5] = 1, -1
    x, place = volumes.prepare_image(image, a_grid((9, 8, 7)), SPACING, same)
    assert place.start == (3, 2, 5) and place.stop == (7, 5, 6) and x.shape == (2, 4, 3, 1)
    x, place = volumes.prepare_image(image * 0, a_grid((9, 8, 7)), SPACING, same)
    assert x.shape == (2, 9, 8, 7) and place.start == (0, 0, 0)
    # preprocessing comes first: with 1 added nothing is 0
    x, place = volumes.prepare_image(image, a_grid((9, 8, 7)), SPACING, lambda x: x + 1)
    assert place.stop == (9, 8, 7) and place.start != (3, 2, 5)


# --- data sets -----------------------------------------------------------------------------------


def prepare(entries, cache, preprocess=soft, spacing=(1.5, 1.5, 2.0), channels=1):
    return VolumeSet(entries).prepared(spacing, preprocess, channels, cache)


def test_a_volume_that_is_listed_several_times_is_prepared_once(tmp_path, monkeypatch):
    entries, done = make_set(tmp_path / "set", ("RAS", "LPS")), []
    for name in ("_prepare", "_stem"):  # the second reads all of a file
        one = getattr(VolumeSet, name)
        told = lambda *given, one=one: done.append(one.__name__) or one(*given)  # noqa: E731
        monkeypatch.setattr(VolumeSet, name, told)
    dataset = prepare([*entries, *entries, entries[0]], tmp_path / "cache")
    assert sorted(done) == ["_prepare"] * 2 + ["_stem"] * 2 and len(dataset) == 5
    next((tmp_path / "cache").glob("*.image.npy")).unlink()  # by somebody who needs the room
    dataset = prepare(entries, tmp_path / "cache")
    assert done.count("_prepare") == 3
    dataset = prepare([*entries, *entries, entries[0]], tmp_path / "cache")
    assert torch.equal(dataset.sample(0)["image"], dataset.sample(4)["image"])


def test_samples_are_what_their_parts_make(tmp_path):
    entries = make_set(tmp_path / "set", ("RAS", "LPS", "SLP"))
    dataset = prepare(entries, tmp_path / "cache")
    image, labels, affine = ras_volume()
    first = dataset.sample(0)
    for i in range(3):
        sample = dataset.sample(i)
        assert torch.equal(sample["image"], first["image"])  # stored axes do not matter
        assert torch.equal(sample["mask"], first["mask"])
        np.testing.assert_array_equal(sample["truth"], labels)
        np.testing.assert_allclose(sample["affine"], affine, atol=1e-5)
        assert sample["size"] == labels.shape and sample["file"] == entries[i].image
        assert sample["name"] == f"v{i}" and sample["dataset"] == "set" and sample["prompt"] == ""
    assert first["image"].dtype == torch.float32 and first["mask"].dtype == torch.uint8
    new = MetaTensor(torch.from_numpy(image[None].astype(np.float32)), affine=torch.tensor(affine))
    theirs = soft(Spacing((1.5, 1.5, 2.0))(new).as_tensor())
    box = first["place"].box
    close(first["image"], theirs[(..., *box)], 1e-5)
    assert (theirs != 0).sum() == (first["image"] != 0).sum() and first["image"].shape[1] < len(
        theirs[0]
    )
    new = MetaTensor(torch.from_numpy(labels[None]), affine=torch.tensor(affine))
    theirs = Spacing((1.5, 1.5, 2.0), mode="nearest")(new).as_tensor()[0][box]
    assert first["mask"].shape == theirs.shape and (first["mask"] != theirs).float().mean() < 0.02
    voxels, offsets = first["voxels"]
    found = np.unravel_index(voxels.numpy(), first["mask"].shape)
    numbers = first["mask"].numpy()[found]
    assert offsets[0] == 0 and len(voxels) == offsets[-1] == (first["mask"] > 0).sum()
    assert (numbers[: offsets[1]] == 1).all() and (numbers[offsets[1] :] == 2).all()
    assert offsets[1] == (first["mask"] == 1).sum() > 0


def test_a_second_run_reads_nothing_anew(tmp_path, capsys, monkeypatch):
    entries, cache = make_set(tmp_path / "set", ("RAS", "LPS")), tmp_path / "cache"
    one = prepare(entries, cache).sample(0)
    assert "preparing 2 volumes once into" in capsys.readouterr().out
    before = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(nifti, "read_volume", None)
        two = prepare(entries[:1], cache).sample(0)  # fewer, and in a data set of their own
    assert torch.equal(one["image"], two["image"]) and not capsys.readouterr().out
    assert contents(cache) == before
    # other settings are other files, the number of classes of a model is none of them
    prepare(entries, cache, partial(ramp, 0.0, 200.0))
    prepare(entries, cache, spacing=(1.5, 1.5, 2.1))
    made = len(contents(cache))
    assert made == 3 * len(before)
    prepare(entries, cache, lambda x: soft(x))
    assert len(contents(cache)) == made
    # also what is made of 0 alone is a setting
    prepare(entries, cache, lambda x: soft(x).masked_fill(x == 0, 0.5))
    assert len(contents(cache)) == made + len(before)
    made += len(before)
    # and so is other content, in either file, or read by other numbers
    size = len(before) // 2
    other = nibabel.load(entries[1].mask)
    stored = np.asarray(other.dataobj)
    write(entries[1].mask, np.where(stored == 1, 255, stored), other.affine)
    ignored = prepare(entries[1:], cache).sample(0)
    assert len(contents(cache)) == made + size and 255 in ignored["mask"]
    voxels, offsets = ignored["voxels"]
    assert offsets.tolist() == [0, 0, len(voxels)] and len(voxels) == (ignored["mask"] == 2).sum()
    swapped = prepare([replace(entries[0], labels=(0, 2, 1))], cache).sample(0)
    assert len(contents(cache)) == made + 2 * size
    assert torch.equal(swapped["mask"] == 2, one["mask"] == 1)
    image = np.asarray(nibabel.load(entries[0].image).dataobj)
    write(entries[0].image, image + 1, nibabel.load(entries[0].image).affine)
    prepare(entries[:1], cache)
    assert len(contents(cache)) == made + 3 * size


def test_a_kill_leaves_nothing_half_done(tmp_path, monkeypatch):
    entries, cache = make_set(tmp_path / "set", ("RAS", "LPS")), tmp_path / "cache"
    right = prepare(entries, tmp_path / "right")
    save, calls = np.save, []

    def stop(file, array):
        calls.append(array)
        if len(calls) == 6:  # in the second volume
            file.write(b"half")
            raise KeyboardInterrupt
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(entries, cache)
    assert len(list(cache.glob("*.npz"))) == 1 and not list(cache.glob(".*"))
    again = prepare(entries, cache)
    assert contents(cache).keys() == contents(tmp_path / "right").keys()
    for i in range(2):
        assert torch.equal(again.sample(i)["image"], right.sample(i)["image"])
        assert torch.equal(again.sample(i)["mask"], right.sample(i)["mask"])


def test_workers_get_paths_and_not_voxels(tmp_path):
    dataset = prepare(make_set(tmp_path / "set", ("RAS",) * 9), tmp_path / "cache")
    sample = dataset.sample(1)
    text = pickle.dumps(dataset)
    assert len(text) / 9 < 1500 < sample["image"].numel() * 4 + sample["truth"].numel()
    there = pickle.loads(text).subset([1, 2])
    assert len(there) == 2 and torch.equal(there.sample(0)["image"], sample["image"])
    before = contents(tmp_path / "cache")
    sample["image"].zero_(), sample["mask"].fill_(9)  # whoever writes changes no file
    assert contents(tmp_path / "cache") == before
    assert not torch.equal(there.sample(0)["image"], sample["image"])


def test_data_sets_that_cannot_be(tmp_path, monkeypatch):
    entries, cache = make_set(tmp_path / "set"), tmp_path / "cache"
    one = entries[0]
    with pytest.raises(ValueError, match=r"v0\.nii\.gz: 1 channels, the model takes 4"):
        prepare(entries, cache, channels=4)
    with pytest.raises(ValueError, match="no volumes"):
        VolumeSet([])
    other = Entry("w", one.image, one.mask, {}, tmp_path / "w", classes=("background", "kidney"))
    with pytest.raises(ValueError, match="other classes than .*set's; pool like with like"):
        VolumeSet([one, other])
    other = Entry("w", one.image, tmp_path / "lost.nii", {}, one.root, classes=one.classes)
    with pytest.raises(FileNotFoundError, match=r"lost\.nii: no such file"):
        prepare([other], cache)
    assert not cache.exists()  # so far headers told all
    monkeypatch.setattr(volumes.shutil, "disk_usage", lambda _: type("", (), {"free": 5}))
    with pytest.raises(OSError, match="up to 0 MB needed, 0 MB free; choose another .*--cache"):
        prepare(entries, cache)
    monkeypatch.undo()
    write(one.mask, np.zeros((19, 14, 9), np.uint8), nibabel.load(one.image).affine)
    with pytest.raises(ValueError, match="all 1 label maps are empty, .*v0.nii.gz for one"):
        prepare(entries, cache).check_foreground()


def of_values(root, *maps):
    """A data set of noise with these label maps uint8 (6,5,4)."""
    entries = []
    for i, labels in enumerate(maps):
        image = np.random.default_rng(i).integers(-150, 300, (6, 5, 4)).astype(np.int16)
        files = write(root / f"i{i}.nii.gz", image), write(root / f"l{i}.nii.gz", labels)
        entries.append(Entry(f"v{i}", *files, {}, root, classes=("lesion",), labels=(0, 1)))
    return entries


def label_map(*numbers):
    labels = np.zeros((6, 5, 4), np.uint8)
    labels.ravel()[: len(numbers)] = numbers
    return labels


def test_label_maps_of_0_and_255_are_not_empty(tmp_path):
    entries = of_values(tmp_path, label_map(255), label_map(255, 255))
    with pytest.raises(ValueError, match="l0.nii.gz, .*l1.nii.gz: 2 of 2 label maps hold 0 and"):
        prepare(entries, tmp_path / "cache").check_foreground()
    with pytest.raises(ValueError, match="2 of 2 label maps hold 0 and 255"):  # now prepared
        prepare(entries, tmp_path / "cache").check_foreground()


def test_255_beside_classes_is_a_mark_and_alone_is_not(tmp_path, capsys):
    plain, alone, both = label_map(1), label_map(255), label_map(1, 255)
    entries = of_values(tmp_path / "a", plain, alone, plain, label_map())
    sets = [prepare(entries[:2], tmp_path / "cache"), prepare(entries[2:], tmp_path / "cache")]
    with pytest.raises(ValueError, match="l1.nii.gz: 1 of 4 label maps hold 0 and 255 alone"):
        volumes.check_255(sets)
    entries = of_values(tmp_path / "b", plain, alone, both)
    sets = [prepare(entries[:2], tmp_path / "cache"), prepare(entries[2:], tmp_path / "cache")]
    capsys.readouterr()
    volumes.check_255(sets)
    (line,) = capsys.readouterr().out.splitlines()
    assert "b/l1.nii.gz: the label map holds 255 (does not count) and no class" in line
    entries = of_values(tmp_path / "c", plain, both, label_map())
    volumes.check_255([prepare(entries, tmp_path / "cache")])
    named = of_values(tmp_path / "d", label_map(255))  # 255 is a class there
    volumes.check_255([prepare([replace(named[0], labels=(0, 255))], tmp_path / "cache")])
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("preparing")]
    assert lines == []


def test_z_scores_leave_out_what_is_no_number(tmp_path, capsys):
    """Mean and deviation of what is finite and not 0, by numpy; the rest becomes 0."""
    x = np.random.default_rng(0).normal(50, 20, (8, 7, 6, 2)).astype(np.float32)
    x[0], x[:, 0, :, 0] = 0, np.nan
    x[7, 6, 5] = np.inf, -np.inf
    entry = of_values(tmp_path, label_map(1))[0]
    write(entry.image, x), write(entry.mask, np.ones((8, 7, 6), np.uint8))
    config = replace(swin_unetr3d.VARIANTS["mini"], intensity=None)
    scores = partial(swin_unetr3d.preprocess, config=config)
    sample = prepare([entry], tmp_path / "c", scores, (1, 1, 1), 2).sample(0)
    expected = np.zeros((2, 8, 7, 6), np.float32)
    for k in range(2):
        counts = np.isfinite(x[..., k]) & (x[..., k] != 0)
        values = x[..., k][counts].astype(np.float64)
        expected[k][counts] = (values - values.mean()) / values.std()
    box = sample["place"].box
    close(sample["image"], torch.from_numpy(expected[(slice(None), *box)]), 1e-5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "NaN" in line]
    assert lines == [f"{entry.image} (50 voxels): NaN or infinite voxels become 0"]
    channels = torch.from_numpy(x).permute(3, 0, 1, 2)  # the model file alone does the same
    close(scores(channels), torch.from_numpy(expected), 1e-5)
    assert volumes.fill_value(scores, 2) == 0
    assert volumes.fill_value(partial(ramp, -175.0, 250.0), 1) is None


def test_hounsfield_units_are_told_from_others(real_data):
    """Real CT: whole, in boxes of 48 voxels, in windows; not with another offset or as grey."""
    rng = np.random.default_rng(0)
    for name in "ct_abdomen3d", "ct_thorax3d":
        path = real_data / name / "imagesTr" / "ct_001.nii.gz"
        ct = np.asarray(nibabel.load(path).dataobj).astype(np.float32)
        inside = np.asarray(nibabel.load(real_data / name / "labelsTr" / path.name).dataobj) > 0
        windows = (-175, 250), (-100, 300), (0, 80), (0, 400)
        honest = [ct, *(ct.clip(*window) for window in windows)]
        lifted = [ct + 1024, (ct + 1024).clip(0), ct + 32768]
        grey = (ct.clip(-175, 250) + 175) / 425
        others = [*lifted, grey, np.rint(grey * 255)]
        for centre in rng.permutation(np.argwhere(inside))[:30]:
            start = np.clip(centre - 24, 0, np.array(ct.shape) - 48)
            box = tuple(slice(a, a + 48) for a in start)
            honest.append(ct[box])
            others += [x[box] for x in lifted]
        assert all(volumes.is_hu(volumes.hu_facts(x)) for x in honest), name
        assert not any(volumes.is_hu(volumes.hu_facts(x)) for x in others), name


def test_ct_that_is_not_in_hu_is_said_of_every_run(tmp_path, capsys):
    entries = of_values(tmp_path, label_map(1), label_map(1), label_map(1))
    for entry in entries:
        image = np.asarray(nibabel.load(entry.image).dataobj)
        write(entry.image, (image + 1024).astype(np.uint16))
    for _ in range(2):  # the second one finds them prepared
        entries[2] = replace(entries[2], modality="MR")
        with nifti.notices.grouped():
            prepare(entries, tmp_path / "cache").check_hu()
        out = capsys.readouterr().out
        lines = [line for line in out.splitlines() if "Hounsfield" in line]
        assert len(lines) == 1 and "i0.nii.gz (values 8" in lines[0] and "i1.nii" in lines[0]
        assert "i2.nii.gz" not in lines[0]
        nifti.notices.known.clear()  # as another process


def test_real_volumes(real_data, tmp_path):
    """What the README of each says, and the way through the model's grid and back."""
    told = {"ct_thorax3d": "120x102x112", "brain_tumour3d": "256x256x25"}
    for name, size in told.items():
        root = real_data / name
        settings = json.loads((root / "dataset.json").read_text())
        items = settings["training"][:1]
        entries = [
            Entry(
                "a", root / item["image"], root / item["label"], {}, root,
                classes=tuple(settings["labels"].values()),
            )
            for item in items
        ]  # fmt: skip
        dataset = prepare(entries, tmp_path, partial(ramp, -175.0, 250.0))
        assert size in dataset.describe() and dataset.describe().startswith("1 volume of")
        sample, k = dataset.sample(0), len(dataset.classes)
        one_hot = torch.nn.functional.one_hot(sample["mask"].long(), k).permute(3, 0, 1, 2).float()
        labels = volumes.restore(one_hot * 20, sample["place"], softmax).argmax(0)
        found, there = labels > 0, sample["truth"] > 0
        both = (found & (labels == sample["truth"])).sum()
        assert 2 * both / (found.sum() + there.sum()) > 0.95, name


# --- crops ---------------------------------------------------------------------------------------


def crop_volume(size=(24, 20, 16), seed=0):
    """An image that names its own voxels, 0 at one end; a mask with two classes."""
    image = torch.arange(1, np.prod(size) + 1, dtype=torch.float32).reshape(1, *size)
    image[:, :3] = 0
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[10:14, 8:12, 4:9], mask[20:22, 15:18, 10:12], mask[:, :2] = 1, 2, 255
    return image, mask, places(mask)


def places(mask, k=3):
    flat = [np.flatnonzero(mask.ravel() == c) for c in range(1, k)]
    offsets = np.cumsum([0, *map(len, flat)])
    return torch.from_numpy(np.concatenate(flat).astype(np.int32)), offsets


def centres(monkeypatch, image, mask, voxels, n, seed=0, **more):
    """The labels of the voxels that crops are drawn around: those crops of 1 voxel hold."""
    rng = np.random.default_rng(seed)
    image, mask = volumes.random_crops(image, mask, voxels, n, (1, 1, 1), rng, **more)
    return image.flatten().long() - 1, mask.flatten()


@pytest.mark.parametrize(("ratios", "share"), [((1, 1), 0.5), ((1, 3), 0.75), ((0, 1), 1)])
def test_crops_around_foreground_and_background(monkeypatch, ratios, share):
    image, mask, voxels = crop_volume()
    at, labels = centres(monkeypatch, image, mask, voxels, 4000, ratios=ratios)
    assert abs((labels > 0).float().mean() - share) < 0.03 and (at >= 0).all()
    assert not (labels == 255).any()
    # each voxel of the foreground as often as any other, and so of the background
    assert abs((labels == 1).sum() / (labels > 0).sum() - 80 / 92) < 0.03
    if share < 1:
        x = at[labels == 0] // (20 * 16)
        counts = torch.bincount(x, minlength=24)[3:].float()
        there = ((mask == 0) & (image[0] != 0)).sum((1, 2))[3:].float()
        expected = there / there.sum() * len(x)
        assert ((counts - expected) ** 2 / expected).sum() < 50  # 20 degrees of freedom: p 0.0002


def test_crops_by_class(monkeypatch):
    image, mask, voxels = crop_volume()
    labels = centres(monkeypatch, image, mask, voxels, 3000, ratios=(1, 2, 5))[1]
    shares = torch.bincount(labels.long(), minlength=3) / 3000
    close(shares, torch.tensor([1, 2, 5]) / 8, 0.03)
    mask[mask == 1] = 0  # what is not there is not drawn
    labels = centres(monkeypatch, image, mask, places(mask), 3000, ratios=(1, 2, 5))[1]
    close(torch.bincount(labels.long(), minlength=3) / 3000, torch.tensor([1, 0, 5]) / 6, 0.03)
    with pytest.raises(ValueError, match="4 ratios of crops for 3 classes"):
        centres(monkeypatch, image, mask, voxels, 1, ratios=(1, 2, 5, 1))


@pytest.mark.parametrize("size", [(8, 7, 16), (24, 5, 2)])
def test_crops_lie_where_monai_puts_them(size):
    """As often at each place along each axis as RandCropByPosNegLabel's."""
    image, mask, voxels = crop_volume()
    image[:, :3] = 1
    image[:] = torch.arange(1, image.numel() + 1).reshape(image.shape)
    mask[mask == 255] = 0
    n = 1500
    ours, labels = volumes.random_crops(image, mask, voxels, n, size, np.random.default_rng(0))
    assert ours.shape == (n, 1, *size) and labels.shape == (n, *size)
    theirs = RandCropByPosNegLabel(size, num_samples=n, image_threshold=0, pos=1, neg=1)
    theirs.set_random_state(0)
    theirs = torch.stack([x.as_tensor() for x in theirs(image, label=mask[None], image=image)])
    first = (x[:, 0, 0, 0, 0].long().numpy() - 1 for x in (ours, theirs))
    first = [np.unravel_index(x, mask.shape) for x in first]
    for a, b, have, want in zip(*first, mask.shape, size, strict=True):
        counts = [np.bincount(x, minlength=have - want + 1) / n for x in (a, b)]
        assert len(counts[0]) == have - want + 1 and np.abs(counts[0] - counts[1]).max() < 0.06
    for crop, label in zip(ours[:20], labels[:20], strict=True):  # image and mask are cut alike
        at = np.unravel_index(crop.long().flatten().numpy() - 1, mask.shape)
        assert torch.equal(label.flatten(), mask[at])


def test_crops_larger_than_the_volume_have_zeros_around_them():
    image, mask, voxels = crop_volume()
    rng = np.random.default_rng(0)
    crops, masks = volumes.random_crops(image, mask, voxels, 3, (29, 20, 21), rng)
    inside = (slice(2, 26), slice(None), slice(2, 18))  # 5 missing: 2 before, 3 after
    for crop, labels in zip(crops, masks, strict=True):
        assert torch.equal(crop[(0, *inside)], image[0]) and torch.equal(labels[inside], mask)
        assert crop.sum() == image.sum() and labels.sum() == mask.sum()


def test_crops_of_what_is_rare_or_empty():
    image, mask, _ = crop_volume()
    one = torch.zeros_like(image)
    one[0, 7, 7, 7] = 5  # the only background
    crops, _ = volumes.random_crops(
        one, mask * 0, places(mask * 0), 5, (1, 1, 1), np.random.default_rng(0)
    )
    assert (crops == 5).all()
    rng = np.random.default_rng(0)
    crops, _ = volumes.random_crops(one * 0, mask * 0, places(mask * 0), 5, (4, 4, 4), rng)
    assert crops.shape == (5, 1, 4, 4, 4) and (crops == 0).all()


# --- augmentation --------------------------------------------------------------------------------


def test_augmentation_moves_image_and_mask_alike():
    mask = torch.randint(0, 200, (6, 6, 5), dtype=torch.uint8)
    image = mask[None].float().repeat(2, 1, 1, 1)
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        new, labels = volumes.augment(image, mask, rng, flip=(0.5, 0.5, 0.5), rotate90=0.5)
        assert new.shape == image.shape and torch.equal(new[1], labels.float())
        assert torch.equal(labels.flatten().sort().values, mask.flatten().sort().values)
        seen.add(labels.numpy().tobytes())
    assert len(seen) == 16  # every turn and mirror image of a square plane, either way up
    long = torch.randint(0, 200, (6, 4, 5), dtype=torch.uint8)
    for seed in range(5):  # a crop keeps its shape
        new, labels = volumes.augment(
            long[None].float(), long, np.random.default_rng(seed), rotate90=1
        )
        assert torch.equal(labels, long.flip(0, 1)) and torch.equal(new[0], labels.float())


def test_augmentation_happens_as_often_as_it_is_told():
    image, mask = torch.ones(1, 2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8)
    image[0, 0] = 0.5
    rng = np.random.default_rng(0)
    changed, amounts = 0, []
    for _ in range(1500):
        new, _ = volumes.augment(image, mask, rng, scale=(0.1, 0.2), shift=(0.3, 0.5))
        change = (new - image)[0, :, 0, 0]
        slope = (change[1] - change[0]) / 0.5
        offset = change[1] - slope
        changed += np.array([abs(slope) > 1e-6, abs(offset) > 1e-6])
        amounts.append((float(slope), float(offset)))
    assert np.abs(changed / 1500 - [0.2, 0.5]).max() < 0.04
    assert np.abs(np.abs(amounts).max(0) - [0.1, 0.3]).max() < 0.005
    flips = [
        volumes.augment(image, mask, rng, flip=(0.3, 0, 0))[0][0, 0, 0, 0] for _ in range(1500)
    ]
    assert abs(np.mean(flips) - (0.5 + 0.5 * 0.3)) < 0.025
    new, labels = volumes.augment(image, mask, rng)
    assert torch.equal(new, image) and torch.equal(labels, mask)


def test_turning_is_monais(monkeypatch):
    image = torch.from_numpy(ras_volume(size=(15, 11, 6))[0][None].astype(np.float32))
    mask = torch.from_numpy(ras_volume(size=(15, 11, 6))[1])
    for degrees in 15.0, -40.0:
        how = {"range_z": (np.radians(-degrees),) * 2, "prob": 1, "padding_mode": "border"}
        both = {}
        for mode in "bilinear", "nearest":
            x = image if mode == "bilinear" else mask[None].float()
            both[mode] = RandRotate(**how, mode=mode)(x).as_tensor()
        fixed = type("", (), {"random": lambda _: 0.5, "uniform": lambda _, low, high: high})()
        ours, labels = volumes.augment(image, mask, fixed, rotate=(degrees, 1))
        close(ours, both["bilinear"], 0.05)  # of values to 600
        assert (labels != both["nearest"][0]).float().mean() < 0.01
        assert labels.dtype == torch.uint8


# --- sliding windows -----------------------------------------------------------------------------

WINDOWS = [
    ((37, 29), (16, 12), 0.5),
    ((9, 40), (16, 13), 0.25),
    ((21, 18, 13), (8, 8, 8), 0.5),
    ((21, 7, 5), (8, 9, 8), 0.7),
    ((6, 5, 4), (8, 8, 9), 0.0),
    ((16, 8, 8), (8, 8, 8), 0.6),
]


def place_dependent(windows):
    """A model whose answer depends on where in the window a voxel is."""
    where = torch.linspace(0, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
    mean = windows.mean(tuple(range(2, windows.ndim)), keepdim=True)
    return torch.cat([windows * 2 + where, mean + where * 3, windows.square()], 1)


@pytest.mark.parametrize(("size", "window", "overlap"), WINDOWS)
def test_sliding_windows_are_monais(size, window, overlap):
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sliding_window_inference(
            x[None], window, 3, place_dependent, overlap=overlap, mode="gaussian"
        )[0]
    ours = volumes.sliding_window(place_dependent, x, window, overlap, batch=3)
    close(ours, theirs, 1e-5)


def test_sliding_windows_take_half_precision_and_refuse_what_is_wrong():
    x = torch.randn(1, 20, 20)
    exact = volumes.sliding_window(same, x, (8, 8))
    half = volumes.sliding_window(lambda x: x.bfloat16(), x, (8, 8))
    assert half.dtype == torch.float32
    close(exact, x, 5e-6)  # four weighted values, to 4, by the sum of the weights: 2**-23 each
    close(half, x, 0.02)
    with pytest.raises(ValueError, match=r"windows of \(8, 8\) became \(4, 4\); resize"):
        volumes.sliding_window(lambda x: x[..., ::2, ::2], x, (8, 8))
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"overlap {wrong}: takes 0 to less than 1"):
            volumes.sliding_window(same, x, (8, 8), overlap=wrong)


MEMORY = """
from types import SimpleNamespace
import torch
from imaging import volumes
torch.set_num_threads(1)

class Universal(torch.nn.Linear):  # of 200 classes
    config = SimpleNamespace(num_classes=200, image_size=(32, 32, 32), overlapping=True)
    def forward(self, x, classes=range(200)):
        return x.expand(-1, len(classes), -1, -1, -1)
    def postprocess(self, logits, size):
        return logits

def peak(side, classes):
    size = (side, side, side)
    place = volumes.Placement(size, (1.0, 1.0, 1.0), size, (0, 0, 0), size)
    model = Universal(1, 1)
    volumes.window_probabilities(model, torch.rand(1, *size), place, 0, classes=classes)
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(status.split()[0]) / 1024

before = peak(40, range(20))
print(peak(128, [3]) - before, peak(128, range(20)) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_only_the_classes_asked_for_take_memory():
    """Logits and probabilities of a class take 8 MB each, and all classes 3.2 GB.

    What the allocator keeps besides differs between runs: twice the memory is far from all classes.
    """
    code = [sys.executable, "-c", MEMORY]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    one, twenty = map(float, done.stdout.split())
    assert one < 100
    assert 8 * 40 - 25 < twenty < 2 * 8 * 41


# --- components ----------------------------------------------------------------------------------


def test_the_largest_component_of_each_class():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[:3, :3, :3], labels[3, 3, 3] = 1, 1  # touch at a corner: one component
    labels[6:8, 6:8, 6:8] = 1
    labels[0, 8, :], labels[5, 0, 0] = 3, 3
    kept = labels.copy()
    ours = volumes.largest_component(labels)
    expected = labels.copy()
    expected[6:8, 6:8, 6:8], expected[5, 0, 0] = 0, 0
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(labels, kept)


def test_grey_shows_what_the_model_sees():
    image = np.linspace(-1000, 1000, 8 * 9 * 10, dtype=np.float32).reshape(1, 8, 9, 10)
    grey = volumes.grey(image, partial(ramp, -175.0, 250.0))
    assert grey.shape == (8, 9, 10) and grey.dtype == np.uint8
    assert (grey[image[0] < -175] == 0).all() and (grey[image[0] > 250] == 255).all()
    assert abs(int(grey[np.abs(image[0] - 37.5) < 3].mean()) - 127) < 4
    assert (volumes.grey(image * 0, same) == 0).all()


def test_values_that_no_window_of_hounsfield_units_spans():
    """Z-scores, and values divided by 1000; a window of 0 to 80 HU is honest."""
    body = np.linspace(-1000, 1000, 4000, dtype=np.float32)
    for image in (body - body.mean()) / body.std(), body / 1000:
        assert not volumes.is_hu(volumes.hu_facts(image))
    assert volumes.is_hu(volumes.hu_facts(body.clip(0, 80)))


# --- files that are whole, whatever they are called ----------------------------------------------


def small(path, shape=(3, 4, 5), **header):
    """Write a NIfTI file of consecutive numbers; return them and the file's bytes, decompressed."""
    x = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    affine = np.diag([2.0, 2.5, 3, 1])
    file = nibabel.Nifti1Image(x, affine)
    file.set_qform(affine, 1)
    nibabel.save(file, path)
    return x, file.to_bytes()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.Nii", "a.volume"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_content_decides_and_not_the_ending(tmp_path, name, compressed):
    x, data = small(tmp_path / "x.nii")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if compressed else data)
    image, grid = nifti.read_volume(path)
    np.testing.assert_array_equal(image[0], x)
    assert nifti.read_labels(path, grid, 60).sum() == x.sum()
    nifti.check_whole(path)

    damaged = path.read_bytes()[:-9]  # the end of the voxels, or of the compressed data
    path.write_bytes(damaged)
    for reading in (nifti.read_volume, nifti.check_whole):
        with pytest.raises(ValueError, match="; replace the file$"):
            reading(path)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((3, 4, 5, 1), 1),
        ((3, 4, 5, 1, 1), 1),
        ((3, 4, 5, 1, 2), 2),
        ((3, 4, 5, 2, 1), 2),
        ((3, 4, 5, 1, 1, 1, 2), 2),
        ((3, 4, 1, 1, 2), 2),
    ],
)
def test_further_axes_of_length_1(tmp_path, shape, channels):
    x, _ = small(tmp_path / "a.nii.gz", shape)
    image, grid = nifti.read_volume(tmp_path / "a.nii.gz")
    assert grid.channels == channels and grid.size == shape[:3]
    np.testing.assert_array_equal(image, np.moveaxis(x.reshape(*shape[:3], channels), 3, 0))
    if channels == 1:
        assert nifti.read_labels(tmp_path / "a.nii.gz", grid, x.size).shape == shape[:3]


def test_shapes_that_are_no_volume(tmp_path):
    messages = {
        (3, 4): "has 2 axes, (3, 4): an image rather than a volume; it needs X,Y,Z or",
        (3, 4, 5, 2, 2): "has 5 axes, (3, 4, 5, 2, 2); it needs X,Y,Z or X,Y,Z,channels",
    }
    for shape, message in messages.items():
        small(tmp_path / "a.nii", shape)
        with pytest.raises(ValueError, match=re.escape(message)):
            nifti.read_grid(tmp_path / "a.nii")


@pytest.mark.parametrize("excess", [6e-7, 1e-5, 4e-3])
def test_a_quaternion_that_rounding_made_too_long(tmp_path, capsys, excess):
    """As ITK and FSL read it: a turn by 180 degrees about its axis."""
    _, data = small(tmp_path / "x.nii")
    axis = np.array([0.6, 0.8, 0])
    quaternion = (axis * np.sqrt(1 + excess)).astype("<f4")
    patched = bytearray(data)
    patched[254:256] = bytes(2)  # no sform
    patched[256:268] = quaternion.tobytes()
    (tmp_path / "a.nii").write_bytes(patched)
    _, grid = nifti.read_volume(tmp_path / "a.nii")
    turn = 2 * np.outer(axis, axis) - np.eye(3)
    np.testing.assert_allclose(grid.affine[:3, :3], turn @ np.diag([2, 2.5, 3]), atol=1e-5)
    nifti.write(tmp_path / "o.nii", np.zeros(grid.size, np.uint8), grid)
    np.testing.assert_allclose(nibabel.load(tmp_path / "o.nii").affine, grid.affine, atol=1e-5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_header_beside_its_voxels(tmp_path, kind, end):
    x = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nibabel.save(kind(x, np.diag([2, 2.5, 3, 1])), tmp_path / f"a.img{end}")
    for name in (f"a.hdr{end}", f"a.img{end}"):
        image, grid = nifti.read_volume(tmp_path / name)
        np.testing.assert_array_equal(image[0], x)
        nifti.check_whole(tmp_path / name)
        assert layouts.without_ending(tmp_path / name) == "a"
    nifti.write(tmp_path / "o.nii.gz", image[0].astype(np.uint8), grid)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "o.nii.gz").get_fdata(), x)
    (tmp_path / f"a.img{end}").unlink()
    with pytest.raises(FileNotFoundError, match="its other half, .img, is not beside it"):
        nifti.read_grid(tmp_path / f"a.hdr{end}")


FOREIGN = {
    "a.nrrd": (b"NRRD0005\n", "NRRD is not read; convert its folder with python prepare.py import"),
    "b.nii.gz": (
        b"NRRD0005\n",
        "NRRD is not read; convert its folder with python prepare.py import",
    ),
    "a.mha": (b"ObjectType = Image\nNDims = 3\n", "MetaImage is not read; convert"),
    "IM0001": (bytes(128) + b"DICM" + bytes(300), "DICOM is not read; .*prepare.py import FOLDER"),
    "a.dcm": (b"\x08\0\x05\0", "DICOM is not read; .*prepare.py import FOLDER"),
    "a.mgz": (gzip.compress(b"\0\0\0\1\0\0\1\0" * 100), "MGH is not read; .*mri_convert"),
    "a.hdr": (b"\x5c\1\0\0" + bytes(344), "Analyze 7.5 is not read; convert"),
    "a.zip": (b"PK\3\4", "is a ZIP archive, not NIfTI; unpack it"),
    "a.png": (b"\x89PNG\r\n", "is an image, not NIfTI; a model of images takes it"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named_with_the_way_out(tmp_path, name):
    content, message = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    path.with_suffix(".img").write_bytes(b"")
    with pytest.raises(ValueError, match=message) as error:
        nifti.read_grid(path)
    assert str(error.value) == nifti.other_volume_format(path)
    assert str(error.value).startswith(f"{path}: ") and "replace" not in str(error.value)


def test_nifti_is_not_foreign(tmp_path):
    _, data = small(tmp_path / "a.nii.gz")
    (tmp_path / "b.mha").write_bytes(data)
    for path in (tmp_path / "a.nii.gz", tmp_path / "b.mha", tmp_path / "lost", tmp_path):
        assert nifti.other_volume_format(path) is None


PATCHES = {  # what nibabel logs or warns of
    "sizeof_hdr": {0: b"\x10\0\0\0"},
    "bitpix": {72: b"\x40\0"},
    "qfac": {76: number(0)},
    "offset": {108: number(353)},
    "codes": {252: b"\x63\0", 254: b"\x63\0"},
    "extension": {348: b"\1\0\0\0"},
}


@pytest.mark.parametrize("name", PATCHES)
def test_nibabels_warnings_stay_inside(tmp_path, monkeypatch, capfd, name):
    x, data = small(tmp_path / "x.nii")
    patched = bytearray(data) + b"\0"
    for place, value in PATCHES[name].items():
        patched[place : place + len(value)] = value
    if name == "offset":
        patched[352:352] = b"\0"
    path = tmp_path / "a.nii"
    path.write_bytes(patched)
    (handler,) = nibabel.imageglobals.logger.handlers
    monkeypatch.setattr(handler, "stream", sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, grid = nifti.read_volume(path)
        nifti.check_whole(path)
        nifti.write(tmp_path / "o.nii.gz", image[0].astype(np.uint8), grid)
    np.testing.assert_array_equal(image[0], x)
    np.testing.assert_allclose(grid.affine, np.diag([2, 2.5, 3, 1]), atol=1e-6)
    assert capfd.readouterr() == ("", "")


# --- grids of labels and images ------------------------------------------------------------------


def grid_of(affine, size=(40, 28, 24), name="a.nii.gz"):
    return nifti.Grid(Path(name), affine, size, 1, b"")


def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[:2, :2] = [[c, -s], [s, c]]
    return turn


def test_grids_are_compared_at_their_corners(capsys):
    affine = np.diag([4.0, 4.2, 5, 1])
    affine[:3, 3] = -80, -50, 30
    image = grid_of(affine, name="image.nii.gz")
    moved = affine.copy()
    moved[0, 3] += 0.02
    assert nifti.grid_distance(grid_of(moved), image) == pytest.approx(0.005)
    # about the first voxel: what lies farthest from it along y goes 27 x 4.2 mm x the angle
    away = np.eye(4)
    away[:3, 3] = affine[:3, 3]
    rotated = away @ turned(0.01) @ np.linalg.inv(away) @ affine
    angle = np.radians(0.01)
    expected = max(27 * 4.2 * angle / 4, 39 * 4 * angle / 4.2)
    assert nifti.grid_distance(grid_of(rotated), image) == pytest.approx(expected, rel=1e-3)
    # stored the other way round, the same places
    flipped = affine @ np.diag([-1.0, 1, 1, 1])
    flipped[:3, 3] += affine[:3, 0] * 39
    assert nifti.grid_distance(grid_of(flipped), image) < 1e-9

    for own in (affine, flipped):
        nifti.check_grid(grid_of(own, name="same.nii.gz"), image)
    with nifti.notices.grouped():
        for k in range(4):
            nifti.check_grid(grid_of(moved, name=f"near{k}.nii.gz"), image)
    near = "near0.nii.gz, near1.nii.gz, near2.nii.gz and 1 more: "
    assert capsys.readouterr().out == f"{near}{nifti.NEAR_GRID}\n"
    rotated = away @ turned(0.03) @ np.linalg.inv(away) @ affine
    moved[0, 3] += 0.03
    for far in (rotated, moved):
        with pytest.raises(ValueError, match="a.nii.gz: its affine is .* voxels at the corners;"):
            nifti.check_grid(grid_of(far), image)


def test_labels_that_are_nearly_on_the_grid_are_read(tmp_path, capsys):
    image, labels, affine = ras_volume()
    grid = nifti.read_grid(write(tmp_path / "image.nii.gz", image, affine))
    moved = affine.copy()
    moved[0, 3] += 5e-3
    path = write(tmp_path / "l.nii.gz", labels, moved)
    for _ in range(2):
        np.testing.assert_array_equal(nifti.read_labels(path, grid, 3), labels)
    assert capsys.readouterr().out == f"{path}: {nifti.NEAR_GRID}\n"


# --- splits without foreground, and random damage -------------------------------------------------


def test_what_is_too_small_for_the_spacing_counts_on_the_files_grid(tmp_path):
    """Nothing can be trained of it, but it is scored."""
    entries = of_values(tmp_path, label_map(0, 1), label_map(0, 1))
    dataset = prepare(entries, tmp_path / "cache", spacing=(2.0, 2.0, 2.0))
    assert not (dataset.sample(0)["mask"] == 1).any() and (dataset.sample(0)["truth"] == 1).any()
    assert dataset.empty_data_sets() == {}
    with pytest.raises(ValueError, match="is lost at a spacing of 2 x 2 x 2 mm.*finer --spacing"):
        dataset.check_foreground()
    empty = of_values(tmp_path / "b", label_map(), label_map())
    dataset = prepare([*entries, *empty], tmp_path / "cache")
    assert dataset.empty_data_sets() == {tmp_path / "b": empty}


def damage(data: bytes, rng) -> bytes:
    """Change bytes of a header, its sizes, or the length of a file at random."""
    changed = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        changed[40:56] = rng.choice([1, 5, 10_000, 32_767, -1, 0], 8).astype("<i2").tobytes()
    elif kind == 1:
        del changed[rng.integers(len(changed)) :]
    else:
        for place in rng.integers(352, size=rng.integers(1, 6)):
            changed[place] = rng.integers(256)
    return bytes(changed)


def test_random_damage_is_a_line_or_read(tmp_path, monkeypatch, capfd):
    _, data = small(tmp_path / "x.nii")
    (handler,) = nibabel.imageglobals.logger.handlers
    monkeypatch.setattr(handler, "stream", sys.stderr)
    grid = nifti.read_grid(tmp_path / "x.nii")
    rng = np.random.default_rng(0)
    path = tmp_path / "a.nii.gz"
    readings = nifti.read_volume, nifti.check_whole, partial(nifti.read_labels, grid=grid)
    refused = 0
    tracemalloc.start()
    for _ in range(100):
        changed = damage(data, rng)
        if rng.integers(2):
            changed = bytearray(gzip.compress(changed))
            changed[rng.integers(10, len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        for reading in readings:
            more = {"numbers": 60} if reading is readings[2] else {}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    reading(path, **more)
            except (ValueError, OSError) as error:
                refused += 1
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 80 and peak < 2**25
    assert capfd.readouterr().err == ""
