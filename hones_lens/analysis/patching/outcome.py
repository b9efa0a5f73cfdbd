"""Results of estimates and of paths, told as activation patching tells its own: as shares or as changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.batches import DIRECTIONS
from hones_lens.analysis.patching.metrics import Metric
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.results import DRAWS, Labelled, mean_over_pairs, resampled

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


_CHUNK_ELEMENTS = 4_000_000


_VERBS = {"denoise": "restored", "noise": "lost"}


def share_of_gap(
    change: Float[Tensor, "*cells pair"], gap: Float[Tensor, " pair"], draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Mean change over mean gap, with 95 % bootstrap intervals, as arguments of `Labelled`.

    A draw takes a pair's change and its gap together.

    Raises:
        ValueError: A mean gap of 0.
    """
    n = len(gap)
    if float(gap.mean()) == 0:
        raise ValueError("clean and corrupted runs don't differ by this metric: there is no share to restore")
    out: dict[str, Any] = {"values": change.mean(-1) / gap.mean(), "n": n}
    if n < 2 or not draws:
        return out
    counts, flat = resampled(n, draws, seed), change.reshape(-1, n).numpy()
    whole = counts @ gap.numpy()
    counts, whole = counts[whole != 0], whole[whole != 0, None]
    width, ends = max(1, _CHUNK_ELEMENTS // draws), []
    for start in range(0, len(flat), width):
        ratios = counts @ flat[start : start + width].T / whole
        ends.append(np.quantile(ratios, (0.025, 0.975), axis=0) + 0.0)  # no negative zeros
    low, high = np.concatenate(ends, axis=1)
    out["low"], out["high"] = (torch.from_numpy(end).view(change.shape[:-1]) for end in (low, high))
    return out
