"""Where the progress of learning is kept, so that a killed learning goes on after its last step."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from hones_lens.engine import TensorJournal
from hones_lens.results import read_json, write_json

SAVE_EVERY = 50
_MAX_SHOWN = 60  # characters of a setting in a message
_NUMBERS = ("a", "exp_avg", "exp_avg_sq")


@dataclass
class LearningState:
    """The state of training, as it is saved in a checkpoint.

    Attributes:
        done: Steps taken.
        a, exp_avg, exp_avg_sq: The offsets and Adam's two moments.
        sums: Of the loss and its parts over the steps of this epoch.
        history: Of the epochs that are over.
        best: The offsets that were best on dev, and their values there.
        stale: How many epochs ago that was.
    """

    done: int = 0
    a: list[float] = field(default_factory=list)
    exp_avg: list[float] = field(default_factory=list)
    exp_avg_sq: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stale: int = 0


class Checkpoint(Protocol):
    """Keeps the state of a learning every so many steps, and at the end of each epoch."""

    every: int

    def load(self) -> LearningState | None:
        """What was kept last; None if nothing was."""
        ...

    def save(self, state: LearningState) -> None:
        """Keep a state in place of the one before."""
        ...


class FileCheckpoint:
    """A checkpoint in a JSON file.

    Args:
        file: Its path.
        settings: All that decides the numbers; a checkpoint with others is refused.
        every: Steps between states.
    """

    def __init__(self, file: str | Path, settings: dict[str, Any], every: int = SAVE_EVERY):
        self.file, self.every = Path(file), every
        self.settings = json.loads(json.dumps(settings))

    def save(self, state: LearningState) -> None:
        """Write the file."""
        write_json(self.file, {"kind": "steering checkpoint", "settings": self.settings, **asdict(state)})

    def load(self) -> LearningState | None:
        """Read the file, if there is one.

        Raises:
            ValueError: It is another kind of file, or was made with other settings; names them.
        """
        if not self.file.exists():
            return None
        data = read_json(self.file, "steering checkpoint")
        saved_settings = data.pop("settings")
        differences = [
            f"{name}: {_shortened(saved_settings.get(name))} there, {_shortened(self.settings.get(name))} now"
            for name in sorted(saved_settings | self.settings)
            if saved_settings.get(name) != self.settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.file} was made with other settings ({'; '.join(differences)}); choose another file"
            )
        del data["kind"]
        return LearningState(**data)


class JournalCheckpoint:
    """A checkpoint in a stage's journal, after every step.

    Args:
        journal: The journal.
        key: Of this learning in it.
    """

    every = 1

    def __init__(self, journal: MutableMapping[str, Any], key: str):
        self._journal, self._key = journal, key

    def save(self, state: LearningState) -> None:
        """Keep the state: its numbers for each neuron as tensors, the rest as JSON."""
        rest = asdict(state)
        if not isinstance(self._journal, TensorJournal):
            self._journal[self._key] = rest
            return
        tensors = {name: torch.tensor(rest.pop(name)) for name in _NUMBERS}
        text = json.dumps(rest).encode()
        tensors["rest"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._journal.keep_tensors(self._key, state.done, tensors)

    def load(self) -> LearningState | None:
        """What was kept last; None if nothing was."""
        if not isinstance(self._journal, TensorJournal):
            kept = self._journal.get(self._key)
            return None if kept is None else LearningState(**kept)
        found = self._journal.find_tensors(self._key)
        if found is None:
            return None
        numbers: dict[str, Any] = {name: found[1][name].tolist() for name in _NUMBERS}
        return LearningState(**json.loads(bytes(found[1]["rest"].tolist())), **numbers)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
