"""The page: its numbers are the results, nothing comes from outside, its words follow from the numbers."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from helpers import example_results as made
from helpers.report_page import Page, value, written
from PIL import Image

from hones_lens.app.report.report import story, write_report
from hones_lens.app.report.run_view import NeuronTokens, RunView
from hones_lens.hones.masking_result import masking_measure
from hones_lens.viz.text import number, percent


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, Page, RunView]:
    run = made.run()
    return *written(tmp_path_factory.mktemp("report"), run), run


# --- The page ----------------------------------------------------------------------------------


def test_nothing_is_loaded_from_outside_and_the_file_is_small(whole):
    source, page, _ = whole
    assert len(source.encode()) < 2_000_000
    for tag, name, link in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert link.startswith(("data:", "#")), (tag, name, link)
    assert not re.search(r"url\((?!#)|@import|<script|<iframe|https?://", source)


def test_it_is_made_for_phones_and_for_dark_rooms(whole):
    _, page, _ = whole
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in page.style
    assert page.style.count("--ink:") == 2
    boxes = [value for tag, name, value in page.attributes if name == "class" and value == "scroll"]
    assert len(boxes) == len(page.tables)


def test_ids_are_unique_and_every_link_has_its_target(whole):
    source, page, _ = whole
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    targets |= set(re.findall(r"url\(#([\w.-]+)\)", source))
    assert targets <= set(ids)


def test_tokens_that_look_like_tags_are_shown(whole):
    source, page, _ = whole
    assert "<s>" not in source and "<image>" not in source and "<unk>" not in source
    assert "Which <s> & word?" in page.text
    assert "<pad>" in page.text
    assert "</s>" in page.text


def test_figures_and_pictures_are_in_the_page(whole):
    source, page, _ = whole
    # Heads, neurons, two measures, kinds at two shares, rankings in two measures.
    assert source.count('<svg class="plot"') == 8
    # Of each example three pictures, and the one head's map by patch and smoothed.
    assert len(page.images) == 10
    for uri in page.images:
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).verify()


def test_several_runs_on_one_page_do_not_share_ids(tmp_path):
    other = made.run(title="Heads of OCR", task="ocr")
    _, page = written(tmp_path, made.run(), other)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.text.count("Heads of OCR") == 3, "in the links, in the table of all runs, and above its own"
    assert "2 runs" in page.text


@pytest.mark.exhaustive
def test_several_runs_stand_side_by_side(tmp_path):
    tasks = {"vqa": (0.71, -1.05), "ocr": (0.9, -0.3)}
    runs = [
        made.run(
            title=f"Heads of {task}",
            neurons=made.neurons(task=task, seed=i),
            masking=[made.masking(*after, task=task)],
        )
        for i, (task, after) in enumerate(tasks.items())
    ]
    source, page = written(tmp_path, *runs, made.run(title="Bare", neurons=None, masking=(), others={}))
    part = source[source.index('<section id="together">') : source.index("<article")]
    assert part.count("<svg") == 1 and "tiny-llava: task neurons per layer" in part
    legend = re.findall(r"<text[^>]*>(vqa|ocr)</text>", part)
    assert legend == ["vqa", "ocr"]
    rows = page.table("run", "neurons", "share", "measured")
    assert [row[0] for row in rows] == ["Heads of vqa", "Heads of ocr"]
    for row, run in zip(rows, runs, strict=True):
        assert row[1:5] == ["15", percent(run.main.ratio), "accuracy", "200"]
        assert value(row[5]) == pytest.approx(run.main.drop, abs=6e-4)
        assert value(row[8]) == pytest.approx(run.main.log_prob_drop, abs=6e-4)
        for column, interval in ((6, run.main.metric_interval), (9, run.main.log_prob_interval)):
            ends = [value(end) for end in row[column].strip("[]").split(",")]
            assert ends == pytest.approx([interval.low, interval.high], abs=6e-4)
        assert row[7] == f"{run.main.beats('metric')} of 20" and row[10] == f"{run.main.beats()} of 20"
    # Two runs of one task can't be told apart in one figure.
    source, _ = written(tmp_path, made.run(), made.run(title="Again"))
    assert "together-neurons" not in source and "task neurons per layer" in source
    source, _ = written(tmp_path, made.run())
    assert 'id="together"' not in source


def test_a_report_of_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "report.html", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "missing",
    [
        {"masking": (), "others": {}},
        {"examples": ()},
        {"heads": None, "neurons": None, "promoted": {}},
        {"masking": [made.masking(controls=())], "others": {}},
        {"masking": ()},
        {"settings": {}, "environment": {}, "evaluation": {}, "examples": ()},
        {"examples": [made.example(looks={}, answer_masked=None)]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_missing_is_left_out(tmp_path, missing):
    _, page = written(tmp_path, made.run(**missing))
    assert "None" not in page.text
    assert "nan" not in page.text


def test_a_run_with_nothing_but_a_name(tmp_path):
    _, page = written(tmp_path, RunView("Bare", "tiny-llava", "vqa", "accuracy"))
    assert "Bare" in page.text
    assert not page.tables


# --- Numbers -----------------------------------------------------------------------------------


def test_heads_that_were_not_all_measured(tmp_path):
    run = RunView("tiny-llava · vqa", "tiny-llava", "vqa", "accuracy", heads=made.raced_heads())
    text = write_report(tmp_path / "r.html", [run]).read_text()
    assert "L2H5: not measured" in text and "n = 20)" in text
    assert "Each of 24 attention heads of tiny-llava" in text and "Not exact: heads raced" in text
    assert "nan" not in text.lower().replace("tenant", "")
    assert "24 heads of 4 layers were tried" in text


def test_heads_in_the_table_are_the_results(whole):
    _, page, run = whole
    rows = page.table("head", "drop of accuracy")
    found = run.heads.discoveries
    assert found and len(found) < len(run.heads.top()), "some stand and some do not"
    assert len(rows) == len(run.heads.top()) == 3
    for row, (layer, head, score) in zip(rows, run.heads.top(), strict=True):
        drops = run.heads.drops[layer, head]
        assert row[0] == f"L{layer}H{head}"
        assert value(row[1]) == pytest.approx(score, abs=0.0005)
        ends = [value(end) for end in row[2].strip("[]").split(",")]
        assert ends == pytest.approx(run.heads.score_ends[layer, head].tolist(), abs=0.0006)
        assert value(row[3]) == pytest.approx(float(run.heads.p_values[layer, head]), rel=0.05)
        assert row[4] == ("yes" if (layer, head) in found else "no")
        assert row[5:] == [f"{int((drops > 0).sum())} of 60", f"{int((drops < 0).sum())}"]
    assert "Base accuracy 0.930 [0.900, 0.960], n = 60" in page.text


def test_neurons_in_the_table_are_the_results(whole):
    _, page, run = whole
    rows = page.table("neuron", "score", "mean activation", "promotes")
    assert len(rows) == 15
    for row, (layer, index, score) in zip(rows, run.neurons.top(), strict=True):
        assert row[0] == f"L{layer}N{index}"
        assert value(row[1]) == pytest.approx(score, rel=0.0006)
        known = run.promoted.get((layer, index))
        assert row[2] == ("–" if known is None else "0.5000")
        assert tuple(row[3].split()) == (() if known is None else known.tokens)


def test_a_neuron_s_sign_is_shown_beside_what_it_promotes(tmp_path):
    first, second = ((c.layer, c.index) for c in made.neurons().top(2))
    promoted = {first: NeuronTokens(("dax",), -0.25), second: NeuronTokens(("wug",))}
    _, page = written(tmp_path, made.run(promoted=promoted))
    rows = page.table("neuron", "score", "mean activation", "promotes")
    assert rows[0][2:] == ["−0.2500", "dax"] and rows[1][2:] == ["–", "wug"] and rows[2][2:] == ["–", ""]
    assert (
        "lowers where its mean activation at the last prompt position is below 0" in page.text
        and "no mean activation is known" in page.text
    )


def test_neurons_without_tokens_have_no_column_for_them(tmp_path):
    _, page = written(tmp_path, made.run(promoted={}, neurons=made.neurons((8, 1000))))
    assert page.tables[2][0] == ["neuron", "score"]
    assert len(page.tables[2]) == 16
    assert "65 more are not shown" in page.text


@pytest.mark.parametrize("measure, table", [("metric", 0), ("log_prob", 1)])
def test_masking_in_the_tables_is_the_results(whole, measure, table):
    _, page, run = whole
    found = [t for t in page.tables if t[0][:2] == ["neurons", "share"]][table]
    assert len(found) == 1 + len(run.masking)
    for row, result in zip(found[1:], run.masking, strict=True):
        cells = dict(zip(found[0], (cell.strip() for cell in row), strict=True))
        m = masking_measure(result, measure)
        values = np.array([getattr(control, measure) for control in result.controls])
        assert (cells["neurons"], cells["share"]) == (str(result.n_neurons), percent(result.ratio))
        for name, point, interval in (("before", m.baseline, m.before), ("after", m.masked, m.after)):
            said, _, ends = cells[name].partition(" ")
            assert value(said) == pytest.approx(point, abs=0.0005)
            ends = [value(end) for end in ends.strip("[]").split(",")]
            assert ends == pytest.approx([interval.low, interval.high], abs=0.00051)
        assert value(cells["drop"]) == pytest.approx(m.baseline - m.masked, abs=0.00051)
        ends = [value(end) for end in cells["interval"].strip("[]").split(",")]
        assert ends == pytest.approx([m.interval.low, m.interval.high], abs=0.00051)
        assert value(cells["random mean"]) == pytest.approx(m.baseline - values.mean(), abs=0.00051)
        assert value(cells["random largest"]) == pytest.approx(m.baseline - values.min(), abs=0.00051)
        assert cells["beats"] == f"{int((values > m.masked).sum())} of 20"
        p = result.metric_p if measure == "metric" else result.log_prob_p
        assert cells["p"] == ("–" if p is None else f"{p:.2g}")
        if measure == "metric":
            said, _, ends = cells["relative"].partition(" % ")
            assert value(said) == pytest.approx(result.relative_drop, abs=0.051)
            low, high = result.relative_interval.low, result.relative_interval.high
            ends = [value(end) for end in ends.strip("[]").split(",")]
            assert ends == pytest.approx([low, high], abs=0.051)


def test_kinds_in_the_table_are_the_results(whole):
    _, page, run = whole
    rows = page.table("kind", "n", "before")
    for row in rows:
        for cell, result in zip(row[3:], run.masking, strict=True):
            found = result.kinds[row[0]]
            drop, beaten, count = re.fullmatch(r"(.+) \((\d+)/(\d+)\)", cell).groups()
            assert value(drop) == pytest.approx(found.baseline - found.masked, abs=0.00051)
            assert (int(beaten), int(count)) == (result.beats("metric", row[0]), 20)
    assert [row[0] for row in rows] == list(made.KINDS)


def test_rankings_in_the_table_stand_beside_our_own(whole):
    _, page, run = whole
    rows = {row[0]: row for row in page.table("ranking", "neurons")}
    assert list(rows) == ["direct", "hones", "mean activation"]
    results = {**run.others, "hones": run.masking[1]}
    for name, result in results.items():
        row = rows[name.replace("_", " ")]
        assert value(row[2]) == pytest.approx(result.drop, abs=0.00051)
        assert value(row[6]) == pytest.approx(result.log_prob_drop, abs=0.00051)
        assert value(row[4]) == pytest.approx(result.metric_p, rel=0.05)


def test_head_map_tells_every_score(whole):
    source, _, run = whole
    tips = re.findall(r"<title>L(\d+)H(\d+): (\S+) \[(\S+), (\S+)\] \(95 %, n = 60\)</title>", source)
    assert len(tips) == 32
    for layer, head, score, *ends in tips:
        place = int(layer), int(head)
        assert value(score) == pytest.approx(float(run.heads.scores[place]), abs=0.0005)
        assert [value(end) for end in ends] == pytest.approx(run.heads.score_ends[place].tolist(), abs=0.0006)


def test_headline_numbers_are_those_of_the_share_of_task_neurons(whole):
    _, page, run = whole
    main = run.masking[1]
    assert run.main is main
    mean, worst = np.mean([c.metric for c in main.controls]), min(c.metric for c in main.controls)
    assert f"{number(main.baseline)} → {number(main.masked)}" in page.text
    assert (
        f"Drop 0.030, 95 % interval [−0.020, 0.080], n = 200. Random sets: {mean:.3f} on average" in page.text
    )
    assert f"{worst:.3f} at worst" in page.text
    assert "Accuracy, 0.98 % of the neurons masked" in page.text


def test_settings_environment_and_evaluation_are_listed(whole):
    _, page, _ = whole
    rows = [row for table in page.tables for row in table]
    assert ["limits.discovery", "60"] in rows
    assert ["torch", "2.13.0"] in rows
    assert ["accuracy", "0.930 [0.890, 0.965], 95 % interval, n = 200"] in rows


def test_the_story_says_what_was_done():
    heads, neurons = story(made.run())
    assert "replaced in turn by the mean of its layer's other heads on 60 vqa examples" in heads
    assert "the 3 that cost most accuracy were kept" in heads
    assert "0.46 %, 0.98 %, 2 %, 4.9 % and 10 % of all" in neurons
    assert "200 held-out examples, next to 20 random sets" in neurons
    (other,) = story(made.run(heads=None, masking=[made.masking(method="mean_activation", controls=())]))
    assert "ranked best by mean activation" in other and "random" not in other
