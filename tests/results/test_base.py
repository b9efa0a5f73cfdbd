"""Every kind of result prints, is drawn, becomes a table, and is saved as it always was."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import pytest
import torch
from helpers.saved_results import RESULTS
from jaxtyping import Float32, Int
from torch import Tensor

import hones_lens
from hones_lens.hones.masking_result import MaskingResult, load_masking, save_masking
from hones_lens.results.base import Plottable, Result
from hones_lens.results.codec import from_json, to_json
from hones_lens.viz.registry import draw

OLD_FILES = Path(__file__).parent / "old_files"


def same(a: Any, b: Any) -> bool:
    """Equal through all fields, tensors with their dtype; NaN equals NaN."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


def without_additions(new: Any, old: Any) -> Any:
    """JSON values without the fields that have been added since, which are null or empty."""
    if isinstance(new, dict):
        kept = {key: value for key, value in new.items() if value is not None or key in old}
        return {
            key: without_additions(value, old.get(key)) for key, value in kept.items() if key in old or value
        }
    return list(map(without_additions, new, old)) if isinstance(new, list) else new


def subclasses(kind: type) -> set[type]:
    """All below `kind` in the package, whose modules are imported first."""
    for module in pkgutil.walk_packages(hones_lens.__path__, "hones_lens."):
        if not module.name.startswith(("hones_lens.app", "hones_lens.model")):
            importlib.import_module(module.name)
    actual, left = set(), [kind]
    while left:
        below = left.pop().__subclasses__()
        left += below
        actual |= {each for each in below if each.__module__.startswith("hones_lens.")}
    return actual


@pytest.mark.parametrize("name", RESULTS)
def test_a_file_of_the_time_before_the_codec_loads_as_what_was_saved(name: str) -> None:
    result = RESULTS[name]
    assert same(type(result).load(OLD_FILES / f"{name}.json"), result)


@pytest.mark.parametrize("name", RESULTS)
def test_a_new_file_holds_what_the_old_one_does(name: str, tmp_path: Path) -> None:
    RESULTS[name].save(tmp_path / "new.json")
    old, new = (json.loads(f.read_text()) for f in (OLD_FILES / f"{name}.json", tmp_path / "new.json"))
    assert without_additions(new, old) == old


def test_masking_results_are_read_one_by_one_or_as_groups(tmp_path: Path) -> None:
    groups = RESULTS["groups"]
    assert load_masking(OLD_FILES / "groups.json") == list(groups.results)
    save_masking(tmp_path / "masking.json", groups.results)
    new, old = (
        json.loads(file.read_text()) for file in (tmp_path / "masking.json", OLD_FILES / "groups.json")
    )
    assert without_additions(new, old) == old
    groups.results[0].save(tmp_path / "one.json")
    assert MaskingResult.load(tmp_path / "one.json") == groups.results[0]
    with pytest.raises(ValueError, match="holds 'masking-result', not 'masking'"):
        load_masking(tmp_path / "one.json")


def test_every_result_prints_its_text_and_is_told_from_others_by_its_kind() -> None:
    kinds = [kind.kind for kind in subclasses(Result)]
    assert len(set(kinds)) == len(kinds) > 15
    for kind in subclasses(Plottable):
        assert kind.__repr__ is Plottable.__repr__, kind
    for result in RESULTS.values():
        assert repr(result) == str(result) and "<" in result._repr_html_()
        assert len(result.to_dataframe()) > 0


def test_every_result_has_a_figure_and_what_has_none_is_refused() -> None:
    undrawn = {kind for kind in subclasses(Plottable) if kind not in draw.registry} - {Result, Made}
    assert not undrawn
    assert RESULTS["neurons"].plot().heading.title
    made = Made((Point("p"),), (1, "a"), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1))
    with pytest.raises(TypeError, match=r"no figure of Made; .* HeadScores, HeldOutHeads, Labelled"):
        made.plot()


def test_options_of_plot_reach_the_figure() -> None:
    assert RESULTS["labelled"].plot(title="Restored").heading.title == "Restored"
    titles = [RESULTS["overlap"].plot(*args).heading.title for args in ((), ("shared",))]
    assert titles == ["Neurons by how many tasks share them", "Neurons that tasks share"]


class Point(NamedTuple):
    name: str
    value: float = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Made(Result):
    """A result of a user's own."""

    kind: ClassVar[str] = "made"
    points: tuple[Point, ...]
    pair: tuple[int, str]
    ids: Int[Tensor, "a b"]
    values: Float32[Tensor, " a"] | None = None
    inner: dict[str, Point | None] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame(self.points)


def test_a_users_result_needs_its_fields_alone(tmp_path: Path) -> None:
    made = Made(
        (Point("x", 1.5),), (3, "y"), torch.tensor([[1], [2]]), torch.tensor([math.nan, 0.1]), {"z": None}
    )
    made.save(tmp_path / "made.json")
    assert same(Made.load(tmp_path / "made.json"), made)
    data = json.loads((tmp_path / "made.json").read_text())
    assert data == {
        "kind": "made",
        "points": [["x", 1.5]],
        "pair": [3, "y"],
        "ids": [[1], [2]],
        "values": [None, pytest.approx(0.1)],
        "inner": {"z": None},
    }
    assert repr(made) == str(made) == "name  value\n   x    1.5"


def test_defaults_stand_in_for_fields_that_a_file_lacks_and_other_names_are_passed_over() -> None:
    actual = Made.from_dict({"points": [["x"]], "pair": [3, "y"], "ids": [[1]], "more": 1})
    assert actual.points == (Point("x", 0.5),) and actual.values is None and actual.inner is None


def test_what_can_not_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Made without pair, ids"):
        Made.from_dict({"points": []})
    with pytest.raises(TypeError, match="a set can't be written"):
        to_json({"a": {1}})
    made = Made((Point("x", math.inf),), (3, "y"), torch.tensor([[1]]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        made.save(tmp_path / "made.json")
    assert not (tmp_path / "made.json").exists()


def test_tensors_are_float64_unless_their_annotation_says_otherwise() -> None:
    assert from_json(Tensor, [1, None]).dtype == torch.float64
    assert from_json(Int[Tensor, " a"], [1]).dtype == torch.int64
    assert from_json(Float32[Tensor, " a"], [1]).dtype == torch.float32
