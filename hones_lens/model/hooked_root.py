"""`HookedRoot`: a model's hooks and caches, as in TransformerLens, but hooks that can't run raise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint, LensHandle

from hones_lens.model.answers import loss_of
from hones_lens.model.caching import VLMCache, caching_hooks
from hones_lens.model.config import VLMConfig
from hones_lens.model.hook_names import (
    Hook,
    HookFunction,
    HookNames,
    NamesFilter,
    cached_hooks,
    check_hook_name,
    matching_hooks,
)
from hones_lens.model.hook_requests import HookRequest, check_all_ran
from hones_lens.model.inputs import VLMInputs
from hones_lens.model.nn.hook_point import HookScope, ScopedHook, acting_functions, is_hooked, remove_hook


class HookedRoot(HookedRootModule):
    """A root module whose hooks belong to the context that set them, and raise where they can't run.

    Hooks of `hooks`, `run_with_hooks` and `run_with_cache` act only in the thread (or task of asyncio) that
    set them; calls in other threads at the same time are as without. `contextvars.copy_context().run` takes
    them along to another thread. Hooks of `add_hook`, and those left by `reset_hooks_end=False`, are part of
    the model: they act in every thread, until `reset_hooks`.
    """

    cfg: VLMConfig

    def __init__(self) -> None:
        super().__init__()
        self._scopes: list[HookScope] = []

    def check_hook_name(self, name: str) -> None:
        """Raise ValueError for a hook that does not exist, naming the nearest that do."""
        check_hook_name(name, self.hook_dict)

    def hooked_names(self) -> list[str]:
        """Names of the hook points where hooks act in the current context."""
        return [name for name, point in self.hook_dict.items() if is_hooked(point)]

    @abstractmethod
    def as_inputs(self, model_input: Any) -> VLMInputs:
        """What the model is given, as VLMInputs with the images of each row."""

    def _matching(self, names: HookNames) -> list[str]:
        return matching_hooks(names, self.hook_dict)

    # -- what has run ----------------------------------------------------------------------------

    def note_run(self) -> None:
        """Tell the open `hooks` blocks that the model runs."""
        for scope in tuple(self._scopes):
            if scope.is_active:
                scope.ran_here = True
            else:
                scope.ran_elsewhere = True

    def note_skipped(self, part: str, why: str) -> None:
        """Tell the open `hooks` blocks of this context why a part of the model does not run."""
        for scope in tuple(self._scopes):
            if scope.is_active:
                scope.skipped[part] = why

    def check_last_positions(self, inputs: VLMInputs) -> None:
        """Check that hooks that edit the last position of a pass (`last_position_only`) find a token there.

        Raises:
            ValueError: A row that is padded on the right, and such a hook; names both.
        """
        if bool(inputs.attention_mask[:, -1].all()):
            return
        for name, point in self.hook_dict.items():
            if any(getattr(function, "last_position_only", False) for function in acting_functions(point)):
                inputs.require_left_padding(f"edit the last position at {name}")

    # -- hooks -----------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[Any]:
        """Hooks for the runs inside the `with` block, in this thread.

        Args:
            fwd_hooks: Pairs of a hook's name (or several, or a predicate) and a function of the activation
                and `hook=`, which returns a new activation or None.
            bwd_hooks: The same for gradients. They belong to the runs inside the block, whose backward pass
                may come after it.
            reset_hooks_end: False keeps the hooks until `reset_hooks`; they then act in every thread.
            clear_contexts: Also clear the `ctx` of all hook points at the end.

        Raises:
            ValueError: A name that does not exist, or a filter that matches nothing.
            RuntimeError: At the end: the model ran, but a hook asked for by name never did, or none of those
                that a predicate selects (a vision hook on text alone, a block below `start_at_layer`, a
                backward hook where no gradient is recorded); or it ran in other threads only.
        """
        scope = HookScope()
        requests = [self._request("fwd", *pair, scope) for pair in fwd_hooks]
        requests += [self._request("bwd", *pair, scope) for pair in bwd_hooks]
        handles: list[tuple[HookPoint, LensHandle]] = []
        self._scopes.append(scope)
        try:
            with scope.opened():
                level = sum(other.is_active for other in tuple(self._scopes))
                for request in requests:
                    handles += request.add(self.hook_dict, level)
                yield self
        finally:
            self._scopes.remove(scope)
            scope.lasting = not reset_hooks_end
            for point, handle in handles if reset_hooks_end else ():
                remove_hook(point, handle)
            if reset_hooks_end and clear_contexts:
                self.clear_contexts()
        check_all_ran(requests, scope, self)

    def _request(
        self, direction: Literal["fwd", "bwd"], names: HookNames, function: HookFunction, scope: HookScope
    ) -> HookRequest:
        by_predicate = callable(names)
        return HookRequest(tuple(self._matching(names)), by_predicate, direction, ScopedHook(function, scope))

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **forward_options: Any,
    ) -> Any:
        """Run the model forward under hooks; see `hooks` for them and `forward` for the rest."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **forward_options)

    def add_hook(
        self,
        name: HookNames,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a lasting hook, which acts in every thread (see `reset_hooks`); an unknown name raises."""
        for matching in self._matching(name):
            point = self.hook_dict[matching]
            self.check_and_add_hook(point, matching, hook, dir, is_permanent, level, prepend)

    # -- caches ----------------------------------------------------------------------------------

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **forward_options: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            model_args: The model input, as for `forward`.
            names_filter: A hook name, several, or a predicate. Default: every hook that runs, but the costly
                ones: `attn.hook_result` and the split inputs, n_heads residual streams each, and scores and
                pattern of the vision tower. A predicate leaves them out too and warns, unless it selects
                nothing else.
            device: Where to keep the activations; default: where they are.
            remove_batch_dim: Drop the batch axis (of 1), and the vision tower's image axis where it is 1.
            incl_bwd: Also run backward (under `return_type="loss"` or `"both"`) and keep gradients, `*_grad`.
            pos_slice: Keep only these positions of the decoder's activations.
            reset_hooks_end, clear_contexts: As for `hooks`.
            return_cache_object: False gives a dict of the activations in place of the cache.
            forward_options: Passed to `forward`.

        Returns:
            What `forward` returns, and a `VLMCache`, an ActivationCache (typed Any: the method that this one
            overrides is typed to give a dict); tensors are detached copies.

        Raises:
            ValueError: An unknown name, a filter that matches nothing, or a batch to drop that is
                larger than 1.
            RuntimeError: A hook asked for by name never ran, or none that a predicate selects.
        """
        store, fwd_hooks, bwd_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        call: dict[str, Any] = {**dict(zip(("model_input",), model_args, strict=False)), **forward_options}
        inputs_key = "model_input" if call.get("start_at_layer") is None else "inputs"
        if (located := call.get(inputs_key)) is not None:
            call[inputs_key] = located = self.as_inputs(located)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            output = self(*model_args[1:], **call)
            if incl_bwd:
                loss_of(output).backward()
        if not return_cache_object:
            return output, store
        assert located is not None  # or the model would not have run
        return output, VLMCache(
            store, self, located.image_tokens, not remove_batch_dim, located.tower_entries
        )

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Hook], list[Hook]]:
        """The hooks of `run_with_cache`, for `hooks` or `run_with_hooks`.

        Args:
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice: As for `run_with_cache`.
            cache: Filled by the hooks; default: a new dictionary.

        Returns:
            The dictionary, the forward hooks, and the backward hooks (none without `incl_bwd`). Whose the
            images are is not in the dictionary: `VLMCache(dictionary, model, inputs.image_tokens)` knows it.

        Raises:
            ValueError: An unknown name, or a filter that matches nothing.
        """
        store: dict[str, Tensor] = {} if cache is None else cache
        names = cached_hooks(names_filter, self.hook_dict, self.cfg.use_split_qkv_input)
        forward_hook, backward_hook = caching_hooks(store, device, pos_slice, remove_batch_dim)
        # Hooks by a predicate may each fail to run, so long as one does.
        by_predicate = names_filter is None or callable(names_filter)
        selected: list[HookNames] = [set(names).__contains__] if by_predicate else list(names)
        fwd_hooks: list[Hook] = [(name, forward_hook) for name in selected]
        return store, fwd_hooks, [(name, backward_hook) for name in selected] if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> dict[str, Tensor]:
        """Add lasting hooks that fill a dictionary at every run; see `get_caching_hooks`."""
        store, fwd_hooks, bwd_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice
        )
        for names, function in fwd_hooks:
            self.add_hook(names, function)
        for names, function in bwd_hooks:
            self.add_hook(names, function, "bwd")
        return store
