"""Types and shapes of every call into hones_lens: the checker of HONES_CHECK_SHAPES=1, see conftest.py."""

from collections.abc import Callable
from typing import Any, get_args, runtime_checkable

from beartype import BeartypeConf, beartype

# PEP 484: where a float is asked for, an int will do.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results at every call; protocols of the package by the names they ask for."""
    annotations = list(getattr(function, "__globals__", {}).values())
    for value in [part for each in annotations for part in (each, *get_args(each))]:  # also `Protocol | None`
        if getattr(value, "_is_protocol", False) and value.__module__.startswith("hones_lens"):
            runtime_checkable(value)
    return _beartype(function)
