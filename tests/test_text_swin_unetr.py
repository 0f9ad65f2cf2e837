"""Swin UNETR with a text: texts from a file, a run, predictions, misuse."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, rows, write_run
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import fewshot3d
import predict
import prepare
import swin_unetr3d
import train
from fewshot3d import TextSwinUNETR
from imaging import volumes
from recipes import text_swin_unetr
from recipes.base import lr_factor

ORGANS = ("spleen", "right kidney", "left kidney", "liver", "aorta")  # of demo-volumes
FAST = ["--model", "text_swin_unetr", "--size", 96, 32, 32, "--spacing", 6, 6, 6, "--overlap", 0]
FAST += ["--crops-per-volume", 2, "--workers", 0, "--overlays", 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of `demo-volumes` and the texts of its organs, by a small CLIP."""
    folder = tmp_path_factory.mktemp("text")
    data = folder / "data"
    texts = folder / "texts.safetensors"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPTextConfig(**sizes, intermediate_size=256, projection_dim=512)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "clip")

    with pytest.MonkeyPatch.context() as monkeypatch:
        for words in (
            ["demo-volumes", "--volumes", 3, "--out", data],
            ["text-codes", "--data", data, "--subsets", "--weights", folder / "clip"]
            + ["--out", texts],
        ):
            monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, words)])
            assert prepare.main() == 0
    return SimpleNamespace(folder=folder, data=data, texts=texts, clip=folder / "clip")


def options_of(made, out, *more):
    places = ["--data", made.data, "--text-codes", made.texts, "--out", out]
    return [*FAST, *places, "--cache", made.folder / "cache", *more]


# --- texts ----------------------------------------------------------------------------------------


def test_the_file_has_a_text_of_each_subset(made):
    texts = text_swin_unetr.read_texts(str(made.texts))
    assert len(texts) == 2**5 and frozenset() in texts and frozenset(ORGANS) in texts
    codes = load_file(made.texts)
    assert torch.equal(texts[frozenset(("liver", "spleen"))], codes["spleen , liver"])
    assert len({tuple(code.tolist()) for code in codes.values()}) == 2**5


def test_texts_that_cannot_be_made_are_refused(made, tmp_path, monkeypatch, capsys):
    how = ["text-codes", "--subsets", "--weights", made.clip, "--out", tmp_path / "x.safetensors"]
    many = [f"organ{k}" for k in range(14)]
    cases = {
        "--subsets: 14 classes have 16,384 subsets; give 13 classes at most": many,
        "--subsets: class 'a,b' looks like a list of classes; rename it": ["liver", "a,b"],
        "--subsets: class 'none' looks like a list of classes; rename it": ["none"],
    }
    for told, names in cases.items():
        code, _, error = command(monkeypatch, capsys, prepare, *how, "--classes", *names)
        assert code == 2 and error == f"error: {told}\n"
    code, _, error = command(monkeypatch, capsys, prepare, *how, "--study", "universal")
    assert code == 2 and "--subsets: the 32 of --study have too many" in error


# --- crops and losses -----------------------------------------------------------------------------


def crop_of(mask, overlapping, present_only, seed):
    """A training crop whose mask is `mask`, and the name of the text that it got."""
    names = ("background", "a", "b", "c")
    config = SimpleNamespace(classes=names, overlapping=overlapping, image_size=mask.shape)
    recipe = text_swin_unetr.PROTOCOLS["origin" if present_only else "default"]
    settings = replace(recipe, augment={}, crops_per_volume=1)
    texts = {}
    for k in range(8):
        subset = [name for i, name in enumerate("abc") if k >> i & 1]
        texts[frozenset(subset)] = torch.full((512,), float(k))
    flat = torch.arange(mask.numel())[mask.flatten() == 1]
    sample = {
        "image": torch.ones(1, *mask.shape),
        "mask": mask,
        "voxels": (flat, np.array([len(flat)] * 3)),
        "regions": ((1,), (2,), (3,)) if overlapping else None,
    }
    rng = np.random.default_rng(seed)
    item = text_swin_unetr.text_inputs(sample, True, rng, config, settings, texts)
    assert item["text"].shape == (1, 512) and len(item["text"].unique()) == 1
    number = int(item["text"][0, 0])
    return item["mask"][0], {k for k in (1, 2, 3) if number >> (k - 1) & 1}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("present_only", [False, True])
def test_the_text_names_what_the_mask_keeps(overlapping, present_only):
    """Organs 1 and 3 are in the crop, 2 is not; 255 is void and stays."""
    mask = torch.zeros(32, 32, 32, dtype=torch.uint8)
    mask[:4] = 1
    mask[8:12] = 3
    mask[20:] = 255
    seen = set()
    for seed in range(40):
        kept, named = crop_of(mask.clone(), overlapping, present_only, seed)
        for number in (1, 3):
            where = mask == number
            channel, value = (number - 1, 1) if overlapping else (0, number)
            shown = kept[channel][where] == value
            assert shown.all() if number in named else not shown.any()
        assert (kept[:, mask == 255] == 255).all()
        seen.add(frozenset(named))
    every = {frozenset(k for k in (1, 2, 3) if n >> (k - 1) & 1) for n in range(8)}
    assert seen == ({s for s in every if 2 not in s} if present_only else every)
    assert mask.unique().tolist() == [0, 1, 3, 255]


