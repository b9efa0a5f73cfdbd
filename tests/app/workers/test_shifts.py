"""A worker of submitit takes up further shares, and ends when none comes in time or its crew is gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("submitit")

from submitit.core.utils import cloudpickle_dump, pickle_load

from hones_lens.app.workers import submitted
from hones_lens.app.workers.submitted import Shift

pytestmark = pytest.mark.wrong_types  # words stand for orders and units


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What was done: no model is loaded."""
    found: list[tuple[Any, Any]] = []
    monkeypatch.setattr(submitted, "do", lambda order, units: found.append((order, units)))
    return found


def shift(desk: Path) -> Shift:
    return Shift("heads", ["a"], desk, worker=1, number=4, poll=0.01)


def test_further_shares_are_done_in_turn_until_none_comes(
    done: list[tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitted, "_PATIENCE_SECONDS", 0.05)
    for name, share in (("1-5", ("masking", ["b"])), ("1-6", ("steering", ["c"])), ("0-7", ("other", []))):
        cloudpickle_dump(share, tmp_path / f"{name}.pkl")
    worker = shift(tmp_path)
    worker()
    assert done == [("heads", ["a"]), ("masking", ["b"]), ("steering", ["c"])]
    cloudpickle_dump(worker.checkpoint(), tmp_path / "again.pkl")
    again = pickle_load(tmp_path / "again.pkl").function
    assert (again.order, again.units, again.number) == ("steering", ["c"], 6)


def test_a_worker_whose_crew_is_gone_ends_at_once(
    done: list[tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        shutil.rmtree(desk)

    monkeypatch.setattr(submitted.time, "sleep", sleep)
    shift(desk)()
    assert done == [("heads", ["a"])] and slept == [0.01]
