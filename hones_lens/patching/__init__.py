"""Patching: activations of one run put into another, measured or estimated."""

from hones_lens.patching.activation import patch_activations
from hones_lens.patching.metrics import METRICS, Metric
from hones_lens.patching.pairs import PatchPairs, corrupted_by, counterfactual, told_apart

__all__ = [
    "METRICS",
    "Metric",
    "PatchPairs",
    "corrupted_by",
    "counterfactual",
    "patch_activations",
    "told_apart",
]
