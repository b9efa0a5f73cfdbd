"""What an unknown name was probably meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'vqa'?`, or nothing where no valid name is near.

    Args:
        name: The unknown name.
        valid: The valid names; upper and lower case do not count.
    """
    by_lower = {known.lower(): known for known in valid}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
