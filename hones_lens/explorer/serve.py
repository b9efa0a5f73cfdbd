"""The explorer as a page of a small server of its own, which this computer alone can reach."""

from __future__ import annotations

import json
import threading
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hones_lens.data import load_examples
from hones_lens.explorer import page
from hones_lens.explorer.state import State
from hones_lens.explorer.views import SECTIONS, Views, reads
from hones_lens.prompting import Picture
from hones_lens.tasks import load_task

_LOOPBACK = "127.0.0.1"
_MOST = 100_000  # bytes of a question
_BACKEND = 'ofServer("state", data)'


class Served:
    """What the server answers: the page, and the sections of the states that it asks for.

    Args:
        views: Computes them.
    """

    def __init__(self, views: Views):
        self.views, self.state = views, views.start()
        self._lock = threading.Lock()  # hooks are the model's: one question at a time

    def page(self) -> str:
        """The whole page, as it begins."""
        state = self.state
        view = {name: self.views.section(name, state) for name in SECTIONS} | {"token": state.token}
        data = {"scene": self.views.scene(), "state": state.to_json(), "view": view}
        return page.html(f"{data['scene']['model']} · explorer", data, _BACKEND)

    def answer(self, question: bytes) -> dict[str, Any]:
        """The sections of a state that differ from those of the state that the page shows.

        Raises:
            ValueError: Not a state, or one that does not fit.
        """
        try:
            asked = json.loads(question)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("shown"), dict):
            raise ValueError("a question holds `state` and `shown`")
        state, shown = State.from_json(asked.get("state", {})), State.from_json(asked["shown"])
        stale = [name for name in SECTIONS if reads(name, state) != reads(name, shown)]
        view = {name: self.views.section(name, state) for name in stale}
        return {"state": state.to_json(), "view": {**view, "token": state.token}}

    def locked(self, fn: Callable[[], Any]) -> Any:
        """Call it while nobody else computes."""
        with self._lock:
            return fn()


def serve(views: Views, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; call its `serve_forever()`, and find its port in `server_port`.

    It answers questions of its own page alone: those addressed to another name (a page elsewhere whose name
    was bent to this computer) or sent by a page of another origin are refused.

    Args:
        views: What it shows.
        port: Which; 0 for one that is free.
    """
    served = Served(views)

    class Handler(BaseHTTPRequestHandler):
        """Two addresses: `/` and `/state`."""

        def _mine(self) -> bool:
            port = self.connection.getsockname()[1]
            names = [f"{host}:{port}" for host in (_LOOPBACK, "localhost")]
            origin = self.headers.get("Origin")
            return self.headers.get("Host") in names and (
                origin is None or origin in [f"http://{name}" for name in names]
            )

        def _send(self, status: HTTPStatus, kind: str, body: str) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if not self._mine():
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "not from here")
            elif self.path != "/":
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "nothing here")
            else:
                self._send(HTTPStatus.OK, "text/html", served.locked(served.page))

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            if not self._mine() or self.headers.get("Content-Type") != "application/json":
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "not from here")
            elif self.path != "/state" or size > _MOST:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "nothing here")
            else:
                question = self.rfile.read(size)
                try:
                    found = served.locked(lambda: served.answer(question))
                except ValueError as error:
                    self._send(HTTPStatus.BAD_REQUEST, "application/json", json.dumps({"error": str(error)}))
                    return
                self._send(HTTPStatus.OK, "application/json", json.dumps(found, allow_nan=False))

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of every request."""

    return ThreadingHTTPServer((_LOOPBACK, port), Handler)


def subject(image: str | None, prompt: str | None) -> tuple[Picture, str]:
    """The picture and the prompt to explore; what is not given is of the shapes world.

    A picture alone is to be described. A prompt alone is asked of the picture of the shapes world.
    """
    name = "vqa" if image is None else "caption"
    task = load_task(name)
    example = load_examples("shapes", name, "test", limit=2)[1]
    return image or example.image, prompt or task.target_prompt(example)


def run(views: Views, port: int = 0, *, browser: bool = True) -> None:
    """Serve until Ctrl-C.

    Args:
        views: What is shown.
        port: Which; 0 for one that is free.
        browser: Open the page.

    Raises:
        OSError: The port is taken.
    """
    with serve(views, port) as server:
        address = f"http://{_LOOPBACK}:{server.server_port}/"
        print(f"Explorer: {address} (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
