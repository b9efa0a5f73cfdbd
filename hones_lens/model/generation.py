"""Greedy decoding of a hooked model."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import ModelInput, VLMInputs
from hones_lens.model.nn.attention import KVCache
from hones_lens.model.tokens import tokenizer_of


class PredictsTokens(Protocol):
    """The part of a model that decoding needs."""

    @property
    def cfg(self) -> VLMConfig:
        """End-of-sequence and padding ids."""
        ...

    def next_token_logits(self, inputs: VLMInputs, said: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Logits [batch d_vocab] of the token that follows the prompts and `said`."""
        ...


@torch.no_grad()
def greedy(
    model: PredictsTokens, inputs: VLMInputs, max_new_tokens: int, use_kv_cache: bool = True
) -> Tensor:
    """New tokens [batch new] of every row: the likeliest at each step, EOS kept, then padding.

    Raises:
        ValueError: max_new_tokens below 1, or a row padded on the right.
        FloatingPointError: Logits that are not finite; names the row.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    inputs.require_left_padding("generate")
    eos = torch.tensor(model.cfg.eos_token_ids, device=model.cfg.device)
    finished = torch.zeros(len(inputs), dtype=torch.bool, device=model.cfg.device)
    steps: list[Tensor] = []
    kv_cache = KVCache() if use_kv_cache else None
    while True:
        new_tokens = torch.stack(steps, dim=1) if steps else inputs.input_ids[:, :0]
        logits = model.next_token_logits(inputs, new_tokens, kv_cache)
        if not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits).all(-1)).int().argmax())
            raise FloatingPointError(f"logits of row {row} are not finite at new token {len(steps)}")
        token = torch.where(finished, model.cfg.pad_token_id, logits.argmax(-1))
        steps.append(token)
        finished = finished | torch.isin(token, eos)
        if len(steps) == max_new_tokens or bool(finished.all()):
            return torch.stack(steps, dim=1)


class Generates(PredictsTokens, Protocol):
    """A model that takes any kind of input and generates text."""

    processor: Any

    def as_inputs(self, model_input: ModelInput) -> VLMInputs:
        """Any kind of model input as VLMInputs."""
        ...


def generate(
    model: Generates,
    inputs: ModelInput,
    max_new_tokens: int = 24,
    return_type: Literal["text", "tokens"] = "text",
    use_kv_cache: bool = True,
) -> list[str] | Tensor:
    """Continue every row greedily; hooks are active at every step (`HookedVLM.generate`).

    Args:
        model: The model.
        inputs: Prompts with their images.
        max_new_tokens: Stop a row after this many, or after an end-of-sequence token.
        return_type: `tokens` gives the new tokens [batch new], EOS kept, then padding.
        use_kv_cache: False computes everything anew at every step (same tokens, slower).

    Returns:
        Stripped strings without special tokens, or token ids.
    """
    tokens = greedy(model, model.as_inputs(inputs), max_new_tokens, use_kv_cache)
    if return_type == "tokens":
        return tokens
    return [text.strip() for text in tokenizer_of(model).batch_decode(tokens, skip_special_tokens=True)]
