"""Patching of some heads or layers: the values of the full one, restricted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import hones_lens as hl


@cache
def pairs() -> tuple[hl.HookedVLM, hl.PatchPairs]:
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    return model, hl.counterfactual(model, hl.counterfactual_pairs("vqa", limit=2), "vqa")


@cache
def patched(**limits: Any) -> hl.Labelled:
    return hl.patch_activations(*pairs(), "z", "all", progress=False, draws=0, **limits)


def test_heads_and_layers_are_the_full_patching_restricted() -> None:
    full = patched().values
    some = patched(heads="L2H1,0.3,L1H7")
    assert some.labels["head"] == ("L2.1", "L0.3", "L1.7")
    assert torch.allclose(some.values, torch.stack([full[2, 1], full[0, 3], full[1, 7]]), atol=5e-5)
    both = patched(heads=((2, 1),), layers="1-3")
    assert torch.allclose(both.values, full[2, 1][None], atol=5e-5)
    assert torch.allclose(patched(layers="1-2").values, full[1:3], atol=5e-5)
    assert patched(layers=range(1, 3)).labels["layer"] == (1, 2)
    estimated = hl.attribute_patching(*pairs(), "z", progress=False, draws=0)
    two = hl.attribute_patching(*pairs(), "z", layers="2-3", progress=False, draws=0)
    assert torch.allclose(two.values, estimated.values[2:], atol=5e-5)


@pytest.mark.parametrize(
    ("what", "limits", "message"),
    [
        ("z", {"heads": "L9H0"}, "layer 9 is not in 0 … 3"),
        ("z", {"heads": "L0H9"}, "head 9 is not in 0 … 7"),
        ("z", {"heads": "L0H1", "units": "each"}, "give one"),
        ("z", {"heads": "L0H1", "layers": "2-3"}, "L0H1 is not in the layers 2-3"),
        ("resid_pre", {"heads": "L0H1"}, "resid_pre has no heads"),
        ("z", {"layers": "2-9"}, "layer 4 is not in 0 … 3"),
    ],
    ids=str,
)
def test_limits_that_are_not_there(what: str, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hl.patch_activations(*pairs(), what, "all", progress=False, **limits)
