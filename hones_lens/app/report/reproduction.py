"""Results of all tasks of one model, and their tables: every figure with its interval and its n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from hones_lens.analysis import LensDifference
from hones_lens.hones import (
    GroupMasking,
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    Overlap,
    SideEffects,
    SteeringTable,
)
from hones_lens.viz import p_value

_INTERVALS = "In brackets: 95 % bootstrap intervals over examples."
_MATCHED = (
    "k/N: it costs more than k of N random sets with as many neurons in each layer, drawn anew for each "
    "method. `matched random`: mean of HONES's such sets, and the worst of them."
)


@dataclass(frozen=True)
class TaskResults:
    """Results of one task.

    Attributes:
        heads: Head scores on the discovery split.
        held_out: The critical heads measured again on the held-out split.
        masking: Results on the held-out split, by method and share of all neurons.
        steering: Tables by the data sets on which scales were learned and measured.
    """

    heads: HeadScores
    held_out: HeldOutHeads
    masking: dict[tuple[str, float], MaskingResult]
    steering: dict[tuple[str, str], SteeringTable]


@dataclass(frozen=True)
class Reproduction:
    """Results of every task of one model, and the neurons that the tasks share.

    Attributes:
        model_name: Name of the model.
        tasks: Results by task name.
        overlap, groups: The selected neurons that tasks share, and what masking each group costs.
        lenses: By task: the logit lens without its neurons masked, minus the lens with them masked.
        side_effects: By data set: every task there under the scales that HONES learned there for each task.
    """

    model_name: str
    tasks: dict[str, TaskResults]
    overlap: Overlap
    groups: GroupMasking
    lenses: dict[str, LensDifference] = field(default_factory=dict)
    side_effects: Mapping[str, SideEffects] = field(default_factory=dict)

    def masking_table(self, ratio: float, what: str = "metric") -> pd.DataFrame:
        """Drops of each task by method, with intervals and p; for `matched random`, the mean of the sets.

        Args:
            ratio: Share of all neurons.
            what: `metric` (the drop in per cent of the baseline, as in the paper) or `log_prob` (nats).
        """
        rows: dict[str, dict[str, str]] = {}
        if what == "metric":
            rows["baseline"] = {name: f"{r.held_out.baseline:.3f}" for name, r in self.tasks.items()}
        for name, results in self.tasks.items():
            for (method, share), result in results.masking.items():
                if share == ratio:
                    rows.setdefault(method, {})[name] = _drop(result, what)
            hones = results.masking["hones", ratio]
            rows.setdefault("matched random", {})[name] = _control_drops(hones, what)
        return _by_method(rows)

    def heads_table(self) -> pd.DataFrame:
        """One row for each critical head: its score on discovery and its drop on the held-out split."""
        rows = []
        for name, results in self.tasks.items():
            held_out = results.held_out
            for head in held_out.heads:
                row = {"task": name, "head": f"L{head.layer}H{head.head}"}
                score = f"{head.score:.3f}" if head.selected_on is None else f"{head.selected_on:.3f}"
                p_values = results.heads.p_values
                score_text = f"{score}, n = {held_out.n_selected_on}"
                p = None if p_values is None else float(p_values[head.layer, head.head])
                row["score on discovery"] = _with_p(score_text, p)
                row["stands on discovery"] = "yes" if head.significant else "no"
                row["drop on the held-out split"] = (
                    f"{head.drop:.3f}, n = {head.drop.n}, p = {p_value(head.p)}"
                )
                rows.append({**row, "holds there": "yes" if head.holds else "no"})
            if held_out.random:
                random = {"task": name, "head": "random heads"}
                random["drop on the held-out split"] = (
                    f"{np.mean(held_out.random):.3f} ({len(held_out.random)} sets: "
                    f"{min(held_out.random):.3f} to {max(held_out.random):.3f}), "
                    f"n = {len(held_out.example_ids)}"
                )
                rows.append({**dict.fromkeys(rows[-1], "–"), **random})
        return pd.DataFrame(rows)

    def steering_table(self, learned_on: str, measured_on: str) -> pd.DataFrame:
        """Metric of each task by method, and its gain over the base with interval and p-value."""

        def cell(table: SteeringTable, method: str) -> str:
            return _gain(table, method)

        return self._steering(learned_on, measured_on, cell)

    def choices_table(self, learned_on: str) -> pd.DataFrame:
        """By method: the settings chosen on dev, and the largest absolute scale."""

        def cell(table: SteeringTable, method: str) -> str:
            rows = [row for row in table.rows if row.method == method]
            chosen = " / ".join(dict.fromkeys(row.settings for row in rows))
            return f"{chosen or '–'}; max \\|a\\| {max(row.max_abs for row in rows):.3g}"

        return self._steering(learned_on, learned_on, cell)

    def _steering(
        self, learned_on: str, measured_on: str, cell: Callable[[SteeringTable, str], str]
    ) -> pd.DataFrame:
        rows: dict[str, dict[str, str]] = {}
        for name, results in self.tasks.items():
            table = results.steering[learned_on, measured_on]
            for method in dict.fromkeys(row.method for row in table.rows):
                rows.setdefault(method, {})[name] = cell(table, method)
        return _by_method(rows)

    def side_effects_table(self, dataset: str) -> pd.DataFrame:
        """Gain of every task (columns) under the scales learned for every task (rows)."""
        rows: dict[str, dict[str, str]] = {}
        for c in self.side_effects[dataset].cells:
            change = f"{c.base:.3f} → {c.steered:.3f}"
            rows.setdefault(c.scales_of, {})[c.task] = _with_p(f"{change}, {c.gain:+.3f}", c.p)
        return _by_method(rows, "scales of")

    def groups_table(self) -> pd.DataFrame:
        """One row for each group and task: drops with intervals, beside the random sets' mean drops."""
        rows = []
        for r in self.groups.results:
            row = {"group": r.method, "task": r.task, "drop in % of the baseline": _drop(r, "metric")}
            row |= {"its random sets": _control_drops(r, "metric"), "nats lost": _drop(r, "log_prob")}
            rows.append({**row, "their nats": _control_drops(r, "log_prob")})
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """All tables of the paper as Markdown, with intervals."""
        blocks = [f"# {self.model_name}", *self._masking_blocks(), *self._steering_blocks()]
        n_heads = int(next(iter(self.tasks.values())).heads.asked.sum())
        rate = f"{100 * next(iter(self.tasks.values())).held_out.q:g} %"
        blocks += ["## Critical heads", _markdown(self.heads_table())]
        blocks.append(
            "Heads were selected on the discovery split. `stands`: at a false discovery rate of "
            f"{rate} over all {n_heads} heads there; `holds`: on the held-out split, over the selected ones. "
            f"{_INTERVALS} `random heads`: mean drop of random sets of as many other heads, and their range."
        )
        blocks += ["## Neurons that tasks share", f"```\n{self.overlap}\n```"]
        blocks += [f"## Masking each group at one size ({self.groups.size} neurons)"]
        blocks += [_markdown(self.groups_table())]
        blocks.append(
            f"{self._n_text({r.task: len(r.example_ids) for r in self.groups.results})} {_INTERVALS}"
        )
        for name, lens in self.lenses.items():
            blocks += [f"## Logit lens of {name}: baseline minus masked", f"```\n{lens}\n```"]
        return "\n\n".join(blocks) + "\n"

    __str__ = to_markdown

    def _masking_blocks(self) -> list[str]:
        blocks = []
        ns = {name: len(r.held_out.example_ids) for name, r in self.tasks.items()}
        for ratio in sorted({share for r in self.tasks.values() for _, share in r.masking}):
            for what, unit in (("metric", "drop in % of the baseline"), ("log_prob", "nats lost")):
                blocks.append(f"## Masking {100 * ratio:g} % of the neurons: {unit}")
                blocks.append(_markdown(self.masking_table(ratio, what)))
                note = f"Held-out examples: {self._n_text(ns)} {_INTERVALS} "
                note += "p: two-sided paired permutation test."
                blocks.append(f"{note} {_MATCHED}")
        return blocks

    def _steering_blocks(self) -> list[str]:
        blocks = []
        first = next(iter(self.tasks.values()))
        for learned_on, measured_on in first.steering:
            tables = {name: r.steering[learned_on, measured_on] for name, r in self.tasks.items()}
            blocks.append(f"## Steering: learned on {learned_on}, measured on {measured_on}")
            blocks.append(_markdown(self.steering_table(learned_on, measured_on)))
            ns = self._n_text({name: len(table.example_ids) for name, table in tables.items()})
            blocks.append(
                f"Metric, and gain over the base. Held-out examples: {ns} {_INTERVALS} p: two-sided paired "
                "permutation test. `RandNeuron`: mean of several random sets, each learned, and the range of "
                "their gains."
            )
            if learned_on == measured_on:
                blocks += [f"### Chosen on dev of {learned_on}", _markdown(self.choices_table(learned_on))]
        for name, effects in self.side_effects.items():
            ns = {cell.task: cell.gain.n for cell in effects.cells}
            blocks += [f"## Side effects on {name}: every task under the scales of every task"]
            blocks += [_markdown(self.side_effects_table(name))]
            note = f"HONES's scales, learned on {name}; base → steered, gain."
            blocks.append(f"{note} Held-out examples: {self._n_text(ns)} {_INTERVALS}")
        return blocks

    @staticmethod
    def _n_text(counts: Mapping[str, int]) -> str:
        """`n = 84.`, or where tasks differ `n = 84 (vqa, ocr), 12 (retrieval).`."""
        by_count: dict[int, list[str]] = {}
        for name, count in counts.items():
            by_count.setdefault(count, []).append(name)
        if len(by_count) == 1:
            return f"n = {next(iter(by_count))}."
        return "n = " + ", ".join(f"{n} ({', '.join(names)})" for n, names in by_count.items()) + "."


