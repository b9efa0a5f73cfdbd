from .attribution.ablation import exact_ablation as exact_ablation, exact_head_ablation as exact_head_ablation
from .attribution.attribute import attribute_neurons as attribute_neurons
from .attribution.compare import RankingComparison as RankingComparison, compare_rankings as compare_rankings
from .attribution.flow import HeadNeuronFlow as HeadNeuronFlow, head_neuron_flow as head_neuron_flow
from .attribution.head_scores import (
    HeadScores as HeadScores,
    all_heads as all_heads,
    significant_heads as significant_heads,
)
from .attribution.heads import default_top_k as default_top_k, localize_heads as localize_heads
from .attribution.held_out import (
    HeldOutHead as HeldOutHead,
    HeldOutHeads as HeldOutHeads,
    random_head_sets as random_head_sets,
    remeasure_heads as remeasure_heads,
)
from .attribution.neuron_scores import NeuronScores as NeuronScores
from .masking import (
    RATIOS as RATIOS,
    evaluate_masking as evaluate_masking,
    masking_curve as masking_curve,
    matched_random_sets as matched_random_sets,
)
from .masking_result import (
    MEASURES as MEASURES,
    MaskingMeasure as MaskingMeasure,
    MaskingResult as MaskingResult,
    load_masking as load_masking,
    masking_measure as masking_measure,
    measures_legend as measures_legend,
    save_masking as save_masking,
)
from .overlap.group_masking import GroupMasking as GroupMasking, mask_groups as mask_groups
from .overlap.groups import Overlap as Overlap, chance_sizes as chance_sizes, find_overlap as find_overlap
from .overlap.lens_delta import lens_delta as lens_delta
from .release_files import (
    load_heads as load_heads,
    load_neurons as load_neurons,
    save_heads as save_heads,
    save_neurons as save_neurons,
)
from .steering.comparison import (
    METHODS as METHODS,
    compare_steering as compare_steering,
    transfer_steering as transfer_steering,
)
from .steering.config import SteeringConfig as SteeringConfig
from .steering.learning import learn_scales as learn_scales
from .steering.scales import NeuronScales as NeuronScales
from .steering.side_effects import (
    SideEffect as SideEffect,
    SideEffects as SideEffects,
    side_effects as side_effects,
)
from .steering.table import SteeringRow as SteeringRow, SteeringTable as SteeringTable
