"""measurements.csv: sizes and diameters of masks against hand-computed and brute-force values."""

import itertools
import json
import math
import os
import shutil

import nibabel
import numpy as np
import pytest
from conftest import command, contents, rows
from PIL import Image
from small_runs import called
from test_predict_batches import class_run, photo, volume_run

import predict
import train
from imaging import measurements, nifti
from prediction.images import ImagePredictor
from prediction.outputs import Batch, MeasurementTable

pytestmark = pytest.mark.numeric


def measured(mask, **details) -> dict:
    """Measure a mask drawn as a text of # and ., or an array."""
    if isinstance(mask, str):
        lines = [[letter == "#" for letter in line] for line in mask.split()]
        mask = np.array(lines)
    grey = details.pop("grey", np.zeros(mask.shape, np.uint8))
    return measurements.measure_image(mask, details.pop("probability", None), grey, **details)


def brute_diameter(mask, axes) -> float:
    """The greatest distance between any two corners of pixels; axes: step of each index."""
    corners = set()
    for pixel in np.argwhere(mask):
        for offset in itertools.product((0, 1), repeat=mask.ndim):
            corners.add(tuple(pixel + offset))
    points = np.array([*corners]) @ np.transpose(axes)
    longest = 0
    for point in points:
        longest = max(longest, math.sqrt(((points - point) ** 2).sum(1).max()))
    return longest


# --- images ---------------------------------------------------------------------------------------

SHAPES = {  # mask -> area, components, box, squared diameter in px, and with pixels of 0.5 x 2 mm
    "a pixel": ("... .#. ...", 1, 1, (1, 1, 1, 1), 1 + 1, 0.25 + 4),
    "all": ("#", 1, 1, (0, 0, 0, 0), 1 + 1, 0.25 + 4),
    "a row": ("..... #####", 5, 1, (0, 1, 4, 1), 25 + 1, 6.25 + 4),
    "a column": (".# .# .#", 3, 1, (1, 0, 1, 2), 1 + 9, 0.25 + 36),
    "a rectangle": ("..... .#### .#### .####", 12, 1, (1, 1, 4, 3), 16 + 9, 4 + 36),
    "an L": ("...... #..... #..... #..... ####..", 7, 1, (0, 1, 3, 4), 16 + 16, 4 + 64),
    "a diagonal": ("#... .#.. ..#. ...#", 4, 1, (0, 0, 3, 3), 16 + 16, 4 + 64),
    "two": ("##..# .....", 3, 2, (0, 0, 4, 0), 4 + 1, 1 + 4),
    "a ring": ("### #.# ###", 8, 1, (0, 0, 2, 2), 9 + 9, 2.25 + 36),
}


@pytest.mark.parametrize("name", SHAPES)
def test_small_masks_have_the_values_of_paper_and_pencil(name):
    text, area, count, box, squared_px, squared_mm = SHAPES[name]
    row = measured(text, pixel_size=(0.5, 2.0))
    assert (row["area_px"], row["area_mm2"], row["components"]) == (area, area * 1.0, count)
    assert (row["x0"], row["y0"], row["x1"], row["y1"]) == box
    assert row["max_diameter_px"] == pytest.approx(math.sqrt(squared_px), rel=1e-5)
    assert row["max_diameter_mm"] == pytest.approx(math.sqrt(squared_mm), rel=1e-5)
    assert row["share_of_image"] == pytest.approx(area / len(text.replace(" ", "")), rel=1e-5)
    assert (row["pixel_width_mm"], row["pixel_height_mm"]) == (0.5, 2.0)


def test_without_a_pixel_size_nothing_is_in_mm():
    row = measured("##. ...")
    assert {name for name, value in row.items() if value is None} == {
        "area_mm2", "max_diameter_mm", "mean_probability", "pixel_width_mm", "pixel_height_mm",
    }  # fmt: skip


def test_an_empty_mask_has_an_area_of_0_and_no_place():
    row = measured("... ...", pixel_size=(1.0, 1.0))
    filled = {name: value for name, value in row.items() if value is not None}
    assert tuple(row) == measurements.IMAGE_COLUMNS
    assert filled == {
        "area_px": 0, "area_mm2": 0, "share_of_image": 0, "components": 0,
        "pixel_width_mm": 1, "pixel_height_mm": 1,
    }  # fmt: skip


