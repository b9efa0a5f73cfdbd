"""POPE's measures against a table counted by hand and against scikit-learn's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from hones_lens.tasks import yes_no_metrics

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
