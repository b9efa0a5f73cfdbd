"""Activation patching against naive loops over Hugging Face's own model with PyTorch's hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import tiny
import tiny_qwen
import torch
from analysis.patching.random_pairs import pictures, sides
from hf_twin import Step, Twin
from torch import Tensor

import hones_lens as hl
from hones_lens import VLMInputs
from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.outcome import share_of_gap
from hones_lens.analysis.patching.pairs import PatchPairs, corrupted_by, counterfactual
from hones_lens.analysis.patching.runner import Put
from hones_lens.analysis.patching.sites import SITES
from hones_lens.engine import sweep
from hones_lens.interventions.corruptions import blank, gaussian_noise, token_swap
from hones_lens.interventions.token_groups import Box, token_mask

TOLERANCE = 2e-5
LAYERS, HEADS, KV_HEADS = 3, 4, 2
NEURONS = (0, 7, 39)
DIRECTIONS = ("denoise", "noise")
GROUPS = ("image", "question", "last")


@cache
def twin_and_pairs(made: ModuleType) -> tuple[Twin, PatchPairs]:
    """A model with GQA, and pairs of three lengths; the pictures and one word of the text differ."""
    twin = Twin(made, seed=21, text={"num_key_value_heads": KV_HEADS})
    texts = [list(tiny.QUESTIONS), [*tiny.QUESTIONS[:2], "is it blue?"]]
    clean, corrupted = (
        twin.model.prepare(pictures(made, seed), text) for seed, text in zip((0, 50), texts, strict=True)
    )
    assert not clean.attention_mask.all() and clean.input_ids.shape == corrupted.input_ids.shape
    ends = (torch.tensor([5, 9, 60]), torch.tensor([7, 100, 3]))
    return twin, PatchPairs(clean, corrupted, *ends, ("a", "b", "c"))


FAMILIES = pytest.mark.parametrize("made", [tiny, tiny_qwen], ids=["llava", "qwen"])


def difference(pairs: PatchPairs, logits: Tensor) -> Tensor:
    rows = zip(logits.double(), pairs.answer.tolist(), pairs.foil.tolist(), strict=True)
    return torch.stack([row[a] - row[b] for row, a, b in rows])


def hf_effect(twin: Twin, pairs: PatchPairs, direction: str, steps: list[Step]) -> Tensor:
    """What steps on Hugging Face's base run change, [pair]."""
    base, _ = sides(pairs, direction)
    patched, plain = (twin.logits(base, s)[:, -1] for s in (steps, []))
    return difference(pairs, patched) - difference(pairs, plain)


def put(theirs: Tensor, *index: object) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = theirs[index]
        return x

    return change


def decoder_steps(
    twin: Twin, theirs: dict, layer: int, hook: str, mask: Tensor, unit: int | None
) -> list[Step]:
    value = theirs[f"blocks.{layer}.{hook}"]
    index = (mask,) if unit is None else (mask, unit)
    return twin.edit(layer, hook, put(value, *index))


def changes(twin: Twin, pairs: PatchPairs, what: str, **options: object) -> Tensor:
    result = patch_activations(twin.model, pairs, what, by_pair=True, progress=False, **options)
    assert result.axes[0] == "pair" and result.labels["pair"] == pairs.ids
    return result.values.movedim(0, -1)


# -- against Hugging Face ----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("what", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_streams_by_layer_and_group(made: ModuleType, direction: str, what: str) -> None:
    twin, pairs = twin_and_pairs(made)
    found = changes(twin, pairs, what, direction=direction)
    assert found.shape == (LAYERS, len(GROUPS), 3)
    theirs = twin.seen(sides(pairs, direction)[1])
    for layer in range(LAYERS):
        for g, group in enumerate(GROUPS):
            mask = pairs.clean.token_groups[group]
            steps = decoder_steps(twin, theirs, layer, f"hook_{what}", mask, None)
            expected = hf_effect(twin, pairs, direction, steps)
            assert (found[layer, g] - expected).abs().max() <= TOLERANCE
    assert found.abs().amax((0, 2)).min() > 1e-3, "a group does nothing"


