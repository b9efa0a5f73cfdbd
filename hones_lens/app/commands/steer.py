"""`hones steer`: scales learned for a run's neurons, beside all controls (HONES eq. H5)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import data_from, model_from, opening_from, write_result
from hones_lens.app.commands.checks import run_folder
from hones_lens.app.commands.options import (
    add_command,
    data_options,
    model_options,
    split_options,
    worker_options,
)
from hones_lens.app.commands.recorded import recorded_options

if TYPE_CHECKING:
    from hones_lens.hones import NeuronScores
    from hones_lens.model import HookedVLM


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(
        commands, "steer", execute, "learn scales for a run's neurons, beside all controls (H5)"
    )
    model_options(command)
    data_options(command)
    split_options(command, ("dev",))
    worker_options(command)
    add = command.add_argument
    add("--neurons", metavar="FILE", help="neurons.json or HONES's file (default: that of the run folder)")
    add("--k", type=values.positive, help="how many of them (default: all that are selected)")
    add("--methods", type=values.several(str), metavar="A,B", help="default: all six")
    add(
        "--lr",
        type=values.several(values.above_zero),
        default=(5e-4, 5e-3, 5e-2),
        help="among these (default: 5e-4,5e-3,5e-2)",
    )
    add("--epochs", type=values.several(values.repeats), default=(2, 8), help="among these (default: 2,8)")
    add(
        "--factors",
        type=values.several(values.not_negative),
        default=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        help="of the grid search",
    )
    add("--draws", type=values.repeats, default=5, help="random sets (default: 5)")
    add(
        "--patience",
        type=values.positive,
        help="stop after so many epochs without a better dev metric (default: never)",
    )
    add("--accumulate", type=values.positive, help="examples a step (default: HONES's)")
    add("--kl-weight", type=values.not_negative, help="default: HONES's")
    add("--l2-weight", type=values.not_negative, help="default: HONES's")
    add("--clamp", type=values.above_zero, help="default: HONES's")
    add("--negatives", type=values.positive, help="wrong candidates an example of retrieval")


def execute(args: argparse.Namespace) -> int:
    """Scales for a run's neurons, learned on dev, beside all controls, on the held-out split (H5)."""
    from hones_lens.app.report.run_settings import read_any
    from hones_lens.app.runs import steering
    from hones_lens.app.runs.folder import save_left_out
    from hones_lens.hones import SteeringConfig

    model = model_from(args)
    data = data_from(args, model)
    neurons = _neurons_to_steer(args, model)
    names = ("accumulate", "kl_weight", "l2_weight", "clamp", "negatives")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {
        "k": args.k,
        "methods": steering.steering_methods(args.methods),
        "config": SteeringConfig(seed=args.seed, **given),
        "learning_rates": args.lr,
        "epochs": args.epochs,
        "factors": args.factors,
        "draws": args.draws,
    }
    if args.patience is not None:
        options["patience"] = args.patience
    folder = run_folder(args) / "steering" / data.label
    settings = {**recorded_options(args), "methods": options["methods"]}
    opening = opening_from(args, model)
    run = steering.start_steering(model, args.task, data, folder, neurons, settings, opening)
    save_left_out(run, data, args.task)
    table = steering.steer_neurons(model, run, args.task, data, neurons, options)
    print(table, f"Run: {run.folder}", sep="\n\n")
    write_result(args, read_any(run.path("steering.json")))
    return 0


def _neurons_to_steer(args: argparse.Namespace, model: HookedVLM) -> NeuronScores:
    """Those of `--neurons` (our file or HONES's), or those of the run folder."""
    from hones_lens.app.report.run_files import verified
    from hones_lens.app.report.run_settings import read_any
    from hones_lens.hones import NeuronScores, load_neurons

    file = Path(args.neurons) if args.neurons else run_folder(args) / "neurons.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: `hones localize` with the same --out makes it, or give --neurons FILE"
        )
    data = read_any(verified(file))
    if not isinstance(data, dict) or data.get("kind") != "neurons":
        return load_neurons(file, args.task, model)
    neurons = NeuronScores.load(file)
    found, wanted = (neurons.model_name, neurons.task), (model.cfg.model_name, args.task)
    if found != wanted:
        raise ValueError(f"{file} has neurons of {' and '.join(found)}, not of {' and '.join(wanted)}")
    return neurons
