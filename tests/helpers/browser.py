"""Chromium, JupyterLab and `hones explore` for tests: without network, and ended with the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
_SETTINGS = {
    # All cells stay in the page; nothing is asked of the net.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """A page of a fresh browser, and the errors that its console says in `page.errors`."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        page: Any = browser.new_context(**options).new_page()
        page.errors = []
        page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        try:
            yield page
        finally:
            browser.close()


@contextmanager
def jupyterlab(folder: Path, notebook: Path) -> Iterator[str]:
    """A server whose root is `folder`, with a copy of the notebook in it; gives the notebook's address."""
    work = folder / "work"
    work.mkdir()
    shutil.copy(notebook, work)
    for name, settings in _SETTINGS.items():
        file = folder / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {
        **os.environ,
        **{name: str(folder / name.lower()) for name in homes},
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    options += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=secret",
        f"--ServerApp.root_dir={work}",
    ]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = folder / "jupyter.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=out, stderr=out
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token=secret"
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def run_all(page: Any, address: str, seconds: float = 240) -> None:
    """Open a notebook in JupyterLab, run all cells, and wait until the kernel has nothing left to do."""
    page.goto(address)
    idle = page.locator("#jp-main-statusbar").get_by_text("Idle")
    idle.wait_for(timeout=1000 * seconds)
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
            return prompts.length > 0 && prompts.every((p) => /\\[\\d+\\]/.test(p.textContent));
        }""",
        timeout=1000 * seconds,
    )
    idle.wait_for(timeout=1000 * seconds)


# Writes down what the program asks of sockets, and the names that it looks up.
_WATCHED = """
import socket, sys
log = open(sys.argv.pop(1), "w")
asks = [f"socket.{ask}" for ask in "bind connect sendto sendmsg getaddrinfo gethostbyname".split()]
def note(event, args):
    if event in asks:
        print(event, *(arg for arg in args if not isinstance(arg, socket.socket)), file=log, flush=True)
sys.addaudithook(note)
from hones_lens.app.cli import main
sys.exit(main())
"""


@contextmanager
def exploring(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`hones explore` without a browser, and the address that it says.

    Into `folder` go `out.txt`, `err.txt`, and `network.txt`: all that it asks of the network.
    """
    homes = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    environment = {**os.environ, **{name: str(folder / name.lower()) for name in homes}}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        _WATCHED,
        str(folder / "network.txt"),
        "explore",
        "--no-browser",
        *arguments,
    ]
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("w") as output, err.open("w") as errors:
        program = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
    try:
        end = time.monotonic() + 90
        while not (address := re.search(r"http://\S+(?=\s)", out.read_text())):
            if time.monotonic() > end or program.poll() is not None:
                raise RuntimeError(f"hones explore did not start:\n{err.read_text()[-2000:]}")
            time.sleep(0.1)
        yield program, address[0]
    finally:
        if program.poll() is None:
            program.kill()
        program.wait(30)
