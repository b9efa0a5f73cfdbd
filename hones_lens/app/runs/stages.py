"""The stages of localization and masking into a run folder: what `hones demo`, `localize` and `mask` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Run, examples_hash, weights_hash
from hones_lens.engine import Tally, as_task
from hones_lens.hones import (
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    NeuronScores,
    attribute_neurons,
    load_masking,
    localize_heads,
    masking_curve,
    remeasure_heads,
    save_heads,
    save_masking,
    save_neurons,
)
from hones_lens.model import HookedVLM
from hones_lens.results import Component
from hones_lens.tasks import Task

OTHER_RANKINGS = (
    "activation_probability",
    "mean_activation",
    "direct",
    "gradient_times_activation",
    "random",
)
# Matched random sets beside every other ranking's neurons.
OTHERS_CONTROLS = 5


class MaskingResults(list[MaskingResult]):
    """Results of several sets of neurons, in one file."""

    def save(self, file: str | Path) -> None:
        """Write them to JSON."""
        save_masking(file, self)

    @classmethod
    def load(cls, file: str | Path) -> MaskingResults:
        """Read what `save` wrote."""
        return cls(load_masking(file))


def start_run(model: HookedVLM, task: str | Task, data: DataChoice, out: str | Path, **settings: Any) -> Run:
    """Open a run folder whose settings tell model, weights and examples by their hashes.

    Raises:
        ValueError: The folder holds a run with other settings, or an example is in both splits.
    """
    chosen, discovery, test = as_task(task), data.discovery(task), data.test(task)
    if shared := sorted({example.id for example in discovery} & {example.id for example in test}):
        raise ValueError(
            f"{len(shared)} {chosen.name} examples, the first {shared[0]!r}, are both in "
            f"{data.discovery_split!r} and in {data.held_out!r}: what they select can't be judged on them"
        )
    return Run(
        out,
        {
            **common_settings(model, chosen, data),
            "held_out_split": data.held_out,
            "discovery": examples_hash(chosen, discovery),
            "test": examples_hash(chosen, test),
            **settings,
        },
    )


def common_settings(model: HookedVLM, task: Task, data: DataChoice) -> dict[str, Any]:
    """What every run's settings begin with."""
    return {
        "model": model.cfg.model_name,
        "weights": weights_hash(model),
        "device": model.cfg.device.type,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "task": task.name,
        "dataset": data.dataset,
        "seed": data.seed,
    }


def find_heads(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, top_k: int | None = None, **options: Any
) -> HeadScores:
    """Stage H1, from the folder if it is there; options are those of `localize_heads`."""

    def localize() -> HeadScores:
        examples, tally, journal = data.discovery(task), Tally(), run.journal("heads")
        heads = localize_heads(model, task, examples, top_k, journal=journal, tally=tally, **options)
        save_heads(heads, run.path("hones/heads.json"))
        run.log(f"heads: {len(heads.top())} critical of {heads.scores.numel()}; {tally}")
        return heads

    return run.stage("heads", HeadScores, localize)


def heads_again(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores
) -> HeldOutHeads | None:
    """The critical heads on the held-out split, from the folder if they are there; None without any."""
    if not heads.top():
        return None
    name = "heads-held-out"
    return run.stage(
        name,
        HeldOutHeads,
        lambda: remeasure_heads(model, task, data.test(task), heads, journal=run.journal(name)),
    )


def find_neurons(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    heads: HeadScores,
    ratio: float | None = None,
) -> NeuronScores:
    """Stages H2 and H3, from the folder if they are there."""

    def attribute() -> NeuronScores:
        neurons = attribute_neurons(model, task, data.discovery(task), heads, ratio)
        save_neurons(neurons, run.path("hones/neurons_top1pct.json"))
        run.log(f"neurons: {neurons.count()} of {neurons.scores.numel()}")
        return neurons

    return run.stage("neurons", NeuronScores, attribute)


def mask_neurons(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    neurons: NeuronScores,
    n_controls: int = 20,
) -> list[MaskingResult]:
    """Stage H4 on the held-out split, from the folder if it is there."""

    def mask() -> MaskingResults:
        options: dict[str, Any] = {"n_controls": n_controls, "journal": run.journal("masking")}
        return MaskingResults(masking_curve(model, task, data.test(task), neurons, **options))

    return run.stage("masking", MaskingResults, mask)


def mask_others(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    ratio: float,
    names: Sequence[str] = OTHER_RANKINGS,
) -> dict[str, MaskingResult]:
    """Other rankings of METHOD under the same budget, each masked on the held-out split.

    Beside each are matched random sets of its own.
    """

    def mask() -> MaskingResults:
        discovery = data.discovery(task)
        rankings = [attribute_neurons(model, task, discovery, ratio=ratio, method=name) for name in names]
        return mask_rankings(model, run, task, data, names, [scores.top() for scores in rankings])

    return {result.method: result for result in run.stage("others", MaskingResults, mask)}


def mask_rankings(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    names: Sequence[str],
    sets: Sequence[Sequence[Component]],
) -> MaskingResults:
    """Sets of neurons masked on the held-out split, each under the name of its ranking."""
    options: dict[str, Any] = {"n_controls": OTHERS_CONTROLS, "journal": run.journal("others")}
    neurons = [[(c.layer, c.index) for c in chosen] for chosen in sets]
    results = masking_curve(model, task, data.test(task), neurons, **options)
    return MaskingResults(replace(r, method=name) for name, r in zip(names, results, strict=True))
