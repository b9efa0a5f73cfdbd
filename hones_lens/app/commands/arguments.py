"""Objects that several commands build from their arguments: model, examples, run folder, heads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hones_lens.app.commands.checks import check_against_model, option, run_folder
from hones_lens.app.commands.recorded import recorded_options

if TYPE_CHECKING:
    from hones_lens.app.runs.data_choice import DataChoice
    from hones_lens.app.runs.folder import Journals, Opening, Run
    from hones_lens.app.runs.machines import Machines
    from hones_lens.hones import HeadScores
    from hones_lens.model import HookedVLM


def model_from(args: argparse.Namespace) -> HookedVLM:
    """The model that `--model` names, on `--device` in `--dtype`; says so if it does not decode plainly."""
    from hones_lens.model import Decoding, load_model

    model = load_model(args.model, **_model_options(args))
    if str(model.decoding) != str(Decoding()):
        print(f"answers are decoded as the checkpoint's generation config says: {model.decoding}")
    return model


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `load_model`."""
    import torch

    pixels = {name: getattr(args, name) for name in ("min_pixels", "max_pixels")}
    given: dict[str, Any] = {name: value for name, value in pixels.items() if value is not None}
    given |= {"device": args.device, "dtype": getattr(torch, args.dtype) if args.dtype else None}
    return given | {"plain_greedy": args.plain_greedy, "device_map": args.device_map}


def data_from(args: argparse.Namespace, model: HookedVLM | None) -> DataChoice:
    """The examples that the options select; with a model, checked against it before anything is computed."""
    from hones_lens.app.runs.data_choice import FILE_OPTIONS, DataChoice

    return DataChoice(
        dataset=args.dataset,
        seed=args.seed,
        discovery_split=args.discovery_split,
        dev_split=args.dev_split,
        held_out=args.split,
        n_discovery=args.limit if args.discovery_limit is None else args.discovery_limit,
        n_dev=args.limit if args.dev_limit is None else args.dev_limit,
        n_held_out=args.limit,
        model=model,
        **{name: getattr(args, name) for name in FILE_OPTIONS},
    )


def planned(args: argparse.Namespace, stages: Sequence[str]) -> bool:
    """Print the plan of these stages if `--plan` is given; returns whether it is."""
    if not args.plan:
        return False
    from hones_lens.app.runs.plan import PlanKeywords, plan

    model, machines = planned_for(args)
    asked: Any = {name: vars(args)[name] for name in PlanKeywords.__annotations__ if name in args}
    write_plan(args, plan(model, args.task, data_from(args, None), stages, machines, **asked))
    return True


def planned_for(args: argparse.Namespace) -> tuple[HookedVLM, Machines]:
    """The model's sizes, against which the options are checked, and the machines that a plan is for.

    No weights are loaded, but those of a shipped model, to time it, where no GPU or throughput is named.
    """
    import torch

    from hones_lens.app.runs.machines import GPUS, Machines
    from hones_lens.model import find_settings, model_without_weights, require_choice

    settings = find_settings(args.model)
    if args.throughput is not None:
        name = f"machines of {args.throughput:g} TFLOP/s each"
        machines = Machines(name, args.throughput * 1e12, args.gpus)
    elif args.gpu is None and settings is not None and settings.checkpoint is not None:
        machines = Machines.this_one(model_from(args))
    else:
        with option("--gpu"):
            require_choice("gpu", args.gpu or "h100", tuple(GPUS))
        machines = Machines.of_gpus(args.gpu or "h100", args.gpus, args.mfu)
    model = model_without_weights(args.model, getattr(torch, args.dtype) if args.dtype else None)
    check_against_model(args, model)
    return model, machines


def write_plan(args: argparse.Namespace, lines: Sequence[str]) -> None:
    """Print the lines of a plan; with `--json`, also into its file."""
    print(*lines, sep="\n")
    write_result(args, {"plan": list(lines)})


def opening_from(args: argparse.Namespace, model: HookedVLM | None = None) -> Opening:
    """How the run folder is opened; with a model, by workers where `--workers` is given."""
    from hones_lens.app.runs.folder import Opening

    journals = None if model is None else _journals_of_workers(args, model)
    return Opening(args.wait, args.allow_code_change, journals)


def _journals_of_workers(args: argparse.Namespace, model: HookedVLM) -> Journals:
    """Makes journals that `--workers` fill; None without the option."""
    if args.workers is None:
        return None
    from hones_lens.app.workers.hiring import Hiring

    options = _model_options(args)
    if args.device_map is None:
        options["device"] = model.cfg.device.type
    with option("--engine"):
        budget = getattr(args, "memory_budget", None)
        engine, threads = args.engine or "local", args.worker_threads or 1
        hiring = Hiring(args.workers, engine, threads, budget, args.slurm)
        return hiring.journals(model, args.model, options)


def start_run(args: argparse.Namespace, model: HookedVLM, data: DataChoice, stages: Sequence[str]) -> Run:
    """Open the run folder of localization and masking, for some of its stages."""
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.app.runs.folder import save_left_out

    check_against_model(args, model)
    settings = {"opening": opening_from(args, model), **recorded_options(args)}
    run = pipeline.start_run(model, args.task, data, run_folder(args), stages=stages, **settings)
    save_left_out(run, data, args.task)
    return run


def find_heads(args: argparse.Namespace, model: HookedVLM, run: Run, data: DataChoice) -> HeadScores:
    """The critical heads of the run, measured with the given options."""
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.results import Racing

    racing = None if args.race is None else Racing(epsilon=args.race)
    options = {"positions": args.positions, "prefilter": args.prefilter, "racing": racing}
    options |= {"memory_budget": args.memory_budget, "heads": args.heads, "layers": args.layers}
    return pipeline.find_heads(model, run, args.task, data, args.top_k, **options)


def write_result(args: argparse.Namespace, data: Any) -> None:
    """Write a result to the file of `--json`, if the option is given."""
    if args.json:
        from hones_lens.results import write_json

        write_json(args.json, data)
