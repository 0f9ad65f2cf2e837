"""prepare.py duke-dme and duke-amd, on MATLAB files made here and label maps computed by hand."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command, contents, pictures, stop_at_rename, zipped
from PIL import Image
from scipy.io import savemat

import data
import prepare
from imaging import layouts
from preparation import duke_oct

NAN = np.nan
DME_NAMES = ["background", "NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE-OS", "RPE", "fluid"]
AMD_NAMES = ["background", "ILM to RPEDC", "RPEDC", "below BM"]


def dme_volume(shape=(12, 5, 4), annotated=(1, 3), seed=0):
    """What a Subject_NN.mat holds, of (H,W,N): two slices with boundaries at 2, 3, ..., 9."""
    rng, (_, W, N) = np.random.default_rng(seed), shape
    layers, fluid = np.full((8, W, N), NAN), np.full(shape, NAN)
    layers[:, :, annotated] = np.arange(2.0, 10)[:, None, None]
    fluid[..., annotated] = 0
    held = {"images": rng.integers(0, 256, shape).astype(np.uint8)}
    for name in "manualLayers1", "manualLayers2", "automaticLayersDME", "automaticLayersNormal":
        held[name] = layers.copy()
    held |= {"manualFluid1": fluid, "manualFluid2": fluid.copy()}
    return held | {"automaticFluidDME": np.zeros(shape)}


def amd_volume(shape=(9, 6, 8), annotated=range(1, 7), seed=0):
    """What a Farsiu_..._NNNN.mat holds, of (H,W,N): boundaries at 2, 5 and 7 in six slices."""
    rng, (_, W, N) = np.random.default_rng(seed), shape
    maps = np.full((N, W, 3), NAN)
    maps[list(annotated)] = [2, 5, 7]
    images = rng.integers(0, 256, shape).astype(np.uint8)
    return {"images": images, "layerMaps": maps, "Age": np.array([[70]], np.uint8)}


def dme_download(root, **changed):
    """Ten subjects; `changed` holds the content of some."""
    root.mkdir(exist_ok=True)
    for k in range(1, 11):
        held = changed.get(f"Subject_{k:02}") or dme_volume(seed=k)
        savemat(root / f"Subject_{k:02}.mat", held, do_compression=True)
    return root


def amd_name(kind, number):
    return f"Farsiu_Ophthalmology_2013_{kind}_Subject_{number}.mat"


def amd_download(root, amd=10, control=10, **more):
    root.mkdir(exist_ok=True)
    for kind, count in ("AMD", amd), ("Control", control):
        for k in range(count):  # the numbers are the same, the people are not
            held = amd_volume(seed=len(kind) * 1000 + k, **more)
            savemat(root / amd_name(kind, 1001 + k), held)
    return root


def run(which, root, out, *options):
    assert prepare.main([which, str(root), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def dme(tmp_path_factory):
    return dme_download(tmp_path_factory.mktemp("dme") / "download")


@pytest.fixture(scope="module")
def amd(tmp_path_factory):
    return amd_download(tmp_path_factory.mktemp("amd") / "download")


# --- label maps ----------------------------------------------------------------------------------


def test_which_pixel_row_a_layer_begins_with():
    """MATLAB's row 1 is our row 0; a pixel on a boundary lies below it."""
    boundaries = np.array([[1, 1.5, 2, 2.5, 0.2, 4, 9], [3, 3, 2, 2.6, 3.999, 4.001, 9]])
    columns = [  # from top to bottom, each of 5 pixels with the centres 1 to 5
        [1, 1, 2, 2, 2],
        [0, 1, 2, 2, 2],
        [0, 2, 2, 2, 2],  # a layer without thickness
        [0, 0, 2, 2, 2],  # one that meets no centre
        [1, 1, 1, 2, 2],  # begins above the image
        [0, 0, 0, 1, 2],
        [0, 0, 0, 0, 0],  # begins below it
    ]
    mask = duke_oct.layer_map(boundaries, 5)
    assert mask.dtype == np.uint8 and mask.T.tolist() == columns


