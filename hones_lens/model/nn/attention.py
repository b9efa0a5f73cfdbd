"""Multi-head attention with every step hooked; fused kernels run where no hook needs a step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.hook_point import HookPoint, is_hooked
from hones_lens.model.nn.linear import Linear
from hones_lens.model.nn.norm import Norm
from hones_lens.model.nn.rotary import rotate
from hones_lens.model.typed import bias_of, bias_or_none


class Attention(nn.Module):
    """Attention over heads; keys and values may be shared by groups of heads (GQA).

    Projections stay the fused matrices of the checkpoint; `W_Q`, `W_K`, `W_V` [head d_model d_head]
    and `W_O` [head d_head d_model] are views of them. Scores and pattern are computed only when a
    hook or a cache asks for them; otherwise `scaled_dot_product_attention` runs. The split inputs
    and `hook_result` cost n_heads residual streams, so they too are made only when asked for.

    Args:
        layer: Its number.
        d_model, n_heads, n_key_value_heads, d_head: Sizes.
        qkv_bias, out_bias: Whether the projections have biases.
        sliding: It reads the rotation and the mask of `AttentionContext.sliding`.
        qk_norm: Norms of each head's queries and keys, in front of their rotation (QK-norm); None: none.
        divisor: What scores are divided by; None: √d_head.

    `hook_q` and `hook_k` are what the projections give; with norms, `hook_q_norm` and `hook_k_norm` are what
    these make of it, with their weights.
    """

    q_norm: Norm | None
    k_norm: Norm | None

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_heads: int,
        n_key_value_heads: int,
        d_head: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
        sliding: bool = False,
        qk_norm: tuple[Norm, Norm] | None = None,
        divisor: float | None = None,
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
        self.q_norm, self.k_norm = qk_norm or (None, None)
        self.sliding = sliding
        self.divisor = math.sqrt(d_head) if divisor is None else divisor
        self.use_split_qkv_input = False
        self.hook_q_input = HookPoint()  # [batch pos head d_model], before the norm
        self.hook_k_input = HookPoint()  # [batch pos kv_head d_model]
        self.hook_v_input = HookPoint()  # [batch pos kv_head d_model]
        self.hook_q = HookPoint()  # [batch pos head d_head]
        self.hook_k = HookPoint()  # [batch pos kv_head d_head]
        self.hook_v = HookPoint()  # [batch pos kv_head d_head]
        if qk_norm is not None:
            self.hook_q_norm = HookPoint()  # [batch pos head d_head]
            self.hook_k_norm = HookPoint()  # [batch pos kv_head d_head]
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
        here = self.own(context)
        q, k, v = self._project(resid, norm)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.hook_q_norm(self.q_norm(q)), self.hook_k_norm(self.k_norm(k))
        q, k = self.hook_rot_q(_rotated(q, here)), self.hook_rot_k(_rotated(k, here))
        if context.kv_cache is not None:
            k, v = context.kv_cache.extend(self.layer, k, v)
        return self.write(self._attend(q, k, v, here))

    def own(self, context: AttentionContext) -> AttentionContext:
        """What this layer reads of a context."""
        return context.sliding if self.sliding and context.sliding is not None else context

    def keys_and_values(
        self, x: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> tuple[Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        """Rotated keys, and values, of a normalised residual stream; runs no hooks of its own."""
        k, v = (project(x).unflatten(-1, (-1, self.d_head)) for project in (self.k, self.v))
        k = k if self.k_norm is None else self.k_norm(k)
        return _rotated(k, self.own(context)), v

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
            return context.windows.attend(q, k, v, self._mix if has_hooks else None, 1 / self.divisor)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = context.mask
        if not has_hooks:
            is_causal = context.causal and mask is None
            z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=1 / self.divisor)
            return z.transpose(1, 2)
        if mask is None and context.causal:
            mask = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
        return self._mix(q, k, v, mask).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [... head pos d_head] by scores and pattern, for their hooks."""
        scores = (q / self.divisor) @ k.transpose(-1, -2)
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


def _rotated(x: Tensor, context: AttentionContext) -> Tensor:
    if context.cos is None or context.sin is None:
        return x
    return rotate(x, context.cos, context.sin)
