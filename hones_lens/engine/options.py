"""How a stage runs: options that every stage takes, as one object or by keyword."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from hones_lens.engine.speculation import Tally
from hones_lens.model import did_you_mean


class BatchKeywords(TypedDict, total=False):
    """Keywords of a stage that only runs batches; see `SweepOptions`."""

    batch_size: int
    progress: bool


class ResumedKeywords(BatchKeywords, total=False):
    """Keywords of a stage that runs batches and can be resumed; see `SweepOptions`."""

    journal: MutableMapping[str, Any] | None


class SweepKeywords(ResumedKeywords, total=False):
    """Keywords of a stage that sweeps; see `SweepOptions`."""

    memory_budget: float | None
    tally: Tally | None


@dataclass(frozen=True)
class SweepOptions:
    """How a stage runs; no result depends on it, but for rounding.

    A stage takes them as `options=` or each by keyword; a keyword goes before the object.

    Attributes:
        batch_size: Examples at a time, which a killed sweep loses at most. Without `options`, a stage has a
            default of its own.
        progress: Show a progress bar.
        journal: Finished batches, read and written, so that a sweep can be resumed (see `runs.Journal`).
        memory_budget: GB for activations; default: a share of what is free.
        tally: Counts what the sweep does.
    """

    batch_size: int = 32
    progress: bool = True
    journal: MutableMapping[str, Any] | None = None
    memory_budget: float | None = None
    tally: Tally | None = None

    @classmethod
    def of(
        cls,
        options: SweepOptions | None,
        keywords: Mapping[str, Any],
        *,
        unused: Sequence[str] = (),
        **defaults: Any,
    ) -> SweepOptions:
        """The options of a stage that was given an object, keywords, or both.

        Args:
            options: The object.
            keywords: What was given by keyword.
            unused: Options that the stage has no use for, of `journal`, `memory_budget` and `tally`.
            defaults: The stage's own, where no object is given.

        Raises:
            TypeError: A keyword that is no option, or an option that the stage has no use for; names it.
        """
        valid = [field.name for field in fields(cls) if field.name not in unused]
        if unknown := [name for name in keywords if name not in valid]:
            raise TypeError(
                f"unexpected keyword arguments: {', '.join(unknown)}; valid: {', '.join(valid)}"
                f"{did_you_mean(unknown[0], valid)}"
            )
        merged = replace(cls(**defaults) if options is None else options, **keywords)
        if unsupported := [name for name in unused if getattr(merged, name) is not None]:
            raise TypeError(f"options that this stage has no use for: {', '.join(unsupported)}")
        return merged

    @classmethod
    def of_batches(
        cls, options: SweepOptions | None, keywords: Mapping[str, Any], **defaults: Any
    ) -> SweepOptions:
        """As `of`, for a stage that runs batches one by one and has no use for the other options."""
        return cls.of(options, keywords, unused=("journal", "memory_budget", "tally"), **defaults)

    @classmethod
    def of_resumed(
        cls, options: SweepOptions | None, keywords: Mapping[str, Any], **defaults: Any
    ) -> SweepOptions:
        """As `of_batches`, for a stage that can be resumed."""
        return cls.of(options, keywords, unused=("memory_budget", "tally"), **defaults)

    @property
    def of_resumed_batches(self) -> ResumedKeywords:
        """`batch_size`, `progress` and `journal` as keywords."""
        return {"batch_size": self.batch_size, "progress": self.progress, "journal": self.journal}

    @property
    def of_a_batch(self) -> BatchKeywords:
        """`batch_size` and `progress` as keywords."""
        return {"batch_size": self.batch_size, "progress": self.progress}


def split_keywords(
    keywords: Mapping[str, Any], names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of these names, and the others."""
    own = set(names)
    return (
        {name: value for name, value in keywords.items() if name in own},
        {name: value for name, value in keywords.items() if name not in own},
    )
