"""Kept features: computed once, gone on with after a kill, noticed when anything changes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import features

pytestmark = pytest.mark.numeric


def row(i: int) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) + 10 * i


def test_rows_are_computed_once(tmp_path, capsys):
    asked = []

    def compute(start):
        for i in range(start, 5):
            asked.append(i)
            yield row(i)

    path = tmp_path / "deep" / "key.npy"
    for _ in range(2):
        rows = features.keep(path, 5, compute, "features of 5 images")
        assert rows.dtype == np.float16 and not rows.flags.writeable
        np.testing.assert_array_equal(rows, torch.stack([row(i) for i in range(5)]).numpy())
    assert asked == [0, 1, 2, 3, 4]
    assert {p.name for p in path.parent.iterdir()} == {"key.npy", "key.lock"}
    assert "features of 5 images" in capsys.readouterr().out


@pytest.mark.parametrize("left", [1, 60, 128, 128 + 5, 128 + 12, 128 + 30, 128 + 60])
def test_what_a_killed_run_left_is_gone_on_from(left, tmp_path):
    """`left` bytes were written: a cut header, whole rows of 12 bytes, or a cut row."""
    whole = tmp_path / "whole.npy"
    features.keep(whole, 5, lambda start: map(row, range(start, 5)), "")
    starts, path = [], tmp_path / "key.npy"
    path.with_suffix(".part").write_bytes(whole.read_bytes()[:left])

    def compute(start):
        starts.append(start)
        return map(row, range(start, 5))

    features.keep(path, 5, compute, "")
    assert starts == ([max(0, left - 128) // 12] if left < 128 + 60 else [])
    assert path.read_bytes() == whole.read_bytes()


def test_killed_at_any_moment(tmp_path):
    """A process that is killed twice and started again leaves what an undisturbed one does."""
    program = (
        "import sys, time, torch; from pathlib import Path; import features\n"
        "def compute(start):\n"
        "    print(start, flush=True)\n"
        "    for i in range(start, 40):\n"
        "        time.sleep(0.02); yield torch.full((1000,), float(i))\n"
        "features.keep(Path(sys.argv[1]), 40, compute, '')\n"
    )
    path = tmp_path / "key.npy"
    command, starts = [sys.executable, "-c", program, str(path)], []
    for wait in (0.2, 0.2, None):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        starts.append(int(process.stdout.readline()))
        if wait:
            time.sleep(wait)
            os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
        process.wait()
    rows = np.load(path)
    np.testing.assert_array_equal(rows, np.arange(40.0)[:, None].repeat(1000, 1))
    assert starts[0] == 0 and starts == sorted(starts)


def test_the_fingerprint_notices_every_change():
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    keys = [
        features.fingerprint(weights, "settings"),
        features.fingerprint(weights, "settings."),
        features.fingerprint(weights | {"a": torch.zeros(3, 2)}, "settings"),
        features.fingerprint(
            weights | {"a": torch.zeros(2, 3).index_fill(0, torch.tensor(1), 1e-30)}, "settings"
        ),
        features.fingerprint({"a": weights["a"], "c": weights["b"]}, "settings"),
        features.fingerprint({"a": weights["a"].half(), "b": weights["b"]}, "settings"),
    ]
    assert len(set(keys)) == len(keys)
    assert features.fingerprint(dict(reversed(weights.items())), "settings") == keys[0]


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(OSError, match="MB needed"):
        features.keep(tmp_path / "key.npy", 5, lambda start: map(row, range(start, 5)), "")


def test_two_runs_at_once_share_one_computation(tmp_path):
    program = (
        "import sys, time, torch; from pathlib import Path; import features\n"
        "def compute(start):\n"
        "    for i in range(start, 6):\n"
        "        time.sleep(0.2); print('row', i, flush=True); yield torch.full((2, 3), float(i))\n"
        f"rows = features.keep(Path({str(tmp_path / 'key.npy')!r}), 6, compute, 'six')\n"
        "assert (rows[:, 0, 0] == [0, 1, 2, 3, 4, 5]).all(), rows[:, 0, 0]\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = b"".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count(b"row") == 6
