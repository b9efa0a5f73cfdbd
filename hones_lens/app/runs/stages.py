"""Stages of localization and masking in a run folder, for `hones demo`, `localize` and `mask`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Opening, Run
from hones_lens.app.runs.identity import examples_hash, model_identity
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
from hones_lens.interventions import Layers
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import Component
from hones_lens.tasks import Task

OTHER_RANKINGS = (
    "activation_probability",
    "mean_activation",
    "direct",
    "gradient_times_activation",
    "random",
)
# Stages in their order, each with the settings that it is the first to read.
DECIDED = {
    "heads": ("positions", "prefilter", "race", "heads", "layers"),
    "heads.json": ("top_k",),
    "heads-held-out": (),
    "neurons": ("ratio", "ratios"),
    "masking": ("controls",),
    "others": ("rankings",),
}
_LATER = ("neurons", "masking", "others")  # stages that some commands leave out
# Number of matched random sets for each of the other rankings.
OTHERS_CONTROLS = 5


class MaskingResults(list[MaskingResult]):
    """Masking results of several sets of neurons, saved in one file."""

    def save(self, file: str | Path) -> None:
        """Write the results as JSON."""
        save_masking(file, self)

    @classmethod
    def load(cls, file: str | Path) -> MaskingResults:
        """Read what `save` wrote."""
        return cls(load_masking(file))


@takes_iterables
def start_run(
    model: HookedVLM,
    task: str | Task,
    data: DataChoice,
    out: str | Path,
    *,
    opening: Opening | None = None,
    stages: Sequence[str] | None = None,
    **settings: Any,
) -> Run:
    """Open a run folder whose settings identify model, weights and examples by hashes.

    Args:
        model, task, data, out: What is run, and where it is kept.
        opening: As for `Run`.
        stages: Which of `heads`, `neurons`, `masking` and `others` are to come; default: all.
        settings: All else that decides numbers.

    Raises:
        ValueError: The folder holds a run with other settings, or an example is in both splits.
    """
    chosen, discovery, test = as_task(task), data.discovery(task), data.test(task)
    if overlapping := sorted({example.id for example in discovery} & {example.id for example in test}):
        raise ValueError(
            f"{len(overlapping)} {chosen.name} examples, the first {overlapping[0]!r}, are both in "
            f"{data.discovery_split!r} and in {data.held_out!r}: what they select can't be judged on them"
        )
    raced = settings.get("race") is not None  # which heads are measured on what then depends on top_k
    return Run(
        out,
        {
            **common_settings(model, chosen, data),
            "held_out_split": data.held_out,
            "discovery": examples_hash(chosen, discovery),
            "test": examples_hash(chosen, test),
            **settings,
        },
        {**DECIDED, "heads": (*DECIDED["heads"], "top_k")} if raced else DECIDED,
        opening,
        others=[] if stages is None else [s for s in _LATER if s not in stages],
    )


def common_settings(model: HookedVLM, task: Task, data: DataChoice) -> dict[str, Any]:
    """The settings that all runs have."""
    return {
        "model": model.cfg.model_name,
        **model_identity(model),
        "device": model.cfg.device.type,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "task": task.name,
        "dataset": data.dataset,
        "seed": data.seed,
    }


def require_intervals(task: str | Task, data: DataChoice) -> None:
    """Check that the held-out split has enough examples for masking, before hours are spent on heads.

    Raises:
        ValueError: It has one.
    """
    if len(data.test(task)) < 2:
        raise ValueError(
            f"masking needs intervals, and they need two examples, but {data.held_out!r} has one: "
            "raise --limit, or stop after `hones localize`"
        )


def find_heads(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, top_k: int | None = None, **options: Any
) -> HeadScores:
    """Load or compute the head scores (HONES eq. H1); options are those of `localize_heads`."""

    def localize() -> HeadScores:
        examples, tally, journal = data.discovery(task), Tally(), run.journal("heads")
        heads = localize_heads(model, task, examples, top_k, journal=journal, tally=tally, **options)
        save_heads(heads, run.path("hones/heads.json"))
        run.log(f"heads: {len(heads.top())} critical of {int(heads.asked.sum())}; {tally}")
        return heads

    return run.stage("heads", HeadScores, localize, beside=["hones/heads.json"])


def remeasure_on_held_out(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores
) -> HeldOutHeads | None:
    """Load or measure the critical heads on the held-out split; None without critical heads or intervals.

    An interval needs two examples.
    """
    if not heads.top():
        return None
    if len(data.test(task)) < 2:
        run.log("heads-held-out: not measured, since intervals need two held-out examples")
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
    layers: Layers | None = None,
) -> NeuronScores:
    """Load or compute the neuron scores (HONES eqs. H2 and H3)."""

    def attribute() -> NeuronScores:
        neurons = attribute_neurons(
            model, task, data.discovery(task), heads, ratio, layers=layers, journal=run.journal("neurons")
        )
        save_neurons(neurons, run.path("hones/neurons_top1pct.json"))
        run.log(f"neurons: {neurons.count()} of {neurons.n_asked}")
        return neurons

    return run.stage("neurons", NeuronScores, attribute, beside=["hones/neurons_top1pct.json"])


def mask_neurons(
    model: HookedVLM,
    run: Run,
    task: str | Task,
    data: DataChoice,
    neurons: NeuronScores,
    n_controls: int = 20,
) -> list[MaskingResult]:
    """Load or compute masking on the held-out split (HONES eq. H4)."""

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
    layers: Layers | None = None,
) -> dict[str, MaskingResult]:
    """Load or compute masking of other rankings under the same budget, on the held-out split.

    Each ranking is compared with matched random sets of its own.
    """

    def mask() -> MaskingResults:
        discovery = data.discovery(task)
        options: dict[str, Any] = {"ratio": ratio, "layers": layers, "journal": run.journal("others")}
        rankings = [attribute_neurons(model, task, discovery, method=name, **options) for name in names]
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
    """Mask sets of neurons on the held-out split; each result has the name of its ranking."""
    options: dict[str, Any] = {"n_controls": OTHERS_CONTROLS, "journal": run.journal("others")}
    neurons = [[(neuron.layer, neuron.index) for neuron in chosen] for chosen in sets]
    results = masking_curve(model, task, data.test(task), neurons, **options)
    return MaskingResults(replace(result, method=name) for name, result in zip(names, results, strict=True))
