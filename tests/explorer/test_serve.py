"""The server of `hones explore`: it answers its own page, on this computer, and nobody else."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from explored import example, views

from hones_lens.cli import main
from hones_lens.explorer import serve as serving
from hones_lens.explorer.serve import serve, subject

VIEWS = views()


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with serve(VIEWS) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: ThreadingHTTPServer, method: str, path: str, body: object = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, path, json.dumps(body) if body is not None else None, sent)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode()
    connection.close()
    return found


def test_it_listens_on_this_computer_alone(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_is_complete(server: ThreadingHTTPServer) -> None:
    status, text = ask(server, "GET", "/")
    assert status == 200 and 'ofServer("state", data)' in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    state = VIEWS.start()
    assert data["state"] == state.to_json()
    assert data["view"]["head"] == VIEWS.section("head", state)


def test_a_click_is_answered_by_the_sections_that_change(server: ThreadingHTTPServer) -> None:
    shown = VIEWS.start()
    state = replace(shown, head=(0, 5))
    status, text = ask(server, "POST", "/state", {"state": state.to_json(), "shown": shown.to_json()})
    found = json.loads(text)
    assert status == 200 and found["state"] == state.to_json()
    assert found["view"] == {"token": state.token, "head": VIEWS.section("head", state)}
    edited = state.edited("head", (0, 5), None)
    _, text = ask(server, "POST", "/state", {"state": edited.to_json(), "shown": state.to_json()})
    assert json.loads(text)["view"]["answer"]["text"] == "triangle"


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Host": "evil.example"}, "/", 403),
        ({"Origin": "http://evil.example"}, "/", 403),
        ({}, "/etc/passwd", 404),
    ],
)
def test_others_get_nothing(server: ThreadingHTTPServer, headers, path, status) -> None:
    assert ask(server, "GET", path, **headers)[0] == status
    assert ask(server, "POST", path if status == 404 else "/state", {}, **headers)[0] == status


def test_a_form_of_another_page_is_refused(server: ThreadingHTTPServer) -> None:
    assert ask(server, "POST", "/state", {}, Content_Type="text/plain")[0] == 403


def test_a_question_that_makes_no_sense_is_named(server: ThreadingHTTPServer) -> None:
    shown = VIEWS.start().to_json()
    status, text = ask(server, "POST", "/state", {"state": {**shown, "head": [9, 9]}, "shown": shown})
    assert status == 400 and "no head 9 in layer 9" in json.loads(text)["error"]
    assert ask(server, "POST", "/state", {"state": shown})[0] == 400
    assert ask(server, "POST", "/state", [])[0] == 400


def test_what_is_not_given_is_of_the_shapes_world() -> None:
    picture, prompt = subject(None, None)
    assert picture.tobytes() == example().image.tobytes()  # type: ignore[union-attr]
    assert prompt.startswith("Question: what shape is the green one?")
    assert subject("my.png", None) == ("my.png", "Describe the image in one sentence.")
    assert subject("my.png", "why?") == ("my.png", "why?")


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    picture = tmp_path / "picture.png"
    example().image.save(picture)
    monkeypatch.setattr("hones_lens.explorer.page.MOST_BYTES", 120_000)
    out = tmp_path / "page.html"
    arguments = ["--image", str(picture), "--prompt", "what is it?", "--out", str(out), "--device", "cpu"]
    assert main(["explore", *arguments]) == 0
    assert str(out) in capsys.readouterr().out and "ofPage(data)" in out.read_text()


def test_the_command_serves_and_opens_the_page(monkeypatch, capsys) -> None:
    opened: list[str] = []
    monkeypatch.setattr(serving.webbrowser, "open", opened.append)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", _interrupted)
    assert main(["explore", "--device", "cpu"]) == 0
    (address,) = opened
    assert address.startswith("http://127.0.0.1:") and address in capsys.readouterr().out
    assert main(["explore", "--device", "cpu", "--no-browser"]) == 0 and len(opened) == 1


def test_the_command_names_what_is_not_there(capsys) -> None:
    assert main(["explore", "--image", "nowhere.png"]) == 1
    assert "nowhere.png" in capsys.readouterr().err


def _interrupted(self: ThreadingHTTPServer) -> None:
    raise KeyboardInterrupt
