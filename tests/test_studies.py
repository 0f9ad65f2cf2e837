"""studies.py: data sets, draws, options of runs, numbers, resuming, refusals; one real study."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, rows
from safetensors.torch import save_file

import metrics
import studies
import train
from engine import evaluate, tables
from imaging import atomic_files, layouts, nifti

NAMES = ["spleen", "right kidney", "liver"]  # label numbers 1, 2, 3
LACKS = {1, 4}  # cases without a spleen, of the training split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Nine tiny volumes: six train, one validates, two test; those of LACKS have no spleen."""
    root = tmp_path_factory.mktemp("studies") / "Abdomen"
    lists = {"training": range(6), "validation": [6], "test": [7, 8]}
    for k in range(9):
        mask = np.zeros((4, 4, 4), np.uint8)
        mask[0, 0, :3] = NAMES.index("spleen") + (k not in LACKS), 2, 3
        for kind, array in (("imagesTr", np.full((4, 4, 4), k, np.int16)), ("labelsTr", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / kind / f"ct{k}.nii.gz")
    listed = {
        key: [{"image": f"imagesTr/ct{k}.nii.gz", "label": f"labelsTr/ct{k}.nii.gz"} for k in n]
        for key, n in lists.items()
    }
    labels = {"background": 0, "Spleen": 1, "Right_Kidney": 2, "liver": 3}
    about = {"labels": labels, "channel_names": {"0": "CT"}}
    (root / "dataset.json").write_text(json.dumps(about | listed))
    save_file({name: torch.randn(512) for name in NAMES}, root / "codes.safetensors")
    return root


def from_elsewhere(root, folder) -> dict:
    """The dataset.json of `root`, as it is to be in another folder, which links to the files."""
    folder.mkdir()
    (folder / "files").symlink_to(root)
    about = json.loads((root / "dataset.json").read_text())
    for pair in (pair for key in ("training", "validation", "test") for pair in about[key]):
        pair |= {kind: f"files/{path}" for kind, path in pair.items()}
    return about


def score(method, k, draw, name, case):
    """The Dice that a faked run has: new classes learn with K, a draw later is 0.1 worse."""
    level = {"text": 0.5, "text+mlp": 0.48, "random": 0.3, "random+mlp": 0.2, "plain": 0.1}[method]
    if name == "spleen":
        return level + 0.05 * k - 0.1 * ((draw or 1) - 1) + (0.02 if case == "ct8" else 0)
    return 0.8 - 0.03 * k + (0.1 if name == "liver" else 0)


def fake(done):
    """A train.run that only writes what a test does, and keeps the options it was given."""

    def run(options):
        method, name = Path(options.out).parts[-2:]
        k, draw = None, None
        if name != "base":
            k, draw = int(name[1]), int(name[-1]) if "draw" in name else None
        done[f"{method}/{name}"] = options
        print("these words are for the log alone")
        (test,) = options.test or options.data
        (entries,) = (layouts.read_volumes(test)["test"],)
        classes = layouts.as_regions(entries[0]).classes[1:]
        found = []
        for entry in entries:
            row = {"test": "x", "dataset": "x", "name": entry.name, "group": None, "prompt": ""}
            for c in classes:
                dice = score(method, k or 0, draw, c, entry.name)
                if c == "right kidney" and entry.name == "ct7":  # neither there nor found
                    found.append(
                        row | {"class": c, "dice": 1.0, "in_truth": False, "in_pred": False}
                    )
                    continue
                found.append(
                    row | {"class": c, "dice": dice, "in_truth": True, "in_pred": dice > 0.4}
                )
            found.append(row | {"class": "background", "tp": 3})
        tables.write_csv(Path(options.out) / "test" / "per_image.csv", found)
        (Path(options.out) / "last.pt").write_text("")
        tables.write_json(Path(options.out) / "test" / "summary.json", {})

    return run


@pytest.fixture
def study(monkeypatch, capsys, root, tmp_path):
    """Runs the command with faked runs: (status, what it prints, its complaint, options by run)."""

    def run(*arguments, out=tmp_path / "few", text=True):
        done, codes = {}, ["--text-codes", root / "codes.safetensors"] * text
        monkeypatch.setattr(train, "run", fake(done))
        given = [
            "few-shot",
            "--data",
            root,
            "--out",
            out,
            "--steps",
            5,
            "--weights",
            "none",
            *codes,
        ]
        given += arguments
        if "--new-class" not in arguments:
            given += ["--new-class", "SPLEEN"]
        return *command(monkeypatch, capsys, studies, *given), done

    run.out = tmp_path / "few"
    return run


SMALL = ["--k", 1, 2, "--draws", 2]
TRAINED = ["--variant", "mini", "--weights", "none", "--size", 64, 32, 32, "--lr", "1e-3"]


# --- runs ----------------------------------------------------------------------------------------


def cases(data, split="train"):
    return [entry.name for entry in layouts.read_volumes(data)[split]]


def test_the_base_knows_nothing_of_the_new_class(study):
    assert study(*SMALL)[0] == 0
    found = layouts.read_volumes(study.out / "data" / "base")
    assert {split: len(entries) for split, entries in found.items()} == {
        "train": 6,
        "val": 1,
        "test": 2,
    }
    entry = found["train"][0]
    assert entry.classes == ("background", "right kidney", "liver") and entry.modality == "CT"
    truth = nifti.read_labels(
        entry.mask, nifti.read_grid(entry.image), entry.labels, entry.background_numbers
    )
    assert truth[0, 0, :3].tolist() == [0, 1, 2] and entry.regions == ((1,), (2,))


def test_few_shot_sets_hold_k_volumes_with_the_new_class_alone(study):
    assert study("--k", 2, "--draws", 1, "--steps", 5)[0] == 0
    data = study.out / "data" / "k2-draw1"
    found = layouts.read_volumes(data)
    count = Counter(entry.name for entry in found["train"])
    assert sorted(count.values()) == [2, 3]  # five steps
    assert not {f"ct{k}" for k in LACKS} & {*count} and {e.name for e in found["val"]} <= {*count}
    assert cases(data, "test") == ["ct7", "ct8"]
    entry = found["train"][0]
    assert entry.classes == ("background", "spleen")
    truth = nifti.read_labels(
        entry.mask, nifti.read_grid(entry.image), entry.labels, entry.background_numbers
    )
    assert truth[0, 0, :3].tolist() == [1, 0, 0]


def test_files_of_several_channels_stay_together(study, root, tmp_path):
    """nnU-Net's CASE_0000 and CASE_0001, without lists in dataset.json."""
    data = tmp_path / "channels"
    for kind, cases_of in (("Tr", range(3)), ("Ts", [7])):
        for place in (f"images{kind}", f"labels{kind}"):
            (data / place).mkdir(parents=True)
        for k in cases_of:
            for channel in (0, 1):
                image = data / f"images{kind}" / f"ct{k}_000{channel}.nii.gz"
                image.write_bytes((root / "imagesTr" / f"ct{k}.nii.gz").read_bytes())
            label = (root / "labelsTr" / f"ct{k}.nii.gz").read_bytes()
            (data / f"labels{kind}" / f"ct{k}.nii.gz").write_bytes(label)
    labels = {"background": 0, "spleen": 1, "kidney": 2, "liver": 3}
    about = {"labels": labels, "channel_names": {"0": "T1", "1": "T2"}}
    (data / "dataset.json").write_text(json.dumps(about))
    code, _, error, _ = study("--data", data, "--k", 2, "--draws", 1, "--methods", "plain")
    assert code == 0, error
    for name in ("base", "k2-draw1"):
        for entries in layouts.read_volumes(study.out / "data" / name).values():
            for entry in entries:
                ends = [path.name.split("_")[1] for path in (entry.image, *entry.more_channels)]
                assert ends == ["0000.nii.gz", "0001.nii.gz"] and entry.modality == "T1, T2"


def test_draws_are_nested_the_same_for_all_methods_and_for_other_k(study, tmp_path):
    _, _, _, done = study("--k", 1, 3, 4, "--draws", 3)
    chosen = {name: {*cases(o.data[0])} for name, o in done.items() if o.data}
    sets = {}
    for name, some in chosen.items():
        sets.setdefault(name.split("/")[1], []).append(some)
    assert all(len(same) == 5 and all(s == same[0] for s in same) for same in sets.values())
    for draw in (1, 2, 3):
        one, three, four = (sets[f"k{k}-draw{draw}"][0] for k in (1, 3, 4))
        assert one < three < four and len(one) == 1 and len(three) == 3
        assert four == {"ct0", "ct2", "ct3", "ct5"}  # all there are
    assert len({tuple(sets[f"k3-draw{draw}"][0]) for draw in (1, 2, 3)}) > 1
    study("--k", 1, "--draws", 2, out=tmp_path / "other")  # without the larger K
    assert {*cases(tmp_path / "other" / "data" / "k1-draw2")} == sets["k1-draw2"][0]


def test_what_each_run_is_told(study, root):
    _, _, _, done = study(*SMALL, *TRAINED, "--train", "decoder", "--base-epochs", 7, "--seed", 3)
    assert len(done) == 5 * (1 + 2 * 2) + 2  # bases, K by draws, K = 0 of text and text+mlp
    kinds = {name.split("/")[0]: (o.model, o.codes) for name, o in done.items()}
    assert kinds == {
        "text": ("universal", "text"), "text+mlp": ("fewshot3d", "text"),
        "plain": ("swin_unetr3d", None),
        "random": ("universal", "random"), "random+mlp": ("fewshot3d", "random"),
    }  # fmt: skip
    base, few, zero = done["text/base"], done["text/k2-draw2"], done["text/k0"]
    assert (base.weights, base.variant, base.epochs, base.train) == ("none", "mini", 7, None)
    assert (few.weights, few.variant, few.epochs, few.train) == (base.out, None, 1, "decoder")
    assert base.data == [str(study.out / "data" / "base")] and not base.test and base.seed == 3
    assert few.data == [str(study.out / "data" / "k2-draw2")] and few.test == [str(root)]
    assert few.seed == 5 and few.text_codes == str(root / "codes.safetensors")
    assert (zero.eval, zero.weights, zero.test, zero.data) == (True, base.out, [str(root)], [])
    plain = done["plain/k2-draw2"]
    assert (plain.test, plain.text_codes, plain.weights) == ([], None, done["plain/base"].out)
    for options in done.values():
        assert options.lr == options.backbone_lr == 1e-3 and options.size == [64, 32, 32]
        assert options.resume and options.batch_size == 1


def test_other_bases_may_start_from_that_of_plain(study):
    extra = ["--from-plain", 2, "--base-epochs", 9, "--base-lr", 0.1, "--train", "decoder"]
    extra += ["--methods", "random", "random+mlp"]
    _, _, error, done = study(*SMALL, *TRAINED, *extra, text=False)
    assert not error
    plain = done["plain/base"]
    assert next(iter(done)) == "plain/base" and (plain.epochs, plain.train) == (9, None)
    assert plain.lr == plain.backbone_lr == 0.1 and plain.weights == "none"
    for method in ("random", "random+mlp"):
        base = done[f"{method}/base"]
        assert (base.weights, base.epochs, base.train) == (plain.out, 2, "decoder")
        assert base.variant is None and base.lr == base.backbone_lr == 1e-3
        assert done[f"{method}/k1-draw2"].weights == base.out
    assert len(done) == 1 + 2 * 5


# --- numbers -------------------------------------------------------------------------------------


def test_tables_by_hand(study):
    code, out, _, _ = study(*SMALL, "--methods", "text", "plain")
    assert code == 0 and "these words" not in out and "run 1 of 11: text, base" in out
    assert "run 11 of 11: plain, K 2, draw 2" in out
    text = (study.out / "table.md").read_text()
    assert text.strip() in out
    lines = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    new, seen = ({line[0]: line[1:] for line in some} for some in (lines[2:4], lines[6:8]))
    # K = 1: of ct7 0.55 and 0.45 in the draws, of ct8 0.02 more
    assert [x.split(" ")[0] for x in new["text"]] == ["0.510", "0.510", "0.560"]
    assert [x.split(" ")[0] for x in new["plain"]] == ["–", "0.110", "0.160"]
    # kidney 0.8 in ct8 alone, liver 0.9 in both
    assert [x.split(" ")[0] for x in seen["text"]] == ["0.850", "0.820", "0.790"]
    assert seen["text"][1] == "0.820 (-0.030 [-0.030, -0.030])" and seen["plain"][1:] == ["–", "–"]
    assert "At K = 2 text has the highest mean. Intervals below its own: plain." in text
    assert "2 test cases tell little" in text and (study.out / "few_shot.png").stat().st_size > 5000


def test_results_have_a_row_a_class_and_case(study):
    study(*SMALL, "--methods", "text", "plain")
    found = rows(study.out / "results.csv")
    assert Counter(row["method"] for row in found) == {
        "text": 3 + 5 + 4 * 5,  # of the base, of K = 0, of four runs; ct7 has no right kidney
        "plain": 3 + 4 * 2,
    }
    one = [
        row for row in found if row["method"] == "text" and row["k"] == "2" and row["draw"] == "2"
    ]
    assert {row["phase"] for row in one} == {"after"}
    dice = {(row["class"], row["case"]): float(row["dice"]) for row in one}
    assert dice["spleen", "ct8"] == pytest.approx(0.5 + 0.1 - 0.1 + 0.02)


def test_seen_classes_before_are_counted_once(study):
    """The text methods' runs of K = 0 score the seen classes a second time."""
    study(*SMALL, "--methods", "text")
    found = [row for row in rows(study.out / "results.csv") if row["k"] == "0"]
    summary = Counter((row["class"], row["case"]) for row in found if row["class"] != "spleen")
    assert set(summary.values()) == {2}  # and their mean is taken, they agree


def test_several_volumes_of_a_patient_are_one_case():
    study = SimpleNamespace(draws=2)
    dice = {("a1", "a"): (0.2, 0.4), ("a2", "a"): (0.6, 0.8), ("b1", "b"): (0.5, 0.7)}
    made = [
        {"method": "text", "k": 2, "draw": d, "class": "liver", "case": case, "patient": patient,
         "dice": dice[case, patient][d - 1]}
        for d in (1, 2) for case, patient in dice
    ]  # fmt: skip
    x = studies.dice_array(study, made, "text", 2, ["liver"])
    np.testing.assert_allclose(x[..., 0], [[0.4, 0.5], [0.6, 0.7]])


def test_intervals_of_one_draw_are_those_of_the_metrics():
    x = np.random.default_rng(1).random((1, 12, 1))
    theirs = metrics.mean_ci(x[0, :, 0], resamples=20000)
    ours = studies.estimate(x, resamples=20000)
    assert ours["mean"] == pytest.approx(theirs["mean"]) and ours["n"] == 12
    assert ours["low"] == pytest.approx(theirs["low"], abs=0.01)
    assert ours["high"] == pytest.approx(theirs["high"], abs=0.01)


def test_intervals_take_draws_and_cases_anew(monkeypatch):
    """Against the same thing in loops, with values that are not known.

    Plain percentiles are compared, since those of 5 draws are nearly the extremes.
    """
    monkeypatch.setattr(metrics, "interval_percentiles", lambda n: (2.5, 97.5))
    rng = np.random.default_rng(2)
    x = rng.random((5, 8, 2)) + rng.random((5, 1, 1))
    x[:, 1, 0] = x[0, 2, 1] = np.nan
    before = rng.random((1, 8, 2))
    means, changes = [], []
    for _ in range(10000):
        d, n = rng.integers(5, size=5), rng.integers(8, size=8)
        some, old = x[d][:, n], before[:, n]
        means.append(np.nanmean(some, (0, 1)).mean())
        changes.append(means[-1] - old.mean((0, 1)).mean())
    for old, expected in (None, means), (before, changes):
        found = studies.estimate(x, old, resamples=10000)
        low, high = np.percentile(expected, [2.5, 97.5])
        assert abs(found["low"] - low) < 0.02 and abs(found["high"] - high) < 0.02
    assert studies.estimate(x)["mean"] == pytest.approx(np.nanmean(x, (0, 1)).mean())
    assert studies.estimate(x)["n"] == 40
    pooled = metrics.mean_ci(x[:, :, 1].ravel())  # as if these were forty cases
    own = studies.estimate(x[:, :, 1:])
    assert own["high"] - own["low"] > pooled["high"] - pooled["low"]
    assert studies.estimate(x * np.nan) is None


@pytest.mark.parametrize(
    "draws, cases, independent", [(1, 12, 12), (5, 12, 5), (5, 3, 3), (2, 50, 2)]
)
def test_intervals_are_expanded_for_the_fewest(draws, cases, independent, monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, "interval_percentiles", lambda n: asked.append(n) or (2.5, 97.5))
    x = np.random.default_rng(3).random((draws, cases + 1, 2))
    x[:, -1] = np.nan  # a case that does not count
    studies.estimate(x)
    assert asked == [independent]


def test_one_case_has_no_interval():
    x = np.random.default_rng(4).random((3, 1, 1))
    one = studies.estimate(x)
    assert one["mean"] == pytest.approx(x.mean()) and np.isnan([one["low"], one["high"]]).all()
    assert studies.cell(one) == f"{x.mean():.3f} [no interval]"
    change = studies.estimate(x, x[:1])
    assert np.isnan(change["low"]) and studies.cell(change, "+").endswith("[no interval]")

    worse = one | {"mean": one["mean"] - 0.1}
    summary = {"b": {"new": {4: worse}}, "a": {"new": {4: one}}}
    text = studies.sentences(summary, 1)
    assert "no difference between methods is shown" in text and "below its own" not in text


@pytest.mark.parametrize("gap, said", [(0.0, "no difference shown: b"), (0.5, "below its own: b")])
def test_what_is_said_comes_from_the_intervals(gap, said):
    a = {"mean": 0.8, "low": 0.7, "high": 0.9}
    b = {key: value - 0.05 - gap for key, value in a.items()}
    summary = {"b": {"new": {0: None, 4: b}}, "a": {"new": {0: None, 4: a}}}
    text = studies.sentences(summary, 60)
    assert "At K = 4 a has the highest mean" in text and said in text and "tell little" not in text
    assert "expanded percentile bootstrap" in text and "in no interval" in text


# --- going on ------------------------------------------------------------------------------------


def test_goes_on_where_it_was_stopped(study, monkeypatch):
    options = [*SMALL, "--methods", "random", "plain"]
    _, out, _, first = study(*options)
    table = (study.out / "table.md").read_text()
    assert len(first) == 10 and not [*study.out.rglob("last.pt")]
    code, out, _, done = study(*options)
    assert code == 0 and not done and "10 of 10 runs are done already" in out
    assert (study.out / "table.md").read_text() == table
    (study.out / "plain" / "k1-draw2" / "test" / "summary.json").unlink()
    _, out, _, done = study(*options, "--workers", 0)
    assert [*done] == ["plain/k1-draw2"] and "run 8 of 10: plain, K 1, draw 2" in out
    assert done["plain/k1-draw2"].resume


def test_more_may_be_added(study):
    study("--k", 1, "--draws", 1, "--methods", "random", text=False)
    _, _, _, done = study("--k", 1, 2, "--draws", 2, "--methods", "random", text=False)
    assert [*done] == ["random/k2-draw1", "random/k1-draw2", "random/k2-draw2"]
    _, _, _, done = study("--k", 1, "--draws", 1, "--methods", "random", "text")
    assert [*done] == ["text/base", "text/k0", "text/k1-draw1"]
    _, _, _, done = study("--k", 1, "--draws", 1, "--methods", "plain", text=False)
    assert [*done] == ["plain/base", "plain/k1-draw1"]


def test_other_options_are_refused(study):
    study(*SMALL, "--methods", "plain", "--lr", "1e-3")
    for other, said in (
        (["--lr", "1e-4"], "--lr 0.001 -> 0.0001"),
        ([], "--lr 0.001 -> None"),
        (["--lr", "1e-3", "--steps", 6], "--steps 5 -> 6"),
        (["--lr", "1e-3", "--new-class", "liver"], "--new-class spleen -> liver"),
        (["--lr", "1e-3", "--spacing", 2, 2, 2], "--spacing None -> [2.0, 2.0, 2.0]"),
    ):
        code, _, error, done = study(*SMALL, "--methods", "plain", *other)
        assert code == 2 and said in error and error.count("\n") == 1 and not done


def test_a_run_counts_as_done_once_all_is_written(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError("no space left")

    monkeypatch.setattr(evaluate, "write_csv", full)
    model = SimpleNamespace(config=SimpleNamespace(threshold=0.5))
    with pytest.raises(OSError):
        evaluate.write_summary(tmp_path, model, train.Options(), {}, {"image": [{"dice": 1}]})
    assert not (tmp_path / "summary.json").exists()


def test_a_refused_call_leaves_its_folder_free(study):
    for wrong in (["--size", 30], ["--variant", "huge"]):
        assert study("--k", 1, "--draws", 1, *wrong)[0] == 2
    assert study("--k", 1, "--draws", 1, "--size", 64)[0] == 0


def test_other_volumes_or_codes_are_refused(study, root, tmp_path):
    """What a finished run was made of is not what its neighbours would be."""
    about = from_elsewhere(root, tmp_path / "set")
    about.pop("channel_names")
    path, codes = tmp_path / "set" / "dataset.json", tmp_path / "codes.safetensors"
    path.write_text(json.dumps(about))
    codes.write_bytes((root / "codes.safetensors").read_bytes())
    given = ["--data", path.parent, "--k", 1, "--draws", 1, "--methods", "text"]
    given += ["--text-codes", codes]
    assert study(*given, text=False)[0] == 0
    code, out, _, done = study(*given, text=False)
    assert code == 0 and not done and "3 of 3 runs are done already" in out
    assert layouts.read_volumes(study.out / "data" / "base")["train"][0].modality is None
    more = ["--methods", "plain"]  # which reads none of the codes
    assert study(*given, *more, text=False)[0] == 0
    path.write_text(json.dumps(about | {"training": about["training"][1:]}))
    code, _, error, done = study(*given, text=False)
    assert code == 2 and not done and "holds other volumes than" in error
    path.write_text(json.dumps(about))
    save_file({name: torch.randn(512) for name in NAMES}, codes)
    code, _, error, done = study(*given, text=False)
    assert code == 2 and not done and "started with different options (--text-codes" in error


def test_cases_are_the_same_whatever_a_set_calls_them(study, root, tmp_path):
    """case1/label.nii.gz, case2/label.nii.gz: a study's data sets name them by other folders."""
    about, n = json.loads((root / "dataset.json").read_text()), 0
    for key in ("training", "validation", "test"):
        for pair in about[key]:
            folder, n = tmp_path / "set" / f"case{n}", n + 1
            folder.mkdir(parents=True)
            for kind, path in pair.items():
                (folder / f"{kind}.nii.gz").write_bytes((root / path).read_bytes())
                pair[kind] = f"case{n - 1}/{kind}.nii.gz"
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(about))
    assert study("--data", tmp_path / "set", *SMALL)[0] == 0
    found = rows(study.out / "results.csv")
    assert {row["case"] for row in found} == {"case7/label", "case8/label"}
    assert "mean over 2 draws and 2 test cases" in (study.out / "table.md").read_text()


def test_a_study_that_lists_absolute_paths_goes_on(study, root, tmp_path):
    """Older studies listed the volumes by absolute paths; names go through a link now."""
    given = ["--k", 1, "--draws", 1, "--methods", "plain"]
    assert study(*given)[0] == 0
    for path in (study.out / "data").glob("*/dataset.json"):
        content = json.loads(path.read_text())
        for case in content["training"] + content["validation"] + content["test"]:
            assert all(name.startswith("source/") for name in case.values())
            case |= {kind: str(root / name.removeprefix("source/")) for kind, name in case.items()}
        path.write_text(json.dumps(content))
        path.with_name("source").unlink()

    code, out, error, done = study(*given)
    assert code == 0 and not done and "are done already" in out, error
    (entry, *_) = layouts.read_entries(study.out / "data" / "base", "train")
    assert entry.image.resolve() == root / "imagesTr/ct0.nii.gz"

    # The same names below another folder are other volumes.
    for link in (study.out / "data").glob("*/source"):
        link.unlink()
        link.symlink_to(tmp_path)
    code, _, error, done = study(*given)
    assert code == 2 and not done and "holds other volumes than" in error


def test_a_process_that_is_killed_is_one_line(study, monkeypatch):
    class Killed(studies.InThisProcess):
        def submit(self, function, *arguments):
            future = studies.Future()
            future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda *_: Killed())
    code, _, error, _ = study("--k", 1, "--draws", 1, "--methods", "plain", "--jobs", 2)
    assert code == 2 and error.endswith(
        "error: the process of a run was killed, perhaps because memory ran out: use fewer --jobs; "
        "finished runs are kept\n"
    )


