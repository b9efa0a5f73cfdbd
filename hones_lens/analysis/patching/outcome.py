"""Results of all kinds of patching: mean changes of the metric, or shares of the whole effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.batches import DIRECTIONS
from hones_lens.analysis.patching.metrics import Metric, reads_whole_answer
from hones_lens.analysis.patching.pair_answers import PairAnswers
from hones_lens.analysis.patching.pairs import PatchPairs, measured_note, measured_tokens
from hones_lens.engine import SweepKeywords
from hones_lens.model import HookedVLM
from hones_lens.results import DRAWS, Labelled, Noise, bootstrap_ends, mean_over_pairs

_VERBS = {"denoise": "restored", "noise": "lost"}
_ROUNDING = 1e-6  # two passes over the same inputs differ by as much in our own metrics, in nats or logits


class SummaryKeywords(TypedDict, total=False):
    """Keywords of `Summary`: how the result of patching is summarised."""

    raw: bool
    by_pair: bool
    draws: int
    seed: int


class PatchingKeywords(SummaryKeywords, SweepKeywords, total=False):
    """Keywords of stages of patching: of `Summary` and of `SweepOptions`."""


@dataclass(frozen=True)
class Summary:
    """How the changes of a metric in every pair are summarised.

    Attributes:
        raw: Whether to give the mean change of the metric instead of its share of the whole effect (a ratio
            of means over pairs).
        by_pair: Whether to keep each pair's change, on a first axis `pair`, without intervals.
        noise: Of the metric in the model's type, where tables show it.
        draws, seed: Of the bootstrap over pairs (paired: a draw takes all runs of a pair together); 0 draws
            for no intervals.

    Raises:
        ValueError: `draws` below 0.
    """

    raw: bool = False
    by_pair: bool = False
    draws: int = DRAWS
    seed: int = 0
    noise: Noise | None = None

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise ValueError(f"draws must not be negative: {self.draws}")

    def result(
        self,
        change: Float[Tensor, "pair *cells"],
        gap: Float[Tensor, " pair"],
        pairs: PatchPairs,
        *,
        axes: tuple[str, ...],
        labels: dict[str, tuple[Any, ...]],
        metric: str | Metric,
        direction: str,
        of: str,
        answers: PairAnswers,
        notes: Sequence[str],
    ) -> Labelled:
        """Summarise the changes of all pairs in one result.

        Args:
            change: Change of the metric, on the CPU.
            gap: The metric of the source run minus that of the base run.
            pairs: The pairs.
            axes, labels: Axes and labels of the result, without the axis of pairs.
            metric, direction: The metric, and the direction of patching.
            of: Description of what was patched.
            answers: What the model answers unpatched; noted, with a warning if some pairs are wrong.
            notes: Notes of the result.

        Raises:
            ValueError: A mean gap of 0, of which there is no share.
        """
        name, noise = metric_name(metric), self.noise
        change, gap = change.double(), gap.double()
        first, *others = notes
        answers.warn()
        notes = (first, str(answers), *others)
        description = f"change of {name}, {of}, {DIRECTIONS[direction]}"
        if self.by_pair:
            labels = labels | {"pair": pairs.ids}
            return Labelled(description, change, ("pair", *axes), labels, notes=notes, noise=noise)
        if self.raw:
            values = mean_over_pairs(change, self.draws, seed=self.seed)
        else:
            least = _ROUNDING if isinstance(metric, str) else 0.0
            description = f"share of {name} {_VERBS[direction]}, {of}, {DIRECTIONS[direction]}"
            values = share_of_gap(change.movedim(0, -1), gap, self.draws, self.seed, least)
            if noise is not None and noise.metric is not None:
                noise = replace(noise, metric=noise.metric / abs(float(gap.mean())))
        return Labelled(description, axes=axes, labels=labels, notes=notes, noise=noise, **values)


def outcome_notes(
    model: HookedVLM, pairs: PatchPairs, gap: Tensor, metric: str | Metric, direction: str
) -> tuple[str, ...]:
    """The mean gap, the tokens of the answers that it is of, and whether it is small, as lines of text."""
    clean_end = "clean − corrupted" if direction == "denoise" else "corrupted − clean"
    whole = f"{metric_name(metric)}: {clean_end} is {float(gap.double().mean()):.4g}"
    measured = measured_note(measured_tokens(model, pairs, reads_whole_answer(metric)))
    return whole, measured, *gap_notes(gap, direction)


def metric_name(metric: str | Metric) -> str:
    """Name of a metric."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "the metric")


def gap_notes(gap: Float[Tensor, " pair"], direction: str) -> tuple[str, ...]:
    """A note if the two runs hardly differ, or the wrong way: within two standard errors of 0.

    Args:
        gap: The metric of the source run minus that of the base run.
        direction: Direction of patching.
    """
    gap = gap if direction == "denoise" else -gap
    error = 2 * float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
    if float(gap.mean()) > error:
        return ()
    return (f"clean and corrupted differ by {gap.mean():.3g} ± {error:.3g} only: shares mean little",)


def share_of_gap(
    change: Float[Tensor, "*cells pair"],
    gap: Float[Tensor, " pair"],
    draws: int = DRAWS,
    seed: int = 0,
    least: float = 0.0,
) -> dict[str, Any]:
    """Mean change over mean gap, with 95 % bootstrap intervals, as arguments of `Labelled`.

    A draw takes a pair's change and its gap together.

    Raises:
        ValueError: A mean gap of 0, or up to `least`.
    """
    n = len(gap)
    if abs(float(gap.mean())) <= least:
        raise ValueError("clean and corrupted runs don't differ by this metric: there is no share to restore")
    out: dict[str, Any] = {"values": change.mean(-1) / gap.mean(), "n": n}
    if n < 2 or not draws:
        return out
    gaps = gap.numpy()

    def shares(counts: np.ndarray, part: np.ndarray) -> np.ndarray:
        whole = counts @ gaps
        return counts[whole != 0] @ part / whole[whole != 0, None]

    ends = bootstrap_ends(shares, change.reshape(-1, n).numpy().T, draws, seed=seed)
    ends += 0.0  # no negative zeros
    out["low"], out["high"] = (torch.from_numpy(end).view(change.shape[:-1]) for end in ends)
    return out
