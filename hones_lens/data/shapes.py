"""The shapes world: scenes of coloured shapes and a boxed word, generated from a seed.

A scene has one or two things (shape, colour, size, cell of a 3 x 3 grid) and a word of three or
four letters in a blue box that takes one of the three rows. There are questions on every fact of a
scene, so one picture serves all four tasks; a scene with one fact changed is its counterfactual.

Nothing depends on set order, on a system font or on the order of calls: the same seed gives the same
bytes in every process. The split is a function of the scene's word alone, so splits share no image
whatever the seeds, and words outside `train` are never seen in training.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from hones_lens.data.drawing import COLUMNS, LETTERS, ROWS, Thing, draw_scene
from hones_lens.data.examples import Example
from hones_lens.model import did_you_mean

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
NUMBER_WORDS = ("zero", "one", "two")
KINDS = ("color", "shape", "size", "count", "where", "text", "name")
ATTRIBUTES = ("shape", "color", "size", "where")
SPLITS = ("train", "discovery", "dev", "test")
DEFAULT_LIMIT = 1000
N_CANDIDATES = 50
IMAGE_SIZE = (112, 112)  # width, height

_NAME_WORDS = "dax wug fep zib mip gav lor tuv nid pag kes rof"


def _assign_names() -> dict[tuple[str, str], str]:
    """A name by colour and shape: two names per 2 x 2 block of colours and shapes, on its two diagonals.

    So a red circle and a yellow triangle are both a `dax`, a red triangle and a yellow circle are not.
    Neither colour nor shape alone is evidence for a name, only both together, as in an exclusive or.
    """
    words = _NAME_WORDS.split()
    out = {}
    for (c, color), (s, shape) in itertools.product(enumerate(COLORS), enumerate(SHAPES)):
        parity = (c // 3 + s // 2) % 2
        out[color, shape] = words[2 * (2 * (c % 3) + s % 2) + parity]
    return out


THING_NAMES: dict[tuple[str, str], str] = _assign_names()

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """The content of a picture. Equal scenes are drawn as equal bytes."""

    things: tuple[Thing, ...]
    word: str
    text_row: int
    text_dx: int
    text_dy: int
    background: int
    size: tuple[int, int] = IMAGE_SIZE

    def load(self) -> Image.Image:
        """Draw the scene (RGB, `size` = width and height in pixels)."""
        return draw_scene(self)

    @property
    def id(self) -> str:
        """Twelve hex digits that identify the scene."""
        return hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()

    @property
    def split(self) -> str:
        """The split that the scene belongs to, a function of its word."""
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


class SeededRandom:
    """Random numbers from `random.Random.random` alone, whose stream Python guarantees across versions.

    Method names are those of `random.Random`, but the numbers are not.
    """

    def __init__(self, *key: object):
        self._random = random.Random("/".join(map(str, key))).random

    def randrange(self, n: int) -> int:
        """A uniform integer in 0 ... n - 1."""
        return int(self._random() * n)

    def randint(self, low: int, high: int) -> int:
        """A uniform integer in low ... high, both included."""
        return low + self.randrange(high - low + 1)

    def choice(self, values: Sequence[T]) -> T:
        """A uniform element of a sequence."""
        return values[self.randrange(len(values))]

    def bernoulli(self, p: float) -> bool:
        """True with probability p."""
        return self._random() < p

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """A random permutation, as a new list."""
        rest = list(values)
        return [rest.pop(self.randrange(len(rest))) for _ in range(len(rest))]


def split_of_word(word: str) -> str:
    """The split of all scenes with this word: 70 % of words are in train, 10 % in each other split."""
    bucket = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % 10
    return SPLITS[max(0, bucket - 6)]


def draw_word(rng: SeededRandom, split: str, length: int | None = None) -> str:
    """Draw a word of a split, of three or four letters if no length is given."""
    while True:
        n = length or rng.randint(3, 4)
        word = "".join(rng.choice(LETTERS) for _ in range(n))
        if split_of_word(word) == split:
            return word


def draw_thing(rng: SeededRandom, cell: tuple[int, int], others: Sequence[Thing]) -> Thing:
    """Draw a thing for a cell (row, column), with a pair of colour and shape that no other thing has."""
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    while (color, shape) in [(t.color, t.shape) for t in others]:
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    jitter = [rng.randint(-3, 3), rng.randint(-3, 3), rng.randint(-12, 12)]
    return Thing(shape, color, rng.choice(SIZES), *cell, *jitter)


def aligned_text_dy(row: int, height: int) -> int:
    """Vertical offset in pixels, at most 6, that brings letter tops near the grid of 14-pixel patches."""
    top = round((row + 0.5) * height / 3) - 7
    return min(6, 14 * round(top / 14) - top)


def random_image_size(rng: SeededRandom, sides: Sequence[int]) -> tuple[int, int]:
    """Draw a width and a height in pixels."""
    return rng.choice(sides), rng.choice(sides)


def random_scene(rng: SeededRandom, split: str, size: tuple[int, int] = IMAGE_SIZE) -> Scene:
    """Draw one scene of a split; `size` is (width, height), each at least 112 pixels."""
    text_row = rng.randrange(3)
    cells = [(r, c) for r in range(3) if r != text_row for c in range(3)]
    things: list[Thing] = []
    for cell in rng.shuffled(cells)[: 1 if rng.bernoulli(0.3) else 2]:
        things.append(draw_thing(rng, cell, things))
    word = draw_word(rng, split)
    # Each letter lies in one column of 14-pixel patches, and in one row of patches up to the jitter.
    text_dx = 8 + 14 * rng.randrange(size[0] // 14 - 1 - len(word)) + rng.randint(-2, 2)
    text_dy = aligned_text_dy(text_row, size[1]) + rng.randint(-1, 1)
    return Scene(tuple(things), word, text_row, text_dx, text_dy, rng.randint(104, 124), size)


def scenes(split: str, seed: int, sides: Sequence[int] = IMAGE_SIZE[:1]) -> Iterator[Scene]:
    """An endless stream of the scenes of one split; scene k depends on (seed, split, k) only.

    Args:
        split, seed: Split and seed of the scenes.
        sides: Widths and heights to draw from, in pixels.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r} of the shapes world; valid: {', '.join(SPLITS)}"
            f"{did_you_mean(split, SPLITS)}"
        )
    for k in itertools.count():
        size = random_image_size(SeededRandom("size", seed, split, k), sides)
        yield random_scene(SeededRandom("shapes", seed, split, k), split, size)


