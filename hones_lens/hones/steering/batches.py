"""Training batches with cached clean activations, and the loss and gradient of steering (HONES eq. H5)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import Segment, TensorJournal
from hones_lens.hones.masking import Neurons
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.hones.steering.questions import LabelledPrompt, labelled_prompts, prepare_batch
from hones_lens.hones.steering.scales import scaling_hooks
from hones_lens.interventions import Hook
from hones_lens.model import Answer, AttentionContext, HookedVLM, free_bytes, summed_log_probs
from hones_lens.tasks import Task

T = TypeVar("T")
_SHARE = 0.5  # of free memory, for cached clean activations
_ANSWER = ("positions", "ids", "mask")


@dataclass(frozen=True)
class CleanBatch:
    """Cached activations and log-probabilities of the unsteered model for some prompts.

    Attributes:
        ids: The example id of each row.
        segment: The residual stream that enters the first steered layer, with its positions and mask.
        answer: The positions and ids of the answers' tokens.
        log_probs: Log-probabilities of the whole vocabulary at the positions that predict an answer's tokens.
        weights: The weight of each row in the loss of its step.
    """

    ids: list[str]
    segment: Segment
    answer: Answer
    log_probs: Float[Tensor, "row kept d_vocab"]
    weights: Float[Tensor, " row"]

    def to(self, device: torch.device) -> CleanBatch:
        """Copy the batch to another device."""
        moved = {name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        return CleanBatch.from_tensors(self.ids, moved)

    @property
    def n_bytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(x.numel() * x.element_size() for x in self.to_tensors().values())

    def to_tensors(self) -> dict[str, Tensor]:
        """All but the ids, by name."""
        named = {f"attention.{name}": tensor for name, tensor in self.segment.attention.tensors().items()}
        named |= {f"answer.{name}": getattr(self.answer, name) for name in _ANSWER}
        return {**named, "resid": self.segment.resid, "log_probs": self.log_probs, "weights": self.weights}

    def part(self, rows: Sequence[int]) -> CleanBatch:
        """Some of its rows, whose losses and weights are the same as in the whole."""
        if len(rows) == len(self.ids):
            return self
        shared = {"answer.positions"}
        tensors = {
            name: x if name in shared or len(x) == 1 else x[list(rows)]  # one mask may be every row's
            for name, x in self.to_tensors().items()
        }
        return CleanBatch.from_tensors([self.ids[row] for row in rows], tensors)

    def in_parts(self, budget: engine.Budget, most: int, run: Callable[[CleanBatch], T]) -> Iterator[T]:
        """What comes of parts of its rows.

        Args:
            budget: Halves a part that runs out of memory, which then runs again.
            most: How many rows fit at once.
            run: Takes a part.
        """
        rows = range(len(self.ids))
        for _, out in budget.in_parts(rows, lambda rest: most, lambda part: run(self.part(part))):
            yield out

    @classmethod
    def from_tensors(cls, ids: list[str], tensors: Mapping[str, Tensor]) -> CleanBatch:
        """The batch that `to_tensors` told."""
        prefix = "attention."
        attention = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        answer = Answer(**{name: tensors[f"answer.{name}"] for name in _ANSWER})
        keep = len(answer.positions) + 1
        segment = Segment(tensors["resid"], AttentionContext.of_tensors(attention), keep)
        return cls(ids, segment, answer, tensors["log_probs"], tensors["weights"])


class TrainingBatches:
    """Prompts with their right answers, grouped into optimizer steps; the layers below `layer` run only once.

    The examples of each step are drawn once; the order of the steps is drawn anew for every epoch. Clean
    activations are cached in main memory as long as they fit, and recomputed otherwise. What is cached is
    kept in the journal too, if that can keep tensors, so that a killed learning does not compute it again.

    Args:
        model, task, examples: What to learn from.
        layer: The first steered layer.
        config: Says how many examples a step has, and which labelled_prompts are asked.
        batch_size: Rows a pass.
        memory_budget: GB of main memory; default: half of what is free.
        journal: Where clean activations are kept.
    """

    def __init__(
        self,
        model: HookedVLM,
        task: Task,
        examples: Sequence[Example],
        layer: int,
        config: SteeringConfig,
        *,
        batch_size: int = 4,
        memory_budget: float | None = None,
        journal: MutableMapping[str, Any] | None = None,
    ):
        self.model, self.layer, self.seed = model, layer, config.seed
        self._journal = journal if isinstance(journal, TensorJournal) else None
        by_example = labelled_prompts(task, examples, config.negatives, config.seed)
        order = np.random.default_rng(config.seed).permutation(len(by_example)).tolist()
        self.steps: list[list[list[LabelledPrompt]]] = []
        for start in range(0, len(by_example), config.accumulate):
            prompts = [prompt for i in order[start : start + config.accumulate] for prompt in by_example[i]]
            self.steps.append([prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)])
        cpu = torch.device("cpu")
        self._bytes_left = _SHARE * free_bytes(cpu) if memory_budget is None else memory_budget * 1e9
        self._cache: dict[tuple[int, int], CleanBatch] = {}

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts and answers, in the order of the steps."""
        digest = hashlib.blake2b(digest_size=12)
        for prompt in (prompt for step in self.steps for batch in step for prompt in batch):
            digest.update(repr((prompt.example.id, prompt.prompt, prompt.answer)).encode())
        return digest.hexdigest()

    def order(self, epoch: int) -> list[int]:
        """The order of the steps in an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def of_step(self, step: int) -> Iterator[CleanBatch]:
        """Yield the batches of one step."""
        total = sum(prompt.weight for prompts in self.steps[step] for prompt in prompts)
        for i, prompts in enumerate(self.steps[step]):
            key = (step, i)
            if key not in self._cache:
                name = f"steering/clean/{step}/{i}"
                kept = self._kept(name, prompts)
                batch = self._clean(prompts, total) if kept is None else kept
                if batch.n_bytes > self._bytes_left:
                    yield batch.to(self.model.cfg.device)
                    continue
                self._bytes_left -= batch.n_bytes
                self._cache[key] = batch.to(torch.device("cpu"))
                if kept is None and self._journal is not None:
                    self._journal.keep_tensors(name, len(prompts), self._cache[key].to_tensors())
            yield self._cache[key].to(self.model.cfg.device)

    def _kept(self, name: str, prompts: Sequence[LabelledPrompt]) -> CleanBatch | None:
        """A batch that is in the journal."""
        found = None if self._journal is None else self._journal.find_tensors(name)
        if found is None:
            return None
        return CleanBatch.from_tensors([prompt.example.id for prompt in prompts], found[1])

    @torch.no_grad()
    def _clean(self, prompts: Sequence[LabelledPrompt], total: float) -> CleanBatch:
        batch = prepare_batch(self.model, prompts)
        answer = Answer.of(batch.inputs)
        segment = Segment.of(self.model, batch.inputs, len(answer.positions) + 1)
        resid = self.model.run_blocks(segment.resid, segment.context(1), 0, self.layer)
        segment = replace(segment, resid=resid, attention=segment.attention.from_layer(self.layer))
        weights = torch.tensor([prompt.weight / total for prompt in prompts], device=resid.device)
        log_probs = log_probs_from_layer(self.model, segment, self.layer)
        return CleanBatch(batch.ids, segment, answer, log_probs, weights)


def log_probs_from_layer(model: HookedVLM, segment: Segment, layer: int) -> Float[Tensor, "row kept d_vocab"]:
    """Log-probabilities where the answers' tokens are predicted, from the stream that enters a layer."""
    resid = model.run_blocks(segment.resid, segment.context(1), layer)
    kept = resid[:, -segment.keep : -1]
    return model.unembed(model.ln_final(kept)).float().log_softmax(-1)


