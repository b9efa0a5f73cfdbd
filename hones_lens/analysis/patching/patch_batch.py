"""One batch of pairs under many patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache

from hones_lens import engine
from hones_lens.analysis.patching.batches import PairBatch
from hones_lens.analysis.patching.metrics import Metric, as_metric
from hones_lens.analysis.patching.sites import PatchSite, Target, Targets, vision_mask
from hones_lens.engine import Budget, SweepOptions, stack_hooks
from hones_lens.interventions import HeadEdit, Hook
from hones_lens.model import HookedVLM, VLMInputs

_MOST_SHARED = 16  # position groups up to which the patches of one layer's heads share a batch


@dataclass(frozen=True, eq=False)
class ActivationPatch:
    """Hook function that replaces an activation by another run's, at given positions, heads or neurons.

    While answers are generated, positions after the prompt are not patched.

    Attributes:
        name: Name of the hook point.
        site: Kind of activation at the hook point.
        value: The other run's activation.
        mask: Positions to patch.
        units: Heads or neurons to patch; None for all.
    """

    name: str
    site: PatchSite
    value: Tensor
    mask: Bool[Tensor, "row pos"]
    units: tuple[int, ...] | None = None

    def __call__(self, x: Tensor, hook: object = None) -> Tensor:
        if x.shape != self.value.shape:
            axis = self.site.position_axis
            if x.shape[axis] == 1 < self.value.shape[axis] and len(x) == len(self.value):
                return x
            expected, actual = tuple(self.value.shape), tuple(x.shape)
            raise ValueError(f"{self.name}: patch of shape {expected} for an activation {actual}")
        chosen = self.mask[..., None]
        if self.units is not None:
            n = x.shape[self.site.unit_axis]
            unit_mask = torch.zeros(n, dtype=torch.bool, device=x.device)
            chosen = chosen & unit_mask.index_fill(0, torch.tensor(self.units, device=x.device), True)
        return torch.where(self.site.broadcast_mask(chosen), self.value, x)


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """One batch of pairs with the patches to run in it."""

    model: HookedVLM
    batch: PairBatch
    site: PatchSite
    targets: Targets
    positions: Mapping[str, Bool[Tensor, "row pos"]]
    metric: str | Metric
    options: SweepOptions

    def run(self, direction: str, tick: Callable[[int], object]) -> dict[str, Any]:
        """The metric's values as lists: of the two runs [row], and under each patch [patch row].

        Also whether each patch was run [patch], and whether that took full passes.
        """
        base, source = (self._run_inputs(inputs) for inputs in (self.batch.base, self.batch.source))
        names = [self.site.name(layer) for layer in self.targets.layers]
        settings: dict[str, Any] = {"names_filter": names, "logits_to_keep": self.batch.keep}
        base_cache = self.model.run_with_cache(base, **settings)[1]
        logits, source_cache = self.model.run_with_cache(source, **settings)
        arms: list[list[Hook]] = [[]]
        arm_numbers = []
        for hooks in self._patches(base, base_cache, source_cache):
            arm_numbers.append(len(arms) if hooks else 0)
            arms += [hooks] if hooks else []
        del base_cache
        n, values_by_arm = len(self.batch.pairs), {}
        tick(arm_numbers.count(0) * n)
        for number, value in self._values(base, arms):
            values_by_arm[number] = value.cpu().double().tolist()
            tick(n if number else 0)
        other = self._scores(source, [[]])[0] if self.metric == "task" else self._metric(logits)
        ends = (values_by_arm[0], other.cpu().double().tolist())
        clean, corrupted = ends if direction == "noise" else ends[::-1]
        values = [values_by_arm[place] for place in arm_numbers]
        ran = [int(place > 0) for place in arm_numbers]
        return {"clean": clean, "corrupted": corrupted, "values": values, "ran": ran, "full": self._full}

    @property
    def _full(self) -> bool:
        """Whether patches need full passes: vision sites, generated answers, permanent hooks."""
        return bool(self.model.hooked_names()) or self.site.vision or self.metric == "task"

    def _run_inputs(self, inputs: VLMInputs) -> VLMInputs:
        """Inputs of a run; without image embeddings where the vision tower is patched."""
        if not self.site.vision or inputs.image_embeds is None:
            return inputs
        plain = replace(inputs, image_embeds=None)
        if not torch.allclose(self.model.encode_images(plain), inputs.image_embeds, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"these pairs differ in image embeddings, behind the vision tower: {self.site.what} has "
                "nothing to patch; corrupt pixels"
            )
        return plain

    def _patches(
        self, base: VLMInputs, base_cache: ActivationCache, source_cache: ActivationCache
    ) -> Iterator[list[Hook]]:
        """Hooks of each patch; none where both runs have the same activations."""
        masks = dict(self.positions)
        if self.site.vision:
            width = source_cache[self.site.name(self.targets.layers[0])].shape[1]
            masks = {name: vision_mask(base, mask, width, name) for name, mask in masks.items()}
        puts, changed = {}, {}
        for layer in self.targets.layers:
            name = self.site.name(layer)
            differs = self.site.by_unit(base_cache[name] != source_cache[name])
            for group, mask in masks.items():
                puts[layer, group] = ActivationPatch(name, self.site, source_cache[name], mask)
                changed[layer, group] = (differs & mask[..., None]).flatten(0, 1).any(0)
        for cell in self.targets.cells:
            for group in masks:
                changed_units = [
                    changed[n, group] if units is None else changed[n, group][list(units)]
                    for n, units in cell
                ]
                yield (
                    self._hooks(cell, group, puts) if any(bool(some.any()) for some in changed_units) else []
                )

    def _hooks(self, cell: Target, group: str, puts: Mapping[tuple[int, str], ActivationPatch]) -> list[Hook]:
        (layer, units), *more = cell
        one_head = self.site.what == "z" and not more and units is not None and len(units) == 1
        if one_head and len(puts) <= _MOST_SHARED * len(self.targets.layers) and self.metric != "task":
            assert units is not None
            put = puts[layer, group]  # shared by the layer's heads, which then run as rows of one batch
            return [
                (put.name, HeadEdit(put.name, units[0], put, f"the other run's output, {group}, instead"))
            ]
        return [(puts[n, group].name, replace(puts[n, group], units=units)) for n, units in cell]

    def _metric(self, logits: Float[Tensor, "row keep d_vocab"]) -> Float[Tensor, " row"]:
        return self.batch.value(as_metric(self.metric), logits)

    def _values(self, base: VLMInputs, arms: list[list[Hook]]) -> Iterator[tuple[int, Tensor]]:
        """The number of each patch, and the metric under it, [row]."""
        if not self.site.vision and self.metric != "task":
            budget = {"memory_budget": self.options.memory_budget, "tally": self.options.tally}
            for number, logits in engine.logits_under(self.model, base, arms, self.batch.keep, **budget):
                yield number, self._metric(logits)
            return
        rows, tokens = len(base), base.attention_mask.numel()
        at_once = Budget(self.model, self.options.memory_budget).rows(tokens, rows)
        for start in range(0, len(arms), at_once):
            arm_group = arms[start : start + at_once]
            if self.options.tally is not None:
                self.options.tally.full += len(arm_group) * rows
            values = (
                self._scores(base, arm_group) if self.metric == "task" else self._full_passes(base, arm_group)
            )
            yield from zip(range(start, start + len(arm_group)), values, strict=True)

    def _full_passes(self, base: VLMInputs, arms: list[list[Hook]]) -> list[Tensor]:
        repeated, hooks = self._stacked_arms(base, arms)
        with self.model.hooks(fwd_hooks=hooks):
            logits = self.model(repeated, logits_to_keep=self.batch.keep)
        return [self._metric(part) for part in logits.split(len(base))]

    def _scores(self, base: VLMInputs, arms: list[list[Hook]]) -> list[Tensor]:
        """The task's score of each pair's answer, for the clean example."""
        repeated, hooks = self._stacked_arms(base, arms)
        with self.model.hooks(fwd_hooks=hooks):
            answers = self.model.generate(repeated, max_new_tokens=engine.MAX_NEW_TOKENS)
        task, facts = engine.as_task(self.batch.pairs.task), self.batch.pairs.facts * len(arms)
        scores = [task.score(text, fact.clean) for text, fact in zip(answers, facts, strict=True)]
        return list(torch.tensor(scores, dtype=torch.float64).view(len(arms), -1))

    def _stacked_arms(self, base: VLMInputs, arms: list[list[Hook]]) -> tuple[VLMInputs, list[Hook]]:
        """The rows repeated for each arm, and hooks that apply each arm to its own copy."""
        rows = sum(map(sum, base.tower_entries)) if self.site.vision else len(base)
        return base[list(range(len(base))) * len(arms)], stack_hooks([(rows, arm) for arm in arms])
