"""Neurons by what they write towards the target, conditioned on critical heads (HONES eqs. H2, H3)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.interventions import Hook, choose_layers, neuron_hook, replace_with_other_heads_mean
from hones_lens.model import HookedVLM, find_settings
from hones_lens.results import Component
from hones_lens.tasks import Task

DEFAULT_RATIO = 0.01
_PARTS = 20  # of the examples, for standard errors


def target_directions(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    normalize: bool = True,
    apply_ln: bool = False,
    foils: Sequence[str] | None = None,
) -> Float[Tensor, "example d_model"]:
    """Unit directions u_y of the examples' targets in the residual stream (HONES eq. H2).

    `u_y = Σ_k a_k W_U[:, y_k] / ‖·‖₂` over the target's tokens, encoded alone without special
    tokens; a_k is 1, or the smoothed IDF over these examples' references where the task says so.

    Args:
        model, task, examples: Whose targets.
        normalize: Divide by the norm.
        apply_ln: Ours: fold in the final norm's weight, so that dividing by its scale gives logits.
        foils: Ours: a wrong answer for each example, whose direction is subtracted.

    Raises:
        ValueError: A target without tokens, or another number of foils than examples.
    """
    if foils is not None and len(foils) != len(examples):
        raise ValueError(f"{len(foils)} foils for {len(examples)} examples")
    idf = _inverse_document_frequencies(model, examples) if task.idf else None
    rows = []
    for i, example in enumerate(examples):
        direction = _direction(model, task.target(example), idf, example.id)
        if foils is not None:
            direction = direction - _direction(model, foils[i], idf, example.id)
        if not bool(direction.any()):
            raise ValueError(f"the target and the foil of example {example.id!r} have the same tokens")
        rows.append(direction)
    directions = torch.stack(rows)
    if apply_ln:
        directions = directions * model.ln_final.weight.detach()
    return directions / directions.norm(dim=-1, keepdim=True) if normalize else directions


def _direction(model: HookedVLM, text: str, idf: dict[int, float] | None, name: str) -> Tensor:
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the target {text!r} of example {name!r} has no tokens")
    weights = torch.tensor([1.0 if idf is None else idf[i] for i in ids], device=model.cfg.device)
    return (weights[:, None] * model.W_U.T.detach()[ids].float()).sum(0)


def _inverse_document_frequencies(model: HookedVLM, examples: Sequence[Example]) -> dict[int, float]:
    """`ln((n + 1) / (df + 1)) + 1` over the examples' references; a token of none has df = 0."""
    references = [reference for example in examples for reference in example.references]
    seen: Counter[int] = Counter()
    for reference in references:
        seen.update(set(model.tokenizer(reference, add_special_tokens=False).input_ids))
    n = len(references)
    unseen = math.log(n + 1) + 1
    return defaultdict(
        lambda: unseen, {token: math.log((n + 1) / (df + 1)) + 1 for token, df in seen.items()}
    )


def write_in(
    model: HookedVLM,
    batch: engine.Batch,
    directions: Float[Tensor, "example d_model"],
    hooks: Sequence[Hook] = (),
    apply_ln: bool = False,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "example layer d_mlp"]:
    """Each neuron's write-in towards the target at the last prompt position (HONES eq. H2).

    `c(l, i) = m_i · ⟨W_out[i], u_y⟩`, in float32; with `apply_ln` divided by the final norm's scale.
    Of some layers, by default of all.
    """
    layers = range(model.cfg.n_layers) if layers is None else layers
    names = [neuron_hook(layer) for layer in layers]
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x[:, -1].to(torch.float32, copy=True)  # a view would keep all positions

    watch = [*names, "ln_final.hook_scale"] if apply_ln else names
    stop = None if apply_ln else max(layers) + 1
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *((name, keep) for name in watch)]):
        model(batch.inputs, stop_at_layer=stop, logits_to_keep=1)
    parts = []
    for layer, name in zip(layers, names, strict=True):
        towards = directions.float() @ model.blocks[layer].mlp.W_out.detach().float().T
        parts.append(kept[name] * towards)
    out = torch.stack(parts, dim=1)
    return out / kept["ln_final.hook_scale"][:, :, None] if apply_ln else out


def default_ratio(model: HookedVLM) -> float:
    """The share of `model_configs/`, or 1 %."""
    settings = find_settings(model.cfg.model_name)
    return settings.ratio if settings else DEFAULT_RATIO


