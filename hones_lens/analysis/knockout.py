"""Attention knockout: the effect of blocking attention between groups of tokens, layer by layer.

Source: Geva et al., "Dissecting recall of factual associations in auto-regressive language models" (EMNLP
2023); for image, question and last position Zhang et al., "Cross-modal information flow in multimodal large
language models" (CVPR 2025).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens.analysis.patching.batches import PairBatch
from hones_lens.analysis.patching.metrics import Metric, as_metric, log_prob, reads_whole_answer
from hones_lens.analysis.patching.outcome import metric_name
from hones_lens.analysis.patching.pair_answers import PairAnswers, answers_of_batch, joined_answers
from hones_lens.analysis.patching.pairs import (
    PatchPairs,
    continued_mask,
    measured_note,
    measured_tokens,
    with_shared_prefix,
)
from hones_lens.data import Example
from hones_lens.engine import (
    MOST_COMPARED,
    Outcome,
    Sweep,
    SweepKeywords,
    SweepOptions,
    answer_batches,
    as_task,
    check_examples,
    dtype_name,
    logits_under,
    prompt_batches,
    type_noise,
)
from hones_lens.interventions import Group, Hook, block_attention, group_name, token_mask
from hones_lens.model import HookedVLM, VLMInputs, in_float32, takes_iterables
from hones_lens.results import Labelled, Noise, bootstrap_ends, bootstrap_interval, mean_over_pairs
from hones_lens.tasks import Task

Edge = tuple[Group, Group]  # source (keys), target (queries)
_Masks = tuple[Tensor, Tensor]  # of source and target, [batch pos]
EDGES: tuple[Edge, ...] = (
    ("image", "last"),
    ("image", "question"),
    ("question", "last"),
    ("last", "last"),
)


@dataclass
class _Plan:
    """All arms of a knockout, edge by edge within each layer.

    Attributes:
        edges: (source, target) groups by name.
        windows: Layers that are cut together, by centre layer.
        spared: By edge, the number of queries in the batches so far that would have had no key left.
        measured: The tokens that were measured in the batches so far.
        answers: What the model answers in these batches with nothing cut.
    """

    edges: dict[str, Edge]
    windows: list[range]
    spared: Counter[str] = field(default_factory=Counter)
    measured: list[str] = field(default_factory=list[str])
    answers: list[PairAnswers] = field(default_factory=list[PairAnswers])

    @property
    def n_arms(self) -> int:
        return len(self.windows) * len(self.edges)

    def arms(self, inputs: VLMInputs, masks: Mapping[str, _Masks]) -> list[list[Hook]]:
        """Hooks of each arm, from masks of source and target by edge.

        Raises:
            ValueError: An edge that cuts nothing in a row.
        """
        tokens = inputs.attention_mask.bool()
        cut = {name: (target & tokens, source & tokens) for name, (source, target) in masks.items()}
        for name, (queries, keys) in cut.items():
            idle = ~(queries & (keys.cumsum(-1) > 0)).any(-1)
            if bool(idle.any()):
                row = int(idle.int().argmax())
                raise ValueError(f"edge {name!r} cuts nothing in row {row}: no source before a target")
            self.spared[name] += int((queries & ((tokens & ~keys).cumsum(-1) == 0)).sum())
        return [
            [block_attention(layer, *cut[name], spare_self=True) for layer in window]
            for window in self.windows
            for name in self.edges
        ]

    def result(
        self,
        description: str,
        statistics: Mapping[str, Any],
        n: int,
        notes: Sequence[str],
        noise: Noise | None,
    ) -> Labelled:
        """The result, from values (and interval ends) by arm, and the noise of the model's type."""
        shape = (len(self.windows), len(self.edges))
        fields: dict[str, Any] = {
            name: torch.as_tensor(statistics[name]).reshape(shape) for name in statistics if name != "n"
        }
        widest, answers = max(map(len, self.windows)), []
        if self.answers:
            answers.append(joined_answers(self.answers))
            answers[0].warn()
        all_notes = [
            *notes,
            *map(str, answers),
            *([measured_note(self.measured)] if self.measured else []),
            f"{widest} layers at a time, fewer at the ends" if widest > 1 else "one layer at a time",
        ]
        all_notes += [
            f"{name}: {count} queries, over all examples, had no other key left and kept themselves"
            for name, count in self.spared.items()
            if count
        ]
        fields |= {"labels": {"edge": tuple(self.edges)}, "notes": tuple(all_notes), "noise": noise}
        return Labelled(description, axes=("layer", "edge"), n=n, **fields)


