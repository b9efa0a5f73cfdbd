"""Order of components, and JSON files that are whole or not there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, strategies as st

from hones_lens.results.files import Component, ranked, read_json, round_floats, write_json

few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0, -math.inf])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30), st.booleans(), st.data())
def test_ranked_is_sorted_by_score_then_layer_then_index(
    n_layers: int, width: int, k: int, positive_only: bool, data: st.DataObject
) -> None:
    size = n_layers * width
    values = data.draw(st.lists(few_values, min_size=size, max_size=size))
    scores = torch.tensor(values).view(n_layers, width)
    cells = [(layer, i, float(scores[layer, i])) for layer in range(n_layers) for i in range(width)]
    expected = sorted(cells, key=lambda c: (-c[2], c[0], c[1]))[:k]
    expected = [c for c in expected if c[2] > 0] if positive_only else expected
    actual = ranked(scores, k, positive_only)
    assert actual == expected
    assert all(isinstance(c, Component) for c in actual)


def test_ranked_leaves_no_tensor_behind() -> None:
    (best,) = ranked(torch.tensor([[0.25, 0.5]], dtype=torch.float64), 1)
    assert best == Component(layer=0, index=1, score=0.5)
    assert type(best.layer) is int and type(best.index) is int and type(best.score) is float


def test_ranked_refuses() -> None:
    with pytest.raises(ValueError, match="layer 1, index 0 is NaN"):
        ranked(torch.tensor([[0.0, 1.0], [math.nan, math.nan]]), 1)
    for k in (0, -3):
        with pytest.raises(ValueError, match="k must be at least 1"):
            ranked(torch.zeros(2, 2), k)


def test_write_json_makes_folders_and_reads_back(tmp_path) -> None:
    file = tmp_path / "a" / "b.json"
    write_json(file, {"kind": "thing", "x": [1, 2.5, "ä"]})
    assert read_json(file, "thing") == {"kind": "thing", "x": [1, 2.5, "ä"]}
    assert [p.name for p in file.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_json_cannot_hold_and_keeps_the_old_file(tmp_path, bad: float) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"kind": "thing"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"kind": "thing", "x": [0.0, bad]})
    assert json.loads(file.read_text()) == {"kind": "thing"}


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"kind": "thing", "x": 1})

    def broken(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"kind": "thing", "x": 2})
    assert json.loads(file.read_text())["x"] == 1


def test_read_json_names_the_file_and_what_is_wrong(tmp_path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        read_json(file, "heads")
    for text, message in (
        ('{"kind": "neurons"}', "holds 'neurons', not 'heads'"),
        ('{"x": 1}', "holds None, not 'heads'"),
        ("[1]", "holds 'list', not 'heads'"),
        ('{"kind": "heads"', "is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"x\.json.*{message}"):
            read_json(file, "heads")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_round_floats_keeps_nine_digits(x: float) -> None:
    (((rounded,),),) = round_floats([[[x]]])
    assert math.isclose(rounded, x, rel_tol=1e-8, abs_tol=0) or rounded == x


def test_round_floats_leaves_other_values() -> None:
    assert round_floats([1, "a", None, True, 0.0, 1 / 3]) == [1, "a", None, True, 0.0, 0.333333333]
