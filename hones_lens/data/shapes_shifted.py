"""`shapes-shifted`: an out-of-distribution version of the shapes world.

The scenes, questions, words and splits follow the rules of `shapes`. The appearance differs: other shades
of the colours, letters of another font, things a little larger and less exactly in the middle of their
cells, lines and grain behind them, and over every third scene a light grey haze, which removes at least
half of the contrast. The shipped models, which were trained on `shapes`, still solve each task, but worse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from hones_lens.data.drawing import Style, draw_scene, glyph
from hones_lens.data.examples import Example
from hones_lens.data.shapes import (
    IMAGE_SIZE,
    SPLITS,
    TASKS as TASKS,
    Scene,
    SeededRandom,
    draw_examples,
    random_scene,
)
from hones_lens.model import did_you_mean

_PALETTE = {
    "red": (190, 30, 60),
    "green": (30, 140, 80),
    "blue": (35, 90, 200),
    "yellow": (245, 225, 90),
    "purple": (130, 50, 170),
    "orange": (250, 150, 50),
}
_RADII = {"small": 8.4, "large": 14.3}
_BOX_BLUE = (50, 85, 235)
_INK = (235, 235, 220)
_JITTER = 4  # pixels; `shapes` has 3
_HAZE_PERIOD, _HAZE_PERCENT, _HAZE_TONE = 3, (50, 65), 235  # every third scene; range; grey level
_N_LINES, _LINE_TONE, _GRAIN = 2, 14, 6

# An angular font, 5 x 7 dots per letter, encoded as in `drawing`.
_SHIFTED_FONT = {
    "A": "0E 1B 11 1F 11 11 11",
    "C": "1F 11 10 10 10 11 1F",
    "E": "1F 10 10 1E 10 11 1F",
    "H": "11 11 11 1F 11 11 1B",
    "K": "11 12 14 1C 14 12 11",
    "L": "10 10 10 10 10 11 1F",
    "M": "1B 1B 15 15 11 11 11",
    "N": "11 19 1D 15 13 11 11",
    "O": "0E 11 11 11 11 13 0E",
    "P": "1E 11 11 1E 10 10 18",
    "R": "1E 11 11 1E 14 12 13",
    "S": "1F 10 10 1E 01 01 1F",
    "T": "1F 04 04 04 04 04 0E",
    "U": "11 11 11 11 11 13 0F",
    "X": "11 11 0A 0E 0A 11 11",
    "Z": "1F 11 02 04 08 11 1F",
}


def shifted_glyph(letter: str) -> np.ndarray:
    """Boolean mask [14, 10] of one letter of this world's font."""
    return glyph(letter, _SHIFTED_FONT)


SHIFTED_STYLE = Style(_PALETTE, _RADII, _BOX_BLUE, _INK, shifted_glyph)


@dataclass(frozen=True)
class ShiftedScene(Scene):
    """A scene that is drawn in the shifted style.

    Attributes:
        clutter: Seed of the lines and the grain behind the things; it stays when a fact is changed.
        haze: Share of light grey blended into every pixel [%].
    """

    clutter: int = 0
    haze: int = 0

    def load(self) -> Image.Image:
        """Draw the scene (RGB, `size` = width and height in pixels)."""
        clear = np.asarray(draw_scene(self, SHIFTED_STYLE, backdrop(self))).astype(int)
        hazy = (clear * (100 - self.haze) + _HAZE_TONE * self.haze) // 100
        return Image.fromarray(hazy.astype(np.uint8), mode="RGB")


def backdrop(scene: ShiftedScene) -> np.ndarray:
    """Lines across a grainy background, uint8 [height, width, 3]; integer arithmetic, so it is portable."""
    width, height = scene.size
    rng = SeededRandom("clutter", scene.clutter)
    pixels = np.full((height, width), scene.background)
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(_N_LINES):
        a, b, tone = rng.randint(1, 8), rng.randint(-8, 8), rng.choice((-1, 1)) * _LINE_TONE
        offset = a * rng.randrange(width) + b * rng.randrange(height)
        pixels[2 * np.abs(a * x + b * y - offset) <= max(a, abs(b))] = scene.background + tone
    noise = hashlib.shake_256(f"grain/{scene.clutter}".encode()).digest(width * height)
    grain = np.frombuffer(noise, np.uint8).reshape(height, width).astype(int) % (2 * _GRAIN + 1) - _GRAIN
    grey = pixels + grain
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def scenes(split: str, seed: int) -> Iterator[ShiftedScene]:
    """An endless stream of the scenes of one split; scene k depends on (seed, split, k) only.

    Raises:
        ValueError: An unknown split.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r} of the shapes world; valid: {', '.join(SPLITS)}"
            f"{did_you_mean(split, SPLITS)}"
        )
    for k in count():
        rng = SeededRandom("shapes-shifted", seed, split, k)
        yield _shifted(random_scene(rng, split), rng, hazy=k % _HAZE_PERIOD == _HAZE_PERIOD - 1)


def _shifted(scene: Scene, rng: SeededRandom, hazy: bool) -> ShiftedScene:
    """A scene with the same facts, with more jitter of its things, and haze if `hazy`."""
    things = tuple(
        thing._replace(dx=rng.randint(-_JITTER, _JITTER), dy=rng.randint(-_JITTER, _JITTER))
        for thing in scene.things
    )
    haze = rng.randint(*_HAZE_PERCENT) if hazy else 0
    return ShiftedScene(**{**vars(scene), "things": things}, clutter=rng.randrange(2**31), haze=haze)


def load(
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
) -> list[Example]:
    """As `shapes.load`, with scenes and pictures of this world (112 x 112 pixels)."""
    files = (data_file, image_dir)
    stream = scenes(split, seed)
    return draw_examples(
        "shapes-shifted", IMAGE_SIZE[:1], task, split, limit, seed, files, scene_stream=stream
    )
