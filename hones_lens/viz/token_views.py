"""Token-level attention and coloured tokens by circuitsvis, with each image folded into one cell.

circuitsvis (https://github.com/TransformerLensOrg/CircuitsVis) draws text alone, and slows down beyond a few
hundred tokens. So an image is one cell, and its patches lie below, to be opened. Its JavaScript is taken
from the installed package and written into the page, which needs no network.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hones_lens.folding import Cells, FoldedAttention
from hones_lens.results import round_floats
from hones_lens.viz.image_plots import region_of
from hones_lens.viz.theme import NEGATIVE, SELECTED, image_uri
from hones_lens.viz.words import number

_MOST_POINTS = 200_000  # of all heads: more take a browser seconds
_JOINER = "\N{WORD JOINER}"  # takes no room
_SIDE = 220  # of a patch grid, longest [CSS pixels]
_DIGITS = 4
_FRAME = "background: #fff; color: #1a1d21; color-scheme: light; padding: .6rem; font-family: sans-serif"
_HEAD = "<!DOCTYPE html>\n<meta charset='utf-8'><meta name='color-scheme' content='light dark'>"


@dataclass(frozen=True)
class TokenView:
    """A view that shows in Jupyter and saves as a page.

    Attributes:
        html: An element with its script; needs no other file and no network.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"TokenView({len(self.html):,} letters of HTML)"

    def save(self, file: str | Path) -> Path:
        """Write a page of its own."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{_HEAD}<link rel='icon' href='data:,'>{self.html}\n", encoding="utf-8")
        return file


def attention_tokens(
    folded: FoldedAttention,
    pictures: Image.Image | Sequence[Image.Image] = (),
    *,
    source: int = -1,
    title: str = "",
) -> TokenView:
    """Patterns of several heads, query by key, over the cells; below, each image's patches to open.

    Args:
        folded: From `folded_attention`.
        pictures: The row's, to lie under the patches; none: a bare grid.
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
        tokens=[_seen(name) for name in folded.cells.names],
        maxValue=float(folded.pattern.max()),
        minValue=-1.0,
        positiveColor=SELECTED,
    )
    grids = []
    for image, patches in enumerate(folded.patches):
        maps = list(zip(folded.names, patches[:, source], strict=True))
        about = f"attention from cell {source % n_cells}, {folded.cells.names[source]}"
        grids.append(_opened(folded.cells, image, maps, about, pictures))
    heading = title or f"{folded.model_name}: attention between tokens"
    note = "Keys of an image are summed, queries averaged; dark is the largest weight of all heads."
    return TokenView(_framed(heading, note, view, grids))


def coloured_tokens(
    cells: Cells,
    values: Float[Tensor, " pos"],
    pictures: Image.Image | Sequence[Image.Image] = (),
    *,
    fold: str = "mean",
    what: str = "value",
) -> TokenView:
    """Tokens coloured by a value each, such as a neuron's activation; below, each image's patches to open.

    Args:
        cells: From `fold_tokens`.
        values: One a position of the row.
        pictures: The row's, to lie under the patches; none: a bare grid.
        fold: How a cell's tokens become one value: `sum` (attention), `mean` or `max` (activations).
        what: What the values are.

    Raises:
        ImportError: circuitsvis is not installed.
        ValueError: An unknown fold, another number of values or pictures, or values that are not finite.
    """
    values = values.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what}: values that are not finite")
    folded = cells.fold(values, fold)
    limit = float(folded.abs().max()) or 1.0
    view = _component(
        "ColoredTokens",
        tokens=[_plain(_seen(name)) for name in cells.names],
        values=round_floats(folded.tolist(), _DIGITS),
        maxValue=limit,
        minValue=-limit,
        positiveColor=SELECTED,
        negativeColor=NEGATIVE,
    )
    images = [image for image in cells.images if image is not None]
    grids = [
        _opened(cells, image, [(what, cells.inputs.heatmap(values, 0, image))], what, pictures)
        for image in images
    ]
    note = (
        f"An image is the {fold} of its tokens. Blue above 0, orange below; the darkest is {number(limit)}."
    )
    return TokenView(_framed(what, note, view, grids))


# -- circuitsvis ---------------------------------------------------------------------------------------


