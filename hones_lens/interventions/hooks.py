"""Interventions as hook factories: each returns `(name, fn)` for `run_with_hooks` or `hooks`.

No hook function changes its input in place, and none is silently a no-op: an impossible edit raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hones_lens.interventions.positions import PromptMask
from hones_lens.interventions.token_groups import Group
from hones_lens.model import VLMInputs, did_you_mean, require_choice, takes_iterables, to_list

Hook = tuple[str, Callable[..., Any]]
F = TypeVar("F", bound=Any)
_STREAMS = ("pre", "mid", "post")


def position_wise(fn: F) -> F:
    """Mark a hook function that edits each token by itself, whichever position or row it has.

    A sweep gives such a function the tokens in portions of its own (`engine.measure`): the prompt, then parts
    of the answer, in batches of equal lengths. Others see whole passes. `HeadEdit` and `Scale` are such.
    """
    fn.position_wise = True
    return fn


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """A hook function on z [batch pos head d_head] that changes one head.

    Attributes:
        name: The hook.
        head: One head for all rows, or one head for each row of the batch.
        replacement: Maps z to the replacement of every head, of the same shape, token by token; only the
            chosen head is replaced.
        description: For `str`.
        last_position_only: Edit only the last position of a pass: under `generate`, from the end of the
            prompt on.
    """

    name: str
    head: int | Sequence[int] | Tensor
    replacement: Callable[[Tensor], Tensor]
    description: str
    last_position_only: bool = False

    def __call__(
        self, z: Float[Tensor, "batch pos head d_head"], hook: object
    ) -> Float[Tensor, "batch pos head d_head"]:
        n_heads = z.shape[2]
        heads = torch.as_tensor(self.head, device=z.device)
        heads = heads.expand(len(z)) if heads.ndim == 0 else heads
        if heads.shape != (len(z),):
            raise ValueError(f"{self.name}: {len(heads)} heads for a batch of {len(z)} rows")
        self.check(heads, n_heads)
        chosen = torch.nn.functional.one_hot(heads, n_heads).bool()[:, None, :, None]
        if self.last_position_only:
            chosen = chosen & (torch.arange(z.shape[1], device=z.device) == z.shape[1] - 1)[:, None, None]
        return torch.where(chosen, self.replacement(z), z)

    @property
    def position_wise(self) -> bool:
        """Whether it treats all positions and rows alike."""
        return self.single_head is not None and not self.last_position_only

    @property
    def single_head(self) -> int | None:
        """The head, if all rows have the same; else None."""
        heads = torch.as_tensor(self.head)
        return int(heads) if heads.ndim == 0 else None

    def check(self, heads: Tensor, n_heads: int) -> None:
        """Raise ValueError for heads that a layer does not have."""
        if n_heads == 1 and self.replacement is _mean_of_others:
            raise ValueError(f"{self.name}: with one head there are no other heads to take the mean of")
        if int(heads.min()) < 0 or int(heads.max()) >= n_heads:
            raise ValueError(f"{self.name}: heads {to_list(heads)} are not all in 0 … {n_heads - 1}")

    def __str__(self) -> str:
        return f"{self.description} of head {self.head} at {self.name}"


@takes_iterables
def replace_with_other_heads_mean(
    layer: int, head: int | Sequence[int] | Tensor, positions: str = "all"
) -> Hook:
    """Replace one head's output by the mean of the layer's other heads, everywhere (HONES eq. H1).

    `z[p, h] ← Σ_{h' ≠ h} z[p, h'] / (H − 1)` at every position p, prompt and generated alike. This
    is not mean ablation over a data set.

    Args:
        layer: Decoder layer.
        head: One head for all rows, or one head for each row of the batch.
        positions: `all`, or `last`: only at the end of the prompt and in what is generated.

    Raises:
        ValueError: Other positions. When run: the layer has a single head, or no such head, or a count
            of heads that is not the batch.
    """
    require_choice("positions", positions, ("all", "last"))
    name = f"blocks.{layer}.attn.hook_z"
    description = "the other heads' mean instead"
    return name, HeadEdit(name, head, _mean_of_others, description, last_position_only=positions == "last")


def _mean_of_others(z: Tensor) -> Tensor:
    # Sums over the heads before and after: a head's own value, even an infinite one, does not enter.
    values = z.float()
    zeros = torch.zeros_like(values[:, :, :1])
    before = torch.cat((zeros, values[:, :, :-1]), dim=2).cumsum(2)
    after = torch.cat((values[:, :, 1:], zeros), dim=2).flip(2).cumsum(2).flip(2)
    return ((before + after) / (z.shape[2] - 1)).to(z.dtype)


@takes_iterables
def zero_head(layer: int, head: int | Sequence[int] | Tensor) -> Hook:
    """Set one head's output z to zero, at all positions.

    Args:
        layer: Decoder layer.
        head: One head for all rows, or one head for each row of the batch.

    Raises:
        ValueError: When run: no such head, or a count of heads that is not the batch.
    """
    name = f"blocks.{layer}.attn.hook_z"
    return name, HeadEdit(name, head, torch.zeros_like, "zero instead")


@takes_iterables
def zero(name: str, index: Sequence[int] | Tensor, axis: int = -1) -> Hook:
    """Set entries of one axis to zero at all positions, e.g. neurons of a layer (HONES eq. H4).

    Raises:
        ValueError: An empty index.
    """
    return scale(name, index, 0.0, axis)


@dataclass(frozen=True, eq=False)
class Scale:
    """A hook function that multiplies entries of one axis; see `scale`."""

    name: str
    index: Tensor
    factor: Tensor
    axis: int

    @property
    def position_wise(self) -> bool:
        """Whether it treats all positions and rows alike."""
        return self.axis not in (0, 1)

    def multiplier(self, x: Tensor) -> Tensor:
        """The factor of every entry of the axis, [size of the axis].

        If there is one factor per entry and x has a lower precision, the factors keep theirs: in bfloat16 a
        factor of 1.003 would be 1.
        """
        dtype = torch.promote_types(x.dtype, self.factor.dtype) if self.factor.ndim else x.dtype
        ones = torch.ones(x.shape[self.axis], device=x.device, dtype=dtype)
        return ones.index_put((self.index.to(x.device),), self.factor.to(x.device, dtype))

    def __call__(self, x: Tensor, hook: object) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        multiplier = self.multiplier(x).view(shape)
        return (x * multiplier).masked_fill(multiplier == 0, 0).to(x.dtype)

    def __str__(self) -> str:
        n, first = len(self.index), int(self.index[0])
        entries = f"entry {first}" if n == 1 else f"{n} entries, the first {first},"
        return f"{entries} times {to_list(self.factor) if n == 1 else 'a factor'} at {self.name}"


@takes_iterables
def scale(name: str, index: Sequence[int] | Tensor, factor: float | Tensor, axis: int = -1) -> Hook:
    """Multiply entries of one axis by a factor, or by one factor each (HONES eq. H5: 1 + a_i).

    Args:
        name: Hook to act on.
        index: Entries of the axis, at least one.
        factor: A number, or [len(index)] numbers.
        axis: Which axis of the activation; −1 for neurons, 2 for the heads of z.

    Raises:
        ValueError: An empty or negative index, or a count of factors that differs.
    """
    chosen = torch.as_tensor(index)
    if chosen.numel() == 0:
        raise ValueError(f"{name}: no entries to scale")
    if int(chosen.min()) < 0:
        raise ValueError(f"{name}: entry {int(chosen.min())} is negative")
    factors = torch.as_tensor(factor)
    if factors.ndim and factors.shape != chosen.shape:
        raise ValueError(f"{name}: {len(factors)} factors for {len(chosen)} entries")
    return name, Scale(name, chosen, factors, axis)


@takes_iterables
def mean_ablate(name: str, mean: Tensor, index: Sequence[int] | Tensor, axis: int = -1) -> Hook:
    """Set entries of one axis to given means, e.g. a neuron's mean over a data set.

    Args:
        name: Hook to act on.
        mean: Broadcastable to the activation.
        index: Entries of the axis.
        axis: Which axis.

    Raises:
        ValueError: An empty index.
    """
    chosen = torch.as_tensor(index)
    if chosen.numel() == 0:
        raise ValueError(f"{name}: no entries to ablate")

    def set_mean(x: Tensor, hook: object) -> Tensor:
        mask = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
        mask = mask.index_fill(0, chosen.to(x.device), True)
        shape = [1] * x.ndim
        shape[axis] = -1
        return torch.where(mask.view(shape), mean.to(x.device, x.dtype), x)

    return name, position_wise(set_mean) if mean.ndim <= 1 else set_mean


def patch(name: str, value: Tensor, positions: Bool[Tensor, "batch pos"] | None = None) -> Hook:
    """Replace the activation by another run's, at some positions or at all.

    Raises:
        ValueError: When run: a shape that differs, or a mask that selects nothing.
    """

    def patch_activation(x: Tensor, hook: object) -> Tensor:
        if x.shape != value.shape:
            raise ValueError(
                f"{name}: patch of shape {tuple(value.shape)} for an activation {tuple(x.shape)}"
            )
        return torch.where(_broadcast_mask(positions, x, name), value.to(x.device, x.dtype), x)

    return name, patch_activation


def add(name: str, vector: Tensor, positions: Bool[Tensor, "batch pos"] | None = None) -> Hook:
    """Add a vector (broadcast over the leading axes), at some positions or at all.

    Raises:
        ValueError: When run: a mask that selects nothing or does not fit.
    """

    def add_vector(x: Tensor, hook: object) -> Tensor:
        return torch.where(_broadcast_mask(positions, x, name), x + vector.to(x.device, x.dtype), x)

    return name, position_wise(add_vector) if positions is None and vector.ndim <= 1 else add_vector


def _broadcast_mask(positions: Tensor | None, x: Tensor, name: str) -> Tensor:
    if positions is None:
        return torch.ones((1,) * x.ndim, dtype=torch.bool, device=x.device)
    if positions.shape != x.shape[:2]:
        raise ValueError(f"{name}: mask of shape {tuple(positions.shape)} for positions {tuple(x.shape[:2])}")
    if not bool(positions.any()):
        raise ValueError(f"{name}: the mask selects no position")
    return positions.to(x.device).view(*positions.shape, *(1,) * (x.ndim - 2))


def block_attention(
    layer: int,
    queries: Bool[Tensor, "batch pos"],
    keys: Bool[Tensor, "batch pos"],
    *,
    spare_self: bool = False,
) -> Hook:
    """Keep some queries from attending to some keys in one layer (scores set to −∞).

    Under `generate`, a new token belongs to the groups that contain its row's last prompt token.

    Args:
        layer: Decoder layer.
        queries, keys: Masks over the prompts.
        spare_self: A query that would be left without any key may still attend to itself.

    Raises:
        ValueError: An empty group. When run: a query left without any key, or masks of other prompts.
    """
    name = f"blocks.{layer}.attn.hook_attn_scores"
    for side, mask in (("query", queries), ("key", keys)):
        if not bool(mask.any()):
            raise ValueError(f"{name}: the {side} group is empty")
    query_mask, key_mask = PromptMask(name, queries), PromptMask(name, keys)

    def mask_scores(scores: Float[Tensor, "batch head query key"], hook: object) -> Tensor:
        rows, _, n_queries, n_keys = scores.shape
        n_before = n_keys - n_queries
        blocked = (
            query_mask.over_sequence(rows, n_keys)[:, n_before:, None]
            & key_mask.over_sequence(rows, n_keys)[:, None, :]
        )
        out = scores.masked_fill(blocked[:, None].to(scores.device), -torch.inf)
        without_keys = (out == -torch.inf).all(-1, keepdim=True)
        if spare_self:
            ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device)
            return torch.where(without_keys & ones.tril(n_before).triu(n_before), scores, out)
        if bool(without_keys.any()):
            raise ValueError(f"{name}: a query would be left without any key")
        return out

    return name, mask_scores


def resid_hook(layer: int, at: str = "post") -> str:
    """Name of the hook that holds the residual stream of a decoder layer.

    Raises:
        ValueError: Another place than `pre`, `mid` or `post`.
    """
    if at not in _STREAMS:
        raise ValueError(
            f"unknown place {at!r} in the residual stream; valid: {', '.join(_STREAMS)}"
            f"{did_you_mean(at, _STREAMS)}"
        )
    return f"blocks.{layer}.hook_resid_{at}"


def steering_vector(
    layer: int,
    vector: Float[Tensor, "*batch d_model"],
    group: Group | None = None,
    *,
    inputs: VLMInputs | None = None,
    strength: float = 1.0,
    generated: bool | None = None,
    at: str = "post",
) -> Hook:
    """Add a vector to the residual stream of a layer, in forward passes and at every step of `generate`.

    Args:
        layer: Decoder layer.
        vector: One for all rows, or one for each, [batch d_model].
        group: Positions in the prompts: a mask [batch pos], a name or a `Box`. None: all positions.
        inputs: The prompts, where the group is a name or a box.
        strength: Factor on the vector.
        generated: Whether the vector is added to new tokens too. Default: if the row's last prompt token is
            in the group, so new tokens are included with `last` and all positions, and not with `image`.
        at: `pre`, `mid` or `post`.

    Raises:
        ValueError: An unknown place, no finite vector, a group that is empty or can't be looked up. When
            run: other prompts than the mask's, or another number of rows or dimensions than the vector's.
    """
    name = resid_hook(layer, at)
    if vector.ndim not in (1, 2) or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{name}: a finite vector [d_model] or [batch d_model] is needed")
    if group is None:
        if generated is False:
            raise ValueError(f"{name}: to leave out new tokens, say which prompts: group='all', inputs=…")
        mask = None
    else:
        mask = PromptMask.of(name, group, inputs, generated)

    def add_vector(resid: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        rows, n, d_model = resid.shape
        if vector.shape[-1] != d_model or (vector.ndim == 2 and len(vector) != rows):
            raise ValueError(f"{name}: vector {tuple(vector.shape)} for a stream {tuple(resid.shape)}")
        scaled_vector = strength * vector.to(resid.device, resid.dtype).view(-1, 1, d_model)
        if mask is None:
            return resid + scaled_vector
        return torch.where(
            mask.over_visible(rows, n)[..., None].to(resid.device), resid + scaled_vector, resid
        )

    return name, position_wise(add_vector) if mask is None and vector.ndim == 1 else add_vector


@takes_iterables
def scale_heads(heads: Iterable[tuple[int, int]], factor: float | Tensor | Sequence[float]) -> list[Hook]:
    """Multiply the outputs of heads, at all positions, in forward passes and at every step of `generate`.

    Source: V-SEAM (visual semantic editing and attention modulating), where key heads are rescaled.

    Args:
        heads: (layer, head) of each.
        factor: One for all, or one for each.

    Raises:
        ValueError: No heads, a head twice, or another number of factors than of heads.
    """
    chosen = [(int(head[0]), int(head[1])) for head in heads]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"a head is given twice: {sorted({h for h in chosen if chosen.count(h) > 1})}")
    factors = torch.as_tensor(factor, dtype=torch.float32)
    if factors.ndim and factors.shape != (len(chosen),):
        raise ValueError(f"{factors.numel()} factors for {len(chosen)} heads")
    factor_of = dict(zip(chosen, factors.expand(len(chosen)), strict=True))
    hooks: list[Hook] = []
    for layer, index in by_layer(chosen).items():
        layer_factors = torch.stack([factor_of[layer, head] for head in index])
        hooks.append(scale(f"blocks.{layer}.attn.hook_z", index, layer_factors, axis=2))
    return hooks


@takes_iterables
def zero_neurons(neurons: Iterable[tuple[int, int]]) -> list[Hook]:
    """Mask neurons given as (layer, index): `m_i ← 0` at all positions (HONES eq. H4).

    Raises:
        ValueError: No neurons.
    """
    return [zero(neuron_hook(layer), index) for layer, index in by_layer(neurons).items()]


def neuron_hook(layer: int) -> str:
    """Name of the hook that holds a decoder layer's neurons."""
    return f"blocks.{layer}.mlp.hook_post"


@takes_iterables
def by_layer(components: Iterable[tuple[int, int]]) -> Mapping[int, list[int]]:
    """Indices by layer of components given as (layer, index).

    Raises:
        ValueError: No components.
    """
    indices: dict[int, list[int]] = {}
    for component in components:
        indices.setdefault(int(component[0]), []).append(int(component[1]))
    if not indices:
        raise ValueError("no components given")
    return indices
