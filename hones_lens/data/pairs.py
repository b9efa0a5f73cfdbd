"""Counterfactual pairs of the shapes world: two pictures that differ in one fact.

They are made for activation patching: the prompt and the positions of all tokens are the same on both
pictures, only the pixels of the changed fact differ, and so do the right answers. A patch therefore
transfers that one fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hones_lens.data.examples import Example
from hones_lens.data.shapes import (
    ATTRIBUTES,
    KINDS,
    Scene,
    SeededRandom,
    aligned_text_dy,
    counterfactual_scenes,
    draw_thing,
    draw_word,
    free_cells,
    questions,
    scenes,
)
from hones_lens.model import did_you_mean


@dataclass(frozen=True)
class CounterfactualPair:
    """The same prompt on two pictures that differ in one fact, with different right answers.

    Attributes:
        clean: The original example.
        corrupted: The same prompt on the picture with the fact changed.
        fact: Name of the changed fact: `color`, `shape`, `size`, `where` or `count` (of the things), `text`
            (where the boxed word is) or `word`.
        answers: The right answers to the one prompt, on the clean and on the corrupted picture.
    """

    clean: Example
    corrupted: Example
    fact: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class _SceneChange:
    """A changed scene, with the fields of both examples and the right answers."""

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


def _edits(rng: SeededRandom, scene: Scene, fact: str) -> list[Scene]:
    """Scenes that differ from this one in the given fact; the list may be empty."""
    if fact == "word":
        word = scene.word
        while word == scene.word:
            word = draw_word(rng, scene.split, len(word))
        return [replace(scene, word=word)]
    if fact == "text":
        taken = {scene.text_row, *(t.row for t in scene.things)}
        height = scene.size[1]
        jitter = scene.text_dy - aligned_text_dy(scene.text_row, height)
        free = [row for row in range(3) if row not in taken]
        return [replace(scene, text_row=row, text_dy=aligned_text_dy(row, height) + jitter) for row in free]
    if fact == "count" and len(scene.things) == 1:
        cell = rng.choice(free_cells(scene))
        return [replace(scene, things=(*scene.things, draw_thing(rng, cell, scene.things)))]
    if fact == "count":
        return [replace(scene, things=(thing,)) for thing in scene.things]
    others = counterfactual_scenes(scene, (fact,))
    return [o for o in others if _moves_straight(scene, o)] if fact == "where" else others


def _moves_straight(scene: Scene, other: Scene) -> bool:
    """Whether the thing that moved kept its row or its column."""
    pairs = zip(scene.things, other.things, strict=True)
    return all(a.row == b.row or a.col == b.col for a, b in pairs)


def _vqa(rng: SeededRandom, scene: Scene, kind: str) -> _SceneChange | None:
    before = {q.text: q.answer for q in questions(scene)}
    by_fact: dict[str, list[_SceneChange]] = {}
    for fact in _DECIDING_FACTS[kind]:
        for other in _edits(rng, scene, fact):
            for text, answer in ((q.text, q.answer) for q in questions(other) if q.kind == kind):
                if before.get(text, answer) != answer:
                    clean = {"question": text, "answers": (before[text],)}
                    corrupted = {"question": text, "answers": (answer,)}
                    change = _SceneChange(other, fact, clean, corrupted, (before[text], answer))
                    by_fact.setdefault(fact, []).append(change)
    return rng.choice(by_fact[rng.choice(list(by_fact))]) if by_fact else None


def _ocr(rng: SeededRandom, scene: Scene, kind: str) -> _SceneChange | None:
    other = rng.choice(_edits(rng, scene, kind))
    return _SceneChange(other, kind, {"text": scene.word}, {"text": other.word}, (scene.word, other.word))


def _caption(rng: SeededRandom, scene: Scene, kind: str) -> _SceneChange | None:
    other = rng.choice(_edits(rng, scene, kind))
    before, after = scene.captions, other.captions
    return _SceneChange(other, kind, {"references": before}, {"references": after}, (before[0], after[0]))


def _retrieval(rng: SeededRandom, scene: Scene, kind: str) -> _SceneChange | None:
    other = rng.choice(_edits(rng, scene, kind))
    candidates = (scene.captions[0],)
    clean = {"candidates": candidates, "positive": 0}
    return _SceneChange(other, kind, clean, {"candidates": candidates, "positive": -1}, ("Yes", "No"))


# By task: the function that changes a scene, and the valid kinds.
_TASKS: dict[str, tuple[Callable[[SeededRandom, Scene, str], _SceneChange | None], tuple[str, ...]]] = {
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
    or its column; moved text goes to a row without things. Questions of kind `name` read
    "what is the <color> one called?", with the shape changed. Counts change because a thing is added,
    removed or recolored.

    A retrieval pair has one candidate, the caption of the clean picture: its answer is Yes on the
    clean and No on the corrupted picture, where `positive` is -1 for "none of the candidates".

    Args:
        task: `vqa`, `ocr`, `caption` or `retrieval`.
        kind: VQA: one of the seven kinds of question. OCR: `word`. Caption and retrieval: the
            attribute to change. None takes the kinds in turn.
        split: Split of the shapes world.
        limit: Number of pairs, each of another scene. A smaller limit gives a prefix.
        seed: Seed of the scenes: those of `load` with this seed, without those that a kind can't use.

    Raises:
        ValueError: An unknown task, kind or split, or a limit below 1.
    """
    if task not in _TASKS:
        raise ValueError(
            f"no counterfactual pairs for task {task!r}; valid: {', '.join(_TASKS)}"
            f"{did_you_mean(task, _TASKS)}"
        )
    change_scene, valid = _TASKS[task]
    if kind is not None and kind not in valid:
        raise ValueError(
            f"no {task} pairs of kind {kind!r}; valid: {', '.join(valid)}{did_you_mean(kind, valid)}"
        )
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    kinds = (kind,) if kind else valid
    pairs: list[CounterfactualPair] = []
    for index, scene in enumerate(scenes(split, seed)):
        wanted = kinds[len(pairs) % len(kinds)]
        change = change_scene(SeededRandom("pair", seed, split, task, wanted, index), scene, wanted)
        if change is not None:
            pairs.append(_pair(f"shapes/pairs/{task}/{wanted}/{split}/{seed}/{index}", scene, change, wanted))
        if len(pairs) == limit:
            break
    return pairs


def _pair(name: str, scene: Scene, change: _SceneChange, kind: str) -> CounterfactualPair:
    clean = Example(f"{name}/clean", scene, kind=kind, facts={"scene": scene}, **change.clean)
    facts = {"scene": change.scene}
    corrupted = Example(f"{name}/corrupted", change.scene, kind=kind, facts=facts, **change.corrupted)
    return CounterfactualPair(clean, corrupted, change.fact, change.answers)
