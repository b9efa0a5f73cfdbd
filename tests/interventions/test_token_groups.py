"""Token groups: boxes against cells counted by hand, masks, names, and what is refused."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import pytest
import torch
from helpers import random_llava, random_qwen
from hypothesis import given, strategies as st

from hones_lens import HookedVLM, VLMInputs
from hones_lens.interventions.token_groups import Box, group_name, named_groups, token_mask

FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])


@cache
def model_of(made: ModuleType) -> HookedVLM:
    return made.make_pair(seed=2)[1]


@cache
def batch(made: ModuleType) -> VLMInputs:
    """Rows of one picture and of two, of different lengths; Qwen's pictures have different grids."""
    images = random_llava.make_images(3) if made is random_llava else random_qwen.make_images()
    return model_of(made).prepare([images[0], images[1:]], list(random_llava.QUESTIONS[:2]))


@FAMILIES
def test_groups_by_name_are_those_of_the_inputs(made: ModuleType) -> None:
    inputs = batch(made)
    for name, mask in inputs.token_groups.items():
        assert torch.equal(token_mask(inputs, name), mask)
    assert torch.equal(token_mask(inputs, "all"), inputs.attention_mask == 1)
    assert int(token_mask(inputs, "all").sum()) < inputs.input_ids.numel(), "nothing is padded"


@FAMILIES
@given(data=st.data())
def test_a_box_is_the_cells_that_share_area_with_it(made: ModuleType, data: st.DataObject) -> None:
    """Counted cell by cell, with fine points inside the box; on either image of a row."""
    inputs = batch(made)[1]
    image = data.draw(st.integers(0, 1))
    left, top, right, bottom = inputs.regions[0][image]
    x = sorted(data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2, unique=True)))
    y = sorted(data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2, unique=True)))
    wide, tall = (right - left) / 40, (bottom - top) / 40
    sides = (left + x[0] * wide, top + y[0] * tall, left + x[1] * wide, top + y[1] * tall)
    rows, columns = inputs.grids[0][image]
    steps = [(i + 0.5) / 40 for i in range(40)]  # midpoints of the finest parts of the picture
    inside = [
        (int(v * rows), int(u * columns))
        for u in steps for v in steps
        if x[0] <= u * 40 < x[1] and y[0] <= v * 40 < y[1]
    ]  # fmt: skip
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    for cell in inside:
        expected[cell] = True
    mask = token_mask(inputs, Box(*sides, image=image))
    sizes = [r * c for r, c in inputs.grids[0]]
    by_image = mask[0][inputs.image_mask[0]].split(sizes)
    # Points are finer than cells but for the cells' edges, which do not fall between the same points.
    missed = expected.flatten() & ~by_image[image]
    assert not bool(missed.any()) and not bool(by_image[1 - image].any())
    extra = (by_image[image] & ~expected.flatten()).view(rows, columns).nonzero().tolist()
    for row, column in extra:  # cells of which less than a point is covered
        covered_x = min(x[1] / 40, (column + 1) / columns) - max(x[0] / 40, column / columns)
        covered_y = min(y[1] / 40, (row + 1) / rows) - max(y[0] / 40, row / rows)
        assert covered_x > 0 and covered_y > 0 and min(covered_x, covered_y) < 1 / 40
    if not bool(by_image[image].all()):
        rest = token_mask(inputs, Box(*sides, image=image, outside=True))
        assert torch.equal(rest[0][inputs.image_mask[0]].split(sizes)[image], ~by_image[image])
        assert not bool((rest & mask).any())


def test_edges_count_for_one_cell_and_the_crop_is_left_out() -> None:
    """LLaVA's processor crops 40 × 31 pictures in the middle: the grid begins at 4.44 and ends at 35.56."""
    inputs = batch(random_llava)[0]
    left, _, right, bottom = inputs.regions[0][0]
    cell, n = (right - left) / 4, 4

    def columns(box: Box) -> list[int]:
        cells = token_mask(inputs, box)[0][inputs.image_mask[0]].view(n, n)
        return cells.any(0).nonzero()[:, 0].tolist()

    assert columns(Box(left, 0, left + cell, bottom)) == [0]
    assert columns(Box(left, 0, left + cell + 1e-3, bottom)) == [0, 1]
    assert columns(Box(0, 0, left + 0.1, bottom)) == [0]
    assert columns(Box(-9, -9, 99, 99)) == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"box 0,0 – 4,31 is outside of what the model sees of the image of row 0"
    ):
        token_mask(inputs, Box(0, 0, 4, 31))


def test_masks_and_names() -> None:
    inputs = batch(random_llava)
    mine = inputs.token_groups["question"]
    boxes = [Box(5, 5, 9, 9), Box(5, 5, 9, 9, outside=True)]
    actual = named_groups(inputs, ["image", *boxes, mine])
    assert list(actual) == ["image", "box 5,5 – 9,9", "outside box 5,5 – 9,9", "mask"]
    assert torch.equal(actual["mask"], mine)
    assert list(named_groups(inputs, {"mine": mine, "last": "last"})) == ["mine", "last"]
    assert group_name("last") == "last"


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("answer", "unknown token group 'answer'; valid: all, image, text, last, question, a Box or a mask"),
        (Box(5, 5, 5, 9), "box 5,5 – 5,9 has no area"),
        (Box(5, 5, 9, 9, image=1), "row 0 has 1 images; there is no image 1"),
        (Box(50, 5, 60, 9), "box 50,5 – 60,9 is outside"),
        (Box(-9, -9, 99, 99, outside=True), "is empty in row 0"),
        (torch.ones(2, 3, dtype=torch.bool), "give booleans"),
    ],
)
def test_what_is_refused(group: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        token_mask(batch(random_llava), group)


def test_groups_that_are_refused_together() -> None:
    inputs = batch(random_llava)
    with pytest.raises(ValueError, match="no token groups"):
        named_groups(inputs, [])
    with pytest.raises(ValueError, match="two token groups have one name"):
        named_groups(inputs, ["last", "last"])
    with pytest.raises(ValueError, match="give booleans"):
        token_mask(inputs, torch.ones_like(inputs.input_ids))
    half = torch.zeros_like(inputs.image_mask)
    half[0] = True
    with pytest.raises(ValueError, match="token group 'mask' is empty in row 1"):
        token_mask(inputs, half)
    text = model_of(random_llava).prepare(
        [None, random_llava.make_images(1)[0]], list(random_llava.QUESTIONS[:2])
    )
    with pytest.raises(ValueError, match="token group 'image' is empty in row 0"):
        token_mask(text, "image")


def test_boxes_need_to_know_where_pictures_lie() -> None:
    inputs = batch(random_llava)
    bare = model_of(random_llava).as_inputs(inputs.to_hf())
    with pytest.raises(ValueError, match=r"make them with model\.prepare"):
        token_mask(bare, Box(5, 5, 9, 9))
    assert torch.equal(token_mask(bare, "image"), inputs.image_mask)
