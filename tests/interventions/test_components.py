"""Heads and neurons by layer and index."""

from __future__ import annotations

import pytest
from helpers import random_llava

from hones_lens.interventions.components import check_component, check_heads


def test_every_component_of_a_model_passes_and_no_other() -> None:
    exist = {(layer, index) for layer in range(3) for index in range(5)}
    for layer in range(-2, 6):
        for index in range(-2, 8):
            if (layer, index) in exist:
                check_component("neuron", layer, index, 3, 5)
            else:
                with pytest.raises(
                    ValueError, match=f"^neuron L{layer}N{index} does not exist: 3 layers of 5 "
                ):
                    check_component("neuron", layer, index, 3, 5)


def test_the_error_names_kind_and_source() -> None:
    with pytest.raises(
        ValueError, match=r"^key-value head L1H2 does not exist: 3 layers of 2 key-value heads, L0H0 to L2H1$"
    ):
        check_component("key-value head", 1, 2, 3, 2)
    with pytest.raises(
        ValueError, match=r"^heads of vqa: head L3H0 does not exist: 3 layers of 2 heads, L0H0 to L2H1$"
    ):
        check_component("head", 3, 0, 3, 2, "heads of vqa")


def test_heads_come_back_as_pairs_or_are_refused() -> None:
    _, model = random_llava.make_pair()
    assert check_heads(model, [(2, 3, 0.5), [0, 1]]) == ((2, 3), (0, 1))
    with pytest.raises(ValueError, match="no heads"):
        check_heads(model, [])
    with pytest.raises(ValueError, match="head L0H4 does not exist: 3 layers of 4 heads"):
        check_heads(model, [(0, 1), (0, 4)])
