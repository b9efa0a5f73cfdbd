"""Data sets of files on the command line: tasks of their own, encodings."""

from __future__ import annotations

import json

import pytest
from helpers.dataset_files import docvqa, pope
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import hones_lens as hl
from hones_lens.app.cli import main


def files_of(dataset) -> list[str]:
    return [
        "--dataset",
        dataset.dataset,
        "--data-file",
        str(dataset.data_file),
        "--image-dir",
        str(dataset.image_dir),
    ]


def test_pope_is_measured_as_its_own_evaluation_does(tmp_path, capsys):
    dataset = pope(tmp_path)
    argv = ["evaluate", *files_of(dataset), "--task", "yes-no", "--split", "all", "--limit", "12"]
    assert main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    (written,) = json.loads((tmp_path / "r.json").read_text())
    shipped = hl.HookedVLM.from_pretrained("tiny-llava")
    examples = hl.load_examples("pope", "yes-no", "all", 12, **dataset.files)
    task = hl.load_task("yes-no")
    inputs = shipped.prepare([e.image for e in examples], [task.prompt(e) for e in examples])
    texts = shipped.generate(inputs, max_new_tokens=24)
    said = ["no" if {"no", "not", "No"} & set(text.split(".")[0].split()) else "yes" for text in texts]
    labels = [e.kind for e in examples]
    p, r, f, _ = precision_recall_fscore_support(
        labels, said, pos_label="yes", average="binary", zero_division=0
    )
    measures = written["measures"]
    assert measures["accuracy"] == written["interval"]["value"] == pytest.approx(accuracy_score(labels, said))
    assert [measures[k] for k in ("precision", "recall", "f1")] == pytest.approx([p, r, f], nan_ok=True)
    assert measures["yes_ratio"] == pytest.approx(said.count("yes") / 12)
    assert f"f1 {f:.3f}, yes_ratio" in capsys.readouterr().out


def test_docvqa_is_measured_by_anls_and_by_nothing_else(tmp_path, capsys):
    dataset = docvqa(tmp_path)
    argv = ["evaluate", *files_of(dataset), "--split", "all", "--limit", "4"]
    assert main(argv) == 0
    assert "vqa-anls: ANLS" in capsys.readouterr().out
    assert main([*argv, "--task", "vqa"]) == 1
    assert "data set 'docvqa' has no task 'vqa'; valid: vqa-anls" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_yes_no_goes_through_every_stage(tmp_path, capsys):
    small = ["--limit", "6", "--task", "yes-no", *files_of(pope(tmp_path / "set"))]
    run = str(tmp_path / "run")
    assert main(["mask", *small, "--controls", "2", "--out", run]) == 0
    assert (
        main(["steer", *small, "--out", run, "--epochs", "1", "--lr", "0.01", "--methods", "fixed_amp,HONES"])
        == 0
    )
    assert main(["report", run]) == 0 and "yes-no" in capsys.readouterr().out
