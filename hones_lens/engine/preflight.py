"""Faults in examples, found before anything is computed: pictures, prompts, lengths against the context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from tqdm.auto import tqdm

from hones_lens.data import Example, check_on_error
from hones_lens.engine.batches import as_task
from hones_lens.engine.full_passes import MAX_NEW_TOKENS
from hones_lens.model import HookedVLM, open_image, prompt_lengths, takes_iterables
from hones_lens.tasks import Task

_SHOWN = 10  # faults in a message


class Fault(NamedTuple):
    """An example that can't be used, and the reason; it names the file of a picture."""

    example: str
    reason: str

    def __str__(self) -> str:
        return f"{self.example}: {self.reason}"


@takes_iterables
def find_faults(
    model: HookedVLM, task: str | Task, examples: Sequence[Example], *, progress: bool = True
) -> list[Fault]:
    """The examples that a model can't be asked.

    Every picture is decoded, every prompt is tokenized with its picture's image tokens, and a prompt, with
    its answer or the tokens that are generated after it, must fit into the model's context. One
    picture is in memory at a time.

    Args:
        model: The model; it is not run.
        task: A task or its name.
        examples: The examples.
        progress: Show a progress bar.
    """
    chosen, faults = as_task(task), list[Fault]()
    for example in tqdm(examples, desc=f"check · {chosen.name}", disable=not progress, unit="example"):
        try:
            _check(model, chosen, example)
        except (ValueError, OSError) as error:
            faults.append(Fault(example.id, " ".join(str(error).split())))
    return faults


@takes_iterables
def usable_examples(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    on_error: str = "raise",
    *,
    progress: bool = True,
) -> tuple[list[Example], tuple[Fault, ...]]:
    """The examples that `find_faults` finds nothing wrong with, and what it finds with the others.

    Args:
        model, task, examples, progress: As for `find_faults`.
        on_error: `raise`, or `skip`: leave such examples out, and warn.

    Raises:
        ValueError: A fault (counts them and names the first ten), or with `skip` no example without one.
    """
    check_on_error(on_error)
    examples = list(examples)
    faults = find_faults(model, task, examples, progress=progress)
    if not faults:
        return examples, ()
    what = f"{len(faults):,} of {len(examples):,} {as_task(task).name} examples"
    listed = "; ".join(map(str, faults[:_SHOWN])) + ("; ..." if len(faults) > _SHOWN else "")
    if on_error == "raise":
        raise ValueError(f"{what} can't be used: {listed} (on_error='skip' leaves such examples out)")
    if len(faults) == len(examples):
        raise ValueError(f"{what} can't be used, so that none is left: {listed}")
    warnings.warn(f"{what} are left out: {listed}", stacklevel=3)
    faulty = {fault.example for fault in faults}
    return [example for example in examples if example.id not in faulty], tuple(faults)


def _check(model: HookedVLM, task: Task, example: Example) -> None:
    """Raise if the example can't be asked."""
    image = open_image(example.image_source.load(), f"the image of example {example.id}")
    target = task.target_prompt(example)
    asked = list(dict.fromkeys([*task.prompts(example), target]))
    lengths = dict(zip(asked, prompt_lengths(model, image, asked), strict=True))
    answer = len(model.continuation(target, task.answer(example)))
    new = 0 if task.ranks else MAX_NEW_TOKENS
    room = model.cfg.n_ctx
    for prompt, length in lengths.items():
        added = max(new, answer) if prompt == target else new
        if length + added > room:
            raise ValueError(
                f"its prompt {prompt[:40]!r} is too long: {length} tokens with its picture's, and {added} "
                f"after it, for a context of {room}"
            )
