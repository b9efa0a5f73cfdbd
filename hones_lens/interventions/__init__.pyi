from .components import check_component as check_component, check_heads as check_heads
from .corruptions import (
    Corruption as Corruption,
    blank as blank,
    blur as blur,
    gaussian_noise as gaussian_noise,
    mean_image_token as mean_image_token,
    patch_shuffle as patch_shuffle,
    region as region,
    token_swap as token_swap,
)
from .folding import fold_head_scales as fold_head_scales, fold_neuron_scales as fold_neuron_scales
from .hooks import (
    HeadEdit as HeadEdit,
    Hook as Hook,
    Scale as Scale,
    add as add,
    block_attention as block_attention,
    by_layer as by_layer,
    mean_ablate as mean_ablate,
    neuron_hook as neuron_hook,
    patch as patch,
    replace_with_other_heads_mean as replace_with_other_heads_mean,
    resid_hook as resid_hook,
    scale as scale,
    scale_heads as scale_heads,
    steering_vector as steering_vector,
    zero as zero,
    zero_head as zero_head,
    zero_neurons as zero_neurons,
)
from .token_groups import (
    Box as Box,
    Group as Group,
    group_name as group_name,
    named_groups as named_groups,
    token_mask as token_mask,
)
