"""Class maps in the training loop: losses, augmentation, scores, pictures, what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same_scores, command, rows
from PIL import Image

import data
import losses
import metrics
import predict
import segformer
import train
from engine import evaluate
from imaging import augment, layouts
from recipes import class_maps

pytestmark = pytest.mark.numeric

NAMES = ("background", "disc", "box")


@pytest.fixture(scope="session")
def maps(tmp_path_factory):
    """Grey images with a bright disc (1) and a dark box (2), of some neither, some pixels 255."""
    root, rng = tmp_path_factory.mktemp("maps") / "maps", np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    for split, count in {"train": 24, "val": 6, "test": 8}.items():
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for k in range(count):
            image, mask = rng.normal(110, 10, (48, 64)), np.zeros((48, 64), np.uint8)
            if k % 4 != 3:
                cy, cx = rng.integers(12, 36), rng.integers(10, 24)
                mask[(y - cy) ** 2 + (x - cx) ** 2 < 64] = 1
            if k % 4 != 2:
                top, left = rng.integers(2, 30), rng.integers(36, 48)
                mask[top : top + 14, left : left + 12] = 2
            image += 90 * (mask == 1) - 80 * (mask == 2)
            mask[:2] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                root / split / "images" / f"{split}p{k // 2}_{k}.png"
            )
            Image.fromarray(mask).save(root / split / "masks" / f"{split}p{k // 2}_{k}.png")
    (root / "classes.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return root


@pytest.fixture
def options(maps, tmp_path):
    return train.Options(
        model="segformer", variant="mini", weights="none", data=[str(maps)], size=[64], epochs=8,
        batch_size=8, lr=2e-3, workers=0, overlays=2, out=str(tmp_path / "run"),
        cache=str(maps.parent / "cache"), group_regex=r"\w+p\d+",
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(maps, tmp_path_factory):
    """A run of twenty epochs: its options and summary."""
    folder = tmp_path_factory.mktemp("trained")
    options = train.Options(
        model="segformer", variant="mini", weights="none", data=[str(maps)], size=[64], epochs=20,
        batch_size=8, lr=2e-3, workers=0, overlays=2, out=str(folder / "run"),
        cache=str(maps.parent / "cache"), group_regex=r"\w+p\d+",
    )  # fmt: skip
    return options, train.run(options)


def test_it_learns_and_leaves_scores_and_pictures(trained):
    options, summary = trained
    out = train.Path(options.out)
    loss = [float(row["train_loss"]) for row in rows(out / "metrics.csv")]
    assert loss[-1] < 0.5 * loss[0]
    scores = summary["tests"]["maps"]
    assert scores["classes"].keys() == {"disc", "box"}
    assert scores["classes"]["disc"]["images"] >= 6 and scores["n"] == 4  # patients
    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == list(NAMES) and config["config"]["num_classes"] == 3
    sheet = Image.open(out / "test/overlays/sheet.png")
    one = Image.open(next((out / "test/overlays").glob("best1_*.png")))
    assert one.size == (64, 48) and sheet.height > 3 * 240
    again = train.Options(
        weights=options.out, eval=True, test=options.data, out=options.out + "-again",
        cache=options.cache, workers=0, overlays=0, group_regex=options.group_regex,
    )  # fmt: skip
    assert_same_scores(train.run(again)["tests"], summary["tests"])


def test_scores_are_those_of_the_masks(trained, maps):
    """Per class and image, without ignored pixels and the background; the pooled F1 with it."""
    options, summary = trained
    model = segformer.SegFormer.from_pretrained(options.out)
    table = {(r["name"], r["class"]): r for r in rows(f"{options.out}/test/per_image.csv")}
    dice, pooled = {1: [], 2: []}, np.zeros((3, 3))
    for path in sorted((maps / "test/images").iterdir()):
        image, truth = Image.open(path), np.asarray(Image.open(maps / "test/masks" / path.name))
        with torch.no_grad():
            logits = model(model.preprocess(image)[None])[0]
        found = model.postprocess(logits, truth.shape).argmax(0).numpy()
        valid = truth != 255
        for k in range(3):
            a, b = (found == k) & valid, (truth == k) & valid
            pooled[k] += 2 * (a & b).sum(), a.sum(), b.sum()
            if k and (a.any() or b.any()):
                score = 2 * (a & b).sum() / (a.sum() + b.sum())
                dice[k].append((path.name.split("_")[0], score))
                row = table[path.stem, NAMES[k]]
                assert float(row["dice"]) == pytest.approx(score)
    scores = summary["tests"]["maps"]
    means = []
    for k, pairs in dice.items():
        patients = {p: np.mean([d for q, d in pairs if q == p]) for p, _ in pairs}
        means.append(np.mean(list(patients.values())))
        assert scores["classes"][NAMES[k]]["dice"]["mean"] == pytest.approx(means[-1])
        assert scores["classes"][NAMES[k]]["images"] == len(pairs)
    assert scores["dice"]["mean"] == pytest.approx(np.mean(means))
    f1 = pooled[:, 0] / pooled[:, 1:].sum(1)
    assert scores["macro_f1_pooled"] == pytest.approx(f1.mean())
    assert scores["dice_pooled"] == pytest.approx(f1[1:].mean())


def test_predictions_are_class_numbers_with_a_legend(trained, maps, tmp_path, monkeypatch, capsys):
    options, out = trained[0], tmp_path / "masks"
    words = ["--weights", options.out, "--out", out, "--overlays", "--probabilities"]
    code, said, err = command(monkeypatch, capsys, predict, *words, maps / "test/images")
    assert code == 0, err
    assert json.loads((out / "classes.json").read_text()) == {
        str(k): name for k, name in enumerate(NAMES)
    }
    assert Image.open(out / "legend.png").height == 44
    model = segformer.SegFormer.from_pretrained(options.out)
    for path in (maps / "test/images").iterdir():
        picture = Image.open(out / path.name)
        with torch.no_grad():
            logits = model(model.preprocess(Image.open(path))[None])[0]
        expected = model.postprocess(logits, (48, 64))
        assert picture.mode == "P" and (np.asarray(picture) == expected.argmax(0).numpy()).all()
        stored = np.asarray(Image.open(out / f"{path.stem}_probability.png")) / 65535
        assert np.abs(stored - expected[1:].max(0)[0].numpy()).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", ["segformer", "upernet", "dpt", "beit"])
def test_small_models_learn_organs_in_real_slices(model, real_data, tmp_path):
    """CT with three organs of one patient, from nothing: only that it learns, not how well."""
    options = train.Options(
        model=model, variant="mini", weights="none", data=[str(real_data / "ct_gi")], epochs=30,
        batch_size=8, lr=1e-3, workers=0, out=str(tmp_path / "run"), cache=str(tmp_path / "cache"),
    )  # fmt: skip
    scores = train.run(options)["tests"]["ct_gi"]
    table = rows(f"{options.out}/metrics.csv")
    assert float(table[-1]["train_loss"]) < 0.7 * float(table[0]["train_loss"])
    print(model, {name: of["dice"]["mean"] for name, of in scores["classes"].items()})
    assert scores["classes"].keys() == {"large bowel", "small bowel", "stomach"}
    assert scores["classes"]["large bowel"]["dice"]["mean"] > 0.2  # it is in every slice


def test_a_prompted_set_is_one_class(demo, options):
    options = replace(options, data=[str(demo)], group_regex=None, epochs=2)
    summary = train.run(options)
    config = json.loads((train.Path(options.out) / "config.json").read_text())
    assert config["config"]["num_classes"] == 1 and config["classes"] == ["target"]
    assert summary["tests"]["demo"]["dice"]["n"] > 0 and "macro_f1_pooled" not in summary


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompt", "p1"], "segformer reads no text"),
        (["--negatives", "0.2"], "segformer reads no text"),
        (["--threshold", "0.4"], "most probable"),
        (["--threshold", "auto"], "most probable"),
        (["--model", "clipseg", "--size", "64"], "has 1 classes"),
        (["--fold", "5/5"], "--fold 5/5"),
        (["--train", "adapters"], "has no place"),
        (["--keep-features", "--train", "decoder"], "--keep-features"),
    ],
)
def test_what_cannot_be_is_one_line(words, said, maps, tmp_path, monkeypatch, capsys):
    base = ["--model", "segformer", "--variant", "mini", "--weights", "none", "--data", maps]
    base += ["--out", tmp_path / "run", "--cache", tmp_path / "cache", "--workers", 0]
    code, _, err = command(monkeypatch, capsys, train, *base, *words)
    assert code == 2 and said in err and err.strip().count("\n") == 0, err


def test_other_classes_than_trained_are_refused(trained, maps, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "test").symlink_to(maps / "test")
    (other / "classes.json").write_text(json.dumps({"0": "background", "1": "box", "2": "disc"}))
    options = trained[0]
    again = train.Options(
        weights=options.out, eval=True, test=[str(other)], out=str(tmp_path / "out"),
        cache=options.cache, workers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="but the run was trained on background, disc, box"):
        train.run(again)


def test_the_study_s_protocol_runs(options):
    summary = train.run(replace(options, recipe="origin", size=None, epochs=1, batch_size=4))
    config = json.loads((train.Path(options.out) / "config.json").read_text())["config"]
    assert config["image_size"] == 288 and config["resample"] == "cv2 nearest"
    assert 0 <= summary["tests"]["maps"]["macro_f1_pooled"] <= 1


# --- the parts ------------------------------------------------------------------------------------


def test_the_study_s_loss_by_hand():
    """Two pixels, two classes, one image of each class alone."""
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 3.0]]]])  # (2,2,1,2)
    target = torch.tensor([[[0, 0]], [[1, 1]]])
    a, b = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3))
    absent = 1e-8 / (1 - a + 0.5 + 1e-8), 1e-8 / (0.5 + 1 - b + 1e-8)
    dice = [2 * (a + 0.5) / (a + 0.5 + 2), absent[0], absent[1], 2 * (0.5 + b) / (0.5 + b + 2)]
    ce = -(math.log(a) + math.log(0.5) + math.log(0.5) + math.log(b)) / 4
    loss, parts = losses.gi_tract_dice_ce(logits, target)
    assert float(parts["dice_loss"]) == pytest.approx(1 - sum(dice) / 4, rel=1e-6)
    assert float(parts["ce"]) == pytest.approx(ce, rel=1e-6)
    assert float(loss) == pytest.approx(1 - sum(dice) / 4 + ce, rel=1e-6)


def test_class_loss_is_taken_at_the_size_of_the_mask():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 32, 32)).float()
    mask[0, 0, :4] = 255
    large = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    expected, _ = losses.dice_ce(large, mask[:, 0].long())
    torch.testing.assert_close(class_maps.class_loss(logits, {"mask": mask})[0], expected)
    one = class_maps.class_loss(logits[:, :1], {"mask": (mask == 1).float()})[0]
    torch.testing.assert_close(one, losses.dice_bce(large[:, :1], (mask == 1).float())[0])


def augmented(image, mask, seed=0, size=288, **numbers):
    new = augment.GITractAugment(**numbers)
    return new(image, mask, "", size, np.random.default_rng(seed))


@pytest.mark.parametrize("side", [234, 266, 310, 360])
def test_the_study_s_pixels_are_cv2_s_nearest(side):
    """cv2's INTER_NEAREST takes source pixel dst * side // 288 (facts checked against cv2)."""
    image = torch.arange(side).expand(3, side, side).clone()
    image = (image % 251).to(torch.uint8)
    config = replace(segformer.VARIANTS["mini"], image_size=288, resample="cv2 nearest")
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = image[:, np.arange(288) * side // 288][:, :, np.arange(288) * side // 288]
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))
    found = segformer.preprocess(picture, config) * std + mean
    torch.testing.assert_close(found * 255, expected.float(), rtol=0, atol=1e-3)
    mask = segformer.preprocess_mask(image[0].long(), config)
    assert mask.shape == (1, 288, 288) and (mask[0] == expected[0]).all()


