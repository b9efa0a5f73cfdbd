"""Inputs that are refused, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_llava

from hones_lens import HookedVLM, VLMInputs

N = (random_llava.SIZE // random_llava.PATCH) ** 2


def test_image_tokens_without_pixels(model: HookedVLM, batch: VLMInputs) -> None:
    mapping = batch.to_hf()
    del mapping["pixel_values"]
    with pytest.raises(
        ValueError, match=f"{3 * N} image tokens in input_ids, but pixel_values hold 0 images"
    ):
        model(mapping)


def test_pixels_without_image_tokens(model: HookedVLM, batch: VLMInputs) -> None:
    mapping = {**model.prepare(None, "is it red?").to_hf(), "pixel_values": batch.pixel_values}
    with pytest.raises(ValueError, match=f"0 image tokens .* hold 3 images of {N} tokens, {3 * N} in all"):
        model(mapping)


def test_counts_that_differ(model: HookedVLM, batch: VLMInputs) -> None:
    mapping = {**batch.to_hf(), "pixel_values": batch.pixel_values[:2]}
    with pytest.raises(
        ValueError, match=f"{3 * N} image tokens .* hold 2 images of {N} tokens, {2 * N} in all"
    ):
        model(mapping)
    with pytest.raises(ValueError, match=f"{3 * N} image tokens .* {2 * N} in all"):
        model.generate(mapping)


def test_an_image_spread_over_two_rows(model: HookedVLM, batch: VLMInputs) -> None:
    ids = batch.input_ids.clone()
    place = batch.image_mask[0].nonzero()[0]
    ids[0, place], ids[2, -1] = 9, model.cfg.image_token_id
    with pytest.raises(ValueError, match=f"row 0 has {N - 1} image tokens, not a multiple of {N}"):
        model({**batch.to_hf(), "input_ids": ids})


@pytest.mark.parametrize("shape", [(3, 3, 28, 35), (3, 1, 28, 28), (3, 28, 28)])
def test_pixels_of_another_size(model: HookedVLM, batch: VLMInputs, shape: tuple[int, ...]) -> None:
    mapping = {**batch.to_hf(), "pixel_values": torch.zeros(shape)}
    with pytest.raises(
        ValueError, match=r"pixel_values are \[3, .*; this model reads \[n_images, 3, 28, 28\]"
    ):
        model(mapping)


def test_a_corrupt_image(model: HookedVLM, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(b"this is no picture")
    with pytest.raises(ValueError, match=r"broken\.png' can't be read"):
        model.prepare(file, "is it red?")


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
def test_a_truncated_image(model: HookedVLM, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"cut.{kind}"
    random_llava.make_images(1, size=(200, 200))[0].save(file)
    whole = file.read_bytes()
    for share in (0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"cut\.{kind}' can't be read"):
            model.prepare(file, "is it red?")


def test_a_damaged_image(model: HookedVLM, tmp_path: Path) -> None:
    file = tmp_path / "damaged.png"
    random_llava.make_images(1, size=(200, 200))[0].save(file)
    whole = bytearray(file.read_bytes())
    whole[20_000:20_100] = bytes(100)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"damaged\.png' can't be read"):
        model.prepare(file, "is it red?")


def test_a_missing_image(model: HookedVLM, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist"):
        model.prepare(tmp_path / "nowhere.png", "is it red?")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model.prepare(tmp_path, "is it red?")  # a folder


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(model: HookedVLM, prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.prepare(None, ["is it red?", prompt])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.prepare(None, prompt)


def test_no_prompts(model: HookedVLM) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        model.prepare(None, [])
    with pytest.raises(ValueError, match="no text"):
        model([])


@pytest.mark.wrong_types
@pytest.mark.parametrize("ids", [[1, 9, 10], [[1, 9], [1, 10]], ["is it red?", 9]])
def test_ids_in_a_list(model: HookedVLM, ids: list) -> None:
    for read in (model, model.to_tokens):
        with pytest.raises(
            TypeError, match=r"give text, or ids as a tensor \[batch pos\]: torch\.tensor\(ids\)"
        ):
            read(ids)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer(model: HookedVLM, answer: str) -> None:
    with pytest.raises(ValueError, match="the answer is empty"):
        model.prepare(None, ["is it red?", "is it blue?"], ["no", answer])


def test_lengths_that_differ(model: HookedVLM) -> None:
    one, two = random_llava.make_images(2)
    with pytest.raises(ValueError, match="2 entries of images for 1 prompts"):
        model.prepare([one, two], ["is it red?"])
    with pytest.raises(ValueError, match="1 entries of images for 2 prompts"):
        model.prepare(one, ["is it red?", "is it blue?"])
    with pytest.raises(ValueError, match="3 answers for 2 prompts"):
        model.prepare(None, ["is it red?", "is it blue?"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        model.prepare(None, ["is it red?", "is it blue?"], "no")


def test_a_prompt_longer_than_the_context(model: HookedVLM) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has \d{3,} tokens, more than the context of 512"):
        model.prepare(None, ["is it red?", "is it red? " * 200])


def test_a_prompt_and_answer_longer_than_the_context(model: HookedVLM) -> None:
    room = 512 - model.prepare(None, "is it red?").input_ids.shape[1]
    assert model.prepare(None, "is it red?", " ".join(["red"] * room)).input_ids.shape[1] == 512
    with pytest.raises(ValueError, match="has 513 tokens, more than the context of 512"):
        model.prepare(None, "is it red?", " ".join(["red"] * (room + 1)))


def test_a_prompt_with_an_image_token_in_it(model: HookedVLM) -> None:
    for pictures in (random_llava.make_images(1)[0], None):
        with pytest.raises(ValueError, match="'what is an <image>\\?' already holds '<image>': prepare adds"):
            model.prepare(pictures, "what is an <image>?")


@pytest.mark.parametrize("n", [0, -1])
def test_no_new_tokens(model: HookedVLM, batch: VLMInputs, n: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1, not {n}"):
        model.generate(batch, max_new_tokens=n)


def test_generation_behind_padding(model: HookedVLM) -> None:
    text = model.prepare(None, ["is it red?", "what color is the large circle?"])
    n = int(text.attention_mask[0].sum())
    rolled = {name: value.clone() for name, value in text.to_hf().items()}
    for value in rolled.values():
        value[0] = value[0].roll(n)
    assert rolled["attention_mask"][0, -1] == 0
    with pytest.raises(ValueError, match="row 0 is padded on the right; pad on the left to generate"):
        model.generate(rolled)
    with torch.no_grad():  # a forward pass may be padded on either side
        torch.testing.assert_close(model(rolled)[0, :n], model(text)[0, -n:], atol=5e-5, rtol=0)


def test_generation_with_broken_weights_names_the_row() -> None:
    hf, model = random_llava.make_pair()
    inputs = random_llava.mixed_batch(model)
    rows = [set(row.tolist()) for row in inputs.input_ids]
    only_in_row_1 = min(rows[1] - rows[0] - rows[2])
    with torch.no_grad():
        hf.get_input_embeddings().weight[only_in_row_1] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of row 1 are not finite at new token 0"):
        model.generate(inputs)


def test_a_model_without_a_processor_says_so() -> None:
    model = HookedVLM.from_hf(random_llava.make_hf())
    with pytest.raises(ValueError, match=r"no processor: pass one to HookedVLM\.from_hf"):
        model.prepare(random_llava.make_images(1)[0], "is it red?")
    with pytest.raises(ValueError, match="no processor"):
        model.prepare(None, "is it red?")
    with pytest.raises(ValueError, match="no processor"):
        _ = model.tokenizer
    with torch.no_grad():
        assert model(torch.tensor([[1, 9, 10]])).shape == (1, 3, model.cfg.d_vocab)
