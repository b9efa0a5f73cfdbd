"""Workers as jobs of submitit: processes on this machine, or an array of Slurm's jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from hones_lens.app.workers.work import Order, do
from hones_lens.engine import Unit

_POLL_SECONDS = {"local": 0.2, "slurm": 2.0}
_MOST_IDLE_DEATHS = 3  # of a worker, in a row, without a part from it in between
_YEAR = 60 * 24 * 365  # minutes: processes on this machine have no end of their own


@dataclass(frozen=True)
class Shard:
    """The units of one worker; those whose part is there are left out, so that it may be sent again."""

    order: Order
    units: Sequence[Unit]

    def __call__(self) -> None:
        """Do what is missing."""
        do(self.order, self.units)

    def checkpoint(self, *_: Any) -> DelayedSubmission:
        """What submitit runs after the job was preempted, or ran out of time."""
        return DelayedSubmission(self)


@dataclass
class _Worker:
    """A worker: its share, the job that does it, and how often jobs died before one left a part."""

    number: int
    units: list[Unit]
    job: submitit.Job[None]
    deaths: int = 0


@dataclass(frozen=True)
class SubmittedCrew:
    """Jobs of submitit, one a worker, each with a share of the units; a job that dies is sent again.

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

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done (see `Crew`)."""
        shards = {i: share for i in range(self.n) if (share := list(units[i :: self.n]))}
        jobs = self._submit(order, shards)
        workers = [_Worker(i, shards[i], job) for i, job in jobs.items()]
        missing = list(units)
        try:
            while missing:
                running = self._running([worker.job for worker in workers])
                ready = [unit for unit in missing if order.is_done(unit)]  # after asking who still runs
                names = {unit.name for unit in ready}
                missing = [unit for unit in missing if unit.name not in names]
                yield from ready
                for worker in workers:
                    if worker.job.job_id not in running:
                        self._replace(worker, order)
                if missing and not ready:
                    time.sleep(_POLL_SECONDS[self.cluster])
        except BaseException:  # also where nobody waits for the rest
            for worker in workers:
                worker.job.cancel(check=False)
            raise
        finally:
            if self.cluster == "local":  # no process is left behind
                for worker in workers:
                    worker.job.wait()

    def _replace(self, worker: _Worker, order: Order) -> None:
        """Send what a job that has ended left undone; none where nothing is left.

        Raises:
            RuntimeError: It failed, or died several times before it did anything.
        """
        left = [unit for unit in worker.units if not order.is_done(unit)]
        worker.deaths = worker.deaths + 1 if len(left) == len(worker.units) else 0
        worker.units = left
        if not left:
            return  # it has done its share
        failed = worker.job.paths.result_pickle.exists()
        if failed or worker.deaths >= _MOST_IDLE_DEATHS:
            last = _last_line(worker.job.stderr())
            raise RuntimeError(
                f"a worker {'failed' if failed else f'died {worker.deaths} times'} at unit {left[0].name}"
                f"{last and f': {last}'}; its log: {worker.job.paths.stderr}"
            )
        worker.job = self._submit(order, {worker.number: left})[worker.number]

    def _submit(self, order: Order, shards: Mapping[int, Sequence[Unit]]) -> dict[int, submitit.Job[None]]:
        """Jobs for shares by the number of their worker; on Slurm one array of them."""
        if self.cluster == "local":
            with _stderr_in(order.folder / "jobs" / "processes.log"):
                return {
                    i: self._executor(order, i).submit(Shard(order, share)) for i, share in shards.items()
                }
        executor = self._executor(order, 0)
        with executor.batch():
            jobs = {i: executor.submit(Shard(order, share)) for i, share in shards.items()}
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

    def _running(self, jobs: Sequence[submitit.Job[None]]) -> set[str]:
        """Ids of the jobs that wait or run; Slurm is asked for its queue, since accounting may be off."""
        if self.cluster == "local":
            return {job.job_id for job in jobs if not job.done()}
        command = ["squeue", "--noheader", "--array", "--format=%i"]
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


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
