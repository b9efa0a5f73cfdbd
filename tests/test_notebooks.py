"""The notebooks: stripped of outputs, and the one for large models executed on the shipped ones.

`make notebooks` executes them all, that one by way of the test here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_there_are_eight_and_each_begins_with_its_title():
    assert [n.name[:3] for n in NOTEBOOKS] == [f"0{i}_" for i in range(1, 9)]
    for notebook in NOTEBOOKS:
        assert cells(notebook)[0]["source"][0].startswith(f"# {notebook.name[:2]} · ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_it_is_stripped_and_ends_in_a_finding_that_it_asserts(notebook):
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    headings = [line for cell in cells(notebook) for line in cell["source"] if line.startswith("## ")]
    assert headings[-1].strip() == "## Finding"
    assert "assert " in "".join(code[-1]["source"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_the_one_for_large_models_runs_on_the_shipped_ones(name, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("HONES_LENS_MODEL", name)
    monkeypatch.setenv("HONES_LENS_RUNS", str(tmp_path))
    notebook = nbformat.read(FOLDER / "08_llava_and_qwen_7b_on_a_gpu.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    assert (tmp_path / f"{name}-vqa" / "report.html").stat().st_size > 10_000
