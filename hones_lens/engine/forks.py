"""Forks of a clean pass: what lies above a changed component is computed anew, and nothing below it.

The clean residual stream is walked up one layer at a time. At each layer all interventions whose
lowest hook is there become rows of one batch, which starts from what the clean pass left at that hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.interventions import HeadEdit, Hook, Scale
from hones_lens.model import AttentionContext, HookedVLM, KVCache, VLMInputs, attention_mask, rotate

# From where in a block a fork can start, by the lowest hook that it has there.
_BLOCK, _Z, _MID, _POST = range(4)
_START = {"attn.hook_z": _Z, "hook_attn_out": _MID, "hook_resid_mid": _MID, "ln2": _MID, "mlp": _MID}
_START |= {"mlp.hook_post": _POST, "hook_mlp_out": _POST, "hook_resid_post": _POST}
_OF_TOKEN_PAIRS = ("attn.hook_attn_scores", "attn.hook_pattern")


class Arm:
    """One intervention: the hooks that make it; none at all is the clean model.

    Attributes:
        hooks: From the lowest layer upwards.
        start: Layer and place of the lowest one; None where a hook is not in a decoder block.
    """

    def __init__(self, hooks: Sequence[Hook] = ()):
        places = [_place(name) for name, _ in hooks]
        self._places = sorted(place for place in places if place is not None)
        self.start, self.hooks = None, tuple(hooks)
        if hooks and len(self._places) == len(hooks):
            self.start = self._places[0]
            self.hooks = tuple(sorted(hooks, key=lambda hook: _place(hook[0]) or (0, 0)))

    @property
    def sees_tokens_alone(self) -> bool:
        """Whether no hook is on pairs of tokens, so that the tokens may come in portions."""
        return not any(name.endswith(_OF_TOKEN_PAIRS) for name, _ in self.hooks)

    @property
    def shortcut(self) -> HeadEdit | Scale | None:
        """What the lowest hook changes, where only the difference has to be computed there."""
        if self.start is None:
            return None
        if any(layer == self.start[0] for layer, _ in self._places[1:]):
            return None
        name, first = self.hooks[0]
        if isinstance(first, HeadEdit):
            return None if first.only is None or first.late else first
        if isinstance(first, Scale) and name.endswith("mlp.hook_post") and first.axis in (-1, 2):
            return first
        return None

    def late(self) -> Arm | None:
        """For an arm that changes a head from the end of the prompt on: the same at all positions."""
        if len(self.hooks) != 1:
            return None
        name, edit = self.hooks[0]
        if isinstance(edit, HeadEdit) and edit.late and edit.only is not None:
            return Arm([(name, replace(edit, late=False))])
        return None

    @property
    def group(self) -> tuple:
        """Arms of one group can be rows of one batch."""
        edit = self.shortcut
        return (self.start, type(edit), edit.alone if isinstance(edit, HeadEdit) else None)

    def __str__(self) -> str:
        return ", ".join(str(fn) if isinstance(fn, (HeadEdit, Scale)) else name for name, fn in self.hooks)


def _place(name: object) -> tuple[int, int] | None:
    if not isinstance(name, str) or not name.startswith("blocks."):
        return None
    _, layer, rest = name.split(".", 2)
    return int(layer), _START.get(rest, _START.get(rest.split(".")[0], _BLOCK))


def stacked(parts: Sequence[tuple[int, Sequence[Hook]]]) -> list[Hook]:
    """Hooks for a batch whose rows belong to several interventions.

    Args:
        parts: How many rows in turn belong to an intervention, and its hooks.
    """
    counts = [count for count, _ in parts]
    by_name: dict[str, list[list[Callable]]] = {}
    for i, (_, hooks) in enumerate(parts):
        for name, fn in hooks:
            by_name.setdefault(name, [[] for _ in parts])[i].append(fn)

    def dispatch(each: list[list[Callable]]) -> Callable:
        def to_own_rows(x: Tensor, hook: HookPoint) -> Tensor:
            out = []
            for part, fns in zip(x.split(counts), each, strict=True):
                for fn in fns:
                    new = fn(part, hook)
                    part = part if new is None else new
                out.append(part)
            return torch.cat(out)

        firsts = [fns[0] for fns in each if len(fns) == 1]
        edits = [fn for fn in firsts if isinstance(fn, HeadEdit) and fn.only is not None]
        if len(edits) < len(each) or len({edit.alone for edit in edits}) > 1:
            return to_own_rows
        heads = torch.tensor([edit.only for edit in edits])
        return replace(edits[0], head=heads.repeat_interleave(torch.tensor(counts)))

    return [(name, dispatch(each)) for name, each in by_name.items()]


@dataclass(frozen=True)
class Segment:
    """Tokens that run through the decoder together.

    Attributes:
        resid: The stream that enters block 0, [row pos d_model].
        cos, sin: Rotation of their positions, [row pos d_head].
        mask: True where query may see key, [row or 1, 1, pos, key]; None: causality is all.
        keep: At how many of the last positions logits are wanted.
        prefixed: Whether the first segment, which then has one row, is in front of every row of this one.
        past: Keys and values of other tokens in front of each row, which no arm changes.
    """

    resid: Float[Tensor, "row pos d_model"]
    cos: Float[Tensor, "row pos d_head"]
    sin: Float[Tensor, "row pos d_head"]
    mask: Tensor | None
    keep: int
    prefixed: bool = False
    past: KVCache | None = None

    @classmethod
    def of(cls, model: HookedVLM, inputs: VLMInputs, keep: int) -> Segment:
        """Whole inputs."""
        with torch.no_grad():
            cos, sin = model.rotary(model.positions(inputs), model.cfg.dtype)
            mask = attention_mask(inputs.attention_mask.bool(), inputs.input_ids.shape[1])
            return cls(model.embed_inputs(inputs), cos, sin, mask, keep)

    def late(self, past: KVCache) -> Segment:
        """The positions whose logits are wanted alone, behind the keys and values of those before."""
        n_keys = past.keys[0].shape[1] + self.keep
        seen = torch.ones(1, n_keys, dtype=torch.bool, device=self.resid.device)
        parts = (x[:, x.shape[1] - self.keep :] for x in (self.resid, self.cos, self.sin))
        return Segment(*parts, mask=attention_mask(seen, self.keep), keep=self.keep, past=past)

    def context(self, times: int, prefix: KVCache | None = None, above: int = -1) -> AttentionContext:
        """For the rows repeated so many times.

        Args:
            times: How often.
            prefix: Where prefixed: with one row for each repetition.
            above: Of `past`, layers above this one are needed.
        """
        rows, mask = len(self.resid), self.mask
        if mask is not None and len(mask) > 1:
            mask = mask.repeat(times, 1, 1, 1)
        cos, sin = self.cos.repeat(times, 1, 1), self.sin.repeat(times, 1, 1)
        cache = KVCache()
        if self.prefixed:
            assert prefix is not None
            cache = _BehindPrefix(prefix=prefix, rows=rows)
        if self.past is not None:
            for mine, theirs in ((cache.keys, self.past.keys), (cache.values, self.past.values)):
                mine |= {n: x.repeat(times, 1, 1, 1) for n, x in theirs.items() if n > above}
        return AttentionContext(cos, sin, mask, causal=True, kv_cache=cache)


@dataclass
class _BehindPrefix(KVCache):
    """Keys and values behind those of a prefix that several rows share; only one layer's are held."""

    prefix: KVCache = field(default_factory=KVCache)
    rows: int = 1  # behind each row of the prefix

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.keys:
            self.keys = {layer: self._for_each_row(self.prefix.keys[layer])}
            self.values = {layer: self._for_each_row(self.prefix.values[layer])}
        return super().extend(layer, k, v)

    def _for_each_row(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return x.expand(self.rows, *x.shape[1:])  # a view: it is copied once, when `extend` appends to it
        return x.repeat_interleave(self.rows, dim=0)


@dataclass(frozen=True)
class Step:
    """One layer of a clean pass over one segment.

    Attributes:
        layer: Which.
        before, mid, after: The stream, [row pos d_model].
        attn_out: What the heads write, [row pos d_model].
        z: Output of the heads, [row pos head d_head].
        scale: Of the norm in front of the neurons, [row pos 1].
        gate, up, neurons: Inputs of the neurons, and the neurons, [row pos d_mlp].
        cache: Keys and values of this layer and of all below (of a segment that is not prefixed).
        made: What forks of this layer share, made when first needed.
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
    made: dict[Any, Any] = field(default_factory=dict)

    def last(self, keep: int) -> Step:
        """The same at the last positions alone."""
        if keep == self.before.shape[1]:
            return self
        if keep not in self.made:
            cut = {n: v[:, v.shape[1] - keep :] for n, v in vars(self).items() if isinstance(v, Tensor)}
            self.made[keep] = replace(self, **cut, made={})
        return self.made[keep]


_WATCHED = {
    "attn.hook_z": "z",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "mid",
    "ln2.hook_scale": "scale",
    "mlp.hook_pre": "gate",
    "mlp.hook_pre_linear": "up",
    "mlp.hook_post": "neurons",
}


def walk(model: HookedVLM, segments: Sequence[Segment]) -> Iterator[list[Step]]:
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


def steps_of(model: HookedVLM, inputs: VLMInputs) -> Iterator[Step]:
    """`walk` for whole inputs."""
    for (step,) in walk(model, [Segment.of(model, inputs, inputs.input_ids.shape[1])]):
        yield step


@torch.no_grad()
def _step(model: HookedVLM, layer: int, before: Tensor, context: AttentionContext) -> Step:
    kept: dict[str, Any] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[_WATCHED[str(hook.name).split(".", 2)[2]]] = x

    watch: list[Hook] = [(f"blocks.{layer}.{name}", keep) for name in _WATCHED]
    with model.hooks(fwd_hooks=watch):
        after = model.run_blocks(before, context, layer, layer + 1)
    assert context.kv_cache is not None
    return Step(layer=layer, before=before, after=after, cache=context.kv_cache, **kept)


@dataclass(frozen=True)
class Forked:
    """What some arms made of one segment; rows of the first arm come first.

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
    steps: Sequence[Step],
    arms: Sequence[Arm],
    whole: bool = False,
) -> list[Forked]:
    """Run, for each of some arms, all that lies above its start.

    Args:
        model: The model; hooks that it already has are the caller's to exclude.
        segments, steps: A layer of `walk`.
        arms: Of one `group`, which starts at this layer.
        whole: Hooks of the top block need to see every position. By default they see those whose logits
            are wanted, if they come after its attention.
    """
    layer, top = steps[0].layer, model.cfg.n_layers - 1
    names = [name for arm in arms for name, _ in arm.hooks]
    brief = all(_above_attention_of(top, name) for name in names)
    if whole:
        brief = not any(name.startswith(f"blocks.{top}.") for name in names)
    out: list[Forked] = []
    for segment, step in zip(segments, steps, strict=True):
        rows, length = segment.resid.shape[:2]
        keep = segment.keep if brief else length
        context = segment.context(len(arms), out[0].cache if segment.prefixed else None, above=layer)
        skip = 1 if arms[0].shortcut else 0
        with model.hooks(fwd_hooks=stacked([(rows, arm.hooks[skip:]) for arm in arms])):
            here = step.last(keep) if layer == top else step
            resid = _changed(model, here, arms, context)
            if layer < top:
                resid = _rise(model, resid, layer + 1, context, keep)
            logits = None
            if segment.keep:
                kept = resid[:, resid.shape[1] - segment.keep :]
                logits = model.unembed(model.ln_final(kept)).unflatten(0, (len(arms), rows))
        assert context.kv_cache is not None
        out.append(Forked(logits, context.kv_cache))
    return out


