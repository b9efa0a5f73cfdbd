"""Workers as jobs of submitit: processes on this machine, or an array of Slurm's jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import finalize

import submitit
from submitit.core.utils import cloudpickle_dump, pickle_load
from submitit.helpers import DelayedSubmission

from hones_lens.app.workers.work import Order, do
from hones_lens.engine import Unit
from hones_lens.results import replaced_atomically

_POLL_SECONDS = {"local": 0.2, "slurm": 2.0}
_PATIENCE_SECONDS = 120.0  # for which a worker without work keeps its model, and its GPU
_MOST_IDLE_DEATHS = 3  # of a worker, in a row, without a part from it in between
_YEAR = 60 * 24 * 365  # minutes: processes on this machine have no end of their own


@dataclass
class Shift:
    """What a worker does: its share of an order, and then of each further one that comes in time.

    Units whose part is there are left out, so that it may be sent again.

    Attributes:
        order, units: The share that it is at.
        desk: Folder where further shares come, as files; none come once it is gone.
        worker, number: Of the worker, and of the share that it is at.
        poll: Seconds between two looks at the desk.
    """

    order: Order
    units: Sequence[Unit]
    desk: Path
    worker: int
    number: int
    poll: float

    def __call__(self) -> None:
        """Do what is missing, until nothing more comes."""
        do(self.order, self.units)
        while self._comes():
            self.order, self.units = pickle_load(self._next)
            self.number += 1
            do(self.order, self.units)

    @property
    def _next(self) -> Path:
        return _share_file(self.desk, self.worker, self.number + 1)

    def _comes(self) -> bool:
        """Whether another share comes while it may be waited for."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while not (comes := self._next.exists()) and self.desk.exists() and time.monotonic() < give_up:
            time.sleep(self.poll)
        return comes

    def checkpoint(self, *_: Any) -> DelayedSubmission:
        """What submitit runs after the job was preempted, or ran out of time."""
        return DelayedSubmission(self)


def _share_file(desk: Path, worker: int, number: int) -> Path:
    return desk / f"{worker}-{number}.pkl"


@dataclass
class _Worker:
    """A worker.

    Attributes:
        number: Its number.
        job: The job that it is.
        units: What it has to do.
        shares: How many shares it got, over all of its jobs.
        deaths: How often jobs died before one left a part.
    """

    number: int
    job: submitit.Job[None]
    units: Sequence[Unit] = ()
    shares: int = 0
    deaths: int = 0


