"""Checks of options against each other, and against the model: before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hones_lens.app.commands.values import output_folder
from hones_lens.app.guard import WrongOption, is_expected

if TYPE_CHECKING:
    from hones_lens.model import HookedVLM

_EXPLORER = ("anywidget", "marimo")


@contextmanager
def option(name: str) -> Generator[None]:
    """What a check in the block raises is a wrong value of this option; of those it names itself if empty."""
    try:
        yield
    except (ValueError, FileNotFoundError, argparse.ArgumentTypeError) as error:
        if not is_expected(error) and not isinstance(error, argparse.ArgumentTypeError):
            raise
        raise WrongOption(f"{name}: {error}" if name else str(error)) from error


def run_folder(args: argparse.Namespace) -> Path:
    """The run folder; if a configuration names one for a single task, other tasks get a folder beside it."""
    if args.out:
        return Path(args.out)
    if not args.outputs:
        return Path(f"runs/{Path(args.model).name}-{args.task}")
    folder, task = Path(args.outputs[0]), args.outputs[1]
    if args.task == task:
        return folder
    return folder.with_name(args.task) if folder.name == task else folder / args.task


def check_options(args: argparse.Namespace) -> None:
    """Check names, and options against each other, before the model is loaded.

    Raises:
        WrongOption: The first that can't be right; names it.
        ImportError: An extra that the command needs is not installed; names it.
    """
    given = vars(args)
    if given.get("no_browser") is not None and not args.out and None in map(find_spec, _EXPLORER):
        raise ImportError("the explorer needs the extra `notebook`: pip install hones-lens[notebook]")
    _check_model(
        given.get("model_name") or given.get("model"), None if given.get("plan") else given.get("device")
    )
    if given.get("device") is not None and given.get("device_map") is not None:
        raise WrongOption("--device, --device-map: give one of the two")
    _check_pixels(args)
    if "dataset" in given:
        _check_data(args)
    if given.get("methods") is not None:
        from hones_lens.app.runs.steering import steering_methods

        with option("--methods"):
            steering_methods(args.methods)
    if "outputs" in given and "task" in given:
        with option("--out"):
            output_folder(str(run_folder(args)))


def _check_model(name: str | None, device: str | None) -> None:
    if name is not None:
        from hones_lens.model import resolve

        with option("--model"):
            resolve(name)
    if device not in (None, "auto"):
        from hones_lens.model import check_device

        with option("--device"):
            check_device(device)


def _check_pixels(args: argparse.Namespace) -> None:
    """Bounds of pictures: whether the model's processor has any, and the lower one is the lower."""
    given = [name for name in ("min_pixels", "max_pixels") if getattr(args, name, None) is not None]
    if not given:
        return
    if len(given) == 2 and args.min_pixels > args.max_pixels:
        raise WrongOption(f"--min-pixels: {args.min_pixels} is more than --max-pixels, {args.max_pixels}")
    from hones_lens.model import processor_options_of

    if unknown := [name for name in given if name not in processor_options_of(args.model)]:
        flag = f"--{unknown[0].replace('_', '-')}"
        raise WrongOption(f"{flag}: {args.model!r} sees all pictures in one size")


def _check_data(args: argparse.Namespace) -> None:
    """The data set, the tasks that it has, and the names of splits."""
    from hones_lens.data import tasks_of
    from hones_lens.tasks import load_task

    with option("--dataset" if getattr(args, "data_file", None) is None else "--dataset, --data-file"):
        tasks_of(args.dataset, args.data_file)
    for task in getattr(args, "tasks", None) or ():
        with option("--tasks"):
            load_task(task)
    for name in ("discovery_split", "dev_split", "split"):
        if getattr(args, name, None) is not None:
            with option(f"--{name.replace('_', '-')}"):
                _check_split(args, getattr(args, name))
    if getattr(args, "discovery_split", None) == getattr(args, "split", None) is not None:
        raise WrongOption(f"--split: neurons can't be judged on the split that selected them, {args.split!r}")


def _check_split(args: argparse.Namespace, split: str) -> None:
    from hones_lens.data import check_split, load_examples, reads_files, tasks_of

    if not reads_files(args.dataset):
        load_examples(args.dataset, tasks_of(args.dataset)[0], split, 1)
        return
    check_split(split)
    file = split.partition(".json")[0] + ".json"
    if ".json" in split and not Path(file).is_file():
        raise FileNotFoundError(f"no such file: {file}")


def check_against_model(args: argparse.Namespace, model: HookedVLM) -> None:
    """Check the options of a stage against what the model has, before anything is measured.

    Raises:
        WrongOption: The first that can't be right; names it.
    """
    from hones_lens.hones import default_top_k
    from hones_lens.interventions import choose_heads, choose_layers
    from hones_lens.tasks import load_task

    with option("--layers"):
        choose_layers(args.layers, model.cfg.n_layers)
    with option("--heads"):
        n_heads = len(choose_heads(model, args.heads, args.layers))
    given = vars(args)
    top_k, prefilter = given.get("top_k"), given.get("prefilter")
    if top_k is not None and top_k > n_heads:
        raise WrongOption(f"--top-k: {top_k} heads asked for, but only {n_heads} are measured")
    if prefilter is not None and prefilter > n_heads:
        raise WrongOption(f"--prefilter: {prefilter} heads to keep, but there are only {n_heads}")
    wanted = min(default_top_k(model), n_heads) if top_k is None else top_k
    if prefilter is not None and prefilter < wanted:
        raise WrongOption(f"--prefilter: {prefilter} heads to keep, fewer than the {wanted} of --top-k")
    if given.get("race") is not None and not load_task(args.task).is_mean:
        raise WrongOption(
            f"--race: {load_task(args.task).metric_name} of --task {args.task} is not a mean over examples, "
            "so heads can't be raced on it"
        )
