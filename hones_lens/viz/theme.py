"""How all figures look: colours, type, headings, and SVG that follows a page's light or dark scheme.

Figures are built without pyplot, so that none is kept alive and no display is needed. Each is drawn once,
in the light colours. `themed_svg` turns those into CSS variables, and the page then says what they are.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
import textwrap
import uuid
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from PIL import Image

from hones_lens.viz.schemes import (
    PALETTE,
    SCHEMES,
    DarkCanvas,
    check_scheme,
    dark_svg,
    palette_css,
    reader_css,
    scheme_css,
    scheme_following_svg,
)

INK, MUTED, GRID, SURFACE = (PALETTE[name][0] for name in ("ink", "muted", "grid", "surface"))
SELECTED, RANDOM, NEGATIVE = (PALETTE[name][0] for name in ("selected", "random", "negative"))
GREEN, PURPLE, ON_ACCENT = (PALETTE[name][0] for name in ("green", "purple", "on-accent"))
CRISP = "crisp"  # id of groups whose shapes touch and must show no seams
BRIGHT = "#f0e442"  # on darkened pictures
SERIES = (SELECTED, NEGATIVE, GREEN, PURPLE)

FONT = "DejaVu Sans"
KINDS = ("png", "svg", "html", "pdf")
WIDTH = 4.3  # inches of one panel: a phone's width at the size of a printed page
_DPI = 144
_TITLE, _NOTE, _BASE = 11.5, 8.8, 9.8  # points
_LINE = 1.35  # line height
# What stays the page's to say, and references to ids.
_PAGE_STYLE = re.compile(r"font-family:[^;]*;? ?|stroke-line(join|cap): (miter|square);? ?")
_REFERENCE = re.compile(r"^(?P<url>url\()?#(?P<id>[\w.-]+)")
_PAGE = """\
body { margin: 0 auto; padding: 1.25rem; max-width: 60rem; background: var(--surface); color: var(--ink); }
body, svg.plot text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, sans-serif; }
h1 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .6rem; }
p { font-size: .875rem; line-height: 1.45; color: var(--muted); margin: .6rem 0 0; }
svg.plot { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
"""
_STEPS = 101  # of the diverging scale; odd, so that one is exactly 0

STYLE: Any = {
    "font.size": _BASE,
    "font.family": FONT,
    "text.color": INK,
    "axes.titlesize": _BASE,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": _BASE,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": SURFACE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.2,
    "ytick.labelsize": 9.2,
    "legend.frameon": False,
    "legend.fontsize": 9.2,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # a `$` in a token or prompt is a `$`
    "svg.fonttype": "none",
    "svg.hashsalt": "hones_lens",
}
styled = rc_context(STYLE)  # decorates the functions that draw


@dataclass(frozen=True)
class Heading:
    """A figure's title and note, and the height they take [points]."""

    title: str
    note: str
    above: float
    below: float
    texts: tuple[Text, ...]


class Plot(Figure):
    """A matplotlib figure that shows in Jupyter and has its heading apart, for pages with their own."""

    heading: Heading | None = None

    def save(self, file: str | Path, scheme: str | None = None) -> Path:
        """Write PNG, SVG, HTML or PDF, by the file's ending; the background is opaque.

        Args:
            file: Where to; folders are made.
            scheme: `light` or `dark`. Default: SVG and HTML follow the scheme of whoever reads them, PNG and
                PDF are light.

        Raises:
            ValueError: Another ending, an unknown scheme, or a PDF in the dark.
        """
        file = Path(file)
        kind = file.suffix.lower().removeprefix(".")
        if kind not in KINDS:
            raise ValueError(f"figures are saved as {', '.join(f'.{k}' for k in KINDS)}, not {file.name!r}")
        if scheme is not None and check_scheme(scheme) and kind == "pdf":
            raise ValueError("a PDF is light: save .png, .svg or .html in the dark")
        data = self._data(kind, scheme)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def show(self, warn: bool = True) -> None:
        """Show the figure: in a notebook in the cell's output, else as a page in the browser.

        Args:
            warn: Has no effect; matplotlib's figures take it.
        """
        if "ipykernel" in sys.modules:
            from IPython.display import display

            display(self)
            return
        file = self.save(Path(tempfile.mkdtemp(prefix="hones-figure-")) / "figure.html")
        print(f"Figure: {file}")
        webbrowser.open(file.as_uri())

    def _data(self, kind: str, scheme: str | None) -> bytes:
        """The content of a file of that kind."""
        if kind == "html":
            return page_of(self, scheme).encode()
        if kind == "png" and scheme == "dark":
            return self._dark_png()
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with rc_context(STYLE):
            self.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
        if kind != "svg":
            return buffer.getvalue()
        svg = buffer.getvalue().decode().replace(f"'{FONT}'", f"'{FONT}', sans-serif")
        svg = svg.replace(f'id="{CRISP}"', f'id="{CRISP}" shape-rendering="crispEdges"')
        recoloured = {None: scheme_following_svg, "light": str, "dark": dark_svg}[scheme]
        return recoloured(svg).encode()

    def _dark_png(self) -> bytes:
        canvas, buffer = self.canvas, io.BytesIO()
        try:
            with rc_context(STYLE):
                DarkCanvas(self).print_figure(buffer, format="png", dpi=_DPI)
        finally:
            self.set_canvas(canvas)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self._data("png", "light")

    def _repr_html_(self) -> str:
        """Both renderings; the page's scheme selects one, the light one where styles are removed."""
        light, dark = (base64.b64encode(self._data("png", scheme)).decode() for scheme in SCHEMES)
        name = f"hones-figure-{uuid.uuid4().hex[:12]}"
        style = scheme_css(
            f"#{name}",
            "--seen: visible; background: none;",
            "--seen: hidden; background: var(--dark) 0 0 / 100% 100%;",
        )
        about = escape(f"{self.heading.title}. {self.heading.note}" if self.heading else "a figure")
        return (
            f'<div id="{name}" style="display: inline-block; max-width: 100%"><style>\n{style}\n'
            f"#{name} {{ --dark: url(data:image/png;base64,{dark}) }}\n"
            f"#{name} img {{ display: block; max-width: 100%; height: auto; visibility: var(--seen) }}\n"
            f'</style><img width="{96 * self.get_figwidth():.0f}" alt="{about}" '
            f'src="data:image/png;base64,{light}"></div>'
        )


def new_plot(
    title: str, note: str, height: float, *, panels: int = 1, legend: bool = False
) -> tuple[Plot, list[Axes]]:
    """An empty figure with its heading.

    Args:
        title: The heading; empty for none.
        note: Text below the panels, wrapped: what is drawn, n and the kind of interval.
        height: Height of the panels, without heading, legend and note [inches].
        panels: Number of panels side by side.
        legend: Keep a line for `add_legend`.
    """
    width = WIDTH * panels
    bold = textwrap.fill(drawable(title.replace("\n", " ")), int(width * 72 / (_TITLE * 0.68)))
    wrapped = textwrap.fill(drawable(note.replace("\n", " ")), int(width * 72 / (_NOTE * 0.56)))
    above = (bold.count("\n") + 1) * _TITLE * _LINE + 7 if title else 0.0
    below = (wrapped.count("\n") + 1) * _NOTE * _LINE + 6 if note else 0.0
    line = _BASE * _LINE + 5 if legend else 0.0
    total = height * 72 + above + below + line
    figure = Plot(figsize=(width, total / 72), facecolor=SURFACE)
    rect = (0, below / total, 1, 1 - (above + below + line) / total)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect, w_pad=0.06, h_pad=0.05, wspace=0.04))
    texts = (
        figure.text(0.012, 1 - 5 / total, bold, va="top", size=_TITLE, weight="bold"),
        figure.text(0.012, 4 / total, wrapped, va="bottom", size=_NOTE, color=MUTED, linespacing=1.25),
    )
    figure.heading = Heading(title, note, above, below, texts)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def drawable(text: str) -> str:
    """A text with characters that are unprintable, or missing from the font, written as escapes."""
    return "".join(
        c
        if (c.isprintable() or c == "\N{NO-BREAK SPACE}") and ord(c) in _glyphs()
        else c.encode("unicode_escape").decode()
        for c in text
    )


