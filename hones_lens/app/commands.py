"""What each command of `hones` does. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_lens.app.checks.dtype_flips import Flips
    from hones_lens.app.explorer.views import Views
    from hones_lens.app.runs.folder import Run
    from hones_lens.app.runs.stages import DataChoice
    from hones_lens.hones import HeadScores, NeuronScores
    from hones_lens.model import HookedVLM

CORRUPTIONS = ("noise", "blank", "blur", "shuffle", "mean")
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
SITES += ("neurons", "vision_z", "vision_neurons")
TINY = {"llava": "hones_lens.app.tiny.tiny_llava", "qwen2.5-vl": "hones_lens.app.tiny.tiny_qwen"}
_RESULTS = ("heads", "neurons", "masking", "others")


def _load(args: argparse.Namespace) -> HookedVLM:
    import torch

    from hones_lens.model import load_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    pixels = {name: getattr(args, name) for name in ("min_pixels", "max_pixels")}
    given = {name: value for name, value in pixels.items() if value is not None}
    return load_model(args.model, args.device, dtype, **given)


def _data(args: argparse.Namespace) -> DataChoice:
    from hones_lens.app.runs.stages import DataChoice

    return DataChoice(
        dataset=args.dataset,
        data_file=args.data_file,
        image_dir=args.image_dir,
        seed=args.seed,
        discovery_split=args.discovery_split,
        dev_split=args.dev_split,
        held_out=args.split,
        n_discovery=args.discovery_limit or args.limit,
        n_dev=args.dev_limit or args.limit,
        n_held_out=args.limit,
        on_error=args.on_error,
    )


def _out(args: argparse.Namespace) -> Path:
    """The run folder; a folder that a configuration means for one task is not another task's."""
    if args.out:
        return Path(args.out)
    if not args.outputs:
        return Path(f"runs/{Path(args.model).name}-{args.task}")
    folder, task = Path(args.outputs[0]), args.outputs[1]
    if args.task == task:
        return folder
    return folder.with_name(args.task) if folder.name == task else folder / args.task


def _planned(args: argparse.Namespace, model: HookedVLM, data: DataChoice, stages: Sequence[str]) -> bool:
    from hones_lens.app.runs import plan

    if args.plan:
        for line in plan.plan(model, args.task, data, stages, args.controls, args.memory_budget):
            print(line)
    return args.plan


def _start(args: argparse.Namespace, model: HookedVLM, data: DataChoice) -> Run:
    from hones_lens.app.runs import stages as pipeline

    names = ("top_k", "ratio", "controls", "positions", "prefilter", "race")
    settings = {name: getattr(args, name) for name in names}
    return pipeline.start_run(model, args.task, data, _out(args), **settings)


def _heads(args: argparse.Namespace, model: HookedVLM, run: Run, data: DataChoice) -> HeadScores:
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.results import Racing

    racing = None if args.race is None else Racing(epsilon=args.race)
    options = {"positions": args.positions, "prefilter": args.prefilter, "racing": racing}
    options["memory_budget"] = args.memory_budget
    return pipeline.find_heads(model, run, args.task, data, args.top_k, **options)


def demo(args: argparse.Namespace) -> int:
    """Heads, neurons and masking, and a report of them."""
    from rich.console import Console

    from hones_lens.app.report.report import write_report
    from hones_lens.app.report.terminal import print_summary
    from hones_lens.app.runs import stages as pipeline

    model, data = _load(args), _data(args)
    if _planned(args, model, data, ("heads", "held out", "neurons", "masking", "others")):
        return 0
    run = _start(args, model, data)
    heads = _heads(args, model, run, data)
    pipeline.heads_again(model, run, args.task, data, heads)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
    pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    pipeline.mask_others(model, run, args.task, data, neurons.ratio)
    pipeline.keep_views(model, run, args.task, data, heads, neurons)
    view = pipeline.read_view(run.folder)
    page = write_report(run.path("report.html"), [view])
    print_summary(Console(), view)
    print(f"\nReport: {page.resolve()}")
    found = {name: json.loads(run.path(f"{name}.json").read_text(encoding="utf-8")) for name in _RESULTS}
    _write_json(args, {"report": str(page), **found})
    return 0


