"""Files that this project writes and reads again: edited, cut, or of another version."""

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from safetensors.torch import load_file, save_file
from torch import nn

import cris
import data
import predict
import studies
import train
from engine import evaluate, feature_cache, lora
from engine.runs import EDITED, fits, read_run
from imaging import layouts, volumes
from recipes import FAMILIES, loading

# --- config.json ---------------------------------------------------------------------------------

RUN = {
    "format": 1,
    "model": "cris",
    "class": "CRIS",
    "config": {"num_classes": 3, "image_size": 64},
    "classes": ["background", "liver", "spleen"],
    "labels": [0, 1, 4],
    "recipe": "default",
    "options": {"prompt": "p6", "data": ["a"], "overlap": None, "seed": 0},
    "data": {"train": "", "val": ""},
    "masks": {"a": "> 127"},
    "versions": {"torch": "2.6"},
}
DAMAGE = {  # (keys, value): words of the message
    ("format", 2): "was written by a newer version (it has format 2)",
    ("format", "1"): "format is '1', expected 1",
    ("format", None): "format is None, expected 1",
    ("novelty", 1): "was written by a newer version (it has 'novelty')",
    ("model", 5): "model is 5, expected str",
    ("model", None): "model is None, expected str",
    ("config", ()): "config is [], expected dict",
    ("classes", "liver"): "classes is 'liver', expected list[str]",
    ("classes", ("liver",)): "labels do not number the 1 classes",
    ("labels", (0, 1, -4)): "labels is [0, 1, -4], expected numbers from 0 to 65535",
    ("labels", (0, 1)): "labels do not number the 3 classes",
    ("labels", (0, 1, True)): "labels is [0, 1, True], expected list[int]",
    ("options", None): "options is None, expected dict",
    ("options", "prompt", 6): "prompt is 6, expected str | None",
    ("options", "data", "a"): "data is 'a', expected list[str]",
    ("options", "overlap", 1.0): "overlap is 1.0, expected a share below 1",
    ("options", "overlap", -0.5): "overlap is -0.5, expected a share below 1",
    ("options", "overlap", "0.5"): "overlap is '0.5', expected float | None",
    ("options", "seed", -1): "seed is -1, expected 0 or more",
    ("options", "seed", True): "seed is True, expected int",
    ("options", "sam_prompts", "lines"): "sam_prompts is 'lines', expected one of",
    ("options", "mask_orientation", "left"): "mask_orientation is 'left', expected one of",
    ("options", "group_regex", "("): "group_regex is '(', expected",
    ("masks", "a", None): "masks is {'a': None}, expected dict[str, str]",
}


