"""export.py --push-to-hub, and loading what it uploaded, against the hub of tests/hub.py."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, command, contents, randomised, rows, write_run
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import load_file

import biomedclipseg
import cris
import export
import options as options_file
import predict
import segformer
import train
from engine import runs
from exporting import model_card, paths
from prediction.models import find_weights, load_model

REPOSITORY = "someone/polyps"
WEIGHTS = "model.safetensors"
TOKENS = {"writer": "write", "reader": "read"}
# Loads a repository, and writes the weights that it has.
LOAD = """
import sys
from cris import CRIS
from safetensors.torch import save_file
model = CRIS.from_pretrained(sys.argv[1])
print(model.config.threshold)
save_file({name: t.contiguous() for name, t in model.state_dict().items()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory) -> Path:
    """A trained and tested run of a small CRIS."""
    folder = tmp_path_factory.mktemp("hub")
    settings = train.Options(
        model="cris", variant="mini", weights="none", data=[str(demo)], out=str(folder / "run"),
        cache=str(folder / "cache"), size=[64], max_steps=2, batch_size=8, prompt="p1", workers=0,
        overlays=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imaging.pictures.curves", lambda path, _: path.touch())
        train.run(settings)
    return folder / "run"


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "repositories") as hub:
        hub.folder.mkdir()
        hub.tokens |= TOKENS
        yield hub


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """The same hub for programs in this process, with an empty cache."""
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "writer")
    return hub


