"""Whether every hook is causal, at the cost of a few passes a layer rather than one a hook.

A hook of a decoder layer is edited in that layer alone: it must change what the layer hands on. That every
layer's stream in turn changes the logits is measured, too, so that the two together say what an edit before a
whole pass would. A hook of the vision tower must change the stream that enters the decoder, or the one above
the layers behind which pictures write (DeepStack).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hones_lens.model import HookedVLM, VLMInputs


@torch.no_grad()
def hooks_without_effect(model: HookedVLM, inputs: VLMInputs, names: Sequence[str]) -> list[str]:
    """Names of the hooks whose edit changes nothing behind them.

    Args:
        model: The model.
        inputs: A prompt with a picture.
        names: The hooks to edit.

    Raises:
        RuntimeError: A hook that never runs; names it.
    """
    generator = torch.Generator(device=inputs.input_ids.device).manual_seed(0)

    def nudge(x: Tensor, hook: object) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        finite = x[torch.isfinite(x)].float()
        return x + (0.5 * finite.std() * noise).to(x.dtype)

    def without_effect(run: Callable[[], Tensor], among: Sequence[str]) -> list[str]:
        if not among:
            return []
        clean, found = run(), list[str]()
        for name in among:
            with model.hooks(fwd_hooks=[(name, nudge)]):
                if torch.equal(run(), clean):
                    found.append(name)
        return found

    places = {name: _layer_of(name) for name in names}
    before = [name for name, layer in places.items() if layer is None and not name.startswith("ln_final")]
    found = without_effect(lambda: model(inputs, stop_at_layer=model.cfg.n_deepstack), before)
    inputs = model.with_image_embeds(inputs)
    resid = model(inputs, stop_at_layer=0)
    for layer in range(model.cfg.n_layers):
        # defaults, so that each function keeps its own layer
        def one_layer(layer: int = layer, resid: Tensor = resid) -> Tensor:
            return model(resid, start_at_layer=layer, inputs=inputs, stop_at_layer=layer + 1)

        def to_the_end(layer: int = layer, resid: Tensor = resid) -> Tensor:
            return model(resid, start_at_layer=layer, inputs=inputs)

        inside = [name for name, place in places.items() if place == layer]
        found += without_effect(one_layer, inside)
        if inside:
            handed_on = f"blocks.{layer}.hook_resid_post"
            found += [name for name in without_effect(to_the_end, [handed_on]) if name not in found]
        resid = one_layer()
    last = [name for name in names if name.startswith("ln_final")]
    return found + without_effect(
        lambda: model(resid, start_at_layer=model.cfg.n_layers, inputs=inputs), last
    )


def sample_of_hooks(names: Sequence[str]) -> list[str]:
    """The hooks of each kind in its first, middle and last layer."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"blocks\.\d+", "blocks.*", name), []).append(name)
    chosen = {hooks[i] for hooks in kinds.values() for i in (0, len(hooks) // 2, len(hooks) - 1)}
    return [name for name in names if name in chosen]


def _layer_of(name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None
