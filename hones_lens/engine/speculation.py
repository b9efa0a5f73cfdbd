"""Greedy answers under interventions: the clean answer is checked in one pass, only what differs decodes.

The tokens are those of `generate` under the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hones_lens.engine.arms import Arm, stack_hooks
from hones_lens.engine.forks import ForkOutput, LayerStep
from hones_lens.engine.memory import Budget
from hones_lens.engine.segments import Segment, in_buckets
from hones_lens.model import AttentionContext, HookedVLM, KVCache, VLMInputs, decode, to_list

NEAR_TIE = 1e-4  # nats between the two likeliest tokens, below which rounding could decide in float32


def near_tie(
    leads: Float[Tensor, "*row"], largest: Float[Tensor, "*row"], dtype: torch.dtype
) -> Bool[Tensor, "*row"]:
    """Whether rounding could decide between the two likeliest tokens.

    Args:
        leads: By how much the largest logit is the largest, in nats.
        largest: That logit. Steps between numbers of a type grow with their size.
        dtype: Of the model: activations are rounded to it, whatever the logits are.
    """
    return leads < (torch.finfo(dtype).eps * largest.abs()).clamp(min=NEAR_TIE)


@dataclass
class Tally:
    """Counts of what a sweep computed.

    Attributes:
        forked, full: Rows that were forked from a clean pass, and rows that had to be run whole.
        decoded: Forked rows that were decoded further, because their answer differs from the clean model's.
        near_ties: Choices between two tokens whose logits differ by less than rounding may (see `near_tie`).
        row_layers: Decoder layers computed, times rows (the fork's own layer counts as one).
    """

    forked: int = 0
    full: int = 0
    decoded: int = 0
    near_ties: int = 0
    row_layers: int = 0

    def add(self, counts: Mapping[str, int]) -> None:
        """Add what another process counted, by name."""
        for name, n in counts.items():
            setattr(self, name, getattr(self, name) + n)

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
        rows = [row + [filler] * (self.longest - len(row)) for row in self.tokens]
        return torch.tensor(rows, device=self.inputs.input_ids.device)

    def segment(self, model: HookedVLM) -> Segment:
        """Prompt and draft, but for its last token, which is checked and never fed."""
        fed = self.padded(model.cfg.pad_token_id)[:, :-1]
        return Segment.of(model, self.inputs.extended(fed), self.longest)

    @classmethod
    def of_clean_answers(cls, model: HookedVLM, inputs: VLMInputs, max_new_tokens: int) -> Draft:
        """The clean model's answers, end-of-sequence tokens included."""
        tokens: list[list[int]] = to_list(decode(model, inputs, max_new_tokens))
        return cls(inputs, [_cut_after_eos(row, model.cfg.eos_token_ids) for row in tokens])


def _cut_after_eos(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def in_answer_buckets(inputs: VLMInputs, budget: Budget, run: Callable[[list[int], Draft], None]) -> None:
    """Run prompts of one length, with their right answers as drafts; see `in_buckets`."""
    assert inputs.answer_mask is not None
    answer_lengths: list[int] = to_list(inputs.answer_mask.sum(-1))
    width = inputs.input_ids.shape[1]

    def run_drafts(rows: list[int], prompts: VLMInputs) -> None:
        tokens: list[list[int]] = [
            to_list(inputs.input_ids[row, width - answer_lengths[row] :]) for row in rows
        ]
        run(rows, Draft(prompts, tokens))

    in_buckets(inputs.before_answers(), budget, run_drafts)


def check_finite(
    logits: Float[Tensor, "arm row kept d_vocab"], arms: Sequence[Arm], ids: Sequence[str]
) -> None:
    """Raise FloatingPointError for logits that are not finite; names the arm and the example."""
    finite = torch.isfinite(logits).flatten(2).all(-1)
    if not bool(finite.all()):
        arm, row = to_list((~finite).nonzero()[0])
        raise FloatingPointError(f"logits are not finite (hooks: {arms[arm]}; examples: {ids[row]})")


@dataclass(frozen=True, eq=False)
class ExpectedAnswers:
    """A draft, prepared for comparison with the answers of forks.

    Attributes:
        draft: The clean model's answers.
        rows: The row numbers by which `Answers.found` names its rows.
        ids: The names of its rows in errors.
        wanted: The tokens, −1 behind them, [row longest].
        tokens: Rotations of every position that an answer can reach, by row.
        process: What the model's decoding makes of logits, see `Decoding.processors`.
    """

    draft: Draft
    rows: Sequence[int]
    ids: Sequence[str]
    wanted: Tensor
    tokens: AttentionContext
    process: Any

    @classmethod
    def of(
        cls, model: HookedVLM, draft: Draft, rows: Sequence[int], ids: Sequence[str], max_new_tokens: int
    ) -> ExpectedAnswers:
        """A draft with the angles of the positions behind its prompts."""
        prompts = draft.inputs
        filler = torch.full((len(draft.tokens), max_new_tokens), model.cfg.pad_token_id)
        longest = prompts.extended(filler.to(prompts.input_ids.device))
        tokens = model.rotations(longest)
        process = model.decoding.processors(prompts.attention_mask, model.cfg.eos_token_ids, max_new_tokens)
        return cls(draft, rows, ids, draft.padded(-1), tokens, process)

    def likeliest(
        self, logits: Float[Tensor, "arm row longest d_vocab"], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What each arm chooses behind every part of the draft, and where it is a near-tie."""
        if not self.process:
            return _likeliest(logits, dtype)
        n_arms, prompts = len(logits), self.draft.inputs.input_ids
        ids = torch.cat((prompts, self.wanted.clamp(min=0)), dim=1).repeat(n_arms, 1)
        choices = torch.zeros_like(logits[..., 0], dtype=torch.long)
        near = torch.zeros_like(choices, dtype=torch.bool)
        for i in range(logits.shape[2]):
            said = ids[:, : prompts.shape[1] + i]
            scores: Tensor = self.process(said, logits[:, :, i].flatten(0, 1).float())
            choices[:, :, i], near[:, :, i] = _likeliest(scores.view(n_arms, len(prompts), -1), dtype)
        return choices, near


def _likeliest(
    scores: Float[Tensor, "*row d_vocab"], dtype: torch.dtype
) -> tuple[Int[Tensor, "*row"], Bool[Tensor, "*row"]]:
    """The token with the largest score of each row, and whether that is a near-tie."""
    best = scores.float().topk(2, dim=-1).values
    return scores.argmax(-1), near_tie(best[..., 0] - best[..., 1], best[..., 0], dtype)


@dataclass
class _DecodingRow:
    """A row whose answer left its draft, with its tokens so far; its keys and values are in a slot."""

    arm: Arm
    number: int  # of the arm
    expected: ExpectedAnswers
    row: int  # of the draft
    tokens: list[int]

    @property
    def position(self) -> int:
        """Position of the last token."""
        return self.prompt.shape[0] + len(self.tokens) - 1

    @property
    def prompt(self) -> Int[Tensor, " pos"]:
        """The ids of its prompt."""
        return self.expected.draft.inputs.input_ids[self.row]


class Answers:
    """Answers of rows under many arms, where they differ from the clean model's.

    A fork of prompt and draft shows every greedy choice up to the first that differs, and its keys and
    values serve from there on. Such rows are collected over arms, layers and prompts, and decode together.

    Args:
        model: The model.
        longest: Tokens of the longest prompt.
        max_new_tokens: Of an answer.
        most_rows: How many rows can come.
        budget: Says how many rows wait, and decode together.
        tally: The counts to update.
    """

    def __init__(
        self,
        model: HookedVLM,
        longest: int,
        max_new_tokens: int,
        most_rows: int,
        budget: Budget,
        tally: Tally,
    ):
        self.model, self.tally, self.max_new_tokens, self.budget = model, tally, max_new_tokens, budget
        self.found: dict[tuple[int, int], list[int]] = {}  # (arm, row) → tokens, where not the draft's
        self._waiting: list[_DecodingRow] = []
        self._size, self._most_rows = longest + max_new_tokens, most_rows
        self._slots: _Slots | None = None

    def check(
        self,
        expected: ExpectedAnswers,
        numbers: Sequence[int],
        arms: Sequence[Arm],
        step: LayerStep,
        forked: ForkOutput,
    ) -> None:
        """Compare the arms' answers with the draft.

        Args:
            expected: What was forked.
            numbers: Of the arms, by which `found` names them.
            arms, step, forked: The arms, the clean step that they start from, and what came of them.
        """
        logits, wanted = forked.logits, expected.wanted
        assert logits is not None
        check_finite(logits, arms, expected.ids)
        choices, near = expected.likeliest(logits, self.model.cfg.dtype)
        differs = (choices != wanted) & (wanted >= 0)
        reached = differs.cumsum(-1) - differs.int() == 0  # up to the first difference
        self.tally.near_ties += int((near & reached & (wanted >= 0)).sum())
        first: list[list[int]] = to_list(differs.int().argmax(-1))
        differing: list[tuple[int, int]] = to_list(differs.any(-1).nonzero())
        for arm, row in differing:
            j = first[arm][row]
            tokens = [*expected.draft.tokens[row][:j], int(choices[arm, row, j])]
            if tokens[-1] in self.model.cfg.eos_token_ids or len(tokens) == self.max_new_tokens:
                self.found[numbers[arm], expected.rows[row]] = tokens
                continue
            new = _DecodingRow(arms[arm], numbers[arm], expected, row, tokens)
            if self._slots is None:
                self._slots = self._room()
            fork_row = arm * logits.shape[1] + row
            for layer in range(self.model.cfg.n_layers):
                cache, i = (forked.cache, fork_row) if layer in forked.cache.keys else (step.cache, row)
                known = cache.keys[layer][i, : new.position], cache.values[layer][i, : new.position]
                self._slots.fill(len(self._waiting), layer, *known)
            self._waiting.append(new)
            if len(self._waiting) == self._slots.count:
                self.finish()

    def _room(self) -> _Slots:
        """Slots for as many rows as can come, or as memory has room for."""
        fits = min(self.budget.decoding_rows(self._size), self._most_rows)
        places = range(fits)
        return next(
            slots
            for _, slots in self.budget.in_parts(
                places, lambda rest: fits, lambda part: _Slots.of(self.model, len(part), self._size)
            )
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Let all rows that wait decode to their end."""
        rows, self._waiting = self._waiting, []
        self.tally.decoded += len(rows)
        while rows:
            tokens: list[int] = []
            for _, chosen in self.budget.in_parts(range(len(rows)), len, partial(self._next_tokens, rows)):
                tokens += chosen
            self.tally.row_layers += len(rows) * self.model.cfg.n_layers
            rows = self._advance(rows, tokens)

    def _next_tokens(self, rows: Sequence[_DecodingRow], part: Sequence[int]) -> list[int]:
        """The tokens that follow in some of the rows, whose slots are those of their numbers."""
        model, device, slots = self.model, self.model.cfg.device, self._slots
        assert slots is not None
        slots.first, rows = part[0], [rows[i] for i in part]
        slots.at = torch.tensor([row.position for row in rows], device=device)
        token = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        parts = [(len(same), same[0].arm.hooks) for same in _by_arm(rows)]
        with model.hooks(fwd_hooks=stack_hooks(parts)):
            resid = model.hook_embed(model.embed_text(token))
            resid = model.run_blocks(resid, _context(rows, slots))
            logits = model.unembed(model.ln_final(resid))[:, 0]
        for i, row in enumerate(rows):
            check_finite(logits[None, i : i + 1, None], [row.arm], [row.expected.ids[row.row]])
        choices, near = _likeliest(_scores(rows, logits.float()), model.cfg.dtype)
        self.tally.near_ties += int(near.sum())
        return to_list(choices)

    def _advance(self, rows: list[_DecodingRow], tokens: list[int]) -> list[_DecodingRow]:
        """The rows that are not at their end, moved together."""
        unfinished: list[_DecodingRow] = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.tokens.append(token)
            if token in self.model.cfg.eos_token_ids or len(row.tokens) == self.max_new_tokens:
                self.found[row.number, row.expected.rows[row.row]] = row.tokens
                continue
            assert self._slots is not None
            self._slots.move(i, len(unfinished))
            unfinished.append(row)
        return unfinished


def _context(rows: Sequence[_DecodingRow], slots: _Slots) -> AttentionContext:
    """For each row's last token, which sees what its slot holds."""
    tokens = AttentionContext.of_text([(row.expected.tokens, row.row, row.position) for row in rows])
    return replace(tokens.seeing(slots.at, slots.length), kv_cache=slots)


def _scores(rows: Sequence[_DecodingRow], logits: Float[Tensor, "row d_vocab"]) -> Tensor:
    """What decoding makes of the logits of rows whose prompts may have several lengths."""
    if not rows[0].expected.process:
        return logits
    scores, alike = logits.clone(), dict[tuple[int, int], list[int]]()
    for i, row in enumerate(rows):
        alike.setdefault((len(row.prompt), len(row.tokens)), []).append(i)
    for indices in alike.values():  # no padding: one length, one way to process
        said = torch.tensor([rows[i].tokens for i in indices], device=logits.device)
        ids = torch.cat((torch.stack([rows[i].prompt for i in indices]), said), dim=1)
        scores[indices] = rows[indices[0]].expected.process(ids, logits[indices])
    return scores


def _by_arm(rows: Sequence[_DecodingRow]) -> Iterator[list[_DecodingRow]]:
    arm_rows: list[_DecodingRow] = []
    for row in rows:
        if arm_rows and arm_rows[0].number != row.number:
            yield arm_rows
            arm_rows = []
        arm_rows.append(row)
    yield arm_rows


@dataclass
class _Slots(KVCache):
    """Room for keys and values of several rows; the next token of the rows that run goes to position `at`.

    Attributes:
        count: How many rows there is room for.
        first: The slot of the first row that runs; the others follow.
        at: By row that runs.
    """

    count: int = 1
    first: int = 0
    at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    @classmethod
    def of(cls, model: HookedVLM, count: int, size: int) -> _Slots:
        """Room for so many rows of so many positions, in every layer."""
        cfg, slots = model.cfg, cls(count=count)
        room = (count, size, cfg.n_key_value_heads, cfg.d_head)
        for layer in range(cfg.n_layers):
            for cached in (slots.keys, slots.values):
                cached[layer] = torch.zeros(room, device=cfg.device, dtype=cfg.dtype)
        return slots

    @property
    def length(self) -> int:
        """How many positions the longest row fills, its next token's included."""
        return int(self.at.max()) + 1

    def fill(self, slot: int, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values of a row's tokens so far, [pos kv_head d_head]."""
        self.keys[layer][slot, : len(keys)] = keys
        self.values[layer][slot, : len(values)] = values

    def move(self, slot: int, to: int) -> None:
        """Take a row to another slot."""
        if slot != to:
            for cached in (self.keys, self.values):
                for x in cached.values():
                    x[to] = x[slot]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        each = torch.arange(self.first, self.first + len(self.at), device=self.at.device)
        self.keys[layer][each, self.at] = k[:, 0]
        self.values[layer][each, self.at] = v[:, 0]
        seen = slice(self.first, self.first + len(self.at)), slice(self.length)
        return self.keys[layer][seen], self.values[layer][seen]
