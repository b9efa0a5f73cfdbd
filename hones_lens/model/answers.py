"""The correct answer after its prompt: the positions that predict its tokens, and its log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hones_lens.model.inputs import VLMInputs


@dataclass(frozen=True)
class Answer:
    """The answer tokens of a batch that was prepared with answers.

    Attributes:
        positions: Positions whose logits are needed, from just before the first answer token of any row on,
            [kept].
        ids: The token that follows each of these positions, [row kept].
        mask: Whether that token belongs to the row's answer, [row kept].
    """

    positions: Int[Tensor, " kept"]
    ids: Int[Tensor, "row kept"]
    mask: Bool[Tensor, "row kept"]

    @classmethod
    def of(cls, inputs: VLMInputs) -> Answer:
        """Read the answer's positions and ids from the inputs.

        Raises:
            ValueError: The inputs mark no answer.
        """
        if inputs.answer_mask is None:
            raise ValueError("inputs mark no answer: prepare(images, prompts, answers=[...])")
        first = int(inputs.answer_mask.int().argmax(-1).min())
        length = inputs.input_ids.shape[1]
        positions = torch.arange(first - 1, length - 1, device=inputs.input_ids.device)
        return cls(positions, inputs.input_ids[:, first:], inputs.answer_mask[:, first:])

    def log_probs(self, logits: Float[Tensor, "many kept d_vocab"]) -> Float[Tensor, " many"]:
        """Log-probability of the answer, summed over its tokens, in nats.

        Args:
            logits: Logits at `positions`; the batch may be repeated several times along the first axis.
        """
        repeats = len(logits) // len(self.ids)
        ids, mask = self.ids.repeat(repeats, 1), self.mask.repeat(repeats, 1)
        return summed_log_probs(logits.float().log_softmax(-1), ids, mask)


def summed_log_probs(
    log_probs: Float[Tensor, "*rows kept d_vocab"],
    ids: Int[Tensor, "*rows kept"],
    mask: Bool[Tensor, "*rows kept"],
) -> Float[Tensor, "*rows"]:
    """Log-probability of an answer, `Σ_k ln P(y_k | prompt, y_<k)` over its tokens y_k, in nats.

    Args:
        log_probs: Log-probabilities over the vocabulary at the positions that predict the answer's tokens.
        ids: The token that follows each of these positions.
        mask: Whether that token belongs to the answer; the others are left out of the sum.
    """
    return (log_probs.gather(-1, ids[..., None])[..., 0] * mask).sum(-1)


def at_positions(inputs: VLMInputs, positions: str) -> Bool[Tensor, "row pos"]:
    """True at every token (`all`), or at each row's last prompt token (`last`), before its answer.

    Raises:
        ValueError: Another value of `positions`.
    """
    if positions == "all":
        return inputs.attention_mask.bool()
    if positions != "last":
        raise ValueError(f"unknown positions {positions!r}; valid: all, last")
    assert inputs.answer_mask is not None
    first = inputs.answer_mask.int().argmax(-1)
    return torch.arange(inputs.input_ids.shape[1], device=first.device) == first[:, None] - 1


def answer_loss(logits: Float[Tensor, "batch pos d_vocab"], inputs: VLMInputs) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the answer tokens, or of all text tokens where no answer is marked."""
    target_mask = inputs.answer_mask
    if target_mask is None:
        target_mask = inputs.token_groups["text"] & (inputs.attention_mask.cumsum(-1) > 1)
    target_mask = target_mask[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1][target_mask], inputs.input_ids[:, 1:][target_mask])


class RunsForward(Protocol):
    """The methods of a model that a forward pass needs."""

    def as_inputs(self, model_input: VLMInputs) -> VLMInputs:
        """The inputs on the model's device, images located."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Logits."""
        ...


@torch.no_grad()
def log_probs(model: RunsForward, inputs: VLMInputs) -> Float[Tensor, " batch"]:
    """Log-probability of each row's answer (inputs prepared with `answers`), summed over tokens.

    Raises:
        ValueError: The inputs mark no answer.
    """
    located = model.as_inputs(inputs)
    answer = Answer.of(located)
    return answer.log_probs(model(located, logits_to_keep=answer.positions))
