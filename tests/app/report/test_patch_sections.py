"""Activation patching in a report: every number is the result's, in its place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import example_results as made
from helpers.example_pairs import N_TEXT, pair
from helpers.figures import maps_of
from helpers.report_page import value, written

from hones_lens.app.report import patch_sections
from hones_lens.app.report.run_view import PatchView, RunView
from hones_lens.results.labelled import Labelled

GROUPS = ("image", "question", "last")


def result(axes: tuple[str, ...], shape: tuple[int, ...], seed: int = 0, **changes: Any) -> Labelled:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw, dtype=torch.float64)
    width = torch.rand(shape, generator=draw, dtype=torch.float64)
    labels = {"group": GROUPS, "position": tuple(f"{i} token" for i in range(16 + N_TEXT))}
    labels = {axis: names for axis, names in labels.items() if axis in axes}
    what = "share of logit_diff restored, resid_pre, clean into corrupted"
    ends = {"low": values - width, "high": values + width}
    options = {"labels": labels, "n": 12, "notes": ("logit_diff: clean 9, corrupted −10",), **ends, **changes}
    return Labelled(what, values, axes, **options)


def view(found: Labelled, **changes: Any) -> PatchView:
    by = "position" if "position" in found.axes else "group" if "group" in found.axes else "all"
    options = {"what": "resid_pre", "by": by, "direction": "denoise", "metric": "logit_diff", "raw": False}
    return PatchView(
        found, {**options, **changes}, "12 pairs of vqa pictures that differ in one fact", pair()
    )


def run(patched: PatchView) -> RunView:
    return RunView("tiny-llava · vqa", "tiny-llava", "vqa", "accuracy", patching=patched)


def tips(source: str) -> list[tuple[str, str, float, float, float]]:
    """Path, place, value and interval of each cell that says its number."""
    found = re.findall(r'<path d="([^"]+)"[^>]*><title>([^<]+): (\S+) \[(\S+), (\S+)\]</title>', source)
    return [(path, where, value(v), value(low), value(high)) for path, where, v, low, high in found]


def centre(path: str) -> tuple[float, float]:
    """(down, across) of a cell, to a pixel."""
    numbers = np.array([float(n) for n in re.findall(r"-?\d+\.?\d*", path)]).reshape(-1, 2)
    across, down = (numbers.min(0) + numbers.max(0)) / 2
    return round(float(down), 1), round(float(across), 1)


def test_cells_of_a_map_say_their_number_where_it_is(tmp_path) -> None:
    found = result(("layer", "group"), (4, 3))
    source, _ = written(tmp_path, run(view(found)))
    cells = tips(source)
    assert len(cells) == 12
    downs, acrosses = (sorted({centre(path)[i] for path, *_ in cells}) for i in (0, 1))
    assert len(downs) == 4 and len(acrosses) == 3
    for path, where, number, low, high in cells:
        layer, group = downs.index(centre(path)[0]), acrosses.index(centre(path)[1])
        assert where == f"layer {layer}, {GROUPS[group]}"
        at = (layer, group)
        expected = [float(each[at]) for each in (found.values, found.low, found.high)]
        assert [number, low, high] == pytest.approx(expected, abs=6e-4)


def test_heads_have_a_map_for_each_group_and_every_cell_its_own_number(tmp_path) -> None:
    found = result(("layer", "head", "group"), (4, 8, 3))
    source, _ = written(tmp_path, run(view(found, what="z")))
    cells = tips(source)
    assert len(cells) == len({centre(path) for path, *_ in cells}) == 96
    columns = sorted({centre(path)[1] for path, *_ in cells})
    assert len(columns) == 24, "three maps side by side"
    for path, where, number, *_ in cells:
        layer, head, group = re.fullmatch(r"layer (\d), head (\d), (\w+)", where).groups()
        assert number == pytest.approx(
            found.select(layer=int(layer), head=int(head), group=group).item(), abs=6e-4
        )
        assert columns.index(centre(path)[1]) == 8 * GROUPS.index(group) + int(head)
    assert 'class="pan"' in source and "each head alone" in source


def test_the_table_of_all_values(tmp_path) -> None:
    found = result(("layer", "group"), (4, 3))
    source, page = written(tmp_path, run(view(found)))
    rows = page.table("layer", *GROUPS)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    bold = [[f"<b>{cell.split()[0]}" in source for cell in row[1:]] for row in rows]
    for layer, row in enumerate(rows):
        for group, cell in zip(GROUPS, row[1:], strict=True):
            one = found.select(layer=layer, group=group)
            number, low, high = (value(part.strip("[],")) for part in cell.split())
            assert [number, low, high] == pytest.approx(
                [one.item(), float(one.low), float(one.high)], abs=6e-4
            )
            assert bold[layer][GROUPS.index(group)] == bool(one.low > 0 or one.high < 0)
    assert (
        "n = 12. 95 % bootstrap intervals over pairs" in page.text and "more are not shown" not in page.text
    )


def test_of_many_values_the_strongest_are_listed() -> None:
    found = result(("layer", "head", "group"), (4, 8, 3))
    table = patch_sections.values_table(found)
    assert table.columns == ("layer", "head", "group", "value") and "80 more are not shown" in table.note
    frame = found.to_dataframe()
    expected = frame.loc[frame["value"].abs().sort_values(ascending=False).index[:16]]
    for row, (_, cells) in zip(table.rows, expected.iterrows(), strict=True):
        assert row[:3] == (str(cells["layer"]), str(cells["head"]), cells["group"])
        text = getattr(row[3], "text", row[3])
        assert value(text.split()[0]) == pytest.approx(cells["value"], abs=6e-4)


def test_by_layer_alone_it_is_a_curve_and_a_table_in_order() -> None:
    found = result(("layer",), (40,))
    figure, said = patch_sections.heat_map(found)
    (curve,) = [line for line in figure.axes[0].lines if line.get_gid() == "curve"]
    np.testing.assert_array_equal(curve.get_ydata(), found.values.numpy())
    assert not said
    rows = patch_sections.values_table(found).rows
    assert [row[0] for row in rows] == [str(layer) for layer in range(40)]


def test_positions_lie_on_the_first_pair_s_picture(tmp_path) -> None:
    found = result(("layer", "position"), (3, 21))
    figure = patch_sections.picture_figure(view(found))
    places = maps_of(figure)
    assert [place.get_title("left") for place in places] == ["layer 0", "layer 1", "layer 2"]
    for layer, place in enumerate(places):
        expected = found.values[layer, 2:18].reshape(4, 4).numpy()
        np.testing.assert_allclose(place.images[1].get_array(), expected, rtol=1e-6)
    source, page = written(tmp_path, run(view(found)))
    assert "The same on the picture" in page.text and "data:image/png" in source
    assert len(tips(source)) == 63
    without = replace(view(found), pair=None)
    assert patch_sections.picture_figure(without) is None
    _, page = written(tmp_path, run(without))
    assert "The same on the picture" not in page.text
    assert patch_sections.picture_figure(view(result(("layer", "group"), (4, 3)))) is None


def test_of_many_layers_some_and_of_heads_the_strongest_lie_on_the_picture() -> None:
    found = result(("layer", "position"), (33, 21))
    places = maps_of(patch_sections.picture_figure(view(found)))
    layers = [int(place.get_title("left").removeprefix("layer ")) for place in places]
    assert len(layers) == 12 and layers[0] == 0 and layers[-1] == 32 and layers == sorted(set(layers))
    for layer, place in zip(layers, places, strict=True):
        np.testing.assert_allclose(
            place.images[1].get_array().flatten(), found.values[layer, 2:18], rtol=1e-6
        )
    found = result(("layer", "head", "position"), (4, 8, 21))
    figure = patch_sections.picture_figure(view(found, what="z"))
    strongest = found.values.abs().amax(-1).flatten().topk(8).indices.tolist()
    titles = [place.get_title("left") for place in maps_of(figure)]
    assert titles == [f"layer {i // 8}, head {i % 8}" for i in sorted(strongest)]
    for i, place in zip(sorted(strongest), maps_of(figure), strict=True):
        drawn = place.images[1].get_array().flatten()
        np.testing.assert_allclose(drawn, found.values[i // 8, i % 8, 2:18], rtol=1e-6)
    assert "8 of 32 components are drawn" in figure.heading.note


@pytest.mark.exhaustive
def test_large_maps_are_pictures_and_too_many_panels_the_strongest(tmp_path) -> None:
    labels = {"position": tuple(f"{i} t" for i in range(600))}
    large = result(("layer", "position"), (32, 600), labels=labels)
    source, _ = written(tmp_path, run(replace(view(large), pair=None)))
    assert len(source.encode()) < 400_000 and not tips(source) and "data:image/png" in source
    many = result(("layer", "head", "position"), (20, 20, 21))
    figure, said = patch_sections.heat_map(many)
    assert "16 of 20 heads are drawn" in figure.heading.note and not said
    kept = many.values.abs().amax((0, 2)).topk(16).indices.sort().values.tolist()
    assert [axes.get_title("left") for axes in figure.axes[:16]] == [f"head {head}" for head in kept]


def test_words_and_headline(tmp_path) -> None:
    found = result(("layer", "head", "group"), (4, 8, 3))
    _, page = written(tmp_path, run(view(found, what="z")))
    done = (
        "Attention heads' outputs (z) of tiny-llava were put from the clean run into the corrupted one, each "
        "head alone, at the tokens of one group at a time, on 12 pairs of vqa pictures that differ in one "
        "fact."
    )
    assert done in page.text and "0 where a patch does nothing, 1 where it does what changing" in page.text
    noise = patch_sections.describe_patching(view(found, what="attn_out", direction="noise"), "m")
    assert noise.startswith(
        "What a layer's attention adds (attn_out) of m was put from the corrupted run into the"
    )
    raw = patch_sections.describe_values(view(found, raw=True, metric="log_prob"))
    assert raw == "By how much a patch changes log_prob."
    best = found.to_dataframe().iloc[int(found.values.abs().argmax())]
    assert patch_sections.largest_index(found) == (best["layer"], best["head"], GROUPS.index(best["group"]))
    assert "Largest share of logit_diff restored" in page.text
    assert f"Layer {best['layer']}, head {best['head']}, {best['group']}, 95 % interval" in page.text


def test_every_kind_of_activation_has_its_words() -> None:
    from hones_lens.analysis.patching.sites import BY, SITES

    for what in SITES:
        for by in BY:
            said = patch_sections.describe_patching(view(result(("layer",), (4,)), what=what, by=by), "m")
            assert f"({what})" in said and said.endswith(".")


def test_without_intervals_and_beside_another_run(tmp_path) -> None:
    bare = result(("layer", "group"), (4, 3), low=None, high=None, n=1)
    _, page = written(tmp_path, run(view(bare)), made.run())
    rows = page.table("layer", *GROUPS)
    assert value(rows[2][1]) == pytest.approx(float(bare.values[2, 0]), abs=6e-4)
    assert "Critical heads" in page.text and "bold: the interval" not in page.text
    ids = [v for _, name, v in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "None" not in page.text and "nan" not in page.text
