"""`hones evaluate`: metrics of a model, with intervals."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands.arguments import model_from, write_result
from hones_lens.app.commands.options import add_command, data_options, model_options


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "evaluate", execute, "metrics of a model, with intervals")
    model_options(command)
    data_options(command, several=True)
    command.add_argument("--split", default="test", help="which examples (default: test)")
    command.add_argument("--limit", type=int, help="how many examples a task (default: 1000; retrieval 100)")


def execute(args: argparse.Namespace) -> int:
    """A model's metrics, task by task."""
    from hones_lens.app.runs.data_choice import FILE_OPTIONS
    from hones_lens.data import load_examples, reads_files, tasks_of
    from hones_lens.engine import evaluate
    from hones_lens.tasks import load_task, task_of_examples

    model, results = model_from(args), []
    tasks = tasks_of(args.dataset, args.data_file) if args.task == "all" else (args.task,)
    for task in map(load_task, tasks):
        default = 100 if task.ranks else 1000
        limit = default if args.limit is None else args.limit
        files = {name: getattr(args, name) for name in FILE_OPTIONS}
        kind = task_of_examples(task, args.dataset, args.data_file)
        examples = load_examples(args.dataset, kind, args.split, limit, args.seed, **files)
        on_error = args.on_error if reads_files(args.dataset) else None
        results.append(evaluate(model, task, examples, on_error=on_error))
        print(results[-1])
    write_result(args, [evaluation.to_dict() for evaluation in results])
    return 0
