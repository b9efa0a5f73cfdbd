"""What others compute in units, in any order and from pickles, is what one process computes, bit by bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence

import cloudpickle
import numpy as np
import pytest
import torch
from helpers.hf_task_loops import critical_heads, examples_of, pair

from hones_lens.analysis import counterfactual, patch_activations
from hones_lens.data import counterfactual_pairs
from hones_lens.engine import (
    Done,
    SharedJournal,
    SweepOptions,
    Tally,
    Unit,
    chunks,
    layer_blocks,
    measure,
    measure_log_probs,
)
from hones_lens.hones import attribute_neurons
from hones_lens.interventions import replace_with_other_heads_mean, zero_neurons
from hones_lens.model import HookedVLM
from hones_lens.tasks import load_task


class Others(dict[str, object]):
    """A journal whose units are done last one first, each from its pickle."""

    def __init__(self, model: HookedVLM):
        super().__init__()
        self.model, self.names = model, list[str]()

    def compute(self, units: Sequence[Unit], tick: Callable[[int], object]) -> Iterator[Done]:
        found: dict[str, Done] = {}
        self.names += [unit.name for unit in units]
        for unit in reversed([pickle.loads(cloudpickle.dumps(unit)) for unit in units]):
            found[unit.name] = unit.work(self.model)
            tick(unit.cells)
        for unit in units:
            done = found[unit.name]
            assert done.values.shape[:-1] == unit.shape and done.values.dtype == np.float64
            yield done


def arms(model: HookedVLM) -> list[list]:
    heads = [[replace_with_other_heads_mean(layer, head)] for layer in (0, 2) for head in range(2)]
    late = [[replace_with_other_heads_mean(1, head, "last")] for head in range(1)]
    return [[], *heads, zero_neurons([(0, 3), (2, 1)]), *late]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hones_lens.engine.units._FEWEST_EXAMPLES", 3)
    monkeypatch.setattr("hones_lens.engine.units._RANKED_EXAMPLES", 2)
    monkeypatch.setattr("hones_lens.hones.attribution.neurons._HEADS_OF_A_UNIT", 2)


@pytest.mark.parametrize("name", ["vqa", "retrieval"])
def test_answers_and_rankings(name: str) -> None:
    model, task, examples = pair()[1], load_task(name), examples_of(name, {"vqa": 5, "retrieval": 3}[name])
    others, tally, alone = Others(model), Tally(), Tally()
    options, pieces = {"batch_size": 2, "progress": False}, {"vqa": 2, "retrieval": 2}[name]
    n_units = pieces * 3  # of the layers
    shared = measure(model, task, examples, arms(model), SweepOptions(journal=others, tally=tally, **options))
    plain = measure(model, task, examples, arms(model), SweepOptions(tally=alone, **options))
    assert isinstance(others, SharedJournal) and len(others.names) == n_units
    for one, other in zip(shared, plain, strict=True):
        assert one.scores == other.scores
        assert np.array_equal(one.statistics, other.statistics)
    assert tally.forked == alone.forked > 0 and tally.near_ties == alone.near_ties
    again = measure(model, task, examples, arms(model), SweepOptions(journal=others, **options))
    assert [o.scores for o in again] == [o.scores for o in plain] and len(others.names) == n_units


@pytest.mark.parametrize("saved", [7, [], [[[1.0]]], [[[1.0, 1.0, 1.0]]] * 2])
def test_a_batch_of_another_shape_in_the_journal_is_refused(saved: object) -> None:
    model, task, examples = pair()[1], load_task("vqa"), examples_of("vqa", 3)
    for journal in ({"sweep/0": saved}, Others(model)):
        journal["sweep/0"] = saved
        with pytest.raises(ValueError, match="something else under 'sweep/0', and not 2 arms of 3 examples"):
            measure(model, task, examples, [[], []], SweepOptions(journal=journal, progress=False))


def test_log_probabilities() -> None:
    model, task, examples = pair()[1], load_task("vqa"), examples_of("vqa", 5)
    options = {"batch_size": 2, "progress": False}
    shared = measure_log_probs(
        model, task, examples, arms(model), SweepOptions(journal=Others(model), **options)
    )
    assert shared == measure_log_probs(model, task, examples, arms(model), SweepOptions(**options))


@pytest.mark.parametrize("what", ["z", "resid_pre", "vision_z"])
def test_patches(what: str) -> None:
    model = pair()[1]
    pairs = counterfactual(model, counterfactual_pairs("vqa", limit=5), "vqa")
    options = {"metric": "logit_diff", "batch_size": 2, "progress": False}
    others = Others(model)
    shared = patch_activations(model, pairs, what, journal=others, **options)
    plain = patch_activations(model, pairs, what, **options)
    assert others.names and torch.equal(shared.values, plain.values)
    assert shared.to_dict() == plain.to_dict()


def test_neurons() -> None:
    model, examples = pair()[1], examples_of("vqa", 5)
    heads = critical_heads(top_k=6)
    options = {"batch_size": 2, "progress": False}
    others = Others(model)
    shared = attribute_neurons(model, "vqa", examples, heads, journal=others, **options)
    plain = attribute_neurons(model, "vqa", examples, heads, **options)
    assert len(others.names) == 2 and torch.equal(shared.scores, plain.scores)
    assert shared.errors is not None and torch.equal(shared.errors, plain.errors)


def test_a_model_with_lasting_hooks_is_not_what_others_load() -> None:
    model, task, examples = pair()[1], load_task("vqa"), examples_of("vqa", 2)
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)]),
        pytest.raises(ValueError, match=r"without the hooks .*blocks\.0\.hook_resid_pre"),
    ):
        measure(model, task, examples, [[]], SweepOptions(journal=Others(model), progress=False))


def test_portions_are_whole_batches_of_fifty_examples_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunks(200, 32) == [range(0, 64), range(64, 128), range(128, 192), range(192, 200)]
    assert chunks(60, 64) == [range(0, 60)] and chunks(101, 50) == [
        range(0, 50),
        range(50, 100),
        range(100, 101),
    ]
    assert chunks(120, 1) == [range(0, 50), range(50, 100), range(100, 120)]


def test_blocks_are_quarters_of_the_layers() -> None:
    layers = [None, *range(32)]
    assert [len(block) for block in layer_blocks(layers, 32)] == [9, 8, 8, 8]
    assert layer_blocks([2, 0, 2, 1], 3) == [[1], [3], [0, 2]]
