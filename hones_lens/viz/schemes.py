"""Light and dark: the palette of both, styles that follow a page, and figures drawn in the dark colours.

Figures are drawn once, in the light colours. Where a figure becomes a picture, each colour of the palette is
replaced by its dark counterpart: in the text of an SVG, or by the renderer of a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb, to_rgba

from hones_lens.model import require_choice

# Name: on a light, and on a dark background. Data colours are Okabe and Ito's, safe for colour-blind readers.
PALETTE = {
    "ink": ("#1a1d21", "#e8eaed"),
    "muted": ("#59616b", "#a3abb6"),
    "grid": ("#dfe3e8", "#363d46"),
    "surface": ("#ffffff", "#1b1f24"),
    "selected": ("#0072b2", "#56b4e9"),
    "random": ("#7d8590", "#949daa"),
    "negative": ("#d55e00", "#f58b45"),
    "green": ("#009e73", "#2fc79a"),
    "purple": ("#b0568a", "#e39cc4"),
    "on-accent": ("#fffffe", "#10141a"),
}
PAGE = ("#f4f6f8", "#121519")  # behind cards
SCHEMES = ("light", "dark")
_TOLERANCE = 1e-4  # colours closer than that, of 1, are the same; the palette's own lie further apart
_LIGHT, _DARK = (np.array([to_rgb(pair[i]) for pair in PALETTE.values()]) for i in (0, 1))


def check_scheme(scheme: str) -> int:
    """Index of the scheme's colour in each pair of the palette.

    Raises:
        ValueError: An unknown scheme.
    """
    require_choice("scheme", scheme, SCHEMES)
    return SCHEMES.index(scheme)


def palette_css(scheme: int) -> str:
    """The palette as CSS variables: 0 light, 1 dark."""
    return " ".join(f"--{name}: {pair[scheme]};" for name, pair in PALETTE.items())


def reader_css(selector: str, light: str, dark: str) -> str:
    """CSS rules that follow the scheme of the reader's system: declarations for light and for dark."""
    return f"{selector} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {selector} {{ {dark} }} }}"


def scheme_css(selector: str, light: str, dark: str) -> str:
    """CSS rules that follow the scheme of the page, or of Jupyter, marimo, Colab and VS Code.

    Args:
        selector: CSS selector of the styled elements.
        light, dark: CSS declarations of each scheme.
    """
    hosts = {
        'body[data-jp-theme-light="true"]': light,
        'body[data-jp-theme-light="false"]': dark,
        "body.vscode-light": light,
        "body.vscode-dark": dark,
        'html[theme="dark"]': dark,
        "body.light": light,
        "body.dark": dark,
        "html.light": light,
        "html.dark": dark,
        ":host-context(.light)": light,  # from inside a shadow root
        ":host-context(.dark)": dark,
    }
    rules = [f"{host} {selector} {{ {declarations} }}" for host, declarations in hosts.items()]
    return "\n".join([reader_css(selector, light, dark), *rules])


def scheme_following_svg(svg: str) -> str:
    """SVG text whose colours follow the reader's scheme; programs without CSS show it light."""
    rules = [
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in PALETTE.values()
        for what in ("fill", "stroke")
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    head, start, rest = svg.partition("<defs>")
    return f"{head}{style}\n {start}{rest}"


def dark_svg(svg: str) -> str:
    """SVG text in the dark colours."""
    for light, dark in PALETTE.values():
        svg = svg.replace(f": {light}", f": {dark}")
    return svg


# -- PNG in the dark colours -----------------------------------------------------------------------------


def dark_colours(colours: np.ndarray) -> np.ndarray:
    """RGBA rows with the palette's light colours replaced by their dark counterparts; opacity is kept."""
    changed = np.array(colours, dtype=float, copy=True)
    if changed.size:
        distance = np.abs(changed[:, None, :3] - _LIGHT).max(-1)
        matches = distance.min(-1) < _TOLERANCE
        changed[matches, :3] = _DARK[distance[matches].argmin(-1)]
    return changed


def _dark_colour(colour: Any) -> Any:
    return tuple(dark_colours(np.array([to_rgba(colour)]))[0].tolist())


class _DarkContext(GraphicsContextBase):
    """Graphics context of lines and text in the dark colours."""

    def set_foreground(self, fg: Any, isRGBA: bool = False) -> None:
        super().set_foreground(_dark_colour(fg), isRGBA=True)


class _DarkRenderer(RendererAgg):
    """Renderer that draws everything in the dark colours."""

    def __init__(self, width: float, height: float, dpi: float):
        super().__init__(width, height, dpi)
        # The base class binds these three to its compiled renderer, as attributes.
        self._base_methods: tuple[Any, ...] = (
            self.draw_markers,
            self.draw_path_collection,
            self.draw_quad_mesh,
        )
        self.draw_markers, self.draw_path_collection = self._markers, self._path_collection
        self.draw_quad_mesh = self._quad_mesh

    def new_gc(self) -> GraphicsContextBase:
        return _DarkContext()

    def draw_path(self, gc: Any, path: Any, transform: Any, rgbFace: Any = None) -> None:
        super().draw_path(gc, path, transform, None if rgbFace is None else _dark_colour(rgbFace))

    def _markers(
        self, gc: Any, marker_path: Any, marker_trans: Any, path: Any, trans: Any, rgbFace: Any = None
    ) -> None:
        face = None if rgbFace is None else _dark_colour(rgbFace)
        self._base_methods[0](gc, marker_path, marker_trans, path, trans, face)

    def _path_collection(self, *given: Any, **named: Any) -> None:
        """Faces and edges are the seventh and eighth argument."""
        self._base_methods[1](*given[:6], *_dark_arrays(given[6:8]), *given[8:], **named)

    def _quad_mesh(self, *given: Any, **named: Any) -> None:
        """Faces are the eighth argument, edges the tenth."""
        (faces,), (edges,) = _dark_arrays(given[7:8]), _dark_arrays(given[9:10])
        self._base_methods[2](*given[:7], faces, given[8], edges, *given[10:], **named)


def _dark_arrays(arrays: Sequence[Any]) -> list[np.ndarray]:
    return [dark_colours(np.asarray(array).reshape(-1, 4)) for array in arrays]


class DarkCanvas(FigureCanvasAgg):
    """Prints a figure as PNG in the dark colours."""

    def get_renderer(self) -> RendererAgg:
        """A new dark renderer of the canvas's size."""
        like = super().get_renderer()
        return _DarkRenderer(like.width, like.height, like.dpi)
