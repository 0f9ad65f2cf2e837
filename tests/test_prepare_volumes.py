"""prepare.py msd, btcv and demo-volumes, on downloads made here with volumes of a few voxels."""

import gzip
import json
import os
import re
import subprocess
import sys
import tarfile
import unicodedata

import nibabel
import numpy as np
import pytest
from conftest import ROOT, command, contents, stop_at_rename, zipped

import prepare
from imaging import layouts
from preparation import volume_sets

LISTS = "training", "validation", "test"


def write_volume(path, shape=(4, 5, 6), value=0, affine=None):
    """A NIfTI file, by default LAS as the Decathlon's CT, 0.8x0.8x5 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, 0.8, 5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.int16), affine), path)


def write_task(root, count=20, bare=3, channels=None, modality=("CT",)):
    """A task of the Decathlon: its own names and numbers with gaps, and macOS's ._ files."""
    names = [f"spleen_{3 * k}.nii.gz" for k in range(1, count + 1)]
    for k, name in enumerate(names):
        shape = (4, 5, 6 + k % 3)
        write_volume(root / "imagesTr" / name, shape + ((channels,) if channels else ()), 100 + k)
        write_volume(root / "labelsTr" / name, shape, k % 2)
        (root / "imagesTr" / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    tests = [f"./imagesTs/spleen_{3 * k + 1}.nii.gz" for k in range(bare)]
    for name in tests:
        write_volume(root / name, (4, 5, 6) + ((channels,) if channels else ()))
    (root / "._dataset.json").write_bytes(b"\x00\x05\x16\x07")
    pairs = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    about = {
        "name": "Spleen", "description": "Spleen Segmentation", "licence": "CC-BY-SA 4.0",
        "release": "1.0 06/08/2018", "tensorImageSize": "4D" if channels else "3D",
        "modality": dict(enumerate(modality)), "labels": {"0": "background", "1": "spleen"},
        "numTraining": count, "numTest": bare, "training": pairs, "test": tests,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def write_btcv(root, numbers=(*range(1, 11), *range(21, 41)), tests=(61, 62)):
    for k in numbers:
        write_volume(root / "Training" / "img" / f"img{k:04}.nii.gz", value=k)
        write_volume(root / "Training" / "label" / f"label{k:04}.nii.gz", value=k % 14)
    for k in tests:
        write_volume(root / "Testing" / "img" / f"img{k:04}.nii.gz", value=k)
    (root / "Training" / "img" / "._img0001.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    return root


def run(*arguments):
    assert prepare.main([str(x) for x in arguments]) == 0
    return json.loads((arguments[-1] / "dataset.json").read_text())


def labelled(found):
    """{split: [image, ...]} of a dataset.json's labelled entries."""
    return {
        name: [item["image"] for item in found[name] if isinstance(item, dict)] for name in LISTS
    }


def numbers(images):
    return [int(re.search(r"(\d+)\.nii", image)[1]) for image in images]


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("msd") / "Task09_Spleen")


# --- msd -----------------------------------------------------------------------------------------


def test_a_task_is_divided(task, tmp_path, capsys):
    found = run("msd", task, "--out", tmp_path / "out")
    splits, official = labelled(found), json.loads((task / "dataset.json").read_text())
    assert [len(splits[name]) for name in LISTS] == [14, 3, 3]  # 70, 15 and 15 % of 20
    together = sum(map(numbers, splits.values()), [])
    assert sorted(together) == [3 * k for k in range(1, 21)]
    assert found["test"][3:] == official["test"]  # without labels: as they were
    for key in official.keys() - {"training", "test", "numTraining", "numTest"}:
        assert found[key] == official[key]
    assert (found["numTraining"], found["numValidation"], found["numTest"]) == (14, 3, 6)
    listed = set()
    for name in LISTS:
        for item in found[name]:
            listed |= set(item.values()) if isinstance(item, dict) else {item}
            if isinstance(item, dict):
                folder, file = item["image"].removeprefix("./").split("/")
                assert folder == ("imagesTs" if name == "test" else "imagesTr")
                assert item["label"] == f"./{folder.replace('images', 'labels')}/{file}"
                for kind in "image", "label":  # image and label of one case, not of two
                    ours, theirs = tmp_path / "out" / item[kind], task / f"{kind}sTr" / file
                    assert os.path.samefile(ours, theirs)
    assert files(tmp_path / "out") == {
        "dataset.json", "README.txt", *(name.removeprefix("./") for name in listed),
    }  # fmt: skip
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'out'}: " + (tmp_path / "out" / "README.txt").read_text()
    for line in (
        "train: 14 volumes", "val: 3 volumes",
        "test: 3 volumes, and 3 without labels, for predict.py imagesTs",
        "classes: 1 spleen", "stored axes point to: LAS in 23", volume_sets.LINKED,
        "voxels: 4 to 4, 5 to 5, 6 to 8 (to the right, front, head)", "channels: 1",
        "their size in mm: 0.80 to 0.80, 0.80 to 0.80, 5.00 to 5.00",
    ):  # fmt: skip
        assert line in said.splitlines()


def test_the_reading_side_sees_the_splits(task, tmp_path):
    run("msd", task, "--out", tmp_path / "out")
    counts = {s: len(layouts.read_entries(tmp_path / "out", s)) for s in ("train", "val", "test")}
    assert counts == {"train": 14, "val": 3, "test": 3}


def test_the_seed_deals(task, tmp_path):
    dealt = [labelled(run("msd", task, "--seed", s, "--out", tmp_path / f"{k}")) for k, s in
             enumerate((0, 0, 1))]  # fmt: skip
    assert dealt[0] == dealt[1] != dealt[2]


def test_a_tar_gives_what_its_folder_gives(task, tmp_path):
    for k, top in enumerate(("Task09_Spleen", ".", "./Task09_Spleen")):
        with tarfile.open(tmp_path / "task.tar", "w") as tar:
            tar.add(task, top)
        run("msd", tmp_path / "task.tar", "--out", tmp_path / f"tar{k}")
    run("msd", task, "--out", tmp_path / "folder")
    tars, folder = [contents(tmp_path / f"tar{k}") for k in range(3)], contents(tmp_path / "folder")
    readme = folder["README.txt"].decode().replace(f"{volume_sets.LINKED}\n", "").encode()
    assert tars == [folder | {"README.txt": readme}] * 3


def test_four_dimensions_stay(tmp_path, capsys):
    root = write_task(tmp_path / "Task05_Prostate", 4, channels=2, modality=("T2", "ADC"))
    found = run("msd", root, "--out", tmp_path / "out")
    assert found["modality"] == {"0": "T2", "1": "ADC"} and found["tensorImageSize"] == "4D"
    for name in LISTS:
        item = found[name][0]
        assert nibabel.load(tmp_path / "out" / item["image"]).shape[3:] == (2,)
        assert nibabel.load(tmp_path / "out" / item["label"]).ndim == 3
    assert "channels: 2" in capsys.readouterr().out


def test_copied_where_there_are_no_links(task, tmp_path, monkeypatch):
    run("msd", task, "--out", tmp_path / "linked")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found = run("msd", task, "--out", tmp_path / "copied")
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    one = found["training"][0]["image"]
    assert not os.path.samefile(tmp_path / "copied" / one, task / one)


def test_a_link_is_followed(task, tmp_path):
    """As in a cache whose files are links: what is linked is the file."""
    for name in files(task):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).symlink_to(task / name)
    found = run("msd", tmp_path / "cache", "--out", tmp_path / "out")
    path = tmp_path / "out" / found["training"][0]["image"]
    assert not path.is_symlink() and os.path.samefile(path, task / found["training"][0]["image"])


