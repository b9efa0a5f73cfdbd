"""A run folder read back, for its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from hones_lens.analysis import LogitLens
from hones_lens.app.report.run_view import ExampleView, NeuronTokens, PairView, PatchView, RunView
from hones_lens.hones import (
    GroupMasking,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    LensDelta,
    MaskingResult,
    NeuronScores,
    Overlap,
    SideEffects,
    SteeringTable,
    load_masking,
)
from hones_lens.model import VLMInputs
from hones_lens.results import Labelled, read_json
from hones_lens.tasks import load_task, task_names
from hones_lens.viz import join_words

T = TypeVar("T")
_EFFECTS = "side-effects-on-"


def read_run(folder: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and environment of a run folder.

    Raises:
        ValueError: Not a run folder.
    """
    file = Path(folder) / "settings.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no settings.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    return saved["settings"], saved["environment"]


def read_view(folder: str | Path) -> RunView:
    """Everything that a run folder holds, for its report; stages that were not run stay empty.

    A folder of one task, of steering alone, of patching, or of what concerns several tasks.

    Raises:
        ValueError: Not a run folder.
    """
    folder = Path(folder)
    settings, environment = read_run(folder)
    task = settings.get("task")
    heads = _if_there(folder / "heads.json", HeadScores.load)
    neurons = _if_there(folder / "neurons.json", NeuronScores.load)
    return RunView(
        title=f"{settings['model']} · {_subject(settings)}",
        model_name=settings["model"],
        task=task or join_words(settings["tasks"]),
        metric_name=_metric_name(task, heads),
        settings=settings,
        environment=environment,
        heads=heads,
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
        lenses=_lenses(folder),
        flow=_if_there(folder / "flow.json", HeadNeuronFlow.load),
        patching=_patching(folder, settings),
    )


def _metric_name(task: str | None, heads: HeadScores | None) -> str:
    """Of the one task, which may have gone from the registry since its heads were measured."""
    if heads is not None:
        return heads.metric_name
    return load_task(task).metric_name if task in task_names() else ""


def _subject(settings: dict[str, Any]) -> str:
    """What a run is about: its task or tasks; of patching also what was patched."""
    if "patch" not in settings:
        return settings.get("task") or join_words(settings["tasks"])
    of, patch = settings["image"], settings["patch"]
    return f"{Path(of).name if of else settings['task']}, {patch['what']} patched by {patch['by']}"


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


def _lenses(folder: Path) -> dict[str, LensDelta]:
    """By task: `lens.json` of a folder of one task, `lens-TASK.json` of one of several tasks."""
    files = sorted([*folder.glob("lens.json"), *folder.glob("lens-*.json")])
    return {delta.task: delta for delta in map(LensDelta.load, files)}


def _patching(folder: Path, settings: dict[str, Any]) -> PatchView | None:
    if not (folder / "patch.json").exists():
        return None
    result = Labelled.load(folder / "patch.json")
    return PatchView(result, settings["patch"], _pairs(settings, result.n), _pair(folder))


def _pairs(settings: dict[str, Any], n: int | None) -> str:
    """Which clean and corrupted inputs were patched, in words."""
    task, corrupt = settings["task"], settings["corrupt"]
    how = "" if corrupt is None else f" corrupted by {corrupt}"
    if settings["corrupt_box"]:
        how += f" in the box {', '.join(f'{side:g}' for side in settings['corrupt_box'])}"
    if settings["image"]:
        changed = {"image": settings["corrupted_image"], "prompt": settings["corrupted_prompt"]}
        other = " and ".join(f"another {what}" for what, given in changed.items() if given)
        return f"one picture, {Path(settings['image']).name},{how or f' against {other}'}"
    if corrupt is not None:
        return f"{n:,} {task} examples of {settings['dataset']},{how}"
    kind = f", of which the {settings['kind']} differs" if settings["kind"] else ""
    return f"{n:,} pairs of {task} pictures that differ in one fact{kind}"


def _pair(folder: Path) -> PairView | None:
    if not (folder / "pair.json").exists():
        return None
    data = read_json(folder / "pair.json", "patch-pair")
    mask = torch.tensor([here == "1" for here in data["image_mask"]])[None]
    clean, corrupted = (
        None if data[side] is None else _opened(folder / data[side]) for side in ("clean", "corrupted")
    )
    assert clean is not None
    inputs = VLMInputs(
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        attention_mask=torch.ones_like(mask, dtype=torch.long),
        image_mask_or_none=mask,
        grids=(tuple((rows, columns) for rows, columns in data["grids"]),),
        regions=(tuple((left, top, right, bottom) for left, top, right, bottom in data["regions"]),),
        leading_tokens=data["leading_tokens"],
    )
    texts = {name: data[name] for name in ("id", "prompt", "answer", "foil")}
    return PairView(clean=clean, corrupted=corrupted, inputs=inputs, **texts)


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _promoted(folder: Path) -> dict[tuple[int, int], NeuronTokens]:
    if not (folder / "promoted.json").exists():
        return {}
    rows = read_json(folder / "promoted.json", "promoted")["neurons"]
    # Folders of before lack the activation: their tokens are those that the output row raises.
    return {(layer, index): NeuronTokens(tuple(tokens), *rest) for layer, index, tokens, *rest in rows}


def _examples(folder: Path) -> list[ExampleView]:
    if not (folder / "examples.json").exists():
        return []
    views = []
    for row in read_json(folder / "examples.json", "examples")["examples"]:
        file = folder / row.pop("image")
        region, looks = row.pop("region", None), row.pop("looks", {})
        attention = row.pop("attention", None)  # folders of before held one head's attention
        if attention is not None:
            looks = {row["head"]: attention, **looks}
        parts: dict[str, Any] = {
            "region": None if region is None else tuple(region),
            "looks": {head: torch.tensor(values) for head, values in looks.items()},
            "lens": _if_there(file.with_name(f"{file.stem}-logit-lens.json"), LogitLens.load),
            "image_lens": _if_there(file.with_name(f"{file.stem}-image-lens.json"), Labelled.load),
        }
        views.append(ExampleView(image=_opened(file), **parts, **row))
    return views