def test_an_ellipse_has_its_long_axis_as_diameter():
    y, x = np.indices((400, 500)) - np.array([[[200]], [[250]]])
    angle = math.radians(30)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    row = measured((along / 160) ** 2 + (across / 60) ** 2 <= 1, pixel_size=(0.1, 0.1))
    assert row["area_mm2"] == pytest.approx(math.pi * 16 * 6, rel=5e-3)
    assert 32.0 <= row["max_diameter_mm"] <= 32.0 + 0.15


def test_means_are_those_of_the_pixels_inside():
    grey = np.array([[10, 20, 99], [99, 45, 99]], np.uint8)
    probability = np.array([[0.5, 0.75, 0.1], [0.2, 1.0, 0.3]], np.float32)
    row = measured("##. .#.", grey=grey, probability=probability)
    assert (row["mean_grey"], row["mean_probability"]) == (25, 0.75)


@pytest.mark.parametrize("sides", [(9, 11), (1, 13), (12, 1), (5, 6, 7), (1, 5, 5), (4, 1, 1)])
def test_the_diameter_is_that_of_all_pairs_of_corners(sides):
    rng = np.random.default_rng(sum(sides))
    axes = rng.normal(size=(len(sides), len(sides)))  # sheared
    for share in (0.02, 0.1, 0.3, 0.6, 1):
        for _ in range(5):
            mask = rng.random(sides) < share
            if not mask.any():
                continue
            hull = measurements.convex_hull(mask)
            ours = measurements.largest_distance(hull @ axes.T)
            assert ours == pytest.approx(brute_diameter(mask, axes), rel=1e-12)


def test_distances_in_blocks_are_those_of_all_points():
    points = np.random.default_rng(0).random((700, 3))
    points[3] -= 50
    points[690] += 50
    expected = np.linalg.norm(points[690] - points[3])
    assert measurements.largest_distance(points) == pytest.approx(expected, rel=1e-12)


# --- volumes --------------------------------------------------------------------------------------

TURN = math.radians(25)
ROTATION = np.array(
    [[math.cos(TURN), -math.sin(TURN), 0], [math.sin(TURN), math.cos(TURN), 0], [0, 0, 1]]
)
AXES = {  # the upper left part of affines of voxels of 0.8 x 0.9 x 5 mm
    "RAS": np.diag([0.8, 0.9, 5]),
    "LPS": np.diag([-0.8, -0.9, 5]),
    "permuted": np.array([[0, 0, -5], [0.8, 0, 0], [0, 0.9, 0]]),
    "rotated": ROTATION @ np.diag([-0.8, 0.9, 5]),
}


def affine_of(axes) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = (-40, 20, 7)
    return affine


def write_volume(path, voxels, axes):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine_of(axes)), path)


@pytest.mark.parametrize("name", AXES)
def test_volumes_are_measured_on_the_voxels_of_their_file(name, tmp_path):
    stored = np.zeros((12, 10, 8), bool)
    stored[2:4, 1:4, 3:7] = True  # 2 x 3 x 4 voxels
    stored[4, 4, 7] = True  # touches a corner
    stored[9:11, 9, 0] = True  # a second piece
    voxels = np.full(stored.shape, -1000, np.int16)
    voxels[stored] = 40
    voxels[2, 1, 3] = 67
    write_volume(tmp_path / "ct.nii.gz", voxels, AXES[name])

    image, grid = nifti.read_volume(tmp_path / "ct.nii.gz")
    mask = np.ascontiguousarray(grid.to_ras(stored))
    probability = np.where(mask, np.float32(0.75), np.float32(0))
    row = measurements.measure_volume(mask, probability, image[0], grid)
    assert tuple(row) == measurements.VOLUME_COLUMNS
    assert [row[column] for column in ("x0", "y0", "z0", "x1", "y1", "z1")] == [2, 1, 0, 10, 9, 7]
    assert (row["volume_voxels"], row["components"]) == (27, 2)
    assert row["volume_ml"] == pytest.approx(27 * 0.8 * 0.9 * 5 / 1000, rel=1e-5)
    assert row["share_of_volume"] == pytest.approx(27 / 960, rel=1e-5)
    diameter = math.sqrt((3 * 0.8) ** 2 + (4 * 0.9) ** 2 + (5 * 5) ** 2)
    assert row["max_diameter_mm"] == pytest.approx(diameter, rel=1e-5)
    assert (row["mean_intensity"], row["mean_probability"]) == (41, 0.75)


