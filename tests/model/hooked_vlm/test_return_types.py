"""`return_type`: logits, loss, both or None, as in TransformerLens; nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_llava

ANSWERS = ["red", "two large circles", "no"]


@pytest.fixture(scope="module")
def pair():
    return random_llava.make_pair(seed=8)


@pytest.fixture(scope="module")
def answered(pair):
    return random_llava.mixed_batch(pair[1], ANSWERS)


@pytest.fixture(scope="module")
def expected(pair, answered) -> Any:
    """Hugging Face's logits and loss."""
    labels = answered.input_ids.masked_fill(~answered.answer_mask, -100)
    with torch.no_grad():
        return pair[0](**answered.to_hf(), labels=labels)


def test_both_is_logits_and_loss(pair, answered, expected) -> None:
    model, tokens = pair[1], answered.attention_mask.bool()
    bound = model.bind(answered)
    with torch.no_grad():
        for found in (
            model(answered, return_type="both"),
            model.run_with_hooks(answered, return_type="both", fwd_hooks=[]),
            model.run_with_cache(answered, return_type="both")[0],
            bound(answered.input_ids, return_type="both"),
        ):
            logits, loss = found
            assert found.logits is logits and found.loss is loss
            torch.testing.assert_close(loss, expected.loss)
            assert (logits - expected.logits)[tokens].abs().max() < 5e-5 * expected.logits.abs().max()


def test_gradients_of_both_are_those_of_the_loss(pair, answered) -> None:
    names = "blocks.1.hook_resid_post"
    runs = [
        pair[1].run_with_cache(answered, names_filter=names, incl_bwd=True, return_type=return_type)[1]
        for return_type in ("loss", "both")
    ]
    assert torch.equal(runs[0][f"{names}_grad"], runs[1][f"{names}_grad"])
    assert runs[0][f"{names}_grad"].abs().max() > 0


def test_none_computes_no_logits(pair, answered) -> None:
    model, ran = pair[1], []
    handle = model.unembed.register_forward_hook(lambda *_: ran.append(1))
    try:
        output, cache = model.run_with_cache(answered, return_type=None)
        assert output is None and not ran
    finally:
        handle.remove()
    assert torch.equal(
        cache["ln_final.hook_normalized"], model.run_with_cache(answered)[1]["ln_final.hook_normalized"]
    )
    resid = model(answered, return_type=None, stop_at_layer=1)
    assert torch.equal(resid, model(answered, stop_at_layer=1)), "as in TransformerLens"


@pytest.mark.wrong_types
@pytest.mark.parametrize("wrong", ["Both", "logit", "", 0, True, ("logits",)])
def test_other_return_types_are_refused(pair, answered, wrong) -> None:
    model, ran = pair[1], []
    handle = model.vision_encoder.register_forward_hook(lambda *_: ran.append(1))
    try:
        for run in (model, model.run_with_cache, model.run_with_hooks):
            with pytest.raises(ValueError, match=r"unknown return_type .*; valid: logits, loss, both"):
                run(answered, return_type=wrong)
        with pytest.raises(ValueError, match=r"unknown return_type .*; valid: logits, loss, both"):
            model.bind(answered)(answered.input_ids, return_type=wrong)
    finally:
        handle.remove()
    assert not ran, "the model ran before the option was looked at"
    with pytest.raises(ValueError, match=r"unknown return_type .*; valid: text, tokens"):
        model.generate(answered, 1, return_type=wrong)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_a_loss_needs_all_layers_and_positions(pair, answered, return_type: str) -> None:
    model = pair[1]
    with pytest.raises(ValueError, match="needs all layers: leave stop_at_layer out"):
        model(answered, return_type=return_type, stop_at_layer=1)
    for keep in (1, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="needs all positions: leave logits_to_keep out"):
            model(answered, return_type=return_type, logits_to_keep=keep)


def test_inputs_without_a_residual_stream_are_refused(pair, answered) -> None:
    with pytest.raises(ValueError, match="inputs= goes with start_at_layer"):
        pair[1](answered, inputs=answered)


def test_a_loss_of_a_single_token(pair) -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        pair[1](torch.tensor([[5]]), return_type="loss")


def test_the_loss_in_bfloat16_is_computed_in_float32() -> None:
    model = random_llava.make_pair(seed=8)[1].to(torch.bfloat16)
    answered = random_llava.mixed_batch(model, ANSWERS)
    labels = answered.input_ids.masked_fill(~answered.answer_mask, -100)
    with torch.no_grad():
        logits, loss = model(answered, return_type="both")
    shifted = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, shifted)
