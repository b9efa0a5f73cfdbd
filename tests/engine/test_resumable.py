"""Stages that add up over batches: stopped anywhere they go on after the last batch, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import fresh_pair, plain_examples

from hones_lens import engine
from hones_lens.app.runs.journal import Journal
from hones_lens.data import counterfactual_pairs
from hones_lens.engine.resumable import resumed_batches
from hones_lens.hones.attribution import gradients, neurons, rankings
from hones_lens.hones.overlap.lens_delta import lens_delta
from hones_lens.results import Component
from hones_lens.tasks import load_task

HEADS = (Component(0, 1, 0.5), Component(1, 0, 0.25))


def stages(model: Any) -> dict[str, Callable[[Any], Any]]:
    """Every stage that adds up, as a function of the journal; each has five batches of one example."""
    task, examples = load_task("vqa"), plain_examples("vqa", 5)
    pairs = counterfactual_pairs("vqa", "color", "dev", 5)
    quiet = {"batch_size": 1, "progress": False}
    entropy = {"other_tasks": {"ocr": plain_examples("ocr", 1)}}

    def ranking(function: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda journal: function(model, task, examples, journal=journal, **quiet, **options)

    return {
        "neurons": lambda journal: neurons.head_conditioned_importance(
            model, task, examples, HEADS, journal=journal, **quiet
        ),
        "flow": lambda journal: neurons.write_in_drops_by_head(
            model, task, examples, HEADS, journal=journal, **quiet
        ),
        "lens": lambda journal: lens_delta(model, task, examples, [(0, 1)], k=2, journal=journal, **quiet),
        "activation_probability": ranking(rankings.activation_probability),
        "mean_activation": ranking(rankings.mean_activation),
        "activation_entropy": ranking(rankings.activation_entropy, **entropy),
        "direct": ranking(rankings.direct),
        "gradient_times_activation": ranking(gradients.gradient_times_activation),
        "attribution_patching": ranking(gradients.attribution_patching, pairs=pairs),
        "first_order_head_drops": ranking(gradients.first_order_head_drops),
        "qrnca": ranking(gradients.qrnca, steps=1),
    }


STAGES = list(stages(None))


class Killed(BaseException):
    """As a signal would end it."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_stage_goes_on_to_the_same_bits(stage, tmp_path, monkeypatch):
    run = stages(fresh_pair()[1])[stage]
    whole, done, batches = run(None), [], engine.batches.answer_batches

    def counted(model: Any, task: Any, examples: Any, *options: Any, **named: Any) -> Any:
        if len(done) == 3:
            raise Killed
        done.extend(example.id for example in examples)
        yield from batches(model, task, examples, *options, **named)

    monkeypatch.setattr(engine, "answer_batches", counted, raising=False)
    with pytest.raises(Killed):
        run(Journal(tmp_path / "s.journal.jsonl", "run"))
    before = done[:]
    done[:] = []
    monkeypatch.setattr(
        engine, "answer_batches", lambda *a, **k: (done.extend(e.id for e in a[2]), batches(*a, **k))[1]
    )
    again = run(Journal(tmp_path / "s.journal.jsonl", "run"))
    assert str(again) == str(whole)
    values = [each if isinstance(each, tuple) else (each,) for each in (again, whole)]
    for one, other in zip(*values, strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)
    repeated = set(before) & set(done)
    assert len(before) == 3 and len(repeated) <= 1, "at most one batch"


def test_what_is_kept_is_of_these_tensors_alone(tmp_path: Path) -> None:
    examples, total = plain_examples("vqa", 3), torch.zeros(2)
    for journal in ({}, Journal(tmp_path / "s.journal.jsonl", "run")):
        for _ in resumed_batches(examples, 2, {"total": total}, journal, "a/b"):
            total += 1
        assert total.tolist() == [2, 2] and not list(
            resumed_batches(examples, 2, {"total": total}, journal, "a/b")
        )
        again = torch.zeros(2)
        assert not list(resumed_batches(examples, 2, {"total": again}, journal, "a/b"))
        assert again.tolist() == [2, 2]
        for wrong in ({"total": torch.zeros(3)}, {"other": total}, {"total": total.double()}):
            with pytest.raises(ValueError, match="something else under 'a/b': 3 examples in total"):
                next(resumed_batches(examples, 2, wrong, journal, "a/b"))
        with pytest.raises(ValueError, match="not up to 2 in"):
            next(resumed_batches(examples[:2], 2, {"total": again}, journal, "a/b"))
        total.zero_()


@pytest.mark.parametrize("how", ["empty", "cut", "one byte", "another run", "another stage", "no header"])
def test_damaged_tensors_are_named(tmp_path: Path, how: str) -> None:
    Journal(tmp_path / "s.journal.jsonl", "run").keep_tensors("k", 4, {"total": torch.ones(3)})
    file = tmp_path / "s.k.tensors.safetensors"
    content, stage, run = file.read_bytes(), "s", "run"
    if how == "another run":
        run = "other"
    elif how == "another stage":
        stage = "t"
        file = file.rename(tmp_path / "t.k.tensors.safetensors")
    elif how == "no header":
        import safetensors.torch

        safetensors.torch.save_file({"total": torch.ones(3)}, file)
    else:
        file.write_bytes({"empty": b"", "cut": content[:-2], "one byte": content[:-1] + b"\1"}[how])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged, or of another run or stage"):
        Journal(tmp_path / f"{stage}.journal.jsonl", run).find_tensors("k")


def test_large_tensors_are_written_for_a_tenth_of_the_time(tmp_path: Path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hones_lens.app.runs.journal.time.monotonic", lambda: clock[0])
    checksum = Journal._tensors_checksum

    def slow(*given: Any) -> str:
        clock[0] += 2.0  # seconds to write
        return checksum(*given)

    monkeypatch.setattr(Journal, "_tensors_checksum", slow)
    journal, written = Journal(tmp_path / "s.journal.jsonl", "run"), []
    for done in range(1, 20):
        clock[0] += 5.0
        before = clock[0]
        journal.keep_tensors("k", done, {"total": torch.ones(1)})
        written += [done] if clock[0] > before else []
    assert written == [1, 5, 9, 13, 17]
