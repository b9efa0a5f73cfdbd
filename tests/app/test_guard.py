"""How commands end: one line and an exit code, whatever happens; a file for faults of the program."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hones_lens.app.cli import build_parser, main
from hones_lens.app.config_file import apply_config
from hones_lens.app.guard import guarded

PROGRAM = "import sys, time; from hones_lens.app.guard import guarded; "


def start(code: str, **options: Any) -> subprocess.Popen[bytes]:
    """A program under the guard, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **options.pop("env", {})}
    command = [sys.executable, "-c", PROGRAM + code]
    pipe = subprocess.PIPE
    # Under `nohup`, or in the background of a script, signals are ignored, and children inherit that.
    options = {"stdout": pipe, "stderr": pipe, "bufsize": 0, "preexec_fn": _heed_signals, **options}
    process: Any = subprocess.Popen(command, env=env, **options)
    return process


def _heed_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def outcome(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of an error that is raised outside of the package."""

    def run() -> None:
        raise error

    assert guarded(run, ["mask", "--out", "a b"]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [IndexError("list index"), KeyError("heads"), TypeError("x"), AssertionError(), AttributeError("no"),
     RecursionError("deep"), OverflowError("range"), ZeroDivisionError("0"), UnicodeError("odd \udc80"),
     StopIteration(), ValueError("not ours"), Exception("bare"), json.JSONDecodeError("not JSON", "", 0)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_fault_is_one_line_and_a_file_with_the_traceback(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = outcome(error, capsys)
    assert said.startswith(f"hones: a fault inside the program ({type(error).__name__}")
    assert said.count("\n") == 1
    (file,) = tmp_path.glob("hones-crash-*.txt")
    assert str(file) in said
    text = file.read_text()
    assert text.startswith("command: hones mask --out 'a b'\n")
    assert "Traceback (most recent call last)" in text and "def run" not in said and "in run" in text
    assert re.search(r"^torch \d", text, re.MULTILINE) and re.search(r"^hones-lens \d", text, re.MULTILINE)


def test_where_no_file_can_be_written_debug_is_named(capsys, monkeypatch):
    def nowhere(**_):
        raise OSError("read-only")

    monkeypatch.setattr("tempfile.mkstemp", nowhere)
    assert "(IndexError: x); --debug shows where" in outcome(IndexError("x"), capsys)
    with pytest.raises(IndexError):
        guarded(lambda: [][0], debug=True)


def test_errors_of_checks_need_no_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["evaluate", "--model", "nope"]) == 2  # raised by a check of options
    assert main(["report", str(tmp_path / "nothing")]) == 1  # and of a folder
    assert outcome(FileNotFoundError(2, "No such file", "x.json"), capsys).endswith("'x.json'\n")
    assert "needs the extra" in outcome(ImportError("needs the extra `notebook`"), capsys)
    assert "a smaller --batch-size" in outcome(MemoryError(), capsys)
    assert not list(tmp_path.glob("hones-crash-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_end_a_command_as_ctrl_c_does(name):
    process = start(
        "\ndef run():\n  try:\n    print('on', flush=True); time.sleep(60)\n  finally: print('tidied')\n"
        "sys.exit(guarded(run))"
    )
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    number = getattr(signal, name)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == b"tidied\n"  # what is open was closed
    assert b"the same command goes on from here" in err and err.count(b"\n") == 1
    assert (name in err.decode()) == (name != "SIGINT")


def test_a_hangup_that_is_ignored_stays_ignored():
    process = start(
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def run(): print('on', flush=True); sys.stdin.read(1)\nsys.exit(guarded(run))",
        stdin=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(b"x", timeout=30)
    assert (process.returncode, err) == (0, b"")


def test_handlers_of_a_program_around_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert guarded(lambda: None) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_reader_that_goes_away_ends_it_quietly():
    process = start("sys.exit(guarded(lambda: [print('x' * 80, flush=True) for _ in range(100_000)][0]))")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=30), err) == (141, b"")


@pytest.mark.parametrize(
    ("where", "code", "says"),
    [(">&-", 0, ""), (">/dev/full", 1, "No space left"), ("2>&-", 0, ""), (">&- 2>&-", 0, "")],
)
def test_output_that_goes_nowhere(where, code, says):
    if "/dev/full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = f'"{sys.executable}" -c "{PROGRAM}sys.exit(guarded(lambda: print(\'x\')))" {where}'
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, timeout=30)
    assert done.returncode == code
    assert says in done.stderr.decode() and b"Traceback" not in done.stderr and b"ignored" not in done.stderr


def test_characters_that_a_terminal_lacks_are_escaped():
    process = start(
        "sys.exit(guarded(lambda: print('H1 – \\u2713 \\udc80')))", env={"PYTHONIOENCODING": "ascii"}
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"H1 \\u2013 \\u2713 \\udc80\n", b"")


# -- the file of --config ------------------------------------------------------------------------------------

ODD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "a list": (b"- task: ocr\n", "holds a list, not options by name"),
    "a word": (b"ocr\n", "holds a str, not options"),
    "not YAML": (b"task: [ocr\n", "is not YAML"),
    "a tab": (b"task:\n\t- ocr\n", "is not YAML"),
    "an object of Python": (b"task: !!python/object/apply:os.system [echo]\n", "is not YAML"),
    "too deep": (b"[" * 3_000, "is not YAML"),
    "not UTF-8": (b"task: \xff\n", "is not in UTF-8"),
    "zero bytes": (b"\x00\x00", "is not YAML"),
    "a key that is no word": (b"3: ocr\n", "unknown key 3"),
    "a list for one value": (b"limit: [1, 2]\n", "limit is [1, 2], which --limit does not take"),
    "a word for a number": (b"limit: many\n", "limit is 'many', which --limit does not take"),
    "a number for a switch": (b"plain-greedy: 3\n", "plain-greedy is 3; valid: true, false"),
    "a switch for a number": (b"limit: true\n", "limit is True, which is no value"),
    "options within an option": (b"limit: {a: 1}\n", "limit is {'a': 1}, which is no value"),
    "a choice in a list": (b"task: [ocr]\n", "task is ['ocr']; valid: vqa"),
    "HONES with a word": (b"model: {name: llava}\ndata: 3\n", "and not keys with their values"),
    "HONES with a list": (b"model: {name: llava}\nrun: [1]\n", "and not keys with their values"),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_odd_configurations_are_refused_by_name(case, tmp_path, capsys):
    content, says = ODD_CONFIGS[case]
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    assert main(["evaluate", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hones: ") and str(file) in said and said.count("\n") == 1
    assert re.search(says.replace("[", r"\[").replace("{", r"\{"), said), said
    assert "a fault inside" not in said


def test_a_configuration_gives_what_the_command_line_would(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: [5.0e-4, 1e-2]\nepochs: 4\nmethods: [hones, random]\nplain_greedy: true\nout:\n")
    parser = build_parser()
    args = parser.parse_args(["steer", "--config", str(file)])
    apply_config(args)
    read = parser.parse_args(["steer", "--config", str(file)])
    assert (read.lr, read.epochs, read.methods) == ((5e-4, 1e-2), (4,), ("hones", "random"))
    assert read.plain_greedy is True and read.out is None


def test_a_device_that_is_not_there_is_named(capsys):
    for name in ("nonsense", "meta", "cuda:99", "xla"):
        assert main(["evaluate", "--device", name, "--limit", "2"]) == 2
        said = capsys.readouterr().err
        assert f"device {name!r} can't be used (" in said and "a fault inside" not in said
