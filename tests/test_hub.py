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
import json, sys, traceback
import torch
from safetensors.torch import save_file
from cris import CRIS
for source in sys.argv[2:]:
    try:
        model = CRIS.from_pretrained(source)
        save_file(model.backbone.state_dict(), sys.argv[1])
        told = {}
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
    assert kind in told["kinds"], told
    assert "\n" not in told["error"] and len(told["error"]) < 400, told["error"]
    assert not told["chain"], "a traceback would show the client's own errors too"
    for word in words:
        assert word.lower() in told["error"].lower(), told["error"]


def test_fetches_the_first_time_and_never_again(hub, repositories, tmp_path):
    told, printed, saved = load(hub, tmp_path, ID)
    assert told == [{}]
    assert_holds(saved, repositories / ID / "main" / FILE)
    size = (repositories / ID / "main" / FILE).stat().st_size
    line = next(line for line in printed.splitlines() if line.startswith("downloading"))
    for part in (FILE, ID, hub.url, f"{size / 1e6:.1f} MB"):
        assert part in line

    asked = len(hub.requests)
    told, printed, saved = load(hub, tmp_path, ID)
    assert told == [{}] and "downloading" not in printed
    assert len(hub.requests) == asked, hub.requests[asked:]
    assert_holds(saved, repositories / ID / "main" / FILE)


def test_a_revision_is_a_version_of_its_own(hub, repositories, tmp_path):
    told, _, saved = load(hub, tmp_path, ID, f"{ID}@v1")
    assert told == [{}, {}]
    assert_holds(saved, repositories / ID / "v1" / FILE)
    told, _, saved = load(hub, tmp_path, f"{ID}@v1", ID)  # from the cache, in the other order
    assert_holds(saved, repositories / ID / "main" / FILE)
    told, _, saved = load(hub, tmp_path, f"{ID}@{hub.commit(ID, 'v1')}")
    assert told == [{}]
    assert_holds(saved, repositories / ID / "v1" / FILE)


def test_says_what_from_where_and_how_large_before_it_downloads(hub, tmp_path):
    hub.cut = 0
    told, printed, _ = load(hub, tmp_path, ID)
    announced, failed = printed.index("downloading"), printed.index(told[0]["error"][:20])
    assert announced < failed


def test_works_without_a_network_once_cached(repositories, tmp_path):
    with Hub(repositories) as hub:
        load(hub, tmp_path, ID, f"{ID}@v1")
    told, _, saved = load(hub, tmp_path, ID, f"{ID}@v1")  # the port is closed now
    assert told == [{}, {}]
    assert_holds(saved, repositories / ID / "v1" / FILE)
    told, _, saved = load(hub, tmp_path, f"{ID}@v1", ID, HF_HUB_OFFLINE="1")
    assert told == [{}, {}]
    assert_holds(saved, repositories / ID / "main" / FILE)


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    sources = ["timm/resnet_50", f"{ID}@v9", "someone/else", "resnet50"]
    told, printed, _ = load(hub, tmp_path, *sources)
    repository, revision, file, name = told
    assert_is_one_plain_line(repository, "FileNotFoundError", "timm/resnet_50", "repository")
    assert_is_one_plain_line(revision, "FileNotFoundError", ID, "v9", "revision")
    assert_is_one_plain_line(file, "FileNotFoundError", "someone/else", FILE)
    assert "connection" not in file["error"]  # the connection is fine
    assert_is_one_plain_line(name, "FileNotFoundError", "resnet50", "owner/name")
    assert "downloading" not in printed


def test_a_broken_download_is_told_and_leaves_nothing_behind(hub, repositories, tmp_path):
    hub.cut = 100_000
    told, _, _ = load(hub, tmp_path, ID)
    assert_is_one_plain_line(told[0], "OSError", ID, "connection")
    hub.cut = None
    told, _, saved = load(hub, tmp_path, ID)
    assert told == [{}]
    assert_holds(saved, repositories / ID / "main" / FILE)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_and_nothing_cached(repositories, tmp_path, environment):
    with Hub(repositories) as hub:
        pass
    told, printed, _ = load(hub, tmp_path, ID, f"{ID}@v1", **environment)
    for one, source in zip(told, (ID, f"{ID}@v1"), strict=True):
        assert_is_one_plain_line(one, "OSError", source, "hub", "file")
    assert "downloading" not in printed
