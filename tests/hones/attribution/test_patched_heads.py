"""Critical heads by activation patching, against a loop over Hugging Face's model; two rankings compared."""

from __future__ import annotations

import itertools
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor

import hones_lens as hl
from hones_lens.analysis.patching.pairs import PatchPairs, counterfactual
from hones_lens.hones.attribution.compare import compare_rankings
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.heads import localize_heads
from hones_lens.results.labelled import Labelled
from hones_lens.results.racing import Racing

LAYERS, HEADS = 3, 4


@cache
def twin_of(made: ModuleType) -> Twin:
    return Twin(made, seed=6, text={"num_key_value_heads": 2})


def drawn() -> list:
    return hl.counterfactual_pairs("vqa", limit=3)


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_equals_a_naive_loop_on_hf(made: ModuleType, positions: str) -> None:
    twin, examples = twin_of(made), drawn()
    found = localize_heads(
        twin.model, "vqa", intervention="patch", pairs=examples, top_k=2, positions=positions, progress=False
    )
    pairs = counterfactual(twin.model, examples, "vqa")
    rows, theirs = torch.arange(3), twin.seen(pairs.corrupted)

    def difference(steps: list) -> Tensor:
        logits = twin.logits(pairs.clean, steps)[:, -1]
        return (logits[rows, pairs.answer] - logits[rows, pairs.foil]).double()

    base = difference([])
    for layer, head in np.ndindex(LAYERS, HEADS):

        def put(z: Tensor, layer=layer, head=head) -> Tensor:
            z, other = z.clone(), theirs[f"blocks.{layer}.attn.hook_z"]
            where = slice(None) if positions == "all" else slice(-1, None)
            z[:, where, head] = other[:, where, head]
            return z

        expected = base - difference(twin.edit(layer, "attn.hook_z", put))
        assert (found.drops[layer, head] - expected).abs().max() <= 5e-5
    assert torch.allclose(found.scores, found.drops.mean(-1)) and found.drops.abs().max() > 1e-3
    assert (found.base_scores - base).abs().max() <= 5e-5
    assert found.baseline == pytest.approx(float(base.mean()), abs=5e-5)
    assert (found.intervention, found.metric_name) == ("patch", "logit difference")
    assert found.example_ids == tuple(pair.clean.id for pair in examples)
    assert found.kinds == tuple(pair.clean.kind for pair in examples)
    assert bool(found.traded) == (positions == "last")
    assert "patched with its output on the corrupted input" in str(found)