def _component(name: str, **properties: Any) -> str:
    """An element that a component of circuitsvis fills, with the script that does so."""
    place = f"circuits-vis-{uuid.uuid4().hex[:12]}"
    given = json.dumps(properties).replace("<", "\\u003c")  # a token can't end the script
    call = f'CircuitsVis.render("{place}", CircuitsVis.{name}, {given})'
    return f'<div id="{place}"></div><script type="module">{_bundle()}\n{call}</script>'


@cache
def _bundle() -> str:
    """The JavaScript that circuitsvis brings along.

    Raises:
        ImportError: It is not installed, or brings none.
    """
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("token views need circuitsvis: pip install hones-lens[viz]")
    file = Path(spec.submodule_search_locations[0]) / "dist" / "cdn" / "iife.js"
    if not file.is_file():
        raise ImportError(f"this circuitsvis has no {file}: pip install 'circuitsvis>=1.43'")
    code, _, _ = file.read_text(encoding="utf-8").partition("//# sourceMappingURL=")
    return code.replace("</script", "<\\/script")


def _seen(token: str) -> str:
    """A token with line breaks and the like as escapes: circuitsvis leaves white space out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


def _plain(token: str) -> str:
    """A token that shows as it is where it is taken for HTML, and where it is not.

    Coloured tokens set their text as HTML, and show it again in tooltips as text. A joiner of no width behind
    `<` and `&` keeps both from being markup.
    """
    return token.replace("<", f"<{_JOINER}").replace("&", f"&{_JOINER}")


# -- what lies around it -------------------------------------------------------------------------------


def _framed(heading: str, note: str, view: str, grids: Sequence[str]) -> str:
    """White in light and dark, since circuitsvis draws for a white page."""
    return (
        f'<div style="{_FRAME}"><b>{escape(heading)}</b><p style="margin: .2rem 0 .6rem; font-size: .85em; '
        f'color: #59616b">{escape(note)}</p>{view}{"".join(grids)}</div>'
    )


def _opened(
    cells: Cells,
    image: int,
    maps: Sequence[tuple[str, Tensor]],
    about: str,
    pictures: Image.Image | Sequence[Image.Image],
) -> str:
    """What an image's cell opens to: a grid for each map."""
    given = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    count = sum(i is not None for i in cells.images)
    if given and len(given) != count:
        raise ValueError(f"{len(given)} pictures for a row with {count} images")
    picture = given[image] if given else None
    if picture is not None:
        left, top, right, bottom = region_of(cells.inputs, 0, image, picture)
        picture = picture.crop((round(left), round(top), round(right), round(bottom)))
    drawn = "".join(_grid(name, values, picture) for name, values in maps)
    (name,) = [n for n, which in zip(cells.names, cells.images, strict=True) if which == image]
    return (
        f'<details style="margin-top: .6rem"><summary>{escape(name)}: {escape(about)}, by patch</summary>'
        f'<div style="display: flex; flex-wrap: wrap; gap: .8rem; margin-top: .5rem">{drawn}</div></details>'
    )


def _grid(name: str, values: Tensor, picture: Image.Image | None) -> str:
    """A map as an SVG, over the picture if there is one; every patch says its value when pointed at."""
    rows, columns = values.shape
    width, height = (columns, rows) if picture is None else picture.size
    scale = _SIDE / max(width, height)
    limit = float(values.abs().max()) or 1.0
    cells = []
    for (row, column), value in np.ndenumerate(values.numpy()):
        colour = SELECTED if value >= 0 else NEGATIVE
        shade = f'fill="{colour}" fill-opacity="{0.85 * abs(value) / limit:.3f}"'
        about = f"<title>{row}, {column}: {value:.4g}</title>"
        cells.append(f'<rect x="{column}" y="{row}" width="1" height="1" {shade}>{about}</rect>')
    under = ""
    if picture is not None:
        style = f'width="{columns}" height="{rows}" preserveAspectRatio="none" opacity=".55"'
        under = f'<image href="{image_uri(picture.convert("L"), _SIDE)}" {style}/>'
    size = f'viewBox="0 0 {columns} {rows}" width="{width * scale:.0f}" height="{height * scale:.0f}"'
    told = f"in all {number(float(values.sum()))}, most {number(float(values.max()))}"
    return (
        f'<figure style="margin: 0; font-size: .85em"><figcaption>{escape(name)} '
        f'<span style="color: #59616b">{told}</span></figcaption>'
        f'<svg {size} preserveAspectRatio="none" style="outline: 1px solid #dfe3e8" role="img" '
        f'aria-label="{escape(name)}">{under}{"".join(cells)}</svg></figure>'
    )
