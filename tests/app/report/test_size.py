"""A report within a size: what leaves no room is left out and told, and nothing is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers import example_results as made
from helpers.report_page import Page

from hones_lens.app.cli import main
from hones_lens.app.report.cards import Card, HeadMap
from hones_lens.app.report.report import write_report
from hones_lens.app.report.sections import PageFigure, Section
from hones_lens.app.report.size import fit
from hones_lens.app.report.tables import Table

LOOKS = [HeadMap(f"L0H{i}", "m" * 100, "", "", 0.5, "", chosen=i == 2) for i in range(4)]


def section(name: str) -> Section:
    table = Table("t", ("a",), tuple((f"row {i:04}",) for i in range(8)))
    cards = [Card([("picture", "u" * 300)], [], LOOKS, 4), Card([("picture", "u" * 300)], [])]
    return Section(name, name, "", [PageFigure("f", "s" * 1000, "")], [table], cards)


def size(parts: Sequence[Sequence[Section]]) -> int:
    return sum(
        sum(len(figure.svg) for figure in one.figures)
        + sum(len(row[0]) for table in one.tables for row in table.rows)
        + sum(len(card.pictures[0][1]) + sum(len(look.map) for look in card.looks) for card in one.pictures)
        for part in parts
        for one in part
    )


def test_the_least_useful_goes_first_from_the_end_and_is_told() -> None:
    whole = [[section("a")], [section("b")]]
    told = [["", ""]]
    for most in range(size(whole), 0, -1):
        (one,), (other,) = fit(whole, most, size)
        assert size([[one], [other]]) <= most
        if (now := [", ".join(one.left_out), ", ".join(other.left_out)]) != told[-1]:
            told.append(now)
    heads, rows = "3 other heads", "3 other heads, 3 rows of tables"
    assert told[1:6] == [
        ["", heads],
        [heads, heads],
        [heads, rows],
        [rows, rows],
        [rows, rows + ", 1 figure"],
    ]
    all_but_tables = "3 rows of tables, 1 figure, 2 examples"
    assert told[-2:] == [
        [all_but_tables, "1 figure, 2 examples, 1 table"],
        ["1 figure, 2 examples, 1 table"] * 2,
    ]
    (one,), (other,) = fit(whole, 0, size)
    assert one.left_out == other.left_out == ("1 figure", "2 examples", "1 table")
    assert [look.head for look in fit(whole, size(whole) - 1, size)[1][0].pictures[0].looks] == ["L0H2"]


@pytest.mark.exhaustive
def test_headline_numbers_are_there_at_any_size(tmp_path) -> None:
    def page_of(most: int | None) -> tuple[int, Page]:
        file = write_report(tmp_path / "r.html", [made.run()], most_bytes=most)
        page = Page()
        page.feed(file.read_text(encoding="utf-8"))
        return file.stat().st_size, page

    whole, page = page_of(None)
    size, half = page_of(whole // 2)
    assert size <= whole // 2 and "Left out to keep the page small: " in half.text
    size, smallest = page_of(1)
    assert size < 0.2 * whole and not smallest.tables and not smallest.images
    for text in ("What this says", "Head that matters most", "neurons masked"):
        assert text in page.text and text in smallest.text
    assert "Left out" not in page.text


@pytest.mark.parametrize("size", ["0", "-1", "small"])
def test_a_size_that_is_none_is_refused(tmp_path, capsys, size: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path), "--max-size", size])
    assert stop.value.code == 2 and "--max-size" in capsys.readouterr().err