def test_it_saves_loads_and_takes_pairs_that_are_prepared(tmp_path) -> None:
    twin, examples = twin_of(random_llava), drawn()
    pairs = counterfactual(twin.model, examples, "vqa")
    options = {"intervention": "patch", "progress": False, "top_k": 2}
    found = localize_heads(twin.model, "vqa", pairs=pairs, **options)
    clean = [pair.clean for pair in examples]
    same = localize_heads(twin.model, "vqa", clean, pairs=examples, batch_size=2, **options)
    assert torch.allclose(found.drops, same.drops, atol=5e-5)
    found.save(tmp_path / "heads.json")
    loaded = HeadScores.load(tmp_path / "heads.json")
    assert torch.equal(loaded.drops, found.drops) and loaded.top() == found.top()
    assert loaded.intervention == "patch"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"intervention": "noise"}, "unknown intervention 'noise'; valid: mean, patch"),
        ({"intervention": "patch"}, "needs pairs"),
        ({"intervention": "patch", "pairs": []}, "needs pairs"),
        ({"pairs": "drawn"}, "pairs are for intervention='patch'"),
        ({"intervention": "patch", "pairs": "drawn", "prefilter": 5}, "prefilter and racing are for"),
        ({"intervention": "patch", "pairs": "drawn", "racing": Racing()}, "scores within bounds"),
        ({"intervention": "patch", "pairs": "drawn", "positions": "first"}, "unknown positions 'first'"),
        ({"intervention": "patch", "pairs": "drawn", "examples": "others"}, "not these examples"),
        ({"intervention": "patch", "pairs": "ocr"}, "pairs of task 'ocr' for task 'vqa'"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    model = twin_of(random_llava).model
    made = {
        "drawn": drawn,
        "others": lambda: hl.load_examples("shapes", "vqa", "dev", 3),
        "ocr": lambda: counterfactual(model, hl.counterfactual_pairs("ocr", limit=2), "ocr"),
    }
    given = {name: made[v]() if isinstance(v, str) and v in made else v for name, v in options.items()}
    examples = given.pop("examples", ())
    with pytest.raises(ValueError, match=says):
        localize_heads(model, "vqa", examples, progress=False, **given)


def test_pairs_without_a_foil_are_refused() -> None:
    twin = twin_of(random_llava)
    pairs = counterfactual(twin.model, drawn(), "vqa")
    half = PatchPairs(pairs.clean, pairs.corrupted, pairs.answer, None, pairs.ids)
    with pytest.raises(ValueError, match="no foil"):
        localize_heads(twin.model, "vqa", intervention="patch", pairs=half, progress=False)


# -- two rankings ------------------------------------------------------------------------------------


def spearman_by_hand(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of mean ranks, counted one by one."""

    def rank(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]

    return float(np.corrcoef(rank(x), rank(y))[0, 1])


def test_overlap_with_chance_counted_out() -> None:
    """Six heads, the best three of either: chance from all draws of three."""
    a = torch.tensor([[6.0, 5, 4], [3, 2, 1]])
    b = torch.tensor([[6.0, 5, 1], [2, 3, 4]])
    found = compare_rankings(a, b, k=3)
    assert found.shared == ((0, 0), (0, 1)) and found.expected == 1.5 and found.n == 6
    draws = [len({0, 1, 2} & set(some)) for some in itertools.combinations(range(6), 3)]
    assert found.p == pytest.approx(np.mean([n >= 2 for n in draws]))
    assert found.expected == pytest.approx(np.mean(draws))
    assert found.low <= found.spearman <= found.high
    assert "Spearman" in str(found) and "they share 2 (L0H0, L0H1), by chance 1.5" in str(found)
    frame = found.to_dataframe()
    assert frame.shape == (6, 4) and frame["scores (2)"].tolist() == b.flatten().tolist()


def test_the_interval_covers_the_correlation_of_the_population() -> None:
    """Rankings drawn with a correlation of 0.6 (Spearman of a normal pair: 6/π · asin(ρ/2))."""
    rng = np.random.default_rng(3)
    true, covered = 6 / np.pi * np.arcsin(0.3), 0
    for trial in range(40):
        x = rng.normal(size=(6, 10))
        y = 0.6 * x + 0.8 * rng.normal(size=x.shape)
        found = compare_rankings(torch.from_numpy(x), torch.from_numpy(y), draws=200, seed=trial)
        covered += found.low <= true <= found.high
    assert 34 <= covered <= 40


def test_heads_that_one_did_not_measure_are_left_out() -> None:
    a = torch.tensor([[5.0, torch.nan, 1], [3, 2, 4]])
    found = compare_rankings(a, torch.tensor([[5.0, 9, 1], [3, 2, 4]]), k=2)
    assert found.n == 5 and found.spearman == pytest.approx(1) and found.shared == ((0, 0), (1, 2))


def test_mean_replacement_and_patching_of_one_model() -> None:
    """The results themselves go in: names and k are theirs."""
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    pairs = hl.counterfactual_pairs("vqa", "color", limit=2)
    options = {"progress": False, "top_k": 5}
    by_patch = localize_heads(model, "vqa", pairs=pairs, intervention="patch", **options)
    by_mean = localize_heads(model, "vqa", [pair.clean for pair in pairs], **options)
    found = compare_rankings(by_mean, by_patch)
    assert found.names == ("replace_with_other_heads_mean", "patch") and (found.k, found.n) == (5, 32)
    expected = spearman_by_hand(by_mean.scores.flatten().tolist(), by_patch.scores.flatten().tolist())
    assert found.spearman == pytest.approx(expected)
    labelled = Labelled("patched", by_patch.scores, ("layer", "head"))
    assert compare_rankings(by_mean, labelled, 5).spearman == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b", "k", "says"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), None, r"rankings of \(2, 3\) and \(2, 4\)"),
        (torch.rand(6), torch.rand(6), None, r"a ranking is \[layer head\]"),
        (torch.ones(2, 3), torch.rand(2, 3), None, "not all alike"),
        (torch.rand(2, 3), torch.rand(2, 3), 7, r"k must lie in 1 … 6, not 7"),
        (Labelled("x", torch.rand(2, 3), ("layer", "group")), torch.rand(2, 3), None, "no ranking by layer"),
    ],
)
def test_rankings_that_can_not_be_compared(a, b, k, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compare_rankings(a, b, k)