def name_rows(axes: Axes, names: Sequence[str], spine: bool = False) -> None:
    """An axis of named rows at 0, 1, …, the first on top; `spine` keeps the line at the left."""
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(spine)
    axes.grid(axis="x")


def add_legend(figure: Plot, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add one line of legend between heading and panels (`new_plot(..., legend=True)`)."""
    assert figure.heading is not None
    top = 1 - (figure.heading.above + 3) / (72 * figure.get_figheight())
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.012, top), ncols=len(labels))


def diverging() -> ListedColormap:
    """Vermillion – nothing – blue: transparent at the centre, so that 0 is the background, light or dark."""
    colours = []
    for step in range(_STEPS):
        position = 2 * step / (_STEPS - 1) - 1
        colours.append((*to_rgb(SELECTED if position > 0 else NEGATIVE), abs(position)))
    return ListedColormap(colours, name="hones_diverging")


def spotlight() -> ListedColormap:
    """Dark at 0, clear at the maximum: lights up the part of a picture that gets the attention."""
    colours = [(0.04, 0.05, 0.07, 0.64 * (1 - step / 255)) for step in range(256)]
    return ListedColormap(colours, name="hones_spotlight")


def themed_svg(
    figure: Plot, name: str, label: str, tooltips: Mapping[str, Sequence[str]] | None = None
) -> str:
    """The figure without its heading as an `<svg>` element for a page that defines the palette's variables.

    Args:
        figure: What a function of `plots` returned.
        name: Prefix of the ids in it: a page may hold several figures.
        label: Description for screen readers.
        tooltips: By group id: a text for each of the group's shapes, shown when pointed at; where several
            groups have the id, group after group.
    """
    heading = figure.heading
    above, below = (heading.above, heading.below) if heading else (0.0, 0.0)
    for text in heading.texts if heading else ():
        text.set_visible(False)
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    for text in heading.texts if heading else ():
        text.set_visible(True)
    root = ElementTree.fromstring(buffer.getvalue())
    _strip_svg(root, name)
    _add_tooltips(root, tooltips or {})
    width, height = (72 * side for side in figure.get_size_inches())
    root.attrib = {
        "class": "plot",
        "role": "img",
        "aria-label": label,
        "viewBox": f"0 {above:.1f} {width:.1f} {height - above - below:.1f}",
        "style": f"max-width: {1.5 * width:.0f}px",
    }
    return _with_css_variables(ElementTree.tostring(root, encoding="unicode"))


def page_of(figure: Plot, scheme: str | None = None) -> str:
    """An HTML page of the figure alone, in a given scheme, or following the reader's."""
    heading = figure.heading or Heading("", "", 0.0, 0.0, ())
    title = escape(heading.title)
    if scheme is None:
        colours = reader_css(":root", palette_css(0), palette_css(1))
    else:
        colours = f":root {{ {palette_css(check_scheme(scheme))} }}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="{scheme or "light dark"}">\n'
        '<meta name="generator" content="hones_lens">\n<link rel="icon" href="data:,">\n'
        f"<title>{title or 'Figure'}</title>\n<style>\n{colours}\n{_PAGE}</style>\n</head>\n<body>\n"
        f"{f'<h1>{title}</h1>' if title else ''}\n"
        f"{themed_svg(figure, 'figure', f'{heading.title}. {heading.note}')}\n"
        f"{f'<p>{escape(heading.note)}</p>' if heading.note else ''}\n</body>\n</html>\n"
    )


