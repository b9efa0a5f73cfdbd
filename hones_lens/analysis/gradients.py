"""Gradients of a number at the activations of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.model import HookedVLM, takes_iterables


@takes_iterables
def activation_gradients(
    model: HookedVLM, names: Sequence[str], objective: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The activations at hooks, and the gradients of an objective there, by hook in the order of the pass.

    Attribution patching and gradient × activation are sums of products of the two.

    Args:
        model: The model.
        names: Hooks.
        objective: Runs the model once, and returns a scalar.

    Returns:
        Activation and gradient of each hook, both of the activation's shape; the gradient is zero where the
        objective does not depend on the activation.
    """
    activations: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> Tensor:
        activations[str(hook.name)] = x = x if x.requires_grad else x.detach().requires_grad_()
        return x

    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        value = objective()
        gradients = torch.autograd.grad(value, list(activations.values()), materialize_grads=True)
    return {
        name: (x.detach(), gradient)
        for (name, x), gradient in zip(activations.items(), gradients, strict=True)
    }
