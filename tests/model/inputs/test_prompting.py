"""From pictures and prompts to VLMInputs, their masks and grids."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.random_llava import rows_equal
from PIL import Image

from hones_lens import HookedVLM, VLMInputs
from hones_lens.model import prompting

N = (random_llava.SIZE // random_llava.PATCH) ** 2


# -- prepare -------------------------------------------------------------------------------------


def test_image_tokens_lie_where_the_prompt_has_its_images(either: HookedVLM) -> None:
    inputs = random_llava.mixed_batch(either)
    per_image = N + int(either.cfg.vision.keep_class_token)
    assert inputs.image_mask.sum(-1).tolist() == [per_image, 2 * per_image, 0]
    assert torch.equal(inputs.image_mask, inputs.input_ids == either.cfg.image_token_id)
    assert inputs.grids == (((4, 4),), ((4, 4), (4, 4)), ())
    text = either.tokenizer.decode(inputs.input_ids[1], skip_special_tokens=False)
    images = "<image>" * per_image
    assert text.endswith(f"USER: {images}\n{images}\n{random_llava.QUESTIONS[1]} ASSISTANT:")


def test_batch_is_padded_on_the_left(batch: VLMInputs, model: HookedVLM) -> None:
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - n) + [1] * n
        assert (ids[: len(ids) - n] == model.cfg.pad_token_id).all()
        assert ids[len(ids) - n] == model.tokenizer.bos_token_id


PROMPTS = [
    *random_llava.QUESTIONS,
    "A",
    "a",
    ":",
    "USER",
    "ASSISTANT",
    "ASSISTANT:",
    "the the the",
    "what? what?",
    "  is it red?  ",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_question_mask_marks_the_users_words(model: HookedVLM, prompt: str) -> None:
    for images in (None, random_llava.make_images(2)):
        inputs = model.prepare(images, prompt)
        marked = inputs.question_mask[0].nonzero().flatten()
        ids = inputs.input_ids[0]
        assert prompt.strip() in model.tokenizer.decode(ids[marked])
        for less in (marked[1:], marked[:-1]):
            assert prompt.strip() not in model.tokenizer.decode(ids[less]), "more is marked than was asked"
        assert marked.tolist() == list(range(int(marked[0]), int(marked[-1]) + 1))
        assert model.tokenizer.decode(ids[int(marked[-1]) + 1 :]).strip() == "ASSISTANT:"


def test_answer_mask_marks_the_answer(model: HookedVLM) -> None:
    answers = ["red", "two large circles", "no"]
    inputs = random_llava.mixed_batch(model, answers)
    bare = random_llava.mixed_batch(model)
    for row, answer in enumerate(answers):
        said = inputs.input_ids[row][inputs.answer_mask[row]]
        assert model.tokenizer.decode(said).strip() == answer
        assert inputs.answer_mask[row, -1] and len(said) == inputs.answer_mask[row].sum()
        whole = inputs.input_ids[row][inputs.attention_mask[row].bool()]
        prompt = bare.input_ids[row][bare.attention_mask[row].bool()]
        assert torch.equal(whole, torch.cat((prompt, said)))
        # As if the tokenizer had seen prompt and answer in one piece.
        text = model.tokenizer.decode(prompt, skip_special_tokens=False).removeprefix("<s>").strip()
        together = model.tokenizer(f"{text} {answer}").input_ids
        assert together == whole.tolist()


def test_answers_of_a_single_prompt(model: HookedVLM) -> None:
    one = model.prepare(random_llava.make_images(1)[0], "is it red?", "no")
    listed = model.prepare(random_llava.make_images(1), ["is it red?"], ["no"])
    rows_equal(one, listed)
    rows_equal(one, model.prepare(random_llava.make_images(1)[0], ["is it red?"], ["no"]))
    assert model.prepare(None, "is it red?").answer_mask is None


def test_log_probs_are_hugging_faces(pair, batch: VLMInputs) -> None:
    hf, model = pair
    with torch.no_grad():
        logits = hf(**batch.to_hf()).logits.log_softmax(-1)
    expected = []
    for row in range(3):
        places = batch.answer_mask[row].nonzero().flatten().tolist()
        expected.append(sum(logits[row, p - 1, batch.input_ids[row, p]] for p in places))
    torch.testing.assert_close(model.log_probs(batch), torch.stack(expected), atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="inputs mark no answer"):
        model.log_probs(random_llava.mixed_batch(model))


def test_pictures_may_be_paths(model: HookedVLM, tmp_path: Path) -> None:
    picture = random_llava.make_images(1)[0]
    file = tmp_path / "picture.png"
    picture.save(file)
    expected = model.prepare(picture, "is it red?")
    for given_as in (file, str(file), [file], picture.convert("RGBA")):
        rows_equal(model.prepare(given_as, "is it red?"), expected)


def test_grey_and_palette_pictures_are_read_as_rgb(model: HookedVLM) -> None:
    for mode in ("L", "P", "1", "RGBA", "CMYK"):
        inputs = model.prepare(random_llava.make_images(1)[0].convert(mode), "is it red?")
        assert inputs.pixel_values.shape == (1, 3, random_llava.SIZE, random_llava.SIZE)


def test_bare_texts_are_padded_and_the_padding_ignored(model: HookedVLM) -> None:
    texts = ["is it red?", "what color is the large circle on the left?"]
    with torch.no_grad():
        together = model(texts)
        for row, text in enumerate(texts):
            alone = model(text)[0]
            assert torch.equal(model.to_tokens(text)[0], torch.tensor(model.tokenizer(text).input_ids))
            assert (together[row, -len(alone) :] - alone).abs().max() <= 5e-5
        assert torch.equal(model(tuple(texts)), together)


# -- the patch grid ------------------------------------------------------------------------------


def bright(row: int, column: int) -> Image.Image:
    """A black picture with one white patch."""
    pixels = np.zeros((random_llava.SIZE, random_llava.SIZE, 3), dtype=np.uint8)
    p = random_llava.PATCH
    pixels[row * p : (row + 1) * p, column * p : (column + 1) * p] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (1, 2), (3, 1)])
def test_heatmap_shows_where_the_picture_differs(either: HookedVLM, place: tuple[int, int]) -> None:
    """Before any attention, only the token of the patch that changed changes."""
    black = Image.new("RGB", (random_llava.SIZE, random_llava.SIZE))
    shown = either.prepare(
        [[black, bright(*place)], bright(*place)], ["which one?", "a much longer question?"]
    )
    blank = either.prepare([[black, black], black], ["which one?", "a much longer question?"])
    # Without blocks the projector sees one patch a token: what enters at the features is local.
    embeds = [
        either.run_with_cache(inputs, names_filter="vision_encoder.hook_embed")[1][
            "vision_encoder.hook_embed"
        ]
        for inputs in (shown, blank)
    ]
    change = (embeds[0] - embeds[1]).norm(dim=-1)  # [image token], class token first
    tokens = change if either.cfg.vision.keep_class_token else change[:, 1:]
    by_position = torch.full(shown.input_ids.shape, -1.0)
    by_position[shown.image_mask] = tokens.flatten()
    for row, image, number, differs in [(0, 0, 0, False), (0, 1, 1, True), (1, 0, 2, True)]:
        for values in (tokens[number], by_position[row]):
            heat = shown.heatmap(values, row, image)
            assert heat.shape == (4, 4)
            assert (heat.nonzero().tolist() == [list(place)]) is differs


def test_the_decoder_reads_patches_in_raster_order() -> None:
    """With feature layer 0 the projector maps each patch alone, up to the decoder's input."""
    model = random_llava.make_pair(random_llava.make_config(vision_feature_layer=0))[1]
    black = Image.new("RGB", (random_llava.SIZE, random_llava.SIZE))
    for place in [(0, 1), (2, 0), (3, 3)]:
        inputs = model.prepare([bright(*place)], ["which one?"])
        with torch.no_grad():
            change = model(inputs, stop_at_layer=0) - model(
                model.prepare([black], ["which one?"]), stop_at_layer=0
            )
        heat = inputs.heatmap(change[0].norm(dim=-1))
        assert heat.nonzero().tolist() == [list(place)]