@pytest.mark.parametrize("packed", [True, False])
def test_names_of_other_unicode_forms_are_the_same(tmp_path, packed):
    """dataset.json holds ä as one character, the disk as two, as macOS writes it."""
    root = write_task(tmp_path / "task", count=4, bare=0)
    about = (root / "dataset.json").read_text().replace("spleen_", "Läsion_")
    (root / "dataset.json").write_text(unicodedata.normalize("NFC", about))
    for path in [*root.glob("*Tr/spleen_*")]:
        name = path.name.replace("spleen_", "Läsion_")
        path.rename(path.with_name(unicodedata.normalize("NFD", name)))
    raw = root
    if packed:
        raw = tmp_path / "task.tar"
        with tarfile.open(raw, "w") as tar:
            tar.add(root, "task")
    found = run("msd", raw, "--out", tmp_path / "out")
    assert sum(found[f"num{name.title()}"] for name in LISTS) == 4
    layouts.check_files_exist(layouts.read_entries(tmp_path / "out", "train"))


def test_the_download_is_left_alone(task, tmp_path):
    before = contents(task)
    run("msd", task, "--out", tmp_path / "out")
    assert contents(task) == before


def edit(root, change):
    about = json.loads((root / "dataset.json").read_text())
    change(about)
    (root / "dataset.json").write_text(json.dumps(about))


