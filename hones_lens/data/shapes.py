"""The shapes world: scenes of coloured shapes and a boxed word, drawn by code from a seed.

A scene has one or two things (shape, colour, size, cell of a 3 x 3 grid) and a word of three or
four letters in a blue box that takes one of the three rows. Every fact of a scene can be asked for,
so one picture serves all four tasks, and a scene with one fact changed is its counterfactual.

Nothing here depends on set order, on a system font or on the order of calls: the same seed gives
the same bytes in every process. The split is a function of the scene's word alone, so splits share
no image whatever the seeds, and words outside `train` are never seen in training.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from hones_lens.data.drawing import COLUMNS, LETTERS, ROWS, Thing, draw_scene
from hones_lens.data.examples import Example

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
NUMBERS = ("zero", "one", "two")
KINDS = ("color", "shape", "size", "count", "where", "text", "name")
ATTRIBUTES = ("shape", "color", "size", "where")
SPLITS = ("train", "discovery", "dev", "test")
DEFAULT_LIMIT = 1000
N_CANDIDATES = 50
SIZE = (112, 112)  # width, height

_NAMES = "dax wug fep zib mip gav lor tuv nid pag kes rof"


def _name_of_each() -> dict[tuple[str, str], str]:
    """A name for each colour and shape: two names for each block of 2 x 2, given crosswise.

    So a red circle and a yellow triangle are both a `dax`, a red triangle and a yellow circle are not:
    neither colours nor shapes speak for a name, only the two together, as in an exclusive or.
    """
    words = _NAMES.split()
    out = {}
    for (c, color), (s, shape) in itertools.product(enumerate(COLORS), enumerate(SHAPES)):
        crosswise = (c // 3 + s // 2) % 2
        out[color, shape] = words[2 * (2 * (c % 3) + s % 2) + crosswise]
    return out


NAMES: dict[tuple[str, str], str] = _name_of_each()

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. Equal scenes draw equal bytes."""

    things: tuple[Thing, ...]
    word: str
    text_row: int
    text_dx: int
    text_dy: int
    background: int
    size: tuple[int, int] = SIZE

    def load(self) -> Image.Image:
        """Draw the scene (RGB, `size` = width and height in pixels)."""
        return draw_scene(self)

    @property
    def id(self) -> str:
        """Twelve hex digits that name this scene."""
        return hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()

    @property
    def split(self) -> str:
        """Which split the scene belongs to: a function of its word."""
        return split_of_word(self.word)

    @property
    def captions(self) -> tuple[str, ...]:
        """True one-sentence descriptions: things in raster order, then in the reverse order."""
        phrases = [t.phrase for t in sorted(self.things, key=lambda t: (t.row, t.col))]
        orders = [phrases] if len(phrases) == 1 else [phrases, phrases[::-1]]
        return tuple(" and ".join(order) for order in orders)


class Question(NamedTuple):
    """One question on a scene, with its kind and its only right answer."""

    kind: str
    text: str
    answer: str


class Dice:
    """Draws that depend on `random.Random.random` alone, whose stream Python guarantees."""

    def __init__(self, *key: object):
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def chance(self, p: float) -> bool:
        return self._random() < p

    def shuffled(self, values: Sequence[T]) -> list[T]:
        rest = list(values)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]


def split_of_word(word: str) -> str:
    """The split of every scene that shows this word: 70 % train, 10 % each of the others."""
    bucket = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % 10
    return SPLITS[max(0, bucket - 6)]


def draw_word(dice: Dice, split: str, length: int | None = None) -> str:
    """Draw a word of a split, of three or four letters where no length is given."""
    while True:
        n = length or dice.between(3, 4)
        word = "".join(dice.pick(LETTERS) for _ in range(n))
        if split_of_word(word) == split:
            return word


def draw_thing(dice: Dice, cell: tuple[int, int], others: Sequence[Thing]) -> Thing:
    """Draw a thing for a cell (row, column), of no colour and shape that another one has together."""
    color, shape = dice.pick(COLORS), dice.pick(SHAPES)
    while (color, shape) in [(t.color, t.shape) for t in others]:
        color, shape = dice.pick(COLORS), dice.pick(SHAPES)
    jitter = [dice.between(-3, 3), dice.between(-3, 3), dice.between(-12, 12)]
    return Thing(shape, color, dice.pick(SIZES), *cell, *jitter)


