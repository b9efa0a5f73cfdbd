"""VLMInputs: their masks, rows and way to Hugging Face and back."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava
from helpers.random_llava import rows_equal
from hypothesis import given, strategies as st
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs
from hones_lens.model import ImageLayout


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
        torch.testing.assert_close(model(taken), model(batch)[chosen], atol=5e-5, rtol=0)
    for name in ("input_ids", "question_mask", "answer_mask", "attention_mask"):
        assert torch.equal(getattr(taken, name), getattr(batch, name)[chosen])
    assert torch.equal(taken.image_mask, batch.image_mask[chosen])


def test_a_row_of_text_alone_holds_no_pixels(batch: VLMInputs) -> None:
    alone = batch[2]
    assert alone.pixel_values is None and alone.grids == ((),)
    assert alone[0].grids == ((),)


def test_rows_of_text_alone(model: HookedVLM) -> None:
    text = model.prepare(None, list(random_llava.QUESTIONS))
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
    actual = [] if taken.pixel_values is None else taken.pixel_values[:, 0, 0, 0].tolist()
    assert actual == expected


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
        torch.testing.assert_close(before, model(batch), atol=5e-5, rtol=0)
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
    with pytest.raises(ValueError, match="'output_attentions' is not handled; handled: input_ids"):
        VLMInputs.from_hf({**batch.to_hf(), "output_attentions": torch.zeros(1)})
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
                torch.testing.assert_close(model(encoded[rows]), expected[rows], atol=5e-5, rtol=0)
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
        layouts=((ImageLayout(leading=1),), (), (ImageLayout(leading=1),) * 2),
        image_embeds=torch.arange(10.0)[:, None],
    )
    assert inputs[[2, 0]].image_embeds.flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert inputs[0].image_embeds.flatten().tolist() == [0, 1, 2]
    assert inputs[1].image_embeds is None


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_continuation_is_what_prepare_appends(model: HookedVLM, n_images: int) -> None:
    for answer in ("red", "two large circles", "ACE"):
        inputs = model.prepare([random_llava.make_images(n_images)], ["is it red?"], [answer])
        appended = inputs.input_ids[0][inputs.answer_mask[0]].tolist()
        assert model.continuation("is it red?", answer, n_images) == appended
