"""Figures of `Labelled` results."""

from __future__ import annotations

from hones_lens.labelled import Labelled
from hones_lens.viz.theme import Plot, styled


@styled
def labelled(result: Labelled) -> Plot:
    """One axis: a curve with its interval; two: a heat map; three: a heat map for each first entry."""
    raise NotImplementedError