def lose(root, name):
    (root / name).unlink()


DEFECTS = {
    "no list": (lambda r: lose(r, "dataset.json"), "no dataset.json in it; DOWNLOAD is one task"),
    "image": (lambda r: lose(r, "imagesTr/spleen_9.nii.gz"), "no imagesTr/spleen_9.nii.gz, which"),
    "label": (lambda r: lose(r, "labelsTr/spleen_9.nii.gz"), "no labelsTr/spleen_9.nii.gz, which"),
    "text": (lambda r: (r / "dataset.json").write_text("{"), "dataset.json: is not valid JSON"),
    "keys": (
        lambda r: edit(r, lambda a: a.pop("labels")),
        "dataset.json: has no 'labels'; expected",
    ),
    "out": (
        lambda r: edit(r, lambda a: a["training"][0].update(image="../imagesTr/a.nii.gz")),
        "'../imagesTr/a.nii.gz' is no volume in imagesTr",
    ),
    "twice": (
        lambda r: edit(r, lambda a: a["training"].append(a["training"][0])),
        "an image is listed twice",
    ),
    "gap": (lambda r: edit(r, lambda a: a["labels"].update({"3": "x"})), "without a gap; expected"),
    "direction": (
        lambda r: edit(r, lambda a: a.update(labels={"background": 0, "spleen": 1})),
        "dataset.json: the labels are not 0, 1, 2, … without a gap; expected",
    ),
    "divided": (
        lambda r: edit(r, lambda a: a.update(validation=a["training"][:1])),
        "lists a validation split",
    ),
    "few": (
        lambda r: edit(r, lambda a: a.update(training=a["training"][:3])),
        "3 labelled volumes, val would be empty",
    ),
    "sizes": (
        lambda r: write_volume(r / "labelsTr" / "spleen_6.nii.gz", (4, 5, 2)),
        "label spleen_6.nii.gz: (4, 5, 2) voxels, but image spleen_6.nii.gz has (4, 5, 7)",
    ),
    "no volume": (
        lambda r: (r / "imagesTr" / "spleen_6.nii.gz").write_bytes(gzip.compress(b"x" * 999)),
        "image spleen_6.nii.gz: ",
    ),
    "empty": (
        lambda r: (r / "labelsTr" / "spleen_6.nii.gz").write_bytes(b""),
        "label spleen_6.nii.gz: not readable as NIfTI",
    ),
    "flat": (
        lambda r: write_volume(r / "imagesTr" / "spleen_6.nii.gz", (4, 5)),
        "image spleen_6.nii.gz: ",
    ),
}