@FAMILIES
@pytest.mark.parametrize("what", ["z", "q", "k", "v"])
def test_heads_by_group(made: ModuleType, what: str) -> None:
    twin, pairs = twin_and_pairs(made)
    groups = ["all", "last"]
    found = changes(twin, pairs, what, groups=groups, direction="noise")
    n = HEADS if what in "zq" else KV_HEADS
    assert found.shape == (LAYERS, n, 2, 3)
    theirs = twin.seen(pairs.corrupted)
    for layer, head in np.ndindex(LAYERS, n):
        for g, group in enumerate(groups):
            mask = token_mask(pairs.clean, group)
            steps = decoder_steps(twin, theirs, layer, f"attn.hook_{what}", mask, head)
            expected = hf_effect(twin, pairs, "noise", steps)
            assert (found[layer, head, g] - expected).abs().max() <= TOLERANCE
    assert found[1:].abs().amax(-1).min() > 1e-7, "a head does nothing"


@FAMILIES
def test_neurons_alone_together_and_as_a_set(made: ModuleType) -> None:
    twin, pairs = twin_and_pairs(made)
    theirs, every = twin.seen(pairs.clean), token_mask(pairs.clean, "all")
    options = {"by": "all", "direction": "denoise"}
    alone = changes(twin, pairs, "neurons", units=NEURONS, **options)
    together = changes(twin, pairs, "neurons", **options)
    assert alone.shape == (LAYERS, 3, 3) and together.shape == (LAYERS, 3)
    for layer in range(LAYERS):
        steps = [decoder_steps(twin, theirs, layer, "mlp.hook_post", every, i) for i in (*NEURONS, None)]
        expected = torch.stack([hf_effect(twin, pairs, "denoise", each) for each in steps])
        assert (torch.cat((alone[layer], together[layer][None])) - expected).abs().max() <= TOLERANCE
    chosen = {"both": [(0, 7), (2, 39)], "one": [(1, 0)]}
    sets = changes(twin, pairs, "neurons", units=chosen, **options)
    for i, members in enumerate(chosen.values()):
        # Hugging Face's hooks in the order of the layers: each puts in what the clean run has there.
        steps = [s for n, j in members for s in decoder_steps(twin, theirs, n, "mlp.hook_post", every, j)]
        assert (sets[i] - hf_effect(twin, pairs, "denoise", steps)).abs().max() <= TOLERANCE
    one_by_one = changes(twin, pairs, "neurons", units=[(0, 7), (2, 39)], **options)
    assert torch.allclose(one_by_one, torch.stack([alone[0, 1], alone[2, 2]]), atol=1e-6)


@FAMILIES
def test_patterns_by_group_of_queries(made: ModuleType) -> None:
    twin, pairs = twin_and_pairs(made)
    found = changes(twin, pairs, "pattern", groups=["question"], direction="denoise")
    ours, theirs = twin.attentions(pairs.corrupted), twin.attentions(pairs.clean)
    queries = pairs.clean.token_groups["question"]
    for layer, head in np.ndindex(LAYERS, HEADS):
        pattern = ours[layer].clone()
        pattern[:, head][queries] = theirs[layer][:, head][queries]
        expected = hf_effect(twin, pairs, "denoise", twin.mix_by(layer, pattern))
        assert (found[layer, head, 0] - expected).abs().max() <= TOLERANCE
    assert found.abs().max() > 1e-3


LLAVA_PARTS = {"vision_z": "self_attn.out_proj", "vision_neurons": "mlp.fc2"}
QWEN_PARTS = {"vision_z": "attn.proj", "vision_neurons": "mlp.down_proj"}
TOWERS = {
    tiny: ("model.vision_tower.encoder.layers", LLAVA_PARTS),
    tiny_qwen: ("model.visual.blocks", QWEN_PARTS),
}


def first_column(twin: Twin, inputs: VLMInputs) -> Tensor:
    """Patches of the first column of tokens of each row's first image, as Hugging Face's tower lays them."""
    longest = max(r * c for row in inputs.patch_grids for r, c in row)
    masks = []
    for grids in inputs.patch_grids:
        for place, (rows, columns) in enumerate(grids):
            mask = torch.zeros(longest, dtype=torch.bool)
            if place == 0:
                here = torch.arange(rows * columns) % columns < twin.model.cfg.vision.merge_size
                mask[: rows * columns] = here
            masks.append(mask)
    laid = torch.stack(masks)
    # The class token is in no box.
    return torch.nn.functional.pad(laid, (1, 0)) if twin.is_llava else twin.patches(inputs, laid)


