"""The HONES release's own result files, `heads.json` and `neurons_top1pct.json`, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.model import HookedVLM
from hones_lens.results import write_json
from hones_lens.tasks import load_task

_INTERVENTION = "replace_with_other_heads_mean"


def save_heads(heads: HeadScores, file: str | Path) -> None:
    """Write `heads.json` as HONES does: `baseline`, and rows of `all_heads` and `top_heads`, best first."""
    known = ~heads.scores.isnan()
    order = sorted(known.nonzero().tolist(), key=lambda cell: (-float(heads.scores[tuple(cell)]), cell))
    rows = [_head_row(heads, layer, head) for layer, head in order]
    top = [
        {**_head_row(heads, c.layer, c.index), "rank": rank} for rank, c in enumerate(heads.top(), start=1)
    ]
    baseline = {
        "metric": heads.baseline,
        "metric_name": heads.metric_name,
        "n": len(heads.example_ids),
    }
    write_json(file, {"baseline": baseline, "all_heads": rows, "top_heads": top})


def _head_row(heads: HeadScores, layer: int, head: int) -> dict[str, Any]:
    score = float(heads.scores[layer, head])
    return {
        "layer": layer,
        "head": head,
        "score": score,
        "baseline": heads.baseline,
        "intervened": heads.baseline - score,
        "metric_name": heads.metric_name,
    }


def load_heads(file: str | Path, task: str, model: HookedVLM) -> HeadScores:
    """Read HONES's `heads.json`, which names neither task nor model and has no per-example drops.

    Args:
        file: The file.
        task: Which task it was made for.
        model: Whose heads they are.

    Returns:
        HeadScores with `drops` of no examples; heads that the file does not list have the score NaN.

    Raises:
        ValueError: Another shape of file, or a head that the model lacks; names the file.
    """
    data = _read(file)
    if not isinstance(data, dict) or "top_heads" not in data:
        raise ValueError(f"{file} is no heads.json of HONES: it has no 'top_heads'")
    rows = data.get("all_heads") or data["top_heads"]
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    scores = torch.full(shape, torch.nan, dtype=torch.float64)
    for layer, head, score in _cells(rows, "head", "score", shape, file):
        scores[layer, head] = score
    base = data.get("baseline", {})
    return HeadScores(
        task=task,
        metric_name=base.get("metric_name") or load_task(task).metric_name,
        intervention=_INTERVENTION,
        model_name=model.cfg.model_name,
        scores=scores,
        drops=torch.zeros(*shape, 0, dtype=torch.float64),
        baseline=float(base.get("metric", torch.nan)),
        base_scores=torch.zeros(0, dtype=torch.float64),
        example_ids=(),
        kinds=(),
        top_k=len(data["top_heads"]),
    )


def save_neurons(neurons: NeuronScores, file: str | Path) -> None:
    """Write `neurons_top1pct.json` as HONES does: rows of the task neurons, best first."""
    width = neurons.scores.shape[1]
    rows = [
        {
            "rank": rank,
            "layer": c.layer,
            "neuron": c.index,
            "score": c.score,
            "global_index": c.layer * width + c.index,
        }
        for rank, c in enumerate(neurons.top(), start=1)
    ]
    write_json(file, rows)


def load_neurons(file: str | Path, task: str, model: HookedVLM) -> NeuronScores:
    """Read a list of neurons in any shape that HONES's steering reads.

    Args:
        file: A list of rows, or an object with such a list as `selected_neurons` or `neurons`, or with one
            group of them in `groups`. A row has `layer`, `neuron`, and a `score` or `importance` if it likes.
        task: Which task it was made for.
        model: Whose neurons they are.

    Returns:
        NeuronScores that hold these neurons; all others have the score minus infinity. Rows without a
        score are ranked as they come.

    Raises:
        ValueError: Another shape of file, no rows, a row twice, or a neuron that the model lacks.
    """
    rows = _neuron_rows(_read(file), file)
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    scores = torch.full(shape, -torch.inf, dtype=torch.float64)
    ranked = [{"score": row.get("importance", -i), **row} for i, row in enumerate(rows)]
    for layer, neuron, score in _cells(ranked, "neuron", "score", shape, file):
        scores[layer, neuron] = score
    return NeuronScores(
        task=task,
        method="hones",
        model_name=model.cfg.model_name,
        scores=scores,
        ratio=len(rows) / scores.numel(),
        n_examples=0,
    )


def _neuron_rows(data: Any, file: str | Path) -> list[Any]:
    if isinstance(data, dict):
        groups = data.get("groups", {})
        if len(groups) > 1:
            raise ValueError(
                f"{file} holds several groups of neurons ({', '.join(groups)}): give one's own file"
            )
        candidates = [data.get("selected_neurons"), data.get("neurons"), *groups.values()]
        data = next((rows for rows in candidates if isinstance(rows, list)), None)
    if not isinstance(data, list) or not data:
        raise ValueError(f"{file} holds no list of neurons (rows with 'layer' and 'neuron')")
    return data


def _cells(
    rows: Sequence[Any], index: str, value: str, shape: tuple[int, int], file: str | Path
) -> Iterable[tuple[int, int, float]]:
    seen = set()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"layer", index, value} <= set(row):
            raise ValueError(f"{file}: row {number} has no 'layer', {index!r} and {value!r}: {row!r}")
        cell = (int(row["layer"]), int(row[index]))
        if not (0 <= cell[0] < shape[0] and 0 <= cell[1] < shape[1]):
            raise ValueError(f"{file}: row {number}: the model has no layer {cell[0]}, {index} {cell[1]}")
        if cell in seen:
            raise ValueError(f"{file}: row {number} repeats layer {cell[0]}, {index} {cell[1]}")
        seen.add(cell)
        yield *cell, float(row[value])


def _read(file: str | Path) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
