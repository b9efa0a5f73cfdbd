"""Critical heads by causal intervention (HONES eq. H1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import torch

from hones_lens import engine
from hones_lens.analysis import (
    SITES,
    PatchPairs,
    counterfactual,
    measure_patches,
    patching_noise,
    positions_of,
    targets_of,
)
from hones_lens.data import CounterfactualPair, Example
from hones_lens.engine import SweepKeywords, SweepOptions, Tally, split_keywords
from hones_lens.hones.attribution.gradients import first_order_head_drops
from hones_lens.hones.attribution.head_scores import INTERVENTIONS, LEVEL, HeadScores
from hones_lens.interventions import Heads, Hook, Layers, choose_heads, replace_with_other_heads_mean
from hones_lens.model import HookedVLM, bounded_by, find_settings, require_choice, takes_iterables
from hones_lens.results import (
    Race,
    RaceResult,
    Racing,
    bootstrap_intervals,
    mean_interval,
    metric_interval,
    ranked,
)
from hones_lens.tasks import Task

_DEFAULT_SHARE = 0.03  # 30 of LLaVA-1.5-7B's 1,024 heads


def default_top_k(model: HookedVLM) -> int:
    """K_h of `model_configs/`; 3 % of the heads for a model that has no entry there."""
    settings = find_settings(model.cfg.model_name)
    return (
        settings.top_k if settings else max(1, round(_DEFAULT_SHARE * model.cfg.n_layers * model.cfg.n_heads))
    )


class HeadKeywords(SweepKeywords, total=False):
    """Keywords of `localize_heads`: which heads, and those of `SweepOptions`.

    Attributes:
        heads: Heads to measure, names, pairs or components (`"L18H29"`, `(18, 29)`); None: all.
        layers: Layers to measure, numbers, ranges or words (`10`, `range(10, 21)`, `"10-20"` with both
            ends in it); None: all. With both, the heads must lie in these layers.
    """

    heads: Heads | None
    layers: Layers | None


Cells = Sequence[tuple[int, int]]


@takes_iterables
def localize_heads(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example] = (),
    top_k: int | None = None,
    *,
    intervention: str = "mean",
    pairs: Sequence[CounterfactualPair] | PatchPairs | None = None,
    positions: str = "all",
    prefilter: int | None = None,
    racing: Racing | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[HeadKeywords],
) -> HeadScores:
    """Score every decoder head by the fall of the task's metric when it is replaced (HONES eq. H1).

    Every head in turn is replaced by the mean of its layer's other heads, at every position of prompt and
    answer; the model answers greedily (24 new tokens) or ranks anew: exactly, by default, as the naive loop.
    With `intervention="patch"` a head's output on the clean input of a pair is replaced by its output on the
    corrupted one, and the metric is the difference of the two answers' logits.

    Args:
        model: The model.
        task: A task or its name.
        examples: The discovery examples; every one counts in both arms. With pairs: none, or the pairs'
            clean ones.
        top_k: Critical heads to keep; default from `model_configs/`.
        intervention: `mean` or `patch`.
        pairs: Counterfactual pairs of the task, for `patch`.
        positions: `last` replaces heads only from the end of the prompt on, which costs little but is
            another intervention: what heads do at the image's tokens stays.
        prefilter: Measure only so many heads, those with the largest fall of the right answer's
            log-probability to first order (attribution patching). The others get no score.
        racing: Find the top_k heads without measuring all of them on all examples (see `racing`).
        options: How it runs, as `SweepOptions`.
        keywords: As `HeadKeywords`: `heads`, `layers` to measure alone (NaN elsewhere), and `SweepOptions`'s.

    Returns:
        HeadScores, base minus intervened, on the CPU.

    Raises:
        ValueError: No examples, one that lacks a field, a head or layer that is not there, a layer with a
            single head, fewer heads than top_k kept by the prefilter, or a race for a metric that is not
            a mean over examples; for `patch`, no pairs, other examples than theirs, a prefilter or a race.
        FloatingPointError: Logits that are not finite; names head and examples.
    """
    own, sweep = split_keywords(keywords, ("heads", "layers"))
    options, task = SweepOptions.of(options, sweep), engine.as_task(task)
    require_choice("intervention", intervention, INTERVENTIONS)
    cells = choose_heads(model, **own)
    k = min(default_top_k(model), len(cells)) if top_k is None else top_k
    if intervention == "patch":
        _check_no_shortcuts(prefilter, racing)
        return _localize_by_patching(
            model, task, _pairs_of(model, task, pairs, examples), cells, k, positions, options
        )
    if pairs is not None:
        raise ValueError("pairs are for intervention='patch'")
    return _localize_by_mean(model, task, examples, cells, k, positions, prefilter, racing, options)


def _check_no_shortcuts(prefilter: int | None, racing: Racing | None) -> None:
    if prefilter is not None or racing is not None:
        raise ValueError(
            "prefilter and racing are for intervention='mean': a prefilter estimates another fall, and "
            "races need scores within bounds, which differences of logits have not"
        )


def _localize_by_mean(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    chosen: Cells,
    k: int,
    positions: str,
    prefilter: int | None,
    racing: Racing | None,
    options: SweepOptions,
) -> HeadScores:
    """Score every head by replacing it with the mean of its layer's other heads."""
    if model.cfg.n_heads == 1:
        raise ValueError("a model with one head a layer has no other heads to take the mean of")
    engine.check_examples(task, examples)
    tally = Tally() if options.tally is None else options.tally
    options = replace(options, tally=tally)
    cells, traded = _cells_to_measure(model, task, examples, chosen, k, prefilter, options)
    if positions != "all":
        traded.insert(0, "heads replaced only from the end of the prompt on")
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
        numbers = tuple(cells[i][0] * model.cfg.n_heads + cells[i][1] for i in race.winners)
        race = replace(race, winners=numbers)
    all_drops, all_scores = (_by_layer_and_head(model, cells, values) for values in (drops, scores))
    return HeadScores(
        task=task.name,
        metric_name=task.metric_name,
        intervention=INTERVENTIONS["mean"][0],
        model_name=model.cfg.model_name,
        scores=all_scores[..., 0],
        drops=all_drops,
        baseline=base.metric(task),
        base_scores=torch.tensor(base.scores, dtype=torch.float64),
        example_ids=tuple(example.id for example in examples),
        kinds=tuple(example.kind for example in examples),
        top_k=k,
        traded="; ".join(traded),
        race=race,
        near_ties=tally.near_ties,
        positions=positions,
        baseline_interval=metric_interval(task, np.array(base.statistics)) if len(examples) > 1 else None,
        score_ends=all_scores[..., 1:],
        chosen=_limited(model, chosen),
        chance=engine.chance_of(task, examples),
        noise=engine.type_noise(model, task, examples, base, None, options, label="heads"),
    )


