"""The journal of a stage: what a killed run had finished of it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hones_lens.results import naming, replaced_atomically

_files: Any = safetensors.torch  # its types are partly unknown
EXPECTED = "batches of "  # how keys of such numbers begin
TENSORS = ".tensors.safetensors"  # how the names of their files end
_FAST = 1.0  # seconds; tensors that take longer to write are not written after each batch
_SHARE = 0.1  # of the time that may go into writing those


class Journal(UserDict):
    """Results of finished batches, one JSON line each: setting a key writes it to the disk.

    A line is `[key, value, checksum]`; the checksum is of key and value, of the run and of the stage.
    A killed run loses at most the current batch: an incomplete last line is dropped. Tensors to which batches
    add (`engine.resumed_batches`) are in a safetensors file for each key, which has the same in its header.

    Args:
        file: Path of the journal; its name says the stage.
        run: The identity of the run folder.

    Raises:
        ValueError: A line is damaged, or of another run or stage; names file and line.
    """

    def __init__(self, file: Path, run: str = ""):
        super().__init__()
        self.file, self._run = file, run
        self._wrote: dict[
            str, tuple[float, float]
        ] = {}  # by key: when tensors were written, and for how long
        if file.exists():
            self._read()

    def _read(self) -> None:
        content = self.file.read_bytes()
        complete = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:complete].split(b"\n")[:-1], start=1):
            try:
                key, value, checksum = json.loads(line.decode("utf-8"))
                if checksum != self._checksum(key, value):
                    raise ValueError("another checksum")
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.file}, line {number}, is damaged, or of another run or stage ({error}); "
                    "delete the file to measure its batches again"
                ) from error
            self.data[key] = value
        if complete < len(content):
            os.truncate(self.file, complete)

    def _checksum(self, key: str, value: Any) -> str:
        text = json.dumps([self._run, self.file.name, key, value], allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def expect(self, label: str, batches: int) -> None:
        """Note how many batches there are of what is called so, for `hones runs`."""
        if self.get(f"{EXPECTED}{label}") != batches:
            self[f"{EXPECTED}{label}"] = batches

    def __setitem__(self, key: str, value: Any) -> None:
        line = json.dumps([key, value, self._checksum(key, value)], allow_nan=False)
        with naming(self.file), open(self.file, "ab") as out:
            before = out.tell()
            try:
                out.write(line.encode() + b"\n")
                out.flush()
                os.fsync(out.fileno())
            except OSError:  # a full disk: no part of a line stays before the next one
                os.truncate(self.file, before)
                raise
        self.data[key] = value

    def keep_tensors(self, key: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that the first `done` examples are in (see `engine.TensorJournal`).

        Where that takes more than a second, it is done so often that it takes a tenth of the time.
        """
        started = time.monotonic()
        wrote_at, took = self._wrote.get(key, (0.0, 0.0))
        if took > _FAST and started - wrote_at < took / _SHARE:
            return
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"key": key, "done": str(done), "checksum": self._tensors_checksum(key, done, held)}
        file = self._tensors_file(key)
        with replaced_atomically(file) as partial:
            try:
                _files.save_file(held, partial, header)
            except SafetensorError as error:  # of the system: a full disk, say
                raise OSError(f"{file} can't be written: {error}") from error
        now = time.monotonic()
        self._wrote[key] = (now, now - started)

    def find_tensors(self, key: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """What `keep_tensors` last wrote under a key.

        Raises:
            ValueError: The file is damaged, or of another run or stage.
        """
        file = self._tensors_file(key)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as content:
                opened: Any = content
                header = cast("dict[str, str]", opened.metadata() or {})
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            done = int(header.get("done", ""))
            if header.get("checksum") != self._tensors_checksum(key, done, tensors):
                raise ValueError("another checksum")
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged, or of another run or stage ({error}); "
                "delete it to compute its batches again"
            ) from error
        return done, tensors

    @property
    def _stage(self) -> str:
        return self.file.name.removesuffix(".journal.jsonl")

    def _tensors_file(self, key: str) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in key)
        return self.file.with_name(f"{self._stage}.{name}{TENSORS}")

    def _tensors_checksum(self, key: str, done: int, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.blake2b(json.dumps([self._run, self._stage, key, done]).encode(), digest_size=12)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()
