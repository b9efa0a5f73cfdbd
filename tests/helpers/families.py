"""Tiny random models of every family, hooked and as Hugging Face's own, with a batch of mixed rows.

`SHAPES` has one configuration or more of each family for what is tested of all of them; a family's further
ones are in `tests/model/test_parity.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from helpers import random_anyres, random_gemma, random_llava, random_qwen, random_smolvlm
from hones_lens import HookedVLM, VLMInputs
from hones_lens.model.weights import WeightMap

SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 2}
GEMMA_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# By name: the module of `helpers` that makes it, and the options of its `make_config`.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llava": (random_llava, {"text": {"num_key_value_heads": 2}, "vision": {"num_hidden_layers": 2}}),
    "llava of mistral and siglip": (
        random_llava,
        {
            "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 13},
            "vision": SIGLIP,
        },
    ),
    "llava of qwen2 and siglip": (
        random_llava,
        {
            "text": {"model_type": "qwen2", "num_key_value_heads": 2},
            "vision": SIGLIP,
            "vision_feature_select_strategy": "full",
        },
    ),
    "llava with biases": (
        random_llava,
        {"text": {"attention_bias": True, "mlp_bias": True}, "vision": {"num_hidden_layers": 2}},
    ),
    "vipllava": (random_llava, {"vip": True, "vision_feature_layer": [-1, 1, 2]}),
    "llava_next": (random_anyres, {"vision": {"num_hidden_layers": 2}}),
    "llava_next of mistral and siglip": (
        random_anyres,
        {
            "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 41},
            "vision": SIGLIP,
        },
    ),
    "llava_onevision": (random_anyres, {"kind": "llava_onevision", "vision": {"num_hidden_layers": 2}}),
    "smolvlm": (random_smolvlm, {"tiles": 1}),
    "idefics3 with tiles": (random_smolvlm, {"kind": "idefics3"}),
    "gemma3": (random_gemma, {"text": GEMMA_LAYERS, "vision": {"num_hidden_layers": 1}}),
    "qwen2_vl": (random_qwen, {"kind": "qwen2_vl", "vision": {"depth": 2}}),
    "qwen2_5_vl": (random_qwen, {"vision": {"depth": 2, "window_size": 28}}),
    "qwen3_vl": (random_qwen, {"kind": "qwen3_vl", "vision": {"depth": 2}}),
}


# Tests of these run always, though they are slow; those of the others are exhaustive.
_ALWAYS = ("llava_next", "gemma3", "qwen3_vl")
SHAPE_PARAMS = [
    pytest.param(name, marks=pytest.mark.slow if name in _ALWAYS else pytest.mark.exhaustive)
    for name in SHAPES
]


@dataclass
class FamilyPair:
    """A random Hugging Face model, the same one hooked, and inputs of several pictures and of text alone."""

    hf: Any
    model: HookedVLM
    inputs: VLMInputs

    def difference(self, a: Tensor, b: Tensor) -> float:
        """Largest absolute difference at tokens."""
        return random_llava.largest_difference(a, b, self.inputs)

    def hf_logits(self, inputs: VLMInputs) -> Tensor:
        """Logits of Hugging Face's model."""
        forget_positions(self.hf)
        return self.hf(**inputs.to_hf()).logits

    @property
    def hf_modules(self) -> dict[str, str]:
        """Our modules with a weight, and the names of Hugging Face's; fused ones are left out."""
        source = self.model.hf_source
        assert source is not None
        weights: WeightMap = source.weight_map
        return {
            ours.rpartition(".")[0]: theirs.removesuffix(".weight")
            for theirs, ours in weights.items()
            if isinstance(ours, str) and ours.endswith((".weight", ".offset")) and theirs.endswith(".weight")
        }


def forget_positions(hf: Any) -> None:
    """Hugging Face's Qwens keep the positions of their last call."""
    if hasattr(hf.model, "rope_deltas"):
        hf.model.rope_deltas = None


@cache
def family_pair(name: str) -> FamilyPair:
    """The one of a shape that tests share and do not change."""
    made, options = SHAPES[name]
    hf, model = made.make_pair(made.make_config(**options), 11)
    return FamilyPair(hf, model, made.mixed_batch(model))
