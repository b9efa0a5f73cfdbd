"""Activation patching: put activations of one run into another, and measure what that changes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from hones_lens.analysis.patching.batches import DIRECTIONS
from hones_lens.analysis.patching.metrics import Metric, as_metric
from hones_lens.analysis.patching.outcome import _VERBS, share_of_gap
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.runner import measure_patches
from hones_lens.analysis.patching.sites import Units, as_patch_site, positions_of, targets_of
from hones_lens.engine import as_task
from hones_lens.interventions import Group
from hones_lens.model import HookedVLM
from hones_lens.results import DRAWS, Labelled, mean_over_pairs


def patch_activations(
    model: HookedVLM,
    pairs: PatchPairs,
    what: str = "resid_pre",
    by: str = "group",
    *,
    groups: Mapping[str, Group] | Sequence[Group] | None = None,
    layers: Sequence[int] | None = None,
    units: Units | None = None,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    raw: bool = False,
    by_pair: bool = False,
    batch_size: int = 32,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool = True,
    journal: MutableMapping[str, Any] | None = None,
    memory_budget: float | None = None,
) -> Labelled:
    """Patch each layer, head or neuron with what it is in the other run, and measure what that changes.

    The share of the whole effect, a ratio of means over pairs: `(patched − base) / (other − base)`, where
    base is the run that is patched. 0: the patch does nothing; 1: it does what changing the input does.

    Args:
        model, pairs: What to patch.
        what: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`; heads: `z`, `q`, `k`, `v`,
            `pattern`; `neurons`; of the vision tower `vision_z` and `vision_neurons`.
        by: Positions that are patched at once: those of a token `group`, each `position` alone (pairs of one
            prompt), or `all`. Of a pattern, positions are queries.
        groups: For `by="group"`, as in `named_groups`: names, `Box`es, masks. Default: `image`, `question`
            and `last`; of the vision tower, whose patches boxes choose among, `image`.
        layers: Which layers; default: all.
        units: Heads or neurons: `each` alone, `together` in a layer, numbers, (layer, number)s, or sets of
            these by name; see `targets_of`. Default: heads each alone, neurons together.
        direction: `denoise` puts clean activations into the corrupted run, `noise` corrupted ones into the
            clean run.
        metric: `logit_diff`, `log_prob`, `kl`, a function like them, or `task`: the task's own score of the
            generated answer for the clean example, with the prompt patched (counterfactual pairs alone).
        raw: The change of the metric, patched − base, instead of the share.
        by_pair: Each pair's change on a first axis `pair`, without intervals.
        batch_size: Pairs a batch.
        draws, seed: Of the bootstrap over pairs (paired: a draw takes base, patched and other run of a pair
            together); 0 draws for no intervals.
        progress: Show a progress bar.
        journal: Finished batches, read and written (see `runs.Journal`).
        memory_budget: GB for activations; default: a share of what is free.

    Returns:
        On the axes `layer`, then `head`, `kv_head` or `neuron`, then `group` or `position`, with 95 %
        intervals; the baselines and what was run are in `notes`.

    Raises:
        ValueError: An unknown name, a layer or unit that is not there, an empty group, a box outside of an
            image, pairs that don't serve the metric, or whose two runs don't differ by it.
        FloatingPointError: A metric that is not finite; names the pair.
    """
    site = as_patch_site(what)
    if metric == "task":
        pairs = _answerable(pairs)
    else:
        as_metric(metric)
    targets = targets_of(site, model.cfg, layers, units)
    positions = positions_of(model, pairs, site, by, groups)
    options = {"direction": direction, "metric": metric, "batch_size": batch_size, "progress": progress}
    options |= {"journal": journal, "memory_budget": memory_budget}
    found = measure_patches(model, pairs, site, targets, positions, **options)
    shape, axes, labels = (*targets.shape, len(positions)), (*targets.axes, by), dict(targets.labels)
    if by == "all":
        shape, axes = shape[:-1], axes[:-1]
    else:
        labels[by] = tuple(positions)
    told = metric if isinstance(metric, str) else getattr(metric, "__name__", "the metric")
    change = found.change(direction).view(*shape, -1)
    notes = found.notes(told)
    if raw or by_pair:
        says = f"change of {told}, {what}, {DIRECTIONS[direction]}"
        if by_pair:
            labels["pair"] = pairs.ids
            return Labelled(says, change.movedim(-1, 0), ("pair", *axes), labels, notes=notes)
        means = mean_over_pairs(change.movedim(-1, 0), draws, seed=seed)
        return Labelled(says, axes=axes, labels=labels, notes=notes, **means)
    says = f"share of {told} {_VERBS[direction]}, {what}, {DIRECTIONS[direction]}"
    shares = share_of_gap(change, found.gap(direction), draws, seed)
    return Labelled(says, axes=axes, labels=labels, notes=notes, **shares)


def _answerable(pairs: PatchPairs) -> PatchPairs:
    """Pairs whose answers a task can score, without the beginnings of answers."""
    if not pairs.facts:
        raise ValueError("metric 'task' needs pairs made by `counterfactual`, which know their examples")
    task = as_task(pairs.task)
    if task.ranks:
        raise ValueError(f"{task.name} pairs have one candidate, whose rank says nothing: measure logit_diff")
    return pairs.prompts_alone()
