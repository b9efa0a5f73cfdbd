"""Options that are one of a few words: another word raises, and the message has it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import example_comparisons, example_results, hostile_figures

import hones_lens as hl
from hones_lens import analysis, engine, hones, interventions, results, viz
from hones_lens.interventions import steering_vector
from hones_lens.model import known_config

ROOMS = ("analysis", "engine", "hones", "interventions", "data", "tasks", "results", "viz", "model")
WORD = "nonsense"
# Parameters with a text for a default that may be any text.
FREE = {
    ("measure", "label"),
    ("measure_log_probs", "label"),
    ("cell_values", "what"),
    ("coloured_tokens", "what"),
    ("open_image", "name"),
    ("own_prompt", "text"),
    ("check_data", "encoding"),  # of a file: tests/data/test_reading.py
}


@cache
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


@cache
def examples() -> list[Any]:
    return hl.load_examples("shapes", "vqa", "discovery", limit=2)


@cache
def inputs() -> Any:
    return model().prepare(examples()[0].image, "what color is it?")


@cache
def pairs() -> Any:
    return hl.counterfactual(model(), hl.counterfactual_pairs("vqa", limit=1), "vqa")


def heads() -> hl.HeadScores:
    return example_results.heads()


def patched(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **word: function(model(), pairs(), progress=False, **word)


CALLS: dict[str, Callable[..., Any]] = {
    "HookedVLM.forward": lambda **word: model().forward(inputs(), **word),
    "HookedVLM.generate": lambda **word: model().generate(inputs(), **word),
    "MaskingResult.beats": lambda **word: example_results.masking().beats(**word),
    "SteeringTable.scales": lambda **word: example_comparisons.steering().scales(**word),
    "atp_against_measured": patched(hl.atp_against_measured),
    "attention_knockout": lambda **word: hl.attention_knockout(
        model(), examples(), [("image", "last")], task="vqa", progress=False, **word
    ),
    "attribute_neurons": lambda **word: hl.attribute_neurons(
        model(), "vqa", examples(), heads(), progress=False, **word
    ),
    "attribute_patching": patched(hl.attribute_patching),
    "counterfactual_pairs": lambda **word: hl.counterfactual_pairs(**{"task": "vqa", "limit": 1, **word}),
    "direct_logit_attribution": lambda **word: hl.direct_logit_attribution(model(), inputs(), "red", **word),
    "image_token_lens": lambda **word: hl.image_token_lens(model(), inputs(), "red", **word),
    "lens_difference": lambda **word: hl.lens_difference(
        model(), inputs(), interventions.zero_neurons([(0, 0)]), **word
    ),
    "known_config": lambda **word: known_config("tiny-llava", **word),
    "load_examples": lambda **word: hl.load_examples("shapes", "vqa", "discovery", limit=1, **word),
    "localize_heads": lambda **word: hl.localize_heads(model(), "vqa", examples(), progress=False, **word),
    "logit_lens": lambda **word: hl.logit_lens(model(), inputs(), **word),
    "mean_difference": lambda **word: hl.mean_difference(model(), inputs(), inputs(), layer=1, **word),
    "patch_activations": patched(hl.patch_activations),
    "path_patching": lambda **word: hl.path_patching(model(), pairs(), [(0, 0)], progress=False, **word),
    "path_patching_matrix": lambda **word: hl.path_patching_matrix(model(), pairs(), progress=False, **word),
    "Cells.fold": lambda **word: hostile_figures.folded().cells.fold(
        torch.zeros(inputs().input_ids.shape[1]), **word
    ),
    "fold_tokens": lambda **word: analysis.fold_tokens(model(), inputs(), **word),
    "folded_attention": lambda **word: analysis.folded_attention(model(), inputs(), [(0, 0)], **word),
    "head_attention": lambda **word: analysis.head_attention(model(), inputs(), [(0, 0)], **word),
    "exact_ablation": lambda **word: hones.exact_ablation(model(), "vqa", examples(), progress=False, **word),
    "exact_head_ablation": lambda **word: hones.exact_head_ablation(
        model(), "vqa", examples(), progress=False, **word
    ),
    "masking_measure": lambda **word: hones.masking_measure(example_results.masking(), **word),
    "replace_with_other_heads_mean": lambda **word: interventions.replace_with_other_heads_mean(0, 0, **word),
    "usable_examples": lambda **word: engine.usable_examples(
        model(), "vqa", examples(), progress=False, **word
    ),
    "resid_hook": lambda **word: interventions.resid_hook(0, **word),
    "steering_vector": lambda **word: steering_vector(0, torch.zeros(model().cfg.d_model), **word),
    "sign_flip_p": lambda **word: results.sign_flip_p(np.array([[0.5, -0.2, 0.1]]), **word),
    "cell_values": lambda **word: viz.cell_values(
        hostile_figures.folded().cells, torch.zeros(3, inputs().input_ids.shape[1]), **word
    ),
    "coloured_tokens": lambda **word: viz.coloured_tokens(
        hostile_figures.folded().cells, torch.zeros(inputs().input_ids.shape[1]), **word
    ),
    "group_masking_bars": lambda **word: viz.group_masking_bars(example_comparisons.groups(), **word),
    "ranking_bars": lambda **word: viz.ranking_bars({"hones": example_results.masking()}, **word),
    "VLMCache.decompose_resid": lambda **word: (
        model().run_with_cache(inputs())[1].decompose_resid(-1, **word)
    ),
}


def fixed_words() -> Iterator[tuple[str, str]]:
    """Public functions and methods, and those of their parameters that have a text for a default."""
    seen = set()
    for room in ("hones_lens", *(f"hones_lens.{room}" for room in ROOMS)):
        module = importlib.import_module(room)
        for name in sorted(dir(module)):
            value = None if name.startswith("_") else getattr(module, name)
            functions = {name: value} if inspect.isfunction(value) else {}
            if inspect.isclass(value):
                functions = {
                    f"{name}.{k}": v
                    for k, v in vars(value).items()
                    if inspect.isfunction(v) and not k.startswith("_")
                }
            for full_name, function in functions.items():
                if function in seen or not function.__module__.startswith("hones_lens"):
                    continue
                seen.add(function)
                for parameter in inspect.signature(function).parameters.values():
                    is_word = isinstance(parameter.default, str) and parameter.default
                    if is_word and (full_name, parameter.name) not in FREE:
                        yield full_name, parameter.name


@pytest.mark.wrong_types
@pytest.mark.parametrize(("name", "parameter"), list(fixed_words()))
def test_another_word_raises_and_is_named(name: str, parameter: str) -> None:
    with pytest.raises(ValueError, match=f"{WORD}.*(valid|known|has|there are|groups|is neither):? "):
        CALLS[name](**{parameter: WORD})


def test_every_call_of_the_table_is_tried() -> None:
    assert set(CALLS) == {name for name, _ in fixed_words()}
