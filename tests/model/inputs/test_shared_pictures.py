"""One picture of many prompts: opened, processed and encoded once."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava, random_qwen
from PIL import Image

from hones_lens import HookedVLM, VLMInputs, engine
from hones_lens.data import Example
from hones_lens.tasks import load_task

PROMPTS = ["is it red?", "is it blue or green?", "how many?", "is it a circle?"]


@pytest.fixture(scope="module", params=[random_llava, random_qwen], ids=["llava", "qwen"])
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return request.param.make_pair(request.param.make_config(), seed=2)[1]


def pictures(n: int) -> list[Image.Image]:
    return [random_llava.make_images(1, seed=i, size=random_qwen.SIZES[i % 3])[0] for i in range(n)]


def test_a_picture_of_several_prompts_is_processed_once(
    model: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against copies of it, which are processed each; rows with other pictures between, and several a row."""
    one, other, third = pictures(3)
    pair = [other, third]
    copies = [[one.copy()], [other.copy(), third.copy()], one.copy(), [other.copy(), third.copy()]]
    expected = model.prepare(copies, PROMPTS)
    asked: list[int] = []
    process = type(model).process_images

    def counted(self: HookedVLM, images: list[Image.Image]) -> object:
        asked.append(len(images))
        return process(self, images)

    monkeypatch.setattr(type(model), "process_images", counted)
    found = model.prepare([one, pair, one, pair], PROMPTS)
    assert asked == [3]  # of 6 places
    assert found.grids == expected.grids and found.regions == expected.regions
    assert found.pixel_values is not None and expected.pixel_values is not None
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert torch.equal(found.input_ids, expected.input_ids)
    with torch.no_grad():
        assert torch.equal(model(found), model(expected))


class Opened:
    """Where a picture comes from, and how often it was asked for."""

    def __init__(self) -> None:
        self.times = 0

    def load(self) -> Image.Image:
        self.times += 1
        return pictures(1)[0]


def test_a_picture_of_many_candidates_is_processed_and_encoded_once(
    model: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = Opened(), list[int]()
    candidates = tuple(f"a picture of {i} circles" for i in range(50))
    example = Example("a", source, candidates=candidates, positive=3)
    process, encode = type(model).process_images, type(model).encode_images

    def processed(self: HookedVLM, images: list[Image.Image]) -> object:
        asked.append(len(images))
        return process(self, images)

    def encoded(self: HookedVLM, inputs: VLMInputs) -> object:
        asked.append(sum(map(len, inputs.grids)))
        return encode(self, inputs)

    monkeypatch.setattr(type(model), "process_images", processed)
    monkeypatch.setattr(type(model), "encode_images", encoded)
    (batch,) = engine.prompt_batches(model, load_task("retrieval"), [example], 8)
    assert len(batch.inputs) == 50 and asked == [1, 1] and source.times == 1
