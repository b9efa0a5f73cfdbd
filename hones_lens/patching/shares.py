"""Results of estimates and of paths, told as activation patching tells its own: as shares or as changes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hones_lens.labelled import Labelled
from hones_lens.patching.activation import share_of_gap
from hones_lens.patching.effects import DIRECTIONS, mean_over_pairs
from hones_lens.patching.metrics import Metric
from hones_lens.patching.pairs import PatchPairs

_VERBS = {"denoise": "restored", "noise": "lost"}


def as_result(
    change: Float[Tensor, "pair *cells"],
    gap: Float[Tensor, " pair"],
    pairs: PatchPairs,
    *,
    axes: tuple[str, ...],
    labels: dict[str, tuple[Any, ...]],
    metric: str | Metric,
    direction: str,
    of: str,
    raw: bool,
    by_pair: bool,
    draws: int,
) -> Labelled:
    """Each pair's changes of the metric as a result.

    Args:
        change: Of the metric, on the CPU.
        gap: The metric of the source run minus that of the base run.
        pairs: Whose.
        axes, labels: Of the result, without pairs.
        metric, direction: What was measured, and how.
        of: Of what, in words.
        raw: The mean change instead of the share of the whole, a ratio of means.
        by_pair: Each pair's change on a first axis `pair`.
        draws: Resamples of the pairs for the intervals; 0 for none.

    Raises:
        ValueError: A mean gap of 0, of which there is no share, or `draws` below 0.
    """
    told = metric if isinstance(metric, str) else getattr(metric, "__name__", "the metric")
    change, gap = change.double(), gap.double()
    clean_end = "clean − corrupted" if direction == "denoise" else "corrupted − clean"
    notes = (f"{told}: {clean_end} is {float(gap.mean()):.4g}",)
    if by_pair:
        says = f"change of {told}, {of}, {DIRECTIONS[direction]}"
        return Labelled(says, change, ("pair", *axes), labels | {"pair": pairs.ids}, notes=notes)
    means = mean_over_pairs(change, draws)
    says = f"change of {told}, {of}, {DIRECTIONS[direction]}"
    if not raw:
        says = f"share of {told} {_VERBS[direction]}, {of}, {DIRECTIONS[direction]}"
        means = share_of_gap(change.movedim(0, -1), gap, draws)
    return Labelled(says, axes=axes, labels=labels, notes=notes, **means)