@dataclass
class SubmittedCrew:
    """Jobs of submitit, one a worker, each with a share of the units; a job that dies is sent again.

    They keep their model, and take up the next measurement if it comes within two minutes. When the crew goes
    away, so do they.

    Attributes:
        n: How many workers.
        cluster: `local` for processes on this machine, or `slurm`.
        gpus: Whether each worker has a GPU of its own.
        threads: Processors of each.
        parameters: Of submitit's executor, such as `{"slurm_partition": "gpu", "timeout_min": 600}`.
    """

    n: int
    cluster: str
    gpus: bool = False
    threads: int = 1
    parameters: Mapping[str, Any] | None = None
    _workers: dict[int, _Worker] = field(default_factory=dict[int, _Worker], repr=False)
    _desk: Path | None = field(default=None, repr=False)

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done (see `Crew`)."""
        missing = list(units)
        try:
            self._send(order, {i: share for i in range(self.n) if (share := missing[i :: self.n])})
            while missing:
                running = self._running()
                ready = [unit for unit in missing if order.is_done(unit)]  # after asking who still runs
                names = {unit.name for unit in ready}
                missing = [unit for unit in missing if unit.name not in names]
                yield from ready
                for worker in self._workers.values():
                    if worker.job.job_id not in running:
                        self._replace(worker, order)
                if missing and not ready:
                    time.sleep(_POLL_SECONDS[self.cluster])
        except BaseException:  # also where nobody waits for the rest
            for worker in self._workers.values():
                worker.job.cancel(check=False)
            _dismiss(None, self._workers, self.cluster)
            raise

    def dismiss(self) -> None:
        """Let workers end that would wait for more to do."""
        _dismiss(self._desk, self._workers, self.cluster)
        self._desk = None

    def _send(self, order: Order, shares: Mapping[int, Sequence[Unit]]) -> None:
        """Give workers their shares: those that still run by the desk, others as new jobs."""
        if self._desk is None and shares:
            self._desk = order.folder / "jobs" / f"desk-{uuid.uuid4().hex}"
            self._desk.mkdir(parents=True)
            finalize(self, _dismiss, self._desk, self._workers, self.cluster)
        running, new = self._running(), dict[int, Sequence[Unit]]()
        for worker in self._workers.values():
            worker.units = ()
        for number, share in shares.items():
            worker = self._workers.get(number)
            if worker is None or worker.job.job_id not in running:
                new[number] = share
                continue
            worker.units, worker.shares, worker.deaths = share, worker.shares + 1, 0
            with replaced_atomically(_share_file(self._on_desk, number, worker.shares)) as partial:
                cloudpickle_dump((order, share), partial)
        for number, job in self._submit(order, new).items():
            shares_before = self._shares_of(number)
            self._workers[number] = _Worker(number, job, new[number], shares_before + 1)

    @property
    def _on_desk(self) -> Path:
        assert self._desk is not None
        return self._desk

    def _shares_of(self, number: int) -> int:
        return self._workers[number].shares if number in self._workers else 0

    def _replace(self, worker: _Worker, order: Order) -> None:
        """Send what a job that has ended left undone; none where nothing is left.

        Raises:
            RuntimeError: It failed, or died several times before it did anything.
        """
        left = [unit for unit in worker.units if not order.is_done(unit)]
        if not left:
            worker.units = ()
            return  # it has done its share
        outcome = _outcome(worker.job)
        if outcome != "success":  # else it had stopped waiting when this share came
            worker.deaths = worker.deaths + 1 if len(left) == len(worker.units) else 0
        worker.units = left
        if outcome == "error" or worker.deaths >= _MOST_IDLE_DEATHS:
            last, failed = _last_line(worker.job.stderr()), outcome == "error"
            raise RuntimeError(
                f"a worker {'failed' if failed else f'died {worker.deaths} times'} at unit {left[0].name}"
                f"{last and f': {last}'}; its log: {worker.job.paths.stderr}"
            )
        worker.job = self._submit(order, {worker.number: left})[worker.number]
        worker.shares += 1

    def _submit(self, order: Order, shares: Mapping[int, Sequence[Unit]]) -> dict[int, submitit.Job[None]]:
        """Jobs for shares by the number of their worker; on Slurm one array of them."""
        poll = _POLL_SECONDS[self.cluster]
        shifts = {
            i: Shift(order, share, self._on_desk, i, self._shares_of(i) + 1, poll)
            for i, share in shares.items()
        }
        if self.cluster == "local":
            with _stderr_in(order.folder / "jobs" / "processes.log"):
                return {i: self._executor(order, i).submit(shift) for i, shift in shifts.items()}
        if not shifts:
            return {}
        executor = self._executor(order, 0)
        with executor.batch():
            jobs = {i: executor.submit(shift) for i, shift in shifts.items()}
        return jobs

    def _executor(self, order: Order, number: int) -> submitit.AutoExecutor:
        executor = submitit.AutoExecutor(folder=order.folder / "jobs", cluster=self.cluster)
        given: dict[str, Any] = {"name": "hones", "timeout_min": _YEAR, "cpus_per_task": self.threads}
        if self.gpus:
            given["gpus_per_node"] = 1
            if self.cluster == "local":
                given["local_visible_gpus"] = [number]
        if self.cluster == "slurm":
            del given["timeout_min"]  # the partition's
        executor.update_parameters(**given | dict(self.parameters or {}))
        return executor

    def _running(self) -> set[str]:
        """Ids of the jobs that wait or run; Slurm is asked for its queue, since accounting may be off."""
        if self.cluster == "local":
            return {worker.job.job_id for worker in self._workers.values() if not worker.job.done()}
        if not self._workers:
            return set()
        command = ["squeue", "--noheader", "--array", "--format=%i"]
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def _dismiss(desk: Path | None, workers: dict[int, _Worker], cluster: str) -> None:
    """Let workers end; of those on this machine, no process is left behind."""
    if desk is not None:
        shutil.rmtree(desk, ignore_errors=True)
    if cluster == "local":
        for worker in workers.values():
            worker.job.wait()
    workers.clear()


def _outcome(job: submitit.Job[None]) -> str:
    """`success` or `error` of a job that has ended by itself; empty of one that died."""
    try:
        return pickle_load(job.paths.result_pickle)[0]
    except FileNotFoundError:
        return ""


@contextmanager
def _stderr_in(file: Path) -> Generator[None]:
    """Have processes that are started inside write their errors to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(2)
    try:
        with open(file, "ab") as out:
            os.dup2(out.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _last_line(log: str | None) -> str:
    lines = [line for line in (log or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def require_slurm() -> None:
    """Raise ValueError where jobs can't be sent to Slurm."""
    if shutil.which("sbatch") is None:
        raise ValueError("--engine slurm: this machine has no sbatch; run it where jobs are sent from")
