"""POPE's measures against a table counted by hand and against scikit-learn's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks import load_task, yes_no_metrics

SAYS_YES = ("Yes", "yes, there is.", "There is a dog. It is not big", "Nothing like it", "")
SAYS_NO = ("No", "no", "No, there is no dog.", "There is not a dog", "I see no, dog", "No\n")


@pytest.mark.parametrize("text", SAYS_YES + SAYS_NO)
def test_what_counts_as_yes(text):
    assert yes_no_metrics([text], ["yes"])["yes_ratio"] == (text in SAYS_YES)


def test_a_table_counted_by_hand():
    """3 hits, 2 false alarms, 4 correct rejections, 1 miss."""
    predictions = ["Yes"] * 3 + ["Yes"] * 2 + ["No"] * 4 + ["No"]
    labels = ["yes"] * 3 + ["no"] * 2 + ["no"] * 4 + ["yes"]
    expected = {"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "yes_ratio": 0.5}
    assert yes_no_metrics(predictions, labels) == pytest.approx(expected)


answers = st.sampled_from(["yes", "no"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(answers, answers), min_size=1, max_size=30))
def test_the_measures_are_those_of_scikit_learn(pairs):
    said, labels = map(list, zip(*pairs, strict=True))
    measured = yes_no_metrics(said, labels)
    p, r, f, _ = precision_recall_fscore_support(
        labels, said, labels=["yes"], pos_label="yes", average="binary", zero_division=math.nan
    )
    assert measured["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert [measured[k] for k in ("precision", "recall")] == pytest.approx([p, r], nan_ok=True)
    if "yes" in said or "yes" in labels:
        assert measured["f1"] == pytest.approx(f)
    else:
        assert math.isnan(measured["f1"])


def test_other_labels_and_counts_are_refused():
    with pytest.raises(ValueError, match="label 'maybe' is neither 'yes' nor 'no'"):
        yes_no_metrics(["Yes"], ["maybe"])
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        yes_no_metrics(["Yes", "No"], ["yes"])
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        yes_no_metrics([], [])


BLANK = Scene((), "ACE", 0, 2, 0, 110)


def asked(*answers: str) -> Example:
    return Example("pope/7", BLANK, question="Is there a dog in the image?", answers=answers)


@pytest.mark.parametrize("text", SAYS_YES + SAYS_NO)
def test_the_task_reads_answers_as_pope_does(text):
    task = load_task("yes-no")
    assert task.score(text, asked("yes")) == (text in SAYS_YES)
    assert task.score(text, asked("no")) == (text in SAYS_NO)


def test_the_task_asks_as_vqa_does_and_its_target_is_a_word():
    task = load_task("yes-no")
    expected = "Question: Is there a dog in the image?\nAnswer the question with a short phrase."
    assert task.prompts(asked("yes")) == [expected]
    assert [task.target(asked(answer)) for answer in ("yes", "No", "NO.")] == ["Yes", "No", "No"]
    assert task.target(asked("no", "yes", "yes")) == task.answer(asked("yes")) == "Yes"
    for answers, problem in ((("red",), "the answer 'red', neither yes nor no"), (("",), "no answers")):
        with pytest.raises(ValueError, match=f"'pope/7' has {problem}"):
            task.target(asked(*answers))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SAYS_YES + SAYS_NO), answers), min_size=1, max_size=30))
def test_the_task_counts_what_scikit_learn_counts(pairs):
    task = load_task("yes-no")
    texts, labels = map(list, zip(*pairs, strict=True))
    examples = [asked(label) for label in labels]
    said = ["yes" if text in SAYS_YES else "no" for text in texts]
    assert task.aggregate(texts, examples) == pytest.approx(accuracy_score(labels, said))
    summed = sum(task.statistics(text, e) for text, e in zip(texts, examples, strict=True))
    table = confusion_matrix(labels, said, labels=["yes", "no"])
    assert summed.tolist() == [table[0, 0], table[1, 0], table[0, 1], table[1, 1]]
    assert task.measures(summed) == pytest.approx(yes_no_metrics(texts, labels), nan_ok=True)
