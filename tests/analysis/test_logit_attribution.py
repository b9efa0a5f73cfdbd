"""Direct logit attribution against Hugging Face's logits, and against what its modules pass on."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin, at
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs
from hones_lens.analysis.logit_attribution import direct_logit_attribution
from hones_lens.interventions.hooks import zero_neurons
from hones_lens.interventions.token_groups import Box, token_mask

IDS, FOILS = torch.tensor([40, 77, 5]), torch.tensor([41, 3, 99])
FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])


def asked(logits: Tensor, foils: bool = True) -> Tensor:
    """[batch pos]: the logit of each row's token, minus that of its foil."""
    rows = torch.arange(3)[:, None], torch.arange(logits.shape[1])
    found = logits[*rows, IDS[:, None]]
    return found - logits[*rows, FOILS[:, None]] if foils else found


def directions(both: Twin) -> Tensor:
    """Columns of Hugging Face's unembedding times its norm's weight, [row d_model]."""
    head, norm = both.hf.lm_head.weight, both.hf.model.language_model.norm.weight
    return (head[IDS] - head[FOILS]) * norm


def scales(both: Twin, inputs: VLMInputs) -> Tensor:
    """Of Hugging Face's final norm, [batch pos], from what enters it."""
    kept = {}
    both.run(inputs, [("model.language_model.norm", "input", lambda x, m: kept.update(x=x))])
    return (kept["x"].pow(2).mean(-1) + both.model.cfg.eps).sqrt()


@FAMILIES
@pytest.mark.parametrize("by", ["layer", "component"])
def test_embedding_attention_and_mlps_add_up_to_the_logit(made, by: str) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    logits = both.logits(inputs)
    for foils in (None, FOILS):
        found = direct_logit_attribution(both.model, inputs, IDS, foils, by=by)
        assert found.axes == ("row", by) and found.names(by)[0] == "embed"
        expected = asked(logits, foils is not None)[:, -1]
        assert (found.values.sum(1) - expected).abs().max() < 1e-4
        assert expected.abs().max() > 0.1
    if by == "component":
        assert found.names(by)[1:3] == ("attn 0", "mlp 0") and found.shape == (3, 7)
        seen, u, r = both.seen(inputs), directions(both), scales(both, inputs)[:, -1]
        for i, name in enumerate(("attn_out", "mlp_out")):
            write = seen[f"blocks.2.hook_{name}"][:, -1]
            assert torch.allclose(found.values[:, 5 + i], (write * u).sum(-1) / r, atol=1e-4)


@FAMILIES
def test_heads_are_slices_of_what_enters_the_output_projection(made) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    found = direct_logit_attribution(both.model, inputs, IDS, FOILS, by="head")
    parts = direct_logit_attribution(both.model, inputs, IDS, FOILS)
    assert found.axes == ("row", "layer", "head") and found.shape == (3, 3, 4)
    seen, u, r = both.seen(inputs), directions(both), scales(both, inputs)[:, -1]
    for layer in range(3):
        weight = both.hf.get_submodule(at(layer, "self_attn.o_proj")).weight  # [d_model, heads · d_head]
        for head in range(4):
            columns = slice(head * both.d_head, (head + 1) * both.d_head)
            write = seen[f"blocks.{layer}.attn.hook_z"][:, -1, head] @ weight[:, columns].T
            expected = (write * u).sum(-1) / r
            assert torch.allclose(found.values[:, layer, head], expected, atol=1e-4)
        whole = parts.select(component=f"attn {layer}").values
        assert torch.allclose(found.values[:, layer].sum(-1), whole, atol=1e-4)


@FAMILIES
def test_neurons_are_their_activations_times_what_they_write(made) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    found = direct_logit_attribution(both.model, inputs, IDS, FOILS, by="neuron")
    assert found.axes == ("row", "layer", "neuron") and found.shape == (3, 3, 40)
    seen, u, r = both.seen(inputs), directions(both), scales(both, inputs)[:, -1]
    for layer in range(3):
        weight = both.hf.get_submodule(at(layer, "mlp.down_proj")).weight  # [d_model, neurons]
        for neuron in (0, 7, 39):
            write = seen[f"blocks.{layer}.mlp.hook_post"][:, -1, neuron, None] * weight[:, neuron]
            expected = (write * u).sum(-1) / r
            assert torch.allclose(found.values[:, layer, neuron], expected, atol=1e-4)
    heads = direct_logit_attribution(both.model, inputs, IDS, FOILS, by="head")
    embed = direct_logit_attribution(both.model, inputs, IDS, FOILS).select(component="embed")
    total = embed.values + heads.values.sum((1, 2)) + found.values.sum((1, 2))
    assert (total - asked(both.logits(inputs))[:, -1]).abs().max() < 1e-4


