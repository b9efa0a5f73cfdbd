"""Examples, lenses, flow and patching of a run folder are read back as they were saved, and drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import example_comparisons, example_results as made
from helpers.report_page import Page, written
from PIL import Image

from hones_lens.analysis.lens.difference import LensDifference
from hones_lens.analysis.lens.table import LensPosition, LogitLens
from hones_lens.app.report.run_folder import read_view
from hones_lens.app.report.run_view import ExampleView, RunView
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.views import save_examples
from hones_lens.hones.attribution.flow import HeadNeuronFlow, PromotedToken
from hones_lens.results.files import Component, write_json
from hones_lens.results.labelled import Labelled


def logit_lens(top: str = "blue") -> LogitLens:
    """Three layers, two tokens each; the last one is sure of `top`."""
    tokens = ((("▁a", "<s>"), ("▁b", top), (top, "▁b")),)
    logits = torch.tensor([[[0.3, 0.1], [1.5, 1.25], [9.1, 0.7]]])
    shares = torch.tensor([[[0.25, 0.125], [0.3, 0.2], [0.98, 0.01]]])
    ids = torch.tensor([[[4, 1], [5, 6], [6, 5]]])
    return LogitLens("tiny-llava", (LensPosition(0, 70, "▁:"),), ("embed", 0, 1), ids, tokens, logits, shares)


def image_lens() -> Labelled:
    values = -torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))
    what = "log-prob of '▁blue' by the logit lens at each image token"
    return Labelled(what, values, ("layer", "row", "column"), {"layer": ("embed", 0, 1)})


def flow() -> HeadNeuronFlow:
    contributions = torch.tensor([[0.4, 0.0, 0.1], [0.2, 0.3, 0.0]], dtype=torch.float64)
    return HeadNeuronFlow(
        task="vqa",
        model_name="tiny-llava",
        heads=(Component(0, 5, 0.3), Component(0, 2, 0.1)),
        neurons=(Component(3, 7, 0.6), Component(2, 1, 0.3), Component(1, 9, 0.1)),
        contributions=contributions,
        total=2.0,
        activations=torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64),
        promoted=tuple((PromotedToken(f"<t{n}>", 2.0), PromotedToken("▁of", 1.0)) for n in range(3)),
        n_examples=96,
    )


def example(**changes: object) -> ExampleView:
    looks = {"L1H3": made.attention(), "L0H0": made.attention() / 2}
    parts = {
        "looks": looks,
        "region": (0.0, 0.0, 112.0, 112.0),
        "lens": logit_lens(),
        "image_lens": image_lens(),
    }
    return made.example(**{**parts, **changes})


def test_examples_are_read_back_as_they_were_saved(tmp_path: Path) -> None:
    run = Run(tmp_path / "vqa", {"model": "tiny-llava", "task": "vqa"})
    saved = [example(), made.example(looks={}, answer_masked=None)]
    run.files("examples", lambda: save_examples(run, saved))
    run.stage("flow", HeadNeuronFlow, flow)
    view = read_view(run.folder)
    for one, again in zip(saved, view.examples, strict=True):
        for name in ("prompt", "target", "answer", "answer_masked", "head", "masked_label", "region"):
            assert getattr(again, name) == getattr(one, name), name
        assert again.image.tobytes() == one.image.tobytes()
        assert list(again.looks) == list(one.looks)
        for head, values in one.looks.items():
            assert torch.equal(again.looks[head], values)
    first, lens, shown = view.examples[0], logit_lens(), image_lens()
    assert torch.equal(first.looks[first.head], made.attention()) and view.examples[1].looks == {}
    assert (first.lens.places, first.lens.layers, first.lens.tokens) == (
        lens.places,
        lens.layers,
        lens.tokens,
    )
    for name in ("ids", "logits", "probabilities"):
        assert torch.equal(getattr(first.lens, name), getattr(lens, name))
    assert (
        torch.equal(first.image_lens.values.float(), shown.values) and first.image_lens.labels == shown.labels
    )
    assert view.examples[1].lens is None and view.examples[1].image_lens is None
    assert (
        torch.equal(view.flow.contributions, flow().contributions) and view.flow.promoted == flow().promoted
    )


def test_folders_of_before_have_one_head_and_no_lens(tmp_path: Path) -> None:
    run = Run(tmp_path / "vqa", {"model": "tiny-llava", "task": "vqa"})
    made.image().save(run.path("example-0.png"))
    row = {"prompt": "p", "target": "t", "answer": "a", "answer_masked": None, "head": "L0H1"}
    row |= {"masked_label": "m", "image": "example-0.png", "attention": [[0.5, 0.25]]}
    write_json(run.path("examples.json"), {"kind": "examples", "examples": [row]})
    run.record("examples", [run.path("examples.json"), run.path("example-0.png")])
    (view,) = read_view(run.folder).examples
    assert list(view.looks) == ["L0H1"] and view.looks["L0H1"].tolist() == [[0.5, 0.25]]
    assert view.lens is None and view.region is None


def section(source: str, name: str) -> str:
    return source[source.index(f'<section id="run1-{name}">') :].partition("</section>")[0]


def test_lenses_of_examples_are_drawn_with_their_numbers(tmp_path: Path) -> None:
    source, page = written(tmp_path, RunView("t", "tiny-llava", "vqa", "accuracy", examples=[example()]))
    part = section(source, "lens")
    lens = logit_lens("blue")
    texts = Page()
    texts.feed(part[part.index("<svg") : part.index("</svg>") + 6])
    said = [text.strip() for text in texts.texts if text.strip()]
    for layer in range(3):
        for rank in range(2):
            assert lens.tokens[0][layer][rank] in said
            assert f"{float(lens.probabilities[0, layer, rank]):.2f}" in said
    assert "Example 1: the next token, read after each layer" in page.text
    assert "Example 1: log-prob of '▁blue' by the logit lens at each image token" in page.text
    assert part.count("<svg") == 2 and part.count("<image") == 5, "picture, a map for each layer, scale"


def test_the_flow_says_every_link(tmp_path: Path) -> None:
    found = flow()
    source, _ = written(tmp_path, RunView("t", "tiny-llava", "vqa", "accuracy", flow=found))
    tips = dict(re.findall(r"<title>([^<]+): (\S+) \(", section(source, "flow")))
    for h, head in enumerate(("L0H5", "L0H2")):
        for n, neuron in enumerate(("L3N7", "L2N1 (−)", "L1N9")):
            share = float(found.contributions[h, n])
            said = tips.get(f"{head} → {neuron}")
            assert (said is None) if share == 0 else float(said) == pytest.approx(share, rel=1e-3)
    assert float(tips["L3N7"]) == pytest.approx(0.6)
    assert 'class="pan"' in section(source, "flow"), "wider than a phone"
    nothing = HeadNeuronFlow(**{**vars(found), "contributions": torch.zeros(2, 3, dtype=torch.float64)})
    source, _ = written(tmp_path, RunView("t", "tiny-llava", "vqa", "accuracy", flow=nothing))
    assert "run1-flow" not in source


def patch_settings(**changes: object) -> dict[str, object]:
    names = (
        "kind image prompt answer foil corrupted_image corrupted_prompt corrupt strength color corrupt_box"
    )
    patch = {"what": "z", "by": "group", "direction": "denoise", "metric": "logit_diff", "raw": False}
    settings = {**dict.fromkeys(names.split()), "model": "tiny-llava", "task": "ocr", "dataset": "shapes"}
    return {**settings, "patch": patch, **changes}


@pytest.mark.parametrize(
    ("changes", "title", "pairs"),
    [
        ({}, "ocr, z patched by group", "1,200 pairs of ocr pictures that differ in one fact"),
        (
            {"kind": "word"},
            "ocr, z",
            "1,200 pairs of ocr pictures that differ in one fact, of which the word",
        ),
        ({"corrupt": "noise", "dataset": "coco"}, "ocr, z", "1,200 ocr examples of coco, corrupted by noise"),
        (
            {"image": "a/cat.png", "corrupt": "blur", "corrupt_box": [0.0, 1.5, 56.0, 112.0]},
            "cat.png, z",
            "one picture, cat.png, corrupted by blur in the box 0, 1.5, 56, 112",
        ),
        (
            {"image": "cat.png", "corrupted_image": "b.png", "corrupted_prompt": "q"},
            "cat.png, z",
            "one picture, cat.png, against another image and another prompt",
        ),
    ],
)
def test_a_folder_of_patching(tmp_path: Path, changes, title: str, pairs: str) -> None:
    run = Run(tmp_path / "patch", patch_settings(**changes))
    values = torch.randn(4, 3, dtype=torch.float64)
    saved = Labelled(
        "share restored", values, ("layer", "group"), {"group": ("image", "question", "last")}, n=1200
    )
    run.stage("patch", Labelled, lambda: saved)
    view = read_view(run.folder)
    assert view.title.startswith(f"tiny-llava · {title}")
    assert view.patching is not None and view.patching.pairs.startswith(pairs)
    assert torch.equal(view.patching.result.values, values) and view.patching.pair is None
    assert view.heads is None and view.masking == []
    _, page = written(tmp_path, view)
    assert pairs in page.text and "None" not in page.text


def test_lenses_by_task(tmp_path: Path) -> None:
    run = Run(tmp_path / "overlap", {"model": "tiny-llava", "tasks": ["vqa", "ocr"]})
    deltas = {
        task: replace(example_comparisons.lens(), task=task, n_neurons=n)
        for task, n in (("vqa", 3), ("ocr", 5))
    }
    for task, delta in deltas.items():
        run.stage(f"lens-{task}", LensDifference, lambda delta=delta: delta)
    view = read_view(run.folder)
    assert view.lenses == deltas
    _, page = written(tmp_path, view)
    headings = [f"{task}: what the neurons make the model want to say" for task in ("ocr", "vqa")]
    assert all(heading in page.text for heading in headings)
    assert "3 neurons, mean over" in page.text and "5 neurons, mean over" in page.text


def test_a_picture_of_patching_is_the_saved_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "patch", patch_settings())
    run.stage("patch", Labelled, lambda: Labelled("x", torch.ones(2), ("layer",), n=1))
    made.image((24, 20)).save(run.path("pair-clean.png"))
    run.path("pair.json").write_text(
        '{"kind": "patch-pair", "clean": "pair-clean.png", "corrupted": null, "id": "a", "prompt": "p", '
        '"answer": "red", "foil": null, "image_mask": "0110", "grids": [[1, 2]], '
        '"regions": [[2.0, 0.0, 22.0, 20.0]], "layouts": []}'
    )
    run.record("pair", [run.path("pair.json"), run.path("pair-clean.png")])
    pair = read_view(run.folder).patching.pair
    assert isinstance(pair.clean, Image.Image) and pair.clean.size == (24, 20) and pair.corrupted is None
    assert pair.inputs.image_mask.tolist() == [[False, True, True, False]]
    assert pair.inputs.grids == (((1, 2),),) and pair.inputs.regions == (((2.0, 0.0, 22.0, 20.0),),)
    assert pair.inputs.heatmap(torch.arange(4.0)).tolist() == [[1.0, 2.0]]
