"""What several runs share, in a run folder: against the functions called by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hones_lens import HookedVLM, load_examples
from hones_lens.analysis.lens.difference import LensDifference
from hones_lens.app.cli import main
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.overlap import neurons_of_runs
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.overlap.group_masking import GroupMasking, mask_groups
from hones_lens.hones.overlap.groups import Overlap, find_overlap
from hones_lens.hones.overlap.lens_delta import lens_delta

TASKS = ("vqa", "ocr")
LIMIT = ["--limit", "6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    found = {task: str(folder / task) for task in TASKS}
    for task, run in found.items():
        assert main(["localize", "--task", task, "--out", run, *LIMIT]) == 0
    return found


@pytest.mark.exhaustive
def test_groups_masked_and_lenses_in_a_folder(runs, tmp_path, capsys) -> None:
    out = tmp_path / "shared"
    command = ["overlap", *runs.values(), "--mask", "--out", str(out), *LIMIT]
    assert main([*command, "--json", str(tmp_path / "all.json")]) == 0
    said = capsys.readouterr().out
    neurons = {task: NeuronScores.load(Path(run) / "neurons.json") for task, run in runs.items()}
    examples = {task: load_examples("shapes", task, "test", 6) for task in TASKS}
    model, shared = HookedVLM.from_pretrained("tiny-llava"), find_overlap(neurons)
    assert Overlap.load(out / "overlap.json") == shared and str(shared) in said
    groups = mask_groups(model, examples, shared, progress=False)
    assert GroupMasking.load(out / "groups.json") == groups and str(groups) in said
    for task in TASKS:
        lens = lens_delta(model, task, examples[task], neurons[task], progress=False)
        assert LensDifference.load(out / f"lens-{task}.json") == lens and str(lens) in said
    written = json.loads((tmp_path / "all.json").read_text())
    assert set(written) == {"overlap", "groups", "lenses"} and set(written["lenses"]) == set(TASKS)
    files = {file.name: file.read_bytes() for file in out.glob("*.json") if file.name != "lock.json"}
    assert main(command) == 0 and files == {name: (out / name).read_bytes() for name in files}
    assert main([*command[:-1], "5"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Neurons that tasks share" in page and "Groups masked" in page and "Logit lens" in page


@pytest.mark.exhaustive
def test_without_masking_nothing_is_loaded(runs, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("hones_lens.model.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    out = tmp_path / "plain"
    assert main(["overlap", *runs.values(), "--out", str(out)]) == 0
    assert f"hones report {out}" in capsys.readouterr().out
    assert {file.name for file in out.glob("*.json")} >= {"overlap.json", "settings.json"}
    assert not (out / "groups.json").exists()


def test_runs_that_can_not_be_compared(runs, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="is a second run of vqa"):
        neurons_of_runs([runs["vqa"], runs["vqa"]])
    empty = tmp_path / "empty"
    assert main(["localize", "--stage", "heads", "--out", str(empty), *LIMIT]) == 0
    with pytest.raises(ValueError, match="empty has no neurons of one task"):
        neurons_of_runs([str(empty)])
    other = Run(tmp_path / "other", {"model": "big-llava", "task": "ocr"})
    other.stage("neurons", NeuronScores, lambda: NeuronScores.load(Path(runs["ocr"]) / "neurons.json"))
    with pytest.raises(ValueError, match=r"not .*vqa of tiny-llava, .*of big-llava"):
        neurons_of_runs([runs["vqa"], str(other.folder)])
