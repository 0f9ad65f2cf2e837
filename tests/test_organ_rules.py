"""Rules for organs, on hand-made volumes, against the official formulas, and in the program."""

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, write_run
from scipy import ndimage

import predict
import swin_unetr3d
import universal
from imaging.organ_rules import organ_rules

pytestmark = pytest.mark.numeric

SHAPE = 40, 36, 30
SINGLE = "spleen", "Right_Kidney", "stomach", "pancreas", "celiac trunk", "prostate", "colon"
FREE = "hepatic vessel", "pancreas tumor", "lung tumor", "colon tumor", "kidney cyst", "bone"


def blocks(*boxes, shape=SHAPE):
    """Bool (X,Y,Z) with boxes of (x, y, z, side) or of slices."""
    mask = np.zeros(shape, bool)
    for box in boxes:
        if isinstance(box[0], int):
            box = tuple(slice(at, at + box[3]) for at in box[:3])
        mask[box] = True
    return mask


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_an_organ_is_its_largest_piece(name):
    small, large = (1, 1, 1, 3), (10, 10, 10, 5)
    touching = 15, 15, 15, 1  # by a corner: 26 neighbours
    given = {name: blocks(small, large, touching)}
    (found,) = organ_rules(given).values()
    assert found.dtype == bool and np.array_equal(found, blocks(large, touching))


@pytest.mark.parametrize("name", FREE)
def test_what_may_be_in_pieces_stays(name):
    given = {name: blocks((1, 1, 1, 3), (10, 10, 10, 5)), "liver": blocks((30, 30, 20, 4))}
    assert np.array_equal(organ_rules(given)[name], given[name])


def test_names_stay_in_their_order_and_arrays_as_they_are():
    rng = np.random.default_rng(0)
    names = [*universal.ORGANS[:0:-1], "Bone_2"]
    given = {name: rng.random(SHAPE) < 0.05 for name in names}
    before = {name: mask.copy() for name, mask in given.items()}
    found = organ_rules(given)
    assert list(found) == names
    for name in names:
        assert np.array_equal(given[name], before[name])
        assert (
            found[name].dtype == bool and not (found[name] & ~given[name]).any() or "lung" in name
        )


def test_every_organ_of_the_study_has_its_rule():
    """By the numbers in `organ_post_process`, from 1: in one piece, or unchanged."""
    single = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 18, 19, 20, 21, 22, 23, 24, 25}
    two = blocks((1, 1, 1, 3), (10, 10, 10, 5))
    for number, name in enumerate(universal.ORGANS[1:], 1):
        alone = organ_rules({name: two})[name]
        is_single = number in single or number in (16, 17)  # a lung without the other one
        assert np.array_equal(alone, blocks((10, 10, 10, 5)) if is_single else two), name


def test_veins_end_where_the_pancreas_does():
    veins = blocks(np.s_[5:8, 5:8, 2:25])
    pancreas = blocks((20, 20, 10, 6), (30, 30, 4, 2))  # of the smaller piece nothing counts
    found = organ_rules({"portal vein and splenic vein": veins, "pancreas": pancreas})
    assert np.array_equal(found["portal vein and splenic vein"], blocks(np.s_[5:8, 5:8, 10:25]))
    for without in {}, {"pancreas": blocks()}:
        found = organ_rules({"portal vein and splenic vein": veins} | without)
        assert np.array_equal(found["portal vein and splenic vein"], veins)


@pytest.mark.parametrize("turned", [False, True])
def test_the_left_lung_lies_left(turned):
    """x grows to the patient's right: the left lung has the small x, whatever was found there."""
    low, high = blocks((4, 10, 5, 9)), blocks((25, 10, 5, 8))
    mixed = blocks((25, 10, 5, 4))  # of the right lung's block called left
    given = {"right lung": high & ~mixed | blocks((18, 2, 2, 2)), "left lung": low | mixed}
    if turned:
        given = dict(zip(given, reversed(given.values()), strict=True))
    found = organ_rules(given)
    assert np.array_equal(found["left lung"], low)
    assert np.array_equal(found["right lung"], high)


