"""A run's results in a terminal: heads, neurons, masking and the finding, in 80 columns."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.verdict import verdict
from hones_lens.hones import MEASURES, HeldOutHead, masking_measure, measures_legend
from hones_lens.results import noise_mark
from hones_lens.viz import level, number, percent, span

_MOST_HEADS = 10
_MOST_NEURONS = 6  # of a layer


def print_summary(console: Console, run: RunView) -> None:
    """Print top heads, top neurons by layer, the masking curve against random sets, and the finding.

    The output needs no colours and at most 80 columns. Stages that the run lacks are left out.
    """
    console.print(Text(run.title, style="bold"))
    _print_heads(console, run)
    _print_neurons(console, run)
    for measure in MEASURES if run.masking else ():
        _print_masking(console, run, measure)
    if run.masking:
        finding, basis, *_ = verdict(run.masking, run.share).split("\n")
        console.print()
        console.print(Text(finding, style="bold"))
        console.print(Text(basis))


def _table(*columns: str) -> Table:
    """An empty table: the first column names the row, the others are numbers."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left", no_wrap=True, header_style="dim")
    return table


def _print(console: Console, title: str, table: Table, note: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    if table.row_count:
        console.print(table)
    console.print(Text(note, style="dim"))


def _print_heads(console: Console, run: RunView) -> None:
    if run.heads is None:
        return
    top, n = run.heads.top(), run.heads.drops.shape[-1]
    significant = run.heads.discoveries
    held_out = {(h.layer, h.head): h for h in run.held_out.heads} if run.held_out else {}
    table = _table("head", f"drop of {run.heads.metric_name}", "interval", "stands", "held out", "holds")
    for layer, head, score in top[:_MOST_HEADS]:
        interval, remeasured = run.heads.interval(layer, head), held_out.get((layer, head))
        table.add_row(
            f"L{layer}H{head}",
            number(score) + noise_mark(score, run.heads.noise),
            Text(span(interval)),
            "–" if significant is None else "yes" if (layer, head) in significant else "no",
            Text(_remeasured(run, remeasured)),
            "–" if remeasured is None else "yes" if remeasured.holds else "no",
        )
    if len(top) > _MOST_HEADS:
        table.add_row(f"… {len(top) - _MOST_HEADS} more")
    title = "Critical heads" if top else "No head lowers the metric when it is changed"
    base = run.heads.baseline_interval
    note = f"{run.heads.metric_name} {number(run.heads.baseline)}{f' {span(base)}' if base else ''} with all "
    over = "all heads" if run.heads.chosen is None else f"the {len(run.heads.chosen):,} asked for"
    note += f"heads, n = {n:,}; 95 % intervals; stands: FDR 5 % over {over}"
    if run.held_out is not None:
        note += f"; held out: measured again on n = {len(run.held_out.example_ids):,}, holds: FDR 5 %"
    if run.heads.problem:
        note = f"{run.heads.problem}; {note}"
    if run.heads.limits:
        note += f"; {run.heads.limits}"
    if run.heads.traded:
        note += f"; not exact: {run.heads.traded}"
    if run.heads.near_ties:
        note += f"; near-ties between tokens that rounding may settle: {run.heads.near_ties}"
    legends = [run.heads.noise_legend, run.held_out.noise_legend if run.held_out else ""]
    note += "".join(f"; {legend}" for legend in dict.fromkeys(filter(None, legends)))
    _print(console, title, table, note)


def _remeasured(run: RunView, head: HeldOutHead | None) -> str:
    if head is None or run.held_out is None:
        return "–"
    return f"{number(head.drop.value)}{run.held_out.mark(head)} {span(head.drop)}"


def _print_neurons(console: Console, run: RunView) -> None:
    if run.neurons is None:
        return
    table = _table("layer", "count", "best first")
    table.columns[2].justify = "left"
    for layer, group in groupby(sorted(run.neurons.top(), key=lambda c: c.layer), key=lambda c: c.layer):
        names = [f"N{c.index}" for c in group]
        more = " …" if len(names) > _MOST_NEURONS else ""
        table.add_row(f"L{layer}", f"{len(names):,}", " ".join(names[:_MOST_NEURONS]) + more)
    count, total = run.neurons.count(), run.neurons.n_asked
    note = f"{count:,} of {total:,} neurons by {run.neurons.method}, n = {run.neurons.n_examples:,}"
    note += f"; {run.neurons.limits}" if run.neurons.limits else ""
    _print(console, "Task neurons by layer", table, note)


def _print_masking(console: Console, run: RunView, measure: str) -> None:
    """Print one row for each share of neurons."""
    results = sorted(run.masking, key=lambda r: r.ratio)
    first = masking_measure(results[0], measure)
    table = _table("masked", "after", "drop", "random", "beats")
    for result in results:
        m = masking_measure(result, measure)
        table.add_row(
            f"{result.n_neurons:,} ({percent(result.ratio)})",
            Text(f"{number(m.masked)} {span(m.after)}"),
            Text(f"{number(m.drop)}{m.mark} {span(m.interval)}"),
            number(m.random_mean),
            f"{m.beaten}/{len(m.controls)}" if m.controls else "–",
        )
    title = f"{first.name[0].upper()}{first.name[1:]} with neurons masked"
    note = f"before: {number(first.baseline)} {span(first.before)}; {level(first.interval)} intervals, "
    note += f"n = {first.interval.n:,}"
    if first.controls:
        note += f"; random: mean of {len(first.controls)} sets"
    if legend := measures_legend(masking_measure(result, measure) for result in results):
        note += f"; {legend}"
    _print(console, title, table, note)
