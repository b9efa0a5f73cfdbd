"""Throughput of two workers against one, through the same engine, and whether their bits are equal.

Run it from the repository: `python tests/benchmarks/report_workers.py --engine local`. Both sides do the
units of a localization of the shipped model, in turn, several times. "Of the clock" is from the start of the
first unit to the end of the last one, which leaves out processes that start and models that load; the best
round of each side counts. "Of the processors" is the time of the busier worker's processor, which the clock
would show on a machine where nothing else runs; the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from hones_lens.app.runs.identity import model_identity
from hones_lens.app.workers.journal import CrewJournal
from hones_lens.app.workers.work import Crew, Order
from hones_lens.data import load_examples
from hones_lens.engine import Done, Outcome, SweepOptions, Unit, measure
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import HookedVLM, load_model
from hones_lens.tasks import load_task


@dataclass(frozen=True)
class Timed:
    """Work that notes when it was done, by whom, and what its processor took."""

    work: Any
    notes: Path

    def __call__(self, model: HookedVLM) -> Done:
        start, before = time.time(), time.process_time()
        done = self.work(model)
        note = {"worker": os.getpid(), "start": start, "end": time.time()}
        note["processor"] = time.process_time() - before
        (self.notes / f"{uuid.uuid4().hex}.json").write_text(json.dumps(note))
        return done


@dataclass(frozen=True)
class Clock:
    """A crew whose units are timed."""

    crew: Crew
    notes: Path

    def work(self, order: Order, units: Sequence[Unit]) -> Iterator[Unit]:
        """Have units done."""
        self.notes.mkdir()
        yield from self.crew.work(order, [replace(u, work=Timed(u.work, self.notes)) for u in units])

    def seconds(self) -> tuple[float, float]:
        """Of the clock, and of the busier worker's processor."""
        notes = [json.loads(file.read_text()) for file in self.notes.glob("*.json")]
        busy = Counter[int]()
        for note in notes:
            busy[note["worker"]] += note["processor"]
        return max(n["end"] for n in notes) - min(n["start"] for n in notes), max(busy.values())


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
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, task = load_model("tiny-llava", "cpu"), load_task("vqa")
    examples = load_examples("shapes", "vqa", "discovery", args.examples)
    cells = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    arms = [[], *([replace_with_other_heads_mean(*cell)] for cell in cells)]
    identity, found = model_identity(model), list[list[Outcome]]()
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for n in (1, 2) * args.rounds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            clock = Clock(crew_of(args.engine, n), folder / "notes")
            order = Order("tiny-llava", {"device": "cpu"}, identity, folder / "heads.parts", "run")
            journal = CrewJournal(folder / "heads.journal.jsonl", "run", clock, order)
            options = SweepOptions(progress=False, journal=journal)
            found.append(measure(model, task, examples, arms, options))
            seconds[n].append(clock.seconds())
            del journal, clock, options
    first, *others = found
    same = all(
        a.scores == b.scores and np.array_equal(a.statistics, b.statistics)
        for other in others
        for a, b in zip(first, other, strict=True)
    )
    print(f"{args.engine}, {len(examples)} examples x {len(arms)} arms, {args.rounds} rounds in turn")
    for name, of, column in (("the clock", min, 0), ("the processors", statistics.median, 1)):
        one, two = (of(times[column] for times in seconds[n]) for n in (1, 2))
        print(f"of {name}: 1 worker {one:.1f} s, 2 workers {two:.1f} s, ratio {one / two:.2f}x")
    print(f"load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    print(f"the same bits: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
