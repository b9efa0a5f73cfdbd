"""Forks of a clean pass: what lies above a changed component is computed anew, and nothing below it.

The clean residual stream is walked up one layer at a time. At each layer all interventions whose
lowest hook is there become rows of one batch, which starts from what the clean pass left at that hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.engine.arms import Arm, ForkPoint, fork_point_of, stack_hooks
from hones_lens.engine.segments import Segment
from hones_lens.interventions import HeadEdit, Hook, Scale
from hones_lens.model import AttentionContext, GatedMLP, HookedVLM, KVCache, RMSNorm, VLMInputs, bias_or_none


@dataclass(frozen=True)
class LayerStep:
    """One layer of a clean pass over one segment.

    Attributes:
        layer: Its index.
        before, mid, after: The stream, [row pos d_model].
        attn_out: What attention adds, [row pos d_model].
        z: Output of the heads, [row pos head d_head].
        scale: Of the norm in front of the neurons, [row pos 1].
        gate, up, neurons: Inputs of the neurons, and the neurons, [row pos d_mlp].
        cache: Keys and values of this layer and of all below (of a segment that is not prefixed).
        shared: Values that the forks of this layer share, computed when first needed.
    """

    layer: int
    before: Float[Tensor, "row pos d_model"]
    z: Float[Tensor, "row pos head d_head"]
    attn_out: Float[Tensor, "row pos d_model"]
    mid: Float[Tensor, "row pos d_model"]
    scale: Float[Tensor, "row pos 1"]
    gate: Float[Tensor, "row pos d_mlp"]
    up: Float[Tensor, "row pos d_mlp"]
    neurons: Float[Tensor, "row pos d_mlp"]
    after: Float[Tensor, "row pos d_model"]
    cache: KVCache
    shared: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def last(self, keep: int) -> LayerStep:
        """The step restricted to the last `keep` positions."""
        if keep == self.before.shape[1]:
            return self
        if keep not in self.shared:
            cut = {n: v[:, v.shape[1] - keep :] for n, v in vars(self).items() if isinstance(v, Tensor)}
            self.shared[keep] = replace(self, **cut, shared={})
        return self.shared[keep]


_WATCHED = {
    "attn.hook_z": "z",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "mid",
    "ln2.hook_scale": "scale",
    "mlp.hook_pre": "gate",
    "mlp.hook_pre_linear": "up",
    "mlp.hook_post": "neurons",
}


def walk(model: HookedVLM, segments: Sequence[Segment]) -> Iterator[list[LayerStep]]:
    """Run the clean model one layer at a time, and give the step of each segment.

    Of the layers below, only keys and values are held.
    """
    streams = [segment.resid for segment in segments]
    contexts: list[AttentionContext] = []
    for segment in segments:
        contexts.append(segment.context(1, contexts[0].kv_cache if segment.prefixed else None))
    for layer in range(model.cfg.n_layers):
        steps = [_step(model, layer, *given) for given in zip(streams, contexts, strict=True)]
        streams = [step.after for step in steps]
        yield steps


def layer_steps(model: HookedVLM, inputs: VLMInputs) -> Iterator[LayerStep]:
    """`walk` for whole inputs."""
    for (step,) in walk(model, [Segment.of(model, inputs, inputs.input_ids.shape[1])]):
        yield step


@torch.no_grad()
def _step(model: HookedVLM, layer: int, before: Tensor, context: AttentionContext) -> LayerStep:
    kept: dict[str, Any] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[_WATCHED[str(hook.name).split(".", 2)[2]]] = x

    watch: list[Hook] = [(f"blocks.{layer}.{name}", keep) for name in _WATCHED]
    with model.hooks(fwd_hooks=watch):
        after = model.run_blocks(before, context, layer, layer + 1)
    assert context.kv_cache is not None
    return LayerStep(layer=layer, before=before, after=after, cache=context.kv_cache, **kept)


@dataclass(frozen=True)
class ForkOutput:
    """The outputs of several arms for one segment; rows of the first arm come first.

    Attributes:
        logits: At the segment's last `keep` positions, [arm row keep d_vocab]; None for a mere prefix.
        cache: Keys and values of the layers that were computed anew, [arm·row key kv_head d_head].
    """

    logits: Float[Tensor, "arm row keep d_vocab"] | None
    cache: KVCache


@torch.no_grad()
def fork(
    model: HookedVLM,
    segments: Sequence[Segment],
    steps: Sequence[LayerStep],
    arms: Sequence[Arm],
    whole: bool = False,
) -> list[ForkOutput]:
    """Run each arm from its start to the logits.

    Args:
        model: The model; hooks that it already has are the caller's to exclude.
        segments, steps: A layer of `walk`.
        arms: Of one `group`, which starts at this layer.
        whole: Hooks of the top block need to see every position. By default they see those whose logits
            are wanted, if they come after its attention.
    """
    layer, top = steps[0].layer, model.cfg.n_layers - 1
    names = [name for arm in arms for name, _ in arm.hooks]
    last_positions_only = all(_is_above_attention(top, name) for name in names)
    if whole:
        last_positions_only = not any(name.startswith(f"blocks.{top}.") for name in names)
    outputs: list[ForkOutput] = []
    for segment, step in zip(segments, steps, strict=True):
        rows, length = segment.resid.shape[:2]
        keep = segment.keep if last_positions_only else length
        context = segment.context(len(arms), outputs[0].cache if segment.prefixed else None, above=layer)
        skip = 1 if _has_shortcut(model, arms[0]) else 0
        with model.hooks(fwd_hooks=stack_hooks([(rows, arm.hooks[skip:]) for arm in arms])):
            starts, reads = step, context
            if layer == top and keep < length:  # behind attention, where masks are not read
                starts, reads = step.last(keep), context[:, length - keep :]
            resid = _block_output(model, starts, arms, reads)
            if layer < top:
                resid = _run_to_top(model, resid, layer + 1, context, keep)
            logits: Tensor | None = None
            if segment.keep:
                kept = resid[:, resid.shape[1] - segment.keep :]
                logits = model.unembed(model.ln_final(kept)).view(len(arms), rows, segment.keep, -1)
        assert context.kv_cache is not None
        outputs.append(ForkOutput(logits, context.kv_cache))
    return outputs


@torch.no_grad()
def clean(model: HookedVLM, segment: Segment, step: LayerStep) -> ForkOutput:
    """The clean model's output for a segment, from its top step, as one arm."""
    if not segment.keep:
        return ForkOutput(None, step.cache)
    kept = step.after[:, step.after.shape[1] - segment.keep :]
    return ForkOutput(model.unembed(model.ln_final(kept))[None], step.cache)


