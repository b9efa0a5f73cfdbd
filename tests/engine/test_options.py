"""Options of stages: as one object, by keyword, or both."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from helpers.hf_task_loops import examples_of, pair

import hones_lens as hl
from hones_lens import SweepOptions
from hones_lens.engine import Tally, split_keywords
from hones_lens.hones import exact_ablation, head_neuron_flow, lens_delta, mask_groups

# Public stages, and those of their options that they have no use for.
BATCHES_ALONE = ("journal", "memory_budget", "tally")
RESUMED = ("memory_budget", "tally")
STAGES: dict[Callable, tuple[str, ...]] = {
    hl.evaluate: (),
    hl.localize_heads: (),
    hl.remeasure_heads: (),
    hl.masking_curve: (),
    hl.evaluate_masking: (),
    hl.compare_steering: (),
    hl.transfer_steering: (),
    hl.side_effects: (),
    hl.patch_activations: (),
    exact_ablation: (),
    mask_groups: ("journal",),
    hl.attention_knockout: ("journal",),
    hl.path_patching: ("journal",),
    hl.path_patching_matrix: ("journal",),
    hl.learn_scales: ("journal", "tally"),
    lens_delta: RESUMED,
    hl.atp_against_measured: BATCHES_ALONE,
    hl.attribute_patching: BATCHES_ALONE,
    hl.attribute_neurons: RESUMED,
    head_neuron_flow: RESUMED,
}
GIVEN: dict[str, Any] = {"journal": {}, "memory_budget": 1.0, "tally": Tally()}


def test_a_keyword_goes_before_the_object() -> None:
    given = SweepOptions(batch_size=8, progress=False)
    assert SweepOptions.of(given, {"batch_size": 2}) == SweepOptions(batch_size=2, progress=False)
    assert given == SweepOptions(batch_size=8, progress=False)


def test_a_stage_s_own_default_is_for_where_no_object_is_given() -> None:
    assert SweepOptions.of(None, {}, batch_size=16).batch_size == 16
    assert SweepOptions.of(None, {"batch_size": 3}, batch_size=16).batch_size == 3
    assert SweepOptions.of(SweepOptions(), {}, batch_size=16).batch_size == 32


def test_keywords_are_split_by_name() -> None:
    assert split_keywords({"a": 1, "b": 2, "c": 3}, ("b", "x")) == ({"b": 2}, {"a": 1, "c": 3})


def test_an_empty_journal_is_a_journal() -> None:
    """It is false as a condition, and has to be refused and kept all the same."""
    journal: dict[str, Any] = {}
    assert SweepOptions.of(None, {"journal": journal}).journal is journal
    with pytest.raises(TypeError, match="no use for: journal"):
        SweepOptions.of(SweepOptions(journal=journal), {}, unused=("journal",))


def call(stage: Callable, **options: Any) -> Any:
    """A stage, unchecked by `make test-shapes`, without the required arguments that it never gets to read."""
    names = [
        name
        for name, parameter in inspect.signature(stage).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    known = {"model": pair()[1], "task": "vqa", "examples": examples_of("vqa")}
    return inspect.unwrap(stage)(**{name: known.get(name) for name in names}, **options)


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in (hl.attribute_neurons, head_neuron_flow)])
def test_an_unknown_keyword_is_named(stage: Callable) -> None:
    with pytest.raises(TypeError, match="unexpected keyword arguments: bathc_size; valid: batch_size, "):
        call(stage, bathc_size=3)


def test_an_unknown_keyword_of_a_ranking_is_named() -> None:
    with pytest.raises(TypeError, match="bathc_size"):
        call(hl.attribute_neurons, method="direct", bathc_size=3)


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, unused in STAGES.items() for name in unused]
)
def test_what_a_stage_has_no_use_for_is_refused(stage: Callable, name: str) -> None:
    with pytest.raises(TypeError, match=rf"no use for: {name}$"):
        call(stage, options=SweepOptions(progress=False, **{name: GIVEN[name]}))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_the_object_and_few_arguments(stage: Callable) -> None:
    parameters = inspect.signature(stage).parameters
    assert parameters["options"].default is None
    named = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert len(named) <= 10


def test_an_object_does_what_its_keywords_do() -> None:
    model, examples = pair()[1], examples_of("vqa")
    tallies, journals = (Tally(), Tally()), ({}, {})
    by_keyword = hl.localize_heads(
        model, "vqa", examples, 2, batch_size=2, progress=False, journal=journals[0], tally=tallies[0]
    )
    options = SweepOptions(batch_size=2, progress=False, journal=journals[1], tally=tallies[1])
    by_object = hl.localize_heads(model, "vqa", examples, 2, options=options)
    assert by_object.drops.equal(by_keyword.drops)
    assert journals[0] == journals[1] and len(journals[0]) == 2  # three examples, two at a time
    assert tallies[0] == tallies[1] and tallies[0].forked > 0
