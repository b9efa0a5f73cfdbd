"""The noise of a model's type in measures of patching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hones_lens.analysis.patching.batches import pair_batches
from hones_lens.analysis.patching.metrics import Metric, as_metric
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.engine import (
    MOST_COMPARED,
    SweepOptions,
    as_task,
    dtype_name,
    measure,
    type_noise,
    values_in_float32,
)
from hones_lens.model import HookedVLM, bounded_by
from hones_lens.results import Noise


@dataclass(frozen=True, eq=False)
class _Ends:
    """Measures the metric of both unpatched runs of pairs, [pair 2]."""

    pairs: PatchPairs
    metric: str | Metric
    batch_size: int

    @torch.no_grad()
    def __call__(self, model: HookedVLM) -> np.ndarray:
        metric, values = as_metric(self.metric), []
        for _, batch in pair_batches(model, self.pairs, "noise", self.batch_size, self.metric):
            ends = [
                batch.value(metric, model(run, logits_to_keep=batch.keep)).double().cpu()
                for run in (batch.base, batch.source)
            ]
            values.append(torch.stack(ends, dim=1).numpy())
        return np.concatenate(values)


def patching_noise(
    model: HookedVLM, pairs: PatchPairs, metric: str | Metric, options: SweepOptions
) -> Noise | None:
    """The noise of a metric of patching, in the model's type (see `Noise`).

    Over the two unpatched runs of the first 64 pairs. Pictures stay as the pairs hold them.

    Args:
        model, pairs, metric: What is measured; `task` is the task's own score.
        options: How it runs.

    Returns:
        None for float32 and wider types, whose noise no table shows.
    """
    if model.cfg.dtype.itemsize > 2:
        return None
    first = pairs[:MOST_COMPARED] if len(pairs) > MOST_COMPARED else pairs
    if metric == "task":
        task, examples = as_task(pairs.task), [pair.clean for pair in first.facts]
        own = SweepOptions(options.batch_size, progress=False, memory_budget=options.memory_budget)
        (clean,) = measure(model, task, examples, [[]], own)
        return type_noise(model, task, examples, clean, None, options, label="patch")
    work = _Ends(first, metric, options.batch_size)
    with bounded_by(options.memory_budget):
        narrow = work(model)
    wide = values_in_float32(model, work, len(first), options, "patch in float32")
    return Noise(2 * float(np.abs(wide - narrow).mean()), None, len(first), dtype_name(model))
