"""The demo: its tables, its exit status, and that it learns to read."""

import sys
from dataclasses import replace

import pytest
from conftest import ROOT, command

sys.path.append(str(ROOT / "benchmarks"))

import demo as program

import prepare

MEANS = {"full": 0.9, "short": 0.87, "other blob": 0.88, "no text": 0.2, "other image": 0.25}


def test_margins_by_hand():
    expected = {"full": 0.05, "short": 0.07, "other blob": 0.06}
    expected |= {"no text": 0.3, "other image": 0.25}
    assert program.margins(MEANS) == pytest.approx(expected)


def test_the_table_of_seeds_ends_with_the_least_margin():
    lines = program.table_of_seeds({0: MEANS, 3: MEANS | {"short": 0.81}}, {0: 3.0, 3: 3.1})
    lines = lines.splitlines()
    assert lines[2] == "| 0 | 0.900 | 0.870 | 0.880 | 0.200 | 0.250 | 0.050 | 3.0 |"
    assert lines[3] == "| 3 | 0.900 | 0.810 | 0.880 | 0.200 | 0.250 | 0.010 | 3.1 |"
    assert lines[-1] == "least margin 0.010: class, shape, colour, seed 3"
    assert {line.count("|") for line in lines[:4]} == {9}


def test_the_status_is_0_however_little_was_learned(demo, tmp_path, monkeypatch, capsys):
    whole = program.training

    def one_step(data, out, seed):
        cache = str(demo.parent / "cache")
        return replace(whole(data, out, seed), max_steps=1, size=[64], cache=cache)

    monkeypatch.setattr(program, "training", one_step)
    monkeypatch.chdir(tmp_path)  # the tests of its weights keep their images in .cache
    said = {}
    for time in "first", "second":
        arguments = "--data", demo, "--out", "run"
        code, said[time], error = command(monkeypatch, capsys, program, *arguments)
        assert code == 0, error

    tables = [text[text.index("| asked for |") :] for text in said.values()]
    assert tables[0] == tables[1] and tables[0].count("\n| ") == 6
    assert "| the full prompt (p6) | 0." in tables[0] and "| no text at all (p0) | 0." in tables[0]
    assert "resumed in epoch" in said["second"]
    assert (tmp_path / "run/test/overlays/sheet.png").is_file()
    assert (tmp_path / "run/asked/p3-test/test/overlays/sheet.png").is_file()
    assert (tmp_path / "run/curves.png").is_file()


def test_several_seeds_have_folders_of_their_own_and_scores_are_not_judged(monkeypatch, capsys):
    trained = []

    def learn(data, out, seed):
        trained.append((data, out, seed))
        return {name: {"mean": mean - seed / 10} for name, mean in MEANS.items()}

    monkeypatch.setattr(program, "learn", learn)
    code, said, error = command(monkeypatch, capsys, program, "--seeds", 0, 4)
    assert code == 0, error
    assert trained == [("data/demo", f"runs/demo-seed{seed}", seed) for seed in (0, 4)]
    assert said.splitlines()[-1] == "least margin -0.350: full prompt, seed 4"


@pytest.mark.slow
@pytest.mark.numeric
def test_it_learns_to_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["demo", "--out", "data"]) == 0
    dice = program.learn("data", "run", seed=0)
    means = {name: score["mean"] for name, score in dice.items()}
    print(means)
    margins = program.margins(means)
    assert min(margins.values()) >= 0, margins