def test_the_study_s_augmentation_moves_image_and_mask_alike():
    y, x = np.mgrid[:288, :288]
    blob = ((y - 100) ** 2 + (x - 170) ** 2 < 50**2).astype(np.int64)
    mask = torch.from_numpy(blob)
    image = (mask * 200).to(torch.uint8).expand(3, 288, 288)
    changed, places, holes = 0, [], 0
    for seed in range(40):
        new, moved, prompt = augmented(image, mask, seed, light=0.0)
        assert new.shape == (3, 288, 288) and new.dtype == torch.uint8
        assert moved.dtype == torch.int64 and set(moved.unique().tolist()) <= {0, 1}
        disagree = ((new[0] > 100) != (moved == 1)).float().mean()
        assert disagree < 0.005, "the rim alone, bilinear against nearest"
        where = moved.nonzero().float().mean(0)
        places.append(where)
        changed += int(not torch.equal(moved, mask))
        holes += int(abs(moved.sum() - mask.sum()) > 0.3 * mask.sum())
    spread = torch.stack(places).std(0)
    assert changed > 25 and (spread > 20).all()


def test_the_study_s_holes_are_black_squares_of_a_twentieth():
    image = torch.full((3, 288, 288), 200, dtype=torch.uint8)
    mask = torch.ones(288, 288, dtype=torch.int64)
    still = dict(rotate=0.0, shift=0.0, scale=0.0, light=0.0)
    areas = []
    for seed in range(40):
        new, holes, _ = augmented(image, mask, seed, **still)
        assert torch.equal(new[0] == 0, holes == 0)
        areas.append(int((holes == 0).sum()))
    some = [area for area in areas if area]
    assert 10 < len(some) < 30 and max(some) <= 8 * 14 * 14 and max(some) > 5 * 14 * 14


