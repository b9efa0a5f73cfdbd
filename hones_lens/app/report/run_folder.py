"""Reading a run folder for its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from hones_lens.analysis import LensDifference, LogitLens
from hones_lens.app.report.run_files import RunFiles
from hones_lens.app.report.run_settings import read_settings
from hones_lens.app.report.run_view import ExampleView, NeuronTokens, PairView, PatchView, RunView
from hones_lens.engine import Evaluation
from hones_lens.hones import (
    GroupMasking,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    NeuronScores,
    Overlap,
    SideEffects,
    SteeringTable,
    load_masking,
)
from hones_lens.model import ImageLayout, VLMInputs, open_image
from hones_lens.results import Interval, Labelled, read_json
from hones_lens.tasks import load_task, task_names
from hones_lens.viz import join_words

T = TypeVar("T")
_EFFECTS = "side-effects-on-"


def read_run(folder: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and environment of a run folder.

    Raises:
        ValueError: The folder is not a run folder, or its settings.json is damaged.
    """
    saved = read_settings(folder)
    return saved["settings"], saved["environment"]


def read_view(folder: str | Path) -> RunView:
    """Read the results in a run folder; stages that were not run stay empty.

    The folder may be one of a single task, of steering, of activation patching, or of several tasks.

    Raises:
        ValueError: The folder is not a run folder, or a file is not the one that the run wrote; names it.
    """
    files = RunFiles(folder)
    settings, environment = read_run(folder)
    task = settings.get("task")
    heads = _load(files, "heads.json", HeadScores.load)
    neurons = _load(files, "neurons.json", NeuronScores.load)
    return RunView(
        title=f"{settings['model']} · {_subject(settings)}",
        model_name=settings["model"],
        task=task or join_words(settings["tasks"]),
        metric_name=_metric_name(task, heads),
        settings=settings,
        environment=environment,
        heads=heads,
        neurons=neurons,
        masking=_load(files, "masking.json", load_masking) or [],
        others=_other_rankings(_load(files, "others.json", load_masking) or [], neurons),
        examples=_examples(files),
        promoted=_promoted(files),
        held_out=_load(files, "heads-held-out.json", HeldOutHeads.load),
        evaluation=_evaluation(files),
        steering=_steering(files),
        overlap=_load(files, "overlap.json", Overlap.load),
        groups=_load(files, "groups.json", GroupMasking.load),
        effects=_effects(files),
        lenses=_lenses(files),
        flow=_load(files, "flow.json", HeadNeuronFlow.load),
        patching=_patching(files, settings),
    )


def _metric_name(task: str | None, heads: HeadScores | None) -> str:
    """The task's metric; a stored one comes first, because the task may no longer be registered."""
    if heads is not None:
        return heads.metric_name
    return load_task(task).metric_name if task in task_names() else ""


def _subject(settings: dict[str, Any]) -> str:
    """Subject of a run for its title: its task or tasks; for a patching also the patched activations."""
    if "patch" not in settings:
        return settings.get("task") or join_words(settings["tasks"])
    image, patch = settings["image"], settings["patch"]
    return f"{Path(image).name if image else settings['task']}, {patch['what']} patched by {patch['by']}"


def _load(files: RunFiles, name: str, load: Callable[[Path], T]) -> T | None:
    """What `load` reads of a file; None if the run did not make it."""
    file = files.find(name)
    return None if file is None else load(file)


def _other_rankings(results: list[MaskingResult], neurons: NeuronScores | None) -> dict[str, MaskingResult]:
    """Masking results of other rankings by method: of several sizes, the size of the run's own neurons."""
    by_method: dict[str, MaskingResult] = {}
    for result in results:
        if result.method not in by_method or (neurons and result.n_neurons == neurons.count()):
            by_method[result.method] = result
    return by_method


def _evaluation(files: RunFiles) -> dict[str, Interval | float | int | str]:
    """Of every task that was evaluated its metric, its further measures, and the number of examples."""
    rows: dict[str, Interval | float | int | str] = {}
    for file in files.find_all("evaluate-*.json"):
        found = Evaluation.load(file)
        rows[f"{found.task}: {found.metric_name}"] = found.interval
        measures = {name: value for name, value in (found.measures or {}).items() if value is not None}
        rows |= {f"{found.task}: {name}": value for name, value in measures.items()}
    return rows


