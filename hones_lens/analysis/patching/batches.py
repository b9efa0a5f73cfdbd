"""Batches of pairs with their base and source runs, shared by all kinds of patching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.metrics import Metric, reads_whole_answer
from hones_lens.analysis.patching.pairs import PatchPairs, continued_mask, logits_at_end, with_answers
from hones_lens.model import Answer, HookedVLM, VLMInputs, require_choice

DIRECTIONS = {"noise": "corrupted into clean", "denoise": "clean into corrupted"}


@dataclass(frozen=True, eq=False)
class PairBatch:
    """A batch of pairs: the base run that is patched, and the source run that activations are taken from.

    Attributes:
        pairs: The pairs.
        base, source: Inputs of the two runs, with image embeddings; followed by the right answers where the
            metric is of whole answers.
        clean_logits, corrupted_logits: Next-token logits of the two runs, [batch d_vocab].
        answer: The answers' tokens, where the metric is of whole answers.
        appended: How many tokens of them were appended to each row, [batch].
    """

    pairs: PatchPairs
    base: VLMInputs
    source: VLMInputs
    clean_logits: Float[Tensor, "batch d_vocab"]
    corrupted_logits: Float[Tensor, "batch d_vocab"]
    answer: Answer | None = None
    appended: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        model: HookedVLM,
        pairs: PatchPairs,
        clean: VLMInputs,
        corrupted: VLMInputs,
        direction: str,
        metric: str | Metric,
    ) -> PairBatch:
        """The batch as a metric needs it, from the pairs' inputs with image embeddings."""
        clean_logits, corrupted_logits = (logits_at_end(model, inputs) for inputs in (clean, corrupted))
        answer, appended = None, list[int]()
        if reads_whole_answer(metric) and pairs.answer_ids:
            encoded = replace(pairs, clean=clean, corrupted=corrupted)
            clean, corrupted, answer, appended = with_answers(model, encoded)
        base, source = (clean, corrupted) if direction == "noise" else (corrupted, clean)
        return cls(pairs, base, source, clean_logits, corrupted_logits, answer, tuple(appended))

    @property
    def keep(self) -> int:
        """At how many of the last positions the metric reads logits."""
        return 1 if self.answer is None else len(self.answer.positions)

    def value(self, metric: Metric, logits: Float[Tensor, "batch keep d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each pair, from logits at the last `keep` positions.

        Raises:
            FloatingPointError: A value that is not finite; names the pair.
        """
        if self.answer is None:
            values = metric(logits[:, -1], self.pairs, self.clean_logits)
        else:
            values = self.answer.log_probs(logits)
        if not bool(torch.isfinite(values).all()):
            first_bad = self.pairs.ids[int((~torch.isfinite(values)).int().argmax())]
            raise FloatingPointError(f"the metric of pair {first_bad!r} is not finite")
        return values

    @torch.no_grad()
    def gap(self, model: HookedVLM, metric: Metric) -> Float[Tensor, " batch"]:
        """The metric of the source run minus that of the base run."""
        source, base = (
            self.value(metric, model(run, logits_to_keep=self.keep)) for run in (self.source, self.base)
        )
        return source - base

    def mask_rows(self, mask: Tensor, start: int) -> Tensor:
        """This batch's rows of a mask [pairs pos] from `start` on, over the positions of its runs.

        Surplus padding is left out. Tokens of answers behind a prompt are in the groups of its last token.
        """
        rows = mask[start : start + len(self.pairs)]
        rows = rows[:, rows.shape[1] - self.pairs.clean.input_ids.shape[1] :]
        return continued_mask(rows, self.appended) if any(self.appended) else rows


def check_direction(direction: str) -> None:
    """Raise ValueError for an unknown direction."""
    require_choice("direction", direction, DIRECTIONS)


def check_batches(direction: str, batch_size: int) -> None:
    """Raise ValueError for an unknown direction, or batches of no pairs."""
    check_direction(direction)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def batches_of_rows(n: int, batch_size: int) -> list[range]:
    """The numbers of n pairs, batch by batch."""
    return [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]


@torch.no_grad()
def pair_batches(
    model: HookedVLM, pairs: PatchPairs, direction: str, batch_size: int, metric: str | Metric
) -> Iterator[tuple[int, PairBatch]]:
    """Yield each batch, as the metric needs it, with the index of its first pair.

    Raises:
        ValueError: An unknown direction.
    """
    check_batches(direction, batch_size)
    for rows in batches_of_rows(len(pairs), batch_size):
        yield rows.start, pair_batch(model, pairs, rows, direction, metric)


@torch.no_grad()
def pair_batch(
    model: HookedVLM, pairs: PatchPairs, rows: range, direction: str, metric: str | Metric
) -> PairBatch:
    """The batch of these rows, as the metric needs it."""
    chosen = pairs if len(rows) == len(pairs) else pairs[rows.start : rows.stop]
    clean, corrupted = (
        model.with_image_embeds(model.as_inputs(inputs)) for inputs in (chosen.clean, chosen.corrupted)
    )
    return PairBatch.of(model, chosen, clean, corrupted, direction, metric)


def check_no_hooks(model: HookedVLM, names: Sequence[str], why: str) -> None:
    """Raise ValueError if the model has lasting hooks at one of these, which would be bypassed."""
    hooked = set(model.hooked_names())
    for name in names:
        if name in hooked:
            raise ValueError(f"the model has hooks at {name}, which {why} passes by: remove them")