def test_the_study_s_light_is_a_lookup():
    """clip(v (1 + c) + 255 b), cut off to an integer: ±0.2 of 100 lies between 29 and 171."""
    image = torch.full((3, 60, 60), 100, dtype=torch.uint8)
    mask = torch.ones(60, 60, dtype=torch.int64)
    still = dict(rotate=0.0, shift=0.0, scale=0.0, holes=(0, 0))
    values = [int(augmented(image, mask, s, 60, **still)[0][0, 30, 30]) for s in range(200)]
    assert sum(value == 100 for value in values) > 60
    assert min(values) >= 29 and max(values) <= 171 and min(values) < 50 and max(values) > 150


def test_folds_train_and_validate_on_other_patients(options, maps):
    train.run(replace(options, fold="1/3", epochs=1))
    config = json.loads((train.Path(options.out) / "config.json").read_text())
    assert config["data"]["val"].startswith("10 entries")  # of 12 + 3 patients, two images each
    assert config["data"]["train"].startswith("20 entries")


def test_a_class_in_no_image_has_no_score():
    names = ("a", "b")
    base = {"name": "x", "group": None, "prompt": ""}
    where = {"dataset": "d", **base}
    truth = torch.tensor([[[1, 1, 0, 255]]])
    masks = np.array([[[0, 1, 1, 1]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], bool)
    item = where | {"truth": truth}
    scored = evaluate.score(item, masks, ("background", *names), masks.astype(float))
    assert [row["class"] for row in scored] == ["a", "b", "background"]
    assert scored[0]["dice"] == pytest.approx(2 / 3)
    assert (scored[2]["tp"], scored[2]["fp"], scored[2]["fn"]) == (1, 1, 0)
    summary = metrics.summarise(scored, names)
    assert summary["dice"]["mean"] == pytest.approx(2 / 3)
    assert summary["classes"]["b"]["dice"]["n"] == 0
    assert summary["macro_f1_pooled"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_entries_without_any_class_count_as_right_in_the_sheet(maps, tmp_path):
    dataset = data.open_dataset(layouts.read_entries(maps, "test")[:2], tmp_path)
    first, second = (entry.name for entry in dataset.entries)
    table = [
        {"name": first, "dice": 0.2, "in_truth": True, "in_pred": True},
        {"name": first, "dice": 1.0, "in_truth": False, "in_pred": False},
        {"name": first, "tp": 5},
        {"name": second, "dice": 1.0, "in_truth": False, "in_pred": False},
    ]
    assert evaluate.dice_by_entry(table, dataset).tolist() == [0.2, 1.0]