def test_a_sheared_grid_has_the_volume_of_its_cells(tmp_path):
    axes = np.array([[1, 0, 0], [0, 1, 1.5], [0, 0, 3]])  # a tilted gantry
    stored = np.random.default_rng(0).random((5, 6, 4)) < 0.9
    write_volume(tmp_path / "ct.nii.gz", stored.astype(np.int16), axes)
    image, grid = nifti.read_volume(tmp_path / "ct.nii.gz")
    row = measurements.measure_volume(grid.to_ras(stored), None, image[0], grid)
    assert row["components"] == 1
    assert row["volume_ml"] == pytest.approx(stored.sum() * 3 / 1000, rel=1e-5)
    assert row["max_diameter_mm"] == pytest.approx(brute_diameter(stored, axes), rel=1e-5)
    assert row["mean_probability"] is None


def test_an_empty_volume_has_0_ml(tmp_path):
    write_volume(tmp_path / "ct.nii.gz", np.zeros((3, 4, 5), np.int16), AXES["LPS"])
    image, grid = nifti.read_volume(tmp_path / "ct.nii.gz")
    row = measurements.measure_volume(image[0] > 0, image[0], image[0], grid)
    filled = {name: value for name, value in row.items() if value is not None}
    assert filled == {
        "volume_voxels": 0, "volume_ml": 0, "share_of_volume": 0, "components": 0
    }  # fmt: skip


# --- predictions of images ------------------------------------------------------------------------

NAMES = ("background", "one", "two")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return class_run(tmp_path_factory.mktemp("images") / "run", NAMES)


@pytest.fixture
def photos(tmp_path):
    for k, name in enumerate(("a.png", "b.jpg", "g/a.png", "g/h/c.bmp")):
        photo(tmp_path / "photos" / name, seed=k)
    return tmp_path / "photos"


def check_image_row(row, mask, grey, size=None):
    """Compare a row with a mask that a file holds, without our own functions."""
    y, x = np.nonzero(mask)
    assert int(row["area_px"]) == len(x)
    if not len(x):
        assert row["components"] == "0" and row["x0"] == row["max_diameter_px"] == ""
        return
    box = [int(row[column]) for column in ("x0", "y0", "x1", "y1")]
    assert box == [x.min(), y.min(), x.max(), y.max()]
    assert float(row["mean_grey"]) == pytest.approx(grey[mask].mean(), rel=1e-5)
    assert float(row["share_of_image"]) == pytest.approx(mask.mean(), rel=1e-5)
    if size:
        assert float(row["area_mm2"]) == pytest.approx(len(x) * size[0] * size[1], rel=1e-5)


