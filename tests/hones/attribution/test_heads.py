"""Localization against a loop over Hugging Face's model: example by example, head by head."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import (
    N_HEADS,
    N_LAYERS,
    TASK_OF_FAMILY,
    examples_of,
    hf_input_hook,
    hf_layers,
    hf_log_prob,
    hf_prediction,
    other_heads_mean,
    pair,
    plain_examples,
)
from helpers.random_llava import make_config, make_pair

from hones_lens.hones.attribution.gradients import first_order_head_drops
from hones_lens.hones.attribution.head_scores import HeadScores, significant_heads
from hones_lens.hones.attribution.heads import localize_heads
from hones_lens.results.files import Component, ranked
from hones_lens.results.racing import Racing
from hones_lens.results.statistics import Interval, bootstrap_interval, mean_interval, sign_flip_p
from hones_lens.tasks.registry import load_task


def _scores(heads: torch.Tensor, k: int = 3) -> HeadScores:
    return HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="replace_with_other_heads_mean",
        model_name="m",
        scores=heads,
        drops=heads[..., None].expand(-1, -1, 2).clone(),
        baseline=1.0,
        base_scores=torch.ones(2, dtype=torch.float64),
        example_ids=("a", "b"),
        kinds=("x", "y"),
        top_k=k,
    )


@TASK_OF_FAMILY
def test_equals_a_naive_loop_on_hf(name: str, family: str) -> None:
    hf_model, model = pair(family)
    task, examples = load_task(name), list(examples_of(name, family=family))
    found = localize_heads(model, name, examples, batch_size=2, progress=False)

    said = [hf_prediction(hf_model, model, example, task) for example in examples]
    base = [task.score(p, e) for p, e in zip(said, examples, strict=True)]
    assert found.base_scores.tolist() == base
    assert found.baseline == task.aggregate(said, examples)
    assert any(base), "nothing to lose: the comparison would be empty"
    differing = 0
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            with hf_input_hook(hf_layers(hf_model)[layer].self_attn.o_proj, other_heads_mean(head)):
                under = [hf_prediction(hf_model, model, example, task) for example in examples]
            each = [b - task.score(p, e) for b, p, e in zip(base, under, examples, strict=True)]
            differing += sum(a != b for a, b in zip(found.drops[layer, head].tolist(), each, strict=True))
            assert found.scores[layer, head] == found.baseline - task.aggregate(under, examples)
    assert differing == 0
    assert found.drops.any(), "no head matters: the comparison would be empty"


def test_what_comes_back() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    found = localize_heads(model, load_task("vqa"), examples, top_k=2, progress=False)
    for tensor in (found.scores, found.drops, found.base_scores):
        assert tensor.device.type == "cpu" and not tensor.requires_grad
    assert found.scores.shape == (N_LAYERS, N_HEADS)
    assert found.drops.shape == (N_LAYERS, N_HEADS, 2)
    assert found.example_ids == tuple(e.id for e in examples) and found.kinds == tuple(
        e.kind for e in examples
    )
    assert len(found.top()) <= 2 and all(c.score > 0 for c in found.top())
    frame = found.to_dataframe()
    assert len(frame) == N_LAYERS * N_HEADS
    assert frame.score.tolist() == found.scores.flatten().tolist()
    assert "vqa" in repr(found) and "<table" in found._repr_html_()


def test_top_takes_positive_heads_only_and_orders_ties() -> None:
    scores = torch.tensor([[0.5, -1.0, 0.0], [0.2, 0.5, 0.0]], dtype=torch.float64)
    assert _scores(scores, 4).top() == [Component(0, 0, 0.5), Component(1, 1, 0.5), Component(1, 0, 0.2)]
    assert _scores(scores, 4).top(1) == [Component(0, 0, 0.5)]
    assert _scores(-scores.abs() - 1).top() == []


def test_file_round_trip(tmp_path) -> None:
    before = _scores(torch.rand(2, 3, dtype=torch.float64))
    before.save(tmp_path / "heads.json")
    after = HeadScores.load(tmp_path / "heads.json")
    assert torch.allclose(after.scores.double(), before.scores, atol=1e-7, rtol=0)
    assert torch.allclose(after.drops.double(), before.drops, atol=1e-7, rtol=0)
    assert after.example_ids == before.example_ids and after.kinds == before.kinds
    assert [(c.layer, c.index) for c in after.top()] == [(c.layer, c.index) for c in before.top()]


def test_bad_input() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="no examples"):
        localize_heads(model, "vqa", [], progress=False)
    with pytest.raises(ValueError, match="occurs twice"):
        localize_heads(model, "vqa", [examples[0], examples[0]], progress=False)
    with pytest.raises(ValueError, match="unknown task"):
        localize_heads(model, "sing", examples, progress=False)
    with pytest.raises(ValueError, match=f"{examples[0].id}.*references"):
        localize_heads(model, "caption", examples, progress=False)
    single = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="one head"):
        localize_heads(make_pair(make_config(text=single))[1], "vqa", examples, progress=False)


def test_values_that_are_not_finite_are_named() -> None:
    _, model = make_pair(make_config(text={"num_hidden_layers": 1}))
    model.unembed.linear.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=examples_of("vqa", 2)[0].id):
        localize_heads(model, "vqa", list(examples_of("vqa", 2)), progress=False)


@pytest.mark.parametrize("name", ["ocr", "retrieval"])
def test_first_order_falls_equal_a_loop_on_hf(name: str) -> None:
    hf_model, model = pair()
    task, examples = load_task(name), plain_examples(name, 2)
    expected = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for example in examples:
        kept: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for layer in hf_layers(hf_model):
                hooks.enter_context(
                    hf_input_hook(layer.self_attn.o_proj, lambda x, kept=kept: kept.append(x))
                )
            gradients = torch.autograd.grad(hf_log_prob(hf_model, model, example, task), kept)
        for layer, (z, gradient) in enumerate(zip(kept, gradients, strict=True)):
            for head in range(N_HEADS):
                change = other_heads_mean(head)(z.detach()) - z.detach()
                expected[layer, head] -= float((change * gradient).sum()) / len(examples)
    found = first_order_head_drops(model, task, examples, batch_size=1, progress=False)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_a_prefilter_measures_the_best_heads_exactly_and_no_others(tmp_path) -> None:
    _, model = pair()
    examples = list(examples_of("ocr"))
    exact = localize_heads(model, "ocr", examples, progress=False)
    assert not exact.traded and bool((exact.counts == len(examples)).all())
    falls = first_order_head_drops(model, load_task("ocr"), examples, progress=False)
    found = localize_heads(model, "ocr", examples, 2, prefilter=5, progress=False)
    kept = torch.zeros_like(exact.scores, dtype=torch.bool)
    for c in ranked(falls, 5):
        kept[c.layer, c.index] = True
    assert torch.equal(found.counts > 0, kept) and torch.equal(found.scores.isnan(), ~kept)
    assert torch.equal(found.drops[kept], exact.drops[kept])
    assert torch.equal(found.scores[kept], exact.scores[kept])
    assert all(kept[c.layer, c.index] for c in found.top(12)) and len(found.top()) <= 2
    assert "best 5 of 12 heads by attribution patching" in str(found)
    found.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert torch.equal(again.scores.isnan(), ~kept) and again.top(12) == found.top(12)
    assert again.traded == found.traded
    frame = found.to_dataframe()
    assert frame["n"].tolist() == found.counts.flatten().tolist()
    with pytest.raises(ValueError, match="prefilter keeps 2 heads, fewer than the 3 asked for"):
        localize_heads(model, "ocr", examples, 3, prefilter=2, progress=False)


@pytest.mark.exhaustive
def test_raced_heads_are_the_best_up_to_epsilon(tmp_path) -> None:
    _, model = pair()
    examples = [replace(e, id=f"{e.id} {i}") for i in range(8) for e in examples_of("ocr", 4)]
    exact = localize_heads(model, "ocr", examples, progress=False)
    journal: dict = {}
    racing = Racing(delta=0.1, epsilon=0.2, round_size=8, seed=3)
    found = localize_heads(model, "ocr", examples, 2, racing=racing, progress=False, journal=journal)
    kth = exact.scores.flatten().sort(descending=True).values[1]
    assert found.race is not None and len(found.race.winners) == 2
    assert all(exact.scores.flatten()[i] >= kth - 0.2 for i in found.race.winners)
    seen = ~found.drops.isnan()
    assert torch.equal(found.drops[seen], exact.drops[seen]) and not bool(seen.all())
    assert found.base_scores.tolist() == exact.base_scores.tolist() and found.baseline == exact.baseline
    assert {c.layer * N_HEADS + c.index for c in found.top()} <= set(found.race.winners)
    with pytest.raises(ValueError, match="3 heads asked for, but 2 were raced for"):
        found.top(3)
    found.save(tmp_path / "heads.json")
    assert HeadScores.load(tmp_path / "heads.json").race == found.race
    rounds = len(journal)
    again = localize_heads(model, "ocr", examples, 2, racing=racing, progress=False, journal=journal)
    assert len(journal) == rounds == 4 and again.race == found.race
    assert "right up to 0.2 with probability 0.9" in str(found)


def test_corpus_bleu_can_not_be_raced() -> None:
    with pytest.raises(ValueError, match="BLEU-4 is not a mean over examples"):
        localize_heads(pair()[1], "caption", list(examples_of("caption")), 2, racing=Racing(), progress=False)


def test_significant_heads_are_the_planted_ones() -> None:
    drops = np.random.default_rng(0).normal(0.0, 1.0, size=(3, 4, 60))
    drops[0, 1] += 1.0
    drops[2, 3] += 2.0
    drops[1, 0] -= 2.0
    ids = tuple(map(str, range(60)))
    heads = replace(_scores(torch.from_numpy(drops.mean(-1))), drops=torch.from_numpy(drops), example_ids=ids)
    found = significant_heads(heads, q=0.01, draws=2000)
    assert [(c.layer, c.index) for c in found] == [(2, 3), (0, 1)]
    assert [c.score for c in found] == [heads.scores[2, 3].item(), heads.scores[0, 1].item()]
    assert significant_heads(replace(heads, drops=-heads.drops.abs())) == []
    heads.drops[1, 2, 5] = torch.nan
    with pytest.raises(ValueError, match="1 heads, the first L1H2, were not measured on every example"):
        significant_heads(heads)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["vqa", "caption"])
def test_intervals_are_bootstrapped_from_each_example_once_more(name: str) -> None:
    """The metric of resampled examples, worked out anew from what the models said under the head's change."""
    hf_model, model = pair("llava")
    task, examples = load_task(name), list(examples_of(name, 5))
    found = localize_heads(model, name, examples, progress=False)
    said = [hf_prediction(hf_model, model, e, task) for e in examples]
    base = np.array([task.statistics(p, e) for p, e in zip(said, examples, strict=True)])
    whole = found.baseline_interval
    assert whole is not None and (whole.value, whole.n) == (pytest.approx(found.baseline), 5)
    changed = 0
    for layer, head in [(0, 0), (1, 2)]:
        with hf_input_hook(hf_layers(hf_model)[layer].self_attn.o_proj, other_heads_mean(head)):
            under = [hf_prediction(hf_model, model, e, task) for e in examples]
        other = np.array([task.statistics(p, e) for p, e in zip(under, examples, strict=True)])
        expected = bootstrap_interval(task, base, other)
        interval = found.interval(layer, head)
        assert interval is not None and interval.n == 5
        assert [interval.value, interval.low, interval.high] == pytest.approx(
            [expected.value, expected.low, expected.high]
        )
        changed += interval.low != interval.high
    assert changed, "no head changes anything: the comparison would be empty"


