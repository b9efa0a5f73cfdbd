"""Exact ablation, the reference for other rankings: the loss when each single neuron or head is ablated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions
from hones_lens.hones.attribution.head_scores import all_heads
from hones_lens.interventions import (
    Hook,
    Layers,
    choose_layers,
    replace_with_other_heads_mean,
    zero_head,
    zero_neurons,
)
from hones_lens.model import HookedVLM, did_you_mean, require_choice, takes_iterables
from hones_lens.tasks import Task

_HEAD_HOOKS: dict[str, Callable[[int, int], Hook]] = {
    "other_heads_mean": replace_with_other_heads_mean,
    "zero": zero_head,
}


@takes_iterables
def exact_ablation(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    *,
    measure: str = "log_prob",
    layers: Layers | None = None,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> Float[Tensor, "layer d_mlp"]:
    """Brute force: what is lost with each single neuron zeroed at all positions (METHOD, rankings).

    No approximation: every neuron is really taken out of every example, and all that lies above its
    layer is computed anew (what lies below does not change).

    Args:
        model, task, examples: What to measure.
        measure: `log_prob`, the drop of the right answer's log-probability in nats, mean over
            examples; or `metric`, the drop of the task's metric. The metric costs more: a neuron
            that changes a greedy choice has its answer generated, and retrieval runs each candidate.
        layers: Ablate the neurons of these layers alone, as `choose_layers`; the others are NaN.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Returns:
        Clean minus ablated, float64 on the CPU.

    Raises:
        ValueError: An unknown measure, no examples, or one that lacks what the task reads.
        FloatingPointError: Logits that are not finite; names neuron and example.
    """
    options, task, cfg = SweepOptions.of(options, sweep), engine.as_task(task), model.cfg
    engine.check_examples(task, examples)
    chosen = choose_layers(layers, cfg.n_layers)
    neurons = [(layer, i) for layer in chosen for i in range(cfg.d_mlp)]
    arms = [[], *(zero_neurons([neuron]) for neuron in neurons)]
    label = "neuron ablation"
    if measure == "log_prob":
        drops = _log_prob_drops(model, task, examples, arms, options, label)
    elif measure == "metric":
        base, *ablated = engine.measure(model, task, examples, arms, options, label=label)
        clean = base.metric(task)
        drops = torch.tensor([clean - outcome.metric(task) for outcome in ablated], dtype=torch.float64)
    else:
        raise ValueError(
            f"unknown measure {measure!r}; valid: log_prob, metric"
            f"{did_you_mean(measure, ('log_prob', 'metric'))}"
        )
    by_layer = torch.full((cfg.n_layers, cfg.d_mlp), torch.nan, dtype=torch.float64)
    by_layer[chosen] = drops.view(len(chosen), cfg.d_mlp)
    return by_layer


@takes_iterables
def exact_head_ablation(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    *,
    ablation: str = "other_heads_mean",
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> Float[Tensor, "layer head"]:
    """Measure the drop of the right answer's log-probability when each single head is ablated.

    Args:
        model, task, examples: What to measure.
        ablation: `other_heads_mean` (the intervention of HONES eq. H1) or `zero`, at all positions.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Returns:
        Clean minus ablated in nats, mean over examples, float64 on the CPU.

    Raises:
        ValueError: An unknown ablation, no examples, or a model with a single head a layer.
        FloatingPointError: Logits that are not finite; names head and example.
    """
    require_choice("ablation", ablation, _HEAD_HOOKS)
    options, task = SweepOptions.of(options, sweep), engine.as_task(task)
    engine.check_examples(task, examples)
    arms = [[], *([_HEAD_HOOKS[ablation](*cell)] for cell in all_heads(model))]
    drops = _log_prob_drops(model, task, examples, arms, options, "head ablation")
    return drops.view(model.cfg.n_layers, model.cfg.n_heads)


def _log_prob_drops(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
    label: str,
) -> Float[Tensor, " arm"]:
    log_probs = engine.measure_log_probs(model, task, examples, arms, options, label=label)
    base, *ablated = torch.tensor(log_probs, dtype=torch.float64)
    return torch.stack([(base - arm).mean() for arm in ablated])