def test_columns_without_a_boundary_do_not_count():
    boundaries = np.array([[1, NAN, 1, NAN], [3, 3, NAN, NAN]])
    mask = duke_oct.layer_map(boundaries, 4)
    assert mask.T.tolist() == [[1, 1, 2, 2], [255] * 4, [255] * 4, [255] * 4]


def test_dme_masks_by_hand(tmp_path, capsys):
    held = dme_volume((10, 7, 4), annotated=(1, 3))
    layers, fluid = held["manualLayers1"], held["manualFluid1"]
    # slice 1: columns 0 and 6 are not annotated at all, column 3 lacks its last boundary
    layers[:, [0, 6], 1] = NAN
    layers[7, 3, 1] = NAN
    layers[:, 2, 1] = [1, 1, 3.5, 4, 4, 6, 7.01, 9]
    layers[:, 5, 1] = [3, 4, 5, 6, 7, 8, 9, 10]
    fluid[4:6, 1:4, 1] = 17  # a region's number; also over the column that does not count
    fluid[9, 5, 1] = 2  # below Bruch's membrane
    fluid[6, 5, 1] = NAN
    root = dme_download(tmp_path / "download", Subject_07=held)
    out = run("duke-dme", root, tmp_path / "out")
    split, mask = pictures(out, "masks")["subject07_slice01"]
    assert split == "test" and mask.dtype == np.uint8 and mask.shape == (10, 5)
    assert mask.T.tolist() == [  # columns 1 to 5
        [0, 1, 2, 3, 8, 8, 6, 7, 0, 0],
        [2, 2, 2, 5, 8, 8, 6, 7, 0, 0],
        [255] * 10,
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 0],
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    image = pictures(out, "images")["subject07_slice01"][1]
    assert image.tolist() == held["images"][:, 1:6, 1].tolist()
    assert pictures(out, "masks")["subject07_slice03"][1].shape == (10, 7)
    said = capsys.readouterr().out
    # 9 * 2 slices of 5 columns, and 5 + 7
    assert "within these 1 of 102 columns lack a boundary and are 255" in said
    assert "RPE in 10, fluid in 1\n" in said and "RPE in 8, fluid in 0\n" in said


def test_annotators(tmp_path):
    held = dme_volume()
    held["manualLayers2"][0, :, 3] = 1
    held["manualLayers2"][:, :, 1] = NAN
    held["manualFluid2"][11, 0, 3] = 1
    root = dme_download(tmp_path / "download", Subject_01=held)
    one = pictures(run("duke-dme", root, tmp_path / "one"), "masks")
    two = pictures(run("duke-dme", root, tmp_path / "two", "--annotator", "2"), "masks")
    assert one.keys() - two.keys() == {"subject01_slice01"} and not two.keys() - one.keys()
    assert one["subject01_slice03"][1][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert two["subject01_slice03"][1][:, 0].tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 8]


def test_amd_masks_by_hand(tmp_path):
    root = amd_download(tmp_path / "download")
    held = amd_volume((6, 5, 3), annotated=())
    #                      ILM, RPEDC, BM of columns 0 to 4
    held["layerMaps"][2] = [[NAN] * 3, [2, 3.5, 5], [1, 4, 4], [2, NAN, 5], [2.5, 5.5, 6]]
    held["layerMaps"][0, :, :2] = 1  # two of three boundaries: not annotated
    held["images"] = held["images"].astype(np.float64)
    savemat(root / amd_name("AMD", 1003), held)
    out = run("duke-amd", root, tmp_path / "out", "--every", "1")
    masks = pictures(out, "masks")
    assert [name for name in masks if "amd1003" in name] == ["amd1003_slice02"]
    mask = masks["amd1003_slice02"][1]
    columns = [[0, 1, 1, 2, 3, 3], [1, 1, 1, 3, 3, 3], [255] * 6, [0, 0, 1, 1, 1, 3]]
    assert mask.T.tolist() == columns
    image = pictures(out, "images")["amd1003_slice02"][1]
    assert image.dtype == np.uint8 and image.tolist() == held["images"][:, 1:, 2].tolist()
    assert masks["control1003_slice01"][1].T.tolist() == [[0, 1, 1, 1, 2, 2, 3, 3, 3]] * 6


