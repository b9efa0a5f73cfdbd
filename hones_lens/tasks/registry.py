"""Tasks: prompt, target and metric. `load_task` resolves a name; one more task is one more file."""

from __future__ import annotations

import importlib

from hones_lens.tasks.base import Task

TASKS = {
    "vqa": "hones_lens.tasks.vqa",
    "ocr": "hones_lens.tasks.ocr",
    "caption": "hones_lens.tasks.caption",
    "retrieval": "hones_lens.tasks.retrieval",
}


def load_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: No such task; the message lists the valid names.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; valid: {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name]).TASK


__all__ = ["TASKS", "Task", "load_task"]
