"""An untrained LLaVA that speaks the shapes world, small enough to run under every head."""

from __future__ import annotations

import torch

from hones_lens.app.tiny import tiny_llava
from hones_lens.model.hooked_vlm import HookedVLM


def untrained(seed: int = 0) -> HookedVLM:
    """tiny-llava before training, with weights large enough for interventions to show."""
    torch.manual_seed(seed)
    processor = tiny_llava.build_processor()
    model = tiny_llava.build_model(processor).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return HookedVLM.from_hf(model, processor)