def test_the_contrast_is_a_tenth_of_itself_in_the_loss():
    settings = text_swin_unetr.PROTOCOLS["default"]
    logits = torch.randn(1, 3, 8, 8, 8)
    batch = {"mask": torch.randint(0, 3, (1, 1, 8, 8, 8)).byte()}
    plain, _ = text_swin_unetr.text_loss((logits, None), batch, settings)
    assert plain == settings.loss(logits, batch)[0]
    loss, parts = text_swin_unetr.text_loss((logits, torch.tensor(0.7)), batch, settings)
    assert loss.item() == pytest.approx(plain.item() + 0.07)
    assert parts["contrast"].item() == pytest.approx(0.7) and "dice_loss" in parts


def test_origin_is_the_study_s():
    """Its warm-up of 50 epochs is longer than its training: the rate ends at a fifth of 1e-4."""
    origin = text_swin_unetr.PROTOCOLS["origin"]
    steps = origin.epochs * 348  # 696 volumes, two a step
    rates = [origin.lr * lr_factor(step, steps, origin) for step in (0, steps - 1)]
    assert rates[0] < 1e-7 and rates[1] == pytest.approx(2e-5, rel=1e-6)
    assert origin.batch_size == 2 and origin.crops_per_volume == 4 and origin.repeat_weights
    assert not origin.name_absent and origin.contrast_weight == 0.1 and origin.hub_ids == {}


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(made):
    """A run of two epochs with all text options."""
    return trained(made, "run", "--variant", "mini-all", "--weights", "none", "--epochs", 2)


def trained(made, name, *more):
    out = made.folder / name
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = options_of(made, out, *more)
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])
        train.main()
    return out


def test_a_run_holds_the_text_of_all_organs(made, run):
    config = json.loads((run / "config.json").read_text())
    assert config["class"] == "TextSwinUNETR" and config["model"] == "text_swin_unetr"
    assert config["classes"] == ["background", *ORGANS] and config["config"]["contrast"]
    assert [float(row["train_contrast"]) > 0 for row in rows(run / "metrics.csv")] == [True, True]
    model = TextSwinUNETR.from_pretrained(run)
    expected = text_swin_unetr.read_texts(str(made.texts))[frozenset(ORGANS)]
    assert torch.equal(model.organ_text, expected)
    volume = torch.rand(1, 1, 96, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(volume)[0], model(volume, expected)[0])
        other = text_swin_unetr.read_texts(str(made.texts))[frozenset()]
        assert not torch.equal(model(volume)[0], model(volume, other)[0])
    assert (run / "test/summary.json").is_file()


def test_the_prediction_has_the_dice_of_the_test(made, run, tmp_path, monkeypatch, capsys):
    arguments = ["--weights", run, "--out", tmp_path / "p", "--overlap", 0, made.data]
    code, _, error = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, error
    (name,) = {row["name"] for row in rows(run / "test/per_image.csv")}
    found = nibabel.load(tmp_path / "p" / f"{name}.nii.gz")
    truth = nibabel.load(made.data / "labelsTs" / f"{name}.nii.gz")
    assert found.shape == truth.shape and np.array_equal(found.affine, truth.affine)
    p, t = (np.asarray(x.dataobj) for x in (found, truth))
    numbers = {name: k for k, name in enumerate(("background", *ORGANS))}
    for row in rows(run / "test/per_image.csv"):
        k = numbers[row["class"]]
        assert int(row["tp"]) == ((p == k) & (t == k)).sum()
        assert int(row["fp"]) == ((p == k) & (t != k)).sum()

    model = TextSwinUNETR.from_pretrained(run)
    file = made.data / "imagesTs" / f"{name}.nii.gz"
    _, labels, _ = volumes.segment(fewshot3d.WithText(model), file, overlap=0)
    assert np.array_equal(labels, p) and len(np.unique(p)) > 1

    arguments = [*FAST[:2], "--weights", run, "--eval", "--test", made.data, "--workers", 0]
    arguments += ["--out", tmp_path / "e", "--cache", made.folder / "cache", "--overlays", 0]
    code, _, error = command(monkeypatch, capsys, train, *arguments)
    assert code == 0, error
    for a, b in zip(
        rows(tmp_path / "e/test/per_image.csv"), rows(run / "test/per_image.csv"), strict=True
    ):
        assert a["dice"] == b["dice"]