def test_lungs_that_touch_keep_what_they_are():
    right, left = blocks(np.s_[20:30, 5:20, 5:20]), blocks(np.s_[8:20, 5:20, 5:20])
    speck = blocks((35, 30, 25, 2))
    found = organ_rules({"right lung": right | blocks((1, 1, 1, 1)), "left lung": left | speck})
    assert np.array_equal(found["right lung"], right)
    assert np.array_equal(found["left lung"], left | speck)  # the second largest piece
    found = organ_rules({"right lung": right, "left lung": left})
    assert np.array_equal(found["right lung"], right) and np.array_equal(found["left lung"], left)


@pytest.mark.parametrize("side", [5, 6])
def test_what_is_much_smaller_is_no_lung_by_its_place(side):
    """8 x 8 x 8 voxels are 2.4 times 6 x 6 x 6 and 4.1 times 5 x 5 x 5: names hold there alone."""
    large, small = blocks((4, 10, 5, 8)), blocks((25, 10, 5, side))
    found = organ_rules({"right lung": large, "left lung": small})
    large_is = "left lung" if side == 6 else "right lung"
    assert np.array_equal(found[large_is], large)
    assert np.array_equal(found[{"left lung", "right lung"}.difference([large_is]).pop()], small)


def test_one_lung_is_not_lost():
    right = blocks(np.s_[20:30, 5:20, 5:20])
    found = organ_rules({"right lung": right, "left lung": blocks()})
    assert np.array_equal(found["right lung"], right) and not found["left lung"].any()
    found = organ_rules({"right lung": blocks(), "left lung": blocks()})
    assert not found["right lung"].any() and not found["left lung"].any()


def test_tumors_lie_in_their_organ():
    """The liver is a block, grown by two voxels, and with it a slit of four."""
    liver = blocks(np.s_[10:24, 10:24, 8:22])
    liver[15:19, 15:19, 8:22] = False
    tumor = blocks(np.s_[0:40, 16:18, 12:14])
    found = organ_rules({"liver": liver | blocks((35, 30, 25, 3)), "liver tumor": tumor})
    assert np.array_equal(found["liver tumor"], blocks(np.s_[8:26, 16:18, 12:14]))
    assert not organ_rules({"liver": blocks(), "liver tumor": tumor})["liver tumor"].any()
    assert np.array_equal(organ_rules({"liver tumor": tumor})["liver tumor"], tumor)


def test_tumors_of_either_kidney():
    right, left = blocks((28, 10, 10, 7)), blocks((5, 10, 10, 6))
    given = {"right kidney": right, "left kidney": left | blocks((16, 25, 20, 2))}
    given |= {"kidney tumor": blocks((29, 11, 11, 2), (6, 11, 11, 2), (16, 25, 20, 2))}
    found = organ_rules(given)["kidney tumor"]
    assert np.array_equal(found, blocks((29, 11, 11, 2), (6, 11, 11, 2)))
    del given["left kidney"]  # its tumor is not to be judged by the other one
    assert np.array_equal(organ_rules(given)["kidney tumor"], given["kidney tumor"])


def test_millimetres_count():
    """3 mm are four voxels of 0.75 mm, one of 3 mm, none of 7 mm."""
    liver = blocks(np.s_[16:24, 14:22, 12:18])
    everywhere = np.ones(SHAPE, bool)
    found = organ_rules({"liver": liver, "liver tumor": everywhere}, (0.75, 3.0, 7.0))
    assert np.array_equal(found["liver tumor"], blocks(np.s_[12:28, 13:23, 12:18]))


def test_at_the_border_of_the_volume():
    """A thin slice of liver at the volume's end, which the official closing empties."""
    liver = blocks(np.s_[30:40, 10:30, 0:1])
    found = organ_rules({"liver": liver, "liver tumor": np.ones(SHAPE, bool)})
    assert np.array_equal(found["liver tumor"], blocks(np.s_[28:40, 8:32, 0:3]))


# --- against the official formulas ---------------------------------------------------------------


