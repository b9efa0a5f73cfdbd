"""`Labelled`: selection, tables, files and text hold the numbers that went in."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from hones_lens.results.labelled import Labelled

GROUPS = ("image", "last")


def made(**more) -> Labelled:
    """[layer head group] with the value 100 · layer + 10 · head + group's number; layers 3 and 5."""
    parts = [torch.arange(n, dtype=torch.float64) for n in (2, 3, 2)]
    layer, head, group = torch.meshgrid(*parts, indexing="ij")
    values = 100 * layer + 10 * head + group
    options = {"labels": {"layer": (3, 5), "group": GROUPS}, "n": 7, "low": values - 1, "high": values + 2}
    return Labelled("effect, in logits", values, ("layer", "head", "group"), **{**options, **more})


def test_selection_by_label_cuts_everything() -> None:
    result = made(p=torch.full((2, 3, 2), 0.5))
    one = result.select(layer=5, group="last")
    assert one.axes == ("head",) and one.shape == (3,) and one.n == 7
    assert one.values.tolist() == [101, 111, 121]
    assert one.low is not None and one.high is not None and one.p is not None
    assert one.low.tolist() == [100, 110, 120] and one.high.tolist() == [103, 113, 123]
    assert one.p.tolist() == [0.5] * 3 and one.names("head") == (0, 1, 2) and one.labels == {}
    assert one.select(head=2).item() == 121 and result.values.shape == (2, 3, 2), "the result itself was cut"


def test_the_table_has_a_row_for_each_value() -> None:
    frame = made().to_dataframe()
    assert list(frame.columns) == ["layer", "head", "group", "value", "low", "high", "n"]
    rows = itertools.product(enumerate((3, 5)), range(3), enumerate(GROUPS))
    expected = [(a, h, g, 100 * i + 10 * h + j) for (i, a), h, (j, g) in rows]
    assert [tuple(row) for row in frame[["layer", "head", "group", "value"]].to_numpy()] == expected
    assert (frame["low"] == frame["value"] - 1).all() and (frame["high"] == frame["value"] + 2).all()
    assert (frame["n"] == 7).all() and pd.api.types.is_integer_dtype(frame["layer"])
    single = made().select(layer=3, head=1, group="image").to_dataframe()
    assert single["value"].tolist() == [10] and len(single) == 1


def test_top_keeps_the_order_of_ties() -> None:
    result = Labelled("x", torch.tensor([1.0, 3, 3, -5, 2]), ("head",))
    assert result.top(3)["head"].tolist() == [1, 2, 4]


def test_a_file_holds_everything(tmp_path) -> None:
    values = torch.tensor([[0.1, torch.nan, 1e-30], [2, 3, 4]], dtype=torch.float64)
    result = Labelled(
        "x",
        values,
        ("layer", "head"),
        {"layer": ("a", "b")},
        4,
        values - 1,
        values + 1,
        values / 9,
        ("noted",),
    )
    result.save(tmp_path / "x.json")
    loaded = Labelled.load(tmp_path / "x.json")
    for name in ("values", "low", "high", "p"):
        np.testing.assert_array_equal(getattr(loaded, name).numpy(), getattr(result, name).numpy())
    for name in ("what", "axes", "labels", "n", "notes"):
        assert getattr(loaded, name) == getattr(result, name)
    bare = Labelled("y", torch.tensor(2.5), ())
    bare.save(tmp_path / "y.json")
    again = Labelled.load(tmp_path / "y.json")
    assert again.item() == 2.5 and again.low is None and again.n is None
    (tmp_path / "z.json").write_text('{"kind": "heads"}')
    with pytest.raises(ValueError, match="holds 'heads', not 'labelled'"):
        Labelled.load(tmp_path / "z.json")


def test_it_prints_the_largest_by_size_and_its_notes() -> None:
    values = torch.arange(12.0)
    values[7] = -100
    text = str(Labelled("effect", values, ("head",), n=3, notes=("clean 2, corrupted 1",)))
    lines = text.splitlines()
    assert lines[0] == "effect [head 12], n = 3" and lines[2].split() == ["7", "-100"]
    assert "(the 10 largest of 12)" in text and lines[-1] == "clean 2, corrupted 1"
    in_order = str(Labelled("effect", torch.tensor([1.0, 5, 2]), ("head",)))
    assert [line.split() for line in in_order.splitlines()[2:]] == [["0", "1"], ["1", "5"], ["2", "2"]]
    html = Labelled("<b>", torch.tensor([1.0, 5, 2]), ("head",))._repr_html_()
    assert html.startswith("<p>&lt;b&gt;</p>") and html.count("<tr") == 4


def test_tensors_are_detached_and_on_the_cpu() -> None:
    result = Labelled(
        "x", torch.ones(2, requires_grad=True), ("head",), low=torch.zeros(2, requires_grad=True)
    )
    assert not result.values.requires_grad and result.low is not None and not result.low.requires_grad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Labelled("x", torch.ones(2, 2), ("layer",)), r"axes \('layer',\) for values \(2, 2\)"),
        (lambda: Labelled("x", torch.ones(2, 2), ("layer", "layer")), "axes"),
        (
            lambda: Labelled("x", torch.ones(2), ("head",), {"head": (1,)}),
            "1 labels for 2 entries of axis 'head'",
        ),
        (
            lambda: Labelled("x", torch.ones(2), ("head",), {"layer": (1, 2)}),
            "no axis 'layer'; there are head",
        ),
        (lambda: Labelled("x", torch.ones(2), ("head",), low=torch.ones(3)), r"low has the shape \(3,\)"),
        (lambda: made().select(layer=4), "no layer 4; there are 3, 5"),
        (lambda: made().select(position=1), "no axis 'position'; there are layer, head, group"),
        (lambda: made().names("position"), "no axis 'position'"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_it_plots() -> None:
    figure = made().plot(panels="layer")
    cells = [a for axes in figure.axes for a in axes.get_children() if a.get_gid() == "cells"]
    assert [mesh.get_array().tolist() for mesh in cells] == made().values.tolist()
