"""`hones explore`: a page of this computer, behind a token; what is wrong is said before it opens."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from helpers.explorer_views import example, views

from hones_lens.app.cli import main
from hones_lens.app.explorer import serve as serving
from hones_lens.app.explorer.serve import build_server, open_listener, picture_and_prompt

EXTRA = "the explorer needs the extra `notebook`: pip install hones-lens[notebook]"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server that runs in a thread."""
    pytest.importorskip("marimo")
    with open_listener() as listener:
        server, address = build_server(views(), listener)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield address
        server.should_exit = True
        thread.join()


def ask(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    host, _, path = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{path}", headers=headers)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode(), dict(reply.getheaders())
    connection.close()
    return found


def test_it_listens_on_this_computer_alone() -> None:
    with open_listener() as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        socket.create_connection((host, port), timeout=5).close()
        with pytest.raises(OSError):  # what listens everywhere listens here too
            socket.create_connection(("127.0.0.2", port), timeout=5)
    with pytest.raises(ValueError, match="no port 65536"):
        open_listener(65_536)


@pytest.mark.exhaustive
def test_without_the_token_there_is_nothing_to_see(address: str) -> None:
    page, _, token = address.partition("?access_token=")
    assert len(token) >= 20
    for wrong in (page, f"{page}?access_token=wrong", f"{page}?access_token="):
        status, text, headers = ask(wrong)
        assert status == 303 and "/auth/login" in headers["location"] and not text
    assert ask(f"{page}api/status")[0] == ask(f"{page}api/usage")[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # whose address was led here
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": "localhost.evil.example"},
        {"Host": "0.0.0.0"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another program of this computer
    ],
    ids=str,
)
def test_requests_of_other_pages_get_nothing(address: str, headers: dict[str, str]) -> None:
    for where in (address, address.partition("?")[0] + "api/status"):
        status, text, found = ask(where, **headers)
        assert status == 403 and "explorer's own page" in text and "set-cookie" not in found


def test_requests_of_its_own_page_and_through_a_tunnel_are_answered(address: str) -> None:
    host = address.removeprefix("http://").partition("/")[0]
    for headers in ({"Origin": f"http://{host}"}, {"Host": "localhost:9"}):
        assert ask(address, **headers)[0] == 303


def test_a_socket_of_another_page_is_refused(address: str) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    cookie = ask(address)[2]["set-cookie"].partition(";")[0]  # a browser sends it whoever asks
    page, host = address.partition("?")[0], address.removeprefix("http://").partition("/")[0]
    assert _upgraded(page, **upgrade, Cookie=cookie, Origin=f"http://{host}") == 101
    assert _upgraded(page, **upgrade, Cookie=cookie, Origin="http://evil.example") == 403
    assert _upgraded(page, **upgrade, Cookie=cookie, Host="evil.example") == 403


def _upgraded(page: str, **headers: str) -> int:
    """The status with which a web socket is answered."""
    host, _, path = page.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{path}ws?session_id=s_123456", headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_token_is_in_no_argument_of_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str, int]] = []

    def open_page(address: str) -> None:
        file = Path(url2pathname(urlsplit(address).path))
        opened.append((address, file.read_text(), file.parent.stat().st_mode & 0o777))

    class Server:
        def run(self, sockets: object) -> None:
            raise KeyboardInterrupt

    url = "http://127.0.0.1:1/explorer-1/?access_token=secret"
    monkeypatch.setattr(serving, "build_server", lambda *_: (Server(), url))
    monkeypatch.setattr("webbrowser.open", open_page)
    with open_listener() as listener:
        serving.run(views(), listener)
    ((address, page, mode),) = opened
    assert "secret" not in address and f'url={url}"' in page and mode == 0o700
    assert not Path(url2pathname(urlsplit(address).path)).exists()


def test_the_token_opens_the_page_and_stays_out_of_its_address(address: str) -> None:
    page = address.partition("?")[0]
    status, _, headers = ask(address)
    path = page.removeprefix("http://").partition("/")[2]
    assert (status, headers["location"]) == (303, f"/{path}")
    cookie = headers["set-cookie"]
    # A browser sends a cookie to every port of a host: two explorers must not take each other's.
    assert f"path=/{path.rstrip('/')};" in cookie and path.rstrip("/").endswith(
        page.split(":")[2].split("/")[0]
    )
    status, text, _ = ask(page, Cookie=cookie.partition(";")[0])
    assert status == 200 and "<title>Explorer</title>" in text


def test_tabs_have_states_of_their_own_and_one_model(address: str) -> None:
    pytest.importorskip("anywidget")
    first, second = serving.explorer_of_new_tab(), serving.explorer_of_new_tab()
    first.ablate(head=(0, 5))
    assert first.views is second.views
    assert (first.answer["text"], second.answer["text"]) == ("triangle", "cross")


def test_the_page_is_the_explorer_and_nothing_else(address: str) -> None:
    pytest.importorskip("anywidget")
    from hones_lens.app.explorer.app import app
    from hones_lens.app.explorer.widget import Explorer

    (shown,), _ = app.run()
    assert isinstance(shown, Explorer) and shown.views is serving.explorer_of_new_tab().views


def test_a_page_of_nothing_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anywidget")
    monkeypatch.setattr(serving, "_served", [])
    with pytest.raises(RuntimeError, match="start this page with `hones explore`"):
        serving.explorer_of_new_tab()


def test_what_is_not_given_is_of_the_shapes_world() -> None:
    picture, prompt = picture_and_prompt(None, None)
    assert picture.tobytes() == example().image.tobytes()  # type: ignore[union-attr]
    assert prompt.startswith("Question: what shape is the green one?")
    assert picture_and_prompt("my.png", None) == ("my.png", "Describe the image in one sentence.")


def test_a_text_of_ones_own_is_asked_in_the_form_of_a_task() -> None:
    form = "Question: why?\nAnswer the question with a short phrase."
    assert picture_and_prompt("my.png", "why?") == ("my.png", form)
    assert picture_and_prompt("my.png", form) == ("my.png", form)
    assert picture_and_prompt("my.png", "why?", raw_prompt=True) == ("my.png", "why?")
    assert picture_and_prompt("my.png", "a red dot", "retrieval")[1].startswith("Candidate: a red dot\n")
    assert picture_and_prompt("my.png", None, "ocr")[1].startswith("Transcribe the text")
    assert picture_and_prompt(None, None, "ocr")[1].startswith("Transcribe the text")
    for given, says in (
        (("my.png", None, "vqa"), "needs a text of your own"),
        (("my.png", "why?", "ocr"), "has no place for 'why\\?'"),
    ):
        with pytest.raises(ValueError, match=says):
            picture_and_prompt(*given)
    with pytest.raises(ValueError, match="--raw-prompt needs --prompt"):
        picture_and_prompt("my.png", None, raw_prompt=True)


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["anywidget", "marimo"])
def test_without_the_extra_the_command_says_at_once_which_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from hones_lens.app.cli import main; "
    run = [sys.executable, "-c", f"{code}print(main(['explore']), 'torch' in sys.modules)"]
    found = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60)
    assert (found.stdout, found.stderr) == ("1 False\n", f"hones: {EXTRA}\n")


