"""What attention reads of the tokens besides the residual stream: rotations, masks, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class KVCache:
    """Keys (rotated) and values of all tokens seen so far, [batch pos kv_head d_head] a layer."""

    keys: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    values: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values of one layer and return all of them."""
        if layer in self.keys:
            k = torch.cat((self.keys[layer], k), dim=1)
            v = torch.cat((self.values[layer], v), dim=1)
        self.keys[layer], self.values[layer] = k, v
        return k, v


# q, k, v and mask to z
Mix = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Windows:
    """Windows of tokens that attend only to one another, e.g. in a vision tower.

    Attributes:
        members: The tokens of each window, padding tokens excluded, as indices into the flattened
            [batch pos]; filled up with index 0 where a window is smaller, or a row has fewer windows.
        real: False at such filling.
    """

    members: Int[Tensor, "batch window size"]
    real: Bool[Tensor, "batch window size"]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mix: Mix | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention [batch pos head d_head] within each window; zero at padding.

        Args:
            q, k, v: [batch pos head d_head].
            mix: Attention of [batch window head size d_head] under a mask in which filling attends to itself;
                default: a fused kernel, over the windows alone that have tokens.
            scale: Of the kernel's scores; default: 1 / √d_head.
        """
        members, real = self.members, self.real
        if mix is None:
            has_tokens = real.any(-1)
            members, real = members[has_tokens], real[has_tokens]
        q_in, k_in, v_in = (x.flatten(0, 1)[members].transpose(-3, -2) for x in (q, k, v))
        if mix is None:
            mask = None if bool(real.all()) else real[:, None, None]
            mixed = F.scaled_dot_product_attention(q_in, k_in, v_in, attn_mask=mask, scale=scale)
        else:
            itself = torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)
            mixed = mix(q_in, k_in, v_in, real[..., None, None, :] | itself)
        z = torch.zeros_like(q).flatten(0, 1)
        return z.index_copy(0, members[real], mixed.transpose(-3, -2)[real]).view_as(q)


_BY_TOKEN = ("cos", "sin", "groups", "deepstack")


@dataclass(frozen=True)
class AttentionContext:
    """Arguments of a forward pass for the attention of every layer.

    Attributes:
        cos, sin: Rotation of the queries' positions, [batch pos d_head]; None: no rotation.
        mask: True where a query may attend to a key, [batch 1 query key]; None: all, or causal.
        causal: Without a mask: whether a query attends only to itself and earlier positions.
        windows: Instead of a mask: tokens attend only to their own window.
        kv_cache: Filled and read during generation.
        window: How many keys a query may attend to, itself and those before it; None: all.
        sliding: For layers whose attention slides: their own rotation, mask and window.
        groups: Tokens of one group see each other, also those behind them, [batch pos]; −1: none. None: all
            are causal.
        deepstack: What pictures write into the stream behind each of the first layers (DeepStack), zero at
            text, [batch pos layer d_model]; None: nothing.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    kv_cache: KVCache | None = None
    windows: Windows | None = None
    window: int | None = None
    sliding: AttentionContext | None = None
    groups: Tensor | None = None
    deepstack: Tensor | None = None

    def __getitem__(self, index: Any) -> AttentionContext:
        """Some rows and positions, as tensors [batch pos …] are indexed; without masks (see `masked`)."""
        taken = {name: x[index] for name in _BY_TOKEN if (x := getattr(self, name)) is not None}
        return replace(
            self,
            **taken,
            mask=None,
            sliding=None if self.sliding is None else self.sliding[index],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but those of caches, windows and groups, by name; `of_tensors` takes them."""
        own = {
            name: x for name in ("cos", "sin", "mask", "deepstack") if (x := getattr(self, name)) is not None
        }
        sliding = {} if self.sliding is None else self.sliding.tensors()
        return own | {f"sliding.{name}": x for name, x in sliding.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> AttentionContext:
        """The context of a decoder that `tensors` told; its masks are made, so it needs no more."""
        prefix = "sliding."
        own: dict[str, Any] = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
        sliding = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        return cls(**own, causal=True, sliding=cls.of_tensors(sliding) if sliding else None)

    def from_layer(self, layer: int) -> AttentionContext:
        """Of that, what blocks from this one on read."""
        if self.deepstack is None or layer < self.deepstack.shape[2]:
            return self
        return replace(self, deepstack=None)

    def masked(self, key_is_token: Bool[Tensor, "#batch key"], n_queries: int) -> AttentionContext:
        """With masks for the last `n_queries` positions, see `attention_mask`.

        Where there are more keys than this context has tokens, those before them are of other groups.
        """
        return replace(
            self,
            mask=attention_mask(key_is_token, n_queries, self.window, self.groups),
            sliding=None if self.sliding is None else self.sliding.masked(key_is_token, n_queries),
        )

    def behind(self, n_queries: int) -> AttentionContext:
        """The last tokens alone, of a context that is `masked` for these."""
        first = 0 if self.cos is None else self.cos.shape[-2] - n_queries
        sliding = None if self.sliding is None else self.sliding.behind(n_queries)
        return replace(self[:, first:], mask=self.mask, sliding=sliding)

    def last(self, n_queries: int, n_keys: int) -> AttentionContext:
        """For the last queries alone, of a context that has this mask for all of them."""
        assert self.cos is not None
        cut = self[:, self.cos.shape[1] - n_queries :]
        seen = torch.ones(1, n_keys, dtype=torch.bool, device=self.cos.device)
        mask = attention_mask(seen, n_queries) if self.mask is None else self.mask[:, :, -n_queries:]
        sliding = None if self.sliding is None else self.sliding.last(n_queries, n_keys)
        return replace(cut, mask=mask, sliding=sliding)

    def seeing(self, at: Int[Tensor, " batch"], n_keys: int) -> AttentionContext:
        """For one query a row, at the place `at` among its keys, which are as many as the longest row's."""
        keys = torch.arange(n_keys, device=at.device)
        mask = keys <= at[:, None]
        if self.window is not None:
            mask &= keys > at[:, None] - self.window
        sliding = None if self.sliding is None else self.sliding.seeing(at, n_keys)
        return replace(self, mask=mask[:, None, None], sliding=sliding)

    @classmethod
    def of_text(cls, tokens: Sequence[tuple[AttentionContext, int, int]]) -> AttentionContext:
        """Single text tokens, [token 1 …], each given as a context, a row of it and a position.

        No picture writes at them.
        """
        first = tokens[0][0]
        cos, sin = (
            torch.stack([getattr(of, name)[row, position] for of, row, position in tokens])[:, None]
            for name in ("cos", "sin")
        )
        sliding = None
        if first.sliding is not None:
            sliding = cls.of_text([(of.sliding, row, at) for of, row, at in tokens if of.sliding is not None])
        return cls(cos, sin, causal=True, window=first.window, sliding=sliding)

    def repeated(self, times: int) -> AttentionContext:
        """For the rows repeated so many times, one repetition after the other."""
        if times == 1:
            return self
        by_token = {name: x for name in _BY_TOKEN if (x := getattr(self, name)) is not None}
        taken = {name: x.repeat(times, *[1] * (x.ndim - 1)) for name, x in by_token.items()}
        mask = self.mask
        if mask is not None and len(mask) > 1:
            mask = mask.repeat(times, 1, 1, 1)
        return replace(
            self,
            **taken,
            mask=mask,
            sliding=None if self.sliding is None else self.sliding.repeated(times),
        )


def attention_mask(
    key_is_token: Bool[Tensor, "#batch key"],
    n_queries: int,
    window: int | None = None,
    groups: Int[Tensor, "#batch token"] | None = None,
) -> Bool[Tensor, "#batch 1 query key"] | None:
    """Causal mask for the last `n_queries` positions that hides padding; None where causality is all.

    A padding query attends to itself, so that no row of the softmax is empty.

    Args:
        key_is_token: False at padding.
        n_queries: How many of the positions, the last, are queries.
        window: How many keys a query sees at most, itself included; None: all before it.
        groups: Of the last keys, at least of all queries: those of one group see each other, also behind
            them; of those before it in its group a query sees what the window lets it. −1: none.
    """
    n_keys = key_is_token.shape[1]
    slides = window is not None and n_keys > window
    mutual = groups is not None and bool((groups[:, -n_queries:] >= 0).any())
    if not slides and not mutual and bool(key_is_token.all()):
        if n_queries == n_keys:
            return None
        if n_queries == 1:
            return key_is_token[:, None, None]
    shape, diagonal = (n_queries, n_keys), n_keys - n_queries
    causal = torch.ones(shape, dtype=torch.bool, device=key_is_token.device).tril(diagonal)
    itself = causal ^ causal.tril(diagonal - 1)
    seen = causal
    if mutual and groups is not None:
        of_keys = F.pad(groups, (n_keys - groups.shape[1], 0), value=-1)
        of_queries = groups[:, -n_queries:, None]
        seen = (causal | ((of_queries == of_keys[:, None]) & (of_queries >= 0)))[:, None]
    if slides and window is not None:
        seen = seen & ~torch.ones_like(causal).tril(diagonal - window)
    return (seen & key_is_token[:, None, None]) | itself
