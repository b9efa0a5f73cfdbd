"""`Labelled`: a tensor result with named axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from hones_lens.results.base import Result
from hones_lens.results.codec import from_json
from hones_lens.results.noise import Noise, noise_legend, with_marks

_OPTIONAL = ("low", "high", "p")


@dataclass(frozen=True, eq=False, repr=False)
class Labelled(Result):
    """Numbers with named axes.

    `plot(**options)` draws one axis as a curve or as bars with intervals, two as a heat map, three as one map
    for each entry of an axis; the options are those of `hones_lens.viz.labelled`.

    Attributes:
        what: Description of the values with their unit, in one line, e.g. "logit difference restored, share
            of the whole".
        values: The numbers, on the CPU, detached.
        axes: A name for each axis: `layer`, `head`, `group`, `position`, `token`, …
        labels: Names of the entries of an axis, by axis; the entries of an axis without labels are numbered.
        n: Number of examples that the values are means over; None where they are not means.
        low, high: Ends of 95 % intervals, shaped as `values`, if there are any.
        p: P-values, one-sided or two-sided as `what` states, shaped as `values`, if there are any.
        notes: Lines that are printed below the values, e.g. baselines.
        noise: What a model in bfloat16 or float16 can't tell, in the unit of the values.
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
    noise: Noise | None = None

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

    def _present_fields(self) -> list[str]:
        """The names of those of low, high and p that are not None."""
        return [name for name in _OPTIONAL if getattr(self, name) is not None]

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise ValueError(f"{self.what}: no axis {name!r}; there are {', '.join(self.axes)}")
        return self.axes.index(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.values.shape)

    def names(self, axis: str) -> tuple[Any, ...]:
        """Labels of the entries of an axis.

        Raises:
            ValueError: No such axis.
        """
        return self.labels.get(axis, tuple(range(self.shape[self._axis(axis)])))

    def select(self, **chosen: Any) -> Labelled:
        """Select one entry of some axes by its label: `result.select(layer=3, group="image")`.

        Raises:
            ValueError: No such axis or label; lists those that exist.
        """
        selected = self
        for axis, label in chosen.items():
            names = selected.names(axis)
            if label not in names:
                raise ValueError(
                    f"{selected.what}: no {axis} {label!r}; there are {', '.join(map(str, names))}"
                )
            dim, index = selected._axis(axis), names.index(label)
            tensors = {
                n: getattr(selected, n).select(dim, index) for n in ("values", *selected._present_fields())
            }
            axes = tuple(name for name in selected.axes if name != axis)
            labels = {name: value for name, value in selected.labels.items() if name != axis}
            selected = replace(selected, axes=axes, labels=labels, **tensors)
        return selected

    def item(self) -> float:
        """The single value of a result without axes."""
        return float(self.values.item())

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest values, as rows of `to_dataframe`; ties in their order."""
        return self.to_dataframe().sort_values("value", ascending=False, kind="stable").head(k)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per value: a column for each axis, then value, and low, high, p and n if present."""
        index = np.indices(self.shape).reshape(len(self.axes), -1) if self.axes else np.zeros((0, 1), int)
        names = [np.array(self.names(axis), dtype=object) for axis in self.axes]
        columns: dict[str, Any] = {
            axis: pd.Series(name[i]).infer_objects()
            for axis, name, i in zip(self.axes, names, index, strict=True)
        }
        columns["value"] = self.values.flatten().numpy()
        columns |= {name: getattr(self, name).flatten().numpy() for name in self._present_fields()}
        frame = pd.DataFrame(columns)
        return frame if self.n is None else frame.assign(n=self.n)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the shape."""
        return {**super().to_dict(), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Labelled:
        """Rebuild the result from the output of `to_dict`, also after a round trip through JSON.

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
        title = self.what + (f" [{sizes}]" if sizes else "") + (f", n = {self.n}" if self.n else "")
        frame = self.to_dataframe().drop(columns="n", errors="ignore")
        largest = frame.iloc[np.argsort(-frame["value"].abs().to_numpy(), kind="stable")[:10]]
        shown = largest if math.prod(self.shape) > 10 else frame
        body = with_marks(shown, "value", self.noise).to_string(index=False, float_format="%.4g")
        omitted = [f"(the 10 largest of {len(frame)})"] if len(frame) > 10 else []
        legend = self.noise_legend(shown["value"])
        return "\n".join([title, body, *omitted, *([legend] if legend else []), *self.notes])

    def noise_legend(self, shown: Iterable[float]) -> str:
        """What the mark behind some of these values says; empty where none has it."""
        return noise_legend(self.noise, *shown)

    def _repr_html_(self) -> str:
        top = self.top()
        legend = self.noise_legend(top["value"])
        more = f"<p>{escape(legend)}</p>" if legend else ""
        table = with_marks(top, "value", self.noise).to_html(index=False)
        return f"<p>{escape(self.what)}</p>{table}{more}"
