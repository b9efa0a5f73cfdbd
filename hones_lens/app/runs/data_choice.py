"""Options that select the examples of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hones_lens.data import Example, load_examples
from hones_lens.engine import as_task
from hones_lens.tasks import Task, task_of_examples

# Examples for discovery and for the held-out test; ranking fifty candidates is fifty prompts.
DEFAULT_SIZES = {False: (420, 84), True: (16, 12)}
DEV_SIZES = {False: 210, True: 24}


@dataclass(frozen=True)
class DataChoice:
    """The examples of a run: data set, files, seed, splits and their sizes.

    Splits are names, or split files of the data set (see `load_examples`).
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

    @property
    def label(self) -> str:
        """The data set's name, or the stem of its file, for use in a path."""
        return self.dataset if self.dataset.replace("-", "").isalnum() else Path(self.dataset).stem

    def discovery(self, task: str | Task) -> list[Example]:
        """The examples on which heads and neurons are selected."""
        default = DEFAULT_SIZES[as_task(task).ranks][0]
        return self._load(task, self.discovery_split, self.n_discovery or default)

    def dev(self, task: str | Task) -> list[Example]:
        """The examples on which scales are learned and chosen."""
        return self._load(task, self.dev_split, self.n_dev or DEV_SIZES[as_task(task).ranks])

    def test(self, task: str | Task) -> list[Example]:
        """The held-out examples on which results are measured.

        Raises:
            ValueError: The held-out split is the discovery split.
        """
        if self.held_out == self.discovery_split:
            raise ValueError(
                "neurons can't be judged on the split that selected them: choose another --split"
            )
        return self._load(task, self.held_out, self.n_held_out or DEFAULT_SIZES[as_task(task).ranks][1])

    def _load(self, task: str | Task, split: str, limit: int) -> list[Example]:
        return load_examples(
            self.dataset,
            task_of_examples(as_task(task), self.dataset, self.data_file),
            split,
            limit,
            self.seed,
            data_file=self.data_file,
            image_dir=self.image_dir,
            on_error=self.on_error,
            encoding=self.encoding,
        )
