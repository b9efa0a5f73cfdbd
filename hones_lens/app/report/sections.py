"""The sections of a run's page: text, figures and tables of each stage that was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hones_lens import viz
from hones_lens.app.report import patch_sections, shared_tables, tables
from hones_lens.app.report.cards import Card, example_card, pair_card
from hones_lens.app.report.run_view import RunView
from hones_lens.app.report.tables import Table
from hones_lens.app.report.verdict import headline
from hones_lens.hones import MEASURES, SteeringTable
from hones_lens.viz import brackets, join_words, number, p_value, percent

_SECOND_SHARE = 0.05  # kinds of question are drawn at the headline's share and at this one


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page: its heading, the SVG, its caption, and its width in pixels.

    The width is 0 for figures that fit a phone.
    """

    title: str
    svg: str
    note: str
    width: int = 0


@dataclass(frozen=True)
class Section:
    """A section of a run's page; if `stacked`, each figure and table has the full width.

    `left_out` says what the page's size left no room for (see `size.fit`).
    """

    id: str
    title: str
    text: str
    figures: Sequence[PageFigure] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Card] = ()
    stacked: bool = False
    left_out: Sequence[str] = ()


def sections(run: RunView, name: str) -> list[Section]:
    """Sections of the stages that the run holds, in the order of the method; `name` is the prefix of ids."""
    makers = (_examples, _patching, _heads, _neurons, _flow, _masking, _kinds, _rankings, _steering)
    makers += (_overlap, _groups, _effects, _lens, _settings)
    return [section for make in makers if (section := make(run, name))]


