"""`Labelled`: a result whose axes have names, which prints, plots, saves and becomes a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from hones_lens.results.base import Result
from hones_lens.results.codec import from_json

_OPTIONAL = ("low", "high", "p")


@dataclass(frozen=True, eq=False, repr=False)
class Labelled(Result):
    """Numbers with the names of their axes.

    `plot(**options)` draws one axis as a curve or as bars with intervals, two as a heat map, three as a map
    for each entry of one; options: of `hones_lens.viz.labelled`.

    Attributes:
        what: What they are, with unit, in one line: "logit difference restored, share of the whole".
        values: On the CPU, detached.
        axes: A name for each axis: `layer`, `head`, `group`, `position`, `token`, …
        labels: What the entries of an axis are called, by axis; where it has none, they are numbered.
        n: Over how many examples the values are means; None where they are no means.
        low, high: Ends of 95 % intervals, shaped as `values`, if there are any.
        p: One-sided or two-sided p-values as `what` says, shaped as `values`, if there are any.
        notes: What a reader must know, such as baselines; lines that are printed below.
    """

    kind: ClassVar[str] = "labelled"

    what: str
    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    n: int | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    p: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"{self.what}: axes {self.axes} for values {tuple(self.values.shape)}")
        for axis, labels in self.labels.items():
            if len(labels) != self.values.shape[self._axis(axis)]:
                size = self.values.shape[self._axis(axis)]
                raise ValueError(f"{self.what}: {len(labels)} labels for {size} entries of axis {axis!r}")
        for name in ("values", *_OPTIONAL):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.values.shape:
                raise ValueError(f"{self.what}: {name} has the shape {tuple(tensor.shape)}")
            if tensor is not None:
                object.__setattr__(self, name, tensor.detach().cpu())

    def _given(self) -> list[str]:
        """Those of low, high and p that there are."""
        return [name for name in _OPTIONAL if getattr(self, name) is not None]

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise ValueError(f"{self.what}: no axis {name!r}; there are {', '.join(self.axes)}")
        return self.axes.index(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(self.values.shape)

    def names(self, axis: str) -> tuple[Any, ...]:
        """What the entries of an axis are called.

        Raises:
            ValueError: No such axis.
        """
        return self.labels.get(axis, tuple(range(self.shape[self._axis(axis)])))

    def select(self, **chosen: Any) -> Labelled:
        """One entry of some axes, by its label: `result.select(layer=3, group="image")`.

        Raises:
            ValueError: No such axis or label; lists what there is.
        """
        out = self
        for axis, label in chosen.items():
            names = out.names(axis)
            if label not in names:
                raise ValueError(f"{out.what}: no {axis} {label!r}; there are {', '.join(map(str, names))}")
            at, where = out._axis(axis), names.index(label)
            cut = {n: getattr(out, n).select(at, where) for n in ("values", *out._given())}
            axes = tuple(name for name in out.axes if name != axis)
            labels = {name: value for name, value in out.labels.items() if name != axis}
            out = replace(out, axes=axes, labels=labels, **cut)
        return out

    def item(self) -> float:
        """The one value of a result without axes."""
        return float(self.values.item())

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest values, as rows of `to_dataframe`; ties in their order."""
        return self.to_dataframe().sort_values("value", ascending=False, kind="stable").head(k)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a value: a column for each axis, then value, and low, high, p, n where there are any."""
        index = np.indices(self.shape).reshape(len(self.axes), -1) if self.axes else np.zeros((0, 1), int)
        names = [np.array(self.names(axis), dtype=object) for axis in self.axes]
        columns: dict[str, Any] = {
            axis: pd.Series(name[i]).infer_objects()
            for axis, name, i in zip(self.axes, names, index, strict=True)
        }
        columns["value"] = self.values.flatten().numpy()
        columns |= {name: getattr(self, name).flatten().numpy() for name in self._given()}
        frame = pd.DataFrame(columns)
        return frame if self.n is None else frame.assign(n=self.n)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as the values that JSON holds, with the shape."""
        return {**super().to_dict(), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Labelled:
        """From what `to_dict` gave, also through JSON.

        Raises:
            ValueError: A field is missing.
        """
        tensors = {
            name: from_json(Tensor, data[name]).reshape(data["shape"])
            for name in ("values", *_OPTIONAL)
            if data.get(name) is not None
        }
        return super().from_dict({**data, **tensors})

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.shape, strict=True))
        head = self.what + (f" [{sizes}]" if sizes else "") + (f", n = {self.n}" if self.n else "")
        rows = self.to_dataframe().drop(columns="n", errors="ignore")
        most = rows.iloc[np.argsort(-rows["value"].abs().to_numpy(), kind="stable")[:10]]
        body = (most if math.prod(self.shape) > 10 else rows).to_string(index=False, float_format="%.4g")
        more = [f"(the 10 largest of {len(rows)})"] if len(rows) > 10 else []
        return "\n".join([head, body, *more, *self.notes])

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.what)}</p>{self.top().to_html(index=False)}"
