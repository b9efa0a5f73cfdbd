"""Every view shows in Jupyter, saves to PNG, SVG and HTML, and keeps its colours apart in light and dark."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import hostile_figures
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from hones_lens import viz
from hones_lens.viz import theme
from hones_lens.viz.schemes import PALETTE, dark_colours

# Pictures keep their own colours on any page.
PICTURES = {"attention_maps", "attention_over_image", "image_lens", "on_image"}
NOT_FIGURES = {
    *("Plot", "TokenView", "attention_tokens", "coloured_tokens", "draw", "flow_tooltips", "themed_svg"),
    # What the report draws and writes with.
    *("BRIGHT", "PAGE", "WIDTH", "image_uri", "plot_image", "check_region", "is_cut", "significant"),
    *("palette_css", "reader_css", "scheme_css", "brackets", "p_value"),
    *("join_words", "level", "nonbreaking", "number", "percent", "span"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(theme, "_DPI", 60)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def colours(data: bytes) -> set[str]:
    """Those that fill at least four pixels."""
    found, counts = np.unique(pixels(data).reshape(-1, 3), axis=0, return_counts=True)
    return {"#{:02x}{:02x}{:02x}".format(*c) for c, n in zip(found, counts, strict=True) if n >= 4}


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_and_marks_of_the_palette_stand_out(scheme: int) -> None:
    of = {name: pair[scheme] for name, pair in PALETTE.items()}
    for name in ("ink", "muted"):
        assert contrast(of[name], of["surface"]) >= 4.5, name
    for name in ("selected", "negative", "green", "purple", "random"):
        assert contrast(of[name], of["surface"]) >= 3, name
    for name in ("selected", "negative"):
        assert contrast(of["on-accent"], of[name]) >= 3.5, name


def test_the_list_of_views_is_complete() -> None:
    assert set(hostile_figures.VIEWS) == set(viz.__all__) - NOT_FIGURES


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", hostile_figures.VIEWS)
def test_a_view_shows_and_saves_in_light_and_dark(name: str, tmp_path: Path) -> None:
    figure = hostile_figures.settled(name)
    in_jupyter = figure._repr_html_()
    dark, light = (
        base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^)\"]+)", in_jupyter)
    )
    assert pixels(light).shape == pixels(dark).shape and min(pixels(light).shape[:2]) > 50
    for data, at in ((light, 0), (dark, 1)):
        corner = pixels(data)[1, -2]
        assert "#{:02x}{:02x}{:02x}".format(*corner) == PALETTE["surface"][at]
        if name not in PICTURES:
            others = {pair[1 - at] for key, pair in PALETTE.items() if key not in ("ink", "on-accent")}
            assert not colours(data) & others
    text = figure.save(tmp_path / "new" / "view.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    page = figure.save(tmp_path / "view.html").read_text(encoding="utf-8")
    for saved in (text, page):
        assert "prefers-color-scheme: dark" in saved
        assert not re.findall(r"(?:href|src)=[\"'](?!data:|#)|url\([\"']?http", saved)
    assert not [light for light, _ in PALETTE.values() if f": {light}" in page.partition("</style>")[2]]
    assert "Dark" not in type(figure.canvas).__name__


@theme.styled
def test_every_kind_of_mark_turns_dark_and_pictures_do_not() -> None:
    figure, (axes,) = theme.new_plot("title", "note", 2.0)
    axes.plot([0, 1], [0, 0.2], color=theme.SELECTED, linewidth=8, solid_capstyle="butt")
    axes.plot([0.5], [0.5], "o", color=theme.NEGATIVE, markersize=20)
    axes.scatter([0.2, 0.8], [0.7, 0.7], s=[200, 400], color=theme.GREEN, linewidths=0)
    axes.add_collection(LineCollection([[(0, 0.9), (1, 0.9)]], colors=theme.PURPLE, linewidths=8))
    axes.bar([0.1], [0.3], 0.1, color=theme.RANDOM)
    mesh = {"cmap": theme.diverging(), "vmin": -1, "vmax": 1}
    axes.pcolormesh([0.6, 0.7, 0.8], [0.3, 0.4], [[1.0, -1.0]], **mesh)
    axes.imshow(np.full((2, 2, 3), to_rgb(theme.SELECTED)), extent=(0.2, 0.3, 0.3, 0.4))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    light, dark = colours(figure._data("png", "light")), colours(figure._data("png", "dark"))
    for name in ("selected", "negative", "green", "purple", "random", "surface", "ink"):
        assert PALETTE[name][0] in light and PALETTE[name][1] in dark, name
        assert PALETTE[name][1] not in light
    left = {pair[0] for key, pair in PALETTE.items() if key != "surface"} & dark
    assert left == {theme.SELECTED}, "the picture alone keeps its colour"


def test_opacity_is_kept_and_other_colours_too() -> None:
    rows = np.array([[*to_rgb(theme.SELECTED), 0.3], [0.5, 0.25, 0.125, 0.7]])
    found = dark_colours(rows)
    assert found[0].tolist() == pytest.approx([*to_rgb(PALETTE["selected"][1]), 0.3])
    assert found[1].tolist() == rows[1].tolist() and dark_colours(np.zeros((0, 4))).shape == (0, 4)


def test_an_svg_file_is_light_to_programs_that_know_no_css_and_follows_readers_that_do(tmp_path) -> None:
    make = hostile_figures.VIEWS["masking_bars"]
    plain, dark, both, again = (
        make().save(tmp_path / "view.svg", scheme).read_text(encoding="utf-8")
        for scheme in ("light", "dark", None, None)
    )
    rule = re.search(r"<style>@media \(prefers-color-scheme: dark\).*?</style>\n ", both)
    assert rule is not None and both.replace(rule[0], "") == plain
    assert f'[style*="fill: {theme.INK}"] {{ fill: {PALETTE["ink"][1]} !important }}' in rule[0]
    assert "font-family: 'DejaVu Sans', sans-serif" in plain
    assert both == again
    for at, text in enumerate((plain, dark)):
        absent = [pair[1 - at] for pair in PALETTE.values()]
        assert not [colour for colour in absent if f": {colour}" in text]


def test_files_that_can_not_be_written_are_refused(tmp_path: Path) -> None:
    figure = hostile_figures.VIEWS["overlap_sizes"]()
    for file, scheme, says in (
        ("view.gif", None, r"saved as \.png, \.svg, \.html, \.pdf, not 'view\.gif'"),
        ("view", None, "not 'view'"),
        ("view.png", "sepia", "unknown scheme 'sepia'; valid: light, dark"),
        ("view.html", "sepia", "unknown scheme 'sepia'"),
        ("view.pdf", "dark", "a PDF is light"),
    ):
        with pytest.raises(ValueError, match=says):
            figure.save(tmp_path / "new" / file, scheme)
    assert not (tmp_path / "new").exists()
    assert figure.save(tmp_path / "view.PDF").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", [None, "light", "dark"])
def test_a_page_has_heading_note_and_colours(scheme: str | None) -> None:
    figure = hostile_figures.VIEWS["head_heatmap"]()
    page = theme.page_of(figure, scheme)
    assert figure.heading is not None
    assert "<h1>&lt;b&gt;&amp;task: drop of accuracy without a head</h1>" in page
    assert "<p>Outlined: the 3 critical heads." in page
    for name, pair in PALETTE.items():
        declared = [colour for colour in pair if f"--{name}: {colour};" in page]
        assert declared == {None: list(pair), "light": [pair[0]], "dark": [pair[1]]}[scheme]
    assert f'name="color-scheme" content="{scheme or "light dark"}"' in page


@pytest.mark.exhaustive
@pytest.mark.browser
def test_browsers_show_figures_in_the_scheme_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    from helpers.browser import chromium

    figure = hostile_figures.VIEWS["head_heatmap"]()
    figure.save(tmp_path / "view.svg")
    figure.save(tmp_path / "view.html")
    jupyter = figure._repr_html_()
    hosts = {
        "": None,
        'data-jp-theme-light="true"': 0,
        'data-jp-theme-light="false"': 1,
        'class="vscode-light"': 0,
        'class="vscode-dark"': 1,
    }
    for scheme, at in (("light", 0), ("dark", 1)):
        with chromium(color_scheme=scheme, viewport={"width": 700, "height": 700}) as page:
            for file in ("view.svg", "view.html"):
                page.goto((tmp_path / file).as_uri())
                clip = {"x": 0, "y": 0, "width": 400, "height": 220}  # within the figure
                shown = colours(page.screenshot(clip=clip))
                assert {PALETTE["surface"][at], PALETTE["selected"][at]} <= shown, (file, scheme)
                assert not shown & {PALETTE["surface"][1 - at], PALETTE["selected"][1 - at]}
            for host, of_host in hosts.items():
                page.set_content(f"<body {host}>{jupyter}</body>")
                page.wait_for_function("document.querySelector('img').complete")
                expected = at if of_host is None else of_host
                shown = pixels(page.locator("body > div").screenshot())
                corner = "#{:02x}{:02x}{:02x}".format(*shown[4, -4])
                assert corner == PALETTE["surface"][expected], (host, scheme)
            assert page.errors == []
