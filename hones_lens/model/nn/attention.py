"""Multi-head attention with every step hooked; fused kernels run where no hook needs a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hones_lens.model.nn.hook_point import HookPoint, is_hooked
from hones_lens.model.nn.linear import Linear
from hones_lens.model.nn.norm import Norm
from hones_lens.model.nn.rotary import rotate
from hones_lens.model.typed import bias_of, bias_or_none


@dataclass
class KVCache:
    """Keys (rotated) and values of all tokens seen so far, [batch pos kv_head d_head] a layer."""

    keys: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    values: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values of one layer and return all of them."""
        if layer in self.keys:
            k = torch.cat((self.keys[layer], k), dim=1)
            v = torch.cat((self.values[layer], v), dim=1)
        self.keys[layer], self.values[layer] = k, v
        return k, v


# q, k, v and mask to z
Mix = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Windows:
    """Windows of tokens that attend only to one another, e.g. in a vision tower.

    Attributes:
        members: The tokens of each window, padding tokens excluded, as indices into the flattened
            [batch pos]; filled up with index 0 where a window is smaller, or a row has fewer windows.
        real: False at such filling.
    """

    members: Int[Tensor, "batch window size"]
    real: Bool[Tensor, "batch window size"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mix: Mix | None = None) -> Tensor:
        """Attention [batch pos head d_head] within each window; zero at padding.

        Args:
            q, k, v: [batch pos head d_head].
            mix: Attention of [batch window head size d_head] under a mask in which filling attends to itself;
                default: a fused kernel, over the windows alone that have tokens.
        """
        members, real = self.members, self.real
        if mix is None:
            has_tokens = real.any(-1)
            members, real = members[has_tokens], real[has_tokens]
        q_in, k_in, v_in = (x.flatten(0, 1)[members].transpose(-3, -2) for x in (q, k, v))
        if mix is None:
            mask = None if bool(real.all()) else real[:, None, None]
            mixed = F.scaled_dot_product_attention(q_in, k_in, v_in, attn_mask=mask)
        else:
            itself = torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)
            mixed = mix(q_in, k_in, v_in, real[..., None, None, :] | itself)
        z = torch.zeros_like(q).flatten(0, 1)
        return z.index_copy(0, members[real], mixed.transpose(-3, -2)[real]).view_as(q)


