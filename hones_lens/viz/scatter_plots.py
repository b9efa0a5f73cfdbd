"""Figures with one dot a component: two scores against each other, and scales by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hones_lens.analysis import Agreement
from hones_lens.hones import NeuronScales, RankingComparison
from hones_lens.viz import theme
from hones_lens.viz.text import brackets, nonbreaking, number
from hones_lens.viz.theme import MUTED, NEGATIVE, RANDOM, SELECTED, Plot, styled

_MOST_NAMES = 12  # dots that get their names written beside them


def _write_names(axes: Axes, names: list[tuple[str, float, float]]) -> None:
    for name, x, y in names:
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", size=8.6)


@styled
def agreement_scatter(agreement: Agreement) -> Plot:
    """The mean measured change of each component against the estimated one; on the line both are equal."""
    estimated, measured = (side.mean(0).numpy() for side in (agreement.estimated, agreement.measured))
    n, k = agreement.measured.shape
    note = f"n = {n:,} pairs, {k:,} components. "
    if n >= 2 and k >= 3 and np.ptp(estimated) > 0 and np.ptp(measured) > 0:
        spearman = agreement.spearman()
        note += f"Spearman {number(spearman.value, 2)} {brackets(spearman.low, spearman.high, 2)} (95 %). "
    note += "Line: estimate and measurement are equal."
    figure, (axes,) = theme.new_plot(agreement.what, nonbreaking(note), 3.2)
    ends = [float(min(estimated.min(), measured.min())), float(max(estimated.max(), measured.max()))]
    axes.plot(ends, ends, color=MUTED, linewidth=0.9, gid="equal")
    axes.scatter(estimated, measured, s=16, color=SELECTED, linewidths=0, gid="components")
    if k <= _MOST_NAMES:
        names = [f"L{layer}.{index}" for layer, index in agreement.components]
        _write_names(axes, list(zip(names, estimated.tolist(), measured.tolist(), strict=True)))
    axes.set(xlabel="estimated change of the metric", ylabel="measured change")
    axes.grid()
    return figure


@styled
def ranking_scatter(comparison: RankingComparison) -> Plot:
    """Each head's score in one ranking against that in the other; those among the best of both stand out."""
    first, second = comparison.scores
    in_both = ~comparison.scores.isnan().any(0)
    shared = in_both.new_zeros(in_both.shape)
    for place in comparison.shared:
        shared[place] = True
    interval = brackets(comparison.low, comparison.high, 2)
    note = (
        f"n = {comparison.n:,} heads; Spearman {number(comparison.spearman, 2)} {interval} (95 %). "
        f"Blue: the {len(comparison.shared)} among the best {comparison.k} of both, by chance "
        f"{number(comparison.expected, 1)} (p = {comparison.p:.2g})."
    )
    title = f"{comparison.names[0]} and {comparison.names[1]}"
    figure, (axes,) = theme.new_plot(title, nonbreaking(note), 3.2)
    for mask, colour, gid in ((in_both & ~shared, RANDOM, "others"), (in_both & shared, SELECTED, "shared")):
        axes.scatter(first[mask].numpy(), second[mask].numpy(), s=16, color=colour, linewidths=0, gid=gid)
    if len(comparison.shared) <= _MOST_NAMES:
        named = [
            (f"L{layer}H{head}", float(first[layer, head]), float(second[layer, head]))
            for layer, head in comparison.shared
        ]
        _write_names(axes, named)
    axes.set(xlabel=comparison.names[0], ylabel=comparison.names[1])
    axes.grid()
    return figure


@styled
def scale_dots(scales: NeuronScales) -> Plot:
    """The factor of each neuron, 1 + a of HONES eq. H5, by its layer.

    Raises:
        ValueError: No neurons.
    """
    if not scales.neurons:
        raise ValueError("no neurons are scaled: there is nothing to draw")
    layers = np.array([layer for layer, _ in scales.neurons])
    factors = scales.factors.numpy()
    about = ", ".join(word for word in (scales.model_name, scales.task) if word)
    title = f"{about}: scales of {scales.method or 'given factors'}" if about else "Scales of neurons"
    note = f"{len(layers):,} neurons, max |a| {number(scales.max_abs)}."
    if scales.n_examples:
        note += f" Learned on n = {scales.n_examples:,} examples."
    figure, (axes,) = theme.new_plot(title, nonbreaking(f"{note} Line: unchanged."), 2.6)
    for layer in np.unique(layers):
        here = np.flatnonzero(layers == layer)
        spread = np.linspace(-0.3, 0.3, len(here)) if len(here) > 1 else np.zeros(1)
        colours = [SELECTED if factors[i] >= 1 else NEGATIVE for i in here]
        axes.scatter(layer + spread, factors[here], s=12, c=colours, linewidths=0, gid=f"layer-{layer}")
    axes.axhline(1, color=MUTED, linewidth=0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="factor")
    axes.grid(axis="y")
    return figure
