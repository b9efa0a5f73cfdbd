"""Caches of activations: the hooks that fill one, and `VLMCache`, which knows each row's images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from hones_lens.model import deepstack
from hones_lens.model.hook_names import HookFunction
from hones_lens.model.names import did_you_mean
from hones_lens.model.post_norms import scale_hook, weighted
from hones_lens.model.typed import to_list

_BY_HEAD_PAIR = ("hook_attn_scores", "hook_pattern")


def caching_hooks(
    store: dict[str, Tensor],
    device: torch.device | str | None,
    pos_slice: Any,
    remove_batch_dim: bool,
) -> tuple[HookFunction, HookFunction]:
    """A forward hook that stores activations by name, and a backward one for `*_grad`.

    What is stored is a detached, contiguous copy: no later edit in place changes it, and it keeps nothing
    else in memory.

    Args:
        store: Filled with the activations.
        device: Device of the stored activations; None leaves them where they are.
        pos_slice: Positions of the decoder's activations to keep.
        remove_batch_dim: Drop the decoder's batch axis, and the vision tower's image axis where
            it is 1.

    Raises:
        ValueError: When run: a batch to drop that is larger than 1.
        IndexError: When run: a position that does not exist, or no positions.
    """
    pos_slicer = Slice.unwrap(pos_slice)

    def store_activation(tensor: Tensor, name: str, suffix: str) -> None:
        activation = tensor.detach()
        if not _has_image_axis(name):
            axis = 2 if name.endswith(_BY_HEAD_PAIR) else 1
            activation = pos_slicer.apply(activation, dim=axis)
            if not activation.shape[axis]:
                raise IndexError(
                    f"pos_slice {pos_slicer.slice} selects none of {tensor.shape[axis]} positions"
                )
        activation = activation.to(device=device, copy=True, memory_format=torch.contiguous_format)
        store[name + suffix] = _without_batch(name, activation) if remove_batch_dim else activation

    def forward_hook(tensor: Tensor, hook: HookPoint) -> None:
        store_activation(tensor, str(hook.name), "")

    def backward_hook(tensor: Tensor, hook: HookPoint) -> None:
        store_activation(tensor, str(hook.name), "_grad")

    return forward_hook, backward_hook


class VLMCache(ActivationCache):
    """TransformerLens's `ActivationCache`, which also knows the images of each row.

    The decoder's entries have the batch as their first axis. Those of the vision tower and projector, and
    `hook_image_embed`, list the images of all rows, [image token …], or, where images differ in size, the
    tokens of all images, [image_token …]; methods that select rows select these rows' images there. With
    `run_with_cache(pos_slice=…)` all entries of the decoder have these positions, among which methods count.

    Args:
        cache_dict: Activations by hook name.
        model: The model that they are from.
        image_tokens: Number of tokens of every image, by row (`VLMInputs.image_tokens`).
        has_batch_dim: Whether the decoder's entries have a batch axis; without it there is one row.
        tower_entries: How many of the vision tower's images each image is (`VLMInputs.tower_entries`);
            default: one.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        image_tokens: Sequence[Sequence[int]],
        has_batch_dim: bool = True,
        tower_entries: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self.image_tokens = tuple(tuple(row) for row in image_tokens)
        entries = [[1] * len(row) for row in self.image_tokens] if tower_entries is None else tower_entries
        self.tower_entries = tuple(tuple(row) for row in entries)

    def _batch_size(self) -> int:
        return len(self.image_tokens)

    def remove_batch_dim(self, batch_size: int | None = None) -> VLMCache:
        """Drop the batch axis, and the vision tower's image axis where the row has one image.

        Args:
            batch_size: Not needed, since the cache knows it; another number raises.

        Raises:
            ValueError: More rows than one.
        """
        if not self.has_batch_dim:
            logging.warning("Tried removing batch dimension after already having removed it.")
            return self
        rows = self._batch_size()
        if rows != 1 or batch_size not in (None, rows):
            raise ValueError(
                f"can't remove the batch axis of a cache of {rows} rows"
                + (f", given as {batch_size}" if batch_size not in (None, rows) else "")
            )
        for name, entry in self.cache_dict.items():
            self.cache_dict[name] = _without_batch(name, entry)
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> VLMCache:
        """A cache of some rows, with the vision tower's entries of their images; the entries are copies.

        Args:
            batch_slice: An index, a (start, stop, step), a slice, or a list, array or tensor of indices. A
                single index drops the batch axis, and the image axis where the row has one image.

        Raises:
            ValueError: A cache without a batch axis, or an entry that does not have this batch.
            IndexError: A row that does not exist, or no rows.
        """
        batch_slice = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if not self.has_batch_dim:
            if batch_slice.mode == "identity":
                return VLMCache(
                    dict(self.cache_dict), self.model, self.image_tokens, False, self.tower_entries
                )
            raise ValueError("the cache has no batch axis to take rows from")
        rows = batch_slice.apply(torch.arange(self._batch_size())).reshape(-1)
        if not len(rows):
            raise IndexError(f"{batch_slice.slice} selects none of the cache's {self._batch_size()} rows")
        taken = {name: self._take_rows(name, entry, rows) for name, entry in self.cache_dict.items()}
        numbers: list[int] = to_list(rows)
        tokens, entries = ([of[row] for row in numbers] for of in (self.image_tokens, self.tower_entries))
        cache = VLMCache(taken, self.model, tokens, tower_entries=entries)
        return cache.remove_batch_dim() if batch_slice.mode == "int" else cache

    def _take_rows(self, name: str, entry: Tensor, rows: Tensor) -> Tensor:
        if not _has_image_axis(name):
            if len(entry) != self._batch_size():
                raise ValueError(
                    f"{name} has {len(entry)} rows; the cache is of a batch of {self._batch_size()}"
                )
            return entry[rows.to(entry.device)]
        sizes = self._sizes(name, entry)
        parts = torch.split(torch.arange(len(entry)), [sum(row) for row in sizes])
        index = torch.cat([parts[row] for row in to_list(rows)])
        return entry[index.to(entry.device)]

    def _sizes(self, name: str, entry: Tensor) -> Sequence[Sequence[int]]:
        """How much of the entry's first axis each image has, by row."""
        for sizes in (self.tower_entries, self.image_tokens):
            if sum(map(sum, sizes)) == len(entry):
                return sizes
        images, tokens = sum(map(sum, self.tower_entries)), sum(map(sum, self.image_tokens))
        raise ValueError(
            f"{name} has {len(entry)} entries; the cache is of {images} images, {tokens} tokens in all"
        )

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """As in TransformerLens, of a cache that has all components.

        With DeepStack, `all` has what pictures write behind each layer, too: `0_deepstack` comes behind
        `0_mlp_out`.

        Raises:
            ValueError: Another `mode`.
            KeyError: A component that the cache lacks, the embedding included where `mode` is `all`.
        """
        if mode not in (modes := ("all", "mlp", "attn")):
            raise ValueError(f"unknown mode {mode!r}; valid: {', '.join(modes)}{did_you_mean(mode, modes)}")
        if mode == "all" and incl_embeds:
            self._require_embed("; incl_embeds=False leaves it out")
        decomposed: Any = super().decompose_resid(
            layer, mlp_input, mode, apply_ln, pos_slice, incl_embeds, return_labels=True
        )
        stack, labels = decomposed
        if mode == "all":
            stack, labels = deepstack.with_parts(self, stack, labels, layer, mlp_input, apply_ln, pos_slice)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """As in TransformerLens, of a cache that has all components; KeyError where it lacks one.

        With DeepStack, what pictures write behind each layer comes last: `0_deepstack`, `1_deepstack`, ….
        """
        self._require_embed("")
        decomposed: Any = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, apply_ln, pos_slice, True, project_output_onto
        )
        stack, labels = decomposed
        stack, labels = deepstack.with_parts(
            self, stack, labels, layer, mlp_input, apply_ln, pos_slice, project_output_onto
        )
        return (stack, labels) if return_labels else stack

    # -- norms behind attention and MLP ----------------------------------------------------------

    def stack_head_results(self, *args: Any, **options: Any) -> Any:
        """As in TransformerLens: what each head adds to the stream, also where a norm is behind attention.

        There it is the head's `hook_result` times that norm's weight over its scale; `hook_result` itself is
        what the head writes before.

        Raises:
            KeyError: The norm's scale is not in the cache.
        """
        blocks = self.model.blocks
        if all(scale_hook(block, layer, "attn") is None for layer, block in enumerate(blocks)):
            return super().stack_head_results(*args, **options)
        added = VLMCache(
            dict(self.cache_dict), self.model, self.image_tokens, self.has_batch_dim, self.tower_entries
        )
        added._ensure_head_results()
        for layer, block in enumerate(blocks):
            if (name := scale_hook(block, layer, "attn")) is None:
                continue
            result = f"blocks.{layer}.attn.hook_result"
            written, scale = added.cache_dict[result], self._post_scale(name)
            added.cache_dict[result] = weighted(block, "attn", written) / scale[..., None].to(written)
        return ActivationCache.stack_head_results(added, *args, **options)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """As in TransformerLens: what each neuron adds to the stream, also where a norm is behind the MLP.

        Raises:
            KeyError: The norm's scale is not in the cache.
        """
        block, onto = self.model.blocks[layer], project_output_onto
        name = scale_hook(block, layer, "mlp")
        if name is None:
            return super().get_neuron_results(layer, neuron_slice, pos_slice, onto)
        pos_slice = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        onto = None if onto is None else weighted(block, "mlp", onto.movedim(0, -1)).movedim(-1, 0)
        results = super().get_neuron_results(layer, neuron_slice, pos_slice, onto)
        results = weighted(block, "mlp", results) if onto is None else results
        scale = pos_slice.apply(self._post_scale(name), dim=-2).to(results)
        return results / (scale if onto is not None and onto.ndim == 1 else scale[..., None])

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Slice,
        neuron_slice: Slice,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        names = [scale_hook(block, i, "mlp") for i, block in enumerate(self.model.blocks[:layer])]
        if all(name is None for name in names):
            return super()._stack_neuron_results_apply_ln_projected(
                layer, pos_slice, neuron_slice, project_2d, mlp_input
            )
        if self._uses_ln_centering(layer):
            raise ValueError("a norm behind the MLP together with a LayerNorm is not handled: apply_ln=False")
        scale = self._get_cached_ln_scale(layer, mlp_input, pos_slice)
        results = [self.get_neuron_results(i, neuron_slice, pos_slice, project_2d) for i in range(layer)]
        return (torch.cat(results, dim=-2) / scale[..., None]).movedim(-2, 0)

    def _post_scale(self, name: str) -> Tensor:
        if (scale := self.cache_dict.get(name)) is None:
            raise KeyError(f"{name} is not in this cache: what is written before that norm is divided by it")
        return scale

    def _require_embed(self, hint: str) -> None:
        if not self.has_embed:
            raise KeyError(
                f"hook_embed is not in this cache, so its components don't add up to the stream{hint}"
            )

    def _get_cached_ln_scale(
        self, layer: int | None, mlp_input: bool, pos_slice: Slice, batch_slice: Slice | None = None
    ) -> Tensor:
        name = f"blocks.{layer}.ln{2 if mlp_input else 1}.hook_scale"
        entry = self.cache_dict.get(name)
        if entry is not None and entry.ndim > 2 + self.has_batch_dim:
            raise ValueError(
                f"{name} is by head, since the split inputs (attn.hook_q_input, …) ran: cache without them"
            )
        return super()._get_cached_ln_scale(layer, mlp_input, pos_slice, batch_slice)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """As in TransformerLens, for a stack that has the rows and positions of the norm's scale.

        Raises:
            ValueError: Other rows or positions, which would be broadcast: give the `pos_slice` and
                `batch_slice` that the stack was made with.
        """
        layer = self.model.cfg.n_layers if layer in (None, -1) else layer
        pos_slice = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        batch_slice = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if not (recompute_ln and layer == self.model.cfg.n_layers):
            sliced = residual_stack[..., :1]  # for its shape
            sliced = batch_slice.apply(sliced, dim=1) if has_batch_dim else sliced
            scale = self._get_cached_ln_scale(layer, mlp_input, pos_slice, batch_slice)
            given, kept = tuple(sliced.shape[1:-1]), tuple(scale.shape[:-1])
            one_row = (1, *given) == kept if self.has_batch_dim else given == (1, *kept)
            if given != kept and not one_row:
                raise ValueError(
                    f"a stack of [rows, positions] {list(given)} does not fit the norm's scale {list(kept)}: "
                    "give the pos_slice and batch_slice that the stack was made with"
                )
        return super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )


def _has_image_axis(name: str) -> bool:
    """Whether an entry's first axis is over images or their tokens, instead of over the batch."""
    return name.startswith("vision") or name.removesuffix("_grad") == "hook_image_embed"


def _without_batch(name: str, activation: Tensor) -> Tensor:
    """An activation of one row without its batch axis; without its image axis, where that is 1."""
    if _has_image_axis(name):
        return activation[0] if activation.ndim > 2 and len(activation) == 1 else activation
    if len(activation) != 1:
        raise ValueError(f"can't remove the batch axis of {name}: its size is {len(activation)}")
    return activation[0]
