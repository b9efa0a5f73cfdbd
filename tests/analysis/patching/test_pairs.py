"""Pairs of clean and corrupted inputs: what is in them, and which are refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers import random_llava
from helpers.patching_pairs import model_and_pairs, pictures

import hones_lens as hl
from hones_lens import HookedVLM, VLMInputs
from hones_lens.analysis.patching.metrics import as_metric, kl, log_prob, logit_diff
from hones_lens.analysis.patching.pairs import (
    PatchPairs,
    corrupted_by,
    counterfactual,
    logits_at_end,
    with_shared_prefix,
)
from hones_lens.interventions.corruptions import blank, gaussian_noise, token_swap

SHIPPED = pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])


@cache
def shipped(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name)


@SHIPPED
@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_counterfactual_pairs_end_where_their_answers_part(name: str, task: str) -> None:
    """Prompt and answer tokenized as one text: the next tokens are those of the two answers."""
    model, drawn = shipped(name), hl.counterfactual_pairs(task, limit=8)
    pairs, asked = counterfactual(model, drawn, task), hl.load_task(task)
    assert pairs.task == task and pairs.facts == tuple(drawn)
    assert pairs.ids == tuple(pair.clean.id for pair in drawn)
    end = model.cfg.eos_token_ids[:1]
    for row, pair in enumerate(drawn):
        prompt = asked.target_prompt(pair.clean)
        for inputs, side, answer, token in (
            (pairs.clean, pair.clean, pair.answers[0], pairs.answer),
            (pairs.corrupted, pair.corrupted, pair.answers[1], pairs.foil),
        ):
            whole = model.prepare(side.image, prompt, answer)
            ids = [*whole.input_ids[0].tolist(), *end]
            mine = inputs.input_ids[row][inputs.attention_mask[row].bool()].tolist()
            assert token is not None and [*mine, int(token[row])] == ids[: len(mine) + 1]
            assert torch.equal(inputs[row].pixel_values, whole.pixel_values)
        assert pairs.foil is not None and pairs.answer[row] != pairs.foil[row]


@SHIPPED
def test_what_answers_share_stands_behind_the_prompt_and_can_be_taken_off(name: str) -> None:
    model, task = shipped(name), hl.load_task("ocr")
    drawn = hl.counterfactual_pairs("ocr", limit=60)
    alike = [pair for pair in drawn if pair.answers[0][0] == pair.answers[1][0]]
    drawn = [drawn[0], *alike[:2]]
    pairs = counterfactual(model, drawn, "ocr")
    assert pairs.shared[0] == 0 and pairs.shared[1] >= 1
    alone = pairs.without_answer_prefix()
    prepared = model.prepare(
        [pair.clean.image for pair in drawn], [task.target_prompt(p.clean) for p in drawn]
    )
    assert torch.equal(alone.clean.input_ids, prepared.input_ids)
    assert torch.equal(alone.clean.attention_mask, prepared.attention_mask)
    assert alone.without_answer_prefix() is alone
    with torch.no_grad():
        found, expected = (logits_at_end(model, inputs) for inputs in (alone.clean, prepared))
    assert (found - expected).abs().max() <= 1e-4


def test_some_pairs_and_pairs_the_other_way_round() -> None:
    model = shipped("tiny-llava")
    pairs = counterfactual(model, hl.counterfactual_pairs("vqa", limit=5), "vqa")
    some = pairs[[3, 1]]
    assert some.ids == (pairs.ids[3], pairs.ids[1]) and some.facts == (pairs.facts[3], pairs.facts[1])
    assert some.answer.tolist() == pairs.answer[[3, 1]].tolist()
    with torch.no_grad():
        whole, part = logits_at_end(model, pairs.corrupted), logits_at_end(model, some.corrupted)
    assert (whole[[3, 1]] - part).abs().max() <= 1e-4
    assert bool(some.clean.attention_mask[:, 0].any()), "padding that none of them needs"
    back = some.swapped()
    assert (
        back.foil is not None and torch.equal(back.foil, some.answer) and torch.equal(back.answer, some.foil)
    )
    assert torch.equal(back.clean.pixel_values, some.corrupted.pixel_values)
    assert back.facts[0].answers == some.facts[0].answers[::-1]
    assert back.facts[0].clean is some.facts[0].corrupted
    assert torch.equal(back.mask("image"), back.clean.image_mask)


def test_a_corruption_that_leaves_a_row_as_it_is_is_refused() -> None:
    model = shipped("tiny-llava")
    grey = random_llava.Image.new("RGB", (112, 112), (128, 128, 128))
    other = random_llava.make_images(1)[0]
    inputs = model.prepare([other, grey], ["what color is it?"] * 2)
    with pytest.raises(ValueError, match=r"pictures painted .* changes nothing in 'b'"):
        corrupted_by(model, inputs, blank(), [1, 2], ids=["a", "b"])
    assert len(corrupted_by(model, inputs, gaussian_noise(), [1, 2])) == 2

    def of_the_first(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        noisy = gaussian_noise()(model, inputs)
        noisy.image_embeds[1] = model.with_image_embeds(inputs).image_embeds[1]
        return noisy

    with pytest.raises(ValueError, match=r"of_the_first.* changes nothing in 'row 1'"):
        corrupted_by(model, inputs, of_the_first, [1, 2])


def test_pairs_that_do_not_lie_token_on_token_are_refused() -> None:
    model, pairs = model_and_pairs(random_llava)
    clean = pairs.clean
    longer = model.prepare(pictures(random_llava, 50), [q + " now?" for q in random_llava.QUESTIONS])
    ends = (pairs.answer, pairs.foil, pairs.ids)
    with pytest.raises(ValueError, match="a pair needs tokens in the same places"):
        PatchPairs(clean, longer, *ends)
    moved = model.prepare([pictures(random_llava, 0)[i] for i in (0, 2, 1)], list(random_llava.QUESTIONS))
    shape = clean.input_ids.shape
    other = clean[[0, 2, 1]]
    assert other.input_ids.shape == shape != moved.input_ids.shape
    with pytest.raises(ValueError, match="pair 'b': padding or image tokens lie in different places"):
        PatchPairs(clean, other, *ends)
    with pytest.raises(ValueError, match="2 entries of answer for 3 pairs"):
        PatchPairs(clean, clean, pairs.answer[:2], None, pairs.ids)
    with pytest.raises(ValueError, match="2 entries of answer for 3 pairs"):
        corrupted_by(model, clean, blank(), [1, 2])
    with pytest.raises(ValueError, match="needs words of equal length"):
        one = model.prepare(pictures(random_llava, 0)[0], "what color is it?")
        corrupted_by(model, one, token_swap("color", "zog"), [1])


def test_answers_that_are_the_same_and_pairs_without_a_foil() -> None:
    model = shipped("tiny-llava")
    inputs = model.prepare(random_llava.make_images(1)[0], "what color is it?")
    with pytest.raises(ValueError, match="pair 'x': no token tells its two answers apart"):
        with_shared_prefix(model, inputs, inputs, [([5, 6], [5, 6])], ("x",))
    made = with_shared_prefix(model, inputs, inputs, [([5], [5, 6])], ("x",))
    assert (int(made.answer), int(made.foil), made.shared) == (model.cfg.eos_token_ids[0], 6, (1,))
    alone = corrupted_by(model, inputs, blank(), [5])
    with pytest.raises(ValueError, match="without a foil can't be swapped"):
        alone.swapped()
    with pytest.raises(ValueError, match="no pairs"):
        counterfactual(model, [], "vqa")


def test_metrics() -> None:
    _, pairs = model_and_pairs(random_llava)
    logits, clean = torch.randn(3, 200), torch.randn(3, 200)
    probabilities = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    was = clean.double().exp() / clean.double().exp().sum(-1, keepdim=True)
    assert pairs.foil is not None
    for row in range(3):
        a, b = int(pairs.answer[row]), int(pairs.foil[row])
        assert float(logit_diff(logits, pairs, clean)[row]) == pytest.approx(
            float(logits[row, a] - logits[row, b])
        )
        assert float(log_prob(logits, pairs, clean)[row]) == pytest.approx(float(probabilities[row, a].log()))
        divergence = float((was[row] * (was[row] / probabilities[row]).log()).sum())
        assert float(kl(logits, pairs, clean)[row]) == pytest.approx(-divergence, abs=1e-5)
    assert as_metric("kl") is kl and as_metric(log_prob) is log_prob
    with pytest.raises(ValueError, match="unknown patching metric 'x'; valid: logit_diff, log_prob, kl"):
        as_metric("x")
