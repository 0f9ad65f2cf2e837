"""prepare.py import: volumes in NIfTI, NRRD and MetaImage become data sets like the Decathlon's."""

import itertools
import json
import shutil
import sys
from argparse import Namespace

import nibabel
import numpy as np
import pytest
import SimpleITK
from conftest import command, contents
from PIL import Image

import prepare
import train
from imaging import layouts, nifti
from preparation import import_volumes, itk_files

SIZE = (20, 16, 12)
# Axes turned about all three directions, 1.5 x 1.5 x 3 mm.
TURN = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.15)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN * (1.5, 1.5, 3)
OBLIQUE[:3, 3] = (-30, 12, 140)
LIVER_AND_TUMOUR = ("--classes", "liver,tumour")


def scan(k):
    """CT of a body in air, int16, and its labels, uint8: 1 a block, 2 a smaller one beside it."""
    rng = np.random.default_rng(k)
    image = np.full(SIZE, -1000, np.int16)
    image[3:17, 3:13, 1:11] = rng.integers(-20, 60, (14, 10, 10))
    labels = np.zeros(SIZE, np.uint8)
    labels[5:9, 5:9, 3:8] = 1
    labels[11:14, 6 + k % 3 : 9 + k % 3, 4:7] = 2
    return image, labels


def save(path, array, affine=OBLIQUE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def sister_folders(root, n=10):
    for k in range(n):
        image, labels = scan(k)
        save(root / f"images/p{k}.nii.gz", image)
        save(root / f"labels/p{k}.nii.gz", labels)
    return root


@pytest.fixture
def imported(monkeypatch, capsys, tmp_path):
    """Import tmp_path/source to tmp_path/mine. Return the status, the output, the errors."""

    def run(*options):
        arguments = ["import", tmp_path / "source", "--out", tmp_path / "mine", *options]
        return command(monkeypatch, capsys, prepare, *arguments)

    return run


def refused(result, tmp_path, *words):
    """Assert that an import failed with one line that holds the words, and wrote nothing."""
    status, _, error = result
    assert status == 2 and error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert not (tmp_path / "mine").exists()


def entries(root):
    """{name: (split, image, label)} of all volumes of a data set."""
    found = {}
    for split, listed in layouts.read_volumes(root).items():
        for entry in listed:
            found[entry.name] = split, entry.image, entry.mask
    return found


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj)


# --- NIfTI ----------------------------------------------------------------------------------------


def test_sister_folders_become_a_data_set_that_check_accepts(
    imported, tmp_path, monkeypatch, capsys
):
    source = sister_folders(tmp_path / "source")
    before = contents(source)
    status, text, error = imported(*LIVER_AND_TUMOUR)
    assert status == 0, error
    assert "10 volumes with label maps" in text and "CT, as p0.nii.gz reaches -1000" in text
    assert "split by volume; --groups FILE" in text
    assert contents(source) == before

    about = json.loads((tmp_path / "mine/dataset.json").read_text())
    assert about["labels"] == {"0": "background", "1": "liver", "2": "tumour"}
    assert about["modality"] == {"0": "CT"}
    found = entries(tmp_path / "mine")
    splits = sorted(split for split, _, _ in found.values())
    assert splits == ["test", *["train"] * 8, "val"]
    for name, (_, image, label) in found.items():
        assert image.read_bytes() == (source / f"images/{name}.nii.gz").read_bytes()
        assert label.read_bytes() == (source / f"labels/{name}.nii.gz").read_bytes()
    assert Image.open(tmp_path / "mine/overview.png").width > 600
    status, text, error = command(monkeypatch, capsys, prepare, "check", tmp_path / "mine")
    assert status == 0, text

    assert imported(*LIVER_AND_TUMOUR, "--out", tmp_path / "again")[0] == 0
    first = contents(tmp_path / "mine")
    second = contents(tmp_path / "again")
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert different == ["dataset.json"]  # it has the name of the folder


