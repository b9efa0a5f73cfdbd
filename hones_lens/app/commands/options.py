"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hones_lens.app.commands import values
from hones_lens.tasks import task_names


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a command with the options that all have; `run(args)` returns its exit code."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, parser=command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name not in ("report", "train-tiny", "explore", "random-checkpoint"):
        command.add_argument(
            "--json", metavar="FILE", type=values.output_file, help="also write the result here"
        )
    return command


def add_stage_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a command that runs stages of the method in a run folder."""
    command = add_command(commands, name, run, text)
    model_options(command)
    data_options(command)
    split_options(command, ("discovery",))
    command.add_argument("--top-k", type=values.positive, help="critical heads (default: model_configs/)")
    command.add_argument("--ratio", type=values.share, help="share of neurons (default: model_configs/)")
    command.add_argument(
        "--positions",
        choices=["all", "last"],
        default="all",
        help="last: replace heads only from the end of the prompt on (default: all)",
    )
    command.add_argument(
        "--prefilter",
        type=values.positive,
        metavar="M",
        help="measure only the M heads that attribution patching likes",
    )
    command.add_argument(
        "--race",
        type=values.not_negative,
        metavar="EPSILON",
        help="race heads: right up to EPSILON with probability 0.95",
    )
    limit_options(command)
    memory_option(command)
    worker_options(command)
    plan_options(command)
    return command


def memory_option(command: argparse.ArgumentParser) -> None:
    """Add the bound on memory."""
    command.add_argument(
        "--memory-budget",
        type=values.above_zero,
        metavar="GB",
        help="for what runs at once, besides the weights (default: two fifths of what is free)",
    )


def plan_options(command: argparse.ArgumentParser) -> None:
    """Add `--plan`, and the machines that it plans for."""
    command.add_argument(
        "--plan", action="store_true", help="say what would be done and what it costs, without weights; stop"
    )
    add = command.add_argument
    add(
        "--gpu",
        metavar="NAME",
        help="with --plan: a100, h100, h200, b200, l40s, l4 or rtx4090 (default: h100)",
    )
    add(
        "--gpus",
        type=values.positive,
        default=1,
        metavar="N",
        help="with --plan: how many of them (default: 1)",
    )
    add(
        "--mfu",
        type=values.share,
        default=0.4,
        help="with --plan: share of its peak that is reached (default: 0.4)",
    )
    add(
        "--throughput", type=values.above_zero, metavar="TFLOPS", help="with --plan: what one machine reaches"
    )


def limit_options(command: argparse.ArgumentParser, what: str = "measure") -> None:
    """Add `--heads` and `--layers`, which limit the work."""
    command.add_argument(
        "--heads", type=values.heads, metavar="L18H29,...", help=f"{what} these heads alone (default: all)"
    )
    command.add_argument(
        "--layers",
        type=values.layers,
        metavar="10-20,25",
        help=f"{what} these layers alone, both ends of a range in",
    )


def worker_options(command: argparse.ArgumentParser) -> None:
    """Add the options of many workers."""
    add = command.add_argument
    add(
        "--workers",
        type=values.positive,
        metavar="N",
        help="let N workers measure, each with a model of its own",
    )
    add(
        "--engine",
        choices=["local", "ray", "slurm"],
        help="of --workers: processes here, actors of Ray, or jobs of Slurm (default: local)",
    )
    add(
        "--worker-threads",
        type=values.positive,
        metavar="N",
        help="processors of each worker (default: 1)",
    )
    add(
        "--slurm",
        metavar="NAME=VALUE,...",
        type=values.submission,
        help="of Slurm's jobs, e.g. slurm_partition=gpu,timeout_min=600,mem_gb=40",
    )


def run_options(command: argparse.ArgumentParser, text: str) -> None:
    """Add the options of the run folder; `text` says what `--out` is."""
    command.add_argument("--out", metavar="DIR", type=values.output_folder, help=text)
    command.add_argument(
        "--wait", action="store_true", help="wait for another process that works in the run folder"
    )
    command.add_argument(
        "--allow-code-change",
        action="store_true",
        help="go on in a run folder that other code of hones-lens began; this is recorded",
    )


def controls_option(command: argparse.ArgumentParser) -> None:
    """Add the number of random sets that a set of neurons is compared with."""
    command.add_argument(
        "--controls", type=values.controls, default=20, help="matched random sets (default: 20)"
    )


_USES = {"discovery": "heads and neurons are found", "dev": "scales are learned"}


def split_options(command: argparse.ArgumentParser, splits: Sequence[str] = tuple(_USES)) -> None:
    """Add the options of the run folder, of these splits and the one of results, and of their sizes."""
    run_options(command, "run folder (default: runs/MODEL-TASK)")
    command.set_defaults(outputs=None)
    command.add_argument(
        "--limit", type=values.positive, help="how many examples of each split, as far as there are so many"
    )
    for split, use in _USES.items():
        command.set_defaults(**{f"{split}_limit": None, f"{split}_split": split})
        if split in splits:
            name, text = f"--{split}-limit", f"how many {split} examples, if not --limit"
            command.add_argument(name, type=values.positive, help=text)
            name, text = f"--{split}-split", f"where {use} (default: {split})"
            command.add_argument(name, default=split, metavar="SPLIT", help=text)
    command.add_argument("--split", default="test", help="where results are measured (default: test)")


def model_options(command: argparse.ArgumentParser, named: bool = True) -> None:
    """Add the options of the model: name (unless the command has an argument for it), device and type."""
    if named:
        command.add_argument(
            "--model", default="tiny-llava", help="name, folder or Hub id (default: tiny-llava)"
        )
        command.add_argument("--config", metavar="YAML", help="options from a file; those given here win")
    command.add_argument("--device", help="default: the GPU if there is one; auto is --device-map auto")
    command.add_argument(
        "--device-map",
        type=values.device_map,
        metavar="WORD",
        help="lay the model over GPUs, CPU and disk: auto, balanced, balanced_low_0, sequential, or JSON "
        'with the device of each part ({"model.vision_tower": 0, "lm_head": "cpu", ...})',
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument(
        "--plain-greedy",
        action="store_true",
        help="leave out settings of the generation config that change tokens, such as a repetition penalty",
    )
    if named:
        for name in ("min", "max"):
            command.add_argument(
                f"--{name}-pixels", type=values.pixels, help="of a picture, for models that resize it"
            )


def data_options(command: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options of the task and the data; with `several`, the task may be `all`."""
    choices = (*task_names(), "all") if several else task_names()
    default = "all" if several else "vqa"
    command.add_argument("--task", choices=choices, default=default, help=f"default: {default}")
    file_options(command)


def file_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the data set and its files."""
    command.add_argument("--dataset", default="shapes", help="name, file or folder (default: shapes)")
    command.add_argument("--data-file", help="annotations, for data sets read from files")
    command.add_argument("--image-dir", help="images, for data sets read from files")
    reading_options(command)
    command.add_argument("--seed", type=values.seed, default=3407)
    command.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="at a record that can't be used"
    )


def reading_options(command: argparse.ArgumentParser) -> None:
    """Add the options of how annotation files and their pictures are read."""
    command.add_argument(
        "--encoding",
        type=values.encoding,
        default="utf-8",
        help="of the annotations' text, e.g. cp1252 (default: utf-8)",
    )
    command.add_argument(
        "--allow-outside", action="store_true", help="also read pictures that lie outside the image folder"
    )
    command.add_argument(
        "--allow-large-pictures", action="store_true", help="also read pictures of more than 64 megapixels"
    )
