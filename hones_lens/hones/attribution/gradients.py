"""Rankings by gradients: gradient × activation, attribution patching, integrated gradients (QRNCA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.analysis import activation_gradients
from hones_lens.data import CounterfactualPair, Example
from hones_lens.engine import LayerStep, layer_steps
from hones_lens.hones.attribution.rankings import Journal
from hones_lens.interventions import (
    HeadEdit,
    Layers,
    choose_layers,
    neuron_hook,
    replace_with_other_heads_mean,
)
from hones_lens.model import Answer, HookedVLM, VLMInputs, at_positions
from hones_lens.tasks import Task

STEPS = 20  # METHOD, rankings
CLUSTER_SHARE = 0.2  # QRNCA's t, as a share of the query's largest attribution


def gradient_times_activation(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    positions: str = "all",
    layers: Layers | None = None,
) -> Float[Tensor, "layer d_mlp"]:
    """`m_i · ∂P/∂m_i`, the first-order estimate of what zeroing a neuron loses (METHOD, rankings).

    P is the log-probability of the right answer in nats, teacher-forced. The products are summed
    over all positions, prompt and answer alike, since masking zeroes a neuron at all of them (HONES
    eq. H4), and averaged over examples.

    Args:
        model, task, examples: What to attribute.
        batch_size: Examples a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        positions: `last` takes the last prompt position alone.
        layers: Of these alone, as `choose_layers`; the others' are zeros, and cost no memory.

    Raises:
        ValueError: Unknown positions, or no such layer.
    """
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    chosen, key = choose_layers(layers, model.cfg.n_layers), f"gradient_times_activation/{task.name}"

    def drops(part: engine.Batch, numbers: Sequence[int]) -> Tensor:
        return _first_order_drops(model, part, positions, chosen, [0.0] * len(chosen))

    for _, batch in _batches(model, task, examples, batch_size, progress, total, journal, key):
        total[chosen] += _summed(model, batch, drops)
    return total / len(examples)


def attribution_patching(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    pairs: Sequence[CounterfactualPair] = (),
    positions: str = "all",
    layers: Layers | None = None,
) -> Float[Tensor, "layer d_mlp"]:
    """`(m_i − m_i^corrupt) · ∂P/∂m_i`, the first-order estimate of patching a neuron (METHOD, rankings).

    P is the log-probability, in nats, of the right answer to the clean picture; the gradient is taken
    there. The corrupted activations come from the same prompt and answer on the corrupted picture,
    so that positions correspond. The products are summed over all positions and averaged over pairs.
    `attribute_patching` estimates the same for any activation, of a metric at the end of the prompt.

    Args:
        model, task: What to attribute.
        examples: Not read: the pairs are the examples.
        batch_size: Pairs a batch.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        pairs: What to compare, from `data.counterfactual_pairs`.
        positions: `last` takes the last prompt position alone.
        layers: Of these alone, as `choose_layers`; the others' are zeros, and cost no memory.

    Raises:
        ValueError: No pairs, unknown positions, or no such layer.
    """
    if not pairs:
        raise ValueError("attribution_patching needs counterfactual pairs: pairs=counterfactual_pairs(...)")
    clean = [pair.clean for pair in pairs]
    engine.check_examples(task, clean)
    corrupted = [replace(pair.clean, image_source=pair.corrupted.image_source) for pair in pairs]
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    chosen, key = choose_layers(layers, model.cfg.n_layers), f"attribution_patching/{task.name}"
    for start, batch in _batches(model, task, clean, batch_size, progress, total, journal, key):
        chunk = corrupted[start : start + len(batch.examples)]
        (corrupted_batch,) = engine.answer_batches(model, task, chunk, batch_size)

        def drops(
            part: engine.Batch, numbers: Sequence[int], other: engine.Batch = corrupted_batch
        ) -> Tensor:
            steps = layer_steps(model, other.part(numbers).inputs)
            corrupted = (step.neurons for step in steps if step.layer in chosen)
            return _first_order_drops(model, part, positions, chosen, corrupted)

        total[chosen] += _summed(model, batch, drops)
    return total / len(pairs)


def qrnca(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
    steps: int = STEPS,
    positions: str = "last",
) -> Float[Tensor, "layer d_mlp"]:
    """Integrated gradients × inverse cluster frequency (QRNCA: Chen, Dejl and Toni, arXiv 2406.10868).

    A query is a prompt with its target; examples that share both are its instances, as QRNCA's
    templates are. Its attribution is the sum of `integrated_gradients` over them. Its cluster holds
    the neurons above 0.2 of its largest attribution, and it is divided by the sum over its cluster,
    so that queries compare. With |C| queries and n(l,i) clusters that hold the neuron,

    `score(l,i) = mean over queries of attribution(l,i) · ln(|C| / (n(l,i) + 1))`.

    A neuron of every cluster so scores below zero: QRNCA, too, drops such common neurons. QRNCA
    attributes to the linear half of the gated product, METHOD to the product m itself, as here. A
    query without any positive attribution has an empty cluster and adds nothing.

    Args:
        model, task, examples: What to attribute.
        batch_size: Steps of the integral in one pass, a row each.
        progress: Show a progress bar.
        journal: Where its sums are kept, so that it can be resumed (see `engine.resumed_batches`).
        steps: Of the integral.
        positions: Where m is scaled: the last prompt position as in QRNCA, or `all`.

    Returns:
        float64, on the CPU.

    Raises:
        ValueError: Fewer than two queries, no positive attribution in any, steps below 1, or unknown
            positions.
    """
    queries = _by_query(task, examples)
    options: dict[str, Any] = {"steps": steps, "positions": positions, "batch_size": batch_size}
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    total, n_clusters = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    with tqdm(total=len(examples), desc=f"qrnca · {task.name}", disable=not progress) as bar:
        for number, instances in enumerate(queries.values()):
            key = f"qrnca/{task.name}/{number}"
            attribution = _of_a_query(model, task, instances, journal, key, options)
            bar.update(len(instances))
            largest = attribution.max()
            if largest > 0:
                cluster = attribution > CLUSTER_SHARE * largest
                total += attribution / attribution[cluster].sum()
                n_clusters += cluster
    if not bool(n_clusters.any()):
        raise ValueError("qrnca found no neuron with a positive attribution in any query")
    return total / len(queries) * (len(queries) / (n_clusters + 1)).log()


def _of_a_query(
    model: HookedVLM,
    task: Task,
    instances: Sequence[Example],
    journal: Journal,
    key: str,
    options: dict[str, Any],
) -> Float[Tensor, "layer d_mlp"]:
    """The sum of a query's integrated gradients over its instances."""
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    for _, chunk in engine.resumed_batches(instances, 1, {"total": total}, journal, key):
        (batch,) = engine.answer_batches(model, task, chunk, batch_size=1)
        with engine.error_context(batch.ids):
            for step in layer_steps(model, batch.inputs):
                total[step.layer] += integrated_gradients(model, batch.inputs, step, **options)
    return total


