"""Token-level attention and coloured tokens by circuitsvis, with each image folded into one cell.

circuitsvis (https://github.com/TransformerLensOrg/CircuitsVis) draws text alone, and slows down beyond a few
hundred tokens. So an image is one cell, and its patches lie below, to be opened. Its JavaScript is taken
from the installed package and written into the page, which needs no network.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hones_lens.analysis import Cells, FoldedAttention
from hones_lens.model import Pictures, open_images, takes_iterables
from hones_lens.results import round_floats
from hones_lens.viz.cell_plots import cell_patterns, cell_values, check_finite
from hones_lens.viz.image_plots import region_of
from hones_lens.viz.schemes import palette_css, scheme_css
from hones_lens.viz.text import number
from hones_lens.viz.theme import NEGATIVE, SELECTED, Plot, image_uri

_MOST_POINTS = 200_000  # of all heads: more take a browser seconds
_JOINER = "\N{WORD JOINER}"  # takes no room
_SIDE = 220  # of a patch grid, longest [CSS pixels]
_DIGITS = 4
_PICTURES = (".png", ".svg", ".pdf")
# circuitsvis draws for a white page, on canvases as well: on a dark one, light and dark are swapped there.
_INVERT_FILTER = "invert(.89) hue-rotate(180deg)"
_STYLE = """
.hones-tokens { background: var(--surface); color: var(--ink); padding: .6rem; font-family: sans-serif; }
.hones-tokens p { margin: .2rem 0 .6rem; font-size: .85em; }
.hones-tokens p, .hones-tokens .told { color: var(--muted); }
.hones-tokens > .drawn { background: #fff; color: #1a1d21; color-scheme: light; filter: var(--turned); }
.hones-tokens details { margin-top: .6rem; }
.hones-tokens details > div { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: .5rem; }
.hones-tokens figure { margin: 0; font-size: .85em; }
.hones-tokens figure svg { outline: 1px solid var(--grid); }
.hones-tokens .above { fill: var(--selected); }
.hones-tokens .below { fill: var(--negative); }
"""
_HEAD = "<!DOCTYPE html>\n<meta charset='utf-8'><meta name='color-scheme' content='light dark'>"


@dataclass(frozen=True)
class TokenView:
    """A view that shows in Jupyter and saves as a page, or as a picture without its script.

    Attributes:
        html: An element with its script; needs no other file and no network. It follows the scheme of the
            page, light or dark.
        draw: Draws the cells as a figure.
    """

    html: str
    draw: Callable[[], Plot] = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"TokenView({len(self.html):,} letters of HTML)"

    def save(self, file: str | Path, scheme: str | None = None) -> Path:
        """Write a page (.html), or a picture of the cells (.png, .svg, .pdf), by the file's ending.

        Args:
            file: Where to; folders are made.
            scheme: Of a picture, as for `Plot.save`; pages follow their reader's.

        Raises:
            ValueError: Another ending, or a scheme for a page.
        """
        file = Path(file)
        ending = file.suffix.lower()
        if ending in _PICTURES:
            return self.draw().save(file, scheme)
        if ending != ".html":
            valid = ", ".join((".html", *_PICTURES))
            raise ValueError(f"token views are saved as {valid}, not {file.name!r}")
        if scheme is not None:
            raise ValueError("a page of tokens follows its reader's scheme; pictures alone have their own")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{_HEAD}<link rel='icon' href='data:,'>{self.html}\n", encoding="utf-8")
        return file


@takes_iterables
def attention_tokens(
    folded: FoldedAttention,
    pictures: Pictures = None,
    *,
    source: int = -1,
    title: str = "",
) -> TokenView:
    """Attention patterns of several heads over the cells; below, each image's patches in a fold-out.

    Args:
        folded: From `folded_attention`.
        pictures: The row's pictures, drawn under the patches; without them only the grid is drawn.
        source: The cell whose attention to the patches is shown; default: the last.
        title: Default: the model and its heads.

    Raises:
        ImportError: circuitsvis is not installed.
        IndexError: No such cell.
        ValueError: Too many heads and cells to draw, or another number of pictures than of images.
    """
    n_heads, n_cells, _ = folded.pattern.shape
    if n_heads * n_cells**2 > _MOST_POINTS:
        most = _MOST_POINTS // n_cells**2
        raise ValueError(
            f"{n_heads} heads over {n_cells} cells are too much to draw: take at most {most} heads, or fold "
            "more of the text (keep=…)"
        )
    if not -n_cells <= source < n_cells:
        raise IndexError(f"there are {n_cells} cells; there is no cell {source}")
    view = _component(
        "AttentionHeads",
        attention=round_floats(folded.pattern.tolist(), _DIGITS),
        attentionHeadNames=list(folded.names),
        tokens=[_escape_unprintable(name) for name in folded.cells.names],
        maxValue=float(folded.pattern.max()),
        minValue=-1.0,
        positiveColor=SELECTED,
    )
    grids = []
    for image, patches in enumerate(folded.patches):
        maps = list(zip(folded.names, patches[:, source], strict=True))
        description = f"attention from cell {source % n_cells}, {folded.cells.names[source]}"
        grids.append(_image_details(folded.cells, image, maps, description, pictures))
    heading = title or f"{folded.model_name}: attention between tokens"
    note = "Keys of an image are summed, queries averaged; the fullest colour is the largest weight."
    return TokenView(_view_html(heading, note, view, grids), partial(cell_patterns, folded, heading))


@takes_iterables
def coloured_tokens(
    cells: Cells,
    values: Float[Tensor, " pos"],
    pictures: Pictures = None,
    *,
    fold: str = "mean",
    what: str = "value",
) -> TokenView:
    """Tokens coloured by value, such as a neuron's activation; below, each image's patches in a fold-out.

    Args:
        cells: From `fold_tokens`.
        values: One value per position of the row.
        pictures: The row's pictures, drawn under the patches; without them only the grid is drawn.
        fold: Reduction over a cell's tokens: `sum` (attention), `mean` or `max` (activations).
        what: Name of the values.

    Raises:
        ImportError: circuitsvis is not installed.
        ValueError: An unknown fold, another number of values or pictures, or values that are not finite.
    """
    values = check_finite(values, what)
    folded = cells.fold(values, fold)
    limit = float(folded.abs().max()) or 1.0
    view = _component(
        "ColoredTokens",
        tokens=[_without_markup(_escape_unprintable(name)) for name in cells.names],
        values=round_floats(folded.tolist(), _DIGITS),
        maxValue=limit,
        minValue=-limit,
        positiveColor=SELECTED,
        negativeColor=NEGATIVE,
    )
    images = [image for image in cells.images if image is not None]
    grids = [
        _image_details(cells, image, [(what, cells.inputs.heatmap(values, 0, image))], what, pictures)
        for image in images
    ]
    note = (
        f"An image is the {fold} of its tokens. Blue above 0, orange below; the fullest is {number(limit)}."
    )
    draw = partial(cell_values, cells, values, fold=fold, what=what)
    return TokenView(_view_html(what, note, view, grids), draw)


# -- circuitsvis ---------------------------------------------------------------------------------------


def _component(name: str, **properties: Any) -> str:
    """HTML of an element, and the script by which a circuitsvis component fills it."""
    element_id = f"circuits-vis-{uuid.uuid4().hex[:12]}"
    arguments = json.dumps(properties).replace("<", "\\u003c")  # a token can't end the script
    call = f'CircuitsVis.render("{element_id}", CircuitsVis.{name}, {arguments})'
    return f'<div id="{element_id}"></div><script type="module">{_bundle()}\n{call}</script>'


@cache
def _bundle() -> str:
    """The JavaScript bundle of the installed circuitsvis.

    Raises:
        ImportError: It is not installed, or brings none.
    """
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "token views need circuitsvis: pip install hones-lens[viz]; without it, `cell_patterns` and "
            "`cell_values` draw the same as pictures"
        )
    file = Path(spec.submodule_search_locations[0]) / "dist" / "cdn" / "iife.js"
    if not file.is_file():
        raise ImportError(f"this circuitsvis has no {file}: pip install 'circuitsvis>=1.43'")
    code, _, _ = file.read_text(encoding="utf-8").partition("//# sourceMappingURL=")
    return code.replace("</script", "<\\/script")


def _escape_unprintable(token: str) -> str:
    """A token with line breaks and the like as escapes: circuitsvis leaves white space out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


def _without_markup(token: str) -> str:
    """A token that shows as it is where it is taken for HTML, and where it is not.

    Coloured tokens set their text as HTML, and show it again in tooltips as text. A joiner of no width behind
    `<` and `&` keeps both from being markup.
    """
    return token.replace("<", f"<{_JOINER}").replace("&", f"&{_JOINER}")


# -- the HTML around it -------------------------------------------------------------------------------


def _view_html(heading: str, note: str, view: str, grids: Sequence[str]) -> str:
    """HTML of the whole view, with colours that follow the page's scheme."""
    light, dark = f"{palette_css(0)} --turned: none;", f"{palette_css(1)} --turned: {_INVERT_FILTER};"
    return (
        f'<div class="hones-tokens"><style>{scheme_css(".hones-tokens", light, dark)}{_STYLE}</style>'
        f'<b>{escape(heading)}</b><p>{escape(note)}</p><div class="drawn">{view}</div>{"".join(grids)}</div>'
    )


def _image_details(
    cells: Cells,
    image: int,
    maps: Sequence[tuple[str, Tensor]],
    description: str,
    pictures: Pictures,
) -> str:
    """Fold-out of an image's cell: a patch grid for each map."""
    picture_list = open_images(pictures)
    count = cells.inputs.n_pictures(0)
    if picture_list and len(picture_list) != count:
        raise ValueError(f"{len(picture_list)} pictures for a row with {count} images")
    picture = picture_list[cells.inputs.picture_of(0, image)] if picture_list else None
    if picture is not None:
        left, top, right, bottom = region_of(cells.inputs, 0, image, picture)
        picture = picture.crop((round(left), round(top), round(right), round(bottom)))
    drawn = "".join(_patch_grid_svg(name, values, picture) for name, values in maps)
    (name,) = [n for n, which in zip(cells.names, cells.images, strict=True) if which == image]
    summary = f"{escape(name)}: {escape(description)}, by patch"
    return f"<details><summary>{summary}</summary><div>{drawn}</div></details>"


def _patch_grid_svg(name: str, values: Tensor, picture: Image.Image | None) -> str:
    """A map as an SVG, over the picture if there is one; every patch has its value as tooltip."""
    rows, columns = values.shape
    width, height = (columns, rows) if picture is None else picture.size
    scale = _SIDE / max(width, height)
    limit = float(values.abs().max()) or 1.0
    cells = []
    for (row, column), value in np.ndenumerate(values.numpy()):
        side = "above" if value >= 0 else "below"
        shade = f'class="{side}" fill-opacity="{0.85 * abs(value) / limit:.3f}"'
        tooltip = f"<title>{row}, {column}: {value:.4g}</title>"
        cells.append(f'<rect x="{column}" y="{row}" width="1" height="1" {shade}>{tooltip}</rect>')
    under = ""
    if picture is not None:
        style = f'width="{columns}" height="{rows}" preserveAspectRatio="none" opacity=".55"'
        under = f'<image href="{image_uri(picture.convert("L"), _SIDE)}" {style}/>'
    size = f'viewBox="0 0 {columns} {rows}" width="{width * scale:.0f}" height="{height * scale:.0f}"'
    summary = f"in all {number(float(values.sum()))}, most {number(float(values.max()))}"
    return (
        f'<figure><figcaption>{escape(name)} <span class="told">{summary}</span></figcaption>'
        f'<svg {size} preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(name)}">{under}{"".join(cells)}</svg></figure>'
    )
