"""The report: one HTML file with the figures, tables and text of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hones_lens import viz
from hones_lens.app.report import patch_sections
from hones_lens.app.report.run_view import PatchView, RunView
from hones_lens.app.report.sections import Section, page_figure, sections
from hones_lens.app.report.size import fit
from hones_lens.app.report.tables import Bold, Cell, Table, measures_note
from hones_lens.app.report.verdict import verdict
from hones_lens.hones import MEASURES, NeuronScores, masking_measure
from hones_lens.model import takes_iterables
from hones_lens.results import replaced_atomically
from hones_lens.viz import join_words, level, nonbreaking, number, percent, span

_TINT = ("#eaf3f9", "#17262f")  # behind the verdict


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str


@takes_iterables
def write_report(
    path: str | Path, runs: Sequence[RunView], title: str = "", most_bytes: int | None = None
) -> Path:
    """Write one HTML file that needs no other file, no network and no JavaScript.

    Args:
        path: The file to write; its folder is created if it does not exist.
        runs: The runs, in their order on the page.
        title: Title of the page; default: the run's title, or the number of runs.
        most_bytes: Size of the file at most; what leaves no room is left out, and told (see `size.fit`).
            Titles, headline numbers and findings are always there, also where they take more.

    Returns:
        The file's path.

    Raises:
        ValueError: `runs` is empty.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    path = Path(path)
    environment = Environment(
        loader=PackageLoader("hones_lens.app.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tie"] = nonbreaking
    template, together = environment.get_template("report.html"), _comparison(runs)
    heads = [_run(run, f"run{i}") for i, run in enumerate(runs, start=1)]
    first = [] if together is None else [together]

    def rendered(parts: Sequence[Sequence[Section]]) -> str:
        return template.render(
            title=title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs"),
            colours=viz.reader_css(":root", *map(_variables, (0, 1))),
            together=next(iter(parts[0]), None),
            runs=[{**head, "sections": part} for head, part in zip(heads, parts[1:], strict=True)],
        )

    parts = [first, *(sections(run, f"run{i}") for i, run in enumerate(runs, start=1))]
    if most_bytes is not None:
        parts = fit(parts, most_bytes, lambda parts: len(rendered(parts).encode()))
    page = rendered(parts)
    with replaced_atomically(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _variables(scheme: int) -> str:
    """CSS variables of a scheme: 0 light, 1 dark."""
    return f"{viz.palette_css(scheme)} --page: {viz.PAGE[scheme]}; --tint: {_TINT[scheme]};"


def _run(run: RunView, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "title": run.title,
        "story": story(run),
        "tiles": _tiles(run),
        "verdict": verdict(run.masking, run.share).split("\n") if run.masking else [],
    }


# --- Several runs ---------------------------------------------------------------------------


def _comparison(runs: Sequence[RunView]) -> Section | None:
    """The section that compares runs: neurons per layer of a model's tasks, and the headline numbers."""
    by_model: dict[tuple[str, int], list[NeuronScores]] = {}
    for run in runs:
        if run.neurons is not None:
            by_model.setdefault((run.model_name, len(run.neurons.scores)), []).append(run.neurons)
    figures = []
    for i, ((model, _), rankings) in enumerate(by_model.items()):
        if len({(scores.task, scores.method) for scores in rankings}) == len(rankings) > 1:
            title = f"{model}: task neurons per layer"
            figures.append(page_figure(viz.neurons_per_layer(rankings), f"together-neurons{i}", title=title))
    masked_runs = [run for run in runs if run.main is not None]
    tables = [_headline_table(masked_runs)] if len(masked_runs) > 1 else []
    if not figures and not tables:
        return None
    return Section("together", "Side by side", "", figures, tables, stacked=True)


def _headline_table(runs: Sequence[RunView]) -> Table:
    """A table with a row for each run: the drop in both measures when its neurons are masked."""
    columns = ("run", "neurons", "share", "measured", "n", "drop", "interval", "beats")
    columns += ("log-probability drop (nats)", "interval", "beats")
    rows = []
    for run in runs:
        assert run.main is not None
        cells: list[Cell] = [run.title, f"{run.main.n_neurons:,}", percent(run.main.ratio)]
        cells += [run.main.metric_name, f"{run.main.metric_interval.n:,}"]
        for measure in MEASURES:
            m = masking_measure(run.main, measure)
            drop = number(m.drop) + m.mark
            cells += [Bold(drop) if m.clear else drop, span(m.interval)]
            cells.append(f"{m.beaten} of {len(m.controls)}" if m.controls else "–")
        rows.append(tuple(cells))
    note = "Drops when the neurons are masked, with bootstrap intervals; beats: how many random sets lose "
    note += "less. Bold: larger than with every random set, and the interval lies above 0."
    note += measures_note(
        masking_measure(run.main, measure) for run in runs for measure in MEASURES if run.main is not None
    )
    return Table("Neurons masked", columns, tuple(rows), note)


# --- Story and headline numbers --------------------------------------------------------------

_HEADS = {"replace_with_other_heads_mean": "replaced in turn by the mean of its layer's other heads"}


def story(run: RunView) -> list[str]:
    """Sentences that say what was done in the run."""
    sentences, outcome = [], ""
    if run.heads:
        count, n = len(run.heads.top()), run.heads.drops.shape[-1]
        tried = int((run.heads.counts > 0).sum())
        every = "Every attention head"
        if tried < run.heads.scores.numel():
            every = f"Each of {tried:,} attention heads"
        intervention = _HEADS.get(run.heads.intervention, f"changed in turn ({run.heads.intervention})")
        outcome = f"the {count} that cost most {run.metric_name} were kept" if count else "none was missed"
        sentences.append(
            f"{every} of {run.model_name} was {intervention} on {n:,} {run.task} examples, and {outcome}."
        )
    if (main := run.main) is not None:
        selections = {"hones": "The FFN neurons that those heads make write towards the right answer"}
        selection = selections.get(
            main.method, f"The FFN neurons ranked best by {main.method.replace('_', ' ')}"
        )
        sets = f", next to {len(main.controls)} random sets of as many neurons" if main.controls else ""
        shares = join_words([percent(result.ratio) for result in sorted(run.masking, key=lambda r: r.ratio)])
        n = main.metric_interval.n
        sentences.append(
            f"{selection} ({shares} of all) were then silenced on {n:,} held-out examples{sets}."
        )
    if run.overlap is not None:
        count, tasks = len(run.overlap.owners), join_words(run.overlap.tasks)
        sentence = f"The {count:,} neurons of {run.model_name} that at least one of {tasks} selected were"
        sentences.append(f"{sentence} compared: which of them tasks share, and what they do to each task.")
    if run.patching is not None:
        sentences.append(patch_sections.describe_patching(run.patching, run.model_name))
    return sentences


def _tiles(run: RunView) -> list[Tile]:
    tiles = [_patching_tile(run.patching)] if run.patching else []
    if (main := run.main) is not None:
        for measure in ("metric", "log_prob"):
            m = masking_measure(main, measure)
            random = f" Random sets: {number(m.random_mean)} on average, {number(m.random_worst)} at worst."
            interval = f"{level(m.interval)} interval {span(m.interval)}"
            before_after = f"From {span(m.before)} to {span(m.after)}. "
            detail = f"Drop {number(m.drop)}, {interval}, n = {m.interval.n:,}."
            label = f"{m.name}, {percent(main.ratio)} of the neurons masked"
            value = f"{number(m.baseline)} → {number(m.masked)}"
            detail = before_after + detail + (random if m.controls else "")
            tiles.append(Tile(label[0].upper() + label[1:], value, detail))
    for label, table in run.steering.items():
        row = next((row for row in table.rows if row.method == "HONES"), None)
        if row is not None:
            value = f"{number(table.row('Base').metric)} → {number(row.metric)}"
            interval = f"{level(row.gain)} interval {span(row.gain)}"
            before, after = (span(table.metric_of(measured_row)) for measured_row in (table.row("Base"), row))
            detail = f"From {before} to {after}. "
            detail += f"Gain {number(row.gain.value, sign=True)}, {interval}, n = {row.gain.n:,}."
            name = table.metric_name[0].upper() + table.metric_name[1:]
            tiles.append(Tile(f"{name}, steered ({label})", value, detail))
    if run.held_out is not None:
        best = max(run.held_out.heads, key=lambda head: head.drop.value)
        drop_text = f"Drop of {run.metric_name} without it on held-out examples: {number(best.drop.value)}"
        detail = f"{drop_text}, {level(best.drop)} interval {span(best.drop)}, n = {best.drop.n:,}."
        tiles.append(Tile("Head that matters most", f"L{best.layer}H{best.head}", detail))
    elif run.heads and (top := run.heads.top(1)):
        interval = run.heads.interval(top[0].layer, top[0].index)
        detail = f"Drop of {run.metric_name} without it: {number(top[0].score)}"
        if interval is not None:
            detail += f", {level(interval)} interval {span(interval)}, n = {interval.n:,}"
        detail += ", on the examples that select it."
        tiles.append(Tile("Head that matters most", f"L{top[0].layer}H{top[0].index}", detail))
    return tiles


def _patching_tile(view: PatchView) -> Tile:
    """A tile with the largest value of an activation patching, or with why that value says nothing."""
    result = view.result
    if view.problem:
        detail = patch_sections.capitalized(view.problem) + "."
        return Tile("Activation patching", "inconclusive", detail)
    index = patch_sections.largest_index(result)
    quantity = result.what.partition(",")[0]
    interval = "" if result.low is None else f", 95 % interval {patch_sections.interval_text(result, index)}"
    detail = f"{patch_sections.index_text(result, index)}{interval}, n = {result.n:,}."
    label = f"Largest {quantity}"
    return Tile(label, number(float(result.values[index])), detail[0].upper() + detail[1:])
