"""The program `hones`. Nothing heavy is imported before a command really runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_lens.attribution.heads import HeadScores
    from hones_lens.hooked_vlm import HookedVLM
    from hones_lens.pipeline import DataChoice
    from hones_lens.runs import Run

TASKS = ("vqa", "ocr", "caption", "retrieval")
_TINY = {"llava": "hones_lens.tools.tiny_llava", "qwen2.5-vl": "hones_lens.tools.tiny_qwen"}
_RESULTS = ("heads", "neurons", "masking", "others")
_EXAMPLES = """examples:
  hones demo                                   heads, neurons and masking on the shipped model
  hones demo --task ocr --out runs/ocr
  hones localize --model tiny-llava --task vqa --out runs/vqa
  hones evaluate --model tiny-llava --limit 500
  hones check path/to/llava-1.5-7b-hf          is it computed as Hugging Face computes it?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hones`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "config", None):
            _take_config(args)
            args = parser.parse_args(argv)
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("hones: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError, ImportError) as error:
        if args.debug:
            raise
        print(f"hones: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="hones",
        description="Find, read and steer circuits in vision–language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _stage(commands, "demo", _demo, "heads, neurons, masking and a report, on a shipped model")
    _stage(commands, "localize", _localize, "critical heads, and the neurons that they feed (H1 to H3)")
    _stage(commands, "mask", _mask, "mask a run's neurons beside matched random sets (H4)")
    evaluate = _add(commands, "evaluate", _evaluate, "metrics of a model, with intervals")
    _model_options(evaluate)
    _data_options(evaluate)
    evaluate.add_argument("--split", default="test", help="which examples (default: test)")
    evaluate.add_argument("--limit", type=int, help="how many examples a task (default: 1000; retrieval 100)")
    check = _add(commands, "check", _check, "prove that a checkpoint is computed as Hugging Face computes it")
    check.add_argument("model_name", metavar="MODEL", help="name, folder or Hub id")
    _model_options(check, named=False)
    _add(commands, "models", _models, "models that are known by name")
    report = _add(commands, "report", _report, "one HTML page of one or more run folders")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--out", required=True, metavar="FILE", help="the page to write")
    train = _add(commands, "train-tiny", _train, "train a shipped model anew on the shapes world")
    train.add_argument("family", choices=list(_TINY))
    train.add_argument("--out", required=True, help="folder for checkpoints, log and the model")
    train.add_argument("--steps", type=int, help="steps of the first part (default: as the shipped model)")
    train.add_argument("--naming-steps", type=int, help="steps of the second part")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, help="CPU threads")
    return parser


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, parser=command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name not in ("report", "train-tiny"):
        command.add_argument("--json", metavar="FILE", help="also write the result here")
    return command


def _stage(commands: Any, name: str, run: Any, text: str) -> None:
    command = _add(commands, name, run, text)
    _model_options(command)
    _data_options(command)
    command.add_argument("--limit", type=int, help="how many examples of each split")
    command.add_argument("--discovery-limit", type=int, help="how many discovery examples, if not --limit")
    command.add_argument("--split", default="test", help="where neurons are masked (default: test)")
    command.add_argument("--top-k", type=int, help="critical heads (default: model_configs/)")
    command.add_argument("--ratio", type=float, help="share of neurons (default: model_configs/)")
    command.add_argument("--controls", type=int, default=20, help="matched random sets (default: 20)")
    command.add_argument(
        "--positions",
        choices=["all", "last"],
        default="all",
        help="last: replace heads only from the end of the prompt on (default: all)",
    )
    command.add_argument(
        "--prefilter", type=int, metavar="M", help="measure only the M heads that attribution patching likes"
    )
    command.add_argument(
        "--race", type=float, metavar="EPSILON", help="race heads: right up to EPSILON with probability 0.95"
    )
    command.add_argument("--memory-budget", type=float, metavar="GB", help="default: half of what is free")
    command.add_argument("--out", metavar="DIR", help="run folder (default: runs/MODEL-TASK)")
    command.add_argument("--plan", action="store_true", help="say what would be done and stop")


def _model_options(command: argparse.ArgumentParser, named: bool = True) -> None:
    if named:
        command.add_argument(
            "--model", default="tiny-llava", help="name, folder or Hub id (default: tiny-llava)"
        )
        command.add_argument("--config", metavar="YAML", help="options from a file; those given here win")
    command.add_argument("--device", help="default: the GPU if there is one")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])


def _data_options(command: argparse.ArgumentParser) -> None:
    several = command.prog.endswith(" evaluate")
    default = "all" if several else "vqa"
    choices = (*TASKS, "all") if several else TASKS
    command.add_argument("--task", choices=choices, default=default, help=f"default: {default}")
    command.add_argument("--dataset", default="shapes", help="default: the shapes world")
    command.add_argument("--data-file", help="annotations, for data sets read from files")
    command.add_argument("--image-dir", help="images, for data sets read from files")
    command.add_argument("--seed", type=int, default=3407)


def _take_config(args: argparse.Namespace) -> None:
    """Make the file's values the defaults of the command, so that options given here win."""
    import yaml

    data = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
    options = {a.dest: a for a in args.parser._actions if a.dest not in ("help", "config", "debug")}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(options)}"
            raise ValueError(f"{args.config}: unknown key {key!r}{hint}")
        choices = options[name].choices
        if choices is not None and value not in choices:
            raise ValueError(f"{args.config}: {key} is {value!r}; valid: {', '.join(map(str, choices))}")
        args.parser.set_defaults(**{name: value})


def _load(args: argparse.Namespace, name: str | None = None) -> HookedVLM:
    import torch

    from hones_lens.loading import load_model

    return load_model(name or args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)


def _data(args: argparse.Namespace) -> DataChoice:
    from hones_lens.pipeline import DataChoice

    return DataChoice(
        dataset=args.dataset,
        data_file=args.data_file,
        image_dir=args.image_dir,
        seed=args.seed,
        held_out=args.split,
        n_discovery=args.discovery_limit or args.limit,
        n_held_out=args.limit,
    )


def _out(args: argparse.Namespace) -> Path:
    return Path(args.out or f"runs/{Path(args.model).name}-{args.task}")


def _planned(args: argparse.Namespace, model: HookedVLM, data: DataChoice, stages: Sequence[str]) -> bool:
    from hones_lens import planning

    if args.plan:
        for line in planning.plan(model, args.task, data, stages, args.controls, args.memory_budget):
            print(line)
    return args.plan


def _start(args: argparse.Namespace, model: HookedVLM, data: DataChoice) -> Run:
    from hones_lens import pipeline

    names = ("top_k", "ratio", "controls", "positions", "prefilter", "race")
    settings = {name: getattr(args, name) for name in names}
    return pipeline.start_run(model, args.task, data, _out(args), **settings)


def _heads(args: argparse.Namespace, model: HookedVLM, run: Run, data: DataChoice) -> HeadScores:
    from hones_lens import pipeline
    from hones_lens.racing import Racing

    racing = None if args.race is None else Racing(epsilon=args.race)
    options = {"positions": args.positions, "prefilter": args.prefilter, "racing": racing}
    options["memory_budget"] = args.memory_budget
    return pipeline.find_heads(model, run, args.task, data, args.top_k, **options)


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from hones_lens import pipeline
    from hones_lens.viz.report import write_report
    from hones_lens.viz.terminal import print_summary

    model, data = _load(args), _data(args)
    if _planned(args, model, data, ("heads", "neurons", "masking", "others")):
        return 0
    run = _start(args, model, data)
    heads = _heads(args, model, run, data)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
    pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    pipeline.mask_others(model, run, args.task, data, neurons.ratio)
    views = pipeline.look_at_examples(model, args.task, data, heads.top()[0], neurons)
    pipeline.save_examples(run, views)
    pipeline.save_promoted(run, pipeline.promoted_tokens(model, neurons))
    view = pipeline.read_view(run.folder)
    page = write_report(run.path("report.html"), [view])
    print_summary(Console(), view)
    print(f"\nReport: {page.resolve()}")
    found = {name: json.loads(run.path(f"{name}.json").read_text(encoding="utf-8")) for name in _RESULTS}
    _write_json(args, {"report": str(page), **found})
    return 0


def _localize(args: argparse.Namespace) -> int:
    from hones_lens import pipeline

    model, data = _load(args), _data(args)
    if _planned(args, model, data, ("heads", "neurons")):
        return 0
    run = _start(args, model, data)
    heads = _heads(args, model, run, data)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
    print(heads, neurons, f"Run: {run.folder}", sep="\n\n")
    _write_json(args, {"heads": [list(c) for c in heads.top()], "neurons": [list(c) for c in neurons.top()]})
    return 0


def _mask(args: argparse.Namespace) -> int:
    from hones_lens import pipeline

    model, data = _load(args), _data(args)
    if _planned(args, model, data, ("heads", "neurons", "masking")):
        return 0
    run = _start(args, model, data)
    heads = _heads(args, model, run, data)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
    results = pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    print(*results, f"Run: {run.folder}", sep="\n\n")
    _write_json(args, json.loads(run.path("masking.json").read_text(encoding="utf-8")))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from hones_lens.data import load_examples
    from hones_lens.evaluation import evaluate
    from hones_lens.tasks import load_task

    model, found = _load(args), []
    for task in TASKS if args.task == "all" else (args.task,):
        limit = args.limit or (100 if load_task(task).ranks else 1000)
        files = {"data_file": args.data_file, "image_dir": args.image_dir}
        examples = load_examples(args.dataset, task, args.split, limit, args.seed, **files)
        found.append(evaluate(model, task, examples))
        print(found[-1])
    _write_json(args, [evaluation.to_dict() for evaluation in found])
    return 0


def _check(args: argparse.Namespace) -> int:
    import torch

    from hones_lens.checking import check_model
    from hones_lens.loading import hook_hf_model, load_hf_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    hf_model, processor = load_hf_model(args.model_name, args.device, dtype)
    checks = check_model(hook_hf_model(hf_model, processor), hf_model)
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.figure}")
    _write_json(args, [vars(check) for check in checks])
    return 0 if all(check.passed for check in checks) else 1


def _models(args: argparse.Namespace) -> int:
    from hones_lens.config import all_settings

    for s in all_settings().values():
        where = "shipped" if s.checkpoint else f"Hub: {s.hub_id}"
        names = ", ".join((s.name, *s.aliases))
        print(f"{names:<28} {s.family:<12} {s.top_k:>3} heads, {100 * s.ratio:g} % of neurons   {where}")
    _write_json(args, [vars(s) for s in all_settings().values()])
    return 0


def _report(args: argparse.Namespace) -> int:
    from hones_lens.pipeline import read_view
    from hones_lens.viz.report import write_report

    print(f"Report: {write_report(Path(args.out), [read_view(run) for run in args.runs]).resolve()}")
    return 0


def _train(args: argparse.Namespace) -> int:
    import torch

    from hones_lens.tools.card import write_card
    from hones_lens.tools.train_tiny import train

    if args.threads:
        torch.set_num_threads(args.threads)
    steps = {"steps": args.steps, "naming_steps": args.naming_steps}
    family = importlib.import_module(_TINY[args.family])
    given = {name: n for name, n in steps.items() if n is not None}
    recipe = replace(family.RECIPE, seed=args.seed, **given)
    train(family, Path(args.out), recipe)
    write_card(Path(args.out) / "model", f"tiny-{args.family}", recipe, family.DATASETS)
    print(f"Model: {Path(args.out) / 'model'}")
    return 0


def _write_json(args: argparse.Namespace, data: Any) -> None:
    if args.json:
        from hones_lens.results import write_json

        write_json(args.json, data)


if __name__ == "__main__":
    sys.exit(main())
