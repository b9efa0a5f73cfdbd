"""Hook names, and the hooks that a name, several names or a predicate selects; no match raises."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import Any

HookFunction = Callable[..., Any]  # of a tensor and `hook=`, the HookPoint; what it returns goes on
HookNames = str | Iterable[str] | Callable[[str], bool]
Hook = tuple[HookNames, HookFunction]
NamesFilter = HookNames | None
_COSTLY = ("attn.hook_result", "attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input")


def check_hook_name(name: str, hooks: Collection[str]) -> None:
    """Raise ValueError for a hook that does not exist, naming the nearest that do."""
    if name not in hooks:
        near = difflib.get_close_matches(name, hooks, n=3)
        raise ValueError(f"no hook {name!r}; nearest: {', '.join(near) or 'none'}")


def matching_hooks(names: NamesFilter, hooks: Collection[str], split_qkv_input: bool) -> list[str]:
    """The hooks that a filter selects, in the model's order, or in that of a list of names.

    Args:
        names: The filter. None selects all but those that cost n_heads residual streams each.
        hooks: All hooks of the model.
        split_qkv_input: The model makes the decoder's split inputs at every pass, so None has them too.

    Raises:
        ValueError: A name that does not exist, or a filter that matches nothing.
    """
    if names is None:
        return [name for name in hooks if not _is_costly(name, split_qkv_input)]
    if isinstance(names, str):
        names = [names]
    if callable(names):
        matching = [name for name in hooks if names(name)]
        if not matching:
            raise ValueError("the names filter matches no hook of this model")
        return matching
    chosen = list(names)
    for name in chosen:
        check_hook_name(name, hooks)
    if not chosen:
        raise ValueError("the names filter is empty")
    return chosen


def _is_costly(name: str, split_qkv_input: bool) -> bool:
    computed_anyway = split_qkv_input and name.endswith("_input") and name.startswith("blocks.")
    return name.endswith(_COSTLY) and not computed_anyway
