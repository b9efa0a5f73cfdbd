"""Run folders at a glance: state, share done, last sign of life, and what they found."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hones_lens.app.report.run_settings import read_object
from hones_lens.app.runs.journal import EXPECTED

JOURNAL = ".journal.jsonl"
_SILENT = ("started", "resumed")


@dataclass(frozen=True)
class RunState:
    """A run folder.

    Attributes:
        folder: Where it lies.
        model, task: Of its settings; empty where it has none.
        state: `running` (a process has the folder), `stopped` (before a stage's end), `done`, or `damaged`.
        stage: The stage that runs or stopped, or the last one finished.
        share: How much of that stage is done, from 0 to 1, of what it announced when it began; None where it
            announced nothing.
        seen: When a file of it last changed, in seconds since 1970.
        said: What it last wrote in its log.
    """

    folder: Path
    model: str
    task: str
    state: str
    stage: str
    share: float | None
    seen: float
    said: str


def run_states(root: str | Path) -> list[RunState]:
    """The run folders in a folder and up to two levels below, the one that moved last first.

    Raises:
        ValueError: It is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    states = [_state(folder) for folder in _folders(root)]
    return sorted(states, key=lambda state: -state.seen)


def _folders(root: Path, levels: int = 3) -> Iterator[Path]:
    if (root / "settings.json").exists():
        yield root
    if levels:
        with os.scandir(root) as entries:
            below = sorted(entry.path for entry in entries if entry.is_dir() and entry.name[:1] != ".")
        for path in below:
            yield from _folders(Path(path), levels - 1)


def _state(folder: Path) -> RunState:
    with os.scandir(folder) as entries:
        seen = {entry.name: entry.stat().st_mtime for entry in entries}
    latest, said = max(seen.values()), _last_words(folder)
    try:
        settings = read_object(folder / "settings.json").get("settings", {})
        stages = read_object(folder / "stages.json")["stages"] if "stages.json" in seen else {}
        open_stages = [
            name.removesuffix(JOURNAL)
            for name in sorted(seen, key=seen.__getitem__)
            if name.endswith(JOURNAL) and name.removesuffix(JOURNAL) not in stages
        ]
        stage = open_stages[-1] if open_stages else next(reversed(stages), "")
        share = _share(folder / f"{stage}{JOURNAL}") if open_stages else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        return RunState(folder, "", "", "damaged", "", None, latest, str(error))
    state = "running" if _is_held(folder) else "stopped" if open_stages or not stages else "done"
    task = settings.get("task") or ", ".join(settings.get("tasks", ()))
    return RunState(folder, str(settings.get("model", "")), task, state, stage, share, latest, said)


def _is_held(folder: Path) -> bool:
    """Whether a process, of this machine or of another, has the folder."""
    lock = folder / "lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _share(journal: Path) -> float | None:
    """Finished batches, of those that the stage announced before the first one; so it never falls."""
    expected, done = dict[str, int](), dict[str, int]()
    start = f'["{EXPECTED}'.encode()
    with open(journal, "rb") as lines:
        for line in lines:
            if line.startswith(start):
                label, n, _ = json.loads(line)
                if not any(done.values()):
                    expected[label.removeprefix(EXPECTED)] = n
            else:
                label = _label_of(line)
                done[label] = done.get(label, 0) + (label in expected)
    total = sum(expected.values())
    return sum(min(done.get(label, 0), n) for label, n in expected.items()) / total if total else None


def _label_of(line: bytes) -> str:
    """What a batch in a line of a journal is called."""
    key = re.match(rb'\[("(?:[^"\\]|\\.)*")', line[:500])
    return json.loads(key[1]).rpartition("/")[0] if key else ""


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    texts = [line.partition(" ")[2] for line in lines]
    telling = [text for text in texts if text not in _SILENT and not text.endswith(": done")]
    return (telling or texts or [""])[-1]


def shown(state: RunState, now: datetime) -> dict[str, str]:
    """One row of the table."""
    age = now.timestamp() - state.seen
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= seconds:
            ago = f"{age / seconds:.0f} {unit} ago"
            break
    else:
        ago = "now"
    share = "" if state.share is None else f" {state.share:.0%}"
    return {
        "run": str(state.folder),
        "model": state.model,
        "task": state.task,
        "state": state.state,
        "stage": f"{state.stage}{share}",
        "last sign": ago,
        "said": state.said,
    }
