"""Parsers of the values of options; each refuses what can't be right, before anything runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MOST = 10_000_000  # of what is counted
_LARGEST = 1e6  # of what is measured
_MOST_LAYERS = 10_000


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A parser of whole numbers within bounds, both included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from error
        if value < least:
            lowest = "must be at least" if least else "is negative, and must be at least"
            raise argparse.ArgumentTypeError(f"{text[:40]} {lowest} {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
        return value

    return read


positive = whole(1)
natural = whole(0)
seed = whole(0, 2**32 - 1)
port = whole(0, 2**16 - 1)
pixels = whole(1, 10**9)
threads = whole(1, 1024)
repeats = whole(1, 10_000)  # of what is measured anew each time
controls = whole(0, 10_000)


def finite(text: str) -> float:
    """A number that is finite, and not too large for any of the options."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a finite number")
    if abs(value) > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is more than {_LARGEST:,.0f}")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    """A number, 0 or more."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def share(text: str) -> float:
    """A share of a whole: above 0, at most 1."""
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1, the whole")
    return value


def names(text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def several(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of values with commas between them: at least one, and each once."""
    return lambda text: _once(text, lambda: tuple(read(part) for part in names(text)))


def box(text: str) -> tuple[float, float, float, float]:
    """`left,top,right,bottom` as four numbers."""
    sides = tuple(not_negative(part) for part in names(text))
    if len(sides) != 4 or sides[0] >= sides[2] or sides[1] >= sides[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a box: LEFT,TOP,RIGHT,BOTTOM in pixels")
    left, top, right, bottom = sides
    return left, top, right, bottom


def heads(text: str) -> tuple[tuple[int, int], ...]:
    """`L18H29,L3H1` as pairs (layer, head)."""
    from hones_lens.interventions import as_component, as_words

    return _once(text, lambda: tuple(as_component(word, "H") for word in as_words(text)))


def layers(text: str) -> tuple[int, ...]:
    """`10-12,25` as (10, 11, 12, 25)."""
    from hones_lens.interventions import layer_numbers

    if any(len(digits) > 9 or int(digits) >= _MOST_LAYERS for digits in re.findall(r"\d+", text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: no model has {_MOST_LAYERS} layers")
    return _once(text, lambda: tuple(layer_numbers(text)))


def units(text: str) -> str | tuple[int, ...] | tuple[tuple[int, int], ...]:
    """`each`, `together`, numbers, or `LAYER.NUMBER`s as pairs (see `targets_of`)."""
    from hones_lens.interventions import as_component

    parts = names(text)
    if text in ("each", "together"):
        return text
    if all(part.isdecimal() for part in parts):
        return several(natural)(text)
    return _once(text, lambda: tuple(as_component(part) for part in parts))


def _once(text: str, read: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What is read, at least one, and each once."""
    try:
        found = read()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give at least one, and each once")
    return found


def encoding(text: str) -> str:
    """An encoding of text that Python knows."""
    try:
        "".encode(text)
    except LookupError as error:
        raise argparse.ArgumentTypeError(f"unknown encoding {text!r}, e.g. utf-8, cp1252, utf-16") from error
    return text


def device_map(text: str) -> str | dict[str, Any]:
    """A word, or JSON with a device by module."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def submission(text: str) -> dict[str, int | str]:
    """`slurm_partition=gpu,timeout_min=600` as parameters of submitit's executor."""
    parameters: dict[str, int | str] = {}
    for part in names(text):
        name, sign, value = (word.strip() for word in part.partition("="))
        if not (name and sign and value):
            raise argparse.ArgumentTypeError(f"{part!r}: parameters are NAME=VALUE, parted by commas")
        parameters[name] = int(value) if value.isdigit() else value
    return parameters


def output_file(text: str) -> str:
    """The path of a file that can be written, known before hours of work are done."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, not a file")
    _check_parent(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written to")
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
