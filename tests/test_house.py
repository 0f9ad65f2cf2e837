"""Rules for every file: order of imports, files that work alone, shared blocks, function length."""

import ast
import re
import sys

import pytest
from conftest import ROOT

# Files that hold one model each and import nothing of ours but tokenizer.py, where they need it.
MODELS = (
    "beit",
    "biomedclipseg",
    "clipseg",
    "cris",
    "dpt",
    "sam_decoder",
    "segformer",
    "swin_unetr3d",
    "upernet",
)
# Floors, from the lowest. A floor imports only from floors below its own; within a folder, and
# among the files of one floor, imports have no circles.
FLOORS = [
    ["tokenizer", "losses", "metrics", "imaging"],
    [*MODELS],
    ["data"],
    ["universal"],
    ["fewshot3d"],
    ["engine"],
    ["recipes"],
    ["preparation"],
    ["prediction"],
    ["exporting", "page"],
    ["options"],
    ["train", "predict", "prepare", "export", "app"],
    ["studies"],
]
FOLDERS = ("imaging", "engine", "recipes", "preparation", "prediction", "exporting", "page")


def floor_of(module: str) -> int:
    """Return the floor of a module such as "imaging.nifti", from 0."""
    top = module.split(".")[0]
    (floor,) = (number for number, names in enumerate(FLOORS) if top in names)
    return floor


def our_modules() -> list[str]:
    """Return the dotted names of all modules of the house, as they are imported."""
    files = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        files += (ROOT / folder).glob("*.py")
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)


OURS = our_modules()


def source(name: str) -> str:
    return (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")


def imports(tree) -> set[str]:
    """Top-level module names imported anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
    return names


def shared_blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# shared: (\w+)\n(.*?)^# end shared", text, re.M | re.S))


def our_imports(name: str) -> set[str]:
    """Return the modules of the house that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & set(OURS)) or {node.module}
    packages = {module for module in names if module in FOLDERS}
    return (names & set(OURS)) | {f"{package}.__init__" for package in packages}


def test_the_top_level_holds_what_the_design_names():
    known = {name for floor in FLOORS for name in floor}
    assert {path.stem for path in ROOT.glob("*.py")} == known - set(FOLDERS)


@pytest.mark.parametrize("name", OURS)
def test_imports_go_down_only(name):
    folder = name.split(".")[0]
    for other in our_imports(name):
        in_the_same_folder = folder in FOLDERS and other.split(".")[0] == folder
        is_below = floor_of(other) < floor_of(name)
        assert is_below or in_the_same_folder, f"{name} must not import {other}"
    if folder in MODELS:
        assert our_imports(name) <= {"tokenizer"}, name


def test_no_circle_between_files():
    """Every file can be put behind all that it imports."""
    waiting = {name: our_imports(name) for name in OURS}
    placed = set()
    while waiting:
        ready = [name for name, needed in waiting.items() if needed <= placed]
        assert ready, f"these import each other: {waiting}"
        placed |= {*ready}
        for name in ready:
            del waiting[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_starts_from_torch_and_the_standard_library(name):
    top = ast.Module(
        [
            n
            for n in ast.parse(source(name)).body
            if not isinstance(n, ast.FunctionDef | ast.ClassDef)
        ],
        [],
    )
    assert imports(top) <= set(sys.stdlib_module_names) | {"torch"}


def test_shared_blocks_are_the_same_code_everywhere():
    blocks = {}
    for name in OURS:
        for block, text in shared_blocks(source(name)).items():
            assert text.count("\n") <= 80, f"{name}.py, shared {block}: {text.count(chr(10))} lines"
            blocks.setdefault(block, {})[name] = ast.dump(ast.parse(text))
    assert blocks
    for block, copies in blocks.items():
        assert len(set(copies.values())) == 1, (
            f"shared block {block} differs between {list(copies)}"
        )


# Files that read from top to bottom; methods that load or pass on may use what is further down.
CHAPTERS = (*MODELS, "universal", "fewshot3d")
LOOK_AHEAD = {"from_pretrained", "config_of", "preprocess", "postprocess", "segment"}
LOOK_AHEAD |= {"image_prompt", "to_input_pixels", "check_prompts"}


def names_used_ahead(text: str) -> dict[str, int]:
    """Return the names that a file uses above the line on which it defines them: name -> line."""
    tree = ast.parse(text)
    defined = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for target in targets:
            name = getattr(target, "id", None) or getattr(target, "name", None)
            defined.setdefault(name, node.lineno)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in LOOK_AHEAD:
            node.body = []
    ahead = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.lineno < defined.get(node.id, 0):
            ahead.setdefault(node.id, node.lineno)
    return ahead


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_model_file_reads_from_top_to_bottom(name):
    """Above the line behind which only loading is left, no name is used before it is defined."""
    above, line, _ = source(name).partition("# Nothing under this line is needed to understand the")
    assert line
    ahead = names_used_ahead(source(name))
    used = {word: number for word, number in ahead.items() if number <= above.count("\n")}
    assert not used, f"{name}.py uses {used} ahead of their definitions"
    assert ast.get_docstring(ast.parse(source(name))).count("\n") < 30


def test_a_name_used_ahead_is_found():
    text = "def a():\n    return b() + C\n\n\ndef b():\n    return 1\n\n\nC = 2\n"
    assert names_used_ahead(text) == {"b": 2, "C": 2}


def count_statements(function: ast.FunctionDef) -> int:
    """Return the number of statements in a function's body; its docstring does not count."""
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    has_docstring = ast.get_docstring(function) is not None
    return len(statements) - 1 - has_docstring  # without the `def` itself


@pytest.mark.parametrize("name", OURS)
def test_functions_have_at_most_40_statements(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            count = count_statements(node)
            assert count <= 40, f"{name}.py: {node.name} has {count} statements, more than 40"
