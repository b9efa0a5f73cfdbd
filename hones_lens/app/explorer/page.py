"""The explorer as HTML: its script and style, a self-contained page, and a static summary for notebooks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Template
from PIL import Image

from hones_lens.app.explorer.state import Edit, LayerIndex, State
from hones_lens.app.explorer.views import NEURONS, SECTIONS, ExplorerViews
from hones_lens.viz import (
    BRIGHT,
    PAGE,
    attention_over_image,
    image_uri,
    palette_css,
    plot_image,
    reader_css,
    scheme_css,
)

MOST_BYTES = 950_000  # size limit of a written page
_MOST_ABLATED = 64  # heads of which a page keeps the answer without them: each is a run of the model
_WELL = ("#f1f4f7", "#262c33")  # background of bars and switches, light and dark
_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="hones_lens">
<link rel="icon" href="data:,">
<title>{{ title | e }}</title>
<style>
{{ style }}
{{ page }}
body { margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 14px 12px 40px; }
</style>
</head>
<body>
<main id="explorer"><noscript>This page draws with JavaScript.</noscript></main>
<script type="application/json" id="data">{{ data }}</script>
<script type="module">
{{ script }}
const data = JSON.parse(document.getElementById("data").textContent);
mount(document.getElementById("explorer"), {{ backend }});
</script>
</body>
</html>
"""
)


def script() -> str:
    """The JavaScript of the explorer, as one module."""
    return _static("explorer.js")


def stylesheet() -> str:
    """The style sheet, with the palette's colours for light and dark schemes."""
    light, dark = (f"{palette_css(scheme)} --well: {_WELL[scheme]}; --bright: {BRIGHT};" for scheme in (0, 1))
    return f"{scheme_css('.hones-explorer', light, dark)}\n{_static('explorer.css')}"


def _static(name: str) -> str:
    return (files("hones_lens.app.explorer") / "static" / name).read_text(encoding="utf-8")


def html(title: str, data: Any, backend: str) -> str:
    """A page that needs no other file.

    Args:
        title: Title of the window.
        data: JSON values, which the script reads as `data`.
        backend: JavaScript expression for the backend, made from `data`.
    """
    page = reader_css("body", *(f"background: {colour};" for colour in PAGE))
    fields = {
        "page": page,
        "style": stylesheet(),
        "script": script(),
        "data": _script_json(data),
        "backend": backend,
    }
    return _PAGE.render(title=title, **fields)


def _script_json(data: Any) -> str:
    """JSON in ASCII that is safe inside a script element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# -- a self-contained page -------------------------------------------------------------------------


def write_page(views: ExplorerViews, state: State, file: str | Path, most_bytes: int | None = None) -> Path:
    """Write one HTML file that works without Python or network.

    Sections are stored in this order until the size limit is reached: what the state shows; details of every
    head, those with the highest scores first, and of the neurons that the first view lists; the answer with
    each of the best heads ablated; the lens of every position; the answer with each of those neurons ablated;
    the neurons that other heads feed; other tokens. Details that no longer fit say so when they are clicked.

    The attention of all heads together is stored if it takes at most a quarter of the limit; otherwise heads
    show theirs where their details are stored. The first view is written even where it exceeds the limit.

    Args:
        views: Computes the sections.
        state: The state in which the page opens; its edits are dropped.
        file: The file to write; its folder is created if it does not exist.
        most_bytes: Size limit in bytes; default: MOST_BYTES.
    """
    most_bytes = MOST_BYTES if most_bytes is None else most_bytes
    state = replace(state, edits=())
    scene = views.scene()
    kept: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    size = len(html("", {"scene": scene, "state": state.to_json(), "kept": kept}, "").encode()) + 100
    every_head = views.attention_bytes <= most_bytes / 4
    for name, key, section_state in _sections_to_keep(views, state):
        if key in kept[name] or (name == "attention" and not every_head):
            continue
        section = views.section(name, section_state)
        size += len(_script_json({key: section}))
        if size > most_bytes and kept[name]:
            break
        kept[name][key] = section
    data = {"scene": scene, "state": state.to_json(), "kept": kept}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html(f"{scene['model']} · explorer", data, "ofPage(data)"), encoding="utf-8")
    return file


def _sections_to_keep(views: ExplorerViews, state: State) -> Iterator[tuple[str, str, State]]:
    """(section, key, state), the most useful first; keys as the script's `ofPage` makes them."""
    answered, heads = views.answered, views.ranked_heads(state)
    neurons = _listed_neurons(views, state, heads)
    listed = list(dict.fromkeys(islice(neurons, 2 * NEURONS)))
    yield from _section_keys(views, state, SECTIONS)
    for head in heads:
        yield from _section_keys(views, replace(state, head=head), ("head",))
    for neuron in listed:
        yield from _section_keys(views, replace(state, neuron=neuron), ("neuron",))
    for head in heads[:_MOST_ABLATED]:
        yield from _section_keys(views, replace(state, edits=(Edit("head", *head),)), ("answer",))
    for position in range(answered.n_tokens):
        yield from _section_keys(views, replace(state, lens=position), ("lens",))
    for neuron in listed:
        yield from _section_keys(views, replace(state, edits=(Edit("neuron", *neuron),)), ("answer",))
    for neuron in neurons:
        yield from _section_keys(views, replace(state, neuron=neuron), ("neuron",))
    text_positions = (~answered.sequence.image_mask[0]).nonzero()[:, 0].flip(0).tolist()
    for token in text_positions:
        yield from _section_keys(
            views, replace(state, token=token), ("answer", "map", "attention", "head", "neuron")
        )


