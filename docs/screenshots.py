"""The README's pictures of explorer and report, as Chromium draws them.

`python -m docs.screenshots` makes them all, the report's from the run folder of a `hones demo`.
Needs the extra `notebook`, playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from hones_lens.app import (
    ExplorerViews,
    build_server,
    open_listener,
    picture_and_prompt,
    read_view,
    write_report,
)
from hones_lens.model import HookedVLM, load_model

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

# Of the report, by name: width and height of the window, scheme.
REPORT_SHOTS: dict[str, tuple[int, int, str]] = {"report": (1200, 1500, "light")}


def main(argv: Sequence[str] | None = None) -> int:
    """Write every picture into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/images", help="folder (default: docs/images)")
    parser.add_argument("--model", default="tiny-llava", help="name, folder or Hub id (default: tiny-llava)")
    parser.add_argument(
        "--run", default="runs/demo", help="of the report; made if need be (default: runs/demo)"
    )
    args = parser.parse_args(argv)
    run = demo_run(Path(args.run))
    files = [*shoot_explorer(load_model(args.model), Path(args.out)), *shoot_report(run, Path(args.out))]
    for file in files:
        size = file.stat().st_size
        print(f"{file}: {size:,} bytes")
        if size > MOST_BYTES:
            raise RuntimeError(f"{file} has {size:,} bytes, more than {MOST_BYTES:,}")
    return 0


def demo_run(folder: Path) -> Path:
    """A run folder of the demo, made if there is none yet.

    Raises:
        subprocess.CalledProcessError: The demo fails.
    """
    if not (folder / "settings.json").is_file():
        subprocess.run([sys.executable, "-m", "hones_lens.app.cli", "demo", "--out", str(folder)], check=True)
    return folder


def shoot_report(run: Path, folder: Path) -> list[Path]:
    """The top of a run's report: write each of REPORT_SHOTS.

    Raises:
        FileNotFoundError: No Chromium.
        ImportError: No playwright.
        RuntimeError: The page's console says an error.
        ValueError: Not a run folder.
    """
    pictures = {}
    with tempfile.TemporaryDirectory() as scratch, _chromium() as browser:
        report = write_report(Path(scratch) / "report.html", [read_view(run)])
        for name, (width, height, scheme) in REPORT_SHOTS.items():
            with _opened(browser, report.as_uri(), (width, height), scheme, offline=True) as page:
                pictures[name] = page.screenshot()
    return _written(pictures, folder)


def shoot_explorer(model: HookedVLM, folder: Path) -> list[Path]:
    """Serve the default example, and write each of SHOTS.

    Raises:
        FileNotFoundError: No Chromium.
        ImportError: No playwright, or not the extra `notebook`.
        RuntimeError: The page's console says an error.
    """
    pictures = {}
    with open_listener() as listener, _chromium() as browser:
        server, address = build_server(ExplorerViews(model, *picture_and_prompt(None, None)), listener)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            for name, (width, scheme, clicks) in SHOTS.items():
                with _opened(browser, address, (width, 1400), scheme) as page:
                    pictures[name] = _clicked(page, clicks)
        finally:
            server.should_exit = True
            thread.join()
    return _written(pictures, folder)


def _clicked(page: Any, clicks: Sequence[str]) -> bytes:
    """The explorer after some clicks."""
    explorer = page.locator(".hones-explorer")
    explorer.locator(".hx-cell").first.wait_for()
    for number, clicked in enumerate(clicks, 1):
        page.locator(clicked).click()
        shown = [explorer.element_handle(), str(number)]
        page.wait_for_function("([explorer, n]) => explorer.dataset.drawn === n", arg=shown)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(400)  # transitions end
    return explorer.screenshot()


@contextmanager
def _chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise FileNotFoundError("no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def _opened(
    browser: Any, address: str, size: tuple[int, int], scheme: str, offline: bool = False
) -> Iterator[Any]:
    """A page; it is an error if its console says one until it is closed."""
    viewport = {"width": size[0], "height": size[1]}
    page = browser.new_context(viewport=viewport, color_scheme=scheme, offline=offline).new_page()
    errors: list[str] = []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    if errors:
        raise RuntimeError(f"the page's console says: {errors[0]}")


def _written(pictures: Mapping[str, bytes], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        file.write_bytes(_small(picture))
    return files


def _small(picture: bytes) -> bytes:
    """With as few colours as it takes to stay below MOST_BYTES."""
    if len(picture) <= MOST_BYTES:
        return picture
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
