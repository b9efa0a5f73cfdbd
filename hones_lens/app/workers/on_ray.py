"""Workers as Ray's actors: on this machine, or on a cluster that Ray runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the net
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from hones_lens.app.workers.work import Order, do
from hones_lens.engine import Unit


class _Actor:
    """A process that holds the model from its first unit on."""

    def do(self, order: Order, unit: Unit) -> Unit:
        do(order, [unit])
        return unit


@dataclass(frozen=True)
class RayCrew:
    """Actors, one a worker; one that dies is started again, and its unit with it.

    Attributes:
        n: How many.
        gpus: Whether each has a GPU of its own.
        threads: Processors of each.
    """

    n: int
    gpus: bool = False
    threads: int = 1

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done (see `Crew`)."""
        if units:
            pool: Any = ActorPool(self._actors)
            try:
                yield from pool.map_unordered(lambda actor, unit: actor.do.remote(order, unit), list(units))
            except RayTaskError as error:
                raise RuntimeError(f"a worker failed: {error.cause}") from error

    @cached_property
    def _actors(self) -> list[Any]:
        """The actors, which live as long as the crew.

        Raises:
            ValueError: Ray's machines have too few processors or GPUs.
        """
        if not ray.is_initialized():
            ray.init(
                address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, logging_level=logging.WARNING
            )
        wanted = {"CPU": self.threads, "GPU": 1 if self.gpus else 0}
        there = ray.cluster_resources()
        for name, each in wanted.items():
            if self.n * each > there.get(name, 0):
                raise ValueError(
                    f"{self.n} workers need {self.n * each} {name}s, and Ray has {there.get(name, 0):.0f}"
                )
        options: dict[str, Any] = {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"]}
        # Restarts alone would lose the unit that was under way.
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_Actor)
        return [actor.remote() for _ in range(self.n)]
