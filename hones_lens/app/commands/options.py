"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hones_lens.tasks import task_names


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a command with the options that all have; `run(args)` returns its exit code."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, parser=command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name not in ("report", "train-tiny", "explore", "random-checkpoint"):
        command.add_argument("--json", metavar="FILE", type=output_file, help="also write the result here")
    return command


def add_stage_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a command that runs stages of the method in a run folder."""
    command = add_command(commands, name, run, text)
    model_options(command)
    data_options(command)
    split_options(command)
    command.add_argument("--top-k", type=int, help="critical heads (default: model_configs/)")
    command.add_argument("--ratio", type=finite, help="share of neurons (default: model_configs/)")
    command.add_argument("--controls", type=natural, default=20, help="matched random sets (default: 20)")
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
        "--race", type=finite, metavar="EPSILON", help="race heads: right up to EPSILON with probability 0.95"
    )
    limit_options(command)
    command.add_argument("--memory-budget", type=finite, metavar="GB", help="default: half of what is free")
    plan_options(command)
    return command


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
    add("--gpus", type=positive, default=1, metavar="N", help="with --plan: how many of them (default: 1)")
    add(
        "--mfu",
        type=fraction,
        default=0.4,
        help="with --plan: share of its peak that is reached (default: 0.4)",
    )
    add("--throughput", type=above_zero, metavar="TFLOPS", help="with --plan: what one machine reaches")


def limit_options(command: argparse.ArgumentParser, what: str = "measure") -> None:
    """Add `--heads` and `--layers`, which limit the work."""
    command.add_argument(
        "--heads", type=heads, metavar="L18H29,...", help=f"{what} these heads alone (default: all)"
    )
    command.add_argument(
        "--layers",
        type=layers,
        metavar="10-20,25",
        help=f"{what} these layers alone, both ends of a range in",
    )


def split_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the run folder, the splits and their sizes."""
    command.add_argument(
        "--out", metavar="DIR", type=output_folder, help="run folder (default: runs/MODEL-TASK)"
    )
    command.set_defaults(outputs=None)
    command.add_argument("--limit", type=int, help="how many examples of each split")
    command.add_argument("--discovery-limit", type=int, help="how many discovery examples, if not --limit")
    command.add_argument("--dev-limit", type=int, help="how many dev examples, if not --limit")
    for split, use in (("discovery", "heads and neurons are found"), ("dev", "scales are learned")):
        command.add_argument(
            f"--{split}-split", default=split, metavar="SPLIT", help=f"where {use} (default: {split})"
        )
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
        type=device_map,
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
            command.add_argument(f"--{name}-pixels", type=int, help="of a picture, for models that resize it")


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
    command.add_argument("--seed", type=int, default=3407)
    command.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="at a record that can't be used"
    )


def reading_options(command: argparse.ArgumentParser) -> None:
    """Add the options of how annotation files and their pictures are read."""
    command.add_argument(
        "--encoding",
        type=encoding,
        default="utf-8",
        help="of the annotations' text, e.g. cp1252 (default: utf-8)",
    )
    command.add_argument(
        "--allow-outside", action="store_true", help="also read pictures that lie outside the image folder"
    )
    command.add_argument(
        "--allow-large-pictures", action="store_true", help="also read pictures of more than 64 megapixels"
    )


def encoding(text: str) -> str:
    """An encoding of text that Python knows."""
    try:
        "".encode(text)
    except LookupError as error:
        raise argparse.ArgumentTypeError(f"unknown encoding {text!r}, e.g. utf-8, cp1252, utf-16") from error
    return text


def finite(text: str) -> float:
    """A number that is finite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def device_map(text: str) -> str | dict[str, Any]:
    """A word, or JSON with a device by module."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def output_file(text: str) -> str:
    """The path of a file that can be written, known before hours of work are done."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, not a file")
    _check_parent(path)
    return text


def output_folder(text: str) -> str:
    """The path of a folder that can be written to, or made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    _check_parent(path / "settings.json")
    return text


def _check_parent(path: Path) -> None:
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise argparse.ArgumentTypeError(f"{parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{parent} can't be written to")


def names(text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[float, ...]:
    """`1,0.5` as (1.0, 0.5)."""
    return tuple(finite(part) for part in names(text))


def integers(text: str) -> tuple[int, ...]:
    """`1,2` as (1, 2)."""
    return tuple(int(part) for part in names(text))


def box(text: str) -> tuple[float, float, float, float]:
    """`left,top,right,bottom` as four numbers."""
    left, top, right, bottom = numbers(text)
    return left, top, right, bottom


def heads(text: str) -> tuple[tuple[int, int], ...]:
    """`L18H29,L3H1` as pairs (layer, head)."""
    from hones_lens.interventions import as_component, as_words

    return _several(text, lambda: tuple(as_component(word, "H") for word in as_words(text)))


def layers(text: str) -> tuple[int, ...]:
    """`10-12,25` as (10, 11, 12, 25)."""
    from hones_lens.interventions import layer_numbers

    return _several(text, lambda: tuple(layer_numbers(text)))


def _several(text: str, read: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What is read, at least one, and each once."""
    try:
        found = read()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: give at least one, and each once")
    return found


def units(text: str) -> str | tuple[int, ...] | tuple[tuple[int, int], ...]:
    """`each`, `together`, numbers, or `LAYER.NUMBER`s as pairs (see `targets_of`)."""
    from hones_lens.interventions import as_component

    parts = names(text)
    if parts and not all(part.isdigit() for part in parts) and text not in ("each", "together"):
        return _several(text, lambda: tuple(as_component(part) for part in parts))
    return text if text in ("each", "together") else integers(text)
