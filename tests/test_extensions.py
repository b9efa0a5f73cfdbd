"""Tasks, data sets, rankings and families of somebody else's package, and a task that is not registered.

The package is a folder on the path with one module and the metadata that pip writes at an installation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import outside_lens

import hones_lens as hl
from hones_lens.analysis import counterfactual
from hones_lens.app import (
    DataChoice,
    find_heads,
    find_neurons,
    mask_neurons,
    read_view,
    start_run,
    write_report,
)
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.steering import start_steering, steer_neurons
from hones_lens.app.runs.views import save_report_views
from hones_lens.data.shapes import questions
from hones_lens.hones import learn_scales

ENTRY_POINTS = """
[hones_lens.tasks]
count-discs = outside_lens:TASK
misnamed = outside_lens:TASK
vqa = outside_lens:TASK

[hones_lens.datasets]
discs = outside_lens
listed = outside_lens:Listed

[hones_lens.rankings]
write_norm = outside_lens:write_norm

[hones_lens.families]
outside = outside_lens:OutsideFamily
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(outside_lens.__file__, site / "outside_lens.py")
    info = site / "outside_lens-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-lens\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), root)), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def hones(environment: dict[str, str], folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """What the program `hones` does with these arguments."""
    return run(environment, folder, "-m", "hones_lens.app.cli", *argv)


def python(environment: dict[str, str], folder: Path, code: str) -> list[str]:
    """The lines that a program prints."""
    done = run(environment, folder, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.exhaustive
def test_names_of_an_installed_package_resolve_and_unknown_ones_list_them(environment, tmp_path) -> None:
    code = """
from hones_lens import attribute_neurons, load_examples, load_task
from hones_lens.data import tasks_of
from hones_lens.model.families import load_family
from hones_lens.hones.attribution.attribute import load_ranking
print(type(load_task("count-discs")).__name__, tasks_of("discs"), load_ranking("write_norm").__name__)
print(load_family("outside").__name__, type(load_task("vqa")).__name__)
print([e.text for e in load_examples("discs", "count-discs", "test", 3)])
for load in (load_task, load_ranking, load_family, lambda name: load_examples(name, "vqa", "dev")):
    for name in ("none", "misnamed"):
        try:
            load(name)
        except ValueError as error:
            print(error)
"""
    lines = python(environment, tmp_path, code)
    assert lines[:3] == [
        "CountDiscs ('count-discs',) write_norm",
        "OutsideFamily VQA",  # a name of the package's own can't be taken
        "['one', 'two', 'one']",
    ]
    known = "vqa, ocr, caption, retrieval, vqa-anls, yes-no, count-discs, misnamed"
    assert lines[3] == f"unknown task 'none'; valid: {known}"
    assert lines[4] == "the task registered as 'misnamed', outside_lens:TASK, is named 'count-discs'"
    assert lines[5].startswith("unknown method 'none'; valid: hones, activation_probability")
    assert "random, write_norm" in lines[5]
    families = "llava, llava_next, llava_onevision, vipllava, gemma3, idefics3, smolvlm, qwen2_vl, "
    families += "qwen2_5_vl, qwen3_vl, outside"
    assert lines[7] == f"unknown model family 'none'; valid: {families}"
    assert lines[9].startswith("unknown data set 'none'; valid: shapes, shapes-varied")
    assert "own, discs, listed, hf:" in lines[9]


def test_the_program_offers_what_is_installed_and_does_not_load_it(environment, tmp_path) -> None:
    said = hones(environment, tmp_path, "evaluate", "--help")
    assert "{vqa,ocr,caption,retrieval,vqa-anls,yes-no,count-discs,misnamed,all}" in said.stdout.replace(
        "\n", ""
    )
    wrong = hones(environment, tmp_path, "evaluate", "--task", "count-disks")
    assert wrong.returncode == 2 and "count-discs" in wrong.stderr
    code = (
        "import sys; from hones_lens.app.cli import build_parser; build_parser(); print(sorted(sys.modules))"
    )
    (modules,) = python(environment, tmp_path, code)
    assert "'hones_lens.tasks.registry'" in modules
    assert not any(f"'{name}'" in modules for name in ("outside_lens", "torch", "numpy"))


@pytest.mark.exhaustive
def test_a_data_set_that_is_read_from_files(environment, tmp_path) -> None:
    (tmp_path / "list.txt").write_text("a one\nb two\nc\n")
    code = """
