"""The report's tables of heads, neurons, masking, evaluation and settings, with cells as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hones_lens.app.report.run_view import NeuronTokens
from hones_lens.app.report.verdict import kind_drop_is_clear
from hones_lens.hones import (
    MEASURES,
    HeadScores,
    MaskingMeasure,
    MaskingResult,
    NeuronScores,
    masking_measure,
    measures_legend,
)
from hones_lens.results import Interval, noise_legend, noise_mark
from hones_lens.viz import level, number, p_value, percent, span

_MOST_ROWS = 15


@dataclass(frozen=True)
class Tokens:
    """A cell that lists tokens."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A number with a bar before it, whose length is `share` per cent of the longest."""

    text: str
    share: float


@dataclass(frozen=True)
class Bold:
    """A cell in bold type."""

    text: str


Cell = str | Tokens | Bar | Bold


@dataclass(frozen=True)
class Table:
    """A table: the first column names the rows; all others hold numbers, unless `words` is set."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    words: bool = False


def top_heads(heads: HeadScores) -> Table:
    """The critical heads: score, interval, p-value, significance, and how many examples lose or gain."""
    columns = ("head", f"drop of {heads.metric_name}", "interval", "p", "stands", "examples lose", "gain")
    top, n = heads.top(), heads.drops.shape[-1]
    rows = []
    for layer, head, score in top[:_MOST_ROWS]:
        drops = heads.drops[layer, head]
        interval, significant = heads.interval(layer, head), heads.discoveries
        p = p_value(None if heads.p_values is None else float(heads.p_values[layer, head]))
        is_significant = "–" if significant is None else "yes" if (layer, head) in significant else "no"
        n_losing, gain, n_measured = (
            int((drops > 0).sum()),
            int((drops < 0).sum()),
            int(heads.counts[layer, head]),
        )
        bar = Bar(number(score) + noise_mark(score, heads.noise), 100 * score / top[0].score)
        rows.append(
            (
                f"L{layer}H{head}",
                bar,
                span(interval),
                p,
                is_significant,
                f"{n_losing:,} of {n_measured:,}",
                f"{gain:,}",
            )
        )
    base = heads.baseline_interval
    note = f"Base {heads.metric_name} {number(heads.baseline)}{f' {span(base)}' if base else ''}, n = {n:,}; "
    note += "95 % bootstrap intervals, paired permutation tests of no drop (one-sided), on the examples that "
    note += "select the heads. Stands: at a false discovery "
    note += f"rate of 5 % over all {int(heads.asked.sum()):,} heads."
    if heads.problem:
        note = f"{heads.problem[0].upper()}{heads.problem[1:]}. {note}"
    if heads.limits:
        note = note[:-1] + f" that were asked for; {heads.limits}."
    if heads.traded:
        note += f" Not exact: {heads.traded}."
    if bool(((heads.mean_drops - heads.scores).abs() > 1e-6).any()):
        note += f" Drops are of {heads.metric_name} over all examples, verdicts of the score of each."
    if heads.near_ties:
        note += f" Choices between tokens that rounding may settle: {heads.near_ties:,}."
    note += f" {heads.noise_legend}." if heads.noise_legend else ""
    if not top:
        note += " No head lowers the metric when it is changed."
    return Table("Critical heads", columns, tuple(rows), note + _not_shown(len(top)))


def _not_shown(count: int) -> str:
    return f" {count - _MOST_ROWS:,} more are not shown." if count > _MOST_ROWS else ""


def top_neurons(neurons: NeuronScores, promoted: Mapping[tuple[int, int], NeuronTokens]) -> Table:
    """The neurons of highest score, with their mean activation and promoted tokens where these are known."""
    top = neurons.top()
    tokens_of = {(c.layer, c.index): promoted.get((c.layer, c.index)) for c in top[:_MOST_ROWS]}
    with_tokens = any(tokens_of.values())
    rows = []
    for c in top[:_MOST_ROWS]:
        share = max(0.0, 100 * c.score / top[0].score) if top[0].score > 0 else 0.0
        row: tuple[Cell, ...] = (f"L{c.layer}N{c.index}", Bar(number(c.score, 4, significant=True), share))
        if neurons.errors is not None:
            row += (span(neurons.interval(c.layer, c.index), 4, significant=True),)
        if with_tokens:
            row += _promoted_cells(tokens_of[c.layer, c.index])
        rows.append(row)
    columns = ("neuron", "score", *(("interval",) if neurons.errors is not None else ()))
    columns += ("mean activation", "promotes") if with_tokens else ()
    note = f"Scored by {neurons.method} on n = {neurons.n_examples:,} examples. L1N25: neuron 25 of layer 1."
    if neurons.errors is not None:
        note += " Intervals: 95 %, jackknife over examples."
    if with_tokens:
        note += (
            " Promotes: the tokens that the neuron's output row raises, or lowers where its mean activation "
            "at the last prompt position is below 0."
        )
    if any(tokens is not None and tokens.activation is None for tokens in tokens_of.values()):
        note += " Where no mean activation is known: those that the output row raises."
    return Table("Top neurons", columns, tuple(rows), note + _not_shown(len(top)))


def _promoted_cells(promoted_tokens: NeuronTokens | None) -> tuple[Cell, Cell]:
    if promoted_tokens is None:
        return "–", Tokens(())
    active = (
        "–" if promoted_tokens.activation is None else number(promoted_tokens.activation, 4, significant=True)
    )
    return active, Tokens(promoted_tokens.tokens)


def masking(results: Sequence[MaskingResult], measure: str) -> Table:
    """Results of masking in one measure, a row for each share of neurons, beside the random sets."""
    columns = ("neurons", "share", "before", "after", "drop", "interval", "p", "relative")
    columns += ("random mean", "random largest", "beats")
    rows = tuple(_masking_row(r, masking_measure(r, measure)) for r in sorted(results, key=lambda r: r.ratio))
    m = masking_measure(results[0], measure)
    if m.unit:
        columns = tuple(c for c in columns if c != "relative")
        rows = tuple((*row[:7], *row[8:]) for row in rows)
    note = f"{level(m.interval)} bootstrap intervals, n = {m.interval.n:,}"
    note += "; p: paired permutation test" if m.p is not None else ""
    note += f"; {len(m.controls)} random sets." if m.controls else "; no random sets were run."
    if any(m.clear for m in (masking_measure(r, measure) for r in results)):
        note += " Bold: larger than with every random set, and the interval lies above 0."
    note += measures_note(masking_measure(r, measure) for r in results)
    title = f"{m.name[0].upper()}{m.name[1:]}{' (nats)' if m.unit else ''} with neurons masked"
    return Table(title, columns, rows, note)


def measures_note(measures: Iterable[MaskingMeasure]) -> str:
    """The sentence below a table that says what the mark behind a drop means; empty where none has it."""
    legend = measures_legend(measures)
    return f" {legend}." if legend else ""


def _masking_row(result: MaskingResult, m: MaskingMeasure) -> tuple[Cell, ...]:
    drop = number(m.drop) + m.mark
    return (
        f"{result.n_neurons:,}",
        percent(result.ratio),
        f"{number(m.baseline)} {span(m.before)}",
        f"{number(m.masked)} {span(m.after)}",
        Bold(drop) if m.clear else drop,
        span(m.interval),
        p_value(m.p),
        f"{number(result.relative_drop, 1)} % {span(result.relative_interval, 1)}",
        number(m.baseline - m.random_mean),
        number(m.baseline - m.random_worst),
        f"{m.beaten} of {len(m.controls)}" if m.controls else "–",
    )


def kinds(results: Sequence[MaskingResult]) -> Table:
    """Drop of the metric by kind of question, a column for each share of neurons."""
    ordered = sorted(results, key=lambda r: r.ratio)
    columns = ("kind", "n", "before", *(f"drop at {percent(r.ratio)}" for r in ordered))
    rows = []
    for kind, first in ordered[0].kinds.items():
        before = f"{number(first.baseline)} {_interval_text(first.baseline_interval)}".rstrip()
        cells: list[Cell] = [kind or "all", f"{first.n:,}", before]
        for result in ordered:
            kind_result = result.kinds[kind]
            drop = number(kind_result.baseline - kind_result.masked)
            drop += noise_mark(kind_result.baseline - kind_result.masked, result.noise)
            text = f"{drop} {_interval_text(kind_result.interval)}".rstrip()
            text += "" if kind_result.p is None else f", p = {p_value(kind_result.p)}"
            if result.controls:
                text += f" ({result.beats('metric', kind)}/{len(result.controls)})"
            cells.append(Bold(text) if kind_drop_is_clear(result, kind) else text)
        rows.append(tuple(cells))
    note = f"Of {ordered[0].metric_name}, with {level(ordered[0].metric_interval)} bootstrap intervals."
    if ordered[0].controls:
        note += " In brackets: how many random sets lose less; bold: all of them."
    drops = [drop.baseline - drop.masked for result in ordered for drop in result.kinds.values()]
    legend = noise_legend(ordered[0].noise, *drops)
    note += f" {legend}." if legend else ""
    return Table("Drop by kind of question", columns, tuple(rows), note)


def _interval_text(interval: Interval | None) -> str:
    return span(interval) if interval else ""


def rankings(results: Mapping[str, MaskingResult]) -> Table:
    """Masking results of several rankings at one size, the largest drop of the metric first."""
    columns = ["ranking", "neurons"]
    for quantity in (next(iter(results.values())).metric_name, "log-probability"):
        columns += [f"drop of {quantity}", "interval", "p", "beats"]
    rows = []
    for name, result in sorted(results.items(), key=lambda item: -item[1].drop):
        cells: list[Cell] = [name.replace("_", " "), f"{result.n_neurons:,}"]
        for measure in MEASURES:
            m = masking_measure(result, measure)
            beats = f"{m.beaten} of {len(m.controls)}" if m.controls else "–"
            drop, p = number(m.drop) + m.mark, p_value(m.p)
            cells += [Bold(drop) if m.clear else drop, span(m.interval), p, beats]
        rows.append(tuple(cells))
    interval = next(iter(results.values())).metric_interval
    note = f"{level(interval)} bootstrap interval of the drop, n = {interval.n:,}."
    note += measures_note(masking_measure(r, measure) for r in results.values() for measure in MEASURES)
    return Table("Rankings", tuple(columns), tuple(rows), note)


def evaluation(values: Mapping[str, Interval | float | int | str]) -> Table:
    """Metrics of the unedited model, with intervals where these are known."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Interval):
            text = f"{number(value.value)} {span(value)}, {level(value)} interval, n = {value.n:,}"
        elif isinstance(value, float):
            text = number(value)
        else:
            text = f"{value:,}" if isinstance(value, int) else value
        rows.append((name, text))
    return Table("The model before anything is changed", ("measured", "value"), tuple(rows), words=True)


def settings(title: str, values: Mapping[str, Any]) -> Table:
    """Names and values; nested mappings get dotted names."""
    rows = tuple((name, _setting_text(value)) for name, value in _flatten(values))
    return Table(title, ("name", "value"), rows, words=True)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _setting_text(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
