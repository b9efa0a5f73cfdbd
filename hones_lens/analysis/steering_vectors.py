"""Directions to steer along: how the residual stream differs between two sets of inputs.

Source: contrastive activation addition (Rimsky et al., "Steering Llama 2 via contrastive activation
addition", ACL 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.interventions import Group, Hook, group_name, resid_hook, steering_vector, token_mask
from hones_lens.model import HookedVLM, ModelInput, VLMInputs


@dataclass(frozen=True, eq=False)
class MeanDifference:
    """Mean residual stream of some inputs minus that of others, in one layer and token group.

    Attributes:
        layer: Decoder layer.
        at: Position in the layer: `pre`, `mid` or `post`.
        group: Name of the token group.
        vector: The difference, [d_model], float32 on the CPU.
        n: Number of rows in the positive and in the negative set.
        spread: Root mean square distance of a row from the mean of its own set; a scale to compare the
            vector's length with.
    """

    layer: int
    at: str
    group: str
    vector: Float[Tensor, " d_model"]
    n: tuple[int, int]
    spread: float

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(self.vector.norm())

    def hook(
        self,
        group: Group | None = None,
        *,
        inputs: VLMInputs | None = None,
        strength: float = 1.0,
        generated: bool | None = None,
    ) -> Hook:
        """A hook that adds the vector at the layer and position where it was measured.

        Args:
            group: Token group; default: the group it was measured on, if that has a name.
            inputs, strength, generated: As of `steering_vector`.
        """
        target_group = self.group if group is None else group
        options = {"inputs": inputs, "strength": strength, "generated": generated, "at": self.at}
        return steering_vector(self.layer, self.vector, target_group, **options)

    def __str__(self) -> str:
        return (
            f"difference of means of {self.n[0]} and {self.n[1]} rows at {resid_hook(self.layer, self.at)}, "
            f"token group {self.group}: length {self.norm:.4g}, spread within a set {self.spread:.4g}"
        )

    __repr__ = __str__


def mean_difference(
    model: HookedVLM,
    positive: ModelInput,
    negative: ModelInput,
    layer: int,
    group: Group = "last",
    *,
    at: str = "post",
    batch_size: int = 32,
) -> MeanDifference:
    """The vector from one set of inputs to another: mean of `positive` minus mean of `negative`.

    Each row counts with the mean over its tokens in the group, so that all rows have the same weight.

    Args:
        model: The model.
        positive, negative: Inputs; they may differ in number and length.
        layer: Decoder layer; layers above it are not run.
        group: Token group, as for `token_mask`.
        at: `pre`, `mid` or `post`.
        batch_size: Number of rows per forward pass.

    Raises:
        ValueError: No such layer or place, or a group that is empty in a row.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer {layer} is not in 0 … {model.cfg.n_layers - 1}")
    sets = [_row_means(model, given, layer, group, at, batch_size) for given in (positive, negative)]
    means = [rows.mean(0) for rows in sets]
    deviations = torch.cat([rows - mean for rows, mean in zip(sets, means, strict=True)])
    spread = float(deviations.pow(2).sum(-1).mean().sqrt())
    vector = (means[0] - means[1]).float()
    return MeanDifference(layer, at, group_name(group), vector, (len(sets[0]), len(sets[1])), spread)


@torch.no_grad()
def _row_means(
    model: HookedVLM, model_input: ModelInput, layer: int, group: Group, at: str, batch_size: int
) -> Float[Tensor, "row d_model"]:
    """Mean stream of each row over its tokens of the group, float64 on the CPU."""
    inputs = model.as_inputs(model_input)
    mask = token_mask(inputs, group)
    means: list[Tensor] = []
    for start in range(0, len(inputs), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(inputs)))
        chosen = mask[rows.to(mask.device)][..., None]

        def keep(resid: Tensor, hook: object, chosen: Tensor = chosen) -> None:
            total = torch.where(chosen, resid.double(), 0).sum(1)
            means.append((total / chosen.sum(1)).cpu())

        hook = (resid_hook(layer, at), keep)
        model.run_with_hooks(inputs[rows], fwd_hooks=[hook], stop_at_layer=layer + 1)
    return torch.cat(means)