def _is_above_attention(top: int, name: str) -> bool:
    point = fork_point_of(name)
    return point is not None and (point[0] < top or point[1] != ForkPoint.BLOCK)


def _has_shortcut(model: HookedVLM, arm: Arm) -> bool:
    """Whether the difference alone that an arm makes in its lowest block gives what leaves it.

    Not so for heads where the neurons read another norm than RMSNorm, or have biases; nor where a norm comes
    behind what heads or neurons write.
    """
    edit = arm.shortcut
    if edit is None or arm.start is None:
        return False
    block = model.blocks[arm.start[0]]
    if not isinstance(edit, HeadEdit):
        return block.ln2_post is None
    if block.ln1_post is not None:
        return False
    gated = isinstance(block.mlp, GatedMLP) and bias_or_none(block.mlp.gate) is None
    return gated and isinstance(block.ln2, RMSNorm)


def _block_output(
    model: HookedVLM, step: LayerStep, arms: Sequence[Arm], context: AttentionContext
) -> Tensor:
    """The stream that leaves the layer where the arms start, [arm·row pos d_model]."""
    edits = [arm.shortcut for arm in arms] if _has_shortcut(model, arms[0]) else [None]
    if isinstance(edits[0], HeadEdit):
        return _output_with_changed_heads(model, step, [e for e in edits if isinstance(e, HeadEdit)], context)
    if isinstance(edits[0], Scale):
        return _output_with_scaled_neurons(model, step, [e for e in edits if isinstance(e, Scale)])
    block, times = model.blocks[step.layer], len(arms)
    assert arms[0].start is not None
    place = arms[0].start[1]
    if place == ForkPoint.BLOCK:
        return block(_repeat(step.before, times), context)
    if place == ForkPoint.POST:
        added = block.mlp_out(block.mlp.write(_repeat(step.neurons, times)))
        return block.after_mlp(_repeat(step.mid, times), added, context)
    if place == ForkPoint.Z:
        added = block.attn_out(block.attn.write(_repeat(step.z, times)))
    else:
        added = _repeat(step.attn_out, times)
    return block.after_attention(_repeat(step.before, times), added, context)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


