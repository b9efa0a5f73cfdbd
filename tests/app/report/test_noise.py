"""Effects below the noise of a model's type are marked, and the mark explained, in every table of effects."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from helpers import example_comparisons, example_results as made
from rich.console import Console

from hones_lens.app.report import patch_sections, shared_tables, tables
from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.tables import Cell
from hones_lens.app.report.terminal import print_summary
from hones_lens.hones.masking_result import masking_measure
from hones_lens.results import Labelled, Noise
from hones_lens.viz.text import number, span


def printed(run: RunView) -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=80), run)
    return " ".join(file.getvalue().split())


def text_of(cell: Cell) -> str:
    return str(getattr(cell, "text", cell))


def test_masking():
    run = made.run()
    first = masking_measure(run.masking[0], "log_prob")
    noise = Noise(None, 1.01 * abs(first.drop), 24, "bfloat16")
    marked = replace(run, masking=[replace(r, noise=noise) for r in run.masking])
    text = printed(marked)
    assert f"{number(first.drop)}~ {span(first.interval)}" in text and text.count("~") == 2
    assert "~ smaller than the noise of bfloat16" in text and "~" not in printed(run)
    table = tables.masking(marked.masking, "log_prob")
    assert [text_of(row[4]).endswith("~") for row in table.rows] == [True, False, False, False, False]
    assert "~ smaller than the noise of bfloat16" in table.note
    others = tables.masking(marked.masking, "metric"), tables.masking(run.masking, "log_prob")
    assert not any("~" in table.note for table in others)


def test_heads():
    run, held_out = made.run(), example_comparisons.held_out()
    top, weakest = run.heads.top(), held_out.heads[-1].drop.value
    heads = replace(run.heads, noise=Noise(1.01 * top[-1].score, None, 24, "bfloat16"))
    held_out = replace(held_out, noise=Noise(1.01 * abs(weakest), None, 24, "float16"))
    text = printed(replace(run, heads=heads, held_out=held_out))
    assert f"{number(top[-1].score)}~" in text and f"{number(top[0].score)}~" not in text
    assert f"{number(weakest)}~" in text
    assert "noise of bfloat16" in text and "noise of float16" in text
    of_report = tables.top_heads(heads), shared_tables.held_out_heads(held_out)
    cells = [[text_of(row[1]) for row in table.rows] for table in of_report]
    assert cells[0][-1].endswith("~") and not cells[0][0].endswith("~") and cells[1][-1].endswith("~")
    assert all("smaller than the noise of" in table.note for table in of_report)
    for result in (heads, held_out):
        assert "~" in str(result) and "smaller than the noise of" in str(result)
        assert "~" in result._repr_html_() and "smaller than the noise of" in result._repr_html_()
    for result in (run.heads, example_comparisons.held_out()):
        assert "~" not in str(result) + result._repr_html_()


def test_steering_and_its_side_effects():
    table, effects = example_comparisons.steering(), example_comparisons.effects()
    row = next(row for row in table.rows if row.scales is not None)
    sizes = 1.01 * abs(row.gain.value), 1.01 * abs(row.log_prob_gain.value)
    noisy = replace(table, noise=Noise(*sizes, 24, "bfloat16"))
    assert noisy.marks(row) == ("~", "~") and table.marks(row) == ("", "")
    shown = shared_tables.steering(noisy, "Steering")
    assert "noise of bfloat16" in shown.note and any("~" in text_of(c) for r in shown.rows for c in r)
    assert not any("~" in text_of(cell) for cell in shown.rows[0])  # the base gains nothing
    cell = effects.cells[0]
    marked = replace(effects, noise={cell.task: Noise(1.01 * abs(cell.gain.value), None, 24, "bfloat16")})
    assert "noise of bfloat16" in shared_tables.side_effects(marked, "On x").note
    for known, plain in ((noisy, table), (marked, effects)):
        assert "~" in str(known) and "~" in known._repr_html_()
        assert "~" not in str(plain) + plain._repr_html_()


def test_patching():
    values = torch.tensor([[0.5, 0.01], [-0.002, 0.2]])
    plain = Labelled("share", values, ("layer", "head"), n=4)
    noisy = replace(plain, noise=Noise(0.02, None, 4, "bfloat16"))
    table = patch_sections.values_table(noisy)
    cells = [text_of(cell) for row in table.rows for cell in row[1:]]
    assert [cell.endswith("~") for cell in cells] == [False, True, True, False] and "bfloat16" in table.note
    assert str(noisy).count("~") == 3 and noisy._repr_html_().count("~") == 3  # two values and the legend
    assert "~" not in str(plain) + plain._repr_html_() + patch_sections.values_table(plain).note