def _by_query(task: Task, examples: Sequence[Example]) -> dict[tuple[str, str], list[Example]]:
    """Examples by prompt and target.

    Raises:
        ValueError: They are all the same.
    """
    queries: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        queries.setdefault((task.target_prompt(example), task.target(example)), []).append(example)
    if len(queries) < 2:
        raise ValueError("qrnca compares queries: examples need at least two different prompts or targets")
    return queries


def integrated_gradients(
    model: HookedVLM,
    inputs: VLMInputs,
    step: LayerStep,
    *,
    steps: int = STEPS,
    positions: str = "last",
    batch_size: int = 16,
) -> Float[Tensor, " d_mlp"]:
    """Integrated gradients of the answer's probability along one layer's neurons, from 0 to m.

    `m_i / steps · Σ_k ∂P/∂m_i at (k / steps) · m`, k = 1 … steps (knowledge neurons: Dai et al. 2022;
    QRNCA eq. for neuron attribution), P the probability of the whole answer, teacher-forced. All
    neurons of the layer are scaled together, and layers above follow; as steps grow, the sum over
    neurons goes to P(m) − P(0).

    Args:
        model: The model.
        inputs: One row, prepared with its answer.
        step: The layer, from `layer_steps` these inputs.
        steps: Of the integral.
        positions: Where m is scaled: the last prompt position, or `all`.
        batch_size: Steps in one pass, a row each.

    Returns:
        Summed over these positions, float64 on the CPU.

    Raises:
        ValueError: Several rows, steps below 1, or unknown positions.
        FloatingPointError: A log-probability that is not finite.
    """
    if len(inputs) != 1 or steps < 1:
        raise ValueError(f"one row and at least one step are needed, not {len(inputs)} and {steps}")
    position_mask, answer = at_positions(inputs, positions)[..., None], Answer.of(inputs)
    m, block = step.neurons, model.blocks[step.layer]
    total = torch.zeros(model.cfg.d_mlp, dtype=torch.float64)
    for fractions in (torch.arange(1, steps + 1, device=m.device) / steps).to(m.dtype).split(batch_size):
        scaled = torch.where(position_mask, fractions[:, None, None] * m, m)
        with torch.enable_grad():
            scaled.requires_grad_()
            resid = _stream_with(block, step, scaled)
            repeated = inputs[[0] * len(fractions)]
            logits = model(
                resid, start_at_layer=step.layer + 1, inputs=repeated, logits_to_keep=answer.positions
            )
            log_probs = _finite(answer.log_probs(logits))
            (gradient,) = torch.autograd.grad(log_probs.sum(), scaled)
        # ∂P = P · ∂ log P, in float64, so that the probability of a long answer does not vanish.
        per_step = (position_mask * m * gradient).sum(1).double()
        total += (log_probs.detach().double().exp() @ per_step).cpu()
    return total / steps


