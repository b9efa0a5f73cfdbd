"""Throughput of two workers against one, through the same engine, and whether their bits are equal.

Run it from the repository: `python tests/benchmarks/report_workers.py --engine local`. Both sides do the
units of a localization of the shipped model, one side after the other. Starting processes and loading models
count in the first figure; the second counts from the first part on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from hones_lens.app.runs.identity import model_identity
from hones_lens.app.workers.journal import CrewJournal
from hones_lens.app.workers.work import Crew, Order
from hones_lens.data import load_examples
from hones_lens.engine import Outcome, SweepOptions, Unit, measure
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import load_model
from hones_lens.tasks import load_task


@dataclass
class Clock:
    """A crew whose parts are timed."""

    crew: Crew
    times: list[float] = field(default_factory=list)

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done."""
        for unit in self.crew.work(order, units):
            self.times.append(time.perf_counter())
            yield unit


def crew_of(engine: str, n: int) -> Any:
    """So many workers."""
    if engine == "ray":
        from hones_lens.app.workers.on_ray import RayCrew

        return RayCrew(n)
    from hones_lens.app.workers.submitted import SubmittedCrew

    return SubmittedCrew(n, engine)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["local", "ray", "slurm"], default="local")
    parser.add_argument("--examples", type=int, default=400)
    args = parser.parse_args()
    model, task = load_model("tiny-llava", "cpu"), load_task("vqa")
    examples = load_examples("shapes", "vqa", "discovery", args.examples)
    cells = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    arms = [[], *([replace_with_other_heads_mean(*cell)] for cell in cells)]
    identity, found, figures = model_identity(model), list[list[Outcome]](), list[tuple[float, float]]()
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            folder, clock = Path(scratch), Clock(crew_of(args.engine, n))
            order = Order("tiny-llava", {"device": "cpu"}, identity, folder / "heads.parts", "run")
            start = time.perf_counter()
            journal = CrewJournal(folder / "heads.journal.jsonl", "run", clock, order)
            options = SweepOptions(progress=False, journal=journal)
            found.append(measure(model, task, examples, arms, options))
            per_part = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
            figures.append((time.perf_counter() - start, 1 / per_part))
    (one, rate), (two, double_rate) = figures
    same = all(
        a.scores == b.scores and np.array_equal(a.statistics, b.statistics)
        for a, b in zip(*found, strict=True)
    )
    units = f"{len(examples)} examples x {len(arms)} arms"
    print(f"{args.engine}, {units}: 1 worker {one:.1f} s, 2 workers {two:.1f} s, ratio {one / two:.2f}x")
    rates = f"{rate:.2f} and {double_rate:.2f}, ratio {double_rate / rate:.2f}x"
    print(f"parts a second after the first: {rates}")
    print(f"the same bits: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
