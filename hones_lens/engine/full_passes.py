"""Predictions and log-probabilities by whole passes under hooks: what the sweep's forks must equal."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hones_lens.engine.batches import Batch
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, token_names
from hones_lens.tasks import Task

MAX_NEW_TOKENS = 24
Prediction = Any  # a text, or the margins of all candidates


def predict(model: HookedVLM, task: Task, batch: Batch, hooks: Sequence[Hook] = ()) -> list[Prediction]:
    """What the model answers to a batch under hooks: texts, or margins [n_candidates] of Yes over No.

    Raises:
        FloatingPointError: Logits that are not finite; names the hooks and the examples.
    """
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)), error_context(batch.ids, hooks):
        if not task.ranks:
            return list(model.generate(batch.inputs, max_new_tokens=MAX_NEW_TOKENS))
        return _margins(model, task, batch)


def _margins(model: HookedVLM, task: Task, batch: Batch) -> list[list[float]]:
    yes, no = yes_no_ids(model, task.prompts(batch.examples[0])[0])
    logits = model(batch.inputs, logits_to_keep=1)[:, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("logits are not finite")
    margins = (logits[:, yes] - logits[:, no]).cpu().split(list(batch.rows))
    return [part.tolist() for part in margins]


def yes_no_ids(model: HookedVLM, prompt: str) -> tuple[int, int]:
    """The ids that Yes and No begin with where they really follow a prompt.

    Raises:
        ValueError: They begin with the same token, so that a margin would always be zero.
    """
    yes, no = (model.continuation(prompt, word)[0] for word in ("Yes", "No"))
    if yes == no:
        (name,) = token_names(model, [yes])
        raise ValueError(
            f"Yes and No both begin with the token {name!r} after this prompt; they can't be compared"
        )
    return yes, no


@contextmanager
def error_context(ids: Sequence[str], hooks: Sequence[Hook] = ()) -> Generator[None]:
    """Add hooks and ids of the examples to a FloatingPointError that is raised inside."""
    try:
        yield
    except FloatingPointError as error:
        where = ", ".join(str(name) for name, _ in hooks) or "no hook"
        raise FloatingPointError(f"{error} (hooks: {where}; examples: {', '.join(ids)})") from error


def log_probs(model: HookedVLM, batch: Batch, hooks: Sequence[Hook] = ()) -> Tensor:
    """Log-probability of each example's right answer under hooks, [n_examples] on the CPU.

    Raises:
        FloatingPointError: A value that is not finite; names the hooks and the example.
    """
    with model.hooks(fwd_hooks=list(hooks)):
        values = model.log_probs(batch.inputs).cpu()
    if not bool(torch.isfinite(values).all()):
        worst = batch.examples[int((~torch.isfinite(values)).int().argmax())]
        with error_context([worst.id], hooks):
            raise FloatingPointError("the log-probability of the right answer is not finite")
    return values
