from __future__ import annotations

import math

import numpy as np
import pytest

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks.retrieval import TASK

BLANK = Scene((), "ACE", 0, 2, 0, 110)


def example(candidates: tuple[str, ...] = ("a cat", "a dog", "a bus"), positive: int = 1) -> Example:
    return Example("flickr/4", BLANK, candidates=candidates, positive=positive)


def test_prompts():
    first = "Candidate: a cat\nDoes the candidate correctly describe the image?\nAnswer exactly Yes or No."
    prompts = TASK.prompts(example())
    assert prompts == [first, first.replace("a cat", "a dog"), first.replace("a cat", "a bus")]
    assert TASK.prompts(example(positive=-1)) == prompts
    assert TASK.target_prompt(example()) == prompts[1]
    assert TASK.target(example()) == "Yes"


def test_score_is_the_discounted_place_of_the_positive():
    assert TASK.score([0.0, 2.0, 1.0], example()) == 1.0
    assert TASK.score(np.array([3.0, 2.0, 1.0], dtype=np.float32), example()) == 1 / math.log2(3)
    assert TASK.score([2.0, 2.0, 2.0], example()) == 0.5
    margins = [[0.0, 2.0, 1.0], [2.0, 2.0, 2.0]]
    assert TASK.aggregate(margins, [example()] * 2) == 0.75


@pytest.mark.parametrize("margins", [[1.0, 2.0], [1.0] * 4, np.ones((1, 3)), []])
def test_margins_must_match_the_candidates(margins):
    with pytest.raises(ValueError, match="'flickr/4' has 3 candidates, but margins of shape"):
        TASK.score(margins, example())


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_margin_raises_with_the_id(place):
    margins = [0.0, 0.0, 0.0]
    margins[place] = math.nan
    with pytest.raises(ValueError, match=rf"'flickr/4' has a margin that is NaN \(candidate {place}\)"):
        TASK.score(margins, example())


def test_missing_candidates_raise_with_the_id():
    for read in (TASK.prompts, TASK.target, TASK.target_prompt, lambda e: TASK.score([], e)):
        with pytest.raises(ValueError, match="'flickr/4' has no candidates"):
            read(example(()))
    with pytest.raises(ValueError, match="'flickr/4' has an empty candidate"):
        TASK.prompts(example(("a cat", " ")))


@pytest.mark.parametrize("positive", [-1, 3])
def test_a_positive_out_of_range_raises_with_the_id(positive):
    wrong = example(positive=positive)
    for read in (TASK.target, TASK.target_prompt, lambda e: TASK.score([1.0, 2.0, 3.0], e)):
        with pytest.raises(ValueError, match=f"'flickr/4' has no candidate at its positive index {positive}"):
            read(wrong)
