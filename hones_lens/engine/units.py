"""Units of work: parts of a measurement that any process with the same model can do, to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hones_lens.model import HookedVLM, takes_iterables

# Neither depends on how many work: what is in a unit decides, with its batches, how numbers are rounded.
_FEWEST_EXAMPLES = 50
_RANKED_EXAMPLES = 8  # of a task that ranks: fifty prompts each
_LAYER_BLOCKS = 4


class Done(NamedTuple):
    """What came of a unit.

    Attributes:
        values: float64, of the unit's shape and one axis more.
        counts: Numbers that are added up over units, such as those of a `Tally`.
    """

    values: np.ndarray
    counts: dict[str, int] = {}  # noqa: RUF012


@dataclass(frozen=True)
class Unit:
    """A part of a measurement.

    Attributes:
        name: Of this part, of its own in its stage; with `/` between its parts.
        axes, shape: Of the values, such as ("arm", "example"), but for their last axis.
        work: Does it, with a model; it can be pickled.
        cells: How far it brings the stage's progress bar.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    work: Callable[[HookedVLM], Done]
    cells: int


@runtime_checkable
class SharedJournal(Protocol):
    """A journal of a stage whose missing units others compute."""

    def compute(self, units: Sequence[Unit], tick: Callable[[int], object]) -> Iterator[Done]:
        """What comes of each unit, in their order.

        Args:
            units: All that are missing.
            tick: Is told of the cells of each unit when it is done, in whatever order.
        """
        ...

    def get(self, key: str, default: Any = None, /) -> Any:
        """As of a mapping."""
        ...

    def __setitem__(self, key: str, value: Any, /) -> None: ...


@runtime_checkable
class CountingJournal(Protocol):
    """A journal that is told how much is to come, for whoever looks at it from outside."""

    def expect(self, label: str, batches: int) -> None:
        """Note how many batches there are of what is called so."""
        ...


def expect(journal: object, label: str, n: int, batch_size: int) -> None:
    """Tell a journal that wants to know how many batches there will be of n examples."""
    if isinstance(journal, CountingJournal):
        journal.expect(label, -(-n // batch_size))


def check_shareable(model: HookedVLM) -> None:
    """Check that others can compute what this model would.

    Raises:
        ValueError: It has lasting hooks, which are nowhere else.
    """
    if names := model.hooked_names():
        raise ValueError(f"workers load a model of their own, without the hooks that this one has: {names}")


def chunks(n: int, batch_size: int) -> list[range]:
    """The numbers of examples in portions of whole batches: at least 50, but for the last one.

    Args:
        n: How many examples there are.
        batch_size: Examples in a batch.
    """
    batches = -(-_FEWEST_EXAMPLES // batch_size)
    size = batches * batch_size
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def ranked_pieces(portion: range) -> list[range]:
    """A portion of examples that are batches of their own, cut into eight examples each."""
    return [portion[i : i + _RANKED_EXAMPLES] for i in range(0, len(portion), _RANKED_EXAMPLES)]


@takes_iterables
def layer_blocks(layers: Sequence[int | None], n_layers: int) -> list[list[int]]:
    """Numbers of pieces of work by the quarter of the layers in which each begins.

    Args:
        layers: Where each begins; None belongs to the first quarter.
        n_layers: Of the model.
    """
    size = -(-n_layers // _LAYER_BLOCKS)
    by_block: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        by_block.setdefault((layer or 0) // size, []).append(i)
    return [by_block[block] for block in sorted(by_block)]
