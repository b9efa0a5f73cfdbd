"""Look at a figure as it is drawn."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from matplotlib.backends.backend_agg import FigureCanvasAgg

from hones_lens.viz import theme


def drawn(figure: theme.Plot) -> theme.Plot:
    """The figure after drawing, so that its layout is final."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def groups(axes: Any, gid: str) -> list[Any]:
    """The artists of that id."""
    return [artist for artist in axes.get_children() if artist.get_gid() == gid]


def only(axes: Any, gid: str) -> Any:
    """The one artist of that id."""
    (artist,) = groups(axes, gid)
    return artist


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def maps_of(figure: theme.Plot) -> list[Any]:
    """The axes that hold a picture and a map over it."""
    return [axes for axes in figure.axes if len(axes.images) == 2]


def check_drawing(figure: theme.Plot) -> None:
    """Nothing is clipped, and the SVG for a page leaves the palette's colours and the fonts to it."""
    box = drawn(figure).get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01
    svg = theme.themed_svg(figure, "here", "what it shows")
    for light, _ in theme.PALETTE.values():
        assert light not in svg
    assert "var(--ink)" in svg and "http" not in svg and "font-family" not in svg
    ids = [element.get("id") for element in ElementTree.fromstring(svg).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg)) <= set(ids)
