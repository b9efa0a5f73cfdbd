"""Steering beside its controls, against Hugging Face's model with scaled neurons."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hf_scaled_neurons import CHOSEN, QUIET, hf_scaled
from helpers.hf_task_loops import (
    ALL_TASKS,
    examples_of,
    hf_log_prob,
    hf_prediction,
    pair,
)

from hones_lens import engine
from hones_lens.app.runs.journal import Journal
from hones_lens.data.examples import Example
from hones_lens.data.loading import load_examples
from hones_lens.engine import SweepOptions
from hones_lens.hones.steering import learning as learning_module
from hones_lens.hones.steering.batches import TrainingBatches
from hones_lens.hones.steering.comparison import METHODS, compare_steering, transfer_steering
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.hones.steering.learning import learn_scales
from hones_lens.hones.steering.questions import split_by_image
from hones_lens.hones.steering.scales import NeuronScales
from hones_lens.hones.steering.side_effects import SideEffects, side_effects
from hones_lens.hones.steering.table import SteeringTable
from hones_lens.results.statistics import metric_interval
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task
from hones_lens.tasks.vqa import VQA

SMALL: dict[str, Any] = {"learning_rates": (5e-4, 0.05), "epochs": (1,), "draws": 2}
SMALL |= {"factors": (0.5, 1.25), **QUIET}


@cache
def dev_and_test(name: str) -> tuple[list, list]:
    if name == "retrieval":
        drawn = load_examples("shapes", name, "test", limit=7)
        few = [(e, e.candidates[e.positive]) for e in drawn]
        few = [(e, (right, *[c for c in e.candidates if c != right][:3])) for e, right in few]
        made = [replace(e, candidates=candidates, positive=0) for e, candidates in few]
        return made[:4], made[4:]
    examples = list(examples_of(name, 7))
    return examples[:4], examples[4:]


@cache
def table(name: str) -> SteeringTable:
    return compare_steering(pair()[1], name, *dev_and_test(name), CHOSEN, **SMALL)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALL_TASKS)
def test_rows_equal_hf_with_scaled_neurons(name: str) -> None:
    hf_model, model = pair()
    task, (_, test) = load_task(name), dev_and_test(name)
    found = table(name)
    methods = [row.method for row in found.rows]
    assert methods == [*METHODS[:3], "RandNeuron", *METHODS[3:]]
    for row in (found.rows[0], found.rows[1], found.rows[-1]):
        offsets = {} if row.scales is None else dict(zip(row.scales.neurons, row.scales.offsets, strict=True))
        with hf_scaled(hf_model, {n: torch.tensor(1 + a) for n, a in offsets.items()}), torch.no_grad():
            said = [hf_prediction(hf_model, model, example, task) for example in test]
            likely = [float(hf_log_prob(hf_model, model, example, task)) for example in test]
        assert row.metric == task.aggregate(said, test)
        assert list(row.scores) == [task.score(s, e) for s, e in zip(said, test, strict=True)]
        assert name == "retrieval" or np.allclose(row.log_probs, likely, atol=1e-4)


def test_what_comes_back() -> None:
    found, (dev, test) = table("vqa"), dev_and_test("vqa")
    base = found.row("Base")
    assert base.gain.value == 0 == base.max_abs and base.p == 1 and base.scales is None
    assert found.example_ids == tuple(e.id for e in test) and found.n_learned + found.n_chosen == len(dev)
    assert found.row("Fixed-Amp").chosen == {"factor": 2.0} and found.row("Fixed-Amp").max_abs == 1
    grid = found.row("Grid-Search")
    assert set(found.scales("Grid-Search").offsets) == {grid.chosen["factor"] - 1}
    for row in found.rows:
        assert math.isclose(row.gain.value, row.metric - base.metric, abs_tol=1e-12)
        assert math.isclose(row.log_prob_gain.value, row.log_prob - base.log_prob, abs_tol=1e-9)
        assert row.gain.n == len(test) == len(row.scores) == len(row.log_probs)
        assert 0 < row.p <= 1 and row.max_abs == (row.scales.max_abs if row.scales else 0)
    hones, without = found.scales(), found.scales("HONES without KL")
    assert hones.settings["kl_weight"] == 0.05 and without.settings["kl_weight"] == 0
    assert found.row("HONES").chosen == {"lr": hones.settings["lr"], "epochs": 1}
    interval, p = found.difference("HONES", "Base")
    assert interval.value == found.row("HONES").gain.value and p == found.row("HONES").p
    with pytest.raises(ValueError, match="no draw 0 of method 'Nothing' here; there are: Base"):
        found.scales("Nothing")
    with pytest.raises(ValueError, match="Base scales nothing"):
        found.scales("Base")


def test_random_sets_are_matched_in_every_layer() -> None:
    found = table("vqa")
    sets = [found.scales("RandNeuron", draw).neurons for draw in range(2)]
    assert sets[0] != sets[1]
    for chosen in sets:
        assert Counter(layer for layer, _ in chosen) == Counter(layer for layer, _ in CHOSEN)
        assert len(set(chosen)) == len(CHOSEN)


def test_settings_are_those_that_do_best_on_dev() -> None:
    _, model = pair()
    task, dev, found = load_task("vqa"), dev_and_test("vqa")[0], table("vqa")
    learn, choose = split_by_image(dev, 0.7, 0)
    made = []
    for lr in SMALL["learning_rates"]:
        config = SteeringConfig(lr=lr, epochs=1)
        scales = learn_scales(model, task, learn, CHOSEN, config, **QUIET)
        (outcome,) = engine.measure(model, task, choose, [scales.hooks()], SweepOptions(**QUIET))
        likely = engine.measure_log_probs(model, task, choose, [scales.hooks()], SweepOptions(**QUIET))[0]
        made.append(((outcome.metric(task), float(np.mean(likely))), scales))
    assert found.scales().offsets == max(made, key=lambda pair: pair[0])[1].offsets
    factors = SMALL["factors"]
    arms = [NeuronScales.uniform(CHOSEN, factor).hooks() for factor in factors]
    outcomes = engine.measure(model, task, dev, arms, SweepOptions(**QUIET))
    likely = engine.measure_log_probs(model, task, dev, arms, SweepOptions(**QUIET))
    values = [(o.metric(task), float(np.mean(lp))) for o, lp in zip(outcomes, likely, strict=True)]
    assert found.row("Grid-Search").chosen == {"factor": factors[values.index(max(values))]}


def test_patience_keeps_the_best_epoch_on_the_part_that_chooses() -> None:
    _, model = pair()
    dev, test = dev_and_test("vqa")
    learn, choose = split_by_image(dev, 0.7, 0)
    options: dict[str, Any] = {**SMALL, "learning_rates": (0.5,), "epochs": (5,), "methods": ("HONES",)}
    found = compare_steering(model, "vqa", dev, test, CHOSEN, patience=1, **options).scales()
    config = SteeringConfig(lr=0.5, epochs=5)
    alone = learn_scales(model, "vqa", learn, CHOSEN, config, dev=choose, patience=1, **QUIET)
    assert found.offsets == alone.offsets and found.history == alone.history
    assert len(found.history) < 5, "it stopped"
    through = compare_steering(model, "vqa", dev, test, CHOSEN, **options).scales()
    assert len(through.history) == 5 and through.offsets != found.offsets
    with pytest.raises(ValueError, match="patience must be at least 1, not 0"):
        compare_steering(model, "vqa", dev, test, CHOSEN, patience=0, **options)


def test_table_files_and_words(tmp_path) -> None:
    found = table("vqa")
    found.save(tmp_path / "steering.json")
    assert SteeringTable.load(tmp_path / "steering.json") == found
    said, frame = str(found), found.to_dataframe()
    assert "max |a|" in said and "RandNeuron 2" in said and "2 random sets: mean gain" in said
    assert all(row.settings in said for row in found.rows)
    base = found.row("Base").log_probs
    for row in found.rows[1:]:
        gaps = np.subtract(row.log_probs, base)
        flips = np.array(list(itertools.product((-1, 1), repeat=len(gaps)))) @ gaps
        exact = np.mean(np.abs(flips) >= abs(gaps.sum()) - 1e-12)
        assert found.log_prob_p(row) == pytest.approx(exact, abs=0.05)
        whole = metric_interval(load_task("vqa"), np.array(row.statistics), seed=found.seed)
        assert found.metric_of(row) == whole and f"{whole.value:.3f} {whole.span}" in said
    assert list(frame["method"]) == [row.method for row in found.rows] and "<table" in found._repr_html_()


class Exact(Task):
    """Not registered: `load_task` does not know its name."""

    name = "exact"
    metric_name = "exact match"
    prompt = VQA.prompt
    target = VQA.target

    def score(self, prediction: str, example: Example) -> float:
        return float(prediction == example.answers[0])


def test_a_task_that_is_not_registered_is_reported_like_any_other(tmp_path) -> None:
    found = compare_steering(pair()[1], Exact(), *dev_and_test("vqa"), CHOSEN, **SMALL)
    assert [row.scores for row in found.rows] == [row.scores for row in table("vqa").rows]
    assert str(found).splitlines()[2:] == str(table("vqa")).splitlines()[2:]
    found.save(tmp_path / "steering.json")
    again = SteeringTable.load(tmp_path / "steering.json")
    assert again == found and again.to_dataframe().equals(found.to_dataframe())
    assert again.difference("HONES", "Base", task=Exact()) == table("vqa").difference("HONES", "Base")
    with pytest.raises(ValueError, match="unknown task 'exact'"):
        again.difference("HONES", "Base")
    test = dev_and_test("vqa")[1]
    assert transfer_steering(pair()[1], again, test, task=Exact(), **QUIET) == found
    with pytest.raises(ValueError, match="the table is about exact, the task is vqa"):
        transfer_steering(pair()[1], again, test, task=load_task("vqa"), **QUIET)


def test_a_table_of_before_intervals_were_kept_has_the_same_ones(tmp_path) -> None:
    table("vqa").save(file := tmp_path / "steering.json")
    data = json.loads(file.read_text())
    for row in data["rows"]:
        del row["metric_interval"]
    file.write_text(json.dumps(data))
    again = SteeringTable.load(file)
    assert again.rows[0].metric_interval is None and str(again) == str(table("vqa"))


def test_a_journal_spares_what_was_done_and_changes_nothing(monkeypatch) -> None:
    data, journal = dev_and_test("vqa"), {}
    assert compare_steering(pair()[1], "vqa", *data, CHOSEN, journal=journal, **SMALL) == table("vqa")
    journal = json.loads(json.dumps(journal))
    monkeypatch.setattr(learning_module.Learner, "run", lambda *_: pytest.fail("learned again"))
    assert compare_steering(pair()[1], "vqa", *data, CHOSEN, journal=journal, **SMALL) == table("vqa")


class Killed(BaseException):
    """As a signal would end it."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kept_in", ["a file", "a dictionary"])
