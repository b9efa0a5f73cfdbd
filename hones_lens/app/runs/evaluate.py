"""Metrics of the unedited model, in a run folder or without one: the implementation of `hones evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hones_lens.app.runs.data_choice import say_if_fewer
from hones_lens.app.runs.folder import Opening, Run
from hones_lens.app.runs.identity import examples_hash, model_identity
from hones_lens.data import Example, load_examples, reads_files
from hones_lens.engine import Evaluation, Fault, evaluate, usable_examples
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task, load_task, task_of_examples

_SIZES = {False: 1000, True: 100}  # examples a task; of one that ranks, each is fifty prompts


@dataclass(frozen=True)
class TaskExamples:
    """The examples of a task that can be used, and those that were left out."""

    task: Task
    examples: list[Example]
    left_out: tuple[Fault, ...]

    @classmethod
    def of(
        cls,
        model: HookedVLM,
        task: str,
        dataset: str,
        split: str,
        limit: int | None,
        seed: int,
        **files: Any,
    ) -> TaskExamples:
        """Load a task's examples; those from files are checked against the model.

        Args:
            model: The model.
            task: Name of the task.
            dataset, split, limit, seed, files: As for `load_examples`; `limit` has a default by the task.

        Raises:
            ValueError: With `on_error="raise"`, an example that can't be used.
        """
        known, left_out = load_task(task), ()
        kind = task_of_examples(known, dataset, files.get("data_file"))
        size = _SIZES[known.ranks] if limit is None else limit
        examples = load_examples(dataset, kind, split, size, seed, **files)
        say_if_fewer(len(examples), limit, f"{task} examples of {split!r} in {dataset}")
        if reads_files(dataset):
            examples, left_out = usable_examples(model, known, examples, files["on_error"])
        return cls(known, examples, left_out)


def start_evaluation(
    model: HookedVLM,
    out: str | Path,
    data: Mapping[str, TaskExamples],
    *,
    opening: Opening | None = None,
    **settings: Any,
) -> Run:
    """Open a run folder for the evaluation of some tasks.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    run = Run(
        out,
        {
            "model": model.cfg.model_name,
            **model_identity(model),
            "device": model.cfg.device.type,
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "tasks": list(data),
            **settings,
            "examples": {name: examples_hash(chosen.task, chosen.examples) for name, chosen in data.items()},
        },
        opening=opening,
    )
    return run


def evaluations(
    model: HookedVLM, data: Mapping[str, TaskExamples], run: Run | None = None
) -> Iterator[Evaluation]:
    """The metrics of each task: loaded from the run folder, or measured and saved there."""

    def measured(chosen: TaskExamples, journal: Any = None) -> Evaluation:
        found = evaluate(model, chosen.task, chosen.examples, journal=journal)
        return replace(found, left_out=chosen.left_out)

    for name, chosen in data.items():
        if run is None:
            yield measured(chosen)
            continue
        stage = f"evaluate-{name}"
        journal = run.journal(stage)

        def compute(chosen: TaskExamples = chosen, journal: Any = journal) -> Evaluation:
            return measured(chosen, journal)

        yield run.stage(stage, Evaluation, compute)
