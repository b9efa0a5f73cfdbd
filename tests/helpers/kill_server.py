"""A process that loads everything once, and runs commands of `hones` in forks of itself, which it may kill.

Lines of JSON come in and go out. A fork dies as of SIGKILL: nothing of it is tidied up.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

BATCH = 2  # examples, so that few make several batches


class KillServer:
    """Starts the process; `run` asks it for one command."""

    def __init__(self, folder: Path):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=folder, env=env, **pipes)

    def run(self, *argv: str, **order: Any) -> dict[str, Any]:
        """Run a command.

        Args:
            argv: The command.
            order: `event`: kill it before its n-th change of a file; `seconds`: kill it then; `largest`: the
                bytes that a file may have, as on a full disk.

        Returns:
            `status` (negative: the signal that ended it), `events`, `done` (the batches that it finished),
            `said` (its stderr), `seconds`.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"argv": argv, **order}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        with self.process:  # closes its pipes, which ends it
            pass


def _serve() -> None:
    from tqdm.auto import tqdm

    import hones_lens.model
    from hones_lens.app.cli import main
    from hones_lens.app.runs import reproduce
    from hones_lens.engine import SweepOptions

    tqdm.monitor_interval = 0  # no thread of its own, whose locks a fork might find taken
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    hones_lens.model.load_model = cache(hones_lens.model.load_model)
    main(["evaluate", "--task", "vqa", "--limit", "2", "--json", "warm.json"])
    options, replace = SweepOptions.of.__func__, __import__("dataclasses").replace
    SweepOptions.of = classmethod(lambda *a, **k: replace(options(*a, **k), batch_size=BATCH))
    uuid.uuid4 = lambda: uuid.UUID(int=7)  # one identity, so that files of two runs can be equal
    steering = {"learning_rates": (5e-2,), "epochs": (1,), "draws": 1}
    reproduce.reproduce.__kwdefaults__["steering"] = steering
    reproduce.RANKINGS = ("direct", "activation_entropy")
    for line in sys.stdin:
        order = json.loads(line)
        Path("done").write_text("")
        Path("events").write_text("0")
        started = time.monotonic()
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _child(main, order, writing)
        os.close(writing)
        with open(reading, encoding="utf-8") as stderr:
            said = stderr.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"status": code, "done": Path("done").read_text().split("\n")[:-1]}
        answer["seconds"] = time.monotonic() - started
        answer |= {"events": int(Path("events").read_text()), "said": said}
        print(json.dumps(answer), file=answers, flush=True)


def _child(main: Any, order: dict[str, Any], stderr: int) -> None:
    os.dup2(stderr, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (the one before thinks 2 is a file)
    if "largest" not in order:  # there are files of its own in what follows
        _log_batches()
        _kill_before(order.get("event"))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if "seconds" in order:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it does
        signal.setitimer(signal.ITIMER_REAL, order["seconds"])
    faulthandler.dump_traceback_later(300, exit=True)  # where it hangs, and not for ever
    code = 70
    try:
        code = main(order["argv"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def _log_batches() -> None:
    """Every finished batch is noted, outside of the run folder, before it goes into the journal."""
    from hones_lens.app.runs.journal import Journal

    done = os.open("done", os.O_WRONLY | os.O_APPEND)

    def noting(write: Any) -> Any:
        def run(journal: Any, key: str, *values: Any) -> None:
            number = f" {values[0]}" if len(values) > 1 else ""
            os.write(done, f"{journal.file.parent.name}/{journal.file.name} {key}{number}\n".encode())
            write(journal, key, *values)

        return run

    for name in ("__setitem__", "keep_tensors"):
        setattr(Journal, name, noting(getattr(Journal, name)))


def _kill_before(event: int | None) -> None:
    """Count what changes files, and die before the change of that number."""
    count, events = [0], os.open("events", os.O_WRONLY)

    def counting(change: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            count[0] += 1
            os.pwrite(events, str(count[0]).encode(), 0)
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return run

    for where, names in ((os, ("fsync", "truncate", "mkdir")), (Path, ("replace", "unlink"))):
        for name in names:
            setattr(where, name, counting(getattr(where, name)))


if __name__ == "__main__":
    _serve()
