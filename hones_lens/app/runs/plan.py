"""Estimate of the cost of a run before it starts (`--plan`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from hones_lens import engine
from hones_lens.app.runs import stages as pipeline
from hones_lens.engine import Budget
from hones_lens.hones import RATIOS, default_top_k
from hones_lens.interventions import choose_heads
from hones_lens.model import HookedVLM, VLMInputs, takes_iterables
from hones_lens.tasks import load_task

if TYPE_CHECKING:
    from hones_lens.app.runs.data_choice import DataChoice


class _Cost(NamedTuple):
    """Number of interventions and examples, and the mean number of layers that a row computes."""

    arms: int
    examples: int
    layers: float
    ranks: bool = True  # whether a ranking task runs all candidates


@takes_iterables
def plan(
    model: HookedVLM,
    task: str,
    data: DataChoice,
    stages: Sequence[str],
    n_controls: int,
    memory_budget: float | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> list[str]:
    """Lines that give rows, operations, memory and time of each stage.

    A row is one prompt under one intervention. Operations count two per weight and prompt token of the
    decoder layers that a row computes, and attention's own; rows that decode on are not counted, and
    candidates share their image. Time is that of these operations at the speed of a forward pass that is
    measured here.
    """
    chosen = load_task(task)
    discovery, test = data.discovery(task), data.test(task)
    sample = next(engine.prompt_batches(model, chosen, discovery[:1], 1)).inputs
    n_layers, measured = model.cfg.n_layers, choose_heads(model, heads)
    # a head of layer l computes what is above it
    mean_layers = sum(n_layers - layer for layer, _ in measured) / len(measured)
    n_critical = min(default_top_k(model), len(measured))
    held_out = min(n_layers * model.cfg.n_heads, n_critical * 6)  # with five random sets
    masking_arms = 1 + len(RATIOS) * (n_controls + 1)
    other_arms = len(pipeline.OTHER_RANKINGS) * (pipeline.OTHERS_CONTROLS + 1)
    costs = {
        "heads": _Cost(len(measured), len(discovery), mean_layers),
        "held out": _Cost(1 + held_out, len(test), mean_layers),
        "neurons": _Cost(min(len(measured), 30) + 1, len(discovery), n_layers, ranks=False),
        "masking": _Cost(masking_arms, len(test), n_layers),
        "others": _Cost(1 + other_arms, len(test), n_layers),
    }
    rate = _operations_per_second(model, sample)
    lines = [
        f"{model.cfg.model_name}, {task}: {len(discovery)} discovery and {len(test)} held-out examples, "
        f"{rate:.2g} FLOP/s measured"
    ]
    total = 0.0
    for stage in stages:
        cost = costs[stage]
        rows = cost.arms * cost.examples
        tokens = float(sample.input_ids.shape[1])
        if cost.ranks and chosen.ranks:
            tokens = float(sum(s.resid[..., 0].numel() for s in engine.split_shared_prefix(model, sample)[0]))
        operations = rows * cost.layers * _per_layer(model, tokens)
        total += operations / rate
        lines.append(
            f"  {stage}: {cost.arms} arms × {cost.examples} examples = {rows:,} rows of ~{tokens:.0f} tokens "
            f"× {cost.layers:g} layers, {operations:.2g} FLOP, about {_duration(operations / rate)}"
        )
    budget, length = Budget(model, memory_budget), sample.input_ids.shape[1]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = budget.rows(length)
    lines.append(
        f"  memory: {weights / 1e9:.2f} GB of weights, {rows * length * budget.bytes_per_token / 1e9:.2f} GB "
        f"for {rows} rows at a time; about {_duration(total)} in all"
    )
    return lines


def _per_layer(model: HookedVLM, tokens: float) -> float:
    weights = sum(p.numel() for p in model.blocks[0].parameters())
    return 2 * weights * tokens + 4 * tokens**2 * model.cfg.n_heads * model.cfg.d_head


@torch.no_grad()
def _operations_per_second(model: HookedVLM, sample: VLMInputs) -> float:
    """Operations per second of a batch through the decoder, after one warm-up pass."""
    rows = sample[[0] * Budget(model).rows(sample.input_ids.shape[1])]
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        model(rows, stop_at_layer=model.cfg.n_layers).sum().item()
        seconds = time.perf_counter() - started
    return len(rows) * model.cfg.n_layers * _per_layer(model, rows.input_ids.shape[1]) / seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