def questions(scene: Scene) -> list[Question]:
    """All questions of the seven kinds that have exactly one right answer on this scene."""
    out = [Question("count", "how many shapes are there?", NUMBER_WORDS[len(scene.things)])]
    colors = [t.color for t in scene.things]
    for color in COLORS:
        out.append(
            Question("count", f"how many {color} shapes are there?", NUMBER_WORDS[colors.count(color)])
        )
    row_text = "is the text at the top, in the center or at the bottom?"
    out.append(Question("text", row_text, ROWS[scene.text_row]))
    for t in scene.things:
        description = f"{t.color} {t.shape}"
        where_text = f"is the {description} on the left, in the middle or on the right?"
        out.append(Question("size", f"is the {description} small or large?", t.size))
        out.append(Question("where", where_text, COLUMNS[t.col]))
        out.append(Question("name", f"what is the {description} called?", THING_NAMES[t.color, t.shape]))
        if [o.shape for o in scene.things].count(t.shape) == 1:
            out.append(Question("color", f"what color is the {t.shape}?", t.color))
        if colors.count(t.color) == 1:
            out.append(Question("shape", f"what shape is the {t.color} one?", t.shape))
            out.append(Question("name", f"what is the {t.color} one called?", THING_NAMES[t.color, t.shape]))
    return out


def random_question(rng: SeededRandom, scene: Scene, kind: str) -> Question:
    """Draw a question of one kind; for counts, each possible answer is equally probable."""
    candidates = [q for q in questions(scene) if q.kind == kind]
    if kind == "count":
        answer = rng.choice(sorted({q.answer for q in candidates}))
        candidates = [q for q in candidates if q.answer == answer]
    return rng.choice(candidates)


def _attribute_variants(thing: Thing, free: Sequence[tuple[int, int]]) -> dict[str, list[Thing]]:
    """All versions of a thing with one attribute changed, by attribute."""
    return {
        "shape": [thing._replace(shape=s) for s in SHAPES if s != thing.shape],
        "color": [thing._replace(color=c) for c in COLORS if c != thing.color],
        "size": [thing._replace(size=s) for s in SIZES if s != thing.size],
        "where": [thing._replace(row=r, col=c) for r, c in free],
    }


def free_cells(scene: Scene) -> list[tuple[int, int]]:
    """The cells (row, column) without a thing and without text, in raster order."""
    occupied = {(t.row, t.col) for t in scene.things}
    cells = [(r, c) for r in range(3) if r != scene.text_row for c in range(3)]
    return [cell for cell in cells if cell not in occupied]


