"""`hones overlap`: neurons that the tasks of several runs share (HONES eq. H6)."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import data_from, model_from, opening_from, write_result
from hones_lens.app.commands.options import (
    add_command,
    file_options,
    model_options,
    run_options,
    worker_options,
)
from hones_lens.app.commands.recorded import recorded_options


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "overlap", execute, "neurons that the tasks of several runs share (H6)")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one model, one a task")
    command.add_argument(
        "--mask", action="store_true", help="mask each group, measure every task, and read the logit lens"
    )
    text = "run folder (default: runs/MODEL-overlap[-masked])"
    run_options(command, text)
    command.add_argument("--model", help="where the model is, if not where its name says")
    command.add_argument("--limit", type=values.positive, help="how many examples to measure on")
    command.add_argument("--split", default="test", help="where results are measured (default: test)")
    model_options(command, named=False)
    file_options(command)
    worker_options(command)
    unused_options = ("min_pixels", "max_pixels", "discovery_limit", "dev_limit")
    command.set_defaults(discovery_split="discovery", dev_split="dev", **dict.fromkeys(unused_options))


def execute(args: argparse.Namespace) -> int:
    """Which neurons the runs' tasks share (H6), and with `--mask` what they do to every task."""
    from dataclasses import asdict

    from hones_lens.app.runs import overlap as runs

    name, neurons = runs.neurons_of_runs(args.runs)
    out, result = args.out or f"runs/{name}-overlap{'-masked' if args.mask else ''}", {}
    if not args.mask:
        run = runs.start_overlap(out, name, neurons, opening=opening_from(args), **recorded_options(args))
        overlap = runs.find_shared_neurons(run, neurons)
        print(overlap)
    else:
        args.model = args.model or name
        model = model_from(args)
        data = data_from(args, model)
        if model.cfg.model_name != name:
            raise ValueError(f"the runs are of {name}, not of {model.cfg.model_name}")
        examples = {task: data.test(task) for task in neurons}
        run = runs.start_overlap(
            out, name, neurons, model, examples, opening=opening_from(args, model), **recorded_options(args)
        )
        overlap = runs.find_shared_neurons(run, neurons)
        print(overlap)
        groups = runs.mask_shared_groups(model, run, examples, overlap)
        print(f"\n{groups}")
        result["groups"] = groups.to_dataframe().to_dict("records")
        result["lenses"] = {}
        for task, scores in neurons.items():
            lens = runs.find_lens_delta(model, run, task, examples[task], scores, f"lens-{task}")
            print(f"\n{lens}")
            result["lenses"][task] = lens.to_dataframe().to_dict("records")
    print(f"\nRun: {run.folder}\nFigures: hones report {run.folder} --out {run.folder / 'report.html'}")
    write_result(args, {"overlap": asdict(overlap), **result})
    return 0
