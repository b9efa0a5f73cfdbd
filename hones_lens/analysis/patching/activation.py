"""Activation patching: replace activations of one run by another run's, and measure the effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from hones_lens.analysis.patching.metrics import Metric, as_metric, reads_whole_answer
from hones_lens.analysis.patching.noise import patching_noise
from hones_lens.analysis.patching.outcome import PatchingKeywords, Summary, SummaryKeywords, metric_name
from hones_lens.analysis.patching.pair_answers import pair_answers
from hones_lens.analysis.patching.pairs import PatchPairs, measured_note, measured_tokens
from hones_lens.analysis.patching.runner import PatchMeasurements, measure_patches
from hones_lens.analysis.patching.sites import Units, as_patch_site, heads_as_units, positions_of, targets_of
from hones_lens.engine import SweepOptions, as_task, split_keywords
from hones_lens.interventions import Group, Heads, Layers
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import Labelled


class ActivationKeywords(PatchingKeywords, total=False):
    """Keywords of `patch_activations`: which heads, and those of every patching."""

    heads: Heads | None


@takes_iterables
def patch_activations(
    model: HookedVLM,
    pairs: PatchPairs,
    what: str = "resid_pre",
    by: str = "group",
    *,
    groups: Mapping[str, Group] | Sequence[Group] | None = None,
    layers: Layers | None = None,
    units: Units | None = None,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    options: SweepOptions | None = None,
    **keywords: Unpack[ActivationKeywords],
) -> Labelled:
    """Patch each layer, head or neuron with its activation in the other run, and measure the effect.

    The share of the whole effect, a ratio of means over pairs: `(patched − base) / (other − base)`, where
    base is the run that is patched. 0: the patch does nothing; 1: it does what changing the input does.

    Args:
        model, pairs: What to patch.
        what: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `deepstack`; heads: `z`, `q`,
            `k`, `v`, `pattern`; `neurons`; of the vision tower `vision_z` and `vision_neurons`.
        by: Positions that are patched at once: those of a token `group`, each `position` alone (pairs of one
            prompt), or `all`. Of a pattern, positions are queries.
        groups: For `by="group"`, as in `named_groups`: names, `Box`es, masks. Default: `image`, `question`
            and `last`; of the vision tower, whose patches boxes choose among, `image`.
        layers: Which layers, as `layer_numbers`: numbers, ranges, words (`"10-20"`); default: all.
        units: As `targets_of`: `each`, `together`, numbers, pairs, sets; default: heads each alone.
        direction: `denoise` puts clean activations into the corrupted run, `noise` the other way round.
        metric: `logit_diff`, of the two tokens that tell the answers apart; `log_prob`, of the whole answer
            where the pairs know it, whose tokens are in the groups of the prompt's last one; `kl`; a function
            like them; or `task`: the task's own score of the generated answer for the clean example, with
            the prompt patched (counterfactual pairs alone).
        options: How it runs, as `SweepOptions`.
        keywords: `heads` (`"L18H29,L3H1"`, names or pairs): these alone, one at a time; `raw`, `by_pair`,
            `draws`, `seed` of `Summary`; and `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Returns:
        On the axes `layer`, then `head`, `kv_head` or `neuron`, then `group` or `position`, with 95 %
        intervals; the baselines and what was run are in `notes`.

    Raises:
        ValueError: An unknown name, layer, unit or group, or pairs that the metric can't tell apart or read.
        FloatingPointError: A metric that is not finite; names the pair.
    """
    (own, sweep), site = split_keywords(keywords, SummaryKeywords.__annotations__), as_patch_site(what)
    layers, units = heads_as_units(site, sweep.pop("heads", None), layers, units)
    summary, options = Summary(**own), SweepOptions.of(options, sweep)
    given, pairs = pairs, _pairs_for_metric(pairs, metric)
    targets, masks = targets_of(site, model.cfg, layers, units), positions_of(model, pairs, site, by, groups)
    settings: dict[str, Any] = {"direction": direction, "metric": metric}
    measured = measure_patches(model, pairs, site, targets, masks, options, **settings)
    shape, axes, labels = targets.layout(by, tuple(masks))
    settings |= {"axes": axes, "labels": labels, "of": what, "notes": _notes(model, pairs, measured, metric)}
    again = (model, given, options.batch_size, options.journal)
    settings["answers"] = pair_answers(*again) if metric == "task" else measured.answers
    summary = replace(summary, noise=patching_noise(model, pairs, metric, options))
    change = measured.change(direction).T.reshape(-1, *shape)
    return summary.result(change, measured.gap(direction), pairs, **settings)


def _notes(
    model: HookedVLM, pairs: PatchPairs, measurements: PatchMeasurements, metric: str | Metric
) -> tuple[str, ...]:
    """The baselines, the tokens of the answers where the metric is of them, and the number of patches."""
    notes = measurements.notes(metric_name(metric))
    if metric != "task":
        measured = measured_tokens(model, pairs, reads_whole_answer(metric))
        notes = (notes[0], measured_note(measured), *notes[1:])
    return notes


def _pairs_for_metric(pairs: PatchPairs, metric: str | Metric) -> PatchPairs:
    """The pairs that a metric needs: for the task's own score, without the beginnings of answers."""
    if metric != "task":
        as_metric(metric)
        return pairs
    if not pairs.facts:
        raise ValueError("metric 'task' needs pairs made by `counterfactual`, which know their examples")
    task = as_task(pairs.task)
    if task.ranks:
        raise ValueError(f"{task.name} pairs have one candidate, whose rank says nothing: measure logit_diff")
    return pairs.without_answer_prefix()
