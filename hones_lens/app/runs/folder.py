"""Run folders: settings with versions and hashes, results of the stages, a log, and resuming.

A run folder records the settings that produced it. The same command on the same folder resumes where it
stopped; other settings are refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hones_lens.data import Example
from hones_lens.model import HookedVLM
from hones_lens.results import write_json
from hones_lens.tasks import Task

_PACKAGES = ("hones-lens", "torch", "transformers", "transformer-lens", "numpy", "pillow")
_SAMPLES = 1024
_EARLIER = {"decoding": "greedy"}  # what runs did before they recorded it


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def weights_hash(model: HookedVLM) -> str:
    """A hash of every parameter's name, shape, type and 1,024 evenly spaced values."""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[_evenly_spaced(flat.numel()).to(flat.device)]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _evenly_spaced(n: int) -> Tensor:
    """At most 1,024 indices from 0 to n - 1.

    Those of `torch.linspace(0, n - 1, ...).long()` with AVX2 or AVX-512: float32, each value rounded once.
    Other instruction sets round twice, and a sample one place further would be another hash.
    """
    count = min(_SAMPLES, n)
    last, step = float(np.float32(n - 1)), float(np.float32(n - 1) / np.float32(max(count - 1, 1)))
    k = np.arange(count, dtype=np.float64)
    values = np.where(k < count // 2, step * k, last - step * (count - 1 - k))
    # Above 2**24 a float32 may be the next number: the last index stays inside.
    return torch.from_numpy(values.astype(np.float32).astype(np.int64).clip(max=n - 1))


def examples_hash(task: Task, examples: Sequence[Example]) -> str:
    """A hash of the examples' ids, prompts, targets and pixels."""
    digest = hashlib.blake2b(digest_size=12)
    for example in examples:
        digest.update(repr((example.id, task.prompts(example), task.target(example))).encode())
        digest.update(example.image.tobytes())
    return digest.hexdigest()


class Journal(UserDict):
    """Results of finished batches, one JSON line each: setting a key writes it to the disk.

    A killed run loses at most the current batch: an incomplete last line is dropped.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        if file.exists():
            self._read()

    def _read(self) -> None:
        content = self.file.read_bytes()
        complete_lines = content[: content.rfind(b"\n") + 1]
        if len(complete_lines) < len(content):
            self.file.write_bytes(complete_lines)
        for line in complete_lines.decode("utf-8").splitlines():
            key, value = json.loads(line)
            self.data[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps([key, value], allow_nan=False) + "\n")


@runtime_checkable
class _Saveable(Protocol):
    """A result that can be saved to a file and loaded from it."""

    def save(self, file: Path) -> None: ...

    @classmethod
    def load(cls, file: Path) -> Any: ...


R = TypeVar("R", bound=_Saveable)


class Run:
    """A run folder.

    Args:
        folder: Path of the folder; it is created if it does not exist.
        settings: All settings on which the results depend, as JSON values.

    Raises:
        ValueError: The folder holds a run with other settings (names each difference), or is not a
            run folder and not empty.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.environment = environment()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resumed = self._check()
        if not self.resumed:
            write_json(
                self.folder / "settings.json", {"settings": self.settings, "environment": self.environment}
            )
        self.log("resumed" if self.resumed else "started")

    def _check(self) -> bool:
        file = self.folder / "settings.json"
        if not file.exists():
            if any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and not a run folder; choose another --out")
            return False
        saved = json.loads(file.read_text(encoding="utf-8"))
        current = {**_EARLIER, **self.settings, **self.environment}
        stored = {**_EARLIER, **saved["settings"], **saved["environment"]}
        differences = [
            f"{k}: {stored.get(k)!r} there, {current.get(k)!r} now"
            for k in sorted(stored | current)
            if stored.get(k) != current.get(k)
        ]
        if differences:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({'; '.join(differences)}); "
                "choose another --out"
            )
        return True

    def log(self, message: str) -> None:
        """Append a line with the time to log.txt."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        with open(self.folder / "log.txt", "a", encoding="utf-8") as out:
            out.write(f"{stamp} {message}\n")

    def path(self, name: str) -> Path:
        """Path of a file in the run folder."""
        return self.folder / name

    def stage(self, name: str, result: type[R], compute: Callable[[], R]) -> R:
        """The result of a stage: loaded from `NAME.json` if that exists, else computed and saved there.

        Args:
            name: Name of the stage and of its file.
            result: Class of the result, which has `save(file)` and `load(file)`.
            compute: Computes the result.
        """
        file = self.path(f"{name}.json")
        if not file.exists():
            compute().save(file)
            self.log(f"{name}: done")
        return result.load(file)

    def journal(self, stage: str) -> Journal:
        """The journal of a stage: results of its finished batches."""
        return Journal(self.folder / f"{stage}.journal.jsonl")
