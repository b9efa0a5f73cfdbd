"""Critical heads measured again, on examples that did not select them.

The largest of many noisy scores are too large on the examples that made them the largest. What is reported
of a selected head is therefore its drop on a held-out split, beside heads that were drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions
from hones_lens.hones.attribution.head_scores import INTERVENTIONS, HeadScores, significant_heads
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import (
    Component,
    Interval,
    Noise,
    Result,
    benjamini_hochberg,
    bootstrap_interval,
    html_table,
    mean_difference_interval,
    metric_interval,
    noise_legend,
    noise_mark,
    not_above_chance,
    permutation_p,
    with_marks,
)
from hones_lens.tasks import Task

Head = tuple[int, int]


@dataclass(frozen=True)
class HeldOutHead:
    """One selected head.

    Attributes:
        layer, head: The head's indices.
        score, selected_on: Its score on the examples that selected it, and that with its interval; None of
            heads whose intervals are not known.
        significant: Whether that score stands at the false discovery rate over all heads there; None where
            not every head was measured on every example (a race, a prefilter).
        drop, p: Drop of the metric on the held-out examples (paired bootstrap), and the two-sided p-value
            of a paired permutation test of no drop.
        holds: Whether it falls there too, at the false discovery rate over the selected heads.
    """

    layer: int
    head: int
    score: float
    selected_on: Interval | None
    significant: bool | None
    drop: Interval
    p: float
    holds: bool


@dataclass(frozen=True, repr=False)
class HeldOutHeads(Result):
    """The selected heads of one task on examples that did not select them.

    Attributes:
        task, metric_name, model_name: What was measured.
        n_selected_on: How many examples selected the heads.
        baseline: The metric of the clean model on the held-out examples.
        heads: The selected heads, best first as they were selected.
        mean_drop: Of the selected heads' drops, each head replaced alone.
        random: Mean drop of each of several random sets of as many other heads (see `random_head_sets`).
        q: The false discovery rate.
        example_ids: The held-out examples.
        chance: The metric of guessing.
        noise: What a model in bfloat16 or float16 can't tell; None in wider types.
    """

    kind: ClassVar[str] = "held-out heads"

    task: str
    metric_name: str
    model_name: str
    n_selected_on: int
    baseline: Interval
    heads: tuple[HeldOutHead, ...]
    mean_drop: Interval
    random: tuple[float, ...]
    q: float
    example_ids: tuple[str, ...]
    chance: float = 0.0
    noise: Noise | None = None

    @property
    def problem(self) -> str:
        """Why nothing can be concluded from these drops, in words; empty where something can."""
        return not_above_chance(self.metric_name, self.baseline.value, self.baseline, self.chance)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head."""
        rows = []
        for head in self.heads:
            row = {name: value for name, value in vars(head).items() if name not in ("drop", "selected_on")}
            bounds = (
                (None, None) if head.selected_on is None else (head.selected_on.low, head.selected_on.high)
            )
            row |= dict(zip(("score_low", "score_high"), bounds, strict=True))
            row |= {"drop": head.drop.value, "drop_low": head.drop.low, "drop_high": head.drop.high}
            rows.append({**row, "n": head.drop.n})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [
            f"{self.model_name}, {self.task}: {len(self.heads)} heads selected on {self.n_selected_on} "
            f"examples, measured again on {len(self.example_ids)} others",
            f"  {self.metric_name} {self.baseline}",
            *([f"  {self.problem}"] if self.problem else []),
        ]
        for head in self.heads:
            verdict, drop = "holds" if head.holds else "does not hold", f"{head.drop}{self.mark(head)}"
            lines.append(
                f"  L{head.layer}H{head.head:<3} drop {drop}, p = {head.p:.3g}, {verdict} (FDR "
                f"{100 * self.q:g} %); where it was selected {head.selected_on or f'{head.score:.3f}'}"
            )
        mean = f"  mean drop {self.mean_drop}"
        if self.random:
            mean += f"; of {len(self.random)} random sets of other heads {np.mean(self.random):.3f}"
            mean += f" (from {min(self.random):.3f} to {max(self.random):.3f}), n = {len(self.example_ids)}"
        return "\n".join([*lines, mean, *([f"  {self.noise_legend}"] if self.noise_legend else [])])

    def mark(self, head: HeldOutHead) -> str:
        """What is put behind a drop that is below the noise of the model's type, else nothing."""
        return noise_mark(head.drop.value, self.noise)

    @property
    def noise_legend(self) -> str:
        """What the mark says; empty where no drop has it."""
        return noise_legend(self.noise, *(head.drop.value for head in self.heads))

    def _repr_html_(self) -> str:
        legend = f"<p>{escape(self.noise_legend)}</p>" if self.noise_legend else ""
        return html_table(with_marks(self.to_dataframe(), "drop", self.noise)) + legend


