"""Options that select the examples of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hones_lens.data import Example, load_examples, reads_files
from hones_lens.engine import Fault, as_task, usable_examples
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task, task_of_examples

# Examples for discovery and for the held-out test; ranking fifty candidates is fifty prompts.
DEFAULT_SIZES = {False: (420, 84), True: (16, 12)}
DEV_SIZES = {False: 210, True: 24}
# Options of `load_examples` that say how files are read.
FILE_OPTIONS = ("data_file", "image_dir", "on_error", "encoding", "allow_outside", "allow_large_pictures")


@dataclass(frozen=True)
class DataChoice:
    """The examples of a run: data set, files, seed, splits and their sizes.

    Splits are names, or split files of the data set (see `load_examples`). With a model, examples from files
    are checked against it when a split is first asked for (see `usable_examples`), before anything is
    computed; what is left out is left out everywhere.
    """

    dataset: str = "shapes"
    data_file: str | None = None
    image_dir: str | None = None
    seed: int = 3407
    discovery_split: str = "discovery"
    dev_split: str = "dev"
    held_out: str = "test"
    n_discovery: int | None = None
    n_dev: int | None = None
    n_held_out: int | None = None
    on_error: str = "raise"
    encoding: str = "utf-8"
    allow_outside: bool = False
    allow_large_pictures: bool = False
    model: HookedVLM | None = field(default=None, compare=False, repr=False)
    # Splits that were read and checked; shared by choices that were made of another by `replace`.
    checked: dict[tuple[Any, ...], tuple[list[Example], tuple[Fault, ...]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def label(self) -> str:
        """The data set's name, or the stem of its file, for use in a path."""
        return self.dataset if self.dataset.replace("-", "").isalnum() else Path(self.dataset).stem

    def discovery(self, task: str | Task) -> list[Example]:
        """The examples on which heads and neurons are selected."""
        return self._load(task, self.discovery_split, self.n_discovery, DEFAULT_SIZES[as_task(task).ranks][0])

    def dev(self, task: str | Task) -> list[Example]:
        """The examples on which scales are learned and chosen."""
        return self._load(task, self.dev_split, self.n_dev, DEV_SIZES[as_task(task).ranks])

    def test(self, task: str | Task) -> list[Example]:
        """The held-out examples on which results are measured.

        Raises:
            ValueError: The held-out split is the discovery split.
        """
        if self.held_out == self.discovery_split:
            raise ValueError(
                "neurons can't be judged on the split that selected them: choose another --split"
            )
        return self._load(task, self.held_out, self.n_held_out, DEFAULT_SIZES[as_task(task).ranks][1])

    def _load(self, task: str | Task, split: str, asked: int | None, default: int) -> list[Example]:
        known, limit = as_task(task), default if asked is None else asked
        key = (*self._source, known.name, split, limit)
        if key not in self.checked:
            examples, faults = self._read(known, split, limit), ()
            say_if_fewer(len(examples), asked, f"{known.name} examples of {split!r} in {self.label}")
            if self.model is not None and reads_files(self.dataset):
                examples, faults = usable_examples(self.model, known, examples, self.on_error)
            self.checked[key] = (examples, faults)
        return self.checked[key][0]

    def left_out(self, task: str | Task) -> dict[str, list[dict[str, str]]]:
        """By split asked for, which of a task's examples were left out, and why; of splits where any were."""
        left_out: dict[str, list[dict[str, str]]] = {}
        for (*source, name, split, _), (_, faults) in self.checked.items():
            if faults and (*source, name) == (*self._source, as_task(task).name):
                left_out.setdefault(split, []).extend(fault._asdict() for fault in faults)
        return left_out

    @property
    def _source(self) -> tuple[Any, ...]:
        return self.dataset, self.seed, *self._files.values()

    @property
    def _files(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FILE_OPTIONS}

    def _read(self, known: Task, split: str, limit: int) -> list[Example]:
        kind = task_of_examples(known, self.dataset, self.data_file)
        return load_examples(self.dataset, kind, split, limit, self.seed, **self._files)


def say_if_fewer(found: int, asked: int | None, what: str) -> None:
    """Say on stderr that there are fewer than were asked for, if any number was."""
    if asked is not None and found < asked:
        print(f"hones: {found:,} {what}, not the {asked:,} asked for: all are used", file=sys.stderr)