def _steering(files: RunFiles) -> dict[str, SteeringTable]:
    """Steering tables by label, from the folder itself and from the folders in its `steering`."""
    tables: dict[str, SteeringTable] = {}
    inner = sorted({file.parent for file in files.folder.glob("steering/*/*.json")})
    for folder in (files.folder, *inner):
        here = files if folder == files.folder else RunFiles(folder)
        table = _load(here, "steering.json", SteeringTable.load)
        if table is None:
            continue
        learned_on = read_run(folder)[0]["dataset"]
        tables[f"learned and measured on {learned_on}"] = table
        for other in here.find_all("on-*.json"):
            measured_on = other.stem.removeprefix("on-")
            tables[f"learned on {learned_on}, measured on {measured_on}"] = SteeringTable.load(other)
    return tables


def _effects(files: RunFiles) -> dict[str, SideEffects]:
    found = files.find_all(f"{_EFFECTS}*.json")
    return {file.stem.removeprefix(_EFFECTS): SideEffects.load(file) for file in found}


def _lenses(files: RunFiles) -> dict[str, LensDifference]:
    """By task: `lens.json` of a folder of one task, `lens-TASK.json` of one of several tasks."""
    found = files.find_all("lens.json") + files.find_all("lens-*.json")
    return {str(delta.task): delta for delta in map(LensDifference.load, found)}


def _patching(files: RunFiles, settings: dict[str, Any]) -> PatchView | None:
    result = _load(files, "patch.json", Labelled.load)
    if result is None:
        return None
    answers = _load(files, "answers.json", lambda file: read_json(file, "patch-answers")) or {}
    pair = _pair(files, answers)
    told = {name: answers.get(key, "") for name, key in (("answers", "text"), ("problem", "problem"))}
    return PatchView(result, settings["patch"], _pairs(settings, result.n), pair, **told)


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


def _pair(files: RunFiles, answers: dict[str, Any]) -> PairView | None:
    """The first pair; `answers` has what the model generates for its two inputs."""
    file = files.find("pair.json")
    if file is None:
        return None
    data = read_json(file, "patch-pair")
    mask = torch.tensor([here == "1" for here in data["image_mask"]])[None]
    clean, corrupted = (
        None if data[side] is None else open_image(files.require(data[side]))
        for side in ("clean", "corrupted")
    )
    assert clean is not None
    inputs = VLMInputs(
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        attention_mask=torch.ones_like(mask, dtype=torch.long),
        image_mask_or_none=mask,
        grids=(tuple((rows, columns) for rows, columns in data["grids"]),),
        regions=(tuple((left, top, right, bottom) for left, top, right, bottom in data["regions"]),),
        layouts=(tuple(map(ImageLayout.of_json, data["layouts"])),) if data["layouts"] else (),
    )
    texts = {name: data[name] for name in ("id", "prompt", "answer", "foil")}
    texts |= {f"{side}_answer": answers.get(side, "") for side in ("clean", "corrupted")}
    return PairView(clean=clean, corrupted=corrupted, inputs=inputs, **texts)


def _promoted(files: RunFiles) -> dict[tuple[int, int], NeuronTokens]:
    data = _load(files, "promoted.json", lambda file: read_json(file, "promoted"))
    rows = [] if data is None else data["neurons"]
    # Folders of before lack the activation: their tokens are those that the output row raises.
    return {(layer, index): NeuronTokens(tuple(tokens), *rest) for layer, index, tokens, *rest in rows}


def _examples(files: RunFiles) -> list[ExampleView]:
    data, views = _load(files, "examples.json", lambda file: read_json(file, "examples")), []
    for row in [] if data is None else data["examples"]:
        picture = row.pop("image")
        region, looks = row.pop("region", None), row.pop("looks", {})
        attention = row.pop("attention", None)  # folders of before held one head's attention
        if attention is not None:
            looks = {row["head"]: attention, **looks}
        stem = Path(picture).stem
        parts: dict[str, Any] = {
            "region": None if region is None else tuple(region),
            "looks": {head: torch.tensor(values) for head, values in looks.items()},
            "lens": _load(files, f"{stem}-logit-lens.json", LogitLens.load),
            "image_lens": _load(files, f"{stem}-image-lens.json", Labelled.load),
        }
        views.append(ExampleView(image=open_image(files.require(picture)), **parts, **row))
    return views
