"""The report's tables of steering, of heads on held-out examples, and of neurons that tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hones_lens.analysis import LensDifference, LensToken
from hones_lens.app.report.tables import Bold, Cell, Table, Tokens, measures_note
from hones_lens.hones import (
    MEASURES,
    GroupMasking,
    HeldOutHeads,
    MaskingResult,
    Overlap,
    SideEffects,
    SteeringRow,
    SteeringTable,
    chance_sizes,
    masking_measure,
)
from hones_lens.results import Interval
from hones_lens.viz import level, number, p_value, span

_MOST_TOKENS = 6  # a cell


def gain(interval: Interval, mark: str = "") -> str:
    """A gain with its sign, the mark behind it, and its interval."""
    return f"{number(interval.value, sign=True)}{mark} {span(interval)}"


def held_out_heads(held_out: HeldOutHeads) -> Table:
    """The critical heads on the held-out examples; bold where the drop is significant there."""
    columns = (
        "head",
        f"drop of {held_out.metric_name}",
        "interval",
        "p",
        "holds",
        "where selected",
        "stands there",
    )
    rows: list[tuple[Cell, ...]] = []
    for head in held_out.heads:
        drop = number(head.drop.value) + held_out.mark(head)
        cell = Bold(drop) if head.holds else drop
        stands = "–" if head.significant is None else "yes" if head.significant else "no"
        score = f"{number(head.score)} {span(head.selected_on) if head.selected_on else ''}".rstrip()
        row = (
            f"L{head.layer}H{head.head}",
            cell,
            span(head.drop),
            p_value(head.p),
            "yes" if head.holds else "no",
        )
        rows.append((*row, score, stands))
    base, rate = held_out.baseline, f"{100 * held_out.q:g} %"
    note = f"Selected on {held_out.n_selected_on:,} examples, measured again on n = {base.n:,} others, where "
    note += (
        f"{held_out.metric_name} is {number(base.value)} {span(base)}; {level(base)} bootstrap intervals, "
    )
    note += f"paired permutation tests. Stands, holds: at a false discovery rate of {rate}, over all heads "
    note += "there, over the selected ones here."
    if held_out.random:
        note += f" Mean drop {number(held_out.mean_drop.value)} {span(held_out.mean_drop)}; "
        note += f"of {len(held_out.random)} random sets"
        note += f" of other heads {number(float(np.mean(held_out.random)))} on average, "
        note += f"{number(min(held_out.random))} to {number(max(held_out.random))}."
    note += f" {held_out.noise_legend}." if held_out.noise_legend else ""
    return Table("Critical heads on held-out examples", columns, tuple(rows), note)


def steering(table: SteeringTable, title: str, summary: str = "") -> Table:
    """All steering methods: metric, gains with intervals and p-values, largest scale, chosen settings.

    Args:
        table: Results of one task.
        title: Heading of the table.
        summary: First sentence of the note.
    """
    columns = ("method", table.metric_name, "gain", "interval", "p", "log-probability gain (nats)")
    columns += ("interval", "p", "max |a|", "chosen on dev")
    rows = tuple(_steering_row(table, row) for row in table.rows)
    base_gain = table.row("Base").gain
    note = f"{summary} {table.n_neurons:,} neurons, learned on {table.n_learned:,} and chosen on "
    note += f"{table.n_chosen:,} examples; n = {base_gain.n:,} held-out examples. "
    note += (
        f"{level(base_gain)} bootstrap intervals, paired permutation tests. Bold: the interval lies above 0."
    )
    note += f" {table.noise_legend}." if table.noise_legend else ""
    return Table(title, columns, rows, note.strip())


def _steering_row(table: SteeringTable, row: SteeringRow) -> tuple[Cell, ...]:
    name = f"RandNeuron {row.draw + 1}" if row.method == "RandNeuron" else row.method
    if row.method == "Base":
        return (name, _metric(table, row), *("–",) * 8)
    of_metric, of_log_prob = table.marks(row)
    return (
        name,
        _metric(table, row),
        _signed_cell(row.gain, of_metric),
        span(row.gain),
        p_value(row.p),
        _signed_cell(row.log_prob_gain, of_log_prob),
        span(row.log_prob_gain),
        p_value(table.log_prob_p(row)),
        f"{row.max_abs:.3g}",
        row.settings or "–",
    )


def _metric(table: SteeringTable, row: SteeringRow) -> str:
    interval = table.metric_of(row)
    return f"{number(row.metric)} {span(interval)}"


def _signed_cell(interval: Interval, mark: str) -> Cell:
    text = number(interval.value, sign=True) + mark
    return Bold(text) if interval.low > 0 else text


def groups_of(overlap: Overlap) -> Table:
    """Size of each group of neurons, the size expected by chance, and its neurons by layer."""
    chance, by_layer = chance_sizes(overlap), overlap.per_layer()
    rows = []
    for name, neurons in overlap.groups.items():
        layers = ", ".join(f"L{layer}: {count}" for layer, count in enumerate(by_layer[name]) if count)
        rows.append((name, f"{len(neurons):,}", number(chance[name], 1), layers or "–"))
    note = "Chance: mean size if each task's neurons were random, as many in each layer."
    return Table("Groups of neurons", ("group", "neurons", "chance", "by layer"), tuple(rows), note)


def shared(overlap: Overlap) -> Table:
    """Number of neurons that each pair of tasks shares, and that all share, beside chance."""
    columns = ("tasks", "shared", "chance", "p", "Jaccard", "of the smaller")
    rows = tuple(
        (
            " & ".join(each.tasks),
            f"{each.count:,}",
            number(each.expected, 1),
            p_value(each.p),
            number(each.jaccard),
            number(each.coefficient),
        )
        for each in overlap.shared
    )
    note = f"Chance and p: {overlap.draws:,} random sets with as many neurons in each layer."
    return Table("Neurons that tasks share", columns, rows, note)


def group_masking(groups: GroupMasking) -> Table:
    """Drops of every task with each group masked, with intervals, beside the random sets."""
    columns = ("task", "group", "before", "drop", "interval", "random mean", "beats")
    columns += ("log-probability drop (nats)", "interval", "random mean", "beats")
    rows = tuple(_group_row(result) for result in groups.results)
    first = groups.results[0]
    draws = "/".join(str(count) for count in sorted({len(r.controls) for r in groups.results}))
    ns = sorted({r.metric_interval.n for r in groups.results})
    n = f"{ns[0]:,}" if len(ns) == 1 else f"{ns[0]:,}–{ns[-1]:,}"
    note = f"{groups.size:,} neurons of each group masked; n = {n} held-out examples; "
    note += f"{level(first.metric_interval)} bootstrap intervals; {draws} random sets for each group. Bold: "
    note += "larger than with every random set, and the interval lies above 0."
    note += measures_note(masking_measure(r, measure) for r in groups.results for measure in MEASURES)
    return Table("Groups masked at one size", columns, rows, note)


def _group_row(result: MaskingResult) -> tuple[Cell, ...]:
    before = f"{number(result.baseline)} {span(result.baseline_interval)}"
    cells: list[Cell] = [result.task, result.method, before]
    for measure in ("metric", "log_prob"):
        m = masking_measure(result, measure)
        drop = number(m.drop) + m.mark
        cells += [Bold(drop) if m.clear else drop, span(m.interval)]
        cells += [number(m.baseline - m.random_mean), f"{m.beaten} of {len(m.controls)}"]
    return tuple(cells)


def side_effects(effects: SideEffects, title: str) -> Table:
    """Gains of every task (columns) under every task's scales (rows)."""
    tasks = list(dict.fromkeys(cell.task for cell in effects.cells))
    owners = list(dict.fromkeys(cell.scales_of for cell in effects.cells))
    rows = []
    for owner in owners:
        cells = [effects.cell(owner, task) for task in tasks]
        texts = [f"{gain(c.gain, effects.mark(c))}, p = {p_value(c.p)}" for c in cells]
        rows.append((owner, *(Bold(t) if c.gain.low > 0 else t for t, c in zip(texts, cells, strict=True))))
    first_cells = [effects.cell(owners[0], task) for task in tasks]
    bases = "; ".join(
        f"{c.task} {c.metric_name} {number(c.base.value)} {span(c.base)} (n = {c.base.n:,})"
        for c in first_cells
    )
    note = f"Without scales: {bases}. {level(first_cells[0].gain)} bootstrap intervals, "
    note += "paired permutation tests."
    note += "".join(f" {legend}." for legend in effects.noise_legends)
    return Table(title, ("scales of", *tasks), tuple(rows), f"{note} Bold: the interval lies above 0.")


def lens(delta: LensDifference) -> Table:
    """The tokens whose logit falls and rises most in each layer when the neurons are masked."""
    rows = tuple(
        (f"layer {layer}", _tokens(falls), _tokens(rises))
        for layer, (falls, rises) in enumerate(zip(delta.falls, delta.rises, strict=True))
    )
    note = "Logit lens at the last prompt position, baseline minus masked: "
    note += f"{delta.n_neurons:,} neurons, mean over n = {delta.n_examples:,} examples, 95 % intervals. "
    note += "Empty below the first of them."
    columns = ("layer", "falls when masked", "rises when masked")
    return Table("What the neurons make the model want to say", columns, rows, note)


def _tokens(tokens: Sequence[LensToken]) -> Tokens:
    return Tokens(
        tuple(f"{t.token} {number(t.delta, 2, sign=True)} {t.span}".rstrip() for t in tokens[:_MOST_TOKENS])
    )
