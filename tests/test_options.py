"""Options: their ranges, from the command line and from Python, and the names of run folders."""

import argparse
import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from PIL import Image
from torch import nn

import export
import losses
import options
import predict
import prepare
import studies
import train
from engine.ranges import Number
from imaging import pictures
from options import Options, as_options, flag, resolve, values_of
from recipes import FAMILIES, base, cris, images, sam
from recipes.base import BOX_OPTIONS

# --- ranges --------------------------------------------------------------------------------------

WRONG = {  # option -> values that it must not take
    "lr": ["0", "-1", "nan", "inf", "-inf", "x", ""],
    "backbone_lr": ["-1e-9", "nan", "inf"],
    "weight_decay": ["-0.1", "nan", "inf"],
    "clip_grad": ["-1", "nan", "inf"],
    "ema": ["-0.1", "1", "1.5", "nan"],
    "threshold": ["7", "0", "1", "-0.5", "nan", "half"],
    "warmup": ["5", "-0.1", "nan"],
    "negatives": ["5", "-0.1", "nan"],
    "overlap": ["-0.1", "1", "nan"],
    "topology_weight": ["-1", "nan", "inf"],
    "nsd_tolerance": ["0", "-1", "nan", "inf"],
    "save_every": ["-1", "nan", "inf"],
    "spacing": ["0", "-1", "nan", "inf"],
    "pixel_size": ["0", "-1", "nan", "inf"],
    "crop_ratio": ["-1", "nan", "inf"],
    "size": ["-64", "0", "1.5", "64px"],
    "patience": ["-1", "1e3", "1.0"],
    "adapter_dim": ["-3", "0"],
    "lora_rank": ["-1", "0"],
    "epochs": ["-1", "2.5", "10000000000"],
    "max_steps": ["0", "-1"],
    "batch_size": ["0", "-4"],
    "grad_accum_steps": ["0", "-1"],
    "eval_every": ["0", "-1"],
    "overfit": ["0", "-1"],
    "jitter": ["-1", "1.5"],
    "min_area": ["0", "-1"],
    "prompts_per_image": ["-1"],
    "crops_per_volume": ["0"],
    "window_batch": ["0"],
    "workers": ["-1", "two", "1000000"],
    "seed": ["-1", "99999999999999999999", "nan"],
    "overlays": ["-1"],
    "mask_threshold": ["-1", "256", "0.5"],
}
SPECS = {spec.name: spec for spec in fields(Options)}
NUMBERS = {name: values_of(spec) for name, spec in SPECS.items()}
NUMBERS = {name: values for name, values in NUMBERS.items() if isinstance(values, Number)}


def test_every_number_has_a_range_and_a_test():
    assert NUMBERS.keys() == WRONG.keys()
    for name, values in NUMBERS.items():
        assert values.at_least is not None or values.above is not None, name


@pytest.mark.parametrize("name", WRONG)
def test_a_number_out_of_its_range_is_one_line_that_names_the_option(name, monkeypatch, capsys):
    count = SPECS[name].metadata["argparse"].get("nargs")
    rest = [1] * (count - 1) if isinstance(count, int) else []
    for text in WRONG[name]:
        words = [flag(name), text, *rest] if rest else [f"{flag(name)}={text}"]
        code, out, error = command(monkeypatch, capsys, train, *words)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith(f"error: {flag(name)} "), error
        assert ": must be a " in error, error


@pytest.mark.parametrize("name", WRONG)
def test_python_refuses_the_same_values_in_the_same_words(name, monkeypatch, capsys):
    for text in WRONG[name]:
        given = NUMBERS[name].read(text)
        count = SPECS[name].metadata["argparse"].get("nargs")
        if isinstance(count, int):
            given = [given, *[1.0] * (count - 1)]
        with pytest.raises(ValueError, match=re.escape(flag(name))) as told:
            resolve(Options(data=["a"], **{name: given}))
        if "nargs" not in SPECS[name].metadata["argparse"]:
            _, _, error = command(monkeypatch, capsys, train, f"{flag(name)}={text}")
            assert error == f"error: {told.value}\n"


