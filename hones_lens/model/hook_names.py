"""Hook names, and the hooks that a name, several names or a predicate selects; no match raises."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

HookFunction = Callable[..., Any]  # of a tensor and `hook=`, the HookPoint; what it returns goes on
HookNames = str | Iterable[str] | Callable[[str], bool]
Hook = tuple[HookNames, HookFunction]
NamesFilter = HookNames | None
_BY_HEAD = ("attn.hook_result", "attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input")
_BY_PATCH_PAIR = ("attn.hook_attn_scores", "attn.hook_pattern")


def check_hook_name(name: str, hooks: Collection[str]) -> None:
    """Raise ValueError for a hook that does not exist, naming the nearest that do."""
    if name not in hooks:
        near = difflib.get_close_matches(name, hooks, n=3)
        raise ValueError(f"no hook {name!r}; nearest: {', '.join(near) or 'none'}")


def matching_hooks(names: HookNames, hooks: Collection[str]) -> list[str]:
    """The hooks that a name, several or a predicate select, in the model's order, or in that of a list.

    Args:
        names: What selects them.
        hooks: All hooks of the model.

    Raises:
        ValueError: A name that does not exist, or a filter that matches nothing.
    """
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


def cached_hooks(names: NamesFilter, hooks: Collection[str], split_qkv_input: bool) -> list[str]:
    """The hooks whose activations a cache keeps, as `matching_hooks`, but for the costly ones.

    Costly are those that hold n_heads residual streams each (`attn.hook_result` and the split inputs), and a
    number for each pair of patches (scores and pattern of the vision tower, also in windows). None leaves
    them out. So does a predicate that selects others too, with a warning; one that selects nothing but costly
    hooks has them, as have names.

    Args:
        names: The filter.
        hooks: All hooks of the model.
        split_qkv_input: The model makes the decoder's split inputs at every pass, so they are not costly.

    Raises:
        ValueError: As `matching_hooks`.
    """
    matching = list(hooks) if names is None else matching_hooks(names, hooks)
    if names is not None and not callable(names):
        return matching
    cheap = [name for name in matching if not _is_costly(name, split_qkv_input)]
    left_out = len(matching) - len(cheap)
    if names is None or not cheap or not left_out:
        return cheap or matching
    kinds = dict.fromkeys(_kind(name) for name in matching if _is_costly(name, split_qkv_input))
    warnings.warn(
        f"the names filter selects {left_out} costly hooks beside others, which are left out of the cache: "
        f"{', '.join(kinds)}; to have them, give names, or a predicate that selects them alone",
        stacklevel=4,
    )
    return cheap


def _is_costly(name: str, split_qkv_input: bool) -> bool:
    in_vision = name.startswith("vision")
    computed_anyway = split_qkv_input and name.endswith("_input") and not in_vision
    return (name.endswith(_BY_HEAD) and not computed_anyway) or (in_vision and name.endswith(_BY_PATCH_PAIR))


def _kind(name: str) -> str:
    return ("vision … " if name.startswith("vision") else "") + "attn." + name.rpartition(".")[2]
