"""Corruptions against pictures that are corrupted before the processor sees them, and naive formulas."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from PIL import Image
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs
from hones_lens.interventions.corruptions import (
    Corruption,
    blank,
    blur,
    gaussian_noise,
    mean_image_token,
    patch_shuffle,
    region,
    token_swap,
)
from hones_lens.interventions.token_groups import Box

FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])


@cache
def model_of(made: ModuleType) -> HookedVLM:
    return made.make_pair(seed=4)[1]


def pictures(made: ModuleType) -> list[Image.Image]:
    """Three, which nothing resizes or crops: what is painted on them arrives as it is."""
    sizes = [(28, 28)] * 3 if made is random_llava else [(42, 28), (28, 56), (70, 28)]
    return [random_llava.make_images(1, i, size)[0] for i, size in enumerate(sizes)]


def batch(made: ModuleType) -> VLMInputs:
    """One picture, two in a row, text alone: rows of different lengths."""
    one, two, three = pictures(made)
    return model_of(made).prepare([one, [two, three], None], list(random_llava.QUESTIONS))


def embeds(made: ModuleType, inputs: VLMInputs) -> list[Tensor]:
    """Of each image, [token d_model]."""
    model = model_of(made)
    with torch.no_grad():
        actual = model.with_image_embeds(inputs).image_embeds
    assert actual is not None
    sizes = [rows * columns for row in inputs.grids for rows, columns in row]
    return list(actual.flatten(0, -2).split(sizes))


# -- pixels ------------------------------------------------------------------------------------------


@FAMILIES
def test_pictures_are_what_the_processor_made_of_them(made: ModuleType) -> None:
    """Unpacked they are the pictures, normalised by hand; packed again, the same values to the bit."""
    model, inputs = model_of(made), batch(made)
    images = model.processor.image_processor
    mean, std = (np.array(x)[:, None, None] for x in (images.image_mean, images.image_std))
    for actual, picture in zip(model.pictures(inputs), pictures(made), strict=True):
        expected = (np.asarray(picture).transpose(2, 0, 1) / 255 - mean) / std
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)
    again = model.with_pictures(inputs, model.pictures(inputs))
    assert torch.equal(again.pixel_values, inputs.pixel_values)


@FAMILIES
@pytest.mark.parametrize("color", [(255, 0, 37), "white"])
def test_blank_is_a_painted_picture(made: ModuleType, color: str | tuple[int, int, int]) -> None:
    one, two, three = (Image.new("RGB", picture.size, color) for picture in pictures(made))
    model = model_of(made)
    painted = model.prepare([one, [two, three], None], list(random_llava.QUESTIONS))
    actual = blank(color)(model, batch(made))
    assert torch.allclose(actual.pixel_values, painted.pixel_values, atol=1e-5)
    for name in ("input_ids", "attention_mask", "image_mask"):
        assert torch.equal(getattr(actual, name), getattr(painted, name))
    assert actual.grids == painted.grids
    with torch.no_grad():
        assert (model(actual) - model(painted))[painted.attention_mask.bool()].abs().max() <= 5e-5


@FAMILIES
def test_blank_in_a_box_is_a_picture_with_a_painted_box(made: ModuleType) -> None:
    """On the second picture of its row, and all around it."""
    one, two, three = pictures(made)
    model = model_of(made)
    box, corners = Box(3, 5, 20, 17, image=1), (3, 5, 20, 17)
    in_box = three.copy()
    in_box.paste((0, 200, 9), corners)
    around = Image.new("RGB", three.size, (0, 200, 9))
    around.paste(three.crop(corners), corners[:2])
    inputs = model.prepare([[one, three], [two, three]], list(random_llava.QUESTIONS[:2]))
    outside = Box(3, 5, 20, 17, image=1, outside=True)
    for where, picture in ((box, in_box), (outside, around)):
        expected = model.prepare([[one, picture], [two, picture]], list(random_llava.QUESTIONS[:2]))
        actual = region(blank((0, 200, 9)), where)(model, inputs)
        assert torch.allclose(actual.pixel_values, expected.pixel_values, atol=1e-5)


def blurred_by_hand(picture: np.ndarray, radius: float) -> np.ndarray:
    """[height width channel]: every pixel a sum over all others, edges continued outwards."""
    out, reach = np.zeros(picture.shape), int(4 * radius + 0.5)
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / (2 * radius**2))
    weights /= weights.sum()
    height, width, _ = picture.shape
    for y, x in np.ndindex(height, width):
        near_y, near_x = np.clip(y + steps, 0, height - 1), np.clip(x + steps, 0, width - 1)
        out[y, x] = (picture[np.ix_(near_y, near_x)] * weights[..., None]).sum((0, 1))
    return out


@FAMILIES
@pytest.mark.parametrize("radius", [0.8, 3.0])
def test_blur_is_a_gaussian_sum_over_the_raw_pixels(made: ModuleType, radius: float) -> None:
    model = model_of(made)
    images = model.processor.image_processor
    for actual, picture in zip(model.pictures(blur(radius)(model, batch(made))), pictures(made), strict=True):
        expected = blurred_by_hand(np.asarray(picture, dtype=float), radius) / 255
        expected = (expected - np.array(images.image_mean)) / np.array(images.image_std)
        np.testing.assert_allclose(actual.numpy(), expected.transpose(2, 0, 1), atol=1e-4)


@FAMILIES
def test_patch_shuffle_moves_whole_squares(made: ModuleType) -> None:
    model, inputs = model_of(made), batch(made)
    side = model.cfg.vision.patch_size * model.cfg.vision.merge_size
    before, after = model.pictures(inputs), model.pictures(patch_shuffle(1)(model, inputs))
    for old, new in zip(before, after, strict=True):
        cells = [
            [x[:, i : i + side, j : j + side].flatten() for i in range(0, x.shape[1], side)
             for j in range(0, x.shape[2], side)]
            for x in (old, new)
        ]  # fmt: skip
        came_from = [[k for k, cell in enumerate(cells[0]) if torch.equal(cell, moved)] for moved in cells[1]]
        assert sorted(k for (k,) in came_from) == list(range(len(cells[0]))), "a square is lost or made"
        assert [k for (k,) in came_from] != list(range(len(cells[0]))), "nothing moved"
    other = model.pictures(patch_shuffle(2)(model, inputs))
    assert not all(torch.equal(a, b) for a, b in zip(after, other, strict=True))


# -- embeddings --------------------------------------------------------------------------------------


@FAMILIES
def test_noise_is_normal_in_units_of_each_images_own_deviation(made: ModuleType) -> None:
    model = model_of(made)
    images = random_llava.make_images(6, 2, (28, 28) if made is random_llava else (84, 84))
    inputs = model.prepare([[image] for image in images], ["what color is it?"] * 6)
    clean = torch.stack(embeds(made, inputs))
    noise = torch.stack(embeds(made, gaussian_noise(2.5, seed=7)(model, inputs))) - clean
    per_image = clean.flatten(1).std(1)
    assert per_image.max() > 1.02 * per_image.min(), "the images have one deviation"
    standard = noise / (2.5 * per_image[:, None, None])
    n = standard.numel()
    assert abs(float(standard.mean())) < 4 / n**0.5 and abs(float(standard.std()) - 1) < 4 / (2 * n) ** 0.5
    of_each = torch.corrcoef(standard.flatten(1)).fill_diagonal_(0)
    assert of_each.abs().max() < 5 / standard[0].numel() ** 0.5, "images share their noise"
    again = torch.stack(embeds(made, gaussian_noise(2.5, seed=8)(model, inputs))) - clean
    assert not torch.allclose(again, noise)
    half = torch.stack(embeds(made, gaussian_noise(1.25, seed=7)(model, inputs))) - clean
    assert torch.allclose(2 * half, noise, atol=1e-4)


@FAMILIES
def test_mean_image_token(made: ModuleType) -> None:
    model, inputs = model_of(made), batch(made)
    for old, new in zip(embeds(made, inputs), embeds(made, mean_image_token()(model, inputs)), strict=True):
        assert torch.allclose(new, old.sum(0, keepdim=True).expand_as(old) / len(old), atol=1e-5)
    given = torch.randn(model.cfg.d_model)
    for new in embeds(made, mean_image_token(given)(model, inputs)):
        assert torch.equal(new, given.expand_as(new))


@FAMILIES
def test_a_box_on_embeddings_is_the_tokens_it_touches(made: ModuleType) -> None:
    """A box in the upper left corner of each row's first picture: its first token."""
    model = model_of(made)
    inputs = batch(made)[[0, 1]]
    box = Box(1, 1, 2, 2)
    before = embeds(made, inputs)
    after = embeds(made, region(mean_image_token(), box)(model, inputs))
    outside = embeds(made, region(mean_image_token(), Box(1, 1, 2, 2, outside=True))(model, inputs))
    assert torch.equal(after[2], before[2]) and torch.equal(outside[2], before[2]), "the other image"
    for i in (0, 1):
        assert torch.equal(after[i][1:], before[i][1:])
        assert torch.allclose(after[i][0], before[i].mean(0), atol=1e-5)
        assert torch.equal(outside[i][0], before[i][0])
        assert torch.allclose(outside[i][1:], before[i].mean(0).expand_as(before[i][1:]), atol=1e-5)


