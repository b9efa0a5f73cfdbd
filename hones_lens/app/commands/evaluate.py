"""`hones evaluate`: metrics of a model, with intervals."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import model_from, opening_from, write_result
from hones_lens.app.commands.options import (
    add_command,
    data_options,
    memory_option,
    model_options,
    run_options,
    worker_options,
)
from hones_lens.app.commands.recorded import recorded_options


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "evaluate", execute, "metrics of a model, with intervals")
    model_options(command)
    data_options(command, several=True)
    text = "run folder, so that a stopped evaluation goes on (default: none)"
    memory_option(command)
    worker_options(command)
    run_options(command, text)
    command.add_argument("--split", default="test", help="which examples (default: test)")
    command.add_argument(
        "--limit", type=values.positive, help="how many examples a task (default: 1000; retrieval 100)"
    )


def execute(args: argparse.Namespace) -> int:
    """A model's metrics, task by task."""
    from hones_lens.app.runs import evaluate as evaluation
    from hones_lens.app.runs.data_choice import FILE_OPTIONS
    from hones_lens.data import tasks_of

    model, results = model_from(args), []
    names = ("dataset", "split", "limit", "seed", *FILE_OPTIONS)
    chosen = {name: getattr(args, name) for name in names}
    tasks = tasks_of(args.dataset, args.data_file) if args.task == "all" else (args.task,)
    data = {task: evaluation.TaskExamples.of(model, task, **chosen) for task in tasks}
    run = None
    if args.out:
        settings = {name: chosen[name] for name in ("dataset", "split", "seed")}
        settings |= recorded_options(args)
        run = evaluation.start_evaluation(
            model, args.out, data, opening=opening_from(args, model), **settings
        )
    for result in evaluation.evaluations(model, data, run):
        results.append(result)
        print(result)
    if run is not None:
        print(f"\nRun: {run.folder}")
    write_result(args, [result.to_dict() for result in results])
    return 0
