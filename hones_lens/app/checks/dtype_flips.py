"""How much of a localization changes when a model runs in fewer bits than float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import Prediction
from hones_lens.hones import cells_of, default_top_k
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import HookedVLM
from hones_lens.results import ranked, spearman
from hones_lens.tasks import Task


@dataclass(frozen=True)
class Flips:
    """Cells (heads × examples) of one task that come out differently than in float32.

    Attributes:
        task: Which.
        dtype: The other type's name.
        cells: How many were compared.
        answers: In how many the answer differs (retrieval: the first five candidates, in order).
        drops: In how many the example's drop differs: the metric with the clean model minus with the head
            replaced, each in its own type.
        clean: Of how many examples the clean answer differs, of `n`.
        n: How many examples.
        rank_correlation: Spearman's, of the heads' scores in the two types; NaN where all scores are equal.
        top_k, shared: How many heads are critical, and how many of them are so in both types.
    """

    task: str
    dtype: str
    cells: int
    answers: int
    drops: int
    clean: int
    n: int
    rank_correlation: float
    top_k: int
    shared: int

    def __str__(self) -> str:
        return (
            f"{self.task}: {self.answers} of {self.cells} answers ({self.answers / self.cells:.2%}) and "
            f"{self.drops} drops ({self.drops / self.cells:.2%}) differ in {self.dtype}; "
            f"clean answers {self.clean} of {self.n}; rank correlation of the heads' scores "
            f"{self.rank_correlation:.3f}; {self.shared} of the {self.top_k} critical heads shared"
        )


def dtype_flips(
    model: HookedVLM,
    other: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    top_k: int | None = None,
    batch_size: int = 32,
) -> Flips:
    """Localize heads (HONES eq. H1) in two types, and count the cells that differ.

    Args:
        model: In float32.
        other: The same weights in another type.
        task, examples: On what.
        top_k: Critical heads; default from `model_configs/`.
        batch_size: Examples at a time.

    Raises:
        ValueError: The first model isn't in float32, or the second is; models of different shape.
    """
    task = engine.as_task(task)
    if model.cfg.dtype is not torch.float32 or other.cfg.dtype is torch.float32:
        raise ValueError(
            f"models in {model.cfg.dtype} and {other.cfg.dtype}; give float32, then another type"
        )
    cells = cells_of(model)
    if cells != cells_of(other):
        raise ValueError("the two models have different heads")
    engine.check_examples(task, examples)
    found = [_run(each, task, examples, batch_size) for each in (model, other)]
    said, scores = zip(*found, strict=True)
    differs = np.array([[a != b for a, b in zip(*arms, strict=True)] for arms in zip(*said, strict=True)])
    drops = [each[:1] - each[1:] for each in scores]
    means = [torch.from_numpy(each.mean(1)).view(model.cfg.n_layers, -1) for each in drops]
    k = default_top_k(model) if top_k is None else top_k
    critical = [{(c.layer, c.index) for c in ranked(mean, k, positive_only=True)} for mean in means]
    return Flips(
        task=task.name,
        dtype=str(other.cfg.dtype).removeprefix("torch."),
        cells=int(differs[1:].size),
        answers=int(differs[1:].sum()),
        drops=int((np.abs(drops[0] - drops[1]) > 1e-9).sum()),
        clean=int(differs[0].sum()),
        n=len(examples),
        rank_correlation=float(spearman(*(mean.flatten().numpy() for mean in means))),
        top_k=len(critical[0]),
        shared=len(critical[0] & critical[1]),
    )


def _run(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int
) -> tuple[list[list[Prediction]], np.ndarray]:
    """What every arm says, the clean model first, and its scores, [arm example]."""
    arms = [[], *([replace_with_other_heads_mean(*cell)] for cell in cells_of(model))]
    said: list[list[Prediction]] = [[] for _ in arms]
    for batch in engine.prompt_batches(model, task, examples, batch_size):
        for mine, new in zip(said, engine.Sweep(model, arms).predictions(task, batch), strict=True):
            mine += new
    scores = [[task.score(a, e) for a, e in zip(answers, examples, strict=True)] for answers in said]
    if task.ranks:
        said = [
            [np.argsort(-np.array(margins), kind="stable")[:5].tolist() for margins in arm] for arm in said
        ]
    return said, np.array(scores)
