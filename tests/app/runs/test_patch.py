"""What a patching keeps for its report: the first pair, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import example_results as made

import hones_lens as hl
from hones_lens.app.cli import main
from hones_lens.app.report.run_folder import read_view
from hones_lens.app.report.run_view import PairView
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.patch import PairsChoice, start_patching
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.results.labelled import Labelled

MODELS = pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])


def first_pair(name: str, folder: Path, **options: object) -> tuple[hl.HookedVLM, PairView]:
    """A model, and the first pair as it is read back from the folder."""
    model = hl.HookedVLM.from_pretrained(name)
    choice = PairsChoice(**{"limit": 2, **options})
    pairs = choice.load(model)
    run = start_patching(model, pairs, folder, choice, {"what": "resid_pre", "by": "group"})
    run.stage("patch", Labelled, lambda: Labelled("x", torch.ones(2), ("layer",), n=2))
    return model, read_view(folder).patching.pair


@MODELS
def test_the_first_counterfactual_pair_is_kept(name: str, tmp_path: Path) -> None:
    model, pair = first_pair(name, tmp_path / "run", kind="color")
    fact = hl.counterfactual_pairs("vqa", "color", "dev", 2)[0]
    assert pair.clean.tobytes() == fact.clean.image.tobytes()
    assert pair.corrupted.tobytes() == fact.corrupted.image.tobytes() != pair.clean.tobytes()
    assert (pair.prompt, pair.answer.strip(), pair.foil.strip()) == (
        hl.load_task("vqa").target_prompt(fact.clean),
        *fact.answers,
    )
    inputs = model.prepare(fact.clean.image, pair.prompt)
    assert torch.equal(pair.inputs.image_mask, inputs.image_mask)
    values = torch.arange(inputs.input_ids.shape[1]).float()
    assert torch.equal(pair.inputs.heatmap(values), inputs.heatmap(values))
    assert pair.inputs.grids == inputs.grids and pair.inputs.regions == inputs.regions


def test_a_corrupted_example_has_one_picture_and_ones_own_picture_two(tmp_path: Path) -> None:
    _, pair = first_pair("tiny-llava", tmp_path / "a", corrupt="noise", task="ocr")
    example = hl.load_examples("shapes", "ocr", "dev", 2)[0]
    assert pair.clean.tobytes() == example.image.tobytes() and pair.corrupted is None and pair.foil is None
    assert pair.prompt == hl.load_task("ocr").target_prompt(example)
    for i, one in enumerate(hl.load_examples("shapes", "vqa", "dev", 2)):
        one.image.save(tmp_path / f"{i}.png")
    files = {"image": str(tmp_path / "0.png"), "corrupted_image": str(tmp_path / "1.png")}
    own = {**files, "prompt": "is it red?", "answer": "yes", "foil": "no", "limit": None}
    _, pair = first_pair("tiny-llava", tmp_path / "b", **own)
    images = [one.image.tobytes() for one in hl.load_examples("shapes", "vqa", "dev", 2)]
    assert [pair.clean.tobytes(), pair.corrupted.tobytes()] == images
    asked = "Question: is it red?\nAnswer the question with a short phrase."
    assert (pair.prompt, pair.id) == (asked, "0.png")


@pytest.mark.exhaustive
def test_one_page_of_a_patching_and_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--limit", "3", "--layers", "1,2"]
    assert main(["patch", "--kind", "color", "--by", "position", "--limit", "1", "--out", "patched"]) == 0
    assert main(["patch", "--what", "z", "--out", "heads", *few]) == 0
    run = Run("vqa", {"model": "tiny-llava", "task": "vqa"})
    run.stage("neurons", NeuronScores, made.neurons)
    assert main(["report", "patched", "vqa", "heads", "--out", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    for said in (
        "The same on the picture",
        "task neurons per layer",
        "each head alone",
        "at one position at a",
    ):
        assert said in page
    found = Labelled.load("heads/patch.json")
    for layer in (1, 2):
        for head in range(8):
            for group in found.names("group"):
                one = found.select(layer=layer, head=head, group=group).item()
                said = f"{one:+.3f}".replace("-", "−").replace("+0.000", "0.000").replace("−0.000", "0.000")
                assert f"<title>layer {layer}, head {head}, {group}: {said} [" in page