@torch.no_grad()
def clean(model: HookedVLM, segment: Segment, step: Step) -> Forked:
    """What the clean model made of a segment, from its top step, as one arm."""
    if not segment.keep:
        return Forked(None, step.cache)
    kept = step.after[:, step.after.shape[1] - segment.keep :]
    return Forked(model.unembed(model.ln_final(kept))[None], step.cache)


def _above_attention_of(top: int, name: str) -> bool:
    place = _place(name)
    return place is not None and (place[0] < top or place[1] != _BLOCK)


def _changed(model: HookedVLM, step: Step, arms: Sequence[Arm], context: AttentionContext) -> Tensor:
    """The stream that leaves the layer where the arms start, [arm·row pos d_model]."""
    edits = [arm.shortcut for arm in arms]
    if isinstance(edits[0], HeadEdit):
        return _changed_heads(model, step, [e for e in edits if isinstance(e, HeadEdit)])
    if isinstance(edits[0], Scale):
        return _changed_neurons(model, step, [e for e in edits if isinstance(e, Scale)])
    block, times = model.blocks[step.layer], len(arms)
    assert arms[0].start is not None
    place = arms[0].start[1]
    if place == _BLOCK:
        return block(_repeat(step.before, times), context)
    if place == _POST:
        return block.leave(_repeat(step.mid, times), block.mlp.write(_repeat(step.neurons, times)))
    wrote = step.attn_out
    wrote = block.attn.write(_repeat(step.z, times)) if place == _Z else _repeat(wrote, times)
    return block.after_attention(_repeat(step.before, times), wrote)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


