"""Model families by the Hugging Face `model_type` they take. One more family is one more file."""

from __future__ import annotations

import importlib

FAMILIES = {
    "llava": "hones_lens.model.families.llava:HookedLlava",
    "qwen2_5_vl": "hones_lens.model.families.qwen2_5_vl:HookedQwen2_5_VL",
}


def load_family(model_type: str):
    """The HookedVLM class for a Hugging Face `model_type`.

    Raises:
        ValueError: No such family; lists the valid ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model family {model_type!r}; valid: {', '.join(FAMILIES)}")
    module, name = FAMILIES[model_type].split(":")
    return getattr(importlib.import_module(module), name)
