"""Drawing for the shapes world: numpy masks and a bitmap font, so that pixels are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "middle", "right")
LETTERS = "ACEHKLMNOPRSTUXZ"
LETTER_PITCH = 14
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

# 5 x 7 dots per letter, one hex byte per row, the highest of five bits leftmost.
_FONT = {
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


def glyph(letter: str, font: Mapping[str, str] = _FONT) -> np.ndarray:
    """Boolean mask [14, 10] of one letter; each dot of the font is two by two pixels."""
    rows = [[int(byte, 16) >> bit & 1 for bit in (4, 3, 2, 1, 0)] for byte in font[letter].split()]
    return np.kron(np.array(rows, dtype=bool), np.ones((2, 2), dtype=bool))


class Thing(NamedTuple):
    """One coloured shape with its cell of the 3 x 3 grid and its jitter in pixels."""

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
        """Its description in captions, e.g. `a small red circle at the top left`."""
        return f"a {self.size} {self.color} {self.shape} at the {ROWS[self.row]} {COLUMNS[self.col]}"


class DrawableScene(Protocol):
    """The attributes of a scene that `draw_scene` reads; offsets in pixels from the top left."""

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


class Style(NamedTuple):
    """Colours, sizes and font of a drawing.

    Attributes:
        palette: RGB by colour name.
        radii: Radius in pixels by size name.
        box, ink: RGB of the box's border and of the letters.
        glyph: Returns the boolean mask of a letter, 14 pixels high and at most `LETTER_PITCH` wide.
    """

    palette: Mapping[str, tuple[int, int, int]] = PALETTE
    radii: Mapping[str, float] = RADII
    box: tuple[int, int, int] = BOX_BLUE
    ink: tuple[int, int, int] = INK
    glyph: Callable[[str], np.ndarray] = glyph


DEFAULT_STYLE = Style()


def shape_mask(shape: str, center: tuple[float, float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """Boolean mask [height, width] of a filled shape.

    Args:
        shape: `circle`, `square`, `triangle` or `cross`.
        center, radius: Centre (x, y) and radius in pixels.
        size: Width and height of the mask in pixels.

    Raises:
        ValueError: An unknown shape.
    """
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


def draw_scene(
    scene: DrawableScene, style: Style = DEFAULT_STYLE, backdrop: np.ndarray | None = None
) -> Image.Image:
    """Draw a scene in RGB, without anti-aliasing.

    Args:
        scene: The scene.
        style: Colours, sizes and font.
        backdrop: Pixels behind things and box, uint8 [height, width, 3]; default: `scene.background`.
    """
    width, height = scene.size
    pixels = np.full((height, width, 3), scene.background, dtype=np.uint8)
    if backdrop is not None:
        pixels[:] = backdrop
    for thing in scene.things:
        cx = (thing.col + 0.5) * width / 3 + thing.dx
        cy = (thing.row + 0.5) * height / 3 + thing.dy
        color = np.clip(np.array(style.palette[thing.color]) + thing.shade, 0, 255).astype(np.uint8)
        pixels[shape_mask(thing.shape, (cx, cy), style.radii[thing.size], scene.size)] = color
    left, top, right, bottom = text_box(scene)
    pixels[top:bottom, left:right] = style.box
    pixels[top + 2 : bottom - 2, left + 2 : right - 2] = scene.background
    for i, letter in enumerate(scene.word):
        x, mask = left + 8 + LETTER_PITCH * i, style.glyph(letter)
        pixels[top + 5 : top + 19, x : x + mask.shape[1]][mask] = style.ink
    return Image.fromarray(pixels, mode="RGB")


def text_box(scene: DrawableScene) -> tuple[int, int, int, int]:
    """The blue box as (left, top, right, bottom) in pixels, right and bottom exclusive."""
    top = round((scene.text_row + 0.5) * scene.size[1] / 3) + scene.text_dy - 12
    return scene.text_dx, top, scene.text_dx + LETTER_PITCH * len(scene.word) + 12, top + 24