@takes_iterables
@torch.no_grad()
def attention_knockout(
    model: HookedVLM,
    data: PatchPairs | VLMInputs | Sequence[Example],
    edges: Sequence[Edge] | Mapping[str, Edge] = EDGES,
    *,
    task: str | Task | None = None,
    window: int = 5,
    metric: str | Metric = "probability",
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> Labelled:
    """Effect of blocking attention from target to source positions, in a window of layers around each layer.

    A query that would be left without any key (the first token of a prompt, cut off from itself) keeps
    itself; the result's notes say how many did.

    Args:
        model: The model.
        data: Pairs, of which the clean inputs are run; inputs prepared with answers (masks: of prompts);
            or examples, with `task`.
        edges: (source, target) as names of token groups, `Box`es or, except for examples, masks
            [batch pos]; or these by a name of your own.
        task: Of the examples.
        window: Layers that are cut together, centred on each layer (an even window has one more above),
            and cut off at the model's ends; at most the model's.
        metric: `probability`: relative change of the mean probability of the right answer, all of its
            tokens together, Σ p cut / Σ p clean − 1. A patching metric (`log_prob`, of the whole answer too,
            `logit_diff`, `kl`, or a function): mean change. `task`: change of the task's own metric on what
            is generated. Tokens behind the prompt are in the groups that its last token is in.
        draws, level, seed: Of the paired bootstrap over examples; none without draws, or with one example.
        options, sweep: How it runs: `batch_size`, `progress`, `memory_budget`, `tally` of `SweepOptions`.

    Returns:
        Labelled: layer (centre of the window), edge. What is below the noise of a 16-bit type is marked.

    Raises:
        ValueError: No edges, two of one name, one that cuts nothing; a bad window, metric or task.
        FloatingPointError: Logits that are not finite.
    """
    options, plan = SweepOptions.of(options, sweep, unused=("journal",)), _plan(model, edges, window)
    known_task, resampling = None if task is None else as_task(task), (draws, level, seed)
    if metric == "task":
        examples = _check_task_examples(data, known_task)
        return _task_metric_changes(model, examples, plan, options, resampling)
    measure = log_prob if metric == "probability" else as_metric(metric)
    before, after = _metric_values(model, data, known_task, plan, measure, options)
    noise = _noise(model, data, known_task, before, measure, options, relative=metric == "probability")
    if metric == "probability":
        description = "relative change of the right answer's probability when the target can't see the source"
        before, after = before.exp(), after.exp()
        statistics = _relative_change(before.numpy(), after.numpy(), *resampling)
    else:
        description = f"change of {metric_name(metric)} when the target can't see the source"
        statistics = mean_over_pairs(after - before[:, None], *resampling)
    base = (f"mean {metric_name(metric)} with nothing cut: {float(before.mean()):.4g}",)
    return plan.result(description, statistics, len(before), base, noise)


def _noise(
    model: HookedVLM,
    data: PatchPairs | VLMInputs | Sequence[Example],
    task: Task | None,
    before: Float[Tensor, " row"],
    metric: Metric,
    options: SweepOptions,
    *,
    relative: bool,
) -> Noise | None:
    """Twice the mean distance of rows with nothing cut from float32 (see `Noise`).

    Args:
        model, data, task, metric, options: As they were measured.
        before: What was.
        relative: These are log-probabilities, and what is reported is relative to their mean probability.

    Returns:
        None for float32 and wider types, whose noise no table shows.
    """
    if model.cfg.dtype.itemsize > 2:
        return None
    first = model.as_inputs(data) if isinstance(data, VLMInputs) else data
    first = first[:MOST_COMPARED] if len(first) > MOST_COMPARED else first
    own = SweepOptions(options.batch_size, progress=False, memory_budget=options.memory_budget)
    wide, _ = _metric_values(in_float32(model), first, task, _Plan({}, []), metric, own)
    narrow, unit = before[: len(wide)], 1.0
    if relative:
        wide, narrow, unit = wide.exp(), narrow.exp(), float(before.exp().mean())
    distance = float((wide - narrow).abs().mean())
    return Noise(2 * distance / unit, None, len(wide), dtype_name(model))


def _metric_values(
    model: HookedVLM,
    data: PatchPairs | VLMInputs | Sequence[Example],
    task: Task | None,
    plan: _Plan,
    metric: Metric,
    options: SweepOptions,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row arm"]]:
    """Metric of every row with nothing cut, and under each arm."""
    clean: list[Tensor] = []
    cut: list[Tensor] = []
    budget = {"memory_budget": options.memory_budget, "tally": options.tally}
    total = len(data) * plan.n_arms
    with tqdm(total=total, desc="knockout", disable=not options.progress, unit="cell") as bar:
        for batch, masks in _batches(model, data, task, plan.edges, metric, options.batch_size):
            plan.measured += measured_tokens(model, batch.pairs, reads_whole_answer(metric))
            plan.answers.append(answers_of_batch(batch, clean_alone=True))
            arms, values = [[], *plan.arms(batch.base, masks)], torch.zeros(plan.n_arms + 1, len(batch.pairs))
            for i, logits in logits_under(model, batch.base, arms, batch.keep, **budget):
                values[i] = batch.value(metric, logits).cpu()
                bar.update(len(batch.pairs) if i else 0)
            clean.append(values[0])
            cut.append(values[1:])
    return torch.cat(clean).double(), torch.cat(cut, dim=1).double().T


def _plan(model: HookedVLM, edges: Sequence[Edge] | Mapping[str, Edge], window: int) -> _Plan:
    if window < 1:
        raise ValueError(f"window must be at least 1 layer, not {window}")
    if isinstance(edges, Mapping):
        named = dict(edges)
    else:
        named = {f"{group_name(source)} → {group_name(target)}": (source, target) for source, target in edges}
    if not edges or len(named) < len(edges):
        raise ValueError("no edges" if not edges else "two edges have one name: give them names of their own")
    n_layers = model.cfg.n_layers
    width = min(window, n_layers)
    starts = (centre - (width - 1) // 2 for centre in range(n_layers))
    return _Plan(named, [range(max(0, start), min(n_layers, start + width)) for start in starts])


def _masks(inputs: VLMInputs, edges: Mapping[str, Edge]) -> dict[str, _Masks]:
    return {name: (token_mask(inputs, s), token_mask(inputs, t)) for name, (s, t) in edges.items()}


def _check_task_examples(data: object, task: Task | None) -> tuple[Task, Sequence[Example]]:
    """Examples with their task, checked.

    Raises:
        ValueError: Something else, or no task; and as `check_examples`.
    """
    if task is None or isinstance(data, (PatchPairs, VLMInputs)):
        raise ValueError("give examples with their task=, or pairs or prepared inputs without")
    assert isinstance(data, Sequence)
    check_examples(task, data)
    return task, data


def _batches(
    model: HookedVLM,
    data: PatchPairs | VLMInputs | Sequence[Example],
    task: Task | None,
    edges: Mapping[str, Edge],
    metric: Metric,
    batch_size: int,
) -> Iterator[tuple[PairBatch, dict[str, _Masks]]]:
    """Batches of prompts with their right answers, and the masks of each edge."""
    if not isinstance(data, (PatchPairs, VLMInputs)) or task is not None:
        known_task, examples = _check_task_examples(data, task)
        for batch in answer_batches(model, known_task, examples, batch_size, answers=False):
            answers = [
                model.continuation(known_task.target_prompt(e), known_task.answer(e)) for e in batch.examples
            ]
            pairs, masks = _with_answers(model, batch.inputs, answers, edges, batch.ids)
            yield _knockout_batch(model, pairs, masks, metric)
        return
    if isinstance(data, VLMInputs):
        pairs, masks = _pairs_from_answers(model, data, edges)
    else:
        pairs = replace(data, clean=model.as_inputs(data.clean))
        masks = _masks(pairs.clean, edges)
    for start in range(0, len(pairs), batch_size):
        part = pairs if batch_size >= len(pairs) else pairs[start : start + batch_size]
        yield _knockout_batch(model, part, masks, metric, start)


def _knockout_batch(
    model: HookedVLM, pairs: PatchPairs, masks: Mapping[str, _Masks], metric: Metric, start: int = 0
) -> tuple[PairBatch, dict[str, _Masks]]:
    """A batch whose clean inputs are run, and its rows, from `start` on, of the masks."""
    clean = model.with_image_embeds(pairs.clean)
    batch = PairBatch.of(model, pairs, clean, clean, "noise", metric)
    return batch, {
        name: (batch.mask_rows(source, start), batch.mask_rows(target, start))
        for name, (source, target) in masks.items()
    }


def _pairs_from_answers(
    model: HookedVLM, inputs: VLMInputs, edges: Mapping[str, Edge]
) -> tuple[PatchPairs, dict[str, _Masks]]:
    """Prompts of inputs with answers, and the masks of each edge."""
    prepared = model.as_inputs(inputs)
    prompts = prepared.before_answers()
    assert prepared.answer_mask is not None
    rows = zip(prepared.input_ids, prepared.answer_mask, strict=True)
    answers = [ids[mask].tolist() for ids, mask in rows]
    return _with_answers(model, prompts, answers, edges, [f"row {row}" for row in range(len(prompts))])


def _with_answers(
    model: HookedVLM,
    prompts: VLMInputs,
    answers: Sequence[list[int]],
    edges: Mapping[str, Edge],
    ids: Sequence[str],
) -> tuple[PatchPairs, dict[str, _Masks]]:
    """Pairs of prompts and whole answers, and masks, which are over the prompts, continued as these are."""
    masks = _masks(prompts, edges)
    pairs = with_shared_prefix(model, prompts, prompts, [(answer,) for answer in answers], tuple(ids))
    if pairs.shared:
        masks = {
            name: (continued_mask(source, pairs.shared), continued_mask(target, pairs.shared))
            for name, (source, target) in masks.items()
        }
    return pairs, masks


def _task_metric_changes(
    model: HookedVLM,
    task_and_examples: tuple[Task, Sequence[Example]],
    plan: _Plan,
    options: SweepOptions,
    draws: tuple[int, float, int],
) -> Labelled:
    """Change of a task's metric on what is generated."""
    task, examples = task_and_examples
    statistics: list[list[np.ndarray]] = [[] for _ in range(plan.n_arms + 1)]
    total = len(examples) * (plan.n_arms + 1)
    with tqdm(total=total, desc=f"knockout · {task.name}", disable=not options.progress, unit="cell") as bar:
        for batch in prompt_batches(model, task, examples, options.batch_size):
            arms = [[], *plan.arms(batch.inputs, _masks(batch.inputs, plan.edges))]
            sweep = Sweep(model, arms, options, bar.update)
            for arm_statistics, answers in zip(statistics, sweep.predictions(task, batch), strict=True):
                arm_statistics += [
                    task.statistics(*given) for given in zip(answers, batch.examples, strict=True)
                ]
    clean, *cut = (np.array(each) for each in statistics)
    metric = [float(task.metric(arm.sum(0))) for arm in (clean, *cut)]
    fields = {"values": np.array(metric[1:]) - metric[0]}
    n, level, seed = draws
    if n and len(examples) > 1:
        ends = [bootstrap_interval(task, arm, clean, draws=n, level=level, seed=seed) for arm in cut]
        fields |= {"low": np.array([end.low for end in ends]), "high": np.array([end.high for end in ends])}
    description = f"change of {task.metric_name} when the target can't see the source"
    base = f"{task.metric_name} with nothing cut: {metric[0]:.4g}"
    new = "New tokens are in the groups that the prompt's last token is in."
    outcome = Outcome(statistics=list(clean))
    noise = type_noise(model, task, examples, outcome, None, options, label="knockout")
    return plan.result(description, fields, len(examples), (base, new), noise)


def _relative_change(
    before: np.ndarray, after: np.ndarray, draws: int, level: float, seed: int
) -> dict[str, np.ndarray]:
    """Ratio of means minus 1, and its bootstrap interval, of values [n] and [n arm]."""
    fields = {"values": after.mean(0) / before.mean() - 1}
    if draws and len(before) > 1:

        def ratios(counts: np.ndarray, part: np.ndarray) -> np.ndarray:
            return counts @ part / (counts @ before)[:, None] - 1

        fields["low"], fields["high"] = bootstrap_ends(ratios, after, draws, level, seed)
    return fields