@dataclass(frozen=True)
class AttentionContext:
    """Arguments of a forward pass for the attention of every layer.

    Attributes:
        cos, sin: Rotation of the queries' positions, [batch pos d_head]; None: no rotation.
        mask: True where a query may attend to a key, [batch 1 query key]; None: all, or causal.
        causal: Without a mask: whether a query attends only to itself and earlier positions.
        windows: Instead of a mask: tokens attend only to their own window.
        kv_cache: Filled and read during generation.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    kv_cache: KVCache | None = None
    windows: Windows | None = None


class Attention(nn.Module):
    """Attention over heads; keys and values may be shared by groups of heads (GQA).

    Projections stay the fused matrices of the checkpoint; `W_Q`, `W_K`, `W_V` [head d_model d_head]
    and `W_O` [head d_head d_model] are views of them. Scores and pattern are computed only when a
    hook or a cache asks for them; otherwise `scaled_dot_product_attention` runs. The split inputs
    and `hook_result` cost n_heads residual streams, so they too are made only when asked for.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_heads: int,
        n_key_value_heads: int,
        d_head: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        self.layer, self.n_heads, self.n_key_value_heads, self.d_head = (
            layer,
            n_heads,
            n_key_value_heads,
            d_head,
        )
        self.q = Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.k = Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.v = Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.o = Linear(n_heads * d_head, d_model, bias=out_bias)
        self.use_split_qkv_input = False
        self.hook_q_input = HookPoint()  # [batch pos head d_model], before the norm
        self.hook_k_input = HookPoint()  # [batch pos kv_head d_model]
        self.hook_v_input = HookPoint()  # [batch pos kv_head d_model]
        self.hook_q = HookPoint()  # [batch pos head d_head]
        self.hook_k = HookPoint()  # [batch pos kv_head d_head]
        self.hook_v = HookPoint()  # [batch pos kv_head d_head]
        self.hook_rot_q = HookPoint()  # [batch pos head d_head]
        self.hook_rot_k = HookPoint()  # [batch pos kv_head d_head]
        self.hook_attn_scores = HookPoint()  # [batch head query key], scaled and masked
        self.hook_pattern = HookPoint()  # [batch head query key]; in windows [batch window head query key]
        self.hook_z = HookPoint()  # [batch pos head d_head]
        self.hook_result = HookPoint()  # [batch pos head d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], norm: Norm, context: AttentionContext
    ) -> Float[Tensor, "batch pos d_model"]:
        """Output of the attention layer, for a residual stream that `norm` normalises first."""
        q, k, v = self._project(resid, norm)
        if context.cos is not None and context.sin is not None:
            q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        if context.kv_cache is not None:
            k, v = context.kv_cache.extend(self.layer, k, v)
        z = self._attend(q, k, v, context)
        return self.write(z)

    def write(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """Output of the attention layer, from the heads' z."""
        z = self.hook_z(z)
        if not is_hooked(self.hook_result):
            return self.o(z.flatten(2))
        result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2)
        return result if bias_or_none(self.o) is None else result + self.o.bias

    def _project(self, resid: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        if self.use_split_qkv_input or is_hooked(self.hook_q_input, self.hook_k_input, self.hook_v_input):
            q = self._project_split(resid, norm, self.q, self.hook_q_input)
            k = self._project_split(resid, norm, self.k, self.hook_k_input)
            v = self._project_split(resid, norm, self.v, self.hook_v_input)
        else:
            x = norm(resid)
            q, k, v = (p(x).unflatten(-1, (-1, self.d_head)) for p in (self.q, self.k, self.v))
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def _project_split(self, resid: Tensor, norm: Norm, projection: nn.Linear, hook: HookPoint) -> Tensor:
        n_heads = projection.out_features // self.d_head
        split_input = hook(resid[:, :, None].expand(-1, -1, n_heads, -1).clone())
        weight = projection.weight.view(n_heads, self.d_head, -1)
        x = torch.einsum("bphm,hdm->bphd", norm(split_input), weight)
        return x if bias_or_none(projection) is None else x + projection.bias.view(n_heads, self.d_head)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        groups = self.n_heads // self.n_key_value_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        has_hooks = is_hooked(self.hook_attn_scores, self.hook_pattern)
        if context.windows is not None:
            return context.windows.attend(q, k, v, self._mix if has_hooks else None)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = context.mask
        if not has_hooks:
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=context.causal and mask is None
            )
            return z.transpose(1, 2)
        if mask is None and context.causal:
            mask = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
        return self._mix(q, k, v, mask).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [... head pos d_head] by scores and pattern, for their hooks."""
        scores = (q / math.sqrt(self.d_head)) @ k.transpose(-1, -2)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        scores = self.hook_attn_scores(scores)
        pattern = self.hook_pattern(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype))
        return pattern @ v

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights by head (a view)."""
        return self.q.weight.view(-1, self.d_head, self.q.in_features).transpose(1, 2)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights by key-value head (a view)."""
        return self.k.weight.view(-1, self.d_head, self.k.in_features).transpose(1, 2)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights by key-value head (a view)."""
        return self.v.weight.view(-1, self.d_head, self.v.in_features).transpose(1, 2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights by head (a view)."""
        return self.o.weight.view(self.o.out_features, -1, self.d_head).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases by head; zeros where the model has none."""
        return bias_of(self.q).view(-1, self.d_head)

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key biases by key-value head; zeros where the model has none."""
        return bias_of(self.k).view(-1, self.d_head)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value biases by key-value head; zeros where the model has none."""
        return bias_of(self.v).view(-1, self.d_head)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        return bias_of(self.o)


def attention_mask(
    key_is_token: Bool[Tensor, "batch key"], n_queries: int
) -> Bool[Tensor, "batch 1 query key"] | None:
    """Causal mask for the last `n_queries` positions that hides padding; None where causality is all.

    A padding query attends to itself, so that no row of the softmax is empty.
    """
    n_keys = key_is_token.shape[1]
    if bool(key_is_token.all()):
        if n_queries == n_keys:
            return None
        if n_queries == 1:
            return key_is_token[:, None, None]
    shape = (n_queries, n_keys)
    causal = torch.ones(shape, dtype=torch.bool, device=key_is_token.device).tril(n_keys - n_queries)
    itself = causal ^ causal.tril(n_keys - n_queries - 1)
    return (causal & key_is_token[:, None, None]) | itself
