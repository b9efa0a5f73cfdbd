"""Feed-forward networks whose hidden units are the neurons."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.linear import Linear
from hones_lens.model.typed import activation, bias_of


class FeedForward(Protocol):
    """Interface of a feed-forward network; its hidden units, at `hook_post`, are the neurons."""

    hook_post: HookPoint  # [batch pos d_mlp]

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights."""
        ...

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, row i written by neuron i."""
        ...

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Output of the network for a normalised residual stream."""
        ...


class GatedMLP(nn.Module):
    """`m = act(W_gate x) * (W_in x)`, written by `W_out` (HONES eq. H2 calls m_i the neuron).

    Args:
        d_model: Width of the residual stream.
        d_mlp: Number of neurons.
        act: A name of transformers' activation table, e.g. `silu`.
        bias: Whether the three projections have biases.
    """

    def __init__(self, d_model: int, d_mlp: int, act: str, bias: bool = False):
        super().__init__()
        self.gate = Linear(d_model, d_mlp, bias=bias)
        self.up = Linear(d_model, d_mlp, bias=bias)
        self.down = Linear(d_mlp, d_model, bias=bias)
        self.act = activation(act)
        self.hook_pre = HookPoint()  # [batch pos d_mlp], the gate before its activation
        self.hook_pre_linear = HookPoint()  # [batch pos d_mlp]
        self.hook_post = HookPoint()  # [batch pos d_mlp], the neurons

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Output of the network for a normalised residual stream."""
        gate, linear = self.hook_pre(self.gate(x)), self.hook_pre_linear(self.up(x))
        return self.write(self.act(gate) * linear)

    def write(self, neurons: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_model"]:
        """Output of the network, from the neurons."""
        return self.down(self.hook_post(neurons))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights (a view)."""
        return self.gate.weight.T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Linear input weights (a view)."""
        return self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, row i written by neuron i (a view)."""
        return self.down.weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        return bias_of(self.down)


class MLP(nn.Module):
    """`m = act(W_in x + b_in)`, written by `W_out`: the plain network of CLIP and of GPT-2.

    Args:
        d_model: Width of the residual stream.
        d_mlp: Number of neurons.
        act: A name of transformers' activation table, e.g. `quick_gelu`.
        bias: Whether both projections have biases.
    """

    def __init__(self, d_model: int, d_mlp: int, act: str, bias: bool = True):
        super().__init__()
        self.up = Linear(d_model, d_mlp, bias=bias)
        self.down = Linear(d_mlp, d_model, bias=bias)
        self.act = activation(act)
        self.hook_pre = HookPoint()  # [batch pos d_mlp]
        self.hook_post = HookPoint()  # [batch pos d_mlp], the neurons

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Output of the network for a normalised residual stream."""
        return self.write(self.act(self.hook_pre(self.up(x))))

    def write(self, neurons: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_model"]:
        """Output of the network, from the neurons."""
        return self.down(self.hook_post(neurons))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights (a view)."""
        return self.up.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias; zeros where the model has none."""
        return bias_of(self.up)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, row i written by neuron i (a view)."""
        return self.down.weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        return bias_of(self.down)