@pytest.mark.parametrize("patience", [None, 1])
def test_a_killed_comparison_takes_at_most_one_step_again(kept_in, patience, tmp_path, monkeypatch) -> None:
    """Killed before every third step, clean pass and batch that is measured, again and again."""
    few = {**SMALL, "methods": ("Base", "HONES"), "epochs": (2,), "patience": patience}
    dev, test = dev_and_test("vqa")
    config, counts = SteeringConfig(accumulate=1), Counter[str]()
    kept: dict[str, Any] = {}

    def compared(journal: Any) -> SteeringTable:
        return compare_steering(pair()[1], "vqa", dev, test, CHOSEN, config=config, journal=journal, **few)

    def counted(name: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if killing and counts[name] % 3 == 2 and not kept.get(f"{name} {counts[name]}"):
                kept[f"{name} {counts[name]}"] = True
                raise Killed
            counts[name] += 1
            return function(*args, **options)

        return run

    killing, kills = False, 0
    step = counted("steps", learning_module.gradient_of_step)
    monkeypatch.setattr(learning_module, "gradient_of_step", step)
    monkeypatch.setattr(engine.Sweep, "predictions", counted("batches", engine.Sweep.predictions))
    clean = counted("clean passes", TrainingBatches._clean)
    monkeypatch.setattr(TrainingBatches, "_clean", clean)
    whole, once = compared(None), Counter(counts)
    counts.clear()
    killing, journal = True, {}
    while True:
        if kept_in == "a file":
            journal = Journal(tmp_path / "steering.journal.jsonl", "run")
        try:
            found = compared(journal)
            break
        except Killed:
            kills += 1
    assert found == whole and kills >= 4
    again = counts["steps"] - once["steps"]  # those before a dev measurement that was killed
    in_clean_passes = sum(name.startswith("clean passes") for name in kept)  # which are parts of a step
    assert counts["batches"] == once["batches"] and 0 <= again <= (kills if patience else in_clean_passes)
    more = counts["clean passes"] - once["clean passes"]
    assert more == 0 < once["clean passes"] if kept_in == "a file" else more > 0


def test_some_methods_and_examples_of_their_own_to_learn_on() -> None:
    _, model = pair()
    (dev, test), methods = dev_and_test("vqa"), ("HONES", "Fixed-Amp")
    found = compare_steering(model, "vqa", dev[2:], test, CHOSEN, learn=dev[:2], methods=methods, **SMALL)
    assert [row.method for row in found.rows] == ["Base", "Fixed-Amp", "HONES"]
    assert (found.n_learned, found.n_chosen) == (2, 2)
    only = compare_steering(model, "vqa", dev, test, CHOSEN, methods=("Base",), **SMALL)
    assert [row.method for row in only.rows] == ["Base"]


def test_the_same_scales_on_other_examples() -> None:
    _, model = pair()
    found, test = table("vqa"), dev_and_test("vqa")[1]
    assert transfer_steering(model, found, test, **QUIET) == found
    other = transfer_steering(model, found, test[1:], **QUIET)
    for row, here in zip(found.rows, other.rows, strict=True):
        assert here.scores == row.scores[1:] and here.scales == row.scales
    with pytest.raises(ValueError, match="the table is about other, the model is"):
        transfer_steering(model, replace(found, model_name="other"), test, **QUIET)


def test_bad_comparisons() -> None:
    _, model = pair()
    dev, test = dev_and_test("vqa")
    with pytest.raises(ValueError, match="unknown method 'Hones'; valid: Base, Fixed-Amp"):
        compare_steering(model, "vqa", dev, test, CHOSEN, methods=("Hones",), **QUIET)
    with pytest.raises(ValueError, match=r"test example .* shows the picture of"):
        compare_steering(model, "vqa", dev, dev, CHOSEN, **SMALL)
    with pytest.raises(ValueError, match="must not be empty"):
        compare_steering(model, "vqa", dev, test, CHOSEN, epochs=(), **QUIET)
    with pytest.raises(ValueError, match="no examples"):
        compare_steering(model, "vqa", [], test, CHOSEN, **QUIET)


# -- side effects --------------------------------------------------------------------------------------


def test_side_effects(tmp_path) -> None:
    _, model = pair()
    examples = {name: dev_and_test(name)[1] for name in ("vqa", "retrieval")}
    scales = {"vqa": table("vqa").scales(), "ocr": NeuronScales.uniform(CHOSEN, 1.0)}
    found = side_effects(model, examples, scales, **QUIET)
    assert [(c.scales_of, c.task) for c in found.cells] == [
        (s, t) for t in ("vqa", "retrieval") for s in ("vqa", "ocr")
    ]
    mine, row = found.cell("vqa", "vqa"), table("vqa").row("HONES")
    assert mine.gain == row.gain and mine.steered.value == row.metric
    assert mine.log_prob_gain == row.log_prob_gain
    assert mine.base == table("vqa").metric_of(table("vqa").row("Base"))
    assert (mine.p, mine.log_prob_p) == (row.p, table("vqa").log_prob_p(row))
    idle = found.cell("ocr", "retrieval")
    assert idle.gain.value == 0 and idle.base == idle.steered and idle.p == 1
    found.save(tmp_path / "effects.json")
    assert SideEffects.load(tmp_path / "effects.json") == found
    assert "under the scales of vqa" in str(found) and len(found.to_dataframe()) == 4
    assert "<table" in found._repr_html_()
    with pytest.raises(ValueError, match="no cell"):
        found.cell("vqa", "caption")
    with pytest.raises(ValueError, match="need scales and examples"):
        side_effects(model, examples, {}, **QUIET)
