"""`hones demo`: heads, neurons, masking and a report, on a shipped model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hones_lens.app.commands.arguments import (
    data_from,
    find_heads,
    model_from,
    planned,
    start_run,
    write_result,
)
from hones_lens.app.commands.options import add_stage_command, controls_option

_MASKING = ("masking", "others")


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "heads, neurons, masking and a report, on a shipped model"
    controls_option(add_stage_command(commands, "demo", execute, text))


def execute(args: argparse.Namespace) -> int:
    """Heads, neurons and masking, and a report of them."""
    from rich.console import Console

    from hones_lens.app.report.report import write_report
    from hones_lens.app.report.run_folder import read_view
    from hones_lens.app.report.terminal import print_summary
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.app.runs.views import save_report_views

    if planned(args, ("heads", "held out", "neurons", "masking", "others")):
        return 0
    model = model_from(args)
    data = data_from(args, model)
    pipeline.require_intervals(args.task, data)
    run = start_run(args, model, data, ("heads", "neurons", "masking", "others"))
    heads = find_heads(args, model, run, data)
    pipeline.remeasure_on_held_out(model, run, args.task, data, heads)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio, args.layers)
    pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    pipeline.mask_others(model, run, args.task, data, neurons.ratio, layers=args.layers)
    save_report_views(model, run, args.task, data, heads, neurons)
    view = read_view(run.folder)
    page = write_report(run.path("report.html"), [view])
    print_summary(Console(), view)
    print(f"\nReport: {page.resolve()}")
    results = {name: json.loads(run.path(f"{name}.json").read_text(encoding="utf-8")) for name in _MASKING}
    found = {"heads": heads.to_dict(), "neurons": neurons.to_dict()} if args.json else {}
    write_result(args, {"report": str(page), **found, **results})
    return 0
