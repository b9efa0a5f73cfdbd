"""Pictures of the explorer for the README, as Chromium draws it: `python -m hones_lens.tools.screenshots`.

Needs playwright and a Chromium; neither is a dependency of the package.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hones_lens.explorer.serve import serve, subject
from hones_lens.explorer.views import Views
from hones_lens.hooked_vlm import HookedVLM
from hones_lens.loading import load_model

MOST_BYTES = 300_000
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
# By name: width, scheme, and what is clicked before.
SHOTS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "explorer": (1100, "light", ()),
    "explorer-ablated": (1100, "light", ('[data-head="0.5"]', '[data-key="ablate-head"]')),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write every picture into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/images", help="folder (default: docs/images)")
    parser.add_argument("--model", default="tiny-llava", help="name, folder or Hub id (default: tiny-llava)")
    args = parser.parse_args(argv)
    for file in shoot_explorer(load_model(args.model), Path(args.out)):
        print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def shoot_explorer(model: HookedVLM, folder: Path) -> list[Path]:
    """Serve the default example, and write each of SHOTS.

    Raises:
        FileNotFoundError: No Chromium.
        ImportError: No playwright.
        RuntimeError: The page's console says an error.
    """
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise FileNotFoundError("no chromium on the path")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with serve(Views(model, *subject(None, None))) as server, sync_playwright() as playwright:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        browser = playwright.chromium.launch(executable_path=program, args=list(_FLAGS))
        try:
            for name in SHOTS:
                picture = _shoot(browser, f"http://127.0.0.1:{server.server_port}/", *SHOTS[name])
                files.append(folder / f"{name}.png")
                files[-1].write_bytes(picture)
        finally:
            browser.close()
            server.shutdown()
            thread.join()
    return files


def _shoot(browser: Any, address: str, width: int, scheme: str, clicks: Sequence[str]) -> bytes:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator(".hx-cell").first.wait_for()
    for number, clicked in enumerate(clicks, 1):
        page.locator(clicked).click()
        done = f"document.querySelector('.hones-explorer').dataset.drawn === '{number}'"
        page.wait_for_function(done)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(400)  # transitions end
    picture = page.screenshot(full_page=True)
    page.close()
    if errors:
        raise RuntimeError(f"the page's console says: {errors[0]}")
    return _small(picture)


def _small(picture: bytes) -> bytes:
    """With as few colours as it takes to stay below MOST_BYTES."""
    if len(picture) <= MOST_BYTES:
        return picture
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