@FAMILIES
@pytest.mark.parametrize("what", ["vision_z", "vision_neurons"])
def test_vision_heads_and_neurons(made: ModuleType, what: str) -> None:
    """All of an image, and a box on it: its first column of tokens."""
    twin, pairs = twin_and_pairs(made)
    cfg, inputs = twin.model.cfg.vision, pairs.clean
    units, groups = [0, 2], {"image": "image", "box": Box(5, 0, 5.5, 1000)}
    found = changes(twin, pairs, what, groups=groups, units=units, direction="noise")
    masks = first_column(twin, inputs)
    width = cfg.d_head if what == "vision_z" else 1
    for layer in range(cfg.n_layers):
        folder, names = TOWERS[made]
        path, kept = f"{folder}.{layer}.{names[what]}", []
        twin.run(pairs.corrupted, [(path, "input", lambda x, m, kept=kept: kept.append(x))])
        for u, unit in enumerate(units):
            mine = slice(unit * width, (unit + 1) * width)
            for g, mask in enumerate((torch.ones_like(masks), masks)):

                def change(x: Tensor, memory: object, mask=mask, mine=mine, theirs=kept[0]) -> Tensor:
                    x = x.clone()
                    x[..., mine] = torch.where(mask[..., None], theirs[..., mine], x[..., mine])
                    return x

                expected = hf_effect(twin, pairs, "noise", [(path, "input", change)])
                assert (found[layer, u, g] - expected).abs().max() <= TOLERANCE
    assert found[:, :, 1].abs().max() > 1e-5, "the box does nothing"


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
    assert (patched - clean).abs().max() <= 1e-5 and (other - clean).abs().max() <= 1e-5
    assert (corrupted - clean).abs().max() > 0.1
    by_hf = twin.logits(pairs.clean)[:, -1]
    assert (patched - by_hf).abs().max() <= TOLERANCE


@FAMILIES
@pytest.mark.parametrize("what", [*SITES])
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
        hook = Put(name, site, cache[name], mask, None if site.unit is None else (1,))
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
    twin, pairs = twin_and_pairs(tiny)
    other_pictures = twin.model.prepare(pictures(tiny, 50), list(tiny.QUESTIONS))
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
    twin, pairs = twin_and_pairs(tiny)
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
    images = tiny.make_images(n, 3)
    clean = twin.model.prepare(images, ["is it red?"] * n)
    return twin, corrupted_by(twin.model, clean, token_swap("red", "blue"), [5] * n, [7] * n)


