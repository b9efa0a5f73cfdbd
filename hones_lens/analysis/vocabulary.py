"""Vectors of the residual stream read through the unembedding, and the tokens that neurons promote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hones_lens.model import HookedVLM, takes_iterables, weighted

_NEURONS_AT_ONCE = 256  # neurons whose logits are in memory at the same time


class PromotedTokens(NamedTuple):
    """The tokens whose logits each neuron changes most, largest change first.

    Attributes:
        signs: Signs of the neurons' activations: −1 below 0, else 1.
        ids: Token ids.
        logits: What a unit of activation of that sign adds to each token's logit, above the vocabulary's mean
            and before the final norm's scale.
    """

    signs: Float[Tensor, " neuron"]
    ids: Int[Tensor, "neuron k"]
    logits: Float[Tensor, "neuron k"]


@torch.no_grad()
def vocabulary_logits(
    model: HookedVLM, vectors: Float[Tensor, "*lead d_model"]
) -> Float[Tensor, "*lead d_vocab"]:
    """Contribution of residual-stream vectors to every token's logit, before the final norm's scale.

    `⟨v, γ ∘ W_U[:, t]⟩` for every token t, where γ is the final norm's weight, minus the mean over the
    vocabulary, which no probability depends on.
    """
    weighted = (vectors.float() * model.ln_final.weight.float()).to(model.cfg.dtype)
    logits = model.unembed(weighted).float()
    return logits - logits.mean(-1, keepdim=True)


@takes_iterables
@torch.no_grad()
def promoted_tokens(
    model: HookedVLM,
    neurons: Sequence[tuple[int, int]],
    activations: Float[Tensor, " neuron"],
    k: int,
    *,
    largest: bool = True,
) -> PromotedTokens:
    """The k tokens that each neuron promotes most: `vocabulary_logits` of `sign(m_i) W_out[i]`.

    A neuron writes its activation times its output row, so a neuron with a negative activation promotes the
    tokens that its row suppresses. Where a norm is behind the MLP, the row is that times the norm's weight:
    what the neuron adds, but for the scale.

    Args:
        model: The model.
        neurons: (layer, index) of each neuron.
        activations: Activation of each neuron, at one position or averaged; only the sign is used, and 0
            counts as positive.
        k: Number of tokens per neuron.
        largest: False for the tokens that each neuron suppresses most.
    """
    blocks = model.blocks
    rows = torch.stack(
        [weighted(blocks[layer], "mlp", blocks[layer].mlp.W_out[index]) for layer, index in neurons]
    )
    signs = torch.where(activations < 0, -1.0, 1.0).to(rows.device)
    written = signs[:, None] * rows.float()
    top_tokens = [
        vocabulary_logits(model, part).topk(k, largest=largest) for part in written.split(_NEURONS_AT_ONCE)
    ]
    ids, logits = (
        torch.cat([top.indices for top in top_tokens]),
        torch.cat([top.values for top in top_tokens]),
    )
    return PromotedTokens(signs, ids, logits)