def test_the_command_writes_a_page_without_the_extra(tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("anywidget", "ipywidgets", "marimo", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    picture = tmp_path / "picture.png"
    example().image.save(picture)
    out = tmp_path / "page.html"
    arguments = ["--image", str(picture), "--prompt", "what is it?", "--out", str(out), "--device", "cpu"]
    assert main(["explore", *arguments, "--max-size", "0.12"]) == 0
    assert out.stat().st_size < 120_000
    assert str(out) in capsys.readouterr().out and "ofPage(data)" in out.read_text()


def test_the_command_serves_and_opens_the_page(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("marimo")
    opened: list[str] = []

    def open_page(file: str) -> None:
        opened.append(Path(url2pathname(urlsplit(file).path)).read_text().partition("url=")[2][:-2])

    monkeypatch.setattr(serving.webbrowser, "open", open_page)
    monkeypatch.setattr("uvicorn.Server.run", _interrupted)
    assert main(["explore", "--device", "cpu"]) == 0
    (address,) = opened
    said = capsys.readouterr()
    prompt = "Question: what shape is the green one?\nAnswer the question with a short phrase."
    told = f"prompt: {prompt!r}\nthe model answers {example().answers[0]!r}\n"
    assert said.out == f"{told}Explorer: {address} (Ctrl-C ends it)\n\n" and not said.err
    assert address.startswith("http://127.0.0.1:") and "?access_token=" in address
    assert main(["explore", "--device", "cpu", "--no-browser"]) == 0 and len(opened) == 1


@pytest.mark.parametrize("option", ["--image", "--model", "--run"])
def test_the_command_names_what_is_not_there(option: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("marimo")
    assert main(["explore", option, str(tmp_path / "nothing")]) == (2 if option == "--model" else 1)
    found = capsys.readouterr()
    assert not found.out and str(tmp_path / "nothing") in found.err and found.err.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(monkeypatch, capsys) -> None:
    pytest.importorskip("marimo")
    loaded: list[str] = []
    monkeypatch.setattr("hones_lens.model.loading.load_model", lambda name, *_, **__: loaded.append(name))
    with open_listener() as taken:
        assert main(["explore", "--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err and not loaded


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
