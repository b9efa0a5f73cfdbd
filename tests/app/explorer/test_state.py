"""The state: what follows from it, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import random_llava

from hones_lens.app.explorer.state import Edit, State

START = State(token=4, lens=2, head=(0, 1), neuron=(2, 39))


def test_edits_replace_each_other_and_are_undone() -> None:
    state = START.edited("head", (0, 1), None).edited("neuron", (1, 2), 2.0).edited("head", (0, 1), 0.5)
    assert state.edits == (Edit("neuron", 1, 2, 2.0), Edit("head", 0, 1, 0.5))
    assert state.restored("head", (0, 1)).edits == (Edit("neuron", 1, 2, 2.0),)
    assert START.edits == ()
    assert [str(e) for e in state.edited("neuron", (1, 2), None).edits] == ["L0H1 × 0.5", "L1N2 ablated"]


def test_interventions_name_their_hooks_and_go_into_the_model() -> None:
    _, model = random_llava.make_pair()
    state = START.edited("head", (0, 1), 0.0).edited("neuron", (1, 2), None)
    assert [name for name, _ in state.interventions] == ["blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
    inputs = random_llava.mixed_batch(model)
    _, cache = model.run_with_cache(inputs, names_filter=[name for name, _ in state.interventions])
    z, post = cache["blocks.0.attn.hook_z"].clone(), cache["blocks.1.mlp.hook_post"].clone()
    z[:, :, 1] = 0

    def put(x, hook):
        x[..., 2] = 0
        return x

    by_hand = [("blocks.0.attn.hook_z", lambda x, hook: z), ("blocks.1.mlp.hook_post", put)]
    expected = model.run_with_hooks(inputs, fwd_hooks=by_hand)
    torch.testing.assert_close(model.run_with_hooks(inputs, fwd_hooks=state.interventions), expected)
    assert (expected - model(inputs)).abs().max() > 1e-3 and post[..., 2].abs().max() > 0


def test_it_goes_through_json() -> None:
    state = START.edited("head", (0, 1), None).edited("neuron", (1, 2), 2.5)
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {**START.to_json(), "head": [1]},
        {**START.to_json(), "edits": [{"kind": "head"}]},
        {**START.to_json(), "token": "x"},
        {**START.to_json(), "edits": [{"kind": "head", "layer": 0, "index": 0, "factor": "much"}]},
    ],
)
def test_what_is_no_state_is_refused(broken: dict) -> None:
    with pytest.raises(ValueError, match="not a state of the explorer"):
        State.from_json(broken)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (State(9, 0, (0, 0), (0, 0)), "token: position 9 is not in 0 … 8"),
        (State(0, -1, (0, 0), (0, 0)), "lens: position -1"),
        (State(0, 0, (3, 0), (0, 0)), "head L3H0 does not exist: 3 layers of 4 heads"),
        (State(0, 0, (0, 0), (0, 40)), "neuron L0N40 does not exist: 3 layers of 40 neurons"),
        (State(0, 0, (0, 0), (0, 0), show="all"), "show: 'all'"),
        (START.edited("head", (0, -1), None), "head L0H-1 does not exist"),
        (START.edited("layer", (0, 0), None), "an edit of a 'layer'"),
        (State(0, 0, (0, 0), (0, 0), edits=(Edit("head", 0, 0), Edit("head", 0, 0, 2.0))), "edited twice"),
        (START.edited("head", (0, 0), float("nan")), "a factor of at most"),
    ],
)
def test_what_the_model_does_not_have_is_refused(state: State, says: str) -> None:
    _, model = random_llava.make_pair()
    with pytest.raises(ValueError, match=says):
        state.check(model.cfg, 9)
    START.check(model.cfg, 9)
