"""Activation patching is exact at its ends, by position, for a task's own metric; and what it refuses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import random_llava
from helpers.activation_patching import (
    FAMILIES,
    LAYERS,
    TOLERANCE,
    changes,
    difference,
    put,
    twin_and_pairs,
)
from helpers.hf_twin import Twin
from helpers.patching_pairs import pictures
from torch import Tensor

import hones_lens as hl
from hones_lens import VLMInputs
from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.pairs import PatchPairs, corrupted_by, counterfactual
from hones_lens.analysis.patching.patch_batch import ActivationPatch
from hones_lens.analysis.patching.sites import SITES
from hones_lens.interventions.corruptions import blank, gaussian_noise, token_swap
from hones_lens.interventions.token_groups import Box

# -- exactness ---------------------------------------------------------------------------------------


def captured(twin: Twin, pairs: PatchPairs, what: str, **options: object) -> tuple[list[Tensor], Tensor]:
    """The logits of every evaluation of the metric, and the clean ones."""
    seen, clean_logits = [], []

    def metric(logits: Tensor, some: PatchPairs, clean: Tensor) -> Tensor:
        seen.append(logits)
        clean_logits.append(clean)
        return logits[:, 0]

    patch_activations(twin.model, pairs, what, metric=metric, raw=True, draws=0, progress=False, **options)
    return seen, clean_logits[0]


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize(
    ("what", "layers", "groups"),
    [("resid_pre", [0], ["all"]), ("resid_mid", [1], ["all"]), ("resid_post", [2], ["last"])],
)
def test_patching_everything_restores_the_clean_logits(
    made: ModuleType, what: str, layers: list[int], groups: list[str]
) -> None:
    twin, pairs = twin_and_pairs(made)
    seen, clean = captured(twin, pairs, what, layers=layers, groups=groups)
    patched, corrupted, other = seen  # the engine comes to the unpatched run last
    assert max((patched - clean).abs().max(), (other - clean).abs().max()) <= 5e-5
    assert (corrupted - clean).abs().max() > 0.1
    by_hf = twin.logits(pairs.clean)[:, -1]
    assert (patched - by_hf).abs().max() <= TOLERANCE


@FAMILIES
@pytest.mark.parametrize("what", [what for what, site in SITES.items() if site.layers is None])
def test_patching_nothing_changes_nothing_to_the_bit(made: ModuleType, what: str) -> None:
    """A run's own activations put in, by the engine and by the hook itself."""
    twin, pairs = twin_and_pairs(made)
    same = PatchPairs(pairs.clean, pairs.clean, pairs.answer, pairs.foil, pairs.ids)
    result = patch_activations(twin.model, same, what, raw=True, progress=False)
    assert torch.equal(result.values, torch.zeros_like(result.values))
    site = SITES[what]
    name = site.name(1)
    with torch.no_grad():
        logits, cache = twin.model.run_with_cache(pairs.clean, names_filter=[name])
        mask = torch.ones(cache[name].shape[0], cache[name].shape[site.position_axis], dtype=torch.bool)
        hook = ActivationPatch(name, site, cache[name], mask, None if site.unit is None else (1,))
        again = twin.model.run_with_hooks(pairs.clean, fwd_hooks=[(name, hook)])
    if what == "pattern":  # whoever hooks a pattern gets it by other kernels than who does not
        hook, plain = (
            twin.model.run_with_hooks(pairs.clean, fwd_hooks=[(name, fn)]) for fn in (hook, lambda x, hook: x)
        )
        assert torch.equal(hook, plain)
    else:
        assert torch.equal(again, logits)


def test_where_both_runs_are_alike_nothing_is_run() -> None:
    """Text before the picture's changed tokens, and all text where block 0 begins."""
    twin, pairs = twin_and_pairs(random_llava)
    other_pictures = twin.model.prepare(pictures(random_llava, 50), list(random_llava.QUESTIONS))
    pairs = PatchPairs(pairs.clean, other_pictures, pairs.answer, pairs.foil, pairs.ids)
    result = patch_activations(twin.model, pairs, "resid_pre", layers=[0], progress=False)
    assert result.select(layer=0, group="question").item() == 0 and result.low.shape == (1, 3)
    assert float(result.select(layer=0, group="image").values) == pytest.approx(1, abs=1e-5)
    assert "3 of 9 patches run, 0 % of them as full passes" in result.notes[-1]


@FAMILIES
def test_how_pairs_are_batched_does_not_matter(made: ModuleType) -> None:
    twin, pairs = twin_and_pairs(made)
    options = {"what": "z", "groups": ["image", "last"], "metric": "kl"}
    found = [
        changes(twin, pairs, batch_size=size, memory_budget=gigabytes, **options)
        for size, gigabytes in ((32, None), (1, None), (2, 1e-9))
    ]
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= TOLERANCE
    order = [2, 0, 1]
    assert (changes(twin, pairs[order], **options) - found[0][..., order]).abs().max() <= TOLERANCE