def page_figure(
    figure: viz.Plot,
    name: str,
    tooltips: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> PageFigure:
    """A figure for the page; `name` is the prefix of its ids, and `title` replaces its own title."""
    assert figure.heading is not None
    title = figure.heading.title if title is None else title
    svg = viz.themed_svg(figure, name, f"{title}. {figure.heading.note}", tooltips)
    width = round(72 * figure.get_figwidth()) if figure.get_figwidth() > viz.WIDTH else 0
    return PageFigure(title, svg, figure.heading.note, width)


def _examples(run: RunView, name: str) -> Section | None:
    evaluation = [tables.evaluation(run.evaluation)] if run.evaluation else []
    if not run.examples and not evaluation:
        return None
    pictures = [example_card(example) for example in run.examples]
    text = "What the model is asked, and where heads look: brighter patches get more attention."
    if any(len(card.looks) > 1 for card in pictures):
        text += " Choose a head below the pictures; the bluer its field, the more it attends to the picture."
    title = "The task, and where heads look" if pictures else "The task"
    return Section(f"{name}-examples", title, text if pictures else "", (), evaluation, pictures)


def _patching(run: RunView, name: str) -> Section | None:
    if run.patching is None:
        return None
    figure, tips = patch_sections.heat_map(run.patching.result)
    title = patch_sections.capitalized(run.patching.result.what)
    figures = [page_figure(figure, f"{name}-patching", tips, title)]
    on_picture = patch_sections.picture_figure(run.patching)
    if on_picture is not None:
        figures.append(page_figure(on_picture, f"{name}-patched", title="The same on the picture"))
    pictures = [pair_card(run.patching.pair)] if run.patching.pair else []
    section_tables = [patch_sections.values_table(run.patching.result)]
    sentences = (patch_sections.describe_values(run.patching), patch_sections.describe_answers(run.patching))
    text = " ".join(filter(None, sentences))
    return Section(
        f"{name}-patching", "Activation patching", text, figures, section_tables, pictures, stacked=True
    )


def _heads(run: RunView, name: str) -> Section | None:
    if run.heads is None:
        return None
    scores, frame, tried = run.heads.scores, run.heads.to_dataframe(), int((run.heads.counts > 0).sum())
    columns = (frame[name].tolist() for name in ("layer", "head", "score", "low", "high", "n"))
    tips = [
        f"L{layer}H{head}: {number(score, sign=True)} {brackets(low, high)} (95 %, n = {n:,})"
        if n
        else f"L{layer}H{head}: not measured"
        for layer, head, score, low, high, n in zip(*columns, strict=True)
    ]
    text = (
        f"How much {run.metric_name} falls when a head's output is changed: blue heads are missed, orange "
        f"ones were in the way. {tried:,} heads of {len(scores)} layers were tried one by one."
    )
    figure = page_figure(viz.head_heatmap(run.heads), f"{name}-heads", {"cells": tips})
    section_tables = [tables.top_heads(run.heads)]
    if run.held_out is not None:
        section_tables.append(shared_tables.held_out_heads(run.held_out))
    return Section(f"{name}-heads", "Heads", text, [figure], section_tables)


def _neurons(run: RunView, name: str) -> Section | None:
    if run.neurons is None:
        return None
    text = (
        f"The {run.neurons.count():,} neurons with the highest score, {percent(run.neurons.ratio)} of "
        f"{run.neurons.n_asked:,}, are the task neurons."
    )
    text += f" {run.neurons.limits}." if run.neurons.limits else ""
    figure = page_figure(viz.neurons_per_layer([run.neurons]), f"{name}-neurons")
    return Section(
        f"{name}-neurons", "Neurons", text, [figure], [tables.top_neurons(run.neurons, run.promoted)]
    )


def _flow(run: RunView, name: str) -> Section | None:
    if run.flow is None or not bool(run.flow.contributions.gt(0).any()):
        return None
    tips = viz.flow_tooltips(run.flow)
    figure = page_figure(viz.head_neuron_token_flow(run.flow), f"{name}-flow", tips)
    text = "Which critical heads make which neurons write, and the tokens that these neurons promote."
    return Section(f"{name}-flow", "From heads to tokens", text, [figure], stacked=True)


def _masking(run: RunView, name: str) -> Section | None:
    if not run.masking:
        return None
    text = (
        "The selected neurons are set to zero at every position. If they carry the task, that costs more "
        "than silencing as many random neurons of the same layers."
    )
    figures, section_tables = [], []
    for measure in ("metric", "log_prob"):
        figure = viz.masking_curve(run.masking, (measure,))
        figures.append(page_figure(figure, f"{name}-{measure}"))
        section_tables.append(tables.masking(run.masking, measure))
    return Section(f"{name}-masking", "Masking", text, figures, section_tables)


def _kinds(run: RunView, name: str) -> Section | None:
    if run.main is None or len(run.main.kinds) < 2:
        return None
    shown = {result.n_neurons: result for result in (run.main, headline(run.masking, _SECOND_SHARE))}
    figures = [page_figure(viz.kinds_bars(result), f"{name}-kinds{count}") for count, result in shown.items()]
    text = "The same drop by kind of question."
    if run.main.controls:
        n_sets = len(run.main.controls) + 1
        text += f" By chance alone, a kind loses more than with all random sets once in {n_sets} times."
    return Section(f"{name}-kinds", "Kinds of question", text, figures, [tables.kinds(run.masking)])


def _rankings(run: RunView, name: str) -> Section | None:
    if not run.others:
        return None
    results = {}
    if run.masking:
        share = next(iter(run.others.values())).ratio
        own_result = headline(run.masking, share)
        results[own_result.method] = own_result
    results.update(run.others)
    figures = [
        page_figure(viz.ranking_bars(results, measure), f"{name}-rank-{measure}")
        for measure in ("metric", "log_prob")
    ]
    text = "Other ways of choosing neurons, masked in the same way and number."
    return Section(f"{name}-rankings", "Other rankings", text, figures, [tables.rankings(results)])


def _steering(run: RunView, name: str) -> Section | None:
    if not run.steering:
        return None
    figures, section_tables = [], []
    for i, (label, table) in enumerate(run.steering.items()):
        label = label[0].upper() + label[1:]
        for measure in MEASURES:
            figure = viz.steering_bars(table, (measure,))
            figures.append(page_figure(figure, f"{name}-steering{i}-{measure}", title=label))
        section_tables.append(shared_tables.steering(table, label, steering_summary(table)))
    text = "Each neuron is scaled by a factor of its own, learned with the model frozen, beside controls."
    return Section(f"{name}-steering", "Steering", text, figures, section_tables, stacked=True)


def steering_summary(table: SteeringTable) -> str:
    """One sentence: the gain of HONES's scales, compared with the other methods."""
    rows = {(row.method, row.draw): row for row in table.rows}
    if ("HONES", 0) not in rows:
        return "HONES's scales were not learned."
    hones = rows["HONES", 0]
    low, high = hones.gain.low, hones.gain.high
    verdict = "raise" if low > 0 else "lower" if high < 0 else "do not clearly change"
    summary = f"HONES's scales {verdict} {table.metric_name} ({shared_tables.gain(hones.gain)})"
    draws = [row for row in table.rows if row.method == "RandNeuron"]
    if draws:
        beaten = sum(row.gain.value < hones.gain.value for row in draws)
        summary += f", more than those of {beaten} of {len(draws)} random sets"
    if ("Grid-Search", 0) in rows:
        difference, p = table.difference("HONES", "Grid-Search")
        summary += f"; HONES minus Grid-Search: {shared_tables.gain(difference)}, p = {p_value(p)}"
    return f"{summary}."


def _overlap(run: RunView, name: str) -> Section | None:
    if run.overlap is None:
        return None
    figures = [
        page_figure(draw(run.overlap), f"{name}-overlap{i}")
        for i, draw in enumerate((viz.overlap_sizes, viz.overlap_shared, viz.overlap_layers))
    ]
    shared_by_all = run.overlap.shared[-1]
    text = f"{shared_by_all.count:,} neurons were selected for all of {join_words(run.overlap.tasks)}; "
    text += f"by chance it would be {number(shared_by_all.expected, 1)} (p = {p_value(shared_by_all.p)})."
    section_tables = [shared_tables.groups_of(run.overlap), shared_tables.shared(run.overlap)]
    return Section(f"{name}-overlap", "Neurons that tasks share", text, figures, section_tables)


def _groups(run: RunView, name: str) -> Section | None:
    if run.groups is None:
        return None
    figures = [
        page_figure(viz.group_masking_bars(run.groups, measure), f"{name}-groups-{measure}")
        for measure in MEASURES
    ]
    text = "What each task loses when neurons of one group are silenced, as many of each group."
    section_tables = [shared_tables.group_masking(run.groups)]
    return Section(f"{name}-groups", "Groups masked", text, figures, section_tables, stacked=True)


def _effects(run: RunView, name: str) -> Section | None:
    if not run.effects:
        return None
    figures = [
        page_figure(viz.side_effect_bars(effects), f"{name}-effects{i}", title=f"On {dataset}")
        for i, (dataset, effects) in enumerate(run.effects.items())
    ]
    section_tables = [
        shared_tables.side_effects(effects, f"On {dataset}") for dataset, effects in run.effects.items()
    ]
    text = "What the scales that were learned for one task do to it and to the others."
    return Section(f"{name}-effects", "Side effects of steering", text, figures, section_tables, stacked=True)


def _lens(run: RunView, name: str) -> Section | None:
    """Logit lenses of the single examples, and the mean lens with and without the neurons."""
    figures = []
    for i, example in enumerate(run.examples, start=1):
        if example.lens is not None:
            title = f"Example {i}: the next token, read after each layer"
            figures.append(page_figure(viz.lens_grid(example.lens, title=title), f"{name}-lens{i}"))
        if example.image_lens is not None:
            title = f"Example {i}: {example.image_lens.what}"
            options = {"region": example.region, "title": title}
            figure = viz.image_lens(example.image_lens, example.image, **options)
            figures.append(page_figure(figure, f"{name}-image-lens{i}"))
    section_tables = [shared_tables.lens(delta) for delta in run.lenses.values()]
    if len(section_tables) > 1:
        section_tables = [
            replace(table, title=f"{task}: {table.title[0].lower()}{table.title[1:]}")
            for task, table in zip(run.lenses, section_tables, strict=True)
        ]
    if not figures and not section_tables:
        return None
    text = "What the residual stream after each layer would say, read through the final norm and the "
    text += "unembedding"
    text += ": of the examples above" if figures else ""
    text += f"{', and' if figures else ':'} before and after masking the neurons" if section_tables else ""
    return Section(f"{name}-lens", "Logit lens", f"{text}.", figures, section_tables)


def _settings(run: RunView, name: str) -> Section | None:
    section_tables = [
        tables.settings(heading, values)
        for heading, values in (("Settings", run.settings), ("Environment", run.environment))
        if values
    ]
    return (
        Section(f"{name}-settings", "Settings and environment", "", (), section_tables)
        if section_tables
        else None
    )
