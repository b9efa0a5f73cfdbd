"""Masking: set the selected neurons to zero and measure the drop of the task's metric (HONES eq. H4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking_result import Control, KindDrop, MaskingResult
from hones_lens.interventions import Hook, check_component, zero_neurons
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import (
    Component,
    bootstrap_interval,
    mean_interval,
    metric_interval,
    permutation_p,
    relative_interval,
    two_sided_p,
)
from hones_lens.tasks import Task

RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1)
Neurons = Sequence[tuple[int, int]]


@takes_iterables
def matched_random_sets(
    neurons: Neurons, n_layers: int, d_mlp: int, draws: int, seed: int = 0
) -> list[list[Component]]:
    """Random sets with as many neurons in each layer as the given one, out of all of the layer's."""
    counts = np.bincount([layer for layer, *_ in neurons], minlength=n_layers)
    random_sets = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        chosen = [
            Component(layer, int(i), 0.0)
            for layer, count in enumerate(counts)
            for i in np.sort(rng.choice(d_mlp, size=int(count), replace=False))
        ]
        random_sets.append(chosen)
    return random_sets


@takes_iterables
def evaluate_masking(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    neurons: NeuronScores | Neurons,
    *,
    k: int | None = None,
    n_controls: int = 20,
    seed: int = 0,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> MaskingResult:
    """Mask neurons at all positions and measure the task, beside matched random sets (HONES eq. H4).

    Args:
        model: The model.
        task: A task or its name.
        examples: Held-out examples, which did not select the neurons.
        neurons: A ranking, whose top k are masked, or a list of (layer, index).
        k: How many of a ranking; default: its own ratio.
        n_controls: Random sets with the same number of neurons per layer.
        seed: Of the random sets and the bootstrap.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Raises:
        ValueError: No examples, no neurons, or a neuron that the model does not have.
    """
    options = SweepOptions.of(options, sweep)
    return masking_curve(
        model,
        task,
        examples,
        [select_neurons(model, neurons, k)],
        method=neurons.method if isinstance(neurons, NeuronScores) else "given",
        n_controls=n_controls,
        seed=seed,
        options=options,
    )[0]


def select_neurons(
    model: HookedVLM, neurons: NeuronScores | Neurons, k: int | None = None, purpose: str = "mask"
) -> Neurons:
    """Neurons as (layer, index): a ranking's top k, or those that are given.

    Raises:
        ValueError: No neurons (to `purpose`), or one that the model does not have.
    """
    chosen = neurons.top(k) if isinstance(neurons, NeuronScores) else list(neurons)
    if not chosen:
        raise ValueError(f"no neurons to {purpose}")
    for layer, index, *_ in chosen:
        check_component("neuron", layer, index, model.cfg.n_layers, model.cfg.d_mlp)
    return [(c[0], c[1]) for c in chosen]


@takes_iterables
def masking_curve(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    neurons: NeuronScores | Sequence[Neurons],
    *,
    ratios: Sequence[float] = RATIOS,
    method: str | None = None,
    n_controls: int = 20,
    seed: int = 0,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> list[MaskingResult]:
    """`evaluate_masking` at several sizes; examples are prepared and the clean arm run once.

    Args:
        neurons: A ranking, cut at `ratios`, or the sets themselves.
        ratios: Shares of all decoder neurons.
        method: Name for the results, where sets are given.
        model, task, examples, n_controls, seed, options, sweep: As in `evaluate_masking`.
    """
    options, task = SweepOptions.of(options, sweep), engine.as_task(task)
    engine.check_examples(task, examples)
    if n_controls < 0:
        raise ValueError(f"the number of control sets must not be negative: {n_controls}")
    if isinstance(neurons, NeuronScores):
        method = neurons.method
        sets = [select_neurons(model, neurons, neurons.count(ratio)) for ratio in ratios]
    else:
        sets = [select_neurons(model, chosen, None) for chosen in neurons]
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    arms: list[list[Hook]] = [[]]
    for chosen in sets:
        arms.append(zero_neurons(chosen))
        arms += [
            zero_neurons((c[0], c[1]) for c in s)
            for s in matched_random_sets(chosen, *shape, n_controls, seed)
        ]
    label = "masking log-probabilities"
    _announce(examples, options)
    arm_outcomes = engine.measure(model, task, examples, arms, options, label="masking")
    log_probs = engine.measure_log_probs(model, task, examples, arms, options, label=label)
    outcomes = [_Outcome(task, arm, np.array(lp)) for arm, lp in zip(arm_outcomes, log_probs, strict=True)]
    base, n_arms = outcomes[0], n_controls + 1
    measured = model, task, examples, arm_outcomes[0], log_probs[0], options
    noise = engine.type_noise(*measured, label="masking")
    results = []
    for i, chosen in enumerate(sets):
        metadata = {"method": method or "given", "model_name": model.cfg.model_name, "n_neurons": len(chosen)}
        metadata |= {"ratio": len(chosen) / model.cfg.n_neurons, "noise": noise}
        set_outcomes = outcomes[1 + i * n_arms : 1 + (i + 1) * n_arms]
        results.append(_result(task, examples, metadata, base, set_outcomes, seed))
    return results


def _announce(examples: Sequence[Example], options: SweepOptions) -> None:
    """Tell the journal of all that will be measured, before the first of it is."""
    for label in ("masking", "masking log-probabilities"):
        engine.expect(options.journal, label, len(examples), options.batch_size)


@dataclass
class _Outcome:
    task: Task
    arm: engine.Outcome
    log_probs: np.ndarray

    def metric(self, rows: Sequence[int] | None = None) -> float:
        return self.arm.metric(self.task, rows)

    def log_prob(self, rows: Sequence[int] | None = None) -> float:
        return float((self.log_probs if rows is None else self.log_probs[list(rows)]).mean())


def _result(
    task: Task,
    examples: Sequence[Example],
    metadata: dict[str, Any],
    base: _Outcome,
    arms: Sequence[_Outcome],
    seed: int,
) -> MaskingResult:
    masked, controls = arms[0], arms[1:]
    kinds = dict.fromkeys(example.kind for example in examples)
    rows = {kind: [i for i, e in enumerate(examples) if e.kind == kind] for kind in kinds}
    log_prob_drops = base.log_probs - masked.log_probs
    statistics = np.array(base.arm.statistics), np.array(masked.arm.statistics)
    return MaskingResult(
        **metadata,
        task=task.name,
        metric_name=task.metric_name,
        baseline=base.metric(),
        masked=masked.metric(),
        baseline_log_prob=base.log_prob(),
        masked_log_prob=masked.log_prob(),
        drops=tuple((np.array(base.arm.scores) - np.array(masked.arm.scores)).tolist()),
        log_prob_drops=tuple(log_prob_drops.tolist()),
        metric_interval=bootstrap_interval(task, *statistics, seed=seed),
        log_prob_interval=mean_interval(log_prob_drops, seed=seed),
        relative_interval=relative_interval(task, *statistics, seed=seed),
        baseline_interval=metric_interval(task, statistics[0], seed=seed),
        masked_interval=metric_interval(task, statistics[1], seed=seed),
        baseline_log_prob_interval=mean_interval(base.log_probs, seed=seed),
        masked_log_prob_interval=mean_interval(masked.log_probs, seed=seed),
        controls=tuple(_control(c, rows) for c in controls),
        kinds={kind: _kind_drop(task, base, masked, indices, seed) for kind, indices in rows.items()},
        example_ids=tuple(example.id for example in examples),
        metric_p=permutation_p(task, *statistics, seed=seed),
        log_prob_p=two_sided_p(log_prob_drops, seed=seed),
        chance=engine.chance_of(task, examples),
    )


def _kind_drop(task: Task, base: _Outcome, masked: _Outcome, rows: list[int], seed: int) -> KindDrop:
    before, after = (np.array(outcome.arm.statistics)[rows] for outcome in (base, masked))
    intervals: dict[str, Any] = {}
    if len(rows) > 1:
        intervals["interval"] = bootstrap_interval(task, before, after, seed=seed)
        intervals["baseline_interval"] = metric_interval(task, before, seed=seed)
        intervals["masked_interval"] = metric_interval(task, after, seed=seed)
        intervals["p"] = permutation_p(task, before, after, seed=seed)
    return KindDrop(
        n=len(rows),
        baseline=base.metric(rows),
        masked=masked.metric(rows),
        baseline_log_prob=base.log_prob(rows),
        masked_log_prob=masked.log_prob(rows),
        **intervals,
    )


def _control(outcome: _Outcome, rows: dict[str, list[int]]) -> Control:
    return Control(
        metric=outcome.metric(),
        log_prob=outcome.log_prob(),
        kinds={kind: outcome.metric(r) for kind, r in rows.items()},
        kinds_log_prob={kind: outcome.log_prob(r) for kind, r in rows.items()},
    )
