"""Figures by class of result: `draw` dispatches on the class."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from hones_lens.analysis import Agreement, FoldedAttention, HeadAttention, LensDifference, LogitLens
from hones_lens.engine import Evaluation
from hones_lens.hones import (
    GroupMasking,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    NeuronScales,
    NeuronScores,
    Overlap,
    RankingComparison,
    SideEffects,
    SteeringTable,
)
from hones_lens.results import Labelled
from hones_lens.viz.attention_plots import attention_maps
from hones_lens.viz.cell_plots import cell_patterns
from hones_lens.viz.flow_plots import head_neuron_token_flow
from hones_lens.viz.interval_plots import evaluation_dots, held_out_bars, lens_changes
from hones_lens.viz.labelled_plots import labelled
from hones_lens.viz.lens_plots import lens_grid
from hones_lens.viz.masking_plots import masking_bars
from hones_lens.viz.overlap_plots import group_masking_bars, overlap_figure
from hones_lens.viz.plots import head_heatmap, neurons_per_layer
from hones_lens.viz.scatter_plots import agreement_scatter, ranking_scatter, scale_dots
from hones_lens.viz.steering_plots import side_effect_bars, steering_bars
from hones_lens.viz.theme import Plot


@singledispatch
def draw(result: Any, *args: Any, **options: Any) -> Plot:
    """The figure of a result.

    Args:
        result: Of a class that has a figure; `draw.register(Class, function)` gives it one.
        args, options: Arguments of the function that draws the class.

    Raises:
        TypeError: The class has no figure; lists those that have.
    """
    known = ", ".join(sorted(kind.__name__ for kind in draw.registry if kind is not object))
    raise TypeError(f"there is no figure of {type(result).__name__}; there are figures of {known}")


def _neurons_per_layer(neurons: NeuronScores) -> Plot:
    return neurons_per_layer([neurons])


draw.register(Agreement, agreement_scatter)
draw.register(Evaluation, evaluation_dots)
draw.register(FoldedAttention, cell_patterns)
draw.register(GroupMasking, group_masking_bars)
draw.register(HeadAttention, attention_maps)
draw.register(HeadNeuronFlow, head_neuron_token_flow)
draw.register(HeadScores, head_heatmap)
draw.register(HeldOutHeads, held_out_bars)
draw.register(Labelled, labelled)
draw.register(LensDifference, lens_changes)
draw.register(LogitLens, lens_grid)
draw.register(MaskingResult, masking_bars)
draw.register(NeuronScales, scale_dots)
draw.register(NeuronScores, _neurons_per_layer)
draw.register(Overlap, overlap_figure)
draw.register(RankingComparison, ranking_scatter)
draw.register(SideEffects, side_effect_bars)
draw.register(SteeringTable, steering_bars)