def flip(path):
    """Change a bit of the checksum, far behind what a reader of the header comes across."""
    data = bytearray(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**21)))
    data[-6] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["imagesTr/spleen_6.nii.gz", "labelsTr/spleen_9.nii.gz", "imagesTs/spleen_1.nii.gz"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_volumes_are_not_taken_over(tmp_path, monkeypatch, capsys, name, packed):
    source = write_task(tmp_path / "raw", 5)
    flip(source / name)
    if packed:
        source = tmp_path / "raw.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(tmp_path / "raw", "Task09_Spleen")
    arguments = "msd", source, "--out", tmp_path / "out"
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    kind = name.split("sT")[0]
    assert code == 2 and text == "" and error.count("\n") == 1
    assert f"{kind} {name.split('/')[1]}: " in error and "replace the file" in error
    assert not (tmp_path / "out").exists()


def test_what_is_said_of_volumes_is_one_line(tmp_path, monkeypatch, capsys):
    source = write_task(tmp_path / "raw", 5)
    for path in sorted((source / "imagesTr").glob("spleen*")):
        path.write_bytes(path.read_bytes() + b"more")
    arguments = "msd", source, "--out", tmp_path / "out"
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 0, error
    (line,) = [line for line in text.splitlines() if "bytes after the end" in line]
    assert line.count(str(tmp_path / "out" / "images")) == 3 and " and 2 more: " in line


def test_label_numbers_of_a_table_are_whole(tmp_path, monkeypatch, capsys):
    source, table = write_task(tmp_path / "raw", 5), tmp_path / "labels.json"
    table.write_text(json.dumps({"Spleen": {"background": 0, "spleen": 1.5}}))
    arguments = "msd", source, "--labels", table, "--out", tmp_path / "out"
    code, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and error.count("\n") == 1
    assert "labels.json" in error and "label spleen is 1.5; it must be a whole number" in error


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, defect):
    root = write_task(tmp_path / "raw", 5)
    harm, said = DEFECTS[defect]
    harm(root)
    code, text, error = command(
        monkeypatch, capsys, prepare, "msd", root, "--out", tmp_path / "out"
    )
    assert code == 2 and text == "" and error.count("\n") == 1 and said in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_defects_of_a_tar(task, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(task, "Task09_Spleen")
    half, zipped = tmp_path / "half.tar", tmp_path / "task.tar.gz"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    zipped.write_bytes(gzip.compress(whole.read_bytes()))
    for path in half, zipped, tmp_path / "none.tar":
        code, text, error = command(
            monkeypatch, capsys, prepare, "msd", path, "--out", tmp_path / "out"
        )
        assert code == 2 and text == "" and error.count("\n") == 1
        assert ("no such folder" if path.name == "none.tar" else "not a whole .tar file") in error
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 3


# --- btcv ----------------------------------------------------------------------------------------


def test_damaged_volumes_of_btcv(tmp_path, monkeypatch, capsys):
    root = write_btcv(tmp_path / "RawData")
    flip(root / "Training" / "label" / "label0022.nii.gz")
    arguments = "btcv", root, "--out", tmp_path / "out"
    code, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and "label label0022.nii.gz: " in error and "replace the file" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_btcv(tmp_path_factory.mktemp("btcv") / "RawData")


def test_the_split_of_swin_unetr(raw, tmp_path, capsys):
    found = run("btcv", raw, "--out", tmp_path / "out")
    splits = {name: numbers(images) for name, images in labelled(found).items()}
    train = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34]
    assert splits == {"training": train, "validation": [35, 36, 37, 38, 39, 40], "test": []}
    assert found["test"] == ["./imagesTs/img0061.nii.gz", "./imagesTs/img0062.nii.gz"]
    names = list(found["labels"].values())
    assert names[:4] == ["background", "spleen", "right kidney", "left kidney"]
    assert names[6] == "liver" and names[13] == "left adrenal gland" and len(names) == 14
    for item in found["training"] + found["validation"]:
        k = numbers([item["image"]])[0]
        assert item == {
            "image": f"./imagesTr/img{k:04}.nii.gz", "label": f"./labelsTr/label{k:04}.nii.gz",
        }  # fmt: skip
        image, label = (nibabel.load(tmp_path / "out" / item[n]) for n in ("image", "label"))
        assert image.get_fdata()[0, 0, 0] == k and label.get_fdata()[0, 0, 0] == k % 14
    assert nibabel.load(tmp_path / "out" / found["test"][1]).get_fdata()[0, 0, 0] == 62
    assert len(files(tmp_path / "out")) == 2 * 30 + 2 + 2
    said = capsys.readouterr().out
    assert "split of Swin UNETR" in said and "no test split" in said
    assert "val: 6 volumes" in said and "test: 0 volumes, and 2 without labels" in said


