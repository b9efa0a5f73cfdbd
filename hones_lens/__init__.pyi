from .analysis import (
    PatchPairs as PatchPairs,
    atp_against_measured as atp_against_measured,
    attention_knockout as attention_knockout,
    attribute_patching as attribute_patching,
    corrupted_by as corrupted_by,
    counterfactual as counterfactual,
    direct_logit_attribution as direct_logit_attribution,
    image_token_lens as image_token_lens,
    lens_difference as lens_difference,
    logit_lens as logit_lens,
    mean_difference as mean_difference,
    patch_activations as patch_activations,
    path_patching as path_patching,
    path_patching_matrix as path_patching_matrix,
)
from .app import explore as explore
from .data import (
    Example as Example,
    counterfactual_pairs as counterfactual_pairs,
    load_examples as load_examples,
)
from .engine import (
    Evaluation as Evaluation,
    SweepOptions as SweepOptions,
    evaluate as evaluate,
    logits_under as logits_under,
)
from .hones import (
    HeadScores as HeadScores,
    MaskingResult as MaskingResult,
    NeuronScales as NeuronScales,
    NeuronScores as NeuronScores,
    SteeringConfig as SteeringConfig,
    SteeringTable as SteeringTable,
    attribute_neurons as attribute_neurons,
    compare_rankings as compare_rankings,
    compare_steering as compare_steering,
    evaluate_masking as evaluate_masking,
    learn_scales as learn_scales,
    localize_heads as localize_heads,
    masking_curve as masking_curve,
    remeasure_heads as remeasure_heads,
    side_effects as side_effects,
    transfer_steering as transfer_steering,
)
from .interventions import Box as Box
from .model import (
    Decoding as Decoding,
    HookedVLM as HookedVLM,
    VLMInputs as VLMInputs,
    bounded_by as bounded_by,
    checkpoint_path as checkpoint_path,
)
from .results import Labelled as Labelled, Racing as Racing
from .tasks import Task as Task, load_task as load_task
