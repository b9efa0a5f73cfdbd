"""The summary in a plain terminal of 80 columns."""

from __future__ import annotations

import io

import pytest
from helpers import example_results as made
from helpers.example_comparisons import held_out
from rich.console import Console

from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.terminal import print_summary
from hones_lens.app.report.verdict import verdict
from hones_lens.hones.masking_result import masking_measure
from hones_lens.viz.text import number, percent, span


def printed(run: RunView) -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=80), run)
    return file.getvalue()


def test_it_fits_80_columns_and_needs_no_colours():
    text = printed(made.run(heads=made.heads((32, 32), top_k=30), neurons=made.neurons((32, 1100))))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_heads_and_neurons_are_the_results():
    run = made.run()
    text = printed(run)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    stands = set()
    for layer, head, score in run.heads.top():
        verdict = "yes" if (layer, head) in run.heads.discoveries else "no"
        interval = span(run.heads.interval(layer, head))
        assert f"L{layer}H{head} {number(score)} {interval} {verdict} – –" in lines
        stands.add(verdict)
    assert stands == {"yes", "no"}
    again = held_out()
    both = [" ".join(line.split()) for line in printed(made.run(held_out=again)).splitlines()]
    first = again.heads[0]
    end = f"{number(first.drop.value)} {span(first.drop)} yes"
    assert any(line.startswith("L1H3 ") and line.endswith(end) for line in both)
    for layer, count in enumerate(run.neurons.per_layer()):
        best = [f"N{c.index}" for c in run.neurons.top() if c.layer == layer][:6]
        assert " ".join([f"L{layer}", str(count), *best]) in " ".join(text.split())
    assert "n = 60" in text


@pytest.mark.parametrize("measure", ["metric", "log_prob"])
def test_masking_is_the_results(measure):
    run = made.run()
    lines = [" ".join(line.split()) for line in printed(run).splitlines()]
    for result in run.masking:
        m = masking_measure(result, measure)
        row = (
            f"{result.n_neurons} ({percent(result.ratio)}) {number(m.masked)} {span(m.after)} "
            f"{number(m.drop)} {span(m.interval)} {number(m.random_mean)} {m.beaten}/20"
        )
        assert row in lines
    m = masking_measure(run.masking[0], measure)
    said = f"before: {number(m.baseline)} {span(m.before)}; 95 % intervals, n = 200; random: mean of 20 sets"
    assert said in " ".join(lines)


def test_the_finding_ends_it():
    run = made.run()
    finding, basis = verdict(run.masking).split("\n")[:2]
    assert " ".join(printed(run).split()).endswith(f"{finding} {basis}")


def test_many_heads_are_cut():
    text = printed(made.run(heads=made.heads((8, 8), top_k=30)))
    more = len(made.heads((8, 8), top_k=30).top()) - 10
    assert more > 0
    assert f"… {more} more" in text


def test_what_is_missing_is_left_out():
    assert printed(RunView("Bare", "tiny-llava", "vqa", "accuracy")).strip() == "Bare"
    text = printed(made.run(heads=None, masking=[made.masking(controls=())]))
    assert "head" not in text.lower().replace("heads and neurons of vqa", "")
    assert "random:" not in text
    assert "Nothing can be said about these neurons in particular." in text
