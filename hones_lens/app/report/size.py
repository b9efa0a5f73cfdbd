"""A page within a size: what is left out of its sections, the least useful first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hones_lens.app.report.sections import Section

_FEW_ROWS = 5  # of a table that is cut


def fit(
    parts: Sequence[Sequence[Section]], most: int, size: Callable[[list[list[Section]]], int]
) -> list[list[Section]]:
    """Sections that make a page of at most so many bytes, or with all left out that can be.

    Left out in this order, each from the last section to the first: heads to choose among on the pictures,
    rows of tables behind the fifth, figures, pictures, tables. What was left out is told in its section.

    Args:
        parts: The sections of each part of the page.
        most: Bytes.
        size: Bytes of the page of such sections.
    """
    kept = [list(part) for part in parts]
    places = [(i, j) for i, part in enumerate(kept) for j in range(len(part))]
    if size(kept) <= most:
        return kept
    for fold in (_without_looks, _with_few_rows, _without_figures, _without_pictures, _without_tables):
        for i, j in reversed(places):
            folded = fold(kept[i][j])
            if folded is kept[i][j]:
                continue
            kept[i][j] = folded
            if size(kept) <= most:
                return kept
    return kept


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _without_looks(section: Section) -> Section:
    n = sum(len(card.looks) - 1 for card in section.pictures if len(card.looks) > 1)
    if not n:
        return section
    chosen = [[look for look in card.looks if look.chosen] or card.looks[:1] for card in section.pictures]
    cards = [
        replace(card, looks=looks, columns=0) for card, looks in zip(section.pictures, chosen, strict=True)
    ]
    return replace(section, pictures=cards, left_out=(*section.left_out, _count(n, "other head")))


def _with_few_rows(section: Section) -> Section:
    n = sum(max(0, len(table.rows) - _FEW_ROWS) for table in section.tables)
    if not n:
        return section
    tables = [replace(table, rows=table.rows[:_FEW_ROWS]) for table in section.tables]
    return replace(section, tables=tables, left_out=(*section.left_out, _count(n, "row") + " of tables"))


def _without_figures(section: Section) -> Section:
    if not section.figures:
        return section
    return replace(section, figures=(), left_out=(*section.left_out, _count(len(section.figures), "figure")))


def _without_pictures(section: Section) -> Section:
    if not section.pictures:
        return section
    n = len(section.pictures)
    told = tuple(text for text in section.left_out if "other head" not in text)
    return replace(section, pictures=(), left_out=(*told, _count(n, "example")))


def _without_tables(section: Section) -> Section:
    if not section.tables:
        return section
    told = tuple(text for text in section.left_out if "of tables" not in text)
    return replace(section, tables=(), left_out=(*told, _count(len(section.tables), "table")))