def _output_with_changed_heads(
    model: HookedVLM, step: LayerStep, edits: Sequence[HeadEdit], context: AttentionContext
) -> Tensor:
    """The stream with one head changed: attention's output, gate and up change by what this head adds.

    With r the new norm's scale, `gate' = (r_clean · gate + Δz · W_O[h] · diag(w) · W_gate) / r`.
    """
    block = model.blocks[step.layer]
    heads = torch.tensor([edit.single_head for edit in edits], device=step.z.device)
    edits[0].check(heads, step.z.shape[2])
    d_model, shared = step.mid.shape[-1], step.shared
    if "into" not in shared:
        w_gu = torch.cat((block.mlp.W_gate, block.mlp.W_in), dim=1)
        shared["into"] = (block.attn.W_O * block.ln2.weight) @ w_gu
        shared["gu"] = (
            (torch.cat((step.gate, step.up), dim=-1) * step.scale).flatten(0, 1).to(step.gate.dtype)
        )
    replacement = edits[0].replacement
    if replacement not in shared:
        shared[replacement] = (replacement(step.z) - step.z).flatten(0, 1).transpose(0, 1).contiguous()
    dz = shared[replacement][heads]  # [arm row·pos d_head]
    mid = torch.baddbmm(
        step.mid.reshape(1, -1, d_model).expand(len(edits), -1, -1), dz, block.attn.W_O[heads]
    )
    mid_float32 = mid.float()
    scale = (mid_float32.pow(2).mean(-1, keepdim=True) + block.ln2.eps).sqrt().to(mid.dtype)
    gu = torch.baddbmm(shared["gu"].expand(len(edits), -1, -1), dz, shared["into"][heads])
    gate, up = gu.div_(scale).chunk(2, dim=-1)
    after = mid + block.mlp_out(block.mlp.down(block.mlp.act(gate) * up))
    return block.with_deepstack(after.view(len(edits) * len(step.mid), -1, d_model), context)


def _output_with_scaled_neurons(model: HookedVLM, step: LayerStep, edits: Sequence[Scale]) -> Tensor:
    """The stream with some neurons scaled: it changes by the difference in what they write."""
    w_out = model.blocks[step.layer].mlp.W_out
    streams: list[Tensor] = []
    for edit in edits:
        factor_change = edit.multiplier(step.neurons) - 1
        index = factor_change.nonzero()[:, 0]
        changed = (step.neurons[..., index] * factor_change[index]).to(w_out.dtype)
        streams.append(step.after + changed @ w_out[index])
    return torch.cat(streams)


def _run_to_top(model: HookedVLM, resid: Tensor, layer: int, context: AttentionContext, keep: int) -> Tensor:
    """The stream above all blocks at the last `keep` positions, from the stream that enters a block.

    Of the positions before them the top block computes only the keys and values.
    """
    top, length = model.cfg.n_layers - 1, resid.shape[1]
    for block in model.blocks[layer:top]:
        resid = block(resid, context)
    block, attn = model.blocks[top], model.blocks[top].attn
    if keep == length:
        return block(resid, context)
    early = length - keep
    assert context.kv_cache is not None
    k, _ = context.kv_cache.extend(
        top, *attn.keys_and_values(block.ln1(resid[:, :early]), context[:, :early])
    )
    if keep == 0:
        return resid[:, :0]
    late = context.last(keep, k.shape[1] + keep)
    return block(resid[:, early:], late)
