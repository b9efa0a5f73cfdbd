"""The sweep engine: many examples under many interventions, exactly and fast.

Every stage that intervenes goes through `measure` (answers and rankings) or `measure_log_probs`. Images are
encoded once, the clean stream is walked up once, and each intervention computes only what lies above it
(`forks`); answers are checked against the clean one in one pass (`speculation`); candidates to rank share
the image's keys and values. The scores equal those of the naive loop, which is `predict` under hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hones_lens.engine import forks
from hones_lens.engine.arms import Arm
from hones_lens.engine.batches import Batch
from hones_lens.engine.forks import LayerStep
from hones_lens.engine.full_passes import (
    MAX_NEW_TOKENS,
    Prediction,
    error_context,
    log_probs,
    predict,
    yes_no_ids,
)
from hones_lens.engine.memory import Budget
from hones_lens.engine.options import SweepOptions
from hones_lens.engine.segments import Segment, candidate_rows, in_buckets, split_shared_prefix
from hones_lens.engine.speculation import (
    Answers,
    Draft,
    ExpectedAnswers,
    Tally,
    check_finite,
    in_answer_buckets,
)
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, KVCache, VLMInputs, summed_log_probs, takes_iterables, to_list
from hones_lens.tasks import Task


class _PromptEnds:
    """A clean pass as arms need it that change nothing before the last positions of the segments.

    Attributes:
        segments: What runs.
        pasts: Keys and values in front of these positions, by segment.
        steps: Every layer's step of each segment, at these positions.
    """

    def __init__(self, segments: Sequence[Segment]):
        self.segments, self.steps = segments, list[list[LayerStep]]()
        self.pasts = [KVCache() for _ in segments]

    def add(self, steps: Sequence[LayerStep]) -> None:
        """Keep what is needed of a layer."""
        for past, step, segment in zip(self.pasts, steps, self.segments, strict=True):
            early = step.cache.keys[step.layer].shape[1] - segment.keep
            past.keys[step.layer] = step.cache.keys[step.layer][:, :early]
            past.values[step.layer] = step.cache.values[step.layer][:, :early]
        self.steps.append([s.last(max(1, g.keep)) for s, g in zip(steps, self.segments, strict=True)])


class Sweep:
    """Many arms over batches of examples.

    Args:
        model: The model. While it has lasting hooks, everything runs as whole passes.
        arms: Hooks of each arm; an empty list is the clean model.
        options: Of which `memory_budget` and `tally` are read.
        tick: Is told how many cells (arms times examples) were done.
    """

    def __init__(
        self,
        model: HookedVLM,
        arms: Sequence[Sequence[Hook]],
        options: SweepOptions | None = None,
        tick: Callable[[int], object] = lambda cells: None,
    ):
        options = options or SweepOptions()
        self.model, self.arms, self.tick = model, [Arm(hooks) for hooks in arms], tick
        self.budget = Budget(model, options.memory_budget)
        self.tally = Tally() if options.tally is None else options.tally

    def predictions(self, task: Task, batch: Batch) -> list[list[Prediction]]:
        """What the model answers under each arm, by arm and example: texts, or margins of candidates."""
        forkable = self.forkable()
        answers = self._margins(task, batch, forkable) if task.ranks else self._texts(batch, forkable)
        by_arm = dict(zip(forkable, answers, strict=True))
        for i in self._whole(batch, forkable):
            by_arm[i] = predict(self.model, task, batch, self.arms[i].hooks)
        return [by_arm[i] for i in range(len(self.arms))]

    def forkable(self, in_portions: bool = True) -> list[int]:
        """Numbers of the arms that need no full pass: with all hooks in decoder blocks.

        None at all while the model has lasting hooks, which a fork would pass by.

        Args:
            in_portions: Hooks will see prompt and answer, or prefix and candidates, one after the other, so
                that they must edit each token by itself.
        """
        if self.model.hooked_names():
            return []
        return [
            i
            for i, arm in enumerate(self.arms)
            if not arm.hooks or (arm.start is not None and (not in_portions or _comes_in_portions(arm)))
        ]

    def _whole(self, batch: Batch, forkable: Sequence[int]) -> Iterator[int]:
        """The other arms, whose rows are counted as run when the next one is asked for."""
        for i in set(range(len(self.arms))) - set(forkable):
            yield i
            self.tally.full += len(batch.inputs)
            self.tick(len(batch.examples))

    def _texts(self, batch: Batch, numbers: Sequence[int]) -> list[list[str]]:
        ids, width, longest = batch.ids, batch.inputs.input_ids.shape[1], MAX_NEW_TOKENS
        most = len(self.arms) * len(ids)
        answers = Answers(self.model, width, longest, most, self.budget, self.tally)
        clean: dict[int, list[int]] = {}

        def run(rows: list[int], inputs: VLMInputs) -> None:
            row_ids = [ids[row] for row in rows]
            with error_context(row_ids):
                draft = Draft.of_clean_answers(self.model, inputs, longest)
            clean.update(zip(rows, draft.tokens, strict=True))
            expected = ExpectedAnswers.of(self.model, draft, rows, row_ids, longest)
            with self._ticks() as tick:
                for arm_indices, steps, (forked,) in self.forks_of([draft.segment(self.model)], numbers):
                    arms = [self.arms[i] for i in arm_indices]
                    if arms[0].hooks:  # what the clean model says is the draft
                        answers.check(expected, arm_indices, arms, steps[0], forked)
                    tick(len(arm_indices) * len(rows))

        in_buckets(batch.inputs, self.budget, run)
        answers.finish()
        tokens = [[answers.found.get((i, row), clean[row]) for row in range(len(ids))] for i in numbers]
        return [self._decoded(arm_tokens) for arm_tokens in tokens]

    @contextmanager
    def _ticks(self) -> Generator[Callable[[int], None]]:
        """A tick that is taken back where the rows are to be run again."""
        told = 0

        def tick(cells: int) -> None:
            nonlocal told
            told += cells
            self.tick(cells)

        try:
            yield tick
        except RuntimeError:
            self.tick(-told)
            raise

    def _decoded(self, tokens: Sequence[list[int]]) -> list[str]:
        known: dict[tuple[int, ...], str] = {}
        for token_ids in map(tuple, tokens):
            if token_ids not in known:
                text = self.model.tokenizer.decode(list(token_ids), skip_special_tokens=True)
                known[token_ids] = text.strip()
        return [known[tuple(token_ids)] for token_ids in tokens]

    def _margins(self, task: Task, batch: Batch, numbers: Sequence[int]) -> list[list[list[float]]]:
        (example,) = batch.examples
        yes, no = yes_no_ids(self.model, task.prompts(example)[0])
        margins = torch.zeros(len(self.arms), len(batch.inputs))

        def run(part: Sequence[int]) -> None:
            candidates = batch.inputs if len(part) == len(batch.inputs) else batch.inputs[part]
            segments, members = split_shared_prefix(self.model, candidates)
            with self._ticks() as tick:
                for arm_indices, _, forked in self.forks_of(segments, numbers):
                    arms = [self.arms[i] for i in arm_indices]
                    for output, segment, rows in zip(forked, segments, members, strict=True):
                        if not segment.keep:
                            continue
                        assert output.logits is not None
                        check_finite(output.logits, arms, [example.id] * len(rows))
                        last = output.logits[:, :, -1].float()
                        values = (last[..., yes] - last[..., no]).cpu()
                        for i, arm_values in zip(arm_indices, values, strict=True):
                            margins[i, [part[row] for row in rows]] = arm_values
                    if part[-1] == len(batch.inputs) - 1:
                        tick(len(arm_indices))

        most = candidate_rows(batch.inputs, self.budget)
        for _ in self.budget.in_parts(range(len(batch.inputs)), lambda rest: most, run):
            pass
        return [[to_list(margins[i])] for i in numbers]

    def log_probs(self, batch: Batch) -> list[list[float]]:
        """Log-probability of each example's right answer under each arm, by arm and example."""
        values_by_arm = torch.zeros(len(self.arms), len(batch.examples))
        forkable = self.forkable()
        for i in self._whole(batch, forkable):
            values_by_arm[i] = log_probs(self.model, batch, self.arms[i].hooks)
        ids = batch.ids

        def run(rows: list[int], draft: Draft) -> None:
            row_ids, wanted = [ids[row] for row in rows], draft.padded(0)
            counted = draft.padded(-1) >= 0
            with self._ticks() as tick:
                for arm_indices, _, (forked,) in self.forks_of([draft.segment(self.model)], forkable):
                    assert forked.logits is not None
                    check_finite(forked.logits, [self.arms[i] for i in arm_indices], row_ids)
                    token_log_probs = forked.logits.float().log_softmax(-1)
                    shape = (len(arm_indices), -1, -1)
                    values = summed_log_probs(token_log_probs, wanted.expand(shape), counted.expand(shape))
                    for i, arm_values in zip(arm_indices, values.cpu(), strict=True):
                        values_by_arm[i, rows] = arm_values
                    tick(len(arm_indices) * len(rows))

        in_answer_buckets(batch.inputs, self.budget, run)
        return to_list(values_by_arm)

    def forks_of(
        self, segments: Sequence[Segment], numbers: Sequence[int], whole: bool = False
    ) -> Iterator[tuple[list[int], list[LayerStep], list[forks.ForkOutput]]]:
        """Numbers of arms, the clean steps they were forked from, and what came of them.

        Arms that change nothing before the end of the prompt need the clean keys and values of all layers,
        and come last.

        Args:
            segments: What to run.
            numbers: Of the arms.
            whole: Hooks need to see every position, of the top block too.
        """
        arms = {i: self.arms[i] for i in numbers}
        late: dict[int, Arm] = {}
        if not whole:
            late = {i: changed for i, arm in arms.items() if (changed := arm.late()) is not None}
        groups: dict[Any, list[int]] = {}
        for i, arm in arms.items():
            if arm.hooks and i not in late:
                groups.setdefault(arm.group, []).append(i)
        ends, steps = _PromptEnds(segments), list[LayerStep]()
        for steps in forks.walk(self.model, segments):
            for group in [group for group in groups if group[0][0] == steps[0].layer]:
                yield from self._batches_of(segments, steps, arms, groups[group], whole)
            if late:
                ends.add(steps)
        clean = [
            forks.clean(self.model, *segment_and_step)
            for segment_and_step in zip(segments, steps, strict=True)
        ]
        yield from (([i], steps, clean) for i, arm in arms.items() if not arm.hooks)
        if late:
            yield from self._late_forks_of(ends, steps[-1].cache, late)

    def _late_forks_of(
        self, ends: _PromptEnds, cache: KVCache, arms: dict[int, Arm]
    ) -> Iterator[tuple[list[int], list[LayerStep], list[forks.ForkOutput]]]:
        """As `forks_of`, of arms that change nothing before the end of the prompt."""
        wanted = [i for i, segment in enumerate(ends.segments) if segment.keep]
        late_segments = [ends.segments[i].late(ends.pasts[i]) for i in wanted]
        skipped = [forks.ForkOutput(None, KVCache())] * (len(ends.segments) - len(wanted))
        for steps in ends.steps:
            layer_arms = [i for i, arm in arms.items() if arm.start and arm.start[0] == steps[0].layer]
            for arm_indices, _, forked in self._batches_of(
                late_segments, [steps[i] for i in wanted], arms, layer_arms
            ):
                yield arm_indices, [replace(steps[-1], cache=cache)], [*skipped, *forked]

    def _batches_of(
        self,
        segments: Sequence[Segment],
        steps: list[LayerStep],
        arms: dict[int, Arm],
        numbers: list[int],
        whole: bool = False,
    ) -> Iterator[tuple[list[int], list[LayerStep], list[forks.ForkOutput]]]:
        """Arms of one group, as many at a time as memory has room for."""
        tokens = sum(segment.resid[..., 0].numel() for segment in segments)
        kept = sum(len(segment.resid) * segment.keep for segment in segments)
        rows = sum(len(segment.resid) for segment in segments if segment.keep)
        fits, n_layers = self.budget.rows(tokens, kept), self.model.cfg.n_layers - steps[0].layer

        def run(part: Sequence[int]) -> list[forks.ForkOutput]:
            return forks.fork(self.model, segments, steps, [arms[i] for i in part], whole)

        for part, outputs in self.budget.in_parts(numbers, lambda rest: fits, run):
            self.tally.forked += len(part) * rows
            self.tally.row_layers += len(part) * rows * n_layers
            yield list(part), steps, outputs


