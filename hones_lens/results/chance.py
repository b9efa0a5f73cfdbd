"""Whether the unchanged model does a task at all: what it can't do, no intervention can spoil."""

from __future__ import annotations

from hones_lens.results.statistics import Interval


def not_above_chance(metric_name: str, value: float, interval: Interval | None, chance: float) -> str:
    """Why nothing can be concluded from a metric's drops, in words; empty where something can.

    Args:
        metric_name: Of the metric.
        value, interval: The unchanged model's, over all examples; None where the interval is not known.
        chance: What guessing gives.
    """
    if (value if interval is None else interval.low) > chance:
        return ""
    shown = f"{value:.3f}" if interval is None else f"{interval:.3f}"
    guessing = "0" if chance == 0 else f"the {chance:.3f} of guessing"
    return (
        f"nothing can be concluded: the unchanged model's {metric_name}, {shown}, does not stand above "
        f"{guessing}"
    )
