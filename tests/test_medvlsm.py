"""prepare.py kvasir-polyp and so on: the data sets of the medvlsm study from miniature archives."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import threading
from argparse import Namespace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import command, contents
from medvlsm_world import (
    GENERAL,
    blob,
    encoded,
    item,
    picture,
    polyp_prompts,
    shares,
    write_annotations,
    write_files,
    write_zip,
)
from PIL import Image

import prepare
import train
from imaging import layouts
from preparation import medvlsm
from preparation.busi import BUSI
from preparation.camus import CAMUS, Info, make_prompts, number_words, parts_of
from preparation.chexlocalize import CHEXLOCALIZE
from preparation.isic import DFU, ISIC
from preparation.polyps import CVC300, POLYP_SETS, find_denials

KVASIR_NAMES = [f"cju{n}k00003n{n}99dr2w9i7c.jpg" for n in (5, 1, 9, 0, 3, 7, 2, 8)]
IGNORED = {"__MACOSX/Kvasir-SEG/._images": b"x", "Kvasir-SEG/kavsir_bboxes.json": b"{}"}


def kvasir(stray=0):
    """The archive's files and the study's entries; masks are grey JPEG files of three channels."""
    files, items = dict(IGNORED), []
    for seed, name in enumerate(KVASIR_NAMES):
        mask, box = blob(seed)
        files[f"Kvasir-SEG/images/{name}"] = encoded(picture(seed), "jpg")
        files[f"Kvasir-SEG/masks/{name}"] = encoded(np.repeat(mask[..., None], 3, 2) * WHITE, "jpg")
        items.append(item(name, name, box, polyp_prompts()))
    return files, items


WHITE = np.uint8(255)


def convert(name, raw, annotations, out, *options) -> None:
    paths = raw if isinstance(raw, list) else [raw]
    arguments = [name, "--raw", *map(str, paths), "--annotations", str(annotations)]
    assert prepare.main([*arguments, "--out", str(out), *options]) == 0


def check(folder) -> None:
    """`prepare.py check` without findings."""
    assert prepare.main(["check", str(folder)]) == 0


def refused(run, name, raw, annotations, out, *options) -> str:
    """The line that a refused command prints; nothing is written."""
    paths = raw if isinstance(raw, list) else [raw]
    before = sorted(out.parent.iterdir())
    words = [name, "--raw", *paths, "--annotations", annotations, "--out", out, *options]
    status, _, err = run(prepare, *words)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(out.parent.iterdir()) == before
    return err


@pytest.fixture
def run(monkeypatch, capsys):
    return partial(command, monkeypatch, capsys)


def entries(folder, split) -> list:
    return json.loads((folder / "anns" / f"{split}.json").read_text())


def mask_of(folder, name) -> np.ndarray:
    """A mask as it is stored: only 0 and 255, one channel."""
    image = Image.open(folder / "masks" / name)
    pixels = np.asarray(image)
    assert image.format == "PNG" and image.mode == "L" and set(np.unique(pixels)) <= {0, 255}
    return pixels == 255


# --- Kvasir-SEG -----------------------------------------------------------------------------------


def test_kvasir(tmp_path, capsys):
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    study = write_annotations(tmp_path / "medvlsm/data/kvasir_polyp/anns", shares(items))
    convert("kvasir-polyp", raw, tmp_path / "medvlsm", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "train: 4 annotations, but the study's file has 800" in printed

    out = tmp_path / "out"
    for seed, name in enumerate(KVASIR_NAMES):
        assert (out / "images" / name).read_bytes() == files[f"Kvasir-SEG/images/{name}"]
        assert (mask_of(out, f"{Path(name).stem}.png") == blob(seed)[0]).all()
    assert [entry["img_name"] for entry in entries(out, "train")] == KVASIR_NAMES[:4]
    first = entries(out, "test")[0]
    assert first == {
        "img_name": KVASIR_NAMES[-2],
        "mask_name": f"{Path(KVASIR_NAMES[-2]).stem}.png",
        "prompts": polyp_prompts(),
    }
    source = json.loads((out / "source.json").read_text())
    assert source["source"] == "https://datasets.simula.no/kvasir-seg"
    assert "medvlsm" in source["published_split"] and source["archives"] == ["kvasir-seg.zip"]
    assert (
        (out / "README.txt").read_text().startswith("Kvasir-SEG, polyps in colonoscopy\ntrain: 4")
    )
    names = {path.name for path in out.iterdir()}
    assert names == {"images", "masks", "anns", "source.json", "README.txt"}
    check(out)

    # The same from the unpacked folder, one level up and down, from a tar, spelled with _.
    folder = write_files(tmp_path / "download", files)
    with tarfile.open(tmp_path / "kvasir.tar.gz", "w:gz") as archive:
        archive.add(folder / "Kvasir-SEG", "Kvasir-SEG")
    forms = [folder, folder / "Kvasir-SEG", tmp_path / "kvasir.tar.gz"]
    for number, (path, anns) in enumerate(zip(forms, (study, study.parent, study), strict=True)):
        other = tmp_path / f"out{number}"
        convert("kvasir_polyp", path, anns, other)
        same = contents(out) | {"source.json": contents(other)["source.json"]}
        assert contents(other) == same


def test_running_numbers_of_2023(tmp_path):
    """The form of 2023: files renamed in the order of their names, testA.json, keys such as P0."""
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    write_annotations(tmp_path / "anns", shares(items))
    convert("kvasir-polyp", raw, tmp_path / "anns", tmp_path / "now")

    older = {}
    for split, split_items in shares(items).items():
        older[split] = []
        for entry in split_items:
            number = sorted(KVASIR_NAMES).index(entry["img_name"])
            prompts = {key.upper(): value for key, value in entry["prompts"].items()}
            names = {"img_name": f"{number}.jpg", "mask_name": f"{number}.png"}
            older[split].append(entry | names | {"prompts": prompts})
    older = {"train": older["train"], "val": older["val"], "testA": older["test"]}
    folder = tmp_path / "medvlsm2023/datasets/anns/kvasir_polyp_80_10_10"
    write_annotations(folder, older | {"testB": older["testA"]})
    convert("kvasir-polyp", raw, tmp_path / "medvlsm2023", tmp_path / "older")
    for split in ("train", "val", "test"):
        assert entries(tmp_path / "older", split) == entries(tmp_path / "now", split)
    assert not (tmp_path / "older/anns/testB.json").exists()

    older["train"][0]["img_name"] = "8.jpg"
    write_annotations(folder, older)
    with pytest.raises(ValueError, match=r"has 8 images, but the annotations of 2023 name 8.jpg"):
        convert("kvasir-polyp", raw, folder, tmp_path / "third")


def test_what_is_refused(tmp_path, run):
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    anns = write_annotations(tmp_path / "anns", shares(items))
    out = tmp_path / "new/out"
    out.parent.mkdir()
    say = partial(refused, run, "kvasir-polyp")

    # archives that are missing, cut off, of another data set, or lack a file
    assert "a.zip: no such archive or folder" in say(tmp_path / "a.zip", anns, out)
    (tmp_path / "cut.zip").write_bytes(raw.read_bytes()[:3000])
    assert "cut.zip: listing its members failed" in say(tmp_path / "cut.zip", anns, out)
    other = write_zip(tmp_path / "other.zip", {"PNG/Original/1.png": b"", "PNG/x/1.png": b""})
    err = say(other, anns, out)
    assert "no folder Kvasir-SEG/images" in err and "other.zip holds 2 .png in PNG" in err
    less = {name: content for name, content in files.items() if "cju9k" not in name}
    err = say(write_zip(tmp_path / "less.zip", less), anns, out)
    assert "less.zip: Kvasir-SEG/images: lacks 1 (cju9k00003n999dr2w9i7c) of 8 files" in err

    # files that are damaged
    for place, content in (("images", b"\xff\xd8\xff"), ("masks", b"no image")):
        name = f"Kvasir-SEG/{place}/{KVASIR_NAMES[2]}"
        path = write_zip(tmp_path / "damaged.zip", files | {name: content})
        assert f"damaged.zip: {name}: not readable as an image" in say(path, anns, out)
    label_map = encoded(np.eye(48, 64, dtype=np.uint8) * 3, "png")
    name = f"Kvasir-SEG/masks/{KVASIR_NAMES[2]}"
    err = say(write_zip(tmp_path / "labels.zip", files | {name: label_map}), anns, out)
    assert f"labels.zip: {name}: holds values up to 3; expected a mask of 0 and 255" in err

    # masks of other images
    shifted = dict(files)
    for first, second in zip(KVASIR_NAMES, KVASIR_NAMES[1:] + KVASIR_NAMES[:1], strict=True):
        shifted[f"Kvasir-SEG/masks/{first}"] = files[f"Kvasir-SEG/masks/{second}"]
    err = say(write_zip(tmp_path / "shifted.zip", shifted), anns, out)
    assert "this is the archive or the annotations of another data set" in err

    # annotations that are missing, damaged or of another form
    assert "no annotation files of kvasir_polyp, such as data" in say(raw, out.parent, out)
    (anns / "val.json").unlink()
    assert "val.json: no such annotation file, but others are there" in say(raw, anns, out)
    for content, message in (
        ("[", "val.json: is not valid JSON"),
        ("{}", "val.json: holds an object; expected a list"),
        ('[{"img_name": "a"}]', "val.json, entry 0: has no 'mask_name'; expected a list"),
        (json.dumps([items[0] | {"img_name": "../a"}]), "leaves its folder"),
        (json.dumps([items[0] | {"prompts": {"p1": 1}}]), "prompt p1 is neither a text nor a list"),
        (json.dumps([items[0] | {"prompts": []}]), "entry 0: prompts are a list"),
        (json.dumps([items[0] | {"bbox": [0, 0, float("inf"), 1]}]), "entry 0: cannot convert"),
    ):
        (anns / "val.json").write_text(content)
        assert message in say(raw, anns, out)

    write_annotations(anns, {"train": [], "val": [], "test": []})
    assert "the files list no images" in say(raw, anns, out)

    # outputs
    write_annotations(anns, shares(items))
    folder = write_files(tmp_path / "download", files)
    assert "lies within" in refused(run, "kvasir-polyp", folder, anns, folder / "out")
    out.mkdir()
    (out / "a").write_text("")
    assert "exists already" in say(raw, anns, out)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([[0, 127, 128, 255]], [[False, False, True, True]]),
        ([[[0, 0, 0], [127, 127, 127], [0, 128, 0], [255, 0, 0]]], [[False, False, True, True]]),
        ([[0, 0]], [[False, False]]),
        ([[False, True]], [[False, True]]),
    ],
)
def test_the_rule_of_masks(pixels, expected, tmp_path):
    values = np.array(pixels)
    image = values if values.dtype == bool else values.astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert medvlsm.binary_mask(tmp_path / "a.png").tolist() == expected


def test_killed_and_run_again(tmp_path, monkeypatch):
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    anns = write_annotations(tmp_path / "anns", shares(items))
    convert("kvasir-polyp", raw, anns, tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(medvlsm, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert("kvasir-polyp", raw, anns, tmp_path / "out")
    part = tmp_path / ".out.part"  # what kill -9 leaves
    write_files(part, {"images/old.png": b"x", ".members/0.png": b"x"})
    convert("kvasir-polyp", raw, anns, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not part.exists()


# --- annotations from the internet ----------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A local server instead of raw.githubusercontent.com: its folder and the paths it was sent."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **details):
            super().__init__(*arguments, directory=str(tmp_path / "site"), **details)

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(medvlsm, "RAW", f"http://127.0.0.1:{server.server_port}")
    yield tmp_path / "site", requests
    server.shutdown()
    server.server_close()


def test_annotations_are_downloaded_once(tmp_path, site, run):
    folder, requests = site
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    address = f"{medvlsm.COMMIT}/data/kvasir_polyp/anns"
    write_annotations(folder / address, shares(items))
    arguments = ["kvasir-polyp", "--raw", raw, "--cache", tmp_path / "cache", "--out"]

    status, out, _ = run(prepare, *arguments, tmp_path / "out")
    assert status == 0
    assert f"{medvlsm.RAW}/{address}/test.json, licence MIT" in out
    assert requests == [f"/{address}/{split}.json" for split in ("train", "val", "test")]
    assert [entry["img_name"] for entry in entries(tmp_path / "out", "train")] == KVASIR_NAMES[:4]

    shutil.rmtree(folder)
    (tmp_path / "cache/medvlsm" / medvlsm.COMMIT / "kvasir_polyp/.val.json.0123abcd").write_text(
        "x"
    )
    status, out, _ = run(prepare, *arguments, tmp_path / "again")
    assert status == 0 and "downloading" not in out and len(requests) == 3
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert not list((tmp_path / "cache").rglob(".*"))  # what a killed download left


def test_without_internet(tmp_path, site, run, monkeypatch):
    folder, _ = site
    raw = write_zip(tmp_path / "kvasir-seg.zip", kvasir()[0])
    arguments = ["kvasir-polyp", "--raw", raw, "--cache", tmp_path / "cache", "--out"]
    status, _, err = run(prepare, *arguments, tmp_path / "out")
    assert status == 2 and err.count("\n") == 1
    assert "train.json: could not be downloaded (HTTP Error 404" in err
    assert "give its folder with --annotations" in err

    address = folder / medvlsm.COMMIT / "data/kvasir_polyp/anns"
    write_files(address, {"train.json": b"<html>log in</html>"})
    status, _, err = run(prepare, *arguments, tmp_path / "out")
    assert status == 2 and "train.json: is not valid JSON" in err

    monkeypatch.setattr(medvlsm, "RAW", "http://127.0.0.1:9")
    status, _, err = run(prepare, *arguments, tmp_path / "out")
    assert status == 2 and "could not be downloaded (<urlopen error" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


# --- the other polyp sets -------------------------------------------------------------------------


def clinicdb(names=range(1, 13)):
    """Kaggle's files of ClinicDB: frames 1 to 12 of four sequences, and the study's entries."""
    files, items = {}, []
    rows = ["frame_id,sequence_id,png_image_path,png_mask_path,tif_image_path,tif_mask_path"]
    for n in names:
        mask, box = blob(n)
        image = picture(100 + n)
        files[f"PNG/Original/{n}.png"] = encoded(image, "png")
        files[f"PNG/Ground Truth/{n}.png"] = encoded(mask * WHITE, "png")
        files[f"TIF/Original/{n}.tif"] = tiff(image)
        files[f"TIF/Ground Truth/{n}.tif"] = encoded(mask * WHITE, "tif")
        paths = [f"/{kind}/{n}.{ending}" for kind, ending in CLINICDB_PATHS]
        rows.append(",".join([str(n), str((n - 1) // 3 + 1), *paths]))
        items.append(item(f"{n}.png", f"{n}.png", box, polyp_prompts()))
    files["metadata.csv"] = "\n".join(rows).encode()
    return files, items


CLINICDB_PATHS = (
    ("PNG/Original", "png"),
    ("PNG/Ground Truth", "png"),
    ("TIF/Original", "tif"),
    ("TIF/Ground Truth", "tif"),
)


def tiff(pixels) -> bytes:
    """Three channels that are not marked as colours, as in the original archive."""
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def test_clinicdb(tmp_path, capsys):
    files, items = clinicdb()
    raw = write_zip(tmp_path / "archive.zip", files)
    splits = {"train": items[:6], "val": items[6:9], "test": items[9:]}
    anns = write_annotations(tmp_path / "anns", splits)
    convert("clinicdb-polyp", raw, anns, tmp_path / "out")
    assert "LEAK" not in capsys.readouterr().out
    for n in range(1, 13):
        assert (mask_of(tmp_path / "out", f"{n}.png") == blob(n)[0]).all()
    assert [entry["group"] for entry in entries(tmp_path / "out", "train")] == [*"111222"]
    check(tmp_path / "out")

    mixed = {"train": items[1:11], "val": [], "test": [items[0], items[11]]}
    write_annotations(tmp_path / "mixed", mixed)
    convert("clinicdb-polyp", raw, tmp_path / "mixed", tmp_path / "mixed_out")
    assert "LEAK: 2 of 2 test images are frames of sequences that" in capsys.readouterr().out
    assert not (tmp_path / "mixed_out/anns/val.json").exists()


def test_clinicdb_by_sequence(tmp_path, capsys, run):
    files, items = clinicdb(range(1, 31))
    raw = write_zip(tmp_path / "archive.zip", files)
    anns = write_annotations(tmp_path / "anns", shares(items))
    convert("clinicdb-polyp", raw, anns, tmp_path / "out", "--split", "sequence")
    sequences = {}
    for split in ("train", "val", "test"):
        found = entries(tmp_path / "out", split)
        sequences[split] = {(int(entry["img_name"][:-4]) - 1) // 3 + 1 for entry in found}
        assert len(found) == 3 * len(sequences[split])
    assert {split: len(groups) for split, groups in sequences.items()} == SEQUENCE_COUNTS
    assert set.union(*sequences.values()) == set(range(1, 11))
    source = json.loads((tmp_path / "out/source.json").read_text())
    assert source["split"].startswith("sequences at random") and "published_split" not in source
    assert "LEAK" not in capsys.readouterr().out

    del files["metadata.csv"]
    raw = write_zip(tmp_path / "other.zip", files)
    err = refused(run, "clinicdb-polyp", raw, anns, tmp_path / "none", "--split", "sequence")
    assert "other.zip has no metadata.csv that tells the sequence of each frame" in err


SEQUENCE_COUNTS = {"train": 8, "val": 1, "test": 1}


def test_original_tiffs_of_clinicdb(tmp_path, capsys):
    files, items = clinicdb()
    originals = {}
    for name, content in files.items():
        if name.startswith("TIF/"):
            originals[name.replace("TIF/", "CVC-ClinicDB/")] = content
    anns = write_annotations(tmp_path / "anns", shares(items))
    raw = write_zip(tmp_path / "CVC-ClinicDB.zip", originals)
    convert("clinicdb-polyp", raw, anns, tmp_path / "out")
    for n in range(1, 13):
        image = Image.open(tmp_path / f"out/images/{n}.png")
        assert (np.asarray(image) == picture(100 + n)).all()
    assert "without metadata.csv the sequences are unknown" in capsys.readouterr().out
    check(tmp_path / "out")


def bkai():
    """Kaggle's files of BKAI: masks are JPEG files, red or green on black, and four faults."""
    files, items = {}, []
    for n in range(12):
        name = f"{n:032x}.jpeg"
        mask, box = blob(n, (96, 128))
        colours = np.zeros((96, 128, 3), np.uint8)
        colours[mask] = (255, 0, 0) if n % 2 else (0, 255, 0)
        files[f"train/train/{name}"] = encoded(picture(200 + n, (96, 128)), "jpeg")
        files[f"train_gt/train_gt/{name}"] = encoded(colours, "jpeg", quality=95, subsampling=0)
        items.append(item(name, name, box, polyp_prompts()))
    files["test/test/x.jpeg"] = b"x"
    files["sample_submission.csv"] = b"x"

    denied = {"p0": ""} | dict.fromkeys(("p1", "p2", "p3", "p4", "p5", "p6"), "no polyp")
    items[9]["prompts"] = denied | dict.fromkeys(("p7", "p8", "p9"), ["no polyp"])
    train, val, test = items[:8], items[8:10], items[10:]
    splits = {"train": [*train, train[0], val[0], test[0]], "val": val, "test": test}
    return files, splits


