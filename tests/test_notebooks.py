"""The notebooks of docs: without outputs, linked, and run from first cell to last in an empty folder."""

import re
from pathlib import Path

import pytest

import convlora

ROOT = Path(convlora.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDED = {"own-images": ["timm", "torchvision"], "histopathology": [], "from-peft": ["peft"]}
"""The packages that each needs beside convlora."""


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_valid_without_outputs_and_linked_and_its_links_lead_to_files(file):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            compile(cell.source, file.name, "exec")
        else:
            for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
                assert target.startswith("https://") or (file.parent / target.partition("#")[0]).is_file(), target
    assert f"notebooks/{file.name}" in (ROOT / "docs" / "tutorials" / "index.md").read_text(encoding="utf-8")


def test_what_each_notebook_needs_is_known():
    assert [file.stem for file in NOTEBOOKS] == sorted(NEEDED)


@pytest.mark.thorough
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_in_an_empty_folder_without_a_connection(file, tmp_path, monkeypatch):
    for package in ("ipykernel", *NEEDED[file.stem]):
        pytest.importorskip(package)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
