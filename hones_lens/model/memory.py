"""How much memory may be used at once, and smaller parts where it does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")
U = TypeVar("U")
_SHARE = 0.4  # of what is free
_BOUND: ContextVar[float | None] = ContextVar("memory budget", default=None)


@contextmanager
def bounded_by(gigabytes: float | None) -> Generator[None]:
    """Inside, everything that bounds its memory keeps to so many GB; None changes nothing.

    Raises:
        ValueError: A budget that is not above zero.
    """
    if gigabytes is None:
        yield
        return
    token = _BOUND.set(_checked(gigabytes))
    try:
        yield
    finally:
        _BOUND.reset(token)


def _checked(gigabytes: float) -> float:
    if not gigabytes > 0:
        raise ValueError(f"the memory budget must be above 0 GB, not {gigabytes}")
    return gigabytes


class Allowance:
    """Memory for what runs at once.

    Args:
        device: Whose memory.
        gigabytes: How much; default that of `bounded_by`, else two fifths of what is free now.

    Raises:
        ValueError: A budget that is not above zero.
    """

    def __init__(self, device: torch.device, gigabytes: float | None = None):
        given = _BOUND.get() if gigabytes is None else _checked(gigabytes)
        self.device = device
        self.bytes = _SHARE * free_bytes(device) if given is None else given * 1e9
        self._halved = 0

    def in_parts(
        self, items: Sequence[T], most: Callable[[Sequence[T]], int], run: Callable[[Sequence[T]], U]
    ) -> Iterator[tuple[Sequence[T], U]]:
        """Run items in parts; a part that runs out of memory is run again, in parts of half the size.

        Args:
            items: What to run, in this order.
            most: How many of the items that are left fit at once; one is run in any case.
            run: Runs a part, which may begin anew.

        Yields:
            Each part, and what came of it.

        Raises:
            RuntimeError: A single item that runs out of memory, or another error.
        """
        start = 0
        while start < len(items):
            rest = items[start:]
            limit = most(rest)
            part = rest[: max(1, limit >> self._halved)]
            out = _unless_out_of_memory(run, part)
            if out is None:
                while max(1, limit >> self._halved) > len(part) // 2:
                    self._halved += 1
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield part, out.pop()
            start += len(part)


def _unless_out_of_memory(run: Callable[[Sequence[T]], U], part: Sequence[T]) -> list[U] | None:
    """What comes of a part; None where memory ran out, once the error lets go of what it held."""
    try:
        return [run(part)]
    except RuntimeError as error:
        if len(part) == 1 or not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory, on a GPU or on a CPU."""
    messages = ("not enough memory", "can't allocate memory")  # PyTorch's words on a CPU
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device; on a CPU without swapping, what files are cached in among them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