def localize(args: argparse.Namespace) -> int:
    """Critical heads and the neurons that they feed; `--stage` for one of the two."""
    from hones_lens.app.runs import stages as pipeline

    model, data = _load(args), _data(args)
    every = ("heads", "held out", "neurons")
    stages = {"heads": every[:2], "neurons": every[2:]}.get(args.stage, every)
    if _planned(args, model, data, stages):
        return 0
    run = _start(args, model, data)
    if args.stage == "neurons" and not run.path("heads.json").exists():
        raise ValueError(f"{run.folder} has no heads.json yet: --stage heads makes it, --stage all does both")
    heads = _heads(args, model, run, data)
    found: dict[str, Any] = {"heads": [list(c) for c in heads.top()]}
    print(heads, end="\n\n")
    again = pipeline.heads_again(model, run, args.task, data, heads)
    if again is not None:
        found["held_out"] = again.to_dataframe().to_dict("records")
        print(again, end="\n\n")
    if args.stage != "heads":
        neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
        found["neurons"] = [list(c) for c in neurons.top()]
        print(neurons, end="\n\n")
        pipeline.keep_views(model, run, args.task, data, heads, neurons)
    print(f"Run: {run.folder}")
    _write_json(args, found)
    return 0


def mask(args: argparse.Namespace) -> int:
    """Heads and neurons where they are not there yet, then masking (H4)."""
    from hones_lens.app.runs import stages as pipeline

    model, data = _load(args), _data(args)
    if _planned(args, model, data, ("heads", "held out", "neurons", "masking")):
        return 0
    run = _start(args, model, data)
    heads = _heads(args, model, run, data)
    again = pipeline.heads_again(model, run, args.task, data, heads)
    neurons = pipeline.find_neurons(model, run, args.task, data, heads, args.ratio)
    results = pipeline.mask_neurons(model, run, args.task, data, neurons, args.controls)
    pipeline.keep_views(model, run, args.task, data, heads, neurons)
    print(*([] if again is None else [again]), *results, f"Run: {run.folder}", sep="\n\n")
    _write_json(args, json.loads(run.path("masking.json").read_text(encoding="utf-8")))
    return 0


def steer(args: argparse.Namespace) -> int:
    """Scales for a run's neurons, learned on dev, beside all controls, on the held-out split (H5)."""
    from hones_lens.app.runs import stages as pipeline
    from hones_lens.hones import SteeringConfig

    model, data = _load(args), _data(args)
    neurons = _neurons_to_steer(args, model)
    names = ("accumulate", "kl_weight", "l2_weight", "clamp", "negatives")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {
        "k": args.k,
        "methods": pipeline.steering_methods(args.methods),
        "config": SteeringConfig(seed=args.seed, **given),
        "learning_rates": args.lr,
        "epochs": args.epochs,
        "factors": args.factors,
        "draws": args.draws,
    }
    if args.patience is not None:
        options["patience"] = args.patience
    run = pipeline.start_steering(model, args.task, data, _steering_out(args), neurons, options)
    table = pipeline.steer_neurons(model, run, args.task, data, neurons, options)
    print(table, f"Run: {run.folder}", sep="\n\n")
    _write_json(args, json.loads(run.path("steering.json").read_text(encoding="utf-8")))
    return 0


def _neurons_to_steer(args: argparse.Namespace, model: HookedVLM) -> NeuronScores:
    """Those of `--neurons` (our file or HONES's), or those of the run folder."""
    from hones_lens.hones import NeuronScores, load_neurons

    file = Path(args.neurons) if args.neurons else _out(args) / "neurons.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: `hones localize` with the same --out makes it, or give --neurons FILE"
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    ours = isinstance(data, dict) and data.get("kind") == "neurons"
    return NeuronScores.load(file) if ours else load_neurons(file, args.task, model)


def _steering_out(args: argparse.Namespace) -> Path:
    name = args.dataset if args.dataset.replace("-", "").isalnum() else Path(args.dataset).stem
    return _out(args) / "steering" / name


