"""The logit lens on image tokens: a map over the picture, layer by layer, for one token of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.lens.streams import layer_names, lens_logits, residual_streams
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, ModelInput, require_choice, takes_iterables, token_names
from hones_lens.results import Labelled

VALUES = ("log_prob", "probability", "logit", "rank")


@takes_iterables
@torch.no_grad()
def image_token_lens(
    model: HookedVLM,
    model_input: ModelInput,
    token: str | int,
    *,
    row: int = 0,
    image: int = 0,
    value: str = "log_prob",
    most_layers: int | None = None,
    hooks: Sequence[Hook] = (),
) -> Labelled:
    """Logit-lens value of one vocabulary token at each image token, after every layer.

    Args:
        model: The model.
        model_input: A batch.
        token: Text that is one token, or an id.
        row, image: Index of the row, and of the image in it.
        value: `log_prob` (nats), `probability`, `logit`, or `rank` (1 where no token is more likely).
        most_layers: Of more layers so many are read, evenly spaced, the first and last among them.
        hooks: Hooks of an intervention, active during the run.

    Returns:
        Labelled with axes layer (the first is `embed`, the projector's output), row and column; rows and
        columns are those of the image-token grid, in raster order.

    Raises:
        ValueError: Text of several tokens, no such id or value, or fewer than two layers.
        IndexError: No such image.
    """
    require_choice("value", value, VALUES)
    if most_layers is not None and most_layers < 2:
        raise ValueError(f"most_layers must be at least 2, not {most_layers}")
    chosen = model.to_single_token(token) if isinstance(token, str) else token
    if not 0 <= chosen < model.cfg.d_vocab:
        raise ValueError(f"token id {chosen} is not in 0 … {model.cfg.d_vocab - 1}")
    inputs = model.as_inputs(model_input)
    if not 0 <= row < len(inputs):
        raise IndexError(f"there are {len(inputs)} rows; there is no row {row}")
    mask = torch.zeros_like(inputs.image_mask)
    mask[row] = inputs.image_mask[row]
    inputs.heatmap(mask[row].float(), row, image)  # raises where there is no such image
    names, maps = layer_names(model), []
    read = range(len(names))
    if most_layers is not None and most_layers < len(names):
        read = [round(i * (len(names) - 1) / (most_layers - 1)) for i in range(most_layers)]
    for stream in residual_streams(model, inputs, mask, hooks)[list(read)]:
        values = torch.cat([_token_values(logits, chosen, value) for logits in lens_logits(model, stream)])
        by_position = torch.zeros(mask.shape[1], device=values.device).masked_scatter(mask[row], values)
        maps.append(inputs.heatmap(by_position, row, image))
    (name,) = token_names(model, [chosen])
    what = f"{value.replace('_', '-')} of {name!r} by the logit lens at each image token"
    labels = {"layer": tuple(names[i] for i in read)}
    return Labelled(what, torch.stack(maps), ("layer", "row", "column"), labels)


def _token_values(logits: Float[Tensor, "some d_vocab"], token: int, value: str) -> Float[Tensor, " some"]:
    if value == "logit":
        return logits[:, token]
    if value == "rank":
        return 1.0 + (logits > logits[:, token, None]).sum(-1)
    log_probs = logits[:, token] - logits.logsumexp(-1)
    return log_probs.exp() if value == "probability" else log_probs
