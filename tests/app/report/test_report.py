"""The page: its numbers are the results, nothing comes from outside, its words follow from the numbers."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import viz_results as made
from PIL import Image

from hones_lens.app.report.report import story, write_report
from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.verdict import (
    BOTH,
    LOG_PROB_ONLY,
    METRIC_ONLY,
    NEITHER,
    UNKNOWN,
    finding,
    headline,
    verdict,
)
from hones_lens.hones.masking import measured
from hones_lens.results.statistics import Interval
from hones_lens.viz import text as words
from hones_lens.viz.text import number, percent

VOID = {"meta", "link", "img", "br", "input"}


@dataclass
class Page(HTMLParser):
    """Texts, tables, links and ids of a page; a tag that is not closed in order raises."""

    texts: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.style = ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "style" in self.open:
            self.style += data
            return
        self.texts.append(data)
        if self.open and any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, *columns: str) -> list[list[str]]:
        """Rows of the one table whose heading starts with these columns."""
        (found,) = [t for t in self.tables if t and t[0][: len(columns)] == list(columns)]
        return [[cell.strip() for cell in row] for row in found[1:]]


def written(tmp_path, *runs: RunView) -> tuple[str, Page]:
    source = write_report(tmp_path / "deep" / "report.html", runs).read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert not page.open
    return source, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, Page, RunView]:
    run = made.run()
    return *written(tmp_path_factory.mktemp("report"), run), run


def value(text: str) -> float:
    return float(text.replace("−", "-").rstrip(" %"))


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
    rows = page.table("neuron", "score", "promotes")
    assert len(rows) == 15
    for row, (layer, index, score) in zip(rows, run.neurons.top(), strict=True):
        assert row[0] == f"L{layer}N{index}"
        assert value(row[1]) == pytest.approx(score, rel=0.0006)
        assert tuple(row[2].split()) == tuple(run.promoted.get((layer, index), ()))


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
        m = measured(result, measure)
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


# --- The verdict -------------------------------------------------------------------------------

CALM = [(0.92, -0.25)] * 20


def test_a_clear_drop_in_both_measures():
    text = verdict([made.masking(0.71, -1.05, controls=CALM)])
    assert finding(made.masking(0.71, -1.05, controls=CALM)) == BOTH
    assert text.startswith("These neurons carry part of the vqa task.")
    assert "0.98 % of the FFN neurons (15 of 1,536 neurons)" in text
    assert "Accuracy falls from 0.930 to 0.710 (drop 0.220, 95 % interval 0.170 to 0.270, n = 200)" in text
    assert "larger than with all 20 random sets (their mean 0.010, largest 0.010)" in text
    assert "(drop 0.840 nats, 95 % interval 0.720 to 0.960, n = 200)" in text


def test_a_clear_drop_in_the_probability_alone():
    result = made.masking(0.93, -0.6, controls=CALM)
    assert finding(result) == LOG_PROB_ONLY
    text = verdict([result])
    assert text.startswith(
        "The answers of the vqa task are not carried by these neurons, though they add to it."
    )
    assert "15 of 1,536" in text
    assert "Accuracy stays at 0.930" in text
    assert "no larger than with any of 20 random sets" in text


def test_a_clear_drop_in_the_metric_alone():
    result = made.masking(0.71, -0.25, controls=CALM)
    assert finding(result) == METRIC_ONLY
    assert verdict([result]).startswith("The evidence is mixed")


def test_no_clear_drop_at_all():
    result = made.masking(0.92, -0.25, controls=[(0.91, -0.3)] * 15 + [(0.925, -0.22)] * 5)
    assert finding(result) == NEITHER
    text = verdict([result])
    assert text.startswith("The vqa task is not carried by these neurons.")
    assert "0.98 % of the FFN neurons (15 of 1,536 neurons)" in text
    assert "larger than with 5 of 20 random sets" in text


def test_one_random_set_that_costs_as_much_is_enough_against_it():
    tied_with_one = made.masking(0.71, -1.05, controls=[*CALM[1:], (0.71, -1.05)])
    assert finding(tied_with_one) == NEITHER
    beaten_by_a_hair = made.masking(0.71, -1.05, controls=[*CALM[1:], (0.7101, -1.0499)])
    assert finding(beaten_by_a_hair) == BOTH


def test_an_interval_that_reaches_0_settles_nothing():
    at_0 = made.masking(0.88, -1.05, controls=CALM)
    at_0 = replace(at_0, metric_interval=Interval(0.05, 0.0, 0.1, 0.95, 200))
    assert finding(at_0) == LOG_PROB_ONLY
    text = verdict([at_0])
    assert "not shown to be carried by these neurons" in text
    assert "The interval reaches 0, so 200 examples do not settle it." in text
    both = replace(at_0, log_prob_interval=Interval(0.84, -0.1, 1.7, 0.95, 200))
    assert finding(both) == NEITHER
    text = verdict([both])
    assert "not shown to be carried by these neurons" in text and "stand out" not in text
    assert "(accuracy and log-probability of the right answer), but 200 examples do not settle" in text
    above = replace(at_0, metric_interval=Interval(0.05, 1e-6, 0.1, 0.95, 200))
    assert finding(above) == BOTH


def test_a_gain_is_no_drop_even_if_random_sets_gain_more():
    gain = made.masking(0.95, -0.1, controls=[(0.96, -0.05)] * 20)
    assert gain.beats("metric") == 20
    assert finding(gain) == NEITHER
    assert "rises from 0.930 to 0.950" in verdict([gain])


def test_no_random_sets_and_no_masking():
    text = verdict([made.masking(controls=())])
    assert finding(made.masking(controls=())) == UNKNOWN
    assert text.startswith("Nothing can be said about these neurons in particular.")
    assert "random sets (their" not in text
    assert verdict([]).startswith("No neurons were masked")


def test_other_shares_and_kinds_are_told_in_order():
    text = verdict(made.curve()[::-1])
    *_, shares, kinds = text.split("\n")
    assert shares.endswith("at 2 %, 4.9 % and 10 % in both measures; at 0.46 % in neither.")
    results = made.curve()
    for kind in made.KINDS:
        for result in results:
            drop = result.kinds[kind].baseline - result.kinds[kind].masked
            told = f"{number(drop)} at {percent(result.ratio)}" in kinds
            assert told == (result.beats("metric", kind) == 20)


def test_kinds_that_all_do_as_random_sets_do():
    result = made.masking(0.93, -0.21, controls=[(0.8, -0.5)] * 20)
    assert verdict([result]).endswith(
        "On no single kind of question does accuracy drop more than with every random set."
    )


def test_the_headline_is_the_nearest_share():
    results = made.curve()
    assert headline(results) is results[1]
    assert headline(results, 0.05) is results[3]
    assert headline(results[3:]) is results[3]
    with pytest.raises(ValueError, match="no masking"):
        headline([])


def test_numbers_as_text():
    assert number(-0.0004) == "0.000"
    assert number(-0.0006) == "−0.001"
    assert number(0.25, 2, sign=True) == "+0.25"
    assert number(float("nan")) == "–"
    assert [percent(r) for r in (15 / 1536, 0.01, 0.0996, 0.5, 1.0)] == [
        "0.98 %",
        "1 %",
        "10 %",
        "50 %",
        "100 %",
    ]
    assert words.tied("95 % of n = 5") == "95\N{NO-BREAK SPACE}% of n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}5"
    assert words.listed(["a"]) == "a" and words.listed(["a", "b", "c"]) == "a, b and c"
    with pytest.raises(ValueError, match="'loss'; valid: metric, log_prob"):
        measured(made.masking(), "loss")
