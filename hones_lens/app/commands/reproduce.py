"""`hones reproduce`: all stages on all tasks, and tables as in the paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import data_from, model_from, opening_from
from hones_lens.app.commands.checks import check_against_model
from hones_lens.app.commands.options import (
    add_command,
    controls_option,
    file_options,
    limit_options,
    model_options,
    split_options,
    worker_options,
)


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(
        commands, "reproduce", execute, "all stages on all tasks, and tables as in the paper"
    )
    model_options(command)
    file_options(command)
    split_options(command)
    limit_options(command)
    worker_options(command)
    command.add_argument(
        "--tasks", type=values.several(str), metavar="A,B", help="default: all that the data set has"
    )
    command.add_argument(
        "--ratios", type=values.several(values.share), default=(0.01, 0.05), help="shares of neurons to mask"
    )
    controls_option(command)


def execute(args: argparse.Namespace) -> int:
    """All stages on several tasks, and their tables."""
    from hones_lens.app.runs.reproduce import reproduce
    from hones_lens.data import tasks_of

    model = model_from(args)
    check_against_model(args, model)
    data = data_from(args, model)
    out = Path(args.out or f"runs/reproduce-{Path(args.model).name}")
    shifted = "shapes-shifted" if args.dataset == "shapes" else None
    tasks = args.tasks or tasks_of(args.dataset, args.data_file)
    result = reproduce(
        model,
        out,
        data,
        tasks=tasks,
        shifted=shifted,
        ratios=args.ratios,
        n_controls=args.controls,
        opening=opening_from(args, model),
        heads=args.heads,
        layers=args.layers,
    )
    print(result)
    runs = " ".join(str(out / name) for name in ("across", *tasks))
    print(f"Tables: {out / 'tables.md'}\nReport: hones report {runs} --out {out / 'report.html'}")
    return 0
