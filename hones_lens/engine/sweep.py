"""The sweep engine: many examples under many interventions, exactly and fast.

Every stage that intervenes goes through `measure` (answers and rankings) or `measure_log_probs`. Images are
encoded once, the clean stream is walked up once, and each intervention computes only what lies above it
(`forks`); answers are checked against the clean one in one pass (`speculation`); candidates to rank share
the image's keys and values. The scores equal those of the naive loop, which is `predict` under hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens.data import Example
from hones_lens.engine import forks
from hones_lens.engine.forks import Arm, Segment, Step
from hones_lens.engine.memory import Budget
from hones_lens.engine.speculation import Answers, Draft, Expected, Tally, check_finite
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, KVCache, VLMInputs, attention_mask
from hones_lens.tasks import Task, load_task

MAX_NEW_TOKENS = 24
Prediction = Any  # a text, or the margins of all candidates


@dataclass(frozen=True)
class Batch:
    """Examples with their inputs, images encoded; `rows[i]` of the inputs belong to example i."""

    examples: Sequence[Example]
    inputs: VLMInputs
    rows: Sequence[int]

    @property
    def ids(self) -> list[str]:
        """The examples' names."""
        return [example.id for example in self.examples]


def as_task(task: str | Task) -> Task:
    """A task, or the task of that name."""
    return load_task(task) if isinstance(task, str) else task


def check_examples(task: Task, examples: Sequence[Example]) -> None:
    """Raise before any model runs if an example lacks what its task reads, or ids repeat.

    Raises:
        ValueError: No examples, an example without target or prompt, or an id that repeats.
    """
    if not examples:
        raise ValueError("no examples")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise ValueError(f"example id {example.id!r} occurs twice")
        seen.add(example.id)
        task.prompts(example)
        task.target(example)


def prompt_batches(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int
) -> Iterator[Batch]:
    """Every prompt of the examples, prepared; a ranking task's example is a batch of its own."""
    size = 1 if task.ranks else batch_size
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        prompts = [task.prompts(example) for example in some]
        rows = [len(asked) for asked in prompts]
        images = [example.image for example, n in zip(some, rows, strict=True) for _ in range(n)]
        inputs = model.prepare(images, [p for asked in prompts for p in asked])
        yield Batch(some, _encode(model, inputs, shared=task.ranks), rows)


def answer_batches(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int, answers: bool = True
) -> Iterator[Batch]:
    """The prompt that the target follows, one row an example, with the right answer behind it."""
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        said = [task.answer(example) for example in some] if answers else None
        prompts = [task.target_prompt(example) for example in some]
        inputs = model.prepare([example.image for example in some], prompts, said)
        yield Batch(some, _encode(model, inputs), [1] * len(some))


def _encode(model: HookedVLM, inputs: VLMInputs, shared: bool = False) -> VLMInputs:
    """Run the vision tower once: for every image, or for the one that all rows share."""
    if not shared:
        return model.with_image_embeds(inputs)
    first = model.with_image_embeds(inputs[0]).image_embeds
    assert first is not None
    return replace(inputs, image_embeds=first.repeat(len(inputs), *(1,) * (first.ndim - 1)))


def predict(model: HookedVLM, task: Task, batch: Batch, hooks: Sequence[Hook] = ()) -> list[Prediction]:
    """What the model answers to a batch under hooks: texts, or margins [n_candidates] of Yes over No.

    Raises:
        FloatingPointError: Logits that are not finite; names the hooks and the examples.
    """
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)), naming(batch.ids, hooks):
        if not task.ranks:
            return list(model.generate(batch.inputs, max_new_tokens=MAX_NEW_TOKENS))
        return _margins(model, task, batch)