def overlap(args: argparse.Namespace) -> int:
    """Which neurons the runs' tasks share (H6), and with `--mask` what they do to every task."""
    from dataclasses import asdict

    from hones_lens.app.runs import overlap as runs

    name, neurons = runs.neurons_of_runs(args.runs)
    out, result = args.out or f"runs/{name}-overlap{'-masked' if args.mask else ''}", {}
    if not args.mask:
        run = runs.start_overlap(out, name, neurons)
        found = runs.share_neurons(run, neurons)
        print(found)
    else:
        args.model = args.model or name
        model, data = _load(args), _data(args)
        if model.cfg.model_name != name:
            raise ValueError(f"the runs are of {name}, not of {model.cfg.model_name}")
        examples = {task: data.test(task) for task in neurons}
        run = runs.start_overlap(out, name, neurons, model, examples)
        found = runs.share_neurons(run, neurons)
        print(found)
        groups = runs.mask_shared(model, run, examples, found)
        print(f"\n{groups}")
        result["groups"] = groups.to_dataframe().to_dict("records")
        result["lenses"] = {}
        for task, scores in neurons.items():
            lens = runs.read_lens(model, run, task, examples[task], scores, f"lens-{task}.json")
            print(f"\n{lens}")
            result["lenses"][task] = lens.to_dataframe().to_dict("records")
    print(f"\nRun: {run.folder}\nFigures: hones report {run.folder} --out {run.folder / 'report.html'}")
    _write_json(args, {"overlap": asdict(found), **result})
    return 0


def reproduce(args: argparse.Namespace) -> int:
    """All stages on several tasks, and their tables."""
    from hones_lens.app.runs.reproduce import reproduce
    from hones_lens.data import tasks_of

    model, data = _load(args), _data(args)
    out = Path(args.out or f"runs/reproduce-{Path(args.model).name}")
    shifted = "shapes-shifted" if args.dataset == "shapes" else None
    tasks = args.tasks or tasks_of(args.dataset, args.data_file)
    result = reproduce(
        model, out, data, tasks=tasks, shifted=shifted, ratios=args.ratios, n_controls=args.controls
    )
    print(result)
    runs = " ".join(str(out / name) for name in ("across", *tasks))
    print(f"Tables: {out / 'tables.md'}\nReport: hones report {runs} --out {out / 'report.html'}")
    return 0


def data_check(args: argparse.Namespace) -> int:
    """What of a data set can be used, and what is wrong with the rest."""
    from tqdm import tqdm

    from hones_lens.data import check_data

    check = check_data(
        args.dataset,
        args.task,
        data_file=args.data_file,
        image_dir=args.image_dir,
        seed=args.seed,
        open_images=not args.no_images,
        progress=tqdm,
    )
    print(check)
    _write_json(args, check.to_json())
    return 0 if check.ok else 1


def evaluate(args: argparse.Namespace) -> int:
    """A model's metrics."""
    from hones_lens.data import load_examples, tasks_of
    from hones_lens.engine import evaluate
    from hones_lens.tasks import load_task

    model, found = _load(args), []
    names = tasks_of(args.dataset, args.data_file) if args.task == "all" else (args.task,)
    for task in map(load_task, names):
        limit = args.limit or (100 if task.ranks else 1000)
        files = {"data_file": args.data_file, "image_dir": args.image_dir, "on_error": args.on_error}
        kind = task.examples_of or task.name
        found.append(
            evaluate(model, task, load_examples(args.dataset, kind, args.split, limit, args.seed, **files))
        )
        print(found[-1])
    _write_json(args, [evaluation.to_dict() for evaluation in found])
    return 0


def check(args: argparse.Namespace) -> int:
    """Whether a checkpoint is computed as Hugging Face computes it."""
    import torch

    from hones_lens.app.checks.parity import check_model
    from hones_lens.model import hook_hf_model, load_hf_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.flips is not None and dtype is torch.float32:
        raise ValueError("--flips compares another type with float32; give --dtype bfloat16 or float16")
    hf_model, processor = load_hf_model(args.model_name, args.device, dtype)
    checks = check_model(hook_hf_model(hf_model, processor), hf_model)
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.figure}")
    flips = [] if args.flips is None else _flips(args, dtype or torch.bfloat16)
    _write_json(args, [vars(result) for result in (*checks, *flips)])
    return 0 if all(check.passed for check in checks) else 1


