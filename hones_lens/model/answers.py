"""The correct answer after its prompt: the positions that predict its tokens, and its log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hones_lens.model.choices import require_choice
from hones_lens.model.inputs import VLMInputs
from hones_lens.model.typed import to_list


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
    require_choice("positions", positions, ("all", "last"))
    if positions == "all":
        return inputs.attention_mask.bool()
    assert inputs.answer_mask is not None
    first = inputs.answer_mask.int().argmax(-1)
    return torch.arange(inputs.input_ids.shape[1], device=first.device) == first[:, None] - 1


class LogitsAndLoss(NamedTuple):
    """What a forward pass returns under `return_type="both"`."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, ""]


def loss_of(output: Any) -> Any:
    """The loss, of what a forward pass returned under `return_type="loss"` or `"both"`."""
    return output.loss if isinstance(output, LogitsAndLoss) else output


def answer_loss(logits: Float[Tensor, "batch pos d_vocab"], inputs: VLMInputs) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, in float32 at least.

    Over the labels that are not −100, as Hugging Face's; without labels over the answer tokens, and where no
    answer is marked over all text tokens.

    Raises:
        ValueError: No token to predict, or a label that would be predicted from padding; names the row.
    """
    targets = _targets(inputs)[:, 1:].to(logits.device)
    predicted = targets != -100
    if not bool(predicted.any()):
        raise ValueError("these inputs have no token to predict, so there is no loss")
    logits = logits[:, :-1][predicted]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[predicted])


def _targets(inputs: VLMInputs) -> Int[Tensor, "batch pos"]:
    """The token to predict at each position, from the one before it; −100 where there is none."""
    if inputs.labels is None:
        target_mask = inputs.answer_mask
        if target_mask is None:
            target_mask = inputs.token_groups["text"] & (inputs.attention_mask.cumsum(-1) > 1)
        return inputs.input_ids.masked_fill(~target_mask, -100)
    if inputs.labels.shape != inputs.input_ids.shape:
        raise ValueError(
            f"labels {list(inputs.labels.shape)} do not fit input_ids {list(inputs.input_ids.shape)}"
        )
    from_padding = (inputs.labels[:, 1:] != -100) & (inputs.attention_mask[:, :-1] == 0)
    places: list[list[int]] = to_list(from_padding.nonzero())
    if places:
        row, position = places[0]
        raise ValueError(
            f"row {row}: the label at position {position + 1} would be predicted from padding: set it to -100"
        )
    return inputs.labels


def check_return_type(
    return_type: str | None, stop_at_layer: int | None, logits_to_keep: int | Tensor
) -> None:
    """Check the options of a forward pass that say what comes back.

    Raises:
        ValueError: An unknown `return_type`, or a loss that the other options leave no logits for.
    """
    if return_type is not None:
        require_choice("return_type", return_type, ("logits", "loss", "both"), "None")
    if return_type in ("loss", "both"):
        if stop_at_layer is not None:
            raise ValueError(f"return_type={return_type!r} needs all layers: leave stop_at_layer out")
        if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
            raise ValueError(f"return_type={return_type!r} needs all positions: leave logits_to_keep out")


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
