"""The report: one HTML file with the figures, tables and words of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from hones_lens.attribution.heads import HeadScores
from hones_lens.attribution.neurons import NeuronScores
from hones_lens.masking import MaskingResult
from hones_lens.statistics import Interval
from hones_lens.viz import plots, tables, theme
from hones_lens.viz.tables import Table
from hones_lens.viz.words import headline, level, listed, measured, number, percent, span, tied, verdict

_SECOND_SHARE = 0.05  # kinds of question are drawn at the headline's share and at this one


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example, for showing.

    Attributes:
        image: The picture.
        prompt, target: What was asked, and the right answer.
        answer, answer_masked: What the model says, as it is and with neurons masked; None: not asked.
        head: Whose attention, e.g. `L3H5`.
        attention: Of that head from one token to the image, [rows columns]; None: not drawn.
        masked_label: What was masked, e.g. `76 neurons masked`.
        attention_from: The token that looks.
    """

    image: Image.Image
    prompt: str
    target: str
    answer: str
    answer_masked: str | None = None
    head: str = ""
    attention: Tensor | None = None
    masked_label: str = "task neurons masked"
    attention_from: str = "the last prompt token"


@dataclass(frozen=True, eq=False)
class RunView:
    """All that a report shows of one run; what is missing is left out.

    Attributes:
        title: Heading.
        model_name, task, metric_name: What was studied.
        settings, environment: Names and values; mappings may be nested.
        heads: HONES eq. H1.
        neurons: HONES eqs. H2 and H3.
        masking: HONES eq. H4, at one or several shares.
        others: By name: other rankings masked at the same budget.
        examples: Pictures with the attention of a head.
        promoted: By (layer, index): the tokens that a neuron's output promotes most.
        evaluation: The model before anything is changed, e.g. {"accuracy": Interval, "examples": 200}.
    """

    title: str
    model_name: str
    task: str
    metric_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    heads: HeadScores | None = None
    neurons: NeuronScores | None = None
    masking: Sequence[MaskingResult] = ()
    others: Mapping[str, MaskingResult] = field(default_factory=dict)
    examples: Sequence[ExampleView] = ()
    promoted: Mapping[tuple[int, int], Sequence[str]] = field(default_factory=dict)
    evaluation: Mapping[str, Interval | float | int | str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of all neurons that headline numbers are about."""
        return self.neurons.ratio if self.neurons else 0.01

    @property
    def main(self) -> MaskingResult | None:
        """The masking result at that share, or the nearest."""
        return headline(self.masking, self.share) if self.masking else None


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Drawn:
    """A figure in the page: its heading, the SVG, and what is to be known about it."""

    title: str
    svg: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of a run's page: words, figures, tables."""

    id: str
    title: str
    text: str
    figures: Sequence[Drawn] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[dict[str, Any]] = ()


def write_report(path: str | Path, runs: Sequence[RunView], title: str = "") -> Path:
    """Write one HTML file that needs no other file, no network and no JavaScript.

    Args:
        path: The file; its folder is made if need be.
        runs: One after the other on the page.
        title: Of the page; default: the run's, or how many runs there are.

    Returns:
        The file's path.

    Raises:
        ValueError: No runs.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    path = Path(path)
    environment = Environment(
        loader=PackageLoader("hones_lens.viz", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tie"] = tied
    page = environment.get_template("report.html").render(
        title=title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs"),
        palette=theme.PALETTE,
        runs=[_run(run, f"run{i}") for i, run in enumerate(runs, start=1)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def _run(run: RunView, name: str) -> dict[str, Any]:
    makers = (_examples, _heads, _neurons, _masking, _kinds, _rankings, _settings)
    return {
        "id": name,
        "title": run.title,
        "story": story(run),
        "tiles": _tiles(run),
        "verdict": verdict(run.masking, run.share).split("\n") if run.masking else [],
        "sections": [section for make in makers if (section := make(run, name))],
    }


# --- Story and headline numbers --------------------------------------------------------------

_HEADS = {"replace_with_other_heads_mean": "replaced in turn by the mean of its layer's other heads"}


def story(run: RunView) -> list[str]:
    """What was done, in two sentences or fewer."""
    sentences, kept = [], ""
    if run.heads:
        count, n = len(run.heads.top()), run.heads.drops.shape[-1]
        tried = int((run.heads.counts > 0).sum())
        every = "Every attention head"
        if tried < run.heads.scores.numel():
            every = f"Each of {tried:,} attention heads"
        done = _HEADS.get(run.heads.intervention, f"changed in turn ({run.heads.intervention})")
        kept = f"the {count} that cost most {run.metric_name} were kept" if count else "none was missed"
        sentences.append(f"{every} of {run.model_name} was {done} on {n:,} {run.task} examples, and {kept}.")
    if (main := run.main) is not None:
        ways = {"hones": "The FFN neurons that those heads make write towards the right answer"}
        which = ways.get(main.method, f"The FFN neurons ranked best by {main.method.replace('_', ' ')}")
        sets = f", next to {len(main.controls)} random sets of as many neurons" if main.controls else ""
        shares = listed([percent(result.ratio) for result in sorted(run.masking, key=lambda r: r.ratio)])
        n = main.metric_interval.n
        sentences.append(f"{which} ({shares} of all) were then silenced on {n:,} held-out examples{sets}.")
    return sentences


def _tiles(run: RunView) -> list[Tile]:
    tiles = []
    if (main := run.main) is not None:
        for measure in ("metric", "log_prob"):
            m = measured(main, measure)
            random = f" Random sets: {number(m.random_mean)} on average, {number(m.random_worst)} at worst."
            interval = f"{level(m.interval)} interval {span(m.interval)}"
            detail = f"Drop {number(m.drop)}, {interval}, n = {m.interval.n:,}."
            label = f"{m.name}, {percent(main.ratio)} of the neurons masked"
            value = f"{number(m.baseline)} → {number(m.masked)}"
            tiles.append(Tile(label[0].upper() + label[1:], value, detail + (random if m.controls else "")))
    if run.heads and (top := run.heads.top(1)):
        rows = run.heads.to_dataframe().set_index(["layer", "head"])
        error = float(rows.at[(top[0].layer, top[0].index), "standard_error"])
        lost = f"Drop of {run.metric_name} without it: {number(top[0].score)}"
        detail = f"{lost} (standard error {number(error)}), n = {run.heads.drops.shape[-1]:,}."
        tiles.append(Tile("Head that matters most", f"L{top[0].layer}H{top[0].index}", detail))
    return tiles


# --- Sections --------------------------------------------------------------------------------


def _drawn(figure: theme.Plot, name: str, tooltips: Mapping[str, Sequence[str]] | None = None) -> Drawn:
    assert figure.heading is not None
    svg = theme.themed_svg(figure, name, f"{figure.heading.title}. {figure.heading.note}", tooltips)
    return Drawn(figure.heading.title, svg, figure.heading.note)


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
    return Section(f"{name}-heads", "Heads", text, [figure], [tables.top_heads(run.heads)])


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


def _settings(run: RunView, name: str) -> Section | None:
    found = [
        tables.settings(heading, values)
        for heading, values in (("Settings", run.settings), ("Environment", run.environment))
        if values
    ]
    return Section(f"{name}-settings", "Settings and environment", "", (), found) if found else None
