"""The explorer as a page in the browser: a marimo app, served on the loopback address only."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_lens.app.explorer.views import ExplorerViews
from hones_lens.data import load_examples
from hones_lens.model import PictureLike
from hones_lens.tasks import load_task, own_prompt, task_of_examples

if TYPE_CHECKING:
    import uvicorn

    from hones_lens.app.explorer.widget import Explorer

LOOPBACK = "127.0.0.1"
_APP = Path(__file__).with_name("app.py")
# The explorer alone, over the whole width.
_HEAD = """<style>
[data-testid="notebook-actions-dropdown"] { display: none !important; }
#App > div { padding: 4px 0 !important; }
</style>"""
_served: list[ExplorerViews] = []  # the one that tabs show; marimo runs them as threads of this process


def picture_and_prompt(
    image: str | None, prompt: str | None, task: str | None = None, *, raw_prompt: bool = False
) -> tuple[PictureLike, str]:
    """The picture and the prompt to explore; either one that is not given comes from the shapes world.

    Args:
        image: File of a picture.
        prompt: The user's text, e.g. a question.
        task: The task in whose form the text is asked; default: `vqa`, or `caption` for a picture alone.
        raw_prompt: Whether the text is the whole prompt.

    Raises:
        ValueError: An unknown task, no text where the task needs one, or one that it has no place for.
    """
    if raw_prompt and prompt is None:
        raise ValueError("--raw-prompt needs --prompt")
    known_task = load_task(task or ("vqa" if image is None or prompt is not None else "caption"))
    example = None
    if image is None:
        example = load_examples("shapes", task_of_examples(known_task, "shapes"), "test", limit=2)[1]
        if prompt is None:
            return example.image, known_task.target_prompt(example)
    asked = prompt if raw_prompt and prompt is not None else own_prompt(known_task, prompt)
    return (example.image if example is not None else str(image)), asked


def open_listener(port: int = 0) -> socket.socket:
    """A listening socket on the loopback address; connections wait in it until the server runs.

    Args:
        port: The port; 0 for any free one.

    Raises:
        OSError: The port is taken.
        ValueError: There is no such port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"there is no port {port}")
    return socket.create_server((LOOPBACK, port))


def build_server(views: ExplorerViews, listener: socket.socket) -> tuple[uvicorn.Server, str]:
    """Build the server of the page.

    Args:
        views: What every tab shows.
        listener: The socket, from `open_listener`; `server.run([listener])` closes it in the end.

    Returns:
        The server, and the address of the page with its access token.
    """
    import marimo
    import uvicorn

    _served[:] = [views]
    port = listener.getsockname()[1]
    path = f"/explorer-{port}"  # cookies know paths and no ports: each server needs its own
    token = secrets.token_urlsafe(16)
    # A tab's thread ends with its connection (session_ttl), or the process would outlive Ctrl-C.
    apps = marimo.create_asgi_app(quiet=True, token=token, session_ttl=0, html_head=_HEAD)
    app = apps.with_app(path=path, root=str(_APP)).build()
    guarded = _OwnPageOnly(app)
    config = uvicorn.Config(
        guarded, log_level="error", access_log=False, ws_ping_timeout=60, timeout_graceful_shutdown=1
    )
    return uvicorn.Server(config), f"http://{LOOPBACK}:{port}{path}/?access_token={token}"


def run(views: ExplorerViews, listener: socket.socket, *, browser: bool = True) -> None:
    """Serve until Ctrl-C.

    Args:
        views: What every tab shows.
        listener: The socket, from `open_listener`.
        browser: Whether to open the page in the browser.
    """
    server, address = build_server(views, listener)
    print(f"Explorer: {address} (Ctrl-C ends it)", flush=True)
    with tempfile.TemporaryDirectory(prefix="hones-explorer-") as folder:  # for this user's eyes alone
        if browser:
            webbrowser.open(_redirection(Path(folder), address))
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])
    print()


def _redirection(folder: Path, address: str) -> str:
    """A file that leads to the address, which as an argument of the browser every user would see."""
    file = folder / "explorer.html"
    file.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
    return file.as_uri()


class _OwnPageOnly:
    """An ASGI app that answers requests of its own pages alone.

    A page of another site can lead its own name to the loopback address (DNS rebinding): the header Host has
    that name then, and not the loopback's. Requests that another page sends have that page's Origin.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not _is_own(scope["headers"]):
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not a request of the explorer's own page"})
            return
        await self._app(scope, receive, send)


def _is_own(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether there is one Host, the loopback at any port (tunnels have others), and no other Origin."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    if len(hosts) != 1 or hosts[0].partition(":")[0] not in (LOOPBACK, "localhost"):
        return False
    return all(origin == f"http://{hosts[0]}" for origin in origins)


def explorer_of_new_tab() -> Explorer:
    """A new explorer for one browser tab: each tab has its own state, and all share the model.

    Raises:
        RuntimeError: No server is running in this process.
    """
    from hones_lens.app.explorer.widget import Explorer

    if not _served:
        raise RuntimeError("nothing is served here: start this page with `hones explore`")
    return Explorer(_served[0])