def head_conditioned_importance(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: Sequence[Component],
    **options: Any,
) -> tuple[Float[Tensor, "layer d_mlp"], Float[Tensor, "layer d_mlp"] | None]:
    """Head-conditioned importance of every neuron (HONES eq. H3), and its standard error.

    `I(l,i) = Σ_h w_h [E c(l,i) − E c(l,i under I_h)]₊ / Σ_h w_h`, over heads with w_h > 0; the clamp
    comes after the mean over examples. A head of layer l changes neurons of layers ≥ l only.

    The standard error is that of a delete-a-group jackknife: the importance is worked out anew without each
    of up to 20 parts of the examples, clamp and all (Kott, J. Off. Stat. 17, 2001; w_h is taken as it is).

    Args:
        model, task, examples, heads: As for `write_in_drops_by_head`.
        options: Of `write_in_drops_by_head`.

    Returns:
        Both float64 on the CPU; no error where there is one example.

    Raises:
        ValueError: No head with w > 0: there is nothing to condition on.
    """
    weights, sums, counts = _summed_drops(model, task, examples, heads, **options)

    def importance(total: Tensor, n: Tensor) -> Tensor:
        return torch.einsum("h,hln->ln", weights, (total / n).clamp(min=0)) / weights.sum()

    total_sums, n, parts = sums.sum(0), counts.sum(), len(counts)
    scores = importance(total_sums, n)
    if parts < 2:
        return scores, None
    mean, squares = torch.zeros_like(scores), torch.zeros_like(scores)
    for part, count in zip(sums, counts, strict=True):
        deviation = importance(total_sums - part, n - count) - scores
        mean, squares = mean + deviation / parts, squares + deviation.square()
    variance = (parts - 1) / parts * (squares - parts * mean.square())
    return scores, variance.clamp(min=0).sqrt()


def write_in_drops_by_head(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: Sequence[Component],
    **options: Any,
) -> tuple[Float[Tensor, " head"], Float[Tensor, "head layer d_mlp"]]:
    """The terms of HONES eq. H3 for each head with w_h > 0, in the order of the heads.

    Args:
        model, task, examples: What to attribute.
        heads: Critical heads with their w_h.
        options: `batch_size`, `progress`; `normalize`, `apply_ln`, `foils` of `target_directions`.

    Returns:
        w_h, and `[E c(l,i) − E c(l,i under I_h)]₊`, float64 on the CPU.

    Raises:
        ValueError: No head with w > 0: there is nothing to condition on.
    """
    weights, sums, counts = _summed_drops(model, task, examples, heads, **options)
    return weights, (sums.sum(0) / counts.sum()).clamp(min=0)


def _summed_drops(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: Sequence[Component],
    *,
    batch_size: int = 16,
    progress: bool = True,
    normalize: bool = True,
    apply_ln: bool = False,
    foils: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Float[Tensor, " head"], Float[Tensor, "part head layer d_mlp"], Float[Tensor, " part"]]:
    """w_h, `Σ c(l,i) − c(l,i under I_h)` over each part of the examples (every 20th), and their numbers."""
    critical = [head for head in heads if head.score > 0]
    if not critical:
        raise ValueError("no critical head has w > 0, so there is nothing to condition neurons on")
    options = {"normalize": normalize, "apply_ln": apply_ln, "foils": foils}
    directions = target_directions(model, task, examples, **options)
    chosen = choose_layers(layers, model.cfg.n_layers)
    parts = min(_PARTS, len(examples))
    shape = (parts, len(critical), model.cfg.n_layers, model.cfg.d_mlp)
    sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(parts, dtype=torch.float64)
    total = len(examples) * (len(critical) + 1)
    start = 0
    with tqdm(total=total, desc=f"neurons · {task.name}", disable=not progress) as bar:
        for batch in engine.answer_batches(model, task, examples, batch_size, answers=False):
            batch_directions = directions[start : start + len(batch.examples)]
            part = torch.arange(start, start + len(batch.examples)) % parts
            start += len(batch.examples)
            counts.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
            clean = write_in(model, batch, batch_directions, (), apply_ln, chosen).double().cpu()
            for i, head in enumerate(critical):
                if not apply_ln and head.layer > chosen[-1]:
                    continue  # it changes nothing there
                hook = replace_with_other_heads_mean(head.layer, head.index)
                drop = (
                    clean - write_in(model, batch, batch_directions, [hook], apply_ln, chosen).double().cpu()
                )
                sums[:, i, chosen] = sums[:, i, chosen].index_add(0, part, drop)
            bar.update(len(batch.examples) * (len(critical) + 1))
    weights = torch.tensor([head.score for head in critical], dtype=torch.float64)
    return weights, sums, counts