def _changed_heads(model: HookedVLM, step: Step, edits: Sequence[HeadEdit]) -> Tensor:
    """One head changed: attention's output, gate and up all change by what this head writes otherwise.

    With r the new norm's scale, `gate' = (r_clean · gate + Δz · W_O[h] · diag(w) · W_gate) / r`.
    """
    block = model.blocks[step.layer]
    heads = torch.tensor([edit.only for edit in edits], device=step.z.device)
    edits[0].check(heads, step.z.shape[2])
    d_model, made = step.mid.shape[-1], step.made
    if "into" not in made:
        w_gu = torch.cat((block.mlp.W_gate, block.mlp.W_in), dim=1)
        made["into"] = (block.attn.W_O * block.ln2.weight) @ w_gu
        made["gu"] = (torch.cat((step.gate, step.up), dim=-1) * step.scale).flatten(0, 1).to(step.gate.dtype)
    alone = edits[0].alone
    if alone not in made:
        made[alone] = (alone(step.z) - step.z).flatten(0, 1).transpose(0, 1).contiguous()
    dz = made[alone][heads]  # [arm row·pos d_head]
    mid = torch.baddbmm(
        step.mid.reshape(1, -1, d_model).expand(len(edits), -1, -1), dz, block.attn.W_O[heads]
    )
    wide = mid.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + block.ln2.eps).sqrt().to(mid.dtype)
    gu = torch.baddbmm(made["gu"].expand(len(edits), -1, -1), dz, made["into"][heads])
    gate, up = gu.div_(scale).chunk(2, dim=-1)
    after = mid + block.mlp.down(block.mlp.act(gate) * up)
    return after.view(len(edits) * len(step.mid), -1, d_model)