def test_btcv_dealt_by_case(raw, tmp_path):
    found = run("btcv", raw, "--split", "case", "--seed", 3, "--out", tmp_path / "out")
    splits = {name: numbers(images) for name, images in labelled(found).items()}
    assert {name: len(found) for name, found in splits.items()} == {
        "training": 21, "validation": 4, "test": 5,
    }  # fmt: skip
    assert sorted(sum(splits.values(), [])) == [*range(1, 11), *range(21, 41)]
    assert splits["validation"] != [35, 36, 37, 38]
    for item in found["test"][:5]:
        k = numbers([item["image"]])[0]
        assert item["label"] == f"./labelsTs/label{k:04}.nii.gz"
        assert nibabel.load(tmp_path / "out" / item["image"]).get_fdata()[0, 0, 0] == k


BTCV_DEFECTS = {
    "empty": (lambda r: [p.unlink() for p in r.rglob("*.gz")], "DOWNLOAD is RawData.zip"),
    "label": (lambda r: lose(r, "Training/label/label0021.nii.gz"), "case 0021 is not whole"),
    "case": (
        lambda r: [lose(r, f"Training/{k}/{k}0021.nii.gz") for k in ("img", "label")],
        "img0021.nii.gz is missing",
    ),
    "more": (lambda r: write_btcv(r, [41]), "img0041.nii.gz is none of these"),
}


@pytest.mark.parametrize("defect", BTCV_DEFECTS)
def test_defects_of_btcv(tmp_path, monkeypatch, capsys, defect):
    harm, said = BTCV_DEFECTS[defect]
    harm(write_btcv(tmp_path / "raw"))
    arguments = "btcv", tmp_path / "raw", "--out", tmp_path / "out"
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1 and said in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# --- demo-volumes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo_volumes"
    return out, run("demo-volumes", "--volumes", 12, "--out", out)


@pytest.fixture(scope="module")
def volumes(demo_set):
    """(image, label) of every labelled entry, as nibabel has them."""
    root, found = demo_set
    items = [item for name in LISTS for item in found[name]]
    return [(nibabel.load(root / item["image"]), nibabel.load(root / item["label"]))
            for item in items]  # fmt: skip


def test_demo_splits(demo_set, volumes):
    root, found = demo_set
    assert [len(found[name]) for name in LISTS] == [8, 2, 2] and len(volumes) == 12
    assert files(root) == {
        "dataset.json", "README.txt",
        *(item[kind][2:] for name in LISTS for item in found[name] for kind in ("image", "label")),
    }  # fmt: skip
    assert found["modality"] == {"0": "CT"} and list(found["labels"].values()) == [
        "background", "spleen", "right kidney", "left kidney", "liver", "aorta",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in root.rglob("*.gz")) < 12e6


def test_demo_headers(volumes):
    stored, sizes, spacings = set(), set(), set()
    for image, label in volumes:
        assert np.array_equal(image.affine, label.affine) and image.shape == label.shape
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert image.header["qform_code"] + image.header["sform_code"] > 0
        stored.add("".join(nibabel.aff2axcodes(image.affine)))
        sizes.add(image.shape)
        spacings.add(tuple(np.round(image.header.get_zooms(), 3)))
        assert all(52 <= n <= 77 for n in image.shape)
        assert all(2.7 < mm < 4.4 for mm in image.header.get_zooms())
    assert stored == {"RAS", "LPS", "LAS"} and len(sizes) > 3 and len(spacings) > 3


