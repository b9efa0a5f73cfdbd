from .attention_plots import attention_maps as attention_maps, attention_over_image as attention_over_image
from .cell_plots import cell_patterns as cell_patterns, cell_values as cell_values
from .flow_plots import flow_tooltips as flow_tooltips, head_neuron_token_flow as head_neuron_token_flow
from .image_plots import check_region as check_region, is_cut as is_cut, on_image as on_image
from .interval_plots import (
    evaluation_dots as evaluation_dots,
    held_out_bars as held_out_bars,
    lens_changes as lens_changes,
)
from .labelled_plots import labelled as labelled, significant as significant
from .lens_plots import (
    direct_bars as direct_bars,
    image_lens as image_lens,
    knockout_curves as knockout_curves,
    lens_grid as lens_grid,
)
from .masking_plots import (
    kinds_bars as kinds_bars,
    masking_bars as masking_bars,
    masking_curve as masking_curve,
    ranking_bars as ranking_bars,
)
from .overlap_plots import (
    group_masking_bars as group_masking_bars,
    overlap_layers as overlap_layers,
    overlap_shared as overlap_shared,
    overlap_sizes as overlap_sizes,
)
from .plots import head_heatmap as head_heatmap, neurons_per_layer as neurons_per_layer
from .registry import draw as draw
from .scatter_plots import (
    agreement_scatter as agreement_scatter,
    ranking_scatter as ranking_scatter,
    scale_dots as scale_dots,
)
from .schemes import (
    PAGE as PAGE,
    palette_css as palette_css,
    reader_css as reader_css,
    scheme_css as scheme_css,
)
from .steering_plots import side_effect_bars as side_effect_bars, steering_bars as steering_bars
from .text import (
    brackets as brackets,
    join_words as join_words,
    level as level,
    nonbreaking as nonbreaking,
    number as number,
    p_value as p_value,
    percent as percent,
    span as span,
)
from .theme import (
    BRIGHT as BRIGHT,
    WIDTH as WIDTH,
    Plot as Plot,
    image_uri as image_uri,
    plot_image as plot_image,
    themed_svg as themed_svg,
)
from .token_views import (
    TokenView as TokenView,
    attention_tokens as attention_tokens,
    coloured_tokens as coloured_tokens,
)
