"""How a command ends: one line about what went wrong, an exit code, and a file for a fault of the program."""

from __future__ import annotations

import contextlib
import dis
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

GOES_ON = "the same command goes on from here"
_PACKAGE = str(Path(__file__).parents[1])
_VERSIONS = ("hones-lens", "torch", "transformers", "numpy", "pillow")
_SIGNALS = ("SIGTERM", "SIGHUP")  # the second is not there on Windows
_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ends
_MEMORY_ADVICE = "; --dtype bfloat16, --memory-budget or a smaller --batch-size need less"


class WrongOption(ValueError):
    """An option that can't be right, or not with the others; told like wrong usage of the program."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the program to end, where Ctrl-C would end it.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def guarded(run: Callable[[], int | None], argv: Sequence[str] | None = None, debug: bool = False) -> int:
    """Run a command; every error becomes a line on stderr and an exit code.

    Args:
        run: The command.
        argv: Its arguments, for the file of a fault (default: those of the process).
        debug: Let errors through, for their traceback.

    Returns:
        What `run` returns (0 for None); 1 after an error, 2 after a `WrongOption`; 128 plus its number after
        a signal; 141 if nobody reads the output any more. An error that no check of ours raised is a fault
        of the program: its traceback is in a file, which the line names.
    """
    _escape_what_the_terminal_lacks()
    try:
        with _stopped_by_signals():
            code = run() or 0
            if sys.stdout is not None:  # as it is where it is closed
                sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        _say(f"interrupted ({stop}); {GOES_ON}" if isinstance(stop, Stopped) else f"interrupted; {GOES_ON}")
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except BrokenPipeError:
        _forget_stdout()
        return _BROKEN_PIPE
    except Exception as error:
        if debug:
            raise
        _say(_line_of(error, sys.argv[1:] if argv is None else argv))
        return 2 if isinstance(error, WrongOption) else 1


def _line_of(error: Exception, argv: Sequence[str]) -> str:
    """What is said of an error."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory{': ' + text if text else ''}{_MEMORY_ADVICE}"
    if is_expected(error):
        return text or type(error).__name__
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"a fault inside the program ({text[:500]}); {_crash_file(error, argv)}"


def is_expected(error: BaseException) -> bool:
    """Whether an error is a check's: of a `raise` in this package, of the file system, of an import."""
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | RuntimeError | FloatingPointError) or isinstance(
        error, RecursionError | UnicodeError
    ):
        return False
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    raised = dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"  # not by what it called
    return raised and code.co_filename.startswith(_PACKAGE)


def _crash_file(error: BaseException, argv: Sequence[str]) -> str:
    """Write the file of a fault; where it is, and what to do with it."""
    lines = [
        f"command: hones {shlex.join(argv)}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{name} {_version(name)}" for name in _VERSIONS),
        "",
        *traceback.format_exception(error),
    ]
    try:
        number, name = tempfile.mkstemp(prefix="hones-crash-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        return "--debug shows where"
    return f"where and in which versions is in {name}: please report it with that file"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _say(line: str) -> None:
    """A line on stderr; nobody may be there to read it."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(f"hones: {line}", file=sys.stderr, flush=True)
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            _forget_stdout()


def _forget_stdout() -> None:
    """Let what Python flushes at its end go nowhere, or it would complain there."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _escape_what_the_terminal_lacks() -> None:
    """Characters that the terminal's encoding has not are written as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _stopped_by_signals() -> Generator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, except where they are ignored (`nohup`)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