def test_a_row_for_each_image_and_class(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--weights", run, photos, "--out", out, "--pixel-size", 0.1, 0.25]
    called(monkeypatch, capsys, *given)
    table = rows(out / "measurements.csv")
    cases = [("a", "a.png"), ("b", "b.jpg"), ("g/a", "g/a.png"), ("g/h/c", "g/h/c.bmp")]
    expected = [(name, label) for name, _ in cases for label in ("one", "two")]
    assert [(row["name"], row["class"]) for row in table] == expected
    assert {row["mask"] for row in table} == {"prediction"}
    assert any(int(row["area_px"]) for row in table)
    files = dict(cases)
    for row in table:
        indices = np.asarray(Image.open(out / f"{row['name']}.png"))
        grey = np.asarray(Image.open(photos / files[row["name"]]).convert("L"))
        check_image_row(row, indices == NAMES.index(row["class"]), grey, (0.1, 0.25))


def test_binary_masks_have_the_mean_probability(tmp_path, monkeypatch, capsys):
    weights = class_run(tmp_path / "run", ("polyp",))
    photo(tmp_path / "in/a.png")
    given = ["--weights", weights, tmp_path / "in", "--probabilities", "--threshold", 0.4]
    called(monkeypatch, capsys, *given, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out/measurements.csv")
    mask = np.asarray(Image.open(tmp_path / "out/a.png")) > 0
    probability = np.asarray(Image.open(tmp_path / "out/a_probability.png")) / 65535
    assert mask.any() and row["class"] == "polyp" and row["area_mm2"] == ""
    assert float(row["mean_probability"]) == pytest.approx(probability[mask].mean(), abs=1e-5)
    check_image_row(row, mask, np.asarray(Image.open(tmp_path / "in/a.png").convert("L")))


def test_the_dpi_of_a_file_is_no_pixel_size(run, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "in/a.png")
    Image.open(tmp_path / "in/a.png").save(tmp_path / "in/a.png", dpi=(254, 254))
    called(monkeypatch, capsys, "--weights", run, tmp_path / "in", "--out", tmp_path / "out")
    for row in rows(tmp_path / "out/measurements.csv"):
        assert row["area_mm2"] == row["max_diameter_mm"] == row["pixel_width_mm"] == ""


def test_a_pixel_size_is_for_images(tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run")
    write_volume(tmp_path / "ct.nii.gz", np.zeros((20, 14, 12), np.int16), AXES["LPS"])
    given = ["--weights", weights, tmp_path / "ct.nii.gz", "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, "--pixel-size", 1, 1, status=2)
    assert "--pixel-size: is for images; this model takes volumes" in error


# --- a call that is continued ---------------------------------------------------------------------


def count_predictions(monkeypatch) -> list[str]:
    """From here on the names of images that are predicted are put in the list."""
    names = []
    measure = ImagePredictor.predict

    def record(self, name):
        names.append(name)
        return measure(self, name)

    monkeypatch.setattr(ImagePredictor, "predict", record)
    return names


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_rows_of_skipped_images_stay(stop_after, run, photos, tmp_path, monkeypatch, capsys):
    given = ["--weights", run, photos, "--out"]
    called(monkeypatch, capsys, *given, tmp_path / "expected")
    names = count_predictions(monkeypatch)

    add = MeasurementTable.add
    monkeypatch.setattr(Batch, "SAVE_EVERY", -1)

    def stop(self, name, case_rows):
        if len(names) > stop_after:
            raise KeyboardInterrupt
        add(self, name, case_rows)

    with monkeypatch.context() as patch:
        patch.setattr(MeasurementTable, "add", stop)
        command(monkeypatch, capsys, predict, *given, tmp_path / "out", "--device", "cpu")
    assert len(rows(tmp_path / "out/measurements.csv")) == 2 * stop_after
    del names[:]
    said, _ = called(monkeypatch, capsys, *given, tmp_path / "out", "--skip-existing")
    assert names == ["a", "b", "g/a", "g/h/c"][stop_after:]
    assert f"{stop_after} of 4 images are predicted already" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_masks_of_an_older_version_are_measured(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--weights", run, photos, "--out", out]
    called(monkeypatch, capsys, *given)
    expected = contents(out)
    (out / "measurements.csv").unlink()
    called(monkeypatch, capsys, *given, "--skip-existing")
    assert contents(out) == expected
    called(monkeypatch, capsys, *given, "--skip-existing")  # nothing is left to do
    assert contents(out) == expected


def test_names_of_files_may_be_odd(run, tmp_path, monkeypatch, capsys):
    names = ['a,b "c"\n.png', "ä.png", os.fsdecode(b"\xff.png")]  # the last one is Latin-1
    for k, name in enumerate(names):
        photo(tmp_path / "in/x.png", seed=k)
        os.replace(tmp_path / "in/x.png", tmp_path / "in" / name)
    given = ["--weights", run, tmp_path / "in", "--out", tmp_path / "out"]
    called(monkeypatch, capsys, *given)
    written = {row["name"] for row in rows(tmp_path / "out/measurements.csv")}
    assert written == {'a,b "c"\n', "ä", "\\udcff"}
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")
    assert "3 of 3 images are predicted already" in said


def test_another_pixel_size_measures_again(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--weights", run, photos, "--out", out]
    called(monkeypatch, capsys, *given)
    without = contents(out)
    sized = [*given, "--skip-existing", "--pixel-size", 0.5, 1]
    called(monkeypatch, capsys, *sized)
    names = count_predictions(monkeypatch)
    for row in rows(out / "measurements.csv"):
        assert float(row["area_mm2"]) == int(row["area_px"]) / 2
    said, _ = called(monkeypatch, capsys, *sized)
    assert "4 of 4 images are predicted already" in said and not names
    called(monkeypatch, capsys, *given, "--skip-existing")
    assert contents(out) == without


def test_rows_of_other_images_in_the_folder_stay(run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--weights", run, "--out", out, "--skip-existing"]
    called(monkeypatch, capsys, *given, photos / "g")
    first = rows(out / "measurements.csv")
    called(monkeypatch, capsys, *given, photos / "b.jpg")
    table = rows(out / "measurements.csv")
    assert table[: len(first)] == first
    assert [row["name"] for row in table] == ["a", "a", "h/c", "h/c", "b", "b"]


FOREIGN = {
    "other columns": ("name,class\n", "has other columns than this call writes"),
    "a short row": ("{header}\na,one\n", "has other columns than this call writes"),
    "cut quotes": ('{header}\n"a,one\n', "is damaged"),
    "no text": ("\xff\xfe\n", "measurements.csv: is not"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_table_is_refused(kind, run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--weights", run, photos, "--out", out]
    called(monkeypatch, capsys, *given)
    header = (out / "measurements.csv").read_text().splitlines()[0]
    text, message = FOREIGN[kind]
    (out / "measurements.csv").write_bytes(text.format(header=header).encode("latin-1"))
    before = contents(out)
    _, error = called(monkeypatch, capsys, *given, "--skip-existing", status=2)
    assert message in error and "measurements.csv" in error
    assert contents(out) == before


def test_an_existing_table_is_not_overwritten(run, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/measurements.csv").write_text("mine")
    given = ["--weights", run, photos, "--out", tmp_path / "out"]
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "measurements.csv exists already and is not overwritten" in error
    assert [*contents(tmp_path / "out")] == ["measurements.csv"]


# --- predictions of volumes -----------------------------------------------------------------------


def check_volume_row(row, mask, voxels, axes):
    """Compare a row with a mask (as stored) that a file holds, without our own functions."""
    assert int(row["volume_voxels"]) == mask.sum()
    volume = mask.sum() * abs(np.linalg.det(axes)) / 1000
    assert float(row["volume_ml"]) == pytest.approx(volume, rel=1e-5)
    if not mask.any():
        assert row["components"] == "0" and row["mean_intensity"] == ""
        return
    places = np.argwhere(mask)
    box = [int(row[f"{axis}{end}"]) for end in "01" for axis in "xyz"]
    assert box == [*places.min(0), *places.max(0)]
    assert float(row["mean_intensity"]) == pytest.approx(voxels[mask].mean(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("name", ["LPS", "permuted"])
def test_predicted_volumes_are_measured(name, overlapping, tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run", names=NAMES, overlapping=overlapping)
    voxels = np.random.default_rng(0).integers(-1000, 300, (20, 14, 12)).astype(np.int16)
    write_volume(tmp_path / "in/ct.nii.gz", voxels, AXES[name])
    given = ["--weights", weights, tmp_path / "in", "--out", tmp_path / "out"]
    called(monkeypatch, capsys, *given)
    table = rows(tmp_path / "out/measurements.csv")
    assert [(row["name"], row["class"]) for row in table] == [("ct", "one"), ("ct", "two")]
    assert any(int(row["volume_voxels"]) for row in table)
    for k, row in enumerate(table):
        ending = f"_{row['class']}" if overlapping else ""
        labels = nibabel.load(tmp_path / f"out/ct{ending}.nii.gz").get_fdata()
        check_volume_row(row, labels == (1 if overlapping else k + 1), voxels, AXES[name])

    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")
    assert "1 of 1 volumes are predicted already" in said
    before = contents(tmp_path / "out")
    (tmp_path / "out/measurements.csv").unlink()
    called(monkeypatch, capsys, *given, "--skip-existing")
    assert contents(tmp_path / "out") == before


# --- tests ----------------------------------------------------------------------------------------


def evaluated(monkeypatch, capsys, *arguments):
    code, out, err = command(
        monkeypatch, capsys, train, "--eval", *arguments,
        "--device", "cpu", "--workers", 0, "--overlays", 0,
    )  # fmt: skip
    assert code == 0, out + err


@pytest.fixture
def maps(tmp_path):
    """A test set of class maps with two images; class two is only in the second."""
    root = tmp_path / "maps"
    for k in range(2):
        photo(root / f"test/images/{k}.png", seed=k)
        mask = np.zeros((40, 50), np.uint8)
        mask[5:9, 10:20] = 1
        mask[30, 3 : 3 + 4 * k] = 2
        mask[0, 0] = 255
        (root / "test/masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"test/masks/{k}.png")
    (root / "classes.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return root


def test_a_test_measures_predictions_and_ground_truth(run, maps, tmp_path, monkeypatch, capsys):
    out = tmp_path / "e"
    common = ["--weights", run, "--test", maps, "--cache", tmp_path / "c"]
    evaluated(monkeypatch, capsys, *common, "--out", out, "--pixel-size", 0.5, 2)
    table = rows(out / "test/measurements.csv")
    kinds = ("prediction", "ground truth")
    expected = [*itertools.product("01", ("one", "two"), kinds)]
    assert [(row["name"], row["class"], row["mask"]) for row in table] == expected
    assert {(row["test"], row["dataset"]) for row in table} == {("maps", "maps")}

    called(monkeypatch, capsys, "--weights", run, maps, "--out", tmp_path / "masks")
    for row in table:
        folder = maps / "test/masks" if row["mask"] == "ground truth" else tmp_path / "masks"
        indices = np.asarray(Image.open(folder / f"{row['name']}.png"))
        grey = np.asarray(Image.open(maps / f"test/images/{row['name']}.png").convert("L"))
        check_image_row(row, indices == NAMES.index(row["class"]), grey, (0.5, 2))
        is_predicted = row["mask"] == "prediction" and row["area_px"] != "0"
        assert bool(row["mean_probability"]) == is_predicted
    assert float(table[1]["max_diameter_mm"]) == pytest.approx(math.hypot(5, 8), rel=1e-5)

    evaluated(monkeypatch, capsys, *common, "--out", tmp_path / "n", "--score-size", "network")
    assert not (tmp_path / "n/test/measurements.csv").exists()


def test_a_test_of_volumes_is_measured_as_stored(tmp_path, monkeypatch, capsys):
    weights = volume_run(tmp_path / "run", names=NAMES)
    root = tmp_path / "set"
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 300, (20, 14, 12)).astype(np.int16)
    labels = rng.integers(0, 3, (20, 14, 12)).astype(np.uint8)
    labels[0] = 255
    for split in ("Tr", "Ts"):
        write_volume(root / f"images{split}/a_0000.nii.gz", voxels, AXES["permuted"])
        write_volume(root / f"labels{split}/a.nii.gz", labels, AXES["permuted"])
    names = {name: k for k, name in enumerate(NAMES)}
    content = {"labels": names, "channel_names": {"0": "CT"}}
    (root / "dataset.json").write_text(json.dumps(content))

    out = tmp_path / "e"
    common = ["--weights", weights, "--test", root, "--cache", tmp_path / "c", "--out", out]
    evaluated(monkeypatch, capsys, *common)
    table = rows(out / "test/measurements.csv")
    assert [row["mask"] for row in table] == ["prediction", "ground truth"] * 2
    called(monkeypatch, capsys, "--weights", weights, root, "--out", tmp_path / "masks")
    (file,) = (tmp_path / "masks").rglob("*.nii.gz")
    predicted = np.asarray(nibabel.load(file).dataobj)
    for row in table:
        source = labels if row["mask"] == "ground truth" else predicted
        mask = source == NAMES.index(row["class"])
        check_volume_row(row, mask, voxels, AXES["permuted"])
    shutil.rmtree(tmp_path / "c")


def test_spacing_csv_has_the_size_of_pixels(run, photos, tmp_path, monkeypatch, capsys):
    """Next to the images or next to their folder; --pixel-size comes first."""
    (photos / "spacing.csv").write_text("image,x_mm,y_mm\na.png,0.1,0.25\n")
    out = tmp_path / "out"
    given = ["--weights", run, photos, "--out", out]
    called(monkeypatch, capsys, *given)
    sizes = {row["name"]: row["pixel_width_mm"] for row in rows(out / "measurements.csv")}
    assert sizes == {"a": "0.1", "b": "", "g/a": "0.1", "g/h/c": ""}
    for row in rows(out / "measurements.csv"):
        if row["name"] == "a":
            assert float(row["area_mm2"]) == pytest.approx(int(row["area_px"]) * 0.025)
    said, _ = called(monkeypatch, capsys, *given, "--skip-existing")
    assert "4 of 4 images are predicted already" in said

    called(monkeypatch, capsys, *given[:-1], tmp_path / "other", "--pixel-size", 2, 2)
    assert {row["pixel_width_mm"] for row in rows(tmp_path / "other/measurements.csv")} == {"2.0"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("name,x\na.png,1\n", "line 2: expected the columns"),
        ("image,x_mm,y_mm\na.png,0,1\n", "line 2: 0 x 1 mm is no size"),
        ('image,x_mm,y_mm\n"a.png,1,1\n', "is not valid CSV (unexpected end of data)"),
        ("image,x_mm,y_mm\n" + "a" * 140_000 + ",1,1\n", "is not valid CSV (field larger"),
    ],
)
def test_a_damaged_spacing_csv_is_refused(text, words, run, photos, tmp_path, monkeypatch, capsys):
    (photos / "spacing.csv").write_text(text)
    given = ["--weights", run, photos, "--out", tmp_path / "out"]
    measurements.read_spacings.cache_clear()
    _, error = called(monkeypatch, capsys, *given, status=2)
    assert "spacing.csv" in error and words in error
