"""The verdict's words follow from the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import example_results as made

from hones_lens.app.report.verdict import (
    BOTH,
    LOG_PROB_ONLY,
    METRIC_ONLY,
    NEITHER,
    UNKNOWN,
    finding,
    headline,
    verdict,
)
from hones_lens.results.statistics import Interval
from hones_lens.viz.text import number, percent

CALM = [(0.92, -0.25)] * 20


def test_a_clear_drop_in_both_measures():
    text = verdict([made.masking(0.71, -1.05, controls=CALM)])
    assert finding(made.masking(0.71, -1.05, controls=CALM)) == BOTH
    assert text.startswith("These neurons carry part of the vqa task.")
    assert "0.98 % of the FFN neurons (15 of 1,536 neurons)" in text
    assert "Accuracy falls from 0.930 to 0.710 (drop 0.220, 95 % interval 0.170 to 0.270, n = 200)" in text
    assert "larger than with all 20 random sets (their mean 0.010, largest 0.010)" in text
    assert "(drop 0.840 nats, 95 % interval 0.720 to 0.960, n = 200)" in text


def test_a_clear_drop_in_the_probability_alone():
    result = made.masking(0.93, -0.6, controls=CALM)
    assert finding(result) == LOG_PROB_ONLY
    text = verdict([result])
    assert text.startswith(
        "The answers of the vqa task are not carried by these neurons, though they add to it."
    )
    assert "15 of 1,536" in text
    assert "Accuracy stays at 0.930" in text
    assert "no larger than with any of 20 random sets" in text


def test_a_clear_drop_in_the_metric_alone():
    result = made.masking(0.71, -0.25, controls=CALM)
    assert finding(result) == METRIC_ONLY
    assert verdict([result]).startswith("The evidence is mixed")


def test_no_clear_drop_at_all():
    result = made.masking(0.92, -0.25, controls=[(0.91, -0.3)] * 15 + [(0.925, -0.22)] * 5)
    assert finding(result) == NEITHER
    text = verdict([result])
    assert text.startswith("The vqa task is not carried by these neurons.")
    assert "0.98 % of the FFN neurons (15 of 1,536 neurons)" in text
    assert "larger than with 5 of 20 random sets" in text


def test_one_random_set_that_costs_as_much_is_enough_against_it():
    tied_with_one = made.masking(0.71, -1.05, controls=[*CALM[1:], (0.71, -1.05)])
    assert finding(tied_with_one) == NEITHER
    beaten_by_a_hair = made.masking(0.71, -1.05, controls=[*CALM[1:], (0.7101, -1.0499)])
    assert finding(beaten_by_a_hair) == BOTH


def test_an_interval_that_reaches_0_settles_nothing():
    at_0 = made.masking(0.88, -1.05, controls=CALM)
    at_0 = replace(at_0, metric_interval=Interval(0.05, 0.0, 0.1, 0.95, 200))
    assert finding(at_0) == LOG_PROB_ONLY
    text = verdict([at_0])
    assert "not shown to be carried by these neurons" in text
    assert "The interval reaches 0, so 200 examples do not settle it." in text
    both = replace(at_0, log_prob_interval=Interval(0.84, -0.1, 1.7, 0.95, 200))
    assert finding(both) == NEITHER
    text = verdict([both])
    assert "not shown to be carried by these neurons" in text and "stand out" not in text
    assert "(accuracy and log-probability of the right answer), but 200 examples do not settle" in text
    above = replace(at_0, metric_interval=Interval(0.05, 1e-6, 0.1, 0.95, 200))
    assert finding(above) == BOTH


def test_a_gain_is_no_drop_even_if_random_sets_gain_more():
    gain = made.masking(0.95, -0.1, controls=[(0.96, -0.05)] * 20)
    assert gain.beats("metric") == 20
    assert finding(gain) == NEITHER
    assert "rises from 0.930 to 0.950" in verdict([gain])


def test_no_random_sets_and_no_masking():
    text = verdict([made.masking(controls=())])
    assert finding(made.masking(controls=())) == UNKNOWN
    assert text.startswith("Nothing can be said about these neurons in particular.")
    assert "random sets (their" not in text
    assert verdict([]).startswith("No neurons were masked")


def test_other_shares_and_kinds_are_told_in_order():
    text = verdict(made.curve()[::-1])
    *_, shares, kinds = text.split("\n")
    assert shares.endswith("at 2 %, 4.9 % and 10 % in both measures; at 0.46 % in neither.")
    results = made.curve()
    for kind in made.KINDS:
        for result in results:
            drop = result.kinds[kind].baseline - result.kinds[kind].masked
            told = f"{number(drop)} at {percent(result.ratio)}" in kinds
            assert told == (result.beats("metric", kind) == 20)


def test_kinds_that_all_do_as_random_sets_do():
    result = made.masking(0.93, -0.21, controls=[(0.8, -0.5)] * 20)
    assert verdict([result]).endswith(
        "On no single kind of question does accuracy drop more than with every random set."
    )


def test_the_headline_is_the_nearest_share():
    results = made.curve()
    assert headline(results) is results[1]
    assert headline(results, 0.05) is results[3]
    assert headline(results[3:]) is results[3]
    with pytest.raises(ValueError, match="no masking"):
        headline([])
