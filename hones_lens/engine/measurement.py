"""Every example under every arm's hooks, measured: scores and statistics, or log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
from tqdm.auto import tqdm

from hones_lens.data import Example
from hones_lens.engine.arms import Arm
from hones_lens.engine.batches import answer_batches, prompt_batches
from hones_lens.engine.full_passes import Prediction
from hones_lens.engine.options import SweepOptions
from hones_lens.engine.speculation import Tally
from hones_lens.engine.sweep import Sweep
from hones_lens.engine.units import (
    Done,
    SharedJournal,
    Unit,
    check_shareable,
    chunks,
    expect,
    layer_blocks,
    ranked_pieces,
)
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, bounded_by, takes_iterables
from hones_lens.tasks import Task

Rows = list[list[list[float]]]  # by arm and example, the numbers that are kept of it


@dataclass
class Outcome:
    """Statistics and scores of every example under one arm, in the order of the examples."""

    statistics: list[np.ndarray] = field(default_factory=list[np.ndarray])
    scores: list[float] = field(default_factory=list[float])
    _running: tuple[int, Any] = field(default=(0, 0.0), repr=False, compare=False)

    def metric(self, task: Task, rows: Sequence[int] | None = None) -> float:
        """The metric over all examples, or over some."""
        statistics = np.array(self.statistics)
        return float(task.metric((statistics if rows is None else statistics[list(rows)]).sum(0)))

    def metric_so_far(self, task: Task) -> float:
        """The metric over all examples, from a sum to which only new examples are added."""
        added, total = self._running
        new = self.statistics[added:]
        if new:
            total = total + np.array(new).sum(0)
            self._running = (len(self.statistics), total)
        return float(task.metric(np.asarray(total)))


@takes_iterables
def measure(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
    *,
    label: str = "sweep",
    leaders: Callable[[list[Outcome]], str] | None = None,
) -> list[Outcome]:
    """Run every example under every arm's hooks and score the outputs.

    Args:
        model, task, examples: What to run.
        arms: Hooks of each arm; an empty list is the clean model. Functions that are not marked as
            `interventions.position_wise` see whole passes of the prompts of a batch, which takes longer.
        options: How to run it.
        label: What the progress bar is called, and the batches in the journal.
        leaders: What to show beside the bar, from the outcomes so far.

    Returns:
        An Outcome for each arm.

    Raises:
        FloatingPointError: Logits that are not finite; names arm and examples.
    """
    outcomes = [Outcome() for _ in arms]
    with bounded_by(options.memory_budget), _bar(label, task, examples, arms, options.progress) as bar:
        for saved in _batches(_Measured(model, task, arms, options), examples, label, bar):
            for outcome, rows in zip(outcomes, saved, strict=True):
                outcome.scores += [row[0] for row in rows]
                outcome.statistics += [np.array(row[1:]) for row in rows]
            if leaders is not None:
                bar.set_postfix_str(leaders(outcomes))
    return outcomes


@takes_iterables
def measure_log_probs(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
    *,
    label: str = "log-probabilities",
) -> list[list[float]]:
    """Log-probability of every example's right answer under every arm's hooks; as `measure`."""
    log_probs: list[list[float]] = [[] for _ in arms]
    with bounded_by(options.memory_budget), _bar(label, task, examples, arms, options.progress) as bar:
        work = _Measured(model, task, arms, options, log_probs=True)
        for saved in _batches(work, examples, label, bar):
            for values, rows in zip(log_probs, saved, strict=True):
                values += [value for (value,) in rows]
    return log_probs


def _bar(
    label: str, task: Task, examples: Sequence[Example], arms: Sequence[Sequence[Hook]], progress: bool
) -> Any:
    total = len(examples) * len(arms)
    return tqdm(total=total, desc=f"{label} · {task.name}", disable=not progress, unit="cell")


@dataclass(frozen=True)
class _Measured:
    """A measurement: of answers or rankings with their statistics, or of log-probabilities."""

    model: HookedVLM
    task: Task
    arms: Sequence[Sequence[Hook]]
    options: SweepOptions
    log_probs: bool = False

    def run(self, sweep: Sweep, examples: Sequence[Example]) -> Rows:
        """One batch of examples."""
        if self.log_probs:
            (batch,) = answer_batches(self.model, self.task, examples, len(examples))
            return [[[value] for value in values] for values in sweep.log_probs(batch)]
        predictions: list[list[Prediction]] = [[] for _ in self.arms]
        for batch in prompt_batches(self.model, self.task, examples, self.options.batch_size):
            for arm_predictions, batch_predictions in zip(
                predictions, sweep.predictions(self.task, batch), strict=True
            ):
                arm_predictions += batch_predictions
        return _score_answers(self.task, examples, predictions)

    def pieces(self, portion: range) -> list[range]:
        """A portion of the examples in pieces for units, which are rounded as the whole portion is."""
        return ranked_pieces(portion) if self.task.ranks and not self.log_probs else [portion]

    def unit(self, name: str, examples: Sequence[Example], arms: Sequence[int]) -> Unit:
        """Some of the examples under some of the arms, as work for another process."""
        some = [self.arms[i] for i in arms]
        options = SweepOptions(self.options.batch_size, memory_budget=self.options.memory_budget)
        work = _Part(self.task, some, options, self.log_probs, examples)
        shape = (len(some), len(examples))
        return Unit(name, ("arm", "example"), shape, work, len(some) * len(examples))


@dataclass(frozen=True)
class _Part:
    """Some examples under some arms, for a process that has its own model."""

    task: Task
    arms: Sequence[Sequence[Hook]]
    options: SweepOptions
    log_probs: bool
    examples: Sequence[Example]

    def __call__(self, model: HookedVLM) -> Done:
        """Measure them batch by batch."""
        tally = Tally()
        work = _Measured(model, self.task, self.arms, self.options, self.log_probs)
        sweep = Sweep(model, self.arms, replace(self.options, tally=tally))
        size, rows = self.options.batch_size, Rows([] for _ in self.arms)
        for start in range(0, len(self.examples), size):
            for arm_rows, new in zip(rows, work.run(sweep, self.examples[start : start + size]), strict=True):
                arm_rows += new
        return Done(np.array(rows, dtype=np.float64), asdict(tally))


def _batches(work: _Measured, examples: Sequence[Example], label: str, bar: Any) -> Iterator[Rows]:
    """What comes of each batch of examples; read from the journal where the batch has been run."""
    size, journal = work.options.batch_size, work.options.journal
    expect(journal, label, len(examples), size)
    if isinstance(journal, SharedJournal):
        yield from _shared_batches(journal, work, examples, label, bar)
        return
    sweep = Sweep(work.model, work.arms, work.options, bar.update)
    for number, start in enumerate(range(0, len(examples), size)):
        batch_examples = examples[start : start + size]
        key = f"{label}/{number}"
        saved = None if journal is None else journal.get(key)
        if saved is None:
            saved = work.run(sweep, batch_examples)
            if journal is not None:
                journal[key] = saved
        else:
            _check_shape(saved, key, len(work.arms), len(batch_examples))
            bar.update(len(batch_examples) * len(saved))
        yield saved


def _shared_batches(
    journal: SharedJournal, work: _Measured, examples: Sequence[Example], label: str, bar: Any
) -> Iterator[Rows]:
    """As `_batches`, where others compute what is missing."""
    check_shareable(work.model)
    size, portions = work.options.batch_size, chunks(len(examples), work.options.batch_size)
    keys = {portion: [f"{label}/{start // size}" for start in portion[::size]] for portion in portions}
    missing = [p for p in portions if any(journal.get(key) is None for key in keys[p])]
    blocks = layer_blocks([_first_layer(hooks) for hooks in work.arms], work.model.cfg.n_layers)
    pieces = {p: work.pieces(p) for p in missing}
    units = [
        work.unit(f"{label}/{piece.start}-{piece.stop}/{i}", examples[piece.start : piece.stop], block)
        for p in missing
        for piece in pieces[p]
        for i, block in enumerate(blocks)
    ]
    done = journal.compute(units, bar.update)
    for portion in portions:
        if portion in missing:
            rows = Rows([] for _ in work.arms)
            for block in itertools.chain.from_iterable([blocks] * len(pieces[portion])):
                values, counts = next(done)
                if work.options.tally is not None:
                    work.options.tally.add(counts)
                for i, arm_rows in zip(block, values.tolist(), strict=True):
                    rows[i] += arm_rows
            for key, start in zip(keys[portion], range(0, len(portion), size), strict=True):
                journal[key] = [arm_rows[start : start + size] for arm_rows in rows]
        else:
            bar.update(len(portion) * len(work.arms))
        for key, start in zip(keys[portion], portion[::size], strict=True):
            saved = journal.get(key)
            _check_shape(saved, key, len(work.arms), min(size, portion.stop - start))
            yield saved


def _check_shape(rows: Any, key: str, arms: int, examples: int) -> None:
    """Check that a journal holds a batch of so many arms and examples.

    Raises:
        ValueError: It does not; names the key.
    """
    listed = cast("list[list[Any]]", rows) if isinstance(rows, list) else []
    if len(listed) != arms or any(len(arm) != examples for arm in listed):
        raise ValueError(
            f"the journal has something else under {key!r}, and not {arms} arms of {examples} examples"
        )


def _first_layer(hooks: Sequence[Hook]) -> int | None:
    start = Arm(hooks).start
    return None if start is None else start[0]


def _score_answers(
    task: Task, examples: Sequence[Example], predictions: Sequence[Sequence[Prediction]]
) -> list[list[list[float]]]:
    """For each arm and example its score, then its statistics; equal answers are scored once."""
    known: dict[tuple[int, str], list[float]] = {}
    scores_by_arm: list[list[list[float]]] = []
    for answers in predictions:
        rows: list[list[float]] = []
        for i, (answer, example) in enumerate(zip(answers, examples, strict=True)):
            key = (i, repr(answer))
            if key not in known:
                known[key] = [task.score(answer, example), *task.statistics(answer, example).tolist()]
            rows.append(known[key])
        scores_by_arm.append(rows)
    return scores_by_arm
