from .attention import (
    SINK_RATIO as SINK_RATIO,
    HeadAttention as HeadAttention,
    head_attention as head_attention,
)
from .gradients import activation_gradients as activation_gradients
from .knockout import attention_knockout as attention_knockout
from .lens.difference import (
    LensDifference as LensDifference,
    LensToken as LensToken,
    delta_tables as delta_tables,
    lens_difference as lens_difference,
)
from .lens.image import image_token_lens as image_token_lens
from .lens.streams import residual_streams as residual_streams, summed_logits as summed_logits
from .lens.table import LogitLens as LogitLens, logit_lens as logit_lens
from .logit_attribution import direct_logit_attribution as direct_logit_attribution
from .patching.activation import patch_activations as patch_activations
from .patching.agreement import Agreement as Agreement, atp_against_measured as atp_against_measured
from .patching.gradient import attribute_patching as attribute_patching
from .patching.metrics import kl as kl, log_prob as log_prob, logit_diff as logit_diff
from .patching.noise import patching_noise as patching_noise
from .patching.pair_answers import PairAnswers as PairAnswers, pair_answers as pair_answers
from .patching.pairs import (
    PatchPairs as PatchPairs,
    corrupted_by as corrupted_by,
    counterfactual as counterfactual,
    logits_at_end as logits_at_end,
)
from .patching.path import path_patching as path_patching, path_patching_matrix as path_patching_matrix
from .patching.receivers import every_receiver as every_receiver
from .patching.runner import measure_patches as measure_patches
from .patching.sites import (
    SITES as SITES,
    Targets as Targets,
    as_patch_site as as_patch_site,
    heads_as_units as heads_as_units,
    positions_of as positions_of,
    targets_of as targets_of,
)
from .steering_vectors import mean_difference as mean_difference
from .token_cells import (
    Cells as Cells,
    FoldedAttention as FoldedAttention,
    fold_tokens as fold_tokens,
    folded_attention as folded_attention,
)
from .vocabulary import promoted_tokens as promoted_tokens, vocabulary_logits as vocabulary_logits