def test_lasting_hooks_are_kept() -> None:
    twin, pairs = twin_and_pairs(random_llava)
    model, name = twin.model, "blocks.1.attn.hook_z"
    plain = changes(twin, pairs, "z", by="all", direction="noise")

    def half(x: Tensor, hook: object) -> Tensor:
        return x / 2

    model.add_hook("blocks.0.mlp.hook_post", half)
    try:
        result = patch_activations(model, pairs, "z", "all", direction="noise", by_pair=True, progress=False)
        with torch.no_grad():
            theirs = model.run_with_cache(pairs.corrupted, names_filter=name)[1][name]
            put_in = put(theirs, slice(None), slice(None), 2)
            hooks = [(name, lambda x, hook: put_in(x))]
            patched = model.run_with_hooks(pairs.clean, fwd_hooks=hooks)[:, -1]
            base = model(pairs.clean)[:, -1]
    finally:
        model.reset_hooks()
    expected = difference(pairs, patched) - difference(pairs, base)
    assert (result.values[:, 1, 2] - expected).abs().max() <= TOLERANCE
    assert (result.values[:, 1, 2] - plain[1, 2]).abs().max() > 1e-3
    assert "100 % of them as full passes" in result.notes[-1]


# -- positions ---------------------------------------------------------------------------------------


def one_prompt(made: ModuleType, n: int = 2) -> tuple[Twin, PatchPairs]:
    twin = twin_and_pairs(made)[0]
    images = random_llava.make_images(n, 3)
    clean = twin.model.prepare(images, ["is it red?"] * n)
    return twin, corrupted_by(twin.model, clean, token_swap("red", "blue"), [5] * n, [7] * n)


@FAMILIES
def test_by_position_labels_tokens_and_equals_a_mask_of_one(made: ModuleType) -> None:
    twin, pairs = one_prompt(made)
    result = patch_activations(twin.model, pairs, "resid_pre", "position", raw=True, draws=0, progress=False)
    labels, ids = result.names("position"), pairs.clean.input_ids[0].tolist()
    assert result.axes == ("layer", "position") and len(labels) == len(ids)
    (swapped,) = [i for i, label in enumerate(labels) if "→" in label]
    tokens = twin.model.to_str_tokens(
        [int(inputs.input_ids[0, swapped]) for inputs in (pairs.clean, pairs.corrupted)]
    )
    assert labels[swapped] == f"{swapped} {tokens[0]}→{tokens[1]}" and "red" in tokens[0]
    rows, columns = pairs.clean.grids[0][0]
    last_cell = int(pairs.clean.image_mask[0].nonzero()[-1])
    assert labels[last_cell] == f"{last_cell} image {rows - 1},{columns - 1}"
    mask = torch.zeros_like(pairs.clean.image_mask)
    mask[:, swapped + 1] = True
    grouped = patch_activations(
        twin.model, pairs, "resid_pre", groups={"next": mask}, raw=True, draws=0, progress=False
    )
    assert (result.values[:, swapped + 1] - grouped.values[:, 0]).abs().max() <= TOLERANCE
    assert torch.equal(result.values[:, :swapped], torch.zeros(LAYERS, swapped)), "before the changed word"
    assert result.values[0, swapped] != 0 == result.values[0, swapped + 1]


# -- the task's own metric ---------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["vqa", "ocr"])
def test_the_task_metric_is_that_of_answers_generated_one_by_one(name: str) -> None:
    """OCR's two words often begin alike; what they share is no part of the prompt here."""
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    drawn = hl.counterfactual_pairs(name, limit=60)
    alike = [pair for pair in drawn if pair.answers[0][0] == pair.answers[1][0]]
    drawn = [*drawn[:2], *(alike[:2] if name == "ocr" else drawn[2:4])]
    pairs = counterfactual(model, drawn, name)
    assert name == "vqa" or any(pairs.shared), "no words that begin alike"
    options = {"groups": ["image"], "metric": "task", "by_pair": True, "layers": [1, 2], "progress": False}
    result = patch_activations(model, pairs, "resid_pre", **options)
    task, expected = hl.load_task(name), torch.zeros(4, 2, dtype=torch.float64)
    for i, pair in enumerate(drawn):
        prompt = task.prompt(pair.clean)
        clean, corrupted = (model.prepare(side.image, prompt) for side in (pair.clean, pair.corrupted))
        plain = task.score(model.generate(corrupted)[0], pair.clean)
        for j, layer in enumerate((1, 2)):
            hook = f"blocks.{layer}.hook_resid_pre"
            theirs = model.run_with_cache(clean, names_filter=hook)[1][hook]

            def put_images(x: Tensor, hook: object, theirs=theirs, at=clean.image_mask) -> Tensor:
                return torch.where(at[..., None], theirs, x) if x.shape[1] > 1 else x

            with torch.no_grad(), model.hooks(fwd_hooks=[(hook, put_images)]):
                said = model.generate(corrupted)[0]
            expected[i, j] = task.score(said, pair.clean) - plain
    assert torch.allclose(result.values[..., 0], expected)
    assert expected.abs().max() == 1


