"""Greedy answers under interventions: the clean answer is checked in one pass, only what differs decodes.

The tokens are those of `generate` under the same hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hones_lens.forks import Arm, Forked, Segment, Step, stacked
from hones_lens.generation import greedy
from hones_lens.hooked_vlm import HookedVLM
from hones_lens.inputs import VLMInputs
from hones_lens.nn.attention import AttentionContext, KVCache

NEAR_TIE = 1e-4  # nats between the two likeliest tokens, below which rounding could decide


@dataclass
class Tally:
    """What a sweep did.

    Attributes:
        forked, full: Rows that were forked from a clean pass, and rows that had to be run whole.
        decoded: Forked rows that decoded on, since they did not say what the clean model says.
        near_ties: Choices between two tokens whose logits differ by less than 1e-4.
        row_layers: Decoder layers computed, times rows (the fork's own layer counts as one).
    """

    forked: int = 0
    full: int = 0
    decoded: int = 0
    near_ties: int = 0
    row_layers: int = 0

    def __str__(self) -> str:
        rows = self.forked + self.full
        if not rows:
            return "nothing was run"
        return (
            f"{rows} rows: {self.full / rows:.0%} by a full pass, {self.decoded / rows:.1%} decoded on, "
            f"{self.near_ties} near-ties"
        )


@dataclass(frozen=True)
class Draft:
    """Prompts of one length, and the tokens to check behind each.

    Attributes:
        inputs: The prompts, without padding.
        tokens: The tokens that are expected to follow, by row.
    """

    inputs: VLMInputs
    tokens: list[list[int]]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest."""
        return max(map(len, self.tokens))

    def padded(self, filler: int) -> Int[Tensor, "row longest"]:
        """The tokens with a filler behind them."""
        rows = [said + [filler] * (self.longest - len(said)) for said in self.tokens]
        return torch.tensor(rows, device=self.inputs.input_ids.device)

    def segment(self, model: HookedVLM) -> Segment:
        """Prompt and draft, but for its last token, which is checked and never fed."""
        fed = self.padded(model.cfg.pad_token_id)[:, :-1]
        return Segment.of(model, self.inputs.extended(fed), self.longest)

    @classmethod
    def of_clean_answers(cls, model: HookedVLM, inputs: VLMInputs, max_new_tokens: int) -> Draft:
        """What the clean model says, end-of-sequence tokens included."""
        tokens = greedy(model, inputs, max_new_tokens).tolist()
        return cls(inputs, [_until_end(row, model.cfg.eos_token_ids) for row in tokens])


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def check_finite(
    logits: Float[Tensor, "arm row kept d_vocab"], arms: Sequence[Arm], ids: Sequence[str]
) -> None:
    """Raise FloatingPointError for logits that are not finite; names the arm and the example."""
    fine = torch.isfinite(logits).flatten(2).all(-1)
    if not bool(fine.all()):
        arm, row = (~fine).nonzero()[0].tolist()
        raise FloatingPointError(f"logits are not finite (hooks: {arms[arm]}; examples: {ids[row]})")


@dataclass
class _Unfinished:
    """A row that left the draft: what it has said, and keys and values of all but the last of it."""

    arm: Arm
    number: int  # of the arm
    row: int
    said: list[int]
    keys: list[Tensor] = field(repr=False)  # by layer, [pos kv_head d_head]
    values: list[Tensor] = field(repr=False)


class Answers:
    """Answers of the rows of one draft under many arms.

    A fork of prompt and draft shows every greedy choice up to the first that differs, and its keys and
    values serve from there on. Such rows are collected over arms and layers, and decode together.

    Args:
        model: The model.
        draft: What the clean model says.
        ids: Names of the rows, for errors.
        max_new_tokens: Of an answer.
        rows_at_once: How many rows decode together.
        tally: Is counted up.
    """

    def __init__(
        self,
        model: HookedVLM,
        draft: Draft,
        ids: Sequence[str],
        max_new_tokens: int,
        rows_at_once: int,
        tally: Tally,
    ):
        self.model, self.draft, self.ids, self.tally = model, draft, ids, tally
        self.max_new_tokens, self.rows_at_once = max_new_tokens, rows_at_once
        self.found: dict[tuple[int, int], list[int]] = {}  # (arm, row) → tokens, where not the draft's
        self._waiting: list[_Unfinished] = []
        self._wanted = draft.padded(-1)
        filler = torch.full((len(draft.tokens), max_new_tokens), model.cfg.pad_token_id)
        longest = draft.inputs.extended(filler.to(draft.inputs.input_ids.device))
        self._cos, self._sin = model.rotary(model.positions(longest), model.cfg.dtype)

    def check(self, numbers: Sequence[int], arms: Sequence[Arm], step: Step, forked: Forked) -> None:
        """Compare what arms say with the draft.

        Args:
            numbers: Of the arms, by which `found` names them.
            arms, step, forked: What was forked, and what came of it.
        """
        logits = forked.logits
        assert logits is not None
        check_finite(logits, arms, self.ids)
        choices = logits.argmax(-1)
        differs = (choices != self._wanted) & (self._wanted >= 0)
        reached = differs.cumsum(-1) - differs.int() == 0  # up to the first difference
        best = logits.float().topk(2, dim=-1).values
        near = (best[..., 0] - best[..., 1] < NEAR_TIE) & reached & (self._wanted >= 0)
        self.tally.near_ties += int(near.sum())
        first = differs.int().argmax(-1).tolist()
        for arm, row in differs.any(-1).nonzero().tolist():
            j = first[arm][row]
            said = [*self.draft.tokens[row][:j], int(choices[arm, row, j])]
            if said[-1] in self.model.cfg.eos_token_ids or len(said) == self.max_new_tokens:
                self.found[numbers[arm], row] = said
                continue
            known = self.draft.inputs.input_ids.shape[1] + j
            at = arm * logits.shape[1] + row
            caches = [
                (forked.cache, at) if layer in forked.cache.keys else (step.cache, row)
                for layer in range(self.model.cfg.n_layers)
            ]
            keys = [cache.keys[layer][i, :known].clone() for layer, (cache, i) in enumerate(caches)]
            values = [cache.values[layer][i, :known].clone() for layer, (cache, i) in enumerate(caches)]
            self._waiting.append(_Unfinished(arms[arm], numbers[arm], row, said, keys, values))
        if len(self._waiting) >= self.rows_at_once:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Let all rows that wait decode to their end."""
        rows = sorted(self._waiting, key=lambda row: row.number)
        self._waiting = []
        self.tally.decoded += len(rows)
        for start in range(0, len(rows), self.rows_at_once):
            self._decode(rows[start : start + self.rows_at_once])

    def _decode(self, rows: list[_Unfinished]) -> None:
        model, ends = self.model, self.model.cfg.eos_token_ids
        size = self.draft.inputs.input_ids.shape[1] + self.max_new_tokens
        cache = _Slots.of(rows, size)
        device = model.cfg.device
        while rows:
            cache.at = torch.tensor([size - self.max_new_tokens + len(row.said) - 1 for row in rows]).to(
                device
            )
            token = torch.tensor([[row.said[-1]] for row in rows], device=device)
            parts = [(len(same), same[0].arm.hooks) for same in _by_arm(rows)]
            with model.hooks(fwd_hooks=stacked(parts)):
                resid = model.hook_embed(model.hook_text_embed(model.embed(token)))
                resid = model.run_blocks(resid, self._context(rows, cache))
                logits = model.unembed(model.ln_final(resid))[:, 0]
            for i, row in enumerate(rows):
                check_finite(logits[None, i : i + 1, None], [row.arm], [self.ids[row.row]])
            best = logits.float().topk(2, dim=-1).values
            self.tally.near_ties += int((best[:, 0] - best[:, 1] < NEAR_TIE).sum())
            self.tally.row_layers += len(rows) * model.cfg.n_layers
            left = []
            for i, (row, token) in enumerate(zip(rows, logits.argmax(-1).tolist(), strict=True)):
                row.said.append(token)
                if token in ends or len(row.said) == self.max_new_tokens:
                    self.found[row.number, row.row] = row.said
                else:
                    left.append(i)
            if len(left) < len(rows):
                rows = [rows[i] for i in left]
                cache.keep(torch.tensor(left, dtype=torch.long, device=device))

    def _context(self, rows: list[_Unfinished], cache: _Slots) -> AttentionContext:
        each = torch.tensor([row.row for row in rows], device=cache.at.device)
        cos, sin = self._cos[each, cache.at][:, None], self._sin[each, cache.at][:, None]
        seen = torch.arange(cache.length, device=cache.at.device) <= cache.at[:, None]
        return AttentionContext(cos, sin, seen[:, None, None], causal=True, kv_cache=cache)


def _by_arm(rows: Sequence[_Unfinished]) -> Iterator[list[_Unfinished]]:
    same: list[_Unfinished] = []
    for row in rows:
        if same and same[0].number != row.number:
            yield same
            same = []
        same.append(row)
    yield same


@dataclass
class _Slots(KVCache):
    """Keys and values with room for what is still to come; row r's next token goes to slot `at[r]`."""

    at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    @classmethod
    def of(cls, rows: Sequence[_Unfinished], size: int) -> _Slots:
        """Move what the rows know there: it is taken from them."""
        out = cls()
        for layer in reversed(range(len(rows[0].keys))):
            for name, mine in (("keys", out.keys), ("values", out.values)):
                parts = [getattr(row, name).pop() for row in rows]
                mine[layer] = parts[0].new_zeros(len(rows), size, *parts[0].shape[1:])
                for slots, part in zip(mine[layer], parts, strict=True):
                    slots[: len(part)] = part
        return out

    @property
    def length(self) -> int:
        """How many slots the longest row fills, its next token's included."""
        return int(self.at.max()) + 1

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        each = torch.arange(len(self.at), device=self.at.device)
        self.keys[layer][each, self.at] = k[:, 0]
        self.values[layer][each, self.at] = v[:, 0]
        return self.keys[layer][:, : self.length], self.values[layer][:, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        for mine in (self.keys, self.values):
            for layer in mine:
                mine[layer] = mine[layer][rows]