def test_heatmap_is_detached_and_refuses_what_does_not_fit(model: HookedVLM, batch: VLMInputs) -> None:
    values = torch.arange(float(N), requires_grad=True)
    heat = batch.heatmap(values, row=1, image=1)
    assert not heat.requires_grad
    assert heat.flatten().tolist() == list(range(N))
    n = batch.input_ids.shape[1]
    with pytest.raises(ValueError, match=rf"\(5,\) values fit neither the {n} positions nor the {N} tokens"):
        batch.heatmap(torch.zeros(5))
    with pytest.raises(IndexError, match="row 0 has 1 images; there is no image 1"):
        batch.heatmap(values, row=0, image=1)
    with pytest.raises(IndexError, match="row 2 has 0 images"):
        batch.heatmap(values, row=2)
    with pytest.raises(IndexError, match="row 3"):
        batch.heatmap(values, row=3)


def test_a_picture_of_many_tokens_warns_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = random_qwen.make_pair(random_qwen.make_config(), 0)
    picture = Image.new("RGB", (112, 112), "red")
    tokens = int(model.prepare(picture, "Look.").image_mask.sum())
    for most, warned in ((tokens, 0), (tokens - 1, 1)):
        monkeypatch.setattr(prompting, "MOST_IMAGE_TOKENS", most)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.prepare([picture, None], ["Look.", "Hello."])
        assert len(caught) == warned
    assert f"a picture becomes {tokens} tokens, more than {tokens - 1}: max_pixels=" in str(caught[0].message)
