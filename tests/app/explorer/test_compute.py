"""The explorer's numbers against the cache, formulas written out, and runs of the model that are patched."""

from __future__ import annotations

import pytest
import torch
from helpers import random_gemma, random_llava, random_qwen

from hones_lens import HookedVLM
from hones_lens.analysis.vocabulary import vocabulary_logits
from hones_lens.app.explorer import compute
from hones_lens.app.explorer.compute import Activations, AnsweredPrompt
from hones_lens.app.explorer.state import Edit

TOKEN = -2  # looked from, counted from the end
EDITS = (Edit("head", 0, 1), Edit("neuron", 1, 3, 2.5))


MADE = {"llava": random_llava, "qwen": random_qwen, "gemma": random_gemma}


@pytest.fixture(params=MADE, scope="module")
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return MADE[request.param].make_pair()[1]


@pytest.fixture(scope="module")
def answered(model: HookedVLM) -> AnsweredPrompt:
    inputs = model.prepare(random_llava.make_images(1), random_llava.QUESTIONS[0])
    return compute.answer_prompt(model, inputs, max_new_tokens=4)


@pytest.fixture(scope="module", params=[(), EDITS], ids=["unedited", "edited"])
def edits(request: pytest.FixtureRequest) -> tuple[Edit, ...]:
    return request.param


@pytest.fixture(scope="module")
def activations(model: HookedVLM, answered: AnsweredPrompt, edits: tuple[Edit, ...]) -> Activations:
    return compute.run_with_edits(model, answered, edits, answered.n_tokens + TOKEN)


def hooks(edits: tuple[Edit, ...]) -> list:
    return [edit.hook for edit in edits]


def cached(
    model: HookedVLM, answered: AnsweredPrompt, edits: tuple[Edit, ...], extra: list | None = None
) -> tuple:
    with torch.no_grad(), model.hooks([*hooks(edits), *(extra or [])]):
        return model.run_with_cache(answered.sequence)


def test_the_answer_is_the_models_own(model: HookedVLM, answered: AnsweredPrompt) -> None:
    assert torch.equal(model.generate(answered.prompt, 4, return_type="tokens")[0], answered.answer)
    assert torch.equal(
        answered.sequence.input_ids[0, answered.last_prompt_position + 1 :], answered.answer[:-1]
    )
    assert [
        answered.answer_index(p)
        for p in (0, answered.last_prompt_position, answered.last_prompt_position + 1)
    ] == [0, 0, 1]
    with pytest.raises(ValueError, match="one prompt, not 3"):
        compute.answer_prompt(model, random_llava.mixed_batch(model), 2)


def test_activations_are_those_of_the_cache(
    model: HookedVLM, answered: AnsweredPrompt, edits, activations: Activations
) -> None:
    logits, cache = cached(model, answered, edits)
    n = len(answered.answer)
    torch.testing.assert_close(activations.log_probs, logits[0, -n:].log_softmax(-1))
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        torch.testing.assert_close(
            activations.pattern[layer], cache[f"{block}.attn.hook_pattern"][0, :, TOKEN]
        )
        torch.testing.assert_close(activations.z[layer], cache[f"{block}.attn.hook_z"][0])
        torch.testing.assert_close(activations.post[layer], cache[f"{block}.mlp.hook_post"][0])
        torch.testing.assert_close(activations.gate[layer], cache[f"{block}.mlp.hook_pre"][0, TOKEN])
        torch.testing.assert_close(activations.resid[layer + 1], cache[f"{block}.hook_resid_post"][0])
    torch.testing.assert_close(activations.resid[0], cache["hook_embed"][0])


def test_edits_do_what_they_say(model: HookedVLM, answered: AnsweredPrompt) -> None:
    _, plain = cached(model, answered, ())
    _, edited = cached(model, answered, EDITS)
    z = plain["blocks.0.attn.hook_z"]
    others = z[:, :, [0, 2, 3]].mean(2)
    torch.testing.assert_close(edited["blocks.0.attn.hook_z"][:, :, 1], others)
    torch.testing.assert_close(edited["blocks.0.attn.hook_z"][:, :, [0, 2, 3]], z[:, :, [0, 2, 3]])
    gate, linear = (edited[f"blocks.1.mlp.{name}"] for name in ("hook_pre", "hook_pre_linear"))
    made = model.blocks[1].mlp.act(gate) * linear
    made[..., 3] *= 2.5
    torch.testing.assert_close(edited["blocks.1.mlp.hook_post"], made)