def test_bkai(tmp_path, capsys):
    files, splits = bkai()
    raw = write_zip(tmp_path / "archive.zip", files)
    anns = write_annotations(tmp_path / "anns", splits)
    convert("bkai_polyp", raw, anns, tmp_path / "out")
    printed = capsys.readouterr().out
    first, eighth, tenth = (splits[split][0]["img_name"] for split in ("train", "val", "test"))
    assert f"train listed 1 ({first}) twice; they are listed once" in printed
    assert f"train and val share 1 ({eighth}); --fix-splits leaves them out of train" in printed
    assert f"train and test share 1 ({tenth})" in printed
    denied = splits["val"][1]["img_name"]
    assert f"over a polyp were replaced by those of `prepare.py annotate`: {denied}" in printed

    out = tmp_path / "out"
    assert len(entries(out, "train")) == 10
    for n in range(12):  # JPEG blurs the border of a colour by a pixel
        errors = mask_of(out, f"{n:032x}.png") ^ blob(n, (96, 128))[0]
        assert errors.sum() <= 0.01 * errors.size
    prompts = entries(out, "val")[1]["prompts"]
    assert prompts["p1"] == "polyp" and prompts["p7"] == GENERAL and len(prompts) == 10
    assert prompts["p6"].startswith("one ") and " polyp, located in " in prompts["p6"]
    assert prompts["p9"][0].endswith(" of the image") and "no polyp" not in str(prompts)

    convert("bkai-polyp", raw, anns, tmp_path / "fixed", "--fix-splits")
    assert f"train: left out 1 ({tenth}), which are in test" in capsys.readouterr().out
    names = [entry["img_name"] for entry in entries(tmp_path / "fixed", "train")]
    assert names == [entry["img_name"] for entry in splits["train"][:8]]
    check(tmp_path / "fixed")


