"""What a package of somebody else's brings: a task, data sets, a ranking; with public names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hones_lens import Example, HookedVLM, Task
from hones_lens.data import BadRecord, Format, Record, Row

TASKS = ("count-discs",)  # of the data set
_COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
_SPLITS = ("discovery", "dev", "test")


class CountDiscs(Task):
    """How many discs are there? One word is right, to the letter."""

    name = "count-discs"
    metric_name = "exact match"

    def prompt(self, example: Example) -> str:
        return "Question: how many shapes are there?\nAnswer the question with a short phrase."

    def target(self, example: Example) -> str:
        return example.text

    def score(self, prediction: str, example: Example) -> float:
        return float(prediction == example.text)


TASK = CountDiscs()


@dataclass(frozen=True)
class Discs:
    """Coloured discs on grey; makes the picture when it is asked for."""

    discs: tuple[tuple[int, int, str], ...]  # x, y, color

    def load(self) -> Image.Image:
        image = Image.new("RGB", (112, 112), (114, 114, 114))
        for x, y, color in self.discs:
            ImageDraw.Draw(image).ellipse((x - 12, y - 12, x + 12, y + 12), fill=color)
        return image


def load(
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: Any = None,
    image_dir: Any = None,
) -> list[Example]:
    """One and two discs in turn."""
    if task not in TASKS or split not in _SPLITS:
        raise ValueError(f"no {task!r} in split {split!r}; valid: {TASKS}, {_SPLITS}")
    dice = np.random.default_rng([seed, _SPLITS.index(split)])
    examples = []
    for i in range(limit or 100):
        n = 1 + i % 2
        places = [divmod(int(cell), 3) for cell in dice.permutation(9)[:n]]
        colors = dice.permutation(_COLORS)[:n]
        discs = tuple((19 + 37 * x, 19 + 37 * y, str(c)) for (x, y), c in zip(places, colors, strict=True))
        examples.append(Example(f"discs/{split}/{seed}/{i}", Discs(discs), text=("one", "two")[n - 1]))
    return examples


def _rows(file: Path, task: str) -> list[Row]:
    return [Row(line, partial(_record, line)) for line in file.read_text().splitlines()]


def _record(line: str) -> Record:
    picture, _, word = line.partition(" ")
    if not word:
        raise BadRecord("has no word")
    return Record(id=picture, image_key=picture, files=(f"{picture}.png",), text=word)


class Listed:
    """A data set that is read from a file: a picture and a word a line."""

    FORMAT = Format("listed", TASKS, _rows)


def write_norm(model: HookedVLM, task: Task, examples: Sequence[Example], **_: Any) -> Tensor:
    """A ranking: the norm of what each neuron writes, [layer d_mlp]."""
    return torch.stack([block.mlp.W_out.detach().norm(dim=-1) for block in model.blocks])


class OutsideFamily:
    """Stands for a HookedVLM of another kind."""
