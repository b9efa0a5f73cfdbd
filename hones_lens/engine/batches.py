"""Batches of prompts, prepared, with their images encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hones_lens.data import Example
from hones_lens.engine.memory import Budget
from hones_lens.model import HookedVLM, VLMInputs, takes_iterables
from hones_lens.tasks import Task, load_task

T = TypeVar("T")


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

    def part(self, numbers: Sequence[int]) -> Batch:
        """These of its examples, which have a row each."""
        if len(numbers) == len(self.examples):
            return self
        examples = [self.examples[i] for i in numbers]
        return Batch(examples, self.inputs[numbers], [1] * len(examples))

    def in_parts(self, budget: Budget, most: int, run: Callable[[Batch], T]) -> list[T]:
        """What comes of parts of its examples, which have a row each.

        Args:
            budget: Halves a part that runs out of memory, which then runs again.
            most: How many examples fit at once.
            run: Takes a part.
        """
        numbers = range(len(self.examples))
        return [
            out for _, out in budget.in_parts(numbers, lambda rest: most, lambda part: run(self.part(part)))
        ]


def as_task(task: str | Task) -> Task:
    """A task, or the task of that name."""
    return load_task(task) if isinstance(task, str) else task


@takes_iterables
def chance_of(task: Task, examples: Sequence[Example]) -> float:
    """The metric of guessing; 0 for a task of a class of its own that does not say."""
    return float(task.chance(examples)) if hasattr(task, "chance") else 0.0


@takes_iterables
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


@takes_iterables
def prompt_batches(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int
) -> Iterator[Batch]:
    """Every prompt of the examples, prepared; a ranking task's example is a batch of its own."""
    size = 1 if task.ranks else batch_size
    for start in range(0, len(examples), size):
        batch_examples = examples[start : start + size]
        prompts = [task.prompts(example) for example in batch_examples]
        rows = [len(example_prompts) for example_prompts in prompts]
        pictures = [example.image for example in batch_examples]  # opened once, whatever is asked of them
        images = [picture for picture, n in zip(pictures, rows, strict=True) for _ in range(n)]
        inputs = model.prepare(images, [p for example_prompts in prompts for p in example_prompts])
        yield Batch(batch_examples, _encode(model, inputs, shared=task.ranks), rows)


@takes_iterables
def answer_batches(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int, answers: bool = True
) -> Iterator[Batch]:
    """The prompt that the target follows, one row an example, with the right answer behind it."""
    for start in range(0, len(examples), batch_size):
        batch_examples = examples[start : start + batch_size]
        target_answers = [task.answer(example) for example in batch_examples] if answers else None
        prompts = [task.target_prompt(example) for example in batch_examples]
        inputs = model.prepare([example.image for example in batch_examples], prompts, target_answers)
        yield Batch(batch_examples, _encode(model, inputs), [1] * len(batch_examples))


def _encode(model: HookedVLM, inputs: VLMInputs, shared: bool = False) -> VLMInputs:
    """Run the vision tower once: for every image, or for the one that all rows share."""
    if not shared:
        return model.with_image_embeds(inputs)
    first = model.with_image_embeds(inputs[0]).image_embeds
    assert first is not None
    return replace(inputs, image_embeds=first.repeat(len(inputs), *(1,) * (first.ndim - 1)))