def losses(
    clean: CleanBatch, log_probs: Float[Tensor, "row kept d_vocab"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Cross-entropy and KL(original ‖ steered), in nats, each row's mean over its answer's tokens."""
    mask = clean.answer.mask
    kl = F.kl_div(log_probs, clean.log_probs, reduction="none", log_target=True).sum(-1)
    counts = mask.sum(-1)
    return -summed_log_probs(log_probs, clean.answer.ids, mask) / counts, (kl * mask).sum(-1) / counts


@contextmanager
def frozen_parameters(model: HookedVLM) -> Iterator[None]:
    """Context in which no parameter requires a gradient; the flags are restored afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.enable_grad()
def gradient_of_step(
    model: HookedVLM, batches: TrainingBatches, step: int, neurons: Neurons, a: Tensor, config: SteeringConfig
) -> tuple[Float[Tensor, " neuron"], dict[str, float]]:
    """∂ loss/∂a of one step, and the loss with its parts, `ce` and `kl` (HONES eq. H5).

    Raises:
        FloatingPointError: A loss or gradient that is not finite; names the examples.
    """
    penalty = config.l2_weight * a.square().mean()
    (total_gradient,) = torch.autograd.grad(penalty, a)
    losses_by_name = {"loss": float(penalty.detach()), "ce": 0.0, "kl": 0.0}
    budget = engine.Budget(model)

    def run(clean: CleanBatch) -> tuple[Tensor, dict[str, float]]:
        return _gradient(model, clean, batches.layer, scaling_hooks(neurons, 1 + a), a, config)

    for clean in batches.of_step(step):
        fits = budget.gradient_rows(clean.segment.resid.shape[1], clean.segment.keep)
        for gradient, parts in clean.in_parts(budget, fits, run):
            total_gradient = total_gradient + gradient
            for name, value in parts.items():
                losses_by_name[name] += value
    return total_gradient, losses_by_name


def _gradient(
    model: HookedVLM,
    clean: CleanBatch,
    layer: int,
    hooks: Sequence[Hook],
    a: Tensor,
    config: SteeringConfig,
) -> tuple[Float[Tensor, " neuron"], dict[str, float]]:
    """What some rows add to the gradient of their step, and to its losses."""
    with engine.error_context(clean.ids, hooks), model.hooks(fwd_hooks=list(hooks)):
        ce, kl = losses(clean, log_probs_from_layer(model, clean.segment, layer))
        loss = (clean.weights * (ce + config.kl_weight * kl)).sum()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss.item()}")
        (gradient,) = torch.autograd.grad(loss, a)
        if not bool(torch.isfinite(gradient).all()):
            raise FloatingPointError("the gradient is not finite")
    parts = {"loss": loss, "ce": clean.weights @ ce, "kl": clean.weights @ kl}
    return gradient, {name: float(value.detach()) for name, value in parts.items()}