def official(given):
    """Liu's rules, voxel for voxel over the whole volume, by numbers in the middle of one."""
    found, around = {}, np.ones((3, 3, 3))

    def largest(mask, k):
        parts, n = ndimage.label(mask, around)
        sizes = [(parts == i).sum() for i in range(1, n + 1)]
        kept = sorted(range(1, n + 1), key=lambda i: -sizes[i - 1])[:k]
        return np.isin(parts, kept)

    for name, mask in given.items():
        found[name] = mask
        if name in ("liver", "pancreas", "aorta", "right kidney", "left kidney"):
            found[name] = largest(mask, 1)
    lowest = np.nonzero(found["pancreas"])[2].min()
    found["portal vein and splenic vein"] = given["portal vein and splenic vein"].copy()
    found["portal vein and splenic vein"][:, :, :lowest] = False
    both = largest(given["right lung"] | given["left lung"], 2)
    parts, n = ndimage.label(both, around)
    assert n == 2
    first, second = (np.nonzero(parts == k)[0].mean() for k in (1, 2))
    left = 1 if first < second else 2
    found["left lung"], found["right lung"] = parts == left, parts == 3 - left
    box = np.ones((5, 5, 5))
    for tumor, whole in (
        ("liver tumor", largest(given["liver"], 1)),
        ("kidney tumor", largest(given["right kidney"] | given["left kidney"], 2)),
    ):
        whole = ndimage.binary_dilation(ndimage.binary_closing(whole, box), box)
        found[tumor] = given[tumor] & whole
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_volumes_follow_the_official_formulas(seed):
    rng = np.random.default_rng(seed)
    names = (
        "liver", "liver tumor", "right kidney", "left kidney", "kidney tumor", "pancreas", "aorta",
        "portal vein and splenic vein", "hepatic vessel", "right lung", "left lung",
    )  # fmt: skip
    given = {}
    for name in names:  # clouds of some pieces, away from the border, which is treated better here
        cloud = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.6)
        given[name] = cloud > np.quantile(cloud, 0.9)
        for axis in range(3):
            given[name] &= np.abs(np.indices(SHAPE)[axis] - SHAPE[axis] // 2) < SHAPE[axis] // 2 - 5
    for name, at in ("right lung", 27), ("left lung", 6):  # of like size, and in pieces
        given[name] |= blocks((at, 12, 8, 7))
        given[name][14:24] = False
    found, expected = organ_rules(given), official(given)
    for name in names:
        assert np.array_equal(found[name], expected[name]), name
    changed = [name for name in names if not np.array_equal(found[name], given[name])]
    assert len(changed) >= 9  # it is not idle


# --- the program ---------------------------------------------------------------------------------


CLASSES = "background", "spleen", "liver", "portal vein and splenic vein", "liver tumor"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a Universal Model that knows nothing, and a volume."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = universal.UniversalConfig(
        12, num_classes=4, classes=CLASSES, codes="random", image_size=(64, 32, 32)
    )
    model = universal.UniversalSwinUNETR(config)
    with torch.no_grad():  # about half of the voxels are of a class, in pieces
        for _, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_run(folder / "run", type(model), model.state_dict(), config, model="universal")
    x = np.random.default_rng(0).normal(0, 200, (60, 30, 15)).astype(np.int16)
    volume = nibabel.Nifti1Image(x, np.diag([1.5, 1.5, 3, 1]))
    volume = volume.as_reoriented(nibabel.orientations.axcodes2ornt("IPL"))
    nibabel.save(volume, folder / "ct.nii.gz")
    return folder


def predicted(run, out, monkeypatch, capsys, *more):
    """{class: bool (X,Y,Z) in RAS} of the files in `out`, and what was printed."""
    arguments = run / "ct.nii.gz", "--weights", run / "run", "--out", out, "--device", "cpu", *more
    code, said, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    found = {}
    for path in out.glob("ct_*.nii.gz"):
        found[path.name[3:-7].replace("_", " ")] = (
            nibabel.as_closest_canonical(nibabel.load(path)).get_fdata() == 1
        )
    return found, said


def probability(out):
    """Load the highest probability of each voxel that predict.py wrote, (X,Y,Z) in RAS."""
    image = nibabel.load(out / "ct_probability.nii.gz")
    return nibabel.as_closest_canonical(image).get_fdata()


