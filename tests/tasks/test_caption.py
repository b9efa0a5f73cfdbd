from __future__ import annotations

import pytest
import sacrebleu

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks.caption import TASK

BLANK = Scene((), "ACE", 0, 2, 0, 110)
REFERENCES = (
    "A man sits on a bench with a laptop.",
    "Man using a laptop on an urban bench ",
    "A person on a bench.",
)


def example(references: tuple[str, ...] = REFERENCES) -> Example:
    return Example("coco/9", BLANK, references=references)


def test_prompt():
    expected = "Describe the image in one sentence."
    assert TASK.prompt(example()) == TASK.target_prompt(example()) == expected
    assert TASK.prompts(example()) == [expected]


def test_the_target_joins_up_to_five_references():
    assert TASK.target(example(("a cat ", "two cats"))) == "a cat two cats"
    assert TASK.target(example(tuple("abcdefg"))) == "a b c d e"


def test_score_is_sentence_bleu_and_aggregate_corpus_bleu():
    said = ["A man on a bench with a dog.", "A person sits on a laptop."]
    examples = [example(), example(REFERENCES[:2])]
    for text, each in zip(said, examples, strict=True):
        expected = sacrebleu.sentence_bleu(text, [r.strip() for r in each.references]).score / 100
        assert TASK.score(text, each) == pytest.approx(expected)
    streams = [[REFERENCES[0]] * 2, [REFERENCES[1]] * 2, [REFERENCES[2], None]]
    expected = sacrebleu.corpus_bleu(said, streams).score / 100
    assert TASK.aggregate(said, examples) == pytest.approx(expected)
    assert TASK.aggregate(said, examples) != pytest.approx(
        sum(TASK.score(t, e) for t, e in zip(said, examples, strict=True)) / 2
    )


@pytest.mark.parametrize(
    ("references", "message"), [((), "no references"), (("a cat", " "), "an empty reference")]
)
def test_missing_references_raise_with_the_id(references, message):
    for read in (TASK.target, lambda e: TASK.score("a", e), lambda e: TASK.statistics("a", e)):
        with pytest.raises(ValueError, match=f"'coco/9' has {message}"):
            read(example(references))