def _stream_with(block: Any, step: LayerStep, neurons: Tensor) -> Float[Tensor, "row pos d_model"]:
    """The stream that leaves a layer whose neurons have other activations."""
    if block.ln2_post is None:
        return step.after + (neurons - step.neurons) @ block.mlp.W_out.detach()
    written = neurons @ block.mlp.W_out.detach() + block.mlp.b_out.detach()
    return step.mid + block.mlp_out(written)


def _first_order_drops(
    model: HookedVLM,
    batch: engine.Batch,
    positions: str,
    layers: Sequence[int],
    replacements: Iterable[Tensor | float],
) -> Float[Tensor, "chosen d_mlp"]:
    """`Σ_p (m_i − m_i') · ∂ log P/∂m_i` for every neuron, summed over rows; m' by layer in `replacements`."""
    position_mask = at_positions(batch.inputs, positions)[..., None]
    with engine.error_context(batch.ids):
        gradients = neuron_gradients(model, batch.inputs, layers)
    drops = [
        (position_mask * (m - replacement) * gradient).sum((0, 1), dtype=torch.float64).cpu()
        for (m, gradient), replacement in zip(gradients, replacements, strict=True)
    ]
    return torch.stack(drops)


def neuron_gradients(
    model: HookedVLM, inputs: VLMInputs, layers: Sequence[int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Each layer's neurons m and ∂ log P/∂m for the answers' log-probability, both [row pos d_mlp].

    Of all layers, or of some: what lies below the lowest of these has no graph.

    Raises:
        ValueError: The inputs mark no answer.
        FloatingPointError: A log-probability that is not finite.
    """
    chosen = range(model.cfg.n_layers) if layers is None else layers
    return _gradients_at(model, inputs, [neuron_hook(layer) for layer in chosen])


def _gradients_at(model: HookedVLM, inputs: VLMInputs, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Activations at hooks, from below upwards, and the gradients of the answers' log-probability there."""
    answer = Answer.of(inputs)

    def log_prob() -> Tensor:
        return _finite(answer.log_probs(model(inputs, logits_to_keep=answer.positions))).sum()

    return list(activation_gradients(model, names, log_prob).values())


def first_order_head_drops(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = True,
    journal: Journal = None,
) -> Float[Tensor, "layer head"]:
    """First-order estimate of what replacing each head by the mean of the others costs.

    `−Σ_p (z'[p, h] − z[p, h]) · ∂ log P/∂z[p, h]` over all positions p of prompt and right answer, mean over
    examples, in nats: attribution patching of the intervention of HONES eq. H1, one backward pass an
    example instead of one forward pass a head.

    Returns:
        float64, on the CPU.

    Raises:
        FloatingPointError: A log-probability that is not finite; names the examples.
    """
    total = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.float64)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    _, edit = replace_with_other_heads_mean(0, 0)
    assert isinstance(edit, HeadEdit)
    key = f"first_order_head_drops/{task.name}"

    def drops(part: engine.Batch, numbers: Sequence[int]) -> Tensor:
        with engine.error_context(part.ids):
            gradients = _gradients_at(model, part.inputs, names)
        changes = [(edit.replacement(z) - z) * gradient for z, gradient in gradients]
        return -torch.stack([change.sum((0, 1, 3), dtype=torch.float64).cpu() for change in changes])

    for _, batch in _batches(model, task, examples, batch_size, progress, total, journal, key):
        total += _summed(model, batch, drops)
    return total / len(examples)


def _summed(
    model: HookedVLM, batch: engine.Batch, run: Callable[[engine.Batch, Sequence[int]], Tensor]
) -> Tensor:
    """The sum of what comes of parts of a batch that fit into memory with their graph.

    Args:
        model, batch: The batch.
        run: Takes a part, and the numbers of its examples in the batch.
    """
    budget, kept = engine.Budget(model), len(Answer.of(batch.inputs).positions)
    most = budget.gradient_rows(batch.inputs.input_ids.shape[1], kept)
    numbers = range(len(batch.examples))
    parts = budget.in_parts(numbers, lambda rest: most, lambda part: run(batch.part(part), part))
    return torch.stack([out for _, out in parts]).sum(0)


def _batches(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    progress: bool,
    total: Tensor,
    journal: Journal,
    key: str,
) -> Iterator[tuple[int, engine.Batch]]:
    """Batches that are not in the total yet, each with the number of its first example."""
    with tqdm(total=len(examples), desc=f"gradients · {task.name}", disable=not progress) as bar:
        for start, chunk in engine.resumed_batches(examples, batch_size, {"total": total}, journal, key):
            (batch,) = engine.answer_batches(model, task, chunk, batch_size)
            yield start, batch
            bar.update(start + len(chunk) - bar.n)


def _finite(log_probs: Tensor) -> Tensor:
    if not bool(torch.isfinite(log_probs).all()):
        raise FloatingPointError(f"a log-probability is not finite: {log_probs.tolist()}")
    return log_probs
