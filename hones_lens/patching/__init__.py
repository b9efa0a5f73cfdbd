"""Patching: activations of one run put into another, measured or estimated."""

from hones_lens.patching.activation import patch_activations
from hones_lens.patching.agreement import Agreement, atp_against_measured
from hones_lens.patching.gradient import attribute_patching
from hones_lens.patching.metrics import METRICS, Metric
from hones_lens.patching.pairs import PatchPairs, corrupted_by, counterfactual, told_apart
from hones_lens.patching.path import path_patching, path_patching_matrix
from hones_lens.patching.receivers import every_receiver

__all__ = [
    "METRICS",
    "Agreement",
    "Metric",
    "PatchPairs",
    "atp_against_measured",
    "attribute_patching",
    "corrupted_by",
    "counterfactual",
    "every_receiver",
    "patch_activations",
    "path_patching",
    "path_patching_matrix",
    "told_apart",
]