# -- batches -----------------------------------------------------------------------------------------

OF_IMAGES: dict[str, Corruption] = {
    "noise": gaussian_noise(1.0, seed=3),
    "mean": mean_image_token(),
    "blank": blank("red"),
    "blur": blur(2.0),
    "shuffle": patch_shuffle(3),
    "pixels in a box": region(patch_shuffle(3), Box(0, 5, 15, 15)),
    "embeddings in a box": region(gaussian_noise(1.0, seed=3), Box(5, 5, 15, 15)),
}
ON_A_BOX = ("pixels in a box", "embeddings in a box")


@FAMILIES
@pytest.mark.parametrize("name", OF_IMAGES)
def test_rows_are_corrupted_alike_in_any_batch(made: ModuleType, name: str) -> None:
    """In any order, alone, twice, encoded already or not; text and padding stay."""
    model, corrupt = model_of(made), OF_IMAGES[name]
    inputs = batch(made)[[0, 1]] if name in ON_A_BOX else batch(made)
    whole = corrupt(model, inputs)
    assert torch.equal(whole.input_ids, inputs.input_ids) and whole.grids == inputs.grids
    n = len(inputs)
    with torch.no_grad():
        expected = model(whole)[:, -1]
        assert (expected - model(inputs)[:, -1])[:2].abs().amax(-1).min() > 1e-3, "a row is not corrupted"
        for order in (list(range(n))[::-1], [1], [0, 1, 0]):
            actual = model(corrupt(model, inputs[order]))[:, -1]
            assert (actual - expected[order]).abs().max() <= 5e-5
        encoded = model(corrupt(model, model.with_image_embeds(inputs)))[:, -1]
        assert (encoded - expected).abs().max() <= 5e-5
    if n == 3:
        assert (expected - model(inputs)[:, -1])[2].abs().max() <= 5e-5, "text alone has nothing to corrupt"


