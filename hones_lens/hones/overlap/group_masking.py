"""Drop of each task when each group of shared neurons is masked at a matched size (HONES eq. H6)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import numpy as np
import pandas as pd

from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions
from hones_lens.hones.masking import masking_curve
from hones_lens.hones.masking_result import MEASURES, MaskingResult, masking_measure, measures_legend
from hones_lens.hones.overlap.groups import Neuron, Overlap
from hones_lens.model import HookedVLM, did_you_mean, takes_iterables
from hones_lens.results import Result


@dataclass(frozen=True, repr=False)
class GroupMasking(Result):
    """What each task loses when each group of neurons is masked, all groups cut to one size.

    `plot(measure)` draws bars of every task's drop by group, with intervals; the measure is `metric` or
    `log_prob`. `load_masking` reads the files of `save` too.

    Attributes:
        results: One for each task and group; `method` is the group's name, and `controls` are random sets
            with as many neurons in each layer as what was masked of that group.
    """

    kind: ClassVar[str] = "masking"

    results: tuple[MaskingResult, ...]

    @property
    def size(self) -> int:
        """How many neurons were masked of every group."""
        return self.results[0].n_neurons

    def of(self, task: str, group: str) -> MaskingResult:
        """One task under one group.

        Raises:
            KeyError: It was not measured; lists what was.
        """
        by_task_and_group = {(result.task, result.method): result for result in self.results}
        if (task, group) not in by_task_and_group:
            raise KeyError(f"no result for {(task, group)}; there are {list(by_task_and_group)}")
        return by_task_and_group[task, group]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each task and group: drops with their intervals, and the random sets' mean drops."""
        rows = []
        for result in self.results:
            row = {"task": result.task, "group": result.method, "n_neurons": result.n_neurons}
            row |= {"baseline": result.baseline, "masked": result.masked}
            row |= {"drop": result.drop, "relative_drop": result.relative_drop}
            row |= {"drop_low": result.metric_interval.low, "drop_high": result.metric_interval.high}
            row["random_drop"] = result.baseline - np.mean([c.metric for c in result.controls])
            row["log_prob_drop"] = result.log_prob_drop
            row["log_prob_drop_low"] = result.log_prob_interval.low
            row["log_prob_drop_high"] = result.log_prob_interval.high
            row["n"] = result.metric_interval.n
            random_log_prob = np.mean([c.log_prob for c in result.controls])
            rows.append({**row, "random_log_prob_drop": result.baseline_log_prob - random_log_prob})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        columns = ["task", "group", "n", "baseline", "drop", "drop_low", "drop_high", "random_drop"]
        columns += ["log_prob_drop", "log_prob_drop_low", "log_prob_drop_high", "random_log_prob_drop"]
        table = self.to_dataframe()[columns].to_string(index=False, float_format="%.3f")
        sets = "/".join(str(count) for count in sorted({len(r.controls) for r in self.results}))
        title = f"{self.size} neurons masked of every group; random: mean of {sets} sets each"
        marks = [[masking_measure(result, name) for name in MEASURES] for result in self.results]
        marked = ", ".join(
            f"{result.task} {result.method} ({' and '.join(m.short for m in measures if m.mark)})"
            for result, measures in zip(self.results, marks, strict=True)
            if any(m.mark for m in measures)
        )
        legend = measures_legend(m for measures in marks for m in measures)
        return "\n".join([title, table, *([f"{legend}: {marked}"] if legend else [])])


@takes_iterables
def mask_groups(
    model: HookedVLM,
    examples: Mapping[str, Sequence[Example]],
    overlap: Overlap,
    *,
    groups: Sequence[str] | None = None,
    size: int | None = None,
    n_controls: int = 5,
    seed: int = 0,
    journals: Mapping[str, MutableMapping[str, Any]] | None = None,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> GroupMasking:
    """Mask each group of an overlap at one size, and measure every task (HONES eqs. H4, H6).

    Of a group with more neurons than `size`, a random part is masked, drawn from `seed` and the group's
    name alone, so that every task sees the same one. The clean arm, all groups and all random sets of a
    task run in one sweep.

    Args:
        model: The model.
        examples: By task, held-out examples, which did not select the neurons.
        overlap: Whose groups.
        groups: Names of `overlap.groups`; default: all that are not empty.
        size: Neurons to mask of each; default: as many as the smallest of these groups has.
        n_controls: Random sets for each group, at least one.
        seed: Of the parts, the random sets and the bootstrap.
        journals: By task, finished batches, read and written (see `runs.Journal`).
        options, sweep: How it runs: `batch_size`, `progress`, ... of `SweepOptions`, but for `journal`.

    Raises:
        ValueError: No examples, another model's overlap, an unknown or empty group, a size below 1
            or above that of a group, or no random sets.
    """
    options = SweepOptions.of(options, sweep, unused=("journal",))
    if not examples:
        raise ValueError("no examples")
    if (overlap.n_layers, overlap.d_mlp) != (model.cfg.n_layers, model.cfg.d_mlp):
        raise ValueError(
            f"an overlap of {overlap.n_layers} layers of {overlap.d_mlp} neurons "
            f"does not fit {model.cfg.n_layers} layers of {model.cfg.d_mlp}"
        )
    if n_controls < 1:
        raise ValueError(f"n_controls must be at least 1, not {n_controls}")
    masked = equal_size_groups(overlap, groups, size, seed)
    sets, results = list(masked.values()), []
    for task, task_examples in examples.items():
        task_options = options if journals is None else replace(options, journal=journals[task])
        curve = masking_curve(
            model, task, task_examples, sets, n_controls=n_controls, seed=seed, options=task_options
        )
        results += [replace(result, method=name) for name, result in zip(masked, curve, strict=True)]
    return GroupMasking(tuple(results))


def equal_size_groups(
    overlap: Overlap, groups: Sequence[str] | None, size: int | None, seed: int
) -> dict[str, list[Neuron]]:
    """The neurons that `mask_groups` masks of each group; arguments and errors as there."""
    known = overlap.groups
    names = [name for name, neurons in known.items() if neurons] if groups is None else list(groups)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"unknown groups {unknown}; valid: {', '.join(known)}{did_you_mean(unknown[0], known)}"
        )
    if not names:
        raise ValueError("no groups to mask")
    smallest = min(names, key=lambda name: len(known[name]))
    size = len(known[smallest]) if size is None else size
    if not 1 <= size <= len(known[smallest]):
        raise ValueError(f"can't mask {size} neurons of group {smallest!r}, which has {len(known[smallest])}")
    masked = {}
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        masked[name] = [known[name][i] for i in np.sort(rng.choice(len(known[name]), size, replace=False))]
    return masked