@takes_iterables
def remeasure_heads(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    heads: HeadScores,
    *,
    k: int | None = None,
    draws: int = 5,
    q: float = 0.05,
    seed: int = 0,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> HeldOutHeads:
    """Measure the selected heads on examples that did not select them, beside random other heads.

    Each head alone is replaced by the mean of its layer's others (HONES eq. H1), where it was when selected.

    Args:
        model: The model.
        task: A task or its name.
        examples: Held-out examples.
        heads: What `localize_heads` returned.
        k: How many heads; default: as many as were selected.
        draws: Random sets of heads that are not among the selected.
        q: False discovery rate.
        seed: Of the random sets, the bootstrap and the permutations.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Raises:
        ValueError: No selected heads, heads of another model, task or intervention, or an example that
            selected them.
        FloatingPointError: Logits that are not finite; names head and examples.
    """
    options, task = SweepOptions.of(options, sweep), engine.as_task(task)
    engine.check_examples(task, examples)
    _check(model, task, examples, heads)
    if not (top := heads.top(k)):
        raise ValueError("no head lowers the metric: there is nothing to measure again")
    cfg, selected = model.cfg, [(c.layer, c.index) for c in top]
    random = random_head_sets(selected, cfg.n_layers, cfg.n_heads, draws, seed)
    cells = [*selected, *sorted({head for heads in random for head in heads})]
    arms = [[], *([replace_with_other_heads_mean(*cell, heads.positions)] for cell in cells)]
    base, *outcomes = engine.measure(model, task, examples, arms, options, label="held-out heads")
    clean, ids = np.array(base.statistics), tuple(example.id for example in examples)
    intervened = [np.array(outcome.statistics) for outcome in outcomes[: len(selected)]]
    drops = {cell: base.metric(task) - arm.metric(task) for cell, arm in zip(cells, outcomes, strict=True)}
    return HeldOutHeads(
        task=task.name,
        metric_name=task.metric_name,
        model_name=cfg.model_name,
        n_selected_on=len(heads.example_ids),
        baseline=metric_interval(task, clean, seed=seed),
        heads=_remeasured(task, heads, top, clean, intervened, q, seed),
        mean_drop=mean_difference_interval(task, clean, intervened, seed=seed),
        random=tuple(float(np.mean([drops[cell] for cell in head_set])) for head_set in random),
        q=q,
        example_ids=ids,
        chance=engine.chance_of(task, examples),
        noise=engine.type_noise(model, task, examples, base, None, options, label="held-out heads"),
    )


def _remeasured(
    task: Task,
    heads: HeadScores,
    top: Sequence[Component],
    clean: np.ndarray,
    intervened: Sequence[np.ndarray],
    q: float,
    seed: int,
) -> tuple[HeldOutHead, ...]:
    """Drop and p-value of each selected head on the held-out examples, from the statistics of both arms."""
    drops = [bootstrap_interval(task, clean, statistics, seed=seed) for statistics in intervened]
    p = [permutation_p(task, clean, statistics, seed=seed) for statistics in intervened]
    rejections = benjamini_hochberg(p, q)[1]
    significant = None
    if heads.discoveries is not None:
        significant = {(c.layer, c.index) for c in significant_heads(heads, q, seed=seed)}
    return tuple(
        HeldOutHead(
            c.layer,
            c.index,
            score=c.score,
            selected_on=heads.interval(c.layer, c.index),
            significant=None if significant is None else (c.layer, c.index) in significant,
            drop=drop,
            p=value,
            holds=bool(rejected) and drop.value > 0,
        )
        for c, drop, value, rejected in zip(top, drops, p, rejections, strict=True)
    )


def _check(model: HookedVLM, task: Task, examples: Sequence[Example], heads: HeadScores) -> None:
    selected_with = (heads.model_name, heads.task, heads.intervention)
    expected = (model.cfg.model_name, task.name, INTERVENTIONS["mean"][0])
    for field, actual, wanted in zip(("model", "task", "intervention"), selected_with, expected, strict=True):
        if actual != wanted:
            raise ValueError(f"the heads are of {field} {actual!r}, not {wanted!r}")
    if shared := sorted({example.id for example in examples} & set(heads.example_ids)):
        raise ValueError(f"{len(shared)} examples selected the heads, the first is {shared[0]!r}")


@takes_iterables
def random_head_sets(
    selected: Sequence[Head], n_layers: int, n_heads: int, draws: int, seed: int = 0
) -> list[list[Head]]:
    """Random sets of as many heads that are not selected, with as many in each layer as can be.

    No more than half of a layer's other heads are drawn for its own: from a layer with few left every set
    would be the same. What is missing is drawn from all layers (all heads that are left, if they are fewer).
    """
    counts = np.bincount([layer for layer, _ in selected], minlength=n_layers)
    others = [(layer, head) for layer, head in np.ndindex(n_layers, n_heads) if (layer, head) not in selected]
    head_sets = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        chosen: list[Head] = []
        for layer, count in enumerate(counts):
            layer_heads = [head for head in others if head[0] == layer]
            picked = rng.permutation(len(layer_heads))[: min(int(count), len(layer_heads) // 2)]
            chosen += [layer_heads[i] for i in picked]
        remaining = [head for head in others if head not in chosen]
        picked = rng.permutation(len(remaining))[: len(selected) - len(chosen)]
        chosen += [remaining[i] for i in picked]
        if chosen:
            head_sets.append(sorted(chosen))
    return head_sets