def test_a_run_that_fails_says_which(study, monkeypatch, capsys, root):
    def broken(options):
        raise ValueError("no such thing")

    study("--k", 1, "--draws", 1, "--methods", "plain")
    (study.out / "plain" / "base" / "test" / "summary.json").unlink()
    monkeypatch.setattr(train, "run", broken)
    given = ["few-shot", "--data", root, "--out", study.out, "--steps", 5, "--k", 1, "--draws", 1]
    given += ["--methods", "plain", "--new-class", "spleen", "--weights", "none"]
    code, _, error = command(monkeypatch, capsys, studies, *given)
    assert code == 2 and "plain, base failed\n" in error  # it left no log
    assert error.endswith("error: no such thing\n")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--new-class", "pancreas"], "Abdomen has spleen, right kidney, liver"),
        (["--k", 1, 5], "only 4 volumes of its training split have spleen"),
        (["--k", 0, 1], "--k 0: must be a whole number of at least 1"),
        (["--draws", 0], "--draws 0: must be a whole number of at least 1"),
        (["--base-epochs", 0], "--base-epochs 0: must be"),
        (["--from-plain", 0], "--from-plain 0: must be"),
        (["--jobs", 0], "--jobs 0: must be a whole number of at least 1"),
        (["--epochs", 3], "--epochs: the study sets this itself"),
        (["--model", "cris"], "--model: the study sets this itself"),
        (["--backbone-lr", "1e-5"], "--backbone-lr: the study sets this itself"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--k", 2, "--variant", "huge", "--weights", "none"], "--variant huge"),
        (["--k", 2, "--size", 30], "multiples of 32"),
    ],
)
def test_refused_in_one_line(study, arguments, said):
    code, _, error, done = study(*arguments)
    assert code == 2 and said in error and error.count("\n") == 1 and not done


