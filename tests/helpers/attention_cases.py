"""Models, padded batches and Hugging Face's attentions for the tests of what is read from patterns."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from hones_lens import VLMInputs

FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
HEADS = [(0, 3), (2, 1), (1, 0)]
ROW = 1  # two images


@cache
def twin(made: ModuleType) -> tuple[Twin, VLMInputs, Tensor]:
    """A model, a padded batch, and Hugging Face's attentions [layer batch head query key]."""
    both = Twin(made)
    inputs = made.mixed_batch(both.model)
    return both, inputs, torch.stack(both.attentions(inputs))


def patches(both: Twin, inputs: VLMInputs, row: int, image: int) -> Tensor:
    """Positions of an image's tokens [rows columns], from the ids alone."""
    places = (inputs.input_ids[row] == both.model.cfg.image_token_id).nonzero()[:, 0]
    sizes = [rows * columns for rows, columns in inputs.grids[row]]
    return places.split(sizes)[image].view(inputs.grids[row][image])


def pictures_of(family: ModuleType) -> list[Image.Image]:
    """Those of row 1 of `mixed_batch`."""
    return random_llava.make_images(3)[1:] if family is random_llava else random_qwen.make_images()[1:]