def middle(label, number):
    """Centre of a class in mm, to the right, front and head; None if it is not there."""
    voxels = np.argwhere(np.asarray(label.dataobj) == number)
    return nibabel.affines.apply_affine(label.affine, voxels).mean(0) if len(voxels) else None


def test_demo_anatomy(volumes):
    """Right is right in the world of every file, however it is stored."""
    absent = 0
    for _image, label in volumes:
        spleen, right, left, liver, aorta = (middle(label, k) for k in range(1, 6))
        absent += sum(x is None for x in (spleen, right, left))
        assert liver[0] > 15 and abs(aorta[0]) < 20
        assert spleen is None or spleen[0] < -30
        assert right is None or right[0] > 20 and right[2] < liver[2] and right[1] < 0
        assert left is None or left[0] < -20 and left[1] < 0
        sizes = np.bincount(np.asarray(label.dataobj).ravel(), minlength=6)
        assert len(sizes) == 6 and sizes[4] > 2 * sizes[1] and all(sizes[[4, 5]] > 300)
    assert 0 < absent < 12


def test_demo_looks_like_ct(volumes):
    for image, label in volumes:
        pixels, classes = np.asarray(image.dataobj), np.asarray(label.dataobj)
        corner = [pixels[x, y, z] for x in (0, -1) for y in (0, -1) for z in (0, -1)]
        assert np.mean(corner) < -950 and pixels.min() >= -1024
        assert (pixels > 250).sum() > 1000 and not classes[pixels > 350].any()  # bone
        assert ((pixels > -140) & (pixels < -60)).mean() > 0.03  # fat
        assert 60 < pixels[classes == 4].mean() < 140  # liver
        for kidney in 2, 3:
            if (classes == kidney).any():
                assert 90 < pixels[classes == kidney].mean() < 210


def test_demo_is_more_than_a_threshold(volumes):
    """The best interval of grey values, chosen with the truth, does not find the organs."""
    edges = np.arange(-200, 405, 5)
    for k in range(1, 6):
        inside, all_ = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
        for image, label in volumes:
            pixels, is_k = np.asarray(image.dataobj), np.asarray(label.dataobj) == k
            inside += np.histogram(pixels[is_k], edges)[0]
            all_ += np.histogram(pixels, edges)[0]
        a, b = (np.concatenate([[0], x.cumsum()]) for x in (inside, all_))
        dice = 2 * (a - a[:, None]) / (b - b[:, None] + inside.sum())
        assert np.triu(dice, 1).max() < 0.75


def test_demo_same_seed_same_bytes(demo_set, tmp_path):
    run("demo-volumes", "--volumes", 3, "--out", tmp_path / "a")
    run("demo-volumes", "--volumes", 3, "--out", tmp_path / "b")
    run("demo-volumes", "--volumes", 3, "--seed", 1, "--out", tmp_path / "c")
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and len(a) == 8
    assert all(a[name] != c[name] for name in a if name.endswith(".gz"))
    image = "imagesTr/ct_001.nii.gz"
    assert a[image] == (demo_set[0] / image).read_bytes()  # also in a larger set
    assert all(a[name][4:8] == bytes(4) for name in a if name.endswith(".gz"))  # gzip's time


def test_demo_of_too_few(tmp_path, monkeypatch, capsys):
    for wrong in ["--volumes", 2], ["--volumes", "x"], ["--seed", -1]:
        arguments = "demo-volumes", "--out", tmp_path / "out", *wrong
        code, text, error = command(monkeypatch, capsys, prepare, *arguments)
        assert code == 2 and text == "" and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- all -----------------------------------------------------------------------------------------


def commands(task, raw):
    return ["msd", task], ["btcv", raw], ["demo-volumes", "--volumes", 3]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["empty folder", "file"])