def test_weights_must_be_told(monkeypatch, capsys, root, tmp_path):
    """Those of the recipes were trained with the new class."""
    given = ["few-shot", "--data", root, "--out", tmp_path / "out", "--new-class", "spleen"]
    code, _, error = command(monkeypatch, capsys, studies, *given, "--k", 1, "--methods", "random")
    assert code == 2 and "--weights is missing: none, or those of a Swin UNETR that" in error


def test_a_plain_head_for_one_class_would_be_the_old_one(study, root, tmp_path):
    about = from_elsewhere(root, tmp_path / "two")
    about["labels"] = {"background": [0, 3], "spleen": 1, "kidney": 2}
    (tmp_path / "two" / "dataset.json").write_text(json.dumps(about))
    given = ["--data", tmp_path / "two", "--k", 1, "--draws", 1, "--methods", "random"]
    code, _, error, done = study(*given, "plain", text=False)
    assert (
        code == 2 and not done and "--methods plain: would go on with its head for kidney" in error
    )
    assert study(*given, "random", text=False)[0] == 0


def test_text_methods_need_their_codes(study, tmp_path):
    code, _, error, done = study(text=False)
    assert code == 2 and not done and error.count("\n") == 1
    assert (
        "text and text+mlp need it; prepare.py text-codes makes it; or use --methods random plain"
        in error
    )
    save_file({"liver": torch.randn(512), "spleen": torch.randn(512)}, tmp_path / "few.safetensors")
    code, _, error, done = study("--text-codes", tmp_path / "few.safetensors", text=False)
    assert code == 2 and not done and "few.safetensors: has no code of right kidney" in error


