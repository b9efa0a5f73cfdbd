"""Steering in a run folder: the implementation of `hones steer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Opening, Run
from hones_lens.app.runs.identity import examples_hash
from hones_lens.app.runs.stages import common_settings
from hones_lens.engine import as_task
from hones_lens.hones import METHODS, NeuronScores, SteeringConfig, SteeringTable, compare_steering
from hones_lens.model import HookedVLM, did_you_mean
from hones_lens.tasks import Task


def steering_methods(names: Sequence[str] | None) -> tuple[str, ...]:
    """Steering methods from the names used here or in HONES's configurations; None selects all.

    Raises:
        ValueError: A name is unknown; the message lists the valid ones.
    """
    known = {name.lower(): name for name in METHODS}
    known |= {name.lower().replace("-", "_").replace(" ", "_"): name for name in METHODS}
    known |= {"rand_neuron": "RandNeuron", "ours": "HONES", "ours_no_kl": "HONES without KL"}
    known["hones_no_kl"] = "HONES without KL"
    methods = []
    for name in METHODS if names is None else names:
        if name.lower() not in known:
            hint = did_you_mean(name, METHODS)
            raise ValueError(f"unknown method of steering {name!r}; valid: {', '.join(METHODS)}{hint}")
        methods.append(known[name.lower()])
    return tuple(methods)


def start_steering(
    model: HookedVLM,
    task: str | Task,
    data: DataChoice,
    out: str | Path,
    neurons: NeuronScores,
    options: Mapping[str, Any],
    opening: Opening | None = None,
) -> Run:
    """Open a run folder for steering; options are those of `compare_steering`, or of the command.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    chosen = as_task(task)
    return Run(
        out,
        {
            **common_settings(model, chosen, data),
            "dev": examples_hash(chosen, data.dev(task)),
            "test": examples_hash(chosen, data.test(task)),
            "neurons": [[c.layer, c.index] for c in neurons.top(options.get("k"))],
            **{
                name: asdict(value) if isinstance(value, SteeringConfig) else value
                for name, value in options.items()
            },
        },
        opening=opening,
    )


def steer_neurons(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    neurons: NeuronScores,
    options: Mapping[str, Any],
) -> SteeringTable:
    """Load or compute steering (HONES eq. H5); options are those of `compare_steering`."""

    def steer() -> SteeringTable:
        dev, test, journal = data.dev(task), data.test(task), run.journal("steering")
        table = compare_steering(model, task, dev, test, neurons, journal=journal, **options)
        if "HONES" in options["methods"]:
            table.scales().save_hones(run.path("neuron_scales.json"))
        return table

    return run.stage("steering", SteeringTable, steer, beside=["neuron_scales.json"])
