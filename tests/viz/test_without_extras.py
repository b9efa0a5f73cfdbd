"""With the core dependencies alone every figure is drawn; what needs an extra says which one to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hostile_figures import VIEWS

# What the extras viz and notebook bring along, by the names under which it is imported.
EXTRAS = (
    *("circuitsvis", "anywidget", "ipywidgets", "traitlets", "IPython", "ipykernel", "jupyterlab"),
    *("marimo", "uvicorn", "nbformat", "nbclient", "nbmake", "nbstripout"),
)
CODE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
sys.path.insert(0, sys.argv[2])

import torch
from helpers import example_results, hostile_figures
from hones_lens import explore, viz
from hones_lens.app.cli import main
from hones_lens.app.report.report import write_report

assert main(["models"]) == 0
assert all(getattr(viz, name) for name in viz.__all__)
figures = [make() for make in hostile_figures.VIEWS.values()]
print(len(figures), all(len(figure._repr_png_()) > 5000 for figure in figures[::8]))
print(write_report(sys.argv[3], [example_results.run()]).stat().st_size)
folded = hostile_figures.folded()
values = torch.zeros(folded.cells.inputs.input_ids.shape[1])
for ask in (
    lambda: viz.attention_tokens(folded),
    lambda: viz.coloured_tokens(folded.cells, values),
    lambda: explore(None, None, ""),
):
    try:
        ask()
    except ImportError as error:
        print(error)
"""


@pytest.mark.exhaustive
def test_every_figure_and_the_report_are_drawn_and_the_rest_names_its_extra(tmp_path: Path) -> None:
    given = (" ".join(EXTRAS), str(Path(__file__).parents[1]), str(tmp_path / "report.html"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", CODE, *given]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    models, (drawn, size, *refused) = done.stdout.splitlines()[:-5], done.stdout.splitlines()[-5:]
    assert any(line.startswith("tiny-llava ") for line in models)
    assert drawn == f"{len(VIEWS)} True" and int(size) > 50_000
    tokens = "token views need circuitsvis: pip install hones-lens[viz]; without it, `cell_patterns` and "
    tokens += "`cell_values` draw the same as pictures"
    widget = "the explorer needs the extra `notebook`: pip install hones-lens[notebook]"
    assert refused == [tokens, tokens, widget]
