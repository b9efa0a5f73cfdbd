"""hones_lens: find, read and steer circuits in vision–language models.

Names are imported when first used, so that `hones --help` need not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_lens.attribution.compare import compare_rankings
    from hones_lens.attribution.head_scores import HeadScores
    from hones_lens.attribution.heads import localize_heads
    from hones_lens.attribution.held_out import remeasure_heads
    from hones_lens.attribution.neurons import NeuronScores, attribute_neurons
    from hones_lens.config import checkpoint_path
    from hones_lens.contrast import mean_difference
    from hones_lens.data import counterfactual_pairs, load_examples
    from hones_lens.data.examples import Example
    from hones_lens.direct import direct_logit_attribution
    from hones_lens.evaluation import Evaluation, evaluate
    from hones_lens.explorer import explore
    from hones_lens.groups import Box
    from hones_lens.hooked_vlm import HookedVLM
    from hones_lens.inputs import VLMInputs
    from hones_lens.knockout import attention_knockout
    from hones_lens.labelled import Labelled
    from hones_lens.lens import image_token_lens, lens_difference, logit_lens
    from hones_lens.masking import MaskingResult, evaluate_masking, masking_curve
    from hones_lens.patching import (
        PatchPairs,
        atp_against_measured,
        attribute_patching,
        corrupted_by,
        counterfactual,
        patch_activations,
        path_patching,
        path_patching_matrix,
    )
    from hones_lens.racing import Racing
    from hones_lens.steering import (
        NeuronScales,
        SteeringConfig,
        SteeringTable,
        compare_steering,
        learn_scales,
        side_effects,
        transfer_steering,
    )
    from hones_lens.sweep import logits_under
    from hones_lens.tasks import Task, load_task

_HOMES = {
    "Box": "hones_lens.groups",
    "Evaluation": "hones_lens.evaluation",
    "Example": "hones_lens.data.examples",
    "HeadScores": "hones_lens.attribution.head_scores",
    "HookedVLM": "hones_lens.hooked_vlm",
    "Labelled": "hones_lens.labelled",
    "MaskingResult": "hones_lens.masking",
    "NeuronScales": "hones_lens.steering",
    "NeuronScores": "hones_lens.attribution.neurons",
    "PatchPairs": "hones_lens.patching",
    "Racing": "hones_lens.racing",
    "SteeringConfig": "hones_lens.steering",
    "SteeringTable": "hones_lens.steering",
    "Task": "hones_lens.tasks",
    "VLMInputs": "hones_lens.inputs",
    "atp_against_measured": "hones_lens.patching",
    "attention_knockout": "hones_lens.knockout",
    "attribute_neurons": "hones_lens.attribution.neurons",
    "attribute_patching": "hones_lens.patching",
    "checkpoint_path": "hones_lens.config",
    "compare_rankings": "hones_lens.attribution.compare",
    "compare_steering": "hones_lens.steering",
    "corrupted_by": "hones_lens.patching",
    "counterfactual": "hones_lens.patching",
    "counterfactual_pairs": "hones_lens.data",
    "direct_logit_attribution": "hones_lens.direct",
    "evaluate": "hones_lens.evaluation",
    "evaluate_masking": "hones_lens.masking",
    "explore": "hones_lens.explorer",
    "image_token_lens": "hones_lens.lens",
    "learn_scales": "hones_lens.steering",
    "lens_difference": "hones_lens.lens",
    "load_examples": "hones_lens.data",
    "load_task": "hones_lens.tasks",
    "localize_heads": "hones_lens.attribution.heads",
    "logit_lens": "hones_lens.lens",
    "logits_under": "hones_lens.sweep",
    "masking_curve": "hones_lens.masking",
    "mean_difference": "hones_lens.contrast",
    "patch_activations": "hones_lens.patching",
    "path_patching": "hones_lens.patching",
    "path_patching_matrix": "hones_lens.patching",
    "remeasure_heads": "hones_lens.attribution.held_out",
    "side_effects": "hones_lens.steering",
    "transfer_steering": "hones_lens.steering",
}

__all__ = [
    "Box",
    "Evaluation",
    "Example",
    "HeadScores",
    "HookedVLM",
    "Labelled",
    "MaskingResult",
    "NeuronScales",
    "NeuronScores",
    "PatchPairs",
    "Racing",
    "SteeringConfig",
    "SteeringTable",
    "Task",
    "VLMInputs",
    "atp_against_measured",
    "attention_knockout",
    "attribute_neurons",
    "attribute_patching",
    "checkpoint_path",
    "compare_rankings",
    "compare_steering",
    "corrupted_by",
    "counterfactual",
    "counterfactual_pairs",
    "direct_logit_attribution",
    "evaluate",
    "evaluate_masking",
    "explore",
    "image_token_lens",
    "learn_scales",
    "lens_difference",
    "load_examples",
    "load_task",
    "localize_heads",
    "logit_lens",
    "logits_under",
    "masking_curve",
    "mean_difference",
    "patch_activations",
    "path_patching",
    "path_patching_matrix",
    "remeasure_heads",
    "side_effects",
    "transfer_steering",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hones_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