def changed(content: dict, keys: tuple, value) -> dict:
    """Return a copy of nested dicts with another value in one place."""
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = list(value) if isinstance(value, tuple) else value
    return content


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_config_is_one_line_with_the_file_and_the_way_out(damage, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RUN))
    assert read_run(tmp_path) == RUN
    *keys, value = damage
    file.write_text(json.dumps(changed(RUN, tuple(keys), value)))
    with pytest.raises(ValueError) as caught:
        read_run(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{file}: {DAMAGE[damage]}") and "\n" not in said
    assert EDITED in said or "use that version for it" in said


@pytest.mark.parametrize("key", sorted(RUN.keys() - {"format"}))
def test_older_runs_may_lack_keys(key, tmp_path):
    older = {name: value for name, value in RUN.items() if name != key}
    if key == "classes":
        del older["labels"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert read_run(tmp_path) == older


@pytest.mark.parametrize(
    "value, kind, is_fitting",
    [
        (1, int, True), (True, int, False), (1.0, int, False), (1, float, True),
        (float("nan"), float, False), (1, bool, False), (None, int | None, True),
        (None, int, False), ("auto", float | str | None, True), ([1, 2], list[int], True),
        ([1, "2"], list[int], False), (["a"], list[str] | None, True), ({"a": 1}, dict, True),
        ({"a": 1}, dict[str, str], False), ([{"a": "b"}], list[dict[str, str]], True),
    ],
)  # fmt: skip
def test_what_fits_an_annotation(value, kind, is_fitting):
    assert fits(value, kind) == is_fitting


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A finished run of one step, and the `train.Run` that made it."""
    runs = []
    fit = train.Run.fit

    def record(run):
        runs.append(run)
        fit(run)

    folder = tmp_path_factory.mktemp("trained")
    options = train.Options(
        variant="mini", weights="none", data=[str(demo)], out=str(folder / "run"), size=[64],
        cache=str(demo.parent / "cache"), epochs=1, max_steps=1, batch_size=4, workers=0,
        overlays=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "fit", record)
        train.run(options)
    return folder / "run", runs[0]


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


TO_RESUME = {  # what is in options: words of the message
    ("lr", "fast"): "lr is 'fast', expected float | None",
    ("schedule", "linear"): "--schedule linear: must be one of cosine",
    ("model", "unet"): "--model unet: must be one of",
    ("epochs", -1): "--epochs -1: must be a whole number of at least 0",
    ("size", 64): "size is 64, expected list[int] | None",
    ("novelty", 1): "was written by a newer version (it has 'novelty')",
    ("spacing", ()): "--spacing: takes 3 values, not 0",
    ("batch_size", 0): "--batch-size ",
}


@pytest.mark.parametrize("damage", TO_RESUME)
def test_damaged_options_are_not_resumed(damage, run_folder, monkeypatch, capsys):
    content = json.loads((run_folder / "config.json").read_text())
    content["options"][damage[0]] = damage[1]
    (run_folder / "config.json").write_text(json.dumps(content))
    code, _, err = command(monkeypatch, capsys, train, "--resume", "--out", run_folder)
    assert code == 2 and err.count("\n") == 1
    assert f"{run_folder / 'config.json'}: {TO_RESUME[damage]}" in err


def test_a_state_without_its_config_is_not_resumed(run_folder, monkeypatch, capsys, demo):
    (run_folder / "config.json").unlink()
    words = ["--resume", "--out", run_folder, "--data", demo]
    code, _, err = command(monkeypatch, capsys, train, *words)
    assert code == 2 and "last.pt: has no config.json of its run beside it" in err


def test_a_run_of_an_unknown_model_is_one_line(run_folder, demo, tmp_path, monkeypatch, capsys):
    content = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(content | {"model": "unet"}))
    for program, words in (predict, [demo]), (train, ["--data", demo, "--eval"]):
        words = [*words, "--weights", run_folder, "--out", tmp_path / "out"]
        code, _, err = command(monkeypatch, capsys, program, *words)
        assert code == 2 and err.count("\n") == 1 and "model that this version has" in err


MODEL = {  # what is in config: words of the message
    ("image_size", "64"): "image_size is '64', expected a value such as 416",
    ("image_size", -64): "image_size is -64, expected",
    ("threshold", None): "threshold is None, expected",
    ("layers", (1,)): "layers=(1,): the image encoder has four stages",
    ("heads", 5): "heads=5: must divide dim=64",
    ("mean", (0.5,)): "mean is [0.5], expected",
    ("std", (1, 1, "1")): "std is [1, 1, '1'], expected",
    ("dropout", float("nan")): "dropout is nan, expected",
    ("freeze_text_norm", 1): "freeze_text_norm is 1, expected",
    ("novelty", 1): "config.json is of a newer version (it has novelty)",
}


@pytest.mark.parametrize("damage", MODEL)
def test_a_model_refuses_a_damaged_config_in_one_line(damage, run_folder):
    content = json.loads((run_folder / "config.json").read_text())
    changed_content = changed(content, ("config", damage[0]), damage[1])
    (run_folder / "config.json").write_text(json.dumps(changed_content))
    with pytest.raises(ValueError) as caught:
        cris.CRIS.from_pretrained(run_folder)
    assert MODEL[damage] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["config", "class"])
def test_a_model_refuses_a_config_without_its_parts(key, run_folder):
    content = json.loads((run_folder / "config.json").read_text())
    del content[key]
    (run_folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="restore the file|holds None"):
        cris.CRIS.from_pretrained(run_folder)


def places(content, keys=()) -> list[tuple]:
    """Return the keys of every value in nested dicts and lists."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        found.append((*keys, key))
        if isinstance(value, dict | list):
            found += places(value, (*keys, key))
    return found


VALUES = [None, True, 0, -1, 7, 10**6, 0.5, "", "x", [], [1], ["a"], {}, {"a": 1}, float("nan")]


@pytest.mark.slow
@pytest.mark.parametrize("program", [train, predict])
def test_300_mutated_configs_are_no_traceback(program, run_folder, demo, monkeypatch, capsys):
    file = run_folder / "config.json"
    original = json.loads(file.read_text())
    every = places(original)
    rng = random.Random(0)
    monkeypatch.setattr(evaluate, "test", lambda *_: {})
    out = run_folder.parent / "masks"
    words = ["--resume", "--out", run_folder]
    if program is predict:
        words = [demo / "images/00001.png", "--prompt", "a", "--weights", run_folder, "--out", out]
    for _ in range(300):
        file.write_text(json.dumps(changed(original, rng.choice(every), rng.choice(VALUES))))
        code, _, err = command(monkeypatch, capsys, program, *words)
        assert code in (0, 2) and err.count("\n") == (code == 2), err
        shutil.rmtree(out, ignore_errors=True)


# --- last.pt and the weights ---------------------------------------------------------------------

STATES = {  # what becomes of last.pt: words of the message
    "a list": (lambda s: [1, 2], "holds a list, not the state of a run"),
    "empty": (lambda s: {}, "has no epoch"),
    "without its optimiser": (lambda s: s.pop("optimizer") and s, "has no optimizer"),
    "of a newer version": (lambda s: s | {"novelty": 1}, "was written by a newer version"),
    "epoch as text": (lambda s: s | {"epoch": "1"}, "epoch is '1'"),
    "step below 0": (lambda s: s | {"step": -1}, "step is -1"),
    "best is no number": (lambda s: s | {"best": None}, "best is None"),
    "history of numbers": (lambda s: s | {"history": [1]}, "history is [1]"),
    "chosen in part": (lambda s: s | {"chosen": {"epoch": 1}}, "chosen is {'epoch': 1}"),
    "too few steps": (lambda s: s | {"step": 0}, "stands at step 0 in epoch 2, which does not fit"),
    "a batch too far": (lambda s: s | {"batch": 10**6}, "batch 1000000 is none of this run"),
    "another model": (lambda s: s | {"model": {"x": torch.ones(1)}}, "is missing"),
    "weights of NaN": (lambda s: s | {"model": to_nan(s["model"])}, "holds NaN"),
    "another optimiser": (lambda s: s | {"optimizer": {}}, "does not fit this run"),
    "no random numbers": (lambda s: s | {"random": torch.ones(2)}, "does not fit this run"),
}


def to_nan(weights: dict) -> dict:
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    return weights | {name: torch.full_like(weights[name], float("nan"))}


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_state_is_one_line(kind, trained, run_folder, monkeypatch):
    change, words = STATES[kind]
    path = run_folder / "last.pt"
    run = trained[1]
    monkeypatch.setattr(run, "out", run_folder)
    state = torch.load(path, weights_only=True)
    run.load()
    torch.save(change(state), path)
    with pytest.raises(ValueError) as caught:
        run.load()
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and words in said and "\n" not in said
    assert said.endswith(("start again with another --out", "use that version for it"))


WEIGHTS = {  # what becomes of best.safetensors: words of the message
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
    "of another model": (lambda path: save_file({"x": torch.ones(1)}, path), "is missing"),
    "of NaN": (lambda path: save_file(to_nan(load_file(path)), path), "holds NaN"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damaged_best_weights_are_noticed_when_the_run_resumes(
    kind, trained, run_folder, monkeypatch
):
    change, words = WEIGHTS[kind]
    run = trained[1]
    monkeypatch.setattr(run, "out", run_folder)
    path = run_folder / "best.safetensors"
    change(path)
    with pytest.raises(ValueError) as caught:
        run.load()
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


PLACES = ["[]", "1", '{"x": 1}', '{"x": [0, null, null]}', '{"x": [1, null]}', "{", "[" * 9999]


@pytest.mark.parametrize("text", PLACES)
def test_an_adapter_that_does_not_say_where_it_belongs_is_one_line(text, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file({"a": torch.ones(1)}, path, {"lora": text})
    with pytest.raises(ValueError) as caught:
        lora.load_adapter(nn.Linear(2, 2), path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_an_adapter_of_a_huge_rank_takes_no_memory(tmp_path):
    path = tmp_path / "adapter.safetensors"
    name = "parametrizations.weight.0"
    save_file({"a": torch.ones(1)}, path, {"lora": json.dumps({name: [10**15, None, None]})})
    with pytest.raises(ValueError, match="of rank 1000000000000000"):
        lora.load_adapter(nn.Linear(2, 2), path)


# --- caches that change while they are used ------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1000])
def test_pixels_that_are_cut_while_a_run_reads_them_are_one_line(left, demo, tmp_path):
    dataset = data.open_dataset(layouts.read_entries(demo, "val"), tmp_path)
    image, _ = dataset.pixels(len(dataset) - 1)
    assert image.shape[2] == 3
    dataset.path.write_bytes(dataset.path.read_bytes()[:left])
    with pytest.raises(OSError, match=f"{dataset.path.name}: became shorter") as caught:
        dataset.pixels(len(dataset) - 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0, 60, 140])
def test_features_that_are_cut_while_a_run_reads_them_are_one_line(left, tmp_path):
    path = tmp_path / "x.npy"
    feature_cache.cache_rows(
        path, 3, lambda start: iter(torch.ones(3, 8)[start:]), "rows", "float32"
    )
    rows = feature_cache.CachedRows(path)
    assert rows[2].tolist() == [1] * 8
    path.write_bytes(path.read_bytes()[:left])
    for again in rows, feature_cache.CachedRows(path):
        with pytest.raises(OSError, match="x.npy: (row 2|the header) was damaged while"):
            again[2]


@pytest.mark.parametrize("ending", ["image.npy", "npz"])
@pytest.mark.parametrize("left", [0, 50])
def test_prepared_volumes_that_are_cut_before_they_are_opened_are_one_line(ending, left, tmp_path):
    path = tmp_path / f"x.{ending}"
    if ending == "npz":
        np.savez(path, offsets=np.zeros(3))
    else:
        np.save(path, np.zeros((1, 4, 4, 4), np.float32))
    path.write_bytes(path.read_bytes()[:left])
    dataset = object.__new__(volumes.VolumeSet)
    dataset.stems = [str(tmp_path / "x")]
    with pytest.raises(OSError, match=f"x.{ending}: was damaged while this run read it"):
        dataset._index(0) if ending == "npz" else volumes._map(path)


# --- studies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"a": 1, "a": 2}', "1"])
def test_a_damaged_study_is_one_line(text, tmp_path):
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="study.json: is not"):
        studies.same_options(path, {"text_codes": None}, "text_codes")


@pytest.mark.parametrize("text", ["[]", '{"training": {}}', '{"test": [{"image": 1}]}', "{"])
def test_a_damaged_list_of_volumes_of_a_study_is_one_line(text, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="dataset.json: is not"):
        studies.read_listing(path, tmp_path)


TABLES = {
    "missing": None,
    "cut": "name,class,group,in_truth,in_pred,dice\na,liver,,True",
    "other columns": "a,b\n1,2\n",
    "no number": "name,class,group,in_truth,in_pred,dice\na,liver,,True,True,good\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_of_a_study_is_one_line(kind, tmp_path):
    path = tmp_path / "test/per_image.csv"
    if TABLES[kind] is not None:
        path.parent.mkdir()
        path.write_text(TABLES[kind])
    with pytest.raises(ValueError) as caught:
        studies.read_table(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: is damaged (") and "\n" not in said
    assert f"remove {path.parent}" in said


# --- a config.json that describes no model -------------------------------------------------------

NO_MODEL = {  # what is in config: words of the message
    ("dropout", 7.0): "dropout probability has to be between 0 and 1",
    ("heads", 0): "heads=0: must divide dim=64",
    ("layers", ()): "layers=(): the image encoder has four stages",
    ("pixels", "x"): "pixels='x': choose letterbox",
}


@pytest.mark.parametrize("has_best", [True, False])
@pytest.mark.parametrize("damage", NO_MODEL)
def test_a_config_that_describes_no_model_is_one_line(damage, has_best, run_folder):
    file = run_folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(changed(content, ("config", damage[0]), damage[1])))
    if not has_best:
        (run_folder / "best.safetensors").unlink()
    family = FAMILIES["cris"]
    with pytest.raises(ValueError) as caught:
        loading.load_model(family, run_folder, None, family.protocols["default"], {}, None)
    said = str(caught.value)
    assert said.startswith(f"{file}: does not describe a model (") and "\n" not in said
    assert NO_MODEL[damage] in said and said.endswith(EDITED)


def test_other_weights_than_the_config_describes_name_the_run(run_folder):
    """Even if the last weights are read, which are in no file of their own."""
    file = run_folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(changed(content, ("config", "ffn_dim"), 64)))
    (run_folder / "best.safetensors").unlink()
    family = FAMILIES["cris"]
    with pytest.raises(ValueError, match=f"^{run_folder}: .*ffn"):
        loading.load_model(family, run_folder, None, family.protocols["default"], {}, None)


def test_a_lack_of_memory_is_no_fault_of_the_config(run_folder, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cris.CRIS, "__init__", fail)
    family = FAMILIES["cris"]
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_model(family, run_folder, None, family.protocols["default"], {}, None)


def test_a_lack_of_memory_is_no_fault_of_the_state_to_resume_from(trained, run_folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    run = trained[1]
    monkeypatch.setattr(run, "out", run_folder)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="allocate memory"):
        patch.setattr(run, "load_parts", fail)
        run.load()

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        run.load()
    with pytest.raises(RuntimeError, match="allocate memory"):
        loading.last_weights(run_folder, FAMILIES["cris"])


def test_a_run_with_more_images_than_it_started_with_is_one_line(
    options, demo, tmp_path, monkeypatch, capsys
):
    root = Path(shutil.copytree(demo, tmp_path / "data"))
    entries = json.loads((root / "anns/train.json").read_text())
    (root / "anns/train.json").write_text(json.dumps(entries[:16]))
    run = replace(options, model="segformer", data=[str(root)], size=[32], overlays=0)
    monkeypatch.setattr(evaluate, "test", lambda *_: {})
    train.run(run)
    (root / "anns/train.json").write_text(json.dumps(entries))
    code, _, err = command(monkeypatch, capsys, train, "--resume", "--out", options.out)
    assert code == 2 and err.count("\n") == 1
    assert f"{options.out}/last.pt: stands at step 2 in epoch 3, which does not fit" in err