def aligned_text_dy(row: int, height: int) -> int:
    """Brings letters in a row's middle onto the grid of 14-pixel patches (the letters' tops, nearly)."""
    top = round((row + 0.5) * height / 3) - 7
    return min(6, 14 * round(top / 14) - top)


def random_size(dice: Dice, sides: Sequence[int]) -> tuple[int, int]:
    """Draw a width and a height."""
    return dice.pick(sides), dice.pick(sides)


def random_scene(dice: Dice, split: str, size: tuple[int, int] = SIZE) -> Scene:
    """Draw one scene of a split; `size` is (width, height), each at least 112 pixels."""
    text_row = dice.below(3)
    cells = [(r, c) for r in range(3) if r != text_row for c in range(3)]
    things: list[Thing] = []
    for cell in dice.shuffled(cells)[: 1 if dice.chance(0.3) else 2]:
        things.append(draw_thing(dice, cell, things))
    word = draw_word(dice, split)
    # Each letter lies in one column of 14-pixel patches, and nearly in one row of them.
    text_dx = 8 + 14 * dice.below(size[0] // 14 - 1 - len(word)) + dice.between(-2, 2)
    text_dy = aligned_text_dy(text_row, size[1]) + dice.between(-1, 1)
    return Scene(tuple(things), word, text_row, text_dx, text_dy, dice.between(104, 124), size)


def scenes(split: str, seed: int, sides: Sequence[int] = SIZE[:1]) -> Iterator[Scene]:
    """An endless stream of the scenes of one split; scene k depends on (seed, split, k) only.

    Args:
        split, seed: Which scenes.
        sides: Widths and heights to draw from, in pixels.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the shapes world; valid: {', '.join(SPLITS)}")
    for k in itertools.count():
        size = random_size(Dice("size", seed, split, k), sides)
        yield random_scene(Dice("shapes", seed, split, k), split, size)


def questions(scene: Scene) -> list[Question]:
    """Every question of the seven kinds that has exactly one right answer on this scene."""
    out = [Question("count", "how many shapes are there?", NUMBERS[len(scene.things)])]
    shown = [t.color for t in scene.things]
    for color in COLORS:
        out.append(Question("count", f"how many {color} shapes are there?", NUMBERS[shown.count(color)]))
    where_text = "is the text at the top, in the center or at the bottom?"
    out.append(Question("text", where_text, ROWS[scene.text_row]))
    for t in scene.things:
        one = f"{t.color} {t.shape}"
        place = f"is the {one} on the left, in the middle or on the right?"
        out.append(Question("size", f"is the {one} small or large?", t.size))
        out.append(Question("where", place, COLUMNS[t.col]))
        out.append(Question("name", f"what is the {one} called?", NAMES[t.color, t.shape]))
        if [o.shape for o in scene.things].count(t.shape) == 1:
            out.append(Question("color", f"what color is the {t.shape}?", t.color))
        if shown.count(t.color) == 1:
            out.append(Question("shape", f"what shape is the {t.color} one?", t.shape))
            out.append(Question("name", f"what is the {t.color} one called?", NAMES[t.color, t.shape]))
    return out


def ask(dice: Dice, scene: Scene, kind: str) -> Question:
    """Draw a question of one kind; a colour that is not there is asked for as often as one that is."""
    fitting = [q for q in questions(scene) if q.kind == kind]
    if kind == "count":
        answer = dice.pick(sorted({q.answer for q in fitting}))
        fitting = [q for q in fitting if q.answer == answer]
    return dice.pick(fitting)


def _variants(thing: Thing, free: Sequence[tuple[int, int]]) -> dict[str, list[Thing]]:
    """The thing with one attribute changed, in every way, by attribute."""
    return {
        "shape": [thing._replace(shape=s) for s in SHAPES if s != thing.shape],
        "color": [thing._replace(color=c) for c in COLORS if c != thing.color],
        "size": [thing._replace(size=s) for s in SIZES if s != thing.size],
        "where": [thing._replace(row=r, col=c) for r, c in free],
    }


def free_cells(scene: Scene) -> list[tuple[int, int]]:
    """The cells (row, column) that neither a thing nor the text takes, in raster order."""
    taken = {(t.row, t.col) for t in scene.things}
    cells = [(r, c) for r in range(3) if r != scene.text_row for c in range(3)]
    return [cell for cell in cells if cell not in taken]


def changed(scene: Scene, facts: Sequence[str] = ATTRIBUTES) -> list[Scene]:
    """Every scene that differs from this one in one attribute (of `facts`) of one thing."""
    free = free_cells(scene)
    out = []
    for i, thing in enumerate(scene.things):
        ways = _variants(thing, free)
        for other in (v for fact in facts for v in ways[fact]):
            things = (*scene.things[:i], other, *scene.things[i + 1 :])
            if len({(t.color, t.shape) for t in things}) == len(things):
                out.append(replace(scene, things=things))
    return out


def hard_negatives(dice: Dice, scene: Scene, count: int) -> list[str]:
    """Distinct false captions, each of which changes one or two attributes of the scene."""
    near = dice.shuffled(changed(scene))
    two_away = (other for s in itertools.cycle(near) for other in [dice.pick(changed(s))])
    found: dict[str, None] = {}
    for other in itertools.chain(near[:20], two_away):
        if other.captions[0] not in scene.captions:
            found.setdefault(other.captions[0])
        if len(found) == count:
            break
    return list(found)


def _vqa(dice: Dice, scene: Scene, asked: dict[str, int]) -> dict[str, Any]:
    possible = {q.kind for q in questions(scene)}
    kind = min((k for k in KINDS if k in possible), key=lambda k: asked[k])
    asked[kind] += 1
    question = ask(dice, scene, kind)
    return {"question": question.text, "answers": (question.answer,), "kind": kind}


def _ocr(dice: Dice, scene: Scene, asked: dict[str, int]) -> dict[str, Any]:
    return {"text": scene.word, "kind": f"{len(scene.word)} letters"}


def _caption(dice: Dice, scene: Scene, asked: dict[str, int]) -> dict[str, Any]:
    return {"references": scene.captions, "kind": _how_many(scene)}


def _retrieval(dice: Dice, scene: Scene, asked: dict[str, int]) -> dict[str, Any]:
    negatives = hard_negatives(dice, scene, N_CANDIDATES - 1)
    place = dice.below(N_CANDIDATES)
    candidates = (*negatives[:place], scene.captions[0], *negatives[place:])
    return {"candidates": candidates, "positive": place, "kind": _how_many(scene)}


def _how_many(scene: Scene) -> str:
    return f"{NUMBERS[len(scene.things)]} shape" + "s" * (len(scene.things) > 1)


_FIELDS: dict[str, Callable[[Dice, Scene, dict[str, int]], dict[str, Any]]] = {
    "vqa": _vqa,
    "ocr": _ocr,
    "caption": _caption,
    "retrieval": _retrieval,
}
TASKS = tuple(_FIELDS)


def load(
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
) -> list[Example]:
    """Draw examples of one task.

    Args:
        task: `vqa`, `ocr`, `caption` or `retrieval`. The four tasks of one seed see the same scenes.
        split: `discovery`, `dev` or `test` (or `train`, what the shipped models learned from).
        limit: How many (default 1,000: the world has no end). A smaller limit gives a prefix.
        seed: Which scenes. VQA takes the seven kinds of question in turn.
        data_file, image_dir: Not for this data set, which is drawn and not read.

    Raises:
        ValueError: An unknown task or split, a limit below 1, or a file or folder given.
    """
    return draw_examples("shapes", SIZE[:1], task, split, limit, seed, (data_file, image_dir))


def draw_examples(
    name: str,
    sides: Sequence[int],
    task: str,
    split: str,
    limit: int | None,
    seed: int,
    files: Sequence[str | Path | None],
    *,
    drawn_from: Iterator[Scene] | None = None,
) -> list[Example]:
    """The examples of a data set that is drawn from this world; see `load`.

    Args:
        drawn_from: A stream of scenes of this split and seed; default: those of `scenes`.
        name, sides, task, split, limit, seed, files: As in `load`; `sides` as in `scenes`.
    """
    if any(file is not None for file in files):
        raise ValueError("the shapes world is drawn, not read: leave out data_file and image_dir")
    if task not in _FIELDS:
        raise ValueError(f"the shapes world has no task {task!r}; valid: {', '.join(_FIELDS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    asked: dict[str, int] = dict.fromkeys(KINDS, 0)
    out = []
    stream = scenes(split, seed, sides) if drawn_from is None else drawn_from
    for scene in itertools.islice(stream, limit or DEFAULT_LIMIT):
        fields = _FIELDS[task](Dice("example", seed, split, len(out)), scene, asked)
        out.append(Example(f"{name}/{split}/{seed}/{len(out)}", scene, facts={"scene": scene}, **fields))
    return out