def _by_method(rows: dict[str, dict[str, str]], index_name: str = "method") -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index_name).reset_index()


def _drop(result: MaskingResult, measure: str) -> str:
    if measure == "log_prob":
        text = _with_p(f"{result.log_prob_interval:.3g}", result.log_prob_p)
    else:
        text = _with_p(f"{result.relative_interval:.3g}", result.metric_p)
    return f"{text}, {result.beats(measure)}/{len(result.controls)}" if result.controls else text


def _control_drops(result: MaskingResult, measure: str) -> str:
    if measure == "log_prob":
        drops = [result.baseline_log_prob - control.log_prob for control in result.controls]
    else:
        scale = 100 / result.baseline if result.baseline else 0.0
        drops = [scale * (result.baseline - control.metric) for control in result.controls]
    return f"{np.mean(drops):.3g} (worst of {len(drops)}: {max(drops):.3g})"


def _gain(table: SteeringTable, method: str) -> str:
    rows = [row for row in table.rows if row.method == method]
    if method == "RandNeuron":
        gains = [row.gain.value for row in rows]
        metric = np.mean([row.metric for row in rows])
        range_text = f"{len(gains)} draws: {min(gains):+.3f} to {max(gains):+.3f}"
        return f"{metric:.3f}, {np.mean(gains):+.3f} ({range_text})"
    (row,) = rows
    metric = f"{table.metric_of(row):.3f}"
    return metric if method == "Base" else _with_p(f"{metric}, {row.gain:+.3f}", row.p)


def _with_p(text: str, p: float | None) -> str:
    return text if p is None else f"{text}, p = {p_value(p)}"


def _markdown(frame: pd.DataFrame) -> str:
    lines: list[Sequence[str]] = [list(frame.columns), ["---"] * len(frame.columns)]
    lines += frame.fillna("–").astype(str).to_numpy().tolist()
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