def test_ends_of_ranges_are_taken():
    for given in (
        {"backbone_lr": 0.0, "weight_decay": 0, "clip_grad": 0, "ema": 0.0, "patience": 0},
        {"warmup": 1, "seed": 2**63 - 1, "workers": 0, "overlays": 0, "save_every": 0},
        {"warmup": 0.0, "epochs": 1, "threshold": 0.01, "lr": 1e-30, "mask_threshold": 255},
        {"threshold": "auto", "negatives": 1.0, "ema": 0.999},
    ):
        done = resolve(Options(model="clipseg", data=["a"], out="x", **given))
        assert given.items() <= vars(done).items()


def test_a_range_in_words():
    assert str(Number(above=0)) == "a number above 0"
    assert str(Number(at_least=0)) == "a number of at least 0"
    assert str(Number(at_least=0, below=1)) == "a number of at least 0 and below 1"
    assert str(Number(True, 0, at_most=255)) == "a whole number from 0 to 255"
    assert str(Number(above=0, below=1, word="auto")) == "a number above 0 and below 1, or auto"


def test_what_is_typed_is_shown_in_one_short_line():
    number = Number(above=0)
    for given, shown in (
        (-1.0, "-1"), (float("nan"), "nan"), ("1", "'1'"), ("a\nb", r"'a\nb'"), ("", "''"),
        (True, "True"), ([1], "[1]"), ("x" * 99, "x" * 60 + "…"), (10**400, "1" + "0" * 59 + "…"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as told:
            number.check(given)
        assert str(told.value) == f"{shown}: must be a number above 0"


OTHERS = {  # program -> option -> values that it must not take
    predict: {
        "--threshold": ["7", "nan", "0"],
        "--overlap": ["1", "-0.1", "nan"],
        "--window-batch": ["0", "x"],
        "--mask-threshold": ["256"],
    },
    (prepare, "demo"): {"--images": ["29", "x"], "--size": ["63", "-64"], "--seed": ["-1"]},
    (prepare, "check", "data"): {"--mask-threshold": ["-1"]},
    (prepare, "uw-madison", "raw"): {"--seed": ["-1", "nan"]},
    (prepare, "duke-amd", "raw"): {"--seed": ["-1"], "--every": ["0"]},
    (prepare, "msd", "raw", "--out", "x"): {"--seed": ["-1"]},
    (prepare, "btcv", "raw"): {"--seed": ["-1"]},
    (prepare, "demo-volumes"): {"--seed": ["-1"], "--volumes": ["2"]},
    (prepare, "boxes", "masks", "--like", "x"): {"--min-area": ["0"], "--mask-threshold": ["x"]},
    (studies, "few-shot", "--data", "x", "--new-class", "y"): {
        "--k": ["0"], "--draws": ["0"], "--steps": ["-1"], "--base-epochs": ["0"],
        "--base-lr": ["0", "nan"], "--from-plain": ["0"], "--jobs": ["0"], "--lr": ["-1"],
    },
}  # fmt: skip


@pytest.mark.parametrize("program", OTHERS, ids=str)
def test_other_programs_check_their_numbers(program, monkeypatch, capsys):
    module, *words = program if isinstance(program, tuple) else (program, "x")
    for name, texts in OTHERS[program].items():
        for text in texts:
            more = ["--weights", "w", "--out", "o"] if module is predict else []
            given = *words, *more, f"{name}={text}"
            code, _, error = command(monkeypatch, capsys, module, *given)
            assert (code, error.count("\n")) == (2, 1), error
            assert error.startswith(f"error: {name} {text}: must be a "), error


def test_no_program_takes_a_bare_number():
    """int and float of argparse take nan, infinity and -1."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert not re.search(r"type=(int|float)\b", path.read_text(encoding="utf-8")), path.name


# --- help ----------------------------------------------------------------------------------------


def test_help_is_two_screens_in_groups_and_shows_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, text, _ = command(monkeypatch, capsys, train, "--help")
    assert code == 0
    assert text.count("\n") <= 105 and max(map(len, text.splitlines())) <= 100
    titles = re.findall(r"^(\w+) options:$", text, re.M)
    assert tuple(titles) == options.GROUPS
    common = text.partition("common options:")[2].partition("data options:")[0]
    assert re.findall(r"^  (--[\w-]+)", common, re.M) == [
        "--model", "--data", "--weights", "--out", "--epochs", "--batch-size", "--lr", "--size",
        "--prompt", "--resume",
    ]  # fmt: skip
    for line in ("LoRA rank (with --train lora) [recipe]", "processes that load data [2]"):
        assert line in text


def test_help_of_predictions_comes_in_groups(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, text, _ = command(monkeypatch, capsys, predict, "--help")
    assert code == 0 and text.count("\n") <= 70
    assert re.findall(r"^(\w+) options:$", text, re.M) == ["common", "model", "file", "volume"]


@pytest.mark.parametrize(
    "name, default",
    [("lr", "recipe"), ("seed", "0"), ("save_every", "10"), ("out", "runs/MODEL-DATA-OPTIONS"),
     ("eval", ""), ("data", ""), ("max_steps", ""), ("size", "weights"), ("ema", "0")],
)  # fmt: skip
def test_the_default_that_help_shows(name, default):
    assert options.default_words(SPECS[name]) == default


def test_every_option_is_in_the_name_of_a_run_folder_or_left_out_on_purpose():
    left_out = {"model", "data", "test", "recipe", "eval", "epochs", "group_regex", "clip"}
    assert {*options.NAMED} == SPECS.keys() - left_out - options.FREE


# --- options in Python ---------------------------------------------------------------------------


def test_a_single_value_is_a_list_of_one(tmp_path):
    path = tmp_path / "polyps"
    done = resolve(Options(data=str(path), size=64, test=path))
    assert (done.data, done.test, done.size) == ([str(path)], [str(path)], [64])
    assert resolve(Options(data=("a", Path("b")))).data == ["a", "b"]
    assert resolve(Options(data=["a"], threshold=np.float64(0.5), seed=np.int64(3))).seed == 3


@pytest.mark.parametrize(
    "given, said",
    [
        ({"data": 3}, "--data 3: must be a text"),
        ({"data": None}, "--data None: must be a text"),
        ({"model": "unet"}, "--model unet: must be one of beit, biomedclipseg"),
        ({"model": ["cris"]}, "--model ['cris']: must be one of"),
        ({"model": None}, "--model None: must be one of"),
        ({"schedule": "linear"}, "--schedule linear: must be one of cosine, poly"),
        ({"views": "mirror"}, "--views mirror: must be one of original, hflip"),
        ({"recipe": 3}, "--recipe 3: must be a text"),
        ({"eval": "yes"}, "--eval yes: must be True or False"),
        ({"epochs": True}, "--epochs True: must be a whole number"),
        ({"epochs": 2.0}, "--epochs 2: must be a whole number"),
        ({"lr": "1e-3"}, "--lr '1e-3': must be a number above 0"),
        ({"seed": None}, "--seed None: must be a whole number"),
        ({"spacing": [1, 1]}, "--spacing: takes 3 values, not 2"),
        ({"prompt": 6}, "--prompt 6: must be a text"),
    ],
)
def test_wrong_types_and_words_are_one_line(given, said):
    with pytest.raises(ValueError) as told:
        train.run(Options(**{"data": ["a"]} | given))
    assert str(told.value).startswith(said) and "\n" not in str(told.value)


def test_a_word_that_is_no_choice_is_refused_in_the_same_words(monkeypatch, capsys):
    _, _, error = command(monkeypatch, capsys, train, "--data", "a", "--model", "unet")
    with pytest.raises(ValueError) as told:
        train.run(Options(data=["a"], model="unet"))
    assert error == f"error: {told.value}\n"


@pytest.mark.parametrize("model", FAMILIES)
def test_what_a_recipe_sets_can_be_handed_on(model):
    """A resumed run gives all of its options again."""
    family = FAMILIES[model]
    for recipe in family.protocols:
        given = Options(model=model, recipe=recipe, data=["a"], weights="none")
        settings = resolve(given)
        done = as_options(settings) | {"resume": True}
        same = resolve(Options(**done))
        assert json.dumps(as_options(same)) == json.dumps(done)
        assert (same.warmup, same.lr, same.epochs) == (
            settings.warmup, settings.lr, settings.epochs,
        )  # fmt: skip
    if model == "fewshot3d":
        with pytest.raises(ValueError, match="--warmup 9: must be a number from 0 to 1"):
            resolve(replace(given, warmup=9.0))


# --- sizes ---------------------------------------------------------------------------------------

IMAGES = [name for name, family in FAMILIES.items() if family.takes == "images"]


@pytest.mark.parametrize("model", IMAGES)
def test_a_size_that_a_model_cannot_take_is_refused_before_data_is_read(
    model, tmp_path, monkeypatch, capsys
):
    least, step = FAMILIES[model].sides
    wrong = {1, 8, least - 1, least + 1 if step > 1 else 1}
    words = "--model", model, "--data", tmp_path / "nowhere", "--out", tmp_path / "run"
    for size in wrong:
        code, _, error = command(monkeypatch, capsys, train, *words, "--size", size)
        assert (code, error.count("\n")) == (2, 1), error
        assert error.startswith(f"error: --size {size}: {model} takes sides ")
        assert f" {least} " in error
    code, _, error = command(monkeypatch, capsys, train, *words, "--size", least)
    assert code == 2 and "nowhere: no such folder" in error


@pytest.mark.parametrize("variant", ["b0", "mini"])
def test_segformer_s_least_side(variant):
    import segformer

    with torch.device("meta"):
        model = segformer.SegFormer(replace(segformer.VARIANTS[variant], num_classes=2))
        assert model.eval()(torch.zeros(1, 3, 29, 29)).shape == (1, 2, 8, 8)
        with pytest.raises(ValueError, match=r"at least 29, not \(64, 28\)"):
            model(torch.zeros(1, 3, 64, 28))
    assert FAMILIES["segformer"].sides == (29, 1)


# --- batches of one image ------------------------------------------------------------------------


def test_a_single_value_is_normalised_by_the_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(3))
    for norm in model[0], model[2]:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(1, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(x)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(x)
    base.allow_single_values(model)
    found = model.train()(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    assert x.grad.abs().min() > 0 and model[0].weight.grad.abs().min() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_other_batches_are_normalised_as_ever():
    torch.manual_seed(0)
    plain, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    base.allow_single_values(other)
    for shape in (2, 3, 1, 1), (1, 3, 2, 1), (4, 3, 5, 6):
        x = torch.randn(shape)
        assert torch.equal(plain(x), other(x))
        assert torch.equal(plain.running_var, other.running_var)
    assert torch.equal(plain.eval()(x), other.eval()(x))


def few_images(root: Path, sizes: list, value: int = 255) -> Path:
    """Write ROOT/{train,val,test}/{images,masks}, an image of each size (H,W) a split."""
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for k, (h, w) in enumerate(sizes):
            pixels = np.random.default_rng(k).integers(0, 255, (h, w, 3), dtype=np.uint8)
            mask = np.zeros((h, w), np.uint8)
            mask[: max(1, h // 2), : max(1, w // 2)] = value
            Image.fromarray(pixels).save(root / split / "images" / f"{split}{k}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{split}{k}.png")
    return root


def small_run(root: Path, tmp_path: Path, model: str, **more) -> Options:
    """A training of one or two steps of a small model."""
    how = {"variant": "mini", "weights": "none", "out": str(tmp_path / "run"), "device": "cpu"}
    how |= {"cache": str(tmp_path / "cache"), "epochs": 1, "max_steps": 2, "workers": 0}
    how |= {"prompt": "a blob"} if FAMILIES[model].reads_text() else {}
    how |= {"min_area": 1} if BOX_OPTIONS in FAMILIES[model].options else {}
    return Options(model=model, data=[str(root)], **how | {"overlays": 0} | more)


@pytest.mark.parametrize("model", IMAGES)
def test_one_image_trains_every_model(model, tmp_path):
    """At the least size, where last maps have a single value; ema copies the model."""
    root = few_images(tmp_path / "set", [(20, 30)])
    least = FAMILIES[model].sides[0]
    how = {"overfit": 1, "batch_size": 4, "size": least, "ema": 0.5, "max_steps": 1}
    summary = train.run(small_run(root, tmp_path, model, **how))
    assert summary["tests"]["overfit"]["dice"]["n"] == 1


# --- images of one row ---------------------------------------------------------------------------


def test_images_of_one_row_are_trained_on_scored_and_drawn(tmp_path):
    root = few_images(tmp_path / "set", [(1, 900), (900, 1), (1, 1), (40, 50)])
    train.run(small_run(root, tmp_path, "segformer", size=64, batch_size=2, overlays=3))
    folder = tmp_path / "run/test"
    assert json.loads((folder / "summary.json").read_text())["tests"]["set"]["dice"]["n"] == 4
    assert len(list((folder / "overlays").iterdir())) == 10
    page = Image.open(folder / "overlays/sheet.png")
    assert page.width < 1000 and page.height < 5000


@pytest.mark.parametrize(
    "size, expected",
    [((900, 1), (320, 1)), ((1, 900), (1, 960)), ((1, 1), (320, 320)), ((100, 50), (320, 160))],
)
def test_a_card_keeps_the_shape_of_its_picture(size, expected):
    card = pictures.captioned(Image.new("RGB", size, "black"), "")
    dark = (np.asarray(card)[:, :, 0] == 0).nonzero()
    assert (dark[1].max() + 1, dark[0].max() + 1) == expected
    assert card.width == 320


def test_scores_of_all_tests_are_written_before_a_picture_fails(tmp_path, monkeypatch):
    """The picture of the first test fails."""
    root = few_images(tmp_path / "set", [(20, 30)])

    def broken(*_):
        raise ValueError("no picture today")

    monkeypatch.setattr(pictures, "captioned", broken)
    tests = [f"{root}:test", f"{root}:val"]
    with pytest.raises(ValueError, match="no picture today"):
        train.run(small_run(root, tmp_path, "segformer", size=64, overlays=1, test=tests))
    summary = json.loads((tmp_path / "run/test/summary.json").read_text())
    assert set(summary["tests"]) == {"set", "set:val"}


# --- nothing counts ------------------------------------------------------------------------------


def zero(loss, *leaves):
    """The loss is 0, and so are all gradients."""
    assert float(loss.detach()) == 0
    loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None and not leaf.grad.any()


def leaf(*shape) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, requires_grad=True)


OF_CLASSES = [losses.gi_tract_dice_ce, losses.dice_ce]


@pytest.mark.parametrize("loss", OF_CLASSES)
@pytest.mark.parametrize("size", [(6, 7), (4, 6, 7)])
def test_a_batch_of_255_alone_costs_nothing_of_classes(loss, size):
    x = leaf(2, 3, *size)
    total, parts = loss(x, torch.full((2, *size), 255))
    zero(total, x)
    assert all(float(part.detach()) == 0 for part in parts.values())


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_pixels_of_255_count_nowhere_whatever_is_predicted_there(loss):
    target = torch.tensor([[[0, 1, 2], [1, 255, 255]]])
    x = leaf(1, 3, 2, 3)
    other = x.detach().clone()
    other[..., 1, 1:] = 9 * torch.randn(3, 2)
    total, _ = loss(x, target)
    assert float(total) == pytest.approx(float(loss(other, target)[0]), abs=1e-6)
    total.backward()
    assert not x.grad[..., 1, 1:].any() and x.grad[..., 0, :].all()


def test_gi_tract_loss_without_255_is_the_study_s():
    x, target = leaf(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    p, t = x.softmax(1).flatten(2), nn.functional.one_hot(target, 3).movedim(-1, 1).flatten(2)
    dice = 1 - (2 * (p * t).sum(2) + 1e-8) / (p.sum(2) + t.sum(2) + 1e-8)
    expected = dice.mean() + nn.functional.cross_entropy(x, target)
    assert float(losses.gi_tract_dice_ce(x, target)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_masks_of_255_alone_cost_nothing():
    for smooth in 1.0, 1e-5:
        x = leaf(2, 1, 6, 7)
        zero(losses.dice_bce(x, torch.full((2, 1, 6, 7), 255.0), smooth)[0], x)
    x = leaf(2, 2, 6, 7)
    zero(losses.partial_dice_bce(x, torch.full((2, 2, 6, 7), 255))[0], x)
    x = leaf(2, 2, 6, 7)
    zero(losses.partial_dice_bce(x, torch.full((2, 2, 6, 7), -1))[0], x)


def test_a_prompt_whose_truth_is_255_alone_costs_nothing():
    x, iou = leaf(2, 6, 7), leaf(2)
    zero(losses.sam_loss(x, iou, torch.full((2, 6, 7), 255.0))[0], x, iou)

    target = torch.zeros(2, 6, 7)
    target[0, :3] = 1
    alone, _ = losses.sam_loss(x[:1], iou[:1], target[:1])
    target[1] = 255
    x.grad = iou.grad = None
    both, parts = losses.sam_loss(x, iou, target)
    both.backward()
    assert not x.grad[1].any() and iou.grad[1] == 0 and iou.grad[0] != 0
    rest = float(parts["dice_loss"] + parts["bce"])  # the mean over both
    assert float(parts["iou_mse"]) == pytest.approx(float(alone) - 2 * rest, abs=1e-6)


@pytest.mark.parametrize("topology", ["persistence", "cldice", "oct"])
def test_topology_of_255_alone_costs_nothing(topology):
    x = leaf(2, 1, 16, 17)
    settings = SimpleNamespace(topology=topology, topology_weight=1.0)
    term, _ = sam.topology_term(x, torch.full((2, 1, 16, 17), 255.0), settings)
    zero(term, x)


@pytest.mark.parametrize("loss", [images.medvlsm_dice, cris.refcoco_bce])
def test_published_losses_of_cris_count_no_pixel_of_255(loss):
    x = leaf(2, 1, 4, 4)
    zero(loss(x, {"mask": torch.full((2, 1, 16, 16), 255.0)})[0], x)
    x = leaf(2, 1, 4, 4)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:8, :8] = 1
    total, _ = loss(x, {"mask": mask})
    if loss is cris.refcoco_bce:
        small = nn.functional.interpolate(mask, (4, 4), mode="nearest")
        expected = nn.functional.binary_cross_entropy_with_logits(x, small)
        assert float(total) == pytest.approx(float(expected), rel=1e-6)
    mask[:, :, 8:] = 255
    total, _ = loss(x, {"mask": mask})
    assert 0 < float(total) < 2


@pytest.mark.parametrize("model, recipe", [("segformer", "origin"), ("segformer", "default")])
def test_a_training_with_images_of_255_alone_goes_on(model, recipe, tmp_path):
    root = few_images(tmp_path / "set", [(20, 30), (20, 30), (20, 30)], value=1)
    for k in 0, 1:
        path = root / "train/masks" / f"train{k}.png"
        Image.fromarray(np.full((20, 30), 255, np.uint8)).save(path)
    (root / "classes.json").write_text('{"0": "background", "1": "a", "2": "b"}')
    how = {"recipe": recipe, "batch_size": 1, "max_steps": 3, "size": 64, "epochs": 2}
    train.run(small_run(root, tmp_path, model, **how))
    lines = (tmp_path / "run/metrics.csv").read_text()
    assert "nan" not in lines and "inf" not in lines


# --- names of run folders ------------------------------------------------------------------------


def folder_of(*words) -> str:
    """Return the name of the run folder of a command line."""
    given = options.parse("", [*map(str, words)])
    return Path(resolve(Options(**given)).out).as_posix()


@pytest.mark.parametrize(
    "words, name",
    [
        ("--model cris --data data/kvasir_polyp", "cris-kvasir_polyp"),
        ("--model cris --data data/kvasir_polyp/ --seed 0", "cris-kvasir_polyp"),
        ("--data a --prompt P6", "cris-a-p6"),
        ("--data a --recipe origin", "cris-a-origin"),
        ("--data a b", "cris-a+b"),
        ("--data a --epochs 20 --workers 0 --group-regex c --device cpu", "cris-a"),
        ("--data a --lr 1e-3 --seed 2", "cris-a-lr0.001-seed2"),
        ("--data a --prompt p6,p3", "cris-a-p6_p3"),
        ("--data a --prompt random", "cris-a-random"),
        ("--data a --weights cris_best.pth", "cris-a-from-cris_best"),
        ("--data a --weights owner/name-v1.5@main", "cris-a-from-name-v1.5_main"),
        ("--data a --test b c:val", "cris-a-test-b+c_val"),
        ("--eval --weights x.pth --test data/b:val --prompt p3", "cris-b_val-eval-from-x-p3"),
        ("--epochs 0 --weights x.pth --data b", "cris-b-eval-from-x"),
        ("--model clipseg --data a --train lora --lora-rank 4", "clipseg-a-lora-lora_rank4"),
        ("--model clipseg --data a --no-keep-features", "clipseg-a-no-keep_features"),
        ("--model segformer --data a --fold 0/5 --size 64", "segformer-a-size64-fold-0_5"),
        (
            "--model swin_unetr3d --data a --spacing 1 1 2.5 --intensity -175 250",
            "swin_unetr3d-a-spacing1x1x2.5-intensity--175+250",
        ),
    ],
)
def test_a_run_folder_is_named_by_what_was_given(words, name):
    assert folder_of(*words.split()) == f"runs/{name}"


def test_a_name_is_safe_and_not_too_long(tmp_path, monkeypatch):
    text = "one small pink polyp / at the upper left: of “the image”, and so on and on"
    name = folder_of("--data", "a", "--prompt", text)
    other = folder_of("--data", "a", "--prompt", text + "!")
    assert name.startswith("runs/cris-a-one_small_pink_polyp_at_the")
    assert name != other and re.fullmatch(r"[\w.+-]+", name.removeprefix("runs/"))
    sets = [f"data/a_rather_long_name_{k}_ä" for k in range(20)]
    names = {folder_of("--data", *sets), folder_of("--data", *sets[:-1])}
    assert len(names) == 2
    assert all(len(name.encode()) <= 125 and name.count("/") == 1 for name in names)

    (tmp_path / "polyps/images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "polyps")
    assert folder_of("--data", ".") == "runs/cris-polyps"
    monkeypatch.chdir("images")
    assert folder_of("--data", "..") == "runs/cris-polyps"


def readme_commands() -> list[list[str]]:
    """Return the words of every command in README.md's blocks of shell code, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"]:
                commands.append(words[1:])
    return commands


def output_of(program: str, words: list[str], monkeypatch) -> Path | None:
    """Return what a command of the README makes, None if nothing; a run folder gets a config.json.

    Asserts that the run whose weights it takes is there.
    """
    monkeypatch.setattr("sys.argv", [program, *words])
    if program == "prepare.py":
        return getattr(prepare.parser().parse_args(words), "out", None)
    args = None
    if program == "predict.py":
        args = predict.parse()
    elif program == "studies.py":
        args = studies.parse()[0]
    elif program == "export.py":
        args = export.parse()
    elif program == "train.py":
        given = options.parse("", words)
        if given.get("resume"):
            assert Path(given["out"]).is_dir(), words
            return None
        args = argparse.Namespace(**given)
    weights = getattr(args, "weights", None)
    for source in weights if isinstance(weights, list) else [weights]:
        assert not str(source).startswith("runs/") or Path(source).is_dir(), words
    if program != "train.py":
        return args.out and Path(args.out)
    done = resolve(Options(**given))
    out = Path(done.out)
    assert not out.exists(), f"{out} is there already: train.py {' '.join(words)}"
    out.mkdir(parents=True)
    run = {"format": 1, "model": done.model, "options": as_options(done)}
    (out / "config.json").write_text(json.dumps(run))
    return out


def test_the_readme_s_commands_run_in_the_given_order(tmp_path, monkeypatch):
    """Nothing is written twice, no run or data set is used before it is made."""
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert len(commands) > 10
    made = {}
    used = set()
    for program, *words in commands:
        out = output_of(program, words, monkeypatch)
        used |= {word for word in words if word.startswith(("data/", "runs/"))} - {str(out)}
        if out is None:
            continue
        assert out not in made, f"{out}: {made.get(out)}, then {program} {words}"
        made[out] = program, words
        if program == "prepare.py":
            assert not any(Path(word.split(":")[0]) == out for word in used), words


PAGES = ["docs/training.md", "docs/scores.md", "docs/tasks/text_prompts.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_have_options_that_go_together(page, tmp_path, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            _, program, *words = shlex.split(line, comments=True)
            monkeypatch.setattr("sys.argv", [program, *words])
            if program == "predict.py":
                predict.parse()
                continue
            assert program == "train.py", line
            typed = options.parse("", words)
            if not typed.get("resume"):
                resolve(Options(**typed))
