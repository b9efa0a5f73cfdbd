"""Read a picture of the shapes world back from its pixels, with no help from the scene behind it."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from hones_lens.data.drawing import LETTERS, glyph
from hones_lens.data.shapes import THING_NAMES

ROWS, COLUMNS = ("top", "center", "bottom"), ("left", "middle", "right")
_BOX, _INK = (30, 60, 255), (245, 245, 245)
_PAINT = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 55, 190),
    "orange": (240, 135, 30),
}


class Seen(NamedTuple):
    """A coloured shape as it looks."""

    shape: str
    color: str
    size: str
    row: str
    column: str


class Picture(NamedTuple):
    """All that can be seen in a picture."""

    things: frozenset[Seen]
    text_row: str
    word: str
    background: int


def look(image: Image.Image) -> Picture:
    """Find the things, the box and the word."""
    pixels = np.asarray(image).astype(int)
    height, width, _ = pixels.shape
    background = pixels[0, 0]
    blue = (pixels == _BOX).all(-1)
    top, bottom = np.flatnonzero(blue.any(1))[[0, -1]]
    left, right = np.flatnonzero(blue.any(0))[[0, -1]]
    word = _read((pixels == _INK).all(-1)[top : bottom + 1, left : right + 1])
    rest = (pixels != background).any(-1)
    rest[top : bottom + 1, left : right + 1] = False
    down, across = (
        [(-(-side * i // 3), -(-side * (i + 1) // 3)) for i in range(3)] for side in (height, width)
    )
    things = set()
    for row, (y0, y1) in zip(ROWS, down, strict=True):
        for column, (x0, x1) in zip(COLUMNS, across, strict=True):
            if rest[y0:y1, x0:x1].any():
                things.add(_thing(pixels[y0:y1, x0:x1], rest[y0:y1, x0:x1], row, column))
    return Picture(frozenset(things), ROWS[int((top + bottom) / 2 * 3 // height)], word, int(background[0]))


def answer_from_picture(question: str, picture: Picture) -> str:
    """The answer to a question, from what is seen alone; raises if it is ambiguous."""
    things = list(picture.things)
    if match := re.fullmatch(r"how many (\w+ )?shapes are there\?", question):
        wanted = match[1].strip() if match[1] else None
        return ("zero", "one", "two")[sum(wanted in (None, t.color) for t in things)]
    if question == "is the text at the top, in the center or at the bottom?":
        return picture.text_row
    if match := re.fullmatch(r"is the (\w+) (\w+) small or large\?", question):
        return _only([t for t in things if (t.color, t.shape) == match.groups()]).size
    if match := re.fullmatch(r"is the (\w+) (\w+) on the left, in the middle or on the right\?", question):
        return _only([t for t in things if (t.color, t.shape) == match.groups()]).column
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return _only([t for t in things if t.shape == match[1]]).color
    if match := re.fullmatch(r"what shape is the (\w+) one\?", question):
        return _only([t for t in things if t.color == match[1]]).shape
    match = re.fullmatch(r"what is the (\w+) (\w+) called\?", question)
    assert match, question
    one = _only([t for t in things if t.color == match[1] and match[2] in ("one", t.shape)])
    return THING_NAMES[one.color, one.shape]


def _thing(pixels: np.ndarray, mask: np.ndarray, row: str, column: str) -> Seen:
    paint = np.unique(pixels[mask], axis=0)
    assert len(paint) == 1, "one cell holds more than one colour"
    color = min(_PAINT, key=lambda name: float(np.abs(paint[0] - _PAINT[name]).sum()))
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return Seen(_shape(tight), color, "large" if max(tight.shape) > 20 else "small", row, column)


def _shape(tight: np.ndarray) -> str:
    """By how much of its bounding box is filled, and whether upside down is the same."""
    if tight.mean() > 0.95:
        return "square"
    if tight.mean() > 0.7:
        return "circle"
    half = len(tight) // 2
    upper, lower = tight[:half].sum(), tight[-half:].sum()
    return "triangle" if lower > 1.5 * upper else "cross"


def _read(ink: np.ndarray) -> str:
    by_bytes = {glyph(letter).tobytes(): letter for letter in LETTERS}
    n = (ink.shape[1] - 12) // 14
    return "".join(by_bytes[ink[5:19, 8 + 14 * i : 18 + 14 * i].tobytes()] for i in range(n))


def _only(things: list[Seen]) -> Seen:
    (one,) = things
    return one