def _limited(model: HookedVLM, cells: Cells) -> tuple[tuple[int, int], ...] | None:
    """The heads that were asked for; None where these are all."""
    return None if len(cells) == model.cfg.n_layers * model.cfg.n_heads else tuple(cells)


def _cells_to_measure(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    cells: Cells,
    k: int,
    prefilter: int | None,
    options: SweepOptions,
) -> tuple[Cells, list[str]]:
    """(layer, head) of the heads, or of those that the prefilter keeps, and what was traded for speed."""
    if prefilter is None:
        return cells, []
    if not k <= prefilter:
        raise ValueError(f"prefilter keeps {prefilter} heads, fewer than the {k} asked for")
    with bounded_by(options.memory_budget):
        drops = first_order_head_drops(model, task, examples, **options.of_resumed_batches)
    where = torch.zeros(drops.shape, dtype=torch.bool)
    where[tuple(zip(*cells, strict=True))] = True
    best = ranked(drops.where(where, -torch.inf), min(prefilter, len(cells)))
    kept = sorted((c.layer, c.index) for c in best)
    return kept, [f"the best {prefilter} of {len(cells)} heads by attribution patching, others unmeasured"]


def _by_layer_and_head(model: HookedVLM, cells: Cells, values: np.ndarray) -> torch.Tensor:
    """Values by cell, [cell n], as [layer head n], NaN for heads without."""
    shape = (model.cfg.n_layers, model.cfg.n_heads, values.shape[1])
    by_head = torch.full(shape, torch.nan, dtype=torch.float64)
    by_head[tuple(zip(*cells, strict=True))] = torch.from_numpy(values)
    return by_head


def _pairs_of(
    model: HookedVLM,
    task: Task,
    pairs: Sequence[CounterfactualPair] | PatchPairs | None,
    examples: Sequence[Example],
) -> PatchPairs:
    """Prepare the pairs, and check that they belong to the task and the examples."""
    if pairs is None or not len(pairs):
        raise ValueError("intervention='patch' needs pairs, e.g. of `hones_lens.counterfactual_pairs`")
    prepared = pairs if isinstance(pairs, PatchPairs) else counterfactual(model, pairs, task)
    pairs_task = prepared.task if isinstance(prepared.task, str) else prepared.task.name
    if pairs_task not in ("", task.name):
        raise ValueError(f"pairs of task {pairs_task!r} for task {task.name!r}")
    if len(examples) and tuple(example.id for example in examples) != prepared.ids:
        raise ValueError("patching reads the pairs, not these examples: give none, or the pairs' clean ones")
    return prepared


