"""The parts of a run's page: words, figures and tables of each stage that was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hones_lens.steering import SteeringTable
from hones_lens.viz import overlap_plots, plots, shared_tables, steering_plots, tables, theme
from hones_lens.viz.run_view import ExampleView, RunView
from hones_lens.viz.tables import Table
from hones_lens.viz.words import MEASURES, headline, listed, number, percent

_SECOND_SHARE = 0.05  # kinds of question are drawn at the headline's share and at this one


@dataclass(frozen=True)
class Drawn:
    """A figure in the page: its heading, the SVG, and what is to be known about it."""

    title: str
    svg: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of a run's page: words, figures, tables; `stacked` ones are wide, each on a line of its own."""

    id: str
    title: str
    text: str
    figures: Sequence[Drawn] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[dict[str, Any]] = ()
    stacked: bool = False


def sections(run: RunView, name: str) -> list[Section]:
    """The sections of what the run holds, in the order of the method; `name` begins their ids."""
    makers = (_examples, _heads, _neurons, _masking, _kinds, _rankings, _steering, _overlap, _groups)
    makers += (_effects, _lens, _settings)
    return [section for make in makers if (section := make(run, name))]


def _drawn(
    figure: theme.Plot,
    name: str,
    tooltips: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> Drawn:
    assert figure.heading is not None
    title = figure.heading.title if title is None else title
    svg = theme.themed_svg(figure, name, f"{title}. {figure.heading.note}", tooltips)
    return Drawn(title, svg, figure.heading.note)


def _examples(run: RunView, name: str) -> Section | None:
    evaluation = [tables.evaluation(run.evaluation)] if run.evaluation else []
    if not run.examples and not evaluation:
        return None
    text = "What the model is asked, and where a head looks: brighter patches get more attention."
    pictures = [_picture(example) for example in run.examples]
    title = "The task, and where the head looks" if pictures else "The task"
    return Section(f"{name}-examples", title, text if pictures else "", (), evaluation, pictures)


def _picture(example: ExampleView) -> dict[str, Any]:
    """Pictures as data URIs, and the texts around them."""
    values = {"example": example, "image": theme.image_uri(example.image), "overlays": []}
    if example.attention is not None:
        for smooth, label in ((False, "patches"), (True, "smoothed")):
            figure = plots.attention_over_image(example.image, example.attention, smooth=smooth, bare=True)
            values["overlays"].append((label, theme.image_uri(theme.plot_image(figure))))
        values["brightest"] = number(float(example.attention.max()))
        values["total"] = number(float(example.attention.sum()))
        values["grid"] = " × ".join(str(side) for side in example.attention.shape)
    return values


def _heads(run: RunView, name: str) -> Section | None:
    if run.heads is None:
        return None
    scores, frame, tried = run.heads.scores, run.heads.to_dataframe(), int((run.heads.counts > 0).sum())
    columns = (frame[name].tolist() for name in ("layer", "head", "score", "standard_error", "n"))
    tips = [
        f"L{layer}H{head}: {number(score, sign=True)} (standard error {number(error)}, n = {n:,})"
        if n
        else f"L{layer}H{head}: not measured"
        for layer, head, score, error, n in zip(*columns, strict=True)
    ]
    text = (
        f"How much {run.metric_name} falls when a head's output is changed: blue heads are missed, orange "
        f"ones were in the way. {tried:,} heads of {len(scores)} layers were tried one by one."
    )
    figure = _drawn(plots.head_heatmap(run.heads), f"{name}-heads", {"cells": tips})
    found = [tables.top_heads(run.heads)]
    if run.held_out is not None:
        found.append(shared_tables.held_out_heads(run.held_out))
    return Section(f"{name}-heads", "Heads", text, [figure], found)


def _neurons(run: RunView, name: str) -> Section | None:
    if run.neurons is None:
        return None
    text = (
        f"The {run.neurons.count():,} neurons with the highest score, {percent(run.neurons.ratio)} of "
        f"{run.neurons.scores.numel():,}, are the task neurons."
    )
    figure = _drawn(plots.neurons_per_layer([run.neurons]), f"{name}-neurons")
    return Section(
        f"{name}-neurons", "Neurons", text, [figure], [tables.top_neurons(run.neurons, run.promoted)]
    )


def _masking(run: RunView, name: str) -> Section | None:
    if not run.masking:
        return None
    text = (
        "The selected neurons are set to zero at every position. If they carry the task, that costs more "
        "than silencing as many random neurons of the same layers."
    )
    figures, found = [], []
    for measure in ("metric", "log_prob"):
        figure = plots.masking_curve(run.masking, (measure,))
        figures.append(_drawn(figure, f"{name}-{measure}"))
        found.append(tables.masking(run.masking, measure))
    return Section(f"{name}-masking", "Masking", text, figures, found)


def _kinds(run: RunView, name: str) -> Section | None:
    if run.main is None or len(run.main.kinds) < 2:
        return None
    shown = {result.n_neurons: result for result in (run.main, headline(run.masking, _SECOND_SHARE))}
    figures = [_drawn(plots.kinds_bars(result), f"{name}-kinds{count}") for count, result in shown.items()]
    text = "The same drop by kind of question."
    if run.main.controls:
        once = len(run.main.controls) + 1
        text += f" By chance alone, a kind loses more than with all random sets once in {once} times."
    return Section(f"{name}-kinds", "Kinds of question", text, figures, [tables.kinds(run.masking)])


def _rankings(run: RunView, name: str) -> Section | None:
    if not run.others:
        return None
    results = {}
    if run.masking:
        share = next(iter(run.others.values())).ratio
        own = headline(run.masking, share)
        results[own.method] = own
    results.update(run.others)
    figures = [
        _drawn(plots.ranking_bars(results, measure), f"{name}-rank-{measure}")
        for measure in ("metric", "log_prob")
    ]
    text = "Other ways of choosing neurons, masked in the same way and number."
    return Section(f"{name}-rankings", "Other rankings", text, figures, [tables.rankings(results)])


def _steering(run: RunView, name: str) -> Section | None:
    if not run.steering:
        return None
    figures, found = [], []
    for i, (label, table) in enumerate(run.steering.items()):
        label = label[0].upper() + label[1:]
        for measure in MEASURES:
            figure = steering_plots.steering_bars(table, (measure,))
            figures.append(_drawn(figure, f"{name}-steering{i}-{measure}", title=label))
        found.append(shared_tables.steering(table, label, steering_said(table)))
    text = "Each neuron is scaled by a factor of its own, learned with the model frozen, beside controls."
    return Section(f"{name}-steering", "Steering", text, figures, found, stacked=True)


def steering_said(table: SteeringTable) -> str:
    """What HONES's scales gain, beside the other methods, from the numbers alone."""
    rows = {(row.method, row.draw): row for row in table.rows}
    if ("HONES", 0) not in rows:
        return "HONES's scales were not learned."
    hones = rows["HONES", 0]
    low, high = hones.gain.low, hones.gain.high
    verdict = "raise" if low > 0 else "lower" if high < 0 else "do not clearly change"
    said = f"HONES's scales {verdict} {table.metric_name} ({shared_tables.gain(hones.gain)})"
    draws = [row for row in table.rows if row.method == "RandNeuron"]
    if draws:
        beaten = sum(row.gain.value < hones.gain.value for row in draws)
        said += f", more than those of {beaten} of {len(draws)} random sets"
    if ("Grid-Search", 0) in rows:
        difference, p = table.difference("HONES", "Grid-Search")
        said += f"; HONES minus Grid-Search: {shared_tables.gain(difference)}, p = {p:.2g}"
    return f"{said}."


def _overlap(run: RunView, name: str) -> Section | None:
    if run.overlap is None:
        return None
    figures = [
        _drawn(draw(run.overlap), f"{name}-overlap{i}")
        for i, draw in enumerate(
            (overlap_plots.overlap_sizes, overlap_plots.overlap_shared, overlap_plots.overlap_layers)
        )
    ]
    everything = run.overlap.shared[-1]
    text = f"{everything.count:,} neurons were selected for all of {listed(run.overlap.tasks)}; by chance it "
    text += f"would be {number(everything.expected, 1)} (p = {everything.p:.2g})."
    found = [shared_tables.groups_of(run.overlap), shared_tables.shared(run.overlap)]
    return Section(f"{name}-overlap", "Neurons that tasks share", text, figures, found)


def _groups(run: RunView, name: str) -> Section | None:
    if run.groups is None:
        return None
    figures = [
        _drawn(overlap_plots.group_masking_bars(run.groups, measure), f"{name}-groups-{measure}")
        for measure in MEASURES
    ]
    text = "What each task loses when neurons of one group are silenced, as many of each group."
    found = [shared_tables.group_masking(run.groups)]
    return Section(f"{name}-groups", "Groups masked", text, figures, found, stacked=True)


def _effects(run: RunView, name: str) -> Section | None:
    if not run.effects:
        return None
    figures = [
        _drawn(steering_plots.side_effect_bars(effects), f"{name}-effects{i}", title=f"On {dataset}")
        for i, (dataset, effects) in enumerate(run.effects.items())
    ]
    found = [shared_tables.side_effects(effects, f"On {dataset}") for dataset, effects in run.effects.items()]
    text = "What the scales that were learned for one task do to it and to the others."
    return Section(f"{name}-effects", "Side effects of steering", text, figures, found, stacked=True)


def _lens(run: RunView, name: str) -> Section | None:
    if run.lens is None:
        return None
    text = "Read in every layer through the final norm and the unembedding, before and after masking."
    return Section(f"{name}-lens", "Logit lens", text, (), [shared_tables.lens(run.lens)])


def _settings(run: RunView, name: str) -> Section | None:
    found = [
        tables.settings(heading, values)
        for heading, values in (("Settings", run.settings), ("Environment", run.environment))
        if values
    ]
    return Section(f"{name}-settings", "Settings and environment", "", (), found) if found else None
