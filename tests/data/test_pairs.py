"""Counterfactual pairs differ in one fact, as the pixels show, and the answers are right on both sides."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.picture_reader import Picture, Seen, answer_from_picture, look

from hones_lens.data.pairs import CounterfactualPair, counterfactual_pairs
from hones_lens.data.shapes import KINDS, SPLITS
from hones_lens.tasks.registry import load_task

FACTS_OF_KIND = {kind: {kind} for kind in KINDS} | {"count": {"count", "color"}, "name": {"shape"}}
ATTRIBUTES = ("shape", "color", "size", "where")


def differing_facts(a: Picture, b: Picture) -> list[str]:
    """Names of all facts in which two pictures differ."""
    facts = [] if a.background == b.background else ["background"]
    facts += [] if a.text_row == b.text_row else ["text"]
    facts += [] if a.word == b.word else ["word"]
    gone, new = sorted(a.things - b.things), sorted(b.things - a.things)
    if len(gone) != len(new):
        return facts + ["count"] * (len(gone) + len(new))
    for before, after in zip(gone, new, strict=True):
        facts += [f for f in Seen._fields if getattr(before, f) != getattr(after, f)]
    return ["where" if fact in ("row", "column") else fact for fact in facts]


def prompts(pair: CounterfactualPair, task: str) -> tuple[list[str], list[str]]:
    return load_task(task).prompts(pair.clean), load_task(task).prompts(pair.corrupted)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        *(("vqa", kind) for kind in KINDS),
        ("ocr", "word"),
        *(("caption", fact) for fact in ATTRIBUTES),
        *(("retrieval", fact) for fact in ATTRIBUTES),
    ],
)
def test_pictures_differ_in_exactly_the_named_fact_and_prompts_in_nothing(task, kind):
    facts = set()
    for pair in counterfactual_pairs(task, kind, limit=16, seed=5):
        clean, corrupted = look(pair.clean.image), look(pair.corrupted.image)
        assert differing_facts(clean, corrupted) == [pair.fact]
        assert prompts(pair, task)[0] == prompts(pair, task)[1]
        assert len(prompts(pair, task)[0]) == 1
        assert pair.answers[0] != pair.answers[1]
        assert pair.clean.kind == pair.corrupted.kind == kind
        facts.add(pair.fact)
    assert facts == (FACTS_OF_KIND[kind] if task == "vqa" else {kind})


@pytest.mark.parametrize("kind", KINDS)
def test_vqa_answers_are_what_either_picture_shows(kind):
    for pair in counterfactual_pairs("vqa", kind, split="test", limit=12):
        for example, answer in zip((pair.clean, pair.corrupted), pair.answers, strict=True):
            assert example.answers == (answer,)
            assert answer == answer_from_picture(example.question, look(example.image))
            assert kind != "name" or re.fullmatch(r"what is the \w+ one called\?", example.question)


def test_counts_change_by_adding_removing_and_recoloring():
    changes = set()
    for pair in counterfactual_pairs("vqa", "count", limit=40):
        change = len(look(pair.corrupted.image).things) - len(look(pair.clean.image).things)
        changes.add((pair.fact, change))
    assert changes == {("count", 1), ("count", -1), ("color", 0)}


def test_a_changed_word_is_the_only_change_of_pixels():
    for pair in counterfactual_pairs("ocr", limit=12):
        before, after = (np.asarray(e.image).astype(int) for e in (pair.clean, pair.corrupted))
        box = (before == (30, 60, 255)).all(-1)
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert ((after == (30, 60, 255)).all(-1) == box).all()
        changed = np.argwhere((before != after).any(-1))
        assert (changed >= [rows[0], columns[0]]).all() and (changed <= [rows[-1], columns[-1]]).all()
        assert pair.answers == (look(pair.clean.image).word, look(pair.corrupted.image).word)
        assert len(pair.answers[0]) == len(pair.answers[1])


def test_a_moved_thing_keeps_its_row_or_its_column():
    for pair in counterfactual_pairs("caption", "where", limit=24):
        clean, corrupted = look(pair.clean.image).things, look(pair.corrupted.image).things
        ((before,), (after,)) = clean - corrupted, corrupted - clean
        assert (before.row == after.row) != (before.column == after.column)


def test_retrieval_asks_for_the_caption_of_the_clean_picture():
    task = load_task("retrieval")
    for pair in counterfactual_pairs("retrieval", limit=8):
        assert pair.clean.candidates == pair.corrupted.candidates
        assert pair.answers == ("Yes", "No")
        assert pair.clean.candidates[0] in pair.clean.facts["scene"].captions
        assert pair.clean.candidates[0] not in pair.corrupted.facts["scene"].captions
        assert task.target(pair.clean) == "Yes"
        with pytest.raises(ValueError, match=r"corrupted' has no candidate at its positive index -1"):
            task.target(pair.corrupted)


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption"])
def test_answers_are_right_and_wrong_by_the_metric(task):
    metric = load_task(task)
    for pair in counterfactual_pairs(task, limit=14):
        right, wrong = pair.answers
        assert metric.score(right, pair.clean) == metric.score(wrong, pair.corrupted) == 1
        assert metric.score(wrong, pair.clean) < 1 and metric.score(right, pair.corrupted) < 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["vqa", "ocr"])
def test_both_pictures_are_of_the_split(task, split):
    for pair in counterfactual_pairs(task, split=split, limit=14):
        assert pair.clean.facts["scene"].split == pair.corrupted.facts["scene"].split == split


@pytest.mark.parametrize(
    ("task", "kinds"),
    [("vqa", KINDS), ("ocr", ("word",)), ("caption", ATTRIBUTES), ("retrieval", ATTRIBUTES)],
)
def test_kinds_come_in_turn_and_a_smaller_limit_gives_a_prefix(task, kinds):
    many = counterfactual_pairs(task, limit=15, seed=1)
    assert [p.clean.kind for p in many] == [kinds[i % len(kinds)] for i in range(15)]
    few = counterfactual_pairs(task, limit=6, seed=1)
    assert [pair_fields(p) for p in few] == [pair_fields(p) for p in many[:6]]
    assert len({e.id for p in many for e in (p.clean, p.corrupted)}) == 30
    other = counterfactual_pairs(task, limit=6, seed=2)
    assert all(pair_fields(a) != pair_fields(b) for a, b in zip(few, other, strict=True))


def pair_fields(pair: CounterfactualPair) -> tuple[object, ...]:
    return (
        pair.fact,
        pair.answers,
        *(
            (e.id, e.image_source, e.question, e.answers, e.text, e.references, e.candidates, e.positive)
            for e in (pair.clean, pair.corrupted)
        ),
    )


def test_equal_ids_mean_equal_pairs():
    in_turn = {p.clean.id: pair_fields(p) for p in counterfactual_pairs("vqa", limit=70)}
    of_one_kind = {p.clean.id: pair_fields(p) for p in counterfactual_pairs("vqa", "size", limit=70)}
    shared = in_turn.keys() & of_one_kind.keys()
    assert shared and all(in_turn[name] == of_one_kind[name] for name in shared)


def test_bad_arguments_raise_and_list_the_valid_ones():
    with pytest.raises(ValueError, match="for task 'vqaa'; valid: vqa, ocr, caption, retrieval"):
        counterfactual_pairs("vqaa")
    with pytest.raises(ValueError, match="no vqa pairs of kind 'colour'; valid: color, shape, size, count"):
        counterfactual_pairs("vqa", "colour")
    with pytest.raises(ValueError, match="no ocr pairs of kind 'color'; valid: word"):
        counterfactual_pairs("ocr", "color")
    with pytest.raises(ValueError, match="valid: train, discovery, dev, test"):
        counterfactual_pairs(split="val")
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        counterfactual_pairs(limit=0)
