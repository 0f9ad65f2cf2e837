"""What the page shows and saves of boxes, points and volumes, compared with predict.py."""

import zipfile
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, randomised, rows, write_run
from PIL import Image

import predict
import sam_decoder
import swin_unetr3d
from imaging import nifti, pictures
from page import objects, uploads, volume_case
from page.clicks import BOX, INSIDE, OUTSIDE, Clicks
from page.session import Session
from page.volume_case import VolumePrediction
from prediction.models import find_weights, load_model
from prediction.volumes import VolumePredictor

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)


def predicted(monkeypatch, capsys, *arguments) -> str:
    code, out, err = command(monkeypatch, capsys, predict, "--device", "cpu", *arguments)
    assert code == 0, err
    return out


# --- boxes and points -----------------------------------------------------------------------------

SAM = replace(sam_decoder.VARIANTS["mini"], image_size=64)


def sam_run(folder, **more):
    torch.manual_seed(0)
    model = sam_decoder.SAM(SAM)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return write_run(folder, sam_decoder.SAM, model.state_dict(), SAM, **more)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "scan 1.png"
    Image.fromarray(RNG.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def open_photo(photo) -> Session:
    return Session(np.asarray(Image.open(photo)), photo.stem)


def three_objects(label=1) -> Clicks:
    """A box with points, a point alone, and a box alone; the last two are of class `label`."""
    clicks = Clicks((48, 64)).click(5, 6, BOX).click(40, 30, BOX).click(20, 12, OUTSIDE)
    clicks = clicks.new_object().click(50, 40, INSIDE).name_class(label)
    return clicks.new_object().click(60, 10, BOX).click(30, 44, BOX)


@pytest.mark.parametrize("classes", [None, ["polyp"], ["background", "one", "two"]])
def test_predict_gives_the_mask_of_the_page_for_the_saved_clicks(
    classes, photo, tmp_path, monkeypatch, capsys
):
    more = {} if classes is None else {"classes": classes}
    run = sam_run(tmp_path / "run", **more)
    loaded = load_model(find_weights(run, "sam_decoder"), "cpu")
    session = open_photo(photo)
    clicks = three_objects(label=2 if classes and len(classes) > 1 else 1)
    found = objects.segment(session, loaded, clicks)
    middle = float(np.median([found.probabilities(k) for k in range(3)]))
    threshold = round(middle, 2)

    folder = tmp_path / "page"
    folder.mkdir()
    mask = np.asarray(Image.open(objects.write_mask(session, found, threshold, folder)))
    assert len(np.unique(mask)) == (3 if classes and len(classes) > 1 else 2)
    with zipfile.ZipFile(objects.write_clicks(session, found, folder)) as archive:
        archive.extractall(folder)

    out = tmp_path / "out"
    sheets = ["--boxes", folder / "scan 1_boxes.csv", "--points", folder / "scan 1_points.csv"]
    common = ["--weights", run, "--model", "sam_decoder", "--threshold", threshold, "--out", out]
    predicted(monkeypatch, capsys, *common, *sheets, photo)
    assert np.array_equal(mask, np.asarray(Image.open(out / "scan 1.png")))


def test_the_image_is_encoded_once(photo, tmp_path, monkeypatch):
    loaded = load_model(find_weights(sam_run(tmp_path / "run"), "sam_decoder"), "cpu")
    calls = []
    encode = loaded.model.encode_image
    monkeypatch.setattr(loaded.model, "encode_image", lambda x: calls.append(1) or encode(x))
    session = open_photo(photo)
    for clicks in (Clicks((48, 64)), three_objects(), three_objects().undo()):
        objects.segment(session, loaded, clicks)
    assert calls == [1]


def test_objects_are_numbered_measured_and_drawn(photo, tmp_path):
    loaded = load_model(find_weights(sam_run(tmp_path / "run"), "sam_decoder"), "cpu")
    session = open_photo(photo)
    found = objects.segment(session, loaded, three_objects())
    each = np.stack([found.probabilities(k) for k in range(3)])
    threshold = float(np.quantile(each.max(0), 0.4))

    masks = found.masks(threshold)
    assert np.array_equal(masks, each > np.float32(threshold))
    numbers = np.asarray(Image.open(objects.write_numbered(session, found, threshold, tmp_path)))
    assert np.array_equal(numbers, np.where(masks.any(0), each.argmax(0) + 1, 0))

    path = objects.write_measurements(session, found, threshold, (0.5, 2.0), tmp_path)
    table = rows(path)
    assert [row["object"] for row in table] == ["1", "2", "3"]
    assert [int(row["area_px"]) for row in table] == masks.sum((1, 2)).tolist()
    assert float(table[0]["area_mm2"]) == pytest.approx(masks[0].sum() * 0.5 * 2)
    shown = objects.areas(found, masks, (0.5, 2.0))
    for row, saved in zip(shown, table, strict=True):
        for column in ("object", "class", "area_px", "area_mm2", "share_of_image"):
            assert str(row[column])[:6] == saved[column][:6]
    assert objects.areas(found, masks, None)[0]["area_mm2"] is None


def test_masks_and_clicks_are_drawn_in_the_colours_of_the_objects():
    image = np.zeros((48, 64, 3), np.uint8)
    masks = np.zeros((2, 48, 64), bool)
    masks[0, 5:15, 5:15] = masks[1, 30:40, 40:50] = True
    clicks = Clicks((48, 64)).click(30, 10, BOX).click(34, 20, BOX)
    first, second = pictures.class_colours(2)
    drawn = np.asarray(objects.picture(image, masks, clicks, 1.0))
    assert (drawn[5:15, 5:15] == first).all() and (drawn[30:40, 40:50] == second).all()
    assert tuple(drawn[15, 30]) == first and not drawn[45].any()


def test_previews_are_large_enough_to_click_into():
    image = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    masks = image[None, ..., 0] > 127
    large, large_masks, scale = objects.preview(image, masks)
    assert scale == 11 and large.shape == (440, 660, 3)
    assert np.array_equal(large[5::11, 5::11], image)
    assert np.array_equal(large_masks[:, 5::11, 5::11], masks)
    assert objects.preview_scale((1000, 800)) == 1
    assert objects.preview_scale((2801, 800)) == 1 / 3
    wide = np.zeros((10, 2801, 3), np.uint8)
    small, small_masks, _ = objects.preview(wide, wide[None, ..., 0] > 0)
    assert small.shape[:2] == small_masks.shape[1:] == (4, 934)


# --- volumes --------------------------------------------------------------------------------------

SWIN = replace(
    swin_unetr3d.VARIANTS["mini"], image_size=(64, 32, 32), spacing=(4.0, 4.0, 4.0),
    intensity=(-175.0, 250.0),
)  # fmt: skip
KINDS = {
    "classes": replace(SWIN, num_classes=3, classes=("background", "liver", "spleen")),
    "single": replace(SWIN, num_classes=1, classes=("liver",), threshold=0.4213),
    "overlapping": replace(
        SWIN, num_classes=2, overlapping=True, classes=("background", "liver", "tumour")
    ),
}


def volume_predictor(folder, config, **more) -> VolumePredictor:
    model = randomised(swin_unetr3d.SwinUNETR(config))
    more = {"classes": list(config.classes)} | more
    run = write_run(folder, swin_unetr3d.SwinUNETR, model.state_dict(), config, **more)
    return VolumePredictor([load_model(find_weights(run), "cpu")], volume_case.OPTIONS)


@pytest.fixture
def scan(tmp_path):
    """HU (20,18,9) of a block in air, stored with axes to the left, back and head."""
    hu = np.full((20, 18, 9), -1000, np.int16)
    hu[3:17, 2:15, 1:8] = 60
    affine = np.array([[-4.0, 0, 0, 40], [0, -4.2, 0, 30], [0, 0, 5, -20], [0, 0, 0, 1]])
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu + RNG.integers(-20, 20, hu.shape, np.int16), affine), path)
    return path


