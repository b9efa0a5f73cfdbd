"""Batches of pairs with their base and source runs, shared by all kinds of patching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.metrics import Metric
from hones_lens.analysis.patching.pairs import PatchPairs, logits_at_end
from hones_lens.model import HookedVLM, VLMInputs

DIRECTIONS = {"noise": "corrupted into clean", "denoise": "clean into corrupted"}


@dataclass(frozen=True, eq=False)
class PairBatch:
    """A batch of pairs: the base run that is patched, and the source run that activations are taken from.

    Attributes:
        pairs: The pairs.
        base, source: Inputs of the two runs, with image embeddings.
        clean_logits: Next-token logits of the clean run, [batch d_vocab].
    """

    pairs: PatchPairs
    base: VLMInputs
    source: VLMInputs
    clean_logits: Float[Tensor, "batch d_vocab"]

    def value(self, metric: Metric, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each pair.

        Raises:
            FloatingPointError: A value that is not finite; names the pair.
        """
        values = metric(logits, self.pairs, self.clean_logits)
        if not bool(torch.isfinite(values).all()):
            first_bad = self.pairs.ids[int((~torch.isfinite(values)).int().argmax())]
            raise FloatingPointError(f"the metric of pair {first_bad!r} is not finite")
        return values

    @torch.no_grad()
    def gap(self, model: HookedVLM, metric: Metric) -> Float[Tensor, " batch"]:
        """The metric of the source run minus that of the base run."""
        source, base = (self.value(metric, logits_at_end(model, run)) for run in (self.source, self.base))
        return source - base

    def mask_rows(self, mask: Tensor, start: int) -> Tensor:
        """This batch's rows of a mask [pairs pos] that starts at `start`, without surplus padding."""
        rows = mask[start : start + len(self.pairs)]
        return rows[:, rows.shape[1] - self.base.input_ids.shape[1] :]


def check_direction(direction: str) -> None:
    """Raise ValueError for an unknown direction."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; valid: {', '.join(DIRECTIONS)}")


@torch.no_grad()
def pair_batches(
    model: HookedVLM, pairs: PatchPairs, direction: str, batch_size: int
) -> Iterator[tuple[int, PairBatch]]:
    """Yield each batch with the index of its first pair.

    Raises:
        ValueError: An unknown direction.
    """
    check_direction(direction)
    for start in range(0, len(pairs), batch_size):
        whole = batch_size >= len(pairs)
        batch_pairs = pairs if whole else pairs[start : start + batch_size]
        clean, corrupted = (
            model.with_image_embeds(model.as_inputs(inputs))
            for inputs in (batch_pairs.clean, batch_pairs.corrupted)
        )
        base, source = (clean, corrupted) if direction == "noise" else (corrupted, clean)
        yield start, PairBatch(batch_pairs, base, source, logits_at_end(model, clean))


def check_no_hooks(model: HookedVLM, names: Sequence[str], why: str) -> None:
    """Raise ValueError if the model has lasting hooks at one of these, which would be bypassed."""
    for name in names:
        if model.hook_dict[name].fwd_hooks:
            raise ValueError(f"the model has hooks at {name}, which {why} passes by: remove them")
