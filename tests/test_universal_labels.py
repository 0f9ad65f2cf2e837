"""prepare.py msd and btcv with --labels: how universal_labels.json maps their labels."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ROOT, command
from test_prepare_volumes import edit, write_btcv, write_task

import prepare
import universal
from imaging import layouts, nifti

TABLES = ROOT / "universal_labels.json"
# The study's: raw number -> classes, from 1 (label_transfer.py and utils/utils.py at 43c1239);
# the tumor's voxels are the organ's as well where POST_TUMOR_DICT says so.
STUDY = {
    "BTCV": {k: {k} for k in range(1, 14)},  # 14, duodenum, is not in the download
    "Liver": {1: {6}, 2: {6, 27}},
    "Lung": {1: {30}},
    "Pancreas": {1: {11}, 2: {11, 28}},
    "HepaticVessel": {1: {15}, 2: {29}},
    "Spleen": {1: {1}},
    "Colon": {1: {31}},
}
DOWNLOAD = {  # of the Decathlon's dataset.json
    "Liver": ["liver", "cancer"], "Lung": ["cancer"], "Pancreas": ["pancreas", "cancer"],
    "HepaticVessel": ["Vessel", "Tumour"], "Spleen": ["spleen"],
    "Colon": ["colon cancer primaries"],
}  # fmt: skip


def task(root, name, labels=None):
    """A small download of that name, whose label maps hold all numbers."""
    labels = labels or ["background", *DOWNLOAD[name]]
    write_task(root, 5)
    edit(root, lambda a: a.update(name=name, labels={str(k): v for k, v in enumerate(labels)}))
    return every_number((root / "labelsTr").glob("spleen_*"), len(labels))


def every_number(paths, n):
    """Makes label maps hold 0, 1, ..., n - 1 in turn."""
    for path in paths:
        file = nibabel.load(path)
        x = (np.arange(np.prod(file.shape)) % n).reshape(file.shape).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(x, file.affine), path)


def read(out):
    """{class: bool (X,Y,Z)} of the first training volume as training reads it, and the numbers."""
    entry = layouts.read_entries(out, "train")[0]
    grid = nifti.read_grid(entry.image)
    given = nifti.read_labels(entry.mask, grid, entry.labels)
    numbers = nifti.read_labels(entry.mask, grid, 14)
    names = entry.classes[1:] or entry.classes
    regions = entry.regions or [(k,) for k in range(1, len(names) + 1)]
    return {n: np.isin(given, region) for n, region in zip(names, regions, strict=True)}, numbers


@pytest.mark.parametrize("name", STUDY)
def test_the_study_s_classes(name, tmp_path, capsys):
    raw, which = tmp_path / "raw", "btcv" if name == "BTCV" else "msd"
    if name == "BTCV":
        every_number((write_btcv(raw) / "Training/label").iterdir(), 14)
    else:
        task(raw, name)
    arguments = which, raw, "--labels", TABLES, "--out", tmp_path / "out"
    assert prepare.main([str(x) for x in arguments]) == 0
    found, numbers = read(tmp_path / "out")
    classes = {k for some in STUDY[name].values() for k in some}
    assert found.keys() == {universal.ORGANS[k] for k in classes}
    for k in classes:
        raws = [number for number, some in STUDY[name].items() if k in some]
        assert np.array_equal(found[universal.ORGANS[k]], np.isin(numbers, raws))
    assert {*numbers.ravel()} == {0, *STUDY[name]}
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("classes: "))
    assert all(universal.ORGANS[k] in line for k in classes) and "background" not in line


def test_every_table_is_of_the_study():
    tables = json.loads(TABLES.read_text())
    assert tables.keys() == STUDY.keys()


def test_without_a_table_nothing_changes(tmp_path):
    task(tmp_path / "raw", "Liver")
    prepare.main(["msd", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    labels = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    assert labels == {"0": "background", "1": "liver", "2": "cancer"}


REFUSED = {
    "name": ({}, "Hippocampus", "has no 'Hippocampus', only BTCV, Liver, Lung"),
    "more": ({"Liver": {"background": 0, "liver": 1}}, "Liver", "2 is not named; the numbers are"),
    "less": (
        {"Lung": {"background": 0, "lung tumor": [1, 2]}}, "Lung", "there is no 2; the numbers are",
    ),
    "kind": ({"Liver": {"background": 0, "liver": "one"}}, "Liver", "expected {"),
    "list": ({"Liver": [0, 1]}, "Liver", "expected {"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_tables_that_do_not_fit(what, tmp_path, monkeypatch, capsys):
    more, name, message = REFUSED[what]
    tables = Path(tmp_path / "labels.json")
    tables.write_text(json.dumps(json.loads(TABLES.read_text()) | more))
    task(tmp_path / "raw", name, None if name in DOWNLOAD else ["background", "a"])
    arguments = "msd", tmp_path / "raw", "--labels", tables, "--out", tmp_path / "out"
    code, said, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and said == "" and error.count("\n") == 1, error
    assert message in error and str(tables) in error, error
    assert not (tmp_path / "out").exists()


def test_a_file_of_tables_that_is_none(tmp_path, monkeypatch, capsys):
    write_btcv(tmp_path / "raw")
    (tmp_path / "labels.json").write_text("[1, 2")
    for name, message in ("labels.json", "expected {"), ("none.json", "No such file"):
        arguments = "btcv", tmp_path / "raw", "--labels", tmp_path / name, "--out", tmp_path / "o"
        code, said, error = command(monkeypatch, capsys, prepare, *arguments)
        assert code == 2 and said == "" and error.count("\n") == 1 and message in error, error
        assert name in error and not (tmp_path / "o").exists()
