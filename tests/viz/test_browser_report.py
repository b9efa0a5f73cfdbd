"""The report in Chromium, from disk, with the network off: every figure is drawn, at once, on a phone too."""

from __future__ import annotations

import pytest
import viz_results as made

from hones_lens.viz.report import write_report

pytest.importorskip("playwright")
from browsing import chromium

DRAWN = """() => [...document.querySelectorAll('figure svg, svg[role], img')].map(
    x => { const box = x.getBoundingClientRect(); return [box.width, box.height] })"""
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 390])
def test_it_opens_from_disk_without_a_network(tmp_path, width):
    file = write_report(tmp_path / "report.html", [made.run()])
    assert file.stat().st_size < 6_000_000
    with chromium(viewport={"width": width, "height": 900}, offline=True) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri(), wait_until="load")
        sizes = page.evaluate(DRAWN)
        assert len(sizes) >= 3 and all(w > 100 and h > 60 for w, h in sizes), sizes
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        print(f"loaded after {page.evaluate(LOADED):.0f} ms")
        outside = [url for url in asked if not url.startswith(("file:", "data:"))]
        assert not outside and not page.errors, (outside, page.errors)
