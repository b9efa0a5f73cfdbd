"""Arms: interventions that a sweep runs side by side, each as the hooks that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.interventions import HeadEdit, Hook, Scale
from hones_lens.model import takes_iterables


class ForkPoint(IntEnum):
    """The points in a block from which a fork can start."""

    BLOCK = 0
    Z = 1
    MID = 2
    POST = 3


# By the lowest hook that a fork has there; elsewhere it starts from the block.
_FORK_POINTS = {
    "attn.hook_z": ForkPoint.Z,
    "ln1_post": ForkPoint.Z,
    "hook_attn_out": ForkPoint.MID,
    "hook_resid_mid": ForkPoint.MID,
    "ln2": ForkPoint.MID,
    "mlp": ForkPoint.MID,
    "mlp.hook_post": ForkPoint.POST,
    "ln2_post": ForkPoint.POST,
    "hook_mlp_out": ForkPoint.POST,
    "hook_deepstack": ForkPoint.POST,
    "hook_resid_post": ForkPoint.POST,
}
HookFunction = Callable[..., Any]
_TOKEN_PAIR_HOOKS = ("attn.hook_attn_scores", "attn.hook_pattern")


class Arm:
    """One intervention: the hooks that make it; none at all is the clean model.

    Attributes:
        hooks: From the lowest layer upwards.
        start: Layer and fork point of the lowest one; None where a hook is not in a decoder block.
    """

    def __init__(self, hooks: Iterable[Hook] = ()):
        hooks = tuple(hooks)
        points = [fork_point_of(name) for name, _ in hooks]
        self._points = sorted(point for point in points if point is not None)
        self.start, self.hooks = None, hooks
        if hooks and len(self._points) == len(hooks):
            self.start = self._points[0]
            self.hooks = tuple(sorted(hooks, key=lambda hook: fork_point_of(hook[0]) or (0, ForkPoint.BLOCK)))

    @property
    def is_position_wise(self) -> bool:
        """Whether every hook edits each token by itself, so that the tokens may come in portions."""
        return all(
            getattr(fn, "position_wise", False) and not name.endswith(_TOKEN_PAIR_HOOKS)
            for name, fn in self.hooks
        )

    @property
    def shortcut(self) -> HeadEdit | Scale | None:
        """What the lowest hook changes, where only the difference has to be computed there."""
        if self.start is None:
            return None
        if any(layer == self.start[0] for layer, _ in self._points[1:]):
            return None
        name, first = self.hooks[0]
        if isinstance(first, HeadEdit):
            return None if first.single_head is None or first.last_position_only else first
        if isinstance(first, Scale) and name.endswith("mlp.hook_post") and first.axis in (-1, 2):
            return first
        return None

    def late(self) -> Arm | None:
        """For an arm that changes a head from the end of the prompt on: the same at all positions."""
        if len(self.hooks) != 1:
            return None
        name, edit = self.hooks[0]
        if isinstance(edit, HeadEdit) and edit.last_position_only and edit.single_head is not None:
            return Arm([(name, replace(edit, last_position_only=False))])
        return None

    @property
    def group(self) -> tuple[tuple[int, ForkPoint] | None, type | None, Callable[[Tensor], Tensor] | None]:
        """Arms of one group can be rows of one batch."""
        edit = self.shortcut
        return (self.start, type(edit), edit.replacement if isinstance(edit, HeadEdit) else None)

    def __str__(self) -> str:
        return ", ".join(str(fn) if isinstance(fn, (HeadEdit, Scale)) else name for name, fn in self.hooks)


def fork_point_of(name: object) -> tuple[int, ForkPoint] | None:
    """Layer and fork point of a hook; None where it is not in a decoder block."""
    if not isinstance(name, str) or not name.startswith("blocks."):
        return None
    _, layer, rest = name.split(".", 2)
    return int(layer), _FORK_POINTS.get(rest, _FORK_POINTS.get(rest.split(".")[0], ForkPoint.BLOCK))


@takes_iterables
def stack_hooks(parts: Sequence[tuple[int, Sequence[Hook]]]) -> list[Hook]:
    """Hooks for a batch whose rows belong to several interventions.

    Args:
        parts: For each intervention, in the order of the rows: its number of rows, and its hooks.
    """
    counts = [count for count, _ in parts]
    by_name: dict[str, list[list[HookFunction]]] = {}
    for i, (_, hooks) in enumerate(parts):
        for name, fn in hooks:
            by_name.setdefault(name, [[] for _ in parts])[i].append(fn)

    def dispatch(each: list[list[HookFunction]]) -> HookFunction:
        def to_own_rows(x: Tensor, hook: HookPoint) -> Tensor:
            out: list[Tensor] = []
            for part, fns in zip(torch.split(x, counts), each, strict=True):
                for fn in fns:
                    new = fn(part, hook)
                    part = part if new is None else new
                out.append(part)
            return torch.cat(out)

        firsts = [fns[0] for fns in each if len(fns) == 1]
        edits = [fn for fn in firsts if isinstance(fn, HeadEdit) and fn.single_head is not None]
        if len(edits) < len(each) or len({edit.replacement for edit in edits}) > 1:
            return to_own_rows
        heads = torch.tensor([edit.single_head for edit in edits])
        return replace(edits[0], head=heads.repeat_interleave(torch.tensor(counts)))

    return [(name, dispatch(each)) for name, each in by_name.items()]
