"""What the model answers in each pair before anything is patched: what patching can say depends on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hones_lens import engine
from hones_lens.analysis.patching.batches import PairBatch, batches_of_rows, check_batches, pair_batch
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.model import HookedVLM

_OF_EACH_PAIR = ("clean", "corrupted", "right")


@dataclass(frozen=True, eq=False)
class PairAnswers:
    """How far the model prefers the right answer in each pair, unpatched.

    Attributes:
        clean: Margin of the right answer in the clean run, [pair], on the CPU: its logit minus that of the
            foil, or, without a foil, minus the largest other one.
        corrupted: The same margin, of the same answer, in the corrupted run, [pair].
        right: Whether the right answer's token has the highest logit of all in the clean run, and, where the
            foil is known to be the right answer to the corrupted input (counterfactual pairs), the foil's in
            the corrupted run, [pair].
        has_foil: Whether there is a foil.
    """

    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    right: Bool[Tensor, " pair"]
    has_foil: bool

    def to_json(self) -> dict[str, list[Any]]:
        """What of each pair a journal keeps."""
        return {name: getattr(self, name).tolist() for name in _OF_EACH_PAIR}

    @classmethod
    def from_json(cls, kept: Mapping[str, Sequence[Any]], has_foil: bool) -> PairAnswers:
        """Read what `to_json` wrote."""
        clean, corrupted = (torch.tensor(kept[name], dtype=torch.float64) for name in ("clean", "corrupted"))
        return cls(clean, corrupted, torch.tensor(kept["right"], dtype=torch.bool), has_foil)

    @property
    def problem(self) -> str:
        """Why nothing can be concluded from patching these pairs; empty if something can."""
        if 2 * int((self.clean > 0).sum()) > len(self.clean):
            return ""
        return f"{self} (mean margin {self.clean.mean():.3g} clean, {self.corrupted.mean():.3g} corrupted)"

    def __str__(self) -> str:
        text = f"the model answers right in {int(self.right.sum()):,} of {len(self.right):,} pairs"
        if self.has_foil:
            text += f"; the clean run prefers the answer to the foil in {int((self.clean > 0).sum()):,}"
        return text

    def warn(self) -> None:
        """Warn if some pairs are answered wrong, with the share of those that are answered right."""
        if not bool(self.right.all()):
            end = "; nothing can be concluded from patching them" if self.problem else ""
            warnings.warn(f"{self} ({100 * self.right.double().mean():.0f} % right){end}", stacklevel=4)


def answers_of_batch(batch: PairBatch, clean_alone: bool = False) -> PairAnswers:
    """The answers in a batch of pairs, from the logits of its two runs.

    Args:
        batch: The batch.
        clean_alone: Whether the answers to the corrupted inputs do not matter.
    """
    pairs, clean, corrupted = batch.pairs, batch.clean_logits, batch.corrupted_logits
    right = clean.argmax(-1) == pairs.answer
    if pairs.facts and pairs.foil is not None and not clean_alone:
        right = right & (corrupted.argmax(-1) == pairs.foil)
    margins = (_margin(logits, pairs) for logits in (clean, corrupted))
    return PairAnswers(*margins, right=right.cpu(), has_foil=pairs.foil is not None)


def joined_answers(batches: Sequence[PairAnswers]) -> PairAnswers:
    """The answers of all batches."""
    clean, corrupted, right = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in _OF_EACH_PAIR
    )
    return PairAnswers(clean, corrupted, right, batches[0].has_foil)


def pair_answers(
    model: HookedVLM,
    pairs: PatchPairs,
    batch_size: int = 32,
    journal: MutableMapping[str, Any] | None = None,
) -> PairAnswers:
    """Run all pairs unpatched, and compare the logits of their answers.

    Args:
        model, pairs: What to run.
        batch_size: Pairs at a time.
        journal: Finished batches, read and written, so that it can be resumed.
    """
    check_batches("denoise", batch_size)
    engine.expect(journal, "answers", len(pairs), batch_size)
    found: list[PairAnswers] = []
    for rows in batches_of_rows(len(pairs), batch_size):
        key = f"answers/{rows.start}"
        kept = None if journal is None else journal.get(key)
        if kept is None:
            batch = pair_batch(model, pairs, rows, "denoise", metric="logit_diff")
            kept = answers_of_batch(batch).to_json()
            if journal is not None:
                journal[key] = kept
        found.append(PairAnswers.from_json(kept, pairs.foil is not None))
    return joined_answers(found)


def _margin(logits: Float[Tensor, "pair d_vocab"], pairs: PatchPairs) -> Float[Tensor, " pair"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    answer = wide.gather(1, pairs.answer[:, None])[:, 0]
    if pairs.foil is None:
        other = wide.scatter(1, pairs.answer[:, None], -torch.inf).amax(-1)
    else:
        other = wide.gather(1, pairs.foil[:, None])[:, 0]
    return (answer - other).double().cpu()