def _flips(args: argparse.Namespace, dtype: Any) -> list[Flips]:
    """What a localization gives in another type than float32, task by task, as it comes."""
    import torch

    from hones_lens.app.checks.dtype_flips import dtype_flips
    from hones_lens.data import load_examples, tasks_of
    from hones_lens.model import load_model

    exact, other = (load_model(args.model_name, args.device, kind) for kind in (torch.float32, dtype))
    found = []
    for task in tasks_of("shapes"):
        found.append(dtype_flips(exact, other, task, load_examples("shapes", task, "discovery", args.flips)))
        print(found[-1])
    return found


def models(args: argparse.Namespace) -> int:
    """The models that are known by name."""
    from hones_lens.model import all_settings

    for s in all_settings().values():
        where = "shipped" if s.checkpoint else f"Hub: {s.hub_id}"
        names = ", ".join((s.name, *s.aliases))
        print(f"{names:<28} {s.family:<12} {s.top_k:>3} heads, {100 * s.ratio:g} % of neurons   {where}")
    _write_json(args, [vars(s) for s in all_settings().values()])
    return 0


def patch(args: argparse.Namespace) -> int:
    """Activation patching of one kind of activation, between clean and corrupted inputs."""
    from hones_lens.app.runs import patch as patch_run
    from hones_lens.interventions import Box

    names = patch_run.PairsChoice.__dataclass_fields__
    choice = patch_run.PairsChoice(**{name: getattr(args, name) for name in names})
    model = _load(args)
    pairs = choice.load(model)
    boxes = [Box(*sides) for sides in args.box or ()]
    groups = [*args.groups, *boxes] if args.groups or boxes else None
    options = {"what": args.what, "by": args.by, "groups": groups, "layers": args.layers, "units": args.units}
    options |= {"direction": args.direction, "raw": args.raw, "batch_size": args.batch_size}
    options["metric"] = args.metric or ("log_prob" if pairs.foil is None else "logit_diff")
    if args.plan:
        print(*patch_run.plan_patching(model, pairs, options), sep="\n")
        return 0
    source = Path(args.image).stem if args.image else args.task
    default = f"runs/{Path(args.model).name}-{source}-patch-{args.what}-{args.by}-{args.direction}"
    run = patch_run.start_patching(model, pairs, args.out or default, choice, options)
    result = patch_run.run_patching(model, run, pairs, options)
    print(result, f"Run: {run.folder}", sep="\n\n")
    _write_json(args, json.loads(run.path("patch.json").read_text(encoding="utf-8")))
    return 0


def report(args: argparse.Namespace) -> int:
    """One page of several runs."""
    from hones_lens.app.report.report import write_report
    from hones_lens.app.report.run_folder import read_view

    out = Path(args.out or Path(args.runs[0]) / "report.html")
    print(f"Report: {write_report(out, [read_view(run) for run in args.runs]).resolve()}")
    return 0


def explore(args: argparse.Namespace) -> int:
    """One prompt to click through: as a page of a local server, or in a file."""
    if not args.out and None in map(find_spec, ("anywidget", "marimo")):
        raise ImportError("the explorer needs the extra `notebook`: pip install hones-lens[notebook]")
    from hones_lens.app.explorer import serve
    from hones_lens.app.explorer.page import write_page

    if args.out:
        views = _views(args)
        print(f"Page: {write_page(views, views.start(), args.out).resolve()}")
        return 0
    with serve.listen(args.port) as listener:
        serve.run(_views(args), listener, browser=not args.no_browser)
    return 0


def _views(args: argparse.Namespace) -> Views:
    from hones_lens.app.explorer.serve import subject
    from hones_lens.app.explorer.views import Views
    from hones_lens.hones import HeadScores

    picture, prompt = subject(args.image, args.prompt)
    heads = HeadScores.load(Path(args.run_folder) / "heads.json") if args.run_folder else None
    return Views(_load(args), picture, prompt, heads)


def train_tiny(args: argparse.Namespace) -> int:
    """Train a shipped model anew, and write its card."""
    import torch

    from hones_lens.app.tiny.card import write_card
    from hones_lens.app.tiny.train_tiny import train

    if args.threads:
        torch.set_num_threads(args.threads)
    steps = {name: getattr(args, name) for name in ("steps", "naming_steps", "shape_steps")}
    family = importlib.import_module(TINY[args.family])
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