PRANET_SETS = {
    "cvc300-polyp": ("CVC-300", range(149, 157)),
    "colondb-polyp": ("CVC-ColonDB", range(1, 11)),
    "etis-polyp": ("ETIS-LaribPolypDB", range(1, 11)),
}


def pranet() -> dict[str, bytes]:
    """PraNet's TestDataset.zip, which holds several data sets with the same file names."""
    files = {}
    for number, (folder, names) in enumerate(PRANET_SETS.values()):
        for n in names:
            pixels = picture(1000 * number + n)
            mask = blob(1000 * number + n)[0] * WHITE
            files[f"TestDataset/{folder}/images/{n}.png"] = encoded(pixels, "png")
            files[f"TestDataset/{folder}/masks/{n}.png"] = encoded(mask, "png")
    files["TestDataset/Kvasir/images/cju.png"] = b"x"
    return files


@pytest.mark.parametrize("name", ["colondb-polyp", "etis-polyp"])
def test_colondb_and_etis(name, tmp_path, run):
    raw = write_zip(tmp_path / "TestDataset.zip", pranet())
    number = list(PRANET_SETS).index(name)
    items = []
    for n in PRANET_SETS[name][1]:
        box = blob(1000 * number + n)[1]
        items.append(item(f"{n}.png", f"{n}.png", box, polyp_prompts()))
    splits = {"train": items[:2], "val": [], "test": items[2:]}
    study = f"medvlsm/data/{name.replace('-', '_')}/anns"
    anns = write_annotations(tmp_path / study, splits)
    write_annotations(anns, {"testB": splits["test"][:2]})
    convert(name, raw, tmp_path / "medvlsm", tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in (out / "anns").iterdir()} == {"train.json", "test.json"}
    assert len(entries(out, "test")) == 8
    for n in PRANET_SETS[name][1]:
        assert (mask_of(out, f"{n}.png") == blob(1000 * number + n)[0]).all()
    check(out)

    # The archive of the other data set has files of the same names: the boxes tell.
    other = "etis-polyp" if name == "colondb-polyp" else "colondb-polyp"
    err = refused(run, other, raw, anns, tmp_path / "other")
    assert "the annotations at" in err and "of another data set" in err