def start(hub, home, *words, token=None) -> tuple[int, str, str]:
    """Run a program in a process of its own: exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=hub.environment(home, token),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def push(monkeypatch, capsys, run, *more, repository=REPOSITORY) -> tuple[int, str, str]:
    """Upload a run in this process: exit status, stdout, the last line of stderr."""
    arguments = ("--weights", run, "--push-to-hub", repository)
    status, out, err = command(monkeypatch, capsys, export, *arguments, *more)
    return status, out, err.strip().splitlines()[-1] if err.strip() else ""


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pushed_run_gives_the_same_results_elsewhere(
    hub, run, demo, tmp_path, monkeypatch, capsys
):
    status, printed, _ = start(
        hub, tmp_path / "home", "export.py", "--weights", run, "--push-to-hub", REPOSITORY,
        token="writer",
    )  # fmt: skip
    assert status == 0
    names = ["model.safetensors", "config.json", "README.md"]
    assert [sorted(commit) for commit in hub.commits[REPOSITORY]] == [sorted(names)]
    assert f"uploading to {hub.url}/{REPOSITORY} (public, new):" in printed
    size = (run / "best.safetensors").stat().st_size
    assert any("model.safetensors" in line and f"{size:,}" in line for line in printed.split("\n"))
    assert not hub.private

    arguments = ["--out", tmp_path / "there", "--probabilities", demo, "--device", "cpu"]
    status, printed, err = start(
        hub, tmp_path / "other", "predict.py", "--weights", REPOSITORY, *arguments
    )
    assert status == 0, err
    assert "downloading config.json" in printed and printed.count("downloading") == 2
    arguments[1] = tmp_path / "here"
    assert command(monkeypatch, capsys, predict, "--weights", run, *arguments)[0] == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")

    # What is cached needs no network.
    with Hub(tmp_path) as closed:
        pass
    status, printed, err = start(
        closed, tmp_path / "other", "-c", LOAD, REPOSITORY, tmp_path / "loaded.safetensors"
    )
    assert status == 0 and "downloading" not in printed, err
    ours = load_file(run / "best.safetensors")
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert ours.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.items())


def test_a_repository_is_loaded_by_its_id(here, run, demo, tmp_path, monkeypatch, capsys):
    """The quick version of the test above, in this process."""
    assert push(monkeypatch, capsys, run)[0] == 0
    loaded = cris.CRIS.from_pretrained(REPOSITORY)
    expected = cris.CRIS.from_pretrained(run)
    assert loaded.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    masks = []
    capsys.readouterr()
    for source in (REPOSITORY, run):
        out = tmp_path / f"out{len(masks)}"
        words = ("--weights", source, "--out", out, "--device", "cpu", demo, "--split", "val")
        status, printed, err = command(monkeypatch, capsys, predict, *words)
        assert status == 0 and "downloading" not in printed, err
        masks.append(contents(out))
    assert masks[0] == masks[1] and len(masks[0]) > 2


@pytest.mark.slow
def test_a_private_repository_needs_a_token(hub, run, tmp_path):
    arguments = ("--weights", run, "--push-to-hub", REPOSITORY, "--private")
    status, printed, _ = start(hub, tmp_path / "a", "export.py", *arguments, token="writer")
    assert status == 0 and "(private, new)" in printed and hub.private == {REPOSITORY}

    words = ("predict.py", "--weights", REPOSITORY, "--out", tmp_path / "out", "photo.png")
    status, _, err = start(hub, tmp_path / "b", *words)
    assert status == 2 and "gated or private, or does not exist" in err and "log in" in err
    status, printed, err = start(hub, tmp_path / "b", *words, token="reader")
    assert "downloading config.json" in printed and "private" not in err


def test_a_second_push_is_a_new_commit(here, run, tmp_path, monkeypatch, capsys):
    assert push(monkeypatch, capsys, run)[0] == 0
    before = contents(here.folder)
    status, printed, _ = push(monkeypatch, capsys, run)
    assert status == 0 and "exists; files of these names are replaced in a new commit" in printed
    assert contents(here.folder) == before and len(here.commits[REPOSITORY]) == 2


def test_train_tests_a_pushed_run_as_it_does_the_run(run, demo, tmp_path, monkeypatch):
    """Options and masks of a run are known by its hub id, too."""
    monkeypatch.setattr(runs, "hub_config_file", lambda *_: run / "config.json")
    by_id = train.Options(weights=REPOSITORY, eval=True, test=[str(demo)])
    by_folder = replace(by_id, weights=str(run))
    tested = options_file.as_tested(by_id)
    assert replace(tested, weights="") == replace(options_file.as_tested(by_folder), weights="")
    assert (tested.model, tested.prompt) == ("cris", "p1")


# --- what is uploaded -----------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_uploaded(here, run, demo, monkeypatch, capsys):
    assert push(monkeypatch, capsys, run)[0] == 0
    folder = here.folder / REPOSITORY / "main"
    for name in ("config.json", "README.md"):
        text = (folder / name).read_text()
        for part in (demo, run):
            assert str(part.parent) not in text, name
    uploaded = json.loads((folder / "config.json").read_text())
    original = json.loads((run / "config.json").read_text())
    assert uploaded["options"]["data"] == [demo.name]
    assert uploaded["options"]["cache"] == "cache"
    for key in ("config", "classes", "masks", "data"):
        assert uploaded[key] == original[key]


def test_every_option_that_names_a_path_is_known():
    named = set()
    for spec in fields(train.Options):
        if spec.metadata["argparse"].get("metavar") in ("DIR", "FILE", "SOURCE"):
            named.add(spec.name)
    assert named == {*paths.PATH_OPTIONS, *paths.SOURCE_OPTIONS}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/data/model.pth", "model.pth"),
        ("C:\\Users\\me\\model.pth", "model.pth"),
        ("nvidia/segformer-b0-finetuned-ade-512-512", "nvidia/segformer-b0-finetuned-ade-512-512"),
        ("owner/name@v1", "owner/name@v1"),
        ("tests/old", "old"),  # there is a folder tests
        ("runs/old", "old"),
        ("none", "none"),
    ],
)
def test_names_of_sources(source, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paths.without_folders(source) == name


def test_the_vocabulary_of_biomedclipseg_lies_in_the_repository(
    here, tmp_path, monkeypatch, capsys
):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    mini = biomedclipseg.VARIANTS["mini"]
    model = randomised(biomedclipseg.BiomedCLIPSeg(mini))
    config = replace(mini, vocabulary=str(vocabulary))
    folder = write_run(tmp_path / "run", type(model), model.state_dict(), config, decoder=None)
    (folder / "vocab.txt").write_bytes(vocabulary.read_bytes())
    assert push(monkeypatch, capsys, folder)[0] == 0

    uploaded = here.folder / REPOSITORY / "main"
    assert (uploaded / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    assert json.loads((uploaded / "config.json").read_text())["config"]["vocabulary"] == REPOSITORY
    loaded = biomedclipseg.BiomedCLIPSeg.from_pretrained(uploaded)
    assert Path(loaded.config.vocabulary) == uploaded / "vocab.txt"


# --- the model card -------------------------------------------------------------------------------


def card_of(folder) -> model_card.Card:
    weights = find_weights(str(folder))
    return model_card.Card(weights, load_model(weights, "cpu").model, folder, REPOSITORY)


def test_the_card_says_what_the_files_of_the_run_say(run, demo):
    text = card_of(run).text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata == {
        "library_name": "pytorch",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical", "segmentation", "cris", "2d"],
        "datasets": [demo.name],
        "license": "other",
    }

    summary = json.loads((run / "test/summary.json").read_text())["tests"][demo.name]
    dice = summary["dice"]
    interval = f"{dice['low']:.4f} to {dice['high']:.4f}"
    assert f"| dice | {dice['mean']:.4f} | {interval} | {dice['n']} |" in text
    scored = sorted(rows(run / "test/per_image.csv"), key=lambda row: float(row["dice"]))
    for row in scored[:5]:
        case = f"| {demo.name} | {row['name']} | {row['class']} | {float(row['dice']):.4f} |"
        assert case in text
    assert f"It was tested on {summary['images']} images." in text
    assert "not a medical device" in text and "https://arxiv.org/abs/2111.15174" in text
    assert f'CRIS.from_pretrained("{REPOSITORY}")' in text


def test_the_card_of_an_untested_run_says_so(tmp_path):
    model = randomised(segformer.SegFormer(segformer.VARIANTS["mini"]))
    options = {"weights": None, "variant": "b0", "data": ["/a/b/kvasir:train_10"]}
    folder = write_run(tmp_path / "r", type(model), model.state_dict(), model.config,
                       options=options, recipe="default")  # fmt: skip
    text = card_of(folder).text()
    assert "**This model was not tested.**" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["base_model"] == ["nvidia/segformer-b0-finetuned-ade-512-512"]
    assert metadata["license"] == "other" and "research and evaluation only" in text
    assert metadata["datasets"] == ["kvasir"]


def test_the_card_of_a_prompt_study_has_every_type(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "study"))
    summary = json.loads((run / "test/summary.json").read_text())
    ((name, scores),) = summary["tests"].items()
    summary["tests"] = {name: {"p0": scores, "p1": scores}}
    (folder / "test/summary.json").write_text(json.dumps(summary))
    text = card_of(folder).text()
    assert f"### {name}, prompt p0, 20 images" in text and f"### {name}, prompt p1," in text
    assert "It was tested on 20 images." in text


def test_the_files_of_a_damaged_run_are_named(here, run, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "damaged"))
    (folder / "test/summary.json").write_text('{"tests": {"demo": {"images": 3}}}')
    status, _, line = push(monkeypatch, capsys, folder)
    assert status == 2 and "not as train.py wrote them (KeyError('misses'))" in line
    assert not here.commits


def test_licences_and_papers_are_those_of_the_credits():
    credits = (ROOT / "docs/credits.md").read_text()
    for papers in model_card.PAPERS.values():
        for paper in papers:
            assert paper.rpartition(" ")[2] in credits, paper

    table = credits.split("licence of the weights")[1]
    stated = {}  # model -> licence of its weights
    for line in table.splitlines()[2:]:
        if not line:
            break
        _, model, _, licence, _ = line.split("|")
        stated[model.strip()] = licence
    for start, model, name, words in (
        ("timm/resnet", "CLIP", "mit", "MIT"),
        ("CIDAS/clipseg", "CLIPSeg", "other", "excludes the weights"),
        ("microsoft/BiomedCLIP", "BiomedCLIP", "mit", "MIT"),
        ("nvidia/", "SegFormer", "other", "research and evaluation only"),
        ("openmmlab/upernet-convnext", "UPerNet", "mit", "on the hub MIT"),
        ("Intel/dpt-large", "DPT", "apache-2.0", "on the hub Apache 2.0"),
        ("microsoft/beit-", "BEiT", "apache-2.0", "on the hub Apache 2.0"),
        ("facebook/sam-vit", "SAM", "apache-2.0", "Apache 2.0"),
        ("darragh/swinunetr", "Swin UNETR", "apache-2.0", "Apache 2.0"),
    ):
        assert words in stated[model] and model_card.LICENCES[start][0] == name
    assert len(model_card.LICENCES) == 9
    assert model_card.licence_of("wanglab/medsam-vit-base") == ("other", "not checked")


# --- refusals of an upload ------------------------------------------------------------------------


def test_uploads_that_are_refused_before_anything_is_sent(here, run, monkeypatch, capsys):
    cases = [
        ((run,), {"repository": "polyps"}, "must be OWNER/NAME"),
        ((run, "--decoder", "x", "--model", "biomedclipseg"), {}, "--decoder: a run is uploaded"),
        ((run / "test", "--model", "cris"), {}, "is not a run folder"),
    ]
    for arguments, more, words in cases:
        status, _, line = push(monkeypatch, capsys, *arguments, **more)
        assert status == 2 and words in line, line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    status, _, line = push(monkeypatch, capsys, run)
    assert status == 2 and "hf auth login" in line and "HF_TOKEN" in line
    assert not [asked for asked in here.requests if not asked.startswith("GET")]


@pytest.mark.parametrize(
    ("token", "words"),
    [("stranger", "refuses the token"), ("reader", "token may not write there")],
)
def test_tokens_that_may_not_write(token, words, here, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    status, _, line = push(monkeypatch, capsys, run)
    assert status == 2 and line.startswith(f"error: {REPOSITORY}: ") and words in line
    assert not here.commits


def test_private_does_not_make_a_public_repository_private(here, run, monkeypatch, capsys):
    (here.folder / REPOSITORY / "main").mkdir(parents=True)
    status, _, line = push(monkeypatch, capsys, run, "--private")
    assert status == 2 and "exists and is public" in line and not here.commits


@pytest.mark.parametrize("step", ["/storage/", f"/api/models/{REPOSITORY}/commit"])
def test_a_cut_connection_leaves_no_commit(step, here, run, monkeypatch, capsys):
    here.broken = step
    status, _, line = push(monkeypatch, capsys, run)
    assert status == 2 and "could not be uploaded" in line and "again" in line, line
    assert not here.commits

    here.broken = None
    status, _, line = push(monkeypatch, capsys, run)
    assert status == 0 and len(here.commits[REPOSITORY]) == 1, line


def test_a_run_that_was_never_validated(here, tmp_path, monkeypatch, capsys):
    model = segformer.SegFormer(segformer.VARIANTS["mini"])
    folder = write_run(tmp_path / "r", type(model), model.state_dict(), model.config)
    (folder / "best.safetensors").rename(folder / "last.pt")
    status, _, line = push(monkeypatch, capsys, folder)
    assert status == 2 and "has no best.safetensors" in line


# --- refusals of a download -----------------------------------------------------------------------


@pytest.fixture
def pushed(here) -> Path:
    """The folder of a repository with a small SegFormer."""
    model = segformer.SegFormer(segformer.VARIANTS["mini"])
    folder = here.folder / REPOSITORY / "main"
    folder.mkdir(parents=True)
    write_run(folder, type(model), model.state_dict(), model.config)
    (folder / "best.safetensors").rename(folder / WEIGHTS)
    return folder


def refusal(kind=OSError) -> str:
    """Return the one line with which loading fails; no error of the client is part of it."""
    with pytest.raises(kind) as raised:
        segformer.SegFormer.from_pretrained(REPOSITORY)
    assert type(raised.value) is kind and raised.value.__cause__ is None
    assert raised.value.__suppress_context__ and "\n" not in str(raised.value)
    return str(raised.value)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_file_that_arrives_damaged_is_never_used(here, pushed, capsys):
    here.altered = {WEIGHTS}
    for _ in range(2):
        line = refusal()
        assert REPOSITORY in line and f"{WEIGHTS} arrived damaged, its SHA-256 is wrong" in line
    here.altered = set()
    segformer.SegFormer.from_pretrained(REPOSITORY)
    assert capsys.readouterr().out.count(f"downloading {WEIGHTS}") == 3


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(here, pushed, capsys):
    expected = segformer.SegFormer.from_pretrained(REPOSITORY).state_dict()
    (cached,) = Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{WEIGHTS}")
    flip_last_bit(cached.resolve())
    capsys.readouterr()
    loaded = segformer.SegFormer.from_pretrained(REPOSITORY).state_dict()
    printed = capsys.readouterr().out
    assert f"{REPOSITORY}: {WEIGHTS} in the cache was damaged; it was removed" in printed
    assert f"downloading {WEIGHTS}" in printed and "downloading config.json" not in printed
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    flip_last_bit(cached.resolve())
    here.private = {REPOSITORY}
    here.tokens.clear()
    assert "refuses the token" in refusal()
    assert not cached.exists()


def test_repositories_that_may_not_be_read(here, pushed, monkeypatch):
    here.gated = {REPOSITORY}
    line = refusal()
    assert f"is gated; accept its terms at {here.url}/{REPOSITORY}" in line and "HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "stranger")
    assert "refuses the token" in refusal()

    here.gated, here.private = set(), {REPOSITORY}
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(FileNotFoundError)
    assert "gated or private, or does not exist" in line and "log in" in line


def test_a_cut_download_is_never_used(here, pushed, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    here.cut = 100_000
    assert "could not be downloaded from the hub" in refusal()
    here.cut = None
    segformer.SegFormer.from_pretrained(REPOSITORY)


def test_predict_says_why_a_repository_cannot_be_read(here, pushed, tmp_path, monkeypatch, capsys):
    """The model is named by config.json, which is asked for first."""
    here.private = {REPOSITORY}
    here.tokens.clear()
    monkeypatch.delenv("HF_TOKEN")
    words = ("--weights", REPOSITORY, "--out", tmp_path / "out", "photo.png")
    status, _, err = command(monkeypatch, capsys, predict, *words)
    assert status == 2 and err.count("\n") == 1 and "gated or private" in err


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    monkeypatch.setattr(runs, "hub_config_file", pytest.fail)
    assert runs.read_run("runs/missing") == runs.read_run("models/missing") == {}
    assert runs.read_run("none") == runs.read_run("elsewhere/model.pth") == {}


def test_a_revision_has_its_own_config(here, pushed):
    shutil.copytree(pushed, pushed.parent / "v1")
    config = json.loads((pushed / "config.json").read_text())
    config["config"]["threshold"] = 0.3
    (pushed.parent / "v1/config.json").write_text(json.dumps(config))
    assert runs.read_run(f"{REPOSITORY}@v1")["config"]["threshold"] == 0.3
    assert runs.read_run(REPOSITORY)["config"]["threshold"] == 0.5
    assert segformer.SegFormer.from_pretrained(f"{REPOSITORY}@v1").config.threshold == 0.3


def test_official_weights_are_no_run_and_need_no_network_when_cached(here, pushed):
    (pushed / "config.json").unlink()
    assert runs.read_run(REPOSITORY) == {}
    segformer.SegFormer.from_pretrained(REPOSITORY)
    here.requests.clear()
    assert runs.read_run(REPOSITORY) == {}
    segformer.SegFormer.from_pretrained(REPOSITORY)
    assert not here.requests
