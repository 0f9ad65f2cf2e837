"""The notebooks: made of the .py files beside them, and they run on a CPU without the hub."""

import json

import pytest
from conftest import ROOT

jupytext = pytest.importorskip("jupytext")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
notebooks = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["finetune_on_twenty_images", "read_cris"]


@notebooks
def test_a_notebook_has_the_cells_of_its_source(source):
    written = jupytext.read(source.with_suffix(".ipynb"))
    assert cells(written) == cells(jupytext.read(source)), "run `make notebooks`"


@notebooks
def test_a_notebook_was_run_without_errors(source):
    written = json.loads(source.with_suffix(".ipynb").read_text())
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            assert str(ROOT.parent) not in json.dumps(output), "names a folder of this machine"


@pytest.mark.slow
@notebooks
def test_a_notebook_runs(source, tmp_path, monkeypatch):
    """Run it beside links to the files of the house, so that it writes nothing here."""
    nbclient = pytest.importorskip("nbclient")
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs", "notebooks") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "notebooks").mkdir()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = jupytext.read(source)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