def cvc300():
    items = []
    for number, n in enumerate(PRANET_SETS["cvc300-polyp"][1]):
        items.append(item(f"{number}.jpg", f"{number}.png", blob(n)[1], polyp_prompts()))
    return items


def test_cvc300(tmp_path, site, run, capsys):
    folder, requests = site
    raw = write_zip(tmp_path / "TestDataset.zip", pranet())
    older = f"{medvlsm.COMMIT_OF_2023}/datasets/anns/cvc300_polyp_0_0_100"
    write_annotations(folder / older, {"testA": cvc300()})
    arguments = ["cvc300-polyp", "--raw", raw, "--cache", tmp_path / "cache", "--out"]
    status, _, _ = run(prepare, *arguments, tmp_path / "out")
    assert status == 0 and requests == [f"/{older}/testA.json"]

    names = [f"{n}.png" for n in PRANET_SETS["cvc300-polyp"][1]]
    assert [entry["img_name"] for entry in entries(tmp_path / "out", "test")] == names
    for n in PRANET_SETS["cvc300-polyp"][1]:
        assert (mask_of(tmp_path / "out", f"{n}.png") == blob(n)[0]).all()
    check(tmp_path / "out")

    # The study's newer file is a copy of ColonDB's.
    items = [item(f"{n}.png", f"{n}.png", blob(n)[1], polyp_prompts()) for n in range(1, 11)]
    copy = {"train": items[:2], "val": [], "test": items[2:]}
    write_annotations(tmp_path / "medvlsm/data/cvc300_polyp/anns", copy)
    err = refused(run, "cvc300-polyp", raw, tmp_path / "medvlsm", tmp_path / "copy")
    assert "10 entries are not those of cvc300_polyp, the study's file is a copy of ColonDB" in err
    assert f"the right file is {medvlsm.RAW}/{older}/testA.json" in err

    # Names in another order do not fit the boxes.
    turned = [entry | {"img_name": f"{7 - k}.jpg"} for k, entry in enumerate(cvc300())]
    write_annotations(tmp_path / "turned", {"testA": turned})
    err = refused(run, "cvc300-polyp", raw, tmp_path / "turned", tmp_path / "turned_out")
    assert "is the archive or the annotations of another data set" in err


# --- BUSI -----------------------------------------------------------------------------------------


def busi_prompts(kind: str) -> dict:
    place = "in the breast ultrasound image."
    if kind == "normal":  # texts, where the others have lists
        return {"p0": ""} | dict.fromkeys((f"p{k}" for k in range(1, 7)), f"No tumor {place}")
    shape = {"benign": "regular", "malignant": "irregular"}[kind]
    return {
        "p0": "",
        "p1": f"Tumor {place}",
        "p2": [f"{kind.capitalize()} tumor {place}", f"{shape.capitalize()}-shaped tumor {place}"],
        "p3": [f"One {kind} tumor {place}", f"One {shape}-shaped tumor {place}"],
        "p4": [f"One small {kind} tumor {place}", f"One small {shape}-shaped tumor {place}"],
        "p5": [f"One small {kind} tumor at the center {place}"] * 2,
        "p6": [f"One small oval-shaped {kind} tumor at the center {place}"] * 2,
    }


