"""Numbers and lists as text."""

from __future__ import annotations

import pytest
from helpers import example_results as made

from hones_lens.hones.masking_result import masking_measure
from hones_lens.results.statistics import Interval
from hones_lens.viz import text as words
from hones_lens.viz.text import number, percent


def test_numbers_as_text():
    assert number(-0.0004) == "0.000"
    assert number(-0.0006) == "−0.001"
    assert number(0.25, 2, sign=True) == "+0.25"
    assert number(float("nan")) == "–"
    assert number(-0.00123456, 4, significant=True) == "−0.001235"
    assert number(12.0, 4, significant=True) == "12.00"
    assert [percent(r) for r in (15 / 1536, 0.01, 0.0996, 0.5, 1.0)] == [
        "0.98 %",
        "1 %",
        "10 %",
        "50 %",
        "100 %",
    ]
    assert words.brackets(-0.5, 0.25, 2) == "[−0.50, 0.25]" and words.span(None) == "–"
    assert words.span(Interval(0.1, -0.05, 123.456, 0.95, 9), 4, significant=True) == "[−0.05000, 123.5]"
    assert words.p_value(0.0123) == "0.012" and words.p_value(None) == "–"
    assert (
        words.nonbreaking("95 % of n = 5")
        == "95\N{NO-BREAK SPACE}% of n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}5"
    )
    assert words.join_words(["a"]) == "a" and words.join_words(["a", "b", "c"]) == "a, b and c"
    with pytest.raises(ValueError, match="'loss'; valid: metric, log_prob"):
        masking_measure(made.masking(), "loss")
