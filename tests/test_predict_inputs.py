"""predict.py: inputs by patterns, texts by --prompts-csv, DICOM files and series."""

import sys
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import contents, rows, write_run
from PIL import Image
from small_runs import called
from test_import_dicom import (
    ULTRASOUND,
    X_RAY,
    header,
    put_pixels,
    save,
    scan,
    slices_of,
    write_series,
)
from test_predict_batches import class_run, photo, volume, volume_run

import cris
from imaging import nifti
from prediction import globs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return class_run(tmp_path_factory.mktemp("images") / "run")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return volume_run(tmp_path_factory.mktemp("volumes") / "run")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A run of CRIS, which reads texts."""
    torch.manual_seed(0)
    model = cris.CRIS(cris.VARIANTS["mini"])
    folder = tmp_path_factory.mktemp("texts") / "run"
    return write_run(folder, cris.CRIS, model.state_dict(), model.config, classes=["polyp"])


def masks_in(out):
    """The names of the masks in a folder, without ending."""
    names = {name.split(".")[0] for name in contents(out)}
    return names - {"measurements", "legend", "classes"}


# --- patterns ------------------------------------------------------------------------------------


def expanded(*inputs, out="out"):
    args = SimpleNamespace(inputs=[str(text) for text in inputs], out=str(out))
    globs.expand_inputs(args)
    return args


FILES = (
    "a.png",
    "b.jpg",
    "g/a.png",
    "g/h/a.png",
    "g/.x.png",
    ".k/a.png",
    "i[1]/a.png",
    "notes.txt",
)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in FILES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern, matches, root",
    [
        ("in/*.png", ["in/a.png"], "in"),
        ("in/?.*g", ["in/a.png", "in/b.jpg"], "in"),
        ("in/[b-z].jpg", ["in/b.jpg"], "in"),
        ("in/**/*.png", ["in/a.png", "in/g/a.png", "in/g/h/a.png", "in/i[1]/a.png"], "in"),
        ("in/*/a.png", ["in/g/a.png", "in/i[1]/a.png"], "in"),
        ("in/g/**/a.png", ["in/g/a.png", "in/g/h/a.png"], "in/g"),
        ("in/g*/", ["in/g"], "in"),
        ("in/**", ["in"], "in"),  # the folder itself, and so all in it
        ("in/.k/*.png", ["in/.k/a.png"], "in/.k"),
        ("in/i[1]/*.png", ["in/i[1]/a.png"], "in/i[1]"),  # a folder of this name exists
        ("i*/*/a.png", ["in/g/a.png", "in/i[1]/a.png"], "."),
    ],
)
def test_patterns_have_the_rules_of_python(pattern, matches, root, tree):
    args = expanded(pattern)
    assert args.inputs == matches
    assert {str(path) for path in args.roots.values()} == {root}


def test_a_real_name_is_no_pattern(tree):
    (tree / "what?.png").write_bytes(b"")
    args = expanded("what?.png", "in/i[1]", "in/g")
    assert args.inputs == ["what?.png", "in/i[1]", "in/g"] and not args.roots


def test_a_file_of_two_patterns_is_one_input(tree):
    assert expanded("in/*.png", "in/a.*").inputs == ["in/a.png"]


def test_links_and_the_output_folder_are_not_entered(tree):
    (tree / "in/g/loop").symlink_to(tree / "in")
    (tree / "in/z.png").symlink_to(tree / "in/a.png")
    args = expanded("in/**/?.png")
    assert args.inputs == ["in/a.png", "in/g/a.png", "in/g/h/a.png", "in/i[1]/a.png"]
    assert "in/i[1]/a.png" not in expanded("in/**/?.png", out="in/i[1]").inputs


def test_masks_next_to_their_images_are_no_inputs(tree, capsys):
    for name in ("set/images/a.png", "set/masks/a.png", "only/masks/a.png"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_bytes(b"")
    assert expanded("set/**/*.png").inputs == ["set/images/a.png"]
    assert "skipped 1 matches in folders of masks" in capsys.readouterr().out
    assert expanded("only/**/*.png").inputs == ["only/masks/a.png"]
    assert expanded("set/masks/*.png").inputs == ["set/masks/a.png"]


@pytest.mark.parametrize("pattern", ["in/*.bmp", "nowhere/*.png", "in/x[1].png", "in/**/*.dcm"])
def test_a_pattern_without_a_match_is_one_line(pattern, tree, run, monkeypatch, capsys):
    _, error = called(monkeypatch, capsys, "--weights", run, "--out", "o", pattern, status=2)
    assert error == f"error: {pattern}: no file or folder matches this pattern\n"
    assert not (tree / "o").exists()


def test_a_pattern_that_matches_other_files_alone_is_one_line(tree, run, monkeypatch, capsys):
    _, error = called(monkeypatch, capsys, "--weights", run, "--out", "o", "in/*.txt", status=2)
    assert "no images in this folder, only 1 .txt" in error


def test_images_by_a_pattern_keep_their_folders(run, tmp_path, monkeypatch, capsys):
    for k, name in enumerate(("p1/a.png", "p2/a.png", "p2/g/a.png", "p2/b.jpg")):
        photo(tmp_path / "in" / name, seed=k)
    (tmp_path / "in/notes.txt").write_text("no image")
    out = tmp_path / "out"
    said, _ = called(monkeypatch, capsys, "--weights", run, "--out", out, tmp_path / "in/**/*.png")
    assert "3 files or folders match" in said
    assert masks_in(out) == {"p1/a", "p2/a", "p2/g/a"}
    assert [row["name"] for row in rows(out / "measurements.csv")][::2] == [
        "p1/a",
        "p2/a",
        "p2/g/a",
    ]

    called(monkeypatch, capsys, "--weights", run, "--out", tmp_path / "typed", tmp_path / "in")
    for name in masks_in(out):
        mask = f"{name}.png"
        assert (out / mask).read_bytes() == (tmp_path / "typed" / mask).read_bytes()

    # Folders that match are read whole, and other files are counted.
    said, _ = called(
        monkeypatch, capsys, "--weights", run, "--out", tmp_path / "all", tmp_path / "in/*"
    )
    assert "skipped files that are not images: 1 .txt" in said
    assert masks_in(tmp_path / "all") == {"p1/a", "p2/a", "p2/g/a", "p2/b"}


def test_volumes_by_a_pattern_keep_their_folders(scans, tmp_path, monkeypatch, capsys):
    for k, name in enumerate(("p1/ct", "p2/ct", "p2/late/ct")):
        volume(tmp_path / f"cohort/{name}.nii.gz", seed=k)
    out = tmp_path / "out"
    pattern = tmp_path / "cohort/**/*.nii.gz"
    called(monkeypatch, capsys, "--weights", scans, "--out", out, pattern)
    assert masks_in(out) == {"p1/ct", "p2/ct", "p2/late/ct"}


def test_channels_that_a_pattern_matches_belong_together(tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run", channels=2, intensity=None)
    for k, name in enumerate(("p1/x_0000", "p1/x_0001", "p2/x_0000", "p2/x_0001")):
        volume(tmp_path / f"in/{name}.nii.gz", seed=k)
    out = tmp_path / "out"
    called(monkeypatch, capsys, "--weights", weights, "--out", out, tmp_path / "in/*/x*")
    assert masks_in(out) == {"p1/x", "p2/x"}


# --- texts of a file -----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for k, name in enumerate(("a.png", "b.jpg", "g/a.png")):
        photo(tmp_path / "photos" / name, seed=k)
    return tmp_path / "photos"


def table(tmp_path, *lines, name="prompts.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def probabilities(out, name):
    return np.asarray(Image.open(out / f"{name}_probability.png")) / 65535


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_every_image_has_its_text(separator, reader, photos, tmp_path, monkeypatch, capsys):
    lines = ["image,prompt", "b.jpg,a tumour on the left", "./a.png,one polyp", "g/a,one polyp"]
    lines = [line.replace(",", separator) for line in lines]
    lines += [f'other.png{separator}"a, b; c"']
    given = ["--weights", reader, photos, "--probabilities"]
    file = table(tmp_path, *lines)
    out = tmp_path / "out"
    said, _ = called(monkeypatch, capsys, *given, "--out", out, "--prompts-csv", file)
    assert "1 row for another image is ignored (other.png)" in said
    texts = {"a": "one polyp", "b": "a tumour on the left", "g/a": "one polyp"}
    assert {row["name"]: row["prompt"] for row in rows(out / "measurements.csv")} == texts

    for k, text in enumerate(sorted({*texts.values()})):
        alone = tmp_path / f"alone{k}"
        called(monkeypatch, capsys, *given, "--out", alone, "--prompt", text)
        for name in texts:
            same = (probabilities(out, name) == probabilities(alone, name)).all()
            assert same == (texts[name] == text), (name, text)


def test_an_image_with_several_texts_has_several_masks(
    reader, photos, tmp_path, monkeypatch, capsys
):
    file = table(
        tmp_path, "image,prompt", "b,polyp", "a.png,x", "g/a.png,first", 'g/a.png,"second, too"'
    )
    file.write_text(file.read_text().replace("a.png,x", "./a.png,x"))
    given = ["--weights", reader, photos, "--prompts-csv", file, "--probabilities"]
    out = tmp_path / "out"
    called(monkeypatch, capsys, *given, "--out", out)
    names = {
        f"{name}{end}" for name in ("a", "b", "g/a_1", "g/a_2") for end in ("", "_probability")
    }
    assert masks_in(out) == names
    written = [(row["name"], row["prompt"]) for row in rows(out / "measurements.csv")]
    assert written == [("a", "x"), ("b", "polyp"), ("g/a_1", "first"), ("g/a_2", "second, too")]
    assert (probabilities(out, "g/a_1") != probabilities(out, "g/a_2")).any()

    # The same call continues; with another text for a mask that exists it is refused.
    (out / "g/a_2.png").unlink()
    before = contents(out)
    said, _ = called(monkeypatch, capsys, *given, "--out", out, "--skip-existing")
    assert "3 of 4 images are predicted already" in said
    assert {**before, "g/a_2.png": contents(out)["g/a_2.png"]} == contents(out)
    file.write_text(file.read_text().replace("first", "changed"))
    _, error = called(monkeypatch, capsys, *given, "--out", out, "--skip-existing", status=2)
    assert "g/a_1 was predicted with the prompt “first”; choose another --out" in error


GOOD = ("./a.png,x", "b.jpg,y", "g/a.png,z")


@pytest.mark.parametrize(
    "lines, message",
    [
        (["image,prompt", *GOOD[:2]], "1 of 3 images have no prompt (g/a.png); add rows for them"),
        (["image,prompt", GOOD[0]], "2 of 3 images have no prompt (b.jpg, g/a.png)"),
        (["image,prompt", *GOOD, "b.jpg,"], "line 5: has no prompt"),
        (["image,prompt", *GOOD, ',"text"'], "line 5: has no image"),
        (["image,text", *GOOD], "has no prompt; write image,prompt"),
        (["prompt", "x"], "has no image; write image,prompt"),
        (["image,prompt", "c.png,x"], "none of the 1 prompts is for any of the images; the file"),
        (["image,prompt"], "holds no prompts"),
        ([], "holds no prompts"),
        (["image,prompt", *GOOD, "a.png,x"], "line 5: a.png fits 2 images; add its folder"),
        (["image,prompt", *GOOD, "b.jpg,p6"], "line 5: p6 is a prompt type of data sets; write"),
        (["image,prompt", *GOOD, "b.jpg,a, b"], "line 5: has 3 values for 2 columns"),
    ],
)
def test_texts_that_do_not_fit_are_one_line(
    lines, message, reader, photos, tmp_path, monkeypatch, capsys
):
    file = table(tmp_path, *lines)
    given = ["--weights", reader, photos, "--out", tmp_path / "out", "--prompts-csv", file]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{file}" in error and message in error
    assert not (tmp_path / "out").exists()


def test_other_options_beside_the_texts(reader, run, photos, tmp_path, monkeypatch, capsys):
    file = table(tmp_path, "image,prompt", *GOOD)
    given = [photos, "--out", tmp_path / "out", "--prompts-csv", file]
    refused = [
        ([*given, "--weights", reader, "--prompt", "x"], "--prompt and --prompts-csv both give"),
        ([*given, "--weights", run], "--prompts-csv: this model reads no text"),
        (
            [*given[:-1], tmp_path / "no.csv", "--weights", reader],
            "no.csv: no such file of prompts",
        ),
    ]
    for arguments, message in refused:
        _, error = called(monkeypatch, capsys, *arguments, status=2)
        assert message in error


def pairs(root, names=("a", "b")):
    for k, name in enumerate(names):
        photo(root / f"images/{name}.png", seed=k)
        (root / "masks").mkdir(exist_ok=True)
        mask = np.zeros((40, 50), np.uint8)
        mask[10:20, 10 : 20 + k] = 255
        Image.fromarray(mask).save(root / f"masks/{name}.png")


def test_images_of_a_data_set_have_their_texts(reader, tmp_path, monkeypatch, capsys):
    pairs(tmp_path / "set")
    file = table(tmp_path, "image,prompt", "a.png,one", "b.png,two", "b.png,three")
    given = ["--weights", reader, tmp_path / "set", "--out", tmp_path / "out", "--overlays"]
    called(monkeypatch, capsys, *given, "--prompts-csv", file)
    names = {"a", "b_1", "b_2"}
    assert masks_in(tmp_path / "out") == names | {f"{name}_overlay" for name in names}
    for name in names:  # the outline of the mask of the image
        overlay = np.asarray(Image.open(tmp_path / f"out/{name}_overlay.png"))
        assert (overlay[10, 10:18] == (0, 230, 90)).all()


def test_an_image_with_two_masks_needs_its_folder(reader, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    pairs(root)
    (root / "anns").mkdir()
    entry = '{"img_name": "a.png", "mask_name": "%s.png", "prompts": {"p1": "x"}}'
    (root / "anns/test.json").write_text(f"[{entry % 'a'}, {entry % 'b'}]")
    file = table(tmp_path, "image,prompt", "a.png,one")
    given = ["--weights", reader, root, "--out", tmp_path / "out", "--prompts-csv", file]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "a.png has 2 masks in its data set" in error and "pass its folder of images" in error


# --- DICOM ---------------------------------------------------------------------------------------


def itk_geometry(image):
    """Where SimpleITK puts the voxels: its origin, spacing and directions."""
    return np.concatenate([image.GetOrigin(), image.GetSpacing(), image.GetDirection()])


def series_of_simpleitk(folder):
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("ending", [".dcm", ""])
def test_a_series_is_a_volume_on_its_own_grid(ending, scans, tmp_path, monkeypatch, capsys):
    image, _ = scan()
    write_series(tmp_path / "in/p1/ct", image, ending=ending)
    seen = []
    read_volume = nifti.read_volume

    def read(*arguments):
        voxels, grid = read_volume(*arguments)
        seen.append((voxels, grid))
        return voxels, grid

    monkeypatch.setattr(nifti, "read_volume", read)
    out = tmp_path / "out"
    given = ["--weights", scans, tmp_path / "in", "--probabilities"]
    said, _ = called(monkeypatch, capsys, *given, "--out", out)
    assert "8 DICOM files" in said and "1 DICOM series" in said
    assert {*contents(out)} == {
        "classes.json", "measurements.csv", "p1/ct.nii.gz", "p1/ct_probability.nii.gz"
    }  # fmt: skip

    series = series_of_simpleitk(tmp_path / "in/p1/ct")
    mask = SimpleITK.ReadImage(str(out / "p1/ct.nii.gz"))
    assert mask.GetSize() == series.GetSize()
    np.testing.assert_allclose(itk_geometry(mask), itk_geometry(series), rtol=0, atol=1e-4)

    # What the model got are the Hounsfield units of SimpleITK, at the same places.
    ((voxels, grid),) = seen
    stored = grid.to_stored(voxels[0])
    expected = SimpleITK.GetArrayFromImage(series).transpose(2, 1, 0)
    np.testing.assert_array_equal(stored, expected)
    assert expected.min() == -1000

    # The same volume as NIfTI has the same masks.
    path = tmp_path / "nifti/ct.nii.gz"
    path.parent.mkdir()
    SimpleITK.WriteImage(series, str(path))
    called(
        monkeypatch, capsys, "--weights", scans, path, "--out", tmp_path / "n", "--probabilities"
    )
    ours = nibabel.load(out / "p1/ct_probability.nii.gz").get_fdata()
    theirs = nibabel.load(tmp_path / "n/ct_probability.nii.gz").get_fdata()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_series_have_unique_names_and_one_that_is_damaged_fails_alone(
    scans, tmp_path, monkeypatch, capsys
):
    image, _ = scan()
    root = tmp_path / "in"
    for number in (3, 4):
        for k, data in enumerate(slices_of(image, series=number)):
            save(data, root / f"p1/S{number}_{k}.dcm")
    write_series(root / "p2", image, patient="B")
    write_series(root / "p3", image, patient="C")
    (root / "p3/IM0004.dcm").unlink()  # a gap
    write_series(root / "p4/deep", image[:, :, :2], patient="D")  # a localizer
    (root / "p5").mkdir()
    (root / "p5/x.dcm").write_bytes(b"\0" * 300)
    given = ["--weights", scans, root, "--out", tmp_path / "out"]
    said, error = called(monkeypatch, capsys, *given, status=1)
    assert masks_in(tmp_path / "out") == {"p1_3", "p1_4", "p2"}
    assert "left out 1 series that are localizers or have fewer than 3 slices" in said
    first, *lines = error.splitlines()
    assert "2 of 5 volumes could not be predicted" in first
    assert "p3: 1 slices are missing" in lines[0] and "p5/x.dcm: not readable as DICOM" in lines[1]
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing", status=1)
    assert "3 of 5 volumes are predicted already" in said


@pytest.mark.parametrize(
    "pattern, expected",
    [("**/*.dcm", {"p1", "p2"}), ("p*", {"p1", "p2"}), ("p1", {"p1"}), ("p2/IM*", {"p2"})],
)
def test_series_by_pattern_and_folder(pattern, expected, scans, tmp_path, monkeypatch, capsys):
    image, _ = scan()
    for patient in ("p1", "p2"):
        write_series(tmp_path / f"in/{patient}", image, patient=patient)
    given = ["--weights", scans, "--out", tmp_path / "out", tmp_path / "in" / pattern]
    called(monkeypatch, capsys, *given)
    assert masks_in(tmp_path / "out") == expected


def test_typed_slices_are_a_series(scans, tmp_path, monkeypatch, capsys):
    image, _ = scan()
    write_series(tmp_path / "in/p2", image)
    given = ["--weights", scans, "--out", tmp_path / "out", *(tmp_path / "in/p2").iterdir()]
    called(monkeypatch, capsys, *given)
    assert masks_in(tmp_path / "out") == {"p2"}


def test_nothing_of_a_series_stays_in_the_temporary_folder(scans, tmp_path, monkeypatch, capsys):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    image, _ = scan()
    write_series(tmp_path / "in", image // 2 + 3000)  # no HU, which a notice says
    given = ["--weights", scans, "--out", tmp_path / "out", tmp_path / "in"]
    said, _ = called(monkeypatch, capsys, *given)
    assert f"{tmp_path / 'in'}: " in said.replace(" DICOM files", "") and "series.nii" not in said
    assert not [*(tmp_path / "temporary").iterdir()]

    two = volume_run(tmp_path / "two", channels=2, intensity=None)
    given = ["--weights", two, "--out", tmp_path / "o", tmp_path / "in"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert f"{tmp_path / 'in'}: 1 channels, the model takes 2" in error
    assert not [*(tmp_path / "temporary").iterdir()]


def test_dicom_among_other_volumes_is_counted(scans, tmp_path, monkeypatch, capsys):
    image, _ = scan()
    write_series(tmp_path / "in/ct", image)
    volume(tmp_path / "in/a.nii.gz")
    given = ["--weights", scans, "--out", tmp_path / "out", tmp_path / "in"]
    said, _ = called(monkeypatch, capsys, *given)
    assert "skipped files that are not volumes: 8 .dcm" in said
    assert masks_in(tmp_path / "out") == {"a"}


def x_ray(shape=(40, 50), **fields):
    rng = np.random.default_rng(3)
    data = header("DX", X_RAY, "P1", 1)
    put_pixels(data, rng.integers(0, 4000, shape, dtype=np.uint16))
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def ultrasound(shape=(40, 50, 3)):
    data = header("US", ULTRASOUND, "P2", 1)
    return put_pixels(data, np.random.default_rng(4).integers(0, 255, shape, np.uint8), "RGB")


def test_dicom_images_are_images(run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "in"
    save(x_ray(ImagerPixelSpacing=[0.2, 0.1], WindowCenter=2000, WindowWidth=3000), root / "x.dcm")
    save(ultrasound(), root / "g/1.2.840.77")  # no ending, but a UID
    out = tmp_path / "out"
    said, _ = called(monkeypatch, capsys, "--weights", run, "--out", out, root, "--overlays")
    assert "2 DICOM files" in said
    assert masks_in(out) == {"x", "x_overlay", "g/1"}
    assert (out / "g/1.2.840.77.png").is_file()
    sizes = {row["name"]: (row["pixel_width_mm"], row["pixel_height_mm"])
             for row in rows(out / "measurements.csv")}  # fmt: skip
    assert sizes == {"x": ("0.1", "0.2"), "g/1.2.840.77": ("", "")}

    # The model got what a viewer shows: the window of the header, as PNG.
    stored = np.asarray(x_ray().pixel_array, np.float64)
    shown = np.clip((stored - 1999.5) / 2999 + 0.5, 0, 1)  # PS3.3, C.11.2.1.2.1
    (tmp_path / "png").mkdir()
    Image.fromarray(np.rint(255 * shown).astype(np.uint8)).save(tmp_path / "png/x.png")
    Image.fromarray(ultrasound().pixel_array).save(tmp_path / "png/us.png")
    called(monkeypatch, capsys, "--weights", run, "--out", tmp_path / "p", tmp_path / "png")
    assert (tmp_path / "p/x.png").read_bytes() == (out / "x.png").read_bytes()
    assert (tmp_path / "p/us.png").read_bytes() == (out / "g/1.2.840.77.png").read_bytes()

    called(monkeypatch, capsys, "--weights", run, "--out", tmp_path / "o", root / "x.dcm",
           "--pixel-size", 3, 4)  # fmt: skip
    assert rows(tmp_path / "o/measurements.csv")[0]["pixel_width_mm"] == "3.0"


def test_a_damaged_dicom_image_and_a_film_fail_alone(run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "in"
    save(x_ray(), root / "good.dcm")
    save(header("SR", X_RAY, "P1", 1), root / "report.dcm")
    save(x_ray(NumberOfFrames=2), root / "film.dcm")
    (root / "bad.dcm").write_bytes((root / "good.dcm").read_bytes()[:2000])
    given = ["--weights", run, "--out", tmp_path / "out", root]
    said, error = called(monkeypatch, capsys, *given, status=1)
    assert "skipped DICOM files without an image: 1 SR" in said
    assert masks_in(tmp_path / "out") == {"good"}
    first, bad, film = error.splitlines()
    assert "2 of 3 images" in first and "bad.dcm: " in bad and "is a film of 2 frames" in film


def test_dicom_of_the_other_kind_is_one_line(run, scans, tmp_path, monkeypatch, capsys):
    save(x_ray(), tmp_path / "in/x.dcm")
    given = ["--weights", scans, "--out", tmp_path / "out", tmp_path / "in"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "its DICOM files (1 DX) hold no series of 3 or more slices" in error
    save(header("SR", X_RAY, "P1", 1), tmp_path / "sr/report.dcm")
    given = ["--weights", run, "--out", tmp_path / "out", tmp_path / "sr"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "holds DICOM files without an image (1 SR)" in error


def test_without_pydicom_the_package_is_named(run, scans, tmp_path, monkeypatch, capsys):
    save(x_ray(), tmp_path / "in/x.dcm")
    for name in ("pydicom", "pydicom.pixels"):
        monkeypatch.setitem(sys.modules, name, None)
    for weights in (run, scans):
        for given in (tmp_path / "in", tmp_path / "in/x.dcm", tmp_path / "in/*.dcm"):
            arguments = ["--weights", weights, "--out", tmp_path / "out", given]
            _, error = called(monkeypatch, capsys, *arguments, status=2)
            assert "x.dcm: DICOM files need pydicom: pip install pydicom" in error


def test_weights_of_unknown_kind_with_dicom_need_a_model(tmp_path, monkeypatch, capsys):
    save(x_ray(), tmp_path / "x.dcm")
    weights = tmp_path / "model.pth"
    weights.touch()
    given = ["--weights", weights, "--out", tmp_path / "out", tmp_path / "x.dcm"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "--model is missing" in error


def test_a_mistyped_run_folder_is_named(tmp_path, monkeypatch, capsys):
    given = ["--weights", "runs/no-such-run", "--out", tmp_path / "out", tmp_path]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "runs/no-such-run: no such run folder or file of weights" in error
    assert "--model" not in error
