"""The prompt that a task makes of a text that the user writes, such as a question of their own."""

from __future__ import annotations

from PIL import Image

from hones_lens.data import Example
from hones_lens.tasks.base import Task

_PLACEHOLDER = "owntext"  # found again in the prompt: what stands around it is the task's form


class _NoPicture:
    """Image source of an example that is made for its prompt alone."""

    def load(self) -> Image.Image:
        raise ValueError("this example is made for its prompt and has no picture")


def takes_text(task: Task) -> bool:
    """Whether the task's prompt has a place for a text of the user."""
    return _PLACEHOLDER in _prompt_of(task, _PLACEHOLDER)


def own_prompt(task: Task, text: str | None) -> str:
    """The prompt of a task around the user's text: a question of VQA, or a candidate caption of retrieval.

    A text that has the task's form already is returned as it is.

    Args:
        task: The task.
        text: The user's text; None for tasks that ask the same of every picture (OCR, captions).

    Raises:
        ValueError: No text for a task that needs one, or a text for a task whose prompt has no place for it.
    """
    form = _prompt_of(task, _PLACEHOLDER)
    before, placeholder, after = form.partition(_PLACEHOLDER)
    if not placeholder:
        if text is not None and text.strip() != form.strip():
            raise ValueError(f"the prompt of {task.name!r} is always {form!r} and has no place for {text!r}")
        return form
    if text is None or not text.strip():
        raise ValueError(
            f"the prompt of {task.name!r} needs a text of your own: {form.replace(placeholder, '…')!r}"
        )
    has_form = bool(before or after) and text.startswith(before) and text.endswith(after)
    return text if has_form else _prompt_of(task, text)


def _prompt_of(task: Task, text: str) -> str:
    example = Example(
        "your own text",
        _NoPicture(),
        question=text,
        answers=(text,),
        text=text,
        references=(text,),
        candidates=(text,),
        positive=0,
    )
    return task.target_prompt(example)
