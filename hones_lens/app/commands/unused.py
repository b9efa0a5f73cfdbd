"""Options that would do nothing beside the others of a command: refused, and not taken in silence."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from hones_lens.app.commands.checks import option
from hones_lens.app.guard import WrongOption

_LEARNED = ("RandNeuron", "HONES without KL", "HONES")
_OF_FILES = ("data_file", "image_dir", "encoding", "allow_outside", "allow_large_pictures", "on_error")
_OF_DATA = ("dataset", *_OF_FILES, "split", "limit")
_OF_MODEL = ("model", "device", "device_map", "dtype", "plain_greedy")
_OF_LEARNING = ("lr", "epochs", "patience", "accumulate", "kl_weight", "l2_weight", "clamp")


class _Rule(NamedTuple):
    """Options, when they do nothing, and what is said then."""

    names: tuple[str, ...]
    do_nothing: Callable[[Any], bool]
    why: str


def check_unused(args: argparse.Namespace, given: Collection[str]) -> None:
    """Check that every option that was given does something.

    Args:
        args: The options of a command.
        given: Names of those that were said, on the command line or in a file of options.

    Raises:
        WrongOption: The first that does nothing; names it, and says why.
    """
    flags = {action.dest: (action.option_strings or [action.dest])[-1] for action in args.parser._actions}
    options = _Options(vars(args), command=args.parser.prog.partition(" ")[2])
    for names, do_nothing, why in _RULES:
        found = [name for name in names if name in given and name in flags]
        if found and do_nothing(options):
            raise WrongOption(f"{flags[found[0]]}: {why}")


class _Options(dict[str, Any]):
    """Options by name, also as attributes; None for those that the command does not have."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _methods(options: _Options) -> tuple[str, ...]:
    from hones_lens.app.runs.steering import steering_methods

    with option("--methods"):
        return steering_methods(options.methods)


def _is_drawn(options: _Options) -> bool:
    from hones_lens.data import reads_files

    return options.dataset is not None and not reads_files(options.dataset)


def _times_this_machine(options: _Options) -> bool:
    from hones_lens.model import find_settings

    settings = find_settings(options.model)
    shipped = settings is not None and settings.checkpoint is not None
    return shipped and options.gpu is None and options.throughput is None


def _ranks(options: _Options) -> bool:
    from hones_lens.tasks import load_task

    return load_task(options.task).ranks


def _is_own_picture(options: _Options) -> bool:
    return options.command == "patch" and options.image is not None


_RULES = (
    _Rule(
        ("slurm",),
        lambda o: o.workers is None or o.engine != "slurm",
        "give --workers and --engine slurm, too",
    ),
    _Rule(("engine", "worker_threads"), lambda o: o.workers is None, "give --workers, too"),
    _Rule(("gpu", "gpus", "mfu", "throughput"), lambda o: not o.plan, "goes with --plan"),
    _Rule(("gpu", "mfu"), lambda o: o.throughput is not None, "--throughput says what one machine reaches"),
    _Rule(
        ("gpus", "mfu"), _times_this_machine, "this machine is timed, unless --gpu or --throughput is given"
    ),
    _Rule(("ratio",), lambda o: o.stage == "heads", "--stage heads selects no neurons"),
    _Rule(
        _OF_LEARNING,
        lambda o: not set(_LEARNED) & set(_methods(o)),
        "none of --methods learns scales",
    ),
    _Rule(("kl_weight",), lambda o: not {"HONES", "RandNeuron"} & set(_methods(o)), "no method has a KL"),
    _Rule(("factors",), lambda o: "Grid-Search" not in _methods(o), "goes with the method Grid-Search"),
    _Rule(("draws",), lambda o: "RandNeuron" not in _methods(o), "goes with the method RandNeuron"),
    _Rule(("negatives",), lambda o: not _ranks(o), "is for a task that ranks candidates"),
    _Rule((*_OF_MODEL, *_OF_DATA, "seed"), lambda o: o.mask is False, "goes with --mask"),
    _Rule(_OF_DATA, _is_own_picture, "--image is all that is read"),
    _Rule(
        ("seed",),
        lambda o: _is_own_picture(o) and o.corrupt not in ("noise", "shuffle"),
        "nothing is drawn: --image is all that is read",
    ),
    _Rule(("groups", "box"), lambda o: o.by != "group", "goes with --by group"),
    _Rule(_OF_FILES, _is_drawn, "is for data from files, and this data set is drawn"),
    _Rule(
        ("encoding",),
        lambda o: str(o.dataset).startswith("hf:"),
        "is for files of text, and a data set of the Hub has none",
    ),
    _Rule(("task",), lambda o: bool(o.raw_prompt), "--raw-prompt asks in the form of no task"),
    _Rule(
        ("image_dir", "allow_outside", "allow_large_pictures"),
        lambda o: bool(o.no_images),
        "--no-images opens no picture",
    ),
    _Rule(("model",), lambda o: bool(o.no_images), "counts the tokens of pictures: leave out --no-images"),
    _Rule(("workers",), lambda o: o.mask is False, "there is nothing to measure without --mask"),
    _Rule(
        ("workers",),
        lambda o: o.command == "evaluate" and o.out is None,
        "what they find is kept in a run folder: give --out, too",
    ),
    _Rule(
        ("wait", "allow_code_change"),
        lambda o: o.command == "evaluate" and o.out is None,
        "is for run folders: give --out, too",
    ),
    _Rule(("port", "no_browser"), lambda o: bool(o.out), "--out writes a page and serves none"),
    _Rule(("max_size",), lambda o: not o.out, "goes with --out"),
)
