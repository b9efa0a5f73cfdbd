"""Tokens and names are shown as they are, in every view: no markup, no formulas, no missing glyphs."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import example_comparisons as shared, example_results as made, hostile_figures
from helpers.hostile_figures import HOSTILE, SHOWN, TASK

from hones_lens.app.explorer import page
from hones_lens.app.report.report import write_report
from hones_lens.app.report.run_view import NeuronTokens
from hones_lens.viz import token_views
from hones_lens.viz.flow_plots import flow_tooltips
from hones_lens.viz.theme import themed_svg
from hones_lens.viz.token_views import attention_tokens, coloured_tokens

ALL_TOKENS = {"cell_patterns", "cell_values", "labelled", "lens_grid"}
# What pages and figures are made of; a token that became markup would add to it.
TAGS = {
    *("html", "head", "body", "meta", "link", "title", "style", "h1", "h2", "h3", "p", "main", "div", "span"),
    *("svg", "g", "path", "text", "tspan", "use", "defs", "clippath", "rect", "image", "img", "figure", "i"),
    *("figcaption", "details", "summary", "b", "noscript", "a", "article", "section", "header", "footer"),
    *(
        "nav",
        "table",
        "thead",
        "tbody",
        "tr",
        "td",
        "th",
        "dl",
        "dt",
        "dd",
        "ul",
        "li",
        "br",
        "code",
        "caption",
    ),
    *("input", "label", "fieldset", "legend", "strong"),
}


class Read(HTMLParser):
    """What a reader sees of a page: its text, and the kinds of its elements."""

    def __init__(self, html: str, scripts: int = 0):
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.tags.count("script") == scripts
        assert set(self.tags) - {"script"} <= TAGS, set(self.tags) - TAGS
        self.text = " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SHOWN)
def test_tokens_and_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    figure = hostile_figures.settled(name)
    svg = ElementTree.fromstring(figure.save(tmp_path / "view.svg").read_bytes())
    lines = [text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    in_svg = " ".join(lines).replace("\N{NO-BREAK SPACE}", " ")
    in_page = Read(figure.save(tmp_path / "view.html").read_text(encoding="utf-8")).text
    for expected in SHOWN[name]:
        assert expected in in_svg and expected in in_page, expected
    assert "猫" not in in_svg and ("\\u732b" in in_svg) == (name in ALL_TOKENS), "a glyph that the font lacks"


def test_what_jupyter_shows_of_a_figure_is_escaped() -> None:
    in_jupyter = hostile_figures.lens().plot(k=2, title="</script><s>")._repr_html_()
    assert set(Read(in_jupyter).tags) == {"div", "style", "img"}
    assert "<s>" not in in_jupyter and "</script>" not in in_jupyter and "&lt;s&gt;" in in_jupyter


def test_what_a_flow_says_when_pointed_at_is_escaped() -> None:
    flow = hostile_figures.flow()
    svg = themed_svg(flow.plot(), "a", "<s>", flow_tooltips(flow))
    assert ElementTree.fromstring(svg).get("aria-label") == "<s>"
    said = " ".join(title.text or "" for title in ElementTree.fromstring(svg).iter("title"))
    assert all(f"→ {token}: " in said for token in HOSTILE[:6])


def test_token_views_have_one_script_each(monkeypatch) -> None:
    monkeypatch.setattr(token_views, "_bundle", lambda: "var CircuitsVis;")
    folded = hostile_figures.folded()
    values = torch.zeros(folded.cells.inputs.input_ids.shape[1])
    for view, title in (
        (attention_tokens(folded), f"{TASK}: attention between tokens"),
        (coloured_tokens(folded.cells, values, what="<s>"), "<s>"),
    ):
        assert title in Read(view._repr_html_(), scripts=1).text


def test_the_explorer_s_page_has_no_script_but_its_own() -> None:
    data = {"tokens": list(HOSTILE), "answer": "</script><script>alert(1)</script>"}
    found = Read(page.html("</title><s>", data, "ofPage(data)"), scripts=2)
    assert "</title><s>" in found.text
    (kept,) = [text for text in found.texts if "tokens" in text and text.startswith("{")]
    assert "<" not in kept


def test_the_report_shows_tokens_of_all_its_parts(tmp_path: Path) -> None:
    tokens = {(c.layer, c.index): NeuronTokens(HOSTILE[:4], -0.5) for c in made.neurons().top(4)}
    example = made.example(prompt="Which <s> & word?", answer="</script>", target="<image>")
    run = made.run(promoted=tokens, examples=[example], task=TASK, title=TASK)
    html = write_report(tmp_path / "report.html", [run]).read_text(encoding="utf-8")
    found = Read(html)
    for expected in (*HOSTILE[:4], "Which <s> & word?", "</script>", TASK):
        assert expected in found.text, expected


@pytest.mark.parametrize(
    "result",
    [
        hostile_figures.lens(),
        hostile_figures.flow(),
        shared.lens(),
        hostile_figures.with_ends("<s>", ("token",), (7,), token=HOSTILE),
    ],
    ids=["lens", "flow", "difference", "labelled"],
)
def test_tables_in_jupyter_show_tokens_as_they_are(result) -> None:
    html = result._repr_html_()
    found = Read(html)
    assert "<s>" not in html and "</script>" not in html
    expected = ("<b>", "</s>") if result.__class__.__name__ == "LensDifference" else HOSTILE[:4]
    assert all(token in found.text for token in expected)


def test_a_dollar_is_a_dollar_and_a_formula_that_can_not_be_set_does_no_harm() -> None:
    lens = hostile_figures.lens()
    odd = replace(lens, tokens=((("$\\frac{$", "$$", "$a_{b$", "_", "^", "\\", "{"),) * 3,))
    figure = odd.plot(k=7)
    figure._repr_png_()
    shown = [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "token"][:7]
    assert shown == ["$\\frac{$", "$$", "$a_{b$", "_", "^", "\\", "{"]
    result = hostile_figures.with_ends("$\\frac{$", ("position",), (2,), position=("$a_{b$", "$$"))
    result.plot()._repr_png_()
