"""How much of a localization changes when a model runs in fewer bits than float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import Prediction
from hones_lens.hones import all_heads, default_top_k
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model import HookedVLM
from hones_lens.results import ranked, spearman
from hones_lens.tasks import Task


@dataclass(frozen=True)
class DtypeFlips:
    """Number of cells (heads × examples) of one task whose result differs from that in float32.

    Attributes:
        task: Name of the task.
        dtype: Name of the other type.
        cells: Number of cells compared.
        answers: Cells whose answer differs (retrieval: the first five candidates, in order).
        drops: Cells whose drop differs: the metric of the clean model minus that with the head replaced,
            each in its own type.
        clean: Examples, of `n`, whose clean answer differs.
        n: Number of examples.
        rank_correlation: Spearman's correlation of the head scores in the two types; NaN if all are equal.
        top_k, shared: Number of critical heads, and of those that are critical in both types.
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
) -> DtypeFlips:
    """Localize heads (HONES eq. H1) in two types, and count the cells that differ.

    Args:
        model: The model in float32.
        other: The same weights in another type.
        task, examples: The task and its examples.
        top_k: Number of critical heads; default from `model_configs/`.
        batch_size: Examples per batch.

    Raises:
        ValueError: `model` is not in float32, `other` is, or the models have different heads.
    """
    task = engine.as_task(task)
    if model.cfg.dtype is not torch.float32 or other.cfg.dtype is torch.float32:
        raise ValueError(
            f"models in {model.cfg.dtype} and {other.cfg.dtype}; give float32, then another type"
        )
    cells = all_heads(model)
    if cells != all_heads(other):
        raise ValueError("the two models have different heads")
    engine.check_examples(task, examples)
    outcomes = [_predictions_and_scores(each, task, examples, batch_size) for each in (model, other)]
    answers, scores = zip(*outcomes, strict=True)
    differs = np.array([[a != b for a, b in zip(*arms, strict=True)] for arms in zip(*answers, strict=True)])
    drops = [each[:1] - each[1:] for each in scores]
    means = [torch.from_numpy(each.mean(1)).view(model.cfg.n_layers, -1) for each in drops]
    k = default_top_k(model) if top_k is None else top_k
    critical = [{(c.layer, c.index) for c in ranked(mean, k, positive_only=True)} for mean in means]
    return DtypeFlips(
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


def _predictions_and_scores(
    model: HookedVLM, task: Task, examples: Sequence[Example], batch_size: int
) -> tuple[list[list[Prediction]], np.ndarray]:
    """Predictions of every arm, the clean model first, and their scores [arm example]."""
    arms = [[], *([replace_with_other_heads_mean(*cell)] for cell in all_heads(model))]
    predictions: list[list[Prediction]] = [[] for _ in arms]
    for batch in engine.prompt_batches(model, task, examples, batch_size):
        for arm_predictions, batch_predictions in zip(
            predictions, engine.Sweep(model, arms).predictions(task, batch), strict=True
        ):
            arm_predictions += batch_predictions
    scores = [[task.score(a, e) for a, e in zip(answers, examples, strict=True)] for answers in predictions]
    if task.ranks:
        predictions = [
            [np.argsort(-np.array(margins), kind="stable")[:5].tolist() for margins in arm]
            for arm in predictions
        ]
    return predictions, np.array(scores)
