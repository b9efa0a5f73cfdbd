"""The scores of every head that a localization returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hones_lens.model import HookedVLM
from hones_lens.results import (
    Component,
    Interval,
    Noise,
    RaceResult,
    Result,
    benjamini_hochberg,
    html_table,
    noise_legend,
    noise_mark,
    not_above_chance,
    ranked,
    sign_flip_p,
    with_marks,
)

LEVEL = 0.95  # of the scores' intervals
_Q = 0.05  # false discovery rate of the verdicts
# By what `localize_heads` does to a head: what it is called in results, and in words.
INTERVENTIONS = {
    "mean": ("replace_with_other_heads_mean", "drop when replaced by the mean of the layer's others"),
    "patch": ("patch", "drop when patched with its output on the corrupted input"),
}


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """How much a task's metric falls when each head is replaced.

    `plot()` draws a heat map, layers × heads.

    Attributes:
        task, metric_name: What was measured.
        intervention, positions: What was done to the heads, and where: `all`, or `last` (from the end of the
            prompt on).
        model_name: Whose heads.
        scores: Base minus intervened metric over all examples, [layer head] (w of HONES eq. H1).
        drops: The same for each example, [layer head example]; captions: smoothed sentence BLEU.
        baseline: The metric without intervention.
        base_scores: Its value for each example, [example].
        example_ids, kinds: Which examples, in the order of `drops`.
        top_k: How many heads are critical by default.
        traded: What exactness was traded for speed, in words; empty where scores are exact. Then a head
            may have been measured on some examples alone (`scores` is their mean, and the other drops are
            NaN), or on none (its score is NaN, and it is never critical).
        race: Who won, if heads were raced: only these are critical.
        near_ties: Choices between tokens that rounding could have decided (see `speculation.Tally`).
        baseline_interval: Of `baseline`; None where it is not known (read from a file of HONES's).
        score_ends: Ends of the 95 % bootstrap interval of each score, [layer head 2]; NaN of a head that was
            measured on fewer than two examples; None where they are not known. A head that was selected
            for its score here does worse elsewhere: see `remeasure_heads`.
        chosen: The heads that were asked for, as (layer, head); None for all. Others were not measured:
            their scores and drops are NaN, they are never critical, and no test counts them.
        chance: The metric of guessing; None where no metric of a task is measured (`patch`).
        noise: What a model in bfloat16 or float16 can't tell; None in wider types.
    """

    kind: ClassVar[str] = "heads"

    task: str
    metric_name: str
    intervention: str
    model_name: str
    scores: Tensor
    drops: Tensor
    baseline: float
    base_scores: Tensor
    example_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    top_k: int
    traded: str = ""
    race: RaceResult | None = None
    near_ties: int = 0
    positions: str = "all"
    baseline_interval: Interval | None = None
    score_ends: Tensor | None = None
    chosen: tuple[tuple[int, int], ...] | None = None
    chance: float | None = 0.0
    noise: Noise | None = None

    @property
    def problem(self) -> str:
        """Why nothing can be concluded from these scores, in words; empty where something can."""
        if self.chance is None:
            return ""
        return not_above_chance(self.metric_name, self.baseline, self.baseline_interval, self.chance)

    @property
    def measured(self) -> Tensor:
        """Whether each head was measured on any example, [layer head]."""
        return self.counts > 0

    @cached_property
    def asked(self) -> Tensor:
        """Whether each head was asked for, [layer head]; tests and false discovery rates count these."""
        if self.chosen is None:
            return torch.ones(self.scores.shape, dtype=torch.bool)
        asked = torch.zeros(self.scores.shape, dtype=torch.bool)
        asked[tuple(torch.tensor(self.chosen).T)] = True
        return asked

    @property
    def counts(self) -> Tensor:
        """The number of examples that each head was measured on, [layer head]."""
        return (~self.drops.isnan()).sum(-1)

    @property
    def mean_drops(self) -> Tensor:
        """Mean over the examples that each head was measured on, [layer head]; NaN without any."""
        return self.drops.nanmean(-1)

    @property
    def standard_errors(self) -> Tensor:
        """Standard errors of `mean_drops`, [layer head]; NaN with fewer than two examples."""
        squares = (self.drops - self.mean_drops[..., None]).square().nansum(-1)
        return (squares / (self.counts - 1) / self.counts).sqrt().where(self.counts > 1, torch.nan)

    def interval(self, layer: int, head: int) -> Interval | None:
        """One head's score with its interval; None where that is not known."""
        n = int(self.counts[layer, head])
        if self.score_ends is None or n < 2:
            return None
        low, high = self.score_ends[layer, head].tolist()
        return Interval(float(self.scores[layer, head]), low, high, LEVEL, n)

    @cached_property
    def p_values(self) -> Tensor | None:
        """P-values of the tests of no drop that `significant_heads` uses, [layer head].

        None where some heads that were asked for were not measured on every example, or there are fewer than
        two examples. NaN of heads that were not asked for.
        """
        n = len(self.example_ids)
        if n < 2 or bool((self.counts < n)[self.asked].any()):
            return None
        return _permutation_p_values(self, _draws_for(self, _Q))

    @cached_property
    def discoveries(self) -> frozenset[tuple[int, int]] | None:
        """The heads of `significant_heads`, at 5 %; None where there are no `p_values`."""
        if self.p_values is None:
            return None
        rejected = _rejected(self, self.p_values, _Q)
        return frozenset((int(layer), int(head)) for layer, head in rejected.nonzero().tolist())

    def top(self, k: int | None = None) -> list[Component]:
        """The k largest scores above zero, as (layer, index, score); ties by layer, then index.

        Raises:
            ValueError: More than were raced for.
        """
        k = self.top_k if k is None else k
        eligible = ~self.scores.isnan()
        if self.race is not None:
            if k > len(self.race.winners):
                raise ValueError(f"{k} heads asked for, but {len(self.race.winners)} were raced for")
            winners = torch.zeros_like(eligible).flatten()
            winners[list(self.race.winners)] = True
            eligible = winners.view_as(eligible)
        return ranked(self.scores.where(eligible, -torch.inf), k, positive_only=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, score, the ends of its 95 % interval, p, whether it stands.

        Then mean, standard error and number of the examples' drops. `p` is NaN and `stands` None where not
        every head that was asked for was measured on every example, and of heads that were not asked for.
        """
        unknown = torch.full_like(self.scores, torch.nan)
        low, high = (unknown, unknown) if self.score_ends is None else self.score_ends.unbind(-1)
        columns = {
            "score": self.scores,
            "low": low,
            "high": high,
            "p": unknown if self.p_values is None else self.p_values,
            "mean_drop": self.mean_drops,
            "standard_error": self.standard_errors,
            "n": self.counts,
        }
        known, discoveries = self.discoveries is not None, self.discoveries or frozenset()
        rows = [
            {
                "layer": layer,
                "head": head,
                **{name: values[layer, head].item() for name, values in columns.items()},
                "stands": (layer, head) in discoveries if bool(self.asked[layer, head]) and known else None,
            }
            for layer, head in np.ndindex(*self.scores.shape)
        ]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as the values that JSON holds, with the critical heads as (layer, head, score)."""
        return {**super().to_dict(), "top": [list(c) for c in self.top()]}

    def __str__(self) -> str:
        baseline = self.baseline_interval or f"{self.baseline:.3f} on {len(self.example_ids)} examples"
        done = dict(INTERVENTIONS.values()).get(self.intervention, self.intervention)
        lines = [
            f"{self.model_name}, {self.task}: {self.metric_name} {baseline}",
            *([self.problem] if self.problem else []),
            f"critical heads ({done}), on the examples that select them:",
        ]
        lines += [self._line(c) for c in self.top()]
        if legend := self.noise_legend:
            lines.append(legend)
        if self.limits:
            lines.append(self.limits)
        if self.traded:
            lines.append(f"not exact: {self.traded}")
        if self.near_ties:
            lines.append(f"near-ties between tokens that rounding may settle: {self.near_ties}")
        return "\n".join(lines)

    def _line(self, c: Component) -> str:
        line = f"  L{c.layer}H{c.index:<3} {self.interval(c.layer, c.index) or f'{c.score:+.4f}'}"
        line += noise_mark(c.score, self.noise)
        if self.discoveries is None or self.p_values is None:
            return line
        significant = (c.layer, c.index) in self.discoveries
        line += f", p = {float(self.p_values[c.layer, c.index]):.2g}"
        verdict = "stands" if significant else "does not stand"
        return f"{line}, {verdict} (FDR 5 % over {int(self.asked.sum())} heads)"

    @property
    def limits(self) -> str:
        """Which heads were asked for, in words; empty where all were."""
        if self.chosen is None:
            return ""
        n, total = len(self.chosen), self.scores.numel()
        return f"{n:,} of {total:,} heads were asked for; the others are not measured"

    def _repr_html_(self) -> str:
        best = self.to_dataframe().sort_values("score", ascending=False, kind="stable")
        shown = with_marks(best.dropna(subset="score").head(self.top_k), "score", self.noise)
        legend = f"<p>{escape(self.noise_legend)}</p>" if self.noise_legend else ""
        return html_table(shown, self.top_k, len(best)) + legend

    @property
    def noise_legend(self) -> str:
        """What the mark behind critical heads' scores says; empty where none has it."""
        return noise_legend(self.noise, *(c.score for c in self.top()))


def significant_heads(
    heads: HeadScores, q: float = 0.05, *, draws: int | None = None, seed: int = 0, dependent: bool = False
) -> list[Component]:
    """Heads whose mean drop is above zero, at a false discovery rate of q over all heads; best first.

    All heads are those that were asked for.

    One-sided paired permutation tests of `heads.drops` (captions: of the smoothed sentence BLEU).

    Args:
        heads: What `localize_heads` returned, exact: every head asked for measured on every example.
        q: False discovery rate.
        draws: Permutations; default: 10,000, or as many as it takes for one head to be found alone (the
            smallest p-value is 1 / (1 + draws)).
        seed: Of the permutations.
        dependent: Benjamini-Yekutieli, which holds however the tests depend on each other.

    Raises:
        ValueError: A head that was not measured on every example, or fewer than two examples.
    """
    incomplete = torch.nonzero((heads.counts < len(heads.example_ids)) & heads.asked).tolist()
    if incomplete:
        raise ValueError(
            f"{len(incomplete)} heads, the first L{incomplete[0][0]}H{incomplete[0][1]}, were not measured "
            "on every example: localize without racing or a prefilter"
        )
    p = _permutation_p_values(heads, _draws_for(heads, q) if draws is None else draws, seed)
    rejected = _rejected(heads, p, q, dependent)
    if not bool(rejected.any()):
        return []
    scores = heads.scores.where(rejected, -torch.inf)
    return ranked(scores, int(rejected.sum()))


def _permutation_p_values(heads: HeadScores, draws: int, seed: int = 0) -> Tensor:
    """One-sided p-values of no drop, [layer head]; NaN of heads that were not asked for."""
    p = torch.full(heads.scores.shape, torch.nan, dtype=torch.float64)
    p[heads.asked] = torch.from_numpy(sign_flip_p(heads.drops[heads.asked].numpy(), draws=draws, seed=seed))
    return p


def _rejected(heads: HeadScores, p: Tensor, q: float, dependent: bool = False) -> Tensor:
    """Whether each head's null hypothesis falls, [layer head], at the rate q over those asked for."""
    rejected = torch.zeros(p.shape, dtype=torch.bool)
    falls = benjamini_hochberg(p[heads.asked].numpy(), q, dependent=dependent)[1]
    rejected[heads.asked] = torch.from_numpy(falls)
    return rejected


def _draws_for(heads: HeadScores, q: float) -> int:
    return max(10_000, math.ceil(int(heads.asked.sum()) / q))


def all_heads(model: HookedVLM) -> list[tuple[int, int]]:
    """Every decoder head as (layer, head), in order."""
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
