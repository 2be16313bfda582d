"""Every notebook runs from its first cell to its last, in one kernel, on the tiny model and with small numbers."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL = {
    "N_CALIBRATION": 8, "N_ITEMS": 4, "N_TRAIN": 4, "MAX_NEW_TOKENS": 4, "EPOCHS": 1, "DRAWS": 2, "RANKS": [2, 4],
    "EVERY": 2,
}  # fmt: skip
"""What the parameters are in the tests; a notebook has those that its cell tagged `parameters` names."""


def _parameters(notebook):
    return next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all, since importing torch takes longer than a notebook on the tiny model."""
    environment = {**os.environ, "PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")), env=environment)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def model(tiny_llama_dir, tmp_path_factory):
    """The tiny Llama with room for programs, which take many of its tokens."""
    roomy = tmp_path_factory.mktemp("roomy") / "tiny_c"
    shutil.copytree(tiny_llama_dir, roomy)
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return roomy


def test_all_seven_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text and "/tmp/" not in text and "import _" not in text and "._" not in text
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and "**Question.**" in first.source
    assert any(cell.source.startswith("## Answer") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_end_to_end(path, kernel, model):
    notebook = nbformat.read(path, as_version=4)
    at = _parameters(notebook)
    named = notebook.cells[at].source
    given = {"MODEL": str(model), **{name: value for name, value in SMALL.items() if f"{name} =" in named}}
    assert "MODEL =" in named
    small = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(small))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=240).execute()  # raises with the cell's traceback
    last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in last)
    figures = [
        output["data"]["application/vnd.plotly.v1+json"]
        for cell in last
        for output in cell.outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert figures, "a notebook shows something"
    for figure in figures:
        assert figure["layout"]["title"]["text"] and figure["data"]
    errors = [output for cell in last for output in cell.outputs if output.output_type == "error"]
    assert not errors


def test_pages_in_the_docs_are_small_and_whole_and_show_the_notebooks_code():
    pages = Path(__file__).parent.parent / "docs" / "notebooks"
    for path in NOTEBOOKS:
        page = pages / f"{path.stem}.html"
        text = page.read_text(encoding="utf-8")
        assert page.stat().st_size < 2**20
        assert "<script" not in text and 'src="http' not in text and "<link" not in text
        assert "Traceback (most" not in text and "data:image/svg+xml" in text
        shown = "".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert "".join(cell.source.split()) in shown, cell.source
