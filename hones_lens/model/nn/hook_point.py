"""Hook points whose hooks belong to the context that set them, and what counts their runs."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import transformer_lens.hook_points as tl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SCOPES: ContextVar[tuple[HookScope, ...]] = ContextVar("hook scopes", default=())
_LOCK = threading.Lock()  # around changes of a hook point's lists of hooks


class HookScope:
    """A `with model.hooks(...)` block: its hooks act only in the context that opened it.

    A context (`contextvars`) is a thread, or a task of asyncio; `contextvars.copy_context().run` and
    `asyncio.to_thread` take it along to another thread.

    Attributes:
        lasting: The hooks outlive the block, and then act in every context.
        ran_here, ran_elsewhere: The model ran in this context, or in others, while the block was open.
        skipped: Why a part of the model did not run, by part.
    """

    def __init__(self) -> None:
        self.lasting = False
        self.ran_here = self.ran_elsewhere = False
        self.skipped: dict[str, str] = {}

    @property
    def is_active(self) -> bool:
        """Whether its hooks act in the current context."""
        return self.lasting or self in _SCOPES.get()

    @contextmanager
    def opened(self) -> Generator[None]:
        """Its hooks act in the current context, within the `with` block."""
        _SCOPES.set((*_SCOPES.get(), self))
        try:
            yield
        finally:
            _SCOPES.set(tuple(scope for scope in _SCOPES.get() if scope is not self))


@dataclass(eq=False)
class ScopedHook:
    """A hook function as a hook point calls it: in its scope alone, its results checked and its runs noted.

    Attributes:
        function: The user's function of a tensor and `hook=`.
        scope: Where it acts; None: everywhere.
        ran: Names of the hook points where it has run.
        recorded: Names of those where it waits for a gradient, as a backward hook.
    """

    function: Callable[..., Any]
    scope: HookScope | None = None
    ran: set[str] = field(default_factory=set[str])
    recorded: set[str] = field(default_factory=set[str])

    @property
    def is_active(self) -> bool:
        """Whether it acts in the current context."""
        return self.scope is None or self.scope.is_active

    def __call__(self, tensor: Tensor, hook: tl.HookPoint) -> Tensor | None:
        return self.run(tensor, hook) if self.is_active else None

    def run(self, tensor: Tensor, hook: tl.HookPoint) -> Tensor | None:
        """What the function returns, of the tensor's floating type; None where it returns nothing.

        Raises:
            TypeError: It returns neither a tensor nor None; names the hook point.
            ValueError: It returns another shape.
        """
        self.ran.add(str(hook.name))
        result: object = self.function(tensor, hook=hook)
        if isinstance(result, tuple):  # PyTorch's own backward hooks return a tuple of one
            values = cast("tuple[object, ...]", result)
            result = values[0] if len(values) == 1 else values
        if result is None:
            return None
        if not isinstance(result, Tensor):
            raise TypeError(
                f"the hook at {hook.name} returned {type(result).__name__}; valid: a tensor, "
                "or None to leave the activation as it is"
            )
        if result.shape != tensor.shape:
            raise ValueError(
                f"the hook at {hook.name} returned shape {tuple(result.shape)} for {tuple(tensor.shape)}; "
                "it would be broadcast in silence"
            )
        if result.is_floating_point() and tensor.is_floating_point():
            result = result.to(tensor.dtype)
        return result


@dataclass
class HookHandle(tl.LensHandle):
    """TransformerLens's handle of a hook, with the hook as the hook point calls it."""

    scoped: ScopedHook | None = None


class HookPoint(tl.HookPoint):
    """TransformerLens's hook point, with hooks that belong to a context and backward hooks of its own.

    - Where forward hooks act, they get a copy: an edit in place changes nothing that somebody else holds
      (a cache, the inputs, what autograd has saved).
    - What a hook returns is cast to the activation's floating type.
    - A backward hook gets a copy of the gradient at the value that the forward hooks left. What it returns,
      or has edited in place, goes on through their edits. It belongs to the forward passes that ran while it
      was set, whenever their backward pass comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gradient_hooks: OrderedDict[int, ScopedHook] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        out = super().__call__(x)
        active = [hook for hook in tuple(self._gradient_hooks.values()) if hook.is_active]
        if not active:
            return out
        out = out.clone()  # a node of its own in autograd's graph
        if torch.is_grad_enabled():
            out.requires_grad_()  # where nothing below needs a gradient, the graph begins here
            for hook in active:
                hook.recorded.add(str(self.name))
            out.register_hook(partial(self._edited_gradient, active))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x, or a copy where forward hooks act."""
        return x.clone() if any(map(_acts, tuple(self.fwd_hooks))) else x

    def _edited_gradient(self, hooks: Sequence[ScopedHook], gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # autograd hands one tensor to both terms of a sum
        for hook in hooks:
            result = hook.run(gradient, self)
            gradient = gradient if result is None else result
        return gradient

    def add_hook(
        self,
        hook: tl.HookFunction | ScopedHook,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> tl.LensHandle:
        """Add a hook, as in TransformerLens; one without a scope acts in every context."""
        scoped = hook if isinstance(hook, ScopedHook) else ScopedHook(hook)
        with _LOCK:
            if dir == "bwd":
                removable, hooks = RemovableHandle(self._gradient_hooks), self.bwd_hooks
                self._gradient_hooks[removable.id] = scoped
                if prepend:
                    self._gradient_hooks.move_to_end(removable.id, last=False)
            else:
                plain = super().add_hook(scoped, dir, is_permanent, level, prepend, alias_names)
                removable, hooks = plain.hook, self.fwd_hooks
                hooks.pop(0 if prepend else -1)
            handle = HookHandle(removable, is_permanent, level, scoped.function, scoped)
            hooks.insert(0 if prepend else len(hooks), handle)
        return handle

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks, as in TransformerLens."""
        with _LOCK:
            super().remove_hooks(dir, including_permanent, level)

    def layer(self) -> int:
        """The layer that the hook is in: of the decoder, or of the vision tower for a hook there.

        Raises:
            ValueError: A hook that belongs to no layer.
        """
        found = re.search(r"(?:^|\.)blocks\.(\d+)\.", self.name or "")
        if found is None:
            raise ValueError(f"the hook {self.name} belongs to no layer")
        return int(found[1])


def _acts(handle: tl.LensHandle) -> bool:
    return not isinstance(handle, HookHandle) or handle.scoped is None or handle.scoped.is_active


def is_hooked(*points: nn.Module) -> bool:
    """Whether hooks act at any of these in this context, or another module (an SAE) is in one's place."""
    return any(
        not isinstance(point, tl.HookPoint) or any(map(_acts, (*point.fwd_hooks, *point.bwd_hooks)))
        for point in points
    )


def acting_functions(point: nn.Module) -> list[Callable[..., Any]]:
    """The user's functions of the forward hooks that act at a point in this context."""
    handles = tuple(point.fwd_hooks) if isinstance(point, tl.HookPoint) else ()
    hooks = [handle.scoped for handle in handles if isinstance(handle, HookHandle)]
    return [hook.function for hook in hooks if hook is not None and hook.is_active]


def remove_hook(point: tl.HookPoint, handle: tl.LensHandle) -> None:
    """Remove one hook, if it is still there."""
    with _LOCK:
        handle.hook.remove()
        for hooks in (point.fwd_hooks, point.bwd_hooks):
            hooks[:] = [other for other in hooks if other is not handle]
