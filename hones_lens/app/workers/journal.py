"""A journal whose missing units a crew of workers does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hones_lens.app.runs.journal import Journal
from hones_lens.app.workers.parts import read_part
from hones_lens.app.workers.work import Crew, Order
from hones_lens.engine import Done, Unit


class CrewJournal(Journal):
    """A journal that has what is missing computed.

    Args:
        file: Path of the journal.
        run: The identity of the run folder.
        crew: Who computes.
        order: What to load, and where parts go.
    """

    def __init__(self, file: Path, run: str, crew: Crew, order: Order):
        super().__init__(file, run)
        self._crew, self._order = crew, order

    def compute(self, units: Sequence[Unit], tick: Callable[[int], object]) -> Iterator[Done]:
        """What comes of each unit (see `SharedJournal`); parts that are there are only read."""
        waiting = {unit.name: unit for unit in units if not self._order.is_done(unit)}
        tick(sum(unit.cells for unit in units if unit.name not in waiting))
        finished = self._crew.work(self._order, list(waiting.values()))
        for unit in units:
            while unit.name in waiting:
                done = next(finished)
                del waiting[done.name]
                tick(done.cells)
            if not waiting:
                next(finished, None)  # the crew's own end
            yield read_part(self._order.part(unit), unit, self._order.run)