def test_an_out_that_exists_is_left_alone(task, raw, tmp_path, monkeypatch, capsys, which, kind):
    out = tmp_path / "out"
    out.mkdir() if kind == "empty folder" else out.write_text("mine")
    arguments = *commands(task, raw)[which], "--out", out
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.startswith(f"error: {out}: exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(out.iterdir()) if kind == "empty folder" else out.read_text() == "mine"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_folder_appears_whole_or_not_at_all(task, raw, tmp_path, monkeypatch, capsys, which):
    arguments = commands(task, raw)[which]
    run(*arguments, "--out", tmp_path / "whole")
    whole, moved = contents(tmp_path / "whole"), stop_at_rename(monkeypatch, tmp_path / "out")
    assert command(monkeypatch, capsys, prepare, *arguments, "--out", tmp_path / "out")[0] == 2
    assert moved == [whole] and [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_program_as_the_docstring_has_it(tmp_path):
    arguments = [sys.executable, str(ROOT / "prepare.py"), "demo-volumes", "--volumes", "3"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("data/demo_volumes: synthetic abdominal CT, seed 0")
    assert len(files(tmp_path / "data" / "demo_volumes")) == 8


# --- dataset.json and folders as people have them -------------------------------------------------


def test_a_test_of_objects_is_read(tmp_path, monkeypatch, capsys):
    root = write_task(tmp_path / "raw", 5)
    edit(root, lambda a: a.update(test=[{"image": f".//{name[2:]}"} for name in a["test"]]))
    about = run("msd", root, "--out", tmp_path / "out")
    assert sum(isinstance(case, str) for case in about["test"]) == 3

    edit(root, lambda a: a["test"][0].update(label="./labelsTs/x.nii.gz"))
    arguments = "msd", root, "--out", tmp_path / "no"
    code, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and "the test has labels; train on the task as it is" in error


def test_folders_may_be_links(tmp_path):
    root = write_task(tmp_path / "raw", 5)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "dataset.json").write_bytes((root / "dataset.json").read_bytes())
    for folder in "imagesTr", "labelsTr", "imagesTs":
        (linked / folder).symlink_to(root / folder)
    through_links = run("msd", linked, "--out", tmp_path / "out")
    assert through_links == run("msd", root, "--out", tmp_path / "same")
    assert files(tmp_path / "out") == files(tmp_path / "same")


def test_images_without_labels_that_are_not_there_are_left_out(tmp_path, capsys):
    root = write_task(tmp_path / "raw", 5)
    lose(root, "imagesTs/spleen_1.nii.gz")
    capsys.readouterr()
    run("msd", root, "--out", tmp_path / "out")
    line = f"{root}: 1 of 3 images without labels are missing and are left out, imagesTs/spleen_1"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_texts_of_the_list(tmp_path, monkeypatch, capsys, packed):
    root = write_task(tmp_path / "raw", 5)
    text = (root / "dataset.json").read_text()
    source = root
    contents = {
        "marked": (b"\xef\xbb\xbf" + text.encode(), ""),
        "deep": (b"[" * 100_000, "dataset.json: is nested too deeply"),
        "double": (b'{"labels": 1, "labels": 2}', "the key 'labels' is repeated"),
    }
    for name, (content, message) in contents.items():
        (root / "dataset.json").write_bytes(content)
        if packed:
            source = tmp_path / f"{name}.tar"
            with tarfile.open(source, "w") as tar:
                tar.add(root, "Task09_Spleen")
        arguments = "msd", source, "--out", tmp_path / name
        code, _, error = command(monkeypatch, capsys, prepare, *arguments)
        assert code == (2 if message else 0) and message in error
        assert error.count("\n") == (1 if message else 0)


def test_btcv_from_its_archive(raw, tmp_path, capsys):
    archive = zipped(raw, tmp_path / "RawData.zip")
    ours = run("btcv", archive, "--out", tmp_path / "a")
    assert "hard links" not in capsys.readouterr().out
    assert ours == run("btcv", raw, "--out", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.nii.gz"):
        copy = tmp_path / "a" / path.relative_to(tmp_path / "b")
        assert copy.read_bytes() == path.read_bytes()
