"""Workers of all engines: the same bits as one process, though one of them is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from helpers import slurm

from hones_lens.app.runs.identity import model_identity
from hones_lens.app.workers.journal import CrewJournal
from hones_lens.app.workers.work import Crew, Order
from hones_lens.data import load_examples
from hones_lens.engine import Done, Outcome, SweepOptions, Unit, measure
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import HookedVLM, load_model
from hones_lens.tasks import load_task

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
MARKS = {"local": pytest.mark.exhaustive, "ray": pytest.mark.by_hand, "slurm": pytest.mark.by_hand}
ENGINES = [pytest.param(engine, marks=mark) for engine, mark in MARKS.items()]


def crew_of(engine: str) -> Any:
    if engine == "ray":
        ray = pytest.importorskip("ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # it has one of its own
        from hones_lens.app.workers.on_ray import RayCrew

        return RayCrew(2)
    pytest.importorskip("submitit")
    from hones_lens.app.workers.submitted import SubmittedCrew

    return SubmittedCrew(2, engine)


@pytest.fixture(params=ENGINES)
def crew(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crew]:
    engine = request.param
    if engine != "slurm":
        yield crew_of(engine)
        if engine == "ray":
            import ray

            ray.shutdown()
        return
    if not slurm.is_installed():
        pytest.skip("slurmctld, slurmd and munge are not installed")
    (tmp_path / "slurm").mkdir()
    with slurm.running(tmp_path / "slurm"):
        crew = crew_of(engine)
        yield crew
        crew.dismiss()


@dataclass(frozen=True)
class Deadly:
    """Work whose process is killed the first time."""

    work: Any
    marker: Path

    def __call__(self, model: HookedVLM) -> Done:
        if not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.work(model)


@dataclass(frozen=True)
class Dangerous:
    """A crew one of whose units kills a worker."""

    crew: Crew
    marker: Path

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        first, second, *others = units
        yield from self.crew.work(
            order, [first, replace(second, work=Deadly(second.work, self.marker)), *others]
        )


def measured(journal: CrewJournal | None = None) -> list[Outcome]:
    model, task = load_model("tiny-llava", "cpu"), load_task("vqa")
    examples = load_examples("shapes", "vqa", "test", 60)
    arms = [[], *([replace_with_other_heads_mean(layer, 1)] for layer in range(model.cfg.n_layers))]
    return measure(model, task, examples, arms, SweepOptions(progress=False, journal=journal))


def order_of(folder: Path) -> Order:
    identity = model_identity(load_model("tiny-llava", "cpu"))
    return Order("tiny-llava", {"device": "cpu"}, identity, folder / "heads.parts", "run")


def test_the_same_bits_as_one_process_though_a_worker_is_killed(crew: Crew, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = measured()
    finally:
        torch.set_num_threads(threads)
    order, marker = order_of(tmp_path), tmp_path / "killed"
    journal = CrewJournal(tmp_path / "heads.journal.jsonl", "run", Dangerous(crew, marker), order)
    together = measured(journal)
    assert marker.exists() and len(list(order.folder.glob("*.parquet"))) == 4
    for one, other in zip(alone, together, strict=True):
        assert one.scores == other.scores and np.array_equal(one.statistics, other.statistics)
    resumed = CrewJournal(tmp_path / "again.jsonl", "run", Idle(), order)
    assert [o.scores for o in measured(resumed)] == [o.scores for o in alone]


class Idle:
    """A crew that must not be asked: all parts are there."""

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        assert not units
        return iter(())


class Failing:
    """Work that can't be done."""

    def __call__(self, model: HookedVLM) -> Done:
        raise ZeroDivisionError("there is nothing")


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_a_unit_that_fails_is_named(engine: str, tmp_path: Path) -> None:
    unit = Unit("heads/0-50/0", ("arm",), (1,), Failing(), 1)
    with pytest.raises(RuntimeError, match=r"a worker failed.*unit heads/0-50/0: there is nothing"):
        list(crew_of(engine).work(order_of(tmp_path), [unit]))


@pytest.mark.exhaustive
def test_a_worker_with_another_model_is_refused(tmp_path: Path) -> None:
    order = order_of(tmp_path)
    other = replace(order, identity={**order.identity, "weights": "0"})
    unit = Unit("heads/0-50/0", ("arm",), (1,), Failing(), 1)
    with pytest.raises(RuntimeError, match="a worker's model differs from the run's in: weights"):
        list(crew_of("local").work(other, [unit]))
