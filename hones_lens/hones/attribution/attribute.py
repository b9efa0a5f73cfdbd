"""`attribute_neurons`: a score for every decoder neuron, by HONES (eqs. H2 and H3) or another ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.attribution.neurons import default_ratio, head_conditioned
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task


def attribute_neurons(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    heads: HeadScores | None = None,
    ratio: float | None = None,
    *,
    method: str = "hones",
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> NeuronScores:
    """Rank all decoder neurons for a task.

    Args:
        model: The model.
        task: A task or its name.
        examples: The discovery examples.
        heads: Critical heads (needed by `hones`): their stored top_k with w > 0 are used.
        ratio: Share of all neurons that are task neurons; default from `model_configs/`.
        method: `hones` (eq. H3), or a ranking of `attribution/rankings.py`.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        options: For `hones`: `normalize`, `apply_ln`, `foils` of `target_directions`; for others
            see their functions.

    Returns:
        NeuronScores, on the CPU.

    Raises:
        ValueError: An unknown method (lists the valid ones), no examples, no critical head.
    """
    from hones_lens.hones.attribution import rankings

    task = engine.as_task(task)
    engine.check_examples(task, examples)
    common, errors = {"batch_size": batch_size, "progress": progress}, None
    if method == "hones":
        if heads is None:
            raise ValueError("method 'hones' needs heads: pass what localize_heads returned")
        scores, errors = head_conditioned(model, task, examples, heads.top(), **common, **options)
    elif method in rankings.RANKINGS:
        scores = rankings.RANKINGS[method](model, task, examples, **common, **options)
    else:
        raise ValueError(f"unknown method {method!r}; valid: hones, {', '.join(rankings.RANKINGS)}")
    return NeuronScores(
        task=task.name,
        method=method,
        model_name=model.cfg.model_name,
        scores=scores.double().cpu(),
        ratio=default_ratio(model) if ratio is None else ratio,
        n_examples=len(examples),
        errors=errors,
    )
