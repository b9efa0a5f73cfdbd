"""Steering: scale the selected neurons, by factors that are learned or set (HONES eq. H5)."""

from hones_lens.steering.comparison import METHODS, compare_steering, transfer_steering
from hones_lens.steering.config import SteeringConfig
from hones_lens.steering.effects import SideEffects, side_effects
from hones_lens.steering.learning import learn_scales
from hones_lens.steering.scales import NeuronScales
from hones_lens.steering.table import SteeringRow, SteeringTable

__all__ = [
    "METHODS",
    "NeuronScales",
    "SideEffects",
    "SteeringConfig",
    "SteeringRow",
    "SteeringTable",
    "compare_steering",
    "learn_scales",
    "side_effects",
    "transfer_steering",
]
