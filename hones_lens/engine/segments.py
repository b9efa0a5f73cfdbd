"""Segments: tokens that run through the decoder together, without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.engine.memory import Budget
from hones_lens.model import AttentionContext, HookedVLM, KVCache, VLMInputs, to_list


@dataclass(frozen=True)
class Segment:
    """Tokens that run through the decoder together.

    Attributes:
        resid: The stream that enters block 0, [row pos d_model].
        attention: Rotations of their positions, masks, and what pictures write behind the first layers.
        keep: At how many of the last positions logits are wanted.
        prefixed: Whether the first segment, which then has one row, is in front of every row of this one.
        past: Keys and values of other tokens in front of each row, which no arm changes.
    """

    resid: Float[Tensor, "row pos d_model"]
    attention: AttentionContext
    keep: int
    prefixed: bool = False
    past: KVCache | None = None

    @classmethod
    def of(cls, model: HookedVLM, inputs: VLMInputs, keep: int) -> Segment:
        """One segment of whole inputs."""
        with torch.no_grad():
            return cls(*model.enter(inputs), keep)

    def late(self, past: KVCache) -> Segment:
        """The positions whose logits are wanted alone, behind the keys and values of those before."""
        attention = self.attention.last(self.keep, past.keys[0].shape[1] + self.keep)
        return Segment(self.resid[:, -self.keep :], attention, self.keep, past=past)

    def context(self, times: int, prefix: KVCache | None = None, above: int = -1) -> AttentionContext:
        """For the rows repeated so many times.

        Args:
            times: How often.
            prefix: Where prefixed: with one row for each repetition.
            above: Layers above this one run whole; of this one, what comes behind its attention may.
        """
        cache = KVCache()
        if self.prefixed:
            assert prefix is not None
            cache = _BehindPrefix(prefix=prefix, rows=len(self.resid))
        if self.past is not None:
            for target, source in ((cache.keys, self.past.keys), (cache.values, self.past.values)):
                target |= {n: x.repeat(times, 1, 1, 1) for n, x in source.items() if n > above}
        return replace(self.attention.from_layer(above).repeated(times), kv_cache=cache)


@dataclass
class _BehindPrefix(KVCache):
    """Keys and values behind those of a prefix that several rows share; only one layer's are held."""

    prefix: KVCache = field(default_factory=KVCache)
    rows: int = 1  # behind each row of the prefix

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.keys:
            self.keys = {layer: self._for_each_row(self.prefix.keys[layer])}
            self.values = {layer: self._for_each_row(self.prefix.values[layer])}
        return super().extend(layer, k, v)

    def _for_each_row(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return x.expand(self.rows, *x.shape[1:])  # a view: it is copied once, when `extend` appends to it
        return x.repeat_interleave(self.rows, dim=0)


def in_buckets(inputs: VLMInputs, budget: Budget, run: Callable[[list[int], VLMInputs], None]) -> None:
    """Run rows of one length, without padding, as many at a time as the budget has room for.

    Args:
        inputs: All rows.
        budget: Halves the rows that run out of memory, which then run again.
        run: Takes the numbers of some rows, and these rows.
    """
    lengths: list[int] = to_list(inputs.attention_mask.sum(-1))
    for length in sorted(set(lengths)):
        rows = [row for row, n in enumerate(lengths) if n == length]
        fits = budget.rows(length)
        for _ in budget.in_parts(
            rows,
            lambda rest, fits=fits: fits,
            lambda part: run(list(part), inputs[part].without_padding()),
        ):
            pass


def split_shared_prefix(model: HookedVLM, inputs: VLMInputs) -> tuple[list[Segment], list[list[int]]]:
    """Rows that begin alike, image included: their common beginning once, then what is behind it.

    Returns:
        Segments (the prefix first), and which rows each has. Rows of one length share a segment. Where
        images lie behind the common beginning, nothing is shared.
    """
    lengths: list[int] = to_list(inputs.attention_mask.sum(-1))
    width = inputs.input_ids.shape[1]
    ids: list[list[int]]
    ids = [to_list(row[width - n :]) for row, n in zip(inputs.input_ids, lengths, strict=True)]
    shared = _shared_prefix_length(ids)
    pads = [width - n for n in lengths]
    if any(bool(mask[pad + shared :].any()) for mask, pad in zip(inputs.image_mask, pads, strict=True)):
        shared = 0
    with torch.no_grad():
        encoded = model.with_image_embeds(inputs)
        resid, tokens = model.embed_inputs(encoded), model.token_context(encoded)

    def cut(rows: list[int], first: int, last: int, keep: int) -> Segment:
        n_keys = last - first + (shared if keep else 0)
        seen = torch.ones(1, n_keys, dtype=torch.bool, device=resid.device)
        attention = tokens[rows, first:last].masked(seen, last - first)
        return Segment(resid[rows, first:last], attention, keep, prefixed=shared > 0 and keep > 0)

    segments: list[Segment] = []
    members: list[list[int]] = []
    if shared:
        segments.append(cut([0], pads[0], pads[0] + shared, 0))
        members.append([0])
    for length in sorted(set(lengths)):
        rows = [row for row, n in enumerate(lengths) if n == length]
        segments.append(cut(rows, width - length + shared, width, 1))
        members.append(rows)
    return segments, members


def candidate_rows(inputs: VLMInputs, budget: Budget) -> int:
    """How many rows fit into one pass if what all of them begin with is held once; at least one."""
    lengths: list[int] = to_list(inputs.attention_mask.sum(-1))
    width = inputs.input_ids.shape[1]
    ids: list[list[int]]
    ids = [to_list(row[width - n :]) for row, n in zip(inputs.input_ids, lengths, strict=True)]
    shared = _shared_prefix_length(ids) if len(ids) > 1 else 0
    room = budget.bytes - shared * budget.bytes_per_token
    each = (max(lengths) - shared) * budget.bytes_per_token + 12 * budget.model.cfg.d_vocab
    return max(1, int(room // each))


def _shared_prefix_length(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; of the shortest, the last is left out."""
    shortest = min(map(len, rows)) - 1
    for i in range(shortest):
        if len({row[i] for row in rows}) > 1:
            return i
    return shortest
