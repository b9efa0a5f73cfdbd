"""Every benchmark measures all sides in turn, in one run, and prints their ratios at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

# Before anything imports Hugging Face's libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

ROUNDS = 5
THREADS = len(os.sched_getaffinity(0))
_LINES: list[str] = []
_NOTES: list[str] = []
Work = Callable[[], object]
Side = tuple[Work, float]  # what to run, and how many units of work that is


@pytest.fixture(autouse=True)
def _as_users_run() -> Iterator[None]:
    if os.environ.get("HONES_CHECK_SHAPES") == "1":
        raise pytest.UsageError("HONES_CHECK_SHAPES checks every call, which users don't pay for: unset it")
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        yield


@pytest.fixture
def ratios(benchmark) -> Callable[..., dict[str, np.ndarray]]:
    """Time several sides in turn, after a call of each that does not count.

    `ratios(base, sides, rounds)`: each side is a function and the number of units that it does. Gives the
    seconds a unit of every side by round, the base's under its own name "base".
    """

    def run(base: Side, sides: dict[str, Side], rounds: int) -> dict[str, np.ndarray]:
        every = {"base": base, **sides}
        times: dict[str, list[float]] = {side: [] for side in every}

        def in_turn() -> None:
            for side, (work, units) in every.items():
                started = time.perf_counter()
                work()
                times[side].append((time.perf_counter() - started) / units)

        for work, _ in every.values():
            work()
        benchmark.pedantic(in_turn, rounds=rounds, warmup_rounds=0)
        return {side: np.array(seconds) for side, seconds in times.items()}

    return run


@pytest.fixture
def speedups(ratios) -> Callable[..., None]:
    """How many times faster we are: `speedups(name, ours, others, bar)`; the bar is about the first other."""

    def run(name: str, ours: Side, others: dict[str, Side], bar: str, rounds: int = ROUNDS) -> None:
        times = ratios(ours, others, rounds)
        for side, theirs in times.items():
            if side != "base":
                _line(name, side, theirs, times["base"], theirs / times["base"], bar)
                bar = ""

    return run


@pytest.fixture
def overheads(ratios) -> Callable[..., None]:
    """What sides cost beside a base: `overheads(name, base, sides, bar)`, with "ours" first."""

    def run(name: str, base: Work, sides: dict[str, Work], bar: str, rounds: int = ROUNDS) -> None:
        times = ratios((base, 1), {side: (work, 1) for side, work in sides.items()}, rounds)
        for side in sides:
            _line(f"{name}: {side}", "HF, sdpa", times["base"], times[side], times[side] / times["base"], bar)
            bar = ""

    return run


def _line(name: str, other: str, theirs: np.ndarray, mine: np.ndarray, ratios: np.ndarray, bar: str) -> None:
    """A row of the table: median milliseconds, median ratio and its 95 % interval (bootstrap)."""
    low, high = _interval(ratios)
    _LINES.append(
        f"| {name} | {other} | {1e3 * np.median(theirs):.3g} | {1e3 * np.median(mine):.3g} | "
        f"{np.median(ratios):.3g}× [{low:.3g}, {high:.3g}] | {bar} |"
    )


def _interval(ratios: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


@pytest.fixture
def note() -> Callable[[str], None]:
    """Print a line at the end."""
    return _NOTES.append


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section(f"{THREADS} threads, medians of at least {ROUNDS} rounds [95 % interval]")
    lines = ["| work | other side | its ms | ms | ratio | bar |", "| --- | --- | --- | --- | --- | --- |"]
    for line in (*lines, *_LINES, "", *_NOTES):
        terminalreporter.write_line(line)
