"""Base class of the results of all stages: printing, plots, tables, saving and loading."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd

from hones_lens.results.arrays import load_json, save_json
from hones_lens.results.codec import from_json, to_json

R = TypeVar("R", bound="Result")


MOST_ROWS = 50  # of a table in a notebook or terminal


def html_table(frame: pd.DataFrame, rows: int = MOST_ROWS, total: int | None = None) -> str:
    """The first rows of a table as HTML, at most 50, and what is left out.

    Args:
        frame: The table.
        rows: How many rows are wanted.
        total: Of how many they are said to be; default: of the table's own.
    """
    shown, total = frame.head(min(rows, MOST_ROWS)), len(frame) if total is None else total
    more = f"<p>{len(shown)} of {total:,} rows; all: to_dataframe()</p>" if len(shown) < total else ""
    return shown.to_html(index=False) + more


class Plottable:
    """Base of classes that print as their `str` and have a figure in `hones_lens.viz`.

    Dataclasses that derive from it are declared with `repr=False`, so that Jupyter shows their `str`.
    """

    def __repr__(self) -> str:
        return str(self)

    def plot(self, *args: Any, **options: Any) -> Any:
        """The figure of this result.

        Args:
            args, options: Passed to the function that is registered with `hones_lens.viz.draw` for the class.

        Returns:
            A matplotlib figure.

        Raises:
            TypeError: There is no figure for the class.
        """
        return importlib.import_module("hones_lens.viz").draw(self, *args, **options)


class Result(Plottable):
    """Base of the dataclasses that stages return.

    A subclass sets `kind` and defines `to_dataframe`, and `__str__` where the table is not enough; its figure
    is registered with `hones_lens.viz.draw`. Its fields
    are of types that `results.codec` can write: numbers, strings, tensors, tuples, mappings, named tuples,
    dataclasses.

    Attributes:
        kind: The value of `kind` in saved files.
    """

    kind: ClassVar[str]

    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def __str__(self) -> str:
        frame = self.to_dataframe()
        more = f"\n({MOST_ROWS} of {len(frame):,} rows)" if len(frame) > MOST_ROWS else ""
        return frame.head(MOST_ROWS).to_string(index=False) + more

    def _repr_html_(self) -> str:
        return html_table(self.to_dataframe())

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {"kind": self.kind, **to_json(self)}

    @classmethod
    def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
        """Rebuild the result from the output of `to_dict`, also after a round trip through JSON.

        Raises:
            ValueError: A field is missing.
        """
        return from_json(cls, data)

    def save(self, file: str | Path) -> None:
        """Write the result to a JSON file, and large arrays to safetensors beside it."""
        save_json(file, self.to_dict)

    @classmethod
    def load(cls: type[R], file: str | Path) -> R:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: The file, or the one beside it with its arrays.
            ValueError: Another kind of file, one that lacks a field, or arrays of another file.
        """
        return cls.from_dict(load_json(file, cls.kind))