@pytest.mark.parametrize("which", ["duke-dme", "duke-amd"])
def test_masks_read_as_a_data_set(dme, amd, tmp_path, capsys, which):
    root, names = {"duke-dme": (dme, DME_NAMES), "duke-amd": (amd, AMD_NAMES)}[which]
    out = run(which, root, tmp_path / "out")
    assert json.loads((out / "classes.json").read_text()) == dict(
        zip("012345678", names, strict=False)
    )
    entries = [
        e for s in layouts.find_splits(out) for e in layouts.read_entries(out, s, "[a-z]+[0-9]+")
    ]
    assert {entry.classes for entry in entries} == {tuple(names)}
    assert {entry.group for entry in entries} == {e.name.split("_")[0] for e in entries}
    assert len({entry.group for entry in entries}) == (10 if which == "duke-dme" else 20)
    dataset = data.open_dataset(entries, tmp_path / "cache")
    assert dataset.pixels(0)[1].max() == (7 if which == "duke-dme" else 3)
    picture = Image.open(entries[0].mask)
    assert picture.mode == "P" and picture.getpalette()[765:] == [128] * 3  # 255 is grey
    capsys.readouterr()
    assert prepare.main(["check", str(out)]) == 0
    errors, warnings = capsys.readouterr().out.split("errors: ")[1].split("warnings: ")
    assert errors == "none\n"
    kinds = [line for line in warnings.splitlines() if re.match("  [^ ]", line)]
    only = {"duke-dme": "  classes that no mask holds: 1", "duke-amd": "  foreground above 60%: 3"}
    assert kinds == [only[which]]


def kinds_of_volumes():
    """(command, boundaries (N,L,W) of a volume, the same as the file holds them, a file name)."""
    dme, amd = dme_volume((60, 50, 4))["manualLayers1"], amd_volume((60, 50, 4), (1, 2, 3))
    return {
        "duke-dme": (np.moveaxis(dme, 2, 0), "manualLayers1", "Subject_04.mat"),
        "duke-amd": (amd["layerMaps"].swapaxes(1, 2), "layerMaps", amd_name("AMD", 1003)),
    }


def save_boundaries(root, which, boundaries):
    """Writes a download in which one volume of 60x50 pixels has these boundaries, (N,L,W)."""
    if which == "duke-dme":
        held = dme_volume((60, 50, 4))
        held["manualLayers1"] = np.moveaxis(boundaries, 0, 2)
        return dme_download(root, Subject_04=held)
    held = amd_volume((60, 50, 4), (1, 2, 3)) | {"layerMaps": boundaries.swapaxes(1, 2)}
    savemat(amd_download(root) / amd_name("AMD", 1003), held)
    return root


SHIFTS = {
    "reversed": (lambda x: x[:, ::-1], "not in order from top to bottom"),
    "two swapped": (lambda x: x[:, [*range(x.shape[1] - 2), -1, -2]], "not in order from top to b"),
    "1,000 rows down": (lambda x: x + 1000, "outside the image's rows 1 to 60"),
    "1,000 rows up": (lambda x: x - 1000, "outside the image's rows 1 to 60"),
    "one slice": (lambda x: x + np.array([0, 1000, 0, 0])[:, None, None], "outside the image's"),
    "infinite": (lambda x: np.where(x == x.max(where=x == x, initial=0), np.inf, x), None),
}


