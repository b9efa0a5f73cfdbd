"""`hones localize`: critical heads, and the neurons they feed (HONES eqs. H1 to H3)."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands.arguments import (
    data_from,
    find_heads,
    model_from,
    planned,
    start_run,
    write_result,
)
from hones_lens.app.commands.options import add_stage_command


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "critical heads, and the neurons they feed (H1 to H3)"
    command = add_stage_command(commands, "localize", execute, text)
    command.add_argument("--stage", choices=["heads", "neurons", "all"], default="all", help="default: all")


def execute(args: argparse.Namespace) -> int:
    """Critical heads and the neurons that they feed; `--stage` for one of the two."""
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.app.runs.views import save_report_views

    all_stages = ("heads", "held out", "neurons")
    stages = {"heads": all_stages[:2], "neurons": all_stages[2:]}.get(args.stage, all_stages)
    if planned(args, stages):
        return 0
    model = model_from(args)
    data = data_from(args, model)
    run = start_run(args, model, data, ("heads",) if args.stage == "heads" else ("heads", "neurons"))
    if args.stage == "neurons" and not run.path("heads.json").exists():
        raise ValueError(f"{run.folder} has no heads.json yet: --stage heads makes it, --stage all does both")
    heads = find_heads(args, model, run, data)
    results: dict[str, Any] = {"heads": [list(c) for c in heads.top()]}
    print(heads, end="\n\n")
    held_out = pipeline.remeasure_on_held_out(model, run, args.task, data, heads)
    if held_out is not None:
        results["held_out"] = held_out.to_dataframe().to_dict("records")
        print(held_out, end="\n\n")
    if args.stage != "heads":
        neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio, args.layers)
        results["neurons"] = [list(c) for c in neurons.top()]
        print(neurons, end="\n\n")
        save_report_views(model, run, args.task, data, heads, neurons)
    print(f"Run: {run.folder}")
    write_result(args, results)
    return 0
