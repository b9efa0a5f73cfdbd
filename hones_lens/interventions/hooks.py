"""Interventions as hook factories: each returns `(name, fn)` for `run_with_hooks` or `hooks`.

No function here changes its input in place, and none is a no-op: what it can't do it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hones_lens.interventions.positions import PromptMask
from hones_lens.interventions.token_groups import Group
from hones_lens.model import VLMInputs, to_list

Hook = tuple[str, Callable[..., Any]]
_STREAMS = ("pre", "mid", "post")


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """A hook function on z [batch pos head d_head] that changes one head.

    Attributes:
        name: The hook.
        head: One head for all rows, or one head for each row of the batch.
        alone: From z, what each head becomes if it is the one that is changed; same shape, token by token.
        what: In words.
        late: Only at the last position of a pass: under `generate`, from the end of the prompt on.
    """

    name: str
    head: int | Sequence[int] | Tensor
    alone: Callable[[Tensor], Tensor]
    what: str
    late: bool = False

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
        if self.late:
            chosen = chosen & (torch.arange(z.shape[1], device=z.device) == z.shape[1] - 1)[:, None, None]
        return torch.where(chosen, self.alone(z), z)

    @property
    def only(self) -> int | None:
        """The head, if it is one for all rows."""
        heads = torch.as_tensor(self.head)
        return int(heads) if heads.ndim == 0 else None

    def check(self, heads: Tensor, n_heads: int) -> None:
        """Raise ValueError for heads that a layer does not have."""
        if n_heads == 1 and self.alone is _mean_of_others:
            raise ValueError(f"{self.name}: with one head there are no other heads to take the mean of")
        if int(heads.min()) < 0 or int(heads.max()) >= n_heads:
            raise ValueError(f"{self.name}: heads {to_list(heads)} are not all in 0 … {n_heads - 1}")

    def __str__(self) -> str:
        return f"{self.what} of head {self.head} at {self.name}"


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
    if positions not in ("all", "last"):
        raise ValueError(f"unknown positions {positions!r}; valid: all, last")
    name = f"blocks.{layer}.attn.hook_z"
    what = "the other heads' mean instead"
    return name, HeadEdit(name, head, _mean_of_others, what, late=positions == "last")


def _mean_of_others(z: Tensor) -> Tensor:
    # Sums of the heads before and of those behind: a head's own value, even an infinite one, has no part.
    wide = z.float()
    none = torch.zeros_like(wide[:, :, :1])
    before = torch.cat((none, wide[:, :, :-1]), dim=2).cumsum(2)
    behind = torch.cat((wide[:, :, 1:], none), dim=2).flip(2).cumsum(2).flip(2)
    return ((before + behind) / (z.shape[2] - 1)).to(z.dtype)


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

    def multiplier(self, x: Tensor) -> Tensor:
        """The factor of every entry of the axis, [size of the axis].

        Factors of each entry's own keep their precision where x has less: in bfloat16 a factor of 1.003
        would be 1.
        """
        wide = torch.promote_types(x.dtype, self.factor.dtype) if self.factor.ndim else x.dtype
        ones = torch.ones(x.shape[self.axis], device=x.device, dtype=wide)
        return ones.index_put((self.index.to(x.device),), self.factor.to(x.device, wide))

    def __call__(self, x: Tensor, hook: object) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        multiplier = self.multiplier(x).view(shape)
        return (x * multiplier).masked_fill(multiplier == 0, 0).to(x.dtype)

    def __str__(self) -> str:
        n, first = len(self.index), int(self.index[0])
        which = f"entry {first}" if n == 1 else f"{n} entries, the first {first},"
        return f"{which} times {to_list(self.factor) if n == 1 else 'a factor'} at {self.name}"


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

    return name, set_mean


def patch(name: str, value: Tensor, positions: Bool[Tensor, "batch pos"] | None = None) -> Hook:
    """Put in another run's activation, at some positions or at all.

    Raises:
        ValueError: When run: a shape that differs, or a mask that selects nothing.
    """

    def put(x: Tensor, hook: object) -> Tensor:
        if x.shape != value.shape:
            raise ValueError(
                f"{name}: patch of shape {tuple(value.shape)} for an activation {tuple(x.shape)}"
            )
        return torch.where(_at(positions, x, name), value.to(x.device, x.dtype), x)

    return name, put


def add(name: str, vector: Tensor, positions: Bool[Tensor, "batch pos"] | None = None) -> Hook:
    """Add a vector (broadcast over the leading axes), at some positions or at all.

    Raises:
        ValueError: When run: a mask that selects nothing or does not fit.
    """

    def add_vector(x: Tensor, hook: object) -> Tensor:
        return torch.where(_at(positions, x, name), x + vector.to(x.device, x.dtype), x)

    return name, add_vector


def _at(positions: Tensor | None, x: Tensor, name: str) -> Tensor:
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
    """Keep some queries from seeing some keys in one layer (scores set to −∞).

    Under `generate`, a new token is in the groups that its row's last prompt token is in.

    Args:
        layer: Decoder layer.
        queries, keys: Masks over the prompts.
        spare_self: A query that would be left without any key may still see itself.

    Raises:
        ValueError: An empty group. When run: a query left without any key, or masks of other prompts.
    """
    name = f"blocks.{layer}.attn.hook_attn_scores"
    for what, mask in (("query", queries), ("key", keys)):
        if not bool(mask.any()):
            raise ValueError(f"{name}: the {what} group is empty")
    seeing, seen = PromptMask(name, queries), PromptMask(name, keys)

    def cut(scores: Float[Tensor, "batch head query key"], hook: object) -> Tensor:
        rows, _, n_queries, n_keys = scores.shape
        before = n_keys - n_queries
        edges = seeing.over(rows, n_keys)[:, before:, None] & seen.over(rows, n_keys)[:, None, :]
        out = scores.masked_fill(edges[:, None].to(scores.device), -torch.inf)
        lost = (out == -torch.inf).all(-1, keepdim=True)
        if spare_self:
            ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device)
            return torch.where(lost & ones.tril(before).triu(before), scores, out)
        if bool(lost.any()):
            raise ValueError(f"{name}: a query would be left without any key")
        return out

    return name, cut


def resid_hook(layer: int, at: str = "post") -> str:
    """Name of the hook that holds the residual stream of a decoder layer.

    Raises:
        ValueError: Another place than `pre`, `mid` or `post`.
    """
    if at not in _STREAMS:
        raise ValueError(f"unknown place {at!r} in the residual stream; valid: {', '.join(_STREAMS)}")
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
        group: Where in the prompts: a mask [batch pos], a name or a `Box`. None: at all positions.
        inputs: The prompts, where the group is a name or a box.
        strength: What the vector is multiplied by.
        generated: Whether it is added to new tokens too. Default: where the row's last prompt token is in
            the group, so `last` and all positions go on, and `image` does not.
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

    def push(resid: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        rows, n, width = resid.shape
        if vector.shape[-1] != width or (vector.ndim == 2 and len(vector) != rows):
            raise ValueError(f"{name}: vector {tuple(vector.shape)} for a stream {tuple(resid.shape)}")
        added = strength * vector.to(resid.device, resid.dtype).view(-1, 1, width)
        if mask is None:
            return resid + added
        return torch.where(mask.shown(rows, n)[..., None].to(resid.device), resid + added, resid)

    return name, push


def scale_heads(heads: Iterable[tuple[int, int]], factor: float | Tensor | Sequence[float]) -> list[Hook]:
    """Multiply what heads write, at all positions, in forward passes and at every step of `generate`.

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
    each = dict(zip(chosen, factors.expand(len(chosen)), strict=True))
    hooks: list[Hook] = []
    for layer, index in by_layer(chosen).items():
        mine = torch.stack([each[layer, head] for head in index])
        hooks.append(scale(f"blocks.{layer}.attn.hook_z", index, mine, axis=2))
    return hooks


def zero_neurons(neurons: Iterable[tuple[int, int]]) -> list[Hook]:
    """Mask neurons given as (layer, index): `m_i ← 0` at all positions (HONES eq. H4).

    Raises:
        ValueError: No neurons.
    """
    return [zero(neuron_hook(layer), index) for layer, index in by_layer(neurons).items()]


def neuron_hook(layer: int) -> str:
    """Name of the hook that holds a decoder layer's neurons."""
    return f"blocks.{layer}.mlp.hook_post"


def by_layer(components: Iterable[tuple[int, int]]) -> Mapping[int, list[int]]:
    """Indices by layer of components given as (layer, index).

    Raises:
        ValueError: No components.
    """
    found: dict[int, list[int]] = {}
    for component in components:
        found.setdefault(int(component[0]), []).append(int(component[1]))
    if not found:
        raise ValueError("no components given")
    return found