from hones_lens import load_examples
from hones_lens.data import check_data, tasks_of
print(tasks_of("listed", "list.txt"))
skip = {"data_file": "list.txt", "on_error": "skip"}
import warnings; warnings.simplefilter("ignore")
print([(e.id, e.text) for e in load_examples("listed", "count-discs", "all", **skip)])
print(check_data("listed", data_file="list.txt", open_images=False))
"""
    lines = python(environment, tmp_path, code)
    assert lines[:2] == ["('count-discs',)", "[('listed/a', 'one'), ('listed/b', 'two')]"]
    assert "2 usable" in lines[3] and lines[-1].strip().endswith("record c: has no word")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_command_takes_the_task_and_the_data_set(environment, tmp_path) -> None:
    data = ["--task", "count-discs", "--dataset", "discs", "--limit", "12"]
    stages = ["--top-k", "3", "--ratio", "0.01", "--out", "run"]
    commands = [
        ["evaluate", "--dataset", "discs", "--limit", "12", "--json", "evaluation.json"],  # all that it has
        ["localize", *data, *stages],
        ["mask", *data, *stages, "--controls", "2"],
        ["steer", *data, "--out", "run", "--methods", "HONES,Fixed-Amp", "--lr", "0.01", "--epochs", "1"],
        ["patch", *data, "--corrupt", "blank", "--by", "all", "--layers", "0,3", "--out", "patch"],
        ["report", "run", "patch", "--out", "report.html"],
    ]
    code = f"""
import sys
from hones_lens.app.cli import main
for argv in {commands!r}:
    if code := main(argv):
        sys.exit(code)
from hones_lens import HookedVLM, attribute_neurons, load_examples
model = HookedVLM.from_pretrained("tiny-llava")
examples = load_examples("discs", "count-discs", "discovery", 2)
found = attribute_neurons(model, "count-discs", examples, method="write_norm", progress=False)
best = found.top(1)[0]
print(found.method, best.layer, best.index)
"""
    lines = python(environment, tmp_path, code)
    (evaluation,) = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["task"] == "count-discs" and evaluation["metric_name"] == "exact match"
    assert evaluation["interval"]["value"] > 0.9, "the shipped model can count to two"
    for name in ("heads", "neurons"):
        assert json.loads((tmp_path / "run" / f"{name}.json").read_text())["task"] == "count-discs"
    masking = json.loads((tmp_path / "run" / "masking.json").read_text())["results"]
    assert {result["task"] for result in masking} == {"count-discs"}
    steering = json.loads((tmp_path / "run" / "steering" / "discs" / "steering.json").read_text())
    assert [row["method"] for row in steering["rows"]] == ["Base", "Fixed-Amp", "HONES"]
    patched = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert len(patched["values"]) == 2 and patched["n"] == 12
    page = (tmp_path / "report.html").read_text()
    assert page.count("count-discs") > 5 and "exact match" in page
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    norms = torch.stack([block.mlp.W_out.norm(dim=-1) for block in model.blocks])
    layer, index = divmod(int(norms.argmax()), model.cfg.d_mlp)
    assert lines[-1] == f"write_norm {layer} {index}"


class ShoutedVQA(hl.Task):
    """VQA's examples under another prompt and metric: no file, no line in a registry."""

    name = "shouted-vqa"
    metric_name = "exact match"
    examples_of = "vqa"

    def prompt(self, example: hl.Example) -> str:
        return f"Question: {example.question}\nAnswer the question with a short phrase."

    def target(self, example: hl.Example) -> str:
        return example.answers[0]

    def score(self, prediction: str, example: hl.Example) -> float:
        return float(prediction.upper() == example.answers[0].upper())


