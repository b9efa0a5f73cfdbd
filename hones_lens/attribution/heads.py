"""Critical heads by causal intervention (HONES eq. H1)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hones_lens import sweep
from hones_lens.attribution.gradients import first_order_falls
from hones_lens.config import find_settings
from hones_lens.data.examples import Example
from hones_lens.data.pairs import CounterfactualPair
from hones_lens.hooked_vlm import HookedVLM
from hones_lens.interventions import Hook, replace_with_other_heads_mean
from hones_lens.patching.measuring import measure_patches
from hones_lens.patching.pairs import PatchPairs, counterfactual
from hones_lens.patching.units import SITES, positions_of, targets_of
from hones_lens.racing import Race, RaceResult, Racing
from hones_lens.results import Component, nan_to_none, none_to_nan, ranked, read_json, write_json
from hones_lens.speculation import Tally
from hones_lens.statistics import benjamini_hochberg, sign_flip_p
from hones_lens.tasks import Task

_DEFAULT_SHARE = 0.03  # 30 of LLaVA-1.5-7B's 1,024 heads
# By what `localize_heads` does to a head: what it is called in results, and in words.
INTERVENTIONS = {
    "mean": ("replace_with_other_heads_mean", "drop when replaced by the mean of the layer's others"),
    "patch": ("patch", "drop when patched with its output on the corrupted input"),
}


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much a task's metric falls when each head is replaced.

    Attributes:
        task, metric_name: What was measured.
        intervention: What was done to the heads.
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
    """

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

    @property
    def counts(self) -> Tensor:
        """On how many of the examples each head was measured, [layer head]."""
        return (~self.drops.isnan()).sum(-1)

    @property
    def mean_drops(self) -> Tensor:
        """Mean over the examples that each head was measured on, [layer head]; NaN without any."""
        return self.drops.nanmean(-1)

    @property
    def standard_errors(self) -> Tensor:
        """Of `mean_drops`, [layer head]; NaN with fewer than two examples."""
        squares = (self.drops - self.mean_drops[..., None]).square().nansum(-1)
        return (squares / (self.counts - 1) / self.counts).sqrt().where(self.counts > 1, torch.nan)

    def top(self, k: int | None = None) -> list[Component]:
        """The k largest scores above zero, as (layer, index, score); ties by layer, then index.

        Raises:
            ValueError: More than were raced for.
        """
        k = self.top_k if k is None else k
        known = ~self.scores.isnan()
        if self.race is not None:
            if k > len(self.race.winners):
                raise ValueError(f"{k} heads asked for, but {len(self.race.winners)} were raced for")
            winners = torch.zeros_like(known).flatten()
            winners[list(self.race.winners)] = True
            known = winners.view_as(known)
        return ranked(self.scores.where(known, -torch.inf), k, positive_only=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, score; mean, standard error and number of the examples' drops."""
        columns = {
            "score": self.scores,
            "mean_drop": self.mean_drops,
            "standard_error": self.standard_errors,
            "n": self.counts,
        }
        rows = [
            {
                "layer": layer,
                "head": head,
                **{name: each[layer, head].item() for name, each in columns.items()},
            }
            for layer, head in np.ndindex(*self.scores.shape)
        ]
        return pd.DataFrame(rows)

    def save(self, file: str | Path) -> None:
        """Write everything to JSON, with the critical heads as a list of (layer, head, score)."""
        data = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        data["race"] = None if self.race is None else asdict(self.race)
        tensors = {name: nan_to_none(v.tolist()) for name, v in vars(self).items() if isinstance(v, Tensor)}
        write_json(file, {"kind": "heads", **data, **tensors, "top": [list(c) for c in self.top()]})

    @classmethod
    def load(cls, file: str | Path) -> HeadScores:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file.
        """
        data = read_json(file, "heads")
        for name in ("scores", "drops", "base_scores"):
            data[name] = torch.tensor(none_to_nan(data[name]), dtype=torch.float64)
        if data.get("race") is not None:
            data["race"] = RaceResult.from_dict(data["race"])
        for name in ("example_ids", "kinds"):
            data[name] = tuple(data[name])
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})

    def __str__(self) -> str:
        lines = [
            f"{self.model_name}, {self.task}: {self.metric_name} {self.baseline:.3f} "
            f"on {len(self.example_ids)} examples",
            f"critical heads ({dict(INTERVENTIONS.values()).get(self.intervention, self.intervention)}):",
        ]
        lines += [f"  L{c.layer}H{c.index:<3} {c.score:+.4f}" for c in self.top()]
        if self.traded:
            lines.append(f"not exact: {self.traded}")
        if self.near_ties:
            lines.append(f"near-ties between tokens that rounding may settle: {self.near_ties}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to_dataframe().sort_values("score", ascending=False).head(self.top_k).to_html(index=False)

    def plot(self) -> Any:
        """Heat map, layers × heads (a matplotlib figure)."""
        from hones_lens.viz.plots import head_heatmap

        return head_heatmap(self)


def default_top_k(model: HookedVLM) -> int:
    """K_h of `model_configs/`; 3 % of the heads for a model that has no entry there."""
    settings = find_settings(model.cfg.model_name)
    return (
        settings.top_k if settings else max(1, round(_DEFAULT_SHARE * model.cfg.n_layers * model.cfg.n_heads))
    )


def localize_heads(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example] = (),
    top_k: int | None = None,
    *,
    intervention: str = "mean",
    pairs: Sequence[CounterfactualPair] | PatchPairs | None = None,
    batch_size: int = 32,
    progress: bool = True,
    journal: MutableMapping[str, Any] | None = None,
    memory_budget: float | None = None,
    positions: str = "all",
    prefilter: int | None = None,
    racing: Racing | None = None,
    tally: Tally | None = None,
) -> HeadScores:
    """Score every decoder head by the fall of the task's metric when it is replaced (HONES eq. H1).

    Every head in turn is replaced by the mean of its layer's other heads, at every position of
    prompt and answer; the model answers greedily (24 new tokens) or ranks the candidates anew. By default
    this is exact: each score is that of the naive loop.

    With `intervention="patch"` a head's output on the clean input of a pair is replaced by its output on the
    corrupted one, and the metric is the difference of the two answers' logits.

    Args:
        model: The model.
        task: A task or its name.
        examples: The discovery examples; every one counts in both arms. With pairs: none, or the pairs'
            clean ones.
        intervention: `mean` or `patch`.
        pairs: Counterfactual pairs of the task, for `patch`.
        top_k: Critical heads to keep; default from `model_configs/`.
        batch_size: Examples at a time.
        progress: Show a progress bar, with the leading heads.
        journal: Finished batches, read and written (see `runs.Journal`).
        memory_budget: GB for activations; default: a share of what is free.
        positions: `last` replaces heads only from the end of the prompt on, which costs little but is
            another intervention: what heads do at the image's tokens stays.
        prefilter: Measure only so many heads, those with the largest fall of the right answer's
            log-probability to first order (attribution patching). The others get no score.
        racing: Find the top_k heads without measuring all of them on all examples (see `racing`).
        tally: Is counted up.

    Returns:
        HeadScores, base minus intervened, on the CPU.

    Raises:
        ValueError: No examples, one that lacks a field, a layer with a single head, fewer heads than
            top_k kept by the prefilter, or a race for a metric that is not a mean over examples; for
            `patch`, no pairs, other examples than theirs, a prefilter or a race.
        FloatingPointError: Logits that are not finite; names head and examples.
    """
    task = sweep.as_task(task)
    if intervention not in INTERVENTIONS:
        raise ValueError(f"unknown intervention {intervention!r}; valid: {', '.join(INTERVENTIONS)}")
    if intervention == "patch":
        if prefilter is not None or racing is not None:
            raise ValueError(
                "prefilter and racing are for intervention='mean': a prefilter estimates another fall, and "
                "races need scores within bounds, which differences of logits have not"
            )
        made = _pairs_of(model, task, pairs, examples)
        k = default_top_k(model) if top_k is None else top_k
        options = {"batch_size": batch_size, "progress": progress, "journal": journal}
        return _patched(model, task, made, k, positions, {**options, "memory_budget": memory_budget})
    if pairs is not None:
        raise ValueError("pairs are for intervention='patch'")
    if model.cfg.n_heads == 1:
        raise ValueError("a model with one head a layer has no other heads to take the mean of")
    sweep.check_examples(task, examples)
    k = default_top_k(model) if top_k is None else top_k
    cells, traded = cells_of(model), []
    if positions != "all":
        traded.append("heads replaced only from the end of the prompt on")
    if prefilter is not None:
        if not k <= prefilter:
            raise ValueError(f"prefilter keeps {prefilter} heads, fewer than the {k} asked for")
        falls = first_order_falls(model, task, examples, batch_size=batch_size, progress=progress)
        traded.append(
            f"the best {prefilter} of {len(cells)} heads by attribution patching, others unmeasured"
        )
        cells = sorted((c.layer, c.index) for c in ranked(falls, prefilter))
    tally = Tally() if tally is None else tally
    options = {"batch_size": batch_size, "progress": progress, "journal": journal, "tally": tally}
    options["memory_budget"] = memory_budget
    arms = [[replace_with_other_heads_mean(*cell, positions)] for cell in cells]
    race = None
    if racing is None:
        base, drops, scores = _measure_all(model, task, examples, cells, arms, options)
    else:
        base, drops, scores, race = _race(model, task, examples, arms, k, racing, options)
        traded.append(
            f"heads raced (right up to {racing.epsilon:g} with probability {1 - racing.delta:g}; "
            f"{np.mean(~np.isnan(drops)):.0%} of the cells measured)"
        )
    where = tuple(zip(*cells, strict=True))
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    all_drops = torch.full((*shape, len(examples)), torch.nan, dtype=torch.float64)
    all_scores = torch.full(shape, torch.nan, dtype=torch.float64)
    all_drops[where], all_scores[where] = torch.from_numpy(drops), torch.from_numpy(scores)
    if race is not None:
        race = replace(race, winners=tuple(cells[i][0] * shape[1] + cells[i][1] for i in race.winners))
    return HeadScores(
        task=task.name,
        metric_name=task.metric_name,
        intervention=INTERVENTIONS["mean"][0],
        model_name=model.cfg.model_name,
        scores=all_scores,
        drops=all_drops,
        baseline=base.metric(task),
        base_scores=torch.tensor(base.scores, dtype=torch.float64),
        example_ids=tuple(example.id for example in examples),
        kinds=tuple(example.kind for example in examples),
        top_k=k,
        traded="; ".join(traded),
        race=race,
        near_ties=tally.near_ties,
    )


def _pairs_of(
    model: HookedVLM,
    task: Task,
    pairs: Sequence[CounterfactualPair] | PatchPairs | None,
    examples: Sequence[Example],
) -> PatchPairs:
    """The pairs, prepared."""
    if pairs is None or not len(pairs):
        raise ValueError("intervention='patch' needs pairs, e.g. of `hones_lens.counterfactual_pairs`")
    made = pairs if isinstance(pairs, PatchPairs) else counterfactual(model, pairs, task)
    if made.task not in ("", task.name):
        raise ValueError(f"pairs of task {made.task!r} for task {task.name!r}")
    if len(examples) and tuple(example.id for example in examples) != made.ids:
        raise ValueError("patching reads the pairs, not these examples: give none, or the pairs' clean ones")
    return made


def _patched(
    model: HookedVLM, task: Task, pairs: PatchPairs, k: int, positions: str, options: dict[str, Any]
) -> HeadScores:
    """Every head's output on the corrupted input put into the clean run."""
    if positions not in ("all", "last"):
        raise ValueError(f"unknown positions {positions!r}; valid: all, last")
    site = SITES["z"]
    where = positions_of(model, pairs, site, "group", [positions])
    options |= {"direction": "noise", "metric": "logit_diff"}
    found = measure_patches(model, pairs, site, targets_of(site, model.cfg), where, **options)
    drops = (found.clean - found.values).view(model.cfg.n_layers, model.cfg.n_heads, -1)
    return HeadScores(
        task=task.name,
        metric_name="logit difference",
        intervention=INTERVENTIONS["patch"][0],
        model_name=model.cfg.model_name,
        scores=drops.mean(-1),
        drops=drops,
        baseline=float(found.clean.mean()),
        base_scores=found.clean,
        example_ids=pairs.ids,
        kinds=tuple(pair.clean.kind for pair in pairs.facts) or ("",) * len(pairs),
        top_k=k,
        traded="" if positions == "all" else "heads patched only at the end of the prompt",
    )


def _measure_all(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    cells: Sequence[tuple[int, int]],
    arms: Sequence[Sequence[Hook]],
    options: dict[str, Any],
) -> tuple[sweep.Outcome, np.ndarray, np.ndarray]:
    """The clean outcome, every head's drops [head example], and its score."""

    def leaders(found: list[sweep.Outcome]) -> str:
        so_far = [found[0].metric(task) - outcome.metric(task) for outcome in found[1:]]
        best = np.argsort(-np.array(so_far), kind="stable")[:3]
        return "leading: " + ", ".join(f"L{cells[i][0]}H{cells[i][1]} {so_far[i]:.3f}" for i in best)

    base, *under = sweep.measure(
        model, task, examples, [[], *arms], label="heads", leaders=leaders, **options
    )
    drops = np.array(base.scores) - np.array([outcome.scores for outcome in under])
    return base, drops, np.array([base.metric(task) - outcome.metric(task) for outcome in under])


def _race(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    k: int,
    racing: Racing,
    options: dict[str, Any],
) -> tuple[sweep.Outcome, np.ndarray, np.ndarray, RaceResult]:
    """As `_measure_all`, with NaN where a head had left the race; the clean model sees every example."""
    if not task.is_mean:
        raise ValueError(f"{task.metric_name} is not a mean over examples, so heads can't be raced on it")
    race, order = Race(len(arms), len(examples), k, racing), np.random.default_rng(racing.seed)
    places = order.permutation(len(examples))
    drops = np.full((len(arms), len(examples)), np.nan)
    base = sweep.Outcome(statistics=[np.zeros(0)] * len(examples), scores=[0.0] * len(examples))
    for number, start in enumerate(range(0, len(examples), racing.round_size)):
        here = places[start : start + racing.round_size].tolist()
        running = np.flatnonzero(race.running).tolist()
        some, still = [examples[i] for i in here], [[], *(arms[i] for i in running)]
        clean, *under = sweep.measure(model, task, some, still, label=f"heads, round {number + 1}", **options)
        for place, score, statistics in zip(here, clean.scores, clean.statistics, strict=True):
            base.scores[place], base.statistics[place] = score, statistics
        if race.done:
            continue
        found = np.array(clean.scores) - np.array([outcome.scores for outcome in under])
        drops[np.ix_(running, here)] = found
        race.add(found)
    return base, drops, np.nanmean(drops, axis=1), race.result()


def significant_heads(
    heads: HeadScores, q: float = 0.05, *, draws: int = 10_000, seed: int = 0, dependent: bool = False
) -> list[Component]:
    """Heads whose mean drop is above zero, at a false discovery rate of q over all heads; best first.

    One-sided paired permutation tests of `heads.drops` (captions: of the smoothed sentence BLEU).

    Args:
        heads: What `localize_heads` returned, exact: every head measured on every example.
        q: False discovery rate.
        draws: Permutations. The smallest p-value is 1 / (1 + draws), so take more than heads / q.
        seed: Of the permutations.
        dependent: Benjamini-Yekutieli, which holds however the tests depend on each other.

    Raises:
        ValueError: A head that was not measured on every example, or fewer than two examples.
    """
    short = torch.nonzero(heads.counts < len(heads.example_ids)).tolist()
    if short:
        raise ValueError(
            f"{len(short)} heads, the first L{short[0][0]}H{short[0][1]}, were not measured on every "
            "example: localize without racing or a prefilter"
        )
    p = sign_flip_p(heads.drops.flatten(0, 1).numpy(), draws=draws, seed=seed)
    found = benjamini_hochberg(p, q, dependent=dependent)[1].reshape(heads.scores.shape)
    if not found.any():
        return []
    among = heads.scores.where(torch.from_numpy(found), -torch.inf)
    return ranked(among, int(found.sum()))


def cells_of(model: HookedVLM) -> list[tuple[int, int]]:
    """Every decoder head as (layer, head), in order."""
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
