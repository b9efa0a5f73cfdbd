"""The flow from heads to neurons to tokens: its sums are HONES eq. H3, its terms one head at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.hf_task_loops import FAMILIES, WEIGHTS, critical_heads, examples_of, fresh_pair, hf_layers, pair

from hones_lens.hones.attribution.attribute import attribute_neurons
from hones_lens.hones.attribution.flow import HeadNeuronFlow, head_neuron_flow

RATIO = 0.2  # 12 of 60 neurons
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # batches of other sizes round otherwise; scores are near 0.1
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def flow_of(family: str, **options) -> HeadNeuronFlow:
    examples = list(examples_of("vqa", family=family))
    options = {"ratio": RATIO, "progress": False, **options}
    return head_neuron_flow(
        pair(family)[1], "vqa", examples, critical_heads(family=family), batch_size=2, **options
    )


@FAMILY
def test_contributions_sum_to_the_scores_and_are_each_head_s_own(family: str) -> None:
    _, model = pair(family)
    examples, heads = list(examples_of("vqa", family=family)), critical_heads(family=family)
    options = {"ratio": RATIO, "progress": False}
    whole = attribute_neurons(model, "vqa", examples, heads, **options)
    found = flow_of(family)
    assert [c[:2] for c in found.neurons] == [c[:2] for c in whole.top()] and len(found.neurons) == 12
    at = tuple(torch.tensor([c[:2] for c in found.neurons]).T)
    torch.testing.assert_close(found.contributions.sum(0), whole.scores[at], **CLOSE)
    torch.testing.assert_close(
        torch.tensor([c.score for c in found.neurons]), whole.scores[at].float(), **CLOSE
    )
    assert found.total == pytest.approx(float(whole.scores.sum()), rel=1e-4)
    positive = {cell: w for cell, w in WEIGHTS.items() if w > 0}
    assert [c[:2] for c in found.heads] == sorted(positive, key=lambda cell: -positive[cell])
    for h, head in enumerate(found.heads):
        only = replace(heads, scores=torch.full_like(heads.scores, -1.0))
        only.scores[head.layer, head.index] = head.score
        alone = attribute_neurons(model, "vqa", examples, only, **options).scores
        expected = alone[at] * head.score / sum(positive.values())
        torch.testing.assert_close(found.contributions[h], expected, **CLOSE)
    assert found.contributions.any(1).all()


@FAMILY
def test_tokens_are_those_that_the_neuron_as_active_promotes(family: str) -> None:
    hf_model, model = pair(family)
    examples = list(examples_of("vqa", family=family))
    found = flow_of(family, tokens=3)
    mean = attribute_neurons(model, "vqa", examples, method="mean_activation", signed=True, progress=False)
    directions = model.tokens_to_residual_directions(torch.arange(model.cfg.d_vocab)).detach()
    signs = set()
    for n, neuron in enumerate(found.neurons):
        activation = float(mean.scores[neuron.layer, neuron.index])
        assert float(found.activations[n]) == pytest.approx(activation, rel=1e-4, abs=1e-5)
        written = hf_layers(hf_model)[neuron.layer].mlp.down_proj.weight[:, neuron.index].detach()
        signs.add(activation > 0)
        logits = directions @ (written if activation > 0 else -written)
        top = (logits - logits.mean()).topk(3)
        names = model.to_str_tokens(top.indices)
        assert [one.token for one in found.promoted[n]] == names
        assert [one.logit for one in found.promoted[n]] == pytest.approx(
            top.values.tolist(), rel=1e-5, abs=2e-5
        )
    assert signs == {True, False}


def test_neurons_of_another_ranking_and_what_is_saved(tmp_path: Path) -> None:
    _, model = pair()
    examples = list(examples_of("vqa"))
    ranking = attribute_neurons(model, "vqa", examples, method="random", ratio=RATIO, progress=False)
    found = flow_of("llava", neurons=ranking, ratio=None)
    assert [c[:2] for c in found.neurons] == [c[:2] for c in ranking.top()]
    whole = attribute_neurons(model, "vqa", examples, critical_heads(), progress=False).scores
    assert [c.score for c in found.neurons] == pytest.approx(
        [float(whole[c.layer, c.index]) for c in found.neurons], rel=1e-4, abs=1e-5
    )
    found.save(tmp_path / "flow.json")
    again = HeadNeuronFlow.load(tmp_path / "flow.json")
    assert str(again) == str(found) and again.promoted == found.promoted
    torch.testing.assert_close(again.contributions, found.contributions)
    frame = again.to_dataframe()
    assert len(frame) == 3 * 12
    assert frame.contribution.sum() == pytest.approx(float(found.contributions.sum()))
    one = frame.iloc[4]  # the second neuron's second head
    assert one.contribution == float(found.contributions[1, 1])
    assert (one.neuron_layer, one.neuron) == found.neurons[1][:2]
    assert one.activation == float(found.activations[1])
    lines = str(found).splitlines()[1:]
    for line, activation in zip(lines, found.activations.tolist(), strict=True):
        assert f", active {'−' if activation < 0 else '+'} →" in line
    assert one.promotes == found.promoted[1][0].token


def test_what_is_refused() -> None:
    _, model = pair()
    examples = list(examples_of("vqa"))
    none = replace(critical_heads(), scores=-critical_heads().scores.abs())
    with pytest.raises(ValueError, match="no critical head has w > 0"):
        head_neuron_flow(model, "vqa", examples, none, progress=False)
    with pytest.raises(ValueError, match="tokens must lie in 1"):
        flow_of("llava", tokens=0)
    other = fresh_pair()[1]
    ranking = attribute_neurons(other, "vqa", examples, method="random", progress=False)
    with pytest.raises(ValueError, match=r"neuron scores \(2, 20\) for a model of \(3, 20\) neurons"):
        flow_of("llava", neurons=replace(ranking, scores=ranking.scores[:2]))
