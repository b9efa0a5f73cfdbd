"""The page that keeps its numbers: complete, small, harmless whatever the tokens are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.explorer_views import shipped, views

from hones_lens.app.explorer import page
from hones_lens.app.explorer.state import Edit
from hones_lens.app.explorer.views import SECTIONS, ExplorerViews
from hones_lens.data import load_examples
from hones_lens.hones import localize_heads
from hones_lens.viz.schemes import PALETTE


def kept(file: Path) -> dict:
    text = file.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    one = views()
    state = one.start()
    return (
        one,
        state,
        page.write_page(one, state, tmp_path_factory.mktemp("page") / "deep" / "page.html", 300_000),
    )


def test_it_keeps_what_clicks_ask_for(written) -> None:
    one, state, file = written
    data, token = kept(file), state.token
    assert file.stat().st_size <= 300_000 < page.MOST_BYTES < 1_000_000
    assert data["scene"] == one.scene() and data["state"] == state.to_json()
    for layer in range(4):
        for head in range(8):
            section = one.section("head", replace(state, head=(layer, head)))
            assert data["kept"]["head"][f"{token}@{layer}.{head}"] == section
    ablated = replace(state, edits=(Edit("head", 0, 5),))
    assert data["kept"]["answer"]["L0H5@0"] == one.section("answer", ablated)
    assert {str(p) for p in range(one.answered.n_tokens)} <= set(data["kept"]["lens"])
    for layer, index, *_ in one.section("head", state)["feeds"]:
        assert f"{token}@{layer}.{index}" in data["kept"]["neuron"]


def test_it_needs_nothing_from_outside(written) -> None:
    text = written[2].read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)
    assert not re.findall(r"<(?:link|script|img)[^>]*\b(?:src|href)=[\"'](?!data:)", text)


def test_tokens_can_not_end_its_script() -> None:
    text = page.html("</title><b>", {"text": "</script><script>alert(1)</script>"}, "ofPage(data)")
    assert text.count("</script>") == 2 and "<b>" not in text.partition("<style>")[0]
    (found,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(found) == {"text": "</script><script>alert(1)</script>"}


def test_a_size_that_is_too_small_keeps_the_first_view(tmp_path: Path) -> None:
    one = views()
    state = one.start()
    small = page.write_page(one, state, tmp_path / "small.html", most_bytes=80_000)
    assert small.stat().st_size <= 80_000 and set(kept(small)["kept"]) == set(SECTIONS)
    smallest = kept(page.write_page(one, state, tmp_path / "none.html", most_bytes=50_000))
    assert {name: len(found) for name, found in smallest["kept"].items()} == dict.fromkeys(SECTIONS, 1)


def test_where_attention_is_large_the_best_heads_keep_their_own(tmp_path: Path, monkeypatch) -> None:
    one = views()
    state = one.start()
    assert one.attention_bytes == pytest.approx(len(one.section("attention", state)["bytes"]), rel=0.01)
    assert kept(page.write_page(one, state, tmp_path / "all.html", 100_000))["kept"]["attention"]
    monkeypatch.setattr(ExplorerViews, "attention_bytes", 25_001)
    found = kept(page.write_page(one, state, tmp_path / "page.html", 100_000))["kept"]
    assert not found["attention"]
    scores = [v for row in one.section("map", state)["scores"] for v in row]
    order = sorted(range(32), key=lambda i: -scores[i])
    assert list(found["head"])[:3] == [f"{state.token}@{i // 8}.{i % 8}" for i in order[:3]]
    assert all(len(head["attention"]) == one.answered.n_tokens for head in found["head"].values())


def test_scores_of_some_heads_alone_open_at_the_best_of_them() -> None:
    task, examples = "vqa", load_examples("shapes", "vqa", "discovery", 2)
    scores = localize_heads(shipped("tiny-llava"), task, examples, 1, heads="L1H2,L3H4", progress=False)
    one = views(heads=scores)
    assert one.start().head in ((1, 2), (3, 4)) and one.section("map", one.start())["scores"][0][0] is None


def test_its_colours_are_those_of_the_figures() -> None:
    style = page.stylesheet()
    for name, colours in PALETTE.items():
        for colour in colours:
            assert f"--{name}: {colour};" in style
    used = set(re.findall(r"var\(--([\w-]+)\)", style + page.script())) - {"p"}
    assert used <= {*PALETTE, "well", "bright"}
