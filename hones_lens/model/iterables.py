"""Arguments that can be walked only once, made into lists before a function walks them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
_DEPTH = 2  # e.g. arms: several iterables of hooks


def takes_iterables(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments may now be any iterables: generators, `zip`, sets, views of a dict.

    It gets lists in their place (see `as_list`), so it may walk, count and slice them as often as it likes.
    """
    plain = cast("Callable[..., R]", function)

    @wraps(function)
    def with_lists(*args: P.args, **options: P.kwargs) -> R:
        return plain(*map(as_list, args), **{name: as_list(value) for name, value in options.items()})

    return with_lists


def as_list(value: Any, depth: int = _DEPTH) -> Any:
    """The value; a list in place of an iterable that can't be indexed, also within a list, tuple or dict."""
    if _cannot_be_indexed(value):
        value = list(value)
    if depth == 0 or not _is_one_of(value, list, tuple, dict):
        return value
    items: list[Any] = list(value.values() if _is_one_of(value, dict) else value)
    listed = [as_list(item, depth - 1) for item in items]
    if all(item is before for item, before in zip(listed, items, strict=True)):
        return value
    if _is_one_of(value, dict):
        return dict(zip(value, listed, strict=True))
    return tuple(listed) if _is_one_of(value, tuple) else listed


def _cannot_be_indexed(value: object) -> bool:
    return hasattr(value, "__iter__") and not hasattr(value, "__getitem__")


def _is_one_of(value: object, *kinds: type[object]) -> bool:
    return type(value) in kinds