def test_a_model_trains_on_an_imported_data_set(imported, tmp_path, monkeypatch, capsys):
    sister_folders(tmp_path / "source", 3)
    assert imported(*LIVER_AND_TUMOUR)[0] == 0
    options = "--model swin_unetr3d --variant mini --weights none --size 64 32 32 --spacing 3 3 3"
    options += " --crops-per-volume 1 --workers 0 --overlap 0 --epochs 2 --device cpu"
    folders = ["--data", tmp_path / "mine", "--out", tmp_path / "run", "--cache", tmp_path / "c"]
    status, _, error = command(monkeypatch, capsys, train, *options.split(), *folders)
    assert status == 0, error
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 3


LAYOUTS = {  # image, label map of case k; the names that are written
    "lits": ("volume-{}.nii", "segmentation-{}.nii", "volume-{}"),
    "kits": ("case_0000{}/imaging.nii.gz", "case_0000{}/segmentation.nii.gz", "case_0000{}"),
    "case": ("P{}/ct.nii.gz", "P{}/seg.nii.gz", "P{}"),
    "endings": ("P{0}/scan_{0}.nii.gz", "P{0}/scan_{0}_seg.nii.gz", "scan_{0}"),
    "flat": ("a{}.nii.gz", "a{}_mask.nii.gz", "a{}"),
    "nnunet": ("imagesTr/a{}_0000.nii.gz", "labelsTr/a{}.nii.gz", "a{}"),
    "beside": ("a{}.nii.gz", "segmentations/a{}.nii.gz", "a{}"),
    "sister": ("img/img000{}.nii.gz", "masks/label000{}.nii.gz", "img000{}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_pair_images_and_label_maps(imported, tmp_path, layout):
    image_name, label_name, name = LAYOUTS[layout]
    for k in range(3):
        image, labels = scan(k)
        save(tmp_path / "source" / image_name.format(k), image)
        save(tmp_path / "source" / label_name.format(k), labels)
    status, _, error = imported(*LIVER_AND_TUMOUR)
    assert status == 0, error
    found = entries(tmp_path / "mine")
    assert sorted(found) == [name.format(k) for k in range(3)]
    for k in range(3):
        _, image, label = found[name.format(k)]
        np.testing.assert_array_equal(voxels(image), scan(k)[0])
        np.testing.assert_array_equal(voxels(label), scan(k)[1])
        assert image.read_bytes()[:2] == b"\x1f\x8b"  # compressed, as the name says


def test_names_that_look_the_same_are_equal(imported, tmp_path):
    image, labels = scan(0)
    save(tmp_path / "source/images/K\u00f6ln.nii.gz", image)
    save(tmp_path / "source/labels/Ko\u0308ln.nii.gz", labels)  # as macOS writes it
    assert imported(*LIVER_AND_TUMOUR)[0] == 0
    assert list(entries(tmp_path / "mine")) == ["K\u00f6ln"]


def test_globs_name_files_of_any_kind(imported, tmp_path):
    for k in range(3):
        image, labels = scan(k)
        save(tmp_path / f"source/visit{k}/baseline.nii.gz", image)
        save(tmp_path / f"source/visit{k}/followup.nii.gz", image)
        save(tmp_path / f"source/visit{k}/contour.nii.gz", labels)
    globs = ["--images", "*/baseline.nii.gz", "--masks", "*/contour.nii.gz"]
    status, _, error = imported(*globs, *LIVER_AND_TUMOUR)
    assert status == 0, error
    assert sorted(entries(tmp_path / "mine")) == ["visit0", "visit1", "visit2"]


def test_two_stars_stand_for_any_folders_or_none(imported, tmp_path):
    for folder in ("", "clinic/ward/"):
        image, labels = scan(len(folder))
        save(tmp_path / f"source/{folder}a_ct.nii.gz", image)
        save(tmp_path / f"source/{folder}a_drawn.nii.gz", labels)
    globs = ["--images", "**/*_ct.nii.gz", "--masks", "**/*_drawn.nii.gz"]
    status, _, error = imported(*globs, *LIVER_AND_TUMOUR)
    assert status == 0, error
    assert len(entries(tmp_path / "mine")) == 2


def test_254_classes_fit_into_a_label_map(tmp_path):
    names = [f"class {k}" for k in range(254)]
    args = Namespace(classes=None)
    assert import_volumes.chosen_names(names, args, tmp_path) == names
    with pytest.raises(ValueError, match="has 255 classes, at most 254"):
        import_volumes.chosen_names([*names, "one more"], args, tmp_path)


def test_split_folders_are_kept(imported, tmp_path):
    for split, k in (("train", 0), ("train", 1), ("valid", 0), ("testing", 5)):
        image, labels = scan(k)
        save(tmp_path / f"source/{split}/images/{k}.nii.gz", image)
        save(tmp_path / f"source/{split}/labels/{k}.nii.gz", labels)
    assert imported(*LIVER_AND_TUMOUR)[0] == 0
    splits = {name: split for name, (split, _, _) in entries(tmp_path / "mine").items()}
    expected = {"train_0": "train", "train_1": "train", "valid_0": "val", "testing_5": "test"}
    assert splits == expected


def test_test_images_may_lack_label_maps(imported, tmp_path):
    for k in range(4):
        folder = "Ts" if k == 3 else "Tr"
        save(tmp_path / f"source/images{folder}/a{k}.nii.gz", scan(k)[0])
        if k < 3:
            save(tmp_path / f"source/labelsTr/a{k}.nii.gz", scan(k)[1])
    status, text, error = imported(*LIVER_AND_TUMOUR)
    assert status == 0, error
    assert "test: 1 volumes, and 1 without labels" in text
    about = json.loads((tmp_path / "mine/dataset.json").read_text())
    assert "./imagesTs/a3.nii.gz" in about["test"]


def test_patients_of_volumes_stay_in_one_split(imported, tmp_path):
    sister_folders(tmp_path / "source", 6)
    lines = ["image,group", *(f"p{k}.nii.gz,{k // 2}" for k in range(6))]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    status, text, error = imported(*LIVER_AND_TUMOUR, "--groups", tmp_path / "groups.csv")
    assert status == 0, error
    assert "patients: 3" in text
    splits = {name: split for name, (split, _, _) in entries(tmp_path / "mine").items()}
    for k in (0, 2, 4):
        assert splits[f"p{k}"] == splits[f"p{k + 1}"]


def test_channels_of_brats_become_one_volume_in_the_order_of_its_weights(imported, tmp_path):
    for k in range(3):
        image, labels = scan(k)
        for number, channel in enumerate(("t1", "t1ce", "t2", "flair")):
            array = (image + 100 * number).astype(np.int16)
            save(tmp_path / f"source/B{k}/B{k}_{channel}.nii.gz", array)
        save(tmp_path / f"source/B{k}/B{k}_seg.nii.gz", labels)
    status, text, error = imported("--classes", "1=core,2=edema,4=enhancing")
    assert status == 0, error
    assert "FLAIR, T1ce, T1, T2" in text and "no label map holds: enhancing" in text
    _, path, _ = entries(tmp_path / "mine")["B1"]
    written = voxels(path)
    assert written.dtype == np.int16 and written.shape == (*SIZE, 4)
    for channel, number in enumerate((3, 1, 0, 2)):
        np.testing.assert_array_equal(written[..., channel], scan(1)[0] + 100 * number)
    np.testing.assert_allclose(nibabel.load(path).affine, OBLIQUE, atol=1e-4)
    about = json.loads((tmp_path / "mine/dataset.json").read_text())
    assert about["modality"] == {"0": "FLAIR", "1": "T1ce", "2": "T1", "3": "T2"}
    assert about["labels"] == {"0": "background", "1": "core", "2": "edema", "4": "enhancing"}


def test_the_modality_is_that_of_the_option(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    assert imported(*LIVER_AND_TUMOUR, "--modality", "MR")[0] == 0
    assert json.loads((tmp_path / "mine/dataset.json").read_text())["modality"] == {"0": "MR"}


def test_an_unknown_modality_is_said(imported, tmp_path):
    for k in range(3):
        image, labels = scan(k)
        save(tmp_path / f"source/images/p{k}.nii.gz", image + 1000)
        save(tmp_path / f"source/labels/p{k}.nii.gz", labels)
    status, text, error = imported(*LIVER_AND_TUMOUR)
    assert status == 0, error
    assert "modality: unknown, p0.nii.gz reaches 0; --modality CT or MR sets it" in text
    (tmp_path / "source/images").rename(tmp_path / "source/mr")
    status, text, error = imported(*LIVER_AND_TUMOUR, "--out", tmp_path / "named")
    assert status == 0 and "modality: MR, as the name of p0.nii.gz says" in text, error


def test_faulty_labels_of_a_dataset_json_are_refused(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    (tmp_path / "source/dataset.json").write_text('{"labels": {"background": 0, "liver": 1.5}}')
    refused(imported(), tmp_path, "dataset.json: label liver is 1.5")


def test_names_come_from_a_file_of_the_folder(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    names = {"0": "background", "1": "liver", "2": "cyst"}
    (tmp_path / "source/classes.json").write_text(json.dumps(names))
    assert imported()[0] == 0
    assert json.loads((tmp_path / "mine/dataset.json").read_text())["labels"] == names


def test_names_come_from_the_dataset_json_of_files_that_train_does_not_read(imported, tmp_path):
    for k in range(3):
        for kind, array in zip(("imagesTr", "labelsTr"), scan(k), strict=True):
            (tmp_path / "source" / kind).mkdir(parents=True, exist_ok=True)
            path = tmp_path / f"source/{kind}/a{k}.nrrd"
            SimpleITK.WriteImage(itk_image(array), str(path))
    about = {"labels": {"background": 0, "liver": 1, "tumour": 2}}
    (tmp_path / "source/dataset.json").write_text(json.dumps(about))
    status, _, error = imported()
    assert status == 0, error
    assert json.loads((tmp_path / "mine/dataset.json").read_text())["labels"] == about["labels"]
    assert sorted(entries(tmp_path / "mine")) == ["a0", "a1", "a2"]


# --- faulty folders -------------------------------------------------------------------------------


def test_numbers_without_names_are_refused_with_the_option(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    refused(imported(), tmp_path, "numbers 1, 2", "--classes 1=NAME,2=NAME")
    refused(imported("--classes", "liver"), tmp_path, "holds 2", "--classes")
    refused(imported("--classes", "liver,liver"), tmp_path, "repeated")
    refused(imported("--classes", "liver,,x"), tmp_path, "expected liver,tumour")


def test_files_without_their_counterpart_are_refused_or_left_out(imported, tmp_path):
    sister_folders(tmp_path / "source", 4)
    (tmp_path / "source/labels/p2.nii.gz").unlink()
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "images/p2.nii.gz: has no label map")
    assert imported(*LIVER_AND_TUMOUR, "--skip-unpaired")[0] == 0
    assert sorted(entries(tmp_path / "mine")) == ["p0", "p1", "p3"]


def test_two_label_maps_for_an_image_are_refused(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    save(tmp_path / "source/labels/p1_seg.nii.gz", scan(1)[1])
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "2 label maps for p1", "--masks 'GLOB'")


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_a_label_map_on_another_grid_is_refused(imported, tmp_path, ending):
    sister_folders(tmp_path / "source", 3)
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    path = save(tmp_path / "source/labels/p1.nii.gz", scan(1)[1], moved)
    if ending == ".nrrd":
        image = SimpleITK.ReadImage(str(path))
        path.unlink()
        SimpleITK.WriteImage(image, str(path).replace(".nii.gz", ".nrrd"))
    refused(
        imported(*LIVER_AND_TUMOUR),
        tmp_path,
        "label p1.nii.gz" if ending == ".nrrd" else "p1.nii.gz",
        "its affine is 1 off",
    )


def test_a_damaged_file_is_refused(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    path = tmp_path / "source/images/p1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "images/p1.nii.gz", "ends too early")


def test_soft_masks_are_refused(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    save(tmp_path / "source/labels/p1.nii.gz", scan(1)[1].astype(np.float32) / 3)
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "p1: holds 1 channels of 0 to 0.666667")


def test_folders_that_train_reads_need_no_import(imported, tmp_path):
    sister_folders(tmp_path / "source", 3)
    assert imported(*LIVER_AND_TUMOUR)[0] == 0
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "mine").rename(tmp_path / "source")
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "reads this folder as it is (3 volumes")


# --- one mask for each class ----------------------------------------------------------------------


def total_segmentator(root, n=3):
    """Liver, spleen, and a tumour that shares 8 voxels with the liver."""
    for k in range(n):
        image, _ = scan(k)
        save(root / f"s{k}/ct.nii.gz", image)
        for name, x in (("spleen", 12), ("liver", 4), ("tumour", 7)):
            mask = np.zeros(SIZE, np.uint8)
            mask[x : x + 4, 5:9, 5:7] = 1
            save(root / f"s{k}/segmentations/{name}.nii.gz", mask)
    return root


def test_masks_of_structures_are_merged(imported, tmp_path):
    total_segmentator(tmp_path / "source")
    (tmp_path / "source/meta.csv").write_text(
        "image_id;age;split\ns0;60;train\ns1;61;val\ns2;62;test\n"
    )
    status, text, error = imported()
    assert status == 0, error
    assert "source/s0/ct.nii.gz (8 voxels)" in text and "structures overlap" in text
    about = json.loads((tmp_path / "mine/dataset.json").read_text())
    assert about["labels"] == {"0": "background", "1": "liver", "2": "spleen", "3": "tumour"}
    found = entries(tmp_path / "mine")
    assert {name: split for name, (split, _, _) in found.items()} == {
        "s0": "train",
        "s1": "val",
        "s2": "test",
    }
    labels = voxels(found["s1"][2])
    expected = np.zeros(SIZE, np.uint8)
    expected[4:8, 5:9, 5:7] = 1
    expected[12:16, 5:9, 5:7] = 2
    expected[7:11, 5:9, 5:7] = 3
    np.testing.assert_array_equal(labels, expected)


def test_a_damaged_meta_csv_is_refused(imported, tmp_path):
    total_segmentator(tmp_path / "source")
    open_quote = 'image_id;split\ns0;"train' + "x" * 200_000
    (tmp_path / "source/meta.csv").write_text(open_quote)
    refused(imported(), tmp_path, "meta.csv: is not valid CSV")


def test_structures_can_be_chosen(imported, tmp_path):
    total_segmentator(tmp_path / "source")
    assert imported("--classes", "tumour,spleen")[0] == 0
    labels = voxels(entries(tmp_path / "mine")["s0"][2])
    assert (labels == 1).sum() == 32 and (labels == 2).sum() == 32
    result = imported("--classes", "heart", "--out", tmp_path / "other")
    assert result[0] == 2 and "no 'heart', only liver, spleen, tumour" in result[2]


def test_a_missing_structure_is_refused(imported, tmp_path):
    total_segmentator(tmp_path / "source", 4)
    (tmp_path / "source/s1/segmentations/liver.nii.gz").unlink()
    refused(imported(), tmp_path, "s1: has no segmentations/liver.nii.gz", "--skip-unpaired")
    assert imported("--skip-unpaired")[0] == 0
    assert sorted(entries(tmp_path / "mine")) == ["s0", "s2", "s3"]


def test_a_structure_on_another_grid_is_refused(imported, tmp_path):
    total_segmentator(tmp_path / "source")
    save(tmp_path / "source/s1/segmentations/liver.nii.gz", np.zeros(SIZE, np.uint8), np.eye(4))
    refused(imported(), tmp_path, "liver.nii.gz: its affine is")


def test_a_structure_has_one_channel_and_one_value(imported, tmp_path):
    total_segmentator(tmp_path / "source")
    liver = tmp_path / "source/s1/segmentations/liver.nii.gz"
    save(liver, np.zeros((*SIZE, 2), np.uint8))
    refused(imported(), tmp_path, "liver.nii.gz: holds 2 channels of 0 to 0; a mask has one,")
    values = np.zeros(SIZE, np.uint8)
    values[1:3, 2, 2] = (1, 3)
    save(liver, values)
    refused(imported(), tmp_path, "liver.nii.gz: holds 1 channel of 0 to 3; a mask has one")


# --- NRRD and MetaImage ---------------------------------------------------------------------------

DIRECTION = nibabel.eulerangles.euler2mat(-0.4, 0.25, 0.1)


def itk_image(array):
    """An image of SimpleITK of an array (X,Y,Z) on an oblique grid."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing((0.75, 1.25, 2.5))
    image.SetOrigin((11.5, -80.25, 300))
    image.SetDirection(DIRECTION.ravel().tolist())
    return image


def assert_same_positions(path, image):
    """Assert that each corner voxel of a NIfTI file lies where SimpleITK says."""
    affine = nifti.read_grid(path).affine
    for corner in itertools.product(*((0, side - 1) for side in image.GetSize())):
        x, y, z = image.TransformIndexToPhysicalPoint(corner)
        position = affine @ (*corner, 1)
        np.testing.assert_allclose(position[:3], (-x, -y, z), atol=1e-3)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_other_formats_keep_voxels_and_positions(imported, tmp_path, ending):
    folder = tmp_path / "source"
    folder.mkdir()
    for k in range(3):
        image, labels = scan(k)
        SimpleITK.WriteImage(itk_image(image), str(folder / f"a{k}{ending}"))
        SimpleITK.WriteImage(itk_image(labels), str(folder / f"a{k}_labels{ending}"))
    before = contents(folder)
    status, text, error = imported(*LIVER_AND_TUMOUR)
    assert status == 0, error
    assert f"Read as {'nrrd' if ending[1] == 'n' else 'mha'}: 3 volumes" in text
    assert contents(folder) == before

    for k in range(3):
        _, image, label = entries(tmp_path / "mine")[f"a{k}"]
        np.testing.assert_array_equal(voxels(image), scan(k)[0])
        np.testing.assert_array_equal(voxels(label), scan(k)[1])
        assert voxels(image).dtype == np.int16 and voxels(label).dtype == np.uint8
        assert_same_positions(image, itk_image(scan(k)[0]))
        assert_same_positions(label, itk_image(scan(k)[0]))
        written = SimpleITK.ReadImage(str(image))  # ITK's own reader of NIfTI agrees
        np.testing.assert_allclose(written.GetOrigin(), (11.5, -80.25, 300), atol=1e-3)
        np.testing.assert_allclose(written.GetSpacing(), (0.75, 1.25, 2.5), atol=1e-5)
        np.testing.assert_allclose(written.GetDirection(), DIRECTION.ravel(), atol=1e-5)


def test_floats_and_channels_are_kept(imported, tmp_path):
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    channels = rng.normal(size=(*SIZE, 2)).astype(np.float32)
    image = itk_image(channels[..., 0])
    both = SimpleITK.Compose(image, itk_image(channels[..., 1]))
    SimpleITK.WriteImage(both, str(tmp_path / "source/a.nrrd"))
    SimpleITK.WriteImage(itk_image(scan(0)[1]), str(tmp_path / "source/a_seg.nrrd"))
    assert imported(*LIVER_AND_TUMOUR, "--modality", "MR")[0] == 0
    _, path, _ = entries(tmp_path / "mine")["a"]
    np.testing.assert_array_equal(voxels(path), channels)


def test_volumes_without_label_maps_are_written_for_prediction(imported, tmp_path):
    (tmp_path / "source").mkdir()
    for k in range(2):
        SimpleITK.WriteImage(itk_image(scan(k)[0]), str(tmp_path / f"source/a{k}.nrrd"))
    status, text, error = imported()
    assert status == 0, error
    assert "2 volumes without label maps" in text and "predict.py --weights RUN" in text
    names = sorted(path.name for path in (tmp_path / "mine/imagesTs").iterdir())
    assert names == ["a0.nii.gz", "a1.nii.gz"]


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_truncated_file_is_refused(imported, tmp_path, ending):
    (tmp_path / "source").mkdir()
    for k in range(3):
        image, labels = scan(k)
        SimpleITK.WriteImage(itk_image(image), str(tmp_path / f"source/a{k}{ending}"))
        SimpleITK.WriteImage(itk_image(labels), str(tmp_path / f"source/a{k}_seg{ending}"))
    path = tmp_path / f"source/a1{ending}"
    path.write_bytes(path.read_bytes()[:3000])
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, f"a1{ending}: not readable")


def test_errors_of_itk_are_one_line(tmp_path, capfd):
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(itk_image(scan(0)[0]), str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a.mha: not readable .its header or voxels are damaged"):
        itk_files.read_itk(path)
    assert capfd.readouterr().err == ""


def test_a_missing_package_is_named(imported, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    SimpleITK.WriteImage(itk_image(scan(0)[0]), str(tmp_path / "source/a.nrrd"))
    SimpleITK.WriteImage(itk_image(scan(0)[1]), str(tmp_path / "source/a_seg.nrrd"))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    refused(imported(*LIVER_AND_TUMOUR), tmp_path, "a.nrrd", "pip install SimpleITK")


def segmentation(labels, segments, crop=((0, 0, 0), SIZE)):
    """A segmentation as 3D Slicer stores it. segments: (name, value, layer); crop: start, end."""
    layers = [itk_image(layer) for layer in labels]
    image = SimpleITK.Compose(*layers) if len(layers) > 1 else layers[0]
    (a, b, c), (d, e, f) = crop
    image = image[a:d, b:e, c:f]  # with its origin at the first voxel that is left
    for k, (name, value, layer) in enumerate(segments):
        image.SetMetaData(f"Segment{k}_ID", f"Segment_{k + 1}")
        image.SetMetaData(f"Segment{k}_Name", name)
        image.SetMetaData(f"Segment{k}_LabelValue", str(value))
        image.SetMetaData(f"Segment{k}_Layer", str(layer))
        image.SetMetaData(f"Segment{k}_Color", "0.5 0.7 0.6")
        image.SetMetaData(f"Segment{k}_Extent", "0 19 0 15 0 11")
    image.SetMetaData("Segmentation_ReferenceImageExtentOffset", f"{a} {b} {c}")
    return image


def test_segmentations_of_slicer_name_their_classes(imported, tmp_path):
    liver = np.zeros(SIZE, np.uint8)
    liver[4:9, 5:9, 3:8] = 1
    tumour = np.zeros(SIZE, np.uint8)
    tumour[7:11, 6:8, 4:6] = 1
    kinds = {
        # A crop in one layer, numbered in the order of drawing; and two layers, which overlap.
        "P0": segmentation(
            [liver * 2], [("tumour", 1, 0), ("liver", 2, 0)], ((3, 4, 2), (15, 12, 10))
        ),
        "P1": segmentation([liver, tumour], [("liver", 1, 0), ("tumour", 1, 1)]),
        "P2": segmentation([liver], [("liver", 1, 0)]),
    }
    for k, (name, image) in enumerate(kinds.items()):
        (tmp_path / "source" / name).mkdir(parents=True)
        SimpleITK.WriteImage(itk_image(scan(k)[0]), str(tmp_path / f"source/{name}/CT.nrrd"))
        path = tmp_path / f"source/{name}/Segmentation.seg.nrrd"
        SimpleITK.WriteImage(image, str(path), True)
    status, text, error = imported("--classes", "liver,tumour")
    assert status == 0, error
    assert "P1/Segmentation.seg.nrrd (8 voxels): segments overlap" in text
    found = entries(tmp_path / "mine")
    expected = liver.copy()
    np.testing.assert_array_equal(voxels(found["P0"][2]), expected)
    np.testing.assert_array_equal(voxels(found["P2"][2]), expected)
    expected[tumour > 0] = 2
    np.testing.assert_array_equal(voxels(found["P1"][2]), expected)

    assert imported("--out", tmp_path / "all")[0] == 0
    labels = json.loads((tmp_path / "all/dataset.json").read_text())["labels"]
    assert labels == {"0": "background", "1": "tumour", "2": "liver"}  # in order of appearance


def test_a_segmentation_of_another_image_is_refused(imported, tmp_path):
    image, labels = scan(0)
    (tmp_path / "source").mkdir()
    SimpleITK.WriteImage(itk_image(image), str(tmp_path / "source/CT.nrrd"))
    path = str(tmp_path / "source/S.seg.nrrd")
    drawn = segmentation([labels], [("liver", 1, 0)])
    drawn.SetOrigin((11.9, -80.25, 300))
    SimpleITK.WriteImage(drawn, path, True)
    result = imported("--images", "CT.nrrd", "--masks", "S.seg.nrrd")
    refused(result, tmp_path, "S.seg.nrrd", "source geometry")
