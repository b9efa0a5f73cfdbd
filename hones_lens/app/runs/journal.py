"""The journal of a stage: what a killed run had finished of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import UserDict
from pathlib import Path
from typing import Any

from hones_lens.results import naming


class Journal(UserDict):
    """Results of finished batches, one JSON line each: setting a key writes it to the disk.

    A line is `[key, value, checksum]`; the checksum is of key and value, of the run and of the stage.
    A killed run loses at most the current batch: an incomplete last line is dropped.

    Args:
        file: Path of the journal; its name says the stage.
        run: The identity of the run folder.

    Raises:
        ValueError: A line is damaged, or of another run or stage; names file and line.
    """

    def __init__(self, file: Path, run: str = ""):
        super().__init__()
        self.file, self._run = file, run
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