def _listed_neurons(views: ExplorerViews, state: State, heads: list[LayerIndex]) -> Iterator[LayerIndex]:
    """The neurons that the first view lists, then those that each head feeds most."""
    for rows in (views.section("map", state)["neurons"], views.fed_neurons(state)):
        yield from ((layer, index) for layer, index, *_ in rows)
    for head in heads:
        yield from ((layer, index) for layer, index, *_ in views.fed_neurons(replace(state, head=head)))


def _section_keys(
    views: ExplorerViews, state: State, names: tuple[str, ...]
) -> Iterator[tuple[str, str, State]]:
    token, step = state.token, views.answered.answer_index(state.token)
    edits = "+".join(f"L{e.layer}{e.kind[0].upper()}{e.index}" for e in state.edits)
    keys = {
        "answer": f"{edits}@{step}",
        "map": f"{step}",
        "attention": f"{token}",
        "head": f"{token}@{state.head[0]}.{state.head[1]}",
        "neuron": f"{token}@{state.neuron[0]}.{state.neuron[1]}",
        "lens": f"{state.lens}",
    }
    for name in names:
        yield name, keys[name], state


# -- a summary for saved notebooks -----------------------------------------------------------------


def static_html(views: ExplorerViews, state: State) -> str:
    """The pictures under the head's attention, the prompt and the answer, as HTML without script."""
    layer, head = state.head
    answer = views.section("answer", state)
    pattern = views.activations(state.edits, state.token).pattern[layer, head]
    name = f"L{layer}H{head}"
    pictures = [image_uri(_attention_overlay(views, i, pattern), 320) for i in range(len(views.pictures))]
    images = "".join(
        f'<img src="{uri}" alt="attention of {name} over the picture" width="240">' for uri in pictures
    )
    prompt = views.answered.prompt
    eos = views.model.cfg.eos_token_ids
    said = [i for i, token in enumerate(views.answered.answer.tolist()) if token not in eos]
    p, was = (100 * math.prod(answer[key][i] for i in said) for key in ("p", "was"))
    unedited = f", {was:.2f} % without the edits" if state.edits else ""
    rows = {
        "model": views.model.cfg.model_name,
        "prompt": views.model.tokenizer.decode(prompt.input_ids[prompt.token_groups["question"]]),
        "answer": answer["text"],
        f"probability of “{views.text(())}”": f"{p:.2f} %{unedited}",
        "edits": ", ".join(map(str, state.edits)) or "none",
        "picture": f"lit where {name} looks from {views.position_name(state.token)}",
    }
    table = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    note = "Run the notebook to click through it: explore(model, image, prompt)."
    return f"<div>{images}<table>{table}</table><p><small>{note}</small></p></div>"


def _attention_overlay(views: ExplorerViews, image: int, pattern: Any) -> Image.Image:
    """The part of a picture that the model sees, with a head's attention over it."""
    grid = views.answered.sequence.heatmap(pattern.cpu(), 0, image)
    picture = views.pictures[views.answered.prompt.picture_of(0, image)]
    left, top, right, bottom = (round(side) for side in views.answered.prompt.regions[0][image])
    return plot_image(attention_over_image(picture.crop((left, top, right, bottom)), grid, bare=True))
