"""The report in Chromium, from disk, with the network off: it opens at once, and every figure is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app.report import test_patch_sections as patched, test_run_examples as looked
from helpers import example_comparisons, example_results as made
from PIL import Image

from hones_lens.app.report.report import write_report
from hones_lens.app.report.run_view import RunView

pytest.importorskip("playwright")
from helpers.browser import chromium

pytestmark = [pytest.mark.browser, pytest.mark.exhaustive]
OPENINGS = 5
# What is far below is laid out and drawn, too.
WHOLE = "section { content-visibility: visible !important }"
FIGURES = """() => {
    const all = document.querySelectorAll('svg.plot, .pictures img, input:checked ~ .over img')
    return [...all].map(x => {
        const box = x.getBoundingClientRect()
        return {
            what: x.getAttribute('aria-label') || x.alt,
            x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height,
            parts: x.querySelectorAll('path, use, rect, image, text').length,
            loaded: x.tagName !== 'IMG' || (x.complete && x.naturalWidth > 0),
            inside: [...x.querySelectorAll('image')].every(i => i.getAttribute('href').startsWith('data:')),
        }
    })
}"""
OPENED = """() => {
    const paints = performance.getEntriesByType('paint').map(p => p.startTime)
    const loaded = performance.getEntriesByType('navigation')[0].loadEventEnd
    return [loaded, paints.length, Math.max(...paints)]
}"""
# Luminance contrast of each text with what lies behind it (WCAG 2), in the page and in its figures; texts on
# coloured cells, which have the colour for that, are left out.
CONTRAST = """() => {
    const channels = colour => {
        const [r, g, b, a = 1] = (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
        return colour.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a]
    }
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
    const light = ([r, g, b]) =>
        0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255)
    const behind = x => {
        for (let e = x; e; e = e.parentElement) {
            const colour = channels(getComputedStyle(e).backgroundColor)
            if (colour[3] === 1) return colour
        }
        return [255, 255, 255, 1]
    }
    const probe = document.body.appendChild(document.createElement('i'))
    probe.style.color = 'var(--on-accent)'
    const onAccent = getComputedStyle(probe).color
    probe.remove()
    const kinds = 'h1, h2, h3, p, a, td, th, dt, dd, figcaption, .head, .value, .label, code, svg text'
    const found = []
    for (const x of document.querySelectorAll(kinds)) {
        if (!x.textContent.trim() || !x.checkVisibility()) continue
        const style = getComputedStyle(x), svg = !!x.closest('svg'), colour = svg ? style.fill : style.color
        if (colour === onAccent) continue
        const [a, b] = [light(channels(colour)), light(behind(x))].sort((p, q) => q - p)
        found.push({text: x.textContent.trim().slice(0, 40), svg, ratio: (a + 0.05) / (b + 0.05)})
    }
    return found
}"""


def several() -> list[RunView]:
    """Two tasks with every view, what they share, and patching by position and by head."""
    examples = [looked.example(), looked.example(prompt="<image> which one?")]
    whole = {"examples": examples, "flow": looked.flow(), "lenses": {"vqa": example_comparisons.lens()}}
    whole |= {"steering": {"learned and measured on shapes": example_comparisons.steering()}}
    across = RunView(
        "tiny-llava · four tasks",
        "tiny-llava",
        "all",
        "",
        overlap=example_comparisons.shared(),
        groups=example_comparisons.groups(),
        effects={"shapes": example_comparisons.effects()},
    )
    positions = patched.run(patched.view(patched.result(("layer", "position"), (4, 21))))
    heads = patched.run(patched.view(patched.result(("layer", "head", "group"), (4, 8, 3)), what="z"))
    other = made.run(title="ocr", neurons=made.neurons(task="ocr", seed=1))
    return [made.run(**whole), other, across, positions, replace(heads, title="tiny-llava · z")]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "report.html", several())


def open_page(file: Path, width: int, scheme: str = "light") -> Iterator[Any]:
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "offline": True}
    return chromium(**options)


@pytest.mark.parametrize("width", [1100, 390])
def test_it_opens_within_a_second_and_asks_nothing_of_the_network(file: Path, width: int) -> None:
    assert file.stat().st_size < 6_000_000
    with open_page(file, width) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        took = []
        for _ in range(OPENINGS):
            page.goto("about:blank")
            page.goto(file.as_uri(), wait_until="load")
            page.wait_for_function(f"({OPENED})()[1] > 0")
            loaded, _, painted = page.evaluate(OPENED)
            assert loaded > 0
            took.append(max(loaded, painted))
        print(
            f"{file.stat().st_size:,} bytes, open and painted after {', '.join(f'{t:.0f}' for t in took)} ms"
        )
        assert min(took) < 1000, took
        outside = [url for url in asked if not url.startswith(("file:", "data:", "about:"))]
        assert not outside and not page.errors, (outside, page.errors)


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_every_figure_is_drawn_and_the_page_fits_the_screen(file: Path, width: int, scheme: str) -> None:
    source = file.read_text(encoding="utf-8")
    with open_page(file, width, scheme) as page:
        page.goto(file.as_uri(), wait_until="load")
        page.add_style_tag(content=WHOLE)
        found = page.evaluate(FIGURES)
        plots = [one for one in found if one["parts"]]
        assert len(plots) == source.count('<svg class="plot"') > 30
        # Four examples of three pictures and a head's two maps, two pairs of two pictures.
        assert len(found) == len(plots) + 4 * 5 + 2 * 2
        assert all(one["loaded"] and one["inside"] for one in found), found
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        for one in found:
            assert one["width"] > 60 and one["height"] > 40, one
            assert not one["parts"] or one["parts"] > 10, one
            left, top = max(0, round(one["x"])), round(one["y"])
            right = min(width, round(one["x"] + one["width"]))
            part = np.asarray(picture.crop((left, top, right, round(top + one["height"]))))
            background = part == part[0, 0]
            drawn = 1 - background.all(-1).mean()
            assert drawn > 0.01, (one["what"], drawn)
        assert not page.errors, page.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_schemes_and_figures_follow(file: Path, scheme: str) -> None:
    with open_page(file, 1100, scheme) as page:
        page.goto(file.as_uri(), wait_until="load")
        page.add_style_tag(content=WHOLE)
        page.wait_for_timeout(200)
        found = page.evaluate(CONTRAST)
        for kind in (True, False):
            assert sum(text["svg"] == kind for text in found) > 100
        worst = min(found, key=lambda text: text["ratio"])
        assert worst["ratio"] >= 4.5, worst
        surface = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
        assert (sum(int(c) for c in surface[4:-1].split(",")) > 600) == (scheme == "light"), surface


def test_a_click_on_a_head_shows_its_attention(file: Path) -> None:
    with open_page(file, 1100) as page:
        page.goto(file.as_uri(), wait_until="load")
        card = page.locator(".card.example").first
        card.scroll_into_view_if_needed()  # what is far below is laid out when it is needed
        pictures = card.locator(".pictures img")
        shown = card.locator(".over img:visible")
        card.locator(".told:visible", has_text="L1H3").wait_for()
        assert shown.count() == 2
        before = pictures.nth(1).screenshot()
        card.locator(".head", has_text="L0H0").click()
        card.locator(".told:visible", has_text="Attention of L0H0").wait_for()
        assert shown.first.get_attribute("alt") == "Attention of L0H0, by patch"
        # The map lies over the second picture, and follows the keyboard too.
        boxes = [found.bounding_box() for found in (shown.first, pictures.nth(1))]
        for side in ("x", "y", "width", "height"):
            assert abs(boxes[0][side] - boxes[1][side]) < 1.5, (side, boxes)
        page.keyboard.press("ArrowLeft")
        card.locator(".told:visible", has_text="L1H3").wait_for()
        # Dark where the head does not look: the bright patch is row 1, column 1 of 8 × 8.
        pixels = np.asarray(Image.open(io.BytesIO(before)).convert("L")).astype(float)
        cell = pixels.shape[0] / 8
        plain = np.asarray(Image.open(io.BytesIO(pictures.nth(0).screenshot())).convert("L")).astype(float)
        middle = [round(1.5 * cell)] * 2
        assert pixels[tuple(middle)] == pytest.approx(plain[tuple(middle)], abs=2)
        assert (
            pixels[round(1.5 * cell), round(5.5 * cell)] < 0.5 * plain[round(1.5 * cell), round(5.5 * cell)]
        )
