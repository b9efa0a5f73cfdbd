"""Model families by the Hugging Face `model_type` they take. One more family is one more file."""

from __future__ import annotations

import pkgutil
from importlib.metadata import entry_points

from hones_lens.model.choices import require_choice

# Hugging Face's `model_type`: module and class.
FAMILIES = {
    "llava": "hones_lens.model.families.llava:HookedLlava",
    "llava_next": "hones_lens.model.families.llava_next:HookedLlavaNext",
    "llava_onevision": "hones_lens.model.families.llava_onevision:HookedLlavaOnevision",
    "vipllava": "hones_lens.model.families.vipllava:HookedVipLlava",
    "gemma3": "hones_lens.model.families.gemma3:HookedGemma3",
    "idefics3": "hones_lens.model.families.idefics3:HookedIdefics3",
    "smolvlm": "hones_lens.model.families.smolvlm:HookedSmolVLM",
    "qwen2_vl": "hones_lens.model.families.qwen2_vl:HookedQwen2VL",
    "qwen2_5_vl": "hones_lens.model.families.qwen2_5_vl:HookedQwen2_5_VL",
    "qwen3_vl": "hones_lens.model.families.qwen3_vl:HookedQwen3VL",
}


def load_family(model_type: str):
    """The HookedVLM class for a Hugging Face `model_type`.

    Those of `FAMILIES`, and the entry points `hones_lens.families` of installed distributions.

    Raises:
        ValueError: No such family; lists the valid ones.
    """
    outside = {entry.name: entry.value for entry in entry_points(group="hones_lens.families")}
    families = FAMILIES | outside | FAMILIES
    require_choice("model family", model_type, families)
    return pkgutil.resolve_name(families[model_type])
