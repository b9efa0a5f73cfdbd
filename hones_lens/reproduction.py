"""The whole method on several tasks, from heads to overlap, and its tables: what `hones reproduce` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hones_lens import pipeline
from hones_lens.attribution.heads import HeadScores, significant_heads
from hones_lens.attribution.neurons import NeuronScores, attribute_neurons
from hones_lens.data.examples import Example
from hones_lens.hooked_vlm import HookedVLM
from hones_lens.masking import MaskingResult, load_masking, masking_curve, save_masking
from hones_lens.overlap import GroupMasking, LensDelta, Overlap, lens_delta, mask_groups, overlap
from hones_lens.pipeline import DataChoice
from hones_lens.runs import Run
from hones_lens.statistics import Interval
from hones_lens.steering import SteeringConfig, SteeringTable, transfer_steering
from hones_lens.tasks import TASKS

RATIOS = (0.01, 0.05)
RANKINGS = ("activation_probability", "mean_activation", "activation_entropy", "direct", "random")
# Learning rates and epochs among which dev chooses; HONES's own rate hardly moves a scale in so few steps.
STEERING = {"learning_rates": (5e-3, 5e-2), "epochs": (4,), "draws": 5}


@dataclass(frozen=True)
class TaskResults:
    """What one task came to.

    Attributes:
        heads: From the discovery split.
        significant: How many heads stand at a false discovery rate of 5 %.
        masking: By method and share of all neurons, on the held-out split.
        steering: By where scales were learned and where they were measured.
    """

    heads: HeadScores
    significant: int
    masking: dict[tuple[str, float], MaskingResult]
    steering: dict[tuple[str, str], SteeringTable]


@dataclass(frozen=True)
class Reproduction:
    """Every task of one model, and what the tasks share."""

    model_name: str
    tasks: dict[str, TaskResults]
    overlap: Overlap
    groups: GroupMasking
    lenses: dict[str, LensDelta] = field(default_factory=dict)

    def masking_table(self, ratio: float, what: str = "metric") -> pd.DataFrame:
        """Drops of each task by method, with 95 % intervals; of `random` the mean of the matched sets.

        Args:
            ratio: Share of all neurons.
            what: `metric` (the drop in per cent of the baseline, as in the paper) or `log_prob` (nats).
        """
        rows: dict[str, dict[str, str]] = {}
        for name, results in self.tasks.items():
            for (method, share), result in results.masking.items():
                if share == ratio:
                    rows.setdefault(method, {})[name] = _cell(result, what)
            hones = results.masking["hones", ratio]
            rows.setdefault("matched random", {})[name] = _controls(hones, what)
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.rename_axis("method").reset_index()

    def steering_table(self, learned_on: str, measured_on: str) -> pd.DataFrame:
        """Metric of each task by method, and its gain over the base with a 95 % interval."""
        rows: dict[str, dict[str, str]] = {}
        for name, results in self.tasks.items():
            table = results.steering[learned_on, measured_on]
            for method in dict.fromkeys(row.method for row in table.rows):
                rows.setdefault(method, {})[name] = _gain(table, method)
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.rename_axis("method").reset_index()

    def to_markdown(self) -> str:
        """All tables, as in the paper, with intervals."""
        parts = [f"# {self.model_name}"]
        for ratio in sorted({share for r in self.tasks.values() for _, share in r.masking}):
            for what, unit in (("metric", "drop in % of the baseline"), ("log_prob", "nats lost")):
                parts.append(f"## Masking {100 * ratio:g} % of the neurons: {unit}")
                parts.append(_markdown(self.masking_table(ratio, what)))
        for learned_on, measured_on in next(iter(self.tasks.values())).steering:
            parts.append(f"## Steering: learned on {learned_on}, measured on {measured_on}")
            parts.append(_markdown(self.steering_table(learned_on, measured_on)))
        heads = pd.DataFrame(
            [
                {
                    "task": name,
                    "baseline": f"{r.heads.baseline:.3f}",
                    "n": len(r.heads.example_ids),
                    "critical heads": ", ".join(f"L{c.layer}H{c.index} {c.score:.3f}" for c in r.heads.top()),
                    "significant (FDR 5 %)": r.significant,
                }
                for name, r in self.tasks.items()
            ]
        )
        parts += ["## Critical heads, on the discovery split", _markdown(heads)]
        parts += ["## Neurons that tasks share", f"```\n{self.overlap}\n```"]
        parts += ["## Masking each group at one size", f"```\n{self.groups}\n```"]
        for name, lens in self.lenses.items():
            parts += [f"## Logit lens of {name}: baseline minus masked", f"```\n{lens}\n```"]
        return "\n\n".join(parts) + "\n"

    __str__ = to_markdown


def _cell(result: MaskingResult, what: str) -> str:
    if what == "log_prob":
        return _interval(result.log_prob_interval)
    scale = 100 / result.baseline if result.baseline else 0.0
    return _interval(_scaled(result.metric_interval, scale))


def _controls(result: MaskingResult, what: str) -> str:
    if what == "log_prob":
        drops = [result.baseline_log_prob - control.log_prob for control in result.controls]
    else:
        drops = [100 * (result.baseline - c.metric) / result.baseline for c in result.controls]
    return f"{np.mean(drops):.3g} (worst of {len(drops)}: {max(drops):.3g})"


def _gain(table: SteeringTable, method: str) -> str:
    rows = [row for row in table.rows if row.method == method]
    if len(rows) > 1:
        gains = [row.gain.value for row in rows]
        metric = np.mean([row.metric for row in rows])
        return f"{metric:.3f}, {np.mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
    (row,) = rows
    if method == "Base":
        return f"{row.metric:.3f}"
    return f"{row.metric:.3f}, {row.gain.value:+.3f} [{row.gain.low:+.3f}, {row.gain.high:+.3f}]"


def _scaled(interval: Interval, by: float) -> Interval:
    return replace(interval, value=interval.value * by, low=interval.low * by, high=interval.high * by)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def reproduce(
    model: HookedVLM,
    out: str | Path,
    data: DataChoice,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    shifted: str | None = "shapes-shifted",
    ratios: Sequence[float] = RATIOS,
    n_controls: int = 20,
    steering: Mapping[str, Any] = STEERING,
) -> Reproduction:
    """Localize, attribute, mask, steer and compare the tasks of one model, into run folders.

    Heads and neurons come from the discovery split, scales from dev; everything is measured on the
    held-out split. A killed run goes on where it stopped.

    Args:
        model: The model.
        out: Folder; each task has a run folder in it.
        data: Which examples.
        tasks: Which tasks.
        shifted: A second data set: scales learned on `data` are measured there with no further fitting,
            and others are learned there. None: leave it out.
        ratios: Shares of all neurons to mask; the last one's neurons are steered.
        n_controls: Matched random sets beside HONES's neurons.
        steering: Options of `compare_steering`.

    Raises:
        ValueError: A folder with other settings, or examples that can't be used.
    """
    out = Path(out)
    worlds = {data.dataset: data}
    if shifted is not None:
        worlds[shifted] = replace(data, dataset=shifted, data_file=None, image_dir=None)
    runs, found, neurons = {}, {}, {}
    for task in tasks:
        settings = {"controls": n_controls, "ratios": list(ratios), "rankings": list(RANKINGS)}
        runs[task] = pipeline.start_run(model, task, data, out / task, **settings)
        heads = pipeline.find_heads(model, runs[task], task, data)
        neurons[task] = pipeline.find_neurons(model, runs[task], task, data, heads, ratios[-1])
        masking = _mask(model, runs[task], task, data, neurons[task], tasks, ratios, n_controls)
        tables = _steer(model, runs[task], task, worlds, neurons[task], steering)
        found[task] = TaskResults(heads, len(significant_heads(heads)), masking, tables)
    shared = overlap(neurons)
    journals = {task: run.journal("groups") for task, run in runs.items()}
    held_out = {task: data.test(task) for task in tasks}
    groups = mask_groups(model, held_out, shared, journals=journals)
    lenses = {task: lens_delta(model, task, held_out[task], neurons[task]) for task in tasks}
    result = Reproduction(model.cfg.model_name, found, shared, groups, lenses)
    (out / "tables.md").write_text(result.to_markdown(), encoding="utf-8")
    return result


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
    """HONES's neurons beside matched random sets, and other rankings' neurons, at several sizes."""
    file = run.path("masking.json")
    if not file.exists():
        test, options = data.test(task), {"ratios": ratios, "journal": run.journal("masking")}
        results = masking_curve(model, task, test, neurons, n_controls=n_controls, **options)
        others = [_ranking(model, task, data, name, tasks) for name in RANKINGS]
        sizes = [neurons.count(ratio) for ratio in ratios]
        sets = [[(c.layer, c.index) for c in ranking.top(k)] for ranking in others for k in sizes]
        journal = run.journal("others")
        found = masking_curve(model, task, test, sets, n_controls=0, journal=journal)
        names = [name for name in RANKINGS for _ in sizes]
        results += [replace(result, method=name) for name, result in zip(names, found, strict=True)]
        save_masking(file, results)
    loaded = load_masking(file)
    shares = [ratio for _ in range(1 + len(RANKINGS)) for ratio in ratios]
    return {(r.method, ratio): r for r, ratio in zip(loaded, shares, strict=True)}


def _ranking(model: HookedVLM, task: str, data: DataChoice, name: str, tasks: Sequence[str]) -> NeuronScores:
    options: dict[str, Any] = {}
    if name == "activation_entropy":
        others: dict[str, Sequence[Example]] = {t: data.discovery(t) for t in tasks if t != task}
        options["other_tasks"] = others
    return attribute_neurons(model, task, data.discovery(task), method=name, **options)


def _steer(
    model: HookedVLM,
    run: Run,
    task: str,
    worlds: Mapping[str, DataChoice],
    neurons: NeuronScores,
    steering: Mapping[str, Any],
) -> dict[tuple[str, str], SteeringTable]:
    """Scales learned in each world, measured there; those of the first in the second too."""
    options = {"methods": pipeline.steering_methods(None), "config": SteeringConfig(), **steering}
    tables: dict[tuple[str, str], SteeringTable] = {}
    for name, data in worlds.items():
        folder = run.folder / "steering" / name
        mine = pipeline.start_steering(model, task, data, folder, neurons, options)
        tables[name, name] = pipeline.steer_neurons(model, mine, task, data, neurons, options)
    first, *others = worlds
    for name in others:
        file = run.folder / "steering" / first / f"on-{name}.json"
        if not file.exists():
            test = worlds[name].test(task)
            transfer_steering(model, tables[first, first], test).save(file)
        tables[first, name] = SteeringTable.load(file)
    return tables
