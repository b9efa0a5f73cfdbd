"""Machines that a plan is for: what they reach, and what fits into their memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hones_lens.app.runs.operations import Operations
from hones_lens.engine import Budget
from hones_lens.model import HookedVLM

# TFLOP/s in dense bfloat16 and GB of memory, as their makers publish them.
GPUS = {
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "l40s": (362, 48),
    "l4": (121, 24),
    "rtx4090": (165, 24),
}
MFU = 0.4  # assumed share of these that is reached
_MEMORY_SHARE = 0.4  # of what the weights leave free, as of `Budget`


@dataclass(frozen=True)
class Machines:
    """What the run is planned for.

    Attributes:
        name: How to name it.
        throughput: FLOP/s that one of them reaches.
        count: How many work at once.
        memory: GB of one; None where it is not known.
    """

    name: str
    throughput: float
    count: int = 1
    memory: float | None = None

    @classmethod
    def of_gpus(cls, name: str, count: int = 1, mfu: float = MFU) -> Machines:
        """GPUs of the table, at a share of what their maker publishes."""
        peak, memory = GPUS[name]
        said = f"{name}, {mfu:.0%} of its {peak} dense bf16 TFLOP/s assumed"
        return cls(said, mfu * peak * 1e12, count, memory)

    @classmethod
    @torch.no_grad()
    def this_one(cls, model: HookedVLM, tokens: int = 64) -> Machines:
        """This machine, timed over a batch through the decoder, after one warm-up pass."""
        rows, seconds = Budget(model).rows(tokens), 0.0
        ids = torch.full((rows, tokens), model.cfg.eos_token_ids[0], device=model.cfg.device)
        for _ in range(2):
            started = time.perf_counter()
            model(ids, stop_at_layer=model.cfg.n_layers).sum().item()
            seconds = time.perf_counter() - started
        operations = rows * model.cfg.n_layers * Operations(model).block(tokens)
        return cls("this machine, as measured now", operations / seconds)


def memory_of(model: HookedVLM, tokens: int, machines: Machines, budget: float | None) -> str:
    """What is said of the memory for the weights, and for rows of so many tokens at a time.

    Args:
        model: The model, or its sizes.
        tokens: Of a row.
        machines: What runs it.
        budget: GB for what runs at once; None: a share of what the weights leave.
    """
    cfg, free = Budget(model, 1.0), None
    weights = sum(p.numel() for p in model.parameters()) * model.cfg.dtype.itemsize
    said = f"{weights / 1e9:.2f} GB of weights"
    if machines.memory is not None:
        free = machines.memory - weights / 1e9
        if free <= 0:
            return f"{said} do not fit into {machines.memory} GB: choose another --gpu"
    gigabytes = budget or (None if free is None else _MEMORY_SHARE * free)
    per_row = tokens * cfg.bytes_per_token / 1e9
    if gigabytes is None:
        return f"{said}, {per_row:.2f} GB for each row at a time"
    rows = max(1, int(gigabytes // per_row))
    return f"{said}, {rows * per_row:.2f} GB for {rows} rows at a time"


def total_of(operations: float, machines: Machines) -> str:
    """What is said of the time that so many operations take, on one machine and on all."""
    total = operations / machines.throughput
    said = f"in all at most {duration(total)} on one"
    if machines.count > 1:
        said += f", {duration(total / machines.count)} on {machines.count} that share the examples"
    return said


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