def test_a_data_set_without_a_test_split_or_without_the_class_in_it(study, root, tmp_path):
    for name, test, said in (
        ("none", [], "has no split test"),
        (
            "lacking",
            LACKS,
            "no volume of its test split has spleen",
        ),
    ):
        about = from_elsewhere(root, tmp_path / name)
        about["test"] = [about["training"][k] for k in test]
        (tmp_path / name / "dataset.json").write_text(json.dumps(about))
        code, _, error, done = study("--data", tmp_path / name, "--k", 1)
        assert code == 2 and said in error and error.count("\n") == 1 and not done


# --- a real one ----------------------------------------------------------------------------------


def test_two_at_a_time_and_none_before_its_base(monkeypatch, tmp_path):
    """Threads in place of processes; which of them are at work at the same time?"""
    at_work, most, order, lock = [], [], [], threading.Lock()

    def run(options):
        with lock:
            at_work.append(options.out)
            most.append(len(at_work))
        time.sleep(0.02)
        with lock:
            at_work.remove(options.out)
            order.append(options.out)
        folder = Path(options.out) / "test"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")

    def made(name, weights="none"):
        options = train.Options(out=str(tmp_path / name), weights=weights)
        return studies.StudyRun("random", None, None, options)

    base = str(tmp_path / "base")
    runs = [made("base"), *(made(str(k), base) for k in range(4)), made("other")]
    pool = lambda jobs, *_: ThreadPoolExecutor(jobs)  # noqa: E731
    monkeypatch.setattr(studies, "ProcessPoolExecutor", pool)
    threads = {}

    def run_one(made, n):
        threads[Path(made.options.out).name] = n
        run(made.options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(studies, "run_one", run_one)
    studies.run_all(runs, 2)
    assert sorted(order) == sorted(run.options.out for run in runs)
    assert max(most) == 2 and {*order[:2]} == {base, str(tmp_path / "other")}
    assert {*threads.values()} == {2}
    studies.run_all(
        [made("alone"), *(made(f"then{k}", str(tmp_path / "alone")) for k in (1, 2))], 2
    )
    assert [threads[name] for name in ("alone", "then1", "then2")] == [4, 2, 2]


@pytest.mark.slow
def test_a_small_study_from_end_to_end(monkeypatch, capsys, tmp_path):
    import prepare

    made = ["demo-volumes", "--out", tmp_path / "data", "--volumes", 8]
    assert command(monkeypatch, capsys, prepare, *made)[0] == 0
    organs = "spleen", "right kidney", "left kidney", "liver", "aorta"
    save_file({name: torch.randn(512) for name in organs}, tmp_path / "codes.safetensors")
    given = ["few-shot", "--data", tmp_path / "data", "--new-class", "Liver", "--k", 1, 2]
    given += ["--draws", 1, "--steps", 4, "--base-epochs", 1, *TRAINED, "--spacing", 4, 7, 8]
    given += ["--text-codes", tmp_path / "codes.safetensors", "--out", tmp_path / "out"]
    given += ["--workers", 0, "--overlays", 0, "--overlap", 0, "--crops-per-volume", 1]
    given += ["--cache", tmp_path / "cache"]
    code, out, error = command(monkeypatch, capsys, studies, *given)
    assert code == 0, error
    found = rows(tmp_path / "out" / "results.csv")
    assert {row["method"] for row in found} == {*studies.METHODS}
    after = [row for row in found if row["k"] != "0"]
    assert {row["class"] for row in after if row["method"] == "plain"} == {"liver"}
    assert "aorta" in {row["class"] for row in after if row["method"] == "text"}
    assert all(0 <= float(row["dice"]) <= 1 for row in found)
    code, again, _ = command(monkeypatch, capsys, studies, *given)
    assert code == 0 and "17 of 17 runs are done already" in again
    assert again.split("already\n")[1] in out


def test_two_studies_at_once_do_not_share_a_folder(study):
    with atomic_files.claim_folder(study.out):
        code, _, error, done = study(*SMALL)
    assert code == 2 and f"{study.out}: another process is writing" in error and not done
