"""All stages of all tasks of one model, in run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.app.report.reproduction import Reproduction, TaskResults
from hones_lens.app.runs import stages, steering as steering_run, views
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Opening, Run, save_left_out
from hones_lens.app.runs.identity import json_hash, model_identity
from hones_lens.app.runs.overlap import find_lens_delta, find_shared_neurons, mask_shared_groups
from hones_lens.app.runs.stages import MaskingResults
from hones_lens.data import Example, tasks_of
from hones_lens.hones import (
    GroupMasking,
    MaskingResult,
    NeuronScores,
    Overlap,
    SideEffects,
    SteeringConfig,
    SteeringTable,
    attribute_neurons,
    masking_curve,
    side_effects,
    transfer_steering,
)
from hones_lens.interventions import Layers, choose_heads
from hones_lens.model import HookedVLM
from hones_lens.tasks import load_task

RATIOS = (0.01, 0.05)
RANKINGS = ("activation_probability", "mean_activation", "activation_entropy", "direct", "random")
# Learning rates and epochs among which dev chooses; HONES's own rate hardly moves a scale in so few steps.
STEERING = {"learning_rates": (5e-3, 5e-2), "epochs": (4,), "draws": 5}
# Examples of a ranking task where none are asked for: more than the demo's, for intervals that say something.
RANKING_SIZES = {"n_discovery": 48, "n_dev": 48, "n_held_out": 60}


def reproduce(
    model: HookedVLM,
    out: str | Path,
    data: DataChoice,
    *,
    tasks: Sequence[str] | None = None,
    shifted: str | None = "shapes-shifted",
    ratios: Sequence[float] = RATIOS,
    n_controls: int = 20,
    steering: Mapping[str, Any] = STEERING,
    opening: Opening | None = None,
    **limits: Any,
) -> Reproduction:
    """Localize, attribute, mask, steer and compare the tasks of one model, into run folders.

    Heads and neurons come from the discovery split, scales from dev; everything is measured on the
    held-out split. A killed run resumes where it stopped.

    Args:
        model: The model.
        out: Folder; each task has a run folder in it, and `across` holds the comparison of the tasks.
        data: The examples.
        tasks: Names of the tasks; default: all that the data set has.
        shifted: A second data set: scales learned on `data` are measured there with no further fitting,
            and others are learned there. None: leave it out.
        ratios: Shares of all neurons to mask; the last one's neurons are steered.
        n_controls: Matched random sets beside HONES's neurons.
        steering: Options of `compare_steering`.
        opening: How the run folders are opened.
        limits: `heads` and `layers` of `localize_heads`: measure these alone.

    Raises:
        ValueError: Fewer than two tasks, a folder with other settings, or examples that can't be used.
    """
    choose_heads(model, limits.get("heads"), limits.get("layers"))
    tasks = _checked_tasks(data, tasks, shifted)
    out, all_data = Path(out), data
    results, neurons, lenses = {}, {}, {}
    for task in tasks:
        data = _with_ranking_sizes(all_data, task)
        datasets = _datasets(data, shifted)
        settings = {"controls": n_controls, "ratios": list(ratios), "rankings": list(RANKINGS)}
        settings |= {name: value for name, value in limits.items() if value is not None}
        run = stages.start_run(model, task, data, out / task, opening=opening, tasks=list(tasks), **settings)
        save_left_out(run, data, task)
        heads = stages.find_heads(model, run, task, data, **limits)
        held_out = stages.remeasure_on_held_out(model, run, task, data, heads)
        if held_out is None:
            raise ValueError(f"no head of {model.cfg.model_name} lowers {heads.metric_name} of {task}")
        neurons[task] = stages.find_neurons(model, run, task, data, heads, ratios[-1], limits.get("layers"))
        masking = _mask(model, run, task, data, neurons[task], tasks, ratios, n_controls)
        lenses[task] = find_lens_delta(model, run, task, data.test(task), neurons[task], "lens")
        views.save_report_views(model, run, task, data, heads, neurons[task])
        tables = _steer(model, run, task, datasets, neurons[task], steering, opening)
        results[task] = TaskResults(heads, held_out, masking, tables)
    datasets = _datasets(all_data, shifted)
    groups, shared, effects = _compare_tasks(model, out / "across", datasets, neurons, results, opening)
    result = Reproduction(model.cfg.model_name, results, shared, groups, lenses, effects)
    (out / "tables.md").write_text(result.to_markdown(), encoding="utf-8")
    return result


def _checked_tasks(data: DataChoice, tasks: Sequence[str] | None, shifted: str | None) -> Sequence[str]:
    """The tasks; every split is read, so that the last one's faults come before the first is measured."""
    tasks = tasks_of(data.dataset, data.data_file) if tasks is None else tasks
    if len(set(tasks)) < 2:
        raise ValueError(f"what tasks share is part of it: at least two tasks are needed, not {list(tasks)}")
    for task in tasks:
        for choice in _datasets(_with_ranking_sizes(data, task), shifted).values():
            for split in (choice.discovery, choice.dev, choice.test):
                split(task)
    return tasks


def _with_ranking_sizes(data: DataChoice, task: str) -> DataChoice:
    """The choice with default sizes for a ranking task where none are given."""
    if not load_task(task).ranks:
        return data
    unset = {name: n for name, n in RANKING_SIZES.items() if getattr(data, name) is None}
    return replace(data, **unset)


