"""Comparison of the neurons of several tasks in a run folder, for `hones overlap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_lens.analysis import LensDifference
from hones_lens.app.report.run_files import RunFiles
from hones_lens.app.report.run_folder import read_run
from hones_lens.app.runs.folder import Opening, Run
from hones_lens.app.runs.identity import examples_hash, json_hash, model_identity
from hones_lens.data import Example
from hones_lens.hones import (
    GroupMasking,
    NeuronScores,
    Overlap,
    find_overlap,
    lens_delta,
    mask_groups,
)
from hones_lens.model import HookedVLM
from hones_lens.tasks import load_task


def neurons_of_runs(folders: Sequence[str | Path]) -> tuple[str, dict[str, NeuronScores]]:
    """The model's name and each task's neurons, from run folders of `hones localize`.

    Raises:
        ValueError: The runs are of several models, or two are of one task, or one has no neurons.
    """
    tasks: dict[str, NeuronScores] = {}
    models: dict[str, str | Path] = {}
    for folder in folders:
        settings, file = read_run(folder)[0], RunFiles(folder).find("neurons.json")
        task = settings.get("task")
        if file is None or task is None:
            raise ValueError(f"{folder} has no neurons of one task: `hones localize --out {folder}` first")
        if task in tasks:
            raise ValueError(f"{folder} is a second run of {task}: runs of different tasks are compared")
        models.setdefault(settings["model"], folder)
        tasks[task] = NeuronScores.load(file)
    if len(models) > 1:
        runs = ", ".join(f"{folder} of {model}" for model, folder in models.items())
        raise ValueError(f"runs of one model are compared, not {runs}")
    return next(iter(models)), tasks


def start_overlap(
    out: str | Path,
    model_name: str,
    neurons: Mapping[str, NeuronScores],
    model: HookedVLM | None = None,
    examples: Mapping[str, Sequence[Example]] | None = None,
    *,
    opening: Opening | None = None,
    **asked: Any,
) -> Run:
    """Open a run folder whose settings identify the neurons and, for masking, weights and examples.

    Args:
        out, model_name, neurons, model, examples: What is compared, and where it is kept.
        opening: As for `Run`.
        asked: Options of the command, recorded too.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    selected = {task: [[c.layer, c.index] for c in scores.top()] for task, scores in neurons.items()}
    settings: dict[str, Any] = {**asked, "model": model_name, "tasks": list(neurons)}
    settings["neurons"] = json_hash(selected)
    if model is not None and examples is not None:
        settings |= {**model_identity(model), "device": model.cfg.device.type}
        settings["examples"] = {
            task: examples_hash(load_task(task), task_examples) for task, task_examples in examples.items()
        }
    return Run(out, settings, opening=opening)


def find_shared_neurons(run: Run, neurons: Mapping[str, NeuronScores]) -> Overlap:
    """Load or compute which neurons the tasks share."""
    return run.stage("overlap", Overlap, lambda: find_overlap(neurons))


def mask_shared_groups(
    model: HookedVLM, run: Run, examples: Mapping[str, Sequence[Example]], shared: Overlap
) -> GroupMasking:
    """Load or compute the results of every task with each group of neurons masked."""
    journals = {task: run.journal(f"groups-{task}") for task in examples}
    return run.stage("groups", GroupMasking, lambda: mask_groups(model, examples, shared, journals=journals))


def find_lens_delta(
    model: HookedVLM, run: Run, task: str, examples: Sequence[Example], neurons: NeuronScores, name: str
) -> LensDifference:
    """Load or compute the logit lens of the baseline minus that with the neurons masked, as stage `name`."""
    options: dict[str, Any] = {"journal": run.journal(name)}
    return run.stage(name, LensDifference, lambda: lens_delta(model, task, examples, neurons, **options))
