"""Logit lenses against Hugging Face's hidden states through Hugging Face's own norm and unembedding."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor

from hones_lens import VLMInputs
from hones_lens.analysis.lens import streams as reading
from hones_lens.analysis.lens.difference import lens_difference
from hones_lens.analysis.lens.image import image_token_lens
from hones_lens.analysis.lens.table import logit_lens
from hones_lens.interventions.hooks import Hook, scale_heads, steering_vector, zero_neurons
from hones_lens.interventions.token_groups import Box, token_mask
from hones_lens.results.statistics import mean_interval

FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])


def expected_logits(both: Twin, inputs: VLMInputs) -> Tensor:
    """[layer batch pos d_vocab], the embedding first."""
    out = both.run(inputs, output_hidden_states=True)
    norm, head = both.hf.model.language_model.norm, both.hf.lm_head
    with torch.no_grad():
        layers = [head(norm(states)) for states in out.hidden_states[:-1]]
    return torch.stack([*layers, out.logits])  # the last hidden states are normalised already


@FAMILIES
def test_every_layer_at_every_token(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK", 7)
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    expected = expected_logits(both, inputs)
    found = logit_lens(both.model, inputs, "all", k=5)
    assert found.layers == ("embed", 0, 1, 2)
    assert len(found) == int(inputs.attention_mask.sum())
    for p, place in enumerate(found.places):
        assert [place.token] == both.model.to_str_tokens(inputs.input_ids[place.row, place.position])
        logits = expected[:, place.row, place.position]
        top = logits.topk(5)
        assert torch.allclose(found.logits[p], top.values, atol=1e-4)
        assert torch.allclose(found.probabilities[p], logits.softmax(-1).topk(5).values, atol=1e-5)
        assert torch.allclose(logits.gather(-1, found.ids[p]), top.values, atol=1e-4)
    assert torch.equal(found.ids[-1, -1], both.model(inputs)[2, -1].topk(5).indices), (
        "the last layer's are the model's own"
    )


def test_table_text_and_html(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Twin(random_llava)
    inputs = random_llava.mixed_batch(both.model)
    found = logit_lens(both.model, inputs, k=3)
    frame = found.to_dataframe()
    assert len(frame) == 3 * 4 * 3
    one = frame[(frame.row == 1) & (frame.layer == 2) & (frame["rank"] == 2)].iloc[0]
    logits = both.logits(inputs)[1, -1]
    assert one.id == int(logits.topk(2).indices[1])
    assert one.logit == pytest.approx(float(logits.topk(2).values[1]), abs=1e-4)
    assert one.probability == pytest.approx(float(logits.softmax(-1).topk(2).values[1]), abs=1e-5)
    assert one.token == found.tokens[1][3][1] and one.position == inputs.input_ids.shape[1] - 1
    pd.testing.assert_frame_equal(found[1].to_dataframe(), frame[frame.row == 1].reset_index(drop=True))
    assert found[-1].places == found.places[-1:]
    with pytest.raises(IndexError, match="there are 3 places"):
        found[3]
    many = logit_lens(both.model, inputs, "text", k=2)
    assert f"(the first 3 of {len(many)} places)" in str(many)
    assert f"row 1, position {inputs.input_ids.shape[1] - 1}" in str(found)
    assert repr(found.tokens[0][3][0]) in str(found)

    evil = '<script>alert("x")</script>&'
    monkeypatch.setattr(
        type(both.model.tokenizer), "convert_ids_to_tokens", lambda self, ids: [evil] * len(ids)
    )
    html = logit_lens(both.model, inputs, k=1)._repr_html_()
    assert "<script>" not in html and html.count("&lt;script&gt;") == 3 * (4 + 1)
    assert html.count("<table>") == 3 and html.count("rgba(") == 3 * 4


@FAMILIES
@pytest.mark.parametrize("value", ["logit", "log_prob", "probability", "rank"])
def test_image_tokens_lie_on_their_grid(made, value: str) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    logits = expected_logits(both, inputs)
    token = 33
    found = image_token_lens(both.model, inputs, token, row=1, image=1, value=value)
    rows, columns = inputs.grids[1][1]
    assert found.axes == ("layer", "row", "column") and found.shape == (4, rows, columns)
    first = inputs.grids[1][0]
    places = inputs.image_mask[1].nonzero()[first[0] * first[1] :, 0]
    assert (rows, columns) == ((4, 4) if made is random_llava else (6, 2))
    for layer in range(4):
        for row in range(rows):
            for column in range(columns):
                at = logits[layer, 1, places[row * columns + column]]
                expected = {
                    "logit": at[token],
                    "log_prob": at.log_softmax(-1)[token],
                    "probability": at.softmax(-1)[token],
                    "rank": at.sort(descending=True).indices.tolist().index(token) + 1,
                }[value]
                assert float(found.values[layer, row, column]) == pytest.approx(float(expected), abs=1e-4)


def test_of_many_layers_some_are_read_evenly_spaced() -> None:
    both = Twin(random_qwen)
    inputs = random_qwen.mixed_batch(both.model)[:1]
    every = image_token_lens(both.model, inputs, 33)
    for most, kept in ((2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        some = image_token_lens(both.model, inputs, 33, most_layers=most)
        assert torch.equal(some.values, every.values[kept])
        assert list(some.labels["layer"]) == [every.labels["layer"][i] for i in kept]
    with pytest.raises(ValueError, match="most_layers must be at least 2, not 1"):
        image_token_lens(both.model, inputs, 33, most_layers=1)


def test_image_lens_by_name_and_under_hooks() -> None:
    both = Twin(random_qwen)
    inputs = random_qwen.mixed_batch(both.model)
    (word,) = both.model.to_str_tokens([33])
    hook = steering_vector(1, torch.randn(32), Box(0, 0, 5, 5), inputs=inputs[:1])
    by_name = image_token_lens(both.model, inputs[:1], both.model.tokenizer.decode([33]))
    assert word in by_name.what
    assert torch.equal(by_name.values, image_token_lens(both.model, inputs[:1], 33).values)
    steered = image_token_lens(both.model, inputs[:1], 33, hooks=[hook]).values
    changed = (steered - by_name.values).abs() > 1e-4
    grid = token_mask(inputs[:1], Box(0, 0, 5, 5))[0][inputs.image_mask[0]].view(2, 3)
    assert not changed[:2].any() and torch.equal(changed[2], grid)


@FAMILIES
@pytest.mark.parametrize("group", ["last", "text"])
def test_difference_is_that_of_two_lenses(made, group: str) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    neurons = [(1, i) for i in range(20)]
    found = lens_difference(both.model, inputs, zero_neurons(neurons), group, k=4)
    assert found.layers == ("embed", 0, 1, 2) and found.n_examples == 3

    def silent(x: Tensor) -> Tensor:
        return x * (torch.arange(40) >= 20)

    clean = expected_logits(both, inputs)
    out = both.run(inputs, both.edit(1, "mlp.hook_post", silent), output_hidden_states=True)
    with torch.no_grad():
        states = [both.hf.model.language_model.norm(x) for x in out.hidden_states[:-1]]
        masked = torch.stack([*(both.hf.lm_head(x) for x in states), out.logits])
    weights = inputs.token_groups[group].float()
    weights = weights / weights.sum(-1, keepdim=True) / 3
    deltas = torch.einsum("lbpv,bp->lv", clean - masked, weights)
    assert found.falls[:2] == found.rises[:2] == ((), ()), "nothing changes below the masked neurons"
    for layer in (2, 3):
        most = deltas[layer].sort(descending=True).values
        for tokens, values in ((found.falls[layer], most[:4]), (found.rises[layer], most.flip(0)[:4])):
            assert [t.delta for t in tokens] == pytest.approx(values.tolist(), abs=1e-4)
            assert [float(deltas[layer, t.id]) for t in tokens] == pytest.approx(values.tolist(), abs=1e-4)
        assert found.falls[layer][0].delta > 1e-2
    by_row = torch.einsum("lbpv,bp->blv", clean - masked, 3 * weights)
    for token in found.falls[2]:
        expected = mean_interval(by_row[:, 2, token.id].numpy())
        assert [token.low, token.high] == pytest.approx([expected.low, expected.high], abs=1e-4)
        assert token.low < token.high
    frame = found.to_dataframe()
    assert set(frame.layer) == {1, 2} and len(frame) == 2 * 2 * 4
    one = lens_difference(both.model, inputs[:1], zero_neurons(neurons), group)
    assert one.falls[2][0].low is None and one.falls[2][0].span == ""
    assert f"layer 1 falls: {found.falls[2][0].token}" in str(found)
    assert "layer embed rises: nothing" in str(found)


def test_bad_input_raises() -> None:
    both = Twin(random_llava)
    inputs = random_llava.mixed_batch(both.model)
    hooks: list[Hook] = scale_heads([(0, 1)], 0.0)
    with pytest.raises(ValueError, match="k must lie in 1"):
        logit_lens(both.model, inputs, k=0)
    with pytest.raises(ValueError, match="k must lie in 1"):
        logit_lens(both.model, inputs, k=10**6)
    with pytest.raises(ValueError, match="'image' is empty in row 2"):
        logit_lens(both.model, inputs, "image")
    with pytest.raises(ValueError, match="valid: log_prob, probability, logit, rank"):
        image_token_lens(both.model, inputs, 3, value="score")
    with pytest.raises(ValueError, match="token id 1000000"):
        image_token_lens(both.model, inputs, 10**6)
    with pytest.raises(IndexError, match="row 2 has 0 images"):
        image_token_lens(both.model, inputs, 3, row=2)
    with pytest.raises(IndexError, match="there is no row 3"):
        image_token_lens(both.model, inputs, 3, row=3)
    with pytest.raises(ValueError, match="no hooks"):
        lens_difference(both.model, inputs, [])
    with pytest.raises(ValueError, match="k must be at least 1"):
        lens_difference(both.model, inputs, hooks, k=0)
