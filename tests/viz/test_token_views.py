"""Token views: what circuitsvis is given equals the folded numbers, and nothing in a token is markup."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_llava
from helpers.attention_cases import FAMILIES, HEADS, ROW, patches, pictures_of, twin
from PIL import Image

from hones_lens.analysis.token_cells import FoldedAttention, fold_tokens, folded_attention
from hones_lens.viz import token_views
from hones_lens.viz.schemes import PALETTE
from hones_lens.viz.theme import NEGATIVE, SELECTED
from hones_lens.viz.token_views import attention_tokens, coloured_tokens

needs_circuitsvis = pytest.mark.skipif(find_spec("circuitsvis") is None, reason="no circuitsvis")
HOSTILE = ("<s>", "</script>", "<!--", "&lt;", "<image>", "a\nb")


class Page(HTMLParser):
    """The elements of a view: its scripts, and the text of each kind of element."""

    def __init__(self, html: str):
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.attributes: dict[str, list[dict[str, str | None]]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes.setdefault(tag, []).append(dict(attrs))
        if tag not in ("rect", "image", "meta", "link") or tag == "rect":
            self._open.append(tag)
            self.found.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        if self._open:
            self.found[self._open[-1]][-1] += data


@pytest.fixture
def bundle(monkeypatch) -> None:
    """A stand-in for circuitsvis, so that what it is given is tested where it is missing."""
    monkeypatch.setattr(token_views, "_bundle", lambda: "var CircuitsVis;")


def given(html: str) -> tuple[str, dict]:
    """The component that is drawn, and its properties."""
    (script,) = Page(html).found["script"]
    place, name, properties = re.search(
        r'CircuitsVis\.render\("([\w-]+)", CircuitsVis\.(\w+), (.*)\)$', script
    ).groups()
    assert any(attributes.get("id") == place for attributes in Page(html).attributes["div"])
    return name, json.loads(properties)


@FAMILIES
def test_patterns_are_the_folded_ones(made, bundle) -> None:
    both, inputs, theirs = twin(made)
    folded = folded_attention(both.model, inputs, HEADS, row=ROW)
    name, properties = given(attention_tokens(folded).html)
    assert name == "AttentionHeads"
    assert properties["attentionHeadNames"] == ["L0H3", "L2H1", "L1H0"]
    assert torch.tensor(properties["attention"]).allclose(folded.pattern, rtol=1e-3)
    assert properties["maxValue"] == pytest.approx(float(folded.pattern.max()))
    tokens = properties["tokens"]
    assert len(tokens) == len(folded.cells) < int(inputs.attention_mask[ROW].sum())
    assert [token for token in tokens if token.startswith("[image")] == [
        f"[image {i}: {r} × {c}]" for i, (r, c) in enumerate(inputs.grids[ROW])
    ]
    at = tokens.index(f"[image 1: {inputs.grids[ROW][1][0]} × {inputs.grids[ROW][1][1]}]")
    to_image = theirs[2, ROW, 1, -1][patches(both, inputs, ROW, 1)].sum()
    assert properties["attention"][1][-1][at] == pytest.approx(float(to_image), rel=1e-3)


@FAMILIES
def test_an_image_s_cell_opens_to_its_patches(made, bundle) -> None:
    both, inputs, theirs = twin(made)
    folded = folded_attention(both.model, inputs, HEADS, row=ROW)
    page = Page(attention_tokens(folded, pictures_of(made), source=-2).html)
    assert len(page.found["details"]) == 2 and len(page.found["svg"]) == 2 * len(HEADS)
    told = iter(page.found["title"])
    shades = iter(page.attributes["rect"])
    for image in (0, 1):
        grid = patches(both, inputs, ROW, image)
        for layer, head in HEADS:
            expected = theirs[layer, ROW, head, -2][grid]
            for row, column in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
                place, _, value = next(told).partition(": ")
                assert place == f"{row}, {column}"
                assert float(value) == pytest.approx(float(expected[row, column]), rel=2e-3, abs=1e-6)
                rect = next(shades)
                assert (rect["x"], rect["y"]) == (str(column), str(row))
                assert rect["class"] == "above"
                share = float(expected[row, column] / expected.max())
                assert float(rect["fill-opacity"]) == pytest.approx(0.85 * share, abs=2e-3)
    assert next(told, None) is None
    cell = len(folded.cells) - 2
    assert all(f"attention from cell {cell}, " in text for text in page.found["summary"])
    boxes = [svg["viewbox"] for svg in page.attributes["svg"]]
    assert boxes == [f"0 0 {c} {r}" for r, c in inputs.grids[ROW] for _ in HEADS]
    assert len(page.attributes["image"]) == 6
    assert "image" not in Page(attention_tokens(folded).html).attributes


@FAMILIES
@pytest.mark.parametrize("fold", ["mean", "sum", "max"])
def test_coloured_tokens_hold_a_value_each(made, fold: str, bundle) -> None:
    both, inputs, _ = twin(made)
    cells = fold_tokens(both.model, inputs, row=ROW)
    values = torch.randn(inputs.input_ids.shape[1])
    html = coloured_tokens(cells, values, fold=fold, what="activation of <L0N1>").html
    name, properties = given(html)
    assert name == "ColoredTokens"
    expected = [float(getattr(values[list(span)], fold)()) for span in cells.spans]
    assert properties["values"] == pytest.approx(expected, rel=1e-3)
    assert properties["maxValue"] == -properties["minValue"] == pytest.approx(max(map(abs, expected)))
    page = Page(html)
    assert page.found["b"] == ["activation of <L0N1>"]
    on_patches = [float(text.partition(": ")[2]) for text in page.found["title"]]
    grids = torch.cat([patches(both, inputs, ROW, image).flatten() for image in (0, 1)])
    assert on_patches == pytest.approx(values[grids].tolist(), rel=1e-3)
    sides = [rect["class"] for rect in page.attributes["rect"]]
    assert sides == ["above" if value >= 0 else "below" for value in values[grids].tolist()]
    assert properties["positiveColor"] == SELECTED and properties["negativeColor"] == NEGATIVE


def hostile() -> FoldedAttention:
    both, inputs, _ = twin(random_llava)
    folded = folded_attention(both.model, inputs, HEADS, row=ROW)
    names = (*HOSTILE, *folded.cells.names[len(HOSTILE) :])
    return replace(folded, cells=replace(folded.cells, names=names), model_name="<b>&")


def test_token_text_is_never_markup(bundle) -> None:
    folded = hostile()
    page = attention_tokens(folded).html
    _, properties = given(page)
    assert properties["tokens"][:6] == [*HOSTILE[:5], "a\\nb"]
    assert Page(page).found["b"] == ["<b>&: attention between tokens"]
    html = coloured_tokens(folded.cells, torch.zeros(folded.cells.inputs.input_ids.shape[1])).html
    shown = given(html)[1]["tokens"]
    assert [token.replace("\u2060", "") for token in shown[:6]] == [*HOSTILE[:5], "a\\nb"]
    for token, wanted in zip(shown[:5], HOSTILE[:5], strict=True):
        inside = Page(f"<i>{token}</i>")  # as innerHTML
        assert list(inside.found) == ["i"]
        assert unescape(inside.found["i"][0]).replace("\u2060", "") == wanted
    assert "<!--" not in page and page.count("</script>") == html.count("</script>") == 1


def test_what_is_refused(bundle) -> None:
    both, inputs, _ = twin(random_llava)
    folded = folded_attention(both.model, inputs, HEADS, row=ROW)
    n = len(folded.cells)
    with pytest.raises(IndexError, match=f"there are {n} cells; there is no cell {n}"):
        attention_tokens(folded, source=n)
    with pytest.raises(ValueError, match="1 pictures for a row with 2 images"):
        attention_tokens(folded, pictures_of(random_llava)[0])
    many = 200_000 // n**2 + 1
    large = replace(
        folded, heads=tuple((0, i) for i in range(many)), pattern=folded.pattern[:1].expand(many, -1, -1)
    )
    with pytest.raises(ValueError, match=f"take at most {many - 1} heads"):
        attention_tokens(large)
    values = torch.zeros(inputs.input_ids.shape[1])
    values[-1] = torch.nan
    with pytest.raises(ValueError, match="value: values that are not finite"):
        coloured_tokens(folded.cells, values)


def test_without_circuitsvis_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(token_views, "find_spec", lambda name: None)
    token_views._bundle.cache_clear()
    with pytest.raises(ImportError, match=r"pip install hones-lens\[viz\]"):
        attention_tokens(hostile())


@needs_circuitsvis
def test_the_script_is_the_installed_one_and_asks_for_nothing(monkeypatch, tmp_path: Path) -> None:
    token_views._bundle.cache_clear()
    view = attention_tokens(hostile())
    for line in ("cdn.jsdelivr", "unpkg.com", "sourceMappingURL", "import {"):
        assert line not in view.html
    assert "CircuitsVis=" in view.html.replace(" ", "") and 1e6 < len(view.html) < 2e6
    assert view.html.count("</script>") == 1
    page = view.save(tmp_path / "new" / "view.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and view.html in page
    assert view._repr_html_() == view.html and len(repr(view)) < 60


@pytest.mark.exhaustive
def test_views_save_as_pages_and_pictures_and_nothing_else(bundle, tmp_path: Path) -> None:
    folded = hostile()
    values = torch.linspace(-1, 1, folded.cells.inputs.input_ids.shape[1])
    for view in (attention_tokens(folded), coloured_tokens(folded.cells, values, what="activation")):
        view.save(tmp_path / "view.html")
        text = view.save(tmp_path / "view.svg", "light").read_text(encoding="utf-8")
        assert text == view.draw().save(tmp_path / "drawn.svg", "light").read_text(encoding="utf-8")
        texts = [unescape(found) for found in re.findall(r"<text[^>]*>([^<]*)</text>", text)]
        assert {*HOSTILE[:5], "a\\nb"} <= set(texts)
        for file, scheme, says in (
            ("view.gif", None, r"saved as \.html, \.png, \.svg, \.pdf, not 'view\.gif'"),
            ("view", None, "not 'view'"),
            ("view.html", "dark", "a page of tokens follows its reader's scheme"),
        ):
            with pytest.raises(ValueError, match=says):
                view.save(tmp_path / "new" / file, scheme)
    assert not (tmp_path / "new").exists()
    assert view.save(tmp_path / "view.PNG", "dark").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
@needs_circuitsvis
@pytest.mark.browser
def test_a_dark_page_has_dark_views_whose_text_stands_out(tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    from helpers.browser import chromium

    token_views._bundle.cache_clear()
    folded = hostile()
    values = torch.linspace(-1, 1, folded.cells.inputs.input_ids.shape[1])
    views = (attention_tokens(folded, pictures_of(random_llava)), coloured_tokens(folded.cells, values))
    for scheme, at in (("light", 0), ("dark", 1)):
        with chromium(color_scheme=scheme, viewport={"width": 900, "height": 700}) as page:
            for view, drawn in zip(views, ("canvas", ".colored-tokens"), strict=True):
                page.goto(view.save(tmp_path / f"{scheme}.html").as_uri())
                page.wait_for_selector(drawn)
                page.wait_for_timeout(300)
                for place in (".hones-tokens > .drawn", ".hones-tokens"):
                    with Image.open(io.BytesIO(page.locator(place).first.screenshot())) as shot:
                        shades = np.asarray(shot.convert("L"))
                    dark, light = (int(shades.min()), int(shades.max()))
                    assert light - dark > 120, place
                    assert (shades.mean() > 128) == (scheme == "light"), place
                assert int(shades[3, -3]) in (range(250, 256), range(50))[at]
                colour = page.evaluate("getComputedStyle(document.querySelector('.hones-tokens')).color")
                assert [int(c) for c in re.findall(r"\d+", colour)] == list(
                    bytes.fromhex(PALETTE["ink"][at][1:])
                )


@pytest.mark.exhaustive
@needs_circuitsvis
@pytest.mark.browser
def test_a_browser_without_network_draws_tokens_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    from helpers.browser import chromium

    token_views._bundle.cache_clear()
    folded = hostile()
    values = torch.linspace(-1, 1, folded.cells.inputs.input_ids.shape[1])
    heads = attention_tokens(folded, pictures_of(random_llava)).save(tmp_path / "heads.html")
    tokens = coloured_tokens(folded.cells, values, pictures_of(random_llava)).save(tmp_path / "tokens.html")
    with chromium() as page:
        page.context.set_offline(True)
        page.goto(heads.as_uri())
        page.wait_for_selector("canvas")
        assert page.locator("h4").all_text_contents() == list(folded.names)
        summary = page.locator("summary").first
        assert not page.locator("svg rect").first.is_visible()
        summary.click()
        assert page.locator("svg rect").first.is_visible()
        page.goto(tokens.as_uri())
        page.wait_for_selector(".colored-tokens")
        shown = page.locator(".colored-tokens span span").all_text_contents()
        expected = [*HOSTILE[:5], "a\\nb", *folded.cells.names[6:]]
        clean = [text.replace("\u2060", "").replace("\u00a0", " ") for text in shown]
        assert clean == [name.replace("\n", "\\n") for name in expected]
        page.locator(".colored-tokens span span").first.hover()
        page.wait_for_selector("strong")
        assert page.locator("strong").text_content().replace("\u2060", "") == "<s>"
        assert page.errors == []
