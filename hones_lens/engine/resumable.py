"""Tensors to which batches of examples add, kept in a journal, so that a killed stage takes them up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from hones_lens.data import Example
from hones_lens.model import takes_iterables


@runtime_checkable
class TensorJournal(Protocol):
    """A journal that has a way of its own to keep tensors, without a copy of them in memory."""

    def keep_tensors(self, key: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that the first `done` examples are in, in place of those before."""
        ...

    def find_tensors(self, key: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """What was last kept under a key: the number of examples in it, and the tensors."""
        ...


@takes_iterables
def resumed_batches(
    examples: Sequence[Example],
    batch_size: int,
    tensors: Mapping[str, Tensor],
    journal: MutableMapping[str, Any] | None,
    key: str,
) -> Iterator[tuple[int, Sequence[Example]]]:
    """The batches of examples that are not in the tensors yet, each with the number of its first example.

    The caller adds a batch to the tensors, in place, before it asks for the next. They are then kept in the
    journal; a later call with the same key puts what was kept into the tensors, and goes on after it.

    Args:
        examples: All of them.
        batch_size: Examples a batch.
        tensors: By name; zeros at first, or what else the stage begins with.
        journal: Where they are kept; None: nowhere.
        key: Of these tensors in the journal.

    Raises:
        ValueError: The journal holds tensors of other names, shapes or types, or of more examples.
    """
    done = 0 if journal is None else _resume(len(examples), tensors, journal, key)
    for start in range(done, len(examples), batch_size):
        stop = min(start + batch_size, len(examples))
        yield start, examples[start:stop]
        if journal is not None:
            _keep(journal, key, stop, tensors)


def _keep(journal: MutableMapping[str, Any], key: str, done: int, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(journal, TensorJournal):
        journal.keep_tensors(key, done, tensors)
    else:
        journal[key] = (done, {name: tensor.clone() for name, tensor in tensors.items()})


def _resume(total: int, tensors: Mapping[str, Tensor], journal: MutableMapping[str, Any], key: str) -> int:
    """Put what was kept into the tensors; the number of examples that are in it."""
    found = journal.find_tensors(key) if isinstance(journal, TensorJournal) else journal.get(key)
    if found is None:
        return 0
    done, kept = cast("tuple[int, Mapping[str, Tensor]]", found)
    kinds = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (kept, tensors)]
    if kinds[0] != kinds[1] or done > total:
        raise ValueError(
            f"the journal has something else under {key!r}: {done} examples in {_described(kept)}, not up to "
            f"{total} in {_described(tensors)}"
        )
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])
    return done


def _described(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
