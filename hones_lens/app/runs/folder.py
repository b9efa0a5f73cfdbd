"""Run folders: settings with versions and hashes, results of the stages, a log, and resuming.

A run folder records the settings that produced it. The same command on the same folder resumes where it
stopped; other settings are refused.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

import psutil
from filelock import FileLock, Timeout
from PIL import Image

from hones_lens.app.report.run_files import check_file, file_hash, finished_files
from hones_lens.app.report.run_settings import FORMAT, read_object, read_settings, sealed
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.identity import code_hash
from hones_lens.app.runs.journal import TENSORS, Journal
from hones_lens.results import replaced_atomically, write_json
from hones_lens.tasks import Task

_PACKAGES = ("hones-lens", "torch", "transformers", "transformer-lens", "numpy", "pillow")
# Locks by folder: several `Run`s of one process share one, and the last one that goes away releases it.
_LOCKS: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


@runtime_checkable
class _Saveable(Protocol):
    """A result that can be saved to a file and loaded from it."""

    def save(self, file: Path) -> None: ...

    @classmethod
    def load(cls, file: Path) -> Any: ...


R = TypeVar("R", bound=_Saveable)
Journals: TypeAlias = "Callable[[Run, str], Journal] | None"


@dataclass(frozen=True)
class Opening:
    """How a run folder is opened.

    Attributes:
        wait: Wait for another process that works in it, instead of refusing.
        allow_code_change: Go on though the package's code is not the one that began it; this is recorded.
        journals: Makes the journal of a stage, where workers fill it (see `workers.Hiring`).
    """

    wait: bool = False
    allow_code_change: bool = False
    journals: Journals = None


class Run:
    """A run folder, locked against other processes for as long as this object lives.

    `settings.json` has the identity of the run and its settings, and `stages.json` the checksums of each
    finished stage's files; it is written last.

    Args:
        folder: Path of the folder; it is created if it does not exist.
        settings: All settings on which the results depend, as JSON values.
        decided: Names of stages in their order, each with the settings that it is the first to read. Such
            a setting may change as long as neither the stage nor a later one has begun. `NAME.json` stands
            for the result of a stage, which may have begun before.
        opening: Whether to wait for another process, and to go on with other code.
        others: Of these, the stages that will not be run: what decides them stays as it is in the folder.

    Raises:
        ValueError: The folder holds a run with other settings (names each difference), or one of an earlier
            version or of other code of this package; it is not a run folder and not empty; or another
            process works in it.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        decided: Mapping[str, Sequence[str]] | None = None,
        opening: Opening | None = None,
        others: Collection[str] = (),
    ):
        opening, self._others = opening or Opening(), others
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.environment, self._decided = environment(), decided or {}
        self._journals, self._opened = opening.journals, dict[str, Journal]()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder, opening.wait)
        _remove_unfinished(self.folder)
        self.earlier_code: list[str] = []
        self.id, self.resumed = self._check(opening.allow_code_change)
        self._save_settings()
        self.log("resumed" if self.resumed else "started")

    def _save_settings(self) -> None:
        data: dict[str, Any] = {"format": FORMAT, "run": self.id, "code": code_hash()}
        data["earlier_code"] = self.earlier_code
        data |= {"settings": self.settings, "environment": self.environment}
        write_json(self.path("settings.json"), sealed(data))

    def _check(self, allow_code_change: bool) -> tuple[str, bool]:
        """The run's identity, and whether the folder held it already."""
        file = self.folder / "settings.json"
        if not file.exists():
            if any(not _is_bookkeeping(path) for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and not a run folder; choose another --out")
            return uuid.uuid4().hex, False
        saved = read_settings(self.folder)
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} was made by another version of hones-lens, which recorded less of what "
                "decides its numbers: `hones report` reads it, but it can't go on; choose another --out"
            )
        kept = {k: v for k, v in saved["settings"].items() if self._stage_of(k) in self._others}
        own = {k: v for k, v in self.settings.items() if k in kept or self._stage_of(k) not in self._others}
        self.settings = own | kept
        current = {**self.settings, **self.environment}
        stored = {**saved["settings"], **saved["environment"]}
        changed = [k for k in sorted(stored | current) if stored.get(k) != current.get(k)]
        refused = [
            self._difference(k, stored.get(k), current.get(k)) for k in changed if not self._is_open(k)
        ]
        if refused:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({'; '.join(refused)}); choose another --out"
            )
        for name in changed:
            self.log(f"{name}: {stored.get(name)!r} before, {current.get(name)!r} from here on")
        self.earlier_code = saved.get("earlier_code", [])
        if saved["code"] != code_hash():
            self._change_code(saved["code"], allow_code_change)
        return saved["run"], True

    def _change_code(self, before: str, allowed: bool) -> None:
        told = f"the code of hones-lens is not the one that began {self.folder}"
        if not allowed:
            raise ValueError(
                f"{told}: choose another --out, or go on with --allow-code-change, which is recorded"
            )
        warnings.warn(f"{told}: results of both are in it", stacklevel=5)
        self.earlier_code = [*self.earlier_code, before]
        self.log(f"{told}: {before} before, {code_hash()} from here on")

    def _stage_of(self, setting: str) -> str | None:
        """The first stage that reads a setting; None: all do."""
        return next((stage for stage, names in self._decided.items() if setting in names), None)

    def _is_open(self, setting: str) -> bool:
        """Whether no stage that depends on a setting has begun."""
        stage = self._stage_of(setting)
        if stage is None:
            return False
        stages = list(self._decided)
        results = [name for name in stages[stages.index(stage) :] if "." in name]
        later = [name for name in stages[stages.index(stage) :] if "." not in name]
        files = [*results, *(f"{name}.{kind}" for name in later for kind in _STAGE_FILES)]
        sums = [self.folder.glob(f"{name}.*{TENSORS}") for name in later]
        return not any(self.path(file).exists() for file in files) and not any(map(list, sums))

    def _difference(self, setting: str, stored: Any, current: Any) -> str:
        stage = self._stage_of(setting)
        stage = stage and stage.removesuffix(".json")
        begun = "" if stage is None else f", which decides the stage {stage}, already begun"
        return f"{setting}: {stored!r} there, {current!r} now{begun}"

    def log(self, message: str) -> None:
        """Append a line with the time to log.txt."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        with open(self.folder / "log.txt", "a", encoding="utf-8") as out:
            out.write(f"{stamp} {message}\n")

    def path(self, name: str) -> Path:
        """Path of a file in the run folder."""
        return self.folder / name

    def stage(self, name: str, result: type[R], compute: Callable[[], R], beside: Iterable[str] = ()) -> R:
        """The result of a stage: loaded from `NAME.json` if it was finished, else computed and saved there.

        Args:
            name: Name of the stage and of its file.
            result: Class of the result, which has `save(file)` and `load(file)`.
            compute: Computes the result, and writes the files `beside` it.
            beside: Names of files in the run folder; one that is not written is not looked for again.

        Raises:
            ValueError: The stage was finished, and a file is no longer the one that was written.
        """
        file = self.path(f"{name}.json")

        def write() -> list[Path]:
            compute().save(file)
            return [file, *filter(Path.exists, map(self.path, beside))]

        self.files(name, write)
        return result.load(file)

    def files(self, name: str, write: Callable[[], Iterable[Path]]) -> None:
        """Write the files of a stage, unless it was finished and they are all there.

        Args:
            name: Name of the stage.
            write: Writes the files, and gives their paths; all are in the run folder.

        Raises:
            ValueError: The stage was finished, and a file is no longer the one that was written.
        """
        finished = finished_files(self.folder, self.id).get(name)
        if finished is None or not all(self.path(file).exists() for file in finished):
            self.record(name, write())
            self.log(f"{name}: done")
        else:
            for file, checksum in finished.items():
                check_file(self.path(file), checksum)
        self._opened.pop(name, None)
        for file in self.folder.glob(f"{name}.*{TENSORS}"):  # of its journal
            file.unlink()

    def record(self, name: str, files: Iterable[Path]) -> None:
        """Mark a stage as finished, with the checksums of its files: the last thing that it writes."""
        checksums = {file.relative_to(self.folder).as_posix(): file_hash(file) for file in files}
        stages = {**finished_files(self.folder, self.id), name: checksums}
        write_json(self.path("stages.json"), {"run": self.id, "stages": stages})

    def withdraw(self) -> None:
        """Delete what this run wrote, so that the folder can take another one; the lock stays held."""
        finished = finished_files(self.folder, self.id)
        written = [self.path(name) for files in finished.values() for name in files]
        written += [*self.folder.glob("*.journal.jsonl"), *self.folder.glob(f"*{TENSORS}")]
        # The settings last: until then, the same command takes it up again.
        for file in [self.path("stages.json"), *written, self.path("log.txt"), self.path("settings.json")]:
            file.unlink(missing_ok=True)

    def journal(self, stage: str) -> Journal:
        """The journal of a stage: results of its finished batches, read once and kept until it is done."""
        if stage not in self._opened:
            make = self._journals or _own_journal
            self._opened[stage] = make(self, stage)
        return self._opened[stage]


def _own_journal(run: Run, stage: str) -> Journal:
    return Journal(run.folder / f"{stage}.journal.jsonl", run.id)


_STAGE_FILES = ("json", "journal.jsonl", "parts")


def _remove_unfinished(folder: Path) -> None:
    """Delete what killed processes were writing (see `replaced_atomically`)."""
    for part in [*folder.glob("*.part"), *folder.glob("hones/*.part")]:
        if (pid := part.name.split(".")[-2].partition("-")[0]).isdigit() and not psutil.pid_exists(int(pid)):
            part.unlink()


def _is_bookkeeping(path: Path) -> bool:
    """Whether a file is one that a run leaves that was killed before its settings were written."""
    return path.name in ("lock", "lock.json") or path.name.endswith(".part")


def _locked(folder: Path, wait: bool) -> FileLock:
    """The lock of a folder, held by this process; the system frees it when the process ends."""
    key = folder.resolve()
    lock = _LOCKS.get(key)
    if lock is not None:
        return lock
    lock, owner = FileLock(folder / "lock", thread_local=False), folder / "lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        in_use = f"{folder} is in use by another process{_owner(owner)}"
        if not wait:
            raise ValueError(f"{in_use}; wait for it to end (--wait does)") from error
        print(f"{in_use}; waiting for it to end", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.5)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    _LOCKS[key] = lock
    return lock


def _owner(file: Path) -> str:
    try:
        owner = read_object(file)
    except (OSError, ValueError):  # it is being written at this moment
        return ""
    return f" (pid {owner.get('pid')} on {owner.get('host')} since {owner.get('since')})"


def save_left_out(run: Run, data: DataChoice, task: str | Task) -> None:
    """Write which of a task's examples were left out, and why, if any were."""
    if left_out := data.left_out(task):
        write_json(run.path("left-out.json"), {"kind": "left out", "splits": left_out})
        run.record("left-out", [run.path("left-out.json")])


def save_picture(picture: Image.Image, file: Path) -> Path:
    """Write a picture as PNG, complete or not at all; gives the file's path."""
    with replaced_atomically(file) as partial:
        picture.save(partial, format="PNG")
    return file
