"""What holds for every task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hones_lens.data.examples import Example
from hones_lens.data.loading import load_examples
from hones_lens.tasks.base import Task, mean_metric, mean_statistics
from hones_lens.tasks.registry import TASKS, load_task


def examples_for(name: str, n: int) -> list[Example]:
    """Examples of the shapes world; those of questions to be answered with yes or no have such answers."""
    kind = {"vqa-anls": "vqa", "yes-no": "vqa"}.get(name, name)
    examples = load_examples("shapes", kind, "dev", limit=n)
    if name == "yes-no":
        return [replace(e, answers=("yes" if i % 3 else "no",)) for i, e in enumerate(examples)]
    return examples


def perfect(task, example: Example):
    """The prediction of a model that is always right."""
    if task.ranks:
        return [float(i == example.positive) for i in range(len(example.candidates))]
    return example.references[0] if task.name == "caption" else task.target(example)


def wrong(task, example: Example):
    if task.name == "yes-no":
        return {"Yes": "No", "No": "Yes"}[task.target(example)]
    return [0.0] * len(example.candidates) if task.ranks else "zzz"


def test_an_unknown_task_raises_and_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"unknown task 'vqaa'; valid: vqa, ocr, caption, retrieval, vqa-anls, yes-no"
    ):
        load_task("vqaa")


@pytest.mark.parametrize(
    ("name", "metric_name", "ranks", "idf"),
    [
        ("vqa", "accuracy", False, False),
        ("ocr", "ANLS", False, False),
        ("caption", "BLEU-4", False, True),
        ("retrieval", "NDCG@5", True, False),
        ("vqa-anls", "ANLS", False, False),
        ("yes-no", "accuracy", False, False),
    ],
)
def test_attributes(name, metric_name, ranks, idf):
    task = load_task(name)
    assert (task.name, task.metric_name, task.ranks, task.idf) == (name, metric_name, ranks, idf)


class Shortest(Task):
    """What a new task has to say, and no more."""

    name = "shortest"
    metric_name = "share of one-letter answers"

    def prompt(self, example: Example) -> str:
        return f"In one letter: {example.question}"

    def target(self, example: Example) -> str:
        return example.answers[0][0]

    def score(self, prediction: str, example: Example) -> float:
        return float(len(prediction) == 1)


def test_a_task_is_prompt_target_and_score():
    task, examples = Shortest(), load_examples("shapes", "vqa", "dev", limit=4)
    first = examples[0]
    assert task.prompts(first) == [task.target_prompt(first)] == [f"In one letter: {first.question}"]
    assert task.answer(first) == first.answers[0][0]
    assert (task.is_mean, task.ranks, task.idf, task.examples_of) == (True, False, False, "")
    assert task.aggregate(["a", "bc", "", "d"], examples) == 0.5
    summed = sum(task.statistics(said, first) for said in ("a", "bc", "cd", "ef"))
    assert task.metric(np.stack([summed, 2 * summed])).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_model_scores_one_and_a_useless_one_zero(name):
    task, examples = load_task(name), examples_for(name, 14)
    right = [perfect(task, e) for e in examples]
    assert [task.score(p, e) for p, e in zip(right, examples, strict=True)] == [1.0] * 14
    assert task.aggregate(right, examples) == 1.0
    assert task.aggregate([wrong(task, e) for e in examples], examples) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_statistics_add_up_to_the_aggregate_and_metric_keeps_leading_axes(name):
    task, examples = load_task(name), examples_for(name, 6)
    said = [wrong(task, e) if i % 3 == 0 else perfect(task, e) for i, e in enumerate(examples)]
    each = np.stack([task.statistics(p, e) for p, e in zip(said, examples, strict=True)])
    assert each.dtype == np.float64
    assert task.metric(each.sum(axis=0)) == task.aggregate(said, examples)
    one_by_one = [task.aggregate([p], [e]) for p, e in zip(said, examples, strict=True)]
    np.testing.assert_array_equal(task.metric(each.reshape(2, 3, -1)), np.reshape(one_by_one, (2, 3)))


@pytest.mark.parametrize("name", ["vqa", "ocr", "retrieval", "vqa-anls", "yes-no"])
def test_aggregate_is_the_mean_score_where_the_metric_is_a_mean(name):
    task, examples = load_task(name), examples_for(name, 5)
    said = [wrong(task, e) if i < 2 else perfect(task, e) for i, e in enumerate(examples)]
    assert task.aggregate(said, examples) == pytest.approx(3 / 5)
    assert mean_metric(mean_statistics(0.25) + mean_statistics(0.75)) == 0.5


@pytest.mark.parametrize("name", TASKS)
def test_aggregate_refuses_unequal_numbers_and_none(name):
    task, examples = load_task(name), examples_for(name, 2)
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        task.aggregate([perfect(task, examples[0])], examples)
    with pytest.raises(ValueError, match=f"no examples to compute {task.metric_name} over"):
        task.aggregate([], [])


@pytest.mark.parametrize("name", TASKS)
def test_the_target_follows_one_of_the_prompts(name):
    task = load_task(name)
    for example in examples_for(name, 3):
        assert task.target_prompt(example) in task.prompts(example)
        assert len(task.prompts(example)) == (50 if task.ranks else 1)
        assert task.target(example).strip()