def open_scan(scan, folder):
    folder.mkdir()
    name, paths = volume_case.find_case([scan], 1)
    return volume_case.open_volume(name, paths, folder)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_label_maps_and_measurements_are_those_of_predict(
    kind, scan, tmp_path, monkeypatch, capsys
):
    config = KINDS[kind]
    labels = {"labels": [0, 6, 1]} if kind == "classes" else {}
    predictor = volume_predictor(tmp_path / "run", config, **labels)
    volume = open_scan(scan, tmp_path / "files")
    prediction = VolumePrediction(predictor, volume)
    threshold = config.threshold
    if prediction.has_threshold:
        inside = prediction.probabilities()
        threshold = round(float(inside[inside > 0.02].median()), 2)  # another one

    folder = tmp_path / "page"
    folder.mkdir()
    saved = volume_case.write_label_maps(prediction, threshold, folder)
    volume_case.write_measurements(prediction, threshold, folder)
    out = tmp_path / "out"
    option = ["--threshold", threshold] if prediction.has_threshold else []
    predicted(monkeypatch, capsys, "--weights", tmp_path / "run", *option, "--out", out, scan)

    names = ["scan.nii.gz"]
    if kind == "overlapping":
        names = ["scan_liver.nii.gz", "scan_tumour.nii.gz"]
        with zipfile.ZipFile(saved) as archive:
            assert archive.namelist() == names
            archive.extractall(folder)
    for name in names:
        ours = nibabel.load(folder / name)
        theirs = nibabel.load(out / name)
        assert np.array_equal(ours.get_fdata(), theirs.get_fdata()) and ours.get_fdata().any()
        assert ours.header.binaryblock == theirs.header.binaryblock
    table = rows(out / "measurements.csv")
    assert rows(folder / "measurements.csv") == table

    millilitres = prediction.millilitres(threshold)
    assert millilitres == pytest.approx([float(row["volume_ml"]) for row in table], rel=1e-4)