@pytest.mark.parametrize("which", ["duke-dme", "duke-amd"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_boundaries_out_of_place_are_refused(which, shift, tmp_path, monkeypatch, capsys):
    boundaries, key, file = kinds_of_volumes()[which]
    change, said = SHIFTS[shift]
    root = save_boundaries(tmp_path / "download", which, change(boundaries))
    arguments = which, root, "--out", tmp_path / "out"
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1
    if said is None:  # as a column without a boundary, which no slice then has whole
        assert "no slice has a column with all boundaries" in error
        return
    assert (
        f"{file}: {key} has " in error and said in error and "first in slice 1, column 0" in error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


@pytest.mark.parametrize("which", ["duke-dme", "duke-amd"])
def test_a_single_column_out_of_place_does_not_count(which, tmp_path):
    boundaries, _, _ = kinds_of_volumes()[which]
    boundaries[1, 0, 20] = 40.0  # the first boundary, below all others
    boundaries[1, 0, 30] = boundaries[1, 1, 30] + 0.9  # as much as a rounded drawing may cross
    boundaries[1, -1, 40] = 61.0
    root = save_boundaries(tmp_path / "download", which, boundaries)
    masks = pictures(run(which, root, tmp_path / "out", *["--every", "1"][:2 * (which[5] == "a")]),
                     "masks")  # fmt: skip
    name = "subject04_slice01" if which == "duke-dme" else "amd1003_slice01"
    ignored = (masks[name][1] == 255).all(0)
    assert np.flatnonzero(ignored).tolist() == [20]
    said = (tmp_path / "out" / "README.txt").read_text()
    assert "within these 1 of " in said and "out of order or outside the image counts as" in said


# --- splits --------------------------------------------------------------------------------------


def patients(out):
    """{patient: split}; nobody is in two."""
    found = {}
    for name, (split, _) in pictures(out, "images").items():
        assert found.setdefault(name.split("_")[0], split) == split
    return found


def test_dme_split_is_the_usual_one(dme, tmp_path, capsys):
    out = run("duke-dme", dme, tmp_path / "out")
    said = capsys.readouterr().out
    expected = dict.fromkeys(["subject01", "subject02", "subject03", "subject04"], "train")
    expected["subject05"] = "val"
    expected |= {f"subject{k:02}": "test" for k in range(6, 11)}
    assert patients(out) == expected
    assert set(pictures(out, "masks")) == {f"{s}_slice{n}" for s in expected for n in ("01", "03")}
    assert said == f"{out}: {(out / 'README.txt').read_text()}"
    lines = said.splitlines()
    assert lines[0].endswith("annotator 1")
    assert lines[3].startswith("train: 8 slices of 4 patients; NFL in 8, ")
    assert lines[5].startswith("test: 10 slices of 5 patients; ")


@pytest.mark.parametrize("seed", range(3))
def test_amd_split_is_by_patient_in_either_group(amd, tmp_path, seed):
    dealt = patients(run("duke-amd", amd, tmp_path / "out", "--seed", str(seed)))
    for kind in "amd", "control":
        ours = [dealt[f"{kind}{1001 + k}"] for k in range(10)]
        # places 0, 0.1 below 0.15; 0.2 below 0.30
        assert [ours.count(split) for split in ("train", "val", "test")] == [7, 1, 2]
    assert len(dealt) == 20


def test_amd_split_depends_on_the_seed_and_not_on_the_folders(amd, tmp_path):
    apart = tmp_path / "apart"
    for k, path in enumerate(sorted(amd.iterdir(), reverse=True)):  # the Duke site's several zips
        (apart / f"part{k % 3}").mkdir(parents=True, exist_ok=True)
        (apart / f"part{k % 3}" / path.name).symlink_to(path)
    first = contents(run("duke-amd", amd, tmp_path / "a"))
    assert first == contents(run("duke-amd", apart, tmp_path / "b"))
    assert first != contents(run("duke-amd", amd, tmp_path / "c", "--seed", "1"))


@pytest.mark.parametrize("every, slices", [("1", "123456"), ("2", "135"), ("4", "15"), ("10", "1")])
def test_every(tmp_path, every, slices):
    root = amd_download(tmp_path / "download", amd=4, control=0)
    found = pictures(run("duke-amd", root, tmp_path / "out", "--every", every), "masks")
    assert {name for name in found if "1002" in name} == {f"amd1002_slice0{n}" for n in slices}
    if every == "10":  # the default
        assert contents(tmp_path / "out") == contents(run("duke-amd", root, tmp_path / "default"))


# --- errors --------------------------------------------------------------------------------------


def spoil_mat(change, said, file="Subject_04.mat"):
    def spoil(root):
        held = dme_volume()
        change(held)
        savemat(root / file, held)
        return f"{root / file}: {said}"

    return spoil


def put(key, value):
    return lambda held: held.update({key: value})


def truncated(root):
    path = root / "Subject_08.mat"
    path.write_bytes(path.read_bytes()[:300])
    return f"{path}: not readable as a MATLAB file ("


def bytes_of(content, said):
    def spoil(root):
        (root / "Subject_02.mat").write_bytes(content)
        return f"{root / 'Subject_02.mat'}: {said}"

    return spoil


def missing(root):
    (root / "Subject_03.mat").unlink()
    (root / "Subject_10.mat").unlink()
    return f"{root}: no Subject_03, Subject_10 (.mat)"


def twice(root):
    (root / "copy").mkdir()
    (root / "copy" / "Subject_03.mat").write_bytes((root / "Subject_03.mat").read_bytes())
    return "Subject_03.mat as well"


def nothing(root):
    for path in root.iterdir():
        path.unlink()
    return f"{root}: no Subject_01, "


UNREADABLE = "not readable as a MATLAB file ("
SEVEN_3 = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM" + bytes(400)
GREY = np.full((12, 5, 4), 9.0)
DEFECTS = {
    "truncated": truncated,
    "empty": bytes_of(b"", UNREADABLE),
    "text": bytes_of(b"<html>not found</html>\n" * 20, UNREADABLE),
    "7.3": bytes_of(SEVEN_3, "a MATLAB 7.3 (HDF5) file"),
    "missing": missing,
    "nothing": nothing,
    "twice": twice,
    "key": spoil_mat(lambda held: held.pop("manualFluid1"), "has no manualFluid1; "),
    "keys": spoil_mat(lambda h: [h.pop(k) for k in [*h][:-1]], "has no images, manualLayers1, "),
    "boundaries": spoil_mat(
        put("manualLayers1", np.ones((7, 5, 4))),
        "manualLayers1 is 7 5 4, expected 8 W N with H 12, W 5, N 4; ",
    ),
    "columns": spoil_mat(put("manualLayers1", np.ones((8, 6, 4))), "manualLayers1 is 8 6 4, exp"),
    "slices": spoil_mat(put("manualFluid1", np.ones((12, 5, 3))), "manualFluid1 is 12 5 3, exp"),
    "axes": spoil_mat(put("images", np.ones((12, 5), np.uint8)), "images is 12 5, expected H W N"),
    "four axes": spoil_mat(put("images", np.ones((2, 2, 2, 2))), "images is 2 2 2 2, expected"),
    "text array": spoil_mat(put("images", np.full((12, 5, 4), "a", object)), "images holds no num"),
    "0 to 1": spoil_mat(put("images", GREY / 9), "images holds 1 to 1, expected grey values"),
    "16 bits": spoil_mat(put("images", GREY * 99), "images holds 891 to 891, expected grey"),
    "negative": spoil_mat(put("images", GREY - 20), "images holds -11 to -11, expected grey"),
    "nan": spoil_mat(put("images", GREY * NAN), "images holds nan to nan, expected grey"),
    "no slice": spoil_mat(put("manualLayers1", np.full((8, 5, 4), NAN)), "no slice has a column"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, defect):
    root, out = dme_download(tmp_path / "download"), tmp_path / "out"
    said = DEFECTS[defect](root)
    code, text, error = command(monkeypatch, capsys, prepare, "duke-dme", root, "--out", out)
    assert code == 2 and text == "" and error.count("\n") == 1 and said in error
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


def test_truncated_anywhere(tmp_path, monkeypatch, capsys):
    """Whatever scipy raises, or returns, is the one line. In steps, from the header to the end."""
    root = amd_download(tmp_path / "download", amd=4, control=0)
    path = root / amd_name("AMD", 1002)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 200, 97):  # the last variable is Age, which nobody needs
        path.write_bytes(whole[:size])
        arguments = "duke-amd", root, "--out", tmp_path / "out"
        code, text, error = command(monkeypatch, capsys, prepare, *arguments)
        assert code == 2 and text == "" and error.startswith(f"error: {path}: "), size
        assert error.count("\n") == 1


def test_amd_defects(tmp_path, monkeypatch, capsys):
    root = amd_download(tmp_path / "download", amd=3, control=0)
    arguments = "duke-amd", root, "--out", tmp_path / "out"
    code, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and "3 files amd, 0 files control, val would be empty" in error
    held = amd_volume()
    held["layerMaps"] = np.moveaxis(held["layerMaps"], 0, 2)  # slice last, as in the other set
    savemat(root / amd_name("Control", 1001), held)
    savemat(root / amd_name("AMD", 1004), amd_volume())
    code, _, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and "layerMaps is 6 3 8, expected N W 3 with H 9, W 6, N 8; " in error
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


@pytest.mark.parametrize("which", ["duke-dme", "duke-amd"])
@pytest.mark.parametrize("kind", ["empty folder", "file"])
def test_an_out_that_exists_is_left_alone(dme, tmp_path, monkeypatch, capsys, which, kind):
    out = tmp_path / "out"
    out.mkdir() if kind == "empty folder" else out.write_text("mine")
    code, text, error = command(monkeypatch, capsys, prepare, which, dme, "--out", out)
    assert code == 2 and text == "" and error.startswith(f"error: {out}: exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(out.iterdir()) if kind == "empty folder" else out.read_text() == "mine"


@pytest.mark.parametrize(
    "option", ["dme --annotator 3", "dme --annotator 12", "dme --seed 1", "amd --every 0"]
)
def test_wrong_options(dme, tmp_path, monkeypatch, capsys, option):
    which, *options = option.split()
    arguments = [f"duke-{which}", dme, "--out", tmp_path / "out", *options]
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(dme, tmp_path, monkeypatch, capsys):
    whole = contents(run("duke-dme", dme, tmp_path / "whole"))
    moved = stop_at_rename(monkeypatch, tmp_path / "out")
    arguments = "duke-dme", dme, "--out", tmp_path / "out"
    assert command(monkeypatch, capsys, prepare, *arguments)[0] == 2
    assert moved == [whole] and [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_program_as_the_docstring_has_it(dme, tmp_path):
    arguments = [sys.executable, str(ROOT / "prepare.py"), "duke-dme", str(dme)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("data/duke_dme: Duke OCT with macular edema")
    assert len(pictures(tmp_path / "data" / "duke_dme", "images")) == 20


@pytest.mark.parametrize("which", ["dme", "amd"])
def test_an_archive_gives_the_same_as_its_folder(which, dme, amd, tmp_path):
    root = {"dme": dme, "amd": amd}[which]
    archive = zipped(root, tmp_path / "oct.zip")
    name = f"duke-{which}"
    ours = run(name, archive, tmp_path / "a")
    assert contents(ours) == contents(run(name, root, tmp_path / "b"))
