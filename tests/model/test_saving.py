"""`save_pretrained`: Hugging Face's own model, loaded from the folder, computes what the hooked one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_llava, random_qwen
from transformers import AutoModelForImageTextToText, AutoProcessor

from hones_lens import HookedVLM, checkpoint_path
from hones_lens.interventions import fold_head_scales, fold_neuron_scales, scale, scale_heads, zero_neurons

FAMILIES = {"llava": random_llava, "qwen": random_qwen}
NEURONS = ((0, 3), (1, 5), (1, 0))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def reloaded(folder: Path) -> torch.nn.Module:
    """By Hugging Face alone, with a report of what did not fit."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_saved_as_it_is_is_the_one_it_was_made_from(family: str, tmp_path: Path) -> None:
    hf, model = FAMILIES[family].make_pair()
    before = hf.config.dtype
    assert model.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    weights, expected = reloaded(tmp_path / "new" / "folder").state_dict(), hf.state_dict()
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    saved, config = (m.config.to_dict()["text_config"] for m in (reloaded(tmp_path / "new" / "folder"), hf))
    assert {**saved, "dtype": None} == {**config, "dtype": None} and saved["dtype"] == "float32"
    assert hf.config.dtype == before


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_neurons_scaled_neurons_and_scaled_heads_are_in_the_saved_weights(
    family: str, tmp_path: Path
) -> None:
    _, model = FAMILIES[family].make_pair()
    inputs = FAMILIES[family].mixed_batch(model)
    hooks = [*zero_neurons(NEURONS[:2]), *scale_heads([(1, 2), (0, 1)], [0.0, 2.5])]
    hooks.append(scale("blocks.1.mlp.hook_post", [0], torch.tensor([1.75])))
    expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
    plain = model(inputs)

    fold_neuron_scales(model, NEURONS, [0, 0, 1.75])
    fold_head_scales(model, iter([(1, 2), (0, 1)]), [0, 2.5])
    torch.testing.assert_close(model(inputs), expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    logits = reloaded(tmp_path)(**inputs.to_hf()).logits
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits[real], plain[real], atol=1e-3)
    again = HookedVLM.from_hf(reloaded(tmp_path))
    torch.testing.assert_close(again(inputs), model(inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    config = random_llava.make_config(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    _, model = random_llava.make_pair(config)
    model.embed.weight[5] *= 3
    model.save_pretrained(tmp_path)
    back = reloaded(tmp_path)
    same = back.get_input_embeddings().weight.data_ptr() == back.get_output_embeddings().weight.data_ptr()
    assert same == tied
    inputs = random_llava.mixed_batch(model)
    real = inputs.attention_mask.bool()
    logits = back(**inputs.to_hf()).logits
    torch.testing.assert_close(logits[real], model(inputs)[real], atol=2e-5, rtol=1e-4)


def test_an_unembedding_that_was_edited_alone_is_saved_beside_the_embedding(tmp_path: Path) -> None:
    config = random_llava.make_config(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    _, model = random_llava.make_pair(config)
    before = model.embed.weight.clone()
    model.unembed.linear.weight = torch.nn.Parameter(2 * before, requires_grad=False)
    model.save_pretrained(tmp_path)
    assert config.tie_word_embeddings, "the model's own config is left as it was"
    back = reloaded(tmp_path)
    assert torch.equal(back.get_input_embeddings().weight, before)
    assert torch.equal(back.get_output_embeddings().weight, 2 * before)
    inputs = random_llava.mixed_batch(model)
    real = inputs.attention_mask.bool()
    logits = back(**inputs.to_hf()).logits
    torch.testing.assert_close(logits[real], model(inputs)[real], atol=2e-5, rtol=1e-4)


def test_another_dtype_is_saved_as_it_is(tmp_path: Path) -> None:
    _, model = random_llava.make_pair()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    back = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}


def test_a_shipped_model_with_processor_and_generation_config(tmp_path: Path) -> None:
    model = HookedVLM.from_pretrained("tiny-llava")
    fold_neuron_scales(model, [(0, 0)], 0)
    model.hf_source.generation_config.repetition_penalty = 1.25  # what the config alone does not tell
    model.save_pretrained(tmp_path)
    source = AutoProcessor.from_pretrained(checkpoint_path("tiny-llava"))
    saved = AutoProcessor.from_pretrained(tmp_path)
    assert saved.chat_template == source.chat_template
    assert saved.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    assert saved.image_processor.to_dict() == source.image_processor.to_dict()
    before = AutoModelForImageTextToText.from_pretrained(checkpoint_path("tiny-llava")).generation_config
    assert reloaded(tmp_path).generation_config.to_dict() == {**before.to_dict(), "repetition_penalty": 1.25}
    assert not HookedVLM.from_pretrained(str(tmp_path)).W_out[0, 0].any()


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    _, model = random_llava.make_pair()
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="holds something already"):
            model.save_pretrained(place)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_that_no_checkpoint_made_can_t_be_saved(tmp_path: Path) -> None:
    _, model = random_llava.make_pair()
    model.hf_source = None
    with pytest.raises(ValueError, match="was not made from a Hugging Face model"):
        model.save_pretrained(tmp_path)


def test_weights_that_have_no_place_or_are_not_there_are_named(tmp_path: Path) -> None:
    _, model = random_llava.make_pair()
    source = model.hf_source
    name = next(name for name, ours in source.weight_map.items() if ours == "embed.weight")
    source.weight_map["model.nowhere.weight"] = source.weight_map[name]
    with pytest.raises(ValueError, match=r"can't be written back: model\.nowhere\.weight"):
        model.save_pretrained(tmp_path)
    del source.weight_map["model.nowhere.weight"], source.weight_map[name]
    with pytest.raises(ValueError, match=f"can't be written back: {name}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


WRONG = {
    "no neurons to scale": ([], 1.0),
    "a neuron occurs twice": ([(0, 1), (0, 1)], 1.0),
    "neuron L9N1 does not exist": ([(9, 1)], 1.0),
    "3 factors for 2 neurons": ([(0, 1), (0, 2)], [1.0, 2.0, 3.0]),
    "factors of neurons must be finite": ([(0, 1)], float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_neurons_and_factors_are_refused_before_a_weight_changes(message: str) -> None:
    _, model = random_llava.make_pair()
    before = model.W_out.clone()
    with pytest.raises(ValueError, match=message):
        fold_neuron_scales(model, *WRONG[message])
    assert torch.equal(model.W_out, before)
    with pytest.raises(ValueError, match=r"head L0H99 does not exist"):
        fold_head_scales(model, [(0, 0), (0, 99)], 0)
