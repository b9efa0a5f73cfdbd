"""What decides numbers changes the identity of a run, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import fresh_pair
from torch import nn

from hones_lens.app.runs.identity import examples_hash, model_identity, weights_hash
from hones_lens.data.loading import load_examples
from hones_lens.model.loading import load_model
from hones_lens.tasks.registry import load_task


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen2.5-vl"])
def model(request):
    return load_model(request.param)


def test_the_same_checkpoint_has_the_same_identity_after_it_was_used(model):
    before = model_identity(model)
    picture = load_examples("shapes", "vqa", "dev", 1)[0].image
    model.generate(model.prepare([picture] * 2, ["what is this?", "red?"]))
    assert model_identity(model) == before == model_identity(load_model(model.cfg.model_name))


def scaled(number):
    return [2 * value for value in number] if isinstance(number, (list, tuple)) else 2 * number


CHANGES = {
    "weights": lambda m: m.blocks[1].mlp.W_out.data[3].neg_(),
    "buffers": lambda m: m.rotary.inv_freq.mul_(1.0001),
    "config": lambda m: setattr(m.hf_source.config, "anything_new", 1),
    "tokenizer": lambda m: m.processor.tokenizer.add_tokens(["xyzzy"]),
    "chat_template": lambda m: setattr(m.processor, "chat_template", "{{ messages }}"),
    "processor": lambda m: setattr(
        m.processor.image_processor, "image_std", scaled(m.processor.image_processor.image_std)
    ),
    "generation_config": lambda m: setattr(m.hf_source.generation_config, "max_new_tokens", 7),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_change_is_seen_in_the_part_that_was_changed(part):
    model = load_model("tiny-llava")
    before = model_identity(model)
    with torch.no_grad():
        CHANGES[part](model)
    after = model_identity(model)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_bounds_of_pictures_change_the_processor():
    first, second = (
        model_identity(load_model("tiny-qwen2.5-vl", **size)) for size in ({}, {"max_pixels": 56 * 56})
    )
    assert {name for name in first if first[name] != second[name]} == {"processor"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_flipped_bit_anywhere_is_another_hash(dtype):
    rows, columns = 50, 211
    layer = nn.Linear(columns, rows, dtype=dtype)
    before, rng = weights_hash(layer), np.random.default_rng(0)
    bits = layer.weight.detach().view(torch.uint8).flatten()
    for place in [0, len(bits) - 1, *rng.integers(0, len(bits), 40)]:
        bits[place] ^= 1
        assert weights_hash(layer) != before, place
        bits[place] ^= 1
    assert weights_hash(layer) == before


@pytest.mark.parametrize("place", [0, 1, 2**24 - 1, 2**24, 2**24 + 1, -1])
def test_parameters_above_two_to_the_24_are_hashed_whole(place):
    layer = nn.Embedding(2**10 + 1, 2**14, dtype=torch.bfloat16, _weight=big_weight())
    flat = layer.weight.data.flatten()
    before = weights_hash(layer)
    kept = flat[place].clone()
    flat[place] = 1.5
    after = weights_hash(layer)
    flat[place] = kept
    assert before != after


_WEIGHT: list[torch.Tensor] = []


def big_weight():
    if not _WEIGHT:
        _WEIGHT.append(torch.zeros(2**10 + 1, 2**14, dtype=torch.bfloat16))
    return _WEIGHT[0]


def test_names_shapes_types_and_order_count():
    def of(**parameters):
        return weights_hash(nn.ParameterDict(parameters))

    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    hashes = [
        of(a=a, b=b),
        of(a=b, b=a),
        of(a=a, c=b),
        of(a=a.reshape(2, 3), b=b),
        of(a=a.reshape(3, 2), b=b),
        of(a=a.view(torch.float16), b=b),
        of(a=torch.cat([a, b])),
    ]
    assert len(set(hashes)) == len(hashes)
    transposed = nn.Parameter(a.reshape(2, 3).T)
    assert of(a=transposed) == of(a=transposed.contiguous())
    assert of(a=torch.tensor(1.0)) != of(a=torch.tensor(2.0))
    assert of(a=torch.zeros(0, 3)) != of(a=torch.zeros(3, 0))


def test_chunks_do_not_change_a_hash(monkeypatch):
    layer = nn.Linear(37, 11)
    whole = weights_hash(layer)
    for size in (1, 5, 64, 200):
        monkeypatch.setattr("hones_lens.app.runs.identity._CHUNK", size)
        assert weights_hash(layer) == whole


class Same:
    def __init__(self, image):
        self.image = image

    def load(self):
        return self.image


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_every_field_of_an_example_and_its_picture_count(task):
    example = load_examples("shapes", task, "dev", 1)[0]
    example = replace(
        example, references=example.references or ("one", "two"), candidates=("a", "b"), positive=0
    )
    picture, known = example.image, load_task(task)
    dotted = picture.copy()
    dotted.putpixel((3, 2), (1, 2, 3))
    n_pixels = picture.width * picture.height
    reshaped = picture.resize((n_pixels, 1))
    reshaped.frombytes(picture.tobytes())
    changes = [
        {"id": "other"},
        {"question": "other?"},
        {"answers": ("other",)},
        {"answers": (*example.answers, "one more")},
        {"text": "OTHER"},
        {"references": example.references[::-1]},
        {"references": (*example.references, "one more")},
        {"candidates": ("b", "a")},
        {"positive": 1},
        {"kind": "other"},
        {"image_source": Same(dotted)},
        {"image_source": Same(reshaped)},
    ]
    hashes = [examples_hash(known, [replace(example, **change)]) for change in ({}, *changes)]
    assert len(set(hashes)) == len(hashes)
    assert examples_hash(known, [replace(example, image_source=Same(picture.copy()))]) == hashes[0]


def test_a_model_made_in_memory_has_an_identity():
    first, second = (model_identity(fresh_pair(seed)[1]) for seed in (0, 1))
    assert {name for name in first if first[name] != second[name]} == {"weights"}
