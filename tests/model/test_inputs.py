"""From pictures and prompts to VLMInputs, their masks, grids and rows; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs

N = (tiny.SIZE // tiny.PATCH) ** 2
STRATEGIES = ("default", "full")


@pytest.fixture(scope="module", params=STRATEGIES)
def either(request: pytest.FixtureRequest) -> HookedVLM:
    """A model without, and one with, the class token among its image tokens."""
    return tiny.make_pair(tiny.make_config(vision_feature_select_strategy=request.param))[1]


@pytest.fixture(scope="module")
def pair():
    return tiny.make_pair()


@pytest.fixture(scope="module")
def model(pair) -> HookedVLM:
    return pair[1]


@pytest.fixture
def batch(model: HookedVLM) -> VLMInputs:
    return tiny.mixed_batch(model, ["red", "two large circles", "no"])


def rows_equal(a: VLMInputs, b: VLMInputs) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


# -- prepare -------------------------------------------------------------------------------------


def test_image_tokens_lie_where_the_prompt_has_its_images(either: HookedVLM) -> None:
    inputs = tiny.mixed_batch(either)
    per_image = N + int(either.cfg.vision.keep_class_token)
    assert inputs.image_mask.sum(-1).tolist() == [per_image, 2 * per_image, 0]
    assert torch.equal(inputs.image_mask, inputs.input_ids == either.cfg.image_token_id)
    assert inputs.grids == (((4, 4),), ((4, 4), (4, 4)), ())
    text = either.tokenizer.decode(inputs.input_ids[1], skip_special_tokens=False)
    images = "<image>" * per_image
    assert text.endswith(f"USER: {images}\n{images}\n{tiny.QUESTIONS[1]} ASSISTANT:")


def test_batch_is_padded_on_the_left(batch: VLMInputs, model: HookedVLM) -> None:
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - n) + [1] * n
        assert (ids[: len(ids) - n] == model.cfg.pad_token_id).all()
        assert ids[len(ids) - n] == model.tokenizer.bos_token_id


PROMPTS = [
    *tiny.QUESTIONS,
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
    for images in (None, tiny.make_images(2)):
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
    inputs = tiny.mixed_batch(model, answers)
    bare = tiny.mixed_batch(model)
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
    one = model.prepare(tiny.make_images(1)[0], "is it red?", "no")
    listed = model.prepare(tiny.make_images(1), ["is it red?"], ["no"])
    rows_equal(one, listed)
    rows_equal(one, model.prepare(tiny.make_images(1)[0], ["is it red?"], ["no"]))
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
        model.log_probs(tiny.mixed_batch(model))


def test_pictures_may_be_paths(model: HookedVLM, tmp_path: Path) -> None:
    picture = tiny.make_images(1)[0]
    file = tmp_path / "picture.png"
    picture.save(file)
    expected = model.prepare(picture, "is it red?")
    for given_as in (file, str(file), [file], picture.convert("RGBA")):
        rows_equal(model.prepare(given_as, "is it red?"), expected)


def test_grey_and_palette_pictures_are_read_as_rgb(model: HookedVLM) -> None:
    for mode in ("L", "P", "1", "RGBA", "CMYK"):
        inputs = model.prepare(tiny.make_images(1)[0].convert(mode), "is it red?")
        assert inputs.pixel_values.shape == (1, 3, tiny.SIZE, tiny.SIZE)


def test_bare_texts_are_padded_and_the_padding_ignored(model: HookedVLM) -> None:
    texts = ["is it red?", "what color is the large circle on the left?"]
    with torch.no_grad():
        together = model(texts)
        for row, text in enumerate(texts):
            alone = model(text)[0]
            assert torch.equal(model.to_tokens(text)[0], torch.tensor(model.tokenizer(text).input_ids))
            assert (together[row, -len(alone) :] - alone).abs().max() <= 2e-5
        assert torch.equal(model(tuple(texts)), together)


# -- the patch grid ------------------------------------------------------------------------------


def bright(row: int, column: int) -> Image.Image:
    """A black picture with one white patch."""
    pixels = np.zeros((tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    p = tiny.PATCH
    pixels[row * p : (row + 1) * p, column * p : (column + 1) * p] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (1, 2), (3, 1)])
def test_heatmap_shows_where_the_picture_differs(either: HookedVLM, place: tuple[int, int]) -> None:
    """Before any attention, only the token of the patch that changed changes."""
    black = Image.new("RGB", (tiny.SIZE, tiny.SIZE))
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
    model = tiny.make_pair(tiny.make_config(vision_feature_layer=0))[1]
    black = Image.new("RGB", (tiny.SIZE, tiny.SIZE))
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


# -- VLMInputs -----------------------------------------------------------------------------------


def test_token_groups(batch: VLMInputs) -> None:
    groups = batch.token_groups
    assert set(groups) == {"image", "text", "last", "question", "answer"}
    tokens = batch.attention_mask.bool()
    assert torch.equal(groups["image"] | groups["text"], tokens)
    assert not (groups["image"] & groups["text"]).any()
    assert torch.equal(groups["image"], batch.input_ids == 4)
    assert groups["last"][:, -1].all() and groups["last"].sum() == 3
    for name in ("question", "answer"):
        assert (groups[name] & ~groups["text"]).sum() == 0
        assert groups[name].any(-1).all()
    assert not (groups["question"] & groups["answer"]).any()
    assert {group.dtype for group in groups.values()} == {torch.bool}


def test_token_groups_without_marks(model: HookedVLM, batch: VLMInputs) -> None:
    seen = model.as_inputs(batch.to_hf())
    assert set(seen.token_groups) == {"image", "text", "last"}


def test_positions_ignore_padding(model: HookedVLM, batch: VLMInputs) -> None:
    positions = model.positions(batch)
    for row in range(3):
        n = int(batch.attention_mask[row].sum())
        assert positions[row, -n:].tolist() == list(range(n))


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (1, [1]),
        (-1, [2]),
        (-3, [0]),
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0], [2, 0]),
        ((1, 1), [1, 1]),
        (torch.tensor([1, 0]), [1, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_rows_with_their_images(model: HookedVLM, batch: VLMInputs, rows, chosen: list[int]) -> None:
    if rows == slice(None, None, -1):
        rows = [2, 1, 0]  # tensors know no negative step
    taken = batch[rows]
    assert len(taken) == taken.batch_size == len(chosen)
    assert taken.grids == tuple(batch.grids[row] for row in chosen)
    with torch.no_grad():
        torch.testing.assert_close(model(taken), model(batch)[chosen], atol=2e-5, rtol=0)
    for name in ("input_ids", "question_mask", "answer_mask", "attention_mask"):
        assert torch.equal(getattr(taken, name), getattr(batch, name)[chosen])
    assert torch.equal(taken.image_mask, batch.image_mask[chosen])


def test_a_row_of_text_alone_holds_no_pixels(batch: VLMInputs) -> None:
    alone = batch[2]
    assert alone.pixel_values is None and alone.grids == ((),)
    assert alone[0].grids == ((),)


def test_rows_of_text_alone(model: HookedVLM) -> None:
    text = model.prepare(None, list(tiny.QUESTIONS))
    assert text[1:].grids == ((), ())
    assert len(text[1:][0]) == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_pixels_follow_their_rows(chosen: list[int]) -> None:
    """Each image is marked by its number; row i of the batch has i images."""
    counts = (1, 2, 0)
    ids = torch.zeros(3, 2, dtype=torch.long)
    pixels = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    grids = tuple(((1, 1),) * count for count in counts)
    inputs = VLMInputs(ids, ids + 1, pixels, image_mask_or_none=ids.bool(), grids=grids)
    taken = inputs[chosen]
    expected = [image for row in chosen for image in {0: [0.0], 1: [1.0, 2.0], 2: []}[row]]
    found = [] if taken.pixel_values is None else taken.pixel_values[:, 0, 0, 0].tolist()
    assert found == expected


@pytest.mark.parametrize("rows", [3, -4, slice(3, None), [], [0, 3], torch.tensor([False, False, False])])
def test_rows_that_are_not_there(batch: VLMInputs, rows) -> None:
    with pytest.raises(IndexError):
        batch[rows]


def test_extended(model: HookedVLM, batch: VLMInputs) -> None:
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    grown = batch.extended(new)
    assert torch.equal(grown.input_ids, torch.cat((batch.input_ids, new), dim=1))
    assert grown.attention_mask[:, -2:].eq(1).all()
    for name in ("image_mask", "question_mask", "answer_mask"):
        mask = getattr(grown, name)
        assert torch.equal(mask[:, :-2], getattr(batch, name)) and not mask[:, -2:].any()
    assert grown.grids == batch.grids and grown.pixel_values is batch.pixel_values
    assert batch.extended(new[:, :0]) is batch
    with torch.no_grad():  # causal: what was there before gives what it gave before
        before = model(grown)[:, : batch.input_ids.shape[1]]
        torch.testing.assert_close(before, model(batch), atol=2e-5, rtol=0)
    assert torch.equal(model.as_inputs(grown).image_mask, grown.image_mask)


def test_to_hf_and_back(model: HookedVLM, batch: VLMInputs) -> None:
    mapping = batch.to_hf()
    assert set(mapping) == {"input_ids", "attention_mask", "pixel_values"}
    bare = VLMInputs.from_hf(mapping)
    with pytest.raises(ValueError, match=r"use model\.as_inputs\(mapping\)"):
        _ = bare.image_mask
    with pytest.raises(ValueError, match=r"use model\.as_inputs\(mapping\)"):
        bare[0]
    seen = model.as_inputs(mapping)
    assert torch.equal(seen.image_mask, batch.image_mask) and seen.grids == batch.grids
    rows_equal(seen, model.as_inputs(bare))
    with torch.no_grad():
        assert torch.equal(model(seen), model(batch))
    text = model.prepare(None, "is it red?")
    assert set(text.to_hf()) == {"input_ids", "attention_mask"}
    assert not VLMInputs.from_hf(text.to_hf()).image_mask.any()


def test_from_hf_takes_no_mask_for_all_tokens(model: HookedVLM) -> None:
    ids = torch.tensor([[1, 9, 10]])
    assert VLMInputs.from_hf({"input_ids": ids}).attention_mask.tolist() == [[1, 1, 1]]


def test_from_hf_refuses_what_it_would_ignore(batch: VLMInputs) -> None:
    with pytest.raises(ValueError, match="'pixel_values_videos': video is not handled; give still images"):
        VLMInputs.from_hf({**batch.to_hf(), "pixel_values_videos": torch.zeros(1)})
    with pytest.raises(ValueError, match="'image_sizes' is not handled; handled: input_ids"):
        VLMInputs.from_hf({**batch.to_hf(), "image_sizes": torch.zeros(1)})
    with pytest.raises(ValueError, match="no 'input_ids'"):
        VLMInputs.from_hf({"attention_mask": torch.ones(1, 2)})


def test_to_changes_the_dtype_of_pixels_alone(batch: VLMInputs) -> None:
    moved = batch.to("meta", torch.float16)
    assert moved.pixel_values.dtype == torch.float16
    for name, value in vars(moved).items():
        if isinstance(value, Tensor):
            assert value.device.type == "meta", name
            if name != "pixel_values":
                assert value.dtype == getattr(batch, name).dtype, name
    assert batch.pixel_values.device.type == "cpu"
    assert torch.equal(batch.to(dtype=torch.float64).pixel_values, batch.pixel_values.double())


def test_printing_is_short_of_masks(batch: VLMInputs) -> None:
    assert "question_mask" not in repr(batch)


def test_images_encoded_once(model: HookedVLM, batch: VLMInputs) -> None:
    with torch.no_grad():
        expected, tokens = model(batch), model.generate(batch, 4, "tokens")
        encoded = model.with_image_embeds(batch)
        assert model.with_image_embeds(encoded) is encoded
        ran = []
        handle = model.vision_encoder.register_forward_hook(lambda *_: ran.append(1))
        try:
            assert torch.equal(model(encoded), expected)
            for use_kv_cache in (True, False):
                assert torch.equal(model.generate(encoded, 4, "tokens", use_kv_cache), tokens)
            for rows in ([1], [2, 1, 0], [2]):
                torch.testing.assert_close(model(encoded[rows]), expected[rows], atol=2e-5, rtol=0)
        finally:
            handle.remove()
    assert not ran, "the vision tower ran again"
    assert encoded[2].image_embeds is None
    text = model.prepare(None, "is it red?")
    assert model.with_image_embeds(text) is text


def test_encoded_images_of_several_sizes_follow_their_rows() -> None:
    """Embeddings without an image axis are cut by the grids, leading tokens included."""
    ids = torch.zeros(3, 2, dtype=torch.long)
    inputs = VLMInputs(
        ids,
        ids + 1,
        pixel_values=torch.zeros(3, 3, 2, 2),
        image_mask_or_none=ids.bool(),
        grids=(((1, 2),), (), ((2, 2), (1, 1))),
        leading_tokens=1,
        image_embeds=torch.arange(10.0)[:, None],
    )
    assert inputs[[2, 0]].image_embeds.flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert inputs[0].image_embeds.flatten().tolist() == [0, 1, 2]
    assert inputs[1].image_embeds is None


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_continuation_is_what_prepare_appends(model: HookedVLM, n_images: int) -> None:
    for answer in ("red", "two large circles", "ACE"):
        inputs = model.prepare([tiny.make_images(n_images)], ["is it red?"], [answer])
        appended = inputs.input_ids[0][inputs.answer_mask[0]].tolist()
        assert model.continuation("is it red?", answer, n_images) == appended


# -- what is refused -----------------------------------------------------------------------------


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
    tiny.make_images(1, size=(200, 200))[0].save(file)
    whole = file.read_bytes()
    for share in (0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"cut\.{kind}' can't be read"):
            model.prepare(file, "is it red?")


def test_a_damaged_image(model: HookedVLM, tmp_path: Path) -> None:
    file = tmp_path / "damaged.png"
    tiny.make_images(1, size=(200, 200))[0].save(file)
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


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer(model: HookedVLM, answer: str) -> None:
    with pytest.raises(ValueError, match="the answer is empty"):
        model.prepare(None, ["is it red?", "is it blue?"], ["no", answer])


def test_lengths_that_differ(model: HookedVLM) -> None:
    one, two = tiny.make_images(2)
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
    with pytest.raises(ValueError, match="2 image tokens '<image>' in the prompt for 1 images"):
        model.prepare(tiny.make_images(1)[0], "what is an <image>?")
    with pytest.raises(ValueError, match="1 image tokens '<image>' in the prompt for 0 images"):
        model.prepare(None, "what is an <image>?")


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
        torch.testing.assert_close(model(rolled)[0, :n], model(text)[0, -n:], atol=2e-5, rtol=0)


def test_generation_with_broken_weights_names_the_row() -> None:
    hf, model = tiny.make_pair()
    inputs = tiny.mixed_batch(model)
    rows = [set(row.tolist()) for row in inputs.input_ids]
    only_in_row_1 = min(rows[1] - rows[0] - rows[2])
    with torch.no_grad():
        hf.get_input_embeddings().weight[only_in_row_1] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of row 1 are not finite at new token 0"):
        model.generate(inputs)


def test_a_model_without_a_processor_says_so() -> None:
    model = HookedVLM.from_hf(tiny.make_hf())
    with pytest.raises(ValueError, match=r"no processor: pass one to HookedVLM\.from_hf"):
        model.prepare(tiny.make_images(1)[0], "is it red?")
    with pytest.raises(ValueError, match="no processor"):
        model.prepare(None, "is it red?")
    with pytest.raises(ValueError, match="no processor"):
        _ = model.tokenizer
    with torch.no_grad():
        assert model(torch.tensor([[1, 9, 10]])).shape == (1, 3, model.cfg.d_vocab)
