"""Drawing for the shapes world: numpy masks and a bitmap font, so bytes depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "middle", "right")
LETTERS = "ACEHKLMNOPRSTUXZ"
PITCH = 14
RADII = {"small": 8.0, "large": 14.0}
BOX_BLUE = (30, 60, 255)
INK = (245, 245, 245)
PALETTE = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 55, 190),
    "orange": (240, 135, 30),
}

# 5 x 7 dots a letter, one hex byte a row, the highest of five bits leftmost.
_DOTS = {
    "A": "0E 11 11 1F 11 11 11",
    "C": "0E 11 10 10 10 11 0E",
    "E": "1F 10 10 1E 10 10 1F",
    "H": "11 11 11 1F 11 11 11",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "M": "11 1B 15 15 11 11 11",
    "N": "11 19 15 13 11 11 11",
    "O": "0E 11 11 11 11 11 0E",
    "P": "1E 11 11 1E 10 10 10",
    "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "X": "11 11 0A 04 0A 11 11",
    "Z": "1F 01 02 04 08 10 1F",
}


def glyph(letter: str, dots: Mapping[str, str] = _DOTS) -> np.ndarray:
    """Boolean mask [14, 10] of one letter (dots of two by two pixels)."""
    rows = [[int(byte, 16) >> bit & 1 for bit in (4, 3, 2, 1, 0)] for byte in dots[letter].split()]
    return np.kron(np.array(rows, dtype=bool), np.ones((2, 2), dtype=bool))


class Thing(NamedTuple):
    """One coloured shape: what it is, and where (cell, and jitter in pixels)."""

    shape: str
    color: str
    size: str
    row: int
    col: int
    dx: int = 0
    dy: int = 0
    shade: int = 0

    @property
    def phrase(self) -> str:
        """How captions name it, e.g. `a small red circle at the top left`."""
        return f"a {self.size} {self.color} {self.shape} at the {ROWS[self.row]} {COLUMNS[self.col]}"


class Layout(Protocol):
    """What a scene has to say of itself to be drawn; pixels, counted from the top left."""

    @property
    def things(self) -> Sequence[Thing]: ...
    @property
    def word(self) -> str: ...
    @property
    def text_row(self) -> int: ...
    @property
    def text_dx(self) -> int: ...
    @property
    def text_dy(self) -> int: ...
    @property
    def background(self) -> int: ...
    @property
    def size(self) -> tuple[int, int]: ...


class Look(NamedTuple):
    """How things and letters are painted.

    Attributes:
        palette: RGB by name of colour.
        radii: Pixels by name of size.
        box, ink: RGB of the box's border and of the letters.
        glyph: Boolean mask of a letter, 14 pixels high and at most as wide as letters are apart.
    """

    palette: Mapping[str, tuple[int, int, int]] = PALETTE
    radii: Mapping[str, float] = RADII
    box: tuple[int, int, int] = BOX_BLUE
    ink: tuple[int, int, int] = INK
    glyph: Callable[[str], np.ndarray] = glyph


PLAIN = Look()


def shape_mask(shape: str, center: tuple[float, float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """Boolean mask [height, width] of a filled shape about a centre (x, y), in pixels; size is (w, h)."""
    cx, cy = center
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    dx, dy = np.abs(x - cx), y - cy
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "square":
        return np.maximum(dx, np.abs(dy)) <= 0.88 * radius
    if shape == "triangle":
        return (np.abs(dy) <= radius) & (dx <= (dy + radius) / 2)
    if shape == "cross":
        near, far = np.minimum(dx, np.abs(dy)), np.maximum(dx, np.abs(dy))
        return (near <= 0.34 * radius) & (far <= radius)
    raise ValueError(f"no shape {shape!r} to draw")


def draw_scene(scene: Layout, look: Look = PLAIN, backdrop: np.ndarray | None = None) -> Image.Image:
    """The picture of a scene: RGB, no anti-aliasing.

    Args:
        scene: What to draw.
        look: How.
        backdrop: What lies behind things and box, uint8 [height, width, 3]; default: the plain background.
    """
    width, height = scene.size
    pixels = np.full((height, width, 3), scene.background, dtype=np.uint8)
    if backdrop is not None:
        pixels[:] = backdrop
    for thing in scene.things:
        cx = (thing.col + 0.5) * width / 3 + thing.dx
        cy = (thing.row + 0.5) * height / 3 + thing.dy
        color = np.clip(np.array(look.palette[thing.color]) + thing.shade, 0, 255).astype(np.uint8)
        pixels[shape_mask(thing.shape, (cx, cy), look.radii[thing.size], scene.size)] = color
    left, top, right, bottom = text_box(scene)
    pixels[top:bottom, left:right] = look.box
    pixels[top + 2 : bottom - 2, left + 2 : right - 2] = scene.background
    for i, letter in enumerate(scene.word):
        x, mask = left + 8 + PITCH * i, look.glyph(letter)
        pixels[top + 5 : top + 19, x : x + mask.shape[1]][mask] = look.ink
    return Image.fromarray(pixels, mode="RGB")


def text_box(scene: Layout) -> tuple[int, int, int, int]:
    """The blue box as (left, top, right, bottom) in pixels, right and bottom exclusive."""
    top = round((scene.text_row + 0.5) * scene.size[1] / 3) + scene.text_dy - 12
    return scene.text_dx, top, scene.text_dx + PITCH * len(scene.word) + 12, top + 24
