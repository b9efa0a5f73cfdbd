"""Options that are one of a fixed set of words."""

from __future__ import annotations

from collections.abc import Iterable

from hones_lens.model.names import did_you_mean


def require_choice(option: str, value: object, valid: Iterable[str], or_else: str = "") -> None:
    """Check that an option is one of its words.

    Args:
        option: Its name in the message, e.g. `return_type`.
        value: What was given.
        valid: The words.
        or_else: What else it may be, for the message, e.g. `or a function`.

    Raises:
        ValueError: Another value; lists the valid ones.
    """
    words = tuple(valid)
    if not isinstance(value, str) or value not in words:
        listed = ", ".join((*words, or_else) if or_else else words)
        raise ValueError(f"unknown {option} {value!r}; valid: {listed}{did_you_mean(value, words)}")
