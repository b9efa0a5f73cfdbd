"""`shapes-varied`: the shapes world on pictures of many sizes and aspects, for models with dynamic grids."""

from __future__ import annotations

from pathlib import Path

from hones_lens.data.examples import Example
from hones_lens.data.shapes import TASKS as TASKS, draw_examples

IMAGE_SIDES = (112, 140, 168)


def load(
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
) -> list[Example]:
    """As `shapes.load`; every picture's width and height are drawn from `SIDES`, in pixels."""
    return draw_examples("shapes-varied", IMAGE_SIDES, task, split, limit, seed, (data_file, image_dir))