def test_intervals_of_a_race_are_over_the_examples_that_were_measured() -> None:
    examples = [replace(e, id=f"{e.id} {i}") for i in range(8) for e in examples_of("ocr", 4)]
    racing = Racing(delta=0.1, epsilon=0.2, round_size=8, seed=3)
    found = localize_heads(pair()[1], "ocr", examples, 2, racing=racing, progress=False)
    assert (found.counts < len(examples)).any(), "no head left early"
    assert found.discoveries is None
    for layer, head in np.ndindex(*found.scores.shape):
        seen = found.drops[layer, head]
        seen = seen[~seen.isnan()].numpy()
        interval, expected = found.interval(layer, head), mean_interval(seen)
        assert interval == replace(expected, value=found.scores[layer, head].item())


def test_what_a_localization_says_of_its_heads(tmp_path) -> None:
    drops = np.random.default_rng(0).normal(0.0, 0.1, size=(3, 4, 60))
    drops[0, 1] += 1.0
    scores = torch.from_numpy(drops.mean(-1))
    ends = torch.stack([scores - 0.25, scores + 0.25], -1)
    baseline = Interval(0.5, 0.4, 0.6, 0.95, 60)
    many = {"drops": torch.from_numpy(drops), "example_ids": tuple(map(str, range(60)))}
    heads = replace(_scores(scores), **many, score_ends=ends, baseline_interval=baseline)
    assert heads.discoveries == {(0, 1)}
    lines = str(heads).split("\n")
    assert "accuracy 0.500 [0.400, 0.600] (95 %, n = 60)" in lines[0]
    assert lines[2].startswith(f"  L0H1   {scores[0, 1]:.3f} [{scores[0, 1] - 0.25:.3f}, ")
    p = heads.p_values
    assert torch.equal(p, torch.from_numpy(sign_flip_p(drops.reshape(12, 60))).view(3, 4))
    assert lines[2].endswith(f"(95 %, n = 60), p = {p[0, 1]:.2g}, stands (FDR 5 % over 12 heads)")
    assert {(c.layer, c.index) for c in significant_heads(heads)} == heads.discoveries
    assert all("does not stand (FDR 5 % over 12 heads)" in line for line in lines[3:5])
    frame = heads.to_dataframe().set_index(["layer", "head"])
    assert frame.at[(0, 1), "low"] == ends[0, 1, 0] and frame.at[(0, 1), "high"] == ends[0, 1, 1]
    assert frame["stands"].sum() == 1 and frame.at[(0, 1), "stands"]
    assert frame["p"].tolist() == p.flatten().tolist()
    heads.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert again.baseline_interval == baseline and torch.equal(again.score_ends, ends)
    assert str(again) == str(heads)
    bare = replace(heads, score_ends=None, baseline_interval=None)
    assert bare.interval(0, 1) is None and bare.to_dataframe()["low"].isna().all()
    assert f"{scores[0, 1]:+.4f}" in str(bare)