def _margins(model: HookedVLM, task: Task, batch: Batch) -> list[list[float]]:
    yes, no = yes_no_ids(model, task.prompts(batch.examples[0])[0])
    logits = model(batch.inputs, logits_to_keep=1)[:, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("logits are not finite")
    margins = (logits[:, yes] - logits[:, no]).cpu().split(list(batch.rows))
    return [part.tolist() for part in margins]


def yes_no_ids(model: HookedVLM, prompt: str) -> tuple[int, int]:
    """The ids that Yes and No begin with where they really follow a prompt.

    Raises:
        ValueError: They begin with the same token, so that a margin would always be zero.
    """
    yes, no = (model.continuation(prompt, word)[0] for word in ("Yes", "No"))
    if yes == no:
        piece = model.tokenizer.convert_ids_to_tokens(yes)
        raise ValueError(
            f"Yes and No both begin with the token {piece!r} after this prompt; they can't be compared"
        )
    return yes, no


@contextmanager
def naming(ids: Sequence[str], hooks: Sequence[Hook] = ()) -> Iterator[None]:
    """Add hooks and ids of the examples to a FloatingPointError that is raised inside."""
    try:
        yield
    except FloatingPointError as error:
        where = ", ".join(str(name) for name, _ in hooks) or "no hook"
        raise FloatingPointError(f"{error} (hooks: {where}; examples: {', '.join(ids)})") from error


def log_probs(model: HookedVLM, batch: Batch, hooks: Sequence[Hook] = ()) -> Tensor:
    """Log-probability of each example's right answer under hooks, [n_examples] on the CPU.

    Raises:
        FloatingPointError: A value that is not finite; names the example.
    """
    with model.hooks(fwd_hooks=list(hooks)):
        values = model.log_probs(batch.inputs).cpu()
    if not bool(torch.isfinite(values).all()):
        worst = batch.examples[int((~torch.isfinite(values)).int().argmax())]
        raise FloatingPointError(f"the log-probability of example {worst.id!r} is not finite")
    return values


@dataclass
class Outcome:
    """What one arm (or the clean model) gave: statistics and score of every example, in order."""

    statistics: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def metric(self, task: Task, rows: Sequence[int] | None = None) -> float:
        """The metric over all examples, or over some."""
        picked = np.array(self.statistics)
        return float(task.metric((picked if rows is None else picked[list(rows)]).sum(0)))


class Sweep:
    """Many arms over batches of examples.

    Args:
        model: The model. While it has lasting hooks, everything runs as whole passes.
        arms: Hooks of each arm; an empty list is the clean model.
        memory_budget: GB for activations; default: a share of what is free.
        tally: Is counted up.
        tick: Is told how many cells (arms times examples) were done.
    """

    def __init__(
        self,
        model: HookedVLM,
        arms: Sequence[Sequence[Hook]],
        memory_budget: float | None = None,
        tally: Tally | None = None,
        tick: Callable[[int], object] = lambda cells: None,
    ):
        self.model, self.arms, self.tick = model, [Arm(hooks) for hooks in arms], tick
        self.budget, self.tally = Budget(model, memory_budget), tally or Tally()

    def predictions(self, task: Task, batch: Batch) -> list[list[Prediction]]:
        """What the model answers under each arm, by arm and example: texts, or margins of candidates."""
        forkable = self.forkable()
        answers = self._margins(task, batch, forkable) if task.ranks else self._texts(batch, forkable)
        found = dict(zip(forkable, answers, strict=True))
        for i in self._whole(batch, forkable):
            found[i] = predict(self.model, task, batch, self.arms[i].hooks)
        return [found[i] for i in range(len(self.arms))]

    def forkable(self, in_portions: bool = True) -> list[int]:
        """Numbers of the arms that need no full pass: with no hook below block 0.

        None at all while the model has lasting hooks, which a fork would pass by.

        Args:
            in_portions: Hooks will see prompt and answer, or prefix and candidates, one after the other.
        """
        if any(point.fwd_hooks or point.bwd_hooks for point in self.model.hook_dict.values()):
            return []
        return [
            i
            for i, arm in enumerate(self.arms)
            if not arm.hooks or (arm.start is not None and (arm.sees_tokens_alone or not in_portions))
        ]

    def _whole(self, batch: Batch, forkable: Sequence[int]) -> Iterator[int]:
        """The other arms, whose rows are counted as run when the next one is asked for."""
        for i in set(range(len(self.arms))) - set(forkable):
            yield i
            self.tally.full += len(batch.inputs)
            self.tick(len(batch.examples))

    def _texts(self, batch: Batch, numbers: Sequence[int]) -> list[list[str]]:
        ids, width = batch.ids, batch.inputs.input_ids.shape[1]
        room = self.budget.decoding_rows(width + MAX_NEW_TOKENS)
        answers = Answers(self.model, width, MAX_NEW_TOKENS, min(room, len(self.arms) * len(ids)), self.tally)
        clean: dict[int, list[int]] = {}
        for rows, inputs in buckets(batch.inputs, self.budget):
            names = [ids[row] for row in rows]
            with naming(names):
                draft = Draft.of_clean_answers(self.model, inputs, MAX_NEW_TOKENS)
            clean |= zip(rows, draft.tokens, strict=True)
            expected = Expected.of(self.model, draft, rows, names, MAX_NEW_TOKENS)
            for some, steps, (forked,) in self.forks_of([draft.segment(self.model)], numbers):
                arms = [self.arms[i] for i in some]
                if arms[0].hooks:  # what the clean model says is the draft
                    answers.check(expected, some, arms, steps[0], forked)
                self.tick(len(some) * len(rows))
        answers.finish()
        said = [[answers.found.get((i, row), clean[row]) for row in range(len(ids))] for i in numbers]
        return [self._decoded(tokens) for tokens in said]

    def _decoded(self, tokens: Sequence[list[int]]) -> list[str]:
        known: dict[tuple[int, ...], str] = {}
        for said in map(tuple, tokens):
            if said not in known:
                text = self.model.tokenizer.decode(list(said), skip_special_tokens=True)
                known[said] = text.strip()
        return [known[tuple(said)] for said in tokens]

    def _margins(self, task: Task, batch: Batch, numbers: Sequence[int]) -> list[list[list[float]]]:
        (example,) = batch.examples
        yes, no = yes_no_ids(self.model, task.prompts(example)[0])
        segments, rows = behind_shared_prefix(self.model, batch.inputs)
        margins = torch.zeros(len(self.arms), len(batch.inputs))
        for some, _, forked in self.forks_of(segments, numbers):
            arms = [self.arms[i] for i in some]
            for one, segment, here in zip(forked, segments, rows, strict=True):
                if not segment.keep:
                    continue
                assert one.logits is not None
                check_finite(one.logits, arms, [example.id] * len(here))
                last = one.logits[:, :, -1].float()
                values = (last[..., yes] - last[..., no]).cpu()
                for i, mine in zip(some, values, strict=True):
                    margins[i, here] = mine
            self.tick(len(some))
        return [[margins[i].tolist()] for i in numbers]

    def log_probs(self, batch: Batch) -> list[list[float]]:
        """Log-probability of each example's right answer under each arm, by arm and example."""
        found = torch.zeros(len(self.arms), len(batch.examples))
        forkable = self.forkable()
        for i in self._whole(batch, forkable):
            found[i] = log_probs(self.model, batch, self.arms[i].hooks)
        ids = batch.ids
        for rows, draft in answer_buckets(batch.inputs, self.budget):
            names, wanted = [ids[row] for row in rows], draft.padded(0)
            counted = draft.padded(-1) >= 0
            for some, _, (forked,) in self.forks_of([draft.segment(self.model)], forkable):
                assert forked.logits is not None
                check_finite(forked.logits, [self.arms[i] for i in some], names)
                likely = forked.logits.float().log_softmax(-1)
                likely = likely.gather(-1, wanted.expand(len(some), -1, -1)[..., None])[..., 0]
                values = (likely * counted).sum(-1).cpu()
                for i, mine in zip(some, values, strict=True):
                    found[i, rows] = mine
                self.tick(len(some) * len(rows))
        return found.tolist()

    def forks_of(
        self, segments: Sequence[Segment], numbers: Sequence[int], whole: bool = False
    ) -> Iterator[tuple[list[int], list[Step], list[forks.Forked]]]:
        """Numbers of arms, the clean steps they were forked from, and what came of them.

        Arms that change nothing before the end of the prompt need the clean keys and values of all layers,
        and come last.

        Args:
            segments: What to run.
            numbers: Of the arms.
            whole: Hooks need to see every position, of the top block too.
        """
        arms = {i: self.arms[i] for i in numbers}
        late = {}
        if not whole:
            late = {i: changed for i, arm in arms.items() if (changed := arm.late()) is not None}
        groups: dict[Any, list[int]] = {}
        for i, arm in arms.items():
            if arm.hooks and i not in late:
                groups.setdefault(arm.group, []).append(i)
        pasts, ends = [KVCache() for _ in segments], []
        steps: list[Step] = []
        for steps in forks.walk(self.model, segments):
            for group in [group for group in groups if group[0][0] == steps[0].layer]:
                yield from self._batches_of(segments, steps, arms, groups[group], whole)
            if late:
                ends.append([step.last(max(1, s.keep)) for step, s in zip(steps, segments, strict=True)])
                for past, step, segment in zip(pasts, steps, segments, strict=True):
                    early = step.cache.keys[step.layer].shape[1] - segment.keep
                    past.keys[step.layer] = step.cache.keys[step.layer][:, :early]
                    past.values[step.layer] = step.cache.values[step.layer][:, :early]
        clean = [forks.clean(self.model, *given) for given in zip(segments, steps, strict=True)]
        yield from (([i], steps, clean) for i, arm in arms.items() if not arm.hooks)
        if late:
            wanted = [i for i, segment in enumerate(segments) if segment.keep]
            behind = [segments[i].late(pasts[i]) for i in wanted]
            for here in ends:
                mine = [i for i, arm in late.items() if arm.start and arm.start[0] == here[0].layer]
                found = self._batches_of(behind, [here[i] for i in wanted], late, mine)
                for some, _, forked in found:
                    none = [forks.Forked(None, KVCache())] * (len(segments) - len(wanted))
                    yield some, [replace(here[-1], cache=steps[-1].cache)], [*none, *forked]

    def _batches_of(
        self,
        segments: Sequence[Segment],
        steps: list[Step],
        arms: dict[int, Arm],
        left: list[int],
        whole: bool = False,
    ) -> Iterator[tuple[list[int], list[Step], list[forks.Forked]]]:
        """Arms of one group, as many at a time as memory has room for."""
        tokens = sum(segment.resid[..., 0].numel() for segment in segments)
        kept = sum(len(segment.resid) * segment.keep for segment in segments)
        rows = sum(len(segment.resid) for segment in segments if segment.keep)
        while left:
            some = left[: self.budget.rows(tokens, kept)]
            try:
                found = forks.fork(self.model, segments, steps, [arms[i] for i in some], whole)
            except RuntimeError as error:
                self.budget.halve(error, len(some))
                continue
            left = left[len(some) :]
            self.tally.forked += len(some) * rows
            self.tally.row_layers += len(some) * rows * (self.model.cfg.n_layers - steps[0].layer)
            yield some, steps, found


@torch.no_grad()
def logits_under(
    model: HookedVLM,
    inputs: VLMInputs,
    arms: Sequence[Sequence[Hook]],
    keep: int = 1,
    memory_budget: float | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of one batch under each of many interventions, as they come; for patching sweeps.

    Hooks see what they would see in a forward pass of these inputs: all rows, and all positions.

    Args:
        model: The model.
        inputs: The batch, padded on the left as it likes.
        arms: Hooks of each intervention; an empty list is the clean model.
        keep: At how many of the last positions logits are wanted.
        memory_budget: GB for activations; default: a share of what is free.

    Yields:
        The number of an arm, and its logits [row keep d_vocab]. Arms come by layer, not in their order.

    Raises:
        FloatingPointError: Logits that are not finite; names the arm and the row.
    """
    sweep = Sweep(model, arms, memory_budget)
    known = model.with_image_embeds(model.as_inputs(inputs))
    names = [f"row {row}" for row in range(len(known))]
    forked = sweep.forkable(in_portions=False)
    for i in set(range(len(arms))) - set(forked):
        logits = model.run_with_hooks(known, fwd_hooks=list(arms[i]), logits_to_keep=keep)
        check_finite(logits[None], [sweep.arms[i]], names)
        yield i, logits
    for some, _, (found,) in sweep.forks_of([Segment.of(model, known, keep)], forked, whole=True):
        assert found.logits is not None
        check_finite(found.logits, [sweep.arms[i] for i in some], names)
        yield from zip(some, found.logits, strict=True)


def buckets(inputs: VLMInputs, budget: Budget) -> Iterator[tuple[list[int], VLMInputs]]:
    """Rows of one length, without padding, as many at a time as the budget has room for."""
    lengths = inputs.attention_mask.sum(-1).tolist()
    for length in sorted(set(lengths)):
        rows = [row for row, n in enumerate(lengths) if n == length]
        size = budget.rows(length)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield some, inputs[some].without_padding()


def answer_buckets(inputs: VLMInputs, budget: Budget) -> Iterator[tuple[list[int], Draft]]:
    """Prompts of one length, with their right answers as drafts."""
    assert inputs.answer_mask is not None
    said = inputs.answer_mask.sum(-1).tolist()
    alone = inputs.before_answers()
    for rows, prompts in buckets(alone, budget):
        tokens = [inputs.input_ids[row, inputs.input_ids.shape[1] - said[row] :].tolist() for row in rows]
        yield rows, Draft(prompts, tokens)


def behind_shared_prefix(model: HookedVLM, inputs: VLMInputs) -> tuple[list[Segment], list[list[int]]]:
    """Rows that begin alike, image included: their common beginning once, then what is behind it.

    Returns:
        Segments (the prefix first), and which rows each has. Rows of one length share a segment. Where
        images lie behind the common beginning, nothing is shared.
    """
    lengths = inputs.attention_mask.sum(-1).tolist()
    width = inputs.input_ids.shape[1]
    ids = [row[width - n :].tolist() for row, n in zip(inputs.input_ids, lengths, strict=True)]
    shared = _common_beginning(ids)
    pads = [width - n for n in lengths]
    if any(bool(mask[pad + shared :].any()) for mask, pad in zip(inputs.image_mask, pads, strict=True)):
        shared = 0
    with torch.no_grad():
        resid = model.embed_inputs(inputs)
        cos, sin = model.rotary(model.positions(inputs), model.cfg.dtype)

    def cut(rows: list[int], first: int, last: int, keep: int, mask: Tensor | None = None) -> Segment:
        parts = [x[rows, first:last] for x in (resid, cos, sin)]
        return Segment(*parts, mask=mask, keep=keep, prefixed=shared > 0 and keep > 0)

    segments, members = [], []
    if shared:
        segments.append(cut([0], pads[0], pads[0] + shared, 0))
        members.append([0])
    for length in sorted(set(lengths)):
        rows = [row for row, n in enumerate(lengths) if n == length]
        seen = torch.ones(1, length, dtype=torch.bool, device=resid.device)
        mask = attention_mask(seen, length - shared)
        segments.append(cut(rows, width - length + shared, width, 1, mask))
        members.append(rows)
    return segments, members


def _common_beginning(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; of the shortest, the last is left out."""
    shortest = min(map(len, rows)) - 1
    for i in range(shortest):
        if len({row[i] for row in rows}) > 1:
            return i
    return shortest


def measure(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    *,
    batch_size: int = 32,
    progress: bool = True,
    journal: MutableMapping[str, Any] | None = None,
    label: str = "sweep",
    memory_budget: float | None = None,
    tally: Tally | None = None,
    leaders: Callable[[list[Outcome]], str] | None = None,
) -> list[Outcome]:
    """Run every example under every arm's hooks and score what comes out.

    Args:
        model, task, examples: What to run.
        arms: Hooks of each arm; an empty list is the clean model.
        batch_size: Examples at a time, which a killed sweep loses at most.
        progress: Show a progress bar.
        journal: Finished batches, read and written, so that a sweep can be taken up again.
        label: What the progress bar is called.
        memory_budget: GB for activations; default: a share of what is free.
        tally: Is counted up.
        leaders: What to show beside the bar, from the outcomes so far.

    Returns:
        An Outcome for each arm.

    Raises:
        FloatingPointError: Logits that are not finite; names arm and examples.
    """
    found = [Outcome() for _ in arms]
    with _bar(label, task, examples, arms, progress) as bar:
        sweep = Sweep(model, arms, memory_budget, tally, bar.update)

        def run(some: Sequence[Example]) -> list[list[list[float]]]:
            said: list[list[Prediction]] = [[] for _ in arms]
            for batch in prompt_batches(model, task, some, batch_size):
                for mine, new in zip(said, sweep.predictions(task, batch), strict=True):
                    mine += new
            return _scored(task, some, said)

        for saved in _batches(run, examples, batch_size, journal, label, bar):
            for outcome, rows in zip(found, saved, strict=True):
                outcome.scores += [row[0] for row in rows]
                outcome.statistics += [np.array(row[1:]) for row in rows]
            if leaders is not None:
                bar.set_postfix_str(leaders(found))
    return found


def _bar(label: str, task: Task, examples: Sequence, arms: Sequence, progress: bool) -> Any:
    total = len(examples) * len(arms)
    return tqdm(total=total, desc=f"{label} · {task.name}", disable=not progress, unit="cell")


def _batches(
    run: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    batch_size: int,
    journal: MutableMapping[str, Any] | None,
    label: str,
    bar: Any,
) -> Iterator[list]:
    """What each batch of examples gave, by arm; from the journal where it has been run."""
    for number, start in enumerate(range(0, len(examples), batch_size)):
        some = examples[start : start + batch_size]
        key = f"{label}/{number}"
        saved = None if journal is None else journal.get(key)
        if saved is None:
            saved = run(some)
            if journal is not None:
                journal[key] = saved
        else:
            bar.update(len(some) * len(saved))
        yield saved


def _scored(
    task: Task, examples: Sequence[Example], said: Sequence[Sequence[Prediction]]
) -> list[list[list[float]]]:
    """For each arm and example its score, then its statistics; equal answers are scored once."""
    known: dict[tuple[int, str], list[float]] = {}
    out = []
    for answers in said:
        rows = []
        for i, (answer, example) in enumerate(zip(answers, examples, strict=True)):
            key = (i, repr(answer))
            if key not in known:
                known[key] = [task.score(answer, example), *task.statistics(answer, example).tolist()]
            rows.append(known[key])
        out.append(rows)
    return out


def measure_log_probs(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    *,
    batch_size: int = 32,
    progress: bool = True,
    journal: MutableMapping[str, Any] | None = None,
    label: str = "log-probabilities",
    memory_budget: float | None = None,
    tally: Tally | None = None,
) -> list[list[float]]:
    """Log-probability of every example's right answer under every arm's hooks; as `measure`."""
    found: list[list[float]] = [[] for _ in arms]
    with _bar(label, task, examples, arms, progress) as bar:
        sweep = Sweep(model, arms, memory_budget, tally, bar.update)

        def run(some: Sequence[Example]) -> list[list[float]]:
            (batch,) = answer_batches(model, task, some, len(some))
            return sweep.log_probs(batch)

        for saved in _batches(run, examples, batch_size, journal, label, bar):
            for values, new in zip(found, saved, strict=True):
                values += new
    return found
