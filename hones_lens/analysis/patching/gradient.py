"""Attribution patching: the first-order effect of patching each component, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from hones_lens.analysis.gradients import activation_gradients
from hones_lens.analysis.patching.batches import PairBatch, check_batches, check_no_hooks, pair_batch
from hones_lens.analysis.patching.metrics import Metric, as_metric
from hones_lens.analysis.patching.noise import patching_noise
from hones_lens.analysis.patching.outcome import Summary, SummaryKeywords, outcome_notes
from hones_lens.analysis.patching.pair_answers import answers_of_batch, joined_answers
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.sites import PatchSite, as_patch_site, positions_of, targets_of, vision_mask
from hones_lens.engine import BatchKeywords, Budget, SweepOptions, split_keywords
from hones_lens.interventions import Group, Layers
from hones_lens.model import HookedVLM, VLMInputs, did_you_mean, takes_iterables
from hones_lens.results import Labelled

STEPS = 20


@dataclass(frozen=True, eq=False)
class _AttributionBatch:
    """One batch of pairs, with the activations and the metric to attribute.

    Attributes:
        model, batch: The model and the batch.
        site, layers: Kind of activation, and the layers.
        metric: The metric that is differentiated.
        where: Masks [batch pos] of the positions to sum over, by label.
        steps: Number of steps of the integral.
    """

    model: HookedVLM
    batch: PairBatch
    site: PatchSite
    layers: Sequence[int]
    metric: Metric
    where: dict[str, Bool[Tensor, "batch pos"]]
    steps: int

    @property
    def masks(self) -> Float[Tensor, "sum batch pos"]:
        """The masks of `where`, stacked as floats."""
        return torch.stack(list(self.where.values())).double()

    def inputs(self, source: bool) -> VLMInputs:
        """Inputs of the source or base run; without image embeddings where the vision tower is patched."""
        inputs = self.batch.source if source else self.batch.base
        return replace(inputs, image_embeds=None) if self.site.vision else inputs

    def estimates(self, method: str) -> Float[Tensor, "batch layer component sum"]:
        """Estimated changes of the metric, by a method of `METHODS`."""
        self.check()
        return torch.stack(METHODS[method](self), dim=1)

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError if the vision tower is patched in pairs that differ behind it."""
        for inputs in (self.batch.base, self.batch.source) if self.site.vision else ():
            fresh = self.model.encode_images(replace(inputs, image_embeds=None))
            assert inputs.image_embeds is not None
            if not torch.allclose(fresh, inputs.image_embeds, rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"these pairs differ in image embeddings, behind the vision tower: {self.site.what} has "
                    "nothing to patch; corrupt pixels"
                )

    def summed(self, product: Tensor) -> Float[Tensor, "batch component sum"]:
        """A product of activation and gradient, summed over the positions of each sum."""
        if self.site.unit is None:
            by_position = product.sum(-1, keepdim=True, dtype=torch.float64)
        elif product.ndim > 3:
            axes = (self.site.position_axis, self.site.unit_axis)
            by_position = product.movedim(axes, (1, 2)).sum(-1, dtype=torch.float64)
        else:
            by_position = product.double()
        if not self.site.vision:
            return torch.einsum("bpc,gbp->bcg", by_position, self.masks)
        base = self.batch.base
        masks = [vision_mask(base, m, by_position.shape[1], name) for name, m in self.where.items()]
        by_image = torch.einsum("ipc,gip->icg", by_position, torch.stack(masks).double())
        row = torch.tensor(
            [row for row, entries in enumerate(base.tower_entries) for _ in range(sum(entries))],
            device=by_position.device,
        )
        return by_position.new_zeros(len(base), *by_image.shape[1:]).index_add(0, row, by_image)

    @torch.no_grad()
    def activations(self, names: Sequence[str], source: bool) -> ActivationCache:
        """Activations of the source run or of the base run."""
        inputs = self.inputs(source)
        return self.model.run_with_cache(inputs, names_filter=list(names), logits_to_keep=1)[1]

    def gradients(self, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Activations of the base run, and the metric's gradients there."""

        def value() -> Tensor:
            logits = self.model(self.inputs(source=False), logits_to_keep=self.batch.keep)
            return self.batch.value(self.metric, logits).sum()

        return activation_gradients(self.model, names, value)


class AttributionKeywords(SummaryKeywords, BatchKeywords, total=False):
    """Keywords of `attribute_patching`: of `Summary` and of `SweepOptions`, and the steps of an integral."""

    steps: int


@takes_iterables
def attribute_patching(
    model: HookedVLM,
    pairs: PatchPairs,
    what: str = "z",
    by: str = "all",
    *,
    groups: Mapping[str, Group] | Sequence[Group] | None = None,
    layers: Layers | None = None,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    method: str = "atp*",
    options: SweepOptions | None = None,
    **keywords: Unpack[AttributionKeywords],
) -> Labelled:
    """Estimate what `patch_activations` would measure for each component alone, from one backward pass.

    `Σ_p (a_source[p] − a_base[p]) · ∂metric/∂a[p]` at the base run, over positions p (attribution patching:
    Nanda 2023; Syed et al. 2023).

    Args:
        model, pairs: What to patch.
        what, by, groups, layers, direction, metric: As `patch_activations`, but not the metric `task`.
        method: `atp` is the formula above. `atp*` (AtP*: Kramár et al. 2024, without its GradDrop)
            recomputes for q and k the softmax exactly, and takes the first order from the pattern on;
            elsewhere it is `atp`. `ig` integrates the gradient along the line from base to source, all of a
            layer's components and positions together, by the midpoint rule: over a layer its sum goes to the
            measured change as steps grow. It costs `steps` passes a layer.
        options: How it runs, as `SweepOptions`.
        keywords: `steps` of the integral (default 20); `raw`, `by_pair`, `draws`, `seed` of `Summary`;
            `batch_size` (default 16) and `progress` of `SweepOptions`.

    Returns:
        As `patch_activations`, with 95 % intervals.

    Raises:
        ValueError: An unknown name, layer or group, steps below 1, or for `atp*` hooks on scores or pattern.
        FloatingPointError: A metric that is not finite; names the pair.
    """
    own, sweep = split_keywords(keywords, ("steps", *SummaryKeywords.__annotations__))
    options, steps = SweepOptions.of_batches(options, sweep, batch_size=16), own.pop("steps", STEPS)
    _check_request(method, steps, direction, options.batch_size)
    summary, site, measure = Summary(**own), as_patch_site(what), as_metric(metric)
    targets = targets_of(site, model.cfg, layers, "each" if site.unit else "together")
    masks = positions_of(model, pairs, site, by, groups)
    order = [targets.layers.index(layer) for layer in targets.labels.get("layer", targets.layers)]

    def run(rows: range) -> tuple[Tensor, Tensor, Any]:
        batch = pair_batch(model, pairs, rows, direction, metric)
        where = {name: batch.mask_rows(mask, rows.start) for name, mask in masks.items()}
        job = _AttributionBatch(model, batch, site, targets.layers, measure, where, steps)
        estimate = job.estimates(method)[:, order].cpu()
        return estimate, batch.gap(model, measure).cpu(), answers_of_batch(batch)

    summary = replace(summary, noise=patching_noise(model, pairs, metric, options))
    estimates, gaps, answers = zip(*_run_in_parts(model, pairs, run, options, what), strict=True)
    (shape, axes, labels), gap = targets.layout(by, tuple(masks)), torch.cat(gaps)
    settings: dict[str, Any] = {"metric": metric, "direction": direction, "axes": axes, "labels": labels}
    settings["notes"] = outcome_notes(model, pairs, gap, metric, direction)
    settings["answers"], change = joined_answers(answers), torch.cat(estimates).view(-1, *shape)
    return summary.result(change, gap, pairs, of=f"{what}, estimated by {method}", **settings)


def _run_in_parts(
    model: HookedVLM,
    pairs: PatchPairs,
    run: Callable[[range], tuple[Tensor, Tensor, Any]],
    options: SweepOptions,
    what: str,
) -> list[tuple[Tensor, Tensor, Any]]:
    """What comes of batches of rows, or of what of them fits into memory with its graph."""
    budget = Budget(model)
    most, parts = min(options.batch_size, budget.gradient_rows(pairs.clean.input_ids.shape[1])), []
    with tqdm(total=len(pairs), desc=f"attribution patching · {what}", disable=not options.progress) as bar:

        def run_rows(part: Sequence[int]) -> tuple[Tensor, Tensor, Any]:
            return run(range(part[0], part[-1] + 1))

        for part, out in budget.in_parts(range(len(pairs)), lambda rest: most, run_rows):
            parts.append(out)
            bar.update(len(part))
    return parts


def _check_request(method: str, steps: int, direction: str, batch_size: int) -> None:
    check_batches(direction, batch_size)
    if method not in METHODS or steps < 1:
        raise ValueError(
            f"method {method!r} with {steps} steps; valid: {', '.join(METHODS)}, 1 step or more"
            f"{did_you_mean(method, METHODS)}"
        )


def _first_order(job: _AttributionBatch) -> list[Float[Tensor, "batch component sum"]]:
    names = [job.site.name(layer) for layer in job.layers]
    source = job.activations(names, source=True)
    base = job.gradients(names)
    return [job.summed((source[name] - base[name][0]) * base[name][1]) for name in names]


def _softmax_recomputed(job: _AttributionBatch) -> list[Float[Tensor, "batch component sum"]]:
    """AtP*: the pattern's change is exact, and its gradient is `∂metric/∂z · v`."""
    if job.site.what not in ("q", "k"):
        return _first_order(job)
    prefixes = {layer: f"blocks.{layer}.attn." for layer in job.layers}
    hidden = ("hook_attn_scores", "hook_pattern")
    check_no_hooks(
        job.model, [prefixes[n] + name for n in prefixes for name in hidden], "recomputing the softmax"
    )
    read = [prefixes[n] + name for n in prefixes for name in ("hook_rot_q", "hook_rot_k", "hook_v")]
    source, base = job.activations(read, source=True), job.activations(read, source=False)
    gradients = job.gradients([prefixes[n] + "hook_z" for n in prefixes])
    effects = []
    context = job.model.attention_context(job.batch.base, first=job.model.cfg.n_layers)  # for its masks
    for layer, name in prefixes.items():
        q, k, v = (base[name + part] for part in ("hook_rot_q", "hook_rot_k", "hook_v"))
        gradient = gradients[name + "hook_z"][1]
        pattern_gradient = torch.einsum("bqhd,bkhd->bhqk", gradient, _repeat_kv_heads(v, gradient.shape[2]))
        replacement = source[name + ("hook_rot_q" if job.site.what == "q" else "hook_rot_k")]
        attn = job.model.blocks[layer].attn
        mixing = _Mixing(attn.own(context).mask, attn.divisor)
        effects.append(_pattern_effect(job, mixing, q, k, replacement, pattern_gradient))
    return effects


@dataclass(frozen=True)
class _Mixing:
    """The pattern of a layer's attention, from its rotated queries and keys."""

    mask: Tensor | None
    divisor: float  # of the scores

    def __call__(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        n_heads, visible = q.shape[2], self.mask
        scores = torch.einsum("bqhd,bkhd->bhqk", q / self.divisor, _repeat_kv_heads(k, n_heads))
        if visible is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)


def _pattern_effect(
    job: _AttributionBatch,
    pattern: _Mixing,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    replacement: Float[Tensor, "batch pos component d_head"],
    pattern_gradient: Float[Tensor, "batch head pos pos"],
) -> Float[Tensor, "batch component sum"]:
    """Change of the pattern with other queries or keys, all rotated, times the pattern's gradient."""
    before = pattern(q, k)
    if job.site.what == "q":  # a query's change is its own
        effect = ((pattern(replacement, k) - before) * pattern_gradient).sum(-1, dtype=torch.float64)
        return torch.einsum("bhp,gbp->bhg", effect, job.masks)
    effects = []
    for mask in job.where.values():  # keys compete: those of a group change together
        after = pattern(q, torch.where(mask[..., None, None], replacement, k))
        effect = ((after - before) * pattern_gradient).sum((-1, -2), dtype=torch.float64)
        effects.append(effect.unflatten(1, (k.shape[2], -1)).sum(-1))
    return torch.stack(effects, dim=-1)


def _repeat_kv_heads(x: Tensor, n_heads: int) -> Float[Tensor, "batch pos head d_head"]:
    """Keys or values, repeated for the heads that share them."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


def _integrated_gradients(job: _AttributionBatch) -> list[Float[Tensor, "batch component sum"]]:
    """Integrated gradients, layer by layer."""
    sites = {layer: job.site.name(layer) for layer in job.layers}
    entered = {} if job.site.vision else {layer: f"blocks.{layer}.hook_resid_pre" for layer in job.layers}
    source = job.activations(list(sites.values()), source=True)
    base = job.activations([*sites.values(), *entered.values()], source=False)
    effects = []
    for layer, name in sites.items():
        change, total = source[name] - base[name], torch.zeros_like(base[name])
        start = None if job.site.vision else (layer, base[entered[layer]])
        for step in range(job.steps):
            between = base[name] + (step + 0.5) / job.steps * change
            total += _metric_gradient(job, start, name, between)
        effects.append(job.summed(change * total / job.steps))
    return effects


def _metric_gradient(
    job: _AttributionBatch, start: tuple[int, Tensor] | None, name: str, value: Tensor
) -> Tensor:
    """Gradient of the metric with respect to an activation that is set to a value.

    Args:
        job: The batch.
        start: A decoder layer and the stream that enters it, if lower layers need not run.
        name, value: Hook point, and the value its activation is set to.
    """
    value = value.detach().requires_grad_()

    def put(x: Tensor, hook: HookPoint) -> Tensor:
        return value

    inputs = job.inputs(source=False)
    with torch.enable_grad(), job.model.hooks(fwd_hooks=[(name, put)]):
        if start is None:
            logits = job.model(inputs, logits_to_keep=job.batch.keep)
        else:
            layer, entered = start
            keep = job.batch.keep
            logits = job.model(entered, start_at_layer=layer, inputs=inputs, logits_to_keep=keep)
        return torch.autograd.grad(job.batch.value(job.metric, logits).sum(), value)[0]


METHODS: dict[str, Callable[[_AttributionBatch], list[Tensor]]] = {
    "atp": _first_order,
    "atp*": _softmax_recomputed,
    "ig": _integrated_gradients,
}