def test_a_resumed_run_is_the_same(made, run, monkeypatch, capsys):
    """Stopped in its second epoch; an epoch is one step of one volume."""
    out = made.folder / "resumed"
    words = options_of(made, out, "--variant", "mini-all", "--weights", "none", "--epochs", 2)
    steps = []

    def forward(model, batch):
        steps.append(batch)
        if len(steps) == 2:
            raise ValueError("stopped here")
        return text_swin_unetr.text_forward(model, batch)

    recipe_of = text_swin_unetr.text_recipe
    with monkeypatch.context() as stopped:
        family = replace(
            text_swin_unetr.FAMILY,
            recipe=lambda model, settings: replace(recipe_of(model, settings), forward=forward),
        )
        stopped.setitem(train.FAMILIES, "text_swin_unetr", family)
        code, _, error = command(stopped, capsys, train, *words)
    assert code == 2 and "stopped here" in error and len(rows(out / "metrics.csv")) == 1

    code, _, error = command(monkeypatch, capsys, train, "--resume", "--out", out)
    assert code == 0, error
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (out, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert rows(out / "test/per_image.csv") == rows(run / "test/per_image.csv")


VARIANTS = {"mini": {"attention"}, "mini-concat": {"concat"}, "mini-contrast": {"contrast"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_from_weights_of_swin_unetr(made, variant, capsys):
    plain = made.folder / "plain"
    if not plain.exists():
        torch.manual_seed(0)
        config = replace(swin_unetr3d.VARIANTS["mini"], num_classes=6, spacing=(6.0, 6.0, 6.0))
        state = swin_unetr3d.SwinUNETR(config).state_dict()
        write_run(plain, swin_unetr3d.SwinUNETR, state, config)
    more = ["--variant", variant, "--weights", plain, "--epochs", 1, "--max-steps", 1]
    out = trained(made, variant, *more, "--recipe", "origin")
    config = TextSwinUNETR.from_pretrained(out).config
    options = ("attention", "concat", "contrast")
    assert {name for name in options if getattr(config, name)} == VARIANTS[variant]
    said = capsys.readouterr().out
    assert ("decoder5's weights for the text: those for the image" in said) == config.concat
    assert "new and untrained: " in said and config.classes == ("background", *ORGANS)


# --- misuse ---------------------------------------------------------------------------------------


def test_misuse_is_told_in_a_line(made, run, tmp_path, monkeypatch, capsys):
    few = tmp_path / "few.safetensors"
    codes = load_file(made.texts)
    save_file({name: code for name, code in codes.items() if name != "liver , aorta"}, few)
    out = ["--out", tmp_path / "x", "--cache", made.folder / "cache", "--workers", 0]
    new = ["--variant", "mini", "--weights", "none"]
    data = ["--data", made.data]
    texts = ["--text-codes", made.texts]
    cases = {
        "--text-codes is missing: the model reads texts; prepare.py text-codes": [*new, *data],
        f"{few}: no code of the text 'liver, aorta'; prepare.py text-codes --subsets": [
            *new, *data, "--text-codes", few,
        ],
        "--size 64 32 32: attention has three heads": [*new, *data, *texts, "--size", 64, 32, 32],
        f"--variant: remove the option, {run} has its own variant": [
            "--variant", "mini", "--weights", run, *data, *texts,
        ],
        "--variant huge: text_swin_unetr has attention, concat": ["--variant", "huge", *data],
        "--codes: text_swin_unetr has no codes of classes": [*new, *data, "--codes", "text"],
        "--text-codes: has no effect without training": [
            "--weights", run, "--eval", "--test", made.data, *texts,
        ],
        "no run of text_swin_unetr, has no texts": [
            "--weights", made.clip, "--eval", "--test", made.data,
        ],
    }  # fmt: skip
    for told, arguments in cases.items():
        words = ["--model", "text_swin_unetr", *arguments, *out]
        code, _, error = command(monkeypatch, capsys, train, *words)
        assert code == 2 and told in error and error.count("\n") == 1, (told, error)
    words = ["--model", "swin_unetr3d", "--weights", "none", *data, *texts, *out]
    code, _, error = command(monkeypatch, capsys, train, *words)
    assert code == 2 and "--text-codes: swin_unetr3d has no codes of texts" in error
    words = ["--model", "text_swin_unetr", "--weights", made.clip, "--out", tmp_path / "p"]
    code, _, error = command(monkeypatch, capsys, predict, *words, made.data)
    assert code == 2 and "no run of text_swin_unetr" in error and error.count("\n") == 1


def test_a_model_without_a_text_says_so():
    model = TextSwinUNETR(replace(fewshot3d.MINI, image_size=(96, 32, 32), concat=True))
    with pytest.raises(ValueError, match=r"no text: give one, \(512,\) or \(2,512\)"):
        model(torch.zeros(2, 1, 96, 32, 32))
    with pytest.raises(ValueError, match=r"text of all organs is \(3, 512\), expected \(512,\)"):
        TextSwinUNETR(fewshot3d.MINI, torch.zeros(3, 512))