def test_direct_effects_add_up_to_the_centred_logits(
    model: HookedVLM, answered: AnsweredPrompt, edits, activations: Activations
) -> None:
    logits, _ = cached(model, answered, edits)
    position, target = answered.n_tokens - 1, 7
    direction = compute.logit_direction(model, target)
    heads = compute.direct_heads(model, activations, direction, position)
    neurons = compute.direct_neurons(model, activations, direction, position)
    start = vocabulary_logits(model, activations.resid[0, position])[target]
    total = heads.sum() + neurons.sum() + start / compute.final_scale(model, activations.resid[-1, position])
    centred = logits[0, position, target] - logits[0, position].mean()
    assert total.item() == pytest.approx(centred.item(), abs=2e-4)
    one = compute.head_writes(model, activations, (1, 2), position)
    read = vocabulary_logits(model, one)[target] / compute.final_scale(model, activations.resid[-1, position])
    assert read.item() == pytest.approx(heads[1, 2].item(), abs=1e-5)


def test_vectors_are_read_as_tokens_by_the_folded_unembedding(model: HookedVLM) -> None:
    row = model.blocks[1].mlp.W_out[5].detach()
    every = model.tokens_to_residual_directions(torch.arange(model.cfg.d_vocab)).detach()
    read = every @ row
    torch.testing.assert_close(vocabulary_logits(model, row), read - read.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        compute.logit_direction(model, 3), every[3] - every.mean(0), atol=1e-5, rtol=1e-4
    )


def test_the_lens_reads_what_the_model_would_say(
    model: HookedVLM, answered: AnsweredPrompt, edits, activations: Activations
) -> None:
    logits, cache = cached(model, answered, edits)
    found = compute.lens(model, activations, answered.n_tokens - 1)
    assert found.shape[0] == model.cfg.n_layers + 1
    torch.testing.assert_close(found[-1], logits[0, -1].softmax(-1))
    early = cache["blocks.1.hook_resid_pre"][0, -1]
    normed = early / (early.square().mean() + model.cfg.eps).sqrt() * model.ln_final.weight
    torch.testing.assert_close(found[1], (normed @ model.W_U).softmax(-1).detach())


def test_what_a_head_feeds_is_what_neurons_lose_when_it_is_cut_from_their_stream(
    model: HookedVLM, answered: AnsweredPrompt, edits, activations: Activations
) -> None:
    """By runs of the model: the head's write is taken from one layer's stream, the norm's scale held."""
    head, token = (0, 1), answered.n_tokens + TOKEN
    _, clean = cached(model, answered, edits)
    writes = clean["blocks.0.attn.hook_z"][0, token, 1] @ model.blocks[0].attn.W_O[1]
    if (behind := model.blocks[0].ln1_post) is not None:
        writes = writes * behind.weight / clean["blocks.0.ln1_post.hook_scale"][0, token]
    found = compute.fed_neurons(model, activations, head, token)
    for layer in range(model.cfg.n_layers):
        mid, scale = f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.ln2.hook_scale"

        def cut(x, hook):
            x = x.clone()
            x[0, token] -= writes
            return x

        held = clean[scale]
        _, without = cached(model, answered, (), [(mid, cut), (scale, lambda x, hook, held=held: held)])
        if edits:  # what lies below is edited in `clean` alone: put its stream in
            stream = clean[mid]
            put = (mid, lambda x, hook, stream=stream: stream)
            _, without = cached(
                model, answered, (), [put, (mid, cut), (scale, lambda x, hook, held=held: held)]
            )
        act = model.blocks[layer].mlp.act
        whole = act(clean[f"blocks.{layer}.mlp.hook_pre"]) * clean[f"blocks.{layer}.mlp.hook_pre_linear"]
        lost = (whole - without[f"blocks.{layer}.mlp.hook_post"])[0, token]
        torch.testing.assert_close(found[layer], lost, atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 0.01


def test_feeding_heads_and_fed_neurons_agree(
    model: HookedVLM, answered: AnsweredPrompt, activations: Activations
) -> None:
    token, neuron = answered.n_tokens + TOKEN, (1, 4)
    found = compute.feeding_heads(model, activations, neuron, token)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            fed = compute.fed_neurons(model, activations, (layer, head), token)
            assert found[layer, head].item() == pytest.approx(fed[neuron].item(), abs=1e-6)
    assert bool((found[2] == 0).all()) and bool((found[:2] != 0).all())


def test_heads_write_along_the_largest_directions_of_their_ov_matrix(model: HookedVLM) -> None:
    attn, norm = model.blocks[1].attn, model.blocks[1].ln1
    group = 3 // (attn.n_heads // attn.n_key_value_heads)
    whole = torch.diag(norm.weight) @ attn.W_V[group] @ attn.W_O[3]
    if (behind := model.blocks[1].ln1_post) is not None:
        whole = whole * behind.weight
    _, sizes, right = torch.linalg.svd(whole.detach())
    found, directions = compute.ov_directions(model, (1, 3), 3)
    torch.testing.assert_close(found, sizes[:3], atol=1e-5, rtol=1e-4)
    along = (directions * right[:3]).sum(-1).abs()
    torch.testing.assert_close(along, torch.ones(3), atol=1e-4, rtol=1e-4)
