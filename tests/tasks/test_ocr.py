from __future__ import annotations

import pytest

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks.ocr import TASK

BLANK = Scene((), "ACE", 0, 2, 0, 110)


def test_prompt_and_target():
    example = Example("ocr/3", BLANK, text="RMF")
    expected = "Transcribe the text inside the blue box.\nOutput text only."
    assert TASK.prompt(example) == TASK.target_prompt(example) == expected
    assert TASK.prompts(example) == [expected]
    assert TASK.target(example) == "RMF"


def test_score_ignores_case_and_white_space_and_cuts_off_at_one_half():
    example = Example("ocr/3", BLANK, text="RMFZ")
    said = [" rmfz\n", "RMF", "RM", "R", "RMFZ is the text"]
    assert [TASK.score(s, example) for s in said] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert TASK.aggregate(said, [example] * 5) == pytest.approx(2.25 / 5)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_raises_with_the_id(text):
    example = Example("ocr/3", BLANK, text=text)
    for read in (TASK.target, lambda e: TASK.score("A", e), lambda e: TASK.statistics("A", e)):
        with pytest.raises(ValueError, match="'ocr/3' has an empty text"):
            read(example)
