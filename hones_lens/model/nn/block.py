"""The transformer block of decoder and vision tower alike."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.hook_point import HookPoint, is_hooked
from hones_lens.model.nn.mlp import FeedForward
from hones_lens.model.nn.norm import Norm


class Block(nn.Module):
    """`mid = pre + attn(ln1(pre))`, `post = mid + mlp(ln2(mid))`, with the stream hooked between.

    The skip connections carry the values that the hooks return, so an edit at
    `hook_resid_mid` equals the same edit at `hook_attn_out`.

    Args:
        attn, mlp: Attention and feed-forward network.
        ln1, ln2: The norms in front of them.
        ln1_post, ln2_post: Norms of what they write, before it is added (Gemma), which subtract no mean;
            None: it is added as it is. `hook_attn_out` and `hook_mlp_out` are what is added.
        deepstack: Whether what pictures write behind this block (`AttentionContext.deepstack`) is added to
            the stream, `post = mid + mlp(ln2(mid)) + deepstack`. `hook_deepstack` is zero at text, and where
            no picture is.
    """

    hook_out_is_single_residual_stream = True

    def __init__(
        self,
        attn: Attention,
        mlp: FeedForward,
        ln1: Norm,
        ln2: Norm,
        ln1_post: Norm | None = None,
        ln2_post: Norm | None = None,
        deepstack: bool = False,
    ):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.ln1_post, self.ln2_post = ln1_post, ln2_post
        self.hook_resid_pre = HookPoint()  # [batch pos d_model]
        self.hook_attn_out = HookPoint()  # [batch pos d_model]
        self.hook_resid_mid = HookPoint()  # [batch pos d_model]
        self.hook_mlp_out = HookPoint()  # [batch pos d_model]
        self.deepstack = deepstack
        if deepstack:
            self.hook_deepstack = HookPoint()  # [batch pos d_model]
        self.hook_resid_post = HookPoint()  # [batch pos d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        pre = self.hook_resid_pre(resid)
        attn_out = self.attn_out(self.attn(pre, self.ln1, context))
        return self.after_attention(pre, attn_out, context)

    def attn_out(self, written: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream, from what its heads write; runs `ln1_post`."""
        return written if self.ln1_post is None else self.ln1_post(written)

    def mlp_out(self, written: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream, from what its neurons write; runs `ln2_post`."""
        return written if self.ln2_post is None else self.ln2_post(written)

    def after_attention(
        self,
        pre: Float[Tensor, "batch pos d_model"],
        attn_out: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block, from its input and what its attention adds."""
        mid = self.hook_resid_mid(pre + self.hook_attn_out(attn_out))
        return self.after_mlp(mid, self.mlp_out(self.mlp(self.ln2(mid))), context)

    def after_mlp(
        self,
        mid: Float[Tensor, "batch pos d_model"],
        mlp_out: Float[Tensor, "batch pos d_model"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block, from `resid_mid` and what its MLP adds."""
        return self.hook_resid_post(self.with_deepstack(mid + self.hook_mlp_out(mlp_out), context))

    def with_deepstack(
        self, resid: Float[Tensor, "batch pos d_model"], context: AttentionContext
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with what pictures write behind this block."""
        if not self.deepstack or (context.deepstack is None and not is_hooked(self.hook_deepstack)):
            return resid
        stack = context.deepstack
        wrote = torch.zeros_like(resid) if stack is None else stack[:, :, self.attn.layer]
        return resid + self.hook_deepstack(wrote)
