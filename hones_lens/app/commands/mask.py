"""`hones mask`: a run's neurons masked, beside matched random sets (HONES eq. H4)."""

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
from hones_lens.app.commands.options import add_stage_command, controls_option


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "mask a run's neurons beside matched random sets (H4)"
    controls_option(add_stage_command(commands, "mask", execute, text))


def execute(args: argparse.Namespace) -> int:
    """Heads and neurons where they are not there yet, then masking (H4)."""
    from hones_lens.app.report.run_settings import read_any
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.app.runs.views import save_report_views

    if planned(args, ("heads", "held out", "neurons", "masking")):
        return 0
    model = model_from(args)
    data = data_from(args, model)
    pipeline.require_intervals(args.task, data)
    run = start_run(args, model, data, ("heads", "neurons", "masking"))
    heads = find_heads(args, model, run, data)
    held_out = pipeline.remeasure_on_held_out(model, run, args.task, data, heads)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio, args.layers)
    results = pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    save_report_views(model, run, args.task, data, heads, neurons)
    print(*([] if held_out is None else [held_out]), *results, f"Run: {run.folder}", sep="\n\n")
    write_result(args, read_any(run.path("masking.json")))
    return 0
