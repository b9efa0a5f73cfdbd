"""Sections of steering, overlap, groups, side effects and logit lens: they say what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import example_comparisons as made, example_results
from helpers.report_page import Page, value, written

from hones_lens.analysis.lens.difference import LensToken
from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.sections import steering_summary
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.groups import chance_sizes
from hones_lens.results.statistics import Interval, metric_interval
from hones_lens.tasks.registry import load_task
from hones_lens.viz.text import number


def one_task() -> RunView:
    tables = {
        "learned and measured on shapes": made.steering(),
        "learned on shapes, measured on shapes-shifted": made.steering(n=50),
    }
    return example_results.run(held_out=made.held_out(), steering=tables, lenses={"vqa": made.lens()})


def across() -> RunView:
    return RunView(
        title="tiny-llava · four tasks",
        model_name="tiny-llava",
        task="vqa, ocr, caption and retrieval",
        metric_name="",
        overlap=made.shared(),
        groups=made.groups(),
        effects={"shapes": made.effects()},
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Page, Page]:
    folder = tmp_path_factory.mktemp("report")
    return tuple(written(folder / run.title[:5], run)[1] for run in (one_task(), across()))


def ends(cell: str) -> list[float]:
    return [value(end) for end in cell.strip("[]").split(",")]


@pytest.mark.exhaustive
def test_sections_stand_in_the_order_of_the_method(pages):
    links = [v for tag, name, v in pages[0].attributes if (tag, name) == ("a", "href")]
    wanted = ["heads", "neurons", "masking", "kinds", "rankings", "steering", "lens", "settings"]
    assert [link.partition("-")[2] for link in links] == ["examples", *wanted]
    links = [v for tag, name, v in pages[1].attributes if (tag, name) == ("a", "href")]
    assert [link.partition("-")[2] for link in links] == ["overlap", "groups", "effects"]
    for page in pages:
        ids = [v for _, name, v in page.attributes if name == "id"]
        assert len(ids) == len(set(ids)) and "None" not in page.text and "nan" not in page.text


def test_steering_in_the_tables_is_the_results(pages):
    found = [t for t in pages[0].tables if t[0][:2] == ["method", "accuracy"]]
    assert len(found) == 2
    table = made.steering()
    assert len(found[0]) == 1 + len(table.rows)
    for cells, row in zip(found[0][1:], table.rows, strict=True):
        cells = [cell.strip() for cell in cells]
        metric, _, interval = cells[1].partition(" ")
        assert cells[0].startswith(row.method) and value(metric) == pytest.approx(row.metric, abs=5e-4)
        whole = metric_interval(load_task("vqa"), np.array(row.statistics))
        assert ends(interval) == pytest.approx([whole.low, whole.high], abs=6e-4)
        if row.method == "Base":
            assert set(cells[2:]) == {"–"}
            continue
        assert value(cells[2]) == pytest.approx(row.gain.value, abs=5e-4)
        assert ends(cells[3]) == pytest.approx([row.gain.low, row.gain.high], abs=6e-4)
        assert value(cells[4]) == pytest.approx(row.p)
        assert value(cells[5]) == pytest.approx(row.log_prob_gain.value, abs=5e-4)
        assert ends(cells[6]) == pytest.approx([row.log_prob_gain.low, row.log_prob_gain.high], abs=6e-4)
        assert value(cells[7]) == pytest.approx(table.log_prob_p(row), rel=0.05)
        assert cells[8:] == ["0.4", "lr 0.05, epochs 4"]
    assert "n = 84 held-out examples. 95 % bootstrap intervals" in pages[0].text
    assert "Accuracy, steered (learned and measured on shapes)" in pages[0].text
    assert "Gain +0.041, 95 % interval [0.011, 0.071], n = 84." in pages[0].text


def test_what_is_said_of_steering_follows_from_the_numbers():
    table = made.steering()
    said = steering_summary(table)
    assert "HONES's scales raise accuracy (+0.041 [0.011, 0.071])" in said
    assert "more than those of 5 of 5 random sets" in said
    difference, p = table.difference("HONES", "Grid-Search")
    assert (
        f"HONES minus Grid-Search: {number(difference.value, sign=True)}" in said and f"p = {p:.2g}." in said
    )

    def with_gain(low: float, high: float) -> str:
        gain = Interval((low + high) / 2, low, high, 0.95, 84)
        rows = tuple(replace(row, gain=gain) if row.method == "HONES" else row for row in table.rows)
        return steering_summary(replace(table, rows=rows))

    assert "lower accuracy" in with_gain(-0.2, -0.1) and "0 of 5 random sets" in with_gain(-0.2, -0.1)
    assert "do not clearly change accuracy" in with_gain(-0.01, 0.009)
    assert "2 of 5" in with_gain(-0.01, 0.009), "two of the draws lose more than 0.0005"
    assert (
        steering_summary(made.steering(methods=("Base", "Grid-Search"))) == "HONES's scales were not learned."
    )


def test_heads_on_held_out_examples(pages):
    rows = pages[0].table("head", "drop of accuracy", "interval", "p", "holds")
    assert rows[0] == ["L1H3", "0.400", "[0.300, 0.500]", "0.0005", "yes", "0.450 [0.350, 0.550]", "yes"]
    assert rows[1] == ["L3H2", "0.020", "[−0.030, 0.070]", "0.4", "no", "0.300", "–"]
    text = pages[0].text
    assert "Selected on 60 examples, measured again on n = 84 others, where accuracy is 0.930" in text
    assert (
        "Mean drop 0.210 [0.140, 0.280]; of 2 random sets of other heads 0.030 on average, 0.010 to 0.050."
        in text
    )
    assert "L1H3" in text and "without it on held-out examples: 0.400, 95 % interval [0.300, 0.500]" in text


def test_overlap_in_the_tables_is_the_results(pages):
    found = made.shared()
    rows = pages[1].table("group", "neurons", "chance")
    for row, (name, neurons) in zip(rows, found.groups.items(), strict=True):
        assert row[:2] == [name, str(len(neurons))]
        assert value(row[2]) == pytest.approx(chance_sizes(found)[name], abs=0.051)
        layers = [int(part.split(":")[0].removeprefix("L")) for part in row[3].split() if ":" in part]
        assert layers == sorted({layer for layer, _ in neurons})
    rows = pages[1].table("tasks", "shared", "chance", "p")
    for row, each in zip(rows, found.shared, strict=True):
        assert row[:2] == [" & ".join(each.tasks), str(each.count)]
        assert value(row[2]) == pytest.approx(each.expected, abs=0.051)
        assert value(row[3]) == pytest.approx(each.p, rel=0.05)
        assert [value(cell) for cell in row[4:]] == pytest.approx([each.jaccard, each.coefficient], abs=6e-4)
    everything = found.shared[-1]
    assert (
        f"{everything.count} neurons were selected for all of vqa, ocr, caption and retrieval"
        in pages[1].text
    )
    assert f"The {len(found.owners)} neurons of tiny-llava that at least one of" in pages[1].text


def test_groups_in_the_table_are_the_results(pages):
    rows = pages[1].table("task", "group", "before", "drop")
    groups = made.groups()
    assert len(rows) == len(groups.results) == 28
    for row, result in zip(rows, groups.results, strict=True):
        assert row[:2] == [result.task, result.method]
        before, _, interval = row[2].partition(" ")
        assert value(before) == pytest.approx(result.baseline, abs=6e-4)
        base = result.baseline_interval
        assert ends(interval) == pytest.approx([base.low, base.high], abs=6e-4)
        assert value(row[3]) == pytest.approx(result.drop, abs=6e-4)
        interval = result.metric_interval
        assert ends(row[4]) == pytest.approx([interval.low, interval.high], abs=6e-4)
        random = result.baseline - np.mean([c.metric for c in result.controls])
        assert value(row[5]) == pytest.approx(random, abs=6e-4)
        assert row[6] == f"{result.beats('metric')} of 5" and row[10] == f"{result.beats()} of 5"
    assert "3 neurons of each group masked; n = 84 held-out examples" in pages[1].text


def test_side_effects_in_the_table_are_the_results(pages):
    effects = made.effects()
    rows = pages[1].table("scales of", *made.TASKS)
    for row in rows:
        for task, cell in zip(made.TASKS, row[1:], strict=True):
            found = effects.cell(row[0], task).gain
            assert cell.endswith(", p = 0.03")
            gain, _, interval = cell.removesuffix(", p = 0.03").partition(" ")
            assert value(gain) == pytest.approx(found.value, abs=6e-4)
            assert ends(interval) == pytest.approx([found.low, found.high], abs=6e-4)
    assert "retrieval NDCG@5 0.700 [0.650, 0.750] (n = 12)" in pages[1].text


@pytest.mark.exhaustive
def test_lens_tables_show_tokens_as_they_are(pages, tmp_path):
    rows = pages[0].table("layer", "falls when masked", "rises when masked")
    assert rows == [
        ["layer 0", "", ""],
        ["layer 1", "▁red +0.31 [+0.2, +0.44]", ""],
        ["layer 2", "<b> +1.20 ▁dax +0.90", "</s> −0.40"],
    ]
    assert "77 neurons, mean over n = 84 examples" in pages[0].text
    many = replace(made.lens(), falls=((), (), tuple(LensToken(i, f"t{i}", 1.0) for i in range(10))))
    _, page = written(tmp_path, replace(one_task(), lenses={"vqa": many}))
    assert page.table("layer", "falls when masked")[2][1].count("+1.00") == 6


def test_parts_can_be_missing(tmp_path):
    _, page = written(tmp_path, replace(across(), effects={}, groups=None))
    assert page.table("group", "neurons") and not any(t[0][0] == "scales of" for t in page.tables)
    one = GroupMasking(made.groups().results[:7])
    _, page = written(tmp_path, replace(across(), overlap=None, groups=one))
    assert len(page.table("task", "group")) == 7
