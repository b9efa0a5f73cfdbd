"""The widget in plain Python: clicks arrive as traits, states set in Python go out."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from helpers.explorer_views import example, prompt, shipped

import hones_lens
from hones_lens.app.explorer.explore import explore
from hones_lens.app.explorer.views import SECTIONS


@pytest.fixture
def explorer():
    pytest.importorskip("anywidget")
    return explore(shipped("tiny-llava"), example().image, prompt())


def click(explorer, n: int = 1, **parts) -> None:
    explorer.asked = {**explorer.state.to_json(), **parts, "n": n}


def test_without_the_extra_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "hones_lens.app.explorer.widget", raising=False)
    with pytest.raises(ImportError, match=r"pip install hones-lens\[notebook\]"):
        hones_lens.explore(shipped("tiny-llava"), example().image, prompt())


def test_it_opens_with_the_head_that_adds_most(explorer) -> None:
    scores = torch.tensor(explorer.map["scores"])
    assert explorer.state.head == divmod(int(scores.argmax()), 8) == (0, 7)
    assert explorer.shown == {**explorer.state.to_json(), "n": 0}
    assert explorer.text == "cross" and explorer.interventions == []


def test_a_click_on_a_head_changes_the_head_and_nothing_that_does_not_depend_on_it(explorer) -> None:
    before = {name: getattr(explorer, name) for name in SECTIONS}
    click(explorer, 7, head=[0, 5])
    assert explorer.state.head == (0, 5) and explorer.shown["n"] == 7
    assert [name for name in SECTIONS if getattr(explorer, name) is not before[name]] == ["head"]
    assert explorer.head["place"] == [0, 5] and explorer.head["feeds"] != before["head"]["feeds"]


def test_a_toggle_changes_the_answer_and_the_interventions_run_in_the_model(explorer) -> None:
    click(explorer, edits=[{"kind": "head", "layer": 0, "index": 5, "factor": None}])
    assert explorer.answer["text"] == explorer.text == "triangle"
    with torch.no_grad():
        logits = explorer.views.model.run_with_hooks(explorer.inputs, fwd_hooks=explorer.interventions)
    cross = int(explorer.views.answered.answer[0])
    assert explorer.answer["p"][0] == pytest.approx(logits[0, -1].softmax(-1)[cross].item(), rel=1e-4)
    assert explorer.answer["p"][0] < 0.05 < 0.95 < explorer.answer["was"][0]


def test_methods_set_the_state_and_what_is_shown(explorer) -> None:
    explorer.ablate(head=(0, 5))
    explorer.scale(2.0, neuron=(1, 3))
    assert [str(e) for e in explorer.state.edits] == ["L0H5 ablated", "L1N3 × 2"]
    assert explorer.shown["edits"] == explorer.state.to_json()["edits"]
    explorer.scale(1.0, head=(0, 5))
    assert [str(e) for e in explorer.state.edits] == ["L1N3 × 2"]
    explorer.select(neuron=(1, 3), token=2)
    assert (explorer.state.show, explorer.neuron["place"], explorer.state.token) == ("neuron", [1, 3], 2)
    explorer.clear()
    assert explorer.interventions == [] and explorer.answer["p"] == explorer.answer["was"]


def test_what_does_not_exist_is_refused_and_changes_nothing(explorer) -> None:
    state, shown = explorer.state, explorer.shown
    with pytest.raises(ValueError, match="head L0H8 does not exist: 4 layers of 8 heads"):
        explorer.select(head=(0, 8))
    with pytest.raises(ValueError, match="give a head or a neuron"):
        explorer.ablate()
    with pytest.raises(ValueError, match="position 999"):
        explorer.state = replace(state, token=999)
    assert explorer.state is state and explorer.shown is shown


def test_what_is_synchronised_is_small(explorer) -> None:
    import json

    sent = {name: explorer.get_state(name)[name] for name in ("scene", "shown", *SECTIONS)}
    assert len(json.dumps(sent)) < 30_000


def test_a_saved_notebook_shows_a_still(explorer) -> None:
    explorer.ablate(head=(0, 5))
    data, _ = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    still = data["text/html"]
    assert "triangle" in still and "L0H5 ablated" in still and "data:image/" in still
    assert "<script" not in still and "&lt;" not in still.replace("&lt;/s&gt;", "")
    assert "Question: what shape is the green one?" in still
