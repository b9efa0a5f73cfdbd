"""Counterfactual pairs of the shapes world: one picture twice, with one fact changed.

Activation patching needs them: the prompt is the same on both pictures, every token and every other
pixel stays where it was, and the right answers differ, so what a patch carries over is that one fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hones_lens.data.examples import Example
from hones_lens.data.shapes import (
    ATTRIBUTES,
    KINDS,
    Dice,
    Scene,
    aligned_text_dy,
    changed,
    draw_thing,
    draw_word,
    free_cells,
    questions,
    scenes,
)


@dataclass(frozen=True)
class CounterfactualPair:
    """The same prompt on two pictures that differ in one fact, with different right answers.

    Attributes:
        clean: The example.
        corrupted: The same prompt on the picture with the fact changed.
        fact: What was changed: `color`, `shape`, `size`, `where` or `count` (of the things), `text`
            (where the boxed word is) or `word`.
        answers: The right answers to the one prompt, on the clean and on the corrupted picture.
    """

    clean: Example
    corrupted: Example
    fact: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class _Change:
    """A changed scene, with the fields of either example and the right answers."""

    scene: Scene
    fact: str
    clean: dict[str, Any]
    corrupted: dict[str, Any]
    answers: tuple[str, str]


_DECIDING_FACTS = {
    "color": ("color",),
    "shape": ("shape",),
    "size": ("size",),
    "count": ("count", "color"),
    "where": ("where",),
    "text": ("text",),
    "name": ("shape",),
}


def _edits(dice: Dice, scene: Scene, fact: str) -> list[Scene]:
    """Scenes that differ from this one in one fact, of which there may be none."""
    if fact == "word":
        word = scene.word
        while word == scene.word:
            word = draw_word(dice, scene.split, len(word))
        return [replace(scene, word=word)]
    if fact == "text":
        taken = {scene.text_row, *(t.row for t in scene.things)}
        height = scene.size[1]
        jitter = scene.text_dy - aligned_text_dy(scene.text_row, height)
        free = [row for row in range(3) if row not in taken]
        return [replace(scene, text_row=row, text_dy=aligned_text_dy(row, height) + jitter) for row in free]
    if fact == "count" and len(scene.things) == 1:
        cell = dice.pick(free_cells(scene))
        return [replace(scene, things=(*scene.things, draw_thing(dice, cell, scene.things)))]
    if fact == "count":
        return [replace(scene, things=(thing,)) for thing in scene.things]
    others = changed(scene, (fact,))
    return [o for o in others if _moves_straight(scene, o)] if fact == "where" else others


def _moves_straight(scene: Scene, other: Scene) -> bool:
    """Whether the one thing that moved kept its row or its column."""
    pairs = zip(scene.things, other.things, strict=True)
    return all(a.row == b.row or a.col == b.col for a, b in pairs)


def _vqa(dice: Dice, scene: Scene, kind: str) -> _Change | None:
    before = {q.text: q.answer for q in questions(scene)}
    by_fact: dict[str, list[_Change]] = {}
    for fact in _DECIDING_FACTS[kind]:
        for other in _edits(dice, scene, fact):
            for text, answer in ((q.text, q.answer) for q in questions(other) if q.kind == kind):
                if before.get(text, answer) != answer:
                    clean = {"question": text, "answers": (before[text],)}
                    corrupted = {"question": text, "answers": (answer,)}
                    change = _Change(other, fact, clean, corrupted, (before[text], answer))
                    by_fact.setdefault(fact, []).append(change)
    return dice.pick(by_fact[dice.pick(list(by_fact))]) if by_fact else None


def _ocr(dice: Dice, scene: Scene, kind: str) -> _Change | None:
    other = dice.pick(_edits(dice, scene, kind))
    return _Change(other, kind, {"text": scene.word}, {"text": other.word}, (scene.word, other.word))


def _caption(dice: Dice, scene: Scene, kind: str) -> _Change | None:
    other = dice.pick(_edits(dice, scene, kind))
    before, after = scene.captions, other.captions
    return _Change(other, kind, {"references": before}, {"references": after}, (before[0], after[0]))


def _retrieval(dice: Dice, scene: Scene, kind: str) -> _Change | None:
    other = dice.pick(_edits(dice, scene, kind))
    candidates = (scene.captions[0],)
    clean = {"candidates": candidates, "positive": 0}
    return _Change(other, kind, clean, {"candidates": candidates, "positive": -1}, ("Yes", "No"))


# By task: how a scene is changed, and the valid kinds.
_TASKS: dict[str, tuple[Callable[[Dice, Scene, str], _Change | None], tuple[str, ...]]] = {
    "vqa": (_vqa, KINDS),
    "ocr": (_ocr, ("word",)),
    "caption": (_caption, ATTRIBUTES),
    "retrieval": (_retrieval, ATTRIBUTES),
}


def counterfactual_pairs(
    task: str = "vqa",
    kind: str | None = None,
    split: str = "dev",
    limit: int = 64,
    seed: int = 3407,
) -> list[CounterfactualPair]:
    """Draw pairs of pictures that differ in exactly one fact, which decides the answer.

    Both pictures are of the same split. A changed word keeps its length; a moved thing keeps its row
    or its column; moved text goes to a row without things. What is called by a name is asked as
    "what is the <color> one called?", with the shape changed. Counts change because a thing comes,
    goes or is recolored.

    A retrieval pair has one candidate, the caption of the clean picture: its answer is Yes on the
    clean and No on the corrupted picture, where `positive` is -1 for "none of the candidates".

    Args:
        task: `vqa`, `ocr`, `caption` or `retrieval`.
        kind: VQA: one of the seven kinds of question. OCR: `word`. Caption and retrieval: the
            attribute to change. None takes the kinds in turn.
        split: Split of the shapes world.
        limit: How many pairs, each of another scene. A smaller limit gives a prefix.
        seed: Which scenes; those of `load` with this seed, less those that a kind can't use.

    Raises:
        ValueError: An unknown task, kind or split, or a limit below 1.
    """
    if task not in _TASKS:
        raise ValueError(f"no counterfactual pairs for task {task!r}; valid: {', '.join(_TASKS)}")
    change_scene, valid = _TASKS[task]
    if kind is not None and kind not in valid:
        raise ValueError(f"no {task} pairs of kind {kind!r}; valid: {', '.join(valid)}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    kinds = (kind,) if kind else valid
    out: list[CounterfactualPair] = []
    for k, scene in enumerate(scenes(split, seed)):
        wanted = kinds[len(out) % len(kinds)]
        change = change_scene(Dice("pair", seed, split, task, wanted, k), scene, wanted)
        if change is not None:
            out.append(_pair(f"shapes/pairs/{task}/{wanted}/{split}/{seed}/{k}", scene, change, wanted))
        if len(out) == limit:
            break
    return out


def _pair(name: str, scene: Scene, change: _Change, kind: str) -> CounterfactualPair:
    clean = Example(f"{name}/clean", scene, kind=kind, facts={"scene": scene}, **change.clean)
    facts = {"scene": change.scene}
    corrupted = Example(f"{name}/corrupted", change.scene, kind=kind, facts=facts, **change.corrupted)
    return CounterfactualPair(clean, corrupted, change.fact, change.answers)