@FAMILIES
@pytest.mark.parametrize("by", ["component", "neuron"])
def test_positions_of_the_image_and_of_all_text(made, by: str) -> None:
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    logits = asked(both.logits(inputs))
    image, text = inputs.image_mask, inputs.token_groups["text"]
    for mask in (text, image[:2]):
        rows = torch.arange(len(mask))
        found = direct_logit_attribution(both.model, inputs[rows], IDS[rows], FOILS[rows], by=by, group=mask)
        columns = list(found.names("position"))
        assert found.axes[:2] == ("row", "position")
        assert columns == mask.any(0).nonzero()[:, 0].tolist()
        inside = mask[:, columns]
        parts = found.values.flatten(2)
        assert bool(parts[~inside].isnan().all()) and bool(parts[inside].isfinite().all())
        sums = parts.sum(-1)[inside]
        if by == "neuron":  # with the embedding and the heads
            rest = direct_logit_attribution(both.model, inputs[rows], IDS[rows], FOILS[rows], group=mask)
            rest = rest.values[:, :, [0, 1, 3, 5]].sum(-1)
            sums = sums + rest[inside]
        assert (sums - logits[rows][mask]).abs().max() < 1e-4


def test_one_token_of_a_different_position_in_each_row() -> None:
    both = Twin(random_llava)
    inputs = both.model.prepare(random_llava.make_images(3), list(random_llava.QUESTIONS))
    box = Box(6, 0, 8, 3)  # in one token
    found = direct_logit_attribution(both.model, inputs, IDS, FOILS, group=box)
    mask = token_mask(inputs, box)
    assert found.axes == ("row", "component") and bool((mask.sum(1) == 1).all())
    assert len(set(mask.int().argmax(1).tolist())) > 1
    assert (found.values.sum(1) - asked(both.logits(inputs))[mask]).abs().max() < 1e-4


def test_means_have_intervals_and_notes_say_what_is_missing() -> None:
    both = Twin(random_llava)
    inputs = random_llava.mixed_batch(both.model)
    rows = direct_logit_attribution(both.model, inputs, IDS, by="head")
    mean = direct_logit_attribution(both.model, inputs, IDS, by="head", mean=True)
    assert mean.axes == ("layer", "head") and mean.n == 3
    assert torch.allclose(mean.values, rows.values.double().mean(0), atol=1e-6)
    assert mean.low is not None and mean.high is not None
    lowest, highest = rows.values.amin(0), rows.values.amax(0)
    assert bool((mean.low >= lowest - 1e-5).all()) and bool((mean.high <= highest + 1e-5).all())
    assert bool((mean.low < mean.high).all())
    logit = float(asked(both.logits(inputs), foils=False)[:, -1].mean())
    heads = float(mean.values.sum())
    said = f"Mean logit {logit:.4g}; the heads shown add up to {heads:.4g}."
    assert mean.notes == (f"{said} The rest is the embedding and the MLPs.",)


@torch.no_grad()
def test_under_an_intervention_and_for_words() -> None:
    model = HookedVLM.from_pretrained("tiny-llava")
    inputs = model.prepare(random_llava.make_images(1), "what color is the circle?")
    hooks = zero_neurons([(0, 5), (3, 9)])
    token = model.to_tokens(" red", prepend_bos=False)[0, -1].item()
    name = model.tokenizer.decode([token])
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1]
    found = direct_logit_attribution(model, inputs, name, hooks=hooks)
    assert float(found.values.sum()) == pytest.approx(float(logits[token]), abs=1e-4)
    neurons = direct_logit_attribution(model, inputs, token, by="neuron", hooks=hooks)
    assert neurons.values[0, 0, 5] == neurons.values[0, 3, 9] == 0
    assert float(logits[token]) != pytest.approx(float(model(inputs)[0, -1, token]), abs=1e-3)


def test_texts_are_told_apart_by_their_first_different_token() -> None:
    """Ids by the tokenizer itself; the notes say which tokens were taken."""
    both = Twin(random_llava)
    inputs, tokenizer = random_llava.mixed_batch(both.model), both.model.tokenizer
    texts = ("what color is the circle", "what color of the circle")
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    n = next(i for i in range(len(a)) if a[i] != b[i])
    assert n > 0
    found = direct_logit_attribution(both.model, inputs, *texts)
    expected = direct_logit_attribution(both.model, inputs, a[n], b[n])
    assert torch.equal(found.values, expected.values)
    assert f"'{texts[0]}' is token {tokenizer.convert_ids_to_tokens(a[n])}, {n + 1} of {len(a)}" in str(found)
    alone = direct_logit_attribution(both.model, inputs, texts[0])
    assert torch.equal(alone.values, direct_logit_attribution(both.model, inputs, a[0]).values)
    assert f"is token {tokenizer.convert_ids_to_tokens(a[0])}, 1 of {len(a)}" in alone.notes[-1]


def test_bad_input_raises() -> None:
    both = Twin(random_llava)
    inputs = random_llava.mixed_batch(both.model)

    def run(tokens=IDS, **options) -> None:
        direct_logit_attribution(both.model, inputs, tokens, **options)

    with pytest.raises(ValueError, match="valid: layer, component, head, neuron"):
        run(by="circuit")
    with pytest.raises(ValueError, match=r"tokens of shape \(2,\) for a batch of 3"):
        run(IDS[:2])
    with pytest.raises(ValueError, match="no token tells 'red' from 'red': give ids"):
        run("red", foils="red")
    with pytest.raises(ValueError, match="empty text has no token"):
        run("")
    with pytest.raises(ValueError, match="not all in 0"):
        run(10**6)
    with pytest.raises(ValueError, match="'image' is empty in row 2"):
        run(group="image")
    with pytest.raises(ValueError, match="rows whose positions differ"):
        run(group="text", mean=True)