# -- refusals ----------------------------------------------------------------------------------------


def empty(inputs: VLMInputs) -> Tensor:
    return torch.zeros_like(inputs.image_mask)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"what": "resid"}, "unknown activation 'resid'; valid: resid_pre"),
        ({"by": "head"}, "unknown by 'head'; valid: group, position, all"),
        ({"direction": "both"}, "unknown direction 'both'"),
        ({"metric": "accuracy"}, "unknown patching metric 'accuracy'"),
        ({"metric": "task"}, "needs pairs made by `counterfactual`"),
        ({"groups": ["image", "answer"]}, "unknown token group 'answer'"),
        ({"groups": {"mine": "empty"}}, "token group 'mask' is empty in row 0"),
        ({"groups": [Box(500, 500, 600, 600)]}, "box 500,500 – 600,600 is outside"),
        ({"groups": []}, "no token groups"),
        ({"groups": ["image"], "by": "all"}, "groups are for by='group'"),
        ({"by": "position"}, "by='position' needs pairs of one length"),
        ({"layers": [0, 3]}, r"layer 3 is not in 0 … 2"),
        ({"layers": []}, "give at least one, and each once"),
        ({"units": [0]}, "resid_pre has no heads or neurons"),
        ({"what": "z", "units": [4]}, r"head 4 is not in 0 … 3"),
        ({"what": "k", "units": [2]}, r"kv_head 2 is not in 0 … 1"),
        ({"what": "z", "units": [1, 1]}, "give at least one, and each once"),
        ({"what": "z", "units": "all"}, "unknown units 'all'"),
        ({"what": "z", "units": [(0, 1)], "layers": [0]}, "leave no layers to choose"),
        ({"what": "neurons", "units": {"none": []}}, "give at least one"),
        ({"what": "vision_z", "by": "position"}, "patches, not tokens"),
        ({"what": "vision_z", "groups": ["last"]}, "'last' has no image token in row 0"),
        ({"what": "vision_z", "layers": [1, 2]}, r"layer 2 is not in 0 … 1"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    twin, pairs = twin_and_pairs(random_llava)
    if isinstance(groups := options.get("groups"), dict):
        options = {**options, "groups": dict.fromkeys(groups, empty(pairs.clean))}
    with pytest.raises(ValueError, match=says):
        patch_activations(twin.model, pairs, progress=False, **options)


def test_pairs_that_do_not_serve_are_refused() -> None:
    twin, pairs = twin_and_pairs(random_llava)
    model = twin.model
    with pytest.raises(ValueError, match="have different tokens at position"):
        texts = model.prepare(random_llava.make_images(2), ["is it red?", "is it blue?"])
        by_blank = corrupted_by(model, texts, blank(), [5, 6])
        patch_activations(model, by_blank, by="position", metric="log_prob", progress=False)
    one = model.prepare(random_llava.make_images(2), ["is it red?"] * 2)
    noised = corrupted_by(model, one, gaussian_noise(), [5, 6], [7, 8])
    with pytest.raises(ValueError, match="behind the vision tower: vision_z has nothing to patch"):
        patch_activations(model, noised, "vision_z", progress=False)
    without_foil = corrupted_by(model, one, gaussian_noise(), [5, 6])
    with pytest.raises(ValueError, match="no foil: measure 'log_prob' or 'kl'"):
        patch_activations(model, without_foil, progress=False)
    same = PatchPairs(pairs.clean, pairs.clean, pairs.answer, pairs.foil, pairs.ids)
    with pytest.raises(ValueError, match="don't differ by this metric"):
        patch_activations(model, same, progress=False)
    with pytest.raises(FloatingPointError, match="the metric of pair 'a' is not finite"):
        patch_activations(model, pairs, metric=lambda logits, p, c: logits[:, 0] / 0, progress=False)
    shipped = hl.HookedVLM.from_pretrained("tiny-llava")
    retrieval = counterfactual(shipped, hl.counterfactual_pairs("retrieval", limit=2), "retrieval")
    with pytest.raises(ValueError, match="one candidate, whose rank says nothing"):
        patch_activations(shipped, retrieval, metric="task", progress=False)
