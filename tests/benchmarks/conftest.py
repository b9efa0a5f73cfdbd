"""Every benchmark measures both sides in turn and prints their ratio at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

ROUNDS = 5
_LINES: list[str] = []


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_num_threads(torch.get_num_threads())
    with torch.no_grad():
        yield


@pytest.fixture
def compare(benchmark) -> Callable[..., float]:
    """Time two sides in turn, after a call of each that does not count, and print the median ratio.

    `compare(name, slow, fast, bar)`: each side is a function and the number of units that it does.
    """

    def run(
        name: str,
        slow: tuple[Callable[[], object], float],
        fast: tuple[Callable[[], object], float],
        bar: str,
        rounds: int = ROUNDS,
    ) -> float:
        times: dict[str, list[float]] = {"slow": [], "fast": []}

        def timed(which: str, side: tuple[Callable[[], object], float]) -> None:
            started = time.perf_counter()
            side[0]()
            times[which].append((time.perf_counter() - started) / side[1])

        slow[0](), fast[0]()
        benchmark.pedantic(
            lambda: timed("fast", fast), setup=lambda: timed("slow", slow), rounds=rounds, warmup_rounds=0
        )
        ratios = sorted(a / b for a, b in zip(times["slow"], times["fast"], strict=True))
        middle = {which: 1e3 * statistics.median(values) for which, values in times.items()}
        ratio = statistics.median(ratios)
        benchmark.extra_info.update(ratio=ratio, low=ratios[0], high=ratios[-1], **middle)
        _LINES.append(
            f"| {name} | {middle['slow']:.3g} | {middle['fast']:.3g} | {ratio:.3g}× "
            f"({ratios[0]:.3g}–{ratios[-1]:.3g}) | {bar} |"
        )
        return ratio

    return run


@pytest.fixture
def note() -> Callable[[str], None]:
    """Print a line at the end."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section(f"ratios, {torch.get_num_threads()} threads, medians of {ROUNDS} (range)")
    for line in (
        "| work | other side, ms | ours, ms | ratio | bar |",
        "| --- | --- | --- | --- | --- |",
        *_LINES,
    ):
        terminalreporter.write_line(line)