def _localize_by_patching(
    model: HookedVLM,
    task: Task,
    pairs: PatchPairs,
    cells: Cells,
    k: int,
    positions: str,
    options: SweepOptions,
) -> HeadScores:
    """Score every head by patching its output on the corrupted input into the clean run."""
    require_choice("positions", positions, ("all", "last"))
    site = SITES["z"]
    token_positions = positions_of(model, pairs, site, "group", [positions])
    patching = {"direction": "noise", "metric": "logit_diff"}
    chosen = _limited(model, cells)
    targets = targets_of(site, model.cfg, units=chosen)
    effects = measure_patches(model, pairs, site, targets, token_positions, options, **patching)
    effects.answers.warn()
    by_cell = (effects.clean - effects.values).numpy()
    drops = _by_layer_and_head(model, cells, by_cell)
    ends = _by_layer_and_head(model, cells, _mean_drops(by_cell)[:, 1:])
    many = len(pairs) > 1
    return HeadScores(
        task=task.name,
        metric_name="logit difference",
        intervention=INTERVENTIONS["patch"][0],
        model_name=model.cfg.model_name,
        scores=drops.mean(-1),
        drops=drops,
        baseline=float(effects.clean.mean()),
        base_scores=effects.clean,
        example_ids=pairs.ids,
        kinds=tuple(pair.clean.kind for pair in pairs.facts) or ("",) * len(pairs),
        top_k=k,
        traded="" if positions == "all" else "heads patched only at the end of the prompt",
        positions=positions,
        baseline_interval=mean_interval(effects.clean.numpy()) if many else None,
        score_ends=ends,
        chosen=chosen,
        chance=None,
        noise=patching_noise(model, pairs, "logit_diff", options),
    )


def _measure_all(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    cells: Cells,
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
) -> tuple[engine.Outcome, np.ndarray, np.ndarray]:
    """The clean outcome, every head's drops [head example], and its score with interval bounds [head 3]."""

    def leaders(outcomes: list[engine.Outcome]) -> str:
        base, *values = (outcome.metric_so_far(task) for outcome in outcomes)
        so_far = [base - value for value in values]
        best = np.argsort(-np.array(so_far), kind="stable")[:3]
        return "leading: " + ", ".join(f"L{cells[i][0]}H{cells[i][1]} {so_far[i]:.3f}" for i in best)

    all_arms = [[], *arms]
    base, *intervened = engine.measure(
        model, task, examples, all_arms, options, label="heads", leaders=leaders
    )
    drops = np.array(base.scores) - np.array([outcome.scores for outcome in intervened])
    scores = np.full((len(intervened), 3), np.nan)
    scores[:, 0] = [base.metric(task) - outcome.metric(task) for outcome in intervened]
    if len(examples) > 1:
        clean = np.array(base.statistics)
        intervened_statistics = [np.array(outcome.statistics) for outcome in intervened]
        intervals = bootstrap_intervals(task, clean, intervened_statistics, level=LEVEL)
        scores[:, 1:] = [(interval.low, interval.high) for interval in intervals]
    return base, drops, scores


def _mean_drops(drops: np.ndarray) -> np.ndarray:
    """Mean drop with its interval's bounds, [head 3], over the examples that each head was measured on."""
    means = np.full((len(drops), 3), np.nan)
    for row, head_drops in zip(means, drops, strict=True):
        known = head_drops[~np.isnan(head_drops)]
        if len(known):
            row[0] = known.mean()
        if len(known) > 1:
            interval = mean_interval(known, level=LEVEL)
            row[1:] = interval.low, interval.high
    return means


def _race(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    k: int,
    racing: Racing,
    options: SweepOptions,
) -> tuple[engine.Outcome, np.ndarray, np.ndarray, RaceResult]:
    """As `_measure_all`, with NaN where a head had left the race; the clean model sees every example."""
    if not task.is_mean:
        raise ValueError(f"{task.metric_name} is not a mean over examples, so heads can't be raced on it")
    race, order = Race(len(arms), len(examples), k, racing), np.random.default_rng(racing.seed)
    shuffled = order.permutation(len(examples)).tolist()
    drops = np.full((len(arms), len(examples)), np.nan)
    base = engine.Outcome(statistics=[np.zeros(0)] * len(examples), scores=[0.0] * len(examples))
    size = racing.round_size
    starts = {f"heads, round {i // size + 1}": i for i in range(0, len(examples), size)}
    rounds = {label: shuffled[start : start + size] for label, start in starts.items()}
    for label, example_indices in rounds.items():  # all of it, before it begins
        engine.expect(options.journal, label, len(example_indices), options.batch_size)
    for label, example_indices in rounds.items():
        running = np.flatnonzero(race.running).tolist()
        round_examples, round_arms = [examples[i] for i in example_indices], [[], *(arms[i] for i in running)]
        clean, *intervened = engine.measure(model, task, round_examples, round_arms, options, label=label)
        for index, score, statistics in zip(example_indices, clean.scores, clean.statistics, strict=True):
            base.scores[index], base.statistics[index] = score, statistics
        if race.done:
            continue
        round_drops = np.array(clean.scores) - np.array([outcome.scores for outcome in intervened])
        drops[np.ix_(running, example_indices)] = round_drops
        race.add(round_drops)
    return base, drops, _mean_drops(drops), race.result()
