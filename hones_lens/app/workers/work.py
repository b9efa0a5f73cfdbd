"""What every worker does, whoever started it: load the model once, do units, leave parts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from hones_lens.app.runs.identity import model_identity
from hones_lens.app.workers.parts import part_file, write_part
from hones_lens.engine import Unit
from hones_lens.model import HookedVLM, bounded_by, load_model


@dataclass(frozen=True)
class Order:
    """A stage's order to workers; it can be sent to other processes.

    Attributes:
        model: Name or folder of the model, as for `load_model`.
        options: `device`, `dtype` and the other keywords of `load_model`.
        identity: What `model_identity` says of the model of the run.
        folder: Where parts go; on a disk that all workers share.
        run: The identity of the run folder.
        memory_budget: GB for what runs at once; None: two fifths of what is free.
        threads: Of a worker on a CPU; with other numbers of threads, results are rounded otherwise.
        directory: Where relative paths start.
    """

    model: str
    options: Mapping[str, Any]
    identity: Mapping[str, str]
    folder: Path
    run: str
    threads: int = 1
    memory_budget: float | None = None
    directory: Path = field(default_factory=Path.cwd)

    def part(self, unit: Unit) -> Path:
        """Where the part of a unit lies."""
        return part_file(self.folder, unit)

    def is_done(self, unit: Unit) -> bool:
        """Whether the part of a unit is there."""
        return self.part(unit).exists()


class Crew(Protocol):
    """Workers under one engine."""

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done; gives each as it is done, in whatever order.

        Raises:
            RuntimeError: A unit can't be done; says why, and where the worker's log is.
        """
        ...


def do(order: Order, units: Sequence[Unit]) -> None:
    """Do units whose part is missing.

    Raises:
        ValueError: The model is not the one of the run; names what differs.
    """
    missing = [unit for unit in units if not order.is_done(unit)]
    if not missing:
        return
    os.chdir(order.directory)
    torch.set_num_threads(order.threads)
    model = _model_of(order)
    for unit in missing:
        try:
            with bounded_by(order.memory_budget):
                done = unit.work(model)
        except Exception as error:
            raise RuntimeError(f"unit {unit.name}: {error}") from error
        write_part(order.part(unit), unit, done, order.run)


_MODELS: dict[str, HookedVLM] = {}


def _model_of(order: Order) -> HookedVLM:
    """The model of the run, loaded once a process."""
    key = repr((order.model, dict(order.options), dict(order.identity)))
    if key not in _MODELS:
        model = load_model(order.model, **order.options)
        found = model_identity(model)
        if differing := [name for name, value in order.identity.items() if found.get(name) != value]:
            raise ValueError(f"a worker's model differs from the run's in: {', '.join(differing)}")
        _MODELS[key] = model
    return _MODELS[key]
