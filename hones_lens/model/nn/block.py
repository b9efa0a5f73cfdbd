"""The pre-norm transformer block of decoder and vision tower alike."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.mlp import FeedForward
from hones_lens.model.nn.norm import Norm


class Block(nn.Module):
    """`mid = pre + attn(ln1(pre))`, `post = mid + mlp(ln2(mid))`, with the stream hooked between.

    The skip connections carry the values that the hooks return, so an edit at
    `hook_resid_mid` equals the same edit at `hook_attn_out`.

    Args:
        attn, mlp: What writes to the stream.
        ln1, ln2: Norms of what they read.
        post_norms: Norms of what they write, `ln1_post` and `ln2_post`, where the block has such;
            `hook_attn_out` and `hook_mlp_out` are behind them: what the stream gets.
        deepstack: What the context's `deepstack` has for this layer is added behind the MLP, at
            `hook_deepstack`: `post = mid + mlp(ln2(mid)) + deepstack`.
    """

    hook_out_is_single_residual_stream = True
    ln1_post: Norm
    ln2_post: Norm

    def __init__(
        self,
        attn: Attention,
        mlp: FeedForward,
        ln1: Norm,
        ln2: Norm,
        post_norms: tuple[Norm, Norm] | None = None,
        deepstack: bool = False,
    ):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.has_post_norms, self.has_deepstack = post_norms is not None, deepstack
        if post_norms is not None:
            self.ln1_post, self.ln2_post = post_norms
        self.hook_resid_pre = HookPoint()  # [batch pos d_model]
        self.hook_attn_out = HookPoint()  # [batch pos d_model]
        self.hook_resid_mid = HookPoint()  # [batch pos d_model]
        self.hook_mlp_out = HookPoint()  # [batch pos d_model]
        if deepstack:
            self.hook_deepstack = HookPoint()  # [batch pos d_model], zero at text
        self.hook_resid_post = HookPoint()  # [batch pos d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        pre = self.hook_resid_pre(resid)
        return self.after_attention(pre, self.attn(pre, self.ln1, context), context)

    def after_attention(
        self,
        pre: Float[Tensor, "batch pos d_model"],
        written: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block, from its input and what its heads write."""
        attn_out = self.ln1_post(written) if self.has_post_norms else written
        return self.after_attn_out(pre, attn_out, context)

    def after_attn_out(
        self,
        pre: Float[Tensor, "batch pos d_model"],
        attn_out: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block, from its input and what it gets from the attention."""
        mid = self.hook_resid_mid(pre + self.hook_attn_out(attn_out))
        return self.after_mlp(mid, self.mlp(self.ln2(mid)), context)

    def after_mlp(
        self,
        mid: Float[Tensor, "batch pos d_model"],
        written: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block, from `resid_mid` and what its neurons write."""
        mlp_out = self.ln2_post(written) if self.has_post_norms else written
        post = mid + self.hook_mlp_out(mlp_out)
        if self.has_deepstack and (deep := context.deepstack.get(self.attn.layer)) is not None:
            post = post + self.hook_deepstack(deep)
        return self.hook_resid_post(post)
