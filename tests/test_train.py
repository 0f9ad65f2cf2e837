"""train.py: the files that it writes, resuming, and what is refused."""

import errno
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_scores, command, rows
from PIL import ExifTags, Image
from safetensors.torch import load_file

import cris
import data
import predict
import train
from engine import evaluate, runs
from imaging import atomic_files, layouts
from imaging.pictures import GROUND_TRUTH, outline
from options import resolve
from recipes import FAMILIES, base, images
from recipes import cris as cris_recipes

pytestmark = pytest.mark.numeric


def arguments(options: train.Options) -> list[str]:
    """The same as words of a command line."""
    words = []
    for key, value in vars(options).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value not in (None, []):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.curves
def test_a_run_leaves_everything_that_the_design_names(options, demo, capsys):
    summary = train.run(options)
    out = train.Path(options.out)
    history = rows(out / "metrics.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"])
    config = json.loads((out / "config.json").read_text())
    assert (config["format"], config["model"], config["class"]) == (1, "cris", "CRIS")
    per_image = rows(out / "test/per_image.csv")
    assert len(per_image) == len(layouts.read_entries(demo, "test"))
    mean = np.mean([float(row["dice"]) for row in per_image])
    assert summary["tests"]["demo"]["dice"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert json.loads((out / "test/summary.json").read_text())["tests"]["demo"]["dice"]["n"] == len(
        per_image
    )
    pictures = sorted(path.name for path in (out / "test/overlays").iterdir())
    assert len(pictures) == 7 and "sheet.png" in pictures
    for picture in [out / "curves.png", *(out / "test/overlays").iterdir()]:
        Image.open(picture).load()
    assert not list(out.glob(".*"))  # no temporary files
    assert not (out / "adapter.safetensors").exists()  # all was trained: there is no smaller copy
    assert "epoch 2/2" in capsys.readouterr().out and "epoch 2/2" in (out / "log.txt").read_text()


def test_what_is_tested_is_the_best_epoch_and_predict_gives_its_masks(
    options, demo, tmp_path, monkeypatch, capsys
):
    train.run(replace(options, lr=3e-3))
    model = cris.CRIS.from_pretrained(options.out).eval()
    best = load_file(f"{options.out}/best.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    masks = tmp_path / "masks"
    code, out, _ = command(
        monkeypatch, capsys, predict, demo, "--weights", options.out, "--out", masks,
        "--device", "cpu", "--overlays", "--probabilities",
    )  # fmt: skip
    assert code == 0
    for row in rows(f"{options.out}/test/per_image.csv"):
        mask = np.asarray(Image.open(masks / f"{row['name']}.png"))
        truth = np.asarray(Image.open(demo / "masks" / f"{row['name']}.png")) > 0
        assert set(np.unique(mask)) <= {0, 255} and mask.shape == truth.shape
        overlap = 2 * ((mask > 0) & truth).sum() / ((mask > 0).sum() + truth.sum())
        assert overlap == pytest.approx(float(row["dice"]), abs=1e-6)
        probability = np.asarray(Image.open(masks / f"{row['name']}_probability.png"))
        assert probability.dtype == np.uint16
        assert np.abs((probability / 65535 > 0.5) != (mask > 0)).mean() < 1e-3
    code, _, err = command(
        monkeypatch, capsys, predict, demo, "--weights", options.out, "--out", masks
    )
    assert code == 2 and "exists already" in err


def test_evaluation_only_repeats_the_test_and_takes_other_prompts(options, demo, tmp_path):
    trained = train.run(options)
    again = train.Options(
        weights=options.out,
        eval=True,
        data=[str(demo)],
        out=str(tmp_path / "again"),
        cache=options.cache,
    )
    assert_same_scores(train.run(again)["tests"], trained["tests"])  # prompt and size are the run's
    file = replace(again, weights=f"{options.out}/best.safetensors", out=str(tmp_path / "file"))
    summary = train.run(replace(file, model="segformer"))  # whose file it is, its run says
    assert_same_scores(summary["tests"], trained["tests"])
    assert summary["model"] == "cris"
    other = replace(
        again, prompt="p0", out=str(tmp_path / "p0"), test=[f"{demo}:val", f"{demo}:other_blob"]
    )
    summary = train.run(other)
    assert set(summary["tests"]) == {"demo:val", "demo:other_blob"} and summary["prompt"] == "p0"
    assert (tmp_path / "p0/test/overlays/demo-val/sheet.png").is_file()


def test_network_size_scores_are_those_of_the_network_s_grid(options, demo, tmp_path):
    train.run(replace(options, size=[32]))
    at = {}
    for size in ("image", "network"):
        out = str(tmp_path / size)
        train.run(train.Options(weights=options.out, eval=True, data=[str(demo)], out=out,
                                cache=options.cache, score_size=size))  # fmt: skip
        at[size] = {
            row["name"]: int(row["tp"]) + int(row["fn"])
            for row in rows(f"{out}/test/per_image.csv")
        }
    ratio = np.mean([at["network"][name] / at["image"][name] for name in at["image"]])
    assert 0.2 < ratio < 0.3  # a quarter of the pixels


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_one_that_was_not(options, tmp_path, workers):
    whole = replace(options, out=str(tmp_path / "whole"), batch_size=8, ema=0.9, workers=workers)
    train.run(whole)

    class Stop(Exception):
        pass

    halves = replace(whole, out=str(tmp_path / "halves"), save_every=0)
    for stop in (2, 5, 9, None):  # save_every 0: after every step
        saved = train.Run.save

        def save_and_stop(self, stop=stop, saved=saved):
            saved(self)
            if self.step == stop and self.batch:
                raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Run, "save", save_and_stop)
            if stop is None:
                train.run(replace(halves, resume=True))
            else:
                with pytest.raises(Stop):
                    train.run(replace(halves, resume=stop != 2))
    same_run(tmp_path / "whole", tmp_path / "halves")


def same_run(one, other):
    """Weights and metrics.csv of two run folders are equal to the bit."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    states = [torch.load(path / "last.pt", weights_only=True) for path in (one, other)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


@pytest.mark.parametrize("times", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_ends_the_same(options, tmp_path, times):
    longer = replace(options, epochs=4, batch_size=8, save_every=0.005, workers=1)
    train.run(replace(longer, out=str(tmp_path / "whole")))
    killed = tmp_path / "killed"
    words = arguments(replace(longer, out=str(killed), resume=True))
    moments, kills = random.Random(0), 0
    while kills < times:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while (
            not (killed / "log.txt").is_file()
            or b"parameters on" not in (killed / "log.txt").read_bytes()
        ):
            time.sleep(0.05)
            assert process.poll() is None, process.stdout.read().decode()
        time.sleep(moments.uniform(0, 2.5))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        (killed / "log.txt").unlink()
    subprocess.run([sys.executable, ROOT / "train.py", *words], check=True, capture_output=True)
    same_run(tmp_path / "whole", killed)


def test_resuming_refuses_other_options_and_other_runs_are_not_written_over(
    options, monkeypatch, capsys
):
    train.run(options)
    before = {
        path: path.read_bytes() for path in train.Path(options.out).rglob("*") if path.is_file()
    }
    code, _, err = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 2 and "already contains a run" in err and err.count("\n") == 1
    code, _, err = command(
        monkeypatch, capsys, train, *arguments(replace(options, resume=True, lr=1e-4, epochs=3))
    )
    assert code == 2 and "--lr 0.001 -> 0.0001" in err and "--epochs" not in err
    assert before == {path: path.read_bytes() for path in before}
    code, out, _ = command(monkeypatch, capsys, train, "--resume", "--out", options.out)
    assert code == 0 and "resumed in epoch 3, at step" in out


REFUSED = {
    "no data": (lambda o, d: replace(o, data=[]), "--data is missing"),
    "no such folder": (lambda o, d: replace(o, data=["nowhere"]), "nowhere: no such folder"),
    "no such prompt type": (lambda o, d: replace(o, prompt="p9"), "no prompt of type p9"),
    "no such recipe": (
        lambda o, d: replace(o, recipe="mine"),
        "--recipe mine: cris has default, origin",
    ),
    "no such variant": (lambda o, d: replace(o, variant="rn5"), "--variant rn5: cris has rn50"),
    "no such split": (
        lambda o, d: replace(o, test=[f"{d}:testB"]),
        "testB.json: no such annotation file",
    ),
    "no such weights": (
        lambda o, d: replace(o, weights="missing.pth", variant=None),
        "missing.pth",
    ),
    "no such device": (
        lambda o, d: replace(o, device="cuda:7"),
        "--device cuda:7: not on this machine",
    ),
    "not a device": (lambda o, d: replace(o, device="tpu9"), "--device tpu9: unknown"),
    "no steps": (
        lambda o, d: replace(o, max_steps=0),
        "--max-steps 0: must be a whole number of at least 1",
    ),
    "fewer than no epochs": (
        lambda o, d: replace(o, epochs=-1),
        "--epochs -1: must be a whole number of at least 0",
    ),
    "a test of nothing": (
        lambda o, d: replace(o, epochs=0),
        "--weights none: untrained weights",
    ),
    "a test of CLIP": (
        lambda o, d: replace(o, epochs=0, weights=None, variant=None),
        "--weights is missing: CLIP alone",
    ),
    "no milestones": (lambda o, d: replace(o, schedule="multistep"), "has no milestones"),
    "warm-up of a plateau": (
        lambda o, d: replace(o, schedule="plateau", warmup=0.2),
        "--warmup: has no effect with these options",
    ),
    "rank of nothing": (
        lambda o, d: replace(o, lora_rank=4),
        "--lora-rank: has no effect with",
    ),
    "width of nothing": (
        lambda o, d: replace(o, adapter_dim=4),
        "--adapter-dim: has no effect with these options",
    ),
    "a text that is absent in none": (
        lambda o, d: replace(o, prompt="a polyp", negatives=0.2),
        "--negatives: needs a prompt type",
    ),
    "a study at another size": (
        lambda o, d: replace(o, prompt_study=True, score_size="network"),
        "--score-size network: --prompt-study",
    ),
    "batch of none": (
        lambda o, d: replace(o, batch_size=0),
        "--batch-size 0: must be a whole number of at least 1",
    ),
    "size": (lambda o, d: replace(o, size=[50]), "32"),
    "a loss that is no number": (
        lambda o, d: replace(o, lr=1e38, clip_grad=0.0),
        "the loss became",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_user_did_wrong_is_one_line(kind, options, demo, monkeypatch, capsys):
    change, words = REFUSED[kind]
    code, _, err = command(monkeypatch, capsys, train, *arguments(change(options, demo)))
    assert code == 2, err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def test_unknown_options_are_refused(monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, train, "--learning-rate", "1")
    assert code == 2 and "unrecognized arguments: --learning-rate" in err


def test_a_disk_that_is_full_leaves_the_last_good_state(options, monkeypatch, capsys):
    train.run(options)
    good = train.Path(options.out, "last.pt").read_bytes()
    run_save = torch.save

    def full(state, part):
        run_save(state, part)
        raise OSError(28, "No space left on device", str(part))

    monkeypatch.setattr(torch, "save", full)
    torn = replace(options, out=options.out + "2")
    code, _, err = command(monkeypatch, capsys, train, *arguments(torn))
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert not list(train.Path(torn.out).glob("last.pt")) and not list(
        train.Path(torn.out).glob(".*")
    )
    assert train.Path(options.out, "last.pt").read_bytes() == good


def test_decoder_only_leaves_the_towers_as_they_are(options):
    train.run(replace(options, train="decoder", epochs=1))
    torch.manual_seed(options.seed)
    before = cris.CRIS(replace(cris.VARIANTS["mini"], text_length=77)).state_dict()
    after = load_file(f"{options.out}/best.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    towers = {name for name in before if cris_recipes.clip_towers(name)}
    assert towers and not moved & towers
    assert {name.split(".")[0] for name in moved} == {
        "backbone",
        "neck",
        "decoder",
        "proj",
    }  # connect is new


def test_accumulated_gradients_are_the_mean_of_their_batches(options, demo):
    settings = cris_recipes.PROTOCOLS["default"]
    dataset = data.open_dataset(layouts.read_entries(demo, "train"), options.cache)

    def step(count, freeze):
        torch.manual_seed(0)
        s = train.resolve(replace(options, batch_size=4, grad_accum_steps=count, clip_grad=0.0))
        s = replace(s, optimizer="adam", schedule="constant", warmup=0.0)
        model = cris_recipes.load_cris("none", "mini", s, {"image_size": 64, "dropout": 0.0}, None)
        run = train.Run(s, model, cris_recipes.cris_recipe(model, s), dataset, dataset)
        model.eval()  # batch statistics would differ
        seen = []
        run.optimizer.step = lambda: seen.append(
            [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
        items = data.Items(dataset, "p6", run.recipe.inputs, train=True, seed=0)
        batches = iter(
            data.make_loader(items, data.train_batches(len(dataset), 4, 1, 0, 0), 0, run.device)
        )
        for _ in range(2 // count):
            run.optimizer_step(batches)
        return seen

    assert settings.lr
    (both,), (first, second) = step(2, True), step(1, True)
    for g, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(g, (a + b) / 2, rtol=1e-4, atol=1e-7)


def test_learning_rates_over_time():
    def curve(**settings):
        s = replace(cris_recipes.PROTOCOLS["default"], **settings)
        return [base.lr_factor(step, 100, s) for step in range(101)]

    cosine = curve(schedule="cosine", warmup=0.1)
    assert (
        cosine[0] == 0.1 and cosine[9] == 1 and cosine[10] == 1 and cosine[100] == pytest.approx(0)
    )
    assert cosine[55] == pytest.approx(0.5)
    assert curve(schedule="poly", warmup=0.0)[50] == pytest.approx(0.5**0.9)
    steps = curve(schedule="multistep", warmup=0.0, milestones=(0.3, 0.6))
    assert steps[29] == 1 and steps[30] == pytest.approx(0.1) and steps[60] == pytest.approx(0.01)
    assert set(curve(schedule="constant", warmup=0.0)) == {1.0}


@pytest.mark.parametrize("recipe", ["origin", "refcoco"])
def test_published_protocols_run(recipe, options):
    summary = train.run(replace(options, recipe=recipe, batch_size=16, epochs=1))
    config = json.loads((train.Path(options.out) / "config.json").read_text())["config"]
    assert config["threshold"] == 0.35 and summary["threshold"] == 0.35
    assert config["text_length"] == {"origin": 77, "refcoco": 17}[recipe]
    assert config["pad_token"] == {"origin": 49407, "refcoco": 0}[recipe]
    assert config["pixels"] == {"origin": "medvlsm", "refcoco": "letterbox"}[recipe]


def test_patience_ends_a_run_that_gets_no_better(options, capsys):
    train.run(replace(options, lr=1e-30, epochs=9, patience=2))
    dice = [float(row["val_dice"]) for row in rows(f"{options.out}/metrics.csv")]
    best = dice.index(max(dice))  # statistics of the norms still move, so it need not be the first
    assert len(dice) == best + 1 + 2 < 9
    assert f"since epoch {best + 1}" in capsys.readouterr().out


def test_texts_per_batch(demo):
    entries = layouts.read_entries(demo, "train")
    part = [replace(entry, prompts={"p1": ["a"], "p2": ["b", "c"]}) for entry in entries[:10]]
    dataset = data.Dataset(part, np.zeros((10, 6), int), None)
    assert images.texts_per_batch(dataset, "p1", 16) == pytest.approx(1)
    assert images.texts_per_batch(dataset, "some text", 16) == pytest.approx(1)
    assert images.texts_per_batch(dataset, "p2", 2) == pytest.approx(1.5)
    assert images.texts_per_batch(dataset, "random", 1) == pytest.approx(1)
    three = 1 - 0.5**4 + 2 * (1 - 0.75**4)  # a half of all draws, b and c a quarter each
    assert images.texts_per_batch(dataset, "random", 4) == pytest.approx(three)


def test_a_constant_prompt_keeps_the_text_norm_in_evaluation_mode(options, capsys):
    train.run(replace(options, prompt="p1", epochs=1))
    assert "neck.txt_proj.1, stays in evaluation mode" in capsys.readouterr().out
    weights = load_file(f"{options.out}/best.safetensors")
    assert not weights["neck.txt_proj.1.running_mean"].any()  # never updated
    assert json.loads((train.Path(options.out) / "config.json").read_text())["config"][
        "freeze_text_norm"
    ]


def test_pooled_sets_train_together(options, demo, tmp_path):
    link = tmp_path / "second"
    link.symlink_to(demo)
    options = replace(options, data=[str(demo), str(link)], epochs=1)
    with pytest.raises(ValueError, match="two test sets are called demo"):
        train.run(options)
    summary = train.run(replace(options, test=[f"{demo}:val"]))
    assert summary["tests"]["demo:val"]["dice"]["n"] == len(layouts.read_entries(demo, "val"))


@pytest.fixture
def parts(demo, tmp_path):
    """The demo set with a part of train, and a prompt type that only test has."""
    root = tmp_path / "parts"
    shutil.copytree(demo, root)
    entries = {split: json.loads((root / f"anns/{split}.json").read_text()) for split in SPLITS}
    for entry in entries["test"]:
        entry["prompts"]["m_other"] = "something else"
    for split, listed in entries.items():
        for entry in listed:
            entry["prompts"]["m_original"] = entry["prompts"]["p6"]
        (root / f"anns/{split}.json").write_text(json.dumps(listed))
    (root / "anns/train_10.json").write_text(json.dumps(entries["train"][:4]))
    (root / "anns/val_10.json").write_text(json.dumps(entries["val"][:3]))
    return root


SPLITS = ("train", "val", "test")


def test_a_part_of_train_is_trained_on_and_tested_on_all_of_test(parts, options, capsys):
    options = replace(options, data=[f"{parts}:train_10"], epochs=1, prompt="m_original")
    summary = train.run(options)
    printed = capsys.readouterr().out
    assert "training on the split train_10, validating on val_10" in printed
    assert re.search(r"^train: 4 ", printed, re.MULTILINE)
    assert re.search(r"^val: 3 ", printed, re.MULTILINE)
    count = len(layouts.read_entries(parts, "test"))
    assert summary["tests"]["parts"]["dice"]["n"] == count

    # the same data set names the same test, here with texts that only test has
    again = replace(options, weights=options.out, variant=None, eval=True, epochs=None, lr=None)
    again = replace(again, batch_size=None, out=f"{options.out}-eval", prompt="m_other,p6")
    summary = train.run(again)
    assert summary["tests"]["parts"]["dice"]["n"] == count
    table = rows(f"{again.out}/test/per_image.csv")
    assert {row["prompt"] for row in table} == {"something else"}


def test_the_first_cases_of_a_part_are_overfitted(parts, options, capsys):
    train.run(replace(options, data=[f"{parts}:train_10"], overfit=9, epochs=1))
    assert "the same: 4 " in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["m_other", "m_original,m_other"])
def test_types_of_test_alone_are_not_trained(parts, prompt, options, monkeypatch, capsys):
    wrong = replace(options, data=[str(parts)], prompt=prompt)
    code, _, err = command(monkeypatch, capsys, train, *arguments(wrong))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "no prompt of type m_other to train with, only p0, " in err
    assert "types that only the test split has are for --eval" in err
    assert not Path(options.out).exists()


def test_busi_s_one_bit_masks_are_scored_at_their_own_size(real_data, options):
    busi = real_data / "busi"
    out = replace(options, data=[str(busi)], prompt="p1", epochs=1, max_steps=1, out=options.out)
    train.run(out)
    for row in rows(f"{options.out}/test/per_image.csv"):
        mask = np.asarray(Image.open(busi / "masks" / f"{row['name']}.png"))
        assert mask.dtype == bool and int(row["tp"]) + int(row["fn"]) == mask.sum() > 0


def test_a_test_divides_a_set_as_the_training_did(tmp_path):
    """Of a folder without lists of splits, by patients: else it would test on training images."""
    told = {"data": ["data/flat"], "group_regex": "case(.)", "seed": 3, "fold": "1/5"}
    run = {"format": 1, "model": "segformer", "options": told}
    (tmp_path / "config.json").write_text(json.dumps(run))
    asked = train.Options(weights=str(tmp_path), eval=True)

    def found(**more):
        done = resolve(replace(asked, **more))
        return done.group_regex, done.seed, done.fold

    assert found(test=["../data/flat"]) == ("case(.)", 3, "1/5")
    assert found(test=["data/flat:val"]) == ("case(.)", 3, "1/5")
    assert found(test=["data/other"]) == (None, 3, "1/5")
    assert found(data=["data/flat"], threshold="auto", seed=4) == ("case(.)", 4, "1/5")
    assert found(test=["data/flat"], group_regex="x", fold="0/2") == ("x", 3, "0/2")


def test_mask_orientation_is_kept_for_later_tests(tmp_path):
    run = {"format": 1, "model": "segformer", "options": {"mask_orientation": "stored"}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    asked = train.Options(weights=str(tmp_path), eval=True, test=["data/other"])
    assert resolve(asked).mask_orientation == "stored"
    other = replace(asked, mask_orientation="upright")
    assert resolve(other).mask_orientation == "upright"
    volumes = train.Options(model="swin_unetr3d", data=["a"], mask_orientation="stored")
    with pytest.raises(ValueError, match="--mask-orientation: swin_unetr3d takes volumes"):
        resolve(volumes)


@pytest.mark.parametrize("orientation", [None, "upright"])
def test_mask_orientation_reaches_training_and_a_resumed_run(
    orientation, options, demo, tmp_path, monkeypatch, capsys
):
    """Of images that are stored upside down, whose masks have no tag."""
    turned = shutil.copytree(demo, tmp_path / "turned")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for path in (turned / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    first = replace(options, model="segformer", data=[str(turned)], cache=str(tmp_path / "cache"),
                    epochs=1, max_steps=1, overlays=0, mask_orientation=orientation)  # fmt: skip
    code, said, _ = command(monkeypatch, capsys, train, *arguments(first))
    assert code == 0
    lines = [line for line in said.splitlines() if "turned like their images' EXIF" in line]
    assert len(lines) == (3 if orientation is None else 0)  # train, val, test
    kept = json.loads(Path(options.out, "config.json").read_text())["options"]
    assert kept["mask_orientation"] == orientation

    code, said, _ = command(monkeypatch, capsys, train, "--resume", "--out", options.out)
    assert code == 0 and "decoding" not in said
    other = "stored" if orientation == "upright" else "upright"
    words = "--resume", "--out", options.out, "--mask-orientation", other
    code, _, error = command(monkeypatch, capsys, train, *words)
    assert code == 2 and f"--mask-orientation {orientation} -> {other}" in error


def test_scores_are_written_before_what_may_fail(options, monkeypatch, capsys):
    def broken(*_):
        raise OSError("the drive went")

    monkeypatch.setattr(evaluate, "draw", broken)
    code, _, error = command(monkeypatch, capsys, train, *arguments(replace(options, epochs=1)))
    assert code == 2 and "the drive went" in error
    assert (train.Path(options.out) / "test/per_image.csv").stat().st_size > 1000
    summary = json.loads((train.Path(options.out) / "test/summary.json").read_text())
    assert summary["tests"]["demo"]["dice"]["n"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_memory_that_is_full_is_one_line(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(train, "main", main)
    code, _, told = command(monkeypatch, capsys, train)
    assert code == 2 and told.startswith("error: out of memory") and told.count("\n") == 1


def test_other_errors_of_torch_are_not_hidden(monkeypatch, capsys):
    def main():
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        command(monkeypatch, capsys, train)


def test_two_processes_of_one_number_do_not_share_a_file(tmp_path):
    with (
        atomic_files.atomic_write(tmp_path / "x") as one,
        atomic_files.atomic_write(tmp_path / "x") as other,
    ):
        assert one != other
        one.write_text("1"), other.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_run_folder_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in file, file / "sub":
        code, _, error = command(monkeypatch, capsys, train, "--data", tmp_path, "--out", out)
        assert (code, error.count("\n")) == (2, 1)
        assert f"{out}: is a file, or lies below one; choose another --out" in error
    assert file.read_text() == "mine"


# --- which epoch is kept -------------------------------------------------------------------------

NAN = math.nan
EPOCHS = {  # (validation Dice, validation loss) of each epoch, epoch kept, epoch patience waits for
    "of three misses the lowest loss": ([(0, 0.9), (0, 0.5), (0, 0.7)], 2, 1),
    "without losses the last": ([(0, None), (0, None), (0, None)], 3, 1),
    "of equal losses the last": ([(0.5, 0.4), (0.5, 0.4)], 2, 1),
    "a higher loss does not win": ([(0.5, 0.4), (0.5, 0.6)], 1, 1),
    "a higher Dice wins with any loss": ([(0.5, 0.1), (0.6, 0.9), (0.6, 1.0)], 2, 2),
    "a lower Dice never wins": ([(0.5, 0.9), (0.4, 0.1)], 1, 1),
    "a tie with what was kept, not with the first": ([(0, 0.9), (0, 0.5), (0, 0.6)], 2, 1),
    "a loss that is NaN does not win": ([(0.5, 0.4), (0.5, NAN)], 1, 1),
    "and loses": ([(0.5, NAN), (0.5, 0.9)], 2, 1),
    "infinity does not win": ([(0.5, NAN), (0.5, math.inf)], 1, 1),
    "a Dice that is NaN does not win": ([(NAN, 0.1), (0.2, 0.9), (NAN, 0.0)], 2, 2),
    "and is kept if there is nothing else": ([(NAN, 0.1), (NAN, 0.2)], 2, 0),
}
LEAST = {  # the same with a min_delta of 0.01
    "a rise below it is none": ([(0.5, 0.9), (0.505, 0.1), (0.509, 0.1)], 1, 1),
    "the very same Dice is a tie": ([(0.5, 0.9), (0.505, 0.1), (0.5, 0.5)], 3, 1),
    "a rise above it wins": ([(0.5, 0.9), (0.505, 0.1), (0.511, 2.0)], 3, 3),
    "of three misses the lowest loss": ([(0, 0.9), (0, 0.5), (0, 0.7)], 2, 1),
}


@pytest.mark.parametrize(
    "least, case",
    [(0.0, case) for case in EPOCHS.values()] + [(0.01, case) for case in LEAST.values()],
    ids=[*EPOCHS, *(f"min_delta: {name}" for name in LEAST)],
)
def test_which_epoch_is_kept(least, case):
    scores, kept, waits_for = case
    run = object.__new__(train.Run)
    run.settings = SimpleNamespace(min_delta=least)
    run.best, run.best_epoch = -1.0, 0
    run.chosen = {"epoch": 0, "dice": NAN, "loss": None, "threshold": None}
    for epoch, (dice, loss) in enumerate(scores, 1):
        row = {"epoch": epoch, "val_dice": dice} | ({} if loss is None else {"val_loss": loss})
        if run.is_chosen(row):
            run.chosen = {"epoch": epoch, "dice": dice, "loss": loss, "threshold": None}
    assert (run.chosen["epoch"], run.best_epoch) == (kept, waits_for)


def test_of_equal_dice_the_weights_of_the_lowest_loss_are_tested(options, monkeypatch, capsys):
    """Patience counts from the first of them; a last.pt without the choice goes on with that."""
    losses, weights = iter([0.9, 0.5, 0.7]), []

    def validate(model, *_):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"val_loss": next(losses), "val_dice": 0.0, "val_iou": 0.0}

    monkeypatch.setattr(evaluate, "validate", validate)
    options = replace(options, epochs=9, patience=2, size=[32], overlays=0)
    train.run(options)
    out, text = Path(options.out), capsys.readouterr().out
    best = load_file(out / "best.safetensors")
    assert len(weights) == 3 and all(torch.equal(best[name], x) for name, x in weights[1].items())
    assert any(not torch.equal(best[name], x) for name, x in weights[0].items())
    assert "testing the weights of epoch 2 (validation Dice 0.0000)" in text
    assert "since epoch 1" in text

    state = torch.load(out / "last.pt", weights_only=True)
    assert state["best_epoch"] == 1 and state["chosen"]["loss"] == 0.5
    del state["chosen"]
    torch.save(state, out / "last.pt")
    train.run(replace(options, resume=True))
    assert "testing the weights of epoch 1 (validation Dice 0.0000)" in capsys.readouterr().out


# --- --threshold auto ----------------------------------------------------------------------------


def made_predictions(monkeypatch, cases):
    """Stand-in for the model: cases are (name, patient, probabilities (n,), truth (n,), loss)."""

    def predictions(*_):
        for name, group, probabilities, truth, loss in cases:
            truth = torch.tensor(truth)[None, None]  # (1,1,n)
            item = {"name": name, "group": group, "dataset": "x", "prompt": "", "truth": truth}
            yield item, np.array(probabilities, np.float32)[None, None], loss

    monkeypatch.setattr(evaluate, "predictions", predictions)
    entries = [SimpleNamespace(root="x")]
    dataset = SimpleNamespace(classes=("target",), entries=entries)
    options = SimpleNamespace(threshold="auto", min_area=1, val_distances=False, tolerance=1.0)
    recipe = SimpleNamespace(make_prompts=None)
    model = SimpleNamespace(config=SimpleNamespace(threshold=0.5))
    return model, recipe, dataset, options


def test_a_validation_finds_its_threshold_by_hand(monkeypatch, capsys):
    """Dice of a is 2/3 below 0.12, 1 below 0.32, 0 above; of b, twice, 1 below 0.22, 0 above.

    Patient q has b alone; of equal means (0.15 and 0.20) the lower threshold is taken.
    """
    a = ("a", "p", [0.32, 0.12], [1, 0], 1.0)
    b = ("b", "q", [0.22, 0.02], [1, 0], 3.0)
    c = ("c", "q", [0.22, 0.02], [1, 0], 3.0)
    given = made_predictions(monkeypatch, [a, b, c])
    scores, dice = evaluate.search_threshold(*given, "validate")
    assert scores == {
        "val_loss": pytest.approx(7 / 3), "val_dice": 1.0, "val_iou": 1.0, "val_threshold": 0.15,
    }  # fmt: skip
    assert list(dice) == pytest.approx(list(np.arange(1, 20) / 20))
    assert dice[0.1] == pytest.approx((2 / 3 + 1) / 2)  # of two patients, not of three images
    assert dice[0.25] == 0.5 and dice[0.35] == dice[0.95] == 0
    assert evaluate.validate(*given) == scores and not capsys.readouterr().out


def test_predictions_that_are_all_empty_are_said(monkeypatch, capsys):
    low = [("a", None, [0.4, 0.1], [1, 0], 1.0), ("b", None, [0.3, 0.1], [1, 1], 1.0)]
    model, recipe, dataset, options = made_predictions(monkeypatch, low)
    model.eval = lambda: None
    options.threshold = None
    assert evaluate.validate(model, recipe, dataset, options)["val_dice"] == 0
    text = capsys.readouterr().out
    assert "validate: all predictions are empty, nothing is above the threshold 0.5" in text
    assert "--threshold auto" in text and text.count("\n") == 1

    model.config.threshold = 0.35
    evaluate.validate(model, recipe, dataset, options)
    assert not capsys.readouterr().out  # a has some

    none = [("a", None, [0.01, 0.02], [1, 0], 1.0)]
    given = made_predictions(monkeypatch, none)
    evaluate.validate(*given)
    text = capsys.readouterr().out
    assert "all predictions are empty at every threshold from 0.05 to 0.95" in text
    healthy = [("a", None, [0.01, 0.02], [0, 0], 1.0)]
    evaluate.validate(*made_predictions(monkeypatch, healthy))
    text = capsys.readouterr().out
    assert "all predictions are empty" not in text  # as empty as the ground truth
    assert "no case has foreground" in text


def test_the_threshold_of_each_validation_chooses_the_epoch(
    options, demo, tmp_path, monkeypatch, capsys
):
    passes, predictions = [], evaluate.predictions

    def counted(*arguments):
        passes.append(arguments[-1])
        return predictions(*arguments)

    monkeypatch.setattr(evaluate, "predictions", counted)
    auto = replace(options, threshold="auto", epochs=2, lr=3e-3, size=[32], overlays=1)
    whole = replace(auto, out=str(tmp_path / "whole"))
    summary = train.run(whole)
    text = capsys.readouterr().out
    assert passes == ["validate", "validate", "test demo", "draw"]  # none only for the threshold

    history = rows(f"{whole.out}/metrics.csv")
    best = max(history, key=lambda row: float(row["val_dice"]))
    threshold = float(best["val_threshold"])
    saved = json.loads(Path(whole.out, "config.json").read_text())["config"]
    assert saved["threshold"] == summary["threshold"] == threshold
    told = f"epoch {best['epoch']} (validation Dice {float(best['val_dice']):.4f} at threshold"
    assert f"testing the weights of {told} {threshold:g})" in text

    model = cris.CRIS.from_pretrained(whole.out)  # that Dice is what a plain evaluation gives
    recipe = cris_recipes.cris_recipe(model, cris_recipes.PROTOCOLS["default"])
    val = data.open_dataset(layouts.read_entries(demo, "val"), options.cache)
    found = evaluate.evaluate(model, recipe, val, resolve(replace(options, prompt="p6")), False, "")
    dice = np.mean([row["dice"] for row in found])
    assert dice == pytest.approx(float(best["val_dice"]), abs=1e-6)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    halves = replace(auto, out=str(tmp_path / "halves"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train.Run, "should_stop_early", lambda run: stop() if run.epoch else False)
        train.run(halves)
    train.run(replace(halves, resume=True))
    same_run(tmp_path / "whole", tmp_path / "halves")
    again = json.loads((tmp_path / "halves/config.json").read_text())["config"]
    assert again["threshold"] == threshold


# --- the run that weights are from ---------------------------------------------------------------


def test_a_file_in_a_run_folder_is_of_that_run(tmp_path, monkeypatch):
    run, hub = {"format": 1, "model": "cris"}, {"model_type": "clip"}
    for name, content in ("run", run), ("hub", hub), ("list", ["format"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        (tmp_path / name / "best.safetensors").touch()
    for weights in "run", "run/best.safetensors":
        assert runs.read_run(tmp_path / weights) == run
        assert runs.read_run(str(tmp_path / weights)) == run
    monkeypatch.chdir(tmp_path)
    assert runs.read_run("run/best.safetensors") == run
    (tmp_path / "None").mkdir()
    (tmp_path / "None/config.json").write_text(json.dumps(run))
    others = None, "none", "hub", "hub/best.safetensors", "list", "list/best.safetensors"
    for weights in *others, "run/missing.pth", "nowhere":
        assert runs.read_run(weights) == {}
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(ValueError, match="run/config.json: is not valid JSON"):
        runs.read_run("run/best.safetensors")


# --- one process a folder ------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(options, monkeypatch, capsys):
    words = arguments(replace(options, epochs=1000, workers=1, batch_size=4))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *words], **pipes)
    log = Path(options.out, "log.txt")
    while not log.is_file() or "parameters on" not in log.read_text():
        time.sleep(0.05)
        assert first.poll() is None, first.stderr.read()

    for second in words, ["--resume", "--out", options.out]:
        code, text, error = command(monkeypatch, capsys, train, *second)
        assert code == 2 and not text and error.count("\n") == 1, error
        assert f"{options.out}: another process is writing to this folder" in error
    assert first.poll() is None

    first.send_signal(signal.SIGKILL)  # its data-loading process lives on for some seconds
    assert first.wait() == -signal.SIGKILL
    assert Path(options.out, ".lock").exists()  # but it locks nothing
    with atomic_files.claim_folder(Path(options.out)):
        pass
    assert not Path(options.out, ".lock").exists()


def test_a_claim_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "deep" / "run"
    with atomic_files.claim_folder(folder):
        with (
            pytest.raises(ValueError, match="run: another process"),
            atomic_files.claim_folder(folder),
        ):
            raise AssertionError("not reached")
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())  # nothing was written
    with pytest.raises(KeyError), atomic_files.claim_folder(folder):
        (folder / "log.txt").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["log.txt"]


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The last holder removes the file between another one's open and its lock."""
    path, flock, calls = tmp_path / ".lock", atomic_files.fcntl.flock, []

    def late(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(atomic_files.fcntl, "flock", late)
    with atomic_files.locked(path, tmp_path):
        assert len(calls) == 2 and path.exists()
        with (
            pytest.raises(ValueError, match="another process"),
            atomic_files.locked(path, tmp_path),
        ):
            raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_says_so_once(number, tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(atomic_files.fcntl, "flock", none)
    with atomic_files.claim_folder(tmp_path):
        assert not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    assert f"{tmp_path}: the file system has no locks" in text and text.count("\n") == 1


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK"])
def test_several_processes_are_refused(rank, options, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    atomic_files.refuse_several_processes()  # one of a cluster's jobs has no rank
    monkeypatch.setenv(rank, "1")
    code, _, error = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 2 and error.count("\n") == 1 and "WORLD_SIZE is 2" in error
    assert not Path(options.out).exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    atomic_files.refuse_several_processes()


# --- how masks are read: one decision for a data set, kept in the run ---


def stripes(*values):
    mask = np.zeros((40, 50), np.uint8)
    for k, value in enumerate(values):
        mask[2 + 9 * k : 9 + 9 * k, 5:45] = value
    return mask


def picture_set(root, masks, classes=None):
    """Write ROOT/{train,val,test}/{images,masks}, two pairs a split. masks: {split: array}."""
    for split, mask in masks.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for k in range(2):
            pixels = np.random.default_rng(k).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{split}{k}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{split}{k}.png")
    if classes:
        (root / "classes.json").write_text(json.dumps(dict(enumerate(classes))))
    return root


def opening(tmp_path, root, **how):
    """The options of a training that only opens its data sets."""
    how = {"model": "segformer", "cache": str(tmp_path / "cache"), "data": [str(root)]} | how
    return resolve(train.Options(out=str(tmp_path / "run"), **how))


def open_sets(settings) -> tuple[dict, dict]:
    """Open the data sets of a run: train and val, and the tests."""
    opened = runs.open_data(settings, FAMILIES[settings.model])
    return opened.parts, opened.tests


def test_the_threshold_of_masks_is_kept_in_the_run(tmp_path, monkeypatch, capsys):
    splits = ("train", "val", "test")
    root = picture_set(tmp_path / "soft", dict.fromkeys(splits, stripes(64, 128, 255)))
    other = picture_set(tmp_path / "other", dict.fromkeys(splits, stripes(255)))
    out = str(tmp_path / "run")
    options = train.Options(
        model="segformer", variant="mini", weights="none", data=[str(root)], out=out, size=[64],
        cache=str(tmp_path / "cache"), mask_threshold=100, max_steps=2, batch_size=2, workers=0,
        device="cpu", overlays=0,
    )  # fmt: skip
    foreground = {"soft": 560, "other": 280}  # a stripe has 7 x 40 pixels

    def truth(folder):
        named = rows(f"{folder}/test/per_image.csv")
        return {row["dataset"]: int(row["tp"]) + int(row["fn"]) for row in named}

    train.run(options)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["masks"] == {"soft": "--mask-threshold 100"}
    assert config["options"]["mask_threshold"] == 100
    assert truth(out) == {"soft": 560}

    # A later test of the same data set goes by the run, one of another by its own values.
    tests = [str(root), str(other)]
    again = train.Options(weights=out, eval=True, test=tests, cache=options.cache, workers=0,
                          device="cpu", overlays=0, out=str(tmp_path / "again"))  # fmt: skip
    train.run(again)
    said = capsys.readouterr().out
    assert truth(again.out) == foreground
    assert "test other: " in said and "masks read > 127, 0 of them empty" in said

    # So does a resumed run, which refuses another threshold.
    train.run(replace(options, resume=True))
    with pytest.raises(ValueError, match="--mask-threshold 100 -> 64"):
        train.run(replace(options, resume=True, mask_threshold=64))

    # predict.py draws the ground truth by it: green where the mask is 128 or 255.
    common = [root, "--weights", out, "--device", "cpu", "--split", "test"]
    code, _, error = command(
        monkeypatch, capsys, predict, *common, "--out", tmp_path / "masks", "--overlays"
    )
    assert code == 0, error
    drawn = np.asarray(Image.open(tmp_path / "masks/test0_overlay.png"))
    green = (drawn == GROUND_TRUTH).all(axis=2)
    assert np.array_equal(green, outline(stripes(64, 128, 255) > 100, 1))
    for k, (more, line) in enumerate({
        ("--mask-threshold", "9"): "--mask-threshold has no effect without --overlays",
        ("--mask-threshold", "256", "--overlays"):
            "--mask-threshold 256: must be a whole number from 0 to 255",
    }.items()):  # fmt: skip
        code, _, error = command(
            monkeypatch, capsys, predict, *common, "--out", tmp_path / f"{k}", *more
        )
        assert code == 2 and line in error and error.count("\n") == 1

    # Runs of before know no rules: the data set is judged by its values.
    del config["masks"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="test0.png: holds several values"):
        train.run(replace(again, out=str(tmp_path / "old")))
    train.run(replace(again, test=[str(other)], out=str(tmp_path / "older")))
    assert truth(tmp_path / "older") == {"other": 280}


@pytest.mark.parametrize("how", ["tested", "not tested", "overfit"])
def test_all_splits_decide_how_a_data_set_is_read(how, tmp_path, capsys):
    """One class, 255 is void: only the test split has a lesion."""
    masks = {"train": stripes(1, 255), "val": stripes(1, 255), "test": stripes(1)}
    if how == "overfit":  # the case that is opened is void and nothing else
        masks["train"] = stripes(255)
    root = picture_set(tmp_path / "set", masks, ("background", "lesion"))
    other = picture_set(tmp_path / "other", {"test": stripes(255)})
    if how == "overfit":
        with pytest.raises(ValueError, match=r"all 1 masks are empty \(read by number\)"):
            open_sets(opening(tmp_path, root, overfit=1))
        return
    tests = [] if how == "tested" else [str(other)]
    sets, _ = open_sets(opening(tmp_path, root, test=tests))
    rules = data.rules_by_name(sets["train"].rules)
    assert rules == {"set": "by number"} | ({} if how == "tested" else {"other": "> 127"})
    assert capsys.readouterr().out.count("masks read by number") == (3 if how == "tested" else 2)


def test_masks_of_a_split_that_is_not_opened_count_and_may_be_missing(tmp_path, capsys):
    masks = {"train": stripes(255), "val": stripes(255), "test": stripes(128, 255)}
    root = picture_set(tmp_path / "set", masks)
    other = picture_set(tmp_path / "other", {"test": stripes(255)})
    options = opening(tmp_path, root, test=[str(other)])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match="test0.png: holds several values"):
            open_sets(options)
    (root / "test/masks/test0.png").write_text("no image")
    open_sets(options)
    said = capsys.readouterr().out
    assert "set: test does not count for how masks are read (" in said
    assert said.count("masks read > 127") == 3


@pytest.mark.parametrize("value", ["256", "-1", "0.5", "half"])
def test_a_mask_threshold_is_a_grey_level(value, monkeypatch, capsys):
    code, _, error = command(monkeypatch, capsys, train, f"--mask-threshold={value}")
    assert code == 2 and f"--mask-threshold {value}: must be a whole number from 0 to 255" in error
    assert error.count("\n") == 1


def test_volumes_take_no_mask_threshold():
    with pytest.raises(ValueError, match="--mask-threshold: swin_unetr3d takes volumes"):
        resolve(train.Options(model="swin_unetr3d", data=["x"], mask_threshold=0))


@pytest.mark.parametrize("classes", [None, ("background", "polyp", "tool")])
def test_a_split_without_foreground_is_said_and_not_refused(classes, tmp_path, capsys):
    masks = {"train": stripes(*([255] if classes is None else [1, 2]))}
    root = picture_set(tmp_path / "set", masks | dict.fromkeys(("val", "test"), stripes()), classes)
    sets, tests = open_sets(opening(tmp_path, root))
    assert [len(some) for some in (*sets.values(), *tests.values())] == [2, 2, 2]
    lines = [x for x in capsys.readouterr().out.splitlines() if "ground truth of" in x]
    assert [line.split(" is empty in all 2 cases, ")[0] for line in lines] == [
        f"{root}: the ground truth of test set",
        f"{root}: the ground truth of val",
    ]
    assert "fewest false alarms" in lines[1] and "Dice is 1 where nothing is predicted" in lines[0]

    masks = dict.fromkeys(("train", "val", "test"), stripes())
    root = picture_set(tmp_path / "empty", masks, classes)
    with pytest.raises(ValueError, match="all 2 masks are empty"):
        open_sets(opening(tmp_path, root))


def test_a_run_whose_validation_and_test_have_no_foreground(tmp_path, capsys):
    masks = {"train": stripes(255), "val": stripes(), "test": stripes()}
    root = picture_set(tmp_path / "set", masks)
    options = train.Options(
        model="segformer", variant="mini", weights="none", data=[str(root)], size=[64],
        out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), max_steps=1, batch_size=2,
        workers=0, device="cpu", overlays=1, threshold="auto",
    )  # fmt: skip
    summary = train.run(options)["tests"]["set"]
    assert summary["empty_images"] == 2
    assert summary["image_specificity"] == 1 - summary["false_alarms"] / 2
    text = capsys.readouterr().out
    assert "of 2 images without foreground, specificity of images" in text


def test_without_foreground_the_threshold_stays_a_half(monkeypatch, capsys):
    """Cases without foreground cannot choose one: the highest probabilities are 0.42 and 0.63."""
    items = []
    for k, highest in enumerate((0.42, 0.63)):
        item = {"truth": torch.zeros(1, 4, 4, dtype=torch.uint8), "name": str(k), "group": None}
        probabilities = np.full((1, 4, 4), highest, np.float32)
        items.append((item | {"dataset": "set", "prompt": ""}, probabilities, None))
    monkeypatch.setattr(evaluate, "predictions", lambda *_: items)
    dataset = type("", (), {"classes": ("polyp",)})
    scores, dice = evaluate.search_threshold(None, None, dataset, None, "validate")
    assert scores["val_threshold"] == 0.5 and scores["val_dice"] == 0.5
    assert dice[0.65] == 1 and dice[0.05] == 0
    assert "no case has foreground to choose a threshold by" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["folders", "lists"])
def test_a_test_split_without_masks_is_left_out(layout, tmp_path, capsys):
    root = picture_set(tmp_path / "set", dict.fromkeys(("train", "val", "test"), stripes(255)))
    if layout == "lists":
        (root / "anns").mkdir()
        for split in ("train", "val", "test"):
            items = []
            for k in range(2):
                name = f"{split}{k}.png"
                for kind in ("images", "masks"):
                    (root / kind / split).mkdir(parents=True, exist_ok=True)
                    (root / split / kind / name).rename(root / kind / split / name)
                items.append({"img_name": name, "mask_name": name, "prompts": {"p0": ""}})
            (root / "anns" / f"{split}.json").write_text(json.dumps(items))

    def remove(name):
        next(root.rglob(f"masks/**/{name}")).unlink()

    remove("test1.png")
    _, tests = open_sets(opening(tmp_path, root))
    assert tests == {}
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "test1.png" in x]
    assert line.startswith("test set is left out, training continues without it: ")

    with pytest.raises((ValueError, FileNotFoundError), match="test1.png"):
        open_sets(opening(tmp_path, root, eval=True, weights="x.safetensors"))
    remove("train1.png")
    with pytest.raises((ValueError, FileNotFoundError), match="train1.png"):
        open_sets(opening(tmp_path, root))
    with pytest.raises(FileNotFoundError, match="lost: no such folder"):
        open_sets(opening(tmp_path, root, test=[str(tmp_path / "lost")]))


def test_a_test_split_without_entries_is_left_out(tmp_path, capsys):
    root = picture_set(tmp_path / "set", dict.fromkeys(("train", "val", "test"), stripes(255)))
    for path in [*root.glob("test/*/*")]:
        path.unlink()
    _, tests = open_sets(opening(tmp_path, root))
    line = f"test set is left out, training continues without it: {root}: its split test is empty"
    assert tests == {} and line in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{root}: its split test is empty"):
        open_sets(opening(tmp_path, root, eval=True, weights="x.safetensors"))
