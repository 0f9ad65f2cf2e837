"""The training program: what it leaves behind, what resuming gives, what it refuses."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, rows
from PIL import Image
from safetensors.torch import load_file

import cris
import data
import evaluate
import layouts
import predict
import protocol
import recipes
import report
import train
from options import resolve

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


def test_a_run_leaves_everything_that_the_design_names(options, demo, capsys):
    summary = train.run(options)
    out = train.Path(options.out)
    history = rows(out / "metrics.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"])
    config = json.loads((out / "config.json").read_text())
    assert (config["format"], config["model"], config["class"]) == (1, "cris", "CRIS")
    per_image = rows(out / "test/per_image.csv")
    assert len(per_image) == len(layouts.annotations(demo, "test"))
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
    assert train.run(again)["tests"] == trained["tests"]  # prompt and size are the run's
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
    assert code == 2 and "holds a run already" in err and err.count("\n") == 1
    code, _, err = command(
        monkeypatch, capsys, train, *arguments(replace(options, resume=True, lr=1e-4, epochs=3))
    )
    assert code == 2 and "--lr 0.001 -> 0.0001" in err and "--epochs 2 -> 3" in err
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
    "no steps": (lambda o, d: replace(o, max_steps=0), "--max-steps must be at least 1"),
    "fewer than no epochs": (lambda o, d: replace(o, epochs=-1), "--epochs must be at least 0"),
    "a test of nothing": (lambda o, d: replace(o, epochs=0), "--weights none: nothing was trained"),
    "a test of CLIP": (
        lambda o, d: replace(o, epochs=0, weights=None, variant=None),
        "--weights is missing: CLIP alone",
    ),
    "no milestones": (lambda o, d: replace(o, schedule="multistep"), "has no milestones"),
    "warm-up of a plateau": (
        lambda o, d: replace(o, schedule="plateau", warmup=0.2),
        "--warmup: does nothing here",
    ),
    "rank of nothing": (lambda o, d: replace(o, lora_rank=4), "--lora-rank: does nothing here"),
    "width of nothing": (
        lambda o, d: replace(o, adapter_dim=4),
        "--adapter-dim: does nothing here",
    ),
    "a text that is absent in none": (
        lambda o, d: replace(o, prompt="a polyp", negatives=0.2),
        "--negatives: of prompt types",
    ),
    "a study at another size": (
        lambda o, d: replace(o, prompt_study=True, score_size="network"),
        "--score-size network: --prompt-study",
    ),
    "batch of none": (lambda o, d: replace(o, batch_size=0), "--batch-size must be at least 1"),
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
    towers = {name for name in before if recipes.clip_towers(name)}
    assert towers and not moved & towers
    assert {name.split(".")[0] for name in moved} == {
        "backbone",
        "neck",
        "decoder",
        "proj",
    }  # connect is new


def test_accumulated_gradients_are_the_mean_of_their_batches(options, demo):
    settings = recipes.CRIS["default"]
    dataset = data.open_dataset(layouts.annotations(demo, "train"), options.cache)

    def step(count, freeze):
        torch.manual_seed(0)
        o, s = train.resolve(replace(options, batch_size=4, grad_accum_steps=count, clip_grad=0.0))
        s = replace(s, optimizer="adam", schedule="constant", warmup=0.0)
        model = recipes.load_cris("none", "mini", s, {"image_size": 64, "dropout": 0.0}, None)
        run = train.Run(o, s, model, recipes.cris_recipe(model, s), dataset, dataset)
        model.eval()  # batch statistics would differ
        seen = []
        run.optimizer.step = lambda: seen.append(
            [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
        items = data.Items(dataset, "p6", run.recipe.inputs, train=True, seed=0)
        batches = iter(
            data.loader(items, data.train_batches(len(dataset), 4, 1, 0, 0), 0, run.device)
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
        s = replace(recipes.CRIS["default"], **settings)
        return [protocol.lr_factor(step, 100, s) for step in range(101)]

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
    train.run(replace(options, lr=0.0, epochs=9, patience=2))
    dice = [float(row["val_dice"]) for row in rows(f"{options.out}/metrics.csv")]
    best = dice.index(max(dice))  # statistics of the norms still move, so it need not be the first
    assert len(dice) == best + 1 + 2 < 9
    assert f"since epoch {best + 1}" in capsys.readouterr().out


def test_texts_per_batch(demo):
    entries = layouts.annotations(demo, "train")
    part = [replace(entry, prompts={"p1": ["a"], "p2": ["b", "c"]}) for entry in entries[:10]]
    dataset = data.Dataset(part, np.zeros((10, 6), int), None)
    assert protocol.texts_per_batch(dataset, "p1", 16) == pytest.approx(1)
    assert protocol.texts_per_batch(dataset, "some text", 16) == pytest.approx(1)
    assert protocol.texts_per_batch(dataset, "p2", 2) == pytest.approx(1.5)
    assert protocol.texts_per_batch(dataset, "random", 1) == pytest.approx(1)
    three = 1 - 0.5**4 + 2 * (1 - 0.75**4)  # a half of all draws, b and c a quarter each
    assert protocol.texts_per_batch(dataset, "random", 4) == pytest.approx(three)


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
    assert summary["tests"]["demo:val"]["dice"]["n"] == len(layouts.annotations(demo, "val"))


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
        done = resolve(replace(asked, **more))[0]
        return done.group_regex, done.seed, done.fold

    assert found(test=["../data/flat"]) == ("case(.)", 3, "1/5")
    assert found(test=["data/flat:val"]) == ("case(.)", 3, "1/5")
    assert found(test=["data/other"]) == (None, 3, "1/5")
    assert found(data=["data/flat"], threshold="auto", seed=4) == ("case(.)", 4, "1/5")
    assert found(test=["data/flat"], group_regex="x", fold="0/2") == ("x", 3, "0/2")


def test_scores_are_written_before_what_may_fail(options, monkeypatch, capsys):
    def broken(*_):
        raise OSError("the drive went")

    monkeypatch.setattr(evaluate, "draw", broken)
    code, _, error = command(monkeypatch, capsys, train, *arguments(replace(options, epochs=1)))
    assert code == 2 and "the drive went" in error
    assert (train.Path(options.out) / "test/per_image.csv").stat().st_size > 1000
    assert not (train.Path(options.out) / "test/summary.json").exists()


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
    with report.whole_file(tmp_path / "x") as one, report.whole_file(tmp_path / "x") as other:
        assert one != other
        one.write_text("1"), other.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