def _changed_neurons(model: HookedVLM, step: Step, edits: Sequence[Scale]) -> Tensor:
    """Some neurons scaled: the stream changes by what they write otherwise."""
    w_out = model.blocks[step.layer].mlp.W_out
    out = []
    for edit in edits:
        more = edit.multiplier(step.neurons) - 1
        index = more.nonzero()[:, 0]
        changed = (step.neurons[..., index] * more[index]).to(w_out.dtype)
        out.append(step.after + changed @ w_out[index])
    return torch.cat(out)


def _rise(model: HookedVLM, resid: Tensor, layer: int, context: AttentionContext, keep: int) -> Tensor:
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
    x = block.ln1(resid[:, :early])
    k, v = (project(x).unflatten(-1, (-1, attn.d_head)) for project in (attn.k, attn.v))
    cos, sin, cache = context.cos, context.sin, context.kv_cache
    assert cos is not None and sin is not None and cache is not None
    k, v = cache.extend(top, rotate(k, cos[:, :early], sin[:, :early]), v)
    if keep == 0:
        return resid[:, :0]
    mask = context.mask
    if mask is None:
        seen = torch.ones(1, k.shape[1] + keep, dtype=torch.bool, device=resid.device)
        mask = attention_mask(seen, keep)
    else:
        mask = mask[:, :, early:]
    late = replace(context, cos=cos[:, early:], sin=sin[:, early:], mask=mask)
    return block(resid[:, early:], late)
