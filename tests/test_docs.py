"""README.md and docs/: links lead somewhere, tables are up to date, and the examples run."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import docs_world
import pytest
from conftest import ROOT

import app
import export
import options
import predict
import prepare
import studies

sys.path.insert(0, str(ROOT / "docs"))
import generate

PAGES = generate.pages()
FENCE = re.compile(
    r"(?P<run><!-- run -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.*)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str, runnable: bool = False) -> list[str]:
    """Return the fenced blocks of a page in a language. runnable: only those marked so."""
    texts = []
    for match in FENCE.finditer(page.read_text()):
        if match["language"] == language and (match["run"] or not runnable):
            texts.append(match["text"])
    return texts


def commands(text: str) -> list[list[str]]:
    """Return the commands of a shell block as arguments, without comments."""
    joined = text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in lines if line]


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- text ---


@pages
def test_generated_tables_are_up_to_date(page):
    text = page.read_text()
    assert generate.generated(text) == text, "run python docs/generate.py"


def anchors(page: Path) -> set[str]:
    """Return the names under which GitHub links to the headings of a page."""
    names = set()
    for match in HEADING.finditer(page.read_text()):
        title = re.sub(r"[^\w\- ]", "", match["title"].lower())
        names.add(title.strip().replace(" ", "-"))
    return names


@pages
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{name_of(page)}: {match['target']} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)}: {match['target']} has no heading"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    prose = FENCE.sub("", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\d+\. |- |\|)", prose):
        if not paragraph.startswith(("|", "<!--")):
            assert len(paragraph.split()) <= 60, paragraph


# --- commands ---


PROGRAMS = ("train.py", "predict.py", "prepare.py", "export.py", "app.py", "studies.py")


def parse(program: str, arguments: list[str], monkeypatch) -> None:
    """Parse the arguments of one of our programs; a mistake in them ends in SystemExit."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program == "train.py":
        given = options.parse("", arguments)
        options.checked(options.Options(**given))
    elif program == "predict.py":
        predict.parse()
    elif program == "export.py":
        export.parse()
    elif program == "app.py":
        app.parse()
    elif program == "studies.py":
        studies.parse()
    else:
        prepare.parser().parse_args(arguments)


@pages
def test_commands_have_options_that_exist(page, monkeypatch):
    for text in blocks(page, "sh"):
        for command in commands(text):
            if command[0] == "make":
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            if command[0] not in ("python", ".venv-app/bin/python"):
                continue
            assert (ROOT / command[1]).exists(), command
            if command[1] in PROGRAMS:
                parse(command[1], command[2:], monkeypatch)


# What makes a training take seconds. Options of a command come first where both set one.
QUICK = ["--max-steps", "2", "--batch-size", "2", "--workers", "0", "--overlays", "1"]
QUICK_IMAGES = ["--size", "64"]
QUICK_VOLUMES = ["--size", "64", "64", "64", "--spacing", "6", "6", "6", "--overlap", "0"]
NO_SIZE = ("sam_decoder",)
VOLUME_MODELS = ("swin_unetr3d", "universal", "fewshot3d", "text_swin_unetr")


def quick(arguments: list[str]) -> list[str]:
    """Return the arguments of a training with settings under which it takes seconds."""
    given = options.parse("", arguments)
    if "resume" in given:
        return arguments

    resolved = options.resolve(options.Options(**given))
    if resolved.eval:
        return [*arguments, "--out", resolved.out]

    added = ["--out", resolved.out, *QUICK]
    if given.get("weights") == "none":
        added += ["--variant", "mini"]
    if resolved.model in VOLUME_MODELS:
        added += QUICK_VOLUMES
    elif resolved.model not in NO_SIZE:
        added += QUICK_IMAGES
    if "epochs" not in given:
        added += ["--epochs", "1"]
    return added + arguments


@dataclass
class Run:
    command: list[str]
    status: int
    output: str


def run(command: list[str], world: Path) -> Run:
    done = subprocess.run(
        command,
        cwd=world,
        env=docs_world.environment(world),
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Run(command, done.returncode, done.stdout + done.stderr)


@pytest.fixture
def world(tmp_path):
    docs_world.build(tmp_path)
    return tmp_path


RUNNABLE = [page for page in PAGES if blocks(page, "sh", runnable=True)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_runnable_commands_run(page, world, monkeypatch):
    monkeypatch.chdir(world)
    for text in blocks(page, "sh", runnable=True):
        for _, program, *arguments in commands(text):
            if program == "train.py":
                arguments = quick(arguments)
            done = run([sys.executable, str(ROOT / program), *arguments], world)
            has_findings = arguments[0] == "check" and done.status == 1
            assert done.status == 0 or has_findings, done


# --- Python ---

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def python_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    docs_world.build(folder)
    docs_world.write_runs(folder)
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, python_world):
    """The blocks of a page run after each other in one process."""
    text = "\n".join(blocks(page, "python"))
    done = run([sys.executable, "-c", text], python_world)
    assert done.status == 0, done.output
