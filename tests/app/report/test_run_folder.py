"""A run folder read back equals what was saved into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import example_comparisons as made, example_results

from hones_lens.app.report.run_folder import read_view
from hones_lens.app.report.run_view import NeuronTokens
from hones_lens.app.runs.folder import Run
from hones_lens.hones.masking_result import save_masking
from hones_lens.results.files import write_json


def start(folder, **settings) -> Run:
    return Run(folder, {"model": "tiny-llava", **settings})


def finish(run: Run) -> None:
    """Record all results of a folder as its own."""
    own = [file for file in run.folder.glob("*.json") if file.name not in BOOKKEEPING]
    run.record("made", own)


BOOKKEEPING = ("settings.json", "stages.json", "lock.json")


def test_a_folder_of_one_task(tmp_path):
    run = start(tmp_path / "vqa", task="vqa")
    example_results.neurons().save(run.path("neurons.json"))
    save_masking(run.path("masking.json"), example_results.curve())
    places = [(method, size) for method in ("direct", "random") for size in (7, 15, 76)]
    others = [example_results.masking(0.9, -0.3, method=method, n_neurons=size) for method, size in places]
    save_masking(run.path("others.json"), others)
    made.held_out().save(run.path("heads-held-out.json"))
    made.lens().save(run.path("lens.json"))
    for name in ("shapes", "shapes-shifted"):
        inner = start(run.folder / "steering" / name, task="vqa", dataset=name)
        made.steering(n=50).save(inner.path("steering.json"))
        if name == "shapes":
            made.steering(n=60).save(inner.path("on-shapes-shifted.json"))
        finish(inner)
    finish(run)
    view = read_view(run.folder)
    assert (view.title, view.task, view.metric_name) == ("tiny-llava · vqa", "vqa", "accuracy")
    assert (
        view.masking == example_results.curve()
        and view.held_out == made.held_out()
        and view.lenses == {"vqa": made.lens()}
    )
    chosen = example_results.neurons().count()
    assert {name: r.n_neurons for name, r in view.others.items()} == {"direct": chosen, "random": chosen}
    assert {label: len(table.example_ids) for label, table in view.steering.items()} == {
        "learned and measured on shapes": 50,
        "learned on shapes, measured on shapes-shifted": 60,
        "learned and measured on shapes-shifted": 50,
    }
    assert view.heads is None and view.overlap is None and view.examples == [] and view.promoted == {}


def test_promoted_tokens_with_and_without_an_activation(tmp_path):
    run = start(tmp_path / "vqa", task="vqa")
    rows = [[3, 7, ["dax", "</s>"]], [1, 2, ["dax"], -0.5]]  # folders of before hold no activation
    write_json(run.path("promoted.json"), {"kind": "promoted", "neurons": rows})
    finish(run)
    assert read_view(run.folder).promoted == {
        (3, 7): NeuronTokens(("dax", "</s>"), None),
        (1, 2): NeuronTokens(("dax",), -0.5),
    }


def test_a_folder_of_steering_alone(tmp_path):
    run = start(tmp_path / "steering", task="vqa", dataset="gqa")
    made.steering().save(run.path("steering.json"))
    finish(run)
    assert read_view(run.folder).steering == {"learned and measured on gqa": made.steering()}


def test_a_folder_of_what_concerns_several_tasks(tmp_path):
    run = start(tmp_path / "across", tasks=list(made.TASKS))
    made.shared().save(run.path("overlap.json"))
    made.groups().save(run.path("groups.json"))
    shifted = replace(made.effects(), model_name="other")
    made.effects().save(run.path("side-effects-on-shapes.json"))
    shifted.save(run.path("side-effects-on-shapes-shifted.json"))
    finish(run)
    view = read_view(run.folder)
    assert view.title == "tiny-llava · vqa, ocr, caption and retrieval" and view.metric_name == ""
    assert view.overlap == made.shared() and view.groups == made.groups()
    assert view.effects == {"shapes": made.effects(), "shapes-shifted": shifted}
    assert view.masking == [] and view.steering == {} and view.main is None


def test_files_of_another_kind_and_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no settings\.json"):
        read_view(tmp_path)
    run = start(tmp_path / "vqa", task="vqa")
    write_json(run.path("lens.json"), {"kind": "heads"})
    finish(run)
    with pytest.raises(ValueError, match="holds 'heads', not 'lens-delta'"):
        read_view(run.folder)
