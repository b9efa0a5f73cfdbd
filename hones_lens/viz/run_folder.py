"""A run folder read back, for its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from hones_lens.attribution.heads import HeadScores
from hones_lens.attribution.held_out import HeldOutHeads
from hones_lens.attribution.neurons import NeuronScores
from hones_lens.masking import MaskingResult, load_masking
from hones_lens.overlap import GroupMasking, LensDelta, Overlap
from hones_lens.results import read_json
from hones_lens.runs import read_run
from hones_lens.steering import SideEffects, SteeringTable
from hones_lens.tasks import load_task
from hones_lens.viz.run_view import ExampleView, RunView
from hones_lens.viz.words import listed

T = TypeVar("T")
_EFFECTS = "side-effects-on-"


def read_view(folder: str | Path) -> RunView:
    """Everything that a run folder holds, for its report; stages that were not run stay empty.

    A folder of one task, of steering alone, or of what concerns several tasks.

    Raises:
        ValueError: Not a run folder.
    """
    folder = Path(folder)
    settings, environment = read_run(folder)
    task = settings.get("task")
    neurons = _if_there(folder / "neurons.json", NeuronScores.load)
    return RunView(
        title=f"{settings['model']} · {task or listed(settings['tasks'])}",
        model_name=settings["model"],
        task=task or listed(settings["tasks"]),
        metric_name=load_task(task).metric_name if task else "",
        settings=settings,
        environment=environment,
        heads=_if_there(folder / "heads.json", HeadScores.load),
        neurons=neurons,
        masking=_if_there(folder / "masking.json", load_masking) or [],
        others=_others(_if_there(folder / "others.json", load_masking) or [], neurons),
        examples=_examples(folder),
        promoted=_promoted(folder),
        held_out=_if_there(folder / "heads-held-out.json", HeldOutHeads.load),
        steering=_steering(folder),
        overlap=_if_there(folder / "overlap.json", Overlap.load),
        groups=_if_there(folder / "groups.json", GroupMasking.load),
        effects=_effects(folder),
        lens=_if_there(folder / "lens.json", LensDelta.load),
    )


def _if_there(file: Path, load: Callable[[Path], T]) -> T | None:
    return load(file) if file.exists() else None


def _others(results: list[MaskingResult], neurons: NeuronScores | None) -> dict[str, MaskingResult]:
    """Other rankings by name: of several sizes, the one that the run's own neurons have."""
    found: dict[str, MaskingResult] = {}
    for result in results:
        if result.method not in found or (neurons and result.n_neurons == neurons.count()):
            found[result.method] = result
    return found


def _steering(folder: Path) -> dict[str, SteeringTable]:
    """By data set; a folder of steering has its own table, another one those in its `steering`."""
    found: dict[str, SteeringTable] = {}
    for file in sorted([*folder.glob("steering.json"), *folder.glob("steering/*/steering.json")]):
        learned_on = read_run(file.parent)[0]["dataset"]
        found[f"learned and measured on {learned_on}"] = SteeringTable.load(file)
        for other in sorted(file.parent.glob("on-*.json")):
            measured_on = other.stem.removeprefix("on-")
            found[f"learned on {learned_on}, measured on {measured_on}"] = SteeringTable.load(other)
    return found


def _effects(folder: Path) -> dict[str, SideEffects]:
    files = sorted(folder.glob(f"{_EFFECTS}*.json"))
    return {file.stem.removeprefix(_EFFECTS): SideEffects.load(file) for file in files}


def _promoted(folder: Path) -> dict[tuple[int, int], list[str]]:
    if not (folder / "promoted.json").exists():
        return {}
    rows = read_json(folder / "promoted.json", "promoted")["neurons"]
    return {(layer, index): tokens for layer, index, tokens in rows}


def _examples(folder: Path) -> list[ExampleView]:
    if not (folder / "examples.json").exists():
        return []
    views = []
    for row in read_json(folder / "examples.json", "examples")["examples"]:
        with Image.open(folder / row.pop("image")) as opened:
            image = opened.convert("RGB")
        attention: Any = row.pop("attention")
        attention = None if attention is None else torch.tensor(attention)
        views.append(ExampleView(image=image, attention=attention, **row))
    return views
