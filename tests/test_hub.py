"""Weights from the hub, in processes of their own whose hub is tests/hub.py: fetched, kept, refused."""

import json
import subprocess
import sys

import cris
import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save_file

ID = "timm/resnet50_clip.openai"
FILE = "open_clip_model.safetensors"
# What a program does with a user's error. The last line is for the test to read.
PROGRAM = """
import json, sys
import torch
from safetensors.torch import save_file
from cris import CRIS
for source in sys.argv[2:]:
    try:
        model = CRIS.from_pretrained(source)
        save_file(model.backbone.state_dict(), sys.argv[1])
        told = {}
    except (OSError, ValueError) as error:
        told = {
            "error": str(error),
            "kind": type(error).__mro__[-4].__name__,
            "chain": bool(error.__cause__) or not error.__suppress_context__,
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
    """Loads one after the other -> what each printed or raised, and the last one's tensors' file."""
    saved = home / "loaded.safetensors"
    saved.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(saved), *sources],
        env=hub.environment(home) | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return told, done.stdout, saved


def assert_holds(saved, official):
    loaded = load_file(saved)
    for name, tensor in load_file(official).items():
        assert torch.equal(loaded[name], tensor), name


def assert_is_one_plain_line(told: dict, kind: str, *words: str):
    assert told["kind"] == kind or kind == "OSError"
    assert "\n" not in told["error"] and len(told["error"]) < 400, told["error"]
    assert not told["chain"], "the traceback would show the client's own errors too"
    for word in words:
        assert word.lower() in told["error"].lower(), told["error"]
