"""The tasks by name. A new task is a new module in `TASKS`."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from hones_lens.model import did_you_mean

if TYPE_CHECKING:
    from hones_lens.tasks.base import Task

# Module and object by task name.
TASKS = {
    "vqa": "hones_lens.tasks.vqa:TASK",
    "ocr": "hones_lens.tasks.ocr:TASK",
    "caption": "hones_lens.tasks.caption:TASK",
    "retrieval": "hones_lens.tasks.retrieval:TASK",
    "vqa-anls": "hones_lens.tasks.vqa_anls:TASK",
    "yes-no": "hones_lens.tasks.yes_no:TASK",
}


def task_of_examples(task: Task, dataset: str | Path, data_file: str | Path | None = None) -> str:
    """The task under whose name a data set has a task's examples: its own, else that of `examples_of`.

    Raises:
        FileNotFoundError, ValueError: As `load_examples`.
    """
    from hones_lens.data import tasks_of

    if task.examples_of and task.name not in tasks_of(dataset, data_file):
        return task.examples_of
    return task.name


@cache
def _registered() -> dict[str, str]:
    """The tasks above, then the entry points `hones_lens.tasks` of installed distributions."""
    return TASKS | {entry.name: entry.value for entry in entry_points(group="hones_lens.tasks")} | TASKS


def task_names() -> tuple[str, ...]:
    """The names that `load_task` takes."""
    return tuple(_registered())


def load_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: No such task, and the message lists the valid names; or an entry point whose task has
            another name.
    """
    tasks = TASKS if name in TASKS else _registered()
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}; valid: {', '.join(tasks)}{did_you_mean(name, tasks)}")
    task = pkgutil.resolve_name(tasks[name])
    if task.name != name:
        raise ValueError(f"the task registered as {name!r}, {tasks[name]}, is named {task.name!r}")
    return task
