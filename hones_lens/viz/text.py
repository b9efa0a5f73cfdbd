"""Formatting of numbers, intervals and lists as text, shared by figures, report and terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hones_lens.results import Interval


def number(value: float, digits: int = 3, sign: bool = False, *, significant: bool = False) -> str:
    """A number as text with a true minus sign; `–` for NaN.

    Args:
        value: The number.
        digits: Number of digits after the point.
        sign: Whether positive numbers have a plus sign.
        significant: Whether `digits` counts significant digits instead.
    """
    if math.isnan(value):
        return "–"
    text = f"{value:{'+' if sign else ''}{'#' if significant else ''}.{digits}{'g' if significant else 'f'}}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(ratio: float) -> str:
    """A ratio as a percentage with two significant digits: 0.00977 is `0.98 %`."""
    value = 100 * ratio
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def nonbreaking(text: str) -> str:
    """The text with no-break spaces in `95 %` and `n = 200`."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bn) (?==)|(?<=\bn =) ", "\N{NO-BREAK SPACE}", text)


def brackets(low: float, high: float, digits: int = 3, *, significant: bool = False) -> str:
    """The two ends of an interval, in brackets; digits as in `number`."""
    ends = (number(end, digits, significant=significant) for end in (low, high))
    return f"[{', '.join(ends)}]"


def span(interval: Interval | None, digits: int = 3, *, significant: bool = False) -> str:
    """The `brackets` of an interval; `–` for one that is not known."""
    if interval is None:
        return "–"
    return brackets(interval.low, interval.high, digits, significant=significant)


def p_value(p: float | None) -> str:
    """A p-value to two significant digits; `–` where nothing was tested."""
    return "–" if p is None else f"{p:.2g}"


def level(interval: Interval) -> str:
    """The coverage: `95 %`."""
    return f"{100 * interval.level:g} %"


def join_words(parts: Sequence[str]) -> str:
    """Words as an enumeration: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
