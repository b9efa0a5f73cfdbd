"""A generator is as good as a list, wherever a public function takes several of something."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hones_lens as hl
from hones_lens import analysis, data, engine, hones, interventions, results, tasks
from hones_lens.model.iterables import as_list, takes_iterables

ROOMS = ("analysis", "app", "data", "engine", "hones", "interventions", "model", "results", "tasks", "viz")
SEVERAL = re.compile(r"Sequence|Iterable|Neurons\b|list\[")
QUIET = {"progress": False}
NEURONS = [(0, 3), (1, 5), (1, 2)]
HEADS = [(0, 1), (1, 2)]

# They walk these arguments once, or make a list of them themselves; the first ones are called below.
ON_THEIR_OWN = {
    "benjamini_hochberg", "bootstrap_intervals", "counterfactual_scenes", "mean_difference_interval",
    "mean_interval", "sentence_bleu", "sign_flip_p", "summed_metric", "two_sided_p", "vqa_accuracy",
    "yes_no_metrics",
    # walked once
    "direct_logit_attribution", "require_choice", "error_context", "held_out_bars", "split_keywords",
    "token_names", "did_you_mean",
    # their arguments are fixed by type: command-line words, callbacks, sizes, rows of one tensor
    "main", "check_data", "random_image_size", "random_scene", "leading_blanks", "pad_left", "join_words",
    "themed_svg",
}  # fmt: skip


def test_every_public_function_that_takes_several_takes_any_iterable() -> None:
    """Functions are either wrapped by `takes_iterables` or named above."""
    left: list[str] = []
    for room in ROOMS:
        module = importlib.import_module(f"hones_lens.{room}")
        for name in dir(module):
            function = getattr(module, name)
            if name.startswith("_") or not inspect.isfunction(function) or name in ON_THEIR_OWN:
                continue
            parameters = inspect.signature(function).parameters.values()
            if any(SEVERAL.search(str(p.annotation)) for p in parameters) and not _is_wrapped(function):
                left.append(f"{room}.{name}")
    assert not left
    for method in ("prepare", "render", "to_tokens", "to_str_tokens"):
        assert _is_wrapped(getattr(hl.HookedVLM, method)), method


def _is_wrapped(function: Callable[..., Any]) -> bool:
    wrapper = takes_iterables(len)
    while hasattr(function, "__wrapped__"):
        if function.__code__ is wrapper.__code__:
            return True
        function = function.__wrapped__
    return False


def test_what_becomes_a_list() -> None:
    arms, names = [iter([1, 2]), [3]], {"a": (n for n in (1, 2))}
    assert as_list(zip("ab", "cd", strict=True)) == [("a", "c"), ("b", "d")]
    assert as_list({1: 2}.keys()) == [1] and as_list({4}) == [4]
    assert as_list(arms) == [[1, 2], [3]] and as_list(names) == {"a": [1, 2]}
    assert as_list((iter("ab"), 1)) == (["a", "b"], 1)
    for kept in ("text", [1, [2]], (1, 2), {"a": [1]}, torch.ones(2), np.ones(2), None, 3, range(3)):
        assert as_list(kept) is kept


# -- every function with a list and with a generator -----------------------------------------------


@pytest.fixture(scope="module")
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


def examples(split: str = "discovery", n: int = 2, task: str = "vqa") -> list[hl.Example]:
    return hl.load_examples("shapes", task, split, n)


def pictures() -> list:
    return [example.image for example in examples()]


def doubled(x: Tensor, hook: object) -> Tensor:
    return 2 * x


HOOKS = [("blocks.0.mlp.hook_post", doubled), ("blocks.1.hook_mlp_out", doubled)]
PROMPTS = ["what color?", "is it red?"]
OTHERS = [np.array([[0.0, 1], [1, 1], [1, 1]]), np.array([[1.0, 1], [0, 1], [1, 1]])]
BASE = np.array([[1.0, 1], [1, 1], [0, 1]])
Of = Callable[[list], Iterable]


def inputs(model: hl.HookedVLM) -> hl.VLMInputs:
    return model.prepare(pictures(), PROMPTS)


def pairs(model: hl.HookedVLM) -> hl.PatchPairs:
    return hl.counterfactual(model, data.counterfactual_pairs("vqa", limit=2), "vqa")


CASES: dict[str, Callable[[hl.HookedVLM, Of], Any]] = {
    "choose_heads": lambda m, of: interventions.choose_heads(m, of(["L1H2", (0, 1)]), of([range(2), 3])),
    "choose_layers": lambda m, of: interventions.choose_layers(of(["0-1", 2]), m.cfg.n_layers),
    "layer_numbers": lambda m, of: interventions.layer_numbers(of(["0-1", 2])),
    "check_indices": lambda m, of: interventions.check_indices("layer", of([2, 1]), 3),
    "join_numbers": lambda m, of: interventions.join_numbers(of([0, 1, 3])),
    "localize some heads": lambda m, of: hl.localize_heads(
        m, "vqa", of(examples()), heads=of(HEADS), layers=of([0, 1]), **QUIET
    ).chosen,
    "model on texts": lambda m, of: m(of(PROMPTS)),
    "generate from texts": lambda m, of: m.generate(of(PROMPTS), 2),
    "prepare": lambda m, of: m.prepare(of(pictures()), of(PROMPTS), of(["red", "no"])),
    "prepare, several pictures": lambda m, of: m.prepare([of(pictures())], of(PROMPTS[:1])),
    "render": lambda m, of: m.render("what?", of([1, 1])),
    "to_tokens": lambda m, of: m.to_tokens(of(PROMPTS)),
    "to_str_tokens": lambda m, of: m.to_str_tokens(of([5, 9])),
    "logit_lens": lambda m, of: hl.logit_lens(m, inputs(m), hooks=of(HOOKS)),
    "lens_difference": lambda m, of: hl.lens_difference(m, inputs(m), of(HOOKS)),
    "direct_logit_attribution": lambda m, of: hl.direct_logit_attribution(m, inputs(m), 5, hooks=of(HOOKS)),
    "head_attention": lambda m, of: analysis.head_attention(m, inputs(m), of(HEADS), hooks=of(HOOKS)),
    "promoted_tokens": lambda m, of: analysis.promoted_tokens(m, of(NEURONS), torch.ones(3), 2),
    "patch_activations": lambda m, of: hl.patch_activations(
        m, pairs(m), "resid_pre", groups=of(["image", "last"]), layers=of([0, 1]), **QUIET
    ),
    "attribute_patching": lambda m, of: hl.attribute_patching(
        m, pairs(m), "resid_pre", "group", groups=of(["image", "last"]), layers=of([0, 1]), **QUIET
    ),
    "attention_knockout": lambda m, of: hl.attention_knockout(
        m, pairs(m), edges=of([("image", "last"), ("text", "last")]), **QUIET
    ),
    "path_patching": lambda m, of: hl.path_patching(m, pairs(m), of(HEADS), **QUIET),
    "path_patching_matrix": lambda m, of: hl.path_patching_matrix(m, pairs(m), of(HEADS), **QUIET),
    "counterfactual": lambda m, of: hl.counterfactual(
        m, of(data.counterfactual_pairs("vqa", limit=2)), "vqa"
    ),
    "corrupted_by": lambda m, of: hl.corrupted_by(
        m, inputs(m), interventions.blank(), of([5, 6]), of([9, 8]), ids=of(["a", "b"])
    ),
    "counterfactual_scenes": lambda m, of: data.counterfactual_scenes(
        examples()[0].facts["scene"], of(["color", "shape"])
    ),
    "evaluate": lambda m, of: hl.evaluate(m, "vqa", of(examples()), **QUIET),
    "logits_under": lambda m, of: hl.logits_under(m, inputs(m), of([of(HOOKS), of(HOOKS[:1]), []])),
    "measure": lambda m, of: engine.measure(
        m, tasks.load_task("vqa"), of(examples()), of([[], of(HOOKS)]), hl.SweepOptions(**QUIET)
    ),
    "localize_heads": lambda m, of: hl.localize_heads(m, "vqa", of(examples()), top_k=3, **QUIET),
    "attribute_neurons": lambda m, of: hl.attribute_neurons(
        m, "vqa", of(examples()), method="mean_activation", **QUIET
    ),
    "evaluate_masking": lambda m, of: hl.evaluate_masking(
        m, "vqa", of(examples("test")), of(NEURONS), n_controls=2, **QUIET
    ),
    "learn_scales": lambda m, of: hl.learn_scales(
        m, "vqa", of(examples("dev")), of(NEURONS), hl.SteeringConfig(epochs=1), **QUIET
    ),
    "compare_steering": lambda m, of: hl.compare_steering(
        m,
        "vqa",
        of(examples("dev", 3)),
        of(examples("test")),
        of(NEURONS),
        methods=of(["Base", "Fixed-Amp"]),
        **QUIET,
    ),
    "find_overlap": lambda m, of: hones.find_overlap(
        {"vqa": of(NEURONS), "ocr": of(NEURONS[:2])}, shape=(m.cfg.n_layers, m.cfg.d_mlp)
    ),
    "matched_random_sets": lambda m, of: hones.matched_random_sets(
        of(NEURONS), m.cfg.n_layers, m.cfg.d_mlp, 2
    ),
    "uniform scales": lambda m, of: hl.NeuronScales.uniform(of(NEURONS), 2.0),
    "zero_neurons": lambda m, of: hl.logits_under(m, inputs(m), [interventions.zero_neurons(of(NEURONS))]),
    "scale_heads": lambda m, of: hl.logits_under(
        m, inputs(m), [interventions.scale_heads(of(HEADS), of([2.0, 3.0]))]
    ),
    "zero": lambda m, of: hl.logits_under(m, inputs(m), [[interventions.zero(HOOKS[0][0], of([3, 5]))]]),
    "zero_head": lambda m, of: hl.logits_under(m, inputs(m), [[interventions.zero_head(1, of([0, 1]))]]),
    "summed_metric": lambda m, of: tasks.load_task("vqa").aggregate(of(["red", "no"]), of(examples())),
    "vqa_accuracy": lambda m, of: tasks.vqa_accuracy("red", of(["red"] * 4 + ["blue"] * 6)),
    "yes_no_metrics": lambda m, of: tasks.yes_no_metrics(of(["yes", "no"]), of(["yes", "yes"])),
    "sentence_bleu": lambda m, of: tasks.sentence_bleu("a red dot", of(["a red dot", "a dot"])),
    "mean_interval": lambda m, of: results.mean_interval(of([1.0, 2.0, 4.0])),
    "two_sided_p": lambda m, of: results.two_sided_p(of([1.0, 2.0, 4.0])),
    "sign_flip_p": lambda m, of: results.sign_flip_p(of([[1.0, 2.0, 4.0], [0.0, 1.0, -1.0]])),
    "benjamini_hochberg": lambda m, of: results.benjamini_hochberg(of([0.01, 0.2])),
    "bootstrap_intervals": lambda m, of: results.bootstrap_intervals(
        tasks.load_task("vqa"), BASE, of(OTHERS)
    ),
    "mean_difference_interval": lambda m, of: results.mean_difference_interval(
        tasks.load_task("vqa"), BASE, of(OTHERS)
    ),
}  # fmt: skip


@pytest.mark.wrong_types
@pytest.mark.parametrize("case", CASES)
def test_a_generator_gives_what_a_list_gives(model: hl.HookedVLM, case: str) -> None:
    call = CASES[case]
    torch.manual_seed(0)
    expected = plain(call(model, list))
    torch.manual_seed(0)
    actual = plain(call(model, lambda items: (item for item in items)))
    assert expected and actual == expected
    assert not model.list_hooks()


def plain(value: Any) -> Any:
    """A result as nested lists, by which two are compared."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))