def test_a_corruption_says_what_it_is() -> None:
    assert str(blur(3)) == "pictures blurred with a radius of 3"
    assert str(region(blank("red"), Box(1, 2, 3, 4))) == "pictures painted red, in box 1,2 – 3,4"
    assert str(token_swap("red", "blue")) == "'red' swapped for 'blue'"


# -- text --------------------------------------------------------------------------------------------


@FAMILIES
def test_token_swap_is_the_prompt_with_the_words_swapped(made: ModuleType) -> None:
    model, (one, two, three) = model_of(made), pictures(made)
    prompts = [
        "is the circle red?",
        "what is left of the red circle, a red square or a blue one?",
        "is it blue?",
    ]
    swapped = [
        "is the circle blue?", "what is left of the blue circle, a blue square or a red one?", "is it red?"
    ]  # fmt: skip
    images = [one, [two, three], None]
    actual = token_swap({"red": "blue", "blue": "red"})(model, model.prepare(images, prompts))
    expected = model.prepare(images, swapped)
    assert torch.equal(actual.input_ids, expected.input_ids)
    assert torch.equal(actual.pixel_values, expected.pixel_values)
    alone = token_swap("red", "blue")(model, model.prepare(None, prompts[0]))
    assert torch.equal(alone.input_ids, model.prepare(None, swapped[0]).input_ids)


