"""The models and the batch that the tests of inputs share."""

from __future__ import annotations

import pytest
from helpers import random_llava

from hones_lens import HookedVLM, VLMInputs

STRATEGIES = ("default", "full")


@pytest.fixture(scope="module", params=STRATEGIES)
def either(request: pytest.FixtureRequest) -> HookedVLM:
    """A model without, and one with, the class token among its image tokens."""
    return random_llava.make_pair(random_llava.make_config(vision_feature_select_strategy=request.param))[1]


@pytest.fixture(scope="module")
def pair():
    return random_llava.make_pair()


@pytest.fixture(scope="module")
def model(pair) -> HookedVLM:
    return pair[1]


@pytest.fixture
def batch(model: HookedVLM) -> VLMInputs:
    return random_llava.mixed_batch(model, ["red", "two large circles", "no"])
