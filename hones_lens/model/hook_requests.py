"""What `HookedVLM.hooks` is asked to add, and the check that it has run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint, LensHandle

from hones_lens.model.nn import hook_point
from hones_lens.model.nn.hook_point import HookScope, ScopedHook


@dataclass(frozen=True, eq=False)
class HookRequest:
    """One hook function at the hook points that its names select.

    Attributes:
        names: The hook points.
        by_predicate: They were selected by a predicate, so one that runs is enough.
        direction: Of activations, or of gradients.
        hook: The function, with notes of its runs.
    """

    names: tuple[str, ...]
    by_predicate: bool
    direction: Literal["fwd", "bwd"]
    hook: ScopedHook

    def add(self, points: Mapping[str, HookPoint], level: int) -> Iterator[tuple[HookPoint, LensHandle]]:
        """Add it to the hook points, one after the other."""
        for name in self.names:
            hook, point = self.hook, points[name]
            if self.direction == "bwd" and not isinstance(point, hook_point.HookPoint):
                # PyTorch runs it, on a GPU in a thread that knows no scope
                hook = ScopedHook(hook.function, ran=hook.ran)
                self.hook.recorded.add(name)
            yield point, point.add_hook(hook, dir=self.direction, level=level)

    def never_ran(self, backward_ran: bool) -> list[str]:
        """Names of the hook points where it should have run and has not.

        Args:
            backward_ran: A backward pass has run: a backward hook that still waits for its gradient counts.
        """
        done = self.hook.ran if backward_ran else self.hook.ran | self.hook.recorded
        missing = [name for name in self.names if name not in done]
        return [] if self.by_predicate and len(missing) < len(self.names) else missing


def check_all_ran(requests: Sequence[HookRequest], scope: HookScope, model: HookedRootModule) -> None:
    """Raise RuntimeError if the model ran and a hook should have run with it but did not; says why.

    Args:
        requests: The hooks of one block.
        scope: The block.
        model: The model that they are at.
    """
    if not (scope.ran_here or scope.ran_elsewhere):
        return
    backward = [request for request in requests if request.direction == "bwd"]
    backward_ran = any(request.hook.ran for request in backward)
    missing = {name for r in requests if r.direction == "fwd" for name in r.never_ran(backward_ran=True)}
    if missing:
        raise RuntimeError(
            f"the model ran, but these hooks never did: {_listed(missing)}{_reason(missing, scope, model)}"
        )
    missing = {name for request in backward for name in request.never_ran(backward_ran)}
    if missing:
        reason = (
            _reason(missing, scope, model) or "; no gradient is recorded there, or none came back to them"
        )
        raise RuntimeError(f"the model ran, but these backward hooks never did: {_listed(missing)}{reason}")


def _listed(names: set[str], most: int = 6) -> str:
    shown = sorted(names)[:most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _reason(names: set[str], scope: HookScope, model: HookedRootModule) -> str:
    """Why they may not have run, as the end of a message; empty where nothing is known."""
    if not scope.ran_here:
        return (
            "; it ran in other threads only, where the hooks of this block don't act: run it in the thread "
            "that opened the block or by contextvars.copy_context().run, or use add_hook"
        )
    replaced = [name for name in names if model.get_submodule(name) is not model.hook_dict[name]]
    if replaced:
        return (
            f"; another module is in the place of {_listed(set(replaced))}: after putting one there, call "
            "model.setup(), and its own hooks get names"
        )
    in_vision = any(name.startswith(("vision", "hook_image_embed")) for name in names)
    in_decoder = any(not name.startswith("vision") for name in names)
    whys = [why for part, why in scope.skipped.items() if (in_vision if part == "vision" else in_decoder)]
    return "".join(f"; {why}" for why in whys)