def busi():
    """Kaggle's files of BUSI: 1-bit masks, several for one image, empty ones of normal breasts."""
    files, items, masks = {}, [], {}
    kinds = ["benign", "malignant", "normal"] * 4
    for seed, kind in enumerate(kinds):
        number = seed // 3 + 1
        mask, box = blob(300 + seed)
        if kind == "normal":
            mask, box = np.zeros_like(mask), [64, 48, 0, 0]
        base = f"Dataset_BUSI_with_GT/{kind}/{kind} ({number})"
        files[f"{base}.png"] = encoded(picture(300 + seed), "png")
        if (kind, number) == ("benign", 2):  # two tumours
            first, second = mask.copy(), mask.copy()
            columns = np.flatnonzero(mask.any(0))
            first[:, columns[len(columns) // 2] :] = False
            second &= ~first
            files[f"{base}_mask.png"] = encoded(first, "png")
            files[f"{base}_mask_1.png"] = encoded(second, "png")
        else:
            files[f"{base}_mask.png"] = encoded(mask, "png")
        name = f"{number}_{kind}.png"
        masks[name] = mask
        items.append(item(name, name, box, busi_prompts(kind)))
    return files, items, masks


def test_busi(tmp_path, capsys, run):
    files, items, masks = busi()
    raw = write_zip(tmp_path / "archive.zip", files)
    anns = write_annotations(tmp_path / "busi/anns", shares(items[:-1]))
    convert("busi", raw, tmp_path, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "images with several masks, which were merged: 1 (2_benign)" in printed
    assert "images without annotations, left out: 1 (4_normal)" in printed
    out = tmp_path / "out"
    for entry in items[:-1]:
        name = entry["img_name"]
        assert (mask_of(out, name) == masks[name]).all()
        number, kind = name.removesuffix(".png").split("_")
        member = f"Dataset_BUSI_with_GT/{kind}/{kind} ({number}).png"
        assert (out / "images" / name).read_bytes() == files[member]
    assert not mask_of(out, "1_normal.png").any()
    assert entries(out, "train")[2]["prompts"] == busi_prompts("normal")
    check(out)

    folder = write_files(tmp_path / "download", files) / "Dataset_BUSI_with_GT"
    convert("busi", folder, anns, tmp_path / "again")
    assert contents(tmp_path / "again/masks") == contents(out / "masks")

    say = partial(refused, run, "busi")
    (folder / "normal/normal (1)_mask.png").unlink()
    assert "normal (1).png (1_normal) lacks its image or its mask" in say(folder, anns, out / "x")
    shutil.copytree(folder / "benign", folder / "copy")
    assert "holds benign/benign (1).png and copy/benign (1).png" in say(folder, anns, out / "x")
    shutil.rmtree(folder / "copy")
    shutil.rmtree(folder / "normal")
    err = say(folder, anns, out / "x")
    assert "lacks 3 (1_normal, 2_normal, 3_normal) of 11 files" in err


# --- ISIC and DFU ---------------------------------------------------------------------------------


def isic():
    """The four archives of ISIC 2016, part 1, and the study's entries with their two faults."""
    parts, splits = {}, {"Training": [], "Test": []}
    for part, numbers in (("Training", range(0, 20, 2)), ("Test", (3, 11, 13))):
        data, truth = {}, {}
        for n in numbers:
            name = f"ISIC_{n:07}"
            mask, box = blob(400 + n)
            folder = f"ISBI2016_ISIC_Part1_{part}"
            data[f"{folder}_Data/{name}.jpg"] = encoded(picture(400 + n), "jpg")
            truth[f"{folder}_GroundTruth/{name}_Segmentation.png"] = encoded(mask * WHITE, "png")
            prompts = polyp_prompts() | {"p1": "skin melanoma"}
            entry = item(f"{name}.jpg", f"{name}_Segmentation.png", box, prompts)
            splits[part].append(entry)
        parts |= {f"{folder}_Data.zip": data, f"{folder}_GroundTruth.zip": truth}
    train = splits["Training"]
    again = train[0] | {"segment_id": "other"}
    study = {"train": [*train[:8], again], "val": train[8:], "test": [*splits["Test"], train[7]]}
    return parts, study


def test_isic(tmp_path, capsys, run):
    parts, splits = isic()
    raw = [write_zip(tmp_path / name, files) for name, files in parts.items()]
    anns = write_annotations(tmp_path / "medvlsm/data/isic/anns", splits)
    convert("isic", raw, tmp_path / "medvlsm", tmp_path / "out", "--fix-splits")
    printed = capsys.readouterr().out
    assert "train listed 1 (ISIC_0000000_Segmentation.png) twice" in printed
    assert "train: left out 1 (ISIC_0000014.jpg), which are in test" in printed
    out = tmp_path / "out"
    assert [len(entries(out, split)) for split in ("train", "val", "test")] == [7, 2, 4]
    for n in (*range(0, 20, 2), 3, 11, 13):
        assert (mask_of(out, f"ISIC_{n:07}_Segmentation.png") == blob(400 + n)[0]).all()
    source = json.loads((out / "source.json").read_text())
    assert "challenge" in source["published_split"] and len(source["archives"]) == 4
    check(out)

    folder = tmp_path / "download"  # unpacked, all in one folder
    for files in parts.values():
        write_files(folder, files)
    convert("isic", folder, anns, tmp_path / "again", "--fix-splits")
    assert contents(tmp_path / "again/masks") == contents(out / "masks")

    err = refused(run, "isic", raw[:3], anns, tmp_path / "none")
    assert "no folder ISBI2016_ISIC_Part1_Test_GroundTruth: " in err and "; " in err


def test_isic_of_2023(tmp_path, run):
    parts, splits = isic()
    raw = [write_zip(tmp_path / name, files) for name, files in parts.items()]
    numbers = {f"ISIC_{2 * k:07}": k for k in range(10)}
    numbers |= {f"ISIC_{n:07}": 900 + k for k, n in enumerate((3, 11, 13))}
    older = {"train": splits["train"][:8], "val": splits["val"], "testA": splits["test"][:3]}
    for split_items in older.values():
        for k, entry in enumerate(split_items):
            number = numbers[entry["img_name"][:-4]]
            split_items[k] = entry | {"img_name": f"{number}.jpg", "mask_name": f"{number}.png"}
    anns = write_annotations(tmp_path / "isic_90_10_d", older)
    convert("isic", raw, anns, tmp_path / "out")
    names = [entry["img_name"] for entry in entries(tmp_path / "out", "test")]
    assert names == ["ISIC_0000003.jpg", "ISIC_0000011.jpg", "ISIC_0000013.jpg"]
    assert entries(tmp_path / "out", "val")[1]["mask_name"] == "ISIC_0000018_Segmentation.png"
    check(tmp_path / "out")

    older["val"][0]["img_name"] = "10.jpg"
    write_annotations(anns, older)
    err = refused(run, "isic", raw, anns, tmp_path / "none")
    assert "has 10 images for training (from 0) and 3 for tests (from 900), but the annot" in err
    assert "annotations of 2023 name 10.jpg in val; expected running numbers from 0" in err


def test_dfu(tmp_path, run):
    files, items = {}, []
    release = "DFUC2022_train_release"
    for n in range(8):
        name = f"{100001 + 3 * n}"
        mask, _ = blob(500 + n)
        files[f"{release}/DFUC2022_train_images/{name}.jpg"] = encoded(picture(500 + n), "jpg")
        files[f"{release}/DFUC2022_train_masks/{name}.png"] = encoded(mask * WHITE, "png")
        prompts = polyp_prompts() | {"p1": "foot ulcer"}
        items.append(item(f"{name}.jpg", f"{name}.png", None, prompts))
    raw = write_zip(tmp_path / f"{release}.zip", files)
    anns = write_annotations(tmp_path / "anns", shares(items))
    convert("dfu", raw, anns, tmp_path / "out")
    for n in range(8):
        assert (mask_of(tmp_path / "out", f"{100001 + 3 * n}.png") == blob(500 + n)[0]).all()
    check(tmp_path / "out")

    del files[f"{release}/DFUC2022_train_masks/100004.png"]
    err = refused(run, "dfu", write_zip(tmp_path / "less.zip", files), anns, tmp_path / "none")
    assert "masks: lacks 1 (100004) of 8 files" in err


# --- CheXlocalize ---------------------------------------------------------------------------------

OUTLINED = {"Cardiomegaly": (10, 8, 90, 70), "Pleural Effusion": (60, 30, 120, 95)}


def square(x0, y0, x1, y1) -> list:
    """A polygon, with the decimals that the real ones have."""
    return [[x0 + 0.1, y0 + 0.2], [x1 + 0.3, y0 + 0.2], [x1 + 0.3, y1 + 0.4], [x0 + 0.1, y1 + 0.4]]


def chexlocalize():
    """The download's files; the study's boxes belong to images whose shorter side is 512."""
    files, items, outlines = {}, [], {"val": {}, "test": {}}
    for n in range(8):
        patient, view = f"patient6454{n}", ("frontal", "lateral")[n % 2]
        name = f"{patient}_study1_view{1 + n % 2}_{view}"
        part = "val" if n < 4 else "test"
        path = f"CheXpert/{part}/{patient}/study1/view{1 + n % 2}_{view}.jpg"
        files[path] = encoded(picture(600 + n, (128, 160))[..., 0], "jpg")
        outlines[part][name] = {"img_size": [128, 160]}
        for finding, (x0, y0, x1, y1) in list(OUTLINED.items())[: 1 + n % 2]:
            polygons = [square(x0 + n, y0, x1, y1), square(1, 1, 5, 5)]
            outlines[part][name][finding] = polygons
            mask = f"{name}_{finding.lower().replace(' ', '_')}.png"
            prompts = {"p0": "", "p1": f"{finding} in a chest Xray.", "p6": f"{finding}. "}
            items.append(item(f"{name}.jpg", mask, [4, 4, 4 * (x1 + 1), 4 * (y1 + 1)], prompts))
    for part, content in outlines.items():
        files[f"CheXlocalize/gt_annotations_{part}.json"] = json.dumps(content).encode()
        files[f"CheXlocalize/gt_segmentations_{part}.json"] = b"{}"
    files["CheXpert/val_labels.csv"] = b"x"
    return files, items


def test_chexlocalize(tmp_path, run):
    files, items = chexlocalize()
    folder = write_files(tmp_path / "chexlocalize", files)
    splits = {"train": items[:6], "val": items[6:9], "test": items[9:]}
    anns = write_annotations(tmp_path / "anns", splits)
    convert("chexlocalize", folder, anns, tmp_path / "out")
    out = tmp_path / "out"
    expected = np.zeros((128, 160), bool)  # patient 1: a polygon's outline belongs to it
    expected[30:96, 61:121] = True
    expected[1:6, 1:6] = True
    mask = mask_of(out, "patient64541_study1_view2_lateral_pleural_effusion.png")
    assert (mask == expected).all()
    entry = entries(out, "train")[0]
    assert entry["group"] == "patient64540" and entry["prompts"]["p6"] == "Cardiomegaly. "
    assert len(list((out / "images").iterdir())) == 8
    check(out)

    say = partial(refused, run, "chexlocalize")
    small = files | {
        "CheXpert/val/patient64540/study1/view1_frontal.jpg": encoded(picture(1), "jpg")
    }
    raw = write_zip(tmp_path / "small.zip", small)
    err = say(raw, anns, tmp_path / "x")
    assert "view1_frontal.jpg: 64x48, but its outlines are drawn on 160x128; CheXpert-small" in err
    del files["CheXlocalize/gt_annotations_test.json"]
    err = say(write_zip(tmp_path / "half.zip", files), anns, tmp_path / "x")
    assert "outlines: lacks 6 (patient64544_study1_view1_frontal_cardiomegaly, " in err
    name = "CheXlocalize/gt_annotations_val.json"
    err = say(write_zip(tmp_path / "other.zip", files | {name: b'{"a": []}'}), anns, tmp_path / "x")
    assert 'other.zip: CheXlocalize/gt_annotations_val.json: expected {"patient1_' in err
    del files[name]
    err = say(write_zip(tmp_path / "none.zip", files), anns, tmp_path / "x")
    assert "no gt_annotations_val.json or gt_annotations_test.json: " in err


# --- CAMUS ----------------------------------------------------------------------------------------

SHAPES = {1: "oval", 2: "triangle", 3: "square"}
PEOPLE = {
    1: ("F", 56, "Good"),
    2: ("M", 73, "Medium"),
    51: ("M", 18, "Poor"),
    53: ("F", 80, "Good"),
}
PEOPLE |= {451: ("M", 61, "Good"), 452: ("F", 20, "Poor")}
AGES = {56: "fifty-six", 73: "seventy-three", 18: "eighteen", 80: "eighty"}
AGES |= {61: "sixty-one", 20: "twenty"}


def camus_prompts(patient: int, label: int, view: str, phase: str) -> dict:
    """p0 to p7, word for word as in the study's files."""
    name = {1: "Left ventricular cavity", 2: "Myocardium", 3: "Left atrium cavity"}[label]
    sex, age, quality = PEOPLE[patient]
    person = {"F": "female", "M": "male"}[sex]
    prompts = {"p0": ""} | {f"p{k}": [] for k in range(1, 8)}
    for place in ("of the heart", "in the cardiac ultrasound"):
        chambers = "in two-chamber view" if view == "2CH" else "in four-chamber view"
        cycle = "at end of the diastole cycle" if phase == "ED" else "at end of the systole cycle"
        texts = [f"{name} {place}.", f"{name} {chambers} {place}."]
        texts.append(f"{name} {chambers} {place} {cycle}.")
        texts.append(f"{name} {chambers} {place} {cycle} of a {person}.")
        texts.append(f"{name} {chambers} {place} {cycle} of a {AGES[age]}-year-old {person}.")
        end = f"{cycle} of a {AGES[age]}-year-old {person} with {quality.lower()} image quality."
        texts.append(f"{name} {chambers} {place} {end}")
        texts.append(f"{name} of {SHAPES[label]} shape {chambers} {place} {end}")
        for k, text in enumerate(texts, 1):
            prompts[f"p{k}"].append(text)
    return prompts


def camus_labels(seed: int) -> np.ndarray:
    """A label map, uint8 (H,W), with three structures below each other."""
    labels = np.zeros((90, 70), np.uint8)
    for label in (1, 2, 3):
        left = 5 + (7 * seed + 11 * label) % 30
        labels[25 * label - 15 : 25 * label, left : left + 25] = label
    return labels


def nifti(pixels: np.ndarray) -> bytes:
    """A NIfTI file of one slice (H,W); its first axis is the column."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(pixels.T), np.diag([0.3, 0.15, 1, 1]))
    return gzip.compress(image.to_bytes(), mtime=0)


def camus_download():
    """Files of CAMUS_public, and the study's val and test entries."""
    files, splits = {"CAMUS_public/database_split/subgroup_testing.txt": b"patient0451"}, {}
    for patient, (sex, age, quality) in PEOPLE.items():
        name = f"patient{patient:04}"
        folder = f"CAMUS_public/database_nifti/{name}"
        for seed, view in enumerate(("2CH", "4CH")):
            info = f"ED: 1\nES: 18\nNbFrame: 18\nSex: {sex}\nAge: {age}\nImageQuality: {quality}\n"
            files[f"{folder}/Info_{view}.cfg"] = f"{info}EF: 54\nFrameRate: 48.1\n".encode()
            files[f"{folder}/{name}_{view}_half_sequence.nii.gz"] = b"x"
            files[f"{folder}/{name}_{view}_half_sequence_gt.nii.gz"] = b"x"
            for k, phase in enumerate(("ED", "ES")):
                number = 10 * patient + 2 * seed + k
                pixels = picture(number, (90, 70))[..., 0]
                files[f"{folder}/{name}_{view}_{phase}.nii.gz"] = nifti(pixels)
                files[f"{folder}/{name}_{view}_{phase}_gt.nii.gz"] = nifti(camus_labels(number))
                for label in (1, 2, 3):
                    split, shift = "test" if patient > 450 else "val", 450 * (patient > 450)
                    if 50 < patient <= 450:
                        split = "train"
                    image = f"patient{patient - shift:04}_{view}_{phase}"
                    mask = f"mask_{label}/{image}_gt.png"
                    prompts = camus_prompts(patient, label, view, phase)
                    entry = {"img_name": f"{image}.png", "mask_name": mask, "prompts": prompts}
                    splits.setdefault(split, []).append(entry)
    return files, splits


def test_camus(tmp_path, capsys):
    files, splits = camus_download()
    raw = write_zip(tmp_path / "CAMUS_public.zip", files)
    anns = write_annotations(tmp_path / "medvlsm/data/camus/anns", splits)
    convert("camus", raw, tmp_path / "medvlsm", tmp_path / "whole")
    check(tmp_path / "whole")

    # Without train.json the train entries are the same but for p7, which a network made.
    train = splits["train"]
    (anns / "train.json").unlink()
    convert("camus", raw, anns, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "train: 24 entries of 2 patients were made from the Info files" in printed
    out = tmp_path / "out"
    written = {entry["mask_name"]: entry for entry in entries(out, "train")}
    assert len(written) == len(train) == 24
    for entry in train:
        made = written[f"train/{entry['mask_name']}"]
        assert made["img_name"] == f"train/{entry['img_name']}"
        assert made["prompts"] | {"p7": entry["prompts"]["p7"]} == entry["prompts"]
    test = entries(out, "test")[1]
    assert test["img_name"] == "test/patient0001_2CH_ED.png" and test["group"] == "patient0451"
    assert test["mask_name"] == "test/mask_2/patient0001_2CH_ED_gt.png"
    assert test["prompts"] == camus_prompts(451, 2, "2CH", "ED")

    assert (
        mask_of(out, "test/mask_2/patient0001_2CH_ED_gt.png") == (camus_labels(4510) == 2)
    ).all()
    assert (
        mask_of(out, "train/mask_3/patient0053_4CH_ES_gt.png") == (camus_labels(533) == 3)
    ).all()
    image = np.asarray(Image.open(out / "images/train/patient0002_4CH_ED.png"))
    assert (image == picture(22, (90, 70))[..., 0]).all()

    # The study's own annotation files find the same files.
    write_annotations(out / "anns", {split: splits[split] for split in ("val", "test")})
    for split in ("val", "test"):
        for entry in layouts.read_annotations(out, split):
            assert entry.image.is_file() and entry.mask.is_file()
            assert f"/{'test' if split == 'test' else 'train'}/" in entry.image.as_posix()


def test_camus_of_other_patients(tmp_path, run, capsys):
    files, splits = camus_download()
    anns = write_annotations(tmp_path / "anns", splits)
    folder = "CAMUS_public/database_nifti/patient0451"
    info = b"Sex: M\nAge: 62\nImageQuality: Good\n"
    others = files | {f"{folder}/Info_2CH.cfg": info, f"{folder}/Info_4CH.cfg": info}
    raw = write_zip(tmp_path / "other.zip", others)
    say = partial(refused, run, "camus")
    err = say(raw, anns, tmp_path / "x")
    assert "patient0451 of the archive: its Info file would give 'Left ventricular cavity" in err
    assert "sixty-two" in err and "sixty-one" in err and "--without-test leaves out" in err
    convert("camus", raw, anns, tmp_path / "out", "--without-test")
    assert {path.name for path in (tmp_path / "out/anns").iterdir()} == {"train.json", "val.json"}

    info = b"Sex: M\nAge: 61\nImageQuality: Medium\n"
    raw = write_zip(tmp_path / "quality.zip", files | {f"{folder}/Info_2CH.cfg": info})
    convert("camus", raw, anns, tmp_path / "quality")
    line = "image quality in the prompts differs from that of the Info files: 1 (patient0451 2CH)"
    assert line in capsys.readouterr().out

    for name, content, message in (
        ("Info_2CH.cfg", b"Sex: M\n", "Info_2CH.cfg: expected lines such as Sex: F, Age: 56 and"),
        ("patient0451_2CH_ED_gt.nii.gz", nifti(np.full((9, 9), 4, np.uint8)), "holds label 4; exp"),
        ("patient0451_2CH_ED.nii.gz", nifti(np.full((9, 9), 300, np.int16)), "values from 300 to"),
        ("patient0451_2CH_ED.nii.gz", nifti(np.zeros((9, 9, 2), np.int16)), "expected one slice"),
        ("patient0451_2CH_ED.nii.gz", files[f"{folder}/patient0451_2CH_ED.nii.gz"][:99], "NIfTI ("),
    ):
        raw = write_zip(tmp_path / "a.zip", files | {f"{folder}/{name}": content})
        err = say(raw, anns, tmp_path / "x")
        assert message in err and f"a.zip: {folder}/{name}" in err

    less = {name: content for name, content in files.items() if "patient0452" not in name}
    err = say(write_zip(tmp_path / "less.zip", less), anns, tmp_path / "x")
    assert "the archive lacks 2 (patient0452 2CH, patient0452 4CH)" in err
    older = {"training/patient0001/patient0001_2CH_ED.mhd": b"x"}
    err = say(write_zip(tmp_path / "training.zip", older), anns, tmp_path / "x")
    assert "Older releases in other formats (.mhd) are not read" in err


# --- the study's own files, and training ----------------------------------------------------------

REAL_COUNTS = {  # of commit dc36a3af83, counted when this was written
    "kvasir_polyp": (800, 100, 100),
    "clinicdb_polyp": (490, 61, 61),
    "bkai_polyp": (800, 100, 100),
    "colondb_polyp": (20, 0, 360),
    "etis_polyp": (20, 0, 176),
    "isic": (810, 90, 379),
    "dfu": (1600, 200, 200),
    "busi": (624, 78, 78),
    "chexlocalize": (1279, 446, 452),
}
REPEATED = {"bkai_polyp": 1, "isic": 1}  # entries
SHARED = {
    "bkai_polyp": (2, 1, 0),
    "isic": (0, 3, 0),
}  # images of train, val; train, test; val, test


@pytest.fixture(scope="module")
def study() -> Path:
    """A copy of github.com/naamiinepal/medvlsm."""
    folder = os.environ.get("MEDVLSM", "")
    if not folder or not Path(folder, "data").is_dir():
        pytest.skip("set MEDVLSM to a copy of github.com/naamiinepal/medvlsm")
    return Path(folder)


DATA_SETS = [polyps.facts for polyps in POLYP_SETS] + [ISIC, DFU, BUSI, CAMUS, CHEXLOCALIZE]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_COUNTS)
def test_the_files_of_the_study(name, study):
    (data_set,) = (facts for facts in DATA_SETS if facts.name == name)
    args = Namespace(annotations=study)
    splits, is_older, _ = medvlsm.read_annotations(data_set, args)
    assert not is_older
    assert tuple(len(splits[split]) for split in medvlsm.SPLITS) == REAL_COUNTS[name]
    assert medvlsm.count_notes(splits, data_set) == []

    notes = []
    unique = medvlsm.without_repeats(splits, notes)
    assert len(notes) == (name in REPEATED)
    repeated = sum(map(len, splits.values())) - sum(map(len, unique.values()))
    assert repeated == REPEATED.get(name, 0)
    images = {split: {a.image for a in annotations} for split, annotations in unique.items()}
    shared = [
        len(images["train"] & images["val"]),
        len(images["train"] & images["test"]),
        len(images["val"] & images["test"]),
    ]
    assert tuple(shared) == SHARED.get(name, (0, 0, 0))
    fixed = medvlsm.without_overlap(unique, True, notes)
    assert len(fixed["test"]) == REAL_COUNTS[name][2]
    assert len(medvlsm.without_overlap(fixed, False, [])) == 3

    if name == "bkai_polyp":
        assert len(find_denials(unique, notes)) == 6 and notes[-1].count(".jpeg") == 6


@pytest.mark.slow
def test_the_copy_of_colondb(study):
    with pytest.raises(ValueError, match="cvc300_polyp, the study's file is a copy of ColonDB's"):
        medvlsm.read_annotations(CVC300.facts, Namespace(annotations=study))


@pytest.mark.slow
def test_the_sentences_of_camus(study):
    splits, _, _ = medvlsm.read_annotations(CAMUS, Namespace(annotations=study))
    assert len(splits["val"]) == len(splits["test"]) == 600
    ages = {number_words(number): number for number in range(150)}
    for annotation in medvlsm.all_annotations(splits):
        _, label, view, phase = parts_of(annotation)
        words = re.search(r"of a (\S+)-year-old (\w+) with (\w+) im", annotation.prompts["p6"][0])
        info = Info(words[2], ages[words[1]], words[3])
        expected = make_prompts(label, view, phase, info)
        assert expected == {k: v for k, v in annotation.prompts.items() if k != "p7"}


@pytest.mark.slow
def test_the_whole_of_kvasir(study, real_data, tmp_path, capsys):
    raw = tmp_path / "Kvasir-SEG"
    raw.mkdir()
    for kind in ("images", "masks"):
        (raw / kind).symlink_to(real_data / "kvasir_polyp" / kind)
    convert("kvasir-polyp", raw, study, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "800 images" in printed and "another box" not in printed and "but the" not in printed
    assert len(list((tmp_path / "out/masks").iterdir())) == 1000


def test_two_steps_of_training(tmp_path, monkeypatch, capsys, untested):
    files, items = kvasir()
    raw = write_zip(tmp_path / "kvasir-seg.zip", files)
    anns = write_annotations(tmp_path / "anns", shares(items))
    convert("kvasir-polyp", raw, anns, tmp_path / "out")
    words = ["--model", "clipseg", "--variant", "mini", "--weights", "none", "--size", 32]
    words += ["--data", tmp_path / "out", "--prompt", "p6", "--epochs", 1, "--batch-size", 2]
    words += ["--out", tmp_path / "run", "--cache", tmp_path / "cache", "--device", "cpu"]
    status, _, err = command(monkeypatch, capsys, train, *words)
    assert status == 0, err
    assert (tmp_path / "run/best.safetensors").is_file()
