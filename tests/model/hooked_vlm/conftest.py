"""The models that the tests of hooks share."""

from __future__ import annotations

import pytest
from helpers.hooked_pairs import QWEN_SHAPES, SHAPES, Pair

from hones_lens import HookedVLM, VLMInputs


@pytest.fixture(scope="module", params=[*SHAPES, *QWEN_SHAPES])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module", params=SHAPES)
def llava(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def gqa() -> Pair:
    return Pair("gqa")


@pytest.fixture
def model(gqa: Pair) -> HookedVLM:
    return gqa.model


@pytest.fixture
def inputs(gqa: Pair) -> VLMInputs:
    return gqa.inputs
