"""`attribute_neurons`: a score for every decoder neuron, by HONES (eqs. H2 and H3) or another ranking."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import ResumedKeywords, SweepOptions, split_keywords
from hones_lens.hones.attribution.ablation import exact_ablation
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.attribution.neurons import default_ratio, head_conditioned_importance
from hones_lens.interventions import Layers, choose_layers
from hones_lens.model import HookedVLM, did_you_mean, takes_iterables
from hones_lens.tasks import Task

Ranking = Callable[..., Tensor]
# Name: module and function, called as `attribute_neurons` says of a `method`.
RANKINGS = {
    "activation_probability": "hones_lens.hones.attribution.rankings:activation_probability",
    "mean_activation": "hones_lens.hones.attribution.rankings:mean_activation",
    "activation_entropy": "hones_lens.hones.attribution.rankings:activation_entropy",
    "direct": "hones_lens.hones.attribution.rankings:direct",
    "qrnca": "hones_lens.hones.attribution.gradients:qrnca",
    "gradient_times_activation": "hones_lens.hones.attribution.gradients:gradient_times_activation",
    "attribution_patching": "hones_lens.hones.attribution.gradients:attribution_patching",
    "exact_ablation": "hones_lens.hones.attribution.ablation:exact_ablation",
    "random": "hones_lens.hones.attribution.rankings:random",
}


def load_ranking(name: str) -> Ranking:
    """The ranking of that name: of `RANKINGS`, or an entry point `hones_lens.rankings`.

    Raises:
        ValueError: No such ranking; lists the valid ones.
    """
    installed = {entry.name: entry.value for entry in entry_points(group="hones_lens.rankings")}
    rankings = RANKINGS | installed | RANKINGS  # the built-in ones first, and not replaced
    if name not in rankings:
        hint = did_you_mean(name, ("hones", *rankings))
        raise ValueError(f"unknown method {name!r}; valid: hones, {', '.join(rankings)}{hint}")
    return pkgutil.resolve_name(rankings[name])


@takes_iterables
def attribute_neurons(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    heads: HeadScores | None = None,
    ratio: float | None = None,
    *,
    method: str | Ranking = "hones",
    layers: Layers | None = None,
    options: SweepOptions | None = None,
    **keywords: Any,
) -> NeuronScores:
    """Rank all decoder neurons for a task.

    Args:
        model: The model.
        task: A task or its name.
        examples: The discovery examples.
        heads: Critical heads (needed by `hones`): their stored top_k with w > 0 are used.
        ratio: Share of all neurons that are task neurons; default from `model_configs/`.
        method: `hones` (eq. H3); the name of another ranking, one of `RANKINGS` or of an installed
            distribution; or a function of your own. It is called as `method(model, task, examples,
            batch_size=..., progress=..., **keywords)` with a Task and a list of Examples, and returns a score
            for every decoder neuron, [layer d_mlp]: higher is more important. One that has a parameter
            `journal` can be resumed (see `engine.resumed_batches`); one that has `layers` is told which are
            asked for.
        layers: Score these alone, e.g. `"10-20"`: others are NaN, and `ratio` is a share of these.
        options: How it runs, as `SweepOptions`.
        keywords: `batch_size` (default 16), `progress`, `journal` of `SweepOptions`; the method's own, for
            `hones` `normalize`, `apply_ln`, `foils` of `target_directions`, for others see their functions.

    Returns:
        NeuronScores, on the CPU.

    Raises:
        ValueError: An unknown method (lists the valid ones), no examples, no critical head, or scores of
            another shape or that are not numbers.
    """
    task = engine.as_task(task)
    engine.check_examples(task, examples)
    batch_keywords, method_keywords = split_keywords(keywords, ResumedKeywords.__annotations__)
    options = SweepOptions.of_resumed(options, batch_keywords, batch_size=16)
    chosen = choose_layers(layers, model.cfg.n_layers)
    method_keywords |= options.of_a_batch
    if options.journal is not None:
        method_keywords["journal"] = options.journal
    scores, errors = _scores_by(method, model, task, examples, heads, chosen, method_keywords)
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    _check_scores(model, name, scores, chosen)
    return NeuronScores(
        task=task.name,
        method=name,
        model_name=model.cfg.model_name,
        scores=_limited(scores.detach().double().cpu(), chosen),
        ratio=default_ratio(model) if ratio is None else ratio,
        n_examples=len(examples),
        errors=None if errors is None else _limited(errors, chosen),
        layers=None if layers is None else tuple(chosen),
    )


def _scores_by(
    method: str | Ranking,
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: HeadScores | None,
    layers: Sequence[int],
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Scores by a method, and their standard errors where it has them; other layers' may be anything."""
    if method == "hones":
        if heads is None:
            raise ValueError("method 'hones' needs heads: pass what localize_heads returned")
        return head_conditioned_importance(model, task, examples, heads.top(), layers=layers, **keywords)
    ranking = load_ranking(method) if isinstance(method, str) else method
    takes = signature(ranking).parameters
    if "layers" in takes:
        keywords = {**keywords, "layers": layers}
    if "journal" not in takes and ranking is not exact_ablation:
        keywords = {name: value for name, value in keywords.items() if name != "journal"}
    return ranking(model, task, examples, **keywords), None


def _limited(values: Tensor, layers: Sequence[int]) -> Tensor:
    """Values by layer, NaN in layers that were not asked for."""
    if len(layers) == len(values):
        return values
    out = torch.full_like(values, torch.nan)
    out[list(layers)] = values[list(layers)]
    return out


def _check_scores(model: HookedVLM, ranking: str, scores: Tensor, layers: Sequence[int]) -> None:
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    if scores.shape != shape or bool(scores[list(layers)].isnan().any()):
        raise ValueError(
            f"ranking {ranking!r} must give a number for each of {list(shape)} neurons; it gave "
            f"{list(scores.shape)}, of which {int(scores.isnan().sum())} NaN"
        )