def _strip_svg(root: ElementTree.Element, name: str) -> None:
    """Remove namespaces, metadata, style sheets and unused ids; give the other ids a prefix."""
    for element in list(root):
        if element.tag.endswith("metadata") or element.find("{*}style") is not None:
            root.remove(element)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {match["id"] for value in values if (match := _REFERENCE.match(value))}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), None
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["data-group"] = attributes.pop("id")
        if attributes.get("data-group") in used:
            attributes["id"] = f"{name}-{attributes['data-group']}"
        if attributes.get("data-group") == CRISP:
            attributes["shape-rendering"] = "crispEdges"
        for key, value in attributes.items():
            attributes[key] = _REFERENCE.sub(rf"\g<url>#{name}-\g<id>", value)
        if "d" in attributes:
            attributes["d"] = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attributes["d"].split()))
        if "style" in attributes:
            attributes["style"] = _PAGE_STYLE.sub("", attributes["style"])
        element.attrib = attributes


def _add_tooltips(root: ElementTree.Element, tooltips: Mapping[str, Sequence[str]]) -> None:
    texts = {name: iter(lines) for name, lines in tooltips.items()}
    for group in root.iter("g"):
        for shape, text in zip(group, texts.get(group.attrib.pop("data-group", ""), ()), strict=False):
            ElementTree.SubElement(shape, "title").text = text
    for element in root.iter():
        element.attrib.pop("data-group", None)


def _with_css_variables(svg: str) -> str:
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(f": {light}", f": var(--{name})")
    return svg


def image_uri(image: Image.Image, longest: int = 480) -> str:
    """A picture as a data URI: PNG, or JPEG where that is smaller; reduced to `longest` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        small.save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    kind, data = min(encoded.items(), key=lambda item: len(item[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot_image(figure: Plot, dpi: int = 100) -> Image.Image:
    """The figure rendered as a PIL image."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer)
