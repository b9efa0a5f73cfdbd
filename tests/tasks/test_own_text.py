"""A text of the user in the form of a task."""

from __future__ import annotations

import pytest

import hones_lens as hl
from hones_lens.tasks.own_text import own_prompt, takes_text


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_it_is_the_prompt_of_an_example_with_that_text(task: str) -> None:
    asked, example = hl.load_task(task), hl.load_examples("shapes", task, "dev", 1)[0]
    text = example.question if task == "vqa" else example.candidates[example.positive]
    assert takes_text(asked)
    assert own_prompt(asked, text) == asked.target_prompt(example)
    assert own_prompt(asked, own_prompt(asked, text)) == own_prompt(asked, text), "wrapped once"
    for nothing in (None, " "):
        with pytest.raises(ValueError, match="needs a text of your own"):
            own_prompt(asked, nothing)


@pytest.mark.parametrize("task", ["ocr", "caption"])
def test_a_prompt_that_is_always_the_same_takes_no_text(task: str) -> None:
    asked, example = hl.load_task(task), hl.load_examples("shapes", task, "dev", 1)[0]
    assert not takes_text(asked)
    assert own_prompt(asked, None) == asked.prompt(example) == own_prompt(asked, asked.prompt(example))
    with pytest.raises(ValueError, match="has no place for 'what is it"):
        own_prompt(asked, "what is it?")


def test_half_of_the_form_is_a_text_like_any_other() -> None:
    asked = hl.load_task("vqa")
    wrapped = own_prompt(asked, "Question: what is it?")
    assert wrapped == "Question: Question: what is it?\nAnswer the question with a short phrase."
