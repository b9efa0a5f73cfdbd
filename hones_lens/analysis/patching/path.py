"""Path patching: effects of heads on other components, or on the logits, along chosen paths.

Source: Wang et al. 2022 (IOI), Goldowsky-Dill et al. 2023. A receiver reads the stream as it is in the
patched run, plus what the senders would write otherwise; everything else reads the stream as it is. With
every component as a receiver this is activation patching of the senders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from hones_lens import engine
from hones_lens.analysis.patching.batches import PairBatch, check_no_hooks, pair_batches
from hones_lens.analysis.patching.metrics import Metric, as_metric
from hones_lens.analysis.patching.noise import patching_noise
from hones_lens.analysis.patching.outcome import PatchingKeywords, Summary, SummaryKeywords, outcome_notes
from hones_lens.analysis.patching.pair_answers import PairAnswers, answers_of_batch, joined_answers
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.receivers import (
    Head,
    Receiver,
    Receivers,
    check_senders,
    receiver_groups,
    receiver_hook,
)
from hones_lens.engine import SweepOptions, split_keywords
from hones_lens.interventions import Group, Hook
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import Labelled


@takes_iterables
def path_patching(
    model: HookedVLM,
    pairs: PatchPairs,
    senders: Sequence[Head],
    receivers: Receivers = "logits",
    *,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    through_mlps: bool = False,
    positions: Group = "all",
    options: SweepOptions | None = None,
    **keywords: Unpack[PatchingKeywords],
) -> Labelled:
    """Change of the metric when receivers, and they alone, read what the senders write in the source run.

    Args:
        model: The model.
        pairs: Clean and corrupted inputs.
        senders: Heads (layer, head), patched together.
        receivers: `logits`; or a list of `"logits"`, (layer, head, "q"), (layer, key-value head, "k" or "v")
            and neurons (layer, index), each patched alone; or lists by name, each patched together. Keys
            and values of a key-value head are received for all heads of its group. What no sender comes
            before receives nothing: its effect is 0.
        direction: `denoise`: the source is the clean run, the base the corrupted one; `noise`: the other way.
        metric: A name of `METRICS`, or a function like them.
        through_mlps: MLPs between a sender and a receiver pass on what they make of the change. By default
            paths go through the residual stream alone. Heads between never see the change.
        positions: Where the senders are patched.
        options: How it runs, as `SweepOptions`.
        keywords: How the result is told: `raw`, `by_pair`, `draws`, `seed` of `Summary`; and `batch_size`,
            `progress`, `memory_budget`, `tally` of `SweepOptions`.

    Returns:
        A ratio of means over pairs on the axis `receiver`, with 95 % intervals.

    Raises:
        ValueError: No senders or receivers, one that the model does not have, or hooks of the model's own on
            activations that receivers are given.
    """
    summary, options = _summary_and_options(keywords, options)
    paths = _Paths(model, [senders], receivers, through_mlps)
    change, gap, answers = paths.measured(pairs, direction, as_metric(metric), positions, options)
    sent, labels = ", ".join(f"{layer}.{head}" for layer, head in senders), {"receiver": tuple(paths.groups)}
    how: dict[str, Any] = {"metric": metric, "direction": direction, "of": f"along paths from {sent}"}
    how["notes"] = outcome_notes(model, pairs, gap, metric, direction)
    how["answers"] = answers
    summary = replace(summary, noise=patching_noise(model, pairs, metric, options))
    return summary.result(change[:, 0], gap, pairs, axes=("receiver",), labels=labels, **how)


@takes_iterables
def path_patching_matrix(
    model: HookedVLM,
    pairs: PatchPairs,
    senders: Sequence[Head] | None = None,
    receivers: Receivers = "logits",
    *,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    through_mlps: bool = False,
    positions: Group = "all",
    options: SweepOptions | None = None,
    **keywords: Unpack[PatchingKeywords],
) -> Labelled:
    """`path_patching` from each sender alone to each receiver.

    Args:
        model, pairs, receivers: As there.
        senders: Heads, each on its own; default: all.
        direction, metric, through_mlps, positions, options, keywords: As there.

    Returns:
        On the axes `sender`, `receiver`; `layer`, `head`, `receiver` for all heads.

    Raises:
        ValueError: As `path_patching`.
    """
    summary, options = _summary_and_options(keywords, options)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    each = [(n, h) for n in range(n_layers) for h in range(n_heads)] if senders is None else list(senders)
    paths = _Paths(model, [[sender] for sender in each], receivers, through_mlps)
    change, gap, answers = paths.measured(pairs, direction, as_metric(metric), positions, options)
    axes, labels = ("sender", "receiver"), {"receiver": tuple(paths.groups)}
    if senders is None:
        change, axes = change.unflatten(1, (n_layers, n_heads)), ("layer", "head", "receiver")
    else:
        labels["sender"] = tuple(f"{layer}.{head}" for layer, head in each)
    how: dict[str, Any] = {"metric": metric, "direction": direction, "of": "along paths from each sender"}
    how["notes"] = outcome_notes(model, pairs, gap, metric, direction)
    how["answers"] = answers
    summary = replace(summary, noise=patching_noise(model, pairs, metric, options))
    return summary.result(change, gap, pairs, axes=axes, labels=labels, **how)


def _summary_and_options(
    keywords: Mapping[str, Any], options: SweepOptions | None
) -> tuple[Summary, SweepOptions]:
    own, sweep = split_keywords(keywords, SummaryKeywords.__annotations__)
    return Summary(**own), SweepOptions.of(options, sweep, unused=("journal",))


class _Paths:
    """Paths from each set of senders to each group of receivers.

    Attributes:
        groups: Receivers by label.
    """

    def __init__(
        self,
        model: HookedVLM,
        senders: Sequence[Sequence[Head]],
        receivers: Receivers,
        through_mlps: bool,
    ):
        self.model, self.senders, self.through_mlps = model, senders, through_mlps
        for heads in senders:
            check_senders(model, heads)
        self.groups = receiver_groups(model, receivers)
        check_no_hooks(model, sorted(self._replaced()), "path patching")

    def _replaced(self) -> set[str]:
        """Hook points whose activations are recomputed."""
        names = {receiver_hook(r) for receivers in self.groups.values() for r in receivers if r != "logits"}
        if self.through_mlps:
            names |= {f"blocks.{layer}.mlp.hook_post" for layer in range(self.model.cfg.n_layers)}
        return names

    @torch.no_grad()
    def measured(
        self,
        pairs: PatchPairs,
        direction: str,
        metric: Metric,
        positions: Group,
        options: SweepOptions,
    ) -> tuple[Float[Tensor, "pair senders receiver"], Float[Tensor, " pair"], PairAnswers]:
        """Change of the metric in each pair, metric of the source run minus that of the base run, answers."""
        shape, mask = (len(self.senders), len(self.groups)), pairs.mask(positions)
        changes, gaps, answers, total = [], [], [], len(pairs) * shape[0] * shape[1]
        budget = {"memory_budget": options.memory_budget, "tally": options.tally}
        with tqdm(total=total, desc="path patching", unit="cell", disable=not options.progress) as bar:
            for start, batch in pair_batches(self.model, pairs, direction, options.batch_size, metric):
                arms = [[], *self._arms(batch, batch.mask_rows(mask, start))]
                values: dict[int, Tensor] = {}
                for i, logits in engine.logits_under(self.model, batch.base, arms, batch.keep, **budget):
                    values[i] = batch.value(metric, logits).cpu()
                    bar.update(len(batch.pairs) if i else 0)
                change = [values[i] - values[0] for i in range(1, len(arms))]
                changes.append(torch.stack(change, dim=1).unflatten(1, shape))
                gaps.append(batch.gap(self.model, metric).cpu())
                answers.append(answers_of_batch(batch))
        return torch.cat(changes), torch.cat(gaps), joined_answers(answers)

    def _arms(self, batch: PairBatch, where: Tensor) -> list[list[Hook]]:
        names = {f"blocks.{layer}.attn.hook_z" for heads in self.senders for layer, _ in heads}
        source = self.model.run_with_cache(batch.source, names_filter=sorted(names), logits_to_keep=1)[1]
        arms = []
        for senders in self.senders:
            heads_by_layer: dict[int, list[int]] = {}
            for layer, head in senders:
                heads_by_layer.setdefault(layer, []).append(head)
            for group in self.groups.values():
                z = {layer: source[f"blocks.{layer}.attn.hook_z"] for layer in heads_by_layer}
                path = _Path(self.model, z, heads_by_layer, group, where)
                arms.append(path.hooks(self.through_mlps))
        return arms


class _Path:
    """Hooks of one pass, which carry the senders' change along the stream to the receivers.

    Args:
        model: The model.
        source: The senders' z in the source run, by layer, [batch pos head d_head].
        senders: Heads by layer.
        receivers: The receivers.
        where: Positions at which senders are patched, [batch pos].
    """

    def __init__(
        self,
        model: HookedVLM,
        source: Mapping[int, Tensor],
        senders: Mapping[int, list[int]],
        receivers: Sequence[Receiver],
        where: Bool[Tensor, "batch pos"],
    ):
        self.model, self.source, self.senders, self.where = model, source, senders, where
        self.first, self.top = min(senders), model.cfg.n_layers - 1
        self.logits = "logits" in receivers
        self.received: dict[str, list[int]] = {}
        for receiver in receivers:
            if receiver != "logits" and receiver[0] >= self.first + (len(receiver) == 3):
                self.received.setdefault(receiver_hook(receiver), []).append(receiver[1])
        self.stream: Tensor | None = None  # the unpatched stream at a block's input
        self.change: Tensor | None = None  # the senders' change, which receivers add to it

    def hooks(self, through_mlps: bool) -> list[Hook]:
        """The hooks of one forward pass; empty where no receiver comes after a sender."""
        if not self.logits and not self.received:
            return []
        layers = [int(name.split(".")[1]) for name in self.received]
        last = self.top if self.logits else max(layers)
        out: list[Hook] = []
        for layer in range(self.first, last + 1):
            block, at = self.model.blocks[layer], f"blocks.{layer}."
            parts = {part: self.received.get(f"{at}attn.hook_{part}") for part in "qkv"}
            neurons = self.received.get(f"{at}mlp.hook_post")
            if any(parts.values()):
                out.append((f"{at}hook_resid_pre", self._keep_stream))
            out += [
                (f"{at}attn.hook_{n}", self._receive(block, n, heads)) for n, heads in parts.items() if heads
            ]
            if layer in self.senders:
                out.append((f"{at}attn.hook_z", self._send(layer, block)))
            if neurons or through_mlps:
                out.append((f"{at}hook_resid_mid", self._keep_stream))
            if neurons:
                out.append((f"{at}mlp.hook_post", self._receive_neurons(block, neurons)))
            if through_mlps:
                out.append((f"{at}hook_mlp_out", self._pass_mlp(block)))
        return [*out, (f"blocks.{last}.hook_resid_post", self._finish)]

    def _keep_stream(self, x: Tensor, hook: HookPoint) -> None:
        self.stream = x

    def _patched_stream(self) -> Tensor:
        assert self.stream is not None and self.change is not None
        return self.stream + self.change

    def _send(self, layer: int, block: Any) -> Callable:
        heads = self.senders[layer]

        def send(z: Tensor, hook: HookPoint) -> None:
            other = torch.where(self.where[..., None, None], self.source[layer].to(z.dtype), z)
            more = _attention_change(block, z, other, heads)
            self.change = more if layer == self.first else self._current_change() + more

        return send

    def _current_change(self) -> Tensor:
        assert self.change is not None
        return self.change

    def _receive(self, block: Any, part: str, heads: list[int]) -> Callable:
        def receive(x: Tensor, hook: HookPoint) -> Tensor:
            made = getattr(block.attn, part)(block.ln1(self._patched_stream())).view_as(x)
            return _replaced(x, made, heads, axis=2)

        return receive

    def _receive_neurons(self, block: Any, index: list[int]) -> Callable:
        def receive(x: Tensor, hook: HookPoint) -> Tensor:
            return _replaced(x, _neurons(block, self._patched_stream()), index, axis=-1)

        return receive

    def _pass_mlp(self, block: Any) -> Callable:
        def pass_on(wrote: Tensor, hook: HookPoint) -> None:
            self.change = (
                self._current_change()
                + block.mlp_out(block.mlp.down(_neurons(block, self._patched_stream())))
                - wrote
            )

        return pass_on

    def _finish(self, resid: Tensor, hook: HookPoint) -> Tensor:
        out = resid + self._current_change() if self.logits else resid
        self.stream = self.change = None
        return out


def _attention_change(
    block: Any, z: Float[Tensor, "batch pos head d_head"], other: Tensor, heads: list[int]
) -> Float[Tensor, "batch pos d_model"]:
    """By how much attention adds something else where some heads have another z."""
    if block.ln1_post is None:
        return torch.einsum("bphd,hdm->bpm", (other - z)[:, :, heads], block.attn.W_O[heads])
    changed = _replaced(z, other, heads, axis=2)
    after, before = (block.attn_out(block.attn.o(x.flatten(2))) for x in (changed, z))
    return after - before


def _neurons(block: Any, stream: Tensor) -> Float[Tensor, "batch pos d_mlp"]:
    """Activations of a block's neurons for a given residual stream."""
    mlp, x = block.mlp, block.ln2(stream)
    return mlp.act(mlp.hook_pre(mlp.gate(x))) * mlp.hook_pre_linear(mlp.up(x))


def _replaced(x: Tensor, other: Tensor, index: list[int], axis: int) -> Tensor:
    chosen = torch.tensor(index, device=x.device)
    return x.index_copy(axis, chosen, other.index_select(axis, chosen))
