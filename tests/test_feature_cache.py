"""Cached features: computed once, completed after a kill, recomputed when an input changes."""

import os
import pickle
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from engine import feature_cache
from imaging import layouts

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
        rows = feature_cache.cache_rows(path, 5, compute, "features of 5 images")
        assert rows.dtype == np.float16 and not rows.flags.writeable
        np.testing.assert_array_equal(rows, torch.stack([row(i) for i in range(5)]).numpy())
    assert asked == [0, 1, 2, 3, 4]
    assert {p.name for p in path.parent.iterdir()} == {"key.npy", "key.lock"}
    assert "features of 5 images" in capsys.readouterr().out


HEADER, RECORD = 192, 16  # bytes; six float16 and four of the checksum
KEPT = HEADER + 5 * RECORD


def made(path, starts=None):
    """Five rows in a file; `starts` collects where each computation began."""

    def compute(start):
        if starts is not None:
            starts.append(start)
        return map(row, range(start, 5))

    return feature_cache.cache_rows(path, 5, compute, "five rows")


@pytest.mark.parametrize(
    "left",
    [1, 60, 192, 192 + 5, 192 + 12, 192 + 16, 192 + 31, 192 + 32, 192 + 79, 192 + 80],
)
def test_what_a_killed_run_left_is_gone_on_from(left, tmp_path):
    """`left` bytes were written: a cut header, whole rows of 16 bytes, or a cut row."""
    whole = tmp_path / "whole.npy"
    feature_cache.cache_rows(whole, 5, lambda start: map(row, range(start, 5)), "")
    starts, path = [], tmp_path / "key.npy"
    path.with_suffix(".part").write_bytes(whole.read_bytes()[:left])

    def compute(start):
        starts.append(start)
        return map(row, range(start, 5))

    feature_cache.cache_rows(path, 5, compute, "")
    assert starts == ([max(0, left - HEADER) // RECORD] if left < KEPT else [])
    assert path.read_bytes() == whole.read_bytes()


def test_the_file_is_a_npy_of_rows_and_their_crc(tmp_path):
    """As anyone can check with numpy and zlib alone."""
    path = tmp_path / "key.npy"
    made(path)
    assert path.stat().st_size == KEPT
    records = np.load(path)
    for i, record in enumerate(records):
        values = row(i).numpy().astype("<f2")
        np.testing.assert_array_equal(record["row"], values)
        assert record["checksum"] == zlib.crc32(values.tobytes(), i)


def zero(start, stop=None):
    def change(content):
        end = len(content) if stop is None else stop
        return content[:start] + bytes(end - start) + content[end:]

    return change


def flip(place):
    return lambda content: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def swap(content):
    """Rows 1 and 2 in each other's place, each with its own checksum."""
    first, second = HEADER + RECORD, HEADER + 2 * RECORD
    rest = second + RECORD
    return content[:first] + content[second:rest] + content[first:second] + content[rest:]


DAMAGE = {  # what happened to the file -> where computing began again
    "all of it is zero": (zero(0), [0]),
    "its header is zero": (zero(0, HEADER), [0]),
    "its rows are zero": (zero(HEADER), [0]),
    "its tail is zero": (zero(HEADER + 3 * RECORD), [3]),
    "a row is zero": (zero(HEADER + RECORD, HEADER + 2 * RECORD), [1]),
    "half a row is zero": (zero(HEADER + RECORD, HEADER + RECORD + 8), [1]),
    "a bit of the first row": (flip(HEADER + 3), [0]),
    "a bit of the last row": (flip(HEADER + 4 * RECORD), [4]),
    "a bit of a checksum": (flip(HEADER + 3 * RECORD - 1), [2]),
    "two places": (lambda x: flip(HEADER)(flip(HEADER + 3 * RECORD)(x)), [0, 3]),
    "a bit of the dtype": (lambda x: x.replace(b"<f2", b"<i2"), [0]),
    "a bit of the shape": (lambda x: x.replace(b"(2, 3)", b"(3, 3)"), [0, 0]),
    "a bit of the number of rows": (lambda x: x.replace(b"(5,)", b"(4,)"), [0]),
    "a bracket of the header": (lambda x: x.replace(b"(5,)", b"(5,("), [0]),
    "its end is cut off": (lambda x: x[: HEADER + 2 * RECORD + 7], [2]),
    "nothing is left": (lambda x: b"", [0]),
    "rows changed places": (swap, [1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_computed_again_and_said(damage, tmp_path, capsys):
    change, expected = DAMAGE[damage]
    path = tmp_path / "key.npy"
    made(path)
    whole = path.read_bytes()
    damaged = change(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    capsys.readouterr()
    starts = []
    rows = made(path, starts)
    np.testing.assert_array_equal(rows, torch.stack([row(i) for i in range(5)]).numpy())
    assert starts == expected
    assert path.read_bytes() == whole
    said = [line for line in capsys.readouterr().out.splitlines() if "computing" in line]
    assert said and all(line.startswith(f"{path}: ") for line in said)
    made(path, starts)
    assert starts == expected and "computing" not in capsys.readouterr().out


def test_only_damaged_rows_are_computed_again(tmp_path):
    path = tmp_path / "key.npy"
    computed = []

    def compute(start):
        for i in range(start, 100):
            computed.append(i)
            yield row(i)

    feature_cache.cache_rows(path, 100, compute, "")
    with open(path, "rb+") as file:
        for i in (7, 8, 9, 50, 99):
            file.seek(HEADER + i * RECORD + 2)
            file.write(b"\xff")
    computed.clear()
    feature_cache.cache_rows(path, 100, compute, "")
    assert computed == [7, 8, 9, 50, 99]


@pytest.mark.parametrize("place", [6, 7])
def test_another_version_of_the_header_is_computed_again(place, tmp_path, capsys):
    """numpy would read the rest by other rules, or not at all."""
    path = tmp_path / "key.npy"
    made(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[place] ^= 2
    path.write_bytes(flipped)
    made(path)
    assert path.read_bytes() == whole
    assert f"{path}: damaged or of an older version" in capsys.readouterr().out


def test_rows_that_a_killed_run_left_of_another_number_are_not_gone_on_from(tmp_path):
    path = tmp_path / "key.npy"
    made(path)
    whole = path.read_bytes()
    path.unlink()
    feature_cache.cache_rows(path, 6, lambda start: map(row, range(start, 6)), "")
    os.replace(path, path.with_suffix(".part"))
    starts = []
    made(path, starts)
    assert starts == [0] and path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_file_of_an_older_version_is_computed_again(kind, tmp_path, capsys):
    """Its rows have no checksum, and they are other ones, so that a misreading shows."""
    path = tmp_path / "key.npy"
    np.save(path, np.ones((5, 2, 3), kind))
    np.testing.assert_array_equal(made(path), torch.stack([row(i) for i in range(5)]).numpy())
    assert f"{path}: damaged or of an older version" in capsys.readouterr().out
    # So is what a killed run of an older version left.
    path.unlink()
    np.save(path.with_suffix(".npy"), np.ones((5, 2, 3), kind))
    os.replace(path, path.with_suffix(".part"))
    starts = []
    np.testing.assert_array_equal(
        made(path, starts), torch.stack([row(i) for i in range(5)]).numpy()
    )
    assert starts == [0]


def test_damaged_rows_that_a_killed_run_left_are_not_gone_on_from(tmp_path):
    """After a power cut the tail of a file may be zero although its size is right."""
    path = tmp_path / "key.npy"
    made(path)
    whole = path.read_bytes()
    left = whole[: HEADER + 2 * RECORD] + bytes(2 * RECORD)
    path.with_suffix(".part").write_bytes(left)
    path.unlink()
    starts = []
    made(path, starts)
    assert starts == [2] and path.read_bytes() == whole


def test_each_process_checks_a_row_when_it_first_reads_it(tmp_path):
    path = tmp_path / "key.npy"
    made(path)
    rows = feature_cache.CachedRows(path)
    assert torch.equal(rows[1], row(1).half())
    for place in (HEADER + RECORD, HEADER + 3 * RECORD):
        content = flip(place)(path.read_bytes())
        with open(path, "rb+") as file:  # the same file, which stays mapped
            file.write(content)
    rows[1]  # was checked: reading it again costs nothing
    with pytest.raises(OSError, match="key.npy: row 3 was damaged while .*--resume") as error:
        rows[3]
    assert "\n" not in str(error.value)
    other = pickle.loads(pickle.dumps(rows))  # as a worker of a data loader has it
    assert torch.equal(other[2], row(2).half())
    with pytest.raises(OSError, match="row 1 was damaged"):
        other[1]


def test_killed_at_any_moment(tmp_path):
    """A process that is killed twice and started again leaves what an undisturbed one does."""
    program = (
        "import sys, time, torch; from pathlib import Path\n"
        "from engine import feature_cache\n"
        "def compute(start):\n"
        "    print(start, flush=True)\n"
        "    for i in range(start, 40):\n"
        "        time.sleep(0.02); yield torch.full((1000,), float(i))\n"
        "feature_cache.cache_rows(Path(sys.argv[1]), 40, compute, '')\n"
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
    rows = np.load(path)["row"]
    np.testing.assert_array_equal(rows, np.arange(40.0)[:, None].repeat(1000, 1))
    assert starts[0] == 0 and starts == sorted(starts)


def test_the_fingerprint_notices_every_change():
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    keys = [
        feature_cache.fingerprint(weights, "settings"),
        feature_cache.fingerprint(weights, "settings."),
        feature_cache.fingerprint(weights | {"a": torch.zeros(3, 2)}, "settings"),
        feature_cache.fingerprint(
            weights | {"a": torch.zeros(2, 3).index_fill(0, torch.tensor(1), 1e-30)}, "settings"
        ),
        feature_cache.fingerprint({"a": weights["a"], "c": weights["b"]}, "settings"),
        feature_cache.fingerprint({"a": weights["a"].half(), "b": weights["b"]}, "settings"),
    ]
    assert len(set(keys)) == len(keys)
    assert feature_cache.fingerprint(dict(reversed(weights.items())), "settings") == keys[0]


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(OSError, match="MB needed"):
        feature_cache.cache_rows(
            tmp_path / "key.npy", 5, lambda start: map(row, range(start, 5)), ""
        )


def test_two_runs_at_once_share_one_computation(tmp_path):
    program = (
        "import sys, time, torch; from pathlib import Path\n"
        "from engine import feature_cache\n"
        "def compute(start):\n"
        "    for i in range(start, 6):\n"
        "        time.sleep(0.2); print('row', i, flush=True); yield torch.full((2, 3), float(i))\n"
        f"rows = feature_cache.cache_rows(Path({str(tmp_path / 'key.npy')!r}), 6, compute, 'six')\n"
        "assert (rows[:, 0, 0] == [0, 1, 2, 3, 4, 5]).all(), rows[:, 0, 0]\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = b"".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count(b"row") == 6


# --- the caches of decoded images and prepared volumes --------------------------------------------


def zero_file(path, start, end=None):
    path.write_bytes(zero(start, end)(path.read_bytes()))


PIXEL_DAMAGE = {
    "pixels are zero": (".bin", lambda path: zero_file(path, 0)),
    "the tail of the pixels is zero": (".bin", lambda path: zero_file(path, 20000)),
    "a bit of the pixels": (".bin", lambda path: path.write_bytes(flip(777)(path.read_bytes()))),
    "pixels are cut off": (".bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "no pixels are left": (".bin", lambda path: path.write_bytes(b"")),
    "the index is zero": (".npz", lambda path: zero_file(path, 0)),
    "a few bytes of the index": (".npz", lambda path: zero_file(path, 128 + 32, 128 + 40)),
    "the index is cut off": (".npz", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "an older version": (".crc", lambda path: path.unlink()),
    "the checksums": (".crc", lambda path: zero_file(path, 0)),
}


@pytest.mark.parametrize("damage", PIXEL_DAMAGE)
def test_damaged_pixels_are_decoded_again_and_said(damage, demo, tmp_path, capsys):
    ending, change = PIXEL_DAMAGE[damage]
    entries = layouts.read_entries(demo, "val")
    whole = data.open_dataset(entries, tmp_path)
    expected = [whole.sample(i, "p6") for i in range(len(whole))]
    (path,) = tmp_path.glob(f"*{ending}")
    capsys.readouterr()
    data.open_dataset(entries, tmp_path)
    assert capsys.readouterr().out == ""  # it is read as it is

    change(path)
    again = data.open_dataset(entries, tmp_path)
    said = f"{path.with_suffix('.bin')}: damaged or of an older version; decoding the images again"
    assert said in capsys.readouterr().out
    for i, sample in enumerate(expected):
        ours = again.sample(i, "p6")
        assert torch.equal(ours["image"], sample["image"])
        assert torch.equal(ours["mask"], sample["mask"])
    data.open_dataset(entries, tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["image.npy", "mask.npy", "truth.npy", "voxels.npy", "npz", "crc"])
@pytest.mark.parametrize("change", [lambda x: x[:128] + bytes(len(x) - 128), lambda x: x[:-1]])
def test_damaged_volumes_are_prepared_again_and_said(name, change, tmp_path, capsys):
    """Also a whole cache of an older version, which has no checksums."""
    from test_volumes import make_set, prepare

    entries, cache = make_set(tmp_path / "set", ("RAS",)), tmp_path / "cache"
    parts = ("image", "mask", "truth")
    whole = prepare(entries, cache).sample(0)
    expected = {part: whole[part].clone() for part in parts}
    offsets = whole["voxels"][1].copy()
    capsys.readouterr()
    prepare(entries, cache)
    assert capsys.readouterr().out == ""

    (path,) = cache.glob(f"*.{name}")
    path.write_bytes(change(path.read_bytes()))
    if name == "crc":
        path.unlink()
    stem = path.name.split(".")[0]
    again = prepare(entries, cache).sample(0)
    said = f"{cache / stem}.*: damaged or of an older version; preparing the volume again"
    assert said in capsys.readouterr().out
    for part in parts:
        assert torch.equal(again[part], expected[part])
    np.testing.assert_array_equal(again["voxels"][1], offsets)
    prepare(entries, cache)
    assert capsys.readouterr().out == ""