def test_slices_show_the_masks_in_ras(scan, tmp_path):
    """The stored axes point to the left and back, so the picture must not be a stored slice."""
    volume = open_scan(scan, tmp_path / "files")
    assert volume.is_ct and volume.describe() == "scan: 20 x 18 x 9 voxels of 4 x 4.2 x 5 mm."
    grey = volume.picture("axial", 4, (-1000, 60), None, [], 0, 0.5)[..., 0] > 128
    h, w = grey.shape
    stored = nibabel.as_closest_canonical(nibabel.load(scan)).get_fdata()[:, :, 4]
    inside = np.argwhere(stored[::-1, ::-1].T > -500)  # rows from the front, columns from the right
    beside_letters = (slice(None), w // 3), (h // 3, slice(None))
    for axis, line in enumerate(beside_letters):
        first = np.flatnonzero(grey[line])[0] / grey.shape[axis]
        assert first == pytest.approx(inside[:, axis].min() / (18, 20)[axis], abs=0.03)

    found = VolumePrediction(volume_predictor(tmp_path / "run", KINDS["classes"]), volume)
    part = found.masks.labels[::-1, ::-1, 4].T  # (rows,columns)
    drawn = volume.picture("axial", 4, (-1000, 60), found, ["liver", "spleen"], 1.0, 0.5)
    y, x = np.argwhere(part == 2)[0]
    row, column = round((y + 0.5) * h / 18), round((x + 0.5) * w / 20)
    assert tuple(drawn[row, column]) == found.colours[1]
    assert found.fits_model
    last = volume.picture("axial", 8, (-1000, 60), None, [], 0, 0.5)
    assert np.array_equal(volume.picture("axial", 20, (-1000, 60), None, [], 0, 0.5), last)
    hidden = volume.picture("axial", 4, (-1000, 60), found, ["liver"], 1.0, 0.5)
    assert tuple(hidden[row, column]) != found.colours[1]


def test_two_predictions_of_a_volume_are_apart(scan, tmp_path):
    """Each has probabilities of its own, whose file goes with it, and counts as memory."""
    volume = open_scan(scan, tmp_path / "files")
    voxels = 20 * 18 * 9
    assert volume.nbytes == 2 * voxels
    for kind in ("single", "overlapping"):
        predictor = volume_predictor(tmp_path / kind, KINDS[kind])
        volume.predictions.append(VolumePrediction(predictor, volume))
    one, two = volume.predictions
    assert one.probabilities().shape == (1, 20, 18, 9)
    assert two.probabilities().shape == (2, 20, 18, 9)
    for found in (one, two):
        exact = found.predictor.predict_probabilities(*found.predictor.read([scan]))
        assert torch.equal(found.probabilities(), exact)
    tables = sum(found.masks.sums.nbytes + found.masks.steps.nbytes for found in (one, two))
    assert volume.nbytes == (2 + 1 + 2) * voxels + tables
    assert [*(tmp_path / "files").iterdir()] == []


def test_volumes_are_read_while_no_other_thread_redirects_the_output(scan, tmp_path, monkeypatch):
    read_volume = nifti.read_volume
    is_locked = []

    def read(*arguments):
        is_locked.append(uploads.READING.locked())
        return read_volume(*arguments)

    monkeypatch.setattr("imaging.nifti.read_volume", read)
    volume = open_scan(scan, tmp_path / "files")
    predictor = volume_predictor(tmp_path / "run", KINDS["classes"])
    VolumePrediction(predictor, volume)
    assert is_locked == [True, True]


def test_files_of_several_volumes_are_refused(scan, tmp_path):
    other = tmp_path / "other.nii.gz"
    other.write_bytes(scan.read_bytes())
    with pytest.raises(ValueError, match=r"These are 2 volumes \(other, scan\); choose the files"):
        volume_case.find_case([scan, other], 1)
    first = scan.rename(tmp_path / "a_0000.nii.gz")
    second = other.rename(tmp_path / "a_0001.nii.gz")
    assert volume_case.find_case([second, first], 2) == ("a", [first, second])


def test_a_volume_with_other_channels_than_the_model_is_refused(scan, tmp_path):
    predictor = volume_predictor(tmp_path / "run", replace(KINDS["classes"], in_channels=2))
    volume = open_scan(scan, tmp_path / "files")
    with pytest.raises(ValueError, match="channel"):
        VolumePrediction(predictor, volume)


def test_values_that_are_no_hounsfield_units_are_noticed(scan, tmp_path, capsys):
    stored = nibabel.load(scan)
    lifted = stored.get_fdata().astype(np.int16) + 1024  # the intercept was lost
    path = tmp_path / "lifted.nii.gz"
    nibabel.save(nibabel.Nifti1Image(lifted, stored.affine), path)
    predictor = volume_predictor(tmp_path / "run", KINDS["classes"])
    volume = open_scan(path, tmp_path / "files")
    assert not VolumePrediction(predictor, volume).fits_model
    assert "lifted" not in capsys.readouterr().out


def test_grey_levels_of_other_modalities_are_percentiles(tmp_path):
    path = tmp_path / "mr.nii"
    voxels = RNG.random((40, 40, 40), np.float32) * 3 + 5
    voxels[0, 0, 0] = 900
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    volume = open_scan(path, tmp_path / "files")
    assert not volume.is_ct and [*volume.windows] == ["Automatic", "Full range"]
    automatic = volume.picture("axial", 20, volume.windows["Automatic"], None, [], 0, 0.5)
    full = volume.picture("axial", 20, volume.windows["Full range"], None, [], 0, 0.5)
    assert automatic[100:400, 100:400].std() > 40 and full[100:400, 100:400].std() < 2