def counterfactual_scenes(scene: Scene, facts: Iterable[str] = ATTRIBUTES) -> list[Scene]:
    """All scenes that differ from this one in one attribute (of `facts`) of one thing."""
    facts = list(facts)
    free = free_cells(scene)
    out = []
    for i, thing in enumerate(scene.things):
        variants = _attribute_variants(thing, free)
        for other in (v for fact in facts for v in variants[fact]):
            things = (*scene.things[:i], other, *scene.things[i + 1 :])
            if len({(t.color, t.shape) for t in things}) == len(things):
                out.append(replace(scene, things=things))
    return out


def hard_negatives(rng: SeededRandom, scene: Scene, count: int) -> list[str]:
    """Distinct false captions, each of which changes one or two attributes of the scene."""
    single_changes = rng.shuffled(counterfactual_scenes(scene))
    double_changes = (
        other for s in itertools.cycle(single_changes) for other in [rng.choice(counterfactual_scenes(s))]
    )
    captions: dict[str, None] = {}
    for other in itertools.chain(single_changes[:20], double_changes):
        if other.captions[0] not in scene.captions:
            captions.setdefault(other.captions[0])
        if len(captions) == count:
            break
    return list(captions)


def _vqa(rng: SeededRandom, scene: Scene, kind_counts: dict[str, int]) -> dict[str, Any]:
    possible = {q.kind for q in questions(scene)}
    kind = min((k for k in KINDS if k in possible), key=lambda k: kind_counts[k])
    kind_counts[kind] += 1
    question = random_question(rng, scene, kind)
    return {"question": question.text, "answers": (question.answer,), "kind": kind}


def _ocr(rng: SeededRandom, scene: Scene, kind_counts: dict[str, int]) -> dict[str, Any]:
    return {"text": scene.word, "kind": f"{len(scene.word)} letters"}


def _caption(rng: SeededRandom, scene: Scene, kind_counts: dict[str, int]) -> dict[str, Any]:
    return {"references": scene.captions, "kind": _count_label(scene)}


def _retrieval(rng: SeededRandom, scene: Scene, kind_counts: dict[str, int]) -> dict[str, Any]:
    negatives = hard_negatives(rng, scene, N_CANDIDATES - 1)
    positive = rng.randrange(N_CANDIDATES)
    candidates = (*negatives[:positive], scene.captions[0], *negatives[positive:])
    return {"candidates": candidates, "positive": positive, "kind": _count_label(scene)}


def _count_label(scene: Scene) -> str:
    return f"{NUMBER_WORDS[len(scene.things)]} shape" + "s" * (len(scene.things) > 1)


_FIELDS: dict[str, Callable[[SeededRandom, Scene, dict[str, int]], dict[str, Any]]] = {
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
        split: `discovery`, `dev` or `test` (or `train`, on which the shipped models were trained).
        limit: Number of examples (default 1,000). A smaller limit gives a prefix.
        seed: Seed of the scenes. VQA takes the seven kinds of question in turn.
        data_file, image_dir: Must be None: this data set is generated, not read.

    Raises:
        ValueError: An unknown task or split, a limit below 1, or a file or folder given.
    """
    return draw_examples("shapes", IMAGE_SIZE[:1], task, split, limit, seed, (data_file, image_dir))


def draw_examples(
    name: str,
    sides: Sequence[int],
    task: str,
    split: str,
    limit: int | None,
    seed: int,
    files: Sequence[str | Path | None],
    *,
    scene_stream: Iterator[Scene] | None = None,
) -> list[Example]:
    """The examples of a data set of generated scenes; see `load`.

    Args:
        name: Name of the data set, with which ids of examples begin.
        sides: As in `scenes`.
        task, split, limit, seed: As in `load`.
        files: `data_file` and `image_dir`, which must be None.
        scene_stream: Scenes of this split and seed; default: those of `scenes`.
    """
    if any(file is not None for file in files):
        raise ValueError("the shapes world is drawn, not read: leave out data_file and image_dir")
    if task not in _FIELDS:
        raise ValueError(
            f"the shapes world has no task {task!r}; valid: {', '.join(_FIELDS)}{did_you_mean(task, _FIELDS)}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    kind_counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    out = []
    stream = scenes(split, seed, sides) if scene_stream is None else scene_stream
    for scene in itertools.islice(stream, limit or DEFAULT_LIMIT):
        fields = _FIELDS[task](SeededRandom("example", seed, split, len(out)), scene, kind_counts)
        out.append(Example(f"{name}/{split}/{seed}/{len(out)}", scene, facts={"scene": scene}, **fields))
    return out