def _datasets(data: DataChoice, shifted: str | None) -> dict[str, DataChoice]:
    """The data sets by name; the first is the one on which heads and neurons are selected."""
    datasets = {data.label: data}
    if shifted is not None:
        files = {"data_file": None, "image_dir": None, "encoding": "utf-8"}
        bounds = {"allow_outside": False, "allow_large_pictures": False}
        datasets[shifted] = replace(data, dataset=shifted, **files, **bounds)
    return datasets


def _mask(
    model: HookedVLM,
    run: Run,
    task: str,
    data: DataChoice,
    neurons: NeuronScores,
    tasks: Sequence[str],
    ratios: Sequence[float],
    n_controls: int,
) -> dict[tuple[str, float], MaskingResult]:
    """Masking of HONES's neurons and of other rankings, at several sizes, beside matched random sets."""
    names = [name for name in RANKINGS for _ in ratios]

    def mask() -> MaskingResults:
        options: dict[str, Any] = {"n_controls": n_controls, "journal": run.journal("masking")}
        return MaskingResults(masking_curve(model, task, data.test(task), neurons, ratios=ratios, **options))

    def mask_others() -> MaskingResults:
        others = [_ranking(model, run, task, data, name, tasks, neurons.layers) for name in RANKINGS]
        sizes = [neurons.count(ratio) for ratio in ratios]
        sets = [ranking.top(k) for ranking in others for k in sizes]
        return stages.mask_rankings(model, run, task, data, names, sets)

    keys = [("hones", ratio) for ratio in ratios]
    keys += zip(names, list(ratios) * len(RANKINGS), strict=True)
    results = run.stage("masking", MaskingResults, mask) + run.stage("others", MaskingResults, mask_others)
    return dict(zip(keys, results, strict=True))


def _ranking(
    model: HookedVLM,
    run: Run,
    task: str,
    data: DataChoice,
    name: str,
    tasks: Sequence[str],
    layers: Layers | None,
) -> NeuronScores:
    options: dict[str, Any] = {"layers": layers, "journal": run.journal("others")}
    if name == "activation_entropy":
        others: dict[str, Sequence[Example]] = {t: data.discovery(t) for t in tasks if t != task}
        options["other_tasks"] = others
    return attribute_neurons(model, task, data.discovery(task), method=name, **options)


def _steer(
    model: HookedVLM,
    run: Run,
    task: str,
    datasets: Mapping[str, DataChoice],
    neurons: NeuronScores,
    steering: Mapping[str, Any],
    opening: Opening | None,
) -> dict[tuple[str, str], SteeringTable]:
    """Scales learned and measured on each data set, and those of the first measured on the others."""
    options = {"methods": steering_run.steering_methods(None), "config": SteeringConfig(), **steering}
    tables: dict[tuple[str, str], SteeringTable] = {}
    folders: dict[str, Run] = {}
    for name, data in datasets.items():
        folder = run.folder / "steering" / name
        folders[name] = steering_run.start_steering(model, task, data, folder, neurons, options, opening)
        tables[name, name] = steering_run.steer_neurons(model, folders[name], task, data, neurons, options)
    first, *others = datasets
    for name in others:
        stage, journal = f"on-{name}", folders[first].journal(f"on-{name}")
        transfer = partial(
            transfer_steering, model, tables[first, first], datasets[name].test(task), journal=journal
        )
        tables[first, name] = folders[first].stage(stage, SteeringTable, transfer)
    return tables


def _compare_tasks(
    model: HookedVLM,
    folder: Path,
    datasets: Mapping[str, DataChoice],
    neurons: Mapping[str, NeuronScores],
    results: Mapping[str, TaskResults],
    opening: Opening | None,
) -> tuple[GroupMasking, Overlap, dict[str, SideEffects]]:
    """Comparison of the tasks in a run folder: shared neurons, masked groups, and side effects."""
    tables = {name: {task: r.steering[name, name] for task, r in results.items()} for name in datasets}
    scales = {
        name: {task: table.scales() for task, table in by_task.items() if _has_learned_scales(table)}
        for name, by_task in tables.items()
    }
    run = Run(
        folder,
        {
            "model": model.cfg.model_name,
            **model_identity(model),
            "tasks": list(results),
            "neurons": json_hash({task: [list(c) for c in scores.top()] for task, scores in neurons.items()}),
            "examples": json_hash([[t.example_ids for t in by_task.values()] for by_task in tables.values()]),
            "scales": json_hash([[s.offsets for s in by_task.values()] for by_task in scales.values()]),
        },
        opening=opening,
    )
    shared = find_shared_neurons(run, neurons)
    held_out = {
        name: {t: _with_ranking_sizes(data, t).test(t) for t in results} for name, data in datasets.items()
    }
    first = next(iter(datasets))
    groups, effects = mask_shared_groups(model, run, held_out[first], shared), {}
    for name in datasets:
        if scales[name]:
            stage = f"side-effects-on-{name}"
            measure = partial(side_effects, model, held_out[name], scales[name], journal=run.journal(stage))
            effects[name] = run.stage(stage, SideEffects, measure)
    return groups, shared, effects


def _has_learned_scales(table: SteeringTable) -> bool:
    return any(row.method == "HONES" for row in table.rows)
