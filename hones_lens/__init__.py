"""hones_lens: find, read and steer circuits in vision–language models.

Names are imported when first used, so that `hones --help` need not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_lens.attribution.heads import HeadScores, localize_heads
    from hones_lens.attribution.neurons import NeuronScores, attribute_neurons
    from hones_lens.config import checkpoint_path
    from hones_lens.data import counterfactual_pairs, load_examples
    from hones_lens.data.examples import Example
    from hones_lens.evaluation import Evaluation, evaluate
    from hones_lens.hooked_vlm import HookedVLM
    from hones_lens.inputs import VLMInputs
    from hones_lens.masking import MaskingResult, evaluate_masking, masking_curve
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
    "Evaluation": "hones_lens.evaluation",
    "Example": "hones_lens.data.examples",
    "HeadScores": "hones_lens.attribution.heads",
    "HookedVLM": "hones_lens.hooked_vlm",
    "MaskingResult": "hones_lens.masking",
    "NeuronScales": "hones_lens.steering",
    "NeuronScores": "hones_lens.attribution.neurons",
    "Racing": "hones_lens.racing",
    "SteeringConfig": "hones_lens.steering",
    "SteeringTable": "hones_lens.steering",
    "Task": "hones_lens.tasks",
    "VLMInputs": "hones_lens.inputs",
    "attribute_neurons": "hones_lens.attribution.neurons",
    "checkpoint_path": "hones_lens.config",
    "compare_steering": "hones_lens.steering",
    "counterfactual_pairs": "hones_lens.data",
    "evaluate": "hones_lens.evaluation",
    "evaluate_masking": "hones_lens.masking",
    "learn_scales": "hones_lens.steering",
    "load_examples": "hones_lens.data",
    "load_task": "hones_lens.tasks",
    "localize_heads": "hones_lens.attribution.heads",
    "logits_under": "hones_lens.sweep",
    "masking_curve": "hones_lens.masking",
    "side_effects": "hones_lens.steering",
    "transfer_steering": "hones_lens.steering",
}

__all__ = [
    "Evaluation",
    "Example",
    "HeadScores",
    "HookedVLM",
    "MaskingResult",
    "NeuronScales",
    "NeuronScores",
    "Racing",
    "SteeringConfig",
    "SteeringTable",
    "Task",
    "VLMInputs",
    "attribute_neurons",
    "checkpoint_path",
    "compare_steering",
    "counterfactual_pairs",
    "evaluate",
    "evaluate_masking",
    "learn_scales",
    "load_examples",
    "load_task",
    "localize_heads",
    "logits_under",
    "masking_curve",
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
