"""Metrics of patching: differentiable functions of the next token's logits, one value per pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.model import did_you_mean

Logits = Float[Tensor, "batch d_vocab"]
# Takes the run's logits, the pairs and the clean run's logits; returns one value per pair, [batch].
Metric = Callable[[Logits, PatchPairs, Logits], Float[Tensor, " batch"]]


def logit_diff(logits: Logits, pairs: PatchPairs, clean: Logits) -> Float[Tensor, " batch"]:
    """Logit of the clean answer minus the logit of the corrupted one.

    Raises:
        ValueError: The pairs have no foil.
    """
    if pairs.foil is None:
        raise ValueError("these pairs have no foil: measure 'log_prob' or 'kl'")
    rows = torch.arange(len(logits), device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[rows, pairs.answer].to(wide) - logits[rows, pairs.foil].to(wide)


def log_prob(logits: Logits, pairs: PatchPairs, clean: Logits) -> Float[Tensor, " batch"]:
    """Log-probability of the clean answer's token, in nats.

    As the metric of a stage (`metric="log_prob"`, or this function), it is that of the whole answer where the
    pairs know its tokens (`PatchPairs.answer_ids`): the sum over them, each behind those before it.
    """
    rows = torch.arange(len(logits), device=logits.device)
    return logits.float().log_softmax(-1)[rows, pairs.answer]


def kl(logits: Logits, pairs: PatchPairs, clean: Logits) -> Float[Tensor, " batch"]:
    """KL(clean ‖ this run) of the next token, in nats, negated, so that higher is nearer to clean."""
    clean_log_probs = clean.float().log_softmax(-1)
    return -(clean_log_probs.exp() * (clean_log_probs - logits.float().log_softmax(-1))).sum(-1)


METRICS: dict[str, Metric] = {"logit_diff": logit_diff, "log_prob": log_prob, "kl": kl}


def reads_whole_answer(metric: str | Metric) -> bool:
    """Whether a metric is of all tokens of the answer, rather than of the next one."""
    return metric in ("log_prob", log_prob)


def as_metric(metric: str | Metric) -> Metric:
    """A metric, or the metric of that name.

    Raises:
        ValueError: An unknown name.
    """
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise ValueError(
            f"unknown patching metric {metric!r}; valid: {', '.join(METRICS)}, or a function"
            f"{did_you_mean(metric, METRICS)}"
        )
    return METRICS[metric]