def _comes_in_portions(arm: Arm) -> bool:
    return arm.is_position_wise or arm.late() is not None


@takes_iterables
@torch.no_grad()
def logits_under(
    model: HookedVLM,
    inputs: VLMInputs,
    arms: Sequence[Sequence[Hook]],
    keep: int = 1,
    memory_budget: float | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of one batch under each of many interventions, as they come; for patching sweeps.

    Hooks see what they would see in a forward pass of these inputs: all rows, and all positions.

    Args:
        model: The model.
        inputs: The batch, padded on the left as it likes.
        arms: Hooks of each intervention; an empty list is the clean model.
        keep: At how many of the last positions logits are wanted.
        memory_budget: GB for activations; default: a share of what is free.
        tally: Counts what is done.

    Yields:
        The number of an arm, and its logits [row keep d_vocab]. Arms come by layer, not in their order.

    Raises:
        FloatingPointError: Logits that are not finite; names the arm and the row.
        ValueError: A row padded on the right.
    """
    sweep = Sweep(model, arms, SweepOptions(memory_budget=memory_budget, tally=tally))
    prepared = model.with_image_embeds(model.as_inputs(inputs))
    prepared.require_left_padding("sweep")
    names = [f"row {row}" for row in range(len(prepared))]
    forked = sweep.forkable(in_portions=False)
    for i in set(range(len(arms))) - set(forked):
        with model.hooks(fwd_hooks=list(arms[i])):
            logits = model(prepared, logits_to_keep=keep)
        check_finite(logits[None], [sweep.arms[i]], names)
        sweep.tally.full += len(prepared)
        yield i, logits
    for arm_indices, _, (output,) in sweep.forks_of([Segment.of(model, prepared, keep)], forked, whole=True):
        assert output.logits is not None
        check_finite(output.logits, [sweep.arms[i] for i in arm_indices], names)
        yield from zip(arm_indices, output.logits, strict=True)