def test_token_swap_takes_whole_words_of_the_question_alone() -> None:
    """Words that are spelled letter by letter, one within another; the chat's own words stay."""
    model = model_of(random_llava)
    for prompt, old, new, expected in (
        ("is zog near zoggy?", "zog", "zop", "is zop near zoggy?"),
        ("xzog, zog", "zog", "zop", "xzog, zop"),
        ("zog\nzog (zog)", "zog", "zop", "zop\nzop (zop)"),
    ):
        actual = token_swap(old, new)(model, model.prepare(None, prompt))
        assert torch.equal(actual.input_ids, model.prepare(None, expected).input_ids)
    with pytest.raises(ValueError, match="row 0 has none of the words 'USER:'"):
        token_swap("USER:", "ASSISTANT:")(model, model.prepare(None, "is it red?"))


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gaussian_noise(0), "sigma must be above 0"),
        (lambda: blur(-1), "radius must be above 0"),
        (lambda: blank((300, 0, 0)), "is not a colour"),
        (lambda: blank("no such colour"), "'no such colour' is not a colour"),
        (lambda: token_swap("red"), "an old and a new word, or a table"),
        (lambda: token_swap({"red": "blue"}, "green"), "an old and a new word, or a table"),
        (lambda: token_swap({}), "no words to swap"),
        (lambda: token_swap("red", "red"), "no words to swap"),
    ],
)
def test_refused_when_made(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("corruption", "says"),
    [
        (token_swap("green", "blue"), "row 0 has none of the words 'green'"),
        (token_swap("color", "zzz"), "'color' and 'zzz' are 1 and 3 tokens: a swap needs words of equal"),
        (region(blank(), Box(0, 0, 20, 20, image=1)), "row 0 has 1 images; there is no image 1"),
        (region(blank(), Box(50, 0, 60, 9)), "box 50,0 – 60,9 is outside of what the model sees"),
        (region(token_swap("color", "shape"), Box(0, 0, 9, 9)), "changes text, and a box lies on a picture"),
    ],
)
def test_refused_when_run(corruption: Corruption, says: str) -> None:
    model = model_of(random_llava)
    inputs = model.prepare(pictures(random_llava)[0], "what color is it?")
    with pytest.raises(ValueError, match=says):
        corruption(model, inputs)


@pytest.mark.parametrize(
    "corruption", [gaussian_noise(), mean_image_token(), blank(), blur(), patch_shuffle()]
)
def test_text_alone_has_no_images_to_corrupt(corruption: Corruption) -> None:
    model = model_of(random_llava)
    with pytest.raises(ValueError, match="no images to corrupt"):
        corruption(model, model.prepare(None, "what color is it?"))


def test_colours_need_a_processor_and_shuffles_two_tokens() -> None:
    model = HookedVLM.from_hf(random_llava.make_hf(seed=4))
    inputs = batch(random_llava)
    with pytest.raises(ValueError, match="no processor"):
        blank()(model, inputs)
    one_token = random_llava.make_pair(random_llava.make_config(vision={"image_size": 8, "patch_size": 8}))[1]
    with pytest.raises(ValueError, match="one token has no patches to shuffle"):
        patch_shuffle()(one_token, one_token.prepare(random_llava.make_images(1)[0], "is it red?"))
