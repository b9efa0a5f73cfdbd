"""Views: functions that take results and return figures that show in Jupyter and save.

Names are imported when first used, so that nothing waits for matplotlib, PyTorch or circuitsvis in vain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_lens.viz.attention_plots import attention_maps, attention_over_image
    from hones_lens.viz.cell_plots import cell_patterns, cell_values
    from hones_lens.viz.flow_plots import flow_tooltips, head_neuron_token_flow
    from hones_lens.viz.image_plots import on_image
    from hones_lens.viz.labelled_plots import labelled
    from hones_lens.viz.lens_plots import direct_bars, image_lens, knockout_curves, lens_grid
    from hones_lens.viz.masking_plots import kinds_bars, masking_bars, masking_curve, ranking_bars
    from hones_lens.viz.overlap_plots import (
        group_masking_bars,
        overlap_layers,
        overlap_shared,
        overlap_sizes,
    )
    from hones_lens.viz.plots import head_heatmap, neurons_per_layer
    from hones_lens.viz.steering_plots import side_effect_bars, steering_bars
    from hones_lens.viz.theme import Plot, themed_svg
    from hones_lens.viz.token_views import TokenView, attention_tokens, coloured_tokens

_HOMES = {
    "attention_plots": ("attention_maps", "attention_over_image"),
    "cell_plots": ("cell_patterns", "cell_values"),
    "flow_plots": ("flow_tooltips", "head_neuron_token_flow"),
    "image_plots": ("on_image",),
    "labelled_plots": ("labelled",),
    "lens_plots": ("direct_bars", "image_lens", "knockout_curves", "lens_grid"),
    "masking_plots": ("kinds_bars", "masking_bars", "masking_curve", "ranking_bars"),
    "overlap_plots": ("group_masking_bars", "overlap_layers", "overlap_shared", "overlap_sizes"),
    "plots": ("head_heatmap", "neurons_per_layer"),
    "steering_plots": ("side_effect_bars", "steering_bars"),
    "theme": ("Plot", "themed_svg"),
    "token_views": ("TokenView", "attention_tokens", "coloured_tokens"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Plot",
    "TokenView",
    "attention_maps",
    "attention_over_image",
    "attention_tokens",
    "cell_patterns",
    "cell_values",
    "coloured_tokens",
    "direct_bars",
    "flow_tooltips",
    "group_masking_bars",
    "head_heatmap",
    "head_neuron_token_flow",
    "image_lens",
    "kinds_bars",
    "knockout_curves",
    "labelled",
    "lens_grid",
    "masking_bars",
    "masking_curve",
    "neurons_per_layer",
    "on_image",
    "overlap_layers",
    "overlap_shared",
    "overlap_sizes",
    "ranking_bars",
    "side_effect_bars",
    "steering_bars",
    "themed_svg",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hones_lens.viz' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hones_lens.viz.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