@pytest.fixture(scope="module")
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


@pytest.mark.exhaustive
def test_a_task_that_is_not_registered_goes_through_every_function(model: hl.HookedVLM) -> None:
    """With VQA's prompt and answers of one word it must come to what VQA comes to."""
    task, quiet = ShoutedVQA(), {"progress": False}
    dev, test = (hl.load_examples("shapes", "vqa", split, 8) for split in ("dev", "test"))
    mine, theirs = (hl.evaluate(model, t, test, **quiet) for t in (task, "vqa"))
    assert mine.task == "shouted-vqa" and mine.scores == theirs.scores and mine.interval == theirs.interval
    heads, same = (hl.localize_heads(model, t, dev, 3, **quiet) for t in (task, "vqa"))
    assert torch.equal(heads.scores, same.scores) and heads.task == "shouted-vqa"
    neurons, same = (hl.attribute_neurons(model, t, dev, heads, 0.01, **quiet) for t in (task, "vqa"))
    assert torch.equal(neurons.scores, same.scores) and "exact match" in str(heads)
    masked, same = (
        hl.evaluate_masking(model, t, test, neurons, n_controls=1, **quiet) for t in (task, "vqa")
    )
    assert masked.drops == same.drops and masked.metric_interval == same.metric_interval
    config = hl.SteeringConfig(lr=0.05, epochs=1)
    learned, same = (learn_scales(model, t, dev, neurons, config, **quiet) for t in (task, "vqa"))
    assert learned.offsets == same.offsets and learned.task == "shouted-vqa"
    options = {"methods": ("Fixed-Amp",), **quiet}
    steered, same = (hl.compare_steering(model, t, dev, test, neurons, **options) for t in (task, "vqa"))
    assert str(steered).splitlines()[2:] == str(same).splitlines()[2:]
    drawn = hl.counterfactual_pairs("vqa", limit=3)
    options = {"metric": "task", "layers": [0], "draws": 0, "raw": True, **quiet}
    patched, same = (
        hl.patch_activations(model, counterfactual(model, drawn, t), **options) for t in (task, "vqa")
    )
    assert torch.equal(patched.values, same.values) and patched.values.any()


@pytest.mark.exhaustive
def test_a_task_that_is_not_registered_goes_into_run_folders_and_their_report(
    model: hl.HookedVLM, tmp_path: Path
) -> None:
    task, data = ShoutedVQA(), DataChoice(n_discovery=8, n_dev=8, n_held_out=4)
    assert data.test(task)[0].question in {q.text for q in questions(data.test(task)[0].facts["scene"])}
    run = start_run(model, task, data, tmp_path / "run", top_k=3)
    heads = find_heads(model, run, task, data, 3)
    neurons = find_neurons(model, run, task, data, heads, 0.01)
    masking = mask_neurons(model, run, task, data, neurons, 1)
    save_report_views(model, run, task, data, heads, neurons)
    options = {"methods": ("Base", "Fixed-Amp"), "config": hl.SteeringConfig()}
    folder = run.path("steering") / "shapes"
    inner = start_steering(model, task, data, folder, neurons, options)
    table = steer_neurons(model, inner, task, data, neurons, options)
    assert heads.task == neurons.task == masking[0].task == table.task == "shouted-vqa"
    view = read_view(run.folder)
    assert (view.task, view.metric_name) == ("shouted-vqa", "exact match")
    assert view.steering["learned and measured on shapes"] == table
    page = write_report(tmp_path / "report.html", [view]).read_text()
    assert "shouted-vqa" in page and "exact match" in page and "Fixed-Amp" in page
    assert Run(run.folder, run.settings).settings["task"] == "shouted-vqa"
