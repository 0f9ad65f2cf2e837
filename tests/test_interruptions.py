"""Interrupted programs print one line that says how to continue, and leave no partial files."""

import errno
import json
import os
import random
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
from conftest import ROOT, command, contents, rows
from safetensors import SafetensorError
from test_train import arguments, same_run

import data
import train
from engine import command_line, evaluate, startup
from imaging import atomic_files, layouts

# --- one line, and the exit status ---------------------------------------------------------------


def broken_connection():
    """Raise what the queue of a data-loading process raises after the process was killed."""
    text = "raise ConnectionResetError(104, 'Connection reset by peer')"
    exec(compile(text, "dataloader.py", "exec"))


def worker_ends_too():
    """Raise what torch raises while a signal ends the program and its data-loading processes."""
    try:
        raise startup.Interrupted(signal.SIGTERM)
    finally:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
EXITED = "DataLoader worker (pid(s) 7, 8) exited unexpectedly"
SHM = "unable to open shared memory object </torch_7_1> in read-write mode: No space left (28)"
GPU = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
INTERRUPTIONS = {  # what is raised: status, start of the line
    "ctrl-c": (KeyboardInterrupt(), 130, "stopped by Ctrl-C: "),
    "SIGINT": (startup.Interrupted(signal.SIGINT), 130, "stopped by Ctrl-C: "),
    "SIGTERM": (startup.Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM: "),
    "SIGHUP": (
        startup.Interrupted(signal.SIGHUP),
        129,
        "stopped because the terminal was closed: ",
    ),
    "killed worker": (RuntimeError(KILLED), 2, "error: a data-loading process was killed (signal"),
    "dead worker": (RuntimeError(EXITED), 2, "error: a data-loading process was killed, most"),
    "connection": (broken_connection, 2, "error: a data-loading process was killed, most"),
    "worker too": (worker_ends_too, 143, "stopped by SIGTERM: "),
    "shared memory": (RuntimeError(SHM), 2, "error: the memory that processes share (/dev/shm)"),
    "full disk": (OSError(errno.ENOSPC, "No space", "a/b"), 2, "error: a/b could not be written"),
    "quota": (OSError(errno.EDQUOT, "Quota", "a/b"), 2, "error: a/b could not be written (Quota)"),
    "memory": (MemoryError(), 2, "error: out of memory"),
    "numpy": (MemoryError("Unable to allocate 3 GiB for an array"), 2, "error: out of memory"),
    "memory of a fork": (OSError(errno.ENOMEM, "Cannot allocate"), 2, "error: out of memory"),
    "gpu": (RuntimeError(GPU), 2, "error: out of memory"),
    "pipe": (
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        2,
        "error: the program that reads the output",
    ),
}


@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_what_interrupts_a_program_is_one_line_with_the_way_on(kind, monkeypatch, capsys):
    error, status, start = INTERRUPTIONS[kind]

    def main():
        with (
            command_line.recovery_advice(lambda: "all is safe"),
            command_line.recovery_advice(lambda: "inner is safe"),
        ):
            if isinstance(error, Exception | KeyboardInterrupt):
                raise error
            error()

    module = SimpleNamespace(__name__="program", main=main)
    code, out, err = command(monkeypatch, capsys, module)
    assert (code, out, err.count("\n")) == (status, "", 1), err
    assert err.startswith(start) and err.endswith("inner is safe\n")


def test_a_study_says_for_its_runs_how_to_go_on(monkeypatch, capsys):
    def main():
        with (
            command_line.recovery_advice(lambda: "the study", override=True),
            command_line.recovery_advice(lambda: "the run"),
        ):
            raise KeyboardInterrupt

    code, _, err = command(monkeypatch, capsys, SimpleNamespace(__name__="program", main=main))
    assert (code, err) == (130, "stopped by Ctrl-C: the study\n")


def test_an_error_of_a_data_loading_process_is_its_last_line():
    caught = "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback:"
    error = FileNotFoundError(f"{caught}\n  File x\nFileNotFoundError: a.png: gone")
    assert command_line.describe_error(error) == "error: a.png: gone"
    assert (
        command_line.describe_error(ValueError("KeyError: is a name"))
        == "error: KeyError: is a name"
    )
    assert command_line.describe_error(RuntimeError("shapes do not fit")) is None


def take_ctrl_c() -> None:
    """Let a child take SIGINT, which what a shell starts in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_signal_during_the_imports_is_one_line(tmp_path):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (tmp_path / "torch.py").write_text(slow)
    (tmp_path / "numpy.py").write_text("import torch")
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    for program, number in ("train", signal.SIGINT), ("prepare", signal.SIGTERM):
        words = [sys.executable, ROOT / f"{program}.py", "--help"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = os.environ | {"PYTHONPATH": paths}
        process = subprocess.Popen(words, env=env, preexec_fn=take_ctrl_c, **pipes)
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 128 + number
        assert err == "stopped: nothing was done yet; the same command starts again\n"


@pytest.mark.parametrize("program", ["train", "predict", "prepare", "studies"])
def test_every_program_guards_its_imports(program):
    lines = (ROOT / f"{program}.py").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if line.startswith(("import ", "from ", "if __name__")))
    assert first == 'if __name__ == "__main__":'


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
        monkeypatch.setattr(startup, "SIGNALS", [signal.SIGHUP])
        startup.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_cannot_be_printed_is_one_line():
    code = "from engine import command_line\ncommand_line.command(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1 and b"Exception ignored" not in done.stderr


def test_warnings_of_libraries_are_no_lines(monkeypatch, capsys):
    def main():
        import warnings

        warnings.warn("torch.jit.load is deprecated", FutureWarning, stacklevel=1)
        return 0

    code, out, err = command(monkeypatch, capsys, SimpleNamespace(__name__="program", main=main))
    assert (code, out, err) == (0, "", "")


# --- a full disk ---------------------------------------------------------------------------------

FULL = {  # as libraries say it
    "torch": RuntimeError("[enforce fail at container.cc:8] . PytorchStreamWriter failed writing"),
    "torch closing": RuntimeError("unexpected pos 64 vs 0"),
    "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
    "numpy": OSError("100 requested and 10 written"),
    "python": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("library", FULL)
def test_a_full_disk_is_named_whatever_the_library_says(library, tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")
    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic_files.atomic_write(path) as part,
    ):
        part.write_text("new, in part")
        raise FULL[library]
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert contents(tmp_path) == {"last.pt": b"old"}


def test_other_errors_in_a_file_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), atomic_files.atomic_write(tmp_path / "x.json"):
        raise KeyError("a mistake of ours")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["last.pt", "best.safetensors", "metrics.csv", "config.json"])
def test_a_disk_that_is_full_from_the_start_leaves_no_folder(name, options, monkeypatch, capsys):
    replace_file = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace_file(source, target)

    words = arguments(replace(options, epochs=1, max_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, err = command(monkeypatch, capsys, train, *words)
    assert code == 2 and err.count("\n") == 1
    assert f"{options.out}/{name} could not be written (No space left on device)" in err
    assert err.endswith("nothing was saved yet; the same command starts again\n")
    assert not Path(options.out).exists()


# --- leftovers -----------------------------------------------------------------------------------


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    left = [".last.pt.0123abcd", "test/.per_image.csv.deadbeef", "a/.00ff00ff.ct.nii.gz"]
    stay = [
        "last.pt", ".lock", ".last.pt.0123abcz", ".last.pt.0123abcde", "x.json.0123abcd",
        ".0123abcd", ".notes.0123abcd", ".git/.index.json.0123abcd", ".part.png", "test/a.png",
    ]  # fmt: skip
    for name in left + stay:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.a.png.0123abcd").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link").symlink_to(tmp_path / "elsewhere")

    with atomic_files.claim_folder(tmp_path / "run"):
        assert (tmp_path / "elsewhere/.a.png.0123abcd").exists()
    with atomic_files.claim_folder(tmp_path / "a"):
        assert not (tmp_path / left[2]).exists() and (tmp_path / left[0]).exists()
    atomic_files.remove_leftovers(tmp_path, recursive=False)
    assert not (tmp_path / left[0]).exists() and (tmp_path / left[1]).exists()
    atomic_files.remove_leftovers(tmp_path)
    assert contents(tmp_path).keys() == {*stay}


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    with atomic_files.atomic_write(tmp_path / "x.png") as part:
        atomic_files.remove_leftovers(tmp_path)
        assert part.exists()
        part.write_text("whole")
    assert contents(tmp_path) == {"x.png": b"whole"}


@pytest.mark.parametrize("days, stays", [(0.9, True), (1.1, False)])
def test_without_locks_a_leftover_is_a_day_old(days, stays, tmp_path, monkeypatch):
    part = tmp_path / ".x.png.0123abcd"
    part.write_text("x")
    then = time.time() - days * 24 * 60 * 60
    os.utime(part, (then, then))
    monkeypatch.setattr(atomic_files, "fcntl", None)
    atomic_files.remove_leftovers(tmp_path)
    assert part.exists() == stays


def test_opening_a_data_set_tidies_the_cache(demo, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f".{'0' * 24}.bin.0123abcd").write_bytes(b"x")
    data.open_dataset(layouts.read_entries(demo, "val"), cache)
    assert not list(cache.glob(".*"))


def test_a_folder_that_takes_no_lock_file_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "missing/file")  # like /proc: cannot be created
    with pytest.raises(FileNotFoundError):
        atomic_files.open_locked(tmp_path / ".lock")


def test_a_folder_that_cannot_be_made_is_one_line_without_a_number(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    for folder in (tmp_path / "out", Path("/proc/out")):
        with pytest.raises(OSError) as caught, atomic_files.claim_folder(folder):
            pass
        message = str(caught.value)
        assert message.startswith(f"{folder}: cannot be written to (")
        assert message.endswith("); choose another --out") and "Errno" not in message


# --- before the first step -----------------------------------------------------------------------


def stopped(*_, **__):
    raise KeyboardInterrupt


def full_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


EARLY = {  # what fails: where in train.py, with what
    "while data are checked": ("runs.open_data", stopped),
    "while the model is made": ("starting_model", full_memory),
    "while the first steps are done": ("Run.fit", full_memory),
    "while the first epoch is done": ("Run.train_epoch", stopped),
}


@pytest.mark.parametrize("when", EARLY)
def test_a_failure_before_the_first_save_leaves_no_folder(when, options, monkeypatch, capsys):
    name, fail = EARLY[when]
    with monkeypatch.context() as patch:
        patch.setattr(f"train.{name}", fail)
        code, _, err = command(monkeypatch, capsys, train, *arguments(options))
    assert code == (130 if fail is stopped else 2) and err.count("\n") == 1
    assert err.endswith("nothing was saved yet; the same command starts again\n")
    assert not Path(options.out).exists()


def test_a_failure_leaves_the_files_of_a_folder_as_they_were(options, monkeypatch, capsys):
    out = Path(options.out)
    (out / "test").mkdir(parents=True)
    (out / "test/overlays").mkdir()
    (out / "notes.md").write_text("mine")
    (out / "log.txt").write_text("of an earlier test\n")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(train.runs, "open_data", stopped)
        code, text, _ = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 130 and "contains a test that was stopped" in text
    (out / "test/overlays").rmdir(), (out / "test").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(train, "starting_model", full_memory)
        code, _, _ = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 2 and contents(out) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_in_its_first_epoch_starts_again(resume, options, capsys, monkeypatch):
    out = Path(options.out)

    def kill(*_):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "removed_if_unsaved", nothing_removed)
        patch.setattr(train.Run, "train_epoch", kill)
        train.run(options)
    assert {"config.json", "log.txt"} <= contents(out).keys() and not (out / "last.pt").exists()
    quick = replace(options, resume=resume)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "train_epoch", stopped)
        train.run(quick)
    line = "contains no saved state" if resume else "stopped before it saved anything"
    assert line in capsys.readouterr().out


class nothing_removed:
    """In place of `train.removed_if_unsaved`: a killed process removes nothing."""

    def __init__(self, out):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize(
    "name", ["best.safetensors", "last.pt", "metrics.csv", "test/summary.json"]
)
def test_files_of_a_run_are_not_written_over(name, options, monkeypatch, capsys):
    file = Path(options.out, name)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    code, _, err = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 2 and err.count("\n") == 1 and "already contains a run" in err
    assert contents(Path(options.out)) == {name: b"mine"}


def test_a_config_of_another_program_is_not_written_over(options, monkeypatch, capsys):
    file = Path(options.out, "config.json")
    file.parent.mkdir(parents=True)
    file.write_text('{"model_type": "clip"}')
    code, _, err = command(monkeypatch, capsys, train, *arguments(options))
    assert code == 2 and "config.json: is not the file of a run; choose another --out" in err
    assert file.read_text() == '{"model_type": "clip"}'


# --- more epochs ---------------------------------------------------------------------------------


def test_the_order_of_an_epoch_does_not_depend_on_how_many_follow():
    short = list(data.train_batches(21, 4, 3, 7, 0))
    assert list(data.train_batches(21, 4, 9, 7, 0))[: len(short)] == short


def test_a_finished_run_takes_more_epochs_and_ends_as_one_that_had_them(options, tmp_path):
    """With a constant learning rate; --patience may change, too."""
    whole = replace(options, schedule="constant", warmup=0.0, overlays=0, size=[32])
    whole = replace(whole, out=str(tmp_path / "whole"))
    train.run(whole)
    short = replace(whole, epochs=1, out=str(tmp_path / "short"))
    train.run(short)
    train.run(replace(short, epochs=2, resume=True, patience=50))
    same_run(tmp_path / "whole", tmp_path / "short")
    saved = json.loads((tmp_path / "short/config.json").read_text())["options"]
    assert (saved["epochs"], saved["patience"]) == (2, 50)


def test_more_epochs_stretch_the_schedule_and_that_is_said(options, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "test", lambda *_: {})
    train.run(replace(options, warmup=0.0, size=[32]))
    resume = ["--resume", "--out", options.out]
    code, out, _ = command(monkeypatch, capsys, train, *resume, "--epochs", 4)
    steps = int(rows(f"{options.out}/metrics.csv")[1]["step"])
    assert code == 0 and "--epochs 2 -> 4" in out
    line = f"the cosine schedule now ends at step {2 * steps}: the learning rate at step {steps} "
    assert line + "changes from 0 to 0.0005" in out
    rates = [float(row["lr"]) for row in rows(f"{options.out}/metrics.csv")]
    ideal = [0.0, (1 + np.cos(0.75 * np.pi)) / 2 * 1e-3, 0.0]
    assert rates[1:] == pytest.approx(ideal, abs=1e-12)

    code, _, err = command(monkeypatch, capsys, train, *resume, "--epochs", 3)
    assert code == 2 and err.count("\n") == 1
    assert "--epochs 3: this run has trained for 4 already; give 4 or more" in err
    code, out, _ = command(monkeypatch, capsys, train, *resume)
    assert code == 0 and "schedule" not in out.split("resumed in epoch 5")[1]


def test_epochs_that_max_steps_would_cut_are_refused(options, monkeypatch, capsys):
    train.run(replace(options, max_steps=2))
    words = ["--resume", "--out", options.out, "--epochs", 9]
    code, _, err = command(monkeypatch, capsys, train, *words)
    assert code == 2 and "--epochs 9: --max-steps 2 has ended this run" in err


# --- kill -9 at random moments -------------------------------------------------------------------


def kill_at_random(words: list, moments: random.Random, longest: float) -> bool:
    """Start a program, kill it within `longest` seconds; return True if that was in time."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        process.wait(moments.uniform(0.1, longest))
    except subprocess.TimeoutExpired:
        process.kill()
    said = process.communicate()[0].decode()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def finish(words: list) -> float:
    """Run a program to its end; return the seconds that it took."""
    start = time.time()
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    return time.time() - start


def hidden(folder: Path) -> list[str]:
    """Return the hidden files of a folder, but for lock files of caches."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob(".*")]
    return sorted(names)


@pytest.mark.slow
def test_training_killed_20_times_ends_the_same_and_leaves_nothing(options, tmp_path):
    longer = replace(options, epochs=12, batch_size=4, save_every=0.002, workers=1)
    longer = replace(longer, cache=str(tmp_path / "cache"))
    plain = [ROOT / "train.py", *arguments(replace(longer, out=str(tmp_path / "whole")))]
    seconds = finish(plain)
    words = arguments(replace(longer, out=str(tmp_path / "killed"), resume=True))
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        if kill_at_random([ROOT / "train.py", *words], moments, seconds):
            kills += 1
        else:  # the run has ended: more kills need another one
            same_run(tmp_path / "whole", tmp_path / "killed")
            shutil.rmtree(tmp_path / "killed")
    finish([ROOT / "train.py", *words])
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert not hidden(tmp_path / "killed") and not hidden(tmp_path / "cache")


@pytest.mark.slow
def test_predictions_killed_20_times_end_the_same_and_leave_nothing(options, demo, tmp_path):
    train.run(replace(options, max_steps=1))
    words = [ROOT / "predict.py", demo, "--weights", options.out, "--overlays", "--probabilities"]
    words += ["--device", "cpu", "--skip-existing"]
    seconds = finish([*words, "--out", tmp_path / "whole"])
    moments = random.Random(1)
    kills = 0
    while kills < 20:
        if kill_at_random([*words, "--out", tmp_path / "killed"], moments, seconds):
            kills += 1
        else:  # all is predicted: more kills need another folder
            assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
            shutil.rmtree(tmp_path / "killed")
    finish([*words, "--out", tmp_path / "killed"])
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert not hidden(tmp_path / "killed")


@pytest.mark.slow
def test_preparations_killed_20_times_end_the_same_and_leave_nothing(tmp_path):
    words = [ROOT / "prepare.py", "demo", "--images", 60, "--size", 64, "--out"]
    seconds = finish([*words, tmp_path / "whole"])
    moments = random.Random(2)
    killed = tmp_path / "killed"
    kills = 0
    while kills < 20:
        kills += kill_at_random([*words, killed], moments, seconds)
        if killed.exists():  # whole, even if the kill came after it
            assert contents(tmp_path / "whole") == contents(killed)
            shutil.rmtree(killed)
    finish([*words, killed])
    assert contents(tmp_path / "whole") == contents(killed)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_training_and_its_data_loaders_is_one_line(number, options, tmp_path):
    words = arguments(replace(options, epochs=1000, workers=2, batch_size=4))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, ROOT / "train.py", *words]
    process = subprocess.Popen(words, start_new_session=True, **pipes)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            os.killpg(process.pid, number)  # as a terminal and schedulers do
            break
    _, err = process.communicate()
    assert process.returncode == 128 + number and err.count("\n") == 1, err
    assert f"{options.out}/last.pt is safe (" in err
    assert err.endswith(f"continue with python train.py --resume --out {options.out}\n")
    assert not hidden(Path(options.out))


@pytest.mark.slow
def test_a_killed_data_loader_is_one_line(options):
    words = arguments(replace(options, epochs=1000, workers=2, batch_size=4))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], **pipes)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            break
    _, err = process.communicate()
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("error: a data-loading process was killed")
    assert err.endswith(f"continue with python train.py --resume --out {options.out}\n")
