"""Other rankings of neurons, for comparison with HONES under the same budget (METHOD, other rankings).

Each takes a model, a task and its examples, and returns a score for every decoder neuron, [layer
d_mlp], on the CPU: higher is more important. `attribute_neurons(method=...)` asks for them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.hones.attribution.neurons import target_directions, write_in
from hones_lens.interventions import neuron_hook
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task

Journal = MutableMapping[str, Any] | None
_KEPT_SHARE = 0.05  # LAPE: above the 95th percentile


def activation_probability(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
) -> Float[Tensor, "layer d_mlp"]:
    """AP: how often a neuron's gate is open, `P(act(gate_i) > 0)` at the last prompt position.

    Args:
        model, task, examples: Whose activations.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).

    Returns:
        Shares of the examples in 0-1, float64.
    """
    gates = [f"blocks.{layer}.mlp.hook_pre" for layer in range(model.cfg.n_layers)]

    def opened(kept: list[Tensor]) -> Tensor:
        is_open = [block.mlp.act(gate) > 0 for block, gate in zip(model.blocks, kept, strict=True)]
        return torch.stack(is_open).sum(1)

    resumed = {"batch_size": batch_size, "progress": progress, "journal": journal}
    key = f"activation_probability/{task.name}"
    return _summed_at_last(model, task, examples, gates, opened, key, **resumed) / len(examples)


def mean_activation(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    signed: bool = False,
) -> Float[Tensor, "layer d_mlp"]:
    """MA: the mean size of a neuron, `E|m_i|` at the last prompt position; `signed`: `E m_i`.

    Args:
        model, task, examples: Whose activations.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        signed: Keep the sign.

    Returns:
        In units of the activation, float64.
    """
    names = [neuron_hook(layer) for layer in range(model.cfg.n_layers)]

    def sizes(kept: list[Tensor]) -> Tensor:
        m = torch.stack(kept).double()
        return (m if signed else m.abs()).sum(1)

    resumed = {"batch_size": batch_size, "progress": progress, "journal": journal}
    key = f"mean_activation{'/signed' if signed else ''}/{task.name}"
    return _summed_at_last(model, task, examples, names, sizes, key, **resumed) / len(examples)


def activation_entropy(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    other_tasks: Mapping[str, Sequence[Example]] | None = None,
) -> Float[Tensor, "layer d_mlp"]:
    """APE: neurons that open for this task and for few others (LAPE: Tang et al., arXiv 2402.16438).

    Of T tasks, AP_t is normalised over the tasks to p_t, and the score is the negative entropy
    `Σ_t p_t ln p_t`, in −ln T … 0. Only neurons whose AP on this task is positive and at or above the
    95th percentile of the APs of all neurons on all tasks are kept (LAPE assigns a neuron to a
    language by the same bar). All others score `AP − ln T − 2`: below every kept one, in the order of
    their AP, and finite.

    Args:
        model, task, examples: Whose neurons.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        other_tasks: Examples of other tasks, by the task's name.

    Returns:
        In nats, float64.

    Raises:
        ValueError: No other tasks, one that is this task again, or one without examples.
    """
    if not other_tasks:
        raise ValueError("activation_entropy compares tasks: give other_tasks={name: examples, ...}")
    if task.name in other_tasks:
        raise ValueError(f"other_tasks holds {task.name!r}, which is the task itself")
    options = {"batch_size": batch_size, "progress": progress, "journal": journal}
    by_task = [activation_probability(model, task, examples, **options)]
    for name, task_examples in other_tasks.items():
        other = engine.as_task(name)
        engine.check_examples(other, task_examples)
        by_task.append(activation_probability(model, other, task_examples, **options))
    probabilities = torch.stack(by_task)
    shares = probabilities / probabilities.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(0)
    threshold = probabilities.flatten().kthvalue(round((1 - _KEPT_SHARE) * probabilities.numel())).values
    kept = (probabilities[0] >= threshold) & (probabilities[0] > 0)
    return torch.where(kept, -entropy, probabilities[0] - math.log(len(by_task)) - 2)


def direct(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    normalize: bool = True,
    apply_ln: bool = False,
    foils: Sequence[str] | None = None,
) -> Float[Tensor, "layer d_mlp"]:
    """`E c(l,i)`: the write-in of HONES eq. H2 with no heads in it, the key ablation of eq. H3.

    Args:
        model, task, examples: What to attribute.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        normalize, apply_ln, foils: As in `target_directions`.

    Returns:
        float64, in logits where `apply_ln` is set and `normalize` is not.
    """
    directions = target_directions(model, task, examples, normalize=normalize, apply_ln=apply_ln, foils=foils)
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    with tqdm(total=len(examples), desc=f"direct · {task.name}", disable=not progress) as bar:
        key, sums = f"direct/{task.name}", {"total": total}
        for start, chunk in engine.resumed_batches(examples, batch_size, sums, journal, key):
            (batch,) = engine.answer_batches(model, task, chunk, len(chunk), answers=False)
            batch_directions = directions[start : start + len(chunk)]
            total += write_in(model, batch, batch_directions, apply_ln=apply_ln).double().sum(0).cpu()
            bar.update(start + len(chunk) - bar.n)
    return total / len(examples)


def random(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    seed: int = 0,
    like: Tensor | None = None,
) -> Float[Tensor, "layer d_mlp"]:
    """A ranking by chance: uniform, or another one's scores shuffled within each layer.

    Shuffled, its top k has as many neurons in each layer as the other's top k, for every k: the
    control that is matched per layer.

    Args:
        model: Whose neurons.
        task, examples, batch_size, progress: Not read.
        seed: Same seed, same ranking.
        like: Scores of the ranking to match, [layer d_mlp].

    Returns:
        float64.

    Raises:
        ValueError: Scores to match of another shape.
    """
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if like is None:
        return drawn
    if like.shape != shape:
        raise ValueError(f"scores to match are {list(like.shape)}, but this model has {list(shape)} neurons")
    return like.detach().double().cpu().gather(1, drawn.argsort(1))


def _summed_at_last(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    names: Sequence[str],
    of_batch: Callable[[list[Tensor]], Tensor],
    key: str,
    *,
    batch_size: int,
    progress: bool,
    journal: Journal,
) -> Float[Tensor, "layer d_mlp"]:
    """The sum of what `of_batch` makes of these activations at the last prompt position, [example d_mlp]."""
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    with tqdm(total=len(examples), desc=f"activations · {task.name}", disable=not progress) as bar:
        for start, chunk in engine.resumed_batches(examples, batch_size, {"total": total}, journal, key):
            (batch,) = engine.answer_batches(model, task, chunk, len(chunk), answers=False)
            total += of_batch(_activations_at_last(model, batch, names)).cpu()
            bar.update(start + len(chunk) - bar.n)
    return total


def _activations_at_last(model: HookedVLM, batch: engine.Batch, names: Sequence[str]) -> list[Tensor]:
    """These activations of a batch at the last prompt position, one [example d_mlp] each."""

    def run(part: engine.Batch) -> list[Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: object) -> None:
            kept[getattr(hook, "name", "")] = x[:, -1].detach().clone()

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            model(part.inputs, stop_at_layer=model.cfg.n_layers)
        return [kept[name] for name in names]

    budget = engine.Budget(model)
    parts = batch.in_parts(budget, budget.pass_rows(batch.inputs), run)
    return [torch.cat(by_name) for by_name in zip(*parts, strict=True)]
