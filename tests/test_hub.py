"""Weights from the hub, in processes that only know tests/hub.py: downloads, cache, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save_file

import cris

ID = "timm/resnet50_clip.openai"
FILE = "open_clip_model.safetensors"
# Loads from each source, as a program does that shows its user errors, and prints what came of it.
PROGRAM = """
import json, sys, traceback
from pathlib import Path
from safetensors.torch import save_file
from cris import CRIS
for i, source in enumerate(sys.argv[2:]):
    try:
        model = CRIS.from_pretrained(source)
        told = {"saved": str(Path(sys.argv[1], f"{i}.safetensors"))}
        save_file(model.backbone.state_dict(), told["saved"])
    except (OSError, ValueError) as error:
        shown = "".join(traceback.format_exception(error))
        told = {
            "error": str(error),
            "kinds": [kind.__name__ for kind in type(error).__mro__],
            "chain": "During handling" in shown or "direct cause" in shown,
        }
    print(json.dumps(told), flush=True)
"""


def clip(seed: int) -> dict[str, torch.Tensor]:
    """A CLIP of the mini size under its official names, other numbers for each seed."""
    torch.manual_seed(seed)
    whole = cris.CRIS(cris.VARIANTS["mini"]).backbone.state_dict()
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else t
        for name, t in whole.items()
        if ".connect." not in name  # CRIS's own
    }


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The official repository in two revisions, and one that holds something else."""
    folder = tmp_path_factory.mktemp("repositories")
    for seed, revision in enumerate(("main", "v1")):
        (folder / ID / revision).mkdir(parents=True)
        save_file(clip(seed), folder / ID / revision / FILE)
        (folder / ID / revision / "config.json").write_text('{"architecture": "resnet50_clip"}')
    (folder / "someone/else/main").mkdir(parents=True)
    (folder / "someone/else/main/model.onnx").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture
def hub(repositories):
    with Hub(repositories) as hub:
        yield hub


def load(hub, home, *sources, **environment):
    """Loads one after the other in a process -> what became of each, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home), *sources],
        env=hub.environment(home) | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == len(sources)
    return told, done.stdout


def assert_loaded(told: dict, official):
    assert "error" not in told, told
    loaded = load_file(told["saved"])
    for name, tensor in load_file(official).items():
        assert torch.equal(loaded[name], tensor), name


def assert_is_one_plain_line(told: dict, kind: str, *words: str):
    assert kind in told["kinds"], told
    assert "\n" not in told["error"] and len(told["error"]) < 400, told["error"]
    assert not told["chain"], "a traceback would show the client's own errors too"
    for word in words:
        assert word.lower() in told["error"].lower(), told["error"]


def test_fetches_once_and_then_needs_no_network(repositories, tmp_path):
    main, v1 = (repositories / ID / revision / FILE for revision in ("main", "v1"))
    with Hub(repositories) as hub:
        told, printed = load(hub, tmp_path, ID, f"{ID}@v1", ID, f"{ID}@v1")
    for one, official in zip(told, (main, v1, main, v1), strict=True):
        assert_loaded(one, official)
    announced = [line for line in printed.splitlines() if line.startswith("downloading")]
    assert [line.split()[1] for line in announced] == ["config.json,", f"{FILE},"] * 2
    lines = [line for line in announced if FILE in line]
    assert "@v1" not in lines[0] and f"{ID}@v1" in lines[1]
    for part in (FILE, ID, hub.url, f"{main.stat().st_size / 1e6:.1f} MB"):
        assert part in lines[0]
    assert len([asked for asked in hub.requests if asked.startswith("GET /cdn/")]) == 2

    sources = [f"{ID}@v1", ID, f"{ID}@{hub.commit(ID, 'v1')}"]
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # the port is closed now
        told, printed = load(hub, tmp_path, *sources, **environment)
        for one, official in zip(told, (v1, main, v1), strict=True):
            assert_loaded(one, official)
        assert "downloading" not in printed


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    sources = ["timm/resnet_50", f"{ID}@v9", "someone/else", "resnet50"]
    told, printed = load(hub, tmp_path, *sources)
    repository, revision, file, name = told
    assert_is_one_plain_line(repository, "FileNotFoundError", "timm/resnet_50", "repository")
    assert_is_one_plain_line(revision, "FileNotFoundError", ID, "v9", "revision")
    assert_is_one_plain_line(file, "FileNotFoundError", "someone/else", FILE)
    assert "connection" not in file["error"]  # the connection is fine
    assert_is_one_plain_line(name, "FileNotFoundError", "resnet50", "owner/name")
    assert "downloading" not in printed


def test_a_broken_download_was_announced_is_told_and_leaves_nothing_behind(
    hub, repositories, tmp_path
):
    hub.cut = 100_000
    told, printed = load(hub, tmp_path, ID)
    assert_is_one_plain_line(told[0], "OSError", ID, "connection")
    assert "downloading" in printed  # so it is said before it is done
    hub.cut = None
    told, _ = load(hub, tmp_path, ID)
    assert_loaded(told[0], repositories / ID / "main" / FILE)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_and_nothing_cached(repositories, tmp_path, environment):
    with Hub(repositories) as hub:
        pass
    told, printed = load(hub, tmp_path, ID, f"{ID}@v1", **environment)
    for one, source in zip(told, (ID, f"{ID}@v1"), strict=True):
        assert_is_one_plain_line(one, "OSError", source, "hub", "file")
    assert "downloading" not in printed
