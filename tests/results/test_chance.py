import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import example_results
from helpers.hf_task_loops import examples_of, pair

from hones_lens.app.report.verdict import verdict
from hones_lens.data import Example, load_examples
from hones_lens.data.examples import ImageSource
from hones_lens.engine import evaluate
from hones_lens.hones import localize_heads
from hones_lens.results import Interval, not_above_chance
from hones_lens.tasks import load_task

HEADS = example_results.heads()
NOTHING = "nothing can be concluded: the unchanged model's accuracy, "


@cache
def picture() -> ImageSource:
    return load_examples("shapes", "vqa", "test", 1)[0].image_source


def example(n: int, **fields: Any) -> Example:
    return Example(id=str(n), image_source=picture(), **fields)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_chance_of_a_ranking_is_the_mean_over_all_orders(n: int) -> None:
    task = load_task("retrieval")
    ranked = example(0, candidates=tuple("abcdef"[:n]), positive=n // 2)
    scores = [task.score(np.array(order, dtype=float), ranked) for order in itertools.permutations(range(n))]
    assert task.chance([ranked]) == pytest.approx(np.mean(scores), abs=1e-12)


@pytest.mark.parametrize("labels", [["yes"], ["yes", "no"], ["no", "no", "yes"], ["no"] * 3])
def test_chance_of_yes_or_no_is_what_the_better_constant_answer_gets(labels: list[str]) -> None:
    task = load_task("yes-no")
    asked = [example(i, question="Is it?", answers=(label,)) for i, label in enumerate(labels)]
    constant = [task.aggregate([word] * len(asked), asked) for word in ("Yes", "No")]
    assert task.chance(asked) == pytest.approx(max(constant))


@pytest.mark.parametrize(
    ("value", "interval", "chance", "shown"),
    [
        (0.0, Interval(0.0, 0.0, 0.0, 0.95, 20), 0.0, "0.000 [0.000, 0.000], does not stand above 0"),
        (0.05, Interval(0.05, 0.0, 0.15, 0.95, 20), 0.0, "0.050 [0.000, 0.150], does not stand above 0"),
        (0.6, Interval(0.6, 0.5, 0.7, 0.95, 90), 0.5, "0.600 [0.500, 0.700], does not stand above the 0.500"),
        (0.0, None, 0.0, "0.000, does not stand above 0"),
        (0.6, Interval(0.6, 0.51, 0.7, 0.95, 90), 0.5, ""),
        (1.0, None, 0.0, ""),
    ],
)
def test_a_metric_at_chance_is_said_to_prove_nothing(
    value: float, interval: Interval | None, chance: float, shown: str
) -> None:
    told = not_above_chance("accuracy", value, interval, chance)
    assert told.startswith(NOTHING + shown) if shown else told == ""


def test_results_of_a_model_that_can_not_do_the_task_say_so() -> None:
    model = pair("llava")[1]
    examples = examples_of("vqa", 2, family="llava")
    scores = localize_heads(model, "vqa", examples, 1, layers=[0], progress=False)
    told = evaluate(model, "vqa", examples, progress=False)
    assert scores.baseline == told.metric
    assert NOTHING in str(scores) and NOTHING in str(told)


def test_masking_at_chance_has_no_verdict_on_the_metric() -> None:
    can, can_not = (example_results.masking(baseline=baseline, masked=0.0) for baseline in (0.93, 0.02))
    assert not can.problem and NOTHING not in str(can)
    assert NOTHING + "0.020 [-0.010, 0.050]" in str(can_not)
    assert verdict([can_not]).startswith("Nothing can be said of the vqa task: the unchanged model does not")
    heads = replace(HEADS, baseline=0.02, baseline_interval=can_not.baseline_interval)
    assert not HEADS.problem and heads.problem == can_not.problem and can_not.problem in str(heads)
    assert replace(heads, chance=None).problem == ""
