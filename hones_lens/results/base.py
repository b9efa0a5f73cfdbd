"""What every result of a stage can do: print, plot, become a table, be saved and loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd

from hones_lens.results.codec import from_json, to_json
from hones_lens.results.files import read_json, write_json

R = TypeVar("R", bound="Result")


class Plottable:
    """Prints as its text, and has a figure in `hones_lens.viz`.

    Dataclasses derive from it with `repr=False`, so that the text is what Jupyter shows.
    """

    def __repr__(self) -> str:
        return str(self)

    def plot(self, *args: Any, **options: Any) -> Any:
        """The figure of this result.

        Args:
            args, options: Of the function that `hones_lens.viz.draw` has for the class.

        Returns:
            A matplotlib figure.

        Raises:
            TypeError: There is no figure for the class.
        """
        return importlib.import_module("hones_lens.viz").draw(self, *args, **options)


class Result(Plottable):
    """Base of the dataclasses that stages return.

    A subclass sets `kind` and defines `to_dataframe`, and `__str__` where a table says too little. Its fields
    are what `results.codec` writes: numbers, strings, tensors, tuples, mappings, named tuples, dataclasses.

    Attributes:
        kind: What a file calls it.
    """

    kind: ClassVar[str]

    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.to_dataframe().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(index=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as the values that JSON holds."""
        return {"kind": self.kind, **to_json(self)}

    @classmethod
    def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
        """From what `to_dict` gave, also through JSON.

        Raises:
            ValueError: A field is missing.
        """
        return from_json(cls, data)

    def save(self, file: str | Path) -> None:
        """Write everything to JSON."""
        write_json(file, self.to_dict())

    @classmethod
    def load(cls: type[R], file: str | Path) -> R:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file, or one that lacks a field.
        """
        return cls.from_dict(read_json(file, cls.kind))