@FAMILIES
def test_by_position_labels_tokens_and_equals_a_mask_of_one(made: ModuleType) -> None:
    twin, pairs = one_prompt(made)
    result = patch_activations(twin.model, pairs, "resid_pre", "position", raw=True, draws=0, progress=False)
    labels, ids = result.names("position"), pairs.clean.input_ids[0].tolist()
    assert result.axes == ("layer", "position") and len(labels) == len(ids)
    (swapped,) = [i for i, label in enumerate(labels) if "→" in label]
    tokens = twin.model.tokenizer.convert_ids_to_tokens(
        [inputs.input_ids[0, swapped] for inputs in (pairs.clean, pairs.corrupted)]
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


# -- shares and intervals ----------------------------------------------------------------------------


def test_shares_are_ratios_of_means_with_paired_bootstrap_intervals() -> None:
    rng = np.random.default_rng(1)
    gap = rng.normal(3.0, 1.5, 40)
    change = np.stack([0.5 * gap + rng.normal(0, 0.2, 40), rng.normal(0, 1, 40)])
    found = share_of_gap(torch.from_numpy(change), torch.from_numpy(gap), draws=8000)
    expected = change.mean(1) / gap.mean()
    np.testing.assert_allclose(found["values"], expected, rtol=1e-12)
    for i in range(2):
        draws = [rng.integers(0, 40, 40) for _ in range(8000)]
        ratios = sorted(change[i][d].sum() / gap[d].sum() for d in draws)
        width = ratios[7800] - ratios[200]
        assert float(found["low"][i]) == pytest.approx(ratios[200], abs=0.08 * width)
        assert float(found["high"][i]) == pytest.approx(ratios[7800], abs=0.08 * width)
    narrow = float(found["high"][0] - found["low"][0])
    apart = [[x[rng.integers(0, 40, 40)].mean() for x in (change[0], gap)] for _ in range(4000)]
    low, high = np.quantile([a / b for a, b in apart], (0.025, 0.975))
    assert narrow < 0.5 * (high - low), "pairs are torn apart"
    with pytest.raises(ValueError, match="don't differ by this metric"):
        share_of_gap(torch.ones(1, 4), torch.tensor([1.0, -1, 2, -2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_share_raw_and_by_pair_agree_and_baselines_are_noted(direction: str) -> None:
    twin, pairs = twin_and_pairs(tiny)
    options = {"direction": direction, "progress": False, "layers": [2, 0]}
    each = patch_activations(twin.model, pairs, "attn_out", by_pair=True, **options)
    raw = patch_activations(twin.model, pairs, "attn_out", raw=True, **options)
    share = patch_activations(twin.model, pairs, "attn_out", **options)
    ends = [difference(pairs, twin.logits(inputs)[:, -1]).mean() for inputs in (pairs.clean, pairs.corrupted)]
    gap = (ends[0] - ends[1]) * (1 if direction == "denoise" else -1)
    assert (raw.values - each.values.mean(0)).abs().max() <= 1e-9
    assert (share.values - raw.values / gap).abs().max() <= 1e-4
    assert share.n == 3 and share.labels["layer"] == (2, 0) and share.labels["group"] == GROUPS
    assert bool((share.low <= share.values).all()) and bool((share.values <= share.high).all())
    assert f"clean {ends[0]:.4g}, corrupted {ends[1]:.4g}" in share.notes[0]
    assert ("restored" if direction == "denoise" else "lost") in share.what


def test_metrics_by_name_are_their_formulas() -> None:
    twin, pairs = twin_and_pairs(tiny)
    steps = decoder_steps(
        twin, twin.seen(pairs.corrupted), 1, "hook_resid_pre", pairs.clean.token_groups["image"], None
    )
    base, patched = (twin.logits(pairs.clean, s)[:, -1].double().log_softmax(-1) for s in ([], steps))
    rows = torch.arange(3)
    likely = patched[rows, pairs.answer] - base[rows, pairs.answer]
    divergence = -(base.exp() * (base - patched)).sum(-1)
    for metric, expected in (("log_prob", likely), ("kl", divergence)):
        found = changes(twin, pairs, "resid_pre", groups=["image"], direction="noise", metric=metric)
        assert (found[1, 0] - expected).abs().max() <= TOLERANCE


def test_a_single_pair_has_no_interval() -> None:
    twin, pairs = twin_and_pairs(tiny)
    result = patch_activations(twin.model, pairs[:1], "resid_mid", progress=False)
    assert result.low is None and result.n == 1


def test_a_finished_batch_is_taken_from_the_journal(monkeypatch) -> None:
    twin, pairs = twin_and_pairs(tiny)
    journal: dict = {}
    options = {"batch_size": 2, "progress": False, "by": "all"}
    whole = patch_activations(twin.model, pairs, "z", journal=journal, **options)
    assert list(journal) == ["patch/0", "patch/2"]
    half = {"patch/0": journal["patch/0"]}
    again = patch_activations(twin.model, pairs, "z", journal=half, **options)
    assert torch.equal(again.values, whole.values) and half == journal
    monkeypatch.setattr(sweep, "logits_under", lambda *a, **k: pytest.fail("ran again"))
    again = patch_activations(twin.model, pairs, "z", journal=journal, **options)
    assert torch.equal(again.values, whole.values) and torch.equal(again.low, whole.low)


# -- the task's own metric ---------------------------------------------------------------------------


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
    twin, pairs = twin_and_pairs(tiny)
    if isinstance(groups := options.get("groups"), dict):
        options = {**options, "groups": dict.fromkeys(groups, empty(pairs.clean))}
    with pytest.raises(ValueError, match=says):
        patch_activations(twin.model, pairs, progress=False, **options)


def test_pairs_that_do_not_serve_are_refused() -> None:
    twin, pairs = twin_and_pairs(tiny)
    model = twin.model
    with pytest.raises(ValueError, match="have different tokens at position"):
        texts = model.prepare(tiny.make_images(2), ["is it red?", "is it blue?"])
        by_blank = corrupted_by(model, texts, blank(), [5, 6])
        patch_activations(model, by_blank, by="position", metric="log_prob", progress=False)
    one = model.prepare(tiny.make_images(2), ["is it red?"] * 2)
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
