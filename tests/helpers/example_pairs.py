"""Pairs for patching as a report shows them, made up by hand: no model runs."""

from __future__ import annotations

from typing import Any

import torch

from helpers import example_results as made
from hones_lens.app.report.run_view import PairView
from hones_lens.model.inputs import VLMInputs

N_TEXT = 5


def inputs() -> VLMInputs:
    """Two tokens of text, a picture of 4 × 4 patches, three tokens of text."""
    mask = torch.zeros(1, 16 + N_TEXT, dtype=torch.bool)
    mask[0, 2:18] = True
    return VLMInputs(
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        attention_mask=torch.ones_like(mask, dtype=torch.long),
        image_mask_or_none=mask,
        grids=(((4, 4),),),
        regions=(((0.0, 0.0, 112.0, 112.0),),),
    )


def pair(**changes: Any) -> PairView:
    texts = {"id": "p0", "prompt": "what color?", "answer": "red", "foil": "<s>"}
    return PairView(
        **{**texts, "clean": made.image(), "corrupted": made.image(), "inputs": inputs(), **changes}
    )
