import csv
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # so that the workers do not compete for the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # the same in the programs that tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start inherit it


PARITY = ROOT / "docs/parity.json"


def pytest_addoption(parser):
    parser.addoption(
        "--record-parity", action="store_true", help="write measured deviations to docs/parity.json"
    )


@pytest.fixture(scope="session")
def parity(request):
    """Return a function that records how far our outputs are from the official ones.

    `parity("cris", "RN50, logits", against="CRIS.pytorch e596332", float64=1e-11, float32=2e-4)`
    takes the file of the model, what was compared, the official implementation, and the largest
    absolute difference divided by the largest absolute value of the official output, for each
    precision that was measured. With --record-parity the row goes into docs/parity.json, of which
    `docs/generate.py` makes tables; otherwise the row must be there.
    """

    def record(model: str, what: str, against: str, **deviations: float) -> None:
        assert deviations and set(deviations) <= {"float64", "float32"}
        table = json.loads(PARITY.read_text()) if PARITY.exists() else {}
        rows = table.setdefault(model, {})
        if request.config.getoption("--record-parity"):
            rows[what] = {"against": against} | {
                k: float(f"{v:.1e}") for k, v in deviations.items()
            }
            PARITY.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
        assert what in rows, f"docs/parity.json lacks {model}, {what}: run `make parity`"

    return record


def command(monkeypatch, capsys, module, *arguments) -> tuple[int, str, str]:
    """Runs a program as from the command line: exit status, stdout, stderr."""
    from engine import command_line, startup

    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    signals = [*startup.SIGNALS, signal.SIGCHLD]
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.command(module.main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def rows(path) -> list[dict]:
    """A CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(root) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def stop_at_rename(monkeypatch, out) -> list[dict]:
    """From here on the folder that is to become `out` fails to; what it held is put in the list."""
    replace, moved = os.replace, []

    def stop(source, target):
        if Path(target) != out:
            return replace(source, target)
        moved.append(contents(Path(source)))
        raise OSError("stopped at the rename")

    monkeypatch.setattr(os, "replace", stop)
    return moved


def pictures(out, kind) -> dict:
    """{name of a slice: (split, array)} of {train,val,test}/KIND; no name may occur twice."""
    found = {}
    for path in sorted(out.glob(f"*/{kind}/*"), key=lambda path: path.name):
        assert path.stem not in found and path.suffix == ".png"
        found[path.stem] = path.parts[-3], np.asarray(Image.open(path))
    return found


def close(ours, theirs, atol=2e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def shapes(state) -> dict[str, tuple]:
    return {name: tuple(t.shape) for name, t in state.items()}


def randomised(model):
    """All tensors do something; those of a new model would hide what norms do."""
    from recipe import fill

    filled = {n: torch.from_numpy(fill(n, s)) for n, s in shapes(model.state_dict()).items()}
    model.load_state_dict(filled)
    return model.eval()


def write_run(folder, kind, state, config, /, **more) -> Path:
    """A run folder with the weights of a model of class `kind`."""
    folder.mkdir(exist_ok=True)
    told = {"format": 1, "model": kind.__module__, "class": kind.__name__, "config": asdict(config)}
    (folder / "config.json").write_text(json.dumps(told | more))
    save_file(state, folder / "best.safetensors")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small demo set."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    arguments = ["prepare.py", "demo", "--out", str(folder), "--images", "60", "--size", "64"]
    import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert prepare.main() == 0
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Small real data sets that lie beside the repository on some machines."""
    folder = Path(os.environ.get("SEGMENTATION_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "kvasir_polyp").is_dir():
        pytest.skip(
            f"no real data sets at {folder}; SEGMENTATION_DATA may name a folder that has them"
        )
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data) -> Path:
    """Small real checkpoints that lie beside the real data sets on some machines."""
    folder = real_data / "real_weights"
    if not (folder / "rd64-uni-refined.pth").is_file():
        pytest.skip(f"no real weights at {folder}")
    return folder


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Write an empty picture for each epoch's curves, which take as long as the epoch.

    Tests marked `curves` draw them.
    """
    if request.node.get_closest_marker("curves") is None:
        empty = Image.new("RGB", (1, 1))
        monkeypatch.setattr("imaging.pictures.curves", lambda path, _: empty.save(path))


@pytest.fixture
def untested(monkeypatch):
    """Train without the test at the end, where only the training is compared."""
    monkeypatch.setattr("engine.evaluate.test", lambda *_: {})


@pytest.fixture
def options(demo, tmp_path):
    """A training of seconds."""
    import train

    return train.Options(
        variant="mini",
        weights="none",
        data=[str(demo)],
        out=str(tmp_path / "run"),
        cache=str(demo.parent / "cache"),
        size=[64],
        epochs=2,
        batch_size=16,
        lr=1e-3,
        workers=0,
        overlays=2,
    )


def assert_same_scores(ours, theirs):
    """In another place of the memory, sums of floats may differ in their last bits."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert_same_scores(value, theirs[name])
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-12, nan_ok=True)
    else:
        assert ours == theirs


def zipped(folder: Path, archive: Path) -> Path:
    """Write a folder as a zip archive in which it is the only folder."""
    shutil.make_archive(archive.with_suffix(""), "zip", folder.parent, folder.name)
    return archive