def test_rules_in_the_program(run, tmp_path, monkeypatch, capsys):
    plain, _ = predicted(run, tmp_path / "plain", monkeypatch, capsys)
    assert plain.keys() == {*CLASSES[1:]}
    found, said = predicted(run, tmp_path / "rules", monkeypatch, capsys, "--organ-rules")
    around = np.ones((3, 3, 3))
    for name in "spleen", "liver":
        parts, n = ndimage.label(plain[name], around)
        sizes = np.bincount(parts.ravel())[1:]
        assert n > 1 and np.array_equal(found[name], parts == 1 + sizes.argmax())
    veins = "portal vein and splenic vein"
    assert np.array_equal(found[veins], plain[veins])
    assert f"{veins} stays as it is without pancreas" in said
    whole, box = np.pad(found["liver"], 8), np.ones((5, 5, 3))  # beyond the border is nothing
    whole = ndimage.binary_dilation(ndimage.binary_closing(whole, box), box)[8:-8, 8:-8, 8:-8]
    assert np.array_equal(found["liver tumor"], plain["liver tumor"] & whole)
    assert 0 < found["liver tumor"].sum() < plain["liver tumor"].sum()


def test_some_classes_alone(run, tmp_path, monkeypatch, capsys):
    every, _ = predicted(run, tmp_path / "every", monkeypatch, capsys, "--probabilities")
    more = "--overlays", "--probabilities", "--classes", "liver_tumor", "Spleen"
    some, _ = predicted(run, tmp_path / "some", monkeypatch, capsys, *more)
    files = {path.name for path in (tmp_path / "some").iterdir()}
    assert files == {
        "ct_liver_tumor.nii.gz", "ct_spleen.nii.gz", "ct_probability.nii.gz", "ct_overlay.png",
        "legend.png", "measurements.csv",
    }  # fmt: skip
    # Fewer classes are products of other shapes, which may round otherwise: by 1e-5 of the logits'
    # scale at most, see test_universal.py, and a probability moves by a quarter of its logit.
    rounding = 1e-4
    probabilities = {}
    for name in "liver tumor", "spleen":
        out = tmp_path / name
        predicted(run, out, monkeypatch, capsys, "--probabilities", "--classes", name)
        probabilities[name] = probability(out)
        clear = np.abs(probabilities[name] - 0.5) > rounding  # of the threshold
        assert every[name].any() and clear.mean() > 0.99
        assert np.array_equal(some[name][clear], every[name][clear])
    assert not np.array_equal(some["liver tumor"], some["spleen"])
    two, all_four = probability(tmp_path / "some"), probability(tmp_path / "every")
    expected = np.maximum(*probabilities.values())
    np.testing.assert_allclose(two, expected, rtol=0, atol=rounding)
    assert (two <= all_four + rounding).all() and (two < all_four - 0.01).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "kidney"], "the model has no kidney, only spleen, liver"),
        (["--organ-rules", "--largest-component"], "remove --largest-component"),
    ],
)
def test_what_is_refused(run, tmp_path, arguments, message, monkeypatch, capsys):
    given = run / "ct.nii.gz", "--weights", run / "run", "--out", tmp_path / "out", *arguments
    code, _, error = command(monkeypatch, capsys, predict, *given)
    assert code == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, option, message",
    [
        ({}, "--organ-rules", "use --largest-component"),
        ({}, "--classes", "predicts all of its classes at once"),
        ({"overlapping": True}, "--organ-rules", "nothing names the model's classes"),
        (
            {"overlapping": True, "classes": ("background", "core", "whole", "rim")},
            "--organ-rules", "none for these classes (core, whole, rim)",
        ),
    ],
)  # fmt: skip
def test_models_that_rules_do_not_fit(run, tmp_path, more, option, message, monkeypatch, capsys):
    config = swin_unetr3d.Config(12, num_classes=3, **more)
    state = swin_unetr3d.SwinUNETR(config).state_dict()
    write_run(tmp_path / "run", swin_unetr3d.SwinUNETR, state, config)
    given = [run / "ct.nii.gz", "--weights", tmp_path / "run", "--out", tmp_path / "out", option]
    code, _, error = command(
        monkeypatch, capsys, predict, *given, *["liver"] * (option == "--classes")
    )
    assert code == 2 and error.count("\n") == 1 and message in error, error
